"""Trains judges on a small training set, tests them on the real images: what a distilled set is worth.

    python train_eval.py                            # four rows of judges: 4 minutes, two cores with bf16
    python train_eval.py herding kcenter --ipc 1    # other training sets, by name or folder; "a+b" is a sum
    python train_eval.py --pda 4                    # with four augmented copies of each distilled image
    python train_eval.py --data cifar100            # by the challenge's evaluator; its time is not measured
    python train_eval.py --data imagewoof --root DIR --net resnet18     # by Gu et al.'s; not measured either

A judge sees the training set alone, under one of three protocols, all with SGD 0.01, momentum 0.9, weight
decay 5e-4. "challenge", to the letter: ConvNetD3-W128 in float32 (on a GPU its convolutions are TF32, as
torch has it), 1,001 epochs, batches of 256, a tenth of the rate and a fresh optimizer after half of the
epochs, one of six families of augmentations per batch, three judges. "short", for digits and folders: the
same with fewer epochs and the recipe's families, five judges. "gu", for ImageNet's subsets: ResNetAP-10 or
another net at 224 pixels, batches of 64, a fifth of the rate after two thirds and again after five sixths,
crops, mirrors, colours and CutMix on every batch.
The number to quote is the LAST epoch's accuracy on the real test split, mean +- sample standard deviation
over n judges (a new draw for each of "random" and "kmeans"). The best of ten epochs (gu: of a hundred),
evenly spread, stands beside it because others report a best one. Below the table: what a set loses to all
real images, and gains over as many random ones (section 4).
Appends each row to out/digits/results.jsonl. A row that was stopped, even killed, goes on from its judges'
last state (out/digits/judges); rows that were done are trained again.
Sources: Zhao & Bilen 2021 (DSA), the evaluator of the first dataset distillation challenge (ECCV 2024);
Kim et al. 2022 and Gu et al. 2024 (gu), Yun et al. 2019 (CutMix), Su et al. 2024 (post data augmentation).
"""
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torchvision.transforms.functional import InterpolationMode, resize, rgb_to_grayscale
from tqdm import tqdm

import convnet
from nanodd import cli, files
from nanodd.data import datasets, imageset
from nanodd.errors import UserError, exit_on_user_error

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


def warp(x, matrix, outside="zeros"):
    """Samples x at matrix (B, 2, 2) times the centred coordinates, bilinear; outside: as grid_sample pads."""
    theta = torch.cat([matrix, torch.zeros_like(matrix[:, :, :1])], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)         # (B, H, W, 2)
    return F.grid_sample(x, grid, padding_mode=outside, align_corners=False)


def scale(x, g):
    """Stretches width and height by factors in [1/1.2, 1.2], independently."""
    low, high = 1 / 1.2, 1.2
    factors = torch.rand(len(x), 2, generator=g, device=x.device) * (high - low) + low
    return warp(x, torch.diag_embed(factors))


def turn(x, angle, outside="zeros"):
    """Turns each image by its own angle (B,), in radians."""
    c, s = angle.cos(), angle.sin()
    return warp(x, torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1), outside)


def rotate(x, g):
    """Turns by up to 15 degrees."""
    return turn(x, (torch.rand(len(x), generator=g, device=x.device) - 0.5) * 2 * math.radians(15))


