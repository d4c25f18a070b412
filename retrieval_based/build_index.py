"""Make the index that texts are classified by: vectors of labels or of training texts, and the settings that dev texts decide.

    python retrieval_based/build_index.py --params_path ./checkpoint --data_dir ./data --index_dir ./index
    python retrieval_based/build_index.py --params_path ./encoder_export --data_dir ./data --corpus labels --precision 0.9
    python retrieval_based/build_index.py --params_path ./encoder_export --precision 0.9 --unknown_file 无关.txt
    python retrieval_based/build_index.py --model_dir ./encoder_export --corpus_file ./data/label.txt --output_dir ./data \\
        --data_name label

Reads   params_path (made by retrieval_based/train.py, or by its export_model.py; or a pretrained encoder as it is: a folder of
        Hugging Face or sentence-transformers, or a built-in name), data_dir/label.txt, train.txt and dev.txt.
        A line of label.txt may be `label==description==synonym`; what is before a `##` in a label is no part of its text.
        data_dir/--unknown_file: texts of no label, one per line; what follows a tab is left aside.
Writes  index_dir, in place of what index may be there; it can be used meanwhile. Where index.py has changed that one, and the
        data files lack it: --keep_added takes it over, --overwrite loses it, `index.py retrain` writes it into them.
        With --data_name also output_dir/<data_name>_embedding.npy, the vectors that are searched, float32 [rows, size]: of
        train.txt or --corpus_file line by line; of label.txt each label's own name, then what is written behind it.
"""

import os

import numpy as np

from textcls.common.confidence import explain_no_threshold
from textcls.common.errors import Problems, UserError, run_script
from textcls.common.known import UNKNOWN_SHARE
from textcls.common.log import get_logger, progress_bar
from textcls.common.options import (
    add_encoder_options,
    add_obsolete_options,
    add_prefix_options,
    encoder_options,
    make_parser,
    share_below_one,
    thread_count,
)
from textcls.common.outputs import check_output, check_output_folder, complete_file
from textcls.data.files import check_splits, read_label_words, read_labelled, read_lines
from textcls.retrieval.encoder import open_encoder, prefixed
from textcls.retrieval.fitting import NEW_LABEL_COST, dev_step, fit
from textcls.retrieval.head import MOST_WORK, head_work
from textcls.retrieval.index import CORPORA, DTYPES, MARKER, label_word
from textcls.retrieval.left_out import read_left_out
from textcls.retrieval.nearest import add_type_options, wanted_type
from textcls.retrieval.pending import DataFiles, carry_over, name_rows, names_to_come, no_changes, number_rows, summarize_briefly
from textcls.retrieval.rows import label_rows, rows_of_means, rows_of_texts
from textcls.retrieval.unknown import LeftOut, UnknownTexts, mixed_numbers, read_unknown
from textcls.retrieval.writing import memory_index, new_header, read_pending, write_index
from textcls.runtime.predictions import check_decided


