"""Unknown texts, told by classifiers: train.py --known centres, what evaluate.py says of it, the same answers everywhere."""

import json
import logging
import shutil

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score

import export_model
import predict
import train
from analysis import evaluate
from helpers import ROOT, assert_user_error, load_script, read_lines, run_here, set_long_text, thousand_texts, write_lines
from textcls.common.known import add_nearness, auroc, find_nearness, fit_known, split_known
from textcls.common.probabilities import softmax
from textcls.common.texts import LINE
from textcls.data.tokens import TokenizedTexts
from textcls.training.unknown import SHRINKAGE, find_centres, leave_labels_out

infer = load_script("deploy/predictor", "infer")
DATA = ROOT / "data"


def predict_rows(folder, texts, tmp_path, *more):
    """What predict.py says of texts: list of the JSON objects."""
    write_lines(tmp_path / "texts.txt", texts)
    process = run_here(predict.main, "--device", "cpu", "--params_path", folder, "--dataset_dir", tmp_path, "--data_file",
                       "texts.txt", "--output_format", "jsonl", "--output_file", tmp_path / "predicted", *more)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in read_lines(tmp_path / "predicted")]


def infer_file(folder, *more):
    """Run infer.py in this process, and leave the log as it was."""
    process = run_here(infer.main, "--model_path_prefix", folder, *more)
    logging.getLogger("predictor").handlers.clear()
    return process


def draw(seed, num_unknown=300):
    """Features of texts of six labels, which differ in a few directions, and of two more labels, and the label ids."""
    generator = np.random.default_rng(seed)
    centres = np.zeros((8, 20))
    centres[:, :8] = generator.normal(size=(8, 8)) * 2.5
    label_ids = np.concatenate([generator.integers(6, size=900), generator.integers(6, 8, size=num_unknown)])
    return (centres[label_ids] + generator.normal(size=(len(label_ids), 20))).astype(np.float32), label_ids


def test_nearness_is_the_relative_mahalanobis_distance():
    features, label_ids = draw(1, 0)
    means = np.stack([features[label_ids == label].mean(axis=0) for label in range(6)]).astype(np.float64)
    own, all_texts = (np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / 20 * np.eye(20))
                      for covariance in (np.cov(features - means[label_ids], rowvar=False, bias=True),
                                         np.cov(features, rowvar=False, bias=True)))
    expected = [(mahalanobis(row, features.mean(axis=0), all_texts) ** 2 - min(mahalanobis(row, centre, own) ** 2
                                                                               for centre in means)) / 2 for row in features[:50]]
    centres = find_centres(features, label_ids)
    np.testing.assert_allclose(find_nearness(centres, features[:50]), expected, rtol=1e-3, atol=1e-3)
    assert centres.projection.shape == (20, 20) and 0 < centres.shares.min() <= centres.shares.max() <= 1


def test_known_tells_unknown_texts_better_than_the_largest_probability():
    features, label_ids = draw(2)
    is_known, rows = label_ids < 6, np.arange(1200) % 2 == 0
    learnt, dev = rows & is_known, ~rows & is_known
    model = LogisticRegression(C=100, max_iter=500).fit(features[learnt], label_ids[learnt])
    tokens = TokenizedTexts.from_rows([[1, 2]] * dev.sum())
    tokens.labels = label_ids[dev]
    left_in, left_out = leave_labels_out(features[learnt], label_ids[learnt], tokens, features[dev])
    assert left_in.shape == left_out.shape == (dev.sum(), 1)
    weights, figure = fit_known(left_in, left_out)
    centres = find_centres(features[learnt], label_ids[learnt])._replace(weights=weights)
    scores = model.decision_function(features[~rows]).astype(np.float32)
    logits, known = split_known(add_nearness(scores, features[~rows], centres), centres)
    np.testing.assert_array_equal(logits, scores)
    figures = [auroc(values, is_known[~rows]) for values in (known, softmax(logits).max(axis=1))]
    assert figures[0] > figures[1] + 0.02 and figures[0] > 0.9 and abs(figure - figures[0]) < 0.1, (figure, figures)
    assert 0 <= known.min() < 0.2 and 0.9 < known.max() <= 1 and weights[0] > 0


@pytest.mark.parametrize("vote", ["mean", "max"])
def test_predict_and_infer_agree_on_long_texts_too(telling, tmp_path, vote):
    for name, file in (("checkpoint", "config.json"), ("export", "deploy.json")):
        shutil.copytree(telling / name, tmp_path / name)
        set_long_text(tmp_path / name / file, mode="window", max_windows=3, window_vote=vote)
    texts = sorted((text for text in thousand_texts() if not LINE.problem(text)), key=lambda text: -len(text))
    rows = predict_rows(tmp_path / "checkpoint", texts[:8] + texts[50::25], tmp_path)
    known = [row["known"] for row in rows]
    least = float(np.median(known))
    process = infer_file(tmp_path / "export", "--dataset_dir", tmp_path, "--data_file", "texts.txt", "--output_format", "jsonl",
                         "--output_file", tmp_path / "inferred", "--least_known", least)
    assert process.returncode == 0, process.stderr
    inferred = [json.loads(line) for line in read_lines(tmp_path / "inferred")]
    np.testing.assert_allclose([row["known"] for row in inferred], known, atol=1e-4)
    for row, right in zip(inferred, rows):
        if abs(right["known"] - least) > 1e-4:
            assert row["label"] == (right["label"] if right["known"] > least else "undecided")
    assert len({row["label"] == "undecided" for row in inferred}) == 2


