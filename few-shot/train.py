"""Train a text classifier on a handful of labelled texts by prompts: a masked language model fills in the label's word.

    python few-shot/train.py --data_dir ./data/ --output_dir ./checkpoints/ --prompt "这条新闻写的是" \\
        --max_seq_length 128 --learning_rate 3e-5 --ppt_learning_rate 3e-4 --num_train_epochs 100 --logging_steps 5 \\
        --per_device_train_batch_size 8 --per_device_eval_batch_size 32 --do_train --do_eval --do_predict --do_export \\
        --evaluation_strategy epoch --save_strategy epoch --save_total_limit 1 --load_best_model_at_end \\
        --metric_for_best_model accuracy
    python few-shot/train.py ... --do_eval                     # zero-shot: no training, the label words alone
    python few-shot/train.py ... --prompt A --prompt B         # one model per prompt; with data.txt distilled into one
    python few-shot/train.py ... --repeats 5 --shots 16        # five seeds, 16 rows per class drawn from train.txt
    python few-shot/train.py ... --search --n_trials 20        # looks for better settings first; the same command goes on

Reads   data_dir/label.txt (`label` or `label==word`, line order = class id); with --do_train train.txt, with --do_eval dev.txt
        (<text><tab><label>); where they are there test.txt (--do_predict) and data.txt (one text per line).
Writes  output_dir/: a checkpoint like train.py's, which predict.py, export_model.py and analysis/ take as it is; *_results.json;
        members.json and a folder per model, where there are several; export/ (--do_export): export_model.py's files; with
        --search study.db and search.json.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from textcls.common.digests import rows_id
from textcls.common.errors import Problems, UserError, is_main_rank, run_script
from textcls.common.log import get_logger, say_next
from textcls.data.files import check_splits, draw_shots, read_json, read_label_words, read_labelled, read_lines, read_texts
from textcls.data.prompts import parse_template, tokenize_words
from textcls.data.tokens import tokenize
from textcls.export.deployment import save_deployment
from textcls.models.checkpoints import load_checkpoint
from textcls.models.configs import config_path, read_prompt
from textcls.models.device import select_device
from textcls.models.model_card import describe_file
from textcls.models.processes import find_folder, wait_for_all
from textcls.models.tokenizers import load_tokenizer
from textcls.training.calibration import CALIBRATIONS, calibrate_model, warn_of_few_rows
from textcls.training.long_text_options import check_long_text_options
from textcls.training.prompt_members import ENOUGH_DEV_ROWS, Member, train_all
from textcls.training.prompt_runs import (
    NO_ROWS,
    Splits,
    Task,
    begin_run,
    check_templates,
    choose_neutral_texts,
    further_pretrain,
    make_trainer,
    save_pretrained,
    train_model,
)
from textcls.training.record import begin_record, with_found, write_record
from textcls.training.resume import COPY, check_evaluation, check_output_dir, check_row_counts
from textcls.training.runs import describe_options, is_finished, predict_texts
from textcls.training.search import SearchArguments, check_search, search_settings
from textcls.training.trainer import check_limits, check_training_arguments, given_words, parse_dataclasses

NEXT_STEPS = """few-shot/train.py: nothing to do, expected --do_train, or for a model as it is --do_eval, --do_predict
  train      python few-shot/train.py --data_dir ./data/ --prompt "这条新闻写的是" --max_steps 150 --do_train --do_eval
  zero-shot  python few-shot/train.py --data_dir ./data/ --prompt "这条新闻写的是" --do_eval
