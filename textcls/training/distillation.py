"""A small model that learns from a large one (Hinton et al. 2015, arXiv:1503.02531): a student is made, its teacher asked."""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import numpy as np

from textcls.common.digests import sha256
from textcls.common.errors import Problems, UserError, is_main_rank
from textcls.common.log import get_logger, progress_bar
from textcls.common.outputs import check_output_folder, complete_file
from textcls.data.files import LabelledTexts, read_texts
from textcls.data.tokens import tokenize
from textcls.models.checkpoints import Checkpoint, load_checkpoint, load_model
from textcls.models.inference import predict_logits
from textcls.models.paddle_setup import paddle
from textcls.models.tokenizers import check_vocabulary, load_tokenizer, rust_tokenizer
from textcls.models.vocabulary import LAYER_CHOICES, choose_layers, choose_tokens, count_parameters, cut_layers, cut_vocabulary
from textcls.models.weights import WEIGHTS
from textcls.training.trainer import check_limits

from paddlenlp.trainer import TrainingArguments

CACHE = "teacher_logits.npz"  # in output_dir: what the teacher says of the texts, and `key`, which names teacher and texts


@dataclass
class DistillationArguments:
    teacher: Optional[str] = field(default=None, metadata={
        "help": "Checkpoint of train.py or few-shot/train.py whose answers a smaller model learns: --model_name_or_path, or some "
        "of its own layers, --student_layers."})
    data_file: Optional[str] = field(default=None, metadata={
        "help": "With --teacher: more texts to learn from, without labels, one per line, in data_dir."})
    student_layers: Optional[int] = field(default=None, metadata={
        "help": "With --teacher: the student is the teacher with so many of its layers."})
    layer_choice: str = field(default="even", metadata={
        "help": "Which of them: even: spread from the first to the last; first: those nearest to the text.",
        "choices": list(LAYER_CHOICES)})
    distill_temperature: float = field(default=2.0, metadata={"help": "With --teacher: of the softmax of both models' answers."})
    keep_tokens: int = field(default=3500, metadata={
        "help": "With --teacher: the student's vocabulary keeps what occurs in the texts, all of their characters, and so many "
        "of the most frequent Chinese characters besides; 100000: all of these."})


class Student(NamedTuple):
    """What a training by a teacher begins with."""

    folder: "tempfile.TemporaryDirectory[str]"  # of its model; it is there as long as this tuple
    texts: list[str]  # the labelled ones, then those without labels
    targets: np.ndarray  # the teacher's logits of them: float32 [num_texts, num_classes]


def check_distillation(options: DistillationArguments, args: TrainingArguments, model_folder: Optional[str],
                       loss_options: Sequence[str]) -> None:
    """UserError where options of a distillation do not go with each other. model_folder: --model_name_or_path where it is given;
    loss_options: those given that change the loss."""
    if options.teacher is None:
        given = next((name for name, value in vars(options).items() if value != getattr(DistillationArguments(), name)), None)
        if given:
            raise UserError(f"--{given}: is for a training by a teacher, expected also --teacher, a trained checkpoint")
        return
    check_limits(options, {"student_layers": (1, 1000), "distill_temperature": (0.1, 100), "keep_tokens": (0, 10**7)})
    if options.student_layers is not None and model_folder is not None:
        raise UserError("--student_layers: the student is made of the teacher's layers, expected a run without "
                        f"--model_name_or_path {model_folder}, or without --student_layers")
    if options.student_layers is None and model_folder is None:
        raise UserError("--teacher: no student is named, expected also --student_layers, or --model_name_or_path")
    if options.student_layers is None and options.layer_choice != DistillationArguments().layer_choice:
        raise UserError("--layer_choice: is for a student made of the teacher's layers, expected also --student_layers")
    if not args.do_train:
        raise UserError("--teacher: only a training needs one, expected also --do_train")
    if args.dry_run:
        raise UserError("--dry_run: writes nothing, and the answers of a --teacher are kept, expected a run without it")
    for name in loss_options:
        raise UserError(f"--{name}: has no effect where a teacher's answers are learnt, expected a run without it")
    check_output_folder(args.output_dir, "--output_dir", {"the teacher": options.teacher})


def read_unlabelled(options: DistillationArguments, data_dir: str, dev: LabelledTexts, dev_path: str, problems: Problems
                    ) -> list[str]:
    """Read the texts of --data_file. One of dev among them is a problem: the student would be measured on what it has learnt."""
    if options.data_file is None:
        return []
    path = os.path.join(data_dir, options.data_file)
    texts = list(read_texts(path, problems))
    line_of = {text: number for number, text in enumerate(dev[0], 1)}
    for number, text in enumerate(texts, 1):
        if text in line_of:
            problems.add(path, number, f"the text is also in {dev_path}:{line_of[text]}", "texts that are not in the dev file")
    return texts


