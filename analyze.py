# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["matplotlib==3.11.2", "numpy==2.4.6", "pydantic==2.14.3", "scipy==1.17.1"]
# ///
"""Compare the runs that the bench scripts have recorded: seconds, and times as long as Ray.

    python analyze.py                                         # the runs in results.jsonl
    python analyze.py mine.jsonl yours.jsonl                  # those in several files
    python analyze.py results.jsonl --figure results.png      # also draws them

Prints Markdown: a table for each group of runs that may be compared. They have the machine, the
versions, the call, the number of rounds, the number of cores, the model and the data in common.
Exit status: 0; 1 if a record is wrong, if there is none, or if the labels of a group differ; 2 if
a file does not exist.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from scipy import stats

# The shell may name a backend for other programs, and the import fails if it is not installed.
os.environ["MPLBACKEND"] = "agg"
import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# In the order of tables and figures. The colours are Okabe and Ito's, which colour-blind readers
# can tell apart.
COLOURS = {
    "serial": "#56B4E9",
    "serial+one_core": "#0072B2",
    "multiprocessing": "#D55E00",
    "multiprocessing+clear_session": "#CC79A7",
    "multiprocessing+fresh_session": "#F0E442",
    "multiprocessing+pin_once": "#999999",
    "multiprocessing+initializer": "#E69F00",
    "ray": "#009E73",
}
APPROACHES = list(COLOURS)
SERIAL = "serial"
POOL = "multiprocessing"
INITIALIZER = "multiprocessing+initializer"
RAY = "ray"

# The article's figures: ten rounds on 48 physical cores, and how many times as fast Ray is.
PUBLISHED = {
    SERIAL: "64 s (13x)",
    POOL: "126 s (25x)",
    RAY: "5 s (1x)",
}

# What the field `data` of a record says.
MNIST = "c868f4cc70f1ec2961bd3b26437ea3a5d0e93cba4d95b336c6d475dd9dabb021"
STAND_IN = "2a982b4d28ef60434f194f9fd91b5d8a5d6318f5c063b7fb63b6c83b05ac52d3"
DATA_NAMES = {
    MNIST: "MNIST",
    STAND_IN: "a synthetic stand-in, NOT MNIST",
}

# There is a warning
FEW_TRIALS = 5  # if an approach has fewer trials,
WIDE_SPREAD = 0.1  # if the standard deviation is a larger part of the mean,
LONG_ROUND = 5  # if a round takes more times the median of its run,
GROWTH = 1.2  # if the second half of the runs takes more times as long as the first half.

MAX_ROWS = 10  # of the figure; with more it would be too large to be looked at

DEFINITIONS = """\
- **Seconds** are the sum of the rounds of a run, without its set-up. One run is one trial. The
  table gives the mean ± the standard deviation of the trials. The median round is that of all
  rounds of all trials: a moment of other work on the machine hardly moves it.
- **Times as long as Ray** are an approach's seconds divided by Ray's: below 1, the approach is
  faster than Ray. The table gives the geometric mean ± the standard deviation.
- **The 95% interval** is that of the geometric mean, by Student's t on logarithms. Where two
  approaches took turns, the first trials of both are a pair, the second ones another, and so on.
  Otherwise the trials are unpaired, and the interval is that of Welch's test.
- An interval covers this machine and this hour only. Several intervals stand side by side,
  without a correction for multiple comparisons.
