"""Draws the distilled set from a checkpoint, in few steps and, if you like, inside a time budget.

    DDIM  x_prev = sqrt(abar_prev) x0_hat + sqrt(1 - abar_prev - sigma^2) eps_hat + sigma noise
    DDPM  x_prev = posterior mean of (x0_hat, x_t) + posterior deviation * noise

    python sample.py --steps 10                  # 100 digits: 5 s on two CPU cores, most of it start-up
    python sample.py --steps 10 --seconds 10     # as many as ten seconds allow
    torchrun --nproc-per-node=4 sample.py ...    # the same files from four GPUs

Few steps make more images of a budget (diffusion step reduction, Fan et al. 2025). Writes
out/digits/distilled/<class>/00000.png ..., the contact sheet distilled.png, and distilled.json. An image
depends on (checkpoint, autoencoder, sampler, steps, grid, eta, guidance, seed, class, index) alone, in
float32 to one grey level; on the same device and with the same --batch to the byte, so that a stopped run
goes on to the same files. --ipc 5 is the first half of --ipc 10.
Sources: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Ho & Salimans 2022 (guidance).
"""
import hashlib
import json
import math
import pathlib
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torchvision.utils import make_grid
from tqdm import tqdm

from data import (UserError, add_flags, barrier, check_settings, class_list, command, data_name, device_named,
                  load_tensors, many_processes, new_parser, one_sentence, open_image, own_recipe, rank,
                  read_header, replacing, same_data, to_uint8, world, write_png)
from diffusion import Schedule, chosen_bf16, learned_log_variance, load_model, posterior, rows_of
from vae import decoder_of

# ----------------------------------------------------------------------------------------------------
# 1. Grids: at which t the network is asked, S times of T = 1000


def timesteps(steps, grid="uniform"):
    """S distinct timesteps, falling; all grids but stride start at T - 1, where x_t is noise.

    uniform: T - 1 to 0 in equal steps (DiT's respacing "S"). quadratic: equal in sqrt(t), denser near the
    image. trailing: equal steps that stop one step short of 0 (Lin et al. 2024). stride: whole strides
    from 0 up (DiT's respacing "ddimS"; 0 to 900 for S = 10).
    Raises UserError where steps is outside 1..T, or where no stride makes just as many. One step starts, and
    ends, at t = 999.
    """
    T = Schedule.T
    if not 1 <= steps <= T:
        raise UserError(f"--steps must be between 1 and {T}, not {steps}")
    if steps == 1:
        return [T - 1]
    if grid == "stride":
        fits = [s for s in range(1, T + 1) if len(range(0, T, s)) == steps]
        if not fits:
            raise UserError(f"--grid stride has no whole stride that makes {steps} steps of {T}")
        return list(range(0, T, fits[0]))[::-1]
    if grid == "uniform":
        times = [round(k * (T - 1) / (steps - 1)) for k in range(steps)]
    elif grid == "quadratic":
        times = [round((k / (steps - 1)) ** 2 * (T - 1)) for k in range(steps)]
        for k in range(1, steps):                               # where they crowd near 0, one t apart
            times[k] = max(times[k], times[k - 1] + 1)
    else:
        times = [round((k + 1) * T / steps) - 1 for k in range(steps)]
    return times[::-1]


# ----------------------------------------------------------------------------------------------------
# 2. One step back: x_t -> x_prev
#
# abar and abar_prev (floats, abar < abar_prev <= 1) belong to this t and to the next smaller one of the grid;
# abar_prev = 1 is the last step, where both return x0_hat and add no noise.


def ddim_step(x0_hat, eps_hat, abar, abar_prev, noise=0.0, eta=0.0):
    """Song et al. 2021, eq. 12, sigma from eq. 16. eta = 0 is deterministic, eta = 1 has DDPM's variance."""
    sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
    direction = math.sqrt(max(0.0, 1 - abar_prev - sigma**2)) * eps_hat
    return math.sqrt(abar_prev) * x0_hat + direction + sigma * noise


def ddpm_step(xt, x0_hat, abar, abar_prev, noise=0.0, logits=None):
    """Ho et al. 2020, alg. 2, with the betas of the grid: the mean of `posterior`, and noise of its variance.

    With `logits` (B, C, H, W) the variance is the learned one (Nichol & Dhariwal 2021).
    """
    a, b, variance, beta = posterior(abar, abar_prev)
    mean = a * x0_hat + b * xt
    if variance == 0:                                           # the last step
        return mean
    if logits is None:
        return mean + math.sqrt(variance) * noise
    return mean + torch.exp(0.5 * learned_log_variance(logits, math.log(variance), math.log(beta))) * noise


