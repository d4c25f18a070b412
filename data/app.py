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
import sys
import time
from pathlib import Path

from textcls.analysis.experiments import ROOT, model_files
from textcls.analysis.first_settings import FEW_ROWS, MANY_LABELS, Counts, choose_settings, choose_way, count_rows, has_weights
from textcls.analysis.review_journal import share_interval
from textcls.analysis.stages import Stage, explain_failure, read_end, run_stage, running
from textcls.common.digests import sha256
from textcls.common.errors import Problems, UserError, run_script
from textcls.common.log import describe_seconds
from textcls.common.options import make_parser
from textcls.common.outputs import complete_file, locked_folder
from textcls.data.files import read_json, read_labelled, read_labels
from textcls.data.tables import find_ending
from textcls.models.built_in import RETRIEVAL_MODELS
from textcls.models.sentence_folders import MODULES
from textcls.models.weights import HUGGING_FACE_WEIGHTS
from textcls.runtime.listening import listen
from textcls.training.baseline import baseline_probs

RECORD = "app.json"
LEAST_TIMED = 20_000  # texts in all epochs from which on a training is timed before
LONGEST, LEAST_EPOCHS = 2 * 3600, 2  # seconds that a training may take on this machine, but so many epochs it has at least
TIMES = re.compile(r"steps of ([\d,]+) ms, ([\d,]+) an epoch; evaluations: \d+ of ([\d.]+) s")  # of train.py --dry_run
MOST_WORK = 10_000_000  # rows times labels up to which TF-IDF is fitted beside an index: seconds


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


def list_places(args):
    """Where the results of the stages are: {name: path}."""
    return {name: os.path.join(args.output_dir, name) for name in ("data", "model", "export", "index", "report", "bad_case.txt",
                                                                   "logs")}


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
    if not any(os.path.exists(path) for name, path in list_places(args).items() if name not in ("data", "logs")):
        return {"inputs": inputs}  # what there is of earlier is made anew in a second, of other inputs, too
    changed = [name for name in inputs if record.get("inputs", {}).get(name) != inputs[name]]
    if changed:
        raise UserError(f"{args.output_dir}: was made with another {', '.join(changed)}, expected the same, another "
                        "--output_dir (make: OUT=), or this folder removed to make it anew")
    return record


def save_record(args, record):
    with complete_file(os.path.join(args.output_dir, RECORD)) as file:
        json.dump(record, file, ensure_ascii=False, indent=2)


# ---------------------------------------------------------------- what is to be done


