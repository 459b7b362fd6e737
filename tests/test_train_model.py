"""train_model.py: what it leaves, where its data come from, and what becomes of bad data, signals and odd settings."""

import hashlib
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, expected_labels, run

import train_model

NAMES = ("x_test", "x_train", "y_test", "y_train")
IMAGES = np.full((20, 28, 28), range(200, 228), np.uint8)
IMAGES[0] = 0
LABELS = np.arange(20, dtype=np.uint8) % 10
DATA = dict(zip(NAMES, [IMAGES, IMAGES, LABELS, LABELS], strict=True))

# What users set for other programs.
SETTINGS = """
    KERAS_BACKEND=torch KERAS_MAX_EPOCHS=none KERAS_MAX_STEPS_PER_EPOCH=1 KERAS_NNX_ENABLED=1 TF_USE_LEGACY_KERAS=1
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
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_model.py", "--model", "model.keras", *map(str, arguments)])
        train_model.main()

    return main


def weights(model):
    with zipfile.ZipFile(model) as archive:
        return archive.read("model.weights.h5")


def accuracy(model, mnist):
    return np.mean(expected_labels(model, mnist["x_test"]) == mnist["y_test"])


def test_stand_in_is_the_known_one_and_like_mnist_and_is_learned(trained):
    model, data = trained
    with np.load(data) as file:
        mnist = {name: file[name] for name in NAMES}
    digest = hashlib.sha256(b"".join(mnist[name].tobytes() for name in NAMES)).hexdigest()
    assert digest == "f7c6aaddfd20069bf7362190abf50157f8142991e90907ebc99dc56842a4145d"
    assert [mnist[name].shape for name in NAMES] == [(10000, 28, 28), (60000, 28, 28), (10000,), (60000,)]
    assert 0.95 < accuracy(model, mnist) < 1


def test_nothing_that_is_set_for_other_programs_changes_the_training(small, main, tmp_path, capsys):
    main("--data", small)
    with np.load(small) as mnist:
        expected = f"test accuracy {accuracy('model.keras', mnist):.4f}, data: other ({small}), model: "
    assert capsys.readouterr().out == f"{expected}model.keras\n"
    Path("keras.json").write_text(KERAS_JSON)
    settings = {"KERAS_HOME": str(tmp_path)} | dict(setting.split("=", 1) for setting in SETTINGS.split())
    done = run("train_model.py", "--model", "odd.keras", "--data", small, env=os.environ | settings)
    assert (done.returncode, done.stdout) == (0, f"{expected}odd.keras\n"), done.stderr
    assert weights("odd.keras") == weights("model.keras")  # It is seeded.


@pytest.mark.parametrize("kind", ["mnist", "stand-in", "other"])
def test_kind_of_data_is_known_by_the_bytes_of_the_four_arrays(main, monkeypatch, capsys, kind):
    digest = hashlib.sha256(b"".join(DATA[name].tobytes() for name in NAMES)).hexdigest()
    np.savez("mnist.npz", **DATA | {"y_train": LABELS[:, None]}, note="not MNIST's")  # A column has the same bytes.
    monkeypatch.setattr(train_model, "KINDS", {digest[:16]: kind})
    monkeypatch.setattr(train_model, "train", lambda mnist, filename: Path(filename).touch() or 0.5)
    main("--data", "mnist.npz")
    out, err = capsys.readouterr()
    assert out == f"test accuracy 0.5000, data: {kind} (mnist.npz), model: model.keras\n"
    assert ("mnist.npz IS A STAND-IN, NOT MNIST" in err) == (kind == "stand-in")


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
    assert (tmp_path / "hangs").exists() and "no MNIST: no answer within 1 s\n" in capsys.readouterr().err
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
    except OSError as error:
        assert full and "File too large" in str(error)
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


SPOILT = [{"x_train": x} for x in (IMAGES / 255, IMAGES - 1.0, IMAGES * 2.0, IMAGES[..., None], IMAGES[1:])]
SPOILT += [{"x_test": IMAGES / 255}, {"y_train": LABELS + 1}, {"y_test": np.array([Trap()], dtype=object)}]
SPOILT += [pickle.dumps(Trap()), b"PK\3\4, and nothing that could follow"]


@pytest.mark.parametrize("spoilt", SPOILT)
def test_bad_data_is_told_in_one_line_and_left_alone(main, spoilt):
    data = Path("mnist.npz")
    if isinstance(spoilt, bytes):
        data.write_bytes(spoilt)
    else:
        np.savez(data, **DATA | spoilt)
    before = data.read_bytes()
    needed = "x_train and x_test must be images (count, 28, 28) with values 0 to 255, y_train and y_test labels 0 to 9"
    with pytest.raises(ValueError, match=f"^{re.escape(needed)} .(ValueError|BadZipFile).; name other data [a-z ]+$"):
        main("--data", data)
    assert os.listdir() == ["mnist.npz"] and data.read_bytes() == before


@pytest.mark.parametrize("flags", [[], ["-X", "dev"]])
def test_an_exception_in_the_training_is_told_as_what_it_is(tmp_path, flags):
    np.savez(tmp_path / "mnist.npz", **DATA)
    (tmp_path / "tensorflow.py").write_text("raise MemoryError('Graph error:\\n\\nno room\\n [[{{node}}]]')")
    command = [sys.executable, *flags, ROOT / "train_model.py", "--model", "m.keras", "--data", "mnist.npz"]
    settings = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, timeout=60)
    told = done.stderr == "MemoryError: no room (model m.keras, data mnist.npz; python -X dev tells more)\n"
    assert done.returncode == 1 and (told, "Traceback" in done.stderr) == (not flags, bool(flags)), done.stderr
    assert sorted(os.listdir(tmp_path)) == ["mnist.npz", "tensorflow.py"]


def test_bad_names_are_told_before_the_training(main, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main("--model", "model.h5")
    assert "have to end in .keras (--model) and in .npz (--data)" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="'missing/"):
        main("--data", "missing/mnist.npz")
