# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["matplotlib==3.11.2", "numpy==2.4.6", "pydantic==2.14.3", "scipy==1.17.1"]
# ///
"""Compare the runs in results files: seconds, Ray's speedup, what reloading costs, when Ray's set-up is repaid.

    python analyze.py [results.jsonl ...] [--figure results.png]

Prints Markdown: a table for each group of runs that may be compared. Where labels differ, the comparison is refused.
Exit status: 0; 1 if a file cannot be used or a comparison was refused (the others are shown); 2 for wrong arguments.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, create_model
from scipy import stats

os.environ["MPLBACKEND"] = "agg"  # The next import fails if the shell names a backend that is not installed.
import matplotlib.figure

matplotlib.rcdefaults()  # A user's matplotlibrc may ask for LaTeX.

# The order of tables and figures. The colours are Okabe and Ito's, which colour-blind readers can tell apart.
APPROACHES = ["serial", "multiprocessing", "multiprocessing+clear_session", "multiprocessing+initializer", "ray"]
COLOURS = dict(zip(APPROACHES, ["#56B4E9", "#D55E00", "#CC79A7", "#E69F00", "#009E73"], strict=True))
SERIAL, POOL, _, INITIALIZER, RAY = APPROACHES
PUBLISHED = {SERIAL: "64 s, 13x", POOL: "126 s, 25x", RAY: "5 s"}  # ten rounds on 48 physical cores
MNIST = "c868f4cc70f1ec2961bd3b26437ea3a5d0e93cba4d95b336c6d475dd9dabb021"
STAND_IN = "f7c6aaddfd20069bf7362190abf50157f8142991e90907ebc99dc56842a4145d"
LONG = 20  # rounds of a run, from which on its tens are compared
DEFINITIONS = """± is the spread of single trials (sample standard deviation), the 95 % interval that of their mean.
Ray's speedup: an approach's seconds divided by Ray's, geometric mean, Student's t and ± on the logarithms."""


# The fields of a record, a line of a results file, that are read. Others are ignored.
WHAT = {"approach": Literal[tuple(APPROACHES)], "mode": Literal["predict", "predict_array", "predict_on_batch"]}
WHERE = {"machine": str, "versions": dict[str, str], "num_cpus": PositiveInt, "nodes": PositiveInt, "cluster": bool}
HOW = {"start_method": Literal["fork", "forkserver", "spawn"] | None, "restarts": NonNegativeInt}
HOW |= {"time": Annotated[float, Field(ge=0, le=1e11)], "setup_seconds": PositiveFloat}
HOW |= {"round_seconds": Annotated[list[PositiveFloat], Field(min_length=1)], "cpu_seconds": NonNegativeFloat | None}
DIGESTS = dict.fromkeys(["labels", "model", "data"], Annotated[str, Field(pattern="^[0-9a-f]{64}$")])
Trial = create_model("Trial", __config__={"strict": True, "allow_inf_nan": False}, **WHAT, **WHERE, **HOW, **DIGESTS)


def read(paths):
    """Return the Trials in results files, in order of time. The same line twice counts once.

    A line that is no JSON was cut off while it was written: it is skipped, and stderr says so.
    SystemExit: says which file cannot be read, or which line and field is wrong, and why.
    """
    trials = {}
    for path in paths:
        try:
            content = Path(path).read_bytes()
            lines = content.decode(json.detect_encoding(content)).split("\n")
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"analyze.py: cannot read {path}: {error}; name a text file that a bench script has written")
        for number, line in enumerate(lines, 1):
            record = line.strip("\ufeff \t\r")  # A byte order mark is no part of it.
            try:
                if record:
                    trials[record] = Trial.model_validate_json(record)
            except ValidationError as error:
                wrong = error.errors()[0]
                reason = f"analyze.py: {path}, line {number}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
                if wrong["type"] != "json_invalid":
                    sys.exit(f"{reason}; correct or remove the line")
                print(f"{reason}; skipped: no whole record", file=sys.stderr)
    return sorted(trials.values(), key=lambda trial: trial.time)


def heading(trial):
    """Return what trials must have in common to be compared, as lines of a heading."""
    place = f"Ray cluster of {trial.nodes} nodes" if trial.cluster else "one machine"
    title = f"{trial.mode}, cores: {trial.num_cpus}, rounds: {len(trial.round_seconds)}, {place}"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(trial.versions.items()) if name != "ray")
    data = {MNIST: "MNIST", STAND_IN: "STAND-IN, not MNIST"}.get(trial.data, f"other data, {trial.data[:12]}")
    return title, f"machine: {trial.machine}; {versions}", f"data: {data}; model: {trial.model[:12]}"


def groups(trials):
    """Return {lines of a heading: trials that may be compared}.

    Pools of different start methods and Rays of different versions are in different groups; the trials that have
    no start method or no Ray are in each of these.
    """
    found = {}
    for lines in dict.fromkeys(map(heading, trials)):
        alike = [(t.start_method, t.versions.get("ray"), t) for t in trials if heading(t) == lines]
        for method in sorted({method for method, _, _ in alike} - {None}) or [None]:
            for ray in sorted({ray for _, ray, _ in alike} - {None}) or [None]:
                group = [trial for one, another, trial in alike if one in (None, method) and another in (None, ray)]
                found[*lines, f"start method of pools: {method}; Ray: {ray}"] = group
    return found


class Sample:
    """The trials of one approach in a group, in order of time, and the numbers of those without restarts."""

    def __init__(self, trials):
        clean = [trial for trial in trials if not trial.restarts]
        self.trials = trials
        self.rounds = np.array([trial.round_seconds for trial in clean])  # seconds, (trials, rounds)
        self.seconds = self.rounds.sum(axis=1)
        self.mean = self.seconds.mean()
        self.spread = np.std(self.seconds, ddof=1) if len(clean) > 1 else np.nan
        self.setup = np.mean([trial.setup_seconds for trial in clean])


def compare(sample, other):
    """Return how many times as long trials of one Sample take as those of another, and the 95 % interval.

    That is a text ("1.91 ± 0.05"), another one ("1.85 to 1.97, 5 pairs", or why there is none), and (low, high).
    Where they took turns the k-th of both are a pair. A restarted trial is left out with its partner.
    """
    if sample.rounds.shape[1] >= LONG or min(len(sample.seconds), len(other.seconds)) < 2:
        return show(sample.mean / other.mean), f"needs 2 trials of each, under {LONG} rounds", (np.nan, np.nan)
    order = [trial.approach for trial in sorted(sample.trials + other.trials, key=lambda trial: trial.time)]
    took_turns = all(one != another for one, another in zip(order[::2], order[1::2], strict=False))
    # The last pass may have been cut short.
    pairs = [pair for pair in zip(sample.trials, other.trials, strict=False) if not any(t.restarts for t in pair)]
    if took_turns and len(pairs) > 1:
        logs, others = np.log([[sum(trial.round_seconds) for trial in pair] for pair in pairs]).T
        spread = np.std(logs - others, ddof=1)
        test = stats.ttest_rel(logs, others)
        method = f"{len(pairs)} pairs"
    else:
        logs, others = np.log(sample.seconds), np.log(other.seconds)
        spread = np.hypot(np.std(logs, ddof=1), np.std(others, ddof=1))
        test = stats.ttest_ind(logs, others, equal_var=False)
        method = "Welch"
    ratio = np.exp(np.mean(logs) - np.mean(others))
    low, high = np.exp(test.confidence_interval())
    return show(ratio, ratio * spread), f"{show(low)} to {show(high)}, {method}", (low, high)


def show(value, spread=np.nan):
    """Return a number with three significant digits, or all before the point, and its spread if there is one."""
    text = f"{value:#.3g}" if abs(value) < 99.95 else f"{value:.0f}"
    return f"{text} ± {show(spread)}" if spread > 0 else text


def table(titles, rows):
    """Return a Markdown table whose columns line up as plain text, too."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    line = " | ".join(f"{{:{width}}}" for width in widths)
    return "".join(f"| {line.format(*row)} |\n" for row in [titles, ["-" * width for width in widths], *rows])


