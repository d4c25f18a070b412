"""export_model.py --onnx and deploy/predictor: agreement of all paths, INT8, its cache, refusals, no Paddle."""

import csv
import json
import logging
import os
import re
import shutil
import threading

import numpy as np
import openpyxl
import pytest

import export_model
from helpers import (
    ROOT,
    assert_paths_agree,
    assert_user_error,
    load_script,
    read_lines,
    run,
    run_here,
    thousand_texts,
    write_lines,
)
from textcls.common.errors import UserError
from textcls.common.probabilities import softmax
from textcls.common.texts import TEXT, TEXT_PATTERN
from textcls.data.tokens import model_inputs, pad_batch
from textcls.runtime.converted import converted_path
from textcls.runtime.predictor import Predictor
from textcls.runtime.quantize import SCHEMES, Scheme, to_fp16, to_int8

script = load_script("deploy/predictor", "infer")
INFER, DATA = "deploy/predictor/infer.py", ROOT / "data"
LABELS = read_lines(DATA / "label.txt")


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy", ignore=shutil.ignore_patterns("*.int8-*"))


def infer(folder, *more, stdin=""):
    """Run infer.py in this process, on data/data.txt unless told otherwise."""
    log = logging.getLogger("predictor")
    process = run_here(script.main, "--model_path_prefix", folder, "--dataset_dir", DATA, *more, stdin=stdin)
    log.handlers.clear()
    log.propagate = True
    return process


def test_checkpoint_graph_onnx_and_int8_agree_on_a_thousand_texts(checkpoint, exported):
    from textcls.data.tokens import tokenize
    from textcls.models.checkpoints import load_checkpoint
    from textcls.models.device import select_device
    from textcls.models.inference import predict_logits

    texts = [text for text in thousand_texts() if not TEXT.problem(text)]
    probs = assert_paths_agree(exported / "float32", texts, DATA / "dev.txt")
    select_device("cpu")
    loaded = load_checkpoint(str(checkpoint))
    expected = softmax(predict_logits(loaded, tokenize(texts, loaded.encode), 32), loaded.temperature)
    assert loaded.temperature != 1
    np.testing.assert_array_equal(probs.argmax(axis=1), expected.argmax(axis=1))
    np.testing.assert_allclose(probs, expected, atol=1e-4)
    assert len(texts) > 990 and len(set(expected.argmax(axis=1))) > 5


def test_the_onnx_model_is_prepared_for_speed(exported):
    import onnx

    graph = onnx.load(exported / "float32.onnx").graph
    makers = {node.output[0]: node.op_type for node in graph.node}
    products = [(node.input[1].split(".")[2], makers[node.input[0]]) for node in graph.node
                if node.op_type == "MatMul" and node.input[1].startswith("layers.1.")]
    assert products[:3] == [("q_proj", "Slice"), ("k_proj", "Add"), ("v_proj", "Add")]  # of the last layer; queries: [CLS] only
    assert [item.name for item in graph.output] == ["logits"]
    assert [item.name for item in graph.input] == ["input_ids", "token_type_ids"]
    assert os.path.getsize(exported / "float32.onnx") < 1.1 * os.path.getsize(exported / "float32.pdiparams")


def test_an_export_without_onnx_leaves_no_older_onnx_model(checkpoint, copy):
    shutil.copy(copy / "float32.onnx", converted_path(str(copy / "float32.onnx"), "int8"))
    process = run_here(export_model.main, "--params_path", checkpoint, "--output_path", copy)
    assert process.returncode == 0, process.stderr
    assert not [name for name in os.listdir(copy) if name.endswith(".onnx")]
    assert_user_error(infer(copy), "no ONNX model here",
                      f"python export_model.py --params_path ./checkpoint/ --output_path {copy} --onnx")

WITHOUT_PADDLE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("paddle", "paddlenlp", "paddle2onnx"):
            raise AssertionError(name + " imported")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert "libpaddle" not in open("/proc/self/maps").read()
