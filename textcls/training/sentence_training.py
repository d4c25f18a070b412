"""How sentence encoders are trained: texts are drawn to the names of their labels, and to each other, in large batches."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from textcls.common.log import get_logger
from textcls.data.encoders import Encoder
from textcls.data.tokens import TokenizedTexts, pad_batch, tokenize
from textcls.models.checkpoints import Checkpoint
from textcls.models.inference import predict_logits
from textcls.models.paddle_setup import paddle
from textcls.models.sentence_model import unit_length
from textcls.retrieval.nearest import select_top
from textcls.training.samplers import LengthGroupedBatchSampler
from textcls.training.trainer import ClassificationTrainer, collate

from paddlenlp.trainer import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

RECALLS = (1, 5, 10, 20)  # how many labels the right one may be among
NEIGHBOURS, TEMPERATURE = 10, 0.05  # of the vote that is evaluated between epochs
MOST_VOTERS = 20000  # training texts in that vote
BLOCK = 1024  # rows of a product of vectors at a time: bounds memory where labels are many
NEGATIVES_FILE = "hard_negatives.npz"


class LabelTexts(NamedTuple):
    """What stands for the labels, tokenized."""

    tokens: TokenizedTexts  # label by label
    offsets: np.ndarray  # int64 [num_labels + 1]: the texts of label i are those from offsets[i] to offsets[i + 1]


def recall_counts(num_labels: int) -> list[int]:
    """Return those of RECALLS that so many labels have."""
    return [count for count in RECALLS if count <= num_labels]


def metric_names(num_labels: int) -> list[str]:
    """Return the names of what an evaluation measures."""
    return ["accuracy", *(f"recall@{count}" for count in recall_counts(num_labels))]


def tokenize_labels(words: list[list[str]], encode: Encoder) -> LabelTexts:
    """Tokenize the words of labels, which are cut where they are long. words: for each label a list of str."""
    cut = Encoder(encode.encode_whole, encode.num_before, encode.num_after, encode.max_seq_length)
    tokens = tokenize([word for own in words for word in own], cut, description="Tokenizing labels")
    return LabelTexts(tokens, np.concatenate([[0], np.cumsum([len(own) for own in words])]))


def retrieval_loss(texts: paddle.Tensor, text_labels: np.ndarray, columns: paddle.Tensor, column_labels: np.ndarray,
                   args: TrainingArguments, sizes: list[int]) -> paddle.Tensor:
    """Compute the loss of a batch: each text against the labels of the whole batch, and against its other texts.

    texts: float32 [batch, size], columns: float32 [num_columns, size], unit vectors of texts and of labels; text_labels: int64
    [batch], column_labels: int64 [num_columns], rising, with all of text_labels in it. args: margin and scale (in-batch
    negatives: Karpukhin et al. 2020, arXiv:2004.04906, with an additive margin, Yang et al. 2019, arXiv:1902.08564) and
    text_loss_weight (supervised contrastive loss: Khosla et al. 2020, arXiv:2004.11362). sizes: the loss is summed over so many
    first entries of the vectors (Matryoshka: Kusupati et al. 2022, arXiv:2205.13147). Returns a scalar.
    """
    targets = paddle.to_tensor(np.searchsorted(column_labels, text_labels))
    is_same = text_labels[:, None] == text_labels[None, :]
    np.fill_diagonal(is_same, False)
    losses = []
    for size in sizes:
        own, labels = unit_length(texts[:, :size]), unit_length(columns[:, :size])
        scores = paddle.matmul(own, labels, transpose_y=True)  # (batch, num_columns)
        scores = scores - args.margin * paddle.nn.functional.one_hot(targets, len(column_labels))
        losses.append(paddle.nn.functional.cross_entropy(scores * args.scale, targets))
        if args.text_loss_weight and is_same.any():
            losses.append(args.text_loss_weight * text_loss(own, is_same, args.scale))
    return sum(losses)


def text_loss(texts: paddle.Tensor, is_same: np.ndarray, scale: float) -> paddle.Tensor:
    """Compute the mean cross entropy of each text's neighbours with those of its label, over the texts that have such.

    texts: float32 [batch, size], of unit length; is_same: bool [batch, batch], False on the diagonal. Returns a scalar.
    """
    counts = is_same.sum(axis=1, keepdims=True)
    targets = paddle.to_tensor((is_same / np.maximum(counts, 1)).astype(np.float32))
    itself = paddle.to_tensor(np.eye(len(counts), dtype=np.float32) * 1e9)
    log_probs = paddle.nn.functional.log_softmax(paddle.matmul(texts, texts, transpose_y=True) * scale - itself, axis=-1)
    return -(targets * log_probs).sum() / float((counts > 0).sum())


def top_columns(queries: np.ndarray, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the `count` nearest of vectors for each query, nearest first, by exact search in blocks.

    queries: float32 [num_queries, size]; vectors: float32 [num_vectors, size]. Returns (indices int64, cosines float32), both
    [num_queries, count].
    """
    count = min(count, len(vectors))
    indices, cosines = np.empty((len(queries), count), np.int64), np.empty((len(queries), count), np.float32)
    for start in range(0, len(queries), BLOCK):
        block = slice(start, start + BLOCK)
        cosines[block], indices[block] = select_top(queries[block] @ vectors.T, count)
    return indices, cosines


