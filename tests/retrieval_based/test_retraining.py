"""`index.py retrain` and `build_index.py --keep_added`: what index.py has added is never lost, whatever comes between."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers import ROOT, assert_user_error, load_script, make_model, read_lines, run, run_here, write_lines
from textcls.common.errors import UserError
from textcls.retrieval.encoder import open_encoder
from textcls.retrieval.head import Head, fit_head
from textcls.retrieval.index import open_index
from textcls.retrieval.pending import DataFiles, carry_over, no_changes, note_name, note_texts, settle, write_data_files
from textcls.retrieval.retraining import read_data_files
from textcls.retrieval.rows import rows_of_texts
from textcls.retrieval.writing import memory_index, new_header, replace_head, write_index

build, change, train = [load_script("retrieval_based", name) for name in ("build_index", "index", "train")]
LABELS = read_lines(ROOT / "data/label.txt")
ROWS, DEV = [read_lines(ROOT / "data" / name)[:count] for name, count in (("train.txt", 120), ("dev.txt", 40))]
NEW = ["打完疫苗能喝酒吗", "狂犬疫苗要打几针", "疫苗第二针隔多久打"]


@pytest.fixture(scope="module")
def ready(make_once):
    """data/, an encoder of it that train.py has made in one step, and its index of texts."""
    def make(folder):
        (folder / "data").mkdir()
        for name, lines in (("train.txt", ROWS), ("dev.txt", DEV), ("label.txt", [f"{LABELS[0]}==诊断", *LABELS[1:]])):
            write_lines(folder / "data" / name, lines)
        model = make_model(folder / "model", num_hidden_layers=1, num_attention_heads=4)
        for main, *options in ((train.main, "--model_name_or_path", model, "--output_dir", folder / "encoder", "--max_steps", 1,
                                "--device", "cpu", "--max_seq_length", 32, "--report_to", "none"),
                               (build.main, "--params_path", folder / "encoder", "--index_dir", folder / "index", "--corpus",
                                "texts", "--precision", 0.3)):
            process = run_here(main, *options, "--data_dir", folder / "data")
            assert process.returncode == 0, process.stderr

    return make_once("to_retrain", make)


@pytest.fixture
def folder(ready, tmp_path):
    """A copy, whose index has a new label, a renamed and a removed one."""
    for name in ("data", "index"):
        shutil.copytree(ready / name, tmp_path / name)
    options = ["--params_path", ready / "encoder", "--index_dir", tmp_path / "index"]
    for words in (["add", "疫苗", "--texts", *NEW], ["describe", LABELS[2], "--texts", "另一种说法"],
                  ["rename", LABELS[0], "新名"], ["remove", LABELS[1]]):
        process = run_here(change.main, *words, *options)
        assert process.returncode == 0, process.stderr
    return tmp_path


def retrain_options(ready, folder, output="retrained"):
    return ["retrain", "--params_path", ready / "encoder", "--index_dir", folder / "index", "--dataset_dir", folder / "data",
            "--output_dir", folder / output]


def expected_rows(rows, added=()):
    """Rows after the changes of `folder`."""
    pairs = [row.split("\t") for row in rows]
    return [f"{text}\t{'新名' if label == LABELS[0] else label}" for text, label in pairs if label != LABELS[1]] + list(added)


ADDED = [*(f"{text}\t疫苗" for text in NEW), f"另一种说法\t{LABELS[2]}"]


def assert_data_hold_the_changes(folder):
    assert read_lines(folder / "data/train.txt") == expected_rows(ROWS, ADDED)
    assert read_lines(folder / "data/dev.txt") == expected_rows(DEV)
    assert read_lines(folder / "data/label.txt") == ["新名==诊断", f"{LABELS[2]}==另一种说法", *LABELS[3:], "疫苗"]


def test_what_was_added_goes_into_data_encoder_and_index(ready, folder):
    old = open_index(folder / "index")
    process = run_here(change.main, *retrain_options(ready, folder), "--dry_run")
    lines = process.stdout.splitlines()
    assert process.returncode == 0 and f"疫苗: new label, {len(NEW)} texts added" in process.stderr, process.stderr
    assert lines.count(f"rename\t{LABELS[0]}\t新名") == lines.count(f"add\t疫苗\t{NEW[0]}") == 1
    assert sum(line.startswith(f"remove\t{LABELS[1]}\t") for line in lines) == 1 + sum(
        row.endswith(f"\t{LABELS[1]}") for row in ROWS + DEV)
    assert read_lines(folder / "data/train.txt") == ROWS and not (folder / "retrained").exists()
    write_lines(folder / "data/dev.txt", [*DEV, "疫苗打几针\t疫苗"])  # of a label that label.txt does not have yet
    process = run("retrieval_based/index.py", *retrain_options(ready, folder), "--swap", "always", "--num_train_epochs", 1,
                  "--device", "cpu", "--train_options", "--learning_rate", "1e-4", "--report_to", "none")
    assert process.returncode == 0, process.stderr
    write_lines(folder / "data/dev.txt", read_lines(folder / "data/dev.txt")[:-1])
    assert_data_hold_the_changes(folder)
    kept = folder / "retrained/before"
    assert (read_lines(kept / "train.txt"), read_lines(kept / "label.txt")) == (ROWS, [f"{LABELS[0]}==诊断", *LABELS[1:]])
    assert read_lines(folder / "retrained/changes.txt") == lines
    assert "accuracy on dev.txt" in process.stdout and "of labels that texts were added to" in process.stdout
    index = open_index(folder / "index", open_encoder(folder / "retrained/encoder", device="cpu").encoder_id)
    assert index.labels == ["新名", *LABELS[2:], "疫苗"] and index.header["pending"] == no_changes()
    assert index.header["threshold"]["precision"] == 0.3 and index.header["corpus"] == "texts"
    assert len(index.row_labels) == len(expected_rows(ROWS, ADDED))
    assert open_index(kept / "index").header == {**old.header, "pending": settle(old.header["pending"])}
    process = run_here(build.main, "--params_path", folder / "retrained/encoder", "--data_dir", folder / "data", "--index_dir",
                       folder / "index")  # nothing would be lost
    assert process.returncode == 0, process.stderr


def fake_runs(ready, folder, meanwhile=None):
    """run_retrieval_script without the training: the encoder stays as it is. meanwhile: called after each build."""
    def start(script, *options, where):
        if script == "train.py":
            return shutil.copytree(ready / "encoder", folder / "retrained/encoder")
        process = run_here(build.main, *options)
        assert process.returncode == 0, process.stderr
        if meanwhile:
            meanwhile()

    return start


def test_what_is_added_during_the_training_is_in_the_new_index(ready, folder, monkeypatch):
    texts, options = iter(["加的第一条", "加的第二条"]), ["--params_path", ready / "encoder", "--index_dir", folder / "index"]

    def meanwhile():
        if text := next(texts, None):
            run_here(change.main, "add", "疫苗", "--texts", text, *options)

    monkeypatch.setattr(change, "run_retrieval_script", fake_runs(ready, folder, meanwhile))
    process = run_here(change.main, *retrain_options(ready, folder), "--swap", "always", "--precision", 0.2)
    assert process.returncode == 0 and f"dev.txt has no texts of {LABELS[2]}" not in process.stderr, process.stderr
    assert "dev.txt has no texts of 疫苗: how well" in process.stderr
    assert_data_hold_the_changes(folder)
    index = open_index(folder / "index")
    assert index.rows_per_label()[index.labels.index("疫苗")] == len(NEW) + 2 and index.header["threshold"]["precision"] == 0.2
    assert_user_error(run_here(build.main, *options, "--data_dir", folder / "data"),
                      "the data files lack it (疫苗: 2 texts added), expected --keep_added")


def test_a_worse_index_is_not_swapped_in_and_nothing_is_lost(ready, folder, monkeypatch):
    monkeypatch.setattr(change, "run_retrieval_script", fake_runs(ready, folder))
    right = iter([np.ones(40, bool), np.zeros(40, bool)])
    monkeypatch.setattr(change, "find_right", lambda index, encoder, rows: next(right)[:len(rows)])
    before = open_index(folder / "index").header
    process = run_here(change.main, *retrain_options(ready, folder))
    rows = len(expected_rows(DEV))
    assert process.returncode == 0 and f"answers {rows} dev texts fewer rightly" in process.stderr, process.stderr
    header = open_index(folder / "index").header
    assert header == {**before, "pending": settle(before["pending"])} and header["pending"]["added"]["疫苗"] == NEW
    assert open_index(folder / "retrained/index").labels[-1] == "疫苗"
    assert_data_hold_the_changes(folder)
    process = run_here(change.main, *retrain_options(ready, folder, "again"), "--dry_run")
    assert (process.returncode, process.stdout) == (0, "") and "lacks nothing of what" in process.stderr
    assert_user_error(run_here(change.main, *retrain_options(ready, folder)), "retrained: is not empty, expected a new folder")


def test_a_training_that_fails_can_be_run_again(ready, folder):
    before = open_index(folder / "index").header
    options = [*retrain_options(ready, folder), "--train_options", "--learning_rate", "fast"]
    assert_user_error(run_here(change.main, *options), "train.py ended with code 2, expected 0: its message is above")
    assert open_index(folder / "index").header == {**before, "pending": settle(before["pending"])}
    assert_data_hold_the_changes(folder)
    process = run_here(change.main, *retrain_options(ready, folder, "again"), "--dry_run")
    assert (process.returncode, process.stdout) == (0, ""), process.stderr


def test_what_would_only_fail_after_the_training_is_refused_before(ready, folder):
    options, before = retrain_options(ready, folder), (folder / "index/index.json").read_bytes()
    for wrong, message in ((("--num_train_epochs", "nan"), "--num_train_epochs nan: out of range"),
                           (("--unknown_file", "none.txt"), "none.txt: file not found"),
                           (("--unknown_file", "dev.txt"), "has a label in the data files"),
                           (("--train_options", f"--output_dir={folder}"), "retrain gives train.py its data, encoder")):
        assert_user_error(run_here(change.main, *options, *wrong), message)
    assert read_lines(folder / "data/train.txt") == ROWS and not (folder / "retrained").exists()
    assert (folder / "index/index.json").read_bytes() == before
    (folder / "retrained").mkdir()
    write_lines(folder / "retrained/earlier.txt", ["of an earlier run"])
    process = run_here(change.main, *options, "--dry_run")
    assert process.returncode == 0 and "add\t疫苗" in process.stdout, process.stderr


def test_a_kill_between_the_data_files_is_made_good(ready, folder):
    pending = open_index(folder / "index").header["pending"]
    old = read_data_files(folder / "data", pending)
    data, _ = carry_over(pending, old)
    write_data_files(folder / "data", data._replace(words=old.words), old)  # label.txt is the last, and is not written
    assert carry_over(pending, read_data_files(folder / "data", pending))[0] == data
    process = run_here(change.main, *retrain_options(ready, folder), "--dry_run")
    assert process.returncode == 0 and {line.split("\t")[0] for line in process.stdout.splitlines()} == {
        "rename", "remove", "label", "describe"}, process.stdout


def test_a_build_says_what_it_would_lose_and_keeps_it(ready, folder):
    options = ["--params_path", ready / "encoder", "--data_dir", folder / "data", "--index_dir", folder / "index"]
    before = (folder / "index/index.json").read_bytes()
    assert_user_error(run_here(build.main, *options), f"the data files lack it ({LABELS[0]}: renamed to 新名; {LABELS[1]}: "
                      f"label removed, ", f"疫苗: new label, {len(NEW)} texts added", "--keep_added", "retrain", "--overwrite")
    assert (folder / "index/index.json").read_bytes() == before
    for corpus in ("texts", "labels", "means"):
        process = run_here(build.main, *options, "--keep_added", "--corpus", corpus)
        assert process.returncode == 0 and "which the data files lack: " in process.stderr, process.stderr
        index = open_index(folder / "index")
        assert index.labels == ["新名", *LABELS[2:], "疫苗"]
        assert index.header["pending"]["added"]["疫苗"] == NEW
        assert_user_error(run_here(build.main, *options), "the data files lack it")
        if corpus == "labels":  # where each text describes its label
            run_here(change.main, "add", LABELS[3], "--texts", "还有一条", *options[:2], *options[4:])
            pending = open_index(folder / "index").header["pending"]
            assert pending["added"][LABELS[3]] == pending["described"][LABELS[3]] == ["还有一条"]
    assert index.rows_per_label()[-1] == len(NEW)
    assert_user_error(run_here(build.main, *options, "--keep_added", "--data_name", "x"), "expected a run without --keep_added")
    assert run_here(build.main, *options, "--overwrite", "--corpus", "labels").returncode == 0
    assert open_index(folder / "index").labels == LABELS
    header = json.loads((folder / "index/index.json").read_text(encoding="utf-8"))
    del header["pending"]  # as an edition wrote it that kept no list
    (folder / "index/index.json").write_text(json.dumps({**header, "changed": True}), encoding="utf-8")
    assert_user_error(run_here(build.main, *options), "of an older edition has changed, which kept no list")
    assert_user_error(run_here(change.main, *retrain_options(ready, folder)), "index.py of an older edition has changed it")
    assert run_here(change.main, "rename", LABELS[3], "新", *options[:2], *options[4:]).returncode == 0


def test_labels_in_other_letters_and_texts_of_two_labels(ready, encoder_export, folder):
    options = ["--params_path", ready / "encoder", "--index_dir", folder / "index"]
    assert run_here(change.main, "add", "CT检查", "--texts", "拍片", *options).returncode == 0
    for words in (["add", "ｃｔ 检查", "--texts", "a"], ["rename", LABELS[3], "ct检查"]):
        assert_user_error(run_here(change.main, *words, *options), "is the label 'CT检查' in other letters, expected that name")
    assert run_here(change.main, "rename", "CT检查", "ct检查", *options).returncode == 0
    assert_user_error(run_here(change.main, "describe", "疫苗", "--texts", "a==b", *options), "text 'a==b': == in it")
    text, label = ROWS[-1].split("\t")
    for kind in ("describe", "add"):
        process = run_here(change.main, kind, "疫苗", "--texts", text, "没有过的", *options)
        assert process.returncode == 0, process.stderr
        assert f"1 of the texts are of another label already, and now of both: {text} (" in process.stderr
    process = run_here(change.main, *retrain_options(ready, folder), "--dry_run")
    name = "新名" if label == LABELS[0] else label
    assert f"1 of the texts are of several labels: {text} ({name}, 疫苗), expected" in process.stderr, process.stderr
    write_lines(folder / "data/label.txt", [f"{LABELS[0]}==诊断", *LABELS[1:], "CT检查"])
    assert_user_error(run_here(change.main, *retrain_options(ready, folder)), "label 'ct检查': is the label 'CT检查' in other")
    write_lines(folder / "data/label.txt", [f"{LABELS[0]}==诊断", *LABELS[1:]])
    words = [*retrain_options(ready, folder), "--params_path", encoder_export]
    assert_user_error(run_here(change.main, *words), "is an export, which cannot be trained further")
    assert_user_error(run_here(change.main, *words[:1], "疫苗"), "refit and retrain take no label")
    (folder / "data/dev.txt").unlink()
    assert_user_error(run_here(change.main, *retrain_options(ready, folder)), "dev.txt: file not found")
    assert not (folder / "retrained").exists()


def test_changes_carried_over_are_those_made_one_by_one():
    """Random changes against the same ones made in the rows themselves; carried over, they lack nothing."""
    generator = random.Random(0)
    for _ in range(1000):
        rows = [(f"文{number}", f"类{generator.randrange(4)}") for number in range(12)]
        data = DataFiles({f"类{number}": [] for number in range(4)}, rows, rows[:5])
        labels, expected, dev, pending = set(data.words), set(rows), set(rows[:5]), no_changes()
        for step in range(generator.randrange(1, 9)):
            name, other = (f"类{generator.randrange(6)}" for _ in range(2))
            kind = generator.choice(["add", "rename", "remove"])
            if kind == "add":
                pending = note_texts(pending, name, name not in labels, [f"新{step}"], [])
                labels.add(name)
                expected.add((f"新{step}", name))
            elif name in labels and (kind == "remove" or other not in labels):
                new = other if kind == "rename" else None
                pending = note_name(pending, name, new)
                labels = labels - {name} | ({new} if new else set())
                expected, dev = ({(text, new if label == name else label) for text, label in rows
                                  if label != name or new} for rows in (expected, dev))
        carried, _ = carry_over(pending, data)
        assert (set(carried.words), set(carried.train), set(carried.dev)) == (labels, expected, dev)
        assert not carry_over(settle(pending), carried)[1]
        if not {*pending["renamed"], *pending["removed"]} & {*pending["renamed"].values(), *pending["new"]}:
            assert not carry_over(pending, carried)[1]  # as after a kill before it is settled
    data = DataFiles({"甲": [], "乙": []}, [("一", "甲"), ("二", "乙")], [])
    pending = note_name(note_name(no_changes(), "乙", "丙"), "甲", "乙")
    carried, _ = carry_over(pending, data)
    assert carried.train == [("一", "乙"), ("二", "丙")] and carry_over(pending, carried) == (carried, [])


def small_index(folder, encoder_id):
    generator = np.random.default_rng(1)
    vectors = generator.standard_normal((400, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    header = new_header(encoder_id, 8, "texts", [(f"类{number}", []) for number in range(5)])
    index = memory_index(header, rows_of_texts(vectors, np.arange(400) % 5, [f"文{row}" for row in range(400)]))
    head = {"weight": 0.5, "temperature": 0.5, "strength": 1.0}
    write_index(folder, index._replace(header={**header, "head": head}, head=fit_head(index, 1.0)))
    return open_index(folder)


def test_killed_while_it_is_swapped_in_either_index_opens(tmp_path):
    for name in ("0" * 16, "1" * 16):
        small_index(tmp_path / name, name)
    shutil.copytree(tmp_path / ("0" * 16), tmp_path / "index")
    code = """if True:
        import itertools, sys
        from textcls.retrieval.rows import *
        from textcls.retrieval.writing import *
        print("ready", flush=True)
        for number in itertools.count(1):
            stamp = index_stamp("index")
            replace_index("index", str(number % 2) * 16, stamp, f"kept/{number}")"""
    generator = random.Random(0)
    for _ in range(4):
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for folder in (tmp_path / "index", *tmp_path.glob("kept/*[0-9]")):
            index = open_index(folder)
            assert len(index.row_labels) == 400 and index.head is not None and index.header["encoder_id"] in ("0" * 16, "1" * 16)


def test_a_head_that_came_to_nothing_is_not_written(tmp_path):
    index = small_index(tmp_path, "0" * 16)
    with pytest.raises(UserError, match="the head did not converge, and is as it was"):
        replace_head(index, Head(index.head.labels, index.head.weights * np.nan, index.head.offsets))
    assert open_index(tmp_path).header == index.header
