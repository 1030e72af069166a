"""The ladder without a GPU: not how long a step takes but what it asks of a GPU, counted by the checked CPU model.

A multiprocessor waits for memory or computes. What a step moves for each multiplication says which of the two, and does
not depend on the machine that counts. Small sizes do: the counts of a tile repeat. Refused: counting a wrong result.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cuda import modules
from cuda.measure import products
from cuda.measure.products import Operands, Shape

SECTOR = 32  # bytes: the least that global memory moves
GLOBAL = ("global read", "global write")
SHARED = ("shared read", "shared write", "remote read", "remote write")


def summary(counted: Iterable[Mapping[str, Any]], shape: Shape) -> dict[str, Any]:
    """What a step did, from the rows of take_counters(), by FLOP where that does not depend on the size:

    sectors_per_kflop   sectors of 32 bytes to and from global memory by ordinary loads and stores, for 1000 FLOP
    bytes_per_kflop     all that crosses the L2 cache: those sectors, cp.async and TMA
    coalescing          sectors moved, in parts of the fewest that would do
    bank_conflicts      passes over shared memory, in parts of the fewest that would do
    passes_per_kflop    passes over shared memory by ordinary instructions, each of up to 128 bytes
    tma_bytes, wgmma, mma, barrier_waits, mbarrier_waits      of the whole product; waits count for each thread
    """
    sums: dict[str, dict[str, int]] = defaultdict(lambda: {"bytes": 0, "actual": 0, "ideal": 0})
    for row in counted:
        for key in ("bytes", "actual", "ideal"):
            sums[row["kind"]][key] += row[key]

    def total(kinds: Sequence[str], key: str) -> int:
        return sum(sums[kind][key] for kind in kinds)

    def ratio(kinds: Sequence[str]) -> float | None:
        return total(kinds, "actual") / total(kinds, "ideal") if total(kinds, "ideal") else None

    kflop, sectors = shape.flops / 1000, total(GLOBAL, "actual")
    return {
        "sectors_per_kflop": sectors / kflop,
        "bytes_per_kflop": (sectors * SECTOR + total(("tma", "cp.async"), "bytes")) / kflop,
        "coalescing": ratio(GLOBAL),
        "bank_conflicts": ratio(SHARED),
        "passes_per_kflop": total(SHARED, "actual") / kflop,
        "tma_bytes": sums["tma"]["bytes"],
        "wgmma": sums["wgmma"]["actual"],
        "mma": sums["mma"]["actual"],
        "barrier_waits": sums["barrier"]["actual"],
        "mbarrier_waits": sums["mbarrier"]["actual"],
    }


def count(step: str, shape: Shape) -> tuple[list[dict[str, Any]], float, float]:
    """(rows of take_counters, error, seconds) of one product by a step."""
    module = modules.load("_simt_checked")
    operands = Operands(shape, products.dtype_of(step), 1, "cpu")
    sets = operands.sets(1)
    ((a, b, d),) = sets
    start = time.monotonic()
    module.take_counters()
    with module.options(counters=True):
        module.matmul(step, a, b, d)
    counted = module.take_counters()
    return counted, operands.verify(step, sets), time.monotonic() - start


def ladder(steps: Sequence[str], shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """A row for each step and shape, printed as it comes."""
    print("no GPU is measured: these are counts by the checked CPU model, not times", flush=True)
    rows = []
    for shape in shapes:
        for step in steps:
            counted, error, seconds = count(step, shape)
            row = {"step": step, "dtype": str(products.dtype_of(step)).removeprefix("torch."), "size": str(shape)}
            rows.append(row | summary(counted, shape) | {"error": error, "model_s": seconds})
            print_row(rows[-1])
    return rows


def print_row(row: Mapping[str, Any]) -> None:
    sectors, passes = (
        "" if row[key] is None else f"{row[key]:.2f} x {what}"
        for key, what in (("coalescing", "sectors"), ("bank_conflicts", "passes"))
    )
    print(
        f"{row['size']:>8} {row['step']:20} {row['bytes_per_kflop']:9.2f} B/kFLOP {sectors:>14} {passes:>13} "
        f"{row['tma_bytes'] / 1024:6.0f} KB by TMA {row['wgmma']:4} wgmma {row['mma']:5} mma {row['model_s']:6.2f} s",
        flush=True,
    )
