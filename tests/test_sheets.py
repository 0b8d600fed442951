"""Sheets of samples: they show the averaged weights at work, and leave no trace in what is trained."""
import functools
import json
import pathlib
from types import SimpleNamespace

import pytest
import torch

import diffusion
import minimax
import sample
from nanodd import cli, files
from nanodd.data import datasets, imageset
from nanodd.networks import models, training
from nanodd.sampling import sheets

ROW = 40 + 2                                                    # pixels: an 8-pixel digit five times as large


def new_start(seed=0):
    """The models.Start of a base model of the digits, after three steps."""
    run = cli.Run("python diffusion.py", torch.device("cpu"), seed, False, None, False, False, "ema")
    start = models.new_base(datasets.load("digits"), pathlib.Path("base.safetensors"), run)
    assert len(list(diffusion.train(*start[:4], start=3))) == 3
    return start


def digits_on(path):
    """The sheet of digits in a file: (rows, columns, 8, 8) uint8."""
    sheet = imageset.open_image(path)
    assert torch.equal(sheet[0], sheet[1]) and torch.equal(sheet[0], sheet[2])      # grey
    cells = sheet[0, 2:, 2:].unfold(0, 40, ROW).unfold(1, 40, ROW)          # (rows, columns, 40, 40)
    assert torch.equal(cells[..., ::5, ::5], cells[..., 4::5, 4::5])
    return cells[..., ::5, ::5]


def test_the_sheet_has_a_row_for_every_line_of_the_log_and_a_column_for_every_class(capsys):
    diffusion.main(["--steps", "20"])
    lines = [json.loads(line) for line in open("out/digits/base.log.jsonl")]
    digits = digits_on("out/digits/base.png")
    assert len(lines) == 10 and digits.shape == (10, 10, 8, 8)
    assert all(not torch.equal(one, two) for one, two in zip(digits[:-1], digits[1:], strict=True))
    assert "out/digits/base.png" in capsys.readouterr().out


def test_a_seed_has_its_picture():
    start, other = new_start(), new_start(seed=1)
    one, two = (sheets.draw(start, 10) for _ in range(2))
    assert one.shape == (10, 1, 8, 8) and torch.equal(one, two)
    assert not torch.equal(one, sheets.draw(other, 10))


def test_a_class_has_as_many_columns_as_the_others():
    start = new_start()
    for phase, columns, labels in (([0, 9], 20, [*range(10), *range(10)]),
                                   ([4, 6], 10, [4, 5, 6, 4, 5, 6, 4, 5, 6]), ([3, 3], 20, 20 * [3])):
        seen = []
        hook = start.trainer.model.y_embedder.embedding_table.register_forward_hook(
            lambda module, inputs, _, seen=seen: seen.append(inputs[0].tolist()))
        sheets.draw(start._replace(header={**start.header, "phase": phase, "guidance": 2.0}), columns)
        hook.remove()
        assert seen[::2] == sheets.STEPS * [labels] and seen[1::2] == sheets.STEPS * [len(labels) * [10]]


def test_drawing_leaves_no_trace():
    start = new_start()
    trainer, state = start.trainer, torch.get_rng_state()
    before = [(tensor.data_ptr(), tensor.clone()) for weights in (trainer.trainable, trainer.ema)
              for tensor in weights.values()]
    sheets.draw(start, 10)
    after = [tensor for weights in (trainer.trainable, trainer.ema) for tensor in weights.values()]
    for (place, value), tensor in zip(before, after, strict=True):
        assert tensor.data_ptr() == place and torch.equal(tensor, value)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training and all(module.training for module in trainer.model.modules())


def test_an_error_while_drawing_leaves_no_trace_either():
    trainer = new_start().trainer
    before = files.fingerprint(trainer.trainable)
    with pytest.raises(ZeroDivisionError), sheets.averaged(trainer) as model:
        assert files.fingerprint(dict(model.named_parameters())) != before
        raise ZeroDivisionError
    assert files.fingerprint(trainer.trainable) == before and trainer.model.training


def test_a_checkpoint_does_not_depend_on_its_sheets(tmp_path, monkeypatch):
    written = []
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        minimax.main(["--steps", "5"])
        written.append([pathlib.Path(f"out/digits/{name}.safetensors").read_bytes()
                        for name in ("base", "minimax")])
        assert len(list(pathlib.Path("out/digits").glob("*.png"))) == (2 if folder == "with" else 0)
        for name in ("growing", "comparing"):
            monkeypatch.setattr(sheets, name, lambda *_: None)
    assert written[0] == written[1]


