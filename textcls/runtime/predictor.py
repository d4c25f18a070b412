"""Text classification by ONNX Runtime: a Python API that needs no Paddle.

    from textcls.runtime.predictor import Predictor
    predictor = Predictor("export")
    labels, probabilities = predictor(["头疼怎么办", "拔牙多少钱"], top_k=2)

It reads a folder that `export_model.py --onnx` or prune.py wrote, and nothing else.
"""

import functools
import logging
import os
from collections.abc import Sequence
from typing import Optional, Union

import numpy as np

from textcls.common.errors import Problems, UserError
from textcls.common.known import split_known
from textcls.common.log import Progress
from textcls.common.probabilities import softmax, top_classes
from textcls.data.files import read_labelled
from textcls.data.tokens import TokenizedTexts
from textcls.runtime.converted import AnswerBoth, Comparison, short_hash
from textcls.runtime.exported import read_export
from textcls.runtime.onnx_model import OnnxModel
from textcls.runtime.quantize import SCHEMES

CALIBRATION_TEXTS = 2000  # of a calibration file at most, evenly spaced
LARGEST_DROP = 0.5  # points of accuracy that a scheme may cost
logger = logging.getLogger("predictor")


class Predictor:
    """A classifier. Safe to call from several threads, which share its num_threads threads.

    path: exported folder, or prefix of the model in it. device: "cpu" or "gpu", the one numbered device_id. dtype: "fp32", "int8"
    (CPU only) or "fp16" (GPU only), a name in SCHEMES of textcls/runtime/quantize.py. num_threads: threads that run batches on a
    CPU; None: one per usable core. batch_size: texts per batch at most. max_seq_length: tokens; None: as in training.
    calibration_file: labelled texts, on which a new INT8 model is compared with fp32; it is refused where it loses more than 0.5
    points of accuracy, unless allow_accuracy_drop. labels: list of str, position = class id. temperature: what logits are divided
    by. tells_unknown: whether `answer` says how known texts are. onnx_model: the model that runs, a path, or bytes where its
    converted form could not be kept. Raises UserError.
    """

    def __init__(self, path: Union[str, "os.PathLike[str]"], *, device: str = "cpu", device_id: int = 0, dtype: str = "fp32",
                 num_threads: Optional[int] = None, batch_size: int = 32, max_seq_length: Optional[int] = None,
                 calibration_file: Optional[str] = None, allow_accuracy_drop: bool = False):
        export = read_export(path)
        self.labels, self.temperature, self.tells_unknown = export.labels, export.temperature, export.centres is not None
        comparison = Comparison(short_hash(calibration_file) if calibration_file else None,
                                functools.partial(compare_accuracy, dtype, calibration_file or "", self.labels),
                                functools.partial(check_accuracy, dtype, allow_accuracy_drop))
        self._model = OnnxModel(export, comparison, device=device, device_id=device_id, dtype=dtype, num_threads=num_threads,
                                batch_size=batch_size, max_seq_length=max_seq_length)
        self.onnx_model, self.max_seq_length = self._model.onnx_model, self._model.max_seq_length
        self.batch_size, self.num_threads = self._model.batch_size, self._model.num_threads

    def __call__(self, texts: Sequence[str], top_k: int = 1) -> tuple[list[list[str]], np.ndarray]:
        """Label texts. Returns (labels, probabilities), best first and in the order of the texts:

        lists of top_k labels, float32 [num_texts, top_k]. TypeError or ValueError as `tokenize`.
        """
        if not 1 <= top_k <= len(self.labels):
            raise ValueError(f"top_k is {top_k}, expected 1 to {len(self.labels)}")
        probs = self.probabilities(texts)
        top = top_classes(probs, top_k)
        return [[self.labels[index] for index in row] for row in top], np.take_along_axis(probs, top, axis=1)

    def probabilities(self, texts: Sequence[str], progress: Optional[Progress] = None) -> np.ndarray:
        """Return the probabilities of all classes: float32 [num_texts, num_classes] in the order of the texts.

        progress: a progress bar to advance by the texts done, or None. TypeError or ValueError as `tokenize`.
        """
        return self.answer(texts, progress)[0]

    def answer(self, texts: Sequence[str], progress: Optional[Progress] = None) -> tuple[np.ndarray, Optional[np.ndarray]]:
        """Return what `probabilities` does, and the probability that each text is of one of the labels at all: float64
        [num_texts], None where the export holds nothing to tell that by (train.py --known centres)."""
        return self._finish(self._model.run(self.tokenize(texts), progress))

    def _finish(self, answers: np.ndarray) -> tuple[np.ndarray, Optional[np.ndarray]]:
        logits, known = split_known(answers, self._model.export.centres)
        return softmax(logits, self.temperature), known

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Return the token ids that the model reads of texts, special tokens included.

        TypeError where texts are not str, ValueError where one is no text (blank, with NUL, with half a surrogate pair).
        """
        return self._model.tokenize(texts)

    def batch_answer(self, texts: Sequence[str]) -> tuple[np.ndarray, Optional[np.ndarray]]:
        """Return what `answer` does, run as one batch in the calling thread: for callers with threads of their own."""
        return self._finish(self._model.run_batch(self.tokenize(texts)))


def compare_accuracy(dtype: str, path: str, labels: Sequence[str], answer_both: AnswerBoth) -> dict[str, str]:
    """Compare the labels and the accuracy of a model in dtype with those of fp32 on the labelled texts of a file. UserError."""
    problems = Problems()
    texts, label_ids = read_labelled(path, labels, problems, "the model's label.txt")
    problems.report()
    step = -(-len(texts) // CALIBRATION_TEXTS)
    texts, label_ids = texts[::step], label_ids[::step]
    logger.info(f"Comparing {dtype.upper()} with fp32 on {len(texts)} texts of {path} ...")
    exact, guessed = (answers[:, :len(labels)].argmax(axis=1) for answers in answer_both(texts))
    shares = {"agreement": exact == guessed, "fp32_accuracy": exact == label_ids, f"{dtype}_accuracy": guessed == label_ids}
    return {"size": str(len(texts)), **{name: f"{share.mean() * 100:.4f}" for name, share in shares.items()}}


def check_accuracy(dtype: str, allow_accuracy_drop: bool, figures: dict[str, str]) -> None:
    """Log what `compare_accuracy` found. UserError where dtype costs too much accuracy and not allow_accuracy_drop."""
    if "agreement" not in figures:
        logger.warning(f"{dtype.upper()} was not compared with fp32: there is no calibration file.")
        return
    before, after = float(figures["fp32_accuracy"]), float(figures[f"{dtype}_accuracy"])
    logger.info(f"{dtype.upper()} on {figures['size']} texts of a calibration file: {float(figures['agreement']):.2f}% of the "
                f"labels as with fp32, accuracy {before:.2f}% -> {after:.2f}%")
    if before - after > LARGEST_DROP:
        message = (f"{SCHEMES[dtype].option}: {dtype.upper()} costs {before - after:.2f} points of accuracy, expected at most "
                   f"{LARGEST_DROP}")
        if not allow_accuracy_drop:
            raise UserError(message + "; --allow_accuracy_drop takes it all the same")
        logger.warning(message)
