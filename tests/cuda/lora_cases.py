"""What the tests of lora_bgmv and lora_sgmv share: batches that mix adapters, the definition, how close is close.

A result may be one rounding away from the definition. What is past an adapter's rank is NaN in the pools, and so is
what lies beside each row: whoever reads there fails.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cuda.lora_ops import lora_bgmv, lora_sgmv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a number: one rounding
SLACK = {torch.float32: 2**-20, torch.bfloat16: 2**-15, torch.float16: 2**-17}  # of the largest: sums before it


@dataclass(frozen=True, slots=True)
class Batch:
    """`segments`: (adapter, rows) one after the other; an adapter of -1 is none. `most`: the rank of the pools."""

    segments: tuple[tuple[int, int], ...] = ((1, 3), (0, 0), (-1, 2), (0, 9), (3, 1), (4, 2), (1, 2))
    ranks: tuple[int, ...] = (24, 8, 1, 0, 13)
    most: int = 24
    width: int = 600
    out: int = 333
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    padding: float = math.nan

    def arrays(self) -> dict[str, torch.Tensor]:
        """x, a_pool, b_pool, scales, ranks and y; indices of rows for bgmv, segments and `of_segments` for sgmv."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            wide = torch.full((*shape[:-1], shape[-1] + 8), math.nan)
            wide[..., :-8] = torch.randn(shape, generator=generator)
            return wide.to(self.device, self.dtype)[..., :-8]

        count, lengths = len(self.ranks), torch.tensor([0, *(rows for _, rows in self.segments)])
        adapters = torch.tensor([adapter for adapter, _ in self.segments], dtype=torch.int32)
        rows = int(lengths.sum())
        a_pool, b_pool = normal(count, self.most, self.width), normal(count, self.out, self.most)
        a_pool *= max(self.width, 1) ** -0.5
        for i, rank in enumerate(self.ranks):
            a_pool[i, rank:], b_pool[i, :, rank:] = self.padding, self.padding
        found = {"x": normal(rows, self.width), "a_pool": a_pool, "b_pool": b_pool, "y": normal(rows, self.out)}
        small = {
            "scales": torch.rand(count, generator=generator) + 0.5,
            "ranks": torch.tensor(self.ranks, dtype=torch.int32),
            "indices": adapters.repeat_interleave(lengths[1:]),
            "segments": lengths.cumsum(0).int(),
            "of_segments": adapters,
        }
        return found | {name: x.to(self.device) for name, x in small.items()}


def definition(x, a_pool, b_pool, indices, scales) -> torch.Tensor:
    """What is added to y, with pools that are 0 past the ranks; differentiable."""
    a, b = a_pool[indices.clamp_min(0).long()], b_pool[indices.clamp_min(0).long()]
    scale = torch.where(indices < 0, 0.0, scales[indices.clamp_min(0).long()])
    return scale[:, None] * (b @ (a @ x[..., None]))[..., 0]


def wanted(a: dict) -> torch.Tensor:
    return definition(a["x"].double(), a["a_pool"].double().nan_to_num(), a["b_pool"].double().nan_to_num(),
                      a["indices"], a["scales"].double())  # fmt: skip


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    if want.numel():
        limit = HALF[got.dtype] * want.abs() + SLACK[got.dtype] * want.abs().max() + 1e-30
        worst = ((got.double() - want).abs() / limit).max().item()
        assert worst <= 1.0, worst


def bgmv(a: dict, **options: Any) -> torch.Tensor:
    return lora_bgmv(a["x"], a["a_pool"], a["b_pool"], a["indices"], a["scales"], a["ranks"], **options)


def sgmv(a: dict, **options: Any) -> torch.Tensor:
    given = (a["segments"], a["of_segments"], a["scales"], a["ranks"])
    return lora_sgmv(a["x"], a["a_pool"], a["b_pool"], *given, **options)


BATCHES = {
    "mixed": Batch(),
    "none": Batch(segments=((-1, 5), (-1, 1))),
    "one adapter": Batch(segments=((2, 6),)),
    "distinct": Batch(segments=tuple((i, 1) for i in (4, 0, 3, 2, 1))),
    "one row": Batch(segments=((0, 1),), width=1, out=1, ranks=(1,), most=1),
    "full ranks": Batch(ranks=(16,) * 5, most=16, width=1024, out=256),
    "rank 64": Batch(ranks=(64, 40, 3, 1, 64), most=64, width=129, out=70),
    "rank 200": Batch(segments=((0, 40), (1, 2)), ranks=(200, 77), most=200, width=90, out=70),
    "rank 100, float32": Batch(
        segments=((0, 4), (1, 2)), ranks=(100, 77), most=100, width=9, out=7, dtype=torch.float32
    ),
}
TILES = Batch(segments=((1, 3), (-1, 5), (0, 130)), width=150, out=140)  # segments long enough for tiles of 64 rows


def operations(kernels: str) -> dict[str, Callable[..., torch.Tensor]]:
    return {"bgmv": partial(bgmv, kernels=kernels), "sgmv": partial(sgmv, kernels=kernels)}


def cases(kernels: str) -> dict[str, tuple[Callable[..., torch.Tensor], Batch]]:
    found = {}
    for o, f in operations(kernels).items():
        found |= {f"{o}, {name}": (f, batch) for name, batch in BATCHES.items()}
        found |= {f"{o}, mixed, {dtype}": (f, Batch(dtype=dtype)) for dtype in (torch.float32, torch.float16)}
    return found | {f"sgmv, tiles of 64 rows, {dtype}": (f, replace(TILES, dtype=dtype)) for dtype in DTYPES}


def gradients(a: dict, names=("x", "a_pool", "b_pool"), **options: Any) -> tuple[torch.Tensor, ...]:
    """Of the named operands, in the order of the operands."""
    leaves = {n: a[n].clone().requires_grad_(n in names) for n in ("x", "a_pool", "b_pool")}
    y = sgmv(a | leaves, **options)
    return torch.autograd.grad(y, [x for x in leaves.values() if x.requires_grad], gradient_of_y(a))


def gradient_of_y(a: dict) -> torch.Tensor:
    random = torch.randn(a["y"].shape, generator=torch.Generator().manual_seed(1))
    return random.to(a["y"].device, a["y"].dtype)


def wanted_gradients(a: dict) -> list[torch.Tensor]:
    exact = [a[n].double().nan_to_num().requires_grad_() for n in ("x", "a_pool", "b_pool")]
    y = definition(*exact, a["indices"], a["scales"].double())
    want = list(torch.autograd.grad(y, exact, gradient_of_y(a).double()))
    for i, rank in enumerate(a["ranks"].tolist()):
        want[1][i, rank:], want[2][i, :, rank:] = 0.0, 0.0
    return want
