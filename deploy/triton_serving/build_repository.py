"""Make a Triton model repository of an exported model; no Paddle is needed.

    python build_repository.py --export_dir ../../export
    python build_repository.py --export_dir ../../export --use_quantize --calibration_file ../../data/dev.txt
    python build_repository.py --export_dir ../../export --device gpu --use_fp16 --max_batch_size 128
    python build_repository.py --export_dir ../../output --model_repository encoder_models

Reads   export_dir, written by export_model.py --onnx, prune.py --onnx or retrieval_based/export_model.py.
Writes  model_repository/: seqcls (ensemble: INPUT -> label, confidence, and known where the model tells unknown texts) of
        tokenizer, seqcls_model and seqcls_postprocess, or of a sentence encoder: encoder (ensemble: INPUT -> embedding) of
        encoder_tokenizer and encoder_model; each with config.pbtxt and version 1, and repository.json (what it was made of). An
        older repository is replaced.
"""

import json
import logging
import os
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Union

import numpy as np

from textcls.common import long_texts, probabilities, texts
from textcls.common.errors import UserError, needs_packages, run_script
from textcls.common.known import Centres
from textcls.common.options import make_parser, positive_int
from textcls.common.outputs import STAGING, check_output_folder, complete_folder
from textcls.runtime.exported import FEATURES, LOGITS, Export, read_encoder, read_export, threshold_or_reason
from textcls.runtime.listening import MAX_TEXT_LENGTH
from textcls.runtime.quantize import SCHEMES, add_device_options, check_calibration, check_device, load, refuse_calibration

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

HERE = os.path.dirname(os.path.abspath(__file__))
CONFIGS = Path(HERE) / "configs"
MARKER = "repository.json"  # in a folder that this script made; the server takes no notice of files here
# the models of a repository -> the templates of their configurations; no name is in both, so that one server may have both
CLASSIFIER = {"tokenizer": "tokenizer", "seqcls_model": "model", "seqcls_postprocess": "seqcls_postprocess", "seqcls": "seqcls"}
ENCODER = {"encoder_tokenizer": "tokenizer", "encoder_model": "model", "encoder": "encoder"}
MADE = {MARKER, *CLASSIFIER, *ENCODER}
TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(int32)": "TYPE_INT32", "tensor(float)": "TYPE_FP32"}
ANSWERS = "answers"  # the output of a model that tells unknown texts: logits, and the nearness behind them
# one thread per batch and several batches at a time are faster than one batch on several threads
ONE_THREAD = """parameters { key: "intra_op_thread_count", value: { string_value: "1" } }
parameters { key: "inter_op_thread_count", value: { string_value: "1" } }"""
# of an ensemble
MODEL_STEP = """,
    {{
      model_name: "{model}"
      model_version: -1
{input_maps}
      output_map {{ key: "{output}", value: "{output}" }}
    }}"""
# of a classifier that tells unknown texts
KNOWN_OUTPUT = """,
  { name: "known", data_type: TYPE_FP32, dims: [ 1 ] }"""
KNOWN_MAP = """
      output_map { key: "known", value: "known" }"""
# of a tokenizer that needs no model, which is not there yet while the server starts
WARMUP = """model_warmup {
  name: "one text"
  batch_size: 1
  inputs { key: "INPUT", value: { data_type: TYPE_STRING, dims: [ 1 ], input_data_file: "text" } }
}"""
logger = logging.getLogger("predictor")


def parse_arguments() -> Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--export_dir", default="../../export", help="exported folder, or prefix of the model in it")
    parser.add_argument("--model_repository", default=os.path.join(HERE, "models"), help="folder to write")
    add_device_options(parser)
    parser.add_argument("--instance_count", type=positive_int,
                        help="batches that the model runs at a time; None: one per usable core of this machine, 1 on a GPU")
    parser.add_argument("--max_batch_size", type=positive_int, default=64, help="texts per request, and per batch of requests")
    parser.add_argument("--max_queue_delay", type=int, default=0,
                        help="microseconds that a request may wait for others to share its batch")
    parser.add_argument("--max_queue_size", type=positive_int, default=1024, help="requests that may wait; beyond: an error")
    parser.add_argument("--max_text_length", type=positive_int, default=MAX_TEXT_LENGTH, help="characters per text")
    args = parser.parse_args()
    check_calibration(parser, args)
    return args


