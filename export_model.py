"""Export a trained classifier as a static graph, with all that a deployment needs beside it.

    python export_model.py --params_path ./checkpoint/ --output_path ./export
    python export_model.py --params_path ./checkpoint/ --output_path ./export --multilingual    # ERNIE-M
    python export_model.py --params_path ./checkpoint/ --output_path ./export --onnx            # for deploy/predictor

Reads   params_path (made by train.py).
Writes  output_path/: float32.pdmodel, float32.pdiparams, float32.pdiparams.info, tokenizer.json (where the tokenizer has
        that form), vocab.txt and the other tokenizer files, label.txt, deploy.json (maximum length, input names, model
        type). Inputs of the graph: input_ids, token_type_ids, int64 [batch, length]; ERNIE-M: input_ids only.
        Output: logits float32 [batch, num_classes]. With --onnx also float32.onnx, with the same inputs.
Whatever is exported is run and compared with the checkpoint before anything appears in output_path.
"""

import argparse
import contextlib
import glob
import json
import os

import numpy as np

from utils import UserError, complete_folder, pad_batch, run_script
from modeling import get_logger, load_checkpoint, select_device
from onnx_export import TOLERANCE, export_onnx

# texts of several lengths and kinds for the comparison; it needs no data folder
PROBES = ["头疼怎么办", "治疗方案？", "a", "BERT and ERNIE, 2024 😀", "您好，请问一岁三个月的孩子可以吃这种药吗？" * 8]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--params_path", default="./checkpoint/", help="checkpoint made by train.py")
    parser.add_argument("--output_path", default="./export", help="folder for the exported model")
    parser.add_argument("--multilingual", action="store_true", help="the model is ERNIE-M (recognised without it, too)")
    parser.add_argument("--onnx", action="store_true", help="also write float32.onnx for ONNX Runtime")
    return parser.parse_args()


def input_spec(names):
    """Paddle's description of the graph's inputs: int64 [batch, length] each."""
    import paddle

    return [paddle.static.InputSpec(shape=[None, None], dtype="int64", name=name) for name in names]


def input_names(model):
    """Names of the inputs that a model's graph gets."""
    return ["input_ids"] if model.config.model_type == "ernie_m" else ["input_ids", "token_type_ids"]


def export_graph(model, prefix):
    """Trace the model and save prefix.pdmodel, .pdiparams and .pdiparams.info."""
    import paddle

    spec = input_spec(input_names(model))
    paddle.jit.save(paddle.jit.to_static(model, input_spec=spec, full_graph=True), prefix)


def open_graph(prefix, threads=1):
    """A Paddle Inference predictor of prefix.pdmodel on the CPU."""
    from paddle import inference

    config = inference.Config(prefix + ".pdmodel", prefix + ".pdiparams")
    config.disable_gpu()
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(threads)
    return inference.create_predictor(config)


def run_graph(predictor, input_ids):
    """Run a predictor of `open_graph`. input_ids: int64 [batch, length]. Returns the logits float32 [batch, num_classes]."""
    for name in predictor.get_input_names():
        predictor.get_input_handle(name).copy_from_cpu(input_ids if name == "input_ids" else np.zeros_like(input_ids))
    predictor.run()
    return predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()


def probe_batches(checkpoint):
    """PROBES as batches of several shapes: list of int64 [batch, length]."""
    rows = checkpoint.encode(PROBES)
    return [pad_batch(batch, checkpoint.pad_id) for batch in (rows, rows[:1], rows[2:3], rows[-1:])]


def write_deployment(checkpoint, folder, name, with_onnx):
    """Export the checkpoint's model as folder/name.pdmodel, compare it, and write beside it all that a deployment needs.

    checkpoint: a modeling.Checkpoint; its model cannot be run any more afterwards. with_onnx: also write name.onnx.
    Raises UserError if a graph differs.
    """
    import paddle

    model, batches = checkpoint.model, probe_batches(checkpoint)
    with paddle.no_grad():  # before the export: tracing replaces the model's own forward
        expected = [model(paddle.to_tensor(batch)).numpy() for batch in batches]
    prefix = os.path.join(folder, name)
    export_graph(model, prefix)
    predictor = open_graph(prefix)
    difference = max(float(np.abs(run_graph(predictor, batch) - logits).max()) for batch, logits in zip(batches, expected))
    get_logger().info(f"Largest logit difference between checkpoint and exported graph: {difference:.2e}")
    if not difference <= TOLERANCE:
        raise UserError(f"the exported graph differs from the checkpoint by {difference:.2e}, expected at most "
                        f"{TOLERANCE:.0e}; nothing was exported")
    if with_onnx:
        difference = export_onnx(prefix, batches, expected)
        get_logger().info(f"Largest logit difference between checkpoint and ONNX model: {difference:.2e}")
    checkpoint.tokenizer.save_pretrained(folder)
    if checkpoint.fast is not None:
        checkpoint.fast.save(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "label.txt"), "w", encoding="utf-8") as file:
        file.write("".join(label + "\n" for label in checkpoint.labels))
    with open(os.path.join(folder, "deploy.json"), "w", encoding="utf-8") as file:
        deploy = {"model_type": model.config.model_type, "max_seq_length": checkpoint.max_seq_length,
                  "input_names": input_names(model), "num_labels": len(checkpoint.labels), "pad_token_id": checkpoint.pad_id,
                  "model_file": f"{name}.pdmodel", "params_file": f"{name}.pdiparams"}
        json.dump({**deploy, "onnx_file": f"{name}.onnx"} if with_onnx else deploy, file, indent=2)


def main():
    args = parse_arguments()
    get_logger()
    select_device("cpu")  # tracing and comparing take seconds; the graph runs on any device
    checkpoint = load_checkpoint(args.params_path)
    model_type = checkpoint.model.config.model_type
    if args.multilingual and model_type != "ernie_m":
        raise UserError(f"--multilingual: the model type of {args.params_path} is {model_type}, expected an ERNIE-M model, or "
                        "no --multilingual")
    with complete_folder(args.output_path, marker="deploy.json") as staging:
        write_deployment(checkpoint, staging, "float32", args.onnx)
    # what was made from an older export's weights: converted forms, and its ONNX model unless there is a new one
    pattern = os.path.join(glob.escape(args.output_path), "float32.*-*.onnx")
    for path in glob.glob(pattern) + ([] if args.onnx else [os.path.join(args.output_path, "float32.onnx")]):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    get_logger().info(f"Exported model saved in {args.output_path}")


if __name__ == "__main__":
    run_script(main)
