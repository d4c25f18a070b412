"""analysis/aug.py: every strategy offline, no leaks into dev and test, exact counts, masked LMs."""

import json
import re
import shutil
import socket
import unicodedata
from collections import Counter

import numpy as np
import pytest

import analysis.aug
from helpers import ROOT, assert_user_error, make_model, read_lines, run, run_here, write_lines
from textcls.analysis.augmentation import STRATEGIES, MaskedLM, augment, load_source, make_operators, read_dictionary
from textcls.common.errors import UserError
from textcls.models.paddle_setup import paddle

import paddlenlp.utils.env

DATA = ROOT / "data"
CLOSED = "http://127.0.0.1:9"  # nothing listens there
OFFLINE = {name: CLOSED for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")}
OFFLINE.update(no_proxy="", NO_PROXY="")
SYNONYMS = ("--aug_type", "custom", "--custom_file_path", DATA / "synonyms.json")


def texts_of(name):
    return [line.split("\t")[0] for line in read_lines(DATA / name)]


def plain(text):
    """The text without blanks and punctuation, in one width and case."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in text if character.isalnum()) or text


def aug(*options):
    return run_here(analysis.aug.main, "--device", "cpu", *options)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def masked_lms(tmp_path_factory):
    """Folders of one tiny BERT for masked LM: as PaddleNLP saves it, and with Hugging Face's names in safetensors."""
    from safetensors.numpy import save_file

    from paddlenlp.transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("mlm")
    paddle.seed(5)
    config = BertConfig(vocab_size=len(read_lines(DATA / "vocab.txt")), hidden_size=32, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
                        architectures=["BertForMaskedLM"])
    model = BertForMaskedLM(config)
    for parameter in model.parameters():  # or it would give the same answer everywhere
        parameter.set_value(paddle.normal(0, 0.5, parameter.shape))
    model.save_pretrained(str(folder / "paddle"))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    head = "cls.predictions."
    names = [("transform.weight", "transform.dense.weight"), ("transform.bias", "transform.dense.bias"),
             ("layer_norm.weight", "transform.LayerNorm.weight"), ("layer_norm.bias", "transform.LayerNorm.bias"),
             ("decoder.bias", "bias")]
    theirs = {head + other: weights[head + own] for own, other in names}
    theirs[head + "transform.dense.weight"] = theirs[head + "transform.dense.weight"].T
    for mapping in model._get_name_mappings(config):
        if mapping.target_name in weights:
            value = weights[mapping.target_name]
            theirs[mapping.source_name] = value.T if mapping.action == "transpose" else value
    (folder / "hugging_face").mkdir()
    save_file({name: np.ascontiguousarray(value) for name, value in theirs.items()},
              folder / "hugging_face/model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "paddle/config.json").read_text(encoding="utf-8"))
    (folder / "hugging_face/config.json").write_text(json.dumps({**content, "use_cache": True}))
    for name in ("paddle", "hugging_face"):
        shutil.copy(DATA / "vocab.txt", folder / name)
    return folder


@pytest.mark.parametrize("dictionary", ["synonyms.json", "homonyms.json"])
@pytest.mark.parametrize("strategy", ["mix", *STRATEGIES])
def test_every_strategy_with_every_dictionary(strategy, dictionary, no_network):
    texts, held_out = texts_of("train.txt")[:200], texts_of("dev.txt") + texts_of("test.txt")
    new_words = strategy not in ("delete", "swap")
    source = load_source(strategy, "custom", DATA / dictionary) if new_words else {}
    made = augment(texts, strategy, "custom", create_n=3, seed=7, exclude=held_out, source=source)
    assert made == augment(texts, strategy, "custom", create_n=3, seed=7, exclude=held_out, source=source)
    assert made != augment(texts, strategy, "custom", create_n=3, seed=8, exclude=held_out, source=source)
    assert len(made) == len(texts) and max(map(len, made)) == 3
    assert sum(map(bool, made)) > (0.25 if dictionary == "homonyms.json" else 0.5) * len(texts)
    keys = [plain(variant) for variants in made for variant in variants]
    assert len(set(keys)) == len(keys) and not set(keys) & set(map(plain, texts + held_out))
    for text, variants in zip(texts, made):
        for variant in variants:
            if strategy == "swap":
                assert sorted(variant) == sorted(text)
            elif strategy == "delete":
                assert len(variant) < len(text) and not Counter(variant) - Counter(text)
            elif strategy == "insert":
                assert len(variant) > len(text) and not Counter(text) - Counter(variant)


def test_substitutes_come_from_the_dictionary_and_the_amount_follows_aug_percent():
    dictionary = {"头痛": ["头疼"], "发烧": ["发热"], "感冒": ["伤风"], "咳嗽": ["咳"]}
    text = "头痛发烧感冒咳嗽流涕乏力恶心呕吐怎么办"
    few, many = (augment([text], "substitute", "custom", 8, percent, source=dictionary)[0] for percent in (0.01, 1.0))
    once = [text.replace(word, others[0]) for word, others in dictionary.items()]
    assert sorted(few) == sorted(once)
    assert many and all(variant not in once for variant in many)
    swaps = [augment([text], "swap", create_n=5, aug_percent=percent)[0] for percent in (0.01, 1.0)]
    moved = [np.mean([sum(a != b for a, b in zip(text, variant)) for variant in variants]) for variants in swaps]
    assert moved[0] < moved[1]


def test_texts_with_nothing_to_change_and_excluded_ones():
    texts = ["", "？？", "吗", "how are you", "  ", "戴牙套贵吗", "ＣＲＰ 10"]
    for strategy in ("mix", *STRATEGIES):
        made = augment(texts, strategy, source={"贵": ["昂贵"]}, create_n=4)
        assert [bool(variants) for variants in made[:5]] == [False] * 5
    made = augment(["戴牙套贵吗"], source={"贵": ["昂贵", "费钱"]}, exclude=["戴 牙套昂贵吗？"])
    assert made == [["戴牙套费钱吗"]]
    assert augment([], source={"贵": ["昂贵"]}) == []


def test_words_that_make_the_question_are_not_deleted():
    for dictionary in ({}, read_dictionary(DATA / "synonyms.json"), {"吃什么": ["吃啥"]}):
        operator = make_operators(dictionary, 1.0)["delete"]
        operator.create_n = 50
        made = operator.augment("孩子反复咳嗽发烧流鼻涕不能吃什么海鲜牛肉")[0]
        assert len(made) > 10 and all("不能" in variant and "什么" in variant for variant in made)
    text = "昆明人民医院要不要挂号检查大约多少钱什么时候出院"
    for strategy in ("delete", "swap"):
        made = augment([text], strategy, create_n=50, aug_percent=0.3)[0]
        assert len(made) > 3 and all(part in variant for variant in made for part in ("多少钱", "要不要", "什么时候"))


def test_augmented_file(tmp_path):
    process = run("analysis/aug.py", *SYNONYMS, "--aug_path", tmp_path / "aug.txt", env=OFFLINE)
    assert process.returncode == 0, process.stderr
    rows = [line.split("\t") for line in read_lines(tmp_path / "aug.txt")]
    labels = read_lines(DATA / "label.txt")
    source = {text: label for text, label in (line.split("\t") for line in read_lines(DATA / "train.txt"))}
    assert len(rows) > 1200 and {label for _, label in rows} == set(labels)
    taken = {plain(text) for name in ("train.txt", "dev.txt", "test.txt") for text in texts_of(name)}
    keys = [plain(text) for text, _ in rows]
    assert len(set(keys)) == len(keys) and not taken & set(keys)
    # the function gives the same rows, and each has the label of its source
    made = augment(list(source), "substitute", "custom", custom_file_path=DATA / "synonyms.json",
                   exclude=texts_of("dev.txt") + texts_of("test.txt"))
    assert rows == [[variant, source[text]] for text, variants in zip(source, made) for variant in variants]
    counts = Counter(label for _, label in rows)
    for label in labels:
        assert f"Class name: {label} | rows read: 110 | rows written: {counts[label]}\n" in process.stderr
    train = ROOT / "data/train.txt"
    assert f"Augmented data saved in {tmp_path / 'aug.txt'}: {len(rows)} rows of 1210 texts\n" in process.stderr
    assert f"Next: cat ./data/train.txt {tmp_path / 'aug.txt'} > ./data/train_aug.txt" in process.stderr and train.is_file()


def test_only_rare_classes_and_no_more_than_asked(tmp_path):
    rows = read_lines(DATA / "train.txt")
    by_label = {label: [row for row in rows if row.endswith("\t" + label)] for label in read_lines(DATA / "label.txt")}
    keep = dict(zip(by_label, [20, 12, 30, 50, 49, 100, 110, 0, 1, 51, 40]))
    lines = [row for label, count in keep.items() for row in by_label[label][:count]]
    (tmp_path / "train.txt").write_text("\n".join(lines), encoding="utf-8")  # without a line break at the end
    shutil.copy(DATA / "label.txt", tmp_path)
    write_lines(tmp_path / "held_out.txt", texts_of("dev.txt"))
    process = aug("--train_path", tmp_path / "train.txt", "--aug_path", tmp_path / "aug.txt", "--min_per_class", 50,
                  "--create_n", 10, "--aug_strategy", "mix", *SYNONYMS, "--exclude_files", tmp_path / "held_out.txt",
                  "--classes", *[label for label in keep if label != "其他"])
    assert process.returncode == 0, process.stderr
    new = [line.split("\t") for line in read_lines(tmp_path / "aug.txt")]
    counts = Counter(label for _, label in new)
    short = {label for label, count in keep.items() if 0 < count < 10}  # ten variants of one row are not 50 rows
    for label, count in keep.items():
        if label == "其他" or not 0 < count < 50:
            assert label not in counts
        elif label not in short:
            assert counts[label] == 50 - count, label
    (one_row,) = short
    assert f"Class {one_row!r} has {counts[one_row] + 1} rows with the new ones, not 50" in process.stderr
    assert "has 0 rows with the new ones, not 50; what helps: rows of your own." in process.stderr
    assert not set(map(plain, texts_of("dev.txt"))) & {plain(text) for text, _ in new}
    command = re.search(r"Next: (\(cat .*; echo; cat .*\) > \S+), then", process.stderr)[1]
    assert f"{tmp_path / 'train.txt'}; echo; cat" in command


def test_dictionary_that_cannot_be_downloaded(tmp_path, monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(paddlenlp.utils.env, "DATA_HOME", str(tmp_path / "datasets"))
    process = aug("--aug_path", tmp_path / "aug.txt")
    assert_user_error(process, "--aug_type synonym: PaddleNLP's dictionary could not be downloaded from", "word_synonym.json",
                      "--aug_type custom --custom_file_path data/synonyms.json", str(tmp_path / "datasets/WordSubstitute"))
    assert not (tmp_path / "aug.txt").exists()


def test_wrong_files_are_all_reported_at_once(tmp_path):
    write_lines(tmp_path / "train.txt", ["没有标签", "戴牙套贵吗\t医疗费", "戴牙套贵吗\t医疗费用"])
    shutil.copy(DATA / "label.txt", tmp_path)
    process = aug("--train_path", tmp_path / "train.txt", "--aug_path", tmp_path / "aug.txt", "--classes", "治疗方法",
                  "--exclude_files", tmp_path / "none.txt")
    assert_user_error(process, f"{tmp_path / 'train.txt'}:1: no tab", "train.txt:2: label '医疗费' is not in", "'医疗费用'?",
                      f"{tmp_path / 'none.txt'}: file not found", "--classes: no class '治疗方法' (did you mean '治疗方案'?)",
                      "4 problems found")


def test_nothing_made_is_an_error_and_no_file(tmp_path):
    write_lines(tmp_path / "train.txt", ["what is it\ta", "how much\tb"])
    process = aug("--train_path", tmp_path / "train.txt", "--aug_path", tmp_path / "aug.txt", "--aug_strategy", "delete")
    assert_user_error(process, f"{tmp_path / 'train.txt'}: no new row could be made of 2 texts",
                      f"{tmp_path / 'aug.txt'} is not written", "No dev or test file among them")
    assert not (tmp_path / "aug.txt").exists()


@pytest.mark.parametrize("content, wrong", [
    ('{"贵": ["昂贵"],\n "费": }', ":2: not JSON"), ("[]", ":1: not an object"), ("{}", ":1: not an object with words"),
    ('{"贵": ["昂贵"],\n "费": [],\n "药": "药物",\n "水": [1],\n "土": [" "],\n "火": ["a\\tb"],\n "贵": ["高"]}',
     ":2: '费' has an empty list|:3: '药' has \"药物\"|:4: '水' has 1 in|:5: '土' has \" \"|:6: '火' has|'贵' a second time|"
     "6 problems")])
def test_wrong_dictionaries(tmp_path, content, wrong):
    (tmp_path / "words.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_dictionary(tmp_path / "words.json")
    for part in wrong.split("|"):
        assert part in str(error.value)


def test_options_that_do_not_fit_together():
    for options, part in ((("substitute", "synonym", "words.json"), "expected --aug_type custom"),
                          (("delete", "custom", "words.json"), "is not used by --aug_strategy delete"),
                          (("substitute", "custom", None), "expected --custom_file_path"),
                          (("substitute", "custom", None, "folder"), "expected --aug_type mlm"),
                          (("substitute", "custom", "none.json"), "none.json: file not found")):
        with pytest.raises(UserError, match=re.escape(part)):
            load_source(*options)
    assert_user_error(run_here(analysis.aug.main, "--create_n", 100_000_000),
                      "--create_n: '100000000': expected at most 1000: no text has")


def test_shipped_dictionaries_are_sound():
    for name, least in (("synonyms.json", 300), ("homonyms.json", 150)):
        dictionary = read_dictionary(DATA / name)
        assert len(dictionary) >= least
        assert dictionary == json.loads((DATA / name).read_text(encoding="utf-8"))  # nothing had to be dropped
    assert all(word in dictionary[other] for word, others in dictionary.items() for other in others)  # homonyms go both ways


def test_masked_lm_in_batches_one_by_one_and_from_hugging_face(masked_lms, no_network):
    texts = texts_of("train.txt")[:40] + ["[MASK]是什么病", "感冒发烧咳嗽" * 40]
    ours, theirs = MaskedLM(str(masked_lms / "paddle")), MaskedLM(str(masked_lms / "hugging_face"))
    for strategy in ("substitute", "insert", "mix"):
        made = augment(texts, strategy, "mlm", source=ours, batch_size=16)
        assert made == augment(texts, strategy, "mlm", source=ours, batch_size=1)
        assert made == augment(texts, strategy, "mlm", source=theirs, batch_size=7)
        assert sum(map(len, made[:40])) > 65
    vocabulary = set(read_lines(DATA / "vocab.txt"))
    for text, variants in zip(texts, augment(texts, "substitute", "mlm", source=ours)):
        for variant in variants:
            assert len(variant) == len(text)  # as many characters as the word had
            changed = [new for old, new in zip(text, variant) if old != new]
            assert all("\u4e00" <= new <= "\u9fff" and new in vocabulary for new in changed)


def test_masked_lm_that_would_guess_at_random_is_refused(masked_lms, checkpoint, tmp_path):
    make_model(tmp_path / "bare")
    (tmp_path / "evil").mkdir()
    shutil.copy(masked_lms / "paddle/config.json", tmp_path / "evil")
    (tmp_path / "evil/model_state.pdparams").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    shutil.copytree(masked_lms / "paddle", tmp_path / "half")
    state = paddle.load(str(tmp_path / "half/model_state.pdparams"))
    name = next(name for name in state if name.startswith("cls.") and "bias" not in name)
    state.pop(name)
    paddle.save(state, str(tmp_path / "half/model_state.pdparams"))
    shutil.copytree(masked_lms / "paddle", tmp_path / "no_config")
    (tmp_path / "no_config/config.json").unlink()
    for folder, part in ((tmp_path / "half", f"lacks 1 parameters, {name}"), (tmp_path / "no_config", "no config.json"),
                         (tmp_path / "bare", "holds no weights"), (checkpoint, "lacks .* cls.predictions"),
                         (tmp_path / "evil", "refused, its pickle refers to")):
        with pytest.raises(UserError, match=part):
            MaskedLM(str(folder))


def test_masked_lm_on_the_command_line(masked_lms, tmp_path):
    process = aug("--aug_type", "mlm", "--mlm_model", masked_lms / "paddle", "--aug_path", tmp_path / "aug.txt",
                  "--classes", "其他", "--create_n", 1)
    assert process.returncode == 0, process.stderr
    rows = [line.split("\t") for line in read_lines(tmp_path / "aug.txt")]
    assert 90 < len(rows) <= 110 and {label for _, label in rows} == {"其他"}
