"""What several test files share: where the scripts are, how to run them as a user does, and one trained model."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
import zipfile
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest

import bench_multiprocessing
import bench_ray
import bench_serial

SCRIPTS = [bench_serial, bench_multiprocessing, bench_ray]
signal.signal(signal.SIGINT, signal.default_int_handler)  # An imported script has changed it.
ROOT = Path(__file__).resolve().parents[1]
APPROACHES = {
    "serial": ["bench_serial.py"],
    "multiprocessing": ["bench_multiprocessing.py"],
    "multiprocessing+initializer": ["bench_multiprocessing.py", "--initializer"],
    "ray": ["bench_ray.py"],
}
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # No packet leaves a test.
os.environ.pop("RAY_ADDRESS", None)


def run(script, *arguments, timeout=100, **options):
    """Run a script of this repository in a process of its own; return its exit status, stdout and stderr (text)."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)


def expected_labels(model, x_test):
    """The labels of images (count, 28, 28), 0..255, by a forward pass in numpy with the weights in the .keras file."""
    with zipfile.ZipFile(model) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        layers = [file[f"layers/{name}/vars"] for name in ("dense", "dense_1")]
        (kernel, bias), (kernel_1, bias_1) = [(layer["0"][:], layer["1"][:]) for layer in layers]
    hidden = np.maximum(0, x_test.reshape(-1, 784) / np.float32(255) @ kernel + bias)
    return np.argmax(hidden @ kernel_1 + bias_1, axis=1).astype(np.uint8)


def allowed_cpus(process):
    """The sets of CPUs that the kernel lets the threads of a process run on: one, where all threads are alike."""
    found = set()
    for status in Path(f"/proc/{process.pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):  # It has just ended.
            found.add(re.search(r"Cpus_allowed_list:\s*(\S+)", status.read_text())[1])
    return found


def alive(process):
    """Whether a process runs: a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class Bench:
    """A bench script that runs in a process group of its own, as it does under a shell."""

    def __init__(self, folder, trained, approach, *arguments, before=(), **environment):
        """`before`: what stands before python on the command line. A variable that is None is taken out."""
        self.out, self.err, self.results = (folder / name for name in ("out", "err", "results.jsonl"))
        self.mark, self.seen = uuid.uuid4().hex, set()
        script, *flags = APPROACHES[approach]
        files = ["--model", trained[0], "--data", trained[1], "--output", self.results]
        command = [*before, sys.executable, ROOT / script, *flags, *files, *arguments]
        environment = os.environ | {"BENCH_MARK": self.mark} | environment
        environment = {name: value for name, value in environment.items() if value is not None}
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = psutil.Popen(
                list(map(str, command)), stdout=out, stderr=err, env=environment, cwd=folder, start_new_session=True
            )

    def wait_for(self, text, seconds=100):
        """Wait until the script has printed the text, such as "round 2:"."""
        end = time.monotonic() + seconds
        while text not in self.out.read_text():
            assert self.process.poll() is None and time.monotonic() < end, (text, *self.finish(1))
            time.sleep(0.02)

    def finish(self, seconds=100):
        """Wait for the end of the script; return its exit status (None if it goes on), its stdout and its stderr.

        What TensorFlow says on stderr before anybody can silence it is left out.
        """
        with contextlib.suppress(psutil.TimeoutExpired):
            self.process.wait(seconds)
        lines = self.err.read_text().splitlines(keepends=True)
        chatter = ("WARNING: All log messages before absl", "I0000 ", "E0000 ", "W0000 ")
        return self.process.poll(), self.out.read_text(), "".join(x for x in lines if not x.startswith(chatter))

    def records(self):
        return [json.loads(line) for line in self.results.read_text().splitlines()]

    def family(self):
        """The living processes that the script has started, itself included, by what the kernel says of them."""
        if self.process.poll() is None:
            self.seen |= {self.process, *self.process.children(recursive=True)}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("BENCH_MARK") == self.mark:
                    self.seen.add(process)
        return [one for one in self.seen if alive(one)]

    def left(self, seconds=3):
        """What lives of the family so long after."""
        end = time.monotonic() + seconds
        while (living := self.family()) and time.monotonic() < end:
            time.sleep(0.1)
        return living

    def workers(self):
        """The processes that have TensorFlow in their memory; in a pool all but the script."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if any("libtensorflow" in part.path for part in process.memory_maps()):
                    found.append(process)
        return [process for process in found if process != self.process] or found


@pytest.fixture(scope="module")
def start(trained, tmp_path_factory):
    """Start a Bench, with the trained model and the stand-in unless the arguments name others."""
    begun = []

    def start(*arguments, **options):
        begun.append(Bench(tmp_path_factory.mktemp("bench"), trained, *arguments, **options))
        return begun[-1]

    yield start
    for bench in begun:
        for process in bench.family():
            with contextlib.suppress(psutil.Error):
                process.kill()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The paths of a model and of the stand-in data, made once for all tests by the real script."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all that run at the same time; both files appear whole
    model, data = folder / "model.keras", folder / "mnist.npz"
    if not data.exists():
        done = run("train_model.py", "--stand-in", "--model", model, "--data", data)
        assert done.returncode == 0, done.stderr
    return model, data
