"""Train an encoder that puts texts near the names of their labels and near each other, for classification by search.

    python retrieval_based/train.py --model_name_or_path ernie-3.0-medium-zh --data_dir ./data/ --output_dir ./checkpoint \\
        --max_seq_length 64 --per_device_train_batch_size 64 --learning_rate 5e-5 --num_train_epochs 10
    python retrieval_based/train.py --device gpu --train_set_file ./data/train.txt --corpus_file ./data/label.txt \\
        --similar_text_pair_file ./data/dev.txt --save_dir ./checkpoint --batch_size 24 --epochs 10     # as of older editions
    python retrieval_based/train.py ... --batch_size 512 --chunk_size 64    # large batches in the memory of small ones
    python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo retrieval_based/train.py ... --device cpu
    python -m textcls.launch --master 10.0.0.1:6170 --nnodes 2 --rank 0 retrieval_based/train.py ... --device cpu

Reads   data_dir/train.txt, dev.txt (<text><tab><label>) and label.txt (`label`, or `label==text==text` with descriptions and
        synonyms; line order = class id).
Writes  output_dir/: config.json (pooling, vector size, max_seq_length), model_state.pdparams, tokenizer files, label.txt,
        *_results.json, trainer_state.json, runs/ (VisualDL), checkpoint-N/ to resume from. retrieval_based/build_index.py and
        export_model.py take this folder, and need no option of the training again.
"""

import os
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from textcls.common.errors import Problems, UserError, run_script
from textcls.common.log import get_logger, say_next
from textcls.data.files import check_splits, read_json, read_label_words, read_labelled
from textcls.data.tokens import DEFAULT_LENGTH
from textcls.models.checkpoints import Checkpoint, load_model
from textcls.models.configs import POOLINGS, SentenceOptions, check_length, choose_length, config_path, read_sentence_options
from textcls.models.device import select_device
from textcls.models.families import count_positions
from textcls.models.paddle_setup import paddle
from textcls.models.sentence_checkpoints import lower_texts
from textcls.models.sentence_folders import SentenceFolder, read_sentence_folder
from textcls.models.tokenizers import check_vocabulary, load_tokenizer, make_encoder, rust_tokenizer
from textcls.retrieval.encoder import encoder_folder
from textcls.training.long_text_options import check_long_text_options, choose_long_text, save_long_text, tokenize_split
from textcls.training.resume import (
    TrainArguments,
    check_evaluation,
    check_metric,
    check_output_dir,
    check_resume_point,
    check_row_counts,
    choose_callbacks,
    find_resume_point,
    train_and_save,
)
from textcls.training.sentence_training import RECALLS, SentenceTrainer, metric_names, tokenize_labels
from textcls.training.trainer import check_limits, check_training_arguments, parse_dataclasses

WITHOUT_EFFECT = ("--recall_result_dir", "--recall_result_file", "--evaluate_result", "--recall_num", "--hnsw_m", "--hnsw_ef",
                  "--hnsw_max_elements")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="rocketqa-zh-dureader-query-encoder", metadata={
        "help": "Built-in model name or model folder: a pretrained model, or an encoder to train further."})
    init_from_ckpt: Optional[str] = field(default=None, metadata={"help": "An older way to name an encoder to train further."})
    pooling: Optional[str] = field(default=None, metadata={
        "help": "What becomes of a text's token states: mean, cls (the first one), or pooler (the first one through the model's "
        "pooler, as older editions had it). Default: that of an encoder to train further, else mean.", "choices": POOLINGS})
    output_emb_size: Optional[int] = field(default=None, metadata={
        "help": "Length of the vectors; 0: that of the model's states. Default: that of an encoder to train further, else 0."})
    matryoshka_dims: Optional[list[int]] = field(default=None, metadata={
        "help": "Also train the first so many entries of the vectors to be vectors of their own, such as 64 128 256."})
    early_stopping_patience: int = field(default=4, metadata={"help": "Stop after so many evaluations without a better "
                                                              "metric; 0 turns early stopping off."})


@dataclass
class DataArguments:
    data_dir: str = field(default="./data/", metadata={"help": "Folder of the data files."})
    train_set_file: Optional[str] = field(default=None, metadata={"help": "Training file; default: data_dir/train.txt."})
    similar_text_pair_file: Optional[str] = field(default=None, metadata={"help": "Development file; default: data_dir/dev.txt."})
    similar_text_pair: Optional[str] = field(default=None, metadata={"help": "The same."})
    corpus_file: Optional[str] = field(default=None, metadata={"help": "Label file; default: data_dir/label.txt."})
    max_seq_length: Optional[int] = field(default=None, metadata={
        "help": f"Longest text in tokens; longer texts are cut. Default: that of a trained encoder, else {DEFAULT_LENGTH}."})


