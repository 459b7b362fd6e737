"""Write the tables of README.md and docs/*.md from results/, between two comments each.

    <!-- measured: NAME -->     the table goes here; TABLES below says what NAME is
    <!-- end -->

    python docs/measured.py

Draws results/then-and-now.png and results/length.png, too. The sentences around the tables are
written by people: read them again. tests/test_pages.py says which table is out of date.
"""

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))
import analyze
from analyze import INITIALIZER, POOL, RAY, SERIAL, compare, markdown_table, three_digits

ONE_CORE = "serial+one_core"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main():
    for page, text in pages_with_tables().items():
        page.write_text(text)
    draw_then_and_now().savefig(RESULTS / "then-and-now.png", dpi=150)
    draw_lengths().savefig(RESULTS / "length.png", dpi=150)


def pages_with_tables():
    """Return {path of a page: its text, with the tables of results/}."""
    tables = {name: write() for name, write in TABLES.items()}
    return {
        page: re.sub(
            r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)",
            lambda match: match[1] + tables[match[2]] + match[3],
            page.read_text(),
            flags=re.DOTALL,
        )
        for page in PAGES
    }


def groups(*names, **conditions):
    """Return the Groups of analyze.py in files of results/ that have these conditions."""
    trials = analyze.read_trials([RESULTS / name for name in names])
    chosen = []
    for group in analyze.group_trials(trials):
        assert group.labels_agree
        found = {"num_cpus": group.num_cpus, **vars(group.conditions)}
        if conditions.items() <= found.items():
            chosen.append(group)
    return chosen


def most_cores(*names, **conditions):
    """Return the samples of the one group with the most cores: {approach: Sample}."""
    return max(groups(*names, **conditions), key=lambda group: group.num_cpus).samples


def conditions_line(group):
    """Return a line on the machine, the versions, the data and the day of a group."""
    described = analyze.describe(group.conditions)
    day = datetime.fromtimestamp(group.trials[-1].time, UTC).strftime("%d %B %Y").lstrip("0")
    ray = described.get("ray_version", "no Ray")
    fields = described["machine"], described["versions"], ray, described["data"], day
    return f"{'; '.join(fields)}.\n"


def ratio(sample, other):
    """Return "1.92 (1.85 to 1.99)": times as long, and the 95% interval."""
    comparison = compare(sample, other)
    return with_ends(comparison.ratio, comparison.low, comparison.high)


def with_ends(value, low, high):
    return f"{three_digits(value)} ({three_digits(low)} to {three_digits(high)})"


def table(titles, rows):
    return f"\n{markdown_table(titles, rows)}\n"


def lines_of(name, **conditions):
    """Return those lines of a file of results/ that have these values, as dictionaries."""
    lines = map(json.loads, (RESULTS / name).read_text().splitlines())
    return [line for line in lines if conditions.items() <= line.items()]


def median_rounds(lines):
    """Return the median round of each run, in the order of the runs, an array of seconds."""
    return np.array([np.median(line["round_seconds"]) for line in lines])


def paired_ratio(seconds, other_seconds):
    """Return "1.92 (1.85 to 1.99)": the geometric mean of the ratios of the runs, and its interval.

    The k-th values of both are from the same run.
    """
    logs = np.log(seconds) - np.log(other_seconds)
    low, high = np.exp(stats.ttest_1samp(logs, 0).confidence_interval(0.95))
    return with_ends(np.exp(np.mean(logs)), low, high)


def median_and_range(values):
    """Return "1.92 (1.85 to 1.99)": the median of several runs, the smallest and the largest."""
    return with_ends(np.median(values), min(values), max(values))


# README.md


def run():
    """Two commands, and what they have printed."""
    return f"\n```console\n{(RESULTS / 'run.txt').read_text()}```\n\n"


def results():
    """Both stacks beside the published figures."""
    fifty_rounds = most_cores("original.jsonl", rounds=50)
    columns = {
        "today, ten rounds": (most_cores("results.jsonl", array=False, rounds=10), 1),
        "2019, ten rounds": (most_cores("original.jsonl", rounds=10), 1),
        "2019, per ten of fifty rounds": (fifty_rounds, 5),
    }
    rows = []
    for approach in (SERIAL, POOL, INITIALIZER, RAY):
        row = [approach]
        for samples, tens in columns.values():
            sample = samples[approach]
            mean = three_digits(sample.mean / tens)
            deviation = f"{sample.standard_deviation / tens:#.2g}"
            times_ray = three_digits(compare(sample, samples[RAY]).ratio)
            row.append(f"{mean} ± {deviation} s ({times_ray}x)")
        row.append(analyze.PUBLISHED.get(approach, "not shown"))
        rows.append(row)
    titles = [
        f"{title} ({len(samples[RAY].trials)} runs)" for title, (samples, _) in columns.items()
    ]
    return table(["approach", *titles, "the article, 48 cores, per ten of fifty rounds"], rows)


