"""Selections of real images, which a distilled set is compared with, and training sets by their names.

Sources: Welling 2009 (herding), Sener & Savarese 2018 (k-center).
"""
import functools
import math
import os

import torch

from nanodd.data import imageset
from nanodd.errors import UserError
from nanodd.judging import augment, judges

# ----------------------------------------------------------------------------------------------------
# 1. Selections: ipc images a class, out of the real ones
#
# A selector is (train, ipc, features (N, F), rng) -> ImageSet. Of image files only the chosen ones are read;
# k-means reads one class at a time.


def class_indices(images, c, ipc, name="the real set"):
    """Positions of the images of class c: (n,) int64. Raises UserError where there are fewer than ipc."""
    indices = (images.labels == c).nonzero().squeeze(1)                     # (n,)
    if len(indices) < ipc:
        raise UserError(f"{name} has {len(indices)} images of the class {images.classes[c]}, "
                        f"fewer than --ipc {ipc}")
    return indices


def per_class(choose):
    """The selector that calls choose(features (n, F) of one class, ipc, rng) -> (ipc,) positions."""
    def select(train, ipc, features, rng):
        chosen = []
        for c in range(len(train.classes)):
            indices = class_indices(train, c, ipc)                          # (n,)
            chosen.append(indices[choose(features[indices], ipc, rng).to(indices.device)])
        selected = train.pick(torch.cat(chosen)).read()
        if len(selected.labels) == ipc * len(train.classes):
            return selected
        readable = train.read()                                 # a chosen file is broken: choose again
        return select(readable, ipc, readable.labels, rng)
    return select


def choose_random(features, ipc, rng):
    """ipc of n positions at random."""
    return torch.randperm(len(features), generator=rng)[:ipc]


def choose_herding(features, ipc, rng, mean=None):
    """Greedily keeps the mean of the chosen close to `mean` (F,), without repetition: (n, F) -> (ipc,).

    After Welling 2009, in the form of Rebuffi et al. 2017 (iCaRL).
    mean: None for the mean of all n.
    """
    mean, total, chosen = features.mean(dim=0) if mean is None else mean, torch.zeros_like(features[0]), []
    for k in range(ipc):
        distance = ((total + features) / (k + 1) - mean).norm(dim=1)        # (n,)
        distance[chosen] = math.inf
        chosen.append(int(distance.argmin()))
        total = total + features[chosen[-1]]
    return torch.tensor(chosen)


def choose_kcenter(features, ipc, rng):
    """Greedily takes the point farthest from all chosen (Sener & Savarese 2018), the most central first."""
    chosen = [int((features - features.mean(dim=0)).norm(dim=1).argmin())]
    nearest = (features - features[chosen[0]]).norm(dim=1)                  # (n,)
    while len(chosen) < ipc:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)


def kmeans(train, ipc, features, rng):
    """k-means on the pixels of each class: the images are the centroids, which average real images."""
    from sklearn.cluster import KMeans                          # a slow import: only where it is needed
    images = []
    for c in range(len(train.classes)):
        members = train.pick(train.labels == c).read()
        pixels = members.images[class_indices(members, c, ipc)].flatten(1)  # (n, C H W)
        seed = int(torch.randint(2**31, (), generator=rng))
        centroids = KMeans(ipc, n_init=3, random_state=seed).fit(pixels.cpu().double().numpy())
        centroids = torch.from_numpy(centroids.cluster_centers_)            # (ipc, C H W)
        images.append(centroids.round().to(torch.uint8).view(ipc, *members.images.shape[1:]))
    labels = torch.arange(len(train.classes)).repeat_interleave(ipc)
    return imageset.ImageSet(torch.cat(images), labels, train.classes)


SELECTORS = {"random": per_class(choose_random), "herding": per_class(choose_herding),
             "kcenter": per_class(choose_kcenter), "kmeans": kmeans}


# ----------------------------------------------------------------------------------------------------
# 2. Training sets by their names


def read_distilled(path, data):
    """The ImageSet of a distilled folder or .npz, at the size of data.train. Raises as imageset.read_set."""
    recipe = data.recipe
    return imageset.read_set(path, recipe.judge_size if recipe.latents else recipe.size, recipe.colours,
                             data.train.classes, data.skip_broken)


def first_per_class(images, ipc, name="the real set"):
    """The first ipc images of each class: a smaller distilled set is the beginning of a larger one.

    Raises UserError where a class has fewer.
    """
    return images.pick(torch.cat([class_indices(images, c, ipc, name)[:ipc]
                                  for c in range(len(images.classes))]))


