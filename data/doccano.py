"""Turn a doccano export of a text classification project into the data files of train.py.

    python data/doccano.py --doccano_file doccano.jsonl --save_dir ./data --splits 0.8 0.1 0.1
    python data/doccano.py --doccano_file doccano.jsonl --save_dir ./data --splits 0.9 0.1 --label_file old/label.txt

Reads   doccano_file: JSONL (one object per line) or one JSON array of objects, UTF-8. The text stands under `text`,
        `data` or `column_data`; the label under `label`, `labels` or `column_label`: a list of strings or one string.
Writes  save_dir/: train.txt, dev.txt, test.txt (<text><tab><label>; a split of 0 or not given is not written),
        label.txt (one label per line, line order = class id), data.txt (texts without a label, if there are any).

The split is stratified by label, shuffled, and the same for the same export, options and seed. Rows with several labels
and texts that occur with different labels are reported and left out; rows without a label are reported too. Broken rows
(no JSON, no text, spans instead of labels, ...) are all reported; then nothing is written and the exit code is 2. JSONL may be
of any size: the texts wait in a temporary file at save_dir; an array is read as a whole.
"""

from textcls.common.errors import Problems, run_script
from textcls.common.options import make_parser
from textcls.data.splitting import add_split_options, check_shares, make_data_folder, read_json_rows

TEXT_KEYS = ("text", "data", "column_data")
LABEL_KEYS = ("label", "labels", "column_label")


def parse_arguments():
    """Options from the command line. Raises UserError."""
    parser = make_parser(__doc__)
    parser.add_argument("--doccano_file", default="doccano.jsonl", help="Export of doccano: JSONL or a JSON array.")
    add_split_options(parser, source="export")
    args = parser.parse_args()
    check_shares(args.splits)
    return args


def pick(row, keys):
    """Value under that of `keys` which the row has. Raises ValueError(wrong, expected)."""
    found = [key for key in keys if key in row]
    expected = f"the key {', '.join(map(repr, keys[:-1]))} or {keys[-1]!r}"
    if not found:
        raise ValueError(f"no {keys[0]}", expected)
    if any(row[key] != row[found[0]] for key in found):
        raise ValueError(f"{' and '.join(map(repr, found))} differ", f"only one of these keys for the {keys[0]}")
    return row[found[0]]


def read_rows(path, problems):
    """Yield (place, text, label) for each row of the export, see textcls/data/splitting.py."""
    for place, row in read_json_rows(path, problems):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a JSON {type(row).__name__}", "an object with a text and a label")
            row = place, pick(row, TEXT_KEYS), pick(row, LABEL_KEYS)
        except ValueError as error:
            problems.add(*place, *error.args)
        else:
            yield row


def main():
    args = parse_arguments()
    problems = Problems()
    rows = read_rows(args.doccano_file, problems)
    make_data_folder(args, args.doccano_file, rows, "exactly one label (a list of one string, or a string)", problems)


if __name__ == "__main__":
    run_script(main)
