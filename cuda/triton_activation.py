"""Activations element by element, forward and backward: swiglu silu(gate) * up, gelu exact and by tanh, relu2.

Bytes: each input read once, each result written once; the backward pass computes the activation again from its inputs.
tanh is written as a sigmoid, as in the CUDA version. Triton compiles a kernel for each `KIND`, a constant: what C++
does with a template. Refused: kinds that are none of these, and as in triton_rows.py.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cuda.triton_compat import jit
from cuda.triton_rows import layout_of, offsets, tile_of

KINDS = ("swiglu", "gelu", "gelu_tanh", "relu2")


def reference(kind, x, up=None):
    if kind == "swiglu":
        return F.silu(x) * up
    return torch.relu(x) ** 2 if kind == "relu2" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


@jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) and its derivative, by exp(-|x|): no overflow, and no 1 - s loses what is left beside 1."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * r, r), e * r * r


@jit
def _inside_tanh(x):
    """2u and its derivative, for u = sqrt(2 / pi) * (x + 0.044715 x^3): (1 + tanh(u)) / 2 is the sigmoid of 2u."""
    square = x * x
    return 1.5957691216057308 * x * (1.0 + 0.044715 * square), 1.5957691216057308 * (1.0 + 3 * 0.044715 * square)


@jit
def _forward_of(x, up, KIND: tl.constexpr):
    if KIND == "swiglu":
        return x * _sigmoid(x)[0] * up
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.70710678118654752))
    elif KIND == "gelu_tanh":
        return x * _sigmoid(_inside_tanh(x)[0])[0]
    else:
        return tl.where(x <= 0, 0.0, x * x)  # this comparison lets NaN through


@jit
def _backward_of(x, up, d_y, KIND: tl.constexpr):
    """Gradients of x and of up."""
    if KIND == "swiglu":
        value, slope = _sigmoid(x)
        return d_y * up * (value + x * slope), d_y * x * value
    elif KIND == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.70710678118654752))
        density = 0.39894228040143268 * tl.exp(-0.5 * x * x)
        return d_y * (below + x * density), d_y
    elif KIND == "gelu_tanh":
        inside, steepness = _inside_tanh(x)
        value, slope = _sigmoid(inside)
        return d_y * (value + x * slope * steepness), d_y
    else:
        return tl.where(x <= 0, 0.0, 2.0 * x * d_y), d_y


@jit
def _load(p, at, mask):
    return tl.load(p + at, mask, other=0.0).to(tl.float32)


@jit
def _store(p, at, value, mask):
    tl.store(p + at, value.to(p.dtype.element_ty), mask)


@jit
def _apply(x, up, d_y, to, d_up, at, mask, KIND: tl.constexpr):
    """Forward where there is no d_y. `at`: offsets in these five."""
    first, second = _load(x, at[0], mask), None
    if up is not None:
        second = _load(up, at[1], mask)
    if d_y is None:
        _store(to, at[3], _forward_of(first, second, KIND), mask)
    else:
        d_first, d_second = _backward_of(first, second, _load(d_y, at[2], mask), KIND)
        _store(to, at[3], d_first, mask)
        if d_up is not None:
            _store(d_up, at[4], d_second, mask)


@jit
def _rows(
    x, up, d_y, to, d_up, sizes, strides, rows, width, strips,
    KIND: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    width = width * UNIT
    row = tl.program_id(0) // strips * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < rows)[:, None] & (column < width)
    at = (
        offsets(row, sizes, strides[0], UNIT)[:, None] + column,
        offsets(row, sizes, strides[1], UNIT)[:, None] + column,
        offsets(row, sizes, strides[2], UNIT)[:, None] + column,
        offsets(row, sizes, strides[3], UNIT)[:, None] + column,
        offsets(row, sizes, strides[4], UNIT)[:, None] + column,
    )
    _apply(x, up, d_y, to, d_up, at, mask, KIND)


@jit
def _line(x, up, d_y, to, d_up, count, KIND: tl.constexpr, COLUMNS: tl.constexpr):
    """One long row."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    _apply(x, up, d_y, to, d_up, (column, column, column, column, column), column < count, KIND)


def _run(kind: str, x, up, d_y, to, d_up) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    given = {"x": x, "up": up, "d_y": d_y, "to": to, "d_up": d_up}
    if x.ndim == 1:
        return _run_line(kind, list(given.values()))
    layout = layout_of(given)
    tile = tile_of(layout, x.element_size(), 1 + (up is not None) + (d_y is not None), widest=4096)
    strips = triton.cdiv(x.shape[-1], tile.columns)
    _rows[(tile.groups(layout.rows) * strips,)](
        *given.values(), layout.sizes, tuple(layout.strides.values()), layout.rows, layout.width, strips,
        kind, layout.unit, tile.rows, tile.columns, num_warps=tile.warps,
    )  # fmt: skip


def _run_line(kind: str, given: list[Tensor | None]) -> None:
    """One long row. What is beyond a multiple of 16 elements goes by itself: its length would take from the compiler
    the proof that accesses of 16 bytes end where the row does."""
    count, columns = given[0].shape[0], 8192 // given[0].element_size()
    whole = count // 16 * 16
    if whole > 0:  # 32 bytes of each tensor for a thread
        _line[(triton.cdiv(whole, columns),)](*given, whole, kind, columns, num_warps=8)
    if whole < count:
        end = [None if x is None else x[whole:] for x in given]
        _line[(1,)](*end, count - whole, kind, 16, num_warps=1)


def activation_forward(place, *, kind, y, x=None, gate=None, up=None) -> None:
    _run(kind, gate if kind == "swiglu" else x, up, None, y, None)


def activation_backward(place, *, kind, d_y, x=None, gate=None, up=None, d_x=None, d_gate=None, d_up=None) -> None:
    if kind == "swiglu":
        _run(kind, gate, up, d_y, d_gate, d_up)
    else:
        _run(kind, x, None, d_y, d_x, None)
