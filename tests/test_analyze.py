"""analyze.py against numbers worked out by hand, against hostile files, and as a user runs it."""

import contextlib
import gc
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st

import analyze

APPROACHES = ["serial", "multiprocessing", "multiprocessing+initializer", "ray"]
SERIAL, POOL, INITIALIZER, RAY = APPROACHES
START = datetime(2026, 11, 23, 12, tzinfo=UTC)


def analysis(*arguments):
    """Run analyze.py as the command line does, but in this process, which has scipy: exit status, stdout, stderr."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["analyze.py", *map(str, arguments)])
        try:
            analyze.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            err.write(f"{end.code}\n" * isinstance(end.code, str))
        finally:
            gc.enable()
    return subprocess.CompletedProcess(sys.argv, status, out.getvalue(), err.getvalue())


def record(approach=RAY, k=0, seconds=3.5, **changes):
    """A record as the scripts write it. Trials with the same k follow each other: approaches take turns."""
    made = {
        "approach": approach,
        "num_cpus": 2,
        "trial": k,
        "run": f"run of {approach}",
        "time": (START + timedelta(minutes=k, seconds=APPROACHES.index(approach))).isoformat(),
        "seconds": seconds,
        "round_seconds": [seconds / 10] * 10,
        "setup_seconds": 1.0,
        "cpu_seconds": 2 * seconds,
        "memory_bytes": 400_000_000,
        "restarts": 0,
        "predict": "predict",
        "images": 10000,
        "accuracy": 0.97,
        "predictions": "a" * 64,
        "model": "b" * 64,
        "data": "mnist",
        "cores": [0, 1],
        "pinned": True,
        "nodes": 1,
        "start_method": None,
        "host": {
            "name": "bench",
            "cpu": "AMD EPYC",
            "physical_cores": 2,
            "logical_cpus": 4,
            "memory_bytes": 8 << 30,
            "platform": "Linux-6.1",
            "load": 0.5,
        },
        "versions": {"python": "3.11.9", "tensorflow": "2.21.0", "keras": "3.15.1", "numpy": "2.4.6", "ray": "2.60.0"},
    }
    for name, value in changes.items():
        if "__" in name:  # host__load=3.0
            outer, inner = name.split("__")
            made[outer][inner] = value
        else:
            made[name] = value
    return made


def write(path, records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def trials(*records):
    """The Trials of records, through a real file."""
    with tempfile.TemporaryDirectory() as folder:
        return analyze.read([write(Path(folder, "results.jsonl"), records)])[0]


def series(approach, *seconds, **changes):
    return [record(approach, k, value, **changes) for k, value in enumerate(seconds)]


def here(**seconds):
    """{approach: Trials} from serial=[..], multiprocessing=[..], initializer=[..], ray=[..]."""
    names = {"serial": SERIAL, "multiprocessing": POOL, "initializer": INITIALIZER, "ray": RAY}
    return analyze.by_approach(trials(*(each for name in seconds for each in series(names[name], *seconds[name]))))


def cells(markdown, first):
    """The cells of the only table row whose first cell is `first`."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if row[0] == first]
    return row


def ready(tmp_path, *records, name="results.jsonl"):
    return write(tmp_path / name, records)


# Statistics, by hand


def test_paired_ratio():
    found = analyze.compare(*(here(serial=[6, 8], ray=[2, 4])[name] for name in (SERIAL, RAY)))
    assert found.ratios == [3, 2]
    assert found.kind == "paired"
    # ln 3 = 1.098612, ln 2 = 0.693147: mean 0.895880, standard error 0.202733; t for 1 degree of freedom 12.706205
    assert found.ratio == pytest.approx((math.exp(0.895880 - 2.575964), math.exp(0.895880 + 2.575964)), rel=1e-5)
    # differences 4 and 4: no width
    assert found.difference == (4, 4)


def test_paired_difference():
    found = analyze.compare(*(here(multiprocessing=[5, 7, 9], initializer=[1, 2, 3])[n] for n in (POOL, INITIALIZER)))
    # differences 4, 5, 6: mean 5, standard error 1 / sqrt(3); t for 2 degrees of freedom 4.302653
    assert found.difference == pytest.approx((5 - 2.484138, 5 + 2.484138), rel=1e-6)


def test_unpaired_ratio():
    e = math.e
    serial = series(SERIAL, 1, e**2)
    ray = [record(RAY, 5 + k, seconds) for k, seconds in enumerate([e, e**3])]
    groups = analyze.by_approach(trials(*serial, *ray))
    found = analyze.compare(groups[SERIAL], groups[RAY])
    assert found.kind == "unpaired"
    # logs 0, 2 and 1, 3: difference -1, variances 2 and 2, standard error sqrt(2/2 + 2/2), 2 degrees of freedom
    assert found.ratio == pytest.approx((math.exp(-1 - 6.084870), math.exp(-1 + 6.084870)), rel=1e-5)
    assert found.ratios == pytest.approx([1 / e, 1 / e])


def test_numbers_of_trials_that_differ():
    groups = here(serial=[6, 8, 10], ray=[2, 4])
    found = analyze.compare(groups[SERIAL], groups[RAY])
    assert found.ratios == [3, 2]
    assert found.kind == "unpaired"
    row = cells(analyze.comparison(groups, 10), SERIAL)
    assert row[3] == "2.5 ± 0.707"
    assert row[4].endswith(" unpaired, not distinguishable")


