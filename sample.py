"""Draws the distilled set from a checkpoint, in few steps and, if you like, inside a time budget.

    DDIM  x_prev = sqrt(abar_prev) x0_hat + sqrt(1 - abar_prev - sigma^2) eps_hat + sigma noise
    DDPM  x_prev = posterior mean of (x0_hat, x_t) + posterior deviation * noise
    DPM   x_t = alpha_t/alpha_s x_s - sigma_t (e^h - 1) eps_hat, and two higher orders of it

    python sample.py --steps 10                  # 100 digits: 5 s on two CPU cores, most of it start-up
    python sample.py --steps 10 --seconds 10     # as many as ten seconds allow
    python sample.py --steps auto --seconds 10   # in as many steps as are best for that
    torchrun --nproc-per-node=4 sample.py ...    # the same files from four GPUs

Few steps make more images of a budget (diffusion step reduction, Fan et al. 2025). Writes
out/digits/distilled/<class>/00000.png ..., the contact sheet distilled.png, and distilled.json. An image
depends on (checkpoint, autoencoder, sampler, steps, grid, eta, guidance, seed, class, index) alone, in
float32 to one grey level; on the same device and with the same --batch to the byte, so that a stopped run
goes on to the same files. --ipc 5 is the first half of --ipc 10.
Sources: Ho et al. 2020 (DDPM), J. Song et al. 2021 (DDIM), Ho & Salimans 2022 and Kynkaanniemi et al. 2024
(guidance), Lu et al. 2022 (DPM-Solver), Lu et al. 2023 (DPM-Solver++), Lin et al. 2024 (the trailing grid).
"""
import argparse
import functools
import hashlib
import itertools
import json
import math
import pathlib
import platform
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torchvision.utils import make_grid
from tqdm import tqdm

from diffusion import CLEAN, Schedule, learned_log_variance, load_model, posterior, rows_of
from nanodd import cli, files, processes, recipes
from nanodd.data import archives, datasets, imageset
from nanodd.errors import UserError, exit_on_user_error
from nanodd.networks import checkpoint
from train_eval import count_epochs, read_distilled, train_judges
from uvit import network_of, schedule_of, width_of
from vae import decoder_of

# ----------------------------------------------------------------------------------------------------
# 1. Grids: the times at which a sampler stops, in [0, 999] whatever the schedule

GRIDS = ("uniform", "quadratic", "trailing", "stride", "logsnr")


def timesteps(count, grid="uniform", schedule=None, steps=None):
    """`count` distinct times, falling from T - 1, where x_t is noise (stride alone starts lower).

    uniform: equal steps down to the schedule's end, 0 (DiT's respacing "S"). quadratic: equal in
    sqrt(t), denser near the image. trailing: equal steps that stop one step short of 0 (Lin et al. 2024).
    stride: whole strides from 0 up (DiT's respacing "ddimS"; 0 to 900 for 10). logsnr: equal in
    log(alpha / sigma), where solvers are at home (Lu et al. 2022). On DiT's schedule (the default) the first
    four take whole times, as in its training; logsnr stops between them, too.
    steps: network calls of the whole sampler (default: count), which decide where a continuous schedule ends.
    Raises UserError where count is outside 1..T, or where no stride makes just as many, or the schedule has
    no strides. A count of one gives T - 1.
    """
    schedule, T = schedule or Schedule(), Schedule.T
    end, whole = schedule.end(steps or count), schedule.name == "linear"
    near = round if whole else float
    if not 1 <= count <= T:
        raise UserError(f"--steps must be between 1 and {T}, not {count}")
    if grid == "stride" and not whole:
        raise UserError("--grid stride counts the 1,000 steps of DiT's schedule; this checkpoint's is "
                        "continuous: choose another --grid")
    if count == 1:
        return [T - 1]
    if grid == "stride":
        fits = [s for s in range(1, T + 1) if len(range(0, T, s)) == count]
        if not fits:
            raise UserError(f"--grid stride has no whole stride that makes {count} steps of {T}")
        return list(range(0, T, fits[0]))[::-1]
    part = [k / (count - 1) for k in range(count)]              # 0 to 1: from the image to noise
    if grid == "logsnr":
        noisy, clean = (schedule.level(t).half_log_snr for t in (T - 1, end))
        inner = [schedule.time_at(clean + p * (noisy - clean)) for p in part[1:-1]]
        return [T - 1, *inner[::-1], end]                       # the ends themselves, not their inverses
    if grid == "uniform":
        times = [near(end + k * (T - 1 - end) / (count - 1)) for k in range(count)]
    elif grid == "quadratic":
        roots = [math.sqrt(end) + p * (math.sqrt(T - 1) - math.sqrt(end)) for p in part]
        times = [end, *(near(root**2) for root in roots[1:-1]), T - 1]
        for k in range(1, count if whole else 0):               # where they crowd near 0, one t apart
            times[k] = max(times[k], times[k - 1] + 1)
    else:
        times = [max(end, near((k + 1) * T / count) - 1) for k in range(count)]
    return times[::-1]


