"""The modes of a class, which mode guidance (sample.py, section 3) pulls images towards: k-means centres.

They are centres of the class's training images as the diffusion model sees them, pixels or latents. Chan-
Santiago et al. 2025 report 66.4 % with centres, 64.6 % with the real images nearest to them (ImageNette, ten
images a class).
"""
import math
import pathlib

import torch

from nanodd import files, processes
from nanodd.data import datasets, imageset
from nanodd.errors import UserError
from nanodd.networks import latents


def of_flags(args, run, header, ipc):
    """What --modes asks for: (keyword arguments of sample.draw, what is added to the settings of the set).

    header: the checkpoint's, whose classes may be a part of the data set's. Both are empty without --modes.
    Raises UserError as modes_of.
    """
    if args.modes is None:
        return {}, {}
    count = ipc if args.modes == math.inf else args.modes
    data = datasets.load(args.data, args.root, header["recipe"], args.validation, args.skip_broken)
    labels, config = datasets.labels_of(header["classes"], data), header["config"]
    if (config["channels"], config["size"]) != (data.recipe.channels, data.recipe.size):
        raise UserError(f"the checkpoint draws {config['channels']} x {config['size']}, and its recipe "
                        f"{data.recipe.name} is of {data.recipe.channels} x {data.recipe.size}")
    centres = modes_of(data, run, count)[labels]
    return ({"centres": centres, "mode_weight": args.mode_weight},
            {"modes": [count, args.mode_weight, files.fingerprint({"modes": centres})]})


def modes_of(data, run, count):
    """`count` modes of each class, the largest cluster first: (K, count, C, H, W) float in [-1, 1].

    Of a recipe with latents, (K, count, 4, h, w) latents. On the device. Cached in out/NAME, whatever --out
    is: the last digits of k-means depend on the machine, and a set that is resumed needs the same. data:
    datasets.Data. run: cli.Run, whose seed starts k-means.
    Raises UserError where a class has fewer training images than modes, or as latents.prepared.
    """
    fewest = int(data.train.labels.bincount().min())
    if count > fewest:
        raise UserError(f"--modes {count} is more than a class has training images, which is {fewest}")
    path = pathlib.Path("out", data.name, f"modes-{count}-seed{run.seed}.safetensors")
    settings = {"data": imageset.fingerprint(data.train), "size": data.recipe.size,
                "encoder": latents.encoder_name(run) if data.recipe.latents else None}
    examples = latents.prepared(data, run)

    def make():
        centres = [class_modes(examples, c, count, run.seed) for c in range(len(data.train.classes))]
        return {"modes": torch.stack(centres)}
    cached, recipe = processes.on_first_process(lambda: files.cached(path, settings, make)), data.recipe
    shape = len(data.train.classes), count, recipe.channels, recipe.size, recipe.size
    files.check_tensors(cached, {"modes": torch.empty(shape, device="meta")}, path, "data set",
                        ": delete it, and it is made again")
    return cached["modes"].float().to(run.device)


def class_modes(examples, c, count, seed):
    """The modes of class c: (count, C, H, W) float32 on the CPU. examples: ImageSet or latents.Latents."""
    from sklearn.cluster import KMeans                          # a slow import: only where it is needed
    index = (examples.labels == c).nonzero().squeeze(1)                     # (n,)
    rng = torch.Generator(index.device).manual_seed(seed)       # latents are sampled, not their means
    x = examples.examples(index, None, rng).cpu()               # (n, C, H, W); None: none is mirrored
    clusters = KMeans(count, n_init=3, random_state=seed % 2**32).fit(x.flatten(1).double().numpy())
    sizes = torch.from_numpy(clusters.labels_).bincount(minlength=count)    # (count,)
    centres = torch.from_numpy(clusters.cluster_centers_)[sizes.argsort(descending=True, stable=True)]
    return centres.float().view(count, *x.shape[1:])
