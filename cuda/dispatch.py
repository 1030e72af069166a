"""Which step multiplies: by element type, shape, and what the device is. `choose` is the rule, TILINGS what it knows.

What was measured on a GPU stands in dispatch_table.py: NOTHING YET. For what was not, a tiling is picked by a model: a
multiprocessor works on one tile at a time, so a product takes as many rounds ("waves") as there are tiles for each
multiprocessor, and a stage of a tile takes as long as the slowest of three: its multiplications, what goes to and from
shared memory, what comes from L2 (`stage_clocks`). Large tiles are better fed, small ones fit more sizes.

On the CPU model the choice is what the model runs in the least time of all steps, tried at five shapes up to 512.
Refused: to guess where the caller names a step. What TMA cannot describe goes to step 08, which takes any address.
Letters: A is m x k, B is k x n.
"""

from math import ceil
from typing import Literal, NamedTuple

import torch

from cuda.dispatch_table import MEASURED

STEPS = (
    "naive_01",
    "coalesced_02",
    "shared_03",
    "register_tile_1d_04",
    "register_tile_2d_05",
    "vectorised_06",
    "warp_tile_07",
    "mma_sync_08",
    "wgmma_09",
    "wgmma_128x128_10",
    "producer_consumer_11",
    "two_consumers_12",
    "persistent_13",
    "multicast_14",
    "tma_store_15",
    "best_16",
)
WITHOUT_HOPPER = STEPS[:8]  # what runs on any GPU from capability 8.0 on
Kind = Literal["model", "sm_80", "sm_90"]


class Tiling(NamedTuple):
    """Of step 16, with the fields and defaults of matmul/matmul.h; caches are 0 normal, 1 evicted first, 2 last."""

    tile_m: int = 128
    tile_n: int = 256
    cluster: int = 2
    split_k: int = 1
    raster: int = 8
    stagger: int = 1
    cache_a: int = 0
    cache_b: int = 0
    cache_d: int = 1


TILINGS = (  # that take every layout
    *(Tiling(128, tile_n, cluster) for tile_n in (256, 128) for cluster in (2, 1)),
    Tiling(64, 64, 1),
    *(Tiling(128, 128, 1, split_k) for split_k in (2, 4, 8)),
    *(Tiling(64, 64, 1, split_k) for split_k in (2, 4)),
)
ROW_COLUMN = (  # that want A row-major and B transposed, as a Linear has them
    *(Tiling(tile_m, 192, cluster) for tile_m in (192, 128) for cluster in (2, 1)),
    Tiling(64, 256, 1),
    *(Tiling(64, 128, cluster) for cluster in (2, 1)),
)


def dtypes_of(step: str) -> tuple[torch.dtype, ...]:
    """The element types that a step multiplies."""
    return (torch.float32,) if STEPS.index(step) < 7 else (torch.bfloat16, torch.float16)


def needs_tma(step: str) -> bool:
    return STEPS.index(step) >= 8


def describable(x: torch.Tensor) -> bool:
    """Whether TMA can move tiles of x: its address, and its strides but for that of the contiguous dimension, are
    multiples of 16 bytes, and the strides below 2^40. Source: CUDA driver API, cuTensorMapEncodeTiled."""
    if x.data_ptr() % 16:
        return False
    matrix = [(size, stride) for size, stride in zip(x.shape[-2:], x.stride()[-2:], strict=True) if stride != 1]
    batch = [(x.shape[0], x.stride(0))] if x.ndim == 3 else []
    strides = [stride * x.element_size() for size, stride in matrix + batch if size > 1]
    return all(stride % 16 == 0 and stride < 1 << 40 for stride in strides)


def row_column(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether A is row-major and B transposed, beyond doubt: a matrix of one row or column is both."""
    return min(*a.shape[-2:], *b.shape[-2:]) > 1 and a.stride(-1) == 1 and b.stride(-2) == 1


def choose(
    kind: Kind,
    dtype: torch.dtype,
    batch: int,
    m: int,
    n: int,
    k: int,
    *,
    tma: bool,
    row_column: bool = False,
    multiprocessors: int,
) -> tuple[str, Tiling | None]:
    """The step and, if it is the last one, its tiling. `tma`: whether TMA can describe both operands; `row_column`:
    whether A is row-major and B transposed."""
    if dtype == torch.float32:
        return "register_tile_2d_05" if kind == "model" else "warp_tile_07", None
    if not tma or kind == "sm_80":
        return "mma_sync_08", None
    if kind == "model":
        return "best_16", Tiling(64, 64, 1, 2) if max(m, n) <= 64 else Tiling(128, 128, 1, 2)
    tilings = (*TILINGS, *ROW_COLUMN) if row_column else TILINGS
    measured = MEASURED.get((kind, str(dtype).removeprefix("torch."), m, n, k)) if batch == 1 else None
    if measured and measured[:4] in {tiling[:4] for tiling in tilings}:
        return "best_16", Tiling(*measured)
    return "best_16", min(tilings, key=lambda tiling: cost(tiling, batch, m, n, k, multiprocessors))


def cost(tiling: Tiling, batch: int, m: int, n: int, k: int, multiprocessors: int) -> float:
    """Clocks of a product in the model above."""
    blocks = tiling.cluster * tiling.split_k  # that start together
    tiles = batch * ceil(m / (tiling.tile_m * tiling.cluster)) * ceil(n / tiling.tile_n)
    waves = ceil(tiles / max(1, RESIDENT[blocks] * multiprocessors // 132)) * ceil(blocks / multiprocessors)
    elements = tiling.tile_m * tiling.tile_n
    ending = START + 2 * elements / STORED
    if tiling.split_k > 1:  # each block sends what it does not finish, in f32
        ending += EXCHANGE + 4 * elements * (tiling.split_k - 1) / tiling.split_k / L2
        ending *= waves  # blocks with one tile: nothing to overlap with
    return waves * ceil(k / 64 / tiling.split_k) * stage_clocks(tiling) + ending


def stage_clocks(tiling: Tiling) -> float:
    """Clocks that a tile takes for 64 of k. For each 64 rows wgmma reads their A (8 KB) and all of B (128 bytes a
    column) from shared memory; TMA writes both there once, and L2 sends A and the block's part of B."""
    m, n = tiling.tile_m, tiling.tile_n
    products = m * n / 32
    shared = (m / 64 * (8192 + 128 * n) + 128 * (m + n)) / 128
    fetched = 128 * (m + n / tiling.cluster) / L2
    return max(products, shared, fetched)


RESIDENT = {1: 132, 2: 66, 4: 32, 8: 15}  # clusters that an H100 takes at once: GPCs have 16 or 18 multiprocessors
L2 = 46.6  # bytes a clock for each multiprocessor when all ask at once: an estimate
# Guesses: bytes a clock that a multiprocessor stores; clocks of a launch and its first stage, of two cluster barriers.
STORED, START, EXCHANGE = 32, 1500, 1000
