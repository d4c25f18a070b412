"""The part `core` of bench.py: training, evaluation and reading, by this suite, Paddle as it comes and Hugging Face."""

import ctypes
import os
import random
import time

from measuring import BATCH, CORES, MAX_LENGTH, SEED, SHAPES, SIZES, WARM_UP, work

SAMPLE = 320  # dev texts for Medium as it comes, which is slow


def trainer_options(job):
    """Of all Trainers: nothing but steps."""
    return {"output_dir": "output", "learning_rate": 3e-5, "per_device_train_batch_size": BATCH, "seed": SEED,
            "per_device_eval_batch_size": BATCH, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "max_steps": WARM_UP + job["steps"]}


# The variants: each returns tokenize (list of str -> rows with input_ids), predict (rows -> logits [num_texts, num_classes]), the
# Trainer's class, its options, the class of its callbacks.
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
               "args": trainer.TrainingArguments(device="cpu", **trainer_options(job))}
    return (lambda texts: [tokenizer(text, max_length=MAX_LENGTH, truncation=True) for text in texts], predict,
            trainer.Trainer, options, trainer.TrainerCallback)


def suite(job):
    """This suite, whose import of Paddle sets the process up."""
    import utils
    from textcls.models.checkpoints import load_checkpoint
    from textcls.models.device import select_device
    from textcls.models.inference import predict_logits
    from textcls.models.paddle_setup import paddle
    from textcls.training.resume import TrainArguments
    from textcls.training.trainer import ClassificationTrainer, collate

    from paddlenlp import trainer
    select_device("cpu")
    saved = load_checkpoint(job["folder"], max_seq_length=MAX_LENGTH)
    options = {"model": saved.model, "criterion": paddle.nn.CrossEntropyLoss(), "labels": saved.labels,
               "rust_tokenizer": saved.rust_tokenizer, "tokenizer": saved.tokenizer,
               "data_collator": lambda rows: collate(rows, saved.pad_id),
               "eval_dataset": utils.tokenize(job["dev"], saved.encode),  # whose tokens keep their embeddings, too
               "args": TrainArguments(device="cpu", **trainer_options(job))}
    return (lambda texts: utils.tokenize(texts, saved.encode), lambda tokens: predict_logits(saved, tokens, BATCH),
            ClassificationTrainer, options, trainer.TrainerCallback)


def torch(job):
    """Hugging Face with PyTorch: a random BERT of the same shape."""
    import torch
    import transformers
    torch.set_num_threads(CORES)
    transformers.set_seed(SEED)
    config = transformers.BertConfig(num_labels=len(job["labels"]), **SHAPES[job["shape"]], **SIZES)
    tokenizer = transformers.BertTokenizer(vocab=os.path.join(job["folder"], "vocab.txt"))
    options = {"model": transformers.BertForSequenceClassification(config),
               "data_collator": transformers.DataCollatorWithPadding(tokenizer),
               "args": transformers.TrainingArguments(use_cpu=True, train_sampling_strategy="group_by_length",
                                                      **trainer_options(job))}
    trainer = transformers.Trainer(**options)

    def tokenize(texts):
        encoded = tokenizer(texts, max_length=MAX_LENGTH, truncation=True)
        return [dict(zip(encoded, row)) for row in zip(*encoded.values())]

    return (tokenize, lambda rows: trainer.predict(sorted(rows, key=lambda row: -len(row["input_ids"]))).predictions,
            transformers.Trainer, options, transformers.TrainerCallback)


VARIANTS = {"stock": stock, "suite": suite, "torch": torch}


def evaluation(job):
    """ms per text: all of the evaluation of job["dev"], its part after tokenization, tokenization of job["texts"]. Writes logits
    and token ids for `agreement`."""
    import numpy as np
    tokenize, predict, *_ = VARIANTS[job["variant"]](job)
    predict(tokenize(job["dev"][:WARM_UP * BATCH]))
    start = time.perf_counter()
    rows = tokenize(job["dev"])
    tokenized = time.perf_counter()
    logits = predict(rows)
    logits.argmax(axis=-1)
    end = time.perf_counter()
    rows = tokenize(job["texts"])
    last = time.perf_counter()
    np.savez(os.path.join(job["folder"], job.get("exported", job["variant"])), logits=logits,
             ids=np.concatenate([row["input_ids"] for row in rows]))
    return {"ms": (end - start) * 1000 / len(logits), "model_ms": (end - tokenized) * 1000 / len(logits),
            "tokenize_ms": (last - end) * 1000 / len(rows)}


