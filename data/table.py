"""Turn a table of texts and labels into the data files of train.py.

    python data/table.py --table_file my.xlsx --save_dir ./my_data
    python data/table.py --table_file my.csv --text_column 问题 --label_column 类别 --save_dir ./my_data --splits 0.9 0.1

Reads   table_file, by the ending of its name:
        .csv .tsv .txt  a header, then one row per text; comma, semicolon or tab; UTF-8, GB18030, or UTF-16 with a BOM
        .xlsx .xlsm     a sheet with a header; numbers and dates become their text (1 for 1.0, 2024-05-01)
        .jsonl .json    objects, one per line or in an array; the label is a string or a list of one
        .json           Label Studio's exports JSON and JSON-MIN; cancelled annotations do not count
Writes  save_dir/: train.txt, dev.txt, test.txt, label.txt, data.txt, as data/doccano.py does.

Columns that are not named are found by well-known names, or where there are just two. Split, reports and refusals are
those of data/doccano.py; in addition, labels lose blanks around them, and their tabs and line breaks become one blank.
"""

import contextlib
import csv
import difflib
import io
import os
import re
import sys
import time
import warnings
from pathlib import Path

from textcls.common.errors import Problems, UserError, run_script
from textcls.common.options import make_parser
from textcls.data.files import read_lines
from textcls.data.splitting import BREAKS, add_split_options, check_shares, make_data_folder, read_json_rows

TEXT_NAMES = ("text", "texts", "content", "sentence", "question", "query", "文本", "内容", "文本内容", "正文", "句子", "问题")
LABEL_NAMES = ("label", "labels", "category", "class", "intent", "标签", "类别", "分类", "类目", "意图")
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
STUDIO_EXTRAS = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time")  # in each row of JSON-MIN
EXCEL_ERRORS = ("#NULL!", "#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!", "#N/A")
WORKBOOKS = (".xlsx", ".xlsm")
ENDINGS = (".csv", ".tsv", ".txt", *WORKBOOKS, ".jsonl", ".json")
OLE_START = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # of old and of encrypted Office files
SAVE_AS = "saved as .xlsx (in Excel or WPS: Save As, Excel Workbook)"


def parse_arguments():
    """Options from the command line. Raises UserError."""
    parser = make_parser(__doc__)
    parser.add_argument("--table_file", required=True, help=f"The table: {', '.join(ENDINGS)}.")
    parser.add_argument("--text_column", help="Name of the column (or JSON key) of the texts; None: found by its name.")
    parser.add_argument("--label_column", help="Name of the column (or JSON key) of the labels; None: found by its name.")
    parser.add_argument("--sheet", help="Name of the sheet of an Excel workbook; None: its first one.")
    add_split_options(parser, source="table")
    args = parser.parse_args()
    check_shares(args.splits)
    return args


# ---------------------------------------------------------------- what kind of file it is


def find_ending(path, sheet):
    """Ending of the file's name in lower case. Raises UserError where no reader here can read the file."""
    ending = Path(path).suffix.lower()
    if not os.path.isfile(path):
        raise UserError(f"{path}: file not found, expected a table ({', '.join(ENDINGS)})")
    with open(path, "rb") as file:
        start = file.read(8)
        locked = "EncryptedPackage".encode("utf-16-le") in file.read() if start == OLE_START else False
    if locked:
        raise UserError(f"{path}: a workbook with a password, expected one without, {SAVE_AS}")
    if start == OLE_START or ending in (".xls", ".xlsb"):
        raise UserError(f"{path}: an Excel workbook of another format, expected {SAVE_AS}")
    if ending not in ENDINGS:
        raise UserError(f"{path}: no table by its name, expected one that ends in {', '.join(ENDINGS)}")
    if start.startswith(b"PK\3\4") and ending not in WORKBOOKS:
        raise UserError(f"{path}: an Excel workbook by its content, expected its name to end in .xlsx")
    if sheet and ending not in WORKBOOKS:
        raise UserError(f"--sheet {sheet}: {path} has no sheets, expected a workbook (.xlsx)")
    return ending


def read_utf8(path):
    """Content of a text file as a binary stream in UTF-8; prints a line where it was converted.

    What is in no known encoding stays as it is: read_lines reports it by line.
    """
    content = Path(path).read_bytes()
    with_bom = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    for encoding in ("utf-16",) if with_bom else ("utf-8", "gb18030"):
        with contextlib.suppress(UnicodeDecodeError):
            text = content.decode(encoding)
            if encoding == "gb18030" and not is_common_chinese(text):
                break
            if encoding != "utf-8":
                print(f"{path}: {encoding.upper()}, converted to UTF-8")
            return io.BytesIO((text if "\n" in text else text.replace("\r", "\n")).encode())  # old Macs end lines with CR
    return io.BytesIO(content)


