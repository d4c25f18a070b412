"""Change the labels of an index without training, while it is in use; or train its encoder further with all that was added.

    python retrieval_based/index.py add 疫苗接种 --texts "打完疫苗能喝酒吗" "第二针隔多久" --params_path ./encoder_export
    python retrieval_based/index.py add 疫苗接种 --text_file new_texts.txt
    python retrieval_based/index.py describe 疫苗接种 --texts "预防针"
    python retrieval_based/index.py rename 疫苗接种 疫苗
    python retrieval_based/index.py remove 疫苗
    python retrieval_based/index.py refit
    python retrieval_based/index.py retrain --params_path ./encoder --dataset_dir ./data --output_dir ./retrained

add     texts to a label, or a new label with its texts; those that it has already are not added again. describe: descriptions
        and synonyms of a label that is there. The index's head, if it has one, is fitted anew after both, unless that takes
        longer than some seconds: then refit does it, when you want it to. Until then what is new is found without it.
retrain what these have changed since the index was built is written into the data files, the encoder is trained further, and
        an index of the new one takes the place of the old, unless it is worse on dev.txt. --dry_run only prints the changes.
Reads   params_path: the encoder of the index, where there are texts to encode; for retrain no export.
Writes  index_dir: a few new rows and index.json, which is replaced in one step. A server that has the index open sees the change.
        retrain: dataset_dir/train.txt, label.txt, dev.txt (renamed and removed labels); output_dir/: encoder/, index/,
        changes.txt, before/ (these files and the index as they were).
"""

import argparse
import contextlib
import functools
import math
import os
import time

import numpy as np

from textcls.common.errors import Problems, UserError, run_script
from textcls.common.log import get_logger, say_next
from textcls.common.options import add_encoder_options, add_prefix_options, encoder_options, make_parser, share_below_one
from textcls.common.outputs import check_output_folder
from textcls.common.texts import LINE
from textcls.data.files import read_texts
from textcls.retrieval.changes import add_texts, check_new_label, find_label, labels_of_texts, remove_label, rename_label
from textcls.retrieval.encoder import encoder_folder, for_rows, open_encoder
from textcls.retrieval.head import AT_ONCE_WORK, fit_head, head_work
from textcls.retrieval.index import check_encoder, check_prefixes, open_index
from textcls.retrieval.pending import carry_over, summarize, texts_of_two_labels
from textcls.retrieval.retraining import (
    AS_IT_WAS,
    build_options,
    check_train_options,
    compare,
    find_right,
    read_data_files,
    replace_data_files,
    run_retrieval_script,
)
from textcls.retrieval.rows import label_texts
from textcls.retrieval.unknown import read_unknown
from textcls.retrieval.writing import OutdatedIndex, copy_index, replace_head, replace_index, settling

MOST_SHOWN = 5  # texts in a warning
MOST_EPOCHS = 1000000  # as train.py has it
LEARN_AGAIN = {"unknown_file": "it here, too", "left_out_dir": "leave_out.py and build_index.py --left_out_dir afterwards"}


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("change", choices=["add", "describe", "rename", "remove", "refit", "retrain"])
    parser.add_argument("label", nargs="?", help="name of the label; of all but refit and retrain")
    parser.add_argument("new_name", nargs="?", help="of rename")
    parser.add_argument("--texts", nargs="+", default=[], help="of add and describe")
    parser.add_argument("--text_file", help="more texts, one per line")
    parser.add_argument("--index_dir", default="./index", help="made by build_index.py")
    parser.add_argument("--params_path", "--model_dir", default="./checkpoint", help="encoder: checkpoint, export or pretrained")
    add_encoder_options(parser)
    add_prefix_options(parser)
    parser.add_argument("--dataset_dir", "--data_dir", default="./data", help="of retrain: folder of the data files")
    parser.add_argument("--output_dir", default="./retrained", help="of retrain: a new folder")
    parser.add_argument("--num_train_epochs", type=float, default=3.0, help="of retrain: times that the training texts are seen")
    parser.add_argument("--precision", type=share_below_one,
                        help="of retrain: of the threshold, as of build_index.py; None: that of the index, if it has one")
    parser.add_argument("--unknown_file", help="of retrain: texts of no label in dataset_dir, as of build_index.py")
    parser.add_argument("--swap", choices=["better", "always"], default="better",
                        help="of retrain: when the new index takes the place of the old: better: unless it is worse on dev.txt")
    parser.add_argument("--dry_run", action="store_true", help="of retrain: only print what the data files lack")
    parser.add_argument("--train_options", nargs=argparse.REMAINDER, default=[],
                        help="of retrain, last of all: further options of retrieval_based/train.py")
    args = parser.parse_args()
    if (args.change in ("refit", "retrain")) != (args.label is None):
        parser.error("refit and retrain take no label, the others need one: expected `refit`, or `add LABEL --texts ...`")
    if (args.change == "rename") != (args.new_name is not None):
        parser.error("rename needs two names, the others one: expected `rename OLD NEW`, or `add LABEL --texts ...`")
    if (args.change in ("add", "describe")) != bool(args.texts or args.text_file):
        parser.error("add and describe need --texts or --text_file, the others take none")
    return args


