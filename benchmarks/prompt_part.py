"""The part `prompt` of bench.py: the training of a prompt model by few-shot/train.py and by PaddleNLP's PromptTrainer."""

import ctypes
import os
import shutil
import subprocess
import sys

from measuring import ROOT, make_model, read_json, read_rows, work

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
