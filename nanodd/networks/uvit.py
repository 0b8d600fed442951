"""U-ViT, the other backbone, in which time, class and patches are all tokens; and its noise schedule.

    abar(t) = exp(-(0.1 t + 9.95 t^2)), t in [0, 1]        noise grows continuously, not in 1,000 steps
    x = skip_linear([x, output of the mirrored block])     long skips join the early blocks to the late ones

`python diffusion.py --network uvit` trains it; minimax.py and sample.py read its checkpoints as they read
DiT's. This file has an attention of its own, so that a change to DiT's does not change U-ViT.
Sources: Bao et al. 2023 (U-ViT), Y. Song et al. 2021 (VP-SDE), Li et al. 2024.
"""
import functools
import math
import pathlib
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint as gradient_checkpoint

from nanodd import files, processes
from nanodd.data import archives, imageset
from nanodd.errors import UserError
from nanodd.networks import checkpoint, published, training

# ----------------------------------------------------------------------------------------------------
# 1. The continuous schedule


class ContinuousSchedule:
    """The VP-SDE with beta(t) = 0.1 + 19.9 t (Y. Song et al. 2021, app. C), t in [0, 1]; no table.

    Outside of this class t is in [0, 999], as for DiT; the network is given that t.
    """
    name, T, discrete = "vp", 1000, False
    LAST = T - 1

    def __init__(self, device="cpu"):
        """There is no table to put on a device."""

    def draw_times(self, batch, rng, device):
        """Random t to train on, (batch,) float, uniform in [0, 999]."""
        return self.LAST * torch.rand(batch, generator=rng, device=device)

    def at(self, t):
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply images: t (B,) float -> two (B, 1, 1, 1)."""
        t = t.view(-1, 1, 1, 1) / self.LAST
        log_abar = -(0.1 * t + 9.95 * t**2)
        return torch.exp(0.5 * log_abar), torch.sqrt(-torch.expm1(log_abar))

    def end(self, steps):
        """The smallest t of a sampler with so many steps, as DPM-Solver's authors advise.

        It is not 0, where log(alpha / sigma) is infinite.
        """
        return self.LAST * (1e-3 if steps <= 15 else 1e-4)

    def abar_at(self, t):
        """abar of one t in [0, 999], a float."""
        return math.exp(-(0.1 * t / self.LAST + 9.95 * (t / self.LAST)**2))

    def time_at(self, half_log_snr):
        """The t where log(sqrt(abar) / sqrt(1 - abar)) is this number: the root of 9.95 t^2 + 0.1 t = q."""
        q = math.log1p(math.exp(-2 * half_log_snr))             # -log abar
        return self.LAST * 2 * q / (math.sqrt(0.01 + 4 * 9.95 * q) + 0.1)

    def q_sample(self, x0, t, eps):
        """Noise x0 to time t: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps."""
        signal, noise = self.at(t)
        return signal * x0 + noise * eps

    def x0_from_eps(self, xt, t, eps):
        """The inverse of q_sample for x0: (x_t - sqrt(1 - abar) eps) / sqrt(abar)."""
        signal, noise = self.at(t)
        return (xt - noise * eps) / signal


# ----------------------------------------------------------------------------------------------------
# 2. U-ViT: a transformer over patches, a time token and a label token, without adaLN
#
# Names and shapes of all parameters are those of the published checkpoints. B images, N tokens, D width,
# p pixels per token side, C channels.

SIZES = {                      # depth (an even number, and one block in the middle), width D, heads
    "tiny": (4, 128, 4), "S": (12, 512, 8), "M": (16, 768, 12), "L": (20, 1024, 16)}
MLP_RATIO = 4
DIFFFIT_BLOCKS = 14            # DiffFit scales the first 14 blocks only, as in DiT


def sincos(positions, dim):
    """Positions (n,) -> their cosines and sines, both (n, dim/2); frequencies from 1 down towards 1/10000."""
    steps = torch.arange(dim // 2, device=positions.device, dtype=positions.dtype) / (dim // 2)
    angles = positions[:, None] * torch.exp(-math.log(10000) * steps)       # (n, dim/2)
    return angles.cos(), angles.sin()


def rescale(x, gamma):
    """x times DiffFit's factor gamma, where this network has one."""
    return x if gamma is None else gamma * x


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D); DiffFit's gammas scale qkv and the output."""

    def __init__(self, width, heads, difffit):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.gamma1 = nn.Parameter(torch.ones(3 * width)) if difffit else None
        self.gamma2 = nn.Parameter(torch.ones(width)) if difffit else None

    def forward(self, x):
        qkv = rescale(self.qkv(x), self.gamma1)                             # (B, N, 3D)
        q, k, v = rearrange(qkv, "B N (three h d) -> three B h N d", three=3, h=self.heads)
        x = rearrange(F.scaled_dot_product_attention(q, k, v), "B h N d -> B N (h d)")
        return rescale(self.proj(x), self.gamma2)


