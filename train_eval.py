"""Trains a judge on a small training set, tests it on the real images: what a distilled set is worth.

    python train_eval.py                            # four rows of judges: under 4 minutes on two CPU cores
    python train_eval.py herding kcenter --ipc 1    # other training sets, by name or folder; "a+b" is a sum
    python train_eval.py --data imagewoof --root DIR --net resnet18     # Gu et al.'s protocol and judges

The judge sees the training set alone, under one of two protocols, both with SGD 0.01, momentum 0.9, weight
decay 5e-4. "challenge": ConvNetD3-W128, batches of 256, a tenth of the rate and a fresh optimizer after half
of the epochs, one random family of augmentations per batch. "gu", for ImageNet's subsets: ResNetAP-10 or
another net at 224 pixels, batches of 64, a fifth of the rate after two thirds and again after five sixths,
crops, mirrors, colours and CutMix on every batch; its time is not measured. The number to quote is the LAST
epoch's accuracy on the real test split, mean +- sample standard deviation over n runs (a new judge each, and
a new draw for "random" and "kmeans"). The best of ten epochs (gu: of a hundred), evenly spread, stands beside
it because others report a best one.
Prints a table; appends each row to out/digits/results.jsonl.
Sources: Zhao & Bilen 2021 (DSA), the evaluator of the first dataset distillation challenge (ECCV 2024);
Kim et al. 2022 and Gu et al. 2024 (gu), Yun et al. 2019 (CutMix).
"""
import functools
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torchvision.transforms.functional import InterpolationMode, resize, rgb_to_grayscale
from tqdm import tqdm

import convnet
from data import (ImageFiles, ImageSet, UserError, add_flags, command, device_named, gains_from_bf16, load,
                  new_parser, one_sentence, read_set, same_data)

# ----------------------------------------------------------------------------------------------------
# 1. Augmentation: whole batches, new numbers per image
#
# The challenge's first, differentiable siamese augmentation (DSA): x (B, C, H, W) is normalised, so the zeros
# that fill are the mean colour (digits: the background).


def color(x, g):
    """Brightness, then saturation (nothing on one channel), then contrast: DSA's strengths 1, 2 and 0.5."""
    u = torch.rand(3, len(x), 1, 1, 1, generator=g, device=x.device)        # (3, B, 1, 1, 1)
    x = x + (u[0] - 0.5)
    grey = x.mean(dim=1, keepdim=True)                                      # (B, 1, H, W)
    x = (x - grey) * (2 * u[1]) + grey
    mean = x.mean(dim=(1, 2, 3), keepdim=True)                              # (B, 1, 1, 1)
    return (x - mean) * (u[2] + 0.5) + mean


def crop(x, g):
    """Shifts by up to an eighth of the size in both directions, zeros following."""
    B, C, H, W = x.shape
    s = int(H * 0.125 + 0.5)
    dy, dx = torch.randint(0, 2 * s + 1, (2, B, 1), generator=g, device=x.device)
    image, channel = torch.arange(B, device=x.device), torch.arange(C, device=x.device)
    rows = torch.arange(H, device=x.device) + dy                            # (B, H)
    columns = torch.arange(W, device=x.device) + dx                         # (B, W)
    padded = F.pad(x, (s, s, s, s))                                         # (B, C, H + 2s, W + 2s)
    return padded[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None],
                  columns[:, None, None, :]]                                # (B, C, H, W)


def cutout(x, g):
    """Zeroes a box half the size wide whose centre is anywhere in the image, so part may lie outside."""
    B, _, H, W = x.shape
    side = int(H * 0.5 + 0.5)
    half, even = side // 2, 1 - side % 2
    cy, cx = torch.randint(0, H + even, (2, B, 1), generator=g, device=x.device)
    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    in_rows = (rows >= cy - half) & (rows < cy + half + 1 - even)           # (B, H)
    in_columns = (columns >= cx - half) & (columns < cx + half + 1 - even)  # (B, W)
    return x * ~(in_rows[:, None, :, None] & in_columns[:, None, None, :])