# ----------------------------------------------------------------------------------------------------
# 2. One step back, with noise: x_t -> x_prev
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
# 3. One step of the probability flow, solved in lambda = log(alpha / sigma): x at s -> x at t
#
#   x_t = alpha_t/alpha_s x_s - alpha_t (integral over lambda from s to t of e^-lambda eps_hat)
#
# is exact (Lu et al. 2022, prop. 3.1). A solver of order n expands eps_hat in lambda up to its (n-1)-th
# derivative, and errs by O(h^(n+1)) in a step. Singlestep solvers find the derivatives by n network calls
# within the step and forget them; 2M, a multistep one, makes one call and remembers the call before.
# s, t: diffusion.Level, of falling time; h = lambda_t - lambda_s > 0. eps: (x, Level) -> (B, C, H, W).


def dpm_solver_1(x, eps_hat, s, t):
    """x_t = alpha_t/alpha_s x - sigma_t (e^h - 1) eps_hat: DDIM without noise (eq. 3.7)."""
    h = t.half_log_snr - s.half_log_snr
    return t.alpha / s.alpha * x - t.sigma * math.expm1(h) * eps_hat


def between(schedule, s, t, share):
    """The Level at a share of the way from s to t, in lambda."""
    return schedule.level(schedule.time_at((1 - share) * s.half_log_snr + share * t.half_log_snr))


def dpm_solver_2(x, eps, s, t, schedule):
    """Order 1 with the noise of its own midpoint u (alg. 4 with r1 = 1/2).

    x_u = dpm_solver_1(s to u)        x_t = alpha_t/alpha_s x - sigma_t (e^h - 1) eps(x_u, u)
    """
    u = between(schedule, s, t, 1 / 2)
    middle = dpm_solver_1(x, eps(x, s), s, u)
    return dpm_solver_1(x, eps(middle, u), s, t)


def dpm_solver_3(x, eps, s, t, schedule):
    """Through u at a third and v at two thirds of h (alg. 5 with r1 = 1/3, r2 = 2/3).

    x_u = dpm_solver_1(s to u)
    x_v = dpm_solver_1(s to v) - 2 sigma_v ((e^{2h/3} - 1) / (2h/3) - 1) (eps_u - eps_s)
    x_t = dpm_solver_1(s to t) - 3/2 sigma_t ((e^h - 1) / h - 1) (eps_v - eps_s)
    """
    u, v = (between(schedule, s, t, share) for share in (1 / 3, 2 / 3))
    h, eps_s = t.half_log_snr - s.half_log_snr, eps(x, s)
    eps_u = eps(dpm_solver_1(x, eps_s, s, u), u)
    two = 2 * h / 3
    x_v = dpm_solver_1(x, eps_s, s, v) - 2 * v.sigma * (math.expm1(two) / two - 1) * (eps_u - eps_s)
    return dpm_solver_1(x, eps_s, s, t) - 1.5 * t.sigma * (math.expm1(h) / h - 1) * (eps(x_v, v) - eps_s)


def dpm_solver_pp_2m(x, x0_hat, x0_before, s, t, h_before):
    """x_t = sigma_t/sigma_s x - alpha_t (e^-h - 1) (x0_hat + h/(2 h_before) (x0_hat - x0_before)).

    DPM-Solver++(2M) (Lu et al. 2023, alg. 2): one call a step, and the call before. x0_before None, or t the
    image itself (sigma 0), is a step of order 1.
    """
    h = t.half_log_snr - s.half_log_snr
    if x0_before is not None and t.sigma > 0:
        x0_hat = x0_hat + h / (2 * h_before) * (x0_hat - x0_before)
    return t.sigma / s.sigma * x - t.alpha * math.expm1(-h) * x0_hat


# ----------------------------------------------------------------------------------------------------
# 4. From noise to image


