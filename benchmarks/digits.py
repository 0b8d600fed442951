"""Measures the rows of docs/digits.md's tables, and writes the tables and the plot from what it measured.

    python benchmarks/digits.py            # several hours on two CPU cores; skips rows that are there
    python benchmarks/digits.py --tables   # measures nothing: rewrites the tables from results/digits.jsonl

Rows are kept in results/digits.jsonl; delete it and out/ to measure all anew. Accuracies are the judge's last
epoch on the 540 real test digits. A row of generated images at a fixed count draws five sets (seeds 0 to 4)
and trains a judge on each, as "random" does. A row under a budget of seconds is one large set and five
judges. Everything runs on the CPU, so that seconds mean the same in every row.
"""
import itertools
import json
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import nanodd  # noqa: F401 (before torch: it sets how long waiting CPU threads spin)
import torch

import digits_figures as figures
import digits_rows
import digits_turbo
import report
from nanodd import cli, running
from nanodd.data import datasets
from nanodd.errors import UserError
from nanodd.judging import baselines, metrics, results
from report import machine, spread, summary, table, type_in, write_pages
from train_eval import count_epochs, evaluate, real_judge, train_judges

RESULTS = ROOT / "results" / "digits.jsonl"
TABLES = "main", "map", "curves", "pairs", "seconds", "expansion", "ablation", "steps", "solvers", "auto", \
    "turbo", "turbo-seconds"
RUNS, BUDGET, SHORT_BUDGET = 5, 10, 2                           # seconds
STEPS = (5, 10, 15, 20, 25, 30, 50)
SOLVERS = {"DDIM, quadratic grid": "ddim", "DPM-Solver++(2M), log-SNR grid": "dpm++2m",
           "DPM-Solver-fast, log-SNR grid": "dpm-fast"}
CALLS = (5, 10, 15, 20, 50)

# ----------------------------------------------------------------------------------------------------
# 1. Rows: each is made by commands that a reader can type, and carries them


def budget_row(steps, seconds, data, bf16):
    """As many images as so many seconds allow. Without guidance: a large set wants diversity.

    The short budget takes small batches: two seconds would not draw 100 digits in 50 steps everywhere.
    """
    out = f"out/bench/steps{steps}" + f"-{seconds}s" * (seconds != BUDGET)
    draw = (f"python sample.py --steps {steps} --seconds {seconds} --guidance 1 --out {out} "
            "--checkpoint out/bench/tuned/minimax.safetensors" + " --batch 20" * (seconds == SHORT_BUDGET))
    type_in(draw)
    [row] = evaluate([(f"{out}/distilled", 0)], data, ipc=None, runs=RUNS, seed=0, bf16=bf16)
    record = json.loads(pathlib.Path(out, "distilled.json").read_text())
    decision = pathlib.Path(out, "steps.json")
    pilots = {"pilots": json.loads(decision.read_text())["rows"]} if decision.exists() else {}
    return {**row, "train": "distilled", "steps": record["settings"]["steps"], **pilots,
            "drawn": round(record["seconds"], 2), "command": f"{draw}; python train_eval.py {out}/distilled"}


def solver_row(sampler, steps, data, bf16):
    """A set of ten a class for each seed: its judge, the judge of the first of each class, its coverage.

    sampler None: random real digits instead.
    """
    out = f"out/bench/{sampler}{steps}".replace("+", "p")         # train_eval.py would read a sum
    draw = (f"python sample.py --checkpoint out/bench/tuned/minimax.safetensors --guidance 2 "
            f"--sampler {sampler} --steps {steps} --seed S --out {out}-S")
    if sampler is None:
        sets = digits_rows.random_sets(data, RUNS)
    else:
        sets, _ = digits_rows.drawn_sets(draw, out, data, RUNS)
    firsts = [baselines.first_per_class(found, 1) for found in sets]
    epochs = count_epochs(data.recipe, len(sets[0].labels), len(data.train.classes))    # and of the firsts
    judges = train_judges(sets + firsts, data.test, data.recipe, epochs,
                          2 * [1000 * seed for seed in range(RUNS)], bf16=bf16)
    last = [round(curve[-1], 4) for _, curve in judges]
    judge_of_all = real_judge(data.train, data.recipe, pathlib.Path("out/digits"))
    real = judge_of_all.embed(data.test.images)                                    # (540, F)
    near = [round(metrics.nearest(real, judge_of_all.embed(found.images)), 4) for found in sets]
    judge = f"python train_eval.py {'random' if sampler is None else out + '-S/distilled'} --runs 1 --seed S"
    return {**digits_rows.described(data, len(sets[0].labels), bf16),
            "train": "random" if sampler is None else "distilled", "epochs": epochs, "runs": RUNS,
            **summary("accuracy", last[:RUNS]), **summary("one", last[RUNS:]), **summary("coverage", near),
            "steps": steps,
            "command": "; ".join([draw] * (sampler is not None) + [f"{judge} --ipc 10", f"{judge} --ipc 1"])}


