"""Triton model `seqcls_postprocess`: logits in, label names and confidences out. Runs in Triton's Python backend; numpy only.

Where the model tells unknown texts, its answers have the nearness (`find_nearness` of textcls/common/known.py) behind the
logits, and `known` is made of it.

build_repository.py copies this file to models/seqcls_postprocess/1/model.py, label.txt and textcls/common/probabilities.py
beside it. Nothing else of this repository is there where it runs.
"""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils
from probabilities import UNDECIDED, is_decided, score_known, softmax, top_classes


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.answers = config["input"][0]["name"]
        self.temperature = float(config["parameters"]["temperature"]["string_value"])
        self.threshold = config["parameters"]["threshold"]["string_value"]  # "" where the export holds none
        weights = config["parameters"]["known_weights"]["string_value"]  # "" where the model does not tell unknown texts
        self.weights = np.array(json.loads(weights)) if weights else None
        with open(os.path.join(args["model_repository"], args["model_version"], "label.txt"), encoding="utf-8") as file:
            self.labels = np.array(file.read().split("\n")[:-1], dtype=np.object_)

    def execute(self, requests):
        """One response per request: label str [texts, top_k], confidence float32 [texts, top_k], and of a model that tells
        unknown texts known float32 [texts, 1]; or an error."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            top_k, threshold, least_known = self.read_parameters(request)
        except ValueError as error:
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        answers = pb_utils.get_input_tensor_by_name(request, self.answers).as_numpy()
        known = None if self.weights is None else score_known(answers[:, len(self.labels):], self.weights)
        probs = softmax(answers[:, :len(self.labels)], self.temperature)
        top = top_classes(probs, top_k)
        labels, confidences = self.labels[top], np.take_along_axis(probs, top, axis=1)
        pairs = zip(confidences[:, 0].tolist(), [None] * len(probs) if known is None else known.tolist())
        labels[[not is_decided(confidence, threshold, own, least_known) for confidence, own in pairs], 0] = UNDECIDED
        tensors = [pb_utils.Tensor("label", labels), pb_utils.Tensor("confidence", confidences)]
        if known is not None:
            tensors.append(pb_utils.Tensor("known", known.astype(np.float32).reshape(-1, 1)))
        return pb_utils.InferenceResponse(tensors)

    def read_parameters(self, request):
        """Read top_k, threshold and least_known from the parameters of a request. ValueError, whose text goes to the client."""
        try:
            parameters = json.loads(request.parameters() or "{}")
        except ValueError:
            raise ValueError("parameters: not UTF-8 or not JSON, expected top_k, threshold and least_known at most") from None
        top_k, threshold = parameters.get("top_k", 1), parameters.get("threshold", 0)
        if type(top_k) is not int or not 1 <= top_k <= len(self.labels):
            raise ValueError(f"parameter top_k: is {json.dumps(top_k)[:40]}, expected a whole number, 1 to {len(self.labels)}")
        if threshold == "auto" and not self.threshold:
            raise ValueError("parameter threshold: is \"auto\", and the export held no threshold, expected a number, 0 to 1")
        threshold = self.read_bound("threshold", self.threshold if threshold == "auto" else threshold, ", or \"auto\"")
        least_known = self.read_bound("least_known", parameters.get("least_known", 0))
        if least_known > 0 and self.weights is None:
            raise ValueError("parameter least_known: this model does not tell unknown texts, expected 0, or a model trained with "
                             "train.py --known centres")
        return top_k, threshold, least_known

    def read_bound(self, name, value, also=""):
        """Read a number of 0 to 1, which may be written as a text, below which answers are undecided. also: what else the
        message says was expected. ValueError."""
        try:
            bound = float("" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            bound = -1.0
        if not 0 <= bound <= 1:
            raise ValueError(f"parameter {name}: is {json.dumps(value)[:40]}, expected a number, 0 to 1{also}")
        if bound > 0 and UNDECIDED in self.labels:
            raise ValueError(f"parameter {name}: there is a label {UNDECIDED!r}, expected no {name}")
        return bound
