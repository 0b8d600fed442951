"""Shared by all tests: they run offline, on a CPU, each in an empty folder of its own."""
import dataclasses
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")                   # tests run side by side, a core each

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import convnet
import diffusion
import minimax
import sample
import train_eval
from nanodd import files, locks, recipes
from nanodd.data import archives
from nanodd.judging import judges
from nanodd.networks import autoencoder, uvit
from nanodd.sampling import distilled


def shrink():
    """(where, name, value): networks and training lengths that take a blink.

    ImageNet's is as wide as a network must be to work in bfloat16, on the devices that gain from it.
    """
    short = {"network": "mini", "steps": 6, "batch": 8, "tune_steps": 4, "tune_batch": 8}
    return [(diffusion.SIZES, "mini", (2, 32, 2)), (uvit.SIZES, "mini", (2, 32, 2)),
            (diffusion.SIZES, "wide", (2, 192, 3)),
            (recipes.RECIPES, "digits",
             dataclasses.replace(recipes.RECIPES["digits"], epochs=4, views=600, **short)),
            (recipes.RECIPES, "folder",
             dataclasses.replace(recipes.RECIPES["folder"], size=8, judge_size=8, patch=2, epochs=2,
                                 views=200, **short)),
            (recipes.RECIPES, "imagenet",
             dataclasses.replace(recipes.RECIPES["imagenet"], size=8, judge_size=32,
                                 weights="DiT-wide-2-64x64", network="wide", tune_batch=4))]


def dry_run(argv):
    """What `python diffusion.py --dry-run` says of a data set."""
    diffusion.main([*argv, "--dry-run"])


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty current directory, and the small recipes; folders that the test locked are released."""
    monkeypatch.chdir(tmp_path)
    for where, name, value in shrink():
        monkeypatch.setitem(where, name, value)
    torch.manual_seed(0)
    yield
    locks.release()


@pytest.fixture
def narrow(monkeypatch):
    """Quick judges, for tests of what stands around them; tables call them by their usual name."""
    monkeypatch.setitem(convnet.JUDGES, "convnet3",
                        ("ConvNetD3-W128", functools.partial(convnet.ConvNet, width=8)))


@pytest.fixture(scope="session")
def tuned_files(tmp_path_factory):
    """A folder where minimax.py was run once: out/digits with base.safetensors and minimax.safetensors."""
    home = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for where, name, value in shrink():
            patch.setitem(where, name, value)
        minimax.main([])
    return home


@pytest.fixture
def tuned(tuned_files, workplace):
    """The test's own copy of what minimax.py wrote."""
    shutil.copytree(tuned_files / "out", "out")


@pytest.fixture
def clock(monkeypatch):
    """A clock for budgets that only drawing moves: an eighth of a second for each block. [seconds]"""
    now, draw = [0.0], sample.draw

    def timed(*args, **pull):
        now[0] += 1 / 8
        return draw(*args, **pull)
    monkeypatch.setattr(sample, "draw", timed)
    monkeypatch.setattr(distilled, "clock", lambda: now[0])
    return now


def train_judge(images, test, recipe, epochs, seed, checkpoint=None, **how):
    """One judge alone: (judge, accuracies), as train_eval.train_judges has them."""
    row = judges.Row([images], [seed], epochs, checkpoint=checkpoint or judges.JudgeCheckpoint())
    [([trained], _)] = train_eval.train_rows([row], test, recipe, **how)
    return trained


def evaluate(source, data, pda=0, **how):
    """The row of a single source."""
    [row] = train_eval.evaluate([(source, pda)], data, **how)
    return row


def half_right(rows, *args, **how):
    """In place of train_eval.train_rows: trains nothing, and all judges are right half of the time."""
    for row in rows:
        yield [(None, [50.])] * len(row.seeds), 0.


def drawn_files(out="out/digits"):
    """{path in the set: bytes} of a distilled set of PNG files."""
    return {path.relative_to(out).as_posix(): path.read_bytes()
            for path in pathlib.Path(out).glob("distilled/*/*.png")}


