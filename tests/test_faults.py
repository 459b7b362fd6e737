"""Real faults: workers that are killed, signals to the script. No record is lost, or made."""

import signal
import statistics

import pytest
from conftest import ROOT, has_tensorflow, run, wait_until, without_chatter

ENDLESS = ["--rounds", 1_000_000]
EARLIER = '{"approach": "an earlier record"}\n'


@pytest.fixture(scope="module", autouse=True)
def orphans(start):
    """Runs of Ray that ended before Ray could be told: {how: Bench}.

    The processes of Ray then need about a minute to notice it. So this happens before the other
    tests of this module, and the last ones look.
    """
    runs = {
        how: start("ray", "--num-cpus", 1, *ENDLESS) for how in ["kill -9", "Ctrl-C", "SIGTERM"]
    }
    for how, number in [("Ctrl-C", signal.SIGINT), ("SIGTERM", signal.SIGTERM)]:
        wait_until(lambda bench=runs[how]: "raylet" in names(bench))  # ray.init() is not yet done.
        runs[how].send(number)
    runs["kill -9"].wait_for("round 1:")
    assert {"gcs_server", "raylet"} < names(runs["kill -9"])
    runs["kill -9"].send(signal.SIGKILL)
    return runs


def names(bench):
    """The names of the processes that a script has started."""
    return {process.name() for process in bench.family()}


def check_the_end(bench, seconds=15):
    """The run ends soon, as a failure; it leaves no process; no record was lost or made.

    Return what it has written to stderr.
    """
    status, stdout, stderr = bench.finish(30)
    assert status not in (None, 0), stdout + stderr
    assert bench.left(seconds) == []
    assert bench.results.read_text() == EARLIER
    return stderr


def test_a_killed_actor_comes_back_and_the_run_ends_well(start):
    rounds = 40
    bench = start("ray", "--num-cpus", 1, "--rounds", rounds)
    bench.wait_for("round 2:")
    [actor] = bench.workers()
    actor.kill()
    status, _, stderr = bench.finish()
    assert (status, stderr) == (0, "")
    [record] = bench.records()
    assert len(record["round_seconds"]) == rounds
    # By this analyze.py knows such a run: the actor has loaded again in the middle of a round.
    assert max(record["round_seconds"]) > 5 * statistics.median(record["round_seconds"])
    assert bench.left() == []


def test_a_worker_that_is_killed_in_a_round_ends_the_run(start):
    bench = start("multiprocessing", *ENDLESS)
    bench.wait_for("round 2:")
    bench.results.write_text(EARLIER)
    bench.workers()[0].kill()
    assert "worker has died" in check_the_end(bench).splitlines()[-1]


def test_a_worker_that_is_killed_while_it_loads_ends_the_run(start):
    """The other one waits for it in the initializer, and so would a worker in its place."""
    bench = start("multiprocessing+initializer", *ENDLESS)
    victim = wait_until(lambda: next(filter(has_tensorflow, bench.workers()), None))
    assert bench.rounds() == 0
    bench.results.write_text(EARLIER)
    victim.kill()
    assert "worker has died" in check_the_end(bench).splitlines()[-1]


@pytest.mark.parametrize("flags", [[], ["--initializer"]])
def test_the_end_of_a_pool_is_not_taken_for_the_death_of_its_workers(flags, trained, tmp_path):
    """Even if the script looks at them a thousand times as often."""
    code = (ROOT / "bench_multiprocessing.py").read_text()
    assert "time.sleep(1)\n" in code
    script = tmp_path / "bench_multiprocessing.py"
    script.write_text(code.replace("time.sleep(1)\n", "time.sleep(0.001)\n"))
    files = ["--model", trained[0], "--data", trained[1], "--output", tmp_path / "results.jsonl"]
    done = run(script, "--rounds", 1, *flags, *files)
    assert (done.returncode, without_chatter(done.stderr)) == (0, "")


def test_ctrl_c_in_a_round_ends_ray(start):
    bench = start("ray", "--num-cpus", 1, *ENDLESS)
    bench.wait_for("round 2:")
    bench.results.write_text(EARLIER)
    bench.send(signal.SIGINT)
    check_the_end(bench)


@pytest.mark.parametrize(
    "approach, num_cpus, number",
    [
        ("multiprocessing", 1, signal.SIGTERM),
        ("multiprocessing+initializer", 2, signal.SIGTERM),  # They wait for each other.
        ("multiprocessing+initializer", 2, signal.SIGINT),
    ],
)
def test_a_signal_while_a_pool_is_set_up_ends_all(start, approach, num_cpus, number):
    bench = start(approach, "--num-cpus", num_cpus, *ENDLESS)
    wait_until(lambda: any(map(has_tensorflow, bench.workers())))
    assert bench.rounds() == 0
    bench.results.write_text(EARLIER)
    bench.send(number)
    check_the_end(bench, seconds=60)  # SIGTERM ends the script alone: its workers first load.


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_signal_while_ray_starts_ends_all(orphans, how):
    if how == "Ctrl-C" and orphans[how].process.poll() is None:
        # Python loses a Ctrl-C that comes while it forks. A user presses it again.
        orphans[how].send(signal.SIGINT)
    status, stdout, stderr = orphans[how].finish(30)
    assert status not in (None, 0), stdout + stderr
    assert orphans[how].left(90) == []


def test_kill_9_leaves_nothing_a_minute_later(orphans):
    assert orphans["kill -9"].left(90) == []
    assert orphans["kill -9"].records() == []
