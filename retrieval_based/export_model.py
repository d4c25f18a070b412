"""Export a sentence encoder as a static graph and an ONNX model, with all that a deployment needs beside it.

    python retrieval_based/export_model.py --params_path ./checkpoint/ --output_path ./output
    python retrieval_based/export_model.py --params_path ./all-MiniLM-L6-v2 --output_path ./output

Reads   params_path: made by retrieval_based/train.py (the name of a file in it, as older command lines have it, does as well), or
        a pretrained encoder as it is: a folder of Hugging Face or sentence-transformers (pooling, dense layer, length and so on
        as its modules.json says), or the name of a built-in model, such as rocketqa-zh-base-query-encoder.
Writes  output_path/: encoder.pdmodel (Paddle 3: .json), .pdiparams, encoder.onnx, tokenizer.json (where there is such a form),
        vocab.txt and the other tokenizer files, deploy.json (vector size, identity of the encoder, maximum length, input names).
        Inputs: input_ids, token_type_ids, int64 [batch, length]; ERNIE-M: input_ids only. Output: embedding, unit vectors
        float32 [batch, size].
Both forms are run and compared with the checkpoint before anything appears in output_path.
"""


from textcls.common.errors import UserError, run_script
from textcls.common.log import get_logger
from textcls.common.options import add_obsolete_options, add_pooling_option, make_parser
from textcls.common.outputs import check_output_folder
from textcls.export.deployment import save_deployment
from textcls.models.device import select_device
from textcls.models.sentence_checkpoints import load_sentence_encoder
from textcls.retrieval.encoder import encoder_folder


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--params_path", default="./checkpoint/", help="encoder: checkpoint or pretrained")
    add_pooling_option(parser)
    parser.add_argument("--output_path", default="./output", help="folder for the exported encoder")
    add_obsolete_options(parser, "--model_name_or_path")
    parser.add_argument("--output_emb_size", type=int, help="length of the vectors; None: that of the checkpoint")
    return parser.parse_args()


def main():
    args = parse_arguments()
    folder = encoder_folder(args.params_path)
    check_output_folder(args.output_path, "--output_path", {"the checkpoint": folder}, "deploy.json")
    select_device("cpu")  # tracing and comparing take seconds; the graph runs on any device
    checkpoint = load_sentence_encoder(folder, pooling=args.pooling)
    size = checkpoint.model.config.sentence_encoder["output_emb_size"]
    if args.output_emb_size not in (None, 0, size):  # 0: the default of old command lines, whatever the training had
        raise UserError(f"--output_emb_size {args.output_emb_size}: the encoder of {folder} was trained with {size}, expected "
                        "that, or a run without the option")
    save_deployment(checkpoint, args.output_path, "encoder", with_onnx=True)
    get_logger().info(f"Exported encoder saved in {args.output_path}, identity {checkpoint.encoder_id}")


if __name__ == "__main__":
    run_script(main)
