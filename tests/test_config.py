"""config.yaml and the README's block for Google Cloud, as far as a file can be judged without a cloud.

What they do when they are used is in test_ray_up.py.
"""

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


def with_workers():
    """config.yaml as a reader makes it who follows the comment on workers."""
    before, marker, block = TEXT.partition("    # worker:\n")
    block = (marker + block).split("\n\n")[0]
    uncommented = before + block.replace("    # ", "    ")
    rest = TEXT.removeprefix(before + block)
    assert marker and rest != TEXT
    return yaml.safe_load((uncommented + rest).replace("max_workers: 0", "max_workers: 2"))


def google():
    """config.yaml with the keys replaced that the README's block replaces."""
    section = (ROOT / "README.md").read_text().partition("Google Cloud\n")[2]
    [block] = re.findall(r"```yaml\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    return CONFIG | yaml.safe_load(block)


def test_every_key_is_known_to_ray():
    jsonschema.validate(CONFIG, SCHEMA)


def test_the_workers_of_the_comment_are_valid_and_like_the_head():
    config = with_workers()
    jsonschema.validate(config, SCHEMA)
    types = config["available_node_types"]
    assert config["max_workers"] == types["worker"]["max_workers"] == types["worker"]["min_workers"] == 2
    assert types["worker"]["node_config"] == types["head"]["node_config"]
    assert types["worker"]["resources"] == types["head"]["resources"]


def test_the_block_for_google_cloud_is_valid():
    config = google()
    jsonschema.validate(config, SCHEMA)
    assert config["provider"]["type"] == "gcp"
    [node_type] = config["available_node_types"].values()
    # Google's n2 machines have two hyper-threads a core, and the number in the name counts hyper-threads.
    threads = int(re.fullmatch(r"n2-standard-(\d+)", node_type["node_config"]["machineType"])[1])
    assert node_type["resources"] == {"CPU": threads // 2}
    assert config["head_node_type"] in config["available_node_types"]
    # The first command installs the cloud's client; what follows is the same on both.
    assert config["head_setup_commands"][1:] == CONFIG["head_setup_commands"][1:]


def test_pins_are_those_of_the_requirements():
    pins = {}
    for name in ("requirements.txt", "requirements-dev.txt"):
        pins |= dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)$", (ROOT / name).read_text(), re.MULTILINE))
    commands = "\n".join(CONFIG["setup_commands"] + CONFIG["head_setup_commands"] + CONFIG["worker_setup_commands"])
    assert "pip install --quiet -r ~/benchmark/requirements.txt" in commands
    assert CONFIG["file_mounts"]["~/benchmark/requirements.txt"] == "requirements.txt"
    for install in re.findall(r"pip install (.*)", commands):
        for word in install.split():
            if not word.startswith(("-", "~")):
                name, _, version = word.partition("==")
                assert version == pins[name], f"{word}, but the requirements say {pins[name]}"


def test_each_machine_has_the_cores_that_the_comment_says():
    table = re.findall(r"# +(m5\.\w+) +(\d+) +(\d+\.\d+)\n", TEXT)
    assert len(table) == 8
    for machine, cores, price in table:
        assert int(cores) == INSTANCE_TYPES[machine]["VCpuInfo"]["DefaultCores"], machine
        # Amazon's price is per core: what differs from the first line's is a slip of the pen.
        assert float(price) == pytest.approx(int(cores) * 0.096), machine
    head = CONFIG["available_node_types"]["head"]
    cores = {machine: int(cores) for machine, cores, _ in table}
    assert head["resources"] == {"CPU": cores[head["node_config"]["InstanceType"]]}


def test_every_script_is_copied_and_every_copied_file_is_here():
    copied = set(CONFIG["file_mounts"].values())
    assert copied == {"requirements.txt", *(path.name for path in ROOT.glob("*.py"))}
    assert all((ROOT / name).is_file() for name in copied)


def test_nothing_is_left_to_ray_s_defaults_that_costs_or_opens():
    assert CONFIG["provider"]["cache_stopped_nodes"] is False
    assert CONFIG["max_workers"] == 0
    [start] = [command for command in CONFIG["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    # Left out, each of these would be filled in from Ray's defaults.yaml, whose commands install another Ray.
    for key in ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert CONFIG[key]
    assert "0.0.0.0" not in TEXT
