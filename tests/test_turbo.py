"""One step: the losses by hand, where gradients go, a toy whose answer is known, and turbo.py as a whole."""
import dataclasses
import functools
import json
import math
import pathlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import convnet
import diffusion
import minimax
import sample
import tiny_turbo
import train_eval
import turbo
from conftest import drawn_files
from nanodd import cli, files
from nanodd.data import datasets, imageset
from nanodd.judging import features
from nanodd.networks import models, training

STUDENT = ["--checkpoint", "out/digits/turbo.safetensors"]


@pytest.fixture
def parts():
    """A student, its teacher and discriminators of both kinds, and a batch of eight images."""
    teacher = diffusion.DiT("mini", 8, 2, 1, 10).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():                  # adaLN-Zero's zeros would stop all gradients
            parameter.add_(.02 * torch.randn_like(parameter))
    student = diffusion.DiT("mini", 8, 2, 1, 10)
    student.load_state_dict(teacher.state_dict())
    teacher.requires_grad_(False)
    recipe, schedule = datasets.load("digits").recipe, diffusion.Schedule()
    judge = a_judge()
    x, y = torch.randn(8, 1, 8, 8).clamp(-1, 1), torch.arange(8)
    looks = {"judge": turbo.judge_features(judge, recipe), "base": turbo.noised_features(teacher, schedule)}
    discriminators = {name: turbo.Discriminator(tokens_of, functools.partial(turbo.augmented, recipe), x, 10)
                      for name, tokens_of in looks.items()}
    return SimpleNamespace(teacher=teacher, student=student, schedule=schedule, judge=judge, x=x, y=y,
                           discriminators=discriminators)


def a_judge(*_):
    """An untrained, narrow judge of the digits."""
    return convnet.ConvNet(16, 1, 10, width=8).eval().requires_grad_(False)


def generators(seed=0):
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------------
# The losses


def test_the_hinge_loss_is_2_where_d_cannot_tell_and_0_where_it_is_sure():
    same = [torch.zeros(4, 3), torch.zeros(4, 1)]
    assert turbo.hinge_loss(same, same) == 2
    sure = [torch.full((4, 3), 1.5), torch.ones(4, 1)]
    assert turbo.hinge_loss(sure, [-x for x in sure]) == 0
    assert turbo.hinge_loss([torch.tensor([[.5]])], [torch.tensor([[.25]])]) == .5 + 1.25
    assert turbo.mean_logit([torch.full((4, 9), 1.), torch.full((4, 1), 3.)]) == 2  # heads, not places


def test_the_gradient_penalty_of_a_linear_head_is_the_square_of_its_weights():
    weight, tokens = torch.tensor([3., 4.]), torch.randn(5, 7, 2, requires_grad=True)
    logits = tokens @ weight                                                # (5, 7); D is their mean
    assert turbo.gradient_penalty([logits], [tokens]).item() == pytest.approx(25 / 7)
    both = torch.cat([tokens, tokens]).detach().requires_grad_()            # D of the first half alone
    assert turbo.gradient_penalty([(both @ weight)[:5]], [both]).item() == pytest.approx(25 / 7)


def test_the_distillation_loss_is_that_of_equation_4(parts):
    t, eps = torch.tensor([3, 300, 650, 999] * 2), torch.randn(8, 1, 8, 8)
    loss = turbo.distillation_loss(parts.teacher, parts.schedule, parts.x, t, parts.y, eps)
    by_hand = 0
    for i in range(8):
        abar = parts.schedule.abar[t[i]].item()
        xt = math.sqrt(abar) * parts.x[i] + math.sqrt(1 - abar) * eps[i]
        eps_hat = parts.teacher(xt[None], t[i:i + 1].float(), parts.y[i:i + 1])[0]
        target = (xt - math.sqrt(1 - abar) * eps_hat) / math.sqrt(abar)
        by_hand += math.sqrt(abar) * (parts.x[i] - target).square().mean().item() / 8
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)


def test_the_teachers_target_moves_with_the_student(parts):
    """Noising the real image instead, a mistake that was made elsewhere, would leave the target in place."""
    t, eps, seen = torch.full((8,), 300), torch.randn(8, 1, 8, 8), []

    def teacher(x, t, y):
        seen.append(x)
        return parts.teacher(x, t, y)
    for x in (parts.x, parts.x + 1):
        turbo.distillation_loss(teacher, parts.schedule, x, t, parts.y, eps)
    assert torch.allclose(seen[1] - seen[0], torch.tensor(parts.schedule.signal[300].item()), atol=1e-6)