def flip(x, g):
    """Mirrors half of the images."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=g, device=x.device) < 0.5
    return torch.where(mirrored, x.flip(3), x)


def warp(x, matrix):
    """Samples x at matrix (B, 2, 2) times the centred coordinates, bilinear, zeros outside."""
    theta = torch.cat([matrix, torch.zeros_like(matrix[:, :, :1])], dim=2)  # (B, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def scale(x, g):
    """Stretches width and height by factors in [1/1.2, 1.2], independently."""
    low, high = 1 / 1.2, 1.2
    factors = torch.rand(len(x), 2, generator=g, device=x.device) * (high - low) + low
    return warp(x, torch.diag_embed(factors))


def rotate(x, g):
    """Turns by up to 15 degrees."""
    angle = (torch.rand(len(x), generator=g, device=x.device) - 0.5) * 2 * math.radians(15)
    c, s = angle.cos(), angle.sin()
    return warp(x, torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1))


FAMILIES = {"color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate}


def dsa(x, families, g):
    """One of `families` (names), drawn for the batch; its parameters are drawn for each image."""
    choice = int(torch.randint(len(families), (), generator=g, device=x.device))
    return FAMILIES[families[choice]](x, g)


# Then that of Gu et al.: x (B, C, S, S) is square and in [0, 1], before it is normalised.


def random_boxes(B, S, g):
    """Half to all of the area, ratio 3/4 to 4/3, log-uniform: the first of ten tries that fits, or the whole.

    In pixels: corners (2, B), tops and lefts, and sides (2, B), heights and widths. Those of torchvision's
    RandomResizedCrop.
    """
    u = torch.rand(2, 10, B, generator=g, device=g.device)
    area, ratio = S * S * (0.5 + 0.5 * u[0]), (4 / 3) ** (2 * u[1] - 1)     # (10, B)
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()]).round()
    sides = F.pad(sides, (0, 0, 0, 1), value=S)                             # (2, 11, B), the whole at the end
    fits = (sides <= S).all(dim=0).int().argmax(dim=0)                      # (B,): the first that does
    sides = sides.gather(1, fits.expand(2, 1, B)).squeeze(1)                # (2, B)
    return (torch.rand(2, B, generator=g, device=g.device) * (S - sides + 1)).floor(), sides


def enlarge(x, corners, sides):
    """The box of each image, bilinear, at the size of the whole; nothing outside of the box enters."""
    S = x.shape[-1]
    along = (torch.arange(S, device=x.device) + 0.5) * (sides / S)[:, :, None] - 0.5    # (2, B, S)
    along = corners[:, :, None] + along.clamp(min=0).minimum(sides[:, :, None] - 1)     # in pixels
    rows, columns = (2 * along + 1) / S - 1                                 # in grid_sample's units
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=3)
    return F.grid_sample(x, grid, align_corners=False)                      # grid: (B, S, S, 2)


def jitter(x, g):
    """Moves by alpha in [-.4, .4] towards black, the image's mean grey and its greys, in random order.

    Brightness, contrast, saturation; alpha is each image's own, the order the batch's.
    """
    alpha = torch.rand(3, len(x), 1, 1, 1, generator=g, device=x.device) * 0.8 - 0.4    # (3, B, 1, 1, 1)
    ends = (torch.zeros_like, lambda x: rgb_to_grayscale(x).mean(dim=(1, 2, 3), keepdim=True),
            rgb_to_grayscale)
    for k in torch.randperm(3, generator=g, device=x.device).tolist():
        x = x.lerp(ends[k](x), alpha[k])
    return x


# ImageNet's principal colours, columns, times their eigenvalues (Krizhevsky et al. 2012)
PRINCIPAL = torch.tensor([[-0.5675, 0.7192, 0.4009],
                          [-0.5808, -0.0045, -0.8140],
                          [-0.5836, -0.6948, 0.4203]]) * torch.tensor([0.2175, 0.0188, 0.0045])


def lighting(x, g):
    """Adds one colour to the whole image: N(0, .1^2) of each principal one. One channel stays as it is."""
    if x.shape[1] != 3:
        return x
    alpha = 0.1 * torch.randn(len(x), 1, 3, generator=g, device=x.device)
    return x + (PRINCIPAL.to(x.device) * alpha).sum(dim=2)[:, :, None, None]            # (B, 3, 1, 1)


def cutmix(x, g):
    """Pastes one box, the same for the batch, out of another image (Yun et al. 2019).

    Its area is a share 1 - lam of the image's, lam ~ U(0, 1), less what falls outside.
    Returns (mixed x, partner (B,): whose box it is, own: the share of the area that is the image's own).
    """
    B, _, H, W = x.shape
    partner, u = torch.randperm(B, generator=g, device=x.device), torch.rand(3, generator=g, device=x.device)
    cut = (1 - u[0]).sqrt()
    half_h, half_w = (H * cut).long() // 2, (W * cut).long() // 2
    cy, cx = (H * u[1]).long(), (W * u[2]).long()
    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    in_rows = (rows >= cy - half_h) & (rows < cy + half_h)                  # (H,)
    in_columns = (columns >= cx - half_w) & (columns < cx + half_w)         # (W,)
    box = in_rows[:, None] & in_columns                                     # (H, W)
    return torch.where(box, x[partner], x), partner, 1 - box.float().mean()


# ----------------------------------------------------------------------------------------------------
# 2. The judge's training


def at_size(images, size):
    """uint8 (N, C, H, W) -> uint8 (N, C, size, size), bicubic."""
    if images.shape[-1] == size:
        return images
    return torch.cat([resize(part, size, InterpolationMode.BICUBIC) for part in images.split(1024)])


def standardise(x, recipe):
    """(B, C, H, W) in [0, 1] -> (x - mean) / std."""
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (recipe.mean, recipe.std))
    return (x - mean) / std


def normalise(images, recipe):
    """uint8 (N, C, H, W) -> float (N, C, judge_size, judge_size), (pixel / 255 - mean) / std."""
    return standardise(at_size(images, recipe.judge_size).float() / 255, recipe)


def challenge_epochs(recipe, images, classes):
    """The recipe's, fewer where the judge would then see more than recipe.views images."""
    return max(1, min(recipe.epochs, recipe.views // images))


def challenge_rate(epoch, epochs):
    """A tenth after half; the challenge's own half, after the epoch with index E // 2 + 1."""
    return 0.01 if epoch < epochs // 2 + 2 else 0.01 * 0.1


def challenge_loss(judge, images, labels, recipe, g):
    """Cross entropy after one of the recipe's families (of all, where it names none)."""
    families = recipe.augment.split("_") if recipe.augment else list(FAMILIES)
    return F.cross_entropy(judge(dsa(normalise(images, recipe), families, g)), labels)


def gu_epochs(recipe, images, classes):
    """By images a class; with 100 classes two thirds of that, in hundreds (Gu et al. 2024, Table 6)."""
    table = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500), (math.inf, 300))
    epochs = next(epochs for most, epochs in table if images // classes <= most)
    return 2 * epochs // 300 * 100 if classes == 100 else epochs


def gu_rate(epoch, epochs):
    """A fifth after two thirds, a fifth of that after five sixths."""
    return 0.01 * 0.2 ** ((epoch >= 2 * epochs // 3) + (epoch >= 5 * epochs // 6))


def gu_loss(judge, images, labels, recipe, g):
    """Cross entropy with both labels of each mixed image, by their shares of its area."""
    x = images.float() / 255                                                # (B, C, S, S)
    x = enlarge(x, *random_boxes(len(x), x.shape[-1], g))
    x = flip(x, g) if recipe.flip else x
    x = standardise(lighting(jitter(x, g), g), recipe)
    x, partner, own = cutmix(x, g)
    logits = judge(x)                                                       # (B, K)
    return own * F.cross_entropy(logits, labels) + (1 - own) * F.cross_entropy(logits, labels[partner])


class Protocol(NamedTuple):
    """How a judge is trained and compared; the optimizer is SGD, momentum 0.9, weight decay 5e-4, in all."""
    batch: int
    looks: int                 # at how many epochs its accuracy is looked at
    epochs: Callable           # (recipe, images, classes) -> epochs
    rate: Callable             # (epoch, epochs) -> learning rate
    fresh: bool                # whether the optimizer forgets its momentum where the rate falls
    loss: Callable             # (judge, images (B, C, S, S) uint8, labels (B,), recipe, g) -> ()
    beside: tuple              # the rows of real images that are always there


# Under gu a judge of all of an ImageNet subset would train for hours, and a mean of photographs is a blur.
PROTOCOLS = {
    "challenge": Protocol(256, 10, challenge_epochs, challenge_rate, True, challenge_loss,
                          ("random", "kmeans", "full")),
    "gu": Protocol(64, 100, gu_epochs, gu_rate, False, gu_loss, ("random",)),
}


def count_epochs(recipe, images, classes):
    """The judge's epochs on so many images."""
    return PROTOCOLS[recipe.protocol].epochs(recipe, images, classes)


def in_parts(function, images, recipe):
    """function, without gradients, of normalised images a few at a time: (N, C, H, W) uint8 -> (N, ...)."""
    with torch.no_grad():
        parts = images.split(2 * PROTOCOLS[recipe.protocol].batch)
        return torch.cat([function(normalise(part, recipe)) for part in parts])


def accuracy(predict, images, labels, recipe):
    """Percent of the images (N, C, H, W) uint8 named right. predict: normalised (B, C, S, S) -> (B, K)."""
    return 100 * int((in_parts(predict, images, recipe).argmax(1) == labels).sum()) / len(labels)


def train_judge(train, test, recipe, epochs, seed, looks=None, bf16=False):
    """A fresh recipe.net trained on `train`, tested on `test` (ImageSets on one device).

    Returns (judge, accuracies): percent on `test`, at `looks` epochs evenly spread (default: the protocol's);
    the last is the last epoch's. The same seed gives the same weights, batches and augmentations. Raises
    UserError where the loss is not finite.
    """
    device, protocol = train.images.device, PROTOCOLS[recipe.protocol]
    g = torch.Generator(device).manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = convnet.judge(recipe.net, recipe.judge_size, recipe.colours, len(train.classes)).to(device)
    # Held as uint8: as floats, 9,025 images of 224 pixels would be 5 GB.
    images, held = at_size(train.images, recipe.judge_size), at_size(test.images, recipe.judge_size)
    looks = looks or protocol.looks
    tested = {round((i + 1) * epochs / looks) - 1 for i in range(looks)} | {epochs - 1}
    optimizer, accuracies = None, []

    def predict(x):                                             # not around the augmentation: its coordinates
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):     # would become bfloat16
            return judge(x).float()
    for epoch in tqdm(range(epochs), disable=None, leave=False):
        rate = protocol.rate(epoch, epochs)
        if optimizer is None or protocol.fresh and rate != optimizer.param_groups[0]["lr"]:
            optimizer = torch.optim.SGD(judge.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
        optimizer.param_groups[0]["lr"] = rate
        judge.train()
        order = torch.randperm(len(images), generator=g, device=device)
        for index in order.split(protocol.batch):
            loss = protocol.loss(predict, images[index], train.labels[index], recipe, g)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if epoch in tested:
            if not loss.isfinite():
                raise UserError(f"the judge's loss is not finite in epoch {epoch + 1}: another --net, or "
                                "--no-bf16, may help")
            judge.eval()
            accuracies.append(accuracy(predict, held, test.labels, recipe))
    return judge, accuracies


# ----------------------------------------------------------------------------------------------------
# 3. Training sets to compare with: ipc images a class, out of the real ones
#
# Each is (train, ipc, features (N, ...), generator, skip_broken) -> ImageSet. Of files only those that were
# chosen are read; k-means reads a class at a time.


def members(train, c, ipc):
    """Positions of the images of class c, (n,). Raises UserError where there are fewer than ipc."""
    mine = (train.labels == c).nonzero().squeeze(1)                         # (n,)
    if len(mine) < ipc:
        raise UserError(f"the class {train.classes[c]} has {len(mine)} real images, fewer than --ipc {ipc}")
    return mine


def by_class(choose):
    """Makes a selector of a whole set from choose(features (n, F), ipc, g) -> (ipc,) positions in a class."""
    def select(train, ipc, features, g, skip_broken=False):
        index = []
        for c in range(len(train.classes)):
            mine = members(train, c, ipc)                                   # (n,)
            index.append(mine[choose(features[mine], ipc, g).to(mine.device)])
        chosen = train.pick(torch.cat(index)).read(skip_broken)
        if len(chosen.labels) == ipc * len(train.classes):
            return chosen
        whole = train.read(skip_broken)                         # one that was chosen is broken: choose anew
        return select(whole, ipc, whole.labels, g)
    return select


def choose_random(features, ipc, g):
    """ipc of n at random."""
    return torch.randperm(len(features), generator=g)[:ipc]


def choose_herding(features, ipc, g):
    """Greedily keeps the mean of the chosen close to the mean of all (Welling 2009): (n, F) -> (ipc,)."""
    mean, total, chosen = features.mean(dim=0), torch.zeros_like(features[0]), []
    for k in range(ipc):
        distance = ((total + features) / (k + 1) - mean).norm(dim=1)        # (n,)
        distance[chosen] = math.inf
        chosen.append(int(distance.argmin()))
        total = total + features[chosen[-1]]
    return torch.tensor(chosen)


def choose_kcenter(features, ipc, g):
    """Greedily takes the point farthest from all chosen (Sener & Savarese 2018), the most central first."""
    chosen = [int((features - features.mean(dim=0)).norm(dim=1).argmin())]
    nearest = (features - features[chosen[0]]).norm(dim=1)                  # (n,)
    while len(chosen) < ipc:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)


def kmeans(train, ipc, features, g, skip_broken=False):
    """Class-wise k-means on the pixels: the centroids themselves, averages of real images."""
    images = []
    for c in range(len(train.classes)):
        mine = train.pick(train.labels == c).read(skip_broken)
        pixels = mine.images[members(mine, c, ipc)].flatten(1).cpu().double().numpy()
        seed = int(torch.randint(2**31, (), generator=g))
        centers = KMeans(ipc, n_init=3, random_state=seed).fit(pixels).cluster_centers_
        images.append(torch.from_numpy(centers).round().to(torch.uint8).view(ipc, *mine.images.shape[1:]))
    labels = torch.arange(len(train.classes)).repeat_interleave(ipc)
    return ImageSet(torch.cat(images), labels, train.classes)


SELECTORS = {"random": by_class(choose_random), "herding": by_class(choose_herding),
             "kcenter": by_class(choose_kcenter), "kmeans": kmeans}


def read_distilled(path, data, skip_broken=False):
    """A distilled folder or .npz, in the size of data.train."""
    recipe = data.recipe
    return read_set(path, recipe.judge_size if recipe.latents else recipe.size, recipe.colours,
                    data.train.classes, skip_broken)


def training_set(source, data, ipc, features, g, skip_broken=False):
    """The ImageSet that `source` names: a selector, "full", a distilled folder or .npz, or a sum "a+b".

    ipc: images a class, None for all that a folder holds. Raises UserError where there are fewer.
    """
    parts = []
    for name in source.split("+"):
        if name == "full":
            parts.append(data.train.read(skip_broken))
        elif name in SELECTORS:
            train, measured = features(name)
            parts.append(SELECTORS[name](train, ipc, measured, g, skip_broken))
        else:
            found = read_distilled(name, data, skip_broken)
            parts.append(found if ipc is None else first_of_each(found, ipc, name))
    parts = [part.to(data.test.images.device) for part in parts]
    if len(parts) == 1:
        return parts[0]
    return ImageSet(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]),
                    data.train.classes)


def first_of_each(whole, ipc, name):
    """The first ipc images of each class: a smaller distilled set is the beginning of a larger one."""
    index = [(whole.labels == c).nonzero().squeeze(1)[:ipc] for c in range(len(whole.classes))]
    if min(map(len, index)) < ipc:
        raise UserError(f"{name} has {min(map(len, index))} images of a class, fewer than --ipc {ipc}")
    return whole.pick(torch.cat(index))


def evaluate(source, data, *, ipc, runs, seed, epochs=None, bf16=False, features=None, skip_broken=False):
    """Trains `runs` judges on `source` and tests them on data.test: one row of results.jsonl, as a dict.

    data: Data; test, an ImageSet, is on the device, and train there too where it is one.
    features: what judge_features(data, ...) returns, so that several rows share its judge. Run number r takes
    the seed 1000 seed + r.
    """
    began, recipe, last, best = time.monotonic(), data.recipe, [], []
    features = features or judge_features(data, seed, bf16, skip_broken)
    redrawn = any(part in ("random", "kmeans") for part in source.split("+"))
    for run in range(runs):
        if run == 0 or redrawn:                                 # a folder is read once, random draws anew
            g = torch.Generator().manual_seed(1000 * seed + 500 + run)      # not the judge's stream
            train = training_set(source, data, ipc, features, g, skip_broken)
        count = epochs or count_epochs(recipe, len(train.labels), len(train.classes))
        _, curve = train_judge(train, data.test, recipe, count, 1000 * seed + run, bf16=bf16)
        last.append(round(curve[-1], 4))
        best.append(round(max(curve), 4))
        if not sys.stderr.isatty():
            print(f"{source} | judge {run + 1} of {runs} | {last[-1]:.2f} %", file=sys.stderr, flush=True)
    return {"data": data.name, "cut": data.cut, "train": source,
            "ipc": len(train.labels) // len(train.classes), "images": len(train.labels),
            "protocol": recipe.protocol, "judge": convnet.title(recipe.net), "size": recipe.judge_size,
            "epochs": count, "runs": runs,
            "accuracy": last, "mean": round(statistics.mean(last), 4),
            "std": round(statistics.stdev(last), 4) if runs > 1 else None,
            "best": round(statistics.mean(best), 4), "seconds": round(time.monotonic() - began, 1),
            "device": str(data.test.images.device) + (" bf16" if bf16 else ""), "seed": seed}


def judge_features(data, seed, bf16, skip_broken=False):
    """Selector's name -> (real images to choose from, (N, F) to measure in).

    For herding and k-center the features of a judge trained on the full real set, which is read and trained
    when they first ask; the other selectors look at none, and get the labels.
    """
    @functools.lru_cache(maxsize=1)
    def trained():
        whole = data.train.read(skip_broken).to(data.test.images.device)
        epochs = count_epochs(data.recipe, len(whole.labels), len(whole.classes))
        judge, _ = train_judge(whole, data.test, data.recipe, epochs, seed, looks=1, bf16=bf16)
        return whole, in_parts(judge.embed, whole.images, data.recipe)      # (N, F)
    return lambda name: trained() if name in ("herding", "kcenter") else (data.train, data.train.labels)


# ----------------------------------------------------------------------------------------------------
# 4. The driver


def table_line(row):
    spread = f"+- {row['std']:.2f}" if row["std"] is not None else "       "
    return (f"{row['train']:28} | {row['ipc']:5} | {row['images']:7} | "
            f"{row['mean']:6.2f} {spread:7} ({row['runs']}) | "
            f"{row['best']:6.2f} | {row['epochs']:6} | {row['seconds']:6.1f}")


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("sources", nargs="*", metavar="SOURCE",
                        help="distilled, random, herding, kcenter, kmeans, full, a folder, an .npz, or a sum "
                             "a+b (default: distilled); random, kmeans and full are always there, under "
                             "gu only random: the full set of an ImageNet subset trains for hours")
    add_flags(parser, "data root recipe validation out seed device skip-broken bf16")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS),
                        help="how judges are trained (default: the recipe's)")
    parser.add_argument("--net", metavar="NAME",
                        help=f"the judge: {', '.join(convnet.JUDGES)} or timm:NAME (default: the recipe's)")
    parser.add_argument("--size", type=int, metavar="PX", help="the judge's input (default: the recipe's)")
    parser.add_argument("--ipc", type=int,
                        help="images per class (default: as many as the first folder holds, or 10)")
    parser.add_argument("--runs", type=int, default=5, help="judges per row (default: %(default)s)")
    parser.add_argument("--epochs", type=int,
                        help="of each row's judges (default: by the recipe and the set's size)")
    args = parser.parse_args(argv)
    with one_sentence(parser, again="its rows are in results.jsonl: name the others"):
        run(args, command(__file__, argv))


