"""retrieval_based/train.py and export_model.py: loss, gradient cache, sampling, resumption, several processes, both engines."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import train as fine_tuning
from helpers import (
    ROOT,
    assert_same_weights,
    assert_user_error,
    launch,
    load_script,
    make_model,
    read_lines,
    run_here,
    weights,
    write_lines,
)
from textcls.common.errors import UserError
from textcls.data.tokens import TokenizedTexts
from textcls.models.checkpoints import load_checkpoint, load_model
from textcls.models.configs import SentenceOptions
from textcls.models.paddle_setup import paddle
from textcls.models.sentence_checkpoints import load_sentence_encoder
from textcls.retrieval.encoder import open_encoder
from textcls.runtime.exported import read_export
from textcls.training.sentence_training import WeightedBatchSampler, majority, retrieval_loss, top_columns

SCRIPT = ROOT / "retrieval_based/train.py"
SOME = [line.split("\t")[0] for line in read_lines(ROOT / "data/dev.txt")][:60] + ["长" * 300, "a", "😀 CT 检查×2～"]


script, export_script = load_script("retrieval_based", "train"), load_script("retrieval_based", "export_model")


@pytest.fixture(scope="module")
def model(make_once):
    """A model folder without weights."""
    return make_once("small_encoder", lambda folder: make_model(folder, num_hidden_layers=1, num_attention_heads=4))


@pytest.fixture(scope="module")
def rows(make_once):
    """90 training and 30 dev rows of the sample data, and labels, two of them with more texts."""
    def make(folder):
        for name, count in (("train.txt", 90), ("dev.txt", 30)):
            write_lines(folder / name, read_lines(ROOT / "data" / name)[:count])
        labels = read_lines(ROOT / "data/label.txt")
        write_lines(folder / "label.txt", [f"{labels[0]}=={labels[0]}的意思==说明", f"{labels[1]}==怎么治", *labels[2:]])

    return make_once("few_rows", make)


def words(model, data, output, **changes):
    options = {"model_name_or_path": model, "data_dir": data, "output_dir": output, "device": "cpu", "max_seq_length": 48,
               "learning_rate": "1e-3", "num_train_epochs": 2, "per_device_train_batch_size": 16, "report_to": "none", **changes}
    pairs = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
    return [word for pair in pairs for word in pair]


def trained(model, data, output, **changes):
    process = run_here(script.main, *words(model, data, output, **changes))
    assert process.returncode == 0, process.stderr
    return process


def make_trainer(model, rows, folder, **changes):
    """The SentenceTrainer that the script would train with, and the inputs of its first step."""
    made = {}

    def keep(trainer, args, resume_point):
        made["trainer"] = trainer
        raise UserError("kept")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train_and_save", keep)
        assert_user_error(run_here(script.main, *words(model, rows, folder, **changes)), "kept")
    trainer = made["trainer"]
    dataset = trainer.train_dataset
    return trainer, trainer.data_collator([dataset[index] for index in range(trainer.args.per_device_train_batch_size)])


def gradients(trainer, inputs):
    """What a training step leaves: (loss, {name: gradient})."""
    trainer.model.clear_gradients()
    loss = trainer.training_step(trainer.model, {name: paddle.to_tensor(value) for name, value in inputs.items()})
    return float(loss), {name: parameter.grad.numpy().copy() for name, parameter in trainer.model.named_parameters()
                         if parameter.grad is not None}


def loss_by_formula(texts, text_labels, columns, column_labels, margin, scale, weight, sizes):
    """Row by row, as the docstring of retrieval_loss says."""
    total = 0.0
    for size in sizes:
        own, names = (part[:, :size] / np.linalg.norm(part[:, :size], axis=1, keepdims=True) for part in (texts, columns))
        label_losses, text_losses = [], []
        for index, label in enumerate(text_labels):
            scores = [scale * (own[index] @ name - margin * (other == label)) for name, other in zip(names, column_labels)]
            right = scores[list(column_labels).index(label)]
            label_losses.append(np.log(np.exp(scores).sum()) - right)
            rest = [other for other in range(len(texts)) if other != index]
            sums = {other: scale * own[index] @ own[other] for other in rest}
            alike = [sums[other] for other in rest if text_labels[other] == label]
            if alike:
                text_losses.append(np.log(np.exp(list(sums.values())).sum()) - np.mean(alike))
        total += np.mean(label_losses) + weight * np.mean(text_losses)
    return total


def test_loss_is_the_formula_and_a_label_twice_is_no_negative():
    generator = np.random.default_rng(0)
    texts, columns = generator.normal(size=(6, 8)), generator.normal(size=(4, 8))
    text_labels, column_labels = np.array([5, 2, 5, 7, 2, 5]), np.array([2, 3, 5, 7])
    args = SimpleNamespace(margin=0.2, scale=30.0, text_loss_weight=0.7)
    found = retrieval_loss(paddle.to_tensor(texts, "float32"), text_labels, paddle.to_tensor(columns, "float32"), column_labels,
                           args, [3, 8])
    assert float(found) == pytest.approx(loss_by_formula(texts, text_labels, columns, column_labels, 0.2, 30.0, 0.7, [3, 8]),
                                         rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_cache_gives_the_gradients_of_the_plain_step(rows, tmp_path, dropout):
    model = make_model(tmp_path / "model", num_hidden_layers=1, num_attention_heads=4, hidden_dropout_prob=dropout,
                       attention_probs_dropout_prob=dropout)
    trainer, inputs = make_trainer(model, rows, tmp_path / "out", output_emb_size=24, matryoshka_dims=8, chunk_size=5)
    loss, cached = gradients(trainer, inputs)
    # the plain step: everything in one graph, chunks and their seeds as there
    trainer.model.clear_gradients()
    labels = inputs["labels"]
    column_labels, columns = trainer.choose_columns(labels)
    parts = trainer.split(inputs["input_ids"]) + trainer.split(columns)
    assert [len(part) for part in parts[:4]] == [5, 5, 5, 1] and sum(map(len, parts)) == 16 + len(set(labels[:, 0]))
    seeds = np.random.default_rng([trainer.args.seed, 0, 1]).integers(2**31, size=len(parts))
    vectors = paddle.concat([trainer.encode(part, seed) for part, seed in zip(parts, seeds)])
    plain_loss = retrieval_loss(vectors[:16], labels[:, 0], vectors[16:], column_labels, trainer.args, [8, 24])
    plain_loss.backward()
    plain = {name: parameter.grad.numpy() for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    assert cached.keys() == plain.keys() and loss == pytest.approx(float(plain_loss), rel=1e-5)
    assert_alike(cached, plain)
    if not dropout:  # and one chunk gives the same as four
        trainer.args.chunk_size = 0
        assert_alike(gradients(trainer, inputs)[1], plain)


def assert_alike(found, expected):
    """Gradients agree to 1e-5 of the largest of each parameter's."""
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5 * max(1, np.abs(value).max()), err_msg=name)


