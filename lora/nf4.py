"""NF4, QLoRA's 4 bits a weight, from its definition: quantise and dequantise in plain torch, on the CPU or a GPU.

    q = quantise_nf4(w, double=True)    # packed nibbles, one absmax a block, itself in 8 bits
    w = dequantise_nf4(q)               # float32, in the shape of w

The tensor in row-major order is one line of numbers, cut into blocks of 64 whatever its rows are. A block is divided by
its largest magnitude, and each number becomes the index of the nearest of 16 codes, which are quantiles of the normal
distribution (Dettmers et al., QLoRA, 2023, sections 2 and 3). Bytes are those that bitsandbytes 0.50 makes on CPUs; the
layout is described in cuda/quantised_ops.py, whose kernels read it.

Refused with a ValueError: NaN and infinities, types other than float32, bfloat16 and float16, a block that is no power
of two from 32 to 4096.
"""

from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from statistics import NormalDist
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda.quantised_ops import BLOCKS, DTYPES, NESTED_BLOCK

BLOCK = 64
EXTREME = 0.9677083  # the probability of the largest code, halfway between 1 - 1/32 and 1 - 1/30
SMALLEST = 1e-38  # what a block is divided by at least
GRID = 65535  # steps from -1 to 1 where bitsandbytes looks up the code of an absmax
# Of tables, which are made once: what `with torch.device("meta")` says at that moment must not stay for good.
PLAIN = {"dtype": torch.float32, "device": "cpu"}

Search = Literal["grid", "nearest"]


