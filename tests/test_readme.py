"""The README shows what the code is, does and has measured: snippets, tables, files, the example."""

import json
import os
import re
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT, run

import analyze

README = (ROOT / "README.md").read_text()
SCRIPTS = ["train_model.py", "bench_serial.py", "bench_multiprocessing.py", "bench_ray.py"]


def snippet(script):
    """The snippet of a script as one pastes it: its regions, one after the other."""
    regions = re.findall(r"^# snippet: start\n(.*?)^# snippet: end$", (ROOT / script).read_text(), re.M | re.S)
    return "".join(regions)


def block(mark):
    """The code block of the README whose first line is the mark."""
    return re.search(rf"^```python\n({re.escape(mark)}\n.*?)^```$", README, re.M | re.S)[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_snippets_are_shown_byte_for_byte(script):
    assert snippet(script)
    assert f"```python\n{snippet(script)}```\n" in README


def test_versions_of_the_snippets_are_those_of_the_requirements():
    line = re.search(r"^Run with (.*)\.$", README, re.M)[1]
    pins = dict(pin.split("==") for pin in (ROOT / "requirements.txt").read_text().lower().split())
    pins["ray"] = pins.pop("ray[default]")
    shown = dict(re.findall(r"(\w+) (\d[\d.]*\d)", line.lower()))
    assert {"ray", "tensorflow", "keras", "numpy", "psutil"} <= set(shown)
    assert shown.pop("python") == "3.11"
    assert all(pins[name] == version for name, version in shown.items())


def test_results_follow_from_the_records():
    done = run("analyze.py", *sorted((ROOT / "results").glob("*.jsonl")))
    assert done.returncode == 0, done.stderr
    shown = re.search(r"<!-- results: start -->\n(.*?)<!-- results: end -->", README, re.S)[1]
    # In the README the headings stand two levels lower.
    assert shown.strip() == re.sub(r"^#", "###", done.stdout, flags=re.M).strip()


def test_files_and_tests_that_the_readme_names_exist():
    for name in re.findall(r"`((?:tests/|results/|\.ci/)?[\w./]+\.(?:py|yaml|txt|toml))`", README):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    for name in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / name).exists(), name
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert named
    for name in named:
        assert f"def {name}(" in tests, name


def test_flags_that_the_readme_names_exist():
    helps = "".join(run(script, "--help").stdout for script in [*SCRIPTS, "analyze.py"])
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    foreign = {"--generate", "--working-dir", "--stop", "--no-config-cache", "--quiet"}  # of Ray's command line and pip
    assert shown - foreign <= set(re.findall(r"--[a-z][a-z-]+", helps))


PROGRAM = """
import numpy, sys
{example}
if __name__ == "__main__":
    images = numpy.zeros((32, 28, 28))
    print(*(name for name, _ in evaluate_both(sys.argv[1:], images)))
"""


@pytest.mark.parametrize("example", ["actors", "pool"])
def test_what_an_initializer_cannot_do(example, trained, tmp_path):
    other = tmp_path / "other.keras"
    other.write_bytes(trained[0].read_bytes())
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(example=block(f"# example: {example}")))
    filenames = [str(trained[0]), str(other)]
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_AUTH_TOKEN": "of this test alone"}
    command = [sys.executable, program, *filenames]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()[-1].split()
    meant = [filenames[0]] * 10 + [filenames[1]] * 10
    assert sorted(set(answers)) == sorted(filenames)
    assert (answers == meant) == (example == "actors")


def test_claims_about_speed_follow_from_the_records():
    """Each row of analyze.py's claims stands in the README's table, with the command that checks it."""
    family = analyze.report(analyze.read([ROOT / "results" / "results.jsonl"])[0])[2][0]
    assert max(family) == 2 and family[2]["ray"][0].predict == "predict"
    rows = analyze.claims(family)
    assert len(rows) == 7
    for claim, figure, limits, verdict in rows:
        command = "make sweep" if "grows" in claim else "make"
        assert f"| {claim} | {figure}: {limits} | `{command}` | {verdict} |\n" in README


def on_paper():
    """The README's predictions, from the medians of the records of results/ on two cores.

    Transport is from predict_on_batch mode: it is the same in both, and small beside the waits of predict mode.
    """
    records = [json.loads(line) for line in (ROOT / "results" / "results.jsonl").read_text().splitlines()]

    def median(approach, mode="predict"):
        wanted = {"approach": approach, "num_cpus": 2, "predict": mode, "restarts": 0}
        return statistics.median(r["seconds"] / len(r["round_seconds"]) for r in records if wanted.items() <= r.items())

    batch, serial = median("multiprocessing+initializer"), median("serial") / 2
    reload = median("multiprocessing") - batch
    carry = median("ray", "predict_on_batch") - median("multiprocessing+initializer", "predict_on_batch")
    carry = max(0, carry) / 2
    lines = [
        f"Measured, on 2 cores, medians: compute {batch:.3f} s a batch, serial {serial:.3f} s a batch,",
        f"reload {reload:.3f} s a call, transport {1000 * carry:.1f} ms an actor.",
        "",
        "| cores | serial, s | multiprocessing, s | Ray, s | Ray over serial | Ray over multiprocessing |",
        "|---|---|---|---|---|---|",
    ]
    for cores in (8, 16, 24, 48):
        times = [10 * cores * serial, 10 * (batch + reload), 10 * (batch + cores * carry)]
        shown = " | ".join(f"{seconds:.1f}" for seconds in times)
        lines.append(f"| {cores} | {shown} | {times[0] / times[2]:.1f} | {times[1] / times[2]:.1f} |")
    needed = 25 * (batch + 48 * carry) - batch
    lines += [
        "",
        f"The article's 126 s against 5 s imply (126 - 5) / 10 = {(126 - 5) / 10:.1f} s of reload in a call.",
        f"For 25x on 48 cores today a reload would have to take {needed:.1f} s, {needed / reload:.0f} times this.",
    ]
    return "\n".join(lines)


def steady():
    """The README's sentence on steady rounds, from the pairs of trials in predict_on_batch mode."""
    records = [json.loads(line) for line in (ROOT / "results" / "results.jsonl").read_text().splitlines()]
    medians = {}
    for record in records:
        if record["predict"] == "predict_on_batch":
            medians.setdefault(record["approach"], []).append(statistics.median(record["round_seconds"][1:]))
    pairs = zip(medians["ray"], medians["multiprocessing+initializer"], strict=True)
    ratios = [ray / pool for ray, pool in pairs]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs of trials)"


def test_the_ratio_of_steady_rounds_follows_from_the_records():
    assert steady() in " ".join(README.split())


def test_predictions_on_paper_follow_from_the_records():
    assert on_paper() in README
