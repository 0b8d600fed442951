"""The rows of results.jsonl: how they are kept and printed, and scores of several rows together.

    HLR = acc(all real images) - acc(the set)          IOR = acc(the set) - acc(as many random real images)

Sources: Li et al. 2025 (DD-Ranking: HLR and IOR), the first dataset distillation challenge (ECCV 2024: the
score).
"""
import json
import pathlib
import statistics

from nanodd import locks, schema
from nanodd.judging import baselines

# ----------------------------------------------------------------------------------------------------
# 1. Rows


def open_log(folder):
    """The path of the results.jsonl in a folder, which is locked for this command.

    Raises UserError as locks.take, locks.refuse_link and read_rows.
    """
    locks.take(folder)
    path = folder / "results.jsonl"
    for written in (path, folder / "judges"):
        locks.refuse_link(written)
    if read_rows(path) and not path.read_text().endswith("\n"):
        with open(path, "a") as file:
            file.write("\n")                                    # an editor left it out
    return path


def read_rows(path):
    """The rows of a results.jsonl: a list of dicts, empty where there is no such file.

    Raises UserError where a line is damaged.
    """
    rows, lines = [], []
    with schema.reading(path, "nanoDD log of results", ": move it away, or choose --out ELSEWHERE"):
        lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        advice = ": delete that line, or choose --out ELSEWHERE"
        with schema.reading(f"{path}, line {number},", "nanoDD row", advice):
            rows.append(schema.require(json.loads(line), {"data": str}))
    return rows


def append_row(path, row, command):
    """Adds a row, and the command that made it, to a results.jsonl."""
    with open(path, "a") as file:
        file.write(json.dumps({**row, "command": command}) + "\n")


JUDGED = {"data": str, "train": str, "judge": str, "protocol": str, "epochs": int, "runs": int, "device": str,
          "mean": float}       # what challenge_score looks at


def new_row(row, data, title, judged, seconds, how):
    """The row of results.jsonl of a judges.Row, once it is trained: a dict.

    data: datasets.Data. title: the network's. judged: [(judge, accuracies)], in percent, the last epoch's at
    the end. seconds: in which the judges were trained. how: the device and the seed.
    """
    images, classes, recipe = len(row.trains[0].labels), len(row.trains[0].classes), data.recipe
    last = [round(accuracies[-1], 4) for _, accuracies in judged]
    return {"data": data.name, "cut": data.cut, "train": row.name, "ipc": images // (1 + row.pda) // classes,
            "pda": row.pda, "images": images, "recipe": recipe.name, "protocol": recipe.protocol,
            "judge": title, "size": recipe.judge_size, "epochs": row.epochs, "runs": len(last),
            "accuracy": last, "mean": round(statistics.mean(last), 4),
            "std": round(statistics.stdev(last), 4) if len(last) > 1 else None,
            "best": round(statistics.mean(round(max(accuracies), 4) for _, accuracies in judged), 4),
            "seconds": round(row.chosen_in + seconds, 1), **how,
            **({"metrics": row.metrics} if row.metrics else {})}


TABLE_HEADER = f"{'trained on':28} |   ipc |  images | accuracy, % (runs)  |   best | epochs | seconds"


def table_line(row):
    """A row of judges, as it is printed below TABLE_HEADER; with --metrics, a second line of numbers."""
    spread = f"+- {row['std']:.2f}" if row["std"] is not None else "       "
    numbers = [f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value or '-'}"
               for name, value in row.get("metrics", {}).items()]
    return (f"{row['train']:28} | {row['ipc']:5} | {row['images']:7} | "
            f"{row['mean']:6.2f} {spread:7} ({row['runs']}) | "
            f"{row['best']:6.2f} | {row['epochs']:6} | {row['seconds']:6.1f}"
            + ("\n  " + ", ".join(numbers)) * bool(numbers))


# ----------------------------------------------------------------------------------------------------
# 2. Scores of several rows together


def hlr_ior(own, full, random):
    """Hard label recovery and improvement over random, as fractions, of three mean accuracies in percent.

    A lower HLR is better, and a higher IOR. Both are DD-Ranking's (Li et al. 2025), whose formulas take
    fractions; its code 0.2.0 passes percent. Copies (--pda) count as part of the set; the random images have
    none.
    """
    return round((full - own) / 100, 6), round((own - random) / 100, 6)


def score_rows(rows):
    """HLR and IOR of each of the rows, if among them are a full one and a random one of its size.

    The returned rows go to results.jsonl too; "kind": "scores" distinguishes them from rows of judges.
    """
    without_copies = {row["train"]: row for row in rows if not row["pda"]}
    full_row, random_row = without_copies.get("full"), without_copies.get("random")
    scores = []
    for row in rows if full_row and random_row else []:
        if row not in (full_row, random_row) and row["ipc"] == random_row["ipc"]:
            hlr, ior = hlr_ior(row["mean"], full_row["mean"], random_row["mean"])
            fields = {key: row[key] for key in ("data", "cut", "train", "ipc", "protocol")}
            scores.append({"kind": "scores", **fields, "hlr": hlr, "ior": ior})
    return scores


CHALLENGE = {"cifar100": 32, "tiny-imagenet": 64}               # the challenge's data sets and their sizes


def challenge_score(rows):
    """The challenge's score, percent: the mean over its data sets of a distilled set's accuracy.

    rows: of results.jsonl. For each data set the last exact row counts: one with its own recipe, three or
    more judges, all 1,001 epochs in float32, and the test split. None while a data set has no such row.
    """
    means = {}
    for row in rows:
        is_exact = (schema.mismatch(row, JUDGED) is None
                    and row.get("size") == CHALLENGE.get(row["data"], 0) and row["judge"] == "ConvNetD3-W128"
                    and row["protocol"] == "challenge" and row["epochs"] == 1001 and row["runs"] >= 3
                    and row.get("recipe") == row["data"] and "bf16" not in row["device"])
        if is_exact and not {*baselines.SELECTORS, "full"} & set(row["train"].split("+")):
            means[row["data"]] = row["mean"]
    return statistics.mean(means.values()) if len(means) == len(CHALLENGE) else None


def print_challenge_score(log, name):
    """Prints the score, where both data sets have a row. log: the results.jsonl of the data set `name`.

    The path of the other data set's file differs by its name: out/tiny-imagenet/X for out/cifar100/X.
    """
    head, match, tail = str(log).rpartition(name)
    logs = [pathlib.Path(head + dataset + tail) for dataset in CHALLENGE if match and name in CHALLENGE]
    score = challenge_score([row for path in logs for row in read_rows(path)])
    if score is not None:
        print(f"challenge score, mean over {' and '.join(CHALLENGE)}: {score:.1f}")


def close_table(rows, log, command, num_evals):
    """Prints what stands below the table of `rows`, and appends their scores to the results.jsonl `log`."""
    print("accuracy: last epoch, mean +- sample standard deviation (runs); best: of up to "
          f"{num_evals} epochs, evenly spread | added to {log}")
    for row in score_rows(rows):
        append_row(log, row, command)
        print(f"{row['train']} | HLR {row['hlr']:.3f} | IOR {row['ior']:.3f}")
    if rows[0]["protocol"] == "challenge":
        print_challenge_score(log, rows[0]["data"])