def read_new_texts(args):
    """The texts of --texts and --text_file, each once, without blanks around them, as descriptions in label.txt are."""
    problems = Problems()
    for number, text in enumerate(args.texts, 1):
        if problem := LINE.problem(text):
            problems.add("--texts", number, problem, LINE.expected)
    texts = args.texts + (list(read_texts(args.text_file, problems)) if args.text_file else [])
    problems.report()
    return list(dict.fromkeys(text.strip() for text in texts))


def first_of(items):
    """The first of some words, and how many more there are."""
    more = f" and {len(items) - MOST_SHOWN} more" if len(items) > MOST_SHOWN else ""
    return ", ".join(items[:MOST_SHOWN]) + more


def warn_of_other_labels(index, label, texts):
    """Warn of texts to add to a label that another label has, too."""
    found = [f"{text} ({other})" for text, other in labels_of_texts(index, texts) if other != label]
    if found:
        get_logger().warning(f"{len(found)} of the texts are of another label already, and now of both: {first_of(found)}, "
                             "expected each text of one label")


def check_words(index, texts, describes):
    """UserError where texts are to become words of label.txt, which cannot hold them."""
    for text in texts:
        if "==" in text and (describes or index.header["corpus"] == "labels"):
            raise UserError(f"text {text!r}: == in it, which parts descriptions in label.txt, expected a text without ==")


def make_change(args, texts, encoder_of):
    """Encode what is needed, then change the index. encoder_of: function that opens the encoder.

    Returns (the new index.json, the texts that were there already, the seconds of the change itself). OutdatedIndex where another
    process was faster.
    """
    index = open_index(args.index_dir, to_search=False)
    check_prefixes(args.index_dir, index.header, args.query_prefix, args.text_prefix)
    warn_of_other_labels(index, args.label, texts)
    if args.change == "rename":
        entry = find_label(index, args.label)
        check_new_label(args.new_name)
        texts = label_texts(args.new_name, entry["texts"]) if index.header["corpus"] == "labels" else []
    elif args.change == "add":
        if args.label not in index.labels:
            check_new_label(args.label, index.labels)
            texts = label_texts(args.label, texts) if index.header["corpus"] == "labels" else texts
    else:
        find_label(index, args.label)
    check_words(index, texts, args.change == "describe")
    vectors = None
    if texts:
        encoder = encoder_of()
        check_encoder(args.index_dir, index.header, encoder.encoder_id, encoder.dimension)
        vectors = for_rows(encoder, index.header).encode(texts)
    start, there = time.perf_counter(), 0
    if args.change == "remove":
        header = remove_label(args.index_dir, args.label)
    elif args.change == "rename":
        header = rename_label(args.index_dir, args.label, args.new_name, vectors, seen=index.header)
    else:
        header, there = add_texts(args.index_dir, args.label, texts, vectors, describes=args.change == "describe",
                                  seen=index.header)
    return header, there, time.perf_counter() - start


