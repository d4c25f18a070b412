"""Reads an exported folder: all that a deployment needs to know of a model. Needs neither Paddle nor ONNX Runtime."""

import os
from typing import NamedTuple, Optional

from utils import read_json, read_labels
from textcls.errors import UserError


class Export(NamedTuple):
    """An exported model as `read_export` returns it."""

    model_path: str  # Paddle's graph, .pdmodel
    params_path: str  # its weights, .pdiparams
    onnx_path: Optional[str]  # None where the export has no ONNX model
    tokenizer_path: str
    input_names: list  # of str: the graph's inputs, int64 [texts, length] each
    labels: list  # of str, position = class id
    max_seq_length: int  # tokens, special tokens included
    pad_id: int


def read_export(path, with_onnx=True):
    """Find out what an exported folder holds. path: the folder, or folder/float32, folder/pruned_model.

    with_onnx: the ONNX model is needed; otherwise Paddle's graph is. Raises UserError.
    """
    folder, prefix = (path, None) if os.path.isdir(path) else os.path.split(path)
    folder = folder or "."
    makers = f"export_model.py {'--onnx ' if with_onnx else ''}or prune.py"
    deploy_path = os.path.join(folder, "deploy.json")
    if not os.path.isfile(deploy_path):
        if prefix or not os.path.isdir(folder):
            raise UserError(f"{path}: no such folder or model, expected what {makers} wrote")
        raise UserError(f"{folder}: deploy.json is missing, expected a folder that {makers} wrote")
    deploy = read_json(deploy_path)
    model = str(deploy.get("model_file")).replace(".pdmodel", "")
    if prefix not in (None, "", model):
        raise UserError(f"{path}: no such model, expected {os.path.join(folder, model)} or {folder}")
    for name in ("max_seq_length", "pad_token_id", "num_labels"):
        if type(deploy.get(name)) is not int:
            raise UserError(f"{deploy_path}: {name} is {deploy.get(name)!r}, expected a number")
    if deploy["max_seq_length"] < 3 or deploy["pad_token_id"] < 0:
        raise UserError(f"{deploy_path}: max_seq_length is {deploy['max_seq_length']} and pad_token_id {deploy['pad_token_id']}, "
                        "expected at least 3 and 0")
    if deploy.get("input_names") not in (["input_ids"], ["input_ids", "token_type_ids"]):
        raise UserError(f"{deploy_path}: input_names is {deploy.get('input_names')!r}, expected input_ids and token_type_ids")
    tokenizer_path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(tokenizer_path):
        raise UserError(f"{folder}: tokenizer.json is missing, and the tokenizer of model type {deploy.get('model_type')!r} may "
                        "not have that form (ERNIE-M has not), expected an exported ERNIE or BERT; predict.py takes all models")
    model_path, params_path, onnx_path = (
        os.path.join(folder, str(deploy.get(name))) for name in ("model_file", "params_file", "onnx_file"))
    if "onnx_file" not in deploy or not os.path.isfile(onnx_path):
        onnx_path = None
    if with_onnx and model.endswith(("int8", "quant_emb")):
        raise UserError(f"{folder}: a graph that Paddle has quantized, which ONNX Runtime cannot run, expected export/ or "
                        "width_mult_X/ with --use_quantize")
    if with_onnx and onnx_path is None:
        command = ("that of the pruning (python prune.py ...) with --onnx" if model != "float32" else
                   f"python export_model.py --params_path ./checkpoint/ --output_path {folder} --onnx")
        raise UserError(f"{folder}: no ONNX model here; this command makes it: {command}")
    for needed in () if with_onnx else (model_path, params_path):
        if not os.path.isfile(needed):
            raise UserError(f"{needed}: file not found, expected the graph that {makers} wrote")
    labels = read_labels(os.path.join(folder, "label.txt"))
    if len(labels) != deploy["num_labels"]:
        raise UserError(f"{os.path.join(folder, 'label.txt')}: {len(labels)} labels, expected the {deploy['num_labels']} that "
                        "deploy.json says")
    return Export(model_path, params_path, onnx_path, tokenizer_path, deploy["input_names"], labels, deploy["max_seq_length"],
                  deploy["pad_token_id"])


def read_tokenizer(export):
    """The tokenizers.Tokenizer of an Export, which does not cut yet. UserError, also where it pads otherwise than the model."""
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
    return tokenizer
