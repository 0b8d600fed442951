"""Fine-tunes the diffusion model so that what it generates is representative and diverse.

    L_r = mean over the classes c in the batch of  1 - min cos(z_hat[c], real memory[c])
    L_d = mean over the classes c in the batch of      max cos(z_hat[c], generated memory[c])
    L   = L_diff + lambda_r L_r + lambda_d L_d                    Gu et al. 2024, eq. 3 to 5; Fan et al. 2025

    python minimax.py          # 22 s on two CPU cores; the first time 5 minutes, base model included

z_hat is the one-step guess at the clean image. The min picks the least similar (guess, real image) pair of a
class, the max the most similar (guess, earlier guess) pair, over the class's whole batch as in the authors'
code: one pair per class and step feels each term. Makes the base model first
when there is none. Writes out/digits/minimax.safetensors: only what was tuned, to be laid over its base.
"""
import os
import pathlib

import torch
import torch.nn.functional as F

from data import UserError, add_flags, command, device_named, load, new_parser, one_sentence, same_data
from diffusion import (DiT, Plan, Trainer, data_print, difffit_parameters, finished, fit, load_strictly,
                       load_tensors, new_header, read_header, train_base)
from memory import Memory, policies

# ----------------------------------------------------------------------------------------------------
# 1. The two criteria, and what Gu et al. compare them with
#
# z (n, D): the batch's guesses of one class, with gradients. memory (M, D): earlier embeddings, without.


def cosines(z, memory):
    """(n, D), (M, D) -> (n, M)."""
    return F.normalize(z, dim=1) @ F.normalize(memory, dim=1).T


def representativeness(z, memory):
    """1 - the smallest of n x M cosines: pulls the least similar pair together (Gu et al. 2024, eq. 3)."""
    return 1 - cosines(z, memory).min()


def diversity(z, memory):
    """The largest of n x M cosines: pushes the most alike pair apart (Gu et al. 2024, eq. 4)."""
    return cosines(z, memory).max()


def naive_representativeness(z, batch):
    """1 - the mean cosine to the batch's own real images: pulls all to the centre (Gu et al. 2024, eq. 2)."""
    return 1 - cosines(z, batch).mean()


def naive_diversity(z, memory):
    """The mean cosine in place of the largest (Gu et al. 2024, Table 5)."""
    return cosines(z, memory).mean()


# ----------------------------------------------------------------------------------------------------
# 2. The losses over the memories


class MinMax:
    """lambda_r L_r + lambda_d L_d for a batch, with the two memories it fills as it goes.

    z_hat "x0": (x_t - sqrt(1 - abar) eps_hat) / sqrt(abar), as the authors' code has it and the published
    numbers were made. "paper": x_t - eps_hat, as Fan et al. write it; the two agree for t above about 500,
    while at small t the paper's form is the image minus about as much noise.
    """

    def __init__(self, lambda_r, lambda_d, slots=64, memory=("fifo", "fifo"), z_hat="x0", naive=False):
        self.lambda_r, self.lambda_d, self.z_hat, self.naive = lambda_r, lambda_d, z_hat, naive
        self.real, self.generated = Memory(slots, memory[0]), Memory(slots, memory[1])

    def __call__(self, denoised, x0, labels):
        """denoised: diffusion.Denoised; x0 (B, C, H, W); labels (B,) -> (scalar, {"repr": L_r, "div": L_d}).

        Compares before it pushes, so that no guess meets its own copy of this step. A class whose memory is
        still empty adds nothing but counts in the mean.
        """
        z = denoised.x0_hat if self.z_hat == "x0" else denoised.xt - denoised.eps_hat
        z, real = z.flatten(1), x0.flatten(1)                               # (B, D)
        l_r = l_d = torch.zeros((), device=z.device)
        present = labels.unique().tolist()
        for c in present:
            mine, theirs = z[labels == c], real[labels == c]                # (n, D)
            if self.naive:
                l_r = l_r + naive_representativeness(mine, theirs)
            elif self.real.get(c) is not None:
                l_r = l_r + representativeness(mine, self.real.get(c))
            if self.generated.get(c) is not None:
                l_d = l_d + (naive_diversity if self.naive else diversity)(mine, self.generated.get(c))
            self.real.push(c, theirs)
            self.generated.push(c, mine)
        l_r, l_d = l_r / len(present), l_d / len(present)
        return self.lambda_r * l_r + self.lambda_d * l_d, {"repr": l_r.detach(), "div": l_d.detach()}

    def state_dict(self):
        return {"real": self.real.state_dict(), "generated": self.generated.state_dict()}

    def load_state_dict(self, state):
        self.real.load_state_dict(state["real"])
        self.generated.load_state_dict(state["generated"])


# ----------------------------------------------------------------------------------------------------
# 3. The driver


