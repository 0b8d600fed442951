"""Stable Diffusion's autoencoder: pictures to latents an eighth as wide and back, in plain torch.

    z     = 0.18215 (mean(x) + exp(logvar(x) / 2) eps)        encode: (3, 256, 256) -> (4, 32, 32)
    x_hat = decoder(z / 0.18215)                              decode; neither half is ever trained here

A diffusion model of 256-pixel pictures draws 4,096 numbers instead of 196,608. The factor 0.18215 brings them
to about unit variance, which the noise schedule assumes. Two sets of weights are published, "ema" and
"mse", one encoder with two decoders; Gu et al. 2024 encode with ema and decode with mse.
Sources: Rombach et al. 2022 (latent diffusion); weights stabilityai/sd-vae-ft-ema and -mse (MIT licence,
335 MB each, fetched once).
"""
import pathlib
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nanodd import files
from nanodd.errors import UserError

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
    """Group norm with 32 groups, over `width` channels."""
    return nn.GroupNorm(32, width, eps=1e-6)


def conv3(inputs, outputs):
    """A 3x3 convolution that keeps the size."""
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
    """x + attention(norm(x)), (B, C, H, W) -> (B, C, H, W), with one head of C channels."""

    def __init__(self, width):
        super().__init__()
        self.group_norm = norm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))    # the checkpoints' name is to_out.0

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
    """`depth` ResBlocks at one resolution, then the change to the next one, where there is one."""

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
    """(B, 3, H, W) -> (B, 8, H/8, W/8), of which quant_conv makes the posterior's mean and logvar."""

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
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))  # (B, 8, H/8, W/8)


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
        return self.conv_out(F.silu(self.conv_norm_out(x)))                 # (B, 3, 8h, 8w)


class Autoencoder(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/8, W/8). Both halves without gradients.

    They compute in the dtype of the weights, and return float32. scale: SDXL's latents have another one.
    """

    def __init__(self, scale=SCALE):
        super().__init__()
        self.scale = scale
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
        moments = self.quant_conv(self.encoder(x.to(self.quant_conv.weight.dtype)))  # (B, 8, H/8, W/8)
        mean, logvar = moments.float().chunk(2, dim=1)                      # 2 of (B, 4, H/8, W/8)
        return mean, logvar.clamp(-30, 20)

    @torch.no_grad()
    def decode(self, z, chunk=8):
        """SCALED latents z (B, 4, h, w) -> pictures (B, 3, 8h, 8w), about in [-1, 1] but not clipped.

        Decodes `chunk` pictures at a time: one of 256 pixels takes about 0.3 GB at full size, in float32.
        """
        z = (z / self.scale).to(self.post_quant_conv.weight.dtype)
        return torch.cat([self.decoder(self.post_quant_conv(part)).float() for part in z.split(chunk)])


# ----------------------------------------------------------------------------------------------------
# 2. Loading the published weights

PUBLISHED = {"ema": "sd-vae-ft-ema", "mse": "sd-vae-ft-mse"}
URL = "https://huggingface.co/stabilityai/{}/resolve/main/diffusion_pytorch_model.safetensors"
OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def renamed(tensors):
    """{name: tensor} with the names and shapes that Autoencoder has for the attention layers.

    Older files call these layers query, key, value and proj_attn; in some they are 1x1 convolutions.
    """
    tensors_renamed = {}
    for name, tensor in tensors.items():
        block, _, layer = name.rpartition("attentions.0.")
        if block:
            layer, _, kind = layer.rpartition(".")
            name = f"{block}attentions.0.{OLDER.get(layer, layer)}.{kind}"
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor      # (D, D, 1, 1) -> (D, D)
        tensors_renamed[name] = tensor
    return tensors_renamed


def load_autoencoder(source, device="cpu", dtype=torch.float32, scale=SCALE):
    """The autoencoder with its weights, in eval mode and without gradients.

    source: "ema" or "mse", fetched once, or the path of a .safetensors file of the same layout. scale: one
    over the standard deviation of its latents.
    Raises UserError where the file is absent or damaged, or a tensor is missing, unexpected
    or of another shape.
    """
    if source in PUBLISHED:
        path = files.fetch(URL.format(PUBLISHED[source]), f"{PUBLISHED[source]}.safetensors", "--vae")
    else:
        path = pathlib.Path(source)
        if not path.is_file():
            raise UserError(f"there is no file {path}; --vae takes ema, mse or a .safetensors file")
    tensors = renamed(files.load_tensors(path, device, dtype))
    with torch.device("meta"):                                  # shapes only: the numbers come from the file
        autoencoder = Autoencoder(scale)
    files.load_strict(autoencoder, tensors, path, "autoencoder")
    return autoencoder.eval().requires_grad_(False)


def encoder_fingerprint(autoencoder):
    """The fingerprint of the encoder's weights alone.

    "ema" and "mse" share their encoder, so that latents that were saved with one can be used with the other.
    """
    return files.fingerprint({name: tensor for name, tensor in autoencoder.state_dict().items()
                              if name.startswith(("encoder.", "quant_conv."))})
