"""analyze.py: numbers worked out by hand, odd and wrong records, groups, figure, and program."""

import gzip
import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import analyze
from analyze import INITIALIZER, POOL, RAY, SERIAL

# SciPy warns where all trials are equal, which happens in tests only.
pytestmark = pytest.mark.filterwarnings("ignore:Precision loss")

STEADY = [3.5, 3.6, 3.4, 3.55, 3.45]  # seconds of five trials
OTHER = "c" * 64
VERSIONS = {"keras": "3.15.1", "numpy": "2.4.6", "python": "3.11.9", "tensorflow": "2.21.0"}
VERSIONS_2019 = {"keras": "2.2.4-tf", "python": "3.7.16", "tensorflow": "1.13.1"}


def record(approach, number, rounds, **changes):
    """Return a record as the bench scripts write it.

    number: of the pass; in a pass the approaches follow each other.
    rounds: a list of seconds, or the seconds of ten equal rounds.
    """
    if not isinstance(rounds, list):
        rounds = [rounds / 10] * 10
    made = {
        "approach": approach,
        "num_cpus": 2,
        "array": False,
        "time": 1795608000 + 60 * number + len(approach) / 10,
        "setup_seconds": 2.5,
        "round_seconds": rounds,
        "accuracy": 0.97,
        "labels": "a" * 64,
        "model": "b" * 64,
        "data": analyze.MNIST,
        "machine": "AMD EPYC, 2 physical cores, linux",
        "versions": VERSIONS,
    }
    if approach == RAY:
        made |= {"nodes": 1, "cluster": False, "versions": VERSIONS | {"ray": "2.60.0"}}
    elif approach.startswith(POOL):
        made |= {"start_method": "fork"}
    return made | changes


def series(approach, rounds, **changes):
    """Return a record for each entry of rounds, one in each pass."""
    return [record(approach, number, entry, **changes) for number, entry in enumerate(rounds)]


def groups(records):
    trials = [analyze.Trial(**made) for made in records]
    return analyze.group_trials(sorted(trials, key=lambda trial: trial.time))


def samples(records):
    """Return {approach: Sample} of records of a single group."""
    [group] = groups(records)
    return group.samples


def compare(records, approach, other):
    """Return the Comparison of two approaches in records of a single group."""
    found = samples(records)
    return analyze.compare(found[approach], found[other])


def report(records):
    return analyze.report(groups(records))


def cells(text, first):
    """Return the cells of all table rows whose first cell is `first`."""
    rows = []
    for line in text.splitlines():
        row = [cell.strip() for cell in line.split("|")[1:-1]]
        if row and row[0] == first:
            rows.append(row)
    return rows


def sentences(text, part):
    """Return the sentences below the tables that contain `part`."""
    return [line for line in text.splitlines() if line.startswith("- ") and part in line]


def write(path, records):
    path.write_text("".join(json.dumps(made) + "\n" for made in records))
    return path


# Numbers


def test_numbers_of_a_sample():
    made = [
        record(RAY, 0, [1.0, 2.0, 6.0], setup_seconds=4.0),
        record(RAY, 1, [2.0, 2.0, 1.0], setup_seconds=5.0),
    ]
    sample = samples(made)[RAY]
    # Sums 9 and 5: mean 7, standard deviation sqrt((2**2 + 2**2) / 1). Rounds 1, 1, 2, 2, 2, 6.
    assert sample.seconds.tolist() == [9, 5]
    assert sample.mean == 7
    assert sample.standard_deviation == pytest.approx(math.sqrt(8))
    assert sample.median_round == 2
    assert sample.setup_seconds == 4.5


def test_paired_interval():
    comparison = compare(series(SERIAL, [6, 8]) + series(RAY, [2, 4]), SERIAL, RAY)
    # Ratios 3 and 2, logarithms 1.098612 and 0.693147: mean 0.895880 = ln 2.449490, standard
    # deviation 0.286707, times 2.449490: 0.702286. t = 12.706205 (1 degree of freedom); half the
    # interval is 12.706205 x 0.286707 / sqrt(2) = 2.575964: exp(-1.680084) to exp(3.471844).
    assert comparison.pairs == 2
    assert comparison.ratio == pytest.approx(2.449490)
    assert comparison.standard_deviation == pytest.approx(0.702286, rel=1e-5)
    assert comparison.low == pytest.approx(math.exp(-1.680084), rel=1e-5)
    assert comparison.high == pytest.approx(math.exp(3.471844), rel=1e-5)


