"""Files of the user's beside ours, two commands at once, and stops of every kind."""
import errno
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import diffusion
import minimax
import sample
import train_eval
from conftest import drawn_files
from nanodd import cli, files, locks
from nanodd.data import datasets
from nanodd.errors import UserError
from nanodd.judging import judges
from nanodd.networks import checkpoint, latents
from nanodd.sampling import pilots, sheets, stores

OUT, SET = pathlib.Path("out/digits"), pathlib.Path("out/digits/distilled")


def put(*paths):
    """Writes files of the user's, and returns the function that says whether all are as they were."""
    for path in map(pathlib.Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the user's {path.name}")
    return lambda: all(path.read_text() == f"the user's {path.name}" for path in map(pathlib.Path, paths))


# ----------------------------------------------------------------------------------------------------
# 1. What is not ours


@pytest.mark.parametrize("more", [["--ipc", "2"], ["--seed", "1", "--overwrite"], ["--npz", "--overwrite"]])
def test_files_that_a_user_puts_into_the_set_stay(tuned, capsys, more):
    sample.main(["--ipc", "1", "--steps", "2"])
    own = put(SET / "holiday/beach.png", SET / "3/mine.png", SET / "3/123.png", SET / "notes.txt",
              OUT / "distilled.npz.old/x.npy", OUT / "distilled.npz.parts/mine.npy", OUT / ".pilots/x.png",
              OUT / "judges/notes")
    sample.main(["--ipc", "1", "--steps", "2", *more])
    said = capsys.readouterr().out
    assert own() and "left as they are: other files in out/digits/distilled, 4 in all (first: " in said
    ours = [file for file in drawn_files() if file.rsplit("/", 1)[1][:5].isdecimal()]
    assert len(ours) == (20 if more == ["--ipc", "2"] else 0 if "--npz" in more else 10)


def test_the_images_of_a_set_of_other_classes_are_removed_with_it(tuned, pictures):
    sample.main(["--ipc", "1", "--steps", "2"])
    minimax.main(["--data", str(pictures)])
    sample.main(["--data", str(pictures), "--ipc", "1", "--steps", "2", "--out", str(OUT), "--overwrite",
                 "--checkpoint", "out/pictures/minimax.safetensors"])
    assert sorted(path.name for path in SET.iterdir()) == ["ant", "bee"]


@pytest.mark.parametrize("link", ["distilled", "distilled/4"])
@pytest.mark.parametrize("more", [["--ipc", "2"], ["--seed", "1", "--overwrite"]])
def test_nothing_is_written_or_removed_behind_a_link(tuned, sentence, link, more):
    sample.main(["--ipc", "1", "--steps", "2"])
    shutil.move(OUT / link, "album")
    own = put("album/trip.png", "album/00007.png")
    (OUT / link).symlink_to(pathlib.Path("album").resolve())
    before = {path: path.read_bytes() for path in pathlib.Path(".").rglob("*") if path.is_file()}
    said = sentence(sample.main, "--ipc", 1, "--steps", 2, *more)
    assert f"out/digits/{link} is a link to " in said and own()
    del before[OUT / ".nanodd.lock"]
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.parametrize("name, main, argv", [
    ("pool", sample.main, ["--ipc", "1", "--steps", "2", "--oversample", "2"]),
    (".pilots", sample.main, ["--steps", "auto", "--seconds", "1"]),
    ("results.jsonl", train_eval.main, ["full"]), ("judges", train_eval.main, ["full"])])
def test_no_other_link_in_the_folder_is_followed(tuned, narrow, sentence, name, main, argv):
    own = put("album/distilled/0/00000.png", "album/seed0.pt")
    (OUT / name).symlink_to(pathlib.Path("album").resolve())
    assert f"out/digits/{name} is a link to " in sentence(main, *argv) and own()
    assert len(list(pathlib.Path("album").rglob("*"))) == 4


def test_pictures_and_logs_that_are_not_ours_are_not_replaced(tuned, sentence, capsys):
    for main, name, argv in ((sample.main, "distilled.png", ["--ipc", "1"]),
                             (sample.main, "distilled.npz", ["--ipc", "1"]),
                             (diffusion.main, "base.log.jsonl", []), (diffusion.main, "base.png", []),
                             (minimax.main, "minimax.png", ["--base", str(OUT / "base.safetensors")]),
                             (sample.main, "steps.json", ["--steps", "auto", "--seconds", "1"]),
                             (train_eval.main, "results.jsonl", [str(SET)])):
        if main is train_eval.main:
            sample.main(["--ipc", "1", "--steps", "2"])
        own = put(f"mine/{name}")
        for more in ([], ["--overwrite"] * (main is not train_eval.main)):
            said = sentence(main, *argv, *more, "--out", "mine")
            assert name in said and ("ELSEWHERE" in said or "delete that line" in said) and own(), said
        shutil.rmtree("mine")


def test_results_are_not_written_among_the_pictures(pictures, sentence, monkeypatch, tmp_path):
    own = put(tmp_path / ".lock")
    for main in (diffusion.main, minimax.main, sample.main, train_eval.main):
        for out in (pictures, pictures / "new", "pictures/../pictures/ant"):
            said = sentence(main, "--data", pictures, "--out", out)
            assert f"would be read as pictures of {pictures}: choose --out ELSEWHERE" in said
    monkeypatch.chdir(pictures)
    assert "choose --out ELSEWHERE, or another working directory" in sentence(diffusion.main, "--data", ".")
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        shutil.copytree(pictures, f"whole/{part}")
    assert "would be read" in sentence(diffusion.main, "--data", "whole", "--out", "whole/train/new")
    diffusion.main(["--data", "whole", "--out", "whole/new", "--dry-run"])  # beside the two: no class
    diffusion.main(["--data", "whole", "--out", ".", "--skip-broken"])
    assert own() and pathlib.Path(".nanodd.lock").exists()


def test_the_next_command_leaves_out_broken_pictures_too(pictures, capsys):
    (pictures / "ant/0.png").write_bytes(b"")
    diffusion.main(["--data", str(pictures), "--skip-broken"])
    assert f"-> python minimax.py --data {pictures} --skip-broken" in capsys.readouterr().out


def test_sheets_and_logs_of_ours_are_known_again(tuned):
    (OUT / "base.safetensors").unlink()
    assert sheets.is_sheet(OUT / "base.png") and checkpoint.is_log(OUT / "base.log.jsonl")
    diffusion.main([])                                          # the user removed the checkpoint alone
    (OUT / "base.safetensors").unlink()
    (OUT / "base.log.jsonl").unlink()
    diffusion.main([])
    sample.main(["--ipc", "1"])
    shutil.rmtree(SET)
    (OUT / "distilled.json").unlink()
    sample.main(["--ipc", "1"])
    assert sheets.is_sheet(OUT / "distilled.png") and not sheets.is_sheet(SET / "0/00000.png")


def test_pilots_leave_what_they_did_not_draw(tuned, clock, monkeypatch):
    monkeypatch.setattr(pilots, "CANDIDATES", (1, 2))
    monkeypatch.setattr(pilots, "judge_of_pilots", lambda *_: lambda folder: 50.0)
    own = put(OUT / ".pilots/mine.png", OUT / ".pilots/distilled/0/mine.png")
    sample.main(["--steps", "auto", "--seconds", "1.5", "--batch", "10"])
    assert own() and not list((OUT / ".pilots").rglob("0000*"))
    shutil.rmtree(OUT / ".pilots")
    (OUT / "steps.json").unlink()
    sample.main(["--steps", "auto", "--seconds", "1.5", "--batch", "10", "--overwrite"])
    assert not (OUT / ".pilots").exists()


def test_a_kill_while_a_set_is_removed_leaves_an_unfinished_set(tuned, monkeypatch, capsys):
    argv = ["--ipc", "2", "--steps", "2"]
    sample.main(argv)
    whole = drawn_files()

    def killed(self):
        self.file(3, 1).unlink()
        raise SystemExit(9)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(stores.PngFolder, "remove", killed)
        sample.main([*argv, "--seed", "1", "--overwrite"])
    sample.main(argv)                                           # the old settings: what is missing comes back
    assert drawn_files() == whole
    sample.main([*argv, "--seed", "1", "--overwrite"])
    assert drawn_files().keys() == whole.keys() and drawn_files() != whole


# ----------------------------------------------------------------------------------------------------
# 2. Two at once


@pytest.fixture
def other(tuned):
    """out/digits as another process has it locked."""
    with open(OUT / ".nanodd.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("4711 (since 2026-11-26 05:21:23)")
        file.flush()
        yield


def test_the_second_command_on_a_folder_is_refused(other, sentence, narrow):
    words = ("out/digits is in use by process 4711 (since 2026-11-26 05:21:23): wait until it ends, or "
             "choose --out ELSEWHERE")
    before = {path: path.stat().st_mtime_ns for path in OUT.iterdir()}
    for main, argv in ((diffusion.main, ["--seed", "1", "--overwrite"]),
                       (minimax.main, ["--seed", "1", "--overwrite"]), (sample.main, ["--ipc", "1"]),
                       (sample.main, ["--ipc", "1", "--npz"]),
                       (sample.main, ["--steps", "auto", "--seconds", "1"]), (train_eval.main, ["full"])):
        assert words in sentence(main, *argv)
    assert {path: path.stat().st_mtime_ns for path in OUT.iterdir()} == before
    sample.main(["--ipc", "1", "--out", "elsewhere"])           # reading is no use of the folder


def test_pictures_are_encoded_by_one_command_at_a_time(imagenet):
    data = datasets.load("imagewoof", imagenet.root)
    run = cli.Run("", torch.device("cpu"), 0, False, None, False, False, str(imagenet.vae))
    whole = latents.prepared(data, run)
    locks.release()
    cache = next(pathlib.Path("out/imagewoof").glob("latents-*"))
    with open(cache / ".nanodd.lock", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert torch.equal(latents.prepared(data, run).moments, whole.moments)      # reading takes no lock
        next(cache.glob("*.safetensors")).unlink()
        with pytest.raises(UserError, match="latents-64-.* is in use by process"):
            latents.prepared(data, run)
    assert torch.equal(latents.prepared(data, run).moments, whole.moments)


def test_a_result_that_another_command_just_finished_is_not_replaced(monkeypatch, sentence):
    """It was not there when this command looked first, and was when it had the lock."""
    diffusion.main(["--seed", "1", "--out", "other"])
    real = checkpoint.claim

    def late(path):
        shutil.copy("other/base.safetensors", path)
        real(path)
    OUT.mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "claim", late)
    assert "seed 1 there, 0 here" in sentence(diffusion.main)
    assert pathlib.Path("other/base.safetensors").read_bytes() == (OUT / "base.safetensors").read_bytes()


def test_a_file_that_another_command_fetches_is_not_fetched_twice(tmp_path):
    (tmp_path / "there").write_bytes(bytes(10))
    with open(tmp_path / "here.part", "wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another command is fetching .*here: wait"):
            files.download((tmp_path / "there").as_uri(), tmp_path / "here", "wait")
    files.download((tmp_path / "there").as_uri(), tmp_path / "here", "wait")
    assert (tmp_path / "here").read_bytes() == bytes(10)


def test_a_folder_that_cannot_be_written_needs_no_lock(tuned, monkeypatch, capsys):
    sample.main(["--ipc", "1", "--steps", "2"])
    (OUT / ".nanodd.lock").unlink()

    def readonly(path, flags, mode):
        raise OSError(error, os.strerror(error), str(path))
    monkeypatch.setattr(locks.os, "open", readonly)
    error = errno.EROFS
    monkeypatch.setattr(os, "access", lambda *_: False)
    sample.main(["--ipc", "1", "--steps", "2"])
    said = capsys.readouterr()
    assert "left as it is" in said.out and "cannot be locked" not in said.err
    error = errno.EACCES                                        # another user's, in a folder of a group
    monkeypatch.setattr(os, "access", lambda *_: True)
    sample.main(["--ipc", "1", "--steps", "2"])
    assert "out/digits cannot be locked (Permission denied)" in capsys.readouterr().err


def test_a_lock_is_taken_once_and_given_back(tmp_path):
    locks.take(tmp_path / "a")
    locks.take(tmp_path / "a/../a")
    with open(tmp_path / "a/.nanodd.lock", "r+") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locks.release()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_system_without_locks_is_warned_of(tuned, monkeypatch, capsys):
    def unsupported(file):
        raise OSError(errno.ENOTSUP, "Operation not supported")
    monkeypatch.setattr(locks, "lock", unsupported)
    sample.main(["--ipc", "1"])
    assert "out/digits cannot be locked (Operation not supported)" in capsys.readouterr().err
    assert len(drawn_files()) == 10


def test_a_lock_is_not_followed_to_a_file_of_the_users(tuned, sentence):
    own = put("mine.txt")
    (OUT / ".nanodd.lock").unlink()
    (OUT / ".nanodd.lock").symlink_to(pathlib.Path("mine.txt").resolve())
    assert "cannot read or write" in sentence(sample.main, "--ipc", 1) and own()


def test_of_two_commands_at_once_one_draws_and_one_is_refused(tuned):
    """As two terminals would; the slower one of them finds either the lock, or the finished set."""
    code = (f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
            "import conftest, sample\n"
            "for where, name, value in conftest.shrink(): where[name] = value\n"
            "sample.main(['--npz', '--ipc', '60', '--steps', '9', '--batch', '8'])")
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True) for _ in range(2)]
    said = [(*run.communicate(), run.returncode) for run in runs]
    assert sorted(rc for _, _, rc in said) in ([0, 2], [0, 0]), said
    for out, error, rc in said:
        assert "saved out/digits/distilled.npz" in out or "left as it is" in out if rc == 0 else \
            f"out/digits is in use by process {runs[0].pid}" in error or \
            f"out/digits is in use by process {runs[1].pid}" in error
    labels = np.load(OUT / "distilled.npz")["labels"]
    assert np.bincount(labels).tolist() == [60] * 10
    assert len(np.load(OUT / "distilled.npz")["images"]) == 600


