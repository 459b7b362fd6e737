"""Real faults: killed workers, signals to the script, results that cannot be written. Nothing finished is ever lost."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import APPROACHES, ROOT, alive, run

pytestmark = pytest.mark.timeout(300)  # None takes a minute on a quiet machine.

ENDLESS = ["--trials", "100000", "--rounds", "1", "--predict-on-batch"]


@pytest.fixture(scope="module", autouse=True)
def killed(start):
    """A run of Ray that `kill -9` has ended, before the tests of this file: the last one looks at what it has left."""
    bench = start("ray", *ENDLESS)
    bench.wait_for("trial 1:")
    assert len(bench.family()) > 5
    bench.process.kill()
    return bench


def check_finished_trials(bench):
    """Every trial that was printed is recorded, none in part, and nothing is left running."""
    assert bench.left() == []
    printed = bench.out.read_text().count("accuracy")
    trials = [record["trial"] for record in bench.records()]
    assert trials == list(range(len(trials)))
    assert len(trials) - printed in (0, 1)  # A trial is recorded first.
    return len(trials)


def test_a_killed_actor_comes_back_and_its_trial_is_kept_out_of_the_means(start):
    bench = start("ray", "--trials", "4", "--rounds", "40", "--predict-on-batch")
    bench.wait_for("trial 1:")
    bench.workers()[0].kill()
    status, stdout, stderr = bench.finish()
    assert (status, stderr) == (0, "")
    records = bench.records()
    restarts = [record["restarts"] for record in records]
    assert sorted(restarts) == [0, 0, 0, 1]
    assert len({record["labels"] for record in records}) == 1
    assert stdout.count(", 1 restarts\n") == 1
    undisturbed = [record["seconds"] for record in records if not record["restarts"]]
    assert f"\nmean {sum(undisturbed) / 3:.3f} s, standard deviation" in stdout and "(3 trials" in stdout
    assert bench.left() == []
    done = run("analyze.py", bench.results)
    assert done.returncode == 0, done.stderr
    [row] = [line for line in done.stdout.splitlines() if line.startswith("| ray ")]
    assert row.split("|")[2].strip() == "3"


def test_an_actor_that_cannot_come_back_ends_the_run(start, trained, tmp_path):
    model = shutil.copy(trained[0], tmp_path)
    bench = start("ray", *ENDLESS, "--model", model)
    bench.wait_for("trial 2:")
    os.remove(model)
    bench.workers()[0].kill()
    status, stdout, stderr = bench.finish()
    assert status == 1 and model in stderr and "train_model.py" in stderr and stderr.count("\n") == 1
    assert "Traceback" not in stdout
    check_finished_trials(bench)


@pytest.mark.parametrize("approach", ["multiprocessing", "multiprocessing+initializer"])
def test_a_killed_pool_worker_ends_the_run_within_seconds(start, approach):
    bench = start(approach, *ENDLESS)
    bench.wait_for("trial 2:")
    victim = bench.workers()[0]
    victim.kill()
    status, _, stderr = bench.finish(10)
    assert status == 1 and stderr.count("\n") == 1
    assert "PoolWorker-" in stderr and f"(process {victim.pid}) has died: SIGKILL" in stderr
    assert check_finished_trials(bench) >= 2


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_in_a_round(start, number, status):
    begun = [start(approach, *ENDLESS) for approach in APPROACHES]
    for bench in begun:
        bench.wait_for("trial 2:")
        bench.family()
        if number == signal.SIGINT:  # A terminal sends it to all in the foreground.
            os.killpg(bench.process.pid, number)
        else:
            bench.process.send_signal(number)
    for bench in begun:
        found = bench.finish(20)
        assert (found[0], found[2]) == (status, "")
        assert check_finished_trials(bench) >= 2


@pytest.mark.parametrize("approach, number", [("multiprocessing", 2), ("multiprocessing", 15), ("ray", 2)])
def test_signal_while_workers_are_set_up(start, approach, number):
    bench = start(approach, *ENDLESS)
    while len(bench.family()) < 3:  # The pool has its workers, or ray.init() starts Ray's processes.
        time.sleep(0.02)
    os.killpg(bench.process.pid, number)
    status, stdout, stderr = bench.finish(30)
    assert (status, stderr) == (128 + number, "") and "trial" not in stdout
    assert bench.left() == [] and bench.records() == []


def test_results_that_cannot_be_written_are_told(trained, tmp_path):
    files = ["--model", trained[0], "--data", trained[1], "--trials", "1", "--rounds", "1"]
    for place in (tmp_path, tmp_path / "missing" / "results.jsonl"):
        done = run("bench_serial.py", *files, "--output", place)
        assert done.returncode == 2 and str(place) in done.stderr.splitlines()[-1]
    done = run("bench_serial.py", *files, "--output", "/dev/full")
    *_, record, message = done.stderr.splitlines()
    assert done.returncode == 1 and '"approach": "serial"' in record, "the trial must not be lost"
    assert message.startswith("cannot write this to /dev/full: No space left on device") and "--output" in message


def test_a_closed_stdout_is_not_the_models_fault(trained, tmp_path):
    files = ["--model", trained[0], "--data", trained[1], "--output", tmp_path / "results.jsonl"]
    command = [sys.executable, ROOT / "bench_serial.py", *files]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(list(map(str, command)), stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert done.returncode == 1 and "cannot write this to <stdout>: Broken pipe" in done.stderr.splitlines()[-1]


def test_end_ends_processes_that_do_not_listen(tmp_path):
    code = f"""if True:
        import subprocess, sys
        sys.path.insert(0, {str(ROOT)!r})
        import bench_serial
        deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
        process.stdout.readline()
        print(process.pid, flush=True)
        bench_serial.end(7, "the end\\n")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "the end\n")
    time.sleep(0.2)
    assert not psutil.pid_exists(int(done.stdout)) or not alive(psutil.Process(int(done.stdout)))


def test_after_kill_9_ray_ends_its_processes_itself(killed):
    assert killed.left(90) == []  # It takes Ray a minute to notice.
    assert check_finished_trials(killed) >= 1
