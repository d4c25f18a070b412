"""analysis/evaluate.py: exact log lines, bad cases, report, baseline, binary tasks."""

import json
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, top_k_accuracy_score

import export_model
import predict
from analysis import evaluate
from helpers import ROOT, assert_user_error, load_script, read_lines, run, run_here, write_lines
from textcls.analysis.evaluation_report import score_splits, write_report
from textcls.common import stored_texts
from textcls.common.probabilities import softmax
from textcls.data.tokens import tokenize
from textcls.models.checkpoints import load_checkpoint
from textcls.models.configs import change_config
from textcls.models.inference import predict_logits, predict_probs
from textcls.training.scoring import compute_metrics, find_bad_cases

DATA = ROOT / "data"
infer = load_script("deploy/predictor", "infer")
LABELS = read_lines(DATA / "label.txt")
STAMP = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] \[    INFO\] - ", re.MULTILINE)


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory):
    """(folder of the outputs, log lines without their stamps)"""
    folder = tmp_path_factory.mktemp("evaluate")
    process = run("analysis/evaluate.py", "--device", "cpu", "--max_seq_length", 64, "--batch_size", 32, "--dataset_dir", DATA,
                  "--params_path", checkpoint, "--bad_case_file", folder / "bad_case.txt", "--report_dir", folder / "report",
                  "--baseline")
    assert process.returncode == 0, process.stderr
    return folder, [STAMP.sub("", line) for line in process.stderr.split("\n") if STAMP.match(line)]


@pytest.fixture(scope="module")
def expected(checkpoint, tmp_path_factory):
    """The dev set through predict.py: (label ids, probabilities), to compute every figure anew with scikit-learn."""
    folder = tmp_path_factory.mktemp("expected")
    rows = [line.split("\t") for line in read_lines(DATA / "dev.txt")]
    write_lines(folder / "texts.txt", [text for text, _ in rows])
    process = run_here(predict.main, "--params_path", checkpoint, "--dataset_dir", folder, "--data_file", "texts.txt",
                  "--output_file", folder / "out", "--output_format", "jsonl", "--top_k", 11)
    assert process.returncode == 0, process.stderr
    probs = []
    for line in read_lines(folder / "out"):
        by_label = {entry["label"]: entry["probability"] for entry in json.loads(line)["top_k"]}
        probs.append([by_label[label] for label in LABELS])
    return [LABELS.index(label) for _, label in rows], probs


def test_log_lines_to_the_letter(evaluated, expected):
    log = evaluated[1]
    log = log[log.index("-----Evaluate model-------"):]
    label_ids, probs = expected
    guesses = [row.index(max(row)) for row in probs]
    scores = precision_recall_fscore_support(label_ids, guesses, labels=range(11), zero_division=0)
    assert log[:6] == [
        "-----Evaluate model-------", "Train dataset size: 1210", "Dev dataset size: 264",
        f"Accuracy in dev dataset: {accuracy_score(label_ids, guesses) * 100:.2f}%",
        f"Top-2 accuracy in dev dataset: {top_k_accuracy_score(label_ids, probs, k=2, labels=range(11)) * 100:.2f}%",
        f"Top-3 accuracy in dev dataset: {top_k_accuracy_score(label_ids, probs, k=3, labels=range(11)) * 100:.2f}%"]
    for index, label in enumerate(LABELS):
        name, train, dev, rule = log[6 + 4 * index:10 + 4 * index]
        assert (name, rule) == (f"Class name: {label}", "----------------------------")
        assert re.fullmatch(r"Evaluation examples in train dataset: 110\(9\.1%\) \| precision: \d+\.\d\d \| recall: \d+\.\d\d "
                            r"\| F1 score \d+\.\d\d", train)
        precision, recall, f1 = (scores[k][index] * 100 for k in range(3))
        assert dev == (f"Evaluation examples in dev dataset: 24(9.1%) | precision: {precision:.2f} | recall: {recall:.2f} "
                       f"| F1 score {f1:.2f}")
    macro = precision_recall_fscore_support(label_ids, guesses, average="macro", zero_division=0)
    assert (f"Macro average in dev dataset | precision: {macro[0] * 100:.2f} | recall: {macro[1] * 100:.2f} | F1 score "
            f"{macro[2] * 100:.2f}") in log