All options: --help"""


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="ernie-3.0-base-zh", metadata={
        "help": "Masked language model: built-in name or folder; without --do_train also a checkpoint of this script."})
    prompt: Optional[list[str]] = field(default=None, metadata={
        "help": "Template, or a file with one per line; several templates give several models.", "action": "extend"})
    verbalizer: str = field(default="soft", metadata={
        "help": "soft: the label words are where the classifier begins; manual: it stays there.", "choices": ["soft", "manual"]})
    early_stopping_patience: int = field(default=10, metadata={"help": "Stop after so many evaluations without a better metric "
                                                               "(with --load_best_model_at_end); 0: never."})
    repeats: int = field(default=1, metadata={"help": "Train with so many seeds, --seed and those after it."})
    folds: int = field(default=4, metadata={"help": "Parts of the cross-validation that chooses between several models where "
                                            f"dev.txt has fewer than {ENOUGH_DEV_ROWS} rows of a class; 0: dev.txt does."})
    distill_epochs: float = field(default=1.0, metadata={"help": "Times that the final model sees data.txt, labelled by the "
                                                         "others; 0: do not distill."})
    pretrain_file: Optional[str] = field(default=None, metadata={"help": "Texts, one per line, to train the masked language "
                                                                 "model on first."})
    pretrain_epochs: float = field(default=1.0, metadata={"help": "Times that it sees them."})
    calibrate: bool = field(default=True, metadata={"help": "Begin without a liking for certain labels: take off the mean logits "
                                                    "of data.txt, or else of the training texts."})
    calibrate_confidence: str = field(default="temperature", metadata={
        "help": "temperature: fit one to dev.txt after the training, so that probabilities can be trusted; none: leave them as "
        "they are. It is --calibrate of the root's train.py.", "choices": CALIBRATIONS})


@dataclass
class DataArguments:
    data_dir: str = field(default="./data/", metadata={"help": "Folder of the data files."})
    shots: Optional[int] = field(default=None, metadata={"help": "Draw so many rows of each class from train.txt, by --seed."})


@dataclass
class PromptTuningArguments(SearchArguments):
    output_dir: str = field(default="checkpoints", metadata={"help": "Folder for the model and its checkpoints."})
    max_seq_length: int = field(default=512, metadata={"help": "Longest text with its prompt, in tokens; the text is cut."})
    ppt_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of classifier, soft tokens and prefix."})
    ppt_weight_decay: float = field(default=0.0, metadata={"help": "Their weight decay."})
    ppt_adam_beta1: float = field(default=0.9, metadata={"help": "Their beta1 of AdamW."})
    ppt_adam_beta2: float = field(default=0.999, metadata={"help": "Their beta2 of AdamW."})
    ppt_adam_epsilon: float = field(default=1e-8, metadata={"help": "Their epsilon of AdamW."})
    freeze_plm: bool = field(default=False, metadata={"help": "Train nothing else."})
    freeze_dropout: bool = field(default=False, metadata={"help": "As --freeze_plm, and drop nothing out."})
    save_plm: bool = field(default=False, metadata={"help": "Also save the encoder alone, in output_dir/plm."})
    use_rdrop: bool = field(default=False, metadata={"help": "R-Drop: two passes shall agree."})
    alpha_rdrop: float = field(default=5.0, metadata={"help": "Its weight."})
    use_rgl: bool = field(default=False, metadata={"help": "RGL: texts of one label shall be alike."})
    alpha_rgl: float = field(default=0.5, metadata={"help": "Its weight, in hundredths."})

    def __post_init__(self):
        if self.metric_for_best_model is None and self.load_best_model_at_end:
            self.metric_for_best_model = "accuracy"
        self.freeze_plm = self.freeze_plm or self.freeze_dropout
        super().__post_init__()


def check_arguments(model_args, data_args, args):
    """Refuse what would only fail, or mean nothing, later."""
    check_training_arguments(args)
    check_evaluation(args)
    check_search(args)
    if args.search and (model_args.repeats > 1 or model_args.pretrain_file):
        raise UserError("--search: trains a single model, expected a run without --repeats and --pretrain_file (a model trained "
                        "further before can be given as --model_name_or_path)")
    if not args.learning_rate:
        raise UserError("--learning_rate 0: out of range, expected more than 0 (to train only the prompt's part: --freeze_plm)")
    check_limits(model_args, {"repeats": (1, 10000), **dict.fromkeys(
        ("early_stopping_patience", "folds", "distill_epochs", "pretrain_epochs"), (0, 10000))})
    check_limits(data_args, {"shots": (1, 10**9)})
    check_limits(args, dict.fromkeys(("alpha_rdrop", "alpha_rgl"), (0, 10000)))
    if args.seed + model_args.repeats > 2**32:
        raise UserError(f"--seed {args.seed} --repeats {model_args.repeats}: out of range, expected seeds below {2**32}")


def read_templates(prompts, word_ids):
    """The templates that --prompt names: list of lists of parts. UserError.

    prompts: list of str, or None. word_ids: of `tokenize_words`; a template without blocks gets a mask as long as the words, if
    they are all of one length.
    """
    templates, problems = [], Problems()
    for prompt in prompts or [None]:
        lines = [prompt]
        if prompt is not None and os.path.isfile(prompt):
            lines = [line for _, line in read_lines(prompt, problems) if line.strip()]
            if not lines and not problems.count:
                problems.add(prompt, None, "only blank lines", "one template per line")
            problems.report()
        elif prompt and (prompt.endswith(".txt") or "\uff5b" in prompt):
            raise UserError(f"--prompt {prompt}: no such file, and no template either, expected a file of templates, or a "
                            "template with plain braces { }")
        templates += lines
    lengths = [len(ids) for words in word_ids for ids in words]
    least, most = min(lengths), max(lengths)
    mask_length = least if least == most else 1
    if any(template is None or "{" not in template for template in templates):
        get_logger().info(f"A prompt without blocks gets a mask of length {mask_length}: the label words have "
                          f"{least if least == most else f'from {least} to {most}'} tokens.")
    return [parse_template(template, mask_length) for template in templates]


def read_data(data_args, args, tokenizer, pretrain_file):
    """Read and check all files. Returns (labels, words, word ids, Splits)."""
    problems, paths = Problems(), {name: os.path.join(data_args.data_dir, f"{name}.txt") for name in
                                   ("label", "train", "dev", "test", "data")}
    named = read_label_words(paths["label"], problems)
    labels = [] if problems.count else list(named)
    words = [list(own) for own in named.values()]
    word_ids, wrong = tokenize_words(words, tokenizer)
    for index, word, what in wrong:
        problems.add(paths["label"], list(named.values())[index][word], what, "known words, different for each label")
    longest = [max(map(len, ids)) for ids in word_ids]
    if labels and max(longest) >= 3 * min(longest):
        problems.warn(paths["label"], None, f"the longest words of the labels have from {min(longest)} to {max(longest)} tokens "
                      f"(labels {labels[np.argmin(longest)]!r} and {labels[np.argmax(longest)]!r})", "words of like length")
    rows = dict.fromkeys(("train", "dev", "test"), NO_ROWS)
    wanted = {"train": args.do_train, "dev": args.do_eval, "test": args.do_predict}
    for name in rows:
        if wanted[name] or (name == "dev" and args.do_train and os.path.isfile(paths[name])):
            rows[name] = read_labelled(paths[name], labels, problems, paths["label"])
    if args.do_train and data_args.shots and not problems.count:
        rows["train"] = take_shots(rows["train"], data_args.shots, args.seed, labels, paths["train"], problems)
    if args.do_train and not problems.count:
        check_splits(paths["train"], paths["dev"], rows["train"], rows["dev"], labels, problems)
    for name, path in (("data", paths["data"]), ("pretrain", pretrain_file)):
        rows[name] = list(read_texts(path, problems)) if path and (name == "pretrain" or os.path.isfile(path)) else []
    problems.report()
    return labels, words, word_ids, Splits(**rows)


def take_shots(train, shots, seed, labels, path, problems):
    """The rows that --shots draws: (texts, label ids); a class with too few is a problem."""
    texts, label_ids = train
    for label, count in zip(labels, np.bincount(label_ids, minlength=len(labels))):
        if count < shots:
            problems.add(path, None, f"class {label!r} has {count} rows", f"at least the {shots} of --shots")
    chosen = draw_shots(texts, label_ids, shots, seed)
    return [texts[index] for index in chosen], label_ids[chosen]


def evaluate(checkpoint, args, splits):
    """Log and save the metrics of dev and test, as far as they are asked for."""
    for name, split, is_wanted in (("eval", "dev", args.do_eval), ("test", "test", args.do_predict)):
        if is_wanted:
            texts, label_ids = getattr(splits, split)
            trainer = make_trainer(checkpoint, args, dev=tokenize(texts, checkpoint.encode, label_ids).longest_first())
            metrics = trainer.evaluate(metric_key_prefix=name)
            trainer.log_metrics(name, metrics)
            trainer.save_metrics(name, metrics)


def describe_run(model_args, args, templates, labels, words, splits):
    """What has to be the same where a run is resumed: a JSON object."""
    def digest(*values):
        return hashlib.sha256(repr(values).encode("utf-8", "surrogatepass")).hexdigest()

    return {"prompt": templates, "labels": labels, "label words": words, "seed": args.seed, "repeats": model_args.repeats,
            "verbalizer": model_args.verbalizer, "calibrate": model_args.calibrate, "folds": model_args.folds,
            "training rows": digest(splits.train[0], splits.train[1].tolist()), "data.txt": digest(splits.data),
            "pretrain_file": digest(splits.pretrain)}


def train_task(task, templates, members, model_args, data_args, args, splits):
    """Train all members and save one model in args.output_dir; with --search the only one, after the search. UserError.

    Returns the settings that --search has found, {} without it.
    """
    run = describe_run(model_args, args, templates, task.labels, task.words, splits)
    if args.search:
        if len(templates) > 1:
            raise UserError(f"--search: trains a single model, expected one template, not {len(templates)}")
        record = {**run, "dev rows": rows_id(*splits.dev), **describe_options(model_args, data_args, args)}
        return search_settings(model_args, args, record, splits.dev, lambda settings, args, callbacks: train_model(
            task, templates[0], args, splits.train, splits.dev, callbacks))
    if is_main_rank():
        begin_run(args, run)
    if splits.pretrain:
        task = task._replace(model_folder=further_pretrain(task, args, splits.pretrain, model_args.pretrain_epochs))
    train_all(task, members, args, splits, model_args.folds, model_args.distill_epochs)
    return {}


def note_run(data_dir, model_args, labels, splits):
    """What the record of the training says of its beginning."""
    files = [describe_file(os.path.join(data_dir, f"{name}.txt"), len(texts), label_ids, len(labels))
             for name, (texts, label_ids) in (("train", splits.train), ("dev", splits.dev)) if texts]
    if splits.data:
        files.append(describe_file(os.path.join(data_dir, "data.txt"), len(splits.data)))
    return begin_record(given_words(), model_args.model_name_or_path, labels, files)


def finish_model(folder, run, args, splits, fits_temperature):
    """Fit the temperature of the trained model, where that is asked for, and write its record."""
    logits = predict_texts(folder, [splits.dev[0]], args)[0]
    if fits_temperature:
        calibrate_model(folder, logits, splits.dev, "dev.txt")
    write_record(folder, run, "dev.txt", logits, splits.dev[1])


def save_encoder(checkpoint, folder):
    """Save the encoder alone. The model cannot be run any more afterwards."""
    encoder = checkpoint.model.base_model
    embeddings = encoder.embeddings
    embeddings.word_embeddings = getattr(embeddings.word_embeddings, "table", embeddings.word_embeddings)
    encoder.config.prompt = None
    save_pretrained(encoder, checkpoint.tokenizer, folder)


def main():
    model_args, data_args, args = parse_dataclasses((ModelArguments, DataArguments, PromptTuningArguments), __doc__,
                                                    ("--export_type",))
    if not (args.do_train or args.do_eval or args.do_predict or args.do_export):
        raise UserError(NEXT_STEPS)
    args.device = select_device(args.device)
    check_arguments(model_args, data_args, args)
    if args.resume_from_checkpoint is not None and not args.do_train:  # an older way to name a trained model
        model_args.model_name_or_path = args.resume_from_checkpoint
    folder, label_path = model_args.model_name_or_path, os.path.join(data_args.data_dir, "label.txt")
    is_trained = bool(config_path(folder)) and read_prompt(read_json(config_path(folder)), folder) is not None
    if is_trained and (args.do_train or model_args.prompt):
        raise UserError(f"{folder}: is a prompt model with a prompt of its own, expected a masked language model, or neither "
                        "--do_train nor --prompt")
    check_output_dir(args, data_args.data_dir, folder, saves_model=not is_trained)
    check_long_text_options(args, args.max_seq_length, folder)
    tokenizer = load_tokenizer(folder)
    labels, words, word_ids, splits = read_data(data_args, args, tokenizer, model_args.pretrain_file)
    check_row_counts(args, "dev.txt", len(splits.train[0]), len(splits.dev[0]))
    if args.do_train and len(splits.dev[0]) and model_args.calibrate_confidence == "temperature":
        warn_of_few_rows(len(splits.dev[0]), "dev.txt")
    if not (is_trained or args.do_train) and is_finished(args.output_dir):
        raise UserError(f"{args.output_dir}: holds a trained model, expected --model_name_or_path {args.output_dir} to evaluate "
                        "it, or another --output_dir for the untrained one")

    if not is_trained:
        templates = read_templates(model_args.prompt, word_ids)
        members = [Member(f"prompt-{number}-seed-{seed}", template, seed) for number, template in enumerate(templates, 1)
                   for seed in range(args.seed, args.seed + model_args.repeats)]
        if args.world_size > 1 and (len(members) > 1 or splits.pretrain):
            raise UserError("several prompts, --repeats and --pretrain_file run in one process only, expected a run without "
                            "textcls.launch and paddle.distributed.launch")
        task = Task(folder, labels, label_path, words, word_ids, tokenizer, model_args.verbalizer,
                    model_args.early_stopping_patience, choose_neutral_texts(splits, labels) if model_args.calibrate else [],
                    model_args.calibrate_confidence == "temperature")
        check_templates(task, templates, args)
        begun = note_run(data_args.data_dir, model_args, labels, splits)
        found = train_task(task, templates, members, model_args, data_args, args, splits)
        if found:
            begun = with_found(begun, found)
        folder = args.output_dir
        if is_main_rank():
            finish_model(folder, begun, args, splits, task.fits_temperature)
        wait_for_all("saved")  # until the first process has saved it
        get_logger().info(f"Model saved in {folder}")
        folder = find_folder("model", folder, os.path.join(args.output_dir, COPY))
    evaluate(load_checkpoint(folder, label_path), args, splits)
    if args.do_export and is_main_rank():
        export_dir = os.path.join(args.output_dir, "export")
        save_deployment(load_checkpoint(folder), export_dir, "model", with_onnx=True, card_folder=folder)
        get_logger().info(f"Exported model saved in {export_dir}")
    if args.save_plm and is_main_rank():
        save_encoder(load_checkpoint(folder), os.path.join(args.output_dir, "plm"))
    if os.path.basename(folder) == COPY:
        shutil.rmtree(folder, ignore_errors=True)
    say_next("predict.py", "--params_path", folder, "--dataset_dir", data_args.data_dir)


if __name__ == "__main__":
    run_script(main)
