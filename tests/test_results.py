"""Every row of results/ carries what its own numbers prove: which protocol judged it, and for how long."""
import json
import pathlib
import re

import pytest

ROWS = [(f"{path.name}:{number}", json.loads(line))
        for path in sorted((pathlib.Path(__file__).parents[1] / "results").glob("*.jsonl"))
        for number, line in enumerate(path.read_text().splitlines(), 1)]
JUDGED = [pytest.param(row, id=place) for place, row in ROWS if "protocol" in row or "accuracy" in row]
# epochs, and images seen, at most
SHORT = {"digits": (200, 40_000), "three": (200, 40_000), "cifar100": (200, 1_000_000)}
GU = {10: 2000, 20: 1500, 50: 1500, 100: 1000}                   # images a class -> epochs; their Table 6


@pytest.mark.parametrize("row", JUDGED)
def test_a_rows_epochs_are_those_of_its_protocol(row):
    protocol, epochs = row["protocol"], row["epochs"]
    asked = re.search(r"--epochs (\d+)", row.get("command", ""))
    if asked:                                                   # they see as many images as 50 a class would
        assert protocol == "challenge" and epochs == int(asked[1]) == 1001 * 50 * 100 // row["images"]
    else:
        assert (protocol == "challenge") == (epochs == 1001)
    if protocol == "short":
        most, views = SHORT[row["data"].removesuffix("-validation")]
        assert epochs == max(1, min(most, views // row["images"]))
    elif protocol == "gu":
        of_ten = GU[row["ipc"]]                                 # classes; a hundred have two thirds
        assert epochs == (2 * of_ten // 300 * 100 if row["data"] == "imagenet100" else of_ten)
    else:
        assert protocol == "challenge"


@pytest.mark.parametrize("row", JUDGED)
def test_a_row_says_the_mean_and_the_sample_deviation_of_its_judges(row):
    accuracy, mean = row["accuracy"], sum(row["accuracy"]) / len(row["accuracy"])
    deviation = (sum((one - mean) ** 2 for one in accuracy) / (len(accuracy) - 1)) ** 0.5
    assert row["runs"] == len(accuracy)
    assert row["mean"] == pytest.approx(mean, abs=1e-3) and row["std"] == pytest.approx(deviation, abs=1e-3)