def test_evaluation_says_how_well_unknown_texts_are_told(telling, tmp_path):
    rows = [line.split("\t") for line in read_lines(DATA / "dev.txt")][:150]
    others = [text for text in thousand_texts() if not LINE.problem(text)][:40]
    for name in ("train.txt", "label.txt"):
        shutil.copy(DATA / name, tmp_path)
    write_lines(tmp_path / "test_unknown.txt", ["\t".join(row) for row in rows] + [f"{text}\t无关" for text in others])
    options = ["--device", "cpu", "--params_path", telling / "checkpoint", "--dataset_dir", tmp_path, "--bad_case_file",
               tmp_path / "bad_case.txt", "--dev_file", "test_unknown.txt", "--unknown_label"]
    answers = predict_rows(telling / "checkpoint", [text for text, _ in rows] + others, tmp_path)
    known, is_known = np.array([row["known"] for row in answers]), np.arange(190) < 150
    least = round(float(np.median(known)), 3)
    process = run_here(evaluate.main, *options, "无关", "--least_known", least)
    assert process.returncode == 0, process.stderr
    largest = roc_auc_score(is_known, [row["probability"] for row in answers])
    assert f"Unknown texts: 40 | AUROC of the largest probability {largest:.4f}, of known {roc_auc_score(is_known, known):.4f}" \
        in process.stderr
    f1, answered = f1_score(~is_known, known < least) * 100, (known[~is_known] >= least).mean() * 100
    assert f"--least_known {least:g} | F1 score of the unknown {f1:.2f} | macro F1 score of the known " in process.stderr
    assert f"answered: {answered:.2f}% of the unknown texts, {(known[is_known] >= least).mean() * 100:.2f}% of" in process.stderr
    assert "The best F1 score of the unknown has --least_known 0." in process.stderr
    assert "Dev dataset size: 150" in process.stderr and "无关" not in (tmp_path / "bad_case.txt").read_text(encoding="utf-8")
    assert_user_error(run_here(evaluate.main, *options, "其他"), "--unknown_label 其他: is a label of")


def test_a_model_without_known_answers_as_before_and_says_what_it_lacks(telling, checkpoint, tmp_path):
    folder = shutil.copytree(telling / "checkpoint", tmp_path / "checkpoint", ignore=shutil.ignore_patterns("runs"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entry = config.pop("known")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")  # as a training without it leaves the folder
    old, new = (predict_rows(source, ["头疼怎么办", "拔牙多少钱"], tmp_path) for source in (folder, telling / "checkpoint"))
    assert entry and [{**row, "known": own["known"]} for row, own in zip(old, new)] == new
    process = run_here(predict.main, "--device", "cpu", "--params_path", checkpoint, "--dataset_dir", DATA, "--output_file",
                       tmp_path / "out", "--least_known", "0.5")
    assert_user_error(process, "least_known 0.5: this model does not tell unknown texts", "train.py --known centres")


def test_a_damaged_file_is_one_clear_error(telling, tmp_path):
    checkpoint, export = (shutil.copytree(telling / name, tmp_path / name, ignore=shutil.ignore_patterns("runs"))
                          for name in ("checkpoint", "export"))
    whole = (checkpoint / "known.npz").read_bytes()
    for content in (whole[:-100], b"", whole + b"\n"):
        (checkpoint / "known.npz").write_bytes(content)
        process = run_here(export_model.main, "--params_path", checkpoint, "--output_path", tmp_path / "new", "--onnx")
        assert_user_error(process, f"{checkpoint}/known.npz: missing or damaged, expected the file that train.py --known centres "
                          "wrote")
    (export / "known.npz").unlink()
    assert_user_error(infer_file(export, "--dataset_dir", DATA), f"{export}/known.npz: missing or damaged")
    deploy = json.loads((export / "deploy.json").read_text())
    (export / "deploy.json").write_text(json.dumps({name: value for name, value in deploy.items() if name != "known"}))
    assert_user_error(infer_file(export, "--dataset_dir", DATA), "its outputs ['logits', 'features'], expected")


def test_too_few_dev_texts_leave_a_model_that_says_so(tiny_model, tmp_path):
    rows = read_lines(DATA / "train.txt")
    shutil.copy(DATA / "label.txt", tmp_path)
    write_lines(tmp_path / "train.txt", rows[:64])
    write_lines(tmp_path / "dev.txt", rows[64:84])
    process = run_here(train.main, "--model_name_or_path", tiny_model, "--data_dir", tmp_path, "--output_dir", tmp_path / "out",
                       "--device", "cpu", "--max_steps", 1, "--do_train", "--do_eval", "--report_to", "none", "--known",
                       "centres")
    assert process.returncode == 0, process.stderr
    assert "--known centres: this model will not tell unknown texts: that takes 30 dev texts or more" in process.stderr
    assert not (tmp_path / "out/known.npz").exists()
    assert "known" not in json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
