"""Bad models, data and arguments: told by name and with the remedy, without a traceback, and nothing is recorded."""

import os
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import pytest
from conftest import APPROACHES, run

pytestmark = pytest.mark.timeout(400)

ARRAYS = {"x_train": (60000, 28, 28), "y_train": (60000,), "x_test": (10000, 28, 28), "y_test": (10000,)}


def refused(approach, tmp_path, model, data, *arguments, status=1, **options):
    """Run the script; check that it refuses with the status and without a traceback; return its stderr."""
    script, *flags = APPROACHES[approach]
    output = tmp_path / "results.jsonl"
    files = ["--model", model, "--data", data, "--output", output]
    done = run(script, *flags, "--trials", "1", "--rounds", "1", *files, *arguments, **options)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not output.exists() or output.read_text() == ""
    return done.stderr


def bad_model(kind, path, good):
    """Make a model file that is bad in this way, without TensorFlow; return its path."""
    content = good.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        contents = {"empty": b"", "text": b"not a model\n", "truncated": content[: len(content) // 2]}
        path.write_bytes(contents.get(kind, b"\x89HDF\r\n\x1a\n" + bytes(2048)))
    return path


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "hdf5", "folder"])
def test_what_is_no_model_is_told_at_once(trained, tmp_path, kind):
    model = bad_model(kind, tmp_path / "model.keras", trained[0])
    for approach in ("serial", "multiprocessing", "ray"):
        err = refused(approach, tmp_path, model, trained[1])
        assert str(model) in err and "train_model.py" in err
        assert err.count("\n") == 1


MODELS = """
import os, sys
os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
import keras
folder, mark = sys.argv[1:]
layers = keras.layers
def save(name, *parts):
    keras.Sequential(parts).save(f"{folder}/{name}.keras")
save("shape", layers.Input((14, 14)), layers.Flatten(), layers.Dense(10))
save("classes", layers.Input((28, 28)), layers.Flatten(), layers.Dense(5))
code = layers.Lambda(lambda x: (open(mark, "w"), x)[1])
save("lambda", layers.Input((28, 28)), layers.Flatten(), code, layers.Dense(10))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with models that load badly, made by Keras: shape, classes, lambda."""
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, "-c", MODELS, folder, folder / "mark"], check=True, capture_output=True)
    (folder / "mark").unlink(missing_ok=True)  # Keras has called the Lambda layer to learn its shape.
    return folder


@pytest.mark.parametrize("kind, who", [("classes", ["serial"]), ("shape", APPROACHES), ("lambda", APPROACHES)])
def test_a_model_of_another_kind_is_refused(models, start, kind, who):
    model = models / f"{kind}.keras"
    for bench in [start(approach, "--model", model, "--rounds", "1") for approach in who]:
        status, stdout, stderr = bench.finish()
        assert (status, bench.left(), bench.results.read_bytes()) == (1, [], b"")
        assert "Traceback" not in stdout + stderr and len(stdout.splitlines()) == 1
        assert str(model) in stderr and "run python train_model.py" in stderr
    assert not (models / "mark").exists()  # The code in the model was not run.


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def bad_data(kind, path, mark):
    """Make a data file that is bad in this way; return its path."""
    arrays = {name: np.zeros(shape, np.uint8) for name, shape in ARRAYS.items()}
    if kind == "an array missing":
        del arrays["x_train"]
    elif kind == "shape":
        arrays["x_test"] = np.zeros((10000, 14, 14), np.uint8)
    elif kind == "dtype":
        arrays["x_test"] = arrays["x_test"].astype(np.float32)
    elif kind == "labels":
        arrays["y_test"][7] = 10
    elif kind == "pickled":
        arrays["x_test"] = np.array([Bomb(mark)], object)
    np.savez(path, **arrays)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    elif kind == "not arrays":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x_train.npy", b"nothing")
    elif kind == "text":
        path.write_text("not arrays")
    elif kind == "missing":
        path.unlink()
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "text",
        "truncated",
        "flipped",
        "an array missing",
        "shape",
        "dtype",
        "labels",
        "pickled",
        "not arrays",
    ],
)
def test_bad_data_is_told_at_once(trained, tmp_path, kind):
    data = bad_data(kind, tmp_path / "mnist.npz", tmp_path / "mark")
    for approach in ("serial", "multiprocessing", "ray"):
        err = refused(approach, tmp_path, trained[0], data)
        assert str(data) in err and "train_model.py" in err and "unsafely" not in err
    assert not (tmp_path / "mark").exists()  # Nothing was unpickled.


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trials", "0"],
        ["--trials", "-1"],
        ["--rounds", "0"],
        ["--rounds", "many"],
        ["--num-cpus", "0"],
        ["--num-cpus", "-2"],
        ["--num-cpus", "1000000"],
        ["--num-cpus", "1.5"],
        ["--no-such-flag"],
    ],
)
def test_wrong_arguments_are_usage_errors(trained, tmp_path, arguments):
    for approach in ("serial", "multiprocessing", "ray"):
        err = refused(approach, tmp_path, *trained, *arguments, status=2)
        assert arguments[0] in err and "usage" in err


@pytest.mark.parametrize("approach", ["ray"])
def test_contradictory_flags_and_wrong_addresses(trained, tmp_path, approach):
    err = refused(approach, tmp_path, *trained, env=os.environ | {"RAY_ADDRESS": "http://127.0.0.1:8265"})
    assert "http://127.0.0.1:8265" in err and "--address auto" in err
    err = refused(approach, tmp_path, *trained, "--address", "auto", "--num-cpus", "1")
    assert "--num-cpus" in err and "cluster" in err


def test_odd_surroundings(start):
    short = ["--trials", "1", "--rounds", "1", "--predict-on-batch"]
    last = max(os.sched_getaffinity(0)) if sys.platform == "linux" else 0
    taskset = ["taskset", "-c", str(last)] if sys.platform == "linux" else []
    # Ray notes there which cluster was last started on this machine; a socket's path must be short.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.mkdir(f"{folder}/ray")
        with open(f"{folder}/ray/ray_current_cluster", "w") as file:
            file.write("127.0.0.1:1")
        begun = [
            start("ray", *short, HOME="/proc", RAY_TMPDIR=folder, RAY_ADDRESS="", OMP_NUM_THREADS="7"),
            start("ray", *short, HOME=None, before=taskset),
            start("multiprocessing", *short, OMP_NUM_THREADS="1", before=taskset),
        ]
        for bench in begun:
            status, stdout, stderr = bench.finish()
            assert (status, bench.left()) == (0, []), stderr
            assert len(stdout.splitlines()) == 4 and "Traceback" not in stderr
    records = [record for bench in begun for record in bench.records()]
    assert len({record["predictions"] for record in records}) == 1
    if taskset:
        assert [record["cores"] for record in records[1:]] == [[last], [last]]
