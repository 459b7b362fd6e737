"""train_model.py: the model, the data that it takes, fetches or draws, and what it leaves."""

import ctypes
import hashlib
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, expected_labels, run

import train_model

NAMES = ["x_test", "x_train", "y_test", "y_train"]
IMAGES = np.full((20, 28, 28), range(200, 228), "uint8")
IMAGES[0] = 0
LABELS = np.arange(20, dtype="uint8") % 10
DATA = {
    "x_train": IMAGES,
    "y_train": LABELS,
    "x_test": IMAGES[::-1],
    "y_test": LABELS[::-1],
}
OLD_MODEL = b"an old model"
NEW_MODEL = b"a new model"


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Run main() in this process, in an empty folder, with few images and without the training."""
    monkeypatch.chdir(tmp_path)
    draw = train_model.draw_stand_in

    def train(datafile, filename):
        Path(filename).write_bytes(NEW_MODEL)
        return 0.5

    def main(*arguments):
        argv = ["train_model.py", "--model", "model.keras", "--data", "mnist.npz", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        train_model.main()

    monkeypatch.setattr(train_model, "train", train)
    monkeypatch.setattr(train_model, "draw_stand_in", lambda: draw(200, 100))
    return main


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A stand-in of 1,500 images, and the model that the real script has trained on it."""
    folder = tmp_path_factory.mktemp("small")
    files = types.SimpleNamespace(data=folder / "mnist.npz", model=folder / "model.keras")
    np.savez(files.data, **train_model.draw_stand_in(1000, 500))
    done = run("train_model.py", "--model", files.model, "--data", files.data)
    assert done.returncode == 0, done.stderr
    files.stdout = done.stdout
    return files


def load(data):
    with np.load(data) as file:
        return {name: file[name] for name in file}


def digest(mnist):
    return hashlib.sha256(b"".join(mnist[name].tobytes() for name in NAMES)).hexdigest()


def equal(mnist, other):
    return all(np.array_equal(mnist[name], other[name]) for name in NAMES)


def weights(model):
    with zipfile.ZipFile(model) as archive:
        return archive.read("model.weights.h5")


# The model


def test_accuracy_is_that_of_a_forward_pass_in_numpy(small):
    mnist = load(small.data)
    accuracy = np.mean(expected_labels(small.model, mnist["x_test"]) == mnist["y_test"])
    assert accuracy > 0.9
    files = f"data: other ({small.data}), model: {small.model}"
    assert small.stdout == f"test accuracy {accuracy:.4f}, {files}\n"


def test_settings_for_other_programs_do_not_change_the_weights(small, tmp_path):
    keras_json = '{"backend": "torch", "floatx": "float16", "image_data_format": "channels_first"}'
    (tmp_path / "keras.json").write_text(keras_json)
    settings = {"KERAS_HOME": str(tmp_path), "KERAS_BACKEND": "torch", "TF_USE_LEGACY_KERAS": "1"}
    model = tmp_path / "model.keras"
    environment = os.environ | settings
    done = run("train_model.py", "--model", model, "--data", small.data, env=environment)
    assert done.returncode == 0, done.stderr
    assert weights(model) == weights(small.model)


def test_a_user_without_a_home_gets_no_folder_with_the_name_of_a_tilde():
    nobody = "import os, pwd; pwd.getpwuid = {}.__getitem__; os.environ.pop('HOME', None); "
    code = nobody + "import train_model; print(os.path.expanduser('~'))"
    home = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert os.path.isdir(home.strip())


# The stand-in


def test_stand_in_has_the_known_bytes_and_looks_like_mnist():
    mnist = train_model.draw_stand_in()
    assert train_model.KINDS[digest(mnist)] == "stand-in"
    assert {name: array.shape for name, array in mnist.items()} == {
        "x_train": (60000, 28, 28),
        "y_train": (60000,),
        "x_test": (10000, 28, 28),
        "y_test": (10000,),
    }
    assert all(array.dtype == np.uint8 for array in mnist.values())


@pytest.mark.parametrize("kind", ["MNIST", "stand-in", "other"])
def test_kind_of_data_is_told_by_their_bytes(main, monkeypatch, capsys, kind):
    np.savez("mnist.npz", **DATA, note="no array of MNIST's")
    monkeypatch.setattr(train_model, "KINDS", {digest(DATA): kind})
    main()
    out, err = capsys.readouterr()
    assert out == f"test accuracy 0.5000, data: {kind} (mnist.npz), model: model.keras\n"
    warning = (
        "WARNING: the data are a stand-in, not MNIST; remove mnist.npz to try for MNIST again\n"
    )
    assert err == (warning if kind == "stand-in" else "")


