"""Trains judges on a small training set and tests them on real images: what a distilled set is worth.

    accuracy = 100/N sum_i [argmax_k judge(x_i)_k = y_i]            over the N real test images (x_i, y_i)

A judge is a classifier that is trained from scratch on the small set alone.

    python train_eval.py                            # four rows of judges: 2.6 minutes, two cores with bf16
    python train_eval.py herding kcenter --ipc 1    # other training sets, by name or folder; "a+b" joins two
    python train_eval.py --metrics                  # and how precise and how varied each set is
    python train_eval.py --pda 4                    # with four augmented copies of each distilled image
    python train_eval.py --data cifar100            # by the challenge's evaluator; its time is not measured
    python train_eval.py --data imagewoof --root DIR --net resnet18     # Gu et al.'s protocol; not measured

All judges train with SGD at rate 0.01, momentum 0.9, weight decay 5e-4, under one of three protocols:
"challenge" repeats the challenge's evaluator: ConvNetD3-W128 in float32 (TF32 convolutions on a GPU), 1,001
epochs, batches of 256, from epoch index 502 on a tenth of the rate and a new optimizer, one of six
augmentations for each batch. "short", for digits and folders, has the same optimizer and rate, but the
recipe's epochs and augmentations, in bfloat16 where it is faster. "gu", for ImageNet's subsets: ResNetAP-10
or another at 224 pixels, batches of 64, CutMix, a fifth of the rate after 2/3 of the epochs, again after 5/6.
The number to quote is the LAST epoch's accuracy on the real test split, mean +- sample standard deviation
over n judges (in the rows random and kmeans each has its own selection). The best of ten epochs (gu: of a
hundred), chosen on the test images, stands beside it because others report that. Below the table: HLR and
IOR (nanodd/judging/results.py). Rows are appended to out/digits/results.jsonl; a stopped one resumes.
Sources: Zhao & Bilen 2021 (DSA), the evaluator of the first dataset distillation challenge (ECCV 2024), Kim
et al. 2022 and Gu et al. 2024 (gu), Su et al. 2024 (post data augmentation), DD-Ranking 2025 (HLR, IOR).
"""
import contextlib
import functools
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import nanodd  # noqa: F401 (before torch: it sets how long waiting CPU threads spin)
import torch
import torch.nn.functional as F
from tqdm import tqdm

import convnet
from nanodd import checks, cli, running
from nanodd.data import datasets
from nanodd.judging import augment, baselines, features, gu, judges, results

# ----------------------------------------------------------------------------------------------------
# 1. Differentiable siamese augmentation (DSA, Zhao & Bilen 2021), with the challenge's strengths
#
# A family changes a batch x (B, C, S, S), with new random numbers for each image; --augment chooses families.
# x is normalised, so that 0, which fills uncovered pixels, is recipe.mean: black for digits, else a colour.


def color(x, rng):
    """Brightness, then saturation (nothing on one channel), then contrast: DSA's strengths 1, 2 and 0.5."""
    u = torch.rand(3, len(x), 1, 1, 1, generator=rng, device=x.device)      # (3, B, 1, 1, 1)
    x = x + (u[0] - 0.5)
    grey = x.mean(dim=1, keepdim=True)                                      # (B, 1, H, W)
    x = (x - grey) * (2 * u[1]) + grey
    mean = x.mean(dim=(1, 2, 3), keepdim=True)                              # (B, 1, 1, 1)
    return (x - mean) * (u[2] + 0.5) + mean


def crop(x, rng):
    """Shifts by whole pixels, up to an eighth of the side both ways, and fills with zeros."""
    B, C, H, W = x.shape
    s = int(H * 0.125 + 0.5)
    dy, dx = torch.randint(0, 2 * s + 1, (2, B, 1), generator=rng, device=x.device)     # (B, 1), (B, 1)
    image, channel = torch.arange(B, device=x.device), torch.arange(C, device=x.device)
    rows = torch.arange(H, device=x.device) + dy                            # (B, H)
    columns = torch.arange(W, device=x.device) + dx                         # (B, W)
    padded = F.pad(x, (s, s, s, s))                                         # (B, C, H + 2s, W + 2s)
    return padded[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None],
                  columns[:, None, None, :]]                                # (B, C, H, W)


def cutout(x, rng):
    """Zeroes a square of half the side; its centre is anywhere in the image, so part may lie outside."""
    B, _, H, W = x.shape
    side = int(H * 0.5 + 0.5)
    top, left = torch.randint(0, H + 1 - side % 2, (2, B, 1), generator=rng, device=x.device) - side // 2
    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    in_rows = (rows >= top) & (rows < top + side)                           # (B, H), top: (B, 1)
    in_columns = (columns >= left) & (columns < left + side)                # (B, W), left: (B, 1)
    return x * ~(in_rows[:, None, :, None] & in_columns[:, None, None, :])


