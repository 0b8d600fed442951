"""Checkpoints, records and saved states that are damaged, foreign or hostile: each gets a sentence."""
import argparse
import io
import json
import os
import pathlib
import pickle
from contextlib import redirect_stdout

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import diffusion
import minimax
import sample
import train_eval
from conftest import drawn_files
from nanodd import files, running, schema
from nanodd.errors import UserError, printable
from nanodd.judging import judges, results
from nanodd.networks import latents
from nanodd.sampling import stores

BASE = pathlib.Path("out/digits/base.safetensors")


def everything():
    """{path: bytes} of all files in this folder and the one above, which stands for the user's home."""
    home = pathlib.Path.cwd().parent
    return {path: path.read_bytes() for path in home.rglob("*")
            if path.is_file() and path.name != ".nanodd.lock"}


def rewrite(header=None, tensors=None, metadata=None):
    """Writes base.safetensors anew, with other tensors, another header, or text in the header's place."""
    old, header = files.load_tensors(BASE), header or files.read_header(BASE)
    BASE.unlink()                                               # it may be mapped to memory
    safetensors.torch.save_file(old if tensors is None else tensors, BASE,
                                {"nanodd": json.dumps(header)} if metadata is None else metadata)


# ----------------------------------------------------------------------------------------------------
# 1. Headers of checkpoints

NAMES = ["../../x", "/tmp/x", "a/b", "", ".", "..", "nul\0", "x" * 256, 3, None]
HEADERS = [
    *({"classes": [name, *"123456789"]} for name in NAMES),
    {"classes": 10}, {"classes": []}, {"classes": "0123456789"}, {"classes": [*"0023456789"]},
    {"rows": [-2, *range(1, 11)]}, {"rows": [*range(10), 11]}, {"rows": [-1, *range(1, 11)]},
    {"rows": [0, 1]}, {"rows": "0"}, {"rows": [0.5, *range(1, 11)]}, {"rows": [True, *range(1, 11)]},
    {"phase": [9, 0]}, {"phase": ["0", "9"]}, {"phase": [0, 10]}, {"phase": [0]}, {"phase": None},
    {"guidance": "4"}, {"guidance": -1}, {"guidance": float("nan")}, {"guidance": True},
    {"schedule": 3}, {"schedule": "cosine"}, {"latents": 1}, {"data": None}, {"recipe": "none"},
    {"settings": []}, {"command": 1}, {"fingerprint": 0}, {"base": "x"}, {"base": {"file": 1}},
    {"t_star": 0}, {"t_star": "400"}, {"config": []}, {"config": None},
]
CONFIGS = [{"patch": 0}, {"patch": 3}, {"size": 10**9}, {"size": -8}, {"size": 8.5}, {"size": 16},
           {"channels": 0}, {"channels": 3}, {"classes": 10**9}, {"classes": 11}, {"network": "huge"},
           {"network": ["S"]}, {"backbone": "unet"}, {"backbone": "uvit"}, {"backbone": []}, {"surprise": 1},
           {"learned_variance": True}, {"difffit": "yes"}]


@pytest.mark.parametrize("fields", [*HEADERS, *({"config": config} for config in CONFIGS)],
                         ids=lambda fields: repr(fields)[:40])
