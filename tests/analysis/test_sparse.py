"""analysis/sparse.py: what it finds where a class is missing from train, log lines, variants, wrong input."""

import os
import re

import pytest

from analysis import sparse
from helpers import ROOT, assert_user_error, read_lines, run, run_here, write_lines

DATA = ROOT / "data"
MISSING = ("医疗费用", "就医建议")  # two classes that the training file does not cover
LOG = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] \[ *(?:INFO|WARNING)\] - (.*)$", re.MULTILINE)


def split_off(path):
    """(rows of the other classes, rows of MISSING) of a labelled file."""
    rows = read_lines(path)
    return [row for row in rows if not row.endswith(MISSING)], [row for row in rows if row.endswith(MISSING)]


def text_of(row):
    return row.split("\t")[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The sample data without the training rows of MISSING, which are among the unlabelled texts instead."""
    folder = tmp_path_factory.mktemp("sparse")
    train, missing = split_off(DATA / "train.txt")
    write_lines(folder / "train.txt", train)
    write_lines(folder / "dev.txt", read_lines(DATA / "dev.txt"))
    write_lines(folder / "label.txt", read_lines(DATA / "label.txt"))
    write_lines(folder / "data.txt", [
        *map(text_of, missing), *map(text_of, train[:300]), *map(text_of, read_lines(DATA / "dev.txt")[:50]),
        f"{text_of(missing[0])}？", *read_lines(DATA / "data.txt")])
    return folder


def run_sparse(data, checkpoint, *options):
    return run_here(sparse.main, "--device", "cpu", "--dataset_dir", data, "--params_path", checkpoint, "--cache_dir",
                    data / "cache", *options)


def read_report(path, stage):
    """The report's rows of a stage: dicts."""
    header, *rows = (line.split("\t") for line in read_lines(path))
    assert header == ["Stage", "Text", "Label", "Prediction", "Score", "Near to", "Made from"]
    rows = [dict(zip(header, row)) for row in rows]
    assert {row["Stage"] for row in rows} == {"sparse", "support"}
    return [row for row in rows if row["Stage"] == stage]


def mean_score(rows):
    return sum(float(row["Score"]) for row in rows) / len(rows)


def test_annotate_finds_the_classes_that_train_lacks(data, checkpoint):
    process = run("analysis/sparse.py", "--device", "cpu", "--dataset_dir", data, "--params_path", checkpoint, "--cache_dir",
                  data / "cache", "--annotate", "--sparse_num", 30, "--support_num", 20)
    assert process.returncode == 0, process.stderr
    log = LOG.findall(process.stderr)
    count = len(split_off(DATA / "train.txt")[1]) + len(read_lines(DATA / "data.txt"))
    assert f"{data}/data.txt: {count} texts, without 351 that repeat or are in a training, dev or test file" in log
    assert any(line.startswith("dev.txt is searched for sparse texts. After training on what is found, accuracy on the same file")
               for line in log)
    found, support = (read_report(data / "sparse_report.tsv", stage) for stage in ("sparse", "support"))
    assert [f"{row['Text']}\t{row['Label']}" for row in found] == read_lines(data / "sparse.txt")
    assert len(set(read_lines(data / "sparse.txt")) & set(read_lines(data / "dev.txt"))) == 30
    assert sum(row["Label"] in MISSING for row in found) > 30 * 0.6  # 18 % of dev
    right = sum(row["Label"] == row["Prediction"] for row in found) / 30
    place = log.index(f"Sparse data saved in {data}/sparse.txt")
    assert log[place + 1] == f"Accuracy in sparse data: {right * 100:.2f}%"
    average = re.fullmatch(r"Average score in sparse data: (\d\.\d{4})", log[place + 2])
    assert float(average[1]) == pytest.approx(mean_score(found), abs=1e-4)
    assert log[place + 3] == f"support data saved in {data}/support.txt"
    average = re.fullmatch(r"support average scores: (\d\.\d{4})", log[place + 4])
    assert float(average[1]) == pytest.approx(mean_score(support), abs=1e-4)
    scores = [float(row["Score"]) for row in found]
    assert scores == sorted(scores)
    for row in found:
        near = [float(score) for score in re.findall(r", (\d\.\d{4})\)(?: \| |$)", row["Near to"])]
        assert len(near) == 3 and sum(near) / 3 == pytest.approx(float(row["Score"]), abs=2e-4)
    texts = read_lines(data / "support.txt")
    assert texts == [row["Text"] for row in support] and len(set(texts)) == 20
    assert not {text_of(row) for name in ("train.txt", "dev.txt") for row in read_lines(data / name)} & set(texts)
    missing = set(map(text_of, split_off(DATA / "train.txt")[1]))
    assert sum(text in missing for text in texts) > 20 * 0.8
    assert {row["Near to"] for row in support} <= {row["Text"] for row in found}
    assert min(float(row["Score"]) for row in support) > 0.7


def test_variants_are_new_and_keep_their_label(data, checkpoint):
    options = ["--aug_strategy", "swap", "--sparse_num", 60, "--support_num", 30, "--create_n", 2, "--support_file", "a.txt",
               "--report_file", "a.tsv"]
    process = run_sparse(data, checkpoint, *options)
    assert process.returncode == 0, process.stderr
    train = dict(row.split("\t") for row in read_lines(data / "train.txt"))
    dev = set(map(text_of, read_lines(data / "dev.txt")))
    support = read_report(data / "a.tsv", "support")
    assert [f"{row['Text']}\t{row['Label']}" for row in support] == read_lines(data / "a.txt")
    assert len({row["Text"] for row in support}) == len(support) > len({row["Made from"] for row in support}) > 10
    for row in support:
        assert row["Text"] not in train and row["Text"] not in dev
        assert sorted(row["Text"]) == sorted(row["Made from"])  # words that changed places
        assert row["Label"] == train[row["Made from"]]


def test_duplicate_takes_training_rows_from_all_sparse_texts(data, checkpoint):
    write_lines(data / "held_out.txt", read_lines(data / "dev.txt")[:100])
    process = run_sparse(data, checkpoint, "--aug_strategy", "duplicate", "--dev_file", "held_out.txt", "--sparse_num", 200,
                         "--support_num", 50, "--support_file", "b.txt", "--report_file", "b.tsv", "--max_overlap", 1)
    assert process.returncode == 0, process.stderr
    assert "is searched for sparse texts" not in process.stderr
    assert "--sparse_num 200: held_out.txt has only 100 texts" in process.stderr
    rows = read_lines(data / "b.txt")
    assert len(set(rows)) == 50 and set(rows) <= set(read_lines(data / "train.txt"))
    support = read_report(data / "b.tsv", "support")
    assert len({row["Near to"] for row in support}) == 50  # the nearest of each sparse text come before the second nearest
    places = {row["Text"]: place for place, row in enumerate(read_report(data / "b.tsv", "sparse"))}
    order = [places[row["Near to"]] for row in support]
    assert order == sorted(order)  # the sparsest first


def test_near_duplicates_count_once():
    texts = ["感冒了吃什么药好得快", "感冒吃什么药好得快", "白癜风怎么治疗", "感冒了吃什么药好得快", "牛皮癣怎么治疗", "药", "药"]
    assert list(sparse.without_near_duplicates(texts, 0.5)) == [0, 2, 4, 5]
    assert list(sparse.without_near_duplicates(texts, 1)) == list(range(7))


def test_wrong_input_and_nothing_found_write_nothing(data, checkpoint, tmp_path):
    process = run_sparse(data, checkpoint, "--support_threshold", 1, "--aug_strategy", "delete", "--sparse_file", "no.txt")
    assert_user_error(process, "--support_threshold 1.0: no candidate is that near to a sparse text (the nearest has a cosine of",
                      "expected a lower threshold")
    assert not os.path.exists(data / "no.txt")
    before = (data / "train.txt").read_bytes()
    process = run_sparse(data, checkpoint, "--support_file", "train.txt")
    assert_user_error(process, "train.txt: is an input of this run, expected another name")
    assert (data / "train.txt").read_bytes() == before
    write_lines(tmp_path / "train.txt", ["没有标签"])
    write_lines(tmp_path / "dev.txt", ["感冒\t没有这类"])
    write_lines(tmp_path / "data.txt", ["一个\t标签"])
    process = run_sparse(tmp_path, checkpoint, "--annotate")
    assert_user_error(process, "train.txt:1: no tab", "dev.txt:1: label '没有这类' is not in", "data.txt:1: a tab",
                      "3 problems found.")
    assert sorted(os.listdir(tmp_path)) == ["data.txt", "dev.txt", "train.txt"]