def scale(x, rng):
    """Multiplies the sampling coordinates by factors in [1/1.2, 1.2], one for width and one for height."""
    u = torch.rand(len(x), 2, generator=rng, device=x.device)               # (B, 2)
    factors = u * (1.2 - 1 / 1.2) + 1 / 1.2
    return augment.warp(x, torch.diag_embed(factors))


def rotate(x, rng):
    """Turns each image by its own angle, uniform in [-15, 15] degrees, and fills with zeros."""
    angle = (torch.rand(len(x), generator=rng, device=x.device) - 0.5) * 2 * math.radians(15)          # (B,)
    return augment.rotate_by(x, angle)


CHALLENGE_FAMILIES = "color", "crop", "cutout", "flip", "scale", "rotate"
FAMILIES = {                   # --augment
    "color": color, "crop": crop, "cutout": cutout, "flip": augment.flip, "scale": scale, "rotate": rotate,
}


def dsa(x, families, rng, cpu_rng):
    """Applies one of `families` (names), drawn by cpu_rng, to the whole batch; rng draws all other numbers.

    cpu_rng is on the CPU: Python has to know the family, and would have to wait for a GPU to return it.
    """
    choice = int(torch.randint(len(families), (), generator=cpu_rng))
    return FAMILIES[families[choice]](x, rng)


# ----------------------------------------------------------------------------------------------------
# 2. The protocols, and the loop that trains a judge


class Protocol(NamedTuple):
    """How judges are trained and compared; the optimizer is SGD, momentum 0.9, weight decay 5e-4, in all."""
    batch: int
    num_evals: int             # at how many epochs the accuracy is measured
    runs: int                  # judges per row, unless --runs says otherwise
    bf16: bool                 # whether bfloat16 is the default where it is faster
    epochs: Callable           # (recipe, images, classes) -> epochs
    rate: Callable             # (epoch, epochs) -> learning rate
    reset_optimizer: bool      # whether a new one, without momentum, takes over where the rate falls
    augment: Callable          # (images (B, C, S, S) uint8, labels (B,), recipe, rng, cpu_rng) -> x, targets
    baselines: tuple           # the rows of real images that are always there


def challenge_rate(epoch, epochs):
    """A tenth after half: of the challenge's 1,001 epochs those with index 0 to 501 have the full rate."""
    return 0.01 if epoch < epochs // 2 + 2 else 0.01 * 0.1


def challenge_augment(images, labels, recipe, rng, cpu_rng):
    """One of the challenge's six families."""
    return dsa(augment.normalise(images, recipe), CHALLENGE_FAMILIES, rng, cpu_rng), [(labels, 1)]


