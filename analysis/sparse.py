"""Find texts that the training data do not cover, and the rows that would cover them: to be augmented or to be labelled.

    python analysis/sparse.py --device "gpu" --dataset_dir "data" --aug_strategy "substitute" --max_seq_length 128 \\
        --params_path "./checkpoint" --batch_size 16 --sparse_num 100 --support_num 100
    python analysis/sparse.py --dataset_dir data --params_path ./checkpoint --annotate --unlabeled_file data.txt
    python analysis/sparse.py --dataset_dir data --params_path ./checkpoint --train_file train_rest.txt --dev_file held_out.txt

1. Sparse texts: the rows of dev_file whose nearest training rows are farthest away (mean cosine of the features of the
   rationale_num_sparse nearest). The model is wrong on them more often than elsewhere.
2. Support: what is nearest to the sparse texts, among the training rows or, with --annotate, the unlabelled texts. First the
   nearest of each sparse text, then the second of each, ... with a cosine above support_threshold, until there are support_num.
   Near-duplicates count once, among the sparse texts as among their support.
3. Written are: variants of the supporting training rows (--aug_strategy), these rows once more (duplicate), or the unlabelled
   texts as they are (--annotate): label them, append them to the training file and train again.

Reads   dataset_dir/train_file, dev_file, label_file, with --annotate unlabeled_file; params_path (made by train.py).
Writes  into dataset_dir: sparse_file `text\\tlabel`; support_file `text\\tlabel`, with --annotate `text` alone; report_file: the
        rows of both with their scores and what they are near to. cache_dir: features, for the next run with this model.
"""

import argparse
import os
import sys
from pathlib import Path
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import read_labels, read_lines, read_texts
from textcls.checkpoints import load_checkpoint
from textcls.device import select_device
from textcls.errors import Problems, UserError, run_script
from textcls.log import get_logger
from textcls.options import add_model_options, find_label_file, positive_int, seed_number
from textcls.outputs import check_outputs, complete_file
from analysis.parts.augmentation import AUG_TYPES, STRATEGIES, augment, load_source, proportion
from analysis.parts.duplicates import comparison_key
from analysis.parts.influence import cached_features, nearest_rows, normalize, sparse_scores
from evaluate import read_splits

HEADER = ("Stage", "Text", "Label", "Prediction", "Score", "Near to", "Made from")  # of report_file


class Support(NamedTuple):
    """A candidate that is near to a sparse text."""

    candidate: int
    sparse: int  # row of the development file
    score: float  # cosine of their features


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--train_file", default="train.txt", help="training file in dataset_dir")
    parser.add_argument("--dev_file", default="dev.txt", help="where sparse texts are looked for; better a held-out part of "
                        "the training data than the file that accuracy is reported on")
    parser.add_argument("--annotate", action="store_true", help="look for support in unlabeled_file, to be labelled by hand")
    parser.add_argument("--unlabeled_file", default="data.txt", help="texts, one per line, in dataset_dir (--annotate)")
    parser.add_argument("--sparse_file", default="sparse.txt", help="output in dataset_dir: the sparse texts")
    parser.add_argument("--support_file", default="support.txt", help="output in dataset_dir: what to add to the training data")
    parser.add_argument("--report_file", default="sparse_report.tsv", help="output in dataset_dir: both with scores")
    parser.add_argument("--sparse_num", type=positive_int, default=100, help="sparse texts; 10 to 20 %% of dev_file")
    parser.add_argument("--support_num", type=positive_int, default=100, help="supporting rows; 10 to 20 %% of train_file")
    parser.add_argument("--support_threshold", type=float, default=0.7, help="least cosine of support and sparse text")
    parser.add_argument("--rationale_num_sparse", type=positive_int, default=3, help="nearest training rows that decide what "
                        "is sparse")
    parser.add_argument("--rationale_num_support", type=positive_int, default=6, help="nearest candidates per sparse text")
    parser.add_argument("--max_overlap", type=float, default=0.5, help="texts that share more than this part of their pairs of "
                        "characters are near-duplicates; 1: only equal texts are")
    parser.add_argument("--aug_strategy", choices=["duplicate", *STRATEGIES], default="substitute")
    parser.add_argument("--aug_type", choices=AUG_TYPES, default="synonym", help="source of new words (substitute, insert)")
    parser.add_argument("--create_n", type=positive_int, default=1, help="variants per supporting row")
    parser.add_argument("--aug_percent", type=proportion, default=0.1, help="part of the words that change, 0 to 1")
    parser.add_argument("--custom_file_path", help="JSON dictionary {word: [word, ...]} (--aug_type custom)")
    parser.add_argument("--mlm_model", help="masked LM, a folder or a name (--aug_type mlm)")
    parser.add_argument("--cache_dir", default=".analysis_cache", help='folder for features; "": keep none')
    parser.add_argument("--seed", type=seed_number, default=3, help="of the augmentation")
    args = parser.parse_args()
    for name, low in (("max_overlap", 0), ("support_threshold", -1)):
        if not low <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)}: expected {low} to 1")
    if (args.annotate or args.aug_strategy == "duplicate") and (args.custom_file_path or args.mlm_model):
        parser.error("--custom_file_path and --mlm_model are of no use with --annotate and --aug_strategy duplicate")
    return args


