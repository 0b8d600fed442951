"""What each process of test_faults.py runs; no test by itself: python faults.py settings|error|orphan"""
import os
import pathlib
import sys
import time

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]

import conftest
import diffusion
import sample
from nanodd import files, processes
from nanodd.errors import UserError
from nanodd.networks import training

for where, name, value in conftest.shrink():
    where[name] = value
kind, rank, step, draw = sys.argv[1], int(os.environ["RANK"]), training.Trainer.step, sample.draw


def slow(self, number):
    time.sleep(0.03)
    return step(self, number)


def fails(trained, seed, sampler, items, **pull):
    if rank == 1 and items[0][1] > 0:                           # not in its first block
        raise UserError("a mistake that one process sees")
    return draw(trained, seed, sampler, items, **pull)


training.Trainer.step, sample.draw = slow, fails
files.SAVE_EVERY, processes.PARENT_EVERY, processes.GRACE = 999, 0.2, 10
if kind == "error":
    sample.main(["--ipc", "12", "--steps", "2", "--batch", "5", "--out", "drawn"])
else:
    diffusion.main(["--seed", str(rank if kind == "settings" else 0), "--steps", "900"])
