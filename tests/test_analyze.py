"""analyze.py against numbers worked out by hand, against odd and wrong records, and as a user runs it."""

import gzip
import json
import math
import os
import subprocess
import sys

import pytest

import analyze

pytestmark = pytest.mark.filterwarnings("ignore:Precision loss")  # SciPy's, where trials are equal: in tests only.
SERIAL, POOL, CLEARED, INITIALIZER, RAY = analyze.APPROACHES
STEADY = [3.5, 3.6, 3.4, 3.55, 3.45]
VERSIONS = {"python": "3.11.9", "tensorflow": "2.21.0", "keras": "3.15.1", "numpy": "2.4.6"}
OTHER = "c" * 64


def record(approach, k, rounds, **changes):
    """A record as the bench scripts write it; those with the same k follow each other. `rounds`: seconds, or of ten."""
    made = {
        "approach": approach,
        **{"mode": "predict", "num_cpus": 2, "nodes": 1, "cluster": False, "restarts": 0},
        "start_method": "fork" if "multiprocessing" in approach else None,
        "time": 1795608000 + 60 * k + len(approach) / 10,
        "setup_seconds": 2.5,
        "round_seconds": rounds if isinstance(rounds, list) else [rounds / 10] * 10,
        "cpu_seconds": 4.5 if approach == SERIAL else None,
        **{"accuracy": 0.97, "labels": "a" * 64, "model": "b" * 64, "data": analyze.MNIST},
        "machine": "AMD EPYC, 2 physical cores, Linux",
        "versions": VERSIONS | ({"ray": "2.60.0"} if approach == RAY else {}),
    }
    return made | changes


def series(approach, seconds, **changes):
    return [record(approach, k, value, **changes) for k, value in enumerate(seconds)]