def guided(model, rows, null, guidance, channels=None, interval=(0, Schedule.T - 1)):
    """(x, t) -> (eps, variance logits or None), with classifier-free guidance (Ho & Salimans 2022, eq. 6).

    eps = eps_u + guidance (eps_c - eps_u); both halves run as one batch. guidance is 1 + their w: 1 is the
    conditional model, and the unconditional half is not computed; nor is it for t outside of `interval`, both
    ends within (Kynkaanniemi et al. 2024). rows: (B,) label-table rows; null: the row that means "no class".
    channels: how many of the first channels are guided, None for all. DiT's authors guide 3 of 4, by an
    oversight that their published FID was made with; the other channels are conditional.
    """
    def predict(x, t):
        C, time = x.shape[1], torch.full((len(x),), float(t), device=x.device)
        if calls_at(t, guidance, interval) == 1:
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


def calls_at(t, guidance, interval):
    """How often the network looks at an image at time t: twice where it is guided."""
    low, high = interval
    return 2 if guidance != 1 and low <= t <= high else 1


SAMPLERS = {                   # what --sampler takes, and its own grid
    "ddim": "quadratic", "ddpm": "quadratic", "dpm1": "logsnr", "dpm2": "logsnr", "dpm3": "logsnr",
    "dpm-fast": "logsnr", "dpm++2m": "logsnr"}
ORDERS = {"dpm1": 1, "dpm2": 2, "dpm3": 3, "dpm-fast": 3}


def orders(name, steps):
    """Orders of a singlestep solver's steps, which make `steps` network calls between them.

    As many of the solver's own as fit, then one of what is left; "dpm-fast" (U-ViT's sampler) ends with order
    2 and 1 where nothing would be left, so that its last steps are always easier.
    """
    order = ORDERS[name]
    whole, left = divmod(steps, order)
    if name == "dpm-fast" and left == 0:
        return [3] * (whole - 1) + [2, 1]
    return [order] * whole + [left] * (left > 0)


class Sampler(NamedTuple):
    """A sampler made ready for a schedule: name, times (falling, of the grid), orders (singlestep), eta."""
    name: str
    schedule: Schedule
    times: list
    orders: list | None
    eta: float

    @torch.no_grad()
    def draw(self, predict, noise):
        """(B, C, H, W) float, unclipped.

        predict: (x, t) -> (eps, variance logits or None). noise: k -> (B, C, H, W) standard normal, the start
        for k = 0 and the noise of step k after that; asked only for what the sampler uses.
        """
        loop = draw_singlestep if self.orders else draw_2m if self.name == "dpm++2m" else draw_ddim_ddpm
        return loop(self, predict, noise)

    def asked(self):
        """The times of all network calls, in their order."""
        times = []

        def predict(x, t):
            times.append(t)
            return x, None
        self.draw(predict, lambda k: torch.zeros(1, 1, 1, 1))
        return times


def sampler_of(name, steps, grid=None, schedule=None, eta=0.0):
    """A Sampler that calls the network `steps` times. grid: None for the sampler's own. schedule: or DiT's.

    Raises UserError where a singlestep solver, which ends where its grid ends, would end in the noise.
    """
    grid, schedule = grid or SAMPLERS[name], schedule or Schedule()
    if name not in ORDERS:
        return Sampler(name, schedule, timesteps(steps, grid, schedule), None, eta)
    if grid in ("trailing", "stride"):
        raise UserError(f"--sampler {name} ends where its grid does, and --grid {grid} does not end at the "
                        "image: choose logsnr, quadratic or uniform")
    if not 1 <= steps < Schedule.T:                             # they need a time more than steps of order 1
        raise UserError(f"--steps must be between 1 and {Schedule.T - 1} with --sampler {name}, not {steps}")
    parts = orders(name, steps)
    return Sampler(name, schedule, timesteps(len(parts) + 1, grid, schedule, steps), parts, eta)


def draw_ddim_ddpm(sampler, predict, noise):
    """DDPM and DDIM: a call at every time of the grid, the last step to the image itself."""
    abar = [*map(sampler.schedule.abar_at, sampler.times), 1.0]
    noisy, x = sampler.name == "ddpm" or sampler.eta > 0, noise(0)
    for k, t in enumerate(sampler.times):
        now, previous = abar[k], abar[k + 1]
        eps, logits = predict(x, t)
        x0_hat = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        fresh = noise(k + 1) if noisy and previous < 1 else 0.0
        if sampler.name == "ddpm":
            x = ddpm_step(x, x0_hat, now, previous, fresh, logits)
        else:
            x = ddim_step(x0_hat, eps, now, previous, fresh, sampler.eta)
    return x