# ----------------------------------------------------------------------------------------------------
# 3. Stops, disks, leftovers


def spent(argv, monkeypatch, after):
    """Runs sample.main(argv) until `after` blocks are drawn; the record then says 1.8 seconds."""
    drawn, real = [0], stores.PngFolder.write

    def write(self, items, images):
        real(self, items, images)
        drawn[0] += 1
        if drawn[0] == after:
            raise SystemExit(9)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(stores.PngFolder, "write", write)
        sample.main(argv)
    path = OUT / "distilled.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 1.8}))
    return path


def test_a_budget_that_a_killed_run_has_spent_ends_with_the_rounds_that_are_there(tuned, clock, monkeypatch):
    argv = ["--seconds", "1.5", "--steps", "2", "--batch", "10"]
    path = spent(argv, monkeypatch, 3)
    sample.main(argv)
    record = json.loads(path.read_text())
    assert record["ipc"] == 3 and record["budget"] == 1.5 and round(record["seconds"], 9) == 1.8
    drawn = drawn_files()
    sample.main(["--ipc", "3", "--steps", "2", "--batch", "10", "--out", "whole"])
    assert drawn == drawn_files("whole") and len(drawn) == 30


def test_a_first_block_that_is_on_disk_is_a_round(tuned, clock, monkeypatch):
    argv = ["--seconds", "0.9", "--steps", "2", "--batch", "20"]
    path = spent(argv, monkeypatch, 1)
    sample.main(argv)
    assert json.loads(path.read_text())["ipc"] == 2


