"""Compare the ways to read long texts: accuracy over several seeds, and the time of training and of serving.

    python benchmarks/compare_long_texts.py --model zh_bert --data_dir iflytek --num_labels 20
    python benchmarks/compare_long_texts.py --model kuake --questions KUAKE_QIC --place 12 --filler 其他 --epochs 3 \\
        --settings cut window --skip times

--data_dir holds train.txt, test.txt and label.txt; of its labels the --num_labels most frequent in train.txt are taken. With
--questions each text is made, by a fixed seed, of 20 texts of that folder: the one at --place (from 0) gives the label, the
others have the label --filler; those of the test are of its dev.txt. --test_file dev.txt chooses something on dev. Every
training is one of train.py with the same options; the accuracy is that of its last epoch on the test. Trainings that --work_dir
holds already are not done again. The times are those of `train.py --dry_run`, and of the Predictor on 200 of the test texts,
best of three; they want a machine that does nothing else.
"""

import argparse
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from measuring import ROOT, read_json, read_rows

SETTINGS = {"cut": ["--max_seq_length", 128], "head_tail": ["--max_seq_length", 128, "--long_text", "head_tail"],
            "head_tail 0.5": ["--max_seq_length", 128, "--long_text", "head_tail", "--head_share", 0.5],
            "head_tail 0.75": ["--max_seq_length", 128, "--long_text", "head_tail", "--head_share", 0.75],
            "window": ["--max_seq_length", 128, "--long_text", "window"],
            "cut at 256": ["--max_seq_length", 256], "cut at 512": ["--max_seq_length", 512]}
TIMED_TEXTS, TIMED_ROUNDS = 200, 3
QUESTIONS = 20  # of a text that is made of questions
MADE_ROWS = {"train.txt": 480, "test.txt": 200}


def write_file(path, rows):
    """Write rows of columns."""
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def take_labels(source, folder, count, test_file):
    """Write the rows of the most frequent labels."""
    train, test = (list(read_rows(source / name)) for name in ("train.txt", test_file))
    labels = [label for label, _ in Counter(row[-1] for row in train).most_common(count)]
    for name, rows in (("train.txt", train), ("test.txt", test)):
        write_file(folder / name, [row for row in rows if row[-1] in labels])
    write_file(folder / "label.txt", [[label] for label in labels])


def make_texts(source, folder, place, filler):
    """Write texts of QUESTIONS questions each: at a place one with another label than the filler's, else those of the filler."""
    generator = random.Random(7)
    for name, count in MADE_ROWS.items():
        pool = list(read_rows(source / ("train.txt" if name == "train.txt" else "dev.txt")))
        fillers, others = [row for row in pool if row[1] == filler], [row for row in pool if row[1] != filler]
        texts = []
        for _ in range(count):
            questions = [generator.choice(fillers)[0] for _ in range(QUESTIONS)]
            questions[place], label = generator.choice(others)
            texts.append(["。".join(questions), label])
        write_file(folder / name, texts)
    write_file(folder / "label.txt", read_rows(source / "label.txt"))


def train(args, data, output, setting, seed, *more):
    """Run train.py. Returns its log."""
    options = {"model_name_or_path": args.model, "data_dir": data, "dev_file": "test.txt", "output_dir": output, "seed": seed,
               "learning_rate": 2e-4, "warmup_ratio": 0.1, "num_train_epochs": args.epochs, "per_device_train_batch_size": 16,
               "per_device_eval_batch_size": 32, "evaluation_strategy": "no", "save_strategy": "no", "report_to": "none"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "train.py", "--do_train", "--do_eval", "--overwrite_output_dir", *words,
               *map(str, SETTINGS[setting]), *more]
    return subprocess.run(command, cwd=ROOT, check=True, encoding="utf-8", stderr=subprocess.PIPE).stderr


def measure_accuracy(args, data, folder, setting):
    """Train with each seed, unless it has been done. Returns the accuracies, 0 to 1."""
    found = []
    for seed in range(1, args.seeds + 1):
        output = folder / f"{setting.replace(' ', '_')}-{seed}"
        if not (output / "eval_results.json").exists():
            train(args, data, output, setting, seed)
        found.append(read_json(output / "eval_results.json")["eval_accuracy"])
    return found


def measure_times(args, data, folder, setting):
    """Return the milliseconds of a text in training and in the Predictor."""
    from textcls.runtime.predictor import Predictor

    log = train(args, data, folder / "none", setting, 1, "--dry_run")
    step = float(re.search(r"steps of (\d+) ms", log)[1])
    trained, export = folder / "timed", folder / "timed_export"
    train(args, data, trained, setting, 1, "--max_steps", "1")  # the weights do not matter for the time
    subprocess.run([sys.executable, "export_model.py", "--onnx", "--params_path", trained, "--output_path", export], cwd=ROOT,
                   check=True, capture_output=True)
    predictor, texts = Predictor(export), [text for text, _ in read_rows(data / "test.txt")][:TIMED_TEXTS]
    seconds = []
    for _ in range(TIMED_ROUNDS):
        begun = time.perf_counter()
        predictor.probabilities(texts)
        seconds.append(time.perf_counter() - begun)
    return step / 16, 1000 * min(seconds) / len(texts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder of a pretrained model")
    parser.add_argument("--data_dir", type=Path, help="folder of long texts")
    parser.add_argument("--num_labels", type=int, default=20, help="so many of its labels, the most frequent")
    parser.add_argument("--questions", type=Path, help="folder of short texts, in the place of --data_dir")
    parser.add_argument("--place", type=int, default=12, help="whose label a text of them has")
    parser.add_argument("--filler", help="the label of all others of them")
    parser.add_argument("--test_file", default="test.txt", help="file of --data_dir that the accuracy is of")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--work_dir", type=Path, default=Path("long_texts"), help="for trainings, which are kept")
    parser.add_argument("--skip", choices=["accuracy", "times"], help="what not to measure")
    args = parser.parse_args()
    if (args.data_dir is None) == (args.questions is None) or (args.questions is None) != (args.filler is None):
        parser.error("expected --data_dir, or --questions and --filler")
    folder, args.model = args.work_dir.resolve(), str(Path(args.model).resolve())
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    if args.questions:
        make_texts(args.questions, data, args.place, args.filler)
    else:
        take_labels(args.data_dir, data, args.num_labels, args.test_file)
    print("setting        accuracy, mean and sd of the seeds     training, ms/text    Predictor, ms/text", flush=True)
    for setting in args.settings:
        accuracy = times = ""
        if args.skip != "accuracy":
            found = [100 * value for value in measure_accuracy(args, data, folder, setting)]
            spread = f"{statistics.stdev(found):.2f}" if len(found) > 1 else "-"
            accuracy = f"{statistics.mean(found):.2f} % ({spread}): " + " ".join(f"{value:.2f}" for value in found)
        if args.skip != "times":
            times = "".join(f"{value:21.1f}" for value in measure_times(args, data, folder, setting))
        print(f"{setting:14} {accuracy:36}{times}", flush=True)


if __name__ == "__main__":
    main()
