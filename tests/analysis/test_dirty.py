"""analysis/dirty.py: planted label errors are found, formats, like texts, wrong inputs."""

import re
import shutil

import numpy as np
import pytest

import bench_dirty
from analysis import dirty
from helpers import ROOT, assert_user_error, read_lines, run, run_here, write_lines
from textcls.analysis.duplicates import find_conflicts
from textcls.analysis.label_errors import combine, find_label_errors
from textcls.common.errors import UserError
from textcls.data.folds import comparison_key, split_folds

DATA = ROOT / "data"
LABELS = read_lines(DATA / "label.txt")
PLANTED = 121
LIKE = ["头疼  怎么办？\t治疗方案", "头疼怎么办\t其他", "孩子晚上睡觉总是咳嗽应该挂什么科室的号呢\t就医建议",
        "孩子晚上睡觉总是咳嗽应该挂哪个科室的号呢\t其他"]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """(data folder, its rows, line numbers of planted errors): a tenth of the sample rows has another class."""
    folder, random = tmp_path_factory.mktemp("noisy"), np.random.default_rng(1)
    rows = [line.split("\t") for line in read_lines(DATA / "train.txt")]
    planted = random.choice(len(rows), PLANTED, replace=False).tolist()
    for index in planted:
        rows[index][1] = random.choice([label for label in LABELS if label != rows[index][1]])
    rows = ["\t".join(row) for row in rows] + LIKE
    write_lines(folder / "train.txt", rows)
    shutil.copy(DATA / "label.txt", folder)
    return folder, rows, {index + 1 for index in planted}


def check_outputs(folder, rows, count):
    """Check the formats of all outputs against each other; returns the report as lists of columns."""
    listed_rows, rest = read_lines(folder / "train_dirty.txt"), read_lines(folder / "train_dirty_rest.txt")
    header, *report = [line.split("\t") for line in read_lines(folder / "train_dirty_report.tsv")]
    assert header == ["rank", "line", "score", "text", "label", "suggested_label", "probability"]
    assert [int(row[0]) for row in report] == list(range(1, count + 1))
    listed = [int(row[1]) for row in report]
    assert listed_rows == [rows[line - 1] for line in listed] == ["\t".join(row[3:5]) for row in report]
    assert rest == [row for line, row in enumerate(rows, 1) if line not in listed]
    scores = [float(row[2]) for row in report]
    assert scores == sorted(scores, reverse=True) and 0 <= scores[-1] and scores[0] <= 1
    assert all(row[5] in LABELS and 0 < float(row[6]) <= 1 for row in report)
    return report


def test_planted_errors_are_listed_first_and_like_texts_found(noisy, tmp_path):
    source, rows, planted = noisy
    folder = tmp_path / "data"
    shutil.copytree(source, folder)
    process = run("analysis/dirty.py", "--dataset_dir", folder, "--params_path", tmp_path / "none", "--dirty_num", PLANTED)
    assert process.returncode == 0, process.stderr
    report = check_outputs(folder, rows, PLANTED)
    found = [row for row in report if int(row[1]) in planted]
    assert len(found) / PLANTED > 0.6  # by chance: a tenth
    clean = read_lines(DATA / "train.txt")
    mended = sum(clean[int(row[1]) - 1].split("\t")[1] == row[5] for row in found)
    assert mended / len(found) > 0.6  # by chance: an eleventh
    for line in (f"Dirty data saved in {folder}/train_dirty.txt: {PLANTED} rows, most suspicious first",
                 f"Rest data saved in {folder}/train_dirty_rest.txt: {len(rows) - PLANTED} rows",
                 f"Scores and suggested labels saved in {folder}/train_dirty_report.tsv",
                 f"Like texts with different labels saved in {folder}/train_duplicates.tsv: 1 groups of equal, "
                 "1 pairs of similar texts",
                 f"cat {folder}/train_dirty_rest.txt {folder}/train_dirty.txt > {folder}/train_clean.txt"):
        assert line in process.stderr
    header, *like = [line.split("\t") for line in read_lines(folder / "train_duplicates.tsv")]
    assert header == ["group", "similarity", "line", "text", "label"]
    assert [row[0] for row in like] == ["1", "1", "2", "2"] and [row[1] for row in like[:2]] == ["1.0000"] * 2
    assert 0.8 <= float(like[2][1]) < 1 and like[2][1] == like[3][1]
    assert [int(row[2]) for row in like] == list(range(len(rows) - 3, len(rows) + 1))
    assert ["\t".join(row[3:]) for row in like] == LIKE


