"""Products with a matrix of 4 or 8 bits, for torch tensors; differentiable in x and bias, and known to torch.compile.

    w = dequantize_nf4(packed, absmax, (out, in), torch.bfloat16)
    y = nf4_matmul(x, packed, absmax, (out, in), bias=bias)        # x @ w.T + bias, and w is never written out
    w = dequantize_int4(packed, scales, zeros, (out, in), torch.bfloat16, group=128)
    y = int4_matmul(x, packed, scales, zeros, group=128)
    w = dequantize_int8(packed, scales, torch.bfloat16)
    y = int8_matmul(x, packed, scales)

The weight W (out, in) is frozen: no gradient goes into it. Sums are float32. Up to 8 rows of x are multiplied as
vectors with weights in float32; more on tensor cores with weights rounded to x's type. The kernels are in Triton alone.

NF4 (of QLoRA, as bitsandbytes packs it): the matrix in row-major order is one long line of numbers, cut into blocks of
`block`, whatever its rows are. packed: uint8, ceil(out * in / 2) of them in any shape; the first number of a pair is
the HIGH nibble, the nibble an index into NF4. absmax: one number a block that all of the block is multiplied with,
float32 (blocks,); or doubly quantised, uint8 (blocks,), which means code[absmax] * absmax2[block // 256] + offset, with
code (256,), absmax2 (ceil(blocks / 256),) and offset (one number), all float32.
int4: each row for itself. packed: uint8 (out, ceil(in / 2)), the first of a pair is the high nibble; scales
(out, ceil(in / group)), zeros None or in the shape of scales, of its type or uint8: (nibble - zero) * scale; no zeros
mean a zero of 8.
int8: packed: int8 (out, in), scales (out,): number * scale.

Refused with a ValueError: other types and shapes, tensors on two devices, a packed matrix or scales that are not
contiguous, a block or group that is no power of two or out of range, scales that require a gradient.
"""

from collections.abc import Sequence
from functools import cache
from math import ceil

import torch
from torch import Tensor

from cuda.device import DTYPES, place

# Quantiles of the normal distribution, divided by the largest; eight above 0, seven below, and 0 itself.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NESTED_BLOCK = 256  # blocks that share a number of absmax2
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUPS = (32, 64, 128)


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    block: int = 64,
    absmax2: Tensor | None = None,
    offset: Tensor | None = None,
    code: Tensor | None = None,
) -> Tensor:
    """The matrix, of shape (out, in): products in float32, rounded to `dtype`; bit for bit what bitsandbytes makes."""
    rows, columns = _matrix("shape", shape)
    return _dequantise(packed, absmax, None, absmax2, offset, code, "nf4", rows, columns, block, dtype)


def nf4_matmul(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    *,
    block: int = 64,
    absmax2: Tensor | None = None,
    offset: Tensor | None = None,
    code: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x (.., in) @ W.T + bias (out,), in the type of x."""
    rows, columns = _matrix("shape", shape)
    return _multiply(x, packed, absmax, None, absmax2, offset, code, bias, "nf4", rows, columns, block)


def dequantize_int4(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    group: int = 128,
) -> Tensor:
    """The matrix, of shape (out, in)."""
    rows, columns = _matrix("shape", shape)
    return _dequantise(packed, scales, zeros, None, None, None, "int4", rows, columns, group, dtype)


def int4_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group: int = 128,
    bias: Tensor | None = None,
) -> Tensor:
    """x (.., in) @ W.T + bias (out,), in the type of x."""
    (rows, _), columns = _matrix("packed", packed.shape), x.shape[-1] if x.ndim else 0
    return _multiply(x, packed, scales, zeros, None, None, None, bias, "int4", rows, columns, group)


def dequantize_int8(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix, in the shape of packed."""
    rows, columns = _matrix("packed", packed.shape)
    return _dequantise(packed, scales, None, None, None, None, "int8", rows, columns, ROW, dtype)


def int8_matmul(x: Tensor, packed: Tensor, scales: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """x (.., in) @ W.T + bias (out,), in the type of x."""
    rows, columns = _matrix("packed", packed.shape)
    return _multiply(x, packed, scales, None, None, None, None, bias, "int8", rows, columns, ROW)


ROW = 1 << 30  # the block of int8: however long a row is, it has one scale


# ---- checks ----------------------------------------------------------------------------------------------------------


def _matrix(name: str, shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"{name} {tuple(shape)}: expected two dimensions, (out, in)")
    return int(shape[0]), int(shape[1])


def _check_tensor(name: str, x: Tensor | None, types: Sequence[torch.dtype], shape: Sequence[int], like: Tensor):
    if x is None:
        raise ValueError(f"{name} is None: expected a tensor, absmax of torch.uint8 wants absmax2, offset and code")
    if x.device != like.device or x.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} is on {x.device}, packed on {like.device}: expected one, the CPU or a CUDA device")
    if x.dtype not in types:
        raise ValueError(f"{name} is {x.dtype}: expected {' or '.join(map(str, types))}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {tuple(shape)}")
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}: expected a contiguous tensor, call .contiguous()")
    if x.requires_grad:
        raise ValueError(f"{name} requires a gradient: expected a constant, call .detach()")


