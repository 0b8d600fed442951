"""docs/method.md and docs/users.md say what was measured, and what follows from the code."""
import re
import statistics

import pytest
import torch

import diffusion
import memory
import sample
from gaussian import returned
from nanodd.judging import results
from nanodd.networks import models, training
from pages import PAGES, ROOT, paired_gain, stands_once

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
    import method_toys as toys
    middle = lambda *how: f"{toys.toy(*how).median():.0f} degrees"
    ends = lambda angles: "from {:.0f} to {:.0f} degrees".format(*angles.aminmax())
    assert f"The mean gathers the predictions at {middle('naive', False)}" in METHOD
    assert f"The minimum gathers them at {middle('minmax', False)}" in METHOD
    assert f"at 170 degrees moves all predictions to {middle('minmax', False, True)}" in METHOD
    assert f"all around the circle, {ends(toys.toy('naive', True))}" in METHOD
    start, end = toys.start_directions()[0], toys.toy("minmax", True)
    assert ends(start) == ends(end) and f"stay where they were, {ends(end)}" in METHOD
    closest = lambda angles: angles.sort().values.diff().min()
    assert closest(end) > closest(start) + 0.1                  # "only the closest of them move apart"
    real = toys.real_directions()
    assert "of 64 real ones 57 lie about 30 degrees and 7 about 110 degrees" in METHOD
    assert ((real > 0) & (real < 60)).sum() == 57 and (real > 90).sum() == 7


def test_the_minimum_of_the_toy_is_midway_and_the_mean_is_the_mean_direction():
    import method_toys as toys
    for outlier in (False, True):
        real = toys.real_directions(outlier)
        assert toys.toy("minmax", False, outlier).median() == pytest.approx(
            (real.min() + real.max()).item() / 2, abs=1.0)
    centre = toys.directions(toys.real_directions()).mean(dim=0)
    assert toys.toy("naive", False).median() == pytest.approx(
        torch.atan2(centre[1], centre[0]).rad2deg().item(), abs=1.0)


def test_the_gaussian_table_is_that_of_the_tests_own_denoiser():
    import method
    from method_toys import gaussian_deviation
    for grid in method.GRIDS:
        for steps in method.STEPS:
            assert gaussian_deviation(steps, grid) == pytest.approx(returned("ddim", steps, grid)[1])
    assert "Gaussian of deviation 0.300" in METHOD
    # what the last jump of ten uniform steps keeps of the exact flow's spread, and the others together
    t, schedule = sample.timesteps(10, "uniform")[-2], diffusion.Schedule()
    spread = lambda abar: (abar * 0.3**2 + 1 - abar) ** 0.5
    abar, end = schedule.abar_at(t), schedule.abar_at(0)
    eps_hat = (1 - abar) ** 0.5 / spread(abar)                  # of x = the deviation at t
    x0_hat = (spread(abar) - (1 - abar) ** 0.5 * eps_hat) / abar**0.5
    kept = sample.ddim_step(x0_hat, eps_hat, abar, end) / spread(end)
    before = gaussian_deviation(10, "uniform") / 0.3 / kept
    assert (f"from t = {t} to 0, keeps {kept:.2f} of the spread, and all jumps before it together "
            f"{before:.2f}") in METHOD


