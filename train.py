"""Fine-tune a pretrained ERNIE, ERNIE-M or BERT model into a single-label text classifier.

    python train.py --model_name_or_path ernie-3.0-medium-zh --data_dir ./data/ --output_dir checkpoint --device gpu \\
        --learning_rate 3e-5 --num_train_epochs 100 --early_stopping_patience 4 --max_seq_length 128 \\
        --per_device_eval_batch_size 32 --per_device_train_batch_size 32 --do_train --do_eval \\
        --metric_for_best_model accuracy --load_best_model_at_end --evaluation_strategy epoch --save_strategy epoch \\
        --save_total_limit 1
    python -m paddle.distributed.launch --nproc_per_node 8 --backend gloo train.py ... --device cpu
    python -m paddle.distributed.launch --gpus 0,1 train.py ... --device gpu
    python train.py --teacher checkpoint --student_layers 3 --data_file unlabelled.txt --output_dir student --do_train ...
    python -m textcls.launch --master 10.0.0.1:6170 --nnodes 2 --rank 0 train.py ... --device cpu     # on each host: its rank
    python train.py options.json            # the same options as one JSON object; options after it take precedence
    python train.py ... --search --n_trials 20      # looks for better settings first; the same command goes on after a kill
    python train.py ... --folds 5                   # without dev.txt: cross-validation, then one model of all rows

Reads   data_dir/train.txt, dev.txt (<text><tab><label>) and label.txt (one label per line, line order = class id).
Writes  output_dir/: config.json (labels, max_seq_length, temperature), model_state.pdparams, tokenizer files, label.txt,
        known.npz (--known centres), train_results.json, eval_results.json, trainer_state.json, runs/ (VisualDL), checkpoint-N/
        to resume from; MODEL_CARD.md and MODEL_CARD_en.md, the record of the training; with --search study.db and search.json,
        with --folds folds/, folds.json and, for analysis/, out_of_fold.npz, with --teacher teacher_logits.npz, its answers.
"""

import functools
import os
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import numpy as np

from textcls.common.digests import rows_id
from textcls.common.errors import Problems, UserError, is_main_rank, run_script
from textcls.common.log import get_logger, say_next
from textcls.models.checkpoints import load_model
from textcls.models.configs import check_length, choose_length, config_path, read_checkpoint_labels, read_prompt
from textcls.models.device import select_device
from textcls.models.loading import read_known_labels
from textcls.models.model_card import describe_file
from textcls.models.paddle_setup import paddle
from textcls.models.tokenizers import check_vocabulary, load_tokenizer, make_encoder, rust_tokenizer
from textcls.training.calibration import CALIBRATIONS, calibrate_model, warn_of_few_rows
from textcls.training.distillation import DistillationArguments, check_distillation, make_student, read_unlabelled
from textcls.training.dry_run import estimate_training
from textcls.training.folds import OUT_OF_FOLD, check_folds_options, train_in_folds
from textcls.training.long_text_options import check_long_text_options, choose_long_text, save_long_text, tokenize_split
from textcls.training.losses import ClassificationLoss, SoftLabelLoss
from textcls.training.record import begin_record, with_found, write_record
from textcls.training.resume import (
    check_evaluation,
    check_output_dir,
    check_resume_point,
    check_row_counts,
    choose_callbacks,
    find_resume_point,
    train_and_save,
)
from textcls.training.runs import change_options, describe_options
from textcls.training.scoring import KeptMetrics
from textcls.training.search import SearchArguments, check_search, search_settings
from textcls.training.trainer import (
    ClassificationTrainer,
    check_limits,
    check_training_arguments,
    collate,
    given_words,
    parse_dataclasses,
)
from textcls.training.unknown import WAYS, save_known
from utils import DEFAULT_LENGTH, check_splits, read_json, read_labelled

