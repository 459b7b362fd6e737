"""train_model.py: what it leaves, where its data come from, and what becomes of bad data, signals and odd settings."""

import hashlib
import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT

import train_model

NAMES = ("x_train", "y_train", "x_test", "y_test")
STAND_IN_SHA256 = "4ddbf243c4c6fdd3d528fd04a3439b436487fc0089c875be652eaa5552fd6b43"  # of its arrays, in all editions

# What users set for other programs.
SETTINGS = """
    KERAS_BACKEND=torch KERAS_MAX_STEPS_PER_EPOCH=1 KERAS_NNX_ENABLED=1 TF_USE_LEGACY_KERAS=1
    TF_XLA_FLAGS=--of_another_version PYTHONOPTIMIZE=2 PYTHONSAFEPATH=1 PYTHONWARNINGS=error"""
KERAS_JSON = '{"backend": "torch", "floatx": "float16", "image_data_format": "channels_first"}'

# Imported first by the process that fetches MNIST: in place of the network a file, which Keras takes for MNIST.
SITE = """
import os, shutil
import keras.src.utils.file_utils as loader
def urlretrieve(url, filename, progress):
    assert url == "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
    shutil.copyfile(os.environ["SUBSTITUTE"], filename)
loader.urlretrieve = urlretrieve
loader.validate_file = lambda *arguments, **options: True
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A stand-in with 1,000 images for the training instead of 60,000."""
    data = tmp_path_factory.mktemp("small") / "mnist.npz"
    train_model.draw_stand_in(data, count=11000)
    return data


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Run main() in this process, in an empty folder. The model is model.keras, unless the arguments say otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_HOME", os.devnull)  # train() sets it: now it is put back after the test.
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # pytest's stay.

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_model.py", "--model", "model.keras", *map(str, arguments)])
        train_model.main()

    return main


def weights(model):
    with zipfile.ZipFile(model) as archive:
        return archive.read("model.weights.h5")


def accuracy(model, mnist):
    """The share of right answers to the test images by a forward pass in numpy, with the weights read without Keras."""
    with h5py.File(io.BytesIO(weights(model))) as file:
        hidden, output = (file[f"layers/{name}/vars"] for name in ("dense", "dense_1"))
        values = np.maximum(0, mnist["x_test"].reshape(-1, 784) / 255 @ hidden["0"] + hidden["1"])
        return np.mean(np.argmax(values @ output["0"] + output["1"], axis=1) == mnist["y_test"])


def test_stand_in_is_the_known_one_and_like_mnist_and_is_learned(trained):
    model, data = trained
    with np.load(data) as file:
        mnist = dict(file)
    assert train_model.data_kind(mnist) == "stand-in"
    assert hashlib.sha256(b"".join(mnist[name].tobytes() for name in NAMES)).hexdigest() == STAND_IN_SHA256
    assert [mnist[name].shape for name in NAMES] == [(60000, 28, 28), (60000,), (10000, 28, 28), (10000,)]
    assert 0.95 < accuracy(model, mnist) < 1


def test_nothing_that_is_set_for_other_programs_changes_the_training(small, main, tmp_path, capsys):
    main("--data", small)
    with np.load(small) as mnist:
        expected = f"test accuracy {accuracy('model.keras', mnist):.4f}, data: stand-in ({small}), model: "
    assert capsys.readouterr().out == f"{expected}model.keras\n"
    Path("keras.json").write_text(KERAS_JSON)
    settings = {"KERAS_HOME": str(tmp_path)} | dict(setting.split("=", 1) for setting in SETTINGS.split())
    command = [sys.executable, ROOT / "train_model.py", "--model", "odd.keras", "--data", small]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{expected}odd.keras\n"), done.stderr
    assert f"WARNING: {small} IS A STAND-IN, NOT MNIST" in done.stderr
    assert weights("odd.keras") == weights("model.keras")  # It is seeded.


def test_kind_of_data_is_known_by_the_content_of_the_arrays(monkeypatch, small):
    with np.load(small) as file:
        mnist = {name: file[name] for name in reversed(NAMES)}
    content = b"".join(mnist[name].tobytes() for name in ("x_test", "x_train", "y_test", "y_train"))
    digest = hashlib.sha256(content).hexdigest()
    assert train_model.data_kind(mnist) == "other"
    monkeypatch.setattr(train_model, "MNIST_SHA256", digest)
    assert train_model.data_kind(mnist) == "mnist"


