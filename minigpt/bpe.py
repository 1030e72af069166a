"""Byte pair encoding, the algorithm in plain Python: training, and merging one pre-token. minigpt/native is its twin.

Training starts from the 256 bytes and merges the most frequent pair of neighbours again and again (Gage 1994; Sennrich,
Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016; on bytes: GPT-2, 2019). Encoding
replays the merges on new text, earliest first. A token is its bytes; what a tokenizer is beyond that (ids, patterns,
specials, files) is minigpt/tokenizer.py. Nothing is refused here: minigpt/tokenizer.py has checked it.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from minigpt.splitting import split

Pair = tuple[bytes, bytes]
RankOf = Callable[[bytes, bytes], int | None]

# The order of bytes in GPT-2's alphabet: those with a visible Latin-1 character first. It decides between pairs that
# are equally frequent, which makes the merges those of Hugging Face's BpeTrainer.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_ORDER = bytes([*VISIBLE, *(byte for byte in range(256) if byte not in VISIBLE)])
SYMBOL_OF_BYTE = bytes(BYTE_ORDER.index(byte) for byte in range(256))


# -- training --
def count_words(texts: Iterable[bytes], pattern: str) -> Counter[bytes]:
    """How often each pre-token occurs. Training sees only this: a word that occurs 10,000 times is merged once."""
    words: Counter[bytes] = Counter()
    for text in texts:
        words.update(split(text, pattern))
    return words


class Trainer:
    """Pair counts that are kept up to date while merges are made.

    A symbol is a number: bytes are 0..255 in BYTE_ORDER, merge m makes 256 + m. `words[w]` is a list of symbols,
    `counts[w]` how often the word occurs, `pair_counts[pair]` how often the pair occurs in all text, `where[pair]`
    the words that hold it (and some that no longer do). The heap holds (-count, pair), so the smallest entry is the
    most frequent pair and, among equals, the one of the smallest symbols. An entry may be out of date, because counts
    fall when a neighbouring pair is merged: that is noticed when it comes up, and it goes back with today's count.
    """

    def __init__(self, words: Mapping[bytes, int]) -> None:
        self.words = [[SYMBOL_OF_BYTE[byte] for byte in word] for word in words]
        self.counts = list(words.values())
        self.pair_counts: defaultdict[tuple[int, int], int] = defaultdict(int)
        self.where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        for w, symbols in enumerate(self.words):
            for pair in pairwise(symbols):
                self._change(pair, w, +1)
        self.heap = [(-count, pair) for pair, count in self.pair_counts.items()]
        heapq.heapify(self.heap)

    def merges(self, wanted: int) -> list[tuple[int, int]]:
        """At most `wanted` pairs of symbols in the order of merging; fewer when no pair is left."""
        done: list[tuple[int, int]] = []
        while len(done) < wanted and (pair := self._most_frequent()) is not None:
            done.append(pair)
            product = 255 + len(done)
            new = set()
            for w in self.where.pop(pair):  # only these words can change
                new |= self._merge_word(w, pair, product)
            del self.pair_counts[pair]
            # A pair that holds the product is new; no other pair can have become more frequent.
            for changed in new - {pair}:
                if self.pair_counts[changed] > 0:
                    heapq.heappush(self.heap, (-self.pair_counts[changed], changed))
        return done

    def _most_frequent(self) -> tuple[int, int] | None:
        while self.heap:
            negative, pair = heapq.heappop(self.heap)
            count = self.pair_counts.get(pair, 0)
            if count == -negative:
                return pair
            if count > 0:
                heapq.heappush(self.heap, (-count, pair))
        return None

    def _merge_word(self, w: int, pair: tuple[int, int], product: int) -> set[tuple[int, int]]:
        """Replaces the pair in word w from left to right; the pairs that came into being."""
        old, merged, new = self.words[w], [], set()
        left, right = pair
        i = 0
        while i < len(old):
            if not (old[i] == left and i + 1 < len(old) and old[i + 1] == right):
                merged.append(old[i])
                i += 1
                continue
            if merged:  # the neighbour in front now stands before the product
                self._change((merged[-1], left), w, -1)
                self._change((merged[-1], product), w, +1)
                new.add((merged[-1], product))
            if i + 2 < len(old):  # and so does the one behind
                self._change((right, old[i + 2]), w, -1)
                self._change((product, old[i + 2]), w, +1)
                new.add((product, old[i + 2]))
            merged.append(product)
            i += 2
        self.words[w] = merged
        return new

    def _change(self, pair: tuple[int, int], w: int, sign: int) -> None:
        self.pair_counts[pair] += sign * self.counts[w]
        if sign > 0:
            self.where[pair].add(w)


def merged_tokens(merges: Iterable[Sequence[int]]) -> list[bytes]:
    """The bytes that each merge of two symbols makes."""
    tokens = [bytes([byte]) for byte in BYTE_ORDER]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens[256:]


# -- encoding --
def merge(piece: bytes, rank_of: RankOf, limit: float = float("inf")) -> list[bytes]:
    """The tokens of one pre-token: the pair of lowest rank merges first, the leftmost of equals, until none is left
    that has a rank below `limit`. Quadratic, which is no matter for words (the C++ takes n log n for long ones)."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        ranks = [rank_of(left, right) for left, right in pairwise(parts)]
        best = min((rank for rank in ranks if rank is not None and rank < limit), default=None)
        if best is None:
            break
        i = ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def canonical_merges(ranks: Mapping[bytes, int]) -> list[Pair] | None:
    """The one merge that makes each token of two or more bytes, in order of rank: what is left of its bytes when all
    merges of lower rank are done. None where that is not two tokens, so the vocabulary is not one that BPE trains.

    Where it exists, this list and the rule "two tokens whose concatenation is a token merge, at its rank" encode all
    text alike. For say that rule is about to join c and d to the token t, and no merge of lower rank is possible. The
    ends of this stretch of bytes were ends of tokens all along, since tokens only grow. So what happened inside is what
    happens to the bytes of t alone, and that ends in t's own pair: c and d are it.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = merge(token, lambda left, right: ranks.get(left + right), rank)
            if len(parts) != 2:
                return None
            merges.append((parts[0], parts[1]))
    return merges


def all_merges(ranks: Mapping[bytes, int]) -> list[Pair]:
    """Every pair of tokens whose concatenation is a token, in order of its rank, then of theirs."""
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


class Encoder:
    """Bytes to ids with a cache of pre-tokens; the same interface as minigpt._bpe.Encoder."""

    MOST_CACHED = 1 << 18

    def __init__(self, ranks: Mapping[bytes, int], merges: Sequence[Pair] | None, whole: bool, pattern: str) -> None:
        """`merges` None: the rule by concatenation. `whole`: a pre-token that is a token is that token at once."""
        if merges is None:
            self.rank_of: RankOf = lambda left, right: ranks.get(left + right)
        else:
            listed = {pair: rank for rank, pair in enumerate(merges)}
            self.rank_of = lambda left, right: listed.get((left, right))
        self.ranks, self.whole, self.pattern = ranks, whole or merges is None, pattern
        self.cache: dict[bytes, list[int]] = {}

    def encode(self, text: bytes, ends: np.ndarray | None, wide: bool) -> np.ndarray:
        """uint32 ids if `wide`, else uint16. `ends` is the C++ encoder's; here the pattern splits."""
        ids: list[int] = []
        for piece in split(text, self.pattern):
            known = self.cache.get(piece)
            if known is None:
                known = self._encode_piece(piece)
                if len(self.cache) >= self.MOST_CACHED:
                    self.cache.clear()
                self.cache[piece] = known
            ids += known
        return np.array(ids, dtype=np.uint32 if wide else np.uint16)

    def encode_batch(self, texts: Iterable[bytes], threads: int, wide: bool) -> list[np.ndarray]:
        return [self.encode(text, None, wide) for text in texts]

    def _encode_piece(self, piece: bytes) -> list[int]:
        if self.whole and piece in self.ranks:
            return [self.ranks[piece]]
        return [self.ranks[part] for part in merge(piece, self.rank_of)]
