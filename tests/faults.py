"""What each process of test_faults.py runs; no test by itself: python faults.py settings|error|bug|orphan"""
import os
import pathlib
import sys
import time

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]

import conftest
import diffusion
from nanodd import files, processes
from nanodd.errors import UserError
from nanodd.networks import training

for where, name, value in conftest.shrink():
    where[name] = value
kind, rank, step = sys.argv[1], int(os.environ["RANK"]), training.Trainer.step


def fails(self, number):
    """The optimizer's step, with the fault of this kind on the second process."""
    if kind == "orphan":
        time.sleep(0.03)
    elif rank == 1 and number == 3:
        raise UserError("a mistake that one process sees") if kind == "error" else KeyError("a bug")
    return step(self, number)


training.Trainer.step = fails
files.SAVE_EVERY, processes.PARENT_EVERY, processes.GRACE = 999, 0.2, 10
seed, steps = rank if kind == "settings" else 0, 900 if kind == "orphan" else 6
diffusion.main(["--seed", str(seed), "--steps", str(steps)])
