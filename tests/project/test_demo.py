"""`make demo`'s script: from nothing to an exported classifier of useful accuracy."""

import os
import re
import shutil
import subprocess
import sys

from helpers import ROOT


def test_demo_makes_a_good_model(tmp_path):
    for name in [path.name for path in ROOT.glob("*.py")] + ["analysis", "data", "textcls"]:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    process = subprocess.run(["sh", "data/demo.sh"], cwd=tmp_path, encoding="utf-8", capture_output=True,
                             env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})  # as helpers.run
    assert process.returncode == 0, process.stderr
    table = process.stdout[process.stdout.index("made    "):]
    accuracy = float(re.search(r"small ERNIE, from scratch +(\d+\.\d\d) %", table)[1])
    assert accuracy >= 80
    for path in re.findall(r"^(build/demo/\S+)", table, re.MULTILINE):
        assert (tmp_path / path).exists(), path
