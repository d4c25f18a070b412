"""Whether the key words of an explanation matter to the model: what deleting them does to its answer."""

import numpy as np

from textcls.analysis.words import Explanation, Word, find_key_words
from textcls.common.log import get_logger
from textcls.data.tokens import tokenize
from textcls.models.checkpoints import Checkpoint
from textcls.models.inference import predict_probs

RANDOM_DRAWS = 5


def measure_faithfulness(checkpoint: Checkpoint, texts: list[str], results: list[Explanation], count: int,
                         batch_size: int = 32, seed: int = 3) -> dict[str, float]:
    """Measure comprehensiveness and sufficiency (ERASER, DeYoung et al. 2020, arXiv:1911.03429) of the key words.

    Comprehensiveness: how much the probability of the prediction falls when the `count` key words are deleted (higher is
    better); sufficiency: how much when all others are (lower is better). random_*: the same for as many random words, mean of
    RANDOM_DRAWS draws, and the standard deviation between the draws. Only texts of more than `count` words count.
    results: of `interpret` for these texts. Returns a dict; {"texts": 0} where no text is long enough.
    """
    generator = np.random.RandomState(seed)
    variants, classes = [], []
    for text, result in zip(texts, results):
        words = result.words
        seen = {index for index, word in enumerate(words) if word.attribution is not None}
        if len(seen) <= count:
            continue
        chosen = [set(find_key_words(words, count))]
        chosen += [set(generator.permutation(sorted(seen))[:count].tolist()) for _ in range(RANDOM_DRAWS)]
        variants += [keep_words(text, words, seen)]
        variants += [keep_words(text, words, kept) for choice in chosen for kept in (seen - choice, choice)]
        classes.append(result.prediction)
    if not classes:
        return {"texts": 0}
    tokens = tokenize(variants, checkpoint.encode)
    probs = predict_probs(checkpoint, tokens, batch_size, "Deleting words")
    # [num_texts, 1 + 2 * (1 + RANDOM_DRAWS)]: the class's probability for the whole text, then without and with each choice only
    probs = probs.reshape(len(classes), -1, len(checkpoint.labels))[np.arange(len(classes)), :, classes]
    falls = (probs[:, :1] - probs[:, 1:]).mean(axis=0)
    summary = {"texts": len(classes), "probability": float(probs[:, 0].mean())}
    for place, name in enumerate(("comprehensiveness", "sufficiency")):
        draws = falls[2 + place::2]
        summary[name] = float(falls[place])
        summary[f"random_{name}"], summary[f"random_{name}_std"] = float(draws.mean()), float(draws.std())
    return summary


def keep_words(text: str, words: list[Word], kept: set[int]) -> str:
    """Return the text with only the words whose indices are in `kept`, and the blanks between words."""
    parts, position = [], 0
    for index, (word, start, end, _) in enumerate(words):
        parts += [text[position:start], word if index in kept else ""]
        position = end
    return "".join(parts).strip()


def log_faithfulness(summary: dict[str, float], interpreter: str, count: int) -> None:
    """Log what `measure_faithfulness` returned for the `count` key words of an interpreter."""
    info = get_logger().info
    if not summary["texts"]:
        get_logger().warning(f"No faithfulness: no text has more than {count} words, expected a smaller --key_words_num.")
        return
    info(f"Faithfulness of {interpreter} at {count} words | texts of more than {count} words: {summary['texts']} | "
         f"mean probability of the prediction: {summary['probability']:.4f}")
    for name, better in (("comprehensiveness", "higher"), ("sufficiency", "lower")):
        info(f"{name.capitalize()} ({better} is better): {summary[name]:.4f} | random words: {summary[f'random_{name}']:.4f} "
             f"(standard deviation of {RANDOM_DRAWS} draws: {summary[f'random_{name}_std']:.4f})")