@pytest.mark.parametrize("kind", ["judge", "base"])
def test_a_gradient_reaches_the_student_from_both_terms_and_no_frozen_network(parts, kind):
    discriminator = parts.discriminators[kind]
    t, eps = torch.full((8,), 300), torch.randn(8, 1, 8, 8)
    for term in ("adversarial", "distillation"):
        parts.student.zero_grad()
        x_hat = turbo.x0_hat(parts.student, parts.schedule, eps, torch.full((8,), 500), parts.y)
        if term == "adversarial":
            tokens = discriminator.tokens(x_hat, parts.y, *generators())
            loss = -turbo.mean_logit(discriminator.logits(tokens, parts.y))
        else:
            loss = turbo.distillation_loss(parts.teacher, parts.schedule, x_hat, t, parts.y, eps)
        loss.backward()
        assert parts.student.blocks[0].mlp.fc1.weight.grad.norm() > 0
        assert all(p.grad is None for p in [*parts.teacher.parameters(), *parts.judge.parameters()])


@pytest.mark.parametrize("kind", ["judge", "base"])
def test_the_class_reaches_the_heads(parts, kind):
    """Heads that learned to tell two classes apart have a larger loss once the classes are shuffled."""
    discriminator = parts.discriminators[kind]
    left = torch.tensor([1., 1, 1, 1, -1, -1, -1, -1]).expand(8, 1, 8, 8)   # bright on the left
    y = torch.arange(8) % 2
    real = torch.where((y == 0).view(-1, 1, 1, 1), left, -left)
    discriminator.augment = lambda x, rng, cpu_rng: x

    def loss(y_real):
        """Of real images of the class they show, and generated ones of the other class."""
        x, rows = torch.cat([real, real.flip(0)]), torch.cat([y_real, y])
        logits = discriminator.logits(discriminator.tokens(x, rows, *generators()), rows)
        return turbo.hinge_loss([x[:8] for x in logits], [x[8:] for x in logits])
    for _ in range(150):
        discriminator.optimizer.zero_grad()
        loss(y).backward()
        discriminator.step(1)
    with torch.no_grad():
        assert loss(y) < 1.5 and loss(1 - y) > loss(y) + .5


def test_real_and_generated_images_are_augmented_alike(parts):
    discriminator, seen = parts.discriminators["judge"], []
    augment = discriminator.augment
    discriminator.augment = lambda x, *rngs: seen.append(augment(x, *rngs)) or seen[-1]
    twice = torch.cat([parts.x, parts.x])
    discriminator.tokens(twice, torch.cat([parts.y, parts.y]), *generators(3))
    changed = seen[0]
    assert changed.shape == twice.shape and not torch.equal(changed, twice)
    recipe = dataclasses.replace(datasets.load("digits").recipe, augment="crop_cutout_scale_rotate")
    for seed in range(10):                                      # all of these fill with black
        black = turbo.augmented(recipe, -torch.ones(8, 1, 8, 8), *generators(seed))
        assert torch.allclose(black, torch.tensor(-1.), atol=1e-6)


# ----------------------------------------------------------------------------------------------------
# The toy


class Mixture:
    """Two Gaussians of one number, at -1 (a share of 0.35) and 1, deviation 0.3: their exact eps_hat."""
    share, std = .35, .3

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x, t, y):
        signal, noise = self.schedule.at(t.long())
        variance = signal**2 * self.std**2 + noise**2
        log_share = torch.log(torch.tensor([self.share, 1 - self.share])).view(2, 1, 1, 1, 1)
        means = signal * torch.tensor([-1., 1.]).view(2, 1, 1, 1, 1)        # (2, B, 1, 1, 1)
        weight = (log_share - (x - means).square() / (2 * variance)).softmax(dim=0)
        return (weight * (x - means)).sum(dim=0) * noise / variance


class Toy(nn.Module):
    """A student of the exact eps_hat: that, and a small network of (x, t) that starts at zero."""

    def __init__(self, schedule):
        super().__init__()
        self.exact = Mixture(schedule)
        self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, t, y):
        inputs = torch.stack([x.flatten(), t / 999], dim=1)
        return self.exact(x, t, y) + self.net(inputs).view_as(x)


