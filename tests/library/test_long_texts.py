"""Long texts: what is read of them, in training, by every engine, and in explanations."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import export_model
import predict
import prune
import train
from helpers import ROOT, assert_answers_agree, assert_user_error, load_script, read_lines, run_here, set_long_text, write_lines
from textcls.common.errors import UserError
from textcls.common.long_texts import CUT, LongText, find_spans, fit_windows, join_windows
from textcls.data.encoders import read_long_text
from textcls.data.tokens import TokenizedTexts, tokenize
from textcls.models.checkpoints import load_checkpoint
from textcls.models.inference import predict_logits
from textcls.models.paddle_setup import paddle
from textcls.models.tokenizers import load_tokenizer, make_encoder, rust_tokenizer
from textcls.runtime.predictor import Predictor
from textcls.training.samplers import LengthGroupedBatchSampler, TokenBatchSampler
from textcls.training.scoring import compute_metrics
from textcls.training.trainer import join_logits

word_interpret = load_script("analysis", "word_interpret")


@pytest.mark.parametrize("stride", [None, 1, 5, 7])
@pytest.mark.parametrize("room", [1, 3, 7, 126])
def test_windows_cover_a_text_evenly(room, stride):
    for num_tokens in (1, room, room + 1, 2 * room, 5 * room + 3, 1000):
        stride = None if stride is None else min(stride, room)
        for most in (1, 2, 8, 1000):
            windows = find_spans(num_tokens, room, LongText("window", window_stride=stride, max_windows=most))
            starts = [start for [(start, _)] in windows]
            assert starts[0] == 0 and len(windows) <= most and all(stop - start <= room for [(start, stop)] in windows)
            if num_tokens > room and len(windows) > 1:
                assert windows[-1][0][1] == num_tokens and {stop - start for [(start, stop)] in windows} == {room}
                gaps = np.diff(starts)
                assert gaps.max() - gaps.min() <= 1
                if len(windows) < most:
                    assert gaps.max() <= (stride or max(1, room * 3 // 4))


def test_what_is_read_of_a_text():
    ids = [101, *range(20), 102, 103]
    assert fit_windows(ids, 1, 2, 8, CUT) == [[101, 0, 1, 2, 3, 4, 102, 103]]
    assert fit_windows(ids, 1, 2, 8, LongText("head_tail", head_share=0.4)) == [[101, 0, 1, 17, 18, 19, 102, 103]]
    assert fit_windows(ids, 1, 2, 8, LongText("head_tail", head_share=0)) == [[101, 15, 16, 17, 18, 19, 102, 103]]
    assert fit_windows(ids, 1, 2, 8, LongText("head_tail", head_share=1)) == fit_windows(ids, 1, 2, 8, CUT)
    assert fit_windows(ids, 1, 2, 13, LongText("window")) == [
        [101, *range(10), 102, 103], [101, *range(5, 15), 102, 103], [101, *range(10, 20), 102, 103]]
    assert fit_windows(ids, 1, 2, 23, LongText("window")) == [ids]


def test_both_tokenizers_read_the_same():
    tokenizer = load_tokenizer(str(ROOT / "data"))
    texts = [line.split("\t")[0] for line in read_lines(ROOT / "data/dev.txt")[:40]]
    texts.append("".join(texts) * 3)
    rust = rust_tokenizer(tokenizer)
    for long_text in (CUT, LongText("head_tail"), LongText("window", max_windows=3)):
        expected = make_encoder(tokenizer, None, 16, long_text=long_text)(texts)
        assert make_encoder(tokenizer, rust, 16, long_text=long_text)(texts) == expected
        assert {len(windows) for windows in expected} == ({1, 2, 3} if long_text.mode == "window" else {1})
        assert [windows[0] for windows in make_encoder(tokenizer, rust, 16)(texts)] == [
            tokenizer(text, max_length=16, truncation=True)["input_ids"] for text in texts]


def test_answers_for_windows_become_those_of_texts():
    answers = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    tokens = TokenizedTexts.from_windows([[[1, 2, 3]] * 2, [[1]], [[1, 2], [3, 4, 5], [6]]])
    parts = [answers[:2], answers[2:3], answers[3:]]
    np.testing.assert_allclose(tokens.join(answers), [part.mean(axis=0) for part in parts], atol=1e-6)
    np.testing.assert_array_equal(join_windows(answers, tokens.starts[:-1], "max"), [part.max(axis=0) for part in parts])
    vectors = join_windows(answers, tokens.starts[:-1], "unit_mean")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    chosen = tokens.select(np.array([2, 0]))
    assert chosen.owners.tolist() == [0, 0, 0, 1, 1] and chosen.lengths.tolist() == [2, 3, 1, 3, 3]
    assert [tokens.count_texts(np.array(rows)) for rows in ([0], [1, 4, 5], range(6))] == [1, 0, 3]
    tokens.labels = np.array([0, 0, 1, 3, 3, 3])
    wins = np.eye(4, dtype=np.float32)[[2, 0, 1, 3, 3, 3]] * np.array([[1], [2], [1], [1], [1], [1]], np.float32)
    assert compute_metrics(SimpleNamespace(predictions=wins, label_ids=tokens.labels), tokens)["accuracy"] == 1
    assert compute_metrics(SimpleNamespace(predictions=wins, label_ids=tokens.labels))["accuracy"] == pytest.approx(5 / 6)


def test_an_epoch_has_all_windows_of_each_text_or_one():
    tokens = TokenizedTexts.from_windows([[[1] * length] * count for length, count in zip(range(3, 43), [1, 4, 2, 8] * 10)])
    for sampler in (LengthGroupedBatchSampler(tokens, 8, 5, 1, 0, False), TokenBatchSampler(tokens, 200, 5, 1, 0)):
        batches = list(sampler)
        assert sorted(row for batch in batches for row in batch) == list(range(len(tokens))) and len(batches) == len(sampler)
        owners = [set(tokens.owners[batch]) for batch in batches]
        assert sum(map(len, owners)) == 40  # the windows of a text are in one batch
    drawn, sampler = [], LengthGroupedBatchSampler(tokens, 8, 5, 1, 0, False, draw_windows=True)
    for sampler.epoch in range(2):
        rows = np.array([row for batch in sampler for row in batch])
        assert sorted(tokens.owners[rows]) == list(range(40)) and len(list(sampler)) == len(sampler)
        drawn.append(sorted(rows))
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("vote", ["mean", "max"])
def test_a_training_learns_from_the_answers_for_texts(vote):
    generator = np.random.default_rng(3)
    values, owners = generator.normal(size=(7, 4)).astype(np.float32), np.array([5, 5, 5, 2, 9, 9, 9])
    logits = paddle.to_tensor(values, stop_gradient=False)
    joined, labels = join_logits(logits, paddle.to_tensor([1, 1, 1, 0, 3, 3, 3]), paddle.to_tensor(owners), vote)
    np.testing.assert_allclose(joined.numpy(), join_windows(values, np.array([0, 3, 4]), vote), atol=1e-6)
    assert labels.tolist() == [1, 0, 3]
    paddle.nn.functional.cross_entropy(joined, labels).backward()
    assert (logits.grad.numpy()[3] != 0).all() and (logits.grad.numpy() != 0).sum() == (28 if vote == "mean" else 12)


@pytest.mark.parametrize("entries", [{"mode": "head_tail"}, {"mode": "window", "max_windows": 3, "window_vote": "max"}])
def test_exports_answer_as_their_checkpoints(entries, checkpoint, exported, predicted, tmp_path):
    """On the 1,000 texts, of which 42 and more are long; that these are read otherwise is seen."""
    copy, export = shutil.copytree(checkpoint, tmp_path / "checkpoint"), shutil.copytree(exported, tmp_path / "export")
    set_long_text(copy / "config.json", **entries)
    process = run_here(export_model.main, "--params_path", copy, "--output_path", tmp_path / "new")
    assert process.returncode == 0 and json.loads((tmp_path / "new/deploy.json").read_text())["long_text"] == {
        **LongText()._asdict(), **entries}
    set_long_text(export / "deploy.json", **entries)
    texts, cut = predicted
    write_lines(tmp_path / "data.txt", texts)
    process = run_here(predict.main, "--params_path", copy, "--dataset_dir", tmp_path, "--output_file", tmp_path / "answers",
                       "--output_format", "jsonl", "--top_k", 3, "--device", "cpu")
    assert process.returncode == 0, process.stderr
    answers = [json.loads(line) for line in read_lines(tmp_path / "answers")]
    labels, probs = Predictor(export)(texts, top_k=3)
    assert_answers_agree([list(zip(*pair)) for pair in zip(labels, probs.tolist())], answers)
    changed = [text for text, answer, other in zip(texts, answers, cut)
               if abs(answer["probability"] - other["probability"]) > 1e-4]
    assert 42 <= len(changed) < 100 and min(map(len, changed)) > 62


def test_the_exported_windows_answer_as_their_checkpoint(windowed):
    _, export, (texts, answers) = windowed
    for predictor in (Predictor(export), Predictor(export, batch_size=3, num_threads=1)):
        labels, probs = predictor(texts, top_k=3)
        assert_answers_agree([list(zip(*pair)) for pair in zip(labels, probs.tolist())], answers)
    np.testing.assert_allclose(predictor.batch_answer(texts[:20])[0], predictor.probabilities(texts[:20]), atol=1e-5)


def test_texts_of_a_hundred_thousand_characters(windowed, tmp_path):
    real = "".join(line.split("\t")[0] for line in read_lines(ROOT / "data/train.txt"))
    texts = [real[:1000] * 100, "疼", "a" * 100000, real[-1000:] * 100]
    write_lines(tmp_path / "data.txt", texts)
    process = run_here(predict.main, "--params_path", windowed[0], "--dataset_dir", tmp_path, "--output_format", "jsonl",
                       "--output_file", tmp_path / "answers", "--device", "cpu")
    assert process.returncode == 0, process.stderr
    answers = [json.loads(line) for line in read_lines(tmp_path / "answers")]
    assert [answer["text"] for answer in answers] == texts
    np.testing.assert_allclose([answer["probability"] for answer in answers],
                               Predictor(windowed[1]).probabilities(texts).max(axis=1), atol=1e-4)


def test_the_window_that_decides_is_explained(windowed, tmp_path):
    """Of a text whose middle says another thing than the rest, so that no window at its ends decides."""
    folder = shutil.copytree(windowed[0], tmp_path / "checkpoint")
    set_long_text(folder / "config.json", mode="window", window_vote="max")
    loaded = load_checkpoint(str(folder))
    rows = [line.split("\t") for line in read_lines(ROOT / "data/train.txt")]
    probs = Predictor(windowed[1]).probabilities([text for text, _ in rows])
    surest = rows[int(probs.max(axis=1).argmax())][0]
    filler = rows[int(probs.max(axis=1).argmin())][0]
    text = filler * 10 + surest * 6 + filler * 10
    write_lines(tmp_path / "texts.txt", [text, surest])
    process = run_here(word_interpret.main, "--params_path", folder, "--interpret_input_file", tmp_path / "texts.txt",
                       "--output_file", tmp_path / "out.jsonl", "--html_file", tmp_path / "out.html", "--steps", 5,
                       "--dataset_dir", tmp_path, "--device", "cpu")
    assert process.returncode == 0, process.stderr
    long, short = [json.loads(line) for line in read_lines(tmp_path / "out.jsonl")]
    first, last = long["window"]
    assert long["prediction"] == short["prediction"] and "window" not in short
    assert first < 10 * len(filler) + 6 * len(surest) and last > 10 * len(filler)  # it holds some of what it goes by
    for word, start, end, value in long["words"]:
        assert (value is None) == (end <= first or start >= last), (word, start, end)
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert len(re.findall(f"characters {first + 1} to {last} of {len(text)}", page)) == 1
    assert len(tokenize([text], loaded.encode)) > 3


def test_training_in_windows(tiny_data, checkpoint, tmp_path):
    """The label stands at the end of each text, where a training that cuts cannot find it."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    filler = "请问一下医生" * 6
    for name in ("train.txt", "dev.txt"):
        rows = [line.split("\t") for line in read_lines(data / name)]
        write_lines(data / name, [f"{filler}{text[:24]}\t{label}" for text, label in rows])
    accuracy = {}
    for mode in ("cut", "window"):
        process = run_here(train.main, "--model_name_or_path", checkpoint, "--data_dir", data, "--output_dir", tmp_path / mode,
                           "--do_train", "--do_eval", "--num_train_epochs", 2, "--learning_rate", "1e-3", "--device", "cpu",
                           "--max_seq_length", 32, "--long_text", mode, "--save_strategy", "no", "--report_to", "none",
                           "--evaluation_strategy", "no")
        assert process.returncode == 0, process.stderr
        share = float(re.search(r"training texts \(100.0 %\) are longer than max_seq_length 32: --long_text \w+ leaves (\S+) % "
                                "of all tokens unread", process.stderr)[1])
        assert share == 0 if mode == "window" else share > 30
        accuracy[mode] = json.loads((tmp_path / mode / "eval_results.json").read_text())["eval_accuracy"]
    assert accuracy["window"] > accuracy["cut"] + 0.1
    config = json.loads((tmp_path / "window/config.json").read_text())
    assert config["long_text"] == LongText("window")._asdict()
    assert "long_text" not in json.loads((tmp_path / "cut/config.json").read_text())
    process = run_here(train.main, "--model_name_or_path", tmp_path / "window", "--data_dir", data, "--output_dir",
                       tmp_path / "again", "--do_eval", "--device", "cpu")  # as the model was trained
    assert f"eval_accuracy: {accuracy['window']:.4f}" in process.stderr
    loaded, dev = load_checkpoint(str(tmp_path / "window")), [line.split("\t") for line in read_lines(data / "dev.txt")]
    logits = predict_logits(loaded, tokenize([text for text, _ in dev], loaded.encode), 32).astype(np.float64)
    own = logits[np.arange(len(dev)), [loaded.labels.index(label) for _, label in dev]]
    loss = (np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)) + logits.max(axis=1) - own).mean()
    found = json.loads((tmp_path / "window/eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(loss, abs=1e-5)  # of texts, not of windows


def test_a_training_goes_on_reading_as_it_began(tiny_data, tiny_model, tmp_path):
    options = ["--model_name_or_path", tiny_model, "--data_dir", tiny_data, "--do_train", "--device", "cpu", "--report_to",
               "none", "--max_seq_length", 16, "--save_steps", 4]
    process = run_here(train.main, *options, "--long_text", "window", "--max_steps", 4, "--output_dir", tmp_path / "begun")
    assert process.returncode == 0, process.stderr
    more = ["--max_steps", 8, "--resume_from_checkpoint", tmp_path / "begun/checkpoint-4", "--output_dir"]
    assert_user_error(run_here(train.main, *options, *more, tmp_path / "cut"), "began with --long_text window",
                      "and this run has cut")
    assert run_here(train.main, *options, *more, tmp_path / "end", "--long_text", "window").returncode == 0


def test_rows_of_windows_are_held_out_by_texts():
    tokens = TokenizedTexts.from_windows([[[1, 2]] * (1 + row % 3) for row in range(60)])
    tokens.labels = (np.arange(60) % 2)[tokens.owners]
    checkpoint = SimpleNamespace(encode=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune, "tokenize", lambda *given: tokens)
        train_tokens, held = prune.split_tokens(checkpoint, ([], None), None, 1)
    assert train_tokens.num_texts + held.num_texts == 60 and held.num_texts > 2


@pytest.mark.parametrize("options, message", [
    (["--window_stride", 0, "--long_text", "window"], "--window_stride 0: out of range, expected 1 or more tokens"),
    (["--max_windows", 0, "--long_text", "window"], "--max_windows 0: out of range, expected 1 to 1000"),
    (["--head_share", 1.5, "--long_text", "head_tail"], "--head_share 1.5: out of range, expected 0 to 1"),
    (["--head_share", 0.5], "--head_share: has no effect on texts that are read by --long_text cut"),
    (["--max_windows", 3, "--long_text", "head_tail"], "--max_windows: has no effect on texts that are read by"),
    (["--long_text", "window", "--max_seq_length", 5, "--window_stride", 4],
     "--max_seq_length 5: its windows of 3 tokens of a text would leave out some between them, since window_stride is 4; "
     "expected 6 or more, or in training --window_stride 3 or less (the default: 2)"),
    (["--long_text", "tail"], "invalid choice: 'tail'")])
def test_options_that_cannot_be(options, message, tiny_data, tiny_model, tmp_path):
    process = run_here(train.main, "--model_name_or_path", tiny_model, "--data_dir", tiny_data, "--output_dir", tmp_path / "out",
                       "--do_train", "--device", "cpu", *options)
    assert_user_error(process, message)
    assert not (tmp_path / "out/config.json").exists()


def test_entries_that_cannot_be():
    assert read_long_text({}, "config.json") == read_long_text({"long_text": None}, "config.json") == CUT
    unit_mean = {"mode": "window", "window_vote": "unit_mean"}
    assert read_long_text({"long_text": unit_mean, "embedding_size": 48}, "deploy.json").window_vote == "unit_mean"
    for entry in (unit_mean, {"mode": "all"}, {"mode": "window", "stride": 3}, {"max_windows": True}, "window",
                  {"window_stride": "3"}):
        with pytest.raises(UserError, match="^config.json: long_text is damaged"):
            read_long_text({"long_text": entry}, "config.json")
