"""Mode guidance: the pull's algebra, a mixture of Gaussians with its exact denoiser, the k-means centres."""
import json
import math
import pathlib

import pytest
import torch
from sklearn.cluster import KMeans

import minimax
import sample
from conftest import ROOT, drawn_files
from diffusion import Schedule
from nanodd import files
from nanodd.data import datasets, imageset
from nanodd.networks.ddpm import posterior
from nanodd.sampling import modes

SCHEDULE = Schedule()
CENTRES = 0.85 * torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mixture(x, t, std=0.3):
    """The perfect denoiser of ten equal Gaussians in 16 dimensions: E[eps | x_t] in closed form."""
    abar = SCHEDULE.abar_at(t)
    variance = abar * std**2 + 1 - abar
    offsets = x[:, None] - math.sqrt(abar) * CENTRES                        # (B, 10, 1, 4, 4)
    share = (-offsets.pow(2).sum((2, 3, 4)) / (2 * variance)).softmax(1)    # (B, 10)
    return math.sqrt(1 - abar) / variance * (share[:, :, None, None, None] * offsets).sum(1), None


def hits(weight, steps, sampler, grid, images=1000):
    """The share of images that end nearest to the centre they were pulled towards."""
    wanted = torch.arange(images) % 10
    sampler = sample.sampler_of(sampler, steps, grid)
    noise = torch.randn(images, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = sampler(sample.mode_guided(mixture, sampler, CENTRES[wanted], weight), lambda k: noise)
    return (torch.cdist(x.flatten(1), CENTRES.flatten(1)).argmin(1) == wanted).double().mean().item()


def test_without_weight_the_wanted_mode_is_hit_by_chance():
    assert hits(0.0, 10, "dpm++2m", "uniform") == pytest.approx(0.10, abs=0.03)


@pytest.mark.parametrize("weight, shares", [(0.1, (.34, .40, .42)), (0.2, (.65, .76, .79))])
def test_the_wanted_mode_is_hit_nearly_as_often_in_few_steps_as_in_many(weight, shares):
    for steps, share in zip((10, 20, 50), shares, strict=True):
        assert hits(weight, steps, "dpm++2m", "uniform") == pytest.approx(share, abs=0.05)


def test_the_pull_moves_the_guess_at_the_image_and_stops_at_half_of_the_steps():
    x, m, weight = torch.randn(3, 1, 4, 4, dtype=torch.float64), CENTRES[:3], 0.1
    sampler = sample.sampler_of("ddim", 10, "uniform")
    predict = sample.mode_guided(mixture, sampler, m, weight)
    for k, t in enumerate(sampler.times):
        alpha, sigma = math.sqrt(SCHEDULE.abar_at(t)), math.sqrt(1 - SCHEDULE.abar_at(t))
        before, after = ((x - sigma * f(x, t)[0]) / alpha for f in (mixture, predict))
        share = weight * sigma**2 / alpha if k < 5 else 0
        assert torch.allclose(after, before + share * (m - before), atol=1e-9)


def test_what_is_said_of_the_pull_follows_from_the_schedule():
    abar = SCHEDULE.abar
    assert (0.1 * (1 - abar) / abar.sqrt() > 1).nonzero()[0].item() == 675
    assert "at weight 0.1, beyond m for t >= 675" in " ".join(sample.mode_guided.__doc__.split())
    times = sample.timesteps(50, "uniform")
    _, _, variance, beta = posterior(abar[times[:25]], abar[times[1:26]])   # of the guided half of 50 steps
    ours_to_theirs = beta / (1 - beta).sqrt() / variance.sqrt()             # what each adds to DDPM's mean
    said = f"pulls {ours_to_theirs.min():.1f} to {ours_to_theirs.max():.1f} times as strongly as theirs"
    assert said in (ROOT / "docs/papers.md").read_text()


def test_the_modes_are_k_means_centres_the_largest_cluster_first(tuned):
    data = datasets.load()
    run = sample.cli.Run("", torch.device("cpu"), 0, False, None, False, False, "ema")
    found = modes.modes_of(data, run, 3)
    assert found.shape == (10, 3, 1, 8, 8)
    for c in (0, 7):
        x = imageset.to_float(data.train.images[data.train.labels == c]).flatten(1)     # (n, 64)
        cluster = torch.cdist(x, found[c].flatten(1)).argmin(1)
        sizes = cluster.bincount(minlength=3)
        assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
        for k in range(3):                                      # a centre is the mean of those nearest to it
            assert torch.allclose(x[cluster == k].mean(0), found[c, k].flatten(), atol=1e-5)
        inertia = KMeans(3, n_init=3, random_state=1).fit(x.numpy()).inertia_
        assert torch.cdist(x, found[c].flatten(1)).min(1).values.pow(2).sum() <= 1.02 * inertia
    path = pathlib.Path("out/digits/modes-3-seed0.safetensors")
    stamp = path.stat().st_mtime_ns
    assert torch.equal(modes.modes_of(data, run, 3), found)
    assert path.stat().st_mtime_ns == stamp                     # it was read, not made again


def test_image_k_aims_at_mode_k_whatever_the_batch(tuned):
    sample.main(["--steps", "3", "--modes", "--ipc", "4", "--out", "out/a"])
    sample.main(["--steps", "3", "--modes", "4", "--ipc", "2", "--batch", "7", "--out", "out/b"])
    whole, part = drawn_files("out/a"), drawn_files("out/b")
    assert len(whole) == 40 and len(part) == 20
    close = [(imageset.open_image(f"out/a/{name}").int() - imageset.open_image(f"out/b/{name}").int()).abs()
             for name in part]
    assert max(int(difference.max()) for difference in close) <= 1
    settings = json.loads(pathlib.Path("out/a/distilled.json").read_text())["settings"]
    centres = files.load_tensors("out/digits/modes-4-seed0.safetensors")
    assert settings["modes"] == [4, 0.1, files.fingerprint({"modes": centres["modes"]})]


def test_a_checkpoint_of_some_classes_aims_at_their_modes(tuned, monkeypatch):
    minimax.main(["--classes", "5-9", "--out", "out/part"])
    seen = []
    guided = sample.mode_guided
    monkeypatch.setattr(sample, "mode_guided", lambda *args: seen.append(args[2]) or guided(*args))
    sample.main(["--checkpoint", "out/part/minimax-5-9.safetensors", "--steps", "2", "--ipc", "1", "--modes",
                 "--out", "out/drawn"])
    all_modes = files.load_tensors("out/digits/modes-1-seed0.safetensors")["modes"]
    assert torch.equal(torch.cat(seen), all_modes[5:, 0])


def test_modes_are_made_again_for_other_images_and_where_the_file_is_damaged(tuned):
    data, path = datasets.load(), pathlib.Path("out/digits/modes-2-seed0.safetensors")
    run = sample.cli.Run("", torch.device("cpu"), 0, False, None, False, False, "ema")
    found = modes.modes_of(data, run, 2)
    path.unlink()                                               # `found` may still be read from it
    path.write_bytes(b"half a file")
    assert torch.equal(modes.modes_of(data, run, 2), found)
    other = modes.modes_of(data._replace(train=data.test), run, 2)
    assert not torch.equal(other, found)


def test_a_strong_pull_draws_the_modes_themselves(tuned):
    """With sigma near 1 a weight of alpha / sigma^2 replaces the guess by the mode, here at the only step."""
    sampler = sample.sampler_of("ddim", 2, "uniform")
    alpha = math.sqrt(SCHEDULE.abar_at(sampler.times[0]))
    weight = alpha / (1 - alpha**2)
    x, m = torch.randn(2, 1, 4, 4, dtype=torch.float64), CENTRES[:2]
    eps_hat, _ = sample.mode_guided(mixture, sampler, m, weight)(x, sampler.times[0])
    assert torch.allclose((x - math.sqrt(1 - alpha**2) * eps_hat) / alpha, m)


def test_bad_modes_are_refused(tuned, sentence):
    assert "more than a class has" in sentence(sample.main, "--modes", "2000")
    assert "--modes N" in sentence(sample.main, "--modes", "--seconds", "5")
    assert "--mode-weight must be" in sentence(sample.main, "--modes", "--mode-weight", "-1")
    assert "without --modes" in sentence(sample.main, "--mode-weight", "0.2")
    assert "one step has none" in sentence(sample.main, "--modes", "--steps", "1")
    assert "--modes must be at least 1" in sentence(sample.main, "--modes", "0")
    sample.main(["--steps", "3", "--ipc", "1"])
    assert "modes" in sentence(sample.main, "--steps", "3", "--ipc", "1", "--modes")     # other settings
    assert "modes" not in json.loads(pathlib.Path("out/digits/distilled.json").read_text())["settings"]
