"""Real images are selected as published; what rows say together; labels survive the trip through folders."""
import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

import convnet
import train_eval
from nanodd import recipes
from nanodd.data import datasets, imageset
from nanodd.errors import UserError
from nanodd.judging import baselines, results
from conftest import evaluate, half_right


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def read_results(path="out/digits/results.jsonl"):
    """(the judges' rows, the scores')."""
    rows = [json.loads(line) for line in open(path)]
    return [row for row in rows if "kind" not in row], [row for row in rows if row.get("kind") == "scores"]


def test_hlr_and_ior_are_fractions():
    assert results.hlr_ior(own=95.5, full=98.9, random=95.7) == (0.034, -0.002)
    found = (("made", 10, 60., 4), ("random", 10, 52., 4), ("random", 10, 50., 0),
             ("made+random", 20, 70., 0), ("full", 125, 90., 0))
    rows = [{"data": "digits", "cut": "all", "protocol": "short", "train": name, "ipc": ipc, "mean": mean,
             "pda": pda} for name, ipc, mean, pda in found]
    assert [(row["train"], row["hlr"], row["ior"]) for row in results.score_rows(rows)] == \
        [("made", 0.3, 0.1), ("random", 0.38, 0.02)]              # the sum has no random one of its size
    assert results.score_rows(rows[:2]) == results.score_rows(rows[:4]) == []


def challenge_row(**other):
    return {"data": "cifar100", "train": "out/cifar100/distilled", "protocol": "challenge", "epochs": 1001,
            "judge": "ConvNetD3-W128", "size": 32, "runs": 3, "mean": 14.7, "device": "cuda:0",
            "recipe": other.get("data", "cifar100"), **other}


def test_the_challenges_score_is_the_mean_over_its_data_sets_and_of_exact_rows_alone():
    tiny = challenge_row(data="tiny-imagenet", size=64, mean=6.5)
    assert results.challenge_score([challenge_row(), tiny]) == pytest.approx(10.6)
    assert results.challenge_score([challenge_row(mean=1.), tiny, challenge_row()]) == pytest.approx(10.6)
    for wrong in ({"epochs": 1000}, {"protocol": "short"}, {"runs": 2}, {"train": "random"}, {"size": 64},
                  {"train": "made+full"}, {"data": "cifar100-validation"}, {"device": "cuda:0 bf16"},
                  {"judge": "ResNet-18"}, {"data": "cifar10"}, {"recipe": "folder"}):
        assert results.challenge_score([challenge_row(**wrong), tiny]) is None
    scores = {"kind": "scores", "data": "cifar100", "train": "out/cifar100/distilled", "hlr": 0.1, "ior": 0.1}
    assert results.challenge_score([scores, challenge_row(), tiny]) == pytest.approx(10.6)


@pytest.mark.parametrize("name, home, score", [
    ("cifar100", "out/cifar100", "mean over cifar100 and tiny-imagenet: 28.3\n"),
    ("cifar100", "out/cifar100/other", "mean over cifar100 and tiny-imagenet: 28.3\n"),
    ("cifar100-validation", "out/cifar100-validation", None)])
def test_the_score_is_printed_once_both_data_sets_have_their_row(name, home, score, monkeypatch, tmp_path,
                                                                 capsys):
    """A stand-in for CIFAR-100: digits in colour, and judges that are right half of the time."""
    whole, recipe = datasets.load("digits", recipe="cifar100"), recipes.RECIPES["cifar100"]
    monkeypatch.setattr(datasets, "load", lambda *_: whole._replace(name=name, recipe=recipe))
    monkeypatch.setattr(train_eval, "train_rows", half_right)
    for c in range(10):
        imageset.write_png(tmp_path / "made" / str(c) / "0.png",
                           whole.train.images[whole.train.labels == c][0])
    twin = tmp_path / home.replace(name, "tiny-imagenet") / "results.jsonl"
    train_eval.main(["made", "--out", home])
    assert "challenge score" not in capsys.readouterr().out
    twin.parent.mkdir(parents=True)
    twin.write_text(json.dumps(challenge_row(data="tiny-imagenet", size=64, mean=6.6)) + "\n")
    train_eval.main(["made", "--out", home])
    said = capsys.readouterr().out
    assert f"challenge score, {score}" in said if score else "challenge score" not in said


def test_a_distilled_folder_is_read_once(monkeypatch, tmp_path):
    train, seen, real = datasets.load("digits").train, [], imageset.read_set
    for c in range(10):
        imageset.write_png(tmp_path / "one" / str(c) / "0.png", train.images[train.labels == c][0])
    monkeypatch.setattr(imageset, "read_set", lambda path, *how: seen.append(str(path)) or real(path, *how))
    monkeypatch.setattr(train_eval, "train_rows", half_right)
    train_eval.main(["one", "one+random"])
    assert seen == ["one"]


def test_selections_against_plain_loops():
    x = torch.randn(30, 3)
    herded, target, total = baselines.choose_herding(x, 4, None).tolist(), x.mean(0), torch.zeros(3)
    for k, j in enumerate(herded):
        others = [i for i in range(30) if i not in herded[:k]]
        assert j == min(others, key=lambda i: float((target - (total + x[i]) / (k + 1)).norm()))
        total += x[j]
    centers = baselines.choose_kcenter(x, 4, None).tolist()
    for k in range(1, 4):
        gap = [min(float((x[i] - x[j]).norm()) for j in centers[:k]) for i in range(30)]
        assert centers[k] == max(range(30), key=lambda i: gap[i])


