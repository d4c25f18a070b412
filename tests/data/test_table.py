"""Tests of data/table.py through its command line, on files as Excel, WPS, scripts and Label Studio write them."""

import collections
import csv
import datetime
import io
import json
import re
import tracemalloc
import zipfile

import openpyxl
import pytest

from data import doccano
from data import table as script
from helpers import ROOT, assert_user_error, read_lines, run, run_here, write_lines
from textcls.common.texts import LABEL

ROWS = [("头疼怎么办", "治疗方案"), ("拔牙多少钱", "医疗费用"), ("腹胀是什么引起的", "病因分析"), ("牙套戴多久", "治疗方案")]
HEADER = ("问题", "类别")


@pytest.fixture
def table(tmp_path):
    """Function that writes `content` as the file `name`, runs the script on it, and returns the finished process."""
    def convert(name, content=None, *options):
        if isinstance(content, str):
            content = content.encode("utf-8")
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            write_workbook(tmp_path / name, content)
        command = ["--table_file", name, "--save_dir", "out", "--splits", 1, *options]
        return run_here(script.main, *command, cwd=tmp_path)

    def refuse(name, content, *parts, options=()):
        process = convert(name, content, *options)
        assert_user_error(process, *parts)
        assert not (tmp_path / "out").exists()
        return process

    convert.refuse = refuse
    convert.folder = tmp_path
    return convert


def saved(process, folder, name="train.txt"):
    """Sorted rows of a file that the run has written, each a tuple."""
    assert process.returncode == 0, process.stderr
    return sorted(tuple(line.split("\t")) for line in read_lines(folder / "out" / name))


def delimited(rows, delimiter=",", end="\r\n"):
    output = io.StringIO()
    csv.writer(output, delimiter=delimiter, lineterminator=end).writerows(rows)
    return output.getvalue()


def write_workbook(path, sheets):
    """sheets: dict name -> rows, or the rows of the only sheet."""
    workbook = openpyxl.Workbook()
    workbook.remove(workbook.active)
    for name, rows in (sheets if isinstance(sheets, dict) else {"Sheet1": sheets}).items():
        sheet = workbook.create_sheet(name)
        for row in rows:
            sheet.append(row)
    workbook.save(path)


# ---------------------------------------------------------------- files with delimiters


@pytest.mark.parametrize("name, delimiter, encoding, notes", [
    ("a.csv", ",", "utf-8", []), ("a.csv", ",", "utf-8-sig", []),
    ("a.csv", ",", "gb18030", ["a.csv: GB18030, converted to UTF-8"]),
    ("a.tsv", "\t", "utf-8", []), ("a.txt", "\t", "utf-16", ["a.txt: UTF-16, converted to UTF-8"]),
    ("a.csv", ";", "utf-8", ["a.csv: the header's delimiter is a semicolon"]),
    ("a.csv", "\t", "utf-16", ["a.csv: UTF-16, converted to UTF-8", "a.csv: the header's delimiter is a tab"]),
])
def test_delimiters_and_encodings(table, name, delimiter, encoding, notes):
    process = table(name, delimited([HEADER, *ROWS], delimiter).encode(encoding))
    assert saved(process, table.folder) == sorted(ROWS)
    assert read_lines(table.folder / "out/label.txt") == ["治疗方案", "医疗费用", "病因分析"]
    assert process.stdout.splitlines()[:-3] == [*notes, f"{name}: texts in column '问题', labels in column '类别'"]


def test_the_same_split_as_doccano(tmp_path):
    rows = [line.split("\t") for line in read_lines(ROOT / "data/dev.txt")]
    write_lines(tmp_path / "d.jsonl", [json.dumps({"text": text, "label": [label]}) for text, label in rows])
    (tmp_path / "t.csv").write_text(delimited([HEADER, *rows]), encoding="gb18030")
    run_here(doccano.main, "--doccano_file", "d.jsonl", "--save_dir", "d", cwd=tmp_path)
    run_here(script.main, "--table_file", "t.csv", "--save_dir", "t", cwd=tmp_path)
    for name in ("train.txt", "dev.txt", "test.txt", "label.txt"):
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "d" / name).read_bytes() != b""