class Block(nn.Module):
    """A transformer block, (B, N, D) -> (B, N, D); with `skip` it first merges a second (B, N, D)."""

    def __init__(self, width, heads, skip, difffit):
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, difffit)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, MLP_RATIO * width), act=nn.GELU(),
                                             fc2=nn.Linear(MLP_RATIO * width, width)))
        self.gamma1 = nn.Parameter(torch.ones(width)) if difffit else None
        self.gamma2 = nn.Parameter(torch.ones(width)) if difffit else None

    def forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))               # (B, N, 2D) -> (B, N, D)
        x = x + rescale(self.attn(self.norm1(x)), self.gamma1)
        return x + rescale(self.mlp(self.norm2(x)), self.gamma2)


class UViT(nn.Module):
    """eps_hat(x_t, t, y): x (B, C, H, W), t (B,) in [0, 999], y (B,) rows of the label table -> (B, C, H, W).

    classes: rows of the label table; 0: no label token at all, as in the published CIFAR-10 weights, and y
    is not used. null: whether there is one row more, for "no class"; the published tables have none. With
    `difffit` the first 14 blocks have DiffFit's gammas. `recompute`: gradient checkpointing, as in DiT.
    """
    recompute = False

    def __init__(self, network, size, patch, channels, classes, null=True, difffit=False):
        super().__init__()
        depth, width, heads = SIZES[network]
        self.patch, self.grid, half = patch, size // patch, depth // 2
        self.extras = 2 if classes else 1                       # tokens that are no patches
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        self.label_emb = nn.Embedding(classes + null, width) if classes else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + self.grid**2, width))
        block = functools.partial(Block, width, heads)
        self.in_blocks = nn.ModuleList(block(False, difffit and i < DIFFFIT_BLOCKS) for i in range(half))
        self.mid_block = block(False, difffit and half < DIFFFIT_BLOCKS)
        self.out_blocks = nn.ModuleList(block(True, difffit and half + 1 + i < DIFFFIT_BLOCKS)
                                        for i in range(half))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch * patch * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x, t, y):
        x = self.patch_embed.proj(x.to(self.patch_embed.proj.weight.dtype))
        x = rearrange(x, "B D h w -> B (h w) D")                            # (B, H/p * W/p, D)
        time = torch.cat(sincos(t, x.shape[2]), dim=1).to(x.dtype)          # (B, D)
        label = [self.label_emb(y)] if self.label_emb is not None else []   # (B, D), if any
        tokens = [token.unsqueeze(1) for token in (*label, time)]           # (B, 1, D) each
        x = torch.cat([*tokens, x], dim=1) + self.pos_embed                 # (B, N, D)
        skips = []
        for block in self.in_blocks:
            x = self.run(block, x)
            skips.append(x)
        x = self.run(self.mid_block, x)
        for block in self.out_blocks:                           # the last output is used first
            x = self.run(block, x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, self.extras:]                # (B, H/p * W/p, p * p * C)
        x = rearrange(x, "B (h w) (p q c) -> B c (h p) (w q)", h=self.grid, p=self.patch, q=self.patch)
        return self.final_layer(x)                                          # (B, C, H, W)

    def run(self, block, *inputs):
        """block(*inputs), with gradient checkpointing where `recompute` is true."""
        return gradient_checkpoint(block, *inputs, use_reentrant=False) if self.recompute else block(*inputs)


# ----------------------------------------------------------------------------------------------------
# 3. Published weights, and how U-ViT was trained

# Bao et al. 2023's settings for CIFAR-10, used for CIFAR-100 too, and for ImageNet at 64 pixels, used for
# Tiny-ImageNet. For other data the recipe's are used.
CIFAR = {"steps": 500_000, "batch": 128, "lr": 2e-4, "lr_warm": 2500, "beta1": .99, "beta2": .999,
         "ema": .9999, "warm": False, "decay": False}
IMAGENET64 = {"steps": 300_000, "batch": 1024, "lr": 3e-4, "lr_warm": 5000, "beta1": .99, "beta2": .99,
              "ema": .9999, "warm": False, "decay": False}
