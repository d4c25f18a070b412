"""Measure this suite against Paddle as it comes and against Hugging Face with PyTorch, side by side on this machine.

    KUAKE_QIC_DIR=folder ERNIE_VOCAB=vocab.txt make bench                 # all of it; the PyTorch environment is made too
    KUAKE_QIC_DIR=folder ERNIE_VOCAB=vocab.txt make bench BENCH="--quick --skip_torch"
    python tests/bench.py --kuake_dir folder --vocab vocab.txt --torch_python .venv-bench/bin/python --profile
    python tests/bench.py --kuake_dir folder --parts train --repeats 5 --json raw.json

Reads   train.txt, dev.txt and label.txt of the KUAKE-QIC data set, vocab.txt of ERNIE 3.0. The models are ERNIE 3.0
        Nano and Medium shapes with seeded random weights.
Prints  one table. Every measurement is a fresh process; the variants take turns (A B C A B C ...) and the best of
        --repeats counts, since other work on the machine only ever adds time.

As it comes: PaddlePaddle and PaddleNLP without this suite's process set-up (only the zlib crash is cured), PaddleNLP's
tokenizer, texts in file order (training: shuffled), padded to the longest of the batch by DataCollatorWithPadding.
PyTorch: a BERT of the same shape with transformers' defaults and Trainer, batches by length, as many threads as cores.
Training times are those between steps of each library's own Trainer loop. The steps are batches spread evenly over the
lengths of a whole epoch of each variant's own sampler, so that few steps stand for the epoch.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHAPES = {"nano": (4, 312, 12, 1248), "medium": (6, 768, 12, 3072)}  # layers, hidden, heads, feed-forward
MAX_LENGTH, BATCH, WARM_UP, SEED = 128, 32, 3, 1  # WARM_UP: batches or steps before the clock starts
MAX_SECONDS, MAX_GB = 60, 3  # for reading and tokenizing a million lines
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---------------------------------------------------------------- what the workers share


def import_suite():
    """Make the suite importable; importing its utils.py sets the process up. Returns (utils, modeling)."""
    sys.path.insert(0, ROOT)
    import utils
    import modeling

    modeling.select_device("cpu")
    return utils, modeling


def import_stock(job):
    """Paddle as it comes, with the zlib crash cured. Returns (paddle, tokenize, collator, model)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL("libz.so.1", mode=ctypes.RTLD_GLOBAL)
    import paddle
    from paddlenlp.data import DataCollatorWithPadding
    from paddlenlp.transformers import ErnieForSequenceClassification, ErnieTokenizer

    paddle.set_device("cpu")
    tokenizer = ErnieTokenizer.from_pretrained(job["folder"])
    return (paddle, lambda texts: [tokenizer(text, max_length=MAX_LENGTH, truncation=True) for text in texts],
            DataCollatorWithPadding(tokenizer), ErnieForSequenceClassification.from_pretrained(job["folder"]))


def import_torch(job):
    """Returns (transformers, tokenize, collator, model): a random BERT of the shape."""
    import torch
    import transformers

    torch.set_num_threads(CORES)
    transformers.set_seed(SEED)
    layers, hidden, heads, feed_forward = SHAPES[job["shape"]]
    model = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=40000, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=feed_forward, max_position_embeddings=2048, type_vocab_size=4, num_labels=len(job["labels"])))
    tokenizer = transformers.BertTokenizer(vocab=os.path.join(job["folder"], "vocab.txt"))

    def tokenize(texts):
        encoded = tokenizer(texts, max_length=MAX_LENGTH, truncation=True)
        return [dict(zip(encoded, row)) for row in zip(*encoded.values())]

    return transformers, tokenize, transformers.DataCollatorWithPadding(tokenizer), model


def training_options(job):
    """What both Trainers are told: so many steps, and nothing but steps."""
    return {"output_dir": os.path.join(job["folder"], "output"), "max_steps": WARM_UP + job.get("steps", 0), "seed": SEED,
            "learning_rate": 3e-5, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True}


def timed_eval(job, tokenize, predict):
    """ms per text, in all and for the model. predict: tokenized texts -> logits [num_texts, num_classes], saved too."""
    import numpy as np

    predict(tokenize(job["texts"][:WARM_UP * BATCH]))
    start = time.perf_counter()
    rows = tokenize(job["texts"])
    tokenized = time.perf_counter()
    logits = predict(rows)
    logits.argmax(axis=-1)
    end = time.perf_counter()
    np.save(job["result"] + ".npy", logits)
    return {"ms": (end - start) * 1000 / len(logits), "model_ms": (end - tokenized) * 1000 / len(logits)}


