"""The way to the C++ module minigpt._bpe (minigpt/native): whether it is there, and its calls in our terms.

Refused: `native=True` where it is not built. Everything else falls back to minigpt/bpe.py, said once on stderr.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np

from minigpt.bpe import SYMBOL_OF_BYTE, Pair
from minigpt.splitting import GPT2, STYLES, character_kinds, split_ends

try:
    from minigpt import _bpe
except ImportError:
    _bpe = None

BATCH_BYTES = 1 << 24  # training counts about this much text at a time


def built() -> bool:
    return _bpe is not None


def choose(native: bool | None) -> bool:
    """Whether to use C++; None means if it is built. ValueError for True where it is not."""
    if native and _bpe is None:
        raise ValueError("native=True, but minigpt._bpe is not built: expected `make native` before")
    if native is None and _bpe is None:
        _warn_once()
    return _bpe is not None if native is None else native


@lru_cache(maxsize=1)
def _warn_once() -> None:
    print("minigpt.tokenizer: the C++ module is not built, slower Python takes its place: make native", file=sys.stderr)


def make_encoder(ranks: Mapping[bytes, int], merges: Sequence[Pair] | None, whole: bool, pattern: str):
    """The twin of bpe.Encoder. For a pattern outside STYLES it must be told the ends of the pre-tokens."""
    rows = None
    if merges is not None:
        rows = np.array([(ranks[left], ranks[right], ranks[left + right]) for left, right in merges], dtype=np.uint32)
        rows = rows.reshape(-1, 3)
    style = STYLES.get(pattern, STYLES[GPT2])
    return _bpe.Encoder(list(ranks), list(ranks.values()), rows, whole, style, character_kinds())


def train(texts: Iterable[bytes], pattern: str, wanted: int, threads: int) -> list[list[int]]:
    """The twin of bpe.Trainer(bpe.count_words(texts, pattern)).merges(wanted)."""
    trainer = _bpe.Trainer(STYLES.get(pattern, STYLES[GPT2]), character_kinds())
    for batch in _batches(texts):
        if pattern in STYLES:
            trainer.count(batch, threads)
            continue
        for text in batch:
            trainer.count_pieces(text, split_ends(text, pattern))
    return trainer.merges(wanted, SYMBOL_OF_BYTE).tolist()


class Joiner:
    """Ids to bytes."""

    def __init__(self, token_of: Mapping[int, bytes]) -> None:
        tokens = [token_of.get(id, b"") for id in range(max(token_of) + 1)]
        self.blob, self.starts = b"".join(tokens), np.cumsum([0, *map(len, tokens)], dtype=np.uint64)

    def __call__(self, ids: np.ndarray) -> bytes | None:
        """None if an id has no token."""
        return _bpe.join(ids.astype(np.uint32, copy=False), self.blob, self.starts)


def _batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
