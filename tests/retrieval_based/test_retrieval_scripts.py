"""The scripts of retrieval_based/ that build an index, change, evaluate and use it."""

import json
import shutil

import numpy as np
import pytest

from helpers import ROOT, assert_user_error, load_script, read_lines, run, run_here, write_lines
from textcls.retrieval.encoder import open_encoder
from textcls.retrieval.index import open_index
from textcls.retrieval.nearest import nearest
from textcls.retrieval.search import Found, label_probabilities, label_ranks, label_similarities, lexical_nearest, vote

build, change, evaluate, predict, recall, benchmark = [
    load_script("retrieval_based", name) for name in ("build_index", "index", "evaluate", "predict", "recall", "benchmark")]
LABELS = read_lines(ROOT / "data/label.txt")
ROWS = [line.split("\t") for line in read_lines(ROOT / "data/train.txt")][:300]
DEV = [line.split("\t") for line in read_lines(ROOT / "data/dev.txt")]
TEXTS = [text for text, _ in ROWS]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "train.txt", ["\t".join(row) for row in ROWS])
    write_lines(folder / "dev.txt", ["\t".join(row) for row in DEV[:120]])
    write_lines(folder / "label.txt", [f"{LABELS[0]}==诊断", *LABELS[1:]])
    write_lines(folder / "data.txt", [text for text, _ in DEV[120:150]])
    return folder


@pytest.fixture(scope="module")
def built(encoder_export, data):
    process = run_here(build.main, "--params_path", encoder_export, "--data_dir", data, "--index_dir", data / "index",
                       "--precision", "0.8", "--dtype", "float16", "--data_name", "corpus")
    assert process.returncode == 0, process.stderr
    return data / "index", process.stderr


def test_a_precision_that_dev_cannot_show_is_said(encoder_export, data, tmp_path):
    process = run_here(build.main, "--params_path", encoder_export, "--data_dir", data, "--index_dir", tmp_path / "index",
                       "--precision", "0.99", "--corpus", "labels")
    assert process.returncode == 0 and open_index(tmp_path / "index").header["threshold"] is None
    assert ("No threshold for a precision of 0.99 in dev.txt: 120 rows are too few to show it, even if all answers were right: "
            "299 are needed." in process.stderr)


def copy_index(built, tmp_path):
    return shutil.copytree(built[0], tmp_path / "index")


def test_build_tries_all_corpora_and_takes_the_best(built, data):
    index, log = open_index(built[0]), built[1]
    fused = {line.split("Corpus ")[1].split(":")[0]: float(line.split("fused ")[1].split("%")[0])
             for line in log.splitlines() if "Corpus " in line}
    assert sorted(fused) == ["labels", "means", "texts"] and fused[index.header["corpus"]] == max(fused.values())
    assert index.header["labels"][0] == {"id": 0, "name": LABELS[0], "texts": ["诊断"]} and index.header["threshold"]
    assert np.load(data / "corpus_embedding.npy").shape == (len(index.row_labels), index.header["dimension"])


def test_the_earlier_options_of_feature_extraction_are_taken(encoder_export, data, tmp_path):
    process = run_here(build.main, "--model_dir", encoder_export, "--corpus_file", data / "label.txt", "--output_dir", tmp_path,
                       "--data_name", "label", "--precision", "fp32", "--use_tensorrt", "False", "--device", "cpu",
                       "--index_dir", tmp_path / "index", "--data_dir", tmp_path, "--hnsw", "on", "--dtype", "int8")
    assert process.returncode == 0 and "HNSW: recall@10 against exact search 1.0000" in process.stderr, process.stderr
    assert "the confidence is not calibrated" in process.stderr
    vectors, index = np.load(tmp_path / "label_embedding.npy"), open_index(tmp_path / "index")
    assert index.header["corpus"] == "labels" and [index.text(row) for row in range(3)] == [LABELS[0], "诊断", LABELS[1]]
    np.testing.assert_allclose(vectors, open_encoder(encoder_export).encode([LABELS[0], "诊断", *LABELS[1:]]), atol=1e-5)
    write_lines(tmp_path / "label.txt", [*LABELS, "没有文本的"])
    write_lines(tmp_path / "lines.txt", ["\t".join(row) for row in ROWS[:40]])
    words = ["--model_dir", encoder_export, "--corpus_file", tmp_path / "lines.txt", "--data_name", "lines", "--data_dir",
             tmp_path, "--index_dir", tmp_path / "index"]
    process = run_here(build.main, *words, "--precision", "0.9")
    assert process.returncode == 0 and "no threshold is known" in process.stderr, process.stderr
    assert "share of the dev texts" not in process.stderr  # there are none
    vectors = np.load(tmp_path / "lines_embedding.npy")
    np.testing.assert_allclose(vectors, open_encoder(encoder_export).encode(TEXTS[:40]), atol=1e-5)
    index = open_index(tmp_path / "index")
    assert index.header["corpus"] == "texts" and index.text(len(index.row_labels) - 1) == "没有文本的"
    assert_user_error(run_here(build.main, *words, "--corpus", "means"), "expected --corpus texts")


