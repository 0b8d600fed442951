"""Trains a judge on a small training set, tests it on the real images: what a distilled set is worth.

    python train_eval.py                            # four rows of judges: under 5 minutes on two CPU cores
    python train_eval.py herding kcenter --ipc 1    # other training sets, by name or folder; "a+b" is a sum

The judge (ConvNetD3-W128) sees the training set alone: SGD 0.01, momentum 0.9, weight decay 5e-4, a tenth of
the rate and a fresh optimizer after half of the epochs, one random family of augmentations per batch. The
number to quote is the LAST epoch's accuracy on the real test split, mean +- sample standard deviation over
n runs (a new judge each, and a new draw for "random" and "kmeans"). The best of ten epochs, evenly spread,
stands beside it because others report a best one.
Prints a table; appends each row to out/digits/results.jsonl.
Sources: Zhao & Bilen 2021 (DSA), the evaluator of the first dataset distillation challenge (ECCV 2024).
"""
import argparse
import functools
import json
import math
import os
import pathlib
import statistics
import time

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torchvision.transforms.functional import InterpolationMode, resize
from tqdm import tqdm

from convnet import ConvNet
from data import (ImageSet, UserError, add_flags, command, device_named, load, new_parser, one_sentence,
                  read_set, same_data)

# ----------------------------------------------------------------------------------------------------
# 1. Differentiable siamese augmentation (DSA), as the challenge uses it: whole batches, new numbers per image
#
# x (B, C, H, W) is normalised, so the zeros that fill are the mean colour (digits: the background).


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


# ----------------------------------------------------------------------------------------------------
# 2. The judge's training


def normalise(images, recipe):
    """uint8 (N, C, H, W) -> float (N, C, judge_size, judge_size), (pixel / 255 - mean) / std."""
    if images.shape[-1] != recipe.judge_size:
        images = resize(images, recipe.judge_size, InterpolationMode.BICUBIC)
    mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (recipe.mean, recipe.std))
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def accuracy(judge, x, labels):
    """Percent of x (N, C, H, W), normalised, that the judge names right."""
    parts = zip(x.split(512), labels.split(512), strict=True)
    right = sum(int((judge(part).argmax(1) == y).sum()) for part, y in parts)
    return 100 * right / len(labels)


