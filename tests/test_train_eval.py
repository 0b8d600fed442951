"""The judge can learn, cannot cheat, and sees augmentations of the stated ranges, by the stated protocols."""
import dataclasses
import functools
import json
import math
import pathlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convnet
import train_eval
from nanodd import cli, recipes
from nanodd.data import datasets, imageset
from nanodd.judging import augment, gu, judges
from conftest import evaluate, half_right, train_judge
from train_eval import count_epochs

plain = dataclasses.replace(recipes.RECIPES["digits"], augment="crop")
GU = dataclasses.replace(plain, protocol="gu")
challenge = dataclasses.replace(plain, protocol="challenge")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_judge_memorises_ten_images():
    train = datasets.load("digits").train
    ten = train.pick(torch.stack([(train.labels == c).nonzero()[0, 0] for c in range(10)]))
    _, accuracies = train_judge(ten, ten, plain, epochs=40, seed=0)
    assert accuracies[-1] == 100 and len(accuracies) == 10


def test_the_judge_is_at_chance_on_shuffled_labels(monkeypatch):
    half = functools.partial(convnet.ConvNet, width=64)           # half as wide, three times as fast
    monkeypatch.setitem(convnet.JUDGES, "convnet3", ("ConvNetD3-W64", half))
    _, _, train, test, *_ = datasets.load("digits")
    labels = train.labels[torch.randperm(200, generator=generator())]
    shuffled = train.pick(torch.arange(200))._replace(labels=labels)
    _, accuracies = train_judge(shuffled, test.pick(torch.arange(300)), plain, epochs=15, seed=0, num_evals=1)
    assert accuracies[-1] < 30


def test_the_rate_falls_with_a_fresh_optimizer_after_half(monkeypatch):
    made, real = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD",
                        lambda p, lr, **how: made.append({"lr": lr, **how}) or real(p, lr, **how))
    ten = datasets.load("digits").train.pick(torch.arange(10))
    train_judge(ten, ten, plain, epochs=6, seed=0)
    assert [how["lr"] for how in made] == [0.01, pytest.approx(0.001)]
    assert all(how["momentum"] == 0.9 and how["weight_decay"] == 5e-4 for how in made)


def test_the_challenge_trains_1001_epochs_and_forgets_its_momentum_after_the_502nd(monkeypatch):
    sizes, rates, _, made = spy(monkeypatch)
    ten = datasets.load("digits").train.pick(torch.arange(10))
    epochs = count_epochs(dataclasses.replace(challenge, epochs=3, views=5), 10**6, 10)     # not the recipe's
    stepped, real = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *p, **how: stepped.append(len(sizes)) or real(*p, **how))
    train_judge(ten, ten, challenge, epochs, 0)
    assert epochs == len(sizes) == 1001 and rates == [0.01] * 502 + [0.001] * 499
    assert stepped == [0, 502]                                    # an optimizer without a past each time
    assert all(how.defaults["momentum"] == 0.9 and how.defaults["weight_decay"] == 5e-4 for how in made)


def test_the_challenge_draws_all_six_families_whatever_the_recipe_names(monkeypatch):
    seen, images = set(), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    for name in list(train_eval.FAMILIES):
        monkeypatch.setitem(train_eval.FAMILIES, name, lambda x, rng, name=name: seen.add(name) or x)
    for recipe, families in ((plain, {"crop"}), (challenge, set(train_eval.FAMILIES))):
        for seed in range(100):
            train_eval.PROTOCOLS[recipe.protocol].augment(images, None, recipe, None, generator(seed))
        assert seen == families
    assert len(seen) == 6


def test_a_protocol_says_how_many_judges_a_row_has_and_of_how_many_bits(monkeypatch):
    """The challenge's judges work in float32 unless told otherwise."""
    monkeypatch.setattr(cli, "gains_from_bf16", lambda _: True)
    monkeypatch.setattr(train_eval, "train_rows", half_right)
    monkeypatch.setattr(judges, "compiles", lambda *_: False)
    for more in ([], ["--protocol", "challenge"], ["--protocol", "challenge", "--bf16", "--epochs", "2"]):
        train_eval.main(["random", "--ipc", "1", *more])
    rows = read_results()[0]
    assert [row["train"] for row in rows] == ["random", "kmeans", "full"] * 3
    assert [(row["protocol"], len(row["accuracy"]), row["epochs"], row["device"]) for row in rows[::3]] == \
        [("short", 5, 4, "cpu bf16"), ("challenge", 3, 1001, "cpu"), ("challenge", 3, 2, "cpu bf16")]
    assert train_eval.PROTOCOLS["gu"].runs == 3