# docs/measuring.md


def full():
    """The tables of analyze.py."""
    parts = []
    for group in groups("results.jsonl", "fifty.jsonl"):
        call = analyze.describe(group.conditions)["array"]
        cores = analyze.count(group.num_cpus, "core")
        rounds = analyze.count(group.conditions.rounds, "round")
        parts.append(f"\n### {cores}, {rounds}, {call}\n\n")
        parts.append(analyze.comparison_table(group))
        if group.conditions.rounds >= 20:
            parts.append("\n" + analyze.tens_table(group))
        parts.append("\n" + conditions_line(group))
    return "".join(parts) + "\n"


def slow_hour():
    """The tables of analyze.py for five runs when the machine was slow."""
    [group] = groups("slow-hour.jsonl")
    return "\n" + analyze.comparison_table(group) + "\n" + conditions_line(group) + "\n"


def waits():
    """With --array: how many rounds wait for the autotuner, and how much longer they are."""
    rows = []
    for group in groups("results.jsonl", array=True, rounds=10):
        [plain] = groups("results.jsonl", array=False, rounds=10, num_cpus=group.num_cpus)
        for approach, sample in group.samples.items():
            rounds = sample.rounds.ravel()
            short = np.min(rounds)
            waited = rounds > 1.4 * short  # The shortest round has not waited.
            without = np.median(rounds[~waited])
            wait = np.median(rounds[waited]) - without if waited.any() else np.nan
            row = [
                str(group.num_cpus),
                approach,
                three_digits(plain.samples[approach].median_round),
                three_digits(without),
                f"{np.count_nonzero(waited)} of {len(rounds)}",
                "" if np.isnan(wait) else three_digits(wait),
                ratio(sample, group.samples[RAY]) if approach != RAY else "",
            ]
            rows.append(row)
    titles = [
        "cores",
        "approach",
        "median round with a Dataset, s",
        "median `--array` round that does not wait, s",
        "`--array` rounds that wait",
        "how much longer these take, s",
        "`--array`: times as long as Ray",
    ]
    return table(titles, rows)


def claims():
    """The article's claims on both stacks, against both baselines of serial Python."""
    stacks = {
        "today": with_one_core("results.jsonl", array=False),
        "today, --array": with_one_core("results.jsonl", array=True),
        "today, fifty rounds": most_cores("fifty.jsonl", array=False, rounds=50),
        "today, fifty rounds, --array": most_cores("fifty.jsonl", array=True, rounds=50),
        "2019, new pool": most_cores("original.jsonl", rounds=10),
        "2019, fifty rounds": most_cores("original.jsonl", rounds=50),
    }
    claims = [
        ("Ray is faster than the pool", "pool / Ray", POOL, RAY),
        ("Ray is faster than serial", "serial / Ray", SERIAL, RAY),
        ("the same", "serial on one core / Ray", ONE_CORE, RAY),
        ("the pool is not faster than serial", "pool / serial", POOL, SERIAL),
        ("the same", "pool / serial on one core", POOL, ONE_CORE),
    ]
    rows = []
    for stack, samples in stacks.items():
        for claim, quotient, first, second in claims:
            if not {first, second} <= samples.keys():
                continue
            comparison = compare(samples[first], samples[second])
            verdict = "not decided"
            if comparison.low > 1:
                verdict = "holds"
            if comparison.high < 1:
                verdict = "does not hold here"
            here = ratio(samples[first], samples[second])
            rows.append([stack, claim, quotient, here, verdict])
    return table(["software", "the article's claim", "ratio", "on our machine", "verdict"], rows)


def with_one_core(name, **conditions):
    """Return the samples of the most cores, and one of serial Python on a single core.

    On one core, a round is one batch. So its seconds count as often as there are cores.
    """
    [one_core] = groups(name, rounds=10, num_cpus=1, **conditions)
    samples = most_cores(name, rounds=10, **conditions)
    cores = samples[SERIAL].trials[0].num_cpus
    trials = []
    for trial in one_core.samples[SERIAL].trials:
        round_seconds = [cores * seconds for seconds in trial.round_seconds]
        changed = {"approach": ONE_CORE, "round_seconds": round_seconds}
        trials.append(trial.model_copy(update=changed))
    return {**samples, ONE_CORE: analyze.Sample(trials)}


