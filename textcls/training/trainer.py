"""What train.py and prune.py train with: options, PaddleNLP's Trainer with batches by length, whole checkpoints and exact
resumption."""

import contextlib
import os
import random
import shutil
import sys
import traceback

import numpy as np

from textcls.common.errors import UserError
from textcls.common.log import get_logger, progress_bar, without_library_log
from textcls.common.options import add_obsolete_options, add_version_option
from textcls.common.outputs import STAGING, write_labels
from textcls.data.files import read_json
from textcls.data.tokens import pad_batch
from textcls.models.paddle_setup import paddle

import paddlenlp.prompt  # noqa: F401  before its trainer: they import each other
from paddlenlp.trainer import EarlyStoppingCallback, PdArgumentParser, Trainer, TrainerCallback
from paddlenlp.trainer.integrations import get_available_reporting_integrations

GROUP_BATCHES = 50  # batches that are sorted by length together: enough to save the padding, few enough to stay random

COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_steps", "eval_steps",
          "logging_steps", "eval_accumulation_steps")


def parse_dataclasses(classes, description, obsolete=()):
    """Read a script's options from the command line, or from a JSON file named first. Returns one object per class.

    obsolete: options that are taken without effect, of OBSOLETE in textcls/common/options.py. Raises UserError.
    """
    script = os.path.basename(sys.argv[0])

    def refuse(message):
        raise UserError(f"{script}: {message} ({script} --help lists all options)")

    parser = PdArgumentParser(classes, allow_abbrev=False, description=description.splitlines()[0])
    add_version_option(parser)
    add_obsolete_options(parser, *obsolete)
    parser.error = refuse  # instead of the usage of 150 options
    arguments = sys.argv[1:]
    if arguments and arguments[0].endswith(".json"):
        from_file = []
        for name, value in read_json(arguments[0]).items():
            if value is not None:
                from_file += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        arguments = from_file + arguments[1:]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True,
                                                              look_for_args_file=False)
    except (ValueError, AssertionError) as error:  # from TrainingArguments' own checks
        condition = traceback.extract_tb(error.__traceback__)[-1].line or ""  # some of them say nothing else
        raise UserError(f"{script}: {str(error) or condition.replace('assert self.', 'expected --')}") from None
    if unknown:
        refuse(f"unknown option {' '.join(unknown)}")
    return parsed


def check_training_arguments(args):
    """Refuse values of TrainingArguments that would only fail, or train nothing, later. Raises UserError."""
    for name in COUNTS:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: out of range, expected 1 or more")
    if not 0 <= args.learning_rate <= 1000:  # not a number is refused, too
        raise UserError(f"--learning_rate {args.learning_rate}: out of range, expected 0 to 1000")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: out of range, expected 0 to {2**32 - 1}")
    for name in ("sharding", "enable_auto_parallel", "unified_checkpoint"):
        if getattr(args, name):
            raise UserError(f"--{name}: not supported, expected a run without it; models of this size fit on one device")
    for name in ("tensor_parallel_degree", "pipeline_parallel_degree"):
        if getattr(args, name) > 1:
            raise UserError(f"--{name} {getattr(args, name)}: not supported, expected a run without it; several processes share "
                            "the rows, not the model")
    if args.optim.value != "adamw":
        raise UserError(f"--optim {args.optim.value}: PaddleNLP 2.8.1 has no such optimizer, expected adamw")
    if args.label_names:
        raise UserError("--label_names: the labels are those of label.txt, expected a run without it")
    if args.lr_scheduler_type.value == "polynomial" and args.lr_end >= args.learning_rate:
        raise UserError(f"--lr_end {args.lr_end}: expected less than --learning_rate {args.learning_rate}")
    unknown = [name for name in args.report_to if name not in get_available_reporting_integrations()]
    if unknown:  # asked for by name: a missing package would only show when the training begins
        raise UserError(f"--report_to {unknown[0]}: not installed or unknown, expected visualdl or none")
    if not 0 < args.num_train_epochs < float("inf") and args.max_steps <= 0:
        raise UserError(f"--num_train_epochs {args.num_train_epochs}: out of range, expected more than 0")


