"""Compressed and Parquet files through the real command lines: predict.py, deploy/predictor/infer.py, analysis/evaluate.py."""

import csv
import gzip
import io
import json

import pyarrow
import pytest
from pyarrow import parquet

import predict
from analysis import evaluate
from helpers import ROOT, assert_user_error, load_script, read_lines, run, run_here, write_lines

infer = load_script("deploy/predictor", "infer")
ROWS = [line.split("\t") for line in read_lines(ROOT / "data/dev.txt")]
TEXTS = [text for text, _ in ROWS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder whose texts are there as plain text, compressed, and as Parquet."""
    folder = tmp_path_factory.mktemp("files")
    write_lines(folder / "label.txt", read_lines(ROOT / "data/label.txt"))
    write_lines(folder / "data.txt", TEXTS)
    (folder / "data.txt.gz").write_bytes(gzip.compress((folder / "data.txt").read_bytes()))
    for name, rows in (("train", ROWS[100:]), ("dev", ROWS[:100])):
        write_lines(folder / f"{name}.txt", map("\t".join, rows))
        (folder / f"{name}.txt.gz").write_bytes(gzip.compress((folder / f"{name}.txt").read_bytes()))
        texts, labels = zip(*rows)
        table = pyarrow.table({"id": range(len(texts)), "question": texts, "class": labels})
        parquet.write_table(table, folder / f"{name}.parquet")
    table = {"id": range(len(ROWS)), "text": TEXTS, "label": [label for _, label in ROWS]}
    parquet.write_table(pyarrow.table(table), folder / "data.parquet")
    return folder


@pytest.mark.parametrize("script", ["predict", "infer"])
def test_answers_are_the_same_for_all_files(script, folder, checkpoint, exported, tmp_path):
    main, model = {"predict": (predict.main, ["--params_path", checkpoint, "--device", "cpu"]),
                   "infer": (infer.main, ["--model_path_prefix", exported])}[script]

    def label(data, output, kind, *more):
        process = run_here(main, *model, "--dataset_dir", folder, "--data_file", data, "--output_file", tmp_path / output,
                           "--output_format", kind, *more)
        assert process.returncode == 0, process.stderr
        return process.stderr

    label("data.txt", "plain.csv", "csv", "--top_k", 2)
    for data in ("data.txt.gz", "data.parquet"):
        label(data, "out.csv.gz", "csv", "--top_k", 2)
        assert gzip.decompress((tmp_path / "out.csv.gz").read_bytes()) == (tmp_path / "plain.csv").read_bytes()
    assert "left out of the output: 'label'" in label("data.parquet", "out.parquet", "parquet", "--top_k", 2)
    header, *expected = csv.reader(io.StringIO((tmp_path / "plain.csv").read_text(encoding="utf-8")))
    found = parquet.read_table(tmp_path / "out.parquet")
    assert found.schema.names == [*header, "id"] and found["id"].to_pylist() == list(range(len(TEXTS)))
    assert [[row[name] if type(row[name]) is str else f"{row[name]:.6f}" for name in header]
            for row in found.to_pylist()] == expected


def test_line_breaks_in_texts_stay_where_the_format_can_hold_them(folder, checkpoint, tmp_path):
    texts = ["头疼\n怎么办", "a\tb", "a\rb", "好\r\n\n坏"]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "odd.parquet")
    common = ["--params_path", checkpoint, "--device", "cpu", "--dataset_dir", tmp_path, "--data_file", "odd.parquet"]
    for kind in ("txt", "tsv", "csv", "jsonl"):
        process = run_here(predict.main, *common, "--output_file", tmp_path / kind, "--output_format", kind)
        assert process.returncode == 0, process.stderr
    joined = ["头疼 怎么办", "a b", "a\rb", "好 坏"]
    for kind in ("txt", "tsv"):
        lines = (tmp_path / kind).read_bytes().decode("utf-8").split("\n")[1:-1]
        assert [line.split("\t")[0] for line in lines] == joined
    with open(tmp_path / "csv", encoding="utf-8", newline="") as file:
        assert [row[0] for row in csv.reader(file)][1:] == texts
    assert [json.loads(line)["text"] for line in read_lines(tmp_path / "jsonl")] == texts


def test_wrong_files_and_options_are_refused(folder, checkpoint, exported, tmp_path):
    def refused(*options, data="data.parquet", output="out.txt"):
        options = ["--dataset_dir", folder, "--data_file", data, "--output_file", tmp_path / output, *options]
        process = run_here(predict.main, "--params_path", checkpoint, *options)
        assert_user_error(process)
        assert run_here(infer.main, "--model_path_prefix", exported, *options).stderr == process.stderr
        assert list(tmp_path.iterdir()) == []
        return process.stderr

    assert "has no column 'txt' (did you mean 'text'?), expected one of 'id', 'text', 'label'" in refused("--text_column", "txt")
    assert "column 'id' of" in refused("--text_column", "id")
    assert "data.txt without columns, expected a name that ends in .parquet" in refused("--text_column", "text", data="data.txt")
    assert "expected --output_format parquet" in refused(output="out.parquet")
    assert "name that ends in .parquet" in refused("--output_format", "parquet")
    (folder / "short.txt.gz").write_bytes((folder / "data.txt.gz").read_bytes()[:-20])
    assert refused(data="short.txt.gz") == f"{folder}/short.txt.gz: ends too early, expected a whole .gz file\n"
    parquet.write_table(pyarrow.table({"text": ["好", None, ""]}), folder / "bad.parquet")
    assert refused(data="bad.parquet").split("\n")[:-1] == [
        f"{folder}/bad.parquet:2: null in column 'text', expected a string",
        f"{folder}/bad.parquet:3: empty or blank, expected a text", "2 problems found."]


def test_evaluate_takes_all_of_them(folder, checkpoint, tmp_path):
    def evaluated(ending, *options):
        bad_cases = tmp_path / f"bad_case{ending}"
        process = run_here(evaluate.main, "--params_path", checkpoint, "--device", "cpu", "--dataset_dir", folder, "--train_file",
                           f"train{ending}", "--dev_file", f"dev{ending}", "--bad_case_file", bad_cases, *options)
        assert process.returncode == 0, process.stderr
        return [line.split(" - ")[1] for line in process.stderr.split("\n") if "dataset" in line and " in dev.txt" not in line]

    figures = evaluated(".txt")
    lines = [line.split("\t") for line in read_lines(tmp_path / "bad_case.txt")]
    assert len(figures) > 20 and len(lines) > 1
    columns = ["--text_column", "question", "--label_column", "class"]
    strip = [line for line in figures if "bad_case" not in line]
    for ending, options in ((".txt.gz", []), (".parquet", columns)):
        assert [line for line in evaluated(ending, *options) if "bad_case" not in line] == strip
    assert gzip.decompress((tmp_path / "bad_case.txt.gz").read_bytes()) == (tmp_path / "bad_case.txt").read_bytes()
    found = parquet.read_table(tmp_path / "bad_case.parquet")
    assert found.schema.names == ["text", "label", "prediction"]
    assert [list(row.values()) for row in found.to_pylist()] == lines[1:]
    process = run("analysis/evaluate.py", "--dataset_dir", folder, "--train_file", "train.parquet", "--dev_file", "dev.parquet",
                  "--text_column", "question", "--params_path", checkpoint, "--label_column", "klass")
    assert_user_error(process, f"--label_column: {folder}/train.parquet has no column 'klass' (did you mean 'class'?)")