def load_model(args: Namespace) -> tuple[Export, "InferenceSession", Union[str, bytes]]:
    """Check the export and take the model out of it, opened and as the path or the bytes of an ONNX model.

    Sets args.instance_count where it is None. UserError.
    """
    with needs_packages("deploy/triton_serving/requirements.txt"):
        from textcls.retrieval.encoder import load_exported
        from textcls.runtime.onnx_session import open_session
        from textcls.runtime.predictor import Predictor
    export = read_export(args.export_dir, output=None)
    scheme = SCHEMES[args.dtype]
    converts_here = scheme.device == "gpu"  # as the machine that builds need not have one
    opened = "fp32" if converts_here else args.dtype
    if export.labels:
        predictor = Predictor(args.export_dir, dtype=opened, calibration_file=args.calibration_file,
                              allow_accuracy_drop=args.allow_accuracy_drop)
    else:
        refuse_calibration(args)
        predictor = load_exported(export, dtype=opened)
    args.instance_count = args.instance_count or (predictor.num_threads if args.device == "cpu" else 1)
    model = scheme.convert(predictor.onnx_model) if converts_here else predictor.onnx_model
    if export.centres is not None:
        model = append_nearness(model, export.centres)  # after the conversion, so that it is computed in 32-bit floats
    name = f"{args.export_dir} in {args.dtype}"
    session = open_session(model, name, "cpu")
    for item in session.get_inputs() + session.get_outputs():
        if item.type not in TYPES:
            raise UserError(f"{name}: {item.name} is a {item.type}, expected one of {', '.join(TYPES)}")
    return export, session, model


def append_nearness(model: Union[str, bytes], centres: Centres) -> bytes:
    """Make one output of the two of an ONNX model, a path or bytes: what `add_nearness` makes of them, float32 [texts,
    num_labels + 1], which is joined over windows as logits are. Returns the new model. UserError."""
    content = load(model)
    from onnx import TensorProto, helper, numpy_helper

    graph = content.graph

    def add(kind, *inputs, **attributes):
        """Add a node with one output, whose name is returned; an input that is no name becomes a weight."""
        names = []
        for value in inputs:
            names.append(value if isinstance(value, str) else f"{ANSWERS}_weight_{len(graph.initializer)}")
            if not isinstance(value, str):
                graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), names[-1]))
        graph.node.append(helper.make_node(kind, names, [f"{ANSWERS}_{len(graph.node)}"], **attributes))
        return graph.node[-1].output[0]

    places = add("MatMul", add("Sub", FEATURES, centres.mean), centres.projection)
    distances = add("Sub", add("MatMul", places, centres.centres.T), (centres.centres ** 2).sum(axis=1) / 2)
    spread = add("MatMul", add("Mul", places, places), (1 - centres.shares)[:, None] / 2)
    add("Concat", LOGITS, add("Sub", add("ReduceMax", distances, axes=[1]), spread), axis=1)
    graph.node[-1].output[0] = ANSWERS
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(ANSWERS, TensorProto.FLOAT, ["batch", "size"]))
    return content.SerializeToString()


def make_configs(args: Namespace, export: Export, session: "InferenceSession") -> dict[str, str]:
    """Fill the templates in configs/. Returns the config.pbtxt of each model, by its name.

    Names, types and dimensions are those of the ONNX model. Requests that wait are put together; the queue is bounded.
    """
    inputs = {item.name: TYPES[item.type] for item in session.get_inputs()}
    [output] = session.get_outputs()
    output_size, known_weights = export.output_size, ""
    if export.centres is not None:
        output_size, known_weights = output_size + 1, json.dumps(export.centres.weights.tolist())
    tokenizer, model, *_ = models = CLASSIFIER if export.labels else ENCODER
    threshold = threshold_or_reason(export)  # without one a request that wants it is refused
    gpus = f", gpus: [ {args.device_id} ]" if args.device == "gpu" else ""
    longest = f"dims: [ {export.max_seq_length} ], zero_data: true"
    input_maps = "\n".join(f'      input_map {{ key: "{name}", value: "{name}" }}' for name in inputs)
    encode, reads_windows = read_encoder(export), export.long_text.mode == "window"
    outputs = {name: f"data_type: {kind}, dims: [ -1 ]" for name, kind in inputs.items()}  # of the tokenizer
    if reads_windows:  # it asks the model itself
        outputs = {output.name: f"data_type: {TYPES[output.type]}, dims: [ {output_size} ]"}
    values = {
        **vars(args), "max_seq_length": export.max_seq_length, "pad_id": export.pad_id, "output_size": output_size,
        "temperature": repr(export.temperature), "threshold": "" if isinstance(threshold, str) else repr(threshold),
        "known_weights": known_weights, "known_output": KNOWN_OUTPUT if known_weights else "",
        "known_map": KNOWN_MAP if known_weights else "",
        "tokenizer": tokenizer, "model": model, "output": output.name, "output_type": TYPES[output.type],
        "instances": f"count: {args.instance_count}, kind: KIND_{args.device.upper()}{gpus}",
        "threads": ONE_THREAD if args.device == "cpu" else "",
        "inputs": ",\n".join(f'  {{ name: "{name}", data_type: {kind}, dims: [ -1 ] }}' for name, kind in inputs.items()),
        "tokenizer_outputs": ",\n".join(f'  {{ name: "{name}", {kind} }}' for name, kind in outputs.items()),
        "tokenizer_maps": "\n".join(f'      output_map {{ key: "{name}", value: "{name}" }}' for name in outputs),
        "tokenizer_count": args.instance_count if reads_windows else 1,
        "model_step": "" if reads_windows else MODEL_STEP.format(model=model, input_maps=input_maps, output=output.name),
        "tokenizer_warmup": "" if reads_windows else WARMUP,
        "num_before": encode.num_before, "num_after": encode.num_after,
        "long_text": json.dumps(json.dumps(export.long_text._asdict())),
        "model_inputs": json.dumps(json.dumps({name: kind[len("TYPE_"):].lower() for name, kind in inputs.items()})),
        "zeros": "\n".join(f'  inputs {{ key: "{name}", value: {{ data_type: {kind}, {longest} }} }}'
                           for name, kind in inputs.items())}
    return {name: Template((CONFIGS / f"{template}.pbtxt").read_text(encoding="utf-8")).substitute(values)
            for name, template in models.items()}