NO_ROWS = ([], np.zeros(0, np.int64))  # texts and label ids
NEXT_STEPS = """train.py: nothing to do, expected --do_train, --do_eval or both
With the sample data, one step after the other; the folder data also holds a small model without weights:
  train     python train.py --model_name_or_path data --learning_rate 1e-3 --num_train_epochs 12 --do_train --do_eval
  evaluate  python analysis/evaluate.py --report_dir report
  predict   python predict.py
  export    python export_model.py --onnx
  serve     deploy/simple_serving/README.md
With a pretrained model: --model_name_or_path ernie-3.0-medium-zh --learning_rate 3e-5. All options: --help"""


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
    calibrate: str = field(default="temperature", metadata={
        "help": "temperature: fit one to the dev texts after the training, so that probabilities can be trusted; none: leave "
        "them as they are.", "choices": CALIBRATIONS})
    known: str = field(default="none", metadata={
        "help": "centres: find after the training where the labels' texts are, so that answers say how probably a text is of a "
        "known label at all; none: do not.", "choices": WAYS})


@dataclass
class DataArguments:
    data_dir: str = field(default="./data/", metadata={"help": "Folder of the data files."})
    train_file: str = field(default="train.txt", metadata={"help": "Training file in data_dir."})
    dev_file: str = field(default="dev.txt", metadata={"help": "Development file in data_dir."})
    label_file: str = field(default="label.txt", metadata={"help": "Label file in data_dir."})
    max_seq_length: Optional[int] = field(default=None, metadata={
        "help": "Longest text in tokens; how longer ones are read is said by --long_text. Default: that of a trained model, else "
                f"{DEFAULT_LENGTH}."})


@dataclass
class FineTuningArguments(SearchArguments):
    folds: int = field(default=0, metadata={"help": "Train in so many folds of the training file, without a dev file: each row "
                                            "is judged by a model that has not seen it; then train on all rows. Goes on where "
                                            "it was stopped."})
    tokens_per_batch: Optional[int] = field(default=None, metadata={
        "help": "Batches of about so many tokens in the place of --per_device_train_batch_size texts: faster where texts are "
                "short, another training."})
    dry_run: bool = field(default=False, metadata={"help": "Check data and options, time some steps, say what time, memory and "
                                                   "disk the training will take; write nothing."})


class Options(NamedTuple):
    """All options but those of the Trainer."""

    model: ModelArguments
    data: DataArguments
    distillation: DistillationArguments


class Data(NamedTuple):
    """What was read: of train and dev texts and label ids, int64 [num_texts]."""

    labels: list[str]
    train: tuple[list[str], np.ndarray]
    dev: tuple[list[str], np.ndarray]
    unlabelled: list[str]


def check_arguments(options, args):
    """Refuse what would only fail, or mean nothing, after hours of training. Returns the tokens that a text may have."""
    model_args, data_args, distillation = options
    check_training_arguments(args)
    check_evaluation(args)
    changed = {name: getattr(model_args, name) for name in vars(ModelArguments()) if
               getattr(model_args, name) != getattr(ModelArguments(), name)}
    is_named = any(word.split("=")[0] == "--model_name_or_path" for word in given_words())
    check_distillation(distillation, args, model_args.model_name_or_path if is_named else None,
                       sorted({"loss", "class_weights", "label_smoothing"}.intersection(changed)))
    if distillation.student_layers is not None:
        model_args.model_name_or_path = distillation.teacher
    check_output_dir(args, data_args.data_dir, model_args.model_name_or_path, args.do_train)
    if not 0 <= model_args.label_smoothing < 1:
        raise UserError(f"--label_smoothing {model_args.label_smoothing}: out of range, expected 0 up to, not including, 1")
    check_limits(model_args, {"focal_gamma": (0, 100), "early_stopping_patience": (0, 10**9)})
    if args.dry_run and not args.do_train:
        raise UserError("--dry_run: times a training, expected also --do_train")
    check_search(args)
    check_folds_options(args, args.folds)
    if args.folds and model_args.known != "none":
        raise UserError(f"--known {model_args.known}: is fitted to a dev file, which --folds does without, expected a run "
                        "without one of them")
    if bool(args.folds) + args.search + args.dry_run > 1:
        raise UserError("--search, --folds and --dry_run: three ways to run, expected only one of them")
    if distillation.teacher is not None and (args.folds or args.search):
        raise UserError("--teacher: trains one student, expected neither --search nor --folds with it")
    for name in ("do_predict", "do_export"):
        if getattr(args, name):
            raise UserError(f"--{name}: not done by train.py, expected predict.py or export_model.py after it")
    folder = model_args.model_name_or_path
    config = config_path(folder)
    max_seq_length = choose_length(data_args.max_seq_length, read_json(config) if config else {}, folder)
    check_long_text_options(args, max_seq_length, folder)
    if args.tokens_per_batch is not None and not max_seq_length <= args.tokens_per_batch <= 10**9:
        raise UserError(f"--tokens_per_batch {args.tokens_per_batch}: out of range, expected {max_seq_length} (max_seq_length) "
                        "or more")
    return max_seq_length


