"""The part `analysis` of bench.py: the search of sent_interpret.py among many training texts."""

import time

from measuring import SEED, SHAPES


def searching(job):
    """Seconds of each method of sent_interpret.py on random features."""
    import numpy as np

    import textcls.models.paddle_setup  # noqa: F401  it sets the process up
    from textcls.analysis.features import nearest_rows
    from textcls.analysis.influence import METHODS, influence_scores
    random_state, classes, seconds = np.random.default_rng(SEED), 11, {}
    size = SHAPES[job["shape"]]["hidden_size"]
    weights = random_state.normal(size=(size, classes)).astype(np.float32) / 4
    train, texts = (np.tanh(random_state.normal(size=(count, size))).astype(np.float32)
                    for count in (job["rows"], job["texts"]))  # as ERNIE's pooler gives them: -1 to 1
    train = train, train @ weights, random_state.integers(classes, size=len(train))
    texts = texts, texts @ weights
    for method, similarities in METHODS.items():
        for sim_fn in similarities:
            start = time.perf_counter()
            nearest_rows(influence_scores(method, sim_fn, train, texts), job["texts"], 3, lowest=True)
            seconds[f"{method} {sim_fn}"] = time.perf_counter() - start
    return seconds


def measure_search(turns, report, folder, quick):
    """Searching for a number of texts among many training texts."""
    count, texts = (10000, 100) if quick else (100000, 1000)
    best, = turns.best(searching, {"folder": folder, "shape": "medium", "rows": count, "texts": texts}, {})
    seconds = {name: value for name, value in best.items() if " " in name}
    report.rows += [[f"search: {name}, s", None, value, None] for name, value in seconds.items()]
    report.notes.append(f"{count} training rows x {texts} texts: the limit of 60 s of search is "
                        f"{'kept' if max(seconds.values()) <= 60 else 'MISSED'}, peak memory {best['peak_gb']:.2f} GB")
