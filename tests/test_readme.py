"""README.md and docs/ say what is true: commands parse, tables are the measured rows, links lead on."""
import functools
import json
import re
import shlex
import subprocess
import sys

import pytest

import convnet
import diffusion
import memory
import minimax
import sample
import train_eval
import turbo
from nanodd import running
from nanodd.judging import results
from pages import PAGES, ROOT

README = PAGES["README.md"]
MAINS = {module.__name__: module for module in (convnet, diffusion, memory, minimax, sample, train_eval,
                                                turbo)}


def commands():
    """Every command of the pages, their generated tables and the files' first screens: script and words."""
    texts = [*PAGES.values(), *(module.__doc__ for module in MAINS.values())]
    for file in (ROOT / "results").glob("[dcm]*.jsonl"):        # digits, cifar100, method
        texts += [json.loads(line).get("command", "") for line in file.read_text().splitlines()]
    for text in texts:
        text = re.sub(r"git apply .*", "", text)                # parses in the changed code alone
        for line in re.findall(r"python ([\w/]+\.py[^\n`;|]*)", text):
            script, *words = shlex.split(line.partition("#")[0].partition(", S =")[0])
            yield script, [word.replace("S", "0") if word == "S" else word for word in words]


@pytest.mark.parametrize("script, words", sorted({(s, tuple(w)) for s, w in commands()}))
def test_every_command_parses(script, words, monkeypatch):
    assert (ROOT / script).is_file()
    if script.startswith("benchmarks/"):
        assert {word for word in words if word.startswith("-")} <= flags_of(script)
        return
    # the driver stops once the arguments are read
    monkeypatch.setattr(running, "command", stop)
    with pytest.raises(Parsed):
        MAINS[script[:-3]].main(list(words))


# Runs each script with --help as if by itself. What is not ours takes seconds to import, and stays imported.
ASK = """
import contextlib, io, json, os, runpy, sys
root, ours, scripts = json.loads(sys.argv[1])
path, said = sys.path[1:], []
for script in scripts:
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    script = os.path.join(root, script)
    sys.path[:], sys.argv = [os.path.dirname(script), *path], [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    said.append(out.getvalue())
print(json.dumps(said))
"""


