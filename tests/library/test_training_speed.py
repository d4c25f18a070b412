"""What makes a training fast changes nothing of its result: the last layer's share, rows of embeddings, threads, operators."""

import os
import re

import numpy as np
import pytest

import train
from helpers import make_model, run_here, train_options, weights
from textcls.common.errors import UserError
from textcls.data.tokens import TokenizedTexts
from textcls.models.checkpoints import load_model
from textcls.models.configs import SentenceOptions
from textcls.models.inference import open_pool
from textcls.models.last_layer import compute_all
from textcls.models.paddle_setup import paddle
from textcls.training.embedding_rows import EmbeddingRows
from textcls.training.operators import DRAWS, LinearProduct, fast_operators
from textcls.training.samplers import TokenBatchSampler
from textcls.training.threads import EvaluatedModel, ThreadedModel

IDS = np.random.default_rng(0).integers(5, 300, (24, 9))
IDS[3:9, 7:] = 0  # padding


@pytest.mark.parametrize("name", ["checkpoint", "ernie_m", "pooler", "cls"])
def test_what_the_head_reads_is_the_same_where_the_last_layer_computes_only_that(name, request, tmp_path):
    if name in ("pooler", "cls"):
        model = load_model(str(make_model(tmp_path)), "SentenceEncoder", sentence_options=SentenceOptions(name, 16, []))
    else:
        model = load_model(str(request.getfixturevalue(name) / ("model" if name == "ernie_m" else "")), num_labels=11)
    ids = paddle.to_tensor(IDS)
    with paddle.no_grad():
        found = model(ids).numpy()
        assert model.base_model(ids)[0].shape[1] == 1
        compute_all(model)
        assert model.base_model(ids)[0].shape[1] == IDS.shape[1]
        np.testing.assert_allclose(found, model(ids).numpy(), atol=1e-5)


def gradients(model, num_threads, dropout_key=(1, 2)):
    """The loss and gradients of a step on so many threads, 0 for Paddle's own way."""
    model.clear_gradients()
    ids, loss = paddle.to_tensor(IDS), paddle.nn.CrossEntropyLoss()
    label_ids = paddle.to_tensor(np.arange(len(IDS)) % 3)
    if num_threads:
        with open_pool(num_threads) as pool, fast_operators(pool):
            threads = ThreadedModel(model, num_threads, pool)
            threads.train()
            threads.begin(*dropout_key)
            value = loss(threads(ids), label_ids)
            value.backward()
            threads.backward()
    else:
        model.train()
        value = loss(model(ids), label_ids)
        value.backward()
    return float(value), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def assert_close(first, second):
    assert first[0] == pytest.approx(second[0], abs=1e-5) and first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        np.testing.assert_allclose(gradient, second[1][name], atol=1e-5, err_msg=name)


def test_a_step_on_threads_has_the_gradients_of_paddles_own(tmp_path):
    paddle.seed(1)
    model = load_model(str(make_model(tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)), num_labels=3)
    expected = gradients(model, 0)
    assert max(np.abs(gradient).max() for gradient in expected[1].values()) > 0.01
    for num_threads in (1, 2, 3):
        assert_close(gradients(model, num_threads), expected)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk that is always full")
def test_a_full_disk_is_named_where_the_embeddings_wait_on_it(tmp_path, monkeypatch):
    model = load_model(str(make_model(tmp_path)), num_labels=3)
    with open("/dev/full", "wb", buffering=0) as file:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: file)
        with pytest.raises(UserError, match="output: No space left on device, expected 1 MiB of free space for .*--full_embed"):
            EmbeddingRows(model, np.arange(9), "output")


def test_an_evaluation_on_threads_has_the_answers_of_the_model(tmp_path):
    paddle.seed(1)
    model, ids = load_model(str(make_model(tmp_path)), num_labels=3), paddle.to_tensor(IDS)
    with open_pool(3) as pool:
        for rows in (1, 2, len(IDS)):
            output = EvaluatedModel(model, 3, pool)(ids[:rows])
            assert output.stop_gradient
            np.testing.assert_allclose(output.numpy(), model(ids[:rows]).numpy(), atol=1e-6)


def test_dropout_does_not_depend_on_the_number_of_threads_but_on_the_step(tmp_path):
    paddle.seed(1)
    model = load_model(str(make_model(tmp_path)), num_labels=3)
    expected = gradients(model, 1)
    for num_threads in (2, 3):
        assert_close(gradients(model, num_threads), expected)
    for key in ((1, 3), (2, 2)):
        others = gradients(model, 2, key)[1]
        assert max(np.abs(others[name] - gradient).max() for name, gradient in expected[1].items()) > 0.01


