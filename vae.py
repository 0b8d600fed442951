"""Stable Diffusion's autoencoder: pictures to latents an eighth as wide and back, in plain torch.

    z     = 0.18215 (mean(x) + exp(logvar(x) / 2) eps)        encode: (3, 256, 256) -> (4, 32, 32)
    x_hat = decoder(z / 0.18215)                              decode; neither half is ever trained here

    python vae.py                        # random weights: count, shapes and times; 10 s on two CPU cores
    python vae.py PICTURE --vae ema      # there and back: PSNR in dB, and out/vae.png; not measured

A diffusion model of 256-pixel pictures draws 4,096 numbers instead of 196,608. The factor 0.18215 brings them
to about unit variance, which the noise schedule takes for granted. Two sets of weights are published, "ema"
and "mse", one encoder with two decoders; Gu et al. 2024 encode with ema and decode with mse.

Writes out/vae.png (picture and reconstruction side by side), and with random weights nothing; for training
(section 3) a cache of latents beside the data set's results.
Sources: Rombach et al. 2022 (latent diffusion); weights stabilityai/sd-vae-ft-ema and -mse (MIT licence,
335 MB each, fetched once).
"""
import argparse
import hashlib
import pathlib
import time
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from nanodd import cli, files, processes
from nanodd.data import datasets, imageset
from nanodd.errors import UserError, exit_on_user_error

# ----------------------------------------------------------------------------------------------------
# 1. The network
#
# Names and shapes of all parameters are those of the published checkpoints.
# B pictures, H W pixels, h w = H/8 W/8 latent cells, C channels.

WIDTHS = 128, 256, 512, 512    # channels at 256, 128, 64 and 32 pixels
LATENT = 4                     # channels of z
SCALE = 0.18215                # one over the latents' standard deviation, measured once by Rombach et al.


def draw_latent(mean, logvar, noise):
    """A latent of the posterior, scaled: 0.18215 (mean + exp(logvar / 2) noise), all (B, 4, h, w)."""
    return SCALE * (mean + torch.exp(logvar / 2) * noise)


def norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)