@pytest.mark.parametrize("order, paired", [("abab", True), ("abba", True), ("aabb", False), ("abaabb", False)])
def test_taking_turns(order, paired):
    made = [
        record(SERIAL if sign == "a" else RAY, k, 1 + k, time=(START + timedelta(hours=k)).isoformat())
        for k, sign in enumerate(order)
    ]
    groups = analyze.by_approach(trials(*made))
    assert analyze.compare(groups[SERIAL], groups[RAY]).kind == ("paired" if paired else "unpaired")


def test_time_order_beats_file_order():
    made = series(SERIAL, 6, 8)[::-1] + series(RAY, 2, 4)
    groups = analyze.by_approach(trials(*made))
    assert analyze.compare(groups[SERIAL], groups[RAY]).ratios == [3, 2]


def test_times_of_different_spelling_are_ordered():
    late = record(SERIAL, 1, 8, time="2026-11-23T12:00:00.5Z")
    early = record(SERIAL, 0, 6, time="2026-11-23T14:00:00+02:00")
    assert [trial.seconds for trial in trials(late, early)] == [6, 8]


def test_table_by_hand():
    groups = here(serial=[6, 8], ray=[2, 4])
    row = cells(analyze.comparison(groups, 10), SERIAL)
    # mean 7, sd sqrt(2) = 1.41; ratios 3 and 2: 2.5, 0.707; interval from test_paired_ratio
    assert row[:5] == [SERIAL, "2", "7 ± 1.41", "2.5 ± 0.707", "0.186 to 32.2 paired, not distinguishable"]
    # busy: 2 CPU seconds a second; serial is one worker of 400 MB, Ray's two have 200 MB each; set-up 1 s
    assert row[6:] == ["2", "400", "1"]
    assert cells(analyze.comparison(groups, 10), RAY) == [RAY, "2", "3 ± 1.41", "", "", "5 s", "2", "200", "1"]


def test_one_trial_says_so():
    markdown = analyze.comparison(here(serial=[6], ray=[2]), 10)
    assert cells(markdown, SERIAL)[2:5] == ["6 (1 trial)", "3 (1 trial)", "needs more trials"]
    assert "nan" not in markdown


def test_unknown_cpu_and_memory():
    made = trials(record(cpu_seconds=None, memory_bytes=None), record(k=1, cpu_seconds=None, memory_bytes=None))
    assert cells(analyze.comparison(analyze.by_approach(made), 10), RAY)[6:8] == ["not known", "not known"]


def test_where_the_time_goes():
    groups = here(multiprocessing=[5, 7, 9], initializer=[1, 2, 3], ray=[2, 3, 4])
    markdown = analyze.where(groups, 10)
    # per round, ten a trial: 0.1, 0.2, 0.3: 0.2 +- 4.302653 * 0.1 / sqrt(3)
    assert cells(markdown, "compute: initializer")[1:] == ["0.2 ± 0.1", "-0.0484 to 0.448"]
    assert cells(markdown, "reload: multiprocessing - initializer")[1:] == ["0.5", "0.252 to 0.748 paired"]
    assert cells(markdown, "transport: Ray - initializer")[1:] == ["0.1", "0.1 to 0.1 paired"]


def test_break_even():
    # Ray's rounds save 0.4 s (4 s in 10), exactly; its set-up takes 2.2 s longer: 5.5 rounds
    slow, fast = series(SERIAL, 6, 8, setup_seconds=1.0), series(RAY, 2, 4, setup_seconds=3.2)
    markdown = analyze.comparison(analyze.by_approach(trials(*slow, *fast)), 10)
    assert "against serial after 6 to 6 rounds" in markdown
    for other, ray, says in (
        ({"setup_seconds": 4.0}, [2, 4], "after 0 to 0 rounds"),
        ({}, [20, 22.1], "never"),
        ({}, [6.1, 7.8], "one cannot tell when"),
        ({}, [2], "one cannot tell when"),
    ):
        made = series(SERIAL, 6, 8, **other) + series(RAY, *ray, setup_seconds=3.2)
        assert f"against serial {says}" in analyze.comparison(analyze.by_approach(trials(*made)), 10)


def test_excess_spread():
    # distances from the median: 4, 0, 6 and 1, 0, 1, of which 1.41 times: 1.41, 0, 1.41
    family = {2: here(multiprocessing=[1, 5, 11], initializer=[3, 4, 5])}
    a, b = [4, 0, 6], [1.41, 0, 1.41]
    u, v = statistics.variance(a) / 3, statistics.variance(b) / 3
    from scipy.stats import t

    half = t.ppf(0.975, (u + v) ** 2 / (u**2 / 2 + v**2 / 2)) * math.sqrt(u + v)
    middle = statistics.mean(a) - statistics.mean(b)
    (row,) = [row for row in analyze.claims(family) if row[0].startswith("reloading")]
    assert row[2] == f"{middle - half:.3g} to {middle + half:.3g}"


def test_saved_share():
    groups = here(multiprocessing=[10, 10, 10], initializer=[4, 4, 4], ray=[2, 2, 2])
    pool, initializer, ray = (groups[name] for name in (POOL, INITIALIZER, RAY))
    assert analyze.saved_share(pool, initializer, ray) == pytest.approx((0.75, 0.75))  # 6 of 8 s
    assert analyze.saved_share(ray, initializer, pool) == (0.0, 0.0)  # "Ray" slower: saves nothing
    assert analyze.saved_share(pool, initializer, pool) == (-math.inf, math.inf)
    assert analyze.saved_share(pool, [], ray) is None


