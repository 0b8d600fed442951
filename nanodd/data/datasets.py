"""A data set by its name: the digits, an archive, or anybody's folder of pictures."""
import math
import pathlib
from collections import Counter
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch

from nanodd import recipes
from nanodd.data import archives, imageset
from nanodd.errors import UserError

# ----------------------------------------------------------------------------------------------------
# 1. A data set by its name


class Data(NamedTuple):
    """A data set. name: the NAME of out/NAME. test is for reporting alone.

    cut: the split in words, with its counts. skip_broken: whether images that cannot be read are left out.
    """
    name: str
    recipe: recipes.Recipe
    train: imageset.ImageSet | imageset.ImageFiles
    test: imageset.ImageSet | imageset.ImageFiles
    cut: str
    skip_broken: bool = False


def data_name(data, root=None, validation=False):
    """The NAME of out/NAME: the built-in name, or the folder's own. Raises UserError if there is none."""
    if data in recipes.BUILT_IN:
        if root and data == "digits":
            raise UserError("the digits come with scikit-learn: leave --root out")
        name = data
    elif data == "folder":
        if not root:
            raise UserError("--data folder needs --root DIR")
        name = pathlib.Path(root).resolve().name
    else:                                                       # DIR is short for --data folder --root DIR
        if not pathlib.Path(data).is_dir():
            raise UserError(f"--data {data} is neither a folder nor the name of a data set "
                            f"({', '.join(recipes.BUILT_IN)})")
        if root:
            raise UserError("--data DIR already says where the files are: leave --root out")
        name = pathlib.Path(data).resolve().name
    if name != data and name in recipes.BUILT_IN:
        advice = f", or say --data {name} --root {root or data} if it is that one" * (name != "digits")
        raise UserError(f"a folder called {name} would share out/{name} with a built-in data set: rename it"
                        + advice)
    return name + "-validation" if validation else name


def labels_of(names, data):
    """The labels of the classes `names`, a checkpoint's, in `data`: a list of positions.

    Raises UserError where the data set lacks one.
    """
    missing = sorted(set(names) - set(data.train.classes))
    if missing:
        raise UserError(f"the checkpoint draws the class {missing[0]}, and {data.name} has no images of it")
    return [data.train.classes.index(name) for name in names]


def load(data="digits", root=None, recipe=None, validation=False, skip_broken=False):
    """The data set called `data`, or the folder of that name, as Data.

    root: the folder of its files. recipe: the name of another data set's recipe, None for its own.
    validation: the test split is not used; a fixed fifth of the training split is held out in its place (and
    "-validation" is added to the name), so that defaults are never chosen on the test split.
    Raises UserError where there is no such data set, folder or recipe, or where a split lacks a class.
    """
    name = data_name(data, root, validation)
    recipe = recipes.RECIPES[recipe or recipes.own_recipe(data)]
    split_name = ""
    if recipe.latents and data in ("digits", *archives.CIFARS):
        raise UserError(f"{data} is drawn as pixels: choose another --recipe")
    if data == "digits":
        train, test = digits(recipe)
    elif data in archives.CIFARS:
        train, test, split_name = archives.cifar(data, root, recipe, skip_broken)
    elif data == "tiny-imagenet":
        train, test, split_name = archives.tiny_imagenet(root, recipe)
    elif data in archives.SUBSETS:
        train, test, split_name = archives.imagenet(data, root, recipe)
    else:
        train, test = folder(pathlib.Path(root or data), recipe, skip_broken)
    if len(train.classes) < 2:
        raise UserError(f"{name} has one class only ({train.classes[0]}); a classifier needs two")
    if validation:
        train, test = split(train, .2)
    train, test = (part._replace(skip_broken=skip_broken) if isinstance(part, imageset.ImageFiles) else part
                   for part in (train, test))
    if not recipe.latents:                                      # pixels are trained on from memory
        train, test = train.read(), test.read()
    cut = f"{split_name}{len(train.labels):,} images to train on, {len(test.labels):,} to test"
    return Data(name, recipe, train, test, cut, skip_broken)


