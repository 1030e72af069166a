"""The fused operations, ours and ours in Triton, beside torch, torch.compile and a copy: `python -m cuda.bench_fused`.

On a GPU: microseconds, GB/s of the bytes that have to move, and these as a share of the bandwidth of a copy. On a CPU
nothing is timed: the checked model counts the bytes that each operation moves, and how many sectors it takes. Results
go to results/cuda/. Refused: timing what is wrong; then the rest is measured, and the exit code is 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from common import cli, timing
from common.results import save_result
from cuda import device as device_of
from cuda.measure import counters, fused, ladder
from cuda.measure.fused import Case

TOLERANCE = 3e-2  # of the largest element, in bf16
SIZES = {"cuda": (16384, 2048, 50304), "cpu": (32, 256, 1024)}
MUTATE = ("adamw", "cross_entropy and gradient, in place")  # each call changes its inputs: nothing to compare
OURS = ("ours", "triton")


@dataclass(frozen=True, slots=True)
class BenchConfig:
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto is CUDA where there is one"})
    tokens: int = field(default=0, metadata={"help": "rows; 0: 16384 on a GPU, 32 on a CPU"})
    width: int = field(default=0, metadata={"help": "channels; 0: 2048 on a GPU, 256 on a CPU"})
    words: int = field(default=0, metadata={"help": "vocabulary; 0: 50304 on a GPU, 1024 on a CPU"})
    rounds: int = field(default=7, metadata={"help": "samples of each competitor, taken in turn"})
    compile: bool = field(default=True, metadata={"help": "torch.compile is a competitor too"})
    triton: bool = field(default=True, metadata={"help": "our kernels in Triton are competitors too"})
    out: Path = field(default=Path("results"), metadata={"help": "folder of the result files"})

    def __post_init__(self) -> None:
        if self.rounds < 1 or min(self.tokens, self.width, self.words) < 0:
            raise ValueError(
                f"rounds {self.rounds}, sizes {self.tokens}, {self.width}, {self.words}: expected 0 or more"
            )

    def sizes(self, device: str) -> tuple[int, int, int]:
        given = (self.tokens, self.width, self.words)
        return tuple(mine or usual for mine, usual in zip(given, SIZES[device], strict=True))


def compiles(
    what: str, make: Callable[[], Callable[[], Any]], failures: list[str], wanted: Callable[[], Any] | None = None
) -> dict[str, Callable[[], Any]]:
    """{"triton": the call}, or nothing where it does not run or is far from the result of `wanted`: that is noted, and
    costs the others nothing."""
    try:
        call = make()
        result = call()
        if wanted is not None and not timing.close(TOLERANCE)({"triton": result, "torch": wanted()}):
            raise ValueError("the result is far from torch's")
    except Exception as error:  # whatever a compiler or a driver may raise
        failures.append(f"{what}, triton: {type(error).__name__}: {error}")
        print(f"FAILED, not timed: {failures[-1]}", flush=True)
        return {}
    return {"triton": call}


def competitors(case: Case, config: BenchConfig, failures: list[str]) -> dict[str, Callable[[], Any]]:
    """The calls that are timed, torch's last."""
    functions, torchs = {"ours": case.run(case.ours)}, case.run(case.torchs)
    if config.triton:
        wanted = None if case.name in MUTATE else torchs
        functions |= compiles(case.name, lambda: case.run(case.in_triton()), failures, wanted)
    if config.compile and case.inputs:
        functions["torch.compile"] = case.run(torch.compile(case.torchs))
    return functions | {"torch": torchs}


