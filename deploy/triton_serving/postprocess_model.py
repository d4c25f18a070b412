"""Triton model `seqcls_postprocess`: logits in, label names and confidences out. Runs in Triton's Python backend; numpy only.

build_repository.py copies this file to models/seqcls_postprocess/1/model.py, label.txt and textcls/common/probabilities.py
beside it. Nothing else of this repository is there where it runs.
"""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils
from probabilities import DECIMALS, UNDECIDED, softmax, top_classes


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.logits = config["input"][0]["name"]
        self.temperature = float(config["parameters"]["temperature"]["string_value"])
        self.threshold = config["parameters"]["threshold"]["string_value"]  # "" where the export holds none
        with open(os.path.join(args["model_repository"], args["model_version"], "label.txt"), encoding="utf-8") as file:
            self.labels = np.array(file.read().split("\n")[:-1], dtype=np.object_)

    def execute(self, requests):
        """One response per request: label str [texts, top_k], confidence float32 [texts, top_k], or an error."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            top_k, threshold = self.read_parameters(request)
        except ValueError as error:
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        logits = pb_utils.get_input_tensor_by_name(request, self.logits).as_numpy()
        probs = softmax(logits, self.temperature)
        top = top_classes(probs, top_k)
        labels, confidences = self.labels[top], np.take_along_axis(probs, top, axis=1)
        labels[[round(value, DECIMALS) < threshold for value in confidences[:, 0].tolist()], 0] = UNDECIDED
        return pb_utils.InferenceResponse([pb_utils.Tensor("label", labels), pb_utils.Tensor("confidence", confidences)])

    def read_parameters(self, request):
        """Read top_k and threshold from the parameters of a request. ValueError, whose text goes to the client."""
        try:
            parameters = json.loads(request.parameters() or "{}")
        except ValueError:
            raise ValueError("parameters: not UTF-8 or not JSON, expected top_k and threshold at most") from None
        top_k, threshold = parameters.get("top_k", 1), parameters.get("threshold", 0)
        if type(top_k) is not int or not 1 <= top_k <= len(self.labels):
            raise ValueError(f"parameter top_k: is {json.dumps(top_k)[:40]}, expected a whole number, 1 to {len(self.labels)}")
        if threshold == "auto" and not self.threshold:
            raise ValueError("parameter threshold: is \"auto\", and the export held no threshold, expected a number, 0 to 1")
        try:
            value = float(self.threshold if threshold == "auto" else "" if isinstance(threshold, bool) else threshold)
        except (TypeError, ValueError):
            value = -1.0
        if not 0 <= value <= 1:
            raise ValueError(f"parameter threshold: is {json.dumps(threshold)[:40]}, expected a number, 0 to 1, or \"auto\"")
        if value > 0 and UNDECIDED in self.labels:
            raise ValueError(f"parameter threshold: there is a label {UNDECIDED!r}, expected no threshold")
        return top_k, value