def for_judges(part, recipe):
    """A part of a data set, an ImageSet or ImageFiles, at the size at which judges read it.

    That is the size of `part`, but the judge's own where the generator draws latents of larger pictures.
    """
    return part._replace(size=recipe.judge_size) if recipe.latents else part


def describe(data):
    """Prints how many images were read, their size, how many there are of a class, and the recipe."""
    classes = data.train.classes
    print(f"{data.name} | {data.cut} | {len(classes)} classes: {', '.join(classes[:12])}")
    for part, images in (("train", data.train), ("test", data.test)):
        counts = Counter(images.labels.tolist())
        if isinstance(images, imageset.ImageFiles):
            summary = f"files, read at {images.size} px"
        else:
            summary = f"{tuple(images.images.shape)} {images.images.dtype}"
        print(f"{part:5} | {summary} | {min(counts.values())} to {max(counts.values())} images a class")
    print("recipe | " + " ".join(f"{field.name}={getattr(data.recipe, field.name)}"
                                 for field in fields(data.recipe)))


# ----------------------------------------------------------------------------------------------------
# 2. The fixed split, the digits, and folders


def split(whole, fraction):
    """A fixed, stratified split of `whole`, an ImageSet or ImageFiles: (1 - fraction of it, fraction of it).

    Raises UserError where a class has a single image, or `fraction` of all holds fewer images than classes.
    """
    from sklearn.model_selection import train_test_split        # a slow import: only where it is needed
    rarest = int(whole.labels.bincount().argmin())
    if (whole.labels == rarest).sum() < 2:
        raise UserError(f"the class {whole.classes[rarest]} has one image only: two are needed, to hold one "
                        "back")
    try:
        train, test = train_test_split(np.arange(len(whole.labels)), test_size=fraction, random_state=0,
                                       stratify=whole.labels.numpy())
    except ValueError as error:                                 # fewer images than classes to hold out
        raise UserError(f"{len(whole.labels)} images are too few to hold {fraction:.0%} of each of "
                        f"{len(whole.classes)} classes back: {math.ceil(len(whole.classes) / fraction)} are "
                        "needed") from error
    return whole.pick(torch.from_numpy(np.sort(train))), whole.pick(torch.from_numpy(np.sort(test)))


def digits(recipe):
    """scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels; Alpaydin & Kaynak 1998, CC BY 4.0).

    They are brought to the recipe's size and channels. Returns a fixed 70/30 split, two ImageSets: 1,257
    images to train on and 540 to test.
    """
    from sklearn.datasets import load_digits                    # a slow import: only where it is needed
    from torchvision.transforms import functional as TF
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).unsqueeze(1)       # (1797, 1, 8, 8) in 0..255
    images = TF.resize(images, recipe.size, TF.InterpolationMode.BICUBIC).clamp(0, 255).round()
    images = images.to(torch.uint8).expand(-1, recipe.channels, -1, -1).contiguous()  # (1797, C, size, size)
    names = [str(name) for name in bunch.target_names]
    return split(imageset.ImageSet(images, torch.from_numpy(bunch.target), names), .3)


def folder(root, recipe, skip_broken=False):
    """The images in DIR/train and DIR/test or DIR/val; without those, a fixed 80/20 split of DIR's classes.

    Returns two ImageSets, or two ImageFiles where the recipe draws latents, since its pictures are large.
    Raises UserError as imageset.read_set, or where DIR or its test folder is missing.
    """
    def part(path):
        if recipe.latents:
            return imageset.list_folder(path, recipe.pixels, recipe.colours)
        return imageset.read_set(path, recipe.pixels, recipe.colours, skip_broken=skip_broken)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    if (root / "train").is_dir():
        test_dir = imageset.test_folder(root)
        train, test = part(root / "train"), part(test_dir)
        imageset.check_classes(test.classes, train.classes, test_dir)
        return train, test
    print(f"{root} has no train/ and test/: a fixed fifth of it is held back to test on")
    return split(part(root), .2)
