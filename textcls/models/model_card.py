"""MODEL_CARD.md and MODEL_CARD_en.md, the record of a model beside it: written from its facts, copied on by an export.

The texts are the templates beside this file, Chinese and English. What is filled in is the same in both. Needs no Paddle.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, Optional

import numpy as np

from textcls.common.digests import file_id, sha256
from textcls.common.options import LAUNCHER
from textcls.common.outputs import complete_file
from textcls.data.encoders import read_long_text
from textcls.data.files import read_json
from textcls.models.built_in import BUILT_IN_MODELS
from textcls.models.configs import config_path
from textcls.models.weights import find_weights

CARDS = {"MODEL_CARD.md": "model_card.md", "MODEL_CARD_en.md": "model_card_en.md"}  # file: its template
UNKNOWN = "–"
ROOT = Path(__file__).resolve().parents[2]
SECRET = re.compile(r"--\w*(token|password|passwd|secret|key)")  # options whose values nobody else should read
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
MOST_LABELS = 200  # rows of the table of labels; of more labels the most and the least frequent ones
# section 7, which an export adds: its heading, what its rows are called, and what stands before the rest where there is no card
EXPORT_SECTIONS = {
    "MODEL_CARD.md": ("导出", "项目", "值", "导出的文件", "与检查点的 logits 的最大差别", "版本",
                      "# 模型记录\n\n[English](MODEL_CARD_en.md)\n\n检查点没有记录（由更早的版本训练），只知道下面这些。\n"),
    "MODEL_CARD_en.md": ("Export", "Item", "Value", "Exported files", "Largest difference from the checkpoint's logits",
                         "Versions", "# Model record\n\n[中文](MODEL_CARD.md)\n\nThe checkpoint has no record (an older edition "
                         "trained it); only what follows is known.\n")}


class DataFile(NamedTuple):
    """A data file as it was when it was read."""

    name: str
    sha256: str  # of the file; "–" of a pipe, which cannot be read twice
    rows: int
    counts: Optional[np.ndarray] = None  # int64 [num_labels], the rows of each label that are used; None: it has no labels


def describe_file(path: str, rows: int, label_ids: Optional[np.ndarray] = None, num_labels: int = 0) -> DataFile:
    """Note a data file at the moment it is read. label_ids: int64 [num_rows], or None for texts without labels."""
    counts = None if label_ids is None else np.bincount(label_ids, minlength=num_labels)
    return DataFile(os.path.basename(path), sha256(path) if os.path.isfile(path) else UNKNOWN, rows, counts)


def find_base(name_or_path: str) -> dict[str, str]:
    """Say which model a training begins with: {"name": ..., "licence": ... as far as known}.

    That of a model that was trained here is the one that its own training began with.
    """
    if not os.path.isdir(name_or_path):
        known = name_or_path in BUILT_IN_MODELS
        return {"name": name_or_path, "licence": "Apache-2.0 (PaddleNLP)" if known else UNKNOWN}
    config, name = config_path(name_or_path), os.path.basename(os.path.abspath(name_or_path))
    entry = read_json(config).get("base_model") if config else None
    if isinstance(entry, dict) and isinstance(entry.get("name"), str):
        return {"name": entry["name"], "licence": str(entry.get("licence", UNKNOWN))}
    licence = find_licence(name_or_path)
    return {"name": name if find_weights(name_or_path) else f"{name} (no weights: random ones)", "licence": licence}


def find_licence(folder: str) -> str:
    """Find what a model folder says of its licence: `license:` at the head of its README.md, else the first line of LICENSE."""
    readme = Path(folder, "README.md")
    if readme.is_file():
        head = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if head and (found := re.search(r"^license:[ \t]*(\S.*)$", head[1], re.MULTILINE)):
            return found[1].strip()
    for path in (Path(folder, name) for name in LICENCE_FILES):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            return next((line.strip() for line in lines if line.strip()), UNKNOWN)
    return UNKNOWN


def describe_command(words: Sequence[str]) -> str:
    """Write down the command line of this process for others to read: no secrets, and of absolute paths the last part alone.

    words: of the command line, without the script.
    """
    shown, is_secret = [], False
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if value and (is_secret or SECRET.fullmatch(option)):
            value = "***"
        elif os.path.isabs(value):
            value = f".../{os.path.basename(os.path.normpath(value))}"
        value = re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", value)  # names and passwords in addresses
        is_secret = bool(SECRET.fullmatch(option)) and not equals
        shown.append(option + equals + value)
    script = os.path.relpath(os.path.realpath(sys.argv[0]), ROOT)
    return shlex.join(["python", *describe_launcher(), script, *shown]).replace("\n", " ")


def describe_launcher() -> list[str]:
    """Name what has started this process beside others, for a command line; [] for a single process."""
    if int(os.environ.get("PADDLE_TRAINERS_NUM", 1)) == 1:
        return []
    hosts = int(os.environ.get("PADDLE_NNODES", 1))
    several = ["--master", "...", "--nnodes", str(hosts), "--rank", "0"] if hosts > 1 else []  # of an address nothing is kept
    return ["-m", os.environ.get(LAUNCHER, "paddle.distributed.launch"), *several, "--nproc_per_node",
            os.environ.get("PADDLE_LOCAL_SIZE", "1")]


def cell(text: object) -> str:
    """Return a text as a cell of a Markdown table, whatever a label may hold."""
    return re.sub(r"([\\`*_|<>\[\]~])", r"\\\1", str(text)).replace("\n", " ")


def row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def count_labels(labels: Sequence[str], files: Sequence[DataFile]) -> str:
    """Make the rows of the table that counts the rows of each label in each file."""
    labelled = [file.counts for file in files if file.counts is not None]
    order, shown = np.arange(len(labels)), MOST_LABELS // 2
    if len(labels) > MOST_LABELS and labelled:
        by_count = np.argsort(-labelled[0], kind="stable")
        order = np.concatenate([by_count[:shown], by_count[-shown:]])
    lines = [row(cell(labels[index]), *(counts[index] for counts in labelled)) for index in order.tolist()]
    if len(order) < len(labels):
        lines.insert(shown, row(f"... ({len(labels) - len(order)})", *("..." for _ in labelled)))
    return "\n".join(lines)


def describe_model(folder: str, config: dict[str, Any], labels: Sequence[str], files: Sequence[DataFile]) -> dict[str, str]:
    """Make the fields of a card that tell of a model and its data files. folder: of its weights; config: of its config.json."""
    long_text = read_long_text(config, "config.json")
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "width_mult")
    used = {"head_tail": ("head_share",), "window": ("window_stride", "max_windows", "window_vote")}.get(long_text.mode, ())
    settings = [f"{name} {value}" for name, value in long_text._asdict().items() if name in used and value is not None]
    weights = find_weights(folder)
    labelled = [file.name for file in files if file.counts is not None]
    return {"num_labels": str(len(labels)), "max_seq_length": str(config.get("max_seq_length", UNKNOWN)),
            "structure": ", ".join([cell(config.get("model_type", UNKNOWN)), *(
                f"{cell(name)} {config[name]}" for name in sizes if name in config)]),
            "weights": f"{os.path.getsize(weights) / 1e6:.1f} MB, SHA-256 {file_id(weights)}..." if weights else UNKNOWN,
            "long_text": cell(", ".join([long_text.mode, *settings])),
            "files": "\n".join(row(cell(file.name), file.rows, file.sha256) for file in files),
            "file_names": " | ".join(map(cell, labelled)), "file_rules": " | ".join("---" for _ in labelled),
            "counts": count_labels(labels, files)}


def write_cards(folder: str, fields: Mapping[str, str]) -> None:
    """Write both cards into a model's folder. fields: of the templates, all of them."""
    for name, template in CARDS.items():
        text = (Path(__file__).parent / template).read_text(encoding="utf-8")
        with complete_file(os.path.join(folder, name), newline="\n") as file:
            file.write(Template(text).substitute(fields))