def test_what_is_said_of_the_extremes_and_the_losses_is_what_was_measured(rows):
    extreme = rows["extreme", "both losses", None]
    assert f"of the digits {extreme['min_above']} % of the smallest cosines belong" in METHOD
    assert f"which L_d takes, {extreme['max_above']} % do" in METHOD
    early, half, late = rows["losses", "digits, fine-tuning", None]["lines"]
    first, last = (f"`repr` stays at {line['repr']:.3f}" for line in (early, late))
    assert first in METHOD and first == last
    assert f"`div` rises from {early['div']:.2f}, while the memories fill, to {late['div']:.2f}" in METHOD
    assert half["div"] > late["div"]                            # not lately
    guess = rows["reference", "mean of the class", None]
    assert f"has an error of {guess['x0_error']:.3f} and a cosine of {guess['cosine']:.2f}" in METHOD
    worse = [t for (name, _, t), row in rows.items() if name == "x0" and row["x0_error"] > guess["x0_error"]]
    assert min(worse) == 600                                    # "from about t = 600 on"
    assert f"`repr` stays at {late['repr']:.2f} to {early['repr']:.2f}" in PAGES["docs/digits.md"]
    uvit = rows["losses", "digits, U-ViT", None]["lines"][-1]["seconds"] / 60
    assert f"1.1M parameters, in {uvit:.1f} minutes on two CPU cores" in PAGES["docs/challenge.md"]
    base, tuning = (rows["losses", name, None]["lines"][-1]["seconds"] / 60 for name in (
        "three classes of CIFAR-100, as a folder", "the same, fine-tuning"))
    assert f"for 3,000 steps ({base:.0f} minutes on two CPU cores" in USERS
    assert f"fine-tunes it for 400 steps ({tuning:.1f} minutes)" in USERS


def test_what_is_said_of_the_networks_weights_follows_from_them():
    network = diffusion.DiT("tiny", 8, 2, 1, 10, difffit=True)
    tuned, parameters = set(models.difffit_parameters(network)), dict(network.named_parameters())
    count = sum(parameters[name].numel() for name in tuned)
    assert f"{count:,} of {sum(p.numel() for p in parameters.values()):,} parameters" in METHOD
    assert f"still {100 * 0.995**100:.0f} % of the average after 100 steps" in METHOD
    assert f"After 12,000 steps {100 * 0.9999**12_000:.0f} % of each tuned weight" in METHOD
    assert round(10 * (1 - 0.9**8)) == 6                        # classes of a batch of 8: "about 6"
    assert f"warms up, in 400 steps to {training.ema_decay(399, .99):.2f}" in METHOD
    assert training.ema_decay(899, .995) == pytest.approx(900 / 909)       # "a tenth of the steps so far"
    abar = diffusion.Schedule().abar
    assert f"falls from {abar[0]:.4f} to {abar[-1]:.5f}" in METHOD
    factor = ((1 - abar) / abar).sqrt()
    assert f"which grows from {factor[0]:.2f} to {factor[-1]:.0f}" in METHOD


