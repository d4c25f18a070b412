"""Label the texts of data_dir/data.txt with an exported prompt model, by ONNX Runtime. Needs no Paddle.

    python few-shot/infer.py --model_path_prefix ./checkpoints/export/model --data_dir ./data/ --batch_size 32 --device cpu
    python few-shot/infer.py --model_path_prefix ./checkpoints/export/model --data_dir ./data/ --device gpu --use_fp16

Reads   the folder that few-shot/train.py --do_export wrote, and data_dir/data.txt (one text per line).
Prints  for each text `input data: <text>`, `labels: <label>` and a line of dashes. For probabilities, other formats and files:
        deploy/predictor/infer.py and predict.py, which take the same model.
"""

import os

from textcls.common.errors import Problems, run_script
from textcls.common.options import add_obsolete_options, make_parser, positive_int, probability_or_auto, thread_count
from textcls.common.probabilities import UNDECIDED, is_decided
from textcls.data.files import read_texts
from textcls.runtime.exported import read_export, saved_threshold
from textcls.runtime.predictions import check_threshold
from textcls.runtime.predictor import Predictor
from textcls.runtime.quantize import add_device_options, check_calibration


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--model_path_prefix", required=True, help="exported model, such as checkpoints/export/model")
    add_obsolete_options(parser, "--model_name")
    parser.add_argument("--data_dir", default="./data/", help="folder with data.txt")
    parser.add_argument("--max_length", type=int, help="longest text with its prompt, in tokens; None: as in training")
    parser.add_argument("--batch_size", type=positive_int, default=200, help="texts per batch")
    parser.add_argument("--num_threads", type=thread_count, help="threads on a CPU; None: one per usable core")
    parser.add_argument("--threshold", type=probability_or_auto, default=0.0,
                        help=f"answers with a lower probability are `{UNDECIDED}`; auto: the one that the export holds")
    add_device_options(parser)
    args = parser.parse_args()
    check_calibration(parser, args)
    return args


def main():
    args = parse_arguments()
    if args.threshold == "auto":
        args.threshold = saved_threshold(read_export(args.model_path_prefix), args.max_length)
    problems = Problems()
    texts = list(read_texts(os.path.join(args.data_dir, "data.txt"), problems))
    problems.report()
    predictor = Predictor(args.model_path_prefix, device=args.device, device_id=args.device_id,
                          dtype=args.dtype, num_threads=args.num_threads, batch_size=args.batch_size,
                          max_seq_length=args.max_length, calibration_file=args.calibration_file,
                          allow_accuracy_drop=args.allow_accuracy_drop)
    check_threshold(args.threshold, predictor.labels)
    for text, (label,), (probability,) in zip(texts, *predictor(texts)):
        print(f"input data: {text}\nlabels: {label if is_decided(probability, args.threshold) else UNDECIDED}\n{'-' * 29}")


if __name__ == "__main__":
    run_script(main)
