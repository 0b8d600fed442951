"""Measures the numbers of docs/method.md and draws its pictures: x0_hat, the extremes, few steps, averages.

    python benchmarks/method.py            # 5 minutes on two CPU cores, and as many for a base model
    python benchmarks/method.py --tables   # measures nothing: rewrites the tables from results/method.jsonl

Rows are kept in results/method.jsonl; those that are there are not measured again. Everything runs on the CPU
and on the digits. docs/users.md has two tables of runs that were made by hand, out of what they left in out/:
the losses, and the judges of a folder of three classes.
"""
import copy
import functools
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import nanodd  # noqa: F401 (before torch: it sets how long waiting CPU threads spin)
import torch

import method_figures as figures
import method_toys as toys
import report
from diffusion import DiT, Schedule, denoising_loss, train, training_batch
from memory import Memory
from minimax import by_class, cosines
from nanodd import cli, running
from nanodd.data import datasets, imageset
from nanodd.judging import results
from nanodd.networks import models, training
from sample import guided, image_noise, sampler_of

RESULTS = ROOT / "results" / "method.jsonl"
BASE = "out/digits/base.safetensors"
TIMES = (20, 100, 200, 400, 600, 800, 900, 999)
STEPS = (3, 5, 10, 20, 50)
GRIDS = "uniform", "quadratic"
SETTINGS = [(50, 1), (10, 1), (5, 1), (3, 1), (10, 2), (10, 4)]  # steps and guidance of the picture
LOOKS = (100, 500, 2500, 7500)                                  # steps at which averages are compared
LOGS = {                                                        # row -> its log, and the command of the run
    "digits": ("out/digits/base", "python diffusion.py"),
    "digits, fine-tuning": ("out/digits/minimax", "python minimax.py"),
    "digits, U-ViT": ("out/digits/uvit/base", "python diffusion.py --network uvit"),
    "three classes of CIFAR-100, as a folder": ("out/three/base", "python diffusion.py --data three"),
    "the same, fine-tuning": ("out/three/minimax", "python minimax.py --data three")}
JUDGED = {                                                      # row -> "train" in out/three/results.jsonl
    "distilled, guidance 2": "out/three/distilled", "distilled, guidance 1.5": "out/three-g1.5/distilled",
    "distilled, guidance 1": "out/three-g1/distilled", "real, at random": "random",
    "real, k-means centroids": "kmeans", "all real images": "full"}

# ----------------------------------------------------------------------------------------------------
# 1. The base model: its one-step prediction, and which prediction is the extreme one


def error(guess, x):
    """The root of the mean square difference over all pixels."""
    return round((guess - x).pow(2).mean().sqrt().item(), 4)


def closeness(guess, x0):
    """How far guesses (N, 1, 8, 8) are from the images x0, and their mean cosine with them."""
    cosine = torch.cosine_similarity(guess.flatten(1), x0.flatten(1))
    return {"x0_error": error(guess, x0), "cosine": round(cosine.mean().item(), 3)}


@torch.no_grad()
def x0_row(model, data, t):
    """How good x0_hat is at time t on the test digits."""
    x0, labels = imageset.to_float(data.test.images), data.test.labels      # (540, 1, 8, 8) in [-1, 1]
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t))
    denoised = denoising_loss(model, Schedule(), x0, labels, torch.full_like(labels, t), eps)
    signal, noise = (part.item() for part in Schedule().at(torch.tensor([t])))
    return {"factor": round(noise / signal, 2), "eps_error": error(denoised.eps_hat, eps),
            **closeness(denoised.x0_hat, x0)}


def reference_row(data):
    """The same numbers of a guess that knows the class alone: its mean training image."""
    train = by_class(imageset.to_float(data.train.images), data.train.labels.tolist())
    means = torch.stack([images.mean(dim=0) for images in train.values()])              # (10, 1, 8, 8)
    return closeness(means[data.test.labels], imageset.to_float(data.test.images))


