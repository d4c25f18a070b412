"""The models that PaddleNLP downloads by their names."""

import contextlib
import os
from collections.abc import Iterator

from textcls.common.errors import UserError

BUILT_IN_MODELS = (
    "ernie-3.0-xbase-zh", "ernie-3.0-base-zh", "ernie-3.0-medium-zh", "ernie-3.0-mini-zh", "ernie-3.0-micro-zh",
    "ernie-3.0-nano-zh", "ernie-3.0-tiny-base-v2-zh", "ernie-3.0-tiny-medium-v2-zh", "ernie-3.0-tiny-mini-v2-zh",
    "ernie-3.0-tiny-micro-v2-zh", "ernie-3.0-tiny-nano-v2-zh", "ernie-3.0-tiny-pico-v2-zh", "ernie-1.0-large-zh-cw",
    "ernie-2.0-base-en", "ernie-2.0-large-en", "ernie-m-base", "ernie-m-large",
)
RETRIEVAL_MODELS = ("rocketqa-zh-dureader-query-encoder", "rocketqa-zh-base-query-encoder", "rocketqa-zh-medium-query-encoder",
                    "rocketqa-zh-mini-query-encoder", "rocketqa-zh-micro-query-encoder", "rocketqa-zh-nano-query-encoder")


@contextlib.contextmanager
def explain_download(name: str) -> Iterator[None]:
    """Say what to do where a built-in model, or what is none, cannot be downloaded in the block. UserError."""
    known = f"one of {', '.join(BUILT_IN_MODELS)}, or a folder with config.json and vocab.txt"
    names = BUILT_IN_MODELS + RETRIEVAL_MODELS
    if name not in names and (os.sep in name or os.path.exists(name)):
        raise UserError(f"{name}: no such folder, expected {known}")
    try:
        yield
    except (OSError, RuntimeError) as error:  # what PaddleNLP's downloader raises
        if name not in names:
            raise UserError(f"{name}: neither a folder nor a model that could be downloaded, expected {known}") from None
        from paddlenlp.utils.env import MODEL_HOME

        raise UserError(
            f"{name}: its files could not be downloaded ({error})\nWithout a connection: on a machine that has one, run "
            f"the same command once and copy its folder {os.path.join(MODEL_HOME, name)} to the same place here, or pass "
            "a model folder (config.json, vocab.txt, model_state.pdparams) with --model_name_or_path, or --params_path of "
            "retrieval_based/.") from None
