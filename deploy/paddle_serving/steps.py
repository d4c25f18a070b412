"""The two steps of the pipeline: check a request, label its texts. No method may raise: Paddle Serving would send the exception
to the client. Importing this file imports Paddle Serving, which service.py prepares.
"""

import json
import logging

import numpy as np
from paddle_serving_server import pipeline
from request_check import BAD_REQUEST, FAILED, INTERNAL_ERROR, Limits, RequestError, check_request
from settings import NAME

from textcls.common.known import add_nearness, split_known
from textcls.common.probabilities import DECIMALS, UNDECIDED, is_decided, softmax, top_labels
from textcls.data.encoders import Encoder
from textcls.data.tokens import TokenizedTexts, model_inputs, run_by_length
from textcls.runtime.exported import FEATURES, LOGITS, Export

logger = logging.getLogger(NAME)


class Request(pipeline.RequestOp):
    """Paddle Serving's own step unpickles what clients send as tensors, and answers with its exceptions."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.limits = limits

    def unpack_request_package(self, request):
        """The Wanted of `check_request` as a dict, or the number and the message of a refusal."""
        try:
            wanted = check_request(list(request.key), list(request.value), len(request.tensors) > 0, self.limits)
        except RequestError as error:
            return {}, request.logid, BAD_REQUEST, str(error)
        return wanted._asdict(), request.logid, None, ""


class Classify(pipeline.Op):
    """Label texts. export: what is served; texts_per_batch: of the model."""

    def __init__(self, request_step: Request, export: Export, encode: Encoder, texts_per_batch: int) -> None:
        super().__init__(name=NAME, input_ops=[request_step])
        self.export, self.encode, self.texts_per_batch = export, encode, texts_per_batch

    def _auto_batching_generator(self, input_channel, op_name, batch_size, timeout, op_info_prefix):
        """Yield lists of the requests that wait, at most batch_size. Paddle Serving's own way lets each request wait for
        others until a timeout, and wakes up at each timeout even if there is none."""
        while True:
            batch = [input_channel.front(op_name)]
            while len(batch) < batch_size and input_channel.size():
                batch.append(input_channel.front(op_name))
            yield batch

    def preprocess(self, input_dicts, data_id=0, log_id=0):
        """{"rows": object array [texts] of tuples of windows, lists of token ids}: arrays of requests in work at once are
        joined to one."""
        try:
            [request] = input_dicts.values()
            rows = np.empty(len(request["texts"]), object)
            rows[:] = [tuple(windows) for windows in self.encode(request["texts"])]
        except Exception:
            logger.exception("tokenizing failed")
            return None, False, INTERNAL_ERROR, FAILED
        return {"rows": rows}, False, None, ""

    def process(self, feed_batch, typical_logid=0):
        """{"probs": float32 [texts, classes]}, NaN where the model failed, and of a model that tells unknown texts {"known":
        float64 [texts]}."""
        rows, export = feed_batch[0]["rows"], self.export
        try:
            tokens = TokenizedTexts.from_windows(rows, export.long_text.window_vote)
            size = len(export.labels) + (export.centres is not None)
            answers = run_by_length(self.run_model, tokens, self.texts_per_batch, export.pad_id, size)
            logits, known = split_known(answers, export.centres)
            return {"probs": softmax(logits, export.temperature), **({} if known is None else {"known": known})}, 0, ""
        except Exception:
            logger.exception("the model failed")
            return {"probs": np.full((len(rows), len(export.labels)), np.nan, np.float32)}, 0, ""

    def run_model(self, batch: np.ndarray) -> np.ndarray:
        """Run a batch, int64 [batch, length]. Returns the logits, float32 [batch, classes], and of a model that tells unknown
        texts the nearness as one more column (`add_nearness`)."""
        answers = self.client.predict(feed=model_inputs(batch, self.export.input_names), fetch=self.client.fetch_names_,
                                      batch=True)
        if self.export.centres is None:
            return answers[LOGITS]
        return add_nearness(answers[LOGITS], answers[FEATURES], self.export.centres)

    def postprocess(self, input_dicts, fetch_data, data_id=0, log_id=0):
        """{"label": JSON list of str, "confidence": JSON list of numbers}, lists of lists for requests with top_k; of a model
        that tells unknown texts also {"known": JSON list of numbers}."""
        try:
            [request], probs = input_dicts.values(), fetch_data["probs"]
            if np.isnan(probs).any():
                return {}, INTERNAL_ERROR, FAILED
            predictions = top_labels(probs, self.export.labels, request["top_k"] or 1)
            known = fetch_data["known"].tolist() if "known" in fetch_data else [None] * len(predictions)
            labels = [[label for label, _ in top] for top in predictions]
            confidences = [[confidence for _, confidence in top] for top in predictions]
            for names, values, own in zip(labels, confidences, known):
                if not is_decided(values[0], request["threshold"], own, request["least_known"]):
                    names[0] = UNDECIDED
            if request["top_k"] is None:
                labels, confidences = [row[0] for row in labels], [row[0] for row in confidences]
            answer = {"label": json.dumps(labels, ensure_ascii=False), "confidence": json.dumps(confidences)}
            if "known" in fetch_data:
                answer["known"] = json.dumps([round(own, DECIMALS) for own in known])
            return answer, None, ""
        except Exception:
            logger.exception("the answer could not be written")
            return {}, INTERNAL_ERROR, FAILED
