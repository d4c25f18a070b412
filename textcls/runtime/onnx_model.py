"""An exported model run by ONNX Runtime: texts in, logits or vectors out. Needs no Paddle."""

import functools
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.common.known import Centres, add_nearness
from textcls.common.log import Progress
from textcls.common.texts import check_texts
from textcls.data.tokens import MapBatches, TokenizedTexts, model_inputs, run_by_length
from textcls.runtime.converted import Comparison, open_model
from textcls.runtime.exported import FEATURES, LOGITS, Export, check_length, read_encoder
from textcls.runtime.onnx_session import open_session
from textcls.runtime.quantize import check_device

if TYPE_CHECKING:
    import onnxruntime

logger = logging.getLogger("predictor")


def count_threads(device: str, num_threads: Optional[int] = None) -> int:
    """Count the threads that run batches. num_threads: as many on a CPU; None: one per usable core."""
    if device == "gpu":
        return 1  # batches queue up on the GPU
    return num_threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class OnnxModel:
    """A model with its tokenizer. Safe to call from several threads, which share its num_threads threads.

    comparison: of a scheme that is compared with fp32. device: "cpu" or "gpu", the one numbered device_id. dtype: a
    scheme of textcls/runtime/quantize.py. num_threads: threads that run batches on a CPU; None: one per usable core. batch_size:
    texts per batch at most. max_seq_length: tokens; None: as in training. onnx_model: the model that runs, a path, or bytes where
    its converted form could not be kept. Raises UserError.
    """

    def __init__(self, export: Export, comparison: Comparison, *, device: str = "cpu", device_id: int = 0, dtype: str = "fp32",
                 num_threads: Optional[int] = None, batch_size: int = 32, max_seq_length: Optional[int] = None):
        check_device(device, dtype)
        self.export, self.batch_size, self.num_threads = export, batch_size, count_threads(device, num_threads)
        self.max_seq_length = export.max_seq_length if max_seq_length is None else max_seq_length
        check_length(self.max_seq_length, export)
        if self.max_seq_length > export.max_seq_length:
            logger.warning(f"--max_seq_length {self.max_seq_length} is more than the {export.max_seq_length} of training.")
        self._encode = read_encoder(export, self.max_seq_length)
        self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="predictor")
        self._session, self.onnx_model = open_model(export.onnx_path, dtype, device, device_id, comparison, self._answer_both)
        self._check_session()

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Return the token ids that the model reads of texts, special tokens included.

        TypeError where texts are not str, ValueError where one is no text (blank, with NUL, with half a surrogate pair).
        """
        return TokenizedTexts.from_windows(self._encode(check_texts(texts)), self.export.long_text.window_vote)

    def run(self, tokens: TokenizedTexts, progress: Optional[Progress] = None) -> np.ndarray:
        """Run tokenized texts; returns float32 [num_texts, output_size] in their order, where the export has Centres with the
        nearness as one more column (`add_nearness`). progress: a bar to advance, or None."""
        return self._run(self._session, tokens, progress)

    def run_batch(self, tokens: TokenizedTexts) -> np.ndarray:
        """Run tokenized texts in the calling thread, as one batch unless some of them have several windows; returns the same."""
        batch_size = len(tokens) if tokens.owners is None else self.batch_size
        return self._run(self._session, tokens, batch_size=batch_size, map_batches=map)

    def _answer_both(self, session: "onnxruntime.InferenceSession", texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens, exact = self.tokenize(texts), open_session(self.export.onnx_path, self.export.onnx_path, "cpu")
        return self._run(exact, tokens), self._run(session, tokens)

    def _run(self, session: "onnxruntime.InferenceSession", tokens: TokenizedTexts, progress: Optional[Progress] = None,
             batch_size: Optional[int] = None, map_batches: Optional[MapBatches] = None) -> np.ndarray:
        # a few texts are shared out between the threads, too
        batch_size = batch_size or max(1, min(self.batch_size, -(-len(tokens) // self.num_threads)))
        centres = self.export.centres
        size = self.export.output_size + (centres is not None)
        return run_by_length(functools.partial(_run_batch, session, centres), tokens, batch_size, self.export.pad_id, size,
                             map_batches=map_batches or self._pool.map, progress=progress)

    def _check_session(self) -> None:
        """Raise UserError where the model does not belong to the folder's other files."""
        path, outputs = self.export.onnx_path, self._session.get_outputs()
        inputs = {item.name for item in self._session.get_inputs()}
        wanted = [outputs[0].name] if self.export.centres is None else [LOGITS, FEATURES]
        if "input_ids" not in inputs or not inputs <= {"input_ids", "token_type_ids"} or [one.name for one in outputs] != wanted:
            raise UserError(f"{path}: its inputs are {sorted(inputs)}, its outputs {[one.name for one in outputs]}, expected "
                            f"input_ids and token_type_ids, and {' and '.join(wanted)}")
        size, what = outputs[0].shape[-1], "classes" if self.export.labels else "numbers in a vector"
        if size != self.export.output_size:
            where = "label.txt" if self.export.labels else "deploy.json"
            raise UserError(f"{path}: it has {size} {what}, expected the {self.export.output_size} of {where}")


def _run_batch(session: "onnxruntime.InferenceSession", centres: Optional[Centres], batch: np.ndarray) -> np.ndarray:
    answers = session.run(None, model_inputs(batch, [item.name for item in session.get_inputs()]))
    return answers[0] if centres is None else add_nearness(answers[0], answers[1], centres)