def find_support(sparse_rows, texts, features, candidates, candidate_features, args):
    """The candidates nearest to the sparse texts, as a list of Support in the order in which they were found.

    sparse_rows: rows of texts (list of str) and features (float32 [num_texts, hidden_size]), the sparsest first; candidates:
    list of str; candidate_features: float32 [num_candidates, hidden_size]. UserError where none is near enough.
    """
    sparse_rows = sparse_rows[list(without_near_duplicates((texts[row] for row in sparse_rows), args.max_overlap))]
    queries, candidate_features = normalize(features[sparse_rows]), normalize(candidate_features)
    indices, scores = nearest_rows(lambda part: queries[part] @ candidate_features.T, len(queries), args.rationale_num_support)
    by_rank = zip(indices.T.ravel().tolist(), np.tile(sparse_rows, indices.shape[1]).tolist(), scores.T.ravel().tolist())
    near, taken = [], set()
    for found in map(Support._make, by_rank):
        key = comparison_key(candidates[found.candidate])
        if found.score > args.support_threshold and key not in taken:
            taken.add(key)
            near.append(found)
    if not near:
        raise UserError(f"--support_threshold {args.support_threshold}: no candidate is that near to a sparse text (the nearest "
                        f"has a cosine of {scores.max():.4f}), expected a lower threshold")
    chosen = without_near_duplicates((candidates[found.candidate] for found in near), args.max_overlap)
    return [near[index] for index, _ in zip(chosen, range(args.support_num))]


def without_near_duplicates(texts, max_overlap):
    """Yield the indices of the texts that are no near-duplicates of one yielded before.

    Measure: Jaccard index of the sets of character pairs. Lazy: texts is only read as far as indices are asked for.
    """
    holders, sizes = defaultdict(list), []  # pair -> the yielded texts that have it
    for index, text in enumerate(texts):
        pairs = {text[place:place + 2] for place in range(max(1, len(text) - 1))}
        shared = Counter(holder for pair in pairs for holder in holders[pair])
        if all(count <= max_overlap * (len(pairs) + sizes[holder] - count) for holder, count in shared.items()):
            for pair in pairs:
                holders[pair].append(len(sizes))
            sizes.append(len(pairs))
            yield index


def read_candidates(path, known, problems):
    """The texts of an unlabelled file that, by `comparison_key`, are not known and do not repeat. Returns (texts, left out)."""
    taken, texts, count = {comparison_key(text) for text in known}, [], 0
    for text in read_texts(path, problems):
        count += 1
        key = comparison_key(text)
        if key not in taken:
            taken.add(key)
            texts.append(text)
    return texts, count - len(texts)


def check_files(args, label_path):
    """UserError where an output is one of the data files or another output. Returns the paths of the three outputs."""
    inputs = [os.path.join(args.dataset_dir, name) for name in (args.train_file, args.dev_file, args.unlabeled_file)]
    if os.path.realpath(inputs[0]) == os.path.realpath(inputs[1]):
        raise UserError(f"{inputs[1]}: is the training file too, in which no text is sparse, expected other texts as --dev_file")
    inputs += [label_path, args.params_path] + [path for path in (args.custom_file_path, args.mlm_model) if path]
    outputs = [os.path.join(args.dataset_dir, name) for name in (args.sparse_file, args.support_file, args.report_file)]
    check_outputs(outputs, inputs, args.dataset_dir)
    if args.annotate and os.path.isfile(outputs[1]):
        for number, line in read_lines(outputs[1], Problems()):
            if "\t" in line:
                raise UserError(f"{outputs[1]}:{number}: has been labelled, which would be lost, expected another "
                                "--support_file, or this one moved away")
    return outputs


def read_files(args, labels, problems):
    """Returns (train, dev, unlabelled texts or None); train and dev are pairs (texts, label ids). Reports all problems."""
    path = os.path.join(args.dataset_dir, args.unlabeled_file)
    if args.annotate:
        for _ in read_texts(path, problems):
            pass  # what is wrong with it is reported with the rest
    train, dev = read_splits(args, labels, problems)
    if not args.annotate:
        return train, dev, None
    unlabeled, left_out = read_candidates(path, train[0] + dev[0] + read_evaluation_texts(args), problems)
    get_logger().info(f"{path}: {len(unlabeled)} texts, without {left_out} that repeat or are in a training, dev or test "
                      "file")
    if not unlabeled:
        raise UserError(f"{path}: no text is new, expected texts that are in no training, dev or test file")
    return train, dev, unlabeled


def read_evaluation_texts(args):
    """Texts of dev.txt and test.txt in dataset_dir where they exist: what is evaluated on must not come into training."""
    paths = [os.path.join(args.dataset_dir, name) for name in ("dev.txt", "test.txt")]
    problems = Problems()  # not the user's concern in this run
    return [line.split("\t")[0] for path in paths if os.path.isfile(path) for _, line in read_lines(path, problems)]


