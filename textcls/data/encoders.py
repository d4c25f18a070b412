"""From texts to the token ids that a model reads of them, long texts included. Needs no Paddle."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from textcls.common.errors import UserError
from textcls.common.long_texts import CUT, MODES, VOTES, LongText, default_stride, fit_windows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# texts and characters handed to the Rust tokenizer at once: bounds memory, keeps all cores busy
TOKENIZE_CHUNK, TOKENIZE_CHARACTERS = 8192, 1 << 20
MOST_WINDOWS = 1000
EncodeWhole = Callable[[list[str]], Sequence[Sequence[int]]]  # texts -> their token ids, special tokens included, nothing cut


class Encoder:
    """Turns texts into the token ids that a model reads of them.

    encode_whole: as of EncodeWhole. num_before, num_after: special tokens around a text, a prompt's included. max_seq_length:
    tokens of a window, special tokens included. UserError where long_text does not go with it.
    """

    def __init__(self, encode_whole: EncodeWhole, num_before: int, num_after: int, max_seq_length: int,
                 long_text: LongText = CUT):
        check_stride(long_text, max_seq_length, num_before + num_after)
        self.encode_whole, self.num_before, self.num_after = encode_whole, num_before, num_after
        self.max_seq_length, self.long_text = max_seq_length, long_text

    def __call__(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """Return the windows of each text, each a list of ids."""
        return [self.fit(whole) for part in split_texts(texts) for whole in self.encode_whole(part)]

    def fit(self, whole: Sequence[int]) -> list[list[int]]:
        """Return the windows of a text, each a list of ids. whole: of the whole text, of `encode_whole`."""
        return fit_windows(whole, self.num_before, self.num_after, self.max_seq_length, self.long_text)


def rust_encoder(tokenizer: "Tokenizer") -> EncodeWhole:
    """Return what tokenizes by a Rust tokenizer that cuts nothing."""
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


def split_texts(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield texts in lists of at most TOKENIZE_CHUNK texts and, but for a single text, TOKENIZE_CHARACTERS characters."""
    part: list[str] = []
    size = 0
    for text in texts:
        if part and (len(part) == TOKENIZE_CHUNK or size + len(text) > TOKENIZE_CHARACTERS):
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield part


def read_long_text(config: dict[str, Any], path: str) -> LongText:
    """Take how long texts are read from the content of a config.json or deploy.json. path: of it. UserError.

    Only a sentence encoder may have the vote unit_mean: those have an entry sentence_encoder, or embedding_size.
    """
    entry = config.get("long_text")
    if entry is None:
        return CUT
    try:
        if not isinstance(entry, dict) or not entry.keys() <= set(LongText._fields):
            raise UserError(f"no object of {', '.join(LongText._fields)}")
        long_text = LongText(**entry)
        check_long_text(long_text)
        if long_text.window_vote == "unit_mean" and not any(config.get(name) for name in ("sentence_encoder", "embedding_size")):
            raise UserError("window_vote unit_mean, which is for vectors")
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: long_text is damaged ({error}), expected what the training wrote") from None
    return long_text


def check_stride(long_text: LongText, max_seq_length: int, num_special: int) -> None:
    """UserError where windows would leave out tokens between them. num_special: tokens of a window that are not of the text."""
    room, stride = max_seq_length - num_special, long_text.window_stride
    if long_text.mode == "window" and stride is not None and stride > room:
        raise UserError(f"--max_seq_length {max_seq_length}: its windows of {room} tokens of a text would leave out some between "
                        f"them, since window_stride is {stride}; expected {stride + num_special} or more, or in training "
                        f"--window_stride {room} or less (the default: {default_stride(room)})")


def check_long_text(long_text: LongText) -> None:
    """Raise UserError where an option of long texts is out of range."""
    mode, share, stride, count, vote = long_text
    if mode not in MODES:
        raise UserError(f"--long_text {mode}: unknown, expected one of {', '.join(MODES)}")
    if vote not in VOTES:
        raise UserError(f"--window_vote {vote}: unknown, expected one of {', '.join(VOTES)}")
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise UserError(f"--head_share {share}: out of range, expected 0 to 1")
    if stride is not None and (type(stride) is not int or stride < 1):
        raise UserError(f"--window_stride {stride}: out of range, expected 1 or more tokens")
    if type(count) is not int or not 1 <= count <= MOST_WINDOWS:
        raise UserError(f"--max_windows {count}: out of range, expected 1 to {MOST_WINDOWS}")
