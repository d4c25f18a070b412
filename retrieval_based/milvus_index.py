"""Put an index folder, or a file of vectors, into Milvus; list, switch, search and drop what is there. Needs no Paddle.

    python retrieval_based/milvus_index.py insert --index_dir ./index
    python retrieval_based/milvus_index.py insert --index_dir ./index --milvus_uri http://10.0.0.5:19530 --keep 1
    python retrieval_based/milvus_index.py --vector_path ./label_embedding.npy --corpus_file ./data/label.txt
    python retrieval_based/milvus_index.py list|switch|drop --milvus_uri http://10.0.0.5:19530
    python retrieval_based/milvus_index.py search --vector_path ./query_embedding.npy --top_k 5

Reads   the folder that retrieval_based/build_index.py wrote, or a .npy file, row by row the vectors of a corpus file.
Writes  into Milvus Lite (--milvus_uri NAME.db, a folder) or a Milvus server or cluster: a new collection, to which the fixed
        name --collection is switched when it is complete; until then the old one answers.
Prints  what was written, or what was found, one neighbour per line: `row label similarity text`, the nearest first.
"""

import time

import numpy as np

from textcls.common.errors import Problems, UserError, run_script
from textcls.common.log import progress_bar
from textcls.common.options import make_parser, positive_int, prefix
from textcls.retrieval.index import check_prefixes, open_index
from textcls.retrieval.milvus import (
    INDEX_TYPES,
    MOST_NEIGHBOURS,
    Source,
    add_milvus_options,
    check_alias,
    describe,
    drop_versions,
    find_version,
    is_complete,
    list_versions,
    load,
    open_milvus,
    read_token,
    search,
    switch,
    write_version,
)
from textcls.retrieval.nearest import MOST_EXACT
from textcls.retrieval.rows import read_corpus
from textcls.runtime.exported import EMBEDDING, read_export

BLOCK = 4096  # rows in memory at a time


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("command", nargs="?", default="insert", choices=["insert", "list", "switch", "search", "drop"],
                        help="insert: write a new version and switch to it; list: show the versions; switch: go (back) to "
                        "another; search: the rows nearest to the vectors of --vector_path; drop: older versions, or --all")
    add_milvus_options(parser)
    parser.add_argument("--index_dir", default="./index", help="index folder to insert, where no --vector_path is given")
    parser.add_argument("--vector_path", help="vectors to insert or to search: .npy, [rows, dimension]")
    parser.add_argument("--corpus_file", default="./data/label.txt",
                        help="what the rows of --vector_path are: a label.txt, or a file of lines <text><tab><label>")
    parser.add_argument("--model_dir", help="exported encoder that made --vector_path: its mark is stored, or compared")
    parser.add_argument("--query_prefix", type=prefix, help="what run_system.py shall put before its texts; None: what the index "
                        "says, with --vector_path nothing")
    parser.add_argument("--index_type", default="auto", choices=["auto", *INDEX_TYPES],
                        help=f"how Milvus searches; auto: FLAT (exact), beyond {MOST_EXACT} rows HNSW; AUTOINDEX: as it likes")
    parser.add_argument("--keep", type=int, default=0, help="older versions that insert or drop leaves, to switch back to")
    parser.add_argument("--switch_to", help="collection to switch to; None: the newest older one")
    parser.add_argument("--all", action="store_true", help="drop: the current version and the name, too")
    parser.add_argument("--top_k", type=positive_int, default=20, help="neighbours per query")
    args = parser.parse_args()
    if args.top_k > MOST_NEIGHBOURS:
        parser.error(f"--top_k {args.top_k}: expected at most {MOST_NEIGHBOURS}")
    if args.keep < 0:
        parser.error(f"--keep {args.keep}: expected 0 or more")
    if args.command == "search" and not args.vector_path:
        parser.error("search needs the vectors of the queries: --vector_path; for texts there is run_system.py")
    check_alias(args.collection)
    return args


def read_vectors(path):
    """Map a .npy file of vectors: floating point [rows, dimension]. UserError."""
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no array of numbers"
        raise UserError(f"{path}: cannot be read ({reason}), expected a .npy file of vectors") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind != "f" or 0 in vectors.shape:
        raise UserError(f"{path}: expected one array of floating point numbers, [rows, dimension]")
    for start in range(0, len(vectors), BLOCK):
        norms = np.linalg.norm(vectors[start:start + BLOCK].astype(np.float32), axis=1)
        if not (np.isfinite(norms) & (norms > 0)).all():
            row = start + int(np.argmin(np.isfinite(norms) & (norms > 0)))
            raise UserError(f"{path}: row {row} has no direction (zeros, infinity or NaN), expected vectors of an encoder")
    return vectors


