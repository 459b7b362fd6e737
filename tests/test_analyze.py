"""analyze.py against numbers worked out by hand, against odd and wrong records, and as a user runs it."""

import gc
import json
import math
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from scipy.stats import t

import analyze

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # As analyze.py does.
SERIAL, POOL, CLEARED, INITIALIZER, RAY = analyze.APPROACHES
STEADY = [3.5, 3.6, 3.4, 3.55, 3.45]
OTHER = STEADY[::-1]
TWICE = [2 * seconds for seconds in STEADY]


def record(approach, k, seconds, **changes):
    """A record as the bench scripts write it; those with the same k follow each other. host__cpu is cpu in host."""
    made = {
        "approach": approach,
        "num_cpus": 2,
        "nodes": 1,
        "ray": "private" if approach == RAY else None,
        "run": f"{approach} {k} {changes}",
        "trial": 0,
        "time": (datetime(2026, 11, 25, 12, k, tzinfo=UTC) + timedelta(seconds=len(approach))).isoformat(),
        "seconds": seconds,
        "round_seconds": [seconds / 10] * 10,
        "setup_seconds": 2.5,
        "cpu_seconds": 1.5 * seconds if approach == SERIAL else None,
        "restarts": 0,
        "mode": "predict",
        "accuracy": 0.97,
        "labels": "a" * 64,
        "model": "b" * 64,
        "data": "mnist",
        "host": {"cpu": "AMD EPYC", "physical_cores": 2, "system": "Linux x86_64"},
        "versions": {"python": "3.11.9", "tensorflow": "2.21.0", "keras": "3.15.1", "numpy": "2.4.6", "ray": "2.60.0"},
    }
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        if inner:
            made[outer][inner] = value
        else:
            made[name] = value
    return made


def series(approach, seconds, **changes):
    return [record(approach, k, value, **changes) for k, value in enumerate(seconds)]


def trials(records):
    return [analyze.pydantic.TypeAdapter(analyze.Trial).validate_json(json.dumps(one)) for one in records]


