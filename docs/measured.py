"""Write all that was measured into README.md and docs/*.md, between `<!-- measured: NAME -->` and `<!-- end -->`.

python docs/measured.py            # from results/; after new measurements; draws results/then-and-now.png, too
python docs/measured.py --check    # exit status 1 if a page is out of date
"""

import json
import sys
import textwrap
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))

import analyze
from analyze import INITIALIZER, POOL, RAY, SERIAL, show, table

CLEARED = "multiprocessing+clear_session"
MODES = ["predict", "predict_array", "predict_on_batch"]


# What results/ holds


def samples(name, mode, num_cpus=None):
    """Return {approach: analyze.Sample} of results/NAME in one mode, on num_cpus or the most cores."""
    trials = [trial for trial in analyze.read([RESULTS / name]) if trial.mode == mode]
    num_cpus = num_cpus or max(trial.num_cpus for trial in trials)
    _, refused, compared = analyze.report([trial for trial in trials if trial.num_cpus == num_cpus])
    assert not refused, refused
    [here] = compared.values()  # One group, or the file mixes what cannot be compared.
    return here


def where(here):
    """Return a sentence on the machine, the versions, the data and the day of some samples."""
    trial = here[RAY].trials[0]
    data = "MNIST" if trial.data == analyze.MNIST else "NOT MNIST"
    names = {"python": "Python", "tensorflow": "TensorFlow", "keras": "Keras", "numpy": "NumPy", "ray": "Ray"}
    versions = ", ".join(f"{names[name]} {trial.versions[name]}" for name in names)
    return f"{trial.machine}; {versions}; {data}; {time.strftime('%d %B %Y', time.gmtime(trial.time)).lstrip('0')}"


def times(sample, other):
    """Return how many times as long, and the 95 % interval, as text without method and spread."""
    value, interval, _ = analyze.compare(sample, other)
    return value.partition(" ±")[0], interval.partition(",")[0]


def tens(sample):
    """Return the seconds of each ten rounds, in order, of a sample's one run."""
    [rounds] = sample.rounds
    return rounds.reshape(-1, 10).sum(axis=1)


# Blocks


def protocol(modes=("predict_array",), approaches=(SERIAL, POOL, CLEARED, INITIALIZER, RAY)):
    """Return the table of both stacks by the original's protocol: one process, fifty rounds."""
    rows = []
    stacks = [("2019", samples("original.jsonl", "predict_array"))]
    stacks += [(f"today, `{mode}`", samples("fifty.jsonl", mode)) for mode in modes]
    for stack, here in stacks:
        of_ray = tens(here[RAY])
        for name, sample in here.items():
            if name in approaches:
                seconds = tens(sample)
                ratios = [seconds[0] / of_ray[0], seconds[-1] / of_ray[-1], seconds.sum() / of_ray.sum()]
                rows.append([stack, name, *map(show, seconds), *map(show, ratios)])
    titles = ["stack", "approach", "rounds 1-10, s", "11-20", "21-30", "31-40", "41-50"]
    return table([*titles, "first ten / Ray's", "last ten / Ray's", "all / Ray's"], rows)


def growth_runs():
    """Return the runs in results/growth.jsonl, each a list of calls: {(version, variant, calls): [run, ...]}."""
    runs = {}
    for line in (RESULTS / "growth.jsonl").read_text().splitlines():
        call = json.loads(line)
        runs.setdefault(call["run"], []).append(call)
    kinds = {}
    for run in runs.values():
        variant = ""
        if run[0]["clear_session"]:
            variant = "clear_session()"
        elif run[0]["collect"]:
            variant = "gc.collect()"
        elif any("profile" in call for call in run):
            variant = "profiled"
        kinds.setdefault((run[0]["tensorflow"], variant, len(run)), []).append(run)
    return dict(sorted(kinds.items(), key=lambda kind: [int(x) for x in kind[0][0].split(".")]))


def growth():
    """Return the table of what the stateless calls of one process leave behind, version by version."""
    rows = []
    for (version, variant, count), runs in growth_runs().items():
        if variant != "profiled":
            numbers = [2, 10, 50]
            if count > 50:
                fall = 1 + np.argmin(np.diff([call["objects"] for call in runs[0]]))
                numbers = [fall, fall + 1, count]
            middle = {
                name: [np.median([run[number - 1][name] or 0 for run in runs]) for number in numbers]
                for name in ("operations", "resident_bytes", "objects")
            }
            operations = ", ".join(f"{number:.0f}" for number in middle["operations"])
            if runs[0][0]["operations"] is None:
                operations = "none to count"
            row = [version, variant, str(len(runs))]
            for name in ("load_seconds", "predict_seconds"):
                second, last = (np.median([run[number - 1][name] for run in runs]) for number in (2, count))
                row += [show(second), show(last)]
            megabytes = ", ".join(f"{size / 1e6:.0f}" for size in middle["resident_bytes"])
            objects = ", ".join(f"{number:.0f}" for number in middle["objects"])
            rows.append([*row, ", ".join(map(str, numbers)), operations, megabytes, objects])
    titles = [
        "TensorFlow",
        "variant",
        "runs",
        "load in call 2, s",
        "in the last",
        "predict in call 2, s",
        "in the last",
    ]
    return table([*titles, "after calls", "operations", "MB", "Python objects"], rows)


