"""export_model.py: the exported folder stands alone and agrees with the checkpoint; ERNIE-M, end to end."""

import json
import os
import re
import shutil

import numpy as np

import predict
from export_model import main
from helpers import GRAPH, ROOT, assert_user_error, read_lines, run, run_here, write_lines


def export(checkpoint, output, *more):
    process = run_here(main, "--params_path", checkpoint, "--output_path", output, *more)
    assert process.returncode == 0, process.stderr
    return float(re.search(r"Largest logit difference between checkpoint and exported graph: (\S+)", process.stderr)[1])


def run_graph(folder, encode, texts):
    """Logits of the exported graph by Paddle Inference, one text at a time."""
    import paddle.inference as inference

    config = inference.Config(str(folder / f"float32{GRAPH[0]}"), str(folder / "float32.pdiparams"))
    config.disable_gpu()
    predictor = inference.create_predictor(config)
    logits = []
    for text in texts:
        ids = np.array([encode(text)], dtype=np.int64)
        for name in predictor.get_input_names():
            predictor.get_input_handle(name).copy_from_cpu(ids if name == "input_ids" else np.zeros_like(ids))
        predictor.run()
        logits.append(predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()[0])
    return np.array(logits)


def predicted(checkpoint, texts, folder):
    write_lines(folder / "texts.txt", texts)
    process = run_here(predict.main, "--params_path", checkpoint, "--dataset_dir", folder, "--data_file", "texts.txt",
                       "--output_file", folder / "out", "--output_format", "jsonl")
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in read_lines(folder / "out")]


def assert_agree(logits, rows, labels):
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert [labels[index] for index in probs.argmax(axis=1)] == [row["label"] for row in rows]
    np.testing.assert_allclose(probs.max(axis=1), [row["probability"] for row in rows], atol=1e-5)


def test_the_export_alone_gives_the_checkpoints_answers(checkpoint, exported, tmp_path):
    from tokenizers import Tokenizer

    folder = shutil.copytree(exported, tmp_path / "export")
    assert (folder / "float32.onnx").exists()
    assert export(checkpoint, folder) <= 1e-4  # over the old one, whose ONNX model goes
    assert not (folder / "float32.onnx").exists()
    assert {*(f"float32{ending}" for ending in GRAPH), "tokenizer.json", "vocab.txt",
            "tokenizer_config.json", "label.txt", "deploy.json"} <= set(os.listdir(folder))
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    deploy = json.loads((folder / "deploy.json").read_text())
    assert deploy["max_seq_length"] == 64 and deploy["input_names"] == ["input_ids", "token_type_ids"]
    assert deploy["model_type"] == "ernie" and deploy["num_labels"] == 11
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = read_lines(ROOT / "data/data.txt") + ["长" * 300, "😀 CT 检查×2～", "[SEP]x"]
    logits = run_graph(folder, lambda text: tokenizer.encode(text).ids, texts)
    assert_agree(logits / deploy["temperature"], predicted(checkpoint, texts, tmp_path), read_lines(folder / "label.txt"))


def test_wrong_folders_are_refused_and_nothing_is_left(checkpoint, tmp_path):
    assert_user_error(run("export_model.py", "--params_path", tmp_path / "no", "--output_path", tmp_path / "out"),
                      "no: no such folder")
    assert_user_error(run_here(main, "--params_path", checkpoint, "--output_path", tmp_path / "out", "--multilingual"),
                      "--multilingual:", "expected an ERNIE-M model")
    assert os.listdir(tmp_path) == []


def test_ernie_m_is_recognised_and_its_padding_is_masked(ernie_m, tmp_path):
    from paddlenlp.transformers import ErnieMTokenizer

    checkpoint = ernie_m / "checkpoint"
    assert export(checkpoint, tmp_path / "plain") <= 1e-4
    assert export(checkpoint, tmp_path / "flag", "--multilingual") <= 1e-4
    deploy = json.loads((tmp_path / "plain/deploy.json").read_text())
    assert deploy["input_names"] == ["input_ids"] and deploy["model_type"] == "ernie_m" and deploy["pad_token_id"] == 1
    assert {"sentencepiece.bpe.model", "vocab.txt"} <= set(os.listdir(tmp_path / "plain"))
    tokenizer = ErnieMTokenizer.from_pretrained(str(tmp_path / "plain"))
    texts = [line.split("\t")[0] for line in read_lines(ernie_m / "dev.txt")] + ["多" * 200]
    logits = run_graph(tmp_path / "plain", lambda text: tokenizer(text, max_length=64, truncation=True)["input_ids"], texts)
    # predict.py pads batches of 32, the graph above saw each text alone: they agree only if padding is masked
    assert_agree(logits / deploy["temperature"], predicted(checkpoint, texts, tmp_path), ["医疗费用", "病因分析"])


def test_a_damaged_export_never_replaces_a_good_one(checkpoint, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "export")
    before = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    (broken / "model_state.pdparams").write_bytes((checkpoint / "model_state.pdparams").read_bytes()[:1000])
    assert_user_error(run_here(main, "--params_path", broken, "--output_path", tmp_path / "export"),
                      "model_state.pdparams: damaged or not a Paddle file")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
