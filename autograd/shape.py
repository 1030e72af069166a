"""Operations that move elements without changing them: reshape, transpose, expand, flip, pad, cat, split, triangles.

Results that numpy can express as a view share memory with their input and its version counter; the others are copies.
Refuses shapes that do not fit, naming them.
"""

import math

import numpy as np

from autograd.elementwise import promoted
from autograd.graph import record, record_view
from autograd.tensor import Tensor, as_tensor


def dims_of(op: str, a: Tensor, dim) -> tuple[int, ...]:
    """dim as a tuple of non-negative ints; ValueError where one is out of range or named twice."""
    if dim is None:
        return tuple(range(a.data.ndim))
    dims = (dim,) if isinstance(dim, int | np.integer) else tuple(dim)
    n = a.data.ndim
    for d in dims:
        if not -n <= d < n and not (n == 0 and d in (0, -1)):
            raise ValueError(f"{op}: dim {d} of a tensor of shape {a.shape}: expected {-n} to {n - 1}")
    if n == 0:
        return ()
    dims = tuple(d % n for d in dims)
    if len(set(dims)) != len(dims):
        raise ValueError(f"{op}: dim {dim} of a tensor of shape {a.shape} names a dimension twice")
    return dims


def dim_of(op: str, a: Tensor, dim, scalars: bool = False) -> int | None:
    """dim, which must be one int, as a non-negative int; for a tensor without dimensions None if `scalars` may be."""
    if not isinstance(dim, int | np.integer):
        raise ValueError(f"{op}: dim {dim!r}: expected one int")
    if not a.data.ndim and not scalars:
        raise ValueError(f"{op} of a tensor without dimensions: expected at least one")
    dims = dims_of(op, a, (dim,))
    return dims[0] if dims else None


def _sizes(shape) -> tuple[int, ...]:
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape


def reshape(a, *shape):
    a = as_tensor(a)
    before = a.data.shape
    try:
        y = a.data.reshape(_sizes(shape))
    except ValueError:
        raise ValueError(f"reshape: shape {before} ({a.numel()} elements) into {_sizes(shape)}") from None
    make = record_view if np.may_share_memory(y, a.data) else _record_copy
    return make("reshape", y, a, lambda g: reshape(g, before))


def _record_copy(op, data, base, vjp):
    return record(op, data, (base,), (vjp,))


def flatten(a, start_dim: int = 0, end_dim: int = -1):
    """One dimension in place of start_dim to end_dim; a tensor without dimensions gets one."""
    a = as_tensor(a)
    if not a.ndim:
        return reshape(a, 1)
    start, end = dim_of("flatten", a, start_dim), dim_of("flatten", a, end_dim)
    if start > end:
        raise ValueError(f"flatten: start_dim {start_dim} lies behind end_dim {end_dim} in shape {a.shape}")
    return reshape(a, (*a.shape[:start], math.prod(a.shape[start : end + 1]), *a.shape[end + 1 :]))


def permute(a, *dims):
    a = as_tensor(a)
    dims = _sizes(dims)
    order = dims_of("permute", a, dims)
    if len(order) != a.ndim:
        raise ValueError(f"permute: dims {dims} of a tensor of shape {a.shape}: expected {a.ndim} dims")
    back = tuple(int(i) for i in np.argsort(order))
    return record_view("permute", a.data.transpose(order), a, lambda g: permute(g, back))


def transpose(a, dim0: int, dim1: int):
    a = as_tensor(a)
    i, j = dim_of("transpose", a, dim0), dim_of("transpose", a, dim1)
    return record_view("transpose", a.data.swapaxes(i, j), a, lambda g: transpose(g, i, j))


def expand(a, *shape):
    """a repeated without a copy; -1 keeps a dimension. The gradient is summed over what was repeated."""
    a = as_tensor(a)
    sizes = _sizes(shape)
    extra = len(sizes) - a.ndim
    full = tuple(a.shape[i - extra] if n == -1 and i >= extra else n for i, n in enumerate(sizes))
    try:
        y = np.broadcast_to(a.data, full)
    except ValueError:
        raise ValueError(f"expand: shape {a.shape} into {sizes}") from None
    return record_view("expand", y, a, lambda g: g)  # the engine sums g to a's shape


def squeeze(a, dim=None):
    """Without its dimensions of size 1 (all, or those of `dim` that are 1)."""
    a = as_tensor(a)
    dims = dims_of("squeeze", a, dim)
    return reshape(a, tuple(n for i, n in enumerate(a.shape) if n != 1 or i not in dims))


def unsqueeze(a, dim: int):
    a = as_tensor(a)
    if not -a.ndim - 1 <= dim <= a.ndim:
        raise ValueError(f"unsqueeze: dim {dim} of a tensor of shape {a.shape}: expected {-a.ndim - 1} to {a.ndim}")
    at = dim % (a.ndim + 1)
    return reshape(a, (*a.shape[:at], 1, *a.shape[at:]))


def flip(a, *dims):
    a = as_tensor(a)
    order = dims_of("flip", a, _sizes(dims))
    return record("flip", np.flip(a.data, order).copy(), (a,), (lambda g: flip(g, order),))


def roll(a, shifts, dims=None):
    """Elements moved along dims, those pushed off the end coming back at the start; dims None rolls the flat tensor."""
    a = as_tensor(a)
    shifts = (shifts,) if isinstance(shifts, int) else tuple(shifts)
    if dims is None:
        if len(shifts) != 1:
            raise ValueError(f"roll: {len(shifts)} shifts without dims: expected one")
        return roll(reshape(a, -1), shifts, (0,)).reshape(a.shape)
    order = dims_of("roll", a, dims)
    if len(shifts) != len(order):
        raise ValueError(f"roll: {len(shifts)} shifts for {len(order)} dims")
    back = tuple(-s for s in shifts)
    return record("roll", np.roll(a.data, shifts, order), (a,), (lambda g: roll(g, back, order),))