def make_variants(args, support, train, dev, source):
    """Augment the supporting training rows. Returns a list of (Support, variant)."""
    variants = augment([train[0][found.candidate] for found in support], args.aug_strategy, args.aug_type, args.create_n,
                       args.aug_percent, args.seed, args.custom_file_path, args.mlm_model, args.batch_size,
                       exclude=train[0] + dev[0] + read_evaluation_texts(args), source=source)
    missing = sum(not texts for texts in variants)
    if missing == len(support):
        raise UserError(f"--aug_strategy {args.aug_strategy}: nothing new could be made of the {missing} supporting rows, "
                        "expected another strategy, a larger dictionary or a higher --aug_percent")
    if missing:
        get_logger().warning(f"Nothing new could be made of {missing} of {len(support)} supporting rows: for more, raise "
                             "--support_num.")
    return [(found, variant) for found, texts in zip(support, variants) for variant in texts]


def main():
    args = parse_arguments()
    select_device(args.device)
    info, warning, label_path = get_logger().info, get_logger().warning, find_label_file(args)
    sparse_path, support_path, report_path = check_files(args, label_path)
    problems = Problems()
    if os.path.isfile(label_path):
        read_labels(label_path, problems)
        if problems.count:
            read_files(args, [], problems)  # a bad label.txt is reported with all else, before the model is loaded
    checkpoint = load_checkpoint(args.params_path, label_path, args.max_seq_length)
    labels = checkpoint.labels
    train, dev, unlabeled = read_files(args, labels, problems)
    source = None
    if not args.annotate and args.aug_strategy != "duplicate":
        source = load_source(args.aug_strategy, args.aug_type, args.custom_file_path, args.mlm_model)  # may fail: early
    if os.path.basename(args.dev_file) in ("dev.txt", "test.txt"):
        warning(f"{args.dev_file} is searched for sparse texts. After training on what is found, accuracy on the same file says "
                "too much: report it on another file, or search a held-out part of the training data instead (--dev_file).")
    if args.sparse_num > len(dev[0]):
        warning(f"--sparse_num {args.sparse_num}: {args.dev_file} has only {len(dev[0])} texts, all of which count as sparse.")

    train_features, train_logits = cached_features(checkpoint, args.params_path, train[0], args.batch_size, args.cache_dir,
                                                   args.train_file)
    features, logits = cached_features(checkpoint, args.params_path, dev[0], args.batch_size, args.cache_dir, args.dev_file)
    scores, nearest, cosines = sparse_scores(train_features, features, args.rationale_num_sparse)
    sparse_rows = np.argsort(scores, kind="stable")[:args.sparse_num]
    guesses = logits.argmax(axis=1)

    candidates, candidate_features, candidate_logits = train[0], train_features, train_logits
    if args.annotate:
        candidates = unlabeled
        candidate_features, candidate_logits = cached_features(checkpoint, args.params_path, unlabeled, args.batch_size,
                                                               args.cache_dir, args.unlabeled_file)
    support = find_support(sparse_rows, dev[0], features, candidates, candidate_features, args)
    if len(support) < args.support_num:
        warning(f"Found {len(support)} supporting rows where --support_num is {args.support_num}: for more, lower "
                "--support_threshold, or raise --rationale_num_support or --sparse_num.")
    added = [(found, candidates[found.candidate]) for found in support]
    if source is not None:
        added = make_variants(args, support, train, dev, source)

    with complete_file(sparse_path) as sparse_file, complete_file(support_path) as support_file, \
            complete_file(report_path) as report:
        report.write("\t".join(HEADER) + "\n")
        for row in sparse_rows:
            sparse_file.write(f"{dev[0][row]}\t{labels[dev[1][row]]}\n")
            near = " | ".join(f"{train[0][index]} ({labels[train[1][index]]}, {cosine:.4f})"
                              for index, cosine in zip(nearest[row], cosines[row]))
            report.write("\t".join(["sparse", dev[0][row], labels[dev[1][row]], labels[guesses[row]], f"{scores[row]:.4f}", near,
                                    ""]) + "\n")
        for found, text in added:
            label = "" if args.annotate else labels[train[1][found.candidate]]
            support_file.write(f"{text}\n" if args.annotate else f"{text}\t{label}\n")
            guess = labels[candidate_logits[found.candidate].argmax()]
            report.write("\t".join(["support", text, label, guess, f"{found.score:.4f}", dev[0][found.sparse],
                                    candidates[found.candidate] if source is not None else ""]) + "\n")
    correct = (guesses == dev[1])[sparse_rows]
    info(f"Accuracy in {args.dev_file}: {(guesses == dev[1]).mean() * 100:.2f}%")
    info(f"Sparse data saved in {sparse_path}")
    info(f"Accuracy in sparse data: {correct.mean() * 100:.2f}%")
    info(f"Average score in sparse data: {scores[sparse_rows].mean():.4f}")
    info(f"support data saved in {support_path}")
    info(f"support average scores: {np.mean([found.score for found in support]):.4f}")
    info(f"Scores of both saved in {report_path}")


if __name__ == "__main__":
    run_script(main)
