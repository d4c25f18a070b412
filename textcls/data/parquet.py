"""Parquet files, read in batches and written in groups of rows: in little memory. Only what opens one needs pyarrow."""

import argparse
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

from textcls.common.errors import Problems, UserError, check_name
from textcls.common.outputs import complete_file

if TYPE_CHECKING:
    from pyarrow import Array, DataType, RecordBatch, Schema, Table
    from pyarrow.parquet import ParquetFile, ParquetWriter

PARQUET = ".parquet"
BATCH, GROUP = 1 << 13, 1 << 16  # rows in memory: of a file that is read, and of one that is written
BUFFER = 1 << 20  # bytes of a column that are read at a time: a group of rows may be the whole file
NOT_UTF8 = b""  # stands for a string that is no UTF-8


def is_parquet(path: str) -> bool:
    """Tell a Parquet file by its name."""
    return str(path).lower().endswith(PARQUET)


def check_columns(args: argparse.Namespace, paths: Sequence[str]) -> None:
    """Raise UserError where an option names a column, and none of the files that are read has columns."""
    for name in ("text_column", "label_column"):
        if getattr(args, name, None) is not None and not any(map(is_parquet, paths)):
            raise UserError(f"--{name}: {' and '.join(paths)} without columns, expected a name that ends in .parquet")


def check_pyarrow(path: str) -> None:
    """Raise UserError where the package that reads and writes Parquet files is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(f"{path}: the package pyarrow (17 or later) is missing, expected `pip install -c constraints.txt pyarrow`"
                        ) from None


# ---------------------------------------------------------------- reading


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator["ParquetFile"]:
    """Open a Parquet file. UserError where there is none, or what the block reads of it is damaged."""
    check_pyarrow(path)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(str(path), buffer_size=BUFFER, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: file not found, expected a Parquet file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a Parquet file, such as one of those in it") from None
    except (ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: damaged, or no Parquet file ({reason}), expected one that pyarrow can read") from None


def is_string(kind: "DataType") -> bool:
    """Tell whether a column of this type holds strings; Categories of pandas do."""
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or (types.is_dictionary(kind) and is_string(kind.value_type))


def is_plain(kind: "DataType") -> bool:
    """Tell whether a column of this type holds strings, numbers, dates, truth values, or lists of strings."""
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind)
    return is_string(kind) or types.is_primitive(kind) or types.is_decimal(kind) or (is_list and is_string(kind.value_type))


def check_once(path: str, names: Sequence[str], name: str) -> None:
    """Raise UserError where several columns have a name."""
    if names.count(name) > 1:
        raise UserError(f"{path}: {names.count(name)} columns are called {name!r}, expected different names")


def find_column(path: str, schema: "Schema", option: str, name: Optional[str], usual: str, taken: Optional[str] = None) -> str:
    """Return the name of a column of strings: that of an option, else the usual one, else the only one. UserError.

    taken: another column, which this cannot be unless the option says so.
    """
    if name is None:
        strings = [field.name for field in schema if is_string(field.type) and field.name != taken]
        # one of the usual name that holds no strings is refused below: another column would not be what was meant
        name = usual if usual in schema.names and usual != taken else strings[0] if len(strings) == 1 else None
        if name is None:
            raise UserError(f"{path}: {len(strings)} columns of strings, none of them called {usual!r}, expected {option}; the "
                            f"columns are {', '.join(map(repr, schema.names))}")
    check_name(name, schema.names, f"{option}: {path} has no column")
    check_once(path, schema.names, name)
    if not is_string(schema.field(name).type):
        raise UserError(f"{option}: column {name!r} of {path} is {schema.field(name).type}, expected a column of strings")
    return name


def column_names(path: str) -> list[str]:
    """Return the names of the columns of a Parquet file. UserError, also where two have one name."""
    with open_parquet(path) as file:
        names = file.schema_arrow.names
    for name in names:
        check_once(path, names, name)
    return names


def find_text_column(path: str, name: Optional[str]) -> str:
    """Return the name of the column of texts. name: of --text_column. UserError."""
    with open_parquet(path) as file:
        return find_column(path, file.schema_arrow, "--text_column", name, "text")


def find_columns(path: str, text: Optional[str], label: Optional[str]) -> tuple[str, str]:
    """Return the names of the columns of texts and of labels. text, label: of --text_column and --label_column. UserError."""
    with open_parquet(path) as file:
        schema = file.schema_arrow
        if label is not None:  # else a wrong one would first look like a text column that is not found
            find_column(path, schema, "--label_column", label, "label")
        text = find_column(path, schema, "--text_column", text, "text", label or "label")
        label = find_column(path, schema, "--label_column", label, "label", text)
    if text == label:
        raise UserError(f"{path}: column {text!r} for both texts and labels, expected different columns")
    return text, label


def read_batches(path: str, columns: Sequence[str], size: int) -> Iterator["RecordBatch"]:
    """Yield the rows of some columns, `size` at a time. UserError where the file is damaged."""
    with open_parquet(path) as file:
        yield from file.iter_batches(size, columns=list(columns))


def read_strings(path: str, columns: Sequence[str], problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Yield (number from 1, its strings in these columns) for each row; one with a null or invalid UTF-8 is a problem instead."""
    number = 0
    for batch in read_batches(path, columns, BATCH):
        for values in zip(*(values_of(batch.column(batch.schema.get_field_index(name))) for name in columns)):
            number += 1
            name = next((name for name, value in zip(columns, values) if not isinstance(value, str)), None)
            if name is None:
                yield number, list(values)
            else:
                wrong = "null" if values[columns.index(name)] is None else "invalid UTF-8"
                problems.add(path, number, f"{wrong} in column {name!r}", "a string")
    if not number:
        problems.add(path, None, "no rows", "at least one")