def parts():
    """What a call pays for reloading, step by step, beside what it pays in all."""
    lines = lines_of("overhead.jsonl", experiment="parts")
    seconds = {
        name: np.array([line[name] for line in lines])
        for name in lines[0]
        if name.endswith("_seconds")
    }
    tracing = seconds["first_predict_seconds"] - seconds["second_predict_seconds"]
    steps = {
        "pinning the process": seconds["pin_seconds"],
        "`load_model`": seconds["load_model_seconds"],
        "reading the test images": seconds["read_needed_seconds"],
        "reading the other three arrays, which no call uses": seconds["read_unneeded_seconds"],
        "dividing by 255, making the Dataset": seconds["prepare_seconds"],
        "tracing: the first `predict` minus the second": tracing,
    }
    measured = seconds["pool_round_seconds"] - seconds["initializer_round_seconds"]
    steps["sum of these steps"] = sum(steps.values())
    steps["measured r: the reloading pool's round minus the initializer's"] = measured
    rows = [
        [step, median_and_range(values), f"{np.median(values / measured):.0%}"]
        for step, values in steps.items()
    ]
    return table(["step", "s", "share of r"], rows)


def length():
    """Pools that reload and that do not, for calls of several lengths."""
    rows = [
        [
            f"{size:,}",
            three_digits(np.median(loaded)),
            three_digits(np.median(reloading)),
            paired_ratio(reloading, loaded),
            three_digits(np.median(predicted)),
        ]
        for size, reloading, loaded, predicted in lengths()
    ]
    titles = [
        "images in a step",
        "t: round of the pool with an initializer, s",
        "round of the reloading pool, s",
        "ratio of the two",
        "1 + r/t",
    ]
    return table(titles, rows)


def lengths():
    """Yield the number of images in a step, the median rounds of both pools, and 1 + r/t.

    r is from the rounds with 32 images in a step, and the same for all lengths.
    """
    lines = lines_of("overhead.jsonl", experiment="length")
    rounds = {}
    for line in lines:
        rounds.setdefault((line["what"], line["batch_size"]), []).append(line)
    rounds = {key: median_rounds(found) for key, found in rounds.items()}
    r = rounds[POOL, 32] - rounds[INITIALIZER, 32]
    for size in sorted({line["batch_size"] for line in lines}):
        loaded = rounds[INITIALIZER, size]
        yield size, rounds[POOL, size], loaded, 1 + r / loaded


