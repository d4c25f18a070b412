"""Opens a sentence encoder, exported or a checkpoint, and turns texts into unit vectors. An exported one needs no Paddle.

    from textcls.retrieval.encoder import open_encoder
    encoder = open_encoder("export")
    vectors = encoder.encode(["头疼怎么办", "拔牙多少钱"])       # float32 [2, encoder.dimension]
"""

import functools
import logging
import os
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.common.log import Progress
from textcls.common.texts import check_texts
from textcls.runtime.exported import EMBEDDING, PROBES, Export, read_export
from textcls.runtime.quantize import SCHEMES

if TYPE_CHECKING:
    from textcls.runtime.converted import AnswerBoth
    from textcls.runtime.onnx_model import OnnxModel

CHUNK = 8192  # texts whose tokens are in memory at a time; batches by length are formed within a chunk
LEAST_COSINE = 0.98  # of the vectors of a compared scheme and fp32, on average
logger = logging.getLogger("predictor")


class TextEncoder(NamedTuple):
    """A sentence encoder as `open_encoder` returns it. Safe to call from several threads."""

    encoder_id: str  # of the training's result: 16 hexadecimal digits; vectors of different ones cannot be compared
    dimension: int  # length of a vector
    max_seq_length: int  # tokens, special tokens included
    # Both: list of str -> float32 [num_texts, dimension], of length 1. TypeError or ValueError as `check_texts`.
    encode: Callable[..., np.ndarray]  # encode(texts, progress=None); progress: of `progress_bar`, to advance by the texts done
    encode_batch: Callable[[list[str]], np.ndarray]  # as one batch, in the calling thread: for callers with threads of their own


def open_encoder(path: str, *, device: Optional[str] = None, device_id: int = 0, dtype: str = "fp32",
                 num_threads: Optional[int] = None, batch_size: int = 32, max_seq_length: Optional[int] = None,
                 pooling: Optional[str] = None) -> TextEncoder:
    """Open a sentence encoder.

    path: the folder of retrieval_based/export_model.py, or anything that `load_sentence_encoder` takes. device: cpu, gpu, ...;
    None: for a checkpoint as of `select_device`, else the CPU. device_id, dtype: of an exported one, as of the Predictor.
    num_threads: of an exported one on the CPU; None: one per usable core; a checkpoint goes by OMP_NUM_THREADS. batch_size: texts
    per batch at most. max_seq_length: tokens; None: as in training. pooling: as of `load_sentence_encoder`. Raises UserError.
    """
    path = encoder_folder(path)
    if os.path.isfile(os.path.join(path, "deploy.json")):
        export = read_export(path, output=EMBEDDING)
        if pooling is not None:
            raise UserError(f"--pooling {pooling}: the export in {path} has its own pooling, expected a run without it")
        model = load_exported(export, device=device or "cpu", device_id=device_id, dtype=dtype, num_threads=num_threads,
                              batch_size=batch_size, max_seq_length=max_seq_length)
        return TextEncoder(export.encoder_id, export.output_size, model.max_seq_length,
                           in_chunks(lambda texts, progress: model.run(model.tokenize(texts), progress), export.output_size),
                           lambda texts: model.run_batch(model.tokenize(texts)))
    if dtype != "fp32":
        raise UserError(f"{SCHEMES[dtype].option}: {path} is no export, expected what retrieval_based/export_model.py makes "
                        "of it")
    return _open_checkpoint(path, device, batch_size, max_seq_length, pooling)


def for_queries(encoder: TextEncoder, header: dict) -> TextEncoder:
    """The encoder of the texts that an index is asked about: with the prefix that it says. header: its index.json."""
    return prefixed(encoder, header["prefixes"]["query"])


def for_rows(encoder: TextEncoder, header: dict) -> TextEncoder:
    """The encoder of the rows of an index, texts and names of labels: with the prefix that it says. header: its index.json."""
    return prefixed(encoder, header["prefixes"]["text"])


