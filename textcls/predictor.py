"""Text classification by ONNX Runtime: a Python API that needs no Paddle.

    from textcls.predictor import Predictor
    predictor = Predictor("../../export")
    labels, probabilities = predictor(["头疼怎么办", "拔牙多少钱"], top_k=2)

It reads a folder that `export_model.py --onnx` or prune.py wrote, and nothing else.
"""

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime

from utils import model_inputs, pad_batch, read_labelled, softmax, sorted_batches, top_classes
from textcls.errors import Problems, UserError
from textcls.exported import read_export, read_tokenizer
from textcls.outputs import complete_file

CALIBRATION_TEXTS = 2000  # of a calibration file at most, evenly spaced
MOST_THREADS = 256
ALWAYS_THERE, MOST_POSITIONS = 512, 10000  # tokens that every BERT and ERNIE takes, and more than any does
LARGEST_DROP = 0.5  # points of accuracy that INT8 may cost
LARGEST_SIZE = 0.4  # share of the fp32 file, above which an INT8 file is remarked on
logger = logging.getLogger("predictor")


def open_session(model, name, device, device_id=0):
    """An onnxruntime.InferenceSession. model: a path or the bytes of an ONNX model; name: what messages call it.

    Each run takes one thread: several batches at once are faster than one batch on several threads (README.md). UserError.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it keeps a plan for every shape of a batch: memory that grows, and no speed
    options.log_severity_level = 4  # errors come as exceptions
    providers = ["CPUExecutionProvider"]
    if device == "gpu":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError("--device gpu: this onnxruntime is a CPU build, expected --device cpu, or onnxruntime-gpu in the "
                            "place of onnxruntime (deploy/predictor/README.md)")
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device_id}))
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: ONNX Runtime cannot load it ({reason}), expected a sound ONNX model") from None
    if device == "gpu" and "CUDAExecutionProvider" not in session.get_providers():
        raise UserError(f"--device gpu, --device_id {device_id}: ONNX Runtime could not start CUDA, expected an NVIDIA driver, "
                        "CUDA 11.8, cuDNN 8.6 and a GPU of that number; or --device cpu")
    return session


class Predictor:
    """A classifier. Safe to call from several threads, which share its num_threads threads.

    path: exported folder, or prefix of the model in it. device: "cpu" or "gpu". quantize: INT8 weights (CPU only);
    use_fp16: 16-bit floats (GPU only). num_threads: threads that run batches on a CPU; None: one per usable core.
    batch_size: texts per batch at most. max_seq_length: tokens; None: as in training. calibration_file: labelled texts, on
    which a new INT8 model is compared with fp32; it is refused where it loses more than LARGEST_DROP points of accuracy,
    unless allow_accuracy_drop. labels: list of str, position = class id. onnx_model: the model that runs, a path, or bytes
    where its INT8 form could not be kept. Raises UserError.
    """

    def __init__(self, path, device="cpu", quantize=False, use_fp16=False, device_id=0, num_threads=None, batch_size=32,
                 max_seq_length=None, calibration_file=None, allow_accuracy_drop=False):
        if device not in ("cpu", "gpu"):
            raise UserError(f"--device {device}: unknown device, expected cpu or gpu")
        if quantize and device == "gpu":
            raise UserError("--use_quantize: INT8 is for the CPU, expected --device cpu, or --use_fp16 on a GPU")
        if use_fp16 and device == "cpu":
            raise UserError("--use_fp16: a CPU is not faster with it, expected --device gpu, or --use_quantize on a CPU")
        if device == "gpu":
            num_threads = 1  # batches queue up on the GPU
        elif num_threads is None:
            num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if not 1 <= num_threads <= MOST_THREADS or batch_size < 1:
            raise UserError(f"num_threads {num_threads}, batch_size {batch_size}: out of range, expected 1 to {MOST_THREADS} "
                            "threads (the cores of the machine are best) and a batch of 1 or more")
        self._export = read_export(path)
        self.labels, self.batch_size, self.num_threads = self._export.labels, batch_size, num_threads
        self.max_seq_length = self._export.max_seq_length if max_seq_length is None else max_seq_length
        self._tokenizer = read_tokenizer(self._export)
        if self.max_seq_length < 3:
            raise UserError(f"--max_seq_length {self.max_seq_length}: expected 3 or more")
        self._tokenizer.enable_truncation(self.max_seq_length)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="predictor")
        self.onnx_model = self._export.onnx_path
        if quantize:
            self._session = self._int8_session(calibration_file, allow_accuracy_drop)
        elif use_fp16:
            self._session = self._fp16_session(device_id)
        else:
            self._session = open_session(self._export.onnx_path, self._export.onnx_path, device, device_id)
        self._check_session()

    def __call__(self, texts, top_k=1):
        """Label texts. texts: list of str. Returns (labels, probabilities), best first and in the order of the texts:

        list of lists of top_k str, float32 [num_texts, top_k].
        """
        if not 1 <= top_k <= len(self.labels):
            raise ValueError(f"top_k is {top_k}, expected 1 to {len(self.labels)}")
        probs = self.probabilities(texts)
        top = top_classes(probs, top_k)
        return [[self.labels[index] for index in row] for row in top], np.take_along_axis(probs, top, axis=1)

    def probabilities(self, texts, progress=None):
        """Probabilities of all classes: float32 [num_texts, num_classes] in the order of texts (list of str).

        progress: a tqdm bar to advance by the texts done, or None. TypeError or ValueError if texts are not texts.
        """
        return softmax(self._logits(self._session, self.tokenize(texts), progress))

    def tokenize(self, texts):
        """Token ids of texts (list of str): list of lists of int, special tokens included, cut to max_seq_length."""
        texts = None if isinstance(texts, str) else list(texts)  # list: a generator can be read only once
        if texts is None or not all(isinstance(text, str) for text in texts):
            raise TypeError("texts is not a list of str")
        for index, text in enumerate(texts):
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
                raise ValueError(f"text {index} holds a lone surrogate, expected Unicode text")
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def batch_probabilities(self, texts):
        """As `probabilities`, but all texts as one batch, in the calling thread: for callers with threads of their own."""
        return softmax(self._run(self._session, self.tokenize(texts)))

    def _run(self, session, rows):
        """float32 [num_texts, num_classes] of rows of token ids, run as one batch."""
        batch = pad_batch(rows, self._export.pad_id)
        return session.run(None, model_inputs(batch, self._export.input_names))[0]

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
        """UserError where the model does not belong to the folder's other files, or has too few positions."""
        path, outputs = self._export.onnx_path, self._session.get_outputs()
        inputs = {item.name for item in self._session.get_inputs()}
        if "input_ids" not in inputs or not inputs <= {"input_ids", "token_type_ids"} or len(outputs) != 1:
            raise UserError(f"{path}: its inputs are {sorted(inputs)}, expected input_ids and token_type_ids, and one output")
        if outputs[0].shape[-1] != len(self.labels):
            raise UserError(f"{path}: it has {outputs[0].shape[-1]} classes, expected the {len(self.labels)} of label.txt")
        if self.max_seq_length > self._export.max_seq_length:
            logger.warning(f"--max_seq_length {self.max_seq_length} is more than the {self._export.max_seq_length} of training.")
        if self.max_seq_length > min(self._export.max_seq_length, ALWAYS_THERE):
            self._check_positions()

    def _check_positions(self):
        """UserError where the model has fewer positions than max_seq_length."""
        reason = f"no model has more than {MOST_POSITIONS}"
        if self.max_seq_length <= MOST_POSITIONS:
            try:
                self._logits(self._session, [[self._export.pad_id + 1] * self.max_seq_length])
                return
            except Exception as error:  # ONNX Runtime's exceptions have no common base class
                reason = str(error).strip().split("\n")[0]
        raise UserError(f"--max_seq_length {self.max_seq_length}: more than the model's positions, or than the machine can run "
                        f"({reason}), expected less, or as in training")

    # ---------------------------------------------------------------- converted models, cached beside the fp32 one

    def _fp16_session(self, device_id):
        path = converted_path(self._export.onnx_path, "fp16")
        if not os.path.isfile(path):
            from textcls.onnx_conversion import to_fp16

            open_session(self._export.onnx_path, self._export.onnx_path, "gpu", device_id)  # refused before the work
            write_model(path, to_fp16(self._export.onnx_path))
        self.onnx_model = path
        return open_session(path, path, "gpu", device_id)

    def _int8_session(self, calibration_file, allow_accuracy_drop):
        """Open the cached INT8 model, or make it; compare with fp32 unless that has been done on the same file."""
        fp32_path, path = self._export.onnx_path, converted_path(self._export.onnx_path, "int8")
        model, session = None, None
        if os.path.isfile(path):
            try:
                session = open_session(path, path, "cpu")
            except UserError as error:
                logger.warning(f"{error}: converting again.")
        if session is None:
            from textcls.onnx_conversion import to_int8

            logger.info("Quantizing the model to INT8 ...")
            model, counts = to_int8(fp32_path)
            session = open_session(model, path, "cpu")
            share = len(model) / os.path.getsize(fp32_path)
            logger.info(f"INT8: {counts['MatMulInteger']} of {counts['all']} matrix products in integers, {share:.2f} of the "
                        "size of fp32")
            if share > LARGEST_SIZE:
                logger.warning(f"INT8 has more than {LARGEST_SIZE} of the size of fp32: most of this model is not matrices.")
        figures = session.get_modelmeta().custom_metadata_map
        calibration = file_hash(calibration_file) if calibration_file else None
        if calibration and figures.get("calibration") != calibration:
            figures = {"calibration": calibration, **self._compare(session, calibration_file)}
            try:
                from textcls.onnx_conversion import with_metadata

                model = with_metadata(model or path, figures)
            except UserError as error:  # a model that was converted elsewhere, and no package onnx here
                logger.warning(f"The comparison is not kept: {error}")
        if model is not None:
            write_model(path, model)
        self.onnx_model = path if os.path.isfile(path) else model
        if "agreement" not in figures:
            logger.warning("INT8 was not compared with fp32: there is no calibration file.")
            return session
        before, after = float(figures["fp32_accuracy"]), float(figures["int8_accuracy"])
        logger.info(f"INT8 on {figures['size']} texts of a calibration file: {float(figures['agreement']):.2f}% of the labels as "
                    f"with fp32, accuracy {before:.2f}% -> {after:.2f}%")
        if before - after > LARGEST_DROP:
            message = f"--use_quantize: INT8 costs {before - after:.2f} points of accuracy, expected at most {LARGEST_DROP}"
            if not allow_accuracy_drop:
                raise UserError(message + "; --allow_accuracy_drop takes it all the same")
            logger.warning(message)
        return session

    def _compare(self, session, calibration_file):
        """Labels and accuracy of an INT8 session beside those of fp32: a dict of str."""
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


def file_hash(path):
    """The first 12 hexadecimal digits of a file's SHA-256."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a file") from None
    return digest.hexdigest()[:12]


def converted_path(onnx_path, kind):
    """Where the converted form of a model is kept: beside it, under a name that changes with its content."""
    return f"{onnx_path[:-len('.onnx')]}.{kind}-{file_hash(onnx_path)}.onnx"


def write_model(path, model):
    """Keep a converted model, if its folder can be written. model: bytes."""
    try:
        with complete_file(path, "wb") as file:
            file.write(model)
    except (UserError, OSError) as error:
        logger.warning(f"warning: the converted model is not kept, every start will convert again: {error}")