@functools.cache
def helps():
    """{script: what its --help says} of all benchmarks in the commands; one process is asked once for all."""
    scripts = sorted({script for script, _ in commands() if script.startswith("benchmarks/")})
    ours = ["nanodd", *(path.stem for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")))]
    done = subprocess.run([sys.executable, "-c", ASK, json.dumps([str(ROOT), ours, scripts])],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(scripts, json.loads(done.stdout), strict=True))


def flags_of(script):
    """The flags that a benchmark's --help names."""
    return set(re.findall(r"--[\w-]+", helps()[script]))


class Parsed(Exception):
    pass


def stop(parser, *_, **__):
    raise Parsed


def test_each_part_is_written_into_the_page_that_has_its_marks(tmp_path, monkeypatch):
    import report
    (tmp_path / "docs").mkdir()
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "page.md"
    readme.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n")
    page.write_text("<!-- b -->\n<!-- end of b -->\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.write_pages({"b": "new b", "a": "new a"})
    assert readme.read_text() == "before\n<!-- a -->\nnew a\n<!-- end of a -->\nafter\n"
    assert page.read_text() == "<!-- b -->\nnew b\n<!-- end of b -->\n"



def test_what_is_said_of_the_front_table_is_what_was_measured():
    import digits
    rows = results.read_rows(digits.RESULTS)
    of = {(row["row"], row["ipc"]): row for row in rows if row["table"] == "main"}
    plain, kept = "**distilled**", "**distilled, with modes, a quarter kept**"
    chance = of["real, at random", 10]["mean"]
    behind = [of["real, at random", ipc]["mean"] - of[plain, ipc]["mean"] for ipc in (10, 50)]
    assert "is {:.1f} points behind random real images, and at fifty {:.1f}.".format(*behind) in README
    assert (f"is {of[kept, 10]['mean'] - chance:.1f} points ahead at ten, as "
            "good as herding and k-means, and level with random at fifty") in README
    level = of["real, at random", 50]
    assert abs(level["mean"] - of[kept, 50]["mean"]) < of[kept, 50]["std"]
    for name in ("herding", "k-means centroids"):
        row = of[f"real, {name}", 10]
        assert abs(row["mean"] - of[kept, 10]["mean"]) < max(row["std"], of[kept, 10]["std"])
    for ipc in (1, 10, 50):                                     # "the best selected real images stay ahead"
        assert of["real, k-center", ipc]["mean"] > max(of[name, ipc]["mean"] for name in (plain, kept))


def headings(text):
    """The anchors of a page's headings."""
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-")
            for line in re.findall(r"^#+ (.*)", text, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"(?:\]\(|src=\")(?!http)([^)\"]+)[)\"]", PAGES[page]):
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        assert found.exists(), target
        assert not anchor or anchor in headings(PAGES[str(found.relative_to(ROOT))]), target


def test_every_page_is_reached_from_the_front_page_and_says_what_it_is():
    for page, text in PAGES.items():
        assert page == "README.md" or f"]({page}" in README, page
        title, empty, sentence = re.sub(r"<img .*>\n\n", "", text).splitlines()[:3]
        assert title.startswith("# ") and not empty and sentence.endswith((".", ":")), page


def test_the_front_page_is_no_archive():
    cells = [cell.strip() for line in README.splitlines() if line.startswith("|")
             for cell in line.strip("|").split("|")]
    assert len(README.splitlines()) <= 125 and len(README.split()) <= 1300 and all(cells)
    assert not [cell for cell in cells if cell in "–-" or "python " in cell]
    install = [line for line in README.splitlines()
               if re.match(r" *pip install -r requirements.txt && python -m pytest", line)]
    assert len(install) == 1


def shown():
    """(command, the lines of output that the front page shows below it): code, then a fenced block."""
    for command, block in re.findall(r"^    (?:pip.*&& )?(python .*)\n\n```text\n([^`]*)```", README, re.M):
        yield command, block.splitlines()


def test_the_commands_of_the_front_page_say_what_it_shows(narrow, capsys):
    commands = list(shown())
    assert len(commands) == 3
    for command, lines in commands:
        _, script, *words = shlex.split(command)
        short = ["--runs", "1", "--epochs", "1"] if script == "train_eval.py" else []
        MAINS[script[:-3]].main([*words, *short, "--device", "cpu"])
        said = capsys.readouterr().out.splitlines()
        for line in lines:                                      # any number for a number, anything for dots
            pattern = re.sub(r"\d[\d.,]*", lambda _: r"[\d.,]+", re.escape(line).replace(r"\.\.\.", ".*")
                             .replace(r"\.", ".").replace(r"\ ", " "))
            pattern = re.sub(r" +", " +", pattern)
            assert any(re.fullmatch(pattern, found) for found in said), (line, said)


def test_the_stages_are_as_long_as_the_front_page_says_and_stand_in_the_order_of_their_imports():
    listed = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \| (\d+) \|", README, re.M)
    assert {name for name, _ in listed} == set(MAINS) and "one file of at most 340 lines" in README
    for k, (name, lines) in enumerate(listed):
        text = (ROOT / f"{name}.py").read_text()
        found = set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) & set(MAINS)
        assert found <= {earlier for earlier, _ in listed[:k]}, name
        assert len(text.splitlines()) == int(lines) <= 340, name


def test_every_flag_is_explained(capsys):
    for module in MAINS.values():
        with pytest.raises(SystemExit) as stop:
            module.main(["--help"])
        said = capsys.readouterr().out
        assert stop.value.code == 0 and said.startswith(module.__doc__.strip())
        for flag in re.findall(r"^  (--[\w-]+)(.*)", said, re.M):
            assert flag[1].strip() or re.search(rf"^  {flag[0]}.*\n {{20,}}\w", said, re.M), flag
