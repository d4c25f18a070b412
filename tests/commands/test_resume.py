"""--resume of predict.py and deploy/predictor/infer.py: killed in mid-run, going on, and what is refused."""

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pyarrow
import pytest
from pyarrow import parquet

import predict
from helpers import ROOT, assert_user_error, load_script, read_lines, run_here, write_lines
from textcls.runtime import predictions
from textcls.runtime.converted import converted_path

infer = load_script("deploy/predictor", "infer")
TEXTS = [line.split("\t")[0] for line in read_lines(ROOT / "data/train.txt")]
MANY = [f"{TEXTS[number % len(TEXTS)][:6]} {number}" for number in range(3 * 8192 + 100)]


def command_of(script, checkpoint, exported, data, output, *more):
    """The words of a command line that labels a file."""
    model = ["--params_path", checkpoint, "--device", "cpu"] if script == "predict.py" else ["--model_path_prefix", exported]
    return [*model, "--dataset_dir", data.parent, "--data_file", data.name, "--output_file", output, "--batch_size", 256, *more]


def kill_after_parts(command, folder, count):
    """Run a command line, and kill it with SIGKILL when so many parts are whole."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not (folder / "SHA256SUMS").exists() or len(read_lines(folder / "SHA256SUMS")) < count:
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("script, name, options", [
    ("predict.py", "out.jsonl.gz", ["--output_format", "jsonl", "--top_k", 2]),
    ("deploy/predictor/infer.py", "out.parquet", ["--output_format", "parquet", "--num_threads", 1])])
def test_a_killed_run_goes_on_to_the_same_bytes(script, name, options, checkpoint, exported, tmp_path):
    if script == "predict.py":
        data = tmp_path / "many.txt.gz"
        data.write_bytes(gzip.compress("".join(f"{text}\n" for text in MANY).encode()))
    else:
        data = tmp_path / "many.parquet"
        parquet.write_table(pyarrow.table({"id": range(len(MANY)), "text": MANY}), data)
    main = predict.main if script == "predict.py" else infer.main
    output, folder = tmp_path / name, tmp_path / f"{name}.parts"
    command = command_of(script, checkpoint, exported, data, output, "--resume", *options)
    kill_after_parts([script, *command], folder, 2)
    assert not output.exists()
    done = read_lines(folder / "SHA256SUMS")
    for line in done:
        digest, part = line.split("  ")
        assert hashlib.sha256((folder / part).read_bytes()).hexdigest() == digest and len(read_lines(folder / part)) == 8192
    if script == "predict.py":  # a part that is damaged is made anew, and what comes before it is kept
        (folder / "part-00001").write_bytes((folder / "part-00001").read_bytes()[:-1])
        (folder / ".part-00002.0123abcd.part").write_text("half")
    process = run_here(main, *command)
    assert process.returncode == 0, process.stderr
    whole = 1 if script == "predict.py" else len(done)
    assert f"--resume: going on behind {whole} whole parts in {folder}." in process.stderr
    assert ("part-00001 is missing or not whole" in process.stderr) == (script == "predict.py")
    assert not folder.exists()
    resumed = output.read_bytes()
    process = run_here(main, *[word for word in command if word != "--resume"])
    assert process.returncode == 0 and output.read_bytes() == resumed, process.stderr
    if script != "predict.py":
        found = parquet.read_table(output)
        assert found["id"].to_pylist() == list(range(len(MANY))) and found["text"].to_pylist() == MANY


@pytest.fixture
def begun(checkpoint, tmp_path, monkeypatch):
    """Function that runs predict.py on 110 texts, 50 a part; an earlier run with --resume has ended when all parts were there."""
    monkeypatch.setattr(predictions, "CHUNK", 50)
    write_lines(tmp_path / "data.txt", TEXTS[:110])
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))

    def label(*options):
        return run_here(predict.main, *command_of("predict.py", model, None, tmp_path / "data.txt", tmp_path / "out.csv",
                                                  "--output_format", "csv", *options))

    with monkeypatch.context() as patch:
        patch.setattr(predictions, "open_output", None)  # ends the run when all parts are there
        with pytest.raises(TypeError):
            label("--resume")
    assert sorted(os.listdir(tmp_path / "out.csv.parts")) == ["SHA256SUMS", "part-00000", "part-00001", "part-00002", "run.json"]
    label.folder, label.model = tmp_path, model
    return label


def test_another_input_model_or_option_is_refused(begun):
    folder = begun.folder / "out.csv.parts"
    refusal = f"--resume: {folder} is of a run with "

    def refused(message, *options):
        process = begun("--resume", *options)
        assert_user_error(process, refusal + message, "expected what it had, or that folder removed to begin anew")
        assert len(process.stderr.splitlines()) == 1 and not (begun.folder / "out.csv").exists()

    refused("--top_k 1, now 2", "--top_k", 2)
    refused("--threshold 0.0, now 0.5", "--threshold", 0.5)
    write_lines(begun.folder / "data.txt", [*TEXTS[:109], "换了一条"])
    refused("another input (")
    write_lines(begun.folder / "data.txt", TEXTS[:110])
    (begun.model / "config.json").write_text((begun.model / "config.json").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    refused("another model (")
    process = begun()  # without --resume nothing is different
    assert process.returncode == 0 and len(read_lines(begun.folder / "out.csv")) == 111 and folder.is_dir(), process.stderr


def test_all_parts_whole_need_no_model_and_lost_records_begin_anew(begun, monkeypatch):
    folder, output = begun.folder / "out.csv.parts", begun.folder / "out.csv"
    copy = shutil.copytree(folder, begun.folder / "copy")
    (begun.folder / "float32.onnx").touch()
    for dtype in ("int8", "fp16"):  # of another run, and no part of the model
        shutil.copy(begun.folder / "float32.onnx", begun.model / os.path.basename(
            converted_path(str(begun.folder / "float32.onnx"), dtype)))
    with monkeypatch.context() as patch:
        patch.setattr(predict, "predict_known", None)  # would be called for the first text
        process = begun("--resume")
    assert process.returncode == 0 and "going on behind 3 whole parts" in process.stderr, process.stderr
    expected = output.read_bytes()
    output.unlink()
    for damage in (lambda: (folder / "SHA256SUMS").unlink(), lambda: (folder / "SHA256SUMS").write_text("x"),
                   lambda: (folder / "part-00000").unlink()):
        shutil.copytree(copy, folder)
        damage()
        process = begun("--resume")
        assert process.returncode == 0 and "going on" not in process.stderr and output.read_bytes() == expected, process.stderr
    shutil.copytree(copy, folder)
    (folder / "run.json").unlink()
    assert_user_error(begun("--resume"), f"{folder} holds no run.json, expected the folder of an earlier run, or none")
    (folder / "run.json").write_text("{")
    assert_user_error(begun("--resume"), "run.json:1: not JSON")
    shutil.rmtree(folder)
    folder.write_text("a file")
    assert_user_error(begun("--resume"), "is no folder")


def test_what_cannot_be_resumed(checkpoint, exported, tmp_path, monkeypatch):
    write_lines(tmp_path / "data.txt", TEXTS[:3])
    common = ["--dataset_dir", tmp_path, "--resume"]
    for main, model in ((predict.main, ["--params_path", checkpoint]), (infer.main, ["--model_path_prefix", exported])):
        for options in (["--data_file", "-", "--output_file", tmp_path / "out"], ["--output_file", "-"]):
            assert_user_error(run_here(main, *model, *common, *options), "--resume needs a file as --data_file and one as")
    assert_user_error(run_here(infer.main, "--model_path_prefix", exported, *common), "--resume needs a file")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    process = run_here(predict.main, "--params_path", checkpoint, *common, "--output_file", tmp_path / "out")
    assert_user_error(process, "--resume works in a single process")
    assert os.listdir(tmp_path) == ["data.txt"]


def test_only_one_run_works_on_the_parts(begun):
    pytest.importorskip("fcntl")
    run = json.loads((begun.folder / "out.csv.parts/run.json").read_text(encoding="utf-8"))
    assert set(run) == {"input", "model", "options"} and re.fullmatch(r"\d+ bytes, SHA-256 [0-9a-f]{16}", run["input"])
    with predictions.open_parts(str(begun.folder / "out.csv"), run) as parts:
        assert parts.count == 3
        assert_user_error(begun("--resume"), "out.csv.parts: another run is writing there, expected another --output_file")
