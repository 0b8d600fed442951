"""Which network a stage starts from: a new one, or the one that a checkpoint holds."""
import copy
import functools
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from nanodd import checks, cli, files, processes
from nanodd.data import archives, datasets, imageset
from nanodd.errors import UserError
from nanodd.networks import checkpoint, latents, published, training, uvit

# ----------------------------------------------------------------------------------------------------
# 1. A new base model


class Start(NamedTuple):
    """What a training loop, training.fit and sheets of samples need."""
    trainer: training.Trainer
    examples: imageset.ImageSet | latents.Latents               # on the device
    rows: torch.Tensor         # (K + 1,) label-table row of each class, "no class" last
    schedule: object           # of the network's backbone, on the device
    header: dict               # of the checkpoint to be written
    decoder: Callable          # () -> latents.decoder_of: an autoencoder is loaded where a sheet is drawn


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


def describe_student(data, path, args):
    """--dry-run of turbo.py: prints what was read, and what would be trained."""
    datasets.describe(data)
    print(f"would distil {args.base or 'the base model'} in {args.steps} steps of {data.recipe.batch} "
          f"images, and write {path}: the same command without --dry-run")


def start_of(model, plan, data, run, examples, schedule, header):
    """The Start of training `model` on `examples`, with the label-table rows of `header`."""
    if run.compile:
        model.compile()
    decoder = functools.partial(latents.decoder_of, data.recipe.latents, run.vae, run.device, plan.bf16)
    return Start(training.Trainer(model, plan), examples, torch.tensor(header["rows"], device=run.device),
                 schedule, header, decoder)


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
                "encoder": latents.encoder_name(run) if data.recipe.latents else None,
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
    schedule = checkpoint.backbone_of(config).schedule(device)
    header = checkpoint.new_header(data, config, settings, run.command, schedule)
    return start_of(model, plan, data, run, examples, schedule, header)


# ----------------------------------------------------------------------------------------------------
# 2. Fine-tuning


def difffit_parameters(model):
    """The names of what DiffFit tunes: biases, gammas and the label table (Xie et al. 2023).

    "norm" matches U-ViT's layer norms (DiT's have no parameters), "label_emb" U-ViT's label table.
    """
    parts = "bias", "norm", "gamma", "y_embed", "label_emb"
    return [name for name, _ in model.named_parameters() if any(part in name for part in parts)]


def new_tuned(args, run, data, phase, base, path):
    """The Start of fine-tuning the base model in the file `base` on the classes phase[0] to phase[1].

    None where `path` is finished. args: the flags of minimax.py, with --memory as a list of two rules. Raises
    UserError as check_base, checks.tuning_plan, checkpoint.finished and latents.prepared.
    """
    recipe, base_header, (first, last) = data.recipe, checkpoint.read_header(base), phase
    rows = check_base(base_header, base, data)                  # (K + 1,)
    data = data._replace(train=data.train.pick((first <= data.train.labels) & (data.train.labels <= last)))
    plan = checks.tuning_plan(args, run, data, checkpoint.width_of(base_header["config"]))
    settings = {**plan._asdict(), "data": imageset.fingerprint(data.train),
                "base": base_header["fingerprint"], "lambda_r": args.lambda_r, "lambda_d": args.lambda_d,
                "memory": args.memory, "slots": args.slots, "z_hat": args.z_hat,
                "criterion": args.criterion, "tune": args.tune, "processes": processes.world(),
                "encoder": latents.encoder_name(run) if recipe.latents else None}
    if checkpoint.finished(path, settings, run.overwrite):
        return None
    examples = latents.prepared(data, run)
    config = {**base_header["config"], "difffit": args.tune == "difffit"}
    model = checkpoint.rebuild(config, files.load_tensors(base), base).to(run.device)
    if checkpoint.read_header(base)["fingerprint"] != base_header["fingerprint"]:
        raise UserError(f"another command has just replaced {base}: start again")
    model.recompute, tuned = run.recompute, set(difffit_parameters(model))
    for name, parameter in model.named_parameters():
        if args.tune == "difffit":                              # else all but DiT's fixed positions
            parameter.requires_grad_(name in tuned)
    tuned_count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"min-max | {data.name}, {data.cut} | classes {first}-{last} | "
          f"device {run.device}{' bf16' * plan.bf16} x {processes.world()} | {tuned_count:,} of "
          f"{sum(p.numel() for p in model.parameters()):,} parameters tuned | {plan.steps} steps of "
          f"{plan.batch} | lambda_r {args.lambda_r:g} lambda_d {args.lambda_d:g} | "
          f"criterion {args.criterion} | memory {','.join(args.memory)} x {args.slots} | seed {run.seed}")
    schedule = checkpoint.schedule_of(base_header["schedule"], base, run.device)
    header = {**checkpoint.new_header(data, config, settings, run.command, schedule), "rows": rows,
              "phase": phase, "base": {"file": os.path.relpath(base, path.parent),
                                       "fingerprint": base_header["fingerprint"]}}
    return start_of(model, plan, data, run, examples, schedule, header)


