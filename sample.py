"""Draws the distilled set from a checkpoint, in few steps and, on demand, inside a time budget.

    x0_hat = (x_t - sqrt(1 - abar) eps_hat) / sqrt(abar)       the network's guess at the clean image
    DDIM  x_prev = sqrt(abar_prev) x0_hat + sqrt(1 - abar_prev - sigma^2) eps_hat + sigma noise
    DDPM: nanodd/networks/ddpm.py             DPM-Solver and DPM-Solver++(2M): nanodd/sampling/solvers.py

    python sample.py --steps 10                  # 100 digits: 3 s on two CPU cores, most of it start-up
    python sample.py --steps 10 --seconds 10     # as many as ten seconds allow; or --steps auto
    python sample.py --modes --grid uniform      # each image pulled towards a k-means centre of its class
    python sample.py --checkpoint out/digits/turbo.safetensors --out out/digits/turbo   # turbo.py's, one step
    python sample.py --data cifar100 --checkpoint sdxl-turbo --minutes 10       # SDXL-Turbo, from class names
    torchrun --nproc-per-node=4 sample.py ...    # the same files from four GPUs

Fewer steps draw more images in a budget (diffusion step reduction, Fan et al. 2025). A block of --batch
images, after the first, starts only if the longest block so far would still fit (the first, which warms up,
counts only until there are two); a run is late by no more than its last block's excess over that longest one.
Writes out/digits/distilled/<class>/00000.png ..., the contact sheet distilled.png, and distilled.json. The
checkpoint, the seed, --batch, all flags of how an image is drawn, its class and its index fix it: to the byte
on one device (so that a resumed run writes the same files), in float32 to one grey level on another. --ipc 5
is half of --ipc 10, save with --oversample, or --modes without a number. Sources: Ho et al. 2020 (DDPM),
J. Song et al. 2021 (DDIM), Ho & Salimans 2022, Kynkaanniemi et al. 2024 (guidance), Lu et al. 2022, 2023
(DPM-Solver), Lin et al. 2024 (trailing), Sauer et al. 2023 (one step), Chan-Santiago et al. 2025 (modes).
"""
import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import nanodd  # noqa: F401 (before torch: it sets how long waiting CPU threads spin)
import torch

from diffusion import Schedule
from nanodd import checks, cli, recipes, running
from nanodd.data import datasets
from nanodd.errors import UserError
from nanodd.networks import ddpm
from nanodd.sampling import distilled, loading, modes, oversample, pilots, solvers
from train_eval import count_epochs, real_judge, train_judges

# ----------------------------------------------------------------------------------------------------
# 1. Grids: the times at which a sampler calls the network, in [0, 999] whatever the schedule

GRIDS = ("uniform", "quadratic", "trailing", "stride", "logsnr")


def timesteps(count, grid="uniform", schedule=None, calls=None, start=Schedule.T - 1):
    """`count` distinct times, falling from T - 1 = 999, where x_t is noise. A count of one gives [start].

    uniform: equal steps down to the schedule's end, 0 for DiT (DiT's respacing "S"). quadratic: equal steps
    in sqrt(t), denser near the image. trailing: equal steps that stop one step short of 0 (Lin et al. 2024).
    stride (starts below T - 1) and logsnr: nanodd/sampling/solvers.py, section 2. schedule: DiT's by default,
    on which all grids but logsnr take integers, the times of its training; or U-ViT's, which is continuous
    and whose end depends on the sampler's network calls (default: count). start: where trailing begins.
    Raises UserError where count is outside 1..T, or as solvers.stride.
    """
    schedule, T = schedule or Schedule(), Schedule.T
    end, discrete = schedule.end(calls or count), schedule.discrete
    near = round if discrete else float                         # DiT was trained on integer t only
    if not 1 <= count <= T:
        raise UserError(f"--steps must be between 1 and {T}, not {count}")
    if grid == "stride":
        return solvers.stride(count, schedule)
    if count == 1:
        return [start]
    if grid == "logsnr":
        return solvers.logsnr(count, schedule, end)
    if grid == "uniform":
        times = [near(end + k * (T - 1 - end) / (count - 1)) for k in range(count)]
    elif grid == "quadratic":
        roots = [math.sqrt(end) + k / (count - 1) * (math.sqrt(T - 1) - math.sqrt(end)) for k in range(count)]
        times = [end, *(near(root**2) for root in roots[1:-1]), T - 1]
        for k in range(1, count if discrete else 0):            # two that round to the same t: one t apart
            times[k] = max(times[k], times[k - 1] + 1)
    else:                                                       # trailing
        times = [max(end, near((k + 1) * (start + 1) / count) - 1) for k in range(count)]
    return times[::-1]


