"""The benchmark protocol: check the results first, warm up, interleave A B A B in one process, keep every raw sample.

On CUDA the clock is a pair of device events around each call, with the L2 cache overwritten before it; on the CPU it is
`perf_counter`. `python -m common.timing` measures the machine's own ceilings: matrix products and memory copies.
Refused: timing functions whose results were not compared or hold a NaN, and saving a host name or a machine's path.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Literal

import numpy as np

from common.cli import parse, run
from common.results import save_result

# After a call the idle threads of BLAS and OpenMP go on spinning for up to some 100 ms, on the cores that another
# library's threads then need. So each sample begins after a pause, and with a call that is not counted, which wakes its
# own.
SETTLE_S = 0.2
HEAD_START = 700_000  # clocks of a GPU, about 0.4 ms, that the host has to launch a call
SAMPLE_S = 5e-3  # a sample lasts at least this long, well above the clock's resolution
MAX_INNER = {
    "cpu": 1_000_000,
    "cuda": 100,
}  # on CUDA each call also overwrites the L2 cache, which takes longer than it
GEMM_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
GEMM_DTYPES = {"cpu": ("float32", "float64"), "cuda": ("float32", "tf32", "float16", "bfloat16")}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # far beyond any cache
CEILING_ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds per call, one number a round; each is the mean of `inner` calls."""

    raw: tuple[float, ...]
    inner: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.raw)

    @property
    def p10(self) -> float:
        return float(np.percentile(self.raw, 10))

    @property
    def p90(self) -> float:
        return float(np.percentile(self.raw, 90))

    def as_dict(self) -> dict[str, Any]:
        """For a result file; all times in seconds."""
        return {"median": self.median, "p10": self.p10, "p90": self.p90, "inner": self.inner, "raw": list(self.raw)}


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int,
    check: Callable[[dict[str, Any]], bool | None] | None,
    device: Any = "cpu",
    inner: int | None = None,
    before: Callable[[str], None] | None = None,
) -> dict[str, Samples]:
    """Times functions without arguments against each other: `rounds` samples each, after `warmup` calls each.

    `check` gets {name: what the function returned} before anything is timed; it passes by returning True or None, and
    fails by returning False or by an AssertionError or ValueError (`close` makes one). A NaN in a result fails too.
    None says there is nothing to compare. `inner` is the number of calls a sample averages; None takes as many as fill
    5 ms. On CUDA each call is timed on its own, with a cold L2 cache, however many a sample has. `before(name)` is
    called ahead of each sample of that function, and is not timed: for a rest, or a note to a power meter.
    Raises ValueError, before timing, for a failed check and for bad arguments.
    """
    if not functions:
        raise ValueError("functions is empty: expected {name: function}")
    if not (rounds >= 1 and warmup >= 0 and (inner is None or inner >= 1)):
        raise ValueError(f"expected rounds >= 1, warmup >= 0, inner >= 1, got {rounds}, {warmup}, {inner}")
    if check is not None:
        _verify({name: function() for name, function in functions.items()}, check)
    for function in functions.values():
        for _ in range(warmup):
            function()
    kind = _kind(device)
    clock = _cuda_clock(device) if kind == "cuda" else _cpu_clock
    settle = _settle if kind == "cpu" and len(functions) > 1 else lambda _: None
    calls, raw = {}, {name: [] for name in functions}
    for name, function in functions.items():
        settle(function)
        calls[name] = inner or _calibrate(clock, function, MAX_INNER[kind])
    for _ in range(rounds):
        for name, function in functions.items():  # A B A B: drift of the machine meets all alike
            if before is not None:
                before(name)
            settle(function)
            raw[name].append(clock(function, calls[name]) / calls[name])
    return {name: Samples(tuple(raw[name]), calls[name]) for name in functions}


def _settle(function: Callable[[], Any]) -> None:
    sleep(SETTLE_S)
    function()


