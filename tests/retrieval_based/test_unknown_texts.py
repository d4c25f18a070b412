"""Texts of no label: how an index tells them from others, and labels of few texts, which it must not take for unknown."""

import json
import shutil

import numpy as np
import pytest

from helpers import ROOT, assert_user_error, load_script, make_model, read_lines, run, run_here, write_lines
from textcls.common.errors import UserError
from textcls.common.known import auroc
from textcls.retrieval.changes import add_texts
from textcls.retrieval.fitting import BIASES, fit, with_settings
from textcls.retrieval.head import fit_head
from textcls.retrieval.index import open_index
from textcls.retrieval.left_out import read_left_out
from textcls.retrieval.rows import rows_of_texts
from textcls.retrieval.search import known_features, known_probs, label_probabilities, make_answers, search
from textcls.retrieval.unknown import LeftOut, UnknownTexts, ask_lacking, leave_out_of_index
from textcls.retrieval.writing import memory_index, new_header, write_index
from textcls.training.scoring import score_open

build, evaluate, benchmark, leave_out = [load_script("retrieval_based", name) for name in (
    "build_index", "evaluate", "benchmark", "leave_out")]
SIZE, NUM_LABELS, NUM_UNKNOWN = 16, 8, 6  # of the centres of vectors, the last ones are of no label
GENERATOR = np.random.default_rng(5)
CENTRES = GENERATOR.standard_normal((NUM_LABELS + NUM_UNKNOWN, SIZE)).astype(np.float32)
LABELS = [f"类{label}" for label in range(NUM_LABELS)]
SUITE_LABELS = read_lines(ROOT / "data/label.txt")
DEV = [line.split("\t") for line in read_lines(ROOT / "data/dev.txt")]


def draw(label_ids):
    """Unit vectors around the centres of their labels, and texts that have nothing in common."""
    vectors = CENTRES[label_ids] + 0.9 * GENERATOR.standard_normal((len(label_ids), SIZE)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), [f"{place}" for place in range(len(label_ids))]


IDS, QUERY_IDS = np.repeat(np.arange(NUM_LABELS), 40), np.arange(400) % NUM_LABELS
VECTORS, _ = draw(IDS)
QUERIES, QUERY_TEXTS = draw(QUERY_IDS)


def make_index():
    """An index without settings, in memory."""
    header = new_header("x", SIZE, "texts", [(label, []) for label in LABELS])
    return memory_index(header, rows_of_texts(VECTORS, IDS, [f"文{row}" for row in range(len(IDS))]))


def draw_unknown(count):
    return draw(NUM_LABELS + np.arange(count) % NUM_UNKNOWN)


@pytest.fixture(scope="module", params=["given", "left out"])
def fitted(request):
    """An index that reckons with 20 % of unknown texts: some that are given, or labels that are left out."""
    unknown = UnknownTexts(0.2, *draw_unknown(300)) if request.param == "given" else UnknownTexts(0.2, np.zeros((0, 0)), [])
    return fit(make_index(), QUERIES, QUERY_TEXTS, QUERY_IDS, precision=0.9, with_head=True, unknown=unknown)


def test_the_precision_counts_unknown_texts(fitted):
    index, figures = fitted
    texts = draw(QUERY_IDS), draw_unknown(100)
    known, others = (label_probabilities(index, *part) for part in texts)
    assert index.header["head"]["weight"] > 0 and len(index.header["known"]["weights"]) == 3
    assert auroc(np.concatenate([known.sum(axis=1), others.sum(axis=1)]), np.arange(500) < 400) > 0.8
    assert figures["known_auroc"] > 0.8
    least = index.header["threshold"]["value"]
    right = ((known.argmax(axis=1) == QUERY_IDS) & (known.max(axis=1) >= least)).sum()
    answered = (known.max(axis=1) >= least).sum() + (others.max(axis=1) >= least).sum()
    assert right / answered > 0.87 and answered > 200  # of 400 and 100 new texts: 0.9 but for chance
    plain, _ = fit(make_index(), QUERIES, QUERY_TEXTS, QUERY_IDS, precision=0.9, with_head=True,
                   unknown=UnknownTexts(0.001, np.zeros((0, 0)), []))
    lower = plain.header["threshold"]["value"]
    known, others = (label_probabilities(plain, *part) for part in texts)
    right = ((known.argmax(axis=1) == QUERY_IDS) & (known.max(axis=1) >= lower)).sum()
    assert right / ((known.max(axis=1) >= lower).sum() + (others.max(axis=1) >= lower).sum()) < 0.87


