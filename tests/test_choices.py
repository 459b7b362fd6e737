"""What README.md says of a worker that dies, in "Which one should I use?" and under "Pitfalls"."""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import TimeoutError, get_context

import psutil
import pytest
from conftest import ENVIRONMENT, run, wait_until

SPAWN = get_context("spawn")  # pytest has threads: forking is unsafe.


def die_if_zero(i):
    if i == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return i


def fail():
    raise ValueError("the model is missing")


@pytest.mark.parametrize("options", [{}, {"maxtasksperchild": 1}])
def test_a_pool_replaces_a_worker_that_dies_and_waits_for_its_answer_forever(options):
    with SPAWN.Pool(2, **options) as pool:
        assert pool.map(die_if_zero, [1, 2]) == [1, 2]
        answers = pool.map_async(die_if_zero, [0])  # One call: the other worker is idle.
        with pytest.raises(TimeoutError):
            answers.get(timeout=5)
        assert len(psutil.Process().children()) >= 2


def test_a_pool_starts_a_worker_whose_initializer_fails_again_and_again(capfd):
    with SPAWN.Pool(1, initializer=fail):
        wait_until(lambda: capfd.readouterr().err.count("the model is missing"), seconds=60)
        wait_until(lambda: capfd.readouterr().err.count("the model is missing"), seconds=60)


def test_an_executor_raises_an_error_if_its_initializer_fails(capfd):
    with ProcessPoolExecutor(1, SPAWN, initializer=fail) as executor:
        with pytest.raises(BrokenProcessPool):
            executor.submit(die_if_zero, 1).result(timeout=60)


def test_an_executor_whose_worker_dies_raises_an_error_and_the_others_go_on():
    with ProcessPoolExecutor(1, SPAWN) as first, ProcessPoolExecutor(1, SPAWN) as second:
        assert first.submit(die_if_zero, 1).result(timeout=60) == 1
        with pytest.raises(BrokenProcessPool):
            first.submit(die_if_zero, 0).result(timeout=60)
        with pytest.raises(BrokenProcessPool):
            first.submit(die_if_zero, 1)
        assert second.submit(die_if_zero, 2).result(timeout=60) == 2


ACTORS = """
import os, signal
import ray

class Model:
    def __init__(self, marker):
        self.marker = marker
        self.calls = 0

    def evaluate(self):
        self.calls += 1
        if not os.path.exists(self.marker):
            open(self.marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.calls

ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
options = {"max_restarts": 3, "max_task_retries": 3}
answers = []
restarted = ray.remote(**options)(Model).remote("restarted")
answers.append(ray.get(restarted.evaluate.remote()))
fragile = ray.remote(Model).remote("fragile")
for _ in range(2):
    try:
        answers.append(ray.get(fragile.evaluate.remote()))
    except ray.exceptions.RayActorError:
        answers.append("error")
with open("answers", "w") as file:
    print(*answers, file=file)
"""


def test_an_actor_repeats_the_call_only_with_both_options(tmp_path):
    script = tmp_path / "actors.py"
    script.write_text(ACTORS)
    local = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray listens on 127.0.0.1 only.
    done = run(script, cwd=tmp_path, env=ENVIRONMENT | local)
    # The repeated call is the first one of the new actor; without options, it stays dead.
    assert (done.returncode, (tmp_path / "answers").read_text()) == (0, "1 error error\n"), done
