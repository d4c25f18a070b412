"""Fine-tune a pretrained ERNIE, ERNIE-M or BERT model into a single-label text classifier.

    python train.py --model_name_or_path ernie-3.0-medium-zh --data_dir ./data/ --output_dir checkpoint --device gpu \\
        --learning_rate 3e-5 --num_train_epochs 100 --early_stopping_patience 4 --max_seq_length 128 \\
        --per_device_eval_batch_size 32 --per_device_train_batch_size 32 --do_train --do_eval \\
        --metric_for_best_model accuracy --load_best_model_at_end --evaluation_strategy epoch --save_strategy epoch \\
        --save_total_limit 1
    python -m paddle.distributed.launch --nproc_per_node 8 --backend gloo train.py ... --device cpu
    python -m paddle.distributed.launch --gpus 0,1 train.py ... --device gpu
    python train.py options.json            # the same options as one JSON object; options after it take precedence

Reads   data_dir/train.txt, dev.txt (<text><tab><label>) and label.txt (one label per line, line order = class id).
Writes  output_dir/: config.json (labels, max_seq_length), model_state.pdparams, tokenizer files, label.txt,
        train_results.json, eval_results.json, trainer_state.json, runs/ (VisualDL), checkpoint-N/ to resume from.
"""

import os
import shutil
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from utils import DEFAULT_LENGTH, check_splits, compare_labels, read_json, read_labelled, read_labels, tokenize
from textcls.checkpoints import (check_length, check_vocabulary, choose_length, config_path, load_model, load_tokenizer,
                                 make_encoder, read_checkpoint_labels, rust_tokenizer)
from textcls.data_files import read_known_labels
from textcls.device import select_device
from textcls.errors import Problems, UserError, is_main_rank, run_script
from textcls.log import get_logger
from textcls.losses import ClassificationLoss
from textcls.outputs import STAGING, complete_folder
from textcls.paddle_setup import paddle
from textcls.scoring import METRICS, compute_metrics
from textcls.trainer import (ClassificationTrainer, DropRemainder, ResumableEarlyStopping, StopAtNonFinite, check_batch,
                             check_training_arguments, collate, list_checkpoints, lock_folder, parse_dataclasses,
                             plain_library_errors, random_state_file, remove_folder)
from textcls.weights import WEIGHTS, check_weights

from paddlenlp.trainer import TrainerCallback, TrainingArguments
from paddlenlp.trainer.trainer_utils import get_last_checkpoint

NEXT_STEPS = """train.py: nothing to do, expected --do_train, --do_eval or both
With the sample data, one step after the other; the folder data also holds a small model without weights:
  train     python train.py --model_name_or_path data --learning_rate 1e-3 --num_train_epochs 12 --do_train --do_eval
  evaluate  python analysis/evaluate.py --report_dir report
  predict   python predict.py
  export    python export_model.py --onnx
  serve     deploy/simple_serving/README.md
With a pretrained model: --model_name_or_path ernie-3.0-medium-zh --learning_rate 3e-5. All options: --help"""
RESUME_FILES = (WEIGHTS, "optimizer.pdopt", "scheduler.pdparams", "trainer_state.json", "config.json")  # and rng_state


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="ernie-3.0-base-zh", metadata={"help": "Built-in model name or model folder."})
    early_stopping_patience: int = field(default=4, metadata={"help": "Stop after so many evaluations without a better "
                                                              "metric; 0 turns early stopping off."})
    loss: str = field(default="cross_entropy", metadata={"help": "Loss function.", "choices": ["cross_entropy", "focal"]})
    focal_gamma: float = field(default=2.0, metadata={"help": "Exponent of the focal loss."})
    class_weights: str = field(default="none", metadata={"help": "balanced: weight classes by 1 / frequency.",
                                                         "choices": ["none", "balanced"]})
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability mass spread over all classes, 0 to 1."})


@dataclass
class DataArguments:
    data_dir: str = field(default="./data/", metadata={"help": "Folder of the data files."})
    train_file: str = field(default="train.txt", metadata={"help": "Training file in data_dir."})
    dev_file: str = field(default="dev.txt", metadata={"help": "Development file in data_dir."})
    label_file: str = field(default="label.txt", metadata={"help": "Label file in data_dir."})
    max_seq_length: Optional[int] = field(default=None, metadata={
        "help": f"Longest text in tokens; longer texts are cut. Default: that of a trained model, else {DEFAULT_LENGTH}."})


