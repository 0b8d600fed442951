"""benchmarks/cifar100.py goes from an archive to its tables, at sizes of no meaning, and can be stopped."""
import dataclasses
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import torch

import cifar100
import cifar100_rows
import diffusion
import pages
import report
import sample
import train_eval
from nanodd import files, recipes
from nanodd.data import datasets
from nanodd.judging import results
from nanodd.networks import training
from nanodd.sampling import stores
from test_challenge_data import FINE, write_cifar
from pages import PAGES, stands_once
from torchvision.datasets import CIFAR100

CHALLENGE, README = PAGES["docs/challenge.md"], PAGES["README.md"]


@pytest.fixture
def archive(tmp_path, monkeypatch, narrow, clock):
    """CIFAR-100's archive with five pictures a class, and the proof at its least; only drawing takes time."""
    write_cifar(tmp_path / "archive", CIFAR100, FINE, monkeypatch)
    least = cifar100_rows.TINY._replace(base="--steps 4", tune="--steps 2", student="--steps 1", budget=.3,
                                        last=.6, epochs=1)
    monkeypatch.setattr(cifar100_rows, "TINY", least)
    monkeypatch.setattr(cifar100_rows, "matrix_rate", lambda *_: 1e12)
    return ["--root", str(tmp_path / "archive"), "--tiny", "--device", "cpu"]


def rows():
    return [json.loads(line) for line in pathlib.Path("out/cifar100-few/rows.jsonl").read_text().splitlines()]


def again(words):
    """As in a new process, which has run nothing yet."""
    cifar100_rows.type_in.cache_clear()
    cifar100.main(words)


def test_it_measures_every_row_once_and_says_how(archive, capsys):
    again(archive)
    found = rows()
    assert len(found) == 20 and "20 of 20 rows are in out/cifar100-few/rows.jsonl" in capsys.readouterr().out
    for row in found:
        assert row["command"] and row["seconds"] >= 0
        assert row["device"] in ("cpu", "cpu bf16") and row["seed"] == 0 and row["data"] == "cifar100-few"
        assert row["table"] in ("speed", "choice") or 0 <= row["metrics"]["precision"] <= 1
    by = {(row["table"], row["row"], row["asked"]): row for row in found}
    chosen = max((row for row in found if row["table"] == "choice"), key=lambda row: row["mean"])
    last = by["last", "distilled", None]
    assert (last["model"], last["steps"], last["guidance"]) == ("base", chosen["steps"], chosen["guidance"])
    assert last["protocol"] == "challenge" and last["budget"] == .6 == by["last", "distilled", 2]["budget"]
    assert by["last", "distilled", 2]["ipc"] == 2 and by["sweep", "base", 2]["guidance"] == chosen["guidance"]
    assert by["sweep", "base", 2]["protocol"] == "short" == by["sweep", "all real images", None]["protocol"]
    assert {row["ipc"] for row in found if row["table"] == "choice"} == {4}     # rivals of one size
    assert all("minimax.py" in by["sweep", f"+ min-max, {memory}", 2]["command"].split("; ")[0]
               for memory in ("FIFO", "adaptive"))
    assert "--oversample 4" in by["sweep", "base, a quarter kept", 2]["command"]
    assert "--modes 2" in by["sweep", "base, towards modes", 2]["command"]
    assert by["sweep", "one-step student", 1]["sampler"] == "turbo"
    tables = pathlib.Path("out/cifar100-few/tables.md").read_text()
    assert f"{by['last', 'distilled', 1]['mean']:.1f} ±" in tables and "–" not in tables
    names = [line.split("|")[1].strip() for line in tables.split("| trained on")[2].splitlines()[2:]
             if line.startswith("|")]
    assert len(set(names)) == len(names) - 1                    # random real ones are there at two sizes
    assert tables.count("\n| ") == 3 + sum(row["table"] != "speed" for row in found)
    assert pathlib.Path("out/cifar100-few/cifar100-steps.png").is_file()
    weights = pathlib.Path("out/cifar100-few/weights/cifar100-few/base.safetensors")
    header = files.read_header(weights)
    assert {row["weights"] for row in found if row.get("model") == "base"} == {header["rounded_from"]}
    assert header["rounded_from"] != header["fingerprint"]
    again(archive)
    assert rows() == found                                      # nothing is measured twice


def test_rows_of_two_models_are_never_mixed(archive, monkeypatch, capsys):
    jobs = cifar100_rows.jobs
    monkeypatch.setattr(cifar100_rows, "jobs", lambda scale: dict(list(jobs(scale).items())[:3]))
    again(archive)
    found = rows()
    shutil.rmtree("out/cifar100-few")                           # a machine was lost, but not its rows
    scale = cifar100_rows.TINY
    scale.rows.parent.mkdir()
    scale.rows.write_text("".join(json.dumps(row) + "\n" for row in found[:2]))
    again(archive)
    assert [row["weights"] for row in rows()] == [found[0]["weights"]] * 3       # the same model, made again
    shutil.rmtree("out/cifar100-few")
    scale.rows.parent.mkdir()
    scale.rows.write_text("".join(json.dumps(row) + "\n" for row in found[:2]))
    monkeypatch.setattr(cifar100_rows, "TINY", scale._replace(base="--steps 3"))
    cifar100_rows.type_in.cache_clear()
    model = "out/cifar100-few/weights/cifar100-few/base.safetensors"
    assert f"rows of another {model}" in refused(archive, capsys)
    assert not pathlib.Path("out/cifar100-few/bench").exists()  # before anything is drawn