def make_student(options: DistillationArguments, args: TrainingArguments, model_folder: str, labels: list[str], label_path: str,
                 texts: list[str]) -> Student:
    """Check the teacher and the student, make the student's folder, and ask the teacher about the texts.

    model_folder: that the student begins with; texts: to learn from. UserError.
    """
    assert options.teacher is not None
    teacher = load_checkpoint(options.teacher, label_path)
    if teacher.labels != labels:  # where there is no such file to compare with
        raise UserError(f"{options.teacher}: has other labels than {label_path}, expected a teacher of the same labels")
    folder = tempfile.TemporaryDirectory(prefix="student-")
    write_student(options, teacher, model_folder, labels, texts, folder.name)
    return Student(folder, texts, ask_teacher(options.teacher, teacher, texts, args))


def write_student(options: DistillationArguments, teacher: Checkpoint, model_folder: str, labels: list[str], texts: list[str],
                  folder: str) -> None:
    """Write the model that the student begins with into a folder. Arguments: as of `make_student`. UserError."""
    num_layers, num_kept = teacher.model.config.num_hidden_layers, options.student_layers
    if num_kept is not None and num_kept > num_layers:
        raise UserError(f"--student_layers {num_kept}: {options.teacher} has {num_layers} layers, expected as many or fewer")
    model = load_model(model_folder, num_labels=len(labels), id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True,
                       label2id={label: index for index, label in enumerate(labels)})
    if getattr(model.config, "prompt", None) is not None:
        raise UserError(f"{model_folder}: a prompt model, whose layers and vocabulary cannot be cut, expected as the student a "
                        "pretrained model, or a checkpoint of train.py (a prompt model may be its teacher)")
    tokenizer = load_tokenizer(model_folder)
    check_vocabulary(tokenizer, model, model_folder)
    if tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise UserError(f"{model_folder}: its tokenizer is not that of the teacher {options.teacher}, expected a student "
                        "with the same vocab.txt")
    rust = rust_tokenizer(tokenizer)
    if rust is None:
        raise UserError(f"{model_folder}: its tokenizer has no vocabulary that can be cut, expected an ERNIE or BERT")
    kept = choose_tokens(tokenizer, rust, texts, options.keep_tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if num_kept is not None:
        layers = choose_layers(num_layers, num_kept, options.layer_choice)
        get_logger().info(f"Student: layers {', '.join(str(layer + 1) for layer in layers)} of the {num_layers} of its teacher")
        cut_layers(folder, layers)
    cut_vocabulary(folder, tokenizer, kept)
    own, whole = count_parameters(folder), sum(int(parameter.size) for parameter in teacher.model.parameters())
    if own > whole:
        raise UserError(f"{model_folder}: the student has {own:,} parameters and its teacher {whole:,}, expected a student that "
                        "is no larger")
    get_logger().info(f"Student: {own:,} parameters, its teacher {whole:,}; {len(kept):,} of {len(tokenizer):,} tokens are kept")


def ask_teacher(folder: str, teacher: Checkpoint, texts: list[str], args: TrainingArguments) -> np.ndarray:
    """Return a teacher's logits of texts, float32 [num_texts, num_classes]: those that args.output_dir keeps of an earlier run
    with this teacher and these texts, else it is asked and they are kept. folder: of the teacher."""
    path = os.path.join(args.output_dir, CACHE)
    digest = hashlib.sha256(repr((sha256(os.path.join(folder, WEIGHTS)), teacher.max_seq_length, teacher.encode.long_text,
                                  vars(teacher.model.config).get("prompt"))).encode())
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    key = digest.hexdigest()
    is_kept = read_cache(path, key) is not None
    if is_kept:
        get_logger().info(f"The teacher's answers to these {len(texts)} texts are taken from {path}")
    elif is_main_rank():
        tokens = tokenize(texts, teacher.encode)
        with progress_bar(len(texts), "Asking the teacher") as progress:
            logits = predict_logits(teacher, tokens, args.per_device_eval_batch_size, progress)
        with complete_file(path, "wb") as file:
            np.savez(file, key=np.array(key), logits=logits)
    if args.world_size > 1:  # whatever each process has found: the first one may just have saved them
        paddle.distributed.barrier()
    found = read_cache(path, key)
    if found is None:
        raise UserError(f"{path}: cannot be read back, expected an --output_dir that all processes share")
    return found


def read_cache(path: str, key: str) -> Optional[np.ndarray]:
    """Read kept answers; None where there are none, or those of another teacher or of other texts."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return content["logits"] if str(content["key"]) == key else None
    except (OSError, ValueError, LookupError, zipfile.BadZipFile):
        return None