class Pool:
    """The source of training sets: the real training images, and distilled sets, each read once.

    device: of the training sets, and of data.train where it is an ImageSet. real_judge: (ImageSet, recipe) ->
    the features.RealJudge whose features herding and k-center compare; called where one is needed.
    """

    def __init__(self, data, device, real_judge):
        self.data, self.device, self.make_judge, self.distilled_sets = data, device, real_judge, {}

    @functools.cached_property
    def real(self):
        """All real training images, in memory: an ImageSet."""
        return self.data.train.read().to(self.device)

    @functools.cached_property
    def real_judge(self):
        """The features.RealJudge, trained on `real`."""
        return self.make_judge(self.real, self.data.recipe)

    @functools.cached_property
    def embedded(self):
        """The features of `real`: (N, F)."""
        return self.real_judge.embed(self.real.images)

    def distilled(self, path):
        """The ImageSet of a distilled folder or .npz."""
        if path not in self.distilled_sets:
            self.distilled_sets[path] = read_distilled(path, self.data)
        return self.distilled_sets[path]

    def select(self, name, ipc, rng):
        """The ImageSet that the selector `name` chooses."""
        if name in ("random", "kmeans"):                        # neither uses features
            return SELECTORS[name](self.data.train, ipc, self.data.train.labels, rng)
        return SELECTORS[name](self.real, ipc, self.embedded, rng)

    def training_set(self, source, ipc, rng):
        """The ImageSet that `source` names: a selector, "full", a distilled folder or .npz, or a sum "a+b".

        ipc: images a class; None: all that a distilled set has. rng: a generator on the CPU. Raises UserError
        where a class has too few images.
        """
        parts = []
        for name in source.split("+"):
            if name == "full":
                part = self.data.train.read()
            elif name in SELECTORS:
                part = self.select(name, ipc, rng)
            else:
                part = self.distilled(name)
                part = part if ipc is None else first_per_class(part, ipc, name)
            parts.append(part.to(self.device))
        if len(parts) == 1:
            return parts[0]
        return imageset.ImageSet(torch.cat([part.images for part in parts]),
                                 torch.cat([part.labels for part in parts]), self.data.train.classes)

    def training_sets(self, source, ipc, pda, seeds):
        """A training set for each seed, with `pda` augmented copies of each image.

        There is a single one where the source is not random: all judges of a row then train on it.
        """
        is_random, sets = any(name in ("random", "kmeans") for name in source.split("+")), []
        for seed in seeds if is_random else seeds[:1]:
            rng = torch.Generator().manual_seed(seed)
            images = self.training_set(source, ipc, rng)
            sets.append(augment.with_copies(images, pda, self.data.recipe, rng) if pda else images)
        return sets

    def row(self, source, pda, ipc, seeds, count_epochs, settings, compare=None):
        """The judges.Row of a source, which is yet to be trained; see training_set and training_sets.

        seeds: of the judges; random sets: 500 higher. count_epochs: (recipe, images, classes) -> epochs.
        settings: where stopped judges are saved (None: nowhere), bf16, compiled. compare: as in
        features.comparison, or None.
        """
        began, recipe = judges.clock(), self.data.recipe
        sets = self.training_sets(source, ipc, pda, [seed + 500 for seed in seeds])
        images, (keep, *how) = len(sets[0].labels), settings
        epochs = count_epochs(recipe, images, len(sets[0].classes))
        checkpoint = judges.checkpoint_of(keep, sets, self.data.test, source, recipe, epochs, seeds, *how)
        chosen_in = judges.clock() - began
        metrics = compare and compare([part.pick(slice(images // (1 + pda))) for part in sets])
        trains = sets if len(sets) == len(seeds) else sets * len(seeds)     # one that is not random: for all
        return judges.Row(trains, seeds, epochs, source, checkpoint, pda, chosen_in, metrics)


def plan_rows(sources, pda, ipc, pool, home, always, remedy):
    """What the rows of a table are trained on: ([(source, augmented copies)], images per class).

    sources: as typed; "distilled" becomes its path in `home`. pda: copies of each of their images. ipc: None
    is the size of the smallest class of the first distilled set, or 10. always: sources that are added,
    without copies. remedy: the advice to a user without a distilled set.
    Raises UserError, before anything is trained, where a set is missing or a class has too few images.
    """
    distilled = next((home / kind for kind in ("distilled", "distilled.npz") if (home / kind).exists()), None)
    rows = []
    for source in sources or ["distilled"]:
        parts = source.split("+")
        if "distilled" in parts and distilled is None:
            raise UserError(f"there is no {home / 'distilled'}: {remedy}")
        for k, part in enumerate(parts):
            if part in SELECTORS or part == "full":
                continue
            parts[k] = part = os.path.relpath(distilled if part == "distilled" else part)
            if not os.path.exists(part):
                raise UserError(f"there is no {part}: a SOURCE is a folder, an .npz, distilled, full or "
                                f"one of {', '.join(SELECTORS)}")
            ipc = ipc or int(pool.distilled(part).labels.bincount().min())
            first_per_class(pool.distilled(part), ipc, part)    # raises now where there are too few
        if ("+".join(parts), pda) not in rows:                  # one that is named twice is one row
            rows.append(("+".join(parts), pda))
    ipc, train = ipc or 10, pool.data.train
    if any(part in SELECTORS for source in sources for part in source.split("+")):
        first_per_class(train, ipc)
    fewest = int(train.labels.bincount().min())
    if ipc > fewest:
        print(f"a class has only {fewest} real images: no row of {ipc} real ones a class")
        always = [name for name in always if name not in SELECTORS]
    return rows + [(name, 0) for name in always if (name, 0) not in rows], ipc
