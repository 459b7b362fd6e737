"""physical_cores() on machines that are not at hand: files in the place of /sys, and what psutil would say."""

import psutil
import pytest

import bench_serial as bench  # test_scripts.py sees to it that the function is the same in all


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make this a machine with such CPUs: {cpu: the siblings file's text, or None}, and a cgroup's cpu.max, if any."""

    def machine(siblings, quota=None, allowed=None):
        for cpu, text in siblings.items():
            folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            if text is not None:
                (folder / "thread_siblings_list").write_text(text)
        if quota is not None:
            (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
            (tmp_path / "sys/fs/cgroup/cpu.max").write_text(quota)
        monkeypatch.setattr(bench, "Path", lambda path: tmp_path / path.removeprefix("/"))
        monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: list(allowed or siblings), raising=False)
        return bench.physical_cores()

    return machine


ADJACENT = {cpu: f"{cpu - cpu % 2}-{cpu - cpu % 2 + 1}\n" for cpu in range(8)}  # 0 and 1 are a core's, 2 and 3, ...
HALF_WAY = {cpu: f"{cpu % 4},{cpu % 4 + 4}\n" for cpu in range(8)}  # 0 and 4 are a core's, 1 and 5, ...
NONE = {cpu: None for cpu in range(3)}


@pytest.mark.parametrize(
    "siblings, allowed, groups",
    [
        (ADJACENT, None, [{0, 1}, {2, 3}, {4, 5}, {6, 7}]),
        (HALF_WAY, None, [{0, 4}, {1, 5}, {2, 6}, {3, 7}]),
        (ADJACENT, [3, 7, 6], [{3}, {6, 7}]),  # taskset or a cpuset, in any order
        (HALF_WAY, [1, 4, 5, 6], [{1, 5}, {4}, {6}]),
        (NONE, None, [{0}, {1}, {2}]),  # no topology, as in some containers
        (ADJACENT | {6: None, 7: None}, None, [{0, 1}, {2, 3}, {4, 5}, {6}, {7}]),  # in part
        ({0: "0\n", 130: "130\n", 64: "64\n"}, None, [{0}, {64}, {130}]),
    ],
)
def test_one_cpu_of_each_core_that_is_allowed(machine, siblings, allowed, groups):
    cores = machine(siblings, allowed=allowed)
    assert cores == sorted(cores) and len(cores) == len(groups)
    assert all(len(group & set(cores)) == 1 for group in groups)


QUOTAS = {"max 100000\n": 4, "50000 100000\n": 1, "250000 100000\n": 2, "6400000 100000\n": 4, "nonsense\n": 4}


@pytest.mark.parametrize("quota, count", QUOTAS.items())
def test_a_quota_limits_the_count(machine, quota, count):
    assert len(machine(ADJACENT, quota)) == count


@pytest.mark.parametrize("counted, cores", [(6, [0, 1, 2, 3, 4, 5]), (None, [0])])
def test_without_affinity_the_machine_is_asked(monkeypatch, counted, cores):
    monkeypatch.delattr(psutil.Process, "cpu_affinity", raising=False)  # macOS
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 12 if logical else counted)
    assert bench.physical_cores() == cores