def test_a_resumed_run_goes_on_with_its_sheet(monkeypatch, capsys):
    real, draw, steps, drawn = diffusion.training_batch, sheets.draw, [0], []
    monkeypatch.setattr(files, "SAVE_EVERY", 0)                 # and saving takes no time: after every step
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: steps[0]))

    def counted(examples, plan, step, *more, stop=None):
        steps[0] += 1
        if step == stop:
            raise KeyboardInterrupt
        return real(examples, plan, step, *more)
    monkeypatch.setattr(diffusion, "training_batch", counted)
    diffusion.main(["--steps", "20", "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(diffusion, "training_batch", functools.partial(counted, stop=13))
        diffusion.main(["--steps", "20", "--out", "cut"])
    assert len(digits_on("cut/base.png")) == 6
    monkeypatch.setattr(sheets, "draw", lambda *args: drawn.append(0) or draw(*args))
    diffusion.main(["--steps", "20", "--out", "cut"])
    assert "resuming from step 13" in capsys.readouterr().out and len(drawn) == 4
    assert torch.equal(digits_on("cut/base.png"), digits_on("whole/base.png"))
    diffusion.main(["--steps", "5", "--out", "cut", "--overwrite"])
    assert len(digits_on("cut/base.png")) == 5                  # another run starts anew


def by_sample(path):
    """What sample.py's own loop and guidance make of a checkpoint and the sheets' noise: (20, 8, 8) uint8."""
    network, header = models.load_model(path)
    rows = torch.arange(10).repeat(2)                                       # two seeds of each class
    noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    predict = sample.guided(network, rows, header["rows"][-1], header["guidance"])
    return imageset.to_uint8(sample.sampler_of("dpm++2m", sheets.STEPS)(predict, lambda k: noise))[:, 0]


def test_the_base_is_above_and_the_fine_tuned_model_below(capsys):
    diffusion.main(["--steps", "100"])
    minimax.main(["--steps", "60"])
    digits = digits_on("out/digits/minimax.png").int()
    above, below = (by_sample(f"out/digits/{name}.safetensors").int() for name in ("base", "minimax"))
    assert digits.shape == (2, 20, 8, 8) and (above - below).abs().max() > 20
    assert (digits[0] - above).abs().max() <= 1 and (digits[1] - below).abs().max() <= 1
    last = digits_on("out/digits/base.png")[-1].int()           # the same weights, classes and noise
    assert (digits[0, :10] - last).abs().max() <= 1
    capsys.readouterr()
    pathlib.Path("out/digits/minimax.png").unlink()
    minimax.main(["--steps", "60"])                             # finished: left as it is
    assert not pathlib.Path("out/digits/minimax.png").exists()


def test_a_phase_has_a_sheet_of_its_own():
    minimax.main(["--phases", "4"])
    paths = pathlib.Path("out/digits").glob("minimax*.png")
    shapes = {path.name: digits_on(path).shape[:2] for path in paths}
    assert shapes == {"minimax-0-3.png": (2, 20), "minimax-4-7.png": (2, 20), "minimax-8-9.png": (2, 20)}


def test_without_guidance_there_is_no_unconditional_call():
    start, calls = new_start(), []
    start.trainer.model.x_embedder.proj.register_forward_hook(lambda *_: calls.append(0))
    no_null = torch.cat([start.rows[:-1], torch.tensor([-1])])  # as of published U-ViT weights
    for guidance, rows, wanted in ((2.0, start.rows, 20), (1.0, start.rows, 10), (2.0, no_null, 10)):
        calls.clear()
        sheets.draw(start._replace(header={**start.header, "guidance": guidance}, rows=rows), 10)
        assert len(calls) == wanted


def test_latents_are_decoded(imagenet):
    diffusion.main(["--weights", str(imagenet.weights)])
    minimax.main(["--data", "imagewoof", "--root", str(imagenet.root), "--vae", str(imagenet.vae), "--steps",
                  "1"])
    assert imageset.open_image("out/imagewoof/minimax.png").shape == (3, 2 * 66 + 2, 20 * 66 + 2)
