"""Measure the training of sentence encoders: pairs per second beside the earlier recipe, and the memory of large batches.

    python benchmarks/bench_retrieval.py --quick                            # ERNIE-Nano's shape, random weights, two minutes
    python benchmarks/bench_retrieval.py --data_dir DIR --model_name_or_path MODEL

The earlier recipe: batches of 32 pairs (--earlier_batch_size) in random order; a text and the name of its label are tokenized
by PaddleNLP's own tokenizer as they come, every row's label is encoded, the loss compares each text with the label of each row;
[CLS] through the pooler. Both recipes see the same rows, train all weights by AdamW and pad to the longest of a batch.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from measuring import ROOT, Turns, make_nano, start, work


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default=str(ROOT / "data"))
    parser.add_argument("--model_name_or_path", help="model folder; None: random weights of ERNIE-Nano's shape")
    parser.add_argument("--max_seq_length", type=int, default=384)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--earlier_batch_size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=2048, help="training pairs of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="768 pairs, twice")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.repeats = 768, 2
    return args


def read_pairs(job):
    """The job as a namespace, and (texts, label ids, labels) of its first training rows, over again where there are fewer."""
    from textcls.common.errors import Problems
    from textcls.data.files import read_labels, read_lines

    args = SimpleNamespace(**job)
    labels = read_labels(os.path.join(args.data_dir, "label.txt"))
    rows = [line.rsplit("\t", 1) for _, line in read_lines(os.path.join(args.data_dir, "train.txt"), Problems())]
    rows = (rows * -(-args.pairs // len(rows)))[:args.pairs]
    return args, [text for text, _ in rows], np.array([labels.index(label) for _, label in rows]), labels


def load(args, pooling):
    """The model in training mode, its tokenizer and an optimizer."""
    from textcls.models.checkpoints import load_model
    from textcls.models.configs import SentenceOptions
    from textcls.models.device import select_device
    from textcls.models.paddle_setup import paddle
    from textcls.models.tokenizers import load_tokenizer

    select_device("cpu")
    paddle.seed(1)
    model = load_model(args.model_name_or_path, head="SentenceEncoder", sentence_options=SentenceOptions(pooling, 0, []))
    model.train()
    optimizer = paddle.optimizer.AdamW(5e-5, parameters=model.parameters(), grad_clip=paddle.nn.ClipGradByNorm(1.0))
    return model, load_tokenizer(args.model_name_or_path), optimizer


def earlier(job):
    """Seconds in which the earlier recipe trains on all pairs once."""
    args, texts, label_ids, labels = read_pairs(job)
    from textcls.models.paddle_setup import paddle

    from paddlenlp.data import Pad

    model, tokenizer, optimizer = load(args, "pooler")
    pad, size = Pad(axis=0, pad_val=tokenizer.pad_token_id, dtype="int64"), args.earlier_batch_size

    def encode(batch):
        rows = [tokenizer(text=text, max_seq_len=args.max_seq_length)["input_ids"] for text in batch]
        input_ids = paddle.to_tensor(pad(rows))
        return model(input_ids, token_type_ids=paddle.zeros_like(input_ids))

    def step(rows):
        queries, titles = encode([texts[row] for row in rows]), encode([labels[label_ids[row]] for row in rows])
        scores = paddle.matmul(queries, titles, transpose_y=True)
        scores = (scores - paddle.diag(paddle.full([len(rows)], 0.2))) * 30
        loss = paddle.nn.functional.cross_entropy(scores, paddle.arange(len(rows)))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        return float(loss)

    order = np.random.default_rng(1).permutation(len(texts))
    step(order[:size])
    begin = time.perf_counter()
    for first in range(0, len(order), size):
        step(order[first:first + size])
    return {"seconds": time.perf_counter() - begin}


def new(job):
    """Seconds in which SentenceTrainer's steps train on all pairs once, tokenizing included."""
    args, texts, label_ids, labels = read_pairs(job)
    from textcls.data.tokens import tokenize
    from textcls.models.checkpoints import Checkpoint
    from textcls.models.tokenizers import make_encoder, rust_tokenizer
    from textcls.training.resume import TrainArguments
    from textcls.training.sentence_training import SentenceTrainer, tokenize_labels

    from paddlenlp.trainer import TrainerCallback

    model, tokenizer, _ = load(args, "mean")
    rust = rust_tokenizer(tokenizer)
    encode = make_encoder(tokenizer, rust, args.max_seq_length)
    checkpoint = Checkpoint(model, tokenizer, rust, encode, labels, args.max_seq_length, tokenizer.pad_token_id)
    options = TrainArguments(output_dir=tempfile.gettempdir(), per_device_train_batch_size=args.batch_size, device="cpu",
                             report_to=[], disable_tqdm=True, num_train_epochs=1, save_strategy="no", learning_rate=1e-5)
    for name, value in {"margin": 0.2, "scale": 30.0, "text_loss_weight": 1.0, "chunk_size": args.chunk_size,
                        "hard_negatives": 0, "class_sampling": "natural"}.items():
        setattr(options, name, value)
    begin = time.perf_counter()
    tokens = tokenize(texts, encode, np.stack([label_ids, np.arange(len(texts))], axis=1))
    begins = []  # of the first step, of the second: the first also begins the process's threads and memory

    class Begin(TrainerCallback):
        def on_step_begin(self, *given, **options):
            if len(begins) < 2:
                begins.append(time.perf_counter())

    label_tokens = tokenize_labels([[label] for label in labels], encode)
    trainer = SentenceTrainer(checkpoint, options, label_tokens, tokens, None, [Begin()])
    seconds = time.perf_counter() - begin
    trainer.train()
    return {"seconds": seconds + (time.perf_counter() - begins[-1]) * args.pairs / max(1, args.pairs - args.batch_size)}


def measure_retrieval(turns, report, folder, args):
    """Training of a sentence encoder, the part `retrieval` of bench.py. args: its options."""
    make_nano(Path(folder))
    pairs = 256 if args.quick else 2048
    job = {"folder": folder, "model_name_or_path": folder, "data_dir": str(ROOT / "data"), "max_seq_length": 384,
           "batch_size": 64, "earlier_batch_size": 32, "pairs": pairs, "chunk_size": 0}
    best = turns.best(new, job, {"worker": earlier}, {})
    report.rows.append(["nano: training of retrieval_based/", *(figures["seconds"] * 1e3 / pairs for figures in best), None])


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if not args.model_name_or_path:
            args.model_name_or_path = os.path.join(folder, "model")
            make_nano(Path(args.model_name_or_path))
        job, turns = {**vars(args), "folder": folder, "chunk_size": 0}, Turns(args.repeats)
        ratios = []
        for number, results in enumerate(turns.rounds(new, job, {"worker": earlier}, {}), 1):
            speeds = [args.pairs / figures["seconds"] for figures in results]
            ratios.append(speeds[1] / speeds[0])
            print(f"run {number}: earlier recipe {speeds[0]:.1f} pairs/s, now {speeds[1]:.1f} pairs/s, ratio {ratios[-1]:.2f}")
        print(f"median ratio {np.median(ratios):.2f}\n{turns.quiet_note()}", flush=True)
        for batch_size, chunk in ((64, 0), (512, 64), (512, 0)):
            figures = work(new, job, batch_size=batch_size, chunk_size=chunk, pairs=512)
            megabytes = figures["peak_gb"] * 1e9 / 2**20
            print(f"batch of {batch_size}, chunks of {chunk or 'all'}: {megabytes:.0f} MB at most", flush=True)


if __name__ == "__main__":
    start(main)
