"""Sets of images in an .npz file, as sample.py --npz writes them and as others save them.

    images (N, C, H, W) uint8, C 1 or 3      labels (N,) or (N, 1) integers in 0..K-1      classes (K,) names

An .npz is a zip archive of .npy files. A few kilobytes of one can claim to unpack to terabytes, and pickled
objects in it could run code. The headers of all three arrays are therefore checked before any is unpacked,
and objects are refused.
"""
import io
import math
import os
import zipfile
from typing import NamedTuple

import numpy as np
import torch

from nanodd import files
from nanodd.errors import UserError
from nanodd.schema import check_names, reading, shown

WANTED = "images (N, C, H, W) uint8, labels (N,) integers in 0..K-1 and classes (K,) names are wanted"
HEAD = 2**14                   # bytes of an array that hold its header: numpy reads at most 10,000
BOMB = 10**9, 100              # bytes; packed sizes: an array that unpacks to more of both is not read
KINDS = {"b": "bool", "S": "text", "U": "text", "V": "records", "O": "Python objects"}


class Header(NamedTuple):
    """What an array is, before it is unpacked."""
    shape: tuple
    dtype: np.dtype

    def __str__(self):
        kind = "Python objects" if self.dtype.hasobject else KINDS.get(self.dtype.kind, self.dtype.name)
        return f"{kind} {shown(self.shape)}" if self.shape else f"{kind}, a single value"


def read(path):
    """The file `path` -> (images (N, C, H, W) uint8, labels (N,) int64, list of K class names).

    The images are not copied. Raises UserError, which says what was found and what is wanted, where the
    file is damaged, cannot be read or holds something else.
    """
    check_archive(path)
    with reading(path, "set of images (.npz)", f"; {WANTED}"), zipfile.ZipFile(path) as archive:
        headers = {name: header(archive, name, path) for name in ("images", "labels", "classes")}
        for name, wrong in (("images", wrong_images(headers["images"])),
                            ("labels", wrong_labels(headers["labels"], headers["images"].shape[:1])),
                            ("classes", wrong_classes(headers["classes"]))):
            if wrong:
                raise UserError(f"{path}: {name} are {headers[name]}, but {wrong}")
        classes = class_names(unpacked(archive, "classes"), path)
        labels = unpacked(archive, "labels").reshape(-1)                    # (N,)
        if labels.min() < 0 or labels.max() >= len(classes):                # int64 would wrap uint64 round
            raise UserError(f"{path}: labels lie in {labels.min()}..{labels.max()}, but must lie in "
                            f"0..{len(classes) - 1}, the positions of the {len(classes)} classes")
        images = torch.from_numpy(unpacked(archive, "images"))              # (N, C, H, W)
        return images, torch.from_numpy(labels.astype(np.int64)), classes


# ----------------------------------------------------------------------------------------------------
# 1. The archive and its members


def check_archive(path):
    """Raises UserError where `path` is no zip archive, and says what it is."""
    if not path.is_file():
        raise UserError(f"{path} is not a file, but an .npz with images, labels and classes is wanted")
    try:
        found = files.foreign(path)
        with open(path, "rb") as file:
            head = file.read(6)
        if found is None and not zipfile.is_zipfile(path):
            found = ("it is a single array (.npy)" if head == b"\x93NUMPY" else
                     "it is cut off" if head.startswith(b"PK\3\4") else "it is not a zip archive")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if found:
        raise UserError(f"{path} is not an .npz: {found}; {WANTED}, saved by np.savez")


