"""What train.py and prune.py train with: options, PaddleNLP's Trainer with batches by length, whole checkpoints and exact
resumption."""

import contextlib
import functools
import os
import random
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional, Union

import numpy as np
from tokenizers import Tokenizer

from textcls.common.errors import UserError
from textcls.common.hosts import choose_interface
from textcls.common.log import get_logger, leaving_out, log_everything
from textcls.common.options import Parser, add_obsolete_options, add_version_option
from textcls.common.outputs import STAGING, write_labels
from textcls.data.files import read_json
from textcls.data.tokens import TokenizedTexts, pad_batch
from textcls.models.inference import open_pool
from textcls.models.paddle_setup import paddle
from textcls.models.processes import compare_options, compare_records, digest, rank_hosts, send_weights, wait_for_all
from textcls.models.tokenizers import save_rust_tokenizer
from textcls.training.callbacks import CountBatches, ShrinkRows, TrainingLog, describe_metrics, is_best, metric_name
from textcls.training.embedding_rows import ROWS, EmbeddingRows, find_table, fit_moments, occurring_ids
from textcls.training.operators import fast_operators
from textcls.training.samplers import LengthGroupedBatchSampler, TokenBatchSampler
from textcls.training.threads import EvaluatedModel, ThreadedModel, count_threads
from textcls.training.trainer_import import paddlenlp  # noqa: F401  before anything of its trainer

from paddlenlp.trainer import PdArgumentParser, PrinterCallback, Trainer, TrainingArguments
from paddlenlp.trainer.argparser import strtobool
from paddlenlp.trainer.integrations import get_available_reporting_integrations
from paddlenlp.trainer.trainer_utils import EvalLoopOutput, TrainOutput

ONE_DEVICE = ("sharding", "sharding_degree", "sharding_parallel_degree", "tensor_parallel_degree", "pipeline_parallel_degree",
              "sep_parallel_degree", "enable_auto_parallel", "unified_checkpoint")  # options that spread a model over devices
MOST_EPOCHS = 10**6
# of TrainingArguments, and of what few-shot/train.py has beside them: the least and the greatest value
OPTIMIZER_LIMITS = {"learning_rate": (0, 1000), "weight_decay": (0, 1000), "adam_beta1": (0, 0.99999), "adam_beta2": (0, 0.99999),
                    "adam_epsilon": (0, 1)}
LIMITS = {**OPTIMIZER_LIMITS, **{f"ppt_{name}": limits for name, limits in OPTIMIZER_LIMITS.items()},
          **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                           "scale_loss", "save_steps", "eval_steps", "logging_steps", "eval_accumulation_steps"), (1, 10**9)),
          **dict.fromkeys(("warmup_steps", "max_grad_norm", "save_total_limit", "num_cycles", "lr_end"), (0, 10**9)),
          "max_steps": (-1, 10**9), "seed": (0, 2**32 - 1)}


class TrainingParser(PdArgumentParser):
    """PaddleNLP's parser of dataclasses, with the errors of the other scripts' parser."""

    error = Parser.error


def check_limits(values: object, limits: Mapping[str, tuple[float, float]]) -> None:
    """UserError where an attribute of `values` is out of its limits, {name of the option: (least, greatest)}, or no number."""
    for name, (least, most) in limits.items():
        value = getattr(values, name, None)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name} {value}: out of range, expected {least} to {most}")


def given_words() -> list[str]:
    """Return the words of the command line, with the options of a JSON file named first in its place. Raises UserError."""
    words = sys.argv[1:]
    if not (words and words[0].endswith(".json")):
        return words
    from_file = []
    for name, value in read_json(words[0]).items():
        if value is not None:
            from_file += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return from_file + words[1:]


