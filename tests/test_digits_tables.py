"""docs/digits.md's tables, and README's: they are the measured rows, and say what n counts in each."""
import json
import re

from nanodd.judging import results
from pages import PAGES, ROOT, stands_once

DIGITS = PAGES["docs/digits.md"]


def test_the_tables_are_what_was_measured():
    import digits
    import digits_tables
    parts = digits_tables.tables(results.read_rows(digits.RESULTS))
    assert set(parts) == {"front", *digits_tables.PAGE}
    for name, part in parts.items():
        assert stands_once(name, part), name
    marks = re.findall(r"<!-- (?!end of)(\S+) -->", DIGITS)
    assert sorted(marks) == sorted(digits_tables.PAGE)          # each table of the page is a generated one


def test_a_cell_of_the_page_has_no_command_and_no_number_of_runs():
    cells = [cell for line in DIGITS.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert cells and not [cell for cell in cells if "python " in cell or re.search(r"± [\d.]+ \(", cell)]
    assert max(map(len, cells)) < 80


def test_the_line_under_a_table_says_what_n_counts_what_varied_and_where():
    import digits
    import digits_tables
    rows = results.read_rows(digits.RESULTS)
    for name, part in digits_tables.tables(rows).items():
        if name != "front":                                     # README writes that caption
            *_, empty, caption = part.splitlines()
            runs = {row["runs"] for row in rows if row["table"] == name}
            assert not empty and re.fullmatch(
                rf"n = {runs.pop()} counts (sets|judges) of [^.]*\D.*\. Varied: .*\. Machine: .*\.", caption)
            assert not runs and all(row["machine"].rpartition(", ")[0] in caption
                                    for row in rows if row["table"] == name)


def test_the_days_of_a_table_are_said_in_short():
    import digits_tables
    assert digits_tables.days({"2026-11-26", "2026-11-25"}) == "2026-11-25 and 26"
    assert digits_tables.days({"2026-11-25"}) == "2026-11-25"
    assert digits_tables.days({"2026-12-01", "2026-11-30"}) == "2026-11-30 and 2026-12-01"


def test_each_run_of_one_set_is_a_judge_and_each_other_run_a_set_of_its_own():
    """What a caption says of a row's n stands in the row's command: one folder, or one for each seed S."""
    import digits
    import digits_tables
    for row in results.read_rows(digits.RESULTS):
        if row["table"] == "main":
            seeds = row["row"].startswith("**") or row["train"] in ("random", "kmeans")
            assert seeds != (row["train"] in ("full", "herding", "kcenter"))
        elif row["table"] in digits_tables.PAGE:
            own = digits_tables.PAGE[row["table"]].counts.startswith("sets of the seeds")
            unnamed = row["command"] == "python benchmarks/digits.py"       # digits_turbo.compared: seeds too
            assert own == ("--seed S" in row["command"] or unnamed), row["row"]


def test_the_front_table_counts_five_runs_and_has_all_real_images_in_each_column():
    import digits
    import digits_tables
    rows = [row for row in results.read_rows(digits.RESULTS) if row["table"] == "main"]
    assert {row["runs"] for row in rows} == {5}                 # README's caption: n = 5
    head, _, every, *others = (line.strip("|").split("|") for line in digits_tables.front(rows).splitlines())
    assert len(head) == 4 and len(set(every[1:])) == 1 and every[0] == " all real images (125 a class) "
    assert [cells[0].strip() for cells in others] == list(digits_tables.FRONT)


def test_every_row_was_run_five_times_by_the_judge_it_names():
    for row in map(json.loads, (ROOT / "results/digits.jsonl").read_text().splitlines()):
        assert row["runs"] == len(row["accuracy"]) >= 5 and row["data"].startswith("digits")
        assert row["judge"] == "ConvNetD3-W128" and not re.search(r"(?<![\w.])/\w", row["command"])
