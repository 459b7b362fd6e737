"""What holds the flat scripts together: shared functions are the same, snippets run alone, every script has a test."""

import ast
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from conftest import APPROACHES, ROOT

BENCHES = sorted(ROOT.glob("bench_*.py"))
OWN = {"main", "one_round"}  # what differs between the approaches


def shared():
    """{name: {script: its source as a tree}} of functions, classes and constants that stand in several scripts."""
    found = {}
    for script in BENCHES:
        for node in ast.parse(script.read_text()).body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            names += [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
            for name in set(names) - OWN:
                found.setdefault(name, {})[script.name] = ast.dump(node)
    return {name: trees for name, trees in found.items() if len(trees) > 1}


SHARED = shared()


def snippet(script):
    """The regions of a script that a post would show, joined."""
    regions = re.findall(r"^# snippet: start\n(.*?)^# snippet: end$", script.read_text(), re.MULTILINE | re.DOTALL)
    assert regions, f"{script.name} has no snippet"
    return "".join(regions)


@pytest.mark.parametrize("name", SHARED)
def test_what_stands_in_several_scripts_is_the_same(name):
    assert len(set(SHARED[name].values())) == 1, f"{name} differs between {', '.join(SHARED[name])}"


def test_what_a_comparison_rests_on_stands_in_every_script():
    assert len(BENCHES) == 3
    everywhere = {name for name, trees in SHARED.items() if len(trees) == 3}
    assert everywhere >= {"load", "load_data", "predict", "physical_cores", "core_of", "check_files", "run_trials"}
    assert everywhere >= {"parse_arguments", "announce", "usage", "append", "ACCURACY_FLOOR", "filename", "datafile"}
    assert "pin" in SHARED


@pytest.mark.parametrize("script", BENCHES, ids=lambda script: script.name)
def test_bench_script_imports_nothing_of_this_repository(script):
    here = {path.stem for path in ROOT.glob("*.py")}
    assert not imports(script.read_text()) & here


@pytest.mark.parametrize("script", BENCHES, ids=lambda script: script.name)
def test_snippet_is_about_the_article_alone(script):
    code = snippet(script)
    assert not imports(code) & {"argparse", "json", "time", "logging", "signal", "threading"}
    assert "sys.exit" not in code and "print(" not in code
    for name in ("num_cpus", "filename", "x_test", "load_model", "range(10)", "one_round"):
        assert name in code, f"the snippet of {script.name} lacks {name}"


def imports(code):
    """The top-level packages that code imports."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("script", BENCHES, ids=lambda script: script.name)
def test_snippet_runs_alone_in_an_empty_folder(script, trained, tmp_path):
    pasted = snippet(script)
    for path, here in zip(("/tmp/model.keras", "/tmp/mnist.npz"), trained, strict=True):
        assert pasted.count(path) == 1
        pasted = pasted.replace(path, str(here))
    save = "import numpy as np\n\nif __name__ == '__main__':\n    np.save('results.npy', results)\n"
    (tmp_path / "pasted.py").write_text(pasted + save)
    # Ray looks for a running cluster: not for one of somebody else's on this machine. A socket's path must be short.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"RAY_TMPDIR": folder, "CUDA_VISIBLE_DEVICES": "-1"}
        command = [sys.executable, "pasted.py"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    results = np.load(tmp_path / "results.npy")
    with np.load(trained[1]) as mnist:
        assert results.shape[1:] == (10000, 10)
        assert np.mean(np.argmax(results[-1], axis=1) == mnist["y_test"]) > 0.9
    assert np.array_equal(results[0], results[-1])


def test_every_script_is_run_by_a_test():
    named = {script for script, *_ in APPROACHES.values()}
    for path in (ROOT / "tests").glob("test_*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args]
        calls = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "run"]
        named |= {node.args[0].value for node in calls if isinstance(node.args[0], ast.Constant)}
    assert {path.name for path in ROOT.glob("*.py")} <= named
