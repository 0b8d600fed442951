"""Teaches a diffusion transformer (DiT) the data: the base model that all later stages start from.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          the forward process adds noise, t = 0 ... 999
    L   = mean || eps - eps_hat(x_t, t, y) ||^2            the network learns to name the noise it sees

    python diffusion.py        # 1,257 digits, 1.3M parameters: 4.5 minutes on two CPU cores
    python diffusion.py --weights DiT-XL-2-256x256.pt       # or takes, for ImageNet, what others published

Writes out/digits/base.safetensors (the averaged weights, with all it takes to rebuild the network) and
base.log.jsonl. Interrupted, it goes on where it stopped; on a CPU the final weights are the same to the bit.
Under torchrun the batch is divided over the processes.
Sources: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (learned variance), Peebles & Xie 2023 (DiT),
Xie et al. 2023 (DiffFit).
"""
import argparse
import functools
import json
import math
import pathlib
import shlex
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, PatchEmbed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as gradient_checkpoint
from tqdm import tqdm

from nanodd import cli, files, processes, recipes
from nanodd.data import archives, datasets, imageset
from nanodd.errors import UserError, exit_on_user_error
from nanodd.networks import checkpoint
from vae import prepared, source_name

# ----------------------------------------------------------------------------------------------------
# 1. The noise schedule and the forward process


class Schedule:
    """A linear schedule: abar_t = prod_{s<=t} (1 - beta_s), beta from 1e-4 to 0.02 (Ho et al. 2020, sec. 4).

    abar: (T,) float64 on the CPU, from 0.9999 (t = 0, one step of noise) down to 4e-5 (t = 999, all noise).
    Our t is Ho et al.'s t - 1; x_0 in equations is the clean image.
    signal, noise: sqrt(abar) and sqrt(1 - abar), (T,) float32 on `device`; their squares sum to 1.
    posterior: (4, T) float32 on `device`, of each step t -> t - 1 what `posterior` says: a, b, log variance,
    log beta. The variance of t = 0 is zero and takes that of t = 1 in its place.
    Solvers (sample.py) also stop between two t, where log abar is taken to be linear.
    """
    name = "linear"
    T = 1000

    def __init__(self, device="cpu"):
        self.abar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, self.T, dtype=torch.float64), dim=0)
        self.signal = self.abar.sqrt().float().to(device)
        self.noise = (1 - self.abar).sqrt().float().to(device)
        a, b, variance, beta = posterior(self.abar, F.pad(self.abar[:-1], (1, 0), value=1.0))
        variance[0] = variance[1]
        self.posterior = torch.stack([a, b, variance.log(), beta.log()]).float().to(device)

    def draw_times(self, batch, chance, device):
        """Random t to train on, (batch,) int64, every one of 0..999 as likely as the others."""
        return torch.randint(self.T, (batch,), generator=chance, device=device)

    def at(self, t):
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply images: t (B,) int64 -> two (B, 1, 1, 1)."""
        return self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)

    def end(self, steps):
        """The t nearest to the image that a sampler of so many steps goes to."""
        return 0

    def abar_at(self, t):
        """abar of one t in [0, 999], a float."""
        if t == int(t):                                         # the table's own number, not its logarithm's
            return self.abar[int(t)].item()
        return math.exp(np.interp(t, range(self.T), self.abar.log()))

    def time_at(self, half_log_snr):
        """The t where log(sqrt(abar) / sqrt(1 - abar)) is this number; the inverse of `level`."""
        log_abar = -np.logaddexp(0, -2 * half_log_snr)
        return float(np.interp(-log_abar, -self.abar.log(), range(self.T)))

    def level(self, t):
        """The Level at one t in [0, 999]."""
        abar = self.abar_at(t)
        return Level(t, math.sqrt(abar), math.sqrt(1 - abar), 0.5 * math.log(abar / (1 - abar)))

    def q_sample(self, x0, t, eps):
        """Noise x0 to time t (Ho et al. 2020, eq. 4): x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps."""
        signal, noise = self.at(t)
        return signal * x0 + noise * eps

    def x0_from_eps(self, xt, t, eps):
        """The inverse of q_sample for x0: (x_t - sqrt(1 - abar) eps) / sqrt(abar)."""
        signal, noise = self.at(t)
        return (xt - noise * eps) / signal

    def eps_from_x0(self, xt, t, x0):
        """The inverse of q_sample for eps: (x_t - sqrt(abar) x_0) / sqrt(1 - abar)."""
        signal, noise = self.at(t)
        return (xt - signal * x0) / noise


class Level(NamedTuple):
    """How noisy x_t is: x_t = alpha x_0 + sigma eps, half_log_snr = log(alpha / sigma); floats."""
    t: float
    alpha: float
    sigma: float
    half_log_snr: float


CLEAN = Level(-1.0, 1.0, 0.0, math.inf)                         # the image itself; no network is asked there


def posterior(abar, abar_prev):
    """q(x_prev | x_t, x_0) = N(a x_0 + b x_t, variance), for any earlier time (Ho et al. 2020, eq. 6, 7).

    abar, abar_prev: floats or float64 tensors, abar < abar_prev <= 1. Returns a, b, variance and beta, the
    variance of the forward step between the two.
    """
    beta = 1 - abar / abar_prev
    a = beta * abar_prev**0.5 / (1 - abar)
    b = (1 - abar_prev) * (1 - beta)**0.5 / (1 - abar)
    return a, b, beta * (1 - abar_prev) / (1 - abar), beta


def learned_log_variance(logits, log_variance, log_beta):
    """Linear in logits, not clamped: the posterior's at -1, beta's at +1 (Nichol & Dhariwal 2021, eq. 15)."""
    share = (logits + 1) / 2
    return share * log_beta + (1 - share) * log_variance


# ----------------------------------------------------------------------------------------------------
# 2. DiT: a transformer over patches, steered by time and class through its layer norms
#
# Names and shapes of all parameters are those of the published checkpoints (which learn the variance too).
# B images, N tokens, D width, p pixels per token side, C channels.

SIZES = {                      # depth, width D, heads
    "tiny": (4, 128, 4), "XS": (6, 256, 4),                     # ours; the others are DiT's
    "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
MLP_RATIO = 4
DIFFFIT_BLOCKS = 14           # DiffFit scales the first 14 blocks only, in DiT-XL/2 as it was published


def sincos(positions, dim):
    """Positions (n,) -> their cosines and sines, both (n, dim/2); frequencies from 1 down towards 1/10000."""
    steps = torch.arange(dim // 2, device=positions.device, dtype=positions.dtype) / (dim // 2)
    angles = positions[:, None] * torch.exp(-math.log(10000) * steps)       # (n, dim/2)
    return angles.cos(), angles.sin()


def position_table(grid, dim):
    """Fixed 2-D positions of a (grid, grid) map: (1, grid * grid, dim); the column fills the first half."""
    axis = torch.arange(grid, dtype=torch.float64)
    row, column = torch.meshgrid(axis, axis, indexing="ij")                 # (grid, grid), row by row
    halves = [torch.cat(sincos(place.flatten(), dim // 2)[::-1], dim=1) for place in (column, row)]
    return torch.cat(halves, dim=1).float().unsqueeze(0)


def scaled(x, gamma):
    """DiffFit's factor, where this network carries one."""
    return x if gamma is None else gamma * x


