"""Measures every row of the README's tables in one run, then writes the tables and the plot from them.

    python benchmarks/digits.py            # BENCH_COST; interrupted, it goes on with the row it was at
    python benchmarks/digits.py --tables   # no measuring: only rewrites the README from results/digits.jsonl

Accuracies are the judge's last epoch on the 540 real test digits. A row of generated images at a fixed count
draws five sets (seeds 0 to 4) and trains a judge on each, as "random" does: at ten images a class the draw
matters more than the judge. A row under a budget of seconds is one large set and five judges.
"""
import json
import pathlib
import statistics
import sys
import time

import matplotlib
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import minimax
import sample
from data import device_named, load, new_parser, one_sentence, replacing
from train_eval import evaluate, gains_from_bf16, judge_features

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = ROOT / "results" / "digits.jsonl"
RUNS, BUDGET = 5, 10
STEPS = (5, 10, 15, 20, 25, 30, 50)
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
# 1. Rows


def real_row(source, ipc, data, bf16):
    """A row of real images; its command trains the same judges."""
    device = data.test.images.device
    row = evaluate(source, data, ipc=ipc, runs=RUNS, seed=0, bf16=bf16,
                   features=judge_features(data, 0, bf16))
    return {**row, "device": str(device) + (" bf16" if bf16 else ""),
            "command": f"python train_eval.py {source}" + (f" --ipc {ipc}" if source != "full" else "")}


def generated_row(flags, ipc, data, bf16):
    """A row of drawn images: a set for each seed, a judge for each set. flags: minimax.py's (None: base)."""
    out = pathlib.Path("out/bench") / ("base" if flags is None else "tuned" + flags.replace(" ", ""))
    if flags is None:
        checkpoint, made = "out/digits/base.safetensors", ""
    else:
        minimax.main([*flags.split(), "--out", str(out)])
        checkpoint, made = f"{out}/minimax.safetensors", f"python minimax.py {flags}".strip() + "; "
    rows, drawn = [], 0.0
    for seed in range(RUNS):
        place = out / f"ipc{ipc}-seed{seed}"
        sample.main(["--checkpoint", checkpoint, "--ipc", str(ipc), "--seed", str(seed), "--out", str(place)])
        drawn += json.loads((place / "distilled.json").read_text())["seconds"]
        rows.append(evaluate(str(place / "distilled"), data, ipc=ipc, runs=1, seed=seed, bf16=bf16))
    accuracy = [row["mean"] for row in rows]
    sampled = "python sample.py" + (" --checkpoint out/digits/base.safetensors" if flags is None else "")
    return {**rows[0], "train": "distilled", "runs": RUNS, "accuracy": accuracy,
            "mean": round(statistics.mean(accuracy), 4), "std": round(statistics.stdev(accuracy), 4),
            "best": round(statistics.mean(row["best"] for row in rows), 4), "drawn": round(drawn / RUNS, 2),
            "seconds": round(sum(row["seconds"] for row in rows), 1),
            "command": f"{made}{sampled} --ipc {ipc} --seed S; "
                       "python train_eval.py --runs 1 --seed S, S = 0...4"}


def budget_row(steps, data, bf16):
    """A row of as many images as BUDGET seconds allow at so many steps."""
    place = pathlib.Path("out/bench") / f"steps{steps}"
    flags = f"--steps {steps} --seconds {BUDGET}"
    sample.main(["--checkpoint", "out/bench/tuned/minimax.safetensors", *flags.split(), "--out", str(place)])
    row = evaluate(str(place / "distilled"), data, ipc=None, runs=RUNS, seed=0, bf16=bf16)
    return {**row, "train": "distilled", "steps": steps,
            "drawn": round(json.loads((place / "distilled.json").read_text())["seconds"], 2),
            "command": f"python sample.py {flags}; python train_eval.py"}


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
        jobs["steps", str(steps), None] = lambda steps=steps: budget_row(steps, data, bf16)
    found = {(row["table"], row["row"], row["asked"]) for row in read_rows()}
    for (table, name, ipc), job in jobs.items():
        if (table, name, ipc) in found:
            continue
        row = {"table": table, "row": name, "asked": ipc, **job(), "machine": machine()}
        with open(RESULTS, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{table} | {name} | {row['ipc']} a class | {row['mean']:.2f} +- {row['std']:.2f}", flush=True)


def machine():
    return (f"{torch.get_num_threads()} CPU cores, torch {torch.__version__.split('+')[0]}, "
            f"{time.strftime('%Y-%m-%d')}")


def read_rows():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


# ----------------------------------------------------------------------------------------------------
# 2. Tables and plot


def spread(row):
    return f"{row['mean']:.1f} ± {row['std']:.1f} ({row['runs']})"


def tables(rows):
    """The README's generated parts, by name: rows of results/digits.jsonl -> {name: markdown}."""
    def table(head, lines):
        return "\n".join([head, "|".join(["", *["---"] * (head.count("|") - 1), ""]), *lines])
    of = {name: [row for row in rows if row["table"] == name] for name in ("main", "ablation", "steps")}
    drawn = lambda row: f"{row['drawn']:.1f}" if "drawn" in row else "–"
    return {
        "main": table("| trained on | images a class | accuracy, % (n) | seconds to draw | machine "
                      "| command |", [
            f"| {row['row']} | {row['ipc']} | {spread(row)} | {drawn(row)} | "
            f"{row['machine'].split(',')[0]} | `{row['command']}` |" for row in of["main"]]),
        "ablation": table("| model | accuracy at 10 a class, % (n) | command |", [
            f"| {row['row']} | {spread(row)} | `{row['command'].split(';')[0]}` |"
            for row in of["ablation"]]),
        "steps": table("| steps | images a class | accuracy, % (n) | command |", [
            f"| {row['steps']} | {row['ipc']} | {spread(row)} | `{row['command'].split(';')[0]}` |"
            for row in of["steps"]]),
        "machine": f"{rows[0]['machine'].replace(', ', '; ')}",
    }


def write_readme(parts):
    """Puts each part between its two marks in README.md."""
    path = ROOT / "README.md"
    text = path.read_text()
    for name, part in parts.items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        _, after = rest.split(f"<!-- end of {name} -->", 1)
        text = f"{before}<!-- {name} -->\n{part}\n<!-- end of {name} -->{after}"
    with replacing(path) as temporary:
        temporary.write_text(text)


def plot(rows, path):
    """Accuracy against sampling steps under one budget, the shape of Fan et al.'s Table 3."""
    rows = [row for row in rows if row["table"] == "steps"]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axes.errorbar([row["steps"] for row in rows], [row["mean"] for row in rows], [row["std"] for row in rows],
                  marker="o", capsize=3)
    for row in rows:
        axes.annotate(f"{row['ipc']} a class", (row["steps"], row["mean"]), xytext=(4, -12),
                      textcoords="offset points", fontsize=8)
    axes.set(xlabel="sampling steps", ylabel="accuracy, %", title=f"{BUDGET} seconds of sampling")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--tables", action="store_true",
                        help="measure nothing; rewrite the README's tables and plot")
    args = parser.parse_args(argv)
    with one_sentence(parser):
        if not args.tables:
            device = device_named("cpu")
            data = load()
            data = data._replace(train=data.train.to(device), test=data.test.to(device))
            measure(data, gains_from_bf16(device))
        rows = read_rows()
        plot(rows, ROOT / "assets" / "steps.png")
        write_readme(tables(rows))


if __name__ == "__main__":
    main()
