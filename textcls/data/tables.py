"""Tables of texts and labels, one reader per kind of file: text, workbooks, JSON, Label Studio, Parquet. Needs no Paddle."""

import codecs
import csv
import io
import itertools
import math
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from decimal import Decimal
from typing import BinaryIO, Callable, NamedTuple, Optional

import openpyxl

from textcls.common.errors import Problems, UserError, check_name
from textcls.common.outputs import GZIP, is_gzip, plain_ending
from textcls.common.texts import BREAKS
from textcls.data.encodings import bom_encoding, guess_encoding
from textcls.data.files import open_input, read_lines, sound_gzip
from textcls.data.parquet import NOT_UTF8, PARQUET, read_objects
from textcls.data.splitting import Place, read_json_rows

BLOCK = 1 << 20  # bytes that are read at a time
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
STUDIO_EXTRAS = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time")  # in each row of JSON-MIN
EXCEL_ERRORS = ("#NULL!", "#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!", "#N/A")
ESCAPE = re.compile("_x([0-9A-Fa-f]{4})_")  # how a workbook writes CR and what XML cannot hold
UNCOMPUTED = "\0formula"  # stands for the value of a formula that no program has computed
OLE_START = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # of old and of encrypted Office files
SAVE_AS = "saved as .xlsx (in Excel or WPS: Save As, Excel Workbook)"


class Table(NamedTuple):
    """A table whose columns of texts and of labels are to be chosen."""

    texts: list[str]  # the columns that may hold the texts
    labels: list[str]  # those that may hold the labels
    rows: Iterable[tuple[Place, dict[str, object]]]  # column -> cell, see `shown`


def read_table(path: str, sheet: Optional[str], known: Collection[Optional[str]], problems: Problems) -> Table:
    """Open a table; its rows are read as they are asked for. What is wrong with rows is added to `problems`.

    sheet: of a workbook, None for the first one that is visible. known: usual names of columns, in lower case, and those that are
    wanted. UserError where the file is no table that a reader here knows.
    """
    ending = find_ending(path, sheet)
    if ending in OBJECT_READERS:
        return OBJECT_READERS[ending](path, problems)
    rows = READERS[ending](path, sheet, problems)
    header = find_header(path, rows, known)
    columns = [name for name in header if name]
    return Table(columns, columns, ((place, dict(zip(header, cells))) for place, cells in rows))


def find_header(path: str, rows: Iterator[tuple[Place, Sequence]], known: Collection[Optional[str]]) -> list[str]:
    """Take the header from an iterator of rows. Returns the columns' names, "" for a column without one.

    It is the first row; where that has a single cell, a title, it is the next row with several, if one of them is a known name.
    """
    titles: list[tuple[Place, list[str]]] = []
    for place, cells in rows:
        header = [BREAKS.sub(" ", str(shown(name))).strip() for name in cells]
        names = [name for name in header if name]
        if len(names) > 1:
            break
        titles.append((place, names))
    else:
        return titles[0][1] if titles else []
    if titles and not any(name in known or name.lower() in known for name in names):
        raise UserError(f"{path}:{titles[0][0][1]}: a single cell {titles[0][1][0]!r}, and no usual name of a column in row "
                        f"{place[1]}, expected the header as the first row, or --text_column and --label_column")
    if titles:
        print(f"{path}: the header is row {place[1]}; above it, and left out: {titles[0][1][0]!r}")
    return header


def shown(value: object) -> object:
    """Return a cell as text, nearly as Excel shows it: 1 for 1.0, 2024-05-01 for a date, TRUE, no text for an empty cell or NaN.

    Lists and objects from JSON stay as they are: check_row judges them; only JSON-MIN's several choices become a list.
    """
    if isinstance(value, (str, list, dict)):
        return value["choices"] if isinstance(value, dict) and "choices" in value else value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.15g}"
    if isinstance(value, Decimal):
        return f"{value.normalize():f}"
    return "" if value is None else re.sub(" 00:00:00$", "", str(value))