PLANS = {"cifar10": ("S", CIFAR), "cifar100": ("S", CIFAR), "tiny-imagenet": ("M", IMAGENET64)}
LIKE_DIT = {"B": "M", "XL": "L"}                                # a recipe's size for DiT: the one for U-ViT


def numbers(recipe):
    """(network size, {field of training.Plan: number}) of a U-ViT for the data of `recipe`."""
    size, by_recipe = training.by_recipe(recipe)
    size, fields = PLANS.get(recipe.name) or (LIKE_DIT.get(size, size), by_recipe)
    return size, {**fields, "weight_decay": .03}


checkpoint.BACKBONES["uvit"] = checkpoint.Backbone(UViT, SIZES, ContinuousSchedule, numbers)


class Weights(NamedTuple):
    """Published weights of a U-ViT: the file they come from, {name: tensor}, and the config they fit."""
    path: pathlib.Path
    tensors: dict
    config: dict


def read_weights(path, config, recipe):
    """The Weights in the published .pth `path`. Raises UserError where their size is not `config`'s."""
    tensors, own_config = published.read_published(path, uvit_config, "U-ViT")
    expected = {key: config[key] for key in ("network", "size", "patch", "channels")}
    published.check_size(own_config, expected, path, recipe.name)
    return Weights(path, tensors, own_config)


def uvit_config(tensors):
    """The config of the U-ViT that has these {name: tensor}."""
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = 2 * len({name.split(".")[1] for name in tensors if name.startswith("in_blocks.")})
    classes = len(tensors["label_emb.weight"]) if "label_emb.weight" in tensors else 0
    tokens = tensors["pos_embed"].shape[1] - (2 if classes else 1)
    network = {(d, w): size for size, (d, w, _) in SIZES.items()}[depth, width]
    return {"backbone": "uvit", "network": network, "size": patch * math.isqrt(tokens), "patch": patch,
            "channels": channels, "classes": classes, "null": False}


@torch.no_grad()
def start_from(model, weights, classes):
    """Copies published Weights into a class-conditional UViT, but for tensors with another meaning there.

    classes: K names. The position of the label token, which comes first, stays as initialised where the
    published network had no classes: its positions then follow. Rows of the label table are copied where it
    is ImageNet's and has the class by its WordNet id; other rows stay as initialised.
    Raises UserError, naming the tensor, where anything else is missing, extra or of another shape.
    """
    initial, tensors = model.state_dict(), dict(weights.tensors)
    table = tensors.pop("label_emb.weight", None)
    if table is None:
        positions = tensors["pos_embed"]                        # (1, 1 + patches, D)
        tensors["pos_embed"] = torch.cat([initial["pos_embed"][:, :1].to(positions), positions], dim=1)
    labels = initial["label_emb.weight"]                        # (K + 1, D)
    for k, row in enumerate(rows_in(table, classes)):
        if row is not None:
            labels[k] = table[row]
    files.load_strict(model, {**tensors, "label_emb.weight": labels}, weights.path, "network")


def rows_in(table, classes):
    """The row of each class (K names) in a published label table; None for a class without a row."""
    names = archives.imagenet_classes() if table is not None and len(table) == 1000 else []
    row = {name: k for k, name in enumerate(names)}
    return [row.get(name) for name in classes]


def import_weights(data, weights, path, run):
    """Writes published Weights, as they are, as the base model `path` of data.train's classes.

    Without a row for "no class" (-1 in the header) there is no guidance. Raises UserError where a class has
    no row, or a tensor does not fit.
    """
    settings = {"weights": files.fingerprint(weights.tensors), "data": imageset.fingerprint(data.train)}
    rows = rows_in(weights.tensors.get("label_emb.weight"), data.train.classes)
    if None in rows:
        raise UserError(f"{weights.path} does not know the class {data.train.classes[rows.index(None)]}: "
                        "train on from it, with --steps 1 or more")
    if checkpoint.finished(path, settings, run.overwrite):
        return
    checkpoint.rebuild(weights.config, weights.tensors, weights.path)       # raises where one does not fit
    header = {**checkpoint.new_header(data, weights.config, settings, run.command, ContinuousSchedule()),
              "rows": [*rows, -1], "guidance": 1.0}
    processes.barrier()                                         # all have read before one writes
    processes.on_first_process(lambda: checkpoint.save_checkpoint(path, weights.tensors,
                                                                  {**header, "step": 0}))