@dataclass
class SentenceArguments(TrainArguments):
    margin: float = field(default=0.2, metadata={"help": "By how much the right label has to be nearer than the others."})
    scale: float = field(default=30.0, metadata={"help": "What cosines are multiplied by before the softmax."})
    text_loss_weight: float = field(default=1.0, metadata={
        "help": "Weight of the loss that draws texts of one label to each other; 0: only to the label's name."})
    chunk_size: int = field(default=0, metadata={"help": "Encode a batch in chunks of so many texts, twice, so that it needs the "
                                                 "memory of one; 0: all at once."})
    hard_negatives: int = field(default=0, metadata={
        "help": "From the second epoch on, also compare each text with so many labels that it was confused with; for label sets "
        "larger than a batch."})
    class_sampling: str = field(default="natural", metadata={
        "help": "How often classes are drawn: natural: as they are; balanced: equally often; sqrt: in between.",
        "choices": ["natural", "sqrt", "balanced"]})
    evaluate: bool = field(default=True, metadata={"help": "Evaluate after each epoch, and keep the best model."})
    save_dir: Optional[str] = field(default=None, metadata={"help": "The same as --output_dir."})
    batch_size: Optional[int] = field(default=None, metadata={"help": "The same as --per_device_train_batch_size."})
    epochs: Optional[float] = field(default=None, metadata={"help": "The same as --num_train_epochs."})
    warmup_proportion: Optional[float] = field(default=None, metadata={"help": "The same as --warmup_ratio."})
    log_steps: Optional[int] = field(default=None, metadata={"help": "The same as --logging_steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts per step and process."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Texts at a time in an evaluation."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Times that the training texts are seen."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between two lines of the log."})
    save_steps: int = field(default=10000, metadata={"help": "Steps between two checkpoints, with --evaluate False."})
    save_total_limit: Optional[int] = field(default=1, metadata={"help": "How many checkpoint-N/ are kept."})
    seed: int = field(default=1000, metadata={"help": "Of all that is drawn."})

    def __post_init__(self):
        for new, old in (("output_dir", self.save_dir), ("per_device_train_batch_size", self.batch_size), ("num_train_epochs",
                         self.epochs), ("warmup_ratio", self.warmup_proportion), ("logging_steps", self.log_steps)):
            if old is not None:
                setattr(self, new, old)
        self.do_train = True
        if self.evaluate:
            self.do_eval = self.load_best_model_at_end = True
            self.evaluation_strategy = self.save_strategy = "epoch"
            self.metric_for_best_model = self.metric_for_best_model or "accuracy"
        else:
            self.do_eval = self.load_best_model_at_end = False
            self.evaluation_strategy, self.save_strategy, self.metric_for_best_model = "no", "steps", None
        super().__post_init__()


def check_arguments(model_args, data_args, args):
    """Refuse what would only fail, or mean nothing, later."""
    check_training_arguments(args)
    check_output_dir(args, data_args.data_dir, find_model_folder(model_args), True)
    check_evaluation(args, metric_names(max(RECALLS)))
    check_limits(args, {"margin": (0, 2), "text_loss_weight": (0, 1000), "chunk_size": (0, 1 << 20), "hard_negatives": (0, 1000)})
    check_limits(model_args, {"output_emb_size": (0, 1 << 16), "early_stopping_patience": (0, 10000)})
    check_long_text_options(args, data_args.max_seq_length, find_model_folder(model_args))
    if args.window_vote == "max":
        raise UserError("--window_vote max: of vectors there is only a mean, expected a run without it")
    if not 0 < args.scale <= 1000:
        raise UserError(f"--scale {args.scale}: out of range, expected more than 0, up to 1000")
    if args.gradient_accumulation_steps > 1 or args.recompute:
        raise UserError("--gradient_accumulation_steps, --recompute: a step compares the texts of one whole batch, expected "
                        "--per_device_train_batch_size and --chunk_size, which saves the memory")
    if args.amp_master_grad and args.world_size > 1:
        raise UserError("--amp_master_grad: not supported with several processes, expected a run without it")


def read_data(paths, args):
    """Read and check all data files. paths: of train, dev and label file. Returns (labels, their texts: a list of str for each,
    train and dev: (texts, label ids))."""
    (train_path, dev_path, label_path), problems = paths, Problems()
    named = read_label_words(label_path, problems)
    labels = [] if problems.count else list(named)
    words = [list(dict.fromkeys([label.rpartition("##")[2], *own])) for label, own in named.items()]
    train = read_labelled(train_path, labels, problems, label_path)
    dev = read_labelled(dev_path, labels, problems, label_path) if args.do_eval else ([], np.zeros(0, np.int64))
    if not problems.count:
        check_splits(train_path, dev_path, train, dev, labels, problems)
    problems.report()
    check_row_counts(args, dev_path, len(train[0]), len(dev[0]))
    check_metric(args, metric_names(len(labels)))
    return labels, words, train, dev


def read_source(folder):
    """What the encoder to train further says of itself: a SentenceFolder; that of a model that is none yet says mean and 0."""
    path = config_path(folder) if os.path.isdir(folder) else None
    trained = read_sentence_options(read_json(path), folder) if path else None
    if trained is None and os.path.isdir(folder):
        return read_sentence_folder(folder)
    return SentenceFolder(folder, False, False, trained or SentenceOptions("mean", 0, []), {}, None, False)


def choose_options(model_args, trained):
    """SentenceOptions of the training: as the options say, else `trained`, those of the encoder to train further."""
    size = trained.output_emb_size if model_args.output_emb_size is None else model_args.output_emb_size
    dims = trained.matryoshka_dims if model_args.matryoshka_dims is None else sorted(set(model_args.matryoshka_dims))
    return SentenceOptions(model_args.pooling or trained.pooling, size, dims,
                           trained.activation if size == trained.output_emb_size else "")


def find_model_folder(model_args):
    """The folder, or built-in name, of the model to train."""
    return encoder_folder(model_args.init_from_ckpt) if model_args.init_from_ckpt else model_args.model_name_or_path


def load_encoder(model_args, data_args, args, labels):
    """The model to train: a Checkpoint."""
    folder = find_model_folder(model_args)
    source = read_source(folder)
    options, folder = choose_options(model_args, source.options), source.model
    model = load_model(folder, head="SentenceEncoder", ignore_mismatched_sizes=True, sentence_options=options,
                       more_weights=source.projection)
    for dims in options.matryoshka_dims:
        if not 1 <= dims <= model.embedding_size:
            raise UserError(f"--matryoshka_dims {dims}: out of range, expected 1 to {model.embedding_size}, the length of the "
                            "vectors")
    wanted = choose_length(data_args.max_seq_length, vars(model.config), folder)
    if source.has_modules and data_args.max_seq_length is None:
        wanted = min(source.max_seq_length or wanted, count_positions(model))
    length = check_length(wanted, model)
    model.config.max_seq_length = length  # for the scripts that load it later
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, model, folder)
    long_text = choose_long_text(args, vars(model.config), folder)
    if long_text.mode == "window":
        long_text = long_text._replace(window_vote="unit_mean")
    save_long_text(model, long_text)
    rust = rust_tokenizer(tokenizer)
    if source.lowers:
        lower_texts(tokenizer, rust, folder)
    encode = make_encoder(tokenizer, rust, length, long_text=long_text)
    return Checkpoint(model, tokenizer, rust, encode, labels, length, tokenizer.pad_token_id)


def check_resumed(resume_point, args, checkpoint, label_path, num_rows):
    """UserError unless a run with these options can have written the checkpoint to resume from."""
    saved = read_json(os.path.join(resume_point, "config.json")).get("sentence_encoder")
    if saved != checkpoint.model.config.sentence_encoder:
        raise UserError(f"--resume_from_checkpoint {resume_point}: sentence_encoder is {saved} there and "
                        f"{checkpoint.model.config.sentence_encoder} in this run, expected the options it began with")
    check_resume_point(resume_point, args, checkpoint.labels, label_path, checkpoint.model, num_rows)


def main():
    model_args, data_args, args = parse_dataclasses((ModelArguments, DataArguments, SentenceArguments), __doc__, WITHOUT_EFFECT)
    args.device = select_device(args.device)
    check_arguments(model_args, data_args, args)
    resume_point = find_resume_point(args)
    paths = [path or os.path.join(data_args.data_dir, name) for path, name in (
        (data_args.train_set_file, "train.txt"), (data_args.similar_text_pair_file or data_args.similar_text_pair, "dev.txt"),
        (data_args.corpus_file, "label.txt"))]
    labels, words, train, dev = read_data(paths, args)
    paddle.seed(args.seed)
    checkpoint = load_encoder(model_args, data_args, args, labels)
    if resume_point:
        check_resumed(resume_point, args, checkpoint, paths[2], len(train[0]))
    rows = (train[0], np.stack([train[1], np.arange(len(train[0]))], axis=1))
    train_tokens = tokenize_split(rows, checkpoint.encode, "training")
    dev_tokens = tokenize_split(dev, checkpoint.encode, "dev") if args.do_eval else None

    trainer = SentenceTrainer(checkpoint, args, tokenize_labels(words, checkpoint.encode), train_tokens, dev_tokens,
                              choose_callbacks(args, model_args.early_stopping_patience))
    train_and_save(trainer, args, resume_point)
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    get_logger().info(f"Encoder saved in {args.output_dir}")
    say_next("retrieval_based/build_index.py", "--params_path", args.output_dir, "--data_dir", data_args.data_dir)


if __name__ == "__main__":
    run_script(main)