def test_a_spent_budget_without_a_complete_round_is_refused_each_time(tuned, clock, monkeypatch, sentence):
    argv = ["--seconds", "0.9", "--steps", "2", "--batch", "5"]
    spent(argv, monkeypatch, 1)
    for _ in range(2):
        assert "too short for one image of each class" in sentence(sample.main, *argv)
    late = ["--seconds", "0.1", "--steps", "2", "--batch", "20", "--out", "late"]
    for _ in range(2):                                          # the first block takes more than the budget
        assert "too short for one image of each class" in sentence(sample.main, *late)


def test_blocks_of_a_larger_set_that_was_stopped_are_left_out(tuned, monkeypatch):
    argv, write, drawn = ["--npz", "--steps", "2", "--batch", "20"], stores.NpzFile.write, []
    sample.main([*argv, "--ipc", "3", "--out", "whole"])

    def killed(self, items, images):
        if len(drawn) == 3:
            raise SystemExit(9)
        drawn.append(write(self, items, images))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(stores.NpzFile, "write", killed)
        sample.main([*argv, "--ipc", "8"])
    sample.main([*argv, "--ipc", "3"])
    one, two = (np.load(out / "distilled.npz") for out in (pathlib.Path("whole"), OUT))
    assert len(two["images"]) == 30 and (one["images"] == two["images"]).all()
    assert not (OUT / "distilled.npz.parts").exists()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error", "x"), OSError("encoder error -2"),
                                   FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
                                   OSError(errno.ENOSPC, "No space left on device")], ids=str)
