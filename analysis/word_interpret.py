"""Show which words of a text made the model predict what it predicts.

    python analysis/word_interpret.py --dataset_dir data --params_path ./checkpoint --interpret_input_file bad_case.txt
    python analysis/word_interpret.py --dataset_dir data --interpret_input_file data/dev.txt --interpreter gradshap --faithfulness

Reads   interpret_input_file (one to three columns: text, label, prediction; bad_case.txt of evaluate.py as it is), label.txt in
        dataset_dir, params_path (made by train.py). The prediction is made anew by the model.
Writes  html_file (a self-contained page, words shaded by attribution), output_file (JSON lines: text, label, prediction,
        probability, words: [[word, start, end, attribution], ...]) and a table of the key words on standard output. Offsets
        count characters; the attribution of a word beyond max_seq_length is null.
"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import TokenizedTexts, pad_batch, read_labels, softmax, sorted_batches, tokenize
from textcls.checkpoints import load_checkpoint
from textcls.device import select_device
from textcls.errors import Problems, UserError, run_script
from textcls.inference import predict_logits
from textcls.log import get_logger, progress_bar
from textcls.options import add_model_options, find_label_file, positive_int, seed_number
from textcls.outputs import check_outputs, complete_file
from analysis.parts.texts_to_explain import read_rows
from analysis.parts.trustai_setup import import_trustai, interpreted_model, prepare_interpretdl
from analysis.parts.words import join_words, locate_tokens, split_words

STEPS = {"ig": 50, "lime": 500, "gradshap": 20, "attention": 1}
RANDOM_DRAWS = 5


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--seed", type=seed_number, default=3, help="seed of lime, gradshap and --faithfulness")
    parser.add_argument("--interpreter", choices=list(STEPS), default="ig",
                        help="ig: integrated gradients; lime; gradshap; attention: of the last layer")
    parser.add_argument("--steps", type=positive_int,
                        help="ig: steps of the integral; lime: changed copies of each text (at least 4 per token); gradshap: "
                             f"random points; None: {STEPS['ig']}, {STEPS['lime']}, {STEPS['gradshap']}")
    parser.add_argument("--interpret_input_file", default="bad_case.txt",
                        help="texts to explain, with or without label and prediction, tab-separated")
    parser.add_argument("--key_words_num", type=positive_int, default=5, help="how many key words to name per text")
    parser.add_argument("--html_file", default="word_interpret.html", help="where the page goes")
    parser.add_argument("--output_file", default="word_interpret.jsonl", help="where the attributions of all words go")
    parser.add_argument("--faithfulness", action="store_true",
                        help="also measure what deleting the key words does to the probability, next to deleting random words")
    return parser.parse_args()


# ---------------------------------------------------------------- attributions


def interpret(checkpoint, texts, interpreter="ig", batch_size=32, steps=None, seed=3):
    """Explain the model's own prediction for each text.

    checkpoint: of `load_checkpoint`; texts: list of str; interpreter: ig, lime, gradshap or attention; batch_size: texts, steps
    or copies run at once; steps: see --steps, None takes STEPS. Leaves the model as it was.
    Returns a list of dicts in the order of the texts: {"prediction": class id, "probability": 0 to 1, "words": [(word, start,
    end, attribution), ...]}. A positive attribution speaks for the predicted class; its unit is probability for ig, gradshap
    and lime; attention is a share, never negative. It is None for words that max_seq_length cuts off. Raises UserError.
    """
    located = [locate_tokens(checkpoint, text) for text in texts]
    tokens = tokenize(texts, checkpoint.encode)
    with progress_bar(len(texts), "Predicting") as progress:
        probs = softmax(predict_logits(checkpoint, tokens, batch_size, progress))
    classes = probs.argmax(axis=1)
    values = attribute_tokens(checkpoint, [ids for ids, _, _ in located], classes, interpreter, batch_size, steps, seed)
    return [{"prediction": int(label), "probability": float(row[label]),
             "words": join_words(text, split_words(text), offsets, attributions[1:-1], is_cut)}
            for text, label, row, (_, offsets, is_cut), attributions in zip(texts, classes, probs, located, values)]


def attribute_tokens(checkpoint, rows, classes, interpreter="ig", batch_size=32, steps=None, seed=3):
    """Attributions of all tokens, special ones included, to the probability of a class.

    rows: lists of token ids; classes: int64 [num_texts]; the rest as of `interpret`.
    Returns a list of float [num_tokens]. The methods are TrustAI's:
    - ig: integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365) from word embeddings of zero; the sum is the
      probability of the class less that of the baseline;
    - lime (Ribeiro et al. 2016, arXiv:1602.04938): tokens become [UNK] at random, a linear model is fitted to the outcome;
      [CLS] and [SEP] always stay, since a text without them is none;
    - gradshap (Lundberg and Lee 2017, arXiv:1705.07874): gradients at random points between zero and noisy word embeddings;
    - attention: what [CLS] pays each token in the last layer, mean of the heads' scores, 0 to 1. It has no direction.
    """
    from textcls.paddle_setup import paddle

    trustai = import_trustai()
    model, steps = checkpoint.model, steps or STEPS[interpreter]
    values = [None] * len(rows)
    with interpreted_model(model) as wrapped:
        if interpreter == "ig":
            explain = functools.partial(trustai.IntGradInterpreter(wrapped, batch_size=batch_size), steps=steps)
        elif interpreter == "lime":
            def explain(inputs, labels):
                copies = max(steps, 4 * inputs[0].shape[1])  # fewer than tokens would leave the linear model undetermined
                predict = functools.partial(_predict_copies, checkpoint, batch_size, inputs[0].numpy()[0])
                return trustai.LIMEInterpreter(wrapped, checkpoint.tokenizer.unk_token_id, random_seed=seed, batch_size=copies,
                                               predict_fn=predict)(inputs, labels, num_samples=copies)
        elif interpreter == "gradshap":
            prepare_interpretdl()
            device = paddle.get_device()
            if not device.startswith(("cpu", "gpu")):
                raise UserError(f"--interpreter gradshap: does not run on {device}, expected --device cpu or gpu")
            gradshap = trustai.GradShapInterpreter(wrapped, device, n_samples=steps)

            def explain(inputs, labels):
                np.random.seed(seed)  # for every batch, so that a text's result does not depend on how many went before
                paddle.seed(seed)
                return gradshap(inputs[0].numpy())
        else:
            from trustai.interpretation.token_level.common import attention_predict_fn_on_paddlenlp

            attend = functools.partial(attention_predict_fn_on_paddlenlp, layer=model.config.num_hidden_layers - 1)
            attention = trustai.AttentionInterpreter(wrapped, predict_fn=attend)

            def explain(inputs, labels):
                with paddle.no_grad():
                    return attention(inputs)

        def finish(attributions):
            if interpreter == "attention":  # TrustAI leaves the softmax out and sums the heads: scores of any sign and size
                return softmax(attributions[None] / model.config.num_attention_heads)[0]
            return attributions

        one_by_one = interpreter in ("ig", "lime")  # TrustAI fills their batches from a single text
        with progress_bar(len(rows), "Interpreting") as progress:
            for batch in sorted_batches([len(row) for row in rows], 1 if one_by_one else batch_size):
                ids = paddle.to_tensor(pad_batch([rows[index] for index in batch], checkpoint.pad_id))
                for index, result in zip(batch, explain((ids,), labels=classes[batch])):
                    values[index] = finish(np.asarray(result.attributions, dtype=np.float64)[:len(rows[index])])
                progress.update(len(batch))
    return values


def _predict_copies(checkpoint, batch_size, original, inputs):
    """LIME's model: the changed copies of one text -> (classes, probabilities float32 [num_copies, num_classes]).

    original: int64 [num_tokens]; inputs: a tuple of one tensor int64 [num_copies, num_tokens]. Equal copies, of which a short
    text has many, are run once.
    """
    copies = inputs[0].numpy().astype(np.int32)
    copies[:, [0, -1]] = original[[0, -1]]
    copies, places = np.unique(copies, axis=0, return_inverse=True)
    tokens = TokenizedTexts(copies.ravel(), np.arange(len(copies) + 1) * len(original))
    probs = softmax(predict_logits(checkpoint, tokens, batch_size))[places.ravel()]
    return probs.argmax(axis=1), probs


def find_key_words(words, count):
    """Indices of the `count` words that speak most for the prediction, first the strongest; words cut off are none.

    words: as `interpret` gives them.
    """
    seen = [index for index, word in enumerate(words) if word[3] is not None]
    return sorted(seen, key=lambda index: -words[index][3])[:count]


# ---------------------------------------------------------------- faithfulness


def measure_faithfulness(checkpoint, texts, results, count, batch_size=32, seed=3):
    """Comprehensiveness and sufficiency (ERASER, DeYoung et al. 2020, arXiv:1911.03429) of the key words.

    Comprehensiveness: how much the probability of the prediction falls when the `count` key words are deleted (higher is
    better); sufficiency: how much when all others are (lower is better). random_*: the same for as many random words, mean of
    RANDOM_DRAWS draws, and the standard deviation between the draws. Only texts of more than `count` words count.
    results: of `interpret` for these texts. Returns a dict; {"texts": 0} where no text is long enough.
    """
    generator = np.random.RandomState(seed)
    variants, classes = [], []
    for text, result in zip(texts, results):
        words = result["words"]
        seen = {index for index, word in enumerate(words) if word[3] is not None}
        if len(seen) <= count:
            continue
        chosen = [set(find_key_words(words, count))]
        chosen += [set(generator.permutation(sorted(seen))[:count].tolist()) for _ in range(RANDOM_DRAWS)]
        variants += [_keep(text, words, seen)]
        variants += [_keep(text, words, kept) for choice in chosen for kept in (seen - choice, choice)]
        classes.append(result["prediction"])
    if not classes:
        return {"texts": 0}
    tokens = tokenize(variants, checkpoint.encode)
    with progress_bar(len(tokens), "Deleting words") as progress:
        probs = softmax(predict_logits(checkpoint, tokens, batch_size, progress))
    # [num_texts, 1 + 2 * (1 + RANDOM_DRAWS)]: the class's probability for the whole text, then without and with each choice only
    probs = probs.reshape(len(classes), -1, len(checkpoint.labels))[np.arange(len(classes)), :, classes]
    falls = (probs[:, :1] - probs[:, 1:]).mean(axis=0)
    summary = {"texts": len(classes), "probability": float(probs[:, 0].mean())}
    for place, name in enumerate(("comprehensiveness", "sufficiency")):
        draws = falls[2 + place::2]
        summary[name] = float(falls[place])
        summary[f"random_{name}"], summary[f"random_{name}_std"] = float(draws.mean()), float(draws.std())
    return summary


def _keep(text, words, kept):
    """The text with only the words whose indices are in `kept`, and the blanks between words."""
    parts, position = [], 0
    for index, (word, start, end, _) in enumerate(words):
        parts += [text[position:start], word if index in kept else ""]
        position = end
    return "".join(parts).strip()


def log_faithfulness(summary, interpreter, count):
    info = get_logger().info
    if not summary["texts"]:
        get_logger().warning(f"No faithfulness: no text has more than {count} words, expected a smaller --key_words_num.")
        return
    info(f"Faithfulness of {interpreter} at {count} words | texts of more than {count} words: {summary['texts']} | "
         f"mean probability of the prediction: {summary['probability']:.4f}")
    for name, better in (("comprehensiveness", "higher"), ("sufficiency", "lower")):
        info(f"{name.capitalize()} ({better} is better): {summary[name]:.4f} | random words: {summary[f'random_{name}']:.4f} "
             f"(standard deviation of {RANDOM_DRAWS} draws: {summary[f'random_{name}_std']:.4f})")


# ---------------------------------------------------------------- outputs


def print_table(rows, results, labels, count):
    """Print label, prediction, probability, key words with their attributions, and text, tab-separated."""
    if sys.stdout is None:
        return
    sys.stdout.reconfigure(encoding="utf-8")
    print("Label\tPrediction\tProbability\tKey words\tText")
    for row, result in zip(rows, results):
        words = [result["words"][index] for index in find_key_words(result["words"], count)]
        print(row.label or "-", labels[result["prediction"]], f"{result['probability']:.4f}",
              " ".join(f"{word}({value:+.3f})" for word, _, _, value in words), row.text, sep="\t")


def write_lines(path, rows, results, labels):
    """Write one JSON object per text."""
    with complete_file(path, newline="\n") as output:
        for row, result in zip(rows, results):
            words = [[*word[:3], None if word[3] is None else round(word[3], 6)] for word in result["words"]]
            output.write(json.dumps({"text": row.text, "label": row.label, "prediction": labels[result["prediction"]],
                                     "probability": round(result["probability"], 6), "words": words}, ensure_ascii=False) + "\n")


def make_segments(text, words):
    """What the macro `shaded` of words_macros.html shows: dicts of blanks (before the word), word, value and shade (-1 to 1).

    words: as of `interpret`. The shades of a text are its attributions by the strongest of them.
    """
    position, segments = 0, []
    strongest = max((abs(value) for *_, value in words if value), default=0) or 1  # all zero: nothing is shaded
    for word, start, end, value in words:
        segments.append({"blanks": text[position:start], "word": word, "value": value,
                         "shade": 0 if value is None else value / strongest})
        position = end
    return segments


def make_page(rows, results, labels, count, **about):
    """The page as a string. rows: of `read_rows`; about: interpreter, params_path."""
    import jinja2

    cases = [{"label": row.label, "prediction": labels[result["prediction"]], "probability": result["probability"],
              "segments": make_segments(row.text, result["words"]),
              "key_words": [result["words"][index] for index in find_key_words(result["words"], count)]}
             for row, result in zip(rows, results)]
    loader = jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__)))
    return jinja2.Environment(loader=loader, autoescape=True).get_template("word_interpret_template.html").render(
        cases=cases, about=about)


def main():
    args = parse_arguments()
    label_path = find_label_file(args)
    inputs = [args.interpret_input_file, label_path, args.params_path]
    check_outputs([args.html_file, args.output_file], inputs, args.dataset_dir)
    if args.interpreter == "gradshap":
        prepare_interpretdl()  # where it is missing, before slow work
    select_device(args.device)
    problems, rows = Problems(), None
    if os.path.isfile(label_path):
        labels = read_labels(label_path, problems)
        rows = read_rows(args.interpret_input_file, [] if problems.count else labels, problems)  # may be a pipe: read once
    checkpoint = load_checkpoint(args.params_path, label_path, args.max_seq_length)
    if rows is None:
        rows = read_rows(args.interpret_input_file, checkpoint.labels)
    texts = [row.text for row in rows]
    get_logger().info("Start word level interpretation, it will take some time...")
    results = interpret(checkpoint, texts, args.interpreter, args.batch_size, args.steps, args.seed)
    print_table(rows, results, checkpoint.labels, args.key_words_num)
    if args.faithfulness:
        summary = measure_faithfulness(checkpoint, texts, results, args.key_words_num, args.batch_size, args.seed)
        log_faithfulness(summary, args.interpreter, args.key_words_num)
    write_lines(args.output_file, rows, results, checkpoint.labels)
    get_logger().info(f"Attributions of the words saved in {args.output_file}")
    page = make_page(rows, results, checkpoint.labels, args.key_words_num, interpreter=args.interpreter,
                     params_path=args.params_path)
    with complete_file(args.html_file, newline="\n") as output:
        output.write(page)
    get_logger().info(f"Page saved in {args.html_file}")


if __name__ == "__main__":
    run_script(main)