def test_cells_with_delimiters_quotes_and_line_breaks(table):
    rows = [("a,b", "x"), ('say "yes"\r\nor\tno', "x"), ("stray\rbreak", " y\nz "), ("", ""), ("e\u2028f", "y z")]
    process = table("a.csv", delimited([HEADER, *rows]) + "plain \r break,x\r\n,\r\n")
    assert saved(process, table.folder) == [
        ("a,b", "x"), ("e f", "y z"), ("plain   break", "x"), ('say "yes" or no', "x"), ("stray break", "y z")]
    assert "texts with tabs or line breaks (replaced by one blank): 4\n" in process.stdout
    assert "labels with blanks around them, tabs or line breaks (tidied): 1\n" in process.stdout
    assert process.stderr == ""


def test_rows_that_a_quote_would_join_are_refused_and_large_cells_taken(table):
    rows = [("文本", "类别"), ('"甲说', "a"), ('乙说"', "b"), ("丙", "a")]
    joined = "".join("\t".join(row) + "\n" for row in rows)
    table.refuse("table.tsv", joined, "table.tsv:2: a quote at the beginning of a cell is closed in a row below")
    process = table("table.csv", f"文本,类别\n{'长' * 200000},a\n短,b\n")
    assert len(saved(process, table.folder)) == 2
    assert_user_error(table("table.csv", None, "--save_dir", ""), "--save_dir")


def test_lines_ended_by_cr_as_on_old_macs(table):
    assert saved(table("a.csv", delimited([HEADER, *ROWS], end="\r")), table.folder) == sorted(ROWS)


def test_reports_are_those_of_doccano(table):
    rows = [("甲", "a"), ("乙", "b"), ("未标", ""), ("甲", "a"), ("争", "a"), ("争\n", "b")]
    process = table("a.csv", delimited([HEADER, *rows]))
    assert process.stderr.splitlines() == [
        "warning: a.csv:4: no label, expected one label",
        "warning: a.csv:7: label 'b' for the text of line 6, which has 'a', expected one label per text"]
    for note in ("rows without a label (their texts go to data.txt): 1", "texts that occur with different labels (left out): 1",
                 "repetitions of a text with the same label (left out): 1"):
        assert note in process.stdout.splitlines()
    assert saved(process, table.folder, "data.txt") == [("未标",)]
    assert saved(process, table.folder) == [("乙", "b"), ("甲", "a")]


def test_unsound_rows_are_all_reported_and_nothing_is_written(table):
    content = ('text,label\na,x\n,x\n"b\n\nc",x,extra\n"d"e,x\nf,#N/A\ntext,label\ng,x\u200b\n'
               + "".join(f",{index}\n" for index in range(20)) + '"open,x\nh,x\n')
    lines = table.refuse("a.csv", content).stderr.splitlines()
    assert lines[:6] == [
        "a.csv:3: text: empty or blank, expected a text",
        "a.csv:4: 3 cells where the header has 2, expected quotes around cells that contain a comma",
        "a.csv:7: the cells cannot be told apart (',' expected after '\"'), expected closed quotes, "
        "doubled inside of cells: \"\"",
        "a.csv:8: an Excel error as text 'f' or label '#N/A', expected a value",
        "a.csv:9: label 'label' is the name of its column, too, expected a header, as the first row only",
        f"a.csv:10: label 'x\\u200b': an invisible character, expected {LABEL.expected}"]
    assert lines[-1] == "27 problems found, the first 20 are shown." and len(lines) == 21
    table.refuse("a.csv", 'text,label\na,x\n"open,x\nh,x\n', "a.csv:3: the cells cannot be told apart (unexpected end of data)")


