"""A data set is one uint8 tensor, one label tensor, and the class names in label order.

    images (N, C, H, W) uint8        labels (N,) int64 in 0..K-1        classes: K names

Everything small enough to sit in memory sits there, decoded once; a network sees
x = images / 127.5 - 1, in [-1, 1]. Of ImageNet's subsets only the file names are held. A class is a NAME
wherever files are involved: its label is its position in `classes`, so a folder that lost a class is an error
and never a shift of labels.

    python data.py                       # 1,257 real handwritten digits to train on, 540 to test: 3 s
    python data.py --data my/pictures    # any folder of class folders: what would be read, and how
    python data.py --data cifar100       # fetched once, or read from --root DIR; cifar10 too
    python data.py --data tiny-imagenet --root DIR              # the unpacked archive
    python data.py --data imagewoof --root /data/imagenet       # which images this cut has

Writes nothing but what it fetches. For each data set, its recipe (section 3) says everything that the other
files derive from it.
"""
import argparse
import datetime
import errno
import hashlib
import http.client
import json
import os
import pathlib
import re
import shlex
import sys
import urllib.request
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import functional as TF
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# ----------------------------------------------------------------------------------------------------
# 1. Mistakes that a sentence can explain


class UserError(ValueError):
    """Something the person at the keyboard can put right; its message is the sentence that says how."""


@contextmanager
def one_sentence(parser, again="the same command goes on"):
    """Turns a UserError, a full disk or memory, or Ctrl-C in the block into one line on stderr, exit code 2.

    Anything else is a bug of ours and keeps its traceback. again: what to do after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(2, f"\n{parser.prog}: stopped by Ctrl-C; what was finished is kept, "
                       f"and {again}\n")
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except (RuntimeError, MemoryError) as error:                # torch has a class of its own on GPUs only
        if not re.search("^$|out of memory|can't allocate memory", str(error)):
            raise
        known = parser.format_help()
        helps = [flag for flag in ("--recompute", "--batch", "--bf16", "--size") if f"{flag} " in known]
        parser.exit(2, f"{parser.prog}: out of memory; what helps: {' or '.join(helps) or 'a smaller set'} "
                       "(a smaller number where it takes one)\n")
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent}: {error.strerror}") from error
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
        if ":" in name and world() > 1:
            raise UserError(f"--device {name} puts all processes on one GPU; --device cuda: each on its own")
        index = name.partition(":")[2] or os.environ.get("LOCAL_RANK", "0")  # torchrun: a GPU each
        if not index.isdigit() or int(index) >= torch.cuda.device_count():
            raise UserError(f"--device {name} was asked for, but there is none here; try --device cpu")
        torch.cuda.set_device(int(index))
        return torch.device(kind, int(index))
    return torch.device(name)


def gains_from_bf16(device):
    """Whether bfloat16 is faster there: on GPUs, and on CPUs that multiply it natively."""
    if device.type != "cpu":
        return device.type == "cuda"
    has = getattr(torch.cpu, "get_capabilities", dict)()        # an older torch does not tell
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


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

    def read(self, skip_broken=False):
        """Itself: it was read already."""
        return self

    def examples(self, index, mirrored, chance):
        """What the diffusion model learns from: (B, C, H, W) in [-1, 1]; mirrored (B,) bool, or None."""
        x = to_float(self.images[index])
        return x if mirrored is None else torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)


class ImageFiles(NamedTuple):
    """An ImageSet still on disk: N paths in place of images, which read() decodes to (channels, size, size).

    labels: (N,) int64 in 0..K-1. classes: list of K names, in label order.
    """
    files: list
    labels: torch.Tensor
    classes: list
    size: int
    channels: int

    def pick(self, index):
        """The files at `index`, a (n,) tensor of positions or a boolean mask."""
        positions = torch.arange(len(self.files))[index.cpu()]
        return self._replace(files=[self.files[i] for i in positions], labels=self.labels[positions])

    def to(self, device):
        """Itself: nothing of it is on a device before it is read."""
        return self

    def read(self, skip_broken=False):
        """Decodes all of it, several files at a time: an ImageSet.

        Raises UserError, naming the first and counting, where images cannot be read and shall not be skipped.
        """
        def attempt(path):
            try:
                return open_image(path, self.size, self.channels)
            except UserError as error:
                return error
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(attempt, self.files))
        broken = [image for image in images if isinstance(image, UserError)]
        if broken and not skip_broken:
            raise UserError(f"{broken[0]} ({len(broken)} of {len(images)} images cannot be read; "
                            "--skip-broken leaves them out)")
        for error in broken:
            print(f"left out: {error}", file=sys.stderr)
        whole = torch.tensor([isinstance(image, torch.Tensor) for image in images])
        images = [image for image in images if isinstance(image, torch.Tensor)]
        if len({image.shape for image in images}) > 1:
            raise UserError(f"the images beside {self.files[0]} have several sizes; a size to bring them to "
                            "is needed")
        if not images:
            raise UserError(f"none of the images beside {self.files[0]} can be read")
        return ImageSet(torch.stack(images), self.labels[whole], self.classes)


def data_print(train, times=False):
    """A fingerprint of a set: images, labels and classes; of files their names, sizes and (on demand) times.

    It stands among a run's settings, so that a run on other pictures is never taken for this one.
    """
    facts = [train.classes]
    if isinstance(train, ImageFiles):
        for file in train.files:
            found = file.stat()
            facts.append((file.parent.name, file.name, found.st_size, found.st_mtime_ns if times else None))
    else:
        facts.append(fingerprint({"images": train.images, "labels": train.labels}))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16] + " " + " ".join(train.classes)[:60]


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


def read_set(path, size=None, channels=3, classes=None, skip_broken=False):
    """Reads a folder of class folders, or an .npz with images, labels and classes, as an ImageSet.

    size, channels: what each image is brought to. classes: the names in label order; a folder that lacks one
    of them or has another is an error. Without it the sorted folder names are the classes.
    Raises UserError for a missing or empty folder, an unreadable image that is not to be skipped, a class
    without images.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}")
    if path.suffix != ".npz" and not path.is_dir():
        raise UserError(f"{path} is neither a folder of class folders nor an .npz")
    if path.suffix == ".npz":
        found = read_npz(path, size, channels)
    else:
        found = list_folder(path, size, channels).read(skip_broken)
    classes = list(classes or found.classes)
    check_classes(found.classes, classes, path)
    position = torch.tensor([classes.index(name) for name in found.classes])
    found = ImageSet(found.images, position[found.labels], classes)
    empty = [classes[c] for c in range(len(classes)) if not (found.labels == c).any()]
    if empty:
        raise UserError(f"{path} has no images of {', '.join(empty)}")
    return found


