"""The published files of SDXL-Turbo: where they are, whether they are complete, and how they are loaded.

They are 6.9 GB at huggingface.co/stabilityai/sdxl-turbo, in half precision. Their licence, Stability AI's
non-commercial research licence, also holds for what the model is used for.
"""
import hashlib
import pathlib

import torch

from nanodd import files, processes
from nanodd.errors import UserError

# ----------------------------------------------------------------------------------------------------
# 1. Where they are

URL = "https://huggingface.co/stabilityai/sdxl-turbo/resolve/main/"
UNET, VAE = (f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in ("unet", "vae"))
TEXT = "{}/model.fp16.safetensors"                              # of text_encoder, and of text_encoder_2
FILES = {                      # in this repository: bytes, and sha256 where one is published
    UNET: (5_135_149_760, "48fa46161a745f48d4054df3fe13804ee255486bca893403b60373c188fd1bdb"),
    TEXT.format("text_encoder"):
        (246_144_152, "660c6f5b1abae9dc498ac2d21e1347d2abdb0cf6c0c0c8576cd796491d9a6cdd"),
    TEXT.format("text_encoder_2"):
        (1_389_382_176, "ec310df2af79c318e24d20511b601a591ca8cd4f1fce1d8dff822a356bcdb1f4"),
    VAE: (167_335_342, "02ee4bd18e5d16e7fe5fc5b85b4aefa2cba6db28897f674226c9d6ddd2f34f06"),
    "tokenizer/vocab.json": (1_059_962, None),
    "tokenizer/merges.txt": (524_619, None),
}


def locate(folder=None):
    """The folder with the six files; all are there, and each has the published size.

    folder: where the user has them, in the repository's own layout. None: torch's hub cache, into which the
    first process downloads what is missing, and compares its hash. Raises UserError where there is no such
    folder, a file is missing or of another size or hash, or the download fails.
    """
    if folder is None:
        folder = pathlib.Path(torch.hub.get_dir(), "checkpoints", "sdxl-turbo")
        processes.on_first_process(lambda: fetch_missing(folder))
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: --weights takes one with {', '.join(FILES)} of {URL}")
    for name in FILES:
        check_size(folder, name)
    return folder


def fetch_missing(folder):
    """Downloads those of the six files that are not in `folder`. Raises UserError as locate does."""
    for name, (size, _) in FILES.items():
        if not (folder / name).is_file():
            print(f"fetching {name}, {size / 1e9:.2f} GB, into {folder}, once")
            files.download(URL + name, folder / name, f"download {', '.join(FILES)} elsewhere, into folders "
                           "of these names, and say where with --weights DIR")
            check_size(folder, name)
            check_hash(folder, name)


# ----------------------------------------------------------------------------------------------------
# 2. Whether they are complete


def check_size(folder, name):
    """Raises UserError where the file `name` of FILES is not in `folder`, or has not the published size."""
    path, (expected, _) = folder / name, FILES[name]
    if not path.is_file():
        raise UserError(f"{path} is missing: download it from {URL + name}")
    if path.stat().st_size != expected:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes instead of {expected:,}: it is cut off or "
                        f"another file; delete it, and download it again from {URL + name}")


def check_hash(folder, name):
    """Raises UserError where the file `name` of FILES has not the published hash, if there is one.

    It reads all of the file: some seconds for each gigabyte.
    """
    digest, (_, expected) = hashlib.sha256(), FILES[name]
    with open(folder / name, "rb") as file:
        while block := file.read(files.BLOCK):
            digest.update(block)
    if expected and digest.hexdigest() != expected:
        raise UserError(f"{folder / name} has the published size, but other contents (sha256 "
                        f"{digest.hexdigest()[:16]}..., not {expected[:16]}...): delete it, and download it "
                        f"again from {URL + name}")


def fingerprint(path, blocks=64, length=4096):
    """A hash of 64 blocks that are spread evenly over a file: 16 hexadecimal digits, in no time.

    Other weights of the same layout have another one, but damage between the blocks goes unnoticed.
    """
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file:
        for k in range(blocks):
            file.seek(k * size // blocks)
            digest.update(file.read(length))
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------
# 3. How they are loaded


def load(build, path, device, dtype):
    """The network build() with the weights in the file `path`, in eval mode and without gradients.

    It is built without numbers, and each tensor is cast to dtype as soon as it is read: the peak of memory is
    that of the cast weights. Raises UserError where the file is damaged or does not fit.
    """
    with torch.device("meta"):                                  # shapes only
        network = build()
    files.load_strict(network, files.load_tensors(path, device, dtype), path, "network")
    return network.eval().requires_grad_(False)