# Where the data come from


def test_data_that_exist_are_used_as_they_are(main, monkeypatch):
    np.savez("mnist.npz", **DATA)
    before = Path("mnist.npz").read_bytes()
    monkeypatch.setattr(train_model, "load_mnist", None)
    monkeypatch.setattr(train_model, "draw_stand_in", None)
    main()
    assert Path("mnist.npz").read_bytes() == before


def test_mnist_comes_from_keras_s_loader(main, monkeypatch, capsys):
    def load_data():
        return (IMAGES, LABELS), (IMAGES + 1, LABELS[::-1])

    mnist = types.SimpleNamespace(load_data=load_data)
    keras = types.SimpleNamespace(datasets=types.SimpleNamespace(mnist=mnist))
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(keras=keras))
    main()
    assert equal(load("mnist.npz"), DATA | {"x_test": IMAGES + 1, "y_test": LABELS[::-1]})
    assert capsys.readouterr().err == ""


def test_a_download_that_fails_is_told_and_gives_the_stand_in(tmp_path):
    proxies = {name: "http://127.0.0.1:9" for name in ["https_proxy", "HTTPS_PROXY"]}
    environment = os.environ | proxies | {"KERAS_HOME": str(tmp_path), "no_proxy": ""}
    code = "import train_model as t; t.draw_stand_in = lambda: 'drawn'; print(t.fetch_or_draw())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "drawn"
    [told] = [line for line in done.stderr.splitlines() if line.startswith("no MNIST")]
    assert told.endswith("[Errno 111] Connection refused): drawing a stand-in")


def hang():
    Path("hanging").touch()
    ctypes.PyDLL(None).sleep(1000)  # In C, where Python cannot interrupt it.


@pytest.mark.timeout(60)
def test_a_download_that_hangs_is_told_and_ended(main, monkeypatch, capsys):
    monkeypatch.setattr(train_model, "load_mnist", hang)
    fetch = train_model.fetch_or_draw
    monkeypatch.setattr(train_model, "fetch_or_draw", lambda: fetch(seconds=1))
    main()
    assert os.path.exists("hanging") and multiprocessing.active_children() == []
    assert capsys.readouterr().err == "no MNIST (no answer within 1 s): drawing a stand-in\n"
    assert equal(load("mnist.npz"), train_model.draw_stand_in())


# Bad input


class Trap:
    """An object that leaves a file when it is unpickled."""

    def __reduce__(self):
        return open, ("sprung", "w")


def damaged(name):
    """Return the bytes of good data in which a byte of an array is not what it was."""
    np.savez("good.npz", **DATA)
    good = Path("good.npz").read_bytes()
    os.remove("good.npz")
    at = good.index(f"{name}.npy".encode()) + 500
    return good[:at] + b"\1" + good[at + 1 :]


