"""Which unlabelled texts to label first: the order of review.py, and the strategies that active.py compares."""

from typing import TYPE_CHECKING, Union

import numpy as np

from textcls.analysis.duplicates import comparison_key
from textcls.analysis.features import normalize

if TYPE_CHECKING:
    import scipy.sparse

Vectors = Union[np.ndarray, "scipy.sparse.csr_matrix"]  # float32 [num_rows, size], rows of length 1

CLUSTERS, CLUSTER_DIMENSIONS = 50, 64  # for texts of which no model says anything
SEED = 3  # of the clusters
SPREAD = 1000  # of the least certain unlabelled texts, so many are searched for near-duplicates
ALIKE = 0.9  # cosine from which an unlabelled text is taken for one that comes before it
WIDTH = 10  # k-means++ chooses a batch from so many times its size
RANDOM_SHARE = 0.15  # of a batch: what a model is sure of and wrong about is found there


def order_unlabelled(texts: list[str], vectors: Vectors, probs: np.ndarray) -> np.ndarray:
    """Order unlabelled texts, the most worth labelling first: int64 [num_texts].

    Breaking ties (Schroeder et al. 2022, arXiv:2107.05687): the smallest margin between the two likeliest labels first; of texts
    that are alike only one is among the first. vectors: of these texts; probs: float32 [num_texts, num_labels].
    """
    highest = np.sort(probs, axis=1)[:, -2:]
    order = np.argsort(highest[:, 1] - highest[:, 0], kind="stable")
    first = order[:SPREAD]
    cosines = vectors[first] @ vectors[first].T
    cosines = cosines if isinstance(cosines, np.ndarray) else cosines.toarray()
    chosen: list[int] = []
    keys: set[str] = set()
    for place, row in enumerate(first.tolist()):
        key = comparison_key(texts[row])
        if key not in keys and not (chosen and cosines[place, chosen].max() > ALIKE):
            keys.add(key)
            chosen.append(place)
    rest = np.setdiff1d(np.arange(len(first)), chosen)
    return np.concatenate([first[chosen], first[rest], order[SPREAD:]])


def order_by_clusters(vectors: Vectors, seed: int = SEED) -> np.ndarray:
    """Order texts of which no model says anything: the most typical one of each cluster, large ones first, then the second, ...

    Returns int64 [num_texts]. k-means on the leading directions of the vectors; after TypiClust (Hacohen et al. 2022,
    arXiv:2202.02794).
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD

    count = vectors.shape[0]
    dimensions = min(CLUSTER_DIMENSIONS, vectors.shape[1] - 1, count - 1)
    if dimensions < 1:
        return np.arange(count)
    points = normalize(TruncatedSVD(dimensions, random_state=seed).fit_transform(vectors))
    means = MiniBatchKMeans(min(CLUSTERS, count), random_state=seed, n_init=3, batch_size=1024).fit(points)
    distances = np.linalg.norm(points - means.cluster_centers_[means.labels_], axis=1)
    sizes = np.bincount(means.labels_, minlength=means.n_clusters)
    rank = np.empty(count, np.int64)  # within its cluster
    for cluster in range(means.n_clusters):
        members = np.flatnonzero(means.labels_ == cluster)
        rank[members[np.argsort(distances[members], kind="stable")]] = np.arange(len(members))
    return np.lexsort((-sizes[means.labels_], rank))


def choose_diverse(texts: list[str], vectors: np.ndarray, probs: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Choose the next texts to label, unlike each other: int64 [count].

    Most of them by k-means++ among the first WIDTH * count of `order_unlabelled`, on vectors that are longer where the model is
    less sure (after BADGE, Ash et al. 2020, arXiv:1906.03671), RANDOM_SHARE at random. count: at most num_texts.
    """
    from sklearn.cluster import kmeans_plusplus

    candidates = order_unlabelled(texts, vectors, probs)[:WIDTH * count]
    points = vectors[candidates] * (1 - probs[candidates].max(axis=1, keepdims=True))
    num_diverse = min(count - round(RANDOM_SHARE * count), len(np.unique(points, axis=0)))
    _, places = kmeans_plusplus(points, num_diverse, random_state=int(rng.integers(2**32)))
    chosen = candidates[np.unique(places)]
    rest = np.setdiff1d(np.arange(len(texts)), chosen)
    return np.concatenate([chosen, rng.permutation(rest)[:count - len(chosen)]])
