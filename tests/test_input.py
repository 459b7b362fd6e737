"""Bad models, data and arguments: told by name and with the remedy, without a traceback, and nothing is recorded."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import bench_serial


@pytest.fixture
def main(monkeypatch, tmp_path, trained):
    """Run main() of bench_serial.py in this process, where TensorFlow may be loaded; return what it ends with."""
    monkeypatch.setattr(bench_serial, "end", lambda *status_and_message: sys.exit(status_and_message))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    allowed = os.sched_getaffinity(0)

    def main(model=trained[0], data=trained[1], more=""):
        flags = f"--rounds 1 --mode predict_on_batch --model {model} --data {data} {more} --output {tmp_path}/results"
        monkeypatch.setattr(sys, "argv", ["bench_serial.py", *flags.split()])
        with pytest.raises(SystemExit) as ended:
            try:
                bench_serial.main()
            except Exception:
                sys.excepthook(*sys.exc_info())
        return ended.value.code

    yield main
    os.sched_setaffinity(0, allowed)


def refused(main, *files):
    """Check that main() refuses in one line, and records nothing; return that line."""
    status, message = main(*files)
    assert status == 1 and message.count("\n") == 1 and "train_model.py makes fitting ones" in message
    assert os.path.getsize(sys.argv[-1]) == 0
    return message


@pytest.mark.parametrize("kind", ["missing", "text", "truncated"])
def test_what_is_no_model_is_told_at_once(main, trained, tmp_path, kind):
    model = tmp_path / "model.keras"
    if kind != "missing":
        model.write_bytes({"text": b"not a model\n", "truncated": trained[0].read_bytes()[:1_000_000]}[kind])
    assert str(model) in refused(main, model)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with models that load badly, made by Keras: shape, classes, lambda."""
    from keras import Sequential, layers

    folder = tmp_path_factory.mktemp("models")
    mark = str(folder / "mark")
    parts = {"shape": [(14, 14), layers.Dense(10)], "classes": [(28, 28), layers.Dense(5)]}
    parts["lambda"] = [(28, 28), layers.Lambda(lambda x: (open(mark, "w"), x)[1])]
    for name, (shape, layer) in parts.items():
        Sequential([layers.Input(shape), layers.Flatten(), layer]).save(folder / f"{name}.keras")
    (folder / "mark").unlink(missing_ok=True)  # Keras has called the Lambda layer to learn its shape.
    return folder


@pytest.mark.parametrize("approach", ["multiprocessing+initializer", "ray"])
def test_a_hostile_model_is_refused_and_its_code_not_run(models, start, approach):
    bench = start(approach, "--model", models / "lambda.keras")
    status, stdout, stderr = bench.finish()
    assert (status, stdout, bench.left(), bench.records()) == (1, "", [], [])
    assert len(stderr.splitlines()) == 1
    assert "Lambda" in stderr and str(models / "lambda.keras") in stderr and "safe_mode" not in stderr
    assert not (models / "mark").exists()


def test_a_model_of_another_shape_or_with_other_classes_is_refused(models, main):
    assert "ValueError: " in refused(main, models / "shape.keras")
    message = refused(main, models / "classes.keras")
    assert message.startswith("ValueError: wrong answers: ") and "pixels 0 to 255" in message
    assert str(models / "classes.keras") in message


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["missing", "truncated", "array missing", "labels", "pickled"])
def test_bad_data_is_told_and_nothing_unpickled(main, trained, tmp_path, kind):
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
    message = refused(main, trained[0], data)
    assert str(data) in message and "unsafely" not in message
    assert not mark.exists()


WRONG = ["--rounds 0", "--mode fast", "--num-cpus 0", "--num-cpus 1000000", "--no-such-flag", "--model a.h5"]


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments_are_usage_errors(main, trained, arguments, capsys):
    assert main(*trained, arguments) == 2
    assert arguments.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_other_packings_of_the_data_and_an_arm_processor(main, trained, tmp_path, monkeypatch):
    arrays = dict(np.load(trained[1]))
    np.savez(tmp_path / "scaled.npz", **(arrays | {"x_test": np.float32(arrays["x_test"] / 255)}))
    assert "pixels 0 to 255" in refused(main, trained[0], tmp_path / "scaled.npz")
    odd = {"y_test": arrays["y_test"].astype(np.int64)[:, None], "x_test": arrays["x_test"][..., None]}
    np.savez(tmp_path / "odd.npz", **(arrays | odd))
    (tmp_path / "cpuinfo").write_text("CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n")
    monkeypatch.setattr(bench_serial, "Path", lambda path: tmp_path if path == "/proc" else Path(path))
    assert main(trained[0], tmp_path / "odd.npz") == 0
    assert '"machine": "0x41 0xd0c, ' in (tmp_path / "results").read_text()


def test_what_nobody_foresaw_is_told_as_what_it_is(trained, tmp_path):
    """cProfile takes the place of the module __main__, in which pickle looks for the pool's function."""
    files = ["--model", trained[0], "--data", trained[1], "--output", tmp_path / "results.jsonl"]
    command = [sys.executable, "-m", "cProfile", ROOT / "bench_multiprocessing.py", *files]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("PicklingError: Can't pickle <function ")
    command[1:3] = ["-X", "dev", "-m", "cProfile"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback (most recent call last)" in done.stderr