def rows_of(text, first):
    """The cells of all table rows whose first cell is `first`."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] == first]


@pytest.fixture
def analysis(tmp_path, monkeypatch, capsys):
    """Call main() on lines (text, or records) of a results file; return the exit status, stdout and stderr."""

    def analysis(lines, *arguments):
        path = tmp_path / "results.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{text}\n" for text in texts))
        monkeypatch.setattr(sys, "argv", ["analyze.py", str(path), *map(str, arguments)])
        status = 0
        error = ""
        try:
            analyze.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            error = "" if isinstance(end.code, int) else end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err + error

    yield analysis
    gc.enable()


def test_paired_speedup(analysis):
    # What need not be equal: set-up, accuracy. What is not known is ignored.
    serial = series(SERIAL, [6, 8], setup_seconds=9.0, accuracy=0.98, more="ignored")
    status, out, err = analysis(serial + series(RAY, [2, 4]))
    assert (status, err) == (0, "")
    # Seconds: mean 7, standard deviation sqrt(2). Speedups: 3 and 2. Their logarithms, 1.098612 and 0.693147, have the
    # mean 0.895880 = ln 2.449 and the standard deviation 0.286707; times 2.449: 0.702. With t = 12.706205 (1 degree of
    # freedom) half the interval is 12.706205 x 0.286707 / sqrt(2) = 2.575964: from exp(-1.680084) to exp(3.471844).
    row = [SERIAL, "2", "7.00 ± 1.41", "0.700", "", "2.45 ± 0.702", "0.186 to 32.2 paired", "64 s, 13x"]
    assert rows_of(out, SERIAL) == [[*row, "1.50 ± 0.00", "9.00"]]
    assert rows_of(out, RAY) == [[RAY, "2", "3.00 ± 1.41", "0.300", "", "", "", "5 s", "", "2.50"]]


def test_unpaired_speedup(analysis):
    ray = [record(RAY, 5 + k, seconds) for k, seconds in enumerate([math.e, math.e**3])]
    _, out, _ = analysis(series(SERIAL, [1, math.e**2]) + ray)
    # Logarithms 0, 2 and 1, 3: their means differ by -1, their variances are 2 and 2: standard deviation sqrt(2 + 2),
    # standard error sqrt(2/2 + 2/2), 2 degrees of freedom, t = 4.302653: -1 - 6.084870 and -1 + 6.084870.
    assert rows_of(out, SERIAL)[0][5:7] == ["0.368 ± 0.736", "0.000838 to 162 Welch"]


def test_unequal_numbers_of_trials():
    a, b = [6.0, 8.0, 10.0], [2.0, 4.0, 3.0, 2.5, 2.2]
    samples = [analyze.Sample(trials(series(name, values))) for name, values in ((SERIAL, a), (RAY, b))]
    found = analyze.compare(*samples)
    logs, others = [[math.log(value) for value in values] for values in (a, b)]
    u, v = statistics.variance(logs) / 3, statistics.variance(others) / 5
    half = t.ppf(0.975, (u + v) ** 2 / (u**2 / 2 + v**2 / 4)) * math.sqrt(u + v)
    middle = statistics.mean(logs) - statistics.mean(others)
    assert found.limits == pytest.approx((math.exp(middle - half), math.exp(middle + half)))
    assert found.value.startswith(f"{math.exp(middle):.3g} ±")
    assert found.interval.endswith("Welch")


@pytest.mark.parametrize("order, kind", [("abab", "paired"), ("abba", "paired"), ("aabb", "Welch"), ("aab", "each")])
def test_taking_turns(analysis, order, kind):
    made = [record({"a": SERIAL, "b": RAY}[letter], k, 1 + k) for k, letter in enumerate(order)]
    assert rows_of(analysis(made[::-1])[1], SERIAL)[0][6].endswith(kind)


def test_order_of_passes_that_is_turned(analysis):
    names = [SERIAL, POOL, INITIALIZER, RAY]
    _, out, _ = analysis(
        record(names[(turn + k) % 4], 4 * turn + k, 1 + turn, mode="predict_on_batch")
        for turn in range(5)
        for k in range(4)
    )
    # The article's figures are of the other mode.
    assert [rows_of(out, name)[0][6:8] for name in names[:3]] == [["1.00 to 1.00 paired", ""]] * 3


def test_beyond_compute(analysis):
    values = {SERIAL: [9, 9, 9], POOL: [5, 7, 9], CLEARED: [4, 4, 4], INITIALIZER: [1, 2, 3], RAY: [2, 3, 9]}
    _, out, _ = analysis(one for name, seconds in values.items() for one in series(name, seconds))
    found = [" ".join(rows_of(out, name)[0][3:5]) for name in values]
    assert found == ["0.900 ", "0.700 0.500", "0.400 0.200", "0.200 0.00", "0.300 0.100"]


def growing(approach=POOL):
    """Five trials of one process, whose rounds take 1, 2, ... 50 s."""
    rounds = [[float(10 * k + j) for j in range(1, 11)] for k in range(5)]
    return [record(approach, k, sum(some), round_seconds=some, run="one", trial=k) for k, some in enumerate(rounds)]


def test_growth(analysis):
    status, out, _ = analysis(growing() + series(RAY, [5.0] * 5) + series(SERIAL, [10.0] * 5))
    assert status == 0
    # Trials of 55, 155, 255, 355, 455 s over 5 s.
    speedup = ["51.0 (11.0, 31.0, 51.0, 71.0, 91.0)", "none: rounds get slower"]
    assert rows_of(out, POOL)[0][5:7] == speedup
    assert rows_of(out, "Ray beats multiprocessing")[0][2:] == [*speedup, "holds"]
    assert rows_of(out, "multiprocessing does not beat serial")[0][2].startswith("25.5 (5.50, ")
    # Rounds 35 to 50 over rounds 1 to 16.
    logs = [math.log((34 + k) / k) for k in range(1, 17)]
    middle, half = statistics.mean(logs), t.ppf(0.975, 15) * statistics.stdev(logs) / 4
    interval = f"{math.exp(middle - half):.2f} to {math.exp(middle + half):.2f}"
    (row,) = rows_of(out, "rounds of multiprocessing do not get slower")
    assert row[3:] == [interval, "does not hold here"]
    assert f"multiprocessing: rounds get slower: last third / first third {row[2]} ({interval}), over 1.2" in out
    assert row[2].startswith(f"{math.exp(middle):.2f} ±")
    assert "multiprocessing: standard deviation" not in out


def test_growth_of_ray_leaves_no_interval(analysis):
    _, out, _ = analysis(growing(RAY) + series(SERIAL, [100.0] * 5))
    assert rows_of(out, SERIAL)[0][5:7] == ["0.392 (1.82, 0.645, 0.392, 0.282, 0.220)", "none: rounds get slower"]
    assert rows_of(out, "Ray beats serial")[0][4].startswith("cannot tell")


def test_a_run_is_a_process(analysis):
    made = [dict(one, run=f"process {k}", round_seconds=[one["seconds"] / 10] * 10) for k, one in enumerate(growing())]
    assert "get slower:" not in analysis(made)[1].partition("##")[2]


def test_one_disturbed_run_is_no_growth(analysis):
    disturbed = record(POOL, 5, 7.48, round_seconds=[0.34] * 7 + [1.7] * 3)  # Geometric mean of 18: 1.31.
    _, out, _ = analysis([*series(POOL, STEADY), disturbed])
    assert "**Warning:** multiprocessing: rounds" not in out
    assert rows_of(out, "rounds of multiprocessing do not get slower")[0][4].startswith("cannot tell")


# Verdicts and warnings

HOLDS, NOT, MORE = "holds", "does not hold here", "cannot tell: needs more trials or a quieter machine"


@pytest.mark.parametrize("slow, fast, verdict", [(TWICE, STEADY, HOLDS), (STEADY, TWICE, NOT), (STEADY, OTHER, MORE)])
def test_verdicts_on_speed(analysis, slow, fast, verdict):
    for claim, slower, faster in (
        ("Ray beats multiprocessing", POOL, RAY),
        ("Ray beats serial", SERIAL, RAY),
        ("multiprocessing does not beat serial", POOL, SERIAL),
    ):
        _, out, _ = analysis(series(slower, slow) + series(faster, fast))
        assert rows_of(out, claim)[0][4] == verdict


@pytest.mark.parametrize("busy, verdict", [([1.5, 1.6, 1.4], HOLDS), ([1, 1.02, 1.01], NOT), ([0.9, 1.2, 1.2], MORE)])
def test_verdict_on_cores(analysis, busy, verdict):
    made = [record(SERIAL, k, 2.0, cpu_seconds=2 * cores) for k, cores in enumerate(busy)]
    (row,) = rows_of(analysis(made)[1], "serial keeps more than one core busy")
    assert row[4] == verdict
    assert row[2].startswith(f"{statistics.geometric_mean(busy):#.3g} ± ")


@pytest.mark.parametrize("late, verdict", [([1, 1, 1], HOLDS), ([1.5, 1.5, 1.6], NOT), ([1, 1.2, 1.4], MORE)])
def test_verdict_on_growth(analysis, late, verdict):
    made = series(POOL, [10] * 3, round_seconds=[1, 1, 1, 1, 1, 1, 1, *late])
    assert rows_of(analysis(made)[1], "rounds of multiprocessing do not get slower")[0][4] == verdict


def test_single_trials_have_no_interval(analysis):
    _, out, _ = analysis(series(SERIAL, [6]) + series(RAY, [2]))
    assert rows_of(out, SERIAL)[0][2:7] == ["6.00", "0.600", "", "3.00", "needs 2 trials of each"]
    assert rows_of(out, "Ray beats serial")[0][4] == MORE
    assert rows_of(out, "Ray beats multiprocessing")[0][2:] == ["", "needs 2 trials of each", MORE]
    assert "nan" not in out


def test_warnings(analysis):
    _, out, _ = analysis(series(SERIAL, [3, 4, 5, 4]) + series(RAY, STEADY, data="stand-in"))
    found = [line for line in out.splitlines() if "**Warning:**" in line]
    # Mean 4, standard deviation sqrt(2/3) = 0.816: 20.4 %.
    assert found == [
        "- **Warning:** serial: 4 trials, fewer than 5: run more",
        "- **Warning:** serial: standard deviation 20.4% of the mean, over 10 %: stop other work, run again",
    ]
    assert "STAND-IN DATA, not MNIST" in out


# What is compared


@pytest.mark.parametrize(
    "change",
    [
        {"host__cpu": "Intel"},
        {"host__physical_cores": 4},
        {"host__system": "Darwin arm64"},
        {"versions__keras": "3.15.2"},
        {"num_cpus": 1},
        {"nodes": 2},
        {"round_seconds": [0.7] * 5},
        {"model": "c" * 64},
        {"data": "other-0123abcd"},
        {"mode": "predict_on_batch"},
        {"ray": "cluster"},
    ],
    ids=str,
)
def test_unlike_trials_are_not_compared(analysis, change):
    status, out, err = analysis(series(SERIAL, TWICE) + series(RAY, STEADY, **change))
    assert (status, err) == (0, "")
    assert out.count("\n## ") == 2
    assert rows_of(out, SERIAL)[0][5:7] == ["", "needs 2 trials of each"]


def test_cluster_and_private_trials_share_no_row(analysis):
    _, out, _ = analysis(series(RAY, STEADY) + series(RAY, TWICE, ray="cluster"))
    assert [row[1:3] for row in rows_of(out, RAY)] == [["5", "3.50 ± 0.0791"], ["5", "7.00 ± 0.158"]]
    assert "Ray: private\n" in out and "Ray: cluster\n" in out


def test_machines_without_ray(analysis):
    serial = series(SERIAL, TWICE)
    for one in serial:
        del one["versions"]["ray"]
    _, out, _ = analysis(serial + series(POOL, STEADY, versions__ray=None))
    assert "numpy 2.4.6\n" in out
    assert rows_of(out, "multiprocessing does not beat serial")[0][4] == NOT


def test_labels_that_differ_are_refused(analysis):
    made = series(SERIAL, TWICE) + series(RAY, STEADY, labels="f" * 64) + series(POOL, STEADY, num_cpus=1)
    status, out, err = analysis(made)
    assert status == 1
    assert "not compared, as labels differ: ray ffffffffffff, serial aaaaaaaaaaaa" in err
    assert rows_of(out, RAY) == rows_of(out, SERIAL) == []
    assert len(rows_of(out, POOL)) == 1


def test_restarts_are_shown_and_kept_out(analysis):
    _, out, _ = analysis(series(RAY, STEADY) + [record(RAY, 5, 99.0, restarts=1)])
    assert rows_of(out, RAY)[0][1:3] == ["5", "3.50 ± 0.0791"]
    assert "- Left out: ray, 99.0 s, restarts: 1\n" in out


@pytest.mark.parametrize("place", [0, 2, 5])
@pytest.mark.parametrize("behind", ["", json.dumps(record(RAY, 9, 3.5))], ids=["torn", "record behind it"])
def test_torn_lines_are_skipped(analysis, place, behind):
    lines = series(RAY, STEADY)
    lines.insert(place, json.dumps(record(RAY, 8, 3.5))[:300] + behind)
    status, out, err = analysis([*lines, ""])
    assert status == 0
    assert f"results.jsonl, line {place + 1}: skipped" in err
    assert rows_of(out, RAY)[0][1] == "5"


@pytest.mark.parametrize(
    "field, value, reason",
    [
        ("approach", "dask", "Input should be 'serial'"),
        ("num_cpus", True, "valid integer"),
        ("seconds", "3.5", "valid number"),
        ("seconds", math.nan, "finite number"),
        ("setup_seconds", math.inf, "finite number"),
        ("time", "2026-11-25T12:00:00", "timezone"),
        ("labels", "A" * 64, "pattern"),
        ("versions", {"python": "3.11.9"}, "Field required"),
    ],
)
def test_wrong_fields_are_named(analysis, field, value, reason):
    status, _, err = analysis([record(RAY, 0, 3.5), record(RAY, 1, 3.5) | {field: value}])
    assert status == 1
    assert "results.jsonl, line 2: " + field in err and reason in err and "\n" not in err


def test_foreign_lines_are_refused(analysis):
    for text in ("[]", "no record", "\0{}"):
        status, _, err = analysis([text])
        assert status == 1 and "line 1: record: " in err


def test_duplicates(analysis):
    lines = series(RAY, STEADY)
    assert rows_of(analysis(lines + lines)[1], RAY)[0][1] == "5"
    status, _, err = analysis([*lines, dict(lines[0], seconds=3.0)])
    assert status == 1 and "line 6: trial: an earlier line has other values" in err


def test_odd_text(analysis, tmp_path):
    cpu = "a|b *c* <i> $\\x$ `d`\n# [e](f) é"  # \x is no formula.
    status, out, _ = analysis(series(RAY, STEADY, host__cpu=cpu), "--figure", tmp_path / "odd.svg")
    assert status == 0
    assert "- Machine: a\\|b \\*c\\* \\<i> \\$\\\\x\\$ \\`d\\` # \\[e](f) é, 2 physical cores" in out
    assert (tmp_path / "odd.svg").exists()


def test_nothing_to_show(analysis, tmp_path):
    for lines in ([], series(RAY, STEADY, restarts=1)):
        status, _, err = analysis(lines, "--figure", tmp_path / "new.png")
        assert status == 1 and "no trial to show" in err
    assert not (tmp_path / "new.png").exists()


def test_three_significant_digits():
    values = [0.012345, 1.005, 99.94, 99.96, 1234.5, -0.5]
    assert [analyze.show(value) for value in values] == ["0.0123", "1.00", "99.9", "100", "1234", "-0.500"]


def test_figure_shows_every_trial_and_every_round():
    made = series(SERIAL, TWICE) + series(RAY, STEADY) + series(RAY, [3, 4], num_cpus=1)
    figure = analyze.draw(trials(made))
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines] == [[3, 4], TWICE, STEADY]
    assert [bar.get_height() for bar in left.patches] == pytest.approx([3.5, 7, 3.5])
    assert [list(line.get_ydata()) for line in right.lines] == [
        list(np.repeat(some, 10) / 10) for some in (TWICE, STEADY)
    ]
    assert [line.get_label() for line in right.lines] == [SERIAL, RAY]
    assert left.get_yscale() == right.get_yscale() == "linear"
    assert "AMD EPYC" in figure.get_supxlabel()


def test_figure_is_logarithmic_from_ten_times_on():
    figure = analyze.draw(trials(series(POOL, [35.0], data="stand-in") + series(RAY, [3.5], data="stand-in")))
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log"]
    assert "STAND-IN DATA" in figure.get_supxlabel()


def test_figure_is_of_the_most_trials(analysis, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(analyze, "draw", lambda trials: shown.extend(trials) or analyze.matplotlib.figure.Figure())
    analysis(series(RAY, STEADY[:3]) + series(RAY, STEADY, mode="predict_on_batch"), "--figure", tmp_path / "new.png")
    assert {trial.mode for trial in shown} == {"predict_on_batch"}


def test_figure_that_cannot_be_written(analysis, tmp_path):
    (tmp_path / "old.xyz").write_text("old")
    for path in (tmp_path / "old.xyz", tmp_path / "missing" / "new.png"):
        status, out, err = analysis(series(RAY, STEADY), "--figure", path)
        assert status == 1 and f"cannot write {path}" in err
        assert rows_of(out, RAY)
    assert (tmp_path / "old.xyz").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.xyz", "results.jsonl"]


def test_command_line(tmp_path):
    def start(*arguments, **options):
        command = [sys.executable, analyze.__file__, *arguments]
        return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=50, cwd=tmp_path, **options)

    done = start()
    assert (done.returncode, done.stderr) == (1, "analyze.py: results.jsonl: No such file or directory\n")
    (tmp_path / "results.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in series(RAY, STEADY)))
    environment = dict(os.environ, MPLBACKEND="missing", PYTHONOPTIMIZE="2", PYTHONSAFEPATH="1")
    done = start("--figure", "new.png", env=environment, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert rows_of(done.stdout, RAY)
    assert (tmp_path / "new.png").read_bytes().startswith(b"\x89PNG")
    with open("/dev/full", "w") as full:
        done = start(stdout=full, env=dict(os.environ, PYTHONUNBUFFERED=""))
    assert (done.returncode, done.stderr) == (1, "analyze.py: stdout: No space left on device\n")


def test_wrong_argument(analysis):
    assert analysis([], "--next")[0] == 2
