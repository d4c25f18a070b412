"""Training on the tokens that occur: of the table of word embeddings a model keeps only their rows, until it is saved.

A Chinese vocabulary has 40,000 rows, of which a data set may use 2,600. The others have no gradient: AdamW leaves them as they
are or, with weight decay, makes them smaller by a factor that is known. So the result is the same, while the gradient, its
norm, the optimizer's moments and its step are those of the rows that occur.
"""

import contextlib
import tempfile
import types
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np

from textcls.common.errors import UserError
from textcls.data.tokens import TokenizedTexts
from textcls.models.families import find_word_embeddings
from textcls.models.paddle_setup import paddle

ROWS = "embedding_rows"  # the entry of optimizer.pdopt with the ids whose moments it holds


def find_table(model: paddle.nn.Layer) -> paddle.nn.Embedding:
    """Find the layer with the table of a model's word embeddings."""
    layer = find_word_embeddings(model)
    return getattr(layer, "table", getattr(layer, "fn", layer))  # that of a SoftEmbedding, or of a Block of PaddleSlim


class EmbeddingRows:
    """The rows of a model's word embeddings that a training needs, in the place of the whole table.

    model: a PretrainedModel; ids: of `occurring_ids`; folder: an existing one for a file without a name, in which the table waits
    until `whole` or `restore` puts it back.
    """

    def __init__(self, model: paddle.nn.Layer, ids: np.ndarray, folder: str):
        self.layer, self.ids = find_table(model), ids
        table = self.layer.weight
        self.name, self.shape, self.stop_gradient = table.name, tuple(table.shape), table.stop_gradient
        values, self.shrinkage = table.numpy(), 1.0
        self.folder, self.file = folder, tempfile.TemporaryFile(dir=folder)
        self._write(values)
        places = np.full(self.shape[0], -1, np.int64)  # a token that is not expected is no row, and an error
        places[ids] = np.arange(len(ids))
        padding = None if self.layer._padding_idx is None else int(places[self.layer._padding_idx])
        self._put(values[ids])
        numbers = paddle.to_tensor(places)

        # options: the width that PaddleSlim gives its layers, which here is always the whole
        def look_up(layer: paddle.nn.Embedding, input_ids: paddle.Tensor, **options: Any) -> paddle.Tensor:
            rows = paddle.gather(numbers, input_ids.flatten()).reshape(input_ids.shape)
            if int(rows.min()) < 0:  # Paddle's own layer looks anywhere in memory
                raise ValueError("a token that does not occur in the texts of this training, expected one of EmbeddingRows.ids")
            return paddle.nn.functional.embedding(rows, layer.weight, padding_idx=padding)

        object.__setattr__(self.layer, "forward", types.MethodType(look_up, self.layer))

    def _write(self, table: np.ndarray) -> None:
        try:
            self.file.seek(0)
            self.file.write(np.ascontiguousarray(table).data)
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}, expected {table.nbytes / 2**20:.0f} MiB of free space for the "
                            "word embeddings that wait there during the training (--full_embeddings needs none)") from error

    def _put(self, rows: np.ndarray) -> None:
        parameter = type(self.layer.weight).from_tensor(paddle.to_tensor(rows), name=self.name)
        parameter.stop_gradient = self.stop_gradient
        self.layer.weight = parameter

    def shrink(self, factor: float) -> None:
        """Note that the rows which do not occur become smaller, as AdamW's weight decay makes all rows."""
        self.shrinkage *= factor

    def fill(self) -> np.ndarray:
        """Bring the whole table up to date: float32 [vocab_size, hidden_size]."""
        self.file.seek(0)
        table = np.fromfile(self.file, np.float32).reshape(self.shape)
        if self.shrinkage != 1.0:
            table *= np.float32(self.shrinkage)
            self.shrinkage = 1.0
            self._write(table)
        table[self.ids] = self.layer.weight.numpy()
        return table

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Put the whole table into the model for a while, to save it."""
        rows = self.layer.weight
        self._put(self.fill())
        try:
            yield
        finally:
            self.layer.weight = rows

    def restore(self) -> None:
        """Put the whole table back for good."""
        self._put(self.fill())
        self.file.close()
        vars(self.layer).pop("forward", None)


def fit_moments(state: dict[str, Any], name: str, size: int, rows: Optional[EmbeddingRows]) -> None:
    """Let the moments of the table in an optimizer's state, as a checkpoint holds them, be those of the rows of this training.

    state: name of an accumulator -> tensor, changed in place; name, size: of the table, and its rows; rows: None for the whole
    table. A row that has no moments in the checkpoint begins with zeros, which it would have: its token did not occur.
    """
    saved = state.pop(ROWS, None)
    saved_ids = np.arange(size) if saved is None else np.asarray(saved)
    ids = np.arange(size) if rows is None else rows.ids
    if np.array_equal(saved_ids, ids):
        return
    _, here, there = np.intersect1d(ids, saved_ids, return_indices=True)
    for key in [key for key in state if key.startswith(f"{name}_moment")]:
        moments = np.asarray(state[key])
        fitted = np.zeros((len(ids), moments.shape[1]), moments.dtype)
        fitted[here] = moments[there]
        state[key] = paddle.to_tensor(fitted)


def occurring_ids(model: paddle.nn.Layer, texts: Sequence[TokenizedTexts], special_ids: Sequence[int]) -> np.ndarray:
    """Find the tokens of texts, with the special ones, that have a row in a model's table: int64 [num_ids], rising."""
    layer = find_table(model)
    size = layer.weight.shape[0]
    always = [*special_ids, layer._padding_idx or 0, size - 1]  # a SoftEmbedding looks the last up for ids beyond the table
    ids = np.unique(np.concatenate([np.asarray(always, np.int64), *(tokens.ids for tokens in texts)]))
    return ids[(ids >= 0) & (ids < size)].astype(np.int64)
