"""Rows of docs/digits.md: real and distilled sets, precision against recall, pairs, sets of equal seconds.

No benchmark by itself: `python benchmarks/digits.py` measures them. Rows of the map and of the curves are
made with --validation: their base model saw four fifths of the training digits, and judges are tested on the
fifth that it did not see. Settings are chosen there. The other tables are judged on the test digits.
"""
import functools
import json
import pathlib
import re
import statistics

import torch

import convnet
from nanodd.judging import baselines, features
from report import summary, type_in
from train_eval import count_epochs, evaluate, real_judge, train_judges

RUNS, PAIRS, SECONDS = 5, 10, 2
REAL = {"real, at random": "random", "real, herding": "herding", "real, k-center": "kcenter",
        "real, k-means centroids": "kmeans"}
MODES = "--steps 20 --grid uniform --guidance 1.5 --mode-weight 0.2"     # chosen on the validation part
SELECTED = f"{MODES} --oversample 4"                            # herding keeps a quarter

# ----------------------------------------------------------------------------------------------------
# 1. The map: precision and recall of one large set a setting, and what judges learn from parts of it

# row -> (flags of minimax.py, None for the base model; flags of sample.py)
MAP = {
    **{f"guidance {g}": (None, f"--steps 10 --guidance {g}") for g in ("1", "1.5", "2", "3", "4")},
    **{f"{steps} steps, guidance {g}": (None, f"--steps {steps} --guidance {g}")
       for g in (1, 2) for steps in (3, 5, 20, 50)},
    "published lambdas, guidance 1": ("", "--steps 10 --guidance 1"),
    "published lambdas, guidance 2": ("", "--steps 10 --guidance 2"),
    **{f"lambda_d {d}, 5 steps, guidance 1": (f"--lambda-r 0 --lambda-d {d}", "--steps 5 --guidance 1")
       for d in ("0.01", "0.02", "0.05", "0.1")},
    **{f"lambda_d {d}, guidance 2": (f"--lambda-r 0 --lambda-d {d}", "--steps 10 --guidance 2")
       for d in ("0.02", "0.05", "0.1")},
    **{f"lambda_r {r}, guidance 1": (f"--lambda-r {r} --lambda-d 0", "--steps 10 --guidance 1")
       for r in ("0.05", "0.2")},
    "both 0.1, guidance 1": ("--lambda-r 0.1 --lambda-d 0.1", "--steps 10 --guidance 1"),
    "20 steps, uniform grid, guidance 1.5": (None, "--steps 20 --grid uniform --guidance 1.5"),
    "10 modes of weight 0.1, guidance 1.5": (None, "--steps 20 --grid uniform --guidance 1.5 --modes 10"),
    "10 modes of weight 0.2, guidance 2": (
        None, "--steps 20 --grid uniform --guidance 2 --modes 10 --mode-weight 0.2"),
    "10 modes of weight 0.2, guidance 1.5": (None, f"{MODES} --modes 10"),
}
# row -> (flags of minimax.py, flags of sample.py, images a class). 1,000 network calls a class, in five or in
# ten steps, with and without diversity; and ten a class at the steps of most accuracy on the map.
PAIRED = {
    "base model, 5 steps": (None, "--steps 5 --guidance 1", 200),
    "base model, 10 steps": (None, "--steps 10 --guidance 1", 100),
    "lambda_d 0.05, 5 steps": ("--lambda-r 0 --lambda-d 0.05", "--steps 5 --guidance 1", 200),
    "base model, 50 steps": (None, "--steps 50 --guidance 1", 10),
    "published lambdas, 50 steps": ("", "--steps 50 --guidance 1", 10),
    "base model, with modes": (None, f"{MODES} --modes 10", 10),
    "published lambdas, with modes": ("", f"{MODES} --modes 10", 10),
    "base model, with modes, a quarter kept": (None, f"{SELECTED} --modes 10", 10),
}
# sets within two seconds: flags of sample.py
EQUAL = {
    "plain": "--steps 10 --guidance 1",
    **{f"a fifth of it, by {rule}": f"--steps 10 --guidance 1 --oversample 5 --keep {rule}"
       for rule in ("herding", "kcenter", "band")},
    "20 modes": "--steps 10 --grid uniform --guidance 1.5 --mode-weight 0.2 --modes 20",
    "10 modes, half of it, by herding":
        "--steps 10 --grid uniform --guidance 1 --mode-weight 0.2 --modes 10 --oversample 2",
}
EQUAL = {name: f"{flags} --batch 20 --seconds {SECONDS}" for name, flags in EQUAL.items()}
# row -> flags of minimax.py; all are drawn by the flags ABLATED of sample.py
ABLATED = "--guidance 2 --ipc 10"
ABLATION = {
    "base DiT": None,
    "+ DiffFit alone": "--lambda-r 0 --lambda-d 0",
    "+ L_r": "--lambda-d 0",
    "+ L_d": "--lambda-r 0",
    "+ L_r + L_d, FIFO (the default)": "",
    "+ L_r + L_d, adaptive": "--memory adaptive",
    "+ L_r + L_d, naive": "--naive",
}
# Gu et al.'s Figure 6: {what changes: {value: flags of minimax.py}}. All start from the flags START and are
# drawn by the flags CURVE of sample.py.
START = "--lambda-r 0.002 --lambda-d 0.02"
CURVE = "--steps 10 --guidance 1"
CURVES = {
    "lambda_r": {r: f"--lambda-r {r} --lambda-d 0.02" for r in ("0", "0.002", "0.02", "0.1")},
    "lambda_d": {d: f"--lambda-r 0.002 --lambda-d {d}" for d in ("0", "0.008", "0.02", "0.05", "0.1")},
    "slots": {m: START + f" --slots {m}" * (m != "64") for m in ("16", "32", "64", "128")},
    "steps": {s: START + f" --steps {s}" * (s != "400") for s in ("100", "200", "400", "800")},
}