def test_colour_changes_brightness_saturation_and_contrast_in_their_ranges():
    x = torch.randn(4000, 3, 4, 4)
    out = train_eval.color(x, generator())
    shift = (out - x).mean(dim=(1, 2, 3))                         # saturation and contrast keep the mean
    assert -0.5 <= shift.min() < -0.45 and 0.45 < shift.max() <= 0.5 and abs(shift.mean()) < 0.02
    grey = lambda z: z.mean(1, keepdim=True)
    contrast = grey(out).std(dim=(2, 3)) / grey(x).std(dim=(2, 3))
    assert 0.5 <= contrast.min() < 0.52 and 1.48 < contrast.max() <= 1.5 + 1e-3
    saturation = (out - grey(out)).std(dim=(1, 2, 3)) / (x - grey(x)).std(dim=(1, 2, 3)) / contrast.flatten()
    assert saturation.min() < 0.05 and 1.95 < saturation.max() <= 2 + 1e-3


def test_crop_shifts_by_an_eighth_and_fills_with_zeros():
    x = torch.arange(1, 32 * 32 + 1.).view(1, 1, 32, 32).repeat(3000, 2, 1, 1)
    out, seen = train_eval.crop(x, generator()), set()
    for image in out:
        y, z = (image[0] == 528).nonzero()[0].tolist()            # the pixel of row 16, column 15 is here
        dy, dx = y - 16, z - 15
        seen.add((dy, dx))
        assert torch.equal(image, F.pad(x[0], (8, 8, 8, 8))[:, 8 - dy:40 - dy, 8 - dx:40 - dx])
    assert seen == {(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5)}


def test_cutout_zeroes_one_clamped_box_of_half_the_size():
    out = train_eval.cutout(torch.ones(4000, 3, 32, 32), generator())
    heights = (out == 0).all(1).any(2).sum(1)
    assert heights.max() == 16 and heights.min() == 8             # the centre lies in 0..32
    widths, zeroed = (out == 0).all(1).any(1).sum(1), (out == 0).all(1).flatten(1).sum(1)
    assert (zeroed == heights * widths).all()                     # a full box


def test_scale_and_rotate_have_their_ranges():
    axis = torch.linspace(-1, 1, 65)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    ramp = torch.stack([x, y]).repeat(2000, 1, 1, 1)              # pixel values are its coordinates
    centre = lambda out: (out[:, :, 32, 36] - out[:, :, 32, 28], out[:, :, 36, 32] - out[:, :, 28, 32])
    along, across = centre(train_eval.scale(ramp, generator()))
    for factor in (along[:, 0] / 0.25, across[:, 1] / 0.25):
        assert 1 / 1.2 - 1e-3 <= factor.min() < 0.84 and 1.19 < factor.max() <= 1.2 + 1e-3
    assert abs(torch.corrcoef(torch.stack([along[:, 0], across[:, 1]]))[0, 1]) < 0.1  # independent
    along, _ = centre(train_eval.rotate(ramp, generator()))
    angle = torch.atan2(along[:, 1], along[:, 0]).rad2deg()
    assert -15.1 <= angle.min() < -14.5 and 14.5 < angle.max() <= 15.1


def test_a_new_family_leaves_the_exact_protocol_alone_and_is_chosen_by_name(narrow, monkeypatch, sentence):
    seen = []
    monkeypatch.setitem(train_eval.FAMILIES, "invert", lambda x, rng: seen.append(1) or -x)
    for seed in range(100):
        train_eval.PROTOCOLS["challenge"].augment(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, challenge,
                                                  None, generator(seed))
    assert len(train_eval.CHALLENGE_FAMILIES) == 6 and not seen
    monkeypatch.setitem(train_eval.PROTOCOLS, "short", train_eval.PROTOCOLS["short"]._replace(baselines=()))
    train_eval.main(["random", "--augment", "invert", "--ipc", "1", "--runs", "1", "--epochs", "2"])
    assert len(seen) == 2
    for argv in (["--augment", "nothing"], ["--augment", "crop", "--protocol", "challenge"]):
        assert "--augment joins families of the protocol short by _" in sentence(train_eval.main, *argv)


def test_one_family_is_drawn_per_batch(monkeypatch):
    seen = []
    for name in list(train_eval.FAMILIES):
        monkeypatch.setitem(train_eval.FAMILIES, name, lambda x, rng, name=name: seen.append(name) or x)
    for seed in range(600):
        train_eval.dsa(torch.zeros(2, 1, 8, 8), ["crop", "scale", "flip"], None, generator(seed))
    assert len(seen) == 600 and set(seen) == {"crop", "scale", "flip"}
    assert all(150 < seen.count(name) < 250 for name in set(seen))


