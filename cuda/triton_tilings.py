"""Which block sizes, warps and stages a kernel in Triton is compiled with: candidates, pruned, and what was measured.

Triton's own autotuner compiles and times every candidate in every process. Here candidates that cannot run well are
dropped by counting shared memory and registers, what was measured on a GPU stands in triton_table.py (NOTHING YET;
`python -m cuda.tune_triton` writes it), and for what was not the first candidate left is taken: so lists begin with
the best guess. Refused: a list of which nothing is left.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from cuda.triton_table import MEASURED

# Bytes of shared memory that a block may have; sm_80 stands for 8.6 and 8.9 too, which have the least.
SHARED = {"interpreter": 227 << 10, "sm_90": 227 << 10, "sm_80": 99 << 10}
REGISTERS = 65536  # 32-bit ones of a multiprocessor


class Tiling(NamedTuple):
    block_m: int
    block_n: int
    block_k: int = 0
    warps: int = 4
    stages: int = 3


def prune(
    tilings: Sequence[Tiling],
    kind: str,
    *,
    shared: Callable[[Tiling], int],
    registers: Callable[[Tiling], int],
) -> list[Tiling]:
    """Those whose estimates fit: `shared` bytes of a block, `registers` that one thread holds on to (accumulators and
    operands), of which it has 255, and a block 65,536. Raises ValueError where none does."""
    left = [t for t in tilings if shared(t) <= SHARED[kind] and registers(t) <= min(255, REGISTERS // (32 * t.warps))]
    if not left:
        raise ValueError(f"{len(tilings)} tilings for {kind}: expected one that fits into {SHARED[kind]} bytes")
    return left


# Not context variables: autograd's thread has to see them, which runs backward passes.
_asked: list[dict[tuple, Sequence[Tiling]]] = []
_forced: dict[tuple, Tiling] = {}


@contextmanager
def asked() -> Iterator[dict[tuple, Sequence[Tiling]]]:
    """Inside, what operations ask for is noted: {(operation, kind, *key): candidates}."""
    _asked.append({})
    try:
        yield _asked[-1]
    finally:
        _asked.pop()


@contextmanager
def forced(question: tuple, tiling: Tiling) -> Iterator[None]:
    """Inside, whoever asks this takes that tiling: for measuring. `question` is a key of `asked`."""
    before = _forced.copy()
    _forced[question] = tiling
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def choose(operation: str, kind: str, key: tuple, candidates: Sequence[Tiling]) -> Tiling:
    """The one that is forced; the one measured for (operation, kind, *key) if it is a candidate; else the first. A type
    in the key stands in the table by its name."""
    names = (str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x for x in key)
    question = (operation, kind, *names)
    for notes in _asked:
        notes[question] = candidates
    if question in _forced:
        return _forced[question]
    measured = MEASURED.get(question)
    if measured is not None and Tiling(*measured) in candidates:
        return Tiling(*measured)
    return candidates[0]
