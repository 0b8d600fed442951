"""Drawing too many and keeping the best: which are kept, what the budget counts, and that it resumes."""
import json
import pathlib

import pytest
import torch

import minimax
import sample
from conftest import drawn_files
from nanodd.data import datasets
from nanodd.sampling import oversample


def test_herding_keeps_the_images_whose_mean_is_the_real_images():
    real = torch.randn(50, 4) + 1
    around = real.mean(0) + torch.tensor([[1., 0, 0, 0], [-1, 0, 0, 0]])
    features = torch.cat([torch.randn(20, 4) - 1, around])
    assert sorted(oversample.keep_in_class(features, torch.zeros(22), real, 2, "herding")) == [20, 21]


def test_kcenter_keeps_images_far_apart():
    features = torch.tensor([[0.], [0.1], [0.2], [10.], [10.1], [-9.]])
    kept = oversample.keep_in_class(features, torch.zeros(6), features, 3, "kcenter")
    assert 5 in kept and (3 in kept or 4 in kept)


def test_the_band_is_the_middle_of_the_confidences():
    confidence = torch.tensor([0.9, 0.1, 0.5, 0.4, 0.6, 0.99])
    assert oversample.keep_in_class(torch.randn(6, 2), confidence, torch.randn(6, 2), 2, "band") == [2, 4]
    assert sorted(oversample.keep_in_class(torch.randn(6, 2), confidence, None, 4, "band")) == [0, 2, 3, 4]


@pytest.mark.parametrize("rule", oversample.RULES)
def test_the_kept_images_are_images_of_the_pool(tuned, narrow, rule, capsys):
    argv = ["--steps", "3", "--ipc", "2", "--oversample", "3", "--keep", rule]
    sample.main(argv)
    said = capsys.readouterr().out
    assert "20 images | 2 a class" in said and "180 network evaluations" in said     # 60 images, 3 calls each
    kept, pool = drawn_files("out/digits"), drawn_files("out/digits/pool")
    assert len(kept) == 20 and len(pool) == 60
    for c in range(10):
        of = [{content for name, content in drawn.items() if f"/{c}/" in name} for drawn in (kept, pool)]
        assert of[0] <= of[1]
    record, drawn = (json.loads(pathlib.Path(path, "distilled.json").read_text())
                     for path in ("out/digits", "out/digits/pool"))
    assert record["settings"]["oversample"] == [3, rule, "2", "inf"] and record["ipc"] == 2
    assert record["seconds"] == drawn["seconds"] > 0 and "oversample" not in drawn["settings"]
    of_class = sorted(pathlib.Path("out/digits/pool/distilled/3").iterdir())
    for k, position in enumerate(record["kept"][3]):
        kept_file = pathlib.Path(f"out/digits/distilled/3/{k:05}.png")
        assert kept_file.read_bytes() == of_class[position].read_bytes()
    sample.main(argv)
    assert "left as it is" in capsys.readouterr().out


def test_all_drawing_counts_against_the_budget(tuned, narrow, clock):
    sample.main(["--steps", "3", "--seconds", "1", "--batch", "10", "--oversample", "3"])
    record, pool = (json.loads(pathlib.Path(path, "distilled.json").read_text())
                    for path in ("out/digits", "out/digits/pool"))
    assert pool["ipc"] == 8 and record["ipc"] == 8 // 3 and record["budget"] == 1
    assert record["seconds"] == pool["seconds"] <= 1


def test_a_set_of_another_size_is_not_added_to(tuned, narrow, sentence):
    """The best 4 of 12 need not hold the best 2 of 6."""
    argv = ["--steps", "3", "--oversample", "3", "--ipc"]
    sample.main([*argv, "2"])
    assert "other settings (pool" in sentence(sample.main, *argv, "4")
    sample.main([*argv, "4", "--overwrite"])
    assert len(drawn_files("out/digits")) == 40 and len(drawn_files("out/digits/pool")) == 120


def test_another_choice_from_the_same_pool_draws_nothing(tuned, narrow, monkeypatch):
    argv = ["--steps", "3", "--ipc", "2", "--oversample", "4"]
    sample.main(argv)
    monkeypatch.setattr(sample, "draw", lambda *args, **how: pytest.fail("drawn again"))
    sample.main([*argv, "--keep", "kcenter", "--overwrite"])
    assert json.loads(pathlib.Path("out/digits/distilled.json").read_text())["settings"]["oversample"][1] \
        == "kcenter"


def test_a_checkpoint_of_some_classes_is_chosen_from_by_their_names(tuned, narrow, monkeypatch):
    minimax.main(["--classes", "5-9", "--out", "out/part"])
    labels = []
    monkeypatch.setattr(oversample, "keep_in_class", lambda features, confidence, real, ipc, rule:
                        labels.append(len(real)) or list(range(ipc)))
    sample.main(["--checkpoint", "out/part/minimax-5-9.safetensors", "--steps", "2", "--ipc", "1",
                 "--oversample", "2", "--out", "out/drawn"])
    assert labels == datasets.load().train.labels.bincount()[5:].tolist()


def test_a_rule_without_a_surplus_is_refused(tuned, sentence):
    assert "without --oversample" in sentence(sample.main, "--keep", "band")


def test_too_short_a_budget_for_the_best_is_said(tuned, narrow, clock, sentence):
    said = sentence(sample.main, "--steps", "3", "--seconds", "0.5", "--batch", "10", "--oversample", "9")
    assert "--oversample 9 keeps none" in said


def test_a_run_stopped_while_keeping_draws_nothing_again(tuned, narrow, monkeypatch):
    argv = ["--steps", "3", "--ipc", "2", "--oversample", "2", "--npz"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(oversample, "keep_in_class", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        sample.main(argv)
    pool = pathlib.Path("out/digits/pool/distilled.npz").read_bytes()
    monkeypatch.setattr(sample, "draw", lambda *args, **how: pytest.fail("drawn again"))
    sample.main(argv)
    assert pathlib.Path("out/digits/pool/distilled.npz").read_bytes() == pool
    assert json.loads(pathlib.Path("out/digits/distilled.json").read_text())["ipc"] == 2
