"""Measure this suite against Paddle as it comes and against Hugging Face with PyTorch, side by side on this machine.

    KUAKE_QIC_DIR=folder ERNIE_VOCAB=vocab.txt make bench             # all of it; makes the PyTorch environment too
    KUAKE_QIC_DIR=folder ERNIE_VOCAB=vocab.txt make bench BENCH="--quick --skip_torch"
    python benchmarks/bench.py --kuake_dir folder --vocab vocab.txt --torch_python .venv-bench/bin/python --profile
    python benchmarks/bench.py --kuake_dir folder --vocab vocab.txt --part predictor                # deploy/predictor only
    python benchmarks/bench.py --part analysis                      # only the search of sent_interpret.py, needs no data
    python benchmarks/bench.py ... --part stacks --other_python .venv-paddle3/bin/python    # this suite with both Paddles

The models have the shapes of ERNIE 3.0 Nano and Medium and seeded random weights. Every measurement is a fresh process;
the variants take turns (A B C A B C ...) and the best of --repeats counts. Other work on the machine adds time, and far
more to PyTorch, whose threads wait for each other (measured: its ratio of 1.3 became 5), so the bench also says how
many cores other processes took: do not quote the ratios of a run that it calls disturbed.
As it comes: PaddlePaddle and PaddleNLP without this suite's process set-up (only the zlib crash is cured), PaddleNLP's
tokenizer, texts in file order (training: shuffled), padded to the longest of the batch by DataCollatorWithPadding.
PyTorch: a BERT of the same shape with transformers' defaults and Trainer, batches by length, a thread per core.
Training: time between steps of each library's Trainer, on batches spread evenly over the lengths of an epoch of the
variant's own sampler, so that few steps stand for the epoch. Two processes: 32 texts a step each.
deploy/predictor, text in and label out, is measured against ONNX Runtime itself on the same model and ready-made batches by
length (its own threads, one per core), and against the earlier application's way: paddle2onnx at every start, PaddleNLP's
tokenizer, all texts padded to the longest of all, batches in file order; its start is not counted. Cold start: from the
start of a process to its first label.
stacks: this suite in this environment and in --other_python, which has the other Paddle, on the same weights; each predictor
runs what its own stack exported, with its own ONNX Runtime.
analysis: seconds in which each method of sent_interpret.py finds the 3 training rows for and the 3 against 1,000 texts among
100,000, on seeded random features of the size of ERNIE 3.0 Medium, its preparations (the fit of representer) included.
"""

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES, STEPS = ("train.txt", "dev.txt", "label.txt"), {"nano": 40, "medium": 4}
SHAPES = {
    "nano": {"num_hidden_layers": 4, "hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 1248},
    "medium": {"num_hidden_layers": 6, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}}
SIZES = {"vocab_size": 40000, "max_position_embeddings": 2048, "type_vocab_size": 4}  # dropout is 0.1 unless given
BATCH, MAX_LENGTH, SEED, WARM_UP, SAMPLE = 32, 128, 1, 3, 320  # SAMPLE: dev texts for Medium as it comes, which is slow
OPTIONS = {  # of all Trainers: nothing but steps
    "output_dir": "output", "learning_rate": 3e-5, "per_device_train_batch_size": BATCH, "seed": SEED,
    "per_device_eval_batch_size": BATCH, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
CORES = len(os.sched_getaffinity(0))


# Workers, each in a process of its own. stock, suite and torch return: tokenize (list of str -> rows with input_ids),
# predict (rows -> logits [num_texts, num_classes]), the Trainer's class, its options, the class of its callbacks.
def stock(job):
    """Paddle as it comes."""
    ctypes.CDLL("libz.so.1", mode=ctypes.RTLD_GLOBAL)  # else Paddle may crash, as textcls/models/paddle_setup.py says
    import numpy as np

    import paddle
    from paddlenlp import data, trainer, transformers
    paddle.set_device("cpu")
    tokenizer = transformers.ErnieTokenizer.from_pretrained(job["folder"])
    model = transformers.ErnieForSequenceClassification.from_pretrained(job["folder"])
    model.eval()
    collate = data.DataCollatorWithPadding(tokenizer)

    @paddle.no_grad()
    def predict(rows):
        return np.concatenate([model(**collate(rows[i:i + BATCH])).numpy() for i in range(0, len(rows), BATCH)])

    options = {"model": model, "criterion": paddle.nn.CrossEntropyLoss(), "data_collator": collate,
               "args": trainer.TrainingArguments(device="cpu", **job["options"])}
    return (lambda texts: [tokenizer(text, max_length=MAX_LENGTH, truncation=True) for text in texts], predict,
            trainer.Trainer, options, trainer.TrainerCallback)


def suite(job):
    """This suite, whose import of Paddle sets the process up."""
    import utils
    from textcls.models.checkpoints import load_checkpoint
    from textcls.models.device import select_device
    from textcls.models.inference import predict_logits
    from textcls.models.paddle_setup import paddle
    from textcls.training.trainer import ClassificationTrainer, collate

    from paddlenlp import trainer
    select_device("cpu")
    saved = load_checkpoint(job["folder"], max_seq_length=MAX_LENGTH)
    options = {"model": saved.model, "criterion": paddle.nn.CrossEntropyLoss(), "labels": saved.labels,
               "rust_tokenizer": saved.rust_tokenizer, "data_collator": lambda rows: collate(rows, saved.pad_id),
               "args": trainer.TrainingArguments(device="cpu", **job["options"])}
    return (lambda texts: utils.tokenize(texts, saved.encode), lambda tokens: predict_logits(saved, tokens, BATCH),
            ClassificationTrainer, options, trainer.TrainerCallback)


def torch(job):
    """Hugging Face with PyTorch: a random BERT of the same shape."""
    import torch
    import transformers
    torch.set_num_threads(CORES)
    transformers.set_seed(SEED)
    config = transformers.BertConfig(num_labels=len(job["labels"]), **job["sizes"])
    tokenizer = transformers.BertTokenizer(vocab=os.path.join(job["folder"], "vocab.txt"))
    options = {"model": transformers.BertForSequenceClassification(config),
               "data_collator": transformers.DataCollatorWithPadding(tokenizer),
               "args": transformers.TrainingArguments(use_cpu=True, train_sampling_strategy="group_by_length",
                                                      **job["options"])}
    trainer = transformers.Trainer(**options)

    def tokenize(texts):
        encoded = tokenizer(texts, max_length=MAX_LENGTH, truncation=True)
        return [dict(zip(encoded, row)) for row in zip(*encoded.values())]

    return (tokenize, lambda rows: trainer.predict(sorted(rows, key=lambda row: -len(row["input_ids"]))).predictions,
            transformers.Trainer, options, transformers.TrainerCallback)


def make_model(job):
    """Write config.json, vocab.txt and seeded random weights into job["folder"]."""
    from textcls.models.paddle_setup import paddle

    from paddlenlp.transformers import ErnieConfig, ErnieForSequenceClassification
    paddle.set_device("cpu")
    paddle.seed(SEED)
    ErnieForSequenceClassification(ErnieConfig(
        task_type_vocab_size=3, use_task_id=True, id2label=dict(enumerate(job["labels"])),
        initializer_range=0.1,  # five times the usual: else nearly all texts get the same class
        **job["sizes"])).save_pretrained(job["folder"])
    shutil.copyfile(job["vocab"], os.path.join(job["folder"], "vocab.txt"))


def evaluation(job):
    """ms per text: all of the evaluation of job["dev"], its part after tokenization, tokenization of job["texts"]."""
    import numpy as np
    tokenize, predict, *_ = WORKERS[job["variant"]](job)
    predict(tokenize(job["dev"][:WARM_UP * BATCH]))
    start = time.perf_counter()
    rows = tokenize(job["dev"])
    tokenized = time.perf_counter()
    logits = predict(rows)
    logits.argmax(axis=-1)
    end = time.perf_counter()
    rows = tokenize(job["texts"])
    last = time.perf_counter()
    np.savez(job["result"] + ".npz", logits=logits, ids=np.concatenate([row["input_ids"] for row in rows]))
    return {"ms": (end - start) * 1000 / len(logits), "model_ms": (end - tokenized) * 1000 / len(logits),
            "tokenize_ms": (last - end) * 1000 / len(rows)}


def training(job):
    """ms per text of training on job["texts"], also as a rank of several; with job["profile"] also the ops."""
    import numpy as np
    tokenize, _, trainer_class, options, callback_class = WORKERS[job["variant"]](job)
    rows, ends, profiler = tokenize(job["texts"]), [], None
    lengths = [len(row["input_ids"]) for row in rows]
    if isinstance(rows, list):
        rows = [dict(row, labels=label) for row, label in zip(rows, job["label_ids"])]
    else:
        rows.labels = np.array(job["label_ids"])
    if job["profile"]:
        import paddle  # the variant's
        profiler = paddle.profiler.Profiler()

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
            if profiler and len(ends) in (WARM_UP, WARM_UP + job["steps"]):
                (profiler.start if len(ends) == WARM_UP else profiler.stop)()

    SpreadTrainer(train_dataset=rows, callbacks=[Timing()], **options).train()
    assert len(ends) == WARM_UP + job["steps"], f"{len(ends)} steps"
    return {"ms": (ends[-1] - ends[WARM_UP - 1]) * 1000 / job["steps"] / BATCH / job["ranks"],
            "ops": self_times(profiler, job["steps"]) if profiler else []}


def self_times(profiler, steps):
    """[name, calls per step, ms per step without the events inside it] of all events, costliest first."""
    totals, nodes = {}, list(profiler.profiler_result.get_data().values())
    while nodes:
        node = nodes.pop()
        nodes += node.children_node
        own = node.end_ns - node.start_ns - sum(child.end_ns - child.start_ns for child in node.children_node)
        calls, ms = totals.get(node.name, (0, 0))
        totals[node.name] = calls + 1 / steps, ms + own / 1e6 / steps
    totals.pop("root node")
    return sorted(([name, *total] for name, total in totals.items()), key=lambda event: -event[2])


def reading(job):
    """Seconds for read_labelled and tokenize of the file job["path"], and the peak memory of this process in GB."""
    tokenize, *_ = suite(job)
    from textcls.common.errors import Problems
    from textcls.data.files import read_labelled
    start, problems = time.perf_counter(), Problems()
    texts, _ = read_labelled(job["path"], job["labels"], problems)
    problems.report()
    read = time.perf_counter()
    tokenize(texts)
    return {"read": read - start, "tokenize": time.perf_counter() - read,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def export(job):
    """Export job["folder"] with --onnx into its folder job["exported"]."""
    output = os.path.join(job["folder"], job.get("exported", "export"))
    command = [sys.executable, "export_model.py", "--params_path", job["folder"], "--output_path", output]
    subprocess.run([*command, "--onnx"], cwd=ROOT, check=True)


def export_half(job):
    """Export job["folder"] pruned to the width 1/2, its weights not trained: only their number matters here."""
    from textcls.export.deployment import write_deployment
    from textcls.models.checkpoints import load_checkpoint
    from textcls.models.device import select_device
    from textcls.training.compression import narrowed
    select_device("cpu")
    checkpoint, folder = load_checkpoint(job["folder"]), os.path.join(job["folder"], "half")
    os.mkdir(folder)
    model = narrowed(checkpoint.model, 0.5)
    model.eval()
    write_deployment(checkpoint._replace(model=model), folder, "pruned_model", with_onnx=True)


def load_predictor(job):
    """The Predictor of the exported folder, or of the one that job["exported"] names; with job["quantize"] in INT8, with
    job["threads"] on so many threads."""
    from textcls.runtime.predictor import Predictor
    folder = os.path.join(job["folder"], job.get("exported", "export"))
    return Predictor(folder, quantize=job["quantize"], num_threads=job["threads"])


def serving(job):
    """ms per text of job["dev"] by deploy/predictor."""
    predictor = load_predictor(job)
    predictor(job["dev"][:WARM_UP * BATCH])
    start = time.perf_counter()
    predictor(job["dev"])
    return {"ms": (time.perf_counter() - start) * 1000 / len(job["dev"])}


def searching(job):
    """Seconds of each method of sent_interpret.py on random features, and the peak memory of this process in GB."""
    import numpy as np

    import textcls.models.paddle_setup  # noqa: F401  it sets the process up
    from textcls.analysis.features import nearest_rows
    from textcls.analysis.influence import METHODS, influence_scores
    random_state, classes, seconds = np.random.default_rng(SEED), 11, {}
    weights = random_state.normal(size=(job["hidden_size"], classes)).astype(np.float32) / 4
    train, texts = (np.tanh(random_state.normal(size=(count, job["hidden_size"]))).astype(np.float32)
                    for count in (job["rows"], job["texts"]))  # as ERNIE's pooler gives them: -1 to 1
    train = train, train @ weights, random_state.integers(classes, size=len(train))
    texts = texts, texts @ weights
    for method, similarities in METHODS.items():
        for sim_fn in similarities:
            start = time.perf_counter()
            nearest_rows(influence_scores(method, sim_fn, train, texts), job["texts"], 3, lowest=True)
            seconds[f"{method} {sim_fn}"] = time.perf_counter() - start
    return {**seconds, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def ready_made(job):
    """ms per text of ONNX Runtime alone, on batches by length that have been made before."""
    import numpy as np
    import onnxruntime

    import utils
    rows = load_predictor(job).tokenize(job["dev"])
    batches = [utils.pad_batch([rows[index] for index in indices], 0)
               for indices in utils.sorted_batches([len(row) for row in rows], BATCH)]
    return {"ms": run_batches(onnxruntime, os.path.join(job["folder"], "export", "float32.onnx"),
                              [{"input_ids": batch, "token_type_ids": np.zeros_like(batch)} for batch in batches])}


def earlier(job):
    """ms per text of the earlier application's way, tokenization included, on every job["stride"]-th batch."""
    import numpy as np
    import onnxruntime

    import textcls.models.paddle_setup  # noqa: F401  else Paddle may crash

    import paddle2onnx
    from paddlenlp.transformers import ErnieTokenizer
    prefix = os.path.join(job["folder"], "export", "float32")
    paddle2onnx.export(f"{prefix}.pdmodel", f"{prefix}.pdiparams", f"{job['folder']}/earlier.onnx", opset_version=13)
    tokenizer = ErnieTokenizer.from_pretrained(job["folder"])
    start = time.perf_counter()
    rows = tokenizer(job["dev"], max_length=MAX_LENGTH, truncation=True, padding=True)  # to the longest of all
    tokenized = (time.perf_counter() - start) * 1000 / len(job["dev"])
    feeds = [{name: np.array(rows[name][first:first + BATCH]) for name in ("input_ids", "token_type_ids")}
             for first in range(0, len(job["dev"]), BATCH * job["stride"])]
    return {"ms": tokenized + run_batches(onnxruntime, f"{job['folder']}/earlier.onnx", feeds)}


def run_batches(onnxruntime, path, feeds):
    """ms per text of an ONNX model by ONNX Runtime with a thread per core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = CORES
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for feed in feeds[:WARM_UP]:
        session.run(None, feed)
    start = time.perf_counter()
    for feed in feeds:
        session.run(None, feed)
    return (time.perf_counter() - start) * 1000 / sum(len(feed["input_ids"]) for feed in feeds)


def cold_start(job):
    """Seconds from the start of this process to the first label, and whether Paddle is in its memory then."""
    load_predictor(job)(job["dev"][:1])
    with open("/proc/uptime", encoding="utf-8") as uptime, open("/proc/self/stat", encoding="utf-8") as stat:
        started = int(stat.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        seconds = float(uptime.read().split()[0]) - started
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return {"seconds": seconds, "paddle": int("libpaddle" in maps.read())}

WORKERS = {worker.__name__: worker for worker in (stock, suite, torch, make_model, evaluation, training, reading,
                                               export, export_half, serving, searching, ready_made, earlier, cold_start)}


def run_worker(name, job_path):
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    result = WORKERS[name](job) or {}
    if os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
        with open(job["result"], "w", encoding="utf-8") as file:
            json.dump(result, file)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kuake_dir", default=os.environ.get("KUAKE_QIC_DIR"), help="default: KUAKE_QIC_DIR")
    parser.add_argument("--vocab", default=os.environ.get("ERNIE_VOCAB", f"{ROOT}/data/vocab.txt"), help="ERNIE_VOCAB")
    parser.add_argument("--torch_python", default=os.path.join(ROOT, ".venv-bench", "bin", "python"))
    parser.add_argument("--skip_torch", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per variant, the best counts; default: 3")
    parser.add_argument("--quick", action="store_true", help="a trial: Nano, 1 repeat, 6 steps, 100,000 lines")
    parser.add_argument("--other_python", help="with --part stacks: the Python of an environment with the other Paddle")
    parser.add_argument("--part", choices=["all", "core", "predictor", "analysis", "stacks"], default="all",
                        help="what to measure; default: all")
    parser.add_argument("--profile", action="store_true", help="add the costliest operations of training Nano")
    args = parser.parse_args()
    for path in [os.path.join(args.kuake_dir or "KUAKE_QIC_DIR", name) for name in FILES] + [args.vocab]:
        if args.part != "analysis" and not os.path.isfile(path):
            parser.error(f"{path}: not found, expected KUAKE-QIC's folder as --kuake_dir or KUAKE_QIC_DIR ("
                         f"{', '.join(FILES)}), and a vocab.txt as --vocab or ERNIE_VOCAB")
    if (args.part == "stacks") != bool(args.other_python):
        parser.error("expected --part stacks and --other_python together")
    args.torch_python, args.foreign_cores = os.path.abspath(args.torch_python), []
    args.with_torch = not args.skip_torch and os.path.isfile(args.torch_python)
    args.repeats = 1 if args.quick else max(1, args.repeats)
    return args


def foreign_seconds():
    """CPU seconds that this machine has spent on everything but finished workers."""
    with open("/proc/stat", encoding="utf-8") as file:
        user, nice, system, _, _, *rest = map(int, file.readline().split()[1:9])  # without idle and iowait
    times = os.times()
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - times.children_user - times.children_system


def work(args, job, name, **changes):
    """Run a worker in a new process, without the user's thread settings; returns its result."""
    job = {**job, **changes}
    job["options"] = dict(OPTIONS, max_steps=WARM_UP + job["steps"])
    job["result"] = os.path.join(job["folder"], f"{name}-{job['variant']}{'-other' * ('python' in job)}.json")
    with open(os.path.join(job["folder"], "job.json"), "w", encoding="utf-8") as file:
        json.dump(job, file)
    command = [args.torch_python if job["variant"] == "torch" else job.get("python", sys.executable)]
    if job["ranks"] > 1:
        command += f"-m paddle.distributed.launch --nproc_per_node {job['ranks']} --backend gloo --log_dir log".split()
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")}
    start, foreign = time.perf_counter(), foreign_seconds()
    done = subprocess.run(command + [os.path.abspath(__file__), "worker", name, file.name], env=env, text=True,
                          cwd=job["folder"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    if done.returncode:
        sys.exit(f"{done.stdout[-5000:]}\nbench.py: the worker {name} failed with code {done.returncode}")
    with open(job["result"], encoding="utf-8") as file:
        result = json.load(file)
    result["foreign_cores"] = (foreign_seconds() - foreign) / (time.perf_counter() - start)
    print(job["shape"], name, job["variant"], *["other"] * ("python" in job), f"{job['ranks']} process(es):",
          *(f"{key} {value:.4g}" for key, value in result.items() if key != "ops"), file=sys.stderr, flush=True)
    return result


def in_turns(args, job, name, *variants):
    """variants: changes of the job (of the worker, too). Returns for each {figure: the smallest of all repeats}, {} without
    PyTorch."""
    rounds = [[{} if changes.get("variant") == "torch" and not args.with_torch else
               work(args, job, changes.get("worker", name), **changes) for changes in variants] for _ in range(args.repeats)]
    best = [{key: min(result[key] for result in results) for key in results[0]} for results in zip(*rounds)]
    args.foreign_cores.append(max(result.get("foreign_cores", 0) for result in best))  # of the quietest repeats
    return best


def measure_shape(args, job, dev, rows, notes):
    import numpy as np
    size = SAMPLE if args.quick or job["shape"] == "medium" else len(dev)
    sample = sorted(random.Random(SEED).sample(range(len(dev)), size))
    best = in_turns(args, job, "evaluation", {"variant": "stock", "dev": [dev[index] for index in sample]},
                    {"variant": "suite", "dev": dev}, {"variant": "torch", "dev": dev})
    for figure, what in (("ms", "evaluation"), ("model_ms", "  the model alone"), ("tokenize_ms", "  tokenization")):
        rows.append([f"{job['shape']}: {what}", *(result.get(figure) for result in best)])
    a, b = (np.load(os.path.join(job["folder"], f"evaluation-{name}.json.npz")) for name in ("stock", "suite"))
    ids, a, b = "equal" if np.array_equal(a["ids"], b["ids"]) else "DIFFERENT", a["logits"], b["logits"][sample]
    notes.append(f"{job['shape']}: {(a.argmax(1) == b.argmax(1)).sum()} of {size} predictions as in Paddle as it comes "
                 f"({len(set(a.argmax(1)))} classes, logits differ by up to {abs(a - b).max():.1e}), measured on "
                 f"{size} of {len(dev)} dev texts; token ids of train {ids}, as it comes "
                 f"{1000 / best[0]['tokenize_ms']:.0f} and here {1000 / best[1]['tokenize_ms']:.0f} texts/s")
    stock, suite, torch, two = in_turns(args, job, "training", {"variant": "stock"}, {"variant": "suite"},
                                        {"variant": "torch"}, {"variant": "suite", "ranks": 2})
    for what, own in (("training", suite), ("  this suite in two processes", two)):
        rows.append([f"{job['shape']}: {what}", stock["ms"], own["ms"], torch.get("ms")])


def measure_predictor(args, job, dev, ratios):
    job = {**job, "quantize": False, "threads": None, "dev": dev, "options": {}, "variant": "predictor"}
    stride = 6 if job["shape"] == "medium" else 1  # padded to the longest, Medium is slow
    work(args, job, "export")
    work(args, job, "export_half")
    fp32, ready, old, half, one, int8, cold = in_turns(
        args, job, "serving", {}, {"worker": "ready_made"}, {"worker": "earlier", "stride": stride}, {"exported": "half"},
        {"threads": 1}, {"threads": 1, "quantize": True}, {"worker": "cold_start"})
    shape, fp32 = job["shape"], fp32["ms"]
    ratios += [[f"{shape}: ONNX Runtime alone, ready-made batches", ready["ms"], fp32, 0.9],
               [f"{shape}: the earlier application's way", old["ms"], fp32, 8 if shape == "nano" else 6],
               [f"{shape}: INT8 against fp32, one thread", one["ms"], int8["ms"], 1.7],
               [f"{shape}: pruned to 1/2 against unpruned", fp32, half["ms"], 1.5]]
    return (f"{shape}: cold start to the first label {cold['seconds']:.2f} s, "
            f"{'WITH' if cold['paddle'] else 'no'} Paddle in memory")


def measure_stacks(args, job, dev, rows, notes):
    import numpy as np
    job, shape = {**job, "dev": dev, "quantize": False, "threads": None}, job["shape"]
    own, other = {"exported": "export"}, {"exported": "export-other", "python": os.path.abspath(args.other_python)}
    work(args, job, "export", **own)
    work(args, job, "export", **other)
    for what, worker, changes in (("training", "training", {}), ("training in two processes", "training", {"ranks": 2}),
                                  ("evaluation", "evaluation", {}), ("deploy/predictor", "serving", {}),
                                  ("deploy/predictor, one thread, INT8", "serving", {"threads": 1, "quantize": True})):
        best = in_turns(args, job, worker, {**own, **changes}, {**other, **changes})
        rows.append([f"{shape}: {what}", *(result["ms"] for result in best)])
    logits = [np.load(f"{job['folder']}/evaluation-suite{name}.json.npz")["logits"] for name in ("", "-other")]
    same = (logits[0].argmax(1) == logits[1].argmax(1)).sum()
    difference = abs(logits[0] - logits[1]).max()
    notes.append(f"{shape}: {same} of {len(dev)} predictions equal, logits differ by up to {difference:.1e}")


def report_stacks(args, rows, notes):
    """rows: [what, here, other]."""
    print_setting(args, [sys.executable, args.other_python])
    print("{:<52}{:>12}{:>12}{:>8}".format("ms per text, best of " + str(args.repeats), "here", "other", "ratio"))
    for what, own, other in rows:
        print(f"{what:<52}{own:12.4g}{other:12.4g}{own / other:8.3g}")
    print("\n" + "\n".join(notes + [quiet_note(args)]))


def measure_search(args, folder, rows, notes):
    count, texts = (10000, 100) if args.quick else (100000, 1000)
    job = {"variant": "suite", "ranks": 1, "shape": "medium", "folder": folder, "steps": 0, "rows": count, "texts": texts,
           "hidden_size": SHAPES["medium"]["hidden_size"]}
    best = in_turns(args, job, "searching", {})[0]
    seconds = {name: value for name, value in best.items() if " " in name}
    rows += [[f"search: {name}, s", None, value, None] for name, value in seconds.items()]
    notes.append(f"{count} training rows x {texts} texts: the limit of 60 s of search is "
                 f"{'kept' if max(seconds.values()) <= 60 else 'MISSED'}, peak memory {best['peak_gb']:.2f} GB")


def main():
    args, rows, notes, data, ratios = parse_arguments(), [], [], {}, []
    if args.part == "analysis":
        with tempfile.TemporaryDirectory() as folder:
            measure_search(args, folder, rows, notes)
        return report(args, rows, notes, ratios)
    for name in FILES:
        with open(os.path.join(args.kuake_dir, name), encoding="utf-8", newline="\n") as file:
            data[name] = [line.rstrip("\r\n").split("\t") for line in file]
    labels, (texts, names) = [line[0] for line in data["label.txt"]], zip(*data["train.txt"])
    job = {"variant": "suite", "ranks": 1, "profile": False, "labels": labels, "texts": texts,
           "label_ids": [labels.index(name) for name in names], "vocab": os.path.abspath(args.vocab)}
    with tempfile.TemporaryDirectory() as folder:
        for shape in ["nano"] if args.quick else ["medium", "nano"]:
            job.update(shape=shape, folder=os.path.join(folder, shape), sizes=dict(SHAPES[shape], **SIZES),
                       steps=6 if args.quick else STEPS[shape])
            os.mkdir(job["folder"])
            work(args, job, "make_model")
            dev = [row[0] for row in data["dev.txt"]]
            if args.part == "stacks":
                measure_stacks(args, job, dev, rows, notes)
                continue
            if args.part != "predictor":
                measure_shape(args, job, dev, rows, notes)
            if args.part != "core":
                notes.append(measure_predictor(args, job, dev, ratios))
        if args.part == "stacks":
            return report_stacks(args, rows, notes)
        if args.part == "all":
            measure_search(args, folder, rows, notes)
        if args.part == "predictor":
            return report(args, rows, notes, ratios)
        count, path = 100000 if args.quick else 1000000, os.path.join(folder, "lines.txt")
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{texts[i % len(texts)]}{i}\t{names[i % len(texts)]}\n" for i in range(count))
        best = in_turns(args, job, "reading", {"path": path})[0]
        for figure, what in (("read", "reading, s"), ("tokenize", "tokenizing, s"), ("peak_gb", "peak memory, GB")):
            rows.append([f"{count} lines: {what}", None, best[figure], None])
        kept = best["read"] + best["tokenize"] <= 60 and best["peak_gb"] <= 3
        notes.append(f"{count} lines: the limits of 60 s in all and 3 GB are {'kept' if kept else 'MISSED'}")
        if args.profile:
            ops = work(args, job, "training", steps=10, profile=True)["ops"]
            notes.append("a training step of Nano under the profiler: calls, self time, share of its events")
            notes += [f"  {name:<40}{calls:7.1f} {ms:9.2f} ms {ms / sum(op[2] for op in ops):6.1%}"
                      for name, calls, ms in ops[:12]]
    report(args, rows, notes, ratios)


def print_setting(args, pythons):
    """The command, the machine, and the versions of what the Pythons have."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown CPU")
    print(f"\ncommand   {' '.join(sys.argv)}\nmachine   {cpu}, {CORES} cores")
    for python in pythons:
        freeze = subprocess.run([python, "-m", "pip", "freeze"], stdout=subprocess.PIPE, text=True).stdout
        names = ("paddlepaddle", "paddlenlp", "torch==", "transformers", "accelerate", "tokenizers", "numpy", "onnxruntime")
        print("versions ", *(line for line in freeze.splitlines() if line.startswith(names)))


def quiet_note(args):
    most = max(args.foreign_cores, default=0)
    quiet = "quiet enough" if most <= 0.1 else "DISTURBED, the ratios must not be quoted"
    return f"other processes took {most:.2f} cores in the quietest repeats: {quiet}"


def report(args, rows, notes, ratios):
    """rows: [what, as it comes, this suite, PyTorch], None where not measured; ratios: [what, other, this suite, bar]."""
    print_setting(args, [sys.executable] + [args.torch_python] * args.with_torch)
    print(f"figures   ms per text, best of {args.repeats}; ratio: other / this suite, above 1 this suite is faster\n")
    line = "{:<40}{:>12}{:>12}{:>8}{:>12}{:>8}".format
    if rows:
        print(line("what", "as it comes", "this suite", "ratio", "PyTorch", "ratio"))
    for what, stock, suite, torch in rows:
        cells = (stock, suite, stock and stock / suite, torch, torch and torch / suite)
        print(line(what, *(f"{cell:.4g}" if cell else "-" for cell in cells)))
    if ratios:
        print("\n{:<52}{:>12}{:>12}{:>8}{:>14}".format("deploy/predictor against", "other", "predictor", "ratio", "at least"))
    for what, other, own, bar in ratios:
        print(f"{what:<52}{other:12.4g}{own:12.4g}{other / own:8.3g}{bar:10} {'kept' if other / own >= bar else 'MISSED'}")
    notes.append(quiet_note(args))
    notes += [] if args.with_torch else [f"no PyTorch: --skip_torch, or no {args.torch_python} (make bench makes it)"]
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    run_worker(*sys.argv[2:]) if sys.argv[1:2] == ["worker"] else main()
