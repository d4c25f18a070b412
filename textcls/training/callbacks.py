"""What a training does between its steps: its log, early stopping, the end of one that has diverged; which model is best."""

from typing import TYPE_CHECKING, Any

import numpy as np

from textcls.common.errors import UserError
from textcls.common.log import describe_seconds, get_logger, progress_bar
from textcls.models.paddle_setup import paddle
from textcls.training.embedding_rows import EmbeddingRows
from textcls.training.trainer_import import paddlenlp  # noqa: F401  before anything of its trainer

from paddlenlp.trainer import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from textcls.training.trainer import ClassificationTrainer

# of the metrics of an evaluation: what is as in every other one, said otherwise, or the accuracy again
NOT_SAID = ("_runtime", "_per_second", "progress_or_epoch", "_micro_", "recall@")


def metric_name(args: TrainingArguments) -> str:
    """Return the name under which an evaluation gives the metric that decides which model is best: eval_accuracy."""
    return "eval_" + args.metric_for_best_model.replace("eval_", "", 1)


def is_best(args: TrainingArguments, state: TrainerState, metrics: dict[str, float]) -> bool:
    """Return whether an evaluation's metrics are better than those of the best checkpoint so far."""
    value, best = metrics[metric_name(args)], state.best_metric
    return best is None or (value > best if args.greater_is_better else value < best)


class Diverged(UserError):
    """A training whose loss is no longer a number."""


class ResumableEarlyStopping(EarlyStoppingCallback):
    """Early stopping whose patience survives a resume, where the library's callback would count from zero again."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        values = [entry[metric_name(args)] for entry in state.log_history if metric_name(args) in entry]
        if values:
            best = np.argmax(values) if args.greater_is_better else np.argmin(values)
            self.early_stopping_patience_counter = len(values) - 1 - int(best)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float],
                    **kwargs: Any) -> None:
        is_at_end = control.should_training_stop
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop and not is_at_end:
            get_logger().info(f"Early stop! No better {metric_name(args)} in {self.early_stopping_patience} evaluations")


class DropRemainder(TrainerCallback):
    """Forget the gradients of batches that gradient accumulation left over at the end of an epoch: the library carries them
    into the next epoch, but not into its checkpoints, so that a resumed training would go another way."""

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       optimizer: paddle.optimizer.Optimizer, **kwargs: Any) -> None:
        optimizer.clear_grad()


class StopAtNonFinite(TrainerCallback):
    """End a training whose loss is no longer a number: nothing that follows could mend it."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float],
               **kwargs: Any) -> None:
        for name in ("loss", "eval_loss", "train_loss"):
            if not np.isfinite(logs.get(name, 0.0)):
                raise Diverged(f"the training has diverged: {name} is {logs[name]} at step {state.global_step}, expected a "
                               "number; try a lower --learning_rate, or --warmup_ratio 0.1")


class CountBatches(TrainerCallback):
    """Lets a trainer's num_batches be those of the step that is going on, whatever an epoch has left over."""

    def __init__(self, trainer: "ClassificationTrainer"):
        self.trainer = trainer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.num_batches = 0


class ShrinkRows(TrainerCallback):
    """Notes by how much weight decay makes the word embeddings smaller that are left out of a training."""

    def __init__(self, rows: EmbeddingRows):
        self.rows = rows

    def on_optimizer_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                           optimizer: paddle.optimizer.Optimizer, **kwargs: Any) -> None:
        self.rows.shrink(1 - optimizer.get_lr() * args.weight_decay)


class TrainingLog(TrainerCallback):
    """What a training says: its size, how far it is, the loss, and each evaluation in a line. In the place of the library's log.

    shows_progress: whether it says how far it is.
    """

    def __init__(self, shows_progress: bool):
        self.shows_progress = shows_progress

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       train_dataloader: paddle.io.DataLoader, **kwargs: Any) -> None:
        begun = f"; going on after step {state.global_step}" if state.global_step else ""
        get_logger().info(f"Training begins: {state.max_steps} steps, {len(train_dataloader)} batches of "
                          f"{train_dataloader.batch_sampler.texts_per_step()} texts an epoch{begun}")
        self.steps = progress_bar(state.max_steps, "Training", unit="steps", initial=state.global_step,
                                  disable=not (self.shows_progress and state.is_world_process_zero))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps.update(1)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps.__exit__(None, None, None)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float],
               train_dataloader: paddle.io.DataLoader, **kwargs: Any) -> None:
        if "loss" in logs:
            epoch, batch = divmod((state.global_step - 1) * args.gradient_accumulation_steps, len(train_dataloader))
            get_logger().info("global step %d, epoch: %d, batch: %d, loss: %.5f, speed: %.2f step/s" % (
                state.global_step, epoch + 1, batch + 1, logs["loss"], logs["interval_steps_per_second"]))
        elif "train_runtime" in logs:
            duration = describe_seconds(logs["train_runtime"])
            get_logger().info(f"Training ends at step {state.global_step} after {duration}")
        elif control.should_evaluate:  # within the training; the last one is said by log_metrics
            get_logger().info(f"epoch {state.epoch:.3g}: {describe_metrics(logs)}")


def describe_metrics(metrics: dict[str, float]) -> str:
    """Put the metrics that a user looks for in a line."""
    said = [name for name in metrics if not any(part in name for part in NOT_SAID)]
    return ", ".join(f"{name}: {metrics[name]:.4f}" for name in said)
