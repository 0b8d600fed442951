"""The two criteria against double loops and hand-made vectors; their gradients; fine-tuning as a whole."""
import math
import pathlib

import pytest
import torch

import diffusion
import minimax
from diffusion import Denoised, DiT, Schedule
from minimax import MinMax
from nanodd import files
from nanodd.data import datasets
from nanodd.networks import models, training


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_both_criteria_agree_with_double_loops():
    z, memory = torch.randn(5, 12), torch.randn(7, 12)
    every = [cosine(a, b) for a in z for b in memory]
    batch = torch.randn(5, 12)
    beside = [cosine(a, b) for a in z for b in batch]
    assert minimax.representativeness(z, batch, memory) == pytest.approx(1 - min(every), abs=1e-5)
    assert minimax.diversity(z, batch, memory) == pytest.approx(max(every), abs=1e-5)
    assert minimax.naive_representativeness(z, batch, memory) == pytest.approx(1 - sum(beside) / 25, abs=1e-5)
    assert minimax.naive_diversity(z, batch, memory) == pytest.approx(sum(every) / 35, abs=1e-5)


def batch(vectors, labels, reals=None):
    """A Denoised whose guesses are the given plane vectors, and the real images beside them."""
    guesses = torch.tensor(vectors).view(-1, 1, 1, 2).requires_grad_()
    reals = torch.tensor(reals if reals is not None else vectors).view(-1, 1, 1, 2)
    return Denoised(torch.zeros(len(labels)), guesses, guesses * 0, guesses), reals, labels


def test_hand_computed_vectors():
    losses = MinMax(lambda_r=1., lambda_d=10.)
    total, terms = losses(*batch([[1., 0.], [0., 2.]], [4, 4], reals=[[1., 1.], [3., 0.]]))
    assert total == 0 and terms["repr"] == 0 and terms["div"] == 0  # nothing is remembered yet
    total, terms = losses(*batch([[0., -1.], [5., 0.]], [4, 4]))
    assert terms["repr"] == pytest.approx(1 + 1 / math.sqrt(2))    # (0, -1) against (1, 1)
    assert terms["div"] == pytest.approx(1)                        # (5, 0) against (1, 0)
    assert total.item() == pytest.approx(1 + 1 / math.sqrt(2) + 10)
    total, terms = losses(*batch([[0., -1.], [1., 0.]], [4, 7]))
    assert terms["repr"] == pytest.approx((1 + 1 / math.sqrt(2)) / 2)  # class 7 is new: it only counts


def test_losses_are_compared_before_they_are_remembered():
    losses = MinMax(1., 1., rules=("fifo", "fifo"), slots=3)
    for k in range(4):
        losses(*batch([[float(k), 1.]], [0], reals=[[1., float(k)]]))
    assert losses.generated.get(0).tolist() == [[1, 1], [2, 1], [3, 1]]
    assert losses.real.get(0).tolist() == [[1, 1], [1, 2], [1, 3]]


def test_gradients_reach_one_image_per_class_and_term_and_no_memory():
    losses = MinMax(1., 0.)
    for weights in ((1., 0.), (0., 1.)):
        losses.lambda_r, losses.lambda_d = weights
        labels = [0] * 6 + [1] * 6
        x0 = torch.randn(12, 1, 2, 2)
        losses(Denoised(None, x0, x0, torch.randn(12, 1, 2, 2)), x0, labels)
        guess = torch.randn(12, 1, 2, 2, requires_grad=True)
        total, _ = losses(Denoised(None, x0, x0, guess), x0, labels)
        total.backward()
        touched = guess.grad.flatten(1).any(dim=1)
        assert touched[:6].sum() == 1 and touched[6:].sum() == 1
        assert not losses.real.get(0).requires_grad and not losses.generated.get(0).requires_grad


def test_both_guesses_agree_on_noise_and_differ_on_clean_images():
    schedule, x0, eps = diffusion.Schedule(), torch.randn(1, 1, 16, 16), torch.randn(1, 1, 16, 16)
    for t, agreement in ((0, .709), (100, .813), (999, 1.)):
        t = torch.tensor([t])
        xt = schedule.q_sample(x0, t, eps)
        x0_hat = schedule.x0_from_eps(xt, t, eps)
        assert cosine(x0_hat.flatten(), (xt - eps).flatten()) == pytest.approx(agreement, abs=0.08)
    for t in (500, 700, 999):                                     # they differ by 1 / sqrt(abar)
        abar, t = schedule.abar[t].item(), torch.tensor([t])
        xt = schedule.q_sample(x0, t, eps)
        x0_hat, paper = schedule.x0_from_eps(xt, t, eps), xt - eps
        assert cosine(x0_hat.flatten(), paper.flatten()) > 0.98
        assert (x0_hat.norm() / paper.norm()).item() == pytest.approx(1 / math.sqrt(abar), rel=0.05)
    losses = MinMax(1., 1., z_hat="paper")
    losses(Denoised(None, xt, eps, x0_hat), x0, [0])
    assert torch.equal(losses.generated.get(0)[0], (xt - eps).flatten())


