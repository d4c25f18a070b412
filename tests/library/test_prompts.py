"""Prompts: templates, label words, options that cannot work, the head, prefixes and soft tokens, losses."""

import os
import shutil

import numpy as np
import pytest

from helpers import assert_user_error, make_model, read_lines, weights, write_lines
from prompt_models import TEXTS, build, guess_words, run_train, script, words_as_ids
from textcls.common.errors import UserError
from textcls.data.files import draw_shots, read_labels
from textcls.data.prompts import parse_template
from textcls.data.tokens import pad_batch
from textcls.models.paddle_setup import paddle
from textcls.training.losses import SoftLabelLoss, rdrop_divergence, relation_loss

pytestmark = pytest.mark.usefixtures("tokenizers_built_once")

# ---- templates


@pytest.mark.parametrize("template, parts", [
    (None, [{"soft": None}, {"text": "text_a"}, {"mask": None}]),
    ("这条新闻写的是", [{"text": "text_a"}, {"hard": "这条新闻写的是"}, {"mask": None}]),
    ("{'text': 'text'}写的是{'mask'}。", [{"text": "text"}, {"hard": "写的是"}, {"mask": None}, {"hard": "。"}]),
    ('{"mask": None}{ "text" : "a" , "token_type" : 1 }', [{"mask": None}, {"text": "a", "token_type": 1}]),
    ("{'mask', 'length': 2}{'sep'}{'text'}", [{"mask": None, "length": 2}, {"sep": None}, {"text": None}]),
    ("{'soft': '这是', 'soft_id': 1}{'soft', 'length': 3, 'encoder': 'lstm', 'hidden_size': 8}{'text'}{'mask'}",
     [{"soft": "这是", "soft_id": 1}, {"soft": None, "length": 3, "encoder": "lstm", "hidden_size": 8}, {"text": None},
      {"mask": None}]),
    ("{'prefix': '分类', 'encoder': 'mlp'}{'text', 'truncate': True, 'add_space': False}{'hard': '是'}{'mask'}",
     [{"prefix": "分类", "encoder": "mlp"}, {"text": None, "truncate": True, "add_space": False}, {"hard": "是"},
      {"mask": None}]),
])
def test_templates_are_parsed(template, parts):
    assert parse_template(template) == parts
    if template is None or "{" not in template:
        assert parse_template(template, mask_length=3) == [*parts[:-1], {"mask": None, "length": 3}]
    else:
        assert parse_template(template, mask_length=3) == parts  # what it says, or leaves out, holds


def test_a_prompt_without_blocks_gets_a_mask_as_long_as_the_words_where_these_are_alike():
    for word_ids, length in (([[[7, 8]], [[9, 5], [6, 7]]], 2), ([[[7]], [[9, 5]]], 1)):
        assert script.read_templates(["关于", "{'text'}{'mask'}"], word_ids) == [parse_template("关于", length),
                                                                             parse_template("{'text'}{'mask'}")]


@pytest.mark.parametrize("template, position, wrong", [
    ("{'text'}是{'mask'", 17, "the block has no }"),
    ("{'text'}是}{'mask'}", 10, "a } without its {"),
    ("{'text'}{mask}", 10, "'mask' is not a name in quotes"),
    ("{'text'}{'msk'}", 10, "'msk' is no keyword"),
    ("{'text': text}{'mask'}", 10, "'text' is neither a string nor a number"),
    ("{'text' 'a'}{'mask'}", 9, "'a' where , or } should stand"),
    ("{'text': 1}{'mask'}", 2, "the value of 'text' is 1"),
    ("{'text'}{'hard'}{'mask'}", 10, "'hard' without its words"),
    ("{'text'}{'mask', 'length': 0}", 18, "the value of 'length' is 0"),
    ("{'text'}{'mask', 'length': True}", 18, "the value of 'length' is True"),
    ("{'text', 'token_type': 2}{'mask'}", 10, "the value of 'token_type' is 2"),
    ("{'text', 'length': 2}{'mask'}", 10, "'length' is no attribute of 'text'"),
    ("{'text'}{'mask', 'length': 1, 'length': 1}", 31, "'length' is no attribute of 'mask' (or stands twice)"),
    ("{'soft', 'encoder': 'gru'}{'text'}{'mask'}", 10, "no encoder 'gru'"),
    ("{'text', 'truncate': False}{'mask'}", 10, "a text that is too long has to be cut"),
    ("{'text'}[MASK]{'mask'}", 9, "[MASK] as plain words"),
    ("这是[MASK]", 3, "[MASK] as plain words"),
    ("{'text'}{'mask', 'length': -1}", 28, "'-' has no meaning in a block"),
    ("{__import__('os').system('touch X')}", 2, "'__import__' is not a name in quotes"),
    ("{'text': __import__('os')}", 10, "'__import__' is neither a string nor a number"),
    ("{}", 2, "'}' is not a name in quotes"),
])
def test_a_wrong_template_is_refused_with_the_position(template, position, wrong):
    with pytest.raises(UserError) as error:
        parse_template(template)
    assert f": at character {position}: {wrong}" in str(error.value) and "expected" in str(error.value)