def is_common_chinese(text):
    """True where nearly all characters beyond ASCII are in GB 2312; text of other encodings read as GB18030 has few of these."""
    wide = re.sub("[\0-\x7f]+", "", text)
    return len(wide.encode("gb2312", "ignore")) / 2 >= 0.8 * len(wide)


# ---------------------------------------------------------------- one reader per kind: each yields or returns (place, cells)


def read_delimited(path, ending, problems):
    """Rows of a text file with a delimiter, the header first."""
    # CR amidst a line is in a text, but csv would end the row there: another line break stands for it
    lines = [line.replace("\r", "\v") + "\n" for _, line in read_lines(path, problems, read_utf8(path))]
    problems.report()  # quotes would not match without the unsound lines
    header = next(filter(str.strip, lines), "")
    usual = "," if ending == ".csv" else "\t"
    delimiter = next((mark for mark in (usual, *DELIMITERS) if mark in header), usual)
    if delimiter != usual:
        print(f"{path}: the header's delimiter is a {DELIMITERS[delimiter]}")
    csv.field_size_limit(sys.maxsize)
    reader, width = csv.reader(lines, delimiter=delimiter, strict=True), None
    while reader.line_num < len(lines):
        number = reader.line_num + 1  # where the row begins: cells may have line breaks
        try:
            cells = next(reader)
        except csv.Error as error:
            problems.add(path, number, f"the cells cannot be told apart ({error})", 'closed quotes, doubled inside of cells: ""')
            continue
        width = width or len(cells)
        if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
            problems.add(path, number, "a quote at the beginning of a cell is closed in a row below", 'quotes in quotes: """')
            continue
        if any(map(str.strip, cells[width:])):
            wrong = f"{len(cells)} cells where the header has {width}"
            problems.add(path, number, wrong, f"quotes around cells that contain a {DELIMITERS[delimiter]}")
        elif any(map(str.strip, cells)):
            yield (path, number), cells


def read_workbook(path, name):
    """Rows of a sheet of an .xlsx workbook, the header first; name: of the sheet, or None for the first visible one."""
    import openpyxl  # here, since only this function needs it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # styles and other things that do not matter here
            workbook = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheets = {sheet.title: sheet for sheet in workbook.worksheets}
        visible = [title for title, sheet in sheets.items() if sheet.sheet_state == "visible"]
        if name is not None:
            check_name(name, list(sheets), f"--sheet: {path} has no sheet")
        elif len(visible) > 1:
            print(f"{path}: the sheet read is {visible[0]!r}, the first of {len(visible)}")
        sheet = sheets[name or visible[0]]
        sheet.reset_dimensions()  # some programs write wrong ones
        for number, values in enumerate(sheet.iter_rows(values_only=True), 1):
            if any(str(value).strip() for value in values if value is not None):
                yield (path, number), values
    except UserError:
        raise
    except Exception as error:  # openpyxl checks little: a damaged file may end in any error
        raise UserError(f"{path}: no sound Excel workbook ({error}), expected one that Excel opens, {SAVE_AS}") from None


def shown(value):
    """A cell as text, nearly as Excel shows it: 1 for 1.0, 2024-05-01 for a date, TRUE, no text for an empty cell.

    Lists and objects from JSON stay as they are: check_row judges them; only JSON-MIN's several choices become a list.
    """
    if isinstance(value, str):
        return value.replace("_x000D_", "\r")  # how a workbook writes this character
    if isinstance(value, (list, dict)):
        return value["choices"] if isinstance(value, dict) and "choices" in value else value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return f"{value:.15g}"
    return "" if value is None else re.sub(" 00:00:00$", "", str(value))


def read_objects(path, problems):
    """Return (columns of texts, columns of labels, list of (place, object)) of a JSON file: objects or Label Studio's tasks."""
    rows = []
    for place, value in read_json_rows(path, problems, read_utf8(path)):
        if isinstance(value, dict):
            rows.append((place, value))
        else:
            problems.add(*place, f"a JSON {type(value).__name__}", "an object with a text and a label")
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    if {"data", "annotations"} <= set(columns):
        print(f"{path}: an export of Label Studio")
        return read_tasks(path, rows, problems)
    if "annotation_id" in columns:  # JSON-MIN
        columns = [name for name in columns if name not in STUDIO_EXTRAS]
    return columns, columns, rows


