"""The fixtures: tiny data and models, and what the commands make of them, once for all tests."""

import fcntl
import json
import os
import shutil

import pytest
from tokenizers import Tokenizer

pytest.register_assert_rewrite("helpers", "prompt_models", "review_server")  # their asserts say as much as those of the tests

# ruff: noqa: E402
from helpers import (
    ROOT,
    THRESHOLD,
    make_ernie_m,
    make_model,
    read_lines,
    run,
    run_here,
    set_long_text,
    thousand_texts,
    train_options,
    weights,
    write_binary_data,
    write_lines,
)
from textcls.common.digests import file_id
from textcls.common.log import get_logger
from textcls.common.probabilities import top_labels
from textcls.models.configs import change_config
from textcls.models.families import FAMILIES
from textcls.models.paddle_setup import paddle
from textcls.models.wordpiece import build_rust_tokenizer
from textcls.retrieval.encoder import open_encoder
from textcls.retrieval.head import fit_head
from textcls.retrieval.rows import rows_of_texts
from textcls.retrieval.writing import memory_index, new_header, write_index
from textcls.runtime.predictor import Predictor

# the test files, the longest first
LONGEST = ("readme", "train", "prune", "few_shot", "settings", "spark", "retrieval_train", "prompts", "milvus", "retrieval_index",
           "retrieval_scripts", "pretrained_encoders", "paddle_serving", "demo", "app", "word_interpret", "triton_serving", "aug",
           "sent_interpret", "predictor", "simple_serving", "review_page", "review", "search_serving", "sparse", "predict",
           "export", "evaluate", "stacks")


def pytest_collection_modifyitems(items):
    """The longest files first, so that the workers of `make test` end together; the tests of a file keep their order."""
    order = {f"test_{name}.py": position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture
def suite_log(caplog):
    """pytest's caplog with what the suite's own logger says, which does not hand it on to others."""
    get_logger().addHandler(caplog.handler)
    yield caplog
    get_logger().removeHandler(caplog.handler)


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
    """A folder made by export_model.py --onnx, with a threshold; tests that change it take a copy."""
    def make(folder):
        source = shutil.copytree(checkpoint, folder / "checkpoint", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
        temperature = json.loads((source / "config.json").read_text())["calibration"]["temperature"]
        change_config(str(source), threshold={"value": THRESHOLD, "precision": 0.9, "temperature": temperature,
                                              "max_seq_length": 64,
                                              "weights": file_id(str(source / "model_state.pdparams"))})
        process = run("export_model.py", "--params_path", source, "--output_path", folder / "export", "--onnx")
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


@pytest.fixture(scope="session")
def search_export(encoder_export, make_once):
    """An exported encoder with an index of the sample data's training texts in its folder index/; tests that change it take a
    copy."""
    def make(folder):
        shutil.copytree(encoder_export, folder / "export")
        rows = [line.split("\t") for line in read_lines(ROOT / "data/train.txt")][:600]
        labels = read_lines(ROOT / "data/label.txt")
        texts, encoder = [text for text, _ in rows], open_encoder(str(encoder_export), num_threads=1)
        header = new_header(encoder.encoder_id, encoder.dimension, "texts", [(label, []) for label in labels])
        new_rows = rows_of_texts(encoder.encode(texts), [labels.index(row[1]) for row in rows], texts)
        index = memory_index({**header, "head": {"weight": 0.5, "temperature": 1.0, "strength": 10.0}}, new_rows)
        write_index(folder / "export/index", index._replace(head=fit_head(index, 10.0)))

    return make_once("search_export", make) / "export"


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


@pytest.fixture(scope="session")
def windowed(checkpoint, exported, predicted, make_once):
    """The trained model as one that reads long texts in windows: its checkpoint, its export, and what predict.py says of all
    long ones and some others of the 1,000 texts: (list of str, list of its JSON objects with top_k 3)."""
    def make(folder):
        shutil.copytree(checkpoint, folder / "checkpoint")
        shutil.copytree(exported, folder / "export")
        for name in ("checkpoint/config.json", "export/deploy.json"):
            set_long_text(folder / name, mode="window", max_windows=5)
        texts = sorted(predicted[0], key=lambda text: -len(text))
        write_lines(folder / "data.txt", texts[:60] + texts[100::10])
        process = run("predict.py", "--params_path", folder / "checkpoint", "--dataset_dir", folder, "--device", "cpu",
                      "--output_format", "jsonl", "--top_k", 3, "--output_file", folder / "answers")
        assert process.returncode == 0, process.stderr

    folder = make_once("windowed", make)
    answers = [json.loads(line) for line in read_lines(folder / "answers")]
    return folder / "checkpoint", folder / "export", ([answer["text"] for answer in answers], answers)


@pytest.fixture(scope="session")
def telling(checkpoint, make_once):
    """A folder with a checkpoint that tells unknown texts, the trained one after one more step, and its export by ONNX."""
    def make(folder):
        import export_model
        import train

        process = run_here(train.main, *train_options(
            checkpoint, ROOT / "data", folder / "checkpoint", known="centres", max_steps=1, learning_rate="1e-7",
            load_best_model_at_end=None, metric_for_best_model=None, evaluation_strategy="no", save_strategy="no")[1:])
        assert process.returncode == 0, process.stderr
        assert "Unknown texts will be told by how far they are from the labels' centres: fitted on 264 rows of dev.txt | " \
            in process.stderr
        process = run_here(export_model.main, "--params_path", folder / "checkpoint", "--output_path", folder / "export",
                           "--onnx")
        assert process.returncode == 0, process.stderr

    return make_once("telling", make)


@pytest.fixture(scope="session")
def telling_windows(telling, predicted, make_once):
    """The export of `telling` as one that reads long texts in windows, and what deploy/predictor says of all long ones and some
    others of the 1,000 texts: (folder, list of str, list of predict.py's JSON objects with top_k 3)."""
    def make(folder):
        shutil.copytree(telling / "export", folder / "export")
        set_long_text(folder / "export/deploy.json", mode="window", max_windows=5)
        texts = sorted(predicted[0], key=lambda text: -len(text))
        write_lines(folder / "data.txt", texts[:60] + texts[100::10])

    folder = make_once("telling_windows", make)
    texts, predictor = read_lines(folder / "data.txt"), Predictor(folder / "export")
    probs, known = predictor.answer(texts)
    rows = [{"text": text, "known": own, "top_k": [{"label": label, "probability": value} for label, value in top]}
            for text, own, top in zip(texts, known.tolist(), top_labels(probs, predictor.labels, 3))]
    return folder / "export", texts, rows


@pytest.fixture(scope="session")
def masked_lm(make_once):
    """The folder of an ERNIE masked LM."""
    from prompt_models import make_masked_lm  # its import takes seconds

    return make_once("masked_lm", make_masked_lm)


@pytest.fixture(scope="session")
def masked_bert(make_once):
    from prompt_models import make_masked_lm

    return make_once("masked_bert", lambda folder: make_masked_lm(
        folder, model_type="bert", num_hidden_layers=1, use_task_id=None, task_type_vocab_size=None))


@pytest.fixture(scope="session")
def few(make_once):
    """The folder of a task for few-shot/."""
    from prompt_models import make_few

    return make_once("few", make_few)


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