def test_with_an_exact_teacher_the_students_samples_have_both_modes_in_their_shares():
    """At lambda 0.5; at 2.5 nearly all samples end at the larger mode, to which the teacher points."""
    schedule, count = diffusion.Schedule(), 4000
    x0 = torch.where(torch.rand(count) < Mixture.share, -1., 1.) + Mixture.std * torch.randn(count)
    examples = SimpleNamespace(labels=torch.zeros(count, dtype=torch.long),
                               examples=lambda index, mirrored, rng: x0[index].view(-1, 1, 1, 1))

    def tokens_of(x, y, rng):
        """Waves of the number, noised as in turbo.noised_features: (B, 1, 36)."""
        t = schedule.draw_times(len(x), rng, x.device) * 3 // 4
        x = schedule.q_sample(x, t, torch.randn(x.shape, generator=rng))
        angles = x.flatten(1) * torch.linspace(.5, 4, 16)                   # (B, 16)
        level = schedule.at(t)[0].flatten(1).expand(-1, 4)
        return [torch.cat([angles.cos(), angles.sin(), level], dim=1).unsqueeze(1)]
    student, noise = Toy(schedule), torch.randn(4000, 1, 1, 1) * schedule.noise[727]
    plan = training.Plan(steps=300, batch=256, lr=1e-3, decay=True, ema=.98, seed=0, flip=False, beta1=0.)
    trainer = training.Trainer(student, plan)
    discriminator = turbo.Discriminator(tokens_of, lambda x, rng, cpu_rng: x, torch.zeros(1, 1, 1, 1), 1)

    @torch.no_grad()
    def samples():
        y, t = torch.zeros(4000, dtype=torch.long), torch.full((4000,), 727)
        return turbo.x0_hat(student, schedule, noise, t, y).flatten()
    assert samples().std() < .5                                 # the teacher's one step: near the mean, 0.3
    for _ in turbo.distil(trainer, discriminator, student.exact, examples, torch.tensor([0, -1]), schedule,
                          sample.timesteps(4, "trailing", start=727), .5):
        pass
    for name, average in trainer.ema.items():
        trainer.trainable[name].data.copy_(average)
    x = samples()
    assert (x < 0).float().mean().item() == pytest.approx(Mixture.share, abs=.1)
    assert x[x < 0].mean().item() == pytest.approx(-1, abs=.2)
    assert x[x > 0].mean().item() == pytest.approx(1, abs=.2)


# ----------------------------------------------------------------------------------------------------
# turbo.py and sample.py


@pytest.fixture
def quick(monkeypatch):
    """turbo.py on the tuned digits, without the time that a judge takes to train."""
    monkeypatch.setattr(features, "second_judge", a_judge)


@pytest.fixture
def student(tuned, quick):
    turbo.main(["--steps", "10"])
    return pathlib.Path("out/digits/turbo.safetensors")


def test_at_first_the_student_draws_what_its_teacher_would(tuned, quick, monkeypatch):
    monkeypatch.setitem(turbo.FIXED, "lr", 1e-12)
    turbo.main(["--steps", "3", "--t-star", "500"])
    network, header = models.load_model("out/digits/turbo.safetensors")
    base, _ = models.load_model("out/digits/base.safetensors")
    assert header["t_star"] == 500 and header["rows"] == [*range(10), -1]
    noise, y, schedule = torch.randn(5, 1, 8, 8), torch.arange(5), diffusion.Schedule()
    sampler = sample.sampler_of("turbo", 1, schedule=schedule, start=500)
    with torch.no_grad():
        x = sampler(lambda x, t: (network(x, torch.full((5,), float(t)), y), None), lambda k: noise)
        alpha, sigma = math.sqrt(schedule.abar[500]), math.sqrt(1 - schedule.abar[500])
        expected = (sigma * noise - sigma * base(sigma * noise, torch.full((5,), 500.), y)) / alpha
    assert torch.allclose(x, expected, atol=1e-4)


def test_training_prints_both_losses_ds_answers_and_a_sheet(student, capsys):
    lines = [json.loads(line) for line in open("out/digits/turbo.log.jsonl")]
    assert len(lines) == 10
    assert {"adv", "dist", "D", "real", "generated"} <= set(lines[0])
    assert lines[0]["D"] == pytest.approx(2, abs=.5)
    sheet = imageset.open_image("out/digits/turbo.png")
    assert sheet.shape == (3, 10 * 42 + 2, 10 * 42 + 2)
    turbo.main(["--steps", "10"])
    assert "finished" in capsys.readouterr().out