@pytest.mark.parametrize("template, wrong", [
    ("{'text'}是", "has no mask"), ("{'mask'}是", "has no text"), ("{'text'}{'text'}{'mask'}", "has two texts"),
    (" ", "is empty")])
def test_a_template_has_one_text_and_a_mask(template, wrong):
    with pytest.raises(UserError, match=wrong):
        parse_template(template)


def test_encoders_that_differ_are_refused_and_unknown_words_named(masked_lm, few, tmp_path):
    prompt = "{'soft', 'encoder': 'lstm'}{'prefix', 'encoder': 'mlp'}{'text'}😀{'mask'}"
    process = run_train(masked_lm, few, tmp_path / "out", prompt=prompt)
    assert_user_error(process, "'lstm'", "'mlp'", "expected one for all")
    process = run_train(masked_lm, few, tmp_path / "out", prompt="{'text'}😀{'mask'}", max_seq_length=4)
    assert_user_error(process, "no token for a part of the words '😀'", "--max_seq_length 4")


def test_a_template_is_never_run(masked_lm, few, tmp_path):
    code = f"{{__import__('os').system('touch {tmp_path}/X')}}"
    for prompt in (code, "{'text'}" + code, "{'text': " + code[1:-1] + "}{'mask'}"):
        assert_user_error(run_train(masked_lm, few, tmp_path / "out", prompt=prompt), "--prompt", "at character")
    assert os.listdir(tmp_path) == []


# ---- labels, their words, and data


def test_label_words(tmp_path):
    from textcls.data.files import read_label_words

    write_lines(tmp_path / "label.txt", ["news##车==汽车", "文化", "a##体育", "财经==财经==股票", "旅游==旅游",
                                         "旅游==景点"])
    found = read_label_words(tmp_path / "label.txt")
    assert found == {"news##车": {"汽车": 1}, "文化": {"文化": 2}, "a##体育": {"体育": 3}, "财经": {"财经": 4, "股票": 4},
                     "旅游": {"旅游": 5, "景点": 6}}
    assert read_labels(tmp_path / "label.txt") == list(found)


def test_all_that_is_wrong_with_the_data_is_said_at_once(masked_lm, few, tmp_path):
    data = shutil.copytree(few, tmp_path / "data")
    first, second = read_labels(few / "label.txt")
    write_lines(data / "label.txt", [f"{first}==费用", f"{second}==費鑫", f"{first}==龘", "第三==费用",
                                     "第四==费用原因费用原因费用"])
    write_lines(data / "train.txt", [*read_lines(few / "train.txt"), "没有标签", f"好\t{first}x"])
    os.remove(data / "dev.txt")
    process = run_train(masked_lm, data, tmp_path / "out", do_eval="", do_predict="")
    assert_user_error(process, f"{data}/label.txt:2: the vocabulary has no token for a part of the word '費鑫'",
                      f"{data}/label.txt:3: the vocabulary has no token for a part of the word '龘'",
                      f"{data}/label.txt:4: the word '费用' stands for two labels or twice",
                      f"{data}/train.txt:31: no tab", f"{data}/train.txt:32: label", f"{data}/dev.txt: file not found",
                      "6 problems found.", "the longest words of the labels have from 2 to 10 tokens")
    os.remove(data / "test.txt")
    shutil.copy(few / "label.txt", data)
    shutil.copy(few / "train.txt", data)
    assert_user_error(run_train(masked_lm, data, tmp_path / "out", do_predict=""), f"{data}/test.txt: file not found")
    assert_user_error(run_train(masked_lm, data, tmp_path / "out", shots=16), f"class {first!r} has 15 rows",
                      f"class {second!r} has 15 rows", "at least the 16 of --shots")
    assert os.listdir(tmp_path) == ["data"]


def test_shots_are_drawn_by_the_seed_alone(few):
    label_ids = np.arange(60) % 3
    texts = [str(index) for index in range(60)]
    drawn = draw_shots(texts, label_ids, 5, 7)
    assert np.bincount(label_ids[drawn]).tolist() == [5, 5, 5] and (np.diff(drawn) > 0).all()
    assert (drawn == draw_shots(texts, label_ids, 5, 7)).all() and (drawn != draw_shots(texts, label_ids, 5, 8)).any()


