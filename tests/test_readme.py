"""README.md and docs/ say what is true: commands parse, tables are the measured rows, links lead on."""
import functools
import itertools
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import torch

import convnet
import diffusion
import memory
import minimax
import sample
import train_eval
import turbo
from nanodd import recipes, running
from nanodd.judging import results
from nanodd.networks import uvit
from nanodd.sampling import oversample, pilots

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text()
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
README, DIGITS, CHALLENGE, PAPERS, SPEED = (PAGES[name] for name in (
    "README.md", "docs/digits.md", "docs/challenge.md", "docs/papers.md", "docs/speed.md"))
MAINS = {module.__name__: module for module in (convnet, diffusion, memory, minimax, sample, train_eval,
                                                turbo)}


def commands():
    """Every command of the pages, their generated tables and the files' first screens: script and words."""
    texts = [*PAGES.values(), *(module.__doc__ for module in MAINS.values())]
    for file in (ROOT / "results").glob("[dc]*.jsonl"):         # digits and cifar100
        texts += [json.loads(line)["command"] for line in file.read_text().splitlines()]
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


def stands_once(name, part):
    """Whether a generated part stands between its two marks, on one page alone."""
    marked = [text for text in PAGES.values() if f"<!-- {name} -->" in text]
    return len(marked) == 1 and f"<!-- {name} -->\n{part}\n<!-- end of {name} -->" in marked[0]


def test_the_tables_are_what_was_measured():
    import digits
    for name, part in digits.tables(results.read_rows(digits.RESULTS)).items():
        assert stands_once(name, part), name


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


def test_the_tables_of_cifar100_are_what_was_measured_or_dashes():
    import cifar100
    import cifar100_rows
    rows = results.read_rows(cifar100_rows.FULL.rows)
    for name, part in cifar100.tables(rows).items():
        assert stands_once(name, part), name
    for row in rows:
        assert row["command"] and row["seconds"] > 0 and row["device"] and row["seed"] >= 0
        assert row["data"] == "cifar100" and not re.search(r"(?<![\w.])/\w", row["command"])
        assert row["table"] in ("speed", "choice", "last choice") or row["runs"] == len(row["accuracy"]) == 3


def test_what_is_said_of_cifar100s_networks_follows_from_them():
    import cifar100_rows
    from throughput import flops
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in diffusion.DiT(name, 32, 2, 3, 100).parameters())
                 for name in ("S", "XS")}
    assert diffusion.SIZES["XS"] == (6, 256, 4) and "256 wide, 6 blocks" in CHALLENGE
    assert f"DiT-S/2 has {2 * sizes['S'] / 1e6:.0f} MB in bfloat16" in CHALLENGE
    assert f"has {2 * sizes['XS'] / 1e6:.0f} MB, so that" in CHALLENGE and 2 * sizes["XS"] < 16e6 - 1e5
    assert f"it says {len(cifar100_rows.jobs(cifar100_rows.FULL))} of" in CHALLENGE
    with torch.device("meta"):
        x, t, y = torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        dit, u = (flops(lambda net=net: net(x, t, y)) for net in (diffusion.DiT("S", 32, 2, 3, 100),
                                                                 uvit.UViT("S", 32, 2, 3, 100)))
    assert dit / u == pytest.approx(0.5, abs=0.02)


def test_every_row_was_run_five_times_by_the_judge_it_names():
    for row in map(json.loads, (ROOT / "results/digits.jsonl").read_text().splitlines()):
        assert row["runs"] == len(row["accuracy"]) >= 5 and row["data"].startswith("digits")
        assert row["judge"] == "ConvNetD3-W128" and not re.search(r"(?<![\w.])/\w", row["command"])


