"""The two ways to store a distilled set: a PNG file for each image, or one .npz for all.

items: a list of (label, index); images: (n, C, H, W) uint8. A store writes through no link, and removes only
files that have the names which it gives, in the folders of its classes: what a user put beside them stays.
Both have the same methods:

    claim()                 before anything is written: removes what killed processes left
    exists()                whether images are there
    contains(items)         whether this block, as it was drawn, is there
    is_resumable()          whether a stopped run left blocks
    is_complete(ipc)        whether a finished set of ipc images a class is all there
    write(items, images)    a block
    finalise(items)         makes these images the set
    remove_parts()          removes what was needed until then
    images(items)           reads them again
    remove()                removes the set
"""
import os
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nanodd import files, locks, schema
from nanodd.data import imageset


class PngFolder:
    """A file for each image, distilled/<class>/00000.png ..., which torchvision's ImageFolder reads."""
    FINALISE = 0               # seconds of `finalise` per second of all writing before it

    def __init__(self, out, classes):
        self.path, self.classes = out / "distilled", classes
        self.folders = [self.path / name for name in classes]

    def file(self, label, index):
        return self.folders[label] / f"{index:05}.png"

    def listed(self):
        """All files in the folder and below: a set of those named as this store's, a list of the others."""
        own, others, folders = set(), [], set(map(str, self.folders))
        for place, _, names in os.walk(self.path):
            for name in names:
                if place in folders and re.fullmatch(r"\d{5,}\.png", name):
                    own.add(pathlib.Path(place, name))
                else:
                    others.append(pathlib.Path(place, name))
        return own, sorted(others)

    def claim(self):
        """Removes what killed processes left. Raises UserError where a folder is a link to another place."""
        for folder in (self.path, *self.folders):
            locks.refuse_link(folder)
            locks.remove_leftovers(folder)

    def exists(self):
        return bool(self.listed()[0])

    def contains(self, items):
        return all(self.file(*item).is_file() for item in items)

    def is_resumable(self):
        return self.exists()

    def is_complete(self, ipc):
        return all(self.file(label, index).is_file() for index in range(ipc)
                   for label in range(len(self.classes)))

    def write(self, items, images):
        with ThreadPoolExecutor() as pool:                      # encoding a 256-pixel PNG takes 10 ms
            list(pool.map(imageset.write_png, [self.file(*item) for item in items], images))

    def finalise(self, items):
        """Removes all images but `items`: those of the round that was not finished."""
        own, others = self.listed()
        for file in own - {self.file(*item) for item in items}:
            file.unlink()
        say_left(self.path, others)

    def remove_parts(self):
        """Nothing: no block has a file of its own."""

    def images(self, items):
        with schema.reading(self.path, "set of images", ": move it away"):
            return torch.stack([imageset.open_image(self.file(*item), channels=None) for item in items])

    def remove(self):
        own, others = self.listed()
        for file in own:
            file.unlink()
        files.remove_empty(*self.folders, self.path)
        say_left(self.path, others)


class NpzFile:
    """distilled.npz (images, labels, classes), for sets too large for a file per image.

    Each block is a file in distilled.npz.parts until all are drawn and joined; distilled.json says whether
    they are.
    """
    FINALISE = 8               # 6 was measured, on 200,000 images of 32 pixels, whose writing was cached

    def __init__(self, out, classes):
        self.path, self.parts, self.classes = out / "distilled.npz", out / "distilled.npz.parts", classes

    def part(self, items):
        label, index = items[0]
        return self.parts / f"{index * len(self.classes) + label:09}.npy"

    def own_parts(self):
        """The files of all blocks, in the order of the images."""
        return sorted(file for file in self.parts.glob("*.npy") if re.fullmatch(r"\d{9,}", file.stem))

    def claim(self):
        """Removes what killed processes left. Raises UserError where the parts are behind a link."""
        locks.refuse_link(self.parts)
        locks.remove_leftovers(self.parts)

    def exists(self):
        return self.path.exists() or bool(self.own_parts())

    def contains(self, items):
        part = self.part(items)
        if not part.is_file():
            return False
        with schema.reading(part, "block of images", ": delete it, and it is drawn again"):
            return len(np.load(part, mmap_mode="r")) == len(items)

    def is_resumable(self):
        return self.part([(0, 0)]).is_file()

    def is_complete(self, ipc):
        return self.path.is_file()

    def write(self, items, images):
        with files.atomic_write(self.part(items)) as temporary, open(temporary, "wb") as file:
            np.save(file, images.numpy())

    def finalise(self, items):
        """Joins the blocks, in the order of the images, without the images after `items`."""
        blocks, position = [], 0
        for part in self.own_parts():
            if position >= len(items):
                break                                           # of a larger set, or behind a gap
            with schema.reading(part, "block of images", ": delete it, and it is drawn again"):
                blocks.append(np.load(part))
                if (int(part.stem), blocks[-1].dtype, blocks[-1].shape[1:]) != (position, np.uint8,
                                                                                blocks[0].shape[1:]):
                    raise ValueError("it does not follow the one before it")
            position += len(blocks[-1])
        images = np.concatenate(blocks)[:len(items)]            # (N, C, H, W)
        with files.atomic_write(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, images=images, labels=[label for label, _ in items], classes=self.classes)

    def remove_parts(self):
        """Removes the blocks' files, the first one first: without it no run resumes from the others."""
        for part in self.own_parts():
            part.unlink()
        files.remove_empty(self.parts)

    def images(self, items):
        with schema.reading(self.path, "set of images", ": move it away"), np.load(self.path) as arrays:
            positions = [index * len(self.classes) + label for label, index in items]
            return torch.from_numpy(arrays["images"][positions])

    def remove(self):
        self.remove_parts()
        self.path.unlink(missing_ok=True)


def say_left(folder, others):
    """Prints that files of a user are in the set's folder, where there are any."""
    if others:
        print(f"left as they are: other files in {folder}, {len(others)} in all (first: {others[0]})")
