"""From a trained model to a folder that can be deployed: graph, ONNX model, tokenizer, labels, deploy.json."""

import contextlib
import glob
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from textcls.common.digests import file_id
from textcls.common.errors import UserError
from textcls.common.known import KNOWN_FILE, write_centres
from textcls.common.log import get_logger
from textcls.common.long_texts import CUT
from textcls.common.options import describe_versions
from textcls.common.outputs import complete_folder, write_labels
from textcls.data.files import read_json
from textcls.data.tokens import model_inputs, pad_batch
from textcls.export.onnx_export import TOLERANCE, export_onnx
from textcls.models.checkpoints import Checkpoint
from textcls.models.configs import shortest_length
from textcls.models.families import count_positions, family_of
from textcls.models.inference import keeping_features
from textcls.models.model_card import extend_cards, serving_commands
from textcls.models.paddle_setup import PADDLE_3, paddle
from textcls.models.tokenizers import save_rust_tokenizer
from textcls.runtime.exported import CLASS_LOGITS, EMBEDDING, FEATURES, GRAPH_ENDINGS, LOGITS, PROBES, graph_file

if TYPE_CHECKING:
    from paddle import inference
    from paddlenlp.transformers import PretrainedModel


def input_spec(names: Sequence[str]) -> list[paddle.static.InputSpec]:
    """Make Paddle's description of the graph's inputs: int64 [batch, length] each."""
    return [paddle.static.InputSpec(shape=[None, None], dtype="int64", name=name) for name in names]


def input_names(model: "PretrainedModel") -> list[str]:
    """Return the names of the inputs that a model's graph gets."""
    return list(family_of(model).input_names)


class WithFeatures(paddle.nn.Layer):
    """A classifier that also gives what its last layer is given, features, for `export_graph`."""

    def __init__(self, model: "PretrainedModel") -> None:
        super().__init__()
        self.model, self.kept = model, list[paddle.Tensor]()
        self.eval()
        model.classifier.register_forward_pre_hook(lambda layer, inputs: self.kept.append(inputs[0]))

    def forward(self, input_ids: paddle.Tensor, token_type_ids: Optional[paddle.Tensor] = None
                ) -> tuple[paddle.Tensor, paddle.Tensor]:
        logits = self.model(input_ids) if token_type_ids is None else self.model(input_ids, token_type_ids)
        return logits, self.kept[-1]


def export_graph(model: "PretrainedModel", prefix: str, with_features: bool = False) -> None:
    """Trace the model and save prefix.pdmodel, .pdiparams and .pdiparams.info; with Paddle 3 prefix.json and .pdiparams.

    with_features: what the last layer of a classifier is given, float32 [batch, hidden_size], is the second output.
    """
    spec = input_spec(input_names(model))
    model = WithFeatures(model) if with_features else model
    with warnings.catch_warnings():  # of Paddle 2.6 about its own fill_constant
        warnings.filterwarnings("ignore", r"The Attr\(force_cpu\)")
        paddle.jit.save(paddle.jit.to_static(model, input_spec=spec, full_graph=True), prefix)


def open_graph(prefix: str, threads: int = 1) -> "inference.Predictor":
    """Open a Paddle Inference predictor of the graph `prefix` on the CPU. UserError where the files are not whole."""
    from paddle import inference

    path = graph_file(prefix)
    if path.endswith(".json") and not PADDLE_3:
        raise UserError(f"{path}: a graph of Paddle 3, at which Paddle {paddle.__version__} would crash, expected one that "
                        "Paddle 2.6 exported; it reads the checkpoints of Paddle 3")
    config = inference.Config(path, prefix + ".pdiparams")
    config.disable_gpu()
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(threads)
    if not PADDLE_3:  # 3.3.1 cannot: "Not find ... memory_optimize_pass"
        config.enable_memory_optim()  # else each result within the graph has memory of its own: 0.7 GB for 64 texts of 34 tokens
    try:
        return inference.create_predictor(config)
    except RuntimeError as error:  # Paddle writes to a full disk without a word
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{prefix}.pdiparams: cannot be read back ({reason}), expected free space where it is written") from error


def run_graph(predictor: "inference.Predictor", input_ids: np.ndarray) -> np.ndarray:
    """Run a predictor of `open_graph`. input_ids: int64 [batch, length]. Returns its answers, float32 [batch, size]."""
    return run_outputs(predictor, input_ids)[0]


def run_outputs(predictor: "inference.Predictor", input_ids: np.ndarray) -> list[np.ndarray]:
    """Run a predictor of `open_graph` like `run_graph`. Returns all that it gives: answers, and features where it has them."""
    for name, values in model_inputs(input_ids, predictor.get_input_names()).items():
        predictor.get_input_handle(name).copy_from_cpu(values)
    predictor.run()
    return [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]


def probe_batches(checkpoint: Checkpoint) -> list[np.ndarray]:
    """Tokenize PROBES into batches of several shapes: list of int64 [batch, length]."""
    rows = [window for windows in checkpoint.encode(PROBES) for window in windows]
    return [pad_batch(batch, checkpoint.pad_id) for batch in (rows, rows[:1], rows[2:3], rows[-1:])]


def save_deployment(checkpoint: Checkpoint, folder: str, name: str, with_onnx: bool, card_folder: Optional[str] = None) -> None:
    """As `write_deployment`: the folder holds the new export when that is complete, and nothing of an older one named alike.

    card_folder: of the checkpoint, whose MODEL_CARD.md goes along; None: none does.
    """
    with complete_folder(folder, marker="deploy.json") as staging:
        differences = write_deployment(checkpoint, staging, name, with_onnx)
        if card_folder is not None:
            extend_cards(card_folder, staging, describe_versions(), differences, serving_commands(folder, name))
    remove_older(folder, name)