def modulate(x, shift, scale):
    """What adaLN does to normalised tokens: x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 999] -> (B, D): 256 cosines and sines, then two linear layers."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        waves = torch.cat(sincos(t, 256), dim=1)                # (B, 256), in float32: bfloat16 has no 999
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Rows of a table, y (B,) -> (B, D). The last row means "no class", for classifier-free guidance."""

    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D); DiffFit's gammas scale qkv and the output."""

    def __init__(self, width, heads, difffit, qkv_bias=True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.gamma1 = nn.Parameter(torch.ones(3 * width)) if difffit else None
        self.gamma2 = nn.Parameter(torch.ones(width)) if difffit else None

    def forward(self, x):
        qkv = scaled(self.qkv(x), self.gamma1)                              # (B, N, 3D)
        q, k, v = rearrange(qkv, "B N (three h d) -> three B h N d", three=3, h=self.heads)
        x = rearrange(F.scaled_dot_product_attention(q, k, v), "B h N d -> B N (h d)")
        return scaled(self.proj(x), self.gamma2)


class Block(nn.Module):
    """A transformer block with adaLN-Zero: shift, scale and gate of both branches come from c (B, D).

    All six start at zero, so that every block starts as the identity (Peebles & Xie 2023, sec. 3.2).
    """

    def __init__(self, width, heads, difffit):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, difffit)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, MLP_RATIO * width, act_layer=functools.partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.gamma1 = nn.Parameter(torch.ones(width)) if difffit else None
        self.gamma2 = nn.Parameter(torch.ones(width)) if difffit else None

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # 6 of (B, D)
        x = x + scaled(gate1, self.gamma1).unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + scaled(gate2, self.gamma2).unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x                                                            # (B, N, D)


