"""A kernel's source with what its lines ask of the machine beside them, counted by the checked CPU model.

    python -m cuda.explain 03_shared --size 128

runs one step of the ladder, d = a @ w.mT as in a torch Linear, and prints the lines that do something: requests to
memory and what they cost, copies, matrix instructions, waits. These are counts, not times; no GPU is needed. Refused: a
wrong result, a step that is not built.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from common import cli
from cuda import dispatch, modules

ROOT = Path(__file__).parent.parent
GLOBAL = ("global read", "global write")
SHARED = ("shared read", "shared write", "remote read", "remote write")
INSTRUCTIONS = {"wgmma": "wgmma", "mma": "mma", "atomic": "atomics", "shuffle": "shuffles"}
WAITS = ("barrier", "mbarrier")
COLUMNS = {
    "global": "requests of warps to global memory (r reads, w writes), and 32-byte sectors each moves (fewest / moved)",
    "shared": "requests of warps to shared memory, and passes over its 32 banks for each; 2x! is twice the fewest",
    "copies": "bytes that TMA or cp.async copies, and by how many instructions",
    "does": "matrix instructions of a warp or warpgroup; atomics, shuffles and waits at barriers count for each thread",
}


@dataclass(frozen=True, slots=True)
class Config:
    step: str = field(
        default="03_shared", metadata={"help": "of the ladder: a number, a name, or its source's: 03_shared"}
    )
    size: int = field(default=128, metadata={"help": "m, n and k"})
    order: Literal["fifo", "reverse", "random", "priority"] = field(
        default="fifo", metadata={"help": "which thread runs next"}
    )
    asynchronous: Literal["eager", "lazy", "random"] = field(
        default="lazy", metadata={"help": "when copies and wgmma happen"}
    )
    seed: int = field(default=1, metadata={"help": "of the random choices"})

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8:
            raise ValueError(f"size {self.size}: expected a multiple of 8, which TMA can describe")
        self.name  # noqa: B018 -- raises for a step that is none

    @property
    def name(self) -> str:
        """The step as dispatch calls it; raises ValueError."""
        for number, name in enumerate(dispatch.STEPS, start=1):
            words, digits = name.rsplit("_", 1)
            if self.step in (name, digits, str(number), words, f"{digits}_{words}"):
                return name
        raise ValueError(
            f"step {self.step!r}: expected 1 to {len(dispatch.STEPS)}, or one of {', '.join(dispatch.STEPS)}"
        )


def count(config: Config) -> list[dict[str, Any]]:
    """The rows of take_counters() for one product. RuntimeError: the model's report, or a wrong result."""
    module = modules.load("_simt_checked")
    torch.manual_seed(config.seed)
    dtype, size = dispatch.dtypes_of(config.name)[0], config.size
    a, w = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    d = torch.empty(size, size, dtype=dtype)
    module.take_counters()
    with module.options(order=config.order, async_=config.asynchronous, seed=config.seed, counters=True):
        module.matmul(config.name, a, w.mT, d)
    expected = a.double() @ w.double().mT
    error, allowed = (d.double() - expected).abs().max().item(), 0.01 * expected.abs().max().item()
    if not (error <= allowed):
        raise RuntimeError(f"{config.name}: an element is {error:.3g} off, expected at most {allowed:.3g}")
    return module.take_counters()


