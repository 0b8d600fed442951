"""What all commands share: flags with one meaning each, the record of a command, the device, and Run."""
import argparse
import os
import pathlib
import re
import shlex
import sys
from typing import NamedTuple

import torch

from nanodd import processes, recipes
from nanodd.errors import UserError

# ----------------------------------------------------------------------------------------------------
# 1. The shared flags

FLAGS = {
    "data": dict(default="digits", metavar="NAME|DIR",
                 help=f"{', '.join(recipes.BUILT_IN)}, or a folder of class folders (default: %(default)s)"),
    "root": dict(metavar="DIR", help="where the files are: of ImageNet, Tiny-ImageNet or CIFAR (fetched "
                                     "where it is not there), or with --data folder"),
    "recipe": dict(choices=sorted(recipes.RECIPES), help="borrow another data set's recipe"),
    "validation": dict(action="store_true",
                       help="hold the test split out and test on a fifth of the training split, for choosing "
                            "settings"),
    "out": dict(type=pathlib.Path, metavar="DIR", help="where results go (default: out/NAME)"),
    "seed": dict(type=int, default=0, help="of all random numbers (default: %(default)s)"),
    "device": dict(default="auto", help="cpu, cuda, cuda:N or mps (default: the fastest here)"),
    "dry-run": dict(action="store_true", help="print what was read and what would be trained, and stop"),
    "overwrite": dict(action="store_true", help="replace what other settings made"),
    "skip-broken": dict(action="store_true", help="leave out images that cannot be read (they are named)"),
    "vae": dict(default="ema", metavar="ema|mse|FILE",
                help="what encodes pictures, where the recipe draws latents: one of stabilityai's two "
                     "autoencoders, fetched once, or a file (default: %(default)s)"),
    "bf16": dict(action=argparse.BooleanOptionalAction,
                 help="bfloat16 arithmetic, one of a run's settings (default: where it is faster)"),
    "compile": dict(action=argparse.BooleanOptionalAction,
                    help="torch.compile the network: slower for a minute, then faster (default: only judges "
                         "that will see many images)"),
    "recompute": dict(action="store_true",
                      help="gradient checkpointing: less memory, more work, since the activations of each "
                           "block are computed again in the backward pass"),
}
# the flags of all files that train a diffusion model
TRAINING = ("data root recipe validation out seed device overwrite vae skip-broken bf16 compile recompute "
            "dry-run")


def add_flags(parser, names):
    """Adds the shared flags that a stage reads, by name, so that they mean the same everywhere."""
    for name in names.split():
        parser.add_argument(f"--{name}", **FLAGS[name])


def new_parser(doc):
    """An ArgumentParser whose --help opens with the file's own first screen, without a line of usage."""
    return argparse.ArgumentParser(description=doc, allow_abbrev=False, usage=argparse.SUPPRESS,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def check(args):
    """Raises UserError for a whole number too large for torch, and for --out among the user's pictures."""
    for name, value in vars(args).items():
        if isinstance(value, int) and abs(value) > 10**15:      # seeds have 64 bits, a judge's is 1,000 times
            raise UserError(f"--{name.replace('_', '-')} {value} is too large a number")
    data, root = getattr(args, "data", "digits"), getattr(args, "root", None)
    folder = pathlib.Path(root if data == "folder" and root else data)
    if data in recipes.BUILT_IN or not folder.is_dir():
        return
    out = (getattr(args, "out", None) or pathlib.Path("out")).resolve()
    parts = [folder / part for part in ("train", "test", "val")] if (folder / "train").is_dir() else [folder]
    if any(out.is_relative_to(part.resolve()) for part in parts):
        raise UserError(f"results in {out} would be read as pictures of {folder}: choose --out ELSEWHERE"
                        + ", or another working directory" * (getattr(args, "out", None) is None))


# ----------------------------------------------------------------------------------------------------
# 2. Commands as text


def data_flags(args, *more):
    """The flags with which the next command reads the same data: "" for the digits, else " --data DIR" ...

    more: further flags to repeat where they were given, such as "--out".
    """
    flags = [] if args.data == "digits" else ["--data", args.data]
    flags += ["--root", args.root or "DIR"] if args.root or args.data in recipes.NEEDS_ROOT else []
    flags += ["--validation"] * args.validation
    flags += ["--skip-broken"] * getattr(args, "skip_broken", False)
    for flag in more:
        value = getattr(args, flag.strip("-"))
        flags += [flag, str(value)] if value is not None else []
    return "".join(f" {shlex.quote(word)}" for word in flags)


def command_line_of(file, argv=None):
    """The command as typed, for checkpoints and records of results; absolute paths are made relative."""
    words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    words = [re.sub(r"^(--[\w-]+=)?(/.*)", lambda match: (match[1] or "") + os.path.relpath(match[2]), word)
             for word in words]
    return shlex.join(["python", pathlib.Path(file).name, *words])


# ----------------------------------------------------------------------------------------------------
# 3. The device


def device_named(name):
    """The torch.device called auto, cpu, cuda, cuda:N or mps. Raises UserError where it is absent."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is none of auto, cpu, cuda, mps")
    if kind == "mps" and not has_mps:
        raise UserError("--device mps was asked for, but there is none here; try --device cpu")
    if kind == "cuda":
        if ":" in name and processes.world() > 1:
            raise UserError(f"--device {name} puts all processes on one GPU; --device cuda: each on its own")
        index = name.partition(":")[2] or os.environ.get("LOCAL_RANK", "0")  # torchrun: one GPU a process
        if not index.isdigit() or int(index) >= torch.cuda.device_count():
            raise UserError(f"--device {name} was asked for, but there is none here; try --device cpu")
        torch.cuda.set_device(int(index))
        return torch.device(kind, int(index))
    return torch.device(name)


def gains_from_bf16(device):
    """Whether bfloat16 is faster on this device: on GPUs, and on CPUs that multiply it natively."""
    if device.type != "cpu":
        return device.type == "cuda"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch have none
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


# ----------------------------------------------------------------------------------------------------
# 4. The settings of a run


class Run(NamedTuple):
    """The settings that all stages share, read from the flags once and handed down."""
    command: str               # as typed, for the records
    device: torch.device
    seed: int
    overwrite: bool
    bf16: bool | None          # --bf16 or --no-bf16; None: where it is faster
    compile: bool
    recompute: bool            # gradient checkpointing
    vae: str                   # the autoencoder's weights: ema, mse or a file

    def in_bf16(self, width):
        """Whether a network of width `width` works in bfloat16: as the flag says, else where it is faster.

        That is on devices as in gains_from_bf16, from a width of 192 on.
        """
        return gains_from_bf16(self.device) and width >= 192 if self.bf16 is None else self.bf16


def run_of(args, file, argv=None):
    """The Run of parsed flags; a flag that the stage does not have is off. Raises as device_named does."""
    flags = {name: bool(getattr(args, name, False)) for name in ("overwrite", "compile", "recompute")}
    return Run(command_line_of(file, argv), device_named(args.device), args.seed, bf16=args.bf16,
               vae=args.vae, **flags)
