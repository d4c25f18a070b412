"""Run a trained classifier over many texts: logits, probabilities, features."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from textcls.common.errors import UserError
from textcls.common.log import progress_bar
from textcls.common.probabilities import softmax
from textcls.data.tokens import pad_batch, sorted_batches


def map_batches(run, batches):
    """Yield run(batch) of each batch, in order. On a CPU each thread runs batches of its own: Paddle's GELU, softmax and
    layer norm use one thread only, whatever OMP_NUM_THREADS says."""
    from threadpoolctl import threadpool_limits

    from textcls.models.paddle_setup import paddle

    device = paddle.get_device()

    def prepare_thread():
        paddle.set_device(device)
        threadpool_limits(1, user_api="openmp")  # of this thread; the other threads keep theirs

    threads = max(1, int(os.environ.get("OMP_NUM_THREADS", 1))) if device == "cpu" else 1
    if threads == 1:
        yield from map(run, batches)
    else:
        with ThreadPoolExecutor(threads, initializer=prepare_thread) as pool:
            yield from pool.map(run, batches)


def predict_logits(checkpoint, tokens, batch_size, progress=None, after_batch=None):
    """Run the classifier over TokenizedTexts; returns logits float32 [num_texts, num_classes] in input order, or of a sentence
    encoder its vectors [num_texts, embedding_size].

    Batches are formed by length. progress: of `progress_bar`, to advance by the texts done, or None.
    after_batch: called with the indices (int64 [batch]) of the texts that the calling thread has just run, or None.
    """
    from textcls.models.paddle_setup import paddle

    logits = np.empty((len(tokens), getattr(checkpoint.model, "embedding_size", len(checkpoint.labels))), dtype=np.float32)

    def run(indices):
        rows = [tokens[index]["input_ids"] for index in indices]
        with paddle.no_grad():
            logits[indices] = checkpoint.model(paddle.to_tensor(pad_batch(rows, checkpoint.pad_id))).numpy()
        if after_batch is not None:
            after_batch(indices)
        if progress is not None:
            progress.update(len(indices))

    for _ in map_batches(run, sorted_batches(tokens.lengths, batch_size)):
        pass
    if not np.isfinite(logits).all():
        raise UserError("the model's answers are not numbers, expected a model whose training did not diverge")
    return logits


def predict_probs(checkpoint, tokens, batch_size, description=None, progress=None):
    """Run the classifier over TokenizedTexts; returns probabilities float32 [num_texts, num_classes], rows sum to 1.

    description: what a progress bar of this run is called, or None; progress: an open bar to advance instead, or None.
    """
    if description is None:
        return softmax(predict_logits(checkpoint, tokens, batch_size, progress))
    with progress_bar(len(tokens), description) as progress:
        return softmax(predict_logits(checkpoint, tokens, batch_size, progress))


def predict_features(checkpoint, tokens, batch_size, progress=None):
    """Run the classifier over TokenizedTexts and keep what its last layer, `classifier`, is given.

    Returns (features float32 [num_texts, hidden_size], logits float32 [num_texts, num_classes]) in input order; logits are
    features @ classifier.weight + classifier.bias. batch_size, progress: as of `predict_logits`.
    """
    classifier = checkpoint.model.classifier
    features = np.empty((len(tokens), classifier.weight.shape[0]), dtype=np.float32)
    last = threading.local()  # each thread's last batch: they share the model

    def keep(layer, inputs):
        last.batch = inputs[0]

    def store(indices):
        features[indices] = last.batch.numpy()

    hook = classifier.register_forward_pre_hook(keep)
    try:
        logits = predict_logits(checkpoint, tokens, batch_size, progress, after_batch=store)
    finally:
        hook.remove()
    return features, logits