def test_no_augmentation_asks_the_device_for_a_number(monkeypatch):
    """Tensors without numbers: whoever asked for one, and made a GPU wait, would fail."""
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.zeros(1, device="meta").tolist()
    box = torch.ones(2, 3, device="meta")
    monkeypatch.setattr(gu, "random_boxes", lambda *_: (0 * box, box))      # drawn where g is
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8, device="meta")
    labels = torch.zeros(3, dtype=torch.int64, device="meta")
    for protocol in train_eval.PROTOCOLS.values():
        for seed in range(20):
            x, _ = protocol.augment(images, labels, recipes.RECIPES["cifar100"], generator(), generator(seed))
            assert x.shape == images.shape and x.device.type == "meta"
    constant = augment.constant((0.5, 0.25), torch.device("cpu"))
    assert constant is augment.constant((0.5, 0.25), torch.device("cpu"))


def test_digits_are_never_mirrored():
    assert "flip" not in recipes.RECIPES["digits"].augment and not recipes.RECIPES["digits"].flip


def test_large_sets_get_fewer_epochs():
    recipe = dataclasses.replace(plain, epochs=200, views=32_000)
    assert [count_epochs(recipe, n, 10) for n in (10, 100, 1257, 10**6)] == [200, 200, 25, 1]


def test_a_row_says_everything(narrow):
    row = evaluate("random", datasets.load("digits"), ipc=2, runs=3, seed=0)
    assert row["images"] == 20 and row["ipc"] == 2 and len(row["accuracy"]) == row["runs"] == 3
    assert row["mean"] == pytest.approx(sum(row["accuracy"]) / 3, abs=1e-3)
    spread = math.sqrt(sum((a - row["mean"]) ** 2 for a in row["accuracy"]) / 2)
    assert row["std"] == pytest.approx(spread, abs=1e-3)
    assert row["best"] >= row["mean"] - 1e-3 and row["pda"] == 0


def test_runs_of_two_seeds_share_no_judge(monkeypatch):
    seeds = []
    monkeypatch.setattr(train_eval, "train_rows",
                        lambda rows, *how, **_: seeds.extend(rows[0].seeds) or half_right(rows))
    for seed in (0, 1):
        evaluate("random", datasets.load("digits"), ipc=1, runs=5, seed=seed)
    assert len(set(seeds)) == 10


def test_gu_is_for_a_hundred_classes_at_most(sentence, monkeypatch):
    whole = datasets.load("digits")
    many = whole.train._replace(classes=[str(c) for c in range(101)])
    monkeypatch.setattr(datasets, "load", lambda *_: whole._replace(train=many))
    assert "up to 100 classes" in sentence(train_eval.main, "full", "--protocol", "gu")


def test_the_table_and_the_file(narrow, capsys):
    train = datasets.load("digits").train
    for c in range(10):
        for k, image in enumerate(train.images[train.labels == c][:2]):
            imageset.write_png(pathlib.Path("out/digits/distilled", str(c), f"{k:05}.png"), image)
    train_eval.main(["distilled", "herding", "kmeans+random", "--runs", "2"])
    rows, scores = read_results()
    assert [row["train"] for row in rows] == [
        "out/digits/distilled", "herding", "kmeans+random", "random", "kmeans", "full"]
    assert [row["images"] for row in rows] == [20, 20, 40, 20, 20, 1257]
    assert set(rows[0]) == {"data", "cut", "train", "ipc", "pda", "images", "recipe", "protocol", "judge",
                            "size", "epochs", "runs", "accuracy", "mean", "std", "best", "seconds", "device",
                            "seed", "command"}
    assert [rows[0][key] for key in ("protocol", "judge", "size")] == ["short", "ConvNetD3-W128", 16]
    assert rows[0]["command"] == "python train_eval.py distilled herding kmeans+random --runs 2"
    said = capsys.readouterr().out
    assert all(f"{row['mean']:.2f}" in said for row in rows) and "best: of up to 10 epochs" in said
    assert "digits | 1,257 images to train on, 540 to test | protocol short | judge ConvNetD3" in said
    own, full, random = (next(row["mean"] for row in rows if row["train"] == name)
                         for name in ("out/digits/distilled", "full", "random"))
    assert f"out/digits/distilled | HLR {(full - own) / 100:.3f} | IOR {(own - random) / 100:.3f}\n" in said
    assert [row["train"] for row in scores] == ["out/digits/distilled", "herding", "kmeans"]  # of equal size
    assert set(scores[0]) == {"kind", "data", "cut", "train", "ipc", "protocol", "hlr", "ior", "command"}
    assert scores[0]["hlr"] == pytest.approx((full - own) / 100)


def read_results(path="out/digits/results.jsonl"):
    """(the judges' rows, the scores')."""
    rows = [json.loads(line) for line in open(path)]
    return [row for row in rows if "kind" not in row], [row for row in rows if row.get("kind") == "scores"]


