"""Shared by the tests: running the real command lines, tiny data, tiny models, one trained checkpoint."""

import fcntl
import importlib.util
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from textcls.common.errors import run_script
from textcls.models.families import FAMILIES
from textcls.models.paddle_setup import PADDLE_3, paddle  # prepares this process before a test imports paddle
from textcls.models.pickle_guard import guard_paddle_load
from textcls.models.wordpiece import build_rust_tokenizer

ROOT = Path(__file__).resolve().parent.parent
KUAKE = os.environ.get("KUAKE_QIC_DIR")
LONGEST = ("readme", "train", "prune", "few_shot", "retrieval_train", "prompts", "milvus", "retrieval_index", "retrieval_scripts",
           "paddle_serving", "demo", "word_interpret", "triton_serving", "aug", "sent_interpret", "predictor", "simple_serving",
           "search_serving", "sparse", "predict", "export", "evaluate", "stacks")  # of the test files, the longest first
GRAPH = (".json", ".pdiparams") if PADDLE_3 else (".pdmodel", ".pdiparams", ".pdiparams.info")  # what a static graph is kept in
needs_paddle_2 = pytest.mark.skipif(PADDLE_3, reason="PaddleSlim 2.6 and Paddle Serving know graphs of Paddle 2 only")
needs_kuake = pytest.mark.skipif(not KUAKE, reason="KUAKE_QIC_DIR does not name the folder of the KUAKE-QIC data set")


def pytest_collection_modifyitems(items):
    """The longest files first, so that the workers of `make test` end together; the tests of a file keep their order."""
    order = {f"test_{name}.py": position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def run(*command, stdin=None, cwd=ROOT, env=None, module=None, python=sys.executable):
    """Run `python command...` as a user would; returns the finished process with text output.

    On one core, since the tests run two at a time; what runs in this process uses all of them.
    """
    start = [str(python)] + (["-m", *module] if module else [])
    return subprocess.run([*start, *map(str, command)], cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                          encoding="utf-8", errors="replace", input=stdin, capture_output=True, timeout=600)


def run_here(main, *arguments, stdin="", cwd=ROOT):
    """Run a script's main() in this process, as run_script() would: without the seconds that importing Paddle takes.

    For refusals and small runs that leave Paddle as it was; each script also has tests with a process of its own. Returns
    what `run` returns; an exception that a user would see as a traceback is raised here.
    """
    script = sys.modules[main.__module__].__file__
    stdin, stdout, stderr = [io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", write_through=True)
                             for content in (stdin.encode("utf-8"), b"", b"")]
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    code = 0
    try:
        # parameters are numbered as in a new process: an optimizer's saved state goes by their names
        with pytest.MonkeyPatch.context() as patch, paddle.utils.unique_name.guard():
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            for handler in console_handlers(sys.stderr):
                patch.setattr(handler, "stream", stderr)
            for name, stream in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
                patch.setattr(sys, name, stream)
            run_script(main)
    except SystemExit as error:
        code = error.code or 0
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        for handler in console_handlers(stderr):  # made during the run
            handler.stream = sys.stderr
        output, errors = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (stdout, stderr)]
        sys.stdout.write(output)  # pytest shows both where a test fails
        sys.stderr.write(errors)
    return subprocess.CompletedProcess([script, *arguments], code, output, errors)


def console_handlers(stream):
    """The handlers of all loggers that write to this stream."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", [])]
    return [handler for handler in handlers if vars(handler).get("stream") is stream]  # logging's last resort follows by itself


def load_script(folder, name):
    """folder/name.py as a module of a name of its own, since the repository has several scripts of some names."""
    spec = importlib.util.spec_from_file_location(f"{folder.replace('-', '_')}_{name}", ROOT / folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(*command, cwd=ROOT, log_dir):
    """Run a script in two CPU processes."""
    module = ["paddle.distributed.launch", "--nproc_per_node", "2", "--backend", "gloo", "--log_dir", str(log_dir)]
    return run(*command, cwd=cwd, module=module)


def assert_user_error(process, *parts):
    """Exit code 2, every part of the message on standard error, no traceback."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr + process.stdout, process.stderr
    for part in parts:
        assert part in process.stderr


