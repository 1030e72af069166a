"""Pre-tokenisation: the patterns that cut text into the pieces inside which BPE merges.

The patterns are those of the published models. Text is bytes; a byte that belongs to no valid UTF-8 character counts as
a symbol (neither letter, number nor whitespace), here and in C++, so every byte string can be split and joined again.
Any other pattern of the `regex` package works too, through Python. Refused: a pattern that does not compile.
"""

import codecs
import itertools
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import regex

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4 = _WORDS + r"\p{N}{1,3}" + _SYMBOLS + _SPACES  # as first published for cl100k_base; Llama 3 has the same
QWEN2 = _WORDS + r"\p{N}" + _SYMBOLS + _SPACES
# What tiktoken runs today: whitespace at the end of the text is one piece even where it holds line ends. "Not followed
# by any character" instead of `$`, which means the end of a line to Hugging Face's regular expressions.
CL100K = _WORDS + r"\p{N}{1,3}" + _SYMBOLS + r"\s+(?![\s\S])|" + _SPACES

# The same languages in tiktoken's own spelling, whose `{1,3}+` Hugging Face's engine would read as a repetition.
SPELLINGS = {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": GPT2,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s": CL100K,  # noqa: E501
}


class Style(NamedTuple):
    """What distinguishes the patterns that the C++ splitter knows."""

    gpt4: bool
    digits: int  # the longest piece of a number
    end_run: bool  # whitespace that ends the text is one piece


STYLES = {
    GPT2: Style(False, 0, False),
    GPT4: Style(True, 3, False),
    QWEN2: Style(True, 1, False),
    CL100K: Style(True, 3, True),
}

# Places where every pattern of STYLES splits whatever stands before and behind: a letter or number in front of
# anything of another kind, a symbol in front of whitespace that is not a line end (those a symbol keeps). Never behind
# whitespace: how a run of it splits depends on what follows it. Searched from the end of the text.
_SURE_CUT = regex.compile(
    r"(?r)(?<=\p{L})(?=\P{L})|(?<=\p{N})(?=\P{N})|(?<=[^\s\p{L}\p{N}])(?=[^\S\r\n])",
)


def to_text(data: bytes) -> str:
    """Characters; each byte that is not valid UTF-8 becomes a lone surrogate, which `to_bytes` turns back."""
    return data.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


@lru_cache(maxsize=16)
def compiled(pattern: str) -> regex.Pattern:
    """The compiled pattern; ValueError with its text where it is not a regular expression."""
    try:
        return regex.compile(pattern)
    except (regex.error, TypeError) as error:
        raise ValueError(
            f"pattern {pattern!r}: expected a regular expression of the `regex` package, {error}"
        ) from None


def split(data: bytes, pattern: str) -> list[bytes]:
    """The pre-tokens, whose concatenation is `data`. What the pattern leaves out between two matches is a piece too."""
    text, pieces, end = to_text(data), [], 0
    for match in compiled(pattern).finditer(text):
        start, stop = match.span()
        if start > end:
            pieces.append(text[end:start])
        if stop > start:
            pieces.append(text[start:stop])
        end = stop
    if end < len(text):
        pieces.append(text[end:])
    return list(map(to_bytes, pieces))


def split_ends(data: bytes, pattern: str) -> np.ndarray:
    """uint64: where each pre-token ends, in bytes."""
    return np.cumsum([len(piece) for piece in split(data, pattern)], dtype=np.uint64)


def sure_cut(text: str) -> int:
    """The last place where `text` can be cut so that encoding both sides equals encoding the whole, whatever is
    appended to it later; 0 where there is none. For the patterns of STYLES."""
    match = _SURE_CUT.search(text)
    return match.start() if match else 0


@lru_cache(maxsize=1)
def character_kinds() -> bytes:
    """One byte for each of the 0x110000 code points: 0 other, 1 letter, 2 number, 3 whitespace, 4 \\r and \\n, as the
    `regex` package has them. Takes some 100 ms, once."""
    every = np.arange(0x110000, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    kinds = np.zeros(len(every), dtype=np.uint8)
    for kind, pattern in enumerate((r"\p{L}+", r"\p{N}+", r"\s+", r"[\r\n]+"), start=1):
        for match in regex.finditer(pattern, every):
            kinds[match.start() : match.end()] = kind
    return kinds.tobytes()


HELD_AT_MOST = 1 << 24  # characters that a stream holds back while it waits for a place to cut
READ_AT_LEAST = 1 << 16


def cut_stream(chunks: Iterable[bytes], *, nfc: bool) -> Iterator[bytes]:
    """The same bytes (in NFC if `nfc`) in parts that can be split and encoded one by one, whatever the chunks were.

    For the patterns of STYLES. Holds the text behind the last sure cut, and looks again only when it has doubled, so
    chunks of one byte cost no more than large ones. ValueError when there is no sure cut in HELD_AT_MOST characters.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # keeps the first bytes of a cut character
    raw = text = ""  # raw waits for its normalisation, text for its cut
    arrived, size, wait = [], 0, READ_AT_LEAST
    for chunk in itertools.chain(chunks, [None]):
        last = chunk is None
        arrived.append(decoder.decode(b"" if last else chunk, final=last))
        size += len(arrived[-1])
        if size < wait and not last:
            continue
        raw += "".join(arrived)
        # A character of ASCII combines with what follows it, never with what it follows: so the text in front of one
        # can be normalised on its own.
        end = len(raw) if last or not nfc else _last_ascii(raw)
        text += unicodedata.normalize("NFC", raw[:end]) if nfc else raw[:end]
        raw = raw[end:]
        cut = len(text) if last else sure_cut(text)
        if cut:
            yield to_bytes(text[:cut])
        text = text[cut:]
        held = len(text) + len(raw)
        if held > HELD_AT_MOST:
            raise ValueError(f"the stream has a pre-token of {held:,} characters: expected at most {HELD_AT_MOST:,}")
        arrived, size, wait = [], 0, max(READ_AT_LEAST, held)


def _last_ascii(text: str) -> int:
    match = regex.search(r"(?r)[\x00-\x7f]", text)
    return match.start() if match else 0
