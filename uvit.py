"""The other backbone: U-ViT, where time, class and patches are all tokens, and the schedule it learned with.

    abar(t) = exp(-(0.1 t + 9.95 t^2)), t in [0, 1]        noise grows continuously, not in 1,000 steps
    x = skip_linear([x, what the mirrored block gave])     long skips join the early blocks to the late ones

    python uvit.py             # the digits' other base model, 1.1M parameters: 9.5 minutes on two CPU cores
    python uvit.py --data cifar100 --weights cifar10_uvit_small.pth     # goes on from published weights

Writes out/digits/uvit/base.safetensors; minimax.py and sample.py take it as they take DiT's. Section 4 builds
either of the two from what a checkpoint says. Trained like DiT (diffusion.py, section 7), on CIFAR and
Tiny-ImageNet with U-ViT's own settings (section 3), elsewhere with the recipe's. Those of Li et al. 2024, who
won the first dataset distillation challenge with it, are not known beyond AdamW and a weight decay of 0.03.
Sources: Bao et al. 2023 (U-ViT), Y. Song et al. 2021 (VP-SDE), Li et al. 2024.
"""
import functools
import math
import pathlib
import shlex

import torch
from einops import rearrange
from timm.layers import Mlp, PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffusion
from diffusion import (DIFFFIT_BLOCKS, MLP_RATIO, Attention, DiT, Plan, Schedule, check_size, finished,
                       new_header, read_published, rebuild, save_checkpoint, scaled, sincos, teach)
from nanodd import cli, files, processes
from nanodd.data import archives, datasets, imageset
from nanodd.errors import UserError, exit_on_user_error

# ----------------------------------------------------------------------------------------------------
# 1. The continuous schedule


