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
import gc
import hashlib
import math
import platform
import re
import shlex
import sys
import warnings
from collections import Counter, namedtuple
from dataclasses import field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

SCRIPTS = {  # in the order in which --next lets them take turns
    "serial": ["bench_serial.py"],
    "multiprocessing": ["bench_multiprocessing.py"],
    "multiprocessing+initializer": ["bench_multiprocessing.py", "--initializer"],
    "ray": ["bench_ray.py"],
}
# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = dict(zip(SCRIPTS, ("#56B4E9", "#D55E00", "#E69F00", "#009E73"), strict=True))
PUBLISHED = {"serial": "64 s, 13x", "multiprocessing": "126 s, 25x", "ray": "5 s"}  # ten rounds on 48 cores
NOTES = """# Expensive initialization: Ray, multiprocessing and serial Python

± is the sample standard deviation (ddof = 1) of the trials. Speedup: the other's seconds / Ray's, k-th trial / k-th.
Intervals: 95 % confidence, Student's t; paired where the trials took turns, else unpaired (Welch); of speedups on logs.
Article: 48 physical cores (m5.24xlarge), five trials: Ray 5 s, multiprocessing 126 s (25x), serial 64 s (13x).
A claim holds if the interval of its figure lies above the threshold, and does not hold here if it lies below. Excess:
mean distance from the median, s, less 1.41 times the initializer's; over 0, reloading makes most of the variance.
Share: of the time that Ray saves over multiprocessing, the part that loading once, by an initializer, saves, too.
"""


# Reading. A record that says something impossible ends the analysis: going on would make a wrong number.