def measure(
    case: Case, config: BenchConfig, bandwidth: float, failures: list[str], device: str = "cuda"
) -> list[dict[str, Any]]:
    """Rows of one case. Raises ValueError for a result that is far from torch's."""
    functions = competitors(case, config, failures)
    check = (lambda _: None) if case.name in MUTATE else timing.close(TOLERANCE)
    taken = timing.compare(functions, rounds=config.rounds, warmup=3, check=check, device=device)
    rows = []
    for name, samples in taken.items():
        rate = case.bytes / samples.median
        rows.append({"operation": case.name, "pass": "backward" if case.backward else "forward", "by": name,
                     "us": 1e6 * samples.median, "gb_per_s": rate / 1e9, "of_copy": rate / bandwidth,
                     "samples": samples})  # fmt: skip
    return with_ratios(rows)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours get `of_best_peer`, how many times as fast as the fastest of the others."""
    best = min(row["us"] for row in rows if row["by"] not in OURS)
    for row in rows:
        if row["by"] in OURS:
            row["of_best_peer"] = best / row["us"]
    return rows


def bench_cuda(config: BenchConfig) -> int:
    bandwidth = timing.copy_bandwidth("cuda")
    print(f"copies: {bandwidth / 1e12:.2f} TB/s, read and written", flush=True)
    rows, failures = [], []
    for case in fused.cases("cuda", *config.sizes("cuda")):
        try:
            found = measure(case, config, bandwidth, failures)
        except (ValueError, RuntimeError) as error:
            failures.append(f"{case.name}: {error}")
            print(f"FAILED, not timed: {failures[-1]}", flush=True)
            continue
        for row in found:
            what = f"{row['operation']:36} {row['pass']:8} {row['by']:14} {row['us']:9.1f} us"
            print(f"{what} {row['gb_per_s']:7.0f} GB/s {row['of_copy']:5.0%} of a copy", flush=True)
        rows += found
    try:
        head = measure_head(config, failures)
    except (ValueError, RuntimeError) as error:
        failures.append(f"linear + cross_entropy: {error}")
        print(f"FAILED, not timed: {failures[-1]}", flush=True)
    else:
        for row in head:
            print(
                f"{row['operation']:45} {row['by']:14} {row['us']:9.1f} us {row['peak_bytes'] / 1e6:9.1f} MB",
                flush=True,
            )
        rows += head
    settings = {key: getattr(config, key) for key in BenchConfig.__dataclass_fields__}
    settings |= {"failed": failures, "copy_bytes_per_s": bandwidth}
    print(save_result("cuda", "fused", rows, config=settings, device="cuda", root=config.out))
    return 1 if failures or not rows else 0


def measure_head(config: BenchConfig, failures: list[str]) -> list[dict[str, Any]]:
    """Time and memory of linear + cross-entropy. Raises ValueError for a result that is far from torch's."""
    tokens, width, words = config.sizes("cuda")
    functions = fused.loss_of_a_head("cuda", tokens, width, words)
    triton = functions.pop("triton")
    if config.triton:
        name = "linear + cross_entropy"
        found = compiles(name, lambda: triton, failures, functions["torch"])
        functions = {"ours": functions["ours"]} | found | functions
    peaks = {}
    for name, function in functions.items():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    check = timing.close(TOLERANCE)
    taken = timing.compare(functions, rounds=config.rounds, warmup=2, check=check, device="cuda")
    flops = 6 * tokens * width * words
    rows = [{"operation": "linear + cross_entropy", "pass": "both", "by": name, "us": 1e6 * samples.median,
             "tflops": flops / samples.median / 1e12, "peak_bytes": peaks[name], "samples": samples}
            for name, samples in taken.items()]  # fmt: skip
    for row in rows[:-1]:
        row["memory_of_torch"] = peaks[row["by"]] / peaks["torch"]
    return with_ratios(rows)


def count(case: Case) -> dict[str, Any]:
    """The bytes that the checked model sees an operation move to and from memory, over those that have to."""
    with device_of.model("_simt_checked") as module:
        call = case.run(case.ours)
        module.take_counters()
        with module.options(counters=True):
            call()
        counted = module.take_counters()
    moved = sum(row["actual"] for row in counted if row["kind"] in counters.GLOBAL) * counters.SECTOR
    fewest = sum(row["ideal"] for row in counted if row["kind"] in counters.GLOBAL) * counters.SECTOR
    moved_in = sum(row["bytes"] for row in counted if row["kind"] in ("tma", "cp.async"))
    return {"operation": case.name, "pass": "backward" if case.backward else "forward", "bytes": case.bytes,
            "moved": (moved + moved_in) / case.bytes, "coalescing": moved / fewest if fewest else None}  # fmt: skip


def bench_cpu(config: BenchConfig) -> int:
    print("no GPU is measured: these are counts by the checked CPU model, not times", flush=True)
    rows = []
    for case in fused.cases("cpu", *config.sizes("cpu")):
        row = count(case)
        rows.append(row)
        sectors = f"{row['coalescing']:.2f} x sectors" if row["coalescing"] else ""
        moved = f"{row['moved']:6.2f} x the bytes that have to move"
        print(f"{row['operation']:36} {row['pass']:8} {moved} {sectors}", flush=True)
    print(save_result("cuda", "fused_counters", rows, config=config, device="cpu", root=config.out))
    return 0


def main() -> int:
    config = cli.parse(BenchConfig, prog=cli.program(), description="fused operations beside torch and a copy")
    device = ladder.device_of(config.device)
    return bench_cuda(config) if device == "cuda" else bench_cpu(config)


if __name__ == "__main__":
    cli.run(main)