def test_unpaired_interval():
    serial = series(SERIAL, [1, math.e**2])
    ray = [record(RAY, 5 + k, seconds) for k, seconds in enumerate([math.e, math.e**3] * 2)]
    comparison = compare(serial + ray, SERIAL, RAY)
    # Logarithms 0, 2 and 1, 3, 1, 3: means 1 and 2, variances 2 and 4/3. Standard deviation of a
    # difference: sqrt(2 + 4/3) = 1.825742. Variance of the difference of the means:
    # 2/2 + (4/3)/4 = 4/3. Welch: (4/3)**2 / (1**2 / 1 + (1/3)**2 / 3) = 12/7 degrees of freedom,
    # t = 5.068500; half the interval is 5.068500 x sqrt(4/3) = 5.852600.
    assert comparison.pairs is None
    assert comparison.ratio == pytest.approx(math.exp(-1))
    assert comparison.standard_deviation == pytest.approx(math.exp(-1) * 1.825742, rel=1e-5)
    assert comparison.low == pytest.approx(math.exp(-1 - 5.852600), rel=1e-5)
    assert comparison.high == pytest.approx(math.exp(-1 + 5.852600), rel=1e-5)


@pytest.mark.parametrize(
    "order, pairs", [("srsr", 2), ("srrs", 2), ("srsrs", 2), ("ssrr", None), ("ssrsr", None)]
)
def test_pairs_where_approaches_took_turns(order, pairs):
    names = {"s": SERIAL, "r": RAY}
    made = [record(names[letter], k, 1.0 + k) for k, letter in enumerate(order)]
    assert compare(made[::-1], SERIAL, RAY).pairs == pairs


def test_single_trials_have_a_ratio_and_no_interval():
    comparison = compare(series(SERIAL, [6]) + series(RAY, [2]), SERIAL, RAY)
    assert comparison.ratio == pytest.approx(3)
    assert math.isnan(comparison.low) and math.isnan(comparison.high)
    text = report(series(SERIAL, [6]) + series(RAY, [2]))
    assert cells(text, SERIAL)[0][4:6] == ["3.00", "needs 2 trials of each"]


def test_five_long_runs_have_an_interval():
    pool = series(POOL, [[seconds / 50] * 50 for seconds in (2, 3, 2, 3, 2)])
    ray = series(RAY, [[1 / 50] * 50] * 5)
    comparison = compare(pool + ray, POOL, RAY)
    # Logarithms 0.693147 (three) and 1.098612 (two): mean 0.855333, deviations -0.162186 and
    # 0.243279, sum of squares 3 x 0.026304 + 2 x 0.059185 = 0.197282, standard deviation
    # sqrt(0.197282 / 4) = 0.222082; t = 2.776445 (4 degrees of freedom): half the interval is
    # 2.776445 x 0.222082 / sqrt(5) = 0.275752: exp(0.579581) to exp(1.131085).
    assert comparison.pairs == 5
    assert comparison.low == pytest.approx(math.exp(0.579581), rel=1e-5)
    assert comparison.high == pytest.approx(math.exp(1.131085), rel=1e-5)
    assert cells(report(pool + ray), POOL)[0][4:6] == ["2.35 ± 0.522", "1.79 to 3.10, 5 pairs"]


def test_25_rounds_have_two_tens():
    made = series(RAY, [[0.5] * 25] * 5)
    text = report(made)
    assert analyze.sums_of_tens(samples(made)[RAY]).tolist() == [5, 5]
    assert cells(text, "approach")[1] == [
        "approach",
        "rounds 1 to 10, s",
        "rounds 11 to 20, s",
        "last ten / first ten",
    ]
    assert cells(text, RAY)[1] == [RAY, "5.00", "5.00", "1.00"]
    assert not sentences(text, "Warning")