def comparison_table(here):
    """Return the table of {approach: Sample}: seconds, Ray's speedup, set-up, both together, the article's figures."""
    rows = []
    for name, sample in here.items():
        rounds = f"{sample.rounds.shape[1]} rounds"
        published = PUBLISHED if rounds == "10 rounds" and sample.trials[0].mode != "predict_on_batch" else {}
        speedup = compare(sample, here[RAY])[:2] if RAY in here and name != RAY else ["", ""]
        row = [name, str(len(sample.seconds)), show(sample.mean, sample.spread), *speedup, show(sample.setup)]
        rows.append([*row, show(sample.setup + sample.mean), published.get(name, "")])
    speedup = "Ray's speedup" if RAY in here else "Ray's trials are missing: run bench_ray.py"
    titles = ["approach", "trials", f"seconds of {rounds}", speedup, "95 % interval", "set-up, s"]
    return table([*titles, f"{rounds} with set-up, s", "published, 48 cores"], rows)


def remarks(here):
    """Yield what {approach: Sample} says in words, and warnings with number, threshold and remedy."""
    for name, sample in here.items():
        if len(sample.seconds) < 5:
            yield f"**warning:** {name}: trials: {len(sample.seconds)}, fewer than 5: run more"
        relative = sample.spread / sample.mean
        if relative > 0.1:
            yield f"**warning:** {name}: ± is {relative:.1%} of the mean, over 10 %: stop other work, measure again"
        if sample.rounds.shape[1] >= LONG:
            tens = np.add.reduceat(sample.rounds.mean(axis=0), range(0, sample.rounds.shape[1] - 9, 10))
            growth = tens[-1] / tens[0]
            yield f"{name}: seconds of each ten rounds: {', '.join(map(show, tens))}; last / first: {show(growth)}"
            if growth > 1.2:
                yield f"**warning:** {name}: {show(growth)} is over 1.2: is the machine busy, or is there a leak?"
    if SERIAL in here:
        busy = np.mean([trial.cpu_seconds or np.nan for trial in here[SERIAL].trials]) / here[SERIAL].mean
        yield f"serial keeps {show(busy)} cores busy (CPU seconds per second)"
    if POOL in here and INITIALIZER in here:
        value, interval, _ = compare(here[POOL], here[INITIALIZER])
        t = np.median(here[INITIALIZER].rounds)
        r = np.median(here[POOL].rounds) - t
        yield f"{POOL} takes {value} times as long as {INITIALIZER} (95 % interval: {interval})"
        yield f"reloading costs a call r = {show(r)} s: 1 + r/t times as long if it computes t s; here t = {show(t)}"
    for name in [name for name in (POOL, INITIALIZER) if name in here and RAY in here]:
        longer = here[RAY].setup - here[name].setup
        shorter = (here[name].mean - here[RAY].mean) / here[RAY].rounds.shape[1]
        repaid = "at once" if longer <= 0 else "never, as measured"
        if longer > 0 and shorter > 0:
            repaid = f"after {np.ceil(longer / shorter):.0f} rounds"
        yield f"Ray minus {name}: set-up {show(longer)} s, a round {show(-shorter)} s: repaid {repaid}"


