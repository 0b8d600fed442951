"""The tables of docs/digits.md, and README's front table, out of the rows of results/digits.jsonl.

No benchmark by itself: `python benchmarks/digits.py` writes them. A table has numbers and short names; the
full command of a row is in the file. The line under each table says what its n counts, what varied between
the n runs, and on which machine and days they ran. What n counts stands here beside the columns, and follows
from the function that makes the rows.
"""
import re
from typing import NamedTuple

from report import spread, table

FRONT = ("real, at random", "real, herding", "real, k-center", "real, k-means centroids", "**distilled**",
         "**distilled, with modes, a quarter kept**")

# ----------------------------------------------------------------------------------------------------
# 1. Cells: a row of the file -> a string


def key(name):
    """The cell that is this value of the row."""
    return lambda row: f"{row[name]}"


def rounded(name, digits):
    """The cell of a number that some rows do not have."""
    return lambda row: "–" if row.get(name) is None else f"{row[name]:.{digits}f}"


def metric(name):
    """The cell of one of the row's metrics."""
    return lambda row: f"{row['metrics'][name]:.2f}"


def flags(script, *common):
    """The cell of the flags of `script` in the row's command, without files and seed, and those in common."""
    def cell(row):
        found = re.findall(rf"python {script}([^;]*)", row["command"])
        if not found:
            return "–"                                          # the row needs no such command
        words = re.sub(r" --(checkpoint|out|seed) \S+", "", found[0])
        for flag in common:
            words = words.replace(f" {flag}", "")
        return f"`{words.strip()}`" if words.strip() else "none"
    return cell


def dial(flag, default=""):
    """The cell of one flag of a row that is named by its flags."""
    return lambda row: dict(re.findall(r"--([\w-]+) (\S+)", row["row"])).get(flag, default)


# ----------------------------------------------------------------------------------------------------
# 2. Tables: columns, what n counts, and what varied between the n runs

IMAGES, ACCURACY = {"images a class": key("ipc")}, {"accuracy, %": spread}
AT_TEN = {"accuracy at 10 a class, %": spread}
TWO = {name: metric(name) for name in ("precision", "recall")}
FOUR = {**TWO, **{name: metric(name) for name in ("coverage", "variance")}}

SETS = "sets of the seeds 0 to {last}, each with a judge of its own"
ONE_SET = "judges of one and the same set"
CHOICES = "as many random choices, each with a judge of its own"
PARTS = "judges of five parts of one set (the images 0 to 9, 10 to 19, ... of each class)"
JUDGE = "the judge's seed"
DRAWN = f"the noise of sampling, and {JUDGE}"
STARTS = f"the noise of sampling, the start of k-means (with modes), and {JUDGE}"
REAL = f"for real images the choice, and {JUDGE}"


class Table(NamedTuple):
    columns: dict              # {heading: row -> cell}
    counts: str                # what n counts; {last} stands for n - 1
    varied: str