def weights(folder):
    """model_state.pdparams as {name: array}."""
    guard_paddle_load()
    state = paddle.load(str(Path(folder) / "model_state.pdparams"), return_numpy=True)
    return {name: value for name, value in state.items() if isinstance(value, np.ndarray)}


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def write_lines(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_lines(path):
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def make_model(folder, **changes):
    """A model folder without weights: the sample data's ERNIE, smaller."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((ROOT / "data/config.json").read_text(encoding="utf-8"))
    config.update({"hidden_size": 48, "intermediate_size": 96, **changes})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(ROOT / "data/vocab.txt", folder)
    return folder


def train_options(model, data, output, **changes):
    """The usual training command line; an option set to None is left out, one set to "" is a flag."""
    options = {"model_name_or_path": model, "data_dir": data, "output_dir": output, "device": "cpu",
               "learning_rate": "1e-3", "num_train_epochs": 2, "per_device_train_batch_size": 16,
               "per_device_eval_batch_size": 32, "max_seq_length": 64, "do_train": "", "do_eval": "",
               "metric_for_best_model": "accuracy", "load_best_model_at_end": "", "evaluation_strategy": "epoch",
               "save_strategy": "epoch", "save_total_limit": 1, **changes}
    words = ["train.py"]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}"] + ([str(value)] if value != "" else [])
    return words


def thousand_texts():
    """Real texts, emoji, texts of next to nothing, very long ones and random Unicode, in random order."""
    generator = random.Random(3)
    real = [line.split("\t")[0] for name in ("dev.txt", "test.txt", "train.txt") for line in read_lines(ROOT / "data" / name)]
    texts = real[:650] + [text + generator.choice("😀👨‍👩‍👧🏥💊❤️") for text in real[:100]]
    texts += ["", "\u3000\u200b", "。", "?", "[PAD]", "[SEP][CLS]", "a", "１"]
    texts += ["".join(generator.sample(real, 40)) for _ in range(40)] + ["长" * 3000, "long " * 2000]
    characters = [chr(code) for code in range(0x20, 0x30000) if not 0xD800 <= code < 0xE000]
    known = sorted(set("".join(real)))  # else nearly every token would be [UNK]
    while len(texts) < 1000:
        length = generator.randint(1, 90)
        texts.append("".join(generator.choice(generator.choice((known, characters))) for _ in range(length)))
    generator.shuffle(texts)
    return texts


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """Function make_once(name, make): the folder of this name that make(folder) fills, once for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def make_once(name, make):
        folder, made = shared / name, shared / f"{name}.made"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return make_once


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """About 20 training and 5 dev rows per class of the sample data, with label.txt and data.txt."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train.txt", 220), ("dev.txt", 55), ("label.txt", None), ("data.txt", None)):
        write_lines(folder / name, read_lines(ROOT / "data" / name)[:count])
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def checkpoint(make_once, tiny_model):
    """A model trained by train.py on all sample data; good enough to be right more often than not."""
    def make(folder):
        process = run(*train_options(tiny_model, ROOT / "data", folder / "checkpoint", num_train_epochs=10, learning_rate="3e-3"))
        assert process.returncode == 0, process.stderr

    return make_once("trained", make) / "checkpoint"


@pytest.fixture(scope="session")
def exported(checkpoint, make_once):
    """A folder made by export_model.py --onnx; tests that change it take a copy."""
    def make(folder):
        process = run("export_model.py", "--params_path", checkpoint, "--output_path", folder / "export", "--onnx")
        assert process.returncode == 0, process.stderr
        for form in ("exported graph", "ONNX model"):
            assert f"Largest logit difference between checkpoint and {form}: " in process.stderr

    return make_once("exported", make) / "export"


@pytest.fixture(scope="session")
def encoder_export(checkpoint, make_once):
    """A sentence encoder exported by retrieval_based/export_model.py: the trained classifier without its last layer."""
    def make(folder):
        encoder = shutil.copytree(checkpoint, folder / "checkpoint")
        state = {name: values for name, values in weights(checkpoint).items() if not name.startswith("classifier.")}
        paddle.save(state, str(encoder / "model_state.pdparams"))
        config = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
        config["sentence_encoder"] = {"pooling": "mean", "output_emb_size": 0, "matryoshka_dims": []}
        (encoder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        process = run("retrieval_based/export_model.py", "--params_path", encoder, "--output_path", folder / "export")
        assert process.returncode == 0, process.stderr

    return make_once("encoder_export", make) / "export"


def write_binary_data(folder):
    """The rows of two classes of the sample data."""
    for name in ("train.txt", "dev.txt"):
        rows = [line for line in read_lines(ROOT / "data" / name) if line.endswith(("医疗费用", "病因分析"))]
        write_lines(folder / name, rows)
    write_lines(folder / "label.txt", ["医疗费用", "病因分析"])


@pytest.fixture(scope="session")
def binary(make_once, tiny_model):
    """(data folder, checkpoint) of a task with two classes."""
    def make(folder):
        write_binary_data(folder)
        process = run(*train_options(tiny_model, folder, folder / "checkpoint", num_train_epochs=8, learning_rate="2e-3"))
        assert process.returncode == 0, process.stderr

    folder = make_once("binary", make)
    return folder, folder / "checkpoint"


@pytest.fixture(scope="session")
def ernie_m(make_once):
    """An ERNIE-M trained by train.py on two classes: data files, model/ to begin with, checkpoint/."""
    def make(folder):
        write_binary_data(folder)
        model = make_ernie_m(folder / "model", read_lines(folder / "train.txt"))
        process = run(*train_options(model, folder, folder / "checkpoint", num_train_epochs=6, learning_rate="2e-3"))
        assert process.returncode == 0, process.stderr
        assert json.loads((folder / "checkpoint/eval_results.json").read_text())["eval_accuracy"] > 0.7

    return make_once("ernie_m", make)


def make_ernie_m(folder, rows):
    """The folder of an ERNIE-M without weights; its SentencePiece model is made from the texts of labelled rows."""
    import sentencepiece

    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([row.split("\t")[0] for row in rows]), model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=1200, hard_vocab_limit=False, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    vocab = [pieces.id_to_piece(index) for index in range(3, pieces.get_piece_size())]
    write_lines(folder / "vocab.txt", ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *vocab])
    os.remove(folder / "sentencepiece.bpe.vocab")
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["ErnieMForSequenceClassification"], "model_type": "ernie_m", "vocab_size": len(vocab) + 5,
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
        "max_position_embeddings": 130, "pad_token_id": 1, "cls_token_id": 0}))
    return folder


@pytest.fixture(scope="session")
def predicted(checkpoint, make_once):
    """1,000 texts and what predict.py says of them: (list of str, list of its JSON objects with top_k 3)."""
    def make(folder):
        real = [line.split("\t")[0] for line in read_lines(ROOT / "data/train.txt")]
        texts = [text for text in thousand_texts() if text.strip() and not set(text) & set("\t\n\r\0")]
        texts += real[-(1000 - len(texts)):]
        assert len(texts) == 1000
        write_lines(folder / "data.txt", texts)
        process = run("predict.py", "--params_path", checkpoint, "--dataset_dir", folder, "--device", "cpu",
                      "--output_format", "jsonl", "--top_k", 3, "--output_file", folder / "answers")
        assert process.returncode == 0, process.stderr

    folder = make_once("predicted", make)
    texts, answers = read_lines(folder / "data.txt"), [json.loads(line) for line in read_lines(folder / "answers")]
    assert [answer["text"] for answer in answers] == texts
    return texts, answers


def assert_answers_agree(answers, expected):
    """The labels and confidences of a server are those of predict.py.

    answers: per text a list of (label, confidence), best first; expected: the JSON objects of `predicted`.
    """
    for answer, right in zip(answers, expected):
        assert [label for label, _ in answer] == [top["label"] for top in right["top_k"]][:len(answer)], right["text"]
        wanted = [top["probability"] for top in right["top_k"]][:len(answer)]
        assert [confidence for _, confidence in answer] == pytest.approx(wanted, abs=1e-4), right["text"]
    assert len(answers) == len(expected)


def server_python(name):
    """The Python of a server's own environment, which `make test` makes. Without it the module is skipped, in CI it fails."""
    python = ROOT / f".venv-{name}/bin/python"
    if not python.exists():
        message = f"{python} is missing, expected what `make .venv-{name}/.installed` makes"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message, allow_module_level=True)
    return python