@pytest.mark.parametrize("where, name, call", [
    (training.Trainer, "step", 6),                            # the second of fine-tuning
    (stores.NpzFile, "write", 2), (stores.NpzFile, "finalise", 3),
    (train_eval, "accuracy", 11)], ids=["tuning", "drawing", "joining", "judging"])
def test_it_is_stopped_in_the_middle_and_goes_on(where, name, call, archive, monkeypatch, capsys):
    calls, real = [], getattr(where, name)

    def interrupted(*args, **how):
        calls.append(1)
        if len(calls) == call:
            raise cifar100.TimeIsUp
        return real(*args, **how)
    jobs = cifar100_rows.jobs
    monkeypatch.setattr(cifar100_rows, "jobs", lambda scale: dict(list(jobs(scale).items())[:13]))
    monkeypatch.setattr(where, name, interrupted)
    with pytest.raises(SystemExit) as stop:
        again(archive)
    kept = rows() if cifar100_rows.TINY.rows.exists() else []
    assert stop.value.code == 1 and len(kept) < 13 and len(calls) >= call
    assert "measures the others" in capsys.readouterr().err
    again(archive)
    assert rows()[:len(kept)] == kept and len(rows()) == 13


def test_the_clock_rings(archive, capsys):
    with pytest.raises(SystemExit) as stop:
        again([*archive, "--minutes", "0.001"])
    assert stop.value.code == 1 and "the time is up\n0 of 20 rows" in capsys.readouterr().out
    assert "--minutes must be positive" in refused([*archive, "--minutes", "0"], capsys)


def refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cifar100.main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_cpu_is_not_kept_busy_for_weeks(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "there is no GPU here" in refused([], capsys)


def test_the_tables_of_the_page_are_what_was_measured():
    measured = results.read_rows(cifar100_rows.FULL.rows)
    for name, part in cifar100.tables(measured).items():
        assert stands_once(name, part), name
    for row in measured:
        assert row["command"] and row["seconds"] > 0 and row["device"] and row["seed"] >= 0
        assert row["data"] == "cifar100" and not re.search(r"(?<![\w.])/\w", row["command"])
        assert row["table"] in ("speed", "choice") or row["runs"] == len(row["accuracy"]) == 3


def test_the_numbers_in_prose_are_those_of_the_rows():
    by = {report.key(row): row for row in results.read_rows(cifar100_rows.FULL.rows)}
    last, real = by["last", "distilled", None], by["sweep", "all real images", None]
    models = [by["sweep", name, 10] for name in ("base", "+ min-max, adaptive", "+ min-max, FIFO")]
    own, adaptive, fifo = (f"{100 * row['metrics']['recognised']:.0f} %" for row in models)
    own_recall, real_recall = last["metrics"]["recall"], real["metrics"]["recall"]
    ten, some = by["last", "distilled", 10], by["sweep", "real, at random", 50]
    for text in (f"With all its images {last['mean']:.1f} %, with the first 10 a class {ten['mean']:.1f} %.",
                 f"All real images make {real['mean']:.1f} % by the shorter protocol",
                 f"the {last['images']:,} images have a recall of {own_recall:.2f}, the "
                 f"{real['images']:,} real ones {real_recall:.2f}; precision is "
                 f"{last['metrics']['precision']:.2f} and {real['metrics']['precision']:.2f}.",
                 f"Random real ones, 50 a class, make {some['mean']:.1f} % (judged on a CPU): more than "
                 f"the base model's {models[0]['ipc']} a class. They are as recognisable, and more varied "
                 f"(recall {some['metrics']['recall']:.2f})", f"and so train for {last['epochs']}:",
                 f"recognises {own} of the base model's images as their own class, {adaptive} after "
                 f"fine-tuning with the self-adaptive memory and {fifo} with the FIFO one"):
        assert text in CHALLENGE
    assert (f"trains judges to {report.spread(last)} %, n = 3; all real images, by a shorter protocol, to "
            f"{report.spread(real)}; 50 random real ones a class beat {models[0]['ipc']} drawn") in README
    assert some["mean"] > models[0]["mean"] and f"{models[0]['metrics']['recognised']:.2f}" == "0.68"
    assert all(row["metrics"]["recall"] > models[0]["metrics"]["recall"] for row in models[1:])
    assert all(row["metrics"]["precision"] < models[0]["metrics"]["precision"] for row in models[1:])
    best = max((row for row in by.values() if row["table"] == "sweep" and row["row"] == "base"),
               key=lambda row: row["mean"])
    assert best["steps"] == 10 and "Ten is the best of four counts" in CHALLENGE
    assert last["drawn"] < cifar100_rows.FULL.last == 60 and last["mean"] > 40.61


def test_the_model_that_comes_with_the_code_draws(monkeypatch, tmp_path):
    """Its classes are CIFAR-100's, in their order, and no two of its images are the same."""
    path = pages.ROOT / "weights" / "cifar100" / "base.safetensors"
    header = files.read_header(path)
    assert header["classes"] == FINE and header["rounded_from"] == next(
        row["weights"] for row in results.read_rows(cifar100_rows.FULL.rows) if row.get("model") == "base")
    assert path.stat().st_size < 16e6 and f"in {path.stat().st_size / 1e6:.0f} MB" in CHALLENGE
    (tmp_path / "weights").symlink_to(pages.ROOT / "weights")
    sample.main(["--data", "cifar100", "--ipc", "1", "--steps", "1", "--guidance", "1", "--device", "cpu",
                 "--npz"])
    with np.load("out/cifar100/distilled.npz") as found:
        images = found["images"].reshape(100, -1)
    assert images.std(axis=1).min() > 0 and len(np.unique(images, axis=0)) == 100


def test_what_is_said_of_the_network_and_the_rows():
    with torch.device("meta"):
        size = sum(p.numel() for p in diffusion.DiT("XS", 32, 2, 3, 100).parameters())
    assert diffusion.SIZES["XS"] == (6, 256, 4) and "256 wide, 6 blocks" in CHALLENGE
    assert f"{size / 1e6:.1f}M parameters" in CHALLENGE


def test_a_table_without_rows_is_a_sentence():
    for name, text in cifar100.tables([]).items():
        empty = text == "No row is measured yet." or text == "No speed is measured yet."
        nothing = text.startswith("0 of 27 rows are measured. Not measured yet: ")
        assert empty or nothing == (name == "cifar100 left")


def test_a_table_has_the_measured_rows_alone_and_all_of_their_cells():
    judged = {"mean": 31.25, "std": .5, "runs": 3, "best": 32., "seconds": 60.4, "epochs": 1001,
              "metrics": {"precision": .5, "recall": .25}, "machine": "a GPU"}
    drawn = {"model": "base", "steps": 10, "drawn": 598.26}
    rows = [{"table": "last", "row": "distilled", "asked": 10, "ipc": 10, **judged, **drawn},
            {"table": "last", "row": "real, at random", "asked": 10, "ipc": 10, **judged},
            {"table": "sweep", "row": "base", "asked": 10, "ipc": 7, **judged, **drawn},
            {"table": "sweep", "row": "all real images", "asked": None, "ipc": 500, **judged}]
    parts = cifar100.tables(rows)
    assert parts["cifar100 last"].splitlines()[2:] == [
        "| real, at random | 10 | not drawn | 1001 | 31.2 ± 0.5 | 0.50 | 0.25 | 60 |",
        "| base, 10 steps | 10 | 598.3 | 1001 | 31.2 ± 0.5 | 0.50 | 0.25 | 60 |", "", "a GPU."]
    assert parts["cifar100 sweep"].splitlines()[2:] == [
        "| all real images | 500 | not drawn | 1001 | 31.2 ± 0.5 | 0.50 | 0.25 |",
        "| base, 10 steps | 7 | 598.3 | 1001 | 31.2 ± 0.5 | 0.50 | 0.25 |", "", "a GPU."]
    for name in ("last", "sweep"):
        assert len({line.count("|") for line in parts[f"cifar100 {name}"].splitlines()[:-2]}) == 1


def test_the_last_rows_keep_to_the_challenges_rules(monkeypatch):
    full, asked = cifar100_rows.FULL, []
    recipe = dataclasses.replace(recipes.RECIPES["cifar100"], protocol="short")
    run = cifar100_rows.Run(scale=full, data_flags="--data cifar100", root=None, device_flags=[], device=None,
                            data=datasets.Data("cifar100", recipe, None, None, ""), comparison=lambda: None)
    monkeypatch.setattr(cifar100_rows, "evaluate",
                        lambda _, data, **how: asked.append((data.recipe, how)) or [{}])
    row = cifar100_rows.real_row("random", 50, "challenge", run)
    (recipe, how), = asked
    assert recipe == recipes.RECIPES["cifar100"] and train_eval.count_epochs(recipe, 5000, 100) == 1001
    assert how["runs"] == 3 and how["epochs"] is None and how["bf16"] is False and how["ipc"] == 50
    assert row["command"].endswith("--protocol challenge --runs 3 --metrics random --ipc 50")
    row = cifar100_rows.judged("set.npz", None, "challenge", run, images=77_600)
    assert asked[1][1]["epochs"] == 64 and row["command"].endswith(" set.npz --epochs 64")
    assert 64 * 77_600 <= 1001 * 50 * 100 < 65 * 77_600 and full.last <= 600


def test_the_sweep_has_fan_et_als_step_counts_and_50():
    full = cifar100_rows.FULL
    assert sorted(full.steps) == [5, 10, 15, 20, 25, 30, 50] and full.tuned == 10
    assert full.budget <= 60
