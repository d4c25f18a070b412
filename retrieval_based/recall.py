"""Write for each text the nearest lines of a corpus, to see what an encoder finds.

    python retrieval_based/recall.py --params_path ./checkpoint --corpus_file data/label.txt \\
        --similar_text_pair_file data/dev.txt --recall_num 50
    python retrieval_based/evaluate.py --similar_text_pair data/dev.txt --recall_result_file recall_result/recall_result_file \\
        --recall_num 50

Reads   params_path (checkpoint or export), similar_text_pair_file (`<text><tab><label>`), corpus_file: a text per line; of lines
        with a tab the first column is searched and the second is written.
Writes  recall_result_dir/recall_result_file: `<text><tab><recalled><tab><cosine>`, recall_num lines per text, nearest first, or
        all rows of a corpus that has fewer.
"""

import os

import numpy as np

from textcls.common.errors import Problems, run_script
from textcls.common.log import get_logger, progress_bar
from textcls.common.options import (
    add_encoder_options,
    add_obsolete_options,
    add_prefix_options,
    encoder_options,
    make_parser,
    positive_int,
)
from textcls.common.outputs import check_output, complete_file
from textcls.retrieval.encoder import open_encoder, prefixed
from textcls.retrieval.nearest import nearest
from textcls.retrieval.rows import read_corpus, rows_of_texts
from textcls.retrieval.writing import memory_index, new_header


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--corpus_file", required=True, help="what is searched")
    parser.add_argument("--similar_text_pair_file", "--similar_text_pair", required=True,
                        help="texts to search for, <text><tab><label>")
    parser.add_argument("--params_path", required=True, help="encoder: checkpoint, export or pretrained")
    parser.add_argument("--recall_result_dir", default="recall_result", help="folder of the result")
    parser.add_argument("--recall_result_file", default="recall_result_file", help="name of the result")
    parser.add_argument("--recall_num", type=positive_int, default=10, help="lines per text; of a smaller corpus all")
    add_encoder_options(parser)
    add_prefix_options(parser, "")
    add_obsolete_options(parser, "--output_emb_size", "--model_name_or_path", "--hnsw_m", "--hnsw_ef", "--hnsw_max_elements")
    return parser.parse_args()


def main():
    args = parse_arguments()
    path = os.path.join(args.recall_result_dir, args.recall_result_file)
    inputs = [args.corpus_file, args.similar_text_pair_file, args.params_path]
    for file in inputs[:2]:
        check_output(path, inputs, os.path.dirname(file))
    problems = Problems()
    corpus = read_corpus(args.corpus_file, problems)
    queries = [text for text, _ in read_corpus(args.similar_text_pair_file, problems, needs_label=True)]
    problems.report()
    encoder = open_encoder(args.params_path, **encoder_options(args))
    with progress_bar(len(corpus) + len(queries), "Encoding") as progress:
        texts = [text for text, _ in corpus]
        rows = rows_of_texts(prefixed(encoder, args.text_prefix).encode(texts, progress), np.zeros(len(texts)), texts)
        vectors = prefixed(encoder, args.query_prefix).encode(queries, progress)
    index = memory_index(new_header(encoder.encoder_id, encoder.dimension, "texts", [("all", [])]), rows)
    similarities, found = nearest(index, vectors, args.recall_num)
    with complete_file(path) as output:
        for text, cosines, places in zip(queries, similarities, found):
            output.writelines(f"{text}\t{corpus[place][1]}\t{cosine:.6f}\n" for cosine, place in zip(cosines, places))
    get_logger().info(f"Recall results saved in {path}")


if __name__ == "__main__":
    run_script(main)
