"""An encoder that turns texts into unit vectors, so that the cosine of two texts is the product of their vectors."""

import functools
from typing import TYPE_CHECKING, Any, Optional

from textcls.models.last_layer import compute_only_read
from textcls.models.paddle_setup import paddle

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedConfig, PretrainedModel
else:
    PretrainedModel = object  # the library's class comes in by `sentence_class`


class SentenceEncoder(PretrainedModel):
    """What makes a sequence classifier of PaddleNLP an encoder of texts; see `sentence_class`.

    config: the library's, with sentence_encoder, the entries of a checkpoints.SentenceOptions.
    """

    def __init__(self, config: "PretrainedConfig"):
        super().__init__(config)
        del self.classifier, self.dropout
        self.pooling, size = config.sentence_encoder["pooling"], config.sentence_encoder["output_emb_size"]
        self.projection = paddle.nn.Linear(config.hidden_size, size) if size else None
        self.activation = config.sentence_encoder.get("activation", "")
        self.embedding_size = size or config.hidden_size
        if self.pooling != "mean":
            compute_only_read(self)
        for parameter in self.base_model.pooler.parameters() if self.pooling != "pooler" else ():
            parameter.stop_gradient = True  # no part of the result

    def forward(self, input_ids: paddle.Tensor, token_type_ids: Optional[paddle.Tensor] = None,
                attention_mask: Optional[paddle.Tensor] = None) -> paddle.Tensor:
        """input_ids: int64 [batch, length]; token_type_ids: zeros, or None; attention_mask: where the family has one of its own.

        Returns unit vectors, float32 [batch, output_emb_size or hidden_size].
        """
        options = {"token_type_ids": token_type_ids, "attention_mask": attention_mask}
        hidden, pooled = self.base_model(input_ids, **{name: value for name, value in options.items() if value is not None})[:2]
        if self.pooling == "cls":
            pooled = hidden[:, 0]  # (batch, hidden_size)
        elif self.pooling == "mean":
            is_token = (input_ids != self.config.pad_token_id).astype("float32").unsqueeze(-1)  # (batch, length, 1)
            pooled = (hidden * is_token).sum(axis=1) / is_token.sum(axis=1)
        vectors = pooled if self.projection is None else self.projection(pooled)
        vectors = paddle.tanh(vectors) if self.activation == "tanh" else vectors
        return unit_length(vectors.astype("float32"))


def unit_length(vectors: paddle.Tensor) -> paddle.Tensor:
    """float [batch, size] -> the same directions, each of length 1."""
    return vectors / paddle.sqrt((vectors * vectors).sum(axis=-1, keepdim=True) + 1e-12)


@functools.cache
def sentence_class(classifier_class: Any) -> "type[SentenceEncoder]":
    """Make the class of the encoders made of a PaddleNLP class of classifiers (ErnieForSequenceClassification, ...)."""
    name = classifier_class.__name__.replace("SequenceClassification", "SentenceEncoding")
    return type(classifier_class)(name, (SentenceEncoder, classifier_class), {})