def test_a_header_that_cannot_be_gets_a_sentence(tuned, sentence, fields):
    header = files.read_header(BASE)
    if isinstance(fields.get("config"), dict):
        fields = {"config": {**header["config"], **fields["config"]}}
    rewrite({**header, **fields})
    before = everything()
    said = sentence(sample.main, "--checkpoint", BASE, "--ipc", 1, "--steps", 2, "--out", "out/mine")
    assert str(BASE) in said or "patches of 3 pixels" in said
    assert any(words in said for words in ("is damaged, or is not a nanoDD checkpoint (", "does not fit",
                                           "do not tile", "was trained with"))
    assert everything() == before                               # nothing was written, nowhere


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", "", "{", "[" * 100_000, '{"classes": 1e999}'])
def test_metadata_of_another_kind_gets_a_sentence(tuned, sentence, text):
    rewrite(metadata={"nanodd": text})
    said = sentence(sample.main, "--checkpoint", BASE, "--ipc", 1, "--steps", 2)
    assert "is damaged, or is not a nanoDD checkpoint (" in said
    assert "is damaged, or is not a nanoDD checkpoint (" in sentence(minimax.main, "--out", "out/again")


def test_tensors_that_are_not_finite_or_no_floats_get_a_sentence(tuned, sentence):
    whole = files.load_tensors(BASE)
    name = min(whole)
    for tensor, words in ((torch.full_like(whole[name], torch.nan), "numbers that are not finite"),
                          (torch.full_like(whole[name], torch.inf), "numbers that are not finite"),
                          (torch.zeros_like(whole[name], dtype=torch.int64), "of the type torch.int64"),
                          (whole[name][:1].clone(), "has shape")):
        rewrite(tensors={**whole, name: tensor})
        said = sentence(sample.main, "--checkpoint", BASE, "--ipc", 1, "--out", "out/mine")
        assert f"{BASE} does not fit the network: {name}" in said and words in said


def test_all_phases_are_checked(tuned, sentence):
    minimax.main(["--phases", "5", "--out", "out/phases", "--base", str(BASE)])
    second = pathlib.Path("out/phases/minimax-5-9.safetensors")
    header, tensors = files.read_header(second), files.load_tensors(second)
    for name in tensors:
        tensors[name] = tensors[name].clone()
    tensors[min(tensors)][:] = torch.nan
    second.unlink()
    files.save_tensors(second, tensors, header)
    said = sentence(sample.main, "--checkpoint", "out/phases")
    assert "5-9.safetensors does not fit the first phase" in said


def test_a_checkpoint_of_other_classes_or_another_size_has_no_modes(tuned, sentence):
    header, words = files.read_header(BASE), ["--checkpoint", BASE, "--ipc", 1, "--steps", 2, "--out", "x"]
    rewrite({**header, "classes": [*"012345678", "nine"]})
    assert "draws the class nine, and digits has no images of it" in sentence(sample.main, *words, "--modes")
    rewrite({**header, "recipe": "folder"})
    assert "draws 1 x 8, and its recipe folder is of 3 x 8" in sentence(sample.main, *words, "--modes")


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tuned, sentence):
    BASE.unlink()
    os.mkfifo(BASE)
    assert "base.safetensors is not a file" in sentence(diffusion.main)
    assert "base.safetensors, which is gone" in sentence(sample.main)
    os.mkfifo("results.jsonl")
    assert "results.jsonl is not a file" in sentence(train_eval.main, "full", "--out", ".")
    os.mkfifo("out/digits/distilled.png")
    diffusion.main(["--out", "new"])
    said = sentence(sample.main, "--checkpoint", "new/base.safetensors", "--ipc", 1)
    assert "distilled.png exists, and nothing says that nanoDD wrote it" in said


# ----------------------------------------------------------------------------------------------------
# 2. Records

RECORDS = ["", "{", "[]", "3", "null", '{"settings": 3}', '{"settings": {}}', "[" * 100_000, "\0" * 50]
VALUES = [{"settings": []}, {"classes": ["../x", *"123456789"]}, {"classes": 3}, {"ipc": "1"}, {"ipc": -1},
          {"ipc": 10**12}, {"seconds": None}, {"seconds": -1}, {"budget": "inf"}, {"longest": []},
          {"kept": 3}, {"kept": [["a"]]}]


@pytest.mark.parametrize("text", RECORDS, ids=lambda text: repr(text)[:30])
def test_a_damaged_record_of_a_set_gets_a_sentence(tuned, sentence, text):
    sample.main(["--ipc", "1", "--steps", "2"])
    drawn = drawn_files()
    pathlib.Path("out/digits/distilled.json").write_text(text)
    for more in ([], ["--overwrite"]):
        said = sentence(sample.main, "--ipc", 2, "--steps", 2, *more)
        assert "distilled.json is damaged, or is not a nanoDD record (" in said and "--out ELSEWHERE" in said
    assert drawn_files() == drawn


@pytest.mark.parametrize("fields", VALUES, ids=lambda fields: repr(fields)[:40])
def test_a_record_with_a_value_that_cannot_be_gets_a_sentence(tuned, sentence, fields):
    record = {"settings": {}, "classes": [*"0123456789"], "ipc": 1, "budget": 0.0, "seconds": 1.0}
    pathlib.Path("out/digits/distilled.json").write_text(json.dumps({**record, **fields}))
    assert "distilled.json is damaged, or is not a nanoDD record (" in sentence(sample.main, "--overwrite")


@pytest.mark.parametrize("text", [*RECORDS, '{"settings": {}, "steps": 0}', '{"steps": "ten"}'],
                         ids=lambda text: repr(text)[:30])
def test_a_damaged_table_of_pilots_gets_a_sentence(tuned, sentence, text):
    pathlib.Path("out/digits/steps.json").write_text(text)
    said = sentence(sample.main, "--steps", "auto", "--seconds", 1)
    assert "steps.json is damaged, or is not a nanoDD table of pilots (" in said


def test_a_record_of_other_classes_is_not_of_this_set(tuned, sentence):
    sample.main(["--ipc", "1", "--npz"])
    path = pathlib.Path("out/digits/distilled.json")
    record = json.loads(path.read_text())
    for classes in (["0", "1", "2"], [*"0123456789", "ten"]):
        path.write_text(json.dumps({**record, "classes": classes}))
        assert "was made with other settings (classes [" in sentence(sample.main, "--ipc", 2, "--npz")
    sample.main(["--ipc", "2", "--npz", "--overwrite"])
    assert np.bincount(np.load("out/digits/distilled.npz")["labels"]).tolist() == [2] * 10


def test_images_of_another_size_in_the_set_get_a_sentence(tuned, sentence):
    sample.main(["--ipc", "1", "--batch", "10"])
    Image.new("RGB", (9, 7)).save("out/digits/distilled/3/00000.png")
    said = sentence(sample.main, "--ipc", 2, "--batch", 10)
    assert "out/digits/distilled is damaged, or is not a set of images" in said


@pytest.mark.parametrize("name, array", [("000000005", np.zeros((3, 1, 8, 8), np.uint8)),
                                         ("000000010", np.zeros((10, 1, 8, 8))),
                                         ("000000010", np.zeros((10, 3, 8, 8), np.uint8))])
def test_a_block_that_is_not_of_the_set_is_not_joined(tuned, monkeypatch, sentence, name, array):
    argv = ["--ipc", "3", "--npz", "--steps", "2", "--batch", "10"]
    with monkeypatch.context() as patch:
        patch.setattr(stores.NpzFile, "finalise", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
        sentence(sample.main, *argv)
    np.save(f"out/digits/distilled.npz.parts/{name}.npy", array)
    said = sentence(sample.main, *argv)
    assert ".npy is damaged, or is not a block of images" in said and "delete it" in said
    parts = pathlib.Path("out/digits/distilled.npz.parts")
    next(part for part in parts.iterdir() if part.name in said).unlink()
    if name != "000000005":                                     # there the one behind it is called wrong
        sample.main(argv)


@pytest.mark.parametrize("tensors", [{}, {"modes": torch.zeros(3)},
                                     {"modes": torch.zeros(10, 2, 1, 8, 8, dtype=torch.int64)},
                                     {"modes": torch.full((10, 2, 1, 8, 8), torch.nan)}],
                         ids=["none", "of another shape", "whole numbers", "not finite"])
def test_modes_of_another_shape_get_a_sentence(tuned, sentence, tensors):
    argv = ["--ipc", "2", "--steps", "2", "--modes"]
    sample.main([*argv, "--out", "whole"])
    path = next(pathlib.Path("out/digits").glob("modes-*"))
    header = files.read_header(path)
    path.unlink()
    files.save_tensors(path, tensors, header)
    assert f"{path} does not fit the data set: modes" in sentence(sample.main, *argv)


def test_positions_that_are_not_in_the_pool_get_a_sentence(tuned, narrow, sentence):
    words = ["--ipc", "1", "--steps", "2", "--oversample", "2"]
    sample.main(words)
    path = pathlib.Path("out/digits/distilled.json")
    for kept in ([[0]] * 9, [[7]] * 10, [[]] * 10):
        path.write_text(json.dumps({**json.loads(path.read_text()), "ipc": 0, "kept": kept}))
        assert 'distilled.json is damaged: "kept" does not fit' in sentence(sample.main, *words)


def test_a_table_of_results_that_is_no_text_gets_a_sentence(sentence):
    pathlib.Path("results.jsonl").write_bytes("{}".encode("utf-16"))
    said = sentence(train_eval.main, "full", "--out", ".")
    assert "results.jsonl is damaged, or is not a nanoDD log" in said


def test_a_row_is_added_on_a_line_of_its_own(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"data": "digits"}')                       # an editor left the last newline out
    results.append_row(results.open_log(tmp_path), {"data": "digits"}, "")
    assert len(results.read_rows(path)) == 2


def test_a_damaged_line_of_results_is_named(tmp_path):
    results.append_row(tmp_path / "results.jsonl", {"data": "digits"}, "python train_eval.py")
    for line in ("{", "[]", "{}", '{"data": 3}'):
        with open(tmp_path / "results.jsonl", "a") as file:
            file.write(line + "\n")
        with pytest.raises(UserError, match="results.jsonl, line 2, is damaged, or is not a nanoDD row"):
            results.open_log(tmp_path)
        text = (tmp_path / "results.jsonl").read_text()
        (tmp_path / "results.jsonl").write_text(text.splitlines()[0] + "\n")
    rows = [{"data": "cifar100", "size": 32}, {"data": "tiny-imagenet", "size": 64, "judge": 3}]
    assert results.challenge_score(rows) is None


# ----------------------------------------------------------------------------------------------------
# 3. Saved states


class Hostile:
    """A pickle of it would write the file "executed" where it is loaded."""
    def __reduce__(self):
        return pathlib.Path("executed").write_text, ("x",)


def damaged_states(whole):
    """Yields the bytes of states that are none, or hurt."""
    yield b""
    yield whole[:-100]
    yield whole[:200]
    yield pickle.dumps(Hostile(), protocol=2)
    yield b"\x80\x02garbage"


def altered_states(state):
    """Yields what is no state, or one with a wrong part."""
    yield torch.zeros(3)
    yield []
    yield {}
    for key in state:
        yield {**state, key: "nonsense"}


def train_stopped(monkeypatch):
    """Runs diffusion.py until its first state is saved, and returns the state's path."""
    with monkeypatch.context() as patch:
        patch.setattr(files, "SAVE_EVERY", 0)
        patch.setattr(files, "save_tensors", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
        with pytest.raises(SystemExit):
            diffusion.main([])
    return pathlib.Path("out/digits/base.resume.pt")


def test_a_damaged_state_of_training_gets_a_sentence_and_runs_nothing(monkeypatch, sentence):
    path = train_stopped(monkeypatch)
    whole, state = path.read_bytes(), torch.load(path)
    trainer = state["trainer"]
    for broken in damaged_states(whole):
        path.write_bytes(broken)
        said = sentence(diffusion.main)
        assert "base.resume.pt is damaged, or is not a nanoDD saved state (" in said
        assert said.endswith(": delete it to start anew")
    hurt = [{**state, "trainer": {**trainer, key: {}}} for key in ("tuned", "average", "optimizer")]
    optimizer = trainer["optimizer"]
    groups, entries = optimizer["param_groups"][0], optimizer["state"]
    hurt += [{**state, "trainer": {**trainer, "optimizer": {**optimizer, **change}}} for change in (
        {"param_groups": [{**groups, "params": [0, *groups["params"][1:-1], 0]}]},      # a segmentation fault
        {"param_groups": []}, {"state": {**entries, 0: {}}}, {"state": {**entries, 0: entries[1]}})]
    hurt += [{**state, "seconds": 1e16}, {**state, "settings": {**state["settings"], "seed": torch.zeros(2)}}]
    for broken in [*altered_states(state), *hurt]:
        torch.save(broken, path)
        assert "is damaged, or is not a nanoDD saved state (" in sentence(diffusion.main), broken
    assert not pathlib.Path("executed").exists()
    path.write_bytes(whole)
    diffusion.main([])                                          # the sound one resumes
    assert BASE.exists() and not path.exists()


def test_a_damaged_state_of_a_judge_gets_a_sentence(tmp_path):
    judge = torch.nn.Linear(2, 2)
    run = judges.JudgeRun(judge, None, 0, torch.Generator(), torch.Generator())
    checkpoint = judges.JudgeCheckpoint(tmp_path)
    checkpoint.save(run, 3, torch.optim.SGD(judge.parameters(), lr=.1), [50.0], 1.0)
    path = checkpoint.path(run)
    whole, state = path.read_bytes(), torch.load(path)
    assert checkpoint.restore(run)[0] == 4
    for broken in damaged_states(whole):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="seed0.pt is damaged, or .* saved state .*: delete it to start"):
            checkpoint.restore(run)
    for broken in altered_states(state):
        torch.save(broken, path)
        with pytest.raises(UserError, match="is damaged, or is not a nanoDD saved state"):
            checkpoint.restore(run)


def test_a_state_beside_a_finished_checkpoint_is_removed(monkeypatch, capsys):
    path = train_stopped(monkeypatch)
    state = path.read_bytes()
    diffusion.main([])
    path.write_bytes(state)                                     # as a kill between the last save and the end
    diffusion.main([])
    assert "is finished" in capsys.readouterr().out and not path.exists()
    path.write_bytes(b"somebody's")
    diffusion.main([])
    assert path.read_bytes() == b"somebody's"


def test_a_damaged_file_of_the_latent_cache_is_no_header(tmp_path):
    path = tmp_path / "x.safetensors"
    assert latents.cache_header(path) == {}
    for header in ({}, {"pictures": "x", "pixels": 64}, {"pictures": 3}):
        files.save_tensors(path, {"moments": torch.zeros(1)}, header)
        assert latents.cache_header(path) == {}


# ----------------------------------------------------------------------------------------------------
# 4. Schemas, and what a terminal is shown


def test_a_schema_says_what_is_wrong():
    form = {"a": int, "b?": [float], "c?": str}
    for value, words in (({"a": 1}, None), ({"a": 1, "b": [1, 2.5], "c": "x", "more": 0}, None),
                         ({}, "it lacks a"), (3, "it is 3, not a dict"),
                         ({"a": True}, "a is True, not of the type int"),
                         ({"a": 1, "b": 2}, "b is 2, not a list"),
                         ({"a": 1, "b": [float("nan")]}, "an entry of b is nan, not of"),
                         ({"a": 1, "c": None}, "c is None, not of the type str")):
        found = schema.mismatch(value, form)
        assert found is None if words is None else found.startswith(words)


def test_class_names_that_only_other_systems_refuse_are_fine():
    assert schema.are_names(["CON", "dot.", "space ", "a:b", "é", "\U0001f41c", "-rf", "~", "$HOME", ".x"])
    for names in ([], ["a", "a"], ["a", 3]):
        with pytest.raises(UserError, match="x.npz has"):
            schema.check_names(names, "x.npz")


def test_what_a_terminal_would_obey_is_printed_as_escapes(capsys):
    parser, args = argparse.ArgumentParser(prog="a test"), argparse.Namespace()
    with running.command(parser, args):
        print("class \x1b]0;owned\x07, \u202eabc\n\ttabs and é stay")
    said = capsys.readouterr().out
    assert said == "class \\x1b]0;owned\\x07, \\u202eabc\n\ttabs and é stay\n"
    with pytest.raises(SystemExit), running.command(parser, args):
        raise UserError("no class \x1b[2J")
    assert capsys.readouterr().err == "a test: no class \\x1b[2J\n"
    with pytest.raises(SystemExit), running.command(parser, args):
        raise UserError("no class a\nb")
    assert capsys.readouterr().err == "a test: no class a\\nb\n"
    assert printable("ant \udcff, é", "ascii") == "ant \\udcff, \\xe9"


def test_a_terminal_without_accents_prints_escapes(pictures):
    (pictures / "ant").rename(pictures / "fourmi é 蟻")
    with io.TextIOWrapper(io.BytesIO(), "ascii") as terminal:
        with redirect_stdout(terminal):
            diffusion.main(["--data", str(pictures), "--dry-run"])
        terminal.flush()
        assert b"fourmi \\xe9 \\u87fb" in terminal.buffer.getvalue()


@pytest.mark.parametrize("main, flag", [
    *((main, "--seed") for main in (diffusion.main, minimax.main, sample.main, train_eval.main)),
    (minimax.main, "--slots"), (minimax.main, "--batch"), (sample.main, "--ipc"), (train_eval.main, "--size"),
    (train_eval.main, "--runs")])
def test_a_number_that_torch_cannot_take_gets_a_sentence(main, flag, sentence):
    for value in ("99999999999999999999", "-99999999999999999999"):
        assert f"{flag} {value} is too large a number" in sentence(main, f"{flag}={value}")
