"""Turn a table of texts and labels into the data files of train.py.

    python data/table.py --table_file my.xlsx --save_dir ./my_data
    python data/table.py --table_file my.csv --text_column 问题 --label_column 类别 --save_dir ./my_data --splits 0.9 0.1

Reads   table_file, by the ending of its name:
        .csv .tsv .txt  a header, then one row per text; comma, semicolon or tab; UTF-8, GB18030, or UTF-16 with a BOM
        .xlsx .xlsm     a sheet with a header; numbers and dates become their text (1 for 1.0, 2024-05-01)
        .jsonl .json    objects, one per line or in an array; the label is a string or a list of one
        .json           Label Studio's exports JSON and JSON-MIN; cancelled annotations do not count
        .csv.gz ...     any of these but a workbook, compressed
        .parquet        columns of strings, numbers, dates or lists of one string; needs pyarrow
Writes  save_dir/: train.txt, dev.txt, test.txt, label.txt, data.txt, as data/doccano.py does.

Columns that are not named are found by well-known names, or where there are just two. Rows that share a merged cell of a sheet
all get its value. Split, reports and refusals are those of data/doccano.py; in addition, labels lose blanks around them, and
their tabs and line breaks become one blank. Files may be of any size: the texts wait in a temporary file at save_dir; only JSON
arrays, workbooks with merged cells and text that is not UTF-8 are read as a whole.
"""

from textcls.common.errors import Problems, UserError, check_name, run_script
from textcls.common.options import make_parser
from textcls.common.texts import BREAKS
from textcls.data.splitting import add_split_options, check_shares, make_data_folder
from textcls.data.tables import ENDINGS, EXCEL_ERRORS, UNCOMPUTED, read_table, shown

TEXT_NAMES = ("text", "texts", "content", "sentence", "question", "query", "文本", "内容", "文本内容", "正文", "句子", "问题")
LABEL_NAMES = ("label", "labels", "category", "class", "intent", "标签", "类别", "分类", "类目", "意图")


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


def only(names):
    """The name if there is just one, else None."""
    return names[0] if len(names) == 1 else None


def find_column(name, option, columns, known):
    """The column that the option names, else the only one with a known name, else None."""
    if name is not None:
        check_name(name, columns, f"{option}: there is no column")
    return name or only([column for column in dict.fromkeys(columns) if column.lower() in known])


def choose_columns(args, table):
    """Return (name of the text column, name of the label column, whether only their order told them apart)."""
    texts, labels = table.texts, table.labels
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
    for name, columns in ((text, texts), (label, labels)):
        if columns.count(name) > 1:
            raise UserError(f"{args.table_file}: {columns.count(name)} columns are called {name!r}, expected different names")
    if text == label:
        raise UserError(f"{args.table_file}: column {text!r} for both texts and labels, expected different columns")
    print(f"{args.table_file}: texts in column {text!r}, labels in column {label!r}")
    return text, label, only_order


def read_rows(table, text_column, label_column, only_order, problems):
    """Yield (place, text, label), see textcls/data/splitting.py, with tidy labels; prints how many were not."""
    tidied = 0
    for place, cells in table.rows:
        text, label = shown(cells.get(text_column)), shown(cells.get(label_column))
        if isinstance(label, list) and len(label) == 1 and isinstance(label[0], str):
            label = label[0]
        if isinstance(label, str):
            tidy = BREAKS.sub(" ", label).strip()
            tidied += tidy != label
            label = tidy
        if label == label_column and (only_order or text == text_column):
            problems.add(*place, f"label {label!r} is the name of its column, too", "a header, as the first row only")
        elif UNCOMPUTED in (text, label):
            problems.add(*place, "a formula without a value", "the workbook opened and saved in Excel or WPS, which compute it")
        elif text in EXCEL_ERRORS or label in EXCEL_ERRORS:
            problems.add(*place, f"an Excel error as text {text!r} or label {label!r}", "a value")
        else:
            yield place, text.strip() if isinstance(text, str) else text, label
    if tidied:
        print(f"labels with blanks around them, tabs or line breaks (tidied): {tidied}")


def main():
    args = parse_arguments()
    problems = Problems()
    table = read_table(args.table_file, args.sheet, (args.text_column, args.label_column, *TEXT_NAMES, *LABEL_NAMES), problems)
    if not table.texts:
        problems.report()
        raise UserError(f"{args.table_file}: no columns, expected a header and rows with a text and a label")
    rows = read_rows(table, *choose_columns(args, table), problems)
    make_data_folder(args, args.table_file, rows, "one label", problems)


if __name__ == "__main__":
    run_script(main)
