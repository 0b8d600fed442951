"""Shared by all tests: they run offline, on a CPU, each in an empty folder of its own."""
import dataclasses
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import data as data_module
import diffusion


def shrink():
    """(where, name, value): a network and training lengths that take a blink."""
    recipes = data_module.RECIPES
    short = {"network": "mini", "steps": 6, "batch": 8, "tune_steps": 4, "tune_batch": 8}
    return [(diffusion.SIZES, "mini", (2, 32, 2)),
            (recipes, "digits", dataclasses.replace(recipes["digits"], epochs=4, views=600, **short)),
            (recipes, "folder", dataclasses.replace(recipes["folder"], size=8, judge_size=8, patch=2,
                                                    epochs=2, views=200, **short))]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty current directory, and the small recipes."""
    monkeypatch.chdir(tmp_path)
    for where, name, value in shrink():
        monkeypatch.setitem(where, name, value)
    torch.manual_seed(0)


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
def kill_and_resume():
    """Starts a module's main(argv) in its own process, SIGKILLs it once `when()` is true, runs it again."""
    here = pathlib.Path(__file__).parent

    def run(module, argv, when):
        code = (f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n"
                f"import conftest, diffusion, {module}\n"
                f"for where, name, value in conftest.shrink(): where[name] = value\n"
                f"diffusion.SAVE_EVERY = 0\n{module}.main({list(map(str, argv))!r})")
        victim, deadline = subprocess.Popen([sys.executable, "-c", code]), time.monotonic() + 60
        while not when():
            assert victim.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return run
