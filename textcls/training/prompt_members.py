"""The models of one run of few-shot/train.py: several are trained and compared, and one is saved."""

import json
import os
import shutil
import tempfile
from typing import Any, NamedTuple

import numpy as np

from textcls.common.log import get_logger
from textcls.common.outputs import STAGING, complete_file, complete_folder
from textcls.data.files import read_json
from textcls.data.prompts import Part
from textcls.data.tokens import tokenize
from textcls.models.checkpoints import load_checkpoint
from textcls.models.paddle_setup import paddle
from textcls.training.calibration import calibrate_model
from textcls.training.losses import SoftLabelLoss
from textcls.training.prompt_runs import NO_ROWS, Split, Splits, Task, make_trainer, train_model
from textcls.training.resume import TrainArguments, check_resume_point, choose_callbacks, find_resume_point, train_and_save
from textcls.training.runs import change_folder, is_finished, predict_texts, without_evaluation
from textcls.training.scoring import score_classes
from textcls.training.trainer import list_checkpoints

ENOUGH_DEV_ROWS = 20  # of each class, to choose between models by their accuracy there
Result = dict[str, Any]  # what was measured of a model: an entry of members.json
TEMPERATURE = 2.0  # of the soft labels that one model learns from several (PET: Schick and Schütze 2021, arXiv:2001.07676)


class Member(NamedTuple):
    """One of the models of a run."""

    name: str
    template: list[Part]
    seed: int


def train_all(task: Task, members: list[Member], args: TrainArguments, splits: Splits, folds: int, distill_epochs: float) -> None:
    """Train all members and save one model in args.output_dir: the only one, the best, or one that has learnt from all.

    folds: of the cross-validation that chooses the best, 0 for none; distill_epochs: 0: none learns from all.
    """
    if len(members) == 1:
        if splits.pretrain and args.resume_from_checkpoint and not (
                list_checkpoints(args.output_dir) or os.path.basename(args.resume_from_checkpoint).startswith("checkpoint-")):
            args = change_folder(args, args.output_dir, resume_from_checkpoint=None)  # ended in or soon after the pretraining
        return train_model(task, members[0].template, args, splits.train, splits.dev)
    folders = [os.path.join(args.output_dir, member.name) for member in members]
    distills = bool(splits.data and distill_epochs)
    texts = [splits.dev[0], splits.test[0], splits.data + splits.train[0] if distills else []]
    results: list[Result] = []
    logits: list[list[np.ndarray]] = []
    for member, folder in zip(members, folders):
        train_member(task, member, folder, args, splits)
        logits.append(predict_texts(folder, texts, args))
        if task.fits_temperature:
            calibrate_model(folder, logits[-1][0], splits.dev, "dev.txt")
        results.append({"name": member.name, "template": member.template, "seed": member.seed, **measure(logits[-1], splits),
                        "seconds": read_seconds(folder)})
    mean = [np.mean(parts, axis=0) for parts in zip(*logits)]
    if distills:
        distill(task, args, folders[0], texts[2], mean[2], distill_epochs)
        saved = {"name": "saved: learnt from all", **measure(predict_texts(args.output_dir, texts[:2], args), splits),
                 "seconds": read_seconds(args.output_dir)}
    else:
        best = choose_member(task, members, folds, args, splits, results)
        copy_model(folders[best], args.output_dir)
        saved = {**results[best], "name": f"saved: {members[best].name}"}
        get_logger().info("Only the best model is saved. With unlabelled texts in data.txt one model would learn from all.")
    others = [{"name": f"mean of all {len(members)}", **measure(mean, splits)}, saved]
    with complete_file(os.path.join(args.output_dir, "members.json")) as output:
        json.dump(results + others, output, ensure_ascii=False, indent=1)
    print_members(results, others)
    warn_of_better(results, saved, args.output_dir)


def train_member(task: Task, member: Member, folder: str, args: TrainArguments, splits: Splits) -> None:
    """Train a member in its folder, go on with it, or leave it as it is where a run that is resumed has finished it."""
    is_resumed = args.resume_from_checkpoint is not None
    if is_resumed and is_finished(folder):
        get_logger().info(f"{folder} is finished.")
    else:
        resume_point = folder if is_resumed and list_checkpoints(folder) else None
        own_args = change_folder(args, folder, seed=member.seed, resume_from_checkpoint=resume_point)
        train_model(task, member.template, own_args, splits.train, splits.dev)


def measure(logits: list[np.ndarray], splits: Splits) -> Result:
    """Compute the accuracies of logits of the dev and test texts, 0 to 1, where there are any."""
    return {f"{name}_accuracy": score_classes(label_ids, part.argmax(axis=1), part.shape[1])["accuracy"]
            for name, (_, label_ids), part in zip(("dev", "test"), (splits.dev, splits.test), logits) if len(part)}


def read_seconds(folder: str) -> float:
    """Read how long the training of the model in a folder took; 0 without one."""
    path = os.path.join(folder, "train_results.json")
    return read_json(path)["train_runtime"] if os.path.isfile(path) else 0.0


