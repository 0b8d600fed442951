"""The network that sample.py draws with: which checkpoint it is, and what belongs to drawing with it.

A data set of many classes can be tuned in phases, a checkpoint for every few classes. Each class is then
drawn with the weights of its own phase.
"""
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from nanodd import checks, cli, files, processes
from nanodd.data import archives, datasets, imageset
from nanodd.errors import UserError
from nanodd.networks import checkpoint, latents, models
from nanodd.networks.sdxl import generator

# ----------------------------------------------------------------------------------------------------
# 1. All that drawing needs


class Trained(NamedTuple):
    """A trained network, and what sampling needs beside it."""
    source: str                # the file, or how many phases, in words
    network: torch.nn.Module   # on the device, in bf16 or float32
    header: dict               # its classes and rows are those that can be drawn
    phases: list               # (first, last, {name: tensor}): the weights of the classes first to last
    schedule: object
    guide: dict                # keywords of sample.guided: guidance, channels, interval
    decode: Callable           # samples -> pictures (B, C, H, W), about in [-1, 1]
    autoencoder: str | None    # its fingerprint; None for pixels
    bf16: bool


def for_sampling(args, run, name, out):
    """The Trained network of the data set `name` that the flags choose; fills in --sampler, --grid, --steps.

    out: the folder of results. Raises UserError as find_checkpoint, load_for_sampling, checks.fill_sampler,
    checks.guidance_of and generator.for_sampling.
    """
    if args.checkpoint == pathlib.Path("sdxl-turbo") and not args.checkpoint.exists():
        checks.fill_sampler(args, generator.HEADER)             # refuses flags before 6.9 GB are fetched
        checks.guidance_of(args, generator.HEADER, generator.Schedule.T - 1)
        data = datasets.load(args.data, args.root, None, args.validation, args.skip_broken)  # for its classes
        prompt = "{}" if args.prompt is None else args.prompt
        return Trained(**generator.for_sampling(args.weights, prompt, data, run))
    if args.prompt is not None or args.weights is not None:
        raise UserError("--prompt and --weights belong to --checkpoint sdxl-turbo")
    folder = pathlib.Path("out", name)
    source = find_checkpoint(args.checkpoint, [out, folder], f"python minimax.py{cli.data_flags(args)}",
                             pathlib.Path("weights", name, "base.safetensors"))
    network, header, phases = load_for_sampling(source, name, run.device)
    schedule = checkpoint.schedule_of(header["schedule"], source, run.device)
    checks.fill_sampler(args, header)                           # a one-step model has its own sampler
    guide = checks.guidance_of(args, header, schedule.T - 1)
    bf16 = run.in_bf16(checkpoint.width_of(header["config"]))
    network = network.to(torch.bfloat16 if bf16 else torch.float32)
    if run.compile:
        network.compile()
    decode, autoencoder = latents.decoder_of(header["latents"], run.vae, run.device, bf16)
    return Trained(str(source) if len(phases) == 1 else f"{len(phases)} phases", network, header, phases,
                   schedule, guide, decode, autoencoder, bf16)


def title(trained, name, run):
    """What sample.py prints of a Trained network, the data set `name` and cli.Run."""
    parameters, bf16 = sum(p.numel() for p in trained.network.parameters()), " bf16" * trained.bf16
    return (f"{trained.source} | {name} | device {run.device}{bf16} x {processes.world()} | "
            f"{parameters / 1e6:.2f}M parameters")


# ----------------------------------------------------------------------------------------------------
# 2. Which checkpoint, and its network


def find_checkpoint(given, folders, redo, shipped):
    """The checkpoint to sample from: a path, or a list of paths, of phases that together have all classes.

    given: --checkpoint, a file or a folder, or None for the first of `folders` with a fine-tuned model. redo:
    the command that makes one. shipped: a base model that may come with the code, used where no other is.
    Raises UserError where there is no checkpoint, or a folder has both kinds.
    """
    exists = any(any(folder.glob(name)) for folder in folders
                 for name in ("base.safetensors", "minimax*.safetensors"))
    if given is None and not exists and shipped.is_file():
        print(f"no checkpoint in {folders[-1]} yet: drawing from {shipped}, which came with the code and was "
              f"made by: {checkpoint.read_header(shipped)['command']}")
        return shipped
    tuned_folders = [folder for folder in folders if any(folder.glob("minimax*.safetensors"))]
    folder = given or (tuned_folders or folders)[0]
    if folder.is_file():
        return folder
    path, phases = folder / "minimax.safetensors", sorted(folder.glob("minimax-*-*.safetensors"))
    if path.is_file() and phases:
        raise UserError(f"{folder} holds {path.name} and phases ({phases[0].name}): say which with "
                        f"--checkpoint {path}, or put one kind elsewhere")
    if not path.is_file() and not phases:
        raise UserError(f"there is no {path if given is None else given}: {redo} makes one")
    return phases or path


