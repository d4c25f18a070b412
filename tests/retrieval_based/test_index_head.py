"""The head of an index: how it is fitted, how it joins the vote, what labels that come and go and damage do to it."""

import json
import shutil

import numpy as np
import pytest

from helpers import ROOT, assert_user_error, load_script, read_lines, run_here, write_lines
from textcls.common.errors import UserError
from textcls.retrieval.changes import add_texts, remove_label
from textcls.retrieval.encoder import open_encoder
from textcls.retrieval.fitting import fit, with_settings
from textcls.retrieval.head import fit_head, head_probs
from textcls.retrieval.index import open_index
from textcls.retrieval.predictor import SearchPredictor
from textcls.retrieval.rows import rows_of_texts
from textcls.retrieval.search import fuse, label_probabilities, make_answers, search
from textcls.retrieval.writing import OutdatedIndex, memory_index, new_header, replace_head, write_index

build, change, evaluate, predict = [
    load_script("retrieval_based", name) for name in ("build_index", "index", "evaluate", "predict")]
SIZE, NUM_LABELS, ENTRY = 16, 6, {"weight": 0.5, "temperature": 0.5, "strength": 10.0}
GENERATOR = np.random.default_rng(0)
CENTRES = GENERATOR.standard_normal((NUM_LABELS + 1, SIZE)).astype(np.float32)
IDS = np.repeat(np.arange(NUM_LABELS), (60, 50, 40, 30, 20, 10))


def drawn(label_ids):
    """Unit vectors around those of their labels, and around what all have in common."""
    vectors = CENTRES[label_ids] + 2 + GENERATOR.standard_normal((len(label_ids), SIZE)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTORS, QUERIES, QUERY_IDS = drawn(IDS), drawn(np.arange(60) % NUM_LABELS), np.arange(60) % NUM_LABELS
TEXTS = [f"问{row}" for row in range(60)]


def headed(entry=ENTRY):
    """An index in memory with a head."""
    header = new_header("x", SIZE, "texts", [(f"类{label}", []) for label in range(NUM_LABELS)])
    index = memory_index(header, rows_of_texts(VECTORS, IDS, [f"文{row}" for row in range(len(IDS))]))
    return with_settings(index, head=entry)._replace(head=fit_head(index, entry["strength"]))


@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_a_head_is_the_balanced_logistic_regression_of_scikit_learn(monkeypatch, strength):
    from sklearn.linear_model import LogisticRegression

    monkeypatch.setattr("textcls.retrieval.head.TOLERANCE", 1e-9)
    monkeypatch.setattr("textcls.retrieval.head.STEPS", 2000)
    monkeypatch.setattr("textcls.retrieval.head.CELLS", 40)  # several blocks
    centred = VECTORS - VECTORS.mean(axis=0)
    spread = np.sqrt((centred ** 2).sum(axis=1).mean())
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=5000, tol=1e-8).fit(centred / spread, IDS)
    index = headed({**ENTRY, "strength": strength})
    expected = model.predict_proba((QUERIES - VECTORS.mean(axis=0)) / spread)
    np.testing.assert_allclose(head_probs(index.head, QUERIES, 1.0), expected, atol=1e-2)
    again = fit_head(index, strength, index.head)  # from where it ended
    np.testing.assert_allclose(head_probs(again, QUERIES, 1.0), expected, atol=1e-2)


def test_dev_texts_decide_the_weight_of_the_head_and_a_file_answers_as_memory(tmp_path):
    index, figures = fit(headed()._replace(head=None), QUERIES, TEXTS, QUERY_IDS, with_head=True)
    plain, without = fit(headed()._replace(head=None), QUERIES, TEXTS, QUERY_IDS)
    assert figures["fused"] >= max(figures["head"], without["fused"]) and "head" not in without and plain.head is None
    assert 0 < index.header["head"]["weight"] <= 1
    write_index(tmp_path, index)
    opened = open_index(tmp_path)
    assert opened.header["head"]["strength"] == index.header["head"]["strength"]
    probs = label_probabilities(index, QUERIES, TEXTS)
    np.testing.assert_array_equal(label_probabilities(opened, QUERIES, TEXTS), probs)
    assert (probs.argmax(axis=1) == QUERY_IDS).mean() == pytest.approx(figures["fused"])
    assert [answer.label for answer in make_answers(opened, QUERIES, TEXTS)] == [index.labels[guess] for guess in probs.argmax(1)]


