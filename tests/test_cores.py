"""physical_cores() on machines that are not at hand: files in the place of /sys."""

import psutil
import pytest

import bench_serial as bench  # test_scripts.py sees to it that the function is the same in all.

ADJACENT = {cpu: f"{cpu - cpu % 2}-{cpu - cpu % 2 + 1}\n" for cpu in range(8)}  # 0-1, 2-3, ...
HALF_WAY = {cpu: f"{cpu % 4},{cpu % 4 + 4}\n" for cpu in range(8)}  # 0,4  1,5  ...
UNKNOWN = {cpu: None for cpu in range(3)}  # No topology, as in some containers.


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make this a machine with other CPUs."""

    def machine(siblings, cpu_max=None, allowed=None):
        """Give each CPU the text of its siblings' file, or no such file: {cpu: text or None}.

        cpu_max: the text of the control group's file.
        allowed: the CPUs that this process may use; by default all.
        """
        for cpu, text in siblings.items():
            folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            if text is not None:
                (folder / "thread_siblings_list").write_text(text)
        if cpu_max is not None:
            file = tmp_path / "sys/fs/cgroup/cpu.max"
            file.parent.mkdir(parents=True)
            file.write_text(cpu_max)
        cpus = set(allowed or siblings)
        monkeypatch.setattr(bench, "Path", lambda path: tmp_path / path.removeprefix("/"))
        monkeypatch.setattr(bench.sys, "platform", "linux")
        monkeypatch.setattr(bench.os, "sched_getaffinity", lambda process: cpus, raising=False)

    return machine


@pytest.mark.parametrize(
    "siblings, allowed, cores",
    [
        (ADJACENT, None, [{0, 1}, {2, 3}, {4, 5}, {6, 7}]),
        (HALF_WAY, None, [{0, 4}, {1, 5}, {2, 6}, {3, 7}]),
        (ADJACENT, [3, 7, 6], [{3}, {6, 7}]),  # taskset or a cpuset, in any order
        (HALF_WAY, [1, 4, 5, 6], [{1, 5}, {4}, {6}]),
        (UNKNOWN, None, [{0}, {1}, {2}]),
        (ADJACENT | {6: None, 7: None}, None, [{0, 1}, {2, 3}, {4, 5}, {6}, {7}]),  # in part
        ({0: "0\n", 130: "130\n", 64: "64\n"}, None, [{0}, {64}, {130}]),
    ],
)
def test_one_cpu_of_each_core_that_is_allowed(machine, siblings, allowed, cores):
    machine(siblings, allowed=allowed)
    cpus = bench.physical_cores()
    assert cpus == sorted(cpus)
    assert len(cpus) == len(cores)
    for core in cores:
        assert len(core & set(cpus)) == 1


@pytest.mark.parametrize(
    "cpu_max, count",
    [
        ("max 100000\n", 4),
        ("50000 100000\n", 1),  # Less than a core is still one.
        ("250000 100000\n", 2),
        ("30000 10000\n", 3),
        ("6400000 100000\n", 4),
    ],
)
def test_a_quota_limits_the_number_of_cores(machine, cpu_max, count):
    machine(ADJACENT, cpu_max)
    cores = bench.physical_cores()
    assert cores == [0, 2, 4, 6][:count]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_count_takes_the_first_cores(machine, count):
    machine(ADJACENT)
    assert bench.physical_cores(count) == [0, 2, 4, 6][:count]


@pytest.mark.parametrize("count, cpu_max", [(5, None), (3, "200000 100000")])
def test_more_cores_than_there_are_end_with_one_line(machine, count, cpu_max):
    machine(ADJACENT, cpu_max)
    with pytest.raises(SystemExit) as ended:
        bench.physical_cores(count)
    message = ended.value.code
    assert "\n" not in message
    assert f"--num-cpus {count}" in message
    assert str(2 if cpu_max else 4) in message


@pytest.mark.parametrize("counted, cores", [(6, [0, 1, 2, 3, 4, 5]), (None, [0])])
def test_where_processes_cannot_be_pinned_cores_are_only_counted(
    machine, monkeypatch, counted, cores
):
    machine({})
    monkeypatch.setattr(bench.sys, "platform", "darwin")
    monkeypatch.delattr(bench.os, "sched_getaffinity")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 12 if logical else counted)
    assert bench.physical_cores() == cores