def test_tens_of_long_runs():
    # 1 + 2 + ... + 10 = 55, the next ten are 100 longer, and so on; 455 / 55 = 8.27.
    text = report(series(POOL, [[float(k) for k in range(1, 51)]] * 2))
    assert cells(text, POOL)[1][1:] == ["55.0", "155", "255", "355", "455", "8.27"]


def test_tens_of_very_long_runs_are_a_selection():
    titles = cells(report(series(RAY, [[0.5] * 2000])), "approach")[1]
    assert titles[1] == "rounds 1 to 10, s"
    assert titles[-2] == "rounds 1991 to 2000, s"
    assert len(titles) == 8


def test_growth():
    def growth(rounds):
        return analyze.growth(samples(series(RAY, [rounds] * 2))[RAY])

    # (6 + ... + 10) / (1 + ... + 5) = 40 / 15; of eleven rounds the middle one is in no half.
    assert growth([float(k) for k in range(1, 11)]) == pytest.approx(40 / 15)
    assert growth([1.0] * 5 + [9.0] + [2.0] * 5) == pytest.approx(2)
    assert growth([0.5] * 25) == pytest.approx(1)
    assert math.isnan(growth([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    "setup, ray_seconds, rounds",
    [
        (9.4, 3, 35),  # 9.4 - 2.5 = 6.9, and 6.9 / (0.5 - 0.3) = 34.5.
        (9.4, 6, math.inf),
        (2.5, 6, 0),
        (1.0, 3, 0),
    ],
)
def test_break_even(setup, ray_seconds, rounds):
    found = samples(series(POOL, [5] * 2) + series(RAY, [ray_seconds] * 2, setup_seconds=setup))
    assert analyze.break_even(found[POOL], found[RAY]) == rounds


# Text


def test_comparison_table():
    text = report(series(SERIAL, [6, 8], setup_seconds=9.0) + series(RAY, [2, 4]))
    assert cells(text, "approach") == [
        [
            "approach",
            "trials",
            "seconds for 10 rounds",
            "median round, s",
            "times as long as Ray (Ray's speedup)",
            "95% interval",
            "set-up, s",
            "published, 48 cores",
        ]
    ]
    assert cells(text, SERIAL) == [
        [
            SERIAL,
            "2",
            "7.00 ± 1.41",
            "0.700",
            "2.45 ± 0.702",
            "0.186 to 32.2, 2 pairs",
            "9.00",
            "64 s (13x)",
        ]
    ]
    assert cells(text, RAY) == [[RAY, "2", "3.00 ± 1.41", "0.300", "", "", "2.50", "5 s (1x)"]]


def test_definitions_come_first():
    text = report(series(RAY, STEADY))
    definitions = text[: text.index("## ")]
    assert "below 1, the approach is\n  faster than Ray" in definitions
    assert "this machine and this hour only" in definitions
    assert "multiple comparisons" in definitions


@pytest.mark.parametrize("array", [True, False])
def test_published_figures_stand_beside_ten_rounds_only(array):
    text = report(series(POOL, STEADY, array=array))
    assert cells(text, POOL)[0][-1] == "126 s (25x)"
    text = report(series(POOL, [[0.5] * 9] * 5, array=array))
    assert "published" not in text and "126 s" not in text


def test_price_of_reloading():
    text = report(series(POOL, [5.0, 7.0, 9.0]) + series(INITIALIZER, [1.0, 2.0, 6.0]))
    # Median rounds 0.7 and 0.2 s. Ratios 5, 3.5 and 1.5: geometric mean 26.25 ** (1/3) = 2.97.
    assert sentences(text, "multiprocessing takes 2.97 times as long as multiprocessing+init")
    assert sentences(text, "r = 0.500 s")[0].endswith("Here t = 0.200 s.")


def test_price_of_reloading_is_not_stated_where_rounds_grow():
    growing = [float(k) for k in range(1, 11)]
    text = report(series(POOL, [growing] * 5) + series(INITIALIZER, STEADY))
    assert sentences(text, "multiprocessing takes") and not sentences(text, "r/t")


def test_break_even_sentences():
    def sentence(pool, setup):
        text = report(series(POOL, pool) + series(RAY, [3.0] * 2, setup_seconds=setup))
        [found] = sentences(text, "Ray's set-up")
        return found

    assert sentence([5.0, 5.0], 9.4) == (
        "- Ray's set-up takes 6.90 s longer than that of multiprocessing, and its median round is"
        " 0.200 s shorter: the set-up is repaid after 35 rounds."
    )
    not_repaid = "Its rounds are not detectably shorter, so the set-up is not repaid."
    assert sentence([2.0, 2.0], 9.4).endswith(not_repaid)
    # The medians differ by 0.1 s, but the ratios are 1 and 1.67: the interval contains 1.
    assert sentence([3.0, 5.0], 9.4).endswith(not_repaid)
    same_setup = sentence([5.0, 5.0], 2.5)
    assert same_setup == "- Ray's set-up is not longer than that of multiprocessing."


def test_break_even_of_single_trials():
    text = report(series(POOL, [5.0]) + series(RAY, [3.0], setup_seconds=9.4))
    assert sentences(text, "repaid after 35 rounds")


def test_rounds_of_two_kinds_are_explained_for_todays_plain_array_only():
    def explained(**changes):
        text = report(series(SERIAL, STEADY, **changes) + series(POOL, STEADY, **changes))
        return bool(sentences(text, "two kinds"))

    assert explained(array=True)
    assert not explained(array=False)
    assert not explained(array=True, versions=VERSIONS_2019)


def test_missing_ray_is_told():
    text = report(series(SERIAL, STEADY) + series(POOL, STEADY))
    assert sentences(text, "There is no trial of Ray")
    assert cells(text, SERIAL)[0][4:6] == ["", ""]
    assert not sentences(report(series(RAY, STEADY)), "There is no trial of Ray")


def test_warning_of_few_trials():
    text = report(series(SERIAL, STEADY[:4]) + series(POOL, STEADY[:4]) + series(RAY, STEADY))
    assert sentences(text, "Warning") == [
        "- **Warning:** there are fewer than 5 trials of serial, multiprocessing: make more."
    ]


def test_warning_of_a_wide_spread():
    # Mean 4, standard deviation sqrt(2 / 4) = 0.707: 18%.
    text = report(series(SERIAL, [3.0, 4.0, 5.0, 4.0, 4.0]) + series(RAY, STEADY))
    assert sentences(text, "Warning") == [
        "- **Warning:** the standard deviation of serial is 18% of the mean, more than 10%:"
        " stop other work on the machine and measure again."
    ]


@pytest.mark.parametrize(
    "approach, cause",
    [
        (RAY, "an actor restarted, or the machine was busy."),
        (SERIAL, "6.00 s: the machine was busy."),
    ],
)
def test_warning_of_a_long_round(approach, cause):
    # The median of these runs is 1 s: 5 s is not over five times as long, 5.5 and 6 s are. A run
    # that is slow from its start to its end has no long round.
    runs = [[1.0] * 9 + [last] for last in (1.0, 5.0, 5.5, 6.0)] + [[7.0] * 10]
    [found] = sentences(report(series(approach, runs)), "median of the run")
    assert found.startswith(f"- **Warning:** 2 rounds of {approach} took more than 5 times")
    assert "the worst being round 10 of trial 4 with 6.00 s" in found
    assert found.endswith(cause)


def test_warning_of_growth():
    growing = [float(k) for k in range(1, 11)]
    [found] = sentences(report(series(POOL, [growing] * 5)), "Warning")
    assert "the second half of the runs of multiprocessing takes 2.67 times as long" in found


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0004, "0.000400"),
        (0.9496, "0.950"),
        (9.996, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (1275.4, "1275"),
    ],
)
def test_three_digits(value, text):
    assert analyze.three_digits(value) == text


