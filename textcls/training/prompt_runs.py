"""From templates and rows to trained prompt models: one, several, the best of them, or one that has learnt from all."""

import copy
import hashlib
import json
import os
import re
import shutil
import tempfile
from typing import Any, NamedTuple

import numpy as np

from textcls.common.errors import UserError, is_main_rank
from textcls.common.log import get_logger, progress_bar
from textcls.common.outputs import STAGING, complete_file, complete_folder
from textcls.data.files import read_json
from textcls.data.prompts import compile_template
from textcls.data.tokens import tokenize
from textcls.models.checkpoints import Checkpoint, load_checkpoint, load_model
from textcls.models.configs import check_length, config_path
from textcls.models.families import count_positions
from textcls.models.inference import predict_logits
from textcls.models.paddle_setup import paddle
from textcls.models.prompt_model import make_prompt_model
from textcls.models.tokenizers import make_encoder, rust_tokenizer
from textcls.training.losses import SoftLabelLoss
from textcls.training.prompt_training import PromptTrainer, SaveBest, pretrain
from textcls.training.resume import (
    TrainArguments,
    check_resume_point,
    choose_callbacks,
    find_resume_point,
    tokenize_split,
    train_and_save,
)
from textcls.training.scoring import compute_metrics
from textcls.training.trainer import collate, list_checkpoints

MOST_NEUTRAL_TEXTS = 500  # to calibrate on
TEMPERATURE = 2.0  # of the soft labels that one model learns from several (PET: Schick and Schütze 2021, arXiv:2001.07676)
NO_ROWS: tuple[list[str], np.ndarray] = ([], np.zeros(0, np.int64))


class Task(NamedTuple):
    """What all models of one run have in common."""

    model_folder: str  # of the masked LM, or its built-in name
    labels: list  # of str, position = class id
    label_path: str
    words: list  # for each class the list of its words
    word_ids: list  # the same as lists of token ids
    tokenizer: Any  # PaddleNLP's
    verbalizer: str  # soft: the classifier is trained; manual: it stays at the label words
    patience: int  # of early stopping
    neutral_texts: list  # of str: over them no label shall be liked more than another before the training; []: as it comes


class Member(NamedTuple):
    """One of the models of a run."""

    name: str
    template: list  # of `parse_template`
    seed: int


def check_templates(task, templates, args):
    """UserError where a template leaves no room for a text, or nothing to train: before any model is trained."""
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


def build_model(task, template, args):
    """An untrained prompt model: a Checkpoint."""
    masked_lm = load_model(task.model_folder, head="MaskedLM")
    prompt, starts = compile_template(template, task.words, task.tokenizer, masked_lm.config.vocab_size)
    model = make_prompt_model(masked_lm, prompt, task.word_ids, starts, task.labels)
    length = check_length(min(args.max_seq_length, count_positions(model)), model)
    model.config.max_seq_length = length
    if args.freeze_plm:
        model.freeze(args.freeze_dropout)
    if task.verbalizer == "manual":
        for parameter in model.classifier.parameters():
            parameter.stop_gradient = True
    rust = rust_tokenizer(task.tokenizer, length, prompt=prompt)
    return Checkpoint(model, task.tokenizer, rust, make_encoder(task.tokenizer, rust, length), task.labels, length,
                      task.tokenizer.pad_token_id, len(prompt.before), len(prompt.after))


def make_trainer(checkpoint, args, train=None, dev=None, loss=None, callbacks=()):
    """The Trainer of a Checkpoint's prompt model. train, dev: TokenizedTexts or None; loss: a layer, None: cross entropy."""
    return PromptTrainer(checkpoint.labels, checkpoint.rust_tokenizer, args, model=checkpoint.model,
                         criterion=loss or paddle.nn.CrossEntropyLoss(), tokenizer=checkpoint.tokenizer,
                         data_collator=lambda rows: collate(rows, checkpoint.pad_id), train_dataset=train, eval_dataset=dev,
                         compute_metrics=compute_metrics, callbacks=list(callbacks))


def change_folder(args, folder, **changes):
    """The options of a model that is trained in a folder of its own."""
    args = copy.copy(args)
    args.output_dir, args.logging_dir = folder, os.path.join(folder, "runs")
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def without_evaluation(args, folder, **changes):
    """As `change_folder`, for a training that neither evaluates nor saves checkpoints nor resumes."""
    return change_folder(args, folder, evaluation_strategy=type(args.evaluation_strategy).NO, report_to=[],
                         save_strategy=type(args.save_strategy).NO, load_best_model_at_end=False, resume_from_checkpoint=None,
                         **changes)


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


