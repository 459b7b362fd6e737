"""Compare the trials in results.jsonl: seconds, Ray's speedup, where the time goes, the article's claims (Markdown).

Only trials of the same machine, versions, cores, rounds, images, model, data and prediction mode are compared; others
get tables of their own. Where predictions differ, nothing is compared. A speedup is always other / ray.

Run:
    python analyze.py [results.jsonl ...] [--figure results.png]
    python analyze.py --next 5 --cores 1,2 --model /tmp/model.keras --data /tmp/mnist.npz results.jsonl
        prints the command of the trial that comes next, so that the approaches take turns; nothing when all are done

Exit status: 0; 1 if a file cannot be used or a comparison was refused; 2 if the arguments are wrong.
"""

# scipy and matplotlib are imported where they are used: --next runs between all trials and needs neither.
import argparse
import dataclasses
import gc
import hashlib
import math
import os
import platform
import re
import shlex
import sys
import textwrap
import warnings
from collections import namedtuple
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

from pydantic import AwareDatetime, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

SCRIPTS = {  # in the order in which --next lets them take turns
    "serial": ["bench_serial.py"],
    "multiprocessing": ["bench_multiprocessing.py"],
    "multiprocessing+initializer": ["bench_multiprocessing.py", "--initializer"],
    "ray": ["bench_ray.py"],
}
# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = dict(zip(SCRIPTS, ("#56B4E9", "#D55E00", "#E69F00", "#009E73"), strict=True))
PUBLISHED = {"serial": "64 s, 13x", "multiprocessing": "126 s, 25x", "ray": "5 s"}
LEAST_TRIALS = 5  # as in the article
MOST_SPREAD = 0.10  # standard deviation over mean
SLOW_FIRST = 1.25  # first trial over the median of the later ones
MOST_FAMILIES = 10  # rows of a figure
LONGEST_LINE = 10_000_000  # bytes; no record comes near it, and /dev/zero has no second line
NOTES = """# Expensive initialization: Ray, multiprocessing and serial Python

± is the sample standard deviation (ddof = 1) of the trials. Speedup: seconds of the other / Ray's, k-th trial / k-th.
Intervals: 95 % confidence, Student's t; paired where the trials took turns, else unpaired (Welch); of speedups on logs.
Article: 48 physical cores (m5.24xlarge), five trials. "initializer" is short for multiprocessing+initializer.
A claim says that a figure lies above a threshold: it holds if the figure's interval lies wholly above it, does not hold
here if wholly below; else one cannot tell. Spread: standard deviation (interval by jackknife); above 1.41, reloading
makes most of the variance. Share: of what Ray saves over multiprocessing, what the initializer saves, too.
"""


# Reading. A record that says something impossible ends the analysis: going on would make a wrong number.

