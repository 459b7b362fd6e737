"""What the pages say is what the records in results/ say."""

import importlib.util
import re

import pytest
from conftest import ROOT

from analyze import INITIALIZER, POOL, RAY, SERIAL, compare, sums_of_tens

spec = importlib.util.spec_from_file_location("measured", ROOT / "docs" / "measured.py")
measured = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measured)
CLEARED = f"{POOL}+clear_session"


def test_the_tables_are_those_of_the_records():
    for page, text in measured.pages_with_tables().items():
        assert page.read_text() == text, f"{page.name}: run docs/measured.py"


@pytest.fixture(scope="module")
def samples():
    return {
        "today": measured.with_one_core("results.jsonl", array=False),
        "today, --array": measured.most_cores("results.jsonl", array=True, rounds=10),
        "slow hour": measured.most_cores("slow-hour.jsonl"),
        "new pool": measured.most_cores("original.jsonl", rounds=10),
        "fifty rounds": measured.most_cores("original.jsonl", rounds=50),
    }


def of_ray(approach):
    return lambda samples: compare(samples[approach], samples[RAY]).ratio


def last_ten_of_ray(approach):
    return lambda samples: sums_of_tens(samples[approach])[-1] / sums_of_tens(samples[RAY])[-1]


def seconds_with_set_up(approach):
    return lambda samples: samples[approach].mean + samples[approach].setup_seconds


def rounds_until_ray_leads(samples):
    """After how many rounds Ray, which starts more slowly, has overtaken the pool."""
    later = samples[RAY].setup_seconds - samples[POOL].setup_seconds
    return later / (samples[POOL].median_round - samples[RAY].median_round)


# The words before a number of README.md, whose trials they speak of, and the number.
SENTENCES = [
    ("On our two cores, it takes ", "today", of_ray(INITIALIZER)),
    ("times as long as Ray (", "slow hour", of_ray(INITIALIZER)),
    ("today**, the reloading pool takes ", "today", of_ray(POOL)),
    ("Ray overtakes the reloading pool only after about ", "today", rounds_until_ray_leads),
    ("2019**, the reloading pool takes ", "new pool", of_ray(POOL)),
    ("times as long as Ray over ten rounds, and ", "fifty rounds", of_ray(POOL)),
    ("Reloading alone makes it about ", "new pool", of_ray(CLEARED)),
    ("over ten rounds today**: ", "today", seconds_with_set_up(RAY)),
    ("s with Ray, ", "today", seconds_with_set_up(SERIAL)),
    ("s with serial Python, ", "today", seconds_with_set_up(POOL)),
    ("s with the reloading pool, and ", "today", seconds_with_set_up(INITIALIZER)),
    ("five runs of `make` gave ", "slow hour", of_ray(POOL)),
    ("for the reloading pool, and ", "slow hour", of_ray(INITIALIZER)),
    ("kept to one core, serial Python takes ", "today", of_ray(measured.ONE_CORE)),
    ("if it may use both, ", "today", of_ray(SERIAL)),
    ("the array, and the reloading pool takes ", "today, --array", of_ray(POOL)),
    ("So calls get slower: the reloading pool takes ", "new pool", of_ray(POOL)),
    ("5.6 times as long as Ray over ten rounds, ", "fifty rounds", of_ray(POOL)),
    ("28 times over fifty, and about ", "fifty rounds", last_ten_of_ray(POOL)),
    ("the ratio stays at about ", "fifty rounds", of_ray(CLEARED)),
    ("the ratio stays at about ", "new pool", of_ray(CLEARED)),
]


def test_with_set_up_ray_is_the_slowest_over_ten_rounds(samples):
    """As README.md says of today."""
    slowest = max(
        [SERIAL, POOL, INITIALIZER, RAY],
        key=lambda approach: seconds_with_set_up(approach)(samples["today"]),
    )
    assert slowest == RAY


@pytest.mark.parametrize("words, trials, number", SENTENCES)
def test_a_number_in_a_sentence_is_the_measured_one_rounded(samples, words, trials, number):
    text = " ".join((ROOT / "README.md").read_text().split())
    [written] = re.findall(re.escape(words) + r"(\d+(?:\.\d+)?)", text)
    decimals = len(written.partition(".")[2])
    assert f"{number(samples[trials]):.{decimals}f}" == written