def profile():
    """Return the table of the profiled calls: in which parts of load_model and of predict their seconds pass."""
    [[run]] = [runs for (_, variant, _), runs in growth_runs().items() if variant == "profiled"]
    calls = [call for call in run if "profile" in call]
    names = {
        "ExtendSession": "ExtendSession",
        "Session.run": "TF_SessionRun_wrapper",
        "making the step": "TF_SessionMakeCallable",
        "the 313 steps": "TF_SessionRunCallable",
    }
    parts = {}
    for part in ("load_model", "predict"):
        for name, function in names.items():
            found = [call["profile"][part].get(function, [0, 0.0]) for call in calls]
            if any(count for count, _ in found):
                parts[f"`{part}`: {name} ({found[0][0]} times)"] = [seconds for _, seconds in found]
        parts[f"`{part}`: the rest"] = [call["other_seconds"][part] for call in calls]
    parts["reading the data"] = [call["other_seconds"]["data"] for call in calls]
    rows = [[name, *map(show, seconds), show(seconds[-1] - seconds[0])] for name, seconds in parts.items()]
    totals = [call["seconds"] for call in calls]
    more = totals[-1] - totals[0]
    rows.append(["the whole call, by the clock", *map(show, totals), show(more)])
    loading = sum(seconds[-1] - seconds[0] for name, seconds in parts.items() if "load_model" in name)
    walking = sum(
        seconds[-1] - seconds[0] for name, seconds in parts.items() if "ExtendSession" in name or "Session.run" in name
    )
    steps = next(seconds[-1] - seconds[0] for name, seconds in parts.items() if "313 steps" in name)
    text = (
        f"Of the {show(more)} s by which the last of these calls is longer than the first, {walking / more:.0%} are in "
        f"`ExtendSession` and `Session.run`, {loading / more:.0%} in `load_model`, and {abs(steps) / more:.1%} in the 313 steps."
    )
    titles = ["where", *[f"call {call['call']}, s" for call in calls], "growth, s"]
    return f"{table(titles, rows)}\n{textwrap.fill(text, 145)}\n"


def run_output():
    """Return what a short run has printed."""
    return f"```\n{(RESULTS / 'run.txt').read_text()}```\n"


def full():
    """Return the tables and warnings that analyze.py prints about results/results.jsonl; headings are a level down."""
    text, refused, compared = analyze.report(analyze.read([RESULTS / "results.jsonl"]))
    assert not refused, refused
    lines = []
    for line in text.removeprefix(analyze.DEFINITIONS).splitlines():
        if line.startswith("## "):
            lines += ["", f"#{line}", ""]
        elif line.startswith("|"):
            lines.append(line)
        elif "**warning:**" in line:
            lines += ["", line]
    return "\n".join([f"{where(list(compared.values())[-1])}.", *lines, ""])


def today():
    """Return the README's table: ten rounds on today's stack, in two modes."""
    here, batch = (samples("results.jsonl", mode) for mode in ("predict", "predict_on_batch"))
    rows = []
    for name, sample in here.items():
        ratios = []
        for one, of_ray in ((sample, here[RAY]), (batch[name], batch[RAY])):
            ratios.append("")
            if name != RAY:
                ratios[-1] = "{} ({})".format(*times(one, of_ray))
        row = [name, show(sample.setup), show(sample.mean, sample.spread), ratios[0], analyze.PUBLISHED.get(name, "")]
        rows.append([*row, show(batch[name].mean, batch[name].spread), ratios[1]])
    titles = ["approach", "set-up (`predict`), s", "`predict`: s of ten rounds", "Ray's speedup", "published, 48 cores"]
    titles += ["`predict_on_batch`: s of ten rounds", "Ray's speedup"]
    return f"{table(titles, rows)}\n{where(here)}.\n"


