"""docs/overhead.py: what it records agrees with the files, and with NumPy's own answers."""

import hashlib
import json
import zipfile

import numpy as np
from conftest import expected_labels, run


def test_cheap_experiments(trained, tmp_path):
    model, data = trained
    output = tmp_path / "overhead.jsonl"
    files = ["--model", model, "--data", data, "--output", output]
    done = run("docs/overhead.py", "parts", "executors", "--runs", 1, *files)
    assert done.returncode == 0, done.stdout + done.stderr

    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(record["experiment"], record["run"], record["what"]) for record in records] == [
        ("parts", 1, "multiprocessing"),
        ("executors", 1, "multiprocessing+initializer"),
        ("executors", 1, "executors"),
    ]
    parts, pool, executors = records
    labels = expected_labels(model, np.load(data)["x_test"])
    right = np.mean(labels == np.load(data)["y_test"])
    assert all(record["accuracy"] == right for record in records)

    assert parts["needed_bytes"] == array_bytes(data, "x_test")
    assert parts["unneeded_bytes"] == sum(
        array_bytes(data, name) for name in ["x_train", "y_train", "y_test"]
    )
    steps = {name: seconds for name, seconds in parts.items() if name.endswith("_seconds")}
    assert len(steps) == 9 and min(steps.values()) > 0

    # The second worker's model calls every digit by the next one's name, and so on.
    workers = range(executors["num_cpus"])
    assert pool["labels"] == [sha256(labels) for _ in workers]
    assert executors["labels"] == [sha256((labels + i) % 10) for i in workers]
    for record in (pool, executors):
        assert len(record["round_seconds"]) == 10 and min(record["round_seconds"]) > 0


def test_an_output_that_cannot_be_written_is_told_before_anything_starts(trained, tmp_path):
    model, data = trained
    output = tmp_path / "missing" / "overhead.jsonl"
    files = ["--model", model, "--data", data, "--output", output]
    done = run("docs/overhead.py", "parts", *files)
    assert (done.returncode, done.stdout) == (2, "")
    assert str(output) in done.stderr.splitlines()[-1]


def array_bytes(data, name):
    """The bytes of an array, by the directory of the .npz file; its header has 128 bytes."""
    with zipfile.ZipFile(data) as archive:
        return archive.getinfo(f"{name}.npy").file_size - 128


def sha256(labels):
    return hashlib.sha256(labels.tobytes()).hexdigest()