From0 = Annotated[int, Field(ge=0, lt=2**63)]
From1 = Annotated[int, Field(ge=1, lt=2**63)]
Amount = Annotated[float, Field(ge=0, le=1e12)]  # these bounds refuse NaN, and keep sums and ratios finite
Seconds = Annotated[float, Field(ge=1e-9, le=1e9)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
checked = dataclass(config=ConfigDict(strict=True), frozen=True, slots=True)  # strict: 1 is no true, "1" is no 1


@checked
class Host:
    name: str
    cpu: str
    physical_cores: From1
    logical_cpus: From1
    memory_bytes: From1
    platform: str
    load: Amount | None = dataclasses.field(compare=False)  # the same machine, however busy


@checked
class Versions:
    python: str
    tensorflow: str
    keras: str
    numpy: str
    ray: str


@checked
class Trial:
    """One record of results.jsonl; fields that are not named here are ignored."""

    approach: Literal[tuple(SCRIPTS)]
    num_cpus: From1
    trial: From0
    run: str
    time: AwareDatetime
    seconds: Seconds
    round_seconds: Annotated[list[Seconds], Field(min_length=1)]
    setup_seconds: Amount
    cpu_seconds: Amount | None
    memory_bytes: From0 | None
    restarts: From0
    predict: Literal["predict", "predict_on_batch"]
    images: From1
    accuracy: Annotated[float, Field(ge=0, le=1)]
    predictions: Sha256
    model: Sha256
    data: Literal["mnist", "stand-in", "other"]
    cores: list[From0]
    pinned: bool
    nodes: From1
    start_method: Literal["fork", "spawn", "forkserver"] | None
    host: Host
    versions: Versions

    def family(self):
        """Return what two trials must share to be compared, but for num_cpus."""
        rounds = len(self.round_seconds)
        return self.host, self.versions, self.model, self.data, self.predict, self.images, rounds, self.nodes


def read(paths):
    """Return (trials in time order, notes on what was skipped) of results files.

    OSError: a file cannot be read. SystemExit: names the file, the line, and what is wrong with it. A torn line is
    skipped: the last one, after a power cut, or not the last one any more when other trials were appended after it.
    """
    record, known, notes = TypeAdapter(Trial), {}, []
    for path in paths:
        repeated = 0
        with open(path, "rb") as file:
            for count, line in enumerate(iter(partial(file.readline, LONGEST_LINE), b""), 1):
                try:
                    trial = record.validate_json(line.rstrip())
                except ValidationError as error:
                    wrong = error.errors(include_url=False)[0]
                    if line.startswith(b"{") and "EOF while parsing" in wrong["msg"] and len(line) < LONGEST_LINE:
                        notes.append(f"{path}, line {count}: skipped, its end is missing (writing it was cut off)")
                        continue
                    field = ".".join(map(str, wrong["loc"])) or "record"
                    sys.exit(f"analyze.py: {path}, line {count}: {field}: {wrong['msg']}")
                first = known.setdefault((trial.approach, trial.run, trial.trial), trial)
                if first != trial:
                    sys.exit(f"analyze.py: {path}, line {count}: other figures for a trial that stands before")
                repeated += first is not trial
        if repeated:
            notes.append(f"{path}: {repeated} records repeat an earlier one; each trial is counted once")
    return sorted(known.values(), key=lambda trial: trial.time.timestamp()), notes


# Comparing. Lists of trials are in time order; `here` is {approach: trials} of one family and core count.


def families(trials):
    """Return [{num_cpus: trials}]: the trials in a dict differ in nothing but approach and core count."""
    found = {}
    for trial in trials:
        found.setdefault(trial.family(), {}).setdefault(trial.num_cpus, []).append(trial)
    return [dict(sorted(family.items())) for family in found.values()]


def by_approach(trials):
    """Return {approach: its trials}. A trial in which a worker died does not measure speed, and is left out."""
    whole = [trial for trial in trials if trial.restarts == 0]
    found = {name: [trial for trial in whole if trial.approach == name] for name in SCRIPTS}
    return {name: some for name, some in found.items() if some}


def disagreement(trials):
    """Return who predicted what, if trials that must agree do not; else an empty text."""
    found = sorted({(trial.predictions, trial.approach) for trial in trials})
    return "; ".join(f"{name} {digest}" for digest, name in found) if found[0][0] != found[-1][0] else ""


def seconds(trials):
    return [trial.seconds for trial in trials]


def setup(trials):
    return fmean(trial.setup_seconds for trial in trials)


def cores_busy(trials):
    return [trial.cpu_seconds / trial.seconds for trial in trials if trial.cpu_seconds is not None]


def interval(a, b, paired):
    """Return the 95 % confidence interval (low, high) of mean(a) - mean(b), or None if one has fewer than 2 values.

    By Student's t: of the differences a[k] - b[k] if paired, Welch's if not.
    """
    if min(len(a), len(b)) < 2:
        return None
    from scipy import stats

    with warnings.catch_warnings(action="ignore"):  # about equal values, whose interval has no width
        test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
        return tuple(map(float, test.confidence_interval(0.95)))


def mean_interval(values):
    """Return the 95 % confidence interval of a mean, or None if there are fewer than 2 values."""
    return interval(values, [0.0] * len(values), paired=True)


Comparison = namedtuple("Comparison", "ratios paired ratio difference")


def compare(a, b):
    """Compare the seconds of trials a with those of b; either may be empty.

    Returns a Comparison: ratios a / b, k-th over k-th; whether the trials took turns (in time order, the first two are
    one of each, and so are the next two, ...); the 95 % intervals of ratio and difference a - b (seconds), or None.
    """
    order = sorted([(trial.time.timestamp(), "a") for trial in a] + [(trial.time.timestamp(), "b") for trial in b])
    paired = len(a) == len(b) and all(x[1] != y[1] for x, y in zip(order[::2], order[1::2], strict=True))
    logs = interval([math.log(value) for value in seconds(a)], [math.log(value) for value in seconds(b)], paired)
    ratios = [x / y for x, y in zip(seconds(a), seconds(b), strict=False)]
    ratio = logs and (math.exp(logs[0]), math.exp(logs[1]))
    return Comparison(ratios, paired, ratio, interval(seconds(a), seconds(b), paired))


def spread_ratio(a, b):
    """Return the 95 % interval of the standard deviation of values a over that of b; None with fewer than 3 of each.

    The jackknife of the log variance (R. G. Miller, Annals of Mathematical Statistics 39, 1968): the F test would take
    a single disturbed trial for a difference, because times are not normally distributed.
    """
    import numpy

    logs = []
    for values in map(numpy.array, (a, b)):
        n = len(values)
        if n < 3:
            return None
        squares = (values - values.mean()) ** 2
        without = (squares.sum() - squares * n / (n - 1)) / (n - 2)  # the variance without the k-th value
        if without.min() <= 1e-12 * squares.sum():  # all but one are equal
            return None
        logs.append(n * math.log(squares.sum() / (n - 1)) - (n - 1) * numpy.log(without))
    return tuple(math.exp(min(limit / 2, 700)) for limit in interval(*logs, paired=False))


def saved_share(pool, initializer, ray):
    """Return bounds of (pool - initializer) / (pool - ray), mean seconds, from the intervals of two differences."""
    by_ray, left = compare(pool, ray).difference, compare(initializer, ray).difference
    if not (by_ray and left) or by_ray[0] <= 0 <= by_ray[1]:
        return by_ray and left and (-math.inf, math.inf)
    shares = [1 - some / saved for some in left for saved in by_ray]
    return (min(shares), max(shares)) if by_ray[0] > 0 else (0.0, 0.0)  # Ray saves nothing: nor does loading once


Claim = namedtuple("Claim", "claim figure threshold interval verdict")


def claims(family):
    """Judge the article's claims on speed, spread and cores by {num_cpus: here}, on its most cores."""
    most = max(family)
    serial, pool, initializer, ray = (family[most].get(name, []) for name in SCRIPTS)
    serials = [family[cores]["serial"] for cores in sorted(family) if "serial" in family[cores]]
    growth = compare(serials[-1], serials[0]).ratio if len(serials) > 1 else None
    busy = mean_interval(cores_busy(serial)) if most > 1 else None
    spread = spread_ratio(seconds(pool), seconds(initializer))
    share, both = saved_share(pool, initializer, ray), "2 trials of each"
    found = []
    for claim, figure, threshold, limits, needs in (
        ("Ray beats multiprocessing (25x on 48 cores)", "speedup", 1, compare(pool, ray).ratio, both),
        ("Ray beats serial (13x on 48 cores)", "speedup", 1, compare(serial, ray).ratio, both),
        ("multiprocessing does not beat serial", "its time / serial's", 1, compare(pool, serial).ratio, both),
        ("reloading makes multiprocessing's spread", "spread / initializer's", 1.41, spread, "3 trials of each"),
        ("serial keeps more than one core busy", "CPU time / time", 1, busy, "2 trials on 2 cores"),
        ("the workload grows with the cores", "serial, most / fewest", 1, growth, "serial on several core counts"),
        ("loading is what Ray saves", "share", 0.8, share, both),
    ):
        verdict = f"cannot tell: needs {needs}"
        if limits:
            verdict = "holds" if limits[0] > threshold else "does not hold here"
            if limits[0] <= threshold <= limits[1]:
                verdict = "cannot tell: needs more trials or a quieter machine"
        found.append(Claim(claim, figure, threshold, limits, verdict))
    return found


def doubts(here):
    """Return warnings: number, threshold, remedy."""
    found = []
    for name, some in here.items():
        values, cpus = seconds(some), some[0].host.logical_cpus
        spread = stdev(values) / fmean(values) if len(values) > 1 else 0
        slow = values[0] / median(values[1:]) if len(values) > 2 else 0
        load = max(trial.host.load or 0 for trial in some)
        if len(values) < LEAST_TRIALS:
            found.append(f"{name}: {len(values)} trials, fewer than {LEAST_TRIALS}: run more")
        if spread > MOST_SPREAD:
            found.append(f"{name}: standard deviation {spread:.0%} of mean, over {MOST_SPREAD:.0%}: stop other work")
        if slow > SLOW_FIRST:
            found.append(f"{name}: first trial {slow:.2f} times the later median, over {SLOW_FIRST}: run again, warm")
        if load > cpus:
            found.append(f"{name}: load average {load:.1f} before a trial, over {cpus} CPUs: stop other work")
    return found


# Markdown


def show(value):
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def show_interval(limits, paired=None):
    kind = {True: ", paired", False: ", unpaired", None: ""}[paired]
    return f"{show(limits[0])} to {show(limits[1])}{kind}" if limits else "needs 2 trials"


def show_mean(values):
    deviation = f" ± {show(stdev(values))}" if len(values) > 1 else " (1 trial)"
    return show(fmean(values)) + deviation if values else "not known"


def plain(value):
    """Return text from a record as one line that Markdown shows as it is."""
    return re.sub(r"([\\|`<\[*])", r"\\\1", "".join(sign if sign.isprintable() else "?" for sign in value))


def table(titles, rows):
    widths = [max(map(len, cells)) for cells in zip(titles, *rows, strict=True)]
    rows = [titles, ["-" * width for width in widths], *rows]
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in rows)


