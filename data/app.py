"""From a table to a running service, one stage after the other; `make app` runs it.

    python data/app.py --table_file my_table.csv --text_column 问题 --label_column 类别
    python data/app.py --table_file my_table.csv --model ernie-3.0-medium-zh --output_dir build/app/medium --port 8190
    python data/app.py --table_file my_table.csv --way index --no_serve

Reads   table_file, as data/table.py does; model: a folder or a built-in name. The default, data, is the small model of this
        repository without pretrained weights: nothing is downloaded, and a pretrained model will do better.
Writes  output_dir/: data/ (train.txt, dev.txt, label.txt), model/ (a classifier's checkpoint, or an encoder's), export/,
        bad_case.txt, of a classifier report/, of an index index/; logs/ (what each stage says); app.json (inputs and choices).
Prints  a line a stage, then how good the model is, and the next commands; in the end it serves until Ctrl-C.

A stage is a command of the suite, whose line is the first of its log. Stages whose result is in output_dir are not run again: an
interrupted run, killed ones included, goes on where it was, a training at its last checkpoint. Other inputs or options in the
same output_dir are refused. A search index is made where labels have few rows or are many, else a classifier is trained.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from textcls.analysis.experiments import ROOT, model_files
from textcls.analysis.review_journal import share_interval
from textcls.common.errors import Problems, UserError, run_script
from textcls.common.log import describe_seconds
from textcls.common.options import make_parser
from textcls.common.outputs import complete_file, locked_folder
from textcls.data.files import read_json, read_labelled, read_labels
from textcls.models.built_in import RETRIEVAL_MODELS
from textcls.models.sentence_folders import MODULES
from textcls.models.weights import HUGGING_FACE_WEIGHTS, find_weights
from textcls.runtime.exported import sha256
from textcls.runtime.listening import listen
from textcls.training.baseline import baseline_probs

RECORD = "app.json"
FEW_ROWS, MANY_LABELS = 20, 200  # rows a label for training (the median) below which, labels from which on it is an index
LONG_TEXT, MANY_LONG = 126, 0.05  # characters; the share of longer texts from which on the end of a text is read, too
MOST_WORK = 10_000_000  # rows times labels up to which TF-IDF is fitted beside an index: seconds
LEFT = re.compile(r", (\d[\d.]* (?:s|min|h)) left$", re.MULTILINE)  # of the suite's lines of progress
LOG_LINE = re.compile(r'\[\d{4}-|\+ python |warning: |{"time": ')  # how a line of a stage begins that is no error
QUIET_SECONDS = 30  # between two remaining times where there is no terminal


class Stage(NamedTuple):
    name: str  # of its log, too
    made: str  # what is there when it is done
    words: list  # script and options


class Counts(NamedTuple):
    rows: int  # for training
    dev_rows: int
    labels: int
    rows_per_label: float  # for training, the median
    long_share: float  # of the texts for training, those of more than LONG_TEXT characters


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--table_file", required=True, help="the table, as of data/table.py")
    parser.add_argument("--text_column", help="column of the texts; None: found by its name")
    parser.add_argument("--label_column", help="column of the labels; None: found by its name")
    parser.add_argument("--model", default="data", help="pretrained model: a folder, or a built-in name, which is downloaded; "
                                                        "data: the small one here, without weights")
    parser.add_argument("--way", choices=["auto", "classifier", "index"], default="auto",
                        help=f"what is made; auto: an index where labels have fewer than {FEW_ROWS} rows for training (the "
                             f"median) or are {MANY_LABELS} or more")
    parser.add_argument("--output_dir", help="folder of all results; None: build/app/<name of the table>")
    parser.add_argument("--port", type=int, default=8189, help="of the service")
    parser.add_argument("--no_serve", action="store_true", help="stop before the service")
    parser.add_argument("--server_python", default=str(ROOT / ".venv-simple-serving/bin/python"),
                        help="Python of the server's environment")
    args = parser.parse_args()
    args.output_dir = args.output_dir or os.path.join("build", "app", Path(args.table_file).name.split(".")[0])
    return args


def check_service(args):
    """UserError where the service could not start after all the work."""
    if not os.path.exists(args.server_python):
        raise UserError(f"{args.server_python}: is missing, expected what `make .venv-simple-serving/.installed` makes, or "
                        "--no_serve (make: SERVE=0)")
    listen("127.0.0.1", args.port, "--port").close()


# ---------------------------------------------------------------- the record: what a folder was made of


def open_record(args):
    """The content of app.json, new where nothing has been made in output_dir yet. UserError where that is of other inputs."""
    path = os.path.join(args.output_dir, RECORD)
    files = [*model_files(args.model), os.path.join(args.model, HUGGING_FACE_WEIGHTS)]
    inputs = {"table": sha256(args.table_file), "text column": args.text_column, "label column": args.label_column,
              "model": [args.model, *(sha256(name) for name in files if os.path.isfile(name))], "way": args.way}
    record = read_json(path) if os.path.isfile(path) else None
    if record is None and any(not name.startswith(".") for name in os.listdir(args.output_dir)):
        raise UserError(f"{args.output_dir}: holds files that are not of such a run, expected another --output_dir (make: OUT=), "
                        "new or empty")
    if record is not None and "way" in record:
        changed = [name for name in inputs if record.get("inputs", {}).get(name) != inputs[name]]
        if changed:
            raise UserError(f"{args.output_dir}: was made with another {', '.join(changed)}, expected the same, another "
                            "--output_dir (make: OUT=), or this folder removed to make it anew")
        return record
    return {"inputs": inputs}  # of a run that has not come past its table, too


def save_record(args, record):
    with complete_file(os.path.join(args.output_dir, RECORD)) as file:
        json.dump(record, file, ensure_ascii=False, indent=2)


# ---------------------------------------------------------------- what is to be done


def count_rows(data_dir):
    """Read the data folder that the table has become: Counts. UserError where nothing could be learnt of it."""
    labels, problems = read_labels(os.path.join(data_dir, "label.txt")), Problems()
    if len(labels) < 2:
        raise UserError(f"the table has only one label, {labels[0]!r}, expected two or more")
    if not os.path.getsize(os.path.join(data_dir, "dev.txt")):
        raise UserError("no label of the table has two rows, one to learn from and one to test with, expected more rows")
    (texts, label_ids), dev = (read_labelled(os.path.join(data_dir, name), labels, problems) for name in ("train.txt", "dev.txt"))
    problems.report()
    sizes = np.bincount(label_ids, minlength=len(labels))
    return Counts(len(texts), len(dev[0]), len(labels), float(np.median(sizes)),
                  float(np.mean([len(text) > LONG_TEXT for text in texts])))


def choose_way(args, counts):
    """"classifier" or "index"."""
    if args.way != "auto":
        return args.way
    return "index" if counts.rows_per_label < FEW_ROWS or counts.labels >= MANY_LABELS else "classifier"


def has_weights(model):
    """Whether a model is pretrained; a name that is no folder is."""
    return not os.path.isdir(model) or find_weights(model) is not None


def choose_settings(args, way, counts):
    """The options of the training: {name: value}. Rules of thumb, those of the documents for the size of the data."""
    small = counts.rows < 1000
    if way == "index":
        rate, epochs, batch = ("5e-5", 10, 64) if has_weights(args.model) else ("2e-3", 5, 32)
        settings = {"learning_rate": rate, "num_train_epochs": epochs * 2 if small else epochs,
                    "per_device_train_batch_size": 16 if small else batch, "max_seq_length": 64}
    elif has_weights(args.model):
        settings = {"learning_rate": "3e-5", "num_train_epochs": 30 if small else 10 if counts.rows < 20_000 else 4,
                    "per_device_train_batch_size": 16 if small else 32, "max_seq_length": 128}
    else:
        settings = {"learning_rate": "2e-3" if small else "1e-3", "num_train_epochs": 20 if small else 12,
                    "per_device_train_batch_size": 8 if small else 32, "max_seq_length": 128}
        if small:  # of random weights, which at first learn nothing for some epochs
            settings["early_stopping_patience"] = 0
    if counts.long_share > MANY_LONG:
        settings["long_text"] = "head_tail"
    return settings


def list_options(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def table_stage(args, data_dir):
    columns = {"text_column": args.text_column, "label_column": args.label_column}
    given = list_options({name: value for name, value in columns.items() if value is not None})
    return Stage("table", os.path.join(data_dir, "label.txt"),  # the last one that appears
                 ["data/table.py", "--table_file", args.table_file, *given, "--save_dir", data_dir, "--splits", "0.8", "0.2",
                  "--overwrite"])


def goes_on(folder):
    """The option that lets a training go on from its last checkpoint, or replace a model without an end."""
    if any(Path(folder).glob("checkpoint-*")):
        return ["--resume_from_checkpoint", folder]
    return ["--overwrite_output_dir"]


def later_stages(args, record):
    """The stages between the table and the service: list of Stage."""
    folder = {name: os.path.join(args.output_dir, name) for name in ("data", "model", "export", "index", "report",
                                                                     "bad_case.txt")}
    train = ["--model_name_or_path", args.model, "--data_dir", folder["data"], "--output_dir", folder["model"],
             *list_options(record["settings"]), *goes_on(folder["model"])]
    trained = os.path.join(folder["model"], "trainer_state.json")  # the last file of a training
    exported = os.path.join(folder["export"], "deploy.json")
    if record["way"] == "classifier":
        train += ["--do_train", "--do_eval", "--per_device_eval_batch_size", "32", "--metric_for_best_model", "accuracy",
                  "--load_best_model_at_end", "--evaluation_strategy", "epoch", "--save_strategy", "epoch",
                  "--save_total_limit", "1"]
        return [Stage("training", trained, ["train.py", *train]),
                Stage("report", os.path.join(folder["report"], "report.html"),
                      ["analysis/evaluate.py", "--dataset_dir", folder["data"], "--params_path", folder["model"],
                       "--bad_case_file", folder["bad_case.txt"], "--report_dir", folder["report"], "--baseline"]),
                Stage("export", exported, ["export_model.py", "--params_path", folder["model"], "--output_path",
                                           folder["export"], "--onnx"])]
    as_it_is = args.model in RETRIEVAL_MODELS or os.path.isfile(os.path.join(args.model, MODULES))  # an encoder already
    encoder = args.model if as_it_is else folder["model"]
    search = ["--params_path", folder["export"], "--index_dir", folder["index"]]
    return [*([] if as_it_is else [Stage("training", trained, ["retrieval_based/train.py", *train])]),
            Stage("export", exported, ["retrieval_based/export_model.py", "--params_path", encoder, "--output_path",
                                       folder["export"]]),
            Stage("index", os.path.join(folder["index"], "index.json"),
                  ["retrieval_based/build_index.py", *search, "--data_dir", folder["data"], "--precision", "0.95"]),
            Stage("report", folder["bad_case.txt"], ["retrieval_based/evaluate.py", *search, "--dataset_dir", folder["data"],
                                                     "--bad_case_file", folder["bad_case.txt"]])]


# ---------------------------------------------------------------- doing it


@contextlib.contextmanager
def running(words, output, errors):
    """Run a command in the block; where that ends otherwise, such as by Ctrl-C, end the command, and wait until it has."""
    # a session of its own: Ctrl-C reaches this process alone, which lets the command end in order
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def read_end(path, start=0):
    """What has been added to a file since it had `start` bytes, but no more than the last 64 KiB."""
    with open(path, "rb") as file:
        file.seek(max(start, os.path.getsize(path) - (1 << 16)))
        return file.read().decode("utf-8", "replace")


def follow(process, title, log, start):
    """Print the remaining time that the log of a stage says, until it ends: on a terminal in place, else behind the title."""
    said, due = None, 0.0
    print(f"{title} ...", end="", flush=True)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.2)
        left = LEFT.findall(read_end(log, start))
        if left and left[-1] != said and (sys.stdout.isatty() or time.monotonic() >= due):
            said, due = left[-1], time.monotonic() + QUIET_SECONDS
            print(f"\r\033[K{title} ... {said} left" if sys.stdout.isatty() else f" {said} left ...", end="", flush=True)


def explain_failure(code, log, start):
    """What a failed stage has said to the user, in its own words."""
    lines = [line for line in read_end(log, start).splitlines() if line.strip()]
    if code == 2:
        said = [line for line in lines if not LOG_LINE.match(line)]
        return "\n".join(said) if said else f"see {log}"
    last = f": {lines[-1]}" if lines else ""
    return f"it ended with code {code}{last}, see {log}, expected code 0; the same command goes on from there"


def run_stage(args, number, stage):
    """Run a stage unless what it makes is there. UserError where it fails."""
    title = f"{number}. {stage.name}"
    if os.path.exists(stage.made):
        print(f"{title}: {stage.made} is there")
        return
    logs = os.path.join(args.output_dir, "logs")
    os.makedirs(logs, exist_ok=True)
    log, begun = os.path.join(logs, f"{stage.name}.log"), time.monotonic()
    script, *options = stage.words
    with open(log, "a", encoding="utf-8") as errors, open(os.path.join(logs, f"{stage.name}.out"), "a") as output:
        start = errors.tell()
        errors.write(f"+ python {shlex.join(stage.words)}\n")
        errors.flush()
        with running([sys.executable, str(ROOT / script), *options], output, errors) as process:
            code = follow(process, title, log, start)
    end = "\r\033[K" + title if sys.stdout.isatty() else ""
    if code:
        print(f"{end}{':' if end else ''} failed")
        raise UserError(explain_failure(code, log, start))
    print(f"{end}{':' if end else ''} done in {describe_seconds(time.monotonic() - begun)}", flush=True)


def make_data(args, record, data_dir):
    """Run the first stage and choose what is made of the data, which the record keeps."""
    stage = table_stage(args, data_dir)
    if "way" not in record:
        save_record(args, record)
        with contextlib.suppress(FileNotFoundError):  # of a run that ended before it was checked, perhaps of another table
            os.remove(stage.made)
    run_stage(args, 1, stage)
    if "way" not in record:
        counts = count_rows(data_dir)
        way = choose_way(args, counts)
        record.update(counts=counts._asdict(), way=way, settings=choose_settings(args, way, counts))
        save_record(args, record)


def describe_choice(args, record):
    """What is made, and why."""
    counts, way = Counts(**record["counts"]), record["way"]
    what = {"classifier": "a classifier", "index": "an index, which labels can be added to without training"}[way]
    why = f" (labels: {counts.labels}, rows of each to learn from, the median: {counts.rows_per_label:g})"
    small = "" if has_weights(args.model) else ("; without pretrained weights, which would do better: --model (make: MODEL=) "
                                                "ernie-3.0-medium-zh")
    return f"   {counts.rows} rows to learn from, {counts.dev_rows} to test with; {what}{why}\n   model {args.model}{small}"


def score_baseline(args, record):
    """The accuracy of TF-IDF on dev, or None where it was not measured. An index has it in the record."""
    if record["way"] == "classifier":
        baseline = read_json(os.path.join(args.output_dir, "report", "metrics.json"))["baseline"]
        return baseline["accuracy"] if baseline else None
    counts = Counts(**record["counts"])
    if "baseline" not in record and counts.rows * counts.labels <= MOST_WORK:
        data_dir, problems = os.path.join(args.output_dir, "data"), Problems()
        labels = read_labels(os.path.join(data_dir, "label.txt"))
        train, dev = (read_labelled(os.path.join(data_dir, name), labels, problems) for name in ("train.txt", "dev.txt"))
        problems.report()
        guesses = baseline_probs(*train, dev[0], len(labels)).argmax(axis=1)
        record["baseline"] = float((guesses == dev[1]).mean())
        save_record(args, record)
    return record.get("baseline")


def say_accuracy(args, record):
    """Print how many of the dev texts the model gets right, and whether TF-IDF is as good."""
    count = record["counts"]["dev_rows"]
    with open(os.path.join(args.output_dir, "bad_case.txt"), encoding="utf-8") as file:
        wrong = sum(1 for _ in file) - 1  # a header
    right = share_interval(count - wrong, count)
    print(f"Right: {count - wrong} of {count} test rows, {right.share * 100:.1f} % (95 % interval {right.low * 100:.1f} to "
          f"{right.high * 100:.1f} %)")
    baseline = score_baseline(args, record)
    if baseline is not None:
        says = (": as good, as far as these rows can tell; a pretrained model or more rows may change that"
                if baseline >= right.low else "")
        print(f"TF-IDF + logistic regression: {baseline * 100:.1f} % of the same rows{says}")


def list_next(args, record, url):
    """The next commands: list of (what for, command or file)."""
    folder = {name: os.path.join(args.output_dir, name) for name in ("data", "model", "export", "index", "report",
                                                                     "bad_case.txt")}
    found = [("wrong texts", folder["bad_case.txt"])]
    if record["way"] == "classifier":
        model = ["--dataset_dir", folder["data"], "--params_path", folder["model"]]
        found += [("report", os.path.join(folder["report"], "report.html")),
                  ("label texts", ["predict.py", "--params_path", folder["model"], "--data_file", "texts.txt"]),
                  ("mend rows", ["analysis/review.py", *model])]
    else:
        search = ["--params_path", folder["export"], "--index_dir", folder["index"]]
        found += [("label texts", ["retrieval_based/predict.py", *search, "--data_file", "texts.txt"]),
                  ("add a label", ["retrieval_based/index.py", "add", "NAME", "--texts", "TEXT", "TEXT", *search])]
    if url:
        client = shlex.join([os.path.relpath(args.server_python), "deploy/simple_serving/client.py", "--url", url, "TEXT"])
        return [("open", url), ("ask", client), *found]
    return found


def say_next(args, record, url=None):
    for what, command in list_next(args, record, url):
        print(f"  {what:12} {command if isinstance(command, str) else 'python ' + shlex.join(command)}", flush=True)


def serve(args, record, number):
    """Serve what was exported until Ctrl-C. UserError where the server ends by itself."""
    words = [args.server_python, str(ROOT / "deploy/simple_serving/server.py"), "--export_dir",
             os.path.join(args.output_dir, "export"), "--port", str(args.port)]
    if record["way"] == "index":
        words += ["--index_dir", os.path.join(args.output_dir, "index")]
    log = os.path.join(args.output_dir, "logs", "service.log")
    with open(log, "w", encoding="utf-8") as errors, running(words, errors, errors) as process:
        listening = None
        while listening is None and process.poll() is None:
            time.sleep(0.1)
            listening = re.search(r'"message": "listening", "url": "([^"]+)"', read_end(log))
        if listening:
            print(f"{number}. service: {listening[1]}/ is open, Ctrl-C ends it")
            say_next(args, record, f"{listening[1]}/")
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
                raise UserError(f"the service has ended: {explain_failure(process.returncode, log, 0)}")
            return
    raise UserError(explain_failure(process.returncode, log, 0))


def main():
    args = parse_arguments()
    if not args.no_serve:
        check_service(args)
    with locked_folder(args.output_dir):
        record = open_record(args)
        make_data(args, record, os.path.join(args.output_dir, "data"))
        print(describe_choice(args, record), flush=True)
        stages = later_stages(args, record)
        for number, stage in enumerate(stages, 2):
            run_stage(args, number, stage)
        say_accuracy(args, record)
    if args.no_serve:
        say_next(args, record)
    else:
        serve(args, record, len(stages) + 2)


if __name__ == "__main__":
    run_script(main)