# ----------------------------------------------------------------------------------------------------
# 2. From noise to image
#
# Each entry of SAMPLERS is a loop (sampler, predict, noise) -> x (B, C, H, W), and the grid that suits it.
# sampler: a Sampler, with schedule, times and eta. predict(x, t) -> (eps_hat, variance logits or None): the
# network with guidance (section 3). noise(k): standard normal (B, C, H, W); the loop starts at noise(0), and
# step k adds noise(k + 1). A loop calls noise only for the k that it uses, in ascending order.


def ddim_step(x0_hat, eps_hat, abar, abar_prev, noise=0.0, eta=0.0):
    """x_t -> x_prev (J. Song et al. 2021, eq. 12, sigma from eq. 16).

    x0_hat, eps_hat, noise: (B, C, H, W). abar, abar_prev: floats, at t and at the next smaller time, where 1
    is the last step, which returns x0_hat without noise. eta: 0 is deterministic, 1 has DDPM's variance.
    """
    sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
    direction = math.sqrt(max(0.0, 1 - abar_prev - sigma**2)) * eps_hat
    return math.sqrt(abar_prev) * x0_hat + direction + sigma * noise


def ddim(sampler, predict, noise):
    """DDIM (J. Song et al. 2021): a call at each of sampler.times, the last step to x_0: (B, C, H, W)."""
    abar, x = [*map(sampler.schedule.abar_at, sampler.times), 1.0], noise(0)        # (B, C, H, W)
    for k, t in enumerate(sampler.times):
        eps_hat, _ = predict(x, t)
        x0_hat = (x - math.sqrt(1 - abar[k]) * eps_hat) / math.sqrt(abar[k])
        fresh = noise(k + 1) if sampler.eta > 0 and abar[k + 1] < 1 else 0.0    # none in the last step
        x = ddim_step(x0_hat, eps_hat, abar[k], abar[k + 1], fresh, sampler.eta)
    return x


SAMPLERS = {                   # --sampler: the loop, and its own grid
    "ddim": (ddim, "quadratic"),
    "ddpm": (ddpm.ddpm, "quadratic"),
    **{name: (solvers.singlestep, "logsnr") for name in ("dpm1", "dpm2", "dpm3", "dpm-fast")},
    "dpm++2m": (solvers.dpm_pp_2m, "logsnr"),
    "turbo": (solvers.turbo, "trailing"),                       # of models that were distilled to few steps
}


class Sampler(NamedTuple):
    """A loop with all its numbers: sampler(predict, noise) -> x (B, C, H, W) float, unclipped."""
    loop: Callable
    schedule: Schedule
    times: list                # the grid's, falling from noise to image
    eta: float                 # DDIM's alone; other loops ignore it
    orders: list | None = None  # the order of each step of dpm1, dpm2, dpm3 and dpm-fast

    @torch.no_grad()
    def __call__(self, predict, noise):
        return self.loop(self, predict, noise)


def sampler_of(name, steps, grid=None, schedule=None, eta=0.0, start=Schedule.T - 1):
    """The Sampler `name` of SAMPLERS with `steps` network calls.

    grid: None for the sampler's own. schedule: None for DiT's. start: see timesteps, which raises UserErrors.
    """
    (loop, own_grid), schedule = SAMPLERS[name], schedule or Schedule()
    grid = grid or own_grid
    if loop is not solvers.singlestep:                          # one call at every time of the grid
        return Sampler(loop, schedule, timesteps(steps, grid, schedule, start=start), eta)
    orders = solvers.orders(name, steps, grid)                  # a step of order 3 makes 3 network calls
    return Sampler(loop, schedule, timesteps(len(orders) + 1, grid, schedule, steps), eta, orders)


