"""Rows of docs/digits.md's tables of one-step models: students, what they are compared with, equal seconds.

No benchmark by itself: `python benchmarks/digits.py` measures them, on the test digits. Two comparisons are
made here, since no command makes them: regression, which trains the student on pairs of noise and the base
model's image of it in 50 steps, and "base, then student", which takes the base for the first of two calls.
"""
import functools
import json
import pathlib
import shutil
import statistics

import torch
from torch import nn

import digits_rows
import sample
import turbo
from nanodd.data import imageset
from nanodd.networks import checkpoint, models, training
from nanodd.sampling import loading
from report import type_in
from train_eval import evaluate

RUNS, PAIRS = 5, 4000                                           # sets of a row; pairs for the regression
BUDGETS = 0.5, 2, 10                                            # seconds
BASE, HOME = "out/digits/base.safetensors", "out/bench/turbo"
# row -> (flags of turbo.py, None for the base model; flags of sample.py), at ten and at fifty a class
DRAWN = {
    **{f"base, DDIM, {steps} steps": (None, f"--steps {steps}") for steps in (5, 10)},
    **{f"student, {steps} step{'s' * (steps > 1)}": ("", f"--steps {steps}") for steps in (1, 2)},
}
# the same, at ten a class only
ONCE = {
    **{f"base, DDIM, {steps} step{'s' * (steps > 1)}": (None, f"--steps {steps}") for steps in (1, 2)},
    "student, 4 steps": ("", "--steps 4"),
    **{f"base, DPM-Solver++(2M), {steps} steps": (None, f"--sampler dpm++2m --steps {steps}")
       for steps in (2, 5, 10)},
    "lambda 0, 1 step": ("--lambda 0", "--steps 1"),
    "L_dist alone, 1 step": ("--no-adversarial", "--steps 1"),
    "features of the base, 1 step": ("--features base", "--steps 1"),
    **{f"t* {t}, 1 step": (f"--t-star {t}", "--steps 1") for t in (500, 727, 999)},
}

# ----------------------------------------------------------------------------------------------------
# 1. What commands draw


def student(flags):
    """Runs turbo.py with these flags, once: (checkpoint, command); None is the base model: (its path, "")."""
    if flags is None:
        return BASE, ""
    out = f"{HOME}/{digits_rows.slug(flags) or 'student'}"
    command = " ".join(f"python turbo.py --checkpoint {BASE} {flags} --out {out}".split())
    type_in(command)
    return f"{out}/turbo.safetensors", command


def per_thousand(path, flags):
    """Seconds in which sample.py draws and writes 1,000 images: the median of three sets of 2,000."""
    seconds, record = [], pathlib.Path(HOME, "speed", "distilled.json")
    for _ in range(3):
        type_in(f"python sample.py --checkpoint {path} {flags} --ipc 200 --npz --out {record.parent}")
        seconds.append(json.loads(record.read_text())["seconds"] / 2)
        shutil.rmtree(record.parent)
    return round(statistics.median(seconds), 3)


def sets_row(tune, flags, ipc, data, bf16, compare, timed):
    """A set, and a judge of it, for each of five seeds; `timed`: the seconds for 1,000 images as well."""
    path, tuning = student(tune)
    out = f"{HOME}/sets/{path.split('/')[-2]}-{digits_rows.slug(flags)}-{ipc}".replace("+", "p")
    draw = f"python sample.py --checkpoint {path} {flags} --ipc {ipc} --seed S --out {out}-S"
    sets, _ = digits_rows.drawn_sets(draw, out, data, RUNS)
    judge = f"python train_eval.py {out}-S/distilled --metrics --runs 1 --seed S"
    return {**digits_rows.judged(sets, data, bf16, compare),
            "per_thousand": per_thousand(path, flags) if timed else None,
            "command": "; ".join(filter(None, [tuning, draw, judge]))}


def budget_row(tune, flags, seconds, data, bf16):
    """One set, as large as so many seconds allow, and five judges of it."""
    path, tuning = student(tune)
    out = f"{HOME}/seconds/{path.split('/')[-2]}-{digits_rows.slug(flags)}-{seconds:g}s"
    draw = (f"python sample.py --checkpoint {path} {flags} --seconds {seconds:g} --npz --out {out}"
            + " --batch 20" * (seconds < 1))                    # ten steps of 100 images are too slow for it
    type_in(draw)
    [row] = evaluate([(f"{out}/distilled.npz", 0)], data, ipc=None, runs=RUNS, seed=0, bf16=bf16)
    record = json.loads(pathlib.Path(out, "distilled.json").read_text())
    return {**row, "train": "distilled", "drawn": round(record["seconds"], 2),
            "command": "; ".join(filter(None, [tuning, draw, f"python train_eval.py {out}/distilled.npz"]))}


