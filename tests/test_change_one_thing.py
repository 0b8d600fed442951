"""docs/change_one_thing: each worked diff is short, applies to the code as it is, and does what it says."""
import json
import math
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DIFFS = ROOT / "docs/change_one_thing"

# What the changed copy of the code runs; it prints what the tests below look at.
CODE = """
import functools, json, sys
sys.path[:0] = sys.argv[1:]
import conftest, convnet, diffusion, memory, minimax, sample, torch, train_eval
from gaussian import errors
from nanodd import files
from nanodd.sampling import solvers
for where, name, value in conftest.shrink():
    where[name] = value
convnet.JUDGES["convnet3"] = "ConvNetD3-W8", functools.partial(convnet.ConvNet, width=8)
schedule, seen = diffusion.Schedule(), {}

seen["heun"] = errors("heun", (20, 40), schedule, "quadratic")
seen["ddim"] = errors("ddim", (40,), schedule, "quadratic")
seen["calls"] = len(solvers.call_times(sample.sampler_of("heun", 20)))

stays = torch.zeros(100)                                        # how often entry k of a stream of 100 stays
for seed in range(600):
    kept = memory.Memory(10, "random", seed)
    for batch in torch.arange(100.).view(20, 5, 1):
        kept.push(0, batch)
    stays[kept.get(0).flatten().long()] += 1
seen["random"] = (stays / 600).tolist()

z, entries = torch.randn(5, 8), torch.randn(7, 8)
seen["soft"] = [float(f(z, None, entries)) for f in (minimax.CRITERIA["soft"][1], minimax.diversity)]
minimax.main(["--memory", "random", "--slots", "2", "--criterion", "soft"])
seen["settings"] = files.read_header("out/digits/minimax.safetensors")["settings"]
sample.main(["--sampler", "heun", "--steps", "3", "--ipc", "2"])

ramp = torch.linspace(0, 1, 9).expand(4, 1, 9, 9)
step = (ramp > 0.5).float()
blurred = [train_eval.FAMILIES["blur"](x, torch.Generator().manual_seed(0)) for x in (ramp, step)]
seen["blur"] = [float((blurred[0] - ramp)[..., 1:-1].abs().max()), float((blurred[1] - step).abs().max())]
seen["challenge"] = train_eval.CHALLENGE_FAMILIES
train_eval.main(["distilled", "--augment", "blur", "--runs", "1", "--epochs", "1", "--ipc", "1"])
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What CODE prints of a copy of the code to which all diffs were applied; they change one file each."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "nanodd", copy / "nanodd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    subprocess.run(["git", "init", "--quiet"], cwd=copy, check=True)        # or git applies them to a parent
    subprocess.run(["git", "apply", *sorted(DIFFS.glob("*.diff"))], cwd=copy, check=True)
    done = subprocess.run([sys.executable, "-c", CODE, copy, copy / "tests"], cwd=copy, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("diff", sorted(DIFFS.glob("*.diff")), ids=lambda path: path.stem)
def test_each_adds_eight_lines_at_most_at_one_place(diff):
    lines = diff.read_text().splitlines()
    added = [line for line in lines if line[:1] == "+" and not line.startswith("+++") and line[1:].strip()]
    assert len(added) <= 8 and sum(line.startswith("@@") for line in lines) == 1
    assert f"[{diff.name}]({diff.name})" in (DIFFS / "README.md").read_text()


def test_heun(seen):
    """A second-order sampler: half the step, a quarter of the error; two network calls a step, then one."""
    few, many = seen["heun"]
    assert 3.4 < few / many < 5.2 and many < seen["ddim"][0] / 10
    assert seen["calls"] == 2 * 19 + 1


def test_random(seen):
    """Whatever was pushed stays with the same chance: 10 slots for 100 entries."""
    deviation = math.sqrt(0.1 * 0.9 / 600)
    assert all(abs(share - 0.1) < 5 * deviation for share in seen["random"])
    assert seen["settings"]["memory"] == ["random", "random"]


def test_criterion(seen):
    """A smooth maximum lies above the largest of 35 cosines, by log(35) / 10 at most."""
    soft, largest = seen["soft"]
    assert largest < soft < largest + math.log(35) / 10
    assert seen["settings"]["criterion"] == "soft"


def test_family(seen):
    """Blurring leaves a ramp as it is and softens an edge; the challenge keeps its six families."""
    ramp, edge = seen["blur"]
    assert ramp < 1e-6 < 0.1 < edge
    assert seen["challenge"] == ["color", "crop", "cutout", "flip", "scale", "rotate"]
