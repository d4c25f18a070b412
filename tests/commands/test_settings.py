"""train.py --search and --folds: killed and going on, what comes out, who reads it, and what is refused."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

import train
from analysis import dirty, evaluate
from helpers import (
    ROOT,
    assert_same_weights,
    assert_user_error,
    read_lines,
    run_here,
    train_options,
    write_binary_data,
    write_lines,
)
from textcls.common.errors import UserError
from textcls.common.probabilities import softmax
from textcls.data.folds import read_out_of_fold, write_out_of_fold
from textcls.training.callbacks import Diverged
from textcls.training.resume import STUDY
from textcls.training.search import (
    SearchArguments,
    compare,
    compare_guesses,
    given_settings,
    list_done,
    open_study,
    rate_settings,
    run_trials,
)

pytestmark = pytest.mark.usefixtures("tokenizers_built_once")

SHORT = {"num_train_epochs": 2, "learning_rate": "3e-3"}


def run_train(*arguments, **changes):
    """train.py in this process, with the options of `train_options`."""
    return run_here(train.main, *train_options(*arguments, **changes)[1:])


def kill_when(options, condition):
    """Start train.py, and SIGKILL it as soon as condition() holds."""
    process = subprocess.Popen([sys.executable, *map(str, options)], cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8",
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def list_states(folder):
    """The states of a study's trials, in order; [] while there is none."""
    path = folder / STUDY
    if not path.exists():
        return []
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as study:
            return [state for (state,) in study.execute("SELECT state FROM trials ORDER BY number")]
    except sqlite3.OperationalError:  # its tables are being made
        return []


