"""Evaluate an encoder with an index on labelled texts, or a file that recall.py wrote.

    python retrieval_based/evaluate.py --params_path ./encoder_export --index_dir ./index --dataset_dir data
    python retrieval_based/evaluate.py --test_file test.txt --threshold auto --unknown_label 其他问题
    python retrieval_based/evaluate.py --similar_text_pair data/dev.txt --recall_result_file recall_result/recall_result_file

Reads   dataset_dir/dev.txt or --test_file (`<text><tab><label>`), params_path (checkpoint or export), index_dir.
Prints  recall@1,5,10,20,50: share of texts whose label is among the first labels, which are ordered by probability, then by
        the cosine of their nearest row; MRR: mean of 1 / place of the label; accuracy and macro F1; accuracy by how many texts
        stand for a label in the index; of texts of no label AUROC and F1; with a threshold the share of undecided texts and the
        precision of the others.
Writes  bad_case_file: `Text\\tLabel\\tPrediction`, one wrong text per line. Of a recall result a line is added to result.tsv
        beside it, and recall@k goes as far as its lines per text.
"""

import os
import time

import numpy as np

from textcls.common.errors import Problems, UserError, run_script
from textcls.common.known import auroc
from textcls.common.log import get_logger, progress_bar
from textcls.common.options import (
    add_encoder_options,
    add_prefix_options,
    encoder_options,
    make_parser,
    positive_int,
    probability,
    probability_or_auto,
)
from textcls.common.outputs import check_output, complete_file
from textcls.common.probabilities import is_decided
from textcls.data.files import read_labelled, read_lines
from textcls.retrieval.encoder import for_queries, open_encoder
from textcls.retrieval.fitting import with_settings
from textcls.retrieval.index import check_encoder, check_prefixes, open_index
from textcls.retrieval.search import chunks, find_threshold, label_probabilities, label_ranks, label_similarities
from textcls.training.scoring import score_classes, score_open

RECALLS = (1, 5, 10, 20, 50)
GROUPS = ((0, 1), (2, 5), (6, 20), (21, 100), (101, None))  # labels by the number of their texts in the index


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--params_path", default="./checkpoint", help="encoder: checkpoint, export or pretrained")
    parser.add_argument("--index_dir", default="./index", help="made by build_index.py")
    parser.add_argument("--dataset_dir", "--data_dir", default="./data", help="folder of the data files")
    parser.add_argument("--dev_file", default="dev.txt", help="labelled texts in dataset_dir")
    parser.add_argument("--test_file", help="labelled texts in dataset_dir, instead of dev_file")
    parser.add_argument("--threshold", type=probability_or_auto, default=0.0,
                        help="answers with a lower probability count as undecided; auto: the one of the index")
    parser.add_argument("--lexical_weight", type=probability,
                        help="of the search by characters, 0 to 1; 0: by vectors alone; None: as build_index.py found best")
    parser.add_argument("--head_weight", type=probability,
                        help="of the head, 0 to 1; 0: without it; None: as build_index.py found best")
    parser.add_argument("--unknown_label", help="label of the texts that are of no label of the index; None: there are none")
    parser.add_argument("--bad_case_file", default="bad_case.txt", help="where the wrong texts go")
    parser.add_argument("--similar_text_pair", help="labelled texts of a recall result")
    parser.add_argument("--recall_result_file", help="evaluate this file of recall.py, without encoder and index")
    parser.add_argument("--recall_num", type=positive_int, default=10, help="lines per text in recall_result_file, at most")
    add_encoder_options(parser)
    add_prefix_options(parser)
    args = parser.parse_args()
    if bool(args.similar_text_pair) != bool(args.recall_result_file):
        parser.error("--similar_text_pair and --recall_result_file belong together")
    return args


def log_recalls(ranks, counts=RECALLS):
    """Log recall@k, for the k in counts, and MRR. ranks: float [num_texts], place of the right label from 1, inf where it was not
    found."""
    for k in counts:
        get_logger().info(f"recall@{k}={np.mean(ranks <= k) * 100:.3f}")
    get_logger().info(f"MRR={np.mean(1 / ranks):.5f}")


