"""Character TF-IDF + logistic regression: the classifier without Paddle that evaluate.py and dirty.py compare with."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Union

import numpy as np

if TYPE_CHECKING:
    import scipy.sparse

    Matrix = Union[np.ndarray, scipy.sparse.csr_matrix]  # float [num_rows, size]


def fit_baseline(train_texts: Sequence[str], train_ids: np.ndarray, num_classes: int, c: float = 10.0, min_df: int = 1
                 ) -> Callable[[Sequence[str]], np.ndarray]:
    """Train on (list of str, int64 [num_rows]). Returns what gives the probabilities of texts, float32 [num_texts, num_classes].

    Characters and pairs of them, sublinear TF-IDF. c: inverse strength of the L2 penalty; less where labels are noisy.
    min_df: in how many training texts an n-gram must occur to count; 2 takes a third of the time.
    A class without training rows has probability 0.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True, min_df=min_df)
    try:
        vectors = vectorizer.fit_transform(train_texts)
    except ValueError:  # so few texts that none shares an n-gram with another
        vectors = vectorizer.set_params(min_df=1).fit_transform(train_texts)
    answer = fit_logistic(vectors, train_ids, num_classes, c)
    return lambda texts: answer(vectorizer.transform(texts))


def fit_logistic(vectors: "Matrix", label_ids: np.ndarray, num_classes: int, c: float) -> Callable[["Matrix"], np.ndarray]:
    """Train logistic regression on vectors. Returns what gives the probabilities of others, float32 [num_rows, num_classes].

    label_ids: int64 [num_rows]; c: inverse strength of the L2 penalty. A class without rows has probability 0.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    classes = np.unique(label_ids)
    if len(classes) == 1:  # which LogisticRegression refuses
        return lambda others: np.tile(np.eye(num_classes, dtype=np.float32)[classes], (others.shape[0], 1))
    with threadpool_limits(1):  # many short BLAS calls: more threads only wait for each other
        classifier = LogisticRegression(C=c, max_iter=1000).fit(vectors, label_ids)

    def answer(others: "Matrix") -> np.ndarray:
        probs = np.zeros((others.shape[0], num_classes), np.float32)
        probs[:, classifier.classes_] = classifier.predict_proba(others)
        return probs

    return answer


def baseline_probs(train_texts: Sequence[str], train_ids: np.ndarray, texts: Sequence[str], num_classes: int, c: float = 10.0,
                   min_df: int = 1) -> np.ndarray:
    """Train as `fit_baseline` does, and return the probabilities of texts: float32 [num_texts, num_classes]."""
    return fit_baseline(train_texts, train_ids, num_classes, c, min_df)(texts)