def test_what_is_said_of_the_front_table_is_what_was_measured():
    import digits
    from report import spread
    rows = results.read_rows(digits.RESULTS)
    of = {(row["row"], row["ipc"]): row for row in rows if row["table"] == "main"}
    ways = [f"**distilled{how}**" for how in ("", ", with modes", ", with modes, a quarter kept")]
    chance = of["real, at random", 10]["mean"]
    plain, modes, kept = (of[name, 10]["mean"] for name in ways)
    said = (f"{chance - plain:.1f} points behind random real images. With modes it is {modes - chance:.1f} "
            f"points ahead of them, and with a quarter kept {kept - chance:.1f} points")
    assert README.count(said) == DIGITS.count(said) == 1 and kept > modes > chance > plain
    for name in ("herding", "k-means centroids"):               # "as much as herding and k-means centroids"
        row, ours = of[f"real, {name}", 10], of[ways[2], 10]
        assert abs(row["mean"] - ours["mean"]) < max(row["std"], ours["std"])
    assert f"All 125 real images of a class give {of['all real images', 125]['mean']:.1f} %" in README
    for ipc in (1, 10, 50):
        assert of["real, k-center", ipc]["mean"] > max(of[name, ipc]["mean"] for name in ways)
    guided, = (row for row in rows if row["table"] == "solvers" and row["steps"] == 10
               and row["row"].startswith("DDIM"))
    assert f"has {spread(guided, 'one_')[:10]} for the default's ten steps at guidance 2" in DIGITS
    assert f"{spread(of['**distilled**', 1])[:10]} at guidance 1" in DIGITS


def test_what_is_said_of_the_map_is_what_was_measured():
    import digits
    of = {row["row"]: row for row in results.read_rows(digits.RESULTS) if row["table"] == "map"}
    recall = lambda name: f"{of[name]['metrics']['recall']:.2f}"
    large = lambda name: f"{of[name]['two_hundred_mean']:.1f}"
    assert all(row["runs"] == 5 and row["cut"].endswith("252 to test") for row in of.values())
    one, two, four = "guidance 1", "guidance 2", "guidance 4"
    assert f"recall falls from {recall(one)} to {recall(two)}, and to {recall(four)} at 4" in DIGITS
    assert f"from {large(one)} to {large(two)} and {large(four)} %. The recipe" in DIGITS
    assert recipes.RECIPES["digits"].guidance == 1
    steps = [f"{n} steps, guidance 1" if n != 10 else one for n in (50, 10, 5, 3)]
    assert "recall is {} at 50 steps, {} at 10, {} at 5 and {} at 3".format(*map(recall, steps)) in DIGITS
    assert "200 a class {}, {}, {} and {} %".format(*map(large, steps)) in DIGITS
    diverse, plain = of["lambda_d 0.05, 5 steps, guidance 1"], of[steps[2]]
    assert f"raises recall from {recall(steps[2])} to {diverse['metrics']['recall']:.2f}" in DIGITS
    assert f"from {large(steps[2])} to {diverse['two_hundred_mean']:.1f} %, nearly what 10 steps" in DIGITS
    assert (f"precision: {diverse['metrics']['precision']:.2f} in place of "
            f"{plain['metrics']['precision']:.2f}") in DIGITS
    pair = lambda name: (of[name]["metrics"]["precision"], of[name]["metrics"]["recall"])
    pulled, both = pair("lambda_r 0.2, guidance 1"), pair("both 0.1, guidance 1")
    assert (f"from {recall(one)} to {pulled[1]:.2f}, and precision rises from {pair(one)[0]:.2f} to "
            f"{pulled[0]:.2f}. With 0.1") in DIGITS
    assert f"cancel: precision {both[0]:.2f}, recall {both[1]:.2f}" in DIGITS

    def buys(before, after):
        """Recall gained for precision lost, of the printed numbers."""
        (p, r), (p_after, r_after) = ([round(x, 2) for x in pair(name)] for name in (before, after))
        return f"{r_after - r:.2f} for {p - p_after:.2f}"
    assert f"Less guidance, from 2 to 1, buys {buys(two, one)} of precision." in DIGITS
    assert (f"more steps (5 to 10) buy {buys(steps[2], one)}, and lambda_d 0.02 at 5 steps "
            f"{buys(steps[2], 'lambda_d 0.02, 5 steps, guidance 1')}.") in DIGITS
    assert f"lambda_d 0.05 buys {buys(two, 'lambda_d 0.05, guidance 2')} there" in DIGITS
    few, many = (f"{n} steps, guidance 2" for n in (5, 50))
    assert f"from 5 to 50 recall rises from {recall(few)} to {recall(many)};" in DIGITS
    assert pair(many)[0] >= pair(few)[0]                        # "more steps cost no precision"
    published = [(of[f"published lambdas, guidance {g}"], of[f"guidance {g}"]) for g in (1, 2)]
    assert all(abs(a["metrics"][name] - b["metrics"][name]) < 0.05
               for a, b in published for name in ("precision", "recall"))
    best = sorted((row for name, row in of.items() if "modes" not in name), key=lambda row: -row["mean"])[:5]
    assert best[0]["mean"] - best[-1]["mean"] < min(row["std"] for row in best[1:])
    assert f"one deviation, {best[0]['mean']:.1f} % and less." in DIGITS
    before, after = "20 steps, uniform grid, guidance 1.5", "10 modes of weight 0.2, guidance 1.5"
    assert f"make {of[before]['mean']:.1f} % at ten a class and {large(before)} % at 200" in DIGITS
    assert f"the same steps make {of[after]['mean']:.1f} and {large(after)} %, the most of the map." in DIGITS
    assert all(of[after][key] == max(row[key] for row in of.values()) for key in ("mean", "two_hundred_mean"))
    assert (f"Recall rises from {recall(before)} to {recall(after)}, and precision falls from "
            f"{pair(before)[0]:.2f} to {pair(after)[0]:.2f}.") in DIGITS


