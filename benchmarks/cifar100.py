"""CIFAR-100 by the challenge's rules: how much of it can a diffusion model hand on in ten minutes?

    python benchmarks/cifar100.py --root DIR                # measures every row that is missing, on a GPU
    python benchmarks/cifar100.py --root DIR --minutes 9    # stops in time; the same command resumes
    python benchmarks/cifar100.py --root DIR --tiny         # all of it on four classes, to see that it runs
    python benchmarks/cifar100.py --tables                  # measures nothing: rewrites docs/challenge.md

Trains a DiT on the 50,000 training images, fine-tunes it with either memory, and draws a set in 5 to 50
steps each under one budget of seconds, as Fan et al.'s Table 3 has it; and the last set, in a minute of the
ten. From its images three judges learn by the challenge's protocol, as they do from real ones. No choice sees
the test split (cifar100_rows.py).
Rows go to results/cifar100.jsonl, each with its commands, seconds, device and seed; tables, plots and contact
sheet to docs/challenge.md and assets/; the base model to weights/, where it is kept and not trained again.
Rows of two models are never mixed: keep out/cifar100 for as long as rows are missing.
"""
import time

STARTED = time.monotonic()                                      # imports take their time, too

import functools
import math
import os
import pathlib
import signal
import sys
from dataclasses import replace

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import cifar100_rows
import report
from cifar100_rows import ALL, BASE, KEPT, MODELS, PULLED, REAL, STUDENT
from nanodd import cli, running
from nanodd.data import datasets, imageset
from nanodd.errors import UserError
from nanodd.judging import features, results
from report import measure, pyplot, save_plot, spread, table, write_pages
from train_eval import real_judge

SWEEP_ORDER = REAL, ALL, *MODELS, PULLED, KEPT, STUDENT

# ----------------------------------------------------------------------------------------------------
# 1. Tables and plots


def tables(rows, scale=cifar100_rows.FULL):
    """The generated parts of docs/challenge.md, of the measured rows alone: rows -> {name: markdown}."""
    there = {report.key(row): row for row in rows}

    def part(name, order, columns):
        keys = sorted((key for key in cifar100_rows.jobs(scale) if key[0] == name and key in there),
                      key=lambda key: order(*key[1:]))
        lines = ["| " + " | ".join(str(cell(there[key])) for cell in columns.values()) + " |" for key in keys]
        machines = sorted({there[key]["machine"] for key in keys})
        return (table(f"| {' | '.join(columns)} |", lines) + f"\n\n{'; '.join(machines)}."
                if lines else "No row is measured yet.")

    def trained_on(row):
        name = row["model"] if row["table"] == "last" and "model" in row else row["row"]
        return f"{name}, {row['steps']} step{'s' * (row['steps'] != 1)}" if "steps" in row else name
    common = {"trained on": trained_on, "images a class": lambda row: row["ipc"],
              "drawn in, s": lambda row: f"{row['drawn']:.1f}" if "drawn" in row else "not drawn",
              "epochs": lambda row: row["epochs"], "accuracy, %": spread}
    near = {"precision": lambda row: f"{row['metrics']['precision']:.2f}",
            "recall": lambda row: f"{row['metrics']['recall']:.2f}"}
    speed = there.get(("speed", BASE, None))
    keys = list(cifar100_rows.jobs(scale))
    left = [f"{row}, {asked or 'whole'} ({name})" for name, row, asked in keys
            if (name, row, asked) not in there]
    return {
        "cifar100 left": f"{len(keys) - len(left)} of {len(keys)} rows are measured."
                         + f" Not measured yet: {'; '.join(left)}." * bool(left),
        "cifar100 choice": part("choice", lambda who, asked: (asked, who), {
            "guidance": lambda row: f"{row['guidance']:g}", "steps": lambda row: row["steps"],
            "accuracy, %": spread}),
        "cifar100 last": part("last", lambda who, asked: (asked or math.inf, who != REAL), {
            **common, **near,
            "seconds to judge": lambda row: f"{row['seconds']:.0f}"}),
        "cifar100 sweep": part("sweep", lambda who, asked: (SWEEP_ORDER.index(who), asked or 0),
                               {**common, **near}),
        "cifar100 speed": "No speed is measured yet." if speed is None else
            f"{speed['steps']:,} training steps of {speed['batch']} images took {speed['seconds']:.0f} s, "
            f"compiling included. The median tenth of them made {speed['images_per_second']:,.0f} images a "
            f"second, {100 * speed['share']:.0f} % of the rate of a matrix product in "
            f"{'bfloat16' if speed['bf16'] else 'float32'}, {speed['matrix_tflops']:.0f} TFLOP/s "
            f"({speed['machine']}).",
        "cifar100 pictures": "\n".join(f"![{what}](../assets/{name}.png)" for name, what in PICTURES.items()
                                       if (ROOT / "assets" / f"{name}.png").exists()),
    }