def findings():
    then, now = samples("original.jsonl", "predict_array"), samples("fifty.jsonl", "predict_array")
    pool, cleared, ray = (tens(then[name]) for name in (POOL, CLEARED, RAY))
    today_pool = tens(now[POOL]) / tens(now[RAY])
    one, array, batch = (samples("results.jsonl", mode) for mode in MODES)
    initializer = [" times (".join(times(here[INITIALIZER], here[RAY])) for here in (one, batch)]
    reload = [" times (".join(times(here[POOL], here[RAY])) for here in (one, batch, array)]
    bullets = [
        f"**On the stack of May 2019 a pool that reloads gets slower and slower.** By the original's protocol (one "
        f"process, fifty rounds) it takes {show(pool[0] / ray[0])} times as long as Ray in its first ten rounds, "
        f"{show(pool[-1] / ray[-1])} times in its last ten, {show(pool.sum() / ray.sum())} times overall. With one line added, "
        f"`clear_session()`, the ratios are {show(cleared[0] / ray[0])} and {show(cleared[-1] / ray[-1])}. Part of the "
        f"published 25x may be this leak; how much, two cores cannot tell. [The evidence](docs/why-25x.md).",
        f"**Today there is no such growth.** By the same protocol, the ratio is {show(today_pool[0])} in "
        f"the first ten rounds and {show(today_pool[-1])} in the last ten.",
        f"**The price of loading remains.** In trials of ten rounds the pool that reloads takes {reload[0]}) as long as Ray "
        f"in mode `predict`, {reload[1]}) in `predict_on_batch`, and {reload[2]}) with the article's exact "
        f"call, `model.predict(x_test)` (`predict_array`), in which a wait for TensorFlow's autotuner comes and goes: the jumps in "
        f"the figure.",
        f"**A pool with an initializer makes Ray unnecessary here.** It takes {initializer[0]}) as long as Ray in `predict` "
        f"and {initializer[1]}) in `predict_on_batch`. Its set-up takes {show(one[INITIALIZER].setup)} s, Ray's "
        f"{show(one[RAY].setup)} s.",
        f"All this is from two cores, not from 48. Ranges are 95 % intervals from {len(one[RAY].seconds)} trials; ratios of "
        f"ten rounds without a range are from one run each.",
    ]
    return "".join(textwrap.fill(x, 145, initial_indent="- ", subsequent_indent="  ") + "\n" for x in bullets)


def overhead():
    """Return what `make benchmark` has found, by name."""
    lines = (RESULTS / "overhead.jsonl").read_text().splitlines()
    return {found["what"]: found for found in map(json.loads, lines)}


def choose():
    """Return the numbers behind a choice, for the mode predict."""
    here = samples("results.jsonl", "predict")
    compute = np.median(here[INITIALIZER].rounds)
    reload = np.median(here[POOL].rounds) - compute
    longer = here[RAY].setup - here[POOL].setup
    saved = (here[POOL].mean - here[RAY].mean) / here[RAY].rounds.shape[1]
    whole = {name: show(sample.setup + sample.mean) for name, sample in here.items()}
    found = overhead()
    memory = {what: one["megabytes"] / 1000 for what, one in found.items() if "megabytes" in one}
    ray, idle = found["memory: bench_ray.py --address local"], found["pool with initializer, Ray idle / stopped"]
    text = (
        f"Here, in mode `predict`, a call computes for t = {show(compute)} s, and reloading adds r = {show(reload)} s: the plain "
        f"pool takes 1 + r/t = {show(1 + reload / compute)} times as long as one with an initializer. Set-up and ten rounds "
        f"together take the plain pool {whole[POOL]} s, the pool with an initializer {whole[INITIALIZER]} s, Ray {whole[RAY]} s. "
        f"Against the plain pool, Ray's longer set-up pays for itself after {np.ceil(longer / saved):.0f} rounds. Two workers "
        f"and all the rest take {show(memory['memory: bench_multiprocessing.py --initializer'])} GB of memory in the pool and "
        f"{show(ray['megabytes'] / 1000)} GB with Ray, of which {show(ray['of_ray'] / 1000)} GB are Ray's own "
        f"{ray['processes_of_ray']} processes. While these are idle, a pool beside them takes {show(idle['ratio'])} times "
        f"({show(idle['low'])} to {show(idle['high'])}) as long as while they are stopped ({idle['pairs']} pairs of rounds)."
    )
    return textwrap.fill(text, 145) + "\n"


def effects():
    """Return the table of what `make benchmark` has measured."""
    rows = []
    for what, found in overhead().items():
        if "ratio" in found:
            interval = f"{show(found['low'])} to {show(found['high'])}"
            seconds = f"{show(found['seconds'])} / {show(found['other_seconds'])}"
            rows.append([what, show(found["ratio"]), interval, seconds, str(found["pairs"])])
        else:
            rows.append([what, f"{found['megabytes']:.0f} MB", "", "", ""])
    return table(["what", "ratio of medians, or memory", "95 % interval", "seconds", "pairs"], rows)