# Groups


@pytest.mark.parametrize(
    "data, name",
    [
        (analyze.MNIST, "; MNIST;"),
        (analyze.STAND_IN, "; a synthetic stand-in, NOT MNIST;"),
        (OTHER, "; other data than MNIST, cccccccccccc;"),
    ],
)
def test_data_are_named(data, name):
    assert name in sentences(report(series(RAY, STEADY, data=data)), "Conditions")[0]


UNLIKE = [
    {"num_cpus": 1},
    {"array": True},
    {"round_seconds": [0.7] * 5},
    {"machine": "Intel, 2 physical cores, linux"},
    {"model": OTHER},
    {"data": OTHER},
    {"cluster": True},
    {"cluster": True, "nodes": 2},
    {"versions": VERSIONS | {"python": "3.12.1"}},
    {"versions": VERSIONS | {"numpy": "2.5.0"}},
]


@pytest.mark.parametrize("change", UNLIKE, ids=str)
def test_unlike_trials_are_not_compared(change):
    text = report(series(SERIAL, STEADY) + series(RAY, STEADY, **change))
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == len(set(headings)) == 2
    assert cells(text, SERIAL)[0][4:6] == ["", ""]


def test_start_methods_and_versions_of_ray_are_never_averaged():
    made = [
        *series(SERIAL, [6, 6]),
        *series(POOL, [4, 4]),
        *series(POOL, [8, 8], start_method="spawn", time=1795700000.0)[:1],
        *series(RAY, [2, 2]),
        *series(RAY, [1], versions=VERSIONS | {"ray": "2.61.0"}, time=1795700001.0),
    ]
    found = {}
    for group in groups(made):
        key = group.conditions.start_method, group.conditions.ray_version
        found[key] = [group.samples[name].mean for name in (SERIAL, POOL, RAY)]
    assert found == {
        ("fork", "2.60.0"): pytest.approx([6, 4, 2]),
        ("fork", "2.61.0"): pytest.approx([6, 4, 1]),
        ("spawn", "2.60.0"): pytest.approx([6, 8, 2]),
        ("spawn", "2.61.0"): pytest.approx([6, 8, 1]),
    }


