"""The distilled set on disk, filled block by block until an image count or a budget of seconds is reached.

Image number p is of class p mod K, index p div K: rounds of one image a class, so that the set is balanced
wherever it stops. A block is `batch` consecutive numbers (the last block may be shorter), drawn as one batch;
a block that was not finished is drawn again from its first image.
"""
import itertools
import math
import time

from tqdm import tqdm

from nanodd import files, locks, processes, schema
from nanodd.errors import UserError
from nanodd.networks import checkpoint
from nanodd.sampling import sheets, stores

clock = time.monotonic         # seconds; tests replace it, so that no outcome depends on a machine's speed

# ----------------------------------------------------------------------------------------------------
# 1. Blocks


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
    Returns the (label, index) of the images of all complete rounds; other images are removed. A stopped run
    may have spent the budget: the rounds that it has left are then the set. Raises TooShort where there is no
    round, or where the first block alone, drawn now, takes more than the budget.
    """
    longest_before = longest = record.get("longest", 0.0)
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
                # the second block is the first without a warm-up: its time takes the place of the first's
                longest = max(longest_before if num_drawn <= 2 else longest, block_seconds)
                record.update(seconds=clock() - start,
                              longest=longest_before if num_drawn == 1 else longest, writing=writing)
                save(record)
            done, wave = done + sum(map(len, blocks)), wave + 1
            bar.update(sum(map(len, blocks)))
    # the first block was drawn now, and took longer than the budget
    late = num_drawn == wave == 1 and processes.max_over_processes(record["seconds"] > budget)
    if late and processes.rank() == 0:
        store.remove()                                          # else the next run would take it for the set
    if late or done < K:
        raise TooShort(f"the budget of {budget:g} seconds is too short for one image of each class: the "
                        f"first {done} images took {record['seconds']:.2g} seconds. Raise --seconds, "
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
        self.store = (stores.NpzFile if npz else stores.PngFolder)(out, classes)
        self.path, self.sheet = self.store.path, out / "distilled.png"
        self.record_path, self.record = out / "distilled.json", None

    def open(self, fresh, overwrite):
        """Locks the folder and reads the record, else takes the dict `fresh` for it.

        Raises UserError as locks.take, open_record and the store's claim.
        """
        def opened():
            locks.take(self.out)
            record = open_record(self.out, fresh, overwrite)
            self.store.claim()
            if record["ipc"]:                                   # it is finished
                self.store.remove_parts()                       # a run that was killed at its end left them
            return record
        self.record = processes.on_first_process(opened)

    def overwrite(self):
        """Removes the set and its record, if there is one. Raises UserError as read_record and remove_set."""
        def remove():
            if self.record_path.is_file():
                remove_set(self.out, read_record(self.record_path))
        processes.on_first_process(remove)

    def holds(self, ipc, budget):
        """Whether the set is finished, with at least `ipc` images a class or under at least this budget."""
        enough = self.record["ipc"] >= ipc or self.record["budget"] >= budget
        return enough and processes.on_first_process(lambda: self.store.is_complete(self.record["ipc"]))

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
        processes.on_first_process(lambda: files.check_ours(self.sheet, sheets.is_sheet))
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
            sheets.write(self.sheet, sheet)
            self.save(record)                                   # it is finished from here on
            self.store.remove_parts()
        return len(items)


RECORD = {"settings": dict, "classes": schema.are_names, "ipc": schema.between(0, 10**8),
          "budget": schema.between(0, math.inf, float), "seconds": schema.between(0, math.inf, float),
          "longest?": schema.between(0, math.inf, float), "writing?": schema.between(0, math.inf, float),
          "kept?": [[schema.between(0, 10**8)]]}


def read_record(path):
    """The record in a distilled.json. Raises UserError where it is damaged."""
    advice = ": choose --out ELSEWHERE, or move it away with the images"
    return files.load_json(path, RECORD, "nanoDD record", advice)


def open_record(out, fresh, overwrite):
    """The record of the set in `out` to resume, or `fresh` where there is none or it may be overwritten.

    Raises UserError where other settings made it, or where there are images without a record.
    """
    path = out / "distilled.json"
    if not path.is_file():
        found = [store.path for store in stores_of(out, fresh["classes"]) if store.exists()]
        if found:
            raise UserError(f"{found[0]} is there, but no {path.name} says what it is: "
                            "choose --out ELSEWHERE, or move it away")
        return fresh
    record = read_record(path)
    found, wanted = ({**each["settings"], "classes": each["classes"]} for each in (record, fresh))
    if found == wanted:
        return record
    if not overwrite:
        checkpoint.check_settings(found, wanted, path)
    remove_set(out, record)
    return fresh


def stores_of(out, classes):
    """The stores in which the images of a set in the folder `out` may be."""
    return stores.PngFolder(out, classes), stores.NpzFile(out, classes)


def remove_set(out, record):
    """Removes a set, in both of its stores, and its record; other files in its folders stay.

    Until all images are gone, the record says that the set is unfinished. Raises UserError where a folder is
    a link.
    """
    path, all_stores = out / "distilled.json", stores_of(out, record["classes"])
    for store in all_stores:
        store.claim()
    files.save_json(path, {**record, "ipc": 0, "budget": 0.0})
    for store in all_stores:
        store.remove()
    path.unlink()