def contents(folder):
    """{path: (size, time of the last change)} of all files in a folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- --search


def test_a_killed_search_goes_on_and_leaves_the_model_of_the_best_command_line(tiny_model, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write_binary_data(data)
    write_lines(data / "train.txt", read_lines(data / "train.txt")[:120])
    changes = {**SHORT, "search": "", "n_trials": 3, "fresh_seeds": 2, "timeout": 3600}
    kill_when(train_options(tiny_model, data, out, **changes), lambda: list_states(out) == ["COMPLETE", "RUNNING"])
    process = run_train(tiny_model, data, out, **changes)
    assert process.returncode == 0, process.stderr
    assert "A trial was stopped in its middle: it begins anew" in process.stderr
    assert list_states(out) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]  # the killed one is the only one that is lost
    result = json.loads((out / "search.json").read_text(encoding="utf-8"))
    given = {"learning_rate": 3e-3, "per_device_train_batch_size": 16, "warmup_ratio": 0.0, "weight_decay": 0.0,
             "label_smoothing": 0.0}
    assert len(result["trials"]) == 3 and result["trials"][0]["settings"] == given
    assert result["best"] == max(result["trials"], key=lambda trial: trial["value"])["settings"]
    assert f"The best command line:\n{result['command']}\n" in process.stderr
    found = " ".join(f"--{name} {value}" for name, value in result["best"].items())
    assert f"\n# --search: {found}\n" in (out / "MODEL_CARD_en.md").read_text(encoding="utf-8")
    for words in ("1 (given)", "Importance of each setting", "fresh seeds" if result["comparison"] else "no difference seen"):
        assert words in process.stderr
    words = shlex.split(result["command"])
    assert words[:2] == ["python", "train.py"] and not {"--search", "--n_trials"}.intersection(words)
    plain = run_here(train.main, *words[2:], "--output_dir", tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    assert_same_weights(tmp_path / "plain", out)
    assert set(os.listdir(out)) - set(os.listdir(tmp_path / "plain")) == {STUDY, "search.json"}

    out = shutil.copytree(out, tmp_path / "copy")  # since this process still writes in the other
    before = contents(out)
    again = run_train(tiny_model, data, out, **changes)  # nothing is left to do
    assert again.returncode == 0 and "Training begins" not in again.stderr, again.stderr
    assert {path for path, what in contents(out).items() if before[path] != what} <= {out / STUDY, out / "search.json"}
    before = contents(out)
    assert_user_error(run_train(tiny_model, data, out, **{**changes, "learning_rate": "1e-3"}),
                      f"{out / STUDY}: is of a run with learning_rate 0.003, now 0.001, ")
    write_lines(data / "dev.txt", read_lines(data / "dev.txt")[1:])
    refused = run_train(tiny_model, data, out, **changes)
    assert_user_error(refused, f"{out / STUDY}: is of a run with dev rows ", "another --output_dir, or --overwrite_output_dir")
    assert "Training begins" not in refused.stderr and contents(out) == before


@pytest.mark.parametrize("changes, message", [
    ({"n_trials": 0}, "--n_trials 0: out of range, expected 1 to 100000"),
    ({"fresh_seeds": 1}, "--fresh_seeds 1: out of range"),
    ({"timeout": -1}, "--timeout -1.0: out of range"),
    ({"learning_rate": 0}, "--learning_rate 0: nothing to search around"),
    ({"load_best_model_at_end": None, "metric_for_best_model": None}, "--search needs trainings that are evaluated"),
    ({"metric_for_best_model": "loss"}, "--metric_for_best_model loss: cannot be compared between settings"),
    ({"resume_from_checkpoint": "x"}, "--search goes on by itself"),
    ({"folds": 3}, "--search, --folds and --dry_run: three ways to run"),
    ({"search": None, "folds": 1}, "--folds 1: out of range, expected 2 to 1000"),
    ({"search": None, "folds": 15}, "train.txt has only 14 different rows of class '功效作用', expected no more folds"),
    ({"search": None, "folds": 2, "known": "centres"}, "--known centres: is fitted to a dev file"),
])
def test_what_cannot_work_is_refused_before_any_training(changes, message, tiny_data, tiny_model, tmp_path):
    process = run_train(tiny_model, tiny_data, tmp_path / "out", **{"search": "", **changes})
    assert_user_error(process, message)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_study_or_a_model_of_something_else_is_refused(tiny_data, tiny_model, tmp_path):
    import optuna

    (tmp_path / STUDY).write_text("no study")
    assert_user_error(run_train(tiny_model, tiny_data, tmp_path, search=""), f"{tmp_path / STUDY}: cannot be read as a study")
    os.remove(tmp_path / STUDY)
    optuna.create_study(storage=f"sqlite:///{tmp_path / STUDY}", study_name="settings").optimize(lambda trial: 1.0, n_trials=1)
    assert_user_error(run_train(tiny_model, tiny_data, tmp_path, search=""), f"{tmp_path / STUDY}: is a study of something else")
    plain = run_train(tiny_model, tiny_data, tmp_path, overwrite_output_dir="")
    assert_user_error(plain, f"{tmp_path}: holds {STUDY} of a training by --search, which would take the new model for its own")
    os.remove(tmp_path / STUDY)
    (tmp_path / "config.json").write_text("{}")
    assert_user_error(run_train(tiny_model, tiny_data, tmp_path, search=""), f"{tmp_path}: holds a model, expected another")
    assert_user_error(run_train(tiny_model, tiny_data, tmp_path, folds=2), f"{tmp_path}: holds a model, expected another")
    assert os.listdir(tmp_path) == ["config.json"]


class Course:
    """A training in the place of a real one: its accuracy rises by an epoch to a value that its settings decide alone."""

    def __init__(self, stop_at=None):
        self.stop_at, self.count, self.epochs = stop_at, 0, []  # epochs of each training

    def __call__(self, settings, args, callbacks):
        self.count += 1
        if self.count == self.stop_at:
            raise KeyboardInterrupt
        self.epochs.append(0)
        quality = np.exp(-abs(np.log(settings["learning_rate"] / 1e-4)))
        for epoch in range(1, 4):
            self.epochs[-1] = epoch
            if settings["learning_rate"] > 4e-4:
                raise Diverged("the training has diverged")
            state = type("State", (), {"global_step": epoch, "max_steps": 3})
            for callback in callbacks:
                callback.on_evaluate(args, state, None, {"eval_accuracy": quality * epoch / 3})
        os.makedirs(args.output_dir)
        with open(os.path.join(args.output_dir, "trainer_state.json"), "w") as file:
            json.dump({"best_metric": quality}, file)


def test_bad_trials_are_cut_short_and_an_interrupted_search_tries_what_it_would_have_tried(tmp_path):
    model_args, found = train.ModelArguments(), []
    for name, stops in (("whole", [None]), ("stopped", [4, 5, None])):
        args = SearchArguments(output_dir=str(tmp_path / name), metric_for_best_model="accuracy", n_trials=10)
        os.makedirs(args.output_dir)
        given = given_settings(model_args, args)
        for stop_at in stops:
            course, study = Course(stop_at), open_study(args, given, {"data": "x"})
            try:
                run_trials(study, args, given, course)
            except KeyboardInterrupt:
                assert stop_at and not list((tmp_path / name).glob(".*"))
        found.append([(trial.params, trial.value, trial.user_attrs) for trial in list_done(study)])
        if name == "whole":
            assert course.epochs[:5] == [3] * 5 and 1 in course.epochs[5:]  # after the first epoch, once five trials are whole
    assert found[0] == found[1] and len(found[0]) == 10
    reasons = {attributes.get("ended") for _, _, attributes in found[0]}
    assert reasons >= {None, "worse than the median"}
    importance = rate_settings(study, 0)
    assert importance.keys() == given.keys() and sum(importance.values()) == pytest.approx(1)
    dev, diverging = (["甲", "乙"], np.array([0, 1])), {**given, "learning_rate": 1.0}
    compared = compare(study, args, {**given, "learning_rate": 2.0}, diverging, dev, course)
    assert compared.best.tolist() == compared.given.tolist() == [0, 0, 0] and compared.verdict == "no difference seen"
    with pytest.raises(UserError, match="is of a run with data x, now y"):
        open_study(args, given, {"data": "y"})


def test_the_comparison_knows_rows_and_seeds():
    generator = np.random.default_rng(1)
    label_ids = generator.integers(0, 4, 400)

    def guess(wrong):
        """Answers of which this many are wrong."""
        guesses = label_ids.copy()
        guesses[generator.permutation(400)[:wrong]] += 1
        return guesses

    far = compare_guesses(np.array([[guess(20), guess(24)], [guess(120), guess(126)]]), label_ids, "accuracy")
    assert far.verdict == "better" and far.difference == pytest.approx((103 - 22 + 20) / 400, abs=0.01)
    assert compare_guesses(np.array([[guess(120)] * 2, [guess(20)] * 2]), label_ids, "macro_f1").verdict == "worse"
    near = compare_guesses(np.array([[guess(60), guess(90)], [guess(80), guess(90)]]), label_ids, "accuracy")
    assert near.verdict == "no difference seen" and near.low < 0 < near.high  # more for some rows, but the seeds differ as much
    one, other = guess(60), guess(80)
    alike = compare_guesses(np.array([[one] * 3, [other] * 3]), label_ids, "accuracy")  # no chance but that of the rows
    paired = (one == label_ids).astype(float) - (other == label_ids)
    assert (alike.high - alike.low) / 2 == pytest.approx(1.966 * paired.std(ddof=1) / 20, rel=0.1)


def test_optuna_is_imported_only_where_it_is_asked_for():
    for path in ("textcls/training/search.py", "train.py", "few-shot/train.py"):
        names = [alias.name for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body if isinstance(node, ast.Import)
                 for alias in node.names]
        assert "optuna" not in names and names


# ---------------------------------------------------------------- --folds


def test_killed_folds_go_on_and_evaluate_and_dirty_read_what_they_say(tiny_model, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write_binary_data(data)
    os.remove(data / "dev.txt")
    rows = [line.split("\t") for line in read_lines(data / "train.txt")]
    labels = read_lines(data / "label.txt")
    split = [text for text, _ in rows], np.array([labels.index(label) for _, label in rows])
    changes = {"num_train_epochs": 4, "learning_rate": "3e-3", "folds": 3}
    kill_when(train_options(tiny_model, data, out, **changes), lambda: (out / "folds/fold-1.json").exists())
    process = run_train(tiny_model, data, out, **changes)
    assert process.returncode == 0, process.stderr
    assert "Fold 1 of 3 is finished." in process.stderr and "Fold 1 of 3: training" not in process.stderr
    assert f"is trained on all {len(rows)} rows" in process.stderr and "(the median)" in process.stderr
    assert re.search(rf"^sd .*\nall rows +{len(rows)} ", process.stderr, re.MULTILINE)
    assert not list(out.glob(".*")) and f"--out_of_fold {out / 'out_of_fold.npz'}" in process.stderr
    result = json.loads((out / "folds.json").read_text())
    logits = read_out_of_fold(str(out / "out_of_fold.npz"), labels, split, "train.txt")
    accuracy = (logits.argmax(axis=1) == split[1]).mean()
    assert result["all_rows"]["accuracy"] == pytest.approx(accuracy) and 0.6 < accuracy < 1
    assert result["mean"]["accuracy"] == pytest.approx(np.mean([fold["accuracy"] for fold in result["folds"]]))
    assert sum(fold["rows"] for fold in result["folds"]) == len(rows)
    calibration = json.loads((out / "config.json").read_text(encoding="utf-8"))["calibration"]
    assert (calibration["file"], calibration["rows"]) == ("train.txt", len(rows))
    card = (out / "MODEL_CARD_en.md").read_text(encoding="utf-8")
    assert f"On the {len(rows)} texts of train.txt (--folds 3)" in card and f"| Accuracy | {accuracy * 100:.2f} % |" in card
    assert f"| Temperature | 1 | {calibration['temperature']:.4f} |" in card
    steps = json.loads((out / "trainer_state.json").read_text())["global_step"]
    assert steps == round(result["epochs"] * -(-len(rows) // 16))

    common = ["--dataset_dir", data, "--out_of_fold", out / "out_of_fold.npz", "--device", "cpu"]
    process = run_here(evaluate.main, *common, "--params_path", out, "--bad_case_file", tmp_path / "bad.txt",
                       "--report_dir", tmp_path / "report")
    assert process.returncode == 0, process.stderr
    assert f"Accuracy in dev dataset: {accuracy * 100:.2f}%" in process.stderr
    assert len(read_lines(tmp_path / "bad.txt")) - 1 == (logits.argmax(axis=1) != split[1]).sum()
    process = run_here(dirty.main, *common, "--dirty_num", 10)
    assert process.returncode == 0, process.stderr
    suspects = [line.split("\t") for line in read_lines(data / "train_dirty_report.tsv")[1:]]
    own = softmax(logits)[np.arange(len(rows)), split[1]]
    assert [int(row[1]) - 1 for row in suspects] == np.argsort(own, kind="stable")[:10].tolist()
    assert run_here(dirty.main, *common, "--dirty_num", 10, "--fold_model", "both").returncode == 0

    other = shutil.copytree(out, tmp_path / "copy")
    assert_user_error(run_train(tiny_model, data, other, **{**changes, "seed": 5}),
                      f"{other / 'folds'}: is of a run with seed 42, now 5")
    write_lines(data / "train.txt", ["\t".join(row) for row in rows[1:]])
    for main, options in ((dirty.main, []), (evaluate.main, ["--params_path", out])):
        assert_user_error(run_here(main, *common, *options), f"out_of_fold.npz: is of {len(rows)} rows that are not those of")


def test_a_file_that_is_no_out_of_fold_file_is_refused(tmp_path):
    split, path = (["甲", "乙"], np.array([0, 1])), str(tmp_path / "x.npz")
    with pytest.raises(UserError, match="x.npz: file not found, expected the out_of_fold.npz that train.py --folds wrote"):
        read_out_of_fold(path, ["a", "b"], split, "train.txt")
    for content in (b"", b"PK\3\4 damaged", b"text"):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(UserError, match="x.npz: cannot be read"):
            read_out_of_fold(path, ["a", "b"], split, "train.txt")
    write_out_of_fold(path, np.eye(2, dtype=np.float32), ["a", "b"], split)
    assert read_out_of_fold(path, ["a", "b"], split, "train.txt").tolist() == [[1, 0], [0, 1]]
    for labels, rows in ((["a", "c"], split), (["a", "b"], (["乙", "甲"], split[1])), (["a", "b"], (split[0], np.array([1, 0])))):
        with pytest.raises(UserError):
            read_out_of_fold(path, labels, rows, "train.txt")