def test_a_head_that_helps_nothing_on_dev_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr("textcls.retrieval.fitting.head_probs", lambda head, vectors, temperature, biases=None: np.eye(
        NUM_LABELS, dtype=np.float32)[np.zeros(len(vectors), int)])  # always the first label
    index, _ = fit(headed()._replace(head=None), QUERIES, TEXTS, QUERY_IDS, with_head=True)
    header = write_index(tmp_path, with_settings(index, head=None) if index.head is None else index)
    assert index.head is None and header["head"] is None


def test_a_head_shares_out_what_the_labels_that_it_knows_have(tmp_path):
    write_index(tmp_path, headed())
    new = drawn(np.full(5, NUM_LABELS))
    add_texts(tmp_path, "新", [f"新{number}" for number in range(5)], new)
    remove_label(tmp_path, "类2")
    index = open_index(tmp_path)
    places = [index.labels.index(f"类{label}") for label in (0, 1, 3, 4, 5)]
    assert index.head.labels.tolist() == places
    found = search(index, QUERIES, TEXTS)
    plain, own = fuse(index._replace(head=None), found), head_probs(index.head, QUERIES, 0.5)
    assert plain[:, -1].max() > 0
    expected = plain.copy()
    expected[:, places] = 0.5 * plain[:, places] + 0.5 * own * plain[:, places].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(fuse(index, found), expected, atol=1e-5)  # the new label's own is as it was
    np.testing.assert_allclose(fuse(index, found).sum(axis=1), 1, atol=1e-5)
    assert make_answers(index, new, ["甲"] * 5)[0].label == "新"
    replace_head(index, fit_head(index, 10.0, index.head))
    fitted = open_index(tmp_path)
    assert len(fitted.head.labels) == NUM_LABELS and fitted.head.labels[-1] == fitted.labels.index("新")
    more, ids = drawn(np.repeat([NUM_LABELS, 0], 30)), np.repeat(["新", "类0"], 30)
    answers = [answer.label for answer in make_answers(fitted, more, ["甲"] * 60)]
    assert (np.array(answers) == ids).mean() > 0.7
    with pytest.raises(OutdatedIndex):
        replace_head(index, index.head)
    for label in ("类0", "类1", "类3", "类4", "类5"):
        add_texts(tmp_path, label.replace("类", "别"), [label], QUERIES[:1])
        remove_label(tmp_path, label)
    remove_label(tmp_path, "新")
    opened = open_index(tmp_path)  # none of the labels that the head knows is left
    assert opened.head is None and len(make_answers(opened, QUERIES, TEXTS)) == len(TEXTS)
    process = run_here(change.main, "refit", "--index_dir", tmp_path)
    assert "Head fitted anew: 5 labels" in process.stderr and len(open_index(tmp_path).head.labels) == 5
    assert sum(path.name.startswith("head-") for path in tmp_path.iterdir()) == 1


def test_an_index_without_a_head_answers_as_it_did(tmp_path):
    write_index(tmp_path, headed()._replace(head=None, header={**headed().header, "head": None}))
    expected = make_answers(open_index(tmp_path), QUERIES, TEXTS, 3)
    header = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    del header["head"]  # as an earlier version wrote it
    (tmp_path / "index.json").write_text(json.dumps(header), encoding="utf-8")
    assert make_answers(open_index(tmp_path), QUERIES, TEXTS, 3) == expected
    assert_user_error(run_here(change.main, "refit", "--index_dir", tmp_path), "has no head, expected an index of texts")
    add_texts(tmp_path, "新", ["新的"], VECTORS[:1])
    assert open_index(tmp_path).head is None


def test_a_damaged_head_is_one_clear_error(tmp_path):
    header = write_index(tmp_path / "index", headed())
    folder, ids = header["head"]["folder"], np.arange(NUM_LABELS, dtype=np.int32)
    bad = np.full((NUM_LABELS, SIZE), np.nan, np.float32)
    for name, values, message in [("labels", ids + 1, "different numbers below 6"), ("labels", ids * 0, "different numbers"),
                                  ("labels", ids[:0], "different|expected"), ("weights", bad, "expected finite numbers"),
                                  ("weights", bad[:, :3], r"expected float32 \[6, 16\]"), ("offsets", None, "cannot be read")]:
        copy = shutil.copytree(tmp_path / "index", tmp_path / "copy", dirs_exist_ok=True)
        (copy / folder / f"{name}.npy").unlink()
        if values is not None:
            np.save(copy / folder / f"{name}.npy", values)
        with pytest.raises(UserError, match=message):
            open_index(copy)
        shutil.rmtree(copy)
    for entry in ({}, [], {"weight": 2}, {"folder": "../x"}, {"strength": "a"}):
        entry = {**header["head"], **entry} if entry else entry
        (tmp_path / "index/index.json").write_text(json.dumps({**header, "head": entry}), encoding="utf-8")
        with pytest.raises(UserError, match="head is damaged or missing"):
            open_index(tmp_path / "index")