def write_repository(folder: str, args: Namespace, export: Export, session: "InferenceSession", model: Union[str, bytes]) -> None:
    """Fill an empty folder. model: path or bytes of the ONNX model."""
    configs = make_configs(args, export, session)
    for name, config in configs.items():
        os.makedirs(os.path.join(folder, name, "1"))  # for the ensemble an empty version is needed, too
        write(os.path.join(folder, name, "config.pbtxt"), config.encode())
    tokenizer, runner, *others = [os.path.join(folder, name) for name in configs]
    shutil.copy(os.path.join(HERE, "tokenizer_model.py"), os.path.join(tokenizer, "1", "model.py"))
    shutil.copy(export.tokenizer_path, os.path.join(tokenizer, "1", "tokenizer.json"))
    for module in (texts, long_texts):
        shutil.copy(module.__file__, os.path.join(tokenizer, "1"))
    # a text as the server wants it in a file: its length in 4 bytes, little-endian, then UTF-8
    text = "头疼怎么办".encode()
    os.makedirs(os.path.join(tokenizer, "warmup"))
    write(os.path.join(tokenizer, "warmup", "text"), len(text).to_bytes(4, "little") + text)
    if isinstance(model, bytes):
        write(os.path.join(runner, "1", "model.onnx"), model)
    else:
        shutil.copyfile(model, os.path.join(runner, "1", "model.onnx"))
    if export.labels:
        version = os.path.join(others[0], "1")
        shutil.copy(os.path.join(HERE, "postprocess_model.py"), os.path.join(version, "model.py"))
        shutil.copy(probabilities.__file__, version)
        write(os.path.join(version, "label.txt"), "".join(label + "\n" for label in export.labels).encode())
    made_of = {**vars(args), "labels": export.labels, "max_seq_length": export.max_seq_length,
               "long_text": export.long_text._asdict()}
    write(os.path.join(folder, MARKER), json.dumps(made_of, ensure_ascii=False, indent=2).encode())


def write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def check_replaceable(path: str) -> None:
    """Raise UserError where a folder holds something that this script did not make."""
    check_output_folder(path, "--model_repository")
    names = os.listdir(path) if os.path.isdir(path) else []
    found = {name for name in names if not name.startswith(STAGING)}  # which an earlier run leaves where it is killed
    if found and (MARKER not in found or found - MADE):
        reason = f"holds {min(found - MADE)}" if found - MADE else f"has no {MARKER}"
        raise UserError(f"--model_repository {path}: {reason}, expected a new folder, an empty one, or one that "
                        "build_repository.py made")


def main():
    args = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    check_device(args.device, args.dtype)
    check_replaceable(args.model_repository)
    export, session, model = load_model(args)
    with complete_folder(args.model_repository, MARKER) as folder:
        write_repository(folder, args, export, session, model)
    answers = f"{len(export.labels)} labels" if export.labels else f"vectors of {export.output_size} numbers"
    print(f"Model repository saved in {args.model_repository}: {answers}, {export.max_seq_length} tokens, "
          f"{args.dtype.upper()} on {args.device}, batches of up to {args.max_batch_size}.", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