def report(trials):
    """Return Markdown, what was refused (texts), and {heading: {approach: Sample}} of what was compared."""
    texts = [DEFINITIONS]
    refused = []
    compared = {}
    for lines, group in groups(trials).items():
        clean = {trial.approach for trial in group if not trial.restarts}
        here = {name: Sample([t for t in group if t.approach == name]) for name in APPROACHES if name in clean}
        notes = [f"{len(group)} trials from {np.datetime64(int(group[0].time), 's')} UTC"]
        notes += [f"left out: {t.approach}, restarts: {t.restarts}, {t.round_seconds} s" for t in group if t.restarts]
        labels = {trial.labels: f"{trial.approach} {trial.labels[:12]}" for trial in group}
        texts.append(f"\n## {lines[0]}\n")
        if len(labels) > 1:
            notes.append(f"**refused:** labels differ: {', '.join(labels.values())}: remove the wrong trials")
            refused.append(f"analyze.py: {lines[0]}: {notes[-1]}")
        elif here:
            compared[lines] = here
            notes += remarks(here)
            texts.append(comparison_table(here))
        texts += [f"- {' '.join(line.split())}" for line in [*lines[1:], *notes]]
    return "\n".join(texts), refused, compared


def draw(compared):
    """Return a matplotlib Figure of {heading: {approach: Sample}}: a row for each, every trial and every round."""
    figure = matplotlib.figure.Figure(figsize=(11, 3 * len(compared)), layout="constrained")
    rows = figure.subplots(len(compared), 2, squeeze=False)
    for (lines, here), (left, right) in zip(compared.items(), rows, strict=True):
        left.set_title("\n".join(lines), loc="left", fontsize="small", parse_math=False)
        for name, sample in reversed(here.items()):
            left.plot(sample.seconds, [name] * len(sample.seconds), ".", color=COLOURS[name])
            left.plot(sample.mean, name, "k|", markersize=15)
            right.plot(range(1, sample.rounds.size + 1), sample.rounds.ravel(), ".", color=COLOURS[name], markersize=4)
        means = [sample.mean for sample in here.values()]
        scale = "log" if max(means) >= 10 * min(means) else "linear"
        left.set(xlabel="seconds of each trial, and the mean (line)", xscale=scale, ymargin=0.2)
        left.tick_params(axis="x", which="minor", labelrotation=90)
        right.set(xlabel="every round in order, run after run", ylabel="seconds of a round", yscale=scale)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", default=["results.jsonl"], metavar="results.jsonl")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the trials: a .png, .svg or .pdf")
    arguments = parser.parse_args()
    text, refused, compared = report(read(arguments.results))
    try:
        with open(1, "w", encoding=getattr(sys.stdout, "encoding", None), errors="replace", closefd=False) as stdout:
            print(text, file=stdout)
        if arguments.figure and compared:
            draw(compared).savefig(arguments.figure, dpi=150)
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: no such format. RuntimeError: no LaTeX, for pgf.
        sys.exit(f"analyze.py: cannot write to stdout or the figure: {error}")
    if refused or not compared:
        sys.exit("\n".join(refused) or "analyze.py: no trial to show: run a bench script first")


if __name__ == "__main__":
    main()
