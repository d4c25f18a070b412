"""`make` and the script of `make demo` in a folder whose path has a space; the demo's classifier is of useful accuracy."""

import os
import re
import shutil
import subprocess
import sys

from helpers import ROOT


def test_make_names_no_path_that_a_space_could_part():
    """All that `make demo` would run, as make prints it: paths are relative to the repository's folder."""
    # a make that is started by another one would print the directory
    process = subprocess.run(["make", "--dry-run", "--always-make", "--no-print-directory", "demo"], cwd=ROOT, encoding="utf-8",
                             capture_output=True)
    assert process.returncode == 0 and "constraints.txt" in process.stdout, process.stderr
    assert str(ROOT) not in process.stdout


def test_demo_makes_a_good_model(tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()
    for name in [path.name for path in ROOT.glob("*.py")] + ["analysis", "data", "textcls"]:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    process = subprocess.run(["sh", "data/demo.sh"], cwd=folder, encoding="utf-8", capture_output=True,
                             env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})  # as helpers.run
    assert process.returncode == 0, process.stderr
    table = process.stdout[process.stdout.index("made    "):]
    accuracy = float(re.search(r"small ERNIE, from scratch +(\d+\.\d\d) %", table)[1])
    assert accuracy >= 80
    for path in re.findall(r"^(build/demo/\S+)", table, re.MULTILINE):
        assert (folder / path).exists(), path