def test_cores_ascend_within_the_same_conditions():
    made = []
    for num_cpus in (2, 16, 1):
        for array in (False, True):
            made += series(RAY, STEADY, num_cpus=num_cpus, array=array)
    found = [(group.conditions.array, group.num_cpus) for group in groups(made)]
    assert found == [(False, 1), (False, 2), (False, 16), (True, 1), (True, 2), (True, 16)]


def test_headings_name_the_machine_and_what_differs():
    made = series(SERIAL, STEADY) + series(RAY, STEADY) + series(SERIAL, STEADY, model=OTHER)
    headings = [line for line in report(made).splitlines() if line.startswith("## ")]
    start = "## AMD EPYC, 2 physical cores, linux; 2 cores; 10 rounds"
    assert headings == [f"{start}; model bbbbbbbbbbbb; ray 2.60.0", f"{start}; model cccccccccccc"]


def test_labels_that_differ_are_refused():
    made = [
        *series(SERIAL, STEADY),
        *series(RAY, STEADY, labels="f" * 64),
        *series(POOL, STEADY, num_cpus=1),
    ]
    text = report(made)
    [refusal] = sentences(text, "**Refused:**")
    assert "serial aaaaaaaaaaaa" in refusal and "ray ffffffffffff" in refusal
    assert not cells(text, SERIAL) and not cells(text, RAY)
    assert len(cells(text, POOL)) == 1


# Files


def test_unknown_fields_are_ignored(tmp_path):
    made = series(RAY, STEADY, comment="warm", start_method=None)
    assert len(analyze.read_trials([write(tmp_path / "a", made)])) == 5


def test_whole_numbers_are_numbers(tmp_path):
    made = [record(RAY, 0, [1, 2], time=1795608000, setup_seconds=3)]
    [trial] = analyze.read_trials([write(tmp_path / "a", made)])
    assert trial.round_seconds == [1.0, 2.0]


def test_a_run_that_is_recorded_twice_counts_once(tmp_path):
    made = series(RAY, STEADY)
    path = write(tmp_path / "a", made)
    again = tmp_path / "b"
    lines = [json.dumps(again_made, sort_keys=True, separators=(",", ":")) for again_made in made]
    again.write_text("\n".join(lines))
    assert len(analyze.read_trials([path, again, path])) == 5


def test_trials_are_in_order_of_time(tmp_path):
    made = series(RAY, [1, 2, 3])
    late, early = write(tmp_path / "a", made[2:]), write(tmp_path / "b", made[1::-1])
    seconds = [sum(trial.round_seconds) for trial in analyze.read_trials([late, early])]
    assert seconds == pytest.approx([1, 2, 3])


