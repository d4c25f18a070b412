"""The model families that can be trained and deployed: everything that differs between them, in one table."""

import types
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from textcls.models.huggingface import BERT_NAMES
from textcls.models.last_layer import compute_only_read
from textcls.models.wordpiece import build_rust_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from paddle import Tensor
    from paddle.nn import Layer
    from paddlenlp.transformers import PretrainedModel


class Family(NamedTuple):
    """What has to be known of the models with one model_type."""

    classes: str  # PaddleNLP's model classes begin with it: <classes>ForSequenceClassification, <classes>ForMaskedLM
    tokenizer: str  # PaddleNLP's tokenizer class
    build_rust_tokenizer: Optional[Callable[..., "Tokenizer"]] = None  # makes its Rust twin; None: PaddleNLP's own does the work
    input_names: tuple[str, ...] = ("input_ids", "token_type_ids")  # of the exported graph
    first_position: int = 0  # number of a text's first position: so many tokens fewer fit than there are embeddings
    huggingface_names: Optional[dict[str, str]] = None  # as BERT_NAMES; None: model.safetensors cannot be read
    has_epsilon: bool = False  # its layer norms take config.layer_norm_eps (which PaddleNLP's ERNIE does not by itself)
    forward: Optional[Callable[..., Any]] = None  # takes the place of the model's own
    is_multilingual: bool = False


def _ernie_m_forward(self: "PretrainedModel", input_ids: "Tensor", attention_mask: Optional["Tensor"] = None,
                     **inputs: Any) -> Any:
    """Run ERNIE-M with the mask of its padding.

    PaddleNLP 2.8.1's own default masks id 0, which is [CLS], and attends to the padding (id 1), so that logits depend on
    the batch a text is in. Can go when ErnieMModel compares with pad_token_id.
    """
    if attention_mask is None:
        attention_mask = (input_ids != self.config.pad_token_id).astype("float32")
    return type(self).forward(self, input_ids, attention_mask=attention_mask, **inputs)

# A new family is one entry, under the model_type of its config.json, and the names of its weights in huggingface.py. The
# Chinese RoBERTa models (hfl/chinese-roberta-wwm-ext) need none: they are BERTs and say so. A RoBERTa proper would be
#     "roberta": Family("Roberta", "RobertaBPETokenizer", first_position=2, huggingface_names=ROBERTA_NAMES, has_epsilon=True)
# with BERT_NAMES and its head's names; tests/library/test_huggingface.py shows how to compare it.
FAMILIES = {
    "bert": Family("Bert", "BertTokenizer", build_rust_tokenizer, huggingface_names=BERT_NAMES, has_epsilon=True),
    "ernie": Family("Ernie", "ErnieTokenizer", build_rust_tokenizer, huggingface_names=BERT_NAMES, has_epsilon=True),
    "ernie_m": Family("ErnieM", "ErnieMTokenizer", input_names=("input_ids",), first_position=2, forward=_ernie_m_forward,
                      is_multilingual=True),
}
OTHER = Family("", "AutoTokenizer")  # as PaddleNLP's Auto classes take it, in PaddleNLP's own form only


def find_family(config: dict[str, Any]) -> Family:
    """Find the family that the content of a config.json names, or of the older model_config.json; OTHER for any other."""
    if "model_type" in config:
        return FAMILIES.get(str(config["model_type"]), OTHER)
    names = config.get("architectures") or config.get("init_class")
    name = str(names[0] if isinstance(names, list) else names)
    return next((family for family in FAMILIES.values() if name.startswith((f"{family.classes}For", f"{family.classes}Model"))),
                OTHER)


def family_of(model: "PretrainedModel") -> Family:
    """Find the family of a model."""
    return FAMILIES.get(model.config.model_type, OTHER)


def count_positions(model: "PretrainedModel") -> int:
    """Count the tokens that a model can take at most, special tokens included."""
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    return positions - family_of(model).first_position


def find_word_embeddings(model: "Layer") -> "Layer":
    """Find the layer that turns the tokens of a model of FAMILIES into vectors."""
    return next(layer for name, layer in model.named_sublayers() if name.endswith("word_embeddings"))


def prepare(model: "PretrainedModel") -> "PretrainedModel":
    """Give a model what its family needs and PaddleNLP leaves out; returns it in eval mode."""
    from textcls.models.paddle_setup import paddle

    family = family_of(model)
    if family.has_epsilon:
        for layer in model.sublayers():
            if isinstance(layer, paddle.nn.LayerNorm):
                layer._epsilon = model.config.layer_norm_eps
    if type(model).__name__ == f"{family.classes}ForSequenceClassification":
        compute_only_read(model)
    if family.forward:
        # past Layer.__setattr__, where PaddleNLP would rewrite it
        object.__setattr__(model, "forward", types.MethodType(family.forward, model))
    model.eval()
    return model
