"""A masked language model that classifies texts by what it would fill into a prompt's mask."""

import functools
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from textcls.data.prompts import Prompt
from textcls.models.families import prepare
from textcls.models.last_layer import compute_only_read
from textcls.models.paddle_setup import paddle

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedConfig, PretrainedModel
else:
    PretrainedModel = object  # the library's class comes in by `prompt_class`


class SoftEmbedding(paddle.nn.Layer):
    """Word embeddings followed by the trained ones of soft tokens (P-tuning: Liu et al. 2021, arXiv:2103.10385).

    table: the layer of the vocabulary's embeddings. prompt: a Prompt with num_soft > 0.
    """

    def __init__(self, table: paddle.nn.Embedding, prompt: Prompt):
        super().__init__()
        self.table = table
        self.size, hidden_size = table.weight.shape
        self.soft = self.create_parameter([prompt.num_soft, hidden_size],
                                          default_initializer=paddle.nn.initializer.Normal(std=0.02))
        self.encoder = make_soft_encoder(prompt, hidden_size)

    @property
    def weight(self) -> paddle.Tensor:
        """float32 [vocab_size, hidden_size]"""
        return self.table.weight

    def forward(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """int64 [...] -> float32 [..., hidden_size]"""
        is_soft = (input_ids >= self.size).unsqueeze(-1)
        known = self.table(paddle.clip(input_ids, max=self.size - 1))
        soft = self.encoder(self.soft.unsqueeze(0)).squeeze(0)
        return paddle.where(is_soft, paddle.nn.functional.embedding(paddle.clip(input_ids - self.size, min=0), soft), known)


class LSTMEncoder(paddle.nn.Layer):
    """Soft tokens through a bidirectional LSTM and two linear layers, so that each depends on its neighbours."""

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.lstm = paddle.nn.LSTM(hidden_size, size, num_layers=2, direction="bidirect")
        self.mlp = paddle.nn.Sequential(paddle.nn.Linear(2 * size, hidden_size), paddle.nn.Tanh(),
                                        paddle.nn.Linear(hidden_size, hidden_size))

    def forward(self, vectors: paddle.Tensor) -> paddle.Tensor:
        """float32 [1, num_vectors, hidden_size] -> the same shape"""
        return self.mlp(self.lstm(vectors)[0])


def make_soft_encoder(prompt: Prompt, hidden_size: int) -> paddle.nn.Layer:
    """Make what soft vectors go through, float32 [1, num_vectors, hidden_size] -> the same shape.

    The first dimension is for Paddle Inference 2.6.2, which ends with a segmentation fault (in its repeated_fc_relu_fuse_pass)
    where a graph's linear layers begin with a parameter of two dimensions.
    """
    size = prompt.encoder_size or hidden_size
    if prompt.encoder == "lstm":
        return LSTMEncoder(hidden_size, size)
    if prompt.encoder == "mlp":
        return paddle.nn.Sequential(paddle.nn.Linear(hidden_size, size), paddle.nn.Tanh(), paddle.nn.Linear(size, hidden_size))
    return paddle.nn.Identity()


class Prefix(paddle.nn.Layer):
    """Trained keys and values before those of each layer (prefix tuning: Li and Liang 2021, arXiv:2101.00190)."""

    def __init__(self, prompt: Prompt, config: "PretrainedConfig"):
        super().__init__()
        self.shape = [prompt.prefix_length, config.num_hidden_layers, 2, config.num_attention_heads,
                      config.hidden_size // config.num_attention_heads]
        width = 2 * config.num_hidden_layers * config.hidden_size
        start = paddle.nn.initializer.Normal(std=0.02)
        self.vectors = self.create_parameter([prompt.prefix_length, config.hidden_size if prompt.encoder else width],
                                             default_initializer=start)
        self.encoder = paddle.nn.Sequential(make_soft_encoder(prompt, config.hidden_size),
                                            paddle.nn.Linear(config.hidden_size, width)) if prompt.encoder else None

    def forward(self, batch_size: paddle.Tensor) -> list[tuple[paddle.Tensor, paddle.Tensor]]:
        """Give the cache of each layer: (keys, values), float32 [batch, heads, prefix_length, head_size] both."""
        vectors = self.vectors if self.encoder is None else self.encoder(self.vectors.unsqueeze(0)).squeeze(0)
        layers = vectors.reshape(self.shape).transpose([1, 2, 3, 0, 4])  # (layers, 2, heads, prefix_length, head_size)
        length, count, _, heads, head_size = self.shape
        wanted = [batch_size, heads, length, head_size]
        return [(layers[index, 0].expand(wanted), layers[index, 1].expand(wanted)) for index in range(count)]


class PromptClassifier(PretrainedModel):
    """What makes a masked LM of PaddleNLP a classifier; see `prompt_class`.

    logits = classifier(features); features: the states at the masks after the masked LM's own transform.

    config: the library's, with prompt (a Prompt as dict) and num_labels. Soft tokens and prefixes are learnt with the
    rest; the decoder of the masked LM is gone, but for the rows that `init_classifier` has taken from it.
    """

    def __init__(self, config: "PretrainedConfig"):
        super().__init__(config)
        self.prompt = prompt = Prompt(**config.prompt)
        head = self.cls.predictions
        del head.decoder, head.decoder_bias
        for parameter in self.base_model.pooler.parameters():
            parameter.stop_gradient = True  # no part of the result
        if prompt.num_soft:
            embeddings = self.base_model.embeddings
            embeddings.word_embeddings = SoftEmbedding(embeddings.word_embeddings, prompt)
        self.selection = compute_only_read(self)
        self.prefix = Prefix(prompt, config) if prompt.prefix_length else None
        self.classifier = paddle.nn.Linear(prompt.num_masks * config.hidden_size, config.num_labels)
        self.has_dropout_frozen = False

    def get_output_embeddings(self) -> None:
        return None  # nothing is tied

    def freeze(self, with_dropout: bool = False) -> None:
        """Train nothing but classifier, soft tokens and prefix from now on. with_dropout: drop nothing out, either."""
        own = {id(parameter) for parameter in self.prompt_parameters()}
        for parameter in self.parameters():
            parameter.stop_gradient = id(parameter) not in own
        self.has_dropout_frozen = with_dropout

    def prompt_parameters(self) -> list[paddle.Tensor]:
        """List the parameters that are no part of the pretrained model."""
        return [parameter for name, parameter in self.named_parameters()
                if name.startswith(("classifier.", "prefix.")) or ".word_embeddings.soft" in name
                or ".word_embeddings.encoder" in name]

    def train(self) -> None:
        super().train()
        if self.has_dropout_frozen:
            self.eval()

    def forward(self, input_ids: paddle.Tensor, token_type_ids: Optional[paddle.Tensor] = None,
                with_features: bool = False) -> paddle.Tensor:
        """input_ids: int64 [batch, length], texts in the prompt; token_type_ids: zeros, or None, to which the prompt's
        own are added.

        Returns logits, float32 [batch, num_labels]; with_features: with the classifier's input after them, of `encode`.
        """
        features = self.encode(input_ids, token_type_ids)
        logits = self.classifier(features)
        return paddle.concat([logits, features], axis=1) if with_features else logits

    def encode(self, input_ids: paddle.Tensor, token_type_ids: Optional[paddle.Tensor] = None) -> paddle.Tensor:
        """Return what the masked LM's transform makes of the masks' states, float32 [batch, num_masks * hidden_size]."""
        options: dict[str, Any] = {}
        if self.prompt.types is not None:
            types = self.find_types(input_ids)
            token_type_ids = types if token_type_ids is None else token_type_ids + types
        if token_type_ids is not None:
            options["token_type_ids"] = token_type_ids
        if self.prefix is not None:
            options.update(self.prefix_options(self.prefix, input_ids))
        is_mask = (input_ids == self.prompt.mask_id).astype("int64").unsqueeze(1)  # (batch, 1, length)
        if self.prompt.num_masks > 1:
            numbers = paddle.arange(1, self.prompt.num_masks + 1).reshape([1, -1, 1])
            is_mask = is_mask * (paddle.cumsum(is_mask, axis=2) == numbers).astype("int64")  # (batch, masks, length)
        self.selection.weights = is_mask.astype(paddle.get_default_dtype())
        states = self.base_model(input_ids, **options)[0]  # (batch, masks, hidden_size)
        head = self.cls.predictions
        return head.layer_norm(head.activation(head.transform(states))).flatten(1)

    def prefix_options(self, prefix: Prefix, input_ids: paddle.Tensor) -> dict[str, Any]:
        """Make what the encoder is given so that its layers see the prefix and the texts' positions begin at 0 as ever."""
        ones = paddle.ones_like(input_ids)
        is_token = (input_ids != self.config.pad_token_id).astype("float32")
        # PaddleNLP 2.8.1's own mask takes the batch's size for a constant when a graph is traced
        seen = paddle.concat([paddle.ones_like(is_token[:, :1])] * self.prompt.prefix_length + [is_token], axis=1)
        return {"past_key_values": prefix(paddle.shape(input_ids)[0]), "attention_mask": seen,
                "position_ids": paddle.cumsum(ones, axis=1) - ones}

    def find_types(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """Find the token types of texts in the prompt: int64 [batch, length]."""
        before, text, after = self.prompt.types or ([], 0, [])
        positions = paddle.cumsum(paddle.ones_like(input_ids), axis=1) - 1
        is_token = input_ids != self.config.pad_token_id
        to_end = is_token.astype("int64").sum(axis=1, keepdim=True) - positions  # 1 at the last token
        types = paddle.full_like(input_ids, text)
        for index, kind in enumerate(before):
            types = paddle.where(positions == index, paddle.full_like(types, kind), types)
        for index, kind in enumerate(after):
            types = paddle.where(to_end == len(after) - index, paddle.full_like(types, kind), types)
        return paddle.where(is_token, types, paddle.zeros_like(types))


@functools.cache
def prompt_class(masked_lm_class: Any) -> type[PromptClassifier]:
    """Make the class of the prompt models from a PaddleNLP class of masked LMs (ErnieForMaskedLM, BertForMaskedLM)."""
    name = masked_lm_class.__name__.replace("MaskedLM", "PromptClassification")
    return type(masked_lm_class)(name, (PromptClassifier, masked_lm_class), {})


def make_prompt_model(masked_lm: "PretrainedModel", prompt: Prompt, word_ids: list[list[list[int]]],
                      starts: list[Optional[int]], labels: list[str]) -> "PretrainedModel":
    """Make a prompt model of a masked LM, in eval mode; the masked LM must not be used any more.

    word_ids: for each class its words, each as token ids; starts: of `compile_template`.
    """
    config = masked_lm.config
    config.prompt, config.num_labels = prompt._asdict(), len(labels)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: index for index, label in enumerate(labels)}
    decoder = masked_lm.cls.predictions.decoder
    rows, bias = decoder.weight.numpy(), decoder.bias.numpy()
    state = masked_lm.state_dict()
    model_class: Any = type(masked_lm)
    model = prompt_class(model_class)(config)
    for name, parameter in model.state_dict().items():
        source = state.get(name.replace("word_embeddings.table.", "word_embeddings."))
        if source is not None:
            parameter.set_value(source)
    init_classifier(model, rows, bias, word_ids)
    if starts:
        soft = model.base_model.embeddings.word_embeddings.soft
        values = soft.numpy()
        for index, token in enumerate(starts):
            values[index] = values[index] if token is None else rows[token]
        soft.set_value(values)
    return prepare(model)


def init_classifier(model: PromptClassifier, rows: np.ndarray, bias: np.ndarray, word_ids: list[list[list[int]]]) -> None:
    """Let the classifier begin as the masked LM's own guess of the label words: logits are mean logits of their tokens.

    rows, bias: of the decoder, float32 [vocab_size, hidden_size] and [vocab_size]. A word of as many tokens as there are masks
    has one for each; of any other, all its tokens count at every mask. Words of a class are averaged (WARP: Hambardzumyan et al.
    2021, arXiv:2101.00121, of one mask and one token).
    """
    masks, (hidden_size, num_labels) = model.prompt.num_masks, (rows.shape[1], len(word_ids))
    weight, offset = np.zeros((masks, hidden_size, num_labels), np.float32), np.zeros(num_labels, np.float32)
    for label, words in enumerate(word_ids):
        for tokens in words:
            for mask in range(masks):
                chosen = [tokens[mask]] if len(tokens) == masks else tokens
                weight[mask, :, label] += rows[chosen].mean(axis=0) / (masks * len(words))
                offset[label] += bias[chosen].mean() / (masks * len(words))
    model.classifier.weight.set_value(weight.reshape(masks * hidden_size, num_labels))
    model.classifier.bias.set_value(offset)
