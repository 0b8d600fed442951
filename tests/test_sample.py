"""Samplers against a Gaussian's exact answer; sets that are nested, balanced and the same after a stop."""
import argparse
import json
import math
import pathlib
import shutil

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

import minimax
import sample
import train_eval
from diffusion import CLEAN, DiT, Schedule, save_checkpoint
from nanodd import files
from nanodd.data import datasets, imageset
from nanodd.errors import UserError
from sample import block, image_noise, sampler_of, timesteps
from uvit import ContinuousSchedule

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
    out = sampler.draw(exact(sampler.schedule), noise).flatten()
    return out[-1].item(), (out[:-1] - out[-1]).norm().item()


@pytest.mark.parametrize("grid, row", [("uniform", (.097, .181, .238, .275)),
                                       ("trailing", (.111, .185, .237, .273)),
                                       ("quadratic", (.193, .244, .272, .289))])
def test_few_steps_lose_diversity_by_the_known_amounts(grid, row):
    for steps, std in zip((5, 10, 20, 50), row, strict=True):
        mean, found = returned("ddim", steps, grid)
        assert found == pytest.approx(std, abs=6e-4) and mean == pytest.approx(MEAN, abs=2e-3)


@pytest.mark.parametrize("grid, row", [("uniform", (.206, .370, .389)), ("quadratic", (.326, .338, .311)),
                                       ("logsnr", (.230, .308, .304))])
def test_dpm_solver_pp_keeps_more_of_it_on_the_right_grid(grid, row):
    for steps, std in zip((5, 10, 20), row, strict=True):
        assert returned("dpm++2m", steps, grid)[1] == pytest.approx(std, abs=6e-4)


SCHEDULES = (Schedule(), ContinuousSchedule())


def errors(name, counts, schedule):
    """How far a solver ends from the Gaussian's exact flow, started from x = 1 at t = 999, for each count.

    On the flow (x - alpha 0.7) / sqrt(alpha^2 0.3^2 + sigma^2) stays what it is. dpm++2m ends with x0_hat,
    the singlestep solvers with x at the schedule's end.
    """
    deviation = lambda level: math.sqrt(level.alpha**2 * STD**2 + level.sigma**2)
    found = []
    for steps in counts:
        sampler = sampler_of(name, steps, "logsnr", schedule)
        start, end = (schedule.level(sampler.times[k]) for k in (0, -1))
        z = (1 - start.alpha * MEAN) / deviation(start)
        flow = end.alpha * MEAN + deviation(end) * z
        if name == "dpm++2m":
            flow = (flow - end.sigma * exact(schedule)(flow, end.t)[0]) / end.alpha
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        found.append(abs(sampler.draw(exact(schedule), lambda k, one=one: one).item() - flow))
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name, order", [("dpm1", 1), ("dpm2", 2), ("dpm3", 3), ("dpm++2m", 2)])
def test_a_solver_converges_at_its_order(name, order, schedule):
    few, many = errors(name, (180, 360), schedule)
    assert math.log2(few / many) == pytest.approx(order, abs=0.12)


def test_order_one_is_ddim_without_noise():
    x, eps = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    for schedule in SCHEDULES:
        s, t = schedule.level(700), schedule.level(300)
        x0_hat = (x - s.sigma * eps) / s.alpha
        ddim = sample.ddim_step(x0_hat, eps, schedule.abar_at(700), schedule.abar_at(300))
        assert torch.allclose(sample.dpm_solver_1(x, eps, s, t), ddim, atol=1e-12)
        assert torch.allclose(sample.dpm_solver_pp_2m(x, x0_hat, None, s, t, None), ddim, atol=1e-12)
        assert torch.allclose(sample.dpm_solver_pp_2m(x, x0_hat, 0 * x, s, CLEAN, 1.), x0_hat, atol=1e-12)
    noise = torch.randn(1, 1, 1, 1, dtype=torch.float64)
    dpm1, ddim = sampler_of("dpm1", 20), sampler_of("ddim", 21, "logsnr")
    assert dpm1.times == ddim.times                                # DDIM goes on: from the last to the image
    end, asked = dpm1.draw(exact(Schedule()), lambda k: noise), []

    def watched(x, t):
        asked.append(x)
        return exact(Schedule())(x, t)
    ddim.draw(watched, lambda k: noise)
    assert torch.allclose(asked[-1], end, atol=1e-12)


