"""Read and check what the config.json of a model folder says: sizes, labels, lengths, prompt, options of a sentence encoder."""

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from textcls.common.confidence import read_temperature
from textcls.common.errors import UserError
from textcls.common.log import get_logger
from textcls.common.options import POOLINGS
from textcls.common.outputs import complete_file
from textcls.data.files import compare_labels, read_json, read_labels
from textcls.data.prompts import Prompt
from textcls.data.tokens import DEFAULT_LENGTH, SHORTEST_LENGTH
from textcls.models.families import count_positions
from textcls.models.weights import HUGGING_FACE_WEIGHTS, WEIGHTS

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedModel

# of a config.json: the largest whole numbers, and numbers from 0 to 1; beyond them a model cannot be built, or takes all memory
MOST = {"vocab_size": 10**7, "hidden_size": 2**16, "num_hidden_layers": 1000, "num_attention_heads": 1000,
        "intermediate_size": 2**20, "max_position_embeddings": 2**20}
SHARES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "layer_norm_eps", "initializer_range")
MOST_PARAMETERS = 2 * 10**9  # the largest model of the families, ERNIE-M large, has 0.6 billion


class SentenceOptions(NamedTuple):
    """How an encoder makes one vector of a text: sentence_encoder in its config.json."""

    pooling: str  # "cls": the state of the first token; "mean": of all tokens; "pooler": of the first, through the model's pooler
    output_emb_size: int  # what a linear layer projects it to; 0: it stays as it is
    matryoshka_dims: list[int]  # so many first entries of a vector are trained to be a vector, too
    activation: str = ""  # of what the linear layer gives: "tanh"; "": none

    def entries(self) -> dict[str, Any]:
        """The options as a config.json holds them, where older ones have no activation."""
        return {name: value for name, value in self._asdict().items() if name != "activation" or value}


def config_path(folder: str) -> Optional[str]:
    """Find the folder's config.json, or the older model_config.json; None without either."""
    for name in ("config.json", "model_config.json"):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    return None


def read_config(folder: str) -> dict[str, Any]:
    """Read and check the config.json of a model folder. UserError, also where it is of a pruned model."""
    path = config_path(folder)
    if path is None:
        raise UserError(f"{folder}: no config.json in this folder, expected a model folder (config.json, vocab.txt "
                        f"and, for trained models, {WEIGHTS} or {HUGGING_FACE_WEIGHTS})")
    config = read_json(path)
    if "width_mult" in config:
        raise UserError(f"{folder}: a pruned model, which can only be deployed, expected the whole one it was made from")
    check_numbers(config, folder)
    return config


def check_numbers(config: dict[str, Any], folder: str) -> None:
    """Raise UserError where a number in the config.json of a model folder cannot be. config: its content."""
    for name, most in MOST.items():
        if type(config.get(name, 1)) is not int or not 1 <= config.get(name, 1) <= most:
            raise UserError(f"{folder}: {name} in its config.json is {config[name]!r}, expected a whole number, 1 to {most}")
    for name in SHARES:
        value = config.get(name)
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise UserError(f"{folder}: {name} in its config.json is {value!r}, expected a number, 0 to 1")
    pad_id = config.get("pad_token_id")
    if pad_id is not None and not (type(pad_id) is int and 0 <= pad_id < config.get("vocab_size", MOST["vocab_size"])):
        raise UserError(f"{folder}: pad_token_id in its config.json is {pad_id!r}, expected a token's number")
    size, inner = config.get("hidden_size", 1), config.get("intermediate_size", 1)
    count = config.get("vocab_size", 1) * size + config.get("num_hidden_layers", 1) * (4 * size + 2 * inner) * size
    if count > MOST_PARAMETERS:
        raise UserError(f"{folder}: by its config.json the model has {count:,} parameters, expected {MOST_PARAMETERS:,} at most")


def read_checkpoint_config(folder: str, maker: str) -> dict[str, Any]:
    """Read the config.json of a trained checkpoint. maker: the script whose checkpoint it has to be. UserError."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder, expected a checkpoint made by {maker}")
    path = config_path(folder)
    if path is None or not os.path.isfile(os.path.join(folder, WEIGHTS)):
        missing = WEIGHTS if path else "config.json"
        raise UserError(f"{folder}: {missing} is missing, expected a complete checkpoint made by {maker}")
    return read_json(path)


def read_sentence_options(config: dict[str, Any], folder: str) -> Optional[SentenceOptions]:
    """Take the options of an encoder from the content of its folder's config.json; None for any other model. UserError."""
    if config.get("sentence_encoder") is None:
        return None
    try:
        options = SentenceOptions(**config["sentence_encoder"])
        sizes = [options.output_emb_size, config["max_seq_length"], *options.matryoshka_dims]
        known = options.pooling in POOLINGS and options.activation in ("", "tanh")
        if not known or not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError("its entries are out of range")
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: sentence_encoder in its config.json is damaged ({error}), expected what "
                        "retrieval_based/train.py wrote") from None
    return options


