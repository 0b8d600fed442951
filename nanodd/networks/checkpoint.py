"""A checkpoint is one .safetensors file: the tensors that sampling uses, and a JSON header.

The header holds "config", from which the network is built, the schedule's name, the data set, its classes and
each class's row in the network's label table, the settings, the command, and a fingerprint of the tensors.
"""
import inspect
import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from nanodd import files, locks, processes, recipes, schema
from nanodd.errors import UserError
from nanodd.sampling import sheets

# ----------------------------------------------------------------------------------------------------
# 1. The backbones that a header can name


class Backbone(NamedTuple):
    """A kind of network, with its sizes, noise schedule and training plan."""
    network: type              # built from a header's "config": network(**config)
    sizes: dict                # {name: (depth, width, heads)}
    schedule: type             # its noise schedule, schedule(device)
    numbers: Callable          # recipe -> (its size for the data, {field of training.Plan: number})


BACKBONES = {}                 # "dit" is registered in diffusion.py, "uvit" in nanodd/networks/uvit.py


def choices():
    """What --network takes: the sizes of DiT, "uvit" (its own size for the data), "uvit-S" and so on."""
    return [*BACKBONES["dit"].sizes, "uvit", *(f"uvit-{size}" for size in BACKBONES["uvit"].sizes)]


def named(network):
    """The value of --network, None for a DiT -> (backbone, its size or None): "uvit-S" -> ("uvit", "S")."""
    backbone, _, size = (network or "").rpartition("-")
    return ("uvit", None) if network == "uvit" else (backbone or "dit", size or None)


def network_of(backbone="dit", **config):
    """The untrained network of a config. Raises UserError where the patches do not tile the image."""
    if config["size"] % config["patch"]:
        raise UserError(f"patches of {config['patch']} pixels do not tile {config['size']} pixels")
    return BACKBONES[backbone].network(**config)


def backbone_of(config):
    """The Backbone of a checkpoint's "config", which names it only where it is not DiT."""
    return BACKBONES[config.get("backbone", "dit")]


def width_of(config):
    """The width of the network of a checkpoint's "config"."""
    return backbone_of(config).sizes[config["network"]][1]


def schedule_of(name, path, device="cpu"):
    """The schedule that the checkpoint at `path` names. Raises UserError for an unknown one."""
    schedules = {backbone.schedule.name: backbone.schedule for backbone in BACKBONES.values()}
    if name not in schedules:
        raise UserError(f"{path} was trained with a {name} schedule; {' and '.join(sorted(schedules))} "
                        "are here")
    return schedules[name](device)


class WithoutInitialWeights(TorchFunctionMode):
    """In this context torch.nn.init does nothing; on meta it would import torch._dynamo, for a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def rebuild(config, tensors, path):
    """The network of `config` with {name: tensor} for weights; only DiffFit's gammas, all 1, may be missing.

    Raises UserError, naming `path` and the tensor, where anything else is missing, extra or of another shape.
    """
    with torch.device("meta"), WithoutInitialWeights():         # shapes only
        model = network_of(**config)
    expected = model.state_dict()
    gammas = {name: torch.ones(expected[name].shape) for name in expected
              if "gamma" in name and name not in tensors}
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor       # from bfloat16, if so
               for name, tensor in tensors.items()}
    files.load_strict(model, {**gammas, **tensors}, path, "network")
    return model


# ----------------------------------------------------------------------------------------------------
# 2. The header


CONFIG = {"network": str, "size": schema.between(1, 4096), "patch": schema.between(1, 4096),
          "channels": schema.between(1, 4096), "classes": schema.between(0, 10**6), "backbone?": str,
          "learned_variance?": bool, "null?": bool, "difffit?": bool}
HEADER = {
    "config": CONFIG, "schedule": str,                          # the network and its noise schedule
    "latents": bool, "data": str, "cut": str,                   # pixels or latents, of which split
    "recipe": lambda name: isinstance(name, str) and name in recipes.RECIPES,
    "classes": schema.are_names,                                # K names
    "phase": [int],                                             # the first and the last tuned class
    "rows": [int],                                              # K + 1, in the label table; "no class" last
    "guidance": schema.between(0, 10**6, float),                # with which it is drawn
    "settings": dict, "command": str,                           # that made it
    "fingerprint": str,                                         # of the tensors
    "base?": {"file": str, "fingerprint": str},                 # the model with all other tensors
    "t_star?": schema.between(1, 999)}                          # of a one-step model, the t it starts at


def read_header(path, advice=""):
    """The header of the checkpoint in the file `path`.

    Raises UserError, with `advice` at its end, where the file is damaged or is no checkpoint.
    """
    header = files.read_header(path, HEADER, "nanoDD checkpoint", advice)
    with schema.reading(path, "nanoDD checkpoint", advice):
        config, last = header["config"], len(header["classes"]) - 1
        backbone = config.get("backbone", "dit")
        if backbone not in BACKBONES or config["network"] not in BACKBONES[backbone].sizes:
            raise ValueError(f"there is no network {schema.shown(config['network'])} of the backbone "
                             f"{schema.shown(backbone)} here")
        unknown_keys = set(config) - {"backbone", *inspect.signature(BACKBONES[backbone].network).parameters}
        if unknown_keys:
            raise ValueError(f"config has an unknown key {schema.shown(min(unknown_keys))}")
        table = config["classes"] + config.get("null", True)
        if len(header["rows"]) != last + 2 or not -1 <= header["rows"][-1] < table \
                or not all(0 <= row < table for row in header["rows"][:-1]):
            raise ValueError("rows does not name a row of the label table for each class")
        first, end = header["phase"]
        if not 0 <= first <= end <= last:
            raise ValueError(f"phase is {schema.shown(header['phase'])}")
    return header


def new_header(data, config, settings, command, schedule):
    """The header of a new checkpoint: how to rebuild the network, and what it was trained on and how."""
    rows = list(range(len(data.train.classes) + 1))             # label rows of the classes, "no class" last
    return {"config": config, "schedule": schedule.name, "latents": data.recipe.latents, "data": data.name,
            "cut": data.cut, "recipe": data.recipe.name, "classes": data.train.classes,
            "phase": [0, len(rows) - 2], "rows": rows, "guidance": data.recipe.guidance,
            "settings": settings, "command": command}


def save_checkpoint(path, tensors, header):
    """Writes {name: tensor} and a JSON header (with its fingerprint) to `path` atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    files.save_tensors(path, tensors, {**header, "fingerprint": files.fingerprint(tensors)})