class FinalLayer(nn.Module):
    """Tokens to pixels: (B, N, D) -> (B, N, p * p * out)."""

    def __init__(self, width, outputs):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)             # 2 of (B, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """eps_hat(x_t, t, y): x (B, C, H, W), t (B,) in [0, 999], y (B,) rows of the label table -> (B, C, H, W).

    With `learned_variance` the output has 2C channels: eps, then the variance logits. With `difffit` the
    first 14 blocks carry the scale factors (gammas) that DiffFit tunes; they start at 1 and change nothing.
    The weights may be bfloat16; x and t stay float32. `recompute` trades time for memory in training: each
    block forgets what is inside it, and works it out again on the way back.
    """
    recompute = False

    def __init__(self, network, size, patch, channels, classes, learned_variance=False, difffit=False):
        super().__init__()
        depth, width, heads = SIZES[network]
        if size % patch:
            raise UserError(f"patches of {patch} pixels do not tile {size} pixels")
        self.patch, self.grid, self.null = patch, size // patch, classes
        self.x_embedder = PatchEmbed(size, patch, channels, width)
        self.pos_embed = nn.Parameter(position_table(self.grid, width), requires_grad=False)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        self.blocks = nn.ModuleList(Block(width, heads, difffit and i < DIFFFIT_BLOCKS) for i in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels * (2 if learned_variance else 1))
        self.initialise()

    def initialise(self):
        """Xavier everywhere, small normal tables, and zeros where adaLN-Zero and the output want them."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))            # a view: fills the weight itself
                nn.init.zeros_(module.bias)
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        for layer in [*self.blocks, self.final_layer]:
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y):
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed      # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)                         # (B, D)
        for block in self.blocks:                                           # (B, N, D)
            x = gradient_checkpoint(block, x, c, use_reentrant=False) if self.recompute else block(x, c)
        x = self.final_layer(x, c)                                          # (B, N, p * p * out)
        return rearrange(x, "B (h w) (p q c) -> B c (h p) (w q)", h=self.grid, p=self.patch, q=self.patch)


def difffit_parameters(model):
    """Names of what DiffFit tunes: biases, norms, gammas and the label table (Xie et al. 2023)."""
    return [name for name, _ in model.named_parameters()
            if any(part in name for part in ("bias", "norm", "gamma", "y_embed", "label_emb"))]


# ----------------------------------------------------------------------------------------------------
# 3. The loss


class Denoised(NamedTuple):
    """One example per row: loss (B,); xt, eps_hat, x0_hat (B, C, H, W); all but xt with gradients."""
    loss: torch.Tensor
    xt: torch.Tensor
    eps_hat: torch.Tensor
    x0_hat: torch.Tensor


def denoising_loss(model, schedule, x0, y, t, eps):
    """mean_{C,H,W} (eps - eps_hat)^2 per image (Ho et al. 2020, eq. 14), and the one-step guess at x0.

    x0, eps (B, C, H, W); y (B,) label rows; t (B,) in [0, 999], as schedule.draw_times gives it. x0_hat is
    neither clipped nor detached: the min-max losses send their gradient through it. Where the model learns
    its variance, the variational bound is added with weight 1, as DiT was trained; its gradient enters by the
    variance channels alone.
    """
    xt = schedule.q_sample(x0, t, eps)
    out = model(xt, t.float(), y)
    eps_hat, logits = out[:, :x0.shape[1]], out[:, x0.shape[1]:]            # (B, C, H, W); or no logits
    loss = (eps - eps_hat).pow(2).mean(dim=(1, 2, 3))                       # (B,)
    if logits.shape[1]:
        loss = loss + variational_bound(schedule, x0, xt, t, eps_hat.detach(), logits)
    return Denoised(loss, xt, eps_hat, schedule.x0_from_eps(xt, t, eps_hat))


def variational_bound(schedule, x0, xt, t, eps_hat, logits):
    """KL(q(x_prev | x_t, x_0) || p(x_prev | x_t)), at t = 0 -log p(x_0 | x_t): bits a dimension, (B,).

    Nichol & Dhariwal 2021, eq. 4 to 6 and 16. DiT takes the bins of 8-bit pixels at t = 0 for latents, too,
    where they mean nothing; kept, since the published weights were made with it.
    """
    a, b, log_variance, log_beta = schedule.posterior[:, t].view(4, -1, 1, 1, 1)  # 4 of (B, 1, 1, 1)
    mean = a * schedule.x0_from_eps(xt, t, eps_hat) + b * xt
    learned = learned_log_variance(logits, log_variance, log_beta)
    bound = torch.where((t == 0).view(-1, 1, 1, 1), discretised_nll(x0, mean, learned),
                        gaussian_kl(a * x0 + b * xt, log_variance, mean, learned))
    return bound.mean(dim=(1, 2, 3)) / math.log(2)