def test_left_out_labels_are_unknown_to_rows_centres_and_head():
    index = with_settings(make_index(), head={"weight": 1.0, "temperature": 1.0, "strength": 10.0})
    index = index._replace(head=fit_head(index, 10.0))
    asked = []

    def find(part, rows):
        asked.append((part.part_index, rows))
        return search(part.part_index, part.vectors[rows], [QUERY_TEXTS[row] for row in rows])

    known, unknown = ask_lacking(leave_out_of_index(index, QUERIES), QUERY_IDS, find)
    assert sorted(np.concatenate([rows for _, rows in asked])) == sorted(2 * list(range(len(QUERY_IDS))))
    for part_index, rows in asked:
        present = set(part_index.row_labels.tolist()) - {-1}
        assert set(part_index.head.labels.tolist()) == present == set(np.flatnonzero(part_index.centres.any(axis=1)).tolist())
        assert set(QUERY_IDS[rows]) <= present or not set(QUERY_IDS[rows]) & present
    assert len(known.labels) == len(unknown.labels) == len(QUERY_IDS)
    places = np.concatenate([rows for part_index, rows in asked if not (part_index.row_labels == QUERY_IDS[rows[0]]).any()])
    assert (unknown.labels != QUERY_IDS[places]).all() and known.features.shape[1] == 3


def test_an_encoder_that_has_never_seen_labels_says_how_hard_they_are_to_tell():
    fold_of = np.arange(NUM_LABELS) % 2
    left_out = []
    for fold in range(2):  # to these encoders, texts of labels that they have not seen look like those of the next label
        seen = [np.where(fold_of[ids] == fold, (ids + 1) % NUM_LABELS, ids) for ids in (IDS, QUERY_IDS)]
        vectors, queries = (draw(label_ids)[0] for label_ids in seen)
        left_out.append(LeftOut(fold_of == fold, rows_of_texts(vectors, IDS, [f"文{row}" for row in range(len(IDS))]), queries))
    easy, hard = (fit(make_index(), QUERIES, QUERY_TEXTS, QUERY_IDS, precision=0.8, with_head=True, left_out=given)
                  for given in ((), left_out))
    assert easy[1]["known_auroc"] > 0.8 and 0.4 < hard[1]["known_auroc"] < 0.6
    assert easy[0].header["threshold"]["value"] < 0.8 and hard[0].header["vote"] == easy[0].header["vote"]
    sure = label_probabilities(hard[0], *draw(QUERY_IDS)).sum(axis=1)
    assert np.ptp(sure) < 0.1  # known says nothing here, and is the same for all texts: 1 - unknown_share, about
    assert sure.mean() == pytest.approx(0.9, abs=0.05)


def test_encoders_are_trained_without_a_part_of_the_labels_each(encoder_export, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "dev", "label"):
        write_lines(data / f"{name}.txt", read_lines(ROOT / f"data/{name}.txt")[:150])
    model = make_model(tmp_path / "model", num_hidden_layers=1, num_attention_heads=4)
    options = ["--model_name_or_path", model, "--data_dir", data, "--output_dir", tmp_path / "left out", "--parts", 2,
               "--train_options", "--max_steps", 1, "--device", "cpu", "--report_to", "none"]
    assert_user_error(run_here(leave_out.main, *options[:4], "--output_dir", ".", cwd=tmp_path), "is the working folder or above")
    (tmp_path / "left out/data").mkdir(parents=True)  # of the user's
    (tmp_path / "left out/options.json").write_text("{}", encoding="utf-8")  # of a run that failed before a part was finished
    process = run("retrieval_based/leave_out.py", *options)
    assert process.returncode == 0 and "--left_out_dir" in process.stderr, process.stderr
    assert process.stderr.count("Next: ") == 1  # train.py says none of its own
    parts = json.loads((tmp_path / "left out/left_out.json").read_text(encoding="utf-8"))["parts"]
    assert sorted(parts[0] + parts[1]) == sorted(SUITE_LABELS)
    for number, part in enumerate(parts, 1):
        assert read_lines(tmp_path / f"left out/part-{number}/label.txt") == [name for name in SUITE_LABELS if name not in part]
        assert not list((tmp_path / f"left out/part-{number}").glob("checkpoint-*"))
    assert [file.name for file in (tmp_path / "left out").glob("*data")] == ["data"]
    process = run_here(leave_out.main, *options)
    assert process.returncode == 0 and process.stderr.count(" is finished.") == 2
    assert_user_error(run_here(leave_out.main, *options, "--seed", 2), "this folder was made with other options")
    assert_user_error(run_here(leave_out.main, *options, "--save_dir", "x"), "--save_dir: leave_out.py gives train.py its data")
    assert_user_error(run_here(leave_out.main, *options[:7], 12), "--parts 12: of 11 labels, expected 2 or more")
    builds = ["--params_path", encoder_export, "--data_dir", data, "--index_dir", tmp_path / "index", "--corpus", "texts"]
    headers = []
    for given in ([], ["--left_out_dir", tmp_path / "left out"]):
        process = run_here(build.main, *builds, *given)
        assert process.returncode == 0, process.stderr
        headers.append(json.loads((tmp_path / "index/index.json").read_text(encoding="utf-8")))
    assert "Encoder 2 of 2 that was trained without some of the labels" in process.stderr
    assert headers[1]["known"]["learned_from"] == "left_out_dir" and "learned_from" not in headers[0]["known"]
    assert headers[0]["known"]["weights"] != headers[1]["known"]["weights"] and headers[0]["vote"] == headers[1]["vote"]
    write_lines(data / "label.txt", [*SUITE_LABELS, "新的"])
    assert_user_error(run_here(build.main, *builds, *given), "left_out.json: was made for other labels, such as '新的'")
    assert_user_error(run_here(build.main, *builds, "--left_out_dir", tmp_path), "has no left_out.json, expected")
    for damaged in (None, [["a"]], [["a"], [["b"]]], [["a"], ["a"]], [["a", "b"], []]):
        (tmp_path / "left_out.json").write_text(json.dumps({"parts": damaged}), encoding="utf-8")
        with pytest.raises(UserError, match="is damaged"):
            read_left_out(str(tmp_path), ["a", "b"])


