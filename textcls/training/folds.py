"""Trainings in folds: each row is judged by a model that has not seen it, then one model is trained on all rows."""

import json
import os
import shutil
from collections.abc import Sequence
from typing import Any, Callable

import numpy as np

from textcls.common.errors import UserError
from textcls.common.log import get_logger
from textcls.common.outputs import STAGING, complete_file, complete_folder, locked_folder
from textcls.data.files import LabelledTexts, read_json
from textcls.data.folds import comparison_key, read_out_of_fold, split_folds, write_out_of_fold
from textcls.training.resume import FOLDS, MODEL_FILES, TrainArguments, clear_leftovers
from textcls.training.runs import change_folder, check_record, is_finished, predict_texts
from textcls.training.scoring import score_classes
from textcls.training.trainer import list_checkpoints

from paddlenlp.trainer import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

OUT_OF_FOLD = "out_of_fold.npz"  # in args.output_dir
# trains on the first rows, evaluates on the second ones, and saves a model in args.output_dir
TrainOn = Callable[[LabelledTexts, LabelledTexts, TrainArguments, Sequence[TrainerCallback]], None]
Finish = Callable[[np.ndarray], None]  # fits to the saved model what the out-of-fold logits decide, and writes its record


def check_folds_options(args: TrainArguments, folds: int) -> None:
    """Refuse what --folds cannot work with. folds: 0 for none. UserError."""
    if not folds:
        return
    if not 2 <= folds <= 1000:
        raise UserError(f"--folds {folds}: out of range, expected 2 to 1000 (0: none)")
    if not args.do_train:
        raise UserError("--folds: trains models, expected also --do_train")
    if args.world_size > 1:
        raise UserError("--folds runs in one process only, expected a run without paddle.distributed.launch")
    if args.resume_from_checkpoint is not None:
        raise UserError("--folds goes on by itself where it was stopped, expected a run without --resume_from_checkpoint")


def split_stratified(train: LabelledTexts, labels: list[str], folds: int, seed: int, path: str) -> np.ndarray:
    """Give each row a fold, as `split_folds` does. path: of the rows, for messages.

    UserError where a class that occurs has too few rows for each fold to have one; equal texts count as one row.
    """
    different = {(comparison_key(text), label_id) for text, label_id in zip(train[0], train[1].tolist())}
    counts = np.bincount([label_id for _, label_id in different], minlength=len(labels))
    occurring = np.flatnonzero(counts)
    rarest = occurring[counts[occurring].argmin()]
    if counts[rarest] < folds:
        raise UserError(f"--folds {folds}: {path} has only {counts[rarest]} different rows of class {labels[rarest]!r}, expected "
                        "no more folds than the smallest class has, or more rows of it")
    return split_folds(*train, folds, seed)


class StopAtEpoch(TrainerCallback):
    """Ends a training after so many epochs, or parts of one, on the way of its learning rate to a later end."""

    def __init__(self, epochs: float):
        self.epochs = epochs

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.epoch >= self.epochs - 1e-6


def begin_folds(args: TrainArguments, record: dict[str, Any]) -> str:
    """Make the folder of the folds, args.output_dir/folds, or check that it is of the same run. record: what the run is made of,
    {what: its value}. Returns the folder. UserError.
    """
    folder, path = os.path.join(args.output_dir, FOLDS), os.path.join(args.output_dir, FOLDS, "run.json")
    if args.overwrite_output_dir and os.path.isdir(folder):
        get_logger().info(f"Deleting the earlier folds in {folder}")
        shutil.rmtree(folder)
        clear_leftovers(args, None)
    if not os.path.isfile(path):
        with complete_folder(folder, marker="run.json") as staging, open(os.path.join(staging, "run.json"), "w",
                                                                         encoding="utf-8") as output:
            json.dump(record, output, ensure_ascii=False, indent=1)
        return folder
    check_record(folder, read_json(path), record)
    names = os.listdir(args.output_dir)
    if OUT_OF_FOLD not in names and MODEL_FILES.intersection(names):
        raise UserError(f"{args.output_dir}: holds a model that is not of the folds in {folder}, expected another --output_dir, "
                        "or --overwrite_output_dir to begin anew")
    return folder