# ----------------------------------------------------------------------------------------------------
# 3. From noise to image


def guided(model, rows, null, guidance, channels=None):
    """(x, t) -> (eps, variance logits or None), with classifier-free guidance (Ho & Salimans 2022, eq. 6).

    eps = eps_u + guidance (eps_c - eps_u); both halves run as one batch. guidance is 1 + their w: 1 is the
    conditional model, and the unconditional half is not computed. rows: (B,) label-table rows; null: the row
    that means "no class". channels: how many of the first channels are guided, None for all. DiT's authors
    guide 3 of 4, by an oversight that their published FID was made with; the other channels are conditional.
    """
    def predict(x, t):
        C, time = x.shape[1], torch.full((len(x),), float(t), device=x.device)
        if guidance == 1:
            out = model(x, time, rows).float()
            eps, logits = out[:, :C], out[:, C:]
        else:
            both = torch.cat([rows, torch.full_like(rows, null)])           # (2B,)
            out = model(torch.cat([x, x]), torch.cat([time, time]), both).float()
            conditional, unconditional = out.chunk(2)
            G = C if channels is None else channels
            steered = unconditional[:, :G] + guidance * (conditional[:, :G] - unconditional[:, :G])
            eps, logits = torch.cat([steered, conditional[:, G:C]], dim=1), conditional[:, C:]
        return eps, logits if logits.shape[1] else None
    return predict


@torch.no_grad()
def draw_images(predict, noise, times, sampler="ddim", eta=0.0):
    """Runs a sampler along `times`: (B, C, H, W) float, unclipped.

    predict: (x, t) -> (eps, variance logits or None). noise: k -> (B, C, H, W) standard normal, the start for
    k = 0 and the noise of step k after that; asked only for what the sampler uses.
    """
    abar, noisy = Schedule().abar.tolist(), sampler == "ddpm" or eta > 0
    x = noise(0)
    for k, t in enumerate(times):
        now, previous = abar[t], abar[times[k + 1]] if k + 1 < len(times) else 1.0
        eps, logits = predict(x, t)
        x0_hat = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        fresh = noise(k + 1) if noisy and previous < 1 else 0.0
        if sampler == "ddpm":
            x = ddpm_step(x, x0_hat, now, previous, fresh, logits)
        else:
            x = ddim_step(x0_hat, eps, now, previous, fresh, eta)
    return x