def tuned(flags, validation):
    """Runs minimax.py with these flags: (checkpoint, command); None is the base model: (its path, "")."""
    name, extra = ("digits-validation", "--validation ") if validation else ("digits", "")
    if flags is None:
        return f"out/{name}/base.safetensors", ""
    out = f"out/bench/{'val-' * validation}tuned{flags.replace(' ', '')}"
    command = " ".join(f"python minimax.py {extra}{flags} --out {out}".split())
    type_in(command)                                            # which is left as it is where it is finished
    return f"{out}/minimax.safetensors", command


def slug(flags):
    """Flags as the name of a folder."""
    return re.sub("[- ]+", "-", flags.strip("- "))


def folder(checkpoint, flags):
    """Where the sets of a checkpoint lie that these flags of sample.py draw."""
    home = checkpoint.rpartition("/")[0]
    return {"out/digits": "out/bench/base", "out/digits-validation": "out/bench/val-base"}.get(
        home, home) + "/" + slug(flags)


def described(data, images, bf16):
    """The part of a row that says what was judged, and how. images: of the set."""
    return {"data": data.name, "cut": data.cut, "train": "distilled",
            "ipc": images // len(data.train.classes), "images": images, "protocol": data.recipe.protocol,
            "judge": convnet.title(data.recipe.net), "size": data.recipe.judge_size, "seed": 0,
            "device": "cpu bf16" if bf16 else "cpu"}