@torch.no_grad()
def extreme_row(model, data, batches=400):
    """Which prediction sets the losses of minimax.py's default: how noisy it was, and how often.

    "above": the share of batches and classes, in percent, whose extreme prediction has t >= 800, a fifth of
    all times. The memories of the first 100 batches are still filling, and are left out.
    """
    real, generated, times = Memory(64, "fifo"), Memory(64, "fifo"), {"min": [], "max": []}
    plan = training.Plan(steps=batches, batch=64, lr=0., decay=False, ema=0., seed=0, flip=False)
    rows, labels = torch.arange(11), data.train.labels
    for step in range(batches):
        x0, y, t, eps = training_batch(data.train, plan, step, rows, Schedule())
        z = denoising_loss(model, Schedule(), x0, y, t, eps).x0_hat
        batch_labels = labels[training.batch_index(len(labels), plan.batch, step, plan.seed)].tolist()
        z, x0, t = (by_class(part, batch_labels) for part in (z.flatten(1), x0.flatten(1), t))
        for c in z:                                                         # z[c] (n, 64), t[c] (n,)
            if step >= 100:
                lowest = cosines(z[c], real.get(c)).min(dim=1).values.argmin()
                highest = cosines(z[c], generated.get(c)).max(dim=1).values.argmax()
                times["min"].append(t[c][lowest].item())
                times["max"].append(t[c][highest].item())
            real.push(c, x0[c])
            generated.push(c, z[c])
    share = lambda found: round(100 * sum(t >= 800 for t in found) / len(found), 1)
    return {f"{name}_above": share(found) for name, found in times.items()} | {"n": len(times["min"])}


# ----------------------------------------------------------------------------------------------------
# 2. The average of the weights


def average_rows(data):
    """Trains the digits' base model and compares, on the test digits, its weights and two averages of them.

    The loss is L_diff at four random (t, eps) a digit. "late" has the decay .995 from the first step on.
    Returns {step: {"last", "warm", "late": the loss}} for LOOKS.
    """
    recipe, rows, found = data.recipe, torch.arange(11), {}
    size, numbers = training.by_recipe(recipe)
    torch.manual_seed(0)
    model = DiT(size, recipe.size, recipe.patch, recipe.channels, 10)
    trainer = training.Trainer(model, training.Plan(**numbers, seed=0, flip=recipe.flip))
    late = copy.deepcopy(trainer.ema)
    x0, rng = imageset.to_float(data.test.images).repeat(4, 1, 1, 1), torch.Generator().manual_seed(0)
    times = torch.randint(1000, (len(x0),), generator=rng)                  # (2160,)
    eps, labels = torch.randn(x0.shape, generator=rng), data.test.labels.repeat(4)

    @torch.no_grad()
    def loss(weights):
        predict = lambda *inputs: torch.func.functional_call(model, weights, inputs)
        return round(denoising_loss(predict, Schedule(), x0, labels, times, eps).loss.mean().item(), 4)
    for done, _ in enumerate(train(trainer, data.train, rows, Schedule()), 1):
        training.ema_update(late, trainer.trainable, recipe.ema)
        if done in LOOKS:
            found[done] = {"last": loss(trainer.trainable), "warm": loss(trainer.ema), "late": loss(late)}
    trainer.close()
    return found


# ----------------------------------------------------------------------------------------------------
# 3. Rows, tables and pictures


