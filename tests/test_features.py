"""--metrics: what a row is compared in and with, the cached judge of all real images, and timm's networks."""
import dataclasses
import json
import pathlib

import pytest
import timm
import torch

import train_eval
from nanodd.data import datasets
from nanodd.judging import features, metrics, results
from conftest import evaluate


def rows():
    return [json.loads(line) for line in open("out/digits/results.jsonl")]


def test_each_row_is_compared_with_the_real_test_images(narrow, capsys):
    train_eval.main(["random", "--metrics", "--runs", "2", "--epochs", "1", "--ipc", "5"])
    said = capsys.readouterr().out
    found = {row["train"]: row["metrics"] for row in rows() if "metrics" in row}
    assert set(found) == {"random", "kmeans", "full"}
    assert said.count("precision") == 3 and "real 540, images 50" in said
    assert found["full"]["images"] == 1257 and all(one["features"] == "judge" for one in found.values())
    assert found["full"]["coverage"] > 0.95 and found["full"]["nearest"] < found["random"]["nearest"]
    data = datasets.load()                                      # the numbers themselves, of the whole set
    judge = train_eval.real_judge(data.train, data.recipe, pathlib.Path("out/digits"))
    real, fake = judge.embed(data.test.images), judge.embed(data.train.images)
    precision, recall = metrics.precision_recall(real, fake)
    assert found["full"]["precision"] == pytest.approx(precision, abs=0.02)     # the row may be in bfloat16
    assert found["full"]["recall"] == pytest.approx(recall, abs=0.02)


def test_random_sets_are_compared_one_by_one_and_averaged():
    data = datasets.load()
    judge = features.RealJudge(lambda x: x.flatten(1).float(), lambda x: x.flatten(1)[:, :10].float())
    compare = features.comparison("judge", judge, data.test)
    sets = [data.train.pick(torch.arange(0, 40) + 40 * k) for k in range(2)]
    both, each = compare(sets), [compare([part]) for part in sets]
    for name in ("recall", "frechet", "nearest"):
        assert both[name] == pytest.approx((each[0][name] + each[1][name]) / 2)
    tiny = data.train.pick(torch.arange(2))
    assert compare([tiny])["recall"] is None and compare([sets[0], tiny])["recall"] is None
    line = results.table_line({"train": "x", "ipc": 1, "images": 2, "mean": 1., "std": None, "runs": 1,
                               "best": 1., "epochs": 1, "seconds": 0., "metrics": compare([tiny])})
    assert "recall -" in line


def test_the_real_judge_is_trained_once_and_again_for_other_images(narrow, monkeypatch):
    trained, home = [], pathlib.Path("out/digits")
    train = train_eval.train_judges
    monkeypatch.setattr(train_eval, "train_judges", lambda *a, **k: trained.append(1) or train(*a, **k))
    data = datasets.load()
    one = train_eval.real_judge(data.train, data.recipe, home).classify(data.test.images)
    path, = home.glob("real_judge-*.safetensors")
    again = train_eval.real_judge(data.train, dataclasses.replace(data.recipe, guidance=7.), home)
    assert torch.equal(again.classify(data.test.images), one) and trained == [1]
    train_eval.real_judge(data.test, data.recipe, home)
    train_eval.real_judge(data.train, dataclasses.replace(data.recipe, judge_size=8), home)
    assert trained == [1, 1, 1] and len(list(home.glob("real_judge-*.safetensors"))) == 3
    path.unlink()                                               # a judge may still be read from it
    path.write_bytes(b"half a file")                            # damaged: made again
    train_eval.real_judge(data.train, data.recipe, home)
    assert trained == [1, 1, 1, 1]


def test_copies_are_not_compared(narrow):
    """--pda's augmented copies are trained on; the metrics are those of the images that were drawn."""
    data = datasets.load()
    compare = lambda sets: {"images": [len(part.labels) for part in sets]}
    row = evaluate("random", data, ipc=2, runs=2, seed=0, epochs=1, pda=3, compare=compare)
    assert row["images"] == 80 and row["metrics"]["images"] == [20, 20]


def test_herding_and_metrics_share_the_judge_of_all_real_images(narrow, monkeypatch):
    calls, make = [], train_eval.real_judge
    monkeypatch.setattr(train_eval, "real_judge", lambda *args, **how: calls.append(1) or make(*args, **how))
    train_eval.main(["herding", "kcenter", "--metrics", "--runs", "1", "--epochs", "1", "--ipc", "1"])
    assert calls == [1]


def test_timms_networks_see_images_in_their_own_size_colours_and_normalisation(monkeypatch):
    create = timm.create_model
    seen = []

    def untrained(name, pretrained, num_classes):
        assert pretrained and num_classes == 0
        network = create(name, pretrained=False, num_classes=0)
        network.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
        return network
    monkeypatch.setattr(timm, "create_model", untrained)
    embed = features.pretrained("test_resnet", torch.device("cpu"))
    images = torch.randint(0, 256, (130, 1, 8, 8), dtype=torch.uint8)       # grey, more than one batch
    images[0] = 255
    found = embed(images)
    config = timm.get_pretrained_cfg("test_resnet")
    assert len(found) == 130 and found.ndim == 2 and seen[0].shape[1:] == config.input_size
    white = (1 - torch.tensor(config.mean)) / torch.tensor(config.std)
    assert torch.allclose(seen[0][0], white.view(3, 1, 1).expand(config.input_size), atol=1e-5)


def test_features_that_cannot_be_had_are_refused(narrow, sentence, monkeypatch):
    def offline(*args, **how):
        raise OSError("no route to the hub")
    argv = ["full", "--runs", "1", "--epochs", "1"]
    assert "together with --metrics" in sentence(train_eval.main, *argv, "--features", "timm:resnet18")
    assert "judge, or timm:NAME" in sentence(train_eval.main, *argv, "--metrics", "--features", "clip")
    monkeypatch.setattr(timm, "create_model", offline)
    said = sentence(train_eval.main, *argv, "--metrics", "--features", "timm:resnet18")
    assert "no route to the hub" in said and "leave --features out" in said
