"""Draws more images than are kept, and keeps the best of each class: --oversample of sample.py.

All are drawn into out/NAME/pool, a distilled set like any other, and its seconds are those of the set. A
judge trained on all real images (nanodd/judging/features.py) says which of them are kept:

    herding   greedily those whose mean feature is close to the mean of the class's real training images
    kcenter   greedily the image farthest from all kept so far, so that every image is near a kept one
    band      those whose probability of their own class is in the middle of the pool's, neither the most
              typical nor the outliers

CaO2 (ICCV 2025), DGS (ICCVW 2025) and IMS3 (CVPR 2026) also select from a surplus, each by another rule.
"""
import math
import pathlib

import torch

from nanodd import locks, processes
from nanodd.data import datasets
from nanodd.errors import UserError
from nanodd.judging import baselines
from nanodd.sampling import distilled

RULES = "herding", "kcenter", "band"                            # --keep


def keep_in_class(features, confidence, real, ipc, rule):
    """Positions of the `ipc` images of one class that are kept, in the order in which they are chosen.

    features: (n, F), n >= ipc. confidence: (n,), the judge's probability of the class. real: (N, F).
    """
    if rule == "herding":
        return baselines.choose_herding(features, ipc, None, real.mean(dim=0)).tolist()
    if rule == "kcenter":
        return baselines.choose_kcenter(features, ipc, None).tolist()
    return confidence.argsort(stable=True)[(len(confidence) - ipc) // 2:][:ipc].tolist()


def choose(args, run, recipe, classes, images, ipc, real_judge):
    """The positions of the images that are kept: a list of `ipc` for each class.

    classes: names. images: (n, C, H, W) uint8 for each of them. recipe, real_judge: as in keep_best. Reads
    the data set's training images, and trains a judge of them or loads it from out/NAME.
    """
    data = datasets.load(args.data, args.root, recipe, args.validation, args.skip_broken)
    train, kept = datasets.for_judges(data.train, data.recipe).read().to(run.device), []
    judge = real_judge(train, data.recipe, pathlib.Path("out", data.name))
    real = judge.embed(train.images)                                        # (N, F)
    # a checkpoint may have some of the classes only
    for label, part in zip(datasets.labels_of(classes, data), images, strict=True):
        if part.shape[1] != train.images.shape[1]:
            raise UserError(f"the images in the folder pool have {part.shape[1]} channels, and those of "
                            f"{data.name} {train.images.shape[1]}: remove that folder")
        confidence = judge.classify(part.to(run.device)).softmax(dim=1)[:, label]       # (n,)
        features = judge.embed(part.to(run.device))                         # (n, F)
        kept.append(keep_in_class(features, confidence, real[train.labels == label], ipc, args.keep))
    return kept


def open_pool(args, place, fresh, ipc, budget):
    """The distilled.Place of the surplus, in the folder pool beside the set's own `place`.

    fresh: the set's record; the settings of the choice are added to it. ipc, budget: of the set, inf where
    the other one counts. Raises UserError as locks.take and Place.open.
    """
    processes.on_first_process(lambda: locks.take(place.out))   # before a pool is removed
    locks.refuse_link(place.out / "pool")
    pool, settings = distilled.Place(place.out / "pool", place.classes, args.npz), fresh["settings"]
    size = [str(ipc * args.oversample), str(budget)]            # as text, since JSON has no infinity
    pool.open({**fresh, "settings": {**settings, "pool": size}}, args.overwrite)
    fresh["settings"] = {**settings, "oversample": [args.oversample, args.keep, str(ipc), str(budget)]}
    return pool


def keep_best(args, run, recipe, pool, place, real_judge):
    """Fills `place` with the best of the set in `pool`: returns the number of images.

    recipe: the name of the checkpoint's. pool, place: distilled.Place. real_judge: train_eval.py's, called on
    the first process alone. A budget does not include the time of this function. distilled.json has the
    positions in the pool as "kept". Raises UserError where less than one image of a class is kept.
    """
    drawn = pool.record["ipc"]                                  # images a class
    ipc = drawn // args.oversample
    if ipc < 1:
        raise UserError(f"the budget holds {drawn} images a class, of which --oversample {args.oversample} "
                        "keeps none: raise --seconds, or lower --oversample")
    items = [(c, index) for c in range(len(pool.classes)) for index in range(drawn)]
    images = pool.store.images(items).split(drawn)              # (drawn, C, H, W) of each class
    if "kept" not in place.record:                              # else a stopped run has chosen already
        place.record["kept"] = processes.on_first_process(
            lambda: choose(args, run, recipe, pool.classes, images, ipc, real_judge))
    kept = place.record["kept"]
    if len(kept) != len(pool.classes) or any(len(part) < ipc or max(part) >= drawn for part in kept):
        raise UserError(f"{place.record_path} is damaged: \"kept\" does not fit the images of {pool.path}")
    number = place.fill(lambda items: torch.stack([images[c][kept[c][index]] for c, index in items]),
                        ipc, math.inf, args.batch, run.command)
    place.record.update({key: pool.record[key] for key in ("seconds", "budget")})
    place.save(place.record)
    return number
