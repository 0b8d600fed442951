"""Pixels or latents: pictures are encoded once, before training; samples are decoded.

Training needs a set with `examples`, and sampling a function `decode`; for pixels they are an ImageSet and
the identity.
"""
import hashlib
import pathlib
from typing import NamedTuple

import torch
from tqdm import tqdm

from nanodd import files, locks, processes
from nanodd.data import imageset
from nanodd.errors import UserError
from nanodd.networks import autoencoder

# ----------------------------------------------------------------------------------------------------
# 1. The training set


class Latents(NamedTuple):
    """A set of encoded pictures, in place of an ImageSet.

    moments: (N, 2, 8, h, w) float16, mean and logvar of each picture and of its mirror image, from which
    each training step draws a new sample. labels: (N,) int64. classes: K names.
    """
    moments: torch.Tensor
    labels: torch.Tensor
    classes: list

    def examples(self, index, mirrored, rng):
        """Training latents of the diffusion model at `index` (B,): (B, 4, h, w) float, scaled.

        mirrored: (B,) bool, or None to mirror none. rng: a generator on the device.
        """
        side = torch.zeros_like(index) if mirrored is None else mirrored.long()
        mean, logvar = self.moments[index, side].float().chunk(2, dim=1)    # 2 of (B, 4, h, w)
        noise = torch.randn(mean.shape, generator=rng, device=mean.device)
        return autoencoder.draw_latent(mean, logvar, noise)


def prepared(data, run):
    """The training set of the diffusion model, on the device: data.train itself, or its Latents.

    Latents are cached in out/NAME/latents-256-(a hash of the pictures' folder), with -bf16 where they are
    encoded in bfloat16, in a file for each class that is made again when its pictures change (names, sizes,
    times). Where all files are there, neither of the published autoencoders is loaded. Raises UserError where
    another autoencoder than --vae made them and --overwrite is not given, or where pictures cannot be read.
    """
    train, source, device, bf16 = data.train, encoder_name(run), run.device, encodes_in_bf16(run)
    if not data.recipe.latents:
        return train.to(device)
    folder = str(train.files[0].parent.parent.resolve()).encode(errors="surrogatepass")
    cache = pathlib.Path("out", data.name, f"latents-{train.size}-{hashlib.sha256(folder).hexdigest()[:8]}"
                         + "-bf16" * bf16)
    all_labels = train.labels.unique().tolist()
    paths = {c: cache / f"{train.classes[c]}.safetensors" for c in all_labels}
    parts = {c: train.pick(train.labels == c) for c in all_labels}
    expected = {c: {"pictures": imageset.fingerprint(parts[c], times=True), "pixels": parts[c].size}
                for c in all_labels}
    headers = valid_headers(paths, expected, parts)
    if processes.max_over_processes(len(headers) < len(paths)):
        processes.on_first_process(lambda: locks.take(cache, ""))
        headers = valid_headers(paths, expected, parts)         # another command may just have made some
    processes.barrier()                                         # all have read before one writes
    same_encoder = run.vae in autoencoder.PUBLISHED and all(
        header["source"] == source for header in headers.values())
    if len(headers) < len(paths) or not same_encoder:
        vae = autoencoder.load_autoencoder(run.vae, device, torch.bfloat16 if bf16 else torch.float32)
        encoder = autoencoder.encoder_fingerprint(vae)          # of the weights in this precision
        if any(header["encoder"] != encoder for header in headers.values()):
            if not run.overwrite:
                raise UserError(f"{cache} was made by another autoencoder than --vae {run.vae}: "
                                "--overwrite encodes anew")
            headers = {}
    stale_labels = [c for c in all_labels if c not in headers]
    if stale_labels:
        processes.on_first_process(lambda: locks.take(cache, ""))           # --overwrite: not taken above
        print(f"encoding the pictures of {len(stale_labels)} of {len(all_labels)} classes into {cache}, once")
    own_labels = stale_labels[processes.rank()::processes.world()]
    with tqdm(total=sum(len(parts[c].files) for c in own_labels), disable=processes.rank() > 0 or None,
              leave=False, unit="picture") as bar:
        for c in own_labels:
            moments = encode_with_mirror(vae, parts[c].read().images, bar)
            header = {**expected[c], "source": source, "encoder": encoder,
                      "skipped": len(parts[c].files) - len(moments)}
            files.save_tensors(paths[c], {"moments": moments}, header)
    processes.barrier(patient=True)                             # shares take unequal times
    moments = [cached_moments(paths[c], parts[c]).to(device) for c in all_labels]
    labels = torch.tensor(all_labels).repeat_interleave(torch.tensor([len(part) for part in moments]))
    return Latents(torch.cat(moments), labels.to(device), train.classes)


