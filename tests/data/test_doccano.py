"""Tests of data/doccano.py through its command line; DOCCANO_DIR adds the samples of the doccano project."""

import collections
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import doccano, table
from helpers import ROOT, assert_user_error, run_here
from textcls.common.errors import Problems
from textcls.data.files import read_labelled, read_labels, read_texts

SCRIPT = str(ROOT / "data/doccano.py")
ALL = {"train.txt", "dev.txt", "test.txt", "label.txt"}
ONE = "expected exactly one label (a list of one string, or a string)"


def run(folder, *options, hash_seed=None, python=None, rows=None):
    """Run the script in `folder`; rows: what to write as doccano.jsonl first (str as it is, others as JSON).

    hash_seed, python (options of the interpreter): each asks for a process of its own.
    """
    if rows is not None:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / "doccano.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    command = ["--save_dir", "out", *map(str, options)]
    if hash_seed is None and python is None:
        return run_here(doccano.main, *command, cwd=folder)
    env = {**os.environ, "PYTHONHASHSEED": hash_seed or "random", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run([sys.executable, *(python or ["-B"]), SCRIPT, *command], cwd=folder, env=env, capture_output=True,
                            encoding="utf-8", timeout=60)
    assert "Traceback" not in result.stderr
    return result


def succeed(folder, *options, **kwargs):
    result = run(folder, *options, **kwargs)
    assert result.returncode == 0, result.stderr
    return result


def fail(folder, *options, out=(), **kwargs):
    """Run, expect exit code 2 and nothing in the output folder but the files `out`; returns stderr."""
    result = run(folder, *options, **kwargs)
    assert result.returncode == 2
    assert "Save" not in result.stdout and "Finished" not in result.stdout
    assert names(folder) == set(out)
    return result.stderr


def names(folder, name="out"):
    return set(os.listdir(folder / name)) if (folder / name).is_dir() else set()


def lines_of(folder, name, out="out"):
    content = (folder / out / name).read_bytes().decode("utf-8")
    assert content.endswith("\n") or not content
    return content.split("\n")[:-1]


def pairs(folder, name, out="out"):
    rows = [line.split("\t") for line in lines_of(folder, name, out)]
    assert all(len(row) == 2 for row in rows)
    return [tuple(row) for row in rows]


def classes(**counts):
    """Rows of the classes, mixed: {a: 3, b: 2} gives a b a b a."""
    return [{"text": f"文本 {label} {index}", "label": [label]} for index in range(max(counts.values()))
            for label, count in counts.items() if index < count]


def counts_of(folder, name):
    return collections.Counter(label for _, label in pairs(folder, name))

GOOD = [{"text": "好", "label": ["正"]}, {"text": "坏", "label": ["负"]}]


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("text_key", ["text", "data", "column_data"])
@pytest.mark.parametrize("label_key", ["label", "labels", "column_label"])
def test_keys(tmp_path, text_key, label_key):
    rows = [{"id": 1, text_key: "价格很好", label_key: ["正"], "meta": {"id": 1}}, {text_key: "很差", label_key: "负"}]
    succeed(tmp_path, "--splits", 1, rows=rows)
    assert sorted(pairs(tmp_path, "train.txt")) == [("价格很好", "正"), ("很差", "负")]
    assert lines_of(tmp_path, "label.txt") == ["正", "负"]
    assert names(tmp_path) == {"train.txt", "label.txt"}


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_gives_what_jsonl_gives(tmp_path, indent):
    rows = classes(a=20, b=7)
    succeed(tmp_path, rows=rows)
    (tmp_path / "export.json").write_text("\n" + json.dumps(rows, indent=indent), encoding="utf-8-sig")
    succeed(tmp_path, "--doccano_file", "export.json", "--save_dir", "out2")
    for name in ALL:
        assert lines_of(tmp_path, name) == lines_of(tmp_path, name, "out2")


def test_bom_crlf_blank_lines(tmp_path):
    content = "".join(json.dumps(row) + "\r\n" for row in GOOD)
    (tmp_path / "doccano.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode() + b"\r\n")
    succeed(tmp_path, "--splits", 1)
    assert sorted(pairs(tmp_path, "train.txt")) == [("坏", "负"), ("好", "正")]


def test_null_and_empty_string_are_no_label_and_a_repeated_label_is_one(tmp_path):
    rows = GOOD + [{"text": "甲", "label": None}, {"text": "乙", "label": ""}, {"text": "丙", "label": ["正", "正"]}]
    succeed(tmp_path, "--splits", 1, rows=rows)
    assert lines_of(tmp_path, "data.txt") == ["甲", "乙"]
    assert ("丙", "正") in pairs(tmp_path, "train.txt")


def test_tabs_and_line_breaks_become_one_blank(tmp_path):
    rows = [{"text": "甲\t\t乙\r\n丙\u2028丁\n", "label": ["a"]}, {"text": " x  y ", "label": ["b"]},
            {"text": "戊\n己", "label": []}]
    result = succeed(tmp_path, "--splits", 1, rows=rows)
    assert sorted(pairs(tmp_path, "train.txt")) == [(" x  y ", "b"), ("甲 乙 丙 丁", "a")]
    assert lines_of(tmp_path, "data.txt") == ["戊 己"]
    assert "texts with tabs or line breaks (replaced by one blank): 2\n" in result.stdout


# ---------------------------------------------------------------- rows that are reported, exit code 0


def test_unlabelled_and_several_labels(tmp_path):
    rows = [*GOOD, {"text": "未标", "label": []}, {"text": "两个", "label": ["正", "负"]}, {"text": "未标", "label": []}]
    result = succeed(tmp_path, "--splits", 1, rows=rows)
    assert result.stderr.splitlines() == [
        f"warning: doccano.jsonl:3: no label, {ONE}", f"warning: doccano.jsonl:5: no label, {ONE}",
        f"warning: doccano.jsonl:4: 2 labels ['正', '负'], {ONE}"]
    assert "rows without a label (their texts go to data.txt): 2\n" in result.stdout
    assert "rows with several labels (left out): 1\n" in result.stdout
    assert lines_of(tmp_path, "data.txt") == ["未标"]
    assert sorted(pairs(tmp_path, "train.txt")) == [("坏", "负"), ("好", "正")]
    assert "Save 1 examples to " + os.path.join("out", "data.txt") + ".\n" in result.stdout


def test_only_the_first_20_of_each_kind_are_shown(tmp_path):
    rows = [{"text": f"u{i}", "label": []} for i in range(30)] + [{"text": f"m{i}", "label": ["a", "b"]} for i in range(25)]
    result = succeed(tmp_path, "--splits", 1, rows=GOOD + rows)
    assert result.stderr.count(": no label, ") == 20 and result.stderr.count(": 2 labels ") == 20
    assert "... and 10 more warnings" in result.stderr and "... and 5 more warnings" in result.stderr
    assert "(their texts go to data.txt): 30\n" in result.stdout and "several labels (left out): 25\n" in result.stdout


def test_repeated_texts(tmp_path):
    rows = [{"text": "x y", "label": ["a"]}, {"text": "x\ny", "label": ["a"]}, {"text": "z", "label": ["b"]},
            {"text": "争", "label": ["a"]}, {"text": "争", "label": ["b"]}, {"text": "争", "label": ["a"]}]
    result = succeed(tmp_path, "--splits", 1, rows=rows)
    assert sorted(pairs(tmp_path, "train.txt")) == [("x y", "a"), ("z", "b")]
    assert "doccano.jsonl:5: label 'b' for the text of line 4, which has 'a', expected one label per text" in result.stderr
    assert "texts that occur with different labels (left out): 1\n" in result.stdout
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    result = succeed(tmp_path, "--splits", 1, "--overwrite", "--doccano_file", "a.json")
    assert "warning: a.json: row 5: label 'b' for the text of row 4, which has 'a', expected one" in result.stderr


def test_single_label_is_warned_of(tmp_path):
    assert "label.txt: only one label 'a', expected at least two" in succeed(tmp_path, rows=classes(a=5)).stderr


# ---------------------------------------------------------------- broken rows, exit code 2

BROKEN = [
    ('{"text": "x", "label": ["a"]', "invalid JSON (", "expected one JSON object per line or one array"),
    ("12", "a JSON int", "expected an object with a text and a label"),
    ('{"label": ["a"]}', "no text", "expected the key 'text', 'data' or 'column_data'"),
    ('{"text": "x", "entities": []}', "no label", "expected the key 'label', 'labels' or 'column_label'"),
    ('{"text": "x", "data": "y", "label": ["a"]}', "'text' and 'data' differ", "expected only one of these keys"),
    ('{"text": null, "label": ["a"]}', "the text is a JSON NoneType", "expected a string"),
    ('{"text": " \\n", "label": ["a"]}', "text: empty or blank", "expected a text"),
    ('{"text": "x", "label": [[0, 5, "X"]]}', "the labels are spans of sequence labelling", ONE[9:]),
    ('{"text": "x", "label": [3]}', "the labels are not strings", ONE[9:]),
    ('{"text": "x", "label": 3}', "the labels are not strings", ONE[9:]),
    ('{"text": "x", "label": ["a\\tb"]}', "label 'a\\tb': a tab", "a label of visible characters"),
    ('{"text": "x", "label": ["a\\nb"]}', "label 'a\\nb': a line end", "a label of visible characters"),
    ('{"text": "x", "label": " a"}', "label ' a': blanks around it", "a label of visible characters"),
    ('{"text": "x", "label": "a\\u200bb"}', "label 'a\\u200bb': an invisible character", "a label of visible characters"),
    ('{"text": "x", "label": [""]}', "label '': empty or blank", "a label of visible characters"),
    ('{"text": "x", "label": "a==b"}', "label 'a==b': == in it", "a label of visible characters, without =="),
    ('{"text": "x", "label": "a\\u001bb"}', "label 'a\\x1bb': an invisible character", "a label of visible characters"),
    ('{"text": "x\\u0000", "label": ["a"]}', "text: a NUL character", "expected a text"),
    ('{"text": "x\\ud83d", "label": ["a"]}', "text: a lone surrogate", "expected a text"),
]


def test_broken_rows_are_all_reported_and_nothing_is_written(tmp_path):
    lines = fail(tmp_path, rows=[*GOOD, *(row for row, _, _ in BROKEN)]).splitlines()
    assert lines[-1] == f"{len(BROKEN)} problems found."
    assert len(lines) == len(BROKEN) + 1
    for number, ((_, wrong, expected), line) in enumerate(zip(BROKEN, lines), 3):
        assert line.startswith(f"doccano.jsonl:{number}: {wrong}") and expected in line


ODD = st.text(st.one_of(st.sampled_from("ab甲=#\t\n\r\0 \u3000\u200b\u2028\ufeff\x1b\x1c\x85\ud83d"), st.characters()),
              max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ODD, ODD), min_size=1, max_size=4), st.booleans())
