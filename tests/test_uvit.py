"""U-ViT against the published shapes; its schedule against the SDE; either backbone through every stage."""
import json
import math
import pathlib

import pytest
import torch
import torch.nn.functional as F

import diffusion
import minimax
import sample
import train_eval
from diffusion import DiT, denoising_loss
from nanodd import files, recipes
from nanodd.data import archives, datasets
from nanodd.errors import UserError
from nanodd.networks import checkpoint, models, training, uvit
from nanodd.sampling import solvers


def learn_uvit(argv):
    """python diffusion.py --network uvit ..."""
    diffusion.main(["--network", "uvit", *argv])


SMALL = {"network": "S", "size": 32, "patch": 2, "channels": 3}     # U-ViT-S/2, CIFAR-10
MID = {"network": "M", "size": 64, "patch": 4, "channels": 3}       # U-ViT-M/4, ImageNet at 64 pixels


@pytest.mark.parametrize("config, tensors, parameters", [
    ({**SMALL, "classes": 0}, 164, 44_255_328),
    ({**SMALL, "classes": 100, "null": False}, 165, 44_307_040),
    ({**SMALL, "classes": 100}, 165, 44_307_552),
    ({**MID, "classes": 1000, "null": False}, 213, 130_940_292),
    ({**MID, "classes": 200, "null": False}, 213, 130_325_892),
    ({**MID, "network": "L", "classes": 1000, "null": False}, 261, 286_827_652)])