def test_mnist_comes_from_keras_s_loader_and_stays_in_its_cache(small, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SUBSTITUTE", str(small))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    assert train_model.download(str(tmp_path / "mnist.npz"))
    assert (tmp_path / "mnist.npz").read_bytes() == small.read_bytes()
    assert (tmp_path / "keras" / "datasets" / "mnist.npz").read_bytes() == small.read_bytes()


@pytest.mark.timeout(60)
def test_a_download_that_hangs_or_fails_is_told(tmp_path, monkeypatch, capsys):
    hang = f"import ctypes, os; os.mkdir({str(tmp_path / 'hangs')!r}); ctypes.PyDLL(None).sleep(1000)"
    monkeypatch.setattr(train_model, "DOWNLOAD", hang)  # In C, where Python cannot interrupt it.
    assert not train_model.download(str(tmp_path / "mnist.npz"), seconds=1)
    assert (tmp_path / "hangs").exists() and "no MNIST: no answer in time" in capsys.readouterr().err
    monkeypatch.setattr(train_model, "DOWNLOAD", "raise OSError('[Errno 111] Connection refused')")
    assert not train_model.download(str(tmp_path / "mnist.npz"))
    assert "no MNIST: OSError: [Errno 111] Connection refused\n" in capsys.readouterr().err


@pytest.mark.parametrize("full", [False, True])
def test_both_files_take_the_place_of_planted_links_at_the_end_or_not_at_all(main, small, monkeypatch, full):
    draw = train_model.draw_stand_in
    monkeypatch.setattr(train_model, "download", lambda data: False)
    monkeypatch.setattr(train_model, "draw_stand_in", lambda data: draw(data, count=11000))
    Path("precious").write_text("precious")
    os.symlink("precious", "model.keras")
    os.symlink("nowhere", "mnist.npz")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:  # A file that may not grow fails in the same calls as a full disk. The model has 5 MB, the data 2.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 2**20, hard))
    try:
        main("--data", "mnist.npz")
    except SystemExit as ended:
        assert full and "File too large" in ended.code and "(model model.keras, data mnist.npz" in ended.code
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.path.islink("model.keras") == os.path.islink("mnist.npz") == full
    assert full or Path("mnist.npz").read_bytes() == small.read_bytes() and zipfile.is_zipfile("model.keras")
    assert Path("precious").read_text() == "precious" and len(os.listdir()) == 3


@pytest.mark.parametrize(("number", "status", "seconds"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 6)])
def test_signals_while_it_draws_and_trains_leave_nothing(trained, tmp_path, number, status, seconds):
    data = trained[1] if number == signal.SIGTERM else "mnist.npz"
    command = [sys.executable, ROOT / "train_model.py", "--stand-in", "--model", "model.keras", "--data", data]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not os.listdir(tmp_path):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(seconds)
    process.send_signal(number)
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == status
    assert os.listdir(tmp_path) == []


class Trap:
    def __reduce__(self):
        return open, ("sprung", "w")


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        ({"y_test": np.array([Trap()], dtype=object)}, "ValueError"),
        ({"x_train": np.zeros((1000, 784), np.uint8)}, "ValueError"),
        (pickle.dumps(Trap()), "ValueError"),
        (b"PK\3\4, and nothing that could follow", "BadZipFile"),
    ],
)
def test_bad_data_is_told_in_one_line_and_left_alone(main, small, spoilt, reason):
    data = Path("mnist.npz")
    if isinstance(spoilt, bytes):
        data.write_bytes(spoilt)
    else:
        with np.load(small) as mnist:
            np.savez(data, **(dict(mnist) | spoilt))
    before = data.read_bytes()
    with pytest.raises(SystemExit) as ended:
        main("--data", data)
    assert ended.value.code.startswith(f"{reason}: ") and "data mnist.npz: x_train, " in ended.value.code
    assert "\n" not in ended.value.code and "unsafely" not in ended.value.code
    assert os.listdir() == ["mnist.npz"] and data.read_bytes() == before


def test_an_exception_in_the_training_is_not_blamed_on_the_data(main, small, monkeypatch):
    monkeypatch.setattr(train_model, "train", lambda mnist, filename: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        main("--data", small)
    assert ended.value.code.startswith("ZeroDivisionError: division by zero (") and "remove" not in ended.value.code


def test_bad_names_are_told_before_the_training(main, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main("--model", "model.h5")
    assert "have to end in .keras (--model) and in .npz (--data)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="No such file or directory: 'missing/"):
        main("--data", "missing/mnist.npz")