def gaussian_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, variance1) || N(mean2, variance2)) in nats, elementwise."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean1 - mean2).pow(2) * torch.exp(-log_variance2))


def discretised_nll(x, mean, log_variance):
    """-log of the mass that N(mean, variance) has in x's bin of width 2/255, the outer bins open; in nats."""
    def below(edge):
        return torch.special.ndtr((edge - mean) * torch.exp(-0.5 * log_variance))
    left = torch.where(x < -0.999, 0.0, below(x - 1 / 255))
    right = torch.where(x > 0.999, 1.0, below(x + 1 / 255))
    return -(right - left).clamp(min=1e-12).log()


# ----------------------------------------------------------------------------------------------------
# 4. Averaged weights


def ema_decay(step, decay):
    """The average spans about a tenth of the steps so far, until `decay` binds (.99: from step 890)."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def ema_update(average, weights, decay):
    """average <- decay * average + (1 - decay) * weights, in place, over two dicts of the same tensors."""
    torch._foreach_lerp_(list(average.values()), [weights[name] for name in average], 1 - decay)


# ----------------------------------------------------------------------------------------------------
# 5. Checkpoints: one .safetensors file, tensors and a JSON header


def save_checkpoint(path, tensors, header):
    """Writes {name: tensor} and a JSON header (its fingerprint added) to `path`, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    files.save_tensors(path, tensors, {**header, "fingerprint": files.fingerprint(tensors)})


def load_model(path, device="cpu", build=None):
    """A checkpoint -> (network in eval mode, header); a fine-tuned one is laid over the base that it names.

    build: config as keywords -> the network; default: a DiT. The header's "weights" then identifies all of
    the network's tensors, its base's among them.
    Raises UserError where the base is gone or another one, or a tensor is missing, extra or of another shape.
    """
    path = pathlib.Path(path)
    header = files.read_header(path)
    header["weights"] = header["fingerprint"]
    tensors = files.load_tensors(path)
    if "base" in header:
        header["weights"] += "+" + header["base"]["fingerprint"]
        base = path.parent / header["base"]["file"]
        if not base.is_file():
            raise UserError(f"{path} was tuned from {base}, which is gone")
        if files.read_header(base)["fingerprint"] != header["base"]["fingerprint"]:
            raise UserError(f"{base} is another base model than the one {path} was tuned from")
        tensors = {**files.load_tensors(base), **tensors}
    return rebuild(header["config"], tensors, path, build).to(device).eval(), header


def rebuild(config, tensors, path, build=None):
    """The network of `config` with {name: tensor} for weights; only DiffFit's gammas, which are 1, may miss.

    Raises UserError, naming `path` and the tensor, where anything else is missing, extra or of another shape.
    """
    with torch.device("meta"):                                  # shapes alone: 675M initial weights cost time
        model = (build or DiT)(**config)
    wanted = model.state_dict()
    gammas = {name: torch.ones(wanted[name].shape) for name in wanted
              if "gamma" in name and name not in tensors}
    tensors = {name: tensor.float() for name, tensor in tensors.items()}   # some are kept in bfloat16
    files.load_strict(model, {**gammas, **tensors}, path, "network")
    return model


def rows_of(header, classes, path):
    """The label-table rows (K + 1,) of `classes`, found by name in a checkpoint's header, "no class" last."""
    strange = [name for name in classes if name not in header["classes"]]
    if strange:
        raise UserError(f"{path} knows the {len(header['classes'])} classes of {header['data']}, "
                        f"but not {strange[0]}")
    *rows, none = header["rows"]
    row = dict(zip(header["classes"], rows, strict=True))
    return [*(row[name] for name in classes), none]


# ----------------------------------------------------------------------------------------------------
# 6. Weights that others published: DiT's own (CC BY-NC 4.0), or a checkpoint of DiT's training script

PUBLISHED = "https://dl.fbaipublicfiles.com/DiT/models/{}.pt"