# ----------------------------------------------------------------------------------------------------
# 2. What no command draws


def trained(network, header):
    """A network and its header as what sample.draw takes."""
    schedule = checkpoint.schedule_of(header["schedule"], BASE)
    guide = {"guidance": 1.0, "channels": None, "interval": (0, schedule.T - 1)}
    phases = [(0, len(header["classes"]) - 1, {})]
    return loading.Trained("", network.eval(), header, phases, schedule, guide, lambda x: x, None, False)


@functools.cache
def regression(recipe):
    """The base model after regression on pairs of noise and image, as a loading.Trained. recipe: the digits'.

    As many steps as turbo.py's, at its rate. x at t* is noise alone, as for a student.
    """
    network, header = models.load_model(BASE)
    items = [(p % 10, p // 10) for p in range(PAIRS)]
    teacher = trained(network, header)
    images = sample.draw(teacher, 1, sample.sampler_of("ddim", 50), items)              # (N, 1, 8, 8) uint8
    names = [(header["classes"][label], index) for label, index in items]
    noise = sample.image_noise(1, names, images.shape[1:], "cpu")(0)
    x0, y, schedule = imageset.to_float(images), torch.tensor([label for label, _ in items]), teacher.schedule
    plan = training.Plan(steps=turbo.STEPS, batch=recipe.batch, lr=turbo.FIXED["lr"], decay=True,
                         ema=recipe.ema, seed=0, flip=False)
    trainer = training.Trainer(network, plan)
    for step in range(plan.steps):
        index = training.batch_index(PAIRS, plan.batch, step, 0)
        t = torch.full((plan.batch,), turbo.T_STAR)
        x = schedule.noise[turbo.T_STAR] * noise[index]                      # (B, 1, 8, 8)
        x_hat = turbo.x0_hat(trainer.predict, schedule, x, t, y[index])
        trainer.optimizer.zero_grad(set_to_none=True)
        (x_hat - x0[index]).square().mean().backward()
        trainer.step(step)
    loading.load_weights_into(network, trainer.ema)
    return trained(network, header)


class BaseThenStudent(nn.Module):
    """The base model at t*, the student below; the batch has one t (arXiv 2503.10637)."""

    def __init__(self, base, student):
        super().__init__()
        self.base, self.student = base, student

    def forward(self, x, t, y):
        return (self.base if t[0] == turbo.T_STAR else self.student)(x, t, y)


def compared(kind, ipc, data, bf16, compare):
    """A set of a network that no command draws, and a judge of it, for each of five seeds."""
    if kind == "regression, 1 step":
        drawer = regression(data.recipe)
        steps = 1
    else:                                                       # base, then student: two calls
        path, _ = student("")
        (base, header), (network, _) = models.load_model(BASE), models.load_model(path)
        drawer, steps = trained(BaseThenStudent(base, network), header), 2
    sampler = sample.sampler_of("turbo", steps, schedule=drawer.schedule, start=turbo.T_STAR)
    items, sets = [(p % 10, p // 10) for p in range(10 * ipc)], []
    for seed in range(RUNS):
        images = sample.draw(drawer, seed, sampler, items)
        sets.append(imageset.ImageSet(images, torch.tensor([c for c, _ in items]), data.train.classes))
    return {**digits_rows.judged(sets, data, bf16, compare), "per_thousand": None,
            "command": "python benchmarks/digits.py"}


def jobs(data, bf16, compare):
    """{(table, row, asked): function that makes the row}. compare: () -> features.comparison."""
    rows = {}
    for ipc in (10, 50):
        for name, made in {**DRAWN, **(ONCE if ipc == 10 else {})}.items():
            rows["turbo", name, ipc] = lambda made=made, ipc=ipc: sets_row(
                *made, ipc, data, bf16, compare(), timed=made in DRAWN.values())
        for name in ("regression, 1 step", "base, then student"):
            rows["turbo", name, ipc] = lambda name=name, ipc=ipc: compared(name, ipc, data, bf16, compare())
    for seconds in BUDGETS:
        for name, made in DRAWN.items():
            rows["turbo-seconds", name, seconds] = (
                lambda made=made, seconds=seconds: budget_row(*made, seconds, data, bf16))
    return rows
