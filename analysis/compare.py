"""Compare trained classifiers on one labelled file: accuracy, speed, texts they answer differently, and if that may be chance.

    python analysis/compare.py ./checkpoint ./export --dataset_dir data
    python analysis/compare.py ./checkpoint ./prune/width_mult_0.5 --dataset_dir data --dev_file test.txt --report compare.html

Reads   the models: checkpoints (train.py, few-shot/train.py) and exports (export_model.py, prune.py), by ONNX where they have it;
        dataset_dir/dev.txt (<text><tab><label>) and label.txt.
Writes  difference_file: `Text\\tLabel\\t<model>\\t<model>...`, the texts that not all models give the same label; with --report
        one self-contained page of all of it.
"""

import os

import numpy as np

from textcls.analysis.comparison import (
    SIGNIFICANT,
    check_same_labels,
    compare_pairs,
    find_changes,
    is_significant,
    open_classifier,
    time_models,
)
from textcls.analysis.evaluation_report import MAX_LISTED
from textcls.analysis.pages import render
from textcls.common.errors import Problems, run_script
from textcls.common.log import get_logger
from textcls.common.options import add_column_options, find_label_file, make_parser
from textcls.common.outputs import check_outputs, complete_file
from textcls.data.files import read_labelled, read_labels
from textcls.models.device import select_device
from textcls.training.scoring import bootstrap_intervals, score

GROUPS = (("worse", "第一个模型对，别的错", "The first model is right, another is wrong"),
          ("better", "第一个模型错，别的对", "The first model is wrong, another is right"),
          ("other", "都错，错得不同", "All are wrong, in different ways"))


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("models", nargs="+", help="checkpoints and exports, two or more")
    parser.add_argument("--dataset_dir", default="./data", help="folder of the data files")
    parser.add_argument("--dev_file", default="dev.txt", help="labelled file in dataset_dir")
    parser.add_argument("--label_file", default="label.txt", help="labels in dataset_dir; must agree with the models")
    add_column_options(parser, labelled=True)
    parser.add_argument("--difference_file", default="differences.txt", help="where the texts go that are answered differently")
    parser.add_argument("--report", help="page (.html) with the tables and these texts")
    args = parser.parse_args()
    if len(args.models) < 2:
        parser.error(f"{args.models[0]}: nothing to compare it with, expected two or more checkpoints or exports")
    repeated = next((path for path in args.models if args.models.count(path) > 1), None)
    if repeated:
        parser.error(f"{repeated}: named twice, expected different models")
    return args


def read_rows(args, labels):
    """Read the labelled file: (texts, label ids int64 [num_texts]). UserError."""
    problems, path = Problems(), os.path.join(args.dataset_dir, args.dev_file)
    rows = read_labelled(path, labels, problems, find_label_file(args), (args.text_column, args.label_column))
    problems.report()
    return rows


def measure(models, label_ids, probs, times):
    """What is shown of each model: list of dicts."""
    num_classes, measured = len(models[0].labels), []
    for model, own, ms in zip(models, probs, times):
        metrics = score(label_ids, own)
        measured.append({"name": model.name, "form": model.form, "accuracy": metrics["accuracy"], "macro_f1": metrics["macro_f1"],
                         "intervals": bootstrap_intervals(label_ids, own.argmax(axis=1), num_classes), "ms": ms})
    return measured


def print_tables(measured, pairs):
    """Print the models, then the pairs of them."""
    width = max(len(model["name"]) for model in measured) + 5
    print(f"{'model':<{width}}{'form':<14}{'accuracy, 95 % interval':>32}{'macro-F1, 95 % interval':>32}{'ms/text':>10}")
    for number, model in enumerate(measured, 1):
        cells = [f"{model[name] * 100:.2f} ({low * 100:.2f} to {high * 100:.2f})"
                 for name, (low, high) in ((name, model["intervals"][name]) for name in ("accuracy", "macro_f1"))]
        print(f"{f'{number}. ' + model['name']:<{width}}{model['form']:<14}{cells[0]:>32}{cells[1]:>32}{model['ms']:>10.3f}")
    print("\nmodels      only the first right   only the second right   McNemar's exact p")
    for pair in pairs:
        verdict = "different" if is_significant(pair, len(pairs)) else "no difference seen"
        print(f"{pair.first + 1} and {pair.second + 1:<6}{pair.only_first:>20}{pair.only_second:>24}{pair.p:>20.4f}  {verdict}")


def write_differences(path, models, changes):
    """Write the texts with different answers: header, then one tab-separated row each."""
    with complete_file(path) as output:
        output.write("\t".join(["Text", "Label", *(model.name for model in models)]) + "\n")
        for row in changes:
            output.write("\t".join([row["text"], row["label"], *(answer["label"] for answer in row["answers"])]) + "\n")


def write_page(args, measured, pairs, changes, size):
    """Write the page of --report."""
    shown = [{**pair._asdict(), "first": pair.first + 1, "second": pair.second + 1, "differs": is_significant(pair, len(pairs))}
             for pair in pairs]
    groups = [(chinese, english, [row for row in changes if row["change"] == name]) for name, chinese, english in GROUPS]
    page = render("compare_template.html", file=args.dev_file, size=size, models=measured, pairs=shown,
                  limit=SIGNIFICANT / len(pairs), num_changes=len(changes), groups=groups, max_listed=MAX_LISTED,
                  difference_file=args.difference_file)
    with complete_file(args.report) as file:
        file.write(page)
    get_logger().info(f"Page saved in {args.report}")


def main():
    args = parse_arguments()
    label_path, path = find_label_file(args), os.path.join(args.dataset_dir, args.dev_file)
    outputs = [args.difference_file, *([args.report] if args.report else [])]
    check_outputs(outputs, [path, label_path, *args.models], args.dataset_dir)
    if not os.path.isfile(label_path):
        label_path = None  # only the models know the labels
    if label_path:
        read_rows(args, read_labels(label_path))  # what is wrong with the file is said before models are loaded
    select_device("cpu")
    models = [open_classifier(name, label_path) for name in args.models]
    check_same_labels(models)
    texts, label_ids = read_rows(args, models[0].labels)

    get_logger().info(f"{len(models)} models answer {len(texts)} texts of {path} ...")
    probs = np.stack([model.answer(texts) for model in models])
    measured = measure(models, label_ids, probs, time_models(models, texts))
    pairs, changes = compare_pairs(label_ids, probs.argmax(axis=2)), find_changes(texts, label_ids, probs, models[0].labels)
    print_tables(measured, pairs)
    write_differences(args.difference_file, models, changes)
    get_logger().info(f"{len(changes)} texts with different answers saved in {args.difference_file}")
    if args.report:
        write_page(args, measured, pairs, changes, len(texts))


if __name__ == "__main__":
    run_script(main)
