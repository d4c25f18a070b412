"""Reads an exported folder: all that a deployment needs to know of a model. Needs neither Paddle nor ONNX Runtime.

An exported classifier is any graph (input_ids[, token_type_ids]: int64 [texts, length]) -> logits [texts, classes], with the
tokenizer.json, label.txt and deploy.json that belong to it; where there is a known.npz, it also gives features [texts, size].
Nothing that serves it asks what kind of model it is. An exported sentence encoder gives unit vectors [texts, size]
in the place of logits, and has no labels.
"""

import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from textcls.common.confidence import check_threshold_of_model, read_temperature, read_threshold
from textcls.common.digests import file_id
from textcls.common.errors import UserError
from textcls.common.known import Centres, read_centres
from textcls.common.long_texts import CUT, LongText
from textcls.data.encoders import Encoder, read_long_text, rust_encoder
from textcls.data.files import read_json, read_labels
from textcls.data.tokens import SHORTEST_LENGTH

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLASS_LOGITS = "class_logits"  # what deploy.json says of a classifier's output; an export without this entry is one, too
LOGITS, FEATURES = "logits", "features"  # what its outputs are called, the second only with a known.npz
EMBEDDING = "embedding"  # and of a sentence encoder's
KINDS = {CLASS_LOGITS: f"a classifier, {CLASS_LOGITS!r}, as export_model.py and prune.py write them",
         EMBEDDING: f"a sentence encoder, {EMBEDDING!r}, as retrieval_based/export_model.py writes them"}
GRAPH_ENDINGS = (".pdmodel", ".json")  # of Paddle 2 and 3
# texts of several lengths and kinds, on which forms of a model are compared; it needs no data folder
PROBES = ["头疼怎么办", "治疗方案？", "a", "BERT and ERNIE, 2024 😀", "您好，请问一岁三个月的孩子可以吃这种药吗？" * 8]


class Export(NamedTuple):
    """An exported model as `read_export` returns it."""

    model_path: str  # Paddle's graph, .pdmodel or .json; "" where the ONNX model was asked for
    params_path: str  # its weights, .pdiparams
    onnx_path: str  # "" where Paddle's graph was asked for
    tokenizer_path: str
    input_names: list[str]  # the graph's inputs, int64 [texts, length] each
    labels: list[str]  # position = class id; empty for a sentence encoder
    max_seq_length: int  # of the training: tokens, special tokens included
    max_positions: Optional[int]  # tokens that the model can take; None: the export does not say so
    pad_id: int
    min_seq_length: int  # fewer would leave no room for a text
    output_size: int  # number of classes, or length of a vector
    encoder_id: str  # of a sentence encoder: that of the checkpoint it was made from; else ""
    temperature: float  # what logits are divided by before the softmax
    threshold: Optional[dict[str, Any]]  # for --threshold auto, with the precision it was found for and the model it belongs to
    long_text: LongText = CUT  # as in training
    centres: Optional[Centres] = None  # of a classifier that gives features, too: by which unknown texts are told


def graph_file(prefix: str) -> str:
    """Return the path of Paddle's graph: prefix.pdmodel, or prefix.json where only Paddle 3 has written it."""
    return next((prefix + ending for ending in GRAPH_ENDINGS if os.path.isfile(prefix + ending)), prefix + GRAPH_ENDINGS[0])


