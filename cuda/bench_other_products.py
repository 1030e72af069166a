"""Products that exist in Triton alone, and batched LoRA, beside others: `python -m cuda.bench_other_products`.

On a GPU: every competitor's result is compared with torch's, and those that are right are timed in turn. A row has
microseconds, TFLOP/s, GB/s and the share of the limit, which is the time of the FLOPs at the data sheet's peak, or that
of the bytes at the speed of a copy, whichever is longer. The run keeps to a budget of time, in which the kernels are
compiled too, and says what it left out. Results go to results/cuda/. On a CPU nothing is timed or filed: all results
are compared at small sizes, ours by Triton's interpreter or the CPU model. A competitor that fails loses its own rows.
Refused: timing what is wrong. The exit code is 1 where ours is wrong or fails, and on a CPU where a peer is wrong too.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from common import cli, timing
from common.cli import UserError
from common.results import save_result
from cuda.measure import ladder, other_products
from cuda.measure.ladder import Budget
from cuda.measure.other_products import OPERATIONS, SIZES, Call, Case, Problem

COMPILE_S = 1.5  # of one kernel, roughly
CASE_S = 0.4  # to make the operands, compare the results and take the samples
INNER = 10  # calls that a sample averages; each is timed on its own, with a cold cache


@dataclass(frozen=True, slots=True)
class BenchConfig:
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto is CUDA where there is one"})
    operations: str = field(default="all", metadata={"help": f"all, or some of {','.join(OPERATIONS)}"})
    rounds: int = field(default=5, metadata={"help": "samples of each competitor, taken in turn"})
    budget_s: float = field(default=50.0, metadata={"help": "seconds that a run on a GPU may take"})
    out: Path = field(default=Path("results"), metadata={"help": "folder of the result files"})

    def __post_init__(self) -> None:
        if self.rounds < 1 or not self.budget_s > 0:
            raise ValueError(f"rounds {self.rounds}, budget_s {self.budget_s}: expected positive numbers")
        self.chosen()

    def chosen(self) -> tuple[str, ...]:
        names = tuple(OPERATIONS) if self.operations == "all" else tuple(self.operations.replace(" ", "").split(","))
        for name in names:
            if name not in OPERATIONS:
                raise ValueError(f"operation {name!r}: expected all, or some of {', '.join(OPERATIONS)}")
        return names


class WrongResult(ValueError):
    """Not that of torch."""


@dataclass(slots=True)
class Losses:
    """What was not timed, and why: `failed` are ours that fail or are wrong, and cases that could not be made; `wrong`
    are results of peers, `left_out` are peers that do not run here."""

    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def fail(self, what: str, error: Exception) -> None:
        self._note(self.failed, what, error)

    def lost(self, problem: Problem, case: Case, name: str, error: Exception) -> None:
        """A peer that is not there is said once, not for each size."""
        if name in case.ours:
            self._note(self.failed, f"{problem}, {name}", error)
        elif isinstance(error, WrongResult):
            self._note(self.wrong, f"{problem}, {name}", error)
        else:
            self._note(self.left_out, f"{problem.operation}, {name}", error)

    def _note(self, notes: list[str], what: str, error: Exception) -> None:
        if (line := f"{what}: {said(error)}") not in notes:
            notes.append(line)
            print(f"{'left out' if notes is self.left_out else 'FAILED, not timed'}: {line}", flush=True)


def said(error: Exception) -> str:
    """The first lines: those of a compiler or of CUDA are many."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def sound(problem: Problem, case: Case, losses: Losses) -> dict[str, Call]:
    """{who: the call} of those whose result is right."""
    reference, good = case.reference(), {}
    for name, make in (case.ours | case.peers).items():
        try:
            call = make()
            if not case.close(call(), reference):
                raise WrongResult("it is far from torch's")
        except Exception as error:  # whatever a compiler, a driver or a package that is not there may raise
            losses.lost(problem, case, name, error)
        else:
            good[name] = call
    return good


def timed(
    functions: dict[str, Call], lost: Callable[[str, Exception], None], rounds: int, device: str
) -> dict[str, timing.Samples]:
    """In turn; or, where one fails after all, one after the other, and without that one."""
    if not functions:
        return {}
    try:
        return timing.compare(functions, rounds=rounds, warmup=2, check=None, device=device, inner=INNER)
    except Exception as error:
        if len(functions) == 1:
            lost(*functions, error)
            return {}
    taken: dict[str, timing.Samples] = {}
    for name, function in functions.items():
        taken |= timed({name: function}, lost, rounds, device)
    return taken


