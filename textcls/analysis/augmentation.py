"""Variants of texts by paddlenlp.dataaug: what aug.py and sparse.py share, and what dataaug needs to do its work.

Substituting, inserting, deleting and swapping words is "EDA: Easy Data Augmentation" (Wei and Zou 2019, arXiv 1901.11196);
dataaug segments Chinese with jieba and leaves words of Latin letters and digits as they are.

Workarounds for dataaug of PaddleNLP 2.8.1; each can go when a newer release no longer shows its symptom:
- Every augmenter, WordDelete too, downloads stop words and a vocabulary when it is made. `_load_file`, the one method it does
  that with, is replaced; the stop words are those below.
- JiebaTokenizer drops the frequencies and prefixes by which jieba finds words: it is given jieba's own, which come with jieba.
- Dictionaries are downloaded without a time limit: `find_dictionary` looks where PaddleNLP keeps them and then tries once.
- WordSwap ignores aug_percent: it is set afterwards.
- A text with fewer than four words that may change gets nothing (30 % of them is less than one). Here it gets one change,
  except by deletion, where a third of the text would go.
- Results may equal the text or each other and be fewer than asked: `augment` tries again and checks.
- mlm runs the model once per text and guess, and lets it fill in anything: see `MaskedLM`.
"""

import argparse
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Optional, Union

import numpy as np

from textcls.common.errors import Problems, UserError
from textcls.common.log import progress_bar
from textcls.common.options import positive_int
from textcls.common.outputs import complete_file
from textcls.common.texts import LINE
from textcls.data.files import load_json
from textcls.data.folds import comparison_key
from textcls.data.tokens import pad_batch, sorted_batches
from textcls.models.checkpoints import load_model
from textcls.models.tokenizers import check_vocabulary, load_tokenizer

if TYPE_CHECKING:
    from paddlenlp.dataaug.base_augment import BaseAugment

STRATEGIES = ("substitute", "insert", "delete", "swap")
AUG_TYPES = ("synonym", "homonym", "mlm", "custom")
SHIPPED = {"synonym": "synonyms.json", "homonym": "homonyms.json"}  # in data/
MAX_VARIANTS = 1000  # of a text: no text has so many that still say the same
ROUNDS = 5  # tries for a text that has fewer variants than asked
CHUNK = 8192  # texts worked on at once: bounds memory, and lets the masked LM form batches of like length
Place = tuple[str, int, str]  # text before, number of characters to fill in, text after
Source = Union[dict[str, list[str]], "MaskedLM"]  # what new words are taken from: a dictionary {word: [word, ...]}, or a model
CHINESE = re.compile("[\u4e00-\u9fff]+")
TIMEOUT = 10  # seconds without an answer from the host of the dictionaries

PARTICLES = frozenset("""
    的 地 得 了 着 过 吗 呢 吧 啊 呀 嘛 么 哦 哈 啦 是 在 有 和 与 及 或 也 都 就 又 还 再 才 很 太 更 最 把 被 让 给 对 向 从 到
    于 以 为 之 其 而 但 并 且 这 那 这个 那个 这样 那样 我 你 他 她 它 我们 你们 他们 自己 个 些 次 种 位 只 上 下 里 中 后 前
    时 内 外
""".split())
# what decides which question a text asks: only a dictionary of the user's own may replace these words, nothing else touches them
QUESTION_WORDS = frozenset("""
    不 没 没有 无 非 未 别 不能 不会 不是 不要 能 会 可以 能不能 会不会 可不可以 是不是 有没有 要不要 是否 怎么 怎么办 怎么样 怎样
    怎么治 怎么治疗 怎么回事 如何 什么 为什么 为何 什么样 哪 哪些 哪个 哪里 哪儿 哪家 谁 几 多少 多少钱 多久 多长时间 原因 症状
    作用 功效 费用 价格 治 治疗 危害 后果 注意 药 吃 费 什么时候 几天 几个月 几年 几次 多大 多重 多高 钱 能否 可否 为啥
""".split())


def add_variant_options(parser: argparse.ArgumentParser, create_n: int) -> None:
    """Add the options of the scripts that make variants of texts: how many, how many words change, where new ones come from.

    create_n: default of the first.
    """
    parser.add_argument("--create_n", type=variants_number, default=create_n, help="variants per row, at most")
    parser.add_argument("--aug_type", default="synonym", choices=AUG_TYPES,
                        help="where new words come from: PaddleNLP's dictionaries, a masked language model, custom_file_path")
    parser.add_argument("--aug_percent", type=proportion, default=0.1, help="part of a text's words that change; at least one")
    parser.add_argument("--custom_file_path", help="JSON dictionary {word: [word, ...]} for --aug_type custom")
    parser.add_argument("--mlm_model", help="masked LM for --aug_type mlm: a folder or a name; None: ernie-1.0-large-zh-cw")