def _check_weight(packed, scale, zero, scale2, offset, code, format: str, rows: int, columns: int, block: int) -> None:
    name, sizes = {"nf4": ("block", BLOCKS), "int4": ("group", GROUPS), "int8": ("block", (ROW,))}[format]
    if block not in sizes:
        raise ValueError(f"{name} {block}: expected one of {', '.join(map(str, sizes))}")
    if format == "nf4":
        _check_nf4(packed, scale, scale2, offset, code, rows, columns, block)
    elif format == "int4":
        _check_tensor("packed", packed, [torch.uint8], (rows, ceil(columns / 2)), packed)
        _check_tensor("scales", scale, DTYPES, (rows, ceil(columns / block)), packed)
        if zero is not None:
            _check_tensor("zeros", zero, [scale.dtype, torch.uint8], scale.shape, packed)
    else:
        _check_tensor("packed", packed, [torch.int8], (rows, columns), packed)
        _check_tensor("scales", scale, DTYPES, (rows,), packed)


def _check_nf4(packed, absmax, absmax2, offset, code, rows: int, columns: int, block: int) -> None:
    blocks, size = ceil(rows * columns / block), ceil(rows * columns / 2)
    if packed.numel() != size:
        raise ValueError(f"packed has shape {tuple(packed.shape)}: expected {size} bytes for ({rows}, {columns})")
    _check_tensor("packed", packed, [torch.uint8], packed.shape, packed)
    _check_tensor("absmax", absmax, [torch.float32, torch.uint8], (blocks,), packed)
    if absmax.dtype == torch.uint8:
        _check_tensor("absmax2", absmax2, [torch.float32], (ceil(blocks / NESTED_BLOCK),), packed)
        _check_tensor("offset", offset, [torch.float32], (1,) if offset is not None and offset.ndim else (), packed)
        _check_tensor("code", code, [torch.float32], (256,), packed)
    elif not (absmax2 is offset is code is None):
        raise ValueError("absmax is torch.float32: expected torch.uint8 beside absmax2, offset or code")


def _check_operand(name: str, x: Tensor, packed: Tensor, width: int) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}: expected one of {DTYPES}; call .to()")
    if x.device != packed.device:
        raise ValueError(f"{name} is on {x.device}, packed on {packed.device}: expected one device, call .to()")
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (.., {width})")


def _check_product(x, packed, bias, rows: int, columns: int) -> None:
    _check_operand("x", x, packed, columns)
    if bias is not None:
        _check_operand("bias", bias, packed, rows)
        if bias.ndim != 1 or bias.dtype != x.dtype:
            raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}: expected {x.dtype}, as x is, and ({rows},)")


@cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor(NF4, device=device)


def _weight(packed, scale, zero, scale2, offset, code, format: str, rows: int, columns: int, block: int) -> dict:
    tensors = {"packed": packed, "scale": scale, "zero": zero, "scale2": scale2, "offset": offset, "code": code}
    table = _table(packed.device) if format == "nf4" else None
    return {**tensors, "table": table, "format": format, "rows": rows, "columns": columns, "block": block}


