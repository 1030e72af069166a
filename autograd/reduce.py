"""Operations that combine the elements along dimensions: sums, moments, products, extrema, logsumexp, softmax, cumsum.

`dim` is None (all dimensions), an int or a tuple, negative from the end; `keepdim` keeps reduced dimensions as 1.
Refuses a dimension out of range or named twice, and the extremum of nothing.
"""

import math
from typing import NamedTuple

import numpy as np

from autograd.elementwise import cast, floating, where
from autograd.graph import record
from autograd.indexing import gather
from autograd.shape import cat, dim_of, dims_of
from autograd.tensor import Tensor, as_tensor, constant


def _kept(shape, dims):
    """The shape with the reduced dimensions as 1: what a reduced gradient must have to broadcast back."""
    return tuple(1 if i in dims else n for i, n in enumerate(shape))


def sum(a, dim=None, keepdim: bool = False):
    a = as_tensor(a)
    dims = dims_of("sum", a, dim)
    shape = a.data.shape
    kept = _kept(shape, dims)
    dtype = None if a.data.dtype.kind == "f" else np.int64
    y = a.data.sum(dims, keepdims=keepdim, dtype=dtype)
    return record("sum", y, (a,), (lambda g: g.reshape(kept).expand(shape),))


def mean(a, dim=None, keepdim: bool = False):
    a = floating(a)
    dims = dims_of("mean", a, dim)
    return sum(a, dims, keepdim) * (1 / element_count(a.shape, dims))


def element_count(shape, dims) -> float:
    """How many elements the dimensions hold together; NaN for none, so that the mean of nothing is NaN, as in torch."""
    n = 1
    for d in dims:
        n *= shape[d]
    return n or float("nan")


def var(a, dim=None, correction: int = 1, keepdim: bool = False):
    """The variance with divisor n - correction (1: unbiased); a divisor below 0 is taken as 0, as in torch."""
    a = floating(a)
    dims = dims_of("var", a, dim)
    centred = a - mean(a, dims, keepdim=True)
    divisor = element_count(a.shape, dims) - correction
    return sum(centred * centred, dims, keepdim) * (1 / divisor if divisor > 0 else math.inf)


def std(a, dim=None, correction: int = 1, keepdim: bool = False):
    """The square root of `var`; where that is 0 the derivative is 0, as in torch."""
    variance = var(a, dim, correction, keepdim)
    flat = variance.data == 0
    return where(flat, 0.0, where(flat, 1.0, variance).sqrt())


def prod(a, dim=None, keepdim: bool = False):
    """The product, by multiplying neighbours until one is left: every derivative is then right with zeros among the
    factors too, where dividing the product by a factor fails."""
    a = as_tensor(a)
    a = a if a.is_floating_point() else cast(a, np.int64)
    dims = dims_of("prod", a, dim)
    others = tuple(i for i in range(a.ndim) if i not in dims)
    x = a.permute(*others, *dims)
    x = x.reshape(*x.shape[: len(others)], math.prod(x.shape[len(others) :]))
    if x.shape[-1] == 0:
        x = cat([x, constant(np.ones((*x.shape[:-1], 1), a.dtype))], -1)
    while (n := x.shape[-1]) > 1:
        pairs = x[..., 0 : n - n % 2 : 2] * x[..., 1::2]
        x = cat([pairs, x[..., -1:]], -1) if n % 2 else pairs
    return x.reshape(_kept(a.shape, dims)) if keepdim else x[..., 0]


# -- extrema --
class Extremum(NamedTuple):
    values: Tensor
    indices: Tensor


def _check_not_empty(op, a, dims):
    if 0 in [a.shape[d] for d in dims]:  # (any and all are operations of this module)
        raise ValueError(f"{op} of a tensor of shape {a.shape} over dims {dims}: expected at least one element")


def _spread_extremum(op, function, a, dim, keepdim):
    """The gradient is shared evenly among equal extrema, as in torch."""
    a = as_tensor(a)
    dims = dims_of(op, a, dim)
    _check_not_empty(op, a, dims)
    kept = _kept(a.shape, dims)
    y = constant(function(a.data, dims, keepdims=keepdim))

    def vjp(g):
        top = y.data.reshape(kept)
        hit = (a.data == top) | (np.isnan(a.data) & np.isnan(top))
        share = hit / hit.sum(dims, keepdims=True)
        return g.reshape(kept) * constant(share.astype(a.data.dtype))

    return record(op, y, (a,), (vjp,))