def close(tolerance: float) -> Callable[[dict[str, Any]], bool]:
    """A check: every result (array, tensor, number, or a tuple of these) is within `tolerance` of the last one, each
    part relative to the part's largest magnitude. The baseline goes last."""

    def check(results: dict[str, Any]) -> bool:
        *others, baseline = (list(_leaves(result)) for result in results.values())
        return all(
            len(other) == len(baseline) and all(_near(x, y, tolerance) for x, y in zip(other, baseline, strict=True))
            for other in others
        )

    return check


def _near(x: Any, y: Any, tolerance: float) -> bool:
    """Torch tensors are compared where they are: a copy to the host would take longer than most benchmarks."""
    if hasattr(x, "is_floating_point") and hasattr(y, "is_floating_point"):
        if x.shape != y.shape:
            return False
        if not x.numel():
            return True
        x, y = x.detach().double(), y.detach().double()
        return bool(((x - y).abs().max() <= tolerance * (y.abs().max().item() or 1.0)).item())
    x, y = _array(x), _array(y)
    scale = np.abs(y).max(initial=0.0) or 1.0
    return x.shape == y.shape and bool(np.abs(x - y).max(initial=0.0) <= tolerance * scale)


def _verify(results: dict[str, Any], check: Callable[[dict[str, Any]], Any]) -> None:
    for name, result in results.items():
        if any(_has_nan(leaf) for leaf in _leaves(result)):
            raise ValueError(f"check failed, nothing was timed: the result of {name!r} holds NaN")
    try:
        verdict = check(results)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"check failed, nothing was timed: {error}") from error
    verdict = verdict.item() if hasattr(verdict, "item") else verdict  # numpy and torch booleans
    if verdict is not None and not isinstance(verdict, bool):
        raise TypeError(f"check must return True, False or None, got {verdict!r}")  # an error of 1e-3 would be "true"
    if verdict is False:
        raise ValueError(f"check failed, nothing was timed: the results of {', '.join(results)} differ")


def _has_nan(leaf: Any) -> bool:
    if hasattr(leaf, "is_floating_point"):
        return leaf.is_floating_point() and bool(leaf.isnan().any().item())
    return bool(np.isnan(_array(leaf)).any())


def _leaves(result: Any) -> Iterator[Any]:
    """The floats, arrays and torch tensors in nested tuples, lists and dicts; other objects are not looked into."""
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, list | tuple):
        for item in result:
            yield from _leaves(item)
    elif isinstance(result, int | float | np.ndarray | np.generic) or hasattr(result, "is_floating_point"):
        yield result


def _array(value: Any) -> np.ndarray:
    """A number, array or torch tensor in float64; the way over torch is for bfloat16, which numpy lacks."""
    return np.asarray(value.detach().double().cpu() if hasattr(value, "is_floating_point") else value, dtype=np.float64)


def _calibrate(clock: Callable[[Callable, int], float], function: Callable[[], Any], most: int) -> int:
    """The calls that fill SAMPLE_S, found by doubling: one call alone may be too short for the clock to see."""
    calls = 1
    while calls < most and (seconds := clock(function, calls)) < SAMPLE_S:
        needed = math.ceil(calls * SAMPLE_S / seconds) if seconds > 0 else most
        calls = min(most, max(2 * calls, min(needed, 10 * calls)))
    return calls


def _cpu_clock(function: Callable[[], Any], calls: int) -> float:
    """Seconds of `calls` calls."""
    start = perf_counter()
    for _ in range(calls):
        function()
    return perf_counter() - start


def _cuda_clock(device: Any) -> Callable[[Callable[[], Any], int], float]:
    """A clock of device seconds. The L2 cache is overwritten before each call: benchmarks run on the same few tensors
    again and again, a training step does not. Then the device is kept waiting, so that the call has been launched when
    its time begins: what takes the host 100 us would else be timed with it."""
    import torch

    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(4 * cache_bytes, 1 << 28), dtype=torch.int8, device=device)

    def clock(function: Callable[[], Any], calls: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        with torch.cuda.device(device):
            for start, end in pairs:
                flush.zero_()
                torch.cuda._sleep(HEAD_START)
                start.record()
                function()
                end.record()
            torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) * 1e-3  # events count milliseconds

    return clock


