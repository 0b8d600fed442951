"""The rows of benchmarks/cifar100.py: the models, the sets that they draw, the choices, and what judges say.

No benchmark by itself. A row is made by commands that a reader can type, and carries them.
"""
import functools
import itertools
import json
import pathlib
import shlex
import shutil
import statistics
from dataclasses import replace
from typing import NamedTuple

import torch

import diffusion
import minimax
import report
import sample
from nanodd import cli, files
from nanodd.data import datasets
from nanodd.errors import UserError
from nanodd.judging import results
from nanodd.networks import checkpoint
from nanodd.sampling.pilots import PILOT_JUDGES
from report import ROOT
from throughput import flops, matrix_rate
from train_eval import evaluate

MAINS = {"diffusion.py": diffusion.main, "minimax.py": minimax.main, "sample.py": sample.main}
REAL, ALL = "real, at random", "all real images"
BASE, FIFO, ADAPTIVE, SMALL = "base", "+ min-max, FIFO", "+ min-max, adaptive", "smaller base"
MODELS = BASE, FIFO, ADAPTIVE
SAMPLERS, GUIDANCES = ("ddim", "dpm++2m"), (1, 1.5)


class Scale(NamedTuple):
    """How much of everything: the real thing, or the proof that it runs."""
    rows: pathlib.Path     # where they are kept
    base: str              # further words of diffusion.py
    small: str             # the same, of the base model that goes to weights/
    tune: str              # of minimax.py
    draw: str              # of sample.py
    steps: tuple           # of the sweep
    tuned: tuple           # of the fine-tuned models in it; the first also for choosing sampler and guidance
    budget: float          # seconds for each of its sets
    last: float            # seconds for the last set
    ipcs: tuple            # how many of the last set's images a class judges learn from, most wanted first
    real: tuple            # and how many real ones, some of the same
    epochs: int | None     # of all judges; None: the protocol's


# Blocks of 200 images, so that 20 seconds hold several even in 50 guided steps; 1,500 steps of fine-tuning
# are two epochs. Nothing here was tuned.
FULL = Scale(rows=ROOT / "results" / "cifar100.jsonl", base="--compile", small="--network XS --compile",
             tune="--steps 1500", draw="--batch 200", steps=(5, 10, 15, 20, 25, 30, 50), tuned=(10, 50),
             budget=20, last=600, ipcs=(50, 10, 100, 500), real=(10, 50), epochs=None)
TINY = Scale(rows=pathlib.Path("out/cifar100-few/rows.jsonl"), base="--steps 20",
             small="--network XS --steps 2", tune="--steps 4", draw="--batch 8", steps=(2, 4), tuned=(2, 4),
             budget=3, last=6, ipcs=(2, 1), real=(1, 2), epochs=2)


class Run(NamedTuple):
    """What every row needs."""
    scale: Scale
    data_flags: str        # as they stand in the rows: "--data cifar100 --root DIR"
    root: str | None       # what DIR is
    device_flags: list     # ["--device", NAME] where one was asked for
    device: torch.device
    data: datasets.Data                                         # on the CPU, but for the images to test on

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


def model_line(model, run):
    """(the command that makes a model, its checkpoint)."""
    base, tune = f"diffusion.py {run.data_flags}", f"minimax.py {run.data_flags} {run.scale.tune}"
    lines = {BASE: (f"{base} {run.scale.base}", "base"),
             SMALL: (f"{base} {run.scale.small} --out {run.home}/small", "small/base"),
             FIFO: (tune, "minimax"),
             ADAPTIVE: (f"{tune} --memory adaptive --out {run.home}/adaptive", "adaptive/minimax")}
    line, name = lines[model]
    return f"python {line}", run.home / f"{name}.safetensors"


def made(model, run):
    """(a model's checkpoint, all commands that make it), made where it is not there, its base before it.

    Raises UserError where rows are there of another model of that name.
    """
    before = [made(BASE, run)[1]] if model in (FIFO, ADAPTIVE) else []
    line, path = model_line(model, run)
    type_in(*words_of(line, run))
    mine = files.read_header(path)["fingerprint"]
    if any(row.get("model") == model and row["weights"] != mine for row
           in results.read_rows(run.scale.rows)):
        raise UserError(f"{run.scale.rows} has rows of another {path}: bring that model back, or delete the "
                        "rows")
    return path, "; ".join([*before, line])