PICTURES = {"cifar100": "Images of the last set, a row for each of the first 12 classes",
            "cifar100-steps": "Accuracy against sampling steps"}


def plot_steps(rows, budget, path):
    """The sweep: accuracy against sampling steps, a line for each model."""
    rows = [row for row in rows if row["table"] == "sweep"]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for model in MODELS:
        mine = sorted((row for row in rows if row["row"] == model), key=lambda row: row["steps"])
        axes.errorbar([row["steps"] for row in mine], [row["mean"] for row in mine],
                      [row["std"] for row in mine], marker="o", capsize=3, label=model)
    real = [row for row in rows if row["row"] == REAL]
    for row, style in zip(real, ("--", ":"), strict=False):
        axes.axhline(row["mean"], color="grey", linestyle=style, label=f"{row['ipc']} real ones a class")
    axes.set(xlabel="sampling steps", ylabel="accuracy, %",
             title=f"{budget:g} seconds of sampling for each set")
    save_plot(figure, axes, path, legend=True)


def publish(scale):
    """Puts what was measured into docs/challenge.md and assets/; of a proof, beside its rows."""
    rows = results.read_rows(scale.rows)
    assets = ROOT / "assets" if scale is cifar100_rows.FULL else scale.rows.parent
    if any(row["table"] == "sweep" for row in rows):
        plot_steps(rows, scale.budget, assets / "cifar100-steps.png")
    parts = tables(rows, scale)
    if scale is cifar100_rows.FULL:
        write_pages(parts)
    else:
        (scale.rows.parent / "tables.md").write_text("\n\n".join(parts.values()) + "\n")


# ----------------------------------------------------------------------------------------------------
# 2. The driver


def summary(row):
    """What is printed of a row."""
    if "mean" in row:
        return f"{row['mean']:.2f} +- {row['std']:.2f} %"
    return f"{row['images_per_second']:.1f} images/s, {100 * row['share']:.0f} % of a product"


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
    """The cifar100_rows.Run that the flags ask for."""
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
    scale = cifar100_rows.TINY if args.tiny else cifar100_rows.FULL
    found = found._replace(test=found.test.to(device))

    @functools.cache
    def comparison():                                           # its judge learns once, by the short protocol
        recipe = replace(found.recipe, protocol="short", epochs=scale.epochs or found.recipe.epochs)
        judge = real_judge(found.train.to(device), recipe, pathlib.Path("out", found.name))
        return features.comparison("judge", judge, found.test)
    return cifar100_rows.Run(scale, data_flags, args.root, flags, device, found, comparison)


def main(argv=None):
    parser = cli.new_parser(__doc__)
    cli.add_flags(parser, "root device")
    parser.add_argument("--minutes", type=float,
                        help="stop after so many, with exit code 1 while rows are missing; the next "
                             "call resumes")
    parser.add_argument("--tiny", action="store_true",
                        help="prove that all of it runs: rows, tables and plots go to out/cifar100-few")
    parser.add_argument("--tables", action="store_true",
                        help="measure nothing; rewrite the tables and plots of docs/challenge.md")
    args = parser.parse_args(argv)
    scale = cifar100_rows.TINY if args.tiny else cifar100_rows.FULL
    with running.command(parser, args):
        scale.rows.parent.mkdir(parents=True, exist_ok=True)
        if args.minutes is not None:
            if not args.minutes > 0:
                raise UserError(f"--minutes must be positive, not {args.minutes:g}")
            signal.signal(signal.SIGALRM, ring)
            # since the start, imports included; again every ten seconds, should the first be swallowed
            wait = max(0.001, 60 * args.minutes - time.monotonic() + STARTED)
            signal.setitimer(signal.ITIMER_REAL, wait, 10)
        try:
            if not args.tables and cifar100_rows.missing(scale):
                run = start(args)
                work = {key: functools.partial(make, run)
                        for key, make in cifar100_rows.missing(scale).items()}
                measure(work, scale.rows, report.machine(run.device), summary)
        except TimeIsUp:
            print("the time is up")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        publish(scale)
        left, all_of_them = len(cifar100_rows.missing(scale)), len(cifar100_rows.jobs(scale))
        print(f"{all_of_them - left} of {all_of_them} rows are in {os.path.relpath(scale.rows)}")
        if left and not args.tables:
            parser.exit(1, "the same command measures the others\n")


if __name__ == "__main__":
    main()