def verdicts():
    """Return the table of the article's claims, judged by our results on all cores."""
    rows = []
    for mode in MODES:
        here = samples("results.jsonl", mode)
        for claim, figure, (value, interval, (low, high)) in (
            ("Ray beats multiprocessing", "multiprocessing / Ray", analyze.compare(here[POOL], here[RAY])),
            ("Ray beats serial", "serial / Ray", analyze.compare(here[SERIAL], here[RAY])),
            ("multiprocessing does not beat serial", "pool / serial", analyze.compare(here[POOL], here[SERIAL])),
        ):
            verdict = "cannot tell"
            if low > 1:
                verdict = "holds"
            elif high < 1:
                verdict = "does not hold here"
            rows.append([f"`{mode}`", claim, f"{figure} > 1", value, interval, verdict])
    here, alone = samples("results.jsonl", "predict"), samples("results.jsonl", "predict", 1)
    batch = here[SERIAL].seconds / here[SERIAL].trials[0].num_cpus
    verdict = "cannot tell"
    if max(batch) < min(alone[SERIAL].seconds):
        verdict = "holds"
    elif min(batch) > max(alone[SERIAL].seconds):
        verdict = "does not hold here"
    value = show(np.mean(batch) / alone[SERIAL].mean)
    rows.append(
        ["`predict`", "TensorFlow parallelizes serial", "a batch on all cores / on 1 < 1", value, "all trials", verdict]
    )
    return table(["mode", "claim", "holds if", "here", "95 % interval", "verdict"], rows)


def draw():
    """Return the Figure of every round of both stacks, side by side, by the original's protocol."""
    figure = analyze.matplotlib.figure.Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, file, title in zip(panels, ("original.jsonl", "fifty.jsonl"), ("2019", "today"), strict=True):
        here = samples(file, "predict_array")
        versions = here[RAY].trials[0].versions
        for name in (POOL, CLEARED, INITIALIZER, RAY):
            if name in here:
                [rounds] = here[name].rounds
                panel.plot(range(1, len(rounds) + 1), rounds, ".-", color=analyze.COLOURS[name], label=name)
        title = f"{title}: TensorFlow {versions['tensorflow']}, Ray {versions['ray']}"
        panel.set(title=title, xlabel="round", yscale="log")
        panel.grid(axis="y", alpha=0.3)
    panels[0].set(ylabel="seconds of a round")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle("One process, fifty rounds, model.predict(x_test)")
    return figure


def stacks():
    """Return the table of both stacks, with what it says in words, and where the rows of 2019 were measured."""
    then = samples("original.jsonl", "predict_array")
    pool, cleared, ray = (tens(then[name]) for name in (POOL, CLEARED, RAY))
    price, growing = cleared.sum() / ray.sum(), pool.sum() / cleared.sum()
    quiet = samples("fifty.jsonl", "predict")
    steady = tens(quiet[POOL]) / tens(quiet[RAY])
    text = (
        f"Over fifty rounds {show(pool.sum() / ray.sum())} = {show(price)} (loading the model and the data, and a first predict, in "
        f"every call) x {show(growing)} (growth). The five tens of the pool of 2019 have a standard deviation (`np.std`) of "
        f"{np.std(pool) / np.mean(pool):.0%} of their mean; with `clear_session()` it is {np.std(cleared) / np.mean(cleared):.0%}. "
        f"Today's rows contain a wait for the autotuner that comes and goes ([modes](measuring.md#modes)); in mode "
        f"`predict`, which has no such wait, the pool takes {show(steady[0])} times as long as Ray in the first ten rounds and {show(steady[-1])} times in "
        f"the last. 2019: {where(then)}. Today's: see [measuring](measuring.md#results-in-full)."
    )
    return f"{protocol(approaches=(POOL, CLEARED, INITIALIZER, RAY))}\n{textwrap.fill(text, 145)}\n"


PAGES = {
    "README.md": {"findings": findings, "choose": choose, "run": run_output, "today": today, "stacks": protocol},
    "docs/measuring.md": {"effects": effects, "results": full, "verdicts": verdicts},
    "docs/why-25x.md": {"stacks": stacks, "profile": profile, "growth": growth},
}


def main():
    outdated = []
    for page, blocks in PAGES.items():
        old = (ROOT / page).read_text()
        new = old
        for name, block in blocks.items():
            start, end = f"<!-- measured: {name} -->\n", "<!-- end -->"
            before, found, rest = new.partition(start)
            assert found and end in rest, f"{page} has no place for {name}"
            new = f"{before}{start}{block()}{end}{rest.partition(end)[2]}"
        if new != old:
            outdated.append(page)
        if "--check" not in sys.argv:
            (ROOT / page).write_text(new)
    if "--check" not in sys.argv:
        draw().savefig(RESULTS / "then-and-now.png", dpi=150)
    elif outdated:
        sys.exit(f"out of date: {', '.join(outdated)}: run python docs/measured.py")


if __name__ == "__main__":
    main()
