"""What stands for labels, row by row: one order for written vectors and for the texts that they are of. Needs no Paddle."""

from textcls.index_changes import label_texts


def label_rows(words):
    """The rows of labels: list of (label, text), for each label its name (what follows its last ##) and its words, once each.

    words: {label: its words}, as of utils.read_label_words.
    """
    return [(label, text) for label, own in words.items() for text in label_texts(label, own)]