def timed_train(job, trainer_class, callback_class, lengths, profiler=None, **options):
    """ms per step of a Trainer. lengths: tokens of each training text; profiler: records the measured steps."""
    ends = []

    class SpreadTrainer(trainer_class):
        """Trains on WARM_UP + steps of the epoch's batches, the steps spread evenly over all batches by length."""

        def _get_train_sampler(self, *args):
            order = list(super()._get_train_sampler(*args))
            flat = not isinstance(order[0], list)  # transformers' sampler gives texts, Paddle's give batches
            batches = [order[start:start + BATCH] for start in range(0, len(order), BATCH)] if flat else order
            batches = [batch for batch in batches if len(batch) == BATCH]
            batches.sort(key=lambda batch: max(lengths[index] for index in batch))
            chosen = [batches[int((step + 0.5) * len(batches) / job["steps"])] for step in range(job["steps"])]
            random.Random(SEED).shuffle(chosen)  # the ranks of a distributed run shuffle alike
            chosen = [chosen[step % len(chosen)] for step in range(WARM_UP)] + chosen
            return sum(chosen, []) if flat else chosen

    class Timing(callback_class):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())
            if profiler is not None and len(ends) in (WARM_UP, WARM_UP + job["steps"]):
                profiler.start() if len(ends) == WARM_UP else profiler.stop()

    SpreadTrainer(callbacks=[Timing()], **options).train()
    assert len(ends) == WARM_UP + job["steps"], f"{len(ends)} steps"
    return (ends[-1] - ends[WARM_UP - 1]) * 1000 / job["steps"]


# ---------------------------------------------------------------- workers: each runs in a process of its own


def make_model(job):
    """Write config.json, vocab.txt and seeded random weights into job["folder"]."""
    import_suite()
    import paddle
    from paddlenlp.transformers import ErnieConfig, ErnieForSequenceClassification

    layers, hidden, heads, feed_forward = SHAPES[job["shape"]]
    paddle.seed(SEED)
    ErnieForSequenceClassification(ErnieConfig(
        vocab_size=40000, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=feed_forward, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
        max_position_embeddings=2048, type_vocab_size=4, task_type_vocab_size=3, use_task_id=True,
        initializer_range=0.1,  # five times the usual: else nearly all texts get the same class
        id2label=dict(enumerate(job["labels"])), label2id={label: index for index, label in enumerate(job["labels"])},
    )).save_pretrained(job["folder"])
    shutil.copyfile(job["vocab"], os.path.join(job["folder"], "vocab.txt"))
    return {}


def eval_stock(job):
    paddle, tokenize, collate, model = import_stock(job)
    import numpy as np

    model.eval()

    @paddle.no_grad()
    def predict(rows):
        return np.concatenate([model(**collate(rows[i:i + BATCH])).numpy() for i in range(0, len(rows), BATCH)])

    return timed_eval(job, tokenize, predict)


def eval_suite(job):
    utils, modeling = import_suite()
    checkpoint = modeling.load_checkpoint(job["folder"], max_seq_length=MAX_LENGTH)
    return timed_eval(job, lambda texts: utils.tokenize(texts, checkpoint.encode),
                      lambda tokens: modeling.predict_logits(checkpoint, tokens, BATCH))


def eval_torch(job):
    transformers, tokenize, collate, model = import_torch(job)
    args = transformers.TrainingArguments(use_cpu=True, **training_options(job))
    trainer = transformers.Trainer(model, args, data_collator=collate)
    return timed_eval(job, tokenize,
                      lambda rows: trainer.predict(sorted(rows, key=lambda row: -len(row["input_ids"]))).predictions)


def train_stock(job):
    paddle, tokenize, collate, model = import_stock(job)
    from paddlenlp.trainer import Trainer, TrainerCallback, TrainingArguments

    rows = [dict(row, labels=label) for row, label in zip(tokenize(job["texts"]), job["label_ids"])]
    args = TrainingArguments(device="cpu", **training_options(job))
    ms = timed_train(job, Trainer, TrainerCallback, [len(row["input_ids"]) for row in rows], model=model, args=args,
                     criterion=paddle.nn.CrossEntropyLoss(), data_collator=collate, train_dataset=rows)
    return {"ms": ms / BATCH}


