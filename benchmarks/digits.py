"""Measures the rows of docs/digits.md's tables, and writes the tables and the plot from what it measured.

    python benchmarks/digits.py            # an hour and more on two CPU cores; skips rows that are there
    python benchmarks/digits.py --tables   # measures nothing: rewrites the tables from results/digits.jsonl

Rows are kept in results/digits.jsonl; delete it and out/ to measure all anew. Accuracies are the judge's last
epoch on the 540 real test digits. A row of generated images at a fixed count draws five sets (seeds 0 to 4)
and trains a judge on each, as "random" does. A row under a budget of seconds is one large set and five
judges. Everything runs on the CPU, so that seconds mean the same in every row.
"""
import functools
import itertools
import json
import pathlib
import shlex
import shutil
import statistics
import sys

import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import convnet
import minimax
import report
import sample
from nanodd import cli
from nanodd.data import datasets
from nanodd.errors import UserError, exit_on_user_error
from nanodd.judging import baselines
from report import machine, pyplot, save_plot, spread, table, write_pages
from train_eval import count_epochs, evaluate, in_batches, train_judge, train_judges

MAINS = {"minimax.py": minimax.main, "sample.py": sample.main}
RESULTS = ROOT / "results" / "digits.jsonl"
RUNS, BUDGET, SHORT_BUDGET = 5, 10, 2                           # seconds
STEPS = (5, 10, 15, 20, 25, 30, 50)
SOLVERS = {"DDIM, quadratic grid": "ddim", "DPM-Solver++(2M), log-SNR grid": "dpm++2m",
           "DPM-Solver-fast, log-SNR grid": "dpm-fast"}
CALLS = (5, 10, 15, 20, 50)
ABLATION = {                   # row -> the flags of minimax.py; None is the base model itself
    "base DiT": None,
    "+ DiffFit alone": "--lambda-r 0 --lambda-d 0",
    "+ L_r": "--lambda-d 0",
    "+ L_d": "--lambda-r 0",
    "+ L_r + L_d, FIFO (the default)": "",
    "+ L_r + L_d, adaptive": "--memory adaptive",
    "+ L_r + L_d, naive": "--naive",
}

# ----------------------------------------------------------------------------------------------------
# 1. Rows: each is made by commands that a reader can type, and carries them


def type_in(command):
    """Runs "python X.py ..." in this process, on the CPU."""
    _, script, *words = shlex.split(command)
    MAINS[script](words + ["--device", "cpu"])


def real_row(source, ipc, data, bf16):
    command = f"python train_eval.py {source}" + (f" --ipc {ipc}" if ipc else "")
    return {**evaluate(source, data, ipc=ipc, runs=RUNS, seed=0, bf16=bf16), "command": command}


def generated_row(flags, ipc, data, bf16):
    """A set for each seed, a judge for each set. flags: minimax.py's, or None for the base model."""
    out = "out/bench/" + ("base" if flags is None else "tuned" + flags.replace(" ", ""))
    checkpoint = "out/digits/base.safetensors" if flags is None else f"{out}/minimax.safetensors"
    tune = "" if flags is None else " ".join(f"python minimax.py {flags} --out {out}".split())
    draw = f"python sample.py --checkpoint {checkpoint} --ipc {ipc} --seed S --out {out}/ipc{ipc}-S"
    judge = f"python train_eval.py {out}/ipc{ipc}-S/distilled --runs 1 --seed S"
    if tune:
        type_in(tune)
    rows, drawn = [], 0.0
    for seed in range(RUNS):
        place = f"{out}/ipc{ipc}-{seed}"
        type_in(draw.replace("S", str(seed)))
        drawn += json.loads(pathlib.Path(place, "distilled.json").read_text())["seconds"]
        rows.append(evaluate(f"{place}/distilled", data, ipc=ipc, runs=1, seed=seed, bf16=bf16))
    return {**rows[0], "train": "distilled", "runs": RUNS,
            **summary("accuracy", [row["mean"] for row in rows]),
            "best": round(statistics.mean(row["best"] for row in rows), 4), "drawn": round(drawn / RUNS, 2),
            "seconds": round(sum(row["seconds"] for row in rows), 1),
            "command": "; ".join(filter(None, [tune, draw, judge]))}


def budget_row(steps, seconds, data, bf16):
    """As many images as so many seconds allow. Without guidance: a large set wants diversity.

    The short budget takes small batches: two seconds would not draw 100 digits in 50 steps everywhere.
    """
    out = f"out/bench/steps{steps}" + f"-{seconds}s" * (seconds != BUDGET)
    draw = (f"python sample.py --steps {steps} --seconds {seconds} --guidance 1 --out {out} "
            "--checkpoint out/bench/tuned/minimax.safetensors" + " --batch 20" * (seconds == SHORT_BUDGET))
    type_in(draw)
    row = evaluate(f"{out}/distilled", data, ipc=None, runs=RUNS, seed=0, bf16=bf16)
    record = json.loads(pathlib.Path(out, "distilled.json").read_text())
    decision = pathlib.Path(out, "steps.json")
    pilots = {"pilots": json.loads(decision.read_text())["rows"]} if decision.exists() else {}
    return {**row, "train": "distilled", "steps": record["settings"]["steps"], **pilots,
            "drawn": round(record["seconds"], 2), "command": f"{draw}; python train_eval.py {out}/distilled"}