def variants_number(text: str) -> int:
    """Type of --create_n."""
    number = positive_int(text)
    if number > MAX_VARIANTS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected at most {MAX_VARIANTS}: no text has more variants that still say "
                                         "the same")
    return number


def proportion(text: str) -> float:
    """Type of --aug_percent."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0 and up to 1")
    return number


class StopWords(frozenset):
    """Words that stay as they are, and everything without a letter or digit."""

    def __contains__(self, word: object) -> bool:
        return super().__contains__(word) or not any(character.isalnum() for character in str(word))


def augment(texts: list[str], strategy: str = "substitute", aug_type: str = "synonym", create_n: int = 2,
            aug_percent: float = 0.1, seed: int = 3, custom_file_path: Optional[str] = None, mlm_model: Optional[str] = None,
            batch_size: int = 32, exclude: Iterable[str] = (), source: Optional[Source] = None) -> list[list[str]]:
    """Make up to create_n variants of each text. Returns a list per text.

    No variant equals, by `comparison_key`, a given text, another variant or one of `exclude` (texts). A text for which
    nothing new can be made has an empty list. The same arguments give the same result, whatever batch_size.

    strategy: one of STRATEGIES, or "mix": the four of them in turn.
    aug_type: where new words come from, one of AUG_TYPES; "delete" and "swap" need none.
    aug_percent: part of a text's words that change, 0 to 1: at least one, at most 30 % and at most ten. mlm changes one.
    custom_file_path: dictionary for "custom", see `read_dictionary`. mlm_model: folder or name for "mlm", see `load_source`.
    batch_size: masked texts per batch (mlm). source: what `load_source` returned, to spare loading it here.
    UserError where the dictionary or the model cannot be had.
    """
    if source is None:
        source = load_source(strategy, aug_type, custom_file_path, mlm_model)
    names = STRATEGIES if strategy == "mix" else (strategy,)
    dictionary = {} if isinstance(source, MaskedLM) else source
    collected = Variants(texts, exclude, create_n)
    with seeded(seed), progress_bar(len(texts), "Augmenting") as progress:
        proposer = Proposer(texts, names, make_operators(dictionary, aug_percent), source, batch_size)
        for start in range(0, len(texts), CHUNK):
            rows: Sequence[int] = range(start, min(start + CHUNK, len(texts)))
            for _ in range(ROUNDS):
                left = run_round(rows, proposer, collected)
                progress.update(len(rows) - len(left))
                rows = left
            progress.update(len(rows))
            proposer.forget_places()
    return collected.of


class Variants:
    """The variants accepted so far: of[row] is the list of text `row`."""

    def __init__(self, texts: list[str], exclude: Iterable[str], create_n: int) -> None:
        self.of: list[list[str]] = [[] for _ in texts]
        self.create_n = create_n
        self.taken = {comparison_key(text) for text in itertools.chain(texts, exclude)}

    def missing(self, row: int) -> int:
        """Count the variants that a text still lacks."""
        return self.create_n - len(self.of[row])

    def accept(self, row: int, candidate: str) -> None:
        """Keep a candidate that is new, where the text still lacks one."""
        candidate = candidate.lstrip("\ufeff")  # which readers drop where a line begins with it
        key = comparison_key(candidate)
        if self.missing(row) and candidate.strip() and key not in self.taken:
            self.taken.add(key)
            self.of[row].append(candidate)


class Proposer:
    """Makes candidates of texts: at once with dataaug's operators, or as places that the masked LM fills in later, in batches."""

    def __init__(self, texts: list[str], names: tuple[str, ...], operators: dict, source: Source, batch_size: int) -> None:
        self.texts, self.names, self.operators, self.source, self.batch_size = texts, names, operators, source, batch_size
        self.turns = itertools.cycle(names)
        self.places: dict[tuple[int, str], list[Place]] = {}  # (row, name) -> not filled in yet

    def propose(self, row: int, count: int) -> tuple[list[str], list[Place]]:
        """Ask the strategies whose turn it is for `count` candidates of a text.

        Returns (candidates, places for `fill`); both are empty where a text has nothing that could change.
        """
        candidates: list[str] = []
        places: list[Place] = []
        for name, share in Counter(itertools.islice(self.turns, count)).items():
            operator = self.operators[name]
            if isinstance(self.source, MaskedLM) and name in ("substitute", "insert"):
                if (row, name) not in self.places:
                    self.places[row, name] = self.source.find_places(operator, self.texts[row], name)
                left = self.places[row, name]
                places += [left.pop() for _ in range(min(share, len(left)))]
            else:
                operator.create_n = share
                candidates += operator.augment(self.texts[row])[0]
        return candidates, places

    def fill(self, places: list[Place]) -> list[str]:
        """Fill words of the masked LM into places: the texts that result."""
        return self.source.fill(places, self.batch_size) if isinstance(self.source, MaskedLM) else []

    def forget_places(self) -> None:
        """Forget the places of the texts so far, which are done."""
        self.places = {}