def log_row(path, command):
    """The first, the middle and the last line of a training log, and the command that made it."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    picked = [lines[0], lines[len(lines) // 2 - 1], lines[-1]]
    return {"data": path.parts[1], "lines": [{key: round(value, 4) for key, value in line.items()}
                                             for line in picked], "command": command}


def judged_row(source):
    """The first row of out/three/results.jsonl that was trained on `source`."""
    rows = results.read_rows(pathlib.Path("out/three/results.jsonl"))
    return next(row for row in rows if row.get("train") == source and "accuracy" in row)


def measure(data):
    """All rows that results/method.jsonl does not have yet, and the pictures."""
    report.type_in("python diffusion.py")                       # a finished base is left as it is
    model, _ = models.load_model(BASE)
    averages = functools.cache(lambda: average_rows(data))
    jobs = {("x0", "x0_hat", t): lambda t=t: x0_row(model, data, t) for t in TIMES}
    jobs["reference", "mean of the class", None] = lambda: reference_row(data)
    jobs["extreme", "both losses", None] = lambda: extreme_row(model, data)
    jobs |= {("average", "loss", step): lambda step=step: averages()[step] for step in LOOKS}
    logs = {name: (pathlib.Path(f"{log}.log.jsonl"), command) for name, (log, command) in LOGS.items()}
    jobs |= {("losses", name, None): lambda log=log: log_row(*log) for name, log in logs.items()
             if log[0].is_file()}
    if pathlib.Path("out/three/results.jsonl").is_file():
        jobs |= {("folder", name, None): lambda source=source: judged_row(source)
                 for name, source in JUDGED.items()}
    jobs = {name: lambda make=make: {"data": "digits", **make()} for name, make in jobs.items()}
    report.measure(report.missing(jobs, RESULTS), RESULTS, report.machine(), lambda row: "measured")
    figures.plot_x0(*predictions(model, data), ROOT / "assets" / "x0_hat.png")
    figures.save_sheet(few_steps(model, data), ROOT / "assets" / "diversity.png",
                       [f"{steps} steps, guidance {guidance}" for steps, guidance in SETTINGS])


@torch.no_grad()
def predictions(model, data, digits=(0, 4)):
    """For the picture: (times, x_t, x0_hat), the last two (digits, times, 8, 8)."""
    firsts = [int((data.test.labels == digit).nonzero()[0]) for digit in digits]
    x0, labels = imageset.to_float(data.test.images[firsts]), data.test.labels[firsts]
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    found = [denoising_loss(model, Schedule(), x0, labels, torch.full_like(labels, t), eps) for t in TIMES]
    return TIMES, *(torch.stack([part[:, 0] for part in parts], dim=1)
                    for parts in ([f.xt for f in found], [f.x0_hat for f in found]))


def few_steps(model, data, digit=4, columns=16):
    """For the picture: one class from the same noise, a row of `columns` for each of SETTINGS."""
    rows, found = torch.full((columns,), digit), []
    for steps, guidance in SETTINGS:
        predict = guided(model, rows, 10, guidance)
        noise = image_noise(0, [(str(digit), k) for k in range(columns)], (1, 8, 8), "cpu")
        found.append(imageset.to_uint8(sampler_of("ddim", steps)(predict, noise)))
    return torch.stack(found)                                               # (rows, columns, 1, 8, 8)


def tables(rows):
    """The pages' generated parts, by name: rows of results/method.jsonl -> {name: markdown}."""
    of = {name: [row for row in rows if row["table"] == name]
          for name in ("x0", "average", "losses", "folder")}

    def line(row):
        ends, last = " | ".join(f"{end['loss']:.3f}" for end in row["lines"]), row["lines"][-1]
        extra = f"{last['repr']:.2f} | {last['div']:.2f}" if "repr" in last else "– | –"
        return f"| {row['row']} | {last['step']:,} | {ends} | {extra} | {last['seconds'] / 60:.1f} |"
    return {
        "x0_hat": report.table("| t | error of eps_hat | sqrt(1 - abar) / sqrt(abar) | error of x0_hat | "
                               "cosine of x0_hat and x_0 |", [
            f"| {row['asked']} | {row['eps_error']:.3f} | {row['factor']:.2f} | {row['x0_error']:.3f} | "
            f"{row['cosine']:.2f} |" for row in of["x0"]]),
        "gaussian": report.table(f"| grid | {' | '.join(f'{n} steps' for n in STEPS)} |", [
            f"| {grid} | {' | '.join(f'{toys.gaussian_deviation(n, grid):.3f}' for n in STEPS)} |"
            for grid in GRIDS]),
        "average": report.table("| after step | the weights themselves | their average, warmed up | their "
                                "average with decay .995 from the start |", [
            f"| {row['asked']:,} | {row['last']:.3f} | {row['warm']:.3f} | {row['late']:.3f} |"
            for row in of["average"]]),
        "losses": report.table("| run | steps | loss, first tenth | fifth tenth | last tenth | L_r at the "
                               "end | L_d at the end | minutes |", [line(row) for row in of["losses"]]),
        "folder": report.table("| trained on | images a class | accuracy, % |", [
            f"| {row['row']} | {row['ipc']} | {report.spread(row)} |" for row in of["folder"]]),
    }


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.add_argument("--tables", action="store_true",
                        help="measure nothing; rewrite the tables and the picture of the toy")
    args = parser.parse_args(argv)
    with running.command(parser, args):
        if not args.tables:
            measure(datasets.load())
        rows = report.rows_to_show(RESULTS)
        figures.plot_toy(toys, ROOT / "assets" / "minmax.png")
        report.write_pages(tables(rows))
        print(f"docs/method.md and docs/users.md show the {len(rows)} rows of results/{RESULTS.name}")


if __name__ == "__main__":
    main()