def test_the_measurement_plants_and_counts():
    process = run_here(bench_dirty.main, "--dataset_dir", DATA, "--noise", 0.1, "--seeds", 1, "--folds", 2, "--device", "cpu")
    assert process.returncode == 0, process.stderr
    header, row = [line.split("\t") for line in process.stdout.splitlines()]
    figures = dict(zip(header, row))
    assert figures["planted"] == "121" and 60 < float(figures["P=R@n"]) < float(figures["R@2n"]) <= 100


def test_representer_with_a_checkpoint(noisy, checkpoint, tmp_path):
    source, rows, planted = noisy
    folder = tmp_path / "data"
    shutil.copytree(source, folder)
    process = run_here(dirty.main, "--dataset_dir", folder, "--params_path", checkpoint, "--dirty_num", PLANTED, "--method",
                  "representer", "--device", "cpu", "--cache_dir", tmp_path / "cache")
    assert process.returncode == 0, process.stderr
    report = check_outputs(folder, rows, PLANTED)
    assert sum(int(row[1]) in planted for row in report) / PLANTED > 0.6
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_vectors_of_a_model_beside_tfidf(noisy, encoder_export, tmp_path):
    source, rows, planted = noisy
    folder = shutil.copytree(source, tmp_path / "data")
    command = [dirty.main, "--dataset_dir", folder, "--dirty_num", PLANTED, "--fold_model", "vectors"]
    assert_user_error(run_here(*command), "--fold_model vectors: expected --model_name_or_path")
    command += ["--model_name_or_path", encoder_export, "--cache_dir", tmp_path / "cache"]
    assert_user_error(run_here(*command, "--max_steps", 2), "unknown option --max_steps 2")
    process = run_here(*command)
    assert process.returncode == 0, process.stderr
    assert re.search(r"Weight of the vectors beside TF-IDF: (0\.\d|1\.0)\n", process.stderr)
    report = check_outputs(folder, rows, PLANTED)
    assert sum(int(row[1]) in planted for row in report) / PLANTED > 0.6
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_finetuned_folds_with_options_for_train(noisy, tiny_model, tmp_path):
    source, rows, _ = noisy
    folder = tmp_path / "data"
    folder.mkdir()
    rows = rows[:200]
    write_lines(folder / "train.txt", rows)
    shutil.copy(source / "label.txt", folder)
    command = [dirty.main, "--dataset_dir", folder, "--dirty_num", 20, "--fold_model", "both", "--folds", 2, "--device",
               "cpu", "--model_name_or_path", tiny_model, "--max_seq_length", 32]
    process = run_here(*command, "--max_steps", 2, "--learning_rate", "nonsense")
    assert_user_error(process, "Fold 1 of 2: train.py ended with code 2", "--learning_rate: invalid float value: 'nonsense'")
    assert sorted(path.name for path in folder.iterdir()) == ["label.txt", "train.txt"]
    process = run_here(*command, "--max_steps", 2, "--per_device_train_batch_size", 8)
    assert process.returncode == 0, process.stderr
    for fold in (1, 2):
        assert f"Fold {fold} of 2: training on 100 rows ..." in process.stderr
    assert re.search(r"Weight of the fine-tuned models beside TF-IDF: (0\.\d|1\.0)\n", process.stderr)
    check_outputs(folder, rows, 20)


def test_the_better_model_gets_the_weight():
    label_ids = np.arange(90) % 3
    good, poor = np.full((90, 3), 0.1), np.full((90, 3), 1 / 3)
    good[np.arange(90), label_ids] = 0.8
    poor[::2] = np.roll(good, 1, axis=1)[::2]
    for order, expected in (((good, poor), 0), ((poor, good), 1)):
        probs, weight = combine(*order, label_ids)
        assert weight == expected
        np.testing.assert_allclose(probs, good, atol=1e-6)