def tuned_model(base, header, tune, device):
    """The base model at `base` with only what is to be tuned requiring gradients: (DiT, its config)."""
    config = {**header["config"], "difffit": tune == "difffit"}
    model = DiT(**config)
    load_strictly(model, load_tensors(base), base)
    if tune == "difffit":
        names = set(difffit_parameters(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
    return model.to(device), config


def checked(args, recipe):
    """Fills the recipe's numbers in where none were given, and refuses those that make no sense."""
    steps = recipe.tune_steps if args.steps is None else args.steps
    lambda_r = recipe.lambda_r if args.lambda_r is None else args.lambda_r
    lambda_d = recipe.lambda_d if args.lambda_d is None else args.lambda_d
    if steps < 1 or args.slots < 1:
        raise UserError(f"--steps and --slots must be at least 1, not {steps} and {args.slots}")
    if not (0 <= lambda_r < float("inf") and 0 <= lambda_d < float("inf")):
        raise UserError("--lambda-r and --lambda-d must not be negative or infinite, "
                        f"and are {lambda_r} and {lambda_d}")
    return steps, lambda_r, lambda_d


def main(argv=None):
    parser = new_parser(__doc__)
    add_flags(parser, "data root recipe validation out seed device overwrite")
    parser.add_argument("--base", type=pathlib.Path, metavar="FILE",
                        help="what to start from (default: out/NAME/base.safetensors; made with this "
                             "--seed if there is none)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--lambda-r", type=float, help="weight of representativeness (default: the recipe's)")
    parser.add_argument("--lambda-d", type=float, help="weight of diversity (default: the recipe's)")
    parser.add_argument("--memory", default="fifo", metavar="fifo|adaptive|REAL,GENERATED",
                        help="what is forgotten: see memory.py (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=64,
                        help="memory entries per class (default: %(default)s)")
    parser.add_argument("--z-hat", choices=("x0", "paper"), default="x0",
                        help="the guess that the losses compare (default: %(default)s)")
    parser.add_argument("--naive", action="store_true", help="means in place of min and max, for comparison")
    parser.add_argument("--tune", choices=("difffit", "all"), default="difffit",
                        help="biases, gammas and labels only, or every weight (default: %(default)s)")
    args = parser.parse_args(argv)
    with one_sentence(parser):
        run(args, command(__file__, argv))


def run(args, typed):
    """Everything after the command line was read."""
    data, device = load(args.data, args.root, args.recipe, args.validation), device_named(args.device)
    recipe, home = data.recipe, pathlib.Path("out", data.name)
    steps, lambda_r, lambda_d = checked(args, recipe)
    memory = policies(args.memory)
    base, path = args.base or home / "base.safetensors", (args.out or home) / "minimax.safetensors"
    if not base.is_file():
        if args.base:
            raise UserError(f"there is no {base}: python diffusion.py makes a base model")
        print(f"no {base} yet: making it first, once")
        train_base(data, base, steps=recipe.steps, seed=args.seed, device=device,
                   overwrite=args.overwrite, typed=typed)
    header = read_header(base)
    if "base" in header:
        raise UserError(f"{base} is fine-tuned already: start from a base model")
    if header["classes"] != data.train.classes or header["data"] != data.name:
        raise UserError(f"{base} is of the data set {header['data']} with {len(header['classes'])} classes, "
                        f"not of {data.name} with {len(data.train.classes)}")
    if header["config"]["size"] != recipe.size or header["config"]["channels"] != recipe.channels:
        raise UserError(f"{base} draws {header['config']['channels']} x {header['config']['size']} pixels, "
                        f"but the recipe has {recipe.channels} x {recipe.size}")
    plan = Plan(steps=steps, batch=recipe.tune_batch, lr=recipe.tune_lr, decay=False, ema=recipe.tune_ema,
                seed=args.seed, flip=recipe.flip)
    settings = {**plan._asdict(), "data": data_print(data.train), "base": header["fingerprint"],
                "lambda_r": lambda_r, "lambda_d": lambda_d,
                "memory": list(memory), "slots": args.slots, "z_hat": args.z_hat, "naive": args.naive,
                "tune": args.tune}
    if finished(path, settings, args.overwrite):
        return
    model, config = tuned_model(base, header, args.tune, device)
    tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"min-max | {data.name} | device {device} | {tuned:,} of {parameters:,} parameters tuned | "
          f"{steps} steps of {plan.batch} | lambda_r {lambda_r:g} lambda_d {lambda_d:g} | "
          f"memory {','.join(memory)} x {args.slots} | seed {args.seed}")
    losses = MinMax(lambda_r, lambda_d, args.slots, memory, args.z_hat, args.naive)
    rows = torch.tensor(header["rows"], device=device)
    origin = {"file": os.path.relpath(base, path.parent), "fingerprint": header["fingerprint"]}
    fit(Trainer(model, data.train.to(device), rows, plan, losses), path,
        {**new_header(data, config, settings, typed), "rows": header["rows"], "base": origin}, args.overwrite)
    print(f"saved {path} -> python sample.py --steps 10{same_data(args, '--out')}"
          + (f" --checkpoint {path}" if args.out else ""))


if __name__ == "__main__":
    main()
