"""CIFAR-100 by the challenge's rules: how much of it can a diffusion model hand on in ten minutes?

    python benchmarks/cifar100.py --root DIR                # measures every row that is missing, on a GPU
    python benchmarks/cifar100.py --root DIR --minutes 9    # stops in time; the same command goes on
    python benchmarks/cifar100.py --root DIR --tiny         # all of it on four classes, to see that it runs
    python benchmarks/cifar100.py --tables                  # measures nothing: rewrites the README

Trains DiT-S/2 on the 50,000 training images, fine-tunes it with either memory, and draws sets in 5 to 50
steps under one budget of seconds (Fan et al.'s Table 3); then the last set, in ten minutes, whose first 10 to
500 images a class three judges learn from by the challenge's protocol, as they do from real ones. What has to
be chosen is chosen on a fifth of the training images (section 2); the test split is read once per row.
Rows go to results/cifar100.jsonl, each with its command, seconds, device and seed; tables, plots and contact
sheet to the README and assets/; a small base model to weights/. They belong to the models in out/cifar100: a
new one starts new rows. The whole is not timed: no GPU was at hand. --tiny takes 3 minutes on two cores.
"""
import time

STARTED = time.monotonic()                                      # imports take their time, too

import functools
import itertools
import json
import math
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
sys.path.insert(0, str(ROOT / "benchmarks"))

import digits
from digits import pyplot, spread, table, write_readme
from throughput import flops, matrix_rate

import data
import diffusion
import minimax
import sample
from data import (UserError, add_flags, device_named, gains_from_bf16, load_tensors, new_parser, one_sentence,
                  read_header, split, write_png)
from train_eval import count_epochs, evaluate, first_of_each, read_distilled, train_judges

MAINS = {"diffusion.py": diffusion.main, "minimax.py": minimax.main, "sample.py": sample.main}
REAL, ALL = "real, at random", "all real images"
BASE, FIFO, ADAPTIVE, SMALL = "base", "+ min-max, FIFO", "+ min-max, adaptive", "smaller base"
MODELS = BASE, FIFO, ADAPTIVE
SWEEP = (REAL, ALL, BASE, FIFO, ADAPTIVE, SMALL)                # the order of its table
SAMPLERS, GUIDANCES = ("ddim", "dpm++2m"), (1, 1.5)
PILOT_JUDGES = 2


class Scale(NamedTuple):
    """How much of everything: the real thing, or the proof that it runs."""
    rows: pathlib.Path     # where they are kept
    base: str              # further words of diffusion.py
    small: str             # the same, of the base model that goes to weights/
    tune: str              # of minimax.py
    draw: str              # of sample.py
    steps: tuple           # of the sweep
    tuned: tuple           # of the fine-tuned models in it; the first is also that of the first choice
    budget: float          # seconds for each of its sets
    last: float            # seconds for the last set
    ipcs: tuple            # how many of the last set's images a class judges learn from, most wanted first
    real: tuple            # how many real ones, some of the same
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
    place: str             # words that say where the images are, as they stand in the rows: "--root DIR"
    root: str | None       # what DIR is
    words: list            # ["--device", NAME] where one was asked for
    device: torch.device
    data: data.Data        # on the CPU, but for the images to test on

    @property
    def home(self):
        return pathlib.Path("out", self.data.name)


# ----------------------------------------------------------------------------------------------------
# 1. What the rows are made from: models, and the sets that they draw


def typed(line, run):
    """ "python X.py ..." -> X.py and the words that its main() gets: DIR becomes the place it stands for."""
    _, script, *words = shlex.split(line)
    return script, (*(run.root if word == "DIR" else word for word in words), *run.words)


@functools.cache
def type_in(script, words):
    """Runs a stage in this process, once: what is finished it leaves alone, what was stopped goes on."""
    MAINS[script](list(words))


