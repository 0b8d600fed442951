"""SDXL-Turbo as a generator of this project: classes in, pictures of the data set's size out.

    eps_hat = unet(x_t, t, context[y], pooled[y])               the prompts of all classes are encoded once
    x_0_hat = (x_t - sqrt(1 - abar) eps_hat) / sqrt(abar)       one step ends here; more add new noise (eta 1)

It is drawn without guidance, for which it was not trained, at 512 pixels, for which it was.
Sources: Sauer et al. 2023 (SDXL-Turbo), Podell et al. 2023 (SDXL), Su et al. 2024 (distilled sets from it).
"""
import functools
import hashlib
import math
import pathlib
import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from nanodd import files, processes
from nanodd.errors import UserError
from nanodd.networks import autoencoder, ddpm
from nanodd.networks.sdxl import prompts, text, tokenizer, unet, weights

WIDTH = 1280                   # of the UNet at its coarsest level, where most of its parameters are
SCALE = 0.13025                # one over the standard deviation of SDXL's latents
# what a checkpoint's header says, whatever the prompts are: latents of 64 cells, pictures of 512 pixels
HEADER = {"config": {"channels": 4, "size": 64}, "t_star": 999, "guidance": 1.0,
          "rows": [-1]}        # the last row: it is never called without a class
CHUNK = 4                      # pictures drawn at once, whatever --batch is: some 8 GB in half precision

# ----------------------------------------------------------------------------------------------------
# 1. The noise schedule


class Schedule:
    """SDXL's: sqrt(beta) grows linearly, from sqrt(0.00085) to sqrt(0.012) (Rombach et al. 2022).

    abar: (T,) float64, from 0.99915 (t = 0) down to 0.0047 (t = 999), where a trace of the image is left.

    SDXL is mostly written in another form, z = x_0 + sigma eps with sigma = sqrt((1 - abar) / abar), where
    x_t = z / sqrt(sigma^2 + 1). Sampling starts at z = sigma noise, 14.6 noise: at x_999 = 0.99767 noise.
    """
    name, T, discrete = "scaled-linear", 1000, True

    def __init__(self):
        roots = torch.linspace(math.sqrt(.00085), math.sqrt(.012), self.T, dtype=torch.float64)
        self.abar = torch.cumprod(1 - roots**2, dim=0)

    def abar_at(self, t):
        """abar, a float, at one t in [0, 999]; between whole t, log abar is interpolated."""
        return ddpm.abar_at(self.abar, t)

    def end(self, steps):
        """The t at which a sampler of `steps` steps ends."""
        return 0


# ----------------------------------------------------------------------------------------------------
# 2. The network, and the prompts of its classes


class Turbo(nn.Module):
    """eps_hat(x_t, t, y): x (B, 4, h, w), t (B,) in [0, 999], y (B,) classes -> (B, 4, h, w).

    context (K, 77, 2048), pooled (K, 1280): the encoded prompt of each class.
    """

    def __init__(self, network, context, pooled):
        super().__init__()
        self.unet = network
        self.register_buffer("context", context)
        self.register_buffer("pooled", pooled)

    def forward(self, x, t, y):
        parts = zip(x.split(CHUNK), t.split(CHUNK), y.split(CHUNK), strict=True)
        return torch.cat([self.unet(x, t, self.context[y], self.pooled[y]) for x, t, y in parts])


def encode_classes(texts, folder, device, path):
    """K prompts -> context (K, 77, 2048), pooled (K, 1280), float16 on the CPU.

    folder: of the six files. path: the file in which they are kept, 318 kB a prompt; where it has the same
    prompts, encoded with the same files, no encoder is loaded. The encoders work in float32. Raises UserError
    where a file is damaged.
    """
    def encode():
        print(f"encoding {len(texts)} prompts into {path}, once")
        tokens = tokenizer.Tokenizer(folder / "tokenizer")
        pads = {"text_encoder": tokens.end, "text_encoder_2": 0}
        (first, _), (second, pooled) = (
            encode_with(which, [tokens.ids_of(prompt, pad) for prompt in texts], folder, device)
            for which, pad in pads.items())
        return {"context": torch.cat([first, second], dim=2), "pooled": pooled}

    names = [name for name in weights.FILES if name.startswith(("text", "token"))]
    settings = {"prompts": texts, "files": {name: weights.fingerprint(folder / name) for name in names}}
    tensors = processes.on_first_process(lambda: files.cached(path, settings, encode))
    return tensors["context"], tensors["pooled"]