def read_published(path, read_config, kind):
    """A published .pt or .pth -> ({name: tensor}, config). Of a training checkpoint the averaged weights.

    read_config: {name: tensor} -> config, read off the shapes. kind: what the network is called.
    Raises UserError where the file is no such thing.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):        # training checkpoints hold one
            state = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {name: tensor.float() for name, tensor in state.get("ema", state).items()}
        return tensors, read_config(tensors)
    except Exception as error:                                  # a damaged pickle may raise anything
        raise UserError(f"{path} holds no {kind} weights as they are published ({type(error).__name__}: "
                        f"{str(error)[:80]}); one that was fetched is fetched again once it is "
                        "deleted") from error


def dit_config(tensors):
    """The config of the DiT that has these {name: tensor}."""
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    tokens, outputs = tensors["pos_embed"].shape[1], len(tensors["final_layer.linear.weight"])
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    network = {(d, w): size for size, (d, w, _) in SIZES.items()}[depth, width]
    return {"network": network, "size": patch * math.isqrt(tokens), "patch": patch, "channels": channels,
            "classes": len(tensors["y_embedder.embedding_table.weight"]) - 1,
            "learned_variance": outputs == 2 * channels * patch**2}


def check_size(found, wanted, file, name):
    """Raises UserError where published weights' config `found` differs from `wanted` in one of its keys.

    name: of the recipe that wants them.
    """
    other = [f"{key} {found[key]}, not {wanted[key]}" for key in wanted if found[key] != wanted[key]]
    if other:
        raise UserError(f"{file} is of another size than the recipe {name} ({', '.join(other)}): choose "
                        "another --recipe")


def published_base(recipe):
    """Where a recipe's published weights lie, once they are a checkpoint of ours: all data sets share it."""
    return pathlib.Path("out", recipe.weights, "base.safetensors")


def import_weights(recipe, file, typed, overwrite=False):
    """Writes published weights as a base checkpoint of ImageNet's 1,000 classes; returns its path.

    file: the .pt; None fetches it once. Raises UserError where its size is not the recipe's.
    """
    path = published_base(recipe)
    file = file or files.fetch(PUBLISHED.format(recipe.weights), f"{recipe.weights}.pt",
                         "python diffusion.py --weights")
    if processes.rank() == 0:                                   # 2.7 GB in memory once, not once a process
        convert(recipe, pathlib.Path(file), path, typed, overwrite)
    processes.barrier()
    return path


def convert(recipe, file, path, typed, overwrite):
    """Reads the .pt `file` and writes the base checkpoint `path`."""
    tensors, config = read_published(file, dit_config, "DiT")
    settings = {"weights": recipe.weights, "fingerprint": files.fingerprint(tensors)}
    if finished(path, settings, overwrite):
        return
    wanted = {"size": recipe.size, "channels": recipe.channels, "patch": recipe.patch, "classes": 1000}
    check_size(config, wanted, file, recipe.name)
    rebuild(config, tensors, file)                              # only to refuse what does not fit
    header = {"config": config, "schedule": "linear", "latents": recipe.latents, "data": "imagenet",
              "cut": "published weights", "recipe": recipe.name, "classes": archives.imagenet_classes(),
              "phase": [0, 999], "rows": list(range(1001)), "guidance": recipe.guidance,
              "settings": settings, "command": typed,
              "step": 0}
    save_checkpoint(path, tensors, header)
    millions = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    print(f"{file} | DiT-{config['network']}/{config['patch']}, {millions:.0f}M parameters -> {path}")


# ----------------------------------------------------------------------------------------------------
# 7. The training loop, for the base model and for fine-tuning


