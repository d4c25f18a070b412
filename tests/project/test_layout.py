"""The house rules that a reader relies on: who imports whom, what needs no Paddle, and that importing changes nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

# the rooms of textcls/ and the floors they are on; a room imports only what is on a lower floor
FLOORS = {"common": 1, "data": 2, "runtime": 3, "models": 4, "export": 5, "retrieval": 5, "training": 6, "analysis": 7}
LIBRARY = sorted(ROOT.glob("textcls/*/*.py"))
SCRIPT_FOLDERS = (".", "few-shot", "retrieval_based", "analysis", "data", "deploy/*", "benchmarks")
FILES = [*LIBRARY, ROOT / "textcls/launch.py"] + [path for folder in SCRIPT_FOLDERS for path in ROOT.glob(f"{folder}/*.py")]
# imported without Paddle; those of analysis import it inside functions, so that their scripts say --help at once
NO_PADDLE = [path for path in LIBRARY if path.parent.name in ("common", "data", "runtime", "retrieval", "analysis")]
LONGEST = 60  # lines of a function


def imported_names(path):
    """The dotted names that a file imports, each with what is taken from it: list of str."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def imported_files(path):
    """The files of the repository that a file imports: list of paths."""
    names = [name.replace(".", "/") + ".py" for name in imported_names(path)]
    return [folder / name for name in names for folder in (ROOT, path.parent) if (folder / name).exists()]


def test_a_room_imports_only_rooms_below_it():
    assert {path.parent.name for path in LIBRARY} == set(FLOORS) and len(LIBRARY) > 50
    for path in LIBRARY:
        for file in imported_files(path):
            below = file.parent == path.parent or FLOORS.get(file.parent.name, 9) < FLOORS[path.parent.name]
            assert below and file.is_relative_to(ROOT / "textcls"), f"{path} imports {file}"


def test_no_script_imports_a_script_and_no_function_is_long():
    scripts = {path for path in FILES if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")}
    assert len(scripts) > 20 and ROOT / "train.py" in scripts and ROOT / "utils.py" not in scripts
    for path in FILES:
        assert not scripts.intersection(imported_files(path)), path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < LONGEST, f"{path}: {node.name}"


def test_no_file_changes_where_python_looks_for_modules():
    allowed = {ROOT / "tests/helpers.py": 1}  # its DRIVER starts a script as Python itself does, with the script's folder first
    for path in [*FILES, *ROOT.glob("tests/**/*.py")]:
        found = re.findall(r"sys\.path\b|addsitedir|from sys import path", path.read_text(encoding="utf-8"))
        assert path == Path(__file__) or len(found) == allowed.get(path, 0), path


def test_importing_the_library_changes_nothing_and_these_rooms_need_no_paddle():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in NO_PADDLE]
    code = f"""if True:
        import importlib, os, signal, sys
        signals = lambda: [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
        before = dict(os.environ), signals()
        for module in {[name for name in modules if "onnx" not in name and "milvus" not in name]}:
            importlib.import_module(module)
        assert not {{"sklearn", "scipy", "matplotlib", "onnx"}}.intersection(sys.modules)
        for module in {modules}:
            importlib.import_module(module)
        assert not {{"paddle", "paddlenlp"}}.intersection(sys.modules)
        assert before == (dict(os.environ), signals())
        from textcls.models.paddle_setup import paddle
        assert before[1] == signals()
        assert "paddlenlp.taskflow" not in sys.modules and "paddlenlp.trainer" not in sys.modules"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, encoding="utf-8", capture_output=True)
    assert (process.returncode, process.stderr) == (0, ""), process.stderr


def test_the_library_works_in_a_project_that_has_a_utils_of_its_own(tmp_path):
    (tmp_path / "utils.py").write_text("mine = True\n", encoding="utf-8")
    code = ("import utils; from textcls.runtime.predictor import Predictor; from textcls.retrieval.encoder import open_encoder; "
            "print(utils.mine)")
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, encoding="utf-8", capture_output=True)
    assert (process.returncode, process.stdout) == (0, "True\n"), process.stderr


def test_requirement_files_say_where_they_are_installed_from():
    """pip takes `-e .` from the working folder, all other paths from the file."""
    paths = [path.relative_to(ROOT).as_posix() for folder in ("deploy/*", "few-shot", "retrieval_based")
             for path in ROOT.glob(f"{folder}/requirements*.txt") if "-e ." in path.read_text(encoding="utf-8").split("\n")]
    assert len(paths) == 9
    for path in paths:
        first = (ROOT / path).read_text(encoding="utf-8").split("\n")[0]
        assert first == f"# To be run in the root of the repository: pip install -r {path}"


def test_the_extra_of_the_package_is_what_a_predictor_imports():
    from setuptools.config.pyprojecttoml import read_configuration

    project = read_configuration(ROOT / "pyproject.toml")["project"]
    rooms = {path for path in LIBRARY if path.parent.name in ("common", "data", "runtime")}
    packages = {name.split(".")[0] for path in rooms for name in imported_names(path)}
    needed = {"numpy", "onnxruntime", "tokenizers"}
    assert needed == {*project["dependencies"], *project["optional-dependencies"]["predictor"]} and needed <= packages