def test_saved_share_is_a_95_percent_interval():
    groups = here(multiprocessing=[10, 11, 10], initializer=[4, 4.5, 4.1], ray=[2, 2.1, 2])
    from scipy.stats import t

    ends = []
    for differences in ([8, 8.9, 8], [2, 2.4, 2.1]):  # pool - ray, initializer - ray: paired, each at 97.5 %
        half = t.ppf(1 - 0.025 / 2, 2) * statistics.stdev(differences) / math.sqrt(3)
        ends.append((statistics.mean(differences) - half, statistics.mean(differences) + half))
    corners = [1 - left / saved for left in ends[1] for saved in ends[0]]
    found = analyze.saved_share(*(groups[name] for name in (POOL, INITIALIZER, RAY)))
    assert found == pytest.approx((min(corners), max(corners)))


POSITIVE = st.floats(0.01, 1000)
PAIRS = st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=8)


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.floats(0.01, 100))
def test_scaling_leaves_speedups(pairs, scale):
    plain = here(serial=[a for a, _ in pairs], ray=[b for _, b in pairs])
    scaled = here(serial=[a * scale for a, _ in pairs], ray=[b * scale for _, b in pairs])
    one, two = (analyze.compare(groups[SERIAL], groups[RAY]) for groups in (plain, scaled))
    assert two.ratios == pytest.approx(one.ratios, rel=1e-9)
    assert two.ratio == pytest.approx(one.ratio, rel=1e-6)
    assert two.difference == pytest.approx([limit * scale for limit in one.difference], rel=1e-6, abs=1e-6 * scale)


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_swapping_gives_reciprocals(pairs):
    groups = here(serial=[a for a, _ in pairs], ray=[b for _, b in pairs])
    one, two = analyze.compare(groups[SERIAL], groups[RAY]), analyze.compare(groups[RAY], groups[SERIAL])
    assert two.ratio == pytest.approx((1 / one.ratio[1], 1 / one.ratio[0]), rel=1e-6)
    assert one.ratio[0] <= math.exp(statistics.mean(map(math.log, one.ratios))) * (1 + 1e-9)
    assert math.exp(statistics.mean(map(math.log, one.ratios))) <= one.ratio[1] * (1 + 1e-9)


# Claims: figures that flip each verdict


def judged(claim, family):
    """The verdict on the claim that begins so; family: {num_cpus: here}."""
    (found,) = [row[-1] for row in analyze.claims(family) if row[0].startswith(claim)]
    return found


STEADY = [3.5, 3.6, 3.4, 3.55, 3.45]
TWICE, HALF = [2 * value for value in STEADY], [value / 2 for value in STEADY]
HOLDS, NOT, MORE = "holds", "does not hold here", "cannot tell: needs more trials or a quieter machine"
TOO_FEW = "cannot tell: needs 3 trials of each approach, or more cores"


@pytest.mark.parametrize(
    "claim, groups, verdict",
    [
        ("Ray beats multiprocessing", {"multiprocessing": TWICE, "ray": STEADY}, HOLDS),
        ("Ray beats multiprocessing", {"multiprocessing": HALF, "ray": STEADY}, NOT),
        ("Ray beats multiprocessing", {"multiprocessing": STEADY, "ray": STEADY[::-1]}, MORE),
        ("Ray beats multiprocessing", {"multiprocessing": [9], "ray": [1]}, TOO_FEW),
        ("Ray beats multiprocessing", {"ray": STEADY}, TOO_FEW),
        ("Ray beats serial", {"serial": TWICE, "ray": STEADY}, HOLDS),
        ("Ray beats serial", {"serial": HALF, "ray": STEADY}, NOT),
        ("Ray beats serial", {"serial": STEADY, "ray": STEADY[::-1]}, MORE),
        ("multiprocessing does not beat", {"serial": STEADY, "multiprocessing": TWICE}, HOLDS),
        ("multiprocessing does not beat", {"serial": TWICE, "multiprocessing": STEADY}, NOT),
        ("multiprocessing does not beat", {"serial": STEADY, "multiprocessing": STEADY[::-1]}, MORE),
        ("reloading", {"multiprocessing": [1, 9, 2, 8, 3, 7], "initializer": [5, 5.1, 5.2, 5.3, 5.4]}, HOLDS),
        ("reloading", {"initializer": [1, 9, 2, 8, 3, 7], "multiprocessing": [5, 5.1, 5.2, 5.3, 5.4]}, NOT),
        ("reloading", {"initializer": STEADY, "multiprocessing": STEADY}, MORE),
        # one disturbed trial is no evidence; the F test would be sure (variance ratio over 100, p < 0.001)
        ("reloading", {"multiprocessing": [3.5, 3.6, 3.4, 3.55, 6], "initializer": STEADY}, MORE),
        ("reloading", {"multiprocessing": [1, 9], "initializer": [5, 6]}, TOO_FEW),
        ("loading is", {"multiprocessing": TWICE, "initializer": STEADY, "ray": STEADY}, HOLDS),
        ("loading is", {"multiprocessing": [9, 9.1, 9.2], "initializer": [7, 7.1, 7], "ray": [3, 3.1, 3]}, NOT),
        ("loading is", {"multiprocessing": STEADY, "initializer": STEADY, "ray": STEADY[::-1]}, MORE),
        ("loading is", {"multiprocessing": HALF, "initializer": HALF, "ray": STEADY}, NOT),
        ("loading is", {"multiprocessing": TWICE, "ray": STEADY}, TOO_FEW),
    ],
)
def test_verdicts(claim, groups, verdict):
    assert judged(claim, {2: here(**groups)}) == verdict