@pytest.mark.parametrize("changes, parts", [
    ({"max_seq_length": 7}, ["--max_seq_length 7: out of range, expected 9 to 512"]),
    ({"prompt": "长" * 600}, ["--prompt: template 1 takes 604 tokens, which leaves no room for a text in the 512 of this model"]),
    ({"repeats": 0}, ["--repeats 0: out of range"]),
    ({"shots": 0}, ["--shots 0: out of range"]),
    ({"learning_rate": 0}, ["--learning_rate 0", "--freeze_plm"]),
    ({"verbalizer": "manual", "freeze_plm": ""}, ["nothing is left to train"]),
    ({"do_train": None}, ["nothing to do", "--do_train", "zero-shot"]),
    ({"folds": -1}, ["--folds -1: out of range"]),
    ({"pretrain_file": "none.txt"}, ["none.txt: file not found"]),
    ({"prompt": " "}, ["--prompt: is empty"]),
    ({"prompt": "none.txt"}, ["--prompt none.txt: no such file"]),
    ({"prompt": "｛'text'｝好｛'mask'｝"}, ["no template either", "plain braces"]),
    ({"distill_epochs": "nan"}, ["--distill_epochs nan: out of range"]),
    ({"seed": 2**32 - 1, "repeats": 2}, ["--repeats 2: out of range"]),
])
def test_options_that_cannot_work_are_refused(masked_lm, few, tmp_path, changes, parts):
    assert_user_error(run_train(masked_lm, few, tmp_path / "out", **changes), *parts)
    assert os.listdir(tmp_path) == []


def test_a_model_without_its_masked_lm_head_is_refused(masked_lm, few, tmp_path):
    bare = make_model(tmp_path / "bare")
    assert_user_error(run_train(bare, few, tmp_path / "out"), "holds no weights", "cls.*")
    state = {name: value for name, value in weights(masked_lm).items() if not name.startswith("cls.")}
    paddle.save(state, str(bare / "model_state.pdparams"))
    assert_user_error(run_train(bare, few, tmp_path / "out"), "lacks", "masked LM with its head (cls.*)")
    assert os.listdir(tmp_path) == ["bare"]


# ---- the model


