"""Distils the diffusion model into a student that draws an image in one network call.

    x0_hat = (x_s - sigma_s eps_hat(x_s, s, y)) / alpha_s       the student's image, of pure noise at s = t*
    L_adv  = -mean D(x0_hat, y)                                 a discriminator D should take it for real;
    L_dist = mean alpha_t |x0_hat - x0_teacher(x_t, t, y)|^2    noised to t and denoised by the teacher in one
    L      = L_adv + lambda L_dist                              step, it should come back unchanged

    python turbo.py                              # 4.6 minutes on two CPU cores, the base model not included
    python turbo.py --checkpoint out/digits/minimax.safetensors --out out/tuned     # of a fine-tuned model
    python sample.py --checkpoint out/digits/turbo.safetensors --out out/digits/turbo       # or --steps 2

This is adversarial diffusion distillation (ADD, Sauer et al. 2023, eq. 1 to 4), which made SDXL-Turbo.
Student and teacher start as the same network, and the teacher stays as it is; neither uses guidance. D is a
small head on each depth of a frozen network, and learns in turn with the student: L_D = max(0, 1 - D(real)) +
max(0, 1 + D(generated)) + R1. --lambda 0 trains with L_adv only, --no-adversarial with L_dist only. Writes
out/digits/turbo.safetensors (the averaged weights), turbo.log.jsonl (the losses; "real" and "generated" are
D's mean answers), turbo.png, a row of one-step samples after each tenth of the steps, and the classifier of
real images that D looks through. A stopped run resumes; on a CPU to the same bits. Sources besides: Sauer et
al. 2024 (LADD: D on noised images), Lim & Ye 2017 (hinge), Mescheder et al. 2018 (R1), Miyato & Koyama 2018
(D of classes), Zhao et al. 2020 (augmentation in front of D).
"""
import argparse
import functools
import pathlib
import shlex

import nanodd  # noqa: F401 (before torch: it sets how long waiting CPU threads spin)
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import convnet
from diffusion import Schedule, train_base
from nanodd import checks, cli, processes, running
from nanodd.data import datasets
from nanodd.judging import augment, features
from nanodd.networks import models, training
from nanodd.sampling import sheets
from sample import timesteps
from train_eval import CHALLENGE_FAMILIES, count_epochs, dsa, train_judges

# Chosen on the digits' validation part (docs/digits.md). On its way into x0_hat an error of eps_hat is
# multiplied by sigma/alpha: by 157 at t = 999, where samplers start, by 14.6 at 727, as in SDXL-Turbo's first
# step, and by 2.0 at 400, where even the base's one step is no class average, but depends on its noise.
STEPS, LAMBDA, T_STAR = 2000, 2.5, 400
# share: of a batch at t*, the rest trains for --steps 2 and 4; r1: weight of the gradient penalty, as ADD's
FIXED = {"lr": 4e-4, "lr_heads": 2e-3, "share": 0.75, "r1": 1e-5}

# ----------------------------------------------------------------------------------------------------
# 1. The student's image, and the two losses that form it


def x0_hat(network, schedule, xt, t, y):
    """One step from x_t to an image: xt (B, C, H, W), t (B,), y (B,) label rows -> (B, C, H, W)."""
    eps_hat = network(xt, t.float(), y)[:, :xt.shape[1]].float()    # without variance logits
    return schedule.x0_from_eps(xt, t, eps_hat)


def distillation_loss(teacher, schedule, x, t, y, eps):
    """The mean of alpha_t (x - x0_teacher(x_t, t, y))^2 (Sauer et al. 2023, eq. 4, with c(t) = alpha_t).

    x: the student's images (B, C, H, W); only they get a gradient. The target depends on them: the teacher
    sees x noised to t, and its one step gives the mean of the images that fit x_t, not a sample.
    """
    with torch.no_grad():
        target = x0_hat(teacher, schedule, schedule.q_sample(x, t, eps), t, y)
    alpha, _ = schedule.at(t)                                               # (B, 1, 1, 1)
    return (alpha * (x - target).square()).mean()