def prefixed(encoder: TextEncoder, prefix: str) -> TextEncoder:
    """The same encoder, which puts a prefix before each text, as some are trained to have it ("query: ")."""
    if not prefix:
        return encoder

    def add(texts: list[str]) -> list[str]:
        return [prefix + text for text in check_texts(texts)]

    return encoder._replace(encode=lambda texts, progress=None: encoder.encode(add(texts), progress),
                            encode_batch=lambda texts: encoder.encode_batch(add(texts)))


def encoder_folder(path: str) -> str:
    """The folder of an encoder, which older command lines name by a file in it, and by the model_best/ that it was in."""
    path = os.path.normpath(path)
    if path.endswith(".pdparams"):
        path = os.path.dirname(path) or "."
    is_old = os.path.basename(path) == "model_best" and not os.path.isdir(path)
    return os.path.dirname(path) or "." if is_old else path


def load_exported(export: Export, *, device: str = "cpu", device_id: int = 0, dtype: str = "fp32",
                  num_threads: Optional[int] = None, batch_size: int = 32, max_seq_length: Optional[int] = None) -> "OnnxModel":
    """Load an exported sentence encoder; where dtype is compared with fp32, by its vectors. Options: of OnnxModel. UserError."""
    from textcls.runtime.converted import Comparison
    from textcls.runtime.onnx_model import OnnxModel

    comparison = Comparison("probes", compare_vectors, functools.partial(check_cosine, dtype))
    return OnnxModel(export, comparison, device=device, device_id=device_id, dtype=dtype, num_threads=num_threads,
                     batch_size=batch_size, max_seq_length=max_seq_length)


def compare_vectors(answer_both: "AnswerBoth") -> dict[str, str]:
    """Compare the vectors of a converted encoder with those of fp32."""
    exact, converted = answer_both(PROBES)
    return {"cosine": f"{(exact * converted).sum(axis=1).mean():.4f}"}


def check_cosine(dtype: str, figures: dict[str, str]) -> None:
    """Log what `compare_vectors` found. UserError where the vectors of dtype are too far from those of fp32."""
    cosine = float(figures["cosine"])
    logger.info(f"{dtype.upper()} on {len(PROBES)} texts: mean cosine with fp32 {cosine:.4f}")
    if not cosine >= LEAST_COSINE:
        raise UserError(f"{SCHEMES[dtype].option}: the vectors of {dtype.upper()} have a mean cosine of {cosine:.4f} with those "
                        f"of fp32, expected {LEAST_COSINE} or more")


def _open_checkpoint(path: str, device: Optional[str], batch_size: int, max_seq_length: Optional[int],
                     pooling: Optional[str]) -> TextEncoder:
    from textcls.data.tokens import tokenize
    from textcls.models.device import select_device
    from textcls.models.inference import predict_logits
    from textcls.models.sentence_checkpoints import load_sentence_encoder

    select_device(device)
    checkpoint = load_sentence_encoder(path, max_seq_length, pooling)
    size = checkpoint.model.embedding_size

    def run(texts: list[str], batch_size: int, progress: Optional[Progress] = None) -> np.ndarray:
        tokens = tokenize(check_texts(texts), checkpoint.encode)
        return predict_logits(checkpoint, tokens, batch_size, progress)

    return TextEncoder(checkpoint.encoder_id or "", size, checkpoint.max_seq_length,
                       in_chunks(lambda texts, progress: run(texts, batch_size, progress), size),
                       lambda texts: run(texts, len(texts)))


def in_chunks(run: Callable[[list[str], Optional[Progress]], np.ndarray], size: int) -> Callable[..., np.ndarray]:
    """encode of a TextEncoder. run: function of (texts, progress) that returns float32 [num_texts, size]."""
    def encode(texts: list[str], progress: Optional[Progress] = None) -> np.ndarray:
        texts = check_texts(texts)
        vectors = np.empty((len(texts), size), np.float32)
        for start in range(0, len(texts), CHUNK):
            chunk = slice(start, start + CHUNK)
            vectors[chunk] = run(texts[chunk], progress)
        return vectors

    return encode
