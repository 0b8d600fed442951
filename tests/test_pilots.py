"""--steps auto: pilots, their judges, and the decision."""
import argparse
import json
import pathlib

import pytest
import torch

import sample
import train_eval
from nanodd.data import datasets, imageset
from nanodd.sampling import pilots


def test_auto_takes_the_steps_whose_pilot_makes_the_best_judge(tuned, clock, capsys, monkeypatch, sentence):
    monkeypatch.setattr(pilots, "CANDIDATES", (1, 2, 3))
    worth, judged = iter([50.0, 70.0, 60.0]), []

    def judge(place):
        judged.append(imageset.read_set(place, 8, 1))
        return next(worth)
    monkeypatch.setattr(pilots, "judge_of_pilots", lambda *args: judge)
    words = ["--steps", "auto", "--seconds", "1", "--batch", "10"]
    sample.main(words)
    said = capsys.readouterr().out
    found = json.loads(pathlib.Path("out/digits/steps.json").read_text())
    assert found["steps"] == 2 and "-> 2 steps" in said and "ddim, 2 steps" in said
    assert [row["steps"] for row in found["rows"]] == [1, 2, 3]
    for row, pilot in zip(found["rows"], judged, strict=True):
        assert row["pilot"] == len(pilot.labels) == 80 and f"{row['steps']:5} | " in said
        assert row["images"] == pytest.approx(10 / row["seconds_per_batch"], rel=0.01)
    assert json.loads(pathlib.Path("out/digits/distilled.json").read_text())["settings"]["steps"] == 2
    assert not pathlib.Path("out/digits/.pilots").exists()
    sample.main(words)                                             # asks no judge again
    assert "has decided on 2 steps" in capsys.readouterr().out
    said = sentence(sample.main, "--steps", "auto", "--seconds", "2", "--batch", "10")
    assert "holds a set already, and no steps.json says" in said   # refused before it takes time
    assert "add --seconds or --minutes" in sentence(sample.main, "--steps", "auto")
    said = sentence(sample.main, "--steps", "auto", "--seconds", "1e-9", "--batch", 3, "--out", "short")
    assert "too short for one image of each class" in said


def test_pilots_take_no_longer_than_the_budget_or_a_minute():
    assert pilots.pilot_share(2) == 1 and pilots.pilot_share(600) == pytest.approx(1 / 7)
    assert 7 * 10 * pilots.pilot_share(10) == pytest.approx(60)


def test_a_pilot_is_judged_on_training_images_held_back(tuned, narrow):
    sample.main(["--ipc", "2", "--steps", "2"])
    seen = []

    def watched(trains, test, *rest, **how):
        seen.append(test)
        return train_eval.train_judges(trains, test, *rest, **how)
    for validation in (False, True):
        args = argparse.Namespace(data="digits", root=None, skip_broken=False, validation=validation, seed=0)
        worth = pilots.judge_of_pilots(args, "digits", torch.device("cpu"), watched, train_eval.count_epochs)
        assert 0 <= worth("out/digits/distilled") <= 100
    train, fewer = datasets.load().train.images, datasets.load(validation=True)
    whole = {image.numpy().tobytes() for image in train}
    rest = {image.numpy().tobytes() for image in fewer.train.images}
    assert torch.equal(seen[0].images, fewer.test.images) and len(seen[0].labels) == 252
    assert all(image.numpy().tobytes() in whole for image in seen[0].images)
    assert all(image.numpy().tobytes() in rest for image in seen[1].images)
