"""From a template and texts to a trained prompt model in a folder."""

import functools
import json
import os
import re
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Optional

import numpy as np

from textcls.common.errors import UserError, is_main_rank
from textcls.common.log import get_logger, progress_bar
from textcls.common.outputs import complete_file, complete_folder
from textcls.data.files import read_json
from textcls.data.prompts import Part, compile_template
from textcls.data.tokens import TokenizedTexts, tokenize
from textcls.models.checkpoints import Checkpoint, load_model
from textcls.models.configs import check_length, config_path
from textcls.models.families import count_positions
from textcls.models.inference import predict_logits
from textcls.models.paddle_setup import paddle
from textcls.models.prompt_model import make_prompt_model
from textcls.models.tokenizers import make_encoder, rust_tokenizer
from textcls.training.long_text_options import choose_long_text, save_long_text, tokenize_split
from textcls.training.prompt_training import PromptTrainer, SaveBest, pretrain
from textcls.training.resume import TrainArguments, check_resume_point, choose_callbacks, find_resume_point, train_and_save
from textcls.training.runs import change_folder, is_finished, without_evaluation
from textcls.training.scoring import compute_metrics
from textcls.training.trainer import collate

if TYPE_CHECKING:
    from paddlenlp.trainer import TrainerCallback
    from paddlenlp.transformers import PretrainedModel, PretrainedTokenizer

Split = tuple[list[str], np.ndarray]  # texts and their label ids
MOST_NEUTRAL_TEXTS = 500  # to calibrate on
NO_ROWS: Split = ([], np.zeros(0, np.int64))


class Splits(NamedTuple):
    """The data of a run; what it does not use is empty."""

    train: Split
    dev: Split
    test: Split
    data: list[str]  # unlabelled texts like those of train
    pretrain: list[str]  # texts to train the masked LM on first


class Task(NamedTuple):
    """What all models of one run have in common."""

    model_folder: str  # of the masked LM, or its built-in name
    labels: list[str]  # position = class id
    label_path: str
    words: list[list[str]]  # of each class
    word_ids: list[list[list[int]]]  # the same as token ids
    tokenizer: "PretrainedTokenizer"
    verbalizer: str  # soft: the classifier is trained; manual: it stays at the label words
    patience: int  # of early stopping
    neutral_texts: list[str]  # over them no label shall be liked more than another before the training; []: as it comes
    fits_temperature: bool  # to dev, after the training


def check_templates(task: Task, templates: list[list[Part]], args: TrainArguments) -> None:
    """Raise UserError where a template leaves no room for a text, or nothing to train: before any model is trained."""
    masked_lm = load_model(task.model_folder, head="MaskedLM")
    most = count_positions(masked_lm)
    for number, template in enumerate(templates, 1):
        prompt, _ = compile_template(template, task.words, task.tokenizer, masked_lm.config.vocab_size)
        least = len(prompt.before) + len(prompt.after) + 1
        if most < least:
            raise UserError(f"--prompt: template {number} takes {least - 1} tokens, which leaves no room for a text in the "
                            f"{most} of this model, expected a shorter one")
        if args.max_seq_length < least:
            raise UserError(f"--max_seq_length {args.max_seq_length}: out of range, expected {least} to {most} for this model "
                            f"and the template {template}")
        if args.freeze_plm and task.verbalizer == "manual" and not (prompt.num_soft or prompt.prefix_length):
            raise UserError("--freeze_plm with --verbalizer manual: nothing is left to train, expected soft tokens in the "
                            "prompt, or only one of the two options")


def build_model(task: Task, template: list[Part], args: TrainArguments) -> Checkpoint:
    """Build an untrained prompt model."""
    masked_lm = load_model(task.model_folder, head="MaskedLM")
    prompt, starts = compile_template(template, task.words, task.tokenizer, masked_lm.config.vocab_size)
    model = make_prompt_model(masked_lm, prompt, task.word_ids, starts, task.labels)
    length = check_length(min(args.max_seq_length, count_positions(model)), model)
    model.config.max_seq_length = length
    long_text = choose_long_text(args, vars(model.config), task.model_folder)
    save_long_text(model, long_text)
    if args.freeze_plm:
        model.freeze(args.freeze_dropout)
    if task.verbalizer == "manual":
        for parameter in model.classifier.parameters():
            parameter.stop_gradient = True
    rust = rust_tokenizer(task.tokenizer, prompt=prompt)
    encode = make_encoder(task.tokenizer, rust, length, prompt, long_text)
    return Checkpoint(model, task.tokenizer, rust, encode, task.labels, length, task.tokenizer.pad_token_id)