def training(job):
    """ms per text of training on job["texts"], also as a rank of several; with job["profile"] also the ops."""
    import numpy as np
    tokenize, _, trainer_class, options, callback_class = VARIANTS[job["variant"]](job)
    rows, ends, profiler = tokenize(job["texts"]), [], None
    lengths = [len(row["input_ids"]) for row in rows]
    if isinstance(rows, list):
        rows = [dict(row, labels=label) for row, label in zip(rows, job["label_ids"])]
    else:
        rows.labels = np.array(job["label_ids"])
    if job.get("profile"):
        import paddle  # the variant's
        profiler = paddle.profiler.Profiler()

    class SpreadTrainer(trainer_class):
        """Trains on WARM_UP + steps of the epoch's batches, the steps spread evenly over all batches by length."""

        def _get_train_sampler(self, *args):
            return spread(list(super()._get_train_sampler(*args)), lengths, job["steps"])

    class Timing(callback_class):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())
            if profiler and len(ends) in (WARM_UP, WARM_UP + job["steps"]):
                (profiler.start if len(ends) == WARM_UP else profiler.stop)()

    SpreadTrainer(train_dataset=rows, callbacks=[Timing()], **options).train()
    assert len(ends) == WARM_UP + job["steps"], f"{len(ends)} steps"
    return {"ms": (ends[-1] - ends[WARM_UP - 1]) * 1000 / job["steps"] / BATCH / job.get("ranks", 1),
            "ops": self_times(profiler, job["steps"]) if profiler else []}


def products(job):
    """ms per text of nothing but the matrix products of a training step, as this suite makes them: on as many threads as cores,
    for texts of the mean length of the training texts, forward, for the values' gradients and for the weights'."""
    import utils
    from textcls.models.checkpoints import load_checkpoint
    from textcls.models.inference import map_batches
    from textcls.models.paddle_setup import paddle
    shape, rows = SHAPES[job["shape"]], BATCH // CORES
    saved = load_checkpoint(job["folder"], max_seq_length=MAX_LENGTH)
    length = round(utils.tokenize(job["texts"], saved.encode).lengths.mean())
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    every = [(hidden, hidden)] * 2  # keys and values
    read = [(hidden, hidden)] * 2 + [(hidden, inner), (inner, hidden)]  # queries, output, feed-forward: at the end of [CLS] only
    sizes = [(rows * length, pair) for pair in (every + read) * (layers - 1) + every] + [(rows, pair) for pair in read]
    matrices = {(count, *pair): (paddle.randn([count, pair[0]]), paddle.randn(pair), paddle.randn([count, pair[1]]))
                for count, pair in sizes}

    def step(_):
        for count, pair in sizes:
            values, weight, gradient = matrices[(count, *pair)]
            paddle.matmul(values, weight)
            paddle.matmul(gradient, weight, transpose_y=True)
            paddle.matmul(values, gradient, transpose_x=True)

    def run(steps):
        for _ in map_batches(step, range(CORES * steps)):
            pass
        return time.perf_counter()

    start = run(WARM_UP)
    return {"ms": (run(job["steps"]) - start) * 1000 / job["steps"] / (CORES * rows)}


def spread(order, lengths, steps):
    """WARM_UP + steps of a sampler's batches, the steps spread evenly over all its batches by length."""
    flat = not isinstance(order[0], list)  # transformers' sampler gives texts, Paddle's give batches
    batches = [order[start:start + BATCH] for start in range(0, len(order), BATCH)] if flat else order
    batches = [batch for batch in batches if len(batch) == BATCH]
    batches.sort(key=lambda batch: max(lengths[index] for index in batch))
    chosen = [batches[int((step + 0.5) * len(batches) / steps)] for step in range(steps)]
    random.Random(SEED).shuffle(chosen)  # the ranks of a distributed run shuffle alike
    chosen = [chosen[step % len(chosen)] for step in range(WARM_UP)] + chosen
    return sum(chosen, []) if flat else Batches(chosen)