def measure(
    problem: Problem, case: Case, losses: Losses, *, rounds: int, bandwidth: float, device: str = "cuda"
) -> list[dict[str, Any]]:
    """A row for each competitor that is right; ours get `of_best_peer`, how many times as fast as the fastest peer."""
    taken = timed(sound(problem, case, losses), partial(losses.lost, problem, case), rounds, device)
    limit_s, limit = case.limit(bandwidth)
    best = min((samples.median for name, samples in taken.items() if name in case.peers), default=None)
    rows = []
    for name, samples in taken.items():
        seconds = samples.median
        row = {"operation": problem.operation, "case": problem.what, "by": name, "us": 1e6 * seconds,
               "tflops": case.flops / seconds / 1e12, "gb_per_s": case.bytes / seconds / 1e9,
               "limit": limit, "of_limit": limit_s / seconds}  # fmt: skip
        if name in case.ours and best is not None:
            row["of_best_peer"] = best / seconds
        rows.append(row | {"samples": samples})
    return rows


def print_row(row: dict[str, Any]) -> None:
    speed = f"{row['us']:9.1f} us {row['tflops']:7.1f} TFLOP/s {row['gb_per_s']:6.0f} GB/s"
    ratio = f"{row['of_best_peer']:5.2f} x the best peer" if "of_best_peer" in row else ""
    limit = f"{row['of_limit']:5.0%} of {row['limit']}"
    print(f"{row['operation']:16} {row['case']:56} {row['by']:38} {speed} {limit} {ratio}", flush=True)


def each(problems: Iterable[Problem], budget: Budget, losses: Losses, work: Callable[[Problem, Case], None]) -> None:
    """Those that there is time for. The operands of one are gone when the next is made."""
    for problem in problems:
        if not budget.allows(str(problem), CASE_S + COMPILE_S * problem.kernels):
            continue
        try:
            work(problem, problem.make())
        except Exception as error:  # of the operands or the reference
            losses.fail(str(problem), error)


def bench_cuda(config: BenchConfig) -> int:
    if torch.cuda.get_device_capability() != (9, 0):
        raise UserError(f"{torch.cuda.get_device_name()}: expected a Hopper GPU, compute capability 9.0")
    budget, losses, rows = Budget(config.budget_s), Losses(), []
    bandwidth = timing.copy_bandwidth("cuda")
    print(f"copies: {bandwidth / 1e12:.2f} TB/s, read and written", flush=True)

    def work(problem: Problem, case: Case) -> None:
        for row in measure(problem, case, losses, rounds=config.rounds, bandwidth=bandwidth):
            rows.append(row)
            print_row(row)

    try:
        each(other_products.problems("cuda", SIZES["cuda"], config.chosen()), budget, losses, work)
    finally:
        if rows:
            settings = {key: getattr(config, key) for key in BenchConfig.__dataclass_fields__}
            settings |= asdict(losses) | {"skipped": budget.skipped, "copy_bytes_per_s": bandwidth}
            print(save_result("cuda", "other_products", rows, config=settings, device="cuda", root=config.out))
    return 1 if losses.failed or not rows else 0


def check_cpu(config: BenchConfig) -> int:
    print("no GPU is measured: results are compared at small sizes, nothing is timed", flush=True)
    losses = Losses()

    def work(problem: Problem, case: Case) -> None:
        good = sound(problem, case, losses)
        counts = f"{case.flops / 1e6:.2f} MFLOP, {case.bytes / 1e3:.1f} kB"
        print(f"{problem.operation:16} {problem.what:56} {counts:24} right: {'; '.join(good)}", flush=True)

    each(other_products.problems("cpu", SIZES["cpu"], config.chosen()), Budget(math.inf), losses, work)
    return 1 if losses.failed or losses.wrong else 0


def main() -> int:
    config = cli.parse(BenchConfig, prog=cli.program(), description="special products, beside torch")
    device = ladder.device_of(config.device)
    return bench_cuda(config) if device == "cuda" else check_cpu(config)


if __name__ == "__main__":
    cli.run(main)
