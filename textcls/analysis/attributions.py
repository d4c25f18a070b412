"""How much each word of a text counts for the model's prediction, by one of four methods."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable, Optional

import numpy as np

from textcls.analysis.gradients import integrated_gradients
from textcls.analysis.trustai_setup import InterpretedModel, import_trustai, interpreted_model, prepare_interpretdl
from textcls.analysis.words import Explanation, Window, join_words, locate_tokens, split_words
from textcls.common.errors import UserError
from textcls.common.log import progress_bar
from textcls.common.probabilities import softmax
from textcls.data.tokens import TokenizedTexts, pad_batch, sorted_batches
from textcls.models.checkpoints import Checkpoint
from textcls.models.inference import predict_logits, predict_probs

if TYPE_CHECKING:
    from paddle import Tensor

STEPS = {"ig": 50, "lime": 500, "gradshap": 20, "attention": 1}
Explain = Callable[["Tensor", np.ndarray], list]  # token ids int64 [batch, longest], classes int64 [batch] -> TrustAI's results


def interpret(checkpoint: Checkpoint, texts: list[str], interpreter: str = "ig", batch_size: int = 32,
              steps: Optional[int] = None, seed: int = 3) -> list[Explanation]:
    """Explain the model's own prediction for each text, in the order of the texts; the model stays as it was.

    interpreter: ig, lime, gradshap or attention; batch_size: how many texts, pairs of a text and a step, or copies are run at
    once; steps: see word_interpret.py --steps, None takes STEPS.
    Of a text of several windows that one is explained which speaks most for the prediction.
    A positive attribution speaks for the predicted class; its unit is probability for ig, gradshap and lime; attention is a
    share, never negative. Raises UserError.
    """
    located = [locate_tokens(checkpoint, text) for text in texts]
    tokens = TokenizedTexts.from_windows([[window.ids for window in windows] for windows in located],
                                         checkpoint.encode.long_text.window_vote)
    probs = predict_probs(checkpoint, tokens, batch_size, "Predicting")
    classes = probs.argmax(axis=1)
    chosen = choose_windows(checkpoint, tokens, classes, located, batch_size)
    values = attribute_tokens(checkpoint, [window.ids for window in chosen], classes, interpreter, batch_size, steps, seed)
    of_text = slice(checkpoint.encode.num_before, -checkpoint.encode.num_after)
    results = []
    for text, label, row, windows, window, attributions in zip(texts, classes, probs, located, chosen, values):
        characters = (window.read[0][0], window.read[-1][1]) if len(windows) > 1 else None
        results.append(Explanation(int(label), float(row[label]), join_words(split_words(text), window, attributions[of_text]),
                                   characters))
    return results


def choose_windows(checkpoint: Checkpoint, tokens: TokenizedTexts, classes: np.ndarray, located: Sequence[Sequence[Window]],
                   batch_size: int) -> list[Window]:
    """Choose of each text the window that speaks most for its class, by the logits. tokens: of all windows; classes: int64
    [num_texts]; located: the windows of each text."""
    if tokens.owners is None:
        return [windows[0] for windows in located]
    logits = predict_logits(checkpoint, TokenizedTexts(tokens.ids, tokens.offsets), batch_size)  # of each window by itself
    ends = tokens.starts[1:-1]
    return [windows[int(rows[:, label].argmax())] for windows, rows, label in zip(located, np.split(logits, ends), classes)]


def attribute_tokens(checkpoint: Checkpoint, rows: Sequence[Sequence[int]], classes: np.ndarray, interpreter: str = "ig",
                     batch_size: int = 32, steps: Optional[int] = None, seed: int = 3) -> list[np.ndarray]:
    """Attribute the probability of a class to all tokens, special ones and a prompt's included.

    rows: lists of token ids; classes: int64 [num_texts]; the rest as of `interpret`.
    Returns a list of float64 [num_tokens]. All methods but ig are TrustAI's:
    - ig: integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365) from word embeddings of zero; the sum is the
      probability of the class less that of the baseline;
    - lime (Ribeiro et al. 2016, arXiv:1602.04938): tokens become [UNK] at random, a linear model is fitted to the outcome;
      [CLS], [SEP] and a prompt always stay, since a text without them is none;
    - gradshap (Lundberg and Lee 2017, arXiv:1705.07874): gradients at random points between zero and noisy word embeddings;
    - attention: what [CLS], or a prompt's first mask, pays each token in the last layer, mean of the heads' scores, 0 to 1. It
      has no direction.
    """
    steps = steps or STEPS[interpreter]
    if interpreter == "ig":
        return integrated_gradients(checkpoint, rows, classes, batch_size, steps)
    with interpreted_model(checkpoint.model) as wrapped:
        if interpreter == "lime":  # whose batches are filled by the copies of a single text
            return explain_batches(checkpoint, rows, classes, 1, make_lime(checkpoint, wrapped, batch_size, steps, seed))
        if interpreter == "gradshap":
            return explain_batches(checkpoint, rows, classes, batch_size, make_gradshap(wrapped, steps, seed))
        if interpreter != "attention":
            raise ValueError(f"no interpreter {interpreter!r}, expected one of {', '.join(STEPS)}")
        scores = explain_batches(checkpoint, rows, classes, batch_size, make_attention(checkpoint, wrapped))
    # TrustAI leaves the softmax out and sums the heads: scores of any sign and size
    return [softmax(row[None] / checkpoint.model.config.num_attention_heads)[0] for row in scores]


def explain_batches(checkpoint: Checkpoint, rows: Sequence[Sequence[int]], classes: np.ndarray, batch_size: int,
                    explain: Explain) -> list[np.ndarray]:
    """Attribute by a TrustAI method: returns a list of float64 [num_tokens], in the order of rows."""
    from textcls.models.paddle_setup import paddle

    values = [np.empty(0)] * len(rows)
    with progress_bar(len(rows), "Interpreting") as progress:
        for batch in sorted_batches([len(row) for row in rows], batch_size):
            input_ids = paddle.to_tensor(pad_batch([rows[index] for index in batch], checkpoint.pad_id))
            for index, result in zip(batch, explain(input_ids, classes[batch])):
                values[index] = np.asarray(result.attributions, dtype=np.float64)[:len(rows[index])]
            progress.update(len(batch))
    return values


def make_lime(checkpoint: Checkpoint, model: InterpretedModel, batch_size: int, steps: int, seed: int) -> Explain:
    """Return the `explain` of `explain_batches` for LIME, one text at a time."""
    lime_class, unknown = import_trustai().LIMEInterpreter, checkpoint.tokenizer.unk_token_id

    def explain(input_ids: "Tensor", classes: np.ndarray) -> list:
        copies = max(steps, 4 * input_ids.shape[1])  # fewer than tokens would leave the linear model undetermined
        predict = functools.partial(predict_copies, checkpoint, batch_size, input_ids.numpy()[0])
        lime = lime_class(model, unknown, random_seed=seed, batch_size=copies, predict_fn=predict)
        return lime((input_ids,), classes, num_samples=copies)

    return explain


def predict_copies(checkpoint: Checkpoint, batch_size: int, original: np.ndarray,
                   inputs: tuple["Tensor"]) -> tuple[np.ndarray, np.ndarray]:
    """Predict the changed copies of one text for LIME: classes, probabilities float32 [num_copies, num_classes].

    original: int64 [num_tokens]; inputs: a tuple of one tensor int64 [num_copies, num_tokens]. Equal copies, of which a short
    text has many, are run once.
    """
    copies = inputs[0].numpy().astype(np.int32)
    first, last = checkpoint.encode.num_before, copies.shape[1] - checkpoint.encode.num_after
    copies[:, :first], copies[:, last:] = original[:first], original[last:]
    copies, places = np.unique(copies, axis=0, return_inverse=True)
    tokens = TokenizedTexts(copies.ravel(), np.arange(len(copies) + 1) * len(original))
    probs = predict_probs(checkpoint, tokens, batch_size)[places.ravel()]
    return probs.argmax(axis=1), probs


def make_gradshap(model: InterpretedModel, steps: int, seed: int) -> Explain:
    """Return the `explain` of `explain_batches` for GradShap. UserError where it does not run."""
    from textcls.models.paddle_setup import paddle

    prepare_interpretdl()
    device = paddle.get_device()
    if not device.startswith(("cpu", "gpu")):
        raise UserError(f"--interpreter gradshap: does not run on {device}, expected --device cpu or gpu")
    gradshap = import_trustai().GradShapInterpreter(model, device, n_samples=steps)

    def explain(input_ids: "Tensor", classes: np.ndarray) -> list:
        np.random.seed(seed)  # for every batch, so that a text's result does not depend on how many went before
        paddle.seed(seed)
        return gradshap(input_ids.numpy())

    return explain


def make_attention(checkpoint: Checkpoint, model: InterpretedModel) -> Explain:
    """Return the `explain` of `explain_batches` for the attention of the last layer."""
    from textcls.models.paddle_setup import paddle

    trustai = import_trustai()
    from trustai.interpretation.token_level.common import attention_predict_fn_on_paddlenlp

    attend = functools.partial(attention_predict_fn_on_paddlenlp, layer=model.config.num_hidden_layers - 1)
    attention = trustai.AttentionInterpreter(model, predict_fn=attend)

    def explain(input_ids: "Tensor", classes: np.ndarray) -> list:
        with paddle.no_grad():
            return attention((input_ids,))

    return explain
