"""Pixels or latents: pictures are encoded once, before training; what was drawn is decoded.

Training wants a set with `examples`, sampling a `decode`. For pixels they are the ImageSet and the identity.
"""
import hashlib
import pathlib
from typing import NamedTuple

import torch
from tqdm import tqdm

from nanodd import files, processes
from nanodd.data import imageset
from nanodd.errors import UserError
from nanodd.networks import autoencoder


class Latents(NamedTuple):
    """A set of encoded pictures, in place of an ImageSet.

    moments: (N, 2, 8, h, w) float16, mean and logvar of each picture and of its mirror image: not one fixed
    sample of them, for each training step is to draw its own. labels: (N,) int64. classes: K names.
    """
    moments: torch.Tensor
    labels: torch.Tensor
    classes: list

    def examples(self, index, mirrored, rng):
        """What the diffusion model learns from: (B, 4, h, w), scaled; mirrored (B,) bool, or None."""
        side = torch.zeros_like(index) if mirrored is None else mirrored.long()
        mean, logvar = self.moments[index, side].float().chunk(2, dim=1)    # 2 of (B, 4, h, w)
        noise = torch.randn(mean.shape, generator=rng, device=mean.device)
        return autoencoder.draw_latent(mean, logvar, noise)


def prepared(data, run):
    """What the diffusion model trains on, on the device: data.train itself, or its Latents.

    Latents are kept in out/NAME/latents-256-(a hash of where the pictures are), a file for each class, and
    encoded again when its pictures changed (names, sizes, times). A complete cache needs no published
    autoencoder.
    Raises UserError where it was made by another one than `source` and is not to be overwritten, or where
    pictures cannot be read.
    """
    train, source, device = data.train, run.vae, run.device
    if not data.recipe.latents:
        return train.to(device)
    place = str(train.files[0].parent.parent.resolve()).encode()
    cache = pathlib.Path("out", data.name, f"latents-{train.size}-{hashlib.sha256(place).hexdigest()[:8]}")
    present = train.labels.unique().tolist()
    cached = {c: cache / f"{train.classes[c]}.safetensors" for c in present}
    parts = {c: train.pick(train.labels == c) for c in present}
    wanted = {c: {"pictures": imageset.fingerprint(parts[c], times=True), "pixels": parts[c].size} for c
              in present}
    found = {c: cache_header(cached[c]) for c in present}
    kept = [c for c in present if {key: found[c].get(key) for key in wanted[c]} == wanted[c]
            and (train.skip_broken or not found[c]["skipped"])]
    processes.barrier()                                         # all have looked before anyone writes
    same = source in autoencoder.PUBLISHED and all(found[c]["source"] == source_name(source) for c in kept)
    if len(kept) < len(present) or not same:
        vae = autoencoder.load_autoencoder(source, device)
        made_by = autoencoder.encoder_fingerprint(vae)
        if any(found[c]["encoder"] != made_by for c in kept):
            if not run.overwrite:
                raise UserError(f"{cache} was made by another autoencoder than --vae {source}: "
                                "--overwrite encodes anew")
            kept = []
    stale = [c for c in present if c not in kept]
    if stale:
        print(f"encoding the pictures of {len(stale)} of {len(present)} classes into {cache}, once")
    mine = stale[processes.rank()::processes.world()]
    with tqdm(total=sum(len(parts[c].files) for c in mine), disable=processes.rank() > 0 or None, leave=False,
              unit="picture") as bar:
        for c in mine:
            moments = encode_with_mirror(vae, parts[c].read().images, bar)
            header = {**wanted[c], "source": source_name(source), "encoder": made_by,
                      "skipped": len(parts[c].files) - len(moments)}
            files.save_tensors(cached[c], {"moments": moments}, header)
    processes.barrier()
    moments = [files.load_tensors(cached[c])["moments"].to(device) for c in present]
    labels = torch.tensor(present).repeat_interleave(torch.tensor([len(part) for part in moments]))
    return Latents(torch.cat(moments), labels.to(device), train.classes)


def source_name(source):
    """What records say of an autoencoder: the two published ones share their encoder; of a file its name."""
    return "published" if source in autoencoder.PUBLISHED else pathlib.Path(source).name


def cache_header(path):
    """What a file of the latent cache says of itself; {} where there is none, or a damaged one."""
    try:
        return files.read_header(path)
    except UserError:
        return {}


def encode_with_mirror(vae, images, bar, chunk=8):
    """(N, 3, H, W) uint8 -> (N, 2, 8, h, w) float16 on the CPU: mean and logvar, as they are and mirrored.

    bar: a tqdm that counts the pictures.
    """
    device, rows = next(vae.parameters()).device, []
    for part in images.split(chunk):
        x = imageset.to_float(part.to(device))
        both = [torch.cat(vae.encode(side), dim=1) for side in (x, x.flip(3))]  # (b, 8, h, w)
        rows.append(torch.stack(both, dim=1).half().cpu())
        bar.update(len(part))
    return torch.cat(rows)


def decoder_of(latents, source, device, bf16=False):
    """(decode, fingerprint): decode turns what was drawn into pictures (B, C, H, W) about [-1, 1].

    Latents go through the autoencoder `source`, whose fingerprint it is; pixels pass through unchanged.
    """
    if not latents:
        return lambda x: x, None
    vae = autoencoder.load_autoencoder(source, device, torch.bfloat16 if bf16 else torch.float32)
    return vae.decode, files.fingerprint(vae.state_dict())