def train_judge(train, test, recipe, epochs, seed, batch=256, lr=0.01, curve=10, bf16=False):
    """A fresh ConvNetD3-W128 trained on `train`, tested on `test` (ImageSets on one device).

    Returns (judge, accuracies): percent on `test`, at `curve` epochs evenly spread; the last is the last
    epoch's. The same seed gives the same weights, batches and augmentations.
    """
    device = train.images.device
    g = torch.Generator(device).manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = ConvNet(recipe.judge_size, recipe.channels, len(train.classes)).to(device)
    x, x_test = normalise(train.images, recipe), normalise(test.images, recipe)
    families = recipe.augment.split("_")
    looks = {round((i + 1) * epochs / curve) - 1 for i in range(curve)} | {epochs - 1}
    accuracies = []
    for epoch in range(epochs):
        if epoch in (0, epochs // 2 + 2):                       # the challenge: after epoch index E // 2 + 1
            rate = lr if epoch == 0 else lr * 0.1
            optimizer = torch.optim.SGD(judge.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
        order = torch.randperm(len(x), generator=g, device=device)
        for index in order.split(batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(judge(dsa(x[index], families, g)), train.labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if epoch in looks:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                accuracies.append(accuracy(judge, x_test, test.labels))
    return judge, accuracies


# ----------------------------------------------------------------------------------------------------
# 3. Training sets to compare with: ipc images a class, out of the real ones
#
# Each is (train, ipc, features, generator) -> ImageSet; features are those of a judge trained on all of it.


def members(train, c, ipc):
    """Positions of the images of class c, (n,). Raises UserError where there are fewer than ipc."""
    mine = (train.labels == c).nonzero().squeeze(1)                         # (n,)
    if len(mine) < ipc:
        raise UserError(f"the class {train.classes[c]} has {len(mine)} real images, fewer than --ipc {ipc}")
    return mine


def by_class(choose):
    """Makes a selector of a whole set from choose(features (n, F), ipc, g) -> (ipc,) positions in a class."""
    def select(train, ipc, features, g):
        index = []
        for c in range(len(train.classes)):
            mine = members(train, c, ipc)                                   # (n,)
            index.append(mine[choose(features[mine], ipc, g).to(mine.device)])
        return train.pick(torch.cat(index))
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


def kmeans(train, ipc, features, g):
    """Class-wise k-means on the pixels: the centroids themselves, averages of real images."""
    images, shape = [], train.images.shape[1:]
    for c in range(len(train.classes)):
        mine = train.images[members(train, c, ipc)].flatten(1).cpu().double().numpy()
        seed = int(torch.randint(2**31, (), generator=g))
        centers = KMeans(ipc, n_init=3, random_state=seed).fit(mine).cluster_centers_
        images.append(torch.from_numpy(centers).round().to(torch.uint8).view(ipc, *shape))
    labels = torch.arange(len(train.classes)).repeat_interleave(ipc)
    return ImageSet(torch.cat(images), labels, train.classes)


SELECTORS = {"random": by_class(choose_random), "herding": by_class(choose_herding),
             "kcenter": by_class(choose_kcenter), "kmeans": kmeans}


def training_set(source, data, ipc, features, g):
    """The ImageSet that `source` names: a selector, "full", a distilled folder or .npz, or a sum "a+b".

    ipc: images a class, None for all that a folder holds. Raises UserError where there are fewer.
    """
    parts = []
    for name in source.split("+"):
        if name == "full":
            parts.append(data.train)
        elif name in SELECTORS:
            parts.append(SELECTORS[name](data.train, ipc, features(name), g))
        else:
            found = read_set(name, data.recipe.size, data.recipe.channels, data.train.classes)
            parts.append(found if ipc is None else first_of_each(found, ipc, name))
    return ImageSet(torch.cat([part.images.to(data.train.images.device) for part in parts]),
                    torch.cat([part.labels.to(data.train.labels.device) for part in parts]),
                    data.train.classes)


def first_of_each(whole, ipc, name):
    """The first ipc images of each class: a smaller distilled set is the beginning of a larger one."""
    index = [(whole.labels == c).nonzero().squeeze(1)[:ipc] for c in range(len(whole.classes))]
    if min(map(len, index)) < ipc:
        raise UserError(f"{name} has {min(map(len, index))} images of a class, fewer than --ipc {ipc}")
    return whole.pick(torch.cat(index))


def count_epochs(recipe, images):
    """The judge's epochs on so many images: the recipe's, fewer where that is more than recipe.views."""
    return max(1, min(recipe.epochs, recipe.views // images))


def evaluate(source, data, *, ipc, runs, seed, epochs=None, bf16=False, features=None):
    """Trains `runs` judges on `source` and tests them on data.test: one row of results.jsonl, as a dict.

    data: Data, on the device. features: selector's name -> (N, F), what herding and k-center measure in.
    """
    began, last, best = time.monotonic(), [], []
    features = features or judge_features(data, seed, bf16)
    redrawn = any(part in SELECTORS for part in source.split("+"))
    for run in range(runs):
        if run == 0 or redrawn:                                 # a folder is read once, random draws anew
            g = torch.Generator().manual_seed(seed + run)
            train = training_set(source, data, ipc, features, g)
        count = epochs or count_epochs(data.recipe, len(train.labels))
        _, curve = train_judge(train, data.test, data.recipe, count, seed + run, bf16=bf16)
        last.append(round(curve[-1], 4))
        best.append(round(max(curve), 4))
    return {"data": data.name, "train": source, "ipc": len(train.labels) // len(train.classes),
            "images": len(train.labels), "judge": "ConvNetD3-W128", "epochs": count, "runs": runs,
            "accuracy": last, "mean": round(statistics.mean(last), 4),
            "std": round(statistics.stdev(last), 4) if runs > 1 else None,
            "best": round(statistics.mean(best), 4), "seconds": round(time.monotonic() - began, 1),
            "device": str(data.test.images.device) + (" bf16" if bf16 else ""), "seed": seed}


def judge_features(data, seed, bf16):
    """Selector's name -> (N, F): for herding and k-center those of a judge trained on the full real set.

    It is trained when they first ask; the other selectors look at none, and get the pixels.
    """
    @functools.lru_cache(maxsize=1)
    def trained():
        epochs = count_epochs(data.recipe, len(data.train.labels))
        judge, _ = train_judge(data.train, data.test, data.recipe, epochs, seed, curve=1, bf16=bf16)
        with torch.no_grad():
            x = normalise(data.train.images, data.recipe)
            return torch.cat([judge.embed(part) for part in x.split(512)])  # (N, F)
    return lambda name: trained() if name in ("herding", "kcenter") else data.train.images.flatten(1)


# ----------------------------------------------------------------------------------------------------
# 4. The driver


def gains_from_bf16(device):
    """Whether bfloat16 is faster there: on GPUs, and on CPUs that multiply it natively."""
    if device.type != "cpu":
        return device.type == "cuda"
    has = getattr(torch.cpu, "get_capabilities", dict)()        # an older torch does not tell
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def table_line(row):
    spread = f"+- {row['std']:.2f}" if row["std"] is not None else "       "
    return (f"{row['train']:28} | {row['ipc']:5} | {row['images']:7} | "
            f"{row['mean']:6.2f} {spread:7} ({row['runs']}) | "
            f"{row['best']:6.2f} | {row['epochs']:6} | {row['seconds']:6.1f}")


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("sources", nargs="*", metavar="SOURCE",
                        help="distilled, random, herding, kcenter, kmeans, full, a folder, an .npz, or a sum "
                             "a+b; random, kmeans and full are always there (default: distilled)")
    add_flags(parser, "data root recipe validation out seed device")
    parser.add_argument("--ipc", type=int,
                        help="images per class (default: as many as the first folder holds, or 10)")
    parser.add_argument("--runs", type=int, default=5, help="judges per row (default: %(default)s)")
    parser.add_argument("--epochs", type=int,
                        help="of each row's judges (default: by the recipe and the set's size)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                        help="bfloat16 arithmetic (default: where it is faster)")
    args = parser.parse_args(argv)
    with one_sentence(parser):
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
                found = read_set(part, data.recipe.size, data.recipe.channels, data.train.classes)
                held = int(found.labels.bincount().min())
                ipc = ipc or held
                if held < ipc:
                    raise UserError(f"{part} has a class of {held} images, fewer than --ipc {ipc}")
        sources.append("+".join(parts))
    sources += [name for name in ("random", "kmeans", "full") if name not in sources]
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
    for flag, value in (("--ipc", args.ipc), ("--runs", args.runs), ("--epochs", args.epochs)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}")
    data, device = load(args.data, args.root, args.recipe, args.validation), device_named(args.device)
    data = data._replace(train=data.train.to(device), test=data.test.to(device))
    bf16 = gains_from_bf16(device) if args.bf16 is None else args.bf16
    home = args.out or pathlib.Path("out", data.name)
    sources, ipc = plan_rows(args, data, home)
    home.mkdir(parents=True, exist_ok=True)
    print(f"{data.name} | judge ConvNetD3-W128 at {data.recipe.judge_size} px | device {device}"
          f"{' bf16' if bf16 else ''} | {args.runs} runs | seed {args.seed} | "
          f"tested on {len(data.test.labels)} real images")
    print(f"{'trained on':28} |   ipc |  images | accuracy, % (runs)  |   best | epochs | seconds")
    features = judge_features(data, args.seed, bf16)
    for source in tqdm(sources, disable=None, leave=False):
        row = evaluate(source, data, ipc=ipc, runs=args.runs, seed=args.seed, epochs=args.epochs, bf16=bf16,
                       features=features)
        with open(home / "results.jsonl", "a") as file:
            file.write(json.dumps({**row, "command": typed}) + "\n")
        tqdm.write(table_line(row))
    print("accuracy: last epoch, mean +- sample standard deviation (runs); best: of ten epochs | "
          f"added to {home / 'results.jsonl'}")


if __name__ == "__main__":
    main()