def title(trial):
    rounds = len(trial.round_seconds)
    return f"{trial.predict}, {rounds} rounds of {trial.images} images a core, data: {trial.data}"


def heading(trials):
    """Return what the trials of a family share, and when they were measured; made-up data loudly."""
    one, host = trials[0], trials[0].host
    versions = ", ".join(f"{name} {version}" for name, version in dataclasses.asdict(one.versions).items())
    machine = f"{host.name}, {host.cpu}, {host.physical_cores} physical cores, {host.logical_cpus} CPUs"
    first, last = (pick(trial.time for trial in trials) for pick in (min, max))
    return (
        f"## {title(one)}\n\n"
        + "**STAND-IN DATA: drawn digits, not MNIST. Say so with every figure.**\n\n" * (one.data == "stand-in")
        + f"- Machine: {plain(machine)}, {host.memory_bytes / 2**30:.1f} GiB, {plain(host.platform)}\n"
        + f"- Versions: {plain(versions)}; model {one.model[:12]}\n"
        + f"- Measured: {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC, {len(trials)} trials\n"
    )


def comparison(here):
    """Return the table of each approach, and Ray's speedup over it."""
    rows = []
    for name, some in here.items():
        speedup = limits = ""
        if name != "ray" and "ray" in here:
            found = compare(some, here["ray"])
            speedup, limits = show_mean(found.ratios), show_interval(found.ratio, found.paired)
            if len(some) != len(here["ray"]):
                speedup += f" ({len(found.ratios)} pairs)"
            if found.ratio and found.ratio[0] <= 1 <= found.ratio[1]:
                limits += ", not distinguishable"
        workers = 1 if name == "serial" else some[0].num_cpus
        memory = [trial.memory_bytes / workers / 1e6 for trial in some if trial.memory_bytes is not None]
        costs = [show(fmean(values)) if values else "not known" for values in (cores_busy(some), memory)]
        article = PUBLISHED.get(name, "") if some[0].predict == "predict" else ""
        row = [name, str(len(some)), show_mean(seconds(some)), speedup, limits, article]
        rows.append([*row, *costs, show(setup(some))])
    titles = ["approach", "trials", "seconds", "Ray's speedup over it", "95 % interval", "article"]
    return table([*titles, "cores busy", "MB a worker", "set-up, s"], rows)


