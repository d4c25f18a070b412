"""Triton model `tokenizer`: texts in, padded token ids out. Runs in Triton's Python backend; needs numpy and tokenizers only.

build_repository.py copies this file to models/tokenizer/1/model.py, tokenizer.json and textcls/common/texts.py beside it, and
writes the limits into config.pbtxt. Nothing else of this repository is there where it runs.
"""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils
from texts import TEXT
from tokenizers import Tokenizer

STEP = 8  # tokens; lengths are multiples of it, a form that GPUs like, too


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        limits = {name: int(value["string_value"]) for name, value in config["parameters"].items()}
        self.pad_id, self.max_text_length, self.longest = limits["pad_id"], limits["max_text_length"], limits["max_seq_length"]
        self.outputs = {item["name"]: pb_utils.triton_string_to_numpy(item["data_type"]) for item in config["output"]}
        self.tokenizer = Tokenizer.from_file(os.path.join(args["model_repository"], args["model_version"], "tokenizer.json"))
        self.tokenizer.enable_truncation(self.longest)

    def execute(self, requests):
        """One response per request: int [texts, length] of every output, or an error that leaves the other requests alone."""
        found = [self.read_texts(request) for request in requests]
        texts = [text for item in found if isinstance(item, list) for text in item]
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]
        # seqcls_model batches requests of one shape only: what came together gets one length, and there are few lengths
        length = min(-(-max(map(len, rows), default=0) // STEP) * STEP, self.longest)
        ids = np.full((len(rows), length), self.pad_id, np.int64)
        for index, row in enumerate(rows):
            ids[index, :len(row)] = row
        responses, start = [], 0
        for item in found:
            if not isinstance(item, list):
                responses.append(pb_utils.InferenceResponse([], pb_utils.TritonError(item, pb_utils.TritonError.INVALID_ARG)))
                continue
            part = ids[start:start + len(item)]
            start += len(item)
            responses.append(pb_utils.InferenceResponse([
                pb_utils.Tensor(name, np.ascontiguousarray(part if name == "input_ids" else np.zeros_like(part), dtype))
                for name, dtype in self.outputs.items()]))
        return responses

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
