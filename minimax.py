"""Fine-tunes the diffusion model so that what it generates is representative and diverse.

    L_r = mean over the classes c in the batch of  1 - min cos(z_hat[c], real memory[c])
    L_d = mean over the classes c in the batch of      max cos(z_hat[c], generated memory[c])
    L   = L_diff + lambda_r L_r + lambda_d L_d                    Gu et al. 2024, eq. 3 to 5; Fan et al. 2025

    python minimax.py          # 22 s on two CPU cores; the first time 5 minutes, base model included
    python minimax.py --data imagewoof --root /data/imagenet        # Gu et al. 2024, from DiT-XL/2's weights
    torchrun --nproc-per-node=4 minimax.py ...                      # the batch divided over four GPUs

z_hat is the one-step guess at the clean image. The min picks the least similar (guess, real image) pair of a
class, the max the most similar (guess, earlier guess) pair, over all of the class in the batch as in the
authors' code: one pair per class and step feels each term. Makes the base model, or fetches it, first when
there is none. Writes out/digits/minimax.safetensors: only what was tuned, to be laid over its base; with
--phases one such file for each group of classes, minimax-0-19.safetensors and so on.
"""
import os
import pathlib
import shlex

import torch
import torch.nn.functional as F

from diffusion import (Plan, Trainer, difffit_parameters, finished, fit, import_weights, new_header,
                       published_base, rebuild, rows_of, train_base)
from memory import Memory, policies
from nanodd import cli, files, processes
from nanodd.data import archives, datasets, imageset
from nanodd.errors import UserError, exit_on_user_error
from uvit import network_of, schedule_of, width_of
from vae import prepared, source_name

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
        """denoised: diffusion.Denoised and x0 (B, C, H, W), this process's share of the batch; labels: list,
        of the whole batch -> (scalar, {"repr": L_r, "div": L_d}).

        Compares before it pushes, so that no guess meets its own copy of this step. A class whose memory is
        still empty adds nothing but counts in the mean. Many processes remember the same, the whole batch,
        but each looks for the extremum, and takes the mean, in its own share.
        """
        z = denoised.x0_hat if self.z_hat == "x0" else denoised.xt - denoised.eps_hat
        z, real = z.flatten(1), x0.flatten(1)                               # (B, D)
        l_r = l_d = torch.zeros((), device=z.device)
        own = labels[processes.rank() * len(z):][:len(z)]
        z_by_class, real_by_class = by_class(z, own), by_class(real, own)
        for c, mine in z_by_class.items():
            theirs = real_by_class[c]                                       # (n, D), as mine
            if self.naive:
                l_r = l_r + naive_representativeness(mine, theirs)
            elif self.real.get(c) is not None:
                l_r = l_r + representativeness(mine, self.real.get(c))
            if self.generated.get(c) is not None:
                l_d = l_d + (naive_diversity if self.naive else diversity)(mine, self.generated.get(c))
        l_r, l_d = l_r / len(z_by_class), l_d / len(z_by_class)
        for memory, x in ((self.real, real), (self.generated, z)):
            for c, items in by_class(processes.all_gather(x), labels).items():
                memory.push(c, items)
        return self.lambda_r * l_r + self.lambda_d * l_d, {"repr": l_r.detach(), "div": l_d.detach()}

    def state_dict(self):
        return {"real": self.real.state_dict(), "generated": self.generated.state_dict()}

    def load_state_dict(self, state):
        self.real.load_state_dict(state["real"])
        self.generated.load_state_dict(state["generated"])


def by_class(x, labels):
    """x (B, D), labels (list of B) -> {class: its rows (n, D)}. From a list, so that no GPU is waited for."""
    rows = x.unbind()
    return {c: torch.stack([row for row, label in zip(rows, labels, strict=True) if label == c])
            for c in sorted(set(labels))}


# ----------------------------------------------------------------------------------------------------
# 3. The driver


