"""Measure dirty.py: give some training rows a wrong label at random and count how many of them it lists first.

    python benchmarks/bench_dirty.py --dataset_dir KUAKE_QIC --methods tfidf --noise 0.1 0.2 --seeds 1 2 3
    python benchmarks/bench_dirty.py --dataset_dir KUAKE_QIC --methods tfidf finetune both representer --noise 0.1 --seeds 1 \\
        --model_name_or_path data --learning_rate 5e-4 --num_train_epochs 4 --per_device_train_batch_size 32

Reads   dataset_dir/train.txt, label.txt.
Prints  a tab-separated table: for each method, share of noise and seed the precision and recall (per cent) of the first n/2, n
        and 2n rows listed, n being the number of wrong labels planted (at n the two are equal), and how many wrong labels
        cleanlab estimates. Rows that were wrong before anything was planted count as false alarms. Nothing is written.
"""

import os
import tempfile

import numpy as np

from textcls.analysis.features import extract_features
from textcls.analysis.label_errors import (
    FOLD_MODELS,
    combine,
    judge_by_vectors,
    out_of_fold,
    plant,
    predict_finetuned,
    predict_tfidf,
    rank_suspects,
    representer_probs,
    train_checkpoint,
)
from textcls.common.errors import Problems, UserError, run_script
from textcls.common.options import add_model_options, make_parser, positive_int, seed_number
from textcls.data.files import read_labelled
from textcls.data.folds import split_folds
from textcls.models.checkpoints import load_checkpoint
from textcls.models.device import select_device
from textcls.models.loading import read_known_labels

METHODS = (*FOLD_MODELS, "representer")
PARTS = {"tfidf": {"tfidf", "vectors", "both"}, "finetune": {"finetune", "both"}}  # the methods that each of these is a part of


def parse_arguments():
    parser = make_parser(__doc__, epilog="Options not listed here go to train.py.")
    add_model_options(parser, train_file=True, cache_dir=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["tfidf"],
                        help="representer here trains a model on all rows, wrong labels included")
    parser.add_argument("--ranking", nargs="+", choices=["self_confidence", "normalized_margin"], default=["self_confidence"],
                        help="cleanlab's label quality score")
    parser.add_argument("--noise", nargs="+", type=float, default=[0.1, 0.2], help="share of rows given a wrong label")
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[1, 2, 3], help="seeds of the wrong labels")
    parser.add_argument("--folds", type=positive_int, default=5, help="as of dirty.py")
    parser.add_argument("--model_name_or_path", help="as of dirty.py")
    parser.add_argument("--seed", type=seed_number, default=3, help="as of dirty.py")
    args, args.train_options = parser.parse_known_args()
    if args.train_options and not set(args.methods) & {*PARTS["finetune"], "representer"}:
        parser.error(f"unknown option {' '.join(args.train_options)}")
    if "vectors" in args.methods and not args.model_name_or_path:
        parser.error("--methods vectors: expected --model_name_or_path, whose vectors they are")
    if args.folds < 2 or not all(0 < noise < 1 for noise in args.noise):
        parser.error("expected --folds of 2 or more and every --noise above 0, below 1")
    return args


def judge(args, device, labels, texts, label_ids):
    """Yield (method, probabilities float [num_rows, num_classes]) of the methods asked for."""
    fold_of, parts = split_folds(texts, label_ids, args.folds, args.seed), {}
    for method, predict in (("tfidf", predict_tfidf(len(labels))), ("finetune", predict_finetuned(args, labels, device))):
        if PARTS[method] & set(args.methods):
            parts[method] = out_of_fold(predict, texts, label_ids, len(labels), fold_of, bar=method == "tfidf")
            if method in args.methods:
                yield method, parts[method]
    if "vectors" in args.methods:
        vectors = judge_by_vectors(args, device, texts, label_ids, len(labels), fold_of)
        yield "vectors", combine(parts["tfidf"], vectors, label_ids)[0]
    if "both" in args.methods:
        yield "both", combine(parts["tfidf"], parts["finetune"], label_ids)[0]
    if "representer" in args.methods:
        with tempfile.TemporaryDirectory(prefix="dirty-") as folder:
            train_checkpoint(args, device, labels, texts, label_ids, folder, "Checkpoint")
            checkpoint = load_checkpoint(os.path.join(folder, "checkpoint"))
            features, _ = extract_features(checkpoint, texts, args.batch_size, "train")
        yield "representer", representer_probs(features, label_ids, len(labels))


def measure(suspects, planted):
    """Precision and recall (per cent, as str) of the first n/2, n and 2n rows of Suspects; at n, where they are equal, once.

    planted: indices of the n rows with a wrong label.
    """
    hits, n, columns = np.isin(suspects.order, planted).cumsum(), len(planted), []
    for listed in (max(1, n // 2), n, min(2 * n, len(hits))):
        precision, recall = hits[listed - 1] / listed * 100, hits[listed - 1] / n * 100
        columns += [f"{precision:.1f}"] + ([f"{recall:.1f}"] if listed != n else [])
    return columns


def main():
    args = parse_arguments()
    device, problems = select_device(args.device), Problems()
    train_path, label_path = (os.path.join(args.dataset_dir, name) for name in (args.train_file, args.label_file))
    labels = read_known_labels(label_path, problems)
    texts, label_ids = read_labelled(train_path, labels, problems, label_path)
    problems.report()
    print("method\tranking\tnoise\tseed\tplanted\tP@n/2\tR@n/2\tP=R@n\tP@2n\tR@2n\testimated", flush=True)
    for noise in args.noise:
        for seed in args.seeds:
            noisy, planted = plant(label_ids, len(labels), noise, seed)
            if not len(planted):
                raise UserError(f"--noise {noise}: no row of {len(texts)} would get a wrong label, expected a larger share")
            for method, probs in judge(args, device, labels, texts, noisy):
                for ranking in args.ranking:
                    suspects = rank_suspects(noisy, probs, ranking)
                    print(method, ranking, f"{noise:g}", seed, len(planted), *measure(suspects, planted), suspects.estimated,
                          sep="\t", flush=True)


if __name__ == "__main__":
    run_script(main)
