"""benchmarks/cifar100.py goes from an archive to its tables, at sizes of no meaning, and can be stopped."""
import dataclasses
import json
import pathlib
import re
import shutil

import pytest
import torch

import cifar100
import cifar100_rows
import diffusion
import train_eval
from nanodd import recipes
from nanodd.data import datasets
from nanodd.judging import results
from nanodd.networks import training, uvit
from nanodd.sampling import stores
from test_challenge_data import FINE, write_cifar
from pages import PAGES, stands_once
from throughput import flops
from torchvision.datasets import CIFAR100

CHALLENGE = PAGES["docs/challenge.md"]


@pytest.fixture
def archive(tmp_path, monkeypatch, narrow, clock):
    """CIFAR-100's archive with five pictures a class, and the proof at its least; only drawing takes time."""
    write_cifar(tmp_path / "archive", CIFAR100, FINE, monkeypatch)
    least = cifar100_rows.TINY._replace(base="--steps 4", small="--network XS --steps 1", tune="--steps 2",
                                        budget=.3, last=.6, epochs=1)
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
    assert len(found) == 26 and "26 of 26 rows are in out/cifar100-few/rows.jsonl" in capsys.readouterr().out
    for row in found:
        assert row["command"] and row["seconds"] >= 0
        assert row["device"] in ("cpu", "cpu bf16") and row["seed"] == 0 and row["data"] == "cifar100-few"
    by = {(row["table"], row["row"], row["asked"]): row for row in found}
    best = lambda name: max((row for row in found if row["table"] == name), key=lambda row: row["mean"])
    chosen, how, last = best("choice"), best("last choice"), by["last", "distilled", 2]
    assert (last["model"], last["steps"]) == (how["model"], how["steps"])
    assert (last["sampler"], last["guidance"]) == (chosen["sampler"], chosen["guidance"])
    assert last["protocol"] == "challenge" and last["ipc"] == 2 and last["budget"] == .6
    assert by["sweep", "base", 2]["protocol"] == "short" == by["sweep", "all real images", None]["protocol"]
    for name in ("choice", "last choice"):                      # rivals are compared at one size
        assert len({row["ipc"] for row in found if row["table"] == name}) == 1
    assert "minimax.py" in by["sweep", "+ min-max, adaptive", 2]["command"].split("; ")[1]
    tables = pathlib.Path("out/cifar100-few/tables.md").read_text()
    assert f"{by['last', 'distilled', 1]['mean']:.1f} ±" in tables and "–" not in tables
    assert tables.count("\n| ") + 1 == 2 + sum(row["table"] in ("last", "sweep") for row in found)
    assert pathlib.Path("out/cifar100-few/cifar100-steps.png").is_file()
    weights = pathlib.Path("out/cifar100-few/weights/cifar100-few/base.safetensors")
    assert by["sweep", "smaller base", 2]["bytes"] == weights.stat().st_size
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
    scale.rows.write_text(json.dumps(found[0]) + "\n")
    monkeypatch.setattr(cifar100_rows, "TINY", scale._replace(base="--steps 3"))
    cifar100_rows.type_in.cache_clear()
    assert "rows of another out/cifar100-few/base.safetensors" in refused(archive, capsys)
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
    assert stop.value.code == 1 and "the time is up\n0 of 26 rows" in capsys.readouterr().out
    assert "--minutes must be positive" in refused([*archive, "--minutes", "0"], capsys)


def refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cifar100.main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_cpu_is_not_kept_busy_for_weeks(capsys, monkeypatch):
    monkeypatch.setattr(cifar100.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cifar100.torch.backends.mps, "is_available", lambda: False)
    assert "there is no GPU here" in refused([], capsys)


def test_the_tables_of_the_page_are_what_was_measured():
    measured = results.read_rows(cifar100_rows.FULL.rows)
    for name, part in cifar100.tables(measured).items():
        assert stands_once(name, part), name
    for row in measured:
        assert row["command"] and row["seconds"] > 0 and row["device"] and row["seed"] >= 0
        assert row["data"] == "cifar100" and not re.search(r"(?<![\w.])/\w", row["command"])
        assert row["table"] in ("speed", "choice", "last choice") or row["runs"] == len(row["accuracy"]) == 3


