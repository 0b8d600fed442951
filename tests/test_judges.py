"""Judges train side by side as they would alone, resume where they were killed, and stop at once."""
import dataclasses
import itertools
import json
import math
import threading
import types

import pytest
import torch

import convnet
import train_eval
from nanodd import files, recipes
from nanodd.data import datasets
from nanodd.errors import UserError
from nanodd.judging import augment, judges, results
from conftest import evaluate, train_judge
from train_eval import train_judges

plain = dataclasses.replace(recipes.RECIPES["digits"], augment="crop")
GU = dataclasses.replace(plain, protocol="gu")
challenge = dataclasses.replace(plain, protocol="challenge")
pytestmark = pytest.mark.usefixtures("narrow")


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


def killed(train, monkeypatch, after):
    """Runs train(), saved at every epoch, up to the optimizer's step number `after`."""
    with monkeypatch.context() as plug, pytest.raises(PulledPlug):
        plug.setattr(files, "SAVE_EVERY", 0)
        pull_the_plug(plug, after)
        train()


@pytest.mark.parametrize("recipe", [plain, challenge, GU], ids=["short", "challenge", "gu"])
def test_a_judge_resumes_where_it_was_killed_to_the_bit(recipe, monkeypatch, tmp_path):
    batches_of_20 = train_eval.PROTOCOLS[recipe.protocol]._replace(batch=20)     # four an epoch
    monkeypatch.setitem(train_eval.PROTOCOLS, recipe.protocol, batches_of_20)
    few = three_sets()[0]

    def train(folder=None):
        return train_judge(few, few, recipe, 8, 5, num_evals=4, checkpoint=judges.JudgeCheckpoint(folder))
    judge, accuracies = train()
    for after in (13, 23, 30):                                    # of 32; the rate falls after 24, gu: 20, 24
        folder = tmp_path / str(after)
        killed(lambda folder=folder: train(folder), monkeypatch, after)
        state = torch.load(folder / "seed5.pt", weights_only=True)
        assert state["epoch"] == (after - 1) // 4 - 1
        again, curve = train(folder)
        assert curve == accuracies and largest_gap([again], [judge]) == 0
        done, curve = train(folder)                               # one that is done stays as it is
        assert curve == accuracies and largest_gap([done], [judge]) == 0


def test_a_judge_is_saved_every_ten_seconds_and_at_the_end(monkeypatch, tmp_path):
    now, saved, step = [0], [], torch.optim.SGD.step
    monkeypatch.setattr(judges, "clock", lambda: now[0])
    monkeypatch.setattr(files, "SAVE_EVERY", 10)
    monkeypatch.setattr(judges.JudgeCheckpoint, "save", lambda self, run, epoch, *_: saved.append(epoch))

    def four_seconds(self, *how):
        now[0] += 4
        return step(self, *how)
    monkeypatch.setattr(torch.optim.SGD, "step", four_seconds)
    few = three_sets()[0].pick(torch.arange(4))
    train_judge(few, few, plain, 8, 0, checkpoint=judges.JudgeCheckpoint(tmp_path))
    assert saved == [2, 5, 7]


def test_a_row_resumes_with_its_judges_and_adds_its_seconds_up(monkeypatch, tmp_path):
    digits, epochs, now = datasets.load("digits"), [], [0]
    digits = digits._replace(train=digits.train.pick(torch.arange(200)))
    monkeypatch.setattr(judges, "clock", lambda: now[0])          # stands still
    row = lambda source="random", **how: evaluate(source, digits, ipc=2, runs=2, seed=3, epochs=6, **how)
    whole = row()
    killed(lambda: row(keep=tmp_path / "judges"), monkeypatch, after=9)
    folder, = (tmp_path / "judges").iterdir()
    for file in folder.iterdir():                               # as if that had taken a thousand seconds
        state = torch.load(file, weights_only=True)
        torch.save({**state, "seconds": 1000}, file)
        epochs.append(state["epoch"])
    assert sum(epochs) >= 3
    other = row("full", keep=tmp_path / "judges")               # another row has a folder of its own
    assert other["seconds"] == 0 and folder.exists()
    again, states = row(keep=tmp_path / "judges"), len(epochs)
    assert again["accuracy"] == whole["accuracy"]
    assert again["seconds"] == 1000 * states / judges.at_a_time(2)
    assert not folder.exists()


