"""CIFAR-100 by the challenge's rules: how much of it can a diffusion model hand on in ten minutes?

    python benchmarks/cifar100.py --root DIR                # measures every row that is missing, on a GPU
    python benchmarks/cifar100.py --root DIR --minutes 9    # stops in time; the same command goes on
    python benchmarks/cifar100.py --root DIR --tiny         # all of it on four classes, to see that it runs
    python benchmarks/cifar100.py --tables                  # measures nothing: rewrites the README

Trains DiT-S/2 on the 50,000 training images, fine-tunes it with either memory, and draws a set in 5 to 50
steps each under one budget of seconds, as Fan et al.'s Table 3 has it; then the last set, in ten minutes,
whose first 10 to 500 images a class three judges learn from by the challenge's protocol, as they do from real
ones. No choice sees the test split (section 2).
Rows go to results/cifar100.jsonl, each with its commands, seconds, device and seed; tables, plots and contact
sheet to the README and assets/; a smaller base model to weights/. Rows of two models are never mixed: keep
out/cifar100 for as long as rows are missing. The whole is not timed: no GPU was at hand.
"""
import time

STARTED = time.monotonic()                                      # imports take their time, too

import functools
import itertools
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import statistics
import sys
from dataclasses import replace
from typing import NamedTuple

import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import diffusion
import digits
import minimax
import sample
from digits import pyplot, spread, table, write_readme
from nanodd import cli, files
from nanodd.data import datasets, imageset
from nanodd.errors import UserError, exit_on_user_error
from nanodd.judging import baselines
from nanodd.networks import checkpoint
from nanodd.sampling.pilots import PILOT_JUDGES
from throughput import flops, matrix_rate
from train_eval import evaluate

MAINS = {"diffusion.py": diffusion.main, "minimax.py": minimax.main, "sample.py": sample.main}
REAL, ALL = "real, at random", "all real images"
BASE, FIFO, ADAPTIVE, SMALL = "base", "+ min-max, FIFO", "+ min-max, adaptive", "smaller base"
MODELS = BASE, FIFO, ADAPTIVE
SWEEP_ORDER = REAL, ALL, *MODELS, SMALL
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


def typed(line, run):
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
    type_in(*typed(line, run))
    mine = files.read_header(path)["fingerprint"]
    if any(row.get("model") == model and row["weights"] != mine for row
           in baselines.read_rows(run.scale.rows)):
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
    type_in(*typed(line, run))
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


def pilot(found, rivals, run):
    """A row: the accuracy of short judges on the set `found`, cut to the smallest of its rivals."""
    row = judged(found.place, min(rival.ipc for rival in rivals), "short", run, pilots=True)
    return {**row, "train": "distilled", **found.facts, "command": found.lines}


def best(name, run):
    """The row of the table `name` with the highest accuracy."""
    rows = [row for row in baselines.read_rows(run.scale.rows) if row["table"] == name]
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
    row = evaluate(source, found, ipc=ipc, runs=PILOT_JUDGES if pilots else 3, seed=0,
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
    there = {(row["table"], row["row"], row["asked"]) for row in baselines.read_rows(scale.rows)}
    return {key: make for key, make in jobs(scale).items() if key not in there}


def measure(run):
    """Makes all missing rows, one after the other."""
    for (name, who, asked), make in missing(run.scale).items():
        row = {"table": name, "row": who, "asked": asked, **make(run), "machine": machine(run.device)}
        with open(run.scale.rows, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"row: {name} | {who} | {asked} | " +
              (f"{row['mean']:.2f} +- {row['std']:.2f} %" if "mean" in row else
               f"{row['images_per_second']:.1f} images/s, {100 * row['share']:.0f} % of a product"),
              flush=True)


def machine(device):
    if device.type != "cuda":
        return digits.machine()
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__.split('+')[0]}"


# ----------------------------------------------------------------------------------------------------
# 4. Tables and plots