def megabytes(count: int) -> str:
    for unit, size in (("MB", 1 << 20), ("KB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def describe(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What one line does, by column."""
    parts = defaultdict(list)
    for row in rows:
        kind, requests = row["kind"], row["requests"]
        if kind in GLOBAL:
            each = f"{row['ideal'] / requests:.3g}/{row['actual'] / requests:.3g}"
            parts["global"].append(f"{requests}{'r' if kind.endswith('read') else 'w'} {each}")
        elif kind in SHARED:
            remote = "peer " if kind.startswith("remote") else ""
            ways = f" {row['actual'] / row['ideal']:.3g}x!" if row["actual"] > row["ideal"] else ""
            parts["shared"].append(
                f"{remote}{requests}{'r' if kind.endswith('read') else 'w'} {row['actual'] / requests:.3g}{ways}"
            )
        elif kind in ("tma", "cp.async"):
            parts["copies"].append(f"{megabytes(row['bytes'])} in {requests}")
        elif kind in WAITS:
            parts["does"].append(f"{requests} waits")
        else:
            parts["does"].append(f"{row['actual']} {INSTRUCTIONS.get(kind, kind)}")
    return {column: " ".join(texts) for column, texts in parts.items()}


def neighbourhood(lines: Sequence[str], counted: Iterable[int]) -> list[int]:
    """The numbers of the lines to show: those counted, and what lies between ones that are at most 3 apart."""
    shown: list[int] = []
    for number in sorted(counted):
        if shown and number - shown[-1] <= 3:
            shown += range(shown[-1] + 1, number)
        shown.append(number)
    return [number for number in shown if 0 < number <= len(lines)]


def by_place(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    places = defaultdict(list)
    for row in rows:
        places[row["file"], row["line"]].append(row)
    return places


def listing(rows: Sequence[Mapping[str, Any]], root: Path = ROOT) -> list[str]:
    """The lines of the report, file by file; the step's own file (.cu) comes first."""
    cells = {place: describe(line) for place, line in by_place(rows).items()}
    used = [column for column in COLUMNS if any(column in cell for cell in cells.values())]
    widths = [max(len(column), *(len(cell.get(column, "")) for cell in cells.values())) for column in used]
    head = " ".join(f"{column:<{width}}" for column, width in zip(used, widths, strict=True))
    text = []
    for name in sorted({file for file, _ in cells}, key=lambda name: (not name.endswith(".cu"), name)):
        path = root / name
        source = path.read_text().splitlines() if path.is_file() else []
        text += ["", f"{head}      {name}"]
        counted = sorted(line for file, line in cells if file == name)
        shown = neighbourhood(source, counted) or counted
        before = None
        for number in shown:
            if before is not None and number != before + 1:
                text.append(f"{'':{len(head)}}  ...")
            cell = cells.get((name, number), {})
            beside = " ".join(f"{cell.get(column, ''):<{width}}" for column, width in zip(used, widths, strict=True))
            code = source[number - 1] if number <= len(source) else ""
            text.append(f"{beside} {number:4} {code}".rstrip())
            before = number
    return [*text, "", *(f"{column:7} {COLUMNS[column]}" for column in used)]


def total(rows: Sequence[Mapping[str, Any]], size: int) -> list[str]:
    """The whole product in a few words."""

    def sums(kinds: Sequence[str]) -> tuple[int, int, int]:
        chosen = [row for row in rows if row["kind"] in kinds]
        return tuple(sum(row[key] for row in chosen) for key in ("requests", "actual", "ideal"))

    text = []
    for name, kinds, unit in (("global", GLOBAL, "sectors"), ("shared", SHARED, "passes")):
        requests, actual, ideal = sums(kinds)
        if requests:
            text.append(f"{name} memory: {requests} requests, {actual} {unit}, {actual / ideal:.2f} x the fewest")
    copied = sum(row["bytes"] for row in rows if row["kind"] in ("tma", "cp.async"))
    moved = 32 * sums(GLOBAL)[1] + copied
    text.append(f"from and to L2: {megabytes(moved)}, {2 * size**3 / moved:.1f} FLOP a byte")
    text += [f"{kind}: {sums((kind,))[1]}" for kind in (*INSTRUCTIONS, *WAITS) if sums((kind,))[1]]
    return text


def main() -> None:
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--step", *argv]
    config = cli.parse(Config, argv, prog=cli.program(), description=__doc__.splitlines()[0])
    try:
        rows = count(config)
    except RuntimeError as error:
        raise cli.UserError(str(error)) from error
    print(f"{config.name}, {config.size} x {config.size} x {config.size}: counts by the checked CPU model, not times")
    print("\n".join(total(rows, config.size)))
    print("\n".join(listing(rows)))


if __name__ == "__main__":
    cli.run(main)
