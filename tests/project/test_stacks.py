"""Paddle 2.6 and Paddle 3 read what the other has made. Needs the environments of both: `make setup` with PADDLE=2.6 and 3."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from helpers import ROOT, run, train_options, write_lines
from textcls.models.paddle_setup import PADDLE_3

PYTHONS = {"2.6": ROOT / ".venv/bin/python", "3": ROOT / ".venv-paddle3/bin/python"}
PYTHONS["3" if PADDLE_3 else "2.6"] = sys.executable
TEXTS = ["胶囊内镜价格", "头疼怎么办", "高密度脂蛋白0.8，正常值是多少", "长" * 300, "😀 a\u3000１"]
missing = [f"{path} is missing" for path in PYTHONS.values() if not os.path.exists(path)]
pytestmark = pytest.mark.skipif(bool(missing), reason="; ".join(missing) or "none")

# Logits of a graph: python -c GRAPH prefix. The input is as the tests of the exports have it.
GRAPH = """
import sys, numpy
from textcls.common.errors import run_script
from textcls.export.deployment import open_graph, run_graph
run_script(lambda: print(run_graph(open_graph(sys.argv[1]), numpy.array([[1, 9, 8, 7, 2]])).tolist()))
"""


def checked(stack, *words):
    process = run(*words, python=PYTHONS[stack])
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture(scope="module", params=PYTHONS)
def made(request, tmp_path_factory, tiny_model, tiny_data):
    """(stack, folder): a checkpoint/ and its export/ that this stack has made."""
    stack, folder = request.param, tmp_path_factory.mktemp("made")
    checked(stack, *train_options(tiny_model, tiny_data, folder / "checkpoint", learning_rate="3e-3", num_train_epochs=3))
    checked(stack, "export_model.py", "--params_path", folder / "checkpoint", "--output_path", folder / "export", "--onnx")
    write_lines(folder / "data.txt", TEXTS)
    return stack, folder


def predict(stack, folder, script, *options):
    output = folder / f"by-{stack}.jsonl"
    checked(stack, script, *options, "--output_format", "jsonl", "--output_file", output)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("script, options", [
    ("predict.py", ("--params_path", "{}/checkpoint", "--dataset_dir", "{}", "--device", "cpu")),
    ("deploy/predictor/infer.py", ("--model_path_prefix", "{}/export/float32", "--data_file", "{}/data.txt")),
])
def test_checkpoints_and_exports_give_the_same_answers(made, script, options):
    options = [option.replace("{}", str(made[1])) for option in options]
    first, second = [predict(stack, made[1], script, *options) for stack in PYTHONS]
    assert [row["label"] for row in first] == [row["label"] for row in second] and len(first) == len(TEXTS)
    assert [row["probability"] for row in first] == pytest.approx([row["probability"] for row in second], abs=1e-4)


def test_an_export_over_one_of_the_other_stack_leaves_none_of_its_files(made):
    other = next(name for name in PYTHONS if name != made[0])
    folder = shutil.copytree(made[1] / "export", made[1] / "over")
    checked(other, "export_model.py", "--params_path", made[1] / "checkpoint", "--output_path", folder)
    graph = {"2.6": {".pdmodel", ".pdiparams", ".pdiparams.info"}, "3": {".json", ".pdiparams"}}[other]
    assert {path.name for path in folder.glob("float32.*")} == {f"float32{ending}" for ending in graph}


def test_a_training_goes_on_or_is_refused_with_the_reason(made, tiny_model, tiny_data):
    stack, other = made[0], next(name for name in PYTHONS if name != made[0])
    folder = shutil.copytree(made[1] / "checkpoint", made[1] / "resumed")
    process = run(*train_options(tiny_model, tiny_data, folder, learning_rate="3e-3", num_train_epochs=4,
                                 resume_from_checkpoint=folder), python=PYTHONS[other])
    if stack == "2.6":
        assert process.returncode == 0 and (folder / "checkpoint-56").exists(), process.stderr
    else:
        assert process.returncode == 2 and "by the Paddle that the training began with" in process.stderr, process.stderr


def test_a_graph_is_read_or_refused_with_the_reason(made):
    stack, folder = made
    results = {name: run("-c", GRAPH, folder / "export/float32", python=path) for name, path in PYTHONS.items()}
    assert results["3"].returncode == 0, results["3"].stderr
    if stack == "3":
        assert results["2.6"].returncode == 2 and "float32.json: a graph of Paddle 3, at which" in results["2.6"].stderr
    else:
        logits = [json.loads(result.stdout.splitlines()[-1]) for result in results.values()]
        np.testing.assert_allclose(*logits, atol=1e-4)


def test_the_other_stack_trains_on_and_evaluates(made, tiny_data, tmp_path):
    stack, folder = made
    other = next(name for name in PYTHONS if name != stack)
    checked(other, *train_options(folder / "checkpoint", tiny_data, tmp_path / "more", num_train_epochs=1))
    reports = [checked(name, "analysis/evaluate.py", "--dataset_dir", tiny_data, "--params_path", tmp_path / "more", "--device",
                       "cpu", "--bad_case_file", tmp_path / f"bad-{name}.txt").stderr for name in PYTHONS]
    accuracy = [next(line for line in report.splitlines() if "dev dataset" in line).split("dev dataset")[1] for report in reports]
    assert accuracy[0] == accuracy[1]
