"""`make app`: a table becomes a running service; what is there is not made again; stopped, it goes on; bad input is said."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from helpers import ROOT, assert_user_error, load_script, open_url, read_lines, run_here, server_python, write_lines

app = load_script("data", "app")
COLUMNS = ("--text_column", "问题", "--label_column", "类别")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The table of README.md: two labels with ten rows each."""
    path = tmp_path_factory.mktemp("app") / "my table.csv"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    path.write_text(re.search("```csv\n(.*?)```", readme, re.DOTALL)[1], encoding="utf-8")
    return path


def start(output, *options):
    """data/app.py in a process of its own, whose output goes to a file."""
    with open(output, "w") as stream:
        return subprocess.Popen([sys.executable, "data/app.py", *map(str, options)], cwd=ROOT, stdout=stream, stderr=stream,
                                env={**os.environ, "OMP_NUM_THREADS": "1"},  # as helpers.run
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's jobs ignore it


def wait_for(process, output, is_there):
    """Wait until is_there() is true. UserErrors and others of the process fail here."""
    while not (found := is_there()):
        assert process.poll() is None, output.read_text(encoding="utf-8")
        time.sleep(0.05)
    return found


def test_make_hands_its_parameters_on():
    words = ["make", "--dry-run", "--no-print-directory", "app"]
    process = subprocess.run([*words, "TABLE=my table.csv", "TEXT=问题", "LABEL=类别", "MODEL=zh", "WAY=index", "OUT=o", "PORT=1",
                              "SERVE=0"], cwd=ROOT, encoding="utf-8", capture_output=True)
    command = " ".join(process.stdout.replace("\\\n", " ").split())
    assert process.returncode == 0 and command.endswith(
        'data/app.py --table_file "my table.csv" --text_column "问题" --label_column "类别" --model "zh" --way index '
        '--output_dir "o" --port 1 --no_serve'), process.stderr
    process = subprocess.run(words, cwd=ROOT, encoding="utf-8", capture_output=True)
    assert process.returncode == 2 and "expected make app TABLE=" in process.stderr


def test_few_rows_become_an_index_that_answers_and_is_not_made_again(table, tiny_model, tmp_path):
    server_python("simple-serving")
    output, folder = tmp_path / "output", tmp_path / "out"
    options = ["--table_file", table, *COLUMNS, "--model", tiny_model, "--output_dir", folder]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert_user_error(run_here(app.main, *options, "--port", port), f"--port {port}: cannot listen", "expected a free port")
    assert not folder.exists()
    process = start(output, *options, "--port", port)
    try:
        [url] = wait_for(process, output, lambda: re.findall(r"^\d\. service: (\S+) is open", output.read_text(), re.MULTILINE))
        assert url == f"http://127.0.0.1:{port}/"
        wait_for(process, output, lambda: "add a label" in output.read_text())
        with open_url(url) as answer:
            assert b"<html" in answer.read()
        data = json.dumps({"data": {"text": ["拔一颗智齿多少钱", "头疼怎么办"]}}).encode()
        request = urllib.request.Request(f"{url}predict", data, {"Content-Type": "application/json"})
        with open_url(request) as answer:
            assert [result["label"] for result in json.load(answer)["result"]] == ["费用", "治疗"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.terminate()
        process.wait(60)
    said = output.read_text(encoding="utf-8")
    assert re.findall(r"^\d\. (\w+) \.\.\..* done in ", said, re.MULTILINE) == ["table", "training", "export", "index", "report"]
    assert re.search(r"^Right: \d of 4 test rows, .*\nTF-IDF \+ logistic regression: ", said, re.MULTILINE)

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = run_here(app.main, *options, "--no_serve")
    assert again.returncode == 0 and len(re.findall(r"^\d\. \w+: .* is there$", again.stdout, re.MULTILINE)) == 5
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    changed = table.with_name("changed.csv")
    changed.write_text(table.read_text(encoding="utf-8") + "牙套多少钱,费用\n", encoding="utf-8")
    refused = run_here(app.main, "--table_file", changed, *options[2:], "--no_serve", "--way", "classifier")
    assert_user_error(refused, f"{folder}: was made with another table, way, expected the same, another --output_dir")


def test_more_rows_become_a_classifier_whose_stopped_training_goes_on(tiny_model, tmp_path):
    rows = [line.split("\t") for line in read_lines(ROOT / "data/train.txt")]
    write_lines(tmp_path / "rows.csv", ["text,label"] + [f'"{text}",{label}' for wanted in ("医疗费用", "病因分析")
                for text, label in [row for row in rows if row[1] == wanted][:30] if '"' not in text])
    output, folder = tmp_path / "output", tmp_path / "out"
    options = ["--table_file", tmp_path / "rows.csv", "--model", tiny_model, "--output_dir", folder, "--no_serve"]
    process = start(output, *options)
    wait_for(process, output, lambda: list(folder.glob("model/checkpoint-*/trainer_state.json")))
    process.terminate()
    assert process.wait(60) == 143 and "The same command goes on from here." in output.read_text()
    assert not (folder / "model/trainer_state.json").exists()

    process = start(output, *options)
    said = (process.wait(300), output.read_text(encoding="utf-8"))
    assert said[0] == 0 and "1. table: " in said[1] and "report.html" in said[1], said
    assert "going on after step" in (folder / "logs/training.log").read_text(encoding="utf-8")
    assert json.loads((folder / "app.json").read_text(encoding="utf-8"))["way"] == "classifier"
    assert (folder / "report/report.html").exists() and (folder / "export/float32.onnx").exists()


def test_bad_tables_are_said_in_the_words_of_their_stage_and_can_be_mended(table, tmp_path):
    options = ["--output_dir", tmp_path / "out", "--no_serve"]
    wrong = run_here(app.main, "--table_file", table, "--text_column", "文本", *options)
    assert_user_error(wrong, "--text_column: there is no column '文本', expected one of '问题', '类别'")
    assert wrong.stderr.count("\n") == 1 and wrong.stdout == "1. table ... failed\n"
    # in the same folder, since nothing is made of the first table
    write_lines(tmp_path / "one.csv", ["问题,类别", "头疼怎么办,治疗", "牙疼怎么办,治疗"])
    assert_user_error(run_here(app.main, "--table_file", tmp_path / "one.csv", *options), "only one label")
    write_lines(tmp_path / "few.csv", ["问题,类别", "头疼怎么办,治疗", "拔牙多少钱,费用"])
    assert_user_error(run_here(app.main, "--table_file", tmp_path / "few.csv", *options), "no label has two rows")
    missing = run_here(app.main, "--table_file", tmp_path / "none.csv", "--output_dir", tmp_path / "new", "--no_serve")
    assert_user_error(missing, "none.csv: file not found, expected a table")
    assert not (tmp_path / "new").exists()
    (tmp_path / "out/bad_case.txt").touch()  # a result without its record
    (tmp_path / "out/app.json").write_text("{}")
    assert_user_error(run_here(app.main, "--table_file", table, *options), "out: was made with another table, ")
    (tmp_path / "mine").mkdir()
    write_lines(tmp_path / "mine/train.txt", ["mine"])
    assert_user_error(run_here(app.main, "--table_file", table, "--output_dir", tmp_path / "mine", "--no_serve"),
                      "holds files that are not of such a run")
    assert read_lines(tmp_path / "mine/train.txt") == ["mine"]
