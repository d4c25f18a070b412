"""How good a classifier is."""

def compute_metrics(prediction):
    """Accuracy, micro and macro precision, recall and F1 from logits [num_texts, num_classes] and label ids."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    guesses, label_ids = prediction.predictions.argmax(axis=-1), prediction.label_ids
    metrics = {"accuracy": accuracy_score(label_ids, guesses)}
    for average in ("micro", "macro"):
        scores = precision_recall_fscore_support(label_ids, guesses, average=average, zero_division=0)
        metrics.update(zip((f"{average}_precision", f"{average}_recall", f"{average}_f1"), map(float, scores)))
    return metrics