def model_line(model, run):
    """(the command that makes a model, its checkpoint)."""
    lines = {BASE: (f"diffusion.py {run.place} {run.scale.base}", "base"),
             SMALL: (f"diffusion.py {run.place} {run.scale.small} --out {run.home}/small", "small/base"),
             FIFO: (f"minimax.py {run.place} {run.scale.tune}", "minimax"),
             ADAPTIVE: (f"minimax.py {run.place} {run.scale.tune} --memory adaptive "
                        f"--out {run.home}/adaptive", "adaptive/minimax")}
    line, name = lines[model]
    return f"python {line}", run.home / f"{name}.safetensors"


def made(model, run):
    """(a model's checkpoint, all commands that make it), made where it is not there, its base before it."""
    before = [made(BASE, run)[1]] if model in (FIFO, ADAPTIVE) else []
    line, path = model_line(model, run)
    type_in(*typed(line, run))
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
    line = (f"python sample.py {run.place} --checkpoint {path} --sampler {sampler} --steps {steps} "
            f"--guidance {guidance:g} --seconds {budget:g} {run.scale.draw} --npz --out {out}")
    type_in(*typed(line, run))
    record = json.loads((out / "distilled.json").read_text())
    weights = record["settings"]["weights"]
    if any(row.get("model") == model and row["weights"] != weights for row in read_rows(run.scale)):
        raise UserError(f"{run.scale.rows} has rows of another {path} ({model}) than the one that is there: "
                        "bring that back, or take all rows out")
    facts = {"model": model, "weights": weights, "sampler": sampler, "steps": steps, "guidance": guidance,
             "budget": budget, "drawn": round(record["seconds"], 2)}
    return Drawn(f"{out}/distilled.npz", record["ipc"], f"{lines}; {line}", facts)


# ----------------------------------------------------------------------------------------------------
# 2. Choices: by short judges, on a fifth of the training images
#
# The generator learned from that fifth, no pilot's judge sees it, and the test split stays unseen. First the
# sampler and the guidance of all sets, then the model and the steps of the last one. A pilot is a set of the
# sweep's budget, cut to the size of the smallest among its rivals: the last set will hold more images than
# judges have time for, so that their quality decides and not their number.


def pilot(found, rivals, run):
    """A row: the accuracy of short judges on the set `found`, cut to the smallest of its rivals."""
    began, ipc = time.monotonic(), min(rival.ipc for rival in rivals)
    held, recipe = split(run.data.train, .2)[1].to(run.device), replace(run.data.recipe, protocol="short")
    train = first_of_each(read_distilled(found.place, run.data), ipc).to(run.device)
    epochs = run.scale.epochs or count_epochs(recipe, len(train.labels), len(train.classes))
    bf16 = gains_from_bf16(run.device)
    judges = train_judges([train] * PILOT_JUDGES, held, recipe, epochs, range(PILOT_JUDGES), bf16=bf16)
    accuracies = [round(curve[-1], 4) for _, curve in judges]
    return {"data": run.data.name, **found.facts, "ipc": ipc, "accuracy": accuracies,
            "mean": round(statistics.mean(accuracies), 4), "std": round(statistics.stdev(accuracies), 4),
            "runs": PILOT_JUDGES, "epochs": epochs, "seed": 0, "seconds": round(time.monotonic() - began, 1),
            "device": str(run.device) + " bf16" * bf16, "command": found.lines}


def best(rows, name):
    """The row of the table `name` with the highest accuracy."""
    return max((row for row in rows if row["table"] == name), key=lambda row: row["mean"])


def swept(model, steps, run):
    """One of the sweep's sets."""
    chosen = best(read_rows(run.scale), "choice")
    return drawn(model, chosen["sampler"], steps, chosen["guidance"], run.scale.budget, run)


def first_pilot(sampler, guidance, run):
    """A pilot for the sampler and the guidance of all sets."""
    sets = {how: drawn(BASE, how[0], run.scale.tuned[0], how[1], run.scale.budget, run)
            for how in itertools.product(SAMPLERS, GUIDANCES)}
    return pilot(sets[sampler, guidance], sets.values(), run)


