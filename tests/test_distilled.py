"""Sets that are nested, balanced, inside their budget, and the same after a stop."""
import json
import math
import pathlib

import pytest
import torch
from torchvision.datasets import ImageFolder

import sample
from conftest import drawn_files
from nanodd.data import imageset
from nanodd.sampling import distilled, stores


def test_blocks_are_rounds_cut_at_the_batch():
    block = distilled.block
    assert block(0, 4, 3) == [(0, 0), (1, 0), (2, 0), (0, 1)] and block(1, 4, 3)[0] == (1, 1)
    assert block(1, 4, 3, total=6) == [(1, 1), (2, 1)] and block(2, 4, 3, total=6) == []


def test_a_set_is_an_image_folder_with_its_labels(tuned, capsys):
    sample.main(["--ipc", "2", "--steps", "3"])
    folder = ImageFolder("out/digits/distilled")
    assert folder.classes == [str(c) for c in range(10)] and len(folder) == 20
    record = json.loads(open("out/digits/distilled.json").read())
    assert record["classes"] == folder.classes and record["ipc"] == 2 and record["settings"]["steps"] == 3
    assert "20 images | 2 a class" in capsys.readouterr().out
    assert pathlib.Path("out/digits/distilled.png").exists()


def test_smaller_sets_are_nested_in_larger_ones(tuned, capsys):
    sample.main(["--ipc", "3", "--out", "whole", "--batch", "7"])
    sample.main(["--ipc", "1", "--out", "grown", "--batch", "7"])
    small = drawn_files("grown")
    sample.main(["--ipc", "3", "--out", "grown", "--batch", "7"])
    assert drawn_files("grown") == drawn_files("whole") and set(small) < set(drawn_files("whole"))
    sample.main(["--ipc", "2", "--out", "grown", "--batch", "7"])
    assert "left as it is" in capsys.readouterr().out and drawn_files("grown") == drawn_files("whole")


def test_another_batch_size_moves_one_grey_level_at_most(tuned):
    sample.main(["--ipc", "3", "--out", "a", "--batch", "30", "--sampler", "ddpm"])
    sample.main(["--ipc", "3", "--out", "b", "--batch", "4", "--sampler", "ddpm"])
    a, b = (imageset.read_set(f"{out}/distilled", 8, 1).images.int() for out in "ab")
    assert (a - b).abs().max() <= 1


def test_a_stopped_set_resumes_to_the_same_bytes(tuned):
    sample.main(["--ipc", "4", "--batch", "8"])
    whole = drawn_files()
    for lost in ("distilled/3/00001.png", "distilled/9/00003.png", "distilled/0/00003.png"):
        pathlib.Path("out/digits", lost).unlink()
    record = pathlib.Path("out/digits/distilled.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "ipc": 0}))
    sample.main(["--ipc", "4", "--batch", "8"])
    assert drawn_files() == whole


def test_a_killed_set_resumes_to_the_same_bytes(tuned, kill_and_resume):
    argv = ["--ipc", "20", "--steps", "5", "--batch", "20", "--checkpoint", "out/digits/minimax.safetensors"]
    sample.main([*argv, "--out", "whole"])
    kill_and_resume("sample", [*argv, "--out", "cut"], "cut/distilled/3/00004.png")
    assert drawn_files("cut") == drawn_files("whole") and len(drawn_files("whole")) == 200


def test_a_budget_keeps_complete_rounds_only(tuned, clock, capsys, sentence):
    sample.main(["--seconds", "1.5", "--steps", "2", "--batch", "16"])
    record = json.loads(open("out/digits/distilled.json").read())
    counts = [len(list(folder.iterdir())) for folder in pathlib.Path("out/digits/distilled").iterdir()]
    assert counts == [record["ipc"]] * 10 and record["ipc"] == 12 * 16 // 10 and record["seconds"] == 1.5
    sample.main(["--seconds", "1.5", "--steps", "2", "--batch", "16"])
    assert "left as it is" in capsys.readouterr().out
    sample.main(["--minutes", "0.04", "--steps", "2", "--batch", "16"])
    more = json.loads(open("out/digits/distilled.json").read())    # the cut-off block again, and 6 more
    assert more["ipc"] == 18 * 16 // 10 and more["seconds"] == 1.5 + 7 / 8  # added up over resumes
    assert "Raise --seconds" in sentence(sample.main, "--seconds", "1e-9", "--batch", 3, "--out", "short")


def test_the_end_is_late_by_what_the_last_block_takes_longer_than_others(monkeypatch, tmp_path, capsys):
    now, longer = [0.0], iter([.25, .25, .25, 1.0, 1.0])
    monkeypatch.setattr(distilled, "clock", lambda: now[0])

    def draw(items):
        now[0] += next(longer)
        return torch.zeros(len(items), 1, 2, 2, dtype=torch.uint8)
    record = {"classes": ["a", "b"], "seconds": 0.0}
    store = stores.PngFolder(tmp_path, record["classes"])
    assert len(distilled.fill(draw, store, record, math.inf, 1.0, 2, lambda record: None)) == 2 * 4
    assert record["seconds"] == 1.0 + (1.0 - .25)
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())               # where the user reads of --seconds
    assert said.count("only if the longest block so far would still fit") == 2