def short_epochs(recipe, images, classes):
    """The recipe's, fewer where the judge would then see more than recipe.views images."""
    return max(1, min(recipe.epochs, recipe.views // images))


def short_augment(images, labels, recipe, rng, cpu_rng):
    """One of the recipe's families; of the challenge's, where it names none."""
    families = recipe.augment.split("_") if recipe.augment else CHALLENGE_FAMILIES
    return dsa(augment.normalise(images, recipe), families, rng, cpu_rng), [(labels, 1)]


# "challenge" is exact, with its range(1000 + 1) of epochs: it takes only network, size and normalisation from
# the recipe. Under gu a judge of a whole subset would train for hours, and a mean of photographs is a blur.
REAL = "random", "kmeans", "full"
PROTOCOLS = {
    "challenge": Protocol(256, 10, 3, False, lambda *_: 1001, challenge_rate, True, challenge_augment, REAL),
    "short": Protocol(256, 10, 5, True, short_epochs, challenge_rate, True, short_augment, REAL),
    "gu": Protocol(64, 100, 3, True, gu.epochs, gu.rate, False, gu.augment_and_mix, ("random",)),
}


def mixed_loss(logits, targets):
    """Cross entropy of logits (B, K) with each of `targets`, [(labels (B,), share of the loss)]."""
    return sum(share * F.cross_entropy(logits, labels) for labels, share in targets)


def train(judge, images, recipe, epochs, predict, rng, cpu_rng, start=0, optimizer=None):
    """Trains a judge on an ImageSet; yields (epoch, optimizer, the last batch's loss) after every epoch.

    judges.train_one consumes the generator: it tests and saves the judge at the yields. On a CPU several
    judges train at once, in threads; with OMP_NUM_THREADS=1 only one does, and a print stays readable.
    predict: x (B, C, S, S) -> logits (B, K), the judge in bfloat16 or compiled where that was asked for. rng,
    cpu_rng: see dsa; on a CPU they are one generator. To resume: start is the next epoch, optimizer the last.
    """
    protocol, gpu = PROTOCOLS[recipe.protocol], images.labels.is_cuda
    for epoch in range(start, epochs):
        rate = protocol.rate(epoch, epochs)
        if optimizer is None or (protocol.reset_optimizer and rate != optimizer.param_groups[0]["lr"]):
            optimizer = torch.optim.SGD(judge.parameters(), rate, momentum=0.9, weight_decay=5e-4, fused=gpu)
        optimizer.param_groups[0]["lr"] = rate
        judge.train()
        order = torch.randperm(len(images.labels), generator=rng, device=images.labels.device)     # (N,)
        for index in order.split(protocol.batch):                           # (B,)
            x, targets = protocol.augment(images.images[index], images.labels[index], recipe, rng, cpu_rng)
            loss = mixed_loss(predict(x), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        yield epoch, optimizer, loss


def in_batches(function, images, recipe):
    """Applies function, without gradients, to normalised batches of uint8 (N, C, H, W): (N, ...)."""
    with torch.no_grad():
        batches = images.split(2 * PROTOCOLS[recipe.protocol].batch)
        return torch.cat([function(augment.normalise(batch, recipe)) for batch in batches])


def accuracy(predict, images, labels, recipe):
    """Percent of the images (N, C, H, W) uint8 that predict, (B, C, S, S) -> (B, K), classifies correctly."""
    return 100 * int((in_batches(predict, images, recipe).argmax(1) == labels).sum()) / len(labels)


def count_epochs(recipe, images, classes):
    """How many epochs a judge trains on so many images of so many classes."""
    return PROTOCOLS[recipe.protocol].epochs(recipe, images, classes)


# ----------------------------------------------------------------------------------------------------
# 3. A row of the table: judges that trained on one source


def train_rows(rows, test, recipe, num_evals=None, **how):
    """Trains the judges of all rows, from scratch: yields ([(judge, accuracies)], seconds) for each row.

    rows: judges.Row; their sets and `test`: on one device. accuracies: percent on `test`, at num_evals epochs
    evenly spread up to the last one (default: the protocol's). A seed gives the same judge whatever others
    train beside it; on a CPU to the bit, if torch has as many threads. Raises UserError where a loss is not
    finite. how: bf16, compiled.
    """
    protocol = PROTOCOLS[recipe.protocol]
    return judges.side_by_side(rows, test, recipe, build=convnet.judge, train=train, accuracy=accuracy,
                               num_evals=num_evals or protocol.num_evals, batch=protocol.batch, **how)


def train_judges(trains, test, recipe, epochs, seeds, **how):
    """A judge for each seed, trained on its set of `trains`, as train_rows does: [(judge, accuracies)]."""
    [(judged, _)] = train_rows([judges.Row(trains, seeds, epochs)], test, recipe, **how)
    return judged


def real_judge(train, recipe, folder=None):
    """A judge of all of `train`, an ImageSet on the device, as features.RealJudge; `folder` caches it."""
    bf16 = PROTOCOLS[recipe.protocol].bf16 and cli.gains_from_bf16(train.images.device)

    def make():                                                 # one seed: all rows share their features
        epochs, one = count_epochs(recipe, len(train.labels), len(train.classes)), train.pick(slice(1))
        return train_judges([train], one, recipe, epochs, [0], num_evals=1, bf16=bf16)[0][0]
    judge = features.cached_judge(folder, train, recipe, bf16, make, convnet.judge).eval()
    return features.RealJudge(lambda images: in_batches(judge.embed, images, recipe),
                              lambda images: in_batches(judge, images, recipe))


def evaluate(sources, data, *, ipc, runs, seed, epochs=None, bf16=False, pool=None, compiled=None,
             keep=None, compare=None):
    """Trains `runs` judges on each source, tests them on data.test, and yields rows of results.jsonl: dicts.

    sources: [(source, pda)]; source, ipc: see baselines.Pool.training_set; pda: augmented copies of each
    image, beside the ipc. data: Data, of ImageSets on the device. pool: a baselines.Pool that calls share.
    keep: a folder that saves the judges of stopped rows. compare: gives "metrics", see features.comparison.
    """
    recipe, device, batch = data.recipe, data.test.images.device, PROTOCOLS[data.recipe.protocol].batch
    pool = pool or baselines.Pool(data, device, real_judge)
    seeds = [1000 * seed + r for r in range(runs)]              # of judges; random sets: 500 higher
    count = (lambda *_: epochs) if epochs else count_epochs
    rows = [pool.row(name, pda, ipc, seeds, count, (keep, bf16, compiled), compare) for name, pda in sources]
    compiled = judges.compiles(compiled, rows, recipe, convnet.judge, device, batch, bf16)
    trained = train_rows(rows, data.test, recipe, bf16=bf16, compiled=compiled)
    how = {"device": str(device) + " bf16" * bf16 + " compiled" * compiled, "seed": seed}
    for row, (judged, seconds) in zip(rows, trained, strict=True):
        row.checkpoint.remove()
        yield results.new_row(row, data, convnet.title(recipe.net), judged, seconds, how)


# ----------------------------------------------------------------------------------------------------
# 4. The command


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.add_argument("sources", nargs="*", metavar="SOURCE",
                        help="distilled, random, herding, kcenter, kmeans, full, a folder, an .npz, or a sum "
                             "a+b (default: distilled); random, kmeans and full (gu: random) are added")
    cli.add_flags(parser, "data root recipe validation out seed device skip-broken bf16 compile")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), help="of training (default: the recipe's)")
    parser.add_argument("--net", metavar="NAME",
                        help=f"the judge: {', '.join(convnet.JUDGES)} or timm:NAME (default: the recipe's)")
    parser.add_argument("--size", type=int, metavar="PX", help="the judge's input (default: the recipe's)")
    parser.add_argument("--augment", metavar="NAME[_NAME...]",
                        help=f"short's families, of {', '.join(FAMILIES)} (default: the recipe's)")
    parser.add_argument("--ipc", type=int, help="images per class (default: the first folder's, or 10)")
    parser.add_argument("--pda", type=int, default=0, metavar="K",
                        help="add K augmented copies of each image of the SOURCEs (default: %(default)s)")
    parser.add_argument("--runs", type=int, help="judges per row (default: 3; under short 5)")
    parser.add_argument("--epochs", type=int, help="of each judge (default: by protocol, recipe and images)")
    parser.add_argument("--metrics", action="store_true",
                        help="also precision, recall, ...; first trains a judge of all real images, once")
    parser.add_argument("--features", default="judge", metavar="judge|timm:NAME",
                        help="of what --metrics compares: a judge of all real images, or a pretrained one")
    args = parser.parse_args(argv)
    with running.command(parser, args, "the rows that are done are in results.jsonl; the same command trains "
                         "them again, and resumes the one that was stopped", many=False):
        run(args, cli.command_line_of(__file__, argv))


def run(args, command):
    """Judges every source of the command line: prints the table and appends its rows to results.jsonl."""
    device = cli.device_named(args.device)
    data = datasets.load(args.data, args.root, args.recipe, args.validation, args.skip_broken)
    classes = len(data.train.classes)
    recipe = checks.judging_recipe(args, data.recipe, classes, FAMILIES)
    convnet.judge(recipe.net, recipe.judge_size, recipe.colours, classes)   # refuses a bad --net or --size
    protocol = PROTOCOLS[recipe.protocol]
    train, test = (datasets.for_judges(part, recipe) for part in (data.train, data.test))
    data = data._replace(recipe=recipe, train=train.to(device), test=test)
    bf16 = protocol.bf16 and cli.gains_from_bf16(device) if args.bf16 is None else args.bf16
    home, pool = args.out or pathlib.Path("out", data.name), baselines.Pool(
        data, device, functools.partial(real_judge, folder=pathlib.Path("out", data.name)))
    runs, log, rows = args.runs or protocol.runs, results.open_log(home), []
    planned, ipc = baselines.plan_rows(args.sources, args.pda, args.ipc, pool, home, protocol.baselines,
                                       f"python sample.py --steps 10{cli.data_flags(args)} makes it")
    data = pool.data = data._replace(test=test.read().to(device))
    print(f"{data.name} | {data.cut} | protocol {recipe.protocol} | judge {convnet.title(recipe.net)} at "
          f"{recipe.judge_size} px | device {device}{' bf16' if bf16 else ''} | {runs} runs | "
          f"seed {args.seed}")
    compare = features.comparison(args.features, pool.real_judge, data.test) if args.metrics else None
    print(results.TABLE_HEADER)
    table = evaluate(planned, data, ipc=ipc, runs=runs, seed=args.seed, epochs=args.epochs, bf16=bf16,
                     pool=pool, compiled=args.compile, keep=home / "judges", compare=compare)
    with contextlib.closing(table):                             # ends all judges if a row cannot be written
        for row in tqdm(table, total=len(planned), disable=None, leave=False):
            tqdm.write(results.table_line(row))
            rows.append(row)
            results.append_row(log, row, command)
    results.close_table(rows, log, command, protocol.num_evals)


if __name__ == "__main__":
    main()