def refit_head(index_dir, most_work=math.inf):
    """Fit the head of an index to its rows of now, unless that is more than most_work (of `head_work`), which the log says."""
    while True:
        index = open_index(index_dir)
        if index.header["head"] is None:
            raise UserError(f"{index_dir}: has no head, expected an index of texts whose head helped on the dev texts "
                            "(retrieval_based/build_index.py --head)")
        if head_work(index) > most_work:
            get_logger().warning("The head is as it was, since fitting it takes longer: what is new is found without it until "
                                 f"`index.py refit --index_dir {index_dir}`.")
            return
        start = time.perf_counter()
        head = fit_head(index, index.header["head"]["strength"], index.head)
        with contextlib.suppress(OutdatedIndex):
            replace_head(index, head)
            break
    get_logger().info(f"Head fitted anew: {len(head.labels)} labels, {time.perf_counter() - start:.1f} s")


def check_retraining(args, index):
    """Refuse what could not be trained further, or would only fail later."""
    check_prefixes(args.index_dir, index.header, args.query_prefix, args.text_prefix)
    if os.path.isfile(os.path.join(encoder_folder(args.params_path), "deploy.json")):
        raise UserError(f"--params_path {args.params_path}: is an export, which cannot be trained further, expected the "
                        "checkpoint that it was made of")
    if index.header["pending"] is None:
        raise UserError(f"{args.index_dir}: index.py of an older edition has changed it, which kept no list of it, expected what "
                        "was added in the data files, and a new index (retrieval_based/build_index.py --overwrite)")
    if not 0 < args.num_train_epochs <= MOST_EPOCHS:
        raise UserError(f"--num_train_epochs {args.num_train_epochs:g}: out of range, expected more than 0, up to {MOST_EPOCHS}")
    check_train_options(args.train_options, "retrain")
    check_output_folder(args.output_dir, "--output_dir", {"the data folder": args.dataset_dir, "the index": args.index_dir})
    if any(index.header["prefixes"].values()):
        get_logger().warning("The prefixes of the index stay as they are, but the training puts none before the texts.")
    if (source := (index.header["known"] or {}).get("learned_from")) and not args.unknown_file:
        get_logger().warning(f"The index was built with --{source}, the new one goes by labels left out of it, and its threshold "
                             f"may promise more than it keeps: expected {LEARN_AGAIN[source]}.")
    if not args.dry_run and os.path.isdir(args.output_dir) and os.listdir(args.output_dir):
        raise UserError(f"--output_dir {args.output_dir}: is not empty, expected a new folder, since it keeps the files as they "
                        "were before")


def show_changes(args, changes, data):
    """Say what the data files lack, and what in it does not look right."""
    for line in summarize(changes):
        get_logger().info(line)
    if not changes:
        get_logger().info(f"{args.dataset_dir} lacks nothing of what index.py has changed in {args.index_dir}")
    shared = [f"{text} ({', '.join(labels)})" for text, labels in texts_of_two_labels(changes, data.train)]
    if shared:
        get_logger().warning(f"{len(shared)} of the texts are of several labels: {first_of(shared)}, expected each text "
                             "of one label")


def train_further(args):
    """Train the encoder further on the data files: the folder of the new one."""
    folder = os.path.join(args.output_dir, "encoder")
    given = [word for name in ("device", "max_seq_length", "pooling") if getattr(args, name) is not None
             for word in (f"--{name}", getattr(args, name))]
    run_retrieval_script("train.py", "--model_name_or_path", encoder_folder(args.params_path), "--data_dir", args.dataset_dir,
                         "--output_dir", folder, "--num_train_epochs", args.num_train_epochs, *given, *args.train_options,
                         where=AS_IT_WAS)
    return folder


def build_anew(args, encoder_path):
    """Build an index of the new encoder in output_dir/index, with what was added meanwhile: (its folder, stamp of the old)."""
    folder = os.path.join(args.output_dir, "index")
    stamp = copy_index(args.index_dir, folder)  # build_index.py finds there what has been added while the encoder was trained
    header = open_index(folder).header
    precision = args.precision or (header["threshold"] or {}).get("precision")
    options = (("--device", args.device), ("--precision", precision), ("--unknown_file", args.unknown_file))
    given = [word for name, value in options if value for word in (name, value)]
    run_retrieval_script("build_index.py", "--params_path", encoder_path, "--data_dir", args.dataset_dir, "--index_dir", folder,
                         "--keep_added", "--batch_size", args.batch_size, *given, *build_options(header), where=AS_IT_WAS)
    return folder, stamp


