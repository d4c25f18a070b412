"""What train.py and few-shot/train.py share: where a training resumes, what it clears away, how its model is saved."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from textcls.common.errors import UserError, is_main_rank
from textcls.common.log import get_logger
from textcls.common.long_texts import MODES
from textcls.common.outputs import STAGING, check_output_folder, complete_folder, lock_folder
from textcls.data.encoders import read_long_text
from textcls.data.files import compare_labels, read_json, read_labels
from textcls.models.model_card import CARDS
from textcls.models.processes import find_folder, is_on_first_host
from textcls.models.weights import HUGGING_FACE_WEIGHTS, WEIGHTS, check_weights
from textcls.training.callbacks import DropRemainder, ResumableEarlyStopping, StopAtNonFinite, metric_name
from textcls.training.long_text_options import VOTE_CHOICES, given_long_text
from textcls.training.scoring import METRICS
from textcls.training.trainer import (
    ClassificationTrainer,
    check_batch,
    list_checkpoints,
    plain_library_errors,
    random_state_file,
    remove_folder,
)

from paddlenlp.trainer import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from paddlenlp.trainer.trainer_utils import get_last_checkpoint
from paddlenlp.transformers import PretrainedModel

RESUME_FILES = (WEIGHTS, "optimizer.pdopt", "scheduler.pdparams", "trainer_state.json", "config.json")  # and rng_state
COPY = f"{STAGING}-resumed"  # of the first host's checkpoint or model, on another host
MODEL_FILES = {"config.json", "model_config.json", WEIGHTS, HUGGING_FACE_WEIGHTS}
STUDY, FOLDS = "study.db", "folds"  # in args.output_dir: what --search and --folds keep, so that the same command goes on
# of an earlier training: the first stands for its end, and what is not written again would seem to belong to the new model
OLD_RESULTS = ("trainer_state.json", "train_results.json", "eval_results.json", "test_results.json", "all_results.json",
               "search.json", "folds.json", *CARDS)


@dataclass
class TrainArguments(TrainingArguments):
    output_dir: str = field(default="checkpoint", metadata={"help": "Folder for the model and its checkpoints."})
    report_to: Optional[list[str]] = field(default_factory=lambda: ["visualdl"], metadata={
        "help": "Where the training curves go: visualdl (output_dir/runs), none, or others PaddleNLP knows."})
    device: Optional[str] = field(default=None, metadata={"help": "cpu, gpu, gpu:N, xpu or npu; the default is the GPU if "
                                                          "there is one, else the CPU."})
    full_embeddings: bool = field(default=False, metadata={"help": "Train the whole table of word embeddings, not only the rows "
                                                           "whose tokens occur: the same result, slower."})
    long_text: Optional[str] = field(default=None, metadata={"choices": MODES, "help": (
        "What is read of a text of more than max_seq_length tokens: cut: its beginning; head_tail: beginning and end; window: "
        "overlapping windows, all of it. Saved with the model. Default: that of a trained model, else cut.")})
    head_share: Optional[float] = field(default=None, metadata={"help": "Of head_tail: the beginning's share, 0 to 1; 0.25."})
    window_stride: Optional[int] = field(default=None, metadata={
        "help": "Of window: tokens from one window to the next; three quarters of a window."})
    max_windows: Optional[int] = field(default=None, metadata={
        "help": "Of window: windows of a text at most, evenly spread over it; 8."})
    window_vote: Optional[str] = field(default=None, metadata={"choices": VOTE_CHOICES, "help": (
        "Of window: the logits of a text are the mean of its windows', or of each class the largest; mean.")})


def check_evaluation(args: TrainingArguments, metrics: Sequence[str] = ("loss", *METRICS)) -> None:
    """Refuse options of TrainArguments that contradict each other. metrics: names. Raises UserError."""
    given_long_text(args)
    evaluates = args.evaluation_strategy.value != "no"
    metric = check_metric(args, metrics)
    if args.do_train and metric and not evaluates:
        raise UserError(f"--metric_for_best_model {metric} needs an evaluation during training, expected also --do_eval "
                        "--evaluation_strategy epoch")
    if args.prediction_loss_only and metric not in ("", "loss"):
        raise UserError(f"--prediction_loss_only: computes no {metric}, expected --metric_for_best_model loss")
    for name in ("fp16", "bf16", "fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name) and args.device.startswith("cpu"):
            raise UserError(f"--{name} needs a GPU, expected --device gpu (or a run without --{name})")


def check_metric(args: TrainingArguments, metrics: Sequence[str]) -> str:
    """Return the name of the metric that decides which model is best, "" for none. metrics: names. Raises UserError."""
    metric = (args.metric_for_best_model or "").replace("eval_", "", 1)
    if metric and metric not in metrics:
        raise UserError(f"--metric_for_best_model {metric}: no such metric, expected one of {', '.join(metrics)}")
    return metric


def check_output_dir(args: TrainingArguments, data_dir: str, model_folder: str, saves_model: bool) -> None:
    """UserError where args.output_dir cannot be written to, or where that would cost the user files: data, the model that the
    training begins with and, without --overwrite_output_dir, any other model and an unfinished training.

    saves_model: whether a model goes there; else only the results of an evaluation do.
    """
    folder, inputs, is_new = args.output_dir, {"the folder of the data": data_dir}, args.resume_from_checkpoint is None
    if saves_model and is_new:
        inputs["the model to begin with"] = model_folder
    check_output_folder(folder, "--output_dir", inputs, "config.json" if saves_model else None)
    check_output_folder(args.logging_dir, "--logging_dir")
    if not (saves_model and is_new and os.path.isdir(folder)):
        return
    checkpoints = list_checkpoints(folder)
    if os.path.realpath(model_folder) in map(os.path.realpath, checkpoints):
        raise UserError(f"--output_dir {folder}: holds {model_folder}, with which the training begins and which it would delete, "
                        "expected another folder")
    names = os.listdir(folder)
    for name, option in ((STUDY, "search"), (FOLDS, "folds")):
        if name in names and not getattr(args, option, None):
            raise UserError(f"--output_dir {folder}: holds {name} of a training by --{option}, which would take the new model "
                            f"for its own, expected another folder, or one without {name}")
    goes_on = (getattr(args, "search", False) and STUDY in names) or (getattr(args, "folds", 0) and FOLDS in names)
    if args.overwrite_output_dir or goes_on:  # which checks what is there itself
        return
    if checkpoints and "trainer_state.json" not in names:
        last = get_last_checkpoint(folder)
        raise UserError(f"{folder}: holds {os.path.basename(last)} of a training that did not finish, expected "
                        f"--resume_from_checkpoint {last} to go on with it, or --overwrite_output_dir to start anew")
    if MODEL_FILES.intersection(names):
        raise UserError(f"{folder}: holds a model, expected another --output_dir, or --overwrite_output_dir to replace it")


def find_resume_point(args: TrainingArguments) -> Optional[str]:
    """Return the checkpoint that --resume_from_checkpoint names, or None. UserError where it is not whole.

    On several hosts it is that of the first one; hosts without it get a copy in args.output_dir.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    folder = get_last_checkpoint(wanted) if list_checkpoints(wanted) else wanted
    if is_on_first_host():
        check_whole(args, wanted, folder)
    return find_folder("checkpoint", folder, os.path.join(args.output_dir, COPY))


