"""From a text to its neighbours in Milvus: encode it with the exported encoder, in this process, and search. Needs no Paddle.

    python retrieval_based/run_system.py --model_dir ./output --texts "谈谈去西安旅游，哪些地方让你觉得不虚此行？"
    python retrieval_based/run_system.py --model_dir ./output --data_file ./data/data.txt --milvus_uri http://10.0.0.5:19530

Reads   the folder that retrieval_based/export_model.py wrote, texts, and what retrieval_based/milvus_index.py put into Milvus.
Prints  `text label similarity` per neighbour, the nearest first, and its text where that is not the label; or JSON lines.
"""

import json
import time

from textcls.common.errors import UserError, run_script
from textcls.common.log import get_logger, progress_bar
from textcls.common.options import make_parser, positive_int, prefix, thread_count
from textcls.retrieval.encoder import open_encoder, prefixed
from textcls.retrieval.milvus import (
    MOST_NEIGHBOURS,
    add_milvus_options,
    check_alias,
    find_version,
    open_milvus,
    read_token,
    search,
)
from textcls.runtime.client import read_input

CHUNK = 1024  # texts encoded and searched at a time


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--model_dir", default="./output", help="exported encoder, that of the vectors in Milvus")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--texts", nargs="+", help="texts to search for")
    texts.add_argument("--data_file", help="file of texts, one per line; -: standard input")
    parser.add_argument("--query_prefix", type=prefix, help="what is put before each text; None: what Milvus says, which has to "
                        "be the same")
    parser.add_argument("--top_k", type=positive_int, default=20, help="neighbours per text")
    parser.add_argument("--output_format", default="txt", choices=["txt", "jsonl"])
    parser.add_argument("--batch_size", type=positive_int, default=32, help="texts per batch of the encoder")
    parser.add_argument("--max_seq_length", type=int, help="longest text in tokens; None: as in training")
    parser.add_argument("--num_threads", type=thread_count, help="threads of the encoder; None: one per usable core")
    add_milvus_options(parser)
    args = parser.parse_args()
    if args.top_k > MOST_NEIGHBOURS:
        parser.error(f"--top_k {args.top_k}: expected at most {MOST_NEIGHBOURS}")
    check_alias(args.collection)
    return args


def main():
    args = parse_arguments()
    texts = read_input(args)
    encoder = open_encoder(args.model_dir, batch_size=args.batch_size, max_seq_length=args.max_seq_length,
                           num_threads=args.num_threads)
    encoding = searching = 0
    progress = progress_bar(len(texts), "Searching")
    with progress, open_milvus(args.milvus_uri, read_token(args), timeout=args.timeout) as client:
        version = find_version(client, args.collection, encoder.encoder_id, encoder.dimension)  # before much is encoded
        if args.query_prefix not in (None, version.query_prefix):
            raise UserError(f"--query_prefix {args.query_prefix!r}: --collection {args.collection} was made with "
                            f"{version.query_prefix!r}, expected that, or a run without the option")
        encoder = prefixed(encoder, version.query_prefix)
        for start in range(0, len(texts), CHUNK):
            chunk, times = texts[start:start + CHUNK], [time.monotonic()]
            vectors = encoder.encode(chunk)
            times.append(time.monotonic())
            answers = list(search(client, args.collection, vectors, args.top_k, encoder.encoder_id))
            times.append(time.monotonic())
            encoding, searching = encoding + times[1] - times[0], searching + times[2] - times[1]
            for text, hits in zip(chunk, answers):
                if args.output_format == "jsonl":
                    print(json.dumps({"text": text, "nearest": [hit._asdict() for hit in hits]}, ensure_ascii=False))
                else:
                    print("\n".join(hit.line(text) for hit in hits))
            progress.update(len(chunk))
    get_logger().info(f"{len(texts)} texts: encoding {encoding * 1e3:.1f} ms, Milvus {searching * 1e3:.1f} ms")


if __name__ == "__main__":
    run_script(main)
