"""How a training reads long texts: its options, what they are saved as, and what the log says of texts that are too long."""

import os
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.common.log import get_logger
from textcls.common.long_texts import CUT, LongText
from textcls.data.encoders import Encoder, check_long_text, check_stride, read_long_text
from textcls.data.files import read_json
from textcls.data.tokens import TokenizedTexts, tokenize
from textcls.models.configs import config_path

if TYPE_CHECKING:
    from textcls.training.resume import TrainArguments

    from paddlenlp.transformers import PretrainedModel

VOTE_CHOICES = ("mean", "max")  # of the windows of a classifier
LEAST_SPECIAL = 2  # tokens of a window that are not of the text, such as [CLS] and [SEP]; a prompt has more
SMALL_WINDOW = 8  # tokens: windows of fewer say next to nothing
MUCH_LOST = 0.05  # of all tokens: more than that is worth a hint


def choose_long_text(args: "TrainArguments", config: dict[str, Any], folder: str) -> LongText:
    """Decide how long texts are read: as the options say, and where they say nothing as the config of a trained model does.

    config: the content of the config.json in folder. Raises UserError.
    """
    changes = given_long_text(args)
    entry = config.get("long_text")
    if isinstance(entry, dict) and entry.get("window_vote") == "unit_mean":  # of a sentence encoder
        entry = {**entry, "window_vote": "mean"}
    long_text = read_long_text({"long_text": entry}, os.path.join(folder, "config.json"))
    long_text = long_text._replace(mode=args.long_text or long_text.mode)
    for name in changes:
        mode = "head_tail" if name == "head_share" else "window"
        if long_text.mode != mode:
            raise UserError(f"--{name}: has no effect on texts that are read by --long_text {long_text.mode}, expected "
                            f"--long_text {mode}, or a run without it")
    return CUT if long_text.mode == "cut" else long_text._replace(**changes)


def check_long_text_options(args: "TrainArguments", max_seq_length: Optional[int], folder: str) -> None:
    """UserError where the options of long texts do not go with each other, or with the model in a folder: before it is loaded.

    max_seq_length: None: not known yet.
    """
    path = config_path(folder)
    long_text = choose_long_text(args, read_json(path) if path else {}, folder)
    if max_seq_length is not None:
        check_stride(long_text, max_seq_length, LEAST_SPECIAL)
        room = max_seq_length - LEAST_SPECIAL
        if long_text.mode == "window" and room < SMALL_WINDOW:
            get_logger().warning(f"--max_seq_length {max_seq_length}: windows of at most {room} tokens say next to nothing of a "
                                 "text, expected a larger one")


def given_long_text(args: "TrainArguments") -> dict[str, Any]:
    """Return the options of long texts that are given, without the mode: {name: value}. UserError where one is out of range."""
    changes = {name: getattr(args, name) for name in LongText._fields[1:] if getattr(args, name) is not None}
    check_long_text(LongText(args.long_text or "cut", **changes))
    return changes


def save_long_text(model: "PretrainedModel", long_text: LongText) -> None:
    """Let the config.json of a model say how long texts are read."""
    vars(model.config).pop("long_text", None)
    if long_text != CUT:
        model.config.long_text = long_text._asdict()


def tokenize_split(split: tuple[list[str], np.ndarray], encode: Encoder, name: str) -> TokenizedTexts:
    """Tokenize (texts, label ids), and log how long the texts are, and how many tokens of them are not read."""
    whole_lengths: list[int] = []
    tokens = tokenize(split[0], encode, split[1], f"Tokenizing {name}", whole_lengths)
    lengths, longest, mode = np.array(whole_lengths), encode.max_seq_length, encode.long_text.mode
    num_long = int((lengths > longest).sum())
    if not num_long:
        get_logger().info(f"The {len(lengths)} {name} texts have {lengths.mean():.0f} tokens on average, {lengths.max()} at most")
        return tokens
    room = longest - encode.num_before - encode.num_after
    read = np.minimum(lengths, np.diff(tokens.starts) * room)
    lost = 1 - read.sum() / lengths.sum()
    message = (f"{num_long} of {len(lengths)} {name} texts ({num_long / len(lengths) * 100:.1f} %) are longer than "
               f"max_seq_length {longest}: --long_text {mode} leaves {lost * 100:.1f} % of all tokens unread")
    if mode == "window":
        message += f", in {len(tokens) / tokens.num_texts:.1f} windows a text"
        message += "; a larger --max_windows or --max_seq_length reads more" if lost > MUCH_LOST else ""
    elif mode == "cut" and lost > MUCH_LOST:
        message += "; head_tail reads the end of a text, too, at the same cost"
    get_logger().info(message)
    return tokens