def test_a_trainers_metrics_are_scikit_learns():
    """compute_metrics, which train.py and prune.py log, where a class has no label, one no guess, one neither."""
    generator = np.random.default_rng(1)
    logits, label_ids = generator.normal(size=(200, 6)), generator.choice([0, 1, 2, 4], 200)
    logits[:, 2], logits[:, 5] = -9, -9
    found = compute_metrics(SimpleNamespace(predictions=logits, label_ids=label_ids))
    expected = {"accuracy": accuracy_score(label_ids, logits.argmax(axis=1))}
    for average in ("micro", "macro"):
        scores = precision_recall_fscore_support(label_ids, logits.argmax(axis=1), average=average, zero_division=0)
        expected.update(zip((f"{average}_precision", f"{average}_recall", f"{average}_f1"), scores))
    assert found == pytest.approx(expected, abs=1e-12) and list(found) == list(expected)
    assert found["macro_f1"] != pytest.approx(found["micro_f1"], abs=0.01)


def test_bad_cases_are_the_wrong_dev_texts(evaluated, expected):
    header, *rows = read_lines(evaluated[0] / "bad_case.txt")
    assert header == "Text\tLabel\tPrediction"
    label_ids, probs = expected
    wrong = [f"{line}\t{LABELS[row.index(max(row))]}" for line, label_id, row in
             zip(read_lines(DATA / "dev.txt"), label_ids, probs) if row.index(max(row)) != label_id]
    assert rows == wrong and wrong


def test_many_texts_are_answered_part_by_part(evaluated, checkpoint, tmp_path, monkeypatch):
    """With the same result, however small the parts are; that dev.txt has fitted the temperature is seen, too."""
    monkeypatch.setattr(evaluate, "CHUNK", 100)
    monkeypatch.setattr(stored_texts, "PART", 50)
    process = run_here(evaluate.main, "--max_seq_length", 64, "--dataset_dir", DATA, "--params_path", checkpoint,
                       "--bad_case_file", tmp_path / "bad_case.txt")
    assert process.returncode == 0, process.stderr
    log = [STAMP.sub("", line) for line in process.stderr.split("\n") if STAMP.match(line)]
    start = log.index("-----Evaluate model-------")
    assert set(log[start:start + 50]) <= set(evaluated[1]) and "(fitted on this file, so each row by" in process.stderr
    assert (tmp_path / "bad_case.txt").read_bytes() == (evaluated[0] / "bad_case.txt").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["bad_case.txt"]


