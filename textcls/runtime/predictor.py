"""Text classification by ONNX Runtime: a Python API that needs no Paddle.

    from textcls.runtime.predictor import Predictor
    predictor = Predictor("export")
    labels, probabilities = predictor(["头疼怎么办", "拔牙多少钱"], top_k=2)

It reads a folder that `export_model.py --onnx` or prune.py wrote, and nothing else.
"""

import logging

import numpy as np

from textcls.common.errors import Problems, UserError
from textcls.common.probabilities import softmax, top_classes
from textcls.data.files import read_labelled
from textcls.runtime.converted import short_hash
from textcls.runtime.exported import read_export
from textcls.runtime.onnx_model import OnnxModel

CALIBRATION_TEXTS = 2000  # of a calibration file at most, evenly spaced
LARGEST_DROP = 0.5  # points of accuracy that INT8 may cost
logger = logging.getLogger("predictor")


class Predictor:
    """A classifier. Safe to call from several threads, which share its num_threads threads.

    path: exported folder, or prefix of the model in it. device: "cpu" or "gpu". quantize: INT8 weights (CPU only);
    use_fp16: 16-bit floats (GPU only). num_threads: threads that run batches on a CPU; None: one per usable core.
    batch_size: texts per batch at most. max_seq_length: tokens; None: as in training. calibration_file: labelled texts, on
    which a new INT8 model is compared with fp32; it is refused where it loses more than 0.5 points of accuracy, unless
    allow_accuracy_drop. labels: list of str, position = class id. onnx_model: the model that runs, a path, or bytes
    where its INT8 form could not be kept. Raises UserError.
    """

    def __init__(self, path, device="cpu", quantize=False, use_fp16=False, device_id=0, num_threads=None, batch_size=32,
                 max_seq_length=None, calibration_file=None, allow_accuracy_drop=False):
        export = read_export(path)
        self.labels = export.labels
        self._model = OnnxModel(export, device, use_fp16, device_id, num_threads, batch_size, max_seq_length, quantize)
        if quantize:
            self._model.use_int8(short_hash(calibration_file) if calibration_file else None,
                                 lambda session: self._compare(session, calibration_file),
                                 lambda figures: check_figures(figures, allow_accuracy_drop))
        self.onnx_model, self.max_seq_length = self._model.onnx_model, self._model.max_seq_length
        self.batch_size, self.num_threads = self._model.batch_size, self._model.num_threads

    def __call__(self, texts, top_k=1):
        """Label texts. texts: list of str. Returns (labels, probabilities), best first and in the order of the texts:

        list of lists of top_k str, float32 [num_texts, top_k]. TypeError or ValueError as `tokenize`.
        """
        if not 1 <= top_k <= len(self.labels):
            raise ValueError(f"top_k is {top_k}, expected 1 to {len(self.labels)}")
        probs = self.probabilities(texts)
        top = top_classes(probs, top_k)
        return [[self.labels[index] for index in row] for row in top], np.take_along_axis(probs, top, axis=1)

    def probabilities(self, texts, progress=None):
        """Probabilities of all classes: float32 [num_texts, num_classes] in the order of texts (list of str).

        progress: a progress bar to advance by the texts done, or None. TypeError or ValueError as `tokenize`.
        """
        return softmax(self._model.run(self.tokenize(texts), progress))

    def tokenize(self, texts):
        """Token ids of texts (list of str): list of lists of int, special tokens included, cut to max_seq_length.

        TypeError where texts are not str, ValueError where one is no text (blank, with NUL, with half a surrogate pair).
        """
        return self._model.tokenize(texts)

    def batch_probabilities(self, texts):
        """As `probabilities`, but all texts as one batch, in the calling thread: for callers with threads of their own."""
        return softmax(self._model.run_batch(self.tokenize(texts)))

    def _compare(self, session, calibration_file):
        """Labels and accuracy of an INT8 session beside those of fp32 on labelled texts: a dict of str."""
        problems = Problems()
        texts, label_ids = read_labelled(calibration_file, self.labels, problems, "the model's label.txt")
        problems.report()
        step = -(-len(texts) // CALIBRATION_TEXTS)
        rows, label_ids = self.tokenize(texts[::step]), label_ids[::step]
        logger.info(f"Comparing INT8 with fp32 on {len(rows)} texts of {calibration_file} ...")
        exact, guessed = (logits.argmax(axis=1) for logits in self._model.run_both(session, rows))
        shares = {"agreement": exact == guessed, "fp32_accuracy": exact == label_ids, "int8_accuracy": guessed == label_ids}
        return {"size": str(len(rows)), **{name: f"{share.mean() * 100:.4f}" for name, share in shares.items()}}


def check_figures(figures, allow_accuracy_drop):
    """Log what a comparison found, a dict of str. UserError where INT8 costs too much and not allow_accuracy_drop."""
    if "agreement" not in figures:
        logger.warning("INT8 was not compared with fp32: there is no calibration file.")
        return
    before, after = float(figures["fp32_accuracy"]), float(figures["int8_accuracy"])
    logger.info(f"INT8 on {figures['size']} texts of a calibration file: {float(figures['agreement']):.2f}% of the labels as "
                f"with fp32, accuracy {before:.2f}% -> {after:.2f}%")
    if before - after > LARGEST_DROP:
        message = f"--use_quantize: INT8 costs {before - after:.2f} points of accuracy, expected at most {LARGEST_DROP}"
        if not allow_accuracy_drop:
            raise UserError(message + "; --allow_accuracy_drop takes it all the same")
        logger.warning(message)