def header(archive, name, path):
    """The Header of the array `name`, of which only the first bytes are unpacked.

    Raises UserError where the array is missing, encrypted, too large, or of another size than it declares.
    """
    if f"{name}.npy" not in archive.NameToInfo:
        members = [member.removesuffix(".npy") for member in archive.namelist()]
        raise UserError(f"{path} lacks {name}: it holds {', '.join(map(shown, members[:8])) or 'nothing'}"
                        f"{', ...' * (len(members) > 8)}; {WANTED}")
    member = archive.getinfo(f"{name}.npy")
    if member.flag_bits & 1:
        raise UserError(f"{path}: {name} are encrypted, but must be saved without a password")
    with archive.open(member) as file:
        head = io.BytesIO(file.read(HEAD))
    read_header = (np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(head) == (1, 0)
                   else np.lib.format.read_array_header_2_0)    # (3, 0) differs in its letters alone
    try:
        shape, _, dtype = read_header(head)
    except (MemoryError, RecursionError) as error:              # Python's parser, where brackets nest deeply
        raise ValueError(f"the header of {name} is no header") from error
    size = member.file_size - head.tell()
    fits = math.prod(shape) * dtype.itemsize == size and min(shape, default=0) >= 0
    if not dtype.hasobject and not (fits and dtype.itemsize):   # a billion texts of no letters take no bytes
        raise UserError(f"{path} is damaged: {name} are {Header(shape, dtype)}, but such an array does not "
                        f"take the {size:,} bytes that are there")
    if member.compress_size > os.path.getsize(path):
        raise UserError(f"{path} is damaged: {name} should take {member.compress_size:,} bytes of the file, "
                        f"which has {os.path.getsize(path):,}")
    if member.file_size > BOMB[0] and member.file_size > BOMB[1] * member.compress_size:
        raise UserError(f"{path}: {name} would unpack from {member.compress_size:,} to {member.file_size:,} "
                        f"bytes, and at most {BOMB[1]} times the packed size is read: save the arrays by "
                        "np.savez, which does not pack them")
    return Header(shape, dtype)


def unpacked(archive, name):
    """The array `name`, whose header was checked."""
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


# ----------------------------------------------------------------------------------------------------
# 2. What each array must be


def wrong_images(found):
    """Why the array of this header cannot be the images, and how to convert it; None where it can be."""
    shape, dtype = found
    if dtype.kind == "f":
        return "must be uint8: (images * 255).round().astype(np.uint8) converts values in 0..1"
    if dtype.kind in "iu" and dtype != np.uint8:
        return "must be uint8: images.astype(np.uint8) converts values in 0..255"
    if dtype != np.uint8:
        return "must be uint8 (N, C, H, W) with 1 or 3 channels C"
    if len(shape) == 3:
        return "must be (N, C, H, W): images[:, None] adds the one channel of grey images"
    if len(shape) == 4 and shape[1] not in (1, 3) and shape[3] in (1, 3):
        return "must be (N, C, H, W): images.transpose(0, 3, 1, 2) converts (N, H, W, C)"
    if len(shape) != 4 or shape[1] not in (1, 3):
        return "must be (N, C, H, W) with 1 or 3 channels C"
    return None if math.prod(shape) else "the number of images and both sides must be at least 1"


def wrong_labels(found, count):
    """Why the array of this header cannot be the labels of `count` (N,) images; None where it can be."""
    shape, dtype = found
    if len(shape) == 0:
        return f"one label for each of the {count[0]} images is wanted"
    if dtype.kind in "SU":
        return "must be positions in classes: np.array([list(classes).index(name) for name in labels])"
    if dtype.kind in "fiub" and len(shape) == 2 and shape[1] > 1:
        return "one class for each image is wanted: labels.argmax(1) converts one-hot or soft labels"
    if dtype.kind not in "iu":
        return "must be integers, the positions in classes (labels.astype(np.int64) where they are whole)"
    return None if shape in (count, (*count, 1)) else f"one label for each of the {count[0]} images is wanted"


def wrong_classes(found):
    """Why the array of this header cannot be the class names; None where it can be."""
    if found.dtype.kind not in "USiu":
        return "must be (K,) names as text: np.array(classes, dtype=str)"
    return None if len(found.shape) == 1 else "must be (K,), one name for each class"


def class_names(names, path):
    """(K,) text, UTF-8 bytes or integers -> list of K names. Raises UserError as check_names."""
    try:
        classes = [name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the class {shown(error.object)} is no UTF-8 text: save the classes with "
                        "dtype=str") from error
    check_names(classes, path)
    return classes
