"""Wrong arguments, bad models and bad data: they are told by name, and nothing is recorded."""

import argparse
import os
import signal
import sys

import numpy as np
import psutil
import pytest

import bench_multiprocessing
import bench_ray
import bench_serial

SCRIPTS = [bench_serial, bench_multiprocessing, bench_ray]


@pytest.fixture
def main(monkeypatch, tmp_path, trained):
    """Run main() of a bench script in this process, for one round: by default bench_serial.py.

    Pixels of another size, for instance, are told by an exception. It is not caught here.
    """
    cpus = os.sched_getaffinity(0)
    handler = signal.getsignal(signal.SIGINT)
    output = tmp_path / "results.jsonl"

    def main(*arguments, script=bench_serial, model=trained[0], data=trained[1]):
        command = [script.__file__, "--model", model, "--data", data, "--output", output]
        command += ["--rounds", 1, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        script.main()

    main.output = output
    yield main
    signal.signal(signal.SIGINT, handler)
    for thread in psutil.Process().threads():
        os.sched_setaffinity(thread.id, cpus)


@pytest.fixture
def nothing_starts(monkeypatch):
    """Fail if a script reaches the point at which it starts something."""

    def fail(*arguments, **options):
        raise AssertionError("it has started something")

    monkeypatch.setattr("ray.init", fail)
    monkeypatch.setattr(bench_multiprocessing, "Pool", fail)
    monkeypatch.setattr(bench_serial, "pin", fail)


def refusal(ended, capsys):
    """The one line with which a script ends before it starts anything: argparse's, or its own."""
    assert ended.value.code != 0
    out, err = capsys.readouterr()
    assert out == ""
    if isinstance(ended.value.code, str):
        err += ended.value.code + "\n"  # Python prints it, and the status is 1.
    usage, found, line = err.rpartition(": error: ")
    assert line.count("\n") == 1
    assert bool(found) == usage.startswith("usage: ")
    return line


WRONG = [
    "--rounds 0",
    "--rounds -1",
    "--rounds x",
    "--num-cpus 0",
    "--num-cpus -1",
    "--num-cpus 100000",
    "--nonsense",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_argument_is_told_before_anything_starts(
    main, nothing_starts, capsys, script, arguments
):
    with pytest.raises(SystemExit) as ended:
        main(*arguments.split(), script=script)
    assert arguments.split()[0] in refusal(ended, capsys)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("which", ["model", "data"])
@pytest.mark.parametrize("kind", ["missing", "text", "cut off", "folder"])
def test_a_file_that_is_missing_or_damaged_is_told_before_anything_starts(
    main, nothing_starts, capsys, trained, tmp_path, script, which, kind
):
    whole = dict(zip(["model", "data"], trained, strict=True))[which]
    file = tmp_path / whole.name
    if kind == "text":
        file.write_text("This is no archive.\n")
    elif kind == "cut off":
        file.write_bytes(whole.read_bytes()[:1_000_000])
    elif kind == "folder":
        file.mkdir()
    with pytest.raises(SystemExit) as ended:
        main(script=script, **{which: file})
    line = refusal(ended, capsys)
    assert str(file) in line
    assert "train_model.py" in line


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_an_output_that_cannot_be_written_is_told_before_anything_starts(
    main, nothing_starts, capsys, tmp_path, script
):
    output = tmp_path / "missing" / "results.jsonl"
    with pytest.raises(SystemExit) as ended:
        main("--output", output, script=script)
    assert str(output) in refusal(ended, capsys)


def test_a_disk_that_is_full_at_the_end_is_told_and_the_rounds_are_on_the_screen(main, capsys):
    with pytest.raises(OSError, match="No space left on device"):
        main("--output", "/dev/full")
    assert "round 1: " in capsys.readouterr().out


# Wrong answers: one line, and no record.


def check_that_it_is_not_recorded(main, **files):
    """The run ends with one line, which is returned, and a status other than 0."""
    with pytest.raises(SystemExit) as ended:
        main(**files)
    assert main.output.read_text() == ""
    assert "\n" not in ended.value.code
    return ended.value.code


def test_labels_that_are_not_those_of_the_model_are_not_recorded(main, trained, tmp_path):
    data = tmp_path / "mnist.npz"
    mnist = dict(np.load(trained[1]))
    np.savez(data, **mnist | {"y_test": 9 - mnist["y_test"]})
    message = check_that_it_is_not_recorded(main, data=data)
    assert str(trained[0]) in message
    assert str(data) in message


def test_images_that_are_divided_by_255_already_are_not_recorded(main, trained, tmp_path):
    data = tmp_path / "mnist.npz"
    mnist = dict(np.load(trained[1]))
    np.savez(data, **mnist | {"x_test": mnist["x_test"] / 255})
    assert "255" in check_that_it_is_not_recorded(main, data=data)


def test_a_model_that_has_learned_nothing_is_not_recorded(models, main):
    assert "classes.keras" in check_that_it_is_not_recorded(main, model=models / "classes.keras")


@pytest.mark.parametrize("wrong", [0, 2, 3])
def test_answers_that_differ_are_not_recorded(trained, tmp_path, wrong):
    """Of two workers in two rounds one has a single other label in one round."""
    with np.load(trained[1]) as mnist:
        answers = [mnist["y_test"].copy() for _ in range(4)]
    answers[wrong][500] += 1
    output = tmp_path / "results.jsonl"
    files = argparse.Namespace(model=trained[0], data=trained[1], output=output, array=False)
    with pytest.raises(SystemExit, match="differ"):
        bench_serial.record(files, "serial", 1.0, [1.0, 1.0], answers)
    assert not output.exists()


# Files that are archives, as they should be, but hold something else.


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of models that do not fit, made by Keras: shape, classes, lambda."""
    from keras import Sequential, layers

    folder = tmp_path_factory.mktemp("models")
    mark = str(folder / "mark")
    parts = {
        "shape": [(14, 14), layers.Dense(10)],
        "classes": [(28, 28), layers.Dense(5)],
        "lambda": [(28, 28), layers.Lambda(lambda x: (open(mark, "w"), x)[1])],
    }
    for name, (shape, layer) in parts.items():
        model = Sequential([layers.Input(shape), layers.Flatten(), layer])
        model.save(folder / f"{name}.keras")
    (folder / "mark").unlink()  # Keras has called the Lambda layer to learn its shape.
    return folder


def test_the_code_in_a_foreign_model_is_not_run(models, main):
    with pytest.raises(ValueError, match="Lambda"):
        main(model=models / "lambda.keras")
    assert not (models / "mark").exists()
    assert main.output.read_text() == ""


@pytest.mark.parametrize(
    "approach, last_line",
    [
        ("multiprocessing", "Lambda"),
        ("ray", "Lambda"),
        ("multiprocessing+initializer", "worker has died"),  # The error stands above it.
    ],
)
def test_the_code_in_a_foreign_model_is_not_run_in_a_worker(models, start, approach, last_line):
    """A pool whose initializer fails would start new workers for ever."""
    bench = start(approach, "--num-cpus", 1, "--model", models / "lambda.keras")
    status, _, stderr = bench.finish()
    assert (status, bench.rounds()) == (1, 0)
    assert "Lambda" in stderr
    assert last_line in stderr.strip().splitlines()[-1]
    assert not (models / "mark").exists()
    assert bench.records() == []
    assert bench.left() == []


def test_a_model_for_images_of_another_size_is_told(models, main):
    with pytest.raises(ValueError, match="incompatible|expected|shape"):
        main(model=models / "shape.keras")
    assert main.output.read_text() == ""


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_data_are_never_unpickled(main, trained, tmp_path):
    data = tmp_path / "mnist.npz"
    mark = tmp_path / "mark"
    mnist = dict(np.load(trained[1]))
    np.savez(data, **mnist | {"x_train": np.array([Bomb(mark)], object)})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        main(data=data)
    assert not mark.exists()
    assert main.output.read_text() == ""


def test_an_array_that_is_missing_is_named(main, trained, tmp_path):
    data = tmp_path / "mnist.npz"
    mnist = dict(np.load(trained[1]))
    del mnist["x_test"]
    np.savez(data, **mnist)
    with pytest.raises(KeyError, match="x_test"):
        main(data=data)
    assert main.output.read_text() == ""


def test_a_machine_that_hides_its_processor_and_its_cores_is_described_all_the_same(
    tmp_path, monkeypatch
):
    """ARM's cpuinfo has no model name, and psutil may not find out the number of cores."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n")
    monkeypatch.setattr(bench_serial, "Path", lambda path: {"/proc/cpuinfo": cpuinfo}[path])
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 6 if logical else None)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert bench_serial.machine() == f"aarch64, 6 CPUs, {sys.platform}"
