"""Triton model `seqcls_postprocess`: logits in, label names and confidences out. Runs in Triton's Python backend; numpy only.

build_repository.py copies this file to models/seqcls_postprocess/1/model.py, label.txt and textcls/common/probabilities.py
beside it. Nothing else of this repository is there where it runs.
"""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils
from probabilities import softmax, top_classes


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.logits = config["input"][0]["name"]
        self.temperature = float(config["parameters"]["temperature"]["string_value"])
        with open(os.path.join(args["model_repository"], args["model_version"], "label.txt"), encoding="utf-8") as file:
            self.labels = np.array(file.read().split("\n")[:-1], dtype=np.object_)

    def execute(self, requests):
        """One response per request: label str [texts, top_k], confidence float32 [texts, top_k], or an error."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            top_k = json.loads(request.parameters() or "{}").get("top_k", 1)
        except ValueError:
            message = "parameters: not UTF-8 or not JSON, expected top_k at most"
            return pb_utils.InferenceResponse([], pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        if type(top_k) is not int or not 1 <= top_k <= len(self.labels):
            message = f"parameter top_k: is {json.dumps(top_k)[:40]}, expected a whole number, 1 to {len(self.labels)}"
            return pb_utils.InferenceResponse([], pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        logits = pb_utils.get_input_tensor_by_name(request, self.logits).as_numpy()
        probs = softmax(logits, self.temperature)
        top = top_classes(probs, top_k)
        return pb_utils.InferenceResponse([pb_utils.Tensor("label", self.labels[top]),
                                           pb_utils.Tensor("confidence", np.take_along_axis(probs, top, axis=1))])
