"""Make a trained classifier smaller and faster: DynaBERT width pruning through PaddleNLP's compression API.

    python prune.py --device "gpu" --dataset_dir "data" --output_dir "prune" --per_device_train_batch_size 32 \\
        --per_device_eval_batch_size 32 --num_train_epochs 10 --max_seq_length 128 --logging_steps 5 --save_steps 100 \\
        --width_mult_list '3/4' '2/3' '1/2'
    python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo prune.py --device "cpu" ...
    python -m textcls.launch --master 10.0.0.1:6170 --nnodes 2 --rank 0 prune.py --device "cpu" ...     # on each host: its rank

Reads   params_dir (made by train.py), dataset_dir/train.txt, dev.txt, label.txt.
Writes  output_dir/width_mult_0.75/ and so on: pruned_model.pdmodel (Paddle 3: .json), .pdiparams, model_state.pdparams,
        config.json, and as in export_model.py tokenizer files, label.txt, deploy.json; with --onnx pruned_model.onnx;
        MODEL_CARD.md and MODEL_CARD_en.md, the record of the pruning.
A part of train.txt (or --importance_file) tells which heads and neurons matter and which weights are best; dev.txt is
only used for the table at the end.
"""

import contextlib
import copy
import functools
import glob
import json
import logging
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Optional

import numpy as np

from textcls.common.errors import UserError, is_main_rank, run_script
from textcls.common.log import get_logger, library_log, say_next
from textcls.common.options import parse_widths
from textcls.common.outputs import STAGING, check_output_folder, lock_folder
from textcls.export.deployment import open_graph, run_graph, write_deployment
from textcls.models.configs import read_calibration
from textcls.models.device import select_device
from textcls.models.loading import load_with_data, read_splits
from textcls.models.model_card import describe_file, serving_commands
from textcls.models.paddle_setup import PADDLE_3, paddle
from textcls.runtime.exported import graph_file
from textcls.training.compression import PruningTrainer, evaluate_held_out, narrowed, width_folder
from textcls.training.record import begin_record, describe_quality, write_model_card
from textcls.training.scoring import compute_metrics
from textcls.training.trainer import (
    check_batch,
    check_training_arguments,
    given_words,
    parse_dataclasses,
    plain_library_errors,
    remove_folder,
)
from utils import pad_batch, read_json, read_labelled, run_by_length, sorted_batches, tokenize

from paddlenlp.trainer import CompressionArguments

UNPRUNED = "unpruned"  # folder of the unpruned graph while a run goes on
HELD_OUT = 0.1  # share of the training rows that importance and selection use
TIMED_TEXTS, TIMED_ROUNDS = 512, 5  # for the last column of the table
STRATEGIES = ["dynabert", "dynabert+ptq", "dynabert+qat", "dynabert+embeddings", "dynabert+ptq+embeddings",
              "dynabert+qat+embeddings", "ptq", "ptq+embeddings", "qat", "qat+embeddings"]
CHOICES = {"algo_list": ["mse", "KL", "hist", "avg", "emd", "abs_max", "min_max", "ptf"], "round_type": ["round", "adaround"],
           "weight_quantize_type": ["abs_max", "channel_wise_abs_max"],
           "activation_quantize_type": ["abs_max", "range_abs_max", "moving_average_abs_max"]}


@dataclass
class ModelArguments:
    params_dir: str = field(default="./checkpoint/", metadata={"help": "Checkpoint made by train.py."})


@dataclass
class DataArguments:
    dataset_dir: str = field(default="./data", metadata={"help": "Folder of the data files."})
    train_file: str = field(default="train.txt", metadata={"help": "Training file in dataset_dir."})
    dev_file: str = field(default="dev.txt", metadata={"help": "Development file in dataset_dir."})
    label_file: str = field(default="label.txt", metadata={"help": "Labels in dataset_dir; must agree with the checkpoint."})
    importance_file: Optional[str] = field(default=None, metadata={
        "help": "File in dataset_dir that tells which heads and neurons matter; the default is a part of the training rows."})
    max_seq_length: Optional[int] = field(default=None, metadata={"help": "Longest text in tokens; default: as in training."})


@dataclass
class PruneArguments(CompressionArguments):
    onnx: bool = field(default=False, metadata={"help": "Also write pruned_model.onnx for ONNX Runtime."})
    output_dir: str = field(default="prune", metadata={"help": "Folder for the pruned models."})
    strategy: str = field(default="dynabert", metadata={"help": "What to do.", "choices": STRATEGIES})
    learning_rate: float = field(default=3e-5, metadata={"help": "Highest learning rate."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Epochs of distillation."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts per step and device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Texts per batch in evaluation."})
    seed: int = field(default=3, metadata={"help": "Random seed."})
    device: Optional[str] = field(default=None, metadata={"help": "cpu, gpu, gpu:N, xpu or npu; the default is the GPU if "
                                                          "there is one, else the CPU."})
    full_embeddings: bool = field(default=False, metadata={"help": "Train the whole table of word embeddings, not only the rows "
                                                           "whose tokens occur: the same result, slower."})