def map_row(tune, flags, data, bf16, compare, ipc=200):
    """One set of `ipc` a class: its metrics at 50 a class, and what judges learn from it.

    Five judges of ten a class see its images 0 to 9, 10 to 19, ... of each class; five more see all 200, if
    it has so many.
    """
    checkpoint, tuning = tuned(tune, validation=True)
    out = folder(checkpoint, flags)
    draw = f"python sample.py --validation --checkpoint {checkpoint} {flags} --ipc {ipc} --npz --out {out}"
    type_in(draw)
    whole, K = baselines.read_distilled(f"{out}/distilled.npz", data), len(data.train.classes)
    tens = [whole.pick(torch.arange(10 * K) + 10 * K * run) for run in range(RUNS)]     # rounds of K images
    accuracies = {}
    for name, sets in (("accuracy", tens), ("two_hundred", [whole] * RUNS))[:1 + (ipc == 200)]:
        epochs = count_epochs(data.recipe, len(sets[0].labels), K)
        judges = train_judges(sets, data.test, data.recipe, epochs, [1000 * run for run in range(RUNS)],
                              num_evals=1, bf16=bf16)
        accuracies |= {"epochs": epochs} if name == "accuracy" else {}
        accuracies |= summary(name, [round(curve[-1], 4) for _, curve in judges])
    drawn = json.loads(pathlib.Path(out, "distilled.json").read_text())["seconds"]
    return {**described(data, 10 * K, bf16), "runs": RUNS, **accuracies, "drawn": round(drawn, 2),
            "metrics": compare([whole.pick(torch.arange(50 * K))]),
            "command": "; ".join(filter(None, [tuning, draw]))}


# ----------------------------------------------------------------------------------------------------
# 2. Pairs, and equal seconds, on the test digits


def judged(sets, data, bf16, compare):
    """The part of a row that one judge of each of the sets makes; that of the k-th has the seed 1000 k.

    The sets may differ in size: the row has size and epochs of the smallest, and all accuracies.
    """
    sizes, accuracies = sorted({len(part.labels) for part in sets}), {}
    epochs = {size: count_epochs(data.recipe, size, len(data.train.classes)) for size in sizes}
    for size in sizes:
        seeds = [seed for seed, part in enumerate(sets) if len(part.labels) == size]
        judges = train_judges([sets[seed] for seed in seeds], data.test, data.recipe, epochs[size],
                              [1000 * seed for seed in seeds], num_evals=1, bf16=bf16)
        accuracies |= {seed: round(curve[-1], 4) for seed, (_, curve) in zip(seeds, judges, strict=True)}
    return {**described(data, sizes[0], bf16), "runs": len(sets), "epochs": epochs[sizes[0]],
            **summary("accuracy", [accuracies[seed] for seed in range(len(sets))]), "metrics": compare(sets)}


def drawn_sets(draw, out, data, runs):
    """Types `draw`, whose S is the seed, for each of `runs` seeds: the sets in out-S, and their seconds."""
    sets, seconds = [], []
    for seed in range(runs):
        type_in(draw.replace("S", str(seed)))
        sets.append(baselines.read_distilled(f"{out}-{seed}/distilled", data))
        seconds.append(json.loads(pathlib.Path(f"{out}-{seed}", "distilled.json").read_text())["seconds"])
    return sets, seconds


def sets_row(tune, flags, data, bf16, compare, runs=PAIRS):
    """A set, and a judge of it, for each of `runs` seeds, so that two rows are paired."""
    checkpoint, tuning = tuned(tune, validation=False)
    out = folder(checkpoint, flags)
    draw = f"python sample.py --checkpoint {checkpoint} {flags} --seed S --out {out}-S"
    sets, drawn = drawn_sets(draw, out, data, runs)
    return {**judged(sets, data, bf16, compare), "drawn": round(statistics.mean(drawn), 2),
            "command": "; ".join(filter(None, [tuning, draw, f"python train_eval.py {out}-S/distilled "
                                                             "--metrics --runs 1 --seed S"]))}


def real_row(source, ipc, pool, bf16, compare):
    """Judges of real images: a row of train_eval.py. pool: baselines.Pool."""
    command = f"python train_eval.py {source} --metrics" + (f" --ipc {ipc}" if ipc else "")
    [row] = evaluate([(source, 0)], pool.data, ipc=ipc, runs=RUNS, seed=0, bf16=bf16, pool=pool,
                     compare=compare)
    return {**row, "command": command}


