"""The rules of the layout: what may import what, how long a file may be, where commands are typed."""
import ast
import pathlib
import re
import subprocess
import sys

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


def test_the_stages_are_short_and_so_are_all_functions():
    lengths = {path.stem: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert lengths.pop("turbo") <= 300
    assert set(lengths) == {"memory", "diffusion", "minimax", "sample", "convnet", "train_eval"}
    assert max(lengths.values()) <= 340 and sum(lengths.values()) <= 1450
    for path in [*ROOT.glob("*.py"), *PACKAGE]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 53, f"{path}: {node.name}"


def test_stages_import_the_package_before_torch():
    """nanodd/__init__.py says how the CPU's threads wait; torch looks at it once, when it is imported."""
    for name in ("diffusion", "minimax", "sample", "train_eval", "turbo"):
        text = (ROOT / f"{name}.py").read_text()
        assert text.index("\nimport nanodd ") < text.index("\nimport torch\n")
    for given, said in (({}, "500"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        environment = {"PYTHONPATH": str(ROOT), **given}
        code = "import os, nanodd; print(os.environ.get('GOMP_SPINCOUNT'))"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == said


def test_no_imports_in_a_circle():
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
             for path in [*PACKAGE, *ROOT.glob("*.py")] if path.stem != "__init__"}
    above = {name: set() for name in paths}                     # which modules each module needs
    for name, path in paths.items():
        for found in imported(path):                            # a module, or a name out of one
            above[name] |= {found, found.rpartition(".")[0]} & set(paths)
    done = set()
    while len(done) < len(above):
        free = {name for name in above if name not in done and above[name] <= done}
        assert free, f"a circle among {sorted(set(above) - done)}"
        done |= free


def test_what_takes_seconds_to_import_is_imported_where_it_is_used():
    """sample.py starts within a second of torch; that it rebuilds a network, too, needs nothing more."""
    code = """if True:
        import sys, memory, convnet, sample
        from nanodd.networks import checkpoint
        config = {"network": "tiny", "size": 8, "patch": 2, "channels": 1, "classes": 10}
        checkpoint.rebuild(config, checkpoint.network_of(**config).state_dict(), "a file")
        slow = {"torchvision", "sklearn", "timm", "torch._dynamo", "matplotlib"}
        print(*sorted(slow & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