class Batches(list):
    """A list that is asked what this suite's samplers are asked."""

    def texts_per_step(self):
        return BATCH * int(os.environ.get("PADDLE_TRAINERS_NUM", 1))


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
    """Seconds for read_labelled and tokenize of the file job["path"]."""
    tokenize, *_ = suite(job)
    from textcls.common.errors import Problems
    from textcls.data.files import read_labelled
    start, problems = time.perf_counter(), Problems()
    texts, _ = read_labelled(job["path"], job["labels"], problems)
    problems.report()
    read = time.perf_counter()
    tokenize(texts)
    return {"read": read - start, "tokenize": time.perf_counter() - read}


def agreement(job, first, second, rows=slice(None)):
    """Compare what two evaluations have written, of the second only these rows: (equal predictions, largest difference of the
    logits, number of classes predicted, whether the token ids are equal)."""
    import numpy as np
    first, second = (np.load(os.path.join(job["folder"], f"{name}.npz")) for name in (first, second))
    a, b = first["logits"], second["logits"][rows]
    equal = (a.argmax(1) == b.argmax(1)).sum()
    return equal, abs(a - b).max(), len(set(a.argmax(1))), np.array_equal(first["ids"], second["ids"])


def measure_shape(turns, report, job, quick, torch_python):
    """Evaluation and training of one shape. torch_python: None does without PyTorch."""
    shape, dev = job["shape"], job["dev"]
    size = SAMPLE if quick or shape == "medium" else len(dev)
    sample = sorted(random.Random(SEED).sample(range(len(dev)), size))
    stock, suite, torch = {"variant": "stock"}, {"variant": "suite"}, {"variant": "torch", "python": torch_python}
    best = turns.best(evaluation, job, {**stock, "dev": [dev[index] for index in sample]}, suite, torch)
    for figure, what in (("ms", "evaluation"), ("model_ms", "  the model alone"), ("tokenize_ms", "  tokenization")):
        report.rows.append([f"{shape}: {what}", *(figures.get(figure) for figures in best)])
    equal, difference, classes, same_ids = agreement(job, "stock", "suite", sample)
    report.notes.append(f"{shape}: {equal} of {size} predictions as in Paddle as it comes ({classes} classes, logits differ by "
                        f"up to {difference:.1e}), measured on {size} of {len(dev)} dev texts; token ids of train "
                        f"{'equal' if same_ids else 'DIFFERENT'}, as it comes {1000 / best[0]['tokenize_ms']:.0f} and here "
                        f"{1000 / best[1]['tokenize_ms']:.0f} texts/s")
    stock, own, torch, two = turns.best(training, job, stock, suite, torch, {**suite, "ranks": 2})
    for what, figures in (("training", own), ("  this suite in two processes", two)):
        report.rows.append([f"{shape}: {what}", stock["ms"], figures["ms"], torch.get("ms")])
    report.rows.append([f"{shape}: training, peak memory, GB", *(figures.get("peak_gb") for figures in (stock, own, torch))])
    limit, = turns.best(products, job, {})
    report.notes.append(f"{shape}: the matrix products of a training step alone take {limit['ms']:.3g} ms per text, "
                        f"{limit['ms'] / own['ms']:.0%} of the training's time")


def measure_reading(turns, report, job, count):
    """Reading and tokenizing a training file of so many lines."""
    path, texts = os.path.join(job["folder"], "lines.txt"), job["texts"]
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{texts[i % len(texts)]}{i}\t{job['labels'][job['label_ids'][i % len(texts)]]}\n" for i in range(count))
    best, = turns.best(reading, job, {"variant": "suite", "path": path})
    for figure, what in (("read", "reading, s"), ("tokenize", "tokenizing, s"), ("peak_gb", "peak memory, GB")):
        report.rows.append([f"{count} lines: {what}", None, best[figure], None])
    kept = best["read"] + best["tokenize"] <= 60 and best["peak_gb"] <= 3
    report.notes.append(f"{count} lines: the limits of 60 s in all and 3 GB are {'kept' if kept else 'MISSED'}")


def profile(report, job):
    """The costliest operations of a training step."""
    ops = work(training, job, variant="suite", steps=10, profile=True)["ops"]
    total = sum(ms for _, _, ms in ops)
    report.notes.append("a training step of Nano under the profiler: calls, self time, share of its events")
    report.notes += [f"  {name:<40}{calls:7.1f} {ms:9.2f} ms {ms / total:6.1%}" for name, calls, ms in ops[:12]]
