"""train_model.py as a user runs it: what it leaves, where its data come from, and what it says to bad input."""

import hashlib
import importlib.util
import io
import os
import re
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
from conftest import ROOT, run

import train_model

# Goes before everything else in each process of a run: a network that only tells who reached for it, and where
# SUBSTITUTE names a file or "hang", something else in the place of Keras's download.
SITE = """
import ctypes, os, shutil, socket, sys

def refuse(*arguments, **options):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        print(arguments, file=log)
    raise OSError("the test forbids the network")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
substitute = os.environ.get("SUBSTITUTE")
if substitute and sys.argv[0] == "-c":
    import keras.src.utils.file_utils as loader

    def urlretrieve(url, filename, progress):
        if substitute == "hang":
            ctypes.PyDLL(None).sleep(100)  # in C and with the interpreter's lock, where Python can't be interrupted
        shutil.copyfile(substitute, filename)

    loader.urlretrieve = urlretrieve
    loader.validate_file = lambda *arguments, **options: True  # nobody but the real MNIST has its hash
"""


@pytest.fixture
def network(tmp_path):
    """The environment of a run whose network is SITE's, with a Keras cache of its own."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    settings = {"PYTHONPATH": tmp_path / "site", "NETWORK_LOG": tmp_path / "network", "KERAS_HOME": tmp_path / "keras"}
    return os.environ | {name: str(value) for name, value in settings.items()}


def arrays(**changes):
    """Arrays of MNIST's shapes, all black and all labelled 0, but for the changes."""
    return {name: np.zeros(shape, np.uint8) for name, shape in train_model.SHAPES.items()} | changes


def weights(model):
    """The weights of both dense layers, as stored in the .keras file, read without Keras."""
    with zipfile.ZipFile(model) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        layers = [file[f"layers/{name}/vars"] for name in ("dense", "dense_1")]
        return [np.array(layer[index]) for layer in layers for index in ("0", "1")]


def accuracy(model, data):
    """The share of right answers to the test images by a forward pass in numpy."""
    kernel, bias, kernel_1, bias_1 = weights(model)
    with np.load(data) as mnist:
        hidden = np.maximum(0, mnist["x_test"].reshape(-1, 784) / 255 @ kernel + bias)
        return np.mean(np.argmax(hidden @ kernel_1 + bias_1, axis=1) == mnist["y_test"])