def last_pilot(model, steps, run):
    """A pilot for the model and the steps of the last set."""
    sets = {how: swept(*how, run) for how in itertools.product(MODELS, run.scale.tuned)}
    return pilot(sets[model, steps], sets.values(), run)


# ----------------------------------------------------------------------------------------------------
# 3. Rows


def judged(source, ipc, protocol, run):
    """A row of judges by either protocol, and the command that makes it."""
    recipe = replace(run.data.recipe, protocol=protocol)
    bf16 = protocol == "short" and gains_from_bf16(run.device)
    row = evaluate(source, run.data._replace(recipe=recipe), ipc=ipc, runs=3, seed=0, epochs=run.scale.epochs,
                   bf16=bf16, keep=run.home / "judges")
    line = f"python train_eval.py {run.place} --protocol {protocol} --runs 3 {source}"
    return {**row, "command": line + (f" --ipc {ipc}" if ipc else "")}


def set_row(found, ipc, protocol, run):
    """A row of judges that saw a drawn set, or the first ipc images of each class of it."""
    row = judged(found.place, ipc, protocol, run)
    return {**row, "train": "distilled", **found.facts, "command": f"{found.lines}; {row['command']}"}


def sweep_row(model, steps, run):
    return set_row(swept(model, steps, run), None, "short", run)


def last_row(ipc, run):
    first, chosen = best(read_rows(run.scale), "choice"), best(read_rows(run.scale), "last choice")
    found = drawn(chosen["model"], first["sampler"], chosen["steps"], first["guidance"], run.scale.last, run)
    if run.scale is FULL:
        shutil.copy(pathlib.Path(found.place).with_suffix(".png"), ROOT / "assets" / "cifar100.png")
    return set_row(found, min(ipc, found.ipc), "challenge", run)


def speed_row(run):
    """How fast the base was trained, and its share of a matrix product's rate."""
    path, line = made(BASE, run)
    header, log = read_header(path), path.with_suffix(".log.jsonl").read_text().splitlines()
    settings, recipe, log = header["settings"], run.data.recipe, [json.loads(entry) for entry in log]
    rate = settings["batch"] * statistics.median(               # a stop, or compiling, slows one interval
        (b["step"] - a["step"]) / (b["seconds"] - a["seconds"]) for a, b in itertools.pairwise(log))
    model, x = diffusion.DiT(**header["config"]), torch.randn(1, recipe.channels, recipe.size, recipe.size)
    image = flops(lambda: model(x, torch.tensor([500.]), torch.tensor([0])).sum().backward())
    product = matrix_rate(run.device, torch.bfloat16 if settings["bf16"] else torch.float32, 4096)
    return {"data": run.data.name, "weights": header["fingerprint"], "images_per_second": round(rate, 1),
            "gflop_per_image": image / 1e9, "matrix_tflops": product / 1e12, "share": image * rate / product,
            "steps": log[-1]["step"], "batch": settings["batch"], "bf16": settings["bf16"],
            "seconds": round(log[-1]["seconds"], 1), "device": str(run.device), "seed": settings["seed"],
            "command": line}


def small_row(run):
    """Writes the smaller base model to weights/, in bfloat16, and says what images of it are worth."""
    path, line = made(SMALL, run)
    kept = (ROOT if run.scale is FULL else run.home) / "weights" / run.data.name / path.name
    diffusion.save_checkpoint(kept, {name: tensor.bfloat16() for name, tensor in load_tensors(path).items()},
                              {**read_header(path), "command": line})
    if kept.stat().st_size > 16e6:
        raise UserError(f"{kept} has {kept.stat().st_size / 1e6:.1f} MB, more than the 16 that are meant")
    row = sweep_row(SMALL, run.scale.tuned[0], run)
    return {**row, "bytes": kept.stat().st_size}


