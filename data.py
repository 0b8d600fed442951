"""A data set is one uint8 tensor, one label tensor, and the class names in label order.

    images (N, C, H, W) uint8        labels (N,) int64 in 0..K-1        classes: K names

Everything small enough to sit in memory sits there, decoded once; a network sees
x = images / 127.5 - 1, in [-1, 1]. A class is a NAME wherever files are involved: its label is its position
in `classes`, so a folder that lost a class is an error and never a shift of labels.

    python data.py                       # 1,257 real handwritten digits to train on, 540 to test: 3 s
    python data.py --data my/pictures    # any folder of class folders: what would be read, and how

Writes nothing. For each data set, its recipe (section 3) says everything that the other files derive from it.
"""
import argparse
import errno
import os
import pathlib
import shlex
import sys
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.transforms import functional as TF

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# ----------------------------------------------------------------------------------------------------
# 1. Mistakes that a sentence can explain


class UserError(ValueError):
    """Something the person at the keyboard can put right; its message is the sentence that says how."""


@contextmanager
def one_sentence(parser):
    """Turns a UserError, a full disk or Ctrl-C inside the block into one line on stderr and exit code 2.

    Anything else is a bug of ours and keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(2, f"\n{parser.prog}: stopped by Ctrl-C; what was finished is kept, "
                       "and the same command goes on\n")
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS,
                               errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        where = f" ({error.filename})" if error.filename else ""
        parser.exit(2, f"{parser.prog}: cannot read or write: {error.strerror}{where}; "
                       "what was there before is kept\n")


@contextmanager
def replacing(path):
    """Yields a temporary path beside `path`, renamed over it if the block succeeds and removed if not.

    A killed run therefore leaves the last good file, never half of a new one.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def device_named(name):
    """The torch.device asked for: auto, cpu, cuda, cuda:N or mps. An absent one is refused, not replaced."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is none of auto, cpu, cuda, mps")
    if kind == "mps" and not has_mps:
        raise UserError("--device mps was asked for, but there is none here; try --device cpu")
    if kind == "cuda":
        index = name.partition(":")[2] or "0"
        if not index.isdigit() or int(index) >= torch.cuda.device_count():
            raise UserError(f"--device {name} was asked for, but there is none here; try --device cpu")
    return torch.device(name)


# ----------------------------------------------------------------------------------------------------
# 2. A data set


class ImageSet(NamedTuple):
    """images: (N, C, H, W) uint8. labels: (N,) int64 in 0..K-1. classes: list of K names, in label order."""
    images: torch.Tensor
    labels: torch.Tensor
    classes: list

    def pick(self, index):
        """The images at `index`, a (n,) tensor of positions or a boolean mask."""
        return ImageSet(self.images[index], self.labels[index], self.classes)

    def to(self, device):
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)


def to_float(images):
    """uint8 0..255 -> float in [-1, 1], what the diffusion model learns."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1] (clipped to it) -> uint8 0..255, the inverse of to_float."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def open_image(path, size=None, channels=3):
    """One image file of any mode -> (channels, H, W) uint8; with `size`, resized and centre-cropped to it.

    channels: 1 (grey), 3 (colour) or None (as the file has it).
    Transparency is laid over white; 16-bit grey is scaled by 1/257, where PIL's own conversion would clip it;
    a camera's rotation flag is obeyed. Raises UserError, naming the file, where it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                grey = (np.asarray(image, np.float64) / 257).clip(0, 255).round().astype(np.uint8)
                image = Image.fromarray(grey)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if channels is not None or image.mode not in ("L", "RGB"):
                image = image.convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: {error}") from error
    if size and image.size != (size, size):
        image = TF.center_crop(TF.resize(image, size, TF.InterpolationMode.BICUBIC), size)
    return TF.pil_to_tensor(image)                                          # (C, H, W)


def read_set(path, size=None, channels=3, classes=None):
    """Reads a folder of class folders, or an .npz with images, labels and classes, as an ImageSet.

    size, channels: what each image is brought to. classes: the names in label order; a folder that lacks one
    of them or has another is an error. Without it the sorted folder names are the classes.
    Raises UserError for a missing or empty folder, an unreadable image, a class without images.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}")
    if path.suffix != ".npz" and not path.is_dir():
        raise UserError(f"{path} is neither a folder of class folders nor an .npz")
    found = (read_npz if path.suffix == ".npz" else read_folder)(path, size, channels)
    if classes is not None and sorted(found.classes) != sorted(classes):
        lost, extra = sorted(set(classes) - set(found.classes)), sorted(set(found.classes) - set(classes))
        raise UserError(f"{path} has other classes than the data set: missing {lost}, unexpected {extra}")
    classes = list(classes or found.classes)
    position = torch.tensor([classes.index(name) for name in found.classes])
    found = ImageSet(found.images, position[found.labels], classes)
    empty = [classes[c] for c in range(len(classes)) if not (found.labels == c).any()]
    if empty:
        raise UserError(f"{path} has no images of {', '.join(empty)}")
    return found