# ----------------------------------------------------------------------------------------------------
# 3. Guidance, one seed per image, and a block of images


def guided(model, rows, null, guidance, channels=None, interval=(0, Schedule.T - 1)):
    """predict: (x, t) -> (eps_hat, variance logits or None), with classifier-free guidance.

    eps_hat = eps_u + guidance (eps_c - eps_u), of the network without and with the class (Ho & Salimans 2022,
    eq. 6; guidance is 1 + their w). Both run as one batch. At guidance 1, and for t outside of `interval`
    (both ends within; Kynkaanniemi et al. 2024), eps_hat is eps_c, and eps_u is not computed.
    model: DiT or U-ViT. rows: (B,) rows of its label table, one for each image's class; null: the row that
    means "no class". channels: how many of the first channels are guided, None for all. DiT's authors guide 3
    of 4, with which their FID was made; the other channels are conditional.
    """
    def predict(x, t):
        C, time = x.shape[1], torch.full((len(x),), float(t), device=x.device)          # (B,)
        if calls_at(t, guidance, interval) == 1:                # no guidance at t: the class alone
            out = model(x, time, rows).float()                              # (B, C or 2C, H, W)
            eps_hat, logits = out[:, :C], out[:, C:]
        else:
            both = torch.cat([rows, torch.full_like(rows, null)])           # (2B,)
            out = model(torch.cat([x, x]), torch.cat([time, time]), both).float()
            out_c, out_u = out.chunk(2)                                     # 2 of (B, C or 2C, H, W)
            G = C if channels is None else channels
            eps_hat = out_u[:, :G] + guidance * (out_c[:, :G] - out_u[:, :G])           # (B, G, H, W)
            eps_hat, logits = torch.cat([eps_hat, out_c[:, G:C]], dim=1), out_c[:, C:]
        return eps_hat, logits if logits.shape[1] else None     # a network without learned variance has none
    return predict


def calls_at(t, guidance, interval):
    """Network evaluations of an image at time t in [0, 999]: 2 with guidance, 1 without."""
    low, high = interval
    return 2 if guidance != 1 and low <= t <= high else 1


