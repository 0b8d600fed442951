"""Trains a diffusion transformer (DiT) on the data: the base model that minimax.py fine-tunes.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          the forward process adds noise, t = 0 ... 999
    L   = mean || eps - eps_hat(x_t, t, y) ||^2            the network learns to predict that noise

    python diffusion.py        # 1,257 digits, 1.3M parameters: 5 minutes on two CPU cores
    python diffusion.py --data my/pictures --dry-run        # prints what it would train on, and stops
    python diffusion.py --network uvit                      # U-ViT in place of DiT (nanodd/networks/uvit.py)
    python diffusion.py --weights DiT-XL-2-256x256.pt       # takes ImageNet's published weights instead

Writes out/digits/base.safetensors (the averaged weights, and what it takes to build the network again),
base.log.jsonl, and base.png, a row of samples after each tenth of the steps. A stopped run resumes; on a CPU
its final weights are the same to the bit. Under torchrun the batch is divided over the processes.
Sources: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (learned variance), Peebles & Xie 2023 (DiT),
Xie et al. 2023 (DiffFit).
"""
import functools
import math
import pathlib
from collections import OrderedDict
from typing import NamedTuple

import nanodd  # noqa: F401 (before torch: it sets how long waiting CPU threads spin)
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint as gradient_checkpoint

from nanodd import cli, processes, running
from nanodd.data import datasets
from nanodd.networks import checkpoint, ddpm, models, published, training
from nanodd.sampling import sheets

# ----------------------------------------------------------------------------------------------------
# 1. The noise schedule and the forward process


class Schedule:
    """A linear schedule: abar_t = prod_{s<=t} (1 - beta_s), beta from 1e-4 to 0.02 (Ho et al. 2020, sec. 4).

    abar: (T,) float64 on the CPU, from 0.9999 (t = 0, one step of noise) down to 4e-5 (t = 999, all noise).
    signal, noise: sqrt(abar) and sqrt(1 - abar), (T,) float32 on `device`. Our t is Ho et al.'s t - 1.
    """
    name, T, discrete = "linear", 1000, True

    def __init__(self, device="cpu"):
        self.abar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, self.T, dtype=torch.float64), dim=0)
        self.signal = self.abar.sqrt().float().to(device)
        self.noise = (1 - self.abar).sqrt().float().to(device)

    def draw_times(self, batch, rng, device):
        """Random t to train on, (batch,) int64, every one of 0..999 as likely as the others."""
        return torch.randint(self.T, (batch,), generator=rng, device=device)

    def at(self, t):
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply images: t (B,) int64 -> two (B, 1, 1, 1)."""
        return self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)

    def q_sample(self, x0, t, eps):
        """Noise x0 to time t (Ho et al. 2020, eq. 4): x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps."""
        signal, noise = self.at(t)
        return signal * x0 + noise * eps

    def x0_from_eps(self, xt, t, eps):
        """x_0 of x_t and eps (Ho et al. 2020, eq. 15). An error of eps enters 157-fold at t = 999."""
        signal, noise = self.at(t)
        return (xt - noise * eps) / signal

    def abar_at(self, t):
        """abar, a float, at one t in [0, 999]; between whole t, log abar is interpolated (for DPM-Solver)."""
        return ddpm.abar_at(self.abar, t)

    def end(self, steps):
        """The t at which a sampler of `steps` steps ends: 0 for this schedule, above 0 for U-ViT's."""
        return 0


# ----------------------------------------------------------------------------------------------------
# 2. DiT: a transformer over patches; its layer norms are modulated by time and class
#
# Names and shapes of parameters are those of the published checkpoints, whose networks learn the variance.
# B images, N tokens, D width, p pixels (latent cells) per token side, C channels, out = C or 2C channels.

