"""Temperatures, thresholds for a precision, intervals: against SciPy, known values and simulations."""

import json

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from sklearn.metrics import log_loss

from textcls.common.confidence import (
    check_threshold_of_model,
    explain_no_threshold,
    find_threshold,
    least_rows,
    precision_bound,
    read_temperature,
    read_threshold,
)
from textcls.common.digests import rows_id
from textcls.common.errors import UserError
from textcls.common.probabilities import softmax, top_classes
from textcls.models.configs import read_calibration
from textcls.training.calibration import FOLDS, calibrate_model, cross_fit, fit_temperature, measure_confidence
from textcls.training.scoring import bootstrap_intervals, risk_coverage, score_classes


def draw(num_rows, temperature, num_classes=5, seed=0):
    """Logits that are right by their own probabilities when divided by the temperature: (float32 logits, labels)."""
    generator = np.random.default_rng(seed)
    scores = 2 * generator.normal(size=(num_rows, num_classes))
    chances = softmax(scores).cumsum(axis=1)
    label_ids = (generator.random((num_rows, 1)) > chances[:, :-1]).sum(axis=1)
    return (scores * temperature).astype(np.float32), label_ids


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_temperature_is_found_again_and_makes_probabilities_honest(temperature):
    logits, label_ids = draw(20000, temperature)
    found = fit_temperature(logits, label_ids)
    assert found == pytest.approx(temperature, rel=0.04)
    before, after = measure_confidence(logits, label_ids), measure_confidence(logits, label_ids, found)
    assert after.error < 0.012 and after.nll <= before.nll
    assert before.error > 0.1 or temperature == 1
    probs = softmax(logits.astype(np.float64), found)
    assert after.nll == pytest.approx(log_loss(label_ids, probs), rel=1e-6)
    assert after.confidence == pytest.approx(probs.max(axis=1).mean(), rel=1e-6)
    for value in (0.05, found, 20.0):
        assert (top_classes(softmax(logits, value), 1) == top_classes(softmax(logits), 1)).all()


def test_bins_hold_equally_many_rows_and_few_rows_are_no_obstacle():
    logits, label_ids = draw(100, 2.0)
    measured, confidences = measure_confidence(logits, label_ids), softmax(logits).max(axis=1)
    assert [one["count"] for one in measured.bins] == [7] * 10 + [6] * 5
    order = np.argsort(confidences)
    assert measured.bins[0]["confidence"] == pytest.approx(confidences[order[:7]].mean(), rel=1e-6)
    right = logits.argmax(axis=1) == label_ids
    assert measured.bins[-1]["accuracy"] == right[order[-6:]].mean()
    assert len(measure_confidence(logits[:3], label_ids[:3]).bins) == 3


def test_no_row_decides_the_temperature_that_it_is_measured_with():
    logits, label_ids = draw(200, 3.0)
    temperatures = cross_fit(logits, label_ids)
    folds = [np.flatnonzero(temperatures[:, 0] == value) for value in np.unique(temperatures)]
    assert len(folds) == FOLDS and {len(rows) for rows in folds} == {40}
    for rows in folds:
        others = np.setdiff1d(np.arange(200), rows)
        assert temperatures[rows[0], 0] == fit_temperature(logits[others], label_ids[others])
        wrong = label_ids.copy()
        wrong[rows] = logits[rows].argmin(axis=1)  # these rows say now that all is wrong
        assert (cross_fit(logits, wrong)[rows] == temperatures[rows]).all()
        assert (cross_fit(logits, wrong)[others] > temperatures[others]).all()
    shuffled = np.random.default_rng(1).permutation(200)
    np.testing.assert_allclose(cross_fit(logits[shuffled], label_ids[shuffled]), temperatures[shuffled], rtol=1e-9)