@functools.lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    """A permutation of 0..n-1, a function of (seed, epoch)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**32))


@functools.lru_cache(maxsize=1)
def batch_index(n, batch, step, seed):
    """Which images step number `step` sees: (batch,) of 0..n-1, each image once an epoch."""
    first = step * batch
    epochs = range(first // n, (first + batch - 1) // n + 1)
    stream = torch.cat([shuffled(n, seed, epoch) for epoch in epochs])
    return stream[first - epochs[0] * n:][:batch]


def draw(train, batch, step, seed, flip, rows, schedule):
    """All that is random in a training step, as a function of (seed, step): nothing to save or restore.

    train: ImageSet or vae.Latents, on the device. rows: (K + 1,) label-table rows of the classes, "no class"
    last (-1 where the table has none). Returns x0 (B, C, H, W), y (B,) rows of which one in ten says "no
    class", t (B,) in [0, 999], eps (B, C, H, W).
    """
    device = train.labels.device
    chance = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**32)
    index = batch_index(len(train.labels), batch, step, seed).to(device)
    mirrored = torch.rand(batch, generator=chance, device=device) < 0.5 if flip else None
    x0 = train.examples(index, mirrored, chance)
    dropped = torch.rand(batch, generator=chance, device=device) < 0.1
    y = torch.where(dropped & (rows[-1] >= 0), rows[-1], rows[train.labels[index]])
    t = schedule.draw_times(batch, chance, device)
    eps = torch.randn(x0.shape, generator=chance, device=device)
    return x0, y, t, eps


class Plan(NamedTuple):
    """How long, how fast: what a training run is, beside the network and the data."""
    steps: int
    batch: int
    lr: float                 # AdamW's
    decay: bool               # True: warm-up, then half a cosine to zero; False: constant, after lr_warm
    ema: float
    seed: int
    flip: bool
    beta2: float = 0.99       # of AdamW; in short runs the second moment must catch up with the gradients
    beta1: float = 0.9
    weight_decay: float = 0.
    lr_warm: int = 0          # steps of a linear warm-up before a constant rate
    warm: bool = True         # whether the average warms up
    # bfloat16 products under autocast, where Gu et al. had float32 (TF32); what is trained stays float32
    bf16: bool = False

    def lr_at(self, step):
        """Constant after lr_warm steps; or a warm-up over the first twentieth, then half a cosine."""
        if not self.decay:
            return self.lr * min(1.0, (step + 1) / max(1, self.lr_warm))
        warm = max(1, self.steps // 20)
        rest = max(0.0, (step - warm) / max(1, self.steps - warm))
        return self.lr * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * rest))


class Trainer:
    """The weights that require a gradient, their average, the optimizer: all that a training step changes.

    train: ImageSet or vae.Latents, on the device. rows: (K + 1,) label-table row of each class, "no class"
    last. extra: None, or the min-max losses, extra(denoised, x0, labels) -> (scalar to add to L_diff,
    {name: number}), with a state of its own; labels (list) are those of the whole batch. schedule: on the
    device; default: DiT's. Of many processes each works on its share of the batch. Raises UserError where
    the batch does not divide.
    """

    def __init__(self, model, train, rows, plan, extra=None, schedule=None):
        self.share = processes.batch_share(plan.batch)
        self.model, self.train, self.rows, self.plan, self.extra = model.train(), train, rows, plan, extra
        self.schedule, self.labels = schedule or Schedule(train.labels.device), train.labels.cpu()
        self.tuned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.tuned.items()}
        self.optimizer = torch.optim.AdamW(self.tuned.values(), lr=plan.lr, betas=(plan.beta1, plan.beta2),
                                           weight_decay=plan.weight_decay, fused=True)
        if plan.bf16:                                           # cast once what autocast would cast each
            for p in model.parameters():                        # time, and hold half; positions are but added
                if not p.requires_grad and p is not model.pos_embed:
                    p.data = p.data.bfloat16()
        self.network = model if processes.world() == 1 else DistributedDataParallel(model)

    def predict(self, x, t, y):
        """The network on float32 images, its answer float32, whatever the arithmetic between."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.plan.bf16):
            return self.network(x, t, y).float()

    def step(self, step):
        """One optimizer step, number `step`. Returns {"loss": L_diff, ...} as tensors without gradients."""
        plan = self.plan
        drawn = draw(self.train, plan.batch, step, plan.seed, plan.flip, self.rows, self.schedule)
        x0, y, t, eps = (part[processes.rank() * self.share:][:self.share] for part in drawn)
        denoised = denoising_loss(self.predict, self.schedule, x0, y, t, eps)
        total, report = denoised.loss.mean(), {"loss": denoised.loss.detach().mean()}
        if self.extra is not None:
            labels = self.labels[batch_index(len(self.labels), plan.batch, step, plan.seed)].tolist()
            added, terms = self.extra(denoised, x0, labels)
            total, report = total + added, {**report, **terms}
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr_at(step)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        ema_update(self.average, self.tuned, ema_decay(step, plan.ema) if plan.warm else plan.ema)
        return report

    def state_dict(self):
        return {"tuned": {name: p.detach() for name, p in self.tuned.items()}, "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "extra": self.extra.state_dict() if self.extra is not None else None}

    @torch.no_grad()
    def load_state_dict(self, state):
        for mine, saved in ((self.tuned, state["tuned"]), (self.average, state["average"])):
            for name, tensor in mine.items():
                tensor.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.extra is not None:
            self.extra.load_state_dict(state["extra"])


def fit(trainer, path, header, overwrite=False):
    """Trains to the plan's end and writes the average to `path`; goes on from where an interrupted run was.

    What resuming needs lies in NAME.resume.pt until the end, the losses in NAME.log.jsonl (means since the
    line before). Raises UserError where a loss is not finite, and forgets the state of that run.
    """
    path, plan = pathlib.Path(path), trainer.plan
    path.parent.mkdir(parents=True, exist_ok=True)
    resume = path.with_suffix(".resume.pt")
    start, seconds, sums, log = restored(trainer, resume, header["settings"], overwrite)
    line_every = max(1, plan.steps // 10)
    saved, save_cost = time.monotonic(), 0.0
    began = saved - seconds
    with tqdm(total=plan.steps, initial=start, disable=processes.rank() > 0 or None, leave=False,
              unit="step") as bar:
        for step in range(start, plan.steps):
            for name, value in trainer.step(step).items():
                sums[name] = sums.get(name, 0.0) + value
            bar.update()
            done, now = step + 1, time.monotonic()
            line_due = done % line_every == 0 or done == plan.steps
            save_due = processes.rank() == 0 and done < plan.steps and now - saved > max(files.SAVE_EVERY,
                                                                                         20 * save_cost)
            if not line_due and not save_due:
                continue
            if line_due and processes.world() > 1:
                sums = processes.all_reduce_mean(sums)
            if not all(math.isfinite(float(value)) for value in sums.values()):
                resume.unlink(missing_ok=True)
                raise UserError("the loss is not finite between steps "
                                f"{max(0, done - line_every)} and {done}: lower the recipe's learning rate "
                                "(nanodd/recipes.py), or the lambdas; "
                                f"{path} is untouched")
            if line_due:
                count = done % line_every or line_every
                log.append({"step": done, **{name: float(value) / count for name, value in sums.items()},
                            "seconds": now - began})
                speed = (done - start) / (now - began - seconds)
                bar.write(f"step {done}/{plan.steps} | "
                          + " | ".join(f"{name} {float(value) / count:.4f}" for name, value in sums.items())
                          + f" | {speed:.1f} it/s | eta {(plan.steps - done) / speed:.0f}s")
                sums = {}
                if processes.rank() == 0:
                    with files.atomic_write(path.with_suffix(".log.jsonl")) as temporary:
                        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in log))
            if save_due:
                files.save_state(resume,
                                 {"step": done, "seconds": now - began, "settings": header["settings"],
                                    "sums": sums, "log": log, "trainer": trainer.state_dict()})
                saved = time.monotonic()
                save_cost = saved - now
    if processes.rank() == 0:
        kept = trainer.average if "base" in header else {**trainer.model.state_dict(), **trainer.average}
        save_checkpoint(path, kept, {**header, "step": plan.steps})
        resume.unlink(missing_ok=True)
    processes.barrier()                                         # nobody looks for the file before it is there


