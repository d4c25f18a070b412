"""Which settings: a search by trials (Optuna), then the best settings against those given, on seeds that have chosen nothing."""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

import numpy as np

from textcls.common.errors import UserError, needs_packages
from textcls.common.log import describe_seconds, get_logger, only_warnings
from textcls.common.outputs import STAGING, complete_file, locked_folder
from textcls.data.files import LabelledTexts, read_json
from textcls.training.callbacks import Diverged, metric_name
from textcls.training.resume import MODEL_FILES, STUDY, TrainArguments
from textcls.training.runs import change_folder, change_options, check_record, is_finished, predict_texts
from textcls.training.scoring import INTERVAL, METRICS, RESAMPLES, score_classes
from textcls.training.trainer import check_limits, list_checkpoints

from paddlenlp.trainer import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    import optuna

Settings = dict[str, Any]  # options that the search decides: {name: value}
Train = Callable[[Settings, TrainArguments, Sequence[TrainerCallback]], None]  # trains and saves a model in args.output_dir
LEARNING_RATES = ("learning_rate", "ppt_learning_rate")
RATE_FACTOR = 5  # a learning rate is looked for from a fifth of that given to five times as much
CHOICES = {"per_device_train_batch_size": (16, 32), "warmup_ratio": (0.0, 0.1), "weight_decay": (0.0, 0.01),
           "label_smoothing": (0.0, 0.1), "use_rdrop": (False, True)}  # and what is given; as far as a script has the option
FULL_TRIALS = 5  # that come to their end before any is cut short


@dataclass
class SearchArguments(TrainArguments):
    search: bool = field(default=False, metadata={"help": "Look for better settings by --n_trials trainings, compare the best "
                                                  "with those given on fresh seeds, and train with them. Goes on where it was "
                                                  "stopped."})
    n_trials: int = field(default=20, metadata={"help": "Of --search: trials in all, those of a search that goes on included."})
    timeout: Optional[float] = field(default=None, metadata={"help": "Of --search: seconds after which no new trial begins."})
    fresh_seeds: int = field(default=3, metadata={"help": "Of --search: seeds on which the best settings and those given are "
                                                  "compared."})


class Comparison(NamedTuple):
    """How much better the best settings are than those given. All but the interval: of the metric, 0 to 1."""

    best: np.ndarray  # float64 [num_seeds]
    given: np.ndarray  # float64 [num_seeds]
    difference: float  # of the means
    low: float  # the INTERVAL of the difference
    high: float
    verdict: str


# ---------------------------------------------------------------- before the first training


def check_search(args: SearchArguments) -> None:
    """Refuse what a search cannot work with. UserError."""
    if not args.search:
        return
    check_limits(args, {"n_trials": (1, 100_000), "fresh_seeds": (2, 100), "timeout": (0, 10**9)})
    if not args.learning_rate:
        raise UserError("--learning_rate 0: nothing to search around, expected more than 0")
    if args.seed + args.n_trials + args.fresh_seeds >= 2**32:
        raise UserError(f"--seed {args.seed}: out of range with --search, expected one to which trials and seeds can be added")
    if args.world_size > 1:
        raise UserError("--search runs in one process only, expected a run without paddle.distributed.launch")
    if args.resume_from_checkpoint is not None:
        raise UserError("--search goes on by itself where it was stopped, expected a run without --resume_from_checkpoint")
    metric = (args.metric_for_best_model or "").replace("eval_", "", 1)
    if not (args.do_train and args.load_best_model_at_end and args.evaluation_strategy.value != "no"):
        raise UserError("--search needs trainings that are evaluated, expected also --do_train --do_eval --evaluation_strategy "
                        "epoch --save_strategy epoch --load_best_model_at_end --metric_for_best_model accuracy")
    if metric not in METRICS:
        raise UserError(f"--metric_for_best_model {metric or 'loss'}: cannot be compared between settings, since label smoothing "
                        f"changes the loss itself, expected with --search one of {', '.join(METRICS)}")


def given_settings(model_args: Any, args: SearchArguments) -> Settings:
    """Return what is given of the options that the search decides."""
    names = [*LEARNING_RATES, *CHOICES]
    if getattr(args, "tokens_per_batch", None) or args.max_steps > 0:  # of which larger batches would just see more texts
        names.remove("per_device_train_batch_size")
    if args.warmup_steps:
        names.remove("warmup_ratio")
    return round_rates({name: getattr(one, name) for name in names for one in (model_args, args) if hasattr(one, name)})


