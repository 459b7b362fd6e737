"""Compare the trials in results files: seconds, Ray's speedup, where a round goes, and the article's claims.

    python analyze.py [results.jsonl ...] [--figure results.png]

Prints Markdown. Trials are compared only if machine, versions, core count, rounds, weights, data and mode are the same,
and trials on a Ray cluster only with each other. Where labels differ, the comparison is refused.

Exit status: 0; 1 if a file cannot be used or a comparison was refused (the others are shown); 2 for wrong arguments.
"""

import argparse
import fileinput
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pydantic
from pydantic import AwareDatetime, Field, NonNegativeInt, PositiveInt, create_model
from scipy import stats

os.environ["MPLBACKEND"] = "agg"  # The next import fails if the shell names a backend that is not installed.
import matplotlib.figure

matplotlib.rcdefaults()  # A user's matplotlibrc may ask for LaTeX.
warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's and SciPy's, about too few values (NaN) and equal ones.

# The order of tables and figures. The colours are Okabe and Ito's, which colour-blind readers can tell apart.
APPROACHES = ["serial", "multiprocessing", "multiprocessing+clear_session", "multiprocessing+initializer", "ray"]
COLOURS = dict(zip(APPROACHES, ["#56B4E9", "#D55E00", "#CC79A7", "#E69F00", "#009E73"], strict=True))
PUBLISHED = {"serial": "64 s, 13x", "multiprocessing": "126 s, 25x", "ray": "5 s"}  # on 48 physical cores
MOST_GROWTH = 1.2
DEFINITIONS = f"""# Expensive initialization: Ray, multiprocessing and serial Python
- Seconds of a trial: mean ± sample standard deviation (ddof = 1). Median round: of all rounds of all trials, seconds.
- Beyond compute: the median round minus that of multiprocessing+initializer; for multiprocessing, the reloading.
- Ray's speedup: the approach's seconds / Ray's, geometric mean; ± is the standard deviation of the logarithms times it.
- 95 % interval: Student's t on the same logarithms. Paired: k-th trial / k-th, where they took turns; else Welch's.
- Rounds get slower: the last third of a run takes over {MOST_GROWTH} times as long as its first third (whole interval).
  Then the speedup is the ratio of the means, with that of each trial in order, and a claim must hold in each trial.
"""

# Reading

STRICT = pydantic.ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
Seconds = Annotated[float, Field(ge=1e-9, le=1e9)]  # The bounds keep all sums and ratios finite.
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
OPTIONAL = (str | None, None)  # Text or null, and null if it is missing: two scripts do without Ray.
Host = create_model("Host", __config__=STRICT, cpu=str, physical_cores=PositiveInt | None, system=str)
Versions = create_model("Versions", __config__=STRICT, python=str, tensorflow=str, keras=str, numpy=str, ray=OPTIONAL)


@pydantic.dataclasses.dataclass(config=STRICT, slots=True)
class Trial:
    """One line of a results file. Fields that are not named here are ignored."""

    approach: Literal[tuple(APPROACHES)]
    num_cpus: PositiveInt
    nodes: PositiveInt
    ray: Literal["private", "cluster"] | None
    run: str
    trial: NonNegativeInt
    time: AwareDatetime
    seconds: Seconds
    round_seconds: Annotated[list[Seconds], Field(min_length=1)]
    setup_seconds: Seconds
    cpu_seconds: Annotated[float, Field(ge=0, le=1e12)] | None
    restarts: NonNegativeInt
    mode: Literal["predict", "predict_on_batch"]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    labels: Digest
    model: Digest
    data: Annotated[str, Field(pattern="^(mnist|stand-in|other-[0-9a-f]{8})$")]
    host: Host
    versions: Versions

    def family(self):
        """Return what trials must have in common, beside the core count, to be compared: the lines of the heading."""
        data = "STAND-IN DATA, not MNIST: say so with every figure" if self.data == "stand-in" else self.data
        versions = ", ".join(f"{name} {version}" for name, version in self.versions if version)
        return (
            f"mode: {self.mode}, rounds: {len(self.round_seconds)}, nodes: {self.nodes}, Ray: {self.ray or 'private'}",
            f"Machine: {self.host.cpu}, {self.host.physical_cores} physical cores, {self.host.system}",
            f"Versions: {versions}",
            f"Data: {data}; model: {self.model[:12]}",
        )