def test_what_is_said_of_the_pairs_is_what_was_measured():
    import digits
    of = {row["row"]: row["accuracy"] for row in results.read_rows(digits.RESULTS) if row["table"] == "pairs"}

    def gain(one, two):
        """(mean, standard error) of the paired differences, and both in words."""
        each = torch.tensor(of[one]).double() - torch.tensor(of[two]).double()
        mean, error = each.mean().item(), each.std().item() / len(each) ** 0.5
        return mean, error, f"{mean:.2f} ± {error:.2f}"
    assert all(len(accuracies) == 10 for accuracies in of.values())
    diverse = "lambda_d 0.05, 5 steps"
    mean, error, said = gain(diverse, "base model, 5 steps")
    assert f"makes {said} points more" in DIGITS and mean > 2 * error
    mean, error, said = gain(diverse, "base model, 10 steps")
    assert f"L_d at five steps makes {said[1:]} points fewer." in DIGITS and -2 * error < mean < 0
    mean, error, said = gain("published lambdas, 50 steps", "base model, 50 steps")
    assert f"the published weights make {said} points more." in DIGITS and mean < 2 * error
    mean, error, modes = gain("base model, with modes", "real, at random")
    more, more_error, kept = gain("base model, with modes, a quarter kept", "real, at random")
    assert (f"without fine-tuning, makes {modes} points more than random real images, at ten a class, and "
            f"{kept} points more if a quarter") in DIGITS and mean > 2 * error and more > 2 * more_error
    assert f"({mean:.1f} and {more:.1f} over ten seeds)" in README
    assert f"({mean:.1f} and {more:.1f} over ten seeds, below)" in DIGITS
    mean, error, said = gain("published lambdas, with modes", "base model, with modes")
    assert f"the same modes make {said} points more than without it" in DIGITS and mean < 2 * error


def test_what_is_said_of_the_curves_is_what_was_measured():
    import digits
    import digits_rows
    of = {row["row"]: row for row in results.read_rows(digits.RESULTS) if row["table"] == "curves"}
    curves = {dial: [of[flags] for flags in values.values()] for dial, values in digits_rows.CURVES.items()}
    ends = lambda dial, name: "from {:.2f} to {:.2f}".format(
        *(curves[dial][end]["metrics"][name] for end in (0, -1)))
    assert (f"from lambda_r 0 to 0.1 recall falls {ends('lambda_r', 'recall')}, and precision rises "
            f"{ends('lambda_r', 'precision')}; from lambda_d 0 to 0.1 recall rises "
            f"{ends('lambda_d', 'recall')}, and precision falls {ends('lambda_d', 'precision')}.") in DIGITS
    for dial, name in itertools.product(("slots", "steps"), ("precision", "recall")):
        values = [row["metrics"][name] for row in curves[dial]]
        assert max(values) - min(values) < 0.05                 # "neither moves by more than 0.05"
    accuracies = [row["mean"] for row in of.values()]
    spread, deviation = max(accuracies) - min(accuracies), sum(row["std"] for row in of.values()) / len(of)
    assert (f"all rows are within {spread:.1f} points, where the deviation over five judges is "
            f"{deviation:.1f} on average") in DIGITS