def test_what_is_written_is_what_train_reads(tmp_path_factory, rows, as_table):
    """Whatever texts and labels hold, either nothing is written, or all of it is read without a problem and as it was meant."""
    folder = tmp_path_factory.mktemp("odd")
    rows = [*rows, ("甲乙", "a"), ("丙丁", "b")]
    (folder / "odd.jsonl").write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    script, option = (table, "--table_file") if as_table else (doccano, "--doccano_file")
    process = run_here(script.main, option, "odd.jsonl", "--save_dir", "out", "--splits", 1, cwd=folder)
    if process.returncode:
        assert_user_error(process, "odd.jsonl:")
        assert names(folder) == set()
        return
    problems = Problems()
    labels = read_labels(folder / "out/label.txt", problems)
    texts, ids = read_labelled(folder / "out/train.txt", labels, problems)
    unlabelled = list(read_texts(folder / "out/data.txt", problems)) if (folder / "out/data.txt").exists() else []
    assert not problems.count, problems.lines
    plain = {"".join(text.split()).replace("\ufeff", "") for text, _ in rows}
    assert {"".join(text.split()).replace("\ufeff", "") for text in [*texts, *unlabelled]} <= plain
    assert {" ".join(label.split()) for _, label in rows} >= {" ".join(labels[index].split()) for index in ids}


