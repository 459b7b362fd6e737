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


def test_workers_as_the_comment_has_them_are_like_the_head():
    before, marker, rest = TEXT.partition("    # worker:\n")
    block, blank, after = rest.partition("\n\n")
    uncommented = (marker + block).replace("    # ", "    ")
    config = yaml.safe_load((before + uncommented + blank + after).replace("max_workers: 0", "max_workers: 2"))
    jsonschema.validate(config, SCHEMA)
    head, worker = config["available_node_types"]["head"], config["available_node_types"]["worker"]
    assert config["max_workers"] == worker["max_workers"] == worker["min_workers"] == 2
    assert (worker["node_config"], worker["resources"]) == (head["node_config"], head["resources"])


def test_each_machine_has_the_cores_that_the_comment_says():
    table = re.findall(r"# +(m5\.\w+) +(\d+) +(\d+\.\d+)\n", TEXT)
    assert len(table) == 8
    for machine, cores, price in table:
        assert int(cores) == INSTANCE_TYPES[machine]["VCpuInfo"]["DefaultCores"], machine
        assert float(price) == pytest.approx(int(cores) * 0.096), machine  # Amazon's price is per core.
    head = CONFIG["available_node_types"]["head"]
    cores = INSTANCE_TYPES[head["node_config"]["InstanceType"]]["VCpuInfo"]["DefaultCores"]
    assert head["resources"] == {"CPU": cores}


def test_what_is_installed_and_copied_is_what_is_here():
    jsonschema.validate(CONFIG, SCHEMA)
    assert set(CONFIG["file_mounts"].values()) == {"requirements.txt", *(path.name for path in ROOT.glob("*.py"))}
    [boto3] = re.findall("^boto3==.*$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert CONFIG["setup_commands"][-1] == "pip install --quiet -r ~/benchmark/requirements.txt"
    assert CONFIG["head_setup_commands"][0] == f"pip install --quiet {boto3}"
