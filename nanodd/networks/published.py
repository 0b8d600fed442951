"""Published weights as base models: DiT's (CC BY-NC 4.0), or a checkpoint of DiT's training script."""
import argparse
import math
import pathlib

import torch

from nanodd import cli, files, processes, recipes
from nanodd.data import archives
from nanodd.errors import UserError, is_out_of_memory
from nanodd.networks import checkpoint

# ----------------------------------------------------------------------------------------------------
# 1. Reading a published file

PUBLISHED = "https://dl.fbaipublicfiles.com/DiT/models/{}.pt"


def read_published(path, read_config, kind):
    """A published .pt or .pth -> ({name: tensor}, config). A training checkpoint gives its averaged weights.

    read_config: {name: tensor} -> config, from the tensors' shapes. kind: the network's name in the message.
    Raises UserError where the file is missing or has other contents.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):        # training checkpoints have one
            state = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {name: tensor.float() for name, tensor in state.get("ema", state).items()}
        return tensors, read_config(tensors)
    except Exception as error:                                  # a damaged pickle may raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} holds no {kind} weights as they are published ({type(error).__name__}: "
                        f"{str(error)[:80]}); one that was fetched is fetched again once it is "
                        "deleted") from error


def dit_config(tensors):
    """The config of the DiT that has these {name: tensor}."""
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    tokens, outputs = tensors["pos_embed"].shape[1], len(tensors["final_layer.linear.weight"])
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    network = {(d, w): size for size, (d, w, _) in checkpoint.BACKBONES["dit"].sizes.items()}[depth, width]
    return {"network": network, "size": patch * math.isqrt(tokens), "patch": patch, "channels": channels,
            "classes": len(tensors["y_embedder.embedding_table.weight"]) - 1,
            "learned_variance": outputs == 2 * channels * patch**2}


def check_size(found, wanted, file, name):
    """Raises UserError where published weights' config `found` differs from `wanted` in one of its keys.

    name: the recipe's.
    """
    differences = [f"{key} {found[key]}, not {wanted[key]}" for key in wanted if found[key] != wanted[key]]
    if differences:
        raise UserError(f"{file} is of another size than the recipe {name} ({', '.join(differences)}): "
                        "choose another --recipe")


# ----------------------------------------------------------------------------------------------------
# 2. The base model made from it


def published_base(recipe):
    """The path of the base model made from a recipe's published weights, which all data sets share."""
    return pathlib.Path("out", recipe.weights, "base.safetensors")


def import_base(args, run):
    """python diffusion.py --weights [FILE]: the published weights of the recipe become its base model.

    Raises UserError where the recipe has none, or a flag makes no sense beside --weights.
    """
    recipe = recipes.RECIPES[args.recipe or "imagenet"]
    if not recipe.weights:
        raise UserError(f"the recipe {args.recipe} has no published weights")
    if args.out or args.steps or args.network:
        raise UserError("--weights trains nothing and has a place of its own: leave --out, --steps and "
                        "--network out")
    import_weights(recipe, args.weights, run)
    print("-> python minimax.py --data imagewoof --root DIR" if args.data == "digits" else
          f"-> python minimax.py{cli.data_flags(args, '--recipe')}")


def import_weights(recipe, file, run):
    """Writes published weights as a base checkpoint of ImageNet's 1,000 classes; returns its path.

    file: the .pt; None fetches it once. Raises UserError where its size is not the recipe's.
    """
    path = published_base(recipe)
    file = file or files.fetch(PUBLISHED.format(recipe.weights), f"{recipe.weights}.pt",
                               "python diffusion.py --weights")
    # one process reads it: 2.7 GB of memory once, not once a process
    processes.on_first_process(lambda: convert(recipe, pathlib.Path(file), path, run))
    return path


def convert(recipe, file, path, run):
    """Reads the .pt `file` and writes the base checkpoint `path`. Raises UserError as import_weights."""
    tensors, config = read_published(file, dit_config, "DiT")
    settings = {"weights": recipe.weights, "fingerprint": files.fingerprint(tensors)}
    if checkpoint.is_finished(path, settings, run.overwrite):
        return
    expected = {"size": recipe.size, "channels": recipe.channels, "patch": recipe.patch, "classes": 1000}
    check_size(config, expected, file, recipe.name)
    checkpoint.rebuild(config, tensors, file)                   # raises where a tensor does not fit
    header = {"config": config, "schedule": "linear", "latents": recipe.latents, "data": "imagenet",
              "cut": "published weights", "recipe": recipe.name, "classes": archives.imagenet_classes(),
              "phase": [0, 999], "rows": list(range(1001)), "guidance": recipe.guidance,
              "settings": settings, "command": run.command, "step": 0}
    checkpoint.save_checkpoint(path, tensors, header)
    millions = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    print(f"{file} | DiT-{config['network']}/{config['patch']}, {millions:.0f}M parameters -> {path}")