def read_prompt(config: dict[str, Any], folder: str) -> Optional[Prompt]:
    """Take the prompt from the content of a folder's config.json; None for a model without one. UserError."""
    if config.get("prompt") is None:
        return None
    try:
        prompt = Prompt(**config["prompt"])
        ids = [*prompt.before, *prompt.after]
        if min(*ids, prompt.num_soft, prompt.prefix_length) < 0 or max(ids) >= config["vocab_size"] + prompt.num_soft:
            raise ValueError("its tokens are not the model's")
        if not 1 <= prompt.num_masks == ids.count(prompt.mask_id):
            raise ValueError("its numbers do not fit together")
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: prompt in its config.json is damaged ({error}), expected what few-shot/train.py wrote"
                        ) from None
    return prompt


def read_calibration(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """Take what `save_calibration` wrote from the content of a folder's config.json; {} where it is not there. UserError.

    It is an entry of its own, since PaddleNLP's config has a `temperature`, that of generating texts.
    """
    entry = config.get("calibration")
    if entry is None:
        return {}
    path = os.path.join(folder, "config.json")
    if not isinstance(entry, dict) or "temperature" not in entry:
        raise UserError(f"{path}: calibration is {str(entry)[:80]}, expected what train.py wrote")
    return {**entry, "temperature": read_temperature(entry, f"{path}: calibration")}


def change_config(folder: str, **entries: Any) -> None:
    """Set entries of the config.json in a model folder; those that are None are taken out of it."""
    path = os.path.join(folder, "config.json")
    config = {**read_json(path), **entries}
    with complete_file(path) as file:
        json.dump({name: value for name, value in config.items() if name not in entries or value is not None}, file, indent=2,
                  ensure_ascii=False, sort_keys=True)
        file.write("\n")


def choose_length(max_seq_length: Optional[int], config: dict[str, Any], folder: str) -> int:
    """Decide the tokens per text: as the option says, or where it is None as the config of a trained model does, else
    DEFAULT_LENGTH.

    config: the content of the config.json in folder. Raises UserError.
    """
    trained_length = config.get("max_seq_length", DEFAULT_LENGTH)
    if type(trained_length) is not int:
        raise UserError(f"{folder}: max_seq_length in its config.json is {trained_length!r}, expected a number of tokens")
    return trained_length if max_seq_length is None else max_seq_length


def named_labels(config: dict[str, Any], folder: str) -> list[str]:
    """Return the labels in the content of a folder's config.json, position = class id; [] where it names none. UserError."""
    if not isinstance(config.get("id2label"), dict):
        return []
    if not all(str(index).isdecimal() for index in config["id2label"]):
        raise UserError(f"{folder}: the keys of id2label in its config.json are not class ids, expected 0, 1, 2, ...")
    id2label = {int(index): label for index, label in config["id2label"].items()}
    if not all(isinstance(id2label.get(index), str) for index in range(len(id2label))):
        raise UserError(f"{folder}: id2label in its config.json does not name every class, expected {{\"0\": label, ...}}")
    return [id2label[index] for index in range(len(id2label))]


def read_checkpoint_labels(folder: str, config: dict[str, Any], label_path: Optional[str]) -> list[str]:
    """Read the labels of a checkpoint, position = class id: those of its config.json, else of a label.txt.

    config: the content of the config.json; label_path: a label.txt that has to agree, or None. Raises UserError.
    """
    paths = [path for path in (os.path.join(folder, "label.txt"), label_path) if path and os.path.isfile(path)]
    labels = named_labels(config, folder)
    if not labels and paths:
        labels = read_labels(paths[0])
        get_logger().warning(f"{folder}: its config names no labels; taking them from label.txt.")
    if not labels:
        raise UserError(f"{folder}: neither id2label in its config.json nor a label.txt, expected one of them")
    for path in paths:
        compare_labels(labels, read_labels(path), path, folder)
    return labels


def shortest_length(model: "PretrainedModel") -> int:
    """The least max_seq_length of a model: one token of the text must fit between the others."""
    prompt = getattr(model.config, "prompt", None)
    return SHORTEST_LENGTH if prompt is None else len(prompt["before"]) + len(prompt["after"]) + 1


def check_length(max_seq_length: int, model: "PretrainedModel") -> int:
    """Return max_seq_length if the model has that many positions; UserError otherwise."""
    least, most = shortest_length(model), count_positions(model)
    if not least <= max_seq_length <= most:
        raise UserError(f"--max_seq_length {max_seq_length}: out of range, expected {least} to {most} for this model")
    return max_seq_length
