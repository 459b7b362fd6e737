"""Write all that was measured into README.md and docs/*.md, between `<!-- measured: NAME -->` and `<!-- end -->`.

python docs/measured.py            # from results/; after new measurements
python docs/measured.py --check    # exit status 1 if a page is out of date
"""

import contextlib
import io
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import analyze

POOL = "multiprocessing"
TITLES = ["approach", "trials", "seconds of ten rounds", "Ray's speedup", "95 % interval", "set-up, s", "published"]
SLOWER = "rounds 8 to 10 / 2 to 4"


def samples(name, mode="predict"):
    """Return the trials on the most cores, {approach: analyze.Sample}, of results/NAME in one mode."""
    trials = [trial for trial in analyze.read([ROOT / "results" / name]) if (trial.mode, trial.restarts) == (mode, 0)]
    cores = max(trial.num_cpus for trial in trials)
    trials = [trial for trial in trials if trial.num_cpus == cores]
    assert len({trial.family() for trial in trials}) == 1, f"results/{name} mixes what cannot be compared"
    return {kind: analyze.Sample([trial for trial in trials if trial.approach == kind]) for kind in analyze.APPROACHES}


def full(name):
    """Return what analyze.py prints about results/NAME, less its definitions; headings are a level down."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        refused, _ = analyze.report(analyze.read([ROOT / "results" / name]))
    assert not refused, refused
    tables = text.getvalue().removeprefix(analyze.DEFINITIONS)
    return re.sub("^#", "##", tables, flags=re.MULTILINE).strip() + "\n"


def where(here):
    """Return a sentence on the machine, the day, the versions and the data of some samples."""
    first = min((sample.trials[0] for sample in here.values() if sample.trials), key=lambda trial: trial.time)
    data = {"mnist": "MNIST"}.get(first.data, first.data.upper())
    versions = f"Python {first.versions.python}, TensorFlow {first.versions.tensorflow}, Ray {first.versions.ray}"
    return f"{first.num_cpus} cores ({first.host.cpu}), {versions}, {data}, {first.time:%d %B %Y}"


def brief(here, published):
    """Return the README's table of samples."""
    rows = []
    for name, sample in here.items():
        if sample.trials:
            speedup = analyze.compare(sample, here["ray"])[:2] if name != "ray" else ["", ""]
            seconds = analyze.show(np.mean(sample.seconds), np.std(sample.seconds, ddof=1))
            setup = analyze.show(np.mean([trial.setup_seconds for trial in sample.trials]))
            rows.append([name, str(len(sample.trials)), seconds, *speedup, setup, published.get(name, "")])
    return analyze.table(TITLES, rows)


def today():
    parts = []
    for mode in ("predict", "predict_on_batch"):
        here = samples("results.jsonl", mode)
        published = analyze.PUBLISHED if mode == "predict" else {}
        busy, _, _ = here["serial"].cores_busy.value.partition(" ±")
        title = f"**Today**, `{mode}`: {where(here)}. Serial keeps {busy} cores busy."
        parts.append(f"{title}\n\n{brief(here, published)}")
    return "\n".join(parts)


def original():
    here = samples("original.jsonl")
    return f"**The article's stack**: {where(here)}.\n\n{brief(here, analyze.PUBLISHED)}"