def precision(text):
    """Type of --precision: a share, or one of the words that this option took earlier."""
    return None if text in ("fp32", "fp16", "int8") else share_below_one(text)


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--params_path", "--model_dir", default="./checkpoint", help="encoder: checkpoint, export or pretrained")
    parser.add_argument("--data_dir", default="./data", help="folder of the data files")
    parser.add_argument("--label_file", default="label.txt", help="labels in data_dir")
    parser.add_argument("--train_file", default="train.txt", help="training texts in data_dir; not needed for --corpus labels")
    parser.add_argument("--dev_file", default="dev.txt", help="texts in data_dir that decide the settings; may be missing")
    parser.add_argument("--corpus_file", help="a path instead of --label_file, or with tabs instead of --train_file")
    parser.add_argument("--corpus", choices=[*CORPORA, "auto"], default="auto",
                        help="what is searched: labels' names and descriptions, training texts, the mean of each label's texts; "
                             "auto: the best on dev")
    parser.add_argument("--index_dir", default="./index", help="where the index goes")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the vectors in the index")
    add_type_options(parser)
    parser.add_argument("--head", choices=["auto", "on", "off"], default="auto",
                        help="logistic regression on the vectors, of --corpus texts; auto: where it takes minutes at most")
    parser.add_argument("--precision", type=precision,
                        help="share of right answers that predict.py --threshold auto shall give at least")
    parser.add_argument("--unknown_share", type=share_below_one, default=UNKNOWN_SHARE,
                        help="share of texts of no label that --precision and the confidence reckon with")
    parser.add_argument("--new_label_cost", type=share_below_one, default=NEW_LABEL_COST,
                        help="accuracy that the head may cost other labels so that new ones of a few texts are found")
    stand_ins = parser.add_mutually_exclusive_group()
    stand_ins.add_argument("--unknown_file", help="texts of no label in data_dir; None: dev texts without their labels")
    stand_ins.add_argument("--left_out_dir",
                           help="encoders of leave_out.py, to which these are as unknown as real ones; None: the index's own")
    parser.add_argument("--output_dir", help="folder for <data_name>_embedding.npy; None: data_dir")
    parser.add_argument("--data_name", help="write the vectors as <data_name>_embedding.npy, too")
    changed = parser.add_mutually_exclusive_group()
    changed.add_argument("--keep_added", action="store_true",
                         help="take over what index.py has changed in index_dir and the data files lack")
    changed.add_argument("--overwrite", action="store_true", help="lose it")
    add_encoder_options(parser)
    add_prefix_options(parser, "")
    parser.add_argument("--cpu_threads", type=thread_count, help="threads of an export on a CPU; None: one per usable core")
    add_obsolete_options(parser, "--use_tensorrt", "--enable_mkldnn", "--model_name_or_path", "--hnsw_max_elements")
    args = parser.parse_args()
    if args.output_dir and not args.data_name:
        parser.error("--output_dir is for the vectors of --data_name, expected --data_name too, or --index_dir for the index")
    if args.keep_added and args.data_name:
        parser.error("--data_name writes the vectors of the files line by line, expected a run without --keep_added")
    return args


def read_data(args, pending):
    """Read label.txt, train.txt and dev.txt. pending: of `read_pending`. Returns DataFiles, without the rows that are
    not needed or missing. UserError with all problems."""
    problems = Problems()
    paths = {name: os.path.join(args.data_dir, getattr(args, f"{name}_file")) for name in ("label", "train", "dev")}
    if args.corpus_file:
        has_tabs = any("\t" in line for _, line in read_lines(args.corpus_file, Problems()))
        paths["train" if has_tabs else "label"] = args.corpus_file
        own = "texts" if has_tabs else "labels"
        if args.corpus == "auto" and (args.data_name or not has_tabs):
            args.corpus = own
        if args.data_name and args.corpus != own:
            raise UserError(f"--corpus {args.corpus}: --data_name writes the vectors of {args.corpus_file}, row by row, expected "
                            f"--corpus {own}")
    words = read_label_words(paths["label"], problems)
    labels = [] if problems.count else list(words)
    if labels and pending is not None:
        labels += names_to_come(pending, labels)
    needs_train = args.corpus in ("texts", "means") or (
        (args.corpus == "auto" or pending != no_changes()) and os.path.exists(paths["train"]))
    train = read_labelled(paths["train"], labels, problems, paths["label"]) if needs_train else None
    has_dev = os.path.exists(paths["dev"]) or args.dev_file != "dev.txt"
    dev = read_labelled(paths["dev"], labels, problems, paths["label"]) if has_dev else None
    if train and dev and not problems.count:
        check_splits(paths["train"], paths["dev"], train, dev, list(words), problems)
    problems.report()
    for name in labels:
        check_decided(name)
    words = {name: [word for word in texts if word != label_word(name)] for name, texts in words.items()}
    return DataFiles(words, name_rows(train, labels), name_rows(dev, labels))


def keep_changes(args, pending, data):
    """The data with what index.py has changed in the index that is to be replaced, where --keep_added says so.

    Returns (DataFiles, what of it the files lack: pending of the new index). UserError where it would be lost, unless
    --overwrite says so.
    """
    if args.overwrite:
        return data, no_changes()
    if pending is None:
        raise UserError(f"{args.index_dir}: holds an index that index.py of an older edition has changed, which kept no list of "
                        "it, expected another folder, or --overwrite to lose these changes")
    carried, changes = carry_over(pending, data)
    if not changes:
        return data, no_changes()
    said = summarize_briefly(changes)
    if not args.keep_added:
        raise UserError(f"{args.index_dir}: holds an index that was changed by index.py since it was built, and the data files "
                        f"lack it ({said}), expected --keep_added to take it over, `index.py retrain` to write it into the data "
                        "files, or --overwrite to lose it")
    get_logger().info(f"Kept of what index.py has changed, which the data files lack: {said}")
    return carried, pending


