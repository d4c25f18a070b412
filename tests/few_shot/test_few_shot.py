"""few-shot/: zero-shot, the published commands, several models, resumption, and the seam with all other tools."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

import export_model
import predict
import prune
import train as fine_tuning
from analysis import dirty, evaluate, report, sent_interpret, sparse, word_interpret
from helpers import (
    GRAPH,
    ROOT,
    assert_same_weights,
    assert_user_error,
    load_script,
    open_url,
    read_lines,
    run,
    run_here,
    server_python,
    thousand_texts,
    weights,
    write_lines,
)
from load import simple_serving
from prompt_models import TEXTS, WORDS, build, guess_words, options, run_train, script, trained, words_as_ids
from textcls.analysis.attributions import attribute_tokens, interpret
from textcls.common.errors import UserError
from textcls.common.probabilities import softmax
from textcls.common.texts import TEXT
from textcls.data.files import read_labels
from textcls.data.prompts import parse_template
from textcls.data.tokens import tokenize
from textcls.models.checkpoints import load_checkpoint
from textcls.models.inference import predict_logits, predict_probs
from textcls.models.paddle_setup import paddle
from textcls.models.tokenizers import load_tokenizer
from textcls.runtime.predictor import Predictor
from textcls.training.prompt_members import warn_of_better
from textcls.training.prompt_training import collate_masked

pytestmark = pytest.mark.usefixtures("tokenizers_built_once")

SOFT = "{'soft': '这是'}{'text'}的{'mask', 'length': 2}"


@pytest.fixture(scope="module")
def untrained(masked_lm, few, tmp_path_factory):
    """Zero-shot: the model of SOFT as it begins, not calibrated."""
    folder = tmp_path_factory.mktemp("untrained")
    trained(masked_lm, few, folder, prompt=SOFT, do_train=None, do_eval="", do_predict="")
    return folder


def changed(first, second):
    """The names of the parameters that two checkpoints differ in."""
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    return {name for name in first if (first[name] != second[name]).any()}


def test_zero_shot_answers_by_the_label_words_alone(masked_lm, few, untrained, tmp_path):
    texts = [line.split("\t")[0] for line in read_lines(few / "dev.txt")]
    gold = np.array([read_labels(few / "label.txt").index(line.split("\t")[1]) for line in read_lines(few / "dev.txt")])
    checkpoint, tokenizer = load_checkpoint(str(untrained)), load_tokenizer(str(masked_lm))
    hard, encode, _, masked = build(masked_lm, "这是{'text'}的{'mask', 'length': 2}", [[word] for word in WORDS])
    expected = guess_words(masked, encode(texts), tokenizer.mask_token_id, words_as_ids(tokenizer, [[word] for word in WORDS]),
                           tokenizer.pad_token_id)
    np.testing.assert_allclose(predict_logits(checkpoint, tokenize(texts, checkpoint.encode), 5), expected, atol=1e-5)
    accuracy = json.loads((untrained / "eval_results.json").read_text())["eval_accuracy"]
    assert accuracy == pytest.approx((expected.argmax(axis=1) == gold).mean())
    assert "test_accuracy" in json.loads((untrained / "test_results.json").read_text())
    for option in ("model_name_or_path", "resume_from_checkpoint"):  # the second is an older way to name the model
        trained(None, few, tmp_path / option, **{option: untrained}, prompt=None, do_train=None, do_eval="")
        assert json.loads((tmp_path / option / "eval_results.json").read_text())["eval_accuracy"] == accuracy
        assert not (tmp_path / option / "config.json").exists()
    for changes in ({}, {"prompt": None, "do_train": ""}):
        assert_user_error(run_train(untrained, few, tmp_path / "out", **changes), "is a prompt model with a prompt of its own")
    damaged = shutil.copytree(untrained, tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text())
    for broken in ({}, [1], {**config["prompt"], "num_masks": 3}, {**config["prompt"], "before": "x"}, {"template": 1}):
        (damaged / "config.json").write_text(json.dumps({**config, "prompt": broken}))
        with pytest.raises(UserError, match="prompt in its config.json is damaged"):
            load_checkpoint(str(damaged))


@pytest.mark.parametrize("changes, kept, moved", [
    ({}, (), ("classifier.", "ernie.encoder.", "word_embeddings.soft", "word_embeddings.table", "cls.predictions.")),
    ({"freeze_plm": ""}, ("ernie.encoder.", "cls.", "word_embeddings.table", "position_embeddings"),
     ("classifier.", "word_embeddings.soft")),
    ({"freeze_dropout": "", "use_rgl": ""}, ("ernie.encoder.", "cls.", "word_embeddings.table"),
     ("classifier.", "word_embeddings.soft")),
    ({"verbalizer": "manual"}, ("classifier.",), ("ernie.encoder.", "word_embeddings.soft")),
])
def test_what_a_training_changes(masked_lm, few, untrained, tmp_path, changes, kept, moved):
    trained(masked_lm, few, tmp_path, prompt=SOFT, max_steps=2, calibrate="False", **changes)
    names = changed(untrained, tmp_path)
    for part in kept:
        assert not [name for name in names if part in name], part
    for part in moved:
        assert [name for name in names if part in name], part


def test_a_frozen_dropout_drops_nothing(masked_lm):
    model, encode, _, _ = build(masked_lm, SOFT, [[word] for word in WORDS])
    ids, answers = paddle.to_tensor(encode(TEXTS[:1])), []
    for frozen in (False, True):
        model.freeze(frozen)
        model.train()
        with paddle.no_grad():
            answers.append(np.ptp([model(ids).numpy() for _ in range(3)], axis=0).max())
    assert answers[0] > 1e-3 and answers[1] == 0


def test_the_prompt_has_a_learning_rate_of_its_own(masked_lm, few, untrained, tmp_path):
    """The first step of Adam moves a weight by its learning rate, whatever its gradient."""
    trained(masked_lm, few, tmp_path, prompt=SOFT, max_steps=1, calibrate="False", learning_rate="1e-4", ppt_learning_rate="3e-3",
            lr_scheduler_type="constant")
    before, after = weights(untrained), weights(tmp_path)
    steps = {name: np.abs(after[name] - before[name]).max() for name in before}
    for name, step in steps.items():
        if name.startswith("classifier.") or name.endswith("word_embeddings.soft"):
            assert step == pytest.approx(3e-3, rel=0.02), name
        elif ".encoder.layers.1.linear" in name:
            assert step == pytest.approx(1e-4, rel=0.02), name


@pytest.mark.parametrize("name, template", [
    ("masked_lm", "{'soft', 'length': 2, 'encoder': 'lstm', 'hidden_size': 8}{'text'}{'mask'}"),
    ("masked_bert", "{'soft': '这是', 'encoder': 'mlp'}{'prefix': '分类'}{'text', 'token_type': 1}{'mask'}")])
def test_soft_encoders_and_prefixes_are_trained_and_exported(name, template, few, tmp_path, request):
    """export_model.py compares its graphs with the checkpoint itself."""
    trained(request.getfixturevalue(name), few, tmp_path / "out", prompt=template, max_steps=2, do_export="", use_rdrop="")
    start = tmp_path / "start"
    trained(request.getfixturevalue(name), few, start, prompt=template, do_train=None, do_eval="")
    names = changed(start, tmp_path / "out")
    for part in ("word_embeddings.soft", "word_embeddings.encoder"):
        assert [name for name in names if part in name], part
    assert "prefix" not in template or "prefix.vectors" in names
    files = set(os.listdir(tmp_path / "out/export"))
    assert {*(f"model{ending}" for ending in GRAPH), "model.onnx", "deploy.json", "tokenizer.json", "label.txt"} <= files
    texts = [line.split("\t")[0] for line in read_lines(few / "dev.txt")]
    checkpoint = load_checkpoint(str(tmp_path / "out"))
    np.testing.assert_allclose(Predictor(tmp_path / "out/export").probabilities(texts),
                               predict_probs(checkpoint, tokenize(texts, checkpoint.encode), 4), atol=1e-4)


def test_a_temperature_is_fitted_and_goes_all_the_way(masked_lm, few, tmp_path):
    """dev.txt of plenty/ has enough rows; the models of several prompts have their own; what is trained further has none."""
    out = tmp_path / "out"
    log = trained(masked_lm, few / "plenty", out, prompt=["这是关于", "问的是"], max_steps=30, learning_rate="2e-3",
                  ppt_learning_rate="5e-3", folds=0, do_eval="", do_export="")
    config, deploy = (json.loads((out / name).read_text()) for name in ("config.json", "export/deploy.json"))
    temperature = config["calibration"]["temperature"]
    assert deploy["temperature"] == temperature != 1 and log.count("Temperature ") == 3
    assert f"Temperature {temperature:.4f}, fitted on {config['calibration']['rows']} rows of dev.txt" in log
    assert {json.loads((out / f"prompt-{number}-seed-42/config.json").read_text())["calibration"]["temperature"]
            for number in (1, 2)} >= {temperature}
    texts = [line.split("\t")[0] for line in read_lines(few / "dev.txt")]
    checkpoint = load_checkpoint(str(out))
    logits = predict_logits(checkpoint, tokenize(texts, checkpoint.encode), 4)
    np.testing.assert_allclose(Predictor(out / "export").probabilities(texts), softmax(logits, temperature), atol=1e-4)
    log = trained(masked_lm, few, tmp_path / "tiny", max_steps=1)
    assert "dev.txt: 12 rows are too few to fit a temperature, expected 30 or more" in log
    log = trained(masked_lm, few / "plenty", tmp_path / "none", max_steps=1, calibrate_confidence="none")
    assert "Temperature " not in log and "to fit" not in log
    assert "calibration" not in json.loads((tmp_path / "none/config.json").read_text())


# ---- the published commands


def test_the_benchmark_command_runs_as_published(masked_lm, few, tmp_path):
    """But for the model, no pretrained one being here; with --do_export, for infer.py."""
    shutil.copytree(few, tmp_path / "data")
    write_lines(tmp_path / "data/data.txt", TEXTS)
    log = run(ROOT / "few-shot/train.py", *"--data_dir ./data/ --output_dir ./checkpoints/ --prompt 这条新闻写的是".split(),
              "--model_name_or_path", masked_lm, *"""--max_seq_length 128 --learning_rate 3e-5 --ppt_learning_rate 3e-4 --do_train
              --do_eval --num_train_epochs 100 --logging_steps 5 --per_device_eval_batch_size 32 --per_device_train_batch_size 8
              --do_predict --metric_for_best_model accuracy --load_best_model_at_end --evaluation_strategy epoch
              --save_strategy epoch --save_total_limit 1 --do_export""".split(), cwd=tmp_path)
    assert log.returncode == 0, log.stderr
    for line in ("Using template: [{'text': 'text_a'}, {'hard': '这条新闻写的是'}, {'mask': None, 'length': 2}]", "A prompt "
                 "without blocks gets a mask of length 2: the label words have 2 tokens.", "***** train metrics *****",
                 "eval_accuracy", "***** test metrics *****", "test_accuracy", "Model saved in"):
        assert line in log.stderr, line
    assert "RANDOM" not in log.stderr and "Traceback" not in log.stderr
    files = set(os.listdir(tmp_path / "checkpoints"))
    assert {"config.json", "model_state.pdparams", "tokenizer.json", "vocab.txt", "label.txt", "train_results.json",
            "all_results.json", "eval_results.json", "test_results.json", "trainer_state.json", "export", "MODEL_CARD.md",
            "MODEL_CARD_en.md"} <= files
    card = (tmp_path / "checkpoints/export/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "由 few-shot/train.py 写于" in card and "| data.txt | " in card and "--prompt '这条新闻写的是'" in card
    assert len(list((tmp_path / "checkpoints").glob("checkpoint-*"))) <= 2  # the best and the newest
    assert read_lines(tmp_path / "checkpoints/label.txt") == read_labels(few / "label.txt")
    infer = run(ROOT / "few-shot/infer.py", "--model_path_prefix", "checkpoints/export/model", "--data_dir", "./data",
                "--batch_size", 32, "--device", "cpu", cwd=tmp_path)
    assert infer.returncode == 0, infer.stderr
    blocks = infer.stdout.split("-" * 29 + "\n")
    assert blocks[-1] == "" and len(blocks) == len(TEXTS) + 1
    for text, block in zip(TEXTS, blocks):
        found = re.fullmatch("input data: (.*)\nlabels: (.*)\n", block)
        assert found[1] == text and found[2] in read_labels(few / "label.txt")


def test_the_quick_start_command_runs_as_published(masked_bert, few, tmp_path):
    process = run_here(script.main, *"""--device cpu --data_dir ./data --output_dir ./checkpoints/ --prompt 这条新闻标题的主题是
                       --max_seq_length 128 --learning_rate 3e-5 --ppt_learning_rate 3e-4 --do_train --do_eval --use_rdrop
                       --max_steps 1000 --eval_steps 10 --logging_steps 5 --save_total_limit 1 --load_best_model_at_end True
                       --per_device_eval_batch_size 32 --per_device_train_batch_size 8 --do_predict --do_export""".split(),
                       "--model_name_or_path", masked_bert, cwd=shutil.copytree(few, tmp_path / "data").parent)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "checkpoints/train_results.json").exists() and (tmp_path / "checkpoints/test_results.json").exists()
    state = json.loads((tmp_path / "checkpoints/trainer_state.json").read_text())
    accuracies = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
    assert len(accuracies) > 2 and state["best_metric"] == max(accuracies)  # of all evaluations, not of those at a save_step
    saved = json.loads((tmp_path / "checkpoints/eval_results.json").read_text())["eval_accuracy"]
    assert saved == pytest.approx(max(accuracies))
    assert (tmp_path / "checkpoints/export/model.onnx").exists()


# ---- several models


@pytest.fixture(scope="module")
def distilled(masked_lm, few, tmp_path_factory):
    """(folder, log): one model that has learnt from those of two prompts on unlabelled texts."""
    folder = tmp_path_factory.mktemp("distilled")
    return folder, trained(masked_lm, few / "unlabelled", folder, **SEVERAL)

SEVERAL = {"prompt": ["这是关于", SOFT], "do_eval": "", "do_predict": "", "evaluation_strategy": "epoch",
           "save_strategy": "steps", "save_steps": 3, "max_steps": 9}


def test_several_prompts_are_distilled_into_one_model(distilled, few):
    folder, log = distilled
    members = json.loads((folder / "members.json").read_text())
    assert [member["name"] for member in members] == ["prompt-1-seed-42", "prompt-2-seed-42", "mean of all 2",
                                                      "saved: learnt from all"]
    for member, template in zip(members, SEVERAL["prompt"]):
        assert member["template"] == parse_template(template, mask_length=2)
        assert {"dev_accuracy", "test_accuracy", "seconds"} <= set(member)
        assert load_checkpoint(str(folder / member["name"])).labels == read_labels(few / "label.txt")
    texts = [line.split("\t")[0] for line in read_lines(few / "dev.txt")]
    labels = read_labels(few / "label.txt")
    gold = np.array([labels.index(line.split("\t")[1]) for line in read_lines(few / "dev.txt")])
    logits = []
    for name in ("prompt-1-seed-42", "prompt-2-seed-42"):
        checkpoint = load_checkpoint(str(folder / name))
        logits.append(predict_logits(checkpoint, tokenize(texts, checkpoint.encode), 8))
    accuracies = [(part.argmax(axis=1) == gold).mean() for part in [*logits, np.mean(logits, axis=0)]]
    accuracies.append(json.loads((folder / "eval_results.json").read_text())["eval_accuracy"])  # of the saved model
    assert [member["dev_accuracy"] for member in members] == pytest.approx(accuracies)
    assert ("The saved model is worse on dev.txt than" in log) == (accuracies[3] < max(accuracies[:2]))
    results = [{"name": name, "dev_accuracy": value} for name, value in (("first", 0.7), ("second", 0.8), ("saved", 0.75))]
    process = run_here(lambda: warn_of_better(results[:2], results[2], "out"))
    assert "The saved model is worse on dev.txt than second: accuracy 0.7500, not 0.8000." in process.stderr
    assert "worse" not in run_here(lambda: warn_of_better(results[:1], results[2], "out")).stderr
    assert "Models of this run:" in log and changed(folder, folder / "prompt-1-seed-42")
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 9  # 40 + 30 texts, 8 a step
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_without_unlabelled_texts_the_best_by_cross_validation_is_saved(masked_lm, few, tmp_path):
    write_lines(tmp_path / "prompts", ["这是关于", "", "{'mask'}的是{'text'}"])
    log = trained(masked_lm, few, tmp_path / "out", prompt=tmp_path / "prompts", folds=2, max_steps=2)
    assert "dev.txt has 6 rows of a class, fewer than 20: choosing by cross-validation on train.txt, 4 more trainings" in log
    *members, _, saved = json.loads((tmp_path / "out/members.json").read_text())
    best = max(members, key=lambda member: member["cross_validation_accuracy"])
    assert [member.get("is_saved") for member in members].count(True) == 1 and best["is_saved"]
    assert saved == {**best, "name": f"saved: {best['name']}"}
    assert_same_weights(tmp_path / "out", tmp_path / "out" / best["name"])
    assert not [name for _, folders, _ in os.walk(tmp_path) for name in folders if name.startswith(".")]


def test_a_search_leaves_the_model_of_the_best_settings(masked_lm, few, tmp_path):
    search = {"search": "", "n_trials": 2, "fresh_seeds": 2, "max_steps": None, "num_train_epochs": 2, "do_eval": "",
              "do_predict": "", "evaluation_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": "",
              "metric_for_best_model": "accuracy"}
    log = trained(masked_lm, few, tmp_path / "out", **search)
    result = json.loads((tmp_path / "out/search.json").read_text(encoding="utf-8"))
    assert {"ppt_learning_rate", "use_rdrop", "weight_decay"} <= result["best"].keys() and "label_smoothing" not in result["best"]
    assert len(result["trials"]) == 2 and "The best command line:" in log and "***** test metrics *****" in log
    saved = json.loads((tmp_path / "out/trainer_state.json").read_text())["best_metric"]
    assert saved == max(trial["value"] for trial in result["trials"])
    assert load_checkpoint(str(tmp_path / "out")).model.config.prompt
    for changes, message in (({"repeats": 2}, "--search: trains a single model, expected a run without --repeats"),
                             ({"prompt": ["这是", "那是"]}, "--search: trains a single model, expected one template, not 2")):
        assert_user_error(run_train(masked_lm, few, tmp_path / "other", **search, **changes), message)


def test_repeats_make_a_table_and_pretraining_goes_first(masked_lm, few, tmp_path):
    log = trained(masked_lm, few, tmp_path, repeats=2, folds=0, max_steps=2, do_predict="", shots=6,
                  pretrain_file=few / "unlabelled/data.txt")
    table = log.split("Models of this run:\n")[1].splitlines()
    assert table[0].split() == ["model", "dev", "test", "seconds"]
    width = max(len(line[:-54].rstrip()) for line in table[1:9])
    rows = {line[:width].strip(): line[width:].split() for line in table[1:9]}
    best = "prompt-1-seed-42" if rows["prompt-1-seed-42"][0] >= rows["prompt-1-seed-43"][0] else "prompt-1-seed-43"
    assert list(rows) == ["prompt-1-seed-42", "prompt-1-seed-43", "mean of all 2", f"saved: {best}", "mean", "sd", "min", "max"]
    assert rows[f"saved: {best}"] == rows[best] and "The saved model is worse" not in log
    for column in (0, 1):
        values = [float(rows[f"prompt-1-seed-{seed}"][column]) for seed in (42, 43)]
        measured = [np.mean(values), np.std(values, ddof=1), min(values), max(values)]
        assert [float(rows[name][column]) for name in ("mean", "sd", "min", "max")] == pytest.approx(measured, abs=1e-4)
    assert changed(tmp_path / "prompt-1-seed-42", tmp_path / "prompt-1-seed-43")
    before, after = weights(masked_lm), weights(tmp_path / "pretrained")
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_pretraining_never_puts_special_tokens_in_wherever_they_stand(tmp_path, masked_lm, few):
    vocabulary = read_lines(masked_lm / "vocab.txt")
    vocabulary.remove("[UNK]")  # the last of ERNIE 3.0's
    folder = shutil.copytree(masked_lm, tmp_path / "model")
    write_lines(folder / "vocab.txt", [*vocabulary, "[UNK]"])
    trained(folder, few, tmp_path / "out", max_steps=1, pretrain_file=few / "unlabelled/data.txt", prompt="是")
    tokenizer = load_tokenizer(str(folder))
    others = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    assert len(tokenizer) - 1 == tokenizer.unk_token_id
    rows = [{"input_ids": np.array([1] + [100] * 200 + [2])}] * 8
    batch = collate_masked(rows, tokenizer, others, np.random.default_rng(0))
    found = batch["input_ids"].ravel()[batch["masked_positions"]]
    assert set(found) & set(tokenizer.all_special_ids) == {tokenizer.mask_token_id} and (batch["labels"] == 100).all()
    assert 0.1 < len(found) / 1600 < 0.2 and 0.7 < (found == tokenizer.mask_token_id).mean() < 0.9


def test_too_few_unlabelled_texts_are_not_calibrated_on(masked_lm, few, untrained, tmp_path):
    data = shutil.copytree(few, tmp_path / "data")
    write_lines(data / "data.txt", ["只有一条"])
    log = trained(masked_lm, data, tmp_path / "out", do_train=None, do_eval="", prompt=SOFT)
    assert "data.txt has 1 texts, too few to calibrate on, expected 10 or more" in log
    assert_same_weights(tmp_path / "out", untrained)


# ---- interruptions


def kill_when(options, condition):
    """few-shot/train.py in a process of its own, ended by SIGKILL as soon as condition() holds."""
    process = subprocess.Popen([sys.executable, "few-shot/train.py", *map(str, options)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()


def test_a_killed_training_is_resumed_as_if_never_interrupted(masked_lm, few, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 5, "max_steps": 20, "use_rdrop": "", "prompt": SOFT, "do_eval": "",
               "evaluation_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": ""}
    killed = tmp_path / "killed"
    trained(masked_lm, few, tmp_path / "whole", **changes)
    kill_when(options(masked_lm, few, killed, **changes), (killed / "checkpoint-10").exists)
    assert not (killed / "config.json").exists()
    assert_user_error(run_train(masked_lm, few, killed, **changes), "did not finish", "--resume_from_checkpoint",
                      "--overwrite_output_dir")
    assert_user_error(run_train(masked_lm, few, killed, **{**changes, "prompt": "另一个"}, resume_from_checkpoint=killed),
                      f"--resume_from_checkpoint {killed}: prompt are not those that this run began with")
    trained(masked_lm, few, killed, **changes, resume_from_checkpoint=killed)
    for name in ("", "checkpoint-20"):
        assert_same_weights(tmp_path / "whole" / name, killed / name)
    assert not [name for name in os.listdir(killed) if name.startswith(".")]


def test_a_killed_run_of_several_goes_on_where_it_was(masked_lm, few, distilled, tmp_path):
    whole, data = distilled[0], few / "unlabelled"
    second = tmp_path / "prompt-2-seed-42"
    kill_when(options(masked_lm, data, tmp_path, **SEVERAL), (second / "checkpoint-3").exists)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "members.json").exists()
    assert_user_error(run_train(masked_lm, data, tmp_path, **SEVERAL), "holds the unfinished prompt-2-seed-42",
                      f"--resume_from_checkpoint {tmp_path}", "--overwrite_output_dir")
    log = trained(masked_lm, data, tmp_path, **SEVERAL, resume_from_checkpoint=tmp_path)
    assert f"{tmp_path}/prompt-1-seed-42 is finished." in log
    for name in ("prompt-1-seed-42", "prompt-2-seed-42", ""):
        assert_same_weights(whole / name, tmp_path / name)


def test_a_run_killed_between_its_models_goes_on(masked_lm, few, distilled, tmp_path):
    """All models are finished, and nothing is yet of the one that learns from them."""
    out = tmp_path / "out"
    for member in ("prompt-1-seed-42", "prompt-2-seed-42"):
        shutil.copytree(distilled[0] / member, out / member)
    assert_user_error(run_train(masked_lm, few / "unlabelled", out, **SEVERAL, resume_from_checkpoint=out), "holds no run")
    shutil.copy(distilled[0] / "run.json", out)
    for changes, what in (({"prompt": ["甲", "乙"]}, "prompt"), ({"seed": 7}, "seed"), ({"shots": 9}, "training rows")):
        process = run_train(masked_lm, few / "unlabelled", out, **{**SEVERAL, **changes}, resume_from_checkpoint=out)
        assert_user_error(process, f"--resume_from_checkpoint {out}: {what} are not those that this run began with")
    assert not (out / "config.json").exists()
    trained(masked_lm, few / "unlabelled", out, **SEVERAL, resume_from_checkpoint=out)
    assert_same_weights(distilled[0], out)


def test_a_new_run_leaves_nothing_of_an_older_one(masked_lm, few, distilled, tmp_path):
    out = shutil.copytree(distilled[0], tmp_path / "out")
    assert_user_error(run_train(masked_lm, few, out, max_steps=1), f"{out}: holds a model", "--overwrite_output_dir")
    trained(masked_lm, few, out, max_steps=1, overwrite_output_dir="")
    assert not [name for name in os.listdir(out) if name.startswith(("prompt-", "members", "pretrained", "eval_", "test_"))]
    assert json.loads((out / "run.json").read_text())["prompt"] == [parse_template("这是关于", mask_length=2)]


# ---- the seam: all other tools take a prompt model as it is


@pytest.fixture(scope="module")
def prompted(masked_lm, few, tmp_path_factory):
    """A prompt model of soft tokens and two masks that has learnt something."""
    folder = tmp_path_factory.mktemp("prompted")
    trained(masked_lm, few / "plenty", folder, prompt=SOFT, max_steps=100, learning_rate="2e-3", ppt_learning_rate="5e-3",
            do_eval="", eval_steps=100)
    assert json.loads((folder / "eval_results.json").read_text())["eval_accuracy"] > 0.7
    return folder


@pytest.fixture(scope="module")
def deployed(prompted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed")
    process = run_here(export_model.main, "--params_path", prompted, "--output_path", folder, "--onnx")
    assert process.returncode == 0, process.stderr
    return folder


def test_checkpoint_predict_onnx_and_int8_agree_on_a_thousand_texts(prompted, deployed, few, tmp_path):
    texts = [text for text in thousand_texts() if not TEXT.problem(text)]
    checkpoint = load_checkpoint(str(prompted))
    expected = predict_probs(checkpoint, tokenize(texts, checkpoint.encode), 32)
    fp32 = Predictor(deployed).probabilities(texts)
    np.testing.assert_allclose(fp32, expected, atol=1e-4)
    close = np.abs(expected[:, 0] - 0.5) < 1e-4
    np.testing.assert_array_equal(fp32.argmax(axis=1)[~close], expected.argmax(axis=1)[~close])
    assert 0.1 < expected.argmax(axis=1).mean() < 0.9 and np.ptp(expected[:, 0]) > 0.3
    int8 = Predictor(deployed, dtype="int8", calibration_file=few / "train.txt", allow_accuracy_drop=True).probabilities(texts)
    agreement = (int8.argmax(axis=1) == expected.argmax(axis=1)).mean()
    print(f"INT8 agrees on {agreement:.2%}")
    assert agreement >= 0.97 and not np.allclose(int8, fp32, atol=1e-6)
    lines = [text for text in texts if not set(text) & set("\t\n\r\0")][:200]
    write_lines(tmp_path / "data.txt", lines)
    process = run_here(predict.main, "--params_path", prompted, "--dataset_dir", tmp_path, "--device", "cpu", "--output_format",
                       "jsonl", "--output_file", tmp_path / "answers")
    assert process.returncode == 0, process.stderr
    for text, line in zip(lines, read_lines(tmp_path / "answers")):
        answer, row = json.loads(line), expected[texts.index(text)]
        assert answer["text"] == text and answer["probability"] == pytest.approx(row.max(), abs=1e-4)
        assert answer["label"] == checkpoint.labels[row.argmax()] or abs(row[0] - 0.5) < 1e-4


def test_words_are_explained_without_those_of_the_prompt(prompted):
    checkpoint = load_checkpoint(str(prompted))
    texts = ["孕妇可以做B超吗？CT检查呢", "头疼[MASK]怎么办", "感冒" * 60]
    tokens = tokenize(texts, checkpoint.encode)
    probs = predict_probs(checkpoint, tokens, 8)
    rows = [row for [row] in checkpoint.encode(texts)]
    for method in ("ig", "lime", "gradshap", "attention"):
        values = attribute_tokens(checkpoint, rows, probs.argmax(axis=1), method, steps=10)
        for text, row, result, own in zip(texts, probs, interpret(checkpoint, texts, method, steps=10), values):
            assert (result.prediction, result.probability) == (row.argmax(), pytest.approx(row.max(), abs=1e-5))
            assert "".join(word for word, *_ in result.words) == text
            of_text = own[checkpoint.encode.num_before:-checkpoint.encode.num_after]
            assert np.abs(of_text).max() > 0
            assert sum(word[3] or 0 for word in result.words) == pytest.approx(of_text.sum(), rel=1e-5, abs=1e-8)
        assert result.words[-1][3] is None  # beyond max_seq_length
    embedding = next(layer for name, layer in checkpoint.model.named_sublayers() if name.endswith("word_embeddings"))
    hook = embedding.register_forward_post_hook(lambda layer, inputs, output: output * 0)
    baseline = predict_probs(checkpoint, tokens, 8)
    hook.remove()
    classes = probs.argmax(axis=1)
    for index, own in enumerate(attribute_tokens(checkpoint, rows, classes, "ig", steps=100)):
        assert own.sum() == pytest.approx(probs[index, classes[index]] - baseline[index, classes[index]], abs=5e-3)


def test_every_script_of_analysis_takes_a_prompt_model(prompted, few, tmp_path):
    data = shutil.copytree(few / "plenty", tmp_path / "data")
    shutil.copy(few / "unlabelled/data.txt", data)
    cases = tmp_path / "cases.txt"
    common = ["--dataset_dir", data, "--params_path", prompted, "--device", "cpu"]
    cache = ["--cache_dir", tmp_path / "cache"]
    for main, more, outputs in (
            (evaluate.main, ["--bad_case_file", cases], [cases]),
            (report.main, ["--report_dir", tmp_path / "report", *cache], [tmp_path / "report/report.html"]),
            (word_interpret.main, ["--interpret_input_file", data / "data.txt", "--html_file", tmp_path / "words.html",
                                   "--output_file", tmp_path / "words.jsonl", "--steps", 5], [tmp_path / "words.html"]),
            (sent_interpret.main, ["--interpret_input_file", data / "data.txt", "--interpret_result_file", tmp_path / "rows.txt",
                                   "--jsonl_file", tmp_path / "rows.jsonl", *cache], [tmp_path / "rows.jsonl"]),
            (sparse.main, ["--annotate", "--sparse_num", 5, "--support_num", 5, *cache], [data / "sparse.txt"]),
            (dirty.main, ["--method", "representer", "--dirty_num", 5, *cache], [data / "train_dirty.txt"])):
        process = run_here(main, *common, *more)
        assert process.returncode == 0, process.stderr
        assert all(path.stat().st_size for path in outputs), main
    accuracy = json.loads((prompted / "eval_results.json").read_text())["eval_accuracy"]
    assert len(read_lines(cases)) - 1 == round((1 - accuracy) * len(read_lines(data / "dev.txt")))
    assert len(read_lines(tmp_path / "words.jsonl")) == len(read_lines(tmp_path / "rows.jsonl")) == 40
    process = run_here(fine_tuning.main, "--model_name_or_path", prompted, "--data_dir", data, "--do_eval", "--device", "cpu",
                       "--output_dir", tmp_path / "check")
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "check/eval_results.json").read_text())["eval_accuracy"] == pytest.approx(accuracy)
    process = run_here(prune.main, "--params_dir", prompted, "--dataset_dir", data, "--output_dir", tmp_path / "prune",
                       "--device", "cpu")
    assert_user_error(process, f"{prompted}: a prompt model, which cannot be pruned")
    assert process.stderr.count("\n") == 1 and not (tmp_path / "prune").exists()


def test_simple_serving_answers_for_a_prompt_model(prompted, deployed, tmp_path):
    python, checkpoint = server_python("simple-serving"), load_checkpoint(str(prompted))
    expected = predict_probs(checkpoint, tokenize(TEXTS, checkpoint.encode), 8)
    with simple_serving(python, tmp_path, "--export_dir", deployed) as (_, port):
        body = json.dumps({"data": {"text": TEXTS}}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/taskflow/cls", body, {"Content-Type": "application/json"})
        with open_url(request) as answer:
            result = json.load(answer)["result"]
    for item, row in zip(result, expected, strict=True):
        assert item["predictions"][0]["label"] == checkpoint.labels[row.argmax()]
        assert item["predictions"][0]["score"] == pytest.approx(row.max(), abs=1e-4)


def test_the_benchmark_measures_and_does_not_measure_again(masked_lm, few, tmp_path):
    benchmark = load_script("few-shot", "benchmark")
    changes = ["--model_name_or_path", masked_lm, "--label_file", few / "label.txt", "--test_file", few / "test.txt",
               "--train_files", few / "plenty/train.txt", "--prompt", "这是关于", "--max_steps", 1, "--shots", 2,
               "--seeds", 1, "--epochs_of_all", 1, "--unlabelled_files", few / "unlabelled/data.txt", "--output_dir",
               tmp_path / "out"]
    process = run_here(benchmark.main, *changes, "--methods", "prompt", "fine_tuning", "tfidf", "--figure", tmp_path / "a.png")
    assert process.returncode == 0, process.stderr
    rows = {line[5:22].strip(): line.split() for line in process.stdout.splitlines()[1:]}
    assert list(rows) == ["prompt", "fine_tuning", "tfidf"] and (tmp_path / "a.png").stat().st_size
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    texts, gold = zip(*(line.split("\t") for line in read_lines(few / "test.txt")))
    checkpoint = load_checkpoint(str(tmp_path / "out/shots-2-seed-1/prompt"))
    guesses = predict_logits(checkpoint, tokenize(list(texts), checkpoint.encode), 8).argmax(axis=1)
    accuracy = np.mean([checkpoint.labels[guess] == label for guess, label in zip(guesses, gold)])
    assert results[0]["accuracy"] == pytest.approx(accuracy) and f"{100 * accuracy:.2f}" in rows["prompt"]
    again = run_here(benchmark.main, *changes, "--methods", "prompt", "tfidf")
    assert again.returncode == 0 and "rows ..." not in again.stderr and again.stdout == process.stdout
    assert_user_error(run_here(benchmark.main, *changes, "--methods", "tfidf", "--batch_size", 4), "other options")
    assert_user_error(run_here(benchmark.main, *changes, "--methods", "tfidf", "--max_steps", 2), "--max_steps 1, expected 2")
