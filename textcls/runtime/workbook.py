"""Answers as an Excel workbook, written row by row in little memory. Only what opens a workbook needs openpyxl."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Union

from textcls.common.errors import UserError
from textcls.common.outputs import complete_file

if TYPE_CHECKING:
    from openpyxl.worksheet._write_only import WriteOnlyWorksheet

MOST_ROWS, MOST_CHARACTERS = 1_048_576, 32_767  # of a sheet, of a cell
# what XML cannot hold, which a workbook writes as _x0007_, and what would be read as such an escape
ESCAPED = re.compile("[\0-\x08\x0b-\x1f\ufffe\uffff]|_(?=x[0-9A-Fa-f]{4}_)")


class Sheet:
    """The one sheet of a workbook that is being written."""

    def __init__(self, sheet: "WriteOnlyWorksheet"):
        self.sheet, self.count = sheet, 0

    def writerows(self, rows: Iterable[list[Union[str, float]]]) -> None:
        """Append rows; a str is never taken for a formula, a number or an error. UserError where Excel could not hold them."""
        from openpyxl.cell import WriteOnlyCell

        for row in rows:
            self.count += 1
            check_row_count(self.count)
            cells = []
            for value in row:
                if isinstance(value, str):
                    value = ESCAPED.sub(lambda match: f"_x{ord(match[0]):04X}_", value)
                    if len(value) > MOST_CHARACTERS:
                        raise UserError(f"row {self.count}: {len(value)} characters, expected at most {MOST_CHARACTERS}, which a "
                                        "cell of Excel can hold, or another --output_format")
                cell = WriteOnlyCell(self.sheet, value)
                if isinstance(value, str):
                    cell.data_type = "s"
                cells.append(cell)
            self.sheet.append(cells)


@contextlib.contextmanager
def new_workbook(path: str) -> Iterator[Sheet]:
    """Open a new workbook for writing; it appears under its name only when the block ends well."""
    import openpyxl

    workbook = openpyxl.Workbook(write_only=True)
    sheet = workbook.create_sheet("answers")
    try:
        with complete_file(path, "wb") as file:
            yield Sheet(sheet)
            workbook.save(file)
    finally:
        if not sheet.closed:  # else its generator complains on standard error
            sheet.close()


def check_workbook(path: str) -> None:
    """Raise UserError where a workbook cannot be written, for want of a package, or Excel would not open it by its name."""
    if not str(path).endswith(".xlsx"):
        raise UserError(f"--output_format xlsx: {path} as output, expected --output_file with a name that ends in .xlsx")
    try:
        import openpyxl  # noqa: F401
    except ImportError:
        raise UserError("--output_format xlsx: the package openpyxl is missing, expected `pip install openpyxl`") from None


def check_row_count(count: int) -> None:
    """Raise UserError where a sheet cannot hold so many rows, the header among them."""
    if count > MOST_ROWS:
        raise UserError(f"--output_format xlsx: more than {MOST_ROWS} rows, which Excel cannot hold, expected another "
                        "--output_format, or the texts in parts")
