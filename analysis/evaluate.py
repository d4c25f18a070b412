"""Evaluate a trained classifier on train and dev, class by class, and list the texts it gets wrong.

    python analysis/evaluate.py --device "gpu" --max_seq_length 128 --batch_size 32 --bad_case_file "bad_case.txt" \\
        --dataset_dir "data" --params_path "./checkpoint"
    python analysis/evaluate.py --dataset_dir data --params_path ./checkpoint --baseline --report_dir report

Reads   dataset_dir/train.txt, dev.txt, label.txt; params_path (made by train.py).
Writes  bad_case_file: `Text\\tLabel\\tPrediction`, one wrong dev text per line; with --report_dir also metrics.json,
        confusion_matrix.png, reliability.png and report.html (one self-contained page of all of it).
"""

from textcls.analysis.evaluation_report import score_splits, train_baseline, write_report
from textcls.common.errors import run_script
from textcls.common.log import get_logger
from textcls.common.options import add_model_options, find_label_file, make_parser
from textcls.common.outputs import check_output, check_output_folder, complete_file
from textcls.data.tokens import tokenize
from textcls.models.device import select_device
from textcls.models.inference import predict_probs
from textcls.models.loading import data_paths, load_with_data, read_splits
from textcls.training.scoring import find_bad_cases


def parse_arguments():
    parser = make_parser(__doc__)
    add_model_options(parser, train_file=True, dev_file=True)
    parser.add_argument("--bad_case_file", default="bad_case.txt", help="where the wrong dev texts go")
    parser.add_argument("--bad_case_confidence", action="store_true", help="add the column Confidence to bad_case_file")
    parser.add_argument("--report_dir", help="folder for metrics.json, pictures and report.html")
    parser.add_argument("--baseline", action="store_true",
                        help="also train character TF-IDF + logistic regression and print its accuracy")
    return parser.parse_args()


def write_bad_cases(path, bad_cases, with_confidence):
    """Write bad_case.txt: header, then one tab-separated row per wrong text."""
    columns = ["text", "label", "prediction"] + (["confidence"] if with_confidence else [])
    with complete_file(path) as output:
        output.write("\t".join(column.capitalize() for column in columns) + "\n")
        for case in bad_cases:
            row = {**case, "confidence": f"{case['confidence']:.4f}"}
            output.write("\t".join(row[column] for column in columns) + "\n")


def run_model(checkpoint, split, batch_size, name):
    """Probabilities float32 [num_texts, num_classes] of a split (texts, label ids)."""
    tokens = tokenize(split[0], checkpoint.encode, description=f"Tokenizing {name}")
    return predict_probs(checkpoint, tokens, batch_size, f"Evaluating {name}")


def main():
    args = parse_arguments()
    select_device(args.device)
    check_output(args.bad_case_file, [*data_paths(args), find_label_file(args), args.params_path], args.dataset_dir)
    if args.report_dir:
        check_output_folder(args.report_dir, "--report_dir")
    checkpoint, splits = load_with_data(args, lambda *found: read_splits(args, *found))
    labels, dev_split = checkpoint.labels, splits[1]
    probs = [run_model(checkpoint, split, args.batch_size, name) for split, name in zip(splits, ("train", "dev"))]
    train, dev = score_splits(labels, [label_ids for _, label_ids in splits], probs)
    bad_cases = find_bad_cases(*dev_split, probs[1], labels)
    write_bad_cases(args.bad_case_file, bad_cases, args.bad_case_confidence)
    get_logger().info(f"Bad case in dev dataset saved in {args.bad_case_file}")
    baseline = train_baseline(*splits, labels, dev) if args.baseline else None
    if args.report_dir:
        write_report(args.report_dir, labels, train, dev, bad_cases, baseline, args.params_path)


if __name__ == "__main__":
    run_script(main)