def test_dropout_is_on_after_an_evaluation_and_mined_labels_are_the_most_alike(model, rows, tmp_path):
    trainer, inputs = make_trainer(model, rows, tmp_path / "out", hard_negatives=2)
    first = [gradients(trainer, inputs)[0], gradients(trainer, inputs)[0]]
    assert first[0] == first[1]  # of the same step
    trainer.evaluate()
    trainer.state.global_step += 1
    assert gradients(trainer, inputs)[0] != first[0]
    chunk = trainer.split(inputs["input_ids"])[0]
    assert (trainer.encode(chunk, 1).numpy() != trainer.encode(chunk, 2).numpy()).any()

    trainer.mine_negatives(1)
    texts, names = trainer.encode_texts(trainer.train_dataset), trainer.encode_texts(trainer.label_texts.tokens)
    owners = [0, 0, 0, 1, 1, *range(2, 11)]
    for row, label in enumerate(trainer.train_dataset.labels[:, 0]):
        best = {other: max(value for owner, value in zip(owners, names @ texts[row]) if owner == other) for other in range(11)}
        others = sorted((other for other in best if other != label), key=best.get, reverse=True)[:2]
        assert trainer.negatives[row].tolist() == others
    columns, tokens = trainer.choose_columns(inputs["labels"])
    chosen = set(inputs["labels"][:, 0]) | set(trainer.negatives[:16].ravel())
    assert columns.tolist() == sorted(chosen) and len(tokens) == len(chosen)