def check_whole(args: TrainingArguments, wanted: str, folder: str) -> None:
    """UserError where the checkpoint to resume from is not whole. wanted: the option; folder: of the checkpoint."""
    if not os.path.isdir(wanted):
        raise UserError(f"--resume_from_checkpoint {wanted}: no such folder, expected a checkpoint-N folder made by train.py "
                        "(or the output_dir that holds some)")
    names, own = os.listdir(folder), random_state_file(args)
    others = [name for name in names if name.startswith("rng_state") and name != own]
    if own not in names and others:
        get_logger().warning(f"{folder} is of a run with another number of processes: this one goes on from there, but not "
                             "exactly as that one would have.")
    missing = [name for name in (*RESUME_FILES, *(() if others else (own,))) if name not in names]
    if missing:
        raise UserError(f"--resume_from_checkpoint {wanted}: {missing[0]} is missing there, expected a checkpoint-N folder made "
                        "by train.py (or the output_dir that holds some)")


def check_resume_point(folder: str, args: TrainingArguments, labels: list[str], label_path: str, model: PretrainedModel,
                       num_rows: int) -> None:
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
    epochs, steps, log = state.get("epoch"), state.get("global_step"), state.get("log_history")
    if not (isinstance(epochs, (int, float)) and isinstance(steps, int) and isinstance(log, list)
            and all(isinstance(entry, dict) for entry in log) and state.keys() <= vars(TrainerState()).keys()):
        raise UserError(f"{path}: damaged, expected the file that train.py wrote")
    if args.max_steps <= 0 and epochs > args.num_train_epochs:
        raise UserError(f"--num_train_epochs {args.num_train_epochs}: {folder} has {epochs:g} epochs already, expected as many "
                        "or more")
    if 0 < args.max_steps < steps:
        raise UserError(f"--max_steps {args.max_steps}: {folder} has {steps} steps already, expected as many or more")
    if getattr(args, "tokens_per_batch", None) is None:
        batch_size = args.per_device_train_batch_size * args.dataset_world_size
        check_steps(folder, args, state, num_rows // batch_size if args.dataloader_drop_last else -(-num_rows // batch_size))


def check_same_reading(folder: str, model: PretrainedModel) -> None:
    """UserError where a training that is resumed would read long texts otherwise than it began."""
    saved = read_long_text(read_json(os.path.join(folder, "config.json")), os.path.join(folder, "config.json"))
    own = read_long_text(vars(model.config), "config.json")
    if saved != own:
        raise UserError(f"--resume_from_checkpoint {folder}: began with --long_text {saved.mode} ({saved}), and this run has "
                        f"{own.mode} ({own}), expected the options it began with")


def check_steps(folder: str, args: TrainingArguments, state: dict, batches: int) -> None:
    """UserError unless a training with so many batches an epoch can have come to the state of a checkpoint."""
    epochs, steps, accumulated = state["epoch"], state["global_step"], args.gradient_accumulation_steps
    # accumulation leaves batches over, at most a step's in every epoch
    if not 0 <= epochs * batches - steps * accumulated + 0.5 <= (int(epochs) + 1) * accumulated + 0.5:
        raise UserError(f"--resume_from_checkpoint {folder}: made {steps} steps in {epochs:g} epochs, where this run has "
                        f"{batches} batches an epoch, expected the rows that it began with, and as many texts a step "
                        "(--per_device_train_batch_size times processes; to train a finished model further, name it with "
                        "--model_name_or_path)")


def clear_leftovers(args: TrainingArguments, resume_point: Optional[str]) -> None:
    """Remove what an earlier run left: half-written staging folders, and before a new training its resume points."""
    for name in os.listdir(args.output_dir) if os.path.isdir(args.output_dir) else []:
        if name.startswith((STAGING, ".deleted-")):
            shutil.rmtree(os.path.join(args.output_dir, name), ignore_errors=True)
    if resume_point is None:
        for folder in list_checkpoints(args.output_dir):
            get_logger().info(f"Deleting [{folder}] of the earlier training in {args.output_dir}")
            remove_folder(folder)
        for name in OLD_RESULTS:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(args.output_dir, name))