def plan_rows(args, data, home):
    """(sources, images per class): "distilled" replaced by its place, the real rows added.

    Refuses before anything is trained: a set that is not there, or more real images a class than there are.
    """
    made = next((home / kind for kind in ("distilled", "distilled.npz") if (home / kind).exists()), None)
    asked = args.sources or ["distilled"]
    sources, ipc = [], args.ipc
    for source in asked:
        parts = source.split("+")
        if "distilled" in parts and made is None:
            raise UserError(f"there is no {home / 'distilled'}: "
                            f"python sample.py --steps 10{same_data(args)} makes it")
        for k, part in enumerate(parts):
            if part not in SELECTORS and part != "full":
                parts[k] = part = os.path.relpath(made if part == "distilled" else part)
                if not os.path.exists(part):
                    raise UserError(f"there is no {part}: a SOURCE is a folder, an .npz, distilled, full or "
                                    f"one of {', '.join(SELECTORS)}")
                found = read_distilled(part, data, args.skip_broken)
                held = int(found.labels.bincount().min())
                ipc = ipc or held
                if held < ipc:
                    raise UserError(f"{part} has a class of {held} images, fewer than --ipc {ipc}")
        sources.append("+".join(parts))
    sources += [name for name in PROTOCOLS[data.recipe.protocol].beside if name not in sources]
    ipc = ipc or 10
    fewest = int(data.train.labels.bincount().min())
    if ipc > fewest:
        if any(part in SELECTORS for source in args.sources for part in source.split("+")):
            raise UserError(f"a class has only {fewest} real images, fewer than --ipc {ipc}")
        print(f"a class has only {fewest} real images: no row of {ipc} real ones a class")
        sources = [source for source in sources if source not in SELECTORS]
    return sources, ipc


