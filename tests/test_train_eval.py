"""The judge can learn, cannot cheat, and sees augmentations of the stated ranges; labels survive the trip."""
import dataclasses
import json
import math
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

import minimax
import sample
import train_eval
from nanodd import cli, files, recipes
from nanodd.data import datasets, imageset
from nanodd.errors import UserError
from train_eval import count_epochs, evaluate, train_judge, train_judges

plain = dataclasses.replace(recipes.RECIPES["digits"], augment="crop")
gu = dataclasses.replace(plain, protocol="gu")
challenge = dataclasses.replace(plain, protocol="challenge")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_judge_memorises_ten_images():
    train = datasets.load("digits").train
    ten = train.pick(torch.stack([(train.labels == c).nonzero()[0, 0] for c in range(10)]))
    _, accuracies = train_judge(ten, ten, plain, epochs=40, seed=0)
    assert accuracies[-1] == 100 and len(accuracies) == 10


def test_the_judge_is_at_chance_on_shuffled_labels():
    _, _, train, test, _ = datasets.load("digits")
    labels = train.labels[torch.randperm(200, generator=generator())]
    shuffled = train.pick(torch.arange(200))._replace(labels=labels)
    _, accuracies = train_judge(shuffled, test, plain, epochs=15, seed=0, looks=1)
    assert accuracies[-1] < 30


def test_the_same_seed_gives_the_same_judge():
    few = datasets.load("digits").train.pick(torch.arange(32))
    one, two = (train_judge(few, few, plain, 2, 5)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_rate_falls_with_a_fresh_optimizer_after_half(monkeypatch):
    made, real = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda p, **how: made.append(how) or real(p, **how))
    ten = datasets.load("digits").train.pick(torch.arange(10))
    train_judge(ten, ten, plain, epochs=6, seed=0)
    assert [how["lr"] for how in made] == [0.01, pytest.approx(0.001)]
    assert all(how["momentum"] == 0.9 and how["weight_decay"] == 5e-4 for how in made)


def test_the_challenge_trains_1001_epochs_and_forgets_its_momentum_after_the_502nd(monkeypatch):
    sizes, rates, _, made = spy(monkeypatch)
    ten = datasets.load("digits").train.pick(torch.arange(10))
    epochs = count_epochs(dataclasses.replace(challenge, epochs=3, views=5), 10**6, 10)     # not the recipe's
    stepped, real = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *p, **how: stepped.append(len(sizes)) or real(*p, **how))
    train_judge(ten, ten, challenge, epochs, 0)
    assert epochs == len(sizes) == 1001 and rates == [0.01] * 502 + [0.001] * 499
    assert stepped == [0, 502]                                    # an optimizer without a past each time
    assert all(how.defaults["momentum"] == 0.9 and how.defaults["weight_decay"] == 5e-4 for how in made)


def test_the_challenge_draws_all_six_families_whatever_the_recipe_names(monkeypatch):
    seen, images = set(), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    for name in list(train_eval.FAMILIES):
        monkeypatch.setitem(train_eval.FAMILIES, name, lambda x, g, name=name: seen.add(name) or x)
    for recipe, families in ((plain, {"crop"}), (challenge, set(train_eval.FAMILIES))):
        for seed in range(100):
            train_eval.PROTOCOLS[recipe.protocol].augment(images, None, recipe, None, generator(seed))
        assert seen == families
    assert len(seen) == 6


class PulledPlug(BaseException):
    pass


def pull_the_plug(monkeypatch, after):
    """At the optimizer's step number `after`, counted over all judges, training ends as if it was killed."""
    steps, real = [], torch.optim.SGD.step

    def step(self, *how):
        steps.append(1)
        if len(steps) == after:
            raise PulledPlug
        return real(self, *how)
    monkeypatch.setattr(torch.optim.SGD, "step", step)


def test_a_trial_of_stacked_judges_compares_the_two_ways_and_disturbs_nobody(monkeypatch):
    monkeypatch.setattr(torch.cpu, "synchronize", lambda *_: None)
    monkeypatch.setattr(train_eval.convnet, "judge", lambda net, size, channels, classes: nn.Sequential(
        nn.Flatten(), nn.Linear(channels * size * size, classes)))
    clock = iter([0, 5, 0, 2, 0, 5, 0, 1])                        # begin and end, of n judges and of one
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    before = torch.get_rng_state()
    how = "convnet3", 16, 1, 10
    assert train_eval.stacking_pays(*how, 3, torch.device("cpu"), False) is True      # 5 seconds, or 3 x 2
    assert train_eval.stacking_pays(*how, 4, torch.device("cpu"), False) is False     # 5 seconds, or 4 x 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recipe", [plain, challenge, gu], ids=["short", "challenge", "gu"])
@pytest.mark.parametrize("after", [13, 23, 30])                 # of 32 steps; the rate falls after 20 or 24
def test_judges_go_on_where_they_were_killed(recipe, after, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "SAVE_EVERY", 0)
    few = [part._replace(images=train_eval.at_size(part.images, 16)) for part in three_sets()]
    batch = train_eval.PROTOCOLS[recipe.protocol]._replace(batch=20)         # four a judge and epoch
    monkeypatch.setitem(train_eval.PROTOCOLS, recipe.protocol, batch)

    def trained(desk):
        pupils = [train_eval.new_pupil(part, recipe, seed) for seed, part in enumerate(few)]
        curves = train_eval.teach(pupils, few[0], recipe, 8, 4, False, False, desk=desk)
        return curves, [pupil.judge for pupil in pupils]
    whole, judges = trained(None)
    with monkeypatch.context() as plug, pytest.raises(PulledPlug):
        pull_the_plug(plug, after)
        trained(train_eval.Desk(tmp_path))
    state = torch.load(tmp_path / "0-1-2.pt", weights_only=True)
    assert state["epoch"] == (after - 1) // 4 - 1
    curves, again = trained(train_eval.Desk(tmp_path))
    assert curves == whole and largest_gap(again, judges) == 0
    assert trained(train_eval.Desk(tmp_path))[0] == whole          # those that are done stay as they are


