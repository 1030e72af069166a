"""Texts that are hard to split, and tokenizers trained once for all tests of the tokenizer."""

import os
import random
import unicodedata
from functools import lru_cache
from pathlib import Path

import pytest

from minigpt import bpe_native
from minigpt.splitting import CL100K, GPT2, GPT4, QWEN2
from minigpt.tokenizer import Tokenizer

PATTERNS = {"gpt2": GPT2, "gpt4": GPT4, "qwen2": QWEN2, "cl100k": CL100K}
BUILT = bpe_native.built()
# Under CI the module must be there: the tests then run, and fail, instead of being skipped.
needs_native = pytest.mark.skipif(not BUILT and os.environ.get("CI") != "true", reason="minigpt._bpe: make native")
ENGINES = [pytest.param(True, marks=needs_native, id="cpp"), pytest.param(False, id="python")]

CONTRACTIONS = "'s 'S 'ſ 'll 'lL 'Re 've 'M 'd 't 'x ' '' don't IT'S l' 're's it'ſ’s"
WHITESPACE = " |  |   |\t|\n|\r\n|\n\n|\r|\u00a0|\u2003|\u3000|\x85|\u2028|\x1c|\x0b| \n |\n  "
CHARACTERS = "a B hello é ß ſ K 北京 한국 日本語 ा ñ ⅷ ² ٣ 12 3456 1234567 ½ 🙂 👩‍👩‍👧 🇩🇪 ! ... <| |> --- _x #! € ™"
RARE = "e\u0301|\u0301|\u200d|\ufeff|\U0001f9d1\U0001f3fd|\U00020000|\U000e0001|\U0010ffff|\ue000|\ufffe|\x00"
FRAGMENTS = [*CONTRACTIONS.split(" "), *WHITESPACE.split("|"), *CHARACTERS.split(" "), *RARE.split("|")]


@lru_cache(maxsize=1)
def assigned() -> list[str]:
    """A sample of every plane; without the code points that another Unicode version may have given a meaning."""
    return [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs")][::7]


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    parts = []
    for _ in range(rng.randrange(1, 60)):
        kind = rng.random()
        if kind < 0.6:
            parts.append(rng.choice(FRAGMENTS) * rng.choice([1, 1, 1, 2, 5]))
        elif kind < 0.8:
            parts.append("".join(rng.choice(" \n\r\t") for _ in range(rng.randrange(1, 9))))
        else:
            parts.append("".join(rng.choice(assigned()) for _ in range(rng.randrange(1, 6))))
    return "".join(parts)


def random_bytes(seed: int) -> bytes:
    """Text with bytes that are not UTF-8: cut characters, overlong forms, surrogates, lone continuations."""
    rng = random.Random(seed)
    broken = [
        b"\xff",
        b"\x80",
        b"\xe2\x82",
        b"\xf0\x9f\x99",
        b"\xc1\xa1",
        b"\xe0\x81\xa1",
        b"\xf0\x80\x81\xa1",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xc3",
    ]
    parts = []
    for _ in range(rng.randrange(1, 20)):
        parts.append(random_text(rng.random()).encode()[: rng.randrange(20)])
        parts.append(rng.choice(broken) * rng.choice([1, 1, 3]))
    return b"".join(parts)


@lru_cache(maxsize=1)
def library_text() -> bytes:
    """1 MB of the standard library's source."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return b"".join(path.read_bytes() for path in files)[: 1 << 20].decode("utf-8", "ignore").encode()


@lru_cache(maxsize=8)
def trained(pattern: str = GPT4) -> Tokenizer:
    """1,500 ids, learned from code and from the hard texts, so that there are merges across all kinds of bytes."""
    hard = [random_text(seed) for seed in range(1000, 1200)]
    special = ("<|endoftext|>", "<|end|>", "<|end|>of", "<|fim middle|>")
    return Tokenizer.train([library_text()[:200_000], *hard], 1500, pattern=pattern, special=special)
