"""Label the texts of a file, or of standard input, by an encoder and an index.

    python retrieval_based/predict.py --params_path ./encoder_export --index_dir ./index --dataset_dir data
    python retrieval_based/predict.py --output_format jsonl --top_k 3 --num_nearest 3 --threshold auto --output_file output.jsonl
    cat texts.txt | python retrieval_based/predict.py --data_file - --output_file -
    python retrieval_based/predict.py --params_path ./encoder_export --text_pair_file pairs.txt

Reads   dataset_dir/data.txt (one text per line), params_path (checkpoint or export of the encoder), index_dir (build_index.py's).
Writes  output_file in the order of the input, as predict.py of the suite does; jsonl also has "similarity" (cosine of the label's
        nearest row) and "nearest": [{"text", "label", "similarity"}, ...], the reasons.
        With --text_pair_file (`<text><tab><text>`) no index is used: prints the cosine of each pair.
"""

from textcls.common.errors import Problems, run_script
from textcls.common.log import get_logger
from textcls.common.options import (
    add_encoder_options,
    add_obsolete_options,
    add_prefix_options,
    encoder_options,
    make_parser,
    thread_count,
)
from textcls.common.texts import TEXT
from textcls.data.files import read_lines
from textcls.retrieval.encoder import open_encoder, prefixed
from textcls.retrieval.index import check_prefixes
from textcls.retrieval.predictor import SearchPredictor
from textcls.retrieval.search import find_threshold
from textcls.runtime.predictions import (
    add_output_options,
    check_files,
    check_labels,
    check_output_options,
    make_row,
    write_answers,
)
from textcls.runtime.quantize import add_scheme_options


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--params_path", default="./checkpoint", help="encoder: checkpoint, export or pretrained")
    parser.add_argument("--index_dir", default="./index", help="made by build_index.py")
    parser.add_argument("--dataset_dir", default="./data", help="folder of data_file")
    add_output_options(parser, output_file="output.txt")
    parser.add_argument("--num_nearest", type=int, default=0, help="how many of the nearest texts to write as reasons (jsonl)")
    parser.add_argument("--text_pair_file", help="print the cosine of pairs of texts, and do nothing else")
    add_encoder_options(parser)
    add_prefix_options(parser)
    parser.add_argument("--num_threads", type=thread_count, help="threads of an export on a CPU; None: one per usable core")
    add_scheme_options(parser)
    add_obsolete_options(parser, "--output_emb_size", "--model_name_or_path", "--pad_to_max_seq_len")
    args = parser.parse_args()
    check_output_options(parser, args)
    if args.num_nearest < 0 or (args.num_nearest and args.output_format != "jsonl"):
        parser.error("--num_nearest needs --output_format jsonl and a number of 0 or more")
    return args


def print_pairs(path, first_encoder, second_encoder):
    """Print the cosine of each pair of a file of `<text><tab><text>`. The encoders: of the first and the second texts."""
    problems = Problems()
    pairs = []
    for number, line in read_lines(path, problems):
        pairs.append(line.split("\t"))
        problem = next(filter(None, map(TEXT.problem, pairs[-1])), None) if len(pairs[-1]) == 2 else "no pair of texts"
        if problem:
            problems.add(path, number, problem, "<text><tab><text>")
    problems.report()
    firsts, seconds = first_encoder.encode([first for first, _ in pairs]), second_encoder.encode([second for _, second in pairs])
    cosines = (firsts * seconds).sum(axis=1)
    for (first, second), cosine in zip(pairs, cosines):
        print(f"{first}\t{second}\t{cosine:.6f}")


def answer_rows(answers, texts, args):
    """Yield a row per text. answers: list of Answer. jsonl also has the similarities, known and the nearest texts."""
    for text, answer in zip(texts, answers):
        row = make_row(text, [top[:2] for top in answer.top_k], args)
        if args.output_format == "jsonl":
            row["similarity"], row["known"] = answer.similarity, answer.known
            for top, (_, _, similarity) in zip(row["top_k"], answer.top_k):
                top["similarity"] = similarity
            row["nearest"] = [dict(zip(("text", "label", "similarity"), reason)) for reason in answer.nearest]
        yield row


def main():
    args = parse_arguments()
    options = {**encoder_options(args), "dtype": args.dtype, "num_threads": args.num_threads}
    if args.text_pair_file:
        encoder = open_encoder(args.params_path, **options)
        return print_pairs(args.text_pair_file, prefixed(encoder, args.query_prefix or ""),
                           prefixed(encoder, args.text_prefix or ""))
    total = check_files(args, [args.params_path, args.index_dir])
    predictor = SearchPredictor(args.params_path, args.index_dir, **options)
    check_prefixes(args.index_dir, predictor.index.header, args.query_prefix, args.text_prefix)
    args.threshold = find_threshold(args.threshold, predictor.index)
    check_labels(args, predictor.labels)

    def rows_of(texts, progress):
        return answer_rows(predictor.answer(texts, args.top_k, args.num_nearest, progress), texts, args)

    write_answers(args, total, rows_of, [args.params_path, args.index_dir])
    if args.output_file != "-":
        get_logger().info(f"Prediction results save in {args.output_file}.")


if __name__ == "__main__":
    run_script(main)