def describe_run(model_args, args, templates, labels, words, rows):
    """What has to be the same where a run is resumed: a JSON object. model_args: ModelArguments of few-shot/train.py."""
    def digest(*values):
        return hashlib.sha256(repr(values).encode("utf-8", "surrogatepass")).hexdigest()

    return {"prompt": templates, "labels": labels, "label words": words, "seed": args.seed, "repeats": model_args.repeats,
            "verbalizer": model_args.verbalizer, "calibrate": model_args.calibrate, "folds": model_args.folds,
            "training rows": digest(rows["train"][0], rows["train"][1].tolist()), "data.txt": digest(rows["data"]),
            "pretrain_file": digest(rows["pretrain"])}


def choose_neutral_texts(rows, labels):
    """The texts to calibrate on: some of data.txt, where it has enough, else those of train."""
    texts = rows["data"] or rows["train"][0]
    if rows["data"] and len(texts) < 5 * len(labels):
        get_logger().warning(f"data.txt has {len(texts)} texts, too few to calibrate on, expected {5 * len(labels)} or more.")
        texts = rows["train"][0]
    return texts[::-(-len(texts) // MOST_NEUTRAL_TEXTS)] if texts else []


def further_pretrain(model_args, args, tokenizer, texts):
    """Train the masked language model on texts first, and save it. Returns the folder, args.output_dir/pretrained."""
    folder = os.path.join(args.output_dir, "pretrained")
    if args.resume_from_checkpoint and config_path(folder):
        get_logger().info(f"{folder} is finished.")
        return folder
    args = without_evaluation(args, folder, num_train_epochs=model_args.pretrain_epochs, max_steps=-1)
    paddle.seed(args.seed)
    model = load_model(model_args.model_name_or_path, head="MaskedLM")
    length = min(args.max_seq_length, count_positions(model))
    pretrain(model, tokenizer, tokenize(texts, make_encoder(tokenizer, rust_tokenizer(tokenizer, length), length)), args)
    with complete_folder(folder, marker="config.json") as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return folder


def train_model(task, member, args, train, dev):
    """Train a member on rows (texts, label ids) and save it in args.output_dir; without rows it is saved as it begins.

    dev: rows that it is evaluated on, as args say. UserError where an unfinished run is in the way.
    """
    with paddle.utils.unique_name.guard():  # a resumed run finds its optimizer's entries by the parameters' names
        paddle.seed(args.seed)
        resume_point = find_resume_point(args) if len(train[0]) else None
        checkpoint = build_model(task, member.template, args)
        get_logger().info(f"Using template: {member.template}")
        if not resume_point:
            calibrate(checkpoint, task.neutral_texts, args.per_device_eval_batch_size)
        elif read_json(os.path.join(resume_point, "config.json")).get("prompt") != checkpoint.model.config.prompt:
            raise UserError(f"--resume_from_checkpoint {resume_point}: has another prompt, or other label words, expected those "
                            "it began with")
        else:
            check_resume_point(resume_point, args, task.labels, task.label_path, checkpoint.model, len(train[0]))
        if not len(train[0]):
            return save_untrained(checkpoint, args)
        evaluates = len(dev[0]) and args.evaluation_strategy.value != "no"
        tokens, dev_tokens = (tokenize_split(rows, checkpoint.encode, checkpoint.max_seq_length, name) if is_used else None
                              for rows, name, is_used in ((train, "training", True), (dev, "dev", evaluates)))
        trainer = make_trainer(checkpoint, args, tokens, dev_tokens.longest_first() if evaluates else None,
                               callbacks=choose_callbacks(args, task.patience) + ([SaveBest()] if saves_best(args) else []))
        train_and_save(trainer, args, resume_point)
        trainer.save_state()


def calibrate(checkpoint, texts, batch_size):
    """Take the mean logits of texts (list of str) off the classifier's bias (Holtzman et al. 2021, arXiv:2104.08315; Zhao et al.
    2021, arXiv:2102.09690): a masked LM likes some words more than others, whatever the text. Without texts nothing changes."""
    if not texts:
        return
    with progress_bar(len(texts), "Calibrating") as progress:
        logits = predict_logits(checkpoint, tokenize(texts, checkpoint.encode), batch_size, progress)
    bias = checkpoint.model.classifier.bias
    bias.set_value(bias.numpy() - logits.mean(axis=0))


def saves_best(args):
    """Whether a checkpoint is due after every evaluation that is the best so far."""
    return args.load_best_model_at_end and args.evaluation_strategy.value == args.save_strategy.value == "steps"


def save_untrained(checkpoint, args):
    """Save a model as it begins: it answers by its label words alone."""
    if is_main_rank():
        with complete_folder(args.output_dir, marker="config.json") as staging:
            make_trainer(checkpoint, change_folder(args, args.output_dir, report_to=[])).save_model(staging)


def cross_validate(task, member, args, train, folds):
    """Mean accuracy of a member that is trained on all folds but one and asked about that one, 0 to 1. Leaves no files."""
    from sklearn.model_selection import StratifiedKFold

    texts, label_ids = train
    hits = np.zeros(len(texts), bool)
    for name in os.listdir(args.output_dir):
        if name.startswith(STAGING):  # of a run that was killed
            shutil.rmtree(os.path.join(args.output_dir, name))
    for rest, held_out in StratifiedKFold(folds, shuffle=True, random_state=args.seed).split(label_ids, label_ids):
        folder = tempfile.mkdtemp(prefix=f"{STAGING}-", dir=args.output_dir)
        try:
            train_model(task, member, without_evaluation(args, folder), ([texts[row] for row in rest], label_ids[rest]), NO_ROWS)
            guesses = predict_texts(folder, [[texts[row] for row in held_out]], args)[0].argmax(axis=1)
            hits[held_out] = guesses == label_ids[held_out]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return float(hits.mean())


def predict_texts(folder, splits, args):
    """Logits of several lists of texts by the model saved in a folder: list of float32 [num_texts, num_classes]."""
    checkpoint, logits = load_checkpoint(folder), []
    for texts in splits:
        with progress_bar(len(texts), "Predicting") as progress:
            tokens = tokenize(texts, checkpoint.encode)
            logits.append(predict_logits(checkpoint, tokens, args.per_device_eval_batch_size, progress))
    return logits


def distill(task, args, folder, texts, targets, epochs):
    """Train the model saved in a folder on what several models say of texts, and save it in args.output_dir.

    targets: float32 [num_texts, num_classes], their mean logits.
    """
    is_begun = args.resume_from_checkpoint is not None and list_checkpoints(args.output_dir)
    args = change_folder(args, args.output_dir, num_train_epochs=epochs, max_steps=-1, load_best_model_at_end=False,
                         evaluation_strategy=type(args.evaluation_strategy).NO, use_rdrop=False, use_rgl=False,
                         resume_from_checkpoint=args.output_dir if is_begun else None)
    with paddle.utils.unique_name.guard():
        paddle.seed(args.seed)
        checkpoint = load_checkpoint(folder)
        resume_point = find_resume_point(args)
        if resume_point:
            check_resume_point(resume_point, args, task.labels, task.label_path, checkpoint.model, len(texts))
        tokens = tokenize(texts, checkpoint.encode, targets)
        trainer = make_trainer(checkpoint, args, tokens, loss=SoftLabelLoss(TEMPERATURE), callbacks=choose_callbacks(args, 0))
        train_and_save(trainer, args, resume_point)
        trainer.save_state()


def copy_model(source, target):
    """Let a folder hold the model of another."""
    with complete_folder(target, marker="config.json") as staging:
        for name in os.listdir(source):
            if os.path.isfile(os.path.join(source, name)):
                shutil.copy(os.path.join(source, name), staging)


def is_finished(folder):
    """Whether a training in a folder has come to its end."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", "trainer_state.json"))


def train_member(task, member, args, train, dev):
    """Train a member in its folder below args.output_dir, go on with it, or leave it as it is where a run that is resumed has
    finished it. Returns its folder."""
    folder = os.path.join(args.output_dir, member.name)
    is_resumed = args.resume_from_checkpoint is not None
    if is_resumed and is_finished(folder):
        get_logger().info(f"{folder} is finished.")
    else:
        resume_point = folder if is_resumed and list_checkpoints(folder) else None
        train_model(task, member, change_folder(args, folder, seed=member.seed, resume_from_checkpoint=resume_point), train, dev)
    return folder