def evaluate_recall_file(args):
    """Recall of a file that recall.py wrote; one more line of result.tsv beside it."""
    problems = Problems()
    right = [line.partition("\t")[2] for _, line in read_lines(args.similar_text_pair, problems)]
    rows = [(number, line.split("\t")) for number, line in read_lines(args.recall_result_file, problems)]
    for number, columns in rows:
        if len(columns) != 3:
            problems.add(args.recall_result_file, number, f"{len(columns)} columns", "<text><tab><recalled><tab><cosine>")
    each = len(rows) // max(len(right), 1)  # fewer than --recall_num of a corpus that has fewer
    if not problems.count and (not 0 < each <= args.recall_num or len(rows) != len(right) * each):
        problems.add(args.recall_result_file, None, f"{len(rows)} lines for {len(right)} texts",
                     f"up to {args.recall_num} per text, of all equally many: --recall_num as recall.py had it")
    problems.report()
    counts = [k for k in RECALLS if k <= each]
    ranks = []
    for place, label in enumerate(right):
        recalled = [columns[1] for _, columns in rows[place * each:(place + 1) * each]]
        ranks.append(recalled.index(label) + 1 if label in recalled else np.inf)
    log_recalls(np.array(ranks), counts)
    path = os.path.join(os.path.dirname(args.recall_result_file), "result.tsv")
    with open(path, "a", encoding="utf-8") as file:
        columns = [time.strftime("%Y%m%d-%H%M%S"), *(f"{np.mean(np.array(ranks) <= k) * 100:.3f}" for k in counts)]
        file.write("\t".join(columns) + "\n")
    get_logger().info(f"Line added to {path}")


def read_data(args, labels):
    """The labelled texts: (path, texts, label ids); the id of an unknown label is len(labels)."""
    path = os.path.join(args.dataset_dir, args.test_file or args.dev_file)
    if args.unknown_label in labels:
        raise UserError(f"--unknown_label {args.unknown_label}: is a label of {args.index_dir}, expected one that it has not")
    problems = Problems()
    known = labels + ([args.unknown_label] if args.unknown_label else [])
    texts, label_ids = read_labelled(path, known, problems, args.index_dir)
    problems.report()
    if args.unknown_label and not (label_ids == len(labels)).any():
        get_logger().warning(f"--unknown_label {args.unknown_label}: no text of {path} has this label, expected some that have.")
    return path, texts, label_ids


def with_head_weight(index, weight):
    """The index with another weight of its head. UserError where it has none."""
    if index.head is None and weight > 0:
        raise UserError(f"--head_weight {weight:g}: {index.folder} has no head, expected 0, or an index with one "
                        "(build_index.py --head)")
    if weight == 0:
        return index._replace(head=None)
    return with_settings(index, head={**index.header["head"], "weight": weight, "few_weight": weight})


def answer(index, vectors, texts, label_ids):
    """(guesses int64, confidences float, known float, ranks float [num_texts] of the right labels, inf for unknown ones)."""
    guesses, ranks = np.zeros(len(texts), int), np.full(len(texts), np.inf)
    confidences, known = np.zeros((2, len(texts)))
    for chunk in chunks(index, len(texts)):
        probs = label_probabilities(index, vectors[chunk], texts[chunk])
        places = label_ranks(probs, label_similarities(index, vectors[chunk]))
        guesses[chunk], confidences[chunk], known[chunk] = places.argmin(axis=1), probs.max(axis=1), probs.sum(axis=1)
        rows = np.flatnonzero(label_ids[chunk] < len(index.labels))
        ranks[chunk][rows] = places[rows, label_ids[chunk][rows]]
    return guesses, confidences, known, ranks


