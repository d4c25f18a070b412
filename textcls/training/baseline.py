"""Character TF-IDF + logistic regression: the classifier without Paddle that evaluate.py and dirty.py compare with."""

import numpy as np


def baseline_probs(train_texts: list[str], train_ids: np.ndarray, texts: list[str], num_classes: int, c: float = 10.0,
                   min_df: int = 1) -> np.ndarray:
    """Train on (list of str, int64 [num_rows]) and return probabilities of texts: float32 [num_texts, num_classes].

    Characters and pairs of them, sublinear TF-IDF. c: inverse strength of the L2 penalty; less where labels are noisy.
    min_df: in how many training texts an n-gram must occur to count; 2 takes a third of the time.
    A class without training rows has probability 0.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    probs = np.zeros((len(texts), num_classes), np.float32)
    classes = np.unique(train_ids)
    if len(classes) == 1:  # which LogisticRegression refuses
        probs[:, classes] = 1
        return probs
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True, min_df=min_df)
    try:
        vectors = vectorizer.fit_transform(train_texts)
    except ValueError:  # so few texts that none shares an n-gram with another
        vectors = vectorizer.set_params(min_df=1).fit_transform(train_texts)
    with threadpool_limits(1):  # many short BLAS calls: more threads only wait for each other
        classifier = LogisticRegression(C=c, max_iter=1000).fit(vectors, train_ids)
    probs[:, classifier.classes_] = classifier.predict_proba(vectorizer.transform(texts))
    return probs