def run_round(rows: Iterable[int], proposer: Proposer, collected: Variants) -> list[int]:
    """Try once to give each text the variants that it lacks. Returns the rows that lack some and may get them in another try."""
    waiting, hopeful = [], []  # (row, place) for the masked LM; rows that had something to change
    for row in rows:
        candidates, places = proposer.propose(row, collected.missing(row))
        for candidate in candidates:
            collected.accept(row, candidate)
        waiting += [(row, place) for place in places]
        if candidates or places or len(proposer.names) > 1:  # of several strategies another one may still have something
            hopeful.append(row)
    filled = proposer.fill([place for _, place in waiting])
    for (row, _), candidate in zip(waiting, filled):
        collected.accept(row, candidate)
    return [row for row in hopeful if collected.missing(row)]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the two global generators that dataaug draws from, and put their states back afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def make_operators(dictionary: dict[str, list[str]], aug_percent: float) -> dict:
    """Make one dataaug augmenter per strategy. dictionary: {word: [word, ...]} for substitute and insert."""
    import jieba

    from textcls.models.paddle_setup import paddle  # noqa: F401  before paddlenlp

    from paddlenlp.dataaug import WordDelete, WordInsert, WordSubstitute, WordSwap
    from paddlenlp.dataaug.base_augment import BaseAugment

    local = {"stop_words": os.devnull, "vocab": json.dumps({"token_to_idx": {"[UNK]": 0}, "unk_token": "[UNK]"})}
    BaseAugment._load_file = lambda self, mode: local[mode]
    jieba.setLogLevel("WARNING")
    jieba.initialize()
    segmenter = jieba.Tokenizer()  # one of our own, since words are added
    segmenter.FREQ, segmenter.total, segmenter.initialized = dict(jieba.dt.FREQ), jieba.dt.total, True
    for word in dictionary:
        if len(word) > 1 and not segmenter.FREQ.get(word):
            segmenter.add_word(word)  # or it would never be found in a text
    questions = [word for word in QUESTION_WORDS if len(word) > 1]
    for word in questions:
        segmenter.add_word(word)  # jieba alone would cut many of them in two, and half a question asks something else
    fixed = PARTICLES | QUESTION_WORDS | {word for word in dictionary if any(question in word for question in questions)}
    # no type of dictionary: `dict` is set here, already read and checked
    operators = {"substitute": WordSubstitute(()), "insert": WordInsert(()), "delete": WordDelete(), "swap": WordSwap()}
    for name, operator in operators.items():
        operator.dict = dictionary
        operator.aug_percent = aug_percent
        operator.tokenizer.tokenizer = segmenter
        operator.stop_words = StopWords(PARTICLES if dictionary and name == "substitute" else fixed)
        if name != "delete":
            operator._get_aug_n = at_least_one(operator._get_aug_n)
    return operators


def at_least_one(get_aug_n: Callable[[int, int], int]) -> Callable[[int, int], int]:
    """Change dataaug's number of words to change: one where it says none and there is a word."""
    return lambda size, words: min(words, max(1, get_aug_n(size, words)))


# ---------------------------------------------------------------- where new words come from