def draw_2m(sampler, predict, noise):
    """DPM-Solver++(2M): a call at every time of the grid, the last step, of order 1, to the image itself."""
    levels = [*map(sampler.schedule.level, sampler.times), CLEAN]
    x, x0_before, h = noise(0), None, None
    for s, t in itertools.pairwise(levels):
        x0_hat = (x - s.sigma * predict(x, s.t)[0]) / s.alpha
        x = dpm_solver_pp_2m(x, x0_hat, x0_before, s, t, h)
        x0_before, h = x0_hat, t.half_log_snr - s.half_log_snr
    return x


def draw_singlestep(sampler, predict, noise):
    """DPM-Solver: a step between every two times of the grid. Its result is x at the last, not x0_hat.

    That is nearly the image, and what U-ViT's authors take: noise of a standard deviation of 0.01 is left, or
    0.003 on the continuous schedule in more than 15 steps (in units of half the grey scale).
    """
    def eps(x, level):
        return predict(x, level.t)[0]
    schedule, x = sampler.schedule, noise(0)
    levels = itertools.pairwise(map(schedule.level, sampler.times))
    for order, (s, t) in zip(sampler.orders, levels, strict=True):
        if order == 1:
            x = dpm_solver_1(x, eps(x, s), s, t)
        else:
            x = (dpm_solver_2 if order == 2 else dpm_solver_3)(x, eps, s, t, schedule)
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
# 5. The order of the work, and where images are kept
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
    FINISH = 0                 # how long `finish` takes, in units of all writing before

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
            list(pool.map(imageset.write_png, [self.file(*item) for item in items], images))

    def finish(self, items):
        """Removes what is not one of `items`: the round that a budget cut off."""
        for extra in set(self.path.glob("*/*.png")) - {self.file(*item) for item in items}:
            extra.unlink()

    def tidy(self):
        """Nothing is left over."""

    def images(self, items):
        return torch.stack([imageset.open_image(self.file(*item), channels=None) for item in items])

    def remove(self):
        if self.path.exists():
            shutil.rmtree(self.path)


class NpzFile:
    """distilled.npz (images, labels, classes), for sets too large for a file per image.

    Its blocks wait beside it until all are drawn and joined, and distilled.json says so.
    """
    FINISH = 8                 # 6 were measured, on 200,000 images of 32 pixels; writing alone fills a cache

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
        with files.atomic_write(self.part(items)) as temporary, open(temporary, "wb") as file:
            np.save(file, images.numpy())

    def finish(self, items):
        """Joins the blocks, in the order of the images, and cuts off what is behind `items`."""
        images = np.concatenate([np.load(part) for part in sorted(self.parts.glob("*.npy"))])[:len(items)]
        with files.atomic_write(self.path) as temporary, open(temporary, "wb") as file:
            np.savez(file, images=images, labels=[label for label, _ in items], classes=self.classes)

    def tidy(self):
        """Removes the blocks."""
        old = self.parts.with_suffix(".old")                    # removed whole: half of the parts would count
        shutil.rmtree(old, ignore_errors=True)
        if self.parts.exists():
            self.parts.rename(old)
            shutil.rmtree(old)

    def images(self, items):
        with np.load(self.path) as arrays:
            positions = [index * len(self.classes) + label for label, index in items]
            return torch.from_numpy(arrays["images"][positions])

    def remove(self):
        self.tidy()
        self.path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------
# 6. A distilled set, to a number of images or to the end of a budget


class TooShort(UserError):
    """A budget that holds no image of some class."""


