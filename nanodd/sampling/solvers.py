"""DPM-Solver: samplers that solve the probability flow in lambda = log(alpha / sigma), in few network calls.

    x_t = alpha_t/alpha_s x_s - alpha_t (integral over lambda from s to t of e^-lambda eps_hat)

is exact (Lu et al. 2022, prop. 3.1). A solver of order n expands eps_hat in lambda up to its (n-1)-th
derivative; the error of one step is O(h^(n+1)). Singlestep solvers estimate the derivatives by n network
calls within a step. 2M, a multistep solver, makes one call a step and also uses the call of the step before.
Sources: Lu et al. 2022 (DPM-Solver), Lu et al. 2023 (DPM-Solver++), Peebles & Xie 2023 (the grid "stride").
"""
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

from nanodd.errors import UserError

# ----------------------------------------------------------------------------------------------------
# 1. Noise levels


class Level(NamedTuple):
    """The noise level of x_t = alpha x_0 + sigma eps; half_log_snr is lambda = log(alpha / sigma); floats."""
    t: float
    alpha: float
    sigma: float
    half_log_snr: float


CLEAN = Level(-1.0, 1.0, 0.0, math.inf)                         # the image itself; the network is not called


def level(schedule, t):
    """The Level at one t in [0, 999]."""
    abar = schedule.abar_at(t)
    return Level(t, math.sqrt(abar), math.sqrt(1 - abar), 0.5 * math.log(abar / (1 - abar)))


def time_at(schedule, half_log_snr):
    """The t in [0, 999] where lambda is this number: the inverse of `level`."""
    if hasattr(schedule, "time_at"):                            # a continuous schedule has a closed form
        return schedule.time_at(half_log_snr)
    log_abar = -np.logaddexp(0, -2 * half_log_snr)
    return float(np.interp(-log_abar, -schedule.abar.log(), range(schedule.T)))


def levels(sampler):
    """The Levels of a sampler's times, from noise to image."""
    return [level(sampler.schedule, t) for t in sampler.times]


def between(schedule, s, t, share):
    """The Level at `share` (0 to 1) of the way from s to t, in lambda."""
    return level(schedule, time_at(schedule, (1 - share) * s.half_log_snr + share * t.half_log_snr))


# ----------------------------------------------------------------------------------------------------
# 2. Two grids: `count` falling times


def logsnr(count, schedule, end):
    """Times from T - 1 to `end`, equal in lambda (Lu et al. 2022); between the ends they are no integers.

    count: at least 2.
    """
    lambda_first, lambda_end = (level(schedule, t).half_log_snr for t in (schedule.T - 1, end))
    shares = [k / (count - 1) for k in range(count)]            # from 0 (image) to 1 (noise)
    inner = [time_at(schedule, lambda_end + share * (lambda_first - lambda_end)) for share in shares[1:-1]]
    return [schedule.T - 1, *inner[::-1], end]                  # the ends exactly, not by time_at


def stride(count, schedule):
    """Multiples of an integer, down to 0: DiT's respacing "ddimS", 900 to 0 for 10. A count of one: T - 1.

    Raises UserError where no stride gives exactly `count` times, or where the schedule is continuous.
    """
    T = schedule.T
    if not schedule.discrete:
        raise UserError("--grid stride counts the 1,000 steps of DiT's schedule; this checkpoint's is "
                        "continuous: choose another --grid")
    if count == 1:
        return [T - 1]
    strides = [s for s in range(1, T + 1) if len(range(0, T, s)) == count]
    if not strides:
        raise UserError(f"--grid stride has no whole stride that makes {count} steps of {T}")
    return list(range(0, T, strides[0]))[::-1]


# ----------------------------------------------------------------------------------------------------
# 3. One step
#
# s, t: Levels of falling time; h = lambda_t - lambda_s > 0. eps: (x, Level) -> eps_hat (B, C, H, W).


def dpm_solver_1(x, eps_hat, s, t):
    """x_t = alpha_t/alpha_s x - sigma_t (e^h - 1) eps_hat: DDIM without noise (Lu et al. 2022, eq. 3.7)."""
    h = t.half_log_snr - s.half_log_snr
    return t.alpha / s.alpha * x - t.sigma * math.expm1(h) * eps_hat


def dpm_solver_2(x, eps, s, t, schedule):
    """Order 1 with eps_hat at the midpoint u (Lu et al. 2022, alg. 4 with r1 = 1/2).

    x_u = dpm_solver_1(s to u)        x_t = alpha_t/alpha_s x - sigma_t (e^h - 1) eps(x_u, u)
    """
    u = between(schedule, s, t, 1 / 2)
    middle = dpm_solver_1(x, eps(x, s), s, u)
    return dpm_solver_1(x, eps(middle, u), s, t)