@pytest.mark.parametrize("trained", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1), (1, 0, 0), (1, 1, 1)])
def test_a_linear_layer_has_the_gradients_of_paddles_own(trained):
    results = []
    for function in (paddle.nn.functional.linear, LinearProduct.apply):
        paddle.seed(3)
        tensors = [paddle.randn(shape) for shape in ([2, 3, 4], [4, 5], [5])]
        for tensor, is_trained in zip(tensors, trained):
            tensor.stop_gradient = not is_trained
        (function(*tensors) ** 2).sum().backward()
        results.append([None if tensor.grad is None else tensor.grad.numpy() for tensor in tensors])
    for expected, found, is_trained in zip(*results, trained):
        assert (found is not None) == bool(is_trained)
        if is_trained:
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_dropout_keeps_its_share_of_values_that_have_nothing_to_do_with_each_other():
    DRAWS.begin((7, 1), 0)
    try:
        kept = DRAWS.keep([64, 11, 50], 0.9), DRAWS.keep([64, 11, 50], 0.9)
    finally:
        DRAWS.end()
    for mask in kept:
        assert mask.mean() == pytest.approx(0.9, abs=0.01)
        assert np.ptp(mask.mean(axis=(1, 2))) < 0.1 and not (mask[0] == mask[1]).all()
    assert (kept[0] == kept[1]).mean() == pytest.approx(0.82, abs=0.02)  # 0.9 ** 2 + 0.1 ** 2


@pytest.mark.parametrize("num_tokens,ranks", [(128, 1), (1000, 2), (10**9, 1)])
def test_batches_by_tokens_hold_each_text_once_and_about_as_many_tokens(num_tokens, ranks):
    lengths = np.random.default_rng(1).integers(3, 129, 700)
    tokens = TokenizedTexts(np.zeros(lengths.sum(), np.int32), np.concatenate([[0], np.cumsum(lengths)]))
    samplers = [TokenBatchSampler(tokens, num_tokens, 5, ranks, rank) for rank in range(ranks)]
    orders = []
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        steps = [np.concatenate(batches) for batches in zip(*samplers)]
        assert len(steps) == len(samplers[0]) == max(1, lengths.sum() // (num_tokens * ranks))
        order = np.concatenate(steps)
        assert set(order) == set(range(700)) and len(order) < 700 + ranks * len(steps)  # the ranks' shares are of one size
        sums = [lengths[step].sum() for step in steps]
        assert max(sums) <= min(num_tokens * ranks * (1 + 1 / len(steps)), lengths.sum()) + 2 * 128
        orders.append(order.tolist())
    assert orders[0] != orders[1] or len(steps) == 1


def trained(model, data, folder, **changes):
    process = run_here(train.main, *train_options(model, data, folder, **{"load_best_model_at_end": None, **changes})[1:])
    assert process.returncode == 0, process.stderr
    return process.stderr


def assert_close_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_allclose(values, second[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_training_the_rows_that_occur_is_training_the_table(weight_decay, tiny_model, tiny_data, tmp_path):
    """dev.txt has tokens that train.txt has not; a checkpoint of either kind goes on as the other."""
    options = {"weight_decay": weight_decay, "num_train_epochs": 1, "save_total_limit": 9, "save_strategy": "steps",
               "evaluation_strategy": "steps", "save_steps": 7, "eval_steps": 7}
    log = trained(tiny_model, tiny_data, tmp_path / "rows", **options)
    rows, size = map(int, re.search(r"trains the (\S+) of (\S+) rows", log.replace(",", "")).groups())
    assert rows < size / 4 and "trains the" not in trained(tiny_model, tiny_data, tmp_path / "all", full_embeddings="", **options)
    table = "ernie.embeddings.word_embeddings.weight"
    start = load_seeded(tiny_model)[table]
    end = weights(tmp_path / "rows")[table]
    moved = np.abs(end - start).max(axis=1) > 1e-7
    assert moved.all() if weight_decay else 100 < moved.sum() < rows
    moments = [os.path.getsize(tmp_path / name / "checkpoint-7/optimizer.pdopt") for name in ("rows", "all")]
    assert moments[0] < 0.6 * moments[1]  # the table is most of this model
    for name in ("", "checkpoint-7"):
        assert_close_weights(tmp_path / "rows" / name, tmp_path / "all" / name)
    trained(tiny_model, tiny_data, tmp_path / "all to rows", resume_from_checkpoint=tmp_path / "all/checkpoint-7", **options)
    trained(tiny_model, tiny_data, tmp_path / "rows to all", resume_from_checkpoint=tmp_path / "rows/checkpoint-7",
            full_embeddings="", **options)
    for name in ("all to rows", "rows to all"):
        assert_close_weights(tmp_path / name, tmp_path / "all")


def load_seeded(folder):
    """The weights with which a training of a model without weights begins."""
    paddle.seed(42)  # the default of --seed
    return {name: values.numpy() for name, values in load_model(str(folder), num_labels=11).state_dict().items()}


def test_a_token_without_a_row_is_an_error_not_another_token(tiny_model, tmp_path):
    model, ids = load_model(str(tiny_model)), paddle.to_tensor([[1, 299, 300, 2]])
    expected = model(ids).numpy()
    rows = EmbeddingRows(model, np.arange(300), str(tmp_path))
    with pytest.raises(ValueError):
        model(ids)
    rows.restore()
    np.testing.assert_array_equal(model(ids).numpy(), expected)