def read_folder(path, size, channels):
    """A folder of class folders -> ImageSet, classes sorted by name, files sorted within a class."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise UserError(f"{path} holds no class folders (expected {path}/<class>/<image>.png)")
    images, labels = [], []
    for label, folder in enumerate(folders):
        names = sorted(name for name in folder.rglob("*") if name.suffix.lower() in SUFFIXES)
        if not names:
            raise UserError(f"the class folder {folder} holds no images ({', '.join(SUFFIXES)})")
        images += [open_image(name, size, channels) for name in names]
        labels += [label] * len(names)
    if len({image.shape for image in images}) > 1:
        raise UserError(f"the images under {path} have several sizes; a size to bring them to is needed")
    return ImageSet(torch.stack(images), torch.tensor(labels), [folder.name for folder in folders])


def read_npz(path, size, channels):
    """An .npz as sample.py writes it (images (N, C, H, W) uint8, labels (N,), classes (K,)) -> ImageSet."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]).long()
            classes = [str(name) for name in arrays["classes"]]
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no .npz with images, labels and classes: {error}") from error
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
        raise UserError(f"{path}: images must be uint8 (N, C, H, W) with one label each, "
                        f"not {images.dtype} {tuple(images.shape)}")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"{path}: labels must lie in 0..{len(classes) - 1}")
    if images.shape[1] not in (1, 3):
        raise UserError(f"{path}: images must have 1 or 3 channels, not {images.shape[1]}")
    if images.shape[1] > channels:
        images = TF.rgb_to_grayscale(images)
    images = images.expand(-1, channels, -1, -1)
    if size and tuple(images.shape[2:]) != (size, size):
        images = TF.center_crop(TF.resize(images, size, TF.InterpolationMode.BICUBIC), size)
    return ImageSet(images, labels, classes)


def write_png(path, image):
    """(C, H, W) uint8 -> a PNG file, appearing whole or not at all."""
    with replacing(path) as temporary:
        TF.to_pil_image(image).save(temporary, format="PNG")


# ----------------------------------------------------------------------------------------------------
# 3. The recipes


@dataclass(frozen=True)
class Recipe:
    """All that the other files take from the data set. Times are those of two CPU cores."""
    size: int                  # pixels, square: what the diffusion model draws
    judge_size: int            # what the judge enlarges (or shrinks) images to
    channels: int              # 1 or 3
    network: str               # DiT's size: tiny, S, B, L or XL
    patch: int                 # pixels (or latent cells) per token side
    steps: int                 # of training the base model
    batch: int
    lr: float                  # peak learning rate of the base
    ema: float                 # EMA decay, after its warm-up
    tune_steps: int            # of fine-tuning with the min-max losses
    tune_batch: int
    tune_lr: float
    tune_ema: float            # an upper bound: the average of 400 steps has not reached it yet
    lambda_r: float
    lambda_d: float
    guidance: float            # classifier-free guidance when sampling; 1 is none
    flip: bool                 # mirror training images: right for photographs, wrong for digits
    augment: str               # the judge's augmentations (train_eval.py, section 1), joined by "_"
    mean: tuple                # the judge sees (pixel / 255 - mean) / std
    std: tuple
    epochs: int                # of the judge on a small set; on a large one fewer, so that it sees about
    views: int                 # this many images in all