def where(here, rounds):
    """Return where the time goes, per round, and after how many rounds Ray's set-up has paid for itself."""
    _, pool, initializer, ray = (here.get(name, []) for name in SCRIPTS)
    values, paid = [value / rounds for value in seconds(initializer)], []
    rows = [["compute: initializer", show_mean(values), show_interval(mean_interval(values))]]
    for part, some in ("reload: multiprocessing - initializer", pool), ("transport: Ray - initializer", ray):
        found = compare(some, initializer)
        mean = show(fmean(seconds(some)) / rounds - fmean(values)) if some and initializer else "not known"
        limits = found.difference and [limit / rounds for limit in found.difference]
        rows.append([part, mean, show_interval(limits, found.paired)])
    for name in [name for name in here if ray and name != "ray"]:
        longer, saved = setup(ray) - setup(here[name]), compare(here[name], ray).difference
        when = "never" if saved and saved[1] < 0 else "cannot tell when"
        if longer <= 0:
            when = "from the start"
        elif saved and saved[0] > 0:
            when = f"after {math.ceil(longer * rounds / saved[1])} to {math.ceil(longer * rounds / saved[0])} rounds"
        paid.append(f"against {name}: {when}")
    sentence = f"\nRay's longer set-up has paid for itself (95 % interval): {'; '.join(paid)}.\n" if paid else ""
    return table(["per round", "seconds", "95 % interval"], rows) + sentence