def read_changes(args):
    """(the index, DataFiles as they are, DataFiles with what index.py has changed in the index, list of Change)"""
    index = open_index(args.index_dir)
    check_retraining(args, index)
    old = read_data_files(args.dataset_dir, index.header["pending"])
    data, changes = carry_over(index.header["pending"], old)
    if args.unknown_file:
        read_unknown(os.path.join(args.dataset_dir, args.unknown_file), data)  # before a training that would be for nothing
    return index, old, data, changes


def retrain(args):
    """Write what was added into the data files, train the encoder further, and put an index of it in place of the old one."""
    index, old, data, changes = read_changes(args)
    show_changes(args, changes, data)
    if args.dry_run:
        return print("".join("\t".join(change) + "\n" for change in changes), end="")
    encoder = open_encoder(args.params_path, **encoder_options(args))
    check_encoder(args.index_dir, index.header, encoder.encoder_id, encoder.dimension)
    while True:
        with contextlib.suppress(OutdatedIndex), settling(index):
            replace_data_files(args.dataset_dir, data, old, changes, args.output_dir)
            break
        index, old, data, changes = read_changes(args)
    get_logger().info(f"The data files in {args.dataset_dir} hold what was added; as they were: {args.output_dir}/before; the "
                      f"changes: {args.output_dir}/changes.txt")
    before = find_right(index, encoder, data.dev)
    encoder_path = train_further(args)
    encoder = open_encoder(encoder_path, device=args.device, batch_size=args.batch_size)
    while True:
        folder, stamp = build_anew(args, encoder_path)
        after = find_right(open_index(folder), encoder, data.dev)
        with contextlib.suppress(OutdatedIndex):
            return finish(args, index, data.dev, before, after, stamp, encoder_path)


def finish(args, index, dev, before, after, stamp, encoder_path):
    """Print what the training came to, and swap the new index in, unless it is worse. OutdatedIndex."""
    grown = set(index.header["pending"]["added"])
    print(compare(before, after, np.array([label in grown for _, label in dev])))
    if unseen := sorted(grown - {label for _, label in dev}):
        get_logger().warning(f"dev.txt has no texts of {first_of(unseen)}: how well they are answered is not measured, and no "
                             "setting goes by them, expected some texts of each")
    new = os.path.join(args.output_dir, "index")
    if after.sum() < before.sum() and args.swap == "better":
        get_logger().warning(f"The new index answers {before.sum() - after.sum()} dev texts fewer rightly: {args.index_dir} is "
                             f"as it was. To take the new one all the same: --params_path {encoder_path} --index_dir {new}")
        return
    kept = os.path.join(args.output_dir, "before", "index")
    header = replace_index(args.index_dir, new, stamp, kept)
    get_logger().info(f"Index {args.index_dir} is the new one, {len(header['labels'])} labels, of the encoder {encoder_path}; "
                      f"the old one is {kept}, of {args.params_path}")
    say_next("retrieval_based/predict.py", "--params_path", encoder_path, "--index_dir", args.index_dir)


def main():
    args = parse_arguments()
    texts = read_new_texts(args)
    if args.change == "refit":
        return refit_head(args.index_dir)
    if args.change == "retrain":
        return retrain(args)
    if not os.access(args.index_dir, os.W_OK) and os.path.isdir(args.index_dir):
        raise UserError(f"{args.index_dir}: cannot be written, expected a writable folder")
    encoder_of = functools.cache(lambda: open_encoder(args.params_path, **encoder_options(args)))
    while True:
        with contextlib.suppress(OutdatedIndex):
            header, there, seconds = make_change(args, texts, encoder_of)
            break
    name = f"{args.label} -> {args.new_name}" if args.new_name else args.label
    known = f" ({there} of them there already)" if there else ""
    get_logger().info(f"Index {args.index_dir}: {args.change} {name}, {len(texts)} texts{known}, {seconds * 1000:.1f} ms; "
                      f"{len(header['labels'])} labels now")
    if header["head"] and there < len(texts) and args.change != "rename":
        refit_head(args.index_dir, AT_ONCE_WORK)


if __name__ == "__main__":
    run_script(main)
