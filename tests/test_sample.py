"""Grids and DDIM against a Gaussian's exact answer; guidance; an image's own noise; the command line."""
import math
import pathlib
import shutil

import pytest
import torch

import minimax
import sample
from conftest import drawn_files
from diffusion import DiT, Schedule
from gaussian import MEAN, STD, exact, returned
from nanodd import files
from nanodd.data import imageset
from nanodd.errors import UserError
from nanodd.networks import checkpoint, ddpm
from nanodd.sampling import solvers
from sample import image_noise, sampler_of, timesteps


@pytest.mark.parametrize("grid, row", [("uniform", (.097, .181, .238, .275)),
                                       ("trailing", (.111, .185, .237, .273)),
                                       ("quadratic", (.193, .244, .272, .289))])
def test_few_steps_lose_diversity_by_the_known_amounts(grid, row):
    for steps, std in zip((5, 10, 20, 50), row, strict=True):
        mean, found = returned("ddim", steps, grid)
        assert found == pytest.approx(std, abs=6e-4) and mean == pytest.approx(MEAN, abs=2e-3)


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


def test_many_steps_give_the_gaussian_back():
    for name, how in (("ddim", {}), ("ddim", {"eta": 1.}), ("ddpm", {})):
        mean, std = returned(name, 1000, "uniform", **how)
        assert mean == pytest.approx(MEAN, abs=2e-3) and std == pytest.approx(STD, abs=6e-3)


def test_ddim_with_eta_one_and_all_steps_is_ddpm():
    noise = torch.randn(1001, 2, 1, 4, 4, dtype=torch.float64)
    crooked = lambda x, t: (torch.tanh(x) + 0.1 * x.roll(1, 3), None)  # any denoiser will do
    one, two = (sampler_of(name, 1000, "uniform", eta=eta)(crooked, lambda k: noise[k])
                for name, eta in (("ddim", 1.), ("ddpm", 0.)))
    assert torch.allclose(one, two, atol=1e-8)


def test_last_step_adds_no_noise():
    called = []

    def noise(k):
        called.append(k)
        return torch.full((1, 1, 1, 1), 1e9) if k == 5 else torch.randn(1, 1, 1, 1)
    for name, eta in (("ddpm", 0.), ("ddim", 1.)):
        called.clear()
        assert sampler_of(name, 5, "uniform", eta=eta)(exact(Schedule()), noise).abs() < 10
        assert called == [0, 1, 2, 3, 4]                           # the start, then all steps but the last
    for name in ("ddim", "dpm-fast", "dpm++2m"):
        called.clear()
        sampler_of(name, 5)(exact(Schedule()), noise)
        assert called == [0]                                       # these are deterministic


def test_the_learned_variance_lies_between_the_posteriors_and_beta():
    abar, previous = 0.5, 0.8
    beta, x = 1 - abar / previous, torch.zeros(1, 1, 1, 1)
    posterior = beta * (1 - previous) / (1 - abar)
    step = lambda v: ddpm.ddpm_step(x, x, abar, previous, torch.ones_like(x), v).item() ** 2
    assert step(None) == pytest.approx(posterior) == step(torch.full_like(x, -1.))
    assert step(torch.ones_like(x)) == pytest.approx(beta)
    assert step(torch.zeros_like(x)) == pytest.approx(math.sqrt(beta * posterior))


def test_ddpm_on_a_grid_is_ddpm_with_the_grids_betas():
    """DiT's respacing, spelled out: new betas of the kept times, the network called at the original times."""
    abar, times, called = Schedule().abar, timesteps(7), []
    kept = abar[times[::-1]]                                       # (7,), rising t
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    noise = torch.randn(8, 2, 1, 2, 2, dtype=torch.float64)

    def crooked(x, t):
        called.append(t)
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
    drawn = sampler_of("ddpm", 7, "uniform")(crooked, lambda k: noise[k])
    assert torch.allclose(drawn, x, atol=1e-9)
    assert called[:7] == called[7:] == times and times[0] == 999 and times[-1] == 0


def network():
    torch.manual_seed(1)
    model = DiT("mini", size=8, patch=2, channels=1, classes=3).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def test_guidance_outside_of_its_interval_is_not_computed():
    model, seen = network(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    x, rows = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    predict = sample.guided(model, rows, 3, 3., interval=(200, 800))
    sampler = sampler_of("ddim", 10, "uniform")
    sampler(predict, lambda k: x)
    inside = [200 <= t <= 800 for t in sampler.times]
    assert seen == [8 if within else 4 for within in inside] and sum(inside) == 6
    calls = [sample.calls_at(t, 3., (200, 800)) for t in solvers.call_times(sampler)]
    assert calls == [1 + within for within in inside]
    alone = sample.guided(model, rows, 3, 1.)
    assert torch.equal(predict(x, 801)[0], alone(x, 801)[0])
    assert torch.equal(predict(x, 200)[0], sample.guided(model, rows, 3, 3.)(x, 200)[0])


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


def test_the_evaluations_that_are_reported_are_those_made(tuned, capsys):
    sample.main(["--ipc", "1", "--sampler", "dpm-fast", "--steps", "7", "--guidance", "2",
                 "--guidance-interval", "100", "500"])
    times = solvers.call_times(sampler_of("dpm-fast", 7))
    calls = 7 + sum(100 <= t <= 500 for t in times)
    assert f"{10 * calls} network evaluations ({calls} for each of 10)" in capsys.readouterr().out


def test_out_is_looked_into_first(tuned, capsys):
    minimax.main(["--steps", "2", "--out", "out/a b"])
    assert "--checkpoint 'out/a b/minimax.safetensors'" in capsys.readouterr().out
    sample.main(["--ipc", "1", "--steps", "1", "--out", "out/a b"])
    assert capsys.readouterr().out.startswith("out/a b/minimax.safetensors")
    sample.main(["--ipc", "2", "--steps", "1", "--out", "out/other"])
    sample.main(["--ipc", "1", "--steps", "1", "--out", "out/other"])
    assert capsys.readouterr().out.strip().endswith("train_eval.py --out out/other --ipc 1")


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
    checkpoint.save_checkpoint(shipped, half,
                               {**files.read_header(path), "command": "python diffusion.py, long ago"})
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
