"""The folder that build_model.py writes and service.py serves."""

import os

from utils import read_json
from textcls.errors import UserError
from textcls.exported import read_export, sha256

MARKER = "serving_server_conf.prototxt"  # in a folder that build_model.py made, and what Paddle Serving reads first


def read_model(folder):
    """The Export of a folder that build_model.py wrote. UserError; Paddle ends with a segmentation fault on a damaged graph."""
    if not os.path.isfile(os.path.join(folder, MARKER)):
        raise UserError(f"{folder}: {MARKER} is missing, expected the folder (model_config) that "
                        "`python build_model.py --export_dir ../../export` makes")
    export = read_export(folder, with_onnx=False)
    hashes = read_json(os.path.join(folder, "deploy.json")).get("sha256")
    for path in (export.model_path, export.params_path):
        if not isinstance(hashes, dict) or hashes.get(os.path.basename(path)) != sha256(path):
            raise UserError(f"{path}: damaged or of another model, expected the file that build_model.py wrote")
    return export