def test_records_on_one_line_are_read(tmp_path, capsys):
    path = tmp_path / "a"
    path.write_text("".join(json.dumps(made) for made in series(RAY, STEADY)))
    assert len(analyze.read_trials([path])) == 5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_and_line_ends(tmp_path, encoding):
    path = tmp_path / "a"
    made = series(RAY, STEADY, machine="é\u2028")
    lines = [json.dumps(made_record, ensure_ascii=False) for made_record in made]
    path.write_bytes("\r\n\r\n\ufeff".join(lines).encode(encoding))
    assert [trial.machine for trial in analyze.read_trials([path])] == ["é\u2028"] * 5


def test_a_file_that_is_no_text_is_told(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(SystemExit, match="a.gz is not a text file of records: 'utf-8' codec"):
        analyze.read_trials([path])


@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_line_that_was_cut_off_is_skipped_and_told(tmp_path, place, capsys):
    lines = [json.dumps(made) for made in series(RAY, STEADY)]
    lines.insert(place, json.dumps(record(RAY, 8, 3.5))[:300])
    path = tmp_path / "a"
    path.write_text("\n".join(lines))
    assert len(analyze.read_trials([path])) == 5
    error = capsys.readouterr().err
    told = f"a: skipped 1 line without a whole record, the first of them line {place + 1}\n"
    assert error.endswith(told)


def test_a_record_before_one_that_was_cut_off_is_read(tmp_path, capsys):
    path = tmp_path / "a"
    path.write_text(json.dumps(record(RAY, 0, 3.5)) + json.dumps(record(RAY, 1, 3.5))[:-9])
    assert len(analyze.read_trials([path])) == 1
    assert "skipped 1 line without" in capsys.readouterr().err


@pytest.mark.parametrize("length", [1, 12, 300])
def test_a_record_behind_one_that_was_cut_off_is_read(tmp_path, length, capsys):
    path = tmp_path / "a"
    path.write_text(json.dumps(record(RAY, 0, 3.5))[:length] + json.dumps(record(RAY, 1, 7)))
    [trial] = analyze.read_trials([path])
    assert trial.round_seconds == [0.7] * 10
    assert "skipped 1 line without" in capsys.readouterr().err


def test_many_lines_without_a_record_are_one_message(tmp_path, capsys):
    path = tmp_path / "a"
    path.write_text("approach,seconds\nray,3.5\n17\n" * 100)
    assert analyze.read_trials([path]) == []
    error = capsys.readouterr().err
    assert "skipped 300 lines" in error and "the first of them line 1\n" in error
    assert error.count("\n") == 1


WRONG = [
    ("approach", "dask", "Input should be 'serial'"),
    ("num_cpus", True, "valid integer"),
    ("num_cpus", 0, "greater than 0"),
    ("array", "no", "valid boolean"),
    ("setup_seconds", math.inf, "finite number"),
    ("round_seconds", [], "at least 1 item"),
    ("round_seconds", [1.0, -1.0], "greater than 0"),
    ("round_seconds", [1.0, "1.0"], "valid number"),
    ("labels", "A" * 64, "pattern"),
    ("versions", {"python": 3.11}, "valid string"),
    ("start_method", "vfork", "Input should be 'fork'"),
]


@pytest.mark.parametrize("field, value, reason", WRONG)
def test_a_wrong_field_is_named(tmp_path, field, value, reason):
    path = write(tmp_path / "a", [record(RAY, 0, 3.5), record(RAY, 1, 3.5) | {field: value}])
    with pytest.raises(SystemExit, match=f"^analyze.py: .*a, line 2: {field}.*: .*{reason}"):
        analyze.read_trials([path])


@pytest.mark.parametrize("field", sorted(record(SERIAL, 0, 3.5)))
def test_a_missing_field_is_named(tmp_path, field):
    made = record(SERIAL, 0, 3.5)
    del made[field]
    with pytest.raises(SystemExit, match=f"line 1: {field}: Field required"):
        analyze.read_trials([write(tmp_path / "a", [made])])


# Figure


def bars(axes):
    """Return the (middle, height, bottom, colour) of all bars, from left to right."""
    found = []
    for patch in axes.patches:
        middle = patch.get_x() + patch.get_width() / 2
        colour = analyze.matplotlib.colors.to_hex(patch.get_facecolor()).upper()
        found.append((middle, patch.get_height(), patch.get_y(), colour))
    return sorted(found)


def error_bars(axes):
    """Return the (low, high) ends of all error bars, in the order in which they were drawn."""
    ends = []
    for collection in axes.collections:
        [segment] = collection.get_segments()
        ends.append(segment[:, 1].tolist())
    return ends


def dots(axes):
    """Return the heights of the dots of each bar."""
    return [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "o"]


def test_bars_error_bars_and_dots():
    made = series(SERIAL, [7.0, 9.0]) + series(RAY, [3.0, 5.0]) + series(POOL, [6.0])
    left, _ = analyze.draw(groups(made)).axes
    middles, heights, bottoms, colours = zip(*bars(left), strict=True)
    assert heights == pytest.approx((8, 6, 4))
    assert bottoms == (0, 0, 0)
    assert colours == tuple(analyze.COLOURS[name] for name in (SERIAL, POOL, RAY))
    assert np.diff(middles) == pytest.approx([0.8 / 3, 0.8 / 3])
    # Standard deviation sqrt(2); that of a single trial is not drawn.
    root = math.sqrt(2)
    assert error_bars(left) == [
        pytest.approx([8 - root, 8 + root]),
        pytest.approx([4 - root, 4 + root]),
    ]
    assert dots(left) == [pytest.approx([7, 9]), pytest.approx([6]), pytest.approx([3, 5])]
    assert left.get_ylim()[0] == 0 and left.get_yscale() == "linear"
    assert left.get_ylabel() == "seconds for 10 rounds"


def test_dots_stand_on_their_bars():
    left, _ = analyze.draw(groups(series(SERIAL, STEADY) + series(RAY, [5.0] * 5))).axes
    lines = [line for line in left.lines if line.get_marker() == "o"]
    for patch, line in zip(left.patches, lines, strict=True):
        places = line.get_xdata()
        assert patch.get_x() < min(places) and max(places) < patch.get_x() + patch.get_width()
        assert len(set(places)) == 5


def test_every_round_is_drawn_in_order():
    made = series(SERIAL, [[1.0, 2.0], [3.0, 4.0]]) + series(RAY, [[0.5, 0.6]])
    _, right = analyze.draw(groups(made)).axes
    serial, ray = right.lines
    assert serial.get_xdata().tolist() == [1, 2, 3, 4]
    assert serial.get_ydata().tolist() == [1, 2, 3, 4]
    assert ray.get_ydata().tolist() == [0.5, 0.6]
    assert [serial.get_color(), ray.get_color()] == [analyze.COLOURS[SERIAL], analyze.COLOURS[RAY]]
    assert right.get_ylim()[0] == 0


def test_bars_start_from_zero_also_where_one_is_twenty_times_as_long():
    left, right = analyze.draw(groups(series(POOL, [60.0] * 2) + series(RAY, [3.0] * 2))).axes
    assert left.get_yscale() == "linear" and left.get_ylim()[0] == 0
    assert right.get_yscale() == "log"


def test_the_axis_starts_from_zero_also_where_an_error_bar_reaches_below():
    left, _ = analyze.draw(groups(series(RAY, [1.0, 20.0]))).axes
    [(low, high)] = error_bars(left)
    assert low < 0 < high
    assert left.get_ylim()[0] == 0


def test_seven_core_counts_are_one_row():
    made = []
    core_counts = [1, 2, 4, 8, 16, 32, 48]
    for num_cpus in core_counts:
        for approach in (SERIAL, POOL, INITIALIZER, RAY):
            made += series(approach, [1.0 * num_cpus, 1.1 * num_cpus], num_cpus=num_cpus)
    left, right = analyze.draw(groups(made)).axes
    assert [label.get_text() for label in left.get_xticklabels()] == list(map(str, core_counts))
    middles, heights, _, _ = zip(*bars(left), strict=True)
    assert np.round(middles).tolist() == np.repeat(range(7), 4).tolist()
    assert heights == pytest.approx([1.05 * num_cpus for num_cpus in core_counts for _ in range(4)])
    # A bar ends where the next one begins, and does not reach into the next group.
    assert min(np.diff(middles)) == pytest.approx(0.2)
    assert right.get_xlabel().endswith("on 48 cores")
    assert right.lines[0].get_ydata()[0] == pytest.approx(4.8)


def test_an_approach_may_lack_on_some_cores():
    made = series(RAY, STEADY, num_cpus=1) + series(SERIAL, STEADY) + series(RAY, STEADY)
    left, _ = analyze.draw(groups(made)).axes
    assert [middle for middle, *_ in bars(left)] == pytest.approx([0.2, 0.8, 1.2])


def test_a_row_for_each_call_and_its_title():
    made = series(RAY, STEADY) + series(RAY, STEADY, array=True) + series(RAY, STEADY, num_cpus=1)
    figure = analyze.draw(groups(made))
    titles = [left.get_title("left") for left in figure.axes[::2]]
    assert len(titles) == 2
    assert "10 rounds; model.predict without the autotuner\n" in titles[0]
    assert "10 rounds; model.predict of the plain array\n" in titles[1]
    assert all("AMD EPYC" in title and "ray 2.60.0" in title for title in titles)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [RAY]


def test_forty_machines(tmp_path):
    made = []
    for number in range(40):
        for approach in (SERIAL, POOL, INITIALIZER, RAY):
            made += series(approach, STEADY, machine=f"machine {number}")
    start = time.perf_counter()
    figure = analyze.draw(groups(made))
    figure.savefig(tmp_path / "a.png", dpi=150)
    assert time.perf_counter() - start < 30
    assert len(figure.axes) == 2 * analyze.MAX_ROWS
    assert figure.get_supxlabel() == "These are the first 10 of 40 rows."
    assert figure.get_size_inches()[1] * 150 < 6000


# The program, as a user runs it


def start(folder, *arguments, **options):
    """Run Python in a folder; return its exit status, stdout and stderr."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    done = subprocess.run(
        [sys.executable, *arguments], text=True, timeout=60, cwd=folder, **options
    )
    return done.returncode, done.stdout, done.stderr


def test_program_in_odd_surroundings(tmp_path):
    write(tmp_path / "results.jsonl", series(RAY, STEADY, machine="$x_$ | é\n#"))
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    environment = os.environ | {
        "MPLBACKEND": "missing",
        "PYTHONIOENCODING": "ascii",
        "PYTHONOPTIMIZE": "2",
    }
    arguments = [analyze.__file__, "--figure", "new.png"]
    status, text, error = start(tmp_path, *arguments, env=environment)
    assert (status, error) == (0, "")
    assert cells(text, RAY)[0][2] == "3.50 ? 0.0791"
    assert (tmp_path / "new.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_is_an_error(tmp_path):
    write(tmp_path / "results.jsonl", series(RAY, STEADY))
    with open("/dev/full", "w") as full:
        status, _, error = start(tmp_path, analyze.__file__, stdout=full)
    assert status != 0 and "No space left on device" in error


def run_main(monkeypatch, *arguments):
    """Run main() with these arguments; return the exit status or message."""
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        analyze.main()
    return caught.value.code


def test_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch) == 2
    assert "results.jsonl does not exist: a bench script writes it" in capsys.readouterr().err


def test_no_records(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "empty.jsonl", [])
    message = run_main(monkeypatch, path, "--figure", tmp_path / "none.png")
    assert message == "analyze.py: there is no record of a run: run a bench script first"
    assert capsys.readouterr().out == "" and not (tmp_path / "none.png").exists()


def test_a_refusal_is_an_error_and_the_rest_is_shown(tmp_path, monkeypatch, capsys):
    made = [
        record(RAY, 0, 3.5),
        record(RAY, 1, 3.5, labels=OTHER),
        record(RAY, 2, 3.5, num_cpus=1),
    ]
    path = write(tmp_path / "a", made)
    message = run_main(monkeypatch, path, "--figure", tmp_path / "a.svg")
    assert "labels differ" in message
    text = capsys.readouterr().out
    assert "**Refused:**" in text and len(cells(text, RAY)) == 1
    assert (tmp_path / "a.svg").exists()
