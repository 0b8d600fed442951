"""Features in which images are compared: of a judge trained on all real images, or of a pretrained network.

Herding, k-center, the numbers of train_eval.py --metrics and the choice of sample.py --oversample come from
feature vectors. A judge that was trained on all real images knows the data set's own classes; a pretrained
network (timm:NAME) is the same for all data sets.
"""
import hashlib
import pathlib
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanodd import cli, files, processes
from nanodd.data import imageset
from nanodd.errors import UserError
from nanodd.judging import metrics


class RealJudge(NamedTuple):
    """A judge that was trained on all real training images, as two functions of uint8 (N, C, H, W)."""
    embed: Callable            # -> (N, F), the features before its last layer
    classify: Callable         # -> (N, K), logits


def cached_judge(folder, train, recipe, how, make, build, name="real_judge"):
    """The network that make() trains on all of `train`, an ImageSet; its weights are kept in `folder`.

    The file is named by `name` and a hash of the images, the recipe's settings of a judge, `how` (bf16, and
    the seed if there are several), and the kind of device. make: () -> a trained network. build:
    (net, size, channels, classes) -> an untrained one. folder: None keeps nothing.
    """
    if folder is None:
        return make()
    device = train.images.device
    settings = (recipe.net, recipe.judge_size, recipe.protocol, recipe.augment, recipe.mean, recipe.std,
               recipe.epochs, recipe.views, how, device.type)
    key = hashlib.sha256(repr((imageset.fingerprint(train), settings)).encode()).hexdigest()[:16]
    path = folder / f"{name}-{key}.safetensors"
    judge = build(recipe.net, recipe.judge_size, recipe.colours, len(train.classes))

    def weights():
        print(f"training a judge on all {len(train.labels):,} real images, once, for {path}")
        return {name: x.cpu().contiguous() for name, x in make().state_dict().items()}
    files.load_strict(judge, files.cached(path, {"key": key}, weights), path, "judge",
                      ": delete it, and it is made again")
    return judge.to(device)


def second_judge(data, run, train_judges, count_epochs, build):
    """A frozen ConvNetD3 judge of all training images for turbo.py's discriminator, kept in out/NAME.

    Its seed is no other judge's: the network that a student learned to please must not measure it. data:
    datasets.Data. run: cli.Run. train_judges, count_epochs: train_eval.py's; build: convnet.judge.
    """
    recipe, train = replace(data.recipe, net="convnet3", protocol="short"), data.train.to(run.device)
    bf16 = cli.gains_from_bf16(run.device) if run.bf16 is None else run.bf16

    def make():
        epochs, seed = count_epochs(recipe, len(train.labels), len(train.classes)), 1000 * run.seed + 500
        return train_judges([train], train.pick(slice(1)), recipe, epochs, [seed], num_evals=1,
                            bf16=bf16)[0][0]

    def cached():
        folder, how = pathlib.Path("out", data.name), (run.seed, bf16)
        return cached_judge(folder, train, recipe, how, make, build, "second_judge")
    processes.on_first_process(lambda: cached() and None)       # the others read its file
    return cached().eval().requires_grad_(False)


def pretrained(name, device):
    """The features of timm's pretrained network `name`: a function from uint8 (N, C, H, W) to (N, F).

    Images are brought to the network's own size, colours and normalisation. inception_v3.tf_in1k is TF-Slim's
    Inception v3, not the network of published Frechet Inception distances: they cannot be compared.
    Raises UserError where timm has no such network, or its weights cannot be fetched.
    """
    import timm                                                 # a slow import: only where it is needed
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:                                  # the hub raises errors of many libraries
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"timm's pretrained {name} cannot be fetched ({reason}): on a machine without a "
                        "network leave --features out, and a judge of the real images is used") from error
    network, config = network.to(device).eval(), network.pretrained_cfg
    _, *size = config["input_size"]
    mean, std = (torch.tensor(config[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))

    @torch.no_grad()
    def embed(images):
        parts = []
        for part in images.split(128):
            x = (part.to(device).float() / 255).expand(-1, 3, -1, -1)       # grey: three equal channels
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
            parts.append(network((x - mean) / std))                         # (n, F)
        return torch.cat(parts)
    return embed


def comparison(name, judge, test):
    """Returns compare: a list of ImageSets -> {metric: number}, the means of metrics.compare over the sets.

    Each is compared with the real images `test`, on the same device. A metric that one of the sets is too
    small for is None. name: "judge" for the features of `judge`, a RealJudge, else "timm:NAME". Raises
    UserError as pretrained, and where the features are not finite.
    """
    embed = judge.embed if name == "judge" else pretrained(name.removeprefix("timm:"), test.images.device)
    real = embed(test.images)                                               # (N, F)
    if not files.is_finite(real):
        raise UserError(f"the features of {name} are not finite: choose other --features, or delete the "
                        "real_judge-* of this data set, and a new one is trained")

    def compare(sets):
        rows = [metrics.compare(real, embed(part.images), test.labels, part.labels,
                                judge.classify(part.images)) for part in sets]
        values = {key: [row[key] for row in rows] for key in rows[0]}
        return {"features": name, **{key: None if None in value else statistics.mean(value)
                                     for key, value in values.items()}}
    return compare