def test_a_killed_run_resumes_to_the_same_bits(tuned, kill_and_resume, capsys):
    said = kill_and_resume("turbo", ["--steps", "30", "--features", "base"], "out/digits/turbo.resume.pt")
    assert "resuming from step" in said
    turbo.main(["--steps", "30", "--features", "base", "--out", "out/whole", "--checkpoint",
                "out/digits/base.safetensors"])
    one, two = (files.load_tensors(f"out/{name}/turbo.safetensors") for name in ("digits", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("flags, losses", [
    (["--lambda", "0"], {"adv", "D", "real", "generated"}), (["--no-adversarial"], {"dist"}),
    (["--features", "base", "--checkpoint", "out/digits/minimax.safetensors"],
     {"adv", "D", "real", "generated", "dist"})])
def test_each_loss_can_be_left_out_and_a_tuned_model_distilled(tuned, quick, flags, losses):
    turbo.main(["--steps", "10", *flags])
    line = json.loads(open("out/digits/turbo.log.jsonl").readline())
    assert set(line) - {"step", "seconds"} == losses


def test_latents_and_a_network_with_learned_variance_are_distilled_too(imagenet, sentence):
    data = ["--data", "imagewoof", "--root", str(imagenet.root), "--vae", str(imagenet.vae)]
    diffusion.main(["--weights", str(imagenet.weights)])
    assert "this recipe draws latents" in sentence(turbo.main, *data, "--features", "judge")
    turbo.main([*data, "--steps", "2"])
    header = files.read_header("out/imagewoof/turbo.safetensors")
    assert header["settings"]["features"] == "base" and header["config"]["learned_variance"]
    assert len(header["rows"]) == 11 and max(header["rows"]) > 10           # rows of ImageNet's 1,000
    sample.main(["--data", "imagewoof", "--vae", str(imagenet.vae), "--ipc", "1", "--checkpoint",
                 "out/imagewoof/turbo.safetensors"])
    assert len(drawn_files("out/imagewoof")) == 10


def test_a_u_vit_is_distilled_too(tuned, quick, capsys):
    diffusion.main(["--network", "uvit", "--steps", "10"])
    turbo.main(["--steps", "10", "--checkpoint", "out/digits/uvit/base.safetensors", "--features", "base",
                "--out", "out/uvit"])
    sample.main(["--checkpoint", "out/uvit/turbo.safetensors", "--ipc", "1", "--out", "out/uvit"])
    assert "turbo, 1 steps" in capsys.readouterr().out and len(drawn_files("out/uvit")) == 10


def test_one_step_is_the_default_and_four_are_the_most(student, capsys, sentence):
    sample.main([*STUDENT, "--ipc", "2"])
    assert "20 network evaluations (1 for each of 20)" in capsys.readouterr().out
    one = drawn_files()
    for steps in (2, 4):
        sample.main([*STUDENT, "--ipc", "2", "--steps", str(steps), "--out", f"out/{steps}"])
        many = drawn_files(f"out/{steps}")
        assert many.keys() == one.keys() and many != one
    assert "takes --steps 1 to 4, not 5" in sentence(sample.main, *STUDENT, "--steps", "5")
    auto = ["--steps", "auto", "--seconds", "1"]
    assert "takes --steps 1 to 4, not auto" in sentence(sample.main, *STUDENT, *auto)
    for flags in (["--sampler", "ddim"], ["--grid", "uniform"], ["--eta", "1"],
                  ["--modes", "2", "--steps", "2"]):
        assert f"{flags[0]} has nothing to do here" in sentence(sample.main, *STUDENT, *flags)
    assert "trained without guidance" in sentence(sample.main, *STUDENT, "--guidance", "2")
    assert "is that of one-step models" in sentence(sample.main, "--sampler", "turbo")
    assert "nothing to limit" in sentence(sample.main, *STUDENT, "--guidance-interval", "0", "500")


def test_the_students_times_are_spread_evenly_below_its_start():
    assert [sample.timesteps(n, "trailing", start=727) for n in (1, 2, 4)] == [[727], [727, 363],
                                                                               [727, 545, 363, 181]]


def test_what_turbo_refuses(tuned, quick, sentence, monkeypatch):
    for flags, reason in ((["--steps", "0"], "--steps must be at least 1"),
                          (["--lambda", "-1"], "--lambda must be a number"),
                          (["--lambda", "0", "--no-adversarial"], "leave no loss"),
                          (["--t-star", "1000"], "--t-star must be between 3 and 999"),
                          (["--checkpoint", "nowhere.safetensors"], "there is no nowhere.safetensors")):
        assert reason in sentence(turbo.main, *flags)
    minimax.main(["--classes", "0-4"])
    assert "some of the classes" in sentence(turbo.main, "--checkpoint", "out/digits/minimax-0-4.safetensors")
    assert "--features belongs to" in sentence(turbo.main, "--features", "base", "--no-adversarial")
    turbo.main(["--steps", "2"])
    student = "out/digits/turbo.safetensors"
    assert "was distilled to one step" in sentence(turbo.main, "--checkpoint", student, "--out", "out/two")
    assert "was distilled to one step" in sentence(minimax.main, "--base", student, "--out", "out/two")
    assert "lambda 2.5 there" in sentence(turbo.main, "--steps", "2", "--lambda", "1")
    monkeypatch.setitem(turbo.FIXED, "r1", 0)                   # the numbers without a flag are settings, too
    assert "r1 1e-05 there" in sentence(turbo.main, "--steps", "2")


def test_a_dry_run_trains_nothing(capsys):
    turbo.main(["--dry-run"])
    assert "would distil the base model" in capsys.readouterr().out and not pathlib.Path("out").exists()


def test_the_discriminators_judge_is_no_judge_that_measures(monkeypatch):
    """Its seed is another one than those of all rows, and of the judge of features and metrics."""
    data, seen = datasets.load(), []

    def train_judges(trains, test, recipe, epochs, seeds, **how):
        seen.extend(seeds)
        return [(convnet.judge(recipe.net, recipe.judge_size, recipe.colours, 10), [0.])]
    for seed in (0, 3):
        run = cli.Run("", torch.device("cpu"), seed, False, False, False, False, "ema")
        judge = features.second_judge(data, run, train_judges, train_eval.count_epochs, convnet.judge)
        again = features.second_judge(data, run, None, None, convnet.judge)
        assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), again.parameters(), strict=True))
        assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert seen == [500, 3500] and len(list(pathlib.Path("out/digits").glob("second_judge-*"))) == 2


