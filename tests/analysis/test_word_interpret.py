"""analysis/word_interpret.py: words and offsets, attributions that add up, faithfulness, the three outputs, the notebook."""

import html
import json
import random
import re
import sys

import numpy as np
import pytest

import predict
from analysis import word_interpret
from helpers import ROOT, assert_user_error, make_model, read_lines, run, run_here, write_lines
from textcls.analysis import trustai_setup
from textcls.analysis.attributions import attribute_tokens, explain_batches, interpret
from textcls.analysis.faithfulness import measure_faithfulness
from textcls.analysis.words import Window, join_words, locate_tokens, split_words
from textcls.data.tokens import tokenize
from textcls.models.checkpoints import Checkpoint, load_checkpoint, load_model
from textcls.models.device import select_device
from textcls.models.inference import predict_probs
from textcls.models.tokenizers import load_tokenizer, make_encoder, rust_tokenizer

DATA = ROOT / "data"
LABELS = read_lines(DATA / "label.txt")
SCRIPT = "analysis/word_interpret.py"
METHODS = ("ig", "lime", "gradshap", "attention")
NASTY = ["孕妇可以做B超吗？CT检查呢", "看牙 Hello, WORLD! 39.5℃ don't", "ＡＢＣ１２３，ｄｅｆ。①㎎ﷺ", "👨‍👩‍👧头疼😀😀怎么办",
         "\x01", "e\u0301te\u0301 İstanbul ß", " 前后有空格\u3000", "[SEP]医院[CLS]", "한글 ไทย हिन्दी ｱｲｳ",
         "病\x01痛\u200b𠀀", "？！……", "<script>alert(1)</script>&amp;多少钱", "感冒" * 200]