def log_groups(index, label_ids, guesses, ranks):
    """Log the accuracy by how many texts stand for a label in the index."""
    sizes = index.rows_per_label()
    for least, most in GROUPS:
        of_group = (sizes >= least) & (sizes <= (most or sizes.max(initial=0)))
        rows = of_group[label_ids]
        if rows.any():
            name = f"{least}-{most}" if most else f"{least} and more"
            accuracy, recall = (guesses == label_ids)[rows].mean(), (ranks[rows] <= 10).mean()
            get_logger().info(f"Labels of {name} texts: {of_group.sum()} labels | {rows.sum()} texts | accuracy "
                              f"{accuracy * 100:.2f}% | recall@10 {recall * 100:.2f}%")


def log_open_scores(scores):
    """Log the scores of texts some of which are of no label."""
    get_logger().info(f"Where known < 0.5 counts as unknown: F1 score of the unknown {scores['unknown_f1'] * 100:.2f} | macro F1 "
                      f"score of the known {scores['known_f1'] * 100:.2f} | accuracy {scores['accuracy'] * 100:.2f}%")


def log_threshold(threshold, is_right, confidences, is_known):
    """Log what a threshold does."""
    decided = np.array([is_decided(confidence, threshold) for confidence in confidences.tolist()])
    unknown = f" | unknown texts answered {decided[~is_known].mean() * 100:.2f}%" if not is_known.all() else ""
    precision = f"{is_right[decided].mean() * 100:.2f}%" if decided.any() else "-"
    get_logger().info(f"Threshold {threshold:.4f}: undecided {(~decided).mean() * 100:.2f}% | precision of the others {precision}"
                      f"{unknown}")


def main():
    args = parse_arguments()
    if args.recall_result_file:
        return evaluate_recall_file(args)
    index = open_index(args.index_dir)
    check_prefixes(args.index_dir, index.header, args.query_prefix, args.text_prefix)
    if args.lexical_weight is not None:
        index = with_settings(index, lexical={**index.header["lexical"], "weight": args.lexical_weight})
    if args.head_weight is not None:
        index = with_head_weight(index, args.head_weight)
    path, texts, label_ids = read_data(args, index.labels)
    check_output(args.bad_case_file, [path, args.params_path, args.index_dir], args.dataset_dir)
    threshold = find_threshold(args.threshold, index)
    encoder = open_encoder(args.params_path, **encoder_options(args))
    check_encoder(args.index_dir, index.header, encoder.encoder_id, encoder.dimension)
    with progress_bar(len(texts), "Encoding") as progress:
        vectors = for_queries(encoder, index.header).encode(texts, progress)
    guesses, confidences, known, ranks = answer(index, vectors, texts, label_ids)
    is_known, is_right = label_ids < len(index.labels), guesses == label_ids
    if is_known.any():
        log_recalls(ranks[is_known])
        scores = score_classes(label_ids[is_known], guesses[is_known], len(index.labels))
        get_logger().info(f"Accuracy: {scores['accuracy'] * 100:.2f}% | macro F1 score {scores['macro_f1'] * 100:.2f} | "
                          f"{is_known.sum()} texts")
        log_groups(index, label_ids[is_known], guesses[is_known], ranks[is_known])
    if not is_known.any():
        get_logger().info(f"Unknown texts: {len(texts)}, all of {path}: AUROC and F1 scores need texts of the index's labels, "
                          f"too | known < 0.5: {(known < 0.5).mean() * 100:.2f}%")
    elif not is_known.all():
        get_logger().info(f"Unknown texts: {(~is_known).sum()} | AUROC of the probability {auroc(confidences, is_known):.4f}, of "
                          f"known {auroc(known, is_known):.4f}")
        log_open_scores(score_open(label_ids, guesses, known, len(index.labels)))
    if threshold > 0:
        log_threshold(threshold, is_right, confidences, is_known)
    names = index.labels + [args.unknown_label]
    with complete_file(args.bad_case_file) as output:
        output.write("Text\tLabel\tPrediction\n")
        output.writelines(f"{texts[row]}\t{names[label_ids[row]]}\t{names[guesses[row]]}\n"
                          for row in np.flatnonzero(is_known & ~is_right))
    get_logger().info(f"Bad case saved in {args.bad_case_file}")


if __name__ == "__main__":
    run_script(main)