def train_suite(job):
    """Also under paddle.distributed.launch, where a step takes BATCH texts per rank; job["profile"]: with op times."""
    utils, modeling = import_suite()
    import numpy as np
    import paddle
    import train
    from paddlenlp.trainer import TrainerCallback

    args = train.TrainArguments(device="cpu", **training_options(job))
    model, tokenizer = modeling.load_model(job["folder"]), modeling.load_tokenizer(job["folder"])
    fast = utils.fast_tokenizer(tokenizer, MAX_LENGTH)
    tokens = utils.tokenize(job["texts"], utils.make_encoder(tokenizer, fast, MAX_LENGTH), np.array(job["label_ids"]))
    profiler = job.get("profile") and paddle.profiler.Profiler(targets=[paddle.profiler.ProfilerTarget.CPU],
                                                               on_trace_ready=lambda _: None)
    ms = timed_train(job, train.ClassificationTrainer, TrainerCallback, tokens.lengths, profiler, model=model, args=args,
                     labels=job["labels"], fast=fast, criterion=paddle.nn.CrossEntropyLoss(), train_dataset=tokens,
                     data_collator=lambda rows: train.collate(rows, tokenizer.pad_token_id))
    ops = self_times(profiler.profiler_result.get_data().values(), job["steps"]) if profiler else None
    return {"ms": ms / BATCH / args.dataset_world_size, "step_ms": ms, "ops": ops}


def train_torch(job):
    transformers, tokenize, collate, model = import_torch(job)
    rows = [dict(row, labels=label) for row, label in zip(tokenize(job["texts"]), job["label_ids"])]
    args = transformers.TrainingArguments(use_cpu=True, train_sampling_strategy="group_by_length", **training_options(job))
    ms = timed_train(job, transformers.Trainer, transformers.TrainerCallback, [len(row["input_ids"]) for row in rows],
                     model=model, args=args, data_collator=collate, train_dataset=rows)
    return {"ms": ms / BATCH}


def self_times(roots, steps):
    """[name, calls per step, ms per step without the events inside it] of all profiled events, costliest first."""
    totals, nodes = {}, [child for root in roots for child in root.children_node]
    while nodes:
        node = nodes.pop()
        nodes += node.children_node
        total = totals.setdefault(node.name, [0, 0])
        total[0] += 1
        total[1] += node.end_ns - node.start_ns - sum(child.end_ns - child.start_ns for child in node.children_node)
    return sorted(([name, calls / steps, ns / 1e6 / steps] for name, (calls, ns) in totals.items()), key=lambda op: -op[2])


def tokenization(job):
    """Texts per second of both tokenizers in turn, best of job["repeats"]; `same`: how many texts get the same ids."""
    utils, modeling = import_suite()
    tokenizer = modeling.load_tokenizer(job["folder"])
    encoders = {"stock": utils.make_encoder(tokenizer, None, MAX_LENGTH),
                "suite": utils.make_encoder(tokenizer, utils.fast_tokenizer(tokenizer, MAX_LENGTH), MAX_LENGTH)}
    speed, ids = dict.fromkeys(encoders, 0), {}
    for _ in range(job["repeats"]):
        for name, encode in encoders.items():
            start = time.perf_counter()
            ids[name] = encode(job["texts"])
            speed[name] = max(speed[name], len(job["texts"]) / (time.perf_counter() - start))
    return {"same": sum(stock == suite for stock, suite in zip(ids["stock"], ids["suite"])), **speed}


def reading(job):
    """Seconds for read_labelled and tokenize of the file job["path"], and the peak memory of this process."""
    import resource

    utils, modeling = import_suite()
    tokenizer = modeling.load_tokenizer(job["folder"])
    encode = utils.make_encoder(tokenizer, utils.fast_tokenizer(tokenizer, MAX_LENGTH), MAX_LENGTH)
    start, problems = time.perf_counter(), utils.Problems()
    texts, label_ids = utils.read_labelled(job["path"], job["labels"], problems)
    problems.report()
    read = time.perf_counter()
    utils.tokenize(texts, encode, label_ids)
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes
    return {"read": read - start, "tokenize": end - read, "peak_gb": peak / 1e9}


