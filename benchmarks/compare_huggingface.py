"""Train the same classifier with this suite and with Hugging Face's Trainer, over several seeds, and compare the accuracies.

    python benchmarks/compare_huggingface.py --data_dir folder --model folder --torch_python other/bin/python --epochs 3
    python benchmarks/compare_huggingface.py ... --train_rows 2000 --arms suite huggingface by_length

--data_dir holds train.txt, dev.txt and label.txt; --model is a Hugging Face BERT folder; --torch_python has torch, transformers
and accelerate; --train_rows takes a random sample. The arms take turns; everything else is each library's own:
suite        train.py
huggingface  transformers' Trainer, texts in random order
by_length    the same with batches of texts of like length, as train.py forms them: shows what that order does
The accuracy is that of the last epoch on dev.txt. p: of a permutation test of the difference from the first arm's mean.
"""

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile

from measuring import ROOT, read_json, read_rows, start, work

OPTIONS = {"seeds": 5, "epochs": 1, "learning_rate": 1e-4, "batch_size": 32, "max_seq_length": 64, "device": "cpu",
           "train_rows": 0}


def train_suite(job):
    """Accuracy of train.py."""
    options = {"model_name_or_path": job["model"], "per_device_train_batch_size": job["batch_size"], "save_strategy": "no",
               "num_train_epochs": job["epochs"], "report_to": "none", "disable_tqdm": "true"}
    options.update((name, job[name]) for name in ("data_dir", "output_dir", "device", "learning_rate", "max_seq_length", "seed"))
    words = [str(word) for pair in options.items() for word in ("--" + pair[0], pair[1])]
    subprocess.run([sys.executable, "train.py", "--do_train", "--do_eval", *words], cwd=ROOT, check=True, capture_output=True)
    return {"accuracy": read_json(os.path.join(job["output_dir"], "eval_results.json"))["eval_accuracy"]}


def train_torch(job):
    """Accuracy of transformers' Trainer with its defaults; run by --torch_python."""
    import numpy as np
    import torch
    import transformers

    labels = [label for label, in read_rows(os.path.join(job["data_dir"], "label.txt"))]
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    transformers.set_seed(job["seed"])
    model = transformers.BertForSequenceClassification.from_pretrained(job["model"], num_labels=len(labels), dtype=torch.float32)

    def read(name):
        texts, names = zip(*read_rows(os.path.join(job["data_dir"], name)))
        rows = tokenizer(list(texts), max_length=job["max_seq_length"], truncation=True)["input_ids"]
        return [{"input_ids": row, "labels": labels.index(name)} for row, name in zip(rows, names)]

    train, size, generator = read("train.txt"), job["batch_size"], np.random.default_rng(job["seed"])
    lengths = np.array([len(row["input_ids"]) for row in train])

    class LengthGroupedBatches:  # as textcls.training.samplers.LengthGroupedBatchSampler: another order in every epoch
        def __len__(self):
            return -(-len(train) // size)

        def __iter__(self):
            order = generator.permutation(len(train))
            groups = np.split(order, range(size * 50, len(order), size * 50))
            order = np.concatenate([group[np.argsort(lengths[group], kind="stable")] for group in groups])
            return (order[index * size:(index + 1) * size].tolist() for index in generator.permutation(len(self)))

    options = transformers.TrainingArguments(
        job["output_dir"], use_cpu=job["device"] == "cpu", seed=job["seed"], learning_rate=job["learning_rate"],
        num_train_epochs=job["epochs"], per_device_train_batch_size=size, save_strategy="no", report_to="none", disable_tqdm=True)
    trainer = transformers.Trainer(
        model, options, transformers.DataCollatorWithPadding(tokenizer), train, read("dev.txt"),
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())})
    if job["arm"] == "by_length":
        trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
            train, batch_sampler=LengthGroupedBatches(), collate_fn=trainer.data_collator)
    trainer.train()
    return {"accuracy": trainer.evaluate()["eval_accuracy"]}


def permutation_test(first, second, draws=100_000):
    pool, draw = first + second, random.Random(0).sample
    sums = [sum(first), *(sum(draw(pool, len(first))) for _ in range(draws))]
    gaps = [abs(value - sum(pool) * len(first) / len(pool)) for value in sums]
    return sum(gap >= gaps[0] - 1e-9 for gap in gaps[1:]) / draws


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data_dir", "model", "torch_python"):
        parser.add_argument(f"--{name}", required=True, type=os.path.abspath)
    parser.add_argument("--arms", nargs="+", default=["suite", "huggingface"], choices=["suite", "huggingface", "by_length"])
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args, accuracies = parser.parse_args(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("dev.txt", "label.txt", "train.txt"):
            rows = read_rows(os.path.join(args.data_dir, name))
            rows = random.Random(0).sample(rows, args.train_rows) if args.train_rows and name == "train.txt" else rows
            with open(os.path.join(folder, name), "w", encoding="utf-8", newline="\n") as file:
                file.write("\n".join("\t".join(row) for row in rows))
        for seed, arm in itertools.product(range(1, args.seeds + 1), args.arms):
            job = {**vars(args), "folder": folder, "data_dir": folder, "arm": arm, "seed": seed,
                   "output_dir": os.path.join(folder, f"{arm}-{seed}")}
            figures = work(train_suite, job) if arm == "suite" else work(train_torch, job, python=args.torch_python)
            accuracy = figures["accuracy"]
            accuracies.setdefault(arm, []).append(accuracy)
            print(f"{arm:<12} seed {seed}: {accuracy:.2%}", flush=True)
    for arm, values in accuracies.items():
        print(f"{arm:<12} mean {statistics.mean(values):.2%}, standard deviation {statistics.stdev(values):.2%}, "
              f"p {permutation_test(accuracies[args.arms[0]], values):.2f}")


if __name__ == "__main__":
    start(main)