def measure(data, bf16):
    """All rows that results/digits.jsonl does not have yet, one after the other."""
    jobs = digits_rows.jobs(data, datasets.load(validation=True), bf16)
    for steps in STEPS:
        jobs["steps", str(steps), None] = lambda steps=steps: budget_row(steps, BUDGET, data, bf16)
    jobs["solvers", "real, at random", 0] = lambda: solver_row(None, 0, data, bf16)
    for (name, sampler), steps in itertools.product(SOLVERS.items(), CALLS):
        jobs["solvers", name, steps] = lambda s=sampler, steps=steps: solver_row(s, steps, data, bf16)
    for steps in ("auto", *STEPS):
        jobs["auto", str(steps), None] = lambda steps=steps: budget_row(steps, SHORT_BUDGET, data, bf16)
    jobs |= digits_turbo.jobs(data, bf16, digits_rows.compared(digits_rows.pool_of(data)))
    missing = report.missing(jobs, RESULTS)
    if not missing:
        print(f"results/{RESULTS.name} has all {len(jobs)} rows: delete it to measure anew")
        return
    for flags in ("--out out/bench/tuned", "--validation --out out/bench/val-tuned"):
        type_in(f"python minimax.py {flags}")               # what most rows draw from; makes the bases
    report.measure(missing, RESULTS, machine(),
                   lambda row: f"{row['ipc']} a class | {row['mean']:.2f} +- {row['std']:.2f}")
    pictures(data)


def pictures(data):
    """The pictures of assets/ that show images, from what the rows left in out/."""
    assets = ROOT / "assets"
    shutil.copy("out/bench/tuned/steps-10-guidance-1-ipc-10-0/distilled.png", assets / "distilled.png")
    shutil.copy("out/bench/tuned/minimax.png", assets / "minimax.png")
    shutil.copy("out/digits/base.png", assets / "base.png")
    shutil.copy(f"{digits_turbo.HOME}/sets/student-steps-1-10-0/distilled.png", assets / "turbo.png")
    flags = f"--checkpoint out/digits/base.safetensors --steps 10 --guidance {data.recipe.guidance:g}"
    type_in(f"python sample.py {flags} --ipc 50 --out out/bench/base/tsne")
    sets = {"base": "base/tsne", "fine-tuned": "tuned/steps-10-guidance-1-ipc-50-0",
            "modes": f"base/{digits_rows.slug(digits_rows.MODES + ' --modes 50 --ipc 50')}-0"}
    sets = {name: baselines.read_distilled(f"out/bench/{path}/distilled", data)
            for name, path in sets.items()}
    rng = torch.Generator().manual_seed(0)
    random = baselines.SELECTORS["random"](data.train, 50, data.train.labels, rng)
    judge = real_judge(data.train, data.recipe, pathlib.Path("out/digits"))
    figures.plot_tsne({"real, held out": data.test, "real, at random": random, **sets}, judge.embed,
                      assets / "tsne.png")


# ----------------------------------------------------------------------------------------------------
# 2. Tables and plot


def pilot(rows, row):
    """What `--steps auto` saw of this row's steps, before it decided."""
    seen = {found["steps"]: found["accuracy"] for other in rows for found in other.get("pilots", [])}
    return f"{seen[row['steps']]:.1f}" if row["steps"] in seen and row["row"] != "auto" else "–"


def front(rows):
    """The front page's table: a row for each kind of set, a column for each number of images."""
    of = {(row["row"], row["ipc"]): spread(row) for row in rows}
    names = dict.fromkeys(row["row"] for row in rows if row["asked"] is not None)
    head = "| accuracy, % (n), trained on | 1 image a class | 10 images a class | 50 images a class |"
    return table(head, [f"| {name} | {' | '.join(of[name, ipc] for ipc in (1, 10, 50))} |" for name in names])


def measured(row, *names):
    """Cells of a row's metrics."""
    values = [row["metrics"][name] for name in names] if "metrics" in row else [None] * len(names)
    return " | ".join("–" if value is None else f"{value:.2f}" for value in values)