def read(paths):
    """Return the trials of results files, in order of time.

    A line that begins like a record but is no JSON was cut off while it was written: it is skipped, and stderr says so.
    The same record twice counts once. OSError: a file cannot be read. SystemExit: says which line is wrong, and how.
    """
    adapter = pydantic.TypeAdapter(Trial)
    trials = {}
    with fileinput.input(paths, mode="rb") as lines:
        for line in filter(bytes.strip, lines):  # Blank lines are left out.
            place = f"analyze.py: {lines.filename()}, line {lines.filelineno()}"
            try:
                trial = adapter.validate_json(line)
            except pydantic.ValidationError as error:
                wrong = error.errors()[0]
                if wrong["type"] == "json_invalid" and line.startswith(b"{"):
                    print(f"{place}: skipped, no whole record (writing it was cut off)", file=sys.stderr)
                    continue
                field = ".".join(map(str, wrong["loc"]))
                sys.exit(f"{place}: {field or 'record'}: {wrong['msg']}; correct or remove the line")
            if trials.setdefault((trial.approach, trial.run, trial.trial), trial) != trial:
                sys.exit(f"{place}: trial: an earlier line has other values for this trial; remove one of them")
    return sorted(trials.values(), key=lambda trial: trial.time)


# Statistics


class Estimate(NamedTuple):
    """A ratio and its interval, as the tables show them, and the numbers (low, high) that decide on a claim.

    NaN: there are none, and interval says what it needs.
    """

    value: str
    interval: str
    limits: tuple[float, float]


class Sample:
    """The trials of one approach that are compared, in order of time; maybe none."""

    def __init__(self, trials):
        self.trials = trials
        self.seconds = np.array([trial.seconds for trial in trials])
        self.rounds = np.array([seconds for trial in trials for seconds in trial.round_seconds])
        self.cores_busy = geometric_mean([t.cpu_seconds / t.seconds for t in trials if t.cpu_seconds])
        self.growth = growth(trials)
        self.gets_slower = self.growth.limits[0] > MOST_GROWTH


def estimate(mean, deviation, test, method):
    """Return the Estimate by mean and standard deviation of logarithms, and SciPy's test of the same logarithms."""
    low, high = np.exp(test.confidence_interval())
    interval = f"{show(low)} to {show(high)} {method}".strip() if low > 0 else "needs 2 trials of each"
    return Estimate(show(np.exp(mean), np.exp(mean) * deviation), interval, (low, high))


def geometric_mean(ratios, method=""):
    """Return the Estimate of numbers above 0."""
    logs = np.log(ratios)
    return estimate(np.mean(logs), np.std(logs, ddof=1), stats.ttest_1samp(logs, 0), method)


def growth(trials):
    """Return the Estimate of how many times as long the last third of a run takes as its first: k-th round / k-th.

    A run is a process: the rounds of all its trials, in order.
    """
    runs = {}
    for trial in trials:
        runs.setdefault(trial.run, []).extend(trial.round_seconds)
    ratios = []
    for rounds in runs.values():
        third = len(rounds) // 3
        ratios += [late / early for early, late in zip(rounds[:third], rounds[len(rounds) - third :], strict=True)]
    return geometric_mean(ratios)


def took_turns(sample, other):
    """Return whether there are as many trials of each, and the k-th of both came before the next one of either."""
    order = sorted(sample.trials + other.trials, key=lambda trial: trial.time)
    pairs = zip(order[::2], order[1::2], strict=False)
    return len(order) % 2 == 0 and all(one.approach != another.approach for one, another in pairs)


def compare(sample, other):
    """Return the Estimate of how many times as long a trial of sample takes as one of other.

    Where the rounds of one get slower no interval is honest: limits are those of the trials' ratios, k-th over k-th.
    """
    ratios = [one / another for one, another in zip(sample.seconds, other.seconds, strict=False)]
    if len(ratios) > 1 and (sample.gets_slower or other.gets_slower):
        value = f"{show(np.mean(sample.seconds) / np.mean(other.seconds))} ({', '.join(map(show, ratios))})"
        return Estimate(value, "none: rounds get slower", (min(ratios), max(ratios)))
    if took_turns(sample, other):
        return geometric_mean(ratios, "paired")
    logs = np.log(sample.seconds)
    other_logs = np.log(other.seconds)
    deviation = np.hypot(np.std(logs, ddof=1), np.std(other_logs, ddof=1))
    test = stats.ttest_ind(logs, other_logs, equal_var=False)
    return estimate(np.mean(logs) - np.mean(other_logs), deviation, test, "Welch")