@dataclass
class TrainArguments(TrainingArguments):
    output_dir: str = field(default="checkpoint", metadata={"help": "Folder for the model and its checkpoints."})
    report_to: Optional[list[str]] = field(default_factory=lambda: ["visualdl"], metadata={
        "help": "Where the training curves go: visualdl (output_dir/runs), none, or others PaddleNLP knows."})
    device: Optional[str] = field(default=None, metadata={"help": "cpu, gpu, gpu:N, xpu or npu; the default is the GPU if "
                                                          "there is one, else the CPU."})


def check_arguments(model_args, data_args, args):
    """Refuse what would only fail, or mean nothing, after hours of training."""
    check_training_arguments(args)
    evaluates = args.evaluation_strategy.value != "no"
    metrics = ("loss", *METRICS)
    metric = (args.metric_for_best_model or "").replace("eval_", "", 1)
    if metric and metric not in metrics:
        raise UserError(f"--metric_for_best_model {metric}: no such metric, expected one of {', '.join(metrics)}")
    if args.do_train and metric and not evaluates:
        raise UserError(f"--metric_for_best_model {metric} needs an evaluation during training, expected also --do_eval "
                        "--evaluation_strategy epoch")
    if not 0 <= model_args.label_smoothing < 1:
        raise UserError(f"--label_smoothing {model_args.label_smoothing}: out of range, expected 0 up to, not including, 1")
    if not 0 <= model_args.focal_gamma <= 100:
        raise UserError(f"--focal_gamma {model_args.focal_gamma}: out of range, expected 0 to 100")
    for name in ("do_predict", "do_export"):
        if getattr(args, name):
            raise UserError(f"--{name}: not done by train.py, expected predict.py or export_model.py after it")
    if model_args.early_stopping_patience < 0:
        raise UserError(f"--early_stopping_patience {model_args.early_stopping_patience}: out of range, expected 0 or more")
    if os.path.realpath(args.output_dir) == os.path.realpath(data_args.data_dir):
        raise UserError(f"--output_dir {args.output_dir}: is the folder of the data, expected another one")
    if args.prediction_loss_only and metric not in ("", "loss"):
        raise UserError(f"--prediction_loss_only: computes no {metric}, expected --metric_for_best_model loss")
    if args.fp16 and args.device.startswith("cpu"):
        raise UserError("--fp16 needs a GPU, expected --device gpu (or training without --fp16)")


def read_data(data_args, args):
    """Read and check all data files. Returns labels, (train texts, label ids) and (dev texts, label ids)."""
    train_path, dev_path, label_path = (os.path.join(data_args.data_dir, name) for name in
                                        (data_args.train_file, data_args.dev_file, data_args.label_file))
    problems, nothing = Problems(), ([], np.zeros(0, np.int64))
    labels = read_known_labels(label_path, problems)
    train = read_labelled(train_path, labels, problems, label_path) if args.do_train else nothing
    dev = read_labelled(dev_path, labels, problems, label_path) if args.do_eval else nothing
    if not problems.count and args.do_train:
        check_splits(train_path, dev_path, train, dev, labels, problems)
    problems.report()
    return labels, train, dev


def check_row_counts(args, data_args, num_train, num_dev):
    """UserError where there are too few rows for a batch, or for the processes to share them."""
    if args.do_train:
        check_batch(args, num_train)
    if args.do_eval and num_dev < args.dataset_world_size:
        raise UserError(f"{data_args.dev_file}: {num_dev} rows for {args.dataset_world_size} processes, expected at "
                        "least one row per process")


def make_loss(model_args, label_ids, num_classes):
    """The loss that the options ask for; `balanced` gives class c the weight n / (num_classes * n_c)."""
    weights = None
    if model_args.class_weights == "balanced" and len(label_ids):
        counts = np.bincount(label_ids, minlength=num_classes)
        weights = (len(label_ids) / (num_classes * np.maximum(counts, 1)) * (counts > 0)).astype(np.float32)
    gamma = model_args.focal_gamma if model_args.loss == "focal" else 0.0
    if weights is None and not gamma and not model_args.label_smoothing:
        return paddle.nn.CrossEntropyLoss()
    return ClassificationLoss(weights, gamma, model_args.label_smoothing)


