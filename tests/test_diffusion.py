"""The forward process, the network, the loss and the training loop, each against an independent answer."""
import itertools
import json
import math
import os

import pytest
import safetensors.torch
import torch

import diffusion
from diffusion import DiT, Schedule, denoising_loss
from nanodd import files, processes
from nanodd.data import datasets
from nanodd.errors import UserError
from nanodd.networks import checkpoint, ddpm, models, training


def test_the_schedule_has_the_published_values():
    abar = Schedule().abar
    for t, value in ((0, .9999), (100, .8951), (250, .5214), (500, .0778), (750, .0033)):
        assert abar[t] == pytest.approx(value, abs=6e-5)
    assert abar[999] == pytest.approx(4.036e-5, rel=1e-3)


def test_q_sample_keeps_unit_variance_at_every_t():
    schedule = Schedule()
    assert torch.allclose(schedule.signal**2 + schedule.noise**2, torch.ones(1000), atol=1e-6)
    x0, eps = torch.randn(1000, 1, 32, 32), torch.randn(1000, 1, 32, 32)
    xt = schedule.q_sample(x0, torch.arange(1000), eps)
    assert (xt.var(dim=(1, 2, 3)) - 1).abs().max() < 0.25         # 1,024 numbers each: a deviation of 0.044
    assert xt.var() == pytest.approx(1, abs=0.01)


def test_x0_from_eps_inverts_q_sample():
    schedule, t = Schedule(), torch.arange(0, 1000, 37)
    x0, eps = torch.randn(len(t), 3, 4, 4), torch.randn(len(t), 3, 4, 4)
    xt = schedule.q_sample(x0, t, eps)
    assert torch.allclose(schedule.x0_from_eps(xt, t, eps), x0, atol=2e-4)  # 1 / signal is 157 at t = 999