# ----------------------------------------------------------------------------------------------------
# 2. The cache of latents on disk


def encodes_in_bf16(run):
    """Whether pictures are encoded in bfloat16: as --bf16 says, else where it is faster."""
    return run.in_bf16(autoencoder.WIDTHS[-1])


def encoder_name(run):
    """The encoder's name in settings: "published" for ema and mse, which share it; else the file's name.

    It says where the encoder works in bfloat16: such latents are others.
    """
    name = "published" if run.vae in autoencoder.PUBLISHED else pathlib.Path(run.vae).name
    return name + " in bfloat16" * encodes_in_bf16(run)


def valid_headers(paths, expected, parts):
    """{label: header} of the files in the latent cache that need not be made again.

    paths: {label: file}. expected: {label: what its header must say}. parts: {label: ImageFiles}.
    """
    headers = {c: cache_header(path) for c, path in paths.items()}
    return {c: header for c, header in headers.items()
            if {key: header.get(key) for key in expected[c]} == expected[c]
            and header["skipped"] in range(len(parts[c].files) if parts[c].skip_broken else 1)}


def cache_header(path):
    """The header of a file of the latent cache; {} where the file is missing or damaged."""
    form = {"pictures": str, "pixels": int, "source": str, "encoder": str, "skipped": int}
    try:
        return files.read_header(path, form)
    except UserError:
        return {}


def cached_moments(path, part):
    """The moments of the pictures `part`, ImageFiles, in a file of the latent cache: (n, 2, 8, h, w) float16.

    Raises UserError where the file is damaged.
    """
    tensors, skipped, side = files.load_tensors(path), files.read_header(path)["skipped"], part.size // 8
    with torch.device("meta"):
        expected = {"moments": torch.empty(len(part.files) - skipped, 2, 8, side, side)}
    files.check_tensors(tensors, expected, path, "latent cache", ": delete it, and it is made again")
    return tensors["moments"]


def encode_with_mirror(vae, images, bar):
    """(N, 3, H, W) uint8 -> (N, 2, 8, h, w) float16 on the CPU: mean and logvar, as they are and mirrored.

    bar: a tqdm that counts the pictures. A CPU is fastest with one picture at a time.
    """
    device, rows = next(vae.parameters()).device, []
    for part in images.split(1 if device.type == "cpu" else 8):
        x = imageset.to_float(part.to(device))
        sides = [torch.cat(vae.encode(side), dim=1) for side in (x, x.flip(3))]  # (b, 8, h, w)
        rows.append(torch.stack(sides, dim=1).half().cpu())                 # (b, 2, 8, h, w)
        bar.update(len(part))
    return torch.cat(rows)


# ----------------------------------------------------------------------------------------------------
# 3. From samples to pictures


def decoder_of(latents, source, device, bf16=False):
    """(decode, fingerprint): decode maps samples to pictures (B, C, H, W) float, about in [-1, 1].

    Latents (if `latents`) are decoded by the autoencoder `source`; the fingerprint is that of its weights.
    Pixels are returned as they are, and the fingerprint is None.
    """
    if not latents:
        return lambda x: x, None
    vae = autoencoder.load_autoencoder(source, device, torch.bfloat16 if bf16 else torch.float32)
    return vae.decode, files.fingerprint(vae.state_dict())