From1 = Annotated[int, Field(ge=1, lt=2**63)]
Amount = Annotated[float, Field(ge=0, le=1e12)]  # these bounds refuse NaN, and keep sums and ratios finite
Seconds = Annotated[float, Field(ge=1e-9, le=1e9)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$"), AfterValidator(sys.intern)]  # few differ: each is kept once
checked = dataclass(config=ConfigDict(strict=True), frozen=True, slots=True)  # strict: 1 is no true, "1" is no 1


@checked
class Host:
    name: str
    cpu: str
    physical_cores: From1
    logical_cpus: From1
    memory_bytes: From1
    platform: str
    load: Amount | None = field(compare=False)  # the same machine, however busy


@checked
class Trial:
    """One record of results.jsonl; fields that are not named here are ignored."""

    approach: Literal[tuple(SCRIPTS)]
    num_cpus: From1
    trial: NonNegativeInt
    run: str
    time: AwareDatetime
    seconds: Seconds
    round_seconds: Annotated[list[Seconds], Field(min_length=1)]
    setup_seconds: Amount
    cpu_seconds: Amount | None
    memory_bytes: Amount | None
    restarts: NonNegativeInt
    predict: Literal["predict", "predict_on_batch"]
    images: From1
    accuracy: Annotated[float, Field(ge=0, le=1)]
    predictions: Sha256
    model: Sha256
    data: Literal["mnist", "stand-in", "other"]
    cores: list[NonNegativeInt]
    pinned: bool
    nodes: From1
    start_method: Literal["fork", "spawn", "forkserver"] | None
    host: Host
    versions: Annotated[dict[str, str], Field(min_length=1)]

    def family(self):
        """Return what two trials must share to be compared, but for num_cpus."""
        setting = self.model, self.data, self.predict, self.images, len(self.round_seconds), self.nodes
        return self.host, frozenset(self.versions.items()), *setting


def read(paths):
    """Return (trials in time order, notes on what was skipped) of results files.

    OSError: a file cannot be read. SystemExit: names the file, the line, and what is wrong with it. A torn line is
    skipped: the last one, after a power cut, or not the last one any more when other trials were appended after it.
    A record that stands there twice counts once; a blank line is none.
    """
    record, known, notes = TypeAdapter(Trial), {}, []
    for path in paths:
        with open(path, "rb") as file:
            for count, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    trial = record.validate_json(line.rstrip())
                except ValidationError as error:
                    wrong = error.errors(include_url=False)[0]
                    if line.startswith(b"{") and "EOF while parsing" in wrong["msg"]:
                        notes.append(f"{path}, line {count}: skipped, its end is missing (writing it was cut off)")
                        continue
                    field = ".".join(map(str, wrong["loc"])) or "record"
                    sys.exit(f"analyze.py: {path}, line {count}: {field}: {wrong['msg']}")
                first = known.setdefault((trial.approach, trial.run, trial.trial), trial)
                if first is not trial and first != trial:
                    sys.exit(f"analyze.py: {path}, line {count}: other figures for a trial that stands before")
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
    found = {name: [trial for trial in trials if (trial.approach, trial.restarts) == (name, 0)] for name in SCRIPTS}
    return {name: some for name, some in found.items() if some}


def seconds(trials):
    return [trial.seconds for trial in trials]


def setup(trials):
    return fmean(trial.setup_seconds for trial in trials)


def cores_busy(trials):
    return [trial.cpu_seconds / trial.seconds for trial in trials if trial.cpu_seconds is not None]


def interval(a, b=None, paired=True, level=0.95):
    """Return the confidence interval (low, high) of mean(a), or of mean(a) - mean(b); None if below 2 values.

    By Student's t: of the differences a[k] - b[k] if paired, Welch's if not.
    """
    b = [0.0] * len(a) if b is None else b
    if min(len(a), len(b)) < 2:
        return None
    from scipy import stats

    with warnings.catch_warnings(action="ignore"):  # about equal values, whose interval has no width
        test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
        return tuple(map(float, test.confidence_interval(level)))


Comparison = namedtuple("Comparison", "ratios kind ratio difference")


def compare(a, b, level=0.95):
    """Compare the seconds of trials a with those of b; either may be empty.

    Returns a Comparison: ratios a / b, k-th over k-th; "paired" where the trials took turns (the k-th of each came
    before the next of the other), else "unpaired"; the intervals of ratio and difference a - b (seconds), or None.
    """
    turns = [*zip(a, b[1:], strict=False), *zip(b, a[1:], strict=False)]
    paired = len(a) == len(b) and all(one.time <= later.time for one, later in turns)
    logs = interval([math.log(value) for value in seconds(a)], [math.log(value) for value in seconds(b)], paired, level)
    ratios = [x / y for x, y in zip(seconds(a), seconds(b), strict=False)]
    ratio, difference = logs and [math.exp(limit) for limit in logs], interval(seconds(a), seconds(b), paired, level)
    return Comparison(ratios, "paired" if paired else "unpaired", ratio, difference)


def deviations(values):
    """Return the distances of values from their median; none if fewer than 3, whose distances do not differ.

    Their mean is a measure of spread that a single disturbed trial does not rule, and that Student's t can compare
    (M. B. Brown and A. B. Forsythe, Journal of the American Statistical Association 69, 1974).
    """
    middle = median(values) if values else 0
    return [abs(value - middle) for value in values] if len(values) > 2 else []


def saved_share(pool, initializer, ray):
    """Return a 95 % interval of (pool - initializer) / (pool - ray), mean seconds, or None.

    From 97.5 % intervals of two differences: both contain the true value with 95 % confidence (Bonferroni).
    """
    by_ray, left = compare(pool, ray, 0.975).difference, compare(initializer, ray, 0.975).difference
    if not (by_ray and left) or by_ray[0] <= 0 <= by_ray[1]:
        return by_ray and left and (-math.inf, math.inf)
    shares = [1 - some / saved for some in left for saved in by_ray]
    return (min(shares), max(shares)) if by_ray[0] > 0 else (0.0, 0.0)  # Ray saves nothing: nor does loading once


def claims(family):
    """Judge the article's claims on speed, spread and cores by {num_cpus: here}, on its most cores.

    Returns rows of texts: claim, figure and threshold, 95 % interval, verdict.
    """
    most = max(family)
    serial, pool, initializer, ray = (family[most].get(name, []) for name in SCRIPTS)
    serials = [here["serial"] for here in family.values() if "serial" in here]
    growth = compare(serials[-1], serials[0]).ratio if len(serials) > 1 else None
    least = [1.41 * value for value in deviations(seconds(initializer))]  # twice the variance is 1.41 times the spread
    busy, rows = cores_busy(serial) if most > 1 else [], []
    for claim, figure, threshold, limits in (
        ("Ray beats multiprocessing (25x on 48 cores)", "speedup", 1, compare(pool, ray).ratio),
        ("Ray beats serial (13x on 48 cores)", "speedup", 1, compare(serial, ray).ratio),
        ("multiprocessing does not beat serial", "its seconds / serial's", 1, compare(pool, serial).ratio),
        ("reloading makes multiprocessing's spread", "excess", 0, interval(deviations(seconds(pool)), least, False)),
        ("serial keeps more than one core busy", "cores busy", 1, interval(busy)),
        ("the workload grows with the cores", "serial, most / fewest", 1, growth),
        ("loading is what Ray saves", "share", 0.8, saved_share(pool, initializer, ray)),
    ):
        if not limits:
            verdict = "cannot tell: needs 3 trials of each approach, or more cores"
        elif limits[0] <= threshold <= limits[1]:
            verdict = "cannot tell: needs more trials or a quieter machine"
        else:
            verdict = "holds" if limits[0] > threshold else "does not hold here"
        rows.append([claim, f"{figure} > {threshold}", show_interval(limits), verdict])
    return rows


def doubts(here):
    """Return warnings: threshold, remedy, and the numbers of the approaches that are beyond it."""
    found = {}
    for name, some in here.items():
        values = seconds(some)
        spread = stdev(values) / fmean(values) if len(values) > 1 else 0
        slow = values[0] / median(values[1:]) if len(values) > 2 else 0
        for wrong, what, number in (
            (len(values) < 5, "fewer than 5 trials (run more)", f"{len(values)}"),
            (spread > 0.10, "standard deviation over 10 % of the mean (stop other work)", f"{spread:.0%}"),
            (slow > 1.25, "first trial over 1.25 times the median of the later (run again)", f"{slow:.2f}"),
        ):
            if wrong:
                found.setdefault(what, []).append(f"{name} {number}")
    return [f"{what}: {', '.join(numbers)}" for what, numbers in found.items()]


# Markdown


def show(value):
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def show_interval(limits, kind=""):
    return f"{show(limits[0])} to {show(limits[1])} {kind}".rstrip() if limits else "needs more trials"


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


def size(family):
    return sum(len(some) for here in family.values() for some in here.values())


def title(trial):
    return f"{trial.predict}, {len(trial.round_seconds)} rounds of {trial.images} images a core, data: {trial.data}"


def heading(trials):
    """Return what the trials of a family share, and when they were measured; made-up data loudly.

    The load counts before the first trial: later ones begin while the average remembers the one before.
    """
    one, times = min(trials, key=lambda trial: trial.time), [trial.time for trial in trials]
    host, load = one.host, one.host.load or 0
    machine = f"{host.name}, {host.cpu}, {host.physical_cores} physical cores, {host.logical_cpus} CPUs"
    return (
        f"## {title(one)}\n\n"
        + "**STAND-IN DATA: drawn digits, not MNIST. Say so with every figure.**\n\n" * (one.data == "stand-in")
        + f"- Machine: {plain(machine)}, {host.memory_bytes / 2**30:.1f} GiB, {plain(host.platform)}\n"
        + f"- Versions: {plain(', '.join(map(' '.join, one.versions.items())))}; model {one.model[:12]}\n"
        + f"- Measured: {min(times):%Y-%m-%d %H:%M} to {max(times):%Y-%m-%d %H:%M} UTC, {len(trials)} trials\n"
        + f"- **Warning:** load average over the CPUs at the start (stop other work): {load:.1f}\n"
        * (load > host.logical_cpus)
    )


def comparison(here, rounds):
    """Return a table of the approaches and of Ray's speedup, and when Ray's set-up has paid for itself.

    The article's figures stand beside those of trials that do what it did: predict mode, ten rounds.
    """
    rows, paid = [], []
    for name, some in here.items():
        speedup = limits = ""
        if name != "ray" and "ray" in here:
            found = compare(some, here["ray"])
            speedup, limits = show_mean(found.ratios), show_interval(found.ratio, found.kind)
            if found.ratio and found.ratio[0] <= 1 <= found.ratio[1]:
                limits += ", not distinguishable"
            paid.append(f"against {name} {pays(setup(here['ray']) - setup(some), found.difference, rounds)}")
        workers = 1 if name == "serial" else some[0].num_cpus
        memory = [trial.memory_bytes / workers / 1e6 for trial in some if trial.memory_bytes is not None]
        costs = [show(fmean(values)) if values else "not known" for values in (cores_busy(some), memory, [setup(some)])]
        published = [PUBLISHED.get(name, "")] if (some[0].predict, rounds) == ("predict", 10) else []
        rows.append([name, str(len(some)), show_mean(seconds(some)), speedup, limits, *published, *costs])
    titles = ["approach", "trials", "seconds", "Ray's speedup over it", "95 % interval"]
    titles += ["published, 48 cores"] * len(published) + ["cores busy", "MB a worker", "set-up, s"]
    sentence = f"\nRay's set-up has paid for itself (95 % interval): {'; '.join(paid)}.\n" if paid else ""
    return table(titles, rows) + sentence


def pays(longer, saved, rounds):
    """Return after how many rounds a set-up that takes longer (seconds) is made up for by what a trial saves."""
    if saved and saved[0] > 0:
        return "after {} to {} rounds".format(*(math.ceil(max(0, longer) * rounds / limit) for limit in saved[::-1]))
    return "never" if saved and saved[1] < 0 else "one cannot tell when"


def where(here, rounds):
    """Return a table of where the time of a round goes."""
    _, pool, initializer, ray = (here.get(name, []) for name in SCRIPTS)
    values = [value / rounds for value in seconds(initializer)]
    rows = [["compute: initializer", show_mean(values), show_interval(interval(values))]]
    for part, some in ("reload: multiprocessing - initializer", pool), ("transport: Ray - initializer", ray):
        found = compare(some, initializer)
        mean = show(fmean(seconds(some)) / rounds - fmean(values)) if some and initializer else "not known"
        limits = found.difference and [limit / rounds for limit in found.difference]
        rows.append([part, mean, show_interval(limits, found.kind)])
    return table(["per round", "seconds", "95 % interval"], rows)


def report(trials):
    """Return (Markdown, refusals, [{num_cpus: here}] of what was compared)."""
    parts, refusals, compared = [NOTES], [], []
    for by_cores in families(trials):
        parts.append(heading([trial for group in by_cores.values() for trial in group]))
        family = {}
        for cores, group in by_cores.items():
            here, one = by_approach(group), group[0]
            parts.append(f"### Cores: {cores}" + f", on {one.nodes} nodes: no opponent" * (one.nodes > 1) + "\n")
            if len({trial.predictions for trial in group}) > 1:
                differ = "; ".join(sorted({f"{trial.approach} {trial.predictions}" for trial in group}))
                refusals.append(f"{cores} cores, {one.predict}: not compared, the predictions differ: {differ}")
                parts.append(f"**Refused.** {refusals[-1]}\n")
                continue
            notes = [f"**Warning:** {doubt}" for doubt in doubts(here)]
            for trial in [trial for trial in group if trial.restarts]:
                notes.append(f"Left out: {trial.approach}, {show(trial.seconds)} s, {trial.restarts} workers replaced")
            parts += ["".join(f"- {note}\n" for note in notes)] * bool(notes)
            if here:
                family[cores], rounds = here, len(one.round_seconds)
                parts += [comparison(here, rounds), where(here, rounds)]
        compared += [family] if family else []
        if family and one.nodes == 1:
            parts.append(f"### Claims of the article, on {max(family)} cores\n")
            parts.append(table(["claim", "figure", "95 % interval", "verdict"], claims(family)))
    return "\n".join(parts), refusals, compared


def draw(family):
    """Return a matplotlib Figure of {num_cpus: here}: seconds and, if there are several core counts, Ray's speedup."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    left, *right = figure.subplots(1, 1 + (len(family) > 1), squeeze=False)[0]
    for place, here in enumerate(family.values()):
        for name, some in here.items():
            x, values, colour = place + 0.2 * (list(SCRIPTS).index(name) - 1.5), seconds(some), COLOURS[name]
            left.bar(x, fmean(values), 0.18, yerr=stdev(values) if len(values) > 1 else None, capsize=4, color=colour)
            left.plot([x + 0.04] * len(values), values, ".", color="black", alpha=0.6)
            for axes in right if name != "ray" and "ray" in here else ():
                speedup = compare(some, here["ray"])
                axes.plot(x, fmean(speedup.ratios), "o", color=colour)
                axes.plot([x, x], speedup.ratio or [math.nan] * 2, color=colour)
    bars = [left.bar(0, 0, color=colour) for colour in COLOURS.values()]
    left.legend(bars, COLOURS, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    caption = f"{some[0].host.name}, {some[0].host.cpu}; {size(family)} trials (dots).\n"
    caption += "Bars: mean, sample standard deviation."
    for axes in right:
        axes.axhline(1, color="black", linestyle=":")
        caption += " Right: mean of the ratios, 95 % interval."
    for axes, what in zip([left, *right], ("seconds for a trial", "Ray's speedup (other / Ray)"), strict=False):
        axes.set(xlabel="physical cores used", ylabel=what, xlim=(-0.5, len(family) - 0.5), ylim=(0, None))
        axes.set_xticks(range(len(family)), family)
    figure.suptitle(title(some[0]))
    figure.supxlabel(caption, fontsize="small", parse_math=False)  # a $ in the name of a CPU is no formula
    return figure


# --next


def plan(args):
    """Print the command of the trial that comes next, if any, on stdout, and how far it is on stderr.

    Next is who has the fewest trials, so that a drifting machine hits all alike.
    """
    model = hashlib.sha256(Path(args.model).read_bytes()).hexdigest()
    wanted = platform.node(), model, "predict_on_batch" if args.predict_on_batch else "predict"
    mine = read(path for path in args.results if Path(path).exists())[0]  # no file yet: nothing is done
    mine = [trial for trial in mine if (trial.host.name, trial.model, trial.predict) == wanted]
    mine = [trial for trial in mine if (len(trial.round_seconds), trial.nodes, trial.restarts) == (args.rounds, 1, 0)]
    # Those of other data or versions than the newest one's are compared with none that is still to come.
    mine = [trial for trial in mine if (trial.data, trial.versions) == (mine[-1].data, mine[-1].versions)]
    done = Counter((trial.num_cpus, trial.approach) for trial in mine)
    turns = [(cores, name) for cores in args.cores for name in SCRIPTS]
    total, missing = args.next * len(turns), sum(max(0, args.next - done[turn]) for turn in turns)
    if not missing:
        return print(f"all {total} trials are done", file=sys.stderr)
    cores, name = min(turns, key=lambda turn: done[turn])
    minutes = missing * fmean(trial.setup_seconds + trial.seconds for trial in mine) / 60 if mine else 0
    left = f", about {minutes:.0f} min left" if minutes >= 1 else ""
    print(f"trial {total - missing + 1} of {total}: {name} on {cores} cores{left}", file=sys.stderr)
    command = [*SCRIPTS[name], "--trials", "1", "--num-cpus", str(cores), "--rounds", str(args.rounds)]
    command += ["--model", args.model, "--data", args.data, "--output", args.results[0]]
    print(shlex.join(command + ["--predict-on-batch"] * args.predict_on_batch), flush=True)


# The command line


def positive(value):
    if int(value) < 1:
        raise ValueError
    return int(value)


def core_counts(value):
    return [positive(part) for part in value.split(",")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="*", default=["results.jsonl"], help="default: results.jsonl")
    parser.add_argument("--figure", type=Path, help="draw the setting with the most trials: a .png, .svg or .pdf")
    parser.add_argument("--next", type=positive, metavar="TRIALS", help="print the command of the next trial, if any")
    parser.add_argument("--cores", type=core_counts, help="for --next: core counts, such as 1,2")
    parser.add_argument("--model", help="for --next: the model file")
    parser.add_argument("--data", help="for --next: the data file")
    parser.add_argument("--rounds", type=positive, default=10, help="for --next: rounds of a trial (10)")
    parser.add_argument("--predict-on-batch", action="store_true", help="for --next: the other prediction mode")
    args = parser.parse_args()
    if args.figure and args.figure.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--figure {args.figure} must end in .png, .svg or .pdf")
    planned = args.next, args.cores, args.model, args.data
    if any(planned) and (not all(planned) or len(args.results) > 1 or args.figure):
        parser.error("--next, --cores, --model and --data go together, with one results file, and without --figure")
    return args


def analyze(args):
    """Print the Markdown, and draw the figure if one is wanted."""
    trials, notes = read(args.results)
    print(end="".join(f"{note}\n" for note in notes), file=sys.stderr)
    if not trials:
        sys.exit(f"analyze.py: no finished trial in {', '.join(args.results)}: run a bench script first")
    markdown, refusals, compared = report(trials)
    print(markdown, flush=True)
    if args.figure and compared:
        drawn = args.figure.with_name(f"new-{args.figure.name}")
        draw(max(compared, key=size)).savefig(drawn, dpi=150)
        drawn.replace(args.figure)  # in one step: it is whole, or the old one
    sys.exit("\n".join(refusals) or 0)


def main():
    args = arguments()
    gc.disable()  # many records, no garbage: looking for some takes a third of the time
    try:
        plan(args) if args.next else analyze(args)
    except OSError as error:
        sys.exit(f"analyze.py: {error.filename or 'output'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
