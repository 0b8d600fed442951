"""docs/digits.md's prose: each number in it is one of results/digits.jsonl, and each claim holds there."""
import itertools
import re


import turbo
from nanodd import recipes
from nanodd.judging import results
from nanodd.sampling import oversample, pilots
from pages import PAGES, paired_gain

DIGITS = PAGES["docs/digits.md"]


def test_each_section_begins_with_the_question_that_it_answers():
    sections = re.findall(r"^## .*\n\n(.*)", DIGITS, re.M)
    assert len(sections) == 10
    for text in sections:
        assert re.match(r"[A-Z][^.:]*?(al\.[^.:]*)?\?", text), text


def test_what_is_said_of_the_front_table_is_what_was_measured():
    import digits
    from report import spread
    rows = results.read_rows(digits.RESULTS)
    of = {(row["row"], row["ipc"]): row for row in rows if row["table"] == "main"}
    ways = [f"**distilled{how}**" for how in ("", ", with modes", ", with modes, a quarter kept")]
    chance = of["real, at random", 10]["mean"]
    plain, modes, kept = (of[name, 10]["mean"] for name in ways)
    behind = of["real, at random", 50]["mean"] - of[ways[0], 50]["mean"]
    said = (f"{chance - plain:.1f} points behind random real images, and at fifty {behind:.1f} points. At "
            "ten, with modes the set is "
            f"{modes - chance:.1f} points ahead of random real images, and with a quarter kept "
            f"{kept - chance:.1f} points ahead")
    assert DIGITS.count(said) == 1 and kept > modes > chance > plain
    for name in ("herding", "k-means centroids"):               # "as good as herding and k-means centroids"
        row, ours = of[f"real, {name}", 10], of[ways[2], 10]
        assert abs(row["mean"] - ours["mean"]) < max(row["std"], ours["std"])
    for ipc in (1, 10, 50):
        assert of["real, k-center", ipc]["mean"] > max(of[name, ipc]["mean"] for name in ways)
    earlier = [spread(row) for way in ways for row in rows
               if row["table"] == "earlier" and (row["row"], row["ipc"]) == (way, 10)]
    assert ("the sets of the first make {} without modes. With modes the three make {}, 95.7 ± 1.6 and "
            "97.1 ± 0.9, and with a quarter kept {}, ").format(*earlier) in DIGITS
    guided, = (row for row in rows if row["table"] == "solvers" and row["steps"] == 10
               and row["row"].startswith("DDIM"))
    assert f"At guidance 2 the default's ten steps make {spread(guided, 'one_')} (the table of" in DIGITS
    assert f"at guidance 1 they make {spread(of['**distilled**', 1])} (the table above)" in DIGITS