def test_what_is_saved_and_what_is_said(tmp_path, suite_log):
    path = tmp_path / "config.json"
    path.write_text('{"calibration": {"temperature": 3}, "model_type": "bert", "other": null}')
    logits, label_ids = draw(60, 3.0)
    texts = [f"文本{number}" for number in range(60)]
    calibrate_model(str(tmp_path), logits, (texts, label_ids), "dev.txt")
    saved = json.loads(path.read_text())
    temperature = saved["calibration"]["temperature"]
    assert temperature == pytest.approx(fit_temperature(logits, label_ids), abs=1e-6) and saved["other"] is None
    assert saved["calibration"] == {"temperature": temperature, "file": "dev.txt", "rows": 60,
                                    "rows_id": rows_id(texts, label_ids)}
    before, after = measure_confidence(logits, label_ids), measure_confidence(logits, label_ids, cross_fit(logits, label_ids))
    assert (f"Temperature {temperature:.4f}, fitted on 60 rows of dev.txt | expected calibration error {before.error:.4f} -> "
            f"{after.error:.4f} | NLL {before.nll:.4f} -> {after.nll:.4f} (each row by a temperature fitted on others)"
            ) in suite_log.text
    assert read_calibration(saved, "folder")["temperature"] == temperature

    calibrate_model(str(tmp_path), logits[:10], (texts[:10], label_ids[:10]), "dev.txt")
    assert "No temperature is fitted: dev.txt has too few rows." in suite_log.text
    assert json.loads(path.read_text()) == {"model_type": "bert", "other": None}  # the old one is of another model
    calibrate_model(str(tmp_path), logits, (texts, logits.argmax(axis=1)), "dev.txt")
    assert "dev.txt: no temperature is saved: the best is not within 0.05 to 20.0" in suite_log.text
    calibrate_model(str(tmp_path), None, (texts, label_ids), "dev.txt")
    assert "No temperature is fitted: it needs dev texts (--do_eval)." in suite_log.text
    assert "calibration" not in json.loads(path.read_text())


def test_rows_have_a_name_whatever_their_order():
    assert rows_id(["a", "b"], np.array([0, 1])) == rows_id(["b", "a"], np.array([1, 0])) != rows_id(["a", "b"], np.array([1, 0]))


@pytest.mark.parametrize("value", ["2", 0, -1.5, float("nan"), float("inf"), True, [1]])
def test_a_temperature_that_is_none_is_refused(value):
    with pytest.raises(UserError, match=r"deploy\.json: temperature is .*, expected a number, 0.05 to 20.0"):
        read_temperature({"temperature": value}, "deploy.json")
    with pytest.raises(UserError, match=r"folder/config\.json: calibration: temperature is "):
        read_calibration({"calibration": {"temperature": value}}, "folder")


def test_files_of_before_have_the_temperature_one_and_no_threshold():
    assert read_temperature({}, "deploy.json") == 1 and read_calibration({"temperature": 0.7}, "folder") == {}
    assert read_threshold({}, "deploy.json") is None
    for entry in (0.5, {}, {"value": 2}, {"value": True}, {"value": float("nan")}):
        with pytest.raises(UserError, match=r"config\.json: threshold is .*, expected what analysis/evaluate\.py"):
            read_threshold({"threshold": entry}, "config.json")


def test_a_threshold_belongs_to_weights_temperature_and_length():
    entry = {"value": 0.5, "weights": "ab", "temperature": 2.0, "max_seq_length": 64}
    assert check_threshold_of_model(entry, "config.json", 2.0, "ab", 64) == 0.5
    with pytest.raises(UserError, match=r"config\.json was found at --max_seq_length 64, expected that, not 32, or a number"):
        check_threshold_of_model(entry, "config.json", 2.0, "ab", 32)
    for wrong, what in (((None, "config.json", 2.0, "ab"), "config.json holds no threshold, expected a number, or one that"),
                        ((entry, "config.json", 2.0, "cd"), "config.json was found with another model, expected a number, or"),
                        ((entry, "config.json", 1.0, "ab"), "was found with another temperature"),
                        ((None, "x/deploy.json", 1.0, ""), "--save_threshold has saved before the export"),
                        ((entry, "x/deploy.json", 2.0, "cd"), "--save_threshold and a new export")):
        with pytest.raises(UserError, match=r"^--threshold auto: ") as caught:
            check_threshold_of_model(*wrong, 64)
        assert what in str(caught.value)


