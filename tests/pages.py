"""The pages that tests compare with what was measured, and with one another."""
import pathlib

import torch

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text()
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}


def stands_once(name, part):
    """Whether a generated part stands between its two marks, on one page alone."""
    marked = [text for text in PAGES.values() if f"<!-- {name} -->" in text]
    return len(marked) == 1 and f"<!-- {name} -->\n{part}\n<!-- end of {name} -->" in marked[0]


def paired_gain(one, two):
    """The mean of the paired differences of two rows' accuracies, and its standard error."""
    each = torch.tensor(one).double() - torch.tensor(two).double()
    return each.mean().item(), each.std().item() / len(each) ** 0.5