def distil(draw, store, record, total, budget, batch, save):
    """Draws block after block into `store` until `total` images exist, or until the next block, and joining
    them all, would pass `budget` seconds.

    draw: items -> (n, C, H, W) uint8. record: what is kept in distilled.json; its "seconds" (wall clock from
    the first batch to the last file on disk) go on from where a stopped run was, as do the seconds of the
    "longest" block and of all "writing". save: writes the record. Of many processes each draws one block of
    every wave, and all of them stop after the same wave. The first that a process draws takes longer, for it
    warms up: it is forgotten once there is a second.
    Returns the (label, index) of the images of all complete rounds; no others are kept. Raises UserError
    where the budget holds no round (TooShort), or was spent before.
    """
    known = longest = record.get("longest", 0.0)
    if record["seconds"] - known > budget:                      # the last block may have gone beyond it
        raise UserError(f"{record['seconds']:.1f} seconds are spent already, more than the budget of "
                        f"{budget:g}: raise it, or choose --out ELSEWHERE")
    K, done, wave, drawn, writing = len(record["classes"]), 0, 0, 0, record.get("writing", 0.0)
    began, quiet = time.monotonic() - record["seconds"], True if processes.rank() else None
    with tqdm(total=None if math.isinf(total) else total, disable=quiet, leave=False, unit="image") as bar:
        while block(wave * processes.world(), batch, K, total):
            blocks = [block(number, batch, K, total)
                      for number in range(wave * processes.world(), (wave + 1) * processes.world())]
            mine = blocks[processes.rank()]                     # empty on the last processes of the last wave
            needed = bool(mine) and not store.has(mine)
            if processes.max_over_processes(needed):
                started = time.monotonic()
                if processes.max_over_processes(started - began + longest
                                                + store.FINISH * writing > budget) and done > 0:
                    break
                if needed:
                    images = draw(mine)
                    writing -= time.monotonic()
                    store.write(mine, images)
                    writing += time.monotonic()
                spent, drawn = processes.max_over_processes(time.monotonic() - started), drawn + 1
                longest = max(known if drawn <= 2 else longest, spent)
                record.update(seconds=time.monotonic() - began, longest=known if drawn == 1 else longest,
                              writing=writing)
                save(record)
            done, wave = done + sum(map(len, blocks)), wave + 1
            bar.update(sum(map(len, blocks)))
    if done < K or wave == 1 and processes.max_over_processes(record["seconds"] > budget):
        raise TooShort(f"the budget of {budget:g} seconds is too short for one image of each class: the "
                        f"first {done} took {record['seconds']:.2g} seconds. Raise --seconds, "
                        "or lower --batch")
    kept = block(0, done // K * K, K)
    if processes.rank() == 0:
        store.finish(kept)
    processes.barrier()
    record["seconds"] = time.monotonic() - began
    return kept


def contact_sheet(images, columns, path):
    """images (rows * columns, C, H, W) uint8 -> one picture, enlarged to be seen: a row for each class."""
    zoom = max(1, 40 // images.shape[-1])
    sheet = make_grid(images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), nrow=columns, padding=2)
    imageset.write_png(path, sheet)


# ----------------------------------------------------------------------------------------------------
# 7. Step reduction as a decision: how many steps are best for this budget, on this machine
#
# Fan et al. 2025 found 10 best for ten minutes of their GPU. Half the steps are twice the images, each worse;
# what is best depends on the machine, the data and the budget. So each count gets a share of the budget, and
# short judges say what the images are worth.

# A pilot is smaller than the set where the budget is long, which favours fewer steps a little.

CANDIDATES = (5, 10, 15, 20, 25, 30, 50)                        # Fan et al.'s, Table 3, and 50
PILOT_SECONDS = 60             # all pilots together may take the budget again, or this where that is shorter
PILOT_VIEWS, PILOT_JUDGES = 100_000, 2                          # images a pilot's judge sees at most; judges


def pilot_share(budget):
    """The share of the budget (seconds) that each candidate's pilot gets: all of it where that is short."""
    return min(1.0, max(budget, PILOT_SECONDS) / (len(CANDIDATES) * budget))


def judge_of_pilots(args, recipe, device):
    """place -> what the images there are worth: percent of a fifth of the training images, told right.

    The generator learned from that fifth, but no judge sees it, and the test split stays unseen; under
    --validation it is a fifth of what is left. The mean of PILOT_JUDGES judges of the shortened protocol: at
    a quarter of its length they favoured small sets, which they see more often.
    """
    data = datasets.load(args.data, args.root, recipe, validation=True, skip_broken=args.skip_broken)
    held = datasets.split(data.train, .2)[1] if args.validation else data.test
    recipe = replace(data.recipe, protocol="short", views=min(data.recipe.views, PILOT_VIEWS))
    if isinstance(held, imageset.ImageFiles):
        held = held._replace(size=recipe.judge_size)
    data = data._replace(recipe=recipe, test=held.read(args.skip_broken).to(device))
    seeds, bf16 = [1000 * args.seed + run for run in range(PILOT_JUDGES)], cli.gains_from_bf16(device)

    def judge(place):
        train = read_distilled(place, data).to(device)
        epochs = count_epochs(recipe, len(train.labels), len(train.classes))
        judges = train_judges([train] * PILOT_JUDGES, data.test, recipe, epochs, seeds, bf16=bf16)
        return statistics.mean(curve[-1] for _, curve in judges)
    return judge


def decide(drawn_in, judge, out, classes, settings, budget, typed):
    """The candidate whose pilot made the best judges; the table of the decision goes to out/steps.json.

    drawn_in: steps -> what draws a block. judge: () -> (place of a pilot -> accuracy), asked for on the first
    process. settings: of the run and the machine, with the budget and steps "auto"; the same ones find their
    decision made. The time this takes is not the budget's.
    Raises UserError where the budget is too short for one image of each class at any count.
    """
    path, share = out / "steps.json", pilot_share(budget)
    found = processes.on_first_process(lambda: json.loads(path.read_text()) if path.is_file() else {})
    if found.get("settings") == settings:
        print(f"{path} has decided on {found['steps']} steps (same settings)")
        return found["steps"]
    if (out / "distilled.json").is_file():
        raise UserError(f"{out} holds a set already, and no {path.name} says that its steps are the best for "
                        "this: choose --out ELSEWHERE, or --overwrite")
    print(f"how many steps? a pilot of {share * budget:.3g} s for each count, {PILOT_JUDGES} short judges "
          "for each pilot, tested on a fifth of the training images")
    print("steps | s a batch | images in the budget | a class | pilot's images | accuracy, %")
    store, rows = PngFolder(out / ".pilots", classes), []
    drawn_in(CANDIDATES[0])(block(0, settings["batch"], len(classes)))      # warms up
    for steps in CANDIDATES:
        processes.on_first_process(store.remove)
        record = {"classes": classes, "seconds": 0.0}
        try:
            items = distil(drawn_in(steps), store, record, math.inf, share * budget, settings["batch"],
                           lambda record: None)
        except TooShort:
            print(f"{steps:5} | {share * budget:.3g} s are too short for an image of each class")
            continue
        images, accuracy = len(items), processes.on_first_process(lambda: judge()(store.path))
        row = {"steps": steps, "seconds_per_batch": record["seconds"] * settings["batch"] / images,
               "images": int(images / record["seconds"] * budget), "pilot": images, "accuracy": accuracy}
        rows.append(row)
        print(f"{steps:5} | {row['seconds_per_batch']:9.3f} | {row['images']:20} | "
              f"{row['images'] // len(classes):7} | {images:14} | {accuracy:.2f}")
    processes.on_first_process(lambda: shutil.rmtree(store.path.parent, ignore_errors=True))
    if not rows:
        raise UserError(f"the budget of {budget:g} seconds is too short for one image of each class, even in "
                        f"{CANDIDATES[0]} steps; a pilot gets {share:.0%} of it: raise it, or lower --batch")
    best = max(rows, key=lambda row: row["accuracy"])["steps"]
    print(f"-> {best} steps; this table is in {path}")
    if processes.rank() == 0:
        with files.atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"settings": settings, "share": share, "rows": rows,
                                             "steps": best, "command": typed}, indent=1) + "\n")
    return best