def test_the_fast_grid_is_u_vits():
    """The published grid for 50 evaluations; its last lambda was a float32's, which moves it by 1e-4."""
    published = [1, .93447, .86403, .78742, .7028, .60761, .49881, .37589, .25009, .14646, .07877, .04018,
                 .01942, .00863, .00338, .00114, .00035, .0001]
    sampler = sampler_of("dpm-fast", 50, schedule=ContinuousSchedule())
    assert sampler.orders == [3] * 16 + [2]
    assert [t / 999 for t in sampler.times] == pytest.approx(published, abs=1.2e-4)

    class InFloat32(ContinuousSchedule):
        def level(self, t):
            exact = super().level(t)
            abar = np.exp(np.float32(math.log(self.abar_at(t))))
            return exact._replace(half_log_snr=float(0.5 * np.log(abar / (np.float32(1) - abar))))
    times = sampler_of("dpm-fast", 50, schedule=InFloat32()).times
    assert [t / 999 for t in times] == pytest.approx(published, abs=1e-5)


def test_orders_add_up_to_the_steps():
    for name, order in sample.ORDERS.items():
        for steps in range(1, 60):
            parts = sample.orders(name, steps)
            assert sum(parts) == steps == len(sampler_of(name, steps).asked()) and max(parts) <= order
    assert sample.orders("dpm-fast", 20) == [3] * 6 + [2] and sample.orders("dpm-fast", 10) == [3] * 3 + [1]
    assert sample.orders("dpm-fast", 9) == [3, 3, 2, 1] and sample.orders("dpm3", 9) == [3, 3, 3]


def test_both_schedules_agree_where_both_have_a_grid_point():
    """DiT's betas are the SDE's, in 1,000 pieces: the t-th of the table is time (t + 1) / 1000."""
    discrete, continuous = SCHEDULES
    for t in range(20, 1000, 7):
        there = continuous.level((t + 1) / 1000 * 999)
        assert there.half_log_snr == pytest.approx(discrete.level(t).half_log_snr, abs=0.04)
    for schedule in SCHEDULES:
        for t in (999, 640, 33, 1):
            assert schedule.time_at(schedule.level(t).half_log_snr) == pytest.approx(t, abs=1e-6)
            assert schedule.abar_at(t) == pytest.approx(schedule.level(t).alpha**2, abs=1e-12)
    for steps in (10, 20):
        for name in ("ddim", "dpm++2m", "dpm-fast"):
            one, two = (returned(name, steps, schedule=schedule)[1] for schedule in SCHEDULES)
            assert one == pytest.approx(two, abs=2e-3)


def test_a_grid_goes_where_its_schedule_ends():
    continuous = ContinuousSchedule()
    for grid in ("uniform", "quadratic", "logsnr"):
        for steps, end in ((10, .999), (16, .0999)):
            times = timesteps(steps, grid, continuous)
            assert times[0] == 999 and times[-1] == pytest.approx(end) and times == sorted(times)[::-1]
    assert timesteps(10, "logsnr")[0] == 999 and timesteps(10, "logsnr")[-1] == 0
    steps = torch.tensor([Schedule().level(t).half_log_snr for t in timesteps(30, "logsnr")]).diff()
    assert steps.std() < 1e-6 * steps.mean()
    with pytest.raises(UserError, match="continuous: choose another --grid"):
        timesteps(10, "stride", continuous)
    with pytest.raises(UserError, match="does not end at the image"):
        sampler_of("dpm3", 10, "trailing")


