"""Products with matrices in NF4 beside bitsandbytes': the layer of QLoRA, forward for sampling, both ways for training.

All competitors hold the same packed numbers, and torch's own product, which reads them unpacked, says what packing
costs in time. On CUDA ours is the kernel in Triton, and the way over torch; on a CPU the latter alone, beside what
bitsandbytes has for CPUs. Without bitsandbytes ours is timed beside torch alone, and that is said. Refused: timing a
competitor whose result, or gradient, is not torch's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common import timing
from lora.bench_config import BenchConfig, installed, peer
from lora.quantised import Format, QuantisedLinear

FORMATS: tuple[Format, ...] = ("nf4", "nf4-double")
MATRICES = {"cpu": ((1024, 1024), (4096, 1024)), "cuda": ((4096, 4096), (14336, 4096), (4096, 14336))}  # (out, in)
FORWARD = {"cpu": (1, 128), "cuda": (1, 16, 2048)}  # rows of x: a token of one sequence, or of several, and a prompt
BOTH_WAYS = {"cpu": (128,), "cuda": (2048,)}
DTYPE = torch.bfloat16  # in float32 bitsandbytes' way for inference on CPUs rounds to it too
TOLERANCE = 2e-2  # of the largest element: weights, scales and sums are rounded at different places
PEER, UNPACKED = "bitsandbytes", "torch, unpacked"


@dataclass(frozen=True, slots=True)
class Problem:
    shape: tuple[int, int]
    format: Format
    tokens: int
    training: bool
    device: str

    def said(self) -> dict[str, Any]:
        return {
            "matrix": "x".join(map(str, self.shape)), "format": self.format, "tokens": self.tokens,
            "passes": "forward and backward" if self.training else "forward",
        }  # fmt: skip


def problems(config: BenchConfig) -> Iterator[Problem]:
    device = config.device
    passes = [(M, False) for M in FORWARD[device]] + [(M, True) for M in BOTH_WAYS[device]]
    for shape in ((64, 128),) if config.quick else MATRICES[device]:
        for format in FORMATS:
            for tokens, training in passes:
                yield Problem(shape, format, tokens, training, device)


def layers(problem: Problem) -> dict[str, nn.Module]:
    """Torch's, the last one, has the numbers that the packed ones stand for."""
    torch.manual_seed(0)
    linear = nn.Linear(*reversed(problem.shape), bias=False, device=problem.device)
    packed = QuantisedLinear.from_linear(linear, problem.format)
    ways = {"ours": packed}
    if problem.device == "cuda":
        ways = {"ours": QuantisedLinear.from_linear(linear, problem.format, kernels="triton"), "ours, torch": packed}
    if installed(PEER):
        ways[PEER] = _theirs(linear, problem)
    unpacked = nn.Linear(*reversed(problem.shape), bias=False, device=problem.device, dtype=DTYPE)
    with torch.no_grad():
        unpacked.weight.copy_(packed.dequantised())
    ways[UNPACKED] = unpacked
    return {name: layer.train(problem.training).requires_grad_(False) for name, layer in ways.items()}


def _theirs(linear: nn.Linear, problem: Problem) -> nn.Module:
    """Layers of bitsandbytes pack their weight on the way to a device; on a CPU again when they first infer."""
    library, options = peer(PEER), {"quant_type": "nf4", "compress_statistics": problem.format == "nf4-double"}
    layer = library.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=DTYPE, **options)
    layer.weight = library.nn.Params4bit(linear.weight.detach().cpu(), requires_grad=False, **options)
    return layer.to(problem.device)


def work(layer: nn.Module, x: Tensor, dy: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
    """y; with dy the gradient of x too."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (layer(x),)

    def both_ways() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        return y.detach(), *torch.autograd.grad(y, leaf, dy)

    return forward if dy is None else both_ways


def measure(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    x, dy = (
        torch.randn(problem.tokens, width, generator=generator).to(problem.device, DTYPE)
        for width in reversed(problem.shape)
    )
    ways = layers(problem)
    functions = {name: work(layer, x, dy if problem.training else None) for name, layer in ways.items()}
    check = timing.close(TOLERANCE)
    taken = timing.compare(functions, rounds=rounds, warmup=2, check=check, device=problem.device)
    bytes_ = {name: sum(x.nbytes for x in (*layer.parameters(), *layer.buffers())) for name, layer in ways.items()}
    bytes_.pop(PEER, None)  # which keeps its scales beside the parameter
    rows = []
    for name, samples in taken.items():
        us, ours = 1e6 * samples.median, name.startswith("ours")
        row = problem.said() | {"by": name, "us": us, "weight_mb": bytes_.get(name, bytes_["ours"]) / 1e6}
        row["weight_gb_per_s"] = row["weight_mb"] / us * 1e3
        row["vs_bitsandbytes"] = 1e6 * taken[PEER].median / us if ours and PEER in taken else None
        row["vs_unpacked"] = 1e6 * taken[UNPACKED].median / us
        rows.append(row | {"samples": samples})
    return rows


def rows(config: BenchConfig) -> Iterator[dict[str, Any]]:
    if not installed(PEER):
        print(f"{PEER} is not installed: NF4 is timed beside torch alone", flush=True)
    for problem in problems(config):
        yield from measure(problem, config.rounds)
