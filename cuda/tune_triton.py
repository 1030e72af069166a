"""Measures the tilings of the kernels in Triton on a GPU and writes cuda/triton_table.py: `python -m cuda.tune_triton`.

A problem is run once to see what its operations ask of triton_tilings.py; then every candidate is forced in turn, its
result compared with torch's, and the sound ones are timed side by side. Results go to results/cuda/, and from there
into the table, which is written whole or not at all. Refused: a machine without a GPU, tilings with wrong results.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import cli, timing
from common.cli import UserError
from common.log import atomic_write
from common.results import save_result
from cuda import ops, triton_tilings
from cuda.measure import attention, products
from cuda.measure.ladder import Budget
from cuda.measure.tilings import ENOUGH
from cuda.triton_tilings import Tiling

TABLE = Path("cuda/triton_table.py")
SHAPES = "4096,8192,2048,16384,1024,512,8192x3072x768,8192x768x3072,8192x50304x768,128x4096x4096,16x4096x4096"
TOLERANCE = 3e-2  # of the largest element, in bf16
GUESS_S = 20.0  # of a problem: a dozen candidates to compile and to time


@dataclass(frozen=True, slots=True)
class TuneConfig:
    shapes: str = field(default=SHAPES, metadata={"help": "of matrix products, n or m x n x k; the first first"})
    head_dims: str = field(default="128,64,256", metadata={"help": "head widths of attention"})
    rounds: int = field(default=5, metadata={"help": "samples of each candidate, taken in turn"})
    budget_s: float = field(default=540.0, metadata={"help": "seconds that a run may take"})
    table: Path = field(default=TABLE, metadata={"help": "the table to write"})
    out: Path = field(default=Path("results"), metadata={"help": "folder of the result files"})

    def __post_init__(self) -> None:
        if self.rounds < 1 or not self.budget_s > 0:
            raise ValueError(f"rounds {self.rounds}, budget_s {self.budget_s}: expected positive numbers")
        products.parse_shapes(self.shapes)
        widths = self.widths()
        if not widths or not set(widths) <= set(ops.HEAD_DIMS):
            raise ValueError(f"head_dims {self.head_dims!r}: expected some of {', '.join(map(str, ops.HEAD_DIMS))}")

    def widths(self) -> list[int]:
        parts = [part.strip() for part in self.head_dims.split(",")]
        return [int(part) for part in parts if part.isdigit()] if all(map(str.isdigit, parts)) else []


class Problem(NamedTuple):
    name: str
    launch: Callable[[], Any]
    reference: Callable[[], Any]


def problems(config: TuneConfig, device: str) -> Iterator[Problem]:
    """One after the other: the operands of one are gone when the next is made."""
    for shape in products.parse_shapes(config.shapes):
        yield product_of(shape, device)
    for backward in (False, True):
        for width in config.widths():
            for causal in (False, True):
                yield attention_of(attention.Shape.of(width, 4096, causal), backward, device)


def product_of(shape: products.Shape, device: str) -> Problem:
    """As a Linear has it."""
    a, b = (torch.randn(rows, shape.k, device=device).bfloat16() for rows in (shape.m, shape.n))
    return Problem(
        f"matmul {shape}", lambda: ops.matmul(a, b.mT, kernels="triton"), lambda: (a.float() @ b.mT.float()).bfloat16()
    )


def attention_of(shape: attention.Shape, backward: bool, device: str) -> Problem:
    inputs = attention.operands(shape, device)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)

    ours, name = attention.ours(shape, None, None, kernels="triton"), f"attention {shape}"
    if not backward:
        return Problem(f"{name}, forward", lambda: ours(*inputs[:3]), lambda: torchs(*inputs[:3]))
    reference = attention.backward_of(torchs, inputs)
    try:
        launch = attention.backward_of(ours, inputs)
    except Exception as error:  # of the forward pass, which runs here: only this problem is lost
        launch = partial(fail, error)
    return Problem(f"{name}, backward", launch, reference)


def fail(error: Exception) -> None:
    raise error


def sweep(
    some: Iterable[Problem], budget: Budget, *, rounds: int, failures: list[str], device: str
) -> list[dict[str, Any]]:
    """A row for each question and each candidate that is sound, in the order of the candidates."""
    rows: list[dict[str, Any]] = []
    for problem in some:
        if not budget.allows(problem.name, GUESS_S):
            continue
        with triton_tilings.asked() as questions:
            try:
                problem.launch()
            except Exception as error:  # the first guess: what was asked until then can be measured
                note(failures, f"{problem.name}: {type(error).__name__}: {error}")
        expected = problem.reference() if questions else None
        for question, candidates in questions.items():
            found = measure(problem, question, candidates, expected, rounds=rounds, failures=failures, device=device)
            if found:
                best = max(found, key=lambda row: row["of_fastest"])
                print(f"{problem.name}: {question[0]} {best['tiling']} {best['us']:.1f} us of {len(found)}", flush=True)
            rows += found
    return rows


def note(failures: list[str], what: str) -> None:
    failures.append(what)
    print(f"FAILED, not timed: {what}", flush=True)


def measure(
    problem: Problem,
    question: tuple,
    candidates: Sequence[Tiling],
    expected: Any,
    *,
    rounds: int,
    failures: list[str],
    device: str,
) -> list[dict[str, Any]]:
    functions = {}
    for tiling in candidates:

        def run(tiling: Tiling = tiling) -> Any:
            with triton_tilings.forced(question, tiling):
                return problem.launch()

        try:
            if not timing.close(TOLERANCE)({"ours": run(), "torch": expected}):
                raise ValueError(f"the result is off by more than {TOLERANCE} of the largest element")
        except Exception as error:  # whatever a compiler or a driver may raise: the others are measured
            note(failures, f"{problem.name}: {question[0]} {tuple(tiling)}: {type(error).__name__}: {error}")
        else:
            functions[tiling] = run
    if not functions:
        return []
    taken = timing.compare(functions, rounds=rounds, warmup=1, check=lambda _: None, device=device)
    fastest = min(samples.median for samples in taken.values())
    about = {"problem": problem.name, "question": list(question)}
    return [
        about | {"tiling": list(tiling), "us": 1e6 * s.median, "of_fastest": fastest / s.median, "samples": s}
        for tiling, s in taken.items()
    ]


def best_of(rows: Sequence[Mapping[str, Any]]) -> dict[tuple, tuple[int, ...]]:
    """The tiling of each question, sorted by question: the first that is as good as the fastest. Where several problems
    ask the same, the one that takes longest decides."""
    chosen: dict[tuple, tuple[float, str, tuple[int, ...]]] = {}
    for row in rows:
        question, us = tuple(row["question"]), row["us"] * row["of_fastest"]
        known = chosen.get(question)
        if row["of_fastest"] * ENOUGH >= 1 and (known is None or (known[1] != row["problem"] and known[0] < us)):
            chosen[question] = us, row["problem"], tuple(row["tiling"])
    return {question: chosen[question][2] for question in sorted(chosen)}


def table_text(result: Mapping[str, Any], file_name: str) -> str:
    """The Python source of the table, from what save_result filed."""
    if not result.get("device") or not result.get("rows"):
        raise ValueError(f"{file_name}: expected a device and rows, as tune_triton files them")
    lines = [f"    {literal(key)}: {literal(tiling)},\n" for key, tiling in best_of(result["rows"]).items()]
    head = (
        "What `python -m cuda.tune_triton` measured: (operation, kind, *key) -> triton_tilings.Tiling. Written by it."
    )
    about = f"From {file_name}, measured on {result['device']} on {result['date']}."
    table = f"MEASURED: dict[tuple, tuple[int, ...]] = {{\n{''.join(lines)}}}"
    return f'"""{head}\n\n{about}\n"""\n\n{table}\n'


def literal(values: Sequence[Any]) -> str:
    return f"({', '.join(json.dumps(x) if isinstance(x, str) else repr(x) for x in values)})"


def main() -> int:
    config = cli.parse(TuneConfig, prog=cli.program(), description="measure the tilings of the kernels in Triton")
    if not torch.cuda.is_available():
        raise UserError("tilings are timed on a GPU: this machine has no CUDA device")
    failures: list[str] = []
    budget = Budget(config.budget_s)
    rows = sweep(problems(config, "cuda"), budget, rounds=config.rounds, failures=failures, device="cuda")
    settings = {key: getattr(config, key) for key in TuneConfig.__dataclass_fields__}
    settings |= {"failed": failures, "skipped": budget.skipped}
    filed = save_result("cuda", "triton_tilings", rows, config=settings, device="cuda", root=config.out)
    atomic_write(config.table, table_text(json.loads(filed.read_bytes()), filed.name))
    print(filed, config.table, sep="\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