@pytest.mark.parametrize(
    "busy, cores, verdict",
    [
        ([1.5, 1.6, 1.4], 2, HOLDS),
        ([0.8, 0.82, 0.81], 2, NOT),
        ([0.9, 1.2, 1.0], 2, MORE),
        ([None, None], 2, TOO_FEW),
        ([1.5, 1.6, 1.4], 1, TOO_FEW),
    ],
)
def test_verdict_on_busy_cores(busy, cores, verdict):
    made = [record(SERIAL, k, 2.0, cpu_seconds=each and 2 * each) for k, each in enumerate(busy)]
    assert judged("serial keeps", {cores: analyze.by_approach(trials(*made))}) == verdict


@pytest.mark.parametrize("many, verdict", [(TWICE, HOLDS), (HALF, NOT), (STEADY[::-1], MORE)])
def test_verdict_on_growth(many, verdict):
    family = {1: here(serial=STEADY), 4: here(serial=many)}
    assert judged("the workload grows", family) == verdict
    assert judged("the workload grows", {1: here(serial=STEADY)}) == TOO_FEW


def test_claims_are_judged_on_most_cores():
    family = {1: here(serial=HALF, ray=STEADY), 2: here(serial=TWICE, ray=STEADY)}
    assert judged("Ray beats serial", family) == HOLDS
    assert judged("Ray beats serial", {1: family[2], 2: family[1]}) == NOT


# Warnings


@pytest.mark.parametrize(
    "seconds, says",
    [
        ([3.5] * 4, "fewer than 5 trials (run more): ray 4"),
        ([3, 4, 5, 4, 3, 5], "standard deviation over 10 % of the mean (stop other work): ray 22%"),
        ([4.6, 3.5, 3.5, 3.5, 3.5, 3.5], "first trial over 1.25 times the median of the later (run again): ray 1.31"),
    ],
)
def test_warnings(seconds, says):
    assert says in analyze.doubts(here(ray=seconds))


def test_no_warning_without_reason():
    assert analyze.doubts(here(ray=[3.5, 3.6, 3.4, 3.5, 3.5])) == []


def test_warnings_of_a_kind_share_a_line():
    assert analyze.doubts(here(serial=[2, 2], ray=[1])) == ["fewer than 5 trials (run more): serial 2, ray 1"]


@pytest.mark.parametrize(
    "loads, warned", [([5.25, 1, 0.1], "5.2"), ([4.0, 9, 9], None), ([None, 9, 9], None), ([5.0, 1, 1], "5.0")]
)
def test_warning_of_load_before_the_first_trial(loads, warned):
    made = [record(RAY, k, 3.5, host__load=load) for k, load in enumerate([*loads, 9, 9])]
    later = [record(SERIAL, k, 3.5, host__load=9, num_cpus=1) for k in range(1, 6)]
    found = re.findall(r"Warning:\*\* load average over the CPUs .*: (.*)", analyze.report(trials(*later, *made))[0])
    assert found == ([warned] if warned else [])


# Grouping


def full(**changes):
    """Five interleaved trials of all approaches."""
    return [
        record(approach, k, seconds + 0.01 * k, **changes)
        for k in range(5)
        for approach, seconds in zip(APPROACHES, (6.4, 6.6, 3.5, 3.6), strict=True)
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"host__name": "other"},
        {"host__cpu": "Intel"},
        {"host__memory_bytes": 1 << 30},
        {"versions__ray": "2.61.0"},
        {"predict": "predict_on_batch"},
        {"model": "c" * 64},
        {"data": "other"},
        {"images": 5000},
        {"round_seconds": [0.7] * 5},
        {"nodes": 3},
        {"num_cpus": 4},
    ],
)
def test_unlike_trials_are_not_mixed(change):
    """Ray's trials of another setting are no opponent of the others."""
    made = series(SERIAL, 6, 8) + series(RAY, 2, 4, **change)
    found = trials(*made)
    assert len([here for family in analyze.families(found) for here in family.values()]) == 2
    markdown, refusals, _ = analyze.report(found)
    assert not refusals
    assert cells(markdown, SERIAL)[3:5] == ["", ""]


@pytest.mark.parametrize(
    "change", [{"host__load": 3.9}, {"start_method": "fork"}, {"cores": [2, 3]}, {"pinned": False}]
)
def test_like_trials_are_compared(change):
    markdown = analyze.report(trials(*series(SERIAL, 6, 8), *series(RAY, 2, 4, **change)))[0]
    assert cells(markdown, SERIAL)[3] == "2.5 ± 0.707"


def test_core_counts_are_in_order():
    made = full(num_cpus=16) + full(num_cpus=2, run="two") + full(num_cpus=4, run="four")
    (family,) = analyze.families(trials(*made))
    assert list(family) == [2, 4, 16]


def test_restarted_trial_is_shown_and_left_out(tmp_path):
    made = [*full(), record(RAY, 9, 55.5, restarts=2)]
    done = analysis(ready(tmp_path, *made))
    assert done.returncode == 0, done.stderr
    assert "Left out: ray, 55.5 s, 2 workers replaced" in done.stdout
    assert cells(done.stdout, RAY)[1:3] == ["5", "3.62 ± 0.0158"]