# ---------------------------------------------------------------- the bench


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kuake_dir", default=os.environ.get("KUAKE_QIC_DIR", ""), help="or KUAKE_QIC_DIR: its folder")
    parser.add_argument("--vocab", default=os.environ.get("ERNIE_VOCAB") or os.path.join(ROOT, "data", "vocab.txt"))
    parser.add_argument("--torch_python", default=os.path.join(ROOT, ".venv-bench", "bin", "python"))
    parser.add_argument("--skip_torch", action="store_true")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="processes per variant; the best counts (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a trial: Nano, 1 repeat, few steps, 100,000 lines")
    parser.add_argument("--profile", action="store_true", help="also print the costliest operations of training Nano")
    parser.add_argument("--json", help="also write the result of every process to this file")
    args = parser.parse_args()
    for path in [os.path.join(args.kuake_dir or "KUAKE_QIC_DIR", name) for name in FILES] + [args.vocab]:
        if not os.path.isfile(path):
            parser.error(f"{path}: not found, expected the KUAKE-QIC data set ({', '.join(FILES)}) in the folder that "
                         "KUAKE_QIC_DIR or --kuake_dir names, and ERNIE 3.0's vocab.txt as ERNIE_VOCAB or --vocab")
    args.torch = not args.skip_torch and os.path.isfile(args.torch_python)
    args.results, args.rows, args.repeats = [], [], 1 if args.quick else args.repeats
    return args


def work(args, job, name, ranks=1):
    """Run a worker in a fresh process, without thread settings from outside; returns its result."""
    job = dict(job, result=os.path.join(job["folder"], f"{name}.json"))
    command = [args.torch_python if name.endswith("_torch") else sys.executable]
    if ranks > 1:
        command += ["-m", "paddle.distributed.launch", "--nproc_per_node", str(ranks), "--backend", "gloo", "--log_dir",
                    os.path.join(job["folder"], "log")]
    with open(os.path.join(job["folder"], "job.json"), "w", encoding="utf-8") as file:
        json.dump(job, file)
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")}
    done = subprocess.run(command + [os.path.abspath(__file__), "worker", name, file.name], cwd=job["folder"], env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"{done.stdout[-5000:]}\nbench.py: worker {name} failed with code {done.returncode}")
    with open(job["result"], encoding="utf-8") as file:
        result = json.load(file)
    args.results.append({"worker": name, "shape": job["shape"], "ranks": ranks, **result})
    print({key: value for key, value in args.results[-1].items() if key != "ops"}, file=sys.stderr, flush=True)
    return result


def in_turns(args, variants):
    """variants: {name: (job, worker, ranks)}. Returns {name: {figure: smallest of the repeats}}."""
    results = [{name: work(args, *variant) for name, variant in variants.items()} for _ in range(args.repeats)]
    return {name: {key: min(result[name][key] for result in results) for key in results[0][name]} for name in variants}


def measure_shape(args, shape, base):
    import numpy as np

    base = dict(base, shape=shape, folder=os.path.join(base["folder"], shape))
    os.mkdir(base["folder"])
    work(args, base, "make_model")
    (dev, _), (train, labels) = (read_pairs(os.path.join(args.kuake_dir, name)) for name in FILES[1::-1])
    if "eval" in args.parts:
        sample = range(len(dev)) if shape == "nano" and not args.quick else random.Random(SEED).sample(range(len(dev)), 320)
        job = dict(base, texts=dev)
        best = in_turns(args, {"stock": (dict(base, texts=[dev[index] for index in sample]), "eval_stock"),
                               "suite": (job, "eval_suite"), **({"torch": (job, "eval_torch")} if args.torch else {})})
        add_row(args, f"{shape}: evaluate dev, ms/text", best, "ms")
        add_row(args, f"{shape}: the model's part of it, ms/text", best, "model_ms")
        stock, suite = (np.load(os.path.join(base["folder"], f"eval_{name}.json.npy")) for name in ("stock", "suite"))
        suite = suite[list(sample)]
        args.notes.append(
            f"{shape}, evaluation: the suite gives {int((stock.argmax(1) == suite.argmax(1)).sum())} of {len(stock)} texts "
            f"the class that Paddle as it comes gives ({len(set(stock.argmax(1)))} classes; largest difference of logits "
            f"{abs(stock - suite).max():.1e}); as it comes measured on {len(stock)} of {len(dev)} texts.")
