"""The rows of benchmarks/cifar100.py: the models, the sets that they draw, the choices, and what judges say.

No benchmark by itself. A row is made by commands that a reader can type, and carries them.
"""
import functools
import itertools
import json
import os
import pathlib
import shlex
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

import diffusion
import report
from nanodd import cli, files
from nanodd.data import datasets, imageset
from nanodd.errors import UserError
from nanodd.judging import results
from nanodd.networks import checkpoint
from nanodd.sampling.pilots import PILOT_JUDGES
from report import MAINS, ROOT
from throughput import flops, matrix_rate
from train_eval import evaluate

REAL, ALL = "real, at random", "all real images"
BASE, FIFO, ADAPTIVE = "base", "+ min-max, FIFO", "+ min-max, adaptive"
PULLED, KEPT, STUDENT = "base, towards modes", "base, a quarter kept", "one-step student"
MODELS = BASE, FIFO, ADAPTIVE
SAMPLER = "dpm++2m"


class Scale(NamedTuple):
    """How much of everything: the real thing, or the proof that it runs."""
    rows: pathlib.Path     # where they are kept
    base: str              # further words of diffusion.py
    tune: str              # of minimax.py
    student: str           # of turbo.py
    draw: str              # of sample.py
    choices: tuple         # (steps, guidance) to choose from, by sets of `pilot` images a class
    pilot: int
    steps: tuple           # of the sweep, most wanted first
    tuned: int             # of the other models in it
    budget: float          # seconds for each of its sets
    last: float            # seconds for the last set
    ipcs: tuple            # how many of its images a class judges learn from, None for all; most wanted first
    real: tuple            # and how many real ones, some of the same
    views: int             # how many images a judge of a whole set sees, by the challenge's protocol
    modes: int             # of each class, for the row that is drawn towards them
    epochs: int | None     # of all judges; None: the protocol's


# 30,000 steps of the network of 7.5M parameters, whose weights are small enough to come with the code; blocks
# of 200 images, so that five seconds hold several even in 50 guided steps; 500 steps of fine-tuning. A judge
# of a whole set sees as many images as one of 50 a class: 1,001 epochs of 5,000. The last set has 60 of the
# challenge's 600 seconds. But for the choices nothing was tuned.
FULL = Scale(rows=ROOT / "results" / "cifar100.jsonl", base="--network XS --steps 30000 --compile",
             tune="--steps 500", student="", draw="--batch 200",
             choices=((10, 1), (10, 1.5), (10, 2), (20, 1.5)), pilot=50, steps=(10, 5, 20, 50, 15, 30, 25),
             tuned=10, budget=5, last=60, ipcs=(None, 50, 10, 100), real=(10, 50), views=1001 * 5000,
             modes=50, epochs=None)
TINY = Scale(rows=pathlib.Path("out/cifar100-few/rows.jsonl"), base="--steps 20", tune="--steps 4",
             student="--steps 2", draw="--batch 8", choices=((2, 1), (2, 1.5), (4, 1.5)), pilot=4,
             steps=(2, 4), tuned=2, budget=3, last=6, ipcs=(None, 2, 1), real=(1, 2), views=240, modes=2,
             epochs=2)


class Run(NamedTuple):
    """What every row needs."""
    scale: Scale
    data_flags: str        # as they stand in the rows: "--data cifar100 --root DIR"
    root: str | None       # what DIR is
    device_flags: list     # ["--device", NAME] where one was asked for
    device: torch.device
    data: datasets.Data                                         # on the CPU, but for the images to test on
    comparison: Callable   # () -> compare: features.comparison with a judge of all real images

    @property
    def home(self):
        return pathlib.Path("out", self.data.name)


# ----------------------------------------------------------------------------------------------------
# 1. What the rows are made from: models, and the sets that they draw


def words_of(line, run):
    """ "python X.py ..." -> X.py and the words that its main() gets: DIR becomes the place it stands for."""
    _, script, *words = shlex.split(line)
    return script, (*(run.root if word == "DIR" else word for word in words), *run.device_flags)


@functools.cache
def type_in(script, words):
    """Runs a stage in this process, once: what is finished it leaves alone, what was stopped goes on."""
    MAINS[script](list(words))


def base_line(run):
    """The command that trains the base model."""
    return f"python diffusion.py {run.data_flags} {run.scale.base}"


def weights_of(path):
    """The fingerprint that rows have of a checkpoint; of one that was rounded, the original's."""
    header = files.read_header(path)
    return header.get("rounded_from", header["fingerprint"])