@functools.cache
def real_judge(bf16):
    """A judge trained on all real digits, and its features of those to test on: (judge, (540, F))."""
    data = datasets.load()
    epochs = count_epochs(data.recipe, len(data.train.labels), len(data.train.classes))
    judge, _ = train_judge(data.train, data.test, data.recipe, epochs, seed=0, bf16=bf16)
    return judge, in_batches(judge.embed, data.test.images, data.recipe)


def coverage(images, data, bf16):
    """The mean distance from a real test digit to the nearest of the images, in the real judge's features."""
    judge, real = real_judge(bf16)
    return torch.cdist(real, in_batches(judge.embed, images, data.recipe)).min(dim=1).values.mean().item()


def solver_row(sampler, steps, data, bf16):
    """A set of ten a class for each seed: its judge, the judge of the first of each class, its coverage.

    sampler None: random real digits instead.
    """
    out = f"out/bench/{sampler}{steps}".replace("+", "p")         # train_eval.py would read a sum
    draw = (f"python sample.py --checkpoint out/bench/tuned/minimax.safetensors --sampler {sampler} "
            f"--steps {steps} --seed S --out {out}-S")
    sets = []
    for seed in range(RUNS):
        if sampler is None:
            g = torch.Generator().manual_seed(1000 * seed + 500)
            sets.append(baselines.SELECTORS["random"](data.train, 10, data.train.labels, g))
        else:
            type_in(draw.replace("S", str(seed)))
            sets.append(baselines.read_distilled(f"{out}-{seed}/distilled", data))
    firsts = [baselines.first_per_class(found, 1) for found in sets]
    epochs = count_epochs(data.recipe, len(sets[0].labels), len(data.train.classes))    # and of the firsts
    judges = train_judges(sets + firsts, data.test, data.recipe, epochs,
                          2 * [1000 * seed for seed in range(RUNS)], bf16=bf16)
    last = [round(curve[-1], 4) for _, curve in judges]
    near = [round(coverage(found.images, data, bf16), 4) for found in sets]
    judge = f"python train_eval.py {'random' if sampler is None else out + '-S/distilled'} --runs 1 --seed S"
    return {"data": data.name, "cut": data.cut, "train": "random" if sampler is None else "distilled",
            "ipc": 10, "images": len(sets[0].labels), "protocol": data.recipe.protocol,
            "judge": convnet.title(data.recipe.net), "size": data.recipe.judge_size, "epochs": epochs,
            "runs": RUNS, **summary("accuracy", last[:RUNS]), **summary("one", last[RUNS:]),
            **summary("coverage", near), "steps": steps, "device": "cpu bf16" if bf16 else "cpu",
            "command": "; ".join([draw] * (sampler is not None) + [f"{judge} --ipc 10", f"{judge} --ipc 1"])}


def summary(name, values):
    """The values of n runs, their mean and deviation; of the accuracy these are called just mean and std."""
    prefix = "" if name == "accuracy" else f"{name}_"
    return {name: values, f"{prefix}mean": round(statistics.mean(values), 4),
            f"{prefix}std": round(statistics.stdev(values), 4)}


def measure(data, bf16):
    """All rows that results/digits.jsonl does not have yet, one after the other."""
    jobs = {("main", "all real images", None): lambda: real_row("full", None, data, bf16)}
    for ipc in (1, 10):
        jobs["main", "real, at random", ipc] = lambda ipc=ipc: real_row("random", ipc, data, bf16)
        jobs["main", "real, k-means centroids", ipc] = lambda ipc=ipc: real_row("kmeans", ipc, data, bf16)
        jobs["main", "**distilled**", ipc] = lambda ipc=ipc: generated_row("", ipc, data, bf16)
    for name, flags in ABLATION.items():
        jobs["ablation", name, 10] = lambda flags=flags: generated_row(flags, 10, data, bf16)
    for steps in STEPS:
        jobs["steps", str(steps), None] = lambda steps=steps: budget_row(steps, BUDGET, data, bf16)
    jobs["solvers", "real, at random", 0] = lambda: solver_row(None, 0, data, bf16)
    for (name, sampler), steps in itertools.product(SOLVERS.items(), CALLS):
        jobs["solvers", name, steps] = lambda s=sampler, steps=steps: solver_row(s, steps, data, bf16)
    for steps in ("auto", *STEPS):
        jobs["auto", str(steps), None] = lambda steps=steps: budget_row(steps, SHORT_BUDGET, data, bf16)
    missing = report.missing(jobs, RESULTS)
    if not missing:
        print(f"results/{RESULTS.name} has all {len(jobs)} rows: delete it to measure anew")
        return
    type_in("python minimax.py --out out/bench/tuned")          # what most rows draw from; makes the base too
    report.measure(missing, RESULTS, machine(),
                   lambda row: f"{row['ipc']} a class | {row['mean']:.2f} +- {row['std']:.2f}")
    if ("main", "**distilled**", 10) in missing:
        shutil.copy("out/bench/tuned/ipc10-0/distilled.png", ROOT / "assets" / "distilled.png")


