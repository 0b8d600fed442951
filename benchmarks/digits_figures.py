"""The figures of docs/digits.md, drawn from the rows of results/digits.jsonl; t-SNE also needs the sets.

No benchmark by itself: `python benchmarks/digits.py --tables` draws all of them but t-SNE.
"""
import numpy as np
import torch
from sklearn.manifold import TSNE

from report import pyplot, save_plot

# ----------------------------------------------------------------------------------------------------
# 1. From rows

DIALS = {                      # a line of the map: its rows, in order
    "guidance 1 to 4, 10 steps": [f"guidance {g}" for g in ("1", "1.5", "2", "3", "4")],
    "3 to 50 steps, guidance 1": ["3 steps, guidance 1", "5 steps, guidance 1", "guidance 1",
                                  "20 steps, guidance 1", "50 steps, guidance 1"],
    "3 to 50 steps, guidance 2": ["3 steps, guidance 2", "5 steps, guidance 2", "guidance 2",
                                  "20 steps, guidance 2", "50 steps, guidance 2"],
    "lambda_d 0 to 0.1, 5 steps, guidance 1": ["5 steps, guidance 1", *(
        f"lambda_d {d}, 5 steps, guidance 1" for d in ("0.01", "0.02", "0.05", "0.1"))],
    "lambda_d 0 to 0.1, 10 steps, guidance 2": ["guidance 2", *(
        f"lambda_d {d}, guidance 2" for d in ("0.02", "0.05", "0.1"))],
    "lambda_r 0 to 0.2, 10 steps, guidance 1": ["guidance 1", *(
        f"lambda_r {r}, guidance 1" for r in ("0.05", "0.2"))],
    "mode weight 0 to 0.2, 20 steps, guidance 1.5": ["20 steps, uniform grid, guidance 1.5", *(
        f"10 modes of weight {w}, guidance 1.5" for w in ("0.1", "0.2"))],
}


def plot_map(rows, path):
    """Precision against recall, a point for each setting, a line for each dial; colour: accuracy."""
    of = {row["row"]: row for row in rows if row["table"] == "map"}
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    for axes, key, what in zip(panels, ("mean", "two_hundred_mean"), (10, 200), strict=True):
        for label, names in DIALS.items():
            line = [of[name]["metrics"] for name in names if name in of]
            axes.plot([m["recall"] for m in line], [m["precision"] for m in line], label=label, zorder=1)
        points = axes.scatter([row["metrics"]["recall"] for row in of.values()],
                              [row["metrics"]["precision"] for row in of.values()],
                              c=[row[key] for row in of.values()], zorder=2, edgecolors="black",
                              linewidths=0.4)
        figure.colorbar(points, ax=axes, label=f"accuracy at {what} a class, %")
        axes.set(xlabel="recall", ylabel="precision" if what == 10 else "")
    save_plot(figure, panels[0], path, legend=True)


def plot_curves(rows, dials, path):
    """Gu et al.'s Figure 6: precision, recall and accuracy against each number of the fine-tuning.

    dials: {dial: {value: the flags of minimax.py}}.
    """
    of = {row["row"]: row for row in rows if row["table"] == "curves"}
    figure, panels = pyplot.subplots(1, len(dials), figsize=(12, 3.2), layout="constrained", sharey=True)
    low, high = (edge(row["mean"] + sign * row["std"] for row in of.values())
                 for edge, sign in ((min, -1), (max, 1)))
    for axes, (dial, values) in zip(panels, dials.items(), strict=True):
        at = [value for value, flags in values.items() if flags in of]
        line = [of[values[value]] for value in at]
        right = axes.twinx()
        for metric in ("precision", "recall"):
            axes.plot(at, [row["metrics"][metric] for row in line], marker="o", label=metric)
        right.errorbar(at, [row["mean"] for row in line], [row["std"] for row in line], marker="s",
                       color="black", capsize=3)
        axes.set(xlabel=dial, ylim=(0, 1))
        axes.grid(alpha=0.3)
        if axes is panels[0]:
            axes.legend(fontsize=7, loc="lower left")
        right.set_ylim(low, high + 1.5 * (high - low))          # below precision and recall
        right.set_ylabel("accuracy at 10 a class, % (black)" if axes is panels[-1] else "")
    save_plot(figure, panels[0], path)


def plot_steps(rows, budget, path):
    """Accuracy against sampling steps under one budget, the shape of Fan et al.'s Table 3."""
    rows = [row for row in rows if row["table"] == "steps"]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axes.errorbar([row["steps"] for row in rows], [row["mean"] for row in rows], [row["std"] for row in rows],
                  marker="o", capsize=3)
    for row in rows:
        axes.annotate(str(row["ipc"]), (row["steps"], row["mean"]), xytext=(5, -11),
                      textcoords="offset points", fontsize=8)
    axes.set(xlabel="sampling steps", ylabel="accuracy, %",
             title=f"{budget} seconds of sampling (at each point: images a class)")
    save_plot(figure, axes, path)


def plot_images(rows, path):
    """Accuracy against 1 / sqrt(images a class), in which the gap to all real images falls as a line."""
    rows = [row for row in rows if row["table"] == "main"]
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name in dict.fromkeys(row["row"] for row in rows):
        line = sorted((row for row in rows if row["row"] == name), key=lambda row: row["ipc"])
        axes.errorbar([row["ipc"] ** -0.5 for row in line], [row["mean"] for row in line],
                      [row["std"] for row in line], marker="o", capsize=3, label=name.strip("*"))
    axes.set(xlabel="1 / sqrt(images a class)", ylabel="accuracy, %")
    save_plot(figure, axes, path, legend=True)


# ----------------------------------------------------------------------------------------------------
# 2. From sets


def plot_tsne(sets, embed, path, each=30):
    """Gu et al.'s Figure 3: t-SNE of several sets together, a panel for each, the real digits below in grey.

    sets: {name: ImageSet}, the first of them real. embed: images (N, C, H, W) uint8 -> (N, F). each: images
    of a class and set.
    """
    picked = {name: part.pick(torch.cat([(part.labels == c).nonzero().squeeze(1)[:each]
                                         for c in range(len(part.classes))])) for name, part in sets.items()}
    features = torch.cat([embed(part.images) for part in picked.values()])
    points = TSNE(random_state=0, perplexity=30).fit_transform(features.numpy())
    parts = np.split(points, np.cumsum([len(part.labels) for part in picked.values()])[:-1])
    figure, panels = pyplot.subplots(1, len(sets), figsize=(3 * len(sets), 3), layout="constrained",
                                     sharex=True, sharey=True)
    for axes, (name, part), own in zip(panels, picked.items(), parts, strict=True):
        axes.scatter(*parts[0].T, s=4, color="lightgrey")
        axes.scatter(*own.T, s=5, c=part.labels, cmap="tab10")
        axes.set(title=name, xticks=[], yticks=[])
    save_plot(figure, panels[0], path)