def base_of(run):
    """The base model, in bfloat16 in weights/ so that it can come with the code; trained if it is not there.

    Where a network as wide draws in bfloat16, the original draws the same images to the bit.
    """
    kept = (ROOT if run.scale is FULL else run.home) / "weights" / run.data.name / "base.safetensors"
    if not kept.is_file():
        type_in(*words_of(base_line(run), run))
        path = run.home / "base.safetensors"
        tensors = {name: tensor.bfloat16() for name, tensor in files.load_tensors(path).items()}
        header = {**files.read_header(path), "command": base_line(run), "rounded_from": weights_of(path)}
        checkpoint.save_checkpoint(kept, tensors, header)
    return kept


def made(model, run):
    """(a model's checkpoint, the commands that make it of the base model), made where it is not there.

    Raises UserError where rows are there of another model of that name.
    """
    path, lines = base_of(run), []
    if model != BASE:
        base, flags = os.path.relpath(path), run.data_flags
        tune = f"minimax.py {flags} {run.scale.tune} --base {base}"
        words, name = {
            FIFO: (tune, "minimax"),
            ADAPTIVE: (f"{tune} --memory adaptive --out {run.home}/adaptive", "adaptive/minimax"),
            STUDENT: (f"turbo.py {flags} --checkpoint {base} {run.scale.student}", "turbo")}[model]
        path, lines = run.home / f"{name}.safetensors", [f"python {words}".rstrip()]
        type_in(*words_of(lines[0], run))
    if any(row.get("model") == model and row["weights"] != weights_of(path) for row
           in results.read_rows(run.scale.rows)):
        raise UserError(f"{run.scale.rows} has rows of another {os.path.relpath(path)}: bring that model "
                        "back, or delete the rows")
    return path, lines


class Drawn(NamedTuple):
    """A set of images, and how it came about."""
    place: str             # its distilled.npz
    ipc: int
    lines: str             # the commands, from the base model on
    facts: dict            # what a row says of it


def drawn(model, steps, guidance, size, run, sampler=SAMPLER):
    """A set of images; one that is there is left alone, a stopped one goes on.

    size: words of sample.py that say how many images, and what else distinguishes the set: "--seconds 5".
    """
    path, lines = made(model, run)
    name = {BASE: "base", FIFO: "fifo", ADAPTIVE: "adaptive", STUDENT: "student"}[model]
    amount = size.replace(" --", "-").replace(" ", "")[2:]      # "seconds5", "seconds5-oversample4"
    out = run.home / "bench" / f"{name}-{steps}-{guidance:g}-{amount}"
    line = (f"python sample.py {run.data_flags} --checkpoint {os.path.relpath(path)} --sampler {sampler} "
            f"--steps {steps} --guidance {guidance:g} {size} {run.scale.draw} --npz --out {out}")
    type_in(*words_of(line, run))
    record = json.loads((out / "distilled.json").read_text())
    facts = {"model": model, "weights": weights_of(path), "sampler": sampler, "steps": steps,
             "guidance": guidance, "budget": record["budget"],
             "drawn": round(record["seconds"], 2)}
    return Drawn(f"{out}/distilled.npz", record["ipc"], "; ".join([*lines, line]), facts)


# ----------------------------------------------------------------------------------------------------
# 2. The choice of steps and guidance: by short judges, on a fifth of the training images
#
# The generator learned from that fifth, no judge of this choice did, and the test split stays unseen.
# All rivals draw as many images, so that quality decides, though a second holds twice as many unguided ones.


def pilot_row(steps, guidance, run):
    """A row: the accuracy of short judges on a set of the base model, and the commands that drew it."""
    found = drawn(BASE, steps, guidance, f"--ipc {run.scale.pilot}", run)
    row = judged(found.place, None, "short", run, pilots=True)
    return {**row, "train": "distilled", **found.facts, "command": found.lines}


def chosen(run):
    """The row of the choice with the highest accuracy."""
    return max((row for row in results.read_rows(run.scale.rows) if row["table"] == "choice"),
               key=lambda row: row["mean"])


# ----------------------------------------------------------------------------------------------------
# 3. Rows


