"""Losses to train with."""

from textcls.paddle_setup import paddle


class ClassificationLoss(paddle.nn.Layer):
    """Cross entropy, optionally focal (Lin et al. 2017, arXiv:1708.02002), class-weighted and label-smoothed.

    The mean over a batch is weighted by the weight of each text's own class. class_weights: float32 [num_classes] or None.
    """

    def __init__(self, class_weights=None, focal_gamma=0.0, label_smoothing=0.0):
        super().__init__()
        self.class_weights = None if class_weights is None else paddle.to_tensor(class_weights)
        self.focal_gamma, self.label_smoothing = focal_gamma, label_smoothing

    def forward(self, logits, labels):
        """logits: float32 [batch, num_classes]; labels: int64 [batch]. Returns a scalar."""
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