print("no Paddle", file=sys.stderr)
"""


def test_no_paddle_is_imported_and_an_ascii_terminal_is_no_obstacle(copy):
    """In a process of its own; fp32 runs, too, as INT8 is compared with it."""
    for command, *options in ((INFER, "--dataset_dir", DATA), ("few-shot/infer.py", "--data_dir", DATA)):
        process = run("-c", WITHOUT_PADDLE, command, "--model_path_prefix", copy, "--use_quantize", *options,
                      env={"PYTHONIOENCODING": "ascii"})
        assert process.returncode == 0 and process.stderr.endswith("no Paddle\n"), process.stderr
        texts = [line.partition(": ")[2] for line in process.stdout.split("\n") if line.startswith("input data: ")]
        assert texts == read_lines(DATA / "data.txt")


def test_all_formats_say_what_predict_says(predicted, exported, tmp_path):
    expected = predicted[1][:30]
    write_lines(tmp_path / "texts", predicted[0][:30])
    options = ["--dataset_dir", tmp_path, "--data_file", "texts"]
    for name in ("out.jsonl", "out.csv", "out.xlsx"):
        output = ["--output_format", name[4:], "--top_k", 3, "--output_file", tmp_path / name]
        process = infer(exported / "float32", *options, *output)
        assert process.returncode == 0 and process.stdout == "", process.stderr
        assert f"Prediction results save in {tmp_path / name}." in process.stderr
    rows = [json.loads(line) for line in read_lines(tmp_path / "out.jsonl")]
    sheet = openpyxl.load_workbook(tmp_path / "out.xlsx").active.iter_rows(min_row=2, values_only=True)
    assert [line[:3] for line in sheet] == [(row["text"], row["label"], row["probability"]) for row in rows]
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    for row, line, answer in zip(rows, table, expected):
        assert (row["text"], row["label"]) == (line["text"], line["label"]) == (answer["text"], answer["label"])
        assert [top["label"] for top in row["top_k"]] == [top["label"] for top in answer["top_k"]]
        assert row["probability"] == float(line["probability"]) == pytest.approx(answer["probability"], abs=2e-5)
    assert len(rows) == len(table) == len(expected) == 30
    blocks = infer(exported, *options).stdout.split("-" * 29 + "\n")
    assert blocks[:-1] == [f"input data: {row['text']}\nlabels: {row['label']}\n" for row in expected]
    write_lines(tmp_path / "one", predicted[0][:1])
    top = ", ".join(f"{item['label']} ({item['probability']:.6f})" for item in rows[0]["top_k"][:2])
    process = infer(exported, "--dataset_dir", tmp_path, "--data_file", "one", "--top_k", 2)
    assert process.stdout == f"input data: {predicted[0][0]}\nlabels: {top}\n{'-' * 29}\n"


def test_streams_keep_the_order_over_chunks(exported, tmp_path):
    """More than one chunk of 8192 texts, from standard input to standard output."""
    words = [line.split("\t")[0] for line in read_lines(DATA / "train.txt")]
    texts = [f"{words[number % len(words)][:number % 9 + 1]} {number}" for number in range(8192 + 50)]
    process = infer(exported, "--data_file", "-", "--output_file", "-", stdin="\n".join(texts))
    assert process.returncode == 0, process.stderr
    lines = process.stdout.split("\n")[1:-1]
    assert [line.split("\t")[0] for line in lines] == texts
    labels, _ = Predictor(exported, batch_size=100)(texts[::-1])
    assert sum(line.split("\t")[1] != label for line, [label] in zip(lines, labels[::-1])) <= 2  # ties in the last bit


def test_api(exported):
    predictor = Predictor(exported)
    texts = [line.split("\t")[0] for line in read_lines(DATA / "dev.txt")[:40]] + ["长" * 500]
    labels, probs = predictor(texts, top_k=3)
    everything = predictor.probabilities(texts)
    assert probs.shape == (41, 3) and everything.shape == (41, 11) and probs.dtype == np.float32
    np.testing.assert_allclose(everything.sum(axis=1), 1, atol=1e-5)
    for text, best, row in zip(texts, labels, probs):
        assert row.tolist() == sorted(row, reverse=True) and best[0] == LABELS[everything[texts.index(text)].argmax()]
        alone = predictor([text])
        assert alone[0] == [best[:1]] and alone[1][0, 0] == pytest.approx(row[0], abs=1e-5)
    assert predictor(text for text in texts[:2])[0] == [best[:1] for best in labels[:2]]
    nothing = predictor([], top_k=2)
    assert nothing[0] == [] and nothing[1].shape == (0, 2)
    for wrong, error in (("text", TypeError), ([1], TypeError), ([None], TypeError), (["好", "\x1c"], ValueError)):
        with pytest.raises(error):
            predictor(wrong)
    for top_k in (0, 12):
        with pytest.raises(ValueError):
            predictor(texts, top_k=top_k)


@pytest.mark.parametrize("text, problem", [
    ("头疼", None), ("a\tb\nc", None), ("\u200b", None), ("😀", None), ("", "empty or blank"), (" \u3000\t\n", "empty or blank"),
    ("\x1c", "empty or blank"), ("a\0b", "a NUL character"), ("a\ud83d", "a lone surrogate (invalid UTF-8)")])
def test_what_a_text_is(exported, text, problem):
    assert TEXT.problem(text) == problem
    assert bool(re.search(TEXT_PATTERN, text)) == (problem is None) or "surrogate" in problem  # which no schema can say
    if problem is None:
        assert len(Predictor(exported)([text])[0]) == 1
    else:
        with pytest.raises(ValueError, match=f"^text 1: {re.escape(problem)}, expected a text$"):
            Predictor(exported)(["好", text])


def test_several_threads_share_a_predictor(exported):
    predictor = Predictor(exported, num_threads=2)
    texts = [text for text in thousand_texts() if not TEXT.problem(text)][:320]
    parts = [texts[start:start + 40] for start in range(0, 320, 40)]
    expected, found = [predictor.probabilities(part) for part in parts], {}

    def work(first):
        for index in range(first, first + 8):
            found[first, index % 8] = predictor.probabilities(parts[index % 8])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 64
    for (_, index), probs in found.items():
        np.testing.assert_array_equal(probs, expected[index])


def test_int8_quantizes_and_is_cached(copy, monkeypatch):
    options = ["--use_quantize", "--output_file", "-", "--output_format", "tsv"]
    first = infer(copy, *options)
    assert first.returncode == 0, first.stderr
    cache = converted_path(str(copy / "float32.onnx"), "int8")
    assert "INT8: 12 of 14 matrix products in integers" in first.stderr
    assert "Comparing INT8 with fp32 on 264 texts" in first.stderr and "% of the labels as with fp32" in first.stderr
    assert os.path.getsize(cache) < 0.4 * os.path.getsize(copy / "float32.onnx")
    before = os.stat(cache)
    second = infer(copy, *options)
    assert "Quantizing" not in second.stderr and "Comparing" not in second.stderr
    assert "% of the labels as with fp32" in second.stderr
    assert second.stdout == first.stdout and os.stat(cache).st_mtime_ns == before.st_mtime_ns
    with open(cache, "r+b") as file:  # as a copy that broke off would leave it
        file.truncate(before.st_size // 2)
    third = infer(copy, *options)
    assert "converting again" in third.stderr and third.stdout == first.stdout
    assert os.path.getsize(cache) == before.st_size
    os.rename(copy / "float32.onnx", copy / "old.onnx")
    change_classifier(copy / "old.onnx", copy / "float32.onnx")
    fourth = infer(copy, *options)  # another model: the old cache is not used for it
    assert "Quantizing" in fourth.stderr and fourth.stdout != first.stdout
    monkeypatch.setitem(SCHEMES, "int8", SCHEMES["int8"]._replace(version=2))  # as a suite whose quantizing has changed
    assert "Quantizing" in infer(copy, *options).stderr and "Quantizing" not in infer(copy, *options).stderr
    assert [name for name in os.listdir(copy) if ".int8-" in name] == [
        os.path.basename(converted_path(str(copy / "float32.onnx"), "int8"))]  # those of before are gone
    assert not [name for name in os.listdir(copy) if name.endswith(".part")]


def test_an_entry_of_schemes_brings_its_option_its_conversion_and_its_comparison(copy, monkeypatch):
    def convert(path):
        with open(path, "rb") as file:
            return file.read()

    monkeypatch.setitem(SCHEMES, "int4", Scheme("--use_int4", "INT4 weights", convert=convert, version=1, is_compared=True))
    plain, converted = (infer(copy, "--output_file", "-", *more) for more in ((), ("--use_int4",)))
    assert (converted.returncode, converted.stdout) == (0, plain.stdout), converted.stderr
    assert "INT4 on 264 texts of a calibration file: 100.00% of the labels as with fp32" in converted.stderr
    assert os.path.isfile(converted_path(str(copy / "float32.onnx"), "int4"))
    monkeypatch.setattr("textcls.runtime.predictor.LARGEST_DROP", -1)
    assert_user_error(infer(copy, "--use_int4"), "--use_int4: INT4 costs 0.00 points of accuracy")
    assert_user_error(infer(copy, "--use_int4", "--use_quantize"), "--use_quantize: not allowed with argument --use_int4")
    assert "--use_int4" in run_here(load_script("few-shot", "infer").main, "--help").stdout
    assert "--use_int4" in run_here(load_script("retrieval_based", "predict").main, "--help").stdout


def change_classifier(path, output):
    """Copy an ONNX model with its classes turned round."""
    import onnx

    model = onnx.load(path)
    matrix = {node.output[0]: node for node in model.graph.node if node.op_type == "MatMul"}
    last = [node for node in model.graph.node if node.op_type == "MatMul"][-1]
    assert last is matrix[last.output[0]]
    for tensor in model.graph.initializer:
        if tensor.name == last.input[1]:
            weights = onnx.numpy_helper.to_array(tensor)[:, ::-1].copy()
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights, tensor.name))
    onnx.save(model, output)


def test_int8_that_loses_accuracy_is_refused_unless_allowed(copy, tmp_path):
    change_classifier(copy / "float32.onnx", tmp_path / "wrong.onnx")
    cache = converted_path(str(copy / "float32.onnx"), "int8")
    with open(cache, "wb") as file:  # sound, but not compared with fp32 yet
        file.write(to_int8(str(tmp_path / "wrong.onnx")))
    for _ in range(2):  # the second time the figures come from the cache
        assert_user_error(infer(copy, "--use_quantize"), "--use_quantize: INT8 costs", "points of accuracy, expected at most 0.5")
    process = infer(copy, "--use_quantize", "--allow_accuracy_drop")
    assert process.returncode == 0 and "INT8 costs" in process.stderr


def test_a_folder_that_cannot_be_written_is_no_obstacle(copy):
    os.makedirs(converted_path(str(copy / "float32.onnx"), "int8"))  # in the place of the cache (root may write anywhere)
    process = infer(copy, "--use_quantize", "--output_file", "-")
    assert process.returncode == 0 and len(process.stdout.split("\n")) == 2 + len(read_lines(DATA / "data.txt"))
    assert "the converted model is not kept" in process.stderr


def test_fp16_conversion_keeps_types_and_answers(exported):
    import onnxruntime

    model = to_fp16(str(exported / "float32.onnx"))
    assert len(model) < 0.55 * os.path.getsize(exported / "float32.onnx")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])  # it casts; speed is the GPU's
    assert {item.type for item in session.get_inputs()} == {"tensor(int64)"}
    predictor, texts = Predictor(exported), read_lines(DATA / "data.txt")
    batch = pad_batch([row["input_ids"] for row in predictor.tokenize(texts)], 0)
    [logits] = session.run(None, model_inputs(batch, ["input_ids", "token_type_ids"]))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(softmax(logits, predictor.temperature), predictor.probabilities(texts), atol=0.02)


def test_perf_prints_accuracy_and_speed(exported):
    process = infer(exported, "--perf", "--num_threads", 1)
    assert process.returncode == 0, process.stderr
    predicted, _ = Predictor(exported)([line.split("\t")[0] for line in read_lines(DATA / "dev.txt")])
    right = [label == line.split("\t")[1] for [label], line in zip(predicted, read_lines(DATA / "dev.txt"))]
    accuracy, samples, spread = process.stdout.split("\n")[:3]
    assert accuracy == f"acc: {np.mean(right) * 100:.2f}"
    assert samples.startswith("sample nums: 264, time: ") and samples.endswith(" ms")
    assert spread.startswith("median of 5 runs; fastest ") and spread.endswith(" texts/s")
    assert "acc: " in infer(exported, "--perf", "--perf_dataset", "test").stdout


def test_wrong_calls_are_refused(exported, tmp_path):
    output = ["--output_file", tmp_path / "out"]
    refused = run(INFER, "--model_path_prefix", tmp_path / "none/float32", "--dataset_dir", DATA, *output)
    assert_user_error(refused, "none/float32: no such folder or model")
    assert_user_error(infer(tmp_path, *output), "deploy.json is missing")
    assert_user_error(infer(exported / "pruned_model", *output), "pruned_model: no such model", "float32")
    assert_user_error(infer(exported, "--device", "gpu", *output), "--device gpu: this onnxruntime is a CPU build")
    assert_user_error(infer(exported, "--use_fp16", *output), "--use_fp16: a CPU is not faster with it")
    assert_user_error(infer(exported, "--device", "gpu", "--use_quantize", *output), "--use_quantize: INT8 is for the CPU")
    assert_user_error(infer(exported, "--top_k", 12, "--output_format", "csv", *output), "--top_k 12: the model has 11 classes")
    assert_user_error(infer(exported, "--max_seq_length", 513, *output),
                      "--max_seq_length 513: more than the model's positions, expected at most 512")
    assert_user_error(infer(exported, "--max_seq_length", 2, *output), "--max_seq_length 2: expected 3 or more")
    assert_user_error(infer(exported, "--max_seq_length", 0, *output), "--max_seq_length 0: expected 3 or more")
    assert_user_error(infer(exported, "--data_file", "none.txt", *output), "none.txt: file not found")
    assert_user_error(infer(exported, "--data_file", "-", *output, stdin="好\n\na\tb\n"), "standard input:2: empty line",
                      "standard input:3: a tab")
    assert_user_error(infer(exported, "--output_format", "csv"), "--output_format csv needs --output_file")
    assert_user_error(infer(exported, "--num_threads", 100000), "--num_threads: '100000': expected a whole number, 1 to 1024")
    process = run("-c", f"import os, sys; os.close(0); os.execv(sys.executable, [sys.executable, {INFER!r}, "
                  f"'--model_path_prefix', {str(exported)!r}, '--data_file', '-'])")
    assert_user_error(process, "standard input is closed")
    shutil.copytree(DATA, tmp_path / "data")
    write_lines(tmp_path / "data/label.txt", LABELS[::-1])
    assert_user_error(infer(exported, "--dataset_dir", tmp_path / "data", *output), "label.txt:1: label '其他' where")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named():
    code = "import runpy, sys; sys.modules['onnxruntime'] = None; sys.argv.pop(0); runpy.run_path(sys.argv[0], {}, '__main__')"
    assert_user_error(run("-c", code, INFER, "--data_file", "-"),
                      "the package onnxruntime is missing, expected `pip install -r deploy/predictor/requirements.txt`")


def change_deploy(folder, **changes):
    """Change entries of a deploy.json; None removes one."""
    deploy = {**json.loads((folder / "deploy.json").read_text()), **changes}
    (folder / "deploy.json").write_text(json.dumps({name: value for name, value in deploy.items() if value is not None}))


def test_lengths_up_to_the_models_positions(copy):
    """Also of an export of before, which does not name them: there no more than in training."""
    long = "长" * 600
    assert Predictor(copy, max_seq_length=512).tokenize([long]).lengths.tolist() == [512]
    assert Predictor(copy, max_seq_length=512)([long])[1].shape == (1, 1)
    change_deploy(copy, max_positions=None, output=None)
    assert Predictor(copy, max_seq_length=64).tokenize([long]).lengths.tolist() == [64]
    with pytest.raises(UserError, match="--max_seq_length 65: this export does not say .* the 64 of training, or a new export"):
        Predictor(copy, max_seq_length=65)


def test_what_is_no_classifier_is_refused(copy):
    assert json.loads((copy / "deploy.json").read_text())["output"] == "class_logits"
    change_deploy(copy, output="sentence_vectors")
    with pytest.raises(UserError, match="the output of this model is 'sentence_vectors', expected a classifier, 'class_logits'"):
        Predictor(copy)


def test_any_graph_from_ids_to_logits_is_served(tmp_path):
    """A graph that is no BERT: it counts the words of each class. Nothing but input_ids, no special tokens, other names."""
    from onnx import TensorProto, helper, numpy_helper, save
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "red", "green", "blue", "other"]
    table = np.array([[0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3], [0, 0, 0]], np.float32)  # [words, classes]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["scores"]),
             helper.make_node("ReduceSum", ["scores", "axis"], ["sums"], keepdims=0)]
    graph = helper.make_graph(
        nodes, "counts", [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["texts", "length"])],
        [helper.make_tensor_value_info("sums", TensorProto.FLOAT, ["texts", 3])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axis")])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7), str(tmp_path / "any.onnx"))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="other"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_lines(tmp_path / "label.txt", ["R", "G", "B"])
    (tmp_path / "deploy.json").write_text(json.dumps({
        "output": "class_logits", "max_seq_length": 8, "max_positions": 8, "input_names": ["input_ids"], "num_labels": 3,
        "pad_token_id": 0, "onnx_file": "any.onnx"}))
    labels, probs = Predictor(tmp_path)(["red blue blue", "green", "red " * 8 + "blue " * 99, "none"], top_k=2)
    assert labels == [["B", "R"], ["G", "R"], ["R", "G"], ["R", "G"]]
    np.testing.assert_allclose(probs[1], softmax(np.array([[3, 0, 0]]))[0, :2], atol=1e-6)
    process = infer(tmp_path, "--dataset_dir", tmp_path, "--data_file", "-", "--output_file", "-", stdin="red green red\n")
    assert process.stdout.endswith("red green red\tR\n"), process.stderr


@pytest.mark.parametrize("name, content, message", [
    ("float32.onnx", b"damaged", "float32.onnx: ONNX Runtime cannot load it"),
    ("float32.onnx", None, "no ONNX model here; this command makes it: python export_model.py"),
    ("tokenizer.json", b"{", "tokenizer.json: cannot be read"),
    ("tokenizer.json", None, "tokenizer.json is missing"),
    ("label.txt", b"a\nb\n", "label.txt: 2 labels, expected the 11"),
    ("label.txt", None, "label.txt: file not found"),
    ("deploy.json", b"{}", "deploy.json: max_seq_length is None, expected a number"),
    ("deploy.json", b"[", "deploy.json:1: not JSON"),
    ("deploy.json", b'{"onnx_file": "../copy/float32.onnx"}', "onnx_file is '../copy/float32.onnx', expected the name of a file"),
    ("deploy.json", b'{"params_file": null}', "params_file is None, expected the name of a file in the same folder")])
def test_incomplete_folders_are_refused(copy, name, content, message):
    os.remove(copy / name)
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Predictor(copy)


def test_a_damaged_model_cannot_be_quantized(copy):
    (copy / "float32.onnx").write_bytes(b"damaged")
    with pytest.raises(UserError, match="float32.onnx: cannot be read"):
        Predictor(copy, dtype="int8")