def vector_source(args):
    """The Source of --vector_path."""
    vectors, problems = read_vectors(args.vector_path), Problems()
    rows = read_corpus(args.corpus_file, problems)
    problems.report()
    if len(vectors) != len(rows):
        raise UserError(f"{args.vector_path}: {len(vectors)} rows, but {args.corpus_file} has {len(rows)}, expected as many "
                        "(--corpus_file names the file that the vectors were made of)")
    label_ids = {label: number for number, label in enumerate(dict.fromkeys(label for _, label in rows))}

    def blocks():
        for start in range(0, len(rows), BLOCK):
            yield (vectors[start:start + BLOCK].astype(np.float32),
                   [(label_ids[label], label, text) for text, label in rows[start:start + BLOCK]])

    return Source(encoder_of(args), vectors.shape[1], len(rows), blocks, args.query_prefix or "")


def index_source(folder, query_prefix):
    """The Source of an index folder, without the rows of removed labels. query_prefix: has to be the index's, or None."""
    index = open_index(folder, to_search=False)
    check_prefixes(folder, index.header, query_prefix, None)
    label_ids = [entry["id"] for entry in index.header["labels"]]

    def blocks():
        for segment, first in zip(index.segments, index.starts):
            for start in range(0, len(segment.label_ids), BLOCK):
                vectors = segment.block(start, start + BLOCK)
                positions = index.row_labels[first + start:first + start + len(vectors)]
                kept = np.flatnonzero(positions >= 0)
                yield vectors[kept], [(label_ids[positions[row]], index.labels[positions[row]], segment.text(start + row))
                                      for row in kept]

    return Source(index.header["encoder_id"], index.header["dimension"], int((index.row_labels >= 0).sum()), blocks,
                  index.header["prefixes"]["query"])


def encoder_of(args):
    """The encoder_id of --model_dir, "" where none is given."""
    return read_export(args.model_dir, output=EMBEDDING).encoder_id if args.model_dir else ""


def insert(client, args, source):
    began = time.monotonic()
    with progress_bar(source.num_rows, "Inserting", "rows") as progress:
        version, recall = write_version(client, args.collection, source, args.index_type, progress)
    dropped = drop_versions(client, args.collection, args.keep)
    print(f"{args.collection} -> {version.name}: {version.num_rows} rows of {version.dimension} dimensions, "
          f"{version.index_type}, {time.monotonic() - began:.1f} s")
    print(f"recall@10 of a sample against exact search: {recall:.4f}")
    if dropped:
        print(f"dropped: {' '.join(dropped)}")


def show_versions(client, args):
    current = find_version(client, args.collection).name
    for version in list_versions(client, args.collection):
        state = "current" if version.name == current else "complete" if is_complete(client, version) else "incomplete"
        print(f"{version.name}\t{state}\t{version.num_rows} rows\t{version.dimension} dimensions\t{version.index_type}\t"
              f"encoder {version.encoder_id or 'unknown'}")


def switch_version(client, args):
    current = find_version(client, args.collection)
    others = [version for version in list_versions(client, args.collection) if is_complete(client, version)
              and (version.name == args.switch_to if args.switch_to else version.name < current.name)]
    if not others:
        raise UserError(f"--collection {args.collection}: no {args.switch_to or 'older version'} that is complete, expected one "
                        "of `milvus_index.py list` (insert --keep leaves some)")
    load(client, others[-1].name)
    switch(client, args.collection, others[-1])
    print(f"{args.collection} -> {others[-1].name}")


def drop(client, args):
    if args.all:
        versions = [version.name for version in list_versions(client, args.collection)]
        current = describe(client, args.collection)
        if current and current.name not in versions:
            raise UserError(f"--collection {args.collection}: is the name of a collection, expected a name that insert has made")
        if current:
            client.drop_alias(args.collection)
        for name in versions:
            client.drop_collection(name)
    else:
        versions = drop_versions(client, args.collection, args.keep)
    print(f"dropped: {' '.join(versions) or 'nothing'}")


def main():
    args = parse_arguments()
    if args.command == "insert":  # read before Milvus is asked: what is wrong in files is found first
        source = vector_source(args) if args.vector_path else index_source(args.index_dir, args.query_prefix)
    elif args.command == "search":
        queries, encoder_id = np.asarray(read_vectors(args.vector_path), np.float32), encoder_of(args)
    with open_milvus(args.milvus_uri, read_token(args), timeout=args.timeout, is_new=args.command == "insert") as client:
        if args.command == "insert":
            insert(client, args, source)
        elif args.command == "search":
            for row, hits in enumerate(search(client, args.collection, queries, args.top_k, encoder_id)):
                for hit in hits:
                    print(hit.line(row))
        else:
            {"list": show_versions, "switch": switch_version, "drop": drop}[args.command](client, args)


if __name__ == "__main__":
    run_script(main)