def test_the_largest_dit_has_the_published_tensors():
    with torch.device("meta"):
        plain = DiT("XL", size=32, patch=2, channels=4, classes=1000, learned_variance=True)
        tuned = DiT("XL", size=32, patch=2, channels=4, classes=1000, learned_variance=True, difffit=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    assert sum(map(math.prod, shapes.values())) == 675_129_632 and len(shapes) == 292
    for name, shape in (("pos_embed", (1, 256, 1152)), ("x_embedder.proj.weight", (1152, 4, 2, 2)),
                        ("t_embedder.mlp.0.weight", (1152, 256)), ("t_embedder.mlp.2.bias", (1152,)),
                        ("y_embedder.embedding_table.weight", (1001, 1152)),
                        ("blocks.27.attn.qkv.weight", (3456, 1152)), ("blocks.0.attn.proj.bias", (1152,)),
                        ("blocks.0.mlp.fc1.weight", (4608, 1152)), ("blocks.0.mlp.fc2.weight", (1152, 4608)),
                        ("blocks.0.adaLN_modulation.1.weight", (6912, 1152)),
                        ("final_layer.linear.weight", (32, 1152)),
                        ("final_layer.adaLN_modulation.1.bias", (2304,))):
        assert shapes[name] == shape
    extra = {name: tensor for name, tensor in tuned.state_dict().items() if name not in shapes}
    assert sorted(extra) == sorted(f"blocks.{i}.{name}" for i in range(14)
                                   for name in ("gamma1", "gamma2", "attn.gamma1", "attn.gamma2"))
    assert sum(tensor.numel() for tensor in tuned.state_dict().values()) == 675_226_400
    names = models.difffit_parameters(tuned)
    assert sum(dict(tuned.named_parameters())[name].numel() for name in names) == 1_739_552


@pytest.mark.parametrize("network, count", [("S", 32_963_360), ("B", 130_512_416), ("L", 458_102_816)])
def test_the_other_sizes_have_the_published_counts(network, count):
    with torch.device("meta"):
        dit = DiT(network, size=32, patch=2, channels=4, classes=1000, learned_variance=True)
    assert sum(p.numel() for p in dit.parameters()) == count


CONFIG = {"network": "mini", "size": 8, "patch": 2, "channels": 1, "classes": 10}


def small(**more):
    return DiT(**CONFIG, **more)


def shaken(model):
    """Fills the zero-initialised layers, so that outputs depend on everything."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1)
    return model


def test_positions_are_sines_then_cosines_with_the_column_first():
    table = diffusion.position_table(4, 16)[0]                    # (16, 16)
    row, column = 2, 3
    token = table[row * 4 + column]
    for half, place in ((token[:8], column), (token[8:], row)):
        angles = [place * 10000 ** (-i / 4) for i in range(4)]
        wanted = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        assert torch.allclose(half, wanted)


def test_a_new_network_predicts_zero_and_its_blocks_are_the_identity():
    model, x = small(), torch.randn(2, 1, 8, 8)
    assert not model(x, torch.tensor([5., 900.]), torch.tensor([0, 10])).any()
    tokens, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(model.blocks[0](tokens, c), tokens)


def test_patches_come_back_to_their_place():
    model = shaken(small())
    x, t, y = torch.randn(1, 1, 8, 8), torch.tensor([10.]), torch.tensor([0])
    seen = []
    model.final_layer.register_forward_hook(lambda *hook: seen.append(hook[2]))
    out = model(x, t, y)
    tokens = seen[0][0]                                           # (16, 4): token h * 4 + w, pixel p * 2 + q
    for i in range(8):
        for j in range(8):
            assert out[0, 0, i, j] == tokens[i // 2 * 4 + j // 2, i % 2 * 2 + j % 2]


def test_gammas_start_at_one_and_change_nothing():
    plain = shaken(small())
    tuned = checkpoint.rebuild(CONFIG | {"difffit": True}, plain.state_dict(), "here")
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([1., 500., 999.]), torch.tensor([0, 4, 10])
    assert torch.allclose(plain(x, t, y), tuned(x, t, y), atol=1e-6)
    with torch.no_grad():
        tuned.blocks[0].attn.gamma1.mul_(2)
    assert not torch.allclose(plain(x, t, y), tuned(x, t, y), atol=1e-3)


def test_learned_variance_doubles_the_channels():
    out = small(learned_variance=True)(torch.randn(2, 1, 8, 8), torch.zeros(2), torch.zeros(2).long())
    assert out.shape == (2, 2, 8, 8)


def test_the_kl_is_torchs():
    normals = [torch.distributions.Normal(torch.randn(50), torch.rand(50) + 0.1) for _ in range(2)]
    parts = [value for normal in normals for value in (normal.mean, 2 * normal.stddev.log())]
    wanted = torch.distributions.kl_divergence(*normals)
    assert torch.allclose(ddpm.gaussian_kl(*parts), wanted, rtol=1e-4, atol=1e-5)


def test_the_bins_hold_all_of_the_mass():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, deviation in ((0.1, 0.05), (-0.98, 0.3), (3., 1.)):
        log_variance = torch.tensor(2 * math.log(deviation))
        mass = torch.exp(-ddpm.discretised_nll(levels, torch.tensor(mean), log_variance))
        assert mass.sum() == pytest.approx(1, abs=1e-6)
        exact = torch.distributions.Normal(mean, deviation).cdf
        inside = exact(levels[100] + 1 / 255) - exact(levels[100] - 1 / 255)
        assert mass[100] == pytest.approx(float(inside), abs=2e-5)


def test_the_cdf_is_adms_and_dits_approximation():
    """The published weights were trained with it; it is near the exact one, and is not the exact one."""
    x = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    theirs = [0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.tolist()]
    assert torch.allclose(ddpm.normal_cdf(x), torch.tensor(theirs, dtype=torch.float64), atol=1e-12)
    gap = (ddpm.normal_cdf(x) - torch.special.ndtr(x)).abs().max()
    assert 1e-4 < gap < 3e-4


def test_the_variational_bound_against_the_posteriors_definition():
    """By Bayes q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised, here on a grid."""
    schedule, t = Schedule(), torch.tensor([400])
    abar, previous = schedule.abar[400].item(), schedule.abar[399].item()
    alpha = abar / previous
    x0, xt, eps_hat, logit = 0.3, -0.2, 0.5, 0.4
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    normal = lambda mean, variance: torch.distributions.Normal(mean, math.sqrt(variance))

    def moments(clean):
        """Mean and variance of x_{t-1}, given xt and the clean image."""
        step = normal(math.sqrt(alpha) * grid, 1 - alpha).log_prob(torch.tensor(xt, dtype=torch.float64))
        weights = (normal(math.sqrt(previous) * clean, 1 - previous).log_prob(grid) + step).softmax(0)
        mean = float((weights * grid).sum())
        return mean, float((weights * (grid - mean) ** 2).sum())
    q_mean, smallest = moments(x0)
    p_mean, _ = moments((xt - math.sqrt(1 - abar) * eps_hat) / math.sqrt(abar))
    variance = math.exp((logit + 1) / 2 * math.log(1 - alpha) + (1 - logit) / 2 * math.log(smallest))
    wanted = torch.distributions.kl_divergence(normal(q_mean, smallest), normal(p_mean, variance))
    shaped = lambda value: torch.full((1, 1, 1, 1), value)
    bound = ddpm.variational_bound(schedule, shaped(x0), shaped(xt), t, shaped(eps_hat), shaped(logit))
    assert bound.item() == pytest.approx(wanted.item() / math.log(2), rel=2e-3)


def test_only_the_variance_feels_the_bound():
    schedule, x0, eps = Schedule(), torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    t, out = torch.tensor([0, 1, 500, 999]), torch.randn(4, 2, 8, 8, requires_grad=True)
    learned = denoising_loss(lambda xt, t, y: out, schedule, x0, None, t, eps).loss
    plain = denoising_loss(lambda xt, t, y: out[:, :1], schedule, x0, None, t, eps).loss
    assert learned.isfinite().all() and not torch.equal(learned, plain)
    bound = torch.autograd.grad((learned - plain).sum(), out, retain_graph=True)[0]
    assert not bound[:, :1].any() and bound[:, 1:].any()
    xt = schedule.q_sample(x0, t, eps)                            # the truth, with the posterior's variance
    none = ddpm.variational_bound(schedule, x0, xt, t, eps, -torch.ones_like(x0))
    assert none[1:].abs().max() < 1e-4 and none[0] > 0


def test_blocks_may_be_worked_out_again():
    model, x, y = shaken(small()), torch.randn(3, 1, 8, 8), torch.arange(3)
    t, grads = torch.tensor([1., 500., 999.]), []
    for model.recompute in (False, True):
        model.zero_grad()
        model(x, t, y).square().sum().backward()
        parameters = model.named_parameters()
        grads.append(files.fingerprint({name: p.grad for name, p in parameters if p.requires_grad}))
    assert grads[0] == grads[1]


@torch.no_grad()
def test_in_bfloat16_neighbouring_times_still_differ():
    model, x, y = shaken(small()), torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    waves = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, inputs: waves.append(inputs[0].float()))
    exact = model(x, torch.tensor([998., 999.]), y)
    short = model.bfloat16()(x, torch.tensor([998., 999.]), y)
    assert short.dtype == torch.bfloat16 and (short - exact).abs().max() < 0.05 * exact.abs().max()
    assert (waves[1] - waves[0]).abs().max() < 0.01 and (waves[1][0] - waves[1][1]).abs().max() > 0.5


def test_autocast_keeps_what_is_trained_in_float32():
    train, rows = datasets.load("digits").train, torch.arange(11)
    losses = {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = shaken(small(difffit=True))
        names = set(models.difffit_parameters(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        plan = training.Plan(steps=3, batch=32, lr=1e-3, decay=False, ema=.9, seed=0, flip=False, bf16=bf16)
        one = training.Trainer(model, plan)
        losses[bf16] = [float(report["loss"]) for report in diffusion.train(one, train, rows, Schedule())]
        assert all(p.dtype == torch.float32 for p in one.trainable.values())
        assert (model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16) == bf16
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def test_a_constant_average_keeps_its_share_of_the_start():
    train, rows = datasets.load("digits").train, torch.arange(11)
    one = training.Trainer(small(), training.Plan(steps=9, batch=4, lr=1e-2, decay=False, ema=.9, seed=0,
                                                  flip=False, beta2=.999, warm=False))
    name, path = "y_embedder.embedding_table.weight", []
    start = one.trainable[name].detach().clone()
    for _ in diffusion.train(one, train, rows, Schedule()):
        path.append(one.trainable[name].detach().clone())
    wanted = 0.9**9 * start + sum(0.1 * 0.9**(8 - k) * weights for k, weights in enumerate(path))
    assert len(path) == 9 and torch.allclose(one.ema[name], wanted, atol=1e-6)


def test_a_batch_must_divide_over_the_processes(monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: 3)
    with pytest.raises(UserError, match="a batch of 8 does not divide over 3 processes"):
        training.Trainer(small(), training.Plan(steps=1, batch=8, lr=1e-3, decay=False, ema=.9,
                                                seed=0, flip=False))


def test_the_loss_of_a_perfect_guess_is_zero_and_hands_back_x0():
    schedule, x0, eps = Schedule(), torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    t = torch.tensor([0, 100, 500, 900])
    perfect = denoising_loss(lambda xt, t, y: eps, schedule, x0, None, t, eps)
    assert not perfect.loss.any() and torch.allclose(perfect.x0_hat, x0, atol=1e-4)
    zero = denoising_loss(lambda xt, t, y: torch.zeros_like(xt), schedule, x0, None, t, eps)
    assert torch.allclose(zero.loss, eps.pow(2).flatten(1).mean(1))


def test_one_label_in_ten_is_dropped_and_every_image_is_seen_once_an_epoch():
    train, rows, dropped, seen = datasets.load("digits").train, torch.arange(11), 0, []
    plan = training.Plan(steps=100, batch=50, lr=0., decay=False, ema=0., seed=0, flip=False)
    for step in range(100):
        x0, y, t, eps = diffusion.training_batch(train, plan, step, rows, Schedule())
        labels = train.labels[training.batch_index(len(train.labels), 50, step, 0)]
        assert ((y == labels) | (y == 10)).all() and t.min() >= 0 and t.max() <= 999
        dropped += int((y == 10).sum())
        seen.append(training.batch_index(1257, 50, step, 0))
    assert 400 < dropped < 600                                    # 5,000 labels: a deviation of 21
    stream = torch.cat(seen)
    assert sorted(stream[:1257].tolist()) == list(range(1257)) == sorted(stream[1257:2514].tolist())


def test_a_step_is_a_function_of_its_number():
    train, rows = datasets.load("digits").train, torch.arange(11)
    plan = training.Plan(steps=20, batch=8, lr=0., decay=False, ema=0., seed=3, flip=True)
    one, two = (diffusion.training_batch(train, plan, 17, rows, Schedule()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    other = diffusion.training_batch(train, plan, 18, rows, Schedule())
    assert not torch.equal(one[3], other[3])


def test_the_average_warms_up():
    assert training.ema_decay(0, .999) == pytest.approx(.1) and training.ema_decay(10**6, .999) == .999
    average, weights = {"w": torch.tensor([0.])}, {"w": torch.tensor([1.])}
    training.ema_update(average, weights, .75)
    assert average["w"].item() == .25


def test_the_rate_warms_up_and_falls_to_zero():
    plan = training.Plan(steps=100, batch=1, lr=2., decay=True, ema=.9, seed=0, flip=False)
    rates = [plan.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(.4) and max(rates) == 2. and rates[99] < .01
    assert plan._replace(decay=False).lr_at(99) == 2.


def test_training_lowers_the_loss(capsys):
    diffusion.main(["--steps", "150"])
    log = [json.loads(line) for line in open("out/digits/base.log.jsonl")]
    assert log[-1]["loss"] < 0.6 * log[0]["loss"] and log[-1]["step"] == 150
    assert "-> python minimax.py" in capsys.readouterr().out


def test_a_checkpoint_rebuilds_the_network(tmp_path):
    diffusion.main(["--steps", "2"])
    model, header = models.load_model("out/digits/base.safetensors")
    assert header["classes"] == [str(c) for c in range(10)] and header["rows"] == list(range(11))
    assert header["command"] == "python diffusion.py --steps 2" and header["step"] == 2
    assert header["fingerprint"] == files.fingerprint(model.state_dict())
    assert not model.training


def test_the_same_settings_are_left_alone_and_others_refused(capsys, sentence):
    diffusion.main(["--steps", "2"])
    before = open("out/digits/base.safetensors", "rb").read()
    diffusion.main(["--steps", "2"])
    assert "left as it is" in capsys.readouterr().out
    said = sentence(diffusion.main, "--steps", "3")
    assert "steps 2 there, 3 here" in said and "--out ELSEWHERE" in said and "--overwrite" in said
    assert open("out/digits/base.safetensors", "rb").read() == before
    diffusion.main(["--steps", "3", "--overwrite"])
    assert files.read_header("out/digits/base.safetensors")["step"] == 3


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch, sentence):
    real = diffusion.denoising_loss
    monkeypatch.setattr(diffusion, "denoising_loss",
                        lambda *a: (lambda d: d._replace(loss=d.loss * math.nan))(real(*a)))
    assert "not finite between steps 0 and" in sentence(diffusion.main)
    assert not os.path.exists("out/digits/base.safetensors")


def test_a_full_disk_is_a_sentence(monkeypatch, sentence):
    def full(self, content):
        raise OSError(28, "No space left on device", str(self))
    with monkeypatch.context() as patch:                          # while the state for resuming is written
        patch.setattr("pathlib.Path.write_bytes", full)
        patch.setattr(files, "SAVE_EVERY", 0)
        assert "No space left on device" in sentence(diffusion.main, "--steps", "50")

    def full(*_, **__):
        raise safetensors.SafetensorError("I/O error: No space left on device")
    monkeypatch.setattr("safetensors.torch.save_file", full)      # and the checkpoint
    assert "No space left on device" in sentence(diffusion.main, "--steps", "2")
    assert not os.path.exists("out/digits/base.safetensors")


def test_other_files_are_no_checkpoints(tmp_path, sentence):
    (tmp_path / "out/digits").mkdir(parents=True)
    (tmp_path / "out/digits/base.safetensors").write_bytes(b"hello")
    assert "base.safetensors is damaged, or is not a nanoDD checkpoint (" in sentence(diffusion.main)
    assert "--steps must be at least 1" in sentence(diffusion.main, "--steps", 0)


def test_a_stopped_trainer_goes_on_to_the_same_bits():
    train, rows = datasets.load("digits").train, torch.arange(11)
    plan = training.Plan(steps=8, batch=8, lr=1e-3, decay=True, ema=.9, seed=0, flip=False)

    def new():
        torch.manual_seed(0)
        return training.Trainer(small(), plan)
    whole, first, second = new(), new(), new()
    run = lambda trainer, start=0: diffusion.train(trainer, train, rows, Schedule(), start)
    assert len(list(run(whole))) == 8
    assert len(list(itertools.islice(run(first), 4))) == 4        # the loop is left after its fourth step
    second.load_state_dict(first.state_dict())
    assert len(list(run(second, 4))) == 4
    assert files.fingerprint(whole.ema) == files.fingerprint(second.ema)
    assert files.fingerprint(whole.trainable) == files.fingerprint(second.trainable)