def test_sizes_are_the_published_ones(config, tensors, parameters):
    with torch.device("meta"):
        model = uvit.UViT(**config)
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_names_are_the_published_ones():
    with torch.device("meta"):
        model = uvit.UViT(**MID, classes=1000, null=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    D = 768
    block = {"norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
             "attn.qkv.weight": (3 * D, D), "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
             "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,), "mlp.fc2.weight": (D, 4 * D),
             "mlp.fc2.bias": (D,)}
    skip = {"skip_linear.weight": (D, 2 * D), "skip_linear.bias": (D,)}
    wanted = {"pos_embed": (1, 258, D),
              "patch_embed.proj.weight": (D, 3, 4, 4), "patch_embed.proj.bias": (D,),
              "label_emb.weight": (1000, D), "norm.weight": (D,), "norm.bias": (D,),
              "decoder_pred.weight": (48, D), "decoder_pred.bias": (48,),
              "final_layer.weight": (3, 3, 3, 3), "final_layer.bias": (3,)}
    wanted |= {f"mid_block.{name}": shape for name, shape in block.items()}
    for i in range(8):
        wanted |= {f"in_blocks.{i}.{name}": shape for name, shape in block.items()}
        wanted |= {f"out_blocks.{i}.{name}": shape for name, shape in (block | skip).items()}
    assert shapes == wanted


def spelled_out(model, x, t, y):
    """U-ViT's forward pass with plain loops and reshapes: tokens in order, skips by their number."""
    state = dict(model.named_parameters())
    D, p = state["pos_embed"].shape[2], model.patch
    h, heads = x.shape[2] // p, model.mid_block.attn.heads

    def linear(name, v):
        return v @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def norm(name, v):
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return v * state[f"{name}.weight"] + state[f"{name}.bias"]

    def block(name, v):
        q, k, value = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", v)).split(D, dim=2)
        found = []
        for part in range(heads):
            mine = slice(part * D // heads, (part + 1) * D // heads)
            weight = (q[..., mine] @ k[..., mine].mT / math.sqrt(D // heads)).softmax(-1)
            found.append(weight @ value[..., mine])
        v = v + linear(f"{name}.attn.proj", torch.cat(found, dim=2))
        inner = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", v))
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        return v + linear(f"{name}.mlp.fc2", inner)
    patches = []
    for row in range(h):
        for column in range(h):
            piece = x[:, :, row * p:(row + 1) * p, column * p:(column + 1) * p].flatten(1)
            patches.append(piece @ state["patch_embed.proj.weight"].flatten(1).T
                           + state["patch_embed.proj.bias"])
    half = D // 2
    angle = t[:, None] * torch.tensor([math.exp(-math.log(10000) * i / half) for i in range(half)])
    v = torch.stack([state["label_emb.weight"][y], torch.cat([angle.cos(), angle.sin()], 1), *patches], dim=1)
    v, kept, n = v + state["pos_embed"], [], len(model.in_blocks)
    for i in range(n):
        v = block(f"in_blocks.{i}", v)
        kept.append(v)
    v = block("mid_block", v)
    for i in range(n):
        v = linear(f"out_blocks.{i}.skip_linear", torch.cat([v, kept[n - 1 - i]], 2))
        v = block(f"out_blocks.{i}", v)
    v = linear("decoder_pred", norm("norm", v))[:, 2:]
    image = torch.zeros_like(x)
    for token in range(h * h):
        piece = v[:, token].reshape(-1, p, p, x.shape[1]).permute(0, 3, 1, 2)        # channels run fastest
        row, column = divmod(token, h)
        image[:, :, row * p:(row + 1) * p, column * p:(column + 1) * p] = piece
    return F.conv2d(image, state["final_layer.weight"], state["final_layer.bias"], padding=1)


@torch.no_grad()
def test_the_network_is_what_the_paper_draws():
    model = uvit.UViT("mini", 8, 2, 3, classes=5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 500.5, 999.0]), torch.tensor([0, 3, 5])
    assert torch.allclose(model(x, t, y), spelled_out(model, x, t, y), atol=1e-4)
    model.recompute = True
    assert torch.allclose(model(x, t, y), spelled_out(model, x, t, y), atol=1e-4)


def test_difffit_changes_nothing_at_first_and_tunes_by_its_rule():
    torch.manual_seed(0)
    plain = uvit.UViT("tiny", 8, 2, 1, classes=5)
    tuned = uvit.UViT("tiny", 8, 2, 1, classes=5, difffit=True)
    missing, extra = tuned.load_state_dict(plain.state_dict(), strict=False)
    assert extra == [] and len(missing) == 4 * 5 and all("gamma" in name for name in missing)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3., 700.]), torch.tensor([0, 4])
    assert torch.equal(plain(x, t, y), tuned(x, t, y))
    names = set(models.difffit_parameters(tuned))
    assert {"label_emb.weight", "norm.weight", "out_blocks.0.skip_linear.bias", "mid_block.gamma1",
            "in_blocks.1.attn.gamma2", "final_layer.bias"} <= names
    assert not {"pos_embed", "out_blocks.0.skip_linear.weight", "decoder_pred.weight"} & names
    with torch.device("meta"):
        large = uvit.UViT(**{**MID, "network": "L"}, classes=10, difffit=True)
    assert sum("attn.gamma1" in name for name, _ in large.named_parameters()) == 14


def test_the_schedule_is_the_sdes():
    """abar(t) = exp(-integral of beta), beta(s) = 0.1 + 19.9 s, integrated by the trapezium rule."""
    schedule = uvit.ContinuousSchedule()
    for t in (0.0, 1.0, 123.4, 999.0):
        s = torch.linspace(0, t / 999, 10_001, dtype=torch.float64)
        assert schedule.abar_at(t) == pytest.approx(math.exp(-torch.trapezoid(0.1 + 19.9 * s, s).item()))
    signal, noise = schedule.at(torch.tensor([0.0, 1.0, 500.0, 999.0]))
    assert torch.allclose(signal**2 + noise**2, torch.ones(4, 1, 1, 1))
    assert signal[2].item()**2 == pytest.approx(schedule.abar_at(500.0), rel=1e-5)
    assert solvers.level(schedule, 999).half_log_snr == pytest.approx(-5.025, abs=1e-3)
    drawn = schedule.draw_times(10_000, torch.Generator().manual_seed(0), "cpu")
    assert 0 <= drawn.min() and drawn.max() <= 999 and drawn.mean().item() == pytest.approx(499.5, abs=10)
    assert (drawn != drawn.round()).any()


def test_its_loss_is_the_mean_squared_error_of_eps():
    schedule, x0, eps = uvit.ContinuousSchedule(), torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    t, guess = torch.tensor([10.5, 400.0, 999.0]), torch.randn(3, 1, 8, 8)
    found = denoising_loss(lambda x, t, y: guess, schedule, x0, None, t, eps)
    assert torch.allclose(found.loss, ((eps - guess)**2).mean(dim=(1, 2, 3)))
    a = torch.tensor([solvers.level(schedule, v.item()).alpha for v in t]).view(-1, 1, 1, 1)
    s = torch.tensor([solvers.level(schedule, v.item()).sigma for v in t]).view(-1, 1, 1, 1)
    assert torch.allclose(found.xt, a * x0 + s * eps, atol=1e-5)
    assert torch.allclose(found.x0_hat, (a * x0 + s * eps - s * guess) / a, rtol=1e-3, atol=1e-3)


@pytest.fixture
def weights_file(tmp_path):
    """Random weights of the published layout: an unconditional mini U-ViT for 8-pixel digits."""
    torch.save(uvit.UViT("mini", 8, 2, 1, classes=0).state_dict(), tmp_path / "unconditional.pth")
    return tmp_path / "unconditional.pth"


@torch.no_grad()
def test_an_unconditional_checkpoint_starts_a_conditional_network(weights_file):
    """The label token comes first, so that every published position moves up by one."""
    wanted = {"network": "mini", "size": 8, "patch": 2, "channels": 1}
    weights = uvit.read_weights(weights_file, wanted, recipes.RECIPES["digits"])
    tensors = weights.tensors
    assert weights.config == {"backbone": "uvit", "network": "mini", "size": 8, "patch": 2, "channels": 1,
                      "classes": 0, "null": False}
    model, old = uvit.UViT("mini", 8, 2, 1, classes=3), uvit.UViT("mini", 8, 2, 1, classes=0)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    uvit.start_from(model, weights, ["a", "b", "c"])
    mine = model.state_dict()
    assert torch.equal(mine["pos_embed"][:, 1:], tensors["pos_embed"])
    assert torch.equal(mine["pos_embed"][:, :1], fresh["pos_embed"][:, :1])
    assert torch.equal(mine["label_emb.weight"], fresh["label_emb.weight"])
    assert all(torch.equal(mine[name], tensors[name]) for name in tensors if name != "pos_embed")
    old.load_state_dict(tensors)
    seen = []
    for network in (old, model):                                # the old tokens enter the blocks unchanged
        network.in_blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        network(torch.ones(1, 1, 8, 8), torch.tensor([7.0]), torch.tensor([0]))
    assert torch.equal(seen[0], seen[1][:, 1:])


def test_imagenets_label_rows_are_found_by_name(tmp_path):
    classes = archives.imagenet_classes()
    tensors = uvit.UViT("mini", 8, 2, 1, classes=1000, null=False).state_dict()
    model = uvit.UViT("mini", 8, 2, 1, classes=3)
    fresh = model.state_dict()["label_emb.weight"].clone()
    weights = uvit.Weights("file.pth", tensors, {})
    uvit.start_from(model, weights, [classes[7], "my own", classes[3]])
    rows, table = model.state_dict()["label_emb.weight"], tensors["label_emb.weight"]
    assert torch.equal(rows[0], table[7]) and torch.equal(rows[2], table[3])
    assert torch.equal(rows[1], fresh[1]) and torch.equal(rows[3], fresh[3])    # a new class, and "no class"
    with pytest.raises(UserError, match="file.pth does not fit the network: pos_embed has shape"):
        uvit.start_from(uvit.UViT("mini", 8, 4, 1, classes=3), weights, ["a", "b", "c"])


def test_a_published_table_without_a_null_row_is_never_guided(tmp_path, monkeypatch, sentence, capsys):
    monkeypatch.setattr(archives, "imagenet_classes", lambda: [str(k) for k in range(1000)])
    torch.save(uvit.UViT("mini", 8, 2, 1, classes=1000, null=False).state_dict(),
               tmp_path / "conditional.pth")
    learn_uvit(["--weights", str(tmp_path / "conditional.pth"), "--steps", "0"])
    header = files.read_header("out/digits/uvit/base.safetensors")
    assert header["rows"] == [*range(10), -1] and header["guidance"] == 1
    minimax.main(["--out", "out/digits/uvit"])
    words = ["--out", "out/digits/uvit", "--ipc", "1", "--steps", "2"]
    sample.main(words)
    assert "guidance 1 |" in capsys.readouterr().out
    assert 'no row for "no class"' in sentence(sample.main, *words, "--guidance", 2)


def test_a_table_without_a_null_row_drops_no_label():
    train = datasets.load().train
    rows = torch.tensor([*range(10), -1])
    plan = training.Plan(steps=5, batch=64, lr=0., decay=False, ema=0., seed=0, flip=False)
    for step in range(5):
        _, y, _, _ = diffusion.training_batch(train, plan, step, rows, uvit.ContinuousSchedule())
        index = training.batch_index(len(train.labels), 64, step, 0)
        assert torch.equal(y, train.labels[index])


def test_either_backbone_goes_through_every_stage(narrow, capsys):
    learn_uvit([])
    said = capsys.readouterr().out
    assert said.strip().endswith("out/digits/uvit/base.safetensors -> "
                                 "python minimax.py --out out/digits/uvit")
    minimax.main(["--out", "out/digits/uvit"])
    header = files.read_header("out/digits/uvit/minimax.safetensors")
    assert header["schedule"] == "vp" and header["config"]["backbone"] == "uvit"
    for sampler in ("dpm-fast", "dpm++2m", "ddpm"):
        sample.main(["--out", "out/digits/uvit", "--ipc", "2", "--steps", "4", "--sampler", sampler,
                     "--overwrite"])
    train_eval.main(["distilled", "--out", "out/digits/uvit", "--runs", "1", "--ipc", "1"])
    row = json.loads(pathlib.Path("out/digits/uvit/results.jsonl").read_text().splitlines()[0])
    assert row["train"] == "out/digits/uvit/distilled"
    minimax.main([])                                            # DiT's lies beside it
    assert "backbone" not in files.read_header("out/digits/minimax.safetensors")["config"]
    learn_uvit([])
    assert "is finished (same settings)" in capsys.readouterr().out


def test_training_is_a_function_of_the_seed_and_moves_every_weight():
    train, rows = datasets.load().train, torch.arange(11)
    trained = []
    for _ in range(2):
        torch.manual_seed(0)
        model = uvit.UViT("mini", 8, 2, 1, classes=10)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        _, numbers = uvit.numbers(recipes.RECIPES["digits"])
        trainer = training.Trainer(model, training.Plan(**{**numbers, "steps": 3}, seed=0, flip=False))
        assert len(list(diffusion.train(trainer, train, rows, uvit.ContinuousSchedule()))) == 3
        assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
        trained.append(model)
    for one, two in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_its_own_settings_are_the_published_ones():
    network, numbers = uvit.numbers(recipes.RECIPES["cifar100"])
    plan = training.Plan(**numbers, seed=0, flip=True)
    assert network == "S" and (plan.steps, plan.batch, plan.lr, plan.lr_warm) == (500_000, 128, 2e-4, 2500)
    assert (plan.beta1, plan.beta2, plan.weight_decay, plan.ema, plan.warm) == (.99, .999, .03, .9999, False)
    with torch.device("meta"):                                  # the first screen's 1.1M
        assert sum(p.numel() for p in uvit.UViT("tiny", 8, 2, 1, 10).parameters()) == 1_060_366
    assert [plan.lr_at(step) for step in (0, 1249, 2499, 100_000)] == pytest.approx([8e-8, 1e-4, 2e-4, 2e-4])


def test_what_does_not_fit_gets_a_sentence(weights_file, tmp_path, sentence):
    torch.save(DiT("mini", 8, 2, 1, 10).state_dict(), tmp_path / "dit.pt")
    assert "holds no U-ViT weights" in sentence(learn_uvit, "--weights", tmp_path / "dit.pt")
    assert "there is no file no.pth" in sentence(learn_uvit, "--weights", "no.pth")
    assert "at least 1" in sentence(learn_uvit, "--steps", 0)
    assert "does not know the class 0" in sentence(learn_uvit, "--weights", weights_file, "--steps", 0)
    torch.save(uvit.UViT("mini", 16, 2, 1, classes=0).state_dict(), tmp_path / "larger.pth")
    said = sentence(learn_uvit, "--weights", tmp_path / "larger.pth")
    assert "another size than the recipe digits (size 16, not 8)" in said
    learn_uvit(["--weights", str(weights_file), "--steps", "2", "--out", "out/digits"])
    said = sentence(diffusion.main, "--steps", 2)               # a U-ViT lies where DiT's base should be
    assert "backbone 'uvit' there, None here" in said
    with pytest.raises(UserError, match="trained with a cosine schedule; linear and vp are here"):
        checkpoint.schedule_of("cosine", "file.safetensors")
