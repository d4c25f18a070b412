"""What a classifier needs to tell texts of no known label: fitted after its training, on the features of its last layer."""

from typing import Optional

import numpy as np

from textcls.common.known import Centres, find_nearness, fit_known, write_centres
from textcls.common.log import get_logger
from textcls.data.tokens import TokenizedTexts
from textcls.models.checkpoints import Checkpoint, load_checkpoint
from textcls.models.configs import change_config
from textcls.models.families import FAMILIES
from textcls.models.inference import predict_features

WAYS = ["centres", "none"]  # of --known
SHRINKAGE = 0.1  # of covariances, towards a multiple of the identity
FOLDS = 3  # parts of the labels that are left out in turn
MOST_ROWS = 50_000  # training texts, or windows, whose features are looked at: of more, some, evenly spaced
LEAST_FITTED = 30  # dev texts below which they say more of themselves than of the model


def save_known(folder: str, train: TokenizedTexts, dev: Optional[TokenizedTexts], file: str, batch_size: int) -> None:
    """Fit what tells unknown texts to the trained model in a folder, log how well it does, and save it there.

    train, dev: with labels; file: the name of dev's. Where it cannot be fitted the log says why, and the folder holds none.
    """
    if dev is None or dev.num_texts < LEAST_FITTED:
        reason = f"that takes {LEAST_FITTED} dev texts or more (--do_eval)"
    elif len(np.intersect1d(train.text_labels, dev.text_labels)) < FOLDS:
        reason = f"that takes texts of {FOLDS} labels or more"
    else:
        checkpoint = load_checkpoint(folder)
        config = checkpoint.model.config
        if getattr(config, "prompt", None) is None and config.model_type in FAMILIES:
            centres = fit_centres(checkpoint, train, dev, file, batch_size)
            return change_config(folder, known=write_centres(folder, centres))
        reason = f"that takes a model of one of the types {', '.join(FAMILIES)} without a prompt"
    get_logger().warning(f"--known centres: this model will not tell unknown texts: {reason}.")


def fit_centres(checkpoint: Checkpoint, train: TokenizedTexts, dev: TokenizedTexts, file: str, batch_size: int) -> Centres:
    """Find where the labels' training texts are, and how known that makes dev texts, with their labels and without them."""
    rows = train.select(np.arange(0, train.num_texts, -(-len(train) // MOST_ROWS)))
    assert rows.labels is not None
    # windows of long texts each by itself, as answers will look at them
    features, dev_features = (predict_features(checkpoint, TokenizedTexts(tokens.ids, tokens.offsets), batch_size)[0]
                              for tokens in (rows, dev))
    known, unknown = leave_labels_out(features, rows.labels, dev, dev_features)
    weights, figure = fit_known(known, unknown)
    get_logger().info(f"Unknown texts will be told by how far they are from the labels' centres: fitted on {dev.num_texts} rows "
                      f"of {file} | AUROC of known against labels that are left out {figure:.4f}")
    return find_centres(features, rows.labels)._replace(weights=weights.astype(np.float32))


def leave_labels_out(features: np.ndarray, label_ids: np.ndarray, dev: TokenizedTexts, dev_features: np.ndarray
                     ) -> tuple[np.ndarray, np.ndarray]:
    """Measure the nearness of dev texts to centres that lack a part of the labels: (known, unknown), float32 [num_texts, 1] each;
    each text once in both, among centres that have its label and among some that have not.

    The model has learnt these labels, so that its logits would tell too well that they are left out; the distance from the other
    centres is hardly changed by that. features, label_ids: of training windows; dev_features: of dev's windows.
    """
    labels = np.unique(label_ids)
    fold_of = np.full(max(labels.max(), dev.text_labels.max()) + 1, -1)
    fold_of[labels] = np.random.default_rng(0).permutation(len(labels)) % FOLDS
    known, unknown = [], []
    for fold in range(FOLDS):
        is_there = fold_of[label_ids] != fold
        centres = find_centres(features[is_there], label_ids[is_there])
        nearness, own_folds = dev.join(find_nearness(centres, dev_features)[:, None]), fold_of[dev.text_labels]
        known.append(nearness[own_folds == (fold + 1) % FOLDS])
        unknown.append(nearness[own_folds == fold])
    return np.concatenate(known), np.concatenate(unknown)


def find_centres(features: np.ndarray, label_ids: np.ndarray) -> Centres:
    """Find where the texts of labels are, without weights yet. features: float32 [num_texts, hidden_size]; label_ids: int64
    [num_texts].

    The covariances within labels and of all texts are made diagonal together. Both are shrunk, each towards its own mean
    variance: so directions in which texts hardly differ, and unknown ones may, count against a text.
    """
    from scipy.linalg import eigh

    _, places, counts = np.unique(label_ids, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), features.shape[1]))
    np.add.at(sums, places, features)
    means, mean = sums / counts[:, None], sums.sum(axis=0) / len(features)
    within, total = (shrink(rest.T @ rest / len(features)) for rest in (features - means.astype(np.float32)[places],
                                                                        features - mean.astype(np.float32)))
    variances, projection = eigh(total, within)
    arrays = (mean, projection, (means - mean) @ projection, 1 / variances, np.zeros(2))
    return Centres(*(array.astype(np.float32) for array in arrays))


def shrink(covariance: np.ndarray) -> np.ndarray:
    """Move a covariance, float32 [size, size], by SHRINKAGE towards a multiple of the identity: float64 [size, size]."""
    size = len(covariance)
    least = max(SHRINKAGE * float(np.trace(covariance)) / size, 1e-9)
    return (1 - SHRINKAGE) * covariance.astype(np.float64) + least * np.eye(size)