def test_the_first_block_warms_up_and_is_forgotten(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(distilled, "clock", lambda: now[0])

    def draw(items):
        now[0] += 3.0 if now[0] == 0 else 0.1                  # compiling, say
        return torch.zeros(len(items), 1, 2, 2, dtype=torch.uint8)
    record = {"classes": ["a", "b"], "seconds": 0.0}
    store = stores.PngFolder(tmp_path, record["classes"])
    kept = distilled.fill(draw, store, record, math.inf, 6.55, 2, lambda record: None)
    assert len(kept) == 2 * 36                                     # 3 s, then 35 rounds of 0.1 s
    now[0], record, drawn = 0.0, {"classes": ["a", "b"], "seconds": 0.0}, []

    def stopped(items):
        drawn.append(items)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(items)
    store = stores.PngFolder(tmp_path / "stopped", record["classes"])
    with pytest.raises(KeyboardInterrupt):
        distilled.fill(stopped, store, record, math.inf, 10.05, 2, lambda record: None)
    now[0] = 0.0                                                 # another process, which warms up as well
    kept = distilled.fill(draw, store, record, math.inf, 10.05, 2, lambda record: None)
    assert len(kept) == 2 * 42                                     # 3 s and 3 s, then 40 rounds of 0.1 s
    record["seconds"] = 7.0                                      # spent: what is there is the set
    assert len(distilled.fill(draw, store, record, math.inf, 6.5, 2, lambda record: None)) == 2 * 42


def test_an_npz_holds_the_same_images(tuned):
    sample.main(["--ipc", "3", "--batch", "8"])
    sample.main(["--ipc", "3", "--batch", "8", "--npz", "--out", "npz"])
    folder, npz = (imageset.read_set(path, 8, 1) for path in ("out/digits/distilled", "npz/distilled.npz"))
    for c in range(10):
        assert torch.equal(folder.images[folder.labels == c], npz.images[npz.labels == c])
    assert not pathlib.Path("npz/distilled.npz.parts").exists()


def test_what_a_killed_write_left_is_not_joined(tuned):
    words = ["--npz", "--ipc", "2", "--steps", "2", "--batch", "7"]
    sample.main([*words, "--out", "whole"])
    pathlib.Path("cut/distilled.npz.parts").mkdir(parents=True)
    pathlib.Path("cut/distilled.npz.parts/.000000007.npy.123.nanodd.tmp").write_bytes(b"half a block")
    record = json.loads(pathlib.Path("whole/distilled.json").read_text())
    pathlib.Path("cut/distilled.json").write_text(json.dumps({**record, "ipc": 0}))
    sample.main([*words, "--out", "cut"])
    whole, cut = (imageset.read_set(f"{out}/distilled.npz", 8, 1) for out in ("whole", "cut"))
    assert torch.equal(whole.images, cut.images) and torch.equal(whole.labels, cut.labels)
