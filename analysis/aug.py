"""Make more training rows out of those there are: words are replaced, inserted, deleted or swapped, the label stays.

    python analysis/aug.py --aug_type custom --custom_file_path data/synonyms.json
    python analysis/aug.py --aug_strategy mix --aug_type custom --custom_file_path data/synonyms.json --min_per_class 150
    python analysis/aug.py --aug_strategy delete --create_n 1 --aug_percent 0.1 --aug_path data/aug.txt
    python analysis/aug.py --aug_type mlm --mlm_model ernie-1.0-large-zh-cw --device gpu

Reads   train_path and, where they exist, label.txt, dev.txt and test.txt beside it; the dictionary or the masked LM.
Writes  aug_path: `<text><tab><label>`, only the new rows. No two of them are alike, and none equals a training row or a text
        of exclude_files; blanks, punctuation, case and width of characters make no difference in that.
"""

import os
import shlex
import time

import numpy as np

from textcls.analysis.augmentation import STRATEGIES, add_variant_options, augment, load_source
from textcls.common.errors import Problems, UserError, did_you_mean, run_script
from textcls.common.log import get_logger
from textcls.common.options import make_parser, positive_int, seed_number
from textcls.common.outputs import check_outputs
from textcls.data.files import read_labelled, read_labels, read_lines, write_rows
from textcls.models.device import select_device


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--train_path", default="./data/train.txt", help="training file to make variants of")
    parser.add_argument("--aug_path", default="./data/aug.txt", help="where the new rows go")
    parser.add_argument("--aug_strategy", default="substitute", choices=("mix", *STRATEGIES),
                        help="what happens to words; mix: the four in turn")
    add_variant_options(parser, create_n=2)
    parser.add_argument("--classes", nargs="+", metavar="LABEL", help="only rows of these classes")
    parser.add_argument("--min_per_class", type=positive_int, metavar="N",
                        help="only classes with fewer rows than N, and only as many new rows as bring them to N")
    parser.add_argument("--exclude_files", nargs="*", metavar="FILE",
                        help="files whose texts may not come out; None: dev.txt and test.txt beside train_path")
    parser.add_argument("--device", help="for mlm: cpu, gpu, gpu:N, xpu or npu; None: the GPU if there is one, else the CPU")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="texts per batch of the masked LM")
    parser.add_argument("--seed", type=seed_number, default=3, help="the same seed gives the same rows")
    return parser.parse_args()


def read_data(args, label_path, exclude_paths):
    """Returns (texts, label_ids int64 [num_texts], labels, excluded texts); UserError naming all that is wrong."""
    problems = Problems()
    if os.path.isfile(label_path):
        labels = read_labels(label_path, problems)
    else:  # the labels of the rows themselves, in the order they come
        rows = (line.partition("\t") for _, line in read_lines(args.train_path, Problems()))
        labels = list(dict.fromkeys(label for _, tab, label in rows if label.strip() and "\t" not in label))
    texts, label_ids = read_labelled(args.train_path, labels, problems, label_path)
    excluded = [line.split("\t")[0] for path in exclude_paths for _, line in read_lines(path, problems)]
    for label in args.classes or []:
        if labels and label not in labels:
            wrong = f"no class {label!r}{did_you_mean(label, labels)}"
            problems.add("--classes", None, wrong, f"one of the {len(labels)} labels")
    problems.report()
    return texts, label_ids, labels, excluded


def choose_rows(args, label_ids, labels):
    """Which rows to make variants of. Returns (row numbers int64 [num_chosen], most new rows per class int64 [num_classes])."""
    counts = np.bincount(label_ids, minlength=len(labels))
    wanted = counts * args.create_n
    if args.min_per_class:
        wanted = np.minimum(wanted, np.maximum(args.min_per_class - counts, 0))
    if args.classes:
        wanted[[label not in args.classes for label in labels]] = 0
    return np.flatnonzero(wanted[label_ids] > 0), wanted