@contextlib.contextmanager
def plain_library_errors():
    """Show what the library says of an option's value without a traceback: some it checks only when the training begins."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"the training cannot go on ({type(error).__name__}: {error}; {os.path.basename(place.filename)}:"
                        f"{place.lineno}), expected values that PaddleNLP's options take") from error


def check_batch(args, num_rows):
    """UserError where --dataloader_drop_last would drop all training rows."""
    if args.dataloader_drop_last and num_rows < args.per_device_train_batch_size * args.dataset_world_size:
        raise UserError(f"--dataloader_drop_last: {num_rows} training rows do not fill one batch, expected a smaller "
                        "--per_device_train_batch_size")


class LengthGroupedBatchSampler(paddle.io.DistributedBatchSampler):
    """Batches of texts of like length, shuffled anew in every epoch.

    Every rank draws the same order from (seed, epoch) and takes its share of each step, so that the ranks work on
    batches of like length. Texts are repeated where the last step could not be shared out evenly.
    """

    def __init__(self, dataset, batch_size, seed, num_replicas, rank, drop_last):
        super().__init__(dataset, batch_size, num_replicas=num_replicas, rank=rank, drop_last=drop_last)
        self.seed = seed

    def __iter__(self):
        generator = np.random.default_rng([self.seed, self.epoch])
        lengths, step = self.dataset.lengths, self.batch_size * self.nranks
        order = self.draw_order(generator)
        groups = [order[start:start + step * GROUP_BATCHES] for start in range(0, len(order), step * GROUP_BATCHES)]
        order = np.concatenate([group[np.argsort(lengths[group], kind="stable")] for group in groups])
        for index in generator.permutation(len(self)):
            batch = order[index * step:(index + 1) * step]
            if len(batch) % self.nranks:
                batch = np.resize(batch, len(batch) + self.nranks - len(batch) % self.nranks)
            yield batch[self.local_rank::self.nranks].tolist()

    def draw_order(self, generator):
        """The texts of an epoch in random order: int64 [num_texts]."""
        return generator.permutation(len(self.dataset))

    def __len__(self):
        step = self.batch_size * self.nranks
        return len(self.dataset) // step if self.drop_last else -(-len(self.dataset) // step)


class ResumableEarlyStopping(EarlyStoppingCallback):
    """Early stopping whose patience survives a resume: the library's callback would count from zero again."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        key = "eval_" + args.metric_for_best_model.replace("eval_", "", 1)
        values = [entry[key] for entry in state.log_history if key in entry]
        if values:
            best = np.argmax(values) if args.greater_is_better else np.argmin(values)
            self.early_stopping_patience_counter = len(values) - 1 - int(best)


class DropRemainder(TrainerCallback):
    """Forget the gradients of batches that gradient accumulation left over at the end of an epoch: the library carries them
    into the next epoch, but not into its checkpoints, so that a resumed training would go another way."""

    def on_epoch_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer.clear_grad()


class StopAtNonFinite(TrainerCallback):
    """End a training whose loss is no longer a number: nothing that follows could mend it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss", "train_loss"):
            if not np.isfinite((logs or {}).get(name, 0.0)):
                raise UserError(f"the training has diverged: {name} is {logs[name]} at step {state.global_step}, expected a "
                                "number; try a lower --learning_rate, or --warmup_ratio 0.1")


class LoggedProgress(TrainerCallback):
    """Progress as lines of the log, where the library's bars would fill it. The loss is logged as always."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = progress_bar(state.max_steps, "Training", unit="steps", disable=not state.is_world_process_zero)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.update(1)