SCALE = "and not from 0 to 255"
SHAPE = "and not (count, 28, 28)"
NAN = np.where(IMAGES == 227, np.nan, IMAGES)
BAD = {
    "scaled": ({"x_train": IMAGES / 227}, f"x_train has values from 0.0 to 1.0 {SCALE}"),
    "scaled test": ({"x_test": IMAGES / 227}, f"x_test has values from 0.0 to 1.0 {SCALE}"),
    "negative": ({"x_train": IMAGES - 1.0}, f"x_train has values from -1.0 to 226.0 {SCALE}"),
    "too large": ({"x_test": IMAGES * 2.0}, f"x_test has values from 0.0 to 454.0 {SCALE}"),
    "NaN": ({"x_train": NAN}, f"x_train has values from nan to nan {SCALE}"),
    "channel": ({"x_test": IMAGES[..., None]}, f"x_test has the shape (20, 28, 28, 1) {SHAPE}"),
    "no images": ({"x_train": IMAGES[:0]}, f"x_train has the shape (0, 28, 28) {SHAPE}"),
    "fewer labels": (
        {"y_train": LABELS[1:]},
        "y_train has the shape (19,), but there are 20 images in x_train",
    ),
    "a column": (
        {"y_test": LABELS[:, None]},
        "y_test has the shape (20, 1), but there are 20 images in x_test",
    ),
    "labels from 1": ({"y_train": LABELS + 1}, "y_train has labels other than 0 to 9"),
    "objects": (
        {"y_test": np.array([Trap()], object)},
        "y_test cannot be read (Object arrays cannot be loaded when allow_pickle=False)",
    ),
    "missing": (
        ["x_train", "y_train", "x_test"],
        "y_test cannot be read ('y_test is not a file in the archive')",
    ),
    "damaged": ("x_train", "x_train cannot be read (Bad CRC-32 for file 'x_train.npy')"),
    "pickled": (pickle.dumps(Trap()), "this cannot be read as an .npz file"),
    "cut off": (b"PK\3\4 and no more", "this cannot be read as an .npz file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_told_in_a_line_and_left_alone(main, case):
    content, problem = BAD[case]
    if isinstance(content, dict):
        np.savez("mnist.npz", **DATA | content)
    elif isinstance(content, list):
        np.savez("mnist.npz", **{name: DATA[name] for name in content})
    elif isinstance(content, str):
        Path("mnist.npz").write_bytes(damaged(content))
    else:
        Path("mnist.npz").write_bytes(content)
    before = Path("mnist.npz").read_bytes()
    with pytest.raises(SystemExit) as exit:
        main()
    remedy = "name other data, or move this file away"
    assert exit.value.code == f"mnist.npz: {problem}; {remedy}"
    assert os.listdir() == ["mnist.npz"]  # Neither a model nor what the trap leaves.
    assert Path("mnist.npz").read_bytes() == before


@pytest.mark.parametrize("arguments", [["--model", "model.h5"], ["--data", "mnist.npy"]])
def test_names_with_another_ending_are_refused(main, capsys, arguments):
    with pytest.raises(SystemExit, match="^2$"):
        main(*arguments)
    assert "--model must end in .keras, and --data in .npz\n" in capsys.readouterr().err


def test_a_mistyped_flag_is_told_without_tensorflow(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = run("train_model.py", "--modle", env=environment)
    assert done.returncode == 2 and "unrecognized arguments: --modle" in done.stderr


# Files appear whole or not at all


def test_planted_links_are_replaced_and_not_followed(main):
    Path("precious").write_text("precious")
    os.symlink("precious", "model.keras")
    os.symlink("nowhere", "mnist.npz")
    main("--stand-in")
    assert not os.path.islink("model.keras") and not os.path.islink("mnist.npz")
    assert sorted(os.listdir()) == ["mnist.npz", "model.keras", "precious"]
    assert Path("precious").read_text() == "precious"


def limit_files(size):
    """Let no file grow beyond `size` bytes: the calls fail that a full disk would fail."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def test_a_full_disk_leaves_no_data(main):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    limit_files(10_000)
    try:
        with pytest.raises(OSError, match="File too large"):
            main("--stand-in")
    finally:
        limit_files(before)
    assert os.listdir() == []


def test_a_full_disk_leaves_the_old_model(small, tmp_path):
    model = tmp_path / "model.keras"
    model.write_bytes(OLD_MODEL)
    flags = ["--model", model, "--data", small.data]
    done = run("train_model.py", *flags, preexec_fn=lambda: limit_files(1_000_000))
    assert done.returncode == 1 and "OSError: [Errno 27] File too large" in done.stderr
    assert model.read_bytes() == OLD_MODEL
    assert os.listdir(tmp_path) == ["model.keras"]


def test_a_training_that_is_broken_off_leaves_the_old_model(main, monkeypatch):
    def train(datafile, filename):
        Path(filename).write_bytes(NEW_MODEL[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(train_model, "train", train)
    Path("model.keras").write_bytes(OLD_MODEL)
    with pytest.raises(KeyboardInterrupt):
        main("--stand-in")
    assert Path("model.keras").read_bytes() == OLD_MODEL
    assert sorted(os.listdir()) == ["mnist.npz", "model.keras"]


def heed_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # The background jobs of a shell ignore it.


def test_ctrl_c_leaves_no_half_written_data(tmp_path):
    flags = ["--stand-in", "--model", tmp_path / "model.keras", "--data", tmp_path / "mnist.npz"]
    command = [sys.executable, ROOT / "train_model.py", *flags]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stderr=pipe, text=True, preexec_fn=heed_ctrl_c)
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in tmp_path.glob("*/mnist.npz")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert error.endswith("KeyboardInterrupt\n") and process.returncode == -signal.SIGINT
    assert os.listdir(tmp_path) == []