def encode(encoder, texts, what):
    with progress_bar(len(texts), f"Encoding {what}") as progress:
        vectors = encoder.encode(texts, progress)
    if not np.isfinite(vectors).all():
        raise UserError(f"the encoder's vectors of {what} are not finite, expected a sound encoder")
    return vectors


def make_rows(corpora, encoder, labels, train):
    """The rows of each corpus: {corpus: NewRows}. encoder: with the prefix of rows."""
    ids = {name: number for number, (name, _) in enumerate(labels)}
    name_rows = label_rows(dict(labels))
    names, name_ids = [text for _, text in name_rows], np.array([ids[name] for name, _ in name_rows])
    name_vectors = encode(encoder, names, "labels")
    rows = {"labels": rows_of_texts(name_vectors, name_ids, names)} if "labels" in corpora else {}
    if corpora != ["labels"]:
        bare = ~np.isin(name_ids, train[1])  # labels without training texts are found by their own
        all_texts = train[0] + [names[number] for number in np.flatnonzero(bare)]
        vectors = np.concatenate([encode(encoder, train[0], "training texts"), name_vectors[bare]])
        label_ids = np.concatenate([train[1], name_ids[bare]])
        for corpus, make in (("texts", rows_of_texts), ("means", rows_of_means)):
            if corpus in corpora:
                rows[corpus] = make(vectors, label_ids, all_texts)
    return {corpus: rows[corpus] for corpus in corpora}


def ask_left_out(args, places, corpora, labels, train, dev):
    """What the encoders of --left_out_dir make of the texts: a list of {corpus: LeftOut}. places: of `read_left_out`."""
    made = []
    for number, (path, is_left) in enumerate(places, 1):
        get_logger().info(f"Encoder {number} of {len(places)} that was trained without some of the labels: {path}")
        encoder = open_encoder(path, device=args.device, batch_size=args.batch_size, max_seq_length=args.max_seq_length)
        rows = make_rows(corpora, prefixed(encoder, args.text_prefix), labels, train)
        vectors = encode(prefixed(encoder, args.query_prefix), dev[0], "dev texts")
        made.append({corpus: LeftOut(is_left, new_rows, vectors) for corpus, new_rows in rows.items()})
    return made


def wants_head(wanted, index):
    """Whether to fit a head: only where rows are texts. wanted: --head."""
    if index.header["corpus"] != "texts" or wanted == "off":
        return False
    if wanted == "auto" and head_work(index) > MOST_WORK:
        get_logger().info(f"No head: with {len(index.row_labels)} rows and {len(index.labels)} labels it takes many minutes; "
                          "--head on fits it all the same.")
        return False
    return True


def choose(args, encoder, labels, rows, dev, unknown_texts, left_out, pending):
    """The index of the corpus that is best on dev, with its settings: SearchIndex in memory. rows: of `make_rows`; left_out: of
    `ask_left_out`."""
    best, most = None, -1.0
    queries = prefixed(encoder, args.query_prefix)
    dev_vectors = encode(queries, dev[0], "dev texts") if dev else None
    unknown = UnknownTexts(args.unknown_share, encode(queries, unknown_texts, "unknown texts") if dev else None, unknown_texts)
    for corpus, new_rows in rows.items():
        header = new_header(encoder.encoder_id, encoder.dimension, corpus, labels, args.dtype,
                            (args.query_prefix, args.text_prefix))
        index = memory_index({**header, "pending": pending}, new_rows)
        if dev is None:
            get_logger().warning(f"No {args.dev_file}: the settings are the usual ones, the confidence is not calibrated, and no "
                                 "threshold is known, expected some labelled texts that are not in the index.")
            return index
        index, figures = fit(index, dev_vectors, *dev, args.precision, wants_head(args.head, index), unknown, args.new_label_cost,
                             [made[corpus] for made in left_out])
        shares = " | ".join(f"{name} {figures[name] * 100:.2f}%" for name in ("vote", "lexical", "head", "fused")
                            if name in figures)
        weights = {"lexical": index.header["lexical"]["weight"]}
        if "head" in figures:
            weights["head"] = index.header["head"]["weight"] if index.header["head"] else 0
        shown = ", ".join(f"{name} weight {weight:.2f}" for name, weight in weights.items())
        get_logger().info(f"Corpus {corpus}: {len(index.row_labels)} rows | accuracy in dev dataset: {shares} ({shown}, "
                          f"{index.header['vote']['neighbours']} neighbours) | AUROC of known against unknown labels "
                          f"{figures['known_auroc']:.3f}")
        if figures["fused"] > most:
            best, most = index, figures["fused"]
    return best