def load_source(strategy: str, aug_type: str, custom_file_path: Optional[str] = None,
                mlm_model: Optional[str] = None) -> Source:
    """Load what `augment` takes new words from: a dictionary {word: [word, ...]}, a MaskedLM, or {} where none is needed.

    mlm_model: folder of a masked LM (config.json, vocab.txt, model_state.pdparams or model.safetensors) or a built-in name.
    UserError where it cannot be had, or where the options do not fit together.
    """
    for value, option, fitting in ((custom_file_path, "--custom_file_path", "custom"), (mlm_model, "--mlm_model", "mlm")):
        if value and (aug_type != fitting or strategy in ("delete", "swap")):
            raise UserError(f"{option} {value}: is not used by --aug_strategy {strategy} --aug_type {aug_type}, expected "
                            f"--aug_type {fitting} and a strategy that takes new words (substitute, insert or mix)")
    if strategy in ("delete", "swap"):
        return {}
    if aug_type == "mlm":
        return MaskedLM(mlm_model or "ernie-1.0-large-zh-cw")
    if aug_type != "custom":
        return read_downloaded(find_dictionary(aug_type))
    if not custom_file_path:
        raise UserError(f"--aug_type custom: no dictionary given, expected --custom_file_path, such as {shipped('synonym')}")
    return read_dictionary(custom_file_path)


def shipped(aug_type: str) -> str:
    """Return the path, from the current folder, of the dictionary that comes with the project."""
    return os.path.relpath(Path(__file__).resolve().parents[2] / "data" / SHIPPED[aug_type])


def find_dictionary(aug_type: str) -> str:
    """Find PaddleNLP's own dictionary for "synonym" or "homonym", downloaded if need be: its path. UserError if that fails."""
    from textcls.models.paddle_setup import paddle  # noqa: F401  before paddlenlp

    from paddlenlp.utils.env import DATA_HOME

    name, digest, url = make_operators({}, 0.1)["delete"]._DATA[f"word_{aug_type}"]
    folder = os.path.join(DATA_HOME, "WordSubstitute")
    for path in (os.path.join(folder, name), os.path.join(DATA_HOME, "WordInsert", name)):  # where dataaug keeps it
        with contextlib.suppress(OSError):
            with open(path, "rb") as file:
                if hashlib.md5(file.read()).hexdigest() == digest:
                    return path
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read()
        if hashlib.md5(content).hexdigest() != digest:
            raise ValueError("what came is not the expected file")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"--aug_type {aug_type}: PaddleNLP's dictionary could not be downloaded from {url} "
            f"({getattr(error, 'reason', error)})\nWithout a connection, use the small dictionary that comes with this project, "
            f"or one of your own:\n    --aug_type custom --custom_file_path {shipped(aug_type)}\n"
            f"or copy {name} from a machine that has a connection to {folder}") from None
    with complete_file(os.path.join(folder, name), "wb") as file:
        file.write(content)
    return os.path.join(folder, name)


def read_downloaded(path: str) -> dict[str, list[str]]:
    """Read PaddleNLP's dictionary without what is no use, and without QUESTION_WORDS: {word: [word, ...]}."""
    with open(path, encoding="utf-8") as file:
        entries = json.load(file)
    entries = {word: [other for other in others if isinstance(other, str) and other.strip() and other != word]
               for word, others in entries.items() if isinstance(others, list) and word not in QUESTION_WORDS}
    return {word: others for word, others in entries.items() if others}


def read_dictionary(path: str) -> dict[str, list[str]]:
    """Read a JSON dictionary {word: [word, ...]}; the words may not be empty nor hold tabs or line breaks.

    Returns it without entries that name the word itself. UserError naming all lines that are wrong.
    """
    problems = Problems()
    pairs, content = load_json(path, "a JSON file {word: [word, ...]} in UTF-8", object_pairs_hook=lambda pairs: pairs)
    if not content.lstrip().startswith("{") or not pairs:
        problems.add(path, 1, "not an object with words", "{word: [word, ...]}")
        pairs = []
    dictionary: dict[str, list[str]] = {}
    for word, others in pairs:
        wrong = f"{word!r} a second time" if word in dictionary else entry_problem(word, others)
        if wrong:
            spelled = re.search(re.escape(json.dumps(word, ensure_ascii=False)) + r"\s*:", content)
            problems.add(path, content.count("\n", 0, spelled.start()) + 1 if spelled else None, wrong,
                         "each word once, with a list of one or more words")
        dictionary[word] = others
    problems.report()
    dictionary = {word: [other for other in dict.fromkeys(others) if other != word] for word, others in dictionary.items()}
    return {word: others for word, others in dictionary.items() if others}


def entry_problem(word: str, others: object) -> Optional[str]:
    """Say what is wrong with an entry of a dictionary; None where it is sound."""
    if not is_word(word):
        return "an empty word, or one with a tab or line break"
    if not isinstance(others, list):
        return f"{word!r} has {json.dumps(others, ensure_ascii=False)[:40]}"
    if not others:
        return f"{word!r} has an empty list"
    bad = [other for other in others if not is_word(other)]
    return f"{word!r} has {json.dumps(bad[0], ensure_ascii=False)[:40]} in its list" if bad else None


