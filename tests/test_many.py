"""Two processes against one: torchrun on the CPU, both ways through the same script (many.py)."""
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import conftest
import diffusion
import minimax
from nanodd import files
from nanodd.data import imageset
from nanodd.networks import autoencoder, latents

SCRIPT = pathlib.Path(__file__).parent / "many.py"


@pytest.fixture(scope="module")
def both(imagenet_files, tmp_path_factory):
    """A folder with what one process wrote (one/) and what two wrote (two/)."""
    home = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for where, name, value in conftest.shrink():
            patch.setitem(where, name, value)
        minimax.main([])                                        # the base, and what is drawn from
        diffusion.main(["--weights", str(imagenet_files.weights)])
    hub = home / "hub/checkpoints"                              # the published autoencoder, fetched already
    hub.mkdir(parents=True)
    shutil.copy(imagenet_files.vae, hub / f"{autoencoder.PUBLISHED['ema']}.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_HOME": str(home)}
    for out, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone",
                                                "--nproc-per-node=2"])):
        (home / out).mkdir()
        done = subprocess.run([sys.executable, *launcher, str(SCRIPT), *map(str, imagenet_files), out],
                              cwd=home, env=environment, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
        (home / f"{out}.txt").write_text(done.stdout)
        next((home / "out/imagewoof").glob("latents-64-*")).rename(home / out / "latents")
        for kind in ("modes", "real_judge"):                    # each run makes its own
            next((home / "out/digits").glob(f"{kind}-*")).rename(home / out / f"{kind}.safetensors")
    return home


def test_without_lambdas_two_processes_follow_one(both):
    one, two = (files.load_tensors(both / name / "zero/minimax.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and max((one[key] - two[key]).abs().max() for key in one) < 1e-5
    start = files.load_tensors(both / "out/digits/base.safetensors")
    name = "y_embedder.embedding_table.weight"
    assert (one[name] - start[name]).abs().max() > 1e-4          # they did train


def test_a_u_vit_learns_from_two_processes_as_from_one(both):
    one, two = (files.load_tensors(both / name / "uvit/base.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and max((one[key] - two[key]).abs().max() for key in one) < 1e-5


def test_two_processes_distil_as_one_does(both):
    one, two = (files.load_tensors(both / name / "dist/turbo.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and max((one[key] - two[key]).abs().max() for key in one) < 1e-5
    gradients = [torch.load(both / name).tolist()
                 for name in ("one/gradient-0.pt", "two/gradient-0.pt", "two/gradient-1.pt")]
    assert gradients == [3 * [1.0], 3 * [1.5], 3 * [1.5]]


def test_two_processes_share_a_student_and_its_images(both):
    assert files.read_header(both / "two/turbo/turbo.safetensors")["settings"]["processes"] == 2
    assert len(list((both / "two/turbo/distilled").rglob("*.png"))) == 30


def test_the_first_of_two_processes_draws_the_sheets(both):
    for name in ("uvit/base.png", "zero/minimax.png", "woof/minimax.png"):
        one, two = (imageset.open_image(both / out / name).int() for out in ("one", "two"))
        assert one.shape == two.shape and (one - two).abs().max() <= 2


def test_all_processes_take_the_same_decision(both):
    for name, processes in (("one", 1), ("two", 2)):
        decision = json.loads((both / name / "auto/steps.json").read_text())
        drawn = json.loads((both / name / "auto/distilled.json").read_text())
        assert drawn["settings"]["steps"] == decision["steps"] in (1, 2)
        assert decision["settings"]["processes"] == processes and len(decision["rows"]) == 2


def test_with_lambdas_each_process_has_its_own_extremum(both):
    one, two = (files.load_tensors(both / name / "both/minimax.safetensors") for name in ("one", "two"))
    assert max((one[key] - two[key]).abs().max() for key in one) > 1e-5


def test_the_memories_are_equal_on_all_ranks_and_hold_the_whole_batch(both):
    first, second, alone = (torch.load(both / name)
                            for name in ("two/memories-0.pt", "two/memories-1.pt", "one/memories-0.pt"))
    for memory in ("real", "generated"):
        assert first[memory]["seen"] == second[memory]["seen"] == alone[memory]["seen"]
        entries, others, single = (state[memory]["entries"] for state in (first, second, alone))
        assert entries.keys() == others.keys() == single.keys()
        assert all(torch.equal(entries[label], others[label]) for label in entries)
        assert all(entries[label].shape == single[label].shape for label in entries)
    assert all(torch.equal(entries, alone["real"]["entries"][label])
               for label, entries in first["real"]["entries"].items())


def test_two_processes_draw_the_same_files_as_one(both):
    one, two = ({path.relative_to(both / name): path.read_bytes()
                 for path in (both / name / "drawn/distilled").rglob("*.png")} for name in ("one", "two"))
    assert len(one) == 30 and one == two
    assert json.loads((both / "two/drawn/distilled.json").read_text())["ipc"] == 3


def test_two_processes_aim_at_the_same_modes_and_keep_the_same_images(both):
    one, two = ({path.name + path.parent.name: path.read_bytes()
                 for path in (both / name / "kept/distilled").rglob("*.png")} for name in ("one", "two"))
    assert len(one) == 20 and one == two
    assert (both / "one/modes.safetensors").read_bytes() == (both / "two/modes.safetensors").read_bytes()
    kept = [json.loads((both / name / "kept/distilled.json").read_text())["kept"] for name in ("one", "two")]
    assert kept[0] == kept[1]


def test_a_budget_ends_for_all_processes_at_once(both):
    record = json.loads((both / "two/budget/distilled.json").read_text())
    drawn = imageset.read_set(both / "two/budget/distilled")
    assert drawn.labels.bincount().tolist() == [record["ipc"]] * 10 and record["ipc"] > 0


def test_processes_share_the_encoding(both):
    one, two = (sorted((both / name).glob("latents/*.safetensors")) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 10
    for here, there in zip(one, two, strict=True):
        assert torch.equal(files.load_tensors(here)["moments"], files.load_tensors(there)["moments"])
        assert latents.cache_header(here) == latents.cache_header(there)


def test_only_the_first_process_speaks(both):
    said = (both / "two.txt").read_text()
    assert said.count("min-max | imagewoof") == 1 and "cpu x 2" in said