@pytest.mark.parametrize("name", ["masked_lm", "masked_bert"])
@pytest.mark.parametrize("template, words", [
    ("{'text'}关于{'mask'}", [["药"], ["病"], ["钱"]]),  # one mask, one token
    ("{'mask'}的是{'text'}", [["药"], ["费用"], ["病", "原因"]]),  # before the text; words of two tokens; several words
    ("{'mask', 'length': 2}{'sep'}{'text'}是{'sep'}", [["费用", "价钱"], ["原因"]]),  # a mask for each token
    ("{'mask'}的{'text'}{'mask'}", [["费用"], ["原因", "病"]]),  # on both sides
])
def test_the_head_is_plain_indexing_of_the_masked_lm(name, template, words, request):
    model, encode, tokenizer, masked = build(request.getfixturevalue(name), template, words)
    rows = encode(TEXTS)
    assert len({len(row) for row in rows}) > 1  # the batch has padding
    with paddle.no_grad():
        logits = model(paddle.to_tensor(pad_batch(rows, tokenizer.pad_token_id))).numpy()
        alone = model(paddle.to_tensor(pad_batch(rows[:1], tokenizer.pad_token_id))).numpy()
    expected = guess_words(masked, rows, tokenizer.mask_token_id, words_as_ids(tokenizer, words), tokenizer.pad_token_id)
    assert np.abs(expected).max() > 0.03 and np.ptp(expected, axis=0).max() > 1e-3  # they differ between texts
    np.testing.assert_allclose(logits, expected, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(alone, expected[:1], atol=1e-6, rtol=1e-6)
    assert np.abs(masked.cls.predictions.decoder.bias.numpy()).max() > 0.01  # else the bias would not count


def test_a_mask_in_a_text_stays_text_and_only_the_text_is_cut(masked_lm):
    model, encode, tokenizer, _ = build(masked_lm, "{'mask'}的是{'text'}是吗", [["药"], ["病"]], length=20)
    before, after = model.prompt.before, model.prompt.after
    short, literal, long, nothing = encode(["头疼", "头疼[MASK]药[SEP]", "头疼" * 200, ""])
    for row in (short, literal, long, nothing):
        assert row[:len(before)] == before and row[-len(after):] == after and row.count(tokenizer.mask_token_id) == 1
    assert len(long) == 20 and nothing == before + after
    plain = [token for piece in ("头疼", "[", "mask", "]", "药") for token in words_as_ids(tokenizer, [[piece]])[0][0]]
    assert literal[len(before):][:len(plain)] == plain
    batch = pad_batch([short, literal, long, nothing], tokenizer.pad_token_id)
    with paddle.no_grad():
        logits = model(paddle.to_tensor(batch)).numpy()
    assert np.isfinite(logits).all() and logits.shape == (4, 2)


def test_token_types_are_those_of_the_template(masked_bert):
    template = "{'hard': '这', 'token_type': 1}{'text'}{'mask', 'token_type': 1}"
    model, encode, tokenizer, masked = build(masked_bert, template, [["药"], ["病"]])
    rows = encode(TEXTS)
    batch = pad_batch(rows, tokenizer.pad_token_id)
    types = np.zeros_like(batch)
    types[:, 1] = 1
    for row, ids in enumerate(rows):
        types[row, len(ids) - 2] = 1  # the mask, before [SEP]
    with paddle.no_grad():
        logits = model(paddle.to_tensor(batch)).numpy()
        expected = masked(paddle.to_tensor(batch), token_type_ids=paddle.to_tensor(types)).numpy()
    ids = [tokens[0][0] for tokens in words_as_ids(tokenizer, [["药"], ["病"]])]
    expected = expected[batch == tokenizer.mask_token_id][:, ids]
    np.testing.assert_allclose(logits, expected, atol=1e-6, rtol=1e-6)


def test_soft_tokens_begin_as_their_words_and_share_their_number(masked_lm):
    words = [["药"], ["病"]]
    hard, encode, tokenizer, _ = build(masked_lm, "这是{'text'}关于{'mask'}", words)
    soft, encode_soft, _, _ = build(masked_lm, "{'soft': '这是', 'soft_id': 1}{'text'}{'soft': '关于'}{'mask'}", words)
    with paddle.no_grad():
        expected, logits = (model(paddle.to_tensor(pad_batch(rows(TEXTS), tokenizer.pad_token_id))).numpy()
                            for model, rows in ((hard, encode), (soft, encode_soft)))
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    assert soft.prompt.num_soft == 4
    shared, _, _, _ = build(masked_lm, "{'soft', 'soft_id': 3, 'length': 2}{'text'}{'soft', 'soft_id': 3}{'mask'}{'soft'}", words)
    size = shared.config.vocab_size
    assert shared.prompt.num_soft == 3 and shared.prompt.before[1:] == [size, size + 1]
    assert shared.prompt.after[:2] == [size, size + 1] and shared.prompt.after[3] == size + 2


@pytest.mark.parametrize("name", ["masked_lm", "masked_bert"])
def test_a_prefix_is_keys_and_values_before_those_of_the_text(name, request):
    words = [["药"], ["病"]]
    model, encode, tokenizer, _ = build(request.getfixturevalue(name), "{'prefix', 'length': 3}{'text'}{'mask'}", words)
    rows = encode(TEXTS)
    with paddle.no_grad():
        batch = model(paddle.to_tensor(pad_batch(rows, tokenizer.pad_token_id))).numpy()
        alone = np.concatenate([model(paddle.to_tensor([row])).numpy() for row in rows])
        np.testing.assert_allclose(batch, alone, atol=1e-5)  # padding is not seen
        model.prefix.vectors.set_value(model.prefix.vectors + 1)
        assert np.abs(model(paddle.to_tensor([rows[0]])).numpy() - alone[0]).max() > 1e-3


# ---- losses


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_losses_are_what_their_formulas_say():
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 5, 4)).astype(np.float32)
    log_p, log_q = log_softmax(first), log_softmax(second)
    p, q = np.exp(log_p), np.exp(log_q)
    symmetric = ((p * (log_p - log_q)).sum(1) + (q * (log_q - log_p)).sum(1)).mean() / 2
    assert float(rdrop_divergence(paddle.to_tensor(first), paddle.to_tensor(second))) == pytest.approx(symmetric, rel=1e-5)
    hot, target = log_softmax(first / 2), np.exp(log_softmax(second / 2))
    assert float(SoftLabelLoss(2.0)(paddle.to_tensor(first), paddle.to_tensor(second))) == pytest.approx(
        -(target * hot).sum(1).mean() * 4, rel=1e-5)
    features, labels, losses = random.normal(size=(5, 7)).astype(np.float32), np.array([0, 1, 0, 1, 2]), []
    for one in range(5):
        for other in range(one + 1, 5):
            a, b = features[one], features[other]
            same = (1 + a @ b / np.linalg.norm(a) / np.linalg.norm(b)) / 2
            losses.append(-np.log(same if labels[one] == labels[other] else 1 - same))
    assert float(relation_loss(paddle.to_tensor(features), paddle.to_tensor(labels))) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(relation_loss(paddle.to_tensor(features[:1]), paddle.to_tensor(labels[:1]))) == 0


# ---- training