def wait_for(path, process, seconds=60):
    """Wait until there is such a file, while the process lives."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def start(*arguments, **options):
    """Start train_model.py and return the process, its output in pipes."""
    command = [sys.executable, str(ROOT / "train_model.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_trains_on_data_that_exists_and_tells_the_accuracy(trained, tmp_path):
    model, data = trained
    before = data.stat()
    done = run("train_model.py", "--model", tmp_path / "again.keras", "--data", data)
    assert done.returncode == 0, done.stderr
    told = float(re.search(r"test accuracy (0\.\d{4}) on 10000 images.*stand-in", done.stdout)[1])
    assert 0.95 < told < 1
    assert told == pytest.approx(accuracy(tmp_path / "again.keras", data), abs=2e-4)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr.splitlines() == [
        f"WARNING: {data} IS A STAND-IN, NOT MNIST. To try for MNIST: remove it, run again."
    ]
    assert data.stat() == before
    assert os.listdir(tmp_path) == ["again.keras"]
    for first, second in zip(weights(model), weights(tmp_path / "again.keras"), strict=True):
        assert np.array_equal(first, second)  # seeded: the same data on the same machine


def test_snippet_runs_alone_in_an_empty_folder(tmp_path):
    source = (ROOT / "train_model.py").read_text()
    regions = re.findall(r"^# snippet: start\n(.*?)^# snippet: end$", source, re.MULTILINE | re.DOTALL)
    pasted = "".join(regions)
    for path in ("/tmp/model.keras", "/tmp/mnist.npz"):
        assert pasted.count(path) == 1
        pasted = pasted.replace(path, str(tmp_path / os.path.basename(path)))
    (tmp_path / "pasted.py").write_text(pasted)
    train_model.draw_stand_in(tmp_path / "mnist.npz", count=30000)
    done = subprocess.run([sys.executable, "pasted.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert [array.shape for array in weights(tmp_path / "model.keras")] == [(784, 512), (512,), (512, 10), (10,)]
    assert accuracy(tmp_path / "model.keras", tmp_path / "mnist.npz") > 0.8  # after a third of the images


def test_stand_in_looks_like_mnist(trained):
    _, data = trained
    assert 11.5e6 / 2 < data.stat().st_size < 11.5e6 * 2
    assert train_model.data_kind(data) == "stand-in"
    with np.load(data) as mnist:
        x_train, y_train, x_test, y_test = (mnist[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    assert (x_train.shape, y_train.shape) == ((60000, 28, 28), (60000,))
    assert (x_test.shape, y_test.shape) == ((10000, 28, 28), (10000,))
    assert {array.dtype for array in (x_train, y_train, x_test, y_test)} == {np.dtype("uint8")}
    assert 5500 < np.bincount(y_train, minlength=10).min() and np.bincount(y_train).size == 10
    assert x_train.max() > 250
    assert not {image.tobytes() for image in x_test} & {image.tobytes() for image in x_train}


def test_stand_in_is_the_same_bytes_each_time(tmp_path):
    for name in ("one.npz", "two.npz"):
        train_model.draw_stand_in(tmp_path / name, count=10500)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.npz") as archive:  # no time of day in it, which would show only later
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_kind_of_data_is_known_by_content(tmp_path, monkeypatch):
    data = tmp_path / "mnist.npz"
    np.savez_compressed(data, **arrays())
    assert train_model.data_kind(data) == "other"
    monkeypatch.setattr(train_model, "MNIST_SHA256", hashlib.sha256(data.read_bytes()).hexdigest())
    assert train_model.data_kind(data) == "mnist"
    monkeypatch.undo()
    loader = Path(importlib.util.find_spec("keras").origin).parent / "src/datasets/mnist.py"
    assert train_model.MNIST_SHA256 in loader.read_text()


def test_downloaded_file_is_kept_byte_for_byte_and_ctrl_c_ends_the_training(tmp_path, network):
    substitute, data, model = tmp_path / "substitute.npz", tmp_path / "out" / "mnist.npz", tmp_path / "out" / "m.keras"
    data.parent.mkdir()
    np.savez_compressed(substitute, **arrays(x_test=np.full((10000, 28, 28), 7, np.uint8)))
    process = start("--model", model, "--data", data, env=network | {"SUBSTITUTE": str(substitute)})
    wait_for(data, process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == ""
    assert stderr.splitlines() == ["fetching MNIST, for a minute at most"]
    assert data.read_bytes() == substitute.read_bytes() == (tmp_path / "keras/datasets/mnist.npz").read_bytes()
    assert os.listdir(data.parent) == ["mnist.npz"]
    assert not (tmp_path / "network").exists()


def test_without_a_network_there_is_the_stand_in_and_sigterm_ends_the_training(tmp_path, network):
    data, model = tmp_path / "out" / "mnist.npz", tmp_path / "out" / "model.keras"
    data.parent.mkdir()
    model.write_text("old")
    process = start("--model", model, "--data", data, env=network)
    wait_for(data, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and stdout == ""
    assert re.fullmatch(
        f"fetching MNIST.*\nNO MNIST: .*the test forbids the network.*\nWARNING: {data} IS A STAND-IN.*\n", stderr
    )
    assert train_model.data_kind(data) == "stand-in"
    assert sorted(os.listdir(data.parent)) == ["mnist.npz", "model.keras"] and model.read_text() == "old"
    assert (tmp_path / "network").read_text().count("storage.googleapis.com") >= 1


def test_a_download_that_hangs_in_c_is_ended(tmp_path, network, monkeypatch, capfd):
    assert train_model.DOWNLOAD.count("alarm(60)") == 1
    monkeypatch.setattr(train_model, "DOWNLOAD", train_model.DOWNLOAD.replace("alarm(60)", "alarm(1)"))
    for name, value in (network | {"SUBSTITUTE": "hang"}).items():
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    assert not train_model.download(str(tmp_path / "mnist.npz"))
    assert time.monotonic() - begin < 60  # of the 100 s that it would have hung
    assert "NO MNIST: too slow" in capfd.readouterr().err
    assert not (tmp_path / "mnist.npz").exists()


def test_kill_9_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    model, data = tmp_path / "model.keras", tmp_path / "mnist.npz"
    model.write_text("old")
    process = start("--stand-in", "--model", model, "--data", data)
    while not any(part.stat().st_size for part in tmp_path.glob(".part-*/mnist.npz")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not data.exists() and model.read_text() == "old"


def test_full_disk_is_told_and_leaves_the_old_file(tmp_path):
    # No file may grow over a megabyte, which fails in the same calls as a full disk; the model has five.
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))}
    (tmp_path / "model.keras").write_text("old")
    code = """if True:
        import numpy, train_model
        train_model.import_tensorflow()
        with train_model.whole("model.keras", "model.keras") as part:
            train_model.train({"x_train": numpy.zeros((32, 28, 28)), "y_train": numpy.zeros(32)}, part)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, **limit)
    assert done.returncode == 1
    assert done.stderr == "can't write model.keras (File too large): see to its folder and the disk, or name another\n"
    assert os.listdir(tmp_path) == ["model.keras"] and (tmp_path / "model.keras").read_text() == "old"
    done = run("train_model.py", "--stand-in", "--model", "m.keras", "--data", "d.npz", cwd=tmp_path, **limit)
    assert done.returncode == 1
    assert done.stderr == "can't write d.npz (File too large): see to its folder and the disk, or name another\n"
    assert os.listdir(tmp_path) == ["model.keras"]


