"""Classification by an encoder and an index: texts in, answers out. With an exported encoder it needs no Paddle.

    from textcls.retrieval.predictor import SearchPredictor
    predictor = SearchPredictor("encoder_export", "index")
    answers = predictor.answer(["头疼怎么办"], top_k=3, num_nearest=2)
"""

import logging
import threading
import time
from typing import Any, Optional

from textcls.common.errors import UserError
from textcls.common.log import Progress
from textcls.retrieval.encoder import for_queries, open_encoder
from textcls.retrieval.index import Stamp, check_encoder, index_stamp, open_index
from textcls.retrieval.search import Answer, make_answers

RETRY_SECONDS = 1.0  # after which a new index that could not be opened is tried again
logger = logging.getLogger("predictor")


class SearchPredictor:
    """An encoder with an index that may change. Safe to call from several threads.

    encoder_path: exported folder or checkpoint; index_dir: of build_index.py; options: of `open_encoder`. encoder: the
    TextEncoder; index: the SearchIndex that answers now. Raises UserError.
    """

    def __init__(self, encoder_path: str, index_dir: str, **options: Any) -> None:
        self.index = open_index(index_dir)  # what is wrong with it is said before the model is loaded
        self.encoder = open_encoder(encoder_path, **options)
        check_encoder(index_dir, self.index.header, self.encoder.encoder_id, self.encoder.dimension)
        self._lock = threading.Lock()
        self._problem: Optional[str] = None  # why the newest index was not taken
        self._tried: Optional[Stamp] = None  # the files of a new one may still be on their way
        self._retry_at = 0.0

    @property
    def labels(self) -> list[str]:
        """list of str"""
        return self.index.labels

    def answer(self, texts: list[str], top_k: int = 1, num_nearest: int = 0, progress: Optional[Progress] = None) -> list[Answer]:
        """Answers for texts (list of str): list of Answer in their order. TypeError or ValueError where they are no texts."""
        index = self.index  # the one whose prefix is put before the texts, whatever comes meanwhile
        return make_answers(index, for_queries(self.encoder, index.header).encode(texts, progress), texts, top_k, num_nearest)

    def batch_answer(self, texts: list[str], top_k: int = 1, num_nearest: int = 0) -> list[Answer]:
        """As `answer`, but all texts as one batch, in the calling thread: for callers with threads of their own."""
        index = self.index
        return make_answers(index, for_queries(self.encoder, index.header).encode_batch(texts), texts, top_k, num_nearest)

    def reload(self, wait: bool = True) -> bool:
        """Open the index anew where it has changed; returns whether. Meanwhile the old one answers.

        What cannot be opened is logged, and the old one stays. wait: for another thread that is opening it at the moment.
        """
        if not self._lock.acquire(blocking=wait):
            return False
        try:
            index = self.index
            stamp = index_stamp(index.folder)
            if stamp == index.stamp or (stamp == self._tried and time.monotonic() < self._retry_at):
                return False
            self._tried, self._retry_at = stamp, time.monotonic() + RETRY_SECONDS
            self.index = open_index(index.folder, self.encoder.encoder_id, self.encoder.dimension)
        except UserError as error:
            if str(error) != self._problem:
                logger.error(f"The new index is not taken, the old one goes on: {error}")
            self._problem = str(error)
            return False
        finally:
            self._lock.release()
        self._problem = None
        logger.info(f"Index reloaded: {len(self.index.labels)} labels")
        return True