def conv3(inputs, outputs):
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = conv3(inputs, outputs)
        self.norm2 = norm(outputs)
        self.conv2 = conv3(outputs, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class AttentionBlock(nn.Module):
    """x + attention(norm(x)): every cell looks at all cells, with one head of all C channels."""

    def __init__(self, width):
        super().__init__()
        self.group_norm = norm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))    # in a list of one: the checkpoints' to_out.0

    def forward(self, x):
        h = rearrange(self.group_norm(x), "B C H W -> B 1 (H W) C")
        h = self.to_out(F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + rearrange(h, "B 1 (H W) C -> B C H W", H=x.shape[2])


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2). Zeros are added on the right and below only."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): every cell four times, then a convolution."""

    def __init__(self, width):
        super().__init__()
        self.conv = conv3(width, width)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """`depth` ResBlocks at one resolution, then the step to the next, if there is a next."""

    def __init__(self, inputs, outputs, depth, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(inputs if j == 0 else outputs, outputs) for j in range(depth))
        self.downsamplers = nn.ModuleList([Downsample(outputs)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(outputs)] if up else [])

    def forward(self, x):
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Middle(nn.Module):
    """ResBlock, attention, ResBlock, at the lowest resolution."""

    def __init__(self, width):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(width, width), ResBlock(width, width)])
        self.attentions = nn.ModuleList([AttentionBlock(width)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Pictures to the posterior's mean and logvar but for a linear mix: (B, 3, H, W) -> (B, 8, H/8, W/8)."""

    def __init__(self):
        super().__init__()
        first, last = WIDTHS[0], WIDTHS[-1]
        self.conv_in = conv3(3, first)
        self.down_blocks = nn.ModuleList(
            Level(inputs, outputs, depth=2, down=i + 1 < len(WIDTHS))
            for i, (inputs, outputs) in enumerate(pairwise((first, *WIDTHS))))
        self.mid_block = Middle(last)
        self.conv_norm_out = norm(last)
        self.conv_out = conv3(last, 2 * LATENT)

    def forward(self, x):
        x = self.conv_in(x)                                                 # (B, 128, H, W)
        for level in self.down_blocks:
            x = level(x)                                        # (B, 128, H/2, W/2) ... (B, 512, H/8, W/8)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """The encoder's mirror, with one ResBlock more at each level: (B, 4, h, w) -> (B, 3, 8h, 8w)."""

    def __init__(self):
        super().__init__()
        first, last = WIDTHS[-1], WIDTHS[0]
        self.conv_in = conv3(LATENT, first)
        self.mid_block = Middle(first)
        self.up_blocks = nn.ModuleList(
            Level(inputs, outputs, depth=3, up=i + 1 < len(WIDTHS))
            for i, (inputs, outputs) in enumerate(pairwise((first, *WIDTHS[::-1]))))
        self.conv_norm_out = norm(last)
        self.conv_out = conv3(last, 3)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))                                 # (B, 512, h, w)
        for level in self.up_blocks:
            x = level(x)                                        # (B, 512, 2h, 2w) ... (B, 128, 8h, 8w)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/8, W/8). Both halves without gradients.

    They work in the dtype of the weights, and give float32.
    """

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.quant_conv = nn.Conv2d(2 * LATENT, 2 * LATENT, 1)
        self.post_quant_conv = nn.Conv2d(LATENT, LATENT, 1)
        self.decoder = Decoder()

    @torch.no_grad()
    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> mean, logvar of the latents, (B, 4, H/8, W/8) each, UNSCALED.

        Raises UserError where H or W is no multiple of 8.
        """
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise UserError(f"the autoencoder takes heights and widths that are multiples of 8, not "
                            f"{x.shape[2]}x{x.shape[3]} pixels")
        moments = self.quant_conv(self.encoder(x.to(self.quant_conv.weight.dtype)))     # (B, 8, H/8, W/8)
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    @torch.no_grad()
    def decode(self, z, chunk=8):
        """SCALED latents z (B, 4, h, w) -> pictures (B, 3, 8h, 8w), about in [-1, 1] but not clipped.

        Decodes `chunk` at a time: at full resolution a picture of 256 pixels takes about 0.3 GB in float32.
        """
        z = (z / SCALE).to(self.post_quant_conv.weight.dtype)
        return torch.cat([self.decoder(self.post_quant_conv(part)).float() for part in z.split(chunk)])


# ----------------------------------------------------------------------------------------------------
# 2. Loading the published weights

PUBLISHED = {"ema": "sd-vae-ft-ema", "mse": "sd-vae-ft-mse"}
URL = "https://huggingface.co/stabilityai/{}/resolve/main/diffusion_pytorch_model.safetensors"
OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def renamed(tensors):
    """{name: tensor} with the attention as it is named and shaped today.

    Older files call its layers query, key, value and proj_attn; some have 1x1 convolutions there.
    """
    today = {}
    for name, tensor in tensors.items():
        block, _, layer = name.rpartition("attentions.0.")
        if block:
            layer, _, kind = layer.rpartition(".")
            name = f"{block}attentions.0.{OLDER.get(layer, layer)}.{kind}"
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor      # (D, D, 1, 1) -> (D, D)
        today[name] = tensor
    return today