def test_commands_agree_and_a_new_label_is_fitted_at_once(encoder_export, monkeypatch, tmp_path):
    for name, count in (("train", 200), ("dev", 80)):
        write_lines(tmp_path / f"{name}.txt", read_lines(ROOT / f"data/{name}.txt")[:count])
    write_lines(tmp_path / "label.txt", read_lines(ROOT / "data/label.txt"))
    texts, names = zip(*(line.split("\t") for line in read_lines(tmp_path / "dev.txt")))
    write_lines(tmp_path / "data.txt", texts)
    folder = tmp_path / "index"
    options = ["--params_path", encoder_export, "--index_dir", folder]
    process = run_here(build.main, *options, "--data_dir", tmp_path, "--corpus", "texts")
    assert process.returncode == 0 and " | head " in process.stderr and "head weight" in process.stderr, process.stderr
    header = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if header["head"] is None:  # the sample data and the small encoder do not need one
        index = open_index(folder)
        write_index(folder, with_settings(index, head=ENTRY)._replace(head=fit_head(index, 10.0)))
    answers = SearchPredictor(encoder_export, folder).answer(list(texts))
    process = run_here(predict.main, *options, "--dataset_dir", tmp_path, "--output_format", "jsonl", "--output_file", "-")
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    assert [(row["label"], row["probability"]) for row in rows] == [
        (answer.label, pytest.approx(answer.probability, abs=1e-5)) for answer in answers]
    accuracy = np.mean([answer.label == name for answer, name in zip(answers, names)]) * 100
    process = run_here(evaluate.main, *options, "--dataset_dir", tmp_path, cwd=tmp_path)
    assert f"Accuracy: {accuracy:.2f}% |" in process.stderr, process.stderr
    index = open_index(folder)
    vectors = open_encoder(encoder_export).encode(list(texts))
    guesses = label_probabilities(index._replace(head=None), vectors, list(texts)).argmax(axis=1)
    accuracy = np.mean([index.labels[guess] == name for guess, name in zip(guesses, names)]) * 100
    process = run_here(evaluate.main, *options, "--dataset_dir", tmp_path, "--head_weight", "0", cwd=tmp_path)
    assert f"Accuracy: {accuracy:.2f}% |" in process.stderr
    process = run_here(change.main, "add", "天气", "--texts", "今天天气怎么样", "明天下雨吗", *options)
    assert process.returncode == 0 and f"Head fitted anew: {len(index.labels) + 1} labels" in process.stderr, process.stderr
    assert SearchPredictor(encoder_export, folder).answer(["明天下雨吗"])[0].label == "天气"
    assert "Head" not in run_here(change.main, "add", "天气", "--texts", "明天下雨吗", *options).stderr  # it was there already
    assert "Head fitted anew" in run_here(change.main, "refit", "--index_dir", folder).stderr
    monkeypatch.setattr(change, "AT_ONCE_WORK", 1)  # of a large index
    process = run_here(change.main, "add", "运动", "--texts", "跑步伤膝盖吗", "游泳怎么换气", *options)
    assert process.returncode == 0 and f"until `index.py refit --index_dir {folder}`" in process.stderr, process.stderr
    assert SearchPredictor(encoder_export, folder).answer(["游泳怎么换气"])[0].label == "运动"
    assert len(open_index(folder).head.labels) == len(index.labels) + 1
    assert_user_error(run_here(change.main, "remove", *options), "refit and retrain take no label, the others need one")


def test_a_head_is_left_out_where_it_takes_too_long_or_rows_are_no_texts(monkeypatch):
    index = headed()
    assert build.wants_head("auto", index) and not build.wants_head("off", index)
    assert not build.wants_head("on", index._replace(header={**index.header, "corpus": "means"}))
    monkeypatch.setattr(build, "MOST_WORK", 1)
    assert build.wants_head("on", index) and not build.wants_head("auto", index)
    with pytest.raises(UserError, match="has no head, expected 0"):
        evaluate.with_head_weight(index._replace(head=None), 0.5)