def hinge_loss(real, generated):
    """L_D without R1 of each head's logits, lists of (B, N): the mean over heads, where eq. 3 has the sum."""
    pairs = zip(real, generated, strict=True)
    return sum(F.relu(1 - r).mean() + F.relu(1 + g).mean() for r, g in pairs) / len(real)


def mean_logit(logits):
    """D: the mean of the heads' logits, a list of (B, N), every head with the same weight."""
    return sum(logit.mean() for logit in logits) / len(logits)


def gradient_penalty(real, tokens):
    """R1 (eq. 3): |d D_k / d f|^2 of head k at its input f, of real images; the mean over B and heads."""
    gradients = torch.autograd.grad(sum(logit.mean(dim=1).sum() for logit in real), tokens, create_graph=True)
    return sum(gradient.square().sum() for gradient in gradients) / (len(real) * len(real[0]))


# ----------------------------------------------------------------------------------------------------
# 2. The discriminator: small heads on the features of a frozen network
#
# tokens_of(x, y, rng): images x (B, C, H, W) in [-1, 1] of label rows y (B,) -> a list of tokens (B, N, D),
# one for each depth of a frozen network, with gradients to x.


def noised_features(network, schedule):
    """The tokens after each block of a frozen DiT or U-ViT, of images noised to t < 750 (LADD)."""
    tokens = []                                                 # of the call that runs
    for block in [module for module in network.modules() if hasattr(module, "attn")]:
        block.register_forward_hook(lambda module, inputs, output: tokens.append(output))

    def tokens_of(x, y, rng):
        tokens.clear()
        t = schedule.draw_times(len(x), rng, x.device) * 3 // 4             # (B,)
        eps = torch.randn(x.shape, generator=rng, device=x.device)
        network(schedule.q_sample(x, t, eps), t.float(), y)
        return [f.float() for f in tokens]
    return tokens_of


def judge_features(judge, recipe):
    """The maps of a frozen ConvNet judge after each pooling: S^2/4, then S^2/16 and S^2/64 tokens of 128."""
    def tokens_of(x, y, rng):
        x = F.interpolate(x, recipe.judge_size, mode="bicubic", antialias=True)
        x, tokens = augment.standardise((x + 1) / 2, recipe), []            # (B, C, S, S)
        for layer in judge.features:
            x = layer(x)
            if isinstance(layer, nn.AvgPool2d):
                tokens.append(rearrange(x, "B D H W -> B (H W) D"))
        return tokens
    return tokens_of


class Head(nn.Module):
    """Logits (B, N) of tokens (B, N, D): is it real, and of label row y (B,)? (Miyato & Koyama 2018)"""

    def __init__(self, width, row_count, hidden=64):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, hidden)
        self.residual, self.out = nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
        self.label = nn.Embedding(row_count, hidden)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, tokens, y):
        h = F.leaky_relu(self.inner(self.norm(tokens)), 0.2)                # (B, N, 64)
        h = h + F.leaky_relu(self.residual(h), 0.2)
        by_class = (h * self.label(y).unsqueeze(1)).sum(dim=2) / h.shape[2]**0.5            # (B, N)
        return self.out(h).squeeze(2) + by_class