# ----------------------------------------------------------------------------------------------------
# 8. The driver


def number_or_auto(text):
    """What --steps takes. Raises argparse.ArgumentTypeError."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a number or auto, not {text}") from error


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
    if args.eta > 0 and args.sampler != "ddim":
        raise UserError("--eta belongs to DDIM: DDPM has noise of its own, DPM-Solvers have none")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise UserError(f"--guidance must be a number, 0 or more, not {args.guidance}")
    low, high = args.guidance_interval
    if not 0 <= low <= high <= Schedule.T - 1:
        raise UserError(f"--guidance-interval must be LOW HIGH, 0 <= LOW <= HIGH <= {Schedule.T - 1}, not "
                        f"{low:g} {high:g}")
    if args.steps == "auto" and budget is None:
        raise UserError("--steps auto looks for the best under a budget: add --seconds or --minutes")
    if budget is None:
        return args.ipc or 10, math.inf
    return math.inf, budget


def main(argv=None):
    parser = cli.new_parser(__doc__)
    cli.add_flags(parser, "data root validation out seed device skip-broken overwrite bf16 compile")
    parser.add_argument("--vae", default="mse", metavar="ema|mse|FILE",
                        help="what decodes latents: one of stabilityai's autoencoders, fetched once, or a "
                             "file (default: %(default)s, as Gu et al., who encode with ema)")
    parser.add_argument("--checkpoint", type=pathlib.Path, metavar="FILE",
                        help="what to sample from, a file or a folder of phases (default: "
                             "minimax.safetensors, or all minimax-A-B.safetensors, in --out or out/NAME; "
                             "else what came with the code, in weights/NAME)")
    parser.add_argument("--steps", type=number_or_auto, default=10, metavar="N|auto",
                        help="each is a network call, two with guidance; auto tries several and takes what "
                             "is best for the budget (default: %(default)s)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim",
                        help="dpm1 to dpm3: DPM-Solver of that order; dpm-fast: U-ViT's, at 50 steps; "
                             "dpm++2m: DPM-Solver++ (default: %(default)s)")
    parser.add_argument("--grid", choices=GRIDS,
                        help="where in t the steps lie (default: quadratic; of DPM-Solvers logsnr)")
    parser.add_argument("--eta", type=float, default=0.0,
                        help="noise that DDIM adds, 0 to 1 (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="1 is none; more is clearer and less diverse "
                                                       "(default: the checkpoint's)")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        default=(0, Schedule.T - 1),
                        help="guide only where LOW <= t <= HIGH, at half the cost elsewhere (default: 0 999)")
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
    with exit_on_user_error(parser), processes.process_group():
        run(args, cli.command_line_of(__file__, argv))


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
        checkpoint.check_settings(found.get("settings", {}), fresh["settings"], path)
    remove_set(path, stores)
    return fresh


def remove_set(path, stores):
    """Removes a set and the record at `path` that says what it is."""
    path.unlink(missing_ok=True)
    for store in stores:
        store.remove()


def named(device):
    """A device and what kind it is: a decision made on one is not another's."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device} {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def checkpoints(place, folders, redo, shipped):
    """What to sample from: a file, or a list of phases that should hold all classes between them.

    place: --checkpoint, a file or a folder, or None for the first of `folders` that holds any. redo: the
    command that makes one. shipped: a base model that may have come with the code, for those who have none.
    """
    own = any(any(folder.glob("*.safetensors")) for folder in folders)
    if place is None and not own and shipped.is_file():
        print(f"no checkpoint in {folders[-1]} yet: drawing from {shipped}, which came with the code and was "
              f"made by: {files.read_header(shipped)['command']}")
        return shipped
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
    """The network to draw the data set `name` with -> (DiT or UViT, header, phases).

    source: a file, or a list of phases that were tuned from the same base with the same settings. header: its
    classes and rows are those that can be drawn; its weights identifies all files. phases: (first, last,
    {name: tensor}), the tensors to lay over the network for the classes first to last.
    Raises UserError where it is of another data set, or phases overlap, differ or leave a class out.
    """
    paths = source if isinstance(source, list) else [source]
    headers = sorted(((files.read_header(path), path) for path in paths), key=lambda pair: pair[0]["phase"])
    header, first_path = headers[0]
    published = archives.class_list(name) if header["data"] == "imagenet" and "base" not in header else None
    if header["data"] != name and not published:
        raise UserError(f"{first_path} is of the data set {header['data']}, not {name}: "
                        "say which with --data, --root or --validation")
    model, header = load_model(first_path, device, network_of)
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
        tensors = {key: tensor.to(device) for key, tensor in files.load_tensors(path).items()}
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