def judged(source, ipc, protocol, run, images=None, pilots=False):
    """A row of three judges by either protocol, and the command that makes it.

    images: of a whole set, whose judges by the challenge's protocol see run.scale.views images each, in fewer
    epochs. pilots: few judges, tested on a fifth of the training images, for which there is no command.
    """
    found, epochs = run.data._replace(recipe=replace(run.data.recipe, protocol=protocol)), run.scale.epochs
    if pilots:
        held = datasets.split(found.train, .2)[1].to(run.device)
        found = found._replace(test=held, cut="tested on a fifth of the training images")
    if images and protocol == "challenge":
        epochs = max(1, run.scale.views // images)
    bf16 = protocol == "short" and cli.gains_from_bf16(run.device)
    [row] = evaluate([(source, 0)], found, ipc=ipc, runs=PILOT_JUDGES if pilots else 3, seed=0, epochs=epochs,
                     bf16=bf16, keep=run.home / "judges", compare=None if pilots else run.comparison())
    line = (f"python train_eval.py {run.data_flags} --protocol {protocol} --runs 3 --metrics {source}"
            + (f" --ipc {ipc}" if ipc else "") + (f" --epochs {epochs}" if epochs else ""))
    return {**row, "command": line}


def set_row(found, ipc, protocol, run):
    """A row of judges that saw a drawn set, or the first ipc images of each class of it."""
    row = judged(found.place, ipc, protocol, run, None if ipc else found.ipc * len(run.data.train.classes))
    return {**row, "train": "distilled", **found.facts, "command": f"{found.lines}; {row['command']}"}


def sweep_row(model, steps, more, run):
    """A row of the sweep, with the guidance that was chosen. more: of sample.py's words, or ""."""
    size = f"--seconds {run.scale.budget:g} {more}".rstrip()
    found = drawn(model, steps, chosen(run)["guidance"], size, run)
    return set_row(found, None, "short", run)


def student_row(run):
    """A row of the sweep whose images took one call of a network each, without guidance."""
    found = drawn(STUDENT, 1, 1, f"--seconds {run.scale.budget:g}", run, sampler="turbo")
    return set_row(found, None, "short", run)


def last_row(ipc, run):
    """A row of the base model's last set, drawn as chosen: of the first ipc images a class, or all (None)."""
    how = chosen(run)
    found = drawn(BASE, how["steps"], how["guidance"], f"--seconds {run.scale.last:g}", run)
    if run.scale is FULL:                                       # twelve of the sheet's rows of 32 + 2 pixels
        sheet = imageset.open_image(pathlib.Path(found.place).with_suffix(".png"))
        imageset.write_png(ROOT / "assets" / "cifar100.png", sheet[:, :12 * 34 + 2])
    return set_row(found, ipc and min(ipc, found.ipc), "challenge", run)


def real_row(source, ipc, protocol, run):
    """A row of judges that saw real images: "random", ipc of each class, or "full"."""
    return judged(source, ipc, protocol, run, None if ipc else len(run.data.train.labels))


def speed_row(run):
    """How fast the base is trained, anew if need be, and its share of a matrix product's rate."""
    type_in(*words_of(base_line(run), run))
    path = run.home / "base.safetensors"
    header, log = files.read_header(path), path.with_suffix(".log.jsonl").read_text().splitlines()
    settings, recipe, log = header["settings"], run.data.recipe, [json.loads(entry) for entry in log]
    rate = settings["batch"] * statistics.median(               # a stop, or compiling, slows one interval
        (b["step"] - a["step"]) / (b["seconds"] - a["seconds"]) for a, b in itertools.pairwise(log))
    model, x = diffusion.DiT(**header["config"]), torch.randn(1, recipe.channels, recipe.size, recipe.size)
    flop = flops(lambda: model(x, torch.tensor([500.]), torch.tensor([0])).sum().backward())
    product = matrix_rate(run.device, torch.bfloat16 if settings["bf16"] else torch.float32, 4096)
    return {"data": run.data.name, "weights": weights_of(path), "images_per_second": round(rate, 1),
            "gflop_per_image": flop / 1e9, "matrix_tflops": product / 1e12, "share": flop * rate / product,
            "steps": log[-1]["step"], "batch": settings["batch"], "bf16": settings["bf16"],
            "seconds": round(log[-1]["seconds"], 1), "device": str(run.device), "seed": settings["seed"],
            "command": base_line(run)}


def jobs(scale):
    """{(table, row, what was asked): a function of the Run that makes it}, the most wanted first."""
    part, work, few = functools.partial, {("speed", BASE, None): speed_row}, scale.tuned
    for steps, guidance in scale.choices:
        work["choice", f"guidance {guidance:g}", steps] = part(pilot_row, steps, guidance)
    whole, *cuts = scale.ipcs
    work["last", "distilled", whole] = part(last_row, whole)
    work["sweep", ALL, None] = part(real_row, "full", None, "short")
    for model in MODELS:
        work["sweep", model, few] = part(sweep_row, model, few, "")
    for steps in scale.steps:
        work["sweep", BASE, steps] = part(sweep_row, BASE, steps, "")
    for ipc in cuts:
        work["last", "distilled", ipc] = part(last_row, ipc)
    for name, more in ((KEPT, "--oversample 4"), (PULLED, f"--modes {scale.modes}")):
        work["sweep", name, few] = part(sweep_row, BASE, few, more)
    for ipc in scale.real:
        work["sweep", REAL, ipc] = part(real_row, "random", ipc, "short")
        work["last", REAL, ipc] = part(real_row, "random", ipc, "challenge")
    work["last", ALL, None] = part(real_row, "full", None, "challenge")
    work["sweep", STUDENT, 1] = student_row
    return work


def missing(scale):
    """The jobs whose rows are not there yet."""
    return report.missing(jobs(scale), scale.rows)