class ClassificationTrainer(Trainer):
    """PaddleNLP's Trainer with length-grouped batches, checkpoints that are complete or absent, and exact resumption.

    labels: list of str, position = class id; rust_tokenizer: a tokenizers.Tokenizer to save with the model, or None. The
    other options are the library's.
    """

    def __init__(self, labels, rust_tokenizer, args, **options):
        self.labels, self.rust_tokenizer = labels, rust_tokenizer
        is_logged = not args.disable_tqdm and (sys.stderr is None or not sys.stderr.isatty())
        args.disable_tqdm = args.disable_tqdm or is_logged
        super().__init__(args=args, **options)
        if is_logged:
            self.add_callback(LoggedProgress())

    def _get_train_sampler(self):
        return LengthGroupedBatchSampler(
            self.train_dataset, self.args.per_device_train_batch_size, self.args.seed, self.args.dataset_world_size,
            self.args.dataset_rank, self.args.dataloader_drop_last)

    def evaluation_loop(self, *args, **options):
        with without_library_log():  # five lines per evaluation
            return super().evaluation_loop(*args, **options)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        self._load_rng_state(checkpoint)  # the library does so only after skipping batches, not at the start of an epoch

    def _load_rng_state(self, checkpoint):
        try:
            super()._load_rng_state(checkpoint)
        except RuntimeError as error:  # 2.6.2 cannot read the state of a generator that 3.3.1 has written
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{checkpoint}: its random state cannot be read ({reason}), expected the Paddle that the training "
                            f"began with; --model_name_or_path {checkpoint} begins a new training with its weights") from None
        if checkpoint is not None:
            generator = paddle.framework.core.default_cpu_generator()
            generator.manual_seed(generator.get_state().current_seed())

    def _save(self, output_dir=None, **options):
        super()._save(output_dir, **options)
        if self.args.should_save:
            os.remove(os.path.join(output_dir, "training_args.bin"))  # a pickle that nothing reads
            write_labels(os.path.join(output_dir, "label.txt"), self.labels)
            if self.rust_tokenizer is not None:
                self.rust_tokenizer.save(os.path.join(output_dir, "tokenizer.json"))

    def _save_checkpoint(self, model, metrics=None):
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
                    paddle.save(self.optimizer.state_dict(), os.path.join(staging, "optimizer.pdopt"))
                    paddle.save(self.lr_scheduler.state_dict(), os.path.join(staging, "scheduler.pdparams"))
                    if self.do_grad_scaling:
                        paddle.save(self.scaler.state_dict(), os.path.join(staging, "scaler.pdparams"))
                paddle.save(random_states, os.path.join(staging, random_state_file(self.args)))
                self.state.save_to_json(os.path.join(staging, "trainer_state.json"))
                remove_folder(folder)
                os.replace(staging, folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)  # of what could not be finished: disk full, Ctrl-C, SIGTERM
            get_logger().info(f"Checkpoint saved in {folder}")
            self._delete_old_checkpoints(folder)
        self.runtime_timer.stop()

    def _note_best(self, folder, metrics):
        """Remember the checkpoint that is about to be written as the best one, if its metric is."""
        if metrics is None or self.args.metric_for_best_model is None:
            return
        value = metrics["eval_" + self.args.metric_for_best_model.replace("eval_", "", 1)]
        best = self.state.best_metric
        if best is None or self.state.best_model_checkpoint is None or (
                value > best if self.args.greater_is_better else value < best):
            self.state.best_metric, self.state.best_model_checkpoint = value, folder

    def _collect_random_states(self):
        """The states of all random generators, in the library's form; of all ranks, in several processes."""
        # Paddle 2.6.2 pickles of its CPU generator only the seed, not how far it has got: give it a new seed at every
        # checkpoint, so that the seed says all. Can go when a loaded generator state draws what the saved one draws.
        generator = paddle.framework.core.default_cpu_generator()
        generator.manual_seed(generator.random() >> 1)  # 3.3.1 cannot read a seed of 2**63 or more
        states = {"python": random.getstate(), "numpy": np.random.get_state(), "cuda": paddle.get_rng_state(),
                  "cpu": generator.get_state()}
        if self.args.world_size == 1:
            return states
        all_states = []
        paddle.distributed.all_gather_object(all_states, states)
        return all_states

    def _delete_old_checkpoints(self, newest):
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
                get_logger().info(f"Deleting older checkpoint [{folder}] due to args.save_total_limit")
                remove_folder(folder)


def random_state_file(args):
    """Name of the file in which the library looks for the states of the random generators."""
    return f"rng_state_{args.world_size}.pth" if args.world_size > 1 else "rng_state.pth"


def lock_folder(folder):
    """Make a folder this process's own until it ends; UserError while another training or pruning works in it. Linux, macOS."""
    os.makedirs(folder, exist_ok=True)
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)  # stays open; the system closes it with the process
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another run is writing there, expected another --output_dir, or its end") from None
    except ImportError:
        pass  # Windows has no such lock


def list_checkpoints(output_dir):
    """Paths of output_dir/checkpoint-N."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    return [os.path.join(output_dir, name) for name in names if name.startswith("checkpoint-") and name[11:].isdigit()]


def remove_folder(folder):
    """Remove a checkpoint; it loses its name first, so that a kill in between leaves no half checkpoint."""
    if os.path.isdir(folder):
        doomed = os.path.join(os.path.dirname(folder), f".deleted-{os.path.basename(folder)}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def collate(rows, pad_id):
    """{"input_ids": int64 [batch, longest], "labels": int64 [batch], or a row each where the labels have rows}"""
    return {"input_ids": pad_batch([row["input_ids"] for row in rows], pad_id),
            "labels": np.stack([row["labels"] for row in rows])}