def restored(trainer, resume, settings, overwrite):
    """Brings the trainer to where the run in the file `resume` was: (step, seconds, sums, log); else a start.

    Raises UserError where that run had other settings and is not to be overwritten.
    """
    if not resume.exists():
        return 0, 0.0, {}, []
    state = torch.load(resume, map_location=trainer.rows.device, weights_only=True)
    if state["settings"] != settings:
        if not overwrite:
            checkpoint.check_settings(state["settings"], settings, resume)
        return 0, 0.0, {}, []
    trainer.load_state_dict(state["trainer"])
    print(f"going on from step {state['step']}")
    return state["step"], state["seconds"], state["sums"], state["log"]


# ----------------------------------------------------------------------------------------------------
# 8. The base model


def new_header(data, config, settings, typed, schedule):
    """What every checkpoint says of itself: how to rebuild the network, and where it came from."""
    rows = list(range(len(data.train.classes) + 1))             # label rows of the classes, "no class" last
    return {"config": config, "schedule": schedule.name, "latents": data.recipe.latents, "data": data.name,
            "cut": data.cut, "recipe": data.recipe.name, "classes": data.train.classes,
            "phase": [0, len(rows) - 2], "rows": rows, "guidance": data.recipe.guidance,
            "settings": settings, "command": typed}