class ClearLeftovers(TrainerCallback):
    """Removes the earlier run when the training begins, not before: by then the library has refused what it does not take."""

    def __init__(self, resume_point: Optional[str]):
        self.resume_point = resume_point

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if is_main_rank():
            clear_leftovers(args, self.resume_point)


def choose_callbacks(args: TrainingArguments, patience: int) -> list[TrainerCallback]:
    """Return the callbacks of a training, and log where early stopping cannot work.

    patience: evaluations without a better metric after which the training stops, 0 for none.
    """
    callbacks = [DropRemainder(), StopAtNonFinite()]
    if args.do_train and patience > 0:
        if args.load_best_model_at_end and args.evaluation_strategy.value != "no":
            callbacks.append(ResumableEarlyStopping(patience))
        else:
            get_logger().info("Early stopping is off: it needs --evaluation_strategy and --load_best_model_at_end.")
    return callbacks


@contextlib.contextmanager
def telling_what_is_kept(output_dir: str) -> Iterator[None]:
    """Log which checkpoint a training leaves that Ctrl-C or SIGTERM ends in the block."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        checkpoint = get_last_checkpoint(output_dir)
        if is_main_rank() and not os.path.basename(output_dir).startswith(STAGING):  # of a cross-validation, which leaves none
            get_logger().warning(f"{checkpoint} is kept, and --resume_from_checkpoint goes on from there" if checkpoint else
                                 "no checkpoint has been written yet: nothing of the training is kept")
        raise


def train_and_save(trainer: ClassificationTrainer, args: TrainingArguments, resume_point: Optional[str]) -> None:
    """Train, save the model in args.output_dir, complete or not at all, and its metrics."""
    trainer.compare_data()
    if is_main_rank():
        lock_folder(args.output_dir)
    count = sum(int(parameter.size) for parameter in trainer.model.parameters())
    get_logger().info(f"Model: {type(trainer.model).__name__}, {count:,} parameters, {len(trainer.labels)} labels, "
                      f"texts of up to {trainer.model.config.max_seq_length} tokens")
    trainer.add_callback(ClearLeftovers(resume_point))
    if resume_point:
        check_same_reading(resume_point, trainer.model)
    if resume_point and getattr(args, "tokens_per_batch", None) is not None:  # else checked before the texts were tokenized
        check_steps(resume_point, args, read_json(os.path.join(resume_point, "trainer_state.json")),
                    len(trainer.get_train_dataloader()))
    with plain_library_errors(), telling_what_is_kept(args.output_dir):
        metrics = trainer.train(resume_from_checkpoint=resume_point).metrics
    if resume_point and os.path.basename(resume_point) == COPY:
        shutil.rmtree(resume_point, ignore_errors=True)
    StopAtNonFinite().on_log(args, trainer.state, None, metrics)  # before anything is saved
    if args.load_best_model_at_end and trainer.state.best_model_checkpoint is None:
        get_logger().warning("No evaluation took place during the training: the model saved is the last, not the best one. "
                             "Use --evaluation_strategy epoch --save_strategy epoch, or smaller --eval_steps.")
    if trainer.state.best_metric is not None:
        get_logger().info(f"Final best {metric_name(args).partition('_')[2]}: {trainer.state.best_metric:.5f}")
    if is_main_rank():
        with complete_folder(args.output_dir, marker="config.json") as staging:
            trainer.save_model(staging)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)


def check_row_counts(args: TrainingArguments, dev_file: str, num_train: int, num_dev: int) -> None:
    """Log how many rows were read; UserError where they are too few for a batch, or for the processes to share them."""
    get_logger().info(f"Data read: {num_train} training and {num_dev} dev texts")
    if args.do_train:
        check_batch(args, num_train)
    if args.do_eval and num_dev < args.dataset_world_size:
        raise UserError(f"{dev_file}: {num_dev} rows for {args.dataset_world_size} processes, expected at "
                        "least one row per process")
