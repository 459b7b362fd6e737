"""What holds the flat scripts together: functions in several of them are the same, and the README shows these."""

import ast
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run

BENCHES = sorted(ROOT.glob("bench_*.py"))
COMMON, RAY, POOL = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SNIPPETS = [("bench_ray.py", COMMON + RAY), ("bench_multiprocessing.py", COMMON + POOL)]


def definitions(code):
    """{name: its tree, less docstrings} of the functions and classes at the top of the code."""
    found = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef) and ast.get_docstring(part):
                    del part.body[0]
            found[node.name] = ast.dump(node)
    return found


def test_functions_of_the_same_name_are_the_same():
    by_script = {script.name: definitions(script.read_text()) for script in BENCHES}
    assert len(by_script) == 3
    names = {name for found in by_script.values() for name in found if name != "main"}
    everywhere = []
    for name in names:
        versions = [found[name] for found in by_script.values() if name in found]
        assert len(set(versions)) == 1, f"{name} differs between the scripts"
        if len(versions) == 3:
            everywhere.append(name)
    judged_by = {"load", "predict", "physical_cores", "core_of", "end", "write", "describe", "run_trials", "explain"}
    assert set(everywhere) >= judged_by


@pytest.mark.parametrize("script", BENCHES, ids=lambda script: script.name)
def test_bench_script_imports_nothing_of_this_repository(script):
    here = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    nodes = list(ast.walk(ast.parse(script.read_text())))
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert imported and not {name.partition(".")[0] for name in imported} & here


@pytest.mark.parametrize("script, code", SNIPPETS, ids=["ray", "pool"])
def test_what_a_snippet_shows_is_what_is_measured(script, code):
    shown, measured = definitions(code), definitions((ROOT / script).read_text())
    assert {"load", "predict", "pin"} < shown.keys()
    for name in shown.keys() - {"physical_cores"}:  # The snippets count cores as the article does.
        assert shown[name] == measured[name], f"{name} differs from that of {script}"


@pytest.mark.parametrize("script, code", SNIPPETS, ids=["ray", "pool"])
def test_a_snippet_runs_in_an_empty_folder(script, code, trained, tmp_path):
    for path, here in zip(("/tmp/model.keras", "/tmp/mnist.npz"), trained, strict=True):
        assert code.count(path) == 1
        code = code.replace(path, str(here))
    save = "\nif __name__ == '__main__':\n    np.save('results.npy', results)\n"
    (tmp_path / "pasted.py").write_text(code + save)
    done = subprocess.run([sys.executable, "pasted.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\d+\.\d+ s", done.stdout, re.MULTILINE), "the loop is timed"
    results = np.load(tmp_path / "results.npy")
    with np.load(trained[1]) as mnist:
        for answers in results:
            assert np.mean(np.argmax(answers, axis=1) == mnist["y_test"]) > 0.9


def test_what_the_pages_show_was_measured_and_is_up_to_date():
    done = run("docs/measured.py", "--check")
    assert done.returncode == 0, done.stderr


def test_links_and_names_of_files_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        names = re.findall(r"\]\((?!http)([^)#]+)", text)
        assert names
        for name in names:
            assert (page.parent / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"`(?:\w+/)?[\w-]+\.(?:py|yaml|txt|sh)`", text):
            assert (ROOT / name.strip("`")).exists(), f"{page.name}: {name}"
