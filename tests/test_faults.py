"""Real faults: killed workers, signals to the script, results that cannot be written. Nothing finished is ever lost."""

import os
import shutil
import signal
import time

import pytest
from conftest import APPROACHES, run

ENDLESS = ["--rounds", "1000000", "--mode", "predict_on_batch"]
EARLIER = '{"an": "earlier record"}\n'


@pytest.fixture(scope="module", autouse=True)
def killed(start):
    """A run of Ray that `kill -9` has ended, before the tests of this file: the last one looks at what it has left."""
    bench = start("ray", *ENDLESS)
    bench.wait_for("round 1:")
    assert len(bench.family()) > 5
    bench.process.kill()
    return bench


def check_the_end(bench, status, words):
    """The script has ended with the status and one line with the words; nothing runs; no record was lost or made."""
    found, stdout, stderr = bench.finish(30)
    assert found == status and stderr.count("\n") == bool(words) and "Traceback" not in stdout
    assert all(word in stderr for word in words), stderr
    assert bench.left() == []
    assert bench.results.read_text() == EARLIER


def test_a_killed_actor_comes_back_and_the_record_says_so(start):
    bench = start("ray", "--rounds", "60", "--mode", "predict_on_batch")
    bench.wait_for("round 2:")
    bench.workers()[0].kill()
    status, stdout, stderr = bench.finish()
    assert (status, stderr) == (0, "")
    [record] = bench.records()
    assert record["restarts"] == 1 and len(record["round_seconds"]) == stdout.count("round ") == 60
    assert bench.left() == []
    done = run("analyze.py", bench.results)
    assert done.returncode == 1 and "left out: ray, restarts: 1" in done.stdout


def test_an_actor_that_cannot_come_back_ends_the_run(start, trained, tmp_path):
    model = shutil.copy(trained[0], tmp_path)
    bench = start("ray", *ENDLESS, "--model", model)
    bench.wait_for("round 2:")
    bench.results.write_text(EARLIER)
    os.remove(model)
    bench.workers()[0].kill()
    check_the_end(bench, 1, [model, "File not found", "train_model.py"])


@pytest.mark.parametrize("approach, in_setup", [("multiprocessing", False), ("multiprocessing+initializer", True)])
def test_a_killed_pool_worker_ends_the_run_within_seconds(start, approach, in_setup):
    bench = start(approach, *ENDLESS)
    if in_setup:
        while len(bench.family()) < 3:
            time.sleep(0.02)
        time.sleep(1)  # It imports TensorFlow.
    else:
        bench.wait_for("round 2:")
    bench.results.write_text(EARLIER)
    victim = bench.process.children()[0]
    victim.kill()
    check_the_end(bench, 1, ["PoolWorker-", f"pid={victim.pid}", "SIGKILL"])


@pytest.mark.parametrize("number, approaches", [(signal.SIGINT, APPROACHES), (signal.SIGTERM, ["ray"])])
def test_signal_in_a_round(start, number, approaches):
    begun = [start(approach, *ENDLESS) for approach in approaches]
    for bench in begun:
        bench.wait_for("round 2:")
        bench.family()
        bench.results.write_text(EARLIER)
        if number == signal.SIGINT:  # A terminal sends it to all in the foreground.
            os.killpg(bench.process.pid, number)
        else:
            bench.process.send_signal(number)
    for bench in begun:
        check_the_end(bench, 128 + number, [])


@pytest.mark.parametrize("approach, number", [("multiprocessing", 2), ("multiprocessing+initializer", 15), ("ray", 2)])
def test_signal_while_workers_are_set_up(start, approach, number):
    bench = start(approach, *ENDLESS)
    while len(bench.family()) < 3:  # The pool has its workers, or ray.init() starts Ray's processes.
        time.sleep(0.02)
    bench.results.write_text(EARLIER)
    os.killpg(bench.process.pid, number)
    check_the_end(bench, 128 + number, [])


def test_results_that_cannot_be_written_are_told(trained, tmp_path):
    files = ["--model", trained[0], "--data", trained[1], "--rounds", "1", "--mode", "predict_on_batch"]
    done = run("bench_serial.py", *files, "--output", tmp_path / "missing" / "results.jsonl")
    assert done.returncode == 2 and "missing" in done.stderr.splitlines()[-1] and done.stdout == ""
    done = run("bench_serial.py", *files, "--output", "/dev/full")
    message = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "No space left on device" in message and "output /dev/full" in message
    assert "round 1:" in done.stdout  # What was measured is on the screen.


def test_after_kill_9_ray_ends_its_processes_itself(killed):
    assert killed.left(90) == []  # It takes Ray a minute to notice.
    assert killed.records() == []