def parse_dataclasses(classes: Sequence[type], description: str, obsolete: Sequence[str] = ()) -> tuple:
    """Read a script's options from the command line, or from a JSON file named first. Returns one object per class.

    obsolete: options that are taken without effect, of OBSOLETE in textcls/common/options.py. Raises UserError.
    """
    parser = TrainingParser(classes, allow_abbrev=False, description=description.splitlines()[0])
    add_version_option(parser)
    add_obsolete_options(parser, *obsolete)
    parser.add_argument("--verbose", nargs="?", const=True, default=False, type=strtobool, help="Log all that there is to say.")
    options, unknown = parser.parse_known_args(given_words())
    if unknown:
        parser.error(f"unknown option {' '.join(unknown)}")
    log_everything(options.verbose)
    check_limits(options, LIMITS)  # here already: the library puts another number in the place of --eval_steps 0
    for name in ONE_DEVICE:  # TrainingArguments forgets them in a single process
        if str(getattr(options, name)) not in (str(parser.get_default(name)), "1"):
            raise UserError(f"--{name}: not supported, expected a run without it; models of this size fit on one device, and "
                            "several processes share the rows, not the model")
    choose_interface()
    try:
        parsed = parser.parse_dict(vars(options))
    except (ValueError, AssertionError) as error:  # from TrainingArguments' own checks
        condition = traceback.extract_tb(error.__traceback__)[-1].line or ""  # some of them say nothing else
        message = str(error) or condition.replace("assert self.", "expected --")
        if "strategy to match" in message:
            message = ("--load_best_model_at_end chooses between checkpoints that were evaluated, expected --evaluation_strategy "
                       "and --save_strategy alike, such as epoch")
        raise UserError(f"{parser.prog}: {message}") from None
    compare_options(vars(options))  # TrainingArguments have connected the processes
    return parsed


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuse values of TrainingArguments that would only fail, or train nothing, later. Raises UserError."""
    check_limits(args, LIMITS)  # once more: some options of retrieval_based/train.py stand for others
    if args.fp16_opt_level not in ("O1", "O2"):
        raise UserError(f"--fp16_opt_level {args.fp16_opt_level}: unknown, expected O1 or O2")
    if args.optim.value != "adamw":
        raise UserError(f"--optim {args.optim.value}: PaddleNLP 2.8.1 has no such optimizer, expected adamw")
    if args.label_names:
        raise UserError("--label_names: the labels are those of label.txt, expected a run without it")
    if args.lr_scheduler_type.value == "polynomial" and args.lr_end >= args.learning_rate:
        raise UserError(f"--lr_end {args.lr_end}: expected less than --learning_rate {args.learning_rate}")
    unknown = [name for name in args.report_to if name not in get_available_reporting_integrations()]
    if unknown:  # asked for by name: a missing package would only show when the training begins
        raise UserError(f"--report_to {unknown[0]}: not installed or unknown, expected visualdl or none")
    if not 0 < args.num_train_epochs <= MOST_EPOCHS and args.max_steps <= 0:
        raise UserError(f"--num_train_epochs {args.num_train_epochs}: out of range, expected more than 0, up to {MOST_EPOCHS}")


@contextlib.contextmanager
def plain_library_errors() -> Iterator[None]:
    """Show what the library says of an option's value without a traceback: some it checks only when the training begins."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"the training cannot go on ({type(error).__name__}: {error}; {os.path.basename(place.filename)}:"
                        f"{place.lineno}), expected values that PaddleNLP's options take") from error


def check_batch(args: TrainingArguments, num_rows: int) -> None:
    """UserError where --dataloader_drop_last would drop all training rows."""
    if args.dataloader_drop_last and num_rows < args.per_device_train_batch_size * args.dataset_world_size:
        raise UserError(f"--dataloader_drop_last: {num_rows} training rows do not fill one batch, expected a smaller "
                        "--per_device_train_batch_size")


