"""DDPM: the posterior of one step back, its learned variance, the variational bound, ancestral sampling.

    q(x_prev | x_t, x_0) = N(a x_0 + b x_t, variance)                       (Ho et al. 2020, eq. 6, 7)

Sources: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (learned variance), Peebles & Xie 2023 (DiT).
"""
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------
# 1. One step back, when x_0 is known


def abar_at(abar, t):
    """abar of the table abar (T,) at t in [0, T - 1], a float; between whole t, its logarithm is linear."""
    if t == int(t):                                             # exact, without the rounding of log and exp
        return abar[int(t)].item()
    return math.exp(np.interp(t, range(len(abar)), abar.log()))


def posterior(abar, abar_prev):
    """q(x_prev | x_t, x_0) = N(a x_0 + b x_t, variance), for any earlier time (Ho et al. 2020, eq. 6, 7).

    abar, abar_prev: floats or float64 tensors, abar < abar_prev <= 1. Returns a, b, variance and beta, the
    variance of the forward step between the two.
    """
    beta = 1 - abar / abar_prev
    a = beta * abar_prev**0.5 / (1 - abar)
    b = (1 - abar_prev) * (1 - beta)**0.5 / (1 - abar)
    return a, b, beta * (1 - abar_prev) / (1 - abar), beta


@functools.lru_cache(maxsize=4)
def posterior_table(schedule):
    """(4, T) float32 on the schedule's device: a, b, log variance and log beta of each step t -> t - 1.

    The variance at t = 0 is zero, and is replaced by the one at t = 1 (Nichol & Dhariwal 2021).
    """
    a, b, variance, beta = posterior(schedule.abar, F.pad(schedule.abar[:-1], (1, 0), value=1.0))
    variance[0] = variance[1]
    return torch.stack([a, b, variance.log(), beta.log()]).float().to(schedule.signal.device)


def learned_log_variance(logits, log_variance, log_beta):
    """The log variance, linear in logits: the posterior's at -1, beta's at +1; not clamped.

    Nichol & Dhariwal 2021, eq. 15.
    """
    share = (logits + 1) / 2
    return share * log_beta + (1 - share) * log_variance


# ----------------------------------------------------------------------------------------------------
# 2. The variational bound, which trains the variance


def variational_bound(schedule, x0, xt, t, eps_hat, logits):
    """KL(q(x_prev | x_t, x_0) || p(x_prev | x_t)), at t = 0 -log p(x_0 | x_t): bits a dimension, (B,).

    Nichol & Dhariwal 2021, eq. 4 to 6 and 16. DiT takes the bins of 8-bit pixels at t = 0 for latents, too,
    where they mean nothing; so does this function, since the published weights were trained with it.
    """
    a, b, log_variance, log_beta = posterior_table(schedule)[:, t].view(4, -1, 1, 1, 1)  # 4 of (B, 1, 1, 1)
    mean = a * schedule.x0_from_eps(xt, t, eps_hat) + b * xt
    learned = learned_log_variance(logits, log_variance, log_beta)
    bound = torch.where((t == 0).view(-1, 1, 1, 1), discretised_nll(x0, mean, learned),
                        gaussian_kl(a * x0 + b * xt, log_variance, mean, learned))
    return bound.mean(dim=(1, 2, 3)) / math.log(2)


def gaussian_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, variance1) || N(mean2, variance2)) in nats, elementwise."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean1 - mean2).pow(2) * torch.exp(-log_variance2))


def normal_cdf(x):
    """The standard normal's cdf as ADM and DiT approximate it; off by 3e-4 at most.

    0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    """
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretised_nll(x, mean, log_variance):
    """-log of the mass that N(mean, variance) has in x's bin of width 2/255, the outer bins open; in nats."""
    def mass_below(edge):
        return normal_cdf((edge - mean) * torch.exp(-0.5 * log_variance))
    left = torch.where(x < -0.999, 0.0, mass_below(x - 1 / 255))
    right = torch.where(x > 0.999, 1.0, mass_below(x + 1 / 255))
    return -(right - left).clamp(min=1e-12).log()


# ----------------------------------------------------------------------------------------------------
# 3. Sampling


def ddpm_step(xt, x0_hat, abar, abar_prev, noise=0.0, logits=None):
    """Ho et al. 2020, alg. 2, with the betas of the grid: the mean of `posterior`, and noise of its variance.

    abar_prev = 1 is the last step, which returns x0_hat without noise. With `logits` (B, C, H, W) the
    variance is the learned one (Nichol & Dhariwal 2021).
    """
    a, b, variance, beta = posterior(abar, abar_prev)
    mean = a * x0_hat + b * xt
    if variance == 0:                                           # the last step
        return mean
    if logits is None:
        return mean + math.sqrt(variance) * noise
    return mean + torch.exp(0.5 * learned_log_variance(logits, math.log(variance), math.log(beta))) * noise


def ddpm(sampler, predict, noise):
    """Ancestral sampling: a network call at every time of the grid, the last step to the image itself."""
    abar, x = [*map(sampler.schedule.abar_at, sampler.times), 1.0], noise(0)  # (B, C, H, W)
    for k, t in enumerate(sampler.times):
        eps_hat, logits = predict(x, t)
        x0_hat = (x - math.sqrt(1 - abar[k]) * eps_hat) / math.sqrt(abar[k])
        fresh = noise(k + 1) if abar[k + 1] < 1 else 0.0
        x = ddpm_step(x, x0_hat, abar[k], abar[k + 1], fresh, logits)
    return x
