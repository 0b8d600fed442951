"""The judge can learn, cannot cheat, and sees augmentations of the stated ranges; labels survive the trip."""
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import minimax
import sample
import train_eval
from data import load
from train_eval import count_epochs, evaluate, train_judge

plain = dataclasses.replace(data.RECIPES["digits"], augment="crop")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_judge_memorises_ten_images():
    train = load("digits").train
    ten = train.pick(torch.stack([(train.labels == c).nonzero()[0, 0] for c in range(10)]))
    _, accuracies = train_judge(ten, ten, plain, epochs=40, seed=0)
    assert accuracies[-1] == 100 and len(accuracies) == 10


def test_the_judge_is_at_chance_on_shuffled_labels():
    _, _, train, test = load("digits")
    labels = train.labels[torch.randperm(200, generator=generator())]
    shuffled = train.pick(torch.arange(200))._replace(labels=labels)
    _, accuracies = train_judge(shuffled, test, plain, epochs=15, seed=0)
    assert accuracies[-1] < 30


def test_the_same_seed_gives_the_same_judge():
    few = load("digits").train.pick(torch.arange(32))
    one, two = (train_judge(few, few, plain, 2, 5)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_rate_falls_with_a_fresh_optimizer_after_half(monkeypatch):
    made, real = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda p, **how: made.append(how) or real(p, **how))
    ten = load("digits").train.pick(torch.arange(10))
    train_judge(ten, ten, plain, epochs=6, seed=0)
    assert [how["lr"] for how in made] == [0.01, pytest.approx(0.001)]
    assert all(how["momentum"] == 0.9 and how["weight_decay"] == 5e-4 for how in made)


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


def test_flip_mirrors_half():
    x = torch.randn(2000, 1, 4, 4)
    out = train_eval.flip(x, generator())
    same, mirrored = ((out == z).flatten(1).all(1) for z in (x, x.flip(3)))
    assert (same | mirrored).all() and 0.45 < mirrored.float().mean() < 0.55


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


def test_one_family_is_drawn_per_batch(monkeypatch):
    seen = []
    for name in list(train_eval.FAMILIES):
        monkeypatch.setitem(train_eval.FAMILIES, name, lambda x, g, name=name: seen.append(name) or x)
    for seed in range(600):
        train_eval.dsa(torch.zeros(2, 1, 8, 8), ["crop", "scale", "flip"], generator(seed))
    assert len(seen) == 600 and set(seen) == {"crop", "scale", "flip"}
    assert all(150 < seen.count(name) < 250 for name in set(seen))


def test_digits_are_never_mirrored():
    assert "flip" not in data.RECIPES["digits"].augment and not data.RECIPES["digits"].flip


def test_selections_against_plain_loops():
    x = torch.randn(30, 3)
    herded, target, total = train_eval.choose_herding(x, 4, None).tolist(), x.mean(0), torch.zeros(3)
    for k, j in enumerate(herded):
        others = [i for i in range(30) if i not in herded[:k]]
        assert j == min(others, key=lambda i: float((target - (total + x[i]) / (k + 1)).norm()))
        total += x[j]
    centers = train_eval.choose_kcenter(x, 4, None).tolist()
    for k in range(1, 4):
        gap = [min(float((x[i] - x[j]).norm()) for j in centers[:k]) for i in range(30)]
        assert centers[k] == max(range(30), key=lambda i: gap[i])


def test_kmeans_of_one_image_is_the_class_mean():
    train = load("digits").train
    means = train_eval.kmeans(train, 1, None, generator())
    for c in range(10):
        mean = train.images[train.labels == c].double().mean(0).round()
        assert (means.images[c].double() - mean).abs().max() <= 1 and means.labels[c] == c


def test_large_sets_get_fewer_epochs():
    recipe = dataclasses.replace(plain, epochs=200, views=32_000)
    assert [count_epochs(recipe, n) for n in (10, 100, 1257, 10**6)] == [200, 200, 25, 1]


def test_a_row_says_everything():
    row = evaluate("random", load("digits"), ipc=2, runs=3, seed=0)
    assert row["images"] == 20 and row["ipc"] == 2 and len(row["accuracy"]) == row["runs"] == 3
    assert row["mean"] == pytest.approx(sum(row["accuracy"]) / 3, abs=1e-3)
    spread = math.sqrt(sum((a - row["mean"]) ** 2 for a in row["accuracy"]) / 2)
    assert row["std"] == pytest.approx(spread, abs=1e-3)
    assert row["best"] >= row["mean"] - 1e-3


def test_labels_survive_the_trip_through_folders(tmp_path):
    """Real images written as a distilled folder train as well as the real images themselves."""
    whole = load("digits")
    counts = [0] * 10
    for image, label in zip(whole.train.images[:300], whole.train.labels[:300].tolist(), strict=True):
        data.write_png(tmp_path / "real" / str(label) / f"{counts[label]:05}.png", image)
        counts[label] += 1
    row = evaluate(str(tmp_path / "real"), whole, ipc=None, runs=1, seed=0, epochs=30)
    assert row["images"] == 300 and row["mean"] > 85
    shutil.rmtree(tmp_path / "real" / "4")
    with pytest.raises(data.UserError, match=r"missing \['4'\]"):
        evaluate(str(tmp_path / "real"), whole, ipc=None, runs=1, seed=0)


def test_the_table_and_the_file(capsys):
    minimax.main([])
    sample.main(["--ipc", "2"])
    train_eval.main(["distilled", "herding", "kmeans+random", "--runs", "2"])
    rows = [json.loads(line) for line in open("out/digits/results.jsonl")]
    assert [row["train"] for row in rows] == [
        "out/digits/distilled", "herding", "kmeans+random", "random", "kmeans", "full"]
    assert [row["images"] for row in rows] == [20, 20, 40, 20, 20, 1257]
    assert set(rows[0]) == {"data", "train", "ipc", "images", "judge", "epochs", "runs", "accuracy", "mean",
                            "std", "best", "seconds", "device", "seed", "command"}
    assert rows[0]["command"] == "python train_eval.py distilled herding kmeans+random --runs 2"
    said = capsys.readouterr().out
    assert all(f"{row['mean']:.2f}" in said for row in rows)


def test_a_set_larger_than_the_real_one_has_no_random_row(capsys):
    train = load("digits").train
    np.savez("many.npz", images=torch.cat([train.images, train.images]),
             labels=torch.cat([train.labels, train.labels]), classes=train.classes)
    train_eval.main(["many.npz", "--runs", "1", "--epochs", "1"])
    assert "a class has only 122 real images" in capsys.readouterr().out
    assert [json.loads(line)["train"] for line in open("out/digits/results.jsonl")] == ["many.npz", "full"]


def test_what_makes_no_sense_is_refused(sentence, tmp_path):
    assert "python sample.py --steps 10 makes it" in sentence(train_eval.main)
    for argv, words in ((["random", "--ipc", 0], "--ipc must be"),
                        (["random", "--runs", 0], "--runs must be"),
                        (["random", "--epochs", 0], "--epochs must be"), (["nowhere"], "there is no nowhere"),
                        (["random", "--ipc", 200], "fewer than --ipc 200")):
        assert words in sentence(train_eval.main, *argv)
    train = load("digits").train
    for c in range(10):
        data.write_png(tmp_path / "one" / str(c) / "0.png", train.images[train.labels == c][0])
    assert "fewer than --ipc 3" in sentence(train_eval.main, "one", "--ipc", 3)
