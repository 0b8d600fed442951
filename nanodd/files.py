"""Atomic writes, downloads, and files of tensors with a JSON header (safetensors)."""
import hashlib
import http.client
import io
import json
import math
import os
import pathlib
import re
import urllib.request
from contextlib import contextmanager

import safetensors
import safetensors.torch
import torch
from tqdm import tqdm

from nanodd import locks, processes, schema
from nanodd.errors import UserError

SAVE_EVERY = 10                # seconds between two saved states of a run
BLOCK = 2**20                  # bytes of a download that are in memory at once

# ----------------------------------------------------------------------------------------------------
# 1. Folders, atomic writes and downloads


def remove_empty(*folders):
    """Removes those of the folders that are there and empty."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def check_ours(path, is_ours):
    """Raises UserError where there is a file `path` of which is_ours(path) is false: it is not replaced."""
    if path.exists() and not is_ours(path):
        raise UserError(f"{path} exists, and nothing says that nanoDD wrote it: move it, or choose --out "
                        "ELSEWHERE")


@contextmanager
def atomic_write(path):
    """Yields a temporary path in the folder of `path`, renamed to `path` if the block succeeds, else removed.

    A killed run therefore leaves the last complete file, never half of a new one. Raises UserError where the
    folder cannot be made.
    """
    path = pathlib.Path(path)
    locks.make_folder(path.parent)
    temporary = locks.temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_state(path, state):
    """Writes plain data and tensors to `path` atomically, for torch.load(weights_only=True)."""
    buffer = io.BytesIO()                                       # a full disk is then an OSError with a reason
    torch.save(state, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def reading_state(path):
    """The context in which a saved state is read: what goes wrong is a UserError, the file is damaged."""
    return schema.reading(path, "nanoDD saved state", ": delete it to start anew")


def load_state(path, form, device="cpu"):
    """What save_state wrote, of the schema `form`, with its tensors on `device`; no code in the file is run.

    Raises UserError where the file is damaged or has another form.
    """
    with reading_state(path):
        return schema.require(torch.load(path, map_location=device, weights_only=True), form)


def load_json(path, form, kind, advice=""):
    """The plain data in the JSON file `path`, of the schema `form`. kind: what it is, "record".

    Raises UserError, with `advice` at its end, where the file is damaged or has another form.
    """
    with schema.reading(path, kind, advice):
        return schema.require(json.loads(path.read_text()), form)


def save_json(path, value):
    """Writes plain data to `path` atomically, as indented JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def download(url, path, advice):
    """Downloads `url` to `path` by way of the file .part beside it; what that has already is not sent again.

    advice: how else the user can get the file, for the message. Raises UserError where the download fails or
    breaks off; what has arrived is kept for the next time.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the last byte is asked for once more, since a server refuses to send nothing of a complete .part
        start = max(0, part.stat().st_size - 1) if part.is_file() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(request, timeout=60) as answer, \
                open(part, "r+b" if part.is_file() else "wb") as file:
            lock_part(file, path)
            start = start if getattr(answer, "status", None) == 206 else 0  # 200: it does not know Range
            length = answer.headers["Content-Length"]
            total = start + int(length) if length else None
            file.seek(start)
            with tqdm(None, f"fetching {path.name}", total, initial=start, unit="B", unit_scale=1) as bar:
                while block := answer.read(BLOCK):
                    bar.update(file.write(block))
            if total not in (None, file.tell()):
                raise OSError(f"the connection broke after {file.tell():,} of {total:,} bytes")
            file.truncate()                                     # a .part may have been longer
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:       # no network, no such file, or half of it
        if getattr(error, "code", None) == 416:                 # the .part is longer than the file
            part.unlink()
        raise UserError(f"cannot fetch {url} ({error}): the same command resumes the download; or "
                        f"{advice}") from error


def lock_part(file, path):
    """Locks the open .part of `path` until it is closed. Raises UserError where another command has it."""
    try:
        locks.lock(file.fileno())
    except BlockingIOError as error:
        raise UserError(f"another command is fetching {path}: wait until it is there") from error
    except OSError:                                             # a file system without locks
        pass


def fetch(url, name, flag):
    """The path of the file `name` in torch's hub cache, downloaded from `url` first where it is missing.

    flag: what takes a file that was downloaded by hand, for the message. Raises UserError as download does.
    """
    path = pathlib.Path(torch.hub.get_dir(), "checkpoints", name)
    advice = f"download it elsewhere and point {flag} at the file"
    processes.on_first_process(lambda: path.is_file() or download(url, path, advice))
    return path


def foreign(path):
    """What the file `path` is instead of data, in words: empty, a Git LFS pointer, a web page; else None."""
    with open(path, "rb") as file:
        head = file.read(200)
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, and the data itself was not downloaded (git lfs pull does that)"
    if re.match(rb"\s*<(!doctype )?html", head, re.IGNORECASE):
        return "it is a web page (perhaps what a server sent in place of a download)"
    return None


# ----------------------------------------------------------------------------------------------------
# 2. Tensors: safetensors, with nanoDD's JSON header


def fingerprint(tensors):
    """A hash of {name: tensor}, 16 hexadecimal digits: equal weights have equal ones, on any device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_tensors(path, tensors, header):
    """Writes {name: contiguous tensor on the CPU} and a JSON header to `path` atomically.

    Raises UserError where it cannot be written.
    """
    with atomic_write(path) as temporary:
        try:                                                    # written without a copy in memory
            safetensors.torch.save_file(tensors, temporary, metadata={"nanodd": json.dumps(header)})
        except safetensors.SafetensorError as error:
            raise UserError(f"cannot write {path}: {error}") from error