def cells(text, first):
    """The cells of all table rows whose first cell is `first`."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] == first]


def report(records):
    """The Markdown about records."""
    return analyze.report(sorted((analyze.Trial(**one) for one in records), key=lambda trial: trial.time))[0]


def compare(records):
    """The comparison of the first approach among records of one group with the other."""
    samples = [[analyze.Trial(**one) for one in records if one["approach"] == name] for name in (SERIAL, RAY)]
    return analyze.compare(*(analyze.Sample(sorted(some, key=lambda trial: trial.time)) for some in samples))


def read(folder, lines):
    """The trials that are read from a file of these lines (texts or records)."""
    (folder / "results.jsonl").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return analyze.read([folder / "results.jsonl"])


def test_paired_speedup():
    text = report(series(SERIAL, [6, 8], setup_seconds=9.0) + series(RAY, [2, 4]))
    # Seconds: mean 7, standard deviation sqrt(2). Speedups: 3 and 2. Their logarithms, 1.098612 and 0.693147, have the
    # mean 0.895880 = ln 2.449 and the standard deviation 0.286707; times 2.449: 0.702. With t = 12.706205 (1 degree of
    # freedom) half the interval is 12.706205 x 0.286707 / sqrt(2) = 2.575964: from exp(-1.680084) to exp(3.471844).
    row = [SERIAL, "2", "7.00 ± 1.41", "2.45 ± 0.702", "0.186 to 32.2, 2 pairs", "9.00", "16.0", "64 s, 13x"]
    assert cells(text, SERIAL) == [row]
    assert cells(text, RAY) == [[RAY, "2", "3.00 ± 1.41", "", "", "2.50", "5.50", "5 s"]]
    assert cells(text, "approach")[0][2:4] == ["seconds of 10 rounds", "Ray's speedup"]
    assert "serial keeps 0.643 cores busy" in text  # 4.5 s of CPU time in each trial, 7 s in the mean.
    assert text.startswith("± is the spread of single trials")


def test_unpaired_speedup():
    ray = [record(RAY, 5 + k, seconds) for k, seconds in enumerate([math.e, math.e**3] * 2)]
    # Logarithms 0, 2 and 1, 3, 1, 3: their means differ by -1, their variances are 2 and 4/3: standard deviation
    # sqrt(2 + 4/3), standard error sqrt(2/2 + 4/3/4) = sqrt(4/3); (4/3)**2 / (1**2 / 1 + (1/3)**2 / 3) = 12/7 degrees
    # of freedom, t = 5.068500: half the interval is 5.852600.
    limits = pytest.approx((math.exp(-1 - 5.852600), math.exp(-1 + 5.852600)))
    assert compare(series(SERIAL, [1, math.e**2]) + ray) == ("0.368 ± 0.672", "0.00106 to 128, Welch", limits)


def test_taking_turns():
    turns = {"abab": "2 pairs", "abba": "2 pairs", "ababa": "2 pairs", "aabb": "Welch", "aabab": "Welch"}
    for order, method in turns.items():
        made = [record({"a": SERIAL, "b": RAY}[letter], k, 1.0 + k) for k, letter in enumerate(order)]
        assert compare(made[::-1])[1].endswith(f", {method}")


def test_a_restarted_trial_leaves_the_others_their_partners():
    # Without the third pair the speedups are 2, 3, 2, 3, whatever serial's third trial took. Logarithms 0.693147 and
    # 1.098612: mean 0.895880, standard deviation 0.405465 / sqrt(3) = 0.234095; t = 3.182446 (3 degrees of freedom):
    # half the interval is 3.182446 x 0.234095 / 2 = 0.372497: from exp(0.523383) to exp(1.268377).
    ray = series(RAY, [1, 1, 99, 1, 1])
    ray[2]["restarts"] = 1
    text = report(series(SERIAL, [2, 3, 50, 2, 3]) + ray)
    assert cells(text, SERIAL)[0][1:5] == ["5", "12.0 ± 21.2", "2.45 ± 0.573", "1.69 to 3.56, 4 pairs"]
    assert cells(text, RAY)[0][1:3] == ["4", "1.00"]
    assert "- left out: ray, restarts: 1, [9.9, " in text


def test_reloading_and_the_pools_ratio_without_ray():
    text = report(series(POOL, [5.0, 7.0, 9.0]) + series(INITIALIZER, [1.0, 2.0, 6.0]))
    # Medians of the rounds: 0.7 and 0.2 s. Ratios 5, 3.5, 1.5: geometric mean 26.25 ** (1/3).
    assert "r = 0.500 s: 1 + r/t times as long if it computes t s; here t = 0.200" in text
    assert f"multiprocessing takes {26.25 ** (1 / 3):.2f} ± " in text
    assert "Ray's trials are missing: run bench_ray.py" in text and "Ray minus" not in text


BREAK_EVEN = [(9.4, 3, "after 35 rounds"), (9.4, 6, "never, as measured"), (2.5, 6, "at once"), (1, 3, "at once")]


@pytest.mark.parametrize("setup, ray, repaid", BREAK_EVEN)
def test_break_even(setup, ray, repaid):
    # The pool: 2.5 s of set-up, 5 s for ten rounds. 9.4 - 2.5 = 6.9; 6.9 / (0.5 - 0.3) = 34.5.
    for name in (POOL, INITIALIZER):
        text = report(series(name, [5.0] * 2) + series(RAY, [ray] * 2, setup_seconds=setup))
        (line,) = [line for line in text.splitlines() if f"Ray minus {name}:" in line]
        assert line.endswith(f": repaid {repaid}")


def test_long_runs():
    # Tens of 55, 155, 255, 355 and 455 s: 1275 s; Ray takes 50 rounds of 0.5 s, 25 s: 51. 455 / 55 = 8.27.
    growing = [float(k) for k in range(1, 51)]
    text = report(series(POOL, [growing] * 2) + series(RAY, [[0.5] * 50, [0.5] * 50]))
    assert cells(text, POOL)[0][2:5] == ["1275", "51.0", "needs 2 trials of each, under 20 rounds"]
    assert "multiprocessing: seconds of each ten rounds: 55.0, 155, 255, 355, 455; last / first: 8.27" in text
    assert "**warning:** multiprocessing: 8.27 is over 1.2: is the machine busy, or" in text
    assert "ray: seconds of each ten rounds: 5.00, 5.00, 5.00, 5.00, 5.00; last / first: 1.00" in text
    assert "**warning:** ray: 1.00" not in text
    assert "seconds of 50 rounds" in text and "of each ten" not in report(series(RAY, [growing[:19]]))


def test_warnings():
    text = report(series(SERIAL, [3, 4, 5, 4]) + series(RAY, STEADY))
    # Mean 4, standard deviation sqrt(2/3) = 0.816: 20.4 %.
    assert [line for line in text.splitlines() if "**warning:**" in line] == [
        "- **warning:** serial: trials: 4, fewer than 5: run more",
        "- **warning:** serial: ± is 20.4% of the mean, over 10 %: stop other work, measure again",
    ]


def test_data_is_named():
    assert "- data: MNIST; model: bbbbbbbbbbbb" in report(series(RAY, STEADY))
    assert "- data: STAND-IN, not MNIST; model" in report(series(RAY, STEADY, data=analyze.STAND_IN))
    assert "- data: other data, cccccccccccc; model" in report(series(RAY, STEADY, data=OTHER))


UNLIKE = [{"versions": VERSIONS | {name: "0"}} for name in VERSIONS]
UNLIKE += [{"nodes": 2, "cluster": True}, {"cluster": True}, {"num_cpus": 1}, {"round_seconds": [0.7] * 5}]
UNLIKE += [{"model": OTHER}, {"data": OTHER}, {"mode": "predict_on_batch"}, {"machine": "Intel, 2 cores, Linux"}]


@pytest.mark.parametrize("change", UNLIKE, ids=str)
def test_unlike_trials_are_not_compared(change):
    text = report(series(SERIAL, STEADY) + series(RAY, STEADY, **change))
    assert text.count("\n## ") == 2
    assert cells(text, SERIAL)[0][3:5] == ["", ""]


def test_start_methods_and_rays_are_never_averaged():
    pools = series(POOL, [4, 4]) + series(POOL, [8, 8], start_method="spawn")
    rays = series(RAY, [2, 2]) + series(RAY, [1, 1], versions=VERSIONS | {"ray": "2.61.0"})
    text = report(series(SERIAL, [6, 6]) + pools + rays)
    assert text.count("\n## ") == 4
    found = [row[2:4] for row in cells(text, POOL)]
    assert found == [["4.00", "2.00"], ["4.00", "4.00"], ["8.00", "4.00"], ["8.00", "8.00"]]
    assert [row[3] for row in cells(text, SERIAL)] == ["3.00", "6.00"] * 2
    assert "start method of pools: spawn; Ray: 2.61.0" in text


def test_labels_that_differ_are_refused(tmp_path):
    made = series(SERIAL, STEADY) + series(RAY, STEADY, labels="f" * 64) + series(POOL, STEADY, num_cpus=1)
    text, refused, compared = analyze.report(read(tmp_path, made))
    assert "labels differ: ray ffffffffffff, serial aaaaaaaaaaaa: remove" in refused[0] and "cores: 2" in refused[0]
    assert cells(text, RAY) == cells(text, SERIAL) == [] and "**refused:** labels differ" in text
    assert [list(here) for here in compared.values()] == [[POOL]] and len(cells(text, POOL)) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_and_line_ends(tmp_path, encoding):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(one, ensure_ascii=False) for one in series(RAY, STEADY, machine="é\u2028")]
    path.write_bytes("\r\n\r\n\ufeff".join(lines).encode(encoding))
    assert [trial.machine for trial in analyze.read([path, path])] == ["é\u2028"] * 5


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"{}"))
    for wrong, reason in ((path, "utf-8.*name a text file"), (tmp_path, "Is a directory"), (tmp_path / "b", "No such")):
        with pytest.raises(SystemExit, match=f"cannot read {wrong}: .*{reason}"):
            analyze.read([wrong])


@pytest.mark.parametrize("place", [0, 2, 5])
def test_torn_lines_are_skipped(tmp_path, place, capsys):
    lines = series(RAY, STEADY)
    lines.insert(place, json.dumps(record(RAY, 8, 3.5))[:300])
    assert len(read(tmp_path, lines)) == 5
    assert f"results.jsonl, line {place + 1}: " in (error := capsys.readouterr().err) and "skipped" in error


WRONG = [
    ("approach", "dask", "Input should be 'serial'"),
    ("num_cpus", True, "valid integer"),
    ("setup_seconds", math.inf, "finite number"),
    ("round_seconds", [], "at least 1 item"),
    ("round_seconds", [1.0, -1.0], "greater than 0"),
    ("labels", "A" * 64, "pattern"),
    ("versions", {"python": 3.11}, "valid string"),
]


@pytest.mark.parametrize("field, value, reason", WRONG)
def test_wrong_fields_are_named(tmp_path, field, value, reason):
    with pytest.raises(SystemExit, match=f"results.jsonl, line 2: {field}.*{reason}.*; correct or remove the line"):
        read(tmp_path, [record(RAY, 0, 3.5), record(RAY, 1, 3.5) | {field: value}])
    early = record(RAY, 0, 3.5)
    del early[field]
    with pytest.raises(SystemExit, match=f"results.jsonl, line 1: {field}: Field required"):
        read(tmp_path, [early])


def test_figure_has_a_row_for_each_group(tmp_path):
    made = series(SERIAL, [7.0, 7.2]) + series(RAY, [3.5, 3.6]) + series(RAY, [0.5, 5.0], mode="predict_on_batch")
    figure = analyze.draw(analyze.report(read(tmp_path, [*made, *series(POOL, [50.0], mode="predict_on_batch")]))[2])
    left, right, second, log = figure.axes
    assert [list(line.get_xdata()) for line in left.lines[::2]] == [pytest.approx([3.5, 3.6]), pytest.approx([7, 7.2])]
    assert [line.get_xdata()[0] for line in left.lines[1::2]] == pytest.approx([3.55, 7.1])
    assert [list(line.get_ydata()) for line in right.lines][1] == pytest.approx([0.7] * 10 + [0.72] * 10)
    assert [line.get_color() for line in right.lines] == [analyze.COLOURS[name] for name in (RAY, SERIAL)]
    assert [left.get_xscale(), right.get_yscale()] == ["linear", "linear"]
    assert [second.get_xscale(), log.get_yscale()] == ["log", "log"]
    assert "predict, cores: 2" in left.get_title("left") and "predict_on_batch" in second.get_title("left")


def start(folder, records, *arguments, **options):
    """Run a program in a folder with a results.jsonl of these records; return its exit status, stdout and stderr."""
    (folder / "results.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    done = subprocess.run([sys.executable, *arguments], text=True, timeout=60, cwd=folder, **options)
    return done.returncode, done.stdout, done.stderr


def test_program_in_odd_surroundings(tmp_path):
    link = tmp_path / "linked.py"
    link.symlink_to(analyze.__file__)
    odd = os.environ | {"MPLBACKEND": "missing", "PYTHONOPTIMIZE": "2", "PYTHONIOENCODING": "ascii"}
    status, text, error = start(tmp_path, series(RAY, STEADY, machine="$x_$ | é"), link, "--figure", "new.png", env=odd)
    assert (status, error) == (0, "") and cells(text, RAY)[0][2] == "3.50 ? 0.0791"
    assert (tmp_path / "new.png").read_bytes().startswith(b"\x89PNG")


def test_errors_of_the_program(tmp_path):
    status, _, error = start(tmp_path, series(RAY, STEADY), "-I", analyze.__file__, "--figure", "new.xyz")
    assert status == 1 and "'xyz' is not supported" in error and error.count("\n") == 1
    with open("/dev/full", "w") as full:
        status, _, error = start(tmp_path, series(RAY, STEADY), analyze.__file__, stdout=full)
    assert (status, error.count("\n")) == (1, 1) and "stdout or the figure: [Errno 28] No space left" in error
    unlike = [record(RAY, 0, 3.5), record(RAY, 1, 3.5, labels=OTHER), record(RAY, 2, 3.5, num_cpus=1)]
    status, text, error = start(tmp_path, unlike, analyze.__file__)
    assert status == 1 and "labels differ" in text and "labels differ" in error
    status, text, error = start(tmp_path, [record(RAY, 0, 3.5, restarts=1)], analyze.__file__, "--figure", "none.png")
    assert (status, error) == (1, "analyze.py: no trial to show: run a bench script first\n") and "left out" in text
    assert start(tmp_path, [], analyze.__file__, "--next")[0] == 2 and not (tmp_path / "none.png").exists()