def choose_variants(variants, label_ids, wanted, seed):
    """Take each class's share: every row's first variant, then every row's second one, and so on; rows in random order.

    variants: list of lists of str; label_ids: int64, of the same rows; wanted: int64 [num_classes].
    Returns (row position, text) pairs in the order of the rows.
    """
    left, chosen = wanted.copy(), []
    order = np.random.default_rng(seed).permutation(len(variants)).tolist()
    for turn in range(max(map(len, variants), default=0)):
        for position in order:
            if turn < len(variants[position]) and left[label_ids[position]] > 0:
                left[label_ids[position]] -= 1
                chosen.append((position, turn))
    return [(position, variants[position][turn]) for position, turn in sorted(chosen)]


def report(args, label_ids, labels, written_ids):
    """Log rows read and written per class, and the classes that stay under --min_per_class."""
    logger = get_logger()
    read, written = (np.bincount(ids, minlength=len(labels)) for ids in (label_ids, written_ids))
    for label, before, new in zip(labels, read, written):
        logger.info(f"Class name: {label} | rows read: {before} | rows written: {new}")
        if args.min_per_class and before + new < args.min_per_class and (not args.classes or label in args.classes):
            hint = "a larger --create_n, another --aug_strategy, or rows of your own" if before else "rows of your own"
            logger.warning(f"Class {label!r} has {before + new} rows with the new ones, not {args.min_per_class}; "
                           f"what helps: {hint}.")


def main():
    args = parse_arguments()
    folder = os.path.dirname(args.train_path)
    label_path = os.path.join(folder, "label.txt")
    exclude_paths = args.exclude_files
    if exclude_paths is None:
        beside = [os.path.join(folder, name) for name in ("dev.txt", "test.txt")]
        exclude_paths = [path for path in beside if os.path.isfile(path)]
    inputs = [path for path in (args.train_path, label_path, *exclude_paths, args.custom_file_path, args.mlm_model) if path]
    check_outputs([args.aug_path], inputs, folder)
    texts, label_ids, labels, excluded = read_data(args, label_path, exclude_paths)
    rows, wanted = choose_rows(args, label_ids, labels)
    if not len(rows) and args.min_per_class:
        raise UserError(f"{args.train_path}: nothing to do, no chosen class has fewer rows than --min_per_class "
                        f"{args.min_per_class}, expected a larger number")
    if not len(rows):
        raise UserError(f"{args.train_path}: nothing to do, the classes of --classes have no rows")
    logger = get_logger()
    select_device(args.device)
    source = load_source(args.aug_strategy, args.aug_type, args.custom_file_path, args.mlm_model)
    logger.info("Texts that may not come out are taken from: " + ", ".join([args.train_path, *exclude_paths]))
    if not exclude_paths:
        logger.warning("No dev or test file among them: a new row may equal a text you evaluate on (--exclude_files).")
    start = time.perf_counter()
    variants = augment([texts[row] for row in rows], args.aug_strategy, args.aug_type, args.create_n, args.aug_percent, args.seed,
                       batch_size=args.batch_size, exclude=texts + excluded, source=source)
    seconds = time.perf_counter() - start
    chosen = choose_variants(variants, label_ids[rows], wanted, args.seed)
    if not chosen:
        raise UserError(f"{args.train_path}: no new row could be made of {len(rows)} texts, so that {args.aug_path} is not "
                        "written; expected Chinese texts with words of the dictionary, or another --aug_strategy")
    written_ids = label_ids[rows][[position for position, _ in chosen]]
    write_rows(args.aug_path, [text for _, text in chosen], [labels[label] for label in written_ids])
    report(args, label_ids, labels, written_ids)
    logger.info(f"{len(rows)} texts took {seconds:.1f} s: {len(rows) / seconds:.0f} texts/s")
    logger.info(f"Augmented data saved in {args.aug_path}: {len(chosen)} rows of {len(rows)} texts")
    with open(args.train_path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        cat = "cat {} {}" if file.read() == b"\n" else "(cat {}; echo; cat {})"  # its last line has no end
    both = "train_aug.txt" if os.path.basename(args.aug_path) != "train_aug.txt" else "train_with_aug.txt"
    paths = [shlex.quote(path) for path in (args.train_path, args.aug_path, os.path.join(folder, both))]
    logger.info(f"Next: {cat.format(*paths[:2])} > {paths[2]}, then train.py --train_file {both}")


if __name__ == "__main__":
    run_script(main)
