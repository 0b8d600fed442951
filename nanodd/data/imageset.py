"""A set of images: one uint8 tensor, one label tensor, and the class names in label order.

    images (N, C, H, W) uint8        labels (N,) int64 in 0..K-1        classes: K names

Small pictures are decoded once, into memory (ImageSet); of larger ones the paths are stored (ImageFiles).
In files a class is identified by its name, and its label is its position in `classes`: a folder that lacks a
class is therefore an error and never shifts the labels.
"""
import hashlib
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from nanodd import files
from nanodd.data import npz, pictures
from nanodd.data.pictures import SUFFIXES
from nanodd.errors import UserError, printable

# ----------------------------------------------------------------------------------------------------
# 1. The two kinds of set


class ImageSet(NamedTuple):
    """images: (N, C, H, W) uint8. labels: (N,) int64 in 0..K-1. classes: list of K names, in label order."""
    images: torch.Tensor
    labels: torch.Tensor
    classes: list

    def pick(self, index):
        """The images at `index`, a (n,) tensor of positions or a boolean mask."""
        return ImageSet(self.images[index], self.labels[index], self.classes)

    def to(self, device):
        """The same set on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)

    def read(self):
        """The set itself, which is in memory already."""
        return self

    def examples(self, index, mirrored, rng):
        """Training images of the diffusion model at `index` (B,): (B, C, H, W) float in [-1, 1].

        mirrored: (B,) bool, or None to mirror none. rng is not used here, but by latents.Latents.
        """
        x = to_float(self.images[index])
        return x if mirrored is None else torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)


class ImageFiles(NamedTuple):
    """An ImageSet on disk, with N paths in place of images; read() decodes them to (channels, size, size).

    labels: (N,) int64 in 0..K-1. classes: list of K names, in label order. skip_broken: whether images that
    cannot be read are left out.
    """
    files: list
    labels: torch.Tensor
    classes: list
    size: int
    channels: int
    skip_broken: bool = False

    def pick(self, index):
        """The files at `index`, a (n,) tensor of positions or a boolean mask."""
        positions = torch.arange(len(self.files))[index.cpu()]
        return self._replace(files=[self.files[i] for i in positions], labels=self.labels[positions])

    def to(self, device):
        """The set itself: files are on no device."""
        return self

    def read(self):
        """Decodes all files, several at a time, and returns an ImageSet.

        Raises UserError where images cannot be read and skip_broken is false (it names the first and counts
        them), where no image can be read, or where they have several sizes.
        """
        def attempt(path):
            try:
                return open_image(path, self.size, self.channels)
            except UserError as error:
                return error
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(attempt, self.files))
        broken = [image for image in images if isinstance(image, UserError)]
        if broken and not self.skip_broken:
            raise UserError(f"{broken[0]} ({len(broken)} of {len(images)} images cannot be read; "
                            "--skip-broken leaves them out)")
        for error in broken:
            print(printable(f"left out: {error}"), file=sys.stderr)
        readable = torch.tensor([isinstance(image, torch.Tensor) for image in images])
        images = [image for image in images if isinstance(image, torch.Tensor)]
        if len({image.shape for image in images}) > 1:
            raise UserError(f"the images beside {self.files[0]} have several sizes: resize them to one")
        if not images:
            raise UserError(f"none of the images beside {self.files[0]} can be read")
        return ImageSet(torch.stack(images), self.labels[readable], self.classes)


def fingerprint(train, times=False):
    """A fingerprint of a set: of images, labels and classes; of files by name, size and (if `times`) time.

    It is one of a run's settings, so that a run on other pictures is never resumed as this one.
    """
    facts = [train.classes]
    if isinstance(train, ImageFiles):
        for file in train.files:
            stat = file.stat()
            facts.append((file.parent.name, file.name, stat.st_size, stat.st_mtime_ns if times else None))
    else:
        facts.append(files.fingerprint({"images": train.images, "labels": train.labels}))
    names = " ".join(train.classes)[:60].encode(errors="backslashreplace").decode()  # invalid UTF-8, too
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16] + " " + names


# ----------------------------------------------------------------------------------------------------
# 2. One image


def to_float(images):
    """uint8 0..255 -> float in [-1, 1], what the diffusion model learns."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1] (clipped to it) -> uint8 0..255, the inverse of to_float."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def open_image(path, size=None, channels=3):
    """One image file of any mode -> (channels, H, W) uint8; with `size`, resized and centre-cropped to it.

    channels: 1 (grey), 3 (colour) or None (as the file has it).
    Transparent images are composed over white; 16-bit grey is scaled by 1/257, where PIL's own conversion
    clips it; a camera's rotation flag is applied. Raises UserError, naming the file, where it cannot be read.
    """
    with pictures.decoded(path, size) as image:
        if image.mode.startswith("I"):
            grey = np.asarray(image).clip(0, 65535).astype(np.int32)
            grey += 128                                         # with it // rounds; 257 is odd: no halves
            grey //= 257                                        # in place, as a scan may have 10^8 pixels
            image = Image.fromarray(grey.astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if channels is not None or image.mode not in ("L", "RGB"):
            image = image.convert("L" if channels == 1 else "RGB")
        if size and image.size != (size, size):
            image = to_square(image, size, image.height, image.width)
        pixels = torch.from_numpy(np.array(image))                          # (H, W) or (H, W, 3)
        return pixels.view(*pixels.shape[:2], -1).permute(2, 0, 1)          # (C, H, W)


def to_square(images, size, height, width):
    """A PIL image, or (N, C, height, width), resized (bicubic) and centre-cropped to (size, size).

    A side over 16 times the other is cut first: resized whole, 60000x1 pixels would be 16 GB.
    """
    from torchvision.transforms import functional as TF         # a slow import: only where it is needed
    longest = 16 * min(height, width)
    if max(height, width) > longest:
        images = TF.center_crop(images, [min(height, longest), min(width, longest)])
    return TF.center_crop(TF.resize(images, size, TF.InterpolationMode.BICUBIC), size)


def write_png(path, image, chunks=None):
    """(C, H, W) uint8 -> a PNG file, written atomically. chunks: its text, a PIL.PngImagePlugin.PngInfo."""
    with files.atomic_write(path) as temporary:
        pixels = image.permute(1, 2, 0).squeeze(2).numpy()                  # (H, W) or (H, W, 3)
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=chunks)