# ---------------------------------------------------------------- what kind of file it is


def find_ending(path: str, sheet: Optional[str]) -> str:
    """Ending of the file's name in lower case. Raises UserError where no reader here can read the file."""
    ending = plain_ending(path)
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "file not found"
        raise UserError(f"{path}: {what}, expected a table ({', '.join(ENDINGS)})")
    with sound_gzip(path), open_input(path) as file:
        start = file.read(8)
        locked = "EncryptedPackage".encode("utf-16-le") in file.read() if start == OLE_START else False
    is_workbook = READERS.get(ending) is read_workbook
    if locked:
        raise UserError(f"{path}: a workbook with a password, expected one without, {SAVE_AS}")
    if start == OLE_START or ending in (".xls", ".xlsb"):
        raise UserError(f"{path}: an Excel workbook of another format, expected {SAVE_AS}")
    if ending not in ENDINGS:
        raise UserError(f"{path}: no table by its name, expected one that ends in {', '.join(ENDINGS)}")
    if start.startswith(b"PK\3\4") and not is_workbook:
        raise UserError(f"{path}: an Excel workbook by its content, expected its name to end in .xlsx")
    if is_gzip(path) and (is_workbook or ending == PARQUET):
        raise UserError(f"{path}: a {ending} file inside, expected a text file that ends in {GZIP}, or that file as it is")
    if sheet and not is_workbook:
        raise UserError(f"--sheet {sheet}: {path} has no sheets, expected a workbook (.xlsx)")
    return ending