def test_what_is_said_of_two_seconds_and_of_more_data_is_what_was_measured():
    import digits
    rows = results.read_rows(digits.RESULTS)
    of = {row["row"]: row for row in rows if row["table"] == "seconds"}
    loss = {rule: of["plain"]["mean"] - of[f"a fifth of it, by {rule}"]["mean"] for rule in oversample.RULES}
    assert f"is {loss['herding']:.1f} (herding) to {loss['kcenter']:.1f} points (k-center) behind" in DIGITS
    assert min(loss, key=loss.get) == "herding" and max(loss, key=loss.get) == "kcenter"
    precision = [of[name]["metrics"]["precision"] for name in ("plain", "a fifth of it, by kcenter")]
    assert "precision falls from {:.2f} to {:.2f}".format(*precision) in DIGITS
    modes, half = of["20 modes"], of["10 modes, half of it, by herding"]
    assert modes["drawn"] < 2 and half["drawn"] < 2 and of["plain"]["ipc"] / modes["ipc"] > 2
    for row in (modes, half):
        gain = f"{row['mean'] - of['plain']['mean']:.2f}"
        assert f"{gain} points more with less than half as many images" in DIGITS
    full, = (row for row in rows if row["row"] == "all real images")
    more, = (row for row in rows if row["table"] == "expansion")
    assert abs(more["mean"] - full["mean"]) < max(more["std"], full["std"])


def test_what_is_said_of_one_step_is_what_was_measured():
    import digits
    from report import spread
    rows = results.read_rows(digits.RESULTS)
    of = {(row["row"], row["asked"]): row for row in rows if row["table"] == "turbo"}
    timed = {(row["row"], row["asked"]): row for row in rows if row["table"] == "turbo-seconds"}
    said = lambda *key: spread(of[key])[:-4]                    # without the number of runs
    metric = lambda name, *key: f"{of[key]['metrics'][name]:.2f}"
    one, two, five, ten = "student, 1 step", "student, 2 steps", "base, DDIM, 5 steps", "base, DDIM, 10 steps"
    assert (f"makes {said(one, 10)} % at ten a class and {said(one, 50)} % at fifty, the base in ten steps "
            f"{said(ten, 10)} and {said(ten, 50)} %.") in DIGITS
    gains = [of[ten, ipc]["per_thousand"] / of[one, ipc]["per_thousand"] for ipc in (10, 50)]
    assert "draws {:.1f} and {:.1f} times as many images a second".format(*gains) in DIGITS
    assert of[one, 10]["mean"] > of[ten, 10]["mean"] - 1        # within one point of ten steps
    assert (f"at fifty a class falls from {metric('recall', ten, 50)} to {metric('recall', one, 50)}, while "
            f"precision rises from {metric('precision', ten, 50)} to "
            f"{metric('precision', one, 50)}.") in DIGITS
    assert (f"two steps recall is {metric('recall', two, 50)}, at a precision of "
            f"{metric('precision', two, 50)}, and the accuracy {said(two, 50)} %") in DIGITS
    starts = [(name, 10) for name in ("t* 999, 1 step", "t* 727, 1 step", "t* 500, 1 step", one)]
    assert "makes {} % from t = 999, {} from 727, {} from 500 and {} from 400, with recalls of".format(
        *(said(*key) for key in starts)) in DIGITS
    assert "recalls of {}, {}, {} and {}.".format(*(metric("recall", *key) for key in starts)) in DIGITS
    alone, dist = ("lambda 0, 1 step", 10), ("L_dist alone, 1 step", 10)
    assert (f"alone (lambda 0) makes {said(*alone)} %, the distillation loss alone {said(*dist)} % at a "
            f"recall of {metric('recall', *dist)}: it draws the average of a class") in DIGITS
    look, pairs = ("features of the base, 1 step", 10), "regression, 1 step"
    assert f"makes {said(*look)} % at a recall of {metric('recall', *look)}." in DIGITS
    assert (f"makes {said(pairs, 10)} % at ten and {said(pairs, 50)} % at fifty a class, with a recall of "
            f"{metric('recall', pairs, 50)} at fifty") in DIGITS
    assert of[pairs, 50]["metrics"]["recall"] > of[one, 50]["metrics"]["recall"]
    mixed = "base, then student"
    assert (f"makes {said(mixed, 10)} % at ten and {said(mixed, 50)} % at fifty, at recalls of "
            f"{metric('recall', mixed, 10)} and {metric('recall', mixed, 50)}.") in DIGITS
    assert (f"own second step, which makes {said(two, 10)} and {said(two, 50)} %; four make "
            f"{said('student, 4 steps', 10)} % at ten a class") in DIGITS
    centroid, = (row for row in rows if row["row"] == "real, k-means centroids" and row["asked"] == 1)
    assert abs(of[dist]["mean"] - centroid["mean"]) < 1         # "about as well as one k-means centroid"
    within = lambda seconds, *names: [spread(timed[name, seconds])[:-4] for name in names]
    assert ("half a second the student makes {} % in one step and {} % in two, the base {} % in five steps "
            "and {} % in ten").format(*within(.5, one, two, five, ten)) in DIGITS
    assert "the four make {}, {}, {} and {} %.".format(*within(10, one, two, five, ten)) in DIGITS
    assert (turbo.STEPS, turbo.LAMBDA, turbo.T_STAR) == (2000, 2.5, 400)