def artist(model, header, phases, decode, sampler, guide, seed):
    """The function that draws a block: items, (label, index) of n images -> pictures (n, C, H, W) uint8.

    sampler: Sampler. guide: keywords of `guided`: guidance, channels, interval.
    """
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
            predict = guided(model, rows, header["rows"][-1], **guide)
            x[mine] = sampler.draw(predict, image_noise(seed, names, shape, device))
        x = decode(x)                                           # latents: (n, 4, h, w) -> (n, 3, 8h, 8w)
        if not x.isfinite().all():
            raise UserError("the model draws images that are not finite: a smaller --guidance may help")
        return imageset.to_uint8(x).cpu()
    return draw


def run(args, typed):
    """Everything after the command line was read."""
    ipc, budget = checked(args)
    device = cli.device_named(args.device)
    name = datasets.data_name(args.data, args.root, args.validation)
    home = pathlib.Path("out", name)
    out = args.out or home
    source = checkpoints(args.checkpoint, [out, home], f"python minimax.py{cli.data_flags(args)}",
                         pathlib.Path("weights", name, "base.safetensors"))
    model, header, phases = opened(source, name, device)
    schedule = schedule_of(header["schedule"], home, device)
    guide = guidance_of(args, header)
    bf16 = cli.chosen_bf16(args.bf16, device, width_of(header["config"]))
    model = model.to(torch.bfloat16 if bf16 else torch.float32)
    if args.compile:
        model.compile()
    decode, autoencoder = decoder_of(header["latents"], args.vae, device, bf16)
    classes, grid = header["classes"], args.grid or SAMPLERS[args.sampler]
    settings = {"weights": header["weights"], "sampler": args.sampler, "steps": args.steps, "grid": grid,
                "eta": args.eta, "guidance": guide["guidance"],
                "guidance_interval": list(guide["interval"]), "cfg_channels": guide["channels"], "bf16": bf16,
                "autoencoder": autoencoder, "seed": args.seed, "batch": args.batch, "npz": args.npz}

    def sampler_in(steps):
        return sampler_of(args.sampler, steps, grid, schedule, args.eta)

    def drawn_by(sampler):
        return artist(model, header, phases, decode, sampler, guide, args.seed)
    folder, file, record_path = PngFolder(out, classes), NpzFile(out, classes), out / "distilled.json"
    store = file if args.npz else folder
    if args.steps == "auto":
        if args.overwrite:
            processes.on_first_process(lambda: remove_set(record_path, (folder, file)))
        here = {"budget": budget, "device": named(device), "processes": processes.world(),
                "compile": args.compile}
        judge = functools.cache(lambda: judge_of_pilots(args, header["recipe"], device))
        settings["steps"] = decide(lambda steps: drawn_by(sampler_in(steps)), judge, out, classes,
                                   {**settings, **here}, budget, typed)
    sampler = sampler_in(settings["steps"])                     # or refuses, before anything is looked at
    fresh = {"settings": settings, "data": name, "classes": classes, "ipc": 0, "budget": 0.0, "seconds": 0.0,
             "command": typed}
    record = processes.on_first_process(lambda: open_record(record_path, fresh, (folder, file),
                                                            args.overwrite))
    enough = record["ipc"] >= ipc or record["budget"] >= budget
    whole, resumable = processes.on_first_process(lambda: (store.whole(record["ipc"]), store.resumable()))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{source if len(phases) == 1 else f'{len(phases)} phases'} | {name} | device {device}"
          f"{' bf16' * bf16} x {processes.world()} | {parameters / 1e6:.2f}M parameters | {args.sampler}, "
          f"{settings['steps']} steps, {grid} grid | guidance {guide['guidance']:g} | seed {args.seed}")
    if enough and whole:
        processes.on_first_process(store.tidy)                  # which a stop may have come before
        print(f"{store.path} holds {record['ipc']} images a class already (same settings): left as it is -> "
              f"python train_eval.py{cli.data_flags(args, '--out')}"
              + f" --ipc {ipc}" * (ipc < record["ipc"]))
        return

    def save(record):
        if processes.rank() == 0:
            with files.atomic_write(record_path) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n")

    if not resumable:                                           # nothing yet, or blocks that were joined
        record.update(seconds=0.0, longest=0.0, writing=0.0)
    record.update(command=typed, ipc=0, budget=0.0)             # unfinished, until the end
    save(record)
    items = distil(drawn_by(sampler), store, record, ipc * len(classes), budget, args.batch, save)
    record.update(ipc=len(items) // len(classes), budget=0.0 if math.isinf(budget) else budget)
    columns = min(10, record["ipc"])
    shown = [(label, index) for label in range(min(20, len(classes))) for index in range(columns)]
    if processes.rank() == 0:
        contact_sheet(store.images(shown), columns, out / "distilled.png")
        save(record)                                            # it is finished from here on
        store.tidy()
    calls = sum(calls_at(t, guide["guidance"], guide["interval"]) for t in sampler.asked())
    print(f"{len(items)} images | {record['ipc']} a class | {record['seconds']:.1f} s | "
          f"{len(items) * calls:,} network evaluations ({calls} an image)")
    print(f"saved {store.path} and {out / 'distilled.png'} -> "
          f"python train_eval.py{cli.data_flags(args, '--out')}"
          + (f" --recipe {header['recipe']}" if header["recipe"] != recipes.own_recipe(args.data) else ""))


def guidance_of(args, header):
    """The keywords of `guided` that the flags and the checkpoint ask for; refuses what contradicts itself."""
    none, channels = header["rows"][-1] < 0, header["config"]["channels"]
    guidance = (1.0 if none else header["guidance"]) if args.guidance is None else args.guidance
    if none and guidance != 1:
        raise UserError("this checkpoint's label table has no row for \"no class\", as published U-ViT "
                        f"weights have none: --guidance {guidance:g} cannot be, only 1")
    if args.cfg_channels is not None and not 1 <= args.cfg_channels <= channels:
        raise UserError(f"--cfg-channels must be between 1 and {channels}, not {args.cfg_channels}")
    if args.cfg_channels is not None and guidance == 1:
        raise UserError("--cfg-channels has nothing to choose with --guidance 1, which is none")
    if guidance == 1 and tuple(args.guidance_interval) != (0, Schedule.T - 1):
        raise UserError("--guidance-interval has nothing to limit with --guidance 1, which is none")
    return {"guidance": guidance, "channels": args.cfg_channels, "interval": tuple(args.guidance_interval)}


if __name__ == "__main__":
    main()