@pytest.mark.parametrize("content, part", [
    ("问题,类别\n头疼,甲\n".encode() + b"\xff\xfe\n", "a.csv:3: invalid UTF-8 at byte 1"),
    ("Où est l'hôtel près d'ici,a\n".encode("cp1252"), "a.csv:1: invalid UTF-8 at byte 2"),
    (b"text,label\na\0b,x\n", "a.csv:2: a NUL character"), (b"", "a.csv: file is empty"), (b" \n\n", "a.csv: no columns"),
    ("頭痛怎麼辦請問腹脹是什麼引起的\n".encode("big5"), "UTF-8 text (convert it: iconv -f Big5"),
    (delimited([HEADER]).encode("utf-16")[:-1], "a.csv:1: the file is UTF-16"),
    (b"text,label\n", "a.csv: none of 0 rows is usable"), (b"PK\3\4", "a.csv: an Excel workbook by its content"),
])
def test_files_that_cannot_be_read(table, content, part):
    table.refuse("a.csv", content, part)


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("header, options, chosen", [
    ("id,content,category", (), (1, 2)), ("Label,x, Text ", (), (2, 0)), ("内容,日期,标签", (), (0, 2)), ("甲,乙", (), (0, 1)),
    ("标签,乙", (), (1, 0)), ("甲,文本", (), (1, 0)), ("text,b,label", ("--text_column", "b"), (1, 2)),
    ("a,b,c", ("--text_column", "c", "--label_column", "a"), (2, 0)), ("a,b", ("--label_column", "a"), (1, 0)),
    (",a,b", (), (1, 2)),
])
def test_columns_are_found(table, header, options, chosen):
    names, cells = [name.strip() for name in header.split(",")], ["0", "1", "2"][:header.count(",") + 1]
    process = table("a.csv", f"{header}\n{','.join(cells)}\n", *options)
    assert saved(process, table.folder) == [(cells[chosen[0]], cells[chosen[1]])]
    assert f"a.csv: texts in column {names[chosen[0]]!r}, labels in column {names[chosen[1]]!r}\n" in process.stdout


@pytest.mark.parametrize("header, options, part", [
    ("a,b,label", (), "expected --text_column; the columns are 'a', 'b', 'label'"),
    ("a,b,c", (), "expected --text_column and --label_column; the columns are 'a', 'b', 'c'"),
    ("text,content,label", (), "expected --text_column; the columns"),
    ("only", (), "a.csv:1: a single cell 'only', and no usual name"),
    ("text,label", ("--text_column", "txt"), "--text_column: there is no column 'txt' (did you mean 'text'?), expected one of "
                                             "'text', 'label'"),
    ("text,label", ("--label_column", "甲"), "--label_column: there is no column '甲', expected one of"),
    ("text,label,label", ("--label_column", "label"), "2 columns are called 'label', expected different"),
    ("text,label,Label", (), "expected --label_column"), ("text,label,label", (), "2 columns are called 'label'"),
    ("text,label,x", ("--label_column", "text"), "column 'text' for both texts and labels"),
    ("text,label", ("--sheet", "x"), "--sheet x: a.csv has no sheets"),
])
def test_columns_that_are_not_found(table, header, options, part):
    table.refuse("a.csv", f"{header}\n0,1,2\n", part, options=options)


def test_a_file_without_header_is_refused(table):
    table.refuse("a.csv", delimited(ROWS), "a.csv:4: label '治疗方案' is the name of its column, too, expected a header")


# ---------------------------------------------------------------- workbooks


def test_workbook(table):
    rows = [("说明",), (), ("编号", "问题", "类别", "日期"), (1, "甲", 1, None), (2, 3.0, 1.0), (3, 0.1 + 0.2, True), (),
            (4, datetime.datetime(2024, 5, 1), "x"), (5, datetime.datetime(2024, 5, 1, 10, 30), "x"), (None, None, "", ""),
            (6, "一_x000D_\n二", " x "), (7, "空", None), (8, "多", "x", 1, "note")]
    process = table("a.xlsx", rows[2:])
    assert saved(process, table.folder) == sorted([
        ("甲", "1"), ("3", "1"), ("0.3", "TRUE"), ("2024-05-01", "x"), ("2024-05-01 10:30:00", "x"), ("一 二", "x"), ("多", "x")])
    assert process.stderr == "warning: a.xlsx:10: no label, expected one label\n"
    assert "(tidied): 1\n" in process.stdout and "line breaks (replaced by one blank): 1\n" in process.stdout
    process = table("a.xlsx", rows, "--overwrite", "--label_column", "类别")
    assert "a.xlsx: the header is row 3; above it, and left out: '说明'\n" in process.stdout
    assert len(saved(process, table.folder)) == 7
    rows[2] = ("编号", "客服问", "类", "日期")
    process = table("a.xlsx", rows, "--overwrite")
    assert_user_error(process, "a.xlsx:1: a single cell '说明', and no usual name of a column in row 3, expected the")


def test_a_title_above_the_header_of_a_text_file(table):
    for name, title in (("a.csv", "说明"), ("b.csv", "说明,"), ("c.tsv", "说明")):
        content = title + "\n" + delimited([HEADER, *ROWS], "\t" if name == "c.tsv" else ",")
        process = table(name, content, "--overwrite")
        assert saved(process, table.folder) == sorted(ROWS) and f"{name}: the header is row 2; above it, and" in process.stdout