def amax(a, dim=None, keepdim: bool = False):
    return _spread_extremum("amax", np.max, a, dim, keepdim)


def amin(a, dim=None, keepdim: bool = False):
    return _spread_extremum("amin", np.min, a, dim, keepdim)


def _indexed_extremum(op, values, indices, a, dim, keepdim):
    a = as_tensor(a)
    if dim is None:
        return _spread_extremum(op, values, a, None, False)
    d = dim_of(op, a, dim, scalars=True)
    if d is None:
        return Extremum(a, constant(np.array(0)))
    _check_not_empty(op, a, (d,))
    index = constant(np.expand_dims(indices(a.data, d), d))
    picked = gather(a, d, index)
    return Extremum(picked, index) if keepdim else Extremum(picked.squeeze(d), index.squeeze(d))


def max(a, dim=None, keepdim: bool = False):
    """The maximum of everything, or with a dim (values, indices): the first of equals gets the index and gradient."""
    return _indexed_extremum("max", np.max, np.argmax, a, dim, keepdim)


def min(a, dim=None, keepdim: bool = False):
    """As `max`, for the minimum."""
    return _indexed_extremum("min", np.min, np.argmin, a, dim, keepdim)


def _position(op, function, a, dim, keepdim):
    a = as_tensor(a)
    d = None if dim is None else dim_of(op, a, dim, scalars=True)
    _check_not_empty(op, a, range(a.ndim) if d is None else (d,))
    return constant(function(a.data, axis=d, keepdims=keepdim))


def argmax(a, dim=None, keepdim: bool = False):
    return _position("argmax", np.argmax, a, dim, keepdim)


def argmin(a, dim=None, keepdim: bool = False):
    return _position("argmin", np.argmin, a, dim, keepdim)


def any(a):
    return constant(as_tensor(a).data.any())


def all(a):
    return constant(as_tensor(a).data.all())


# -- exponential families --
def logsumexp(a, dim, keepdim: bool = False):
    """log(sum(exp(a))), from the maximum so that nothing overflows; -inf for a row of -inf."""
    a = floating(a)
    dims = dims_of("logsumexp", a, dim)
    kept = _kept(a.shape, dims)
    top = a.data.max(dims, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0).astype(a.dtype)
    with np.errstate(divide="ignore"):
        y = np.log(np.exp(a.data - top).sum(dims, keepdims=True)) + top
    y = constant(y if keepdim else y.reshape(tuple(n for i, n in enumerate(a.shape) if i not in dims)))

    def vjp(g):
        total = where(np.isneginf(y.data), 0.0, y).reshape(kept)
        return g.reshape(kept) * (a - total).exp()

    return record("logsumexp", y, (a,), (vjp,))


def softmax_array(x: np.ndarray, axis=-1) -> np.ndarray:
    """Softmax of an array, in one new array."""
    y = np.asarray(x - x.max(axis, keepdims=True, initial=-np.inf))
    np.exp(y, out=y)
    y /= y.sum(axis, keepdims=True)
    return y


def softmax(a, dim: int):
    a = floating(a)
    d = dim_of("softmax", a, dim, scalars=True)
    with np.errstate(invalid="ignore"):
        y = constant(softmax_array(a.data, d))
    return record("softmax", y, (a,), (lambda g: y * (g - sum(g * y, d, keepdim=True)),))


def log_softmax(a, dim: int):
    a = floating(a)
    d = dim_of("log_softmax", a, dim, scalars=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        y = a.data - a.data.max(d, keepdims=True, initial=-np.inf)
        y -= np.log(np.exp(y).sum(d, keepdims=True))
    y = constant(y)
    return record("log_softmax", y, (a,), (lambda g: g - y.exp() * sum(g, d, keepdim=True),))


def cumsum(a, dim: int):
    a = as_tensor(a)
    d = dim_of("cumsum", a, dim, scalars=True)
    if d is None:
        return a.clone()
    dtype = None if a.is_floating_point() else np.int64
    return record("cumsum", a.data.cumsum(d, dtype=dtype), (a,), (lambda g: cumsum(g.flip(d), d).flip(d),))
