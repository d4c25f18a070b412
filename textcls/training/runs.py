"""What a run of several trainings needs: a folder for each, what it predicts, and a record by which the run is known again."""

import copy
import dataclasses
import os
from typing import Any

import numpy as np

from textcls.common.errors import UserError
from textcls.common.log import progress_bar
from textcls.data.tokens import tokenize
from textcls.models.checkpoints import load_checkpoint
from textcls.models.inference import predict_logits
from textcls.training.resume import TrainArguments

# options that change neither a model nor what is measured of it, or name files whose rows are compared themselves
NOT_RECORDED = {"output_dir", "logging_dir", "run_name", "overwrite_output_dir", "device", "disable_tqdm", "report_to",
                "logging_strategy", "logging_first_step", "logging_steps", "log_on_each_node", "save_total_limit", "local_rank",
                "wandb_api_key", "data_dir", "train_file", "dev_file", "label_file", "do_eval", "do_predict", "do_export",
                "save_plm", "search", "n_trials", "timeout", "fresh_seeds"}


def change_folder(args: TrainArguments, folder: str, **changes: Any) -> TrainArguments:
    """Copy the options for a model that is trained in a folder of its own."""
    args = copy.copy(args)
    args.output_dir, args.logging_dir = folder, os.path.join(folder, "runs")
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def without_evaluation(args: TrainArguments, folder: str, **changes: Any) -> TrainArguments:
    """As `change_folder`, for a training that neither evaluates nor saves checkpoints nor resumes."""
    return change_folder(args, folder, evaluation_strategy=type(args.evaluation_strategy).NO, report_to=[],
                         save_strategy=type(args.save_strategy).NO, load_best_model_at_end=False, resume_from_checkpoint=None,
                         **changes)


def predict_texts(folder: str, parts: list[list[str]], args: TrainArguments) -> list[np.ndarray]:
    """Give the logits of several lists of texts by the model saved in a folder, float32 [num_texts, num_classes] each."""
    checkpoint, logits = load_checkpoint(folder), []
    for texts in parts:
        with progress_bar(len(texts), "Predicting") as progress:
            tokens = tokenize(texts, checkpoint.encode)
            logits.append(predict_logits(checkpoint, tokens, args.per_device_eval_batch_size, progress))
    return logits


def is_finished(folder: str) -> bool:
    """Tell whether a training in a folder has come to its end."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", "trainer_state.json"))


def change_options(options: Any, settings: dict[str, Any]) -> Any:
    """Copy an object of options, with those of the settings, {name: value}, that it has."""
    options = copy.copy(options)
    for name, value in settings.items():
        if hasattr(options, name):
            setattr(options, name, value)
    return options


def describe_options(*options: Any) -> dict[str, str]:
    """Note all options on which the result of a run depends: {name: value}. options: dataclasses."""
    return {field.name: str(getattr(one, field.name)) for one in options for field in dataclasses.fields(one)
            if field.name not in NOT_RECORDED}


def check_record(path: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """UserError where a run that is kept in a path began with something else. before, now: {what: its value}."""
    different = [f"{name} {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(f"{path}: is of a run with {', '.join(different[:3])}{more}, expected what it began with, another "
                        "--output_dir, or --overwrite_output_dir to begin anew")
