"""The part `retrieval` of bench.py: the training of a sentence encoder by SentenceTrainer and by the earlier recipe."""

import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from measuring import ROOT, make_random


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
    make_random(Path(folder), "nano")
    pairs = 256 if args.quick else 2048
    job = {"folder": folder, "model_name_or_path": folder, "data_dir": str(ROOT / "data"), "max_seq_length": 384,
           "batch_size": 64, "earlier_batch_size": 32, "pairs": pairs, "chunk_size": 0}
    best = turns.best(new, job, {"worker": earlier}, {})
    report.rows.append(["nano: training of retrieval_based/", *(figures["seconds"] * 1e3 / pairs for figures in best), None])