def run_fold(fold: int, fold_of: np.ndarray, train: LabelledTexts, labels: list[str], args: TrainArguments, folder: str,
             train_on: TrainOn) -> tuple[np.ndarray, dict[str, Any]]:
    """Train on all folds but one, and ask about that one; where a file says what came out before, read it.

    Returns (logits float32 [num_held_out, num_classes], {metric: its value, "epochs": of the model that was kept}).
    """
    name, (texts, label_ids) = f"Fold {fold + 1} of {fold_of.max() + 1}", train
    inside, outside = (([texts[row] for row in np.flatnonzero(part)], label_ids[part]) for part in
                       (fold_of == fold, fold_of != fold))
    path = os.path.join(folder, f"fold-{fold + 1}")
    if os.path.isfile(f"{path}.json"):
        get_logger().info(f"{name} is finished.")
        return read_out_of_fold(f"{path}.npz", labels, inside, name), read_json(f"{path}.json")
    get_logger().info(f"{name}: training on {len(outside[0])} rows, {len(inside[0])} are held out")
    staging = os.path.join(args.output_dir, f"{STAGING}-fold")
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    try:
        train_on(outside, inside, change_folder(args, staging, do_eval=True, report_to=[], save_total_limit=1,
                                                ignore_save_lr_and_optim=True), [])
        logits, epochs = predict_texts(staging, [inside[0]], args)[0], read_epochs(staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    scores = score_classes(inside[1], logits.argmax(axis=1), len(labels))
    result = {"accuracy": scores["accuracy"], "macro_f1": scores["macro_f1"], "rows": len(inside[0]), "epochs": epochs}
    write_out_of_fold(f"{path}.npz", logits, labels, inside)
    with complete_file(f"{path}.json") as output:  # last: it stands for a finished fold
        json.dump(result, output)
    return logits, result


def read_epochs(folder: str) -> float:
    """Read how many epochs the model in a folder has been trained: those to its best checkpoint, where that was loaded."""
    state = read_json(os.path.join(folder, "trainer_state.json"))
    best = state["best_model_checkpoint"]
    steps = int(best.rsplit("-", 1)[1]) if best else state["global_step"]
    return state["epoch"] * steps / state["global_step"]


def log_folds(results: list[dict[str, Any]], overall: dict[str, Any], chosen: bool) -> dict[str, dict[str, float]]:
    """Log a table of the folds, mean and standard deviation, and how far it can be trusted. Returns these two: {"mean", "sd"}.

    overall: of all rows together; chosen: whether the held-out rows have chosen the models.
    """
    lines = [f"{'fold':8} {'rows':>7} {'accuracy':>9} {'macro_f1':>9} {'epochs':>7}"]
    for number, one in enumerate(results, 1):
        lines.append(f"{number:<8} {one['rows']:7} {one['accuracy']:9.4f} {one['macro_f1']:9.4f} {one['epochs']:7.3g}")
    values = {name: np.array([one[name] for one in results]) for name in ("accuracy", "macro_f1", "epochs")}
    summary = {"mean": {name: float(column.mean()) for name, column in values.items()},
               "sd": {name: float(column.std(ddof=1)) for name, column in values.items()}}
    for name, row in summary.items():
        lines.append(f"{name:8} {'':7} {row['accuracy']:9.4f} {row['macro_f1']:9.4f} {row['epochs']:7.3g}")
    lines.append(f"{'all rows':8} {overall['rows']:7} {overall['accuracy']:9.4f} {overall['macro_f1']:9.4f}")
    get_logger().info("Folds, each judged by a model of the others:\n" + "\n".join(lines))
    if chosen:
        get_logger().info("The held-out rows have also chosen each fold's best checkpoint, so that these figures are a little "
                          "too good; without --load_best_model_at_end they are not.")
    return summary


def train_in_folds(args: TrainArguments, folds: int, labels: list[str], train: LabelledTexts, path: str, record: dict[str, Any],
                   train_on: TrainOn, finish: Finish) -> None:
    """Train a model for each fold, keep what they say of the rows they have not seen, and train the saved model on all rows.

    It is trained for as many epochs as the folds' models were on average (median). record: of `begin_folds`; path: of the rows.
    UserError.
    """
    fold_of = split_stratified(train, labels, folds, args.seed, path)
    logits, results = np.zeros((len(train[0]), len(labels)), np.float32), []
    with locked_folder(args.output_dir):
        folder = begin_folds(args, record)
        for fold in range(folds):
            logits[fold_of == fold], result = run_fold(fold, fold_of, train, labels, args, folder, train_on)
            results.append(result)
    scores = score_classes(train[1], logits.argmax(axis=1), len(labels))
    overall = {"accuracy": scores["accuracy"], "macro_f1": scores["macro_f1"], "rows": len(train[0])}
    summary = log_folds(results, overall, args.load_best_model_at_end)
    file = os.path.join(args.output_dir, OUT_OF_FOLD)
    write_out_of_fold(file, logits, labels, train)
    get_logger().info(f"What each row's model said, which had not seen it, is saved in {file}")
    epochs = float(np.median([result["epochs"] for result in results]))
    result_file = os.path.join(args.output_dir, "folds.json")
    if is_finished(args.output_dir) and os.path.isfile(result_file):
        return
    if not is_finished(args.output_dir):
        get_logger().info(f"The model that is saved is trained on all {len(train[0])} rows, for {epochs:.3g} epochs (the median)")
        resumed = args.output_dir if list_checkpoints(args.output_dir) else None
        no_evaluation = type(args.evaluation_strategy).NO
        train_on(train, ([], np.zeros(0, np.int64)), change_folder(
            args, args.output_dir, do_eval=False, evaluation_strategy=no_evaluation, load_best_model_at_end=False,
            metric_for_best_model=None, resume_from_checkpoint=resumed), [StopAtEpoch(epochs)])
    finish(logits)
    with complete_file(result_file) as output:  # last: it stands for a finished run
        json.dump({"folds": results, **summary, "all_rows": overall, "epochs": epochs}, output, indent=1)