def test_what_is_said_of_digits_is_what_was_measured():
    import digits
    found = results.read_rows(digits.RESULTS)
    gains = [row["best"] - row["mean"] for row in found if "best" in row]
    assert (f"worth {statistics.mean(gains):.2f} points on average over the {len(gains)} rows of "
            f"results/digits.jsonl that have it, and up to {max(gains):.2f}.") in METHOD
    of = {row["row"]: row for row in found if row["table"] == "map"}
    recall = {name: f"{row['metrics']['recall']:.2f}" for name, row in of.items()}
    steps = [recall[name] for name in ("50 steps, guidance 1", "guidance 1", "5 steps, guidance 1",
                                       "3 steps, guidance 1")]
    assert "recall is {} at 50 steps, {} at 10, {} at 5 and {} at 3.".format(*steps) in METHOD
    plain, diverse = of["5 steps, guidance 1"], of["lambda_d 0.05, 5 steps, guidance 1"]
    precision, accuracy = ([f(row) for row in (plain, diverse)] for f in (
        lambda row: row["metrics"]["precision"], lambda row: row["two_hundred_mean"]))
    assert (f"raises recall from {steps[2]} to {diverse['metrics']['recall']:.2f} and lowers precision from "
            "{:.2f} to {:.2f}; accuracy rises from {:.1f} to {:.1f} % at 200 a class, and does not at ten "
            "({:.1f} and {:.1f} %)".format(*precision, *accuracy, plain["mean"], diverse["mean"])) in METHOD
    gathered, best = of["lambda_r 0.2, guidance 1"], of["10 modes of weight 0.2, guidance 1.5"]
    assert (f"lambda_r 0.2 lowers recall from {steps[1]} to {gathered['metrics']['recall']:.2f}, and "
            f"accuracy at 200 a class from {of['guidance 1']['two_hundred_mean']:.1f} to "
            f"{gathered['two_hundred_mean']:.1f} %") in METHOD
    assert f"most accurate sets of the map, {best['mean']:.1f} % at ten a class" in METHOD
    assert best["mean"] == max(row["mean"] for row in of.values())
    large = [of[name]["two_hundred_mean"] for name in ("guidance 1", "guidance 2")]
    assert (f"falls from {steps[1]} at w = 1 to {recall['guidance 2']} at 2, and accuracy at 200 a class "
            "from {:.1f} to {:.1f} %".format(*large)) in METHOD
    said = {(row["table"], row["row"], row["asked"]): f"{row['mean']:.1f} ± {row['std']:.1f} %"
            for row in found}
    naive, minmax, alone = (said["ablation", name, 10] for name in (
        "+ L_r + L_d, naive", "+ L_r + L_d, FIFO (the default)", "+ DiffFit alone"))
    assert (f"means (`--naive`) make {naive}, min-max {minmax}, and fine-tuning without the losses "
            f"{alone}") in METHOD
    turbo = {(row["row"], row["ipc"]): row["metrics"] for row in found if row["table"] == "turbo"}
    ddim, pp = (turbo[f"base, {name}, 5 steps", 10] for name in ("DDIM", "DPM-Solver++(2M)"))
    assert (f"DDIM has recall {ddim['recall']:.2f}, DPM-Solver++(2M), which also uses the step before, "
            f"{pp['recall']:.2f}, at the cost of precision ({pp['precision']:.2f} in place of "
            f"{ddim['precision']:.2f}) and no better accuracy without guidance (" + " and ".join(
                said["turbo", f"base, {name}, 5 steps", 10].removesuffix(" %")
                for name in ("DPM-Solver++(2M)", "DDIM")) + " %)") in METHOD
    one, ten = "student, 1 step", "base, DDIM, 10 steps"
    assert (f"{said['turbo', one, 50]} at fifty a class where the base makes {said['turbo', ten, 50]} in ten "
            f"steps, with recall {turbo[one, 50]['recall']:.2f} in place of "
            f"{turbo[ten, 50]['recall']:.2f}") in METHOD
    of = {row["row"]: row for row in found if row["table"] == "pairs"}
    for one, two, words in (("lambda_d 0.05, 5 steps", "base model, 5 steps", " at 200 a class ("),
                            ("base model, 10 steps", "lambda_d 0.05, 5 steps", ", ")):
        mean, error = paired_gain(of[one]["accuracy"], of[two]["accuracy"])
        assert f"{mean:.2f} points more{words}standard error {error:.2f}" in METHOD
    kept, modes = (f"{of[name]['mean']:.1f} ± {of[name]['std']:.1f}" for name in (
        "base model, with modes, a quarter kept", "base model, with modes"))
    assert f"ten seeds make {kept}, without it {modes}" in USERS
    plain, = (row for row in found
              if (row["table"], row["row"], row["asked"]) == ("main", "**distilled**", 10))
    assert f"differ by a deviation of {plain['std']:.1f} points at ten a class" in USERS


def test_the_memories_hold_what_the_page_counts(capsys):
    memory.main([])
    held = dict(line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if " | " in line)
    fifo, most = (next(text for name, text in held.items() if name.strip() == rule).split(" of ")[0].strip()
                  for rule in ("fifo", "max"))
    assert f"of 64 entries fifo holds {fifo} of that mode (6 on average) and `max` {most}." in METHOD


def test_every_picture_is_shown_and_small():
    shown = {name for text in PAGES.values() for name in re.findall(r"assets/([\w-]+\.png)", text)}
    pictures = {path.name: path.stat().st_size for path in (ROOT / "assets").iterdir()}
    assert set(pictures) == shown and max(pictures.values()) <= 300_000