def choose_member(task: Task, members: list[Member], folds: int, args: TrainArguments, splits: Splits,
                  results: list[Result]) -> int:
    """Choose the best member: by its accuracy on dev, or where a class has too few rows there, by cross-validation on train.

    Notes the accuracies of a cross-validation in results. Returns the member's index.
    """
    fewest, fewest_dev = (np.bincount(label_ids, minlength=len(task.labels)).min() for _, label_ids in (splits.train, splits.dev))
    folds = min(folds, int(fewest))
    if fewest_dev < ENOUGH_DEV_ROWS and folds >= 2:
        get_logger().info(f"dev.txt has {fewest_dev} rows of a class, fewer than {ENOUGH_DEV_ROWS}: choosing by cross-"
                          f"validation on train.txt, {folds * len(members)} more trainings (--folds 0: by dev.txt)")
        for member, result in zip(members, results):
            path = os.path.join(args.output_dir, member.name, "cross_validation.json")
            if not (args.resume_from_checkpoint and os.path.isfile(path)):
                accuracy = cross_validate(task, member, change_folder(args, os.path.dirname(path), seed=member.seed),
                                          splits.train, folds)
                with complete_file(path) as output:
                    json.dump({"accuracy": accuracy, "folds": folds}, output)
            result["cross_validation_accuracy"] = read_json(path)["accuracy"]
        key = "cross_validation_accuracy"
    else:
        key = "dev_accuracy"
        if not len(splits.dev[0]):
            get_logger().warning("Neither dev.txt nor enough training rows to choose by: saving the first model.")
    best = int(np.argmax([result.get(key, 0) for result in results]))
    results[best]["is_saved"] = True
    get_logger().info(f"The best by {key} is {members[best].name}.")
    return best


def cross_validate(task: Task, member: Member, args: TrainArguments, train: Split, folds: int) -> float:
    """Measure the mean accuracy of a member that is trained on all folds but one and asked about that one, 0 to 1.
    Leaves no files."""
    from sklearn.model_selection import StratifiedKFold

    texts, label_ids = train
    hits = np.zeros(len(texts), bool)
    for name in os.listdir(args.output_dir):
        if name.startswith(STAGING):  # of a run that was killed
            shutil.rmtree(os.path.join(args.output_dir, name))
    for rest, held_out in StratifiedKFold(folds, shuffle=True, random_state=args.seed).split(label_ids, label_ids):
        folder = tempfile.mkdtemp(prefix=f"{STAGING}-", dir=args.output_dir)
        try:
            split = [texts[row] for row in rest], label_ids[rest]
            train_model(task, member.template, without_evaluation(args, folder), split, NO_ROWS)
            guesses = predict_texts(folder, [[texts[row] for row in held_out]], args)[0].argmax(axis=1)
            hits[held_out] = guesses == label_ids[held_out]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return float(hits.mean())


def distill(task: Task, args: TrainArguments, folder: str, texts: list[str], targets: np.ndarray, epochs: float) -> None:
    """Train the model saved in a folder on what several models say of texts, and save it in args.output_dir.

    targets: float32 [num_texts, num_classes], their mean logits.
    """
    is_begun = args.resume_from_checkpoint is not None and list_checkpoints(args.output_dir)
    args = change_folder(args, args.output_dir, num_train_epochs=epochs, max_steps=-1, load_best_model_at_end=False,
                         evaluation_strategy=type(args.evaluation_strategy).NO, use_rdrop=False, use_rgl=False,
                         resume_from_checkpoint=args.output_dir if is_begun else None)
    with paddle.utils.unique_name.guard():
        paddle.seed(args.seed)
        checkpoint = load_checkpoint(folder)
        resume_point = find_resume_point(args)
        if resume_point:
            check_resume_point(resume_point, args, task.labels, task.label_path, checkpoint.model, len(texts))
        tokens = tokenize(texts, checkpoint.encode, targets)
        trainer = make_trainer(checkpoint, args, tokens, loss=SoftLabelLoss(TEMPERATURE), callbacks=choose_callbacks(args, 0))
        train_and_save(trainer, args, resume_point)
        trainer.save_state()


def copy_model(source: str, target: str) -> None:
    """Let a folder hold the model of another."""
    with complete_folder(target, marker="config.json") as staging:
        for name in os.listdir(source):
            if os.path.isfile(os.path.join(source, name)):
                shutil.copy(os.path.join(source, name), staging)


def print_members(results: list[Result], others: list[Result]) -> None:
    """Log a table of what was measured of the members and of other models; mean, sd, min and max of the members."""
    names = [name for name in results[0] if name.endswith("_accuracy")] + ["seconds"]
    rows = [("model", [name.replace("_accuracy", "") for name in names])]
    rows += [(result["name"], [f"{result[name]:.4f}" if name in result else "" for name in names]) for result in results + others]
    values = np.array([[result[name] for name in names] for result in results])
    for what, measured in (("mean", values.mean(axis=0)), ("sd", values.std(axis=0, ddof=1)), ("min", values.min(axis=0)),
                           ("max", values.max(axis=0))):
        rows.append((what, [f"{value:.4f}" for value in measured]))
    width = max(len(first) for first, _ in rows)
    lines = [f"{first:{width}}" + "".join(f"{cell:>18}" for cell in cells) for first, cells in rows]
    get_logger().info("Models of this run:\n" + "\n".join(lines))


def warn_of_better(results: list[Result], saved: Result, output_dir: str) -> None:
    """Say so where a member does better on dev than the saved model."""
    key = "dev_accuracy"
    best = max(results, key=lambda result: result.get(key, 0.0))
    if best.get(key, 0.0) > saved.get(key, 0.0):
        get_logger().warning(f"The saved model is worse on dev.txt than {best['name']}: accuracy {saved[key]:.4f}, not "
                             f"{best[key]:.4f}. That one is a whole model, too: {os.path.join(output_dir, best['name'])}")
