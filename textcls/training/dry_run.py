"""What a training will take: some of its steps are run and timed, and nothing is written."""

import copy
import math
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.common.log import describe_seconds, get_logger
from textcls.models.paddle_setup import paddle
from textcls.training.callbacks import ResumableEarlyStopping, TrainingLog
from textcls.training.samplers import LengthGroupedBatchSampler
from textcls.training.trainer import ClassificationTrainer

from paddlenlp.trainer import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

TIMED_STEPS, LEAST_TIMED, MOST_SECONDS = 24, 4, 30  # steps that are timed, fewer where they take long
TIMED_BATCHES = 8  # of the evaluation


class ChosenBatches(paddle.io.BatchSampler):
    """Some batches of an epoch, in the place of its sampler. batches: lists of row numbers; sampler: of the epoch."""

    def __init__(self, batches: list[list[int]], sampler: LengthGroupedBatchSampler):
        self.batches, self.sampler = batches, sampler

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def texts_per_step(self) -> int:
        """Return how many texts a step has, or has on average."""
        return self.sampler.texts_per_step()


class TimeSteps(TrainerCallback):
    """Notes how long each step takes, and ends the training when that is known well enough."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begun, self.moments = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: paddle.nn.Layer,
                       **kwargs: Any) -> None:
        trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
        self.moments = 8 * sum(int(parameter.size) for parameter in trained)  # bytes: two numbers for each

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)
        control.should_training_stop = (control.should_training_stop or
                                        len(self.seconds) >= LEAST_TIMED and sum(self.seconds) > MOST_SECONDS)


def estimate_training(args: TrainingArguments, make_trainer: Callable[[], ClassificationTrainer]) -> None:
    """Log the time, the memory and the disk space that a training will take on this machine.

    make_trainer: makes what trains by args, which are changed here. UserError with several processes.
    """
    if args.world_size > 1:
        raise UserError("--dry_run: times a single process, expected a run without paddle.distributed.launch")
    plan, folder = copy.copy(args), args.output_dir
    args.report_to, args.load_best_model_at_end, args.logging_steps = [], False, 10**9
    args.evaluation_strategy, args.save_strategy = type(args.evaluation_strategy).NO, type(args.save_strategy).NO
    with tempfile.TemporaryDirectory(prefix="dry-run-") as args.output_dir:
        trainer = make_trainer()
        sampler, accumulated = trainer._get_train_sampler(), args.gradient_accumulation_steps
        batches, lengths = list(sampler), trainer.train_dataset.lengths
        sizes = np.array([len(batch) * int(lengths[batch].max()) for batch in batches])  # tokens, padding included
        epoch = max(1, len(batches) // accumulated)  # steps
        total = plan.max_steps if plan.max_steps > 0 else math.ceil(plan.num_train_epochs * epoch)
        chosen = choose_batches(sizes, accumulated)
        args.max_steps = len(chosen) // accumulated
        get_logger().info(f"Dry run: times up to {min(args.max_steps, total)} of {total:,} steps ...")
        timer = TimeSteps()
        for callback in (TrainingLog, ResumableEarlyStopping):
            trainer.pop_callback(callback)
        trainer.add_callback(timer)
        chosen_batches = ChosenBatches([batches[index] for index in chosen], sampler)
        trainer._get_train_sampler = lambda: chosen_batches  # type: ignore[method-assign]  # for this training only
        trainer.train()
        evaluation = time_evaluation(trainer)

    timed = sizes[chosen].reshape(-1, accumulated).sum(axis=1)[:len(timer.seconds)]
    # the first step is the largest, for the memory, and does much for the first time
    first = 1 if len(timed) > 1 else 0
    step = sum(timer.seconds[first:]) / timed[first:].sum() * sizes.mean() * accumulated
    evaluations = count_times(plan.evaluation_strategy.value, plan.eval_steps, total, epoch) + int(plan.do_eval)
    seconds = total * step + evaluations * evaluation
    sooner = "; early stopping may end it sooner" if plan.load_best_model_at_end else ""
    get_logger().info(f"Time: about {describe_seconds(seconds)}: {total:,} steps of {step * 1000:.0f} ms, {epoch:,} an epoch; "
                      f"evaluations: {evaluations} of {evaluation:.1f} s{sooner}")
    saves = count_times(plan.save_strategy.value, plan.save_steps, total, epoch)
    log_space(folder, trainer, timer.moments, min(saves, (plan.save_total_limit or saves) + 1))  # one more while it is written
    get_logger().info("Nothing was written. Without --dry_run the training begins.")


def choose_batches(sizes: np.ndarray, accumulated: int) -> np.ndarray:
    """Choose batches to time: the largest first, then others, evenly spread over all sizes; as many as fill steps.

    sizes: int [num_batches], tokens. accumulated: batches of a step. Returns int [num_chosen].
    """
    order = np.argsort(-sizes, kind="stable")
    count = max(1, min(TIMED_STEPS, len(sizes) // accumulated)) * accumulated
    spread = order[np.linspace(0, len(order) - 1, count).round().astype(int)]
    first, others = spread[:1], spread[1:]
    return np.concatenate([first, np.random.default_rng(0).permutation(others)])


def count_times(strategy: str, interval: Optional[int], total: int, epoch: int) -> int:
    """Count the evaluations or checkpoints of a training of `total` steps, `epoch` of them an epoch."""
    if strategy == "no":
        return 0
    return math.ceil(total / epoch) if strategy == "epoch" else total // (interval or total)


def time_evaluation(trainer: ClassificationTrainer) -> float:
    """Return the seconds that an evaluation takes, by some of its batches; 0 without dev texts."""
    tokens, size = trainer.eval_dataset, trainer.args.per_device_eval_batch_size
    if tokens is None:
        return 0.0
    starts = np.arange(0, tokens.num_texts, size)
    some = starts[np.linspace(0, len(starts) - 1, min(TIMED_BATCHES, len(starts))).round().astype(int)]
    part = tokens.select(np.concatenate([np.arange(start, min(start + size, tokens.num_texts)) for start in some]))
    trainer.compute_metrics = None
    begun = time.perf_counter()
    trainer.evaluate(part)
    return (time.perf_counter() - begun) * float(tokens.lengths.sum() / part.lengths.sum())


def log_space(folder: str, trainer: ClassificationTrainer, moments: int, num_checkpoints: int) -> None:
    """Log memory and disk space. folder: of the training; moments: bytes; num_checkpoints: at once."""
    if paddle.get_device().startswith("gpu"):
        get_logger().info(f"GPU memory: {paddle.device.cuda.max_memory_allocated() / 1e9:.1f} GB at its peak")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    get_logger().info(f"Memory: {peak / 1e9:.1f} GB at its peak, of {whole / 1e9:.1f} GB of this machine")
    model = sum(4 * int(parameter.size) for parameter in trainer.model.parameters())
    needed = model + num_checkpoints * (model + moments)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder or ".").free
    get_logger().info(f"Disk: about {needed / 1e9:.2f} GB in --output_dir (the model {model / 1e9:.2f} GB; checkpoints: up to "
                      f"{num_checkpoints} of {(model + moments) / 1e9:.2f} GB); {free / 1e9:.1f} GB are free there")
    if needed > free:
        get_logger().warning("There is not enough free space, expected a smaller --save_total_limit, or another --output_dir")
