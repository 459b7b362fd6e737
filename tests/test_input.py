"""Bad models, data and arguments: told by name and with the remedy, without a traceback, and nothing is recorded.

The functions are the same in all scripts (test_scripts.py), so most cases need one script only.
"""

import subprocess
import sys

import numpy as np
import pytest
from conftest import APPROACHES, ROOT, run

pytestmark = pytest.mark.timeout(300)


def refused(tmp_path, model, data, *arguments, status=1, output="results.jsonl"):
    """Run bench_serial.py; check that it refuses in one line; return that line."""
    output = tmp_path / output
    files = ["--model", model, "--data", data, "--output", output]
    done = run("bench_serial.py", "--rounds", "1", "--mode", "predict_on_batch", *files, *arguments)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert output.read_text() == ""
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", ["missing", "text", "truncated"])
def test_what_is_no_model_is_told_at_once(trained, tmp_path, kind):
    model = tmp_path / "model.keras"
    if kind != "missing":
        model.write_bytes({"text": b"not a model\n", "truncated": trained[0].read_bytes()[:1_000_000]}[kind])
    message = refused(tmp_path, model, trained[1])
    assert str(model) in message and "train_model.py" in message


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


@pytest.mark.parametrize("approach", APPROACHES)
def test_a_hostile_model_is_refused_by_every_approach_and_its_code_not_run(models, start, approach):
    bench = start(approach, "--model", models / "lambda.keras")
    status, stdout, stderr = bench.finish()
    assert (status, stdout, bench.left(), bench.records()) == (1, "", [], [])
    assert len(stderr.splitlines()) == 1
    assert "Lambda" in stderr and str(models / "lambda.keras") in stderr and "safe_mode" not in stderr
    assert not (models / "mark").exists()


def test_a_model_of_another_shape_or_with_other_classes_is_refused(models, trained, tmp_path):
    assert "ValueError: " in refused(tmp_path, models / "shape.keras", trained[1])
    message = refused(tmp_path, models / "classes.keras", trained[1])
    assert message.startswith("ValueError: wrong answers: ") and "pixels 0 to 255" in message
    assert str(models / "classes.keras") in message and "train_model.py" in message


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["missing", "truncated", "array missing", "labels", "pickled"])
def test_bad_data_is_told_and_nothing_unpickled(trained, tmp_path, kind):
    data, mark = tmp_path / "mnist.npz", tmp_path / "mark"
    arrays = dict(np.load(trained[1]))
    if kind == "array missing":
        del arrays["x_test"]
    elif kind == "labels":
        arrays["y_test"] = 9 - arrays["y_test"]
    elif kind == "pickled":
        arrays["x_test"] = np.array([Bomb(mark)], object)
    if kind != "missing":
        np.savez(data, **arrays)
    if kind == "truncated":
        data.write_bytes(data.read_bytes()[:100_000])
    message = refused(tmp_path, trained[0], data)
    assert str(data) in message and "train_model.py" in message and "unsafely" not in message
    assert not mark.exists()


WRONG = ["--rounds 0", "--mode fast", "--num-cpus 0", "--num-cpus 1000000", "--no-such-flag", "--model a.h5"]


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments_are_usage_errors(trained, tmp_path, arguments):
    assert arguments.split()[0] in refused(tmp_path, *trained, *arguments.split(), status=2)


def test_other_packings_of_the_data(trained, tmp_path):
    arrays = dict(np.load(trained[1]))
    odd = {"y_test": arrays["y_test"].astype(np.int64)[:, None], "x_test": arrays["x_test"][..., None]}
    np.savez(tmp_path / "odd.npz", **(arrays | odd))
    files = ["--model", trained[0], "--data", tmp_path / "odd.npz", "--output", tmp_path / "results.jsonl"]
    done = run("bench_serial.py", *files, "--rounds", "1", "--mode", "predict_on_batch")
    assert done.returncode == 0, done.stderr
    np.savez(tmp_path / "scaled.npz", **(arrays | {"x_test": np.float32(arrays["x_test"] / 255)}))
    assert "pixels 0 to 255" in refused(tmp_path, trained[0], tmp_path / "scaled.npz", output="other.jsonl")


def test_what_nobody_foresaw_is_told_as_what_it_is(trained, tmp_path):
    """cProfile takes the place of the module __main__, in which pickle looks for the pool's function."""
    files = ["--model", trained[0], "--data", trained[1], "--output", tmp_path / "results.jsonl"]
    command = [sys.executable, "-m", "cProfile", ROOT / "bench_multiprocessing.py", *files]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("PicklingError: Can't pickle <function ")
    command[1:3] = ["-X", "dev", "-m", "cProfile"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback (most recent call last)" in done.stderr
