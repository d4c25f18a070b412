"""predict.py: formats, order, standard input, threshold, two processes, refusals."""

import argparse
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openpyxl
import pytest

from helpers import ROOT, assert_user_error, launch, read_lines, run, run_here, write_lines
from predict import main
from textcls.common.errors import UserError
from textcls.data.files import compare_labels
from textcls.data.tables import unescape
from textcls.runtime.predictions import make_rows

DATA = ROOT / "data"
LABELS = read_lines(DATA / "label.txt")


def predict(checkpoint, output, *more, **options):
    process = run_here(main, "--params_path", checkpoint, "--dataset_dir", DATA, "--output_file", output, "--device", "cpu",
                       *more, **options)
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture(scope="module")
def jsonl(checkpoint, tmp_path_factory):
    """All 11 probabilities of data.txt, by way of jsonl."""
    output = tmp_path_factory.mktemp("predict") / "all.jsonl"
    predict(checkpoint, output, "--output_format", "jsonl", "--top_k", 11)
    return [json.loads(line) for line in read_lines(output)]


def test_jsonl_holds_all_classes_in_order_of_probability(jsonl):
    assert [row["text"] for row in jsonl] == read_lines(DATA / "data.txt")
    for row in jsonl:
        probabilities = [entry["probability"] for entry in row["top_k"]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-4) and probabilities == sorted(probabilities, reverse=True)
        assert {entry["label"] for entry in row["top_k"]} == set(LABELS)
        assert (row["label"], row["probability"]) == (row["top_k"][0]["label"], probabilities[0])


def test_txt_tsv_and_csv_say_the_same(checkpoint, jsonl, tmp_path):
    process = predict(checkpoint, tmp_path / "output.txt", "--max_seq_length", 64, "--batch_size", 7)
    assert re.search(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] \[    INFO\] - Prediction results save in .*output.txt\.$",
                     process.stderr, re.MULTILINE)
    assert read_lines(tmp_path / "output.txt") == ["text\tlabel"] + [f"{row['text']}\t{row['label']}" for row in jsonl]
    for name, delimiter in (("tsv", "\t"), ("csv", ",")):
        predict(checkpoint, tmp_path / name, "--output_format", name, "--top_k", 2)
        header, *rows = csv.reader(io.StringIO((tmp_path / name).read_text(encoding="utf-8")), delimiter=delimiter)
        assert header == ["text", "label", "probability", "label_2", "probability_2"]
        for row, expected in zip(rows, jsonl):
            top = expected["top_k"]
            assert row[0] == expected["text"] and [row[1], row[3]] == [top[0]["label"], top[1]["label"]]
            assert float(row[2]) == pytest.approx(top[0]["probability"], abs=2e-5)
        assert len(rows) == len(jsonl)


def test_threshold_marks_unsure_answers(checkpoint, jsonl, tmp_path):
    """Those whose probability, as it is printed, is below it."""
    limit = sorted(row["probability"] for row in jsonl)[15]
    predict(checkpoint, tmp_path / "out", "--threshold", limit)
    labels = [line.split("\t")[1] for line in read_lines(tmp_path / "out")[1:]]
    assert labels == [row["label"] if row["probability"] >= limit else "undecided" for row in jsonl]
    assert 0 < labels.count("undecided") < len(labels)
    options = argparse.Namespace(output_format="jsonl", top_k=1, threshold=0.6)
    [row] = make_rows(["好"], np.array([[0.4, 0.5999998]], np.float32), ["a", "b"], options)
    assert (row["label"], row["probability"]) == ("b", 0.6)


def test_reads_standard_input_and_writes_standard_output(checkpoint, jsonl):
    process = run("predict.py", "--params_path", checkpoint, "--output_file", "-", "--data_file", "-",
                  stdin="\ufeff" + "\r\n".join(read_lines(DATA / "data.txt")))
    assert process.returncode == 0, process.stderr
    assert process.stdout.split("\n")[1:-1] == [f"{row['text']}\t{row['label']}" for row in jsonl]


