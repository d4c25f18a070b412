"""What a text and what a label is: one rule for each, asked by all that read, write and serve them. Needs the standard library
only, since deploy/triton_serving/build_repository.py copies this file to where nothing else of this repository is.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple, Optional


class Rule(NamedTuple):
    """What a string has to be. Readers, writers and servers ask `problem`, and give its reason as it is."""

    expected: str  # what messages say was expected
    refused: dict[str, str]  # what may not be in it -> how messages call that
    is_name: bool = False  # compared by eye and letter by letter: nothing invisible, no blanks around it
    begins_line: bool = False  # readers drop a byte order mark where a line begins with one

    def problem(self, value: str) -> Optional[str]:
        """Say what keeps a string from being this; None where nothing does."""
        if not value.strip():
            return "empty or blank"
        for part, name in self.refused.items():
            if part in value:
                return name
        if has_lone_surrogate(value):
            return "a lone surrogate (invalid UTF-8)"
        if self.begins_line and value.startswith("\ufeff"):
            return "a byte order mark at its beginning"
        if self.is_name and value != value.strip():
            return "blanks around it"
        if self.is_name and has_invisible(value):
            return "an invisible character"
        return None


NUL = {"\0": "a NUL character"}
SEPARATORS = {**NUL, "\t": "a tab", "\n": "a line end", "\r": "a line end"}
TEXT = Rule("a text", NUL)  # to label; a line break and a tab may be in it
# TEXT as a JSON schema can say it (ECMA-262). Not to check by: it takes quadratic time on a long text with a NUL
TEXT_PATTERN = r"^[^\x00]*[^\s\x00\x1c-\x1f\x85][^\x00]*$"
LINE = Rule("a text on one line, without a tab", SEPARATORS, begins_line=True)  # that a file can hold, beside a label
LABEL = Rule("a label of visible characters, without ==, a tab, a line end or blanks around it",
             {**SEPARATORS, "==": "== in it"}, True)

BREAKS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")  # a tab, and all that str.splitlines() splits at


def tidy_text(text: str) -> str:
    """Make a text what one line of a file can hold: a blank for its tabs and line breaks, no byte order mark at its ends."""
    joined = BREAKS.sub(" ", text)
    return (text if joined == text else joined.strip()).strip("\ufeff")


def has_lone_surrogate(text: str) -> bool:
    """Whether a str has half a surrogate pair, which JSON can write and UTF-8 cannot. So Python shows bytes that are no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def has_invisible(name: str) -> bool:
    """Whether a name has characters that nobody sees: control characters, ends of lines, spaces without width."""
    return any(char in "\u200b\u2028\u2029\ufeff" or unicodedata.category(char) == "Cc" for char in name)


def check_texts(texts: Iterable[str]) -> list[str]:
    """Return texts as a list. TypeError where they are not str, ValueError where one is no text."""
    listed = None if isinstance(texts, str) else list(texts)  # list: a generator can be read only once
    if listed is None or not all(isinstance(text, str) for text in listed):
        raise TypeError("texts is not a list of str")
    for index, text in enumerate(listed):
        problem = TEXT.problem(text)
        if problem:
            raise ValueError(f"text {index}: {problem}, expected {TEXT.expected}")
    return listed