def load_for_sampling(source, name, device):
    """The network to draw the data set `name` with: (network, header, phases), as in Trained.

    source: a file, or a list of phases that were tuned from the same base with the same settings. The
    header's "weights" identifies all files. Raises UserError where it is of another data set, or phases
    overlap, differ or leave a class out.
    """
    paths = source if isinstance(source, list) else [source]
    headers = sorted(((checkpoint.read_header(path), path) for path in paths),
                     key=lambda pair: pair[0]["phase"])
    header, first_path = headers[0]
    subset = archives.class_list(name) if header["data"] == "imagenet" and "base" not in header else None
    if header["data"] != name and not subset:
        raise UserError(f"{first_path} is of the data set {header['data']}, not {name}: "
                        "say which with --data, --root or --validation")
    network, header = models.load_model(first_path, device)
    if source is not first_path:
        return network, *load_phases(headers, header, device)
    first, last = header["phase"]                               # one file: it need not have all classes
    classes = header["classes"][first:last + 1] if header["data"] == name else subset
    rows = checkpoint.rows_of(header, classes, source)
    return network, {**header, "classes": classes, "rows": rows}, [(0, len(classes) - 1, {})]


def load_phases(headers, header, device):
    """Reads the tensors of all phases: (header, [(first, last, {name: tensor})]).

    headers: [(header, path)] in the order of their classes. header: the first phase's, from load_model.
    Raises UserError as load_for_sampling does.
    """
    (_, first_path), phases, next_class, weights = headers[0], [], 0, header["weights"]
    for other_header, path in headers:
        first, last = other_header["phase"]
        differences = [key for key, value in other_header["settings"].items()
                       if value != header["settings"].get(key)
                       and key not in ("data", "steps")]        # both follow from the phase's images
        if differences:
            key = differences[0]
            raise UserError(f"{path} was tuned with another {key} ({other_header['settings'][key]!r}) than "
                            f"{first_path} ({header['settings'][key]!r}): tune all phases alike")
        if first != next_class:
            raise UserError(f"{path} has the classes {first}-{last}, but class {next_class} should come "
                            "next: run the missing --classes, or remove what overlaps")
        next_class = last + 1
        tensors = files.load_tensors(path, device)
        files.check_tensors(tensors, phases[0][2] if phases else tensors, path, "first phase")
        phases.append((first, last, tensors))
        weights += "+" + other_header["fingerprint"]
    if next_class != len(header["classes"]):
        raise UserError(f"no phase has the classes {next_class}-{len(header['classes']) - 1}: run the "
                        "missing --classes")
    return {**header, "weights": weights}, phases


# ----------------------------------------------------------------------------------------------------
# 3. Phases, and pictures out of samples


@torch.no_grad()
def load_weights_into(network, tensors):
    """Copies {name: tensor} into the network's parameters of those names; the others do not change."""
    parameters = dict(network.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def by_phase(trained, labels):
    """Loads the weights of one phase after the other, and yields the positions of its classes in `labels`."""
    for first, last, tensors in trained.phases:
        positions = [i for i, label in enumerate(labels) if first <= label <= last]
        if positions:
            load_weights_into(trained.network, tensors)
            yield positions


def pictures_of(trained, x):
    """Samples x (B, C, H, W) float -> pictures (B, C, H, W) uint8 on the CPU; latents are decoded.

    Raises UserError where x is not finite.
    """
    x = trained.decode(x)                                       # latents: (B, 4, h, w) -> (B, 3, 8h, 8w)
    if not x.isfinite().all():
        raise UserError("the model draws images that are not finite: a smaller --guidance may help")
    return imageset.to_uint8(x).cpu()