# ----------------------------------------------------------------------------------------------------
# SDXL-Turbo on sample.py's command line


@pytest.fixture
def sdxl(tmp_path, monkeypatch):
    return ["--checkpoint", "sdxl-turbo", "--weights", str(tiny_turbo.write(tmp_path / "sdxl", monkeypatch))]


def test_sdxl_turbo_draws_a_set_like_any_other_generator(sdxl, pictures, capsys):
    data = ["--data", str(pictures)]
    sample.main([*data, *sdxl, "--ipc", "3", "--prompt", "a photo of a {}", "--batch", "4"])
    said = capsys.readouterr().out
    assert "SDXL-Turbo" in said and "turbo, 1 steps" in said and "(1 for each of 6)" in said
    record = json.loads(pathlib.Path("out/pictures/distilled.json").read_text())
    assert record["settings"]["prompts"] == ["a photo of a ant", "a photo of a bee"]
    assert imageset.open_image("out/pictures/distilled/ant/00000.png").shape == (3, 8, 8)
    sample.main([*data, *sdxl, "--ipc", "2", "--prompt", "a photo of a {}", "--batch", "4", "--out",
                 "out/two"])
    assert drawn_files("out/two").items() <= drawn_files("out/pictures").items()
    sample.main([*data, *sdxl, "--ipc", "2", "--steps", "4", "--out", "out/four"])
    assert len(drawn_files("out/four")) == 4
    train_eval.main([*data, "out/pictures/distilled", "--pda", "2", "--runs", "1", "--epochs", "1"])


def test_what_sdxl_turbo_refuses(sdxl, pictures, sentence, tmp_path, monkeypatch):
    data = ["--data", str(pictures)]
    with monkeypatch.context() as patch:                        # flags are refused before 6.9 GB are fetched
        patch.setattr(files, "download", None)
        assert "takes --steps 1 to 4" in sentence(sample.main, *data, *sdxl[:2], "--steps", "8")
        assert "only 1" in sentence(sample.main, *data, *sdxl[:2], "--guidance", "3")
    for flags, reason in ((["--steps", "8"], "--steps 1 to 4, not 8"), (["--guidance", "3"], "only 1"),
                          (["--modes", "2"], "--modes has nothing to do"),
                          (["--guidance-interval", "0", "500"], "nothing to limit"),
                          (["--prompt", "a photo"], "has no {}")):
        assert reason in sentence(sample.main, *data, *sdxl, *flags)
    (tmp_path / "sdxl/tokenizer/merges.txt").write_text("#")
    assert "has 1 bytes instead of 14" in sentence(sample.main, *data, *sdxl)
    assert "there is no folder" in sentence(sample.main, *data, *sdxl[:3], "nowhere")
    assert "belong to --checkpoint sdxl-turbo" in sentence(sample.main, *data, "--prompt", "a {}")
    (pictures / "n99999999").mkdir()
    (pictures / "n99999999" / "0.png").write_bytes((pictures / "ant" / "0.png").read_bytes())