def test_what_is_said_of_the_solvers_is_what_was_measured():
    import digits
    rows = {(row["row"], row["steps"]): row for row in results.read_rows(digits.RESULTS)
            if row["table"] == "solvers"}
    (ddim, pp, fast), real = digits.SOLVERS, rows["real, at random", 0]
    assert rows[fast, 5]["mean"] < rows[ddim, 5]["mean"] - 10 < rows[pp, 5]["mean"] - 10
    for steps in (15, 20, 50):
        assert abs(rows[pp, steps]["mean"] - rows[pp, 10]["mean"]) < 0.15
        assert abs(rows[fast, steps]["mean"] - rows[fast, 15]["mean"]) < 0.15
    assert abs(rows[pp, 10]["mean"] - rows[ddim, 50]["mean"]) < rows[pp, 10]["std"]
    late = [row for (name, steps), row in rows.items() if steps > 5]
    assert max(r["mean"] for r in late) - min(r["mean"] for r in late) < max(r["std"] for r in late)
    assert max(rows, key=lambda key: rows[key]["one_mean"]) == (ddim, 5)
    assert all(real["coverage_mean"] < row["coverage_mean"] for row in rows.values() if row is not real)


def test_auto_took_the_steps_that_are_best_in_full():
    import digits
    rows = [row for row in results.read_rows(digits.RESULTS) if row["table"] == "auto"]
    full = {row["steps"]: row["mean"] for row in rows if row["row"] != "auto"}
    taken, = (row["steps"] for row in rows if row["row"] == "auto")
    assert set(full) == set(pilots.CANDIDATES) and max(full, key=full.get) == taken == 10


def test_what_is_said_of_a_budgets_end_is_what_happened():
    import digits
    late = [row for row in results.read_rows(digits.RESULTS)
            if row["table"] in ("steps", "auto")
            and row["drawn"] > (digits.BUDGET if row["table"] == "steps" else digits.SHORT_BUDGET)]
    assert [(row["table"], row["steps"]) for row in late] == [("steps", 10)]
    assert f"row of 10 steps took {late[0]['drawn']} s of its {digits.BUDGET}" in DIGITS


def test_a_sample_deviation_of_three_is_larger_by_the_factor_that_is_said():
    three = torch.tensor([1., 2., 4.])
    factor = three.std() / three.std(correction=0)
    assert f"over three judges are {factor:.2f} times as large" in PAPERS


