"""What a text is: one rule for the data files, the Python interface and all servers. Needs the standard library only, since
deploy/triton_serving/build_repository.py copies this file to where nothing else of this repository is.
"""

import unicodedata


def text_problem(text):
    """What keeps a str from being a text, in words, or None. Tabs and line feeds may be in it: in files alone they separate."""
    if not text.strip():
        return "empty or blank"
    if "\0" in text:
        return "a NUL character"
    if has_lone_surrogate(text):
        return "a lone surrogate"
    return None


def has_lone_surrogate(text):
    """Whether a str has half a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def has_invisible(name):
    """Whether a name has characters that nobody sees: control characters but the tab, ends of lines, spaces without width."""
    return any(char in "\u200b\u2028\u2029\ufeff" or (char != "\t" and unicodedata.category(char) == "Cc") for char in name)


def check_texts(texts):
    """Return texts as a list. TypeError where they are not str, ValueError where one is no text."""
    texts = None if isinstance(texts, str) else list(texts)  # list: a generator can be read only once
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise TypeError("texts is not a list of str")
    for index, text in enumerate(texts):
        problem = text_problem(text)
        if problem:
            raise ValueError(f"text {index}: {problem}, expected a text")
    return texts