def test_a_row_goes_on_with_its_judges_and_adds_its_seconds_up(monkeypatch, tmp_path):
    whole_set, took = datasets.load("digits"), []
    row = lambda source="random", **how: evaluate(source, whole_set, ipc=2, runs=2, seed=3, epochs=6, **how)
    whole = row()
    with monkeypatch.context() as plug, pytest.raises(PulledPlug):
        plug.setattr(files, "SAVE_EVERY", 0)
        pull_the_plug(plug, 9)
        row(keep=tmp_path / "judges")
    desk, = (tmp_path / "judges").iterdir()
    for file in desk.iterdir():                                 # as if that had taken a thousand seconds
        state = torch.load(file, weights_only=True)
        torch.save({**state, "seconds": state["seconds"] + 1000}, file)
        took.append(state["epoch"])
    assert sum(took) >= 3
    other = row("full", keep=tmp_path / "judges")               # another row has a desk of its own
    assert other["seconds"] < 1000 and desk.exists()
    again = row(keep=tmp_path / "judges")
    assert again["accuracy"] == whole["accuracy"] and again["seconds"] > 1000
    assert not desk.exists()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def three_sets():
    train = datasets.load("digits").train
    return [train.pick(torch.arange(k, k + 70)) for k in (0, 70, 140)]


