"""The data contract and batching of utils.py; process set-up, outputs and progress of textcls."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import ROOT, assert_user_error, read_lines, run_here
from textcls.common import log
from textcls.common.errors import Problems, UserError
from textcls.common.outputs import check_outputs, complete_file, complete_folder
from textcls.common.texts import LABEL, LINE
from textcls.data.encodings import guess_encoding
from textcls.data.files import check_splits, read_labelled, read_labels, read_texts
from textcls.data.tokens import TokenizedTexts, pad_batch, sorted_batches

LABELS = ["病因", "其他"]


def labelled(path, content, labels=LABELS):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    problems = Problems()
    texts, ids = read_labelled(path, labels, problems, "label.txt")
    return texts, ids.tolist(), problems


def test_reads_bom_crlf_and_a_last_line_without_end(tmp_path):
    texts, ids, problems = labelled(tmp_path / "t.txt", "\ufeffa\t病因\r\n b c \t其他\r\n頭\u2028痛\t病因")
    assert (texts, ids, problems.count) == (["a", " b c ", "頭\u2028痛"], [0, 1, 0], 0)


@pytest.mark.parametrize("content, line, wrong, expected", [
    ("好 病因\n", 1, "no tab in '好 病因'", "<text><tab><label>"),
    ("好\t病因\na\tb\t病因\n", 2, "2 tabs", "exactly one tab"),
    ("\t病因\n", 1, "text: empty or blank", "<text><tab><label>"),
    ("好\t病因\n\n", 2, "empty line", "<text><tab><label>"),
    ("好\t\n", 1, "empty label", "one of its 2 labels"),
    ("好\t其它\n", 1, "label '其它' is not in label.txt (did you mean '其他'?)", "one of its 2 labels"),
    ("好\t其他 \n", 1, "label '其他 ' is not in label.txt (did you mean '其他'?)", "one of its 2 labels"),
    (b"ok\t\xe7\x97\x85\xe5\x9b\xa0\n\xff\t1\n", 2, "invalid UTF-8 at byte 1", "UTF-8 text"),
    ("好\t病因\n".encode("gb18030"), 1, "invalid UTF-8", "iconv -f GB18030 -t UTF-8"),
    ("頭疼怎麼辦\t病因\n".encode("big5"), 1, "invalid UTF-8", "iconv -f Big5 -t UTF-8"),
    ("頭が痛い\t病因\n".encode("shift_jis"), 1, "invalid UTF-8", "iconv -f Shift_JIS -t UTF-8"),
    ("頭が痛い\t病因\n".encode("euc-jp"), 1, "invalid UTF-8", "iconv -f EUC-JP -t UTF-8"),
    ("머리가 아프고 열이 나는데 어느 병원에 가야 하나요\t병\n".encode("euc-kr"), 1, "invalid UTF-8", "iconv -f CP949 -t UTF-8"),
    ("déjà à Münster\t病因\n".encode("latin-1", "ignore"), 1, "invalid UTF-8", "UTF-8 text (save it again as UTF-8)"),
    ("好\t病因\n".encode("utf-16"), 1, "the file is UTF-16", "UTF-8"),
    ("好\t病因\n".encode("utf-32"), 1, "the file is UTF-32", "UTF-8"),
    (b"\0\0\xfe\xff" + "好".encode("utf-32-be"), 1, "the file is UTF-32", "UTF-8"),
    ("a\0b\t病因\n", 1, "a NUL character", "text without control bytes"),
    ("", None, "file is empty", "at least one line"),
    (b"\xef\xbb\xbf", None, "file is empty", "at least one line"),
])
def test_reports_each_kind_of_wrong_row(tmp_path, content, line, wrong, expected):
    _, _, problems = labelled(tmp_path / "train.txt", content)
    assert problems.count == 1
    place = f"{tmp_path / 'train.txt'}:{line}: " if line else f"{tmp_path / 'train.txt'}: "
    assert problems.lines[0].startswith(place + wrong)
    assert expected in problems.lines[0].split(", expected ")[1]


def test_encodings_are_told_by_single_lines_and_by_the_whole_file(tmp_path):
    texts = [line.split("\t")[0] for line in read_lines(ROOT / "data/train.txt")]
    assert len(texts) > 900 and {guess_encoding(text.encode("gb18030")) for text in texts if not text.isascii()} == {"GB18030"}
    assert {guess_encoding(text.encode()[:-1]) for text in texts if not text.isascii()} == {None}  # UTF-8, damaged
    words = "\n".join(["腹痛", "感冒", "樣本", "診斷結果說明"])  # each by itself might be GB18030
    (tmp_path / "label.txt").write_bytes(words.encode("big5"))
    with pytest.raises(UserError) as error:
        read_labels(tmp_path / "label.txt")
    assert str(error.value).count("iconv -f Big5 -t UTF-8") == 4


def test_a_missing_file_and_a_folder_are_reported(tmp_path):
    problems = Problems()
    assert read_labelled(tmp_path / "no.txt", LABELS, problems)[0] == []
    list(read_texts(tmp_path, problems))
    assert "file not found" in problems.lines[0] and "cannot be read" in problems.lines[1]


def test_the_first_twenty_problems_are_shown_and_all_are_counted(tmp_path):
    _, _, problems = labelled(tmp_path / "t.txt", "x\n" * 50)
    with pytest.raises(UserError) as error:
        problems.report()
    lines = str(error.value).split("\n")
    assert len(lines) == 21 and lines[-1] == "50 problems found, the first 20 are shown."


@pytest.mark.parametrize("content, wrong", [
    ("a\nb\na\n", "label 'a' again (first in line 1)"), ("a\n\nb\n", "label '': empty or blank"), ("a\n b\n", "blanks around it"),
    ("a\n\u200b\n", ": an invisible character"), ("a\nb\x07\n", ": an invisible character"),
    ("a\tb\nc\n", "label 'a\\tb': a tab"),
    ("a==w\tb\nc\n", "a word of label 'a': a tab"), ("a==\nc\n", "a word of label 'a': empty"),
    ("a\n", "only one label"), ("", "file is empty"),
])
def test_label_file_problems(tmp_path, content, wrong):
    (tmp_path / "label.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="label.txt") as error:
        read_labels(tmp_path / "label.txt")
    assert wrong in str(error.value)


ODD = st.text(st.one_of(st.sampled_from("ab甲=#\t\n\r\0 \u200b\u2028\ufeff\x1b\x85\ud83d"), st.characters()), max_size=6)


@settings(max_examples=300, deadline=None)
@example("\ufeff", "")
@example("\ufeff甲", "\ufeff乙")
@given(ODD, ODD)
def test_files_give_back_what_the_rules_allow(tmp_path_factory, text, label):
    """What the rules refuse is what a file could not hold: it would come back as something else, or as a problem."""
    path = tmp_path_factory.mktemp("rules") / "label.txt"
    path.write_bytes(f"{label}\n另一类\n".encode("utf-8", "surrogatepass"))
    problems = Problems()
    assert (read_labels(path, problems) == [label, "另一类"] and not problems.count) == (LABEL.problem(label) is None)
    path.write_bytes(f"甲\t乙\n{text}\t乙\n".encode("utf-8", "surrogatepass"))
    texts, _, problems = labelled(path, path.read_bytes(), ["乙"])
    if LINE.problem(text) is None:
        assert texts == ["甲", text] and not problems.count


def test_unlabelled_texts_with_a_tab_or_without_text_are_reported(tmp_path):
    (tmp_path / "data.txt").write_text("好\na\tb\n \n", encoding="utf-8")
    problems = Problems()
    assert list(read_texts(tmp_path / "data.txt", problems)) == ["好"]
    assert [line.split(": ", 1)[1] for line in problems.lines] == [
        "a tab, expected one text per line, without a label", "empty line, expected one text per line"]


def test_a_class_without_rows_and_a_text_in_both_splits_are_warnings(capsys):
    problems = Problems()
    train, dev = (["a", "b"], np.array([0, 0])), (["c", "b"], np.array([1, 0]))
    check_splits("train.txt", "dev.txt", train, dev, LABELS, problems)
    problems.report()
    warnings = capsys.readouterr().err
    assert "warning: train.txt: class '其他' has no training rows, expected at least one row per class" in warnings
    assert "warning: train.txt:2: text 'b' is also in dev.txt:2, expected different texts in train and dev" in warnings


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(
    st.binary(max_size=20), st.sampled_from([b"\t", b"\r", b"\xef\xbb\xbf", "好\t病因".encode(), "x\t其他\r".encode()])),
    max_size=8))
def test_any_bytes_are_read_or_reported(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("fuzz") / "f.txt"
    texts, ids, problems = labelled(path, b"\n".join(pieces))
    rows = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = rows[:-1] if rows[-1:] == [b""] else rows
    assert len(texts) == len(ids)
    if not path.read_bytes().startswith((b"\xff\xfe", b"\xfe\xff")):
        assert len(texts) + problems.count == max(len(rows), 1)
    for text, index in zip(texts, ids):
        row = f"{text}\t{LABELS[index]}".encode()
        assert row in rows or row + b"\r" in rows


def test_output_appears_only_when_complete(tmp_path):
    path = tmp_path / "new" / "out.txt"
    with pytest.raises(RuntimeError), complete_file(path) as output:
        output.write("half")
        raise RuntimeError
    assert os.listdir(path.parent) == []
    with complete_file(path) as output:
        output.write("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    with pytest.raises(RuntimeError), complete_file(path) as output:
        raise RuntimeError
    assert path.read_text() == "whole" and os.listdir(path.parent) == ["out.txt"]


def test_a_link_and_a_device_stay_what_they_are(tmp_path):
    (tmp_path / "target").write_text("old")
    os.symlink("target", tmp_path / "link")
    with complete_file(tmp_path / "link") as output:
        output.write("new")
    assert (tmp_path / "target").read_text() == "new" and (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with complete_file(tmp_path / "pipe") as output:
        output.write("text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)


def test_a_folder_with_its_marker_is_complete(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(RuntimeError), complete_folder(folder, "done") as staging:
        open(os.path.join(staging, "done"), "w").close()
        raise RuntimeError
    assert not folder.exists()
    for text in ("1", "2"):
        with complete_folder(folder, "done") as staging:
            for name in ("a", "done", "z"):
                with open(os.path.join(staging, name), "w") as file:
                    file.write(text)
        assert sorted(os.listdir(folder)) == ["a", "done", "z"] and (folder / "z").read_text() == text


def run_python(code, **environ):
    environ = {**{name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")},
               **environ}
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]  # a parent with the same environment, as ranks have in their launcher
    return subprocess.run([*shell, sys.executable, "-c", code], cwd=ROOT, env=environ, encoding="utf-8", capture_output=True)


def test_process_set_up_uses_all_cores_and_shares_them_and_zlib_works():
    code = """if True:
        import os, zlib
        from textcls.models.paddle_setup import paddle
        assert zlib.decompress(zlib.compress(b"x")) == b"x"
        print(os.environ["OMP_NUM_THREADS"], os.environ.get("MKL_DEBUG_CPU_TYPE"))"""
    cores = str(len(os.sched_getaffinity(0)))
    assert run_python(code).stdout.split()[0] == cores
    assert run_python(code, PADDLE_LOCAL_SIZE=cores, MKL_DEBUG_CPU_TYPE="4").stdout.split() == ["1", "4"]


def test_process_set_up_respects_the_user(monkeypatch):
    from textcls.models.paddle_setup import _prepare_process

    monkeypatch.delitem(sys.modules, "paddle")  # as before its import
    for name, value in (("OMP_NUM_THREADS", "7"), ("MKL_DEBUG_CPU_TYPE", "4")):
        monkeypatch.setenv(name, value)
    _prepare_process()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_DEBUG_CPU_TYPE"]) == ("7", "4")
    monkeypatch.delenv("OMP_NUM_THREADS")
    _prepare_process()
    assert os.environ["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))


def test_progress_in_a_log_is_a_line_every_tenth_or_every_thirty_seconds(monkeypatch):
    clock, lines = [0.0], []
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(log.get_logger(), "info", lines.append)

    def work(total, count, seconds):
        """`count` updates of ten texts, each after so many seconds; returns the lines that they leave."""
        lines.clear()
        with log.progress_bar(total, "Predicting") as progress:
            for _ in range(count):
                clock[0] += seconds
                progress.update(10)
        return lines.copy()

    assert work(1000, 100, 0.01) == []  # a second in all
    assert work(1000, 100, 1) == [f"Predicting: {done} of 1000 texts" + (f", {100 - done // 10} s left" if done < 1000 else "")
                                  for done in range(100, 1001, 100)]
    assert work(1000, 100, 20)[:3] == [f"Predicting: {done} of 1000 texts, {33 - done // 30} min left" for done in (20, 40, 60)]
    assert work(None, 9, 10) == [f"Predicting: {done} texts" for done in (30, 60, 90)]


def test_padding_and_batches_by_length():
    assert pad_batch([[1, 2], [3]], 9).tolist() == [[1, 2], [3, 9]]
    batches = sorted_batches([3, 9, 3, 5, 1], 2)
    assert [batch.tolist() for batch in batches] == [[1, 3], [0, 2], [4]]
    tokens = TokenizedTexts(np.arange(3, dtype=np.int32), np.array([0, 2, 3]), np.array([5, 6]))
    assert tokens[0]["input_ids"].tolist() == [0, 1] and tokens[1]["labels"] == 6 and len(tokens) == 2


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    def write_folder():
        with complete_folder(tmp_path / "folder", marker="done"):
            np.ones(100000).tofile("/dev/full")  # NumPy's error names no file

    def write_file():
        with complete_file(tmp_path / "file") as output:
            output.write("text")
            os.write(os.open("/dev/full", os.O_WRONLY), b"text")

    assert_user_error(run_here(write_folder), f"{tmp_path}/folder: 100000 requested and ", "expected a file that can be read")
    assert_user_error(run_here(write_file), f"{tmp_path}/file: No space left on device, expected")
    assert os.listdir(tmp_path) == []


def test_outputs_are_no_data_files_and_not_each_other(tmp_path):
    check_outputs([tmp_path / "a", tmp_path / "new/b"], [tmp_path / "train.txt"], tmp_path)
    for outputs, wrong in ((["a", "dev.txt"], "is a data file"), (["other.txt"], "is an input of this run"),
                           (["a", "./a"], "named for two outputs"), (["in"], "is a folder"), (["file/b"], "cannot be")):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=wrong):
            check_outputs([f"{tmp_path}/{name}" for name in outputs], [f"{tmp_path}/other.txt"], tmp_path)