def finished(path, settings, overwrite):
    """True where `path` already holds the result of these settings; refuses others' unless `overwrite`.

    What is to be overwritten stays until the new result is whole.
    """
    found = files.read_header(path)["settings"] if path.exists() else None
    if found == settings:
        print(f"{path} is finished (same settings): left as it is")
    elif found is not None and not overwrite:
        checkpoint.check_settings(found, settings, path)
    return found == settings


def train_base(data, path, *, steps, seed, device, network=None, bf16=None, **how):
    """Trains the base model of `data` (Data), a DiT, by its recipe and writes it to `path`. how: teach's."""
    recipe = data.recipe
    network = network or recipe.network
    config = {"network": network, "size": recipe.size, "patch": recipe.patch,
              "channels": recipe.channels, "classes": len(data.train.classes)}
    plan = Plan(steps=steps, batch=recipe.batch, lr=recipe.lr, decay=True, ema=recipe.ema, seed=seed,
                flip=recipe.flip, bf16=cli.chosen_bf16(bf16, device, SIZES[network][1]))
    teach(data, path, config, plan, lambda: DiT(**config), Schedule(device), device=device, **how)


def teach(data, path, config, plan, start, schedule, *, device, vae="ema", compiled=False, skip_broken=False,
          overwrite=False, typed, more=None):
    """Trains the network that start() makes, of either kind, on data.train and writes it to `path`.

    more: further settings that make this run another one than a run without them.
    """
    steps, seed = plan.steps, plan.seed
    settings = {**config, **plan._asdict(), "data": imageset.fingerprint(data.train),
                "encoder": source_name(vae) if data.recipe.latents else None, **(more or {})}
    if finished(path, settings, overwrite):
        return
    train = prepared(data, vae, device, skip_broken, overwrite)
    torch.manual_seed(seed)                                     # the initial weights
    model = start().to(device)
    header = new_header(data, config, settings, typed, schedule)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"base model | {data.name} | device {device}{' bf16' * plan.bf16} | {parameters / 1e6:.2f}M "
          f"parameters | {len(train.labels)} images | {steps} steps of {plan.batch} | seed {seed}")
    if compiled:
        model.compile()
    rows = torch.tensor(header["rows"], device=device)
    fit(Trainer(model, train, rows, plan, schedule=schedule), path, header, overwrite)


def main(argv=None):
    parser = cli.new_parser(__doc__)
    cli.add_flags(parser, "data root recipe validation out seed device overwrite vae skip-broken bf16 "
                          "compile dry-run")
    parser.add_argument("--steps", type=int, help="optimizer steps; fewer are faster and blurrier "
                                                  "(default: the recipe's)")
    parser.add_argument("--network", choices=SIZES, help="how large a DiT (default: the recipe's)")
    parser.add_argument("--weights", nargs="?", const="", metavar="FILE",
                        help="train nothing: take a published DiT-XL-2-256x256.pt or -512x512.pt as the base "
                             "of all ImageNet subsets; without FILE it is fetched (as minimax.py does)")
    args = parser.parse_args(argv)
    with exit_on_user_error(parser), processes.process_group():
        typed = cli.command_line_of(__file__, argv)
        if args.weights is not None:
            recipe = recipes.RECIPES[args.recipe or "imagenet"]
            if not recipe.weights:
                raise UserError(f"the recipe {args.recipe} has no published weights")
            if args.out or args.steps or args.network:
                raise UserError("--weights trains nothing and has a place of its own: leave --out, --steps "
                                "and --network out")
            import_weights(recipe, args.weights, typed, args.overwrite)
            print("-> python minimax.py --data imagewoof --root DIR" if args.data == "digits" else
                  f"-> python minimax.py{cli.data_flags(args, '--recipe')}")
            return
        data = datasets.load(args.data, args.root, args.recipe, args.validation, args.skip_broken)
        steps = data.recipe.steps if args.steps is None else args.steps
        if steps < 1:
            raise UserError(f"--steps must be at least 1, not {steps}")
        path = (args.out or pathlib.Path("out", data.name)) / "base.safetensors"
        if args.dry_run:
            datasets.describe(data)
            print(f"would train {steps} steps and write {path}: the same command without --dry-run")
            return
        train_base(data, path, steps=steps, seed=args.seed, device=cli.device_named(args.device),
                   network=args.network, vae=args.vae, bf16=args.bf16, compiled=args.compile,
                   skip_broken=args.skip_broken, overwrite=args.overwrite, typed=typed)
        print(f"{path} -> python minimax.py{cli.data_flags(args, '--recipe', '--out')}"
              + (f" --base {shlex.quote(str(path))}" if args.out else ""))


if __name__ == "__main__":
    main()
