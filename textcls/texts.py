"""What a text is: one rule for the data files, the Python interface and all servers. Needs the standard library only, since
deploy/triton_serving/build_repository.py copies this file to where nothing else of this repository is.
"""


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