def test_report_is_complete_and_self_contained(evaluated, expected):
    folder, log = evaluated[0] / "report", evaluated[1]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert sum(map(sum, metrics["dev"]["confusion_matrix"])) == 264
    assert sum(row[i] for i, row in enumerate(metrics["dev"]["confusion_matrix"])) / 264 == metrics["dev"]["accuracy"]
    bins = metrics["dev"]["calibration_bins"]
    error = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / 264
    assert sum(b["count"] for b in bins) == 264
    assert metrics["dev"]["expected_calibration_error"] == pytest.approx(error)
    for name in ("confusion_matrix.png", "reliability.png", "risk_coverage.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert [b["count"] for b in bins] == [18] * 9 + [17] * 6
    page = (folder / "report.html").read_text(encoding="utf-8")
    confidence = sum(b["count"] * b["confidence"] for b in bins) / 264 * 100
    assert float(re.search(r"On dev it is (\S+)% on average", page)[1]) == pytest.approx(confidence, abs=0.006)
    assert f"accuracy over 15 ranges of confidence with equally many texts, {error * 100:.1f} points" in page
    assert "src=\"data:image/png;base64," in page and "http" not in page
    for line in read_lines(evaluated[0] / "bad_case.txt")[1:]:
        assert f'<td class="text">{line.split(chr(9))[0]}</td>' in page
    baseline = re.search(r"\| accuracy in dev dataset: (\S+)% \| macro F1 score (\S+) \| this model: (\S+)%", "\n".join(log))
    assert float(baseline[1]) == round(metrics["baseline"]["accuracy"] * 100, 2) > 80
    assert float(baseline[3]) == round(metrics["dev"]["accuracy"] * 100, 2)


def test_many_classes_have_a_list_of_confusions_instead_of_a_matrix(tmp_path):
    """It says the same; all files stay small."""
    generator, labels = np.random.default_rng(0), [f"类{number}" for number in range(3000)]
    label_ids, probs = generator.integers(3000, size=2000), generator.random((2000, 3000), dtype=np.float32) / 1500
    probs[:400][np.arange(400), label_ids[:400]] = 0.5
    label_ids[400:403], probs[400:403, 7] = 9, 0.9  # one confusion three times
    train, dev = score_splits(labels, [label_ids] * 2, [np.log(probs)] * 2)
    bad_cases = find_bad_cases([f"文本{number}" for number in range(2000)], label_ids, probs, labels)
    write_report(tmp_path, labels, train, dev, bad_cases, None, "checkpoint")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "metrics.json", "reliability.png", "risk_coverage.png"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 3e6
    confusions = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["dev"]["confusions"]
    wrong = Counter((label_id, guess) for label_id, guess in zip(label_ids.tolist(), probs.argmax(axis=1).tolist())
                    if label_id != guess)
    assert confusions[0] == [9, 7, 3] and {(label_id, guess): count for label_id, guess, count in confusions} == wrong
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<td class="left">类9</td><td class="left">类7</td><td>3</td>' in page and "最多的 50 种混淆" in page
    assert page.count('<td class="left stays">') == 3000
    assert page.count('<td class="text">') == 1000 and f"还有 {len(bad_cases) - 1000} 条没有列出" in page


def test_binary_task_escaping_and_a_class_without_dev_rows(binary, tmp_path):
    data, checkpoint = binary
    write_lines(tmp_path / "label.txt", read_lines(data / "label.txt"))
    write_lines(tmp_path / "train.txt", read_lines(data / "train.txt"))
    write_lines(tmp_path / "dev.txt", ["<script>alert(1)</script>看牙多少钱\t病因分析", "为什么会发烧\t病因分析"])
    process = run_here(evaluate.main, "--dataset_dir", tmp_path, "--params_path", checkpoint, "--bad_case_file",
                  tmp_path / "bad.txt", "--bad_case_confidence", "--report_dir", tmp_path / "report")
    assert process.returncode == 0, process.stderr
    assert "Top-2" not in process.stderr
    assert "Evaluation examples in dev dataset: 0 (0%)" in process.stderr
    header, row = read_lines(tmp_path / "bad.txt")
    assert header == "Text\tLabel\tPrediction\tConfidence"
    assert re.fullmatch(r"<script>.*看牙多少钱\t病因分析\t医疗费用\t(0\.[5-9]\d\d\d|1\.0000)", row)
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page


def test_no_baseline_from_a_single_class(binary, tmp_path):
    data, checkpoint = binary
    write_lines(tmp_path / "train.txt", ["看牙多少钱\t医疗费用", "挂号费多少\t医疗费用"])
    write_lines(tmp_path / "dev.txt", ["为什么会发烧\t病因分析"])
    process = run_here(evaluate.main, "--dataset_dir", tmp_path, "--params_path", checkpoint, "--bad_case_file",
                  tmp_path / "bad.txt", "--baseline")
    assert process.returncode == 0, process.stderr
    assert "No baseline: the training rows are all of one class" in process.stderr


def test_the_log_says_how_sure_the_figures_are(evaluated, checkpoint):
    """dev.txt is what the temperature was fitted on, so that the figures are cross-fitted; on other rows it is applied."""
    log, saved = evaluated[1], json.loads((checkpoint / "config.json").read_text())["calibration"]
    metrics = json.loads((evaluated[0] / "report/metrics.json").read_text(encoding="utf-8"))["dev"]
    (low, high), (low_f1, high_f1) = (metrics["intervals"][name] for name in ("accuracy", "macro_f1"))
    assert low < metrics["accuracy"] < high and low_f1 < metrics["macro_f1"] < high_f1
    assert (f"95% intervals in dev dataset | accuracy: {low * 100:.2f} to {high * 100:.2f} | macro F1 score: "
            f"{low_f1 * 100:.2f} to {high_f1 * 100:.2f} (bootstrap of the 264 rows)") in log
    before = metrics["without_temperature"]
    assert (f"Calibration in dev dataset | expected calibration error {before['expected_calibration_error']:.4f} -> "
            f"{metrics['expected_calibration_error']:.4f} | NLL {before['nll']:.4f} -> {metrics['nll']:.4f} | temperature "
            f"{saved['temperature']:.4f} (fitted on this file, so each row by one fitted on others)") in log
    assert f"Risk-coverage curve in dev dataset | AURC {metrics['risk_coverage']['aurc']:.4f}, " in "\n".join(log)
    assert metrics["is_cross_fitted"] and saved["rows"] == 264 and saved["file"] == "dev.txt"


@pytest.fixture
def own(checkpoint, tmp_path):
    """(copy of the checkpoint, data folder without the rows that the temperature was fitted on)."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.txt", "label.txt"):
        shutil.copy(DATA / name, data)
    write_lines(data / "dev.txt", read_lines(DATA / "dev.txt")[:200])
    write_lines(data / "data.txt", [line.split("\t")[0] for line in read_lines(DATA / "dev.txt")])
    return shutil.copytree(checkpoint, tmp_path / "own", ignore=shutil.ignore_patterns("checkpoint-*", "runs")), data


def test_a_threshold_is_found_saved_exported_and_taken(own, tmp_path):
    folder, data = own
    options = ["--dataset_dir", data, "--params_path", folder, "--dev_file", "dev.txt"]
    outputs = [tmp_path / name for name in ("predicted", "inferred")]
    auto = ["--dataset_dir", data, "--threshold", "auto", "--output_format", "jsonl", "--output_file"]
    assert_user_error(run_here(predict.main, "--params_path", folder, *auto, outputs[0]),
                      f"--threshold auto: {folder}/config.json holds no threshold, expected a number, or one that "
                      "analysis/evaluate.py --wanted_precision 0.95 --save_threshold has saved\n")
    process = run_here(evaluate.main, *options, "--bad_case_file", tmp_path / "bad", "--wanted_precision", "0.6",
                       "--save_threshold", "--report_dir", tmp_path / "report")
    assert process.returncode == 0, process.stderr
    said = re.search(r"The threshold for a precision of 0\.6 in dev\.txt: (0\.\d{6}) \| coverage (\S+)% \((\d+) of 200 texts\)"
                     r" \| precision there (\S+)%, with a confidence of 95% at least (\S+)%", process.stderr)
    assert "(fitted on other rows)" in process.stderr and 60 <= float(said[5]) < float(said[4])
    saved = json.loads((folder / "config.json").read_text())["threshold"]
    assert f"{saved['value']:.6f}" == said[1] and f"{saved['coverage'] * 100:.2f}" == said[2]
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert f"From the threshold {said[1]} on the precision is at least 0.6" in page
    export = tmp_path / "export"
    for main, *words in ((export_model.main, "--params_path", folder, "--output_path", export, "--onnx"),
                         (predict.main, "--params_path", folder, *auto, outputs[0]),
                         (infer.main, "--model_path_prefix", export, *auto, outputs[1])):
        process = run_here(main, *words)
        assert process.returncode == 0, process.stderr
    for predicted, inferred in zip(*map(read_lines, outputs)):
        one, other = json.loads(predicted), json.loads(inferred)
        is_sure = one["probability"] >= saved["value"]
        assert one["label"] == other["label"] == (one["top_k"][0]["label"] if is_sure else "undecided")
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)
    rows = [json.loads(line)["label"] for line in read_lines(outputs[0])][:200]
    assert len(rows) - rows.count("undecided") == int(said[3])

    deploy = json.loads((export / "deploy.json").read_text())
    deploy["threshold"]["weights"]["onnx"] = "0" * 16
    (export / "deploy.json").write_text(json.dumps(deploy))
    assert_user_error(run_here(infer.main, "--model_path_prefix", export, *auto, outputs[1]),
                      f"--threshold auto: the threshold in {export}/deploy.json was found with another model, expected a number, "
                      "or a new one by analysis/evaluate.py --wanted_precision 0.95 --save_threshold and a new export\n")
    change_config(str(folder), threshold={**saved, "weights": "0" * 16})
    assert_user_error(run_here(predict.main, "--params_path", folder, *auto, outputs[0]),
                      f"--threshold auto: the threshold in {folder}/config.json was found with another model")
    process = run_here(export_model.main, "--params_path", folder, "--output_path", export)
    assert "its threshold was found with another model, temperature or length: it is not used." in process.stderr
    assert "threshold" not in json.loads((export / "deploy.json").read_text())


def test_a_checkpoint_of_before_works_as_it_did(own, tmp_path):
    folder, data = own
    change_config(str(folder), calibration=None)
    process = run_here(evaluate.main, "--dataset_dir", data, "--params_path", folder, "--bad_case_file", tmp_path / "bad",
                       "--wanted_precision", "0.99", "--save_threshold")
    assert process.returncode == 0 and re.search(r"Calibration in dev dataset \| expected calibration error 0\.\d{4} \| NLL "
                                                 r"\d\.\d{4} \| no temperature\n", process.stderr)
    assert ("No threshold for a precision of 0.99 in dev.txt: 200 rows are too few to show it, even if all answers were right: "
            "299 are needed. Nothing is saved.") in process.stderr
    assert "threshold" not in json.loads((folder / "config.json").read_text())
    checkpoint = load_checkpoint(str(folder))
    tokens = tokenize(["头疼怎么办"], checkpoint.encode)
    np.testing.assert_array_equal(predict_probs(checkpoint, tokens, 1), softmax(predict_logits(checkpoint, tokens, 1)))


def test_wrong_precisions_and_temperatures_are_refused(own, tmp_path):
    folder, data = own
    options = ["--dataset_dir", data, "--params_path", folder, "--bad_case_file", tmp_path / "bad"]
    for wrong in ("0", "1.0", "nan", "x"):
        assert_user_error(run_here(evaluate.main, *options, "--wanted_precision", wrong),
                          f"--wanted_precision: '{wrong}': expected a number above 0 and below 1, such as 0.95")
    assert_user_error(run_here(evaluate.main, *options, "--save_threshold"), "expected --wanted_precision too, such as 0.95")
    change_config(str(folder), calibration={"temperature": -2})
    assert_user_error(run_here(evaluate.main, *options),
                      f"{folder}/config.json: calibration: temperature is -2, expected a number, 0.05 to 20.0")
    assert not (tmp_path / "bad").exists()


def test_wrong_input_writes_nothing(checkpoint, tmp_path):
    for name in ("train.txt", "label.txt"):
        write_lines(tmp_path / name, read_lines(DATA / name))
    write_lines(tmp_path / "dev.txt", ["没有标签"])
    process = run_here(evaluate.main, "--dataset_dir", tmp_path, "--params_path", checkpoint, "--bad_case_file",
                  tmp_path / "bad.txt", "--report_dir", tmp_path / "report")
    assert_user_error(process, f"{tmp_path}/dev.txt:1: no tab in '没有标签', expected <text><tab><label>")
    write_lines(tmp_path / "label.txt", LABELS + LABELS[-1:])
    process = run_here(evaluate.main, "--dataset_dir", tmp_path, "--params_path", checkpoint, "--bad_case_file",
                  tmp_path / "bad.txt", "--report_dir", tmp_path / "report")
    assert_user_error(process, "label.txt:12: label '其他' again", "dev.txt:1: no tab", "2 problems found.")
    assert not (tmp_path / "bad.txt").exists() and not (tmp_path / "report").exists()
    process = run_here(evaluate.main, "--dataset_dir", tmp_path, "--params_path", checkpoint, "--bad_case_file",
                       tmp_path / "test.txt")
    assert_user_error(process, "test.txt: is a data file, expected another name for the output")
