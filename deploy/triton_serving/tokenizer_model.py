"""Triton model `tokenizer`: texts in, padded token ids out. Runs in Triton's Python backend; needs numpy and tokenizers only.

Of a model that reads long texts in windows it also asks the model, as a text then has several rows, and gives the answers for
texts.

build_repository.py copies this file to models/tokenizer/1/model.py, tokenizer.json and textcls/common/texts.py and long_texts.py
beside it, and writes the limits into config.pbtxt. Nothing else of this repository is there where it runs.
"""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils
from long_texts import LongText, fit_windows, join_windows
from texts import TEXT
from tokenizers import Tokenizer

STEP = 8  # tokens; lengths are multiples of it, a form that GPUs like, too


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        limits = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.pad_id, self.max_text_length, self.longest, self.num_before, self.num_after = (
            int(limits[name]) for name in ("pad_id", "max_text_length", "max_seq_length", "num_before", "num_after"))
        self.long_text = LongText(**json.loads(limits["long_text"]))
        self.batch_size, self.model = config["max_batch_size"], limits["model"]
        types = {item["name"]: pb_utils.triton_string_to_numpy(item["data_type"]) for item in config["output"]}
        self.outputs = list(types)
        self.inputs = types if self.long_text.mode != "window" else json.loads(limits["model_inputs"])  # of the model
        self.tokenizer = Tokenizer.from_file(os.path.join(args["model_repository"], args["model_version"], "tokenizer.json"))
        self.tokenizer.no_truncation()

    def execute(self, requests):
        """One response per request: int [texts, length] of every input of the model, or of windows what the model says of texts,
        float [texts, size]; or an error that leaves the other requests alone."""
        found = [self.read_texts(request) for request in requests]
        texts = [text for item in found if isinstance(item, list) for text in item]
        windows = [fit_windows(encoding.ids, self.num_before, self.num_after, self.longest, self.long_text)
                   for encoding in self.tokenizer.encode_batch_fast(texts)]
        problem, arrays = None, {}
        if self.long_text.mode != "window":
            # seqcls_model batches requests of one shape only: what came together gets one length, and there are few lengths
            arrays = self.make_inputs([row for [row] in windows]) if texts else {}
        elif texts:
            problem, answers = self.ask_model(windows)
            arrays = {self.outputs[0]: answers}
        responses, start = [], 0
        for item in found:
            if problem is None and isinstance(item, list):
                responses.append(pb_utils.InferenceResponse([
                    pb_utils.Tensor(name, np.ascontiguousarray(values[start:start + len(item)]))
                    for name, values in arrays.items()]))
                start += len(item)
            elif isinstance(item, list):
                responses.append(pb_utils.InferenceResponse([], pb_utils.TritonError(problem)))
            else:
                responses.append(pb_utils.InferenceResponse([], pb_utils.TritonError(item, pb_utils.TritonError.INVALID_ARG)))
        return responses

    def make_inputs(self, rows):
        """The inputs of the model for lists of token ids: {name: int [rows, length]}, padded to a multiple of STEP."""
        length = min(-(-max(map(len, rows)) // STEP) * STEP, self.longest)
        ids = np.full((len(rows), length), self.pad_id, np.int64)
        for index, row in enumerate(rows):
            ids[index, :len(row)] = row
        return {name: (ids if name == "input_ids" else np.zeros_like(ids)).astype(dtype) for name, dtype in self.inputs.items()}

    def ask_model(self, windows):
        """Run the windows of texts through the model: (None, float32 [texts, size]), or (what went wrong, None)."""
        rows = [row for own in windows for row in own]
        order, answers = sorted(range(len(rows)), key=lambda index: -len(rows[index])), [None] * len(rows)
        for first in range(0, len(rows), self.batch_size):
            chosen = order[first:first + self.batch_size]
            inputs = self.make_inputs([rows[index] for index in chosen])
            response = pb_utils.InferenceRequest(
                model_name=self.model, requested_output_names=self.outputs,
                inputs=[pb_utils.Tensor(name, np.ascontiguousarray(values)) for name, values in inputs.items()]).exec()
            if response.has_error():
                return response.error().message(), None
            for index, answer in zip(chosen, pb_utils.get_output_tensor_by_name(response, self.outputs[0]).as_numpy()):
                answers[index] = answer
        starts = np.cumsum([0, *map(len, windows)])[:-1]
        return None, join_windows(np.stack(answers), starts, self.long_text.window_vote)

    def read_texts(self, request):
        """The texts of a request, a list of str; or what is wrong with them, a str."""
        values = pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy()
        if values.size == 0:
            return "INPUT: no text, expected one or more"
        texts = []
        for row, value in enumerate(values.reshape(-1)):
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"INPUT row {row}: invalid UTF-8 at byte {error.start + 1}, expected UTF-8 text"
            if problem := TEXT.problem(text):
                return f"INPUT row {row}: {problem}, expected {TEXT.expected}"
            if len(text) > self.max_text_length:
                return f"INPUT row {row}: {len(text)} characters, expected at most {self.max_text_length}"
            texts.append(text)
        return texts