def resize_and_crop(images, size, channels):
    """uint8 (N, 1 or 3, H, W) -> (N, channels, size, size), centre-cropped; size None keeps the size."""
    if images.shape[1] > channels:
        from torchvision.transforms import functional as TF
        images = TF.rgb_to_grayscale(images)
    images = images.expand(-1, channels, -1, -1)
    if size and tuple(images.shape[2:]) != (size, size):
        images = to_square(images, size, *images.shape[2:])
    return images


# ----------------------------------------------------------------------------------------------------
# 3. Folders of class folders, and .npz files


def read_set(path, size=None, channels=3, classes=None, skip_broken=False):
    """Reads a folder of class folders, or an .npz with images, labels and classes, as an ImageSet.

    size, channels: of the returned images, as in open_image. classes: the names in label order; a folder
    that lacks one of them or has another is an error. Without it the sorted folder names are the classes.
    Raises UserError for a missing or empty folder, an unreadable image that is not to be skipped, a class
    without images, or an .npz with other contents.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}")
    if path.suffix != ".npz" and not path.is_dir():
        raise UserError(f"{path} is neither a folder of class folders nor an .npz")
    if path.suffix == ".npz":
        images, labels, names = npz.read(path)
        dataset = ImageSet(resize_and_crop(images, size, channels), labels, names)
    else:
        dataset = list_folder(path, size, channels)._replace(skip_broken=skip_broken).read()
    classes = list(classes or dataset.classes)
    check_classes(dataset.classes, classes, path)
    position = torch.tensor([classes.index(name) for name in dataset.classes])
    dataset = ImageSet(dataset.images, position[dataset.labels], classes)
    empty_classes = [classes[c] for c in range(len(classes)) if not (dataset.labels == c).any()]
    if empty_classes:
        raise UserError(f"{path} has no images of {', '.join(empty_classes)}")
    return dataset


def check_classes(found, wanted, path):
    """Raises UserError where the class names in `path`, found, are not those of the data set, wanted."""
    missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unexpected:
        differences = [f"missing {some(missing)}"] * bool(missing)
        differences += [f"unexpected {some(unexpected)}"] * bool(unexpected)
        raise UserError(f"{path} has other classes than the data set: {', '.join(differences)}")


def some(names):
    """The first three names and how many there are, for a message."""
    return ", ".join(map(repr, names[:3])) + f", ... ({len(names)} in all)" * (len(names) > 3)


def list_folder(path, size, channels, classes=None):
    """A folder of class folders -> ImageFiles. Classes (unless they are given) and files are sorted by name.

    Raises UserError where there are no class folders, or no images in one of them.
    """
    paths, labels, passed_over = [], [], []
    try:
        if classes is None:
            classes = sorted(entry.name for entry in path.iterdir()
                             if entry.is_dir() and not entry.name.startswith("."))
        if not classes:
            raise UserError(f"{path} holds no class folders (expected {path}/<class>/<image>.png)")
        for label, name in enumerate(classes):
            class_files, others = pictures.image_files(path / name)
            if not class_files:
                raise UserError(f"the class folder {path / name} holds no images ({', '.join(SUFFIXES)})")
            paths += class_files
            labels += [label] * len(class_files)
            passed_over += others
    except OSError as error:
        raise UserError(f"cannot list {error.filename or path}: {error.strerror}") from error
    if passed_over:
        first = passed_over[0].relative_to(path)
        print(f"skipped {len(passed_over)} files in {path} (first: {first}): broken links, or other formats "
              f"than {', '.join(SUFFIXES)}")
    return ImageFiles(paths, torch.tensor(labels), classes, size, channels)


def test_folder(root, names=("test", "val")):
    """The first of ROOT/test and ROOT/val that is a folder. Raises UserError where neither is."""
    test = next((root / name for name in names if (root / name).is_dir()), None)
    if test is None:
        raise UserError(f"{root}/train needs {root}/{names[0]} or {root}/{names[1]} beside it")
    return test


def split_folders(root, held, size, channels, title, count):
    """ROOT/train and the folder `held`, both of class folders: two ImageFiles.

    Raises UserError where they do not have the `count` classes of the data set called `title`, so that a
    wrong --root is noticed before a million pictures of another data set are read.
    """
    train, test = (list_folder(path, size, channels) for path in (root / "train", held))
    if len(train.classes) != count:
        raise UserError(f"{root}/train has {len(train.classes)} class folders, but {title} {count} classes")
    check_classes(test.classes, train.classes, held)
    return train, test


def check_folders(path, classes, name, hint=""):
    """Raises UserError, with `hint` at its end, where `path` lacks class folders of the data set `name`."""
    missing = [wnid for wnid in classes if not (path / wnid).is_dir()]
    if missing:
        raise UserError(f"{path}/{missing[0]} is missing, and {len(missing)} of the {len(classes)} "
                        f"classes of {name} in all{hint}")