def write_deployment(checkpoint: Checkpoint, folder: str, name: str, with_onnx: bool) -> dict[str, float]:
    """Export the checkpoint's model as the graph folder/name, compare it, and write beside it all that a deployment needs.

    checkpoint: of a classifier or a sentence encoder; its model cannot be run any more afterwards.
    with_onnx: also write name.onnx. Returns how much each form differs at most, {"Paddle": ..., "ONNX": ...}. Raises UserError
    if one differs too much.
    """
    model, batches = checkpoint.model, probe_batches(checkpoint)
    output = "logit" if checkpoint.encoder_id is None else "vector"
    expected = run_checkpoint(checkpoint, batches)  # before the export: tracing replaces the model's own forward
    prefix = os.path.join(folder, name)
    export_graph(model, prefix, with_features=FEATURES in expected)
    difference = compare_graph(prefix, batches, expected)
    get_logger().info(f"Largest {output} difference between checkpoint and exported graph: {difference:.2e}")
    if not difference <= TOLERANCE:
        raise UserError(f"the exported graph differs from the checkpoint by {difference:.2e}, expected at most "
                        f"{TOLERANCE:.0e}; nothing was exported")
    differences = {"Paddle": difference}
    if with_onnx:
        differences["ONNX"] = export_onnx(model, prefix, batches, expected)
        get_logger().info(f"Largest {output} difference between checkpoint and ONNX model: {differences['ONNX']:.2e}")
    checkpoint.tokenizer.save_pretrained(folder)
    if checkpoint.rust_tokenizer is not None:
        save_rust_tokenizer(checkpoint.rust_tokenizer, os.path.join(folder, "tokenizer.json"), checkpoint.max_seq_length)
    if checkpoint.encoder_id is None:
        write_labels(os.path.join(folder, "label.txt"), checkpoint.labels)
        kind = {"output": CLASS_LOGITS, "num_labels": len(checkpoint.labels), **describe_confidence(checkpoint, prefix)}
    else:
        kind = {"output": EMBEDDING, "embedding_size": expected[EMBEDDING][0].shape[1], "encoder_id": checkpoint.encoder_id}
    if checkpoint.centres is not None:
        kind.update(known=write_centres(folder, checkpoint.centres), output_names=list(expected))
    long_text = checkpoint.encode.long_text
    if long_text != CUT:
        kind["long_text"] = long_text._asdict()
    with open(os.path.join(folder, "deploy.json"), "w", encoding="utf-8") as file:
        deploy = {"model_type": model.config.model_type, **kind, "max_seq_length": checkpoint.max_seq_length,
                  "min_seq_length": shortest_length(model), "max_positions": count_positions(model),
                  "input_names": input_names(model), "pad_token_id": checkpoint.pad_id,
                  "model_file": os.path.basename(graph_file(prefix)), "params_file": f"{name}.pdiparams"}
        json.dump({**deploy, "onnx_file": f"{name}.onnx"} if with_onnx else deploy, file, indent=2)
    return differences


def compare_graph(prefix: str, batches: Sequence[np.ndarray], expected: Mapping[str, Sequence[np.ndarray]]) -> float:
    """Run the graph `prefix` over batches, list of int64 [batch, length]. Returns its largest difference from `expected`, of
    `run_checkpoint`."""
    predictor, difference = open_graph(prefix), 0.0
    for batch, *wanted in zip(batches, *expected.values()):
        for found, right in zip(run_outputs(predictor, batch), wanted):
            difference = max(difference, float(np.abs(found - right).max()))
    return difference


def run_checkpoint(checkpoint: Checkpoint, batches: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Run a model over batches, list of int64 [batch, length]. Returns by the names of an exported model's outputs what they have
    to give: logits, and features where the checkpoint holds Centres, or the vectors of an encoder."""
    model = checkpoint.model
    with paddle.no_grad():
        if checkpoint.centres is None:
            name = LOGITS if checkpoint.encoder_id is None else EMBEDDING
            return {name: [model(paddle.to_tensor(batch)).numpy() for batch in batches]}
        with keeping_features(model) as run:
            pairs = [run(paddle.to_tensor(batch)) for batch in batches]
    return {LOGITS: [logits for _, logits in pairs], FEATURES: [features for features, _ in pairs]}


def describe_confidence(checkpoint: Checkpoint, prefix: str) -> dict[str, Any]:
    """Make the entries of a deploy.json that say how sure a classifier's answers are: temperature, and threshold where the
    checkpoint holds one that belongs to it."""
    entries: dict[str, Any] = {"temperature": checkpoint.temperature}
    if checkpoint.threshold is not None:
        hashes = {kind: file_id(prefix + ending) for kind, ending in (("params", ".pdiparams"), ("onnx", ".onnx"))
                  if os.path.isfile(prefix + ending)}
        entries["threshold"] = {**checkpoint.threshold, "weights": hashes}
    return entries


def remove_older(folder: str, name: str) -> None:
    """Delete what an older export named `name` has left in a folder: the graph of the other Paddle, converted forms, the ONNX
    model and known.npz where the new export has none."""
    deploy = read_json(os.path.join(folder, "deploy.json"))
    if "known" not in deploy:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, KNOWN_FILE))
    kept = {deploy["model_file"], deploy.get("onnx_file")}
    if deploy["model_file"].endswith(GRAPH_ENDINGS[0]):
        kept.add(f"{name}.pdiparams.info")
    for path in glob.glob(os.path.join(glob.escape(folder), f"{name}.*")):
        if path.endswith((*GRAPH_ENDINGS, ".info", ".onnx")) and os.path.basename(path) not in kept:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
