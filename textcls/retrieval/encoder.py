"""Opens a sentence encoder, exported or a checkpoint, and turns texts into unit vectors. An exported one needs no Paddle.

    from textcls.retrieval.encoder import open_encoder
    encoder = open_encoder("export")
    vectors = encoder.encode(["头疼怎么办", "拔牙多少钱"])       # float32 [2, encoder.dimension]
"""

import logging
import os
from typing import Callable, NamedTuple

import numpy as np

from textcls.common.errors import UserError
from textcls.common.texts import check_texts
from textcls.runtime.exported import EMBEDDING, PROBES, read_export

CHUNK = 8192  # texts whose tokens are in memory at a time; batches by length are formed within a chunk
LEAST_COSINE = 0.98  # of the vectors of INT8 and fp32, on average
logger = logging.getLogger("predictor")


class TextEncoder(NamedTuple):
    """A sentence encoder as `open_encoder` returns it. Safe to call from several threads."""

    encoder_id: str  # of the training's result: 16 hexadecimal digits; vectors of different ones cannot be compared
    dimension: int  # length of a vector
    max_seq_length: int  # tokens, special tokens included
    # Both: list of str -> float32 [num_texts, dimension], of length 1. TypeError or ValueError as `check_texts`.
    encode: Callable  # encode(texts, progress=None); progress: of `progress_bar`, to advance by the texts done
    encode_batch: Callable  # all texts as one batch, in the calling thread: for callers with threads of their own


def open_encoder(path, device=None, quantize=False, batch_size=32, max_seq_length=None, num_threads=None, use_fp16=False,
                 device_id=0):
    """Open a sentence encoder.

    path: the folder of retrieval_based/export_model.py, or a checkpoint of retrieval_based/train.py. device: cpu, gpu, ...;
    None: for a checkpoint as of `select_device`, else the CPU. quantize: INT8 weights (of an exported one). batch_size: texts
    per batch at most. max_seq_length: tokens; None: as in training. num_threads: of an exported one on the CPU; None: one per
    usable core; a checkpoint goes by OMP_NUM_THREADS. use_fp16, device_id: of an exported one on a GPU. Returns a TextEncoder.
    Raises UserError.
    """
    path = encoder_folder(path)
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder, expected what train.py or export_model.py in retrieval_based/ wrote")
    if os.path.isfile(os.path.join(path, "deploy.json")):
        return _open_exported(path, device or "cpu", quantize, batch_size, max_seq_length, num_threads,
                              use_fp16, device_id)
    if quantize or use_fp16:
        raise UserError(f"--use_{'quantize' if quantize else 'fp16'}: {path} is a checkpoint, expected what "
                        "retrieval_based/export_model.py makes of it")
    return _open_checkpoint(path, device, batch_size, max_seq_length)


def encoder_folder(path):
    """The folder of an encoder, which older command lines name by a file in it, and by the model_best/ that it was in."""
    path = os.path.normpath(path)
    if path.endswith(".pdparams"):
        path = os.path.dirname(path) or "."
    is_old = os.path.basename(path) == "model_best" and not os.path.isdir(path)
    return os.path.dirname(path) or "." if is_old else path


def load_exported(export, device="cpu", quantize=False, batch_size=32, max_seq_length=None, num_threads=None, use_fp16=False,
                  device_id=0):
    """The OnnxModel of an Export of a sentence encoder; its INT8 form is compared with fp32. UserError."""
    from textcls.runtime.onnx_model import OnnxModel

    model = OnnxModel(export, device, use_fp16, device_id, num_threads, batch_size, max_seq_length, quantize)
    if quantize:
        def compare(session):
            exact, guessed = model.run_both(session, model.tokenize(PROBES))
            return {"cosine": f"{(exact * guessed).sum(axis=1).mean():.4f}"}

        model.use_int8("probes", compare, check_cosine)
    return model


def _open_exported(path, *options):
    export = read_export(path, output=EMBEDDING)
    model = load_exported(export, *options)
    return TextEncoder(export.encoder_id, export.output_size, model.max_seq_length,
                       in_chunks(lambda texts, progress: model.run(model.tokenize(texts), progress), export.output_size),
                       lambda texts: model.run_batch(model.tokenize(texts)))


def check_cosine(figures):
    """UserError where the vectors of INT8 are too far from those of fp32. figures: a dict of str."""
    cosine = float(figures["cosine"])
    logger.info(f"INT8 on {len(PROBES)} texts: mean cosine with fp32 {cosine:.4f}")
    if not cosine >= LEAST_COSINE:
        raise UserError(f"--use_quantize: the vectors of INT8 have a mean cosine of {cosine:.4f} with those of fp32, expected "
                        f"{LEAST_COSINE} or more")


def _open_checkpoint(path, device, batch_size, max_seq_length):
    from textcls.data.tokens import tokenize
    from textcls.models.checkpoints import load_sentence_encoder
    from textcls.models.device import select_device
    from textcls.models.inference import predict_logits

    select_device(device)
    checkpoint = load_sentence_encoder(path, max_seq_length)
    size = checkpoint.model.embedding_size

    def run(texts, batch_size, progress=None):
        tokens = tokenize(check_texts(texts), checkpoint.encode)
        return predict_logits(checkpoint, tokens, batch_size, progress)

    return TextEncoder(checkpoint.encoder_id, size, checkpoint.max_seq_length,
                       in_chunks(lambda texts, progress: run(texts, batch_size, progress), size),
                       lambda texts: run(texts, len(texts)))


def in_chunks(run, size):
    """encode of a TextEncoder. run: function of (texts, progress) that returns float32 [num_texts, size]."""
    def encode(texts, progress=None):
        texts = check_texts(texts)
        vectors = np.empty((len(texts), size), np.float32)
        for start in range(0, len(texts), CHUNK):
            chunk = slice(start, start + CHUNK)
            vectors[chunk] = run(texts[chunk], progress)
        return vectors

    return encode
