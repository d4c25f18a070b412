"""What the scripts at the root share: reading a data folder, tokenizing, batching. Needs no Paddle.

The functions are those of textcls/data/, where they are explained; a project of your own imports them from there.
"""

from textcls.data.files import (  # noqa: F401
    check_splits,
    compare_labels,
    draw_shots,
    read_json,
    read_label_words,
    read_labelled,
    read_labels,
    read_lines,
    read_texts,
    write_rows,
)
from textcls.data.tokens import (  # noqa: F401
    DEFAULT_LENGTH,
    SHORTEST_LENGTH,
    TokenizedTexts,
    model_inputs,
    pad_batch,
    run_by_length,
    sorted_batches,
    tokenize,
)