def pad(a, pad, mode: str = "constant", value: float = 0.0):
    """Constant padding, as torch.nn.functional.pad: (last dim before, after, second-to-last before, after, ...).
    Negative widths cut."""
    a = as_tensor(a)
    if mode != "constant":
        raise ValueError(f"pad: mode {mode!r}: expected 'constant'")
    if len(pad) % 2 or len(pad) > 2 * a.ndim:
        raise ValueError(f"pad: {tuple(pad)} for a tensor of shape {a.shape}: expected up to {a.ndim} pairs")
    widths = [(0, 0)] * (a.ndim - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    if any(min(before, 0) + n + min(after, 0) < 0 for n, (before, after) in zip(a.shape, widths, strict=True)):
        raise ValueError(f"pad: {tuple(pad)} cuts more than a tensor of shape {a.shape} has")
    cut = tuple(slice(max(-before, 0), n - max(-after, 0)) for n, (before, after) in zip(a.shape, widths, strict=True))
    grown = [(max(before, 0), max(after, 0)) for before, after in widths]
    if not a.ndim:
        return clone(a)
    back = tuple(-p for p in pad)
    y = np.pad(a.data[cut], grown, constant_values=value)
    return record("pad", y, (a,), (lambda g: globals()["pad"](g, back),))


def cat(tensors, dim: int = 0):
    """Joins tensors along a dimension."""
    if not len(tensors):
        raise ValueError("cat: an empty list: expected at least one tensor")
    tensors = promoted(*tensors)
    d = dim_of("cat", tensors[0], dim)
    try:
        y = np.concatenate([t.data for t in tensors], d)
    except ValueError:
        raise ValueError(f"cat along dim {d}: shapes {[t.shape for t in tensors]} do not fit") from None
    ends = np.cumsum([t.shape[d] for t in tensors]).tolist()
    before = (slice(None),) * d

    def part(start, end):
        return lambda g: g[(*before, slice(start, end))]

    return record("cat", y, tensors, tuple(part(s, e) for s, e in zip([0, *ends], ends, strict=False)))


def stack(tensors, dim: int = 0):
    """Joins tensors of one shape along a new dimension."""
    tensors = [as_tensor(t) for t in tensors]
    shapes = {t.shape for t in tensors}
    if len(shapes) != 1:
        raise ValueError(f"stack: shapes {sorted(shapes)}: expected one or more tensors of one shape")
    return cat([unsqueeze(t, dim) for t in tensors], dim)


def split(a, split_size, dim: int = 0) -> tuple[Tensor, ...]:
    """Consecutive parts of `split_size` elements (the last may be smaller), or of the sizes in a list."""
    a = as_tensor(a)
    d = dim_of("split", a, dim)
    n = a.shape[d]
    if isinstance(split_size, int):
        if split_size <= 0:
            raise ValueError(f"split: split_size {split_size}: expected a positive number")
        sizes = [min(split_size, n - start) for start in range(0, n, split_size)] or [0]
    else:
        sizes = list(split_size)
        if sum(sizes) != n or min(sizes, default=0) < 0:
            raise ValueError(f"split: sizes {sizes} of a dimension of {n}: expected them to add up to it")
    ends = np.cumsum(sizes).tolist()
    before = (slice(None),) * d
    return tuple(a[(*before, slice(end - size, end))] for size, end in zip(sizes, ends, strict=True))


def chunk(a, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """At most `chunks` parts of equal size (the last may be smaller)."""
    a = as_tensor(a)
    if chunks <= 0:
        raise ValueError(f"chunk: chunks {chunks}: expected a positive number")
    n = a.shape[dim_of("chunk", a, dim)]
    return split(a, -(-n // chunks) or [0] * chunks, dim)


def _triangle(op, function, a, diagonal):
    a = as_tensor(a)
    if a.ndim < 2:
        raise ValueError(f"{op} of a tensor of shape {a.shape}: expected at least two dimensions")
    return record(op, function(a.data, diagonal), (a,), (lambda g: _triangle(op, function, g, diagonal),))


def tril(a, diagonal: int = 0):
    """The lower triangle of the last two dimensions, up to the given diagonal; zeros above it."""
    return _triangle("tril", np.tril, a, diagonal)


def triu(a, diagonal: int = 0):
    """The upper triangle, as `tril`."""
    return _triangle("triu", np.triu, a, diagonal)


def repeat(a, *repeats):
    """a tiled along each dimension; more repeats than dimensions add dimensions in front."""
    a = as_tensor(a)
    times = _sizes(repeats)
    if len(times) < a.ndim:
        raise ValueError(f"repeat: {times} for a tensor of shape {a.shape}: expected at least {a.ndim} repeats")
    if min(times, default=0) < 0:
        raise ValueError(f"repeat: {times}: expected no negative number")
    shape = (1,) * (len(times) - a.ndim) + a.shape
    tiles = tuple(size for t, n in zip(times, shape, strict=True) for size in (t, n))
    return record(
        "repeat", np.tile(a.data, times), (a,), (lambda g: g.reshape(tiles).sum(tuple(range(0, len(tiles), 2))),)
    )


def clone(a):
    return record("clone", a.data.copy(), (a,), (lambda g: g,))


def contiguous(a):
    return a if a.data.flags.c_contiguous else clone(a)
