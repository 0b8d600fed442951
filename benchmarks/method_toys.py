"""The toys of docs/method.md: directions in the plane as embeddings, and a Gaussian of one number.

No benchmark by itself: method.py draws and prints them.
"""
import math

import torch

from minimax import CRITERIA
from sample import sampler_of


def directions(degrees):
    """Angles (n,) in degrees -> unit vectors (n, 2)."""
    return torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)


def real_directions(outlier=False):
    """The angles of 64 embeddings: 57 about 30 degrees and 7 about 110; the last one an outlier at 170."""
    rng = torch.Generator().manual_seed(0)
    large, rare = (mean + 8 * torch.randn(n, generator=rng) for mean, n in ((30, 57), (110, 7)))
    return torch.cat([large, rare[:-1], torch.tensor([170.0])] if outlier else [large, rare])


def start_directions():
    """The angles (64,) of the predictions at first, about 30 degrees, and a generator for what follows."""
    rng = torch.Generator().manual_seed(1)
    return 30 + 8 * torch.randn(64, generator=rng), rng


def toy(criterion, diverse, outlier=False, steps=3000, rate=300.0):
    """Where a loss alone, without L_diff, leads 64 predictions: their angles (64,), in degrees.

    criterion: "minmax" or "naive". diverse: L_d, or else L_r. Each step moves eight predictions. L_r compares
    them with all real embeddings; naive L_r, as in minimax.py, with eight real ones. L_d compares them with
    the 56 others.
    """
    angles, rng = start_directions()
    angles.requires_grad_()
    real, loss_of = directions(real_directions(outlier)), CRITERIA[criterion][diverse]
    optimizer = torch.optim.SGD([angles], lr=rate)
    for _ in range(steps):
        own, others = torch.randperm(64, generator=rng).split([8, 56])
        batch = real[torch.randperm(64, generator=rng)[:8]]                 # (8, 2)
        memory = directions(angles.detach()[others]) if diverse else real   # (56, 2) or (64, 2)
        loss = loss_of(directions(angles[own]), batch, memory)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return angles.detach()


def gaussian_deviation(steps, grid, std=0.3):
    """What DDIM makes of a Gaussian with deviation `std` and a perfect denoiser: the deviation it returns.

    The denoiser is linear, so that DDIM multiplies its noise by a number: this deviation.
    """
    sampler = sampler_of("ddim", steps, grid)

    def predict(x, t):                                          # E[eps | x_t], the mean of the data being 0
        abar = sampler.schedule.abar_at(t)
        return math.sqrt(1 - abar) * x / (abar * std**2 + 1 - abar), None
    return sampler(predict, lambda k: torch.ones(1, 1, 1, 1, dtype=torch.float64)).item()
