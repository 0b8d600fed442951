"""The rules of the layout: what may import what, how long a file may be, where commands are typed."""
import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
STAGES = {path.stem for path in ROOT.glob("*.py")}
PACKAGE = sorted((ROOT / "nanodd").rglob("*.py"))


def imported(path):
    """The dotted names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_the_package_imports_no_stage_file_and_has_no_command_line(path):
    assert not {name.partition(".")[0] for name in imported(path)} & STAGES
    assert not re.search(r"__main__|def main\(|parse_args", path.read_text())


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_the_files_of_the_package_are_short(path):
    assert len(path.read_text().splitlines()) <= 300
    assert path.stem not in ("utils", "common", "misc", "helpers")


def test_no_imports_in_a_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
             for path in [*PACKAGE, *ROOT.glob("*.py")]}
    graph = {name: {target for target in names for found in imported(path)
                    if found == target or found.startswith(f"{target}.") and target not in ("nanodd",)
                    and found.count(".") - target.count(".") == 1 and found not in names}
             for name, path in names.items()}
    done = set()
    while len(done) < len(graph):
        free = {name for name in graph if name not in done and graph[name] <= done}
        assert free, f"a circle among {sorted(set(graph) - done)}"
        done |= free