def findings():
    then, now, batch = samples("original.jsonl"), samples("results.jsonl"), samples("results.jsonl", "predict_on_batch")

    def times(here, name):
        value, interval, _ = analyze.compare(here[name], here["ray"])
        return value.partition(" ±")[0], interval.partition(" paired")[0].partition(" Welch")[0]

    growing, _ = times(then, POOL)
    factor, _, trials = growing.rstrip(")").partition(" (")
    cleared, cleared_interval = times(then, f"{POOL}+clear_session")
    pool, pool_interval = times(now, POOL)
    naive, naive_interval = times(batch, POOL)
    once, once_interval = times(now, f"{POOL}+initializer")
    in_batch, batch_interval = times(batch, f"{POOL}+initializer")
    for here in (now, batch):
        _, high = analyze.compare(here[f"{POOL}+initializer"], here["ray"]).limits
        assert high < 1.05, "the last finding is no longer true: write another"
    serial, in_one = times(now, "serial")[0], times(batch, "serial")[0]

    def whole(name):
        """Return the mean seconds of a trial with its set-up, in both modes."""
        means = [np.mean([trial.seconds + trial.setup_seconds for trial in here[name].trials]) for here in (now, batch)]
        return " or ".join(f"{mean:.1f}" for mean in means)

    return f"""\
- **On the stack of 2019, even with two cores, the article's pool takes {factor} times as long as Ray** (ratio of the
  means; published: 25). But it slows down with every call. Trial by trial: {trials} times.
- **The growth is a leak, and one line stops it.** In TensorFlow 1 every `load_model` adds {added()} operations to a
  graph that nothing clears. After `clear_session()` the pool takes {cleared} times as long ({cleared_interval}).
- **Today the pool takes {pool} times as long as Ray** ({pool_interval}) with `predict`, the article's way to call the
  model, and {naive} times ({naive_interval}) with `predict_on_batch`. Serial takes {serial} and {in_one} times as long.
  This excludes set-up. With it, a trial takes the pool {whole(POOL)} s, and Ray {whole("ray")} s.
- **A pool that loads once, by an initializer, is as fast as Ray or faster**: {once} times ({once_interval}) with
  `predict`, {in_batch} times ({batch_interval}) with `predict_on_batch`. The ranges are 95 % intervals.
"""


def rounds_by_version():
    """Return {TensorFlow's version: [(seconds, operations), ...] of its rounds}, from results/growth.txt."""
    versions = {}
    text = (ROOT / "results" / "growth.txt").read_text()
    for version, seconds, operations in re.findall(r"TensorFlow (\S+), (\S+) s, operations: \[(\d+)", text):
        versions.setdefault(version, []).append((float(seconds), int(operations)))
    return versions


def added():
    """Return how many operations a call adds to the graph of the article's stack."""
    [rounds, *_] = rounds_by_version().values()
    return rounds[1][1] - rounds[0][1]


def growth():
    """Return the table of what original/growth.py has printed into results/growth.txt, version after version."""
    rows = []
    for version, rounds in rounds_by_version().items():
        seconds, operations = zip(*rounds, strict=True)
        counts = ", ".join(str(operations[call - 1]) for call in (1, 2, 10))
        growth = analyze.show(np.mean(seconds[7:10]) / np.mean(seconds[1:4]))
        rows.append([version, counts, f"{seconds[1]:.2f}", f"{seconds[9]:.2f}", growth])
    titles = ["TensorFlow", "operations after 1, 2, 10 calls", "round 2, s", "round 10, s", SLOWER]
    no_ops = (ROOT / "results" / "no-ops.txt").read_text()
    return f"{analyze.table(titles, rows)}\n{no_ops}"


def overhead():
    """Return what `make benchmark` has printed into results/overhead.txt."""
    text = (ROOT / "results" / "overhead.txt").read_text()
    return f"{where(samples('results.jsonl'))}.\n\n```\n{text}```\n"


PAGES = {
    "README.md": {"findings": findings, "today": today, "original": original},
    "docs/measuring.md": {"results": lambda: full("results.jsonl"), "overhead": overhead},
    "docs/why-25x.md": {"original": original, "growth": growth},
}


def main():
    outdated = []
    for page, blocks in PAGES.items():
        old = (ROOT / page).read_text()
        new = old
        for name, block in blocks.items():
            start, end = f"<!-- measured: {name} -->\n", "<!-- end -->"
            before, _, rest = new.partition(start)
            assert end in rest, f"{page} has no place for {name}"
            new = f"{before}{start}\n{block()}\n{end}{rest.partition(end)[2]}"
        if new != old:
            outdated.append(page)
        if "--check" not in sys.argv:
            (ROOT / page).write_text(new)
    if outdated and "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(outdated)}: run python docs/measured.py")


if __name__ == "__main__":
    main()