@dataclass(frozen=True, slots=True, eq=False)
class NF4Tensor:
    """packed: uint8, two numbers a byte, the first in the high half. absmax: float32, one a block of `block` numbers.

    Doubly quantised, absmax is uint8 and means code[absmax] * absmax2[block // 256] + offset.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    block: int = BLOCK
    absmax2: Tensor | None = None
    offset: Tensor | None = None
    code: Tensor | None = None

    def __post_init__(self):
        check_block(self.block)
        numbers, second = prod(self.shape), (self.absmax2, self.offset, self.code)
        sizes = self.packed.numel(), self.absmax.numel()
        if sizes != (ceil(numbers / 2), ceil(numbers / self.block)):
            raise ValueError(
                f"{sizes[0]} bytes with {sizes[1]} absmax: expected {ceil(numbers / 2)} with "
                f"{ceil(numbers / self.block)} for the shape {tuple(self.shape)}"
            )
        if any((x is None) == (self.absmax.dtype == torch.uint8) for x in second):
            raise ValueError(f"absmax is {self.absmax.dtype}: expected absmax2, offset and code beside uint8 alone")


# ---- tables ----------------------------------------------------------------------------------------------------------


@cache
def nf4_codes() -> Tensor:
    """The 16 codes, float32, on the CPU: 0, seven quantiles below it and eight above, divided by the largest.

    Probabilities go in equal steps of float32 from EXTREME to a half, as the authors computed them.
    """
    above, below = (
        [NormalDist().inv_cdf(p) for p in torch.linspace(EXTREME, 0.5, steps + 1, **PLAIN)[:-1].tolist()]
        for steps in (8, 7)
    )
    codes = torch.tensor(sorted([*above, 0.0, *(-quantile for quantile in below)]), **PLAIN)
    return codes / codes[-1]


@cache
def dynamic_codes(signed: bool = True) -> Tensor:
    """The 256 codes of an 8-bit number of dynamic exponent, float32, on the CPU (Dettmers, 2015).

    Zeros after the sign count powers of ten; the one that ends them is followed by the bits of a fraction, which are
    the fewer the more zeros there are: 2**i equal parts of (0.1, 1) times 10**(i - 6), i from 0 to 6, of which a code
    is the middle. Besides these 254 there are 0 and 1. Unsigned, the bit of the sign goes to the fraction: twice the
    parts.
    """
    codes = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i * (1 if signed else 2) + 1, **PLAIN)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6)).tolist()
        codes += [*middles, *(-middle for middle in middles if signed)]
    return torch.tensor(sorted(codes), **PLAIN)


def nearest(x: Tensor, codes: Tensor) -> Tensor:
    """Indices of the codes, ascending, that x is nearest to; halfway between two it is the lower."""
    codes = codes.to(x.device)
    return torch.bucketize(x, (codes[:-1] + codes[1:]) / 2, out_int32=True).to(torch.uint8)


@cache
def _codes_of_grid() -> Tensor:
    points = (torch.arange(GRID + 1, dtype=torch.float64, device="cpu") * 2 / GRID - 1).float()
    return nearest(points, dynamic_codes())


def nearest_on_grid(x: Tensor) -> Tensor:
    """Indices into dynamic_codes() for x in [-1, 1], by way of the nearest of 65,536 equidistant points.

    So bitsandbytes does it on CPUs: one look-up, at most 2**-16 off before the code is chosen. Rounded as there, twice.
    """
    point = (((x + 1) * 0.5).double() * GRID + 0.5).float().long()
    return _codes_of_grid().to(x.device)[point]


# ---- quantise --------------------------------------------------------------------------------------------------------


def check_block(block: int) -> None:
    if block not in BLOCKS:
        raise ValueError(f"block {block}: expected one of {', '.join(map(str, BLOCKS))}")


def check_weight(name: str, w: Tensor) -> None:
    """Raises ValueError, naming the tensor, unless its numbers are finite and of a type that is quantised."""
    if w.dtype not in DTYPES:
        raise ValueError(f"{name} is {w.dtype}: expected one of {', '.join(map(str, DTYPES))}")
    if not w.isfinite().all():
        wrong = (~w.isfinite()).nonzero()
        raise ValueError(
            f"{name} has {len(wrong)} numbers that are NaN or infinite, the first at {wrong[0].tolist()}: "
            "expected finite weights"
        )


@torch.no_grad()
def quantise_nf4(
    w: Tensor, block: int = BLOCK, *, double: bool = False, search: Search = "grid", name: str = "weight"
) -> NF4Tensor:
    """Of a tensor (any shape); `double` quantises the absmax too, with a look-up as bitsandbytes does it on CPUs
    ("grid") or exactly ("nearest"). `name` is for messages."""
    check_block(block)
    if search not in get_args(Search):
        raise ValueError(f"search {search!r}: expected one of {', '.join(get_args(Search))}")
    check_weight(name, w)
    line = w.reshape(-1).float()
    absmax, scaled = _scale(line, block)
    numbers = nearest(F.pad(scaled, (0, len(line) % 2)), nf4_codes())  # a pad of 0 is the nibble 7
    packed = numbers[::2] << 4 | numbers[1::2]
    if not double:
        return NF4Tensor(packed, absmax, tuple(w.shape), block)
    codes, second = quantise_absmax(absmax, search)
    return NF4Tensor(packed, codes, tuple(w.shape), block, **second)


def _blocks(line: Tensor, block: int) -> Tensor:
    """(blocks, block), the last one filled up with zeros."""
    return F.pad(line, (0, -len(line) % block)).view(ceil(len(line) / block), block)


def _scale(line: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """absmax (blocks,), and the line in [-1, 1]: whole blocks times a reciprocal, the one cut short divided, for these
    round differently."""
    blocks = _blocks(line, block)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, None]
    if len(line) % block:
        absmax[-1].clamp_(min=SMALLEST)
        scaled[-1] = blocks[-1] / absmax[-1]
    return absmax, scaled.clamp(-1, 1).view(-1)[: len(line)]


def quantise_absmax(absmax: Tensor, search: Search = "grid") -> tuple[Tensor, dict[str, Tensor]]:
    """Codes (blocks,), and what undoes it: {"absmax2", "offset", "code"}. What is quantised is the distance to the
    mean, in blocks of 256."""
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    blocks = _blocks(absmax - offset, NESTED_BLOCK)
    absmax2 = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax2)[:, None]).clamp(-1, 1).nan_to_num(nan=-1.0)  # 0 of nothing but 0: the code 0
    codes = nearest_on_grid(scaled) if search == "grid" else nearest(scaled, dynamic_codes())
    second = {"absmax2": absmax2, "offset": offset, "code": dynamic_codes().to(absmax.device, copy=True)}
    return codes.view(-1)[: len(absmax)].clone(), second  # a view would keep the padding in memory


# ---- dequantise ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dequantise_nf4(q: NF4Tensor, dtype: torch.dtype = torch.float32, *, table: Tensor | None = None) -> Tensor:
    """The tensor, in its shape: products in float32, rounded to `dtype`. Bit for bit what cuda.ops makes.

    `table` is nf4_codes() where there is a copy on the tensor's device already.
    """
    table = nf4_codes().to(q.packed.device) if table is None else table
    # A byte is two codes: one look-up of 8 bytes for both is many times faster than two.
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1).view(torch.int64).view(-1)
    numbers = prod(q.shape)
    line = pairs.index_select(0, q.packed.view(-1).int()).view(torch.float32)[:numbers]
    whole, scales = numbers // q.block, _whole_absmax(q)
    line[: whole * q.block].view(-1, q.block).mul_(scales[:whole, None])
    line[whole * q.block :].mul_(scales[whole:])  # of the last block, where it is shorter
    return line.to(dtype).view(q.shape)


def _whole_absmax(q: NF4Tensor) -> Tensor:
    if q.absmax2 is None:
        return q.absmax
    scales = q.absmax2.repeat_interleave(NESTED_BLOCK)[: len(q.absmax)]
    return q.code[q.absmax.int()] * scales + q.offset
