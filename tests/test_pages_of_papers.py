"""docs/papers.md, challenge.md and log.md: what they say follows from the rows and from the code."""
import json
import re
import types

import pytest
import torch
from torchvision.transforms.functional import rgb_to_grayscale

import train_eval
import turbo
from nanodd import checks, recipes
from nanodd.judging import gu, results
from nanodd.networks import training
from test_challenge_data import BY_SUPERCLASS, FINE
from pages import PAGES, ROOT

CHALLENGE, PAPERS, LOG = (PAGES[f"docs/{name}.md"] for name in ("challenge", "papers", "log"))
IMAGENET = recipes.RECIPES["imagenet512"]                       # the tests' own "imagenet" is a small one


@pytest.mark.parametrize("page", (CHALLENGE, PAPERS, LOG), ids=("challenge", "papers", "log"))
def test_no_cell_of_a_table_is_empty(page):
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    assert rows and not [row for row in rows for cell in row if cell.strip() in ("", "–", "-")]


# ----------------------------------------------------------------------------------------------------
# 1. docs/papers.md


def test_the_first_table_has_a_command_of_each_paper():
    table = re.search(r"\| paper \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAPERS)[1].splitlines()
    commands = [re.findall(r"`(python [^`]+)`", line.rsplit(" | ", 1)[1]) for line in table]
    assert len(table) == 6 and all(commands) and "Not of the five" in table[-1]


def test_a_sample_deviation_of_three_is_larger_by_the_factor_that_is_said():
    three = torch.tensor([1., 2., 4.])
    factor = three.std() / three.std(correction=0)
    assert f"over three judges are {factor:.2f} times as large" in PAPERS


def test_the_sizes_at_imagenets_scale_follow_from_the_recipe():
    cells, channels = (IMAGENET.size // 2) ** 2, IMAGENET.channels
    assert f"the latent cache {2 * 2 * channels * cells * 2 / 1e3:.0f} kB a picture" in PAPERS
    assert f"{12_454 * 2 * 2 * channels * cells * 2 / 1e9:.1f} GB for ImageWoof" in PAPERS
    assert f"ten classes take {2 * 10 * 64 * channels * cells * 4 / 1e6:.0f} MB" in PAPERS
    assert f"a fine-tuned checkpoint {1_739_552 * 4 / 1e6:.0f} MB" in PAPERS


def plan_of(images):
    """The plan of fine-tuning ImageNet's recipe on so many images."""
    data = types.SimpleNamespace(recipe=IMAGENET, train=types.SimpleNamespace(labels=range(images)))
    args = types.SimpleNamespace(steps=None, batch=IMAGENET.tune_batch)
    return checks.tuning_plan(args, types.SimpleNamespace(seed=0, in_bf16=lambda width: False), data, 1152)


def test_what_is_said_of_the_weight_average_is_what_it_keeps_of_the_published_weights():
    average, moved = ({"w": torch.tensor(start, dtype=torch.float64)} for start in (1, 0))
    kept, whole, small = {}, plan_of(12_454), plan_of(9_025)
    assert not whole.warm and (IMAGENET.tune_epochs, whole.batch, whole.ema) == (8, 8, .9999)
    for step in range(1, whole.steps + 1):
        training.ema_update(average, moved, whole.ema)
        kept[step] = f"{100 * average['w']:.0f} %"
    assert average["w"].item() == pytest.approx(.9999**whole.steps)
    assert (f"keeps 0.9999^n of them after n steps: {kept[12_000]} after 12,000, {kept[whole.steps]} after "
            f"{whole.steps:,} (8 epochs of ImageNet's 12,454 images in batches of 8), {kept[small.steps]} "
            f"after {small.steps:,} (fastai's 9,025 images)") in PAPERS
    assert small.steps < 12_000                                 # the authors' code saves nothing there


def test_the_jitters_order_and_grey_are_as_is_said():
    drawn, once = torch.Generator(), torch.Generator()
    gu.color_jitter(torch.rand(8, 3, 4, 4), torch.Generator(), drawn)
    torch.randperm(3, generator=once)
    assert torch.equal(drawn.get_state(), once.get_state()) and "is drawn once for a batch here" in PAPERS
    red = torch.tensor([1., 0, 0]).view(3, 1, 1)
    assert f"red weighs {rgb_to_grayscale(red).item():.4f} in grey here" in PAPERS


def test_the_students_first_step_is_as_is_said():
    assert f"Here the student starts at t = {turbo.T_STAR}, " in PAPERS


# ----------------------------------------------------------------------------------------------------
# 2. docs/challenge.md


def test_what_is_said_of_the_evaluator_is_the_protocol():
    challenge, recipe = train_eval.PROTOCOLS["challenge"], recipes.RECIPES["cifar100"]
    epochs, rates = challenge.epochs(), [challenge.rate(k, 1001) for k in range(1001)]
    assert (epochs, challenge.batch, challenge.runs, challenge.bf16) == (1001, 256, 3, False)
    assert "1,001 epochs in float32, in batches of 256" in CHALLENGE
    assert set(rates[:502]) == {.01} and rates[502:] == pytest.approx([.001] * 499)
    assert "after epoch index 501 a new optimizer" in CHALLENGE and challenge.reset_optimizer
    assert len(train_eval.CHALLENGE_FAMILIES) == 6 and "one of six augmentations" in CHALLENGE
    assert f"see {3 * epochs * 50_000 / 1e6:.0f} million images together" in CHALLENGE
    assert (recipe.epochs, recipe.views) == (200, 1_000_000)
    assert "at most 200 epochs or a million images seen" in CHALLENGE


def test_hlr_and_ior_are_defined_as_they_are_computed():
    for name in ("HLR", "IOR"):
        formula = re.search(rf"^    ({name} = .*)$", CHALLENGE, re.M)[1]
        assert formula in results.__doc__


def test_the_order_of_the_classes_is_as_is_told():
    assert f"({', '.join(BY_SUPERCLASS[:3])} ...)" in CHALLENGE
    same = [k for k in range(100) if sorted(FINE)[k] == BY_SUPERCLASS[k]]
    assert [BY_SUPERCLASS[k] for k in same] == ["snake"] and "1 class of 100, the snake" in CHALLENGE
    assert f"at position {same[0]} (the first is 0)" in CHALLENGE and "for 1 class of 100" in PAPERS


def test_the_speed_of_sdxl_turbo_is_what_was_measured():
    row = json.loads((ROOT / "results/sdxl-speed.jsonl").read_text().splitlines()[0])
    whole, network, decoder = (row["parts"][name] for name in ("all", "unet", "decoder"))
    assert f"a picture took {whole['seconds']:.1f} s on two CPU cores in bfloat16" in CHALLENGE
    assert (f"{row['matrix_tflops']:.2f} TFLOP/s of matrix product), at {100 * whole['share']:.0f} % of the "
            f"matrix product's rate: {network['seconds']:.1f} s in the network, {decoder['seconds']:.1f} s "
            f"in the decoder. A prompt took {row['prompt_seconds']:.1f} s, once; the process had "
            f"{row['peak_gb']:.1f} GB at most") in CHALLENGE


# ----------------------------------------------------------------------------------------------------
# 3. docs/log.md


def test_every_finding_has_its_machine_and_its_date():
    findings = re.findall(r"^- \*\*[^*]+\.\*\* (.*)$", LOG, re.M)
    assert len(findings) == LOG.count("\n- ") > 20
    machine = r"(?:EPYC|Xeon|H100|one EPYC core|machine not recorded|counted, not timed)"
    date = r"(?:2026-11-\d\d|date not recorded)"
    assert all(re.search(rf"\. \({machine}, {date}\)$", text) for text in findings)
    tables = re.findall(r"^(.*)\n\n\|.*\n\|-", LOG, re.M)
    assert len(tables) == 2 and all(re.search(rf" \({machine}, {date}\):$", text) for text in tables)


def test_the_speed_at_imagenets_size_is_what_was_measured():
    row = json.loads((ROOT / "results/imagenet-speed.jsonl").read_text().splitlines()[-1])
    ten, fifty = (row["sampling"][f"{steps} steps"] for steps in (10, 50))
    tuning = row["tuning"]
    assert (f"DiT-{row['network']}/2 drew {ten['images_per_second']:.2f} images a second at 10 steps and "
            f"{fifty['images_per_second']:.2f} at 50, with guidance and decoded, at "
            f"{100 * ten['share']:.0f} and {100 * fifty['share']:.0f} % of the matrix product's rate of "
            f"{row['matrix_tflops']:.2f} TFLOP/s") in LOG
    assert (f"made {tuning['steps_per_second']:.2f} steps of 8 images a second, {tuning['cache_gain']:.1f} "
            "times as many as with the autoencoder in the loop. The min-max losses cost "
            f"{100 * tuning['losses_share']:.1f} % of a step") in LOG