def list_options(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def table_stage(args):
    data_dir = list_places(args)["data"]
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
    folder = list_places(args)
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


def make_data(args, record):
    """Run the first stage and choose what is made of the data, which the record keeps."""
    stage, logs = table_stage(args), list_places(args)["logs"]
    if "way" in record:
        return run_stage(f"1. {stage.name}", stage, logs)
    save_record(args, record)
    with contextlib.suppress(FileNotFoundError):  # of a run that made nothing else, perhaps of another table
        os.remove(stage.made)
    run_stage(f"1. {stage.name}", stage, logs)
    counts = count_rows(list_places(args)["data"])
    way = choose_way(counts) if args.way == "auto" else args.way
    record.update(counts=counts._asdict(), way=way, settings=choose_settings(args.model, way, counts))
    save_record(args, record)


def limit_epochs(args, record):
    """Let a training that would take too long on this machine have fewer epochs: a dry run times some steps."""
    settings = record["settings"]
    if record["way"] != "classifier" or "epoch_seconds" in record or (
            record["counts"]["rows"] * settings["num_train_epochs"] < LEAST_TIMED):
        return
    training, logs = later_stages(args, record)[0], list_places(args)["logs"]
    run_stage("   how long it takes here", Stage("timing", "", [*training.words, "--dry_run"]), logs)
    found = TIMES.findall(read_end(os.path.join(logs, "timing.log")))
    if not found:
        raise UserError(f"{logs}/timing.log: says no times, expected those of train.py --dry_run")
    step, steps, evaluation = (float(number.replace(",", "")) for number in found[-1])
    seconds = record["epoch_seconds"] = step / 1000 * steps + evaluation
    most = max(LEAST_EPOCHS, int(LONGEST / seconds)) if seconds else settings["num_train_epochs"]
    settings["num_train_epochs"] = min(most, settings["num_train_epochs"])
    save_record(args, record)
    print(f"   an epoch takes about {describe_seconds(seconds)} on this machine: {settings['num_train_epochs']} epochs at most, "
          f"about {describe_seconds(seconds * settings['num_train_epochs'])} in all", flush=True)


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
    """Print how many of the dev texts the model gets right, and whether TF-IDF is as good or better."""
    count = record["counts"]["dev_rows"]
    with open(os.path.join(args.output_dir, "bad_case.txt"), encoding="utf-8") as file:
        wrong = sum(1 for _ in file) - 1  # a header
    right = share_interval(count - wrong, count)
    print(f"Right: {count - wrong} of {count} test rows, {right.share * 100:.1f} % (95 % interval {right.low * 100:.1f} to "
          f"{right.high * 100:.1f} %)")
    baseline = score_baseline(args, record)
    if baseline is not None:
        says = "" if baseline < right.low else ": better" if baseline > right.high else ": as good, as far as these rows can tell"
        says += "; a pretrained model or more rows may change that" if says else ""
        print(f"TF-IDF + logistic regression: {baseline * 100:.1f} % of the same rows{says}")


def say_next(args, record, url=None):
    """Print what can be done next. url: of the service, where it runs."""
    folder = list_places(args)
    found = {"wrong texts": folder["bad_case.txt"]}
    if url:
        client = [os.path.relpath(args.server_python), "deploy/simple_serving/client.py", "--url", url, "TEXT"]
        found = {"open": f"{url}/", "ask": shlex.join(client), **found}
    if record["way"] == "classifier":
        model = ["--dataset_dir", folder["data"], "--params_path", folder["model"]]
        found["report"] = os.path.join(folder["report"], "report.html")
        commands = {"label texts": ["predict.py", "--params_path", folder["model"], "--data_file", "texts.txt"],
                    "mend rows": ["analysis/review.py", *model]}
    else:
        search = ["--params_path", folder["export"], "--index_dir", folder["index"]]
        commands = {"label texts": ["retrieval_based/predict.py", *search, "--data_file", "texts.txt"],
                    "add a label": ["retrieval_based/index.py", "add", "NAME", "--texts", "TEXT", "TEXT", *search]}
    found.update((what, f"python {shlex.join(words)}") for what, words in commands.items())
    for what, command in found.items():
        print(f"   {what:12} {command}", flush=True)


def serve(args, record, number):
    """Serve what was exported until Ctrl-C. UserError where the server ends by itself."""
    words = [args.server_python, str(ROOT / "deploy/simple_serving/server.py"), "--export_dir",
             os.path.join(args.output_dir, "export"), "--port", str(args.port)]
    if record["way"] == "index":
        words += ["--index_dir", os.path.join(args.output_dir, "index")]
    log = os.path.join(list_places(args)["logs"], "service.log")
    with open(log, "w", encoding="utf-8") as errors, running(words, errors, errors) as process:
        listening = None
        while listening is None and process.poll() is None:
            time.sleep(0.1)
            listening = re.search(r'"message": "listening", "url": "([^"]+)"', read_end(log))
        if listening:
            print(f"{number}. service: {listening[1]}/ is open, Ctrl-C ends it")
            say_next(args, record, listening[1])
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
                raise UserError(f"the service has ended: {explain_failure(process.returncode, log)}")
            return
    raise UserError(explain_failure(process.returncode, log))


def main():
    args = parse_arguments()
    find_ending(args.table_file, None)  # refuses what is no table before anything is made
    if not args.no_serve:
        check_service(args)
    with locked_folder(args.output_dir):
        record = open_record(args)
        try:
            make_data(args, record)
            print(describe_choice(args, record), flush=True)
            limit_epochs(args, record)
            stages = later_stages(args, record)
            for number, stage in enumerate(stages, 2):
                run_stage(f"{number}. {stage.name}", stage, list_places(args)["logs"])
        except (KeyboardInterrupt, SystemExit):
            print("The same command goes on from here.", file=sys.stderr)
            raise
        say_accuracy(args, record)
    if args.no_serve:
        say_next(args, record)
    else:
        serve(args, record, len(stages) + 2)


if __name__ == "__main__":
    run_script(main)