def image_noise(seed, names, shape, device):
    """All the noise of some images, each from its own CPU generator: k -> (B, *shape).

    names: (class name, index) of each image. An image's noise is the same alone or in any batch.
    """
    digests = [hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest() for name, index in names]
    # torch's CPU generator keeps 32 bits of a seed: among 100,000 images about one pair shares its noise
    generators = [torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")) for digest in digests]

    def noise(k):
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    return noise


# ----------------------------------------------------------------------------------------------------
# 4. The order of the work, and where images are kept
#
# Image number p is of class p mod K, index p div K: rounds of one image a class, so that any stop leaves a
# balanced set. A block is `batch` numbers in a row (the last may be shorter), drawn as one batch; one that
# was not finished is drawn again from its first image.


def block(number, batch, classes, total=math.inf):
    """The (label, index) of each image in block `number`, of `total` images in all; empty behind the last."""
    first, last = number * batch, min((number + 1) * batch, total)
    return [(p % classes, p // classes) for p in range(first, last)] if first < last else []


class PngFolder:
    """distilled/<class>/00000.png ...: torchvision's ImageFolder, and what any image viewer shows."""

    def __init__(self, out, classes):
        self.path, self.classes = out / "distilled", classes

    def file(self, label, index):
        return self.path / self.classes[label] / f"{index:05}.png"

    def has(self, items):
        return all(self.file(*item).is_file() for item in items)

    def resumable(self):
        return self.path.exists()

    def whole(self, ipc):
        return self.has(block(0, ipc * len(self.classes), len(self.classes)))

    def write(self, items, images):
        with ThreadPoolExecutor() as pool:                      # packing a 256-pixel PNG takes 10 ms
            list(pool.map(write_png, [self.file(*item) for item in items], images))

    def finish(self, items):
        """Removes what is not one of `items`: the round that a budget cut off."""
        for extra in set(self.path.glob("*/*.png")) - {self.file(*item) for item in items}:
            extra.unlink()

    def images(self, items):
        return torch.stack([open_image(self.file(*item), channels=None) for item in items])

    def remove(self):
        if self.path.exists():
            shutil.rmtree(self.path)


class NpzFile:
    """distilled.npz (images, labels, classes), for sets too large for a file per image.

    Its blocks wait beside it until all are drawn.
    """

    def __init__(self, out, classes):
        self.path, self.parts, self.classes = out / "distilled.npz", out / "distilled.npz.parts", classes

    def part(self, items):
        label, index = items[0]
        return self.parts / f"{index * len(self.classes) + label:09}.npy"

    def has(self, items):
        part = self.part(items)
        return part.is_file() and len(np.load(part, mmap_mode="r")) == len(items)

    def resumable(self):
        return self.parts.exists()

    def whole(self, ipc):
        return self.path.is_file()

    def write(self, items, images):
        with replacing(self.part(items)) as temporary, open(temporary, "wb") as file:
            np.save(file, images.numpy())

    def finish(self, items):
        """Joins the blocks, in the order of the images, and cuts off what is behind `items`."""
        images = np.concatenate([np.load(part) for part in sorted(self.parts.glob("*.npy"))])[:len(items)]
        with replacing(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, images=images, labels=[label for label, _ in items], classes=self.classes)
        old = self.parts.with_suffix(".old")                    # removed whole: half of the parts would count
        shutil.rmtree(old, ignore_errors=True)
        self.parts.rename(old)
        shutil.rmtree(old)

    def images(self, items):
        with np.load(self.path) as arrays:
            positions = [index * len(self.classes) + label for label, index in items]
            return torch.from_numpy(arrays["images"][positions])

    def remove(self):
        if self.parts.exists():
            shutil.rmtree(self.parts)
        self.path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------
# 5. A distilled set, to a number of images or to the end of a budget


def distil(draw, store, record, total, budget, batch, save):
    """Draws block after block into `store` until `total` images exist or the next block would pass `budget`.

    draw: items -> (n, C, H, W) uint8. record: what is kept in distilled.json; its "seconds" (wall clock from
    the first batch to the last file on disk) go on from where a stopped run was. save: writes the record.
    Of many processes each draws one block of every wave, and all of them stop after the same wave. The first
    that is drawn takes longer, for it warms up: it is forgotten once there is a second.
    Returns the (label, index) of the images of all complete rounds; no others are kept. Raises UserError
    where the budget holds no round, or was spent before.
    """
    if record["seconds"] > budget:
        raise UserError(f"{record['seconds']:.1f} seconds are spent already, more than the budget of "
                        f"{budget:g}: raise it, or choose --out ELSEWHERE")
    K, done, wave, drawn, longest = len(record["classes"]), 0, 0, 0, 0.0
    began, quiet = time.monotonic() - record["seconds"], True if rank() else None
    with tqdm(total=None if math.isinf(total) else total, disable=quiet, leave=False, unit="image") as bar:
        while block(wave * world(), batch, K, total):
            blocks = [block(number, batch, K, total)
                      for number in range(wave * world(), (wave + 1) * world())]
            mine = blocks[rank()]                               # empty on the last processes of the last wave
            needed = bool(mine) and not store.has(mine)
            if of_all(needed):
                started = time.monotonic()
                if of_all(started - began + longest > budget) and done > 0:
                    break
                if needed:
                    store.write(mine, draw(mine))
                spent, drawn = of_all(time.monotonic() - started), drawn + 1
                longest = spent if drawn <= 2 else max(longest, spent)
                record["seconds"] = time.monotonic() - began
                save(record)
            done, wave = done + sum(map(len, blocks)), wave + 1
            bar.update(sum(map(len, blocks)))
    if done < K or wave == 1 and of_all(record["seconds"] > budget):
        raise UserError(f"the budget of {budget:g} seconds is too short for one image of each class: the "
                        f"first {done} took {record['seconds']:.2g} seconds. Raise --seconds, "
                        "or lower --batch")
    kept = block(0, done // K * K, K)
    if rank() == 0:
        store.finish(kept)
    barrier()
    record["seconds"] = time.monotonic() - began
    return kept


def of_all(value):
    """The largest of all processes' numbers, or whether it is true of any: the same answer everywhere."""
    if world() == 1:
        return value
    values = [None] * world()
    dist.all_gather_object(values, value)
    return max(values)


def contact_sheet(images, columns, path):
    """images (rows * columns, C, H, W) uint8 -> one picture, enlarged to be seen: a row for each class."""
    zoom = max(1, 40 // images.shape[-1])
    sheet = make_grid(images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), nrow=columns, padding=2)
    write_png(path, sheet)


# ----------------------------------------------------------------------------------------------------
# 6. The driver


def checked(args):
    """Refuses numbers that make no sense. Returns (images per class or inf, seconds or inf)."""
    if sum(value is not None for value in (args.ipc, args.seconds, args.minutes)) > 1:
        raise UserError("--ipc, --seconds and --minutes exclude each other")
    budget = args.seconds if args.minutes is None else 60 * args.minutes
    if args.ipc is not None and args.ipc < 1:
        raise UserError(f"--ipc must be at least 1, not {args.ipc}")
    if budget is not None and not 0 < budget < math.inf:
        raise UserError(f"the budget must be a positive time, not {budget:g} seconds")
    if args.batch < 1:
        raise UserError(f"--batch must be at least 1, not {args.batch}")
    if not 0 <= args.eta <= 1:
        raise UserError(f"--eta must be between 0 and 1, not {args.eta}")
    if args.eta > 0 and args.sampler == "ddpm":
        raise UserError("--eta belongs to DDIM: DDPM has noise of its own")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise UserError(f"--guidance must be a number, 0 or more, not {args.guidance}")
    if budget is None:
        return args.ipc or 10, math.inf
    return math.inf, budget


def main(argv=None):
    parser = new_parser(__doc__)
    add_flags(parser, "data root validation out seed device overwrite bf16 compile")
    parser.add_argument("--vae", default="mse", metavar="ema|mse|FILE",
                        help="what decodes latents: one of stabilityai's autoencoders, fetched once, or a "
                             "file (default: %(default)s, as Gu et al., who encode with ema)")
    parser.add_argument("--checkpoint", type=pathlib.Path, metavar="FILE",
                        help="what to sample from, a file or a folder of phases (default: "
                             "minimax.safetensors, or all minimax-A-B.safetensors, in --out or out/NAME)")
    parser.add_argument("--steps", type=int, default=10,
                        help="each is a network call, two with guidance (default: %(default)s)")
    parser.add_argument("--sampler", choices=("ddim", "ddpm"), default="ddim", help="(default: %(default)s)")
    parser.add_argument("--grid", choices=("uniform", "quadratic", "trailing", "stride"), default="quadratic",
                        help="where in t the steps lie (default: %(default)s)")
    parser.add_argument("--eta", type=float, default=0.0,
                        help="noise that DDIM adds, 0 to 1 (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="1 is none; more is clearer and less diverse "
                                                       "(default: the checkpoint's)")
    parser.add_argument("--cfg-channels", type=int, metavar="N",
                        help="guide the first N channels only: 3 is DiT's published slip (default: all)")
    parser.add_argument("--ipc", type=int, help="images per class (default: 10)")
    parser.add_argument("--seconds", type=float,
                        help="instead: as many complete rounds as fit into this time")
    parser.add_argument("--minutes", type=float, help="the same in minutes")
    parser.add_argument("--batch", type=int, default=100,
                        help="images drawn at once, by each process; less needs less memory (default: "
                             "%(default)s)")
    parser.add_argument("--npz", action="store_true",
                        help="one distilled.npz instead of a file for each image")
    args = parser.parse_args(argv)
    with one_sentence(parser), many_processes():
        run(args, command(__file__, argv))


def open_record(path, fresh, stores, overwrite):
    """The record in distilled.json to go on with, or `fresh` where there is none or it may be overwritten.

    Refuses what other settings made, and images that no record explains.
    """
    if not path.is_file():
        for store in stores:
            if store.path.exists():
                raise UserError(f"{store.path} is there, but no {path.name} says what it is: "
                                "choose --out ELSEWHERE, or remove it")
        return fresh
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): choose --out ELSEWHERE, or remove it") from error
    if found.get("settings") == fresh["settings"]:
        return found
    if not overwrite:
        check_settings(found.get("settings", {}), fresh["settings"], path)
    path.unlink()
    for store in stores:
        store.remove()
    return fresh


def checkpoints(place, folders, redo):
    """What to sample from: a file, or a list of phases that should hold all classes between them.

    place: --checkpoint, a file or a folder, or None for the first of `folders` that holds any. redo: the
    command that makes one.
    """
    held = [folder for folder in folders if any(folder.glob("minimax*.safetensors"))]
    folder = place or (held or folders)[0]
    if folder.is_file():
        return folder
    whole, phases = folder / "minimax.safetensors", sorted(folder.glob("minimax-*-*.safetensors"))
    if whole.is_file() and phases:
        raise UserError(f"{folder} holds {whole.name} and phases ({phases[0].name}): say which with "
                        f"--checkpoint {whole}, or put one kind elsewhere")
    if not whole.is_file() and not phases:
        raise UserError(f"there is no {whole if place is None else place}: {redo} makes one")
    return phases or whole


def opened(source, name, device):
    """The network to draw the data set `name` with -> (DiT, header, phases).

    source: a file, or a list of phases that were tuned from the same base with the same settings. header: its
    classes and rows are those that can be drawn; its weights identifies all files. phases: (first, last,
    {name: tensor}), the tensors to lay over the network for the classes first to last.
    Raises UserError where it is of another data set, or phases overlap, differ or leave a class out.
    """
    paths = source if isinstance(source, list) else [source]
    headers = sorted(((read_header(path), path) for path in paths), key=lambda pair: pair[0]["phase"])
    header, first_path = headers[0]
    published = class_list(name) if header["data"] == "imagenet" and "base" not in header else None
    if header["data"] != name and not published:
        raise UserError(f"{first_path} is of the data set {header['data']}, not {name}: "
                        "say which with --data, --root or --validation")
    model, header = load_model(first_path, device)
    if source is first_path:                                    # one file: what it can draw is enough
        first, last = header["phase"]
        classes = header["classes"][first:last + 1] if header["data"] == name else published
        rows = rows_of(header, classes, source)
        return model, {**header, "classes": classes, "rows": rows}, [(0, len(classes) - 1, {})]
    phases, expected = [], 0
    for other, path in headers:
        first, last = other["phase"]
        differ = [key for key, value in other["settings"].items() if value != header["settings"].get(key)
                  and key not in ("data", "steps")]             # their images, and how many these are
        if differ:
            raise UserError(f"{path} was tuned with another {differ[0]} ({other['settings'][differ[0]]!r}) "
                            f"than {first_path} ({header['settings'][differ[0]]!r}): tune all phases alike")
        if first != expected:
            raise UserError(f"{path} has the classes {first}-{last}, but class {expected} should come next: "
                            "run the missing --classes, or remove what overlaps")
        expected = last + 1
        tensors = {key: tensor.to(device) for key, tensor in load_tensors(path).items()}
        phases.append((first, last, tensors))
        header["weights"] += "+" + other["fingerprint"]
    if expected != len(header["classes"]):
        raise UserError(f"no phase has the classes {expected}-{len(header['classes']) - 1}: run the missing "
                        "--classes")
    return model, header, phases


@torch.no_grad()
def lay_over(model, tensors):
    """Copies {name: tensor} into the model's parameters of those names; the others stay the base's."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def artist(model, header, phases, decode, times, sampler, eta, guidance, guided_channels, seed):
    """The function that draws a block: items, (label, index) of n images -> pictures (n, C, H, W) uint8."""
    config, device = header["config"], next(model.parameters()).device
    shape = config["channels"], config["size"], config["size"]

    def draw(items):
        x = torch.empty(len(items), *shape, device=device)
        for first, last, tensors in phases:
            mine = [i for i, (label, _) in enumerate(items) if first <= label <= last]
            if not mine:
                continue
            lay_over(model, tensors)
            chosen = [items[i] for i in mine]
            rows = torch.tensor([header["rows"][label] for label, _ in chosen], device=device)
            names = [(header["classes"][label], index) for label, index in chosen]
            predict = guided(model, rows, header["rows"][-1], guidance, guided_channels)
            x[mine] = draw_images(predict, image_noise(seed, names, shape, device), times, sampler, eta)
        x = decode(x)                                           # latents: (n, 4, h, w) -> (n, 3, 8h, 8w)
        if not x.isfinite().all():
            raise UserError("the model draws images that are not finite: a smaller --guidance may help")
        return to_uint8(x).cpu()
    return draw


def of_first(make):
    """What make() returns on the first process, on all; its UserError is raised on all, too."""
    found = [None, None]
    if rank() == 0:
        try:
            found[0] = make()
        except UserError as error:
            found[1] = str(error)
    if world() > 1:
        dist.broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    return found[0]


def run(args, typed):
    """Everything after the command line was read."""
    ipc, budget = checked(args)
    times, device = timesteps(args.steps, args.grid), device_named(args.device)
    name = data_name(args.data, args.root, args.validation)
    home = pathlib.Path("out", name)
    out = args.out or home
    source = checkpoints(args.checkpoint, [out, home], f"python minimax.py{same_data(args)}")
    model, header, phases = opened(source, name, device)
    guidance = header["guidance"] if args.guidance is None else args.guidance
    classes, config = header["classes"], header["config"]
    if args.cfg_channels is not None and not 1 <= args.cfg_channels <= config["channels"]:
        raise UserError(f"--cfg-channels must be between 1 and {config['channels']}, not {args.cfg_channels}")
    if args.cfg_channels is not None and guidance == 1:
        raise UserError("--cfg-channels has nothing to choose with --guidance 1, which is none")
    bf16 = chosen_bf16(args.bf16, device, config["network"])
    model = model.to(torch.bfloat16 if bf16 else torch.float32)
    if args.compile:
        model.compile()
    decode, autoencoder = decoder_of(header["latents"], args.vae, device, bf16)
    settings = {"weights": header["weights"], "sampler": args.sampler, "steps": args.steps, "grid": args.grid,
                "eta": args.eta, "guidance": guidance, "cfg_channels": args.cfg_channels, "bf16": bf16,
                "autoencoder": autoencoder, "seed": args.seed, "batch": args.batch, "npz": args.npz}
    folder, file, record_path = PngFolder(out, classes), NpzFile(out, classes), out / "distilled.json"
    store = file if args.npz else folder
    fresh = {"settings": settings, "data": name, "classes": classes, "ipc": 0, "budget": 0.0, "seconds": 0.0,
             "command": typed}
    record = of_first(lambda: open_record(record_path, fresh, (folder, file), args.overwrite))
    enough = record["ipc"] >= ipc or record["budget"] >= budget
    whole, resumable = of_first(lambda: (store.whole(record["ipc"]), store.resumable()))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{source if len(phases) == 1 else f'{len(phases)} phases'} | {name} | device {device}"
          f"{' bf16' * bf16} x {world()} | {parameters / 1e6:.2f}M parameters | {args.sampler}, {args.steps} "
          f"steps, {args.grid} grid | guidance {guidance:g} | seed {args.seed}")
    if enough and whole:
        print(f"{store.path} holds {record['ipc']} images a class already (same settings): left as it is -> "
              f"python train_eval.py{same_data(args, '--out')}" + f" --ipc {ipc}" * (ipc < record["ipc"]))
        return

    def save(record):
        if rank() == 0:
            with replacing(record_path) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n")

    if not resumable:                                           # nothing yet, or blocks that were joined
        record["seconds"] = 0.0
    record.update(command=typed, ipc=0, budget=0.0)             # unfinished, until the end
    save(record)
    draw = artist(model, header, phases, decode, times, args.sampler, args.eta, guidance, args.cfg_channels,
                  args.seed)
    items = distil(draw, store, record, ipc * len(classes), budget, args.batch, save)
    record.update(ipc=len(items) // len(classes), budget=0.0 if math.isinf(budget) else budget)
    save(record)
    calls = args.steps * (1 if guidance == 1 else 2)
    print(f"{len(items)} images | {record['ipc']} a class | {record['seconds']:.1f} s | "
          f"{len(items) * calls:,} network evaluations ({calls} an image)")
    columns = min(10, record["ipc"])
    shown = [(label, index) for label in range(min(20, len(classes))) for index in range(columns)]
    if rank() == 0:
        contact_sheet(store.images(shown), columns, out / "distilled.png")
    print(f"saved {store.path} and {out / 'distilled.png'} -> "
          f"python train_eval.py{same_data(args, '--out')}"
          + (f" --recipe {header['recipe']}" if header["recipe"] != own_recipe(args.data) else ""))


if __name__ == "__main__":
    main()
