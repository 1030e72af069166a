"""Taking elements by position and putting them back: x[...], gather, scatter_add, index_select, embedding, put.

Everything rests on two linear maps that are each other's transpose: `getitem` (x[index]) and `scatter` (zeros of a
shape with g added at index), so each is the other's derivative, to any order.
Refuses indices that are out of range or not integers, bools, slices, None or ....
"""

import numpy as np

from autograd.elementwise import cast, pair
from autograd.graph import record, record_view
from autograd.shape import dim_of, dims_of
from autograd.tensor import Tensor, as_tensor, constant


def array_index(index):
    """The index with arrays in place of Tensors; ValueError for a floating index."""
    if isinstance(index, tuple):
        return tuple(array_index(i) for i in index)
    if isinstance(index, Tensor):
        index = index.data
    elif isinstance(index, list):
        index = np.asarray(index, dtype=None if index else np.int64)
    if isinstance(index, float) or (isinstance(index, np.ndarray) and index.dtype.kind == "f"):
        raise ValueError(f"index of dtype {getattr(index, 'dtype', 'float')}: expected integers or bools")
    if isinstance(index, np.integer) or (isinstance(index, np.ndarray) and not index.ndim and index.dtype.kind in "iu"):
        return int(index)  # numpy would take it for one too, and give a view
    return index


def _is_basic(index) -> bool:
    parts = index if type(index) is tuple else (index,)
    return all(type(p) in (int, slice) or p is None or p is Ellipsis for p in parts)


def getitem(a, index):
    """a[index] as in numpy: a view for ints, slices, None and ...; a copy for integer and bool arrays."""
    given, index = index, array_index(index)
    shape = a.data.shape
    try:
        y = a.data[index]
    except IndexError as error:
        raise IndexError(f"index into a tensor of shape {shape}: {error}") from None
    if _is_basic(index):
        if type(y) is not np.ndarray:  # numpy has made a number of the last element; as a view it is
            y = a.data[(*index, ...) if type(index) is tuple else (index, ...)]
        return record_view("getitem", y, a, lambda g: scatter(g, index, shape))
    # the rule holds the index as given, so that a write to a Tensor in it before backward is noticed
    return record("getitem", y, (a,), (lambda g: scatter(g, given, shape),))


def scatter(g, index, shape: tuple[int, ...]) -> Tensor:
    """Zeros of `shape` with g added at index: elements named several times receive the sum."""
    given, index = index, array_index(index)
    y = np.zeros(shape, g.dtype)
    if _is_basic(index):
        y[index] = g.data
    elif isinstance(index, np.ndarray) and index.dtype.kind in "iu" and g.data.size:
        _add_rows(y, index, g.data)
    else:
        np.add.at(y, index, g.data)
    return record("scatter", y, (g,), (lambda h: getitem(h, given),))


def _add_rows(y, index, g):
    """y[index] += g for one integer array: rows sorted by target and summed in runs, far faster than np.add.at."""
    flat = index.reshape(-1)
    flat = np.where(flat < 0, flat + len(y), flat)
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    y[ordered[starts]] = np.add.reduceat(g.reshape(len(flat), *y.shape[1:])[order], starts, axis=0)


def put(a, index, value):
    """A copy of a with a[index] = value: what `x[index] = value` means to the graph. Indices must not repeat."""
    index = array_index(index)
    value = cast(as_tensor(value, like=a), a.dtype)
    y = a.data.copy()
    try:
        y[index] = value.data
    except ValueError:
        raise ValueError(f"setitem: value of shape {value.shape} into a place of shape {y[index].shape}") from None
    mask = np.ones(a.shape, bool)
    mask[index] = False
    return record("setitem", y, (a, value), (lambda g: g.masked_fill(~mask, 0.0), lambda g: getitem(g, index)))


def setitem(a, index, value) -> None:
    """a[index] = value, in place."""
    a._write(
        "setitem",
        value,
        lambda array: a.data.__setitem__(array_index(index), array),
        lambda old, value: put(old, index, value),
    )


def _grid(op, a, dim, index) -> tuple:
    """The index tuple that makes x[tuple] mean torch's gather along dim."""
    held = as_tensor(index)
    index = held.data
    if index.dtype.kind not in "iu":
        raise ValueError(f"{op}: index of dtype {index.dtype}: expected integers")
    if index.ndim != a.ndim:
        raise ValueError(
            f"{op}: index of shape {index.shape} for a tensor of shape {a.shape}: expected {a.ndim} dimensions"
        )
    d = dim_of(op, a, dim)
    if any(n > m for i, (n, m) in enumerate(zip(index.shape, a.shape, strict=True)) if i != d):
        raise ValueError(f"{op}: index of shape {index.shape} is larger than the tensor, {a.shape}, outside dim {d}")
    n = a.shape[d]
    if index.size and not (index.min() >= 0 and index.max() < n):
        raise ValueError(f"{op}: indices from {index.min()} to {index.max()} along a dimension of {n}")
    grid = list(np.ogrid[tuple(slice(n) for n in index.shape)])
    grid[d] = held
    return tuple(grid)


def gather(a, dim: int, index):
    """out[i][j] = a[index[i][j]][j] for dim 0, and likewise for others: as torch.gather."""
    a = as_tensor(a)
    return getitem(a, _grid("gather", a, dim, index))


def scatter_add(a, dim: int, index, src):
    """a with src added at index along dim, as torch.scatter_add; index may be smaller than src."""
    a, src = pair("scatter_add", a, src)
    grid = _grid("scatter_add", a, dim, index)
    shape = as_tensor(index).shape
    if src.ndim != len(shape) or any(n > m for n, m in zip(shape, src.shape, strict=True)):
        raise ValueError(f"scatter_add: index of shape {shape} does not fit in src of shape {src.shape}")
    return a + scatter(src[tuple(slice(n) for n in shape)], grid, a.shape)


def index_select(a, dim: int, index):
    """The slices of a along dim that a 1-D index names."""
    a, index = as_tensor(a), as_tensor(index)
    d = dim_of("index_select", a, dim)
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise ValueError(f"index_select: index of shape {index.shape} {index.dtype}: expected 1-D integers")
    _check_range("index_select", index.data, a.shape[d])
    return a[(*(slice(None),) * d, index)]


def _check_range(op, index, n):
    if index.size and not (index.min() >= 0 and index.max() < n):
        raise ValueError(f"{op}: indices from {index.min()} to {index.max()}: expected 0 to {n - 1}")


def embedding(indices, weight):
    """Rows of weight (V, C) for integer indices of any shape (...): (..., C)."""
    indices, weight = as_tensor(indices), as_tensor(weight)
    if indices.dtype.kind not in "iu":
        raise ValueError(f"embedding: indices of dtype {indices.dtype}: expected integers")
    if weight.ndim != 2:
        raise ValueError(f"embedding: weight of shape {weight.shape}: expected (vocabulary, width)")
    _check_range("embedding", indices.data, len(weight))
    return getitem(weight, indices)


def diagonal(a, dim1: int, dim2: int):
    """The elements with equal index along two dimensions of one size, as a new last dimension."""
    i, j = dims_of("diagonal", a, (dim1, dim2))
    if a.shape[i] != a.shape[j]:
        raise ValueError(f"diagonal: dims {i} and {j} of shape {a.shape} differ in size")
    others = [d for d in range(a.ndim) if d not in (i, j)]
    steps = constant(np.arange(a.shape[i]))
    return a.permute(*others, i, j)[(..., steps, steps)]