"""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # SHA-256, in hexadecimal


class Trial(BaseModel):
    """One run of a bench script: the fields of its record that are read here."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    approach: Literal[*APPROACHES]
    num_cpus: PositiveInt  # batches in a round, each for a core of its own
    array: bool  # Whether model.predict() got the plain array, as in the article.
    time: Annotated[float, Field(ge=0, le=1e11)]  # when the run was over, in seconds since 1970
    setup_seconds: PositiveFloat  # from the script's first line to the end of the warm-up
    round_seconds: Annotated[list[PositiveFloat], Field(min_length=1)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    labels: Digest  # of the answers
    model: Digest  # of the weights
    data: Digest
    machine: str
    versions: dict[str, str]  # of Python and of the packages; "ray" in Ray's runs alone
    nodes: PositiveInt | None = None  # of Ray
    cluster: bool | None = None  # Whether Ray ran on a cluster, and not as a private one.
    start_method: Literal["fork", "forkserver", "spawn"] | None = None  # of a pool's workers

    @property
    def ray_version(self):
        """The version of Ray, or None if another approach ran."""
        return self.versions.get("ray")


def main():
    parser = argparse.ArgumentParser(
        description="Compare the runs that the bench scripts have recorded.",
        epilog="Prints Markdown: a table for each group of runs that may be compared.",
    )
    parser.add_argument(
        "results",
        nargs="*",
        default=["results.jsonl"],
        metavar="FILE",
        help="what the bench scripts have written; default: results.jsonl",
    )
    parser.add_argument("--figure", metavar="FILE", help="draw the runs: a .png, .svg or .pdf file")
    arguments = parser.parse_args()
    for path in arguments.results:
        if not Path(path).exists():
            parser.error(f"{path} does not exist: a bench script writes it")

    trials = read_trials(arguments.results)
    if not trials:
        sys.exit("analyze.py: there is no record of a run: run a bench script first")
    groups = group_trials(trials)
    sys.stdout.reconfigure(errors="replace")  # Its encoding may have no "±".
    print(report(groups), flush=True)

    comparable = [group for group in groups if group.labels_agree]
    if arguments.figure and comparable:
        draw(comparable).savefig(arguments.figure, dpi=150)
    if len(comparable) < len(groups):
        refused = count(len(groups) - len(comparable), "group")
        sys.exit(f"analyze.py: labels differ in {refused}: see **Refused** above")


def read_trials(paths):
    """Return the Trials that are recorded in results files, in order of time.

    A run that is recorded twice counts once. Where a line holds no whole record, because writing
    it was interrupted, stderr says so. SystemExit names the file, the line and the field if a
    record is wrong, and the encoding if a file is not text.
    """
    trials = {}
    for path in paths:
        content = Path(path).read_bytes()
        try:
            text = content.decode(json.detect_encoding(content))  # UTF-8, or UTF-16 from Windows.
        except UnicodeDecodeError as error:
            sys.exit(f"analyze.py: {path} is not a text file of records: {error}")

        skipped = []
        for line_number, line in enumerate(text.split("\n"), 1):
            records, complete = decode(line)
            if not complete:
                skipped.append(line_number)
            for record in records:
                try:
                    trial = Trial.model_validate(record)
                except ValidationError as error:
                    wrong = error.errors()[0]
                    field = ".".join(map(str, wrong["loc"]))
                    sys.exit(f"analyze.py: {path}, line {line_number}: {field}: {wrong['msg']}")
                # The same run may have been copied, and its line formatted anew.
                trials.setdefault((trial.approach, trial.time), trial)
        if skipped:
            print(
                f"analyze.py: {path}: skipped {count(len(skipped), 'line')} without a whole record,"
                f" the first of them line {skipped[0]}",
                file=sys.stderr,
            )
    return sorted(trials.values(), key=lambda trial: trial.time)


def decode(line):
    """Return the JSON objects on a line, and whether there is nothing else on it.

    There are several where files were joined whose last line does not end with a newline. A
    record that was cut off is left out, and the whole one behind it is not.
    """
    separators = " \t\r\ufeff"  # The last one is a byte order mark.
    records = []
    complete = True
    rest = line.strip(separators)
    while rest:
        try:
            record, end = json.JSONDecoder().raw_decode(rest)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            # Writing a record was interrupted; the next run has appended its own to the rest.
            complete = False
            end = rest.find('{"approach"', 1)
            if end == -1:
                break
        rest = rest[end:].lstrip(separators)
    return records, complete


@dataclass(frozen=True)
class Conditions:
    """What trials have in common if they may be compared, except for the number of cores."""

    machine: str
    nodes: int | None  # of a Ray cluster; None on one machine
    array: bool
    rounds: int
    versions: tuple  # pairs of a package and its version, without Ray
    ray_version: str | None
    start_method: str | None
    model: str
    data: str


def group_trials(trials):
    """Return the Groups of trials that may be compared: cores ascending for each Conditions.

    Pools of different start methods are in different groups, and so are different versions of
    Ray. The trials that have no start method or no Ray are in each of these groups.
    """
    alike = {}  # {Conditions: {number of cores: [Trial, ...]}}
    for trial in trials:
        versions = {name: version for name, version in trial.versions.items() if name != "ray"}
        conditions = Conditions(
            machine=trial.machine,
            nodes=trial.nodes if trial.cluster else None,
            array=trial.array,
            rounds=len(trial.round_seconds),
            versions=tuple(sorted(versions.items())),
            ray_version=None,
            start_method=None,
            model=trial.model,
            data=trial.data,
        )
        alike.setdefault(conditions, {}).setdefault(trial.num_cpus, []).append(trial)

    groups = []
    for conditions, by_cores in alike.items():
        for num_cpus, members in sorted(by_cores.items()):
            start_methods = variants(trial.start_method for trial in members)
            ray_versions = variants(trial.ray_version for trial in members)
            for start_method, ray_version in product(start_methods, ray_versions):
                chosen = [
                    trial
                    for trial in members
                    if trial.start_method in (None, start_method)
                    and trial.ray_version in (None, ray_version)
                ]
                complete = replace(conditions, start_method=start_method, ray_version=ray_version)
                groups.append(Group(complete, num_cpus, chosen))
    return groups


def variants(values):
    """Return the values that are not None, each once and in order; if there is none, None."""
    found = sorted(set(values) - {None})
    if not found:
        return [None]
    return found


class Group:
    """Trials that may be compared.

    conditions, num_cpus: what they have in common.
    samples: {approach: Sample}, in the order of APPROACHES.
    labels: {digest: an approach that gave these answers}.
    labels_agree: whether all gave the same answers; otherwise a comparison means nothing.
    """

    def __init__(self, conditions, num_cpus, trials):
        self.conditions = conditions
        self.num_cpus = num_cpus
        self.trials = trials
        self.samples = {}
        for approach in APPROACHES:
            own_trials = [trial for trial in trials if trial.approach == approach]
            if own_trials:
                self.samples[approach] = Sample(own_trials)
        self.labels = {trial.labels: trial.approach for trial in trials}
        self.labels_agree = len(self.labels) == 1


class Sample:
    """The trials of one approach in a group, in order of time, and their numbers in seconds.

    rounds: of each round, an array of shape (trials, rounds).
    seconds: of each trial, the sum of its rounds, of shape (trials,).
    mean, standard_deviation: of these; the standard deviation of a single trial is nan.
    median_round: of all rounds; a busy moment of the machine hardly moves it.
    setup_seconds: the mean of the trials.
    """

    def __init__(self, trials):
        self.trials = trials
        self.rounds = np.array([trial.round_seconds for trial in trials])
        self.seconds = self.rounds.sum(axis=1)
        self.mean = np.mean(self.seconds)
        self.standard_deviation = math.nan
        if len(trials) > 1:
            self.standard_deviation = np.std(self.seconds, ddof=1)
        self.median_round = np.median(self.rounds)
        self.setup_seconds = np.mean([trial.setup_seconds for trial in trials])


@dataclass
class Comparison:
    """How many times as long the trials of one Sample take as those of another."""

    ratio: float  # the geometric mean
    standard_deviation: float  # of single ratios; nan if one of the samples is a single trial
    low: float  # the ends of the 95% interval of the ratio; nan likewise
    high: float
    pairs: int | None  # None: unpaired


def compare(sample, other):
    """Return the Comparison of a Sample's seconds with another one's: the first by the second.

    Paired if the two took turns, and by Welch's t-test otherwise. Trials are processes of their
    own, so that their sums are independent, however much the rounds of one depend on each other.
    """
    logs = np.log(sample.seconds)
    other_logs = np.log(other.seconds)
    pairs = None
    if took_turns(sample, other):
        pairs = min(len(logs), len(other_logs))  # The last pass may have been cut short.
        logs = logs[:pairs]
        other_logs = other_logs[:pairs]

    ratio = np.exp(np.mean(logs) - np.mean(other_logs))
    if min(len(logs), len(other_logs)) < 2:
        return Comparison(ratio, math.nan, math.nan, math.nan, pairs)

    if pairs:
        spread = np.std(logs - other_logs, ddof=1)
        test = stats.ttest_rel(logs, other_logs)
    else:
        spread = np.hypot(np.std(logs, ddof=1), np.std(other_logs, ddof=1))
        test = stats.ttest_ind(logs, other_logs, equal_var=False)
    low, high = np.exp(test.confidence_interval(0.95))
    return Comparison(ratio, ratio * spread, low, high, pairs)


def took_turns(sample, other):
    """Return whether each pass had one trial of both Samples, in either order."""
    trials = sorted(sample.trials + other.trials, key=lambda trial: trial.time)
    approaches = [trial.approach for trial in trials]
    passes = zip(approaches[::2], approaches[1::2], strict=False)
    return all(first != second for first, second in passes)


def sums_of_tens(sample):
    """Return the seconds of each ten rounds of a Sample, the mean of its trials.

    Rounds that are left over at the end are left out: 25 rounds have two tens.
    """
    rounds = np.mean(sample.rounds, axis=0)
    tens = len(rounds) // 10
    return rounds[: 10 * tens].reshape(tens, 10).sum(axis=1)


def growth(sample):
    """Return how many times as long the second half of a Sample's runs takes as the first half.

    That of fewer than ten rounds is nan: it would say little.
    """
    half = sample.rounds.shape[1] // 2
    if half < 5:
        return math.nan
    return np.sum(sample.rounds[:, -half:]) / np.sum(sample.rounds[:, :half])


def break_even(sample, ray):
    """Return after how many rounds the longer set-up of Ray's Sample is repaid.

    By the medians of the rounds. 0: its set-up is not longer. inf: its rounds are not shorter.
    """
    longer_setup = ray.setup_seconds - sample.setup_seconds
    shorter_round = sample.median_round - ray.median_round
    if longer_setup <= 0:
        return 0
    if shorter_round <= 0:
        return math.inf
    return math.ceil(longer_setup / shorter_round)


# From here on: the numbers as text.


def report(groups):
    """Return Markdown about Groups: definitions, and a section for each group."""
    differing = set()  # These conditions are named in the headings.
    for field in fields(Conditions):
        if len({getattr(group.conditions, field.name) for group in groups}) > 1:
            differing.add(field.name)

    sections = [DEFINITIONS]
    for group in groups:
        sections.append(f"## {heading(group, differing)}\n")
        if group.labels_agree:
            sections.append(comparison_table(group))
            if group.conditions.rounds >= 20:
                sections.append(tens_table(group))
            sentences = [*details(group), *remarks(group), *warnings(group)]
        else:
            answers = [f"{approach} {labels[:12]}" for labels, approach in group.labels.items()]
            refusal = (
                f"**Refused:** the labels differ ({', '.join(answers)}), so these runs did not do"
                " the same work. Remove the wrong ones."
            )
            sentences = [refusal, *details(group)]
        sections.append("".join(f"- {sentence}\n" for sentence in sentences))
    return "\n".join(sections)


def heading(group, differing):
    """Return the title of a group: its machine, cores and rounds, and what else tells it apart."""
    named = describe(group.conditions)
    parts = [named.pop("machine"), count(group.num_cpus, "core"), named.pop("rounds")]
    for field, text in named.items():
        if field in differing:
            parts.append(text)
    return "; ".join(parts)


def describe(conditions):
    """Return {field: text} of those Conditions that apply."""
    named = {
        "machine": " ".join(conditions.machine.split()),
        "rounds": count(conditions.rounds, "round"),
        "array": "model.predict without the autotuner",
        "data": f"other data than MNIST, {conditions.data[:12]}",
        "model": f"model {conditions.model[:12]}",
        "versions": ", ".join(f"{name} {version}" for name, version in conditions.versions),
    }
    if conditions.array:
        named["array"] = "model.predict of the plain array"
    if conditions.data in DATA_NAMES:
        named["data"] = DATA_NAMES[conditions.data]
    if conditions.ray_version:
        named["ray_version"] = f"ray {conditions.ray_version}"
    if conditions.start_method:
        named["start_method"] = f"pools by {conditions.start_method}"
    if conditions.nodes:
        named["nodes"] = f"Ray cluster of {count(conditions.nodes, 'node')}"
    return named


def details(group):
    """Return sentences on the conditions of a group and on when it was measured."""
    start, end = (
        datetime.fromtimestamp(trial.time, UTC).strftime("%Y-%m-%d %H:%M")
        for trial in (group.trials[0], group.trials[-1])
    )
    return [
        f"Conditions: {'; '.join(describe(group.conditions).values())}.",
        f"The first trial ended at {start}, the last one at {end} UTC.",
    ]


def comparison_table(group):
    """Return the Markdown table of a group: seconds, and times as long as Ray."""
    titles = [
        "approach",
        "trials",
        f"seconds for {count(group.conditions.rounds, 'round')}",
        "median round, s",
        "times as long as Ray (Ray's speedup)",
        "95% interval",
        "set-up, s",
    ]
    published = group.conditions.rounds == 10
    if published:
        titles.append("published, 48 cores")

    rows = []
    for approach, sample in group.samples.items():
        ratio = ""
        interval = ""
        if RAY in group.samples and approach != RAY:
            comparison = compare(sample, group.samples[RAY])
            ratio = with_deviation(comparison.ratio, comparison.standard_deviation)
            interval = interval_text(comparison)
        row = [
            approach,
            str(len(sample.trials)),
            with_deviation(sample.mean, sample.standard_deviation),
            three_digits(sample.median_round),
            ratio,
            interval,
            three_digits(sample.setup_seconds),
        ]
        if published:
            row.append(PUBLISHED.get(approach, ""))
        rows.append(row)
    return markdown_table(titles, rows)


def tens_table(group):
    """Return the Markdown table of the tens of a group's rounds: whether rounds get longer."""
    tens = group.conditions.rounds // 10
    shown = np.unique(np.linspace(0, tens - 1, 6).round().astype(int))
    titles = ["approach"]
    for place in shown:
        titles.append(f"rounds {10 * place + 1} to {10 * place + 10}, s")
    titles.append("last ten / first ten")

    rows = []
    for approach, sample in group.samples.items():
        sums = sums_of_tens(sample)
        rows.append([approach, *map(three_digits, sums[shown]), three_digits(sums[-1] / sums[0])])
    return markdown_table(titles, rows)


def remarks(group):
    """Return sentences on what the numbers of a group say."""
    samples = group.samples
    accuracy = 100 * group.trials[0].accuracy
    sentences = [f"All trials gave the same answers, of which {accuracy:.2f}% are right."]
    if RAY not in samples:
        sentences.append("There is no trial of Ray, so nothing is compared with it.")
    if POOL in samples and INITIALIZER in samples:
        comparison = compare(samples[POOL], samples[INITIALIZER])
        sentences.append(
            f"{POOL} takes {three_digits(comparison.ratio)} times as long as {INITIALIZER}"
            f" (95% interval: {interval_text(comparison)})."
        )

    if waits_for_autotuner(group.conditions):
        sentences.append(
            "Rounds are of two kinds: at its end, a call of the plain array on a pinned core may"
            " have to wait for tf.data's autotuner, for as long as the call itself has taken."
            " Chance decides which calls wait, so a median round says little."
        )
        return sentences

    if POOL in samples and INITIALIZER in samples and not grows(samples[POOL]):
        computing = samples[INITIALIZER].median_round
        reloading = samples[POOL].median_round - computing
        if reloading > 0:
            sentences.append(
                f"By the median rounds, reloading costs r = {three_digits(reloading)} s in each"
                " call. Where a call computes for t seconds, reloading makes it 1 + r/t times as"
                f" long. Here t = {three_digits(computing)} s."
            )
    for approach in (POOL, INITIALIZER):
        if RAY in samples and approach in samples and not grows(samples[approach]):
            sentences.append(break_even_sentence(approach, samples[approach], samples[RAY]))
    return sentences


def waits_for_autotuner(conditions):
    """Return whether some calls wait for tf.data's autotuner, which TensorFlow 1 does not have."""
    tensorflow = dict(conditions.versions).get("tensorflow", "")
    return conditions.array and not tensorflow.startswith("1.")


def grows(sample):
    """Return whether rounds get longer in the course of a run: then its median says little."""
    return growth(sample) > GROWTH


def break_even_sentence(approach, sample, ray):
    """Return whether, and after how many rounds, Ray's longer set-up is repaid."""
    rounds = break_even(sample, ray)
    if rounds == 0:
        return f"Ray's set-up is not longer than that of {approach}."

    longer_setup = three_digits(ray.setup_seconds - sample.setup_seconds)
    start = f"Ray's set-up takes {longer_setup} s longer than that of {approach}"
    # A single trial has no interval, and its nan is not below 1: then the medians have to do.
    if rounds == math.inf or compare(sample, ray).low <= 1:
        return f"{start}. Its rounds are not detectably shorter, so the set-up is not repaid."

    shorter_round = three_digits(sample.median_round - ray.median_round)
    return (
        f"{start}, and its median round is {shorter_round} s shorter: the set-up is repaid after"
        f" {count(rounds, 'round')}."
    )


def warnings(group):
    """Return sentences that warn of a group's numbers: what is wrong, and what to do."""
    sentences = []
    few = [name for name, sample in group.samples.items() if len(sample.trials) < FEW_TRIALS]
    if few:
        sentences.append(
            f"**Warning:** there are fewer than {FEW_TRIALS} trials of {', '.join(few)}: make more."
        )

    for approach, sample in group.samples.items():
        spread = sample.standard_deviation / sample.mean
        if spread > WIDE_SPREAD:
            remedy = "stop other work on the machine and measure again."
            if waits_for_autotuner(group.conditions):
                remedy = "make more trials, or measure without --array."
            sentences.append(
                f"**Warning:** the standard deviation of {approach} is {100 * spread:.0f}% of the"
                f" mean, more than {100 * WIDE_SPREAD:.0f}%: {remedy}"
            )

        times_median = sample.rounds / np.median(sample.rounds, axis=1, keepdims=True)
        long_rounds = np.count_nonzero(times_median > LONG_ROUND)
        if long_rounds:
            trial, place = np.unravel_index(np.argmax(times_median), times_median.shape)
            cause = "the machine was busy."
            if approach == RAY:
                cause = "an actor restarted, or the machine was busy."
            sentences.append(
                f"**Warning:** {count(long_rounds, 'round')} of {approach} took more than"
                f" {LONG_ROUND} times the median of the run, the worst being round {place + 1} of"
                f" trial {trial + 1} with {three_digits(sample.rounds[trial, place])} s: {cause}"
            )

        if grows(sample) and not waits_for_autotuner(group.conditions):
            sentences.append(
                f"**Warning:** the second half of the runs of {approach} takes"
                f" {three_digits(growth(sample))} times as long as the first half, more than"
                f" {GROWTH}: the machine was busy, or there is a leak."
            )
    return sentences


def three_digits(value):
    """Return a number with three significant digits, or with all that it has before the point."""
    if abs(value) < 99.95:
        return f"{value:#.3g}"
    return f"{value:.0f}"


def with_deviation(value, standard_deviation):
    """Return "2.45 ± 0.702", or without ± if the standard deviation is nan."""
    if math.isnan(standard_deviation):
        return three_digits(value)
    return f"{three_digits(value)} ± {three_digits(standard_deviation)}"


def interval_text(comparison):
    """Return "1.85 to 1.97, 5 pairs", or why there is no interval."""
    if math.isnan(comparison.standard_deviation):
        return "needs 2 trials of each"
    pairs = "unpaired"
    if comparison.pairs:
        pairs = f"{comparison.pairs} pairs"
    return f"{three_digits(comparison.low)} to {three_digits(comparison.high)}, {pairs}"


def count(number, noun):
    """Return "1 core", "2 cores"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


def markdown_table(titles, rows):
    """Return a Markdown table of texts whose columns line up as plain text, too."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = []
    for row in [titles, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


# From here on: the figure.


def draw(groups):
    """Return a matplotlib Figure of Groups, with a row for each Conditions among them.

    On the left the article's figure: the seconds of a trial over the number of cores. On the
    right every round on the most cores, in order.
    """
    matplotlib.rcdefaults()  # A user's matplotlibrc may ask for LaTeX.
    rows = {}
    for group in groups:
        rows.setdefault(group.conditions, []).append(group)
    drawn = list(rows.items())[:MAX_ROWS]

    figure = Figure(figsize=(9, 3.2 * len(drawn) + 0.5), layout="constrained")
    axes = figure.subplots(len(drawn), 2, squeeze=False, width_ratios=[3, 2])
    for (conditions, row), (left, right) in zip(drawn, axes, strict=True):
        draw_trials(left, row)
        draw_rounds(right, row[-1])
        texts = list(describe(conditions).values())
        first_line = "; ".join(texts[:3])  # machine, rounds, call
        second_line = "; ".join(texts[3:])
        left.set_title(
            f"{first_line}\n{second_line}", loc="left", fontsize="small", parse_math=False
        )

    patches = [Patch(color=COLOURS[name], label=name) for name in approaches_of(groups)]
    figure.legend(handles=patches, loc="outside upper center", ncols=4, fontsize="small")
    if len(rows) > len(drawn):
        figure.supxlabel(f"These are the first {len(drawn)} of {len(rows)} rows.")
    return figure


def approaches_of(groups):
    """Return the approaches of which any of the groups has trials, in the order of APPROACHES."""
    return [name for name in APPROACHES if any(name in group.samples for group in groups)]


def draw_trials(axes, groups):
    """Draw the seconds of trials over the number of cores, with a bar for each approach."""
    approaches = approaches_of(groups)
    width = 0.8 / len(approaches)
    numbered = len(approaches) * len(groups) <= 8  # On narrower bars the numbers would overlap.
    for place, group in enumerate(groups):
        left_end = place - 0.4
        for approach, sample in group.samples.items():
            middle = left_end + (approaches.index(approach) + 0.5) * width
            draw_bar(axes, approach, sample, middle, width, numbered)

    axes.set_xticks(range(len(groups)), [group.num_cpus for group in groups])
    axes.set_xlabel("physical cores")
    axes.set_ylabel(f"seconds for {count(groups[0].conditions.rounds, 'round')}")
    axes.margins(y=0.12)  # Room for the numbers.
    axes.set_ylim(bottom=0)


def draw_bar(axes, approach, sample, middle, width, numbered):
    """Draw the mean of a Sample as a bar, with its standard deviation and a dot for each trial."""
    axes.bar(middle, sample.mean, width, color=COLOURS[approach])
    top = sample.seconds.max()

    # The dots stand side by side, or those of equal trials would hide each other.
    trials = len(sample.trials)
    offsets = (np.arange(trials) + 0.5) / trials - 0.5
    axes.plot(
        middle + 0.7 * width * offsets,
        sample.seconds,
        "o",
        markersize=2.5,
        markerfacecolor="white",
        markeredgecolor="black",
        markeredgewidth=0.5,
    )
    if trials > 1:
        deviation = sample.standard_deviation
        axes.errorbar(middle, sample.mean, deviation, color="black", capsize=2)
        top = max(top, sample.mean + deviation)
    if numbered:
        axes.annotate(
            three_digits(sample.mean),
            (middle, top),
            xytext=(0, 3),
            textcoords="offset points",
            horizontalalignment="center",
            fontsize="small",
        )


def draw_rounds(axes, group):
    """Draw every round of a group's trials, in order."""
    medians = [sample.median_round for sample in group.samples.values()]
    for approach, sample in group.samples.items():
        rounds = sample.rounds.ravel()
        numbers = range(1, len(rounds) + 1)
        axes.plot(numbers, rounds, ".", color=COLOURS[approach], markersize=4)
    axes.set_xlabel(f"round, one trial after the other, on {count(group.num_cpus, 'core')}")
    axes.set_ylabel("seconds for a round")
    if max(medians) > 10 * min(medians):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)


if __name__ == "__main__":
    main()