def _kind(device: Any) -> str:
    return str(device).partition(":")[0]


def gemm_peak(dtype: str = "float32", device: Any = "cpu", sizes: Sequence[int] | None = None) -> float:
    """The best FLOP/s (2 n^3 a product) of torch's square matrix product over a few sizes n, on random data.

    `dtype` is the name of a torch dtype or "tf32", which is float32 rounded to 10 bits of mantissa on CUDA.
    """
    return max(row["flops"] for row in _gemm_rows(dtype, device, sizes or GEMM_SIZES[_kind(device)]))


def numpy_gemm_peak(dtype: str = "float32", sizes: Sequence[int] = GEMM_SIZES["cpu"]) -> float:
    """The same for numpy's."""
    return max(row["flops"] for row in _numpy_gemm_rows(dtype, sizes))


def copy_bandwidth(device: Any = "cpu") -> float:
    """Bytes/s of a torch copy from memory to memory, the read and the write both counted."""
    return _copy_row(device)["bytes_per_s"]


def _ceiling(function: Callable[[], Any], device: Any) -> Samples:
    # There is nothing to compare it with: the check only has compare look for NaN.
    return compare({"it": function}, rounds=CEILING_ROUNDS, warmup=2, check=lambda _: None, device=device)["it"]


def _gemm_rows(dtype: str, device: Any, sizes: Sequence[int]) -> list[dict[str, Any]]:
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        rows = []
        for size in sizes:
            a, b, out = torch.randn(3, size, size, device=device).to(getattr(torch, dtype.replace("tf32", "float32")))
            rows.append(_gemm_row("torch", dtype, size, _ceiling(lambda: torch.mm(a, b, out=out), device)))  # noqa: B023
        return rows
    finally:
        torch.set_float32_matmul_precision(before)


def _numpy_gemm_rows(dtype: str, sizes: Sequence[int]) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    rows = []
    for size in sizes:
        a, b, out = generator.standard_normal((3, size, size)).astype(dtype)
        rows.append(_gemm_row("numpy", dtype, size, _ceiling(lambda: np.matmul(a, b, out=out), "cpu")))  # noqa: B023
    return rows


def _gemm_row(library: str, dtype: str, size: int, samples: Samples) -> dict[str, Any]:
    """A ceiling is what the fastest sample reached, not the median: something else ran beside the slower ones."""
    flops = 2 * size**3 / min(samples.raw)
    return {"what": f"{library} matmul", "dtype": dtype, "size": size, "flops": flops, "samples": samples}


def _copy_row(device: Any) -> dict[str, Any]:
    import torch

    count = COPY_BYTES[_kind(device)]
    source = torch.randint(0, 127, (count,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    samples = _ceiling(lambda: target.copy_(source), device)
    return {"what": "torch copy", "size": count, "bytes_per_s": 2 * count / min(samples.raw), "samples": samples}


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """The command line of `python -m common.timing`."""

    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto is CUDA where there is one"})
    out: Path = field(default=Path("results"), metadata={"help": "the folder of the results"})


def main() -> None:
    """Measures the machine's ceilings and saves them as results/common/machine_<device>_<date>.json."""
    import torch

    description = "Measure this machine's ceilings: matrix products a second, and bytes copied a second."
    config = parse(MachineConfig, prog="common.timing", description=description)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [_copy_row(device)]
    for dtype in GEMM_DTYPES[device]:
        rows += _gemm_rows(dtype, device, GEMM_SIZES[device])
        rows += _numpy_gemm_rows(dtype, GEMM_SIZES["cpu"]) if device == "cpu" else []
    for row in rows:
        speed = f"{row['flops'] / 1e9:10.1f} GFLOP/s" if "flops" in row else f"{row['bytes_per_s'] / 1e9:10.1f} GB/s"
        print(f"{row['what']:14} {row.get('dtype', ''):9} {row['size']:>11,} {speed}")
    print(save_result("common", "machine", rows, config={"device": device}, root=config.out))


if __name__ == "__main__":
    run(main)