def read_data(options, args):
    """Read and check all data files. Returns Data; what args do not need is empty."""
    data_args = options.data
    train_path, dev_path, label_path = (os.path.join(data_args.data_dir, name) for name in
                                        (data_args.train_file, data_args.dev_file, data_args.label_file))
    problems, nothing = Problems(), NO_ROWS
    labels = read_known_labels(label_path, problems)
    train = read_labelled(train_path, labels, problems, label_path) if args.do_train else nothing
    dev = read_labelled(dev_path, labels, problems, label_path) if args.do_eval else nothing
    unlabelled = read_unlabelled(options.distillation, data_args.data_dir, dev, dev_path, problems)
    if not problems.count and args.do_train:
        check_splits(train_path, dev_path, train, dev, labels, problems)
    problems.report()
    return Data(labels, train, dev, unlabelled)


def note_run(options, data):
    """What the record of the training says of its beginning."""
    names = [os.path.join(options.data.data_dir, name) for name in (options.data.train_file, options.data.dev_file)]
    files = [describe_file(name, len(texts), label_ids, len(data.labels))
             for name, (texts, label_ids) in zip(names, (data.train, data.dev)) if texts]
    if data.unlabelled:
        files.append(describe_file(os.path.join(options.data.data_dir, options.distillation.data_file), len(data.unlabelled)))
    return begin_record(given_words(), options.model.model_name_or_path, data.labels, files)


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


def check_model(model, folder, args, labels, label_path, resume_point, num_rows):
    """UserError where the model cannot go on with the checkpoint to resume from, or has not learnt these labels (a prompt model
    has words for its own labels only, so that it cannot learn others, either)."""
    if resume_point:
        check_resume_point(resume_point, args, labels, label_path, model, num_rows)
    if config_path(folder) and (not args.do_train or getattr(model.config, "prompt", None) is not None):
        read_checkpoint_labels(folder, read_json(config_path(folder)), label_path)


def finish_model(options, args, data, run, evaluation, train_tokens, dev_tokens):
    """Fit to the trained model in args.output_dir what options ask for, and write its record. evaluation: KeptMetrics of dev."""
    if options.model.calibrate == "temperature":
        calibrate_model(args.output_dir, evaluation.logits, data.dev, options.data.dev_file, evaluation.label_ids)
    if options.model.known == "centres":
        save_known(args.output_dir, train_tokens, dev_tokens, options.data.dev_file, args.per_device_eval_batch_size)
    elif (path := config_path(options.model.model_name_or_path)) and read_json(path).get("known"):
        get_logger().info(f"{options.model.model_name_or_path} tells unknown texts, and the new model does not: for one that "
                          "does, --known centres.")
    if run is not None:
        write_record(args.output_dir, run, options.data.dev_file, evaluation.logits, evaluation.label_ids)


