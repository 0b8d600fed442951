"""Checks of the flags: numbers are filled in from the recipe, or refused before anything takes time."""
import argparse
import math
import pathlib
from dataclasses import replace

from nanodd import processes
from nanodd.errors import UserError, at_least
from nanodd.networks import training

# ----------------------------------------------------------------------------------------------------
# 1. minimax.py


def fill_tuning_flags(args, recipe):
    """Fills in the recipe's numbers where no flag was given. Raises UserError for numbers out of range."""
    args.batch = recipe.tune_batch if args.batch is None else args.batch
    args.lambda_r = recipe.lambda_r if args.lambda_r is None else args.lambda_r
    args.lambda_d = recipe.lambda_d if args.lambda_d is None else args.lambda_d
    at_least(1, steps=args.steps, slots=args.slots, batch=args.batch)
    processes.batch_share(args.batch)                           # raises where it does not divide
    if not (0 <= args.lambda_r < math.inf and 0 <= args.lambda_d < math.inf):
        raise UserError("--lambda-r and --lambda-d must not be negative or infinite, "
                        f"and are {args.lambda_r} and {args.lambda_d}")


def class_ranges(args, K):
    """[(first, last)], the classes of each model to be tuned: all K, --classes A-B, or --phases of N classes.

    Raises UserError where both flags are given, or where a number is out of range.
    """
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


def phases(args, data):
    """The models that minimax.py tunes: {path of the checkpoint: (first class, last class)}."""
    folder, K = args.out or pathlib.Path("out", data.name), len(data.train.classes)
    ranges = class_ranges(args, K)
    return {folder / ("minimax.safetensors" if (first, last) == (0, K - 1) else
                      f"minimax-{first}-{last}.safetensors"): (first, last) for first, last in ranges}