def report(found):
    """Return (Markdown, refusals, [{num_cpus: here}] of what was compared) of families."""
    parts, refusals, compared = [NOTES], [], []
    for by_cores in found:
        parts.append(heading([trial for trials in by_cores.values() for trial in trials]))
        family = {}
        for cores, trials in by_cores.items():
            here, one, differ = by_approach(trials), trials[0], disagreement(trials)
            parts.append(f"### Cores: {cores}" + f", on {one.nodes} nodes: no opponent" * (one.nodes > 1) + "\n")
            if differ:
                refusals.append(f"{cores} cores, {one.predict}: not compared, the predictions differ: {differ}")
                parts.append(f"**Refused.** {refusals[-1]}\n")
                continue
            notes = [f"**Warning:** {doubt}" for doubt in doubts(here)]
            for trial in [trial for trial in trials if trial.restarts]:
                what = f"{trial.approach}, {show(trial.seconds)} s, {trial.restarts} workers replaced"
                notes.append(f"Not in the means: {what}")
            parts.append("".join(f"- {note}\n" for note in notes))
            if here:
                family[cores] = here
                parts += [comparison(here), where(here, len(one.round_seconds))]
        if family:
            compared.append(family)
        if family and one.nodes == 1:
            rows = [[*row[:2], str(row.threshold), show_interval(row.interval), row.verdict] for row in claims(family)]
            parts.append(f"### Claims of the article, on {max(family)} cores\n")
            parts.append(table(["claim", "figure", "threshold", "95 % interval", "verdict"], rows))
    return "\n".join(parts), refusals, compared