def test_a_disk_that_fails_gets_a_sentence_and_the_same_command_resumes(tuned, monkeypatch, sentence, error):
    sample.main(["--ipc", "2", "--steps", "2", "--batch", "10", "--out", "whole"])
    write, calls = os.replace, [0]

    def fails(*paths):
        calls[0] += 1
        if calls[0] == 15:
            raise error
        return write(*paths)
    argv = ["--ipc", "2", "--steps", "2", "--batch", "10"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        said = sentence(sample.main, *argv)
    assert "cannot read or write: " in said and said.endswith("and the same command resumes")
    sample.main(argv)
    assert drawn_files() == drawn_files("whole") and not list(OUT.rglob("*.tmp"))


def test_a_folder_that_is_removed_in_the_middle_gets_a_sentence(tuned, monkeypatch, sentence, tmp_path):
    draw = sample.draw

    def removes(*args, **pull):
        shutil.rmtree("mine")
        pathlib.Path("mine").write_text("a file in its place")
        return draw(*args, **pull)
    monkeypatch.setattr(sample, "draw", removes)
    assert "cannot make the folder mine" in sentence(sample.main, "--ipc", 1, "--out", "mine")


def test_out_that_is_a_link_to_itself_gets_a_sentence(sentence):
    os.symlink("out", "out")
    for main, argv in ((diffusion.main, []), (minimax.main, []), (train_eval.main, ["full"])):
        assert "symbolic link" in sentence(main, *argv)
    for main, argv in ((diffusion.main, []), (minimax.main, []), (train_eval.main, ["full"])):
        assert "cannot make the folder out" in sentence(main, *argv, "--out", "out")


def test_what_killed_processes_left_is_removed_and_nothing_else(tuned):
    dead, alive = 2**22 + 1, os.getppid()                       # above the largest number of a process
    sample.main(["--ipc", "1", "--steps", "2"])
    gone = [f"{OUT}/.base.resume.pt.{dead}.nanodd.tmp", f"{SET}/3/.00001.png.{dead}.nanodd.tmp",
            f"{OUT}/.x.png.{os.getpid()}.nanodd.tmp"]
    kept = [f"{OUT}/.base.resume.pt.{alive}.nanodd.tmp", f"{OUT}/.mine.nanodd.tmp", f"{SET}/.notes",
            f"{OUT}/.mine.{dead}.tmp"]
    put(*gone)
    own = put(*kept)
    sample.main(["--ipc", "2", "--steps", "2"])
    assert own() and not any(map(os.path.exists, gone))


def test_of_two_commands_that_make_a_cache_the_later_takes_what_the_other_saved(tmp_path):
    path = tmp_path / "modes.safetensors"

    def make():
        files.save_tensors(path, {"x": torch.ones(1)}, {"seed": 0})         # the other one, in the meantime
        return {"x": torch.zeros(1)}
    assert files.cached(path, {"seed": 0}, make)["x"] == 1
    assert files.cached(path, {"seed": 1}, lambda: {"x": torch.zeros(1)})["x"] == 0


def test_a_sheet_is_there_before_its_checkpoint(monkeypatch):
    """A run that is killed between the two has no reason to draw it later."""
    def killed(*_):
        assert sheets.is_sheet(OUT / "minimax.png")
        raise SystemExit(9)
    diffusion.main([])
    monkeypatch.setattr(checkpoint, "save_checkpoint", killed)
    with pytest.raises(SystemExit, match="9"):
        minimax.main([])


def test_the_state_of_a_base_model_that_was_killed_at_its_end_is_removed_by_fine_tuning(tuned):
    state = OUT / "base.resume.pt"
    files.save_state(state, {"settings": files.read_header(OUT / "base.safetensors")["settings"]})
    minimax.main([])
    assert not state.exists()


def test_the_states_of_judges_go_with_their_row_and_leave_other_files(tmp_path):
    checkpoint = judges.JudgeCheckpoint(tmp_path / "row")
    own = put(tmp_path / "row/mine")
    (tmp_path / "row/seed0.pt").write_bytes(b"")
    checkpoint.remove()
    assert own() and not (tmp_path / "row/seed0.pt").exists()
    assert os.listdir(tmp_path / "row") == ["mine"]
