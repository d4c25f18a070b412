"""Text classification by ONNX Runtime: a Python API that needs no Paddle.

    from textcls.predictor import Predictor
    predictor = Predictor("export")
    labels, probabilities = predictor(["头疼怎么办", "拔牙多少钱"], top_k=2)

It reads a folder that `export_model.py --onnx` or prune.py wrote, and nothing else.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from utils import model_inputs, pad_batch, read_labelled, sorted_batches
from textcls.converted import open_fp16, open_int8
from textcls.errors import Problems, UserError
from textcls.exported import check_length, read_export, read_tokenizer
from textcls.onnx_session import open_session
from textcls.options import check_device
from textcls.probabilities import softmax, top_classes
from textcls.texts import text_problem

CALIBRATION_TEXTS = 2000  # of a calibration file at most, evenly spaced
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
        check_device(device, quantize, use_fp16)
        if device == "gpu":
            num_threads = 1  # batches queue up on the GPU
        elif num_threads is None:
            num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._export = read_export(path)
        self.labels, self.batch_size, self.num_threads = self._export.labels, batch_size, num_threads
        self.max_seq_length = self._export.max_seq_length if max_seq_length is None else max_seq_length
        check_length(self.max_seq_length, self._export)
        if self.max_seq_length > self._export.max_seq_length:
            logger.warning(f"--max_seq_length {self.max_seq_length} is more than the {self._export.max_seq_length} of training.")
        self._tokenizer = read_tokenizer(self._export)
        self._tokenizer.enable_truncation(self.max_seq_length)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="predictor")
        self.onnx_model = self._export.onnx_path
        if quantize:
            self._session, self.onnx_model = open_int8(self.onnx_model, calibration_file, allow_accuracy_drop, self._compare)
        elif use_fp16:
            self._session, self.onnx_model = open_fp16(self.onnx_model, device_id)
        else:
            self._session = open_session(self.onnx_model, self.onnx_model, device, device_id)
        self._check_session()

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
        return softmax(self._logits(self._session, self.tokenize(texts), progress))

    def tokenize(self, texts):
        """Token ids of texts (list of str): list of lists of int, special tokens included, cut to max_seq_length.

        TypeError where texts are not str, ValueError where one is no text (blank, with NUL, with half a surrogate pair).
        """
        texts = None if isinstance(texts, str) else list(texts)  # list: a generator can be read only once
        if texts is None or not all(isinstance(text, str) for text in texts):
            raise TypeError("texts is not a list of str")
        for index, text in enumerate(texts):
            problem = text_problem(text)
            if problem:
                raise ValueError(f"text {index}: {problem}, expected a text")
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def batch_probabilities(self, texts):
        """As `probabilities`, but all texts as one batch, in the calling thread: for callers with threads of their own."""
        return softmax(self._run(self._session, self.tokenize(texts)))

    def _run(self, session, rows):
        """float32 [num_texts, num_classes] of rows of token ids, run as one batch."""
        batch = pad_batch(rows, self._export.pad_id)
        return session.run(None, model_inputs(batch, [item.name for item in session.get_inputs()]))[0]

    def _logits(self, session, rows, progress=None):
        """float32 [num_texts, num_classes] of rows of token ids, in their order."""
        logits = np.empty((len(rows), len(self.labels)), np.float32)

        def run(indices):
            logits[indices] = self._run(session, [rows[index] for index in indices])
            if progress is not None:
                progress.update(len(indices))

        # a few texts are shared out between the threads, too
        size = max(1, min(self.batch_size, -(-len(rows) // self.num_threads)))
        list(self._pool.map(run, sorted_batches([len(row) for row in rows], size)))
        return logits

    def _check_session(self):
        """UserError where the model does not belong to the folder's other files."""
        path, outputs = self._export.onnx_path, self._session.get_outputs()
        inputs = {item.name for item in self._session.get_inputs()}
        if "input_ids" not in inputs or not inputs <= {"input_ids", "token_type_ids"} or len(outputs) != 1:
            raise UserError(f"{path}: its inputs are {sorted(inputs)}, expected input_ids and token_type_ids, and one output")
        if outputs[0].shape[-1] != len(self.labels):
            raise UserError(f"{path}: it has {outputs[0].shape[-1]} classes, expected the {len(self.labels)} of label.txt")

    def _compare(self, session, calibration_file):
        """Labels and accuracy of an INT8 session beside those of fp32 on labelled texts: a dict of str."""
        problems = Problems()
        texts, label_ids = read_labelled(calibration_file, self.labels, problems, "the model's label.txt")
        problems.report()
        step = -(-len(texts) // CALIBRATION_TEXTS)
        rows, label_ids = self.tokenize(texts[::step]), label_ids[::step]
        logger.info(f"Comparing INT8 with fp32 on {len(rows)} texts of {calibration_file} ...")
        exact = self._logits(open_session(self._export.onnx_path, self._export.onnx_path, "cpu"), rows).argmax(axis=1)
        guessed = self._logits(session, rows).argmax(axis=1)
        shares = {"agreement": exact == guessed, "fp32_accuracy": exact == label_ids, "int8_accuracy": guessed == label_ids}
        return {"size": str(len(rows)), **{name: f"{share.mean() * 100:.4f}" for name, share in shares.items()}}
