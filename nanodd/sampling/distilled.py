"""The distilled set on disk, filled block by block until an image count or a budget of seconds is reached.

Image number p is of class p mod K, index p div K: rounds of one image a class, so that the set is balanced
wherever it stops. A block is `batch` consecutive numbers (the last block may be shorter), drawn as one batch;
a block that was not finished is drawn again from its first image.
"""
import itertools
import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from nanodd import files, processes
from nanodd.data import imageset
from nanodd.errors import UserError
from nanodd.networks import checkpoint
from nanodd.sampling import sheets

clock = time.monotonic         # seconds; tests replace it, so that no outcome depends on a machine's speed

# ----------------------------------------------------------------------------------------------------
# 1. Blocks, and the two ways to store them
#
# Both stores have the same methods. items: a list of (label, index); images: (n, C, H, W) uint8.


def block(number, batch, classes, total=math.inf):
    """The (label, index) of each image in block `number`, of `total` images in all; [] after the last."""
    first, last = number * batch, min((number + 1) * batch, total)
    return [(p % classes, p // classes) for p in range(first, last)] if first < last else []


def waves(batch, classes, total):
    """Yields one wave after the other: a list of blocks, one for each process."""
    for first in itertools.count(step=processes.world()):
        blocks = [block(first + rank, batch, classes, total) for rank in range(processes.world())]
        if not blocks[0]:
            return
        yield blocks


class PngFolder:
    """A file for each image, distilled/<class>/00000.png ..., which torchvision's ImageFolder reads."""
    FINALISE = 0               # seconds of `finalise` per second of all writing before it

    def __init__(self, out, classes):
        self.path, self.classes = out / "distilled", classes

    def file(self, label, index):
        return self.path / self.classes[label] / f"{index:05}.png"

    def contains(self, items):
        return all(self.file(*item).is_file() for item in items)

    def is_resumable(self):
        return self.path.exists()

    def is_complete(self, ipc):
        return self.contains(block(0, ipc * len(self.classes), len(self.classes)))

    def write(self, items, images):
        with ThreadPoolExecutor() as pool:                      # encoding a 256-pixel PNG takes 10 ms
            list(pool.map(imageset.write_png, [self.file(*item) for item in items], images))

    def finalise(self, items):
        """Removes all images but `items`: those of the round that was not finished."""
        for extra in set(self.path.glob("*/*.png")) - {self.file(*item) for item in items}:
            extra.unlink()

    def remove_parts(self):
        """Nothing: no block has a file of its own."""

    def images(self, items):
        return torch.stack([imageset.open_image(self.file(*item), channels=None) for item in items])

    def remove(self):
        if self.path.exists():
            shutil.rmtree(self.path)


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

    def contains(self, items):
        part = self.part(items)
        return part.is_file() and len(np.load(part, mmap_mode="r")) == len(items)

    def is_resumable(self):
        return self.parts.exists()

    def is_complete(self, ipc):
        return self.path.is_file()

    def write(self, items, images):
        with files.atomic_write(self.part(items)) as temporary, open(temporary, "wb") as file:
            np.save(file, images.numpy())

    def finalise(self, items):
        """Joins the blocks, in the order of the images, without the images after `items`."""
        images = np.concatenate([np.load(part) for part in sorted(self.parts.glob("*.npy"))])[:len(items)]
        with files.atomic_write(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, images=images, labels=[label for label, _ in items], classes=self.classes)

    def remove_parts(self):
        """Removes the blocks' files. Their folder is renamed first: a half-empty one would be resumed."""
        trash = self.parts.with_suffix(".old")
        shutil.rmtree(trash, ignore_errors=True)
        if self.parts.exists():
            self.parts.rename(trash)
            shutil.rmtree(trash)

    def images(self, items):
        with np.load(self.path) as arrays:
            positions = [index * len(self.classes) + label for label, index in items]
            return torch.from_numpy(arrays["images"][positions])

    def remove(self):
        self.remove_parts()
        self.path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------
# 2. Filling a store, to a number of images or to the end of a budget


class TooShort(UserError):
    """The budget is too short for an image of each class."""


def fill(draw, store, record, total, budget, batch, save):
    """Draws block after block into `store`, until `total` images exist or `budget` seconds have passed.

    A block starts only if the longest block so far, and joining all of them, would still fit into the budget:
    the end is late by what the last block takes longer than all before it. Of several processes each draws
    one block of every wave, and all stop after the same wave. The first block of a process takes longer,
    since it warms up: its time is not used once there is a second one.
    draw: items -> (n, C, H, W) uint8. record: what is written to distilled.json; its "seconds" (wall clock
    from the first batch to the last file on disk) are added up over resumed runs, as are the seconds of the
    "longest" block and of all "writing". save: writes the record.
    Returns the (label, index) of the images of all complete rounds; other images are removed. Raises TooShort
    where the budget holds no round, and UserError where it was spent before.
    """
    longest_before = longest = record.get("longest", 0.0)
    if record["seconds"] - longest_before > budget:             # the last block may have ended late
        raise UserError(f"{record['seconds']:.1f} seconds are spent already, more than the budget of "
                        f"{budget:g}: raise it, or choose --out ELSEWHERE")
    K, done, wave, num_drawn, writing = len(record["classes"]), 0, 0, 0, record.get("writing", 0.0)
    start, quiet = clock() - record["seconds"], True if processes.rank() else None
    with tqdm(total=None if math.isinf(total) else total, disable=quiet, leave=False, unit="image") as bar:
        for blocks in waves(batch, K, total):
            own = blocks[processes.rank()]                      # empty on the last processes of the last wave
            needed = bool(own) and not store.contains(own)
            if processes.max_over_processes(needed):
                started = clock()
                end = started - start + longest + store.FINALISE * writing
                if processes.max_over_processes(end > budget) and done > 0:
                    break
                if needed:
                    images = draw(own)
                    writing -= clock()
                    store.write(own, images)
                    writing += clock()
                block_seconds, num_drawn = processes.max_over_processes(clock() - started), num_drawn + 1
                longest = max(longest_before if num_drawn <= 2 else longest, block_seconds)
                record.update(seconds=clock() - start,
                              longest=longest_before if num_drawn == 1 else longest, writing=writing)
                save(record)
            done, wave = done + sum(map(len, blocks)), wave + 1
            bar.update(sum(map(len, blocks)))
    if done < K or wave == 1 and processes.max_over_processes(record["seconds"] > budget):
        raise TooShort(f"the budget of {budget:g} seconds is too short for one image of each class: the "
                        f"first {done} took {record['seconds']:.2g} seconds. Raise --seconds, "
                        "or lower --batch")
    items = block(0, done // K * K, K)                          # of the complete rounds
    if processes.rank() == 0:
        store.finalise(items)
    processes.barrier()
    record["seconds"] = clock() - start
    return items


# ----------------------------------------------------------------------------------------------------
# 3. The set and its record


class Place:
    """A distilled set in the folder `out`: its images, distilled.json and the contact sheet distilled.png."""

    def __init__(self, out, classes, npz=False):
        self.out, self.classes = out, classes
        self.stores = PngFolder(out, classes), NpzFile(out, classes)
        self.store = self.stores[npz]
        self.path, self.sheet = self.store.path, out / "distilled.png"
        self.record_path, self.record = out / "distilled.json", None

    def open(self, fresh, overwrite):
        """Reads the record; the dict `fresh` takes its place where there is none or it may be overwritten."""
        self.record = processes.on_first_process(
            lambda: open_record(self.record_path, fresh, self.stores, overwrite))

    def overwrite(self):
        """Removes the set and its record."""
        processes.on_first_process(lambda: remove_set(self.record_path, self.stores))

    def holds(self, ipc, budget):
        """Whether the set is finished, with at least `ipc` images a class or under at least this budget."""
        enough = self.record["ipc"] >= ipc or self.record["budget"] >= budget
        holds = enough and processes.on_first_process(lambda: self.store.is_complete(self.record["ipc"]))
        if holds:
            processes.on_first_process(self.store.remove_parts)  # a stopped run may have left them
        return holds

    def save(self, record):
        """Writes the record to distilled.json, on the first process."""
        if processes.rank() == 0:
            files.save_json(self.record_path, record)

    def fill(self, draw, ipc, budget, batch, command):
        """Draws the missing images, and writes record and contact sheet; returns the number of images.

        The arguments are those of the function `fill`, but for ipc: images a class; and command: as typed.
        """
        record, K = self.record, len(self.classes)
        if self.holds(ipc, budget):
            return record["ipc"] * K
        if not processes.on_first_process(self.store.is_resumable):  # no block yet, or all were joined
            record.update(seconds=0.0, longest=0.0, writing=0.0)
        record.update(command=command, ipc=0, budget=0.0)       # unfinished, until the end
        self.save(record)
        items = fill(draw, self.store, record, ipc * K, budget, batch, self.save)
        record.update(ipc=len(items) // K, budget=0.0 if math.isinf(budget) else budget)
        columns = min(10, record["ipc"])
        sheet_items = [(label, index) for label in range(min(20, K)) for index in range(columns)]
        if processes.rank() == 0:
            sheet = sheets.grid(self.store.images(sheet_items), columns)    # a row for each class
            imageset.write_png(self.sheet, sheet)
            self.save(record)                                   # it is finished from here on
            self.store.remove_parts()
        return len(items)


def open_record(path, fresh, stores, overwrite):
    """The record in distilled.json to resume, or `fresh` where there is none or it may be overwritten.

    Raises UserError where other settings made it, or where there are images without a record.
    """
    if not path.is_file():
        for store in stores:
            if store.path.exists():
                raise UserError(f"{store.path} is there, but no {path.name} says what it is: "
                                "choose --out ELSEWHERE, or remove it")
        return fresh
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): choose --out ELSEWHERE, or remove it") from error
    if record.get("settings") == fresh["settings"]:
        return record
    if not overwrite:
        checkpoint.check_settings(record.get("settings", {}), fresh["settings"], path)
    remove_set(path, stores)
    return fresh


def remove_set(path, stores):
    """Removes a set, in all its stores, and its record at `path`."""
    path.unlink(missing_ok=True)
    for store in stores:
        store.remove()
