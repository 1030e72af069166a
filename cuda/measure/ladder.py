"""Times the ladder and cuBLAS on a GPU: by shape, short samples after a rest ("burst"), and without any ("sustained").

A sample goes through all sets of operands; where launches would count, as one CUDA graph. What does not fit into the
time that is left is skipped, and said to be. Clocks and power stand beside each row; none is ever set.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch

from common import timing
from common.cli import UserError
from common.timing import Samples
from cuda.measure import cublaslt, power, products
from cuda.measure.products import Competitor, Operands, Shape

GRAPH_FLOPS = 2 * 2048**3  # up to here a launch takes as long as a good part of the product
SLOW_S = 0.05  # a product that takes longer is left out ...
PICTURE = Shape(4096, 4096, 4096)  # ... but here, where the whole ladder is drawn,
PICTURE_SLOW_S = 0.6  # it may take so long
PROBE = Shape(2048, 2048, 2048)  # large enough for the rates of large tiles, small enough for step 01
PASS_S = 0.02  # slow products do not go through all sets
SUSTAINED_PASS_S = 0.01  # long beside the overwriting of the L2 cache between two passes
SETUP_S = 3.0  # operands, references, checks, graphs and the choice of an algorithm at a shape, roughly


def device_of(wanted: str) -> str:
    """ "cpu" or "cuda", which "auto" is where there is one. Raises UserError where there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("device cuda: this machine has no CUDA device")
    return wanted if wanted != "auto" else "cuda" if available else "cpu"


@dataclass(slots=True)
class Budget:
    """Seconds that a run may take. `reserve` is kept for what comes later."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    skipped: list[str] = field(default_factory=list)
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def left(self) -> float:
        return self.seconds - (self.clock() - self.start)

    def allows(self, what: str, estimate: float, reserve: float = 0.0) -> bool:
        """Whether it fits; what does not is noted."""
        if estimate + reserve <= self.left:
            return True
        self.skipped.append(what)
        print(f"skipped: {what}, about {estimate:.0f} s, {max(self.left - reserve, 0):.0f} s left for it", flush=True)
        return False


class Rates:
    """The best FLOP/s seen of each competitor in each type, from which the time of another product is foretold."""

    def __init__(self) -> None:
        self.best: dict[tuple[str, torch.dtype], float] = {}

    def saw(self, one: Competitor, flops: int, seconds: float) -> None:
        key = one.name, one.dtype
        self.best[key] = max(self.best.get(key, 0.0), flops / seconds)

    def seconds(self, one: Competitor, shape: Shape) -> float:
        """0 for a competitor that nothing is known of."""
        rate = self.best.get((one.name, one.dtype))
        return shape.flops / rate if rate else 0.0

    def affordable(self, competitors: Iterable[Competitor], shape: Shape) -> list[Competitor]:
        """Those that are fast enough to be measured at this shape."""
        limit = PICTURE_SLOW_S if shape == PICTURE else SLOW_S
        return [one for one in competitors if self.seconds(one, shape) <= limit]


def estimate(seconds: Iterable[float], rounds: int, rest_s: float) -> float:
    """How long it takes to measure products that take so long each: check, warm-up and calibration, then samples."""
    return SETUP_S + sum(4 * one + rounds * (rest_s + max(one, 2 * timing.SAMPLE_S)) for one in seconds)


def row_of(name: str, operands: Operands, samples: Samples, regime: str, error: float) -> dict[str, Any]:
    """A line of the result; `samples` are of one product."""
    shape, dtype, seconds = operands.shape, operands.dtype, samples.median
    return {
        "step": name, "dtype": str(dtype).removeprefix("torch."), "size": str(shape), "m": shape.m, "n": shape.n,
        "k": shape.k, "regime": regime, "us": 1e6 * seconds, "tflops": shape.flops / seconds / 1e12,
        "of_peak": shape.flops / seconds / products.PEAK[dtype], "error": error, "samples": samples,
    }  # fmt: skip


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to rows of one shape and regime `of_cublas`, the time of the fastest way to cuBLAS for that type over the
    row's own, and `of_torch`, the same beside torch.mm alone."""
    for row in rows:
        peers = [peer for peer in rows if peer["dtype"] == row["dtype"] and peer["step"] not in products.OURS]
        plain = [peer for peer in peers if peer["step"] == "cuBLAS"]
        if peers:
            row["of_cublas"] = min(peer["us"] for peer in peers) / row["us"]
        if plain:
            row["of_torch"] = plain[0]["us"] / row["us"]


def per_product(samples: Samples, count: int) -> Samples:
    """Of samples of a pass through `count` products."""
    return Samples(tuple(seconds / count for seconds in samples.raw), samples.inner * count)


