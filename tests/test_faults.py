"""Real faults: killed workers, signals to the script, torn lines, full disks. Nothing finished is ever lost.

What Ray and multiprocessing make of a killed worker, to read: pytest -s tests/test_faults.py -k difference
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import APPROACHES, ROOT, load, run

pytestmark = pytest.mark.timeout(400)  # Many seconds each, and a busy machine takes a multiple.

ENDLESS = ["--trials", "100000", "--rounds", "1", "--predict-on-batch"]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


@pytest.fixture(scope="module")
def ray_run(start):
    """A run of Ray at its end: one actor was killed in its first trial, two in turn in the second, none in the third.

    `killed`: the process ids of the dead.
    """
    bench = start("ray", "--trials", "3", "--rounds", "25", "--predict-on-batch")
    bench.wait_for("trial 1 of 3, round 3 of")
    victims = [bench.workers()[0]]
    number = len(bench.workers())
    victims[-1].kill()
    bench.wait_for("trial 2 of 3, round 3 of")
    first, second, *_ = bench.workers()
    first.kill()
    while first in (workers := bench.workers()) or len(workers) < number:
        time.sleep(0.1)
    second.kill()
    victims += [first, second]
    bench.finish()
    bench.killed = [process.pid for process in victims]
    return bench


@pytest.fixture(scope="module")
def pool_run(start):
    """A run of the pool at its end, whatever it was: a worker was killed. `killed`: its process id in a list."""
    bench = start("multiprocessing", *ENDLESS)
    kill_worker(bench)
    return bench


def kill_worker(bench):
    """Kill a worker of a pool when a trial is finished."""
    bench.wait_for("trial 2 of")
    victim = bench.workers()[0]
    bench.killed = [victim.pid]
    victim.kill()


def test_killed_actors_come_back_and_the_run_goes_on(ray_run):
    status, stdout, stderr = ray_run.finish()
    assert status == 0, stderr
    assert len(set(ray_run.killed)) == 3
    records = ray_run.records()
    assert [record["restarts"] for record in records] == [1, 2, 0]
    assert len({record["predictions"] for record in records}) == 1
    lines = [line.strip() for line in stdout.splitlines() if line]
    assert [line.rpartition(", ")[2] for line in lines[1:3]] == ["1 restarted", "2 restarted"]
    assert len(lines) == 5, "Ray has printed something"
    one = f"mean {records[2]['seconds']:.3f} s, standard deviation unknown (1 trials of 25 rounds"
    assert lines[4].startswith(one), "only the undisturbed trial counts"
    assert set(stderr.splitlines()[1:]) == {
        f"trial {t} of 3, round {r} of 25 " for t in (1, 2, 3) for r in range(1, 26)
    }
    assert ray_run.left() == []


def test_analysis_shows_trials_with_restarts_and_keeps_them_out_of_the_means(ray_run):
    done = run("analyze.py", ray_run.results)
    assert done.returncode == 0, done.stderr
    for record in ray_run.records()[:2]:
        assert f"ray, {record['seconds']:.3g} s, {record['restarts']} workers replaced" in done.stdout
    [row] = [line for line in done.stdout.splitlines() if line.startswith("| ray ")]
    trials, seconds = [cell.strip() for cell in row.split("|")][2:4]
    assert (trials, float(seconds.split()[0])) == ("1", pytest.approx(ray_run.records()[2]["seconds"], rel=0.01))


def test_an_actor_that_cannot_come_back_ends_the_run(start, trained, tmp_path):
    model = shutil.copy(trained[0], tmp_path)
    bench = start("ray", *ENDLESS, "--model", model)
    bench.wait_for("trial 2 of")
    os.remove(model)
    victim = bench.workers()[0]
    victim.kill()
    status, stdout, stderr = bench.finish(90)
    assert status == 1
    assert model in stderr and "run python train_model.py" in stderr and "Traceback" not in stdout + stderr
    assert "(raylet)" not in stdout
    kept(bench)


def kept(bench):
    """Check that each finished trial is on disk, none in part, and that nothing is left of the run."""
    assert bench.left() == []
    printed = sum("accuracy" in line for line in bench.out.read_text().splitlines())
    records = bench.records()
    assert [record["trial"] for record in records] == list(range(len(records)))
    assert len(records) - printed in (0, 1)  # It is written first.
    return len(records)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_killed_pool_worker_ends_the_run(start, method):
    begun = [start(name, *ENDLESS, "--start-method", method) for name in list(APPROACHES)[1:3]]
    for bench in begun:
        kill_worker(bench)
        check_end_of_pool(bench)
        assert {record["start_method"] for record in bench.records()} == {method}


def check_end_of_pool(bench):
    status, _, stderr = bench.finish(10)
    assert status == 1
    last = stderr.splitlines()[-1]
    assert f"(process {bench.killed[0]}) died: SIGKILL (out of memory?)" in last and "PoolWorker-" in last
    assert "Traceback" not in stderr and "Warning" not in stderr
    assert kept(bench) >= 1


def test_the_difference(ray_run, pool_run):
    """To read (-s): a worker is killed under Ray and under multiprocessing."""
    check_end_of_pool(pool_run)
    for name, bench in {"Ray": ray_run, "multiprocessing": pool_run}.items():
        status, stdout, stderr = bench.finish()
        *_, last = stderr.splitlines()
        print(
            f"\n--- {name}: kill -9 {' '.join(map(str, bench.killed))}\n{stdout}{last}\nexit status {status}; finished",
            end="",
        )
        print(f" trials on disk: {len(bench.records())}, with restarts {[one['restarts'] for one in bench.records()]}")
    assert (ray_run.finish()[0], pool_run.finish()[0]) == (0, 1)


def interrupt(bench, number):
    bench.family()
    if number == signal.SIGINT:  # A terminal sends it to all in the foreground.
        os.killpg(bench.process.pid, number)
    else:
        bench.process.send_signal(number)


def check_interrupted(bench, number):
    status, stdout, stderr = bench.finish(60)
    assert (status, bench.left()) == (STATUS[number], [])
    if number != signal.SIGKILL:  # A pool's workers complain when the script is gone.
        assert "Traceback" not in stdout + stderr and "Error" not in stdout + stderr, stderr


@pytest.mark.parametrize("number", STATUS)
def test_signal_in_a_round(start, number):
    begun = [start(approach, *ENDLESS) for approach in APPROACHES]
    for bench in begun:
        bench.wait_for("trial 3 of")
        interrupt(bench, number)
    for bench in begun:
        check_interrupted(bench, number)
        assert kept(bench) >= 2


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("approach", APPROACHES)
def test_signal_at_set_up(start, approach, number):
    bench = start(approach, *ENDLESS)
    bench.wait_for(" data, ")  # TensorFlow is imported now, by the workers or in the script, or Ray is started.
    while approach == "ray" and "raylet" not in bench.names():
        time.sleep(0.01)
    interrupt(bench, number)
    check_interrupted(bench, number)
    assert bench.results.read_bytes() == b""


@pytest.mark.parametrize("number", STATUS)
def test_signal_at_import(start, number):
    begun = [start(approach, *ENDLESS) for approach in ("serial", "ray", "ray")]
    for bench in begun:
        while not any("_psutil" in part.path for part in bench.process.memory_maps()):
            time.sleep(0.01)  # The handlers are in place: it is imported after that, and Ray after it.
    for bench in begun:
        interrupt(bench, number)
        time.sleep(0.3)
    for bench in begun:
        check_interrupted(bench, number)


def test_a_torn_line_is_ended_and_skipped(ray_run, tmp_path):
    results = tmp_path / "results.jsonl"
    first, second, _ = ray_run.results.read_bytes().splitlines(keepends=True)
    results.write_bytes(first + second[:100])
    done = run("analyze.py", results)
    assert (done.returncode, "line 2: skipped" in done.stderr) == (0, True)
    load("bench_serial").append(second, results)
    assert results.read_bytes() == first + second[:100] + b"\n" + second
    done = run("analyze.py", results)
    assert (done.returncode, "line 2: skipped" in done.stderr) == (0, True)


APPEND = """
import json, sys
from bench_serial import append

