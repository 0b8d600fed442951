"""Sheets of samples: what a network draws while it is trained, and before and after its fine-tuning.

A column is a seed: a class, and noise that is the same in every row. The averaged weights draw, in few steps
of DPM-Solver++(2M) and with the checkpoint's guidance; those of turbo.py in one. The noise comes from a
generator of its own, and all weights are back in their place afterwards, so that training goes on to the same
bits as without sheets.
"""
import functools
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, PngImagePlugin

from nanodd.data import imageset
from nanodd.sampling import solvers

MARK = "nanoDD, a sheet of samples"
STEPS, CLASSES = 10, 10        # network calls an image, two each with guidance; classes on a sheet, at most

# ----------------------------------------------------------------------------------------------------
# 1. Drawing with a network that is being trained


def swap_weights(trainer):
    """The weights and their averages change places, without a copy: a second call restores both exactly."""
    for name, parameter in trainer.trainable.items():
        parameter.data, trainer.ema[name] = trainer.ema[name], parameter.data


@contextmanager
def averaged(trainer):
    """The trainer's network, not its DDP wrapper, with the averaged weights for the length of the block."""
    swap_weights(trainer)
    try:
        yield trainer.model.eval()
    finally:
        trainer.model.train()
        swap_weights(trainer)


def guided(model, rows, null, guidance):
    """predict of solvers.dpm_pp_2m: sample.guided in short. At guidance 1 there is no unconditional call.

    It stands here once more, since diffusion.py draws sheets and cannot import sample.py, which imports it.
    rows: (n,) label-table rows, one for each image's class; null: the row that means "no class". Calls
    model.forward, since model(...), where it is compiled, would be compiled again for another batch size.
    """
    def predict(x, t):
        time = torch.full((len(x),), float(t), device=x.device)             # (n,)
        eps_c = eps_u = model.forward(x, time, rows)[:, :x.shape[1]].float()    # (n, C, H, W)
        if guidance != 1:
            eps_u = model.forward(x, time, null.expand_as(rows))[:, :x.shape[1]].float()
        return eps_u + guidance * (eps_c - eps_u), None
    return predict


@torch.no_grad()
def draw(start, columns):
    """Draws a row of pictures: (n, C, H, W) uint8 on the CPU, n <= columns; latents are decoded.

    start: models.Start. The columns are the first ten classes (of a phase, its own), repeated while all fit.
    """
    trainer, header, schedule = start.trainer, start.header, start.schedule
    first, last = header["phase"]
    rows = start.rows[first:last + 1][:CLASSES]
    rows = rows.repeat(columns // len(rows))                                # (n,)
    shape = len(rows), header["config"]["channels"], header["config"]["size"], header["config"]["size"]
    rng, null = torch.Generator().manual_seed(trainer.plan.seed), start.rows[-1]
    noise = torch.randn(shape, generator=rng).to(rows.device)               # (n, C, H, W)
    if "t_star" in header:                                      # a student of turbo.py: one call
        loop, times = solvers.turbo, [header["t_star"]]
    else:
        loop, times = solvers.dpm_pp_2m, solvers.logsnr(STEPS, schedule, schedule.end(STEPS))
    sampler = SimpleNamespace(schedule=schedule, times=times)
    with averaged(trainer) as model, torch.autocast(rows.device.type, torch.bfloat16, trainer.plan.bf16):
        # a null of -1: the label table has no row for "no class"
        predict = guided(model, rows, null, header["guidance"] if null >= 0 else 1)
        x = loop(sampler, predict, lambda k: noise)                         # (n, C, H, W), or latents
    decode, _ = start.decoder()
    pictures = [decode(part) for part in x.split(1)]            # one by one: decoding takes much memory
    return imageset.to_uint8(torch.cat(pictures)).cpu()


# ----------------------------------------------------------------------------------------------------
# 2. Sheets


def grid(images, columns):
    """images (rows * columns, C, H, W) uint8 -> one picture (3, h, w) uint8, small images enlarged.

    Two black pixels frame each image.
    """
    zoom = max(1, 40 // images.shape[-1])
    images = images.expand(-1, 3, -1, -1).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    framed = F.pad(images, (2, 0, 2, 0))                        # above and on the left
    sheet = rearrange(framed, "(rows columns) C h w -> C (rows h) (columns w)", columns=columns)
    return F.pad(sheet, (0, 2, 0, 2))


def write(path, sheet):
    """(3, h, w) uint8 -> a PNG file, written atomically, with the text chunk "Software" of a sheet."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Software", MARK)
    imageset.write_png(path, sheet, chunks)


def is_sheet(path):
    """Whether the file `path` is a sheet that `write` wrote, and no picture of the user's."""
    if not path.is_file():                                      # a pipe would be waited for
        return False
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == MARK
    except Exception:                                           # Pillow raises errors of many kinds
        return False


def growing(start, path):
    """training.fit's `show` that draws row k = 1, 2, ... of the PNG file `path`."""
    print(f"{path}: grows by a row of samples after each tenth of the steps")
    return functools.partial(add_row, start, path)


def add_row(start, path, k, last):
    """Draws row k of the sheet `path`, a column a class; row 1 starts the sheet anew.

    The rows above are read from the file, so that a resumed run goes on with its sheet.
    """
    images = draw(start, CLASSES)
    row = grid(images, len(images))                                         # (3, height + 2, w)
    height = row.shape[1] - 2                                   # two rows share the two pixels between them
    above = imageset.open_image(path)[:, :(k - 1) * height] if k > 1 and is_sheet(path) else row[:, :0]
    write(path, torch.cat([above, row], dim=1))


def comparing(start, path):
    """training.fit's `show` that draws the PNG file `path` at the end: samples of now, and of then below."""
    print(f"{path}: samples of the same seeds, of the base model above, fine-tuned below")
    return functools.partial(add_pair, start, path, draw(start, columns=20))


def add_pair(start, path, before, k, last):
    """Writes two rows to the PNG file `path`: `before`, (n, C, H, W) uint8, and what is drawn now."""
    if last:
        write(path, grid(torch.cat([before, draw(start, columns=20)]), len(before)))