def test_evaluation_is_that_of_the_formulas(built, encoder_export, data, tmp_path):
    foreign = ["今天天气怎么样\t别的", "股票还会涨吗\t别的"]
    write_lines(tmp_path / "test.txt", read_lines(data / "dev.txt") + foreign)
    process = run_here(evaluate.main, "--params_path", encoder_export, "--index_dir", built[0], "--dataset_dir", tmp_path,
                       "--test_file", "test.txt", "--unknown_label", "别的", "--threshold", "auto", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    index, encoder = open_index(built[0]), open_encoder(encoder_export)
    texts, names = zip(*(line.split("\t") for line in read_lines(data / "dev.txt")))
    ids, vectors = np.array([LABELS.index(name) for name in names]), encoder.encode(list(texts))
    probs = label_probabilities(index, vectors, list(texts))
    best = np.full((len(texts), len(LABELS)), -np.inf)
    for row, label in enumerate(index.row_labels):
        best[:, label] = np.maximum(best[:, label], vectors @ index.take(np.array([row]))[0])
    np.testing.assert_allclose(label_similarities(index, vectors), best, atol=1e-5)
    ranks = np.array([1 + sum((probs[row, other], best[row, other], -other) > (probs[row, label], best[row, label], -label)
                              for other in range(len(LABELS))) for row, label in enumerate(ids)])
    np.testing.assert_array_equal(label_ranks(probs, label_similarities(index, vectors))[np.arange(len(ids)), ids], ranks)
    guesses = probs.argmax(axis=1)
    f1 = [2 * ((guesses == label) & (ids == label)).sum() / ((guesses == label).sum() + (ids == label).sum())
          for label in set(ids) | set(guesses)]
    for k in (1, 5, 10):
        assert f"recall@{k}={(ranks <= k).mean() * 100:.3f}" in process.stderr
    assert f"MRR={(1 / ranks).mean():.5f}" in process.stderr
    accuracy = (guesses == ids).mean()
    assert f"Accuracy: {accuracy * 100:.2f}% | macro F1 score {np.mean(f1) * 100:.2f} | 120 texts" in process.stderr
    assert "Unknown texts: 2 | AUROC" in process.stderr and "undecided" in process.stderr
    wrong = [f"{texts[row]}\t{names[row]}\t{LABELS[guesses[row]]}" for row in np.flatnonzero(guesses != ids)]
    assert read_lines(tmp_path / "bad_case.txt") == ["Text\tLabel\tPrediction", *wrong]
    process = run_here(evaluate.main, "--params_path", encoder_export, "--index_dir", built[0], "--dataset_dir", tmp_path,
                       "--test_file", "test.txt", cwd=tmp_path)
    assert_user_error(process, "test.txt:121: label '别的' is not in")
    process = run_here(evaluate.main, "--params_path", encoder_export, "--index_dir", built[0], "--dataset_dir", data,
                       "--unknown_label", "别的", cwd=tmp_path)
    assert f"--unknown_label 别的: no text of {data}/dev.txt has this label" in process.stderr and process.returncode == 0
    rows = Found(*nearest(index, vectors, 50), *lexical_nearest(index, texts, 50), vectors)
    for weight, similarities, found, settings in ((0, rows.similarities, rows.rows, index.header["vote"]),
                                                  (1, rows.lexical_similarities, rows.lexical_rows, index.header["lexical"])):
        guesses = vote(index, similarities, found, settings["neighbours"], settings["temperature"]).argmax(axis=1)
        process = run_here(evaluate.main, "--params_path", encoder_export, "--index_dir", built[0], "--dataset_dir", data,
                           "--lexical_weight", weight, "--head_weight", "0", cwd=tmp_path)
        assert f"Accuracy: {(guesses == ids).mean() * 100:.2f}% |" in process.stderr
    assert_user_error(run_here(evaluate.main, "--lexical_weight", 1.5), "--lexical_weight: '1.5': expected a number, 0 to 1")


def test_predictions_in_all_forms_agree(built, encoder_export, data, tmp_path):
    options = ["--params_path", encoder_export, "--index_dir", built[0], "--dataset_dir", data]
    process = run_here(predict.main, *options, "--output_format", "jsonl", "--top_k", "3", "--num_nearest", "2", "--output_file",
                       "-")
    assert process.returncode == 0, process.stderr
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == read_lines(data / "data.txt")
    for answer in answers:
        assert answer["label"] == answer["top_k"][0]["label"] and len(answer["top_k"]) == 3 and len(answer["nearest"]) == 2
        assert answer["probability"] >= answer["top_k"][1]["probability"] and answer["nearest"][0]["similarity"] <= 1.0001
    for form in ("tsv", "csv"):
        process = run_here(predict.main, *options, "--output_format", form, "--output_file", tmp_path / form, "--top_k", "2")
        assert process.returncode == 0, process.stderr
    columns = [line.split("\t") for line in read_lines(tmp_path / "tsv")]
    assert columns[0] == ["text", "label", "probability", "label_2", "probability_2"]
    assert [row[1] for row in columns[1:]] == [answer["label"] for answer in answers]
    threshold = open_index(built[0]).header["threshold"]["value"]
    process = run_here(predict.main, *options, "--data_file", "-", "--output_file", "-", "--threshold", "auto",
                       stdin=(data / "data.txt").read_text(encoding="utf-8"))
    expected = [answer["label"] if answer["probability"] >= threshold else "undecided" for answer in answers]
    assert process.stdout.splitlines() == ["text\tlabel", *(f"{a['text']}\t{label}" for a, label in zip(answers, expected))]
    write_lines(tmp_path / "pairs.txt", ["感冒怎么办\t感冒怎么办", "感冒怎么办\t戴牙套贵吗"])
    lines = run_here(predict.main, *options, "--text_pair_file", tmp_path / "pairs.txt").stdout.splitlines()
    assert lines[0].endswith("\t1.000000") and float(lines[1].split("\t")[2]) < 0.9999
    write_lines(tmp_path / "pairs.txt", ["感冒怎么办\t ", "感冒怎么办"])
    assert_user_error(run_here(predict.main, *options, "--text_pair_file", tmp_path / "pairs.txt"),
                      "pairs.txt:1: empty or blank, expected <text>", "pairs.txt:2: no pair of texts")


def test_labels_change_from_the_command_line(built, encoder_export, tmp_path):
    folder = copy_index(built, tmp_path)
    options = ["--index_dir", folder, "--params_path", encoder_export]
    texts = ["打完疫苗能喝酒吗", "疫苗第二针隔多久打"]
    process = run("retrieval_based/index.py", "add", "疫苗接种", "--texts", *texts, *options)
    assert process.returncode == 0 and " ms; 12 labels now" in process.stderr, process.stderr
    assert_user_error(run_here(build.main, "--data_dir", "data", *options), "holds an index that was changed by index.py")
    rows = len(open_index(folder).row_labels)
    process = run_here(change.main, "add", "疫苗接种", "--texts", "打完疫苗能喝酒吗 ", "疫苗第三针隔多久打", *options)
    assert process.returncode == 0 and "add 疫苗接种, 2 texts (1 of them there already), " in process.stderr, process.stderr
    assert run_here(change.main, "add", "疫苗接种", "--texts", *texts, *options).returncode == 0  # nothing is new
    index = open_index(folder)
    assert len(index.row_labels) == rows + 1 and index.rows_per_label()[-1] == 3 + (index.header["corpus"] == "labels")
    for words in (["describe", "疫苗接种", "--texts", "预防针", *options], ["rename", "疫苗接种", "接种", *options]):
        process = run_here(change.main, *words)
        assert process.returncode == 0, process.stderr
    write_lines(tmp_path / "data.txt", texts)
    process = run_here(predict.main, *options, "--dataset_dir", tmp_path, "--output_file", "-")
    assert process.stdout.splitlines()[1:] == [f"{text}\t接种" for text in texts]
    for words, message in [
            (["remove", "接总"], "no label '接总' (did you mean '接种'?)"),
            (["describe", "预防", "--texts", "a"], "no label '预防'"),
            (["add", "", "--texts", "a"], "label '': empty or blank"), (["add", "a\tb", "--texts", "a"], "'a\\tb': a tab"),
            (["add", f"{LABELS[0]}\u200b", "--texts", "a"], ": an invisible character"),
            (["rename", "接种", "接\x07种"], ": an invisible character"),
            (["add", "undecided", "--texts", "a"], "label 'undecided': is what answers below"),
            (["rename", "接种", "undecided"], "label 'undecided': is what answers below"),
            (["add", "新", "--texts", "a", " "], "--texts:2: empty or blank"), (["rename", "接种", LABELS[0]], "already"),
            (["add", "新", "--text_file", tmp_path / "none.txt"], "none.txt: file not found"),
            (["remove", "接种", "--index_dir", tmp_path / "none"], "no index here")]:
        assert_user_error(run_here(change.main, *words, *(options[2:] if "--index_dir" in words else options)), message)
    for label in ["接种", *LABELS[:-2]]:
        assert run_here(change.main, "remove", label, *options).returncode == 0
    assert_user_error(run_here(change.main, "remove", LABELS[-1], *options), "only two labels are left")
    assert len(open_index(folder).labels) == 2


def test_recalled_lines_are_written_and_evaluated(encoder_export, data, tmp_path):
    old_path = encoder_export / "model_best/model_state.pdparams"  # as older command lines have it
    options = ["--params_path", old_path, "--similar_text_pair_file", data / "dev.txt", "--recall_num", "5",
               "--output_emb_size", "0", "--hnsw_m", "100", "--hnsw_ef", "100", "--batch_size", "64",
               "--max_seq_length", "60", "--recall_result_dir", tmp_path]
    process = run_here(recall.main, "--corpus_file", data / "train.txt", *options)
    assert process.returncode == 0 and process.stderr.count("has no effect") == 3
    assert "--hnsw_ef has no effect: this search is exact." in process.stderr
    rows = [line.split("\t") for line in read_lines(tmp_path / "recall_result_file")]
    pairs = [line.split("\t") for line in read_lines(data / "dev.txt")]
    assert [row[0] for row in rows] == [text for text, _ in pairs for _ in range(5)]
    share = np.mean([label in [row[1] for row in rows[5 * place:5 * place + 5]] for place, (_, label) in enumerate(pairs)])
    words = ["--similar_text_pair", data / "dev.txt", "--recall_result_file", tmp_path / "recall_result_file", "--recall_num"]
    process = run_here(evaluate.main, *words, "5", cwd=data)
    assert not (data / "result.tsv").exists()
    assert f"recall@5={share * 100:.3f}" in process.stderr and 0 < share < 1
    assert read_lines(tmp_path / "result.tsv")[0].split("\t")[2] == f"{share * 100:.3f}"
    assert "recall@10" not in process.stderr
    assert_user_error(run_here(evaluate.main, *words, "4", cwd=tmp_path), "600 lines for 120 texts")
    process = run_here(recall.main, "--corpus_file", data / "label.txt", *options, "--recall_num", "50")
    assert process.returncode == 0 and len(read_lines(tmp_path / "recall_result_file")) == 12 * 120
    process = run_here(evaluate.main, *words, "50", cwd=tmp_path)
    assert process.returncode == 0 and "recall@10=" in process.stderr and "recall@20" not in process.stderr, process.stderr


def test_the_benchmark_adds_labels_that_were_left_out(encoder_export, data, tmp_path):
    """With an encoder that is there already, which is not trained again."""
    folder = shutil.copytree(data, tmp_path / "data")
    write_lines(folder / "test.txt", ["\t".join(row) for row in DEV[120:180]])
    shutil.copytree(encoder_export, tmp_path / "out/seed-7/export")
    options = ["--model_name_or_path", "none", "--data_dir", folder, "--leave_out", 1, "--shots", 5, "--seeds", 7, "--output_dir",
               tmp_path / "out", "--train_options", "--num_train_epochs", 1, "--learning_rate", 1e-3]
    process = run_here(benchmark.main, *options)
    assert process.returncode == 0, process.stderr
    [result] = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    [new] = result["new labels"]
    assert new not in "".join(read_lines(tmp_path / "out/seed-7/train.txt") + read_lines(tmp_path / "out/seed-7/label.txt"))
    assert set(open_index(tmp_path / "out/seed-7/index").labels) == set(LABELS)
    answers = [json.loads(line)["label"] for line in read_lines(tmp_path / "out/seed-7/after.jsonl")]
    truth = [label for _, label in DEV[120:180]]
    assert result["new recall"] == np.mean([answer == new for answer, label in zip(answers, truth) if label == new])
    assert f"{100 * result['new recall']:.2f}" in process.stdout and 0.3 < result["old after"] <= 1
    (tmp_path / "out/seed-7/training.json").write_text(json.dumps({"model_name_or_path": "other"}), encoding="utf-8")
    assert_user_error(run_here(benchmark.main, *options), "seed-7: holds the training of another model")


def test_refusals(built, encoder_export, data, tmp_path):
    options = ["--params_path", encoder_export, "--index_dir", built[0], "--dataset_dir", data, "--output_file", tmp_path / "out"]
    folder = copy_index(built, tmp_path)
    header = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    (folder / "index.json").write_text(json.dumps({**header, "encoder_id": "0" * 16, "threshold": None}), encoding="utf-8")
    assert_user_error(run_here(predict.main, *options, "--index_dir", folder), "made with the encoder 0000000000000000, this one")
    assert_user_error(run_here(predict.main, *options, "--index_dir", tmp_path), "no index here")
    assert_user_error(run_here(predict.main, *options, "--top_k", "50", "--output_format", "tsv"), "--top_k 50")
    assert_user_error(run_here(predict.main, *options, "--threshold", "high"), "expected a number, 0 to 1, or auto")
    assert_user_error(run_here(evaluate.main, *options[:6], "--unknown_label", LABELS[0]), f"--unknown_label {LABELS[0]}")
    words = ["--params_path", encoder_export, "--corpus_file", data / "label.txt", "--similar_text_pair", data / "dev.txt"]
    for process in (run_here(predict.main, *options, "--output_file", data / "train.txt"),
                    run_here(evaluate.main, *options[:6], "--bad_case_file", data / "train.txt"),
                    run_here(recall.main, *words, "--recall_result_dir", data, "--recall_result_file", "train.txt")):
        assert_user_error(process, "train.txt: is a data file, expected another name for the output")
    assert not (tmp_path / "out").exists()
    write_lines(tmp_path / "train.txt", ["没有标签"])
    words = ["--params_path", encoder_export, "--data_dir", tmp_path, "--index_dir", tmp_path / "new", "--corpus", "texts"]
    assert_user_error(run_here(build.main, *words), "label.txt: file not found", "train.txt:1: no tab")
    for wrong in ("1.5", "1.0", "0", "nan"):
        assert_user_error(run_here(build.main, *words, "--precision", wrong),
                          f"--precision: '{wrong}': expected a number above 0 and below 1, such as 0.95")
    assert_user_error(run_here(build.main, *words, "--hnsw_m", "1"), "--hnsw_m 1: expected 2 or more")
    for folder, wrong in ((encoder_export, "is the encoder"), (data, "holds data.txt, a data file"),
                          (tmp_path, "is the data folder"), (ROOT, "is the working folder")):
        assert_user_error(run_here(build.main, *words, "--index_dir", folder), f"--index_dir {folder}: {wrong}")
    assert not (data / "index.json").exists()
    for wrong in (["--index_dir", tmp_path / "train.txt/new"], ["--data_name", "x", "--output_dir", tmp_path / "train.txt"]):
        assert_user_error(run_here(build.main, *words, *wrong), f"cannot be written in {tmp_path / 'train.txt'}")
    write_lines(tmp_path / "label.txt", ["undecided", *LABELS])
    assert_user_error(run_here(build.main, *words, "--corpus", "labels"), "label 'undecided': is what answers below")
    assert not (tmp_path / "new").exists()