def test_the_bound_is_that_of_clopper_and_pearson():
    for right, rows in ((0, 5), (1, 5), (58, 59), (59, 59), (950, 1000)):
        exact = binomtest(right, rows, alternative="greater").proportion_ci(0.95, "exact").low
        assert precision_bound(right, rows) == pytest.approx(exact, abs=1e-9)
        if right:  # as improbable as it may be where the precision is at the bound
            assert binom.sf(right - 1, rows, exact) == pytest.approx(0.05, abs=1e-9)
    assert [least_rows(precision) for precision in (0.9, 0.95, 0.99)] == [29, 59, 299]
    assert precision_bound(59, 59) >= 0.95 > precision_bound(58, 58)


def test_thresholds_of_small_files():
    confidences = np.linspace(0.99, 0.5, 59)
    assert find_threshold(confidences, np.ones(59, bool), 0.95) == (0.5, 59, 59)
    assert find_threshold(confidences[:58], np.ones(58, bool), 0.95) is None
    assert explain_no_threshold(58, 0.95) == "58 rows are too few to show it, even if all answers were right: 59 are needed"
    is_right = np.arange(59) != 30
    assert find_threshold(confidences, is_right, 0.95) is None
    assert explain_no_threshold(59, 0.95) == "of the surest rows too many are wrong to show it"
    assert find_threshold(np.array([]), np.array([], bool), 0.95) is None


def test_rows_of_one_confidence_are_answered_together_and_the_search_ends_at_the_first_failure():
    confidences = np.repeat([0.9, 0.8, 0.7, 0.6], 100)
    is_right = np.ones(400, bool)
    is_right[200:260] = False  # at 0.7 it fails; at 0.6 it would do so, too
    found = find_threshold(confidences, is_right, 0.9)
    assert found == (0.8, 200, 200)
    is_right[:40] = False  # the first fails, so that none is tested after it
    assert find_threshold(confidences, is_right, 0.9) is None


def test_a_threshold_rarely_has_less_than_the_wanted_precision():
    """Answers whose true precision is just too low at every threshold: one is found in at most 5 % of the files."""
    generator = np.random.default_rng(0)
    found = [find_threshold(generator.random(300), generator.random(300) < 0.899, 0.9) is not None for _ in range(400)]
    assert np.mean(found) < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_intervals_are_those_of_the_binomial_distribution():
    generator = np.random.default_rng(0)
    label_ids = generator.integers(4, size=1000)
    guesses = np.where(generator.random(1000) < 0.8, label_ids, (label_ids + 1) % 4)
    intervals = bootstrap_intervals(label_ids, guesses, 6)
    accuracy = (label_ids == guesses).mean()
    expected = binom.ppf([0.025, 0.975], 1000, accuracy) / 1000
    assert intervals["accuracy"] == pytest.approx(expected, abs=0.004)
    low, high = intervals["macro_f1"]
    assert low < score_classes(label_ids, guesses, 6)["macro_f1"] < high and 0.03 < high - low < 0.07
    assert bootstrap_intervals(label_ids, guesses, 6) == intervals
    assert bootstrap_intervals(label_ids, label_ids, 3000) == {"accuracy": [1, 1], "macro_f1": [1, 1]}


def test_risk_and_coverage_by_hand():
    found = risk_coverage(np.array([0.6, 0.9, 0.8, 0.7]), np.array([False, True, False, True]))
    assert found["coverage"] == [0.25, 0.5, 0.75, 1] and found["risk"] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert found["aurc"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found["excess_aurc"] == pytest.approx(found["aurc"] - (1 / 3 + 1 / 2) / 4)
    assert len(risk_coverage(np.arange(10000.0), np.ones(10000, bool))["risk"]) == 200
