"""MODEL_CARD.md and MODEL_CARD_en.md: the record beside checkpoints and exports says what the files and the log say."""

import hashlib
import json
import os
import shutil
import sys

import numpy as np

import export_model
from helpers import ROOT, read_lines, run_here
from textcls.common.options import LAUNCHER
from textcls.models.model_card import CARDS, cell, count_labels, describe_command, describe_file, find_base

DATA = ROOT / "data"


def read_tables(path):
    """{first cell: [the other cells]} of all tables in a card."""
    rows = [line.strip("| ").split(" | ") for line in read_lines(path) if line.startswith("| ")]
    return {first.strip(): [one.strip() for one in rest] for first, *rest in rows}


def test_a_checkpoint_has_a_record_of_its_training_in_two_languages(checkpoint):
    results = json.loads((checkpoint / "eval_results.json").read_text())
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    tables = {name: read_tables(checkpoint / name) for name in CARDS}
    chinese, english = tables.values()
    assert list(chinese.values())[1:] != [] and len(chinese) == len(english)
    for name in ("train.txt", "dev.txt"):
        rows = read_lines(DATA / name)
        assert chinese[name] == english[name] == [str(len(rows)), hashlib.sha256((DATA / name).read_bytes()).hexdigest()]
    for label in read_lines(DATA / "label.txt"):
        counts = [str(sum(line.endswith(f"\t{label}") for line in read_lines(DATA / name))) for name in ("train.txt", "dev.txt")]
        assert f"| {label} | {counts[0]} | {counts[1]} |" in read_lines(checkpoint / "MODEL_CARD.md")
    value, interval = english["Accuracy"]
    low, high = map(float, interval.split(" – "))
    assert value == chinese["准确率"][0] == f"{results['eval_accuracy'] * 100:.2f} %" and low < float(value[:-2]) < high
    assert english["Macro F1"][0] == f"{results['eval_macro_f1'] * 100:.2f}"
    assert english["Temperature"] == ["1", f"{config['calibration']['temperature']:.4f}"]
    assert config["base_model"]["name"] in english["Model that the training began with"][0]
    text = (checkpoint / "MODEL_CARD_en.md").read_text(encoding="utf-8")
    assert "python train.py --model_name_or_path .../" in text and "--max_seq_length 64" in text
    assert str(checkpoint.parent) not in text and "$" not in text
    assert (ROOT / "textcls/models/model_card_en.md").read_text(encoding="utf-8").count("\n## ") == text.count("\n## ")


def test_an_export_takes_the_record_along_with_what_was_added_to_it(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    with open(source / "MODEL_CARD.md", "ab") as card:
        card.write("\n## 7. 用途\n\n只用于测试。\n".encode())
    (source / "MODEL_CARD_en.md").unlink()  # as of an older edition
    process = run_here(export_model.main, "--params_path", source, "--output_path", tmp_path / "export")
    assert process.returncode == 0, process.stderr
    text = (tmp_path / "export/MODEL_CARD.md").read_text(encoding="utf-8")
    assert text.startswith((source / "MODEL_CARD.md").read_text(encoding="utf-8").rstrip()) and "## 8. 导出" in text
    digest = hashlib.sha256((tmp_path / "export/float32.pdiparams").read_bytes()).hexdigest()
    english = (tmp_path / "export/MODEL_CARD_en.md").read_text(encoding="utf-8")
    assert digest[:16] in text and digest[:16] in english and "The checkpoint has no record" in english
    assert "--model_path_prefix export/float32" in english


def test_the_command_line_holds_no_secret_and_no_path_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "few-shot/train.py")])
    shown = describe_command(["--wandb_api_key", "k1", "--hub_token=k2", "--tokens_per_batch", "512", "--prompt", "这是 什么",
                              "--wandb_http_proxy", "http://me:k3@proxy:80", "--data_dir", str(tmp_path), "--do_train"])
    assert shown == ("python few-shot/train.py --wandb_api_key '***' '--hub_token=***' --tokens_per_batch 512 "
                     f"--prompt '这是 什么' --wandb_http_proxy 'http://***@proxy:80' --data_dir .../{tmp_path.name} --do_train")


def test_the_command_line_names_the_launcher_that_was_used(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py")])
    for name, value in (("PADDLE_TRAINERS_NUM", "4"), ("PADDLE_LOCAL_SIZE", "2"), ("PADDLE_NNODES", "2")):
        monkeypatch.setenv(name, value)
    several = "--master ... --nnodes 2 --rank 0 --nproc_per_node 2 train.py --do_train"
    assert describe_command(["--do_train"]) == f"python -m paddle.distributed.launch {several}"
    monkeypatch.setenv(LAUNCHER, "textcls.launch")
    assert describe_command(["--do_train"]) == f"python -m textcls.launch {several}"
    monkeypatch.setenv("PADDLE_NNODES", "1")
    assert describe_command([]) == "python -m textcls.launch --nproc_per_node 2 train.py"


def test_the_model_to_begin_with_and_its_licence_as_its_files_say(tmp_path):
    assert find_base("ernie-3.0-medium-zh") == {"name": "ernie-3.0-medium-zh", "licence": "Apache-2.0 (PaddleNLP)"}
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert find_base(str(folder)) == {"name": "bert (no weights: random ones)", "licence": "–"}
    (folder / "LICENSE").write_text("\nMIT License\n")
    (folder / "model.safetensors").touch()
    assert find_base(str(folder)) == {"name": "bert", "licence": "MIT License"}
    (folder / "README.md").write_text("---\ntags: x\nlicense: apache-2.0\n---\n# BERT\n")
    assert find_base(str(folder))["licence"] == "apache-2.0"
    (folder / "config.json").write_text('{"base_model": {"name": "ernie", "licence": "known"}}')  # trained here
    assert find_base(str(folder)) == {"name": "ernie", "licence": "known"}


def test_labels_break_no_table_and_many_are_shortened(tmp_path):
    assert cell("a|b<i>`c`") == r"a\|b\<i\>\`c\`"
    (tmp_path / "train.txt").write_text("x", encoding="utf-8")
    labels = [f"l{number}" for number in range(1000)]
    file = describe_file(str(tmp_path / "train.txt"), 3000, np.repeat(np.arange(1000), 3), 1000)
    lines = count_labels(labels, [file]).split("\n")
    assert len(lines) == 201 and lines[100] == "| ... (800) | ... |"
    assert describe_file(os.devnull, 3).sha256 == "–"  # a device or a pipe cannot be read twice