def test_merged_cells_give_their_value_to_all_rows(table):
    """Down a column only: a cell across both columns is a heading amid the rows, and no label."""
    workbook = openpyxl.Workbook()
    for row in [("客服问题",), HEADER, ("甲", "a"), ("乙",), ("丙",), (), ("第二部分",), ("丁", "b"), ("戊",)]:
        workbook.active.append(row)
    for area in ("A1:B1", "B3:B5", "A7:B7", "B8:B20"):
        workbook.active.merge_cells(area)
    workbook.save(table.folder / "a.xlsx")
    process = table("a.xlsx")
    assert saved(process, table.folder) == [("丁", "b"), ("丙", "a"), ("乙", "a"), ("戊", "b"), ("甲", "a")]
    assert "a.xlsx: cells that got the value of the merged cell they are part of: 3\n" in process.stdout
    assert process.stderr == "warning: a.xlsx:7: no label, expected one label\n"


def test_formulas(table):
    """Excel keeps a formula's value beside it; other programs may not. An empty text is a value, too."""
    workbook = openpyxl.Workbook()
    for row in [HEADER, ("甲", "=D2"), ("乙", "=D3"), ("丙", "x"), ("'=1", "x")]:
        workbook.active.append(row)
    workbook.active["A5"].data_type = "s"
    workbook.save(table.folder / "a.xlsx")
    table.refuse("a.xlsx", None, "a.xlsx:2: a formula without a value, expected the workbook opened and saved in Excel",
                 "a.xlsx:3: a formula", "2 problems found.")
    with zipfile.ZipFile(table.folder / "a.xlsx") as old, zipfile.ZipFile(table.folder / "b.xlsx", "w") as new:
        for name in old.namelist():
            content = re.sub(rb'<c r="B2"([^>]*)>(<f>D2</f>)<v ?/>', rb'<c r="B2" t="str"\1>\2<v>y</v>', old.read(name))
            new.writestr(name, re.sub(rb'<c r="B3"([^>]*)>(<f>D3</f>)<v ?/>', rb'<c r="B3" t="str"\1>\2<v></v>', content))
    process = table("b.xlsx")
    assert saved(process, table.folder) == [("'=1", "x"), ("丙", "x"), ("甲", "y")]
    assert saved(process, table.folder, "data.txt") == [("乙",)]


def test_sheets(table):
    sheets = {"首页": [HEADER, ("首", "a")], "数据": [HEADER, ("数", "b")]}
    process = table("a.xlsx", sheets)
    assert "a.xlsx: the sheet read is '首页', the first of 2\n" in process.stdout
    assert saved(process, table.folder) == [("首", "a")]
    assert saved(table("a.xlsx", None, "--overwrite", "--sheet", "数据"), table.folder) == [("数", "b")]
    process = table("a.xlsx", None, "--overwrite", "--sheet", "数据1")
    assert_user_error(process, "--sheet: a.xlsx has no sheet '数据1' (did you mean '数据'?), expected one of '首页', '数据'")


def test_hidden_sheets_and_wrong_dimensions(table):
    workbook = openpyxl.Workbook()
    workbook.active.append(("hidden", "x"))
    workbook.active.sheet_state = "hidden"
    for row in (HEADER, *ROWS):
        (workbook["seen"] if "seen" in workbook else workbook.create_sheet("seen")).append(row)
    workbook.active = 1
    workbook.save(table.folder / "a.xlsx")
    with zipfile.ZipFile(table.folder / "a.xlsx") as old, zipfile.ZipFile(table.folder / "b.xlsx", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'<dimension ref="A1:B5"', b'<dimension ref="A1"'))
        assert b'"A1:B5"' in old.read("xl/worksheets/sheet2.xml")
    assert saved(table("b.xlsx"), table.folder) == sorted(ROWS)


def test_unsound_rows_of_a_workbook(table):
    rows = [HEADER, ("a", "x"), (), (None, "x"), ("b", "#REF!")]
    table.refuse("a.xlsx", rows, "a.xlsx:4: text: empty or blank", "a.xlsx:5: an Excel error", "2 problems found.")


