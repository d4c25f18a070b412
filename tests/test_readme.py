"""Every command of the READMEs, run as it stands but for what a small machine without GPU and downloads cannot do."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

CHANGES = [("--gpus 0,1 train.py", "--nproc_per_node 2 --backend gloo train.py --model_name_or_path data"),
           ("--nproc_per_node 8", "--nproc_per_node 2"), ("ernie-3.0-medium-zh", "data"), ("--device gpu", "--device cpu"),
           ('--device "gpu"', "--device cpu"), ("--use_fp16 ", ""),
           ("--use_quantize", "--use_quantize --allow_accuracy_drop"),  # after one epoch, ties decide
           ("--num_train_epochs 100", "--num_train_epochs 1"), ("--num_train_epochs 10 ", "--max_steps 4 "),
           ('"num_train_epochs": 12', '"num_train_epochs": 1')]
FOLDERS = {".": ".", "analysis": ".",  # of a README.md: where its commands are run
           **{folder: folder for folder in ("deploy/predictor", "deploy/simple_serving", "deploy/triton_serving",
                                            "deploy/paddle_serving")}}
SKIPPED = ("make ", "pip ", "python -m venv", "source ", "unset ", "nvidia-smi")  # test_demo and CI cover set-up


def blocks(name, language):
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def adapted(text):
    for old, new in CHANGES:
        text = text.replace(old, new)
    return text


def commands():
    """(folder to run it in, command) of every README.md in order, continued lines joined."""
    for folder, place in FOLDERS.items():
        lines = "".join(blocks(f"{folder}/README.md", "bash")).replace("\\\n", " ").split("\n")
        yield from ((place, line) for line in lines if line and not line.startswith(SKIPPED))


@pytest.mark.parametrize("folder", FOLDERS)
def test_both_readmes_have_the_same_commands_and_examples(folder):
    names = [f"{folder}/README.md", f"{folder}/README_en.md"]
    for language in ("bash", "json", "shell", "python"):
        assert blocks(names[0], language) == blocks(names[1], language)
    assert blocks(names[0], "bash") or blocks(names[0], "shell")
    headings = [re.findall(r"^#+ ([\d.]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE) for name in names]
    assert headings[0] == headings[1] != []
    for name in names:
        assert "TODO" not in (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository with the two example files that the README says to save; its commands build on each other."""
    folder = tmp_path_factory.mktemp("readme")
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, folder)
    for name in ("analysis", "data", "deploy"):
        shutil.copytree(ROOT / name, folder / name)
    doccano, options = blocks("README.md", "json")
    (folder / "doccano.jsonl").write_text(doccano, encoding="utf-8")
    (folder / "options.json").write_text(adapted(options), encoding="utf-8")
    return folder


@pytest.mark.parametrize("folder, command", list(dict.fromkeys(commands())))
def test_command(clone, folder, command):
    command = re.sub(r"^python ", f"{sys.executable} ", adapted(command))
    process = subprocess.run(["sh", "-c", command], cwd=clone / folder, encoding="utf-8", capture_output=True, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