def test_one_item_of_the_loop_is_one_epoch_and_it_starts_anywhere():
    few = three_sets()[0]
    few = few._replace(images=augment.resized(few.images, 16))
    run, again = (judges.new_run(convnet.judge, few, plain, 0) for _ in range(2))
    loop = train_eval.train(run.judge, run.images, plain, 3, run.judge, run.rng, run.cpu_rng)
    assert [epoch for epoch, _, _ in loop] == [0, 1, 2]
    _, optimizer, _ = next(train_eval.train(again.judge, again.images, plain, 3, again.judge, again.rng,
                                            again.cpu_rng))
    assert largest_gap([run.judge], [again.judge]) > 0
    for _ in train_eval.train(again.judge, again.images, plain, 3, again.judge, again.rng, again.cpu_rng, 1,
                              optimizer):
        pass
    assert largest_gap([run.judge], [again.judge]) == 0


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


def test_ctrl_c_stops_all_judges_at_their_next_step(two_threads, monkeypatch):
    """Pressed while the main thread waits; from the fifth step on, each step waits for the judges' stop."""
    steps, counter, fifth, stop, step = [], itertools.count(1), threading.Event(), threading.Event(), \
        torch.optim.SGD.step

    def slow(self, *how):
        steps.append(next(counter))
        if steps[-1] >= 5:
            fifth.set()
            stop.wait()
        return step(self, *how)

    def interrupted(futures):
        fifth.wait()
        raise KeyboardInterrupt
    monkeypatch.setattr(torch.optim.SGD, "step", slow)
    monkeypatch.setattr(judges, "threading", types.SimpleNamespace(Event=lambda: stop))
    monkeypatch.setattr(judges, "as_completed", interrupted)
    trains = three_sets()
    with pytest.raises(KeyboardInterrupt):
        train_judges(trains, trains[0], plain, 10_000, [0, 1, 2])
    assert 5 <= len(steps) <= 7 and torch.get_num_threads() == 2  # two judges at a time


