"""Change the labels of an index without training, while it is in use.

    python retrieval_based/index.py add 疫苗接种 --texts "打完疫苗能喝酒吗" "第二针隔多久" --params_path ./encoder_export
    python retrieval_based/index.py add 疫苗接种 --text_file new_texts.txt
    python retrieval_based/index.py describe 疫苗接种 --texts "预防针"
    python retrieval_based/index.py rename 疫苗接种 疫苗
    python retrieval_based/index.py remove 疫苗
    python retrieval_based/index.py refit

add     texts to a label, or a new label with its texts; those that it has already are not added again. describe: descriptions
        and synonyms of a label that is there. The index's head, if it has one, is fitted anew after both, unless that takes
        longer than some seconds: then refit does it, when you want it to. Until then what is new is found without it.
Reads   params_path: the encoder of the index, where there are texts to encode.
Writes  index_dir: a few new rows and index.json, which is replaced in one step. A server that has the index open sees the change.
"""

import contextlib
import functools
import math
import os
import time

from textcls.common.errors import Problems, UserError, run_script
from textcls.common.log import get_logger
from textcls.common.options import add_encoder_options, add_prefix_options, encoder_options, make_parser
from textcls.common.texts import LINE
from textcls.data.files import read_texts
from textcls.retrieval.changes import (
    OutdatedIndex,
    add_texts,
    check_new_label,
    find_label,
    label_texts,
    remove_label,
    rename_label,
    replace_head,
)
from textcls.retrieval.encoder import for_rows, open_encoder
from textcls.retrieval.head import AT_ONCE_WORK, fit_head, head_work
from textcls.retrieval.index import check_encoder, check_prefixes, open_index


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("change", choices=["add", "describe", "rename", "remove", "refit"])
    parser.add_argument("label", nargs="?", help="name of the label; of all but refit")
    parser.add_argument("new_name", nargs="?", help="of rename")
    parser.add_argument("--texts", nargs="+", default=[], help="of add and describe")
    parser.add_argument("--text_file", help="more texts, one per line")
    parser.add_argument("--index_dir", default="./index", help="made by build_index.py")
    parser.add_argument("--params_path", "--model_dir", default="./checkpoint", help="encoder: checkpoint, export or pretrained")
    add_encoder_options(parser)
    add_prefix_options(parser)
    args = parser.parse_args()
    if (args.change == "refit") != (args.label is None):
        parser.error("refit takes no label, the others need one: expected `refit`, or `add LABEL --texts ...`")
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


def make_change(args, texts, encoder_of):
    """Encode what is needed, then change the index. encoder_of: function that opens the encoder.

    Returns (the new index.json, the texts that were there already, the seconds of the change itself). OutdatedIndex where another
    process was faster.
    """
    index = open_index(args.index_dir, to_search=False)
    check_prefixes(args.index_dir, index.header, args.query_prefix, args.text_prefix)
    if args.change == "rename":
        entry = find_label(index, args.label)
        check_new_label(args.new_name)
        texts = label_texts(args.new_name, entry["texts"]) if index.header["corpus"] == "labels" else []
    elif args.change == "add":
        if args.label not in index.labels:
            check_new_label(args.label)
            texts = label_texts(args.label, texts) if index.header["corpus"] == "labels" else texts
    else:
        find_label(index, args.label)
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


def main():
    args = parse_arguments()
    texts = read_new_texts(args)
    if args.change == "refit":
        return refit_head(args.index_dir)
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