def make_trainer(checkpoint: Checkpoint, args: TrainArguments, train: Optional[TokenizedTexts] = None,
                 dev: Optional[TokenizedTexts] = None, loss: Optional[paddle.nn.Layer] = None,
                 callbacks: "Sequence[TrainerCallback]" = ()) -> PromptTrainer:
    """Make the Trainer of a prompt model. loss: None: cross entropy."""
    return PromptTrainer(checkpoint.labels, checkpoint.rust_tokenizer, args, model=checkpoint.model,
                         criterion=loss or paddle.nn.CrossEntropyLoss(), tokenizer=checkpoint.tokenizer,
                         data_collator=lambda rows: collate(rows, checkpoint.pad_id), train_dataset=train, eval_dataset=dev,
                         compute_metrics=functools.partial(compute_metrics, tokens=dev), callbacks=list(callbacks))


def begin_run(args: TrainArguments, record: dict[str, object]) -> None:
    """Note in args.output_dir/run.json what a run is made of, and clear what an earlier run left there; of a run that is resumed
    compare it. record: of `describe_run`. UserError where it differs, where there is nothing to resume, or where an
    unfinished run would be lost."""
    path, resumed = os.path.join(args.output_dir, "run.json"), args.resume_from_checkpoint
    if resumed is None:
        names = os.listdir(args.output_dir) if os.path.isdir(args.output_dir) else []
        old = [name for name in names if name == "pretrained" or re.fullmatch(r"prompt-\d+-seed-\d+", name)]
        if old and not args.overwrite_output_dir:
            unfinished = [name for name in old if not is_finished(os.path.join(args.output_dir, name))]
            raise UserError(f"{args.output_dir}: holds the unfinished {(unfinished + old)[0]}, expected --resume_from_checkpoint "
                            f"{args.output_dir} to go on, or --overwrite_output_dir to start anew")
        for name in old:
            shutil.rmtree(os.path.join(args.output_dir, name))
        for name in {"members.json", "run.json"}.intersection(names):
            os.remove(os.path.join(args.output_dir, name))
        with complete_file(path) as output:
            json.dump(record, output, ensure_ascii=False, indent=1)
        return
    is_here = os.path.realpath(args.output_dir) in (os.path.realpath(resumed), os.path.dirname(os.path.realpath(resumed)))
    if not os.path.isdir(resumed) or (is_here and not os.path.isfile(path)):
        raise UserError(f"--resume_from_checkpoint {resumed}: holds no run of few-shot/train.py, expected its --output_dir")
    before = read_json(path) if os.path.isfile(path) else record
    different = [name for name, value in record.items() if before.get(name) != value]
    if different:
        raise UserError(f"--resume_from_checkpoint {resumed}: {', '.join(different)} are not those that this run began with "
                        f"({path}), expected the same ones, or a run without it, which starts anew")