def test_broken_rows_of_an_array_are_named_by_row(tmp_path):
    rows = [json.loads(row) for row, _, _ in BROKEN[1:]]
    (tmp_path / "a.json").write_text(json.dumps(GOOD + rows), encoding="utf-8")
    lines = fail(tmp_path, "--doccano_file", "a.json").splitlines()
    for number, ((_, wrong, _), line) in enumerate(zip(BROKEN[1:], lines), 3):
        assert line.startswith(f"a.json: row {number}: {wrong}")


def test_only_the_first_20_problems_are_shown(tmp_path):
    lines = fail(tmp_path, rows=GOOD + [{"label": ["a"]}] * 33).splitlines()
    assert len(lines) == 21 and lines[-1] == "33 problems found, the first 20 are shown."


@pytest.mark.parametrize("content, message", [
    (b'[\n{"text": "x", "label": ["a"]},\n{"text" "y"}]', r"a\.json:3: invalid JSON \(.*\), expected one JSON object"),
    (b"[" * 100000, r"a\.json(:1)?: invalid JSON \("),
    (b"", r"a\.json: file is empty"),
    (b"\n\n", r"a\.json: none of 0 rows is usable, expected at least one text"),
    (b"[]", r"a\.json: none of 0 rows is usable"),
    (b'{"text": "x", "label": []}', r"a\.json: none of 1 rows is usable"),
    (b'{"text": "\xff", "label": ["a"]}', r"a\.json:1: invalid UTF-8 at byte"),
    (b'[{"text": "x", "label": ["a"]},\n{"text": "\xff", "label": ["a"]}]', r"a\.json:2: invalid UTF-8(.*)\n1 problem found"),
])
def test_broken_files(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    assert re.search(message, fail(tmp_path, "--doccano_file", "a.json"))


def test_missing_file_as_a_process(tmp_path):
    assert "no.jsonl: file not found, expected" in fail(tmp_path, "--doccano_file", "no.jsonl", python=["-B"])


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("splits, message", [
    ("0.8 0.1", "--splits 0.8 0.1: the sum is 0.9, expected 1 to 3 numbers"),
    ("0.8 0.1 0.1 0", "--splits 0.8 0.1 0.1 0: too many numbers"),
    ("1.5 -0.5", "--splits 1.5 -0.5: a number is out of range"), ("0 1", "a number is out of range"),
    ("nan", "a number is out of range"), ("inf", "a number is out of range"),
    ("0.8 0.1 0.100002", "the sum is 1.000002"), ("", "--splits: expected at least one argument"),
    ("x", "--splits: invalid float value: 'x'"),
])
def test_bad_splits(tmp_path, splits, message):
    assert message in fail(tmp_path, "--splits", *splits.split(), rows=GOOD)


def test_unknown_option_and_help(tmp_path):
    assert "unrecognized arguments: --seeds" in fail(tmp_path, "--seeds", 1, rows=GOOD)
    text = " ".join(succeed(tmp_path, "--help").stdout.split())
    assert "in the order of their first appearance in the export" in text
    for default in ("doccano.jsonl", "./data", "[0.8, 0.1, 0.1]", "3", "False"):
        assert f"(default: {default})" in text


def test_label_file_keeps_its_order(tmp_path):
    (tmp_path / "old.txt").write_text("b\nc\na\n", encoding="utf-8")
    result = succeed(tmp_path, "--label_file", "old.txt", rows=classes(a=10, b=10))
    assert lines_of(tmp_path, "label.txt") == ["b", "c", "a"]
    assert "label 'c' has only 0 rows, expected" in result.stderr
    rows = classes(a=5, d=5)
    errors = fail(tmp_path, "--label_file", "old.txt", "--overwrite", rows=rows, out=ALL)
    assert "doccano.jsonl:2: label 'd' is not in --label_file, expected one of its 3 labels" in errors
    assert "5 problems found." in errors
    assert "no.txt: file not found" in fail(tmp_path, "--label_file", "no.txt", out=ALL)


def test_label_file_in_save_dir_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "label.txt").write_bytes(b"b\r\na\r\n")
    succeed(tmp_path, "--label_file", "out/label.txt", rows=classes(a=10, b=10))
    assert (tmp_path / "out" / "label.txt").read_bytes() == b"b\r\na\r\n" and names(tmp_path) == ALL