FAMILIES = {"color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate}


def dsa(x, families, g, host):
    """One of `families` (names), drawn for the batch by `host`; g draws its parameters for each image.

    host: a generator on the CPU, since Python has to know what it drew, and would wait for a GPU to say it.
    On a CPU it is g itself.
    """
    choice = int(torch.randint(len(families), (), generator=host))
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


def jitter(x, g, host):
    """Moves by alpha in [-.4, .4] towards black, the image's mean grey and its greys, in random order.

    Brightness, contrast, saturation; alpha is each image's own, the order the batch's, and drawn by `host`.
    """
    alpha = torch.rand(3, len(x), 1, 1, 1, generator=g, device=x.device) * 0.8 - 0.4    # (3, B, 1, 1, 1)
    ends = (torch.zeros_like, lambda x: rgb_to_grayscale(x).mean(dim=(1, 2, 3), keepdim=True),
            rgb_to_grayscale)
    for k in torch.randperm(3, generator=host).tolist():
        x = x.lerp(ends[k](x), alpha[k])
    return x


@functools.cache
def constant(numbers, device):
    """A tensor of `numbers` (a tuple or a tensor), copied to the device once: every copy makes a GPU wait."""
    return torch.as_tensor(numbers, device=device)


# ImageNet's principal colours, columns, times their eigenvalues (Krizhevsky et al. 2012)
PRINCIPAL = torch.tensor([[-0.5675, 0.7192, 0.4009],
                          [-0.5808, -0.0045, -0.8140],
                          [-0.5836, -0.6948, 0.4203]]) * torch.tensor([0.2175, 0.0188, 0.0045])


def lighting(x, g):
    """Adds one colour to the whole image: N(0, .1^2) of each principal one. One channel stays as it is."""
    if x.shape[1] != 3:
        return x
    alpha = 0.1 * torch.randn(len(x), 1, 3, generator=g, device=x.device)
    return x + (constant(PRINCIPAL, x.device) * alpha).sum(dim=2)[:, :, None, None]     # (B, 3, 1, 1)


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


# Last that of Su et al., post data augmentation, which is done once to a set that was drawn.


def post_augment(images, recipe, g):
    """An augmented copy of each image (Su et al. 2024): (N, C, H, W) uint8 -> uint8. g: on the CPU.

    Mirrored with chance .8; contrast and brightness changed by up to .2, with .5; turned by up to 60 degrees,
    with .8; taken to a power in [.8, 1.2], with .5 (albumentations' defaults). Where recipe.flip is false
    nothing is mirrored, and turned by 15 degrees at most: a 6 that is turned far is a 9. Su et al. also flip
    .8 of the images upside down, which is left out: no test image stands on its head. The corners that
    turning uncovers are filled by reflection, as theirs are: black ones would be a mark of the copies alone.
    """
    u = torch.rand(8, len(images), 1, 1, 1, generator=g).to(images.device)  # (8, N, 1, 1, 1)
    x = images.float() / 255
    if recipe.flip:
        x = torch.where(u[0] < 0.8, x.flip(3), x)
    brighter = (x * (0.8 + 0.4 * u[2]) + 0.4 * u[3] - 0.2).clamp(0, 1)
    x = torch.where(u[1] < 0.5, brighter, x)
    limit = math.radians(60 if recipe.flip else 15)
    x = turn(x, ((u[4] < 0.8) * limit * (2 * u[5] - 1)).flatten(), "reflection")
    x = torch.where(u[6] < 0.5, x ** (0.8 + 0.4 * u[7]), x)
    return (255 * x).round().to(torch.uint8)


def with_copies(train, copies, recipe, g):
    """An ImageSet, then `copies` augmented copies of each of its images in the same order, labels kept."""
    parts = [post_augment(part, recipe, g) for _ in range(copies) for part in train.images.split(1024)]
    return imageset.ImageSet(torch.cat([train.images, *parts]), train.labels.repeat(1 + copies),
                             train.classes)


# ----------------------------------------------------------------------------------------------------
# 2. The judge's training


def at_size(images, size):
    """uint8 (N, C, H, W) -> uint8 (N, C, size, size), bicubic."""
    if images.shape[-1] == size:
        return images
    return torch.cat([resize(part, size, InterpolationMode.BICUBIC) for part in images.split(1024)])


def standardise(x, recipe):
    """(B, C, H, W) in [0, 1] -> (x - mean) / std."""
    mean, std = (constant(v, x.device).view(1, -1, 1, 1) for v in (recipe.mean, recipe.std))
    return (x - mean) / std


def normalise(images, recipe):
    """uint8 (N, C, H, W) -> float (N, C, judge_size, judge_size), (pixel / 255 - mean) / std."""
    return standardise(at_size(images, recipe.judge_size).float() / 255, recipe)


def challenge_epochs(recipe, images, classes):
    """The challenge's loop over range(1000 + 1)."""
    return 1001


def challenge_rate(epoch, epochs):
    """A tenth after half: of the challenge's 1,001 epochs those with index 0 to 501 have the full rate."""
    return 0.01 if epoch < epochs // 2 + 2 else 0.01 * 0.1


def challenge_augment(images, labels, recipe, g, host):
    """One of all six families."""
    return dsa(normalise(images, recipe), list(FAMILIES), g, host), [(labels, 1)]


def short_epochs(recipe, images, classes):
    """The recipe's, fewer where the judge would then see more than recipe.views images."""
    return max(1, min(recipe.epochs, recipe.views // images))


def short_augment(images, labels, recipe, g, host):
    """One of the recipe's families (of all, where it names none)."""
    families = recipe.augment.split("_") if recipe.augment else list(FAMILIES)
    return dsa(normalise(images, recipe), families, g, host), [(labels, 1)]


def gu_epochs(recipe, images, classes):
    """By images a class; with 100 classes two thirds of that, in hundreds (Gu et al. 2024, Table 6)."""
    table = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500), (math.inf, 300))
    epochs = next(epochs for most, epochs in table if images // classes <= most)
    return 2 * epochs // 300 * 100 if classes == 100 else epochs


def gu_rate(epoch, epochs):
    """A fifth after two thirds, a fifth of that after five sixths."""
    return 0.01 * 0.2 ** ((epoch >= 2 * epochs // 3) + (epoch >= 5 * epochs // 6))


def gu_augment(images, labels, recipe, g, host):
    """Crops, mirrors, colours, then CutMix: both labels of each mixed image, by their shares of its area."""
    x = images.float() / 255                                                # (B, C, S, S)
    x = enlarge(x, *random_boxes(len(x), x.shape[-1], g))
    x = flip(x, g) if recipe.flip else x
    x = standardise(lighting(jitter(x, g, host), g), recipe)
    x, partner, own = cutmix(x, g)
    return x, [(labels, own), (labels[partner], 1 - own)]


class Protocol(NamedTuple):
    """How judges are trained and compared; the optimizer is SGD, momentum 0.9, weight decay 5e-4, in all."""
    batch: int
    looks: int                 # at how many epochs their accuracy is looked at
    runs: int                  # judges per row, unless --runs says otherwise
    bf16: bool                 # whether bfloat16 is the default where it is faster
    epochs: Callable           # (recipe, images, classes) -> epochs
    rate: Callable             # (epoch, epochs) -> learning rate
    fresh: bool                # whether the optimizer forgets its momentum where the rate falls
    augment: Callable          # (images (B, C, S, S) uint8, labels (B,), recipe, g, host) -> (x, targets)
    beside: tuple              # the rows of real images that are always there


# "challenge" is exact: of the recipe it takes the network, the size and the normalisation alone. Under gu a
# judge of all of an ImageNet subset would train for hours, and a mean of photographs is a blur.
PROTOCOLS = {
    "challenge": Protocol(256, 10, 3, False, challenge_epochs, challenge_rate, True, challenge_augment,
                          ("random", "kmeans", "full")),
    "short": Protocol(256, 10, 5, True, short_epochs, challenge_rate, True, short_augment,
                      ("random", "kmeans", "full")),
    "gu": Protocol(64, 100, 3, True, gu_epochs, gu_rate, False, gu_augment, ("random",)),
}


def mixed_loss(logits, targets):
    """Cross entropy of logits (B, K) with each of `targets`, [(labels (B,), share of the loss)]."""
    return sum(share * F.cross_entropy(logits, labels) for labels, share in targets)


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


class Pupil(NamedTuple):
    """A judge while it learns: its network, its training set, its seed, and its generators (see dsa)."""
    judge: torch.nn.Module
    train: imageset.ImageSet
    seed: int
    g: torch.Generator
    host: torch.Generator


def new_pupil(train, recipe, seed):
    """An untrained recipe.net for `train`, an ImageSet of the judge's size, and the seed's random numbers."""
    device = train.images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = convnet.judge(recipe.net, recipe.judge_size, recipe.colours, len(train.classes)).to(device)
    g = torch.Generator(device).manual_seed(seed)
    return Pupil(judge, train, seed, g, g if device.type == "cpu" else torch.Generator().manual_seed(seed))


class Desk:
    """Where judges in training are kept, so that a stopped row goes on. folder: None keeps nothing.

    A file for each group that trains in lockstep; `clear` once all of the row's judges are done.
    """

    def __init__(self, folder=None):
        self.folder, self.began, self.earlier = folder, time.monotonic(), 0.0

    def file(self, pupils):
        return self.folder / ("-".join(str(pupil.seed) for pupil in pupils) + ".pt")

    def holds(self, pupils):
        """Whether these were trained here as one group."""
        return self.folder is not None and self.file(pupils).is_file()

    def seconds(self):
        """Since this row began, what it took before it was stopped included."""
        return self.earlier + time.monotonic() - self.began

    def put(self, pupils, epoch, optimizer, accuracies):
        """Keeps all that the epochs after number `epoch` depend on."""
        files.save_state(self.file(pupils), {
            "epoch": epoch, "accuracies": accuracies, "optimizer": optimizer.state_dict(),
            "judges": [pupil.judge.state_dict() for pupil in pupils],
            "chance": [(pupil.g.get_state(), pupil.host.get_state()) for pupil in pupils],
            "seconds": self.seconds()})

    def take(self, pupils, optimizer_of):
        """Brings the pupils, in place, to where they were: (epochs done, optimizer, accuracies of each).

        (0, None, empty lists) where nothing was kept. optimizer_of: rate -> optimizer of their weights.
        """
        if not self.holds(pupils):
            return 0, None, [[] for _ in pupils]
        state = torch.load(self.file(pupils), map_location="cpu", weights_only=True)
        for pupil, tensors, (g, host) in zip(pupils, state["judges"], state["chance"], strict=True):
            pupil.judge.load_state_dict(tensors)                # in place: a stack's judges stay its views
            pupil.g.set_state(g)
            pupil.host.set_state(host)
        optimizer = optimizer_of(0.0)                           # the state brings the rate
        optimizer.load_state_dict(state["optimizer"])
        self.earlier = max(self.earlier, state["seconds"])      # groups may work at once
        return state["epoch"] + 1, optimizer, state["accuracies"]

    def clear(self):
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def teach(pupils, test, recipe, epochs, looks, bf16, compiled, stop=None, desk=None):
    """Trains the pupils in lockstep, as one network: the sum of their losses leaves their gradients apart.

    Each gets the batches and augmentations that it would get alone. Returns, for each, its percent on `test`
    after each of `looks` epochs. stop: a threading.Event; once it is set, training ends and is worth nothing.
    desk: a Desk, from which it goes on. Raises UserError where a loss is not finite.
    """
    device, protocol = test.images.device, PROTOCOLS[recipe.protocol]
    weights, network = convnet.as_one([pupil.judge for pupil in pupils])
    network = torch.compile(network) if compiled else network
    tested = {round((i + 1) * epochs / looks) - 1 for i in range(looks)} | {epochs - 1}
    desk, saved = desk or Desk(), time.monotonic()

    def optimizer_of(rate):
        return torch.optim.SGD(weights, lr=rate, momentum=0.9, weight_decay=5e-4)
    start, optimizer, accuracies = desk.take(pupils, optimizer_of)

    def predict(network, x):
        # not around the augmentation, whose coordinates would become bfloat16
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return network(x).float()
    for epoch in tqdm(range(start, epochs), initial=start, total=epochs, disable=None, leave=False):
        rate = protocol.rate(epoch, epochs)
        if optimizer is None or protocol.fresh and rate != optimizer.param_groups[0]["lr"]:
            optimizer = optimizer_of(rate)
        optimizer.param_groups[0]["lr"] = rate
        for pupil in pupils:
            pupil.judge.train()
        orders = [torch.randperm(len(pupil.train.labels), generator=pupil.g, device=device)
                  for pupil in pupils]
        for parts in zip(*(order.split(protocol.batch) for order in orders), strict=True):
            if stop and stop.is_set():
                return accuracies
            batches = [protocol.augment(train.images[index], train.labels[index], recipe, g, host)
                       for (_, train, _, g, host), index in zip(pupils, parts, strict=True)]
            logits = predict(network, [x for x, _ in batches])  # n of (B, C, S, S) -> (n, B, K)
            loss = sum(mixed_loss(own, targets)
                       for own, (_, targets) in zip(logits, batches, strict=True))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if epoch in tested:
            if not loss.isfinite():
                raise UserError(f"a judge's loss is not finite in epoch {epoch + 1}: another --net, or "
                                "--no-bf16, may help")
            for pupil, curve in zip(pupils, accuracies, strict=True):
                judge = pupil.judge.eval()
                curve.append(accuracy(functools.partial(predict, judge), test.images, test.labels, recipe))
        if desk.folder and (epoch == epochs - 1 or time.monotonic() - saved > files.SAVE_EVERY):
            desk.put(pupils, epoch, optimizer, accuracies)
            saved = time.monotonic()
    return accuracies


def in_threads(work, jobs):
    """[work(job, stop) for each of the jobs], several at a time, which share the CPU's threads evenly.

    stop: a threading.Event, set by the first error and by Ctrl-C, which work looks at in every step.
    """
    threads, stop = torch.get_num_threads(), threading.Event()
    workers = max(n for n in range(1, min(threads, len(jobs)) + 1) if threads % n == 0)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads,
                                initargs=(threads // workers,)) as pool:
            futures = [pool.submit(work, job, stop) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()                             # the first error, as soon as it is made
            finally:
                stop.set()
        return [future.result() for future in futures]
    finally:
        torch.set_num_threads(threads)                          # a part of it is for the whole process


@functools.cache
def stacking_pays(net, size, channels, classes, n, device, bf16):
    """Whether n judges learn faster there as one network (convnet.as_one) than one by one.

    Timed by ten passes, forward and back, of 256 black images of `size` pixels, without optimizer,
    augmentation and compilation.
    """
    wait = getattr(torch, device.type).synchronize

    def seconds(count):
        with torch.random.fork_rng(devices=[]):                 # nobody else's numbers change
            judges = [convnet.judge(net, size, channels, classes).to(device) for _ in range(count)]
        weights, network = convnet.as_one(judges)
        batches = [torch.zeros(256, channels, size, size, device=device)] * count
        for step in range(13):
            if step == 3:                                       # warm
                wait()
                began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = network(batches)
            torch.autograd.grad(logits.sum(), weights)
        wait()
        return time.perf_counter() - began
    return seconds(n) < n * seconds(1)


def train_judges(trains, test, recipe, epochs, seeds, looks=None, bf16=False, compiled=False, name="",
                 desk=None):
    """Fresh judges recipe.net, one for each seed, trained on its set of `trains` and tested on `test`.

    trains: ImageSets, `test` too, all on one device. Returns [(judge, accuracies)]: percent on `test`, at
    `looks` epochs evenly spread (default: the protocol's); the last is the last epoch's. The same seed gives
    the same weights, batches and augmentations whoever trains beside; on a CPU also the same bits, if as many
    threads work for it. name: what a pipe, which sees no progress bar, is told of as judges are done.
    desk: a Desk of this training alone; its files are named by the seeds, which must differ. Raises UserError
    where a loss is not finite.

    On a CPU they train at once, a thread each: a small batch keeps two cores less busy than two batches do.
    On a GPU those of small pictures, between whose calls it waits, train in lockstep, if all sets are of one
    size and a trial says that it is faster; others one by one.
    """
    device, size = test.images.device, recipe.judge_size
    # Held as uint8: as floats, 9,025 images of 224 pixels would be 5 GB. What judges share is held once.
    sized = {id(part): part._replace(images=at_size(part.images, size)) for part in (*trains, test)}
    pupils = [new_pupil(sized[id(train)], recipe, seed) for train, seed in zip(trains, seeds, strict=True)]

    def work(group, stop=None):
        curves = teach(group, sized[id(test)], recipe, epochs, looks or PROTOCOLS[recipe.protocol].looks,
                       bf16, compiled, stop, desk)
        if name and not sys.stderr.isatty() and not (stop and stop.is_set()):
            for curve in curves:
                print(f"{name} | a judge of {len(trains)} | {curve[-1]:.2f} %", file=sys.stderr, flush=True)
        return curves
    equal = len({len(train.labels) for train in trains}) == 1
    stackable = recipe.net in convnet.JUDGES and size <= 64 and equal and len(pupils) > 1

    def together():
        if desk and (desk.holds(pupils) or desk.holds(pupils[:1])):         # as before the stop
            return desk.holds(pupils)
        return stacking_pays(recipe.net, size, recipe.colours, len(test.classes), len(pupils), device, bf16)
    if device.type != "cpu" and stackable and together():
        curves = work(pupils)
    elif device.type != "cpu" or len(pupils) == 1:
        curves = [work([pupil])[0] for pupil in pupils]
    else:
        curves = [curves[0] for curves in in_threads(work, [[pupil] for pupil in pupils])]
    return [(pupil.judge, curve) for pupil, curve in zip(pupils, curves, strict=True)]


def train_judge(train, test, recipe, epochs, seed, **how):
    """One judge alone: (judge, accuracies), as train_judges has them."""
    return train_judges([train], test, recipe, epochs, [seed], **how)[0]


def compiles(recipe, classes, device):
    """Whether torch.compile works here, tried as judges of that recipe train; says why where it does not."""
    n = 1 if device.type == "cpu" or recipe.net not in convnet.JUDGES else 2
    _, network = convnet.as_one([convnet.judge(recipe.net, recipe.judge_size, recipe.colours, classes)
                                 .to(device) for _ in range(n)])
    batch = torch.zeros(2, recipe.colours, recipe.judge_size, recipe.judge_size, device=device)
    try:
        torch.compile(network)([batch] * n).sum().backward()
    except RuntimeError as error:                               # no compiler, an unsupported Python, ...
        why = (str(error) or type(error).__name__).splitlines()[0]
        print(f"--compile does nothing here, as torch.compile fails: {why}")
        return False
    return True


# ----------------------------------------------------------------------------------------------------
# 3. Training sets to compare with: ipc images a class, out of the real ones
#
# Each is (train, ipc, features (N, ...), generator, skip_broken) -> ImageSet. Of files only those that were
# chosen are read; k-means reads a class at a time.


def members(whole, c, ipc, name="the real set"):
    """Positions of the images of class c, (n,). Raises UserError where there are fewer than ipc."""
    mine = (whole.labels == c).nonzero().squeeze(1)                         # (n,)
    if len(mine) < ipc:
        raise UserError(f"{name} has {len(mine)} images of the class {whole.classes[c]}, fewer than --ipc "
                        f"{ipc}")
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
    return imageset.ImageSet(torch.cat(images), labels, train.classes)


SELECTORS = {"random": by_class(choose_random), "herding": by_class(choose_herding),
             "kcenter": by_class(choose_kcenter), "kmeans": kmeans}


def read_distilled(path, data, skip_broken=False):
    """A distilled folder or .npz, in the size of data.train."""
    recipe = data.recipe
    return imageset.read_set(path, recipe.judge_size if recipe.latents else recipe.size, recipe.colours,
                    data.train.classes, skip_broken)


def first_of_each(whole, ipc, name="the real set"):
    """The first ipc images of each class: a smaller distilled set is the beginning of a larger one.

    Raises UserError where a class has fewer.
    """
    return whole.pick(torch.cat([members(whole, c, ipc, name)[:ipc] for c in range(len(whole.classes))]))


def training_set(source, data, ipc, features, g, skip_broken=False, found=None):
    """The ImageSet that `source` names: a selector, "full", a distilled folder or .npz, or a sum "a+b".

    ipc: images a class, None for all that a folder holds. found: {folder: ImageSet}, those read already.
    Raises UserError where there are fewer.
    """
    parts = []
    for name in source.split("+"):
        if name == "full":
            parts.append(data.train.read(skip_broken))
        elif name in SELECTORS:
            train, measured = features(name)
            parts.append(SELECTORS[name](train, ipc, measured, g, skip_broken))
        else:
            whole = (found or {}).get(name) or read_distilled(name, data, skip_broken)
            parts.append(whole if ipc is None else first_of_each(whole, ipc, name))
    parts = [part.to(data.test.images.device) for part in parts]
    if len(parts) == 1:
        return parts[0]
    return imageset.ImageSet(torch.cat([part.images for part in parts]),
                             torch.cat([part.labels for part in parts]),
                    data.train.classes)


def desk_of(keep, trains, test, *how):
    """A Desk in the folder `keep`, which only a row of the same images, trained in the same way, finds again.

    And on the same kind of device: another kind has other random numbers.
    """
    if keep is None:
        return Desk()
    facts = [imageset.fingerprint(part) for part in (*trains, test)], test.images.device.type, how
    return Desk(keep / hashlib.sha256(repr(facts).encode()).hexdigest()[:16])


def evaluate(source, data, *, ipc, runs, seed, epochs=None, bf16=False, features=None, skip_broken=False,
             pda=0, compiled=False, found=None, keep=None):
    """Trains `runs` judges on `source` and tests them on data.test: one row of results.jsonl, as a dict.

    data: Data; test, an ImageSet, is on the device, and train there too where it is one.
    features: what judge_features(data, ...) returns, so that several rows share its judge. found: see
    training_set. pda: augmented copies of each image. keep: a folder for judges in training, from which a
    stopped row goes on. Run number r takes the seed 1000 seed + r.
    """
    began, recipe, trains = time.monotonic(), data.recipe, []
    features = features or judge_features(data, seed, bf16, skip_broken)
    redrawn = any(part in ("random", "kmeans") for part in source.split("+"))
    for run in range(runs if redrawn else 1):                   # a folder is read once, random draws anew
        g = torch.Generator().manual_seed(1000 * seed + 500 + run)          # not the judge's stream
        plain = training_set(source, data, ipc, features, g, skip_broken, found)
        trains.append(with_copies(plain, pda, recipe, g) if pda else plain)
    images, classes = len(trains[0].labels), len(plain.classes)
    count, seeds = epochs or count_epochs(recipe, images, classes), [1000 * seed + run for run in range(runs)]
    desk = desk_of(keep, trains, data.test, recipe, count, seeds, bf16)
    judged = train_judges(trains if redrawn else trains * runs, data.test, recipe, count, seeds, bf16=bf16,
                          compiled=compiled, name=source, desk=desk)
    desk.clear()
    last = [round(curve[-1], 4) for _, curve in judged]
    return {"data": data.name, "cut": data.cut, "train": source,
            "ipc": len(plain.labels) // classes, "pda": pda, "images": images, "recipe": recipe.name,
            "protocol": recipe.protocol, "judge": convnet.title(recipe.net), "size": recipe.judge_size,
            "epochs": count, "runs": runs,
            "accuracy": last, "mean": round(statistics.mean(last), 4),
            "std": round(statistics.stdev(last), 4) if runs > 1 else None,
            "best": round(statistics.mean(round(max(curve), 4) for _, curve in judged), 4),
            "seconds": round(time.monotonic() - began + desk.earlier, 1),
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
# 4. Scores: what rows say together


def hlr_ior(own, full, random):
    """Hard label recovery and improvement over random, fractions, of three mean accuracies in percent.

        HLR = acc(all real images) - acc(the set)          lower is better
        IOR = acc(the set) - acc(as many real ones, drawn at random)

    Both are DD-Ranking's (Li et al. 2025), whose formulas want fractions; its code 0.2.0 gives them percent.
    Copies (--pda) count as part of the set: the random images have none.
    """
    return round((full - own) / 100, 6), round((own - random) / 100, 6)


def score_rows(rows):
    """HLR and IOR of each of the rows, if among them are a full one and a random one of its size.

    Returns rows for results.jsonl too, which "kind": "scores" tells from the judges'.
    """
    plain = {row["train"]: row for row in rows if not row["pda"]}
    full, random = plain.get("full"), plain.get("random")
    scores = []
    for row in rows if full and random else []:
        if row not in (full, random) and row["ipc"] == random["ipc"]:
            hlr, ior = hlr_ior(row["mean"], full["mean"], random["mean"])
            kept = {key: row[key] for key in ("data", "cut", "train", "ipc", "protocol")}
            scores.append({"kind": "scores", **kept, "hlr": hlr, "ior": ior})
    return scores


CHALLENGE = {"cifar100": 32, "tiny-imagenet": 64}               # the challenge's data sets and their sizes


def challenge_score(rows):
    """The challenge's score, percent: the mean over its data sets of a distilled set's accuracy.

    rows: of results.jsonl, of which a data set's last exact one counts: its own recipe and judges, three or
    more, after all 1,001 epochs in float32, on the test split. None as long as a data set has no such row.
    """
    means = {}
    for row in rows:
        exact = (row.get("size") == CHALLENGE.get(row["data"], 0) and row["judge"] == "ConvNetD3-W128"
                 and row["protocol"] == "challenge" and row["epochs"] == 1001 and row["runs"] >= 3
                 and row.get("recipe") == row["data"] and "bf16" not in row["device"])
        if exact and not {*SELECTORS, "full"} & set(row["train"].split("+")):
            means[row["data"]] = row["mean"]
    return statistics.mean(means.values()) if len(means) == len(CHALLENGE) else None


def read_rows(path):
    """The rows of a results.jsonl, none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ----------------------------------------------------------------------------------------------------
# 5. The driver


def table_line(row):
    spread = f"+- {row['std']:.2f}" if row["std"] is not None else "       "
    return (f"{row['train']:28} | {row['ipc']:5} | {row['images']:7} | "
            f"{row['mean']:6.2f} {spread:7} ({row['runs']}) | "
            f"{row['best']:6.2f} | {row['epochs']:6} | {row['seconds']:6.1f}")


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.add_argument("sources", nargs="*", metavar="SOURCE",
                        help="distilled, random, herding, kcenter, kmeans, full, a folder, an .npz, or a sum "
                             "a+b (default: distilled); random, kmeans and full are always there, under "
                             "gu only random: the full set of an ImageNet subset trains for hours")
    cli.add_flags(parser, "data root recipe validation out seed device skip-broken bf16 compile")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS),
                        help="how judges are trained (default: the recipe's)")
    parser.add_argument("--net", metavar="NAME",
                        help=f"the judge: {', '.join(convnet.JUDGES)} or timm:NAME (default: the recipe's)")
    parser.add_argument("--size", type=int, metavar="PX", help="the judge's input (default: the recipe's)")
    parser.add_argument("--ipc", type=int,
                        help="images per class (default: as many as the first folder holds, or 10)")
    parser.add_argument("--pda", type=int, default=0, metavar="K",
                        help="add K augmented copies of each image of the SOURCEs (default: %(default)s)")
    parser.add_argument("--runs", type=int,
                        help="judges per row (default: the protocol's, "
                             + ", ".join(f"{name} {protocol.runs}" for name, protocol in PROTOCOLS.items())
                             + ")")
    parser.add_argument("--epochs", type=int,
                        help="of each row's judges (default: by protocol, recipe and the set's size)")
    args = parser.parse_args(argv)
    with exit_on_user_error(parser,
                            again="the rows that are done are in results.jsonl; the same command trains "
                                    "them again, and goes on with the one that was stopped"):
        run(args, cli.command_line_of(__file__, argv))


def plan_rows(args, data, home):
    """(rows: (source, augmented copies), images per class, {folder: ImageSet} that were read).

    "distilled" is replaced by its place, and the real rows are added. Refuses before anything is trained: a
    set that is not there, or one with a class of too few images.
    """
    made = next((home / kind for kind in ("distilled", "distilled.npz") if (home / kind).exists()), None)
    rows, ipc, found = [], args.ipc, {}
    for source in args.sources or ["distilled"]:
        parts = source.split("+")
        if "distilled" in parts and made is None:
            raise UserError(f"there is no {home / 'distilled'}: "
                            f"python sample.py --steps 10{cli.data_flags(args)} makes it")
        for k, part in enumerate(parts):
            if part not in SELECTORS and part != "full":
                parts[k] = part = os.path.relpath(made if part == "distilled" else part)
                if not os.path.exists(part):
                    raise UserError(f"there is no {part}: a SOURCE is a folder, an .npz, distilled, full or "
                                    f"one of {', '.join(SELECTORS)}")
                found[part] = found.get(part) or read_distilled(part, data, args.skip_broken)
                ipc = ipc or int(found[part].labels.bincount().min())
                first_of_each(found[part], ipc, part)
        rows.append(("+".join(parts), args.pda))
    ipc = ipc or 10
    if any(part in SELECTORS for source in args.sources for part in source.split("+")):
        first_of_each(data.train, ipc)
    beside, fewest = PROTOCOLS[data.recipe.protocol].beside, int(data.train.labels.bincount().min())
    if ipc > fewest:
        print(f"a class has only {fewest} real images: no row of {ipc} real ones a class")
        beside = [name for name in beside if name not in SELECTORS]
    return rows + [(name, 0) for name in beside if (name, 0) not in rows], ipc, found


def run(args, typed):
    """Everything after the command line was read."""
    for flag, value, least in (("--ipc", args.ipc, 1), ("--runs", args.runs, 1), ("--epochs", args.epochs, 1),
                               ("--size", args.size, 1), ("--pda", args.pda, 0)):
        if value is not None and value < least:
            raise UserError(f"{flag} must be at least {least}, not {value}")
    device = cli.device_named(args.device)
    data = datasets.load(args.data, args.root, args.recipe, args.validation, args.skip_broken)
    given = {"protocol": args.protocol, "net": args.net, "judge_size": args.size}
    recipe = replace(data.recipe, **{name: value for name, value in given.items() if value})
    protocol, classes = PROTOCOLS[recipe.protocol], len(data.train.classes)
    if recipe.protocol == "gu" and classes > 100:
        raise UserError("the protocol gu is for up to 100 classes: ImageNet-1K was judged by another (RDED), "
                        "which is not here")
    convnet.judge(recipe.net, recipe.judge_size, recipe.colours, classes)  # or refuses now
    train, test = data.train, data.test
    if recipe.latents:                                          # pictures are read at the judge's size
        train, test = (part._replace(size=recipe.judge_size) for part in (train, test))
    data = data._replace(recipe=recipe, train=train.to(device), test=test)
    bf16 = protocol.bf16 and cli.gains_from_bf16(device) if args.bf16 is None else args.bf16
    home = args.out or pathlib.Path("out", data.name)
    planned, ipc, found = plan_rows(args, data, home)
    data = data._replace(test=test.read(args.skip_broken).to(device))
    home.mkdir(parents=True, exist_ok=True)
    runs, log = args.runs or protocol.runs, home / "results.jsonl"
    print(f"{data.name} | {data.cut} | protocol {recipe.protocol} | judge {convnet.title(recipe.net)} at "
          f"{recipe.judge_size} px | device {device}{' bf16' if bf16 else ''} | {runs} runs | "
          f"seed {args.seed}")
    compiled = args.compile and compiles(recipe, classes, device)
    print(f"{'trained on':28} |   ipc |  images | accuracy, % (runs)  |   best | epochs | seconds")
    features, rows = judge_features(data, args.seed, bf16, args.skip_broken), []

    def keep(row):
        with open(log, "a") as file:
            file.write(json.dumps({**row, "command": typed}) + "\n")
    for source, copies in tqdm(planned, disable=None, leave=False):
        rows.append(evaluate(source, data, ipc=ipc, runs=runs, seed=args.seed, epochs=args.epochs, bf16=bf16,
                             features=features, skip_broken=args.skip_broken, pda=copies, compiled=compiled,
                             found=found, keep=home / "judges"))
        keep(rows[-1])
        tqdm.write(table_line(rows[-1]))
    print("accuracy: last epoch, mean +- sample standard deviation (runs); best: of up to "
          f"{protocol.looks} epochs, evenly spread | added to {log}")
    for row in score_rows(rows):
        keep(row)
        print(f"{row['train']} | HLR {row['hlr']:.3f} | IOR {row['ior']:.3f}")
    if data.name in CHALLENGE and recipe.protocol == "challenge":
        *before, after = str(log).rpartition(data.name)         # out/cifar100/X and out/tiny-imagenet/X
        twins = [pathlib.Path(before[0] + name + after) for name in CHALLENGE] if before[1] else []
        score = challenge_score([row for twin in twins for row in read_rows(twin)])
        if score is not None:
            print(f"challenge score, mean over {' and '.join(CHALLENGE)}: {score:.1f}")


if __name__ == "__main__":
    main()