class Discriminator:
    """A head for each depth of a frozen network, and the heads' optimizer.

    tokens_of: as above. augment: (x, rng, cpu_rng) -> x, applied to all images that D sees. example: images
    (B, C, H, W), for the shapes. row_count: how many label rows there are.
    """

    def __init__(self, tokens_of, augment, example, row_count):
        self.tokens_of, self.augment = tokens_of, augment
        y = torch.zeros(len(example), dtype=torch.long, device=example.device)
        tokens = tokens_of(example, y, torch.Generator(example.device))     # a list of (B, N, D)
        self.heads = nn.ModuleList(Head(f.shape[2], row_count) for f in tokens).to(example.device)
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), lr=FIXED["lr_heads"], betas=(0., .99),
                                           weight_decay=0, fused=True)

    def tokens(self, x, y, rng, cpu_rng):
        """The tokens of images x (B, C, H, W) of label rows y (B,), once augmented: a list of (B, N, D)."""
        return self.tokens_of(self.augment(x, rng, cpu_rng), y, rng)

    def logits(self, tokens, y):
        """The heads' logits of a list of tokens (B, N, D), for label rows y (B,): a list of (B, N)."""
        return [head(f, y) for head, f in zip(self.heads, tokens, strict=True)]

    def step(self, share):
        """An optimizer step, on gradients averaged over processes, at this share (0 to 1) of the rate."""
        processes.average_gradients(self.heads.parameters())
        self.optimizer.param_groups[0]["lr"] = share * FIXED["lr_heads"]
        self.optimizer.step()

    def state_dict(self):
        return {"heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.heads.load_state_dict(state["heads"])
        training.load_optimizer(self.optimizer, state["optimizer"])


# ----------------------------------------------------------------------------------------------------
# 3. The training loop


def student_batch(examples, plan, step, rows, schedule, times, rng):
    """What step number `step` trains on, this process's share of the batch.

    Returns x0 (B, C, H, W), real images; y (B,), their label rows; s (B,), t* = times[0] or another of
    `times`; x_s (B, C, H, W), the images noised to s, at t* noise alone, from which sampling starts; t (B,)
    and eps (B, C, H, W), to noise what the teacher sees.
    """
    device, B = examples.labels.device, plan.batch
    index = training.batch_index(len(examples.labels), B, step, plan.seed).to(device)
    mirrored = torch.rand(B, generator=rng, device=device) < 0.5 if plan.flip else None
    x0 = examples.examples(index, mirrored, rng)                            # (B, C, H, W)
    later = torch.randint(1, len(times), (B,), generator=rng, device=device)
    later = later * (torch.rand(B, generator=rng, device=device) >= FIXED["share"])               # 0: t*
    s, t = torch.tensor(times, device=device)[later], schedule.draw_times(B, rng, device)
    eps_s, eps_t = torch.randn(2, *x0.shape, generator=rng, device=device)
    x_s = schedule.q_sample(x0 * (later > 0).view(-1, 1, 1, 1), s, eps_s)
    return processes.own_share(x0, rows[examples.labels[index]], s, x_s, t, eps_t)


def distil(trainer, discriminator, teacher, examples, rows, schedule, times, weight, start=0):
    """The loop, run by training.fit: yields the losses and D's mean answers after every step.

    discriminator: a Discriminator, or None for L_dist alone. teacher: (x, t, y) -> eps_hat. weight: lambda.
    """
    plan = trainer.plan
    for step in range(start, plan.steps):
        seed = (plan.seed * 1_000_003 + step) % 2**32
        rng, cpu_rng = torch.Generator(rows.device).manual_seed(seed), torch.Generator().manual_seed(seed)
        x0, y, s, x_s, t, eps = student_batch(examples, plan, step, rows, schedule, times, rng)
        x_hat = x0_hat(trainer.predict, schedule, x_s, s, y)                # (B, C, H, W)
        losses = {}
        if discriminator is not None:                           # D learns first, from both in one batch
            images, twice = torch.cat([x0, x_hat.detach()]), torch.cat([y, y])          # (2B, C, H, W), (2B,)
            tokens = [f.requires_grad_() for f in discriminator.tokens(images, twice, rng, cpu_rng)]
            logits = discriminator.logits(tokens, twice)                    # a list of (2B, N)
            real, generated = [d[:len(y)] for d in logits], [d[len(y):] for d in logits]
            losses = {"D": hinge_loss(real, generated), "real": mean_logit(real),
                      "generated": mean_logit(generated)}
            discriminator.optimizer.zero_grad(set_to_none=True)
            (losses["D"] + FIXED["r1"] * gradient_penalty(real, tokens)).backward()
            discriminator.step(plan.lr_at(step) / plan.lr)
            tokens = discriminator.tokens(x_hat, y, rng, cpu_rng)           # now with gradients to x_hat
            losses["adv"] = -mean_logit(discriminator.logits(tokens, y))
        if weight > 0:
            losses["dist"] = distillation_loss(teacher, schedule, x_hat, t, y, eps)
        loss = losses.get("adv", 0) + weight * losses.get("dist", 0)
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.step(step)                                      # the rate, AdamW, the averaged weights
        yield {name: value.detach() for name, value in losses.items()}


# ----------------------------------------------------------------------------------------------------
# 4. The driver


def augmented(recipe, x, rng, cpu_rng):
    """Applies one DSA family, drawn for the batch, to x (B, C, H, W) in [-1, 1]; latents stay as they are."""
    if recipe.latents:
        return x
    families = recipe.augment.split("_") if recipe.augment else CHALLENGE_FAMILIES
    x = dsa(augment.standardise((x + 1) / 2, recipe), families, rng, cpu_rng)
    return 2 * augment.unstandardise(x, recipe) - 1


def train_student(args, run, data, base, path):
    """Trains a student of the model in the file `base` and writes it to `path`, unless it is finished."""
    built = models.new_student(args, run, data, base, path, FIXED)   # builds student, teacher and AdamW
    if built is None:                                           # `path` is finished
        return
    (start, teacher), discriminator = built, None
    if args.adversarial:
        if args.features == "judge":
            judge = features.second_judge(data, run, train_judges, count_epochs, convnet.judge)
            tokens_of = judge_features(judge, data.recipe)
        else:
            tokens_of = noised_features(teacher, start.schedule)
        example = start.examples.examples(start.rows[:1] * 0, None, torch.Generator(run.device))
        torch.manual_seed(run.seed)                             # the heads' initial weights
        discriminator = Discriminator(tokens_of, functools.partial(augmented, data.recipe), example,
                                      max(start.header["rows"]) + 1)
    times = timesteps(4, "trailing", start.schedule, start=args.t_star)     # those of sample.py --steps 4
    loop = functools.partial(distil, start.trainer, discriminator, teacher, start.examples, start.rows,
                             start.schedule, times, args.weight)
    training.fit(start.trainer, loop, path, start.header, run.overwrite, memories=discriminator,
                 show=sheets.growing(start, path.with_suffix(".png")))


def main(argv=None):
    parser = cli.new_parser(__doc__)
    cli.add_flags(parser, cli.TRAINING)
    parser.add_argument("--checkpoint", dest="base", type=pathlib.Path, metavar="FILE",
                        help="the model to distil, tuned or not (default: the base, made if there is none)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lambda", dest="weight", type=float, default=LAMBDA, metavar="LAMBDA",
                        help="weight of L_dist; 0: the adversarial loss alone (default: %(default)s)")
    parser.add_argument("--adversarial", action=argparse.BooleanOptionalAction, default=True,
                        help="--no-adversarial: L_dist alone, which blurs")
    parser.add_argument("--features", choices=("judge", "base"),
                        help="the network that D looks through: a ConvNet judge of the real images, or the "
                             "base's own blocks (default: judge; base for latents)")
    parser.add_argument("--t-star", type=int, default=T_STAR, metavar="T",
                        help="the t at which the student starts from noise (default: %(default)s)")
    args = parser.parse_args(argv)
    with running.command(parser, args):
        run = cli.run_of(args, __file__, argv)
        data = datasets.load(args.data, args.root, args.recipe, args.validation, args.skip_broken)
        checks.fill_turbo_flags(args, data.recipe, Schedule.T - 1)
        path = (args.out or pathlib.Path("out", data.name)) / "turbo.safetensors"
        if args.dry_run:
            return models.describe_student(data, path, args)
        train_student(args, run, data, models.base_of(args, data, run, train_base), path)
        args.out, quoted = path.with_suffix(""), shlex.quote(str(path))     # beside the base's set
        print(f"{path} -> python sample.py --checkpoint {quoted}{cli.data_flags(args, '--out')}")


if __name__ == "__main__":
    main()
