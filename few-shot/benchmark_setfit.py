"""Train SetFit on a handful of labelled texts and measure it on others: a peer to compare few-shot/ with.

    python -m venv .venv-setfit && .venv-setfit/bin/pip install -r few-shot/requirements-setfit.txt
    .venv-setfit/bin/python few-shot/benchmark_setfit.py --model_name_or_path folder --label_file data/label.txt \\
        --train_file data/train.txt --test_file data/test.txt --max_steps 150 --output setfit.json

Reads files of lines text<TAB>label, a file of lines `label` or `label==word` (SetFit has no use for the word) and a Hugging
Face encoder, whose token states are averaged into a text's vector. Writes one JSON object to --output. The method is SetFit's
with its defaults: the encoder learns from pairs of texts (same label: cosine 1, else 0; as many of each), then logistic
regression learns the labels from the vectors. No network is needed; OMP_NUM_THREADS sets the number of threads.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports: a wrong path must not become a download

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from setfit import SetFitModel, Trainer, TrainingArguments  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import accuracy_score, f1_score  # noqa: E402

PACKAGES = ("setfit", "sentence-transformers", "transformers", "torch", "scikit-learn")


def fail(message):
    print(message, file=sys.stderr)
    sys.exit(2)


def read_lines(path):
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            return file.read().replace("\r\n", "\n").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: cannot be read: {error}")


def read_labelled(path, labels):
    """Texts and the positions of their labels in labels."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        text, _, label = line.partition("\t")
        if label not in labels:
            fail(f"{path}:{number}: label {label!r} is not in the label file, expected text<TAB>label")
        rows.append((text, labels.index(label)))
    return map(list, zip(*rows))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name in ("model_name_or_path", "train_file", "test_file", "label_file"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--max_steps", type=int, default=150, help="steps of the encoder's training")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs of texts in a step")
    parser.add_argument("--learning_rate", type=float, default=2e-5, help="of the encoder")
    parser.add_argument("--max_seq_length", type=int, default=64, help="tokens")
    parser.add_argument("--seed", type=int, default=42, help="order of the pairs, dropout")
    parser.add_argument("--output", default="setfit.json", help="file of the results")
    args = parser.parse_args()
    if not os.path.isdir(args.model_name_or_path):
        parser.error(f"--model_name_or_path {args.model_name_or_path}: not found, expected a folder")
    return args


def main():
    args = parse_arguments()
    labels = [line.split("==")[0] for line in read_lines(args.label_file)]
    (texts, label_ids), (test_texts, test_ids) = (read_labelled(path, labels) for path in (args.train_file, args.test_file))
    encoder = SentenceTransformer(args.model_name_or_path, device="cpu", model_kwargs={"dtype": torch.float32})
    encoder.max_seq_length = args.max_seq_length
    model = SetFitModel(encoder, LogisticRegression(random_state=args.seed))
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(folder, batch_size=args.batch_size, max_steps=args.max_steps, seed=args.seed,
                                    body_learning_rate=args.learning_rate, save_strategy="no", report_to="none")
        start, cpu_start = time.perf_counter(), time.process_time()
        Trainer(model, options, Dataset.from_dict({"text": texts, "label": label_ids})).train()
    trained, cpu_trained = time.perf_counter(), time.process_time()
    predicted = model.predict(test_texts, batch_size=32, as_numpy=True)
    results = {"accuracy": accuracy_score(test_ids, predicted),
               "macro_f1": f1_score(test_ids, predicted, labels=range(len(labels)), average="macro", zero_division=0),
               "train_seconds": trained - start, "train_cpu_seconds": cpu_trained - cpu_start,
               "predict_seconds": time.perf_counter() - trained, "threads": torch.get_num_threads(), **vars(args),
               "versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    with open(args.output + ".part", "w", encoding="utf-8") as file:
        json.dump(results, file, ensure_ascii=False, indent=2)
    os.replace(args.output + ".part", args.output)
    print(f"accuracy {results['accuracy']:.4f}, macro-F1 {results['macro_f1']:.4f}, {results['train_seconds']:.0f} s of training")


if __name__ == "__main__":
    main()