def headings(text):
    """The anchors of a page's headings."""
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-")
            for line in re.findall(r"^#+ (.*)", text, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        assert found.exists(), target
        assert not anchor or anchor in headings(PAGES[str(found.relative_to(ROOT))]), target


def test_every_page_is_reached_from_the_front_page_and_says_what_it_is():
    for page, text in PAGES.items():
        assert page == "README.md" or f"]({page}" in README, page
        title, empty, sentence = text.splitlines()[:3]
        assert title.startswith("# ") and not empty and sentence.endswith((".", ":")), page


def test_the_front_page_is_no_archive():
    cells = [cell.strip() for line in README.splitlines() if line.startswith("|")
             for cell in line.strip("|").split("|")]
    assert len(README.splitlines()) <= 120 and all(cells)
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


def test_the_stages_are_as_long_and_import_one_another_as_the_front_page_says():
    imports = {"minimax": {"diffusion", "memory"}, "sample": {"diffusion", "train_eval"},
               "train_eval": {"convnet"}, "turbo": {"convnet", "diffusion", "sample", "train_eval"}}
    for name in MAINS:
        text = (ROOT / f"{name}.py").read_text()
        found = set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) & set(MAINS)
        assert found == imports.get(name, set()), name
        assert len(text.splitlines()) <= 340 and "one file of at most 340 lines" in README
    for name, others in imports.items():
        *first, last = (f"{other}.py" for other in sorted(others))
        assert f"{name}.py imports {' and '.join(filter(None, [', '.join(first), last]))}" in README
    order = re.findall(r"^\| \[(\w+)\.py\]", README, re.M)
    assert order == ["memory", "diffusion", "minimax", "sample", "convnet", "train_eval", "turbo"]


def test_every_flag_is_explained(capsys):
    for module in MAINS.values():
        with pytest.raises(SystemExit) as stop:
            module.main(["--help"])
        said = capsys.readouterr().out
        assert stop.value.code == 0 and said.startswith(module.__doc__.strip())
        for flag in re.findall(r"^  (--[\w-]+)(.*)", said, re.M):
            assert flag[1].strip() or re.search(rf"^  {flag[0]}.*\n {{20,}}\w", said, re.M), flag


def test_the_speed_at_imagenets_size_is_what_was_measured():
    row = json.loads((ROOT / "results/imagenet-speed.jsonl").read_text().splitlines()[-1])
    ten, fifty = (row["sampling"][f"{steps} steps"] for steps in (10, 50))
    tuning = row["tuning"]
    assert (f"{row['matrix_tflops']:.2f} TFLOP/s of matrix product), DiT-{row['network']}/2 drew "
            f"{ten['images_per_second']:.2f} images a second at 10 steps and "
            f"{fifty['images_per_second']:.2f} at 50, with guidance and decoded, at "
            f"{100 * ten['share']:.0f} and {100 * fifty['share']:.0f} % of the matrix product's "
            "rate") in SPEED
    assert (f"made {tuning['steps_per_second']:.2f} steps of 8 images a second, {tuning['cache_gain']:.1f} "
            "times as many as with the autoencoder in the loop, and the min-max losses cost "
            f"{100 * tuning['losses_share']:.1f} % of a step") in SPEED


def test_the_speed_of_sdxl_turbo_is_what_was_measured():
    row = json.loads((ROOT / "results/sdxl-speed.jsonl").read_text().splitlines()[0])
    whole, network, decoder = (row["parts"][name] for name in ("all", "unet", "decoder"))
    assert f"a picture took {whole['seconds']:.1f} s on two CPU cores in bfloat16" in CHALLENGE
    assert (f"{row['matrix_tflops']:.2f} TFLOP/s of matrix product), at {100 * whole['share']:.0f} % of the "
            f"matrix product's rate: {network['seconds']:.1f} s in the network, {decoder['seconds']:.1f} s "
            f"in the decoder. A prompt took {row['prompt_seconds']:.1f} s, once; the process had "
            f"{row['peak_gb']:.1f} GB at most") in CHALLENGE


def test_the_sizes_at_imagenets_scale_follow_from_the_recipe():
    recipe = recipes.RECIPES["imagenet512"]                     # the tests' own "imagenet" is a small one
    cells, channels = (recipe.size // 2) ** 2, recipe.channels
    assert f"the latent cache {2 * 2 * channels * cells * 2 / 1e3:.0f} kB a picture" in PAPERS
    assert f"{12_454 * 2 * 2 * channels * cells * 2 / 1e9:.1f} GB for ImageWoof" in PAPERS
    assert f"ten classes take {2 * 10 * 64 * channels * cells * 4 / 1e6:.0f} MB" in PAPERS
    assert f"a fine-tuned checkpoint {1_739_552 * 4 / 1e6:.0f} MB" in PAPERS