def make_space(given: Settings) -> "dict[str, optuna.distributions.BaseDistribution]":
    """Say where each setting is looked for; what is given lies within."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {name: FloatDistribution(value / RATE_FACTOR, value * RATE_FACTOR, log=True) if name in LEARNING_RATES else
            CategoricalDistribution(sorted({*CHOICES[name], value})) for name, value in given.items()}


def open_study(args: SearchArguments, given: Settings, record: dict[str, Any]) -> "optuna.Study":
    """Open args.output_dir/study.db, or make it. record: what the search is made of, {what: its value}.

    UserError where it is of another search, or no study, or where a model of something else is in the folder.
    """
    with needs_packages("requirements-suite.txt"):
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = os.path.join(args.output_dir, STUDY)
    if args.overwrite_output_dir and os.path.exists(path):
        get_logger().info(f"Deleting the earlier search in {path}")
        os.remove(path)
    space = {f"range of {name}": str(where) for name, where in make_space(given).items()}
    is_new = not os.path.exists(path)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=FULL_TRIALS, n_warmup_steps=1)
    try:
        study = optuna.create_study(storage=f"sqlite:///{os.path.abspath(path)}", study_name="settings", load_if_exists=True,
                                    direction="maximize", pruner=pruner)
        before = study.user_attrs.get("record")
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: cannot be read as a study ({reason}), expected the file that --search wrote, or "
                        "--overwrite_output_dir to begin anew") from None
    record = {**record, **space}
    if before is None and study.trials:
        raise UserError(f"{path}: is a study of something else, expected the file that --search wrote, or --overwrite_output_dir "
                        "to begin anew")
    if before is None:  # new, or killed before anything was tried
        study.set_user_attr("record", record)
        if args.overwrite_output_dir:
            study.set_user_attr("output", {})  # whatever model is there may be replaced
    else:
        check_record(path, before, record)
    if not is_new and "output" not in study.user_attrs and MODEL_FILES.intersection(os.listdir(args.output_dir)):
        raise UserError(f"{args.output_dir}: holds a model that is not of the search in {path}, expected another --output_dir, "
                        "or --overwrite_output_dir to begin anew")
    return study


# ---------------------------------------------------------------- trials


class ReportToStudy(TrainerCallback):
    """Tells the study of each evaluation in a trial, and ends a trial that does worse than the median of the others had done."""

    def __init__(self, trial: "optuna.Trial"):
        self.trial, self.count, self.is_over = trial, 0, False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float],
                    **kwargs: Any) -> None:
        import optuna

        if self.is_over:  # the evaluation of the saved model
            return
        self.count += 1
        self.trial.report(metrics[metric_name(args)], self.count)
        if state.global_step < state.max_steps and self.trial.should_prune():
            raise optuna.TrialPruned

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.is_over = True


def round_rates(settings: Settings) -> Settings:
    """Cut learning rates to six digits, which can be read and typed."""
    return {name: float(f"{value:.6g}") if name in LEARNING_RATES else value for name, value in settings.items()}


def describe_settings(settings: Settings) -> str:
    """Put settings in a line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def list_done(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """List the trials that were measured, those that were cut short included."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def run_trials(study: "optuna.Study", args: SearchArguments, given: Settings, train: Train) -> None:
    """Try settings until there are args.n_trials trials, the first with the settings given.

    What a trial tries depends on args.seed and the trials before it alone: a search that was killed goes on as if it had not
    been.
    """
    import optuna

    space, begun = make_space(given), time.monotonic()
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        get_logger().info("A trial was stopped in its middle: it begins anew")
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    while (number := len(list_done(study))) < args.n_trials:
        if args.timeout is not None and number and time.monotonic() - begun >= args.timeout:
            get_logger().info(f"--timeout {args.timeout:g} is over: no new trial begins (the same command would go on)")
            break
        study.sampler = optuna.samplers.TPESampler(seed=args.seed + number)
        if not number and not study.get_trials(states=(optuna.trial.TrialState.WAITING,)):
            study.enqueue_trial(given)
        run_trial(study, study.ask(space), f"Trial {number + 1} of {args.n_trials}", args, train)


def run_trial(study: "optuna.Study", trial: "optuna.Trial", name: str, args: SearchArguments, train: Train) -> None:
    """Train with the settings of a trial, and tell the study of the metric of the model that a training would save."""
    import optuna

    settings, begun = round_rates(trial.params), time.monotonic()
    get_logger().info(f"{name}: {describe_settings(settings)}")
    try:
        value = train_aside(settings, args, args.seed, train, [ReportToStudy(trial)],
                            lambda folder: read_json(os.path.join(folder, "trainer_state.json"))["best_metric"])
    except (optuna.TrialPruned, Diverged, MemoryError) as error:
        reason = "worse than the median" if isinstance(error, optuna.TrialPruned) else str(error)
        trial.set_user_attr("ended", reason)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        get_logger().info(f"{name} was cut short: {reason}")
    else:
        study.tell(trial, value)
        get_logger().info(f"{name}: {metric_name(args)[5:]} {value:.4f} in {describe_seconds(time.monotonic() - begun)}; "
                          f"best so far {study.best_value:.4f}")


def train_aside(settings: Settings, args: SearchArguments, seed: int, train: Train, callbacks: Sequence[TrainerCallback],
                measure: Callable[[str], Any]) -> Any:
    """Train a model in a folder that is removed afterwards. Returns what `measure` says of the folder."""
    folder = os.path.join(args.output_dir, f"{STAGING}-trial")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        with only_warnings():
            train(settings, change_folder(change_options(args, settings), folder, seed=seed, report_to=[], save_total_limit=1,
                                          ignore_save_lr_and_optim=True), callbacks)
            return measure(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- the best against the settings given


def compare(study: "optuna.Study", args: SearchArguments, best: Settings, given: Settings, dev: LabelledTexts, train: Train
            ) -> Comparison:
    """Train with the best settings and with those given on args.fresh_seeds seeds that the trials have not had, and compare
    them on dev. What was measured is kept in the study."""
    guesses: list[list[list[int]]] = [[], []]
    for number in range(1, args.fresh_seeds + 1):
        for own, name, settings in zip(guesses, ("best settings", "settings given"), (best, given)):
            seed = args.seed + number
            key = f"seed {seed} {json.dumps(settings, sort_keys=True)}"
            if key not in study.user_attrs:
                get_logger().info(f"Fresh seed {number} of {args.fresh_seeds}, the {name}: {describe_settings(settings)}")
                study.set_user_attr(key, guess_dev(settings, args, seed, dev, train))
            own.append(study.user_attrs[key])
    return compare_guesses(np.array(guesses), dev[1], metric_name(args)[5:])


def guess_dev(settings: Settings, args: SearchArguments, seed: int, dev: LabelledTexts, train: Train) -> list[int]:
    """Train a model, and list the label ids that it gives to the texts of dev; where it diverges, an id that is no label's."""
    try:
        return train_aside(settings, args, seed, train, [],
                           lambda folder: predict_texts(folder, [dev[0]], args)[0].argmax(axis=1).tolist())
    except Diverged as error:
        get_logger().warning(f"{error}; all its answers count as wrong")
        return [int(dev[1].max()) + 1] * len(dev[1])


def compare_guesses(guesses: np.ndarray, label_ids: np.ndarray, metric: str) -> Comparison:
    """Compare two settings. guesses: int64 [2, num_seeds, num_rows], of the best and of those given; label_ids: int64 [num_rows].

    Two sources of chance are added up: which rows dev has (a paired bootstrap of rows: all models are asked about the same ones)
    and which seeds were drawn (the variance between the trainings of each). The interval is Welch's, with Student's t.
    """
    from scipy.stats import t

    num_seeds, num_rows = guesses.shape[1:]
    num_classes = int(max(guesses.max(), label_ids.max())) + 1

    def measure(rows: np.ndarray) -> np.ndarray:
        return np.array([[measure_metric(label_ids[rows], own[rows], num_classes, metric) for own in part] for part in guesses])

    values = measure(np.arange(num_rows))  # (2, num_seeds)
    generator = np.random.default_rng(0)
    means = np.array([measure(generator.integers(num_rows, size=(num_rows,))).mean(axis=1) for _ in range(RESAMPLES)])
    parts = np.append(values.var(axis=1, ddof=1) / num_seeds, (means[:, 0] - means[:, 1]).var(ddof=1))
    difference = float(values[0].mean() - values[1].mean())
    error = np.sqrt(parts.sum())
    if error > 0:
        freedom = parts.sum() ** 2 / (parts ** 2 / [num_seeds - 1, num_seeds - 1, max(num_rows - 1, 1)]).sum()
        error *= t.ppf((1 + INTERVAL) / 2, freedom)
    low, high = max(-1.0, difference - error), min(1.0, difference + error)
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference seen"
    return Comparison(values[0], values[1], difference, float(low), float(high), verdict)


def measure_metric(label_ids: np.ndarray, guesses: np.ndarray, num_classes: int, metric: str) -> float:
    """Compute one of METRICS. label_ids, guesses: int64 [num_rows]."""
    return score_classes(label_ids, guesses, num_classes)["accuracy" if metric.startswith("micro_") else metric]


# ---------------------------------------------------------------- what is said in the end


def rate_settings(study: "optuna.Study", seed: int) -> dict[str, float]:
    """Estimate how much of the differences between whole trials each setting explains, summing to 1 (fANOVA: Hutter et al. 2014).
    {}: the trials say nothing of it."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    values = {trial.value for trial in list_done(study) if trial.value is not None}
    if len(values) < 2:
        return {}
    try:
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed))
    except (RuntimeError, ValueError):  # no variance within its trees
        return {}


def command_line(settings: Settings) -> str:
    """Write this run's command line without the search, and with other settings."""
    left_out = {"search", "n_trials", "timeout", "fresh_seeds", "overwrite_output_dir", *settings}
    words, is_kept = [], True
    for word in sys.argv[1:]:
        if word.startswith("--"):
            is_kept = word[2:].split("=")[0] not in left_out
        if is_kept:
            words.append(word)
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    if words[0].endswith(".json") and read_json(words[0]).get("search"):
        words += ["--search", "False"]
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *words])


