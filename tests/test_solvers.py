"""DPM-Solver against a Gaussian's exact flow; its grids against the published ones."""
import math

import numpy as np
import pytest
import torch

import sample
from diffusion import Schedule
from gaussian import errors, exact, returned
from nanodd.errors import UserError
from nanodd.networks import uvit
from nanodd.sampling import solvers
from sample import sampler_of, timesteps

SCHEDULES = (Schedule(), uvit.ContinuousSchedule())


@pytest.mark.parametrize("grid, row", [("uniform", (.206, .370, .389)), ("quadratic", (.326, .338, .311)),
                                       ("logsnr", (.230, .308, .304))])
def test_dpm_solver_pp_keeps_more_of_it_on_the_right_grid(grid, row):
    for steps, std in zip((5, 10, 20), row, strict=True):
        assert returned("dpm++2m", steps, grid)[1] == pytest.approx(std, abs=6e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name, order", [("dpm1", 1), ("dpm2", 2), ("dpm3", 3), ("dpm++2m", 2)])
def test_a_solver_converges_at_its_order(name, order, schedule):
    few, many = errors(name, (180, 360), schedule)
    assert math.log2(few / many) == pytest.approx(order, abs=0.12)


def test_order_one_is_ddim_without_noise():
    x, eps = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    for schedule in SCHEDULES:
        s, t = solvers.level(schedule, 700), solvers.level(schedule, 300)
        x0_hat = (x - s.sigma * eps) / s.alpha
        ddim = sample.ddim_step(x0_hat, eps, schedule.abar_at(700), schedule.abar_at(300))
        assert torch.allclose(solvers.dpm_solver_1(x, eps, s, t), ddim, atol=1e-12)
        assert torch.allclose(solvers.pp_2m_step(x, x0_hat, None, s, t, None), ddim, atol=1e-12)
        assert torch.allclose(solvers.pp_2m_step(x, x0_hat, 0 * x, s, solvers.CLEAN, 1.), x0_hat,
                              atol=1e-12)
    noise = torch.randn(1, 1, 1, 1, dtype=torch.float64)
    dpm1, ddim = sampler_of("dpm1", 20), sampler_of("ddim", 21, "logsnr")
    assert dpm1.times == ddim.times                                # DDIM makes one step more, to the image
    end, called = dpm1(exact(Schedule()), lambda k: noise), []

    def watched(x, t):
        called.append(x)
        return exact(Schedule())(x, t)
    ddim(watched, lambda k: noise)
    assert torch.allclose(called[-1], end, atol=1e-12)


def test_the_fast_grid_is_u_vits(monkeypatch):
    """The published grid for 50 evaluations; its last lambda was a float32's, which moves it by 1e-4."""
    published = [1, .93447, .86403, .78742, .7028, .60761, .49881, .37589, .25009, .14646, .07877, .04018,
                 .01942, .00863, .00338, .00114, .00035, .0001]
    sampler = sampler_of("dpm-fast", 50, schedule=uvit.ContinuousSchedule())
    assert sampler.orders == [3] * 16 + [2]
    assert [t / 999 for t in sampler.times] == pytest.approx(published, abs=1.2e-4)

    def in_float32(schedule, t, exact=solvers.level):
        abar = np.exp(np.float32(math.log(schedule.abar_at(t))))
        return exact(schedule, t)._replace(half_log_snr=float(0.5 * np.log(abar / (np.float32(1) - abar))))
    monkeypatch.setattr(solvers, "level", in_float32)
    times = sampler_of("dpm-fast", 50, schedule=uvit.ContinuousSchedule()).times
    assert [t / 999 for t in times] == pytest.approx(published, abs=1e-5)


def test_orders_add_up_to_the_steps():
    for name, order in solvers.ORDERS.items():
        for steps in range(1, 60):
            parts = solvers.orders(name, steps)
            assert sum(parts) == steps == len(solvers.call_times(sampler_of(name, steps)))
            assert max(parts) <= order
    assert solvers.orders("dpm-fast", 20) == [3] * 6 + [2] and solvers.orders("dpm-fast", 10) == [3] * 3 + [1]
    assert solvers.orders("dpm-fast", 9) == [3, 3, 2, 1] and solvers.orders("dpm3", 9) == [3, 3, 3]


def test_both_schedules_agree_where_both_have_a_grid_point():
    """DiT's betas are the SDE's, in 1,000 pieces: the t-th of the table is time (t + 1) / 1000."""
    discrete, continuous = SCHEDULES
    for t in range(20, 1000, 7):
        there = solvers.level(continuous, (t + 1) / 1000 * 999)
        assert there.half_log_snr == pytest.approx(solvers.level(discrete, t).half_log_snr, abs=0.04)
    for schedule in SCHEDULES:
        for t in (999, 640, 33, 1):
            there = solvers.level(schedule, t)
            assert solvers.time_at(schedule, there.half_log_snr) == pytest.approx(t, abs=1e-6)
            assert schedule.abar_at(t) == pytest.approx(there.alpha**2, abs=1e-12)
    for steps in (10, 20):
        for name in ("ddim", "dpm++2m", "dpm-fast"):
            one, two = (returned(name, steps, schedule=schedule)[1] for schedule in SCHEDULES)
            assert one == pytest.approx(two, abs=2e-3)


def test_a_grid_goes_where_its_schedule_ends():
    continuous = uvit.ContinuousSchedule()
    for grid in ("uniform", "quadratic", "logsnr"):
        for steps, end in ((10, .999), (16, .0999)):
            times = timesteps(steps, grid, continuous)
            assert times[0] == 999 and times[-1] == pytest.approx(end) and times == sorted(times)[::-1]
    assert timesteps(10, "logsnr")[0] == 999 and timesteps(10, "logsnr")[-1] == 0
    lambdas = [solvers.level(Schedule(), t).half_log_snr for t in timesteps(30, "logsnr")]
    steps = torch.tensor(lambdas).diff()
    assert steps.std() < 1e-6 * steps.mean()
    with pytest.raises(UserError, match="continuous: choose another --grid"):
        timesteps(10, "stride", continuous)
    with pytest.raises(UserError, match="does not end at the image"):
        sampler_of("dpm3", 10, "trailing")


def test_the_stride_grid_is_dits_ddim():
    assert timesteps(10, "stride") == list(range(900, -1, -100))
    assert timesteps(50, "stride")[0] == 980 and timesteps(20, "stride")[0] == 950
    assert timesteps(1000, "stride")[0] == 999
    with pytest.raises(UserError, match="no whole stride that makes 999 steps"):
        timesteps(999, "stride")