def extend_cards(source: str, folder: str, versions: str, differences: Mapping[str, float], use: str) -> None:
    """Write the cards of a checkpoint's folder into that of its export, with a section on the export.

    source: the checkpoint's folder; folder: of the export, complete but for its cards; differences: {form: largest difference of
    its logits from the checkpoint's}; use: the commands that serve it.
    """
    models = sorted(name for name in os.listdir(folder) if name.endswith((".pdiparams", ".onnx")))
    hashes = [f"{cell(name)}: SHA-256 {file_id(os.path.join(folder, name))}..." for name in models]
    for card, (heading, item, value, files, difference, version, opening) in EXPORT_SECTIONS.items():
        path = Path(source, card)
        before = path.read_bytes() if path.is_file() else opening.encode("utf-8")  # as it is: it may have been edited
        number = len(re.findall(rb"^## ", before, re.MULTILINE)) + 1
        lines = ["", f"## {number}. {heading}", "", row(item, value), row("---", "---"), row(files, "<br>".join(hashes)),
                 row(difference, ", ".join(f"{form} {most:.1e}" for form, most in differences.items())),
                 row(version, cell(versions)), "", "```text", use, "```", ""]
        with complete_file(os.path.join(folder, card), "wb") as output:
            output.write(before.rstrip() + b"\n" + "\n".join(lines).encode("utf-8"))


def serving_commands(folder: str, name: str) -> str:
    """Return the commands that serve an export. name: of its model, such as float32."""
    folder = os.path.basename(os.path.abspath(folder))
    return (f"python deploy/predictor/infer.py --model_path_prefix {shlex.quote(f'{folder}/{name}')}\n"
            f"python deploy/simple_serving/server.py --export_dir {shlex.quote(folder)}")


def list_worst(labels: Sequence[str], scores: Mapping[str, Any], most: int = 5) -> str:
    """Make the rows of the labels with the lowest F1. scores: of `scoring.score` on dev."""
    per_class = scores["per_class"]
    occurring = [index for index, count in enumerate(per_class["count"]) if count]
    mistaken: dict[int, tuple[int, int]] = {}  # label id -> (count, label id) of its most frequent mistake
    pairs = scores.get("confusions") or [(i, j, count) for i, counts in enumerate(scores.get("confusion_matrix", []))
                                         for j, count in enumerate(counts) if i != j and count]
    for label_id, guess, count in pairs:
        mistaken[label_id] = max(mistaken.get(label_id, (0, 0)), (count, guess))
    worst = sorted(occurring, key=lambda index: per_class["f1"][index])[:most]
    return "\n".join(row(
        cell(labels[index]), per_class["count"][index], f"{per_class['recall'][index] * 100:.2f} %",
        f"{per_class['f1'][index] * 100:.2f}",
        f"{cell(labels[mistaken[index][1]])} ({mistaken[index][0]})" if index in mistaken else UNKNOWN) for index in worst)