def table_lines(study: "optuna.Study") -> list[str]:
    """Make a table of the trials, the best first, those that were cut short last."""
    trials = list_done(study)
    names = list(trials[0].params)
    rows = [["trial", "value", *names]]
    values = [trial.value for trial in trials]
    for index in np.argsort([np.inf if value is None else -value for value in values], kind="stable").tolist():
        value, settings = values[index], round_rates(trials[index].params)
        rows.append([f"{index + 1}{' (given)' if not index else ''}", "cut short" if value is None else f"{value:.4f}",
                     *(str(settings[name]) for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 2)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def report(study: "optuna.Study", args: SearchArguments, best: Settings, comparison: Optional[Comparison]) -> None:
    """Log the table, what each setting matters, the comparison and the best command line; keep them in search.json."""
    metric, command = metric_name(args)[5:], command_line(best)
    importance = rate_settings(study, args.seed)
    info = get_logger().info
    info(f"Trials, {metric} of dev:\n" + "\n".join(table_lines(study)))
    shares = ", ".join(f"{name} {share:.2f}" for name, share in importance.items()) or "the trials say nothing of it"
    count = sum(trial.value is not None for trial in list_done(study))
    info(f"Importance of each setting (share of the differences of {count} whole trials, a hint where they are few): {shares}")
    if comparison is None:
        info("No trial was better than the settings given: no difference seen")
    else:
        means = [f"{values.mean():.4f} (sd {values.std(ddof=1):.4f})" for values in (comparison.best, comparison.given)]
        info(f"{metric} on {args.fresh_seeds} fresh seeds: best settings {means[0]}, settings given {means[1]}, difference "
             f"{comparison.difference:+.4f} ({INTERVAL * 100:.0f}% interval {comparison.low:+.4f} to {comparison.high:+.4f}): "
             f"{comparison.verdict}")
    info(f"The best command line:\n{command}")
    trials = [{"settings": round_rates(trial.params), "value": trial.value, **trial.user_attrs} for trial in list_done(study)]
    result = {"metric": metric, "best": best, "importance": importance, "command": command, "trials": trials,
              "comparison": None if comparison is None else {**comparison._asdict(), "best": comparison.best.tolist(),
                                                             "given": comparison.given.tolist()}}
    with complete_file(os.path.join(args.output_dir, "search.json")) as output:
        json.dump(result, output, ensure_ascii=False, indent=1)


def search_settings(model_args: Any, args: SearchArguments, record: dict[str, Any], dev: LabelledTexts, train: Train
                    ) -> Settings:
    """Search, compare, and train with the best settings in args.output_dir, as without a search. Returns them.

    record: what the search is made of, {what: its value}. dev: what models are measured on. UserError.
    """
    given = given_settings(model_args, args)
    with locked_folder(args.output_dir):
        study = open_study(args, given, record)
        run_trials(study, args, given, train)
        whole = [trial for trial in list_done(study) if trial.value is not None]
        if not whole:
            raise UserError("no trial came to its end, expected a lower --learning_rate or a smaller batch size")
        best = round_rates(max(whole, key=lambda trial: trial.value or 0.0).params)  # the first one of several
        comparison = None if best == given else compare(study, args, best, given, dev, train)
    is_begun = study.user_attrs.get("output") == best
    if not (is_begun and is_finished(args.output_dir)):
        get_logger().info(f"Training with the best settings: {describe_settings(best)}")
        study.set_user_attr("output", best)
        resumed = args.output_dir if is_begun and list_checkpoints(args.output_dir) else None
        train(best, change_folder(change_options(args, best), args.output_dir, resume_from_checkpoint=resumed), [])
    report(study, args, best, comparison)
    return best