def test_what_is_said_of_the_map_is_what_was_measured():
    import digits
    of = {row["row"]: row for row in results.read_rows(digits.RESULTS) if row["table"] == "map"}
    recall = lambda name: f"{of[name]['metrics']['recall']:.2f}"
    large = lambda name: f"{of[name]['two_hundred_mean']:.1f}"
    assert all(row["runs"] == 5 and row["cut"].endswith("252 to test") for row in of.values())
    one, two, four = "guidance 1", "guidance 2", "guidance 4"
    assert (f"From guidance 1 to 2 recall falls from {recall(one)} to {recall(two)}, and to {recall(four)} "
            f"at 4; accuracy at 200 a class falls from {large(one)} to {large(two)} and {large(four)} %. The "
            "recipe") in DIGITS
    assert recipes.RECIPES["digits"].guidance == 1
    steps = [f"{n} steps, guidance 1" if n != 10 else one for n in (50, 10, 5, 3)]
    assert "recall is {} at 50 steps, {} at 10, {} at 5 and {} at 3".format(*map(recall, steps)) in DIGITS
    assert "200 a class is {}, {}, {} and {} %".format(*map(large, steps)) in DIGITS
    diverse, plain = of["lambda_d 0.05, 5 steps, guidance 1"], of[steps[2]]
    assert f"raises recall from {recall(steps[2])} to {diverse['metrics']['recall']:.2f}" in DIGITS
    assert f"from {large(steps[2])} to {diverse['two_hundred_mean']:.1f} %, nearly what 10 steps" in DIGITS
    assert (f"The loss costs precision: {diverse['metrics']['precision']:.2f} in place of "
            f"{plain['metrics']['precision']:.2f}") in DIGITS
    alone = [row["metrics"]["recall"] for name, row in of.items() if not re.search("lambda|modes|both", name)]
    assert max(alone) < diverse["metrics"]["recall"]            # "No choice of guidance and steps"
    pair = lambda name: (of[name]["metrics"]["precision"], of[name]["metrics"]["recall"])
    pulled, both = pair("lambda_r 0.2, guidance 1"), pair("both 0.1, guidance 1")
    assert (f"from {recall(one)} to {pulled[1]:.2f}, and precision rises from {pair(one)[0]:.2f} to "
            f"{pulled[0]:.2f}. With 0.1 for each the two losses") in DIGITS
    assert f"cancel: precision {both[0]:.2f}, recall {both[1]:.2f}" in DIGITS

    def traded(before, after):
        """Recall gained and precision lost, of the printed numbers."""
        (p, r), (p_after, r_after) = ([round(x, 2) for x in pair(name)] for name in (before, after))
        return f"{r_after - r:.2f}", f"{p - p_after:.2f}"
    for said, before, after in (
            ("Less guidance, from 2 to 1, raises recall by {} and costs {}.", two, one),
            ("10 steps in place of 5 raise recall by {} and cost {}, and", steps[2], one),
            ("5 steps raises recall by {} and costs {}.", steps[2], "lambda_d 0.02, 5 steps, guidance 1"),
            ("At guidance 2 lambda_d 0.05 raises recall by {} and costs {} of precision.", two,
             "lambda_d 0.05, guidance 2")):
        assert said.format(*traded(before, after)) in DIGITS
    few, many = (f"{n} steps, guidance 2" for n in (5, 50))
    assert f"from 5 to 50 recall rises from {recall(few)} to {recall(many)}." in DIGITS
    assert pair(many)[0] >= pair(few)[0]                        # "more steps cost no precision"
    published = [(of[f"published lambdas, guidance {g}"], of[f"guidance {g}"]) for g in (1, 2)]
    assert all(abs(a["metrics"][name] - b["metrics"][name]) < 0.05
               for a, b in published for name in ("precision", "recall"))
    best = sorted((row for name, row in of.items() if "modes" not in name), key=lambda row: -row["mean"])[:5]
    assert best[0]["mean"] - best[-1]["mean"] < min(row["std"] for row in best[1:])
    assert f"one deviation, {best[0]['mean']:.1f} % and less." in DIGITS
    assert best[0]["row"] == steps[0]                           # whose settings two of the pairs have
    before, after = "20 steps, uniform grid, guidance 1.5", "10 modes of weight 0.2, guidance 1.5"
    assert (f"20 steps on a uniform grid make {of[before]['mean']:.1f} % at ten a class and "
            f"{large(before)} % at 200") in DIGITS
    assert f"the same steps make {of[after]['mean']:.1f} and {large(after)} %, the most of the map." in DIGITS
    assert all(of[after][key] == max(row[key] for row in of.values()) for key in ("mean", "two_hundred_mean"))
    assert (f"Recall rises from {recall(before)} to {recall(after)}, and precision falls from "
            f"{pair(before)[0]:.2f} to {pair(after)[0]:.2f}.") in DIGITS


def test_what_is_said_of_the_pairs_is_what_was_measured():
    import digits
    of = {row["row"]: row["accuracy"] for row in results.read_rows(digits.RESULTS) if row["table"] == "pairs"}

    def gain(one, two):
        """(mean, standard error) of the paired differences, and both in words."""
        mean, error = paired_gain(of[one], of[two])
        return mean, error, f"{mean:.2f} ± {error:.2f}"
    assert all(len(accuracies) == 10 for accuracies in of.values())
    diverse = "lambda_d 0.05, 5 steps"
    mean, error, said = gain(diverse, "base model, 5 steps")
    assert f"lambda_d 0.05 makes {said} points more than the base" in DIGITS and mean > 2 * error
    mean, error, said = gain(diverse, "base model, 10 steps")
    assert f"diversity loss at five steps makes {said[1:]} points fewer." in DIGITS and -2 * error < mean < 0
    mean, error, said = gain("published lambdas, 50 steps", "base model, 50 steps")
    assert f"the published lambdas make {said} points more than" in DIGITS and mean < 2 * error
    mean, error, modes = gain("base model, with modes", "real, at random")
    more, more_error, kept = gain("base model, with modes, a quarter kept", "real, at random")
    assert (f"Modes make {modes} points more than random real images at ten a class, and {kept} points more "
            "with a quarter kept") in DIGITS and mean > 2 * error and more > 2 * more_error
    assert f"({mean:.1f} and {more:.1f} over ten seeds of another base model, below)" in DIGITS
    mean, error, said = gain("published lambdas, with modes", "base model, with modes")
    assert f"modes make {said} points more than without fine-tuning" in DIGITS and mean < 2 * error


