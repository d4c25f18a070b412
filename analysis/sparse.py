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

import os
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from textcls.analysis.augmentation import STRATEGIES, add_variant_options, augment, load_source
from textcls.analysis.features import cached_features, nearest_rows, normalize, sparse_scores
from textcls.common.errors import Problems, UserError, run_script
from textcls.common.log import get_logger
from textcls.common.options import add_model_options, find_label_file, make_parser, positive_int, seed_number
from textcls.common.outputs import check_outputs, complete_file
from textcls.data.files import read_lines, read_texts
from textcls.data.folds import comparison_key
from textcls.models.device import select_device
from textcls.models.loading import data_paths, load_with_data, read_splits

HEADER = ("Stage", "Text", "Label", "Prediction", "Score", "Near to", "Made from")  # of report_file


class Outputs(NamedTuple):
    """What the model says of some texts."""

    features: np.ndarray  # float32 [num_texts, hidden_size]
    guesses: np.ndarray  # int64 [num_texts], the predicted classes


class Support(NamedTuple):
    """A candidate that is near to a sparse text."""

    candidate: int
    sparse: int  # row of the development file
    score: float  # cosine of their features


def parse_arguments():
    parser = make_parser(__doc__)
    add_model_options(parser, train_file=True, cache_dir=True)
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
    add_variant_options(parser, create_n=1)
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


def check_files(args):
    """UserError where an output is one of the data files or another output. Returns the paths of the three outputs."""
    inputs = data_paths(args)
    if os.path.realpath(inputs[0]) == os.path.realpath(inputs[1]):
        raise UserError(f"{inputs[1]}: is the training file too, in which no text is sparse, expected other texts as --dev_file")
    inputs += [os.path.join(args.dataset_dir, args.unlabeled_file), find_label_file(args), args.params_path]
    inputs += [path for path in (args.custom_file_path, args.mlm_model) if path]
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


def warn_of_options(args, num_dev):
    """Say where the file that is searched will no longer do for measuring accuracy, or is shorter than --sparse_num."""
    warning = get_logger().warning
    if os.path.basename(args.dev_file) in ("dev.txt", "test.txt"):
        warning(f"{args.dev_file} is searched for sparse texts. After training on what is found, accuracy on the same file says "
                "too much: report it on another file, or search a held-out part of the training data instead (--dev_file).")
    if args.sparse_num > num_dev:
        warning(f"--sparse_num {args.sparse_num}: {args.dev_file} has only {num_dev} texts, all of which count as sparse.")


def run_model(checkpoint, args, texts, name):
    """Outputs of a list of str. name: of their file."""
    features, logits = cached_features(checkpoint, args.params_path, texts, args.batch_size, args.cache_dir, name)
    return Outputs(features, logits.argmax(axis=1))


def describe_sparse(rows, train, dev, guesses, found, labels):
    """The sparse texts as rows of the report: tuples of str. rows: of dev; found: as of `sparse_scores`."""
    scores, nearest, cosines = found
    for row in rows:
        near = " | ".join(f"{train[0][index]} ({labels[train[1][index]]}, {cosine:.4f})"
                          for index, cosine in zip(nearest[row], cosines[row]))
        yield "sparse", dev[0][row], labels[dev[1][row]], labels[guesses[row]], f"{scores[row]:.4f}", near, ""


def describe_support(added, candidates, candidate_ids, guesses, dev, labels):
    """What is to be added as rows of the report: tuples of str. added: list of (Support, text).

    candidate_ids: label ids int64 [num_candidates], None where they have no labels yet; guesses: int64 [num_candidates].
    """
    for found, text in added:
        label = "" if candidate_ids is None else labels[candidate_ids[found.candidate]]
        made_from = candidates[found.candidate] if text != candidates[found.candidate] else ""
        yield ("support", text, label, labels[guesses[found.candidate]], f"{found.score:.4f}", dev[0][found.sparse], made_from)


def write_files(paths, sparse, support):
    """Write sparse_file, support_file and report_file. sparse, support: rows of the report."""
    with complete_file(paths[0]) as sparse_file, complete_file(paths[1]) as support_file, complete_file(paths[2]) as report:
        report.writelines("\t".join(row) + "\n" for row in (HEADER, *sparse, *support))
        sparse_file.writelines(f"{text}\t{label}\n" for _, text, label, *_ in sparse)
        support_file.writelines(f"{text}\t{label}\n" if label else f"{text}\n" for _, text, label, *_ in support)


def main():
    args = parse_arguments()
    select_device(args.device)
    paths = check_files(args)
    checkpoint, (train, dev, unlabeled) = load_with_data(args, lambda *found: read_files(args, *found))
    augments = not args.annotate and args.aug_strategy != "duplicate"
    if augments:
        source = load_source(args.aug_strategy, args.aug_type, args.custom_file_path, args.mlm_model)  # may fail: early
    warn_of_options(args, len(dev[0]))

    train_outputs = run_model(checkpoint, args, train[0], args.train_file)
    dev_outputs = run_model(checkpoint, args, dev[0], args.dev_file)
    found = scores, *_ = sparse_scores(train_outputs.features, dev_outputs.features, args.rationale_num_sparse)
    sparse_rows = np.argsort(scores, kind="stable")[:args.sparse_num]
    candidates, candidate_ids, candidate_outputs = *train, train_outputs
    if args.annotate:
        candidates, candidate_ids = unlabeled, None
        candidate_outputs = run_model(checkpoint, args, unlabeled, args.unlabeled_file)
    support = find_support(sparse_rows, dev[0], dev_outputs.features, candidates, candidate_outputs.features, args)
    if len(support) < args.support_num:
        get_logger().warning(f"Found {len(support)} supporting rows where --support_num is {args.support_num}: for more, lower "
                             "--support_threshold, or raise --rationale_num_support or --sparse_num.")
    if augments:
        added = make_variants(args, support, train, dev, source)
    else:
        added = [(row, candidates[row.candidate]) for row in support]

    write_files(paths, list(describe_sparse(sparse_rows, train, dev, dev_outputs.guesses, found, checkpoint.labels)),
                list(describe_support(added, candidates, candidate_ids, candidate_outputs.guesses, dev, checkpoint.labels)))
    info, correct = get_logger().info, dev_outputs.guesses == dev[1]
    info(f"Accuracy in {args.dev_file}: {correct.mean() * 100:.2f}%")
    info(f"Sparse data saved in {paths[0]}")
    info(f"Accuracy in sparse data: {correct[sparse_rows].mean() * 100:.2f}%")
    info(f"Average score in sparse data: {scores[sparse_rows].mean():.4f}")
    info(f"support data saved in {paths[1]}")
    info(f"support average scores: {np.mean([row.score for row in support]):.4f}")
    info(f"Scores of both saved in {paths[2]}")


if __name__ == "__main__":
    run_script(main)
