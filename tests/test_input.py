"""Bad models, data and arguments: told by name and with the remedy, without a traceback, and nothing is recorded.

The functions are the same in all scripts (test_scripts.py), so most cases need one script only.
"""

import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import APPROACHES, run

pytestmark = pytest.mark.timeout(300)


def refused(tmp_path, model, data, *arguments, script="bench_serial.py", status=1):
    """Run the script; check that it refuses in one line; return that line."""
    output = tmp_path / "results.jsonl"
    done = run(script, "--rounds", "1", "--model", model, "--data", data, "--output", output, *arguments)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert output.read_text() == ""
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "folder"])
def test_what_is_no_model_is_told_at_once(trained, tmp_path, kind):
    model = tmp_path / "model.keras"
    content = trained[0].read_bytes()
    if kind == "folder":
        model.mkdir()
    elif kind != "missing":
        model.write_bytes({"empty": b"", "text": b"not a model\n", "truncated": content[: len(content) // 2]}[kind])
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
    assert (status, bench.left(), bench.records()) == (1, [], [])
    assert len(stdout.splitlines()) == 1 and len(stderr.splitlines()) == 1
    assert "Lambda" in stderr and str(models / "lambda.keras") in stderr and "safe_mode" not in stderr
    assert not (models / "mark").exists()


def test_a_model_of_another_shape_or_with_other_classes_is_refused(models, trained, tmp_path):
    assert "train_model.py" in refused(tmp_path, models / "shape.keras", trained[1])
    message = refused(tmp_path, models / "classes.keras", trained[1])
    assert (
        message.startswith("wrong answers: accuracy 0.")
        and "by the model or the stand-in data" in message
        and "train_model.py" in message
    )


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "array missing", "shape", "labels", "pickled"])
def test_bad_data_is_told_and_nothing_unpickled(trained, tmp_path, kind):
    data, mark = tmp_path / "mnist.npz", tmp_path / "mark"
    arrays = dict(np.load(trained[1]))
    if kind == "array missing":
        del arrays["x_test"]
    elif kind == "shape":
        arrays["x_test"] = arrays["x_test"][:, :14, :14]
    elif kind == "labels":
        arrays["y_test"] = 9 - arrays["y_test"]
    elif kind == "pickled":
        arrays["x_test"] = np.array([Bomb(mark)], object)
    if kind != "missing":
        np.savez(data, **arrays)
    if kind == "truncated":
        data.write_bytes(data.read_bytes()[:100_000])
    elif kind == "text":
        data.write_text("not arrays")
    message = refused(tmp_path, trained[0], data)
    assert str(data) in message and "train_model.py" in message and "unsafely" not in message
    assert not mark.exists()


@pytest.mark.parametrize(
    "arguments",
    [["--trials", "0"], ["--rounds", "many"], ["--num-cpus", "0"], ["--num-cpus", "1000000"], ["--no-such-flag"]],
)
def test_wrong_arguments_are_usage_errors(trained, tmp_path, arguments):
    assert arguments[0] in refused(tmp_path, *trained, *arguments, status=2)


def test_num_cpus_is_for_a_private_ray(trained, tmp_path):
    arguments = ["--address", "auto", "--num-cpus", "1"]
    message = refused(tmp_path, *trained, *arguments, script="bench_ray.py", status=2)
    assert "--num-cpus" in message and "cluster" in message


def test_the_kind_of_data_is_told_by_the_content_of_the_arrays(trained, tmp_path):
    arrays = dict(np.load(trained[1]))
    del arrays["stand_in"]
    np.savez(tmp_path / "other.npz", **arrays)
    files = ["--model", trained[0], "--data", tmp_path / "other.npz", "--output", tmp_path / "results.jsonl"]
    done = run("bench_serial.py", *files, "--trials", "1", "--rounds", "1", "--predict-on-batch")
    assert done.returncode == 0, done.stderr
    assert zipfile.is_zipfile(tmp_path / "other.npz") and " on other-" in done.stdout.splitlines()[0]
