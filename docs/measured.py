"""Write the tables of README.md and docs/*.md from results/, between two comments each.

    <!-- measured: NAME -->     the table goes here; TABLES below says what NAME is
    <!-- end -->

    python docs/measured.py            # write them; draw results/then-and-now.png
    python docs/measured.py --check    # exit status 1 if a table is out of date

Only tables are written here. The sentences around them are written by people: read them again.
"""

import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))
import analyze
from analyze import INITIALIZER, POOL, RAY, SERIAL, compare, markdown_table, three_digits

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main():
    tables = {name: write() for name, write in TABLES.items()}
    out_of_date = []
    for page in PAGES:
        text = page.read_text()
        new_text = re.sub(
            r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)",
            lambda match: match[1] + tables[match[2]] + match[3],
            text,
            flags=re.DOTALL,
        )
        if new_text != text:
            out_of_date.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(new_text)
    if "--check" in sys.argv:
        if out_of_date:
            sys.exit(f"out of date: {', '.join(out_of_date)}: run docs/measured.py")
    else:
        draw_then_and_now().savefig(RESULTS / "then-and-now.png", dpi=150)


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
    """Return "1.92 (1.85 to 1.99)": times as long, and the 95 % interval if there is one."""
    comparison = compare(sample, other)
    if np.isnan(comparison.low):
        return three_digits(comparison.ratio)
    ends = f"{three_digits(comparison.low)} to {three_digits(comparison.high)}"
    return f"{three_digits(comparison.ratio)} ({ends})"


def table(titles, rows):
    return f"\n{markdown_table(titles, rows)}\n"


# README.md


def run():
    """What `python bench_ray.py --rounds 3` has printed."""
    return f"\n```console\n{(RESULTS / 'run.txt').read_text()}```\n\n"


def results():
    """Both stacks beside the published figures."""
    today = most_cores("results.jsonl", array=False, rounds=10)
    then = most_cores("original.jsonl", rounds=50)
    rows = []
    for approach in (SERIAL, POOL, INITIALIZER, RAY):
        tens = analyze.sums_of_tens(then[approach])
        of_ray = analyze.sums_of_tens(then[RAY])
        ratios = [
            ratio(today[approach], today[RAY]),
            three_digits(tens[0] / of_ray[0]),
            three_digits(tens.sum() / of_ray.sum()),
        ]
        if approach == RAY:
            ratios = ["", "", ""]
        row = [
            approach,
            three_digits(today[approach].mean),
            ratios[0],
            three_digits(tens[0]),
            ratios[1],
            three_digits(tens.mean()),
            ratios[2],
            analyze.PUBLISHED.get(approach, ""),
        ]
        rows.append(row)
    titles = [
        "approach",
        "today, s",
        "times Ray's",
        "2019, first ten rounds, s",
        "times Ray's",
        "2019, mean of five tens, s",
        "times Ray's",
        "published, 48 cores",
    ]
    return table(titles, rows)


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
        "median round of the default, s",
        "median of those that do not wait, s",
        "rounds that wait",
        "by, s",
        "times as long as Ray",
    ]
    return table(titles, rows)


def claims():
    """The article's claims on both stacks, against both baselines of serial Python."""
    rows = []
    stacks = {
        "today": most_cores("results.jsonl", array=False, rounds=10),
        "today, --array": most_cores("results.jsonl", array=True, rounds=10),
        "2019, 50 rounds": most_cores("original.jsonl", rounds=50),
    }
    for stack, samples in stacks.items():
        pairs = {
            "Ray is faster than the pool: pool / Ray": (POOL, RAY),
            "Ray is faster than serial: serial / Ray": (SERIAL, RAY),
            "the same, serial on one core": ("serial+one_core", RAY),
            "the pool is not faster than serial: pool / serial": (POOL, SERIAL),
            "the same, serial on one core ": (POOL, "serial+one_core"),
        }
        for claim, (first, second) in pairs.items():
            if first in samples and second in samples:
                comparison = compare(samples[first], samples[second])
                verdict = "not decided"
                if np.isnan(comparison.low):
                    verdict = "one run"
                if comparison.low > 1:
                    verdict = "holds"
                if comparison.high < 1:
                    verdict = "does not hold here"
                text = ratio(samples[first], samples[second])
                rows.append([stack, claim.strip(), text, verdict])
    return table(["stack", "the article's claim", "here", "verdict"], rows)


# docs/why-25x.md


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
                    three_digits(tens[0] / ray_tens[0]),
                    three_digits(tens[-1] / ray_tens[-1]),
                    three_digits(tens.sum() / ray_tens.sum()),
                    per_trial_range(sample, of_ray),
                ]
                rows.append(row)
    titles = [
        "stack",
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
        "range over runs",
    ]
    return table(titles, rows)


def per_trial_range(sample, of_ray):
    """Return the smallest and the largest of the ratios of the runs, the k-th with the k-th."""
    count = min(len(sample.seconds), len(of_ray.seconds))
    ratios = sample.seconds[:count] / of_ray.seconds[:count]
    if count < 2:
        return "one run"
    return f"{three_digits(min(ratios))} to {three_digits(max(ratios))}"


def draw_then_and_now():
    """Draw each round of the first run of fifty on both stacks."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    then = most_cores("original.jsonl", rounds=50)
    now = most_cores("fifty.jsonl", array=False, rounds=50)
    for axes, samples, title in ((left, then, "2019"), (right, now, "today")):
        for approach, sample in samples.items():
            colour = analyze.COLOURS[approach]
            axes.plot(range(1, 51), sample.rounds[0], ".", color=colour, label=approach)
        axes.set_title(title, loc="left")
        axes.set_xlabel("round of one process")
    left.set_ylabel("seconds of a round")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.legend(fontsize="small")
    return figure


TABLES = {
    "run": run,
    "results": results,
    "full": full,
    "waits": waits,
    "claims": claims,
    "stacks": stacks,
}

if __name__ == "__main__":
    main()
