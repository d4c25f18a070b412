"""analysis/sent_interpret.py: the blocks and JSON it writes, its three methods against TrustAI's own, cache, wrong input."""

import json
import os
import re

import numpy as np
import pytest
from scipy.stats import spearmanr

from analysis import sent_interpret
from helpers import ROOT, assert_user_error, read_lines, run, run_here, write_lines
from textcls.analysis.features import cached_features, extract_features, nearest_rows
from textcls.analysis.influence import fit_representer, influence_scores
from textcls.analysis.trustai_setup import import_trustai
from textcls.common.probabilities import softmax
from textcls.data.tokens import pad_batch
from textcls.models.checkpoints import load_checkpoint
from textcls.models.device import select_device
from textcls.models.paddle_setup import paddle

DATA = ROOT / "data"
LABELS = read_lines(DATA / "label.txt")
TEXTS = ["感冒了可以打疫苗吗", "甲状腺结节挂什么科", "喝完牛奶就拉肚子是什么原因", "做一次核磁共振多少钱"]
INPUT = ["Text\tLabel\tPrediction", f"{TEXTS[0]}\t注意事项\t其他", f"{TEXTS[1]}\t其他", TEXTS[2], f"{TEXTS[3]}\t\t其他"]


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """Where the script has explained INPUT by feature similarity."""
    folder = tmp_path_factory.mktemp("sent_interpret")
    write_lines(folder / "bad_case.txt", INPUT)
    process = run(ROOT / "analysis/sent_interpret.py", "--device", "cpu", "--dataset_dir", DATA, "--params_path", checkpoint,
                  "--batch_size", 16, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert os.listdir(folder / ".analysis_cache")
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    """The checkpoint of this process, and its token ids of a list of texts as TrustAI takes them, `size` texts a batch."""
    select_device("cpu")
    loaded = load_checkpoint(str(checkpoint))

    def batches(texts, size):
        rows = [row for [row] in loaded.encode(texts)]
        return [paddle.to_tensor(pad_batch(rows[first:first + size], loaded.pad_id))
                for first in range(0, len(rows), size)]

    return loaded, batches


def read_results(folder):
    return [json.loads(line) for line in read_lines(folder / "sent_interpret.jsonl")]


def test_blocks_say_what_the_jsonl_says(folder):
    rows, train = read_results(folder), read_lines(DATA / "train.txt")
    assert [(row["text"], row["label"]) for row in rows] == list(zip(TEXTS, ["注意事项", "其他", None, None]))
    blocks = []
    for row in rows:
        lines = [f"text: {row['text']}", f"predict label: {row['predict_label']}"]
        lines += [f"label: {row['label']}"] * (row["label"] is not None)
        for kind, name in (("positive", "support"), ("negative", "against")):
            lines.append(f"examples with {kind} influence")
            assert len(row[kind]) == 3
            for place, found in enumerate(row[kind], 1):
                assert train[found["line"] - 1] == f"{found['text']}\t{found['label']}"
                lines.append(f"{name}{place} text: {found['text']}\tlabel: {found['label']}\tscore: {found['score']:.5f}")
        blocks.append("\n".join(lines) + "\n")
    assert (folder / "sent_interpret.txt").read_bytes().decode() == "\n".join(blocks)
    agree = {kind: sum(found["label"] == row["predict_label"] for row in rows for found in row[kind])
             for kind in ("positive", "negative")}
    assert agree["positive"] > 6 > agree["negative"]  # of 12 each


def test_feature_similarity_is_trustais(folder, model):
    loaded, batches = model
    train = [line.split("\t")[0] for line in read_lines(DATA / "train.txt")]
    trustai = import_trustai().FeatureSimilarityModel(loaded.model, batches(train, 64), device="cpu")
    rows = read_results(folder)
    for result, row in zip(trustai(batches(TEXTS, 4)[0], sample_num=3), rows):
        assert LABELS[result.pred_label] == row["predict_label"]
        for indexes, scores, kind in ((result.pos_indexes, result.pos_scores, "positive"),
                                      (result.neg_indexes, result.neg_scores, "negative")):
            ordered = sorted((-round(float(score), 6), train[index]) for index, score in zip(indexes, scores))  # ties by text
            assert [text for _, text in ordered] == [
                text for _, text in sorted((-found["score"], found["text"]) for found in row[kind])]
        assert result.pos_scores == pytest.approx([found["score"] for found in row["positive"]], abs=1e-4)
        assert result.neg_scores == pytest.approx([found["score"] for found in row["negative"]], abs=1e-4)


def test_a_damaged_cache_is_made_anew(model, checkpoint, tmp_path):
    features, logits = cached_features(model[0], checkpoint, TEXTS, 32, tmp_path, "texts")
    path, = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:1000], b"", whole[:200] + b"\xff" * 50 + whole[250:]):
        path.write_bytes(damaged)
        for value, expected in zip(cached_features(model[0], checkpoint, TEXTS, 32, tmp_path, "texts"), (features, logits)):
            assert value == pytest.approx(expected, abs=1e-5)
        assert len(path.read_bytes()) == len(whole)


@pytest.fixture(scope="module")
def small(model):
    """110 training texts, and features and logits of them and of TEXTS."""
    train = [line.split("\t")[0] for line in read_lines(DATA / "train.txt")[:110]]
    return train, extract_features(model[0], train, 32, "train"), extract_features(model[0], TEXTS, 32, "texts")


