"""The house rules that a reader relies on: who imports whom, and that importing changes nothing."""

import ast
import subprocess
import sys

from conftest import ROOT

FOLDERS = (".", "textcls", "few-shot", "retrieval_based", "analysis", "analysis/parts", "data", "deploy", "deploy/*")
FILES = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py")]
LONGEST = 60  # lines of a function


def imported_files(path, tree):
    """The files of the repository that a file imports: paths."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            for folder in (ROOT, path.parent):
                file = folder.joinpath(*name.split(".")).with_suffix(".py")
                if file.exists():
                    yield file


def test_no_script_imports_a_script_and_no_function_is_long():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    scripts = {path for path in FILES if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")}
    assert len(scripts) > 20 and ROOT / "train.py" in scripts and ROOT / "utils.py" not in scripts
    for path, tree in trees.items():
        assert not scripts.intersection(imported_files(path, tree)), path
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < LONGEST, f"{path}: {node.name}"


def test_importing_the_library_changes_nothing_and_needs_no_paddle():
    code = """if True:
        import os, signal, sys
        before = dict(os.environ), [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
        import utils
        from textcls import (checkpoints, data_files, device, errors, exported, families, huggingface, inference, log,
                             options, outputs, predictions, probabilities, scoring, splitting, texts, weights, wordpiece)
        assert before == (dict(os.environ), [signal.getsignal(number) for number in
                                             (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)])
        assert not {"paddle", "paddlenlp", "sklearn", "scipy", "matplotlib", "onnxruntime"}.intersection(sys.modules)
        from textcls.paddle_setup import paddle
        assert before[1] == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
        assert "paddlenlp.taskflow" not in sys.modules and "paddlenlp.trainer" not in sys.modules"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, encoding="utf-8", capture_output=True)
    assert (process.returncode, process.stderr) == (0, ""), process.stderr
