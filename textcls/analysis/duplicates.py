"""When two texts are the same, or nearly; where such texts carry different labels, at least one label is likely to be wrong."""

import numpy as np

from textcls.common.log import progress_bar
from textcls.data.folds import comparison_key

BLOCK = 256  # texts compared with all others at once: bounds memory


def find_conflicts(texts: list[str], label_ids: np.ndarray, threshold: float = 0.8) -> list[tuple[float, list[int]]]:
    """Find groups of like texts with different labels: (similarity, row indices) of each, most similar first.

    Similarity 1.0 here means equal after `comparison_key`; such a group has all rows of that text. The others are pairs:
    for each distinct text its most similar one with another label, if the cosine of their character 1-2-gram TF-IDF vectors is
    at least threshold (above 0, up to 1). label_ids: int64 [num_texts]; of equal texts the first one's label is compared.
    """
    rows: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        rows.setdefault(comparison_key(text), []).append(index)
    conflicts = [(1.0, group) for group in rows.values() if len(set(label_ids[group].tolist())) > 1]
    keys, first = list(rows), np.array([group[0] for group in rows.values()])
    for similarity, one, other in _near_pairs(keys, np.asarray(label_ids)[first], threshold):
        conflicts.append((similarity, sorted((int(first[one]), int(first[other])))))
    return sorted(conflicts, key=lambda conflict: (-conflict[0], conflict[1]))


def _near_pairs(keys: list[str], labels: np.ndarray, threshold: float) -> list[tuple[float, int, int]]:
    """Find each pair of keys with different labels of which one is the nearest such of the other: (cosine, index, index).

    Prefix filtering (Bayardo et al. 2007, "Scaling up all pairs similarity search"): with the n-grams of every text sorted
    from rare to common, two texts can only reach the threshold if they share one before the point where the rest of either
    vector is shorter than the threshold. Only pairs that share such an n-gram, mostly a rare one, are compared.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), lowercase=False, dtype=np.float32).fit_transform(keys)
    by_rarity = np.argsort(np.diff(vectors.tocsc().indptr), kind="stable")
    vectors = vectors[:, by_rarity].tocsr()
    vectors.sort_indices()
    prefixes = vectors.copy()
    for start, end in zip(vectors.indptr, vectors.indptr[1:]):
        rest = np.cumsum(vectors.data[start:end][::-1] ** 2)[::-1]  # squared length of what comes from here on
        prefixes.data[start:end] = rest >= (threshold - 1e-4) ** 2  # 1e-4: rounding
    prefixes.eliminate_zeros()
    columns = prefixes.T.tocsr()
    found: dict[int, tuple[float, int]] = {}  # key -> cosine and index of its most similar one
    with progress_bar(len(keys), "Comparing texts") as progress:
        for start in range(0, len(keys), BLOCK):
            candidates = (prefixes[start:start + BLOCK] @ columns).tocoo()
            ones, others = candidates.row + start, candidates.col
            different = labels[ones] != labels[others]
            for part in range(0, int(different.sum()), 1 << 18):
                one, other = (side[different][part:part + (1 << 18)] for side in (ones, others))
                cosines = np.asarray(vectors[one].multiply(vectors[other]).sum(axis=1)).ravel()
                for i in np.flatnonzero(cosines >= threshold - 1e-6).tolist():
                    best = found.get(one[i])
                    if best is None or cosines[i] > best[0]:
                        found[one[i]] = (float(cosines[i]), int(other[i]))
            progress.update(min(BLOCK, len(keys) - start))
    pairs = {(min(one, other), max(one, other)): cosine for one, (cosine, other) in found.items()}
    return [(min(cosine, 0.9999), one, other) for (one, other), cosine in pairs.items()]