def find_resume_point(args):
    """The checkpoint to resume from, or None. An unfinished run in output_dir is never overwritten without being asked."""
    wanted = args.resume_from_checkpoint
    if wanted is not None:
        if not os.path.isdir(wanted):
            raise UserError(f"--resume_from_checkpoint {wanted}: no such folder, expected a checkpoint-N folder made by train.py "
                            "(or the output_dir that holds some)")
        folder = wanted if not list_checkpoints(wanted) else get_last_checkpoint(wanted)
        missing = [name for name in (*RESUME_FILES, random_state_file(args)) if not os.path.isfile(os.path.join(folder, name))]
        if missing:
            raise UserError(f"--resume_from_checkpoint {wanted}: {missing[0]} is missing there, expected a checkpoint-N "
                            "folder made by train.py (or the output_dir that holds some)")
        return folder
    old = list_checkpoints(args.output_dir)
    if old and not args.overwrite_output_dir and not os.path.isfile(os.path.join(args.output_dir, "trainer_state.json")):
        last = get_last_checkpoint(args.output_dir)
        raise UserError(f"{args.output_dir}: holds {os.path.basename(last)} of a training that did not finish, expected "
                        f"--resume_from_checkpoint {last} to go on with it, or --overwrite_output_dir to start anew")
    return None


def check_resume_point(folder, args, labels, label_path, model, num_rows):
    """UserError unless a run with these options can have written the checkpoint to resume from."""
    saved_labels = os.path.join(folder, "label.txt")
    if os.path.isfile(saved_labels):
        compare_labels(read_labels(saved_labels), labels, label_path, folder)
    config = read_json(os.path.join(folder, "config.json"))
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                 "max_position_embeddings", "type_vocab_size"):
        if name in config and config[name] != getattr(model.config, name, None):
            raise UserError(f"--resume_from_checkpoint {folder}: {name} is {config[name]} there and "
                            f"{getattr(model.config, name, None)} in the model, expected the --model_name_or_path it began with")
    check_weights(model, os.path.join(folder, WEIGHTS))
    path = os.path.join(folder, "trainer_state.json")
    state = read_json(path)
    epochs, steps = state.get("epoch"), state.get("global_step")
    if not (isinstance(epochs, (int, float)) and isinstance(steps, int) and isinstance(state.get("log_history"), list)):
        raise UserError(f"{path}: damaged, expected the file that train.py wrote")
    if args.max_steps <= 0 and epochs > args.num_train_epochs:
        raise UserError(f"--num_train_epochs {args.num_train_epochs}: {folder} has {epochs:g} epochs already, expected as many "
                        "or more")
    if 0 < args.max_steps < steps:
        raise UserError(f"--max_steps {args.max_steps}: {folder} has {steps} steps already, expected as many or more")
    batch_size, accumulated = args.per_device_train_batch_size * args.dataset_world_size, args.gradient_accumulation_steps
    batches = num_rows // batch_size if args.dataloader_drop_last else -(-num_rows // batch_size)
    # accumulation leaves batches over, at most a step's in every epoch
    if not 0 <= epochs * batches - steps * accumulated + 0.5 <= (int(epochs) + 1) * accumulated + 0.5:
        raise UserError(f"--resume_from_checkpoint {folder}: made {steps} steps in {epochs:g} epochs, where this run has "
                        f"{batches} batches an epoch, expected the rows, batch size and processes that it began with (to train a "
                        "finished model further, name it with --model_name_or_path)")


def clear_leftovers(args, resume_point):
    """Remove what an earlier run left: half-written staging folders, and before a new training its resume points."""
    for name in os.listdir(args.output_dir) if os.path.isdir(args.output_dir) else []:
        if name.startswith((STAGING, ".deleted-")):
            shutil.rmtree(os.path.join(args.output_dir, name), ignore_errors=True)
    if resume_point is None:
        for folder in list_checkpoints(args.output_dir):
            get_logger().info(f"Deleting [{folder}] of the earlier training in {args.output_dir}")
            remove_folder(folder)
        if os.path.isfile(os.path.join(args.output_dir, "trainer_state.json")):
            os.remove(os.path.join(args.output_dir, "trainer_state.json"))  # stands for a finished training


