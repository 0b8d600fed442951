"""docs/method.md and docs/users.md say what was measured, and what follows from the code."""
import re
import statistics

import pytest
import torch

import diffusion
import memory
from gaussian import returned
from nanodd.judging import results
from nanodd.networks import models, training
from pages import PAGES, ROOT, stands_once

METHOD, USERS = PAGES["docs/method.md"], PAGES["docs/users.md"]


@pytest.fixture(scope="module")
def rows():
    """{(table, row, asked): row} of results/method.jsonl."""
    import method
    return {(row["table"], row["row"], row["asked"]): row for row in results.read_rows(method.RESULTS)}


def test_the_tables_are_what_was_measured(rows):
    import method
    for name, part in method.tables(rows.values()).items():
        assert stands_once(name, part), name


def test_the_toy_ends_where_the_page_says():
    import method
    middle = lambda *how: f"{method.toy(*how).median():.0f} degrees"
    ends = lambda *how: "from {:.0f} to {:.0f} degrees".format(*method.toy(*how).aminmax())
    assert f"(`--naive`) gathers the predictions at {middle('naive', False)}" in METHOD
    assert f"The minimum gathers them at {middle('minmax', False)}" in METHOD
    assert f"at 170 degrees moves all predictions to {middle('minmax', False, True)}" in METHOD
    assert f"far side of the circle, {ends('naive', True)}" in METHOD
    assert f"hardly moves the rest: {ends('minmax', True)}" in METHOD
    assert "Of 64 real images 57 lie about 30 degrees, 7 about 110 degrees" in METHOD
    real = method.real_directions()
    assert ((real > 0) & (real < 60)).sum() == 57 and (real > 90).sum() == 7


def test_the_minimum_of_the_toy_is_midway_and_the_mean_is_the_mean_direction():
    import method
    for outlier in (False, True):
        real = method.real_directions(outlier)
        assert method.toy("minmax", False, outlier).median() == pytest.approx(
            (real.min() + real.max()).item() / 2, abs=1.0)
    centre = method.directions(method.real_directions()).mean(dim=0)
    assert method.toy("naive", False).median() == pytest.approx(
        torch.atan2(centre[1], centre[0]).rad2deg().item(), abs=1.0)


def test_the_gaussian_table_is_that_of_the_tests_own_denoiser():
    import method
    for grid in method.GRIDS:
        for steps in method.STEPS:
            assert method.gaussian_deviation(steps, grid) == pytest.approx(
                returned("ddim", steps, grid)[1], rel=1e-9)
    assert "Its deviation is 0.300" in METHOD


def test_what_is_said_of_the_extremes_and_the_losses_is_what_was_measured(rows):
    extreme = rows["extreme", "both losses", None]
    assert f"on the digits {extreme['min_above']} % of the smallest cosines belong" in METHOD
    assert f"which L_d looks at, {extreme['max_above']} % do" in METHOD
    early, _, late = rows["losses", "digits, fine-tuning", None]["lines"]
    assert (f"`repr` is {early['repr']:.2f} at first and {late['repr']:.2f} at the end, `div` "
            f"{early['div']:.2f} and {late['div']:.2f}") in METHOD
    assert f"`repr` stays at {late['repr']:.2f} to {early['repr']:.2f}" in PAGES["docs/digits.md"]
    base, tuning = (rows["losses", name, None]["lines"][-1]["seconds"] / 60 for name in (
        "three classes of CIFAR-100, as a folder", "the same, fine-tuning"))
    assert f"({base:.0f} minutes on two CPU cores for 1,500 images" in USERS
    assert f"fine-tunes it for 400 steps ({tuning:.1f} minutes)" in USERS


def test_what_is_said_of_the_networks_weights_follows_from_them():
    network = diffusion.DiT("tiny", 8, 2, 1, 10, difffit=True)
    tuned, parameters = set(models.difffit_parameters(network)), dict(network.named_parameters())
    count = sum(parameters[name].numel() for name in tuned)
    assert f"{count:,} of {sum(p.numel() for p in parameters.values()):,} parameters" in METHOD
    assert f"still {100 * 0.995**100:.0f} % of it after 100 steps" in METHOD
    assert f"after 12,000 steps {100 * 0.9999**12_000:.0f} % of what is sampled" in METHOD
    assert training.ema_decay(899, .995) == pytest.approx(900 / 909)       # "a tenth of the steps so far"
    abar = diffusion.Schedule().abar
    assert f"falls from {abar[0]:.4f} to {abar[-1]:.5f}" in METHOD
    factor = ((1 - abar) / abar).sqrt()
    assert f"which grows from {factor[0]:.2f} to {factor[-1]:.0f}" in METHOD


def test_what_is_said_of_digits_is_what_was_measured():
    import digits
    found = results.read_rows(digits.RESULTS)
    gains = [row["best"] - row["mean"] for row in found if "best" in row]
    assert (f"worth {statistics.mean(gains):.2f} points on average, and up to {max(gains):.2f} ({len(gains)} "
            "rows") in METHOD
    recall = {row["row"]: f"{row['metrics']['recall']:.2f}" for row in found if row["table"] == "map"}
    steps = [recall[name] for name in ("50 steps, guidance 1", "guidance 1", "5 steps, guidance 1",
                                       "3 steps, guidance 1")]
    assert "recall is {} at 50 steps, {} at 10, {} at 5 and {} at 3.".format(*steps) in METHOD
    diverse = recall["lambda_d 0.05, 5 steps, guidance 1"]
    assert f"lambda_d 0.05 raises recall from {steps[2]} to {diverse}" in METHOD
    assert f"At lambda_r 0.2 recall falls from {steps[1]} to {recall['lambda_r 0.2, guidance 1']}" in METHOD
    assert f"from w = 1 (none) to 2 recall falls from {steps[1]} to {recall['guidance 2']}" in METHOD
    of = {row["row"]: row for row in found if row["table"] == "pairs"}
    kept, modes = (f"{of[name]['mean']:.1f} ± {of[name]['std']:.1f}" for name in (
        "base model, with modes, a quarter kept", "base model, with modes"))
    assert f"makes {kept} in place of {modes} over ten seeds" in USERS
    plain, = (row for row in found if row["row"] == "**distilled**" and row["ipc"] == 10)
    assert f"on the digits {plain['std']:.1f} points at ten a class" in USERS


def test_the_memories_hold_what_the_page_counts(capsys):
    memory.main([])
    held = dict(line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if " | " in line)
    fifo, most = (next(text for name, text in held.items() if name.strip() == rule).split(" of ")[0].strip()
                  for rule in ("fifo", "max"))
    assert f"fifo holds {fifo} of that mode and the adaptive rule {most}." in METHOD


def test_every_picture_is_shown_and_small():
    shown = {name for text in PAGES.values() for name in re.findall(r"assets/([\w-]+\.png)", text)}
    pictures = {path.name: path.stat().st_size for path in (ROOT / "assets").iterdir()}
    assert set(pictures) == shown and max(pictures.values()) <= 300_000