class ClassificationTrainer(Trainer):
    """PaddleNLP's Trainer with length-grouped batches, checkpoints that are complete or absent, and exact resumption.

    labels: list of str, position = class id; rust_tokenizer: a tokenizers.Tokenizer to save with the model, or None. The
    other options are the library's.
    """

    def __init__(self, labels: list[str], rust_tokenizer: Optional[Tokenizer], args: TrainingArguments, **options: object):
        self.labels, self.rust_tokenizer = labels, rust_tokenizer
        self.rows: Optional[EmbeddingRows] = None  # while it trains; None: the whole table
        self.pool: Optional[ThreadPoolExecutor] = None  # while it trains on a CPU
        self.threads: Optional[ThreadedModel] = None  # while it trains in a single process on a CPU
        self.evaluated: Optional[EvaluatedModel] = None  # while it evaluates on a CPU
        self.num_batches = 0  # that the step has had so far
        shows_progress, args.disable_tqdm = not args.disable_tqdm, True
        super().__init__(args=args, **options)
        args.disable_tqdm = not shows_progress
        self.pop_callback(PrinterCallback)
        self.add_callback(TrainingLog(shows_progress))
        self.add_callback(CountBatches(self))

    def train(self, *given: Any, **options: Any) -> TrainOutput:
        if paddle.get_device() != "cpu":
            return self.train_rows(*given, **options)
        with open_pool(self.count_threads()) as self.pool, fast_operators(self.pool):
            return self.train_rows(*given, **options)

    def train_rows(self, *given: Any, **options: Any) -> TrainOutput:
        """Train as the library does; whatever happens, the model then has its whole table of word embeddings."""
        has_hosts = len(set(rank_hosts())) > 1
        try:
            with leaving_out("Could not locate the best model") if has_hosts else contextlib.nullcontext():
                output = super().train(*given, **options)
        finally:
            self.threads = self.pool = None
            self.restore_rows()
        if self.args.load_best_model_at_end and has_hosts:
            send_weights(self.model)  # of the best model, whose checkpoint only the first host has
        return output

    def compare_data(self) -> None:
        """UserError where the processes have different texts, labels, vocabulary or shapes of weights."""
        shapes = sorted((name, list(weight.shape)) for name, weight in self.model.state_dict().items())
        record = {"the model to begin with": f"one with the SHA-256 {digest(np.array(repr(shapes)))} of its shapes",
                  "label.txt": f"a file with {len(self.labels)} labels, SHA-256 {digest(np.array(self.labels))}"}
        for name, tokens in (("training", self.train_dataset), ("dev", self.eval_dataset)):
            if tokens is not None:
                record[f"the {name} data, or the vocabulary for it,"] = (
                    f"{tokens.num_texts} texts, SHA-256 {digest(tokens.ids, tokens.offsets, tokens.labels)}")
        compare_records("data", record)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        if not getattr(self.args, "full_embeddings", True):
            self.keep_rows()
        super().create_optimizer_and_scheduler(num_training_steps)
        if paddle.get_device() == "cpu":
            # a gradient that is put away costs less than one that is filled with zeros and added to
            self.optimizer.clear_grad = functools.partial(self.optimizer.clear_grad, set_to_zero=False)
        # recomputing runs the forward pass again within the backward one, where nobody says which numbers it had drawn
        if self.pool is not None and self.args.world_size == 1 and not self.args.recompute:
            self.threads = ThreadedModel(self.model, self.count_threads(), self.pool)

    def count_threads(self) -> int:
        """Return how many threads share a step's texts out."""
        return count_threads(self._get_train_sampler().texts_per_step())

    def training_texts(self) -> list[TokenizedTexts]:
        """List all texts that the model sees during the training."""
        return [texts for texts in (self.train_dataset, self.eval_dataset) if texts is not None]

    def keep_rows(self) -> None:
        """Train only the word embeddings of tokens that occur, from now until `restore_rows`."""
        table = find_table(self.model).weight
        if table.stop_gradient:
            return
        ids = occurring_ids(self.model, self.training_texts(), self.tokenizer.all_special_ids)
        os.makedirs(self.args.output_dir, exist_ok=True)
        self.rows = EmbeddingRows(self.model, ids, self.args.output_dir)
        self.add_callback(ShrinkRows(self.rows))
        get_logger().info(f"Word embeddings: trains the {len(ids):,} of {table.shape[0]:,} rows whose tokens occur in the data")

    def restore_rows(self) -> None:
        """Give the model its whole table of word embeddings back."""
        if self.rows is not None:
            self.rows.restore()
            self.pop_callback(ShrinkRows)
            self.rows = None

    def training_step(self, model: paddle.nn.Layer, inputs: dict[str, paddle.Tensor]) -> paddle.Tensor:
        if self.threads is None or "masked_positions" in inputs:  # which count the batch's rows
            return super().training_step(model, inputs)
        accumulated = self.args.gradient_accumulation_steps
        self.threads.begin(self.args.seed, self.state.global_step * accumulated + self.num_batches)
        self.num_batches += 1
        loss = super().training_step(self.threads, inputs)
        self.threads.backward()
        return loss

    def compute_loss(self, model: paddle.nn.Layer, inputs: dict[str, paddle.Tensor], return_outputs: bool = False
                     ) -> Union[paddle.Tensor, tuple[paddle.Tensor, paddle.Tensor]]:
        """As the library's, but in a training the loss is that of the answers for texts, each made of its windows' logits."""
        owners = inputs.pop("owners", None)
        if owners is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        logits, labels = join_logits(model(inputs["input_ids"]), inputs["labels"], owners, self.train_dataset.vote)
        loss = self.criterion(logits, labels)
        return (loss, logits) if return_outputs else loss

    def evaluation_loop(self, dataloader: paddle.io.DataLoader, *given: Any, **options: Any) -> EvalLoopOutput:
        """As the library's, but the loss is that of all texts at once: not of their windows, nor of texts that several processes
        repeat, nor weighted batch by batch."""
        output = self.predict_rows(dataloader, *given, **options)
        prefix, tokens = options.get("metric_key_prefix", "eval"), dataloader.dataset
        if f"{prefix}_loss" in output.metrics and output.predictions is not None and output.label_ids is not None:
            logits, label_ids = tokens.join(output.predictions), tokens.text_labels
            with paddle.no_grad():
                output.metrics[f"{prefix}_loss"] = float(self.criterion(paddle.to_tensor(logits), paddle.to_tensor(label_ids)))
        return output

    def predict_rows(self, *given: Any, **options: Any) -> EvalLoopOutput:
        """Run the library's evaluation, on a CPU with the rows of a batch shared out between threads."""
        if paddle.get_device() != "cpu":
            return super().evaluation_loop(*given, **options)
        num_threads = count_threads(self.args.per_device_eval_batch_size)
        try:
            with open_pool(num_threads) as pool:
                self.evaluated = EvaluatedModel(self.model, num_threads, pool)
                return super().evaluation_loop(*given, **options)
        finally:
            self.evaluated = None

    def prediction_step(self, model: paddle.nn.Layer, *given: Any, **options: Any) -> tuple[Optional[paddle.Tensor], ...]:
        return super().prediction_step(self.evaluated or model, *given, **options)

    def _set_state_dict_in_model(self, state_dict: dict[str, np.ndarray]) -> None:
        self.restore_rows()  # the best model, which is loaded at the end, has the whole table
        super()._set_state_dict_in_model(state_dict)

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        get_logger().info(f"***** {split} metrics *****")
        get_logger().info(describe_metrics(metrics))

    def _get_train_sampler(self) -> LengthGroupedBatchSampler:
        if getattr(self.args, "tokens_per_batch", None):
            return TokenBatchSampler(self.train_dataset, self.args.tokens_per_batch, self.args.seed, self.args.dataset_world_size,
                                     self.args.dataset_rank)
        return LengthGroupedBatchSampler(
            self.train_dataset, self.args.per_device_train_batch_size, self.args.seed, self.args.dataset_world_size,
            self.args.dataset_rank, self.args.dataloader_drop_last)

    def _load_optimizer_and_scheduler(self, checkpoint: Optional[str]) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                table = find_table(self.model).weight
                size = table.shape[0] if self.rows is None else self.rows.shape[0]
                fit_moments(self.optimizer._accumulators_holder, table.name, size, self.rows)  # what the library has just read
            self._load_rng_state(checkpoint)  # the library does so only after skipping batches, not at the start of an epoch
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            # damaged; or of 3.3.1, the state of whose random generator 2.6.2 cannot read
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{checkpoint}: its optimizer's or random state cannot be read ({reason}), expected the files that "
                            f"train.py wrote, by the Paddle that the training began with; --model_name_or_path {checkpoint} "
                            "begins a new training with its weights") from None

    def _load_rng_state(self, checkpoint: Optional[str]) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            generator = paddle.framework.core.default_cpu_generator()
            generator.manual_seed(generator.get_state().current_seed())

    def _save(self, output_dir: str, **options: Any) -> None:
        with self.rows.whole() if self.rows is not None else contextlib.nullcontext():
            super()._save(output_dir, **options)
        if self.args.should_save:
            os.remove(os.path.join(output_dir, "training_args.bin"))  # a pickle that nothing reads
            write_labels(os.path.join(output_dir, "label.txt"), self.labels)
            if self.rust_tokenizer is not None:
                save_rust_tokenizer(self.rust_tokenizer, os.path.join(output_dir, "tokenizer.json"),
                                    self.model.config.max_seq_length)

    def _save_checkpoint(self, model: paddle.nn.Layer, metrics: Optional[dict[str, float]] = None) -> None:
        """Write output_dir/checkpoint-N in a staging folder, whose last rename makes it visible, whole.

        In the place of the library's method, which writes it in its final place, file by file. Files and contents are the
        library's. metrics: of the evaluation just before, or None.
        """
        self.runtime_timer.start("checkpoint saving time")
        folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        staging = os.path.join(self.args.output_dir, STAGING)
        self._note_best(folder, metrics)
        random_states = self._collect_random_states()
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            try:
                self.save_model(staging)
                if not self.args.ignore_save_lr_and_optim:
                    moments = self.optimizer.state_dict()
                    if self.rows is not None:
                        moments[ROWS] = paddle.to_tensor(self.rows.ids)
                    paddle.save(moments, os.path.join(staging, "optimizer.pdopt"))
                    paddle.save(self.lr_scheduler.state_dict(), os.path.join(staging, "scheduler.pdparams"))
                    if self.do_grad_scaling:
                        paddle.save(self.scaler.state_dict(), os.path.join(staging, "scaler.pdparams"))
                paddle.save(random_states, os.path.join(staging, random_state_file(self.args)))
                self.state.save_to_json(os.path.join(staging, "trainer_state.json"))
                remove_folder(folder)
                os.replace(staging, folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)  # of what could not be finished: disk full, Ctrl-C, SIGTERM
            get_logger().debug(f"Checkpoint saved in {folder}")
            self._delete_old_checkpoints(folder)
        wait_for_all(f"checkpoint {self.state.global_step}")
        self.runtime_timer.stop()

    def _note_best(self, folder: str, metrics: Optional[dict[str, float]]) -> None:
        """Remember the checkpoint that is about to be written as the best one, if its metric is."""
        if metrics is None or self.args.metric_for_best_model is None:
            return
        if self.state.best_model_checkpoint is None or is_best(self.args, self.state, metrics):
            self.state.best_metric, self.state.best_model_checkpoint = metrics[metric_name(self.args)], folder

    def _collect_random_states(self) -> Union[dict[str, Any], list[dict[str, Any]]]:
        """The states of all random generators, in the library's form; of all ranks, in several processes."""
        # Paddle 2.6.2 pickles of its CPU generator only the seed, not how far it has got: give it a new seed at every
        # checkpoint, so that the seed says all. Can go when a loaded generator state draws what the saved one draws.
        generator = paddle.framework.core.default_cpu_generator()
        generator.manual_seed(generator.random() >> 1)  # 3.3.1 cannot read a seed of 2**63 or more
        states = {"python": random.getstate(), "numpy": np.random.get_state(), "cuda": paddle.get_rng_state(),
                  "cpu": generator.get_state()}
        if self.args.world_size == 1:
            return states
        all_states: list[dict[str, Any]] = []
        paddle.distributed.all_gather_object(all_states, states)
        return all_states

    def _delete_old_checkpoints(self, newest: str) -> None:
        """Keep the newest save_total_limit checkpoints, always with the best and the newest among them."""
        limit = self.args.save_total_limit
        if not limit or limit <= 0:
            return
        folders = sorted(list_checkpoints(self.args.output_dir), key=lambda folder: int(folder.rsplit("-", 1)[1]))
        kept = {newest, self.state.best_model_checkpoint}.intersection(folders)
        for folder in reversed(folders):
            if len(kept) < limit:
                kept.add(folder)
            elif folder not in kept:
                get_logger().debug(f"Deleting older checkpoint [{folder}] due to args.save_total_limit")
                remove_folder(folder)


