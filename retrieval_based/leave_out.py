"""Train an encoder several times without a part of the labels, so that build_index.py knows how texts of no label look to it.

    python retrieval_based/leave_out.py --model_name_or_path ernie-3.0-medium-zh --data_dir ./data --output_dir ./left_out \\
        --parts 3 --train_options --num_train_epochs 3 --learning_rate 5e-5
    python retrieval_based/build_index.py --params_path ./checkpoint --data_dir ./data --left_out_dir ./left_out --precision 0.95

An encoder puts texts of labels that it was trained on farther from others than texts that it knows nothing of. Labels that are
left out of the index alone therefore look more unknown than real unknown texts do, and a threshold by them promises too much.
The model and the options are to be those by which the encoder of the index was trained.

Reads   data_dir/: train.txt, dev.txt, label.txt.
Writes  output_dir/part-N/: the encoder of each part; options.json; left_out.json, when all are there. A part that is there is not
        trained again; a folder of other data or options is refused.
"""

import argparse
import os
import shutil
from pathlib import Path

from textcls.analysis.experiments import check_options, model_files
from textcls.common.errors import run_script
from textcls.common.log import get_logger, say_next
from textcls.common.options import make_parser, positive_int
from textcls.common.outputs import check_output_folder, locked_folder
from textcls.retrieval.left_out import MARKER, drop_labels, part_folder, split_labels, write_left_out
from textcls.retrieval.pending import DataFiles, no_changes, write_data_files
from textcls.retrieval.retraining import NAMES, check_train_options, read_data_files, run_retrieval_script

TRAINED = "trainer_state.json"  # the last file of a training
MOST_SHOWN = 5  # labels in a message


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="the model that the encoder of the index was trained from")
    parser.add_argument("--data_dir", default="./data", help="folder with train.txt, dev.txt, label.txt")
    parser.add_argument("--output_dir", default="./left_out", help="folder of the encoders")
    parser.add_argument("--parts", type=positive_int, default=3, help="of the labels; each is left out of one training")
    parser.add_argument("--train_options", nargs=argparse.REMAINDER, default=[],
                        help="last of all: the options of train.py by which the encoder of the index was trained")
    args = parser.parse_args()
    check_train_options(args.train_options, "leave_out.py")
    return args


def train_part(args, data, folder):
    """Train an encoder on data files, unless it is there. folder: where it goes."""
    part_data = f"{folder}-data"
    if os.path.isfile(os.path.join(folder, TRAINED)):
        get_logger().info(f"{folder} is finished.")
    else:
        os.makedirs(part_data, exist_ok=True)
        write_data_files(part_data, data, DataFiles({}, [], []))
        run_retrieval_script("train.py", "--model_name_or_path", args.model_name_or_path, "--data_dir", part_data,
                             "--output_dir", folder, "--overwrite_output_dir", *args.train_options)
    for checkpoint in Path(folder).glob("checkpoint-*"):  # nothing goes on from it
        shutil.rmtree(checkpoint)
    shutil.rmtree(part_data, ignore_errors=True)


def main():
    args = parse_arguments()
    check_output_folder(args.output_dir, "--output_dir", {"the data folder": args.data_dir}, MARKER)
    data = read_data_files(args.data_dir, no_changes())
    parts = split_labels(list(data.words), args.parts)
    with locked_folder(args.output_dir):
        if not any(Path(args.output_dir).glob(f"part-*/{TRAINED}")):  # a first run that failed says nothing of this one
            Path(args.output_dir, "options.json").unlink(missing_ok=True)
        files = [*model_files(args.model_name_or_path), *(os.path.join(args.data_dir, name) for name in NAMES)]
        check_options(args.output_dir, {name: getattr(args, name) for name in ("model_name_or_path", "parts", "train_options")},
                      files)
        for number, left in enumerate(parts, 1):
            folder = part_folder(args.output_dir, number)
            shown = ", ".join(left[:MOST_SHOWN]) + (", ..." if len(left) > MOST_SHOWN else "")
            get_logger().info(f"Part {number} of {len(parts)}: an encoder that knows nothing of {len(left)} labels ({shown})")
            train_part(args, drop_labels(data, left), folder)
        write_left_out(args.output_dir, parts)
    say_next("retrieval_based/build_index.py", "--params_path", "ENCODER", "--data_dir", args.data_dir, "--left_out_dir",
             args.output_dir, "--precision", "0.95")


if __name__ == "__main__":
    run_script(main)