def draw_lengths():
    """Draw the measured pool / initializer of each run over the length of a call, and 1 + r/t."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    measured = list(lengths())
    for size, reloading, loaded, _ in measured:
        ratios = reloading / loaded
        axes.plot(loaded, ratios, "o", markersize=4, color=analyze.COLOURS[POOL])
        axes.annotate(
            f"{size:,} images in a step",
            (np.median(loaded), np.median(ratios)),
            xytext=(20, 4),
            textcoords="offset points",
            fontsize="small",
            va="center",
        )

    _, reloading, longest, _ = measured[0]  # 32 images in a step
    _, _, shortest, _ = measured[-1]
    r = np.median(reloading - longest)
    t = np.linspace(0.8 * np.min(shortest), 2 * np.max(longest), 100)
    axes.plot(t, 1 + r / t, color="black", linewidth=1, label="1 + r/t")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("t: seconds for a round that does not reload")
    axes.set_ylabel("pool / initializer")
    axes.legend()
    return figure


def beside():
    """Threads, executors, and a pool beside Ray: each with what it took turns with."""
    comparisons = [
        ("threads", "threads", INITIALIZER),
        ("threads", SERIAL, INITIALIZER),
        ("executors", "executors", INITIALIZER),
        ("idle", "beside idle Ray", "beside suspended Ray"),
    ]
    names = {
        "threads": "one process with a thread and a model for each core",
        SERIAL: "serial, on all cores",
        "executors": "a list of executors of one worker, each with a model of its own",
        "beside idle Ray": "multiprocessing+initializer beside an idle Ray",
        "beside suspended Ray": "the same beside a suspended Ray",
    }
    rows = []
    for experiment, first, second in comparisons:
        seconds, other_seconds = (
            median_rounds(lines_of("overhead.jsonl", experiment=experiment, what=what))
            for what in (first, second)
        )
        row = [
            names[first],
            names.get(second, second),
            three_digits(np.median(seconds)),
            three_digits(np.median(other_seconds)),
            paired_ratio(seconds, other_seconds),
        ]
        rows.append(row)
    return table(["A", "B", "A, s", "B, s", "A / B"], rows)


def memory():
    """What each bench script takes, with all its processes."""
    rows = []
    for approach in (SERIAL, POOL, INITIALIZER, RAY):
        lines = lines_of("overhead.jsonl", experiment="memory", what=approach)
        of_ray = np.array([line["memory_of_ray_bytes"] for line in lines]) / 1e6
        row = [
            approach,
            median_and_range(np.array([line["memory_bytes"] for line in lines]) / 1e6),
            median_and_range(of_ray) if approach == RAY else "",
            str(int(np.median([line["processes"] for line in lines]))),
        ]
        rows.append(row)
    return table(["approach", "MB", "of which Ray's own processes", "processes"], rows)


# docs/why-25x.md


def growth():
    """What the stateless call takes and leaves behind, again and again in one process."""
    tens = [(2, 10), (11, 20), (21, 30), (31, 40), (41, 50)]
    rows = []
    for (tensorflow, variant), runs in runs_of_growth().items():
        row = [tensorflow, variant or "the article's call", str(len(runs))]
        for first, last in tens:
            medians = [
                np.median([line["seconds"] for line in run if first <= line["call"] <= last])
                for run in runs
                if len(run) >= last
            ]
            row.append(median_and_range(medians) if medians else "")
        for name, unit in (("operations", 1), ("objects", 1), ("resident_bytes", 1e6)):
            row.append(", ".join(median_after(runs, call, name, unit) for call in (2, 10, 40)))
        rows.append(row)
    titles = [
        "TensorFlow",
        "variant",
        "runs",
        *[f"calls {first} to {last}, s" for first, last in tens],
        "operations after calls 2, 10, 40",
        "Python objects after these calls",
        "MB after these calls",
    ]
    return table(titles, rows)


def runs_of_growth():
    """Return the runs of growth.py that have no profile.

    Returns {(version, variant): [the lines of a run, ...]}.
    """
    lines = lines_of("growth.jsonl")
    profiled = {line["run"] for line in lines if line["profile"]}
    flags = ["clear_session", "fresh_session", "without_autotuner", "collect"]
    runs = {}
    for line in lines:
        if line["run"] not in profiled:
            variant = ", ".join(flag for flag in flags if line[flag])
            found = runs.setdefault((line["tensorflow"], variant), {})
            found.setdefault(line["run"], []).append(line)
    return {key: list(found.values()) for key, found in sorted(runs.items())}


def median_after(runs, call, name, unit):
    """Return the median over the runs of what was counted after a call."""
    values = [line[name] for run in runs for line in run if line["call"] == call]
    if None in values:
        return "none"
    return f"{np.median(values) / unit:,.0f}"


def imported():
    """Calls of a new process that begins with the graph of 39 earlier calls."""
    places = {
        "import_graph": "in the default graph",
        "import_apart": "in another graph",
    }
    rows = []
    for flag, place in places.items():
        lines = lines_of("imported.jsonl", **{flag: True})
        calls = [[line for line in lines if line["call"] == number] for number in (1, 2, 3)]
        row = [place, str(len(calls[0]))]
        for call in calls:
            row.append(median_and_range([line["seconds"] for line in call]))
        row.append(f"{calls[2][0]['operations']:,}")
        row.append(f"{np.median([line['objects'] for line in calls[2]]):,.0f}")
        row.append(f"{np.median([line['resident_bytes'] for line in calls[2]]) / 1e6:,.0f}")
        rows.append(row)
    titles = [
        "the earlier graph is",
        "runs",
        *[f"call {number}, s" for number in (1, 2, 3)],
        "operations in the default graph",
        "Python objects",
        "MB",
    ]
    return table(titles, rows)


def profile():
    """Where calls spend their time, by cProfile, under TensorFlow 1.13.1."""
    calls = [line for line in lines_of("growth.jsonl") if line["profile"]]
    names = {
        "ExtendSession": "ExtendSession",
        "TF_SessionRun_wrapper": "Session.run",
        "TF_SessionMakeCallable": "making the step",
        "TF_SessionRunCallable": "the steps",
    }
    rows = []
    for function, part in (("load_model", "load_seconds"), ("predict", "predict_seconds")):
        rest = np.array([call[part] for call in calls])
        for name, title in names.items():
            if name in calls[0]["profile"][function]:
                found = [call["profile"][function][name] for call in calls]
                seconds = np.array([own for _, own in found])
                rest = rest - seconds
                rows.append(
                    [f"`{function}`: {title}, {analyze.count(found[0][0], 'time')}", *seconds]
                )
        rows.append([f"`{function}`: the rest", *rest])
    rows.append(["reading the data", *(sum(call["read_seconds"].values()) for call in calls)])
    rows.append(["the whole call", *(call["seconds"] for call in calls)])
    rows = [
        [title, *map(three_digits, seconds), three_digits(seconds[-1] - seconds[0])]
        for title, *seconds in rows
    ]
    numbers = [call["call"] for call in calls]
    titles = [f"call {number}, s" for number in numbers]
    growth = f"call {numbers[-1]} minus call {numbers[0]}, s"
    return table(["where", *titles, growth], rows)


def per_operation():
    """Seconds of the two C functions for each operation of the graph that they have to prepare."""
    rows = []
    for call in (line for line in lines_of("growth.jsonl") if line["profile"]):
        row = [str(call["call"]), f"{call['operations']:,}"]
        for name in ("ExtendSession", "TF_SessionRun_wrapper"):
            found = [part.get(name, [0, 0]) for part in call["profile"].values()]
            count = sum(calls for calls, _ in found)
            seconds = sum(own for _, own in found)
            row.append(three_digits(1e6 * seconds / count / call["operations"]))
        rows.append(row)
    titles = [
        "call",
        "operations in the graph",
        "ExtendSession, µs for each operation",
        "Session.run, µs for each operation",
    ]
    return table(titles, rows)


def new_pools():
    """2019: ten rounds in a pool of their own, as the article shows them."""
    [group] = groups("original.jsonl", rounds=10)
    of_ray = group.samples[RAY]
    of_pool = group.samples[POOL]
    rows = [
        [
            approach,
            str(len(sample.trials)),
            three_digits(sample.mean),
            three_digits(np.median(sample.rounds[:, 0])),
            three_digits(np.median(sample.rounds[:, -1])),
            ratio(sample, of_ray) if approach != RAY else "",
            ratio(sample, of_pool) if approach != POOL else "",
        ]
        for approach, sample in group.samples.items()
    ]
    titles = [
        "approach",
        "runs",
        "seconds for ten rounds",
        "first round, s",
        "tenth round, s",
        "times as long as Ray",
        "times as long as the pool",
    ]
    return table(titles, rows) + "\n" + conditions_line(group)


def stacks():
    """The protocol of the published benchmark: fifty rounds in one process."""
    rows = []
    for stack, name in (("2019", "original.jsonl"), ("today", "fifty.jsonl")):
        for group in groups(name, rounds=50):
            of_ray = group.samples[RAY]
            ray_tens = analyze.sums_of_tens(of_ray)
            call = "--array" if group.conditions.array and stack == "today" else ""
            for approach, sample in group.samples.items():
                tens = analyze.sums_of_tens(sample)
                row = [
                    f"{stack} {call}".strip(),
                    approach,
                    str(len(sample.trials)),
                    *map(three_digits, tens[[0, 1, 2, 3, 4]]),
                    three_digits(tens[0] / ray_tens[0]) if approach != RAY else "",
                    three_digits(tens[-1] / ray_tens[-1]) if approach != RAY else "",
                    ratio(sample, of_ray) if approach != RAY else "",
                ]
                rows.append(row)
    titles = [
        "software",
        "approach",
        "runs",
        "rounds 1-10, s",
        "11-20",
        "21-30",
        "31-40",
        "41-50",
        "first ten / Ray's",
        "last ten / Ray's",
        "all / Ray's",
    ]
    return table(titles, rows)


def draw_then_and_now():
    """Draw each round of the runs of fifty, on both stacks."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    then = most_cores("original.jsonl", rounds=50)
    now = most_cores("fifty.jsonl", array=False, rounds=50)
    for axes, samples, title in ((left, then, "2019"), (right, now, "today")):
        for approach, sample in samples.items():
            colour = analyze.COLOURS[approach]
            axes.plot(range(1, 51), sample.rounds.T, ".", markersize=3, color=colour)
            axes.plot([], [], ".", color=colour, label=approach)
        axes.set_title(title, loc="left")
        axes.set_xlabel("round")
    left.set_ylabel("seconds for a round")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    right.legend(*left.get_legend_handles_labels(), fontsize="small")
    return figure


TABLES = {
    "run": run,
    "results": results,
    "full": full,
    "slow_hour": slow_hour,
    "waits": waits,
    "claims": claims,
    "parts": parts,
    "length": length,
    "beside": beside,
    "memory": memory,
    "new_pools": new_pools,
    "stacks": stacks,
    "growth": growth,
    "imported": imported,
    "profile": profile,
    "per_operation": per_operation,
}

if __name__ == "__main__":
    main()
