"""Measure how fast few-shot/train.py learns a prompt model, beside PaddleNLP's PromptTrainer as it comes, on this machine.

    python benchmarks/bench_prompt.py --vocab_file vocab.txt --train_file train.txt --label_file label.txt
    python benchmarks/bench_prompt.py ... --only stock                                # PromptTrainer alone

--train_file holds lines text<TAB>label, --label_file lines `label` or `label==word`. The model has the shape of ERNIE 3.0 Medium
and seeded random weights. Both get 8 texts a step, the prompt 这条新闻写的是 and the learning rates of the earlier application's
published command, and do not evaluate. Every measurement is a fresh process; the two take turns, the best of --repeats counts.
Steps per second: --steps divided by the time that the Trainer itself reports (train_runtime), without start, loading and saving.
As it comes: PaddlePaddle and PaddleNLP without this suite's process set-up (only the zlib crash is cured), with SoftVerbalizer,
PaddleNLP's tokenizer and its PromptDataCollatorWithPadding. Other work on the machine adds time, so the bench also says
how many cores other processes took: do not quote the ratio of a run that it calls disturbed.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = {"num_hidden_layers": 6, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 40000,
         "max_position_embeddings": 2048, "type_vocab_size": 4, "task_type_vocab_size": 3, "use_task_id": True}
PROMPT, SEED, CORES = "这条新闻写的是", 42, len(os.sched_getaffinity(0))
OPTIONS = {"per_device_train_batch_size": 8, "learning_rate": 3e-5, "ppt_learning_rate": 3e-4, "max_seq_length": 512,
           "seed": SEED, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "device": "cpu"}


def read_lines(path):
    with open(path, encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\r\n") for line in file if line.strip()]


def make_model(folder):
    """Write config.json, seeded random weights and the options of a tokenizer into folder; run in a process of its own."""
    ctypes.CDLL("libz.so.1", mode=ctypes.RTLD_GLOBAL)  # else Paddle may crash, as textcls/models/paddle_setup.py says
    import paddle
    from paddlenlp.transformers import ErnieConfig, ErnieForMaskedLM, ErnieTokenizer
    paddle.set_device("cpu")
    paddle.seed(SEED)
    ErnieForMaskedLM(ErnieConfig(**SIZES)).save_pretrained(folder)
    ErnieTokenizer.from_pretrained(folder).save_pretrained(folder)


def train_stock(folder, steps):
    """Train as the earlier application does; run in a process of its own."""
    ctypes.CDLL("libz.so.1", mode=ctypes.RTLD_GLOBAL)
    import paddle
    from paddlenlp import prompt
    from paddlenlp.datasets import MapDataset
    from paddlenlp.transformers import ErnieForMaskedLM, ErnieTokenizer
    model = ErnieForMaskedLM.from_pretrained(f"{folder}/model")
    tokenizer = ErnieTokenizer.from_pretrained(f"{folder}/model")
    words = dict(line.split("==") if "==" in line else (line, line) for line in read_lines(f"{folder}/data/label.txt"))
    rows = [line.split("\t") for line in read_lines(f"{folder}/data/train.txt")]
    verbalizer = prompt.SoftVerbalizer(words, tokenizer, model)
    rows = MapDataset([{"text_a": text, "labels": verbalizer.labels_to_ids[label]} for text, label in rows])
    args = prompt.PromptTuningArguments(output_dir=f"{folder}/stock", max_steps=steps, **OPTIONS)
    template = prompt.AutoTemplate.create_from(PROMPT, tokenizer, args.max_seq_length, model=model)
    model = prompt.PromptModelForSequenceClassification(model, template, verbalizer)
    trainer = prompt.PromptTrainer(model, tokenizer, paddle.nn.CrossEntropyLoss(), args, train_dataset=rows)
    with open(f"{folder}/stock.json", "w", encoding="utf-8") as file:
        json.dump(trainer.train().metrics, file)


def foreign_seconds():
    """CPU seconds that this machine has spent on everything but finished workers."""
    with open("/proc/stat", encoding="utf-8") as file:
        user, nice, system, _, _, *rest = map(int, file.readline().split()[1:9])  # without idle and iowait
    times = os.times()
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - times.children_user - times.children_system


def run(words, result):
    """Run python with these words in a new process without the user's thread settings; returns train_runtime from the file
    result and the cores that other processes took meanwhile."""
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")}
    start, foreign = time.perf_counter(), foreign_seconds()
    done = subprocess.run([sys.executable, *map(str, words)], env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, errors="replace")
    if done.returncode:
        sys.exit(f"{done.stdout[-5000:]}\nbench_prompt.py: {words[:2]} failed with code {done.returncode}")
    with open(result, encoding="utf-8") as file:
        return json.load(file)["train_runtime"], (foreign_seconds() - foreign) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name in ("vocab_file", "train_file", "label_file"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=30, help="default: 30, an epoch of 240 texts")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each, the best counts; default: 3")
    parser.add_argument("--only", choices=["stock", "suite"], help="leave the other out")
    args, seconds, foreign = parser.parse_args(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/model")
        os.mkdir(f"{folder}/data")
        shutil.copyfile(args.vocab_file, f"{folder}/model/vocab.txt")
        for name, path in (("train", args.train_file), ("dev", args.train_file), ("label", args.label_file)):
            shutil.copyfile(path, f"{folder}/data/{name}.txt")  # nothing is evaluated, so any dev.txt will do
        subprocess.run([sys.executable, __file__, "make_model", f"{folder}/model"], check=True, capture_output=True)
        options = {**OPTIONS, "model_name_or_path": f"{folder}/model", "data_dir": f"{folder}/data", "prompt": PROMPT,
                   "max_steps": args.steps, "output_dir": f"{folder}/suite"}
        commands = {
            "stock": ([__file__, "stock", folder, args.steps], f"{folder}/stock.json"),
            "suite": (["few-shot/train.py", "--do_train", *(word for name in options for word in (f"--{name}", options[name]))],
                      f"{folder}/suite/train_results.json")}
        for number in range(1, args.repeats + 1):
            for name in [args.only] if args.only else commands:
                shutil.rmtree(f"{folder}/suite", ignore_errors=True)
                runtime, cores = run(*commands[name])
                print(f"{name} {number}: {args.steps / runtime:.3f} steps/s, others took {cores:.2f} cores", flush=True)
                seconds[name], foreign[name] = min(seconds.get(name, runtime), runtime), min(foreign.get(name, cores), cores)
    for name, runtime in seconds.items():
        print(f"{name} {args.steps / runtime:.3f} steps/s")
    if len(seconds) == 2:
        print(f"ratio {seconds['stock'] / seconds['suite']:.2f}")
    quiet = "quiet enough" if max(foreign.values()) <= 0.1 else "DISTURBED, the ratio must not be quoted"
    print(f"{CORES} cores; in the quietest repeats other processes took {max(foreign.values()):.2f}: {quiet}")


if __name__ == "__main__":
    workers = {"make_model": make_model, "stock": lambda folder, steps: train_stock(folder, int(steps))}
    workers[sys.argv[1]](*sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in workers else main()