def load_autoencoder(source, device="cpu", dtype=torch.float32):
    """The autoencoder with its weights, in eval mode and without gradients.

    source: "ema" or "mse", fetched once, or the path of a .safetensors file of the same layout.
    Raises UserError where the file is absent or damaged, or a tensor is missing, unexpected or misshapen.
    """
    if source in PUBLISHED:
        path = files.fetch(URL.format(PUBLISHED[source]), f"{PUBLISHED[source]}.safetensors", "--vae")
    else:
        path = pathlib.Path(source)
        if not path.is_file():
            raise UserError(f"there is no file {path}; --vae takes ema, mse or a .safetensors file")
    tensors = {name: tensor.to(device, dtype) for name, tensor in renamed(files.load_tensors(path)).items()}
    with torch.device("meta"):                                  # shapes only: the numbers come from the file
        autoencoder = Autoencoder()
    files.load_strict(autoencoder, tensors, path, "autoencoder")
    return autoencoder.eval().requires_grad_(False)


def encoder_print(autoencoder):
    """The fingerprint of what makes latents, and of nothing else.

    "ema" and "mse" share their encoder, so that latents kept from the one serve the other.
    """
    return files.fingerprint({name: tensor for name, tensor in autoencoder.state_dict().items()
                        if name.startswith(("encoder.", "quant_conv."))})


# ----------------------------------------------------------------------------------------------------
# 3. Pixels or latents: what the other stages see
#
# Training wants `examples`, sampling a `decode`. For pixels they are the pictures and the identity.


class Latents(NamedTuple):
    """A set of encoded pictures, in place of an ImageSet.

    moments: (N, 2, 8, h, w) float16, mean and logvar of each picture and of its mirror image: not one fixed
    sample of them, for each training step is to draw its own. labels: (N,) int64. classes: K names.
    """
    moments: torch.Tensor
    labels: torch.Tensor
    classes: list

    def examples(self, index, mirrored, chance):
        """What the diffusion model learns from: (B, 4, h, w), scaled; mirrored (B,) bool, or None."""
        side = torch.zeros_like(index) if mirrored is None else mirrored.long()
        mean, logvar = self.moments[index, side].float().chunk(2, dim=1)    # 2 of (B, 4, h, w)
        noise = torch.randn(mean.shape, generator=chance, device=mean.device)
        return draw_latent(mean, logvar, noise)


def prepared(data, source, device, skip_broken=False, overwrite=False):
    """What the diffusion model trains on, on the device: data.train itself, or its Latents.

    Latents are kept in out/NAME/latents-256-(a hash of where the pictures are), a file for each class, and
    encoded again when its pictures changed (names, sizes, times). A complete cache needs no published
    autoencoder.
    Raises UserError where it was made by another one than `source` and is not to be overwritten, or where
    pictures cannot be read.
    """
    train = data.train
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
            and (skip_broken or not found[c]["skipped"])]
    processes.barrier()                                         # all have looked before anyone writes
    same = source in PUBLISHED and all(found[c]["source"] == source_name(source) for c in kept)
    if len(kept) < len(present) or not same:
        autoencoder = load_autoencoder(source, device)
        made_by = encoder_print(autoencoder)
        if any(found[c]["encoder"] != made_by for c in kept):
            if not overwrite:
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
            moments = encode_twice(autoencoder, parts[c].read(skip_broken).images, bar)
            header = {**wanted[c], "source": source_name(source), "encoder": made_by,
                      "skipped": len(parts[c].files) - len(moments)}
            files.save_tensors(cached[c], {"moments": moments}, header)
    processes.barrier()
    moments = [files.load_tensors(cached[c])["moments"].to(device) for c in present]
    labels = torch.tensor(present).repeat_interleave(torch.tensor([len(part) for part in moments]))
    return Latents(torch.cat(moments), labels.to(device), train.classes)


def source_name(source):
    """What records say of an autoencoder: the two published ones share their encoder; of a file its name."""
    return "published" if source in PUBLISHED else pathlib.Path(source).name


def cache_header(path):
    """What a file of the latent cache says of itself; {} where there is none, or a damaged one."""
    try:
        return files.read_header(path)
    except UserError:
        return {}


