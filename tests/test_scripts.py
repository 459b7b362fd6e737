"""What holds the flat scripts together: functions in several of them are the same, and the README shows these."""

import ast
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, expected_labels, run

BENCHES = sorted(ROOT.glob("bench_*.py"))
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMON = "# From here on: the same in all bench scripts."


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


def test_what_is_the_same_in_all_bench_scripts():
    texts = [script.read_text().partition(COMMON) for script in BENCHES]
    assert len(texts) == 3 and len({common for _, _, common in texts}) == 1
    common = definitions(texts[0][2])
    assert common.keys() == {"load", "physical_cores", "core_of", "parse_arguments", "record", "end"}
    own = [definitions(text) for text, _, _ in texts]
    assert not any(common.keys() & names for names in own)
    pins = [names["pin"] for names in own if "pin" in names]
    assert len(pins) == 2 and len(set(pins)) == 1


def test_pins_of_the_metadata_blocks_are_those_of_the_requirements():
    required = (ROOT / "requirements.txt").read_text().replace("ray[default]", "ray").split()
    for script in [*BENCHES, ROOT / "analyze.py", ROOT / "train_model.py"]:
        text = script.read_text()
        block = re.match(r"# /// script\n(.*?)# ///\n", text, re.DOTALL)[1]
        assert 'requires-python = ">=3.11,<3.14"' in block
        pins = re.findall(r'"([\w-]+==[\w.]+)"', block)
        assert set(pins) <= set(required)
        imported = {name.partition("==")[0] for name in pins} - {"keras"}  # TensorFlow needs it: pinned as well.
        assert all(re.search(rf"^ *(import|from) {name}\b", text, re.MULTILINE) for name in imported)


@pytest.mark.parametrize("script", BENCHES, ids=lambda script: script.name)
def test_bench_script_imports_nothing_of_this_repository(script):
    here = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    nodes = list(ast.walk(ast.parse(script.read_text())))
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert imported and not {name.partition(".")[0] for name in imported} & here


def test_what_the_snippets_show_is_what_is_measured():
    measured = {name: tree for script in BENCHES for name, tree in definitions(script.read_text()).items()}
    shown = [definitions(code) for code in SNIPPETS]
    assert [len(code.splitlines()) <= 40 for code in SNIPPETS] == [True] * 3
    for name, tree in [pair for found in shown for pair in found.items()]:
        assert name in ("load", "pin", "physical_cores") or tree == measured[name], f"{name} differs"


@pytest.mark.parametrize("code", SNIPPETS, ids=["ray", "initializer", "pool"])
def test_a_snippet_runs_in_an_empty_folder(code, trained, tmp_path):
    for path, here in zip(("/tmp/model.keras", "/tmp/mnist.npz"), trained, strict=True):
        assert code.count(path) == 1
        code = code.replace(path, str(here))
    code = code.replace("range(10)", "range(2)")
    save = "\nif __name__ == '__main__':\n    np.save('results.npy', results)\n"
    (tmp_path / "pasted.py").write_text(code + save)
    done = subprocess.run([sys.executable, "pasted.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\d+\.\d+ s$", done.stdout, re.MULTILINE)) == 2, "the rounds are timed"
    with np.load(trained[1]) as mnist:
        expected = expected_labels(trained[0], mnist["x_test"])
    for answers in np.load(tmp_path / "results.npy"):
        assert (np.argmax(answers, axis=1) == expected).all()


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