def mode_guided(predict, sampler, centres, weight):
    """predict, with mode guidance in the first half of the steps: eps_hat - weight sigma (m - x0_hat).

    So x0_hat moves by weight sigma^2 / alpha of its way to m: at weight 0.1, beyond m for t >= 675. centres:
    m (B, C, H, W), a mode of its class for each image. Chan-Santiago et al. 2025 add weight (m - x0_hat),
    times the posterior's deviation, to DDPM's mean; this form serves every sampler (docs/papers.md compares).
    """
    end = sampler.times[len(sampler.times) // 2]

    def guided_predict(x, t):
        eps_hat, logits = predict(x, t)
        if t > end:
            abar = sampler.schedule.abar_at(t)
            x0_hat = (x - math.sqrt(1 - abar) * eps_hat) / math.sqrt(abar)              # (B, C, H, W)
            eps_hat = eps_hat - weight * math.sqrt(1 - abar) * (centres - x0_hat)
        return eps_hat, logits
    return guided_predict


def image_noise(seed, names, shape, device):
    """Returns noise(k), (B, *shape) for k = 0, 1, ...: each image draws from a CPU generator of its own.

    names: (class name, index) of each image; they and `seed` fix its noise, in whatever batch it is drawn.
    """
    digests = [hashlib.sha256(os.fsencode(f"{seed}/{name}/{index}")).digest() for name, index in names]
    # torch's CPU generator keeps 32 bits of a seed: among 100,000 images about one pair shares its noise
    generators = [torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")) for digest in digests]

    def noise(k):
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    return noise


def draw(trained, seed, sampler, items, centres=None, mode_weight=0.0):
    """Draws n pictures (n, C, H, W) uint8 on the CPU; latents are decoded. items: n pairs (label, index).

    trained: a loading.Trained. A network tuned in phases draws each class with the weights of its phase.
    centres: (K, M, C, H, W), or None; image k of a class is pulled towards its class's centre k mod M.
    Raises UserError where a picture is not finite.
    """
    header, device = trained.header, next(trained.network.parameters()).device
    shape = header["config"]["channels"], header["config"]["size"], header["config"]["size"]
    x = torch.empty(len(items), *shape, device=device)                      # (n, C, H, W), or latents
    for positions in loading.by_phase(trained, [label for label, _ in items]):   # loads each phase's weights
        chosen = [items[i] for i in positions]
        rows = torch.tensor([header["rows"][label] for label, _ in chosen], device=device)
        predict = guided(trained.network, rows, header["rows"][-1], **trained.guide)    # [-1]: "no class"
        if centres is not None:
            own = torch.stack([centres[label, index % centres.shape[1]] for label, index in chosen])
            predict = mode_guided(predict, sampler, own, mode_weight)       # own: (len(chosen), C, H, W)
        names = [(header["classes"][label], index) for label, index in chosen]
        x[positions] = sampler(predict, image_noise(seed, names, shape, device))
    return loading.pictures_of(trained, x)


# ----------------------------------------------------------------------------------------------------
# 4. The driver


def main(argv=None):
    parser = cli.new_parser(__doc__)
    cli.add_flags(parser, "data root validation out seed device skip-broken overwrite bf16 compile")
    parser.add_argument("--vae", default="mse", metavar="ema|mse|FILE",
                        help="what decodes latents: an autoencoder of stabilityai's, fetched once, or a file "
                             "(default: %(default)s, as Gu et al., who encode with ema)")
    parser.add_argument("--checkpoint", type=pathlib.Path, metavar="FILE",
                        help="what to sample from, a file or a folder of phases (default: what minimax.py "
                             "wrote to --out or out/NAME; else what came with the code, in weights/NAME)")
    parser.add_argument("--steps", type=checks.number_or_auto, metavar="N|auto", help="network calls; auto: "
                        "the best count for the budget (default: 10; of one-step models 1, up to 4)")
    parser.add_argument("--sampler", choices=SAMPLERS,
                        help="dpm1 to dpm3: DPM-Solver of that order; dpm-fast: U-ViT's, at 50 steps; "
                             "dpm++2m: DPM-Solver++; turbo: one-step models' (default: ddim)")
    parser.add_argument("--grid", choices=GRIDS, help="where in t the steps lie (default: the sampler's own)")
    parser.add_argument("--eta", type=float, default=0.0,
                        help="share of DDPM's noise that DDIM adds, 0 to 1 (default: %(default)s)")
    parser.add_argument("--prompt", metavar="TEXT", help="what SDXL-Turbo draws; {} is the class's name "
                        "(default: {})")
    parser.add_argument("--weights", type=pathlib.Path, metavar="DIR",
                        help="SDXL-Turbo's files, in the hub's folders (default: fetched once, 6.9 GB)")
    parser.add_argument("--guidance", type=float, help="1: none; more: less varied (default: the model's)")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        default=(0, Schedule.T - 1),
                        help="guide only where LOW <= t <= HIGH, at half the cost elsewhere (default: 0 999)")
    parser.add_argument("--cfg-channels", type=int, metavar="N",
                        help="guide the first N channels only: 3, as DiT's published samples (default: all)")
    parser.add_argument("--modes", type=int, nargs="?", const=math.inf, metavar="N",
                        help="mode guidance: image k of a class is pulled towards number k mod N of the N "
                             "k-means centres of its training images (default N: --ipc)")
    parser.add_argument("--mode-weight", type=float, help="strength of --modes (default: 0.1)")
    parser.add_argument("--ipc", type=int, help="images per class (default: 10)")
    parser.add_argument("--oversample", type=int, default=1, metavar="K",
                        help="draw K times as many images, all within --seconds, and keep the best")
    parser.add_argument("--keep", choices=oversample.RULES, help="how --oversample chooses the best: see "
                        "nanodd/sampling/oversample.py (default: herding)")
    parser.add_argument("--seconds", type=float, help="in place of --ipc: as many of every class as fit; "
                        "a block starts only if the longest block so far would still fit (see above)")
    parser.add_argument("--minutes", type=float, help="the same in minutes")
    parser.add_argument("--batch", type=int, default=100,
                        help="images drawn at once, by each process (default: %(default)s)")
    parser.add_argument("--npz", action="store_true", help="one distilled.npz, not a file for each image")
    args = parser.parse_args(argv)
    with running.command(parser, args):
        draw_set(args, cli.run_of(args, __file__, argv))


def draw_set(args, run):
    """Draws the distilled set of the command line, unless that set is finished."""
    ipc, budget = checks.sampling_flags(args, Schedule.T - 1)
    name = datasets.data_name(args.data, args.root, args.validation)
    out = args.out or pathlib.Path("out", name)
    trained = loading.for_sampling(args, run, name, out)
    header, guide = trained.header, trained.guide
    grid = args.grid or SAMPLERS[args.sampler][1]
    place = distilled.Place(out, header["classes"], args.npz)
    mode_arguments, mode_settings = modes.of_flags(args, run, header, ipc)
    settings = {"weights": header["weights"], "sampler": args.sampler, "steps": args.steps, "grid": grid,
                "eta": args.eta, "guidance": guide["guidance"],
                "guidance_interval": list(guide["interval"]), "cfg_channels": guide["channels"],
                "bf16": trained.bf16, "autoencoder": trained.autoencoder, "seed": args.seed,
                "batch": args.batch, "npz": args.npz, **mode_settings, **header.get("extra_settings", {})}

    def sampler_in(steps):
        return sampler_of(args.sampler, steps, grid, trained.schedule, args.eta, header.get("t_star", 999))

    def draw_in(steps):                                         # draw, which still takes items
        return functools.partial(draw, trained, args.seed, sampler_in(steps), **mode_arguments)
    if args.steps == "auto":                # draws a small set, a pilot, in each count; judges compare them
        judge = functools.cache(lambda: pilots.judge_of_pilots(args, header["recipe"], run.device,
                                                               train_judges, count_epochs))
        settings["steps"] = pilots.choose_steps(draw_in, judge, place, settings, budget, run)
    sampler = sampler_in(settings["steps"])                     # raises UserError before files are changed
    fresh = {"settings": settings, "data": name, "classes": header["classes"], "ipc": 0, "budget": 0.0,
             "seconds": 0.0, "command": run.command}
    pool = oversample.open_pool(args, place, fresh, ipc, budget) if args.oversample > 1 else place
    place.open(fresh, args.overwrite)       # the best of the pool are kept in place
    print(f"{loading.title(trained, name, run)} | {args.sampler}, {settings['steps']} steps, {grid} grid | "
          f"guidance {guide['guidance']:g} | seed {args.seed}")
    evaluate = f"python train_eval.py{cli.data_flags(args, '--out')}"
    if place.holds(ipc, budget):
        saved = place.record["ipc"]
        print(f"{place.path} holds {saved} images a class already (same settings): left as it is -> "
              f"{evaluate}" + f" --ipc {ipc}" * (ipc < saved))
        return
    drawn = pool.fill(draw_in(settings["steps"]), ipc * args.oversample, budget, args.batch, run.command)
    images = drawn if pool is place else oversample.keep_best(args, run, header["recipe"], pool, place,
                                                              real_judge)
    # call_times runs the loop once more, on a (1, 1, 1, 1) x and without the network
    calls = sum(calls_at(t, guide["guidance"], guide["interval"]) for t in solvers.call_times(sampler))
    print(f"{images} images | {place.record['ipc']} a class | {place.record['seconds']:.1f} s | "
          f"{drawn * calls:,} network evaluations ({calls} for each of {drawn})")
    print(f"saved {place.path} and {place.sheet} -> {evaluate}"
          + (f" --recipe {header['recipe']}" if header["recipe"] != recipes.own_recipe(args.data) else ""))


if __name__ == "__main__":
    main()
