"""The whole way of config.yaml, unchanged, from `ray up` to `ray down`: no cloud, and no packet leaves the machine.

Ray's own command line talks to moto's imitation of EC2. The programs `ssh` and `rsync` that it starts are those of
tests/shims, which run the commands on this machine, as an "instance" with a HOME and a /tmp of its own, in a PID
namespace (`ray stop` ends every Ray process that it sees). All of it is in a network namespace with loopback alone.

Three minutes on 2 cores: 30 s are Ray's own sleeps for a new role, 30 s the stand-in data and training, 45 s eight
actors that share the cores, the rest the starting and stopping of Ray, once by each of its commands.
`pytest -s tests/test_ray_up.py` shows the log of the whole route.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from ipaddress import ip_address
from pathlib import Path

import boto3
import psutil
import pytest
import yaml
from conftest import ROOT
from moto.server import ThreadedMotoServer

CONFIG = yaml.safe_load((ROOT / "config.yaml").read_text())
SHIMS = ROOT / "tests" / "shims"
ADDRESS = "172.31.0.10"  # of the instance: what Ray finds when it asks the kernel from where 8.8.8.8 would be reached
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
NETWORK = f"ip link set lo up; ip address add {ADDRESS}/32 dev lo; ip route add 8.8.8.8 dev lo src {ADDRESS}"

# The instance's commands, and a /tmp of its own (the model, the data and Ray's sessions lie there) in which the rest of
# the arguments, where they are below /tmp, stay visible. Then bash stays, as process 1: it takes in others' orphans.
BOOT = """
set -e
mount --bind "$2" /usr/local/sbin
for kept in "${@:3}"; do case $kept in /tmp/*)
    mkdir -p "$1${kept#/tmp}"
    mount --bind "$kept" "$1${kept#/tmp}" ;;
esac; done
mount --rbind "$1" /tmp
touch /tmp/booted
sleep infinity & wait
"""


@pytest.mark.timeout(400)
def test_the_route_from_up_to_down(tmp_path):
    if "INSIDE" in os.environ:
        return the_route(tmp_path)
    for program in ("unshare", "nsenter", "ip"):
        if not shutil.which(program):
            pytest.skip(f"needs Linux with {program} (packages util-linux and iproute2)")
    tried = subprocess.run([*NAMESPACES, "sh", "-ec", NETWORK], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this machine allows no namespaces of one's own: {tried.stderr.strip()}")
    again = [sys.executable, "-m", "pytest", "-sq", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/inside", __file__]
    command = [*NAMESPACES, "sh", "-ec", f'{NETWORK}; "$@"', "sh", *again]
    done = subprocess.run(command, env=os.environ | {"INSIDE": "1"}, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, "the run inside the namespaces failed: its output is above"
    assert "1 passed" in done.stdout


def the_route(tmp_path):
    """What the test runs inside the namespaces."""
    assert list(psutil.net_if_addrs()) == ["lo"]
    node, launcher = tmp_path / "node", tmp_path / "launcher"
    instance = start_instance(node)
    launcher.mkdir()
    folders = [SHIMS, Path(sys.executable).parent, "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
    environment = {
        "PATH": ":".join(map(str, folders)),
        "HOME": str(launcher),
        "TMPDIR": str(launcher),
        "INSTANCE": str(node),
        "AWS_ENDPOINT_URL": "http://127.0.0.1:5000",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "RAY_USAGE_STATS_ENABLED": "0",
        "AUTOSCALER_NODE_START_WAIT_S": "10",  # for an ssh that fails; 900 s otherwise
    }
    for program in ("ssh", "rsync"):
        assert shutil.which(program, path=environment["PATH"]) == str(SHIMS / program)
    os.environ.update(environment | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"})
    ThreadedMotoServer("127.0.0.1", port=5000, verbose=False).start()
    ec2 = boto3.client("ec2", region_name="us-west-2")

    def ray(*arguments, status=0):
        """Run one of Ray's commands as a user does in this folder; return all that it printed."""
        began = time.perf_counter()
        done = subprocess.run(
            [Path(sys.executable).parent / "ray", *arguments],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(f"\n=== ray {shlex.join(arguments)}: {time.perf_counter() - began:.0f} s\n{done.stdout}")
        assert done.returncode == status
        return done.stdout

    ray("up", "-y", "config.yaml")
    address = check_what_ec2_was_asked_for(ec2)
    assert "0.0/8.0 CPU" in ray("exec", "config.yaml", "ray status")
    check_what_listens()
    without_token = f"HOME=/nowhere RAY_AUTH_MODE=disabled ray status --address {ADDRESS}:6379"
    assert "AuthenticationError" in ray("exec", "config.yaml", without_token, status=1)

    trial = ["--address", "auto", "--trials", "1", "--rounds", "2", "--output", "results.jsonl"]
    ray("submit", "config.yaml", "bench_ray.py", "--", *trial)
    ray("rsync-down", "config.yaml", "~/results.jsonl", str(launcher / "cluster.jsonl"))
    [record] = map(json.loads, (launcher / "cluster.jsonl").read_text().splitlines())
    assert (record["approach"], record["num_cpus"], record["nodes"], record["restarts"]) == ("ray", 8, 1, 0)
    assert record["data"] == "stand-in" and record["accuracy"] > 0.9 and len(record["round_seconds"]) == 2

    ray("down", "-y", "config.yaml")
    [reservation] = ec2.describe_instances()["Reservations"]
    assert [machine["State"]["Name"] for machine in reservation["Instances"]] == ["terminated"]
    assert ec2.describe_volumes()["Volumes"] == []
    left = [process.name() for process in instance.children(recursive=True)]
    assert left == ["sleep"], "processes are left on the instance"
    check_calls(node, address)


def start_instance(node):
    """Start the "instance" in the folder node and return its process 1. Its /tmp is node/tmp, its HOME /tmp/home."""
    home = node / "tmp" / "home"
    packages = home / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for folder in (packages, home / "venv" / "bin", node / "packages"):
        folder.mkdir(parents=True)
    # As in Ubuntu's own: a shell that is not interactive reads no further.
    (home / ".bashrc").write_text("case $- in *i*) ;; *) return ;; esac\n")
    (home / ".profile").write_text(". ~/.bashrc\n")
    shutil.copytree(SHIMS / "instance", node / "commands")
    write_program(node / "commands" / "python3", f'#!/bin/sh\nexec {sys._base_executable} "$@"\n')
    # What `pip install -r requirements.txt` cannot bring without a network: the packages that run this test, less those
    # that a new environment has of its own, and the program `ray`. The set-up commands make the environment around
    # them, and pip checks every pin.
    own = ("pip", "setuptools", "_distutils") if sys.version_info < (3, 12) else "pip"
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(own):
            (node / "packages" / package.name).symlink_to(package)
    (packages / "packages.pth").write_text(f"{node}/packages\n")
    start_ray = "#!/tmp/home/venv/bin/python\nfrom ray.scripts.scripts import main\nmain()\n"
    write_program(home / "venv" / "bin" / "ray", start_ray)

    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", BOOT, "boot"]
    parent = psutil.Popen([*command, node / "tmp", node / "commands", node, sys.prefix, sys.base_prefix])
    while not (node / "tmp" / "booted").exists():
        assert parent.poll() is None, "the instance did not start"
        time.sleep(0.05)
    [instance] = parent.children()
    (node / "pid").write_text(str(instance.pid))
    return instance


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


def check_what_ec2_was_asked_for(ec2):
    """Compare with what config.yaml promises; return the public address of the one instance."""
    [reservation] = ec2.describe_instances()["Reservations"]
    [instance] = reservation["Instances"]
    assert instance["InstanceType"] == "m5.4xlarge"
    assert instance["ImageId"].startswith("resolve:ssm:/aws/service/canonical/ubuntu/server/24.04/")
    assert instance["State"]["Name"] == "running"
    assert instance["Placement"]["AvailabilityZone"] == "us-west-2a"
    assert instance["KeyName"] == "ray-autoscaler_us-west-2"
    assert instance["IamInstanceProfile"]["Arn"].endswith("/ray-autoscaler-v1")
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
    assert (tags["ray-cluster-name"], tags["ray-node-type"]) == ("ray-benchmark", "head")
    assert tags["ray-node-status"] == "up-to-date"
    [disk] = ec2.describe_volumes()["Volumes"]
    assert (disk["Size"], disk["VolumeType"]) == (50, "gp3")
    assert instance["BlockDeviceMappings"][0]["Ebs"]["DeleteOnTermination"]
    attribute = "instanceInitiatedShutdownBehavior"
    behaviour = ec2.describe_instance_attribute(InstanceId=instance["InstanceId"], Attribute=attribute)
    assert behaviour["InstanceInitiatedShutdownBehavior"]["Value"] == "terminate"

    [member] = instance["SecurityGroups"]
    [group] = ec2.describe_security_groups(GroupIds=[member["GroupId"]])["SecurityGroups"]
    inside = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"]]
    outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"]]
    assert len(inside) + len(outside) == len(group["IpPermissions"]) == 2
    assert [pair["GroupId"] for pair in inside[0]["UserIdGroupPairs"]] == [member["GroupId"]]
    assert (outside[0]["IpProtocol"], outside[0]["FromPort"], outside[0]["ToPort"]) == ("tcp", 22, 22)
    return instance["PublicIpAddress"]


def check_what_listens():
    """Print the ports of `ray start --head`; what gives orders over HTTP must not be on every interface."""
    listening = []
    for socket in psutil.net_connections("tcp"):
        if socket.status == psutil.CONN_LISTEN and socket.pid != os.getpid():
            address = ip_address(socket.laddr.ip)
            address = getattr(address, "ipv4_mapped", None) or address
            listening.append((socket.laddr.port, str(address), psutil.Process(socket.pid).cmdline()))
    for port, address, command in sorted(listening):
        print(f"{port:6} {address:15} {' '.join(command)[:120]}")
    addresses = {port: {a for p, a, _ in listening if p == port} for port, _, _ in listening}
    assert addresses[8265] == {"127.0.0.1"}, "the dashboard, which takes jobs"
    assert addresses[52365] == addresses[10001] == {"127.0.0.1", ADDRESS}, "the node's agent, Ray client"
    assert addresses[6379] <= {"::", "0.0.0.0"}, "where nodes and drivers meet, behind the token: the README says so"


def check_calls(node, address):
    """Every ssh went to the instance, none was refused, and every command of config.yaml was among them, in order."""
    calls = [json.loads(line) for line in (node / "calls").read_text().splitlines()]
    for call in calls:
        print(call.get("host"), call.get("command"), call.get("refused", ""))
    assert {call.get("host") for call in calls} == {address}
    commands = [shlex.split(call["command"])[-1] for call in calls if call["command"].startswith("bash --login")]
    expected = CONFIG["setup_commands"] + CONFIG["head_setup_commands"] + CONFIG["head_start_ray_commands"]
    ran = [text for command in commands for text in expected if f"{text})" in command]
    assert ran[: len(expected)] == expected
    key = node / "tmp" / "home" / "ray_bootstrap_key.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    for remote, local in CONFIG["file_mounts"].items():
        assert (node / "tmp" / "home" / remote.removeprefix("~/")).read_bytes() == (ROOT / local).read_bytes()