def test_what_is_said_of_the_curves_is_what_was_measured():
    import digits
    import digits_rows
    of = {row["row"]: row for row in results.read_rows(digits.RESULTS) if row["table"] == "curves"}
    curves = {dial: [of[flags] for flags in values.values()] for dial, values in digits_rows.CURVES.items()}
    ends = lambda dial, name: "from {:.2f} to {:.2f}".format(
        *(curves[dial][end]["metrics"][name] for end in (0, -1)))
    assert (f"From lambda_r 0 to 0.1 recall falls {ends('lambda_r', 'recall')}, and precision rises "
            f"{ends('lambda_r', 'precision')}. From lambda_d 0 to 0.1 recall rises "
            f"{ends('lambda_d', 'recall')}, and precision falls {ends('lambda_d', 'precision')}.") in DIGITS
    for dial, name in itertools.product(("slots", "steps"), ("precision", "recall")):
        values = [row["metrics"][name] for row in curves[dial]]
        assert max(values) - min(values) < 0.05                 # "change by less than 0.05"
    accuracies = [row["mean"] for row in of.values()]
    spread, deviation = max(accuracies) - min(accuracies), sum(row["std"] for row in of.values()) / len(of)
    assert (f"All rows are within {spread:.1f} points, and the deviation over five judges is "
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
    said = lambda *key: spread(of[key])
    metric = lambda name, *key: f"{of[key]['metrics'][name]:.2f}"
    one, two, five, ten = "student, 1 step", "student, 2 steps", "base, DDIM, 5 steps", "base, DDIM, 10 steps"
    assert (f"makes {said(one, 10)} % at ten a class and {said(one, 50)} % at fifty, the base in ten steps "
            f"{said(ten, 10)} and {said(ten, 50)} %.") in DIGITS
    gains = [of[ten, ipc]["per_thousand"] / of[one, ipc]["per_thousand"] for ipc in (10, 50)]
    assert "draws {:.1f} and {:.1f} times as many images a second".format(*gains) in DIGITS
    assert of[one, 10]["mean"] > of[ten, 10]["mean"] - 1        # within one point of ten steps
    assert (f"little recall.** Recall falls from {metric('recall', ten, 50)} to "
            f"{metric('recall', one, 50)}, while precision rises from {metric('precision', ten, 50)} to "
            f"{metric('precision', one, 50)}.") in DIGITS
    assert (f"two steps recall is {metric('recall', two, 50)}, at a precision of "
            f"{metric('precision', two, 50)}, and the accuracy {said(two, 50)} %") in DIGITS
    starts = [(name, 10) for name in ("t* 999, 1 step", "t* 727, 1 step", "t* 500, 1 step", one)]
    assert "student makes {} % from t = 999, {} from 727, {} from 500 and {} from 400, with recalls".format(
        *(said(*key) for key in starts)) in DIGITS
    assert "recalls of {}, {}, {} and {}.".format(*(metric("recall", *key) for key in starts)) in DIGITS
    alone, dist = ("lambda 0, 1 step", 10), ("L_dist alone, 1 step", 10)
    assert (f"alone (lambda 0) makes {said(*alone)} %, the distillation loss alone {said(*dist)} % at a "
            f"recall of {metric('recall', *dist)}. Such a student draws the average of a class") in DIGITS
    look, pairs = ("features of the base, 1 step", 10), "regression, 1 step"
    assert f"makes {said(*look)} % at a recall of {metric('recall', *look)}." in DIGITS
    assert (f"makes {said(pairs, 10)} % at ten and {said(pairs, 50)} % at fifty a class, with a recall of "
            f"{metric('recall', pairs, 50)} at fifty") in DIGITS
    assert of[pairs, 50]["metrics"]["recall"] > of[one, 50]["metrics"]["recall"]
    mixed = "base, then student"
    assert (f"two calls make {said(mixed, 10)} % at ten and {said(mixed, 50)} % at fifty, at recalls of "
            f"{metric('recall', mixed, 10)} and {metric('recall', mixed, 50)}.") in DIGITS
    assert (f"own second step restores recall too, and makes {said(two, 10)} and {said(two, 50)} %. Four "
            f"steps raise recall further and make {said('student, 4 steps', 10)} % at ten a class") in DIGITS
    recalls = [of[name, 10]["metrics"]["recall"] for name in (one, two, "student, 4 steps")]
    assert recalls == sorted(recalls)
    centroid, = (row for row in rows if row["row"] == "real, k-means centroids" and row["asked"] == 1)
    assert abs(of[dist]["mean"] - centroid["mean"]) < 1         # "as much as from one k-means centroid"
    within = lambda seconds, *names: [spread(timed[name, seconds]) for name in names]
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