def check_classes(found, wanted, path):
    """Refuses a folder that lacks a class of the data set or has another one."""
    lost, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if lost or extra:
        raise UserError(f"{path} has other classes than the data set: missing {lost}, unexpected {extra}")


def list_folder(path, size, channels, classes=None):
    """A folder of class folders -> ImageFiles, classes sorted by name (or those asked for), files as well."""
    if classes is None:
        classes = sorted(entry.name for entry in path.iterdir()
                         if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{path} holds no class folders (expected {path}/<class>/<image>.png)")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(file for file in (path / name).rglob("[!.]*")
                       if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise UserError(f"the class folder {path / name} holds no images ({', '.join(SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    return ImageFiles(files, torch.tensor(labels), classes, size, channels)


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
    return ImageSet(fit(images, size, channels), labels, classes)


def fit(images, size, channels):
    """uint8 (N, 1 or 3, H, W) -> (N, channels, size, size), centre-cropped; size None: as large as it is."""
    if images.shape[1] > channels:
        images = TF.rgb_to_grayscale(images)
    images = images.expand(-1, channels, -1, -1)
    if size and tuple(images.shape[2:]) != (size, size):
        images = TF.center_crop(TF.resize(images, size, TF.InterpolationMode.BICUBIC), size)
    return images


def write_png(path, image):
    """(C, H, W) uint8 -> a PNG file, appearing whole or not at all."""
    with replacing(path) as temporary:
        TF.to_pil_image(image).save(temporary, format="PNG")


# ----------------------------------------------------------------------------------------------------
# 3. The recipes


@dataclass(frozen=True)
class Recipe:
    """All that the other files take from the data set."""
    name: str
    size: int                  # of what the diffusion model draws: pixels, or latent cells (8 pixels each)
    channels: int              # 1 or 3; of latents 4
    latents: bool              # whether it draws latents, which the autoencoder (vae.py) turns into pictures
    weights: str               # published weights to start from; "" where the base is trained here
    network: str               # DiT's size: tiny, XS, S, B, L or XL
    patch: int                 # pixels (or latent cells) per token side
    steps: int                 # of training the base model
    batch: int
    lr: float                  # peak learning rate of the base
    ema: float                 # EMA decay, after its warm-up
    tune_steps: int            # of fine-tuning with the min-max losses; 0: as many as make tune_epochs
    tune_epochs: int
    tune_batch: int
    tune_lr: float
    tune_beta2: float          # AdamW's
    tune_ema: float
    tune_warm: bool            # the average warms up, so that tune_ema binds only in long runs
    lambda_r: float
    lambda_d: float
    guidance: float            # classifier-free guidance when sampling; 1 is none
    flip: bool                 # mirror training images: right for photographs, wrong for digits
    net: str                   # the judge (convnet.py)
    judge_size: int            # what the judge enlarges (or shrinks) images to
    protocol: str              # how the judge is trained (train_eval.py, section 2): challenge, short or gu
    augment: str               # the judge's augmentations (train_eval.py, section 1), joined by "_"; "": all
    mean: tuple                # the judge sees (pixel / 255 - mean) / std
    std: tuple
    epochs: int                # of the judge, at most (short; challenge and gu have their own)
    views: int                 # images it sees in all, at most (short): large sets get fewer epochs

    @property
    def pixels(self):
        """The side of the pictures that are read and drawn."""
        return 8 * self.size if self.latents else self.size

    @property
    def colours(self):
        """The channels of the pictures: 1 or 3."""
        return 3 if self.latents else self.channels


RECIPES = {
    # Drawn at their native 8x8: enlarged to 16x16 first, the same network needs many times the steps, for
    # most of its 256 numbers then carry noise alone. The judge has 16x16, the least that three poolings leave
    # room in. Black stays 0 under the judge's normalisation, so that augmentation fills with background.
    "digits": Recipe(
        name="digits", size=8, channels=1, latents=False, weights="",
        network="tiny", patch=2, steps=7500, batch=32, lr=4e-3, ema=.995,
        tune_steps=400, tune_epochs=0, tune_batch=64, tune_lr=1e-3, tune_beta2=.99,
        tune_ema=.99, tune_warm=True, lambda_r=.002, lambda_d=.008, guidance=2., flip=False,
        net="convnet3", judge_size=16, protocol="short", augment="color_crop_cutout_scale_rotate",
        mean=(0.,), std=(.5,), epochs=200, views=40_000),
    # Anybody's pictures, small enough for a laptop.
    "folder": Recipe(
        name="folder", size=32, channels=3, latents=False, weights="",
        network="tiny", patch=4, steps=3000, batch=32, lr=2e-3, ema=.995,
        tune_steps=400, tune_epochs=0, tune_batch=64, tune_lr=1e-3, tune_beta2=.99,
        tune_ema=.99, tune_warm=True, lambda_r=.002, lambda_d=.008, guidance=2., flip=True,
        net="convnet3", judge_size=32, protocol="short", augment="color_crop_cutout_flip_scale_rotate",
        mean=(.5, .5, .5), std=(.25, .25, .25), epochs=200, views=40_000),
    # Gu et al. 2024: 256-pixel pictures from the published DiT-XL/2. Their average starts at the published
    # weights, and still holds 30 % of them after 12,000 steps.
    "imagenet": Recipe(
        name="imagenet", size=32, channels=4, latents=True, weights="DiT-XL-2-256x256",
        network="XL", patch=2, steps=400_000, batch=256, lr=1e-4, ema=.9999,
        tune_steps=0, tune_epochs=8, tune_batch=8, tune_lr=1e-3, tune_beta2=.999,
        tune_ema=.9999, tune_warm=False, lambda_r=.002, lambda_d=.008, guidance=4., flip=True,
        net="resnetap10", judge_size=224, protocol="gu", augment="",
        mean=(.485, .456, .406), std=(.229, .224, .225), epochs=300, views=4_000_000),
}
RECIPES["imagenet512"] = replace(RECIPES["imagenet"], name="imagenet512", size=64, weights="DiT-XL-2-512x512")
# The challenge's two data sets at their own size, 256 tokens both. The judge's numbers are the challenge's.
# 16,000 steps are 82 epochs of CIFAR-100, meant to take some ten minutes of a large GPU. Of the rates 4e-4 to
# 3.2e-3 the upper two, 1.6e-3 and more, did best on a stand-in (on a CPU: 600 steps of 64 images of 8 pixels,
# a network as wide and a third as deep); the depth asks for less. All other numbers were not tuned. CIFAR-10
# was not part of the challenge.
RECIPES["cifar100"] = replace(
    RECIPES["folder"], name="cifar100", network="S", patch=2, steps=16_000, batch=256, lr=1e-3, ema=.999,
    tune_steps=0, tune_epochs=8, tune_beta2=.999, tune_ema=.9999, guidance=1.5, protocol="challenge",
    augment="", mean=(.5071, .4866, .4409), std=(.2673, .2564, .2762), epochs=200, views=1_000_000)
RECIPES["cifar10"] = replace(
    RECIPES["cifar100"], name="cifar10", mean=(.4914, .4822, .4465), std=(.2470, .2435, .2616))
RECIPES["tiny-imagenet"] = replace(
    RECIPES["cifar100"], name="tiny-imagenet", size=64, patch=4, judge_size=64, mean=(.485, .456, .406),
    std=(.229, .224, .225))


# ----------------------------------------------------------------------------------------------------
# 4. The data sets


class Data(NamedTuple):
    """name: what out/NAME is called. train, test: ImageSet or ImageFiles; test is for reporting only.

    cut: in words, which images these are.
    """
    name: str
    recipe: Recipe
    train: ImageSet | ImageFiles
    test: ImageSet | ImageFiles
    cut: str


# Subsets of ImageNet in their published order, by WordNet id: a class is found, and gets its row of the
# published weights' label table, by this name and never by its place in a directory.
IMAGENET100 = """
    n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797
    n01735189 n07831146 n07753275 n03085013 n04485082 n02105505 n01983481 n02788148 n03530642 n04435653
    n02086910 n02859443 n13040303 n03594734 n02085620 n02099849 n01558993 n04493381 n02109047 n04111531
    n02877765 n04429376 n02009229 n01978455 n02106550 n01820546 n01692333 n07714571 n02974003 n02114855
    n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251 n02701002 n03379051
    n02259212 n07715103 n03947888 n04026417 n02326432 n03637318 n01980166 n02113799 n02086240 n03903868
    n02483362 n04127249 n02089973 n03017168 n02093428 n02804414 n02396427 n04418357 n02172182 n01729322
    n02113978 n03787032 n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029
    n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630 n03584829 n02123045
    n04229816 n02100583 n03642806 n04336792 n03259280 n02116738 n02108089 n03424325 n01855672 n02090622
""".split()
SUBSETS = {
    "imagenette": "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 "
                  "n03888257".split(),
    "imagewoof": "n02096294 n02093754 n02111889 n02088364 n02086240 n02089973 n02087394 n02115641 n02099601 "
                 "n02105641".split(),
    "imageidc": IMAGENET100[:10],                               # ImageNet-10 of Kim et al. 2022 (IDC)
    "imagenet100": IMAGENET100,
    "imagenet": None,                                           # all 1,000, sorted
}
CIFARS = {"cifar10": (CIFAR10, "CIFAR-10", 10), "cifar100": (CIFAR100, "CIFAR-100", 100)}
# The names that --data knows, each with the recipe of its own. No folder of a user's may be called so.
BUILT_IN = {"digits": "digits", **{name: name for name in CIFARS}, "tiny-imagenet": "tiny-imagenet",
            **dict.fromkeys(SUBSETS, "imagenet")}
ROOTED = ("tiny-imagenet", *SUBSETS)                            # never fetched: --root is needed


def imagenet_classes():
    """The 1,000 WordNet ids, sorted: row k of the published label tables is class k of this list."""
    from timm.data import ImageNetInfo                          # a second, which digits need not pay
    return ImageNetInfo().label_names()


def class_list(name):
    """The published class list of an ImageNet subset called `name`; None of any other data set."""
    name = name.removesuffix("-validation")
    return (SUBSETS[name] or imagenet_classes()) if name in SUBSETS else None


def data_name(data, root=None, validation=False):
    """What out/NAME is called: the built-in name, or the folder's own. Raises UserError if there is none."""
    if data in BUILT_IN:
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
                            f"({', '.join(BUILT_IN)})")
        if root:
            raise UserError("--data DIR already says where the files are: leave --root out")
        name = pathlib.Path(data).resolve().name
    if name != data and name in BUILT_IN:
        meant = f", or say --data {name} --root {root or data} if it is that one" * (name != "digits")
        raise UserError(f"a folder called {name} would share out/{name} with a built-in data set: rename it"
                        + meant)
    return name + "-validation" if validation else name


def own_recipe(data):
    """The name of the recipe that --data NAME or DIR has of its own."""
    return BUILT_IN.get(data, "folder")


def load(data="digits", root=None, recipe=None, validation=False, skip_broken=False):
    """The data set called `data`, or the folder of that name, as Data.

    root: where its files are. recipe: the name of another data set's recipe, to borrow it.
    validation: hold the test split back altogether; a fixed fifth of the training split takes its place
    (and "-validation" is added to the name), so that defaults are never chosen on the test split.
    Raises UserError where there is no such data set, folder or recipe, or where a split lacks a class.
    """
    name = data_name(data, root, validation)
    recipe = RECIPES[recipe or own_recipe(data)]
    split_name = ""
    if recipe.latents and data in ("digits", *CIFARS):
        raise UserError(f"{data} is drawn as pixels: choose another --recipe")
    if data == "digits":
        train, test = digits(recipe)
    elif data in CIFARS:
        train, test, split_name = cifar(data, root, recipe, skip_broken)
    elif data == "tiny-imagenet":
        train, test, split_name = tiny_imagenet(root, recipe)
    elif data in SUBSETS:
        train, test, split_name = imagenet(data, root, recipe)
    else:
        train, test = folder(pathlib.Path(root or data), recipe, skip_broken)
    if len(train.classes) < 2:
        raise UserError(f"{name} has one class only ({train.classes[0]}); a classifier needs two")
    if validation:
        train, test = split(train, .2)
    if not recipe.latents:                                      # pixels are learned from memory
        train, test = train.read(skip_broken), test.read(skip_broken)
    cut = f"{split_name}{len(train.labels):,} images to train on, {len(test.labels):,} to test"
    return Data(name, recipe, train, test, cut)


def split(whole, fraction):
    """A fixed split that keeps the shares of the classes: (1 - fraction, fraction) of an ImageSet."""
    fewest = int(whole.labels.bincount().argmin())
    if (whole.labels == fewest).sum() < 2:
        raise UserError(f"the class {whole.classes[fewest]} has one image only: two are needed, to hold one "
                        "back")
    try:
        kept, held = train_test_split(np.arange(len(whole.labels)), test_size=fraction, random_state=0,
                                      stratify=whole.labels.numpy())
    except ValueError as error:                                 # fewer images than classes to hold back
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


def folder(root, recipe, skip_broken=False):
    """DIR/train with DIR/test or DIR/val; without those, DIR's class folders are split 80/20, said aloud.

    Two ImageSets; two ImageFiles where the recipe draws latents, whose pictures are large.
    """
    def part(path):
        if recipe.latents:
            return list_folder(path, recipe.pixels, recipe.colours)
        return read_set(path, recipe.pixels, recipe.colours, skip_broken=skip_broken)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    if (root / "train").is_dir():
        held = held_folder(root)
        train, test = part(root / "train"), part(held)
        check_classes(test.classes, train.classes, held)
        return train, test
    print(f"{root} has no train/ and test/: a fixed fifth of it is held back to test on")
    return split(part(root), .2)


def held_folder(root, names=("test", "val")):
    """ROOT/test or ROOT/val, whichever of the names comes first. Raises UserError where neither is there."""
    held = next((root / name for name in names if (root / name).is_dir()), None)
    if held is None:
        raise UserError(f"{root}/train needs {root}/{names[0]} or {root}/{names[1]} beside it")
    return held


def list_split(root, held, size, channels, title, count):
    """ROOT/train and the folder `held`, both of class folders: two ImageFiles.

    Raises UserError where they do not have the `count` classes of the data set called `title`: the names
    betray a wrong --root before a million pictures of another data set are read.
    """
    train, test = (list_folder(path, size, channels) for path in (root / "train", held))
    if len(train.classes) != count:
        raise UserError(f"{root}/train has {len(train.classes)} class folders, but {title} {count} classes")
    check_classes(test.classes, train.classes, held)
    return train, test


def cifar(name, root, recipe, skip_broken=False):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): 50,000 pictures of 32x32 to train on, 10,000 to test.

    From the class folders in ROOT/train and ROOT/test (or ROOT/val), or else from the authors' archive.
    (train, test, which split in words): two ImageSets, brought to the recipe's size and channels. Both ways
    the classes stand in alphabetical order, and CIFAR-100's are the 100 fine ones.
    """
    source, title, count = CIFARS[name]
    home = pathlib.Path(root or pathlib.Path(torch.hub.get_dir(), "datasets"))
    home = home.parent if home.name == source.base_folder else home
    if (home / "train").is_dir():
        files = list_split(home, held_folder(home), None, 3, title, count)
        train, test = (part.read(skip_broken) for part in files)
        for listed, part in zip(files, (train, test), strict=True):
            if part.images.shape[2:] != (32, 32):               # enlarged ones are another data set
                raise UserError(f"{listed.files[0]} and those beside it are not 32x32, as {title} is")
    else:
        train, test = cifar_archive(source, home)
    train, test = (part._replace(images=fit(part.images, recipe.size, recipe.channels))
                   for part in (train, test))
    return train, test, f"{title}'s own split, "


def cifar_archive(source, home):
    """The archive of torchvision's class `source` unpacked in `home`, and fetched where it is not there.

    Two ImageSets. torchvision compares the files' checksums, so that half a download is fetched again.
    Raises UserError where it cannot be had, or where `home` holds class folders and so is no place for it.
    """
    here = home / source.base_folder
    if not here.is_dir() and any(file.suffix.lower() in SUFFIXES for file in home.glob("*/*")):
        raise UserError(f"{home} holds class folders, but they should lie in {home}/train and {home}/test")
    if rank() == 0:
        try:
            source(home, train=False, download=True)
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: a checksum
            raise UserError(f"{here} is missing or damaged, and {source.url} cannot be fetched ({error}): "
                            "download and unpack it elsewhere, and point --root at the folder that holds "
                            f"{source.base_folder}") from error
    barrier()

    def part(train):
        found = source(home, train=train)
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()     # (N, 32, 32, 3) there
        return ImageSet(images, torch.tensor(found.targets), list(found.classes))
    return part(True), part(False)


def tiny_imagenet(root, recipe):
    """Tiny-ImageNet (Le & Yang 2015): 200 of ImageNet's classes at 64x64, 500 pictures each, and 50 to test.

    From the archive, whose val/ is one heap with a list of labels, or from class folders in ROOT/train and
    ROOT/val (or ROOT/test). The classes are the WordNet ids sorted, as every reader of folders has them;
    wnids.txt has an order of its own, which must not matter.
    (train, test, which split in words): ImageFiles.
    """
    if root is None:
        raise UserError("--data tiny-imagenet needs --root DIR, a folder with the archive's train/ and val/ "
                        "in it")
    root = pathlib.Path(root)
    heap, ids = root / "val" / "images", root / "wnids.txt"
    wanted = "wnids.txt, train/ and val/ of the archive, or class folders in train/ and val/"
    if not (root / "train").is_dir():
        raise UserError(f"there is no Tiny-ImageNet at {root}: it should hold {wanted}, and {root}/train is "
                        "missing")
    if not any(heap.glob("*")):                                 # somebody sorted it into class folders
        held = held_folder(root, ("val", "test"))               # the archive's test/ has no labels
        parts = list_split(root, held, recipe.pixels, recipe.colours, "Tiny-ImageNet", 200)
        return *parts, "Tiny-ImageNet's own split, "
    if not ids.is_file():
        raise UserError(f"{ids} is missing, and {root}/val has no class folders: {root} should hold {wanted}")
    classes = sorted(ids.read_text().split())
    check_folders(root / "train", classes, "Tiny-ImageNet")
    train = list_folder(root / "train", recipe.pixels, recipe.colours, classes)
    return train, annotated(heap, root / "val" / "val_annotations.txt", train), "Tiny-ImageNet's own split, "


def annotated(heap, notes, train):
    """The pictures in the folder `heap`, labelled by lines "file, wnid, box" of `notes`: ImageFiles.

    train: ImageFiles, whose classes, size and channels are taken over. Raises UserError where files, lines
    and classes do not fit together.
    """
    if not notes.is_file():
        raise UserError(f"{notes} is missing: it says which class each picture of {heap} shows")
    wnids = dict(re.findall(r"^(\S+)[ \t]+(\S+)", notes.read_text(), re.MULTILINE))
    unknown = sorted(set(wnids.values()) - set(train.classes))
    if unknown:
        raise UserError(f"{notes} names {unknown[0]}, which is no class of wnids.txt ({len(unknown)} such "
                        "names in all)")
    files = sorted(file for file in heap.glob("[!.]*") if file.suffix.lower() in SUFFIXES)
    bare = [file for file in files if file.name not in wnids]
    if bare:
        raise UserError(f"{bare[0]} has no line in {notes.name} ({len(bare)} of {len(files)} pictures have "
                        "none)")
    lost = sorted(set(wnids) - {file.name for file in files})
    if lost:
        raise UserError(f"{heap}/{lost[0]} is missing ({len(lost)} of the {len(wnids)} pictures in "
                        f"{notes.name} are)")
    empty = sorted(set(train.classes) - {wnids[file.name] for file in files})
    if empty:
        raise UserError(f"{heap} has no picture of {empty[0]} ({len(empty)} of {len(train.classes)} classes "
                        "have none)")
    labels = torch.tensor([train.classes.index(wnids[file.name]) for file in files])
    return train._replace(files=files, labels=labels)


def check_folders(path, classes, name, hint=""):
    """Refuses a folder in which class folders of the data set `name` are missing."""
    missing = [wnid for wnid in classes if not (path / wnid).is_dir()]
    if missing:
        raise UserError(f"{path}/{missing[0]} is missing, and {len(missing)} of the {len(classes)} "
                        f"classes of {name} in all{hint}")


def imagenet(name, root, recipe):
    """ROOT/train/<wnid>/*.JPEG and ROOT/val/<wnid>/*.JPEG: ImageNet's folders, or fastai's archive of some.

    (train, test, which split in words): ImageFiles of the subset's classes, whatever else lies there. The two
    sources are different data sets: ImageWoof has 12,454 training images in ImageNet, and 9,025 in fastai's
    archive, which mixes both of ImageNet's splits and cuts them anew.
    """
    if root is None:
        raise UserError(f"--data {name} needs --root DIR, a folder with ImageNet's train/ and val/ in it")
    parts, classes = [], class_list(name)
    for part in ("train", "val"):
        path = pathlib.Path(root, part)
        if not path.is_dir():
            raise UserError(f"there is no ImageNet at {root}: it should hold train/ and val/, and {path} is "
                            "missing")
        sort = " (the validation images must be sorted into class folders)" * (part == "val")
        check_folders(path, classes, name, sort)
        parts.append(list_folder(path, recipe.pixels, recipe.colours, classes))
    train, test = parts
    resplit = any(re.match(r"n\d{8}_", file.name) for file in test.files)   # a name of the training split
    return train, test, "fastai's re-split, " if resplit else "ImageNet's own split, "


# ----------------------------------------------------------------------------------------------------
# 5. Many processes (torchrun), and files from the network


def rank():
    """This process's number among all that torchrun started; 0 without it."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Waits until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def many_processes():
    """Joins the processes that torchrun started, if it did; only the first of them prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    gpus = torch.cuda.device_count()
    if 0 < gpus < int(os.environ["LOCAL_WORLD_SIZE"]):
        raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} processes are too many for {gpus} GPUs: lower "
                        "--nproc-per-node")
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            timeout=datetime.timedelta(hours=2))            # some wait while one encodes
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            yield
    finally:
        dist.destroy_process_group()


def fetch(url, name, flag):
    """The file `name` in torch's hub cache, downloaded from `url` with a progress bar where it is not there.

    Raises UserError where it cannot be had; flag is how to give it by hand.
    """
    path = pathlib.Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.is_file() and rank() == 0:
        try:
            with replacing(path) as temporary, tqdm(desc=f"fetching {name}", unit="B", unit_scale=1) as bar:
                def advance(blocks, size, total):
                    bar.total = total
                    bar.update(blocks * size - bar.n)
                urllib.request.urlretrieve(url, temporary, advance)
        except (OSError, http.client.HTTPException) as error:   # no network, no such file, a cut-off one
            raise UserError(f"cannot fetch {url} ({error}): download it elsewhere and point {flag} "
                            "at the file") from error
    barrier()
    return path


# ----------------------------------------------------------------------------------------------------
# 6. Files of tensors: safetensors, with a JSON header of ours


def fingerprint(tensors):
    """A short hash of named tensors: the same weights have the same one, wherever they lie."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_tensors(path, tensors, header):
    """Writes {name: contiguous tensor on the CPU} and a JSON header to `path`, whole or not at all.

    Raises UserError where it cannot be written.
    """
    with replacing(path) as temporary:
        try:                                                    # from the tensors to the disk, without a copy
            safetensors.torch.save_file(tensors, temporary, metadata={"nanodd": json.dumps(header)})
        except safetensors.SafetensorError as error:
            raise UserError(f"cannot write {path}: {error}") from error


def read_header(path):
    """The JSON header of a file of ours. Raises UserError where it is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["nanodd"])
    except (safetensors.SafetensorError, TypeError, KeyError, OSError, ValueError) as error:
        raise UserError(f"{path} is no checkpoint of nanoDD ({error})") from error


def load_tensors(path):
    """The {name: tensor} of a .safetensors file, on the CPU. Raises UserError where it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no .safetensors file ({error}); one that was fetched is "
                        "fetched again once it is deleted") from error


def take_weights(module, tensors, path, kind):
    """Makes {name: tensor}, of the file `path`, the weights of a module, which may be on the meta device.

    kind: what to call the module. Raises UserError, naming the file and the first tensor that is missing,
    unexpected or of another shape.
    """
    wanted = module.state_dict()
    for name in (*wanted, *tensors):
        if name not in tensors:
            wrong = "is missing"
        elif name not in wanted:
            wrong = "is unexpected"
        elif tensors[name].shape != wanted[name].shape:
            wrong = f"has shape {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
        else:
            continue
        raise UserError(f"{path} does not fit the {kind}: {name} {wrong}")
    module.load_state_dict(tensors, assign=True)


# ----------------------------------------------------------------------------------------------------
# 7. The command line that all stages share


FLAGS = {
    "data": dict(default="digits", metavar="NAME|DIR",
                 help=f"{', '.join(BUILT_IN)}, or a folder of class folders (default: %(default)s)"),
    "root": dict(metavar="DIR", help="where the files are: of ImageNet, Tiny-ImageNet or CIFAR (fetched "
                                     "where it is not there), or with --data folder"),
    "recipe": dict(choices=sorted(RECIPES), help="borrow another data set's recipe"),
    "validation": dict(action="store_true",
                       help="put the test split away and test on a fifth of the training split: "
                            "for choosing"),
    "out": dict(type=pathlib.Path, metavar="DIR", help="where results go (default: out/NAME)"),
    "seed": dict(type=int, default=0, help="of everything random (default: %(default)s)"),
    "device": dict(default="auto", help="cpu, cuda, cuda:N or mps (default: the fastest here)"),
    "overwrite": dict(action="store_true", help="replace what other settings made"),
    "skip-broken": dict(action="store_true", help="leave out images that cannot be read (they are named)"),
    "vae": dict(default="ema", metavar="ema|mse|FILE",
                help="what encodes pictures, where the recipe draws latents: one of stabilityai's two "
                     "autoencoders, fetched once, or a file (default: %(default)s)"),
    "bf16": dict(action=argparse.BooleanOptionalAction,
                 help="bfloat16 arithmetic, one of a run's settings (default: where it is faster)"),
    "compile": dict(action="store_true",
                    help="torch.compile the network: slower for a minute, then faster"),
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
    flags += ["--root", args.root or "DIR"] if args.root or args.data in ROOTED else []
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
    words = [re.sub(r"^(--[\w-]+=)?(/.*)", lambda found: (found[1] or "") + os.path.relpath(found[2]), word)
             for word in words]
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
    add_flags(parser, "data root recipe validation skip-broken")
    args = parser.parse_args(argv)
    with one_sentence(parser):
        name, recipe, train, test, cut = load(args.data, args.root, args.recipe, args.validation,
                                              args.skip_broken)
        print(f"{name} | {cut} | {len(train.classes)} classes: {', '.join(train.classes[:12])}")
        for part, images in (("train", train), ("test", test)):
            counts = Counter(images.labels.tolist())
            what = f"files, read at {images.size} px" if isinstance(images, ImageFiles) else \
                f"{tuple(images.images.shape)} {images.images.dtype}"
            print(f"{part:5} | {what} | {min(counts.values())} to {max(counts.values())} images a class")
        print("recipe | "
              + " ".join(f"{field.name}={getattr(recipe, field.name)}" for field in fields(recipe)))
        print(f"-> python minimax.py{same_data(args, '--recipe')}" + " --skip-broken" * args.skip_broken)


if __name__ == "__main__":
    main()