def test_classes_are_drawn_as_asked_for():
    counts = np.array([400, 100, 4])
    labels = np.repeat([3, 5, 9], counts)
    dataset = TokenizedTexts(np.zeros(len(labels), np.int32), np.arange(len(labels) + 1),
                             np.stack([labels, np.arange(len(labels))], axis=1))
    for power, shares in ((0.0, [1, 1, 1]), (0.5, [20, 10, 2])):
        sampler = WeightedBatchSampler(dataset, 8, 1, 1, 0, False, power=power)
        drawn = np.concatenate(list(sampler))
        assert len(drawn) == len(labels) and set(drawn[labels[drawn] == 9]) == set(range(500, 504))
        np.testing.assert_allclose(np.bincount(labels[drawn])[[3, 5, 9]] / len(drawn), np.array(shares) / sum(shares), atol=0.06)
        turns = np.bincount(drawn, minlength=len(labels))[labels == 5]
        assert turns.max() - turns.min() <= 1  # no text again before each had its turn


def test_search_and_majority_are_those_of_a_brute_force_formula():
    generator = np.random.default_rng(1)
    queries, vectors = generator.normal(size=(1100, 4)).astype(np.float32), generator.normal(size=(30, 4)).astype(np.float32)
    indices, cosines = top_columns(queries, vectors, 5)
    right = np.argsort(-(queries @ vectors.T), axis=1)[:, :5]
    np.testing.assert_array_equal(indices, right)
    label_ids = np.arange(30) % 4
    sums = [[sum(np.exp(value / 0.05) for index, value in zip(row, values) if label_ids[index] == label) for label in range(4)]
            for row, values in zip(indices[:50], cosines[:50].astype(float))]
    np.testing.assert_array_equal(majority(cosines[:50], label_ids[indices[:50]]), np.argmax(sums, axis=1))


def test_killed_and_resumed_ends_as_if_never_interrupted(model, rows, tmp_path):
    """90 rows in batches of 16 make 6 steps an epoch: the kill comes within the second one, after negatives were mined."""
    changes = {"evaluate": "False", "save_steps": 4, "hard_negatives": 2, "chunk_size": 8, "num_train_epochs": 3}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    log = trained(model, rows, whole, **changes, logging_steps=1).stderr
    assert "global step 7, epoch: 2, batch: 1, loss: " in log and " step/s" in log
    process = subprocess.Popen([sys.executable, str(SCRIPT), *words(model, rows, killed, **changes)], stderr=subprocess.DEVNULL)
    while not (killed / "checkpoint-8").exists():
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = killed / "checkpoint-8"  # an older one may not have been deleted yet
    assert (resumed / "hard_negatives.npz").exists()
    assert_user_error(run_here(script.main, *words(model, rows, killed, **changes)), "did not finish")
    changes["resume_from_checkpoint"] = resumed
    assert_user_error(run_here(script.main, *words(model, rows, killed, **changes, pooling="cls")), "sentence_encoder is",
                      "expected the options it began with")
    trained(model, rows, killed, **changes)
    assert_same_weights(whole, killed)
    assert not (killed / "hard_negatives.npz").exists()


def test_two_processes_take_the_step_of_one(rows, tmp_path):
    """Without dropout; a large epsilon makes AdamW's step grow with the gradient, so that the weights show it."""
    model = make_model(tmp_path / "model", num_hidden_layers=1, num_attention_heads=4, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0)
    changes = {"max_steps": 2, "adam_epsilon": 1.0, "learning_rate": 1.0, "logging_steps": 1, "hard_negatives": 1}
    trained(model, rows, tmp_path / "one", **changes)
    process = launch(SCRIPT, *words(model, rows, tmp_path / "two", **changes | {"per_device_train_batch_size": 8}),
                     log_dir=tmp_path / "log")
    assert process.returncode == 0, process.stdout + process.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = weights(saved_untrained(model, tmp_path / "start"))
    assert max(np.abs(one[name] - start[name]).max() for name in one) > 0.01
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-5, err_msg=name)
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("one", "two")]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    results = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two")]
    assert results[0] == results[1]