def tuned_model(base, header, tune, device):
    """The base model at `base` with only what is to be tuned requiring gradients: (network, its config)."""
    config = {**header["config"], "difffit": tune == "difffit"}
    model = rebuild(config, files.load_tensors(base), base, network_of)
    if tune == "difffit":
        names = set(difffit_parameters(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
    return model.to(device), config


def class_ranges(args, K):
    """The (first, last) class of each model to be tuned: all in one, --classes A-B, or --phases of N."""
    if args.classes is not None and args.phases is not None:
        raise UserError("--classes makes one phase and --phases all of them: choose one")
    if args.phases is not None:
        if args.phases < 1:
            raise UserError(f"--phases must be at least 1 class, not {args.phases}")
        return [(first, min(first + args.phases, K) - 1) for first in range(0, K, args.phases)]
    if args.classes is None:
        return [(0, K - 1)]
    first, _, last = args.classes.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < K):
        raise UserError(f"--classes {args.classes} is no range A-B within 0-{K - 1}")
    return [(int(first), int(last))]


def checked(args, recipe):
    """Fills the recipe's numbers in where none were given, and refuses those that make no sense."""
    batch = recipe.tune_batch if args.batch is None else args.batch
    lambda_r = recipe.lambda_r if args.lambda_r is None else args.lambda_r
    lambda_d = recipe.lambda_d if args.lambda_d is None else args.lambda_d
    for flag, number in (("--steps", args.steps), ("--slots", args.slots), ("--batch", batch)):
        if number is not None and number < 1:
            raise UserError(f"{flag} must be at least 1, not {number}")
    processes.batch_share(batch)                                # or refuses, before anything takes time
    if not (0 <= lambda_r < float("inf") and 0 <= lambda_d < float("inf")):
        raise UserError("--lambda-r and --lambda-d must not be negative or infinite, "
                        f"and are {lambda_r} and {lambda_d}")
    return batch, lambda_r, lambda_d, policies(args.memory)


def base_of(args, data, home, device, typed):
    """Where the base model lies; makes it, or takes the published weights, where there is none."""
    path, recipe = args.base or (args.out or home) / "base.safetensors", data.recipe
    if not args.base and not path.is_file():
        path = home / path.name
    if path.is_file():
        return path
    if args.base:
        raise UserError(f"there is no {path}: python diffusion.py makes a base model")
    if recipe.weights:
        strange = sorted(set(data.train.classes) - set(archives.imagenet_classes()))
        if strange:
            raise UserError(f"the published weights do not know the class {strange[0]}: train a base model, "
                            f"python diffusion.py{cli.data_flags(args, '--recipe')}")
        if not published_base(recipe).is_file():
            import_weights(recipe, None, typed, args.overwrite)
        return published_base(recipe)
    print(f"no {path} yet: making it first, once (python diffusion.py --steps N makes a quicker, worse one)")
    train_base(data, path, steps=recipe.steps, seed=args.seed, device=device, vae=args.vae, bf16=args.bf16,
               compiled=args.compile, skip_broken=args.skip_broken, overwrite=args.overwrite, typed=typed)
    return path


def check_base(header, base, data):
    """Refuses a base model that is none, or of other classes or sizes. Returns the classes' rows (K + 1,)."""
    recipe, config = data.recipe, header["config"]
    if "base" in header:
        raise UserError(f"{base} is fine-tuned already: start from a base model")
    classes = data.train.classes
    if header["data"] != "imagenet" and (header["data"], header["classes"]) != (data.name, classes):
        raise UserError(f"{base} is of the data set {header['data']} with {len(header['classes'])} classes, "
                        f"not of {data.name} with {len(classes)}")
    drawn = config["size"], config["channels"], header["latents"]
    if drawn != (recipe.size, recipe.channels, recipe.latents):
        raise UserError(f"{base} draws {config['channels']} x {config['size']} "
                        f"{'latents' if header['latents'] else 'pixels'}, but the recipe has "
                        f"{recipe.channels} x {recipe.size} {'latents' if recipe.latents else 'pixels'}")
    return rows_of(header, classes, base)


def main(argv=None):
    parser = cli.new_parser(__doc__)
    cli.add_flags(parser,
                  "data root recipe validation out seed device overwrite vae skip-broken bf16 compile")
    parser.add_argument("--base", type=pathlib.Path, metavar="FILE",
                        help="what to start from (default: base.safetensors in --out or out/NAME, made with "
                             "this --seed if there is none; for ImageNet the published weights, fetched)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--batch", type=int, help="images a step, of all processes (default: the recipe's)")
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
    parser.add_argument("--classes", metavar="A-B",
                        help="tune on these classes alone, counted from 0: one phase of a large data set")
    parser.add_argument("--phases", type=int, metavar="N",
                        help="one model for every N classes, one after the other; Gu et al. take 20 for "
                             "ImageNet-100 and -1K")
    parser.add_argument("--recompute", action="store_true",
                        help="less memory, more work: blocks are worked out again on the way back")
    args = parser.parse_args(argv)
    with exit_on_user_error(parser), processes.process_group():
        run(args, cli.command_line_of(__file__, argv))


def run(args, typed):
    """Everything after the command line was read."""
    data = datasets.load(args.data, args.root, args.recipe, args.validation, args.skip_broken)
    device, home, K = cli.device_named(args.device), pathlib.Path("out", data.name), len(data.train.classes)
    numbers, ranges = checked(args, data.recipe), class_ranges(args, K)
    base = base_of(args, data, home, device, typed)
    rows = check_base(files.read_header(base), base, data)
    for first, last in ranges:
        name = "minimax" if (first, last) == (0, K - 1) else f"minimax-{first}-{last}"
        path = (args.out or home) / f"{name}.safetensors"
        tune_phase(args, data, (first, last), base, rows, path, numbers, device, typed)
    source = path if len(ranges) == 1 else path.parent
    how = "--sampler ddpm --grid uniform --steps 50 --cfg-channels 3" if data.recipe.latents else "--steps 10"
    print(f"{source} -> python sample.py {how}{cli.data_flags(args, '--out')}"
          + (f" --checkpoint {shlex.quote(str(source))}" if args.out or args.classes else ""))


def tune_phase(args, data, phase, base, rows, path, numbers, device, typed):
    """Fine-tunes on the classes phase[0] to phase[1] and writes `path`. numbers: of `checked`."""
    recipe, header, (first, last) = data.recipe, files.read_header(base), phase
    batch, lambda_r, lambda_d, memory = numbers
    train = data.train.pick((first <= data.train.labels) & (data.train.labels <= last))
    # as asked, else the recipe's count, else as many whole batches as its epochs hold
    steps = args.steps or recipe.tune_steps or recipe.tune_epochs * (len(train.labels) // batch)
    if steps < 1:
        raise UserError(f"{len(train.labels)} images make no batch of {batch}: lower --batch")
    plan = Plan(steps=steps, batch=batch, lr=recipe.tune_lr, decay=False, ema=recipe.tune_ema,
                seed=args.seed, flip=recipe.flip, beta2=recipe.tune_beta2, warm=recipe.tune_warm,
                bf16=cli.chosen_bf16(args.bf16, device, width_of(header["config"])))
    settings = {**plan._asdict(), "data": imageset.fingerprint(train), "base": header["fingerprint"],
                "lambda_r": lambda_r, "lambda_d": lambda_d, "memory": list(memory), "slots": args.slots,
                "z_hat": args.z_hat, "naive": args.naive, "tune": args.tune, "processes": processes.world(),
                "encoder": source_name(args.vae) if recipe.latents else None}
    if finished(path, settings, args.overwrite):
        return
    train = prepared(data._replace(train=train), args.vae, device, args.skip_broken, args.overwrite)
    model, config = tuned_model(base, header, args.tune, device)
    model.recompute = args.recompute
    tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"min-max | {data.name}, {data.cut} | classes {first}-{last} | "
          f"device {device}{' bf16' * plan.bf16} x {processes.world()} | {tuned:,} of {parameters:,} "
          f"parameters tuned | {steps} steps of {plan.batch} | lambda_r {lambda_r:g} lambda_d {lambda_d:g} | "
          f"memory {','.join(memory)} x {args.slots} | seed {args.seed}")
    if args.compile:
        model.compile()
    losses = MinMax(lambda_r, lambda_d, args.slots, memory, args.z_hat, args.naive)
    origin = {"file": os.path.relpath(base, path.parent), "fingerprint": header["fingerprint"]}
    schedule = schedule_of(header["schedule"], base, device)
    fit(Trainer(model, train, torch.tensor(rows, device=device), plan, losses, schedule), path,
        {**new_header(data, config, settings, typed, schedule), "rows": rows, "phase": phase, "base": origin},
        args.overwrite)


if __name__ == "__main__":
    main()