# ---------------------------------------------------------------- the split


def test_stratified(tmp_path):
    sizes = {"a": 200, "b": 50, "c": 13, "d": 4, "e": 3, "f": 2, "g": 1}
    rows = classes(**sizes)
    result = succeed(tmp_path, rows=rows)
    splits = [counts_of(tmp_path, name) for name in ("train.txt", "dev.txt", "test.txt")]
    assert sum(splits, collections.Counter()) == sizes
    everything = [row for name in ("train.txt", "dev.txt", "test.txt") for row in pairs(tmp_path, name)]
    assert sorted(everything) == sorted((row["text"], row["label"][0]) for row in rows)  # none lost, none twice
    assert [split["a"] for split in splits] == [160, 20, 20] and [split["b"] for split in splits] == [40, 5, 5]
    for label in "cde":
        assert all(split[label] >= 1 for split in splits)
    for label, count in (("f", 2), ("g", 1)):
        assert splits[0][label] == count
        assert f"label.txt: label '{label}' has only {count} rows, all of them go to train.txt, " \
               "expected at least 3, one per split" in result.stderr
    assert "label 'e' has only" not in result.stderr
    assert lines_of(tmp_path, "label.txt") == list("abcdefg")


def test_many_small_classes_keep_the_shares(tmp_path):
    succeed(tmp_path, rows=classes(**{f"c{index}": 15 for index in range(40)}))
    sizes = [len(pairs(tmp_path, name)) for name in ("train.txt", "dev.txt", "test.txt")]
    assert sizes == [480, 60, 60]