RECIPES = {
    # Drawn at their native 8x8: enlarged to 16x16 first, the same network needs many times the steps, for
    # most of its 256 numbers then carry noise alone. The judge has 16x16, the least that three poolings leave
    # room in. Black stays 0 under the judge's normalisation, so that augmentation fills with background.
    "digits": Recipe(
        size=8, judge_size=16, channels=1, network="tiny", patch=2, steps=7500, batch=32, lr=4e-3, ema=.995,
        tune_steps=400, tune_batch=64, tune_lr=1e-3, tune_ema=.99, lambda_r=.002, lambda_d=.008,
        guidance=2., flip=False, augment="color_crop_cutout_scale_rotate", mean=(0.,), std=(.5,),
        epochs=200, views=40_000),
    # Anybody's pictures, small enough for a laptop.
    "folder": Recipe(
        size=32, judge_size=32, channels=3, network="tiny", patch=4, steps=3000, batch=32, lr=2e-3, ema=.995,
        tune_steps=400, tune_batch=64, tune_lr=1e-3, tune_ema=.99, lambda_r=.002, lambda_d=.008,
        guidance=2., flip=True, augment="color_crop_cutout_flip_scale_rotate",
        mean=(.5, .5, .5), std=(.25, .25, .25), epochs=200, views=40_000),
}


# ----------------------------------------------------------------------------------------------------
# 4. The data sets


class Data(NamedTuple):
    """name: what out/NAME is called. recipe: Recipe. train, test: ImageSet (test is for reporting only)."""
    name: str
    recipe: Recipe
    train: ImageSet
    test: ImageSet


def data_name(data, root=None, validation=False):
    """What out/NAME is called: digits, or the folder's own name. Raises UserError if there is none such."""
    if data in ("digits", "folder"):
        if (root is None) != (data == "digits"):
            raise UserError("--data folder needs --root DIR" if root is None else
                            "the digits come with scikit-learn: leave --root out")
        name = pathlib.Path(root).resolve().name if root else data
    else:                                                       # DIR is short for --data folder --root DIR
        if not pathlib.Path(data).is_dir():
            raise UserError(f"--data {data} is neither a folder nor the name of a data set (digits)")
        if root:
            raise UserError("--data DIR already says where the files are: leave --root out")
        name = pathlib.Path(data).resolve().name
    if name in RECIPES and data not in RECIPES:
        raise UserError(f"a folder called {name} would share out/{name} with a built-in data set: rename it")
    return name + "-validation" if validation else name


def load(data="digits", root=None, recipe=None, validation=False):
    """The data set called `data`, or the folder of that name, as Data.

    root: where its files are. recipe: the name of another data set's recipe, to borrow it.
    validation: hold the test split back altogether; a fixed fifth of the training split takes its place
    (and "-validation" is added to the name), so that defaults are never chosen on the test split.
    Raises UserError where there is no such data set, folder or recipe, or where a split lacks a class.
    """
    name = data_name(data, root, validation)
    recipe = RECIPES[recipe or (data if data in RECIPES else "folder")]
    train, test = digits(recipe) if data == "digits" else folder(pathlib.Path(root or data), recipe)
    if len(train.classes) < 2:
        raise UserError(f"{name} has one class only ({train.classes[0]}); a classifier needs two")
    if validation:
        train, test = split(train, .2)
    return Data(name, recipe, train, test)


def split(whole, fraction):
    """A fixed split that keeps the shares of the classes: (1 - fraction, fraction) of an ImageSet."""
    try:
        kept, held = train_test_split(np.arange(len(whole.labels)), test_size=fraction, random_state=0,
                                      stratify=whole.labels.numpy())
    except ValueError as error:                                 # a class of one, or fewer images than classes
        raise UserError(f"too few images to hold {fraction:.0%} of each class back: {error}") from error
    return whole.pick(torch.from_numpy(np.sort(kept))), whole.pick(torch.from_numpy(np.sort(held)))


def digits(recipe):
    """scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels; Alpaydin & Kaynak 1998, CC BY 4.0).

    Brought to the recipe's size and channels, split 70/30 once and for all: two ImageSets,
    1257 images to train on and 540 to test.
    """
    found = load_digits()
    images = torch.from_numpy(found.images * (255 / 16)).unsqueeze(1)       # (1797, 1, 8, 8) in 0..255
    images = TF.resize(images, recipe.size, TF.InterpolationMode.BICUBIC).clamp(0, 255).round()
    images = images.to(torch.uint8).expand(-1, recipe.channels, -1, -1).contiguous()
    names = [str(name) for name in found.target_names]
    return split(ImageSet(images, torch.from_numpy(found.target), names), .3)