# ---- prompts: prompt_models.py makes what these fixtures keep


@pytest.fixture(scope="session")
def masked_lm(make_once):
    """The folder of an ERNIE masked LM."""
    return make_once("masked_lm", prompt_models().make_masked_lm)


@pytest.fixture(scope="session")
def masked_bert(make_once):
    return make_once("masked_bert", lambda folder: prompt_models().make_masked_lm(
        folder, model_type="bert", num_hidden_layers=1, use_task_id=None, task_type_vocab_size=None))


@pytest.fixture(scope="session")
def few(make_once):
    """The folder of a task for few-shot/."""
    return make_once("few", prompt_models().make_few)


def prompt_models():
    import prompt_models  # not above: it imports this file

    return prompt_models


@pytest.fixture(scope="module")
def tokenizers_built_once():
    """Nearly all models here have one vocabulary: the two seconds of building its Rust tokenizer are spent once for each kind."""
    built = {}

    def build_once(tokenizer, plain=()):
        key = (type(tokenizer), tuple(plain), tokenizer.unk_token_id)
        built[key] = built.get(key) or build_rust_tokenizer(tokenizer, plain).to_str()
        return Tokenizer.from_str(built[key])

    with pytest.MonkeyPatch.context() as patch:
        for name in ("bert", "ernie"):
            patch.setitem(FAMILIES, name, FAMILIES[name]._replace(build_rust_tokenizer=build_once))
        yield
