"""Which tiling of step 16 is the fastest at which shape: measured, filed, and written down for cuda/dispatch.py.

    python -m cuda.bench_matmul --tune     on a GPU: results/cuda/tilings_<device>_<date>.json, cuda/dispatch_table.py
    python -m cuda.measure.tilings --results FILE     the table alone, from such a file

First every tile shape, then, around the two fastest, the other fields one at a time. The table is Python that holds
numbers and nothing else. Refused: tilings with wrong results, a file without a device or rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import cli
from common.log import atomic_write
from cuda import dispatch
from cuda.measure import ladder, power, products
from cuda.measure.ladder import Budget, Rates
from cuda.measure.products import Competitor, Operands, Shape

TABLE = Path("cuda/dispatch_table.py")
STEP = dispatch.STEPS[-1]
VARIANTS = [(name, value) for name, values in (
    ("raster", (0, 1, 4, 8, 16)), ("stagger", (0, 1, 2)), ("cache_a", (0, 2)), ("cache_b", (0, 2)), ("cache_d", (0, 1)),
) for value in values]  # fmt: skip
KEPT = 2  # tile shapes whose neighbours are tried
GUESS = 400e12  # FLOP/s, only to see whether a shape fits into the time that is left
ENOUGH = 1.005  # a tiling that is so little slower than the fastest counts as fast: the table shall not follow noise


def sweep(
    shapes: Sequence[Shape],
    budget: Budget,
    *,
    rounds: int,
    cache_bytes: int,
    failures: list[str],
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """A row for each shape and each tiling that takes it, the fastest first."""
    rows, read, dtype = [], power.current_reader(), products.dtype_of(STEP)
    for shape in shapes:
        first = (*dispatch.TILINGS, *dispatch.ROW_COLUMN)
        guess = [shape.flops / GUESS] * (len(first) + KEPT * len(VARIANTS))
        if not budget.allows(f"tilings at {shape}", ladder.estimate(guess, rounds, 0.0)):
            continue
        operands = Operands(shape, dtype, products.set_count(shape, dtype, cache_bytes), device)
        taken: list[dict[str, Any]] = []
        for tilings in (lambda: first, lambda: around([row["tiling"] for row in taken[:KEPT]])):  # noqa: B023
            competitors = [products_with(shape, tiling) for tiling in tilings()]
            with power.PowerMeter(read) as meter:
                options = {"regime": "burst", "rounds": rounds, "rates": Rates(), "failures": failures}
                taken += ladder.measure(competitors, operands, meter, **options)
            for row in taken:
                row["tiling"] = [int(number) for number in row["step"].split("x")]
            taken.sort(key=lambda row: row["us"])
        for row in taken:
            row["of_fastest"] = taken[0]["us"] / row["us"]
        rows += taken
        if taken:
            print(f"{shape}: {taken[0]['step']}, {taken[0]['tflops']:.1f} TFLOP/s of {len(taken)} tilings", flush=True)
    return rows


def around(tilings: Sequence[Sequence[int]]) -> list[dispatch.Tiling]:
    """The tilings that differ from one of these in one field."""
    given = [dispatch.Tiling(*tiling) for tiling in tilings]
    changed = [one._replace(**{name: value}) for one in given for name, value in VARIANTS]
    return [one for one in dict.fromkeys(changed) if one not in given]


def products_with(shape: Shape, tiling: Sequence[int]) -> Competitor:
    one = products.our_step(STEP, shape, tuple(tiling))
    return Competitor("x".join(str(int(number)) for number in tiling), one.dtype, one.product)


def fastest(rows: Sequence[Mapping[str, Any]], order: Sequence[Sequence[int]] = ()) -> dict[Shape, tuple[int, ...]]:
    """The tiling of each shape: of those that are as good as the fastest, the one named first in `order`."""
    place = {tuple(int(number) for number in tiling): i for i, tiling in enumerate(order)}
    by_shape: dict[Shape, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_shape.setdefault(Shape(row["m"], row["n"], row["k"]), []).append(row)
    table = {}
    for shape, candidates in by_shape.items():
        limit = ENOUGH * min(row["us"] for row in candidates)
        good = [row for row in candidates if row["us"] <= limit]
        chosen = min(good, key=lambda row: (place.get(tuple(row["tiling"]), len(place)), row["us"]))
        table[shape] = tuple(chosen["tiling"])
    return dict(sorted(table.items()))


def table_text(result: Mapping[str, Any], file_name: str, order: Sequence[Sequence[int]] = ()) -> str:
    """The Python source of the table, from what save_result filed."""
    if not result.get("device") or not result.get("rows"):
        raise ValueError(f"{file_name}: expected a device and rows, as --tune files them")
    dtype = result["rows"][0]["dtype"]
    lines = [
        f'    ("sm_90", "{dtype}", {shape.m}, {shape.n}, {shape.k}): {tiling},'
        for shape, tiling in fastest(result["rows"], order).items()
    ]
    head = (
        '"""The fastest measured tilings of step 16. `python -m cuda.bench_matmul --tune` wrote this: do not edit.\n\n'
        f'From {file_name}, measured on {result["device"]} on {result["date"]}.\n"""\n\n'
        "# (kind, element type, m, n, k): the fields of dispatch.Tiling. A is m x k row-major, B transposed n x k.\n"
        "MEASURED: dict[tuple[str, str, int, int, int], tuple[int, ...]] = {\n"
    )
    return head + "\n".join(lines) + "\n}\n"


def write_table(results: Path, table: Path, order: Sequence[Sequence[int]] = ()) -> Path:
    """Writes the table from a file of results, whole or not at all."""
    atomic_write(table, table_text(json.loads(results.read_bytes()), results.name, order))
    return table


@dataclass(frozen=True, slots=True)
class TableConfig:
    results: Path = field(metadata={"help": "what --tune filed: results/cuda/tilings_....json"})
    table: Path = field(default=TABLE, metadata={"help": "the Python file to write"})


def main() -> None:
    config = cli.parse(TableConfig, prog=cli.program(), description="write the table of tilings from measurements")
    print(write_table(config.results, config.table, dispatch.TILINGS))


if __name__ == "__main__":
    cli.run(main)