class Drawn(NamedTuple):
    """A set of images, and how it came about."""
    place: str             # its distilled.npz
    ipc: int
    lines: str             # all commands
    facts: dict            # what a row says of it


def drawn(model, sampler, steps, guidance, budget, run):
    """A set drawn within the budget of seconds; one that is there is left alone, a stopped one goes on."""
    (path, lines), last = made(model, run), budget == run.scale.last
    name = path.relative_to(run.home).with_suffix("").as_posix().replace("/", "-")
    out = run.home / "bench" / f"{name}-{sampler.replace('+', 'p')}-{steps}-{guidance:g}{'-last' * last}"
    line = (f"python sample.py {run.data_flags} --checkpoint {path} --sampler {sampler} --steps {steps} "
            f"--guidance {guidance:g} --seconds {budget:g} {run.scale.draw} --npz --out {out}")
    type_in(*words_of(line, run))
    record = json.loads((out / "distilled.json").read_text())
    facts = {"model": model, "weights": files.read_header(path)["fingerprint"], "sampler": sampler,
             "steps": steps,
             "guidance": guidance, "budget": budget, "drawn": round(record["seconds"], 2)}
    return Drawn(f"{out}/distilled.npz", record["ipc"], f"{lines}; {line}", facts)


# ----------------------------------------------------------------------------------------------------
# 2. Choices: by short judges, on a fifth of the training images
#
# The generator learned from that fifth, no pilot's judge sees it, and the test split stays unseen. First the
# sampler and the guidance of all sets, then the model and the steps of the last one. A pilot is a set of the
# sweep's budget, cut to the size of the smallest among its rivals: the last table compares sets of one size,
# so that the images' quality should decide, not their number.


#
# The generator learned from that fifth, no pilot's judge sees it, and the test split stays unseen. First the
# sampler and the guidance of all sets, then the model and the steps of the last one. A pilot is a set of the
# sweep's budget, cut to the size of the smallest among its rivals: the last table compares sets of one size,
# so that the images' quality should decide, not their number.
def pilot(found, rivals, run):
    """A row: the accuracy of short judges on the set `found`, cut to the smallest of its rivals."""
    row = judged(found.place, min(rival.ipc for rival in rivals), "short", run, pilots=True)
    return {**row, "train": "distilled", **found.facts, "command": found.lines}


def best(name, run):
    """The row of the table `name` with the highest accuracy."""
    rows = [row for row in results.read_rows(run.scale.rows) if row["table"] == name]
    return max(rows, key=lambda row: row["mean"])


def as_chosen(model, steps, budget, run):
    """A set, by the sampler and with the guidance that were chosen."""
    chosen = best("choice", run)
    return drawn(model, chosen["sampler"], steps, chosen["guidance"], budget, run)


def first_pilot(sampler, guidance, run):
    """A pilot for the sampler and the guidance of all sets."""
    sets = {how: drawn(BASE, how[0], run.scale.tuned[0], how[1], run.scale.budget, run)
            for how in itertools.product(SAMPLERS, GUIDANCES)}
    return pilot(sets[sampler, guidance], sets.values(), run)


def last_pilot(model, steps, run):
    """A pilot for the model and the steps of the last set."""
    sets = {how: as_chosen(*how, run.scale.budget, run)
            for how in itertools.product(MODELS, run.scale.tuned)}
    return pilot(sets[model, steps], sets.values(), run)


# ----------------------------------------------------------------------------------------------------
# 3. Rows


def judged(source, ipc, protocol, run, pilots=False):
    """A row of three judges by either protocol, and the command that makes it.

    pilots: of few judges, tested on a fifth of the training images instead, for which there is no command.
    """
    found = run.data._replace(recipe=replace(run.data.recipe, protocol=protocol))
    if pilots:
        held = datasets.split(found.train, .2)[1].to(run.device)
        found = found._replace(test=held, cut="tested on a fifth of the training images")
    bf16 = protocol == "short" and cli.gains_from_bf16(run.device)
    [row] = evaluate([(source, 0)], found, ipc=ipc, runs=PILOT_JUDGES if pilots else 3, seed=0,
                     epochs=run.scale.epochs, bf16=bf16, keep=run.home / "judges")
    line = f"python train_eval.py {run.data_flags} --protocol {protocol} --runs 3 {source}"
    return {**row, "command": line + (f" --ipc {ipc}" if ipc else "")}


