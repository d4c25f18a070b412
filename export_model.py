"""Export a trained classifier as a static graph, with all that a deployment needs beside it.

    python export_model.py --params_path ./checkpoint/ --output_path ./export
    python export_model.py --params_path ./checkpoint/ --output_path ./export --multilingual    # ERNIE-M
    python export_model.py --params_path ./checkpoint/ --output_path ./export --onnx            # for deploy/predictor

Reads   params_path (made by train.py).
Writes  output_path/: float32.pdmodel (Paddle 3: .json), float32.pdiparams, tokenizer.json (where the tokenizer has
        that form), vocab.txt and the other tokenizer files, label.txt, deploy.json (maximum length, input names, model
        type). Inputs of the graph: input_ids, token_type_ids, int64 [batch, length]; ERNIE-M: input_ids only.
        Output: logits float32 [batch, num_classes]. With --onnx also float32.onnx, with the same inputs.
        MODEL_CARD.md and MODEL_CARD_en.md: those of params_path, with a section on the export.
Whatever is exported is run and compared with the checkpoint before anything appears in output_path.
"""

import os

from textcls.common.errors import UserError, run_script
from textcls.common.log import get_logger, say_next
from textcls.common.options import make_parser
from textcls.common.outputs import check_output_folder
from textcls.export.deployment import save_deployment
from textcls.models.checkpoints import load_checkpoint
from textcls.models.device import select_device
from textcls.models.families import family_of


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--params_path", default="./checkpoint/", help="checkpoint made by train.py")
    parser.add_argument("--output_path", default="./export", help="folder for the exported model")
    parser.add_argument("--multilingual", action="store_true", help="the model is ERNIE-M (recognised without it, too)")
    parser.add_argument("--onnx", action="store_true", help="also write float32.onnx for ONNX Runtime")
    return parser.parse_args()


def main():
    args = parse_arguments()
    check_output_folder(args.output_path, "--output_path", {"the checkpoint": args.params_path}, "deploy.json")
    select_device("cpu")  # tracing and comparing take seconds; the graph runs on any device
    checkpoint = load_checkpoint(args.params_path)
    if args.multilingual and not family_of(checkpoint.model).is_multilingual:
        raise UserError(f"--multilingual: the model type of {args.params_path} is {checkpoint.model.config.model_type}, expected "
                        "an ERNIE-M model, or no --multilingual")
    save_deployment(checkpoint, args.output_path, "float32", with_onnx=args.onnx, card_folder=args.params_path)
    get_logger().info(f"Exported model saved in {args.output_path}")
    if args.onnx:
        say_next("deploy/predictor/infer.py", "--model_path_prefix", os.path.join(args.output_path, "float32"))


if __name__ == "__main__":
    run_script(main)
