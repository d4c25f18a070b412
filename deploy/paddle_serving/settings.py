"""What service.py is given: config.yml and the model's folder, and whether this machine has what they ask for; else UserError."""

import os
from argparse import Namespace
from typing import Any

from textcls.common.digests import sha256
from textcls.common.errors import UserError
from textcls.data.files import read_json
from textcls.runtime.exported import Export, read_export

MARKER = "serving_server_conf.prototxt"  # in a folder that build_model.py made, and what Paddle Serving reads first
NAME = "seq_cls"  # of the service and of its only step
LOCAL = {"model_config": str, "device_type": int, "devices": str, "thread_num": int}
STEP = {"batch_size": int, "local_service_conf": LOCAL}
CONFIG = {"host": str, "rpc_port": int, "http_port": int, "worker_num": int, "op": {NAME: STEP}}  # all that config.yml has
MAY_BE_ZERO = ("device_type", "thread_num")


def read_config(args: Namespace) -> dict[str, Any]:
    """Read and check the file args.config; args.host, args.rpc_port and args.http_port take the place of its values.

    Returns it with the path of model_config absolute, thread_num filled in. UserError.
    """
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"{error}, expected an environment of its own (README.md, section 1)") from None
    try:
        with open(args.config, encoding="utf-8-sig") as file:
            config = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"{args.config}: cannot be read ({error.strerror}), expected the service's settings") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{args.config}: not YAML ({' '.join(str(error).split())}), expected the service's settings") from None
    for name in ("host", "rpc_port", "http_port"):
        if isinstance(config, dict) and getattr(args, name) is not None:
            config[name] = getattr(args, name)
    check_settings(config, CONFIG, args.config)
    if not config["host"]:
        raise UserError(f"{args.config}: host is empty, expected an address of this machine, or 0.0.0.0 for all")
    if config["rpc_port"] == config["http_port"]:
        raise UserError(f"{args.config}: rpc_port and http_port are both {config['rpc_port']}, expected two ports")
    local = config["op"][NAME]["local_service_conf"]
    local["model_config"] = os.path.join(os.path.dirname(os.path.abspath(args.config)), local["model_config"])
    local["thread_num"] = local["thread_num"] or len(os.sched_getaffinity(0))
    return config


def check_settings(settings: Any, expected: dict[str, Any], place: str) -> None:
    """Raise UserError where settings (as YAML has them) are not of the names and types that expected has."""
    if not isinstance(settings, dict):
        raise UserError(f"{place}: {settings!r}, expected {', '.join(expected)}")
    for name in settings:
        if name not in expected:
            raise UserError(f"{place}: {name} is unknown here, expected {', '.join(expected)}")
    for name, kind in expected.items():
        value = settings.get(name)
        if isinstance(kind, dict):
            check_settings(value, kind, f"{place}: {name}")
        elif type(value) is not kind:
            raise UserError(f"{place}: {name} is {value!r}, expected {'a text' if kind is str else 'a whole number'}")
        elif kind is int and value < 1 and not (value == 0 and name in MAY_BE_ZERO):
            raise UserError(f"{place}: {name} is {value}, expected {0 if name in MAY_BE_ZERO else 1} or more")


def read_model(folder: str) -> Export:
    """Read a folder that build_model.py wrote. UserError; Paddle ends with a segmentation fault on a damaged graph."""
    if not os.path.isfile(os.path.join(folder, MARKER)):
        raise UserError(f"{folder}: {MARKER} is missing, expected the folder (model_config) that "
                        "`python build_model.py --export_dir ../../export` makes")
    export = read_export(folder, with_onnx=False)
    hashes = read_json(os.path.join(folder, "deploy.json")).get("sha256")
    for path in (export.model_path, export.params_path):
        if not isinstance(hashes, dict) or hashes.get(os.path.basename(path)) != sha256(path):
            raise UserError(f"{path}: damaged or of another model, expected the file that build_model.py wrote")
    return export


def check_device(config: dict[str, Any]) -> None:
    """Raise UserError where the settings ask for a GPU that is not there."""
    local = config["op"][NAME]["local_service_conf"]
    if local["device_type"] == 0:
        if local["devices"]:
            raise UserError(f"devices is {local['devices']!r} with device_type 0, expected \"\", or device_type 1 for a GPU")
        return
    import paddle

    if not paddle.is_compiled_with_cuda():
        raise UserError(f"device_type is {local['device_type']}, and this Paddle is a CPU build, expected device_type 0, or "
                        "paddlepaddle-gpu in the place of paddlepaddle (README.md, section 6)")
    count = paddle.device.cuda.device_count()
    if not (local["devices"].isdecimal() and int(local["devices"]) < count):
        raise UserError(f"devices is {local['devices']!r}, and this machine has {count} GPUs, expected the number of one, from 0")
