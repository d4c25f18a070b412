"""train.py --teacher: the student's layers and vocabulary, the answers that are kept, all engines agree, wrong input."""

import json
import shutil

import numpy as np
import pytest

import export_model
import train
from helpers import (
    ROOT,
    assert_paths_agree,
    assert_user_error,
    make_model,
    read_lines,
    run,
    run_here,
    thousand_texts,
    train_options,
    weights,
    write_lines,
)
from textcls.data.tokens import tokenize
from textcls.models.checkpoints import load_checkpoint
from textcls.models.inference import predict_logits
from textcls.models.vocabulary import choose_layers

DATA = ROOT / "data"


@pytest.fixture(scope="module")
def student(checkpoint, tmp_path_factory):
    """(folder, log) of a student with one of its teacher's two layers; data.txt holds its unlabelled texts."""
    folder = tmp_path_factory.mktemp("student")
    process = run(*student_options(checkpoint, folder / "student", data_file="data.txt", num_train_epochs=4,
                                   learning_rate="3e-3"))
    assert process.returncode == 0, process.stderr
    return folder / "student", process.stderr


def student_options(teacher, output, **changes):
    return train_options(None, DATA, output, **{"teacher": teacher, "student_layers": 1, "model_name_or_path": None,
                                                "save_total_limit": 1, **changes})


def test_a_student_has_fewer_layers_a_smaller_vocabulary_and_learns(student, checkpoint):
    folder, log = student
    teacher, config = load_checkpoint(str(checkpoint)), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own, tokens = load_checkpoint(str(folder)), read_lines(folder / "vocab.txt")
    assert config["num_hidden_layers"] == 1 and config["vocab_size"] == len(tokens) < len(teacher.tokenizer)
    assert weights(folder)["ernie.embeddings.word_embeddings.weight"].shape == (len(tokens), 48)
    assert (folder / "model_state.pdparams").stat().st_size < (checkpoint / "model_state.pdparams").stat().st_size * 0.7
    assert json.loads((folder / "eval_results.json").read_text())["eval_accuracy"] > 0.4  # by chance: 0.09
    # it reads the texts that it has learnt from as its teacher does, and knows characters that were in none of them
    texts = [line.split("\t")[0] for line in read_lines(DATA / "train.txt")] + read_lines(DATA / "data.txt")
    for text, windows, others in zip(texts, own.encode(texts), teacher.encode(texts)):
        assert (own.tokenizer.convert_ids_to_tokens(windows[0]) == teacher.tokenizer.convert_ids_to_tokens(others[0])), text
    assert not set("的一人有是在中") - set(tokens) and {"a", "##a", "9", "##9"} <= set(tokens)
    assert "1280 training" in log and "layers 1 of the 2 of its teacher" in log
    card = (folder / "MODEL_CARD_en.md").read_text(encoding="utf-8")
    assert "| data.txt | 70 |" in card and "--student_layers 1" in card


def test_all_engines_agree_on_a_cut_vocabulary(student, tmp_path):
    process = run_here(export_model.main, "--params_path", student[0], "--output_path", tmp_path / "export", "--onnx")
    assert process.returncode == 0, process.stderr
    texts = [text for text in thousand_texts() if text.strip() and not set(text) & set("\n\r\t\0")][:300]
    probs = assert_paths_agree(tmp_path / "export/float32", texts, str(DATA / "dev.txt"), allow_accuracy_drop=True, least=0.95)
    own = load_checkpoint(str(student[0]))
    logits = predict_logits(own, tokenize(texts, own.encode), 32)
    kept = [index for index, text in enumerate(texts) if text.strip()]
    np.testing.assert_array_equal(logits.argmax(axis=1)[kept], probs.argmax(axis=1))


def test_the_teachers_answers_are_right_kept_and_asked_for_anew(student, checkpoint, tmp_path):
    outputs = [tmp_path / "again", tmp_path / "others"]
    for output in outputs:
        output.mkdir()
        shutil.copy(student[0] / "teacher_logits.npz", output)
    texts = [line.split("\t")[0] for line in read_lines(DATA / "train.txt")] + read_lines(DATA / "data.txt")
    teacher = load_checkpoint(str(checkpoint))
    with np.load(outputs[0] / "teacher_logits.npz") as content:
        np.testing.assert_allclose(content["logits"], predict_logits(teacher, tokenize(texts, teacher.encode), 32), atol=1e-4)
    options = {"max_steps": 1, "evaluation_strategy": None, "load_best_model_at_end": None, "metric_for_best_model": None,
               "report_to": "none", "save_strategy": "no"}
    again = run_here(train.main, *student_options(checkpoint, outputs[0], data_file="data.txt", **options)[1:])
    assert again.returncode == 0 and "are taken from" in again.stderr, again.stderr
    other = run_here(train.main, *student_options(checkpoint, outputs[1], layer_choice="first", **options)[1:])
    assert other.returncode == 0 and "are taken from" not in other.stderr, other.stderr
    with np.load(outputs[1] / "teacher_logits.npz") as content:
        assert len(content["logits"]) == 1210


def test_layers_are_the_first_or_spread_from_first_to_last():
    assert choose_layers(12, 3, "first") == [0, 1, 2] and choose_layers(12, 3, "even") == [0, 6, 11]
    assert choose_layers(6, 6, "even") == list(range(6)) and choose_layers(4, 1, "even") == [0]


def test_wrong_input_is_refused_before_any_training(checkpoint, binary, tmp_path):
    output = tmp_path / "out"
    data = shutil.copytree(binary[0], tmp_path / "data", ignore=shutil.ignore_patterns("checkpoint"))
    write_lines(DATA_COPY := tmp_path / "copied.txt", ["新的问题", read_lines(DATA / "dev.txt")[4].split("\t")[0]])
    other = make_model(tmp_path / "other")
    write_lines(other / "vocab.txt", read_lines(other / "vocab.txt")[:-1] + ["甲乙丙"])
    large = make_model(tmp_path / "large", hidden_size=192)
    for changes, *parts in (
            ({"student_layers": 3}, "--student_layers 3:", "has 2 layers"),
            ({"model_name_or_path": large}, "--student_layers: the student is made of the teacher's layers"),
            ({"student_layers": None, "model_name_or_path": large}, "large: the student has", "no larger"),
            ({"student_layers": None, "model_name_or_path": other}, "other: its tokenizer is not that of the teacher"),
            ({"data_dir": data}, "label.txt:1: label '医疗费用' where the checkpoint has"),
            ({"data_file": DATA_COPY}, "copied.txt:2: the text is also in", "dev.txt:5"),
            ({"teacher": None}, ": is for a training by a teacher"),
            ({"teacher": None, "data_file": None, "student_layers": None, "keep_tokens": 9}, "--keep_tokens: is for a"),
            ({"student_layers": None}, "--teacher: no student is named"),
            ({"student_layers": None, "model_name_or_path": large, "layer_choice": "first"}, "--layer_choice: is for a student"),
            ({"label_smoothing": 0.1}, "--label_smoothing: has no effect"),
            ({"teacher": tmp_path / "no"}, "no: no such folder"),
            ({"dry_run": ""}, "--dry_run: writes nothing"),
            ({"output_dir": checkpoint}, "is the teacher, expected another one")):
        process = run_here(train.main, *student_options(**{"teacher": checkpoint, "output": output, **changes})[1:])
        assert_user_error(process, *parts)
        assert not output.exists(), changes