def captured(function: Callable[[], None]) -> Callable[[], None]:
    """The function's launches as one CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is made at the first call, handles and workspaces, may not be captured
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def sound(
    competitors: Sequence[Competitor], operands: Operands, failures: list[str]
) -> dict[Competitor, products.Sets]:
    """Those whose first result is right, each with results of its own; the others are noted and left out."""
    good = {}
    for one in competitors:
        sets = operands.sets(len(operands.pairs))
        try:
            one.product(*sets[0])
            operands.verify(one.name, sets[:1])
        except Exception as error:  # whatever Triton's compiler may raise too
            failures.append(f"{one.name} at {operands.shape}: {error}")
            print(f"FAILED, not timed: {failures[-1]}", flush=True)
        else:
            good[one] = sets
    return good


def measure(
    competitors: Sequence[Competitor],
    operands: Operands,
    meter: power.PowerMeter,
    *,
    regime: str,
    rounds: int,
    rates: Rates,
    failures: list[str],
    seconds: float = 0.0,
) -> list[dict[str, Any]]:
    """Rows of competitors of one type, checked, then timed in turn. `seconds`: how long a sample lasts; 0: as short as
    is good enough. Nobody whose result is wrong is timed: `failures` says who."""
    shape, functions, counts = operands.shape, {}, {}
    good = sound(competitors, operands, failures)
    for one, sets in good.items():
        foretold = rates.seconds(one, shape)
        count = len(sets) if foretold * len(sets) <= PASS_S else 1
        repeats = max(1, ceil(SUSTAINED_PASS_S / (foretold * count))) if seconds and foretold else 1
        del sets[count:]
        counts[one] = count * repeats

        def run(one: Competitor = one, sets: products.Sets = sets, repeats: int = repeats) -> None:
            for _ in range(repeats):
                for a, b, d in sets:
                    one.product(a, b, d)

        graph = operands.device == "cuda" and shape.flops <= GRAPH_FLOPS
        functions[one.name] = captured(run) if graph else run
    if not functions:
        return []
    errors: dict[str, float] = {}

    def check(_: dict[str, Any]) -> None:
        errors.update({one.name: operands.verify(one.name, sets) for one, sets in good.items()})

    inner = None
    if seconds:
        passes = [rates.seconds(one, shape) * counts[one] for one in good]
        inner = max((ceil(seconds / one) for one in passes if one), default=1)
    options = {"rounds": rounds, "warmup": 1, "check": check, "inner": inner, "before": meter.begin}
    taken = timing.compare(functions, device=operands.device, **options)
    rows = []
    for one in good:
        samples = per_product(taken[one.name], counts[one])
        rates.saw(one, shape.flops, samples.median)
        rows.append(row_of(one.name, operands, samples, regime, errors[one.name]) | meter.reading(one.name))
    return rows


def best_of_lt(operands: Operands, rates: Rates) -> Competitor:
    """The fastest of what cublasLt's heuristics propose; what torch takes from it where ctypes does not reach them."""
    try:
        proposals = cublaslt.of_current_device().products(*operands.sets(1)[0])
    except (OSError, AttributeError, RuntimeError, ValueError) as error:
        print(f"cublasLt's heuristics are out of reach ({error}): torch's way to cublasLt instead", flush=True)
        return products.torch_product_lt(operands.dtype)
    named = {f"cublasLt {i}": product for i, product in enumerate(proposals)}
    competitors = [Competitor(name, operands.dtype, product) for name, product in named.items()]
    with power.PowerMeter() as meter:
        rows = measure(competitors, operands, meter, regime="choice", rounds=3, rates=Rates(), failures=[])
    if not rows:
        return products.torch_product_lt(operands.dtype)
    fastest = min(rows, key=lambda row: row["us"])
    best = Competitor(f"cublasLt, best of {len(rows)}", operands.dtype, named[fastest["step"]])
    rates.saw(best, operands.shape.flops, 1e-6 * fastest["us"])
    return best


def print_row(row: dict[str, Any]) -> None:
    ratio = f"{100 * row['of_cublas']:6.1f} % of cuBLAS" if "of_cublas" in row else ""
    card = [f"{row[key]:.0f} {unit}" for key, unit in (("power_w", "W"), ("sm_mhz", "MHz")) if row.get(key) is not None]
    speed = f"{row['us']:11.1f} us {row['tflops']:7.1f} TFLOP/s"
    print(f"{row['size']:>16} {row['regime']:9} {row['step']:22} {speed} {ratio} {' '.join(card)}", flush=True)