def read_export(path: Union[str, "os.PathLike[str]"], with_onnx: bool = True,
                output: Optional[str] = CLASS_LOGITS) -> Export:
    """Find out what an exported folder holds. path: the folder, or folder/float32, folder/pruned_model.

    with_onnx: the ONNX model is needed; otherwise Paddle's graph is. output: CLASS_LOGITS or EMBEDDING; None: either of them.
    Raises UserError, also where the model gives another one.
    """
    path = os.fspath(path)
    folder, prefix = (path, "") if os.path.isdir(path) else os.path.split(path)
    folder = folder or "."
    makers = "retrieval_based/export_model.py"
    if output != EMBEDDING:
        makers = f"export_model.py {'--onnx ' if with_onnx else ''}or prune.py"
    deploy_path = os.path.join(folder, "deploy.json")
    if not os.path.isfile(deploy_path):
        if prefix or not os.path.isdir(folder):
            raise UserError(f"{path}: no such folder or model, expected what {makers} wrote")
        raise UserError(f"{folder}: deploy.json is missing, expected a folder that {makers} wrote")
    deploy = read_json(deploy_path)
    check_names(deploy, deploy_path)
    name = re.sub(r"\.(pdmodel|json|onnx)$", "", deploy.get("model_file", deploy.get("onnx_file", "")))
    if prefix and prefix != name:
        raise UserError(f"{path}: no such model, expected the exported folder, or the prefix of its model, "
                        f"{os.path.join(os.path.dirname(path), name)}")
    if output is None:
        output = EMBEDDING if deploy.get("output") == EMBEDDING else CLASS_LOGITS
    is_classifier = output == CLASS_LOGITS
    check_entries(deploy, deploy_path, output)
    tokenizer_path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(tokenizer_path):
        raise UserError(f"{folder}: tokenizer.json is missing, expected the export of an ERNIE or BERT; an ERNIE-M has no such "
                        "file, and only the commands that take its checkpoint, such as predict.py, can label texts with it")
    onnx_path = model_path = params_path = ""
    if with_onnx:
        onnx_path = find_onnx_model(folder, name, deploy)
    else:
        model_path, params_path = find_graph(folder, deploy, makers)
    labels = read_labels(os.path.join(folder, "label.txt")) if is_classifier else []
    if is_classifier and len(labels) != deploy["num_labels"]:
        raise UserError(f"{os.path.join(folder, 'label.txt')}: {len(labels)} labels, expected the {deploy['num_labels']} that "
                        "deploy.json says")
    gives_features = with_onnx or deploy.get("output_names") == [LOGITS, FEATURES]  # of earlier exports the ONNX model alone does
    centres = read_centres(folder, deploy.get("known")) if is_classifier and gives_features else None
    return Export(model_path, params_path, onnx_path, tokenizer_path, deploy["input_names"], labels, deploy["max_seq_length"],
                  deploy.get("max_positions"), deploy["pad_token_id"], deploy.get("min_seq_length", SHORTEST_LENGTH),
                  deploy["num_labels" if is_classifier else "embedding_size"], deploy.get("encoder_id", ""),
                  read_temperature(deploy, deploy_path), read_threshold(deploy, deploy_path),
                  read_long_text(deploy, deploy_path), centres)


def check_names(deploy: dict, path: str) -> None:
    """Raise UserError where a deploy.json names a file that is not in its own folder: the folder may come from a stranger."""
    for entry in ("model_file", "params_file", "onnx_file"):
        name = deploy.get(entry, "file")
        if not isinstance(name, str) or not name.strip(".") or re.search(r"[/\\:\0]", name):
            raise UserError(f"{path}: {entry} is {name!r}, expected the name of a file in the same folder")


def check_entries(deploy: dict, path: str, output: str) -> None:
    """Raise UserError where the content of a deploy.json is not that of a model with this output."""
    found = deploy.get("output", CLASS_LOGITS)
    if found != output:
        hint = "; with a sentence encoder texts are labelled by retrieval_based/predict.py" if found == EMBEDDING else ""
        raise UserError(f"{path}: the output of this model is {found!r}, expected {KINDS[output]}{hint}")
    if output == EMBEDDING and not re.fullmatch("[0-9a-f]{16}", str(deploy.get("encoder_id"))):
        raise UserError(f"{path}: encoder_id is {deploy.get('encoder_id')!r}, expected the 16 digits that "
                        "retrieval_based/export_model.py wrote")
    optional = [name for name in ("min_seq_length", "max_positions") if name in deploy]
    names = ["max_seq_length", "pad_token_id", "num_labels" if output == CLASS_LOGITS else "embedding_size", *optional]
    for name in names:
        if type(deploy.get(name)) is not int:
            raise UserError(f"{path}: {name} is {deploy.get(name)!r}, expected a number")
    least = max(SHORTEST_LENGTH, deploy.get("min_seq_length", 0))
    if deploy["max_seq_length"] < least or deploy["pad_token_id"] < 0:
        raise UserError(f"{path}: max_seq_length is {deploy['max_seq_length']} and pad_token_id {deploy['pad_token_id']}, "
                        f"expected at least {least} and 0")
    if deploy["max_seq_length"] > deploy.get("max_positions", deploy["max_seq_length"]):
        raise UserError(f"{path}: max_seq_length is {deploy['max_seq_length']}, expected at most max_positions, "
                        f"{deploy['max_positions']}")
    if deploy.get("input_names") not in (["input_ids"], ["input_ids", "token_type_ids"]):
        raise UserError(f"{path}: input_names is {deploy.get('input_names')!r}, expected input_ids and token_type_ids")