def jobs(scale):
    """{(table, row, what was asked): a function of the Run that makes it}, the order of the work."""
    found = {("speed", BASE, None): speed_row}
    for sampler, guidance in itertools.product(SAMPLERS, GUIDANCES):
        found["choice", f"{sampler}, guidance {guidance:g}", scale.tuned[0]] = functools.partial(
            first_pilot, sampler, guidance)
    for model, steps in itertools.product(MODELS, scale.tuned):
        found["last choice", model, steps] = functools.partial(last_pilot, model, steps)
    for ipc in scale.ipcs:
        found["last", "distilled", ipc] = functools.partial(last_row, ipc)
        if ipc in scale.real:
            found["last", REAL, ipc] = functools.partial(judged, "random", ipc, "challenge")
    for ipc in scale.real:
        found["sweep", REAL, ipc] = functools.partial(judged, "random", ipc, "short")
    found["sweep", ALL, None] = functools.partial(judged, "full", None, "short")
    for model, steps in [*itertools.product(MODELS, scale.tuned), *((BASE, steps) for steps in scale.steps)]:
        found["sweep", model, steps] = functools.partial(sweep_row, model, steps)
    found["last", ALL, None] = functools.partial(judged, "full", None, "challenge")
    found["sweep", SMALL, scale.tuned[0]] = small_row
    return found


def read_rows(scale):
    return [json.loads(line) for line in scale.rows.read_text().splitlines()] if scale.rows.exists() else []


def missing(scale):
    """The jobs whose rows are not there yet."""
    there = {(row["table"], row["row"], row["asked"]) for row in read_rows(scale)}
    return {key: make for key, make in jobs(scale).items() if key not in there}


def measure(run):
    """Makes all missing rows, one after the other."""
    for (name, row, asked), make in missing(run.scale).items():
        made_row = {"table": name, "row": row, "asked": asked, **make(run), "machine": machine(run.device)}
        with open(run.scale.rows, "a") as file:
            file.write(json.dumps(made_row) + "\n")
        print(f"row: {name} | {row} | {asked} | " +
              (f"{made_row['mean']:.2f} +- {made_row['std']:.2f} %" if "mean" in made_row else
               f"{made_row['images_per_second']:.1f} images/s, {100 * made_row['share']:.0f} % of a product"),
              flush=True)


def machine(device):
    if device.type != "cuda":
        return digits.machine()
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__.split('+')[0]}"


# ----------------------------------------------------------------------------------------------------
# 4. Tables and plots


def tables(rows, scale=FULL):
    """The README's generated parts, by name: rows -> {name: markdown}. What was not measured is a dash."""
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
                                    "sweep", sweep, lambda who, asked: (SWEEP.index(who), asked or 0))),
        "cifar100 speed": "Training the base model: not measured." if speed is None else
            f"Training the base model: {speed['images_per_second']:,.0f} images a second, "
            f"{100 * speed['share']:.0f} % of the rate of a matrix product in "
            f"{'bfloat16' if speed['bf16'] else 'float32'} ({speed['matrix_tflops']:.1f} TFLOP/s); "
            f"{speed['steps']:,} steps of {speed['batch']} took {speed['seconds']:.0f} seconds on "
            f"{speed['machine']}: `{speed['command']}`.",
        "cifar100 pictures": "\n".join(f"![{what}](assets/{name}.png)" for name, what in PICTURES.items()
                                       if (ROOT / "assets" / f"{name}.png").exists()),
    }


PICTURES = {"cifar100": "Images of the last set, a row for each of the first 20 classes",
            "cifar100-steps": "Accuracy against sampling steps", "cifar100-images": "Accuracy against images"}


def plot_steps(rows, path):
    """The sweep: accuracy against sampling steps, a line for each model."""
    rows = [row for row in rows if row["table"] == "sweep"]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for model in (BASE, FIFO, ADAPTIVE):
        mine = sorted((row for row in rows if row["row"] == model), key=lambda row: row["steps"])
        axes.errorbar([row["steps"] for row in mine], [row["mean"] for row in mine],
                      [row["std"] for row in mine], marker="o", capsize=3, label=model)
    for row in rows:
        if row["row"] == REAL:
            axes.axhline(row["mean"], color="grey", linestyle=":", label=f"{row['ipc']} real ones a class")
    axes.set(xlabel="sampling steps", ylabel="accuracy, %", title=f"{FULL.budget} seconds of sampling")
    finish(figure, axes, path)