def test_nothing_compiles_and_the_judges_train_all_the_same(monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("No working C++ compiler found\nand a page of advice")
    monkeypatch.setattr(torch, "compile", fail)
    alone(monkeypatch)
    train_eval.main(["random", "--compile", "--ipc", "1", "--runs", "2", "--epochs", "1"])
    sentence = "judges are not compiled, as torch.compile fails here: No working C++ compiler found\n"
    assert capsys.readouterr().err.count(sentence) == 1
    assert [json.loads(line)["runs"] for line in open("out/digits/results.jsonl")] == [2]


def alone(monkeypatch):
    """No row of real images beside the named ones: the full set would take seconds."""
    monkeypatch.setitem(train_eval.PROTOCOLS, "short", train_eval.PROTOCOLS["short"]._replace(baselines=()))


@pytest.mark.parametrize("flags, pays, expected", [
    (["--compile"], math.inf, 1 + 2), ([], 2 * 10 * 16**2, 1 + 2),          # a trial and two judges
    ([], 2 * 10 * 16**2 + 1, 0), (["--no-compile"], 0, 0)])
def test_judges_are_compiled_where_asked_or_where_they_see_many_pixels(flags, pays, expected, monkeypatch,
                                                                       capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    monkeypatch.setattr(judges, "PAYS", {"cpu": pays})
    alone(monkeypatch)
    train_eval.main(["random", "--ipc", "1", "--runs", "2", "--epochs", "1", *flags])
    assert len(compiled) == expected
    assert ("as they will see 20 images" in capsys.readouterr().err) == bool(expected)
    row = json.loads(open("out/digits/results.jsonl").readline())
    assert row["device"].endswith("compiled") == bool(expected)


def test_on_a_gpu_whole_batches_replay_graphs_and_the_rest_of_an_epoch_is_not_compiled(monkeypatch):
    """Each smaller batch would be compiled anew, in half a minute."""
    asked, judge = [], lambda x: "judge"
    monkeypatch.setattr(torch, "compile", lambda network, **how: asked.append(how) or (lambda x: "graph"))
    network = judges.compiled_judge(judge, 4, torch.device("cuda"))
    assert asked == [{"mode": "reduce-overhead", "dynamic": False}]
    assert [network(torch.zeros(n)) for n in (4, 3, 1)] == ["graph", "judge", "judge"]
    assert judges.compiled_judge(judge, 4, torch.device("cpu"))(torch.zeros(3)) == "graph" and asked[1] == {}
    rows = [judges.Row(three_sets(), [0, 1, 2], 10**6)]         # no set has a whole batch
    assert not judges.compiles(True, rows, plain, None, torch.device("cuda"), 10**5, False)


def test_the_last_judge_of_a_row_trains_beside_the_first_of_the_next(two_threads, monkeypatch):
    """Three rows of three judges, two at a time; the rows come in their order, with judges of their own."""
    at_once, together, step = set(), [], torch.optim.SGD.step

    def note(self, *how):
        at_once.add(threading.get_ident())
        together.append(len(at_once))
        return step(self, *how)
    monkeypatch.setattr(torch.optim.SGD, "step", note)
    trains = three_sets()
    rows = [judges.Row([part] * 3, [0, 1, 2], 2, str(k)) for k, part in enumerate(trains)]
    done = [judged for judged, _ in train_eval.train_rows(rows, trains[0], plain)]
    assert len(at_once) == 2 and torch.get_num_threads() == 2
    torch.set_num_threads(1)
    alone = [[train_judge(part, trains[0], plain, 2, seed) for seed in range(3)] for part in trains]
    assert [[curve for _, curve in row] for row in done] == [[curve for _, curve in row] for row in alone]


def test_a_table_that_cannot_be_written_ends_its_judges(two_threads, monkeypatch, sentence):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(results, "append_row", full)
    before = set(threading.enumerate())
    assert "No space left" in sentence(train_eval.main, "random", "--ipc", "1", "--runs", "1")
    assert not any("ThreadPool" in thread.name for thread in set(threading.enumerate()) - before)


def test_a_judge_whose_loss_is_not_finite_is_no_row(monkeypatch):
    monkeypatch.setattr(train_eval, "dsa", lambda x, *_: x * math.nan)
    few = datasets.load("digits").train.pick(torch.arange(8))
    for seeds in ([0], [0, 1, 2]):                                # alone, and in threads
        with pytest.raises(UserError, match="not finite in epoch 1"):
            train_judges([few] * len(seeds), few, plain, 2, seeds)


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


def test_batch_norm_judges_are_tested_in_their_other_mode():
    train = datasets.load("digits").train.pick(torch.arange(24))
    judge, _ = train_judge(train, train, dataclasses.replace(GU, net="timm:test_resnet"), 2, 0)
    assert not judge.training and judge.net.bn1.num_batches_tracked == 2     # a look lies between them
    alone, together = (torch.cat([judge(x) for x in augment.normalise(train.images, GU).split(n)])
                       for n in (1, 24))
    assert torch.allclose(alone, together, atol=1e-4)


def test_the_same_seed_gives_the_same_judge():
    few = datasets.load("digits").train.pick(torch.arange(32))
    one, two = (train_judge(few, few, plain, 2, 5)[0] for _ in range(2))
    assert largest_gap([one], [two]) == 0
