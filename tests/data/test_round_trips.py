"""What is written is what is read, whatever texts and labels hold: outputs of analysis/ and predictions, by our own readers."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from analysis import dirty, evaluate, sparse
from textcls.analysis.augmentation import Variants
from textcls.analysis.label_errors import Suspects
from textcls.analysis.texts_to_explain import read_rows
from textcls.common.errors import Problems
from textcls.common.texts import LABEL
from textcls.data.files import read_labelled, read_lines, read_texts, write_rows
from textcls.data.tables import read_table, shown
from textcls.runtime.predictions import make_rows, open_output
from textcls.runtime.predictions import write_rows as write_answers

CHARS = st.one_of(st.characters(),
                  st.sampled_from("a甲=+-@#\"',;_x0D{}[]\\ \t\n\r\0\v\u3000\u200b\u2028\ufeff\ufffe\x1b\x1c\x85\ud83d😀"))
TEXTS = st.lists(st.text(CHARS, max_size=8), min_size=1, max_size=4)
LABELS = st.lists(st.text(CHARS, min_size=1, max_size=5).filter(lambda label: not LABEL.problem(label)), min_size=2, max_size=3,
                  unique=True)
HOSTILE = ["\ufeff\ufeff甲", "\ufeff乙 ", "=1+1", "+1", '"', '"a"', '""', "_x000D_", "a\r", "a\rb\r\r", "a\r\v\u2028b", "{}",
           "# ", "text", "a==b", "😀" * 300]


def both(test):
    """Run a test of (tmp_path_factory, texts, labels) on what may be hostile, and on what hypothesis finds."""
    return settings(max_examples=25, deadline=None)(given(TEXTS, LABELS)(example(HOSTILE, ["=甲", "Label"])(test)))


def as_read(folder, texts):
    """The texts as they come into a script: of a file that has them, line by line, as far as it is sound."""
    (folder / "in.txt").write_bytes("\n".join(texts).encode("utf-8", "surrogatepass"))
    return list(read_texts(folder / "in.txt", Problems())) or ["甲"]


def columns_of(path):
    """The rows of a file with tabs, without its header, read by our reader."""
    problems = Problems()
    rows = [line.split("\t") for _, line in read_lines(path, problems)]
    assert not problems.count, problems.lines
    return rows[1:]


def pairs_of(path, labels):
    """The rows of a data file as (text, label)."""
    problems = Problems()
    texts, ids = read_labelled(path, labels, problems)
    assert not problems.count, problems.lines
    return [(text, labels[index]) for text, index in zip(texts, ids)]


@both
def test_rows_of_augmented_dirty_and_clean_data(tmp_path_factory, texts, labels):
    folder = tmp_path_factory.mktemp("rows")
    texts = as_read(folder, texts)
    ids = np.arange(len(texts)) % len(labels)
    names = [labels[index] for index in ids]
    write_rows(folder / "rows.txt", texts, names)
    assert pairs_of(folder / "rows.txt", labels) == list(zip(texts, names))
    dirty.keep_corrections(folder / "rows.txt", texts, ids, labels)  # takes none of its own rows for a corrected one
    ones = np.ones(len(texts))
    dirty.write_report(folder / "report.tsv", texts, ids, labels, Suspects(np.arange(len(texts)), ones, ids, ones, 1), len(texts))
    assert [row[3:6] for row in columns_of(folder / "report.tsv")] == [[*pair, pair[1]] for pair in zip(texts, names)]
    dirty.write_conflicts(folder / "conflicts.tsv", texts, ids, labels, [(1.0, range(len(texts)))])
    assert [tuple(row[3:]) for row in columns_of(folder / "conflicts.tsv")] == list(zip(texts, names))
    variants = Variants(["甲"], [], len(texts) + 1)
    for candidate in ["乙", *(text[1:] for text in texts)]:  # as when their first words are deleted
        variants.accept(0, candidate)
    write_rows(folder / "aug.txt", variants.of[0], [labels[0]] * len(variants.of[0]))
    assert pairs_of(folder / "aug.txt", labels) == [(text, labels[0]) for text in variants.of[0]]


@both
def test_sparse_texts_their_support_and_bad_cases(tmp_path_factory, texts, labels):
    folder = tmp_path_factory.mktemp("sparse")
    texts = as_read(folder, texts)
    found = [("sparse", text, labels[0], labels[1], "0.5", texts[0], "") for text in texts]
    for label in (labels[1], ""):  # with --annotate without one
        support = [("support", text, label, labels[0], "0.5", texts[0], texts[-1]) for text in texts]
        sparse.write_files([folder / name for name in ("sparse.txt", "support.txt", "report.tsv")], found, support)
        assert pairs_of(folder / "sparse.txt", labels) == [(text, labels[0]) for text in texts]
        assert columns_of(folder / "report.tsv") == [list(row) for row in found + support]
        problems = Problems()
        assert texts == (list(read_texts(folder / "support.txt", problems)) if not label else
                         [text for text, _ in pairs_of(folder / "support.txt", labels)])
        assert not problems.count, problems.lines
    cases = [{"text": text, "label": labels[0], "prediction": labels[1], "confidence": 0.5} for text in texts]
    evaluate.write_bad_cases(folder / "bad_case.txt", cases, True)
    assert read_rows(folder / "bad_case.txt", labels, Problems()) == [(text, labels[0]) for text in texts]


@pytest.mark.parametrize("kind", ["txt", "tsv", "csv", "jsonl", "xlsx", "parquet"])
@both
def test_predictions(tmp_path_factory, kind, texts, labels):
    folder = tmp_path_factory.mktemp("predictions")
    texts = as_read(folder, texts)
    path, probs = folder / f"out.{kind}", np.eye(len(labels))[np.arange(len(texts)) % len(labels)]
    args = SimpleNamespace(data_file="-", output_file=str(path), output_format=kind, top_k=1 if kind == "txt" else 2, threshold=0)
    with open_output(args) as output:
        write_answers(output, make_rows(texts, probs, labels, args), args)
    problems, expected = Problems(), [(text, labels[index % len(labels)]) for index, text in enumerate(texts)]
    if kind in ("txt", "tsv"):
        assert read_rows(path, labels, problems) == expected
    else:
        rows = list(read_table(path, None, ("text", "label"), problems).rows)
        # of csv, a CR comes as another line break: all become one blank in the data files
        assert [(shown(row["text"]), shown(row["label"])) for _, row in rows] == [
            (text.replace("\r", "\v") if kind == "csv" else text, label) for text, label in expected]
    assert not problems.count, problems.lines
