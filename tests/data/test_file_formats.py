"""Compressed and Parquet files: read and written like text files, and refused where they are damaged."""

import decimal
import gzip
import math
import os
import re
import sys

import pyarrow
import pytest
from pyarrow import parquet

from data import doccano, table
from helpers import assert_user_error, read_lines, run_here, write_lines
from textcls.common.errors import Problems, UserError
from textcls.common.outputs import complete_file
from textcls.data.files import read_labelled, read_labels, read_texts
from textcls.data.parquet import BATCH, GROUP, new_parquet

ROWS = [("头疼怎么办", "治疗方案"), ("拔牙多少钱", "医疗费用"), ("腹胀是什么引起的", "病因分析"), ("牙套戴多久", "治疗方案")]
LABELS = list(dict.fromkeys(label for _, label in ROWS))


def compress(path, content):
    path.write_bytes(gzip.compress(content if isinstance(content, bytes) else content.encode("utf-8")))


def test_compressed_texts_rows_and_labels_are_read(tmp_path):
    compress(tmp_path / "data.txt.gz", "\ufeff" + "\r\n".join(text for text, _ in ROWS))
    compress(tmp_path / "dev.txt.gz", "".join(f"{text}\t{label}\n" for text, label in ROWS))
    compress(tmp_path / "label.txt.gz", "".join(f"{label}\n" for label in LABELS))
    problems = Problems()
    assert list(read_texts(tmp_path / "data.txt.gz", problems)) == [text for text, _ in ROWS]
    texts, ids = read_labelled(str(tmp_path / "dev.txt.gz"), read_labels(str(tmp_path / "label.txt.gz")), problems)
    assert list(zip(texts, [LABELS[index] for index in ids])) == ROWS and not problems.count
    compress(tmp_path / "gbk.txt.gz", "头疼怎么办\n".encode("gb18030"))
    assert list(read_texts(tmp_path / "gbk.txt.gz", problems)) == []
    assert "gbk.txt.gz:1: invalid UTF-8" in problems.lines[0] and "iconv -f GB18030" in problems.lines[0]


