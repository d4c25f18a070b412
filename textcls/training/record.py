"""What a training leaves on record: its data files and command as they were, and how good its model is on dev."""

import os
import shlex
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple, Optional

import numpy as np

from textcls.common.log import get_logger
from textcls.common.options import describe_versions
from textcls.data.files import read_json
from textcls.models.configs import change_config, read_calibration
from textcls.models.model_card import UNKNOWN, DataFile, describe_command, describe_model, find_base, list_worst, row, write_cards
from textcls.models.paddle_setup import paddle
from textcls.training.calibration import cross_fit, measure_confidence
from textcls.training.scoring import bootstrap_intervals, score

UNMEASURED = dict.fromkeys(("accuracy", "accuracy_interval", "macro_f1", "macro_f1_interval", "temperature", "error_before",
                            "error_after", "nll_before", "nll_after", "dev_file"), UNKNOWN)


class Run(NamedTuple):
    """A training as it began: to be made before it, since files may be changed meanwhile."""

    command: str
    base: dict[str, str]  # of `find_base`
    labels: list[str]
    files: list[DataFile]


def begin_record(words: list[str], model_folder: str, labels: list[str], files: list[DataFile]) -> Run:
    """Note what a training begins with. words: of its command line; model_folder: the model, a folder or a built-in name; files:
    of `describe_file`."""
    return Run(describe_command(words), find_base(model_folder), labels, files)


def with_found(run: Run, settings: Mapping[str, Any]) -> Run:
    """Add to the record of a training the settings that --search has found for it."""
    found = " ".join(f"--{name} {value}" for name, value in settings.items())
    return run._replace(command=f"{run.command}\n# --search: {found}")


def write_record(folder: str, run: Run, dev_file: str, logits: Optional[np.ndarray], label_ids: np.ndarray) -> None:
    """Write the cards of a trained model into its folder, and in its config.json which model it was trained from.

    dev_file: name of the file that logits, float32 [num_rows, num_classes], and label_ids, int64 [num_rows], are of; logits:
    None where there are none.
    """
    config = read_json(os.path.join(folder, "config.json"))
    temperature = read_calibration(config, folder).get("temperature", 1.0)
    name = os.path.basename(os.path.abspath(folder))
    word = shlex.quote(name)
    use = (f"python analysis/evaluate.py --params_path {word} --report_dir report\n"
           f"python predict.py --params_path {word}\n"
           f"python export_model.py --params_path {word} --output_path export --onnx")
    write_model_card(folder, name, run, config, use, describe_quality(dev_file, run.labels, logits, label_ids, temperature, True))
    change_config(folder, base_model=run.base)
    get_logger().info(f"Record of the training saved in {os.path.join(folder, 'MODEL_CARD.md')}")


def write_model_card(folder: str, name: str, run: Run, config: dict[str, Any], use: str, quality: dict[str, str]) -> None:
    """Write the cards of a model into its folder. config: of its config.json; use: commands that use it; quality: of
    `describe_quality`."""
    device = paddle.get_device()
    if device.startswith("gpu"):
        device = f"{device}, {paddle.device.cuda.get_device_name()}"
    write_cards(folder, {
        **describe_model(folder, config, run.labels, run.files), **quality, "name": name, "use": use, "command": run.command,
        "script": run.command.split(".py")[0].split(" ")[-1] + ".py", "versions": describe_versions(), "device": device,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "base_model": run.base["name"], "licence": run.base["licence"]})


def describe_quality(dev_file: str, labels: list[str], logits: Optional[np.ndarray], label_ids: np.ndarray, temperature: float,
                     is_fitted_here: bool) -> dict[str, str]:
    """Make the fields of a card that say how good a model is on dev.

    logits: float32 [num_rows, num_classes], or None; label_ids: int64 [num_rows]. temperature: of the model; is_fitted_here: on
    these rows, whose probabilities are then measured with temperatures that others of them decide.
    """
    if logits is None or not len(logits):
        return {**UNMEASURED, "dev_size": "0", "worst": row(*[UNKNOWN] * 5)}
    scores = score(label_ids, logits)
    intervals = bootstrap_intervals(label_ids, logits.argmax(axis=1), len(labels))
    fields = {**UNMEASURED, "dev_file": dev_file, "dev_size": str(len(label_ids)), "worst": list_worst(labels, scores)}
    for name, unit in (("accuracy", " %"), ("macro_f1", "")):
        low, high = intervals[name]
        fields[name] = f"{scores[name] * 100:.2f}{unit}"
        fields[f"{name}_interval"] = f"{low * 100:.2f} – {high * 100:.2f}"
    before = measure_confidence(logits, label_ids)
    fields.update(error_before=f"{before.error:.4f}", nll_before=f"{before.nll:.4f}")
    if temperature != 1:
        after = measure_confidence(logits, label_ids, cross_fit(logits, label_ids) if is_fitted_here else temperature)
        fields.update(temperature=f"{temperature:.4f}", error_after=f"{after.error:.4f}", nll_after=f"{after.nll:.4f}")
    return fields