def test_only_restarted_trials(tmp_path):
    done = analysis(ready(tmp_path, record(restarts=1)))
    assert (done.returncode, done.stderr) == (0, "")
    assert "workers replaced" in done.stdout


def test_differing_predictions_are_refused_and_the_rest_shown(tmp_path):
    wrong = [*full(), record(RAY, 7, 3.5, predictions="d" * 64)]
    done = analysis(ready(tmp_path, *wrong, *full(predict="predict_on_batch", run="second")))
    assert done.returncode == 1
    assert f"ray {'d' * 64}" in done.stderr and f"serial {'a' * 64}" in done.stderr
    assert "**Refused.**" in done.stdout
    assert cells(done.stdout, SERIAL)[1] == "5"  # one table: the other mode's


def test_cluster_is_shown_alone(tmp_path):
    made = [*full(), *series(RAY, 2, 2.1, nodes=3, num_cpus=6, run="cluster", cpu_seconds=None, memory_bytes=None)]
    done = analysis(ready(tmp_path, *made))
    assert done.returncode == 0, done.stderr
    cluster = done.stdout[done.stdout.index("on 3 nodes: no opponent") :]
    assert cells(cluster, RAY)[2:5] == ["2.05 ± 0.0707", "", ""]
    assert "Claims" not in cluster


@pytest.mark.parametrize("alone", APPROACHES)
def test_one_approach_only(tmp_path, alone):
    done = analysis(ready(tmp_path, *series(alone, 3, 4, 5)))
    assert (done.returncode, done.stderr) == (0, "")
    assert cells(done.stdout, alone)[1:5] == ["3", "4 ± 1", "", ""]
    assert "nan" not in done.stdout


def test_whole_page(tmp_path):
    done = analysis(ready(tmp_path, *full(data="stand-in", host__name="a|b\n<x>")))
    assert (done.returncode, done.stderr) == (0, "")
    assert "**STAND-IN DATA" in done.stdout
    assert "a\\|b?\\<x>, AMD EPYC, 2 physical cores, 4 CPUs, 8.0 GiB, Linux-6.1" in done.stdout
    assert "python 3.11.9, tensorflow 2.21.0, keras 3.15.1, numpy 2.4.6, ray 2.60.0" in done.stdout
    assert "2026-11-23 12:00 to 2026-11-23 12:04 UTC, 20 trials" in done.stdout
    assert len(re.findall(r"cannot tell|holds|does not hold here", done.stdout.split("### Claims")[1])) == 7
    for line in done.stdout.splitlines():  # every row of a table has the cells of its title
        assert line.count("|") - line.count("\\|") in (0, 4, 5, 10), line


def test_real_data_is_not_called_stand_in(tmp_path):
    assert "STAND-IN" not in analysis(ready(tmp_path, *full())).stdout


def test_published_figures_stand_beside_the_readers_own(tmp_path):
    printed = analysis(ready(tmp_path, *full())).stdout
    assert "Ray 5 s, multiprocessing 126 s (25x), serial 64 s (13x)" in printed
    assert cells(printed, "approach")[5] == "published, 48 cores"
    assert [cells(printed, name)[5] for name in APPROACHES] == ["64 s, 13x", "126 s, 25x", "", "5 s"]


@pytest.mark.parametrize("change", [{"predict": "predict_on_batch"}, {"round_seconds": [0.7] * 5}])
def test_published_figures_stand_beside_nothing_else(change):
    """What the article did not do has no published figure."""
    markdown = analyze.report(trials(*full(**change)))[0]
    assert "published" not in markdown
    assert cells(markdown, "approach")[4:6] == ["95 % interval", "cores busy"]


# Bad files