def encode_with(which, ids, folder, device, chunk=16):
    """One text encoder's hidden (K, 77, D) and pooled (K, D) or None for K lists of 77 ids.

    They are float16, on the CPU. The encoder is freed when this function returns.
    """
    build = functools.partial(text.TextEncoder, which)
    encoder = weights.load(build, folder / weights.TEXT.format(which), device, torch.float32)
    parts = [encoder(part) for part in tqdm(torch.tensor(ids, device=device).split(chunk), which, leave=False,
                                            disable=processes.rank() > 0 or None)]
    hidden, pooled = zip(*parts, strict=True)
    return torch.cat(hidden).half().cpu(), None if pooled[0] is None else torch.cat(pooled).half().cpu()


# ----------------------------------------------------------------------------------------------------
# 3. From latents to pictures of the data set


def resized(x, size, colours):
    """Pictures (B, 3, H, W) float, about in [-1, 1] -> (B, colours, size, size), 1 (grey) or 3 colours.

    Antialiased bicubic, Pillow's default, by which Su et al. 2024 make pictures smaller. They round the large
    picture to grey levels, and Pillow rounds and clips after each axis: some pixels differ by one level, more
    only beside black and white.
    """
    from torchvision.transforms.functional import rgb_to_grayscale  # a slow import: only where it is needed
    x = F.interpolate(x.clamp(-1, 1), (size, size), mode="bicubic", antialias=True)
    return rgb_to_grayscale(x) if colours == 1 else x


def decode(vae, size, colours, z):
    """Latents z (B, 4, 64, 64) -> pictures (B, colours, size, size)."""
    return torch.cat([resized(vae.decode(part), size, colours) for part in z.split(CHUNK)])


# ----------------------------------------------------------------------------------------------------
# 4. All that drawing needs


@contextmanager
def enough_memory(device, dtype):
    """Turns a lack of memory in the block, which loads the networks, into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not re.search("^$|out of memory|(can't allocate|not enough) memory", str(error)):
            raise
        gigabytes = 2.567463684 * dtype.itemsize
        raise UserError(f"SDXL-Turbo does not fit into the memory of {device}: its UNet alone takes "
                        f"{gigabytes:.1f} GB" + ", which --bf16 halves" * (dtype.itemsize == 4)) from error


def for_sampling(folder, template, data, run):
    """The fields of a loading.Trained, {name: value}, for drawing the classes of `data`, a datasets.Data.

    folder: of the published files, or None to fetch them once. template: a prompt with {} for the class.
    run: a cli.Run. Where it wants bfloat16, the UNet works in float16 on a GPU, as Su et al.'s: at t = 999
    its errors enter 14.6-fold. The decoder works in bfloat16 or float32; in float16 it overflows. The encoded
    prompts are kept in out/NAME. The header's "weights" is a hash of the prompts and of samples of all files.
    Raises UserError as weights.locate, prompts.prompts_of and weights.load do, and where memory is too small.
    """
    texts, folder = prompts.prompts_of(data.train.classes, template), weights.locate(folder)
    bf16 = run.in_bf16(WIDTH)
    dtype = torch.bfloat16 if bf16 else torch.float32           # of the decoder
    half = torch.float16 if bf16 and run.device.type == "cuda" else dtype   # of the UNet
    with enough_memory(run.device, dtype):
        context, pooled = encode_classes(texts, folder, run.device,
                                         pathlib.Path("out", data.name, "sdxl-turbo-prompts.safetensors"))
        network = weights.load(unet.UNet, folder / weights.UNET, run.device, half)
        network = Turbo(network, context.to(run.device, half), pooled.to(run.device, half))
        vae = autoencoder.load_autoencoder(folder / weights.VAE, run.device, dtype, SCALE)
    if run.compile:
        network.compile()
    identity = repr((texts, [weights.fingerprint(folder / name) for name in weights.FILES]))
    K = len(texts)
    header = {**HEADER, "data": data.name, "recipe": data.recipe.name, "classes": data.train.classes,
              "rows": [*range(K), -1],
              "extra_settings": {"prompts": texts, "dtype": str(half)},
              "weights": hashlib.sha256(identity.encode()).hexdigest()[:16]}
    return {"source": "SDXL-Turbo", "network": network, "header": header, "phases": [(0, K - 1, {})],
            "guide": {"guidance": 1.0, "channels": None, "interval": (0, Schedule.T - 1)},
            "schedule": Schedule(),
            "decode": functools.partial(decode, vae, data.recipe.pixels, data.recipe.colours),
            "autoencoder": files.fingerprint(vae.state_dict()), "bf16": bf16}
