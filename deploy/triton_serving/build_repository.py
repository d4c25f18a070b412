"""Make a Triton model repository of an exported model; no Paddle is needed.

    python build_repository.py --export_dir ../../export
    python build_repository.py --export_dir ../../export --use_quantize --calibration_file ../../data/dev.txt
    python build_repository.py --export_dir ../../export --device gpu --use_fp16 --max_batch_size 128

Reads   export_dir, written by export_model.py --onnx or prune.py --onnx.
Writes  model_repository/: seqcls (ensemble: INPUT -> label, confidence) of tokenizer, seqcls_model and seqcls_postprocess,
        each with config.pbtxt and version 1, and repository.json (what it was made of). An older repository is replaced.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from textcls.errors import UserError, run_script
from textcls.options import add_device_options, check_calibration, check_device, make_parser, positive_int
from textcls.outputs import check_output_folder

HERE = os.path.dirname(os.path.abspath(__file__))
LIBRARY = os.path.join(HERE, "..", "..", "textcls")
MARKER = "repository.json"  # in a folder that this script made; the server takes no notice of files here
MADE = {MARKER, "tokenizer", "seqcls_model", "seqcls_postprocess", "seqcls"}
TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(int32)": "TYPE_INT32", "tensor(float)": "TYPE_FP32"}
logger = logging.getLogger("predictor")


def parse_arguments():
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
    parser.add_argument("--max_text_length", type=positive_int, default=10000, help="characters per text")
    args = parser.parse_args()
    check_calibration(parser, args)
    return args


def load_model(args):
    """Check the export and take the model out of it: (exported.Export, onnxruntime.InferenceSession, ONNX path or bytes).

    Sets args.instance_count where it is None. UserError.
    """
    try:
        from textcls.exported import read_export
        from textcls.onnx_session import open_session
        from textcls.predictor import Predictor
    except ImportError as error:
        raise UserError(f"the package {error.name} is missing, expected `pip install -r deploy/triton_serving/requirements.txt`"
                        ) from None
    predictor = Predictor(args.export_dir, quantize=args.use_quantize, calibration_file=args.calibration_file,
                          allow_accuracy_drop=args.allow_accuracy_drop)
    args.instance_count = args.instance_count or (predictor.num_threads if args.device == "cpu" else 1)
    model = predictor.onnx_model
    if args.use_fp16:  # converted here, as the machine that builds need not have a GPU
        from textcls.onnx_conversion import to_fp16

        model = to_fp16(model)
    name = f"{args.export_dir} in 16-bit floats" if args.use_fp16 else args.export_dir
    session = open_session(model, name, "cpu")
    for item in session.get_inputs() + session.get_outputs():
        if item.type not in TYPES:
            raise UserError(f"{name}: {item.name} is a {item.type}, expected one of {', '.join(TYPES)}")
    return read_export(args.export_dir), session, model


def tensors(kind, items):
    """A block `input` or `output` of a config. items: list of (name, type, dimensions without the batch)."""
    blocks = ["  { " + f'name: "{name}", data_type: {data_type}, dims: {dims}' + " }" for name, data_type, dims in items]
    return f"{kind} [\n" + ",\n".join(blocks) + "\n]"


def instances(count, device="cpu", device_id=0):
    gpus = f", gpus: [ {device_id} ]" if device == "gpu" else ""
    return "instance_group [ { " + f"count: {count}, kind: KIND_{device.upper()}{gpus}" + " } ]"


def batching(args):
    """Requests that wait are put together; the queue is bounded."""
    return f"""dynamic_batching {{
  max_queue_delay_microseconds: {args.max_queue_delay}
  default_queue_policy {{ max_queue_size: {args.max_queue_size} }}
}}"""


def parameters(entries):
    return "\n".join(f'parameters {{ key: "{key}", value: {{ string_value: "{value}" }} }}' for key, value in entries.items())


def warm_up(name, batch_size, inputs):
    """A request that the server makes of itself before it is ready. inputs: dict of name -> what the input is made of."""
    lines = [f'  inputs {{ key: "{key}", value: {{ {value} }} }}' for key, value in inputs.items()]
    return "\n".join(["model_warmup {", f'  name: "{name}"', f"  batch_size: {batch_size}", *lines, "}"])


def ensemble_step(model, inputs, outputs):
    maps = [f'      input_map {{ key: "{key}", value: "{value}" }}' for key, value in inputs]
    maps += [f'      output_map {{ key: "{key}", value: "{value}" }}' for key, value in outputs]
    return "\n".join(["    {", f'      model_name: "{model}"', "      model_version: -1", *maps, "    }"])


def make_configs(args, export, session):
    """The four config.pbtxt: dict of model name -> str. Names, types and dimensions are those of the ONNX model."""
    inputs = [(item.name, TYPES[item.type], "[ -1 ]") for item in session.get_inputs()]
    [logits] = [(item.name, TYPES[item.type], f"[ {len(export.labels)} ]") for item in session.get_outputs()]
    text = ("INPUT", "TYPE_STRING", "[ 1 ]")
    predictions = [("label", "TYPE_STRING", "[ -1 ]"), ("confidence", "TYPE_FP32", "[ -1 ]")]
    # one thread per batch and several batches at a time are faster than one batch on several threads
    threads = parameters({"intra_op_thread_count": 1, "inter_op_thread_count": 1}) if args.device == "cpu" else ""
    zeros = {name: f"data_type: {kind}, dims: [ {export.max_seq_length} ], zero_data: true" for name, kind, _ in inputs}
    limits = {"max_seq_length": export.max_seq_length, "pad_id": export.pad_id, "max_text_length": args.max_text_length}
    steps = [ensemble_step("tokenizer", [("INPUT", "INPUT")], [(name, name) for name, _, _ in inputs]),
             ensemble_step("seqcls_model", [(name, name) for name, _, _ in inputs], [(logits[0], logits[0])]),
             ensemble_step("seqcls_postprocess", [(logits[0], logits[0])], [(name, name) for name, _, _ in predictions])]
    parts = {
        "tokenizer": ['backend: "python"', tensors("input", [text]), tensors("output", inputs), parameters(limits), instances(1),
                      batching(args), warm_up("one text", 1, {"INPUT": 'data_type: TYPE_STRING, dims: [ 1 ], '
                                                              'input_data_file: "text"'})],
        "seqcls_model": ['platform: "onnxruntime_onnx"', tensors("input", inputs), tensors("output", [logits]), threads,
                         instances(args.instance_count, args.device, args.device_id), batching(args),
                         warm_up("largest batch", args.max_batch_size, zeros)],
        "seqcls_postprocess": ['backend: "python"', tensors("input", [logits]), tensors("output", predictions), instances(1),
                               batching(args), warm_up("largest batch", args.max_batch_size, {
                                   logits[0]: f"data_type: {logits[1]}, dims: {logits[2]}, zero_data: true"})],
        "seqcls": ['platform: "ensemble"', tensors("input", [text]), tensors("output", predictions),
                   "ensemble_scheduling {\n  step [\n" + ",\n".join(steps) + "\n  ]\n}"]}
    return {name: "\n".join([f'name: "{name}"', blocks[0], f"max_batch_size: {args.max_batch_size}", *filter(None, blocks[1:])])
            + "\n" for name, blocks in parts.items()}


def write_repository(folder, args, export, session, model):
    """Fill an empty folder. model: path or bytes of the ONNX model."""
    configs = make_configs(args, export, session)
    for name, config in configs.items():
        os.makedirs(os.path.join(folder, name, "1"))  # for the ensemble an empty version is needed, too
        write(os.path.join(folder, name, "config.pbtxt"), config.encode())
    version = {name: os.path.join(folder, name, "1") for name in configs}
    shutil.copy(os.path.join(HERE, "tokenizer_model.py"), os.path.join(version["tokenizer"], "model.py"))
    shutil.copy(export.tokenizer_path, os.path.join(version["tokenizer"], "tokenizer.json"))
    shutil.copy(os.path.join(LIBRARY, "texts.py"), version["tokenizer"])
    shutil.copy(os.path.join(HERE, "postprocess_model.py"), os.path.join(version["seqcls_postprocess"], "model.py"))
    shutil.copy(os.path.join(LIBRARY, "probabilities.py"), version["seqcls_postprocess"])
    write(os.path.join(version["seqcls_postprocess"], "label.txt"), "".join(label + "\n" for label in export.labels).encode())
    if isinstance(model, bytes):
        write(os.path.join(version["seqcls_model"], "model.onnx"), model)
    else:
        shutil.copyfile(model, os.path.join(version["seqcls_model"], "model.onnx"))
    # a text as the server wants it in a file: its length in 4 bytes, little-endian, then UTF-8
    text = "头疼怎么办".encode()
    os.makedirs(os.path.join(folder, "tokenizer", "warmup"))
    write(os.path.join(folder, "tokenizer", "warmup", "text"), len(text).to_bytes(4, "little") + text)
    made_of = {**vars(args), "labels": export.labels, "max_seq_length": export.max_seq_length}
    write(os.path.join(folder, MARKER), json.dumps(made_of, ensure_ascii=False, indent=2).encode())


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)


def check_replaceable(path):
    """UserError where a folder holds something that this script did not make."""
    check_output_folder(path, "--model_repository")
    found = set(os.listdir(path)) if os.path.isdir(path) else set()
    if found and (MARKER not in found or found - MADE):
        reason = f"holds {min(found - MADE)}" if found - MADE else f"has no {MARKER}"
        raise UserError(f"--model_repository {path}: {reason}, expected a new folder, an empty one, or one that "
                        "build_repository.py made")


@contextlib.contextmanager
def complete_repository(path):
    """A new folder beside `path`, which takes its place when the block ends well."""
    path = os.path.realpath(path)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        staging = tempfile.mkdtemp(prefix=f".{os.path.basename(path)}.", suffix=".part", dir=os.path.dirname(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}), expected a writable folder") from None
    new, old = os.path.join(staging, "new"), os.path.join(staging, "old")
    try:
        os.mkdir(new)  # with the usual permissions, where mkdtemp's are private
        yield new
        if os.path.isdir(path):
            os.rename(path, old)
        os.rename(new, path)
    finally:
        if os.path.isdir(old) and not os.path.exists(path):  # interrupted just then
            os.rename(old, path)
        shutil.rmtree(staging, ignore_errors=True)


def main():
    args = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    check_device(args.device, args.use_quantize, args.use_fp16)
    check_replaceable(args.model_repository)
    export, session, model = load_model(args)
    with complete_repository(args.model_repository) as folder:
        write_repository(folder, args, export, session, model)
    precision = "INT8" if args.use_quantize else "fp16" if args.use_fp16 else "fp32"
    print(f"Model repository saved in {args.model_repository}: {len(export.labels)} labels, {export.max_seq_length} tokens, "
          f"{precision} on {args.device}, batches of up to {args.max_batch_size}.", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