def random_state_file(args: TrainingArguments) -> str:
    """Return the name of the file in which the library looks for the states of the random generators."""
    return f"rng_state_{args.world_size}.pth" if args.world_size > 1 else "rng_state.pth"


def list_checkpoints(output_dir: str) -> list[str]:
    """Return the paths of output_dir/checkpoint-N."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    return [os.path.join(output_dir, name) for name in names if name.startswith("checkpoint-") and name[11:].isdigit()]


def remove_folder(folder: str) -> None:
    """Remove a checkpoint; it loses its name first, so that a kill in between leaves no half checkpoint."""
    if os.path.isdir(folder):
        doomed = os.path.join(os.path.dirname(folder), f".deleted-{os.path.basename(folder)}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def collate(rows: list[dict], pad_id: int) -> dict[str, np.ndarray]:
    """Make a batch of rows of TokenizedTexts.

    Returns {"input_ids": int64 [batch, longest], "labels": int64 [batch], or a row each where the labels have rows, "owners":
    int64 [batch], where texts have several rows}.
    """
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "input_ids"}
    return {"input_ids": pad_batch([row["input_ids"] for row in rows], pad_id), **batch}


def join_logits(logits: paddle.Tensor, labels: paddle.Tensor, owners: Optional[paddle.Tensor], vote: str
              ) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Make the logits of the texts in a batch of those of their windows, as `join_windows` does, but differentiable.

    logits: [num_rows, size]; labels, owners: int64 [num_rows], the windows of a text one after the other; owners: None: each row
    is a text. Returns logits and labels of the texts.
    """
    if owners is None:
        return logits, labels
    is_first = np.diff(owners.numpy(), prepend=-1) != 0
    join = paddle.geometric.segment_max if vote == "max" else paddle.geometric.segment_mean
    texts = paddle.to_tensor(np.cumsum(is_first) - 1)
    return join(logits.astype("float32"), texts), labels[paddle.to_tensor(np.flatnonzero(is_first))]