def test_a_label_that_the_head_does_not_know_yet_is_not_said_to_be_unknown(tmp_path):
    index, _ = fit(make_index(), QUERIES, QUERY_TEXTS, QUERY_IDS, with_head=True)
    write_index(tmp_path, index)
    new, new_texts = draw(np.full(8, NUM_LABELS))
    add_texts(tmp_path, "新", new_texts, new)
    index = open_index(tmp_path)
    more, texts = draw(np.full(60, NUM_LABELS))
    found = search(index, more, texts)
    is_near = np.array([label == "新" for label in np.array(index.labels)[index.row_labels[found.rows[:, 0]]]])
    features = known_features(index, more, found)
    assert is_near.sum() > 20 and (features[is_near, 2] < index.header["known"]["logit"]).mean() > 0.5
    weights, offset = index.header["known"]["weights"], index.header["known"]["offset"]
    features[is_near, 2] = np.maximum(features[is_near, 2], index.header["known"]["logit"])
    np.testing.assert_allclose(known_probs(index, more, found), 1 / (1 + np.exp(-(features @ weights + offset))), rtol=1e-6)
    without = index._replace(head=None)  # as with evaluate.py --head_weight 0
    assert np.isfinite(known_probs(without, more, found)).all()


def test_labels_of_few_texts_are_heard_as_dev_texts_allow(tmp_path):
    index, _ = fit(make_index(), QUERIES, QUERY_TEXTS, QUERY_IDS, with_head=True)
    assert index.header["head"]["few_bias"] in BIASES and not index.few.any()  # all labels have many texts
    header = {**index.header, "head": {**index.header["head"], "weight": 0.0, "few_weight": 1.0, "few_bias": 6.0}}
    write_index(tmp_path, index._replace(header=header))
    new, texts = draw(np.full(5, NUM_LABELS))
    add_texts(tmp_path, "新", texts, new)
    opened = open_index(tmp_path)
    opened = opened._replace(head=fit_head(opened, header["head"]["strength"]))
    np.testing.assert_allclose(opened.few, [0] * NUM_LABELS + [1])
    more, texts = draw(np.full(50, NUM_LABELS))
    others = [with_settings(opened, head={**header["head"], **changes}) for changes in ({"few_weight": 0.0}, {"few_bias": 0.0})]
    heard = [sum(answer.label == "新" for answer in make_answers(one, more, texts)) for one in (*others, opened)]
    assert heard[2] > max(heard[:2])


def test_scores_of_open_sets_are_those_of_the_formulas():
    label_ids, guesses = np.array([0, 0, 1, 1, 2, 2, 2]), np.array([0, 1, 1, 1, 0, 1, 1])  # 2: of no label
    scores = score_open(label_ids, guesses, np.array([.9, .9, .9, .4, .6, .2, .5]), 2)
    assert scores["unknown_f1"] == pytest.approx(2 * 1 / (3 + 2))
    assert scores["known_f1"] == pytest.approx((2 * 1 / (2 + 2) + 2 * 1 / (2 + 3)) / 2)
    assert scores["accuracy"] == pytest.approx(3 / 7)


