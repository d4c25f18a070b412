"""In which encoding a text file is that is no UTF-8. Needs the standard library only.

A decoder alone decides little: GB18030 takes nearly any bytes. So the characters that it makes have to be common ones.
charset-normalizer 3.5 was tried instead: of questions of ten characters in GB18030 it calls every fourth Korean or UTF-16.
"""

import codecs
from typing import NamedTuple, Optional

BOMS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),  # these first: UTF-16's begins UTF-32's
        (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
LEAST_COMMON = 0.7  # part of the characters beyond ASCII


class Candidate(NamedTuple):
    """An encoding, and where its common characters are."""

    name: str  # Python's and iconv's
    common: str  # the codec that has them, in two bytes
    first_bytes: frozenset[int]  # of these two: the characters in frequent use, punctuation, kana


def first_bytes(*ranges: tuple[int, int]) -> frozenset[int]:
    return frozenset(byte for first, last in ranges for byte in range(first, last + 1))


# of equals the first is taken
CANDIDATES = (Candidate("GB18030", "gb2312", first_bytes((0xA1, 0xA1), (0xA3, 0xA3), (0xB0, 0xD7))),
              Candidate("EUC-JP", "euc-jp", first_bytes((0xA1, 0xA1), (0xA3, 0xA5), (0xB0, 0xCF))),
              Candidate("Big5", "big5", first_bytes((0xA1, 0xC6))),
              Candidate("Shift_JIS", "shift_jis", first_bytes((0x81, 0x83), (0x88, 0x97))))
# Korean letters lie where GB18030 has the common Chinese characters of the sounds a to mo, which are 6 in 10 of a Chinese text
KOREAN = Candidate("CP949", "euc-kr", first_bytes((0xB0, 0xC8)))
LEAST_KOREAN, KOREAN_PER_OTHER = 20, 4  # of 46,000 lines of Chinese none is taken for Korean


def bom_encoding(start: bytes) -> Optional[str]:
    """Return the encoding that a byte order mark at the start of a file tells, UTF-16 or UTF-32; None without one."""
    return next((name for mark, name in BOMS if start.startswith(mark)), None)


def guess_encoding(content: bytes) -> Optional[str]:
    """Name the encoding in which most characters beyond ASCII are common ones; None where there is none.

    content: may end amid a character. Right for Chinese and Japanese of five characters or more, for Korean of twenty.
    """
    korean, count = count_common(content, KOREAN)
    if korean >= LEAST_KOREAN + KOREAN_PER_OTHER * (count - korean):
        return KOREAN.name
    shares = {candidate.name: common / max(1, count) for candidate in CANDIDATES
              for common, count in [count_common(content, candidate)]}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= LEAST_COMMON else None


def count_common(content: bytes, candidate: Candidate) -> tuple[int, int]:
    """Return how many characters beyond ASCII are common in an encoding, of how many; 0 where the bytes are not in it."""
    try:
        text = codecs.getincrementaldecoder(candidate.name)().decode(content)
    except UnicodeDecodeError:
        return 0, 0
    wide = [char.encode(candidate.common, "ignore") for char in text if not char.isascii()]
    return sum(len(char) == 2 and char[0] in candidate.first_bytes for char in wide), len(wide)