PAGE = {
    # digits_rows.sets_row; real_row, where herding, k-center and all images are not random; expanded_row
    "main": Table({"trained on": key("row"), **IMAGES, **ACCURACY, **TWO,
                   "seconds to draw": rounded("drawn", 1)},
                  f"{SETS}; for real images at random, and for k-means centroids, {CHOICES}; for the other "
                  f"real images {ONE_SET}",
                  f"{STARTS}; for real images the random choice, if any, and {JUDGE}"),
    # digits_rows.map_row
    "map": Table({"setting": key("row"), **FOUR, **AT_TEN,
                  "at 200 a class, %": lambda row: spread(row, "two_hundred_"),
                  "seconds to draw": rounded("drawn", 1)},
                 f"{PARTS} at 10 a class, and {ONE_SET} at 200 a class",
                 f"the part (at 10 a class), and {JUDGE}"),
    # digits_rows.sets_row, random_row
    "pairs": Table({"trained on": key("row"), **IMAGES, **ACCURACY, **TWO},
                   f"{SETS}; for real images {CHOICES}", f"{STARTS}; {REAL}"),
    # digits_rows.map_row
    "curves": Table({"lambda_r": dial("lambda-r"), "lambda_d": dial("lambda-d"), "slots": dial("slots", "64"),
                     "fine-tuning steps": dial("steps", "400"), **FOUR, **AT_TEN},
                    PARTS, f"the part, and {JUDGE}"),
    # digits_rows.sets_row
    "seconds": Table({"set": key("row"),
                      "flags": flags("sample.py", "--steps 10", "--batch 20", "--seconds 2"),
                      **IMAGES, **ACCURACY, **TWO, "seconds": rounded("drawn", 2)},
                     SETS, f"the number of images that the time allows, {STARTS}"),
    # digits_rows.sets_row
    "ablation": Table({"model": key("row"), "flags": flags("minimax.py"), **AT_TEN}, SETS, DRAWN),
    # digits.budget_row
    "steps": Table({"steps": key("steps"), **IMAGES, **ACCURACY}, ONE_SET, JUDGE),
    # digits.solver_row
    "solvers": Table({"sampler": key("row"), "steps": lambda row: str(row["steps"] or "–"), **AT_TEN,
                      "at 1 a class, %": lambda row: spread(row, "one_"),
                      "distance to the nearest": lambda row: spread(row, "coverage_", 2)},
                     f"{SETS}; for real images {CHOICES}", f"{DRAWN}; {REAL}"),
    # digits.budget_row
    "auto": Table({"steps": lambda row: "auto: " * (row["row"] == "auto") + str(row["steps"]), **IMAGES,
                   **ACCURACY, "pilot's accuracy, %": rounded("pilot", 1)}, ONE_SET, JUDGE),
    # digits_turbo.sets_row, compared
    "turbo": Table({"drawn with": key("row"), **IMAGES, **ACCURACY, **TWO,
                    "seconds for 1,000 images": rounded("per_thousand", 3)}, SETS, DRAWN),
    # digits_turbo.budget_row
    "turbo-seconds": Table({"drawn with": key("row"), "seconds": lambda row: f"{row['asked']:g}", **IMAGES,
                            **ACCURACY}, ONE_SET, JUDGE),
}


def days(dates):
    """["2026-11-25", "2026-11-26"] -> "2026-11-25 and 26": a day of the first's month without its month."""
    first, *others = sorted(dates)
    return " and ".join([first, *(date[8:] if date[:7] == first[:7] else date for date in others)])


def machines(rows):
    """Where and when the rows were measured, in words."""
    found = {}                                                  # machine and torch version -> dates
    for row in rows:
        machine, _, date = row["machine"].rpartition(", ")
        found.setdefault(machine, set()).add(date)
    return "; ".join(f"{machine}, {days(dates)}" for machine, dates in found.items())


def captioned(rows, columns, counts, varied):
    """Markdown: the table, and its caption under it. rows: of the file; the rest: see Table."""
    [n] = {row["runs"] for row in rows}                         # one number for all rows of a table
    lines = [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]
    counts, varied = (words.replace("{last}", str(n - 1)) for words in (counts, varied))
    return (table(f"| {' | '.join(columns)} |", lines)
            + f"\n\nn = {n} counts {counts}. Varied: {varied}. Machine: {machines(rows)}.")


def front(rows):
    """The front page's table: a row for each kind of set, a column for each number of images.

    rows: of the main table. n is the same for all of them, and stands in the caption, which README writes.
    """
    of = {(row["row"], row["ipc"]): spread(row) for row in rows}
    every, = (row for row in rows if row["asked"] is None)      # all real images: whatever the column
    lines = [[f"{every['row']} ({every['ipc']} a class)", *3 * [spread(every)]],
             *([name, *(of[name, ipc] for ipc in (1, 10, 50))] for name in FRONT)]
    return table("| accuracy, %, trained on | 1 image a class | 10 images a class | 50 images a class |",
                 [f"| {' | '.join(cells)} |" for cells in lines])


def with_pilots(rows):
    """Rows of the table auto, each with what `--steps auto` saw of its steps before it decided."""
    seen = {pilot["steps"]: pilot["accuracy"] for row in rows for pilot in row.get("pilots", [])}
    return [{**row, "pilot": seen.get(row["steps"]) if row["row"] != "auto" else None} for row in rows]


def tables(rows):
    """The pages' generated parts, by name: rows of results/digits.jsonl -> {name: markdown}.

    What has no rows yet is left as it stands on the page.
    """
    of = {name: [row for row in rows if row["table"] == name] for name in PAGE}
    parts = {"front": front(of["main"])} if of["main"] else {}
    of["auto"] = with_pilots(of["auto"])
    more = [{**row, "row": f"all real images {row['row']}"} for row in rows if row["table"] == "expansion"]
    of["main"][1:1] = more                                      # below all real images
    return parts | {name: captioned(of[name], *columns) for name, columns in PAGE.items() if of[name]}
