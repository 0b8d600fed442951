"""Which network a stage starts from: a new one, or the one that a checkpoint holds."""
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from nanodd import checks, cli, files
from nanodd.data import archives, datasets, imageset
from nanodd.errors import UserError
from nanodd.networks import checkpoint, latents, published, training, uvit

# ----------------------------------------------------------------------------------------------------
# 1. A new base model


class Start(NamedTuple):
    """What a training loop and training.fit need."""
    trainer: training.Trainer
    examples: imageset.ImageSet | latents.Latents               # on the device
    rows: torch.Tensor         # (K + 1,) label-table row of each class, "no class" last
    schedule: object           # of the network's backbone, on the device
    header: dict               # of the checkpoint to be written


def planned(data, run, network, steps):
    """(config, training.Plan) of the network to train on `data`. The arguments are diffusion.train_base's."""
    (backbone, size), recipe = checkpoint.named(network), data.recipe
    own_size, numbers = checkpoint.BACKBONES[backbone].numbers(recipe)
    config = {**({} if backbone == "dit" else {"backbone": backbone}), "network": size or own_size,
              "size": recipe.size, "patch": recipe.patch, "channels": recipe.channels,
              "classes": len(data.train.classes)}
    numbers = {**numbers, **({} if steps is None else {"steps": steps})}
    return config, training.Plan(**numbers, seed=run.seed, flip=recipe.flip,
                                 bf16=run.in_bf16(checkpoint.width_of(config)))


def describe_base(data, path, run, network, steps):
    """--dry-run: prints the data set, the size of the network that would be trained, and its steps."""
    config, plan = planned(data, run, network, steps)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in checkpoint.network_of(**config).parameters())
    datasets.describe(data)
    print(f"would train {parameters:,} parameters in {plan.steps} steps of {plan.batch} images, and write "
          f"{path}: the same command without --dry-run")


def describe_phases(data, phases):
    """--dry-run of minimax.py: prints what was read, and which classes would be tuned into which file."""
    datasets.describe(data)
    for path, (first, last) in phases.items():
        print(f"would tune on the classes {first}-{last} and write {path}: "
              "the same command without --dry-run")


def new_base(data, path, run, network=None, steps=None, weights=None):
    """The Start of training a base model; None where none is left to train. Arguments: train_base's.

    Raises UserError where there are fewer steps than 1 (0 with weights, which are then written as they are),
    where `path` has other settings, or the weights do not fit.
    """
    (config, plan), device = planned(data, run, network, steps), run.device
    if plan.steps < (weights is None):
        raise UserError(f"--steps must be at least 1 (0 with --weights), not {plan.steps}")
    initial = uvit.read_weights(weights, config, data.recipe) if weights else None
    if plan.steps == 0:
        return uvit.import_weights(data, initial, path, run)
    settings = {**config, **plan._asdict(), "data": imageset.fingerprint(data.train),
                "encoder": latents.source_name(run.vae) if data.recipe.latents else None,
                **({"weights": files.fingerprint(initial.tensors)} if initial else {})}
    if checkpoint.finished(path, settings, run.overwrite):
        return None
    examples = latents.prepared(data, run)
    torch.manual_seed(plan.seed)                                # the initial weights
    model = checkpoint.network_of(**config)
    if initial:
        uvit.start_from(model, initial, data.train.classes)
    model = model.to(device)
    model.recompute = run.recompute
    parameters = sum(p.numel() for p in model.parameters())
    print(f"base model | {data.name} | device {device}{' bf16' * plan.bf16} | {parameters / 1e6:.2f}M "
          f"parameters | {len(examples.labels)} images | {plan.steps} steps of {plan.batch} | "
          f"seed {plan.seed}")
    if run.compile:
        model.compile()
    schedule = checkpoint.backbone_of(config).schedule(device)
    header = checkpoint.new_header(data, config, settings, run.command, schedule)
    rows = torch.tensor(header["rows"], device=device)
    return Start(training.Trainer(model, plan), examples, rows, schedule, header)


# ----------------------------------------------------------------------------------------------------
# 2. The network that a checkpoint holds


def load_model(path, device="cpu"):
    """A checkpoint -> (network in eval mode, header), whose "weights" identifies all files that were read.

    A fine-tuned checkpoint has the tuned tensors alone; the others are read from the base that it names.
    Raises UserError where the base is missing or another one, or a tensor is missing, extra or misshapen.
    """
    path = pathlib.Path(path)
    header = files.read_header(path)
    header["weights"] = header["fingerprint"]
    tensors = files.load_tensors(path)
    if "base" in header:
        header["weights"] += "+" + header["base"]["fingerprint"]
        base = path.parent / header["base"]["file"]
        if not base.is_file():
            raise UserError(f"{path} was tuned from {base}, which is gone")
        if files.read_header(base)["fingerprint"] != header["base"]["fingerprint"]:
            raise UserError(f"{base} is another base model than the one {path} was tuned from")
        tensors = {**files.load_tensors(base), **tensors}
    return checkpoint.rebuild(header["config"], tensors, path).to(device).eval(), header