def read_tasks(path, tasks, problems):
    """As read_objects, from Label Studio's tasks: its data, and under each control's name what the annotators chose."""
    rows, columns, controls = [], {}, {}
    for place, task in tasks:
        try:
            chosen = {}
            for annotation in task["annotations"]:
                for result in [] if annotation.get("was_cancelled") else annotation["result"]:
                    if "choices" in result["value"]:
                        chosen.setdefault(result["from_name"], []).extend(result["value"]["choices"])
            columns.update(task["data"])
        except (KeyError, TypeError, ValueError, AttributeError):
            problems.add(*place, "no task as Label Studio exports it", "an object with data and annotations")
        else:
            controls.update(chosen)
            rows.append((place, task["data"], chosen))
    problems.report()
    if not controls:
        raise UserError(f"{path}: no annotation has choices, expected a project of text classification (Choices)")
    unlabelled = dict.fromkeys(controls, [])
    return list(columns), list(controls), [(place, {**data, **unlabelled, **chosen}) for place, data, chosen in rows]


# ---------------------------------------------------------------- from columns to rows of text and label


def read_table(path, sheet, problems):
    """Return (columns of texts, columns of labels, iterable of (place, dict column -> cell)): what may be chosen from."""
    ending = find_ending(path, sheet)
    if ending in (".json", ".jsonl"):
        return read_objects(path, problems)
    rows = read_workbook(path, sheet) if ending in WORKBOOKS else read_delimited(path, ending, problems)
    header = [BREAKS.sub(" ", shown(name)).strip() for name in next(rows, (None, []))[1]]
    columns = [name for name in header if name]
    return columns, columns, ((place, dict(zip(header, cells))) for place, cells in rows)


def check_name(name, names, wrong):
    """UserError if `name` is not among `names`."""
    if name not in names:
        close = difflib.get_close_matches(name, names, 1, 0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"{wrong} {name!r}{hint}, expected one of {', '.join(map(repr, names))}")


def only(names):
    """The name if there is just one, else None."""
    return names[0] if len(names) == 1 else None


def find_column(name, option, columns, known):
    """The column that the option names, else the only one with a known name, else None."""
    if name is not None:
        check_name(name, columns, f"{option}: there is no column")
    return name or only([column for column in columns if column.lower() in known])


def choose_columns(args, texts, labels):
    """Return (name of the text column, name of the label column, whether only their order told them apart)."""
    text = find_column(args.text_column, "--text_column", texts, TEXT_NAMES)
    label = find_column(args.label_column, "--label_column", labels, LABEL_NAMES)
    only_order = text is None and label is None and texts == labels and len(texts) == 2
    if only_order:
        text, label = texts
    text = text or only([name for name in texts if name != label])
    label = label or only([name for name in labels if name != text])
    missing = " and ".join(option for option, name in (("--text_column", text), ("--label_column", label)) if name is None)
    if missing:
        columns = ", ".join(map(repr, dict.fromkeys([*texts, *labels])))
        raise UserError(f"{args.table_file}: the header does not tell which column is which, expected {missing}; "
                        f"the columns are {columns}")
    if text == label or texts.count(text) > 1 or labels.count(label) > 1:
        raise UserError(f"{args.table_file}: more than one column {text!r} or {label!r}, or the same for both, expected "
                        "different names")
    print(f"{args.table_file}: texts in column {text!r}, labels in column {label!r}")
    return text, label, only_order


def read_rows(rows, text_column, label_column, only_order, problems):
    """Yield (place, text, label), see textcls/data/splitting.py, with tidy labels; prints how many were not."""
    tidied = 0
    for place, cells in rows:
        text, label = shown(cells.get(text_column)), shown(cells.get(label_column))
        if isinstance(label, str):
            tidy = BREAKS.sub(" ", label).strip()
            tidied += tidy != label
            label = tidy
        if label == label_column and (only_order or text == text_column):
            problems.add(*place, f"label {label!r} is the name of its column, too", "a header, as the first row only")
        elif text in EXCEL_ERRORS or label in EXCEL_ERRORS:
            problems.add(*place, f"an Excel error as text {text!r} or label {label!r}", "a value")
        else:
            yield place, text.strip() if isinstance(text, str) else text, label
    if tidied:
        print(f"labels with blanks around them, tabs or line breaks (tidied): {tidied}")


def main():
    started = time.perf_counter()
    args = parse_arguments()
    problems = Problems()
    texts, labels, rows = read_table(args.table_file, args.sheet, problems)
    if not texts:
        problems.report()
        raise UserError(f"{args.table_file}: no columns, expected a header and rows with a text and a label")
    rows = read_rows(rows, *choose_columns(args, texts, labels), problems)
    make_data_folder(args, args.table_file, rows, "one label", problems)
    print(f"Finished! It takes {time.perf_counter() - started:.2f} seconds")


if __name__ == "__main__":
    run_script(main)