@pytest.fixture
def pictures(tmp_path):
    """A folder of two classes of 12x10 pictures, made here: dark "ant", bright "bee", 10 each."""
    root = tmp_path / "pictures"
    random = np.random.default_rng(0)
    for name, level in (("ant", 40), ("bee", 200)):
        (root / name).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(level - 30, level + 30, (10, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


class ImageNet(NamedTuple):
    """What a user has at hand: root/train, root/val, the published weights and the autoencoder's."""
    root: pathlib.Path
    weights: pathlib.Path
    vae: pathlib.Path


@pytest.fixture(scope="session")
def imagenet_files(tmp_path_factory):
    """Two training pictures and one to test on of each ImageWoof class, one grey, one CMYK, under their real
    wnids; random weights of a small DiT in the published layout, and of a narrow autoencoder.
    """
    home, random = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for k, wnid in enumerate(archives.SUBSETS["imagewoof"]):
        for part, names in (("train", (f"{wnid}_1.JPEG", f"{wnid}_2.JPEG")),
                            ("val", (f"ILSVRC2012_val_{k:08}.JPEG",))):
            (home / "root" / part / wnid).mkdir(parents=True)
            for name in names:
                picture = Image.fromarray(random.integers(0, 255, (72, 90, 3)).astype(np.uint8))
                mode = {(0, "train"): "L", (1, "train"): "CMYK"}.get((k, part), "RGB")
                picture.convert(mode).save(home / "root" / part / wnid / name)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        for where, name, value in shrink():
            patch.setitem(where, name, value)
        model = diffusion.DiT("wide", 8, 2, 4, 1000, learned_variance=True)
        torch.nn.init.normal_(model.final_layer.linear.weight, std=0.03)
        torch.save(model.state_dict(), home / "DiT-wide.pt")
        patch.setattr(autoencoder, "WIDTHS", NARROW)
        safetensors.torch.save_file(autoencoder.Autoencoder().state_dict(), home / "vae.safetensors")
    return ImageNet(home / "root", home / "DiT-wide.pt", home / "vae.safetensors")


NARROW = (32, 32, 64, 64)                                       # a quick autoencoder


@pytest.fixture
def imagenet(imagenet_files, tmp_path, monkeypatch):
    """The same, in a copy of the test's own; the autoencoder is the narrow one."""
    monkeypatch.setattr(autoencoder, "WIDTHS", NARROW)
    shutil.copytree(imagenet_files.root, tmp_path / "imagenet")
    return imagenet_files._replace(root=tmp_path / "imagenet")


@pytest.fixture
def sentence(capsys):
    """Runs a script's main, which must refuse: returns the sentence it left on stderr, exit code 2."""
    def refuse(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, argv)))
        said = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and said
        return said.splitlines()[-1]
    return refuse


@pytest.fixture
def kill_and_resume(monkeypatch, capsys):
    """Starts a module's main(argv) in its own process, SIGKILLs it once a file is there, and resumes it here.

    No second file is renamed into its place after that one, so that the process cannot end before it is
    killed, however slow this one is. Returns what the resumed run printed.
    """
    here = pathlib.Path(__file__).parent

    def run(module, argv, file):
        argv = list(map(str, argv))
        code = (f"import os, pathlib, sys, time; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n"
                f"import conftest, {module}\n"
                f"for where, name, value in conftest.shrink(): where[name] = value\n"
                f"conftest.files.SAVE_EVERY, replace = 0, os.replace\n"
                f"wait = pathlib.Path({str(file)!r}).exists\n"
                f"os.replace = lambda *paths: time.sleep(999) if wait() else replace(*paths)\n"
                f"{module}.main({argv!r})")
        victim = subprocess.Popen([sys.executable, "-c", code])
        while not pathlib.Path(file).exists():
            assert victim.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        monkeypatch.setattr(files, "SAVE_EVERY", 0)
        capsys.readouterr()
        sys.modules[module].main(argv)
        return capsys.readouterr().out
    return run