def choose_neutral_texts(splits: Splits, labels: list[str]) -> list[str]:
    """Choose the texts to calibrate on: some of data.txt, where it has enough, else those of train."""
    texts = splits.data or splits.train[0]
    if splits.data and len(texts) < 5 * len(labels):
        get_logger().warning(f"data.txt has {len(texts)} texts, too few to calibrate on, expected {5 * len(labels)} or more.")
        texts = splits.train[0]
    return texts[::-(-len(texts) // MOST_NEUTRAL_TEXTS)] if texts else []


def save_pretrained(model: "PretrainedModel", tokenizer: "PretrainedTokenizer", folder: str) -> None:
    """Save a model and its tokenizer in a folder, complete or not at all."""
    with complete_folder(folder, marker="config.json") as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def further_pretrain(task: Task, args: TrainArguments, texts: list[str], epochs: float) -> str:
    """Train the masked language model on texts first, and save it. Returns the folder, args.output_dir/pretrained."""
    folder = os.path.join(args.output_dir, "pretrained")
    if args.resume_from_checkpoint and config_path(folder):
        get_logger().info(f"{folder} is finished.")
        return folder
    args = without_evaluation(args, folder, num_train_epochs=epochs, max_steps=-1,
                              full_embeddings=True)  # any token may be guessed
    paddle.seed(args.seed)
    model, tokenizer = load_model(task.model_folder, head="MaskedLM"), task.tokenizer
    length = min(args.max_seq_length, count_positions(model))
    encode = make_encoder(tokenizer, rust_tokenizer(tokenizer), length,
                          long_text=choose_long_text(args, vars(model.config), task.model_folder))
    pretrain(model, tokenizer, tokenize(texts, encode), args)
    save_pretrained(model, tokenizer, folder)
    return folder


def train_model(task: Task, template: list[Part], args: TrainArguments, train: Split, dev: Split,
                callbacks: "Sequence[TrainerCallback]" = ()) -> None:
    """Train a prompt model and save it in args.output_dir; without training texts it is saved as it begins.

    dev: what it is evaluated on, as args say. callbacks: beside those that args choose. UserError where an unfinished run is in
    the way.
    """
    with paddle.utils.unique_name.guard():  # a resumed run finds its optimizer's entries by the parameters' names
        paddle.seed(args.seed)
        resume_point = find_resume_point(args) if len(train[0]) else None
        checkpoint = build_model(task, template, args)
        get_logger().info(f"Using template: {template}")
        if not resume_point:
            calibrate(checkpoint, task.neutral_texts, args.per_device_eval_batch_size)
        elif read_json(os.path.join(resume_point, "config.json")).get("prompt") != checkpoint.model.config.prompt:
            raise UserError(f"--resume_from_checkpoint {resume_point}: has another prompt, or other label words, expected those "
                            "it began with")
        else:
            check_resume_point(resume_point, args, task.labels, task.label_path, checkpoint.model, len(train[0]))
        if not len(train[0]):
            return save_untrained(checkpoint, args)
        tokens, dev_tokens = tokenize_split(train, checkpoint.encode, "training"), None
        if len(dev[0]) and args.evaluation_strategy.value != "no":
            dev_tokens = tokenize_split(dev, checkpoint.encode, "dev").longest_first()
        callbacks = (*choose_callbacks(args, task.patience), *((SaveBest(),) if saves_best(args) else ()), *callbacks)
        trainer = make_trainer(checkpoint, args, tokens, dev_tokens, callbacks=callbacks)
        train_and_save(trainer, args, resume_point)
        trainer.save_state()


def calibrate(checkpoint: Checkpoint, texts: list[str], batch_size: int) -> None:
    """Take the mean logits of texts off the classifier's bias (Holtzman et al. 2021, arXiv:2104.08315; Zhao et al.
    2021, arXiv:2102.09690): a masked LM likes some words more than others, whatever the text. Without texts nothing changes."""
    if not texts:
        return
    with progress_bar(len(texts), "Calibrating") as progress:
        logits = predict_logits(checkpoint, tokenize(texts, checkpoint.encode), batch_size, progress)
    bias = checkpoint.model.classifier.bias
    bias.set_value(bias.numpy() - logits.mean(axis=0))


def saves_best(args: TrainArguments) -> bool:
    """Tell whether a checkpoint is due after every evaluation that is the best so far."""
    return args.load_best_model_at_end and args.evaluation_strategy.value == args.save_strategy.value == "steps"


def save_untrained(checkpoint: Checkpoint, args: TrainArguments) -> None:
    """Save a model as it begins: it answers by its label words alone."""
    if is_main_rank():
        with complete_folder(args.output_dir, marker="config.json") as staging:
            make_trainer(checkpoint, change_folder(args, args.output_dir, report_to=[])).save_model(staging)
