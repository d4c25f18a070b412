"""Experiments of several trainings in one folder: scripts run one after the other, and options that may not change meanwhile."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from textcls.common.digests import sha256
from textcls.common.errors import UserError
from textcls.common.outputs import complete_file
from textcls.data.files import read_json
from textcls.models.weights import WEIGHTS

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *options: object) -> None:
    """Run one of this project's scripts, after printing its command. UserError where it fails."""
    words = [script, *map(str, options)]
    print("+ python", " ".join(words), flush=True)
    if subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{script} failed, see its message above")


def model_files(folder: str) -> list[str]:
    """List the files of a model folder by which it is told from others; [] for a built-in name."""
    return [os.path.join(folder, name) for name in ("config.json", "vocab.txt", WEIGHTS)]


def check_options(output_dir: str, options: Mapping[str, object], files: Iterable[str]) -> None:
    """Raise UserError where output_dir holds trainings with other options or files, which must not be taken for these.

    options: that change results, as JSON has them; files: those that are there count with their content.
    """
    path = os.path.join(output_dir, "options.json")
    wanted = {**options, **{name: sha256(name) for name in files if os.path.isfile(name)}}
    if os.path.isfile(path) and read_json(path) != wanted:
        raise UserError(f"{path}: this folder was made with other options, data or another model, expected the same, or another "
                        "--output_dir")
    with complete_file(path) as file:
        json.dump(wanted, file, ensure_ascii=False, indent=2)