def run(args, typed):
    """Everything after the command line was read."""
    for flag, value in (("--ipc", args.ipc), ("--runs", args.runs), ("--epochs", args.epochs),
                        ("--size", args.size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}")
    device = device_named(args.device)
    data = load(args.data, args.root, args.recipe, args.validation, args.skip_broken)
    given = {"protocol": args.protocol, "net": args.net, "judge_size": args.size}
    recipe = replace(data.recipe, **{name: value for name, value in given.items() if value})
    if recipe.protocol == "gu" and len(data.train.classes) > 100:
        raise UserError("the protocol gu is for up to 100 classes: ImageNet-1K was judged by another (RDED), "
                        "which is not here")
    convnet.judge(recipe.net, recipe.judge_size, recipe.colours, len(data.train.classes))  # or refuses now
    train, test = data.train, data.test
    if isinstance(train, ImageFiles):                           # pictures are read at the judge's size
        train, test = (part._replace(size=recipe.judge_size) for part in (train, test))
    data = data._replace(recipe=recipe, train=train.to(device), test=test)
    bf16 = gains_from_bf16(device) if args.bf16 is None else args.bf16
    home = args.out or pathlib.Path("out", data.name)
    sources, ipc = plan_rows(args, data, home)
    data = data._replace(test=test.read(args.skip_broken).to(device))
    home.mkdir(parents=True, exist_ok=True)
    print(f"{data.name} | {data.cut} | protocol {recipe.protocol} | judge {convnet.title(recipe.net)} at "
          f"{recipe.judge_size} px | device {device}{' bf16' if bf16 else ''} | {args.runs} runs | "
          f"seed {args.seed}")
    print(f"{'trained on':28} |   ipc |  images | accuracy, % (runs)  |   best | epochs | seconds")
    features = judge_features(data, args.seed, bf16, args.skip_broken)
    for source in tqdm(sources, disable=None, leave=False):
        row = evaluate(source, data, ipc=ipc, runs=args.runs, seed=args.seed, epochs=args.epochs, bf16=bf16,
                       features=features, skip_broken=args.skip_broken)
        with open(home / "results.jsonl", "a") as file:
            file.write(json.dumps({**row, "command": typed}) + "\n")
        tqdm.write(table_line(row))
    print("accuracy: last epoch, mean +- sample standard deviation (runs); best: of up to "
          f"{PROTOCOLS[recipe.protocol].looks} epochs, evenly spread | added to {home / 'results.jsonl'}")


if __name__ == "__main__":
    main()