def is_word(value: object) -> bool:
    """Tell whether a dictionary's value may be a word."""
    return isinstance(value, str) and LINE.problem(value) is None


class MaskedLM:
    """A masked language model that fills in words; an ERNIE or BERT with a vocabulary of Chinese characters.

    dataaug 2.8.1 asks the model for one text at a time, and takes any token for an answer: pieces of words, punctuation, [UNK].
    Here many masked texts go through it in batches of like length, only the masked positions go through its head, and only
    single Chinese characters that are no particles count as answers. As in dataaug one word changes, and each character of
    it is predicted on its own; words that are not wholly Chinese stay.
    """

    def __init__(self, name_or_path: str) -> None:
        """name_or_path: as mlm_model of `load_source`; runs on the device that was selected. UserError if it cannot be had."""
        from textcls.models.paddle_setup import paddle

        try:
            self.model = load_model(name_or_path, head="MaskedLM")
            self.tokenizer = load_tokenizer(name_or_path)
            check_vocabulary(self.tokenizer, self.model, name_or_path)
        except UserError as error:
            message = str(error).replace("--model_name_or_path", "--mlm_model")
            if not os.path.isdir(name_or_path):
                message += f"\nOr do without a model: --aug_type custom --custom_file_path {shipped('synonym')}"
            raise UserError(message) from None
        vocabulary = self.tokenizer.get_vocab()
        answers = [index for token, index in vocabulary.items()
                   if len(token) == 1 and CHINESE.fullmatch(token) and token not in PARTICLES]
        if not answers or self.tokenizer.mask_token not in vocabulary or not hasattr(self.model, "cls"):
            raise UserError(f"{name_or_path}: cannot fill in Chinese words, expected a BERT or ERNIE whose vocabulary has "
                            "Chinese characters and [MASK]")
        penalties = np.full(self.model.config.vocab_size, -1e9, dtype=np.float32)
        penalties[answers] = 0
        self.impossible = paddle.to_tensor(penalties)
        self.max_length = self.model.config.max_position_embeddings

    def find_places(self, operator: "BaseAugment", text: str, name: str) -> list[Place]:
        """Find the places of a text where `name` ("substitute" or "insert") may put a word, in random order.

        operator: gives dataaug's words and choice of them.
        """
        words = operator.tokenizer.cut(text.strip())
        places: list[Place] = []
        for index in operator._skip_stop_word_tokens(words):
            if CHINESE.fullmatch(words[index]):
                before, after, word = "".join(words[:index]), "".join(words[index + 1:]), words[index]
                places += ([(before, len(word), after)] if name == "substitute" else
                           [(before, len(word), word + after), (before + word, len(word), after)])
        random.shuffle(places)
        return places

    def fill(self, places: list[Place], batch_size: int) -> list[str]:
        """Fill the most probable characters into places, of `find_places`: the texts that result, "" for one that is too long.

        The answers do not depend on batch_size.
        """
        mask, mask_id = self.tokenizer.mask_token, self.tokenizer.mask_token_id
        rows = [np.array(self.tokenizer(before + mask * count + after)["input_ids"]) for before, count, after in places]
        usable = np.array([index for index, row in enumerate(rows)  # with no [MASK] of the text's own
                           if len(row) <= self.max_length and (row == mask_id).sum() == places[index][1]], dtype=np.int64)
        texts = [""] * len(places)
        with progress_bar(len(usable), "Filling in words") as progress:
            for batch in sorted_batches([len(rows[index]) for index in usable], batch_size):
                characters = iter(self.predict([rows[index] for index in usable[batch]]))
                for index in usable[batch]:
                    before, count, after = places[index]
                    texts[index] = before + "".join(itertools.islice(characters, count)) + after
                progress.update(len(batch))
        return texts

    def predict(self, rows: list[np.ndarray]) -> list[str]:
        """Predict the characters of all [MASK]s of a batch, row by row. rows: int64 arrays of token ids."""
        from textcls.models.paddle_setup import paddle

        input_ids = pad_batch(rows, self.tokenizer.pad_token_id)
        masked = paddle.to_tensor(np.flatnonzero(input_ids == self.tokenizer.mask_token_id))
        with paddle.no_grad():
            hidden = self.model.base_model(paddle.to_tensor(input_ids))[0]
            logits = self.model.cls(hidden, masked_positions=masked) + self.impossible
        return self.tokenizer.convert_ids_to_tokens(logits.argmax(axis=-1).tolist())
