"""What each process of test_many.py runs; no test by itself."""
import itertools
import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]

import conftest
import diffusion
import minimax
import sample
import turbo
from nanodd import processes
from nanodd.data import datasets
from nanodd.networks import autoencoder, training
from nanodd.sampling import distilled, pilots
import torch

files, out = conftest.ImageNet(*map(pathlib.Path, sys.argv[1:4])), sys.argv[4]
for where, name, value in conftest.shrink():
    where[name] = value
autoencoder.WIDTHS = conftest.NARROW
ticks = itertools.count()
distilled.clock = lambda: next(ticks) / 50                      # moved by looks at it, on any machine alike

with processes.process_group():                                 # one group for all of it
    base = ["--base", "out/digits/base.safetensors", "--steps", "4"]
    minimax.main([*base, "--lambda-r", "0", "--lambda-d", "0", "--out", f"{out}/zero"])
    minimax.main([*base, "--lambda-r", ".1", "--lambda-d", ".1", "--out", f"{out}/both"])
    sample.main(["--ipc", "3", "--steps", "4", "--batch", "7", "--out", f"{out}/drawn"])
    sample.main(["--seconds", "1.5", "--steps", "2", "--batch", "7", "--out", f"{out}/budget"])
    sample.main(["--ipc", "2", "--steps", "3", "--batch", "7", "--modes", "--oversample", "2",
                 "--out", f"{out}/kept"])
    pilots.CANDIDATES = (1, 2)
    sample.main(["--steps", "auto", "--seconds", "1.5", "--batch", "7", "--out", f"{out}/auto"])
    diffusion.main(["--network", "uvit", "--steps", "4", "--out", f"{out}/uvit"])
    minimax.main(["--data", "imagewoof", "--root", str(files.root), "--steps", "1", "--out", f"{out}/woof"])

    student = ["--checkpoint", "out/digits/base.safetensors", "--steps", "4"]
    turbo.main([*student, "--no-adversarial", "--out", f"{out}/dist"])
    turbo.main([*student, "--features", "base", "--out", f"{out}/turbo"])
    sample.main(["--checkpoint", f"{out}/turbo/turbo.safetensors", "--ipc", "3", "--batch", "7",
                 "--out", f"{out}/turbo"])

    # the memories after three steps
    train, losses = datasets.load("digits").train, minimax.MinMax(.1, .1)
    torch.manual_seed(0)
    plan = training.Plan(steps=3, batch=32, lr=1e-3, decay=False, ema=.9, seed=0, flip=False)
    model = diffusion.DiT("mini", size=8, patch=2, channels=1, classes=10)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    trainer, schedule = training.Trainer(model, plan), diffusion.Schedule()
    for _ in minimax.tune(trainer, train, torch.arange(11), schedule, losses):
        pass
    torch.save(losses.state_dict(), f"{out}/memories-{processes.rank()}.pt")

    # the mean gradient, of 1 on the first process and 2 on the second
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 1.0 + processes.rank())
    processes.average_gradients([parameter])
    torch.save(parameter.grad, f"{out}/gradient-{processes.rank()}.pt")