def dpm_solver_3(x, eps, s, t, schedule):
    """Through u at one third and v at two thirds of h (Lu et al. 2022, alg. 5 with r1 = 1/3, r2 = 2/3).

    x_u = dpm_solver_1(s to u)
    x_v = dpm_solver_1(s to v) - 2 sigma_v ((e^{2h/3} - 1) / (2h/3) - 1) (eps_u - eps_s)
    x_t = dpm_solver_1(s to t) - 3/2 sigma_t ((e^h - 1) / h - 1) (eps_v - eps_s)
    """
    u, v = (between(schedule, s, t, share) for share in (1 / 3, 2 / 3))
    h, eps_s = t.half_log_snr - s.half_log_snr, eps(x, s)
    eps_u = eps(dpm_solver_1(x, eps_s, s, u), u)
    h_v = 2 * h / 3
    x_v = dpm_solver_1(x, eps_s, s, v) - 2 * v.sigma * (math.expm1(h_v) / h_v - 1) * (eps_u - eps_s)
    return dpm_solver_1(x, eps_s, s, t) - 1.5 * t.sigma * (math.expm1(h) / h - 1) * (eps(x_v, v) - eps_s)


def pp_2m_step(x, x0_hat, x0_before, s, t, h_before):
    """x_t = sigma_t/sigma_s x - alpha_t (e^-h - 1) (x0_hat + h/(2 h_before) (x0_hat - x0_before)).

    DPM-Solver++(2M) (Lu et al. 2023, alg. 2). x0_before: x0_hat of the step before, whose h was h_before. A
    step without one (None), or to the image itself (t.sigma = 0), is of order 1.
    """
    h = t.half_log_snr - s.half_log_snr
    if x0_before is not None and t.sigma > 0:
        x0_hat = x0_hat + h / (2 * h_before) * (x0_hat - x0_before)
    return t.sigma / s.sigma * x - t.alpha * math.expm1(-h) * x0_hat


# ----------------------------------------------------------------------------------------------------
# 4. The loops: (sampler, predict, noise) -> x (B, C, H, W), as sample.Sampler describes them

ORDERS = {"dpm1": 1, "dpm2": 2, "dpm3": 3, "dpm-fast": 3}       # of the singlestep samplers


def orders(name, steps, grid="logsnr"):
    """The order of each step of a singlestep sampler: a list of numbers that add up to `steps` network calls.

    As many steps of the sampler's own order as fit are taken, then one of the order that is left. "dpm-fast"
    (U-ViT's sampler) ends with orders 2 and 1 where nothing would be left, so that its last steps are easier.
    Raises UserError where the grid does not end at the image, since a singlestep sampler ends with its grid.
    """
    if grid in ("trailing", "stride"):
        raise UserError(f"--sampler {name} ends where its grid does, and --grid {grid} does not end at the "
                        "image: choose logsnr, quadratic or uniform")
    if not 1 <= steps < 1000:                                   # n steps of order 1 need n + 1 times
        raise UserError(f"--steps must be between 1 and 999 with --sampler {name}, not {steps}")
    order = ORDERS[name]
    full, left = divmod(steps, order)
    if name == "dpm-fast" and left == 0:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [left] * (left > 0)


def singlestep(sampler, predict, noise):
    """DPM-Solver: a step between every two times of the grid. The result is x at the last time, not x0_hat.

    U-ViT's authors also take it for the image. Noise of standard deviation 0.01 is left in it, or 0.003 on
    the continuous schedule with more than 15 network calls (in units of half the grey scale).
    """
    def eps(x, at):
        return predict(x, at.t)[0]
    x, schedule = noise(0), sampler.schedule
    for order, (s, t) in zip(sampler.orders, itertools.pairwise(levels(sampler)), strict=True):
        if order == 1:
            x = dpm_solver_1(x, eps(x, s), s, t)
        elif order == 2:
            x = dpm_solver_2(x, eps, s, t, schedule)
        else:
            x = dpm_solver_3(x, eps, s, t, schedule)
    return x


def dpm_pp_2m(sampler, predict, noise):
    """DPM-Solver++(2M): a call at every time of the grid; the last step, of order 1, ends at the image."""
    x, x0_before, h = noise(0), None, None
    for s, t in itertools.pairwise([*levels(sampler), CLEAN]):
        x0_hat = (x - s.sigma * predict(x, s.t)[0]) / s.alpha
        x = pp_2m_step(x, x0_hat, x0_before, s, t, h)
        x0_before, h = x0_hat, t.half_log_snr - s.half_log_snr
    return x


def turbo(sampler, predict, noise):
    """Euler's ancestral sampler, with which ADD's students draw (Sauer et al. 2023).

    At every time x0_hat is formed, and noised to the next time, mostly with fresh noise. In z = x / alpha,
    whose noise is s = sigma / alpha, with u of the next time (0 at the image):
    z_u = z + (s_down - s) eps_hat + s_up noise,  s_up^2 = u^2 (s^2 - u^2) / s^2,  s_down^2 = u^2 - s_up^2.
    The start is z = s noise; from there, DDIM with eta = 1 makes the same steps.
    """
    at = [*levels(sampler), CLEAN]
    x = at[0].sigma * noise(0)
    for k, (now, then) in enumerate(itertools.pairwise(at)):
        s, u = now.sigma / now.alpha, then.sigma / then.alpha
        up = u * math.sqrt(1 - (u / s)**2)
        z = x / now.alpha + (math.sqrt(u**2 - up**2) - s) * predict(x, now.t)[0]
        x = then.alpha * (z + (up * noise(k + 1) if u > 0 else 0.0))
    return x


def call_times(sampler):
    """The times of all network calls of a sampler, in their order, recorded while it runs."""
    times = []

    def predict(x, t):
        times.append(t)
        return x, None
    sampler(predict, lambda k: torch.zeros(1, 1, 1, 1))
    return times