for count in range(300):
    append(json.dumps([sys.argv[1], count, "x" * 20000]).encode() + b"\\n", "results.jsonl")
"""


def test_scripts_that_append_at_once_do_not_mix_their_lines(tmp_path):
    command, environment = [sys.executable, "-c", APPEND], os.environ | {"PYTHONPATH": str(ROOT)}
    begun = [subprocess.Popen([*command, str(name)], cwd=tmp_path, env=environment) for name in range(3)]
    assert [process.wait(60) for process in begun] == [0, 0, 0]
    lines = list(map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines()))
    assert sorted(line[:2] for line in lines) == [[str(name), count] for name in range(3) for count in range(300)]


@pytest.mark.parametrize("place", ["/dev/full", "missing/results.jsonl", ".", "/sys/results.jsonl"])  # where none can
def test_a_place_that_cannot_be_written_is_told_before_the_trial(trained, tmp_path, place):
    done = run("bench_serial.py", "--model", trained[0], "--data", trained[1], "--output", place, cwd=tmp_path)
    assert (done.returncode, done.stdout, os.listdir(tmp_path)) == (1, "", [])
    assert f"cannot append to {place}: " in done.stderr and "--output" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# On a disk of 16 kB: runs the command twice, and copies the results away.
SMALL_DISK = 'mount -t tmpfs -o size=16k none "$0"; "$@"; echo "status $?"; cp "$0"/results.jsonl .; "$@"'


def test_a_disk_that_gets_full(trained, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*alone, "mount -t tmpfs none $0", place], capture_output=True).returncode
    ):
        pytest.skip("this machine allows no mounts of one's own")
    files = ["--model", trained[0], "--data", trained[1], "--output", place / "results.jsonl"]
    command = [*alone, SMALL_DISK, place, sys.executable, ROOT / "bench_serial.py", *ENDLESS, *files]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=200)
    *trials, status = done.stdout.splitlines()
    printed = sum("accuracy" in line for line in trials)
    assert (status, done.returncode) == ("status 1", 1)
    assert done.stderr.count(f"cannot append to {place}/results.jsonl: ") == 2 and "Traceback" not in done.stderr
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["trial"] for line in lines[:printed]] == list(range(printed)) and printed >= 5
    assert len(lines) - printed in (0, 1)  # the one that did not fit
    assert run("analyze.py", tmp_path / "results.jsonl").returncode == 0
