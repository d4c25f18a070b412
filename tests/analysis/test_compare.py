"""analysis/compare.py: checkpoints and exports on one file, the texts that differ, McNemar's exact p, the page, wrong input."""

import json
import re
import shutil

import numpy as np
import pytest

from analysis import compare
from helpers import ROOT, assert_user_error, read_lines, run, run_here, weights, write_lines
from textcls.analysis.comparison import compare_pairs, find_changes, mcnemar_p
from textcls.models.paddle_setup import paddle

DATA = ROOT / "data"
LABELS = read_lines(DATA / "label.txt")


@pytest.fixture(scope="module")
def worse(checkpoint, tmp_path_factory):
    """The trained model with noise in its last layer."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("worse") / "worse",
                             ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    state = weights(folder)
    state["classifier.weight"] += np.random.default_rng(1).normal(0, 0.1, state["classifier.weight"].shape).astype(np.float32)
    paddle.save(state, str(folder / "model_state.pdparams"))
    return folder


def test_models_of_all_forms_are_compared_on_a_table_a_file_and_a_page(checkpoint, exported, worse, tmp_path):
    graph = shutil.copytree(exported, tmp_path / "graph", ignore=shutil.ignore_patterns("*.onnx"))
    deploy = json.loads((graph / "deploy.json").read_text())
    del deploy["onnx_file"]
    (graph / "deploy.json").write_text(json.dumps(deploy))
    rows = [*read_lines(DATA / "dev.txt"), f"<b>感冒</b> & 发烧\t{LABELS[0]}"]
    write_lines(tmp_path / "dev.txt", rows)
    models = [checkpoint, exported, graph, worse]
    process = run("analysis/compare.py", *models, "--dataset_dir", tmp_path, "--report", tmp_path / "page.html",
                  "--difference_file", tmp_path / "differences.txt")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.split("\n")
    accuracies = [float(re.search(r" (\d+\.\d\d) \(\d+\.\d\d to \d+\.\d\d\) ", line)[1]) for line in lines[1:5]]
    assert accuracies[0] == accuracies[1] == accuracies[2] != accuracies[3]
    for line, form in zip(lines[1:5], ("checkpoint", "ONNX", "Paddle graph", "checkpoint")):
        assert f" {form} " in line
    differences = [line.split("\t") for line in read_lines(tmp_path / "differences.txt")]
    assert differences[0] == ["Text", "Label", *map(str, models)] and len(differences) > 5
    only = [sum(row[2 + one] == row[1] != row[2 + other] for row in differences[1:]) for one, other in ((0, 3), (3, 0))]
    assert round((only[0] - only[1]) / len(rows) * 100, 1) == pytest.approx(accuracies[0] - accuracies[3], abs=0.06)
    assert [line.split()[3:6] for line in lines if line.startswith("1 and 4")] == [
        [*map(str, only), f"{mcnemar_p(*only):.4f}"]]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('<td class="text">') == len(differences) - 1 and "<b>感冒" not in page
    assert not re.search(r'(src|href)="', page)


def test_the_p_is_that_of_the_binomial_distribution_and_changes_say_who_is_right():
    assert mcnemar_p(0, 0) == 1 and mcnemar_p(3, 0) == pytest.approx(0.25) and mcnemar_p(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_p(2, 8) == mcnemar_p(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    label_ids, guesses = np.array([0, 0, 1, 2]), np.array([[0, 1, 0, 2], [1, 0, 2, 2]])
    pair, = compare_pairs(label_ids, guesses)
    assert (pair.only_first, pair.only_second, pair.p) == (1, 1, 1.0)
    changes = find_changes(["a", "b", "c", "d"], label_ids, np.eye(3, dtype=np.float32)[guesses], ["x", "y", "z"])
    assert [(row["line"], row["change"]) for row in changes] == [(1, "worse"), (2, "better"), (3, "other")]


def test_wrong_input_is_refused_and_writes_nothing(checkpoint, exported, binary, tmp_path):
    write_lines(tmp_path / "dev.txt", ["头疼\t其它", "拔牙\t医疗费用"])
    before = sorted(path.name for path in tmp_path.iterdir())
    output = ["--difference_file", tmp_path / "out.txt"]
    for arguments, *parts in (
            ([checkpoint], "nothing to compare it with"), ([checkpoint, checkpoint], "named twice"),
            ([checkpoint, binary[1], "--dataset_dir", tmp_path], "has other labels than", "is a label of only one of them"),
            ([checkpoint, exported, "--dataset_dir", tmp_path], "dev.txt:1: label '其它' is not in", "did you mean '其他'?"),
            ([checkpoint, exported, "--dataset_dir", binary[0]], "label.txt:1: label '医疗费用' where the checkpoint has"),
            ([exported, tmp_path / "no"], "no: no such folder"),
            ([checkpoint, exported, "--report", tmp_path / "out.txt"], "named for two outputs")):
        assert_user_error(run_here(compare.main, *arguments, *output), *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
