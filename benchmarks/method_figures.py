"""The pictures of docs/method.md. No benchmark by itself: method.py draws them."""

import torch
from einops import rearrange

from report import pyplot, save_plot


def show(axes, image, title=""):
    """An image (h, w) in [-1, 1] in grey, without axes; what lies outside is clipped."""
    axes.imshow(image.clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def plot_x0(times, xt, x0_hat, path):
    """x_t and the one-step prediction x0_hat, (digits, times, 8, 8) both, a column for each time."""
    rows = [part for pair in zip(xt, x0_hat, strict=True) for part in pair]
    size = 0.8 * len(times) + 0.6, 0.85 * len(rows)
    figure, panels = pyplot.subplots(len(rows), len(times), figsize=size, layout="constrained")
    for k, (line, images) in enumerate(zip(panels, rows, strict=True)):
        for axes, image, t in zip(line, images, times, strict=True):
            show(axes, image, f"t = {t}" if k == 0 else "")
        line[0].set_ylabel("x0_hat" if k % 2 else "x_t", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save_sheet(images, path, titles):
    """images (rows, columns, 1, h, w) uint8: a picture of rows with a title each."""
    figure, panels = pyplot.subplots(len(images), 1, figsize=(8.4, 0.46 * len(images)), layout="constrained")
    for axes, row, title in zip(panels, images, titles, strict=True):
        framed = torch.nn.functional.pad(row, (1, 0, 0, 0), value=128)
        show(axes, rearrange(framed, "n 1 h w -> h (n w)") / 127.5 - 1)
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def on_circle(axes, degrees, radius, label, color):
    """A dot for each angle (n,), at `radius` from the centre."""
    angles = degrees.deg2rad()
    axes.scatter(radius * angles.cos(), radius * angles.sin(), s=14, alpha=0.6, label=label, color=color)


def plot_toy(toys, path):
    """Where L_r and L_d lead, with means and with extremes. toys: the module method_toys."""
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    titles = ["L_r, two modes", "L_r, two modes and one outlier", "L_d, from the large mode"]
    for axes, title, (diverse, outlier) in zip(panels, titles, [(0, 0), (0, 1), (1, 0)], strict=True):
        axes.add_patch(pyplot.Circle((0, 0), 1, fill=False, color="lightgrey"))
        on_circle(axes, toys.real_directions(outlier), 1, "real images", "grey")
        on_circle(axes, toys.toy("naive", diverse, outlier), 0.88, "predictions, mean", "tab:blue")
        on_circle(axes, toys.toy("minmax", diverse, outlier), 0.76,
                  f"predictions, {'max' if diverse else 'min'}", "tab:orange")
        axes.set(title=title, xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xticks=[], yticks=[])
        axes.legend(fontsize=8, loc="center")
    save_plot(figure, panels[0], path)
