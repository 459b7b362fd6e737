"""What holds the flat scripts together, and what the README shows."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, expected_labels

BENCHES = sorted(ROOT.glob("bench_*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
# What stands below the snippet with the initializer: the same with an executor.
[INITIALIZER] = [code for code in SNIPPETS if "Pool(num_cpus, initialize)" in code]
EXECUTOR = (
    INITIALIZER.replace(
        "from multiprocessing import Pool\n",
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n",
    )
    .replace(
        "Pool(num_cpus, initialize)",
        'ProcessPoolExecutor(num_cpus, get_context("spawn"), initialize)',
    )
    .replace(
        "pool.map(evaluate_next_batch, range(num_cpus))",
        "list(pool.map(evaluate_next_batch, range(num_cpus)))",
    )
)


def test_what_stands_below_the_line_is_the_same_in_all_bench_scripts():
    line = re.compile(r"^# .*\bthe same in all bench scripts\b.*\n", re.MULTILINE)
    common = set()
    for script in BENCHES:
        _, below = line.split(script.read_text())
        common.add(below)
    assert len(BENCHES) == 3
    assert len(common) == 1
    assert "def record(" in common.pop()


def test_functions_of_the_same_name_are_the_same_in_all_bench_scripts():
    """But for main(). One that only some of them have may stand above the line."""
    codes = {}
    for script in BENCHES:
        text = script.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                codes.setdefault(node.name, []).append(ast.get_source_segment(text, node))
    assert len(codes["pin"]) > 1
    for name, found in codes.items():
        assert len(set(found)) == 1, name


@pytest.mark.parametrize("name", [path.name for path in ROOT.glob("*.py")])
def test_a_script_s_metadata_name_what_it_imports_in_the_versions_of_the_requirements(name):
    text = (ROOT / name).read_text()
    [block] = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///\n", text, re.MULTILINE)
    metadata = tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))
    assert metadata["requires-python"] == ">=3.11,<3.14"

    required = (ROOT / "requirements.txt").read_text().replace("ray[default]", "ray").split()
    assert set(metadata["dependencies"]) <= set(required)

    named = {pin.partition("==")[0] for pin in metadata["dependencies"]}
    imported = imports(text) - sys.stdlib_module_names
    assert named - {"keras"} == imported  # Keras is TensorFlow's; its version matters.


def imports(text):
    """The top-level packages that a script imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("script", BENCHES, ids=lambda script: script.name)
def test_a_bench_script_imports_nothing_of_this_repository(script):
    here = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]}
    assert {"bench_ray", "train_model", "conftest"} <= here
    assert not imports(script.read_text()) & here


def anchors(page):
    """What GitHub lets one jump to in a page: its headings."""
    headings = re.findall("^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text())
    assert links
    for name, anchor in links:
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    for name in re.findall(r"`((?:\w+/)?[\w-]+\.(?:py|yaml|txt|sh))`", page.read_text()):
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


def test_the_executor_is_made_as_the_readme_says():
    made = 'ProcessPoolExecutor(num_cpus, get_context("spawn"), initialize)'
    assert f"`{made}`" in (ROOT / "README.md").read_text()
    assert made in EXECUTOR
    assert EXECUTOR.count(" list(pool.map(") == EXECUTOR.count("pool.map(") == 2


def test_snippets_are_python_and_not_wider_than_a_page():
    assert SNIPPETS
    for code in SNIPPETS:
        compile(code, "README.md", "exec")
        assert max(map(len, code.splitlines())) <= 88


# In place of the network: Keras would fetch MNIST again if the file in its cache were another one.
LOAD_DATA = """
import os, sys, types

def load_data():
    import numpy as np

    with np.load(os.environ["SMALL_MNIST"]) as file:
        mnist = dict(file)
    return (mnist["x_train"], mnist["y_train"]), (mnist["x_test"], mnist["y_test"])

sys.modules["keras.src.datasets.mnist"] = types.ModuleType("keras.src.datasets.mnist")
sys.modules["keras.src.datasets.mnist"].load_data = load_data
"""

SAVE_RESULTS = """

if __name__ == "__main__":
    import numpy as np

    np.save("results.npy", results)
"""


@pytest.fixture(scope="module")
def environment(trained, tmp_path_factory):
    """The environment of a snippet: with small data, and apart from any Ray on this machine."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(LOAD_DATA)
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as ray:  # Short.
        own = {"PYTHONPATH": str(folder), "SMALL_MNIST": str(trained[1]), "RAY_TMPDIR": ray}
        yield ENVIRONMENT | own | {"CUDA_VISIBLE_DEVICES": "-1"}


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """Takes the place of /tmp in the snippets. The first one, which trains, replaces the model."""
    folder = tmp_path_factory.mktemp("snippets")
    shutil.copy(trained[0], folder / "model.keras")
    return folder


@pytest.mark.parametrize("index", range(len(SNIPPETS) + 1))
def test_a_snippet_of_the_readme_gives_the_answers_of_its_model(
    index, trained, folder, environment, tmp_path
):
    code = [*SNIPPETS, EXECUTOR][index]
    models = [folder / name for name in re.findall(r"/tmp/(\w+\.keras)", code)]
    assert models
    for model, source in zip(models, [trained[0], folder / "model.keras"], strict=False):
        if not model.exists():
            shutil.copy(source, model)

    trains = "model.save(" in code
    pasted = code.replace("/tmp/", f"{folder}/").replace("range(10)", "range(2)")
    (tmp_path / "pasted.py").write_text(pasted if trains else pasted + SAVE_RESULTS)
    before = os.stat(models[0]).st_mtime_ns
    done = subprocess.run(
        [sys.executable, "pasted.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr

    with np.load(trained[1]) as mnist:
        x_test, y_test = mnist["x_test"], mnist["y_test"]
    if trains:
        assert os.stat(models[0]).st_mtime_ns > before
        assert np.mean(expected_labels(models[0], x_test) == y_test) > 0.9
    else:
        assert len(re.findall(r"^\d+\.\d+ s$", done.stdout, re.MULTILINE)) == 2  # Each round.
        answers = np.load(tmp_path / "results.npy")
        if len(models) == 1:
            models *= len(answers)
        assert len(answers) == len(models) > 0
        for answer, model in zip(answers, models, strict=True):
            assert np.array_equal(np.argmax(answer, axis=1), expected_labels(model, x_test))