def test_workbooks_that_cannot_be_read(table):
    table("a.xlsx", [HEADER, *ROWS])
    sound = (table.folder / "a.xlsx").read_bytes()
    old = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)
    for name, content, part in [
            ("b.xls", old, "b.xls: an Excel workbook of another format, expected saved as .xlsx"),
            ("b.xlsx", old, "b.xlsx: an Excel workbook of another format, expected saved as .xlsx"),
            ("b.xlsx", old + "EncryptedPackage".encode("utf-16-le"), "b.xlsx: a workbook with a password, expected one without"),
            ("b.xlsb", b"PK\3\4", "b.xlsb: an Excel workbook of another format"),
            ("b.xlsx", sound[:len(sound) // 2], "b.xlsx: no sound Excel workbook ("), ("b.xlsx", b"", "b.xlsx: no sound Excel"),
            ("b.xlsx", sound.replace(sound[1000:1100], bytes(100)), "b.xlsx: no sound Excel workbook ("),
            ("b.doc", b"x", "b.doc: no table by its name, expected one that ends in .csv, "),
            ("no.csv", None, "no.csv: file not found, expected a table")]:
        assert_user_error(table(name, content, "--overwrite"), part)


# ---------------------------------------------------------------- JSON and Label Studio


def test_jsonl(table):
    rows = [{"question": "甲", "kind": "a", "id": 1}, {"question": 7, "kind": [" b"]}, {"question": "无", "kind": None},
            {"question": "缺"}, {"question": "多", "kind": ["a", "b"]}, {"question": "丙", "kind": 1.0}]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("gb18030")
    process = table("a.jsonl", content, "--label_column", "kind")
    assert saved(process, table.folder) == [("7", "b"), ("丙", "1"), ("甲", "a")]
    assert saved(process, table.folder, "data.txt") == [("无",), ("缺",)]
    assert "warning: a.jsonl:5: 2 labels ['a', 'b'], expected one label" in process.stderr
    process = table("a.json", json.dumps(rows), "--label_column", "kind", "--overwrite")
    assert saved(process, table.folder) == [("7", "b"), ("丙", "1"), ("甲", "a")]


def test_unsound_json(table):
    rows = ['{"text": "a", "label": "x"}', "3", '{"label": "x"}', '{"text": ["a"], "label": "x"}',
            '{"text": "b", "label": {"x": 1}}', "{"]
    errors = table.refuse("a.jsonl", "\n".join(rows), "a.jsonl:2: a JSON int", "a.jsonl:3: text: empty or blank",
                          "5 problems found.", "a.jsonl:4: the text is a JSON list",
                          "a.jsonl:5: the labels are not strings").stderr
    assert "a.jsonl:6: invalid JSON (" in errors
    table.refuse("a.json", "[]", "a.json: no columns, expected a header and rows")
    table.refuse("a.jsonl", "{", "a.jsonl:1: invalid JSON (")


def task(text, *annotations, cancelled=(), **data):
    """A task as Label Studio's JSON export has it; annotations: lists of choices."""
    results = [[{"from_name": "sentiment", "to_name": "text", "type": "choices", "value": {"choices": choices}}]
               for choices in annotations]
    results = [{"id": index, "was_cancelled": index in cancelled, "result": result} for index, result in enumerate(results)]
    return {"id": 1, "annotations": results, "predictions": [], "data": {"review": text, **data}, "meta": {}}


def test_label_studio(table):
    tasks = [task("一", ["a"]), task("二", ["b"], ["b"]), task("多", ["a", "b"]), task("异", ["a"], ["b"]), task("无"),
             task("取消", ["a"], cancelled=[0]), task("改", ["a"], ["b"], cancelled=[0])]
    process = table("a.json", json.dumps(tasks))
    assert "a.json: an export of Label Studio\na.json: texts in column 'review', labels in column 'sentiment'\n" in process.stdout
    assert saved(process, table.folder) == [("一", "a"), ("二", "b"), ("改", "b")]
    assert saved(process, table.folder, "data.txt") == [("取消",), ("无",)]
    for row in (3, 4):
        assert f"warning: a.json: row {row}: 2 labels ['a', 'b'], expected one label" in process.stderr


def test_label_studio_with_several_fields_and_controls(table):
    tasks = [task("一", ["a"], sentiment="old", title="t"), task("无", sentiment="old")]
    tasks[0]["annotations"][0]["result"] += [
        {"from_name": "topic", "value": {"choices": ["z"]}}, {"from_name": "ner", "value": {"labels": ["PER"], "start": 0}}]
    content = json.dumps(tasks)
    table.refuse("a.json", content, "expected --text_column and --label_column; "
                                    "the columns are 'review', 'sentiment', 'title', 'topic'")
    process = table("a.json", content, "--text_column", "review", "--label_column", "sentiment")
    assert saved(process, table.folder) == [("一", "a")] and saved(process, table.folder, "data.txt") == [("无",)]


def test_label_studio_json_min(table):
    extras = {"id": 1, "annotator": 1, "annotation_id": 2, "created_at": "2024", "updated_at": "2024", "lead_time": 3.5}
    rows = [{"review": "一", "sentiment": "a", **extras}, {"review": "二", "sentiment": {"choices": ["a", "b"]}, **extras},
            {"review": "三", **extras}]
    process = table("a.json", json.dumps(rows))
    assert saved(process, table.folder) == [("一", "a")] and saved(process, table.folder, "data.txt") == [("三",)]
    assert "warning: a.json: row 2: 2 labels ['a', 'b']" in process.stderr


def test_unsound_label_studio(table):
    tasks = [task("一", ["a"]), {"data": 3, "annotations": []}, {"data": {"review": "x"}, "annotations": [7]},
             {"data": {"review": "x"}}]
    table.refuse("a.json", json.dumps(tasks), *(f"row {row}: no task as Label Studio exports it" for row in (2, 3, 4)))
    table.refuse("a.json", json.dumps([task("一")]), "a.json: no annotation has choices, expected a project of text")


# ---------------------------------------------------------------- options, and the script as a process


def test_splits_label_file_and_overwrite(table):
    (table.folder / "old.txt").write_text("b\na\n", encoding="utf-8")
    content = delimited([HEADER, *((f"{label}{index}", label) for label in "ab" for index in range(10))])
    options = ("--splits", "0.8", "0.1", "0.1", "--label_file", "old.txt")
    assert table("a.csv", content, *options).returncode == 0
    assert read_lines(table.folder / "out/label.txt") == ["b", "a"]
    for name, size in (("train.txt", 8), ("dev.txt", 1), ("test.txt", 1)):
        labels = collections.Counter(line.split("\t")[1] for line in read_lines(table.folder / "out" / name))
        assert labels == {"a": size, "b": size}
    before = read_lines(table.folder / "out/train.txt")
    assert_user_error(table("a.csv", content, *options, "--seed", 4), "train.txt: the file exists, expected --overwrite")
    assert read_lines(table.folder / "out/train.txt") == before
    table("a.csv", content, *options, "--seed", 4, "--overwrite")
    assert read_lines(table.folder / "out/train.txt") != before
    assert_user_error(table("a.csv", content + "c,c\n", *options, "--overwrite"), "label 'c' is not in --label_file")
    assert_user_error(table("a.csv", content, "--splits", "0.5"), "--splits 0.5: the sum is 0.5")


def test_texts_are_not_held_in_memory(table):
    """Though repetitions are found and the rows are shuffled. As str these texts alone would take 20 MB."""
    rows = [(f"{number}{'长' * 2500}", "ab"[number % 2]) for number in range(4000)]
    (table.folder / "a.csv").write_text(delimited([HEADER, *rows, *rows[:7], (rows[0][0], "b")]), encoding="utf-8")
    tracemalloc.start()
    try:
        process = table("a.csv")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert saved(process, table.folder) == sorted(rows[1:]) and peak < 8e6
    assert process.stderr == ("warning: a.csv:4009: label 'b' for the text of line 2, which has 'a', expected one label per "
                              "text\n")
    assert "texts that occur with different labels (left out): 1\nrepetitions of a text with the same label (left out): 7\n" in \
        process.stdout
    assert {path.name for path in (table.folder / "out").iterdir()} == {"train.txt", "label.txt"}
    assert {path.name for path in table.folder.iterdir()} == {"a.csv", "out"}


def test_as_a_process(tmp_path):
    write_workbook(tmp_path / "a.xlsx", [HEADER, *ROWS])
    command = [ROOT / "data/table.py", "--table_file", "a.xlsx", "--save_dir", "out", "--splits", 1]
    assert saved(run(*command, cwd=tmp_path), tmp_path) == sorted(ROWS)
    assert_user_error(run(*command, cwd=tmp_path), "label.txt: the file exists, expected --overwrite")