@torch.no_grad()
def test_guidance_outside_of_its_interval_is_not_computed():
    model, seen = network(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    x, rows = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    predict = sample.guided(model, rows, 3, 3., interval=(200, 800))
    sampler = sampler_of("ddim", 10, "uniform")
    sampler.draw(predict, lambda k: x)
    inside = [200 <= t <= 800 for t in sampler.times]
    assert seen == [8 if within else 4 for within in inside] and sum(inside) == 6
    assert [sample.calls_at(t, 3., (200, 800)) for t in sampler.asked()] == [1 + within for within in inside]
    alone = sample.guided(model, rows, 3, 1.)
    assert torch.equal(predict(x, 801)[0], alone(x, 801)[0])
    assert torch.equal(predict(x, 200)[0], sample.guided(model, rows, 3, 3.)(x, 200)[0])


def test_many_steps_give_the_gaussian_back():
    for name, how in (("ddim", {}), ("ddim", {"eta": 1.}), ("ddpm", {})):
        mean, std = returned(name, 1000, "uniform", **how)
        assert mean == pytest.approx(MEAN, abs=2e-3) and std == pytest.approx(STD, abs=6e-3)


def test_ddim_with_eta_one_and_all_steps_is_ddpm():
    noise = torch.randn(1001, 2, 1, 4, 4, dtype=torch.float64)
    crooked = lambda x, t: (torch.tanh(x) + 0.1 * x.roll(1, 3), None)  # any denoiser will do
    ddim, ddpm = (sampler_of(name, 1000, "uniform", eta=eta).draw(crooked, lambda k: noise[k])
                  for name, eta in (("ddim", 1.), ("ddpm", 0.)))
    assert torch.allclose(ddim, ddpm, atol=1e-8)


def test_last_step_adds_no_noise():
    asked = []

    def noise(k):
        asked.append(k)
        return torch.full((1, 1, 1, 1), 1e9) if k == 5 else torch.randn(1, 1, 1, 1)
    for name, eta in (("ddpm", 0.), ("ddim", 1.)):
        asked.clear()
        assert sampler_of(name, 5, "uniform", eta=eta).draw(exact(Schedule()), noise).abs() < 10
        assert asked == [0, 1, 2, 3, 4]                           # the start, then all steps but the last
    for name in ("ddim", "dpm-fast", "dpm++2m"):
        asked.clear()
        sampler_of(name, 5).draw(exact(Schedule()), noise)
        assert asked == [0]                                       # these are deterministic


def test_the_learned_variance_lies_between_the_posteriors_and_beta():
    abar, previous = 0.5, 0.8
    beta, x = 1 - abar / previous, torch.zeros(1, 1, 1, 1)
    posterior = beta * (1 - previous) / (1 - abar)
    step = lambda v: sample.ddpm_step(x, x, abar, previous, torch.ones_like(x), v).item() ** 2
    assert step(None) == pytest.approx(posterior) == step(torch.full_like(x, -1.))
    assert step(torch.ones_like(x)) == pytest.approx(beta)
    assert step(torch.zeros_like(x)) == pytest.approx(math.sqrt(beta * posterior))


def test_one_step_starts_at_t_999():
    assert timesteps(1, "stride") == [999]
    for grid in ("uniform", "quadratic", "trailing"):
        assert timesteps(1, grid) == [999]
        for steps in (2, 10, 333, 1000):
            times = timesteps(steps, grid)
            assert len(set(times)) == steps and times == sorted(times, reverse=True) and times[0] == 999
    with pytest.raises(UserError, match="between 1 and 1000"):
        timesteps(1001)


def test_the_uniform_grid_is_dits():
    assert timesteps(50)[::-1][:8] == [0, 20, 41, 61, 82, 102, 122, 143]
    assert timesteps(50)[:3] == [999, 979, 958]
    assert timesteps(10)[::-1] == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert timesteps(5)[::-1] == [0, 250, 500, 749, 999]
    assert timesteps(10, "trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


def test_the_stride_grid_is_dits_ddim():
    assert timesteps(10, "stride") == list(range(900, -1, -100))
    assert timesteps(50, "stride")[0] == 980 and timesteps(20, "stride")[0] == 950
    assert timesteps(1000, "stride")[0] == 999
    with pytest.raises(UserError, match="no whole stride that makes 999 steps"):
        timesteps(999, "stride")


def test_ddpm_on_a_grid_is_ddpm_with_the_grids_betas():
    """DiT's respacing, spelled out: new betas of the kept times, the network asked at the original times."""
    abar, times, asked = Schedule().abar, timesteps(7), []
    kept = abar[times[::-1]]                                       # (7,), rising t
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    noise = torch.randn(8, 2, 1, 2, 2, dtype=torch.float64)

    def crooked(x, t):
        asked.append(t)
        return torch.tanh(x) + t / 1000, torch.cos(3 * x)
    x = noise[0]
    for k in reversed(range(7)):
        now = torch.prod(1 - betas[:k + 1])
        before = torch.prod(1 - betas[:k])                         # 1 for k = 0
        eps, v = crooked(x, times[::-1][k])
        x0 = (x - torch.sqrt(1 - now) * eps) / torch.sqrt(now)
        mean = (betas[k] * torch.sqrt(before) / (1 - now) * x0
                + (1 - before) * torch.sqrt(1 - betas[k]) / (1 - now) * x)
        if k > 0:
            smallest = torch.log(betas[k] * (1 - before) / (1 - now))
            log_variance = (v + 1) / 2 * torch.log(betas[k]) + (1 - v) / 2 * smallest
            mean = mean + torch.exp(0.5 * log_variance) * noise[7 - k]
        x = mean
    drawn = sampler_of("ddpm", 7, "uniform").draw(crooked, lambda k: noise[k])
    assert torch.allclose(drawn, x, atol=1e-9)
    assert asked[:7] == asked[7:] == times and times[0] == 999 and times[-1] == 0


def network():
    torch.manual_seed(1)
    model = DiT("mini", size=8, patch=2, channels=1, classes=3).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def test_guidance_one_is_the_conditional_model():
    model, x, rows = network(), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    t = torch.full((4,), 300.)
    conditional, unconditional = model(x, t, rows), model(x, t, torch.full((4,), 3))
    guide = lambda w: sample.guided(model, rows, 3, w)(x, 300)[0]
    assert torch.equal(guide(1), conditional)
    assert torch.allclose(guide(0), unconditional, atol=1e-6)
    assert torch.allclose(guide(1 + 1e-9), conditional, atol=1e-5)  # the doubled batch agrees with the single
    assert torch.allclose(guide(4), 4 * conditional - 3 * unconditional, atol=1e-5)


@torch.no_grad()
def test_guidance_on_three_channels_leaves_the_fourth_conditional():
    torch.manual_seed(1)
    model = DiT("mini", size=8, patch=2, channels=4, classes=3, learned_variance=True)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    torch.nn.init.normal_(model.final_layer.adaLN_modulation[1].weight, std=0.1)
    x, rows = torch.randn(2, 4, 8, 8), torch.tensor([0, 2])
    alone = model(x, torch.full((2,), 300.), rows)
    all_four, logits = sample.guided(model, rows, 3, 4.)(x, 300)
    three, same = sample.guided(model, rows, 3, 4., channels=3)(x, 300)
    assert torch.equal(three[:, :3], all_four[:, :3]) and torch.equal(logits, same)
    assert torch.allclose(three[:, 3], alone[:, 3], atol=1e-5)
    assert torch.allclose(logits, alone[:, 4:], atol=1e-5)
    assert not torch.allclose(all_four[:, 3], alone[:, 3], atol=1e-3)


def test_an_image_has_its_own_noise_in_any_batch():
    names = [("a", 0), ("b", 0), ("a", 1)]
    together, alone = image_noise(0, names, (1, 4, 4), "cpu"), image_noise(0, names[2:], (1, 4, 4), "cpu")
    for k in range(3):
        many, one = together(k), alone(k)
        assert torch.equal(many[2], one[0]) and not torch.equal(many[0], many[1])
    one, two = (image_noise(seed, names, (1, 4, 4), "cpu")(0) for seed in (1, 0))
    assert not torch.equal(one, two)


def test_blocks_are_rounds_cut_at_the_batch():
    assert block(0, 4, 3) == [(0, 0), (1, 0), (2, 0), (0, 1)] and block(1, 4, 3)[0] == (1, 1)
    assert block(1, 4, 3, total=6) == [(1, 1), (2, 1)] and block(2, 4, 3, total=6) == []


@pytest.fixture
def tuned():
    minimax.main([])


def drawn_files(out="out/digits"):
    return {path.relative_to(out).as_posix(): path.read_bytes()
            for path in pathlib.Path(out).glob("distilled/*/*.png")}


def test_a_set_is_an_image_folder_with_its_labels(tuned, capsys):
    sample.main(["--ipc", "2", "--steps", "3"])
    folder = ImageFolder("out/digits/distilled")
    assert folder.classes == [str(c) for c in range(10)] and len(folder) == 20
    record = json.loads(open("out/digits/distilled.json").read())
    assert record["classes"] == folder.classes and record["ipc"] == 2 and record["settings"]["steps"] == 3
    assert "20 images | 2 a class" in capsys.readouterr().out
    assert pathlib.Path("out/digits/distilled.png").exists()


def test_smaller_sets_are_nested_in_larger_ones(tuned, capsys):
    sample.main(["--ipc", "3", "--out", "whole", "--batch", "7"])
    sample.main(["--ipc", "1", "--out", "grown", "--batch", "7"])
    small = drawn_files("grown")
    sample.main(["--ipc", "3", "--out", "grown", "--batch", "7"])
    assert drawn_files("grown") == drawn_files("whole") and set(small) < set(drawn_files("whole"))
    sample.main(["--ipc", "2", "--out", "grown", "--batch", "7"])
    assert "left as it is" in capsys.readouterr().out and drawn_files("grown") == drawn_files("whole")


def test_another_batch_size_moves_one_grey_level_at_most(tuned):
    sample.main(["--ipc", "3", "--out", "a", "--batch", "30", "--sampler", "ddpm"])
    sample.main(["--ipc", "3", "--out", "b", "--batch", "4", "--sampler", "ddpm"])
    a, b = (imageset.read_set(f"{out}/distilled", 8, 1).images.int() for out in "ab")
    assert (a - b).abs().max() <= 1


def test_a_stopped_set_goes_on_to_the_same_bytes(tuned):
    sample.main(["--ipc", "4", "--batch", "8"])
    whole = drawn_files()
    for lost in ("distilled/3/00001.png", "distilled/9/00003.png", "distilled/0/00003.png"):
        pathlib.Path("out/digits", lost).unlink()
    record = pathlib.Path("out/digits/distilled.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "ipc": 0}))
    sample.main(["--ipc", "4", "--batch", "8"])
    assert drawn_files() == whole


def test_a_killed_set_goes_on_to_the_same_bytes(tuned, kill_and_resume):
    argv = ["--ipc", "20", "--steps", "20", "--batch", "20", "--checkpoint", "out/digits/minimax.safetensors"]
    sample.main([*argv, "--out", "whole"])
    kill_and_resume("sample", [*argv, "--out", "cut"], pathlib.Path("cut/distilled/3/00004.png").exists)
    assert drawn_files("cut") == drawn_files("whole") and len(drawn_files("whole")) == 200


def test_a_budget_keeps_complete_rounds_only(tuned, capsys, sentence):
    sample.main(["--seconds", "1.5", "--steps", "2", "--batch", "16"])
    record = json.loads(open("out/digits/distilled.json").read())
    counts = [len(list(folder.iterdir())) for folder in pathlib.Path("out/digits/distilled").iterdir()]
    assert counts == [record["ipc"]] * 10 and record["seconds"] <= 1.7
    sample.main(["--seconds", "1.5", "--steps", "2", "--batch", "16"])
    assert "left as it is" in capsys.readouterr().out
    sample.main(["--minutes", "0.04", "--steps", "2", "--batch", "16"])
    more = json.loads(open("out/digits/distilled.json").read())
    assert more["ipc"] > record["ipc"] and record["seconds"] < more["seconds"] <= 2.6  # added up over resumes
    assert "Raise --seconds" in sentence(sample.main, "--seconds", "1e-9", "--batch", 3, "--out", "short")


def test_the_first_block_warms_up_and_is_forgotten(monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(sample.time, "monotonic", lambda: clock[0])

    def draw(items):
        clock[0] += 3.0 if clock[0] == 0 else 0.1                  # compiling, say
        return torch.zeros(len(items), 1, 2, 2, dtype=torch.uint8)
    record = {"classes": ["a", "b"], "seconds": 0.0}
    store = sample.PngFolder(tmp_path, record["classes"])
    kept = sample.distil(draw, store, record, math.inf, 6.55, 2, lambda record: None)
    assert len(kept) == 2 * 36                                     # 3 s, then 35 rounds of 0.1 s
    clock[0], record, drawn = 0.0, {"classes": ["a", "b"], "seconds": 0.0}, []

    def stopped(items):
        drawn.append(items)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(items)
    store = sample.PngFolder(tmp_path / "stopped", record["classes"])
    with pytest.raises(KeyboardInterrupt):
        sample.distil(stopped, store, record, math.inf, 10.05, 2, lambda record: None)
    clock[0] = 0.0                                                 # another process, which warms up as well
    kept = sample.distil(draw, store, record, math.inf, 10.05, 2, lambda record: None)
    assert len(kept) == 2 * 42                                     # 3 s and 3 s, then 40 rounds of 0.1 s
    record["seconds"] = 7.0
    with pytest.raises(UserError, match="7.0 seconds are spent already, more than the budget of 6.5"):
        sample.distil(draw, store, record, math.inf, 6.5, 2, lambda record: None)


def test_auto_takes_the_steps_whose_pilot_makes_the_best_judge(tuned, capsys, monkeypatch, sentence):
    monkeypatch.setattr(sample, "CANDIDATES", (1, 2, 3))
    worth, judged = iter([50.0, 70.0, 60.0]), []

    def judge(place):
        judged.append(imageset.read_set(place, 8, 1))
        return next(worth)
    monkeypatch.setattr(sample, "judge_of_pilots", lambda args, recipe, device: judge)
    words = ["--steps", "auto", "--seconds", "1", "--batch", "10"]
    sample.main(words)
    said = capsys.readouterr().out
    found = json.loads(pathlib.Path("out/digits/steps.json").read_text())
    assert found["steps"] == 2 and "-> 2 steps" in said and "ddim, 2 steps" in said
    assert [row["steps"] for row in found["rows"]] == [1, 2, 3]
    for row, pilot in zip(found["rows"], judged, strict=True):
        assert row["pilot"] == len(pilot.labels) and f"{row['steps']:5} | " in said
        assert row["images"] == pytest.approx(10 / row["seconds_per_batch"], rel=0.01)
    assert json.loads(pathlib.Path("out/digits/distilled.json").read_text())["settings"]["steps"] == 2
    assert not pathlib.Path("out/digits/.pilots").exists()
    sample.main(words)                                             # asks no judge again
    assert "has decided on 2 steps" in capsys.readouterr().out
    said = sentence(sample.main, "--steps", "auto", "--seconds", "2", "--batch", "10")
    assert "holds a set already, and no steps.json says" in said   # refused before it takes time
    assert "add --seconds or --minutes" in sentence(sample.main, "--steps", "auto")
    said = sentence(sample.main, "--steps", "auto", "--seconds", "1e-9", "--batch", 3, "--out", "short")
    assert "too short for one image of each class" in said


def test_pilots_take_no_longer_than_the_budget_or_a_minute():
    assert sample.pilot_share(2) == 1 and sample.pilot_share(600) == pytest.approx(1 / 7)
    assert 7 * 10 * sample.pilot_share(10) == pytest.approx(60)


def test_a_pilot_is_judged_on_training_images_held_back(tuned, monkeypatch):
    sample.main(["--ipc", "2", "--steps", "2"])
    seen, train_judges = [], train_eval.train_judges

    def watched(trains, test, *rest, **how):
        seen.append(test)
        return train_judges(trains, test, *rest, **how)
    monkeypatch.setattr(sample, "train_judges", watched)
    for validation in (False, True):
        args = argparse.Namespace(data="digits", root=None, skip_broken=False, validation=validation, seed=0)
        worth = sample.judge_of_pilots(args, "digits", torch.device("cpu"))
        assert 0 <= worth("out/digits/distilled") <= 100
    train, held = datasets.load().train.images, datasets.load(validation=True)
    whole = {image.numpy().tobytes() for image in train}
    rest = {image.numpy().tobytes() for image in held.train.images}
    assert torch.equal(seen[0].images, held.test.images) and len(seen[0].labels) == 252
    assert all(image.numpy().tobytes() in whole for image in seen[0].images)
    assert all(image.numpy().tobytes() in rest for image in seen[1].images)


def test_the_evaluations_that_are_reported_are_those_made(tuned, capsys):
    sample.main(["--ipc", "1", "--sampler", "dpm-fast", "--steps", "7", "--guidance-interval", "100", "500"])
    times = sampler_of("dpm-fast", 7).asked()
    calls = 7 + sum(100 <= t <= 500 for t in times)
    assert f"{10 * calls} network evaluations ({calls} an image)" in capsys.readouterr().out


def test_out_is_looked_into_first(tuned, capsys):
    minimax.main(["--steps", "2", "--out", "out/a b"])
    assert "--checkpoint 'out/a b/minimax.safetensors'" in capsys.readouterr().out
    sample.main(["--ipc", "1", "--steps", "1", "--out", "out/a b"])
    assert capsys.readouterr().out.startswith("out/a b/minimax.safetensors")
    sample.main(["--ipc", "2", "--steps", "1", "--out", "out/other"])
    sample.main(["--ipc", "1", "--steps", "1", "--out", "out/other"])
    assert capsys.readouterr().out.strip().endswith("train_eval.py --out out/other --ipc 1")


def test_an_npz_holds_the_same_images(tuned):
    sample.main(["--ipc", "3", "--batch", "8"])
    sample.main(["--ipc", "3", "--batch", "8", "--npz", "--out", "npz"])
    folder, npz = imageset.read_set("out/digits/distilled", 8, 1), imageset.read_set("npz/distilled.npz", 8,
                                                                                     1)
    for c in range(10):
        assert torch.equal(folder.images[folder.labels == c], npz.images[npz.labels == c])
    assert not pathlib.Path("npz/distilled.npz.parts").exists()


def test_what_a_killed_write_left_is_not_joined(tuned):
    words = ["--npz", "--ipc", "2", "--steps", "2", "--batch", "7"]
    sample.main([*words, "--out", "whole"])
    pathlib.Path("cut/distilled.npz.parts").mkdir(parents=True)
    pathlib.Path("cut/distilled.npz.parts/.000000007.npy.123.tmp").write_bytes(b"half a block")
    record = json.loads(pathlib.Path("whole/distilled.json").read_text())
    pathlib.Path("cut/distilled.json").write_text(json.dumps({**record, "ipc": 0}))
    sample.main([*words, "--out", "cut"])
    whole, cut = (imageset.read_set(f"{out}/distilled.npz", 8, 1) for out in ("whole", "cut"))
    assert torch.equal(whole.images, cut.images) and torch.equal(whole.labels, cut.labels)


def test_two_kinds_of_checkpoint_in_one_folder_are_not_guessed_between(tuned, sentence):
    minimax.main(["--phases", "5"])
    said = sentence(sample.main)
    assert "minimax.safetensors and phases" in said and "--checkpoint" in said
    sample.main(["--checkpoint", "out/digits/minimax.safetensors", "--ipc", "1", "--steps", "1"])


def test_phases_of_other_settings_are_not_mixed(sentence):
    minimax.main(["--classes", "0-4"])
    minimax.main(["--classes", "5-9", "--lambda-r", "1"])
    assert "another lambda_r (1.0)" in sentence(sample.main)
    assert "is no range A-B" in sentence(minimax.main, "--classes", "5-10")
    assert "choose one" in sentence(minimax.main, "--classes", "5-9", "--phases", 2)


def test_what_makes_no_sense_is_refused(tuned, sentence, pictures):
    sample.main(["--ipc", "1"])
    kept = drawn_files()
    assert "steps 10 there, 5 here" in sentence(sample.main, "--steps", 5)
    assert drawn_files() == kept
    other_data = ["--data", pictures, "--checkpoint", "out/digits/minimax.safetensors"]
    for argv, words in ((["--steps", 0], "--steps must be between 1 and 1000"),
                        (["--ipc", 0], "--ipc must be"),
                        (["--ipc", 1, "--seconds", 3], "exclude each other"),
                        (["--seconds", -1], "positive time"),
                        (["--batch", 0], "--batch must be"), (["--eta", 2], "between 0 and 1"),
                        (["--guidance", "nan"], "--guidance must be"),
                        (["--guidance-interval", 5, 3], "LOW HIGH, 0 <= LOW <= HIGH <= 999"),
                        (["--guidance-interval", 5, 30, "--guidance", 1], "nothing to limit"),
                        (["--sampler", "dpm2", "--eta", ".5"], "--eta belongs to DDIM"),
                        (["--sampler", "dpm2", "--grid", "stride"], "does not end at the image"),
                        (["--checkpoint", "no.safetensors"],
                         "there is no no.safetensors: python minimax.py makes one"),
                        (other_data, "of the data set digits")):
        assert words in sentence(sample.main, *argv)
    sample.main(["--ipc", "1", "--steps", "5", "--overwrite"])
    assert drawn_files() != kept
    pathlib.Path("out/digits/distilled.json").unlink()
    assert "no distilled.json says what it is" in sentence(sample.main, "--ipc", 1)
    shutil.rmtree("out/digits/distilled")
    sample.main(["--ipc", "1"])


def test_the_base_can_be_sampled_too(tuned):
    sample.main(["--ipc", "1", "--checkpoint", "out/digits/base.safetensors", "--out", "base"])
    assert len(drawn_files("base")) == 10


def test_who_has_no_model_draws_from_the_one_that_came_with_the_code(tuned, capsys, sentence):
    """In bfloat16, which halves the file and moves the images of a small network by a few grey levels."""
    path, shipped = "out/digits/base.safetensors", pathlib.Path("weights/digits/base.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in files.load_tensors(path).items()}
    save_checkpoint(shipped, half, {**files.read_header(path), "command": "python diffusion.py, long ago"})
    sample.main(["--ipc", "1", "--checkpoint", path, "--out", "base"])
    sample.main(["--ipc", "1"])
    assert "came with the code" not in capsys.readouterr().out and len(drawn_files()) == 10
    shutil.rmtree("out")                                          # their own came first
    sample.main(["--ipc", "1"])
    assert f"from {shipped}, which came with the code and was made by: python diffusion.py, long ago\n" in \
        capsys.readouterr().out
    theirs, ours = (imageset.read_set(f"{out}/distilled", channels=1).images.int() for out
                    in ("base", "out/digits"))
    assert 0 < (theirs - ours).abs().max() < 16
    assert "there is no out/digits-validation/minimax" in sentence(sample.main, "--validation")