def folder(root, recipe):
    """DIR/train with DIR/test or DIR/val; without those, DIR's class folders are split 80/20, said aloud."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    if (root / "train").is_dir():
        train = read_set(root / "train", recipe.size, recipe.channels)
        held = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
        if held is None:
            raise UserError(f"{root}/train needs {root}/test or {root}/val beside it")
        return train, read_set(held, recipe.size, recipe.channels, train.classes)
    print(f"{root} has no train/ and test/: a fixed fifth of it is held back to test on")
    return split(read_set(root, recipe.size, recipe.channels), .2)


# ----------------------------------------------------------------------------------------------------
# 5. The command line that all stages share


FLAGS = {
    "data": dict(default="digits", metavar="NAME|DIR",
                 help="digits, or a folder of class folders (default: %(default)s)"),
    "root": dict(metavar="DIR", help="where the files are, with --data folder"),
    "recipe": dict(choices=sorted(RECIPES), help="borrow another data set's recipe"),
    "validation": dict(action="store_true",
                       help="put the test split away and test on a fifth of the training split: "
                            "for choosing"),
    "out": dict(type=pathlib.Path, metavar="DIR", help="where results go (default: out/NAME)"),
    "seed": dict(type=int, default=0, help="of everything random (default: %(default)s)"),
    "device": dict(default="auto", help="cpu, cuda, cuda:N or mps (default: the fastest here)"),
    "overwrite": dict(action="store_true", help="replace what other settings made"),
}


def add_flags(parser, names):
    """Adds the shared flags that a stage reads, by name, so that they mean the same everywhere."""
    for name in names.split():
        parser.add_argument(f"--{name}", **FLAGS[name])


def same_data(args, *more):
    """The flags that point the next command at the same data: "" for the digits, else " --data DIR" ...

    more: further flags to repeat where they were given, such as "--out".
    """
    flags = [] if args.data == "digits" else ["--data", args.data]
    flags += ["--root", args.root] if args.root else []
    flags += ["--validation"] * args.validation
    for flag in more:
        value = getattr(args, flag.strip("-"))
        flags += [flag, str(value)] if value is not None else []
    return "".join(f" {shlex.quote(word)}" for word in flags)


def new_parser(doc):
    """An ArgumentParser whose --help opens with the file's own first screen."""
    return argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def command(file, argv=None):
    """The command as typed from the repository's root, for the records that are kept: no absolute path."""
    words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    words = [os.path.relpath(word) if os.path.isabs(word) else word for word in words]
    return shlex.join(["python", pathlib.Path(file).name, *words])


def check_settings(found, wanted, path):
    """Refuses to go on with `path` if it was made with other settings (dicts), and names the difference."""
    other = [f"{key} {found.get(key)!r} there, {wanted.get(key)!r} here" for key in sorted({*found, *wanted})
             if found.get(key) != wanted.get(key)]
    if other:
        raise UserError(f"{path} was made with other settings ({'; '.join(other)}): "
                        f"choose --out ELSEWHERE, or --overwrite to replace it")


def main(argv=None):
    parser = new_parser(__doc__)
    add_flags(parser, "data root recipe validation")
    args = parser.parse_args(argv)
    with one_sentence(parser):
        name, recipe, train, test = load(args.data, args.root, args.recipe, args.validation)
        print(f"{name} | {len(train.classes)} classes: {', '.join(train.classes[:12])}")
        for part, images in (("train", train), ("test", test)):
            counts = Counter(images.labels.tolist())
            print(f"{part:5} | {tuple(images.images.shape)} {images.images.dtype} | "
                  f"{min(counts.values())} to {max(counts.values())} images a class")
        print("recipe | "
              + " ".join(f"{field.name}={getattr(recipe, field.name)}" for field in fields(recipe)))
        print(f"-> python diffusion.py{same_data(args, '--recipe')}")


if __name__ == "__main__":
    main()