def test_the_commands_take_texts_of_no_label(encoder_export, tmp_path):
    data = shutil.copytree(ROOT / "data", tmp_path / "data", ignore=lambda folder, names: [
        name for name in names if name not in ("train.txt", "dev.txt", "label.txt")])
    foreign = ["今天天气怎么样", "股票还会涨吗", "怎么学吉他", "哪里有好吃的火锅", "手机屏幕碎了", "这趟火车几点开"]
    write_lines(data / "foreign.txt", [*foreign, "", f"{foreign[0]}\t别的"])
    options = ["--params_path", encoder_export, "--data_dir", data, "--index_dir", tmp_path / "index", "--corpus", "means"]
    process = run_here(build.main, *options, "--precision", 0.5, "--unknown_share", 0.02, "--unknown_file", "foreign.txt")
    assert process.returncode == 0, process.stderr
    assert "for a precision of 0.5 where 2 % of the texts are of no label" in process.stderr
    header = json.loads((tmp_path / "index/index.json").read_text(encoding="utf-8"))
    assert header["known"]["unknown_share"] == 0.02
    write_lines(data / "test.txt", ["\t".join(row) for row in DEV[:60]] + [f"{text}\t别的" for text in foreign])
    process = run_here(evaluate.main, "--params_path", encoder_export, "--index_dir", tmp_path / "index", "--dataset_dir", data,
                       "--test_file", "test.txt", "--unknown_label", "别的", "--threshold", "auto", cwd=tmp_path)
    assert "Where known < 0.5 counts as unknown: F1 score of the unknown" in process.stderr, process.stderr
    assert "| unknown texts answered" in process.stderr
    write_lines(data / "test.txt", [f"{text}\t别的" for text in foreign])
    process = run_here(evaluate.main, "--params_path", encoder_export, "--index_dir", tmp_path / "index", "--dataset_dir", data,
                       "--test_file", "test.txt", "--unknown_label", "别的", "--threshold", "auto", cwd=tmp_path)
    assert f"Unknown texts: 6, all of {data}/test.txt" in process.stderr and "nan" not in process.stderr, process.stderr
    write_lines(data / "one.txt", foreign[:1])
    process = run_here(build.main, *options[:4], "--index_dir", tmp_path / "other", "--corpus", "means", "--precision", 0.9,
                       "--unknown_file", "one.txt")
    assert process.returncode == 0 and f"--unknown_share 0.1 only 9 of {len(DEV)} dev texts go with them" in process.stderr
    assert "10 rows are too few to show it, even if all answers were right: 29 are needed" in process.stderr
    for content, message in ((["没有标签", DEV[0][0]], f"foreign.txt:2: {DEV[0][0]!r} has a label in the data files"),
                             (["  "], "foreign.txt: holds no text, expected texts of no label")):
        write_lines(data / "foreign.txt", content)
        assert_user_error(run_here(build.main, *options, "--overwrite", "--unknown_file", "foreign.txt"), message)
    assert_user_error(run_here(build.main, *options, "--unknown_share", 1), "expected a number above 0 and below 1")
    assert_user_error(run_here(build.main, *options, "--overwrite", "--unknown_file", "none.txt"), "none.txt: file not found")
    assert json.loads((tmp_path / "index/index.json").read_text(encoding="utf-8")) == header


def test_the_benchmark_follows_the_protocol_of_published_tables(encoder_export, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [line.split("\t") for line in read_lines(ROOT / "data/train.txt")][:300]
    for name, content in (("train", rows), ("dev", DEV[:120]), ("test", [*DEV[120:180], ["今天天气怎么样", "别的"]])):
        write_lines(data / f"{name}.txt", ["\t".join(row) for row in content])
    write_lines(data / "label.txt", SUITE_LABELS)
    options = ["--model_name_or_path", encoder_export, "--as_it_is", "--data_dir", data, "--unknown_label", "别的", "--seeds", 3,
               "--output_dir", tmp_path / "out", "--known_share"]
    process = run_here(benchmark.main, *options, 0.5)
    assert process.returncode == 0, process.stderr
    [result] = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    folder = tmp_path / "out/known-0.5-seed-3"
    assert read_lines(folder / "label.txt") == result["known labels"] and len(result["known labels"]) == 6
    answers = [json.loads(line) for line in read_lines(folder / "answers.jsonl")]
    shown = [answer["label"] if answer["known"] >= 0.5 else "别的" for answer in answers]
    truth = [label if label in result["known labels"] else "别的" for _, label in DEV[120:180]] + ["别的"]
    right = [one == other == "别的" for one, other in zip(shown, truth)]
    assert result["F1 of unknown"] == pytest.approx(2 * sum(right) / (shown.count("别的") + truth.count("别的")))
    assert result["accuracy"] == pytest.approx(np.mean([one == other for one, other in zip(shown, truth)]))
    assert f"{100 * result['F1 of unknown']:.2f}" in process.stdout and "known labels: 50 %" in process.stdout
    assert_user_error(run_here(benchmark.main, *options, 0.01), "--known_share 0.01: of 11 labels, expected to leave two or more")