SIZES = {                      # depth, width D, heads
    "tiny": (4, 128, 4), "XS": (6, 256, 4),                     # ours; the others are DiT's
    "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DIFFFIT_BLOCKS = 14            # Gu et al.'s code has gammas in the first 14 of DiT-XL/2's 28 blocks


def cos_sin(positions, dim):
    """Positions (n,) -> cosines, then sines, both (n, dim/2); frequencies from 1 down towards 1/10000."""
    exponents = torch.arange(dim // 2, device=positions.device, dtype=positions.dtype) / (dim // 2)
    angles = positions[:, None] * torch.exp(-math.log(10000) * exponents)   # (n, dim/2)
    return angles.cos(), angles.sin()


def position_table(grid, dim):
    """Fixed embedding of a (grid, grid) map: (1, grid * grid, dim); the column's half first, sines first."""
    row, column = torch.meshgrid(2 * [torch.arange(grid, dtype=torch.float64, device="cpu")], indexing="ij")
    halves = [torch.cat(cos_sin(place.flatten(), dim // 2)[::-1], dim=1) for place in (column, row)]
    return torch.cat(halves, dim=1).float().unsqueeze(0).to(torch.get_default_device())     # perhaps meta


def rescale(x, gamma):
    """x * gamma, the factor that DiffFit adds for fine-tuning (Xie et al. 2023); x where there is none."""
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
        waves = torch.cat(cos_sin(t, 256), dim=1)               # (B, 256) float32: bfloat16 rounds 999
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D); DiffFit's gammas scale qkv and the output."""

    def __init__(self, width, heads, difffit):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.gamma1 = nn.Parameter(torch.ones(3 * width)) if difffit else None
        self.gamma2 = nn.Parameter(torch.ones(width)) if difffit else None

    def forward(self, x):
        qkv = rescale(self.qkv(x), self.gamma1)                             # (B, N, 3D)
        q, k, v = rearrange(qkv, "B N (three h d) -> three B h N d", three=3, h=self.heads)
        x = rearrange(F.scaled_dot_product_attention(q, k, v), "B h N d -> B N (h d)")
        return rescale(self.proj(x), self.gamma2)


class Block(nn.Module):
    """A transformer block whose shifts, scales and gates come from c (B, D), (B, N, D) -> (B, N, D).

    adaLN-Zero: all six are zero at first, and the block is the identity (Peebles & Xie 2023, sec. 3.2).
    """

    def __init__(self, width, heads, difffit):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, difffit)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU("tanh"),
                                             fc2=nn.Linear(4 * width, width)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.gamma1 = nn.Parameter(torch.ones(width)) if difffit else None
        self.gamma2 = nn.Parameter(torch.ones(width)) if difffit else None

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # 6 of (B, D)
        x = x + rescale(gate1, self.gamma1).unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + rescale(gate2, self.gamma2).unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x


class FinalLayer(nn.Module):
    """Tokens to pixels: x (B, N, D), c (B, D) -> (B, N, p * p * out)."""

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

    size: H = W, a multiple of patch. classes: K; the label table has one row more: "no class", for guidance.
    With `learned_variance` there are 2C output channels: eps_hat, then the variance logits. With `difffit`
    the first 14 blocks have DiffFit's factors (gammas), which start at 1 and change nothing.
    """
    recompute = False          # True: gradient checkpointing, less memory for more time in training

    def __init__(self, network, size, patch, channels, classes, learned_variance=False, difffit=False):
        super().__init__()
        depth, width, heads = SIZES[network]
        self.patch, self.grid = patch, size // patch
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        self.pos_embed = nn.Parameter(position_table(self.grid, width), requires_grad=False)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.blocks = nn.ModuleList(Block(width, heads, difffit and i < DIFFFIT_BLOCKS) for i in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels * (2 if learned_variance else 1))
        # Xavier everywhere, small normal numbers in the embeddings, zeros for adaLN-Zero and the output
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
        x = self.x_embedder.proj(x.to(self.x_embedder.proj.weight.dtype))   # (B, D, H / p, W / p)
        x = rearrange(x, "B D h w -> B (h w) D") + self.pos_embed           # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)         # (B, D)
        for block in self.blocks:                                           # (B, N, D)
            x = gradient_checkpoint(block, x, c, use_reentrant=False) if self.recompute else block(x, c)
        x = self.final_layer(x, c)                                          # (B, N, p * p * out)
        return rearrange(x, "B (h w) (p q c) -> B c (h p) (w q)", h=self.grid, p=self.patch, q=self.patch)


# nanodd/ may not import this file: there, checkpoint.network_of builds a DiT by its name in this table
checkpoint.BACKBONES["dit"] = checkpoint.Backbone(DiT, SIZES, Schedule, training.by_recipe)

# ----------------------------------------------------------------------------------------------------
# 3. The loss


class Denoised(NamedTuple):
    """What denoising_loss returns: loss (B,); xt, eps_hat, x0_hat (B, C, H, W); all but xt have gradients."""
    loss: torch.Tensor
    xt: torch.Tensor
    eps_hat: torch.Tensor
    x0_hat: torch.Tensor


def denoising_loss(model, schedule, x0, y, t, eps):
    """mean_{C,H,W} (eps - eps_hat)^2 per image (Ho et al. 2020, eq. 14), and the one-step prediction of x0.

    x0, eps (B, C, H, W); y (B,) label rows; t (B,) in [0, 999], as schedule.draw_times gives it. x0_hat is
    neither clipped nor detached: the min-max losses send their gradient through it. Where the model learns
    its variance, the variational bound is added with weight 1, as DiT was trained; its gradient reaches
    the variance channels alone.
    """
    xt = schedule.q_sample(x0, t, eps)
    out = model(xt, t.float(), y)
    eps_hat, logits = out[:, :x0.shape[1]], out[:, x0.shape[1]:]            # (B, C, H, W); or no logits
    loss = (eps - eps_hat).pow(2).mean(dim=(1, 2, 3))                       # (B,)
    if logits.shape[1]:
        loss = loss + ddpm.variational_bound(schedule, x0, xt, t, eps_hat.detach(), logits)
    return Denoised(loss, xt, eps_hat, schedule.x0_from_eps(xt, t, eps_hat))


# ----------------------------------------------------------------------------------------------------
# 4. Training a base model


def training_batch(examples, plan, step, rows, schedule):
    """Draws all random numbers of step number `step`, a function of (plan.seed, step), so none are saved.

    examples: ImageSet or Latents, on the device. plan: training.Plan. rows: (K + 1,) row of each class in the
    network's label table, "no class" last (-1: it has none); the published table has all 1,000 classes of
    ImageNet, a data set a few of them. Returns x0 (B, C, H, W), y (B,) rows, "no class" with probability 0.1,
    t (B,) in [0, 999], eps (B, C, H, W); under torchrun, this process's share of the batch.
    """
    device, batch = examples.labels.device, plan.batch
    rng = torch.Generator(device).manual_seed((plan.seed * 1_000_003 + step) % 2**32)
    index = training.batch_index(len(examples.labels), batch, step, plan.seed).to(device)
    mirrored = torch.rand(batch, generator=rng, device=device) < 0.5 if plan.flip else None
    x0 = examples.examples(index, mirrored, rng)                            # (B, C, H, W)
    dropped = torch.rand(batch, generator=rng, device=device) < 0.1         # for classifier-free guidance
    y = torch.where(dropped & (rows[-1] >= 0), rows[-1], rows[examples.labels[index]])
    t = schedule.draw_times(batch, rng, device)
    eps = torch.randn(x0.shape, generator=rng, device=device)
    return processes.own_share(x0, y, t, eps)


def train(trainer, examples, rows, schedule, start=0):
    """The loop; training.fit runs, logs and saves it: yields {"loss": L} after every optimizer step."""
    for step in range(start, trainer.plan.steps):
        x0, y, t, eps = training_batch(examples, trainer.plan, step, rows, schedule)
        loss = denoising_loss(trainer.predict, schedule, x0, y, t, eps).loss.mean()
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.step(step)                                      # the rate, AdamW, the averaged weights
        yield {"loss": loss.detach()}


def train_base(data, path, run, network=None, steps=None, weights=None):
    """Trains the base model of `data` (datasets.Data) and writes it to `path`, unless it is there already.

    network: None for the recipe's DiT, a size of DiT, or "uvit", "uvit-S" ...; steps: None for the recipe's.
    weights: a file of U-ViT's published weights to start from. Raises UserError as models.new_base.
    """
    base = models.new_base(data, path, run, network, steps, weights)        # builds the network and AdamW
    if base is not None:                                        # else `path` is finished, or was imported
        loop = functools.partial(train, base.trainer, base.examples, base.rows, base.schedule)
        show = sheets.growing(base, path.with_suffix(".png"))   # draws a row at each tenth
        training.fit(base.trainer, loop, path, base.header, run.overwrite, show=show)


def main(argv=None):
    parser = cli.new_parser(__doc__)
    cli.add_flags(parser, cli.TRAINING)
    parser.add_argument("--steps", type=int, help="optimizer steps; fewer are faster and blurrier")
    parser.add_argument("--network", choices=checkpoint.choices(), help="a size of DiT, or U-ViT")
    parser.add_argument("--weights", nargs="?", const="", metavar="FILE",
                        help="train nothing: take DiT's published .pt, fetched if no FILE is named, for all "
                             "ImageNet subsets. With --network uvit: start from a published .pth (--steps 0: "
                             "take it as it is)")
    args = parser.parse_args(argv)
    with running.command(parser, args):
        run, backbone = cli.run_of(args, __file__, argv), checkpoint.named(args.network)[0]
        if args.weights is not None and backbone == "dit":
            return published.import_base(args, run)
        data = datasets.load(args.data, args.root, args.recipe, args.validation, args.skip_broken)
        if backbone != "dit" and args.out is None:              # a U-ViT does not replace the DiT
            args.out = pathlib.Path("out", data.name, backbone)
        path = (args.out or pathlib.Path("out", data.name)) / "base.safetensors"
        if args.dry_run:
            return models.describe_base(data, path, run, args.network, args.steps)
        train_base(data, path, run, args.network, args.steps, args.weights)
        print(f"{path} -> python minimax.py{cli.data_flags(args, '--recipe', '--out')}")


if __name__ == "__main__":
    main()
