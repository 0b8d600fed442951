"""A sampler's oracle, no test by itself: the perfect denoiser of a Gaussian, and the flow it makes exact."""
import math

import torch

from nanodd.sampling import solvers
from sample import sampler_of

MEAN, STD = 0.7, 0.3


def exact(schedule):
    """The perfect denoiser of N(0.7, 0.3^2): E[eps | x_t] in closed form."""
    def predict(x, t):
        abar = schedule.abar_at(t)
        return math.sqrt(1 - abar) * (x - math.sqrt(abar) * MEAN) / (abar * STD**2 + 1 - abar), None
    return predict


def returned(name, steps, grid=None, schedule=None, **how):
    """Mean and standard deviation of what a sampler returns with the perfect denoiser, without any draw.

    All steps are linear, so the deviation is the root of the summed squares of the answers to single noises.
    """
    sampler = sampler_of(name, steps, grid, schedule, **how)
    one_by_one = torch.eye(steps + 1, dtype=torch.float64)        # a noise a column; the last row has none

    def noise(k):
        none = torch.zeros(steps, dtype=torch.float64)
        column = one_by_one[:steps, k] if k < steps else none
        return torch.cat([column, torch.zeros(1, dtype=torch.float64)]).view(-1, 1, 1, 1)
    out = sampler(exact(sampler.schedule), noise).flatten()
    return out[-1].item(), (out[:-1] - out[-1]).norm().item()


def errors(name, counts, schedule, grid="logsnr"):
    """How far a solver ends from the Gaussian's exact flow, started from x = 1 at t = 999, for each count.

    On the flow (x - alpha 0.7) / sqrt(alpha^2 0.3^2 + sigma^2) stays what it is. The singlestep solvers end
    with x at the schedule's end, the others with x0_hat.
    """
    deviation = lambda level: math.sqrt(level.alpha**2 * STD**2 + level.sigma**2)
    found = []
    for steps in counts:
        sampler = sampler_of(name, steps, grid, schedule)
        start, end = (solvers.level(schedule, sampler.times[k]) for k in (0, -1))
        z = (1 - start.alpha * MEAN) / deviation(start)
        flow = end.alpha * MEAN + deviation(end) * z
        if not sampler.orders:
            flow = (flow - end.sigma * exact(schedule)(flow, end.t)[0]) / end.alpha
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        found.append(abs(sampler(exact(schedule), lambda k, one=one: one).item() - flow))
    return found
