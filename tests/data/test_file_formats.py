"""Compressed files: read by all that read text files, written by all that write them, and refused where they are damaged."""

import gzip

import pytest

from data import doccano, table
from helpers import assert_user_error, read_lines, run_here
from textcls.common.errors import Problems, UserError
from textcls.common.outputs import complete_file
from textcls.data.files import read_labelled, read_labels, read_texts

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
])
def test_compressed_tables_give_what_plain_ones_give(tmp_path, name, content):
    content = content if isinstance(content, bytes) else content.encode("utf-8")
    (tmp_path / name).write_bytes(content)
    compress(tmp_path / f"{name}.gz", content)
    for file in (name, f"{name}.gz"):
        process = run_here(table.main, "--table_file", file, "--save_dir", f"{file}.out", "--splits", 1, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
    for output in ("train.txt", "label.txt"):
        assert read_lines(tmp_path / f"{name}.out" / output) == read_lines(tmp_path / f"{name}.gz.out" / output)
    assert sorted(read_lines(tmp_path / f"{name}.out/train.txt")) == sorted("\t".join(row) for row in ROWS)
    if name == "a.jsonl":
        process = run_here(doccano.main, "--doccano_file", f"{name}.gz", "--save_dir", "doccano", "--splits", 1, cwd=tmp_path)
        assert process.returncode == 0 and len(read_lines(tmp_path / "doccano/train.txt")) == len(ROWS), process.stderr
