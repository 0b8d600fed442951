"""Measures the rows of docs/digits.md's tables, and writes the tables and the plots from what it measured.

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
import digits_tables
import digits_turbo
import report
from nanodd import cli, running
from nanodd.data import datasets
from nanodd.judging import baselines, metrics
from report import machine, summary, type_in, write_pages
from train_eval import count_epochs, evaluate, real_judge, train_judges

RESULTS = ROOT / "results" / "digits.jsonl"
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
# 2. The command


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.add_argument("--tables", action="store_true",
                        help="measure nothing; rewrite the tables and the plots")
    args = parser.parse_args(argv)
    with running.command(parser, args):
        if not args.tables:
            device = cli.device_named("cpu")
            data = datasets.load()
            data = data._replace(train=data.train.to(device), test=data.test.to(device))
            measure(data, cli.gains_from_bf16(device))
        rows = report.rows_to_show(RESULTS)
        figures.plot_steps(rows, BUDGET, ROOT / "assets" / "steps.png")
        figures.plot_map(rows, ROOT / "assets" / "map.png")
        if any(row["table"] == "curves" for row in rows):
            figures.plot_curves(rows, digits_rows.CURVES, ROOT / "assets" / "curves.png")
        figures.plot_images(rows, ROOT / "assets" / "images.png")
        write_pages(digits_tables.tables(rows))
        print(f"README.md, docs/digits.md and assets/ show the {len(rows)} rows of "
              f"results/{RESULTS.name}")


if __name__ == "__main__":
    main()