def majority(cosines: np.ndarray, label_ids: np.ndarray) -> np.ndarray:
    """Return the label of most weight among the nearest texts (search.vote has more to it): int64 [num_texts].

    cosines: float32, label_ids: int64, both [num_texts, neighbours], nearest first.
    """
    weights = np.exp((cosines - cosines[:, :1]) / TEMPERATURE)
    scores = ((label_ids[:, :, None] == label_ids[:, None, :]) * weights[:, None, :]).sum(axis=2)  # of each neighbour's label
    return np.take_along_axis(label_ids, scores.argmax(axis=1)[:, None], axis=1)[:, 0]


class WeightedBatchSampler(LengthGroupedBatchSampler):
    """As its base, but an epoch draws classes with a probability that does not follow their number of texts.

    power: 0: each class equally often; 0.5: by the square root of its number. Within a class the texts take turns.
    """

    def __init__(self, dataset: TokenizedTexts, *options: Any, power: float):
        super().__init__(dataset, *options)
        self.power = power

    def draw_order(self, generator: np.random.Generator) -> np.ndarray:
        label_ids = self.dataset.text_labels[:, 0]
        _, counts = np.unique(label_ids, return_counts=True)
        shares = counts ** self.power
        drawn = generator.multinomial(len(label_ids), shares / shares.sum())
        members = np.split(np.argsort(label_ids, kind="stable"), np.cumsum(counts)[:-1])
        order = []
        for own, times in zip(members, drawn):
            turns = [generator.permutation(own) for _ in range(-(-times // len(own)))]
            order += [np.concatenate(turns)[:times]] if turns else []
        return generator.permutation(np.concatenate(order))


class SentenceTrainer(ClassificationTrainer):
    """ClassificationTrainer for the encoders of textcls.models.sentence_model.

    checkpoint: a checkpoints.Checkpoint; its labels are those of the rows. args: TrainingArguments with the options of
    retrieval_based/train.py. label_texts: LabelTexts. train: TokenizedTexts whose labels are (label id, row number), int64
    [num_texts, 2]; dev: TokenizedTexts, or None. The rest is as of ClassificationTrainer.
    """

    control: TrainerControl

    def __init__(self, checkpoint: Checkpoint, args: TrainingArguments, label_texts: LabelTexts, train: TokenizedTexts,
                 dev: Optional[TokenizedTexts], callbacks: Sequence[TrainerCallback] = ()):
        super().__init__(checkpoint.labels, checkpoint.rust_tokenizer, args, model=checkpoint.model, train_dataset=train,
                         criterion=paddle.nn.CrossEntropyLoss(),  # which the library asks for; the loss is another one
                         tokenizer=checkpoint.tokenizer, data_collator=lambda rows: collate(rows, checkpoint.pad_id),
                         eval_dataset=dev, callbacks=[*callbacks, EpochCallback(self)])
        self.checkpoint, self.label_texts = checkpoint, label_texts
        self.size = checkpoint.model.embedding_size
        self.sizes = sorted({*checkpoint.model.config.sentence_encoder["matryoshka_dims"], self.size})
        self.negatives: Optional[np.ndarray] = None  # int32 [num_texts, hard_negatives]: labels
        self.negatives_epoch: Optional[int] = None  # when they were mined

    def training_texts(self) -> list[TokenizedTexts]:
        return [*super().training_texts(), self.label_texts.tokens]

    def unwrapped(self) -> paddle.nn.Layer:
        """Return the model without what spreads it over processes."""
        return getattr(self.model, "_layers", self.model)

    def _get_train_sampler(self) -> LengthGroupedBatchSampler:
        args, powers = self.args, {"sqrt": 0.5, "balanced": 0.0}
        options = (self.train_dataset, args.per_device_train_batch_size, args.seed, args.dataset_world_size, args.dataset_rank,
                   args.dataloader_drop_last, True)
        if args.class_sampling == "natural":
            return LengthGroupedBatchSampler(*options)
        return WeightedBatchSampler(*options, power=powers[args.class_sampling])

    def training_step(self, model: paddle.nn.Layer, inputs: dict[str, paddle.Tensor]) -> paddle.Tensor:
        """One step, of which the library only has to make the optimizer's part. Returns the loss of all processes' rows.

        The vectors' gradients are worked out first, then those of the weights, chunk by chunk, so that memory is needed for the
        activations of one chunk only (gradient cache: Gao et al. 2021, arXiv:2101.06983). A chunk drops out the same in both
        passes, since each has a seed of its own; a batch of one chunk is encoded once.
        """
        (self.threads or model).train()
        rank, args = self.args.dataset_rank, self.args
        rows = self.gather(inputs["labels"].numpy())
        column_labels, columns = self.choose_columns(np.concatenate(rows))
        own_columns = columns[rank::args.dataset_world_size]
        parts = self.split(inputs["input_ids"].numpy()) + self.split(own_columns)
        seeds = np.random.default_rng([args.seed, self.state.global_step, rank + 1]).integers(2**31, size=len(parts))
        is_cached = len(parts) > 2
        with paddle.set_grad_enabled(not is_cached):
            vectors = [self.encode(part, seed) for part, seed in zip(parts, seeds)]
        values = np.concatenate([part.numpy() for part in vectors])
        loss, gradients = self.differentiate(values, rows, column_labels)
        ends = np.cumsum([len(part) for part in parts])[:-1]
        for index, gradient in enumerate(np.split(gradients, ends)):
            part = self.encode(parts[index], seeds[index]) if is_cached else vectors[index]
            gradient = paddle.to_tensor(gradient)
            part.backward(self.scaler.scale(gradient) if self.do_grad_scaling else gradient)
            if self.threads is not None:
                self.threads.backward()
        if args.dataset_world_size > 1:
            for parameter in self.unwrapped().parameters():
                if parameter.grad is not None:
                    paddle.distributed.all_reduce(parameter.grad)
        return loss

    def gather(self, values: np.ndarray) -> list[np.ndarray]:
        """Collect what all processes have, in their order."""
        if self.args.dataset_world_size == 1:
            return [values]
        parts: list[np.ndarray] = []
        paddle.distributed.all_gather_object(parts, values)
        return parts

    def choose_columns(self, rows: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Choose the labels that the texts of a step are compared with, each once: (int64 [num_columns], their token ids).

        rows: int64 [num_texts, 2], (label id, row number) of all processes' texts. A label of several texts has one drawn.
        """
        chosen = rows[:, 0] if self.negatives is None else np.concatenate([rows[:, 0], self.negatives[rows[:, 1]].ravel()])
        column_labels, (tokens, offsets) = np.unique(chosen), self.label_texts
        generator = np.random.default_rng([self.args.seed, self.state.global_step])
        drawn = generator.integers(offsets[column_labels], offsets[column_labels + 1])
        return column_labels, [tokens[index]["input_ids"] for index in drawn]

    def split(self, rows: Union[np.ndarray, list[np.ndarray]]) -> list[np.ndarray]:
        """Split texts into chunks, each padded to its longest. rows: int64 [num_texts, length], padded, or lists of token ids."""
        size, pad_id, chunks = self.args.chunk_size or len(rows), self.checkpoint.pad_id, []
        for start in range(0, len(rows), max(size, 1)):
            chunk = rows[start:start + size]
            chunk = pad_batch(chunk, pad_id) if isinstance(chunk, list) else chunk
            chunks.append(chunk[:, :np.flatnonzero((chunk != pad_id).any(axis=0))[-1] + 1])
        return chunks

    def encode(self, input_ids: np.ndarray, seed: int) -> paddle.Tensor:
        """Return the vectors of a chunk, float32 [num_texts, size]; seed: of its dropout."""
        model = self.threads or self.unwrapped()
        if self.threads is not None:
            self.threads.begin(int(seed), 0)
        else:
            paddle.seed(int(seed))
        with self.autocast_smart_context_manager():
            return model(paddle.to_tensor(input_ids)).astype("float32")

    def differentiate(self, values: np.ndarray, rows: list[np.ndarray], column_labels: np.ndarray
                      ) -> tuple[paddle.Tensor, np.ndarray]:
        """Compute the loss of a step and its gradients by this process's vectors: (scalar, float32 like values).

        values: float32 [texts and labels of this process, size]; rows: of each process, (label id, row number) of its texts;
        column_labels: of all processes.
        """
        rank, processes = self.args.dataset_rank, self.args.dataset_world_size
        everything = self.gather(values)
        counts = [len(part) for part in rows]
        columns = np.empty((len(column_labels), self.size), np.float32)
        for index, part in enumerate(everything):
            columns[index::processes] = part[counts[index]:]
        texts = paddle.to_tensor(np.concatenate([part[:count] for part, count in zip(everything, counts)]), stop_gradient=False)
        columns = paddle.to_tensor(columns, stop_gradient=False)
        loss = retrieval_loss(texts, np.concatenate(rows)[:, 0], columns, column_labels, self.args, self.sizes)
        loss.backward()
        start = sum(counts[:rank])
        return loss.detach(), np.concatenate([texts.grad.numpy()[start:start + counts[rank]],
                                              columns.grad.numpy()[rank::processes]])

    def encode_texts(self, tokens: TokenizedTexts) -> np.ndarray:
        """Return the vectors of texts without dropout, shared out between the processes: float32 [num_texts, size]."""
        rank, processes = self.args.dataset_rank, self.args.dataset_world_size
        self.model.eval()
        own = predict_logits(self.checkpoint, tokens.select(np.arange(rank, tokens.num_texts, processes)),
                             self.args.per_device_eval_batch_size)
        self.model.train()
        vectors = np.empty((tokens.num_texts, self.size), np.float32)
        for index, part in enumerate(self.gather(own)):
            vectors[index::processes] = part
        return vectors

    def find_labels(self, vectors: np.ndarray, count: int) -> np.ndarray:
        """Find the `count` labels with the nearest text for each vector, nearest first: int64 [num_texts, count]."""
        tokens, offsets = self.label_texts
        owners = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        most = int(np.diff(offsets).max())
        nearest, _ = top_columns(vectors, self.encode_texts(tokens), count * most)  # so many hold `count` different labels
        found = owners[nearest]
        if most == 1:
            return found
        return np.stack([row[np.sort(np.unique(row, return_index=True)[1])][:count] for row in found])

    def evaluate(self, eval_dataset: Optional[TokenizedTexts] = None, ignore_keys: Optional[list[str]] = None,
                 metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measure the shares of the dev texts, 0 to 1, whose label is among the nearest labels (recall@N), or that the vote of
        the nearest training texts gets right (accuracy). Returns {"eval_accuracy", "eval_recall@1", ...}."""
        dev: TokenizedTexts = self.eval_dataset if eval_dataset is None else eval_dataset
        dev_ids, vectors, metrics = dev.text_labels, self.encode_texts(dev), {}
        counts = recall_counts(len(self.label_texts.offsets) - 1)
        is_right = self.find_labels(vectors, counts[-1]) == dev_ids[:, None]
        voters = np.random.default_rng(self.args.seed).permutation(self.train_dataset.num_texts)[:MOST_VOTERS]
        nearest, cosines = top_columns(vectors, self.encode_texts(self.train_dataset.select(voters)), NEIGHBOURS)
        guesses = majority(cosines, self.train_dataset.text_labels[voters, 0][nearest])
        metrics[f"{metric_key_prefix}_accuracy"] = float((guesses == dev_ids).mean())
        for count in counts:
            metrics[f"{metric_key_prefix}_recall@{count}"] = float(is_right[:, :count].any(axis=1).mean())
            get_logger().info(f"recall@{count}={100 * metrics[f'{metric_key_prefix}_recall@{count}']:.3f}")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def mine_negatives(self, epoch: int) -> None:
        """For each training text, find the labels that the encoder confuses its own with; they join its batches from now on."""
        if epoch == self.negatives_epoch:
            return  # they came with the checkpoint
        label_ids, count = self.train_dataset.text_labels[:, :1], min(self.args.hard_negatives, len(self.label_texts.offsets) - 2)
        found = self.find_labels(self.encode_texts(self.train_dataset), count + 1)
        is_own = found == label_ids
        is_own[~is_own.any(axis=1), -1] = True  # its own label is farther away still: the last one goes
        self.negatives = found[~is_own].reshape(len(found), -1).astype(np.int32)
        self.negatives_epoch = epoch

    def _load_optimizer_and_scheduler(self, checkpoint: Optional[str]) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint or "", NEGATIVES_FILE)
        if checkpoint and os.path.isfile(path):
            with np.load(path, allow_pickle=False) as saved:
                self.negatives, self.negatives_epoch = saved["label_ids"], int(saved["epoch"])

    def _save(self, output_dir: str, **options: Any) -> None:
        super()._save(output_dir, **options)
        if self.args.should_save and self.is_in_train and self.negatives is not None and self.negatives_epoch is not None:
            np.savez(os.path.join(output_dir, NEGATIVES_FILE), label_ids=self.negatives, epoch=self.negatives_epoch)


class EpochCallback(TrainerCallback):
    """What a SentenceTrainer does between epochs."""

    def __init__(self, trainer: SentenceTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       train_dataloader: paddle.io.DataLoader, **kwargs: Any) -> None:
        epoch = state.global_step // len(train_dataloader)
        if args.hard_negatives and epoch:
            self.trainer.mine_negatives(epoch)
