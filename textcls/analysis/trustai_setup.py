"""What TrustAI 0.1.12, and interpretdl 0.8.0 for GradShap, need on Paddle 2.6.2 and PaddleNLP 2.8.1: every workaround, once.

Each function says what goes wrong without it and when it can go. Scripts import TrustAI through `import_trustai`.
"""

import contextlib
import functools
import importlib
import io
import sys
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from textcls.analysis.gradients import find_word_embeddings, without_weight_gradients
from textcls.common.errors import UserError

if TYPE_CHECKING:
    from paddle import Tensor
    from paddle.nn import Layer


@functools.cache
def import_trustai() -> types.ModuleType:
    """Import and return `trustai.interpretation`.

    - paddle.fluid: TrustAI takes `matmul(alpha=)` and `where` from paddle.fluid.layers, which Paddle 2.5 removed
      ("No module named 'paddle.fluid'"). A module with these two functions stands in while TrustAI is imported, and is taken
      away again, since other libraries ask for paddle.fluid to recognise an old Paddle. Can go when TrustAI does without.
    - Ridge: TrustAI's LIME calls `Ridge(alpha=0, normalize=True)`, an argument that scikit-learn 1.2 removed (TypeError; 1.1
      warns of it). Without a penalty (alpha=0) and with more rows than columns, scaling the columns does not change the
      solution, so it is left out. Can go when TrustAI does.
    """
    from textcls.models.paddle_setup import paddle, quiet_import

    def matmul(x: "Tensor", y: "Tensor", transpose_x: bool = False, transpose_y: bool = False, alpha: float = 1.0) -> "Tensor":
        return alpha * paddle.matmul(x, y, transpose_x, transpose_y)

    fluid, layers = types.ModuleType("paddle.fluid"), types.ModuleType("paddle.fluid.layers")
    vars(fluid).update(layers=layers)
    vars(layers).update(matmul=matmul, where=paddle.nonzero)
    stand_ins = {"paddle.fluid": fluid, "paddle.fluid.layers": layers}
    sys.modules.update(stand_ins)
    try:
        with quiet_import():
            interpretation = importlib.import_module("trustai.interpretation")
    except ImportError as error:
        raise UserError(f"TrustAI cannot be imported ({error}), expected the packages that README.md, sections 2.2 and "
                        "2.3, installs") from None
    finally:
        for name in stand_ins:
            del sys.modules[name]
    lime = importlib.import_module("trustai.interpretation.token_level.method.lime")
    ridge = lime.Ridge
    vars(lime)["Ridge"] = lambda normalize=None, **options: ridge(**options)
    return interpretation


@functools.cache
def prepare_interpretdl() -> None:
    """Make interpretdl ready for TrustAI's GradShap; UserError where it is not installed.

    - Its import prints "Warning: Paddle should be installed before using some Interpreters." on standard output: one of its
      own modules fails to import on Paddle 2.6, one that GradShap does not use. Can go when interpretdl imports whole.
    - GradShapNLPInterpreter calls `self._paddle_env_setup`, which interpretdl 0.8.0 no longer has (AttributeError). All it did
      was choose the device and set eval mode, which TrustAI has done. Can go when interpretdl has either both or neither.
    """
    from textcls.models.paddle_setup import quiet_import

    try:
        with quiet_import(), contextlib.redirect_stdout(io.StringIO()):
            from interpretdl import GradShapNLPInterpreter
    except ImportError as error:
        raise UserError(f"--interpreter gradshap: interpretdl cannot be imported ({error}), expected "
                        "the packages that README.md, sections 2.2 and 2.3, installs with --no-deps") from None
    if not hasattr(GradShapNLPInterpreter, "_paddle_env_setup"):
        GradShapNLPInterpreter._paddle_env_setup = lambda self: None


class InterpretedModel:
    """A PaddleNLP classifier in the shape that TrustAI expects: made by `interpreted_model`.

    - ernie: TrustAI's attention code reads `paddle_model.ernie.config[...]`; a BERT or ERNIE-M has `bert` or `ernie_m`.
    - calls: interpretdl 0.8.0 reads `.grad` of an inner tensor, which Paddle 2.4 and later keep only where asked to (the
      gradient is None: TypeError). A hook registered at the call runs after interpretdl's own and asks. Can go when
      interpretdl calls `retain_grads`, as TrustAI does.
    - layers: interpretdl 0.8.0 takes all whose names hold "word_embeddings", and so those inside of a prompt model's soft
      embeddings, too (whose gradient is None: TypeError). They are left out. Can go when interpretdl compares the last word.
    """

    def __init__(self, model: "Layer", embedding: "Layer") -> None:
        self.model, self.embedding, self.ernie = model, embedding, model.base_model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def named_sublayers(self) -> list[tuple[str, "Layer"]]:
        inner = set(map(id, self.embedding.sublayers()))
        return [(name, layer) for name, layer in self.model.named_sublayers() if id(layer) not in inner]

    def __call__(self, *inputs: "Tensor") -> "Tensor":
        def retain(layer: "Layer", inputs: tuple["Tensor", ...], output: "Tensor") -> None:
            if not output.stop_gradient:
                output.retain_grads()

        hook = self.embedding.register_forward_post_hook(retain)
        try:
            return self.model(*inputs)
        finally:
            hook.remove()


@contextlib.contextmanager
def interpreted_model(model: "Layer") -> Iterator[InterpretedModel]:
    """Give an InterpretedModel of a PaddleNLP sequence classifier, whose own state comes back at the end.

    Meanwhile gradients reach back to the output of `word_embeddings` and no further, since TrustAI's methods ask for no more
    and would otherwise fill a table of [vocab_size, hidden_size] at every step and add up gradients of the parameters.
    """
    def cut(layer: "Layer", inputs: tuple["Tensor", ...], output: "Tensor") -> "Tensor":
        output = output.detach()
        output.stop_gradient = False
        return output

    embedding = find_word_embeddings(model)
    hook = embedding.register_forward_post_hook(cut)
    try:
        with without_weight_gradients(model):
            yield InterpretedModel(model, embedding)
    finally:
        hook.remove()
