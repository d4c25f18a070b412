"""Show which words of a text made the model predict what it predicts.

    python analysis/word_interpret.py --dataset_dir data --params_path ./checkpoint --interpret_input_file bad_case.txt
    python analysis/word_interpret.py --dataset_dir data --interpret_input_file data/dev.txt --interpreter gradshap --faithfulness

Reads   interpret_input_file (one to three columns: text, label, prediction; bad_case.txt of evaluate.py as it is), label.txt in
        dataset_dir, params_path (made by train.py). The prediction is made anew by the model.
Writes  html_file (a self-contained page, words shaded by attribution), output_file (JSON lines: text, label, prediction,
        probability, words: [[word, start, end, attribution], ...]) and a table of the key words on standard output. Offsets
        count characters; the attribution of a word that the model has not read is null. Of a text read in several windows
        the one is explained that decided, "window": [start, end].
"""

import json

from textcls.analysis.attributions import STEPS, interpret
from textcls.analysis.faithfulness import log_faithfulness, measure_faithfulness
from textcls.analysis.pages import make_page
from textcls.analysis.texts_to_explain import read_rows
from textcls.analysis.trustai_setup import prepare_interpretdl
from textcls.analysis.words import find_key_words
from textcls.common.errors import run_script
from textcls.common.log import get_logger
from textcls.common.options import add_model_options, find_label_file, make_parser, positive_int, seed_number
from textcls.common.outputs import check_outputs, complete_file
from textcls.models.device import select_device
from textcls.models.loading import load_with_data


def parse_arguments():
    parser = make_parser(__doc__)
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


def print_table(rows, results, labels, count):
    """Print label, prediction, probability, key words with their attributions, and text, tab-separated."""
    print("Label\tPrediction\tProbability\tKey words\tText")
    for row, result in zip(rows, results):
        words = [result.words[index] for index in find_key_words(result.words, count)]
        print(row.label or "-", labels[result.prediction], f"{result.probability:.4f}",
              " ".join(f"{word.text}({word.attribution:+.3f})" for word in words), row.text, sep="\t")


def write_jsonl(path, rows, results, labels):
    """Write one JSON object per text."""
    with complete_file(path, newline="\n") as output:
        for row, result in zip(rows, results):
            words = [[*word[:3], None if word.attribution is None else round(word.attribution, 6)] for word in result.words]
            entry = {"text": row.text, "label": row.label, "prediction": labels[result.prediction],
                     "probability": round(result.probability, 6), "words": words}
            if result.window is not None:
                entry["window"] = result.window
            output.write(json.dumps(entry, ensure_ascii=False) + "\n")


def main():
    args = parse_arguments()
    inputs = [args.interpret_input_file, find_label_file(args), args.params_path]
    check_outputs([args.html_file, args.output_file], inputs, args.dataset_dir)
    if args.interpreter == "gradshap":
        prepare_interpretdl()  # where it is missing, before slow work
    select_device(args.device)
    checkpoint, rows = load_with_data(args, lambda *found: read_rows(args.interpret_input_file, *found))
    texts = [row.text for row in rows]
    get_logger().info("Start word level interpretation, it will take some time...")
    results = interpret(checkpoint, texts, args.interpreter, args.batch_size, args.steps, args.seed)
    print_table(rows, results, checkpoint.labels, args.key_words_num)
    if args.faithfulness:
        summary = measure_faithfulness(checkpoint, texts, results, args.key_words_num, args.batch_size, args.seed)
        log_faithfulness(summary, args.interpreter, args.key_words_num)
    write_jsonl(args.output_file, rows, results, checkpoint.labels)
    get_logger().info(f"Attributions of the words saved in {args.output_file}")
    page = make_page(rows, results, checkpoint.labels, args.key_words_num, interpreter=args.interpreter,
                     params_path=args.params_path)
    with complete_file(args.html_file, newline="\n") as output:
        output.write(page)
    get_logger().info(f"Page saved in {args.html_file}")


if __name__ == "__main__":
    run_script(main)