def largest_gap(judges, others):
    return max(float((p - q).detach().abs().max()) for a, b in zip(judges, others, strict=True)
               for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("recipe", [recipes.RECIPES["digits"], gu], ids=["short", "gu"])
def test_judges_in_lockstep_are_those_trained_apart(recipe):
    few = [part._replace(images=train_eval.at_size(part.images, 16)) for part in three_sets()]
    pupils = [train_eval.new_pupil(part, recipe, seed) for seed, part in enumerate(few)]
    curves = train_eval.teach(pupils, few[0], recipe, 4, 2, False, False, threading.Event())
    apart = [train_judge(part, few[0], recipe, 4, seed, looks=2) for seed, part in enumerate(few)]
    assert largest_gap([pupil.judge for pupil in pupils], [judge for judge, _ in apart]) < 1e-5
    assert curves == [curve for _, curve in apart] and len(curves[0]) == 2
    assert largest_gap([apart[0][0]], [apart[1][0]]) > 1e-2


def test_judges_in_threads_are_those_trained_apart_to_the_bit(two_threads):
    """Trained apart on one thread, that is; two of them add up in another order, and the last bits differ."""
    trains = three_sets()
    each = lambda: [train_judge(part, trains[0], plain, 2, seed) for seed, part in enumerate(trains)]
    at_once, on_two = train_judges(trains, trains[0], plain, 2, range(3)), each()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    apart = each()
    judges = [[judge for judge, _ in some] for some in (at_once, apart, on_two)]
    assert largest_gap(judges[0], judges[1]) == 0 and largest_gap(judges[0], judges[2]) < 1e-5
    assert [curve for _, curve in at_once] == [curve for _, curve in apart]


def test_ctrl_c_stops_all_judges_soon(two_threads):
    main = threading.main_thread().ident
    threading.Timer(1.5, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    trains, began = three_sets(), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_judges(trains, trains[0], plain, 10_000, [0, 1, 2])
    assert time.monotonic() - began < 10 and torch.get_num_threads() == 2


def test_nothing_compiles_and_the_judges_train_all_the_same(monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("No working C++ compiler found\nand a page of advice")
    monkeypatch.setattr(torch, "compile", fail)
    alone(monkeypatch)
    train_eval.main(["random", "--compile", "--ipc", "1", "--runs", "2", "--epochs", "1"])
    sentence = "--compile does nothing here, as torch.compile fails: No working C++ compiler found\n"
    assert capsys.readouterr().out.count(sentence) == 1
    assert [row["runs"] for row in read_results()[0]] == [2]


def alone(monkeypatch):
    """No row of real images beside the named ones: the full set would take seconds."""
    monkeypatch.setitem(train_eval.PROTOCOLS, "short", train_eval.PROTOCOLS["short"]._replace(beside=()))


def test_what_compiles_is_trained(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    alone(monkeypatch)
    train_eval.main(["random", "--compile", "--ipc", "1", "--runs", "2", "--epochs", "1"])
    assert len(compiled) == 1 + 2                                 # a trial and two judges


def test_a_protocol_says_how_many_judges_a_row_has_and_of_how_many_bits(monkeypatch):
    """The challenge's judges work in float32 unless told otherwise."""
    monkeypatch.setattr(cli, "gains_from_bf16", lambda _: True)
    monkeypatch.setattr(train_eval, "train_judges", lambda *p, **_: [(None, [50.]) for _ in p[4]])
    for more in ([], ["--protocol", "challenge"], ["--protocol", "challenge", "--bf16", "--epochs", "2"]):
        train_eval.main(["random", "--ipc", "1", *more])
    rows = read_results()[0]
    assert [row["train"] for row in rows] == ["random", "kmeans", "full"] * 3
    assert [(row["protocol"], len(row["accuracy"]), row["epochs"], row["device"]) for row in rows[::3]] == \
        [("short", 5, 4, "cpu bf16"), ("challenge", 3, 1001, "cpu"), ("challenge", 3, 2, "cpu bf16")]
    assert train_eval.PROTOCOLS["gu"].runs == 3


def test_hlr_and_ior_are_fractions():
    assert train_eval.hlr_ior(own=95.5, full=98.9, random=95.7) == (0.034, -0.002)
    found = (("made", 10, 60., 4), ("random", 10, 52., 4), ("random", 10, 50., 0),
             ("made+random", 20, 70., 0), ("full", 125, 90., 0))
    rows = [{"data": "digits", "cut": "all", "protocol": "short", "train": name, "ipc": ipc, "mean": mean,
             "pda": pda} for name, ipc, mean, pda in found]
    assert [(row["train"], row["hlr"], row["ior"]) for row in train_eval.score_rows(rows)] == \
        [("made", 0.3, 0.1), ("random", 0.38, 0.02)]              # the sum has no random one of its size
    assert train_eval.score_rows(rows[:2]) == train_eval.score_rows(rows[:4]) == []


def challenge_row(**other):
    return {"data": "cifar100", "train": "out/cifar100/distilled", "protocol": "challenge", "epochs": 1001,
            "judge": "ConvNetD3-W128", "size": 32, "runs": 3, "mean": 14.7, "device": "cuda:0",
            "recipe": other.get("data", "cifar100"), **other}


def test_the_challenges_score_is_the_mean_over_its_data_sets_and_of_exact_rows_alone():
    tiny = challenge_row(data="tiny-imagenet", size=64, mean=6.5)
    assert train_eval.challenge_score([challenge_row(), tiny]) == pytest.approx(10.6)
    assert train_eval.challenge_score([challenge_row(mean=1.), tiny, challenge_row()]) == pytest.approx(10.6)
    for wrong in ({"epochs": 1000}, {"protocol": "short"}, {"runs": 2}, {"train": "random"}, {"size": 64},
                  {"train": "made+full"}, {"data": "cifar100-validation"}, {"device": "cuda:0 bf16"},
                  {"judge": "ResNet-18"}, {"data": "cifar10"}, {"recipe": "folder"}):
        assert train_eval.challenge_score([challenge_row(**wrong), tiny]) is None
    scores = {"kind": "scores", "data": "cifar100", "train": "out/cifar100/distilled", "hlr": 0.1, "ior": 0.1}
    assert train_eval.challenge_score([scores, challenge_row(), tiny]) == pytest.approx(10.6)


@pytest.mark.parametrize("name, home, score", [
    ("cifar100", "out/cifar100", "mean over cifar100 and tiny-imagenet: 28.3\n"),
    ("cifar100", "out/cifar100/other", "mean over cifar100 and tiny-imagenet: 28.3\n"),
    ("cifar100-validation", "out/cifar100-validation", None)])
def test_the_score_is_printed_once_both_data_sets_have_their_row(name, home, score, monkeypatch, tmp_path,
                                                                 capsys):
    """A stand-in for CIFAR-100: digits in colour, and judges that are right half of the time."""
    whole, recipe = datasets.load("digits", recipe="cifar100"), recipes.RECIPES["cifar100"]
    monkeypatch.setattr(datasets, "load", lambda *_: whole._replace(name=name, recipe=recipe))
    monkeypatch.setattr(train_eval, "train_judges", lambda *p, **_: [(None, [50.]) for _ in p[4]])
    for c in range(10):
        imageset.write_png(tmp_path / "made" / str(c) / "0.png",
                           whole.train.images[whole.train.labels == c][0])
    twin = tmp_path / home.replace(name, "tiny-imagenet") / "results.jsonl"
    train_eval.main(["made", "--out", home])
    assert "challenge score" not in capsys.readouterr().out
    twin.parent.mkdir(parents=True)
    twin.write_text(json.dumps(challenge_row(data="tiny-imagenet", size=64, mean=6.6)) + "\n")
    train_eval.main(["made", "--out", home])
    said = capsys.readouterr().out
    assert f"challenge score, {score}" in said if score else "challenge score" not in said


def test_a_distilled_folder_is_read_once(monkeypatch, tmp_path):
    train, seen, real = datasets.load("digits").train, [], imageset.read_set
    for c in range(10):
        imageset.write_png(tmp_path / "one" / str(c) / "0.png", train.images[train.labels == c][0])
    monkeypatch.setattr(imageset, "read_set", lambda path, *how: seen.append(str(path)) or real(path, *how))
    monkeypatch.setattr(train_eval, "train_judges", lambda *p, **_: [(None, [50.]) for _ in p[4]])
    train_eval.main(["one", "one+random"])
    assert seen == ["one"]


def test_copies_follow_the_images_and_keep_their_labels():
    train = datasets.load("digits").train.pick(torch.arange(50))
    more = train_eval.with_copies(train, 3, plain, generator())
    assert more.images.shape == (200, 1, 8, 8) and more.images.dtype == torch.uint8
    assert torch.equal(more.labels, train.labels.repeat(4)) and torch.equal(more.images[:50], train.images)
    again, other = (train_eval.with_copies(train, 3, plain, generator(seed)) for seed in (0, 1))
    assert torch.equal(more.images, again.images) and not torch.equal(more.images, other.images)
    copies = more.images[50:].view(3, 50, 1, 8, 8).float()
    assert (copies[0] != copies[1]).any() and (copies - train.images.float()).abs().mean() < 40


def test_post_augmentation_has_its_ranges_and_mirrors_only_where_the_recipe_does():
    axis = torch.linspace(40, 215, 65)
    ramp = axis.expand(3000, 1, 65, 65).round().to(torch.uint8)   # brighter to the right
    for name, limit, share in (("digits", 15, 0), ("folder", 60, 0.8)):
        out = train_eval.post_augment(ramp, recipes.RECIPES[name], generator()).float()[:, 0]
        right, down = out[:, 32, 36] - out[:, 32, 28], out[:, 36, 32] - out[:, 28, 32]
        angle = torch.atan2(down, right.abs()).rad2deg()
        assert abs(float((right < 0).float().mean()) - share) < 0.03
        assert limit - 1.5 < angle.abs().max() < limit + 3        # of whole grey levels
        assert 0.18 < (angle == 0).float().mean() < 0.32          # a fifth is not turned, and some hardly
        level, slope = out[:, 32, 32], torch.hypot(right, down) / (axis[36] - axis[28])
        assert 0.2 < ((level == 128) & (slope > 0.95) & (slope < 1.05)).float().mean() < 0.3
        lowest, highest = (255 * (128 / 255 * (1 - k) - k) for k in (0.2, -0.2))
        assert 255 * (lowest / 255) ** 1.2 - 2 < level.min() < 50 and 190 < level.max() < highest + 15


def test_pda_adds_copies_to_the_named_sources_alone(monkeypatch):
    monkeypatch.setattr(train_eval, "train_judges", lambda *p, **_: [(None, [50.]) for _ in p[4]])
    train_eval.main(["random", "--ipc", "2", "--pda", "3"])
    rows, scores = read_results()
    assert [(row["train"], row["pda"], row["ipc"], row["images"]) for row in rows] == [
        ("random", 3, 2, 80), ("random", 0, 2, 20), ("kmeans", 0, 2, 20), ("full", 0, 125, 1257)]
    assert [row["train"] for row in scores] == ["random", "kmeans"]


def test_colour_changes_brightness_saturation_and_contrast_in_their_ranges():
    x = torch.randn(4000, 3, 4, 4)
    out = train_eval.color(x, generator())
    shift = (out - x).mean(dim=(1, 2, 3))                         # saturation and contrast keep the mean
    assert -0.5 <= shift.min() < -0.45 and 0.45 < shift.max() <= 0.5 and abs(shift.mean()) < 0.02
    grey = lambda z: z.mean(1, keepdim=True)
    contrast = grey(out).std(dim=(2, 3)) / grey(x).std(dim=(2, 3))
    assert 0.5 <= contrast.min() < 0.52 and 1.48 < contrast.max() <= 1.5 + 1e-3
    saturation = (out - grey(out)).std(dim=(1, 2, 3)) / (x - grey(x)).std(dim=(1, 2, 3)) / contrast.flatten()
    assert saturation.min() < 0.05 and 1.95 < saturation.max() <= 2 + 1e-3


def test_crop_shifts_by_an_eighth_and_fills_with_zeros():
    x = torch.arange(1, 32 * 32 + 1.).view(1, 1, 32, 32).repeat(3000, 2, 1, 1)
    out, seen = train_eval.crop(x, generator()), set()
    for image in out:
        y, z = (image[0] == 528).nonzero()[0].tolist()            # the pixel of row 16, column 15 is here
        dy, dx = y - 16, z - 15
        seen.add((dy, dx))
        assert torch.equal(image, F.pad(x[0], (8, 8, 8, 8))[:, 8 - dy:40 - dy, 8 - dx:40 - dx])
    assert seen == {(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5)}


def test_cutout_zeroes_one_clamped_box_of_half_the_size():
    out = train_eval.cutout(torch.ones(4000, 3, 32, 32), generator())
    heights = (out == 0).all(1).any(2).sum(1)
    assert heights.max() == 16 and heights.min() == 8             # the centre lies in 0..32
    widths, zeroed = (out == 0).all(1).any(1).sum(1), (out == 0).all(1).flatten(1).sum(1)
    assert (zeroed == heights * widths).all()                     # a full box


def test_flip_mirrors_half():
    x = torch.randn(2000, 1, 4, 4)
    out = train_eval.flip(x, generator())
    same, mirrored = ((out == z).flatten(1).all(1) for z in (x, x.flip(3)))
    assert (same | mirrored).all() and 0.45 < mirrored.float().mean() < 0.55


def test_scale_and_rotate_have_their_ranges():
    axis = torch.linspace(-1, 1, 65)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    ramp = torch.stack([x, y]).repeat(2000, 1, 1, 1)              # pixel values are its coordinates
    centre = lambda out: (out[:, :, 32, 36] - out[:, :, 32, 28], out[:, :, 36, 32] - out[:, :, 28, 32])
    along, across = centre(train_eval.scale(ramp, generator()))
    for factor in (along[:, 0] / 0.25, across[:, 1] / 0.25):
        assert 1 / 1.2 - 1e-3 <= factor.min() < 0.84 and 1.19 < factor.max() <= 1.2 + 1e-3
    assert abs(torch.corrcoef(torch.stack([along[:, 0], across[:, 1]]))[0, 1]) < 0.1  # independent
    along, _ = centre(train_eval.rotate(ramp, generator()))
    angle = torch.atan2(along[:, 1], along[:, 0]).rad2deg()
    assert -15.1 <= angle.min() < -14.5 and 14.5 < angle.max() <= 15.1


def test_one_family_is_drawn_per_batch(monkeypatch):
    seen = []
    for name in list(train_eval.FAMILIES):
        monkeypatch.setitem(train_eval.FAMILIES, name, lambda x, g, name=name: seen.append(name) or x)
    for seed in range(600):
        train_eval.dsa(torch.zeros(2, 1, 8, 8), ["crop", "scale", "flip"], None, generator(seed))
    assert len(seen) == 600 and set(seen) == {"crop", "scale", "flip"}
    assert all(150 < seen.count(name) < 250 for name in set(seen))


def test_no_augmentation_asks_the_device_for_a_number(monkeypatch):
    """Tensors without numbers: whoever asked for one, and made a GPU wait, would fail."""
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.zeros(1, device="meta").tolist()
    box = torch.ones(2, 3, device="meta")
    monkeypatch.setattr(train_eval, "random_boxes", lambda *_: (0 * box, box))          # drawn where g is
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8, device="meta")
    labels = torch.zeros(3, dtype=torch.int64, device="meta")
    for protocol in train_eval.PROTOCOLS.values():
        for seed in range(20):
            x, _ = protocol.augment(images, labels, recipes.RECIPES["cifar100"], generator(), generator(seed))
            assert x.shape == images.shape and x.device.type == "meta"
    constant = train_eval.constant((0.5, 0.25), torch.device("cpu"))
    assert constant is train_eval.constant((0.5, 0.25), torch.device("cpu"))


def test_digits_are_never_mirrored():
    assert "flip" not in recipes.RECIPES["digits"].augment and not recipes.RECIPES["digits"].flip


def test_selections_against_plain_loops():
    x = torch.randn(30, 3)
    herded, target, total = train_eval.choose_herding(x, 4, None).tolist(), x.mean(0), torch.zeros(3)
    for k, j in enumerate(herded):
        others = [i for i in range(30) if i not in herded[:k]]
        assert j == min(others, key=lambda i: float((target - (total + x[i]) / (k + 1)).norm()))
        total += x[j]
    centers = train_eval.choose_kcenter(x, 4, None).tolist()
    for k in range(1, 4):
        gap = [min(float((x[i] - x[j]).norm()) for j in centers[:k]) for i in range(30)]
        assert centers[k] == max(range(30), key=lambda i: gap[i])


def test_kmeans_of_one_image_is_the_class_mean():
    train = datasets.load("digits").train
    means = train_eval.kmeans(train, 1, None, generator())
    for c in range(10):
        mean = train.images[train.labels == c].double().mean(0).round()
        assert (means.images[c].double() - mean).abs().max() <= 1 and means.labels[c] == c


def test_large_sets_get_fewer_epochs():
    recipe = dataclasses.replace(plain, epochs=200, views=32_000)
    assert [count_epochs(recipe, n, 10) for n in (10, 100, 1257, 10**6)] == [200, 200, 25, 1]


def test_a_row_says_everything():
    row = evaluate("random", datasets.load("digits"), ipc=2, runs=3, seed=0)
    assert row["images"] == 20 and row["ipc"] == 2 and len(row["accuracy"]) == row["runs"] == 3
    assert row["mean"] == pytest.approx(sum(row["accuracy"]) / 3, abs=1e-3)
    spread = math.sqrt(sum((a - row["mean"]) ** 2 for a in row["accuracy"]) / 2)
    assert row["std"] == pytest.approx(spread, abs=1e-3)
    assert row["best"] >= row["mean"] - 1e-3 and row["pda"] == 0


def test_labels_survive_the_trip_through_folders(tmp_path):
    """Real images written as a distilled folder train as well as the real images themselves."""
    whole = datasets.load("digits")
    counts = [0] * 10
    for image, label in zip(whole.train.images[:300], whole.train.labels[:300].tolist(), strict=True):
        imageset.write_png(tmp_path / "real" / str(label) / f"{counts[label]:05}.png", image)
        counts[label] += 1
    row = evaluate(str(tmp_path / "real"), whole, ipc=None, runs=1, seed=0, epochs=20)
    assert row["images"] == 300 and row["mean"] > 85
    shutil.rmtree(tmp_path / "real" / "4")
    with pytest.raises(UserError, match=r"missing \['4'\]"):
        evaluate(str(tmp_path / "real"), whole, ipc=None, runs=1, seed=0)


def test_the_augmentation_stays_in_float32(monkeypatch):
    """Coordinates in bfloat16 would be three quarters of a pixel off at 224 pixels."""
    seen = []

    def note(x, *_):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return x
    monkeypatch.setattr(train_eval, "dsa", note)
    few = datasets.load("digits").train.pick(torch.arange(8))
    train_judge(few, few, plain, 2, 0, bf16=True)
    assert seen == [(torch.float32, False)] * 2


def test_a_judge_whose_loss_is_not_finite_is_no_row(monkeypatch):
    monkeypatch.setattr(train_eval, "dsa", lambda x, *_: x * math.nan)
    few = datasets.load("digits").train.pick(torch.arange(8))
    for seeds in ([0], [0, 1, 2]):                                # alone, and in threads
        with pytest.raises(UserError, match="not finite in epoch 1"):
            train_judges([few] * len(seeds), few, plain, 2, seeds)


def test_runs_of_two_seeds_share_no_judge(monkeypatch):
    seeds = []
    monkeypatch.setattr(train_eval, "train_judges",
                        lambda *p, **_: seeds.extend(p[4]) or [(None, [50.]) for _ in p[4]])
    for seed in (0, 1):
        evaluate("random", datasets.load("digits"), ipc=1, runs=5, seed=seed)
    assert len(set(seeds)) == 10


def test_gu_is_for_a_hundred_classes_at_most(sentence, monkeypatch):
    whole = datasets.load("digits")
    many = whole.train._replace(classes=[str(c) for c in range(101)])
    monkeypatch.setattr(datasets, "load", lambda *_: whole._replace(train=many))
    assert "up to 100 classes" in sentence(train_eval.main, "full", "--protocol", "gu")


def test_the_table_and_the_file(capsys):
    minimax.main([])
    sample.main(["--ipc", "2"])
    train_eval.main(["distilled", "herding", "kmeans+random", "--runs", "2"])
    rows, scores = read_results()
    assert [row["train"] for row in rows] == [
        "out/digits/distilled", "herding", "kmeans+random", "random", "kmeans", "full"]
    assert [row["images"] for row in rows] == [20, 20, 40, 20, 20, 1257]
    assert set(rows[0]) == {"data", "cut", "train", "ipc", "pda", "images", "recipe", "protocol", "judge",
                            "size", "epochs", "runs", "accuracy", "mean", "std", "best", "seconds", "device",
                            "seed", "command"}
    assert [rows[0][key] for key in ("protocol", "judge", "size")] == ["short", "ConvNetD3-W128", 16]
    assert rows[0]["command"] == "python train_eval.py distilled herding kmeans+random --runs 2"
    said = capsys.readouterr().out
    assert all(f"{row['mean']:.2f}" in said for row in rows) and "best: of up to 10 epochs" in said
    assert "digits | 1,257 images to train on, 540 to test | protocol short | judge ConvNetD3" in said
    own, full, random = (next(row["mean"] for row in rows if row["train"] == name)
                         for name in ("out/digits/distilled", "full", "random"))
    assert f"out/digits/distilled | HLR {(full - own) / 100:.3f} | IOR {(own - random) / 100:.3f}\n" in said
    assert [row["train"] for row in scores] == ["out/digits/distilled", "herding", "kmeans"]  # of equal size
    assert set(scores[0]) == {"kind", "data", "cut", "train", "ipc", "protocol", "hlr", "ior", "command"}
    assert scores[0]["hlr"] == pytest.approx((full - own) / 100)


def read_results(path="out/digits/results.jsonl"):
    """(the judges' rows, the scores')."""
    rows = [json.loads(line) for line in open(path)]
    return [row for row in rows if "kind" not in row], [row for row in rows if row.get("kind") == "scores"]


def test_a_set_larger_than_the_real_one_has_no_random_row(capsys):
    train = datasets.load("digits").train
    np.savez("many.npz", images=torch.cat([train.images, train.images]),
             labels=torch.cat([train.labels, train.labels]), classes=train.classes)
    train_eval.main(["many.npz", "--runs", "1", "--epochs", "1"])
    assert "a class has only 122 real images" in capsys.readouterr().out
    rows, scores = read_results()
    assert [row["train"] for row in rows] == ["many.npz", "full"] and not scores


def test_what_makes_no_sense_is_refused(sentence, tmp_path):
    assert "python sample.py --steps 10 makes it" in sentence(train_eval.main)
    for argv, words in ((["random", "--ipc", 0], "--ipc must be"),
                        (["random", "--runs", 0], "--runs must be"),
                        (["random", "--epochs", 0], "--epochs must be"), (["nowhere"], "there is no nowhere"),
                        (["random", "--size", 0], "--size must be"), (["--net", "lenet"], "choose convnet3"),
                        (["random", "--pda", -1], "--pda must be at least 0"),
                        (["random", "--net", "resnet18", "--size", 8], "16 pixels or more, not 8"),
                        (["random", "--ipc", 200], "fewer than --ipc 200")):
        assert words in sentence(train_eval.main, *argv)
    train = datasets.load("digits").train
    for c in range(10):
        imageset.write_png(tmp_path / "one" / str(c) / "0.png", train.images[train.labels == c][0])
    assert "fewer than --ipc 3" in sentence(train_eval.main, "one", "--ipc", 3)


def test_gu_judges_train_by_their_table_of_epochs():
    count = lambda ipc, classes=10: count_epochs(gu, ipc * classes, classes)
    assert [count(ipc) for ipc in (1, 2, 10, 11, 50, 51, 200, 201, 500, 501, 1245)] == \
        [3000, 2000, 2000, 1500, 1500, 1000, 1000, 500, 500, 300, 300]
    assert [count(ipc, 100) for ipc in (1, 10, 20, 50, 100, 1300)] == [2000, 1300, 1000, 1000, 600, 200]


def test_the_gu_rate_falls_by_a_fifth_at_two_thirds_and_five_sixths():
    """As MultiStepLR does, without a fresh optimizer."""
    for epochs in (3000, 1300, 7):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
        fall = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2 * epochs // 3, 5 * epochs // 6], gamma=0.2)
        for epoch in range(epochs):
            assert train_eval.gu_rate(epoch, epochs) == pytest.approx(fall.get_last_lr()[0])
            optimizer.step()
            fall.step()


def spy(monkeypatch):
    """Steps and looks that cost nothing, but are noted: sizes of batches, rates, looks, optimizers.

    The network is linear, and each batch is cut to one image.
    """
    sizes, rates, looks, made, real = [], [], [], [], torch.optim.SGD

    def augment(images, labels, recipe, g, host):
        sizes.append(len(images))
        rates.append(round(made[-1].param_groups[0]["lr"], 8))
        return images[:1].float(), [(labels[:1], 1)]
    monkeypatch.setattr(torch.optim, "SGD", lambda *p, **how: made.append(real(*p, **how)) or made[-1])
    monkeypatch.setattr(train_eval, "accuracy", lambda *_: looks.append(len(sizes)) or 0.)
    linear = lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    monkeypatch.setattr(train_eval.convnet, "judge", linear)
    for name, protocol in train_eval.PROTOCOLS.items():
        monkeypatch.setitem(train_eval.PROTOCOLS, name, protocol._replace(augment=augment))
    return sizes, rates, looks, made


def test_gu_batches_of_64_keep_the_last_part_and_one_optimizer(monkeypatch):
    sizes, rates, looks, made = spy(monkeypatch)
    some = datasets.load("digits").train.pick(torch.arange(70))
    train_judge(some, some, gu, 12, 0)
    assert sizes == [64, 6] * 12 and looks == list(range(2, 25, 2)) and len(made) == 1
    assert rates == [0.01] * 16 + [0.002] * 4 + [0.0004] * 4
    assert made[0].defaults["momentum"] == 0.9 and made[0].defaults["weight_decay"] == 5e-4


def test_gu_looks_a_hundred_times_and_at_the_end(monkeypatch):
    _, _, looks, _ = spy(monkeypatch)
    one = datasets.load("digits").train.pick(torch.arange(1))
    train_judge(one, one, gu, 300, 0)
    assert looks == list(range(3, 301, 3))


def test_the_judge_learns_under_gu():
    train = datasets.load("digits").train
    ten = train.pick(torch.stack([(train.labels == c).nonzero()[0, 0] for c in range(10)]))
    _, accuracies = train_judge(ten, ten, gu, epochs=120, seed=0)
    assert accuracies[-1] >= 80 and len(accuracies) == 100


def test_random_boxes_are_torchvisions():
    corners, sides = train_eval.random_boxes(4000, 224, generator())
    inner = sides < 224
    assert corners[inner].min() == 0 and (corners + sides)[inner].max() == 224 == (corners + sides).max()
    assert all(torch.equal(part, part.round()) for part in (corners, sides))
    draw = lambda: RandomResizedCrop.get_params(torch.zeros(3, 224, 224), (0.5, 1), (3 / 4, 4 / 3))
    theirs = torch.tensor([draw() for _ in range(4000)])
    mine = torch.cat([corners, sides]).T                          # top, left, height, width
    assert torch.allclose(mine.mean(0), theirs.float().mean(0), atol=4)
    assert torch.allclose(mine.std(0), theirs.float().std(0), atol=2)
    share, ratio = sides.prod(0) / 224**2, sides[1] / sides[0]
    assert 0.495 < share.min() < 0.51 and 0.99 < share.max() <= 1
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35


def test_a_box_that_never_fits_is_the_whole(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.full(shape, 1 - 1e-6))  # all of it, 4 to 3
    corners, sides = train_eval.random_boxes(2, 32, generator())
    assert (corners == 0).all() and (sides == 32).all()


def test_enlarged_boxes_are_torchvisions():
    x = torch.rand(20, 3, 32, 32)
    corners, sides = train_eval.random_boxes(20, 32, generator())
    out = train_eval.enlarge(x, corners, sides)
    for i in range(20):
        box = [int(number) for number in (*corners[:, i], *sides[:, i])]
        for antialias in (True, False):                           # the same, since nothing shrinks
            assert torch.allclose(out[i:i + 1], TF.resized_crop(x[i:i + 1], *box, [32, 32],
                                                                antialias=antialias), atol=1e-5)
    whole = train_eval.enlarge(x, torch.zeros(2, 20), torch.full((2, 20), 32.))
    assert torch.allclose(whole, x, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_scales_brightness_contrast_and_saturation_by_up_to_two_fifths(channels):
    x = torch.rand(4000, channels, 6, 6)
    out = train_eval.jitter(x, generator(), generator(1))
    mean = lambda z: TF.rgb_to_grayscale(z).mean(dim=(1, 2, 3))   # the other two keep it, in any order
    brightness = mean(out) / mean(x)
    spread = lambda z: TF.rgb_to_grayscale(z).std(dim=(1, 2, 3))
    contrast = spread(out) / spread(x) / brightness
    chroma = lambda z: (z - TF.rgb_to_grayscale(z)).std(dim=(1, 2, 3))
    factors = [brightness, contrast] + [chroma(out) / chroma(x) / brightness / contrast] * (channels == 3)
    for factor in factors:
        assert 0.598 <= factor.min() < 0.61 and 1.39 < factor.max() <= 1.402 and abs(factor.mean() - 1) < 0.02
    assert torch.corrcoef(torch.stack(factors)).fill_diagonal_(0).abs().max() < 0.05
    if channels == 1:
        expected = (x - mean(x).view(-1, 1, 1, 1)) * (brightness * contrast).view(-1, 1, 1, 1)
        assert torch.allclose(out - mean(out).view(-1, 1, 1, 1), expected, atol=1e-5)


def test_lighting_adds_one_colour_to_the_whole_image():
    x = torch.rand(20_000, 3, 2, 2)
    added = train_eval.lighting(x, generator()) - x
    colour = added[:, :, 0, 0]
    assert torch.allclose(added, colour[:, :, None, None].expand_as(added), atol=1e-6)
    vectors = train_eval.PRINCIPAL / train_eval.PRINCIPAL.norm(dim=0)
    assert torch.allclose(vectors.T @ vectors, torch.eye(3), atol=1e-3)
    along = (colour @ vectors).std(dim=0) / torch.tensor([0.2175, 0.0188, 0.0045])
    assert torch.allclose(along, torch.full((3,), 0.1), rtol=0.03)
    assert colour.mean(0).abs().max() < 1e-3
    assert torch.equal(train_eval.lighting(x[:, :1], generator()), x[:, :1])


def test_cutmix_pastes_a_box_of_the_partner_and_tells_its_area():
    """Against plain integers: the box of Yun et al., cut off at the border."""
    x = torch.arange(5.).view(5, 1, 1, 1).expand(5, 2, 24, 32) + 10      # each image has a value of its own
    shares = []
    for seed in range(300):
        mixed, partner, own = train_eval.cutmix(x, generator(seed))
        again = generator(seed)
        assert torch.equal(partner, torch.randperm(5, generator=again))
        lam, cy, cx = torch.rand(3, generator=again)
        h, w = int(24 * torch.sqrt(1 - lam)), int(32 * torch.sqrt(1 - lam))
        top, left = int(24 * cy) - h // 2, int(32 * cx) - w // 2
        bottom, right = min(24, top + h // 2 * 2), min(32, left + w // 2 * 2)
        expected = x.clone()
        expected[:, :, max(0, top):bottom, max(0, left):right] = \
            x[partner][:, :, max(0, top):bottom, max(0, left):right]
        assert torch.equal(mixed, expected)
        area = (bottom - max(0, top)) * (right - max(0, left))
        assert float(own) == pytest.approx(1 - area / (24 * 32), abs=1e-6)
        shares.append(float(own))
    assert min(shares) < 0.25 and max(shares) > 0.98


def test_the_mixed_loss_is_that_of_soft_labels(monkeypatch):
    seen, real = [], train_eval.cutmix
    monkeypatch.setattr(train_eval, "cutmix", lambda x, g: seen.append(real(x, g)) or seen[0])
    logits, few = torch.randn(6, 10), datasets.load("digits").train.pick(torch.arange(6))
    x, targets = train_eval.gu_augment(train_eval.at_size(few.images, 16), few.labels, gu, *[generator()] * 2)
    loss = train_eval.mixed_loss(logits, targets)
    mixed, partner, own = seen[0]
    labels = F.one_hot(few.labels, 10).float()
    assert x is mixed
    assert loss == pytest.approx(float(F.cross_entropy(logits, own * labels + (1 - own) * labels[partner])))


def test_gu_mirrors_only_where_the_recipe_does(monkeypatch):
    seen = []
    monkeypatch.setattr(train_eval, "flip", lambda x, g: seen.append(1) or x)
    for flip in (False, True):
        train_eval.gu_augment(torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.tensor([0, 1]),
                              dataclasses.replace(gu, flip=flip), generator(), generator())
        assert len(seen) == flip


def test_a_gu_row_names_its_protocol_and_its_best_is_no_less_than_its_last():
    digits = datasets.load("digits")._replace(recipe=gu)
    row = evaluate("random", digits, ipc=1, runs=2, seed=0, epochs=4)
    assert (row["protocol"], row["judge"], row["size"], row["epochs"]) == ("gu", "ConvNetD3-W128", 16, 4)
    assert row["best"] >= row["mean"] - 1e-3


def test_batch_norm_judges_are_tested_in_their_other_mode():
    train = datasets.load("digits").train.pick(torch.arange(24))
    judge, _ = train_judge(train, train, dataclasses.replace(gu, net="timm:test_resnet"), 2, 0)
    assert not judge.training and judge.net.bn1.num_batches_tracked == 2     # a look lies between them
    alone, together = (torch.cat([judge(x) for x in train_eval.normalise(train.images, gu).split(n)])
                       for n in (1, 24))
    assert torch.allclose(alone, together, atol=1e-4)


@pytest.fixture
def image_files(tmp_path, monkeypatch):
    """(Data of two classes, 6 JPEGs each to train on and 2 to test, read at 16 px; the names read so far)."""
    for part, count in (("train", 6), ("test", 2)):
        for c, name in enumerate(("ant", "bee")):
            for i in range(count):
                (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
                level = torch.randint(120 * c, 120 * c + 100, (3, 20, 24)).to(torch.uint8)
                TF.to_pil_image(level).save(tmp_path / part / name / f"{i}.jpg")
    recipe = dataclasses.replace(recipes.RECIPES["imagenet"], net="convnet3", judge_size=16)
    train, test = (imageset.list_folder(tmp_path / part, 16, 3) for part in ("train", "test"))
    found, opened, real = datasets.Data("insects", recipe, train, test.read(),
                                        "a few"), [], imageset.open_image
    monkeypatch.setattr(imageset, "open_image", lambda path, *how: opened.append(path) or real(path, *how))
    monkeypatch.setitem(train_eval.PROTOCOLS, "gu",
                        train_eval.PROTOCOLS["gu"]._replace(epochs=lambda *_: 2))
    return found, opened


def test_of_files_random_reads_only_the_chosen(image_files):
    found, opened = image_files
    row = evaluate("random", found, ipc=2, runs=2, seed=0)
    assert len(opened) == 8 and row["images"] == 4 and row["protocol"] == "gu"
    ours, whole = found.train, found.train.read()
    del opened[:]
    choose = train_eval.SELECTORS["random"]
    one, two = (choose(train, 2, train.labels, generator()) for train in (ours, whole))
    assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels) and len(opened) == 4
    one, two = (train_eval.kmeans(train, 2, None, generator()) for train in (ours, whole))
    assert torch.equal(one.images, two.images) and len(opened) == 16


def test_of_files_herding_and_kcenter_read_all_once(image_files):
    found, opened = image_files
    features = train_eval.judge_features(found, 0, False)
    for source, images in (("herding", 4), ("kcenter", 4), ("herding+kcenter", 8)):
        assert evaluate(source, found, ipc=2, runs=1, seed=0, features=features)["images"] == images
    assert len(opened) == 12


def test_imagenets_protocol_from_the_command_line(pictures, tmp_path, capsys):
    """Any folder, as files; a distilled folder of larger pictures is brought to the judge's size."""
    for name, level in (("ant", 40), ("bee", 200)):
        imageset.write_png(tmp_path / "drawn" / name / "0.png",
                           torch.full((3, 64, 64), level, dtype=torch.uint8))
    argv = ["--data", str(pictures), "--recipe", "imagenet", "--net", "resnetap10", "--size", "16"]
    train_eval.main(["drawn", "drawn+full", "kmeans", *argv, "--runs", "1", "--epochs", "2"])
    rows = [json.loads(line) for line in open("out/pictures/results.jsonl")]
    assert [(row["train"], row["images"]) for row in rows] == \
        [("drawn", 2), ("drawn+full", 18), ("kmeans", 2), ("random", 2)]
    assert all((row["protocol"], row["judge"], row["size"]) == ("gu", "ResNetAP-10", 16) for row in rows)
    said = capsys.readouterr().out
    assert "16 images to train on, 4 to test | protocol gu | judge ResNetAP-10 at 16 px" in said
    assert "best: of up to 100 epochs" in said


def test_broken_files_are_named_or_left_out(pictures, sentence, capsys):
    for broken in pictures.glob("ant/*.png"):
        if broken.stem < "8":
            broken.write_bytes(b"no picture")
    argv = ["full", "--data", str(pictures), "--recipe", "imagenet", "--net", "convnet3", "--size", "16",
            "--runs", "1", "--epochs", "1", "--ipc", "1"]
    assert "--skip-broken leaves them out" in sentence(train_eval.main, *argv)
    train_eval.main([*argv, "--skip-broken"])
    assert "left out: cannot read the image" in "".join(capsys.readouterr())
    assert all(json.loads(line)["images"] < 16 for line in open("out/pictures/results.jsonl"))