# Markdown


def show(value, deviation=np.nan):
    """Return a number with three significant digits (or all before the point) and its deviation; nothing for NaN."""
    if np.isnan(value):
        return ""
    if not np.isnan(deviation):
        return f"{show(value)} ± {show(deviation)}"
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:#.3g}"


def plain(text):
    """Return text from a record on one line, with a backslash before what is a sign of Markdown."""
    return re.sub(r"([\\`*<\[|$])", r"\\\1", " ".join(text.split()))


def table(titles, rows):
    """Return a Markdown table whose columns line up as plain text, too."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    line = " | ".join(f"{{:{width}}}" for width in widths)
    dashes = ["-" * width for width in widths]
    return "".join(f"| {line.format(*row)} |\n" for row in [titles, dashes, *rows])


def comparison_table(here, published):
    """Return the table of {approach: Sample}: seconds, rounds, Ray's speedup, the article's figures, set-up."""
    compute = np.median(here["multiprocessing+initializer"].rounds)
    rows = []
    for name, sample in here.items():
        if sample.trials:
            row = [name, str(len(sample.trials)), show(np.mean(sample.seconds), np.std(sample.seconds, ddof=1))]
            beyond = np.median(sample.rounds) - compute if name != "serial" else np.nan  # Serial computes otherwise.
            speedup = compare(sample, here["ray"])[:2] if name != "ray" else ["", ""]
            row += [show(np.median(sample.rounds)), show(beyond), *speedup, published.get(name, "")]
            row += [sample.cores_busy.value, show(np.mean([trial.setup_seconds for trial in sample.trials]))]
            rows.append(row)
    titles = ["approach", "trials", "seconds", "median round", "beyond compute", "Ray's speedup", "95 % interval"]
    return table([*titles, "published, 48 cores", "cores busy", "set-up, s"], rows)


def claims_table(here):
    """Return the table of verdicts on the article's claims, by {approach: Sample}."""
    serial, pool, ray = (here[name] for name in ("serial", "multiprocessing", "ray"))
    rows = []
    for claim, figure, sign, threshold, (value, interval, (low, high)) in (
        ("Ray beats multiprocessing", "multiprocessing / Ray", ">", 1, compare(pool, ray)),
        ("Ray beats serial", "serial / Ray", ">", 1, compare(serial, ray)),
        ("multiprocessing does not beat serial", "multiprocessing / serial", ">", 1, compare(pool, serial)),
        # A tenth more than one, because the CPU time of the checks between rounds counts as well.
        ("serial keeps more than one core busy", "cores busy", ">", 1.1, serial.cores_busy),
        ("rounds of multiprocessing do not get slower", "last third / first third", "<", MOST_GROWTH, pool.growth),
    ):
        if not (low > threshold or high < threshold):  # Or there are no limits (NaN).
            verdict = "cannot tell: needs more trials or a quieter machine"
        elif (low > threshold) == (sign == ">"):
            verdict = "holds"
        else:
            verdict = "does not hold here"
        rows.append([claim, f"{figure} {sign} {threshold}", value, interval, verdict])
    return table(["claim", "holds if", "here", "95 % interval", "verdict"], rows)


def doubts(name, sample):
    """Yield warnings about an approach's trials: each with the number, the threshold and the remedy."""
    deviation = np.std(sample.seconds, ddof=1) / np.mean(sample.seconds)
    if 0 < len(sample.trials) < 5:
        yield f"{name}: {len(sample.trials)} trials, fewer than 5: run more"
    if sample.gets_slower:
        factor = f"last third / first third {sample.growth.value} ({sample.growth.interval}), over {MOST_GROWTH}"
        yield f"{name}: rounds get slower: {factor}: give each trial a process of its own (--trials 1)"
    elif deviation > 0.1:
        yield f"{name}: standard deviation {deviation:.1%} of the mean, over 10 %: stop other work, run again"