@pytest.mark.parametrize("splits, sizes", [
    ("1", {"train.txt": 40}), ("0.75 0.25", {"train.txt": 30, "dev.txt": 10}),
    ("0.75 0 0.25", {"train.txt": 30, "test.txt": 10}), ("0.5 0.25 0.25000001", {"train.txt": 20, "dev.txt": 10,
                                                                                 "test.txt": 10}),
])
def test_number_of_splits(tmp_path, splits, sizes):
    result = succeed(tmp_path, "--splits", *splits.split(), rows=classes(a=20, b=20))
    assert names(tmp_path) == {*sizes, "label.txt"} and result.stderr == ""
    *saved, finished = result.stdout.splitlines()
    assert set(saved) == {f"Save {size} examples to {os.path.join('out', name)}." for name, size in sizes.items()} | {
        f"Save 2 labels to {os.path.join('out', 'label.txt')}."}
    assert re.fullmatch(r"Finished! It takes \d+\.\d\d seconds", finished)


def test_same_seed_same_files_other_seed_other_files(tmp_path):
    rows, contents = classes(a=60, b=30, c=10), []
    for index, (seed, hash_seed) in enumerate([(3, "0"), (3, "1"), (-3, None), (4, None)]):
        succeed(tmp_path, "--seed", seed, "--save_dir", f"out{index}", hash_seed=hash_seed, rows=rows)
        contents.append([lines_of(tmp_path, name, f"out{index}") for name in sorted(ALL)])
    assert contents[0] == contents[1]
    for other in contents[2:]:
        assert [set(lines) for lines in other] != [set(lines) for lines in contents[0]]  # other splits, not only order
    labels = [line.split("\t")[1] for line in contents[0][sorted(ALL).index("train.txt")]]
    assert labels != sorted(labels) and len(set(labels[:20])) > 1  # shuffled


def test_exact_split(tmp_path):
    succeed(tmp_path, rows=classes(a=5, b=5))  # pins the split: a change would mix up old test and new train rows
    assert [lines_of(tmp_path, name) for name in ("dev.txt", "test.txt")] == [
        ["文本 a 2\ta", "文本 b 2\tb"], ["文本 a 3\ta", "文本 b 0\tb"]]
    assert lines_of(tmp_path, "label.txt") == ["a", "b"]


# ---------------------------------------------------------------- what is written


def test_existing_files_are_not_replaced(tmp_path):
    succeed(tmp_path, rows=classes(a=10, b=10))
    before = lines_of(tmp_path, "train.txt")
    errors = fail(tmp_path, "--seed", 4, out=ALL)
    for name in ALL:
        assert f"{os.path.join('out', name)}: the file exists, expected --overwrite, or another --save_dir" in errors
    assert lines_of(tmp_path, "train.txt") == before
    succeed(tmp_path, "--seed", 4, "--overwrite")
    assert lines_of(tmp_path, "train.txt") != before and names(tmp_path) == ALL
    stale = succeed(tmp_path, "--splits", 0.9, 0.1, "--overwrite").stderr
    assert f"warning: {os.path.join('out', 'test.txt')}: left from before, not of this split" in stale


def test_inputs_and_folders_are_never_replaced(tmp_path):
    (tmp_path / "out" / "dev.txt").mkdir(parents=True)
    (tmp_path / "out" / "train.txt").write_text("".join(json.dumps(row) + "\n" for row in classes(a=9, b=9)))
    errors = fail(tmp_path, "--doccano_file", "out/train.txt", "--overwrite", out=["train.txt", "dev.txt"])
    assert errors.count("is a folder or an input of this run, expected another --save_dir") == 2