def test_what_aborts_the_import_of_tensorflow_is_not_hidden(tmp_path):
    chatter = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\nI0000 hello\n"
    (tmp_path / "tensorflow.py").write_text(
        f"import os\nos.write(2, {(chatter + 'no AVX here')!r}.encode())\nos.abort()"
    )
    code = "import train_model; train_model.import_tensorflow()"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr == "no AVX here\n"


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def images(*shape):
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not a zip"),
        (b"some text\n" * 100, "not a zip"),
        (lambda whole: whole[:-100], "not a zip"),
        (lambda whole: whole[:3000] + b"\xff" * 50 + whole[3050:], "Bad CRC-32 for file 'x_train.npy'"),
        ({"x_test": None}, "x_test is not a file in the archive"),
        ({"x_train": images(60000, 28, 27)}, "x_train has to be uint8 (60000, 28, 28)"),
        ({"x_test": images(10, 28, 28)}, "x_test has to be uint8 (10000, 28, 28)"),
        ({"y_train": np.zeros(60000)}, "y_train has to be uint8"),
        ({"y_test": np.full(10000, 10, np.uint8)}, "labels 0 to 9"),
        ("pickle", "Object arrays cannot be loaded when allow_pickle=False"),
        ("header", "arrays (Unable to allocate"),  # NumPy's, before it reads on
    ],
)
def test_bad_data_is_refused_at_once_and_left_alone(tmp_path, content, complaint):
    data, trap = tmp_path / "mnist.npz", tmp_path / "trap"
    if content == "pickle":
        content = {"x_train": np.array([Trap(str(trap))], dtype=object)}
    changes = content if isinstance(content, dict) else {}
    np.savez_compressed(data, **{name: array for name, array in arrays(**changes).items() if array is not None})
    if content == "header":  # an array of petabytes, they say
        with zipfile.ZipFile(data) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, member in members.items():
                archive.writestr(name, member.replace(b"(60000, 28, 28), }" + b" " * 9, b"(60000000000000, 28, 28), }"))
    elif isinstance(content, bytes):
        data.write_bytes(content)
    elif callable(content):
        data.write_bytes(content(data.read_bytes()))
    before = data.read_bytes()
    done = run("train_model.py", "--model", tmp_path / "model.keras", "--data", data, timeout=20)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{data} doesn't hold MNIST's four arrays (")
    assert complaint in done.stderr and "--data" in done.stderr
    assert data.read_bytes() == before
    assert os.listdir(tmp_path) == ["mnist.npz"]  # no model, no part of one, and the trap was not sprung


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--model", "model"], 2, "ends in .keras"),
        (["--model", "model.h5"], 2, "ends in .keras"),
        (["--epochs", "2"], 2, "unrecognized arguments: --epochs"),
        (["--model", "missing/model.keras"], 1, "can't write missing/model.keras (No such file or directory)"),
        (["--model", "text/model.keras"], 1, "can't write text/model.keras (Not a directory)"),
        (["--model", "folder.keras"], 1, "folder.keras is a folder or a device"),
        (["--model", "full.keras"], 1, "full.keras is a folder or a device"),
        (["--stand-in", "--data", "missing/mnist.npz"], 1, "can't write missing/mnist.npz (No such file or directory)"),
        (["--data", "folder.keras"], 1, "folder.keras is a folder or a device"),
        (["--data", "/dev/full"], 1, "/dev/full is a folder or a device"),
        (["--data", "/dev/zero"], 1, "/dev/zero is a folder or a device"),
        (["--stand-in", "--data", "own.npz"], 2, "--stand-in, but own.npz holds other data (other)"),
    ],
)
def test_bad_arguments_and_targets_are_told_before_tensorflow_is_imported(tmp_path, arguments, status, complaint):
    (tmp_path / "folder.keras").mkdir()
    (tmp_path / "full.keras").symlink_to("/dev/full")
    (tmp_path / "text").write_text("")
    if "own.npz" in arguments:
        np.savez_compressed(tmp_path / "own.npz", **arrays())
    before = sorted(os.listdir(tmp_path))
    # The last of two equal options counts.
    done = run("train_model.py", "--model", "m.keras", "--data", "text", *arguments, cwd=tmp_path, timeout=20)
    assert done.returncode == status
    assert complaint in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and sorted(os.listdir(tmp_path)) == before


def test_bad_input_needs_no_tensorflow(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = run("train_model.py", "--model", tmp_path / "m.keras", "--data", __file__, env=environment)
    assert done.returncode == 1 and "not a zip" in done.stderr
