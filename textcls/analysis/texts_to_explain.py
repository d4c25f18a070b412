"""The file of texts to explain, as word_interpret.py and sent_interpret.py read it."""

import os
from typing import NamedTuple, Optional

from textcls.common.errors import Problems
from textcls.common.texts import TEXT
from textcls.data.files import read_lines

HEADERS = ("Text\tLabel", "text\tlabel")  # how bad_case.txt and predict.py's output begin


class Row(NamedTuple):
    """A text to explain."""

    text: str
    label: Optional[str]  # None where the file has no label


def read_rows(path: str, labels: list[str], problems: Problems) -> list[Row]:
    """Read texts of one to three tab-separated columns: text, label, prediction. Returns a list of Row, at least one.

    A header as evaluate.py and predict.py write it is skipped, and then the file may have the columns of these, too
    (bad_case.txt with its confidence). The prediction is not used: what is explained is the model's own.
    labels: the model's; empty where they are not known: then any is accepted. Raises UserError naming all lines that are
    wrong, and what `problems` held before.
    """
    rows, columns = [], 3
    if not os.path.exists(path):
        problems.add(path, None, "file not found", "texts to explain, such as the bad_case.txt that analysis/evaluate.py writes")
        problems.report()
    for number, line in read_lines(path, problems):
        text, *others = line.split("\t")
        if number == 1 and line.startswith(HEADERS):
            columns = max(columns, 1 + len(others))
        elif problem := TEXT.problem(text):
            problems.add(path, number, f"text: {problem}", "<text>[<tab><label>[<tab><prediction>]]")
        elif 1 + len(others) > columns:
            problems.add(path, number, f"{1 + len(others)} columns", "one to three: <text>[<tab><label>[<tab><prediction>]]")
        elif labels and others and others[0] and others[0] not in labels:
            problems.add(path, number, f"label {others[0]!r} is not one of the model's", f"one of its {len(labels)} labels")
        else:
            rows.append(Row(text, others[0] if others and others[0] else None))
    if not rows and not problems.count:
        problems.add(path, None, "no texts after the header", "at least one text")
    problems.report()
    return rows
