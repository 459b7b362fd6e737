"""config.yaml, unchanged, from `ray up` to `ray down`: without a cloud, and no packet leaves the machine.

Ray's own command line talks to moto's imitation of EC2. The programs `ssh` and `rsync` that it starts are those of
tests/shims, which run the commands on this machine, as an "instance" with a HOME and a /tmp of its own, in a PID
namespace (`ray stop` ends every Ray process that it sees). All of it is in a network namespace with loopback alone.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT

import boto3
import numpy as np
import psutil
import pytest
import yaml
from conftest import ROOT
from moto.server import ThreadedMotoServer

TEXT = (ROOT / "config.yaml").read_text()
CONFIG = yaml.safe_load(TEXT)
FLAGS = "--mode predict_on_batch --rounds 2"
SHIMS = ROOT / "tests" / "shims"
ADDRESS = "172.31.0.10"  # of the instance: what Ray finds when it asks the kernel from where 8.8.8.8 would be reached
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
NETWORK = f"ip link set lo up; ip address add {ADDRESS}/32 dev lo; ip route add 8.8.8.8 dev lo src {ADDRESS}"

# The instance's commands, and its own /tmp, in which arguments below /tmp stay visible. Bash stays, as process 1.
BOOT = """
set -e
mount --bind "$2" /usr/local/sbin
for kept in "${@:3}"; do case $kept in /tmp/*)
    mkdir -p "$1${kept#/tmp}"
    mount --bind "$kept" "$1${kept#/tmp}" ;;
esac; done
mount --rbind "$1" /tmp
echo booted
sleep infinity & wait
"""


def test_the_route_from_up_to_down(tmp_path):
    if "INSIDE" in os.environ:
        return the_route(tmp_path)
    namespaces = shlex.join([*NAMESPACES, "sh", "-ec", f'{NETWORK}; "$@"', "sh"])
    tried = subprocess.run(f"{namespaces} nsenter --version", shell=True, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"needs Linux with util-linux, iproute2, and the right to have namespaces: {tried.stderr.strip()}")
    again = [sys.executable, "-m", "pytest", "-sq", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/inside", __file__]
    command = f"INSIDE=yes {namespaces} {shlex.join(again)}"
    done = subprocess.run(command, shell=True, cwd=ROOT, stdout=PIPE, stderr=STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0 and "1 passed" in done.stdout, "the run inside the namespaces failed: see its output"


def the_route(tmp_path):
    """What the test runs inside the namespaces."""
    assert list(psutil.net_if_addrs()) == ["lo"]
    node = tmp_path / "node"
    instance = start_instance(node)
    os.environ |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "INSTANCE": str(node)}
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    os.environ |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:5000", "MOTO_EC2_LOAD_DEFAULT_AMIS": "false"}
    os.environ["PATH"] = f"{SHIMS}:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    assert Path(shutil.which("ssh")).parent == Path(shutil.which("rsync")).parent == SHIMS
    ThreadedMotoServer("127.0.0.1", port=5000, verbose=False).start()
    ec2 = boto3.client("ec2", region_name="us-west-2")
    # The role of an earlier `ray up`. After making one, Ray sleeps for 30 s.
    iam = boto3.client("iam", region_name="us-west-2")
    iam.create_role(RoleName="ray-autoscaler-v1", AssumeRolePolicyDocument="{}")
    iam.create_instance_profile(InstanceProfileName="ray-autoscaler-v1")
    iam.add_role_to_instance_profile(InstanceProfileName="ray-autoscaler-v1", RoleName="ray-autoscaler-v1")
    run("ray", "up", "-y", "config.yaml")
    address = check_what_ec2_was_asked_for(ec2)
    check_what_listens()
    without_token = f"HOME=/nowhere RAY_AUTH_MODE=disabled ray status --address {ADDRESS}:6379"
    on_cluster = f"python benchmark/bench_ray.py --address auto --output /dev/stdout {FLAGS}"
    told = run("ray", "exec", "config.yaml", f"ray status; {without_token}; {on_cluster}")
    assert "0.0/2.0 CPU" in told and "AuthenticationError" in told  # See the shim of ssh.
    record = json.loads(re.search('^{"approach.*$', told, re.MULTILINE)[0])
    assert (record["approach"], record["cluster"], record["num_cpus"], record["nodes"]) == ("ray", True, 2, 1)
    # What the first comment of config.yaml tells to type.
    passes = re.search(r"ray exec config.yaml '(.*?)'", TEXT.replace("\n#", "\n"), re.DOTALL)[1]
    run("ray", "exec", "config.yaml", re.sub(r"(bench_\w+\.py)", rf"\1 {FLAGS}", passes.replace("1 2 3 4 5", "1")))
    run("ray", "rsync-down", "config.yaml", "~/benchmark/results.jsonl", f"{tmp_path}/cluster.jsonl")
    printed = run("python", "analyze.py", f"{tmp_path}/cluster.jsonl")
    speedups = re.findall(r"^\| (\S+) +\| 1 +\| \S+ +\| (\d\S*) ", printed, re.MULTILINE)
    assert [approach for approach, _ in speedups] == ["serial", "multiprocessing", "multiprocessing+initializer"]
    run("ray", "down", "-y", "config.yaml")
    assert ec2.describe_instances()["Reservations"][0]["Instances"][0]["State"]["Name"] == "terminated"
    assert ec2.describe_volumes()["Volumes"] == []
    assert [process.name() for process in instance.children(recursive=True)] == ["sleep"], "left on the instance"
    check_calls(node, address)


def run(*command):
    """Run a command as a user does in this folder; return all that it printed."""
    done = subprocess.run(command, cwd=ROOT, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, text=True)
    print(f"\n=== {shlex.join(command)}\n{done.stdout}")
    assert done.returncode == 0
    return done.stdout


def start_instance(node):
    """Start the "instance" in the folder node and return its process 1. Its /tmp is node/tmp, its HOME /tmp/home."""
    home = node / "tmp" / "home"
    commands = node / "commands"
    packages = home / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    # As in Ubuntu's own: a shell that is not interactive reads no further.
    (home / ".bashrc").write_text("case $- in *i*) ;; *) return ;; esac\n")
    # train_model.py uses what is there. These "digits", each a line at a height of its own, it learns in a second.
    labels = np.arange(10000, dtype=np.uint8) % 10
    images = 255 * np.eye(28, dtype=np.uint8)[labels][:, :, None].repeat(28, axis=2)
    np.savez(node / "tmp" / "mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    shutil.copytree(SHIMS / "instance", commands)
    # What pip cannot bring without a network: the packages that run this test, and the programs `pip` and `ray`. The
    # set-up commands make the environment around them, and pip checks every pin.
    (packages / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    shutil.copytree(SHIMS / "venv", home / "venv" / "bin")
    (commands / "python3").write_text(f'#!/bin/sh\nexec {sys._base_executable} "$@"\n')
    (commands / "python3").chmod(0o755)
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", BOOT, "boot"]
    parent = psutil.Popen([*command, node / "tmp", commands, sys.prefix, sys.base_prefix], stdout=PIPE, text=True)
    assert parent.stdout.readline() == "booted\n"
    [instance] = parent.children()
    (node / "pid").write_text(str(instance.pid))
    return instance


def check_what_ec2_was_asked_for(ec2):
    """Compare with what config.yaml promises; return the public address of the one instance."""
    [instance] = ec2.describe_instances()["Reservations"][0]["Instances"]
    assert (instance["InstanceType"], instance["KeyName"]) == ("m5.4xlarge", "ray-autoscaler_us-west-2")
    assert instance["ImageId"].startswith("resolve:ssm:/aws/service/canonical/ubuntu/server/24.04/")
    assert instance["Placement"]["AvailabilityZone"] == "us-west-2a"
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    assert [(disk["Size"], disk["VolumeType"]) for disk in ec2.describe_volumes()["Volumes"]] == [(50, "gp3")]
    groups = [group["GroupId"] for group in instance["SecurityGroups"]]
    [group] = ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"]
    [inside] = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"]]
    [outside] = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"]]
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == groups
    assert (outside["IpProtocol"], outside["FromPort"], outside["ToPort"]) == ("tcp", 22, 22)
    return instance["PublicIpAddress"]


def check_what_listens():
    """Of the ports of `ray start --head`: what gives orders over HTTP must not be on every interface."""
    addresses = {}
    for socket in psutil.net_connections("tcp"):
        if socket.status == psutil.CONN_LISTEN:
            addresses.setdefault(socket.laddr.port, set()).add(socket.laddr.ip.removeprefix("::ffff:"))
    assert addresses[8265] == {"127.0.0.1"}, "the dashboard, which takes jobs"
    assert addresses[52365] == addresses[10001] == {"127.0.0.1", ADDRESS}, "the node's agent, Ray client"
    assert addresses[6379] <= {"::", "0.0.0.0"}, "where nodes and drivers meet, behind the token"


def check_calls(node, address):
    """Every ssh went to the instance, and every command of config.yaml was among them, in order."""
    calls = [json.loads(line) for line in (node / "calls").read_text().splitlines()]
    assert {host for host, _ in calls} == {address}
    commands = [shlex.split(command)[-1] for _, command in calls if command.startswith("bash --login")]
    expected = CONFIG["setup_commands"] + CONFIG["head_setup_commands"] + CONFIG["head_start_ray_commands"]
    ran = [text for command in commands for text in expected if f"{text})" in command]
    assert ran[: len(expected)] == expected
    assert any("RAY_OVERRIDE_RESOURCES='{\"CPU\":8}'" in command for command in commands if "ray start" in command)
    assert (node / "tmp" / "home" / "ray_bootstrap_key.pem").stat().st_mode & 0o777 == 0o600
    for remote, local in CONFIG["file_mounts"].items():
        assert (node / "tmp" / "home" / remote.removeprefix("~/")).read_bytes() == (ROOT / local).read_bytes()