@pytest.mark.parametrize("method, sim_fn", [("feature_similarity", "cos"), ("feature_similarity", "dot"),
                                            ("feature_similarity", "euc"), ("gradient_similarity", "cos"),
                                            ("gradient_similarity", "dot")])
def test_similarities_are_trustais(model, small, method, sim_fn):
    """TrustAI's own loss for gradients is another (see `influence_scores`): it is given the right one, and the labels that
    it assumes, the predicted ones."""
    (loaded, batches), (train, (features, logits), queries) = model, small
    if method == "feature_similarity":
        trustai = import_trustai().FeatureSimilarityModel(loaded.model, batches(train, 32), device="cpu")
    else:
        trustai = import_trustai().GradientSimilarityModel(
            loaded.model, batches(train, 1), device="cpu",
            criterion=lambda probs, label: paddle.nn.functional.nll_loss(paddle.log(probs), label))
    results = [trustai(batch, sample_num=5, sim_fn=sim_fn)[0] for batch in batches(TEXTS, 1)]
    score = influence_scores(method, sim_fn, (features, logits, logits.argmax(axis=1)), queries)
    found = nearest_rows(score, len(TEXTS), 5, lowest=True)
    for indices, values, kind in ((*found[:2], "pos"), (*found[2:], "neg")):
        assert indices.tolist() == [getattr(result, f"{kind}_indexes").tolist() for result in results]
        expected = np.stack([getattr(result, f"{kind}_scores") for result in results])
        assert values == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_gradient_similarity_takes_the_label_of_the_file(model, small):
    """Of two training rows with the same text, the one whose label is the prediction speaks for it, the other against it."""
    _, (features, logits), (query_features, query_logits) = small
    guess = query_logits[0].argmax()
    train = query_features[[0, 0]], query_logits[[0, 0]], np.array([guess, (guess + 1) % len(LABELS)])
    same, other = influence_scores("gradient_similarity", "cos", train, (query_features, query_logits))(slice(0, 1))[0]
    assert same == pytest.approx(1, abs=1e-5) and other < 0


def test_representer_ranks_as_trustai_does(model, small):
    (loaded, batches), (train, (features, logits), queries) = model, small
    trustai = import_trustai().RepresenterPointModel(loaded.model, batches(train, 32), device="cpu", epochs=3000)
    score = influence_scores("representer", "dot", (features, logits, logits.argmax(axis=1)), queries)(slice(0, len(TEXTS)))
    for own, result in zip(score, trustai(batches(TEXTS, 4)[0], sample_num=-1)):
        expected = np.empty(len(train))
        expected[result.pos_indexes] = result.pos_scores
        assert spearmanr(own, expected).statistic > 0.99
        assert len({*own.argsort()[-5:].tolist(), *result.pos_indexes[:5].tolist()}) <= 6  # its fit stops early
    alpha, weights = fit_representer(features, softmax(logits))
    # the theorem: the weights are a sum over the training rows
    assert np.pad(features, ((0, 0), (0, 1)), constant_values=1).T @ alpha == pytest.approx(weights, abs=1e-6)


def test_other_methods_use_the_cache(folder, checkpoint):
    process = run_here(sent_interpret.main, "--dataset_dir", DATA, "--params_path", checkpoint, "--interpret_input_file",
                  folder / "bad_case.txt", "--interpret_result_file", folder / "other.txt", "--jsonl_file",
                  folder / "other.jsonl", "--method", "representer", "--top_k", 5000, "--cache_dir", folder / ".analysis_cache")
    assert process.returncode == 0, process.stderr
    assert re.search(r"Features of train read from \S+\.npz", process.stderr)
    for line in read_lines(folder / "other.jsonl"):
        row = json.loads(line)
        assert len(row["positive"]) == len(row["negative"]) == 1210
        scores = [found["score"] for found in row["positive"]]  # all rows, from both ends
        assert scores == sorted(scores, reverse=True) and scores[::-1] == [found["score"] for found in row["negative"]]
        assert {found["line"] for found in row["positive"]} == {found["line"] for found in row["negative"]}
        assert row["positive"][0]["label"] == row["predict_label"]
        assert scores[0] > 0 > scores[-1]


def test_all_wrong_input_is_reported_and_nothing_written(checkpoint, tmp_path):
    write_lines(tmp_path / "train.txt", ["感冒吃什么药\t没有这类", *read_lines(DATA / "train.txt")[:20]])
    write_lines(tmp_path / "in.txt", ["Text\tLabel\tPrediction", "好\t没有", "\t其他"])
    options = [sent_interpret.main, "--dataset_dir", tmp_path, "--params_path", checkpoint, "--cache_dir", "",
               "--interpret_input_file", tmp_path / "in.txt", "--jsonl_file", tmp_path / "out.jsonl"]
    process = run_here(*options, "--interpret_result_file", tmp_path / "out.txt")
    assert_user_error(process, f"{tmp_path}/train.txt:1: label '没有这类' is not in", f"{tmp_path}/in.txt:2: label '没有' is not",
                      f"{tmp_path}/in.txt:3: text: empty or blank", "3 problems found.")
    process = run_here(*options, "--interpret_result_file", tmp_path / "in.txt")
    assert_user_error(process, "in.txt: is an input of this run, expected another name")
    assert sorted(os.listdir(tmp_path)) == ["in.txt", "train.txt"]


def test_similarity_that_a_method_does_not_have():
    process = run_here(sent_interpret.main, "--method", "gradient_similarity", "--sim_fn", "euc")
    assert_user_error(process, "--sim_fn euc: --method gradient_similarity has cos and dot")
