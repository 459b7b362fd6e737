"""What several test files share: the scripts, run as a user runs them, and one trained model."""

import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
APPROACHES = {
    "serial": ["bench_serial.py"],
    "multiprocessing": ["bench_multiprocessing.py"],
    "multiprocessing+initializer": ["bench_multiprocessing.py", "--initializer"],
    "ray": ["bench_ray.py"],
}

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # No packet leaves a test.
os.environ.pop("RAY_ADDRESS", None)
# A bench script that a test imports sets variables. The scripts that tests start do without them.
ENVIRONMENT = dict(os.environ)


def run(script, *arguments, timeout=200, **options):
    """Run a script of this repository; return its exit status, stdout and stderr (text)."""
    command = [sys.executable, ROOT / script, *arguments]
    options.setdefault("env", ENVIRONMENT)
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout, **options
    )


def without_chatter(stderr):
    """Leave out of a text what TensorFlow says before anybody can silence it."""
    chatter = "WARNING: All log messages before absl", "I0000 ", "E0000 ", "W0000 "
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(chatter))


def expected_labels(model, x_test):
    """The labels of images (count, 28, 28), 0 to 255: a forward pass in numpy.

    The weights are those in the .keras file.
    """
    with zipfile.ZipFile(model) as archive:
        weights = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(weights) as file:
        hidden = file["layers/dense/vars"]
        output = file["layers/dense_1/vars"]
        images = x_test.reshape(-1, 784) / np.float32(255)
        activations = np.maximum(0, images @ hidden["0"][:] + hidden["1"][:])
        logits = activations @ output["0"][:] + output["1"][:]
    return np.argmax(logits, axis=1).astype(np.uint8)


def allowed_cpus(process):
    """The sets of CPUs on which the kernel lets the threads of a process run.

    There is one set where all threads are alike.
    """
    found = set()
    for status in Path(f"/proc/{process.pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):  # The thread has just ended.
            ranges = re.search(r"Cpus_allowed_list:\s*(\S+)", status.read_text())[1]  # 0-2,4
            bounds = [part.split("-") for part in ranges.split(",")]
            cpus = [range(int(bound[0]), int(bound[-1]) + 1) for bound in bounds]
            found.add(frozenset(itertools.chain(*cpus)))
    return found


def has_tensorflow(process):
    """Whether a process has begun to import TensorFlow."""
    with contextlib.suppress(OSError):
        return "libtensorflow" in Path(f"/proc/{process.pid}/maps").read_text()
    return False


def wait_until(condition, seconds=200):
    """Wait until the function returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return result


class Bench:
    """A bench script that runs in a session of its own, as it does in a terminal."""

    def __init__(
        self, folder, trained, approach, *arguments, before=(), start_method=None, **environment
    ):
        """Start it in the folder.

        before: what stands before python on the command line.
        start_method: of multiprocessing, set first in the main guard of a copy of the script.
        environment: variables; one that is None is taken out.
        """
        self.folder = folder
        self.out = folder / "out"
        self.err = folder / "err"
        self.results = folder / "results.jsonl"

        self.script, *flags = APPROACHES[approach]
        script = ROOT / self.script
        if start_method:
            script = copy_with_start_method(script, folder, start_method)
        files = ["--model", trained[0], "--data", trained[1], "--output", self.results]
        command = [*before, sys.executable, script, *flags, *files, *arguments]

        environment = ENVIRONMENT | environment
        environment = {name: value for name, value in environment.items() if value is not None}
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = psutil.Popen(
                list(map(str, command)),
                stdout=out,
                stderr=err,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )

    def wait_for(self, text, seconds=200):
        """Wait until the script has printed the text, such as "round 2:"."""

        def printed():
            ended = self.process.poll() is not None  # Before the look: all that it wrote is seen.
            found = text in self.out.read_text()
            assert found or not ended, (text, *self.finish())
            return found

        wait_until(printed, seconds)

    def rounds(self):
        """How many rounds the script has printed."""
        return self.out.read_text().count("round ")

    def finish(self, seconds=200):
        """Wait for the end of the script; return its exit status, its stdout and its stderr.

        The status is None if it goes on for longer than this.
        """
        with contextlib.suppress(psutil.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll(), self.out.read_text(), without_chatter(self.err.read_text())

    def records(self):
        """The records that are in the output."""
        return [json.loads(line) for line in self.results.read_text().splitlines() if line]

    def family(self):
        """The living processes that the script has started, itself included: its session."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == self.process.pid:
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def workers(self):
        """The processes that predict: a pool's children, Ray's actors, or the script itself."""
        if self.script == "bench_serial.py":
            return [self.process]
        if self.script == "bench_multiprocessing.py":
            return self.process.children()
        return [process for process in self.family() if process.name().startswith("ray::Model")]

    def left(self, seconds=15):
        """What lives of the family so long after: a quiet machine needs no more than 5 s."""
        deadline = time.monotonic() + seconds
        while (living := self.family()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return living

    def send(self, number):
        """Send a signal to the script alone; SIGINT to all in the foreground, as Ctrl-C does."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def stop(self):
        """End the script and all that it has started."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)


def copy_with_start_method(script, folder, method):
    """Copy a script into the folder, with the start method as the first thing that it does."""
    guard = 'if __name__ == "__main__":\n'
    chosen = f"    import multiprocessing\n\n    multiprocessing.set_start_method({method!r})\n"
    before, found, after = script.read_text().partition(guard)
    assert found
    copy = folder / script.name
    copy.write_text(before + guard + chosen + after)
    return copy


@pytest.fixture(scope="module")
def start(trained, tmp_path_factory):
    """Start a Bench, with the trained model and its data unless the arguments name others."""
    begun = []

    def start(*arguments, **options):
        folder = tmp_path_factory.mktemp("bench")
        begun.append(Bench(folder, trained, *arguments, **options))
        return begun[-1]

    yield start
    for bench in begun:
        bench.stop()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The paths of a model and of its data, made once by train_model.py.

    The data are a small stand-in: 3,000 images for the training, 1,000 for the test. The file is
    not compressed, so that the kernel's count of bytes shows who reads how much of it.
    """
    from train_model import draw_stand_in

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # Of all workers' folders.
    finished = shared / "trained"
    if not finished.exists():
        unfinished = tmp_path_factory.mktemp("training")
        data = unfinished / "mnist.npz"
        np.savez(data, **draw_stand_in(training=3000, test=1000))
        done = run("train_model.py", "--model", unfinished / "model.keras", "--data", data)
        assert done.returncode == 0, done.stderr
        with contextlib.suppress(OSError):  # Another worker was sooner; its files are as good.
            unfinished.rename(finished)
    return finished / "model.keras", finished / "mnist.npz"