def tables(rows, scale=FULL):
    """The generated parts of docs/challenge.md, by name: rows -> {name: markdown}.

    What was not measured is a dash.
    """
    there = {(row["table"], row["row"], row["asked"]): row for row in rows}

    def lines(name, cells, order):
        """A line of cells(what was trained on, what was asked, row or {}) for each of the table's jobs."""
        keys = sorted((key for key in jobs(scale) if key[0] == name), key=lambda key: order(*key[1:]))
        return ["| " + " | ".join(map(str, cells(*key[1:], there.get(key, {})))) + " |" for key in keys]

    def cell(row, name, form="{}"):
        return form.format(row[name]) if name in row else "–"

    def accuracy(row):
        return spread(row) if row else "–"

    def last(who, asked, row):
        by = f"{who}: {row['model']}, {row['steps']} steps" if "model" in row else who
        return (by, row.get("ipc", asked or "all"), accuracy(row), cell(row, "best", "{:.1f}"),
                cell(row, "drawn", "{:.0f}"), cell(row, "seconds", "{:.0f}"), cell(row, "command", "`{}`"))

    def sweep(who, asked, row):
        real = who in (REAL, ALL)
        return (who, "–" if real else asked, asked or "all" if real else cell(row, "ipc"), accuracy(row),
                cell(row, "drawn", "{:.1f}"), cell(row, "epochs"),
                f"`{row['command'].split('; ')[0 if real else -2]}`" if row else "–")
    speed = there.get(("speed", BASE, None))
    return {
        "cifar100 last": table("| trained on | images a class | accuracy, % (n) | best epoch, % "
                               "| seconds to draw | to judge | command |", lines(
                                   "last", last, lambda who, asked: (asked or math.inf, who != REAL))),
        "cifar100 sweep": table("| trained on | steps | images a class | accuracy, % (n) | seconds to draw "
                                "| epochs | command |", lines(
                                    "sweep", sweep, lambda who, asked: (SWEEP_ORDER.index(who), asked or 0))),
        "cifar100 speed": "Training the base model: not measured." if speed is None else
            f"Training the base model: {speed['images_per_second']:,.0f} images a second, "
            f"{100 * speed['share']:.0f} % of the rate of a matrix product in "
            f"{'bfloat16' if speed['bf16'] else 'float32'} ({speed['matrix_tflops']:.1f} TFLOP/s); "
            f"{speed['steps']:,} steps of {speed['batch']} took {speed['seconds']:.0f} seconds on "
            f"{speed['machine']}: `{speed['command']}`.",
        "cifar100 pictures": "\n".join(f"![{what}](../assets/{name}.png)" for name, what in PICTURES.items()
                                       if (ROOT / "assets" / f"{name}.png").exists()),
    }


PICTURES = {"cifar100": "Images of the last set, a row for each of the first 20 classes",
            "cifar100-steps": "Accuracy against sampling steps", "cifar100-images": "Accuracy against images"}


def plot_steps(rows, budget, path):
    """The sweep: accuracy against sampling steps, a line for each model."""
    rows = [row for row in rows if row["table"] == "sweep"]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for model in MODELS:
        mine = sorted((row for row in rows if row["row"] == model), key=lambda row: row["steps"])
        axes.errorbar([row["steps"] for row in mine], [row["mean"] for row in mine],
                      [row["std"] for row in mine], marker="o", capsize=3, label=model)
    for row in rows:
        if row["row"] == REAL:
            axes.axhline(row["mean"], color="grey", linestyle=":", label=f"{row['ipc']} real ones a class")
    axes.set(xlabel="sampling steps", ylabel="accuracy, %",
             title=f"{budget:g} seconds of sampling for each set")
    finish(figure, axes, path)


def plot_images(rows, budget, path):
    """The last table: accuracy against images a class, drawn within the budget and real."""
    rows = [row for row in rows if row["table"] == "last"]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for names, label in ((("distilled",), "distilled"), ((REAL, ALL), "real")):
        mine = sorted((row for row in rows if row["row"] in names), key=lambda row: row["ipc"])
        axes.errorbar([row["ipc"] for row in mine], [row["mean"] for row in mine],
                      [row["std"] for row in mine], marker="o", capsize=3, label=label)
    axes.set(xlabel="images a class", ylabel="accuracy, %", xscale="log",
             title=f"the challenge's protocol; {budget:g} seconds of sampling")
    finish(figure, axes, path)