def tuning_plan(args, run, data, width):
    """The training.Plan for fine-tuning a network of width `width` on data.train.

    The number of steps is --steps, else the recipe's tune_steps, else its tune_epochs times the number of
    full batches in an epoch. Raises UserError where there are fewer images than one batch.
    """
    recipe, images = data.recipe, len(data.train.labels)
    steps = args.steps or recipe.tune_steps or recipe.tune_epochs * (images // args.batch)
    if steps < 1:
        raise UserError(f"{images} images make no batch of {args.batch}: lower --batch")
    return training.Plan(steps=steps, batch=args.batch, lr=recipe.tune_lr, decay=False, ema=recipe.tune_ema,
                         seed=run.seed, flip=recipe.flip, beta2=recipe.tune_beta2, warm=recipe.tune_warm,
                         bf16=run.in_bf16(width))


# ----------------------------------------------------------------------------------------------------
# 2. turbo.py


def fill_turbo_flags(args, recipe, last):
    """Fills in --features. last: the largest t.

    Raises UserError for numbers out of range, and for flags that leave no loss or have nothing to act on.
    """
    if args.features and not args.adversarial:
        raise UserError("--features belongs to the adversarial loss: leave --no-adversarial out")
    args.features = args.features or ("base" if recipe.latents else "judge")
    at_least(1, steps=args.steps)
    processes.batch_share(recipe.batch)                         # raises where it does not divide
    if not 0 <= args.weight < math.inf:
        raise UserError(f"--lambda must be a number, 0 or more, not {args.weight}")
    if not args.adversarial and args.weight == 0:
        raise UserError("--no-adversarial and --lambda 0 leave no loss to train with")
    if not 3 <= args.t_star <= last:
        raise UserError(f"--t-star must be between 3 and {last}, not {args.t_star}")
    if args.features == "judge" and recipe.latents:
        raise UserError("--features judge: a judge looks at pictures, and this recipe draws latents")


# ----------------------------------------------------------------------------------------------------
# 3. sample.py


def number_or_auto(text):
    """The value of --steps: an int, or "auto". Raises argparse.ArgumentTypeError for anything else."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a number or auto, not {text}") from error


def surplus_flags(args, budget):
    """Checks --modes, --mode-weight, --oversample and --keep, and fills in their defaults.

    Raises UserError for numbers out of range, and for flags that have nothing to act on.
    """
    if args.modes is None and args.mode_weight is not None:
        raise UserError("--mode-weight has nothing to weigh without --modes")
    if args.oversample == 1 and args.keep is not None:
        raise UserError("--keep has nothing to choose from without --oversample K")
    args.mode_weight = 0.1 if args.mode_weight is None else args.mode_weight
    args.keep = args.keep or "herding"
    if args.modes == math.inf and budget is not None:
        raise UserError("--modes alone means as many as --ipc: under a budget say how many, --modes N")
    if args.modes is not None and args.steps == 1:
        raise UserError("--modes pulls in the first half of the steps: one step has none")
    at_least(1, modes=args.modes, oversample=args.oversample)
    if not 0 <= args.mode_weight < math.inf:
        raise UserError(f"--mode-weight must be a number, 0 or more, not {args.mode_weight}")


def sampling_flags(args, last):
    """Checks the flags of sample.py. Returns (images per class or inf, budget in seconds or inf).

    last: the largest t. Raises UserError for numbers out of range, and for flags that exclude each other.
    """
    if sum(value is not None for value in (args.ipc, args.seconds, args.minutes)) > 1:
        raise UserError("--ipc, --seconds and --minutes exclude each other")
    budget = args.seconds if args.minutes is None else 60 * args.minutes
    at_least(1, ipc=args.ipc)
    if budget is not None and not 0 < budget < math.inf:
        raise UserError(f"the budget must be a positive time, not {budget:g} seconds")
    at_least(1, batch=args.batch)
    surplus_flags(args, budget)
    if not 0 <= args.eta <= 1:
        raise UserError(f"--eta must be between 0 and 1, not {args.eta}")
    if args.eta > 0 and args.sampler not in (None, "ddim"):
        raise UserError("--eta belongs to DDIM: DDPM has noise of its own, DPM-Solvers have none")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise UserError(f"--guidance must be a number, 0 or more, not {args.guidance}")
    low, high = args.guidance_interval
    if not 0 <= low <= high <= last:
        raise UserError(f"--guidance-interval must be LOW HIGH, 0 <= LOW <= HIGH <= {last}, not "
                        f"{low:g} {high:g}")
    if args.steps == "auto" and budget is None:
        raise UserError("--steps auto looks for the best under a budget: add --seconds or --minutes")
    if budget is None:
        return args.ipc or 10, math.inf
    return math.inf, budget


def fill_sampler(args, header):
    """Fills in --sampler, --grid and --steps: 10 steps of DDIM, or those of a one-step model.

    The header of such a model, a student of turbo.py or SDXL-Turbo, says at which t it starts, as "t_star".
    Raises UserError for flags that it cannot follow.
    """
    if "t_star" not in header:
        if args.sampler == "turbo":
            raise UserError("--sampler turbo is that of one-step models: python turbo.py makes one")
        args.sampler, args.steps = args.sampler or "ddim", 10 if args.steps is None else args.steps
        return
    flags = {"--sampler": args.sampler not in (None, "turbo"), "--grid": args.grid not in (None, "trailing"),
             "--eta": args.eta, "--modes": args.modes}
    given = [flag for flag, value in flags.items() if value]
    if given:
        raise UserError(f"{given[0]} has nothing to do here: a one-step model has its own sampler and times"
                        + ", too few to be pulled to modes" * (given[0] == "--modes"))
    args.steps = 1 if args.steps is None else args.steps
    if args.steps not in range(1, 5):
        raise UserError(f"a one-step model takes --steps 1 to 4, not {args.steps}")
    args.sampler, args.grid = "turbo", "trailing"


def guidance_of(args, header, last):
    """The keyword arguments of sample.guided, from the flags and from the checkpoint's header.

    last: the largest t. Raises UserError where flags contradict each other or the checkpoint.
    """
    unguided, channels = header["rows"][-1] < 0, header["config"]["channels"]
    guidance = (1.0 if unguided else header["guidance"]) if args.guidance is None else args.guidance
    if "t_star" in header and guidance != 1:
        raise UserError(f"a one-step model was trained without guidance: --guidance {guidance:g} cannot be, "
                        "only 1")
    if unguided and guidance != 1:
        raise UserError("this checkpoint's label table has no row for \"no class\", as published U-ViT "
                        f"weights have none: --guidance {guidance:g} cannot be, only 1")
    if args.cfg_channels is not None and not 1 <= args.cfg_channels <= channels:
        raise UserError(f"--cfg-channels must be between 1 and {channels}, not {args.cfg_channels}")
    if args.cfg_channels is not None and guidance == 1:
        raise UserError("--cfg-channels has nothing to choose with --guidance 1, which is none")
    if guidance == 1 and tuple(args.guidance_interval) != (0, last):
        raise UserError("--guidance-interval has nothing to limit with --guidance 1, which is none")
    return {"guidance": guidance, "channels": args.cfg_channels, "interval": tuple(args.guidance_interval)}


# ----------------------------------------------------------------------------------------------------
# 4. train_eval.py


def judging_recipe(args, recipe, classes, families):
    """The recipe, with the values that flags replace.

    families: the names that --augment takes. Raises UserError for numbers out of range, and for a protocol or
    families that cannot be used here.
    """
    at_least(1, ipc=args.ipc, runs=args.runs, epochs=args.epochs, size=args.size)
    at_least(0, pda=args.pda)
    if args.features != "judge" and not (args.metrics and args.features.startswith("timm:")):
        raise UserError(f"--features {args.features}: judge, or timm:NAME together with --metrics")
    flags = {"protocol": args.protocol, "net": args.net, "judge_size": args.size, "augment": args.augment}
    recipe = replace(recipe, **{name: value for name, value in flags.items() if value})
    if recipe.protocol == "gu" and classes > 100:
        raise UserError("the protocol gu is for up to 100 classes: ImageNet-1K was judged by another (RDED), "
                        "which is not here")
    if args.augment and (recipe.protocol != "short" or set(recipe.augment.split("_")) - set(families)):
        raise UserError(f"--augment joins families of the protocol short by _: {'_'.join(families)}")
    return recipe
