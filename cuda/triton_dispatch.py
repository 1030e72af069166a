"""Which step of the ladder in Triton multiplies, and with which tiling: known from sizes alone, without Triton.

The rule for a step that nobody named: k is split (04) where it is long and half of the multiprocessors would have no
tile; what TMA can describe goes by one tile a program where there are few (02), else to programs that stay (03); the
rest by pointers (01): older GPUs, float32, odd strides, and the interpreter, for which 01 is the least work. Tilings
are ordered by a count of clocks, and dropped if they do not fit; one that was measured (triton_tilings.py) goes first.
Refused: a problem for which no tiling fits. Letters: A is m x k, B is k x n.
"""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

from cuda import triton_tilings
from cuda.dispatch import L2
from cuda.triton_tilings import REGISTERS, SHARED, Tiling

STEPS = ("pointer_01", "descriptor_02", "persistent_03", "split_k_04")
NEED_TMA = STEPS[1:3]
GROUP = 8  # rows of tiles that are worked on together: their parts of A, and of B, stay in L2

TILINGS_16 = (
    Tiling(128, 256, 64, 8, 4),
    Tiling(128, 256, 64, 8, 3),
    Tiling(128, 128, 64, 4, 3),
    Tiling(64, 256, 64, 4, 3),
    Tiling(64, 128, 64, 4, 4),
    Tiling(64, 64, 64, 4, 4),
    Tiling(128, 128, 32, 8, 4),  # for odd strides: few addresses for each thread
)
SPECIALISED = Tiling(128, 256, 64, 4, 4)  # of step 03: two groups of four warps multiply, a third one loads
TILINGS_32 = (Tiling(128, 64, 16, 4, 3), Tiling(64, 64, 32, 4, 3), Tiling(64, 32, 32, 4, 3))


class Size(NamedTuple):
    dtype: str  # "bfloat16"
    m: int
    n: int
    k: int
    batch: int = 1


class Details(NamedTuple):
    """What else decides on shared memory and registers."""

    out_bytes: int  # of an element of d
    c: bool
    plain: bool = False  # a product that step 03 can specialise its warps for
    odd: bool = False  # no 16 bytes lie together for sure: pointers load one element at a time


def tiles(size: Size, t: Tiling) -> int:
    return size.batch * ceil(size.m / t.block_m) * ceil(size.n / t.block_n)


# ---- what a tiling takes ---------------------------------------------------------------------------------------------


def shared(t: Tiling, step: str, size: Size, details: Details) -> int:
    """Bytes of shared memory, as Triton allots them. Half a tile goes through it on its way out (triton_tile.py): in
    step 03 beside the stages, for loads go on meanwhile; else in their place."""
    stages = t.stages * (t.block_m + t.block_n) * t.block_k * (4 if size.dtype == "float32" else 2)
    half = t.block_m * t.block_n // 2
    out = half * (4 if details.c else details.out_bytes)
    barriers = 512
    return barriers + (stages + out if step == "persistent_03" else max(stages, out))


def registers(t: Tiling, step: str, size: Size, details: Details) -> int:
    """Of a thread: sums, two for the address of each element that is loaded alone, what was seen to come on top."""
    groups = 2 if step == "persistent_03" and t == SPECIALISED else 1
    alone = 2 * (t.block_m + t.block_n) * t.block_k if details.odd and step not in NEED_TMA else 0
    return (t.block_m * t.block_n // groups + alone) // (32 * t.warps) + 40


def resident(t: Tiling, step: str, size: Size, details: Details, kind: str) -> int:
    """Programs that a multiprocessor takes at once."""
    by_shared = SHARED[kind] // shared(t, step, size, details)
    by_registers = REGISTERS // (32 * t.warps * registers(t, step, size, details))
    return max(1, min(by_shared, by_registers))


# ---- what is chosen --------------------------------------------------------------------------------------------------


def clocks(t: Tiling, size: Size, multiprocessors: int) -> float:
    """Of 64 of k, in rounds of one tile for each multiprocessor: those of its arithmetic or of L2, what is more."""
    products, element = (2, 4) if size.dtype == "float32" else (32, 2)
    arithmetic, fetched = t.block_m * t.block_n / products, 64 * element * (t.block_m + t.block_n) / L2
    return ceil(tiles(size, t) / multiprocessors) * max(arithmetic, fetched)


def padded(t: Tiling, size: Size) -> tuple[int, int]:
    """For slices of k, which fill the GPU whatever the tile: what is computed for nothing; then large tiles first."""
    return tiles(size, t) * t.block_m * t.block_n, -t.block_m * t.block_n


@lru_cache(maxsize=1024)  # to count takes as long as a small product
def candidates(step: str, kind: str, size: Size, details: Details, multiprocessors: int) -> list[Tiling]:
    """The tilings that fit, best guess first."""
    all_tilings = TILINGS_32 if size.dtype == "float32" else TILINGS_16
    fitting = triton_tilings.prune(
        all_tilings,
        kind,
        shared=lambda t: shared(t, step, size, details),
        registers=lambda t: registers(t, step, size, details),
    )
    if step == "split_k_04":
        return sorted(fitting, key=lambda t: padded(t, size))
    fitting.sort(key=lambda t: clocks(t, size, multiprocessors))
    specialised = step == "persistent_03" and kind == "sm_90" and details.plain and size.dtype != "float32"
    return [*fitting, SPECIALISED] if specialised else fitting


@lru_cache(maxsize=1024)
def choose_step(kind: str, size: Size, details: Details, multiprocessors: int, *, tma: bool) -> str:
    """`tma`: whether TMA can describe A and B."""
    if kind == "interpreter":
        return "pointer_01"
    whole = candidates("pointer_01", kind, size, details, multiprocessors)[0]
    sliced = candidates("split_k_04", kind, size, details, multiprocessors)[0]
    idle = 2 * tiles(size, whole) <= multiprocessors
    if idle and slices_of(sliced, size, multiprocessors, least=8) > 1:
        return "split_k_04"
    if kind != "sm_90" or not tma or size.dtype == "float32":
        return "pointer_01"
    tiling = candidates("descriptor_02", kind, size, details, multiprocessors)[0]
    return "descriptor_02" if tiles(size, tiling) <= multiprocessors else "persistent_03"


def slices_of(t: Tiling, size: Size, multiprocessors: int, least: int) -> int:
    """So many that all multiprocessors have one, each with `least` blocks of k or more."""
    blocks = ceil(size.k / t.block_k)
    return max(1, min(multiprocessors // tiles(size, t), blocks // least))