def test_what_is_said_of_the_networks_follows_from_them():
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in diffusion.DiT(name, 32, 2, 3, 100).parameters())
                 for name in ("S", "XS")}
    assert diffusion.SIZES["XS"] == (6, 256, 4) and "256 wide, 6 blocks" in CHALLENGE
    assert f"DiT-S/2 has {2 * sizes['S'] / 1e6:.0f} MB in bfloat16" in CHALLENGE
    assert f"has {2 * sizes['XS'] / 1e6:.0f} MB, so that" in CHALLENGE and 2 * sizes["XS"] < 16e6 - 1e5
    assert f"it says {len(cifar100_rows.jobs(cifar100_rows.FULL))} of" in CHALLENGE
    with torch.device("meta"):
        x, t, y = torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        dit, u = (flops(lambda net=net: net(x, t, y)) for net in (diffusion.DiT("S", 32, 2, 3, 100),
                                                                 uvit.UViT("S", 32, 2, 3, 100)))
    assert dit / u == pytest.approx(0.5, abs=0.02)


def test_a_table_without_rows_is_a_sentence_that_says_what_it_will_have():
    parts, full = cifar100.tables([]), cifar100_rows.FULL
    numbers = lambda name: set(map(int, re.findall(r"\d+", parts[f"cifar100 {name}"])))
    for name in ("last", "sweep", "speed"):
        text = parts[f"cifar100 {name}"]
        assert re.match(r"No (row|speed) is measured yet: ", text) and not re.search(r"[|–\n]", text)
    assert numbers("last") == {*full.real, *full.ipcs} and not numbers("speed")
    assert numbers("sweep") == {*full.real, *full.steps, *full.tuned}


def test_a_table_has_the_measured_rows_alone_and_all_of_their_cells():
    judged = {"mean": 31.25, "std": .5, "runs": 3, "best": 32., "seconds": 60.4, "epochs": 1001}
    drawn = {"model": "base", "steps": 10, "drawn": 598.26, "command": "python a; python b; python c"}
    rows = [{"table": "last", "row": "distilled", "asked": 10, "ipc": 10, **judged, **drawn},
            {"table": "last", "row": "real, at random", "asked": 10, "ipc": 10, **judged,
             "command": "python d"},
            {"table": "sweep", "row": "base", "asked": 10, "ipc": 7, **judged, **drawn},
            {"table": "sweep", "row": "all real images", "asked": None, "ipc": 500, **judged,
             "command": "python e"}]
    parts = cifar100.tables(rows)
    assert parts["cifar100 last"].splitlines()[2:] == [
        "| real, at random | 10 | 31.2 ± 0.5 (3) | 32.0 | 60 | `python d` |",
        "| base, 10 steps, drawn in 598.3 s | 10 | 31.2 ± 0.5 (3) | 32.0 | 60 | "
        "`python a; python b; python c` |"]
    assert parts["cifar100 sweep"].splitlines()[2:] == [
        "| all real images | 500 | 31.2 ± 0.5 (3) | 1001 | `python e` |",
        "| base, 10 steps, drawn in 598.3 s | 7 | 31.2 ± 0.5 (3) | 1001 | `python b` |"]
    for name in ("last", "sweep"):
        assert len({line.count("|") for line in parts[f"cifar100 {name}"].splitlines()}) == 1


def test_the_last_rows_keep_to_the_challenges_rules(monkeypatch):
    full, asked = cifar100_rows.FULL, []
    recipe = dataclasses.replace(recipes.RECIPES["cifar100"], protocol="short")
    run = cifar100_rows.Run(scale=full, data_flags="--data cifar100", root=None, device_flags=[], device=None,
                            data=datasets.Data("cifar100", recipe, None, None, ""))
    monkeypatch.setattr(cifar100_rows, "evaluate",
                        lambda _, data, **how: asked.append((data.recipe, how)) or [{}])
    row = cifar100_rows.judged("random", 50, "challenge", run)
    (recipe, how), = asked
    assert recipe == recipes.RECIPES["cifar100"] and train_eval.count_epochs(recipe, 5000, 100) == 1001
    assert how["runs"] == 3 and how["epochs"] is None and how["bf16"] is False and how["ipc"] == 50
    assert row["command"].endswith("--data cifar100 --protocol challenge --runs 3 random --ipc 50")
    assert full.last == 600


def test_the_sweep_has_fan_et_als_step_counts_and_50():
    assert cifar100_rows.FULL.steps == (5, 10, 15, 20, 25, 30, 50) and cifar100_rows.FULL.tuned == (10, 50)
    assert cifar100_rows.FULL.budget <= 60
