"""Batches as a function: which rows of the training tokens a step reads, and the windows of the evaluation.

Nothing keeps random state: row r of the training list is a function of (seed, r), whatever the ranks, the batch size
and the step a run was resumed at. Shards are arrays in memory or memory-mapped files; no list of windows is ever made,
so the same code serves ten megabytes and ten billion tokens. Refused: a text shorter than a window, a batch that ranks
cannot share.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from torch import Tensor

ROUNDS = 8  # of the Feistel network
Batch = tuple[np.ndarray, ...]


class TokenStream:
    """The training text: `shards`, rows of uint16 or uint32 tokens, in memory or memory-mapped; `size` tokens in all.

    Epoch e cuts shard s into (size_s - 1) // context windows that follow each other from an offset drawn for (seed, e,
    s), so what is left at a shard's ends is not always the same; no window spans two shards, and a shard shorter than a
    window has none. Each window comes once an epoch, in an order shuffled over all shards. Reading it touches the disk
    at random: fast storage or enough memory to keep the shards in, and `Prefetcher`.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        # Plain views: every slice of an np.memmap is an np.memmap again, and making one costs more than reading it.
        self.shards = tuple(np.asarray(shard) for shard in shards)
        for number, shard in enumerate(self.shards):
            if shard.ndim != 1 or shard.dtype.kind != "u":
                raise ValueError(f"shard {number} is {shard.dtype} {shard.shape}: expected a row of unsigned tokens")
        self.sizes = np.array([shard.size for shard in self.shards], dtype=np.int64)
        self.size = int(self.sizes.sum())

    def windows(self, context: int) -> int:
        """How many an epoch has."""
        return int(self._counts(context).sum())

    def locate(self, row: int, seed: int, context: int) -> tuple[int, int, int]:
        """(epoch, shard, offset): row `row` reads shard[offset : offset + context + 1]."""
        return tuple(self.places(row, 1, seed, context)[0].tolist())

    def places(self, row: int, rows: int, seed: int, context: int) -> np.ndarray:
        """`locate` of rows row..row+rows-1, int64 of shape (rows, 3)."""
        check_length(self, context)
        counts = self._counts(context)
        ends, per_epoch = counts.cumsum(), int(counts.sum())
        spare = np.maximum(self.sizes - counts * context, 1)  # as many offsets leave the last window its last target
        places = np.empty((rows, 3), dtype=np.int64)
        for epoch in range(row // per_epoch, -(-(row + rows) // per_epoch)):
            first, end = max(row, epoch * per_epoch), min(row + rows, (epoch + 1) * per_epoch)
            # SeedSequence, since its numbers stay the same in every version of numpy; those of a Generator may change.
            words = np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS + len(self.shards), np.uint64)
            offsets = (words[ROUNDS:] % spare.astype(np.uint64)).astype(np.int64)
            index = np.arange(first - epoch * per_epoch, end - epoch * per_epoch)
            window = permute(index, per_epoch, words[:ROUNDS])
            shard = np.searchsorted(ends, window, side="right")
            start = offsets[shard] + (window - (ends - counts)[shard]) * context
            places[first - row : end - row] = np.stack([np.full_like(shard, epoch), shard, start], axis=1)
        return places

    def _counts(self, context: int) -> np.ndarray:
        return np.maximum(self.sizes - 1, 0) // context


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of 0..size-1 sends `index`, int64 of any size; in memory of index's size.

    A Feistel network (Luby and Rackoff, 1988) over b bits, the fewest that hold size - 1: the number is halved into
    (left, right), and each round with key k makes it (right, left xor f(right, k)). Whatever f is, a round can be
    undone, so it permutes 0..2^b-1. Halves of unequal width swap their widths too, so an even number of keys is needed.
    Cycle walking (Black and Rogaway, 2002) brings it down to 0..size-1: what falls outside is sent on until it falls
    inside. It follows its cycle, on which the start itself lies inside, so the walk ends, on average within two steps,
    and no two starts end at one place. keys: uint64 of shape (rounds,), rounds even.
    """
    assert keys.size % 2 == 0
    bits = (size - 1).bit_length()
    sent = _feistel(index.astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(sent >= size)).size:
        sent[outside] = _feistel(sent[outside], bits, keys)
    return sent.astype(np.int64)


def _feistel(number: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    widths = bits // 2, bits - bits // 2
    left, right = number >> np.uint64(widths[1]), number & _mask(widths[1])
    for round, key in enumerate(keys):
        left, right = right, left ^ (_mix(right + key) & _mask(widths[round % 2]))
    return left << np.uint64(widths[1]) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mix(number: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of the number: the finaliser of SplitMix64 (Steele et al., 2014)."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


def batch(stream: TokenStream, *, seed: int, row: int, rows: int, context: int) -> Batch:
    """(inputs, targets), int64 of shape (rows, context): rows row..row+rows-1 of the endless list of `TokenStream`.

    Targets are the inputs' next tokens. A trainer with a global batch of G stands at row step * G; any other walk along
    the rows gives the same ones. Raises ValueError when the text is shorter than a window.
    """
    if row < 0 or rows < 1:
        raise ValueError(f"{rows} rows from row {row}: expected at least 1, from 0 on")
    inputs, targets = np.empty((2, rows, context), dtype=np.int64)
    for place, (_, shard, start) in enumerate(stream.places(row, rows, seed, context)):
        window = stream.shards[shard][start : start + context + 1]
        inputs[place], targets[place] = window[:-1], window[1:]
    return inputs, targets


def rank_rows(row: int, global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first row, how many): the share of `rank` in the global batch that begins at `row`.

    The shares in rank order are the batch of one process. Raises ValueError when the ranks cannot share it evenly.
    """
    if global_batch % world_size:
        raise ValueError(f"batch {global_batch} is not divisible by world size {world_size}")
    rows = global_batch // world_size
    return row + rank * rows, rows


