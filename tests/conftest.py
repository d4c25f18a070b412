"""Shared by the tests: running the real command lines, tiny data, tiny models, one trained checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import utils  # noqa: F401  prepares this process before a test imports paddle

ROOT = Path(__file__).resolve().parent.parent
KUAKE = os.environ.get("KUAKE_QIC_DIR")
needs_kuake = pytest.mark.skipif(not KUAKE, reason="KUAKE_QIC_DIR does not name the folder of the KUAKE-QIC data set")


def run(*command, stdin=None, cwd=ROOT, env=None, module=None):
    """Run `python command...` as a user would; returns the finished process with text output."""
    start = [sys.executable] + (["-m", *module] if module else [])
    return subprocess.run([*start, *map(str, command)], cwd=cwd, env={**os.environ, **(env or {})}, encoding="utf-8",
                          errors="replace", input=stdin, capture_output=True, timeout=600)


def launch(*command, cwd=ROOT, log_dir):
    """Run a script in two CPU processes."""
    module = ["paddle.distributed.launch", "--nproc_per_node", "2", "--backend", "gloo", "--log_dir", str(log_dir)]
    return run(*command, cwd=cwd, module=module)


def assert_user_error(process, *parts):
    """Exit code 2, every part of the message on standard error, no traceback."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr + process.stdout, process.stderr
    for part in parts:
        assert part in process.stderr


def write_lines(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_lines(path):
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def make_model(folder, **changes):
    """A model folder without weights: the sample data's ERNIE, smaller."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((ROOT / "data/config.json").read_text(encoding="utf-8"))
    config.update({"hidden_size": 48, "intermediate_size": 96, **changes})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(ROOT / "data/vocab.txt", folder)
    return folder


def train_options(model, data, output, **changes):
    """The usual training command line; an option set to None is left out, one set to "" is a flag."""
    options = {"model_name_or_path": model, "data_dir": data, "output_dir": output, "device": "cpu",
               "learning_rate": "1e-3", "num_train_epochs": 2, "per_device_train_batch_size": 16,
               "per_device_eval_batch_size": 32, "max_seq_length": 64, "do_train": "", "do_eval": "",
               "metric_for_best_model": "accuracy", "load_best_model_at_end": "", "evaluation_strategy": "epoch",
               "save_strategy": "epoch", "save_total_limit": 1, **changes}
    words = ["train.py"]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}"] + ([str(value)] if value != "" else [])
    return words


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """About 20 training and 5 dev rows per class of the sample data, with label.txt and data.txt."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train.txt", 220), ("dev.txt", 55), ("label.txt", None), ("data.txt", None)):
        write_lines(folder / name, read_lines(ROOT / "data" / name)[:count])
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_model):
    """A model trained by train.py on all sample data; good enough to be right more often than not."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    process = run(*train_options(tiny_model, ROOT / "data", folder, num_train_epochs=10, learning_rate="3e-3"))
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="session")
def binary(tmp_path_factory, tiny_model):
    """(data folder, checkpoint) of a task with two classes."""
    folder = tmp_path_factory.mktemp("binary")
    for name in ("train.txt", "dev.txt"):
        rows = [line for line in read_lines(ROOT / "data" / name) if line.endswith(("医疗费用", "病因分析"))]
        write_lines(folder / name, rows)
    write_lines(folder / "label.txt", ["医疗费用", "病因分析"])
    process = run(*train_options(tiny_model, folder, folder / "checkpoint", num_train_epochs=8, learning_rate="2e-3"))
    assert process.returncode == 0, process.stderr
    return folder, folder / "checkpoint"


@pytest.fixture(scope="session")
def ernie_m(tmp_path_factory):
    """An ERNIE-M trained by train.py on two classes; its SentencePiece model is made from the sample data."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("ernie_m")
    rows = [line for line in read_lines(ROOT / "data/train.txt") if line.endswith(("医疗费用", "病因分析"))]
    write_lines(folder / "texts", [row.split("\t")[0] for row in rows])
    model = folder / "model"
    model.mkdir()
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "texts"), model_prefix=str(model / "sentencepiece.bpe"),
                                             vocab_size=1200, hard_vocab_limit=False, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model / "sentencepiece.bpe.model"))
    vocab = [pieces.id_to_piece(index) for index in range(3, pieces.get_piece_size())]
    write_lines(model / "vocab.txt", ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *vocab])
    os.remove(model / "sentencepiece.bpe.vocab")
    (model / "config.json").write_text(json.dumps({
        "architectures": ["ErnieMForSequenceClassification"], "model_type": "ernie_m", "vocab_size": len(vocab) + 5,
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
        "max_position_embeddings": 130, "pad_token_id": 1, "cls_token_id": 0}))
    write_lines(folder / "train.txt", rows)
    write_lines(folder / "dev.txt", [line for line in read_lines(ROOT / "data/dev.txt")
                                     if line.endswith(("医疗费用", "病因分析"))])
    write_lines(folder / "label.txt", ["医疗费用", "病因分析"])
    process = run(*train_options(model, folder, folder / "checkpoint", num_train_epochs=6, learning_rate="2e-3"))
    assert process.returncode == 0, process.stderr
    assert json.loads((folder / "checkpoint/eval_results.json").read_text())["eval_accuracy"] > 0.7
    return folder