@pytest.mark.parametrize("damage, wrong", [
    (lambda content: content[:-9], "ends too early"), (lambda content: content[:5], "ends too early"),
    (lambda content: b"plain text\n", "damaged, or no gzip file (Not a gzipped file"),
    (lambda content: content[:-8] + b"\0" + content[-7:], "damaged, or no gzip file (CRC check failed"),
    (lambda content: content[:20] + b"\xff" * 20 + content[40:], "damaged, or no gzip file"),
])
def test_a_damaged_compressed_file_is_one_error(tmp_path, damage, wrong):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(damage(gzip.compress("".join(f"{text},{label}\n" for text, label in [("text", "label"), *ROWS]).encode())))
    with pytest.raises(UserError) as caught:
        list(read_texts(str(path), Problems()))
    assert str(caught.value).startswith(f"{path}: {wrong}") and str(caught.value).endswith("expected a whole .gz file")
    process = run_here(table.main, "--table_file", path, "--save_dir", tmp_path / "out")
    assert_user_error(process, f"{path}: {wrong}")
    assert len(process.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_compressed_output_is_whole_and_the_same_each_time(tmp_path):
    for name in ("first.txt.gz", "second.txt.gz"):
        with complete_file(tmp_path / name, newline="\n") as output:
            output.write("头疼\n" * 1000)
    assert gzip.decompress((tmp_path / "first.txt.gz").read_bytes()).decode() == "头疼\n" * 1000
    assert (tmp_path / "first.txt.gz").read_bytes() == (tmp_path / "second.txt.gz").read_bytes()
    with complete_file(tmp_path / "bytes.gz", "wb") as output:
        output.write(b"\0\1")
    assert gzip.decompress((tmp_path / "bytes.gz").read_bytes()) == b"\0\1"
    with pytest.raises(ValueError), complete_file(tmp_path / "never.txt.gz") as output:
        raise ValueError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes.gz", "first.txt.gz", "second.txt.gz"]


@pytest.mark.parametrize("name, content", [
    ("a.csv", "问题,类别\n" + "".join(f"{text},{label}\n" for text, label in ROWS)),
    ("a.tsv", ("问题\t类别\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS)).encode("gb18030")),
    ("a.jsonl", "".join(f'{{"text": "{text}", "label": "{label}"}}\n' for text, label in ROWS)),
    ("A.CSV", "文本,标签\n" + "".join(f"{text},{label}\n" for text, label in ROWS)),
])
def test_compressed_tables_give_what_plain_ones_give(tmp_path, name, content):
    content = content if isinstance(content, bytes) else content.encode("utf-8")
    (tmp_path / name).write_bytes(content)
    compressed = f"{name}.GZ" if name.isupper() else f"{name}.gz"
    compress(tmp_path / compressed, content)
    for file in (name, compressed):
        process = run_here(table.main, "--table_file", file, "--save_dir", f"{file}.out", "--splits", 1, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
    for output in ("train.txt", "label.txt"):
        assert read_lines(tmp_path / f"{name}.out" / output) == read_lines(tmp_path / f"{compressed}.out" / output)
    assert sorted(read_lines(tmp_path / f"{name}.out/train.txt")) == sorted("\t".join(row) for row in ROWS)
    if name == "a.jsonl":
        process = run_here(doccano.main, "--doccano_file", compressed, "--save_dir", "doccano", "--splits", 1, cwd=tmp_path)
        assert process.returncode == 0 and len(read_lines(tmp_path / "doccano/train.txt")) == len(ROWS), process.stderr


# ---------------------------------------------------------------- Parquet


def write_parquet(path, columns, **options):
    """columns: {name: list of values, or array of pyarrow}."""
    parquet.write_table(pyarrow.table(columns), path, **options)


def read(path, text_column=None):
    """(texts of a Parquet file, problems)"""
    problems = Problems()
    return list(read_texts(path, problems, text_column=text_column)), problems.lines


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())])
def test_texts_of_every_type_of_strings_are_read_over_groups_and_batches(tmp_path, kind):
    texts = [f"文本 {number % 100}" for number in range(BATCH + 10)]
    write_parquet(tmp_path / "a.parquet", {"id": range(len(texts)), "question": pyarrow.array(texts, kind)}, row_group_size=3000)
    assert read(tmp_path / "a.parquet") == (texts, [])
    write_parquet(tmp_path / "b.PARQUET", {"name": ["x"], "text": ["好"]})
    assert read(tmp_path / "b.PARQUET") == (["好"], []) and read(tmp_path / "b.PARQUET", "name") == (["x"], [])


def test_unsound_rows_of_a_parquet_file_are_all_reported(tmp_path):
    invalid = pyarrow.array([b"ok", b"\xff\xfe", b"ok"]).view(pyarrow.string())
    text = pyarrow.concat_arrays([invalid, pyarrow.array([None, " \n", "a\0b", "a\tb\nc"])])
    write_parquet(tmp_path / "a.parquet", {"text": text})
    texts, lines = read(tmp_path / "a.parquet")
    assert texts == ["ok", "ok", "a\tb\nc"]
    assert [line.removeprefix(f"{tmp_path}/a.parquet:").split(", expected")[0] for line in lines] == [
        "2: invalid UTF-8 in column 'text'", "4: null in column 'text'", "5: empty or blank", "6: a NUL character"]
    write_parquet(tmp_path / "empty.parquet", {"text": pyarrow.array([], pyarrow.string())})
    assert read(tmp_path / "empty.parquet")[1] == [f"{tmp_path}/empty.parquet: no rows, expected at least one"]


@pytest.mark.parametrize("columns, text_column, message", [
    ({"text": ["a"]}, "txet", "--text_column: {} has no column 'txet' (did you mean 'text'?), expected one of 'text'"),
    ({"text": [1], "b": ["a"]}, "text", "--text_column: column 'text' of {} is int64, expected a column of strings"),
    ({"text": [b"a"], "label": ["a"]}, None, "--text_column: column 'text' of {} is binary, expected a column of strings"),
    ({"a": ["a"], "b": ["a"]}, None, "{}: 2 columns of strings, none of them called 'text', expected --text_column; the columns"),
    ({"a": [1]}, None, "{}: 0 columns of strings, none of them called 'text'"),
    (None, None, "{}: damaged, or no Parquet file"),
])
def test_columns_and_files_that_cannot_be_taken_are_refused(tmp_path, columns, text_column, message):
    path = tmp_path / "a.parquet"
    if columns:
        write_parquet(path, columns)
    else:
        write_parquet(path, {"text": ["好"]})
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError) as caught:
        read(path, text_column)
    assert str(caught.value).startswith(message.format(path)) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="none.parquet: file not found"):
        read(tmp_path / "none.parquet")