@pytest.fixture(scope="module")
def trained(checkpoint):
    select_device("cpu")
    return load_checkpoint(str(checkpoint))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT with random weights."""
    folder = str(make_model(tmp_path_factory.mktemp("bert"), model_type="bert", architectures=["BertForSequenceClassification"],
                            use_task_id=None, task_type_vocab_size=None))
    tokenizer, model = load_tokenizer(folder), load_model(folder, num_labels=2)
    fast = rust_tokenizer(tokenizer, 64)
    return Checkpoint(model, tokenizer, fast, make_encoder(tokenizer, fast, 64), ["a", "b"], 64, tokenizer.pad_token_id)


@pytest.fixture(scope="module")
def ernie_m_model(ernie_m):
    return load_checkpoint(str(ernie_m / "checkpoint"))


def test_words_make_up_the_text():
    for text in NASTY + [line.split("\t")[0] for line in read_lines(DATA / "dev.txt")]:
        position = 0
        for word, start, end in split_words(text):
            assert text[start:end] == word and start < end and not text[position:start].strip(), text
            position = end
        assert not text[position:].strip(), text
    assert [word for word, _, _ in split_words("孕妇可以做B超吗？Is 39.5 too-high, please?")] == [
        "孕妇", "可以", "做", "B超", "吗", "？", "Is", "39.5", "too-high", ",", "please", "?"]
    assert [word for word, _, _ in split_words("结节1.2cm（大）")] == ["结节", "1.2cm", "（", "大", "）"]


@pytest.mark.parametrize("name", ["trained", "bert", "ernie_m_model"])
def test_tokens_lie_where_their_characters_are(name, request):
    checkpoint = request.getfixturevalue(name)
    generator = random.Random(3)
    alphabet = "".join(NASTY)[:-300]
    texts = NASTY + ["".join(generator.choices(alphabet, k=30)) for _ in range(300)]
    texts += [line.split("\t")[0] for line in read_lines(DATA / "dev.txt")[:60]]
    plain = re.compile(r"[a-z0-9\u4e00-\u9fff]+")
    compared = 0
    for text in texts:
        [window] = locate_tokens(checkpoint, text)
        ids, offsets, [(first, last)] = window
        assert [ids] == checkpoint.encode([text])[0] and len(offsets) == len(ids) - 2
        assert first == 0 and (last < len(text)) <= (text == NASTY[-1] or len(ids) == checkpoint.max_seq_length)
        assert last < len(text) or text != NASTY[-1]
        assert all(0 <= start <= end <= len(text) for start, end in offsets)
        for token, (start, end) in zip(checkpoint.tokenizer.convert_ids_to_tokens(ids[1:-1]), offsets):
            token = token.replace("##", "").replace("\u2581", "")
            place = re.sub("[\x01\u200b]", "", text[start:end]).lower()  # a place may include dropped characters
            if plain.fullmatch(token) and plain.fullmatch(place):
                assert place == token, (text, token)
                compared += 1
        values = np.arange(1.0, len(offsets) + 1)
        joined = join_words(split_words(text), window, values)
        assert not joined or sum(value or 0 for *_, value in joined) == pytest.approx(values.sum())
    assert compared > 400


def test_a_token_across_two_words_is_shared_by_characters():
    words = [("多少", 0, 2), ("钱", 2, 3), ("呢", 4, 5)]
    assert [word[3] for word in join_words(words, Window([], [(0, 3), (3, 5)], [(0, 5)]), [3.0, 5.0])] == [2.0, 1.0, 5.0]
    assert [word[3] for word in join_words(words, Window([], [(0, 2)], [(0, 2)]), [1.0])] == [1.0, None, None]


@pytest.mark.parametrize("name", ["trained", "bert", "ernie_m_model"])
def test_every_method_on_every_model(name, request):
    checkpoint = request.getfixturevalue(name)
    texts = [NASTY[0], NASTY[4], NASTY[-1], "为什么会发烧"]
    before = [parameter.stop_gradient for parameter in checkpoint.model.parameters()]
    probs = predict_probs(checkpoint, tokenize(texts, checkpoint.encode), 32)
    rows = [locate_tokens(checkpoint, text)[0].ids for text in texts]
    for method in METHODS:
        results = interpret(checkpoint, texts, method, steps=10)
        values = attribute_tokens(checkpoint, rows, probs.argmax(axis=1), method, steps=10)
        for text, row, result, own in zip(texts, probs, results, values):
            assert (result.prediction, result.probability) == (row.argmax(), pytest.approx(row.max(), abs=1e-6))
            assert "".join(word for word, *_ in result.words) == text
            assert len(own) == len(checkpoint.encode([text])[0][0])
            if text != "\x01":  # no token at all
                assert np.abs(own[1:-1]).max() > 0
                assert sum(word[3] or 0 for word in result.words) == pytest.approx(own[1:-1].sum(), rel=1e-6, abs=1e-9)
        assert results[2].words[0][3] is not None and results[2].words[-1][3] is None  # beyond max_seq_length
    assert [parameter.stop_gradient for parameter in checkpoint.model.parameters()] == before
    assert predict_probs(checkpoint, tokenize(texts, checkpoint.encode), 32).argmax(axis=1).tolist() == [
        result.prediction for result in results]


def test_integrated_gradients_add_up_to_the_change_of_probability(trained):
    texts = [line.split("\t")[0] for line in read_lines(DATA / "dev.txt")[:6]]
    tokens = tokenize(texts, trained.encode)
    probs = predict_probs(trained, tokens, 32)
    embedding = next(layer for name, layer in trained.model.named_sublayers() if name.endswith("word_embeddings"))
    hook = embedding.register_forward_post_hook(lambda layer, inputs, output: output * 0)
    baseline = predict_probs(trained, tokens, 32)
    hook.remove()
    classes = probs.argmax(axis=1)
    rows = [locate_tokens(trained, text)[0].ids for text in texts]
    sums = [values.sum() for values in attribute_tokens(trained, rows, classes, steps=200)]
    change = (probs - baseline)[np.arange(6), classes]
    assert np.abs(change).max() > 0.5
    assert sums == pytest.approx(change, abs=0.005)


@pytest.mark.parametrize("name", ["trained", "bert", "ernie_m_model"])
def test_integrated_gradients_are_trustais(name, request):
    """Those of texts of many lengths, run at once, are those that TrustAI gives for one text at a time."""
    checkpoint, batch_size, steps = request.getfixturevalue(name)._replace(temperature=1.0), 7, 12  # TrustAI knows none
    texts = ["为什么会发烧", NASTY[0], NASTY[4], "看牙齿矫正一共要花多少钱呢", NASTY[3]]
    rows = [locate_tokens(checkpoint, text)[0].ids for text in texts]
    assert len(set(map(len, rows))) > 3
    classes = np.arange(len(rows)) % 2
    with trustai_setup.interpreted_model(checkpoint.model) as wrapped:
        trustai = trustai_setup.import_trustai().IntGradInterpreter(wrapped, batch_size=steps + 1)
        expected = explain_batches(checkpoint, rows, classes, 1, lambda ids, labels: trustai((ids,), labels, steps=steps))
    found = attribute_tokens(checkpoint, rows, classes, "ig", batch_size, steps)
    for own, other in zip(found, expected):
        assert np.abs(other).max() > 1e-4
        assert own == pytest.approx(other, abs=1e-5, rel=1e-4)


@pytest.mark.parametrize("method", ["ig", "lime", "gradshap"])
def test_key_words_matter_more_than_random_words(trained, method):
    trained = trained._replace(temperature=1.0)
    texts = [line.split("\t")[0] for line in read_lines(DATA / "dev.txt")[::6]]
    results = interpret(trained, texts, method, steps={"lime": 100}.get(method))
    found = measure_faithfulness(trained, texts, results, 2)
    assert found["texts"] > 20
    assert found["comprehensiveness"] > found["random_comprehensiveness"] + 0.15
    assert found["sufficiency"] < found["random_sufficiency"] - 0.1


def test_the_seed_decides(trained):
    for method in ("lime", "gradshap"):
        first, again, other = (interpret(trained, ["看牙多少钱"], method, steps=10, seed=seed) for seed in (3, 3, 4))
        assert first == again != other


def test_the_three_outputs(checkpoint, tmp_path):
    write_lines(tmp_path / "bad_case.txt", ["Text\tLabel\tPrediction", f"{NASTY[-2]}\t医疗费用\t病因分析",
                                            "为什么会发烧\t病因分析", "看牙齿矫正一共要花多少钱呢", "感冒" * 100])
    process = run(ROOT / SCRIPT, "--device", "cpu", "--dataset_dir", DATA, "--params_path", checkpoint, "--key_words_num", 3,
                  "--faithfulness", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert re.search(r"Faithfulness of ig at 3 words \| texts of more than 3 words: [234] \| mean probability of the prediction: "
                     r"0\.\d{4}\n.*Comprehensiveness \(higher is better\): -?\d\.\d{4} \| random words: -?\d\.\d{4} \(standard "
                     r"deviation of 5 draws: \d\.\d{4}\)\n.*Sufficiency \(lower is better\): ", process.stderr)
    rows = [json.loads(line) for line in read_lines(tmp_path / "word_interpret.jsonl")]
    texts = [row["text"] for row in rows]
    assert [row["label"] for row in rows] == ["医疗费用", "病因分析", None, None] and texts[0] == NASTY[-2]
    write_lines(tmp_path / "texts.txt", texts)
    predicted = run_here(predict.main, "--device", "cpu", "--params_path", checkpoint, "--dataset_dir", tmp_path, "--data_file",
                    "texts.txt", "--output_format", "jsonl", "--output_file", "-")
    for row, line in zip(rows, predicted.stdout.splitlines()):
        answer = json.loads(line)
        assert (row["text"], row["prediction"]) == (answer["text"], answer["label"])
        assert row["probability"] == pytest.approx(answer["probability"], abs=2e-6)
    assert not re.search(r"\[CLS\]|\[SEP\]", (tmp_path / "word_interpret.jsonl").read_text(encoding="utf-8"))
    assert all(row["text"][start:end] == word for row in rows for word, start, end, _ in row["words"])
    assert rows[3]["words"][-1] == ["感冒", 198, 200, None]

    header, *table = process.stdout.splitlines()
    assert header == "Label\tPrediction\tProbability\tKey words\tText"
    for row, line in zip(rows, table):
        best = sorted((word for word in row["words"] if word[3] is not None), key=lambda word: -word[3])[:3]
        label, prediction, probability, key_words, text = line.split("\t")
        assert (label, prediction, probability, text) == (row["label"] or "-", row["prediction"], f"{row['probability']:.4f}",
                                                          row["text"])
        assert [word.rsplit("(", 1)[0] for word in key_words.split(" ")][0] == best[0][0]
        assert key_words.count("(") >= 3

    page = (tmp_path / "word_interpret.html").read_text(encoding="utf-8")
    assert "<script" not in page and "http" not in page and '<span class="cut">感冒</span>' in page
    shown = [html.unescape(re.sub("<[^>]*>", "", text)) for text in re.findall('<div class="text">(.*?)</div>', page)]
    assert shown == texts
    assert "rgba(31, 119, 180, 0.75)" in page.split('<div class="case">')[2]  # the strongest word of a text


def test_notebook(checkpoint, tmp_path, monkeypatch):
    book = json.loads((ROOT / "analysis/word_interpret.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in book["cells"])
    write_lines(tmp_path / "bad_case.txt", ["Text\tLabel\tPrediction", "看牙多少钱\t医疗费用\t病因分析"])
    code = "\n".join(cells)
    for name, path in (("checkpoint", checkpoint), ("bad_case.txt", tmp_path / "bad_case.txt")):
        old = f'str(root / "{name}")'
        assert old in code
        code = code.replace(old, repr(str(path)))
    monkeypatch.chdir(ROOT / "analysis")
    names = {}
    exec(code, names)
    assert re.search(r'<span style="background[^>]*>多少钱</span>|<span style="background[^>]*>看牙</span>', names["page"])


def test_wrong_input_writes_nothing(checkpoint, tmp_path, monkeypatch):
    bad = tmp_path / "bad.txt"
    write_lines(bad, ["Text\tLabel\tPrediction", "看牙\t没有这个", "", "看牙\t其他\t其他\t多余"])
    common = (word_interpret.main, "--dataset_dir", DATA, "--params_path", checkpoint, "--interpret_input_file", bad)
    process = run_here(*common, "--html_file", tmp_path / "out.html", "--output_file", tmp_path / "out.jsonl")
    assert_user_error(process, f"{bad}:2: label '没有这个' is not one of the model's", f"{bad}:3: text: empty or blank",
                      "3 problems found.")
    write_lines(bad, ["看牙"])
    process = run_here(*common, "--html_file", bad, "--output_file", tmp_path / "out.jsonl")
    assert_user_error(process, f"{bad}: is an input of this run")
    monkeypatch.setitem(sys.modules, "interpretdl", None)
    trustai_setup.prepare_interpretdl.cache_clear()
    process = run_here(*common, "--html_file", tmp_path / "out.html", "--output_file", tmp_path / "out.jsonl", "--interpreter",
                  "gradshap")
    assert_user_error(process, "--interpreter gradshap: interpretdl cannot be imported",
                      "README.md, sections 2.2 and 2.3")
    assert bad.read_text(encoding="utf-8") == "看牙\n" and not list(tmp_path.glob("out*"))