def test_odd_texts_are_answered(checkpoint, tmp_path):
    texts = ["😀👨‍👩‍👧", "\u200b", "[SEP][PAD] [MASK]", "长" * 5000, 'he said "a, b"', "  两边有空格  ", "\u2028", "a\rb"]
    texts = [text for text in texts if text.strip()]
    write_lines(tmp_path / "odd.txt", texts)
    predict(checkpoint, tmp_path / "out.csv", "--dataset_dir", tmp_path, "--data_file", "odd.txt", "--output_format", "csv")
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:]] == texts and all(row[1] in LABELS for row in rows[1:])


def test_a_workbook_holds_texts_as_texts(checkpoint, tmp_path, monkeypatch):
    """No text is a formula, a number or an error, and none is changed by what XML cannot hold."""
    texts = ["=1+1", "=HYPERLINK(\"http://a.b\")", "+1", "-1", "@SUM(1)", "#N/A", "007", "1e5", "2024-05-01", "TRUE",
             "  两边有空格  ", "a\rb", "\x01\x0b\x1f", "\ufffe", "_x0041_", "_x000D_", "😀", "<b>&amp;", "长" * 32767]
    write_lines(tmp_path / "odd.txt", texts)
    options = ["--dataset_dir", tmp_path, "--data_file", "odd.txt", "--output_format", "xlsx", "--top_k", 2]
    predict(checkpoint, tmp_path / "out.xlsx", *options)
    header, *rows = openpyxl.load_workbook(tmp_path / "out.xlsx")["answers"].iter_rows()
    assert [cell.value for cell in header] == ["text", "label", "probability", "label_2", "probability_2"]
    assert [unescape(row[0].value) for row in rows] == texts
    for row in rows:
        assert [cell.data_type for cell in row] == ["s", "s", "n", "s", "n"] and row[1].value in LABELS and 0 < row[2].value <= 1
    write_lines(tmp_path / "odd.txt", ["好", "长" * 32768])
    for output, message in ((tmp_path / "new.xlsx", "row 3: 32768 characters, expected at most 32767"),
                            (tmp_path / "out.txt", "a name that ends in .xlsx"), ("-", "a name that ends in .xlsx")):
        assert_user_error(run_here(main, "--params_path", checkpoint, "--output_file", output, *options), message)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    process = run_here(main, "--params_path", checkpoint, "--output_file", tmp_path / "new.xlsx", *options)
    assert_user_error(process, "the package openpyxl is missing, expected `pip install openpyxl`")
    assert sorted(os.listdir(tmp_path)) == ["odd.txt", "out.xlsx"]