def rows_of(header, classes, path):
    """The label-table rows of `classes`, looked up by name in a checkpoint's header: list of K + 1.

    The last row means "no class". Raises UserError where the header lacks a class.
    """
    unknown_classes = [name for name in classes if name not in header["classes"]]
    if unknown_classes:
        raise UserError(f"{path} knows the {len(header['classes'])} classes of {header['data']}, "
                        f"but not {unknown_classes[0]}")
    *rows, null_row = header["rows"]
    row = dict(zip(header["classes"], rows, strict=True))
    return [*(row[name] for name in classes), null_row]


# ----------------------------------------------------------------------------------------------------
# 3. Running a command again: a result of the same settings is left as it is, another one is refused


def check_settings(found, wanted, path):
    """Raises UserError, naming the differences, if `path` was made with other settings; both are dicts."""
    differences = [f"{key} {schema.shown(found.get(key))} there, {schema.shown(wanted.get(key))} here"
                   for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if differences:
        raise UserError(f"{path} was made with other settings ({'; '.join(differences)}): "
                        f"choose --out ELSEWHERE, or --overwrite to replace it")


def finished(path, settings, overwrite):
    """Whether `path` already holds the result of these settings, as is_finished says on the first process."""
    return processes.on_first_process(lambda: is_finished(path, settings, overwrite))


def is_finished(path, settings, overwrite, locked=False):
    """Whether `path` already holds the result of these settings; else its folder is locked.

    Raises UserError where it holds another result, unless `overwrite` (that one is replaced only once the new
    one is complete), and as claim.
    """
    advice = ": move it away, or choose --out ELSEWHERE"
    saved_settings = read_header(path, advice)["settings"] if path.exists() else None
    if saved_settings == settings:
        remove_state(path)
        print(f"{path} is finished (same settings): left as it is")
    elif saved_settings is not None and not overwrite:
        check_settings(saved_settings, settings, path)
    if saved_settings != settings and not locked:
        claim(path)                                             # what had it may just have written `path`
        return is_finished(path, settings, overwrite, locked=True)
    return saved_settings == settings


LINE = {"step": int, "seconds": float}                          # of NAME.log.jsonl, besides its losses


def claim(path):
    """Locks the folder of the checkpoint `path` for this command.

    Raises UserError as locks.take, and where the log or the sheet of that name is a file of the user's.
    """
    locks.take(path.parent)
    files.check_ours(path.with_suffix(".log.jsonl"), is_log)
    files.check_ours(path.with_suffix(".png"), sheets.is_sheet)


def is_log(path):
    """Whether the file `path` is a log of losses, as training.Log writes it."""
    if not path.is_file():
        return False
    try:
        with open(path) as file:
            return schema.mismatch(json.loads(file.readline(10**5)), LINE) is None
    except (OSError, ValueError, RecursionError):
        return False


def remove_state(path):
    """Removes the saved state of a run that was killed at its end, when the checkpoint `path` was there."""
    state, form = path.with_suffix(".resume.pt"), {"settings": schema.are_settings}
    try:
        if state.is_file() and files.load_state(state, form)["settings"] == read_header(path)["settings"]:
            state.unlink(missing_ok=True)
    except UserError:                                           # damaged: whose it was cannot be told
        pass