class ContinuousSchedule(Schedule):
    """The VP-SDE with beta(t) = 0.1 + 19.9 t (Y. Song et al. 2021, app. C), t in [0, 1]; no table.

    Everywhere outside this class t runs over [0, 999], as for DiT: it is what the network is told.
    """
    name = "vp"
    LAST = Schedule.T - 1

    def __init__(self, device="cpu"):
        pass

    def draw_times(self, batch, chance, device):
        """Random t to train on, (batch,) float, uniform in [0, 999]."""
        return self.LAST * torch.rand(batch, generator=chance, device=device)

    def at(self, t):
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply images: t (B,) float -> two (B, 1, 1, 1)."""
        t = t.view(-1, 1, 1, 1) / self.LAST
        log_abar = -(0.1 * t + 9.95 * t**2)
        return torch.exp(0.5 * log_abar), torch.sqrt(-torch.expm1(log_abar))

    def end(self, steps):
        """The t nearest to the image that a sampler of so many steps goes to: DPM-Solver's authors' advice.

        At 0 itself log(alpha / sigma) is infinite.
        """
        return self.LAST * (1e-3 if steps <= 15 else 1e-4)

    def abar_at(self, t):
        """abar of one t in [0, 999], a float."""
        return math.exp(-(0.1 * t / self.LAST + 9.95 * (t / self.LAST)**2))

    def time_at(self, half_log_snr):
        """The t where log(sqrt(abar) / sqrt(1 - abar)) is this number: the root of 9.95 t^2 + 0.1 t = q."""
        q = math.log1p(math.exp(-2 * half_log_snr))             # -log abar
        return self.LAST * 2 * q / (math.sqrt(0.01 + 4 * 9.95 * q) + 0.1)


# ----------------------------------------------------------------------------------------------------
# 2. U-ViT: a transformer over patches, a time token and a label token, without adaLN
#
# Names and shapes of all parameters are those of the published checkpoints. B images, N tokens, D width,
# p pixels per token side, C channels.

SIZES = {                      # depth (an even number, and one block in the middle), width D, heads
    "tiny": (4, 128, 4), "S": (12, 512, 8), "M": (16, 768, 12), "L": (20, 1024, 16)}


class Block(nn.Module):
    """A transformer block, (B, N, D) -> (B, N, D); with `skip` it first takes in a second (B, N, D)."""

    def __init__(self, width, heads, skip, difffit):
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, difffit, qkv_bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, MLP_RATIO * width)
        self.gamma1 = nn.Parameter(torch.ones(width)) if difffit else None
        self.gamma2 = nn.Parameter(torch.ones(width)) if difffit else None

    def forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))
        x = x + scaled(self.attn(self.norm1(x)), self.gamma1)
        return x + scaled(self.mlp(self.norm2(x)), self.gamma2)


class UViT(nn.Module):
    """eps_hat(x_t, t, y): x (B, C, H, W), t (B,) in [0, 999], y (B,) rows of the label table -> (B, C, H, W).

    classes: rows of the label table; 0: no label token at all, as in the published CIFAR-10 weights, and y
    is not looked at. null: one row more, which means "no class"; the published tables have none. With
    `difffit` the first 14 blocks carry DiffFit's gammas. `recompute`, as in DiT: less memory, more time.
    """
    recompute = False

    def __init__(self, network, size, patch, channels, classes, null=True, difffit=False):
        super().__init__()
        depth, width, heads = SIZES[network]
        if size % patch:
            raise UserError(f"patches of {patch} pixels do not tile {size} pixels")
        self.patch, self.grid, half = patch, size // patch, depth // 2
        self.extras = 2 if classes else 1                       # tokens that are no patches
        self.patch_embed = PatchEmbed(size, patch, channels, width)
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
        x = self.patch_embed(x.to(self.patch_embed.proj.weight.dtype))      # (B, H/p * W/p, D)
        time = torch.cat(sincos(t, x.shape[2]), dim=1).to(x.dtype)          # (B, D)
        label = [self.label_emb(y)] if self.label_emb is not None else []
        tokens = [token.unsqueeze(1) for token in (*label, time)]           # (B, 1, D) each
        x = torch.cat([*tokens, x], dim=1) + self.pos_embed                 # (B, N, D)
        skips = []
        for block in self.in_blocks:
            x = self.run(block, x)
            skips.append(x)
        x = self.run(self.mid_block, x)
        for block in self.out_blocks:                           # the last to be put down is taken up first
            x = self.run(block, x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, self.extras:]                # (B, H/p * W/p, p * p * C)
        x = rearrange(x, "B (h w) (p q c) -> B c (h p) (w q)", h=self.grid, p=self.patch, q=self.patch)
        return self.final_layer(x)

    def run(self, block, *inputs):
        return checkpoint(block, *inputs, use_reentrant=False) if self.recompute else block(*inputs)


# ----------------------------------------------------------------------------------------------------
# 3. Published weights, and how U-ViT was trained

# Bao et al. 2023's settings for CIFAR-10, taken for CIFAR-100 too, and for ImageNet at 64 pixels, taken for
# Tiny-ImageNet. Other data: the recipe's.
CIFAR = {"steps": 500_000, "batch": 128, "lr": 2e-4, "lr_warm": 2500, "beta1": .99, "beta2": .999,
         "ema": .9999, "warm": False, "decay": False}
IMAGENET64 = {"steps": 300_000, "batch": 1024, "lr": 3e-4, "lr_warm": 5000, "beta1": .99, "beta2": .99,
              "ema": .9999, "warm": False, "decay": False}
PLANS = {"cifar10": ("S", CIFAR), "cifar100": ("S", CIFAR), "tiny-imagenet": ("M", IMAGENET64)}
LIKE_DIT = {"B": "M", "XL": "L"}                                # sizes that go by other names here


def plan_of(recipe, steps, seed, bf16, device):
    """(the network's size, Plan) of a U-ViT for the data of `recipe`. steps, bf16: None for its own."""
    network, own = PLANS.get(recipe.name) or (LIKE_DIT.get(recipe.network, recipe.network), {
        "steps": recipe.steps, "batch": recipe.batch, "lr": recipe.lr, "ema": recipe.ema, "decay": True})
    own = own if steps is None else {**own, "steps": steps}
    return network, Plan(**own, seed=seed, flip=recipe.flip, weight_decay=.03,
                         bf16=cli.chosen_bf16(bf16, device, SIZES[network][1]))


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
def start_from(model, tensors, classes, path):
    """Fills a class-conditional UViT with published weights: all but what has another meaning there.

    tensors: {name: tensor} of the file `path`. classes: K names. The position of the label token, which
    comes first, is new where the file's network knew no classes: its own positions move up by one. Rows of
    the label table are copied where it is ImageNet's and knows the class by its WordNet id; others are new.
    Raises UserError, naming the tensor, where anything else is missing, extra or of another shape.
    """
    mine, theirs = model.state_dict(), dict(tensors)
    table = theirs.pop("label_emb.weight", None)
    if table is None:
        positions = theirs["pos_embed"]
        theirs["pos_embed"] = torch.cat([mine["pos_embed"][:, :1].to(positions), positions], dim=1)
    labels = mine["label_emb.weight"]
    for row, place in enumerate(rows_in(table, classes)):
        if place is not None:
            labels[row] = table[place]
    files.load_strict(model, {**theirs, "label_emb.weight": labels}, path, "network")


def rows_in(table, classes):
    """The row of each class (K names) in a published label table; None where it has none for it."""
    known = {name: k for k, name in enumerate(archives.imagenet_classes())} if table is not None and \
        len(table) == 1000 else {}
    return [known.get(name) for name in classes]


def import_weights(data, tensors, config, path, out, overwrite, typed):
    """Writes published weights, as they are, as the base model of data.train's classes, which they know.

    tensors, config: what read_published(path) gave. Without a row for "no class" (the header's -1) there is
    no guidance. Raises UserError where a class has no row, or a tensor does not fit.
    """
    settings = {"weights": files.fingerprint(tensors), "data": imageset.fingerprint(data.train)}
    rows = rows_in(tensors.get("label_emb.weight"), data.train.classes)
    if None in rows:
        raise UserError(f"{path} does not know the class {data.train.classes[rows.index(None)]}: train on "
                        "from it, with --steps 1 or more")
    if finished(out, settings, overwrite):
        return
    rebuild(config, tensors, path, network_of)                  # only to refuse what does not fit
    header = {**new_header(data, config, settings, typed, ContinuousSchedule()),
              "rows": [*rows, -1], "guidance": 1.0}
    processes.barrier()                                         # all have looked before one writes
    if processes.rank() == 0:
        save_checkpoint(out, tensors, {**header, "step": 0})
    processes.barrier()


# ----------------------------------------------------------------------------------------------------
# 4. Either backbone, from what a checkpoint's header says


def network_of(backbone="dit", **config):
    """The network of a checkpoint's "config", which names a backbone unless it is DiT."""
    if backbone not in ("dit", "uvit"):
        raise UserError(f"the backbone {backbone} is not here; dit and uvit are")
    return DiT(**config) if backbone == "dit" else UViT(**config)


def width_of(config):
    """How wide the network of a checkpoint's "config" is."""
    return (SIZES if config.get("backbone") == "uvit" else diffusion.SIZES)[config["network"]][1]


def schedule_of(name, path, device="cpu"):
    """The schedule that a checkpoint names: "linear" (DiT's) or "vp". Raises UserError on others."""
    for schedule in (Schedule, ContinuousSchedule):
        if schedule.name == name:
            return schedule(device)
    raise UserError(f"{path} was trained with a {name} schedule; linear and vp are here")


# ----------------------------------------------------------------------------------------------------
# 5. The base model


def main(argv=None):
    parser = cli.new_parser(__doc__)
    cli.add_flags(parser,
                  "data root recipe validation out seed device overwrite vae skip-broken bf16 compile")
    parser.add_argument("--steps", type=int, help="optimizer steps; fewer are faster and blurrier; 0 takes "
                                                  "--weights as they are (default: U-ViT's own on CIFAR "
                                                  "and Tiny-ImageNet, else the recipe's)")
    parser.add_argument("--weights", type=pathlib.Path, metavar="FILE",
                        help="start from a published .pth: cifar10_uvit_small, imagenet64_uvit_mid")
    parser.add_argument("--recompute", action="store_true",
                        help="less memory, more work: blocks are worked out again on the way back")
    args = parser.parse_args(argv)
    with exit_on_user_error(parser), processes.process_group():
        data = datasets.load(args.data, args.root, args.recipe, args.validation, args.skip_broken)
        out = args.out or pathlib.Path("out", data.name, "uvit")
        train(args, data, out / "base.safetensors", cli.command_line_of(__file__, argv))
        print(f"{out / 'base.safetensors'} -> python minimax.py{cli.data_flags(args, '--recipe')} "
              f"--out {shlex.quote(str(out))}")


def train(args, data, path, typed):
    """Everything after the data was read: makes the base model `path`."""
    recipe, classes, device = data.recipe, data.train.classes, cli.device_named(args.device)
    network, plan = plan_of(recipe, args.steps, args.seed, args.bf16, device)
    config = {"backbone": "uvit", "network": network, "size": recipe.size, "patch": recipe.patch,
              "channels": recipe.channels, "classes": len(classes)}
    if plan.steps < (1 if args.weights is None else 0):
        raise UserError(f"--steps must be at least 1 (0 with --weights), not {plan.steps}")
    tensors = None
    if args.weights is not None:
        tensors, theirs = read_published(args.weights, uvit_config, "U-ViT")
        wanted = {key: config[key] for key in ("network", "size", "patch", "channels")}
        check_size(theirs, wanted, args.weights, recipe.name)
    if plan.steps == 0:
        import_weights(data, tensors, theirs, args.weights, path, args.overwrite, typed)
        return

    def start():
        model = network_of(**config)
        if tensors is not None:
            start_from(model, tensors, classes, args.weights)
        model.recompute = args.recompute
        return model
    teach(data, path, config, plan, start, ContinuousSchedule(), device=device, vae=args.vae,
          compiled=args.compile, skip_broken=args.skip_broken, overwrite=args.overwrite, typed=typed,
          more={"weights": files.fingerprint(tensors)} if tensors else {})


if __name__ == "__main__":
    main()