def set_row(found, ipc, protocol, run):
    """A row of judges that saw a drawn set, or the first ipc images of each class of it."""
    row = judged(found.place, ipc, protocol, run)
    return {**row, "train": "distilled", **found.facts, "command": f"{found.lines}; {row['command']}"}


def sweep_row(model, steps, run):
    return set_row(as_chosen(model, steps, run.scale.budget, run), None, "short", run)


def last_row(ipc, run):
    chosen = best("last choice", run)
    found = as_chosen(chosen["model"], chosen["steps"], run.scale.last, run)
    if run.scale is FULL:
        shutil.copy(pathlib.Path(found.place).with_suffix(".png"), ROOT / "assets" / "cifar100.png")
    return set_row(found, min(ipc, found.ipc), "challenge", run)


def speed_row(run):
    """How fast the base was trained, and its share of a matrix product's rate."""
    path, line = made(BASE, run)
    header, log = files.read_header(path), path.with_suffix(".log.jsonl").read_text().splitlines()
    settings, recipe, log = header["settings"], run.data.recipe, [json.loads(entry) for entry in log]
    rate = settings["batch"] * statistics.median(               # a stop, or compiling, slows one interval
        (b["step"] - a["step"]) / (b["seconds"] - a["seconds"]) for a, b in itertools.pairwise(log))
    model, x = diffusion.DiT(**header["config"]), torch.randn(1, recipe.channels, recipe.size, recipe.size)
    flop = flops(lambda: model(x, torch.tensor([500.]), torch.tensor([0])).sum().backward())
    product = matrix_rate(run.device, torch.bfloat16 if settings["bf16"] else torch.float32, 4096)
    return {"data": run.data.name, "model": BASE, "weights": header["fingerprint"],
            "images_per_second": round(rate, 1), "gflop_per_image": flop / 1e9,
            "matrix_tflops": product / 1e12, "share": flop * rate / product,
            "steps": log[-1]["step"], "batch": settings["batch"], "bf16": settings["bf16"],
            "seconds": round(log[-1]["seconds"], 1), "device": str(run.device), "seed": settings["seed"],
            "command": line}


def small_row(run):
    """Writes the smaller base model to weights/, in bfloat16; the row is of the float32 original."""
    path, line = made(SMALL, run)
    kept = (ROOT if run.scale is FULL else run.home) / "weights" / run.data.name / path.name
    checkpoint.save_checkpoint(kept,
                              {name: tensor.bfloat16() for name, tensor in files.load_tensors(path).items()},
                              {**files.read_header(path), "command": line})
    return {**sweep_row(SMALL, run.scale.tuned[0], run), "bytes": kept.stat().st_size}


def jobs(scale):
    """{(table, row, what was asked): a function of the Run that makes it}, the order of the work."""
    work = {("speed", BASE, None): speed_row}
    for sampler, guidance in itertools.product(SAMPLERS, GUIDANCES):
        work["choice", f"{sampler}, guidance {guidance:g}", scale.tuned[0]] = functools.partial(
            first_pilot, sampler, guidance)
    for model, steps in itertools.product(MODELS, scale.tuned):
        work["last choice", model, steps] = functools.partial(last_pilot, model, steps)
    for ipc in scale.ipcs:
        work["last", "distilled", ipc] = functools.partial(last_row, ipc)
        if ipc in scale.real:
            work["last", REAL, ipc] = functools.partial(judged, "random", ipc, "challenge")
    for ipc in scale.real:
        work["sweep", REAL, ipc] = functools.partial(judged, "random", ipc, "short")
    work["sweep", ALL, None] = functools.partial(judged, "full", None, "short")
    for model, steps in [*itertools.product(MODELS, scale.tuned), *((BASE, steps) for steps in scale.steps)]:
        work["sweep", model, steps] = functools.partial(sweep_row, model, steps)
    work["last", ALL, None] = functools.partial(judged, "full", None, "challenge")
    work["sweep", SMALL, scale.tuned[0]] = small_row
    return work


def missing(scale):
    """The jobs whose rows are not there yet."""
    return report.missing(jobs(scale), scale.rows)
