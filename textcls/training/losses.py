"""Losses to train with."""

from typing import Optional

import numpy as np

from textcls.models.paddle_setup import paddle


class ClassificationLoss(paddle.nn.Layer):
    """Cross entropy, optionally focal (Lin et al. 2017, arXiv:1708.02002), class-weighted and label-smoothed.

    The mean over a batch is weighted by the weight of each text's own class. class_weights: float32 [num_classes] or None.
    """

    def __init__(self, class_weights: Optional[np.ndarray] = None, focal_gamma: float = 0.0, label_smoothing: float = 0.0):
        super().__init__()
        self.class_weights = None if class_weights is None else paddle.to_tensor(class_weights)
        self.focal_gamma, self.label_smoothing = focal_gamma, label_smoothing

    def forward(self, logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
        """Return the loss, a scalar. logits: float32 [batch, num_classes]; labels: int64 [batch]."""
        num_classes = logits.shape[-1]
        log_probs = paddle.nn.functional.log_softmax(logits.astype("float32"), axis=-1)  # (batch, num_classes)
        target = paddle.nn.functional.one_hot(labels, num_classes)
        target = target * (1 - self.label_smoothing) + self.label_smoothing / num_classes
        if self.focal_gamma:
            # clipped, since below gamma = 1 the power has an infinite slope at 0
            target = target * paddle.clip(1 - log_probs.exp(), min=1e-6) ** self.focal_gamma
        losses = -(target * log_probs).sum(axis=-1)  # (batch,)
        if self.class_weights is None:
            return losses.mean()
        weights = self.class_weights[labels]
        return (losses * weights).sum() / weights.sum()


class SoftLabelLoss(paddle.nn.Layer):
    """Cross entropy with another model's probabilities, both softened (Hinton et al. 2015, arXiv:1503.02531).

    temperature: of the softmax of both; the loss is times its square, so that its gradients keep their size. Where it is given
    label ids, as of dev, it is plain cross entropy.
    """

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: paddle.Tensor, targets: paddle.Tensor) -> paddle.Tensor:
        """Return the loss, a scalar. logits: float32 [batch, num_classes]; targets: alike, of the teacher, or int64 [batch]."""
        if len(targets.shape) == 1:
            return paddle.nn.functional.cross_entropy(logits, targets)
        log_probs = paddle.nn.functional.log_softmax(logits / self.temperature, axis=-1)
        probs = paddle.nn.functional.softmax(targets / self.temperature, axis=-1)
        return -(probs * log_probs).sum(axis=-1).mean() * self.temperature ** 2


def rdrop_divergence(first: paddle.Tensor, second: paddle.Tensor) -> paddle.Tensor:
    """Measure how far two passes through dropout differ (R-Drop: Wu et al. 2021, arXiv:2106.14448).

    first, second: logits float32 [batch, num_classes]. Returns a scalar: the mean over the batch of
    (KL(first || second) + KL(second || first)) / 2.
    """
    first, second = (paddle.nn.functional.log_softmax(logits, axis=-1) for logits in (first, second))
    return ((first.exp() - second.exp()) * (first - second)).sum(axis=-1).mean() / 2


def relation_loss(features: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    """Punish texts of one label that are unlike, and others that are alike (RGL: Wang et al. 2022, findings-naacl.81).

    features: float32 [batch, size]; labels: int64 [batch]. Returns a scalar: over all pairs of two texts, the mean cross
    entropy of "same label", whose probability is (1 + cosine similarity) / 2; 0 for a single text.
    """
    size = features.shape[0]
    if size < 2:
        return features.sum() * 0
    directions = paddle.nn.functional.normalize(features, axis=-1)
    probs = paddle.clip((1 + paddle.matmul(directions, directions, transpose_y=True)) / 2, 1e-6, 1 - 1e-6)  # (batch, batch)
    is_same = (labels.unsqueeze(0) == labels.unsqueeze(1)).astype(probs.dtype)
    losses = -(is_same * probs.log() + (1 - is_same) * (1 - probs).log())
    return paddle.triu(losses, diagonal=1).sum() / (size * (size - 1) / 2)
