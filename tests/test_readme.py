"""The README says what is true: its commands parse, its tables are the measured rows, its files exist."""
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import torch

import convnet
import diffusion
import memory
import minimax
import sample
import train_eval
import uvit
import vae
from nanodd import recipes
from train_eval import read_rows

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAINS = {module.__name__: module
         for module in (convnet, diffusion, memory, minimax, sample, train_eval, uvit, vae)}


def commands():
    """Every command of the README, its generated tables and the files' first screens: script and words."""
    texts = [README, *(module.__doc__ for module in MAINS.values())]
    for file in (ROOT / "results").glob("[dc]*.jsonl"):         # digits and cifar100
        texts += [json.loads(line)["command"] for line in file.read_text().splitlines()]
    for text in texts:
        for line in re.findall(r"python ([\w/]+\.py[^\n`;|]*)", text):
            script, *words = shlex.split(line.partition("#")[0].partition(", S =")[0])
            yield script, [word.replace("S", "0") if word == "S" else word for word in words]


@pytest.mark.parametrize("script, words", sorted({(s, tuple(w)) for s, w in commands()}))
def test_every_command_parses(script, words, monkeypatch):
    assert (ROOT / script).is_file()
    if script.startswith("benchmarks/"):
        said = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True).stdout.decode()
        assert {word for word in words if word.startswith("-")} <= set(re.findall(r"--[\w-]+", said))
        return
    # the driver stops once the arguments are read
    monkeypatch.setattr(MAINS[script[:-3]], "exit_on_user_error", stop)
    with pytest.raises(Parsed):
        MAINS[script[:-3]].main(list(words))


class Parsed(Exception):
    pass


def stop(parser, **_):
    raise Parsed


def test_the_tables_are_what_was_measured():
    import digits
    for name, part in digits.tables(read_rows(digits.RESULTS)).items():
        assert f"<!-- {name} -->\n{part}\n<!-- end of {name} -->" in README


def test_the_tables_of_cifar100_are_what_was_measured_or_dashes():
    import cifar100
    rows = read_rows(cifar100.FULL.rows)
    for name, part in cifar100.tables(rows).items():
        assert f"<!-- {name} -->\n{part}\n<!-- end of {name} -->" in README
    for row in rows:
        assert row["command"] and row["seconds"] > 0 and row["device"] and row["seed"] >= 0
        assert row["data"] == "cifar100" and not re.search(r"(?<![\w.])/\w", row["command"])
        assert row["table"] in ("speed", "choice", "last choice") or row["runs"] == len(row["accuracy"]) == 3


def test_what_is_said_of_cifar100s_networks_follows_from_them():
    import cifar100
    from throughput import flops
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in diffusion.DiT(name, 32, 2, 3, 100).parameters())
                 for name in ("S", "XS")}
    assert diffusion.SIZES["XS"] == (6, 256, 4) and "256 wide, 6 blocks" in README
    assert f"DiT-S/2 has {2 * sizes['S'] / 1e6:.0f} MB in bfloat16" in README
    assert f"has {2 * sizes['XS'] / 1e6:.0f} MB, so that" in README and 2 * sizes["XS"] < 16e6 - 1e5
    assert f"it says {len(cifar100.jobs(cifar100.FULL))} of" in README
    with torch.device("meta"):
        x, t, y = torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        dit, u = (flops(lambda net=net: net(x, t, y)) for net in (diffusion.DiT("S", 32, 2, 3, 100),
                                                                 uvit.UViT("S", 32, 2, 3, 100)))
    assert dit / u == pytest.approx(0.5, abs=0.02)


def test_every_row_was_run_five_times_by_the_judge_it_names():
    for row in map(json.loads, (ROOT / "results/digits.jsonl").read_text().splitlines()):
        assert row["runs"] == len(row["accuracy"]) == 5 and row["data"] == "digits"
        assert row["judge"] == "ConvNetD3-W128" and not re.search(r"(?<![\w.])/\w", row["command"])