def check_arguments(args):
    """Refuse what the compression API would ignore or fail on. Raises UserError."""
    check_training_arguments(args)
    check_output_folder(args.output_dir, "--output_dir")
    for name, value in (("fp16", False), ("bf16", False), ("gradient_accumulation_steps", 1), ("resume_from_checkpoint", None),
                        ("prune_embeddings", False), ("input_dtype", "int64"), ("input_infer_model_path", None)):
        if getattr(args, name) != value:
            raise UserError(f"--{name}: PaddleNLP's compression of a trained model does not take it, expected a run without it")
    for name, allowed in CHOICES.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value not in allowed:
                raise UserError(f"--{name} {value}: unknown, expected one of {', '.join(allowed)}")
    for value in (args.batch_size_list or []) + (args.batch_num_list or []):
        if value < 1:
            raise UserError(f"--batch_size_list, --batch_num_list {value}: out of range, expected 1 or more")
    if not 0 < args.moving_rate < 1:
        raise UserError(f"--moving_rate {args.moving_rate}: out of range, expected more than 0 and less than 1")
    if args.onnx and "dynabert" not in args.strategy:
        raise UserError(f"--onnx: goes with the strategy dynabert, expected --strategy {args.strategy} without it, or "
                        "export_model.py --onnx for the whole model")
    if args.strategy != "dynabert" and PADDLE_3:
        raise UserError(f"--strategy {args.strategy}: PaddleSlim 2.6 can quantize graphs of Paddle 2 only, and this is Paddle "
                        f"{paddle.__version__}; expected --strategy dynabert, then INT8 by deploy/predictor/infer.py "
                        "--use_quantize, or Paddle 2.6")
    if args.strategy != "dynabert" and args.world_size > 1:
        raise UserError(f"--strategy {args.strategy}: quantizing works in a single process, expected --strategy dynabert, or "
                        "no paddle.distributed.launch")


def check_earlier(args: PruneArguments, widths: list[float]) -> None:
    """UserError where models of an earlier run would be replaced without --overwrite_output_dir. widths: of `parse_widths`."""
    names = [width_folder(width) for width in widths] if "dynabert" in args.strategy else ["*"]
    old = [path for name in names for path in glob.glob(os.path.join(glob.escape(args.output_dir), name, "deploy.json"))]
    if old and not args.overwrite_output_dir:
        raise UserError(f"{os.path.dirname(old[0])}: holds a model of an earlier run, expected another --output_dir, or "
                        "--overwrite_output_dir to replace it")


def read_data(data_args, labels, problems):
    """Read and check the data files. Returns three pairs (texts, label ids): train, dev and importance (None without it).

    labels, problems: as `load_with_data` gives them.
    """
    label_path = os.path.join(data_args.dataset_dir, data_args.label_file)
    importance = None
    if data_args.importance_file:
        path = os.path.join(data_args.dataset_dir, data_args.importance_file)
        importance = read_labelled(path, labels, problems, label_path)
    return *read_splits(data_args, labels, problems), importance


def count_parameters(model):
    """Number of a model's weights."""
    return sum(int(parameter.size) for parameter in model.parameters())


def hold_out(label_ids, seed):
    """Choose HELD_OUT of the rows of every class, at least one where there are two. Returns bool [num_rows]."""
    random, held = np.random.default_rng(seed), np.zeros(len(label_ids), bool)
    for label_id in np.unique(label_ids):
        rows = random.permutation(np.flatnonzero(label_ids == label_id))
        held[rows[:max(1, round(len(rows) * HELD_OUT)) if len(rows) > 1 else 0]] = True
    return held


def list_graphs(folder):
    """{row name: prefix} of the graphs that compress() left: `0.75`, `0.75/mse4_1/int8`; the unpruned one, `1`, first."""
    graphs = {"1": os.path.join(folder, UNPRUNED, "float32")}
    for path, names, files in os.walk(folder):
        names.sort(reverse=True)
        for file in sorted(files, key=lambda file: (file != "pruned_model.pdiparams", file)):
            prefix, extension = os.path.splitext(os.path.join(path, file))
            if extension == ".pdiparams" and prefix != graphs["1"] and file != "model.pdiparams":
                graphs[os.path.relpath(prefix, folder).replace("width_mult_", "").replace("/pruned_model", "")] = prefix
    return graphs