def find_onnx_model(folder: str, name: str, deploy: dict) -> str:
    """Return the path of the ONNX model. name: of Paddle's graph, without its ending. UserError where there is none."""
    if name.endswith(("int8", "quant_emb")):
        raise UserError(f"{folder}: a graph that Paddle has quantized, which ONNX Runtime cannot run, expected export/ or "
                        "width_mult_X/ with --use_quantize")
    path = os.path.join(folder, deploy.get("onnx_file", ""))
    if not os.path.isfile(path):
        commands = {"float32": f"python export_model.py --params_path ./checkpoint/ --output_path {folder} --onnx",
                    "encoder": f"python retrieval_based/export_model.py --params_path ./checkpoint/ --output_path {folder}",
                    "pruned_model": "that of the pruning (python prune.py ...) with --onnx",
                    "model": "that of the training (python few-shot/train.py ...) with --do_export"}
        command = commands.get(name, "that of its export with --onnx")
        raise UserError(f"{folder}: no ONNX model here; this command makes it: {command}")
    return path


def find_graph(folder: str, deploy: dict, makers: str) -> tuple[str, str]:
    """Return the paths of Paddle's graph and of its weights. makers: who writes them. UserError where one is missing."""
    paths = []
    for entry in ("model_file", "params_file"):
        if entry not in deploy:
            raise UserError(f"{os.path.join(folder, 'deploy.json')}: {entry} is missing, expected what {makers} wrote")
        paths.append(os.path.join(folder, deploy[entry]))
        if not os.path.isfile(paths[-1]):
            raise UserError(f"{paths[-1]}: file not found, expected the graph that {makers} wrote")
    return paths[0], paths[1]


def check_length(max_seq_length: int, export: Export) -> None:
    """Raise UserError where an Export cannot take texts of so many tokens, as far as its deploy.json says."""
    if max_seq_length < export.min_seq_length:
        raise UserError(f"--max_seq_length {max_seq_length}: expected {export.min_seq_length} or more")
    if export.max_positions is None and max_seq_length > export.max_seq_length:
        raise UserError(f"--max_seq_length {max_seq_length}: this export does not say how many positions the model has, expected "
                        f"at most the {export.max_seq_length} of training, or a new export (deploy.json with max_positions)")
    if export.max_positions is not None and max_seq_length > export.max_positions:
        raise UserError(f"--max_seq_length {max_seq_length}: more than the model's positions, expected at most "
                        f"{export.max_positions}, or as in training")


def read_tokenizer(export: Export) -> "Tokenizer":
    """Open the tokenizer of an Export, which cuts nothing. UserError, also where its [PAD] is not that of deploy.json."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError("the package tokenizers is missing, expected an environment made as README.md says") from None
    try:
        tokenizer = Tokenizer.from_file(export.tokenizer_path)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{export.tokenizer_path}: cannot be read ({error}), expected the file that export_model.py wrote"
                        ) from None
    pad_id = tokenizer.token_to_id("[PAD]")
    if pad_id not in (None, export.pad_id):
        raise UserError(f"{export.tokenizer_path}: [PAD] has the id {pad_id}, expected that of deploy.json, {export.pad_id}")
    tokenizer.no_truncation()
    return tokenizer


def read_encoder(export: Export, max_seq_length: Optional[int] = None) -> Encoder:
    """Open what gives the token ids of texts. max_seq_length: tokens; None: as in training. UserError."""
    tokenizer = read_tokenizer(export)
    is_text = [number is not None for number in tokenizer.encode("a").sequence_ids]
    if True not in is_text:
        raise UserError(f"{export.tokenizer_path}: gives no token for a letter, expected the file that export_model.py wrote")
    num_before, num_after = is_text.index(True), is_text[::-1].index(True)
    return Encoder(rust_encoder(tokenizer), num_before, num_after, max_seq_length or export.max_seq_length, export.long_text)


def saved_threshold(export: Export, max_seq_length: Optional[int] = None) -> float:
    """Return the threshold that an Export holds. UserError where it holds none, or that of another model or length.

    max_seq_length: at which it will answer; None: as in training.
    """
    path = os.path.join(os.path.dirname(export.tokenizer_path), "deploy.json")
    entry, kind = export.threshold, "onnx" if export.onnx_path else "params"
    if entry is not None:
        weights = entry.get("weights")
        entry = {**entry, "weights": weights.get(kind) if isinstance(weights, dict) else None}
    own = file_id(export.onnx_path or export.params_path) if entry is not None else ""
    return check_threshold_of_model(entry, path, export.temperature, own, max_seq_length or export.max_seq_length)


def threshold_or_reason(export: Export) -> Union[float, str]:
    """Return the threshold that an Export holds, or for those who ask a server for it why there is none."""
    try:
        return saved_threshold(export)
    except UserError as error:
        return str(error).removeprefix("--")