def refused(path, *says):
    done = analysis(path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr
    for word in says:
        assert word in done.stderr


@pytest.mark.parametrize("field", [*record(), *(f"host.{name}" for name in record()["host"])])
def test_missing_field(field, tmp_path):
    made = record()
    outer, _, inner = field.partition(".")
    del (made[outer] if inner else made)[inner or outer]
    with pytest.raises(SystemExit, match=rf"results.jsonl, line 2: {field}: "):
        analyze.read([ready(tmp_path, record(), made)])


WRONG = {
    "approach": ["Ray", 1, None, []],
    "num_cpus": [0, -1, 2.0, "2", True, None, 2**64],
    "trial": [-1, 0.0, True, "0"],
    "run": [1, None, []],
    "time": ["yesterday", "2026-11-23T12:00:00", 5, None],
    "seconds": [0, -1, "3", True, None, [], math.nan, math.inf, -math.inf, 1e300, 10**400],
    "round_seconds": [[], [0], [math.nan], [1, "1"], 3, None],
    "setup_seconds": [-1, math.nan, "1", None, False],
    "cpu_seconds": [-1, math.inf, "1", True],
    "memory_bytes": [-1, math.nan, "1", True],
    "restarts": [-1, 0.5, None, False],
    "predict": ["fast", None, 1],
    "images": [0, 1.5, None, True],
    "accuracy": [-0.1, 1.1, math.nan, "1", None],
    "predictions": ["a" * 63, "A" * 64, "a" * 64 + "\n", None, 1],
    "model": ["", None, "g" * 64],
    "data": ["MNIST", None, 1],
    "cores": [None, [1.5], ["0"], [-1], [True], 2],
    "pinned": [1, "true", None],
    "nodes": [0, 1.0, None, True],
    "start_method": ["thread", 1, False],
    "host": [None, [], "bench"],
    "host__load": [-1, math.nan, "1"],
    "host__physical_cores": [0, "2", None],
    "versions": [None, [], {}],
    "versions__ray": [None, 2],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_value(name, value, tmp_path):
    with pytest.raises(SystemExit, match=rf"results.jsonl, line 2: {name.replace('__', '.')}"):
        outer, _, inner = name.partition("__")
        made = record()
        made[outer] = {**made[outer], inner: value} if inner else value
        analyze.read([ready(tmp_path, record(), made)])


def test_wrong_value_as_a_user_sees_it(tmp_path):
    refused(ready(tmp_path, record(), record(k=1, seconds=-1)), "line 2: seconds: ", "greater than")


def test_unknown_fields_are_fine(tmp_path):
    path = ready(tmp_path, record(note={"any": [1]}, host__colour="red"))
    assert analyze.read([path])[0] == trials(record())


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\xff\xfe" * 1000,
        b"\x89PNG\r\n\x1a\n",
        b"hello\n",
        b"[1, 2]\n",
        b"null\n",
        b"7\n",
        b'"text"\n',
        b"[" * 100_000,
        b"9" * 100_000,
        b'{"approach": "ray\xff"}\n',
        b"\xef\xbb\xbf{}\n",
        b"{}\n",
        json.dumps(record()).encode()[:-1] + b', "deep": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\n",
        json.dumps(record()).encode() * 2,
    ],
    ids=range(14),
)
def test_not_records(content, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    refused(path, "line 1")


def test_no_trials(tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    refused(tmp_path / "results.jsonl", "no finished trial", "run a bench script first")


def test_no_file(tmp_path):
    refused(tmp_path / "none.jsonl", "No such file")


def test_folder(tmp_path):
    refused(tmp_path, "Is a directory")


@pytest.mark.parametrize("after", [[], [record(k=1)]], ids=["last", "others appended"])
def test_torn_line_is_told_and_skipped(tmp_path, after):
    whole = json.dumps(record())
    torn = json.dumps(record(k=8))
    for cut in range(1, len(torn)):
        path = tmp_path / "results.jsonl"
        path.write_text(whole + "\n" + torn[:cut] + "".join("\n" + json.dumps(each) + "\n" for each in after))
        found, notes = analyze.read([path])
        assert [trial.trial for trial in found] == [0] + [1] * len(after), cut
        assert notes == [f"{path}, line 2: skipped, its end is missing (writing it was cut off)"]
    done = analysis(path)
    assert done.returncode == 0
    assert "line 2: skipped" in done.stderr


def test_last_line_without_newline_is_whole(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(record()) + "\n" + json.dumps(record(k=1)))
    found, notes = analyze.read([path])
    assert (len(found), notes) == (2, [])


@pytest.mark.parametrize("blank", ["\n", "\n\n", " \t\n", "\r\n"], ids=repr)
def test_blank_lines_are_skipped(blank, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(blank + blank.join(json.dumps(record(k=k)) + "\n" for k in range(2)) + blank, newline="")
    found, notes = analyze.read([path])
    assert ([trial.trial for trial in found], notes) == ([0, 1], [])
    path.write_text(blank)
    refused(path, "no finished trial")


def test_blank_lines_count_as_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("\n" + json.dumps(record(seconds=-1)) + "\n")
    refused(path, "line 2: seconds: ")


def test_broken_middle_is_not_torn(tmp_path):
    line = json.dumps(record())
    path = tmp_path / "results.jsonl"
    path.write_text(line.replace('"seconds": 3.5', '"seconds": 3,5') + "\n" + line + "\n")
    refused(path, "line 1")


def test_duplicates_count_once(tmp_path):
    path = ready(tmp_path, *full())
    once, twice = analysis(path), analysis(path, path)
    assert once.stdout == twice.stdout
    assert (twice.returncode, twice.stderr) == (0, "")


def test_duplicate_with_other_figures(tmp_path):
    refused(ready(tmp_path, record(seconds=3.5), record(seconds=3.6)), "line 2: other figures")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=2)
)


def check_any(content):
    """Read bytes as results: trials or SystemExit, and a report of what was read; anything else fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.jsonl")
        path.write_bytes(content)
        try:
            found = analyze.read([path])[0]
        except SystemExit as end:
            assert str(path) in str(end.code)
            return None
    markdown = analyze.report(found)[0]
    assert "nan" not in markdown
    markdown.encode()
    return found


@settings(max_examples=300, deadline=None)
@given(st.binary() | st.text().map(str.encode) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(content):
    assert not check_any(content)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(record())), VALUES)
def test_any_value(field, value):
    """What is read is what was written, or nothing is read."""
    made = {**record(), field: value}
    found = check_any(json.dumps(made).encode())
    if found and field not in ("time", "host", "versions"):
        got = getattr(found[0], field)
        assert got == value and isinstance(got, bool) == isinstance(value, bool)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-8, 1e9), min_size=1, max_size=6), st.lists(st.floats(1e-8, 1e9), max_size=6))
def test_any_seconds(ray, other):
    made = series(RAY, *ray) + series(POOL, *other) + series(INITIALIZER, *ray) + series(SERIAL, *other)
    found = check_any("".join(json.dumps(each) + "\n" for each in made).encode())
    assert len(found) == 2 * len(ray) + 2 * len(other)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5 * len(json.dumps(record())) + 4))
def test_any_cut(cut):
    """A file cut anywhere holds the trials whose records are whole, as they were."""
    lines = [json.dumps(record(k=k, seconds=1.5 + k)) for k in range(5)]
    content = "\n".join(lines)[:cut]
    found = check_any(content.encode())
    assert [trial.seconds for trial in found] == [
        1.5 + k for k in range(sum(part in lines for part in content.split("\n")))
    ]


def test_many_records(tmp_path):
    path = tmp_path / "results.jsonl"
    with path.open("w") as file:
        for k in range(25_000):
            for approach in APPROACHES:
                file.write(json.dumps(record(approach, k, 3 + k % 100 / 100)) + "\n")
    # Linux counts into a program's peak that of the process that started it, here pytest with TensorFlow and Ray: a
    # small process stands between.
    small = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    small += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    command = [sys.executable, "-c", small, sys.executable, ROOT / "analyze.py", path]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert "100000 trials" in done.stdout
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout.split()[-1]) * unit < 350e6


# Output that cannot be written, and arguments


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk(tmp_path):
    with open("/dev/full", "w") as full_disk:
        command = [sys.executable, ROOT / "analyze.py", ready(tmp_path, *full())]
        done = subprocess.run(command, stdout=full_disk, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "analyze.py: output: No space left on device\n")


def test_reader_that_leaves(tmp_path):
    command = f"{shlex.quote(sys.executable)} {ROOT}/analyze.py {ready(tmp_path, *full())} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--figure", "results.gif"],
        ["--figure", ""],
        ["--next", "0", "--cores", "1", "--model", "m", "--data", "d"],
        ["--next", "x", "--cores", "1", "--model", "m", "--data", "d"],
        ["--next", "5"],
        ["--next", "5", "--cores", "0", "--model", "m", "--data", "d"],
        ["--next", "5", "--cores", "", "--model", "m", "--data", "d"],
        ["--next", "5", "--cores", "1", "--model", "m", "--data", "d", "a.jsonl", "b.jsonl"],
        ["--next", "5", "--cores", "1", "--model", "m", "--data", "d", "--figure", "f.png"],
        ["--next", "5", "--cores", "1", "--model", "m", "--data", "d", "--rounds", "0"],
        ["--cores", "1"],
        ["--unknown"],
    ],
)
def test_wrong_arguments(arguments, tmp_path):
    done = run("analyze.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# Figure

MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", MAGIC)
def test_figure_file(tmp_path, suffix):
    path = ready(tmp_path, *full(host__cpu="$x^{$ AMD"), *full(num_cpus=4, run="four", host__cpu="$x^{$ AMD"))
    figure = tmp_path / f"results{suffix}"
    figure.write_text("old")
    done = analysis(path, "--figure", figure)
    assert (done.returncode, done.stderr) == (0, "")
    assert figure.read_bytes().startswith(MAGIC[suffix])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["results.jsonl", figure.name]
    assert figure.stat().st_mode == path.stat().st_mode  # as any file the user makes, not a private one


def panels(*records):
    (family,) = analyze.report(trials(*records))[2]
    figure = analyze.draw(family)
    return figure, figure.axes


def test_figure_heights():
    figure, [axes] = panels(*series(SERIAL, 6, 8), *series(RAY, 2, 4))
    assert [bar.get_height() for bar in axes.patches][:2] == [7, 3]
    assert axes.get_ylim()[0] == 0
    segments = [container.lines[2][0].get_segments()[0] for container in axes.containers if hasattr(container, "lines")]
    assert [[y for _, y in segment] for segment in segments] == [
        pytest.approx([7 - math.sqrt(2), 7 + math.sqrt(2)]),
        pytest.approx([3 - math.sqrt(2), 3 + math.sqrt(2)]),
    ]
    dots = [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "."]
    assert dots == [[6, 8], [2, 4]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2"]
    assert [label.get_text() for label in axes.get_legend().get_texts()] == APPROACHES
    assert "data: mnist" in figure.get_suptitle() and "seconds" in axes.get_ylabel()
    assert figure.get_supxlabel() == "bench, AMD EPYC; 4 trials (dots).\nBars: mean, sample standard deviation."


def test_figure_of_a_sweep():
    made = series(SERIAL, 6, 8) + series(RAY, 2, 4)
    made += series(SERIAL, 3, 9, num_cpus=1, run="one") + series(RAY, 2, 4, num_cpus=1, run="one")
    _, [left, right] = panels(*made)
    assert [bar.get_height() for bar in left.patches][:4] == [6, 3, 7, 3]
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "2"]
    means = [line.get_ydata()[0] for line in right.lines if line.get_marker() == "o"]
    assert means == [pytest.approx((3 / 2 + 9 / 4) / 2), 2.5]
    intervals = [list(line.get_ydata()) for line in right.lines if line.get_marker() == "None"]
    assert pytest.approx((0.186359, 32.1962), rel=1e-4) in intervals  # test_paired_ratio's
    assert [1, 1] in intervals
    assert right.get_ylim()[0] == 0


def test_figure_shows_the_setting_with_most_trials(tmp_path):
    path = ready(tmp_path, *full(), *full(predict="predict_on_batch", run="b"), record(k=6, predict="predict_on_batch"))
    done = analysis(path, "--figure", tmp_path / "f.svg")
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "f.svg").read_text()
    assert "<!-- predict_on_batch, 10 rounds" in drawn and "<!-- predict, " not in drawn


def test_figure_without_trials(tmp_path):
    done = analysis(ready(tmp_path, record(restarts=1)), "--figure", tmp_path / "f.png")
    assert "workers replaced" in done.stdout
    assert not (tmp_path / "f.png").exists()


def test_figure_that_cannot_be_written(tmp_path):
    path = ready(tmp_path, *full())
    (tmp_path / "f.png").mkdir()
    for figure in (tmp_path / "none" / "f.png", tmp_path / "f.png"):
        done = analysis(path, "--figure", figure)
        assert done.returncode == 1
        assert str(figure.parent) in done.stderr and "Traceback" not in done.stderr


# --next


@pytest.fixture
def plan(tmp_path):
    """A function that asks for the next command, with results, model and data in a folder whose name has a space."""
    folder = tmp_path / "my results"
    folder.mkdir()
    model = folder / "model.keras"
    model.write_bytes(b"weights")
    results = folder / "results.jsonl"

    def ask(wanted=2, cores="1,2", *options):
        arguments = ["--next", wanted, "--cores", cores, "--model", model, "--data", folder / "mnist.npz"]
        done = analysis(*arguments, *options, results)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr.strip()

    ask.results, ask.model = results, model
    return ask


def measured(approach, k, cores, weights, seconds=9.0, **changes):
    """A record that --next counts, unless changes say otherwise."""
    ours = {
        "num_cpus": cores,
        "model": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "time": (START + timedelta(minutes=k)).isoformat(),
        "host__name": platform.node(),
    }
    return record(approach, k, seconds, **ours | changes)


def append(path, *records):
    with path.open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in records)


def test_next_takes_turns_until_all_are_done(plan):
    seen = []
    for k in range(16):
        command, progress = plan()
        script, *options = shlex.split(command)
        assert progress.startswith(f"trial {k + 1} of 16: ")
        approach = script.removeprefix("bench_").removesuffix(".py") + "+initializer" * ("--initializer" in options)
        assert (ROOT / script).name == analyze.SCRIPTS[approach][0]
        cores = int(options[options.index("--num-cpus") + 1])
        seen.append((cores, approach))
        append(plan.results, measured(approach, k, cores, plan.model))
    assert seen == [(cores, approach) for cores in (1, 2) for approach in APPROACHES] * 2
    assert plan() == ("", "all 16 trials are done")
    assert plan(3)[1].startswith("trial 17 of 24: serial on 1 cores")


def test_next_command_whole(plan):
    command, progress = plan(5, "2", "--predict-on-batch", "--rounds", 3)
    folder = plan.model.parent
    assert shlex.split(command) == [
        "bench_serial.py", "--trials", "1", "--num-cpus", "2", "--rounds", "3", "--model", str(plan.model),
        "--data", f"{folder}/mnist.npz", "--output", f"{folder}/results.jsonl", "--predict-on-batch",
    ]  # fmt: skip
    assert progress == "trial 1 of 20: serial on 2 cores"


def test_next_estimates(plan):
    append(plan.results, measured(SERIAL, 0, 2, plan.model, seconds=9.0))  # and 1 s of set-up: 10 s a trial
    assert plan(1, "2")[1] == "trial 2 of 4: multiprocessing on 2 cores"  # half a minute is not worth a word
    assert plan(10, "2")[1] == "trial 2 of 40: multiprocessing on 2 cores, about 6 min left"


@pytest.mark.parametrize(
    "change",
    [
        {"restarts": 1},
        {"nodes": 2},
        {"predict": "predict_on_batch"},
        {"round_seconds": [1.0] * 3},
        {"host__name": "elsewhere"},
        {"model": "c" * 64},
        {"num_cpus": 8},
    ],
)
def test_next_does_not_count(plan, change):
    append(plan.results, measured(SERIAL, 0, 2, plan.model, **change))
    assert plan(1, "2")[0].startswith("bench_serial.py")


def test_next_starts_again_with_other_versions_or_data(plan):
    old = [measured(approach, k, 2, plan.model) for k, approach in enumerate(APPROACHES)]
    append(plan.results, *old)
    assert plan(1, "2")[0] == ""
    for k, change in enumerate(({"versions": {**record()["versions"], "ray": "3.0"}}, {"data": "other"})):
        append(plan.results, {**measured(SERIAL, 50 + k, 2, plan.model), **change})
        assert plan(1, "2")[0].startswith("bench_multiprocessing.py --trials"), change


def test_next_goes_on_after_a_power_cut(plan):
    append(plan.results, measured(SERIAL, 0, 2, plan.model))
    with plan.results.open("a") as file:
        file.write('{"approach": "ray", "num_')
    assert plan(1, "2")[0].startswith("bench_multiprocessing.py --trials")
    with plan.results.open("a") as file:
        file.write("\n" + json.dumps(measured(POOL, 1, 2, plan.model)) + "\n")
    assert plan(1, "2")[0].startswith("bench_multiprocessing.py --initializer")


def test_next_without_a_model(tmp_path):
    done = run("analyze.py", "--next", 5, "--cores", 1, "--model", tmp_path / "none.keras", "--data", "d", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "none.keras" in done.stderr and "Traceback" not in done.stderr


def test_next_is_light(plan):
    """It runs between all trials."""
    code = "import runpy, sys; sys.argv[0] = 'analyze.py'; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    code += "\nassert not {'numpy', 'scipy', 'matplotlib'} & set(sys.modules), 'heavy'"
    command = [sys.executable, "-c", code, str(ROOT / "analyze.py"), "--next", "1", "--cores", "1"]
    command += ["--model", str(plan.model), "--data", "d", str(plan.results)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
