"""Compare ways to a smaller, faster classifier: accuracy against the milliseconds of a text in deploy/predictor, as a table and a
picture.

    python benchmarks/compare_small_models.py --data_dir KUAKE_QIC --full full/export --pruned prune/width_mult_0.75 \\
        prune/width_mult_0.5 --distilled student/export --picture docs/images/small_models.png

Reads   exported folders with ONNX models, data_dir/train.txt (for TF-IDF), dev.txt and label.txt.
Prints  of each model, and of the full and the distilled one in INT8, too: megabytes of the folder without its converted models,
        accuracy on dev, milliseconds per text with tokenizing on all cores, the best of --repeats turns in new processes, and how
        many times the texts per second of the full model that is. TF-IDF: characters, logistic regression, one thread.
"""

import argparse
import os
import time
from pathlib import Path

from measuring import CORES, FILES, Turns, read_rows, start

COLOURS = {"full": "C0", "pruned": "C1", "distilled": "C2", "TF-IDF": "C3"}


def read_job(data_dir):
    """Texts and label ids of train.txt and dev.txt, for jobs."""
    train, dev, labels = (read_rows(os.path.join(data_dir, name)) for name in FILES)
    ids = {name: number for number, (name, *_) in enumerate(labels)}
    job = {"num_labels": len(ids)}
    for name, rows in (("train", train), ("dev", dev)):
        job.update({f"{name}_texts": [row[0] for row in rows], f"{name}_ids": [ids[row[1]] for row in rows]})
    return job


def time_answers(job, answer):
    """Accuracy, 0 to 1, and ms per text of a function from texts to probabilities."""
    import numpy as np

    texts = job["dev_texts"]
    probs = answer(texts)  # warms up
    seconds = time.perf_counter()
    answer(texts)
    seconds = time.perf_counter() - seconds
    return {"errors": int((probs.argmax(axis=1) != np.array(job["dev_ids"])).sum()), "ms": seconds * 1000 / len(texts)}


def serve(job):
    """Worker: an export by deploy/predictor."""
    from textcls.runtime.predictor import Predictor

    return time_answers(job, Predictor(job["exported"], dtype=job["dtype"]).probabilities)


def tfidf(job):
    """Worker: characters, TF-IDF and logistic regression."""
    import numpy as np

    from textcls.training.baseline import fit_baseline

    return time_answers(job, fit_baseline(job["train_texts"], np.array(job["train_ids"]), job["num_labels"]))


def folder_size(folder):
    """Megabytes of a deployment by ONNX Runtime: the model, the tokenizer and the small files."""
    names = [name for name in os.listdir(folder) if name.endswith((".json", ".txt", ".onnx")) and ".int8-" not in name]
    return sum(os.path.getsize(os.path.join(folder, name)) for name in names) / 1e6


def int8_size(folder):
    """The same with the INT8 model in the place of the whole one."""
    converted = next(name for name in os.listdir(folder) if ".int8-" in name)
    whole = next(name for name in os.listdir(folder) if name.endswith(".onnx") and ".int8-" not in name)
    return folder_size(folder) + (os.path.getsize(os.path.join(folder, converted)) -
                                  os.path.getsize(os.path.join(folder, whole))) / 1e6


def draw(path, rows):
    """The picture. rows: dicts of kind, name, accuracy (per cent) and ms."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=110)
    for row in rows:
        axes.plot(row["ms"], row["accuracy"], "s" if "INT8" in row["name"] else "o", color=COLOURS[row["kind"]])
        axes.annotate(row["name"], (row["ms"], row["accuracy"]), textcoords="offset points",
                      xytext=(6, -13 if "INT8" in row["name"] else 6), fontsize=8)
    axes.set(xscale="log", xlabel=f"Milliseconds per text, {CORES} cores (logarithmic)", ylabel="Accuracy on dev, %")
    axes.margins(x=0.25, y=0.15)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--full", required=True, help="export of the whole model")
    parser.add_argument("--pruned", nargs="*", default=[], help="folders of prune.py")
    parser.add_argument("--distilled", nargs="*", default=[], help="exports of students")
    parser.add_argument("--picture", help="PNG to draw")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work_dir", type=Path, default=Path("build/small_models"))
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    job = {**read_job(args.data_dir), "folder": str(args.work_dir.resolve())}
    variants = []
    for kind, folders in (("full", [args.full]), ("pruned", args.pruned), ("distilled", args.distilled)):
        for folder in folders:
            for dtype in ("fp32",) if kind == "pruned" else ("fp32", "int8"):
                own = os.path.basename(os.path.abspath(folder)).replace("width_mult_", "pruned ") if kind == "pruned" else kind
                own = f"{own} {folders.index(folder) + 1}" if kind == "distilled" and len(folders) > 1 else own
                variants.append({"kind": kind, "name": own + (" INT8" if dtype == "int8" else ""), "dtype": dtype,
                                 "exported": os.path.abspath(folder)})
    variants.append({"kind": "TF-IDF", "name": "TF-IDF", "worker": tfidf})
    turns = Turns(args.repeats)
    best, rows = turns.best(serve, job, *variants), []
    print(f"{'model':<18}{'folder, MB':>12}{'accuracy':>12}{'ms/text':>10}{'times the speed':>18}")
    for variant, figures in zip(variants, best):
        measure_size = int8_size if variant.get("dtype") == "int8" else folder_size
        size = measure_size(variant["exported"]) if "exported" in variant else None
        rows.append({**variant, "ms": figures["ms"], "accuracy": 100 * (1 - figures["errors"] / len(job["dev_ids"]))})
        print(f"{variant['name']:<18}{f'{size:.1f}' if size else '':>12}{rows[-1]['accuracy']:>10.2f} %{figures['ms']:>10.3f}"
              f"{best[0]['ms'] / figures['ms']:>18.2f}")
    print(turns.quiet_note())
    if args.picture:
        draw(args.picture, rows)


if __name__ == "__main__":
    start(main)
