"""What the benchmarks share: rows in a .jsonl file, each measured once, and tables of them on the pages.

No benchmark by itself: digits.py and cifar100.py import it.
"""
import json
import pathlib
import shlex
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import nanodd  # noqa: F401 (before torch: it sets how long waiting CPU threads spin)
import matplotlib
import torch

import diffusion
import minimax
import sample
import turbo
from nanodd import files
from nanodd.errors import UserError
from nanodd.judging import results

matplotlib.use("Agg")                                           # no screen is needed
from matplotlib import pyplot

MAINS = {"diffusion.py": diffusion.main, "minimax.py": minimax.main, "sample.py": sample.main,
         "turbo.py": turbo.main}

# ----------------------------------------------------------------------------------------------------
# 1. Rows


def key(row):
    """What tells a row from the others of its file: its table, its row, what was asked of it."""
    return row["table"], row["row"], row["asked"]


def missing(jobs, path):
    """The jobs, {key: function}, whose rows are not in the .jsonl file `path` yet."""
    measured = {key(row) for row in results.read_rows(path)}
    return {name: make for name, make in jobs.items() if name not in measured}


def rows_to_show(path):
    """The rows of the .jsonl file `path`. Raises UserError where there are none."""
    rows = results.read_rows(path)
    if not rows:
        raise UserError(f"{path.name} has no rows yet: leave --tables out")
    return rows


def measure(jobs, path, where, summary):
    """Makes the rows of all jobs, one after the other, and appends each to `path` as soon as it is there.

    jobs: {(table, row, asked): function without arguments -> dict}. where: the machine, in words. summary:
    row -> what is printed of it.
    """
    for (table, row, asked), make in jobs.items():
        made = {"table": table, "row": row, "asked": asked, **make(), "machine": where}
        with open(path, "a") as file:
            file.write(json.dumps(made) + "\n")
        print(f"row: {table} | {row} | {asked} | {summary(made)}", flush=True)


def type_in(command):
    """Runs "python X.py ..." in this process, on the CPU."""
    _, script, *words = shlex.split(command)
    MAINS[script](words + ["--device", "cpu"])


def summary(name, values):
    """The values of n runs, their mean and deviation; of the accuracy these are called just mean and std."""
    prefix = "" if name == "accuracy" else f"{name}_"
    return {name: values, f"{prefix}mean": round(statistics.mean(values), 4),
            f"{prefix}std": round(statistics.stdev(values), 4)}


def machine(device=None):
    """The machine in words: the GPU `device`, or else the CPU; torch's version and the date."""
    kind = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "CPU")
    on_gpu = device is not None and device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} cores of {kind}"
    return f"{name}, torch {torch.__version__.split('+')[0]}, {time.strftime('%Y-%m-%d')}"


# ----------------------------------------------------------------------------------------------------
# 2. Tables and plots


def spread(row, name="", digits=1):
    """Mean ± sample standard deviation of what `summary` calls `name`; n stands elsewhere."""
    return f"{row[f'{name}mean']:.{digits}f} ± {row[f'{name}std']:.{digits}f}"


def table(head, lines):
    """Markdown: the lines of a table under its head."""
    return "\n".join([head, "|".join(["", *["---"] * (head.count("|") - 1), ""]), *lines])


def write_pages(parts):
    """Puts each part between its two marks, in README.md or in the page of docs/ that has them."""
    pages = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
    for name, part in parts.items():
        path, = (path for path, text in pages.items() if f"<!-- {name} -->\n" in text)
        before, rest = pages[path].split(f"<!-- {name} -->\n", 1)
        _, after = rest.split(f"<!-- end of {name} -->", 1)
        pages[path] = f"{before}<!-- {name} -->\n{part}\n<!-- end of {name} -->{after}"
    for path, text in pages.items():
        with files.atomic_write(path) as temporary:
            temporary.write_text(text)


def save_plot(figure, axes, path, legend=False):
    """Writes a figure as a PNG file."""
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