def finish(figure, axes, path):
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def publish(scale):
    """Puts what was measured into the README and assets/; of a proof, beside its rows."""
    rows = baselines.read_rows(scale.rows)
    assets = ROOT / "assets" if scale is FULL else scale.rows.parent
    for name, plot, budget, file in (("sweep", plot_steps, scale.budget, "cifar100-steps.png"),
                                     ("last", plot_images, scale.last, "cifar100-images.png")):
        if any(row["table"] == name for row in rows):
            plot(rows, budget, assets / file)
    parts = tables(rows, scale)
    if scale is FULL:
        write_readme(parts)
    else:
        (scale.rows.parent / "tables.md").write_text("\n\n".join(parts.values()) + "\n")


# ----------------------------------------------------------------------------------------------------
# 5. The driver


class TimeIsUp(BaseException):
    """No Exception: nothing on its way shall take it for an error."""


def ring(*_):
    raise TimeIsUp


def few(root):
    """Where four classes of CIFAR-100 lie, as class folders: 30 pictures each to train on, 10 to test."""
    place = pathlib.Path("out/pictures/cifar100-few")
    if not place.is_dir():
        whole, half = datasets.load("cifar100", root), place.with_name(".half")
        for part, images, count in (("train", whole.train, 30), ("test", whole.test, 10)):
            for c, name in enumerate(images.classes[:4]):
                for k, image in enumerate(images.images[images.labels == c][:count]):
                    imageset.write_png(half / part / name / f"{k:02}.png", image)
        half.rename(place)
    return place


def start(args):
    """The Run that the flags ask for."""
    device, flags = cli.device_named(args.device), [] if args.device == "auto" else ["--device", args.device]
    if device.type == "cpu" and not flags and not args.tiny:
        raise UserError("there is no GPU here, and a CPU would take weeks: --tiny shows that all of it runs "
                        "(--device cpu does it all the same)")
    if args.tiny:
        place = few(args.root)
        found, data_flags = datasets.load(str(place)), f"--data {place}"
    else:
        found = datasets.load("cifar100", args.root)
        data_flags = "--data cifar100" + " --root DIR" * (args.root is not None)
    return Run(scale=TINY if args.tiny else FULL, data_flags=data_flags, root=args.root, device_flags=flags,
               device=device, data=found._replace(test=found.test.to(device)))


def main(argv=None):
    parser = cli.new_parser(__doc__)
    cli.add_flags(parser, "root device")
    parser.add_argument("--minutes", type=float,
                        help="stop after so many, with exit code 1 while rows are missing; what was begun "
                             "goes on the next time")
    parser.add_argument("--tiny", action="store_true",
                        help="prove that all of it runs: rows, tables and plots go to out/cifar100-few")
    parser.add_argument("--tables", action="store_true",
                        help="measure nothing; rewrite the README's tables and plots")
    args = parser.parse_args(argv)
    scale = TINY if args.tiny else FULL
    with exit_on_user_error(parser):
        scale.rows.parent.mkdir(parents=True, exist_ok=True)
        if args.minutes is not None:
            if not args.minutes > 0:
                raise UserError(f"--minutes must be positive, not {args.minutes:g}")
            signal.signal(signal.SIGALRM, ring)
            # since the start, imports included; again every ten seconds, should the first be swallowed
            wait = max(0.001, 60 * args.minutes - time.monotonic() + STARTED)
            signal.setitimer(signal.ITIMER_REAL, wait, 10)
        try:
            if not args.tables and missing(scale):
                measure(start(args))
        except TimeIsUp:
            print("the time is up")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        publish(scale)
        left, all_of_them = len(missing(scale)), len(jobs(scale))
        print(f"{all_of_them - left} of {all_of_them} rows are in {os.path.relpath(scale.rows)}")
        if left and not args.tables:
            parser.exit(1, "the same command goes on with the others\n")


if __name__ == "__main__":
    main()