def test_save_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    errors = fail(tmp_path, "--save_dir", "file/out", rows=classes(a=9, b=9))
    assert "--save_dir file/out: cannot be written in" in errors and "expected a folder with write permission" in errors


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_FSIZE and /bin/sh")
@pytest.mark.parametrize("length, limit", [(200, 30000), (10, 4000)])  # fails while writing, and only when flushing
def test_nothing_half_written_when_the_disk_is_full(tmp_path, length, limit):
    rows = [{"text": f"{index} {label} {'长' * length}", "label": [label]} for index in range(100) for label in "ab"]
    # A limit on the file size stands for a full disk: two of the splits fit, the third does not.
    code = ("import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    for order in ("0.8 0.1 0.1", "0.1 0.8 0.1", "0.1 0.1 0.8"):
        errors = fail(tmp_path, "--splits", *order.split(), python=("-B", "-c", code), rows=rows)
        assert "out: cannot be written (File too large), expected a writable folder" in errors


def test_needs_no_paddle(tmp_path):
    code = ("import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
            "print(sorted({name.split('.')[0] for name in sys.modules} & {'paddle', 'paddlenlp', 'sklearn'}))")
    result = succeed(tmp_path, "--splits", 1, rows=GOOD, python=("-B", "-c", code))
    assert result.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------- real exports, and the same shapes inline


def check_samples(folder):
    """The samples of doccano, copied to `folder`: shapes of its export and import formats."""
    warned = f"2 labels ['positive', 'negative'], {ONE}"
    for index, name in enumerate(("data_export__pipeline__examples__text_classification__example.jsonl",
                                  "data_import__pipeline__examples__text_classification__example.jsonl")):
        succeed(folder, "--doccano_file", name, "--splits", 1, "--save_dir", f"out{index}")
        assert lines_of(folder, "label.txt", f"out{index}") == ["negative", "positive"]
        assert sorted(pairs(folder, "train.txt", f"out{index}")) == [
            ("Great price.", "positive"), ("Really great transaction.", "positive"),
            ("Terrible customer service.", "negative")]
    name = "data_import__tests__data__text_classification__example.json"
    errors = fail(folder, "--doccano_file", name)
    assert f"{name}: row 2: {warned}" in errors and f"{name}: row 3: no label" in errors
    assert f"{name}: row 4: no text, expected the key" in errors and "1 problem found." in errors
    name += "l"
    result = succeed(folder, "--doccano_file", name)
    assert f"{name}:2: {warned}" in result.stderr and f"{name}:3: no label" in result.stderr
    assert pairs(folder, "train.txt") == [("exampleA", "positive")] and lines_of(folder, "data.txt") == ["exampleC"]
    assert lines_of(folder, "dev.txt") == [] and "dev.txt: no rows for it, expected more rows" in result.stderr


def test_shapes_of_the_samples(tmp_path):
    rows = [("Terrible customer service.", ["negative"]), ("Really great transaction.", ["positive"]),
            ("Great price.", ["positive"])]
    for kind, text, label in (("export", "text", "label"), ("import", "column_data", "column_label")):
        (tmp_path / f"data_{kind}__pipeline__examples__text_classification__example.jsonl").write_text(
            "".join(json.dumps({text: row[0], label: row[1]}) + "\n" for row in rows), encoding="utf-8")
    rows = [("exampleA", ["positive"]), ("exampleB", ["positive", "negative"]), ("exampleC", [])]
    path = tmp_path / "data_import__tests__data__text_classification__example.json"
    array = [{"text": row[0], "label": row[1]} for row in rows] + [{"label": ["neutral"]}]
    path.write_text(json.dumps(array, indent=2), encoding="utf-8")
    path.with_suffix(".jsonl").write_text(
        "".join(json.dumps({"text": row[0], "labels": row[1], "meta": {"wikiPageID": 1}}) + "\n" for row in rows))
    check_samples(tmp_path)


@pytest.mark.skipif("DOCCANO_DIR" not in os.environ, reason="DOCCANO_DIR (folder with doccano's samples) is not set")
def test_samples_of_doccano(tmp_path):
    for name in os.listdir(os.environ["DOCCANO_DIR"]):
        shutil.copyfile(os.path.join(os.environ["DOCCANO_DIR"], name), tmp_path / name)
    check_samples(tmp_path)