def test_two_processes_write_one_ordered_file(checkpoint, tmp_path):
    """More than two chunks of 8192 texts, so that both ranks have some and the last chunk is not full."""
    texts = [line.split("\t")[0] for line in read_lines(DATA / "train.txt")]
    many = [f"{texts[number % len(texts)][:6]} {number}" for number in range(2 * 8192 + 100)]
    write_lines(tmp_path / "many.txt", many)
    options = ["--dataset_dir", tmp_path, "--data_file", "many.txt", "--batch_size", 256]
    predict(checkpoint, tmp_path / "one.txt", *options)
    process = launch("predict.py", "--params_path", checkpoint, "--output_file", tmp_path / "two.txt", "--device", "cpu",
                     *options, log_dir=tmp_path / "log")
    assert process.returncode == 0, process.stdout + process.stderr
    one, two = read_lines(tmp_path / "one.txt"), read_lines(tmp_path / "two.txt")
    assert [line.split("\t")[0] for line in two[1:]] == many
    different = sum(a != b for a, b in zip(one, two))
    assert different <= 2  # one thread or two: the last bit of a tie may differ
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_wrong_input_is_reported_and_nothing_is_written(checkpoint, tmp_path):
    write_lines(tmp_path / "data.txt", ["好", "a\tb", ""])
    common = ["--dataset_dir", tmp_path, "--output_file", tmp_path / "out.txt"]
    trained = ["--params_path", checkpoint]
    wrong_rows = [f"{tmp_path}/data.txt:2: a tab", f"{tmp_path}/data.txt:3: empty line", "2 problems found."]
    assert_user_error(run("predict.py", *common, *trained), *wrong_rows)

    def refused(*arguments, stdin=""):
        process = run_here(main, *arguments, stdin=stdin)
        assert_user_error(process)
        assert not (tmp_path / "out.txt").exists() and not [name for name in os.listdir(tmp_path) if "out.txt" in name]
        return process.stderr

    assert "standard input:2: a tab" in refused(*common, *trained, "--data_file", "-", stdin="好\na\tb\n")
    assert "no.txt: file not found" in refused(*common, *trained, "--data_file", "no.txt")
    write_lines(tmp_path / "data.txt", ["好"])
    assert "none: no such folder" in refused(*common, "--params_path", tmp_path / "none")
    assert "config.json is missing" in refused(*common, "--params_path", tmp_path)
    assert "expected 3 to 512" in refused(*common, *trained, "--max_seq_length", "513")
    assert "--top_k" in refused(*common, "--top_k", "2")
    assert "has 11 classes" in refused(*common, *trained, "--top_k", 12, "--output_format", "csv")
    assert "typo.txt: file not found" in refused(*common, *trained, "--label_file", "typo.txt")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: a pipe or device" in refused(*common, *trained, "--data_file", "pipe")
    os.remove(tmp_path / "pipe")
    for output, wrong in (("", "without a name"), (tmp_path, f"{tmp_path}: is a folder"),
                          (tmp_path / "data.txt", "data.txt: is an input of this run"),
                          (tmp_path / "train.txt", "train.txt: is a data file")):
        assert wrong in refused(*common[:2], "--output_file", output, *trained)
    assert read_lines(tmp_path / "data.txt") == ["好"]
    labels = LABELS.copy()
    labels[2], labels[3] = labels[3], labels[2]
    write_lines(tmp_path / "label.txt", labels)
    assert f"{tmp_path}/label.txt:3: label '指标解读' where the checkpoint has '病因分析'" in refused(*common, *trained)
    with pytest.raises(UserError, match="label.txt: 10 labels where the checkpoint has 11"):
        compare_labels(LABELS, LABELS[:-1], "label.txt", "checkpoint")


def test_sigterm_leaves_no_unfinished_file(checkpoint, tmp_path):
    """Standard input stays open, so that the script is in the midst of its work when the signal comes."""
    command = ["predict.py", "--params_path", checkpoint, "--data_file", "-", "--output_file", tmp_path / "out.txt"]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not list(tmp_path.glob(".out.txt.*.part")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 143 and os.listdir(tmp_path) == []
    assert process.stderr.read().endswith(b"Terminated.\n")
    process.stdin.close()
    process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="nothing tells how far the imports are")
def test_ctrl_c_during_imports_has_no_traceback():
    process = subprocess.Popen([sys.executable, "train.py"], cwd=ROOT, stderr=subprocess.PIPE,
                               # a test run in the background may have it ignored
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while "libpaddle.so" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]  # to which Paddle may add a line
    assert errors.endswith(b"Interrupted.\n") and b"Traceback" not in errors and process.returncode == 130


def test_binary_task(binary, tmp_path):
    data, checkpoint = binary
    write_lines(tmp_path / "data.txt", ["拔一颗牙多少钱", "为什么会头疼"])
    predict(checkpoint, tmp_path / "out.txt", "--dataset_dir", tmp_path)
    assert read_lines(tmp_path / "out.txt")[1:] == ["拔一颗牙多少钱\t医疗费用", "为什么会头疼\t病因分析"]
