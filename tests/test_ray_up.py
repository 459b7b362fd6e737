"""config.yaml, unchanged, from `ray up` to `ray down`: without a cloud.

No packet leaves the machine. Ray's own command line talks to moto's imitation of EC2. The programs
`ssh` and `rsync` that it starts are those of tests/shims. They run the commands on this machine, as
an "instance" with a HOME and a /tmp of its own, in a PID namespace (`ray stop` ends every Ray
process that it sees). All of it is in a network namespace with loopback alone.
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
from conftest import APPROACHES, ROOT
from moto.server import ThreadedMotoServer

TEXT = (ROOT / "config.yaml").read_text()
CONFIG = yaml.safe_load(TEXT)
SHIMS = ROOT / "tests" / "shims"

# Of the instance: what Ray finds when it asks the kernel from where 8.8.8.8 would be reached.
ADDRESS = "172.31.0.10"
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
NAMESPACES += ["--mount-proc"]
NETWORK = f"""
ip link set lo up
ip address add {ADDRESS}/32 dev lo
ip route add 8.8.8.8 dev lo src {ADDRESS}
"$@"
"""

# The instance's commands, and its own /tmp, in which arguments below /tmp stay visible. Bash stays,
# as process 1.
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
    namespaces = [*NAMESPACES, "sh", "-ec", NETWORK, "sh"]
    tried = subprocess.run([*namespaces, "nsenter", "--version"], capture_output=True, text=True)
    if tried.returncode:
        needs = "needs Linux with util-linux, iproute2, and the right to have namespaces"
        pytest.skip(f"{needs}: {tried.stderr.strip()}")

    again = [sys.executable, "-m", "pytest", "-sq", "-p", "no:cacheprovider", "-p", "no:xdist"]
    again += [f"--basetemp={tmp_path}/inside", __file__]
    inside = os.environ | {"INSIDE": "yes"}
    done = subprocess.run(
        [*namespaces, *again], cwd=ROOT, env=inside, stdout=PIPE, stderr=STDOUT, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, "the run inside the namespaces failed: see its output"
    assert "1 passed" in done.stdout


def the_route(tmp_path):
    """What the test runs inside the namespaces."""
    assert list(psutil.net_if_addrs()) == ["lo"]
    node = tmp_path / "node"
    instance = start_instance(node)
    os.environ |= {
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "INSTANCE": str(node),
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:5000",
        "MOTO_EC2_LOAD_DEFAULT_AMIS": "false",
        "PATH": f"{SHIMS}:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    for program in ["ssh", "rsync"]:
        assert Path(shutil.which(program)).parent == SHIMS
    ThreadedMotoServer("127.0.0.1", port=5000, verbose=False).start()
    ec2 = boto3.client("ec2", region_name="us-west-2")
    make_role()

    run("ray", "up", "-y", "config.yaml")
    address = check_what_ec2_was_asked_for(ec2)
    check_what_listens()
    check_the_cluster()
    check_the_commands_of_the_first_comment(tmp_path)
    run("ray", "down", "-y", "config.yaml")

    [reservation] = ec2.describe_instances()["Reservations"]
    assert [one["State"]["Name"] for one in reservation["Instances"]] == ["terminated"]
    assert ec2.describe_volumes()["Volumes"] == []
    left = [process.name() for process in instance.children(recursive=True)]
    assert left == ["sleep"]  # Of BOOT.
    check_calls(node, address)


def run(*command):
    """Run a command as a user does in this folder; return all that it printed."""
    done = subprocess.run(command, cwd=ROOT, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, text=True)
    print(f"\n=== {shlex.join(command)}\n{done.stdout}")
    assert done.returncode == 0
    return done.stdout


def start_instance(node):
    """Start the "instance" in the folder node, and return its process 1.

    Its /tmp is node/tmp, its HOME is /tmp/home.
    """
    home = node / "tmp" / "home"
    commands = node / "commands"
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = home / "venv" / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    # As in Ubuntu's own: a shell that is not interactive reads no further.
    (home / ".bashrc").write_text("case $- in *i*) ;; *) return ;; esac\n")

    # train_model.py uses what is there: "digits" that are easy to tell apart, a line at a height of
    # its own each.
    labels = np.arange(5000, dtype=np.uint8) % 10
    images = 255 * np.eye(28, dtype=np.uint8)[labels][:, :, None].repeat(28, axis=2)
    test = slice(1000)
    np.savez(
        node / "tmp" / "mnist.npz",
        x_train=images,
        y_train=labels,
        x_test=images[test],
        y_test=labels[test],
    )

    # What pip cannot bring without a network: the packages that run this test, and the programs
    # `pip` and `ray`. The set-up commands make the environment around them, and pip checks every
    # pin.
    shutil.copytree(SHIMS / "instance", commands)
    shutil.copytree(SHIMS / "venv", home / "venv" / "bin")
    (packages / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (commands / "python3").write_text(f'#!/bin/sh\nexec {sys._base_executable} "$@"\n')
    (commands / "python3").chmod(0o755)

    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", BOOT]
    command += ["boot", node / "tmp", commands, sys.prefix, sys.base_prefix]
    parent = psutil.Popen(command, stdout=PIPE, text=True)
    assert parent.stdout.readline() == "booted\n"
    [instance] = parent.children()
    (node / "pid").write_text(str(instance.pid))
    return instance


def make_role():
    """Make the role that an earlier `ray up` has left. After making one, Ray sleeps for 30 s."""
    name = "ray-autoscaler-v1"
    iam = boto3.client("iam", region_name="us-west-2")
    iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
    iam.create_instance_profile(InstanceProfileName=name)
    iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def check_what_ec2_was_asked_for(ec2):
    """Compare with what config.yaml promises; return the public address of the one instance."""
    [instance] = ec2.describe_instances()["Reservations"][0]["Instances"]
    assert instance["InstanceType"] == "m5.4xlarge"
    assert instance["KeyName"] == "ray-autoscaler_us-west-2"
    assert instance["ImageId"].startswith("resolve:ssm:/aws/service/canonical/ubuntu/server/24.04/")
    assert instance["Placement"]["AvailabilityZone"] == "us-west-2a"
    assert instance["MetadataOptions"]["HttpTokens"] == "required"

    [disk] = ec2.describe_volumes()["Volumes"]
    assert (disk["Size"], disk["VolumeType"]) == (50, "gp3")

    groups = [group["GroupId"] for group in instance["SecurityGroups"]]
    [group] = ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"]
    rules = group["IpPermissions"]
    [inside] = [rule for rule in rules if rule["UserIdGroupPairs"]]
    [outside] = [rule for rule in rules if rule["IpRanges"] or rule["Ipv6Ranges"]]
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == groups
    assert (outside["IpProtocol"], outside["FromPort"], outside["ToPort"]) == ("tcp", 22, 22)
    return instance["PublicIpAddress"]


def check_what_listens():
    """Of the ports of `ray start --head`: what takes orders by HTTP is not on every interface."""
    addresses = {}
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN:
            address = connection.laddr.ip.removeprefix("::ffff:")
            addresses.setdefault(connection.laddr.port, set()).add(address)
    assert addresses[8265] == {"127.0.0.1"}, "the dashboard, which takes jobs"
    assert addresses[52365] == {"127.0.0.1", ADDRESS}, "the node's agent"
    assert addresses[10001] == {"127.0.0.1", ADDRESS}, "Ray client"
    assert addresses[6379] <= {"::", "0.0.0.0"}, "where nodes and drivers meet, behind the token"


def check_the_cluster():
    """Without the token nobody is let in; with it, bench_ray.py runs on the cluster."""
    status = "ray status"
    without_token = f"HOME=/nowhere RAY_AUTH_MODE=disabled ray status --address {ADDRESS}:6379"
    bench = "python benchmark/bench_ray.py --address auto --rounds 2 --output /dev/stdout"
    told = run("ray", "exec", "config.yaml", f"{status}; {without_token}; {bench}")
    assert "0.0/2.0 CPU" in told  # See the shim of ssh.
    assert "AuthenticationError" in told

    [line] = re.findall('^{"approach.*$', told, re.MULTILINE)
    record = json.loads(line)
    assert record["approach"] == "ray"
    assert (record["cluster"], record["num_cpus"], record["nodes"]) == (True, 2, 1)


def check_the_commands_of_the_first_comment(tmp_path):
    """They measure all four approaches, in one pass instead of five, and compare them."""
    [passes] = re.findall(r"ray exec config.yaml '(.*?)'", TEXT.replace("\n#", "\n"), re.DOTALL)
    [download] = re.findall(r"^# +ray (rsync-down config.yaml .*)$", TEXT, re.MULTILINE)
    short = re.sub(r"(bench_\w+\.py)", r"\1 --rounds 2 --num-cpus 1", passes)
    short = short.replace("1 2 3 4 5", "1")
    run("ray", "exec", "config.yaml", short)

    results = tmp_path / "cluster.jsonl"
    run("ray", *shlex.split(download.replace("cluster.jsonl", str(results))))
    printed = run("python", "analyze.py", str(results))
    rows = re.findall(r"^\| (\S+) +\| 1 +\| \S+ +\| \S+ +\| (\S*) ", printed, re.MULTILINE)
    assert [approach for approach, _ in rows] == list(APPROACHES)
    *others, ray = [ratio for _, ratio in rows]
    assert min(map(float, others)) > 0
    assert ray == "", "it is what the others are compared with"


def check_calls(node, address):
    """Every ssh went to the instance, and every command of config.yaml was among them, in order."""
    calls = [json.loads(line) for line in (node / "calls").read_text().splitlines()]
    assert {host for host, _ in calls} == {address}

    logins = [command for _, command in calls if command.startswith("bash --login")]
    commands = [shlex.split(command)[-1] for command in logins]
    expected = [
        *CONFIG["setup_commands"],
        *CONFIG["head_setup_commands"],
        *CONFIG["head_start_ray_commands"],
    ]
    ran = [text for command in commands for text in expected if f"{text})" in command]
    assert ran[: len(expected)] == expected

    starts = [command for command in commands if "ray start" in command]
    assert any("RAY_OVERRIDE_RESOURCES='{\"CPU\":8}'" in command for command in starts)

    home = node / "tmp" / "home"
    assert (home / "ray_bootstrap_key.pem").stat().st_mode & 0o777 == 0o600
    for remote, local in CONFIG["file_mounts"].items():
        copy = home / remote.removeprefix("~/")
        assert copy.read_bytes() == (ROOT / local).read_bytes()