def test_naive_needs_no_real_memory():
    total, terms = MinMax(1., 1., criterion="naive")(*batch([[1., 0.]], [0], reals=[[0., 1.]]))
    assert terms["repr"] == pytest.approx(1) and terms["div"] == 0


def steps(losses, count):
    """(the trainer, its reports) after `count` steps from the same weights; losses None: L_diff alone."""
    torch.manual_seed(0)
    model = DiT("mini", size=8, patch=2, channels=1, classes=10)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    plan = training.Plan(steps=count, batch=16, lr=1e-3, decay=False, ema=.9, seed=0, flip=False)
    trainer = training.Trainer(model, plan)
    state = trainer, datasets.load("digits").train, torch.arange(11), Schedule()
    loop = diffusion.train(*state) if losses is None else minimax.tune(*state, losses)
    return trainer, list(loop)


def test_lambda_zero_is_plain_fine_tuning_bit_for_bit():
    (plain, _), (zero, _), (full, reports) = (steps(losses, 5) for losses in (None, MinMax(0., 0.),
                                                                              MinMax(.1, .1)))
    assert files.fingerprint(plain.trainable) == files.fingerprint(zero.trainable)
    assert files.fingerprint(zero.trainable) != files.fingerprint(full.trainable)
    assert 0 < reports[-1]["repr"] < 2 and -1 < reports[-1]["div"] < 1


def test_both_losses_do_what_they_say():
    """After the same steps, a large lambda_r raises the worst cosine, a large lambda_d lowers the best."""
    last = {}
    for name, weights in (("none", (0., 0.)), ("repr", (3., 0.)), ("div", (0., 3.))):
        reports = steps(MinMax(*weights), 60)[1][30:]
        last[name] = {key: sum(float(report[key]) for report in reports) / 30 for key in ("repr", "div")}
    assert last["repr"]["repr"] < last["none"]["repr"] and last["div"]["div"] < last["none"]["div"]


def test_fine_tuning_makes_the_base_first_and_keeps_only_what_it_tuned(capsys):
    minimax.main(["--memory", "adaptive"])
    said = capsys.readouterr().out
    assert "making it first" in said and "-> python sample.py --steps 10" in said
    model, header = models.load_model("out/digits/minimax.safetensors")
    base, _ = models.load_model("out/digits/base.safetensors")
    tuned = set(files.load_tensors("out/digits/minimax.safetensors"))
    assert tuned == set(models.difffit_parameters(model))
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]) == (name not in tuned)
    assert header["base"]["file"] == "base.safetensors"


def test_another_base_is_refused(sentence):
    import sample
    minimax.main([])
    minimax.main(["--out", "elsewhere"])                           # the base stays where it was
    diffusion.main(["--steps", "7", "--overwrite"])
    assert "another base model" in sentence(sample.main)
    pathlib.Path("out/digits/base.safetensors").unlink()
    assert "which is gone" in sentence(sample.main, "--checkpoint", "elsewhere/minimax.safetensors")


def test_what_makes_no_sense_is_refused(pictures, sentence):
    minimax.main(["--tune", "all"])
    assert "other settings (tune 'all' there, 'difffit' here" in sentence(minimax.main)
    assert "there is no gone.safetensors" in sentence(minimax.main, "--base", "gone.safetensors")
    assert "not be negative" in sentence(minimax.main, "--lambda-r", "-1")
    assert "at least 1" in sentence(minimax.main, "--slots", "0")
    assert "REAL,GENERATED" in sentence(minimax.main, "--memory", "lifo")
    assert "of the data set digits" in sentence(minimax.main, "--data", pictures,
                                                "--base", "out/digits/base.safetensors")
    assert "fine-tuned already" in sentence(minimax.main, "--base", "out/digits/minimax.safetensors")


def test_a_killed_run_goes_on_to_the_same_bits(kill_and_resume):
    """Killed twice: while the base model is made, and while it is tuned."""
    tune = ["--steps", "60", "--slots", "8", "--memory", "adaptive", "--base"]
    diffusion.main(["--steps", "60", "--out", "whole"])
    minimax.main([*tune, "whole/base.safetensors", "--out", "whole"])
    for module, argv in (("diffusion", ["--steps", "60"]), ("minimax", [*tune, "cut/base.safetensors"])):
        name = "base" if module == "diffusion" else "minimax"
        resume = pathlib.Path(f"cut/{name}.resume.pt")
        said = kill_and_resume(module, [*argv, "--out", "cut"], resume)
        assert "resuming from step" in said and not resume.exists()
        whole, cut = (files.load_tensors(f"{out}/{name}.safetensors") for out in ("whole", "cut"))
        assert files.fingerprint(whole) == files.fingerprint(cut)