def test_kmeans_of_one_image_is_the_class_mean():
    train = datasets.load("digits").train
    means = baselines.kmeans(train, 1, None, generator())
    for c in range(10):
        mean = train.images[train.labels == c].double().mean(0).round()
        assert (means.images[c].double() - mean).abs().max() <= 1 and means.labels[c] == c


def test_labels_survive_the_trip_through_folders(tmp_path, monkeypatch):
    """Real images written as a distilled folder train as well as the real images themselves."""
    whole = datasets.load("digits")
    half = functools.partial(convnet.ConvNet, width=64)           # half as wide, three times as fast
    monkeypatch.setitem(convnet.JUDGES, "convnet3", ("ConvNetD3-W64", half))
    whole = whole._replace(test=whole.test.pick(torch.arange(200)))
    counts = [0] * 10
    for image, label in zip(whole.train.images[:200], whole.train.labels[:200].tolist(), strict=True):
        imageset.write_png(tmp_path / "real" / str(label) / f"{counts[label]:05}.png", image)
        counts[label] += 1
    row = evaluate(str(tmp_path / "real"), whole, ipc=None, runs=1, seed=0, epochs=20)
    assert row["images"] == 200 and row["mean"] > 55            # about 70; with shuffled labels below 20
    shutil.rmtree(tmp_path / "real" / "4")
    with pytest.raises(UserError, match="than the data set: missing '4'$"):
        evaluate(str(tmp_path / "real"), whole, ipc=None, runs=1, seed=0)


def test_pda_adds_copies_to_the_named_sources_alone(monkeypatch):
    monkeypatch.setattr(train_eval, "train_rows", half_right)
    train_eval.main(["random", "--ipc", "2", "--pda", "3"])
    rows, scores = read_results()
    assert [(row["train"], row["pda"], row["ipc"], row["images"]) for row in rows] == [
        ("random", 3, 2, 80), ("random", 0, 2, 20), ("kmeans", 0, 2, 20), ("full", 0, 125, 1257)]
    assert [row["train"] for row in scores] == ["random", "kmeans"]


def test_a_set_larger_than_the_real_one_has_no_random_row(narrow, capsys):
    train = datasets.load("digits").train
    np.savez("many.npz", images=torch.cat([train.images, train.images]),
             labels=torch.cat([train.labels, train.labels]), classes=train.classes)
    train_eval.main(["many.npz", "--runs", "1", "--epochs", "1"])
    assert "a class has only 122 real images" in capsys.readouterr().out
    rows, scores = read_results()
    assert [row["train"] for row in rows] == ["many.npz", "full"] and not scores


@pytest.fixture
def image_files(tmp_path, monkeypatch):
    """(Data of two classes, 6 JPEGs each to train on and 2 to test, read at 16 px; the names read so far)."""
    for part, count in (("train", 6), ("test", 2)):
        for c, name in enumerate(("ant", "bee")):
            for i in range(count):
                (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
                level = torch.randint(120 * c, 120 * c + 100, (3, 20, 24)).to(torch.uint8)
                TF.to_pil_image(level).save(tmp_path / part / name / f"{i}.jpg")
    recipe = dataclasses.replace(recipes.RECIPES["imagenet"], net="convnet3", judge_size=16)
    train, test = (imageset.list_folder(tmp_path / part, 16, 3) for part in ("train", "test"))
    found, opened, real = datasets.Data("insects", recipe, train, test.read(),
                                        "a few"), [], imageset.open_image
    monkeypatch.setattr(imageset, "open_image", lambda path, *how: opened.append(path) or real(path, *how))
    monkeypatch.setitem(train_eval.PROTOCOLS, "gu",
                        train_eval.PROTOCOLS["gu"]._replace(epochs=lambda *_: 2))
    return found, opened


def test_of_files_random_reads_only_the_chosen(narrow, image_files):
    found, opened = image_files
    row = evaluate("random", found, ipc=2, runs=2, seed=0)
    assert len(opened) == 8 and row["images"] == 4 and row["protocol"] == "gu"
    ours, whole = found.train, found.train.read()
    del opened[:]
    choose = baselines.SELECTORS["random"]
    one, two = (choose(train, 2, train.labels, generator()) for train in (ours, whole))
    assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels) and len(opened) == 4
    one, two = (baselines.kmeans(train, 2, None, generator()) for train in (ours, whole))
    assert torch.equal(one.images, two.images) and len(opened) == 16


def test_of_files_herding_and_kcenter_read_all_once(narrow, image_files):
    found, opened = image_files
    pool = baselines.Pool(found, torch.device("cpu"), train_eval.real_judge)
    for source, images in (("herding", 4), ("kcenter", 4), ("herding+kcenter", 8)):
        assert evaluate(source, found, ipc=2, runs=1, seed=0, pool=pool)["images"] == images
    assert len(opened) == 12


def test_broken_files_are_named_or_left_out(narrow, pictures, sentence, capsys):
    for broken in pictures.glob("ant/*.png"):
        if broken.stem < "8":
            broken.write_bytes(b"no picture")
    argv = ["full", "--data", str(pictures), "--recipe", "imagenet", "--net", "convnet3", "--size", "16",
            "--runs", "1", "--epochs", "1", "--ipc", "1"]
    assert "--skip-broken leaves them out" in sentence(train_eval.main, *argv)
    train_eval.main([*argv, "--skip-broken"])
    assert "left out: cannot read the image" in "".join(capsys.readouterr())
    assert all(json.loads(line)["images"] < 16 for line in open("out/pictures/results.jsonl"))