def diversity_tables(of):
    """The tables whose rows digits_rows.py makes. of: {name of the table: its rows}."""
    code = lambda row: f"`{row['command']}`"
    settings = "| precision | recall | coverage | variance | accuracy at 10 a class, % (n) |"
    numbers = lambda row: f"{measured(row, 'precision', 'recall', 'coverage', 'variance')} | {spread(row)}"
    return {
        "map": table(f"| setting {settings} at 200 a class, % (n) | seconds to draw | command |", [
            f"| {row['row']} | {numbers(row)} | {spread(row, 'two_hundred_')} | {row['drawn']:.1f} | "
            f"{code(row)} |" for row in of["map"]]),
        "curves": table(f"| what differs {settings} command |", [
            f"| {row['row']} | {numbers(row)} | {code(row)} |" for row in of["curves"]]),
        "pairs": table("| trained on | images a class | accuracy, % (n) | precision | recall | command |", [
            f"| {row['row']} | {row['ipc']} | {spread(row)} | {measured(row, 'precision', 'recall')} | "
            f"{code(row)} |" for row in of["pairs"]]),
        "seconds": table("| set | images a class | accuracy, % (n) | precision | recall | seconds | "
                         "command |", [
            f"| {row['row']} | {row['ipc']} | {spread(row)} | {measured(row, 'precision', 'recall')} | "
            f"{row['drawn']:.2f} | {code(row)} |" for row in of["seconds"]]),
        "expansion": table("| trained on | images | accuracy, % (n) | command |", [
            f"| {row['row']} | {row['images']} | {spread(row)} | {code(row)} |"
            for row in [*(row for row in of["main"] if row["asked"] is None), *of["expansion"]]]),
    }


def tables(rows):
    """The pages' generated parts, by name: rows of results/digits.jsonl -> {name: markdown}."""
    of = {name: [row for row in rows if row["table"] == name] for name in TABLES}
    tuned = lambda row: "–" if row["row"] == "base DiT" else f"`{row['command'].split('; ')[0]}`"
    drawn = lambda row: f"{row['drawn']:.1f}" if "drawn" in row else "–"
    machines = {row["machine"]: dict.fromkeys(other["table"] for other in rows
                                              if other["machine"] == row["machine"]) for row in rows}
    return {
        **{name: part for name, part in diversity_tables(of).items() if of[name]},
        "front": front(of["main"]),
        "machines": table("| machine | tables |", [
            f"| {machine.replace(', ', '; ')} | {', '.join(names)} |"
            for machine, names in machines.items()]),
        "main": table("| trained on | images a class | accuracy, % (n) | precision | recall | seconds to "
                      "draw | command |", [
            f"| {row['row']} | {row['ipc']} | {spread(row)} | {measured(row, 'precision', 'recall')} | "
            f"{drawn(row)} | `{row['command']}` |" for row in of["main"]]),
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
        **one_step_tables(of),
    }


def one_step_tables(of):
    """The tables whose rows digits_turbo.py makes. of: {name of the table: its rows}."""
    code = lambda row: f"`{row['command']}`"
    parts = {
        "turbo": table("| drawn with | images a class | accuracy, % (n) | precision | recall | seconds for "
                       "1,000 images | command |", [
            f"| {row['row']} | {row['ipc']} | {spread(row)} | {measured(row, 'precision', 'recall')} | "
            f"{row['per_thousand'] or '–'} | {code(row)} |" for row in of["turbo"]]),
        "turbo-seconds": table("| drawn with | seconds | images a class | accuracy, % (n) | command |", [
            f"| {row['row']} | {row['asked']:g} | {row['ipc']} | {spread(row)} | {code(row)} |"
            for row in of["turbo-seconds"]]),
    }
    return {name: part for name, part in parts.items() if of[name]}


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.add_argument("--tables", action="store_true",
                        help="measure nothing; rewrite the tables and the plot")
    args = parser.parse_args(argv)
    with running.command(parser, args):
        if not args.tables:
            device = cli.device_named("cpu")
            data = datasets.load()
            data = data._replace(train=data.train.to(device), test=data.test.to(device))
            measure(data, cli.gains_from_bf16(device))
        rows = results.read_rows(RESULTS)
        if not rows:
            raise UserError(f"{RESULTS.name} has no rows yet: leave --tables out")
        figures.plot_steps(rows, BUDGET, ROOT / "assets" / "steps.png")
        figures.plot_map(rows, ROOT / "assets" / "map.png")
        if any(row["table"] == "curves" for row in rows):
            figures.plot_curves(rows, digits_rows.CURVES, ROOT / "assets" / "curves.png")
        figures.plot_images(rows, ROOT / "assets" / "images.png")
        write_pages(tables(rows))
        print(f"README.md, docs/digits.md and assets/ show the {len(rows)} rows of "
              f"results/{RESULTS.name}")


if __name__ == "__main__":
    main()
