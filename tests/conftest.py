"""What several test files share: where the scripts are, how to run one as a user does, and one trained model."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(script, *arguments, timeout=100, **options):
    """Run a top-level script in a process of its own; return its exit status, stdout and stderr (text)."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The paths of a model and of the stand-in data, made once for all tests by the real script."""
    folder = tmp_path_factory.mktemp("trained")
    model, data = folder / "model.keras", folder / "mnist.npz"
    done = run("train_model.py", "--stand-in", "--model", model, "--data", data)
    assert done.returncode == 0, done.stderr
    return model, data