def complete_deployment(prefix, unpruned):
    """Put beside a quantized graph what export_model.py puts beside a graph, taken from the folder `unpruned`."""
    folder, name = os.path.split(prefix)
    if os.path.exists(os.path.join(folder, "deploy.json")):
        return
    for file in os.listdir(unpruned):
        if not file.startswith("float32"):
            shutil.copy(os.path.join(unpruned, file), folder)
    deploy = read_json(os.path.join(folder, "deploy.json"))
    deploy.update(model_file=os.path.basename(graph_file(prefix)), params_file=f"{name}.pdiparams")
    with open(os.path.join(folder, "deploy.json"), "w", encoding="utf-8") as file:
        json.dump(deploy, file, indent=2)


def measure(graphs, tokens, checkpoint, batch_size):
    """Accuracy, macro-F1, logits and CPU seconds per text of exported graphs.

    graphs: {name: prefix}; tokens: TokenizedTexts with labels; checkpoint: that the graphs were made of. Times are the best of
    rounds that take turns: other programs on the machine only ever add to them.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS", 1))
    predictors = {name: open_graph(prefix, threads) for name, prefix in graphs.items()}
    results = {}
    for name, predictor in predictors.items():
        logits = run_by_length(functools.partial(run_graph, predictor), tokens, batch_size, checkpoint.pad_id,
                               len(checkpoint.labels))
        metrics = compute_metrics(SimpleNamespace(predictions=logits, label_ids=tokens.text_labels))
        results[name] = {"accuracy": metrics["accuracy"], "macro_f1": metrics["macro_f1"], "logits": logits,
                         "time": float("inf")}
    chosen = sorted_batches(tokens.lengths, batch_size)[::max(1, len(tokens) // TIMED_TEXTS)]  # spread over all lengths
    chosen = [pad_batch([tokens[index]["input_ids"] for index in indices], checkpoint.pad_id) for indices in chosen]
    for _ in range(TIMED_ROUNDS):
        for name, predictor in predictors.items():
            start = time.perf_counter()
            for batch in chosen:
                run_graph(predictor, batch)
            seconds = (time.perf_counter() - start) / sum(map(len, chosen)) * len(tokens) / tokens.num_texts
            results[name]["time"] = min(results[name]["time"], seconds)
    return results


def make_table(graphs, results, parameters):
    """The end of a run: one line per graph. parameters: {name of a width: number of its parameters}. Returns a str."""
    first = max(map(len, graphs)) + 2
    lines = [f"{'width':<{first}}{'parameters':>12}{'size (MiB)':>12}{'dev accuracy':>14}{'macro-F1':>10}{'CPU ms/text':>13}"]
    for name, prefix in graphs.items():
        size = sum(os.path.getsize(path) for path in (graph_file(prefix), prefix + ".pdiparams")) / 2**20
        row, count = results[name], parameters.get(name.split("/")[0], parameters["1"])
        lines.append(f"{name:<{first}}{count:>12,}{size:>12.1f}{row['accuracy'] * 100:>12.2f} %{row['macro_f1'] * 100:>10.2f}"
                     f"{row['time'] * 1e3:>13.2f}")
    return "\n".join(lines)


def collect_graphs(staging):
    """The graphs that a finished run has left in staging, each with all that a deployment needs beside it.

    Returns {row name: prefix}, as of `list_graphs`.
    """
    for name in os.listdir(staging):  # what quantization-aware training of the whole model leaves outside of folders
        if name.startswith(("int8.", "quant_emb.")):
            os.makedirs(os.path.join(staging, "qat"), exist_ok=True)
            os.replace(os.path.join(staging, name), os.path.join(staging, "qat", name))
    graphs = list_graphs(staging)
    for prefix in graphs.values():
        complete_deployment(prefix, os.path.dirname(graphs["1"]))
    return graphs


def write_cards_of(graphs, results, run, params_dir, dev, dev_file):
    """Write the record of each graph but the unpruned one beside it. results: of `measure`; dev: (texts, label ids)."""
    config = read_json(os.path.join(params_dir, "config.json"))
    temperature = read_calibration(config, params_dir).get("temperature", 1.0)
    for name, prefix in list(graphs.items())[1:]:
        folder, model = os.path.split(prefix)
        width = name.split("/")[0]
        own = {**config, "width_mult": width} if re.fullmatch(r"[\d.]+", width) else config
        if not os.path.exists(os.path.join(folder, "MODEL_CARD.md")):  # else the folder has several graphs
            quality = describe_quality(dev_file, run.labels, results[name]["logits"], dev[1], temperature, is_fitted_here=False)
            write_model_card(folder, os.path.basename(folder), run, own, serving_commands(folder, model), quality)


def publish(graphs, staging, output_dir):
    """Move the folders of all graphs but the unpruned one from staging to output_dir, in the place of older ones."""
    folders = sorted({os.path.relpath(prefix, staging).split(os.sep)[0] for prefix in graphs.values()} - {UNPRUNED})
    for name in folders:
        remove_folder(os.path.join(output_dir, name))
        os.replace(os.path.join(staging, name), os.path.join(output_dir, name))
    get_logger().info(f"Compressed models saved in {', '.join(os.path.join(output_dir, name) for name in folders)}")


def split_tokens(checkpoint, train, importance, seed):
    """Tokenize the rows to train on and those that tell what matters; without importance a part of train is held out.

    train, importance: (texts, label ids), importance or None. Returns two TokenizedTexts.
    """
    tokens = tokenize(train[0], checkpoint.encode, train[1], "Tokenizing training")
    if importance is not None:
        return tokens, tokenize(importance[0], checkpoint.encode, importance[1], "Tokenizing importance")
    held = hold_out(tokens.text_labels, seed)
    get_logger().info(f"{held.sum()} of {len(held)} training rows are held out for importance and selection.")
    return tokens.select(np.flatnonzero(~held)), tokens.select(np.flatnonzero(held))


def compress(trainer, checkpoint, staging):
    """Prune and quantize into the folder staging, which also gets the unpruned graph to compare with."""
    if is_main_rank():
        shutil.rmtree(staging, ignore_errors=True)
        os.makedirs(os.path.join(staging, UNPRUNED))
        write_deployment(checkpoint._replace(model=copy.deepcopy(trainer.trained_model)), os.path.join(staging, UNPRUNED),
                         "float32", with_onnx=False)
    with plain_library_errors(), library_log(logging.INFO):
        trainer.compress(custom_evaluate=evaluate_held_out)
    paddle.disable_static()  # quantizing embeddings leaves Paddle in static mode


def main():
    model_args, data_args, args = parse_dataclasses((ModelArguments, DataArguments, PruneArguments), __doc__)
    args.device = select_device(args.device)
    check_arguments(args)
    checkpoint, (train, dev, importance) = load_with_data(data_args, lambda *found: read_data(data_args, *found),
                                                          model_args.params_dir)
    # what precision the pruned models have at the threshold nobody has measured, and their features are others
    checkpoint = checkpoint._replace(threshold=None, centres=None)
    if getattr(checkpoint.model.config, "prompt", None) is not None:
        raise UserError(f"{model_args.params_dir}: a prompt model, which cannot be pruned, expected a checkpoint made by "
                        "train.py (a prompt model gets smaller and faster by --use_quantize of the deployments)")
    widths = parse_widths(args.width_mult_list or ["3/4"], checkpoint.model.config.num_attention_heads)
    check_earlier(args, widths)
    get_logger().info(f"Data read: {len(train[0])} training and {len(dev[0])} dev texts")
    train_tokens, held_tokens = split_tokens(checkpoint, train, importance, args.seed)
    dev_tokens = tokenize(dev[0], checkpoint.encode, dev[1], "Tokenizing dev")

    check_batch(args, len(train_tokens))
    files = [describe_file(os.path.join(data_args.dataset_dir, name), len(rows[0]), rows[1], len(checkpoint.labels))
             for name, rows in ((data_args.train_file, train), (data_args.dev_file, dev))]
    run = begin_record(given_words(), model_args.params_dir, checkpoint.labels, files)
    if is_main_rank():
        lock_folder(args.output_dir)
    parameters = {"1": count_parameters(checkpoint.model)}
    parameters.update({str(round(width, 2)): count_parameters(narrowed(checkpoint.model, width)) for width in widths})
    paddle.seed(args.seed)
    staging = os.path.join(args.output_dir, STAGING)
    trainer = PruningTrainer(checkpoint, args, widths, staging, train_tokens, held_tokens)
    try:
        compress(trainer, checkpoint, staging)
        if is_main_rank():
            graphs = collect_graphs(staging)
            get_logger().info(f"Measuring {len(graphs)} models on the dev rows ...")
            results = measure(graphs, dev_tokens, checkpoint, args.per_device_eval_batch_size)
            write_cards_of(graphs, results, run, model_args.params_dir, dev, data_args.dev_file)
            table = make_table(graphs, results, parameters)
            publish(graphs, staging, args.output_dir)
            print(table)
            if args.onnx:
                say_next("deploy/predictor/infer.py", "--model_path_prefix",
                         os.path.join(args.output_dir, width_folder(widths[0]), "pruned_model"))
    finally:
        if is_main_rank():
            shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(staging)  # on another host it is empty


if __name__ == "__main__":
    run_script(main)