def plot_images(rows, path):
    """The last table: accuracy against images a class, drawn and real."""
    rows = [row for row in rows if row["table"] == "last"]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for names, label in ((("distilled",), "distilled"), ((REAL, ALL), "real")):
        mine = sorted((row for row in rows if row["row"] in names), key=lambda row: row["ipc"])
        axes.errorbar([row["ipc"] for row in mine], [row["mean"] for row in mine],
                      [row["std"] for row in mine], marker="o", capsize=3, label=label)
    axes.set(xlabel="images a class", ylabel="accuracy, %", xscale="log", title="the challenge's protocol")
    finish(figure, axes, path)


def finish(figure, axes, path):
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def publish(scale):
    """Puts what was measured into the README and assets/; of a proof, beside its rows."""
    rows = read_rows(scale)
    assets = ROOT / "assets" if scale is FULL else scale.rows.parent
    for name, plot in (("sweep", plot_steps), ("last", plot_images)):
        if any(row["table"] == name for row in rows):
            plot(rows, assets / f"cifar100-{'steps' if name == 'sweep' else 'images'}.png")
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
        whole, half = data.load("cifar100", root), place.with_name(".half")
        for part, images, count in (("train", whole.train, 30), ("test", whole.test, 10)):
            for c, name in enumerate(images.classes[:4]):
                for k, image in enumerate(images.images[images.labels == c][:count]):
                    write_png(half / part / name / f"{k:02}.png", image)
        half.rename(place)
    return place


def start(args):
    """The Run that the flags ask for."""
    device, asked = device_named(args.device), [] if args.device == "auto" else ["--device", args.device]
    if device.type == "cpu" and not asked and not args.tiny:
        raise UserError("there is no GPU here, and a CPU would take weeks: --tiny shows that all of it runs "
                        "(--device cpu does it all the same)")
    if args.tiny:
        place = few(args.root)
        found, words = data.load(str(place)), f"--data {place}"
    else:
        found = data.load("cifar100", args.root)
        words = "--data cifar100" + " --root DIR" * (args.root is not None)
    return Run(TINY if args.tiny else FULL, words, args.root, asked, device,
               found._replace(test=found.test.to(device)))


def main(argv=None):
    parser = new_parser(__doc__)
    add_flags(parser, "root device")
    parser.add_argument("--minutes", type=float,
                        help="stop after so many, with exit code 1 while rows are missing; what was begun "
                             "goes on the next time")
    parser.add_argument("--tiny", action="store_true",
                        help="prove that all of it runs: rows, tables and plots go to out/cifar100-few")
    parser.add_argument("--tables", action="store_true",
                        help="measure nothing; rewrite the README's tables and plots")
    args = parser.parse_args(argv)
    scale = TINY if args.tiny else FULL
    with one_sentence(parser):
        scale.rows.parent.mkdir(parents=True, exist_ok=True)
        if args.minutes is not None:
            if not args.minutes > 0:
                raise UserError(f"--minutes must be positive, not {args.minutes:g}")
            signal.signal(signal.SIGALRM, ring)
            # since the start, imports included; again every ten seconds, should the first be swallowed
            left = max(0.001, 60 * args.minutes - time.monotonic() + STARTED)
            signal.setitimer(signal.ITIMER_REAL, left, 10)
        try:
            if not args.tables and missing(scale):
                measure(start(args))
        except TimeIsUp:
            print("the time is up")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        publish(scale)
        left, all_of_them = len(missing(scale)), len(jobs(scale))
        print(f"{all_of_them - left} of {all_of_them} rows are in {scale.rows.name}")
        if left and not args.tables:
            parser.exit(1, "the same command goes on with the others\n")


if __name__ == "__main__":
    main()
