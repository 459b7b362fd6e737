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
        "today": measured.most_cores("results.jsonl", array=False, rounds=10),
        "new pool": measured.most_cores("original.jsonl", rounds=10),
        "fifty rounds": measured.most_cores("original.jsonl", rounds=50),
    }


def of_ray(approach):
    return lambda samples: compare(samples[approach], samples[RAY]).ratio


def last_ten_of_ray(approach):
    return lambda samples: sums_of_tens(samples[approach])[-1] / sums_of_tens(samples[RAY])[-1]


# The words before a number of README.md, whose trials they speak of, and the number.
SENTENCES = [
    ("today**, the reloading pool takes ", "today", of_ray(POOL)),
    ("an initializer, which loads once, takes ", "today", of_ray(INITIALIZER)),
    ("2019**, the reloading pool takes ", "new pool", of_ray(POOL)),
    ("times as long as Ray over ten rounds, and ", "fifty rounds", of_ray(POOL)),
    ("the reloading pool of 2019 takes about ", "fifty rounds", last_ten_of_ray(POOL)),
    ("in each of its calls, it stays at about ", "fifty rounds", of_ray(CLEARED)),
    ("in each of its calls, it stays at about ", "new pool", of_ray(CLEARED)),
    ("With TensorFlow on both cores, serial Python takes ", "today", of_ray(SERIAL)),
    ("ten rounds on our two cores give a factor of ", "new pool", of_ray(POOL)),
    ("the published protocol of fifty gives ", "fifty rounds", of_ray(POOL)),
]


@pytest.mark.parametrize("words, trials, number", SENTENCES)
def test_a_number_in_a_sentence_is_the_measured_one_rounded(samples, words, trials, number):
    text = " ".join((ROOT / "README.md").read_text().split())
    [written] = re.findall(re.escape(words) + r"(\d+(?:\.\d+)?)", text)
    decimals = len(written.partition(".")[2])
    assert f"{number(samples[trials]):.{decimals}f}" == written
