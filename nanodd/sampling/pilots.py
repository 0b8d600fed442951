"""--steps auto: how many steps are best for this budget, on this machine.

Fan et al. 2025 found 10 best for ten minutes of their GPU. Half the steps give twice the images, of lower
quality; the best number depends on the machine, the data and the budget. A pilot, a small set, is therefore
drawn with each number of steps in a share of the budget, and its score is the accuracy of judges, classifiers
trained from scratch on the pilot alone. Where the budget is long, a pilot is smaller than the set, which
favours fewer steps a little.
"""
import math
import platform
import statistics
from dataclasses import replace

import torch

from nanodd import cli, files, locks, processes, schema
from nanodd.data import datasets
from nanodd.errors import UserError
from nanodd.judging import baselines
from nanodd.sampling import distilled, stores

# ----------------------------------------------------------------------------------------------------
# 1. Pilots and their judges

CANDIDATES = (5, 10, 15, 20, 25, 30, 50)                        # Fan et al.'s, Table 3, and 50
PILOT_SECONDS = 60             # all pilots together take the budget once more, or this if it is longer
PILOT_VIEWS, PILOT_JUDGES = 100_000, 2                          # images that a judge sees, at most; judges


def pilot_share(budget):
    """The share of the budget (seconds) that each candidate's pilot gets: in (0, 1], 1 for a short one."""
    return min(1.0, max(budget, PILOT_SECONDS) / (len(CANDIDATES) * budget))


def named(device):
    """A device with its model, for the settings in steps.json: the best number depends on the machine."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device} {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def judge_of_pilots(args, recipe, device, train_judges, count_epochs):
    """A function from a pilot's folder to the accuracy of its judges on a fifth of the training images, %.

    The diffusion model trained on that fifth, but no judge does, and the test split is not used; under
    --validation it is a fifth of the remaining training images. The accuracy is the mean over PILOT_JUDGES
    judges of the shortened protocol; at a quarter of its length judges favoured small sets, whose images they
    see more often. train_judges, count_epochs: train_eval.py's.
    """
    data = datasets.load(args.data, args.root, recipe, validation=True, skip_broken=args.skip_broken)
    test = datasets.split(data.train, .2)[1] if args.validation else data.test
    recipe = replace(data.recipe, protocol="short", views=min(data.recipe.views, PILOT_VIEWS))
    data = data._replace(recipe=recipe, test=datasets.for_judges(test, recipe).read().to(device))
    seeds, bf16 = [1000 * args.seed + run for run in range(PILOT_JUDGES)], cli.gains_from_bf16(device)

    def judge(folder):
        train = baselines.read_distilled(folder, data).to(device)
        epochs = count_epochs(recipe, len(train.labels), len(train.classes))
        judges = train_judges([train] * PILOT_JUDGES, data.test, recipe, epochs, seeds, bf16=bf16)
        return statistics.mean(accuracies[-1] for _, accuracies in judges)
    return judge


# ----------------------------------------------------------------------------------------------------
# 2. The choice


def choose_steps(draw_in, judge, place, settings, budget, run):
    """The number of steps whose pilot trained the best judges; the table is written to steps.json.

    draw_in: steps -> the function that draws a block. judge: () -> (a pilot's folder -> accuracy), called on
    the first process alone. place: distilled.Place of the set. settings: the set's, with steps "auto"; where
    steps.json has the same settings, budget and machine, its number is returned. run: cli.Run. The budget
    does not include the time of this function.
    Raises UserError where the budget is too short for one image of each class at any number of steps, where
    steps.json is damaged, and where a set is there that it does not speak of.
    """
    processes.on_first_process(lambda: locks.take(place.out))
    settings = {**settings, "budget": budget, "device": named(run.device), "processes": processes.world(),
                "compile": run.compile}
    out, path, share = place.out, place.out / "steps.json", pilot_share(budget)
    decided = processes.on_first_process(lambda: read_decision(path, settings))     # of its own device
    if decided:
        print(f"{path} has decided on {decided} steps (same settings)")
        return decided                                          # --overwrite removes no set of these steps
    if run.overwrite:
        place.overwrite()
    if place.record_path.is_file():
        raise UserError(f"{out} holds a set already, and no {path.name} says that its steps are the best for "
                        "this: choose --out ELSEWHERE, or --overwrite")
    print(f"how many steps? a pilot of {share * budget:.3g} s for each count, {PILOT_JUDGES} short judges "
          "for each pilot, tested on a fifth of the training images")
    print("steps | s a batch | images in the budget | a class | pilot's images | accuracy, %")
    locks.refuse_link(out / ".pilots")
    store, batch = stores.PngFolder(out / ".pilots", place.classes), settings["batch"]
    processes.on_first_process(store.claim)
    draw_in(CANDIDATES[0])(distilled.block(0, batch, len(place.classes)))  # warm-up
    rows = [pilot_row(steps, draw_in(steps), judge, store, batch, share, budget) for steps in CANDIDATES]
    rows = [row for row in rows if row is not None]
    processes.on_first_process(lambda: store.remove() or files.remove_empty(store.path.parent))
    if not rows:
        raise UserError(f"the budget of {budget:g} seconds is too short for one image of each class, even in "
                        f"{CANDIDATES[0]} steps; a pilot gets {share:.0%} of it: raise it, or lower --batch")
    best = max(rows, key=lambda row: row["accuracy"])["steps"]
    print(f"-> {best} steps; this table is in {path}")
    if processes.rank() == 0:
        files.save_json(path, {"settings": settings, "share": share, "rows": rows, "steps": best,
                               "command": run.command})
    return best


def read_decision(path, settings):
    """The number of steps in a steps.json of these settings, else None.

    Raises UserError where the file is damaged.
    """
    if not path.is_file():
        return None
    form = {"settings": dict, "steps": schema.between(1, 1000)}
    table = files.load_json(path, form, "nanoDD table of pilots", ": choose --out ELSEWHERE, or move it away")
    return table["steps"] if table["settings"] == settings else None


def pilot_row(steps, draw, judge, store, batch, share, budget):
    """Draws a pilot into `store` in its share of the budget, and judges it: prints and returns a table row.

    It returns None where that time is too short for an image of each class.
    """
    processes.on_first_process(store.remove)
    record = {"classes": store.classes, "seconds": 0.0}
    try:
        images = len(distilled.fill(draw, store, record, math.inf, share * budget, batch,
                                    save=lambda record: None))
    except distilled.TooShort:
        print(f"{steps:5} | {share * budget:.3g} s are too short for an image of each class")
        return None
    accuracy = processes.on_first_process(lambda: judge()(store.path))
    row = {"steps": steps, "seconds_per_batch": record["seconds"] * batch / images,
           "images": int(images / record["seconds"] * budget), "pilot": images, "accuracy": accuracy}
    print(f"{steps:5} | {row['seconds_per_batch']:9.3f} | {row['images']:20} | "
          f"{row['images'] // len(store.classes):7} | {images:14} | {accuracy:.2f}")
    return row