def train_model(options, args, data, run, max_seq_length, resume_point=None, callbacks=()):
    """Load the model, then train, evaluate and save it in args.output_dir, as far as args ask for it.

    run: of `note_run`, or None where no record is written; callbacks: beside those that the options choose.
    """
    model_args, distillation, labels, train = options.model, options.distillation, data.labels, data.train
    paddle.seed(args.seed)
    folder, label_path = model_args.model_name_or_path, os.path.join(options.data.data_dir, options.data.label_file)
    if distillation.teacher is None:
        criterion = make_loss(model_args, train[1], len(labels))
    else:
        criterion = SoftLabelLoss(distillation.distill_temperature)
        student = make_student(distillation, args, folder, labels, label_path, train[0] + data.unlabelled)
        folder, train = student.folder.name, (student.texts, student.targets)
    model = load_model(folder, strict=not args.do_train, ignore_mismatched_sizes=True, num_labels=len(labels),
                       id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)})
    check_model(model, folder, args, labels, label_path, resume_point, len(train[0]))
    model.config.max_seq_length = check_length(max_seq_length, model)  # for the scripts that load it later
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, model, folder)
    prompt, long_text = read_prompt(vars(model.config), folder), choose_long_text(args, vars(model.config), folder)
    save_long_text(model, long_text)
    rust = rust_tokenizer(tokenizer, prompt=prompt)
    encode = make_encoder(tokenizer, rust, max_seq_length, prompt, long_text)
    train_tokens = tokenize_split(train, encode, "training") if args.do_train else None
    dev_tokens = None
    if args.do_eval:  # the Trainer evaluates in the order given
        dev_tokens = tokenize_split(data.dev, encode, "dev").longest_first()

    evaluation = KeptMetrics(dev_tokens)
    make_trainer = functools.partial(
        ClassificationTrainer, labels, rust, args, model=model, criterion=criterion, tokenizer=tokenizer,
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id), train_dataset=train_tokens,
        eval_dataset=dev_tokens, compute_metrics=evaluation,
        callbacks=[*choose_callbacks(args, model_args.early_stopping_patience), *callbacks])
    if args.dry_run:
        return estimate_training(args, make_trainer)
    trainer = make_trainer()
    if args.do_train:
        train_and_save(trainer, args, resume_point)
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.do_train:
        if is_main_rank():
            finish_model(options, args, data, run, evaluation, train_tokens, dev_tokens)
        trainer.save_state()
        get_logger().info(f"Model saved in {args.output_dir}")


def train_often(options, args, data, run, max_seq_length):
    """As `train_model`, after a search for settings, or in folds and then on all rows."""
    def train_one(settings, args, train, dev, run, callbacks):
        own = options._replace(model=change_options(options.model, settings))
        with paddle.utils.unique_name.guard():  # parameters have the names that they have in a process of their own
            train_model(own, args, data._replace(train=train, dev=dev), run, max_seq_length, find_resume_point(args), callbacks)

    record = {"labels": data.labels, "training rows": rows_id(*data.train), "dev rows": rows_id(*data.dev),
              **describe_options(options.model, options.data, args)}
    if args.search:
        search_settings(options.model, args, record, data.dev, lambda settings, args, callbacks: train_one(
            settings, args, data.train, data.dev, with_found(run, settings), callbacks))
    else:  # one temperature is fitted to all folds together, and one record written
        file = options.data.train_file

        def finish(logits):
            if options.model.calibrate == "temperature":
                calibrate_model(args.output_dir, logits, data.train, file)
            write_record(args.output_dir, run, f"{file} (--folds {args.folds})", logits, data.train[1])

        train_in_folds(args, args.folds, data.labels, data.train, os.path.join(options.data.data_dir, file), record,
                       lambda train, dev, args, callbacks: train_one({"calibrate": "none"}, args, train, dev, None, callbacks),
                       finish)


def main():
    *all_options, args = parse_dataclasses((ModelArguments, DataArguments, DistillationArguments, FineTuningArguments), __doc__)
    options = Options(*all_options)
    if not (args.do_train or args.do_eval):
        raise UserError(NEXT_STEPS)
    args.device = select_device(args.device)
    max_seq_length = check_arguments(options, args)
    args.do_eval = args.do_eval and not args.folds  # a fold is evaluated on the rows that it holds out
    resume_point = find_resume_point(args) if args.do_train else None
    data = read_data(options, args)
    check_row_counts(args, options.data.dev_file, len(data.train[0]) + len(data.unlabelled), len(data.dev[0]))
    if len(data.dev[0]) and args.do_train and options.model.calibrate == "temperature":
        warn_of_few_rows(len(data.dev[0]), options.data.dev_file)
    run = note_run(options, data)
    if args.search or args.folds:
        train_often(options, args, data, run, max_seq_length)
    else:
        train_model(options, args, data, run, max_seq_length, resume_point)
    if args.do_train and not args.dry_run:
        folds = ["--out_of_fold", os.path.join(args.output_dir, OUT_OF_FOLD)] if args.folds else []
        say_next("analysis/evaluate.py", "--dataset_dir", options.data.data_dir, "--params_path", args.output_dir, *folds,
                 "--report_dir", "report")


if __name__ == "__main__":
    run_script(main)