def saved_untrained(model, folder):
    paddle.seed(1000)  # the default of --seed
    load_model(model, head="SentenceEncoder", sentence_options=SentenceOptions("mean", 0, [])).save_pretrained(str(folder))
    return folder


def test_command_of_older_editions_learns_and_its_export_agrees(model, tmp_path):
    """Options and numbers as published, but for the model, the length of the training and the device."""
    folder = tmp_path / "checkpoint"
    command = """--device cpu --save_dir {folder} --batch_size 24 --learning_rate 4E-3 --epochs 2
        --output_emb_size 32 --save_steps 50 --max_seq_length 384 --warmup_proportion 0.0 --margin 0.2 --recall_result_dir
        recall_result_dir --recall_result_file recall_result.txt --train_set_file {data}/train.txt --corpus_file {data}/label.txt
        --similar_text_pair {data}/dev.txt --evaluate True --recall_num 50 --hnsw_m 100 --hnsw_ef 100 --report_to none
        --hnsw_max_elements 1000000 --evaluate_result evaluate_result.txt --scale 30 --log_steps 10 --weight_decay 0.0
        --model_name_or_path {model} --per_device_eval_batch_size 64"""
    process = run_here(script.main, *(word.format(folder=folder, data=ROOT / "data", model=model) for word in command.split()),
                       cwd=tmp_path)  # split first: a path may have a space
    assert process.returncode == 0 and process.stderr.count("has no effect: ") == 7, process.stderr
    results = json.loads((folder / "eval_results.json").read_text())
    assert results["eval_accuracy"] > 0.6 and results["eval_recall@1"] > 0.6 and results["eval_recall@10"] >= 0.95
    assert f"recall@1={100 * results['eval_recall@1']:.3f}" in process.stderr

    check_export(folder, tmp_path / "output")


def check_export(folder, output):
    """The exported encoder, checkpoint and INT8 give the same vectors, and each command says where a model belongs."""
    process = run_here(export_script.main, "--params_path", folder / "model_state.pdparams", "--output_path", output,
                       "--output_emb_size", 0, "--model_name_or_path", "rocketqa-zh-dureader-query-encoder")
    assert process.returncode == 0 and "Largest vector difference" in process.stderr, process.stderr
    exported, checkpoint = open_encoder(output, num_threads=1), open_encoder(folder, device="cpu")
    assert exported[:3] == checkpoint[:3] == (load_sentence_encoder(folder).encoder_id, 32, 384)
    vectors = exported.encode(SOME)
    assert vectors.dtype == np.float32 and vectors.shape == (len(SOME), 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors, checkpoint.encode(SOME), atol=1e-5)
    np.testing.assert_allclose(vectors[:7], exported.encode_batch(SOME[:7]), atol=1e-5)
    np.testing.assert_allclose(vectors[:7], checkpoint.encode_batch(SOME[:7]), atol=1e-5)
    assert exported.encode([]).shape == (0, 32)
    small = open_encoder(output, dtype="int8", num_threads=1).encode(SOME)
    assert (small * vectors).sum(axis=1).mean() > 0.98
    for wrong, message in ((lambda: load_checkpoint(folder), "retrieval_based/"), (lambda: read_export(output), "a classifier"),
                           (lambda: open_encoder(folder, dtype="int8"), "is no export"),
                           (lambda: open_encoder(ROOT / "data"), "no sentence encoder")):
        with pytest.raises(UserError, match=message):
            wrong()
    with pytest.raises(ValueError, match="text 1: empty or blank"):
        exported.encode(["头疼", " "])
    assert_user_error(run_here(export_script.main, "--params_path", folder, "--output_path", output, "--output_emb_size", 64),
                      "was trained with 32")