def tokenize_split(split, encode, max_seq_length, name):
    """Tokenize (texts, label ids) and say how many texts are cut."""
    tokens = tokenize(split[0], encode, split[1], f"Tokenizing {name}")
    full = int((tokens.lengths >= max_seq_length).sum())
    if full:
        get_logger().info(f"{full} of {len(tokens)} {name} texts fill max_seq_length {max_seq_length}; longer ones are cut.")
    return tokens


def check_model(model, folder, args, labels, label_path, resume_point, num_rows):
    """UserError where the model cannot go on with the checkpoint to resume from, or has not learnt these labels."""
    if resume_point:
        check_resume_point(resume_point, args, labels, label_path, model, num_rows)
    if not args.do_train and config_path(folder):
        read_checkpoint_labels(folder, read_json(config_path(folder)), label_path)


def choose_callbacks(model_args, args):
    """The callbacks of this training; says so where early stopping is asked for and cannot work."""
    callbacks = [DropRemainder(), StopAtNonFinite()]
    if args.do_train and model_args.early_stopping_patience > 0:
        if args.load_best_model_at_end and args.evaluation_strategy.value != "no":
            callbacks.append(ResumableEarlyStopping(model_args.early_stopping_patience))
        else:
            get_logger().info("Early stopping is off: it needs --evaluation_strategy and --load_best_model_at_end.")
    return callbacks


class ClearLeftovers(TrainerCallback):
    """Removes the earlier run when the training begins, not before: by then the library has refused what it does not take."""

    def __init__(self, resume_point):
        self.resume_point = resume_point

    def on_train_begin(self, args, state, control, **kwargs):
        if is_main_rank():
            clear_leftovers(args, self.resume_point)


def train_and_save(trainer, args, resume_point):
    """Train, save the model in args.output_dir, complete or not at all, and its metrics."""
    if is_main_rank():
        lock_folder(args.output_dir)
    trainer.add_callback(ClearLeftovers(resume_point))
    with plain_library_errors():
        metrics = trainer.train(resume_from_checkpoint=resume_point).metrics
    StopAtNonFinite().on_log(args, trainer.state, None, metrics)  # before anything is saved
    if args.load_best_model_at_end and trainer.state.best_model_checkpoint is None:
        get_logger().warning("No evaluation took place during the training: the model saved is the last, not the best one. "
                             "Use --evaluation_strategy epoch --save_strategy epoch, or smaller --eval_steps.")
    if is_main_rank():
        with complete_folder(args.output_dir, marker="config.json") as staging:
            trainer.save_model(staging)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)


def main():
    model_args, data_args, args = parse_dataclasses((ModelArguments, DataArguments, TrainArguments), __doc__)
    if not (args.do_train or args.do_eval):
        raise UserError(NEXT_STEPS)
    args.device = select_device(args.device)
    check_arguments(model_args, data_args, args)
    resume_point = find_resume_point(args) if args.do_train else None
    labels, train, dev = read_data(data_args, args)
    label_path = os.path.join(data_args.data_dir, data_args.label_file)
    check_row_counts(args, data_args, len(train[0]), len(dev[0]))

    paddle.seed(args.seed)
    folder = model_args.model_name_or_path
    model = load_model(folder, strict=not args.do_train, ignore_mismatched_sizes=True, num_labels=len(labels),
                       id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)})
    check_model(model, folder, args, labels, label_path, resume_point, len(train[0]))
    max_seq_length = choose_length(data_args.max_seq_length, vars(model.config), folder)
    model.config.max_seq_length = check_length(max_seq_length, model)  # for the scripts that load it later
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, model, folder)
    rust = rust_tokenizer(tokenizer, max_seq_length)
    encode = make_encoder(tokenizer, rust, max_seq_length)
    train_tokens = tokenize_split(train, encode, max_seq_length, "training") if args.do_train else None
    dev_tokens = None
    if args.do_eval:  # the Trainer evaluates in the order given
        dev_tokens = tokenize_split(dev, encode, max_seq_length, "dev").longest_first()

    trainer = ClassificationTrainer(
        labels, rust, args, model=model, criterion=make_loss(model_args, train[1], len(labels)), tokenizer=tokenizer,
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id), train_dataset=train_tokens,
        eval_dataset=dev_tokens, compute_metrics=compute_metrics, callbacks=choose_callbacks(model_args, args))
    if args.do_train:
        train_and_save(trainer, args, resume_point)
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.do_train:
        trainer.save_state()
        get_logger().info(f"Model saved in {args.output_dir}")


if __name__ == "__main__":
    run_script(main)