def warn_of_threshold(args, index, num_dev, num_unknown):
    """Warn where no threshold keeps --precision, and where a few unknown texts let only a part of the dev texts decide it.

    num_dev: of the dev texts that settings go by; num_unknown: of --unknown_file.
    """
    rows = num_dev
    if args.unknown_file:
        known, others = mixed_numbers(num_dev, num_unknown, args.unknown_share)
        rows = known + others
        if known < num_dev:
            get_logger().warning(f"--unknown_file has {num_unknown} texts: at --unknown_share {args.unknown_share:g} only "
                                 f"{known} of {num_dev} dev texts go with them, and decide the threshold, expected more of them.")
    if index.header["threshold"] is None:
        get_logger().warning(f"No threshold for a precision of {args.precision:g} in {args.dev_file}: "
                             f"{explain_no_threshold(rows, args.precision)}.")


def main():
    args = parse_arguments()
    wanted = wanted_type(args)
    inputs = {"the encoder": args.params_path, "the data folder": args.data_dir}
    check_output_folder(args.index_dir, "--index_dir", inputs, MARKER)
    vectors_path = os.path.join(args.output_dir or args.data_dir, f"{args.data_name}_embedding.npy")
    if args.data_name:
        check_output(vectors_path, [], args.data_dir)
    before = read_pending(args.index_dir)
    data, pending = keep_changes(args, before, read_data(args, before))
    unknown = read_unknown(os.path.join(args.data_dir, args.unknown_file), data) if args.unknown_file else []
    labels = list(data.words.items())
    train, dev = (number_rows(rows, data.words) if rows else None for rows in (data.train, data.dev))
    places = read_left_out(args.left_out_dir, list(data.words)) if args.left_out_dir and dev else []
    encoder = open_encoder(args.params_path, **encoder_options(args), num_threads=args.cpu_threads)
    corpora = [args.corpus]
    if args.corpus == "auto":  # texts first: the best of equals, and what is taken without dev texts
        corpora = ["texts", "means", "labels"] if train else ["labels"]
    rows = make_rows(corpora, prefixed(encoder, args.text_prefix), labels, train)
    left_out = ask_left_out(args, places, corpora, labels, train, dev)
    index = choose(args, encoder, labels, rows, dev, unknown, left_out, pending)
    if args.precision is not None and dev is not None:
        warn_of_threshold(args, index, len(dev[0][::dev_step(len(dev[0]))]), len(unknown))
    header = write_index(args.index_dir, index, wanted, None if args.overwrite else before)
    if args.data_name:
        with complete_file(vectors_path, "wb") as file:
            vectors = index.segments[0].vectors  # of texts: without those of labels that have none, which no line is of
            np.save(file, vectors[:len(train[0])] if header["corpus"] == "texts" else vectors)
        get_logger().info(f"Vectors saved in {vectors_path}")
    threshold = ""
    if header["threshold"]:
        threshold = (f", threshold {header['threshold']['value']:.4f} for a precision of {args.precision:g} where "
                     f"{args.unknown_share * 100:g} % of the texts are of no label")
    get_logger().info(f"Index saved in {args.index_dir}: corpus {header['corpus']}, {len(labels)} labels, "
                      f"{len(index.row_labels)} rows{threshold}")


if __name__ == "__main__":
    run_script(main)