def test_what_is_said_of_the_solvers_is_what_was_measured():
    import digits
    rows = {(row["row"], row["steps"]): row for row in read_rows(digits.RESULTS) if row["table"] == "solvers"}
    (ddim, pp, fast), real = digits.SOLVERS, rows["real, at random", 0]
    assert rows[fast, 5]["mean"] < rows[ddim, 5]["mean"] - 10 < rows[pp, 5]["mean"] - 10
    for steps in (15, 20, 50):
        assert abs(rows[pp, steps]["mean"] - rows[pp, 10]["mean"]) < 0.15
        assert abs(rows[fast, steps]["mean"] - rows[fast, 15]["mean"]) < 0.15
    assert abs(rows[pp, 10]["mean"] - rows[ddim, 50]["mean"]) < rows[pp, 10]["std"]
    late = [row for (name, steps), row in rows.items() if steps > 5]
    assert max(r["mean"] for r in late) - min(r["mean"] for r in late) < max(r["std"] for r in late)
    assert max(rows, key=lambda key: rows[key]["one_mean"]) == (ddim, 5)
    assert all(real["coverage_mean"] < row["coverage_mean"] for row in rows.values() if row is not real)


def test_auto_took_the_steps_that_are_best_in_full():
    import digits
    rows = [row for row in read_rows(digits.RESULTS) if row["table"] == "auto"]
    full = {row["steps"]: row["mean"] for row in rows if row["row"] != "auto"}
    taken, = (row["steps"] for row in rows if row["row"] == "auto")
    assert set(full) == set(sample.CANDIDATES) and max(full, key=full.get) == taken == 10


def test_links_lead_somewhere():
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-")
                for line in re.findall(r"^#+ (.*)", README, re.M)}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert target[1:] in headings if target.startswith("#") else (ROOT / target).exists(), target


def test_a_file_imports_only_files_above_it():
    order = ["memory", "convnet", "vae", "diffusion", "uvit", "train_eval", "minimax", "sample"]
    for k, name in enumerate(order):
        text = (ROOT / f"{name}.py").read_text()
        assert set(re.findall(r"^from (\w+) import", text, re.M)) & set(order) <= set(order[:k])
    assert ", ".join(order) in README


def test_every_flag_is_explained(capsys):
    for module in MAINS.values():
        with pytest.raises(SystemExit) as stop:
            module.main(["--help"])
        said = capsys.readouterr().out
        assert stop.value.code == 0 and module.__doc__.splitlines()[0] in said
        for flag in re.findall(r"^  (--[\w-]+)(.*)", said, re.M):
            assert flag[1].strip() or re.search(rf"^  {flag[0]}.*\n {{20,}}\w", said, re.M), flag


def test_the_speed_at_imagenets_size_is_what_was_measured():
    row = json.loads((ROOT / "results/imagenet-speed.jsonl").read_text().splitlines()[-1])
    ten, fifty = (row["sampling"][f"{steps} steps"] for steps in (10, 50))
    tuning = row["tuning"]
    assert (f"{row['matrix_tflops']:.2f} TFLOP/s of matrix product), DiT-{row['network']}/2 drew "
            f"{ten['images_per_second']:.2f} images a second at 10 steps and "
            f"{fifty['images_per_second']:.2f} at 50, with guidance and decoded, at "
            f"{100 * ten['share']:.0f} and {100 * fifty['share']:.0f} % of the matrix product's "
            "rate") in README
    assert (f"made {tuning['steps_per_second']:.2f} steps of 8 images a second, {tuning['cache_gain']:.1f} "
            "times as many as with the autoencoder in the loop, and the min-max losses cost "
            f"{100 * tuning['losses_share']:.1f} % of a step") in README


def test_the_sizes_at_imagenets_scale_follow_from_the_recipe():
    recipe = recipes.RECIPES["imagenet512"]                     # the tests' own "imagenet" is a small one
    cells, channels = (recipe.size // 2) ** 2, recipe.channels
    assert f"the latent cache {2 * 2 * channels * cells * 2 / 1e3:.0f} kB a picture" in README
    assert f"{12_454 * 2 * 2 * channels * cells * 2 / 1e9:.1f} GB for ImageWoof" in README
    assert f"ten classes take {2 * 10 * 64 * channels * cells * 4 / 1e6:.0f} MB" in README
    assert f"a fine-tuned checkpoint {1_739_552 * 4 / 1e6:.0f} MB" in README