def read_header(path, form=dict, kind="file of tensors", advice=""):
    """The JSON header of a file of tensors. Raises UserError where `path` is no such file.

    form: the header's schema. kind: what the file is, and advice: how to go on, for the message.
    """
    with schema.reading(path, kind, advice), safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "nanodd" not in metadata:
            raise ValueError("it has no nanoDD header")
        return schema.require(json.loads(metadata["nanodd"]), form)


def load_tensors(path, device="cpu", dtype=None):
    """The {name: tensor} of a .safetensors file, on `device`, in `dtype` (None: as in the file).

    Each is cast as soon as it is read, so that there is never a second copy of all in memory. Raises
    UserError where the file is damaged.
    """
    advice = "; one that was fetched is fetched again once it is deleted"
    with schema.reading(path, ".safetensors file", advice), \
            safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).to(device, dtype) for name in file.keys()}


def cached(path, settings, make):
    """The {name: tensor on the CPU} of make(), kept in the file `path` together with `settings`, plain data.

    Where the file is missing or damaged, or has other settings, it is made again. Of two commands that make
    it at once, the later takes what the other one has saved, so that both have the same bits.
    """
    saved = saved_tensors(path, settings)
    if saved is not None:
        return saved
    made = make()
    saved = saved_tensors(path, settings)                       # by another command, meanwhile
    if saved is not None:
        return saved
    save_tensors(path, made, settings)
    return made


def saved_tensors(path, settings):
    """The {name: tensor} in the file `path`; None where it is missing or damaged, or has other settings."""
    try:
        return load_tensors(path) if read_header(path) == settings else None
    except UserError:
        return None


def check_tensors(tensors, expected, path, kind, advice=""):
    """Raises UserError where {name: tensor}, read from the file `path`, are not those that are expected.

    That is where one is missing, unexpected, of another shape or type than in the dict `expected`, or not
    finite. kind: what needs them, and advice: how to go on, for the message, which names file and tensor.
    """
    for name in {**expected, **tensors}:
        if name not in tensors:
            problem = "is missing"
        elif name not in expected:
            problem = "is unexpected"
        elif tensors[name].shape != expected[name].shape:
            problem = (f"has shape {tuple(tensors[name].shape)} instead of "
                       f"{tuple(expected[name].shape)}")
        elif tensors[name].is_floating_point() != expected[name].is_floating_point():
            problem = f"has numbers of the type {tensors[name].dtype}"
        elif not is_finite(tensors[name]):
            problem = "has numbers that are not finite"
        else:
            continue
        raise UserError(f"{path} does not fit the {kind}: {name} {problem}{advice}")


def is_finite(tensor):
    """Whether all numbers of a tensor are finite: a NaN is both its minimum and its maximum."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    tensor = tensor.float() if tensor.itemsize == 1 else tensor             # 8 bits have no aminmax
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())


def load_strict(module, tensors, path, kind, advice=""):
    """Loads {name: tensor}, read from the file `path`, into a module, which may be on the meta device.

    kind: the module's name in the message. advice: as in check_tensors. Raises UserError as check_tensors.
    """
    check_tensors(tensors, module.state_dict(), path, kind, advice)
    module.load_state_dict(tensors, assign=True)