# ----------------------------------------------------------------------------------------------------
# 3. A student for one step


def new_student(args, run, data, base, path, fixed):
    """(Start, teacher) of distilling the model in the file `base`; None if `path` is finished.

    Both are the same network at first; the student's weights are trained, the teacher's stay as they are.
    args: the flags of turbo.py. fixed: its numbers without a flag, among them "lr". Raises UserError as
    check_base, checkpoint.finished and latents.prepared, and where the model knows some of the classes only.
    """
    teacher, teacher_header = load_model(base, run.device)
    config, device = teacher_header["config"], run.device
    rows = check_base({key: value for key, value in teacher_header.items() if key != "base"}, base, data)
    if teacher_header["phase"] != [0, len(teacher_header["classes"]) - 1]:
        raise UserError(f"{base} was tuned on some of the classes: turbo.py needs a model of all of them")
    plan = training.Plan(steps=args.steps, batch=data.recipe.batch, lr=fixed["lr"], decay=True,
                         ema=data.recipe.ema, seed=run.seed, flip=data.recipe.flip, beta1=0.,
                         bf16=run.in_bf16(checkpoint.width_of(config)))
    settings = {**plan._asdict(), "data": imageset.fingerprint(data.train),
                "teacher": teacher_header["weights"], "lambda": args.weight, "adversarial": args.adversarial,
                "features": args.features if args.adversarial else None, "t_star": args.t_star, **fixed,
                "processes": processes.world(),
                "encoder": latents.encoder_name(run) if data.recipe.latents else None}
    if checkpoint.finished(path, settings, run.overwrite):
        return None
    examples, student = latents.prepared(data, run), copy.deepcopy(teacher)
    student.recompute = run.recompute
    parameters = sum(p.numel() for p in student.parameters())
    print(f"student of {base} | {data.name}, {data.cut} | device {device}{' bf16' * plan.bf16} x "
          f"{processes.world()} | {parameters / 1e6:.2f}M parameters | {plan.steps} steps of {plan.batch} | "
          f"lambda {args.weight:g} | "
          + (f"D looks through the {args.features}" if args.adversarial else "no discriminator")
          + f" | t* {args.t_star} | seed {run.seed}")
    schedule = checkpoint.schedule_of(teacher_header["schedule"], base, device)
    header = {**checkpoint.new_header(data, config, settings, run.command, schedule),
              "rows": [*rows[:-1], -1], "guidance": 1.0, "t_star": args.t_star}
    teacher = teacher.to(torch.bfloat16 if plan.bf16 else torch.float32).requires_grad_(False)
    return start_of(student, plan, data, run, examples, schedule, header), teacher


# ----------------------------------------------------------------------------------------------------
# 4. The network that a checkpoint holds


def load_model(path, device="cpu"):
    """A checkpoint -> (network in eval mode, header), whose "weights" identifies all files that were read.

    A fine-tuned checkpoint has the tuned tensors alone; the others are read from the base that it names.
    Raises UserError where the base is missing or another one, or a tensor is missing, extra or misshapen.
    """
    path = pathlib.Path(path)
    header = checkpoint.read_header(path)
    header["weights"] = header["fingerprint"]
    tensors = files.load_tensors(path)
    if "base" in header:
        header["weights"] += "+" + header["base"]["fingerprint"]
        base = path.parent / header["base"]["file"]
        if not base.is_file():
            raise UserError(f"{path} was tuned from {base}, which is gone")
        if checkpoint.read_header(base)["fingerprint"] != header["base"]["fingerprint"]:
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
        if not args.base and processes.rank() == 0:
            checkpoint.remove_state(path)
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
    print(f"no {path} yet: making it first, once (python diffusion.py{cli.data_flags(args)} --steps N makes "
          "a quicker, worse one)")
    train_base(data, path, run)
    return path


def check_base(header, base, data):
    """The classes' label-table rows, a list of K + 1. Raises UserError where the base model does not fit."""
    recipe, config = data.recipe, header["config"]
    if "t_star" in header:
        raise UserError(f"{base} was distilled to one step: start from the model that it was distilled from")
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