# ----------------------------------------------------------------------------------------------------
# 2. Tables and plot


def pilot(rows, row):
    """What `--steps auto` saw of this row's steps, before it decided."""
    seen = {found["steps"]: found["accuracy"] for other in rows for found in other.get("pilots", [])}
    return f"{seen[row['steps']]:.1f}" if row["steps"] in seen and row["row"] != "auto" else "–"


def tables(rows):
    """The pages' generated parts, by name: rows of results/digits.jsonl -> {name: markdown}."""
    of = {name: [row for row in rows if row["table"] == name]
          for name in ("main", "ablation", "steps", "solvers", "auto")}
    tuned = lambda row: "–" if row["row"] == "base DiT" else f"`{row['command'].split('; ')[0]}`"
    drawn = lambda row: f"{row['drawn']:.1f}" if "drawn" in row else "–"
    return {
        "front": table("| trained on | images a class | accuracy, % (n) |", [
            f"| {row['row']} | {row['ipc']} | {spread(row)} |" for row in of["main"]]),
        "main": table("| trained on | images a class | accuracy, % (n) | seconds to draw | machine "
                      "| command |", [
            f"| {row['row']} | {row['ipc']} | {spread(row)} | {drawn(row)} | "
            f"{row['machine'].split(',')[0]} | `{row['command']}` |" for row in of["main"]]),
        "ablation": table("| model | accuracy at 10 a class, % (n) | command |", [
            f"| {row['row']} | {spread(row)} | {tuned(row)} |" for row in of["ablation"]]),
        "steps": table("| steps | images a class | accuracy, % (n) | command |", [
            f"| {row['steps']} | {row['ipc']} | {spread(row)} | `{row['command'].split('; ')[0]}` |"
            for row in of["steps"]]),
        "solvers": table("| sampler | steps | accuracy at 10 a class, % (n) | at 1 a class, % (n) | distance "
                         "to the nearest (n) | command |", [
            f"| {row['row']} | {row['steps'] or '–'} | {spread(row)} | {spread(row, 'one_')} | "
            f"{spread(row, 'coverage_', 2)} | `{row['command'].split('; ')[0]}` |" for row in of["solvers"]]),
        "auto": table("| steps | images a class | accuracy, % (n) | pilot's accuracy, % | command |", [
            f"| {'auto: ' * (row['row'] == 'auto')}{row['steps']} | {row['ipc']} | {spread(row)} | "
            f"{pilot(of['auto'], row)} | `{row['command'].split('; ')[0]}` |" for row in of["auto"]]),
        "machine": f"{rows[0]['machine'].replace(', ', '; ')}",
        "second machine": f"{rows[-1]['machine'].replace(', ', '; ')}",
    }


def plot(rows, path):
    """Accuracy against sampling steps under one budget, the shape of Fan et al.'s Table 3."""
    rows = [row for row in rows if row["table"] == "steps"]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axes.errorbar([row["steps"] for row in rows], [row["mean"] for row in rows], [row["std"] for row in rows],
                  marker="o", capsize=3)
    for row in rows:
        axes.annotate(str(row["ipc"]), (row["steps"], row["mean"]), xytext=(5, -11),
                      textcoords="offset points", fontsize=8)
    axes.set(xlabel="sampling steps", ylabel="accuracy, %",
             title=f"{BUDGET} seconds of sampling (at each point: images a class)")
    save_plot(figure, axes, path)


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.add_argument("--tables", action="store_true",
                        help="measure nothing; rewrite the tables and the plot")
    args = parser.parse_args(argv)
    with exit_on_user_error(parser):
        if not args.tables:
            device = cli.device_named("cpu")
            data = datasets.load()
            data = data._replace(train=data.train.to(device), test=data.test.to(device))
            measure(data, cli.gains_from_bf16(device))
        rows = baselines.read_rows(RESULTS)
        if not rows:
            raise UserError(f"{RESULTS.name} has no rows yet: leave --tables out")
        plot(rows, ROOT / "assets" / "steps.png")
        write_pages(tables(rows))
        print(f"README.md, docs/digits.md and assets/steps.png show the {len(rows)} rows of "
              f"results/{RESULTS.name}")


if __name__ == "__main__":
    main()