def test_damaged_or_foreign_folders_are_refused(checkpoint, model, rows, tmp_path):
    with pytest.raises(UserError, match="no sentence encoder"):
        open_encoder(str(checkpoint))
    folder = saved_untrained(model, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    for entry in ({"pooling": "max", "output_emb_size": 0, "matryoshka_dims": []}, {"pooling": "cls"}, 7):
        (folder / "config.json").write_text(json.dumps({**config, "max_seq_length": 32, "sentence_encoder": entry}))
        with pytest.raises(UserError, match="sentence_encoder in its config.json is damaged"):
            open_encoder(str(folder))
    out = tmp_path / "out"
    for changes, parts in (({"matryoshka_dims": 999}, "--matryoshka_dims 999: out of range, expected 1 to 48"),
                           ({"gradient_accumulation_steps": 2}, "--chunk_size"),
                           ({"scale": 0}, "--scale 0.0: out of range"),
                           ({"hard_negatives": -1}, "--hard_negatives -1: out of range"),
                           ({"metric_for_best_model": "macro_f1"}, "expected one of accuracy, recall@1"),
                           ({"metric_for_best_model": "recall@20"}, "expected one of accuracy, recall@1, recall@5, recall@10\n"),
                           ({"similar_text_pair": tmp_path / "no.txt"}, "no.txt: file not found"),
                           ({"init_from_ckpt": tmp_path / "no/model_state.pdparams"}, "expected")):
        assert_user_error(run_here(script.main, *words(model, rows, out, **changes)), parts)
    assert not out.exists()
    process = run_here(export_script.main, "--params_path", tmp_path / "none", "--output_path", rows / "train.txt")
    assert_user_error(process, "train.txt: is no folder")  # before a model is looked for
    for path, wrong in ((rows, "holds dev.txt, a data file"), (folder, "is the checkpoint"), (".", "is the working folder")):
        process = run_here(export_script.main, "--params_path", folder, "--output_path", path)
        assert_user_error(process, f"--output_path {path}: {wrong}")


def test_an_encoder_or_a_classifier_can_be_trained_further(checkpoint, rows, tmp_path):
    """A classifier's encoder is taken; an encoder keeps its pooling, size and length without being told."""
    first = tmp_path / "first"
    trained(checkpoint, rows, first, max_steps=1, output_emb_size=16, pooling="pooler", max_seq_length=None)
    config = json.loads((first / "config.json").read_text())
    assert config["sentence_encoder"] == {"pooling": "pooler", "output_emb_size": 16, "matryoshka_dims": []}
    assert config["max_seq_length"] == 64  # the classifier's
    trained(first, rows, tmp_path / "second", max_steps=1, max_seq_length=None, init_from_ckpt=first / "model_state.pdparams",
            model_name_or_path="rocketqa-zh-dureader-query-encoder", matryoshka_dims=8, learning_rate=1e-12, weight_decay=0)
    config = json.loads((tmp_path / "second/config.json").read_text())
    assert config["sentence_encoder"] == {"pooling": "pooler", "output_emb_size": 16, "matryoshka_dims": [8]}
    before, after = weights(first), weights(tmp_path / "second")
    for name in before:
        np.testing.assert_allclose(after[name], before[name], atol=1e-6, err_msg=name)
    process = run_here(fine_tuning.main, "--model_name_or_path", first, "--data_dir", rows, "--output_dir", tmp_path / "third",
                       "--max_steps", 1, "--do_train", "--device", "cpu", "--report_to", "none")
    assert process.returncode == 0, process.stderr
    shutil.copytree(tmp_path / "third", tmp_path / "classifier")
    assert load_checkpoint(tmp_path / "classifier").labels  # a classifier again, no encoder


def test_every_option_says_what_it_is_for():
    for kind in (script.ModelArguments, script.DataArguments, script.SentenceArguments):
        own = [entry for entry in dataclasses.fields(kind) if entry.name in kind.__dict__.get("__annotations__", {})]
        assert own and all(entry.metadata.get("help") for entry in own)