def test_what_makes_no_sense_is_refused(sentence, tmp_path):
    assert "python sample.py --steps 10 makes it" in sentence(train_eval.main)
    for argv, words in ((["random", "--ipc", 0], "--ipc must be"),
                        (["random", "--runs", 0], "--runs must be"),
                        (["random", "--epochs", 0], "--epochs must be"), (["nowhere"], "there is no nowhere"),
                        (["random", "--size", 0], "--size must be"), (["--net", "lenet"], "choose convnet3"),
                        (["random", "--pda", -1], "--pda must be at least 0"),
                        (["random", "--net", "resnet18", "--size", 8], "16 pixels or more, not 8"),
                        (["random", "--ipc", 200], "fewer than --ipc 200")):
        assert words in sentence(train_eval.main, *argv)
    train = datasets.load("digits").train
    for c in range(10):
        imageset.write_png(tmp_path / "one" / str(c) / "0.png", train.images[train.labels == c][0])
    assert "fewer than --ipc 3" in sentence(train_eval.main, "one", "--ipc", 3)


def spy(monkeypatch):
    """Steps and tests that cost nothing, but are noted: sizes of batches, rates, tests, optimizers.

    The network is linear, and each batch is cut to one image.
    """
    sizes, rates, evals, made, real = [], [], [], [], torch.optim.SGD

    def augment(images, labels, recipe, rng, cpu_rng):
        sizes.append(len(images))
        rates.append(round(made[-1].param_groups[0]["lr"], 8))
        return images[:1].float(), [(labels[:1], 1)]
    monkeypatch.setattr(torch.optim, "SGD", lambda *p, **how: made.append(real(*p, **how)) or made[-1])
    monkeypatch.setattr(train_eval, "accuracy", lambda *_: evals.append(len(sizes)) or 0.)
    linear = lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    monkeypatch.setattr(train_eval.convnet, "judge", linear)
    for name, protocol in train_eval.PROTOCOLS.items():
        monkeypatch.setitem(train_eval.PROTOCOLS, name, protocol._replace(augment=augment))
    return sizes, rates, evals, made


def test_gu_batches_of_64_keep_the_last_part_and_one_optimizer(monkeypatch):
    sizes, rates, evals, made = spy(monkeypatch)
    some = datasets.load("digits").train.pick(torch.arange(70))
    train_judge(some, some, GU, 12, 0)
    assert sizes == [64, 6] * 12 and evals == list(range(2, 25, 2)) and len(made) == 1
    assert rates == [0.01] * 16 + [0.002] * 4 + [0.0004] * 4
    assert made[0].defaults["momentum"] == 0.9 and made[0].defaults["weight_decay"] == 5e-4


def test_gu_judges_are_tested_a_hundred_times_and_at_the_end(monkeypatch):
    _, _, evals, _ = spy(monkeypatch)
    one = datasets.load("digits").train.pick(torch.arange(1))
    train_judge(one, one, GU, 300, 0)
    assert evals == list(range(3, 301, 3))


def test_the_judge_learns_under_gu():
    train = datasets.load("digits").train
    ten = train.pick(torch.stack([(train.labels == c).nonzero()[0, 0] for c in range(10)]))
    _, accuracies = train_judge(ten, ten, GU, epochs=120, seed=0)
    assert accuracies[-1] >= 80 and len(accuracies) == 100


def test_a_gu_row_names_its_protocol_and_its_best_is_no_less_than_its_last(narrow):
    digits = datasets.load("digits")._replace(recipe=GU)
    row = evaluate("random", digits, ipc=1, runs=2, seed=0, epochs=4)
    assert (row["protocol"], row["judge"], row["size"], row["epochs"]) == ("gu", "ConvNetD3-W128", 16, 4)
    assert row["best"] >= row["mean"] - 1e-3


def test_imagenets_protocol_from_the_command_line(pictures, tmp_path, capsys):
    """Any folder, as files; a distilled folder of larger pictures is brought to the judge's size."""
    for name, level in (("ant", 40), ("bee", 200)):
        imageset.write_png(tmp_path / "drawn" / name / "0.png",
                           torch.full((3, 64, 64), level, dtype=torch.uint8))
    argv = ["--data", str(pictures), "--recipe", "imagenet", "--net", "resnetap10", "--size", "16"]
    train_eval.main(["drawn", "drawn+full", "kmeans", *argv, "--runs", "1", "--epochs", "2"])
    rows = [json.loads(line) for line in open("out/pictures/results.jsonl")]
    assert [(row["train"], row["images"]) for row in rows] == \
        [("drawn", 2), ("drawn+full", 18), ("kmeans", 2), ("random", 2)]
    assert all((row["protocol"], row["judge"], row["size"]) == ("gu", "ResNetAP-10", 16) for row in rows)
    said = capsys.readouterr().out
    assert "16 images to train on, 4 to test | protocol gu | judge ResNetAP-10 at 16 px" in said
    assert "best: of up to 100 epochs" in said
