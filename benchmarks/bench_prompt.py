"""Measure how fast few-shot/train.py learns a prompt model, beside PaddleNLP's PromptTrainer as it comes, on this machine.

    python benchmarks/bench_prompt.py --vocab_file vocab.txt --train_file train.txt --label_file label.txt
    python benchmarks/bench_prompt.py ... --only stock                                # PromptTrainer alone

--train_file holds lines text<TAB>label, --label_file lines `label` or `label==word`. The model has the shape of ERNIE 3.0 Medium
and seeded random weights. Both get 8 texts a step, the prompt 这条新闻写的是 and the learning rates of the earlier application's
published command, and do not evaluate. Every measurement is a fresh process; the two take turns, the best of --repeats counts.
Steps per second: --steps divided by the time that the Trainer itself reports (train_runtime), without start, loading and saving.
As it comes: as in bench.py, with SoftVerbalizer and PromptDataCollatorWithPadding. Do not quote the ratio of a run that the bench
calls disturbed: other work on the machine adds time.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile

from measuring import CORES, ROOT, Turns, make_model, read_json, read_rows, start, work

PROMPT = "这条新闻写的是"
OPTIONS = {"per_device_train_batch_size": 8, "learning_rate": 3e-5, "ppt_learning_rate": 3e-4, "max_seq_length": 512,
           "seed": 42, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "device": "cpu"}


def stock(job):
    """Seconds in which the earlier application's way trains."""
    ctypes.CDLL("libz.so.1", mode=ctypes.RTLD_GLOBAL)  # else Paddle may crash, as textcls/models/paddle_setup.py says
    import paddle
    from paddlenlp import prompt
    from paddlenlp.datasets import MapDataset
    from paddlenlp.transformers import ErnieForMaskedLM, ErnieTokenizer
    model = ErnieForMaskedLM.from_pretrained(job["folder"])
    tokenizer = ErnieTokenizer.from_pretrained(job["folder"])
    words = dict(line.split("==") if "==" in line else (line, line) for line in job["labels"])
    verbalizer = prompt.SoftVerbalizer(words, tokenizer, model)
    rows = MapDataset([{"text_a": text, "labels": verbalizer.labels_to_ids[label]}
                       for text, label in read_rows(f"{job['folder']}/data/train.txt")])
    args = prompt.PromptTuningArguments(output_dir=f"{job['folder']}/stock", max_steps=job["steps"], **OPTIONS)
    template = prompt.AutoTemplate.create_from(PROMPT, tokenizer, args.max_seq_length, model=model)
    model = prompt.PromptModelForSequenceClassification(model, template, verbalizer)
    trainer = prompt.PromptTrainer(model, tokenizer, paddle.nn.CrossEntropyLoss(), args, train_dataset=rows)
    return {"seconds": trainer.train().metrics["train_runtime"]}


def suite(job):
    """Seconds in which few-shot/train.py trains."""
    output = f"{job['folder']}/suite"
    shutil.rmtree(output, ignore_errors=True)
    options = {**OPTIONS, "model_name_or_path": job["folder"], "data_dir": f"{job['folder']}/data", "prompt": PROMPT,
               "max_steps": job["steps"], "output_dir": output}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    subprocess.run([sys.executable, "few-shot/train.py", "--do_train", *words], cwd=ROOT, check=True)
    return {"seconds": read_json(f"{output}/train_results.json")["train_runtime"]}


def make_job(folder, shape, vocab, train_file, label_file, steps):
    """Make data and model in a folder. Returns the job of the workers."""
    os.makedirs(f"{folder}/data")
    for name, path in (("train", train_file), ("dev", train_file), ("label", label_file)):
        shutil.copyfile(path, f"{folder}/data/{name}.txt")  # nothing is evaluated, so any dev.txt will do
    job = {"folder": folder, "shape": shape, "head": "ErnieForMaskedLM", "vocab": os.path.abspath(vocab),
           "labels": [line for line, *_ in read_rows(label_file) if line], "steps": steps}
    work(make_model, job)
    return job


def measure_prompt(turns, report, folder, args):
    """Training of a prompt model, the part `prompt` of bench.py. args: its options."""
    shape, steps = ("nano", 6) if args.quick else ("medium", 30)
    job = make_job(folder, shape, args.vocab, *(os.path.join(args.kuake_dir, name) for name in ("train.txt", "label.txt")), steps)
    best = turns.best(stock, job, {}, {"worker": suite})
    per_text = 1e3 / (steps * OPTIONS["per_device_train_batch_size"])
    report.rows.append([f"{shape}: training of few-shot/", *(figures["seconds"] * per_text for figures in best), None])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name in ("vocab_file", "train_file", "label_file"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=30, help="default: 30, an epoch of 240 texts")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each, the best counts; default: 3")
    parser.add_argument("--only", choices=["stock", "suite"], help="leave the other out")
    args = parser.parse_args()
    workers, turns = {"stock": stock, "suite": suite}, Turns(args.repeats)
    names = [args.only] if args.only else list(workers)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(folder, "medium", args.vocab_file, args.train_file, args.label_file, args.steps)
        best = turns.best(stock, job, *({"worker": workers[name]} for name in names))
    for name, figures in zip(names, best):
        print(f"{name} {args.steps / figures['seconds']:.3f} steps/s")
    if len(names) == 2:
        print(f"ratio {best[0]['seconds'] / best[1]['seconds']:.2f}")
    print(f"{CORES} cores; {turns.quiet_note()}")


if __name__ == "__main__":
    start(main)
