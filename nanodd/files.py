"""Files that appear whole or not at all; files that are fetched; files of tensors with a JSON header."""
import hashlib
import http.client
import io
import json
import os
import pathlib
import urllib.request
from contextlib import contextmanager

import safetensors
import safetensors.torch
import torch
from tqdm import tqdm

from nanodd import processes
from nanodd.errors import UserError

SAVE_EVERY = 10               # seconds between saved states; more where saving takes over a twentieth of them


@contextmanager
def atomic_write(path):
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


def save_state(path, state):
    """Writes plain data and tensors to `path`, whole or not at all, for torch.load(weights_only=True)."""
    buffer = io.BytesIO()                                       # a full disk is then an OSError with a reason
    torch.save(state, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def fetch(url, name, flag):
    """The path of the file `name` in torch's hub cache, downloaded from `url` first where it is not there.

    Raises UserError where it cannot be had; flag is how to give it by hand.
    """
    path = pathlib.Path(torch.hub.get_dir(), "checkpoints", name)

    def download():
        try:
            with atomic_write(path) as temporary, \
                    tqdm(desc=f"fetching {name}", unit="B", unit_scale=1) as bar:
                def advance(blocks, size, total):
                    bar.total = total
                    bar.update(blocks * size - bar.n)
                urllib.request.urlretrieve(url, temporary, advance)
        except (OSError, http.client.HTTPException) as error:   # no network, no such file, a cut-off one
            raise UserError(f"cannot fetch {url} ({error}): download it elsewhere and point {flag} "
                            "at the file") from error
    processes.on_first_process(lambda: path.is_file() or download())
    return path


# ----------------------------------------------------------------------------------------------------
# Tensors: safetensors, with a JSON header of ours


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
    with atomic_write(path) as temporary:
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


def load_strict(module, tensors, path, kind):
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
