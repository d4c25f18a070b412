"""Make the folder that service.py serves from an exported model; needs no Paddle.

    python build_model.py --export_dir ../../export
    python build_model.py --export_dir ../../prune/width_mult_0.5 --output_dir serving_server

Reads   export_dir: a folder that export_model.py or prune.py wrote.
Writes  output_dir, complete or not at all: model.pdmodel and model.pdiparams, serving_server_conf.prototxt (the inputs and the
        outputs as Paddle Serving wants to know them), tokenizer.json, label.txt, deploy.json, and known.npz where the model
        tells unknown texts.
"""

import json
import os
import shutil
from argparse import Namespace

from settings import MARKER

from textcls.common.digests import sha256
from textcls.common.errors import UserError, run_script
from textcls.common.known import KNOWN_FILE
from textcls.common.options import make_parser
from textcls.common.outputs import check_output_folder, complete_folder
from textcls.data.files import read_json
from textcls.runtime.exported import FEATURES, LOGITS, Export, read_export

INT64, FLOAT32 = 0, 1  # Paddle Serving's numbers of these types


def parse_arguments() -> Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--export_dir", default="../../export", help="exported folder")
    parser.add_argument("--output_dir", default="serving_server", help="folder to write; config.yml names it as model_config")
    return parser.parse_args()


def variable(kind: str, name: str, type_number: int, shape: list[int]) -> str:
    """Describe an input (kind feed) or output (kind fetch) in the text form of Paddle Serving's GeneralModelConfig."""
    lines = [f'  name: "{name}"', f'  alias_name: "{name}"', "  is_lod_tensor: false", f"  {kind}_type: {type_number}"]
    return "\n".join([f"{kind}_var {{", *lines, *(f"  shape: {size}" for size in shape), "}\n"])


def write_model(export: Export, folder: str) -> None:
    """Write the files of an Export into a folder.

    The graph always gets the same name: Paddle Serving takes any .pdmodel that it finds, even one of an earlier run.
    """
    shutil.copyfile(export.model_path, os.path.join(folder, "model.pdmodel"))
    shutil.copyfile(export.params_path, os.path.join(folder, "model.pdiparams"))
    source = os.path.dirname(export.tokenizer_path)
    outputs = {LOGITS: len(export.labels)}
    if export.centres is not None:
        outputs[FEATURES] = len(export.centres.mean)
    for name in ("tokenizer.json", "label.txt", *([] if export.centres is None else [KNOWN_FILE])):
        shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
    deploy = {**read_json(os.path.join(source, "deploy.json")), "model_file": "model.pdmodel", "params_file": "model.pdiparams"}
    for name in ("onnx_file", *(["known"] if export.centres is None else [])):
        deploy.pop(name, None)
    deploy["sha256"] = {name: sha256(os.path.join(folder, name)) for name in ("model.pdmodel", "model.pdiparams")}
    with open(os.path.join(folder, "deploy.json"), "w", encoding="utf-8") as file:
        json.dump(deploy, file, ensure_ascii=False, indent=2)
    with open(os.path.join(folder, MARKER), "w", encoding="utf-8") as file:
        file.writelines(variable("feed", name, INT64, [-1, -1]) for name in export.input_names)  # texts, length
        file.writelines(variable("fetch", name, FLOAT32, [-1, size]) for name, size in outputs.items())


def main():
    args = parse_arguments()
    export = read_export(args.export_dir, with_onnx=False)
    if export.model_path.endswith(".json"):
        raise UserError(f"{export.model_path}: a graph of Paddle 3, which Paddle Serving cannot read, expected one that Paddle "
                        "2.6 exported; it reads the checkpoints of Paddle 3")
    check_output_folder(args.output_dir, "--output_dir", {"the exported folder": os.path.dirname(export.model_path)})
    is_ours = os.path.isfile(os.path.join(args.output_dir, MARKER))
    if os.path.isdir(args.output_dir) and os.listdir(args.output_dir) and not is_ours:
        raise UserError(f"--output_dir {args.output_dir}: holds files and no {MARKER}, expected a new folder, or one that this "
                        "script made")
    with complete_folder(args.output_dir, marker="deploy.json") as staging:
        write_model(export, staging)
    print(f"{args.output_dir}: {len(export.labels)} labels, at most {export.max_seq_length} tokens per text.")


if __name__ == "__main__":
    run_script(main)