def base_of(args, data, run, train_base):
    """The path of the base model to fine-tune; trains it, or fetches the published one, where it is missing.

    train_base: (data, path, run), which trains one and writes it. Raises UserError where --base is missing,
    or the published weights do not know a class.
    """
    folder, recipe = pathlib.Path("out", data.name), data.recipe
    path = args.base or (args.out or folder) / "base.safetensors"
    if not args.base and not path.is_file():
        path = folder / path.name
    if path.is_file():
        return path
    if args.base:
        raise UserError(f"there is no {path}: python diffusion.py makes a base model")
    if recipe.weights:
        unknown_classes = sorted(set(data.train.classes) - set(archives.imagenet_classes()))
        if unknown_classes:
            raise UserError(f"the published weights do not know the class {unknown_classes[0]}: train a base "
                            f"model, python diffusion.py{cli.data_flags(args, '--recipe')}")
        if not published.published_base(recipe).is_file():
            published.import_weights(recipe, None, run)
        return published.published_base(recipe)
    print(f"no {path} yet: making it first, once (python diffusion.py --steps N makes a quicker, worse one)")
    train_base(data, path, run)
    return path


def check_base(header, base, data):
    """The classes' label-table rows, a list of K + 1. Raises UserError where the base model does not fit."""
    recipe, config = data.recipe, header["config"]
    if "base" in header:
        raise UserError(f"{base} is fine-tuned already: start from a base model")
    classes = data.train.classes
    if header["data"] != "imagenet" and (header["data"], header["classes"]) != (data.name, classes):
        raise UserError(f"{base} is of the data set {header['data']} with {len(header['classes'])} classes, "
                        f"not of {data.name} with {len(classes)}")
    base_shape = config["size"], config["channels"], header["latents"]
    if base_shape != (recipe.size, recipe.channels, recipe.latents):
        raise UserError(f"{base} draws {config['channels']} x {config['size']} "
                        f"{'latents' if header['latents'] else 'pixels'}, but the recipe has "
                        f"{recipe.channels} x {recipe.size} {'latents' if recipe.latents else 'pixels'}")
    return checkpoint.rows_of(header, classes, base)


# ----------------------------------------------------------------------------------------------------
# 3. The network that sample.py draws images with


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
    """The Trained network of the data set `name` that the flags choose.

    out: the folder of results. Raises UserError as find_checkpoint, load_for_sampling and checks.guidance_of.
    """
    folder = pathlib.Path("out", name)
    source = find_checkpoint(args.checkpoint, [out, folder], f"python minimax.py{cli.data_flags(args)}",
                             pathlib.Path("weights", name, "base.safetensors"))
    network, header, phases = load_for_sampling(source, name, run.device)
    schedule = checkpoint.schedule_of(header["schedule"], source, run.device)
    guide = checks.guidance_of(args, header, schedule.T - 1)
    bf16 = run.in_bf16(checkpoint.width_of(header["config"]))
    network = network.to(torch.bfloat16 if bf16 else torch.float32)
    if run.compile:
        network.compile()
    decode, autoencoder = latents.decoder_of(header["latents"], run.vae, run.device, bf16)
    return Trained(str(source) if len(phases) == 1 else f"{len(phases)} phases", network, header, phases,
                   schedule, guide, decode, autoencoder, bf16)


def find_checkpoint(given, folders, redo, shipped):
    """The checkpoint to sample from: a path, or a list of paths, of phases that together have all classes.

    given: --checkpoint, a file or a folder, or None for the first of `folders` with a fine-tuned model. redo:
    the command that makes one. shipped: a base model that may come with the code, used where no other is.
    Raises UserError where there is no checkpoint, or a folder has both kinds.
    """
    exists = any(any(folder.glob("*.safetensors")) for folder in folders)
    if given is None and not exists and shipped.is_file():
        print(f"no checkpoint in {folders[-1]} yet: drawing from {shipped}, which came with the code and was "
              f"made by: {files.read_header(shipped)['command']}")
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
    headers = sorted(((files.read_header(path), path) for path in paths), key=lambda pair: pair[0]["phase"])
    header, first_path = headers[0]
    subset = archives.class_list(name) if header["data"] == "imagenet" and "base" not in header else None
    if header["data"] != name and not subset:
        raise UserError(f"{first_path} is of the data set {header['data']}, not {name}: "
                        "say which with --data, --root or --validation")
    network, header = load_model(first_path, device)
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
        tensors = {key: tensor.to(device) for key, tensor in files.load_tensors(path).items()}
        phases.append((first, last, tensors))
        weights += "+" + other_header["fingerprint"]
    if next_class != len(header["classes"]):
        raise UserError(f"no phase has the classes {next_class}-{len(header['classes']) - 1}: run the "
                        "missing --classes")
    return {**header, "weights": weights}, phases


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