def encode_twice(autoencoder, images, bar, chunk=8):
    """(N, 3, H, W) uint8 -> (N, 2, 8, h, w) float16 on the CPU: mean and logvar, as they are and mirrored.

    bar: a tqdm that counts the pictures.
    """
    device, rows = next(autoencoder.parameters()).device, []
    for part in images.split(chunk):
        x = imageset.to_float(part.to(device))
        both = [torch.cat(autoencoder.encode(side), dim=1) for side in (x, x.flip(3))]  # (b, 8, h, w)
        rows.append(torch.stack(both, dim=1).half().cpu())
        bar.update(len(part))
    return torch.cat(rows)


def decoder_of(latents, source, device, bf16=False):
    """(decode, print): decode turns what was drawn into pictures (B, C, H, W) about [-1, 1].

    Latents go through the autoencoder `source`, which print identifies; pixels pass through unchanged.
    """
    if not latents:
        return lambda x: x, None
    autoencoder = load_autoencoder(source, device, torch.bfloat16 if bf16 else torch.float32)
    return autoencoder.decode, files.fingerprint(autoencoder.state_dict())


# ----------------------------------------------------------------------------------------------------
# 4. A demonstration


def psnr(a, b):
    """The peak signal-to-noise ratio in dB of two uint8 images: 10 log10(255^2 / mean (a - b)^2).

    Infinite where they are equal.
    """
    return (10 * torch.log10(255**2 / (a.double() - b.double()).pow(2).mean())).item()


def demonstration_picture(size):
    """A handwritten digit, enlarged: (3, size, size) uint8."""
    digit = datasets.load("digits").train.images[:1].expand(-1, 3, -1, -1)  # (1, 3, 8, 8)
    return F.interpolate(digit, size=(size, size))[0]


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.add_argument("picture", nargs="?", metavar="PICTURE", help="an image file (default: a digit)")
    parser.add_argument("--vae", metavar="ema|mse|FILE",
                        help="the weights: published ones, or a .safetensors file (default: random ones)")
    parser.add_argument("--size", type=int, default=256,
                        help="pixels to bring the picture to, a multiple of 8 (default: %(default)s)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False,
                        help="compute in bfloat16: faster where the device has it")
    cli.add_flags(parser, "device")
    args = parser.parse_args(argv)
    with exit_on_user_error(parser):
        if args.size < 8:
            raise UserError(f"--size must be at least 8, not {args.size}")
        if args.picture and not args.vae:
            raise UserError("--vae is missing (ema, mse or a file): random weights know no pictures")
        device, dtype = cli.device_named(args.device), torch.bfloat16 if args.bf16 else torch.float32
        picture = imageset.open_image(args.picture,
                                      args.size) if args.picture else demonstration_picture(args.size)
        if args.vae:
            autoencoder = load_autoencoder(args.vae, device, dtype)
        else:
            autoencoder = Autoencoder().to(device, dtype).eval()
        print(f"device {device} | {sum(p.numel() for p in autoencoder.parameters()):,} parameters | "
              f"{args.vae or 'random'} weights, {str(dtype).removeprefix('torch.')}")

        start = time.perf_counter()
        mean, logvar = autoencoder.encode(imageset.to_float(picture)[None].to(device))
        mean = mean.cpu()                                       # waits for the device
        encoded = time.perf_counter()
        # the posterior's middle
        back = imageset.to_uint8(autoencoder.decode(SCALE * mean.to(device)).cpu())[0]
        decoded = time.perf_counter()
        print(f"encode | {tuple(picture.shape)} -> {tuple(mean.shape[1:])} | {encoded - start:.2f} s")
        print(f"decode | {tuple(mean.shape[1:])} -> {tuple(back.shape)} | {decoded - encoded:.2f} s")
        if args.vae:
            imageset.write_png("out/vae.png", torch.cat([picture, back], dim=2))
            print(f"PSNR {psnr(picture, back):.1f} dB | out/vae.png: the picture, and what came back")
        else:
            print("these weights are random and know no pictures; the published ones do:\n"
                  "-> python vae.py PICTURE --vae ema")


if __name__ == "__main__":
    main()