def test_rare_classes():
    """A class with one row comes last, one with two is judged, one without rows does no harm."""
    rows = [line.split("\t") for line in read_lines(DATA / "train.txt") if line.endswith(("医疗费用", "病因分析"))]
    rows = [["看牙是什么原因", "其他"], *rows, ["手抖怎么治", "治疗方案"], ["看牙多少钱", "治疗方案"]]
    label_ids = np.array([LABELS.index(label) for _, label in rows])
    suspects = find_label_errors([text for text, _ in rows], label_ids, len(LABELS), folds=10)
    assert sorted(suspects.order.tolist()) == list(range(len(rows)))
    assert suspects.order[-1] == 0 and suspects.score[0] < 1e-9
    assert {len(rows) - 2, len(rows) - 1} <= set(suspects.order[:8].tolist())
    assert LABELS[suspects.suggested[-1]] == "医疗费用"
    few = find_label_errors(["甲", "乙", "丙", "丁"], np.array([0, 0, 1, 1]), 2, folds=2)  # no character is in two texts
    assert sorted(few.order.tolist()) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="--folds 200: the largest class has 110 different texts"):
        find_label_errors([text for text, _ in rows], label_ids, len(LABELS), folds=200)
    with pytest.raises(UserError, match="all of one class"):
        find_label_errors(["a", "b"], np.array([1, 1]), 2)


def test_like_texts_against_all_pairs():
    """The prefix filter finds what comparing every pair of vectors finds."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [line.split("\t")[0] for name in ("train.txt", "dev.txt") for line in read_lines(DATA / name)]
    keys = list(dict.fromkeys(map(comparison_key, texts)))
    label_ids = np.random.default_rng(2).integers(0, 3, len(keys))
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), lowercase=False).fit_transform(keys)
    cosines = (vectors @ vectors.T).toarray()
    cosines[label_ids[:, None] == label_ids] = 0
    expected = {(min(i, j), max(i, j)) for i, j in enumerate(cosines.argmax(axis=1).tolist()) if cosines[i, j] >= 0.4}
    found = find_conflicts(keys, label_ids, 0.4)
    assert {tuple(rows) for _, rows in found} == expected and len(expected) > 20
    for similarity, (one, other) in found:
        assert similarity == pytest.approx(cosines[one, other], abs=1e-5)
    assert comparison_key("　ＣＴ 检查，多少钱？") == "ct检查多少钱" and comparison_key("？？") == "??"
    different = ["抗原+", "抗原-", "抗原", "血压≥140", "血压≤140", "血糖5.6", "血糖56", "3-5天", "35天"]
    assert len(set(map(comparison_key, different))) == len(different)


def test_equal_texts_share_a_fold_and_corrections_are_kept(tmp_path):
    texts = [f"第{i}条看牙多少钱{mark}" for i in range(20) for mark in ("", "？", " 。")]
    fold_of = split_folds(texts, np.arange(60) // 3 % 2, 5, 3)
    assert (fold_of.reshape(20, 3) == fold_of[::3, None]).all() and sorted(set(fold_of.tolist())) == [0, 1, 2, 3, 4]
    write_lines(tmp_path / "train_dirty.txt", [f"{texts[0]}\t甲", f"{texts[1]}\t乙"])
    dirty.keep_corrections(tmp_path / "train_dirty.txt", texts[:2], np.array([0, 1]), ["甲", "乙"])
    with pytest.raises(UserError, match="train_dirty.txt:2: 1 of its rows are not in the training file"):
        dirty.keep_corrections(tmp_path / "train_dirty.txt", texts[:2], np.array([0, 0]), ["甲", "乙"])


def test_wrong_input_is_refused_before_anything_is_written(tmp_path):
    write_lines(tmp_path / "train.txt", ["看牙多少钱\t医疗费用", "没有标签", "挂号\t不存在"])
    write_lines(tmp_path / "label.txt", ["医疗费用", "病因分析"])
    command = [dirty.main, "--dataset_dir", tmp_path, "--device", "cpu"]
    assert_user_error(run_here(*command), "train.txt:2: no tab", "train.txt:3: label '不存在' is not in", "2 problems found.")
    write_lines(tmp_path / "train.txt", ["看牙多少钱\t医疗费用", "为什么发烧\t病因分析"] * 3)
    assert_user_error(run_here(*command, "--dirty_num", 7), "--dirty_num 7", "has 6 rows, expected at most that many")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["label.txt", "train.txt"]
