"""config.yaml as far as it can be judged unused; for the use see test_ray_up.py."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from conftest import ROOT
from moto.ec2.models.instance_types import INSTANCE_TYPES

TEXT = (ROOT / "config.yaml").read_text()
CONFIG = yaml.safe_load(TEXT)
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def test_ray_knows_all_that_is_set():
    jsonschema.validate(CONFIG, SCHEMA)


def test_workers_as_the_comment_has_them_are_like_the_head():
    before, marker, rest = TEXT.partition("    # worker:\n")
    block, blank, after = rest.partition("\n\n")
    uncommented = (marker + block).replace("    # ", "    ")
    text = before + uncommented + blank + after
    config = yaml.safe_load(text.replace("max_workers: 0", "max_workers: 2"))
    jsonschema.validate(config, SCHEMA)

    head = config["available_node_types"]["head"]
    worker = config["available_node_types"]["worker"]
    assert config["max_workers"] == worker["max_workers"] == worker["min_workers"] == 2
    assert (worker["node_config"], worker["resources"]) == (head["node_config"], head["resources"])


def cores(machine):
    """The physical cores of a type of machine, by moto's copy of Amazon's list."""
    return INSTANCE_TYPES[machine]["VCpuInfo"]["DefaultCores"]


def test_each_machine_has_the_cores_and_the_price_that_the_comment_says():
    table = re.findall(r"# +(m5\.\w+) +(\d+) +(\d+\.\d+)\n", TEXT)
    assert len(table) == 8
    for machine, count, price in table:
        assert int(count) == cores(machine), machine
        assert float(price) == pytest.approx(int(count) * 0.096), machine  # The price is per core.


def test_the_head_advertises_its_physical_cores():
    head = CONFIG["available_node_types"]["head"]
    assert head["resources"] == {"CPU": cores(head["node_config"]["InstanceType"])}


def test_all_scripts_are_copied():
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert set(CONFIG["file_mounts"].values()) == {"requirements.txt"} | scripts


def test_what_is_installed_is_what_is_tested_here():
    [boto3] = re.findall("^boto3==.*$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert "pip install --quiet -r ~/benchmark/requirements.txt" in CONFIG["setup_commands"]
    assert f"pip install --quiet {boto3}" in CONFIG["head_setup_commands"]