def test_a_damaged_page_is_refused_and_a_missing_package_named(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write_parquet(path, {"text": [f"文本 {number}" for number in range(5000)]}, write_page_checksum=True, use_dictionary=False)
    content = path.read_bytes()
    path.write_bytes(content[:2000] + b"\xff" * 50 + content[2050:])
    with pytest.raises(UserError, match="a.parquet: damaged, or no Parquet file"):
        read(path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    message = "a.parquet: the package pyarrow (17 or later) is missing, expected `pip install -c constraints.txt pyarrow`"
    with pytest.raises(UserError, match=re.escape(message)):
        read(path)


def test_labelled_rows_of_a_parquet_file(tmp_path):
    texts, labels = zip(*ROWS)
    path, problems = tmp_path / "dev.parquet", Problems()
    write_parquet(path, {"id": [1, 2, 3, 4], "text": [texts[0] + "\n怎么", *texts[1:]], "label": labels, "note": labels})
    found, ids = read_labelled(path, LABELS, problems)
    assert found == [texts[0] + " 怎么", *texts[1:]] and [LABELS[index] for index in ids] == list(labels) and not problems.count
    write_parquet(path, {"q": texts, "label": ["没有", None, *labels[2:]]})
    read_labelled(path, LABELS, problems, "label.txt")
    assert [line.split(", expected")[0] for line in problems.lines] == [
        f"{path}:1: label '没有' is not in label.txt", f"{path}:2: null in column 'label'"]
    for columns, message in ((("q", "q"), "column 'q' for both"), ((None, "labels"), "did you mean 'label'")):
        with pytest.raises(UserError, match=message):
            read_labelled(path, LABELS, Problems(), columns=columns)


def test_a_parquet_table_gives_what_csv_gives(tmp_path):
    texts, labels = zip(*ROWS)
    write_lines(tmp_path / "a.csv", ["问题,类别", *map(",".join, ROWS)])
    kinds = {"问题": texts, "类别": pyarrow.array(labels).dictionary_encode(), "vector": [[0.5, 1.0]] * 4, "n": [1, 2, None, 4]}
    write_parquet(tmp_path / "a.parquet", kinds)
    write_parquet(tmp_path / "lists.parquet", {"text": texts, "label": [[label] for label in labels]})
    for file in ("a.csv", "a.parquet", "lists.parquet"):
        process = run_here(table.main, "--table_file", file, "--save_dir", f"{file}.out", "--splits", 1, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        for output in ("train.txt", "label.txt"):
            assert read_lines(tmp_path / f"{file}.out" / output) == read_lines(tmp_path / "a.csv.out" / output)
    numbers = {"1": pyarrow.array([decimal.Decimal("10.00"), None, decimal.Decimal("0.50"), None]),
               "2": [10.0, math.nan, 0.5, None],
               "3": pyarrow.array([["10"], [], ["0.5"], None], pyarrow.large_list(pyarrow.large_string()))}
    for name, label in numbers.items():
        write_parquet(tmp_path / f"{name}.parquet", {"text": texts, "label": label, "key": [b"a"] * 4})
        process = run_here(table.main, "--table_file", f"{name}.parquet", "--save_dir", name, "--splits", 1, cwd=tmp_path)
        assert process.returncode == 0 and "left out: 'key' (binary)" in process.stdout, process.stderr
        assert sorted(read_lines(tmp_path / name / "train.txt")) == sorted([f"{texts[0]}\t10", f"{texts[2]}\t0.5"])
    write_parquet(tmp_path / "bad.parquet", {"text": ["好", None, " "], "label": [1.0, 2.5, 3.0]})
    process = run_here(table.main, "--table_file", "bad.parquet", "--save_dir", "bad", cwd=tmp_path)
    assert_user_error(process, "bad.parquet:2: text: empty or blank", "bad.parquet:3: text: empty or blank", "2 problems found")


def test_rows_written_come_back_with_other_columns_beside_them(tmp_path):
    count = GROUP + 100
    others = {"id": list(range(count)), "text": ["好"] * count, "tags": [["a", None]] * count}
    write_parquet(tmp_path / "in.parquet", others, row_group_size=GROUP // 3)
    with new_parquet(tmp_path / "out.parquet", {"label": str, "p": float}, tmp_path / "in.parquet", ["id", "tags"]) as rows:
        rows.writerows([f"l{number}", number / 2] for number in range(count))
    found = parquet.read_table(tmp_path / "out.parquet")
    assert found.schema.names == ["label", "p", "id", "tags"] and found["id"].to_pylist() == others["id"]
    assert found["label"].to_pylist() == [f"l{number}" for number in range(count)]
    assert found["tags"][count - 1].as_py() == ["a", None]
    with pytest.raises(ZeroDivisionError), new_parquet(tmp_path / "never.parquet", {"label": str}) as rows:
        rows.writerows([["a"]])
        1 / 0  # noqa: B018
    assert sorted(os.listdir(tmp_path)) == ["in.parquet", "out.parquet"]
