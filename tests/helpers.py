"""Shared by the tests: running command lines, reading and writing files, models, texts. Fixtures stand in conftest.py."""

import importlib.util
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from textcls.common.errors import run_script
from textcls.common.probabilities import softmax
from textcls.common.texts import TEXT
from textcls.data.tokens import pad_batch
from textcls.export.deployment import open_graph, run_graph
from textcls.models.paddle_setup import PADDLE_3, paddle  # prepares this process before a test imports paddle
from textcls.models.pickle_guard import guard_paddle_load
from textcls.runtime.predictor import Predictor

ROOT = Path(__file__).resolve().parent.parent
THRESHOLD = 0.7  # that the fixture `exported` holds
KUAKE = os.environ.get("KUAKE_QIC_DIR")
GRAPH = (".json", ".pdiparams") if PADDLE_3 else (".pdmodel", ".pdiparams", ".pdiparams.info")  # what a static graph is kept in
needs_paddle_2 = pytest.mark.skipif(PADDLE_3, reason="PaddleSlim 2.6 and Paddle Serving know graphs of Paddle 2 only")
needs_kuake = pytest.mark.skipif(not KUAKE, reason="KUAKE_QIC_DIR does not name the folder of the KUAKE-QIC data set")


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
    """folder/name.py as a module of a name of its own, since the repository has several scripts of some names. All tests have the
    same module: what a script pickles has to be of the classes that its name leads to."""
    module_name = f"{folder.replace('-', '_')}_{name}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, ROOT / folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# runs many command lines of one script in one process of a server's own environment, where each start costs half a second
DRIVER = """
import importlib.util, io, json, os, sys
path, lines = sys.argv[1], json.load(sys.stdin)
sys.path[0] = os.path.dirname(path)
sys.argv = [path]
spec = importlib.util.spec_from_file_location("script", path)
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
found, streams = [], (sys.stdin, sys.stdout, sys.stderr)
for words, given in lines:
    sys.argv = [path, *words]
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", write_through=True) for content in (given.encode(), b"", b""))
    code = 0
    try:
        script.run_script(script.main)
    except SystemExit as end:
        code = end.code or 0
    found.append([code] + [stream.buffer.getvalue().decode() for stream in (sys.stdout, sys.stderr)])
    sys.stdin, sys.stdout, sys.stderr = streams
print(json.dumps(found))
"""


def run_all(python, script, *lines, inside=(), cwd=ROOT):
    """Run a script once per command line, a list of words, or (list of words, standard input).

    python: of the environment. inside: words before it. Returns what subprocess.run would for each; an exception that a user
    would see as a traceback fails here.
    """
    lines = [line if isinstance(line, tuple) else (line, "") for line in lines]
    process = subprocess.run([*inside, str(python), "-c", DRIVER, str(script)], cwd=cwd, encoding="utf-8", errors="replace",
                             input=json.dumps([(list(map(str, words)), given) for words, given in lines]),
                             capture_output=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return [subprocess.CompletedProcess(words, code, stdout, stderr)
            for (words, _), (code, stdout, stderr) in zip(lines, json.loads(process.stdout))]


def server_python(name):
    """The Python of a server's own environment, which `make test` makes. Without it the module is skipped, in CI it fails."""
    python = ROOT / f".venv-{name}/bin/python"
    if not python.exists():
        message = f"{python} is missing, expected what `make .venv-{name}/.installed` makes"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message, allow_module_level=True)
    return python


def launch(*command, cwd=ROOT, log_dir):
    """Run a script in two CPU processes."""
    module = ["paddle.distributed.launch", "--nproc_per_node", "2", "--backend", "gloo", "--log_dir", str(log_dir)]
    return run(*command, cwd=cwd, module=module)


def assert_user_error(process, *parts):
    """Exit code 2, every part of the message on standard error, no traceback."""
    assert process.returncode == 2, process.stderr
    assert not re.search("Traceback|usage:", process.stderr + process.stdout), process.stderr
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


def open_url(request, timeout=60):
    """The answer of a server on this machine, past the proxies of the environment, which urllib keeps even of an earlier test."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout)


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


def set_long_text(path, **entries):
    """Let a config.json or deploy.json say how long texts are read."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "long_text": entries}), encoding="utf-8")


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


def write_binary_data(folder):
    """The rows of two classes of the sample data."""
    for name in ("train.txt", "dev.txt"):
        rows = [line for line in read_lines(ROOT / "data" / name) if line.endswith(("医疗费用", "病因分析"))]
        write_lines(folder / name, rows)
    write_lines(folder / "label.txt", ["医疗费用", "病因分析"])


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


def paddle_inference(prefix, rows, pad_id):
    """Probabilities by Paddle Inference, batches of 32 in the order of rows; float32 [num_texts, num_classes]."""
    graph, deploy = open_graph(str(prefix)), json.loads((prefix.parent / "deploy.json").read_text())
    return softmax(np.concatenate([run_graph(graph, pad_batch(rows[start:start + 32], pad_id))
                                   for start in range(0, len(rows), 32)]), deploy["temperature"])


def assert_paths_agree(prefix, texts, calibration_file, least=0.99, **options):
    """Paddle's graph and its ONNX fp32 agree on every label, INT8 on `least` of them; returns the probabilities of ONNX fp32.

    options: of the Predictor in INT8.
    """
    fp32, texts = Predictor(prefix), [text for text in texts if not TEXT.problem(text)]
    pad_id = json.loads((prefix.parent / "deploy.json").read_text())["pad_token_id"]
    rows = [row["input_ids"] for row in fp32.tokenize(texts)]
    reference, probs = paddle_inference(prefix, rows, pad_id), fp32.probabilities(texts)
    np.testing.assert_array_equal(probs.argmax(axis=1), reference.argmax(axis=1))
    np.testing.assert_allclose(probs, reference, atol=1e-4)
    int8 = Predictor(prefix, dtype="int8", calibration_file=calibration_file, **options).probabilities(texts)
    assert (int8.argmax(axis=1) == reference.argmax(axis=1)).mean() >= least
    assert not np.allclose(int8, probs, atol=1e-6)  # else nothing was quantized
    return probs


def assert_answers_agree(answers, expected):
    """The labels and confidences of a server are those of predict.py.

    answers: per text a list of (label, confidence), best first; expected: the JSON objects of `predicted`.
    """
    for answer, right in zip(answers, expected):
        assert [label for label, _ in answer] == [top["label"] for top in right["top_k"]][:len(answer)], right["text"]
        wanted = [top["probability"] for top in right["top_k"]][:len(answer)]
        assert [confidence for _, confidence in answer] == pytest.approx(wanted, abs=1e-4), right["text"]
    assert len(answers) == len(expected)


def assert_known_agrees(rows, expected, least):
    """How known texts are, and which are undecided for it.

    rows: JSON objects of a server's client that had --least_known `least`; expected: those of `telling_windows`.
    """
    np.testing.assert_allclose([row["known"] for row in rows], [right["known"] for right in expected], atol=1e-5)
    for row, right in zip(rows, expected):
        if abs(right["known"] - least) > 1e-5:
            assert row["label"] == (right["top_k"][0]["label"] if right["known"] > least else "undecided"), right["text"]
    assert len({row["label"] == "undecided" for row in rows}) == 2