def report(trials):
    """Print Markdown; return what was refused, and {family: trials} of what was compared."""
    print(DEFINITIONS)
    groups = {}
    for trial in trials:
        groups.setdefault((trial.num_cpus, trial.family()), []).append(trial)
    refused = []
    compared = {}
    for (num_cpus, family), group in groups.items():
        title, *lines = map(plain, family)
        print(f"## Cores: {num_cpus}, {title}\n")
        lines.append(f"Trials: {len(group)}, {group[0].time:%Y-%m-%d %H:%M} to {group[-1].time:%Y-%m-%d %H:%M}")
        lines += [f"Left out: {t.approach}, {show(t.seconds)} s, restarts: {t.restarts}" for t in group if t.restarts]
        clean = [trial for trial in group if not trial.restarts]
        here = {name: Sample([trial for trial in clean if trial.approach == name]) for name in APPROACHES}
        lines += [f"**Warning:** {doubt}" for name, sample in here.items() for doubt in doubts(name, sample)]
        labels = {trial.labels: f"{trial.approach} {trial.labels[:12]}" for trial in group}
        if len(labels) > 1:
            refused.append(f"cores: {num_cpus}, {title}: not compared, as labels differ: {', '.join(labels.values())}")
            lines.append(f"**Refused:** {refused[-1]}")
        print("".join(f"- {line}\n" for line in lines))
        if clean and len(labels) == 1:
            published = PUBLISHED if (group[0].mode, len(group[0].round_seconds)) == ("predict", 10) else {}
            print(comparison_table(here, published), claims_table(here), sep="\n")
            compared.setdefault(family, []).extend(clean)
    return refused, compared


# Figure


def draw(trials):
    """Return a matplotlib Figure of trials of one family: the seconds of each, and every round in order."""
    figure = matplotlib.figure.Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    cores = sorted({trial.num_cpus for trial in trials})
    names = [name for name in APPROACHES if any(trial.approach == name for trial in trials)]
    means = []
    for place, num_cpus in enumerate(cores):
        for index, name in enumerate(names):
            sample = Sample([trial for trial in trials if trial.approach == name and trial.num_cpus == num_cpus])
            if sample.trials:
                means.append(np.mean(sample.seconds))
                x = place + 0.17 * (index - (len(names) - 1) / 2)
                left.bar(x, means[-1], 0.15, color=COLOURS[name])
                left.plot(np.linspace(x - 0.05, x + 0.05, len(sample.seconds)), sample.seconds, "k.", markersize=4)
                if num_cpus == cores[-1]:
                    right.plot(range(1, len(sample.rounds) + 1), sample.rounds, ".", color=COLOURS[name], label=name)
    scale = "log" if max(means) >= 10 * min(means) else "linear"
    left.set(title="trials (dots) and their mean (bars)", xlabel="cores", ylabel="seconds of a trial", yscale=scale)
    left.set_xticks(range(len(cores)), cores)
    right.set(title=f"every round, in order, on {cores[-1]} cores", ylabel="seconds of a round", yscale=scale)
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supxlabel("\n".join(trials[0].family()), fontsize="small", parse_math=False)
    return figure


def save(figure, path):
    """Write the figure; the file is whole, or stays as it was."""
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            figure.savefig(Path(folder, path.name), dpi=150)
            Path(folder, path.name).replace(path)
    except (OSError, ValueError) as error:  # ValueError: no such format.
        sys.exit(f"analyze.py: cannot write {path}: {error}; name another file with --figure")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", default=["results.jsonl"], metavar="results.jsonl")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the trials: a .png, .svg or .pdf")
    arguments = parser.parse_args()
    try:
        refused, compared = report(read(arguments.results))
        sys.stdout.flush()
        if arguments.figure and compared:
            save(draw(max(compared.values(), key=len)), arguments.figure)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # At its end Python would try again to write to stdout.
        sys.exit(f"analyze.py: {error.filename or 'stdout'}: {error.strerror}")
    if refused:
        sys.exit("\n".join(refused) + "\nanalyze.py: remove the trials with wrong labels from the results")
    if not compared:
        sys.exit(f"analyze.py: no trial to show in {', '.join(arguments.results)}: run a bench script first")


if __name__ == "__main__":
    main()
