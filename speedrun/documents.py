"""Rows that are packed from documents: each begins at the beginning of one, and none reads across to another.

A document longer than a row is cut into pieces that count as documents of their own. Pieces are chosen so that they
fill rows exactly (best fit over a whole shard); where none fits, one is cut and its rest is a piece again. So every row
is full, and of a shard less than one row is left over. Shards are scanned one at a time, when a step comes to them.
Attention over such rows: `packed_attention`. Refused: a training text without separators.

Shapes: B rows, T tokens in each, N tokens in all, A parts of a batch, P pieces, R rows of a shard, H query heads, G
key/value heads, K head width.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt.batches import ROUNDS, TokenStream, check_length, permute
from minigpt.masks import Documents

CHUNK = 1 << 22  # tokens that are scanned at a time, so that what they become stays in the cache


class Packing(NamedTuple):
    """Of one shard: row r is made of the pieces first_R[r] to first_R[r + 1], one behind the other."""

    starts_P: np.ndarray  # where in the shard each piece begins
    lengths_P: np.ndarray  # tokens of each
    first_R: np.ndarray  # R + 1 of them


class DocumentRows:
    """The endless list of rows of a training text whose documents each begin with `separator`.

    Epoch e takes the shards, and the rows of each, in orders drawn for (seed, e), so row r is a function of (seed, r),
    whatever the ranks and the step that a run was resumed at. A shard of n tokens has (n - 1) // context rows, which is
    known without reading it; its last token is a target alone. Holds the packing of one shard at a time. Raises
    ValueError when the first shard has no separator, or a later one when its turn comes, and when no shard has a row.
    """

    def __init__(self, stream: TokenStream, separator: int) -> None:
        self.stream, self.separator = stream, separator
        self._packed: tuple[tuple[int, int], Packing] | None = None
        shard = stream.shards[0] if stream.shards else np.zeros(0)
        if not any((shard[begin : begin + CHUNK] == separator).any() for begin in range(0, shard.size, CHUNK)):
            raise ValueError(self._no_documents(0))

    def rows(self, context: int) -> int:
        """How many an epoch has."""
        return int(self._rows_of_shards(context).sum())

    def dropped(self, context: int) -> int:
        """Tokens that an epoch leaves out, less than a row of each shard: of those that no full row was left for."""
        return int((np.maximum(self.stream.sizes - 1, 0) - context * self._rows_of_shards(context)).sum())

    def batch(
        self, *, seed: int, row: int, rows: int, context: int, window: int = 0, parts: int = 1
    ) -> tuple[np.ndarray, ...]:
        """(inputs, targets, positions, documents), int64 (B, T), of rows row..row+rows-1, and `starts` of `parts` equal
        parts of them. With a `window` that divides the context, rows are cut into as many of T = window tokens, and so
        are the documents in them.

        A target is the token that follows in the text, at the end of a piece too: after a document that is the next
        separator, which a model has to predict to write an end, and which held-out text is judged on. Positions count
        from 0 in each piece, documents are its numbers in this batch.
        """
        if row < 0 or rows < 1:
            raise ValueError(f"{rows} rows from row {row}: expected at least 1, from 0 on")
        check_length(self.stream, context)
        shape, window = (rows, context), window or context
        inputs, targets, positions, documents = np.empty((4, *shape), dtype=np.int64)
        pieces = 0
        for places, shard, rows_b in self._places(seed, row, rows, context):
            starts_P, lengths_P = parted(*pieces_of(self.packing(shard, context), rows_b), window)
            begins_P = lengths_P.cumsum() - lengths_P
            positions_N = np.arange(places.size * context) - begins_P.repeat(lengths_P)
            offsets_N = positions_N + starts_P.repeat(lengths_P)
            tokens = self.stream.shards[shard]
            numbers_N = np.arange(pieces, pieces + starts_P.size).repeat(lengths_P)
            found = tokens[offsets_N], tokens[offsets_N + 1], positions_N, numbers_N
            for array, values_N in zip((inputs, targets, positions, documents), found, strict=True):
                array[places] = values_N.reshape(-1, context)
            pieces += starts_P.size
        inputs, targets, positions, documents = (
            array.reshape(-1, window) for array in (inputs, targets, positions, documents)
        )
        return inputs, targets, positions, documents, starts(positions, parts)

    def packing(self, shard: int, context: int) -> Packing:
        """Of a shard into rows of `context` tokens. Raises ValueError when it has no separator."""
        key = shard, context
        if self._packed is None or self._packed[0] != key:
            opens = openings(self.stream.shards[shard], self.separator)
            if not opens.size:
                raise ValueError(self._no_documents(shard))
            self._packed = key, pack(*cut(opens, self.stream.shards[shard].size - 1, context), context)
        return self._packed[1]

    def _rows_of_shards(self, context: int) -> np.ndarray:
        return np.maximum(self.stream.sizes - 1, 0) // context

    def _places(self, seed: int, row: int, rows: int, context: int):
        """(places in the batch, shard, rows of the shard) for each shard that the batch reads."""
        counts, per_epoch = self._rows_of_shards(context), self.rows(context)
        for epoch in range(row // per_epoch, (row + rows - 1) // per_epoch + 1):
            shards = len(counts)
            # SeedSequence, since its numbers stay the same in every version of numpy.
            words = np.random.SeedSequence((seed, epoch)).generate_state(shards + ROUNDS, np.uint64)
            end = epoch * per_epoch
            for shard in np.argsort(words[ROUNDS:], kind="stable"):
                first, end = end, end + int(counts[shard])
                here = np.arange(max(first, row), min(end, row + rows))
                if here.size:
                    yield here - row, int(shard), permute(here - first, int(counts[shard]), words[:ROUNDS])

    def _no_documents(self, shard: int) -> str:
        return (
            f"shard {shard} of the training text holds no separator (token {self.separator}): expected documents, each "
            f"with one in front; or go without --documents"
        )


# ---- from tokens to rows ---------------------------------------------------------------------------------------------


def openings(tokens: np.ndarray, separator: int) -> np.ndarray:
    """int64, where separators stand."""
    return np.concatenate(
        [begin + np.flatnonzero(tokens[begin : begin + CHUNK] == separator) for begin in range(0, tokens.size, CHUNK)]
    )


def cut(opens: np.ndarray, size: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts_P, lengths_P) of the pieces of documents that begin at `opens` in a text of `size` tokens: at most
    `context` tokens each, in the order of the text. What stands before the first document, the end of one that the
    shard before began, is cut like a document."""
    begins = np.union1d([0], opens[opens < size])
    lengths = np.diff(begins, append=size)
    counts = -(-lengths // context)
    nth_P = np.arange(counts.sum()) - (counts.cumsum() - counts).repeat(counts)
    starts_P = begins.repeat(counts) + nth_P * context
    return starts_P, np.minimum(lengths.repeat(counts) - nth_P * context, context)


def pack(starts_P: np.ndarray, lengths_P: np.ndarray, context: int) -> Packing:
    """Rows of exactly `context` tokens, as many as the pieces fill; the tokens of the rest are dropped.

    Best fit: a row opens with the longest piece that is left and takes the longest that fits again and again, so long
    pieces come first, while there are many short ones to fill up with. What is too short for every piece that is left
    takes the beginning of the shortest, whose rest goes back. Pieces of one length are alike, so a row that is found
    serves as often as there are pieces for it, and the work grows with the number of lengths, not of pieces (histogram
    packing, Krell et al. 2021).
    """
    order = np.argsort(lengths_P, kind="stable")
    counts = np.bincount(lengths_P, minlength=context + 1)
    held = np.split(starts_P[order], counts.cumsum()[:-1])  # held[n]: where pieces of n tokens begin
    present = sum(1 << int(n) for n in np.flatnonzero(counts))  # bit n: held[n] is not empty
    starts, lengths, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.zeros(1, np.int64)]
    while chosen := compose(held, present, context):
        used = Counter(length for length, _ in chosen)
        times = min(held[length].size // number for length, number in used.items())
        taken = []
        for length, kept in chosen:
            mine, held[length] = np.split(held[length], [times])
            taken.append(mine)
            if kept < length:
                held[length - kept] = np.concatenate([held[length - kept], mine + kept])
                present |= 1 << length - kept
        for length in used:
            present &= ~(int(held[length].size == 0) << length)
        starts.append(np.stack(taken, axis=1).ravel())
        lengths.append(np.tile([kept for _, kept in chosen], times))
        sizes.append(np.full(times, len(chosen)))
    return Packing(*map(np.concatenate, (starts, lengths)), np.concatenate(sizes).cumsum())


def compose(held: list[np.ndarray], present: int, context: int) -> list[tuple[int, int]]:
    """(length, how much of it) of the pieces of one full row; empty when what is left does not fill one."""
    chosen, used, gap = [], Counter(), context
    while gap:
        if not present:
            return []
        fitting = present & ((2 << gap) - 1)
        length = (fitting or present & -present).bit_length() - 1  # the longest that fits, or else the shortest
        kept = min(length, gap)
        chosen.append((length, kept))
        gap -= kept
        used[length] += 1
        present ^= int(used[length] == held[length].size) << length
    return chosen


def pieces_of(packing: Packing, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of the pieces of these rows, one behind the other."""
    first_B = packing.first_R[rows_B]
    counts_B = packing.first_R[rows_B + 1] - first_B
    index = np.arange(counts_B.sum()) + (first_B - (counts_B.cumsum() - counts_B)).repeat(counts_B)
    return packing.starts_P[index], packing.lengths_P[index]


def parted(starts_P: np.ndarray, lengths_P: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces, laid end to end, cut wherever a multiple of `width` tokens is behind them."""
    ends_P = lengths_P.cumsum()
    begins_P = ends_P - lengths_P
    cuts = np.union1d(begins_P, np.arange(0, ends_P[-1], width))
    piece = np.searchsorted(begins_P, cuts, side="right") - 1
    return starts_P[piece] + cuts - begins_P[piece], np.diff(cuts, append=ends_P[-1])


# ---- attention -------------------------------------------------------------------------------------------------------


def starts(positions_BT: np.ndarray, parts: int = 1) -> np.ndarray:
    """cu_seqlens, int32, a row for each of `parts` equal parts of the batch: where in its rows, laid end to end, each
    document begins, and their end, repeated up to a power of two: few lengths, and few shapes to compile for."""
    parts_AN = positions_BT.reshape(parts, -1)
    opens = [np.flatnonzero(part == 0) for part in parts_AN]
    width = 1 << max(len(each) for each in opens).bit_length()
    filled = np.full((parts, width), parts_AN.shape[1], dtype=np.int32)
    for row, each in zip(filled, opens, strict=True):
        row[: len(each)] = each
    return filled


def documents_of(positions_BT: Tensor, documents_BT: Tensor, starts_1S: Tensor, attention: str) -> Documents:
    """What GPT.forward takes: with attention "torch" it makes a dense mask of them, else attention gets the starts,
    however many: a compiled model takes any number."""
    if attention == "torch":
        return Documents(positions_BT, documents_BT)
    starts_S = starts_1S[0]
    torch._dynamo.maybe_mark_dynamic(starts_S, 0)
    return Documents(positions_BT, documents_BT, starts_S)


def packed_attention(
    q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, *, starts: Tensor | None = None, kernels: str, **others
) -> Tensor:
    """GPT's attention_fn by stage 3's kernels. With `starts` (int32, of documents in all rows laid end to end, the
    longest no longer than a row) causal attention within each; others: window. Without, ops.causal_attention."""
    from cuda import ops  # which a run on torch's own kernels never needs

    if starts is None:
        return ops.causal_attention(q_BHTK, k_BGTK, v_BGTK, kernels=kernels, **others)
    B, _, T, _ = q_BHTK.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTK, k_BGTK, v_BGTK))
    y = ops.attention(
        q, k, v, causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts, longest=T, kernels=kernels, **others
    )
    return y.unflatten(0, (B, T)).transpose(1, 2)