class Prefetcher:
    """Makes the batches of the next steps in a thread while the current one is worked on; `with Prefetcher(...) as p`.

    `make(step)` returns arrays, say (inputs, targets), and depends on the step alone, so `p.next(step)` is what
    make(step) is, as tensors on `device`, whether or not it was made ahead; steps in any order are right, one after the
    other is fast.
    On CUDA the thread pins the arrays and copies them on a stream of its own. What make raises, `next` raises.
    """

    def __init__(self, make: Callable[[int], Batch], device: torch.device | str = "cpu", *, depth: int = 2) -> None:
        self.make, self.device, self.depth = make, torch.device(device), depth
        self._pending: dict[int, Future] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def next(self, step: int) -> tuple[Tensor, ...]:
        wanted = range(step, step + self.depth + 1)
        for other in [other for other in self._pending if other not in wanted]:
            self._pending.pop(other).cancel()
        for later in wanted:
            if later not in self._pending:
                self._pending[later] = self._worker.submit(self._prepare, later)
        tensors, copied = self._pending.pop(step).result()
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for tensor in tensors:
                tensor.record_stream(stream)  # its memory came from the other stream and is used on this one
        return tensors

    def _prepare(self, step: int) -> tuple[tuple[Tensor, ...], "torch.cuda.Event | None"]:
        made = tuple(torch.from_numpy(part) for part in self.make(step))
        if self._stream is None:
            return made, None
        with torch.cuda.stream(self._stream):
            tensors = tuple(part.pin_memory().to(self.device, non_blocking=True) for part in made)
            return tensors, self._stream.record_event()

    def close(self) -> None:
        """Ends the thread, after the batch it is at."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_length(stream: TokenStream, context: int) -> None:
    """Raises ValueError unless some shard has a window."""
    longest = int(stream.sizes.max(initial=0))
    if longest < context + 1:
        where = " in its longest shard" if len(stream.shards) > 1 else ""
        raise ValueError(
            f"the training text is {longest} tokens{where}: expected at least {context + 1}, a context window and its "
            f"last target; give more text or a smaller context"
        )


def held_out_windows(size: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, length, first_scored) of windows that together predict each of the tokens 1..size-1 exactly once.

    A window reads tokens start..start+length-1 and predicts the ones after each; only predictions from first_scored on
    count. The first window counts whole; each later one advances by `stride`, so all its counted predictions see at
    least context - stride tokens before them. The last window ends with the text.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride {stride}: expected 1 to the context, {context}")
    if size < 2:
        raise ValueError(f"the held-out text is {size} tokens: expected at least 2")
    length = min(context, size - 1)
    windows, scored = [(0, length, 0)], length
    while scored < size - 1:
        end = min(scored + stride, size - 1)
        windows.append((end - length, length, scored - (end - length)))
        scored = end
    return windows