def _as_rows(x: Tensor) -> Tensor:
    """(m, width), contiguous within rows; a copy where x has no such view."""
    x = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


# ---- operations ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("groundup::dequantise", mutates_args=(), device_types=("cpu", "cuda"))
def _dequantise(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scale2: Tensor | None,
    offset: Tensor | None,
    code: Tensor | None,
    format: str,
    rows: int,
    columns: int,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    w = _empty_weight(packed, scale, zero, scale2, offset, code, format, rows, columns, block, dtype)
    if w.numel():
        weight = _weight(packed, scale, zero, scale2, offset, code, format, rows, columns, block)
        place(packed.device, kernels="triton").run("dequantise", w=w, **weight)
    return w


def _empty_weight(packed, scale, zero, scale2, offset, code, format, rows, columns, block, dtype) -> Tensor:
    _check_weight(packed, scale, zero, scale2, offset, code, format, rows, columns, block)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: expected one of {DTYPES}")
    return packed.new_empty((rows, columns), dtype=dtype)


@_dequantise.register_fake
def _(packed, scale, zero, scale2, offset, code, format, rows, columns, block, dtype):
    return _empty_weight(packed, scale, zero, scale2, offset, code, format, rows, columns, block, dtype)


@torch.library.custom_op("groundup::quantised_multiply", mutates_args=(), device_types=("cpu", "cuda"))
def _multiply(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scale2: Tensor | None,
    offset: Tensor | None,
    code: Tensor | None,
    bias: Tensor | None,
    format: str,
    rows: int,
    columns: int,
    block: int,
) -> Tensor:
    _check_weight(packed, scale, zero, scale2, offset, code, format, rows, columns, block)
    _check_product(x, packed, bias, rows, columns)
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel() and columns == 0:
        return y.zero_() if bias is None else y.copy_(bias.detach().expand_as(y))
    if y.numel():
        weight = _weight(packed, scale, zero, scale2, offset, code, format, rows, columns, block)
        here = place(x.device, kernels="triton")
        bias = None if bias is None else bias.detach().contiguous()
        here.run("quantised_multiply", x=_as_rows(x), y=y.view(-1, rows), bias=bias, **weight)
    return y


@_multiply.register_fake
def _(x, packed, scale, zero, scale2, offset, code, bias, format, rows, columns, block):
    _check_weight(packed, scale, zero, scale2, offset, code, format, rows, columns, block)
    _check_product(x, packed, bias, rows, columns)
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("groundup::quantised_multiply_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _multiply_backward(
    dy: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scale2: Tensor | None,
    offset: Tensor | None,
    code: Tensor | None,
    format: str,
    rows: int,
    columns: int,
    block: int,
) -> Tensor:
    dx = dy.new_empty((*dy.shape[:-1], columns))
    if dx.numel() and rows == 0:
        return dx.zero_()
    if dx.numel():
        weight = _weight(packed, scale, zero, scale2, offset, code, format, rows, columns, block)
        here = place(dy.device, kernels="triton")
        here.run("quantised_multiply_transposed", dy=_as_rows(dy), dx=dx.view(-1, columns), **weight)
    return dx


@_multiply_backward.register_fake
def _(dy, packed, scale, zero, scale2, offset, code, format, rows, columns, block):
    return dy.new_empty((*dy.shape[:-1], columns))


def _save(ctx, inputs, output) -> None:
    _, *weight, _, ctx.format, ctx.rows, ctx.columns, ctx.block = inputs
    ctx.save_for_backward(*weight)


def _gradients(ctx, dy: Tensor):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _multiply_backward(dy, *ctx.saved_tensors, ctx.format, ctx.rows, ctx.columns, ctx.block)
    if ctx.needs_input_grad[7]:
        dbias = dy.reshape(-1, ctx.rows).sum(0, dtype=torch.float32).to(dy.dtype)
    return dx, None, None, None, None, None, None, dbias, None, None, None, None


_multiply.register_autograd(_gradients, setup_context=_save)