def random_sets(data, runs):
    """Ten random real images a class for each seed, as train_eval.py --runs 1 --seed S chooses them."""
    rngs = [torch.Generator().manual_seed(1000 * seed + 500) for seed in range(runs)]
    return [baselines.SELECTORS["random"](data.train, 10, data.train.labels, rng) for rng in rngs]


def random_row(data, bf16, compare):
    """Random real images, ten a class; paired with sets_row, as the judge of seed S has the same numbers."""
    return {**judged(random_sets(data, PAIRS), data, bf16, compare), "train": "random",
            "command": "python train_eval.py random --ipc 10 --metrics --runs 1 --seed S"}


def expanded_row(data, bf16, compare):
    """All real images and 100 distilled ones a class beside them (Gu et al., Table 9)."""
    checkpoint, tuning = tuned("", validation=False)
    draw = f"python sample.py --checkpoint {checkpoint} --guidance 1 --ipc 100 --out out/bench/hundred"
    type_in(draw)
    source = "full+out/bench/hundred/distilled"
    [row] = evaluate([(source, 0)], data, ipc=100, runs=RUNS, seed=0, bf16=bf16, compare=compare)
    return {**row, "command": f"{tuning}; {draw}; python train_eval.py {source} --ipc 100 --metrics"}


# ----------------------------------------------------------------------------------------------------
# 3. All of them


def pool_of(data):
    """The baselines.Pool of `data`, whose judge of all real digits is kept in out/NAME."""
    return baselines.Pool(data, data.test.images.device,
                          functools.partial(real_judge, folder=pathlib.Path("out", data.name)))


def compared(pool):
    """() -> features.comparison with the images that judges are tested on, made where it is needed first."""
    return functools.cache(lambda: features.comparison("judge", pool.real_judge, pool.data.test))


def jobs(test, validation, bf16):
    """{(table, row, asked): function that makes the row}. test: Data, judged on the test digits.

    validation: Data of --validation. A judge of all real digits is trained where the first row needs it.
    """
    pool = pool_of(test)
    on_test, on_validation = compared(pool), compared(pool_of(validation))

    def chosen_there(tune, flags, ipc=200):
        return lambda: map_row(tune, flags, validation, bf16, on_validation(), ipc)

    def judged_here(tune, flags, runs):
        return lambda: sets_row(tune, flags, test, bf16, on_test(), runs)

    def real(source, ipc):
        return lambda: real_row(source, ipc, pool, bf16, on_test())
    rows = {("main", "all real images", None): real("full", None)}
    for ipc in (1, 10, 50):
        for name, source in REAL.items():
            rows["main", name, ipc] = real(source, ipc)
        rows["main", "**distilled**", ipc] = judged_here(
            "", f"--steps 10 --guidance 1 --ipc {ipc}", RUNS)
        for name, flags in (("with modes", MODES), ("with modes, a quarter kept", SELECTED)):
            rows["main", f"**distilled, {name}**", ipc] = judged_here(
                None, f"{flags} --modes {ipc} --ipc {ipc}", RUNS)
    rows |= {("map", name, None): chosen_there(*flags) for name, flags in MAP.items()}
    rows |= {("curves", flags, None): chosen_there(flags, CURVE, 50)
             for values in CURVES.values() for flags in values.values()}
    rows |= {("pairs", name, ipc): judged_here(tune, f"{flags} --ipc {ipc}", PAIRS)
             for name, (tune, flags, ipc) in PAIRED.items()}
    rows["pairs", "real, at random", 10] = lambda: random_row(test, bf16, on_test())
    rows |= {("seconds", name, SECONDS): judged_here(None, flags, RUNS) for name, flags in EQUAL.items()}
    rows["expansion", "and 100 distilled a class", None] = lambda: expanded_row(test, bf16, on_test())
    rows |= {("ablation", name, 10): judged_here(flags, ABLATED, RUNS) for name, flags in ABLATION.items()}
    return rows