def find_utf8(path: str) -> Callable[[], BinaryIO]:
    """Return what opens a text file as a binary stream in UTF-8, from its beginning each time.

    A file in UTF-8 is read as it is; one in another encoding is converted in memory, and a line is printed. What is neither UTF-8
    nor UTF-16, UTF-32 or GB18030 stays as it is: read_lines reports it by line.
    """
    if is_plain_utf8(path):
        return lambda: open_input(path)
    with sound_gzip(path), open_input(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        encoding = bom_encoding(content) or guess_encoding(content)
        try:
            text = content.decode(encoding) if encoding in ("UTF-16", "UTF-32", "GB18030") else ""
        except UnicodeDecodeError:
            text = ""
        if not text:
            return lambda: io.BytesIO(content)
        print(f"{path}: {encoding}, converted to UTF-8")
    converted = (text if "\n" in text else text.replace("\r", "\n")).encode()  # old Macs end lines with CR
    return lambda: io.BytesIO(converted)


def is_plain_utf8(path: str) -> bool:
    """Tell whether a file is UTF-8 and has an LF. UserError where it is no whole .gz file."""
    decoder, has_end = codecs.getincrementaldecoder("utf-8")(), False
    with sound_gzip(path), open_input(path) as file:
        try:
            for block in iter(lambda: file.read(BLOCK), b""):
                decoder.decode(block)
                has_end = has_end or b"\n" in block
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return has_end


# ---------------------------------------------------------------- readers of cells: each yields (place, cells), the header first


def read_delimited(path: str, sheet: Optional[str], problems: Problems) -> Iterator[tuple[Place, list[str]]]:
    """Yield the rows of a text file with a delimiter."""
    open_text = find_utf8(path)
    for _ in read_lines(path, problems, open_text()):
        pass
    problems.report()  # quotes would not match without the unsound lines
    # CR amidst a line is in a text, but csv would end the row there: another line break stands for it
    lines = (line.replace("\r", "\v") + "\n" for _, line in read_lines(path, problems, open_text()))
    start = []
    for line in lines:
        start.append(line)
        if line.strip():
            break
    header = next(filter(str.strip, start), "")
    usual = "," if plain_ending(path) == ".csv" else "\t"
    delimiter = next((mark for mark in (usual, *DELIMITERS) if mark in header), usual)
    if delimiter != usual:
        print(f"{path}: the header's delimiter is a {DELIMITERS[delimiter]}")
    csv.field_size_limit(sys.maxsize)
    reader, width = csv.reader(itertools.chain(start, lines), delimiter=delimiter, strict=True), None
    while True:
        number = reader.line_num + 1  # where the row begins: cells may have line breaks
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(path, number, f"the cells cannot be told apart ({error})", 'closed quotes, doubled inside of cells: ""')
            continue
        if any(map(str.strip, cells[1:])):  # else it may be a title above the header
            width = width or len(cells)
        if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
            problems.add(path, number, "a quote at the beginning of a cell is closed in a row below", 'quotes in quotes: """')
            continue
        if any(map(str.strip, cells[width or len(cells):])):
            wrong = f"{len(cells)} cells where the header has {width}"
            problems.add(path, number, wrong, f"quotes around cells that contain a {DELIMITERS[delimiter]}")
        elif any(map(str.strip, cells)):
            yield (path, number), cells


def read_workbook(path: str, name: Optional[str], problems: Problems) -> Iterator[tuple[Place, list[object]]]:
    """Yield the rows of a sheet of an .xlsx workbook; name: of the sheet, or None for the first visible one."""
    try:
        with zipfile.ZipFile(path) as archive:  # what is rare and costs time and memory is done where need be
            parts = [archive.read(part) for part in archive.namelist() if part.startswith("xl/worksheets/")]
        has_merged, has_formulas = (any(re.search(tag, part) for part in parts) for tag in (b"mergeCell ", b"[<:]f[ />]"))
        workbook = open_workbook(path, read_only=not has_merged, data_only=True)
        sheets = {sheet.title: sheet for sheet in workbook.worksheets}
        visible = [title for title, sheet in sheets.items() if sheet.sheet_state == "visible"]
        if name is not None:
            check_name(name, list(sheets), f"--sheet: {path} has no sheet")
        elif len(visible) > 1:
            print(f"{path}: the sheet read is {visible[0]!r}, the first of {len(visible)}")
        sheet = sheets[name or visible[0]]
        formulas = open_workbook(path, read_only=not has_merged)[sheet.title].iter_rows() if has_formulas else None
        merged = {(area.min_row, area.min_col): area.max_row for area in sheet.merged_cells.ranges} if has_merged else {}
        for number, values in fill_merged(path, sheet_rows(sheet.iter_rows(values_only=formulas is None), formulas), merged):
            yield (path, number), values
    except UserError:
        raise
    except Exception as error:  # openpyxl checks little: a damaged file may end in any error
        raise UserError(f"{path}: no sound Excel workbook ({error}), expected one that Excel opens, {SAVE_AS}") from None


def open_workbook(path: str, read_only: bool, data_only: bool = False) -> openpyxl.Workbook:
    """Open a workbook. read_only: in little memory, but without merged cells; data_only: values, no formulas."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # styles and other things that do not matter here
        workbook = openpyxl.load_workbook(path, read_only=read_only, data_only=data_only)
    for sheet in workbook.worksheets if read_only else ():
        sheet.reset_dimensions()  # some programs write wrong ones
    return workbook


def sheet_rows(rows: Iterable[tuple], formulas: Optional[Iterator[tuple]]) -> Iterator[tuple[int, list[object]]]:
    """Yield (number from 1, values) for each row of a sheet that is not blank; UNCOMPUTED where a formula has no value.

    rows: of values; or with formulas, the same cells with these in the place of their values, of openpyxl's cells.
    """
    for number, cells in enumerate(rows, 1):
        values = [unescape(cell.value if formulas else cell) for cell in cells]
        for index, formula in enumerate(next(formulas) if formulas else ()):
            # "str" is the type of an empty text that was computed
            if formula.data_type == "f" and values[index] is None and cells[index].data_type != "str":
                values[index] = UNCOMPUTED
        if any(str(value).strip() for value in values if value is not None):
            yield number, values


def unescape(value: object) -> object:
    """Return the value of a cell; in its texts, some characters stand as _x000D_."""
    return ESCAPE.sub(lambda match: chr(int(match[1], 16)), value) if isinstance(value, str) and "_x" in value else value


def fill_merged(path: str, rows: Iterable[tuple[int, list[object]]],
                merged: dict[tuple[int, int], int]) -> Iterator[tuple[int, list[object]]]:
    """Yield the rows of `sheet_rows`, with a merged cell's value in all of its rows, in its first column.

    merged: {(first row, first column): last row}, from 1. The first row, a title or the header, gives nothing to rows below.
    """
    areas: dict[int, tuple[int, object]] = {}  # column -> (last row, value) of its last merged cell
    filled = 0
    for position, (number, values) in enumerate(rows):
        for column, value in enumerate(values if merged and position else ()):
            if (number, column + 1) in merged:
                areas[column] = merged[number, column + 1], value
            elif column in areas and number <= areas[column][0]:
                values[column], filled = areas[column][1], filled + 1
        yield number, values
    if filled:
        print(f"{path}: cells that got the value of the merged cell they are part of: {filled}")


# ---------------------------------------------------------------- readers of objects


def read_columns(path: str, problems: Problems) -> Table:
    """Read the Table of a Parquet file, whose rows are read as they are asked for."""
    columns, rows = read_objects(path)

    def sound_rows() -> Iterator[tuple[Place, dict[str, object]]]:
        for number, row in rows:
            if NOT_UTF8 in row.values():
                problems.add(path, number, "invalid UTF-8", "strings of UTF-8")
            else:
                yield (path, number), row

    return Table(columns, columns, sound_rows())


def read_json(path: str, problems: Problems) -> Table:
    """Read the Table of a JSON file: objects, whose rows are read as they are asked for, or Label Studio's tasks."""
    open_text = find_utf8(path)
    columns: dict[str, None] = {}
    for place, value in read_json_rows(path, problems, open_text()):
        if isinstance(value, dict):
            columns.update(dict.fromkeys(value))
        else:
            problems.add(*place, f"a JSON {type(value).__name__}", "an object with a text and a label")
    reported = Problems()  # those of above, once more
    rows = ((place, value) for place, value in read_json_rows(path, reported, open_text()) if isinstance(value, dict))
    if {"data", "annotations"} <= set(columns):
        print(f"{path}: an export of Label Studio")
        return read_tasks(path, rows, problems)
    names = [name for name in columns if "annotation_id" not in columns or name not in STUDIO_EXTRAS]  # those of JSON-MIN
    return Table(names, names, rows)


def read_tasks(path: str, tasks: Iterable[tuple[Place, dict]], problems: Problems) -> Table:
    """Make the Table of Label Studio's tasks: their data, and under each control's name what the annotators chose."""
    rows: list[tuple[Place, dict, dict]] = []
    columns: dict[str, object] = {}
    controls: dict[str, list] = {}
    for place, task in tasks:
        try:
            chosen: dict[str, list] = {}
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
    unlabelled: dict[str, object] = dict.fromkeys(controls, [])
    return Table(list(columns), list(controls), [(place, {**data, **unlabelled, **chosen}) for place, data, chosen in rows])


# the ending of a file's name -> its reader of cells
READERS: dict[str, Callable[[str, Optional[str], Problems], Iterator[tuple[Place, Sequence]]]] = {
    ".csv": read_delimited, ".tsv": read_delimited, ".txt": read_delimited, ".xlsx": read_workbook, ".xlsm": read_workbook}
# and those of objects
OBJECT_READERS: dict[str, Callable[[str, Problems], Table]] = {".jsonl": read_json, ".json": read_json, PARQUET: read_columns}
ENDINGS = (*READERS, *OBJECT_READERS)
