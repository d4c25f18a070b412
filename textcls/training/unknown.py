"""What a classifier needs to tell texts of no known label: fitted after its training, on the features of its last layer."""

from typing import Optional

import numpy as np

from textcls.common.known import Centres, fit_known, known_features, write_centres
from textcls.common.log import get_logger
from textcls.data.tokens import TokenizedTexts
from textcls.models.checkpoints import Checkpoint, load_checkpoint
from textcls.models.configs import change_config
from textcls.models.inference import predict_features, predict_nearness

WAYS = ["centres", "none"]  # of --known
SHRINKAGE = 0.1  # of the covariance within labels, towards a multiple of the identity
MOST_ROWS = 50_000  # training texts, or windows, whose features are looked at: of more, some, evenly spaced
LEAST_FITTED = 30  # dev texts below which they say more of themselves than of the model


def save_known(folder: str, train: TokenizedTexts, dev: Optional[TokenizedTexts], file: str, batch_size: int) -> None:
    """Fit what tells unknown texts to the trained model in a folder, log how well it does, and save it there.

    train, dev: with labels; file: the name of dev's. Where it cannot be fitted the log says why, and the folder holds none.
    """
    if dev is None or dev.num_texts < LEAST_FITTED:
        reason = f"that takes {LEAST_FITTED} dev texts or more (--do_eval)"
    elif min(len(np.unique(tokens.text_labels)) for tokens in (train, dev)) < 2:
        reason = "that takes texts of two labels or more"
    else:
        checkpoint = load_checkpoint(folder)
        if getattr(checkpoint.model.config, "prompt", None) is None:
            centres = fit_centres(checkpoint, train, dev, file, batch_size)
            return change_config(folder, known=write_centres(folder, centres))
        reason = "a prompt model has no features for that"
    get_logger().warning(f"--known centres: this model will not tell unknown texts: {reason}.")


def fit_centres(checkpoint: Checkpoint, train: TokenizedTexts, dev: TokenizedTexts, file: str, batch_size: int) -> Centres:
    """Find where the labels' training texts are, and how known that makes dev texts against mixed ones."""
    rows = train.select(np.arange(0, train.num_texts, -(-len(train) // MOST_ROWS)))
    assert rows.labels is not None
    windows = TokenizedTexts(rows.ids, rows.offsets)  # each by itself, as texts will be measured
    centres = find_centres(predict_features(checkpoint, windows, batch_size)[0], rows.labels)
    checkpoint = checkpoint._replace(centres=centres)
    known, unknown = (known_features(predict_nearness(checkpoint, tokens, batch_size)) for tokens in (dev, mix_texts(dev)))
    weights, figure = fit_known(known, unknown)
    get_logger().info(f"Unknown texts will be told by how far they are from the labels' centres: fitted on {dev.num_texts} rows "
                      f"of {file} and {len(unknown)} mixtures of two of them | AUROC {figure:.4f}")
    return centres._replace(weights=weights.astype(np.float32))


def mix_texts(tokens: TokenizedTexts, seed: int = 0) -> TokenizedTexts:
    """Make texts that are of no label: of each the first half, and behind it the second half of one of another label.

    Of a text of several windows it is the first one. Returns as many at most, since some find no partner.
    """
    assert tokens.labels is not None
    rows, labels = tokens.starts[:-1], tokens.text_labels
    partners = np.random.default_rng(seed).permutation(len(rows))
    mixed = []
    for first, second in zip(range(len(rows)), partners):
        if labels[first] != labels[second]:
            begin, end = (tokens[rows[number]]["input_ids"] for number in (first, second))
            mixed.append(np.concatenate([begin[:-(-len(begin) // 2)], end[len(end) // 2:]]))
    return TokenizedTexts.from_rows(mixed)


def find_centres(features: np.ndarray, label_ids: np.ndarray) -> Centres:
    """Find where the texts of labels are, without weights yet. features: float32 [num_texts, hidden_size]; label_ids: int64
    [num_texts], two or more different ones."""
    from scipy.linalg import eigh

    _, places, counts = np.unique(label_ids, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), features.shape[1]))
    np.add.at(sums, places, features)
    means, mean = sums / counts[:, None], sums.sum(axis=0) / len(features)
    rest = features - means.astype(np.float32)[places]
    offsets = (means - mean) * np.sqrt(counts / len(features))[:, None]
    within, between, size = (rest.T @ rest).astype(np.float64) / len(features), offsets.T @ offsets, features.shape[1]
    within = (1 - SHRINKAGE) * within + max(SHRINKAGE * np.trace(within) / size, 1e-9) * np.eye(size)
    first = size - min(len(counts) - 1, size)
    variances, projection = eigh(between, within, subset_by_index=[first, size - 1])
    arrays = (mean, projection, (means - mean) @ projection, 1 / (1 + np.maximum(variances, 0)), np.zeros(3))
    return Centres(*(array.astype(np.float32) for array in arrays))