def draw(compared):
    """Return a matplotlib Figure: a row for each {num_cpus: here}; on the right Ray's speedup, if there are several."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(10, 5 * len(compared)), layout="constrained")
    for part, family in zip(figure.subfigures(len(compared), squeeze=False)[:, 0], compared, strict=True):
        middles = [1.0]
        left, *right = part.subplots(1, 1 + (len(family) > 1), squeeze=False)[0]
        for place, here in enumerate(family.values()):
            for name, some in here.items():
                x, values = place + 0.2 * (list(SCRIPTS).index(name) - 1.5), seconds(some)
                deviation = stdev(values) if len(values) > 1 else None
                left.bar(x, fmean(values), 0.18, yerr=deviation, capsize=4, color=COLOURS[name])
                dots = [x + 0.12 * ((k + 0.5) / len(values) - 0.5) for k in range(len(values))]
                left.plot(dots, values, ".", color="black", alpha=0.6)
                for axes in right if name != "ray" and "ray" in here else ():
                    speedup = compare(some, here["ray"])
                    middles.append(fmean(speedup.ratios))
                    axes.plot(x, middles[-1], "o", color=COLOURS[name])
                    axes.plot([x, x], speedup.ratio or [math.nan] * 2, color=COLOURS[name])
        for axes, what in zip([left, *right], ("seconds for a trial", "Ray's speedup (other / Ray)"), strict=False):
            axes.set(xlabel="physical cores used", ylabel=what, xlim=(-0.5, len(family) - 0.5))
            axes.set_xticks(range(len(family)), family)
            axes.set_ylim(bottom=0)
        left.legend(handles=[Patch(color=colour, label=name) for name, colour in COLOURS.items()])
        count = sum(len(some) for here in family.values() for some in here.values())
        caption = f"{some[0].host.name}, {some[0].host.cpu}; {count} trials (dots). "
        caption += "Bars: mean, sample standard deviation."
        if right:
            right[0].axhline(1, color="black", linestyle=":")
            right[0].set_ylim(0, 2 * max(middles))  # an interval of few trials would hide all the rest
            caption += " Right: mean of the ratios, 95 % interval."
        part.suptitle(title(some[0]))
        # Not wrap=True: it ignores parse_math, and a $ in the name of a CPU is no formula.
        part.supxlabel(textwrap.fill(caption, 130), fontsize="small", parse_math=False)
    return figure


# --next


def next_command(trials, wanted, cores, options):
    """Return (command, progress) of the next trial; no command when every approach has `wanted` on each core count.

    Next is who has the fewest of `trials`, so that a drifting machine hits all alike. `options` end the command.
    """
    done = {(count, name): 0 for count in cores for name in SCRIPTS}
    trials = [trial for trial in trials if (trial.num_cpus, trial.approach) in done]
    for trial in trials:
        done[trial.num_cpus, trial.approach] += 1
    count, name = min(done, key=done.get)
    total, missing = wanted * len(done), sum(max(0, wanted - number) for number in done.values())
    if not missing:
        return "", f"all {total} trials are done"
    left = missing * (fmean(seconds(trials)) + setup(trials)) if trials else 0
    when = f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left" if trials else ""
    command = shlex.join([*SCRIPTS[name], "--trials", "1", "--num-cpus", str(count), *options])
    return command, f"trial {total - missing + 1} of {total}: {name} on {count} cores{when}"


def plan(args):
    """Print the command of the next trial on stdout, and how far it is on stderr."""
    mode = "predict_on_batch" if args.predict_on_batch else "predict"
    model = hashlib.sha256(Path(args.model).read_bytes()).hexdigest()
    wanted = platform.node(), model, mode, args.rounds, 1, 0
    mine = []
    for trial in read(filter(os.path.exists, args.results))[0]:  # no file yet: nothing is done
        rounds = len(trial.round_seconds)
        if (trial.host.name, trial.model, trial.predict, rounds, trial.nodes, trial.restarts) == wanted:
            mine.append(trial)
    # Those of other data or versions than the newest one's are compared with none that is still to come.
    mine = [trial for trial in mine if (trial.data, trial.versions) == (mine[-1].data, mine[-1].versions)]
    options = ["--rounds", str(args.rounds), "--model", args.model, "--data", args.data, "--output", args.results[0]]
    options += ["--predict-on-batch"] * args.predict_on_batch
    command, progress = next_command(mine, args.next, args.cores, options)
    print(progress, file=sys.stderr)
    print(command, flush=True)


# The command line


def positive(value):
    if int(value) < 1:
        raise ValueError
    return int(value)


def core_counts(value):
    return [positive(part) for part in re.split("[ ,]+", value.strip())]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="*", default=["results.jsonl"], help="default: results.jsonl")
    parser.add_argument("--figure", type=Path, help="draw them, too: a .png, .svg or .pdf")
    parser.add_argument("--next", type=positive, metavar="TRIALS", help="print the command of the next trial, if any")
    parser.add_argument("--cores", type=core_counts, help="for --next: core counts, such as 1,2")
    parser.add_argument("--model", help="for --next: the model file")
    parser.add_argument("--data", help="for --next: the data file")
    parser.add_argument("--rounds", type=positive, default=10, help="for --next: rounds of a trial (10)")
    parser.add_argument("--predict-on-batch", action="store_true", help="for --next: the other prediction mode")
    args = parser.parse_args()
    if args.figure and (args.figure.suffix not in (".png", ".svg", ".pdf") or args.figure.is_dir()):
        parser.error(f"--figure {args.figure} must be a file that ends in .png, .svg or .pdf")
    planned = args.cores, args.model, args.data
    if args.next and (not all(planned) or len(args.results) > 1 or args.figure):
        parser.error("--next needs --cores, --model, --data and one results file, and draws no figure")
    if not args.next and any((*planned, args.predict_on_batch)):
        parser.error("--cores, --model, --data and --predict-on-batch go with --next")
    return args


def analyze(args, folder):
    """Print the Markdown; draw the figure, if wanted, in a folder beside its place, then move it there in one step."""
    trials, notes = read(args.results)
    print(end="".join(f"{note}\n" for note in notes), file=sys.stderr)
    if not trials:
        sys.exit(f"analyze.py: no finished trial in {', '.join(args.results)}: run a bench script first")
    markdown, refusals, compared = report(families(trials))
    print(markdown, flush=True)
    if args.figure and not 0 < len(compared) <= MOST_FAMILIES:
        refusals.append(f"no figure: {len(compared)} kinds of machine, model and mode; it shows 1 to {MOST_FAMILIES}")
    elif args.figure:
        drawn = Path(folder, args.figure.name)
        draw(compared).savefig(drawn, dpi=150)
        drawn.replace(args.figure)
    sys.exit("\n".join(refusals) or 0)


def main():
    args = arguments()
    gc.disable()  # many records, no garbage: looking for some takes a sixth of the time
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a sign
    try:
        if args.next:
            return plan(args)
        # Made before the work: if the figure cannot be written there, that is known at once.
        place = TemporaryDirectory(dir=args.figure.parent) if args.figure else nullcontext()
        with place as folder:
            analyze(args, folder)
    except OSError as error:
        sys.exit(f"analyze.py: {error.filename or 'output'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
