"""Weights in 8 and 4 bits by rounding to the nearest of equidistant numbers, in plain torch, on the CPU or a GPU.

    q = quantise_int8(w)                              # one scale a row, numbers from -127 to 127
    q = quantise_int4(w, group=128)                   # one scale a group of a row, numbers from 0 to 15 around 8
    q = quantise_int4(w, group=128, asymmetric=True)  # and one zero a group
    w = dequantise_int4(q)

The layouts are those of cuda/quantised_ops.py, whose kernels read them: each row for itself, the first of two nibbles
in the high half, the last nibble of an odd row 0. Nothing but the weights is looked at: no calibration, no search.

Refused with a ValueError: NaN and infinities, types other than float32, bfloat16 and float16, other than two
dimensions, a group other than 32, 64 or 128, scales that the type asked for cannot hold.
"""

from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda.quantised_ops import DTYPES, GROUPS
from lora.nf4 import check_weight

GROUP = 128
CENTRE = 8  # the zero of groups that have none


@dataclass(frozen=True, slots=True, eq=False)
class Int8Matrix:
    """packed: int8 (out, in); scales: float32 (out,). A weight is number * scale."""

    packed: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Int4Matrix:
    """packed: uint8 (out, ceil(in / 2)); scales (out, ceil(in / group)); zeros: uint8 in their shape, or None, which
    means 8. A weight is (nibble - zero) * scale."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: int
    group: int = GROUP

    def __post_init__(self):
        check_group(self.group)
        rows, columns = len(self.packed), self.columns
        expected = (rows, ceil(columns / 2)), (rows, ceil(columns / self.group))
        if (tuple(self.packed.shape), tuple(self.scales.shape)) != expected:
            raise ValueError(
                f"packed {tuple(self.packed.shape)} with scales {tuple(self.scales.shape)}: expected {expected[0]} "
                f"with {expected[1]} for rows of {columns} in groups of {self.group}"
            )


def check_group(group: int) -> None:
    if group not in GROUPS:
        raise ValueError(f"group {group}: expected one of {', '.join(map(str, GROUPS))}")


def check_matrix(name: str, w: Tensor) -> None:
    """Raises ValueError, naming the tensor, unless it is a matrix of finite numbers."""
    if w.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(w.shape)}: expected two dimensions, (out, in)")
    check_weight(name, w)


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantise_int8(w: Tensor, *, name: str = "weight") -> Int8Matrix:
    """Of a matrix (out, in): a row's largest magnitude is 127. Bytes are those of bitsandbytes' LLM.int8() without
    outliers."""
    check_matrix(name, w)
    w = w.float().contiguous()
    absmax = w.abs().amax(1) if w.shape[1] else w.new_zeros(len(w))
    numbers = (w * (127.0 / absmax)[:, None]).nan_to_num(nan=0.0).round().clamp(-127, 127)  # 0 * inf in rows of 0
    return Int8Matrix(numbers.to(torch.int8), absmax / 127)


@torch.no_grad()
def dequantise_int8(q: Int8Matrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix (out, in): products in float32, rounded to `dtype`."""
    return (q.packed.float() * q.scales.float()[:, None]).to(dtype)


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantise_int4(
    w: Tensor,
    group: int = GROUP,
    *,
    asymmetric: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "weight",
) -> Int4Matrix:
    """Of a matrix (out, in); a row's last group may be shorter. No weight is further off than half a scale.

    Symmetric: the largest magnitude is 7.5 scales and numbers are -8 .. 7 scales, so that either end is half a scale
    off at most. Asymmetric: 15 scales reach from the least weight to the greatest, or to 0 where that lies outside; 0
    stays 0.
    """
    check_group(group)
    check_matrix(name, w)
    (rows, columns), groups = w.shape, ceil(w.shape[1] / group)
    grouped = F.pad(w.float(), (0, groups * group - columns)).reshape(rows, groups, group)
    scales, zeros = _scales(grouped, asymmetric, scale_dtype, name)
    numbers = ((grouped / _divisor(scales)[:, :, None]).round() + zeros[:, :, None]).clamp(0, 15)
    packed = _pack(numbers.view(rows, groups * group)[:, :columns].to(torch.uint8))
    return Int4Matrix(packed, scales, zeros.to(torch.uint8) if asymmetric else None, columns, group)


def _scales(grouped: Tensor, asymmetric: bool, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
    """scales in `dtype` and zeros in float32, (out, groups); the zeros fit the scales as they are rounded."""
    if dtype not in DTYPES:
        raise ValueError(f"scale_dtype {dtype}: expected one of {', '.join(map(str, DTYPES))}")
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    wide = high / 15 - low / 15 if asymmetric else torch.maximum(high, -low) / 7.5
    scales = wide.to(dtype)
    if not scales.isfinite().all():
        raise ValueError(f"{name} needs a scale of {wide.max().item():.4g}: expected one that {dtype} can hold")
    zeros = (-low / _divisor(scales)).round().clamp(0, 15) if asymmetric else torch.full_like(wide, CENTRE)
    return scales, zeros


def _divisor(scales: Tensor) -> Tensor:
    """The scales in float32; groups of nothing but 0 are divided by 1."""
    return torch.where(scales == 0, 1.0, scales.float())


def _pack(numbers: Tensor) -> Tensor:
    """(rows, ceil(columns / 2)) bytes of numbers below 16, the first of a pair in the high half."""
    numbers = F.pad(numbers, (0, numbers.shape[1] % 2))
    return numbers[:, ::2] << 4 | numbers[:, 1::2]


@torch.no_grad()
def dequantise_int4(q: Int4Matrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix (out, in): differences and products in float32, rounded to `dtype`, as cuda.ops makes it."""
    nibbles = torch.stack([q.packed >> 4, q.packed & 15], 2).view(len(q.packed), 2 * q.packed.shape[1])
    scales, zeros = (
        None if x is None else x.float().repeat_interleave(q.group, 1)[:, : q.columns] for x in (q.scales, q.zeros)
    )
    return ((nibbles[:, : q.columns].float() - (CENTRE if zeros is None else zeros)) * scales).to(dtype)
