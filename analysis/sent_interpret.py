"""Explain predictions by training rows: for each text those that speak most for the model's answer and most against it.

    python analysis/sent_interpret.py --device "gpu" --max_seq_length 128 --batch_size 16 --dataset_dir "data" \\
        --params_path "./checkpoint" --interpret_input_file "bad_case.txt" --top_k 3
    python analysis/sent_interpret.py --dataset_dir data --params_path ./checkpoint --method gradient_similarity

Reads   interpret_input_file: one to three tab-separated columns (text, label, prediction), as evaluate.py writes it;
        dataset_dir/train.txt, label.txt; params_path (made by train.py).
Writes  interpret_result_file: a block of lines per text; jsonl_file: {"text", "predict_label", "probability", "label",
        "positive": [{"text", "label", "score", "line"}, ...], "negative": [...]} per text; label is null, and the block
        has no line `label: ...`, where the input has none. line: the row's line number in the training file.
        cache_dir: the training rows' features, for the next run with the same model.
"""

import json
import os

from textcls.analysis.features import cached_features, extract_features
from textcls.analysis.influence import METHODS, find_influences
from textcls.analysis.texts_to_explain import read_rows
from textcls.common.errors import run_script
from textcls.common.log import get_logger
from textcls.common.options import add_model_options, find_label_file, make_parser, positive_int, seed_number
from textcls.common.outputs import check_outputs, complete_file
from textcls.data.files import read_labelled
from textcls.models.device import select_device
from textcls.models.loading import load_with_data


def parse_arguments():
    parser = make_parser(__doc__)
    add_model_options(parser, train_file=True, cache_dir=True)
    parser.add_argument("--interpret_input_file", default="bad_case.txt", help="texts to explain")
    parser.add_argument("--interpret_result_file", default="sent_interpret.txt", help="where the blocks of text go")
    parser.add_argument("--jsonl_file", default="sent_interpret.jsonl", help="where the same goes as JSON, a line per text")
    parser.add_argument("--top_k", type=positive_int, default=3, help="training rows for and against, each")
    parser.add_argument("--method", choices=list(METHODS), default="feature_similarity", help="how influence is measured")
    parser.add_argument("--sim_fn", choices=["cos", "dot", "euc"],
                        help="how features or gradients are compared; None: cos, or dot where the method has only that")
    parser.add_argument("--seed", type=seed_number, default=3, help="for command lines of other scripts: nothing here is random")
    args = parser.parse_args()
    args.sim_fn = args.sim_fn or METHODS[args.method][0]
    if args.sim_fn not in METHODS[args.method]:
        parser.error(f"--sim_fn {args.sim_fn}: --method {args.method} has {' and '.join(METHODS[args.method])}")
    return args


def format_block(row):
    """The lines of one text, as a str. row: as of `find_influences`, with label."""
    lines = [f"text: {row['text']}", f"predict label: {row['predict_label']}"]
    lines += [f"label: {row['label']}"] if row["label"] is not None else []
    for kind, name in (("positive", "support"), ("negative", "against")):
        lines.append(f"examples with {kind} influence")
        for place, found in enumerate(row[kind], 1):
            lines.append(f"{name}{place} text: {found['text']}\tlabel: {found['label']}\tscore: {format_score(found['score'])}")
    return "\n".join(lines) + "\n"


def format_score(score):
    """Five decimals, or three digits where these would show nothing (gradients of rows that the model is sure of)."""
    return f"{score:.5f}" if abs(score) >= 0.001 or score == 0 else f"{score:.2e}"


def read_files(args, labels, problems):
    """Returns (training rows as a pair of texts and label ids, rows to explain). Reports all problems."""
    train_path, label_path = (os.path.join(args.dataset_dir, name) for name in (args.train_file, args.label_file))
    train = read_labelled(train_path, labels, problems, label_path)
    return train, read_rows(args.interpret_input_file, labels, problems)


def main():
    args = parse_arguments()
    select_device(args.device)
    inputs = [os.path.join(args.dataset_dir, args.train_file), find_label_file(args), args.interpret_input_file, args.params_path]
    check_outputs([args.interpret_result_file, args.jsonl_file], inputs, args.dataset_dir)
    checkpoint, (train, rows) = load_with_data(args, lambda *found: read_files(args, *found))
    train_outputs = cached_features(checkpoint, args.params_path, train[0], args.batch_size, args.cache_dir, "train")
    texts = [row.text for row in rows]
    outputs = extract_features(checkpoint, texts, args.batch_size, "the texts")
    found = find_influences(checkpoint.labels, train, train_outputs, texts, outputs, args.top_k, args.method, args.sim_fn,
                            checkpoint.temperature)
    found = [{**result, "label": row.label} for result, row in zip(found, rows)]
    with complete_file(args.interpret_result_file) as blocks, complete_file(args.jsonl_file) as lines:
        blocks.write("\n".join(format_block(row) for row in found))
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    get_logger().info(f"Training rows that explain {len(rows)} texts saved in {args.interpret_result_file} and "
                      f"{args.jsonl_file}")


if __name__ == "__main__":
    run_script(main)