def values_of(column: "Array") -> list[Any]:
    """Return the values of a column, with NOT_UTF8 in the place of strings that are none."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values = []
        for scalar in column:
            try:
                values.append(scalar.as_py())
            except UnicodeDecodeError:
                values.append(NOT_UTF8)
        return values


def read_objects(path: str) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    """Return (names of the plain columns, the rows: number from 1, {name: value}); NOT_UTF8 is the value of a
    string that is none. Prints which columns are left out.
    """
    with open_parquet(path) as file:
        names = [field.name for field in file.schema_arrow if is_plain(field.type)]
        others = [f"{field.name!r} ({field.type})" for field in file.schema_arrow if not is_plain(field.type)]
    if others:
        print(f"{path}: columns that hold neither strings, numbers nor dates, left out: {', '.join(others)}")
    rows = (dict(zip(batch.schema.names, values)) for batch in read_batches(path, names, BATCH)
            for values in zip(*map(values_of, batch.columns)))
    return names, enumerate(rows, 1)


# ---------------------------------------------------------------- writing


class Rows:
    """The rows of a Parquet file that is being written."""

    def __init__(self, writer: "ParquetWriter", columns: "Schema", others: Optional[Iterator["RecordBatch"]]):
        self.writer, self.columns, self.others = writer, columns, others
        self.rows: list[Sequence[Union[str, float]]] = []
        self.rest: Optional[Table] = None  # rows of the other columns that are read, but not written yet

    def writerows(self, rows: Iterable[Sequence[Union[str, float]]]) -> None:
        """Append rows, a str or float for each column."""
        for row in rows:
            self.rows.append(row)
            if len(self.rows) == GROUP:
                self.flush()

    def flush(self) -> None:
        """Write the rows so far as a group."""
        import pyarrow

        if not self.rows:
            return
        arrays = [pyarrow.array(values, field.type) for values, field in zip(zip(*self.rows), self.columns)]
        table = pyarrow.Table.from_arrays(arrays, schema=self.columns)
        if self.others is not None:
            beside = self.take_others(len(self.rows))
            for field, column in zip(beside.schema, beside.columns):
                table = table.append_column(field, column)
        self.writer.write_table(table, row_group_size=GROUP)
        self.rows = []

    def take_others(self, count: int) -> "Table":
        """Return the next rows of the other columns."""
        import pyarrow

        tables, missing = [], count
        while missing > 0:
            if self.rest is None or not self.rest.num_rows:
                self.rest = pyarrow.Table.from_batches([next(self.others)])  # type: ignore[arg-type]
            tables.append(self.rest.slice(0, missing))
            self.rest = self.rest.slice(missing)
            missing -= tables[-1].num_rows
        return pyarrow.concat_tables(tables)


@contextlib.contextmanager
def new_parquet(path: str, columns: Mapping[str, type], source: Optional[str] = None, others: Sequence[str] = ()
                ) -> Iterator[Rows]:
    """Open a new Parquet file for writing; it appears under its name only when the block ends well.

    columns: name -> str or float. others: columns of the Parquet file `source` that are copied beside them, row by row.
    """
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    own = pyarrow.schema([(name, pyarrow.string() if kind is str else pyarrow.float64()) for name, kind in columns.items()])
    fields = list(own)
    batches = None
    if source is not None and others:
        with open_parquet(source) as file:
            fields += [file.schema_arrow.field(name) for name in others]
        batches = read_batches(source, others, GROUP)
    with complete_file(path, "wb") as output, ParquetWriter(output, pyarrow.schema(fields), write_page_checksum=True) as writer:
        rows = Rows(writer, own, batches)
        yield rows
        rows.flush()
