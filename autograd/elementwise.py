"""Operations that act on each element alone: arithmetic, powers, exponentials, trigonometry, activations, comparison.

Two operands broadcast as in numpy, and the engine sums their gradients back to their shapes. Where a function has a
kink (abs and relu at 0, clamp at its bounds, equal operands of maximum) the derivative is the one torch takes.
Refuses shapes that do not broadcast, naming both and the operation.
"""

import math
import operator

import numpy as np

from autograd.graph import record
from autograd.tensor import DTYPES, Tensor, as_tensor, constant, default_dtype


def cast(a: Tensor, dtype) -> Tensor:
    """a in another dtype; a gradient comes back in a's own."""
    dtype = np.dtype(dtype)
    if dtype == a.data.dtype:
        return a
    if dtype not in DTYPES:
        raise ValueError(f"cast to {dtype}: expected float32, float64, an integer type or bool")
    if dtype.kind != "f" or a.data.dtype.kind != "f":
        return Tensor(a.data.astype(dtype))
    before = a.data.dtype
    return record("cast", a.data.astype(dtype), (a,), (lambda g: cast(g, before),))


_RANK = {"b": 0, "u": 1, "i": 1, "f": 2}


def common_dtype(*tensors) -> np.dtype:
    """The dtype of a result, as torch promotes: of the operands of the highest kind (bool < integer < floating) the
    widest dtype, where an operand without dimensions does not widen one that has some."""
    top = max(_RANK[t.data.dtype.kind] for t in tensors)
    of_top = [t.data for t in tensors if _RANK[t.data.dtype.kind] == top]
    return np.result_type(*(x.dtype for x in [x for x in of_top if x.ndim] or of_top))


def pair(op: str, a, b) -> tuple[Tensor, Tensor]:
    """Both operands as Tensors of their common dtype; a Python number follows the other operand."""
    if not isinstance(a, Tensor):
        a = as_tensor(a, like=b if isinstance(b, Tensor) else None)
    if not isinstance(b, Tensor):
        b = as_tensor(b, like=a)
    da, db = a.data.dtype, b.data.dtype
    if da is not db and da != db:
        dtype = common_dtype(a, b)
        a, b = cast(a, dtype), cast(b, dtype)
    return a, b


def promoted(*tensors) -> tuple:
    """The operands as Tensors of their common dtype; None stays None."""
    tensors = tuple(t if t is None else as_tensor(t) for t in tensors)
    given = [t for t in tensors if t is not None]
    if all(t.data.dtype == given[0].data.dtype for t in given):
        return tensors
    dtype = common_dtype(*given)
    return tuple(t if t is None else cast(t, dtype) for t in tensors)


def floating(a) -> Tensor:
    """a as a floating Tensor: integers and bools become float32."""
    a = as_tensor(a)
    return a if a.data.dtype.kind == "f" else cast(a, default_dtype)


def _apply(op, function, a, b):
    try:
        return function(a.data, b.data)
    except ValueError:
        raise ValueError(f"{op}: shapes {a.shape} and {b.shape} do not broadcast") from None


@np.errstate(all="ignore")
def quiet(function, *arrays):
    """NaN and inf are values here, as in torch (`detect_anomaly` finds them); numpy's warnings would say it twice."""
    return function(*arrays)


# -- arithmetic --
def add(a, b):
    a, b = pair("add", a, b)
    return record("add", _apply("add", np.add, a, b), (a, b), (lambda g: g, lambda g: g))


def sub(a, b):
    a, b = pair("sub", a, b)
    return record("sub", _apply("sub", np.subtract, a, b), (a, b), (lambda g: g, lambda g: -g))


def mul(a, b):
    a, b = pair("mul", a, b)
    return record("mul", _apply("mul", np.multiply, a, b), (a, b), (lambda g: g * b, lambda g: g * a))


def div(a, b):
    a, b = pair("div", a, b)
    if a.dtype.kind != "f":
        a, b = floating(a), floating(b)
    return record("div", quiet(_apply, "div", np.divide, a, b), (a, b), (lambda g: g / b, lambda g: -g * (a / b) / b))


def neg(a):
    a = as_tensor(a)
    return record("neg", -a.data, (a,), (lambda g: -g,))


def pow(a, b):
    """a ** b. A negative base with a fractional exponent is NaN; the derivative by b at 0 ** 0 is 0, as in torch."""
    if type(b) in (int, float) and isinstance(a, Tensor):
        return _power(a, b)
    a, b = pair("pow", a, b)
    if b.data.dtype.kind == "i" and (b.data < 0).any():
        raise ValueError("pow: integers to a negative integer power: expected a floating base or exponent")
    y = constant(quiet(_apply, "pow", np.power, a, b))

    def by_exponent(g):
        flat = (a.data == 0) & (b.data >= 0)
        return g * where(flat, 0.0, y * log(where(flat, 1.0, a)))

    def by_base(g):
        return where(b.data == 0, 0.0, g * (b * pow(a, b - 1)))

    return record("pow", y, (a, b), (by_base, by_exponent))


def _power(a, p):
    if a.data.dtype.kind != "f" and (type(p) is float or p < 0):
        a = floating(a)

    def vjp(g):
        return g * (a * 2) if p == 2 else g * 0 if p == 0 else g * (_power(a, p - 1) * p)

    return record("pow", quiet(operator.pow, a.data, p), (a,), (vjp,))


def abs(a):
    a = as_tensor(a)
    return record("abs", np.abs(a.data), (a,), (lambda g: g * sign(a),))


def sign(a):
    """-1, 0 or 1; 0 for NaN too, as in torch."""
    a = as_tensor(a)
    y = np.greater(a.data, 0).astype(a.data.dtype)
    if a.data.dtype.kind in "fi":
        y = y - np.less(a.data, 0)
    return record("sign", y, (a,), (lambda g: g * 0,))


# -- exponentials and roots: y stands for the result itself --
def exp(a):
    a = floating(a)
    y = constant(quiet(np.exp, a.data))
    return record("exp", y, (a,), (lambda g: g * y,))


def expm1(a):
    a = floating(a)
    y = constant(quiet(np.expm1, a.data))
    return record("expm1", y, (a,), (lambda g: g * (y + 1),))


def log(a):
    a = floating(a)
    return record("log", quiet(np.log, a.data), (a,), (lambda g: g / a,))


def log1p(a):
    a = floating(a)
    return record("log1p", quiet(np.log1p, a.data), (a,), (lambda g: g / (a + 1),))


def sqrt(a):
    a = floating(a)
    y = constant(quiet(np.sqrt, a.data))
    return record("sqrt", y, (a,), (lambda g: g / (y * 2),))


def rsqrt(a):
    a = floating(a)
    y = constant(quiet(lambda x: 1 / np.sqrt(x), a.data))
    return record("rsqrt", y, (a,), (lambda g: g * (y * y * y * -0.5),))


# -- trigonometry, hyperbolics, erf --
def sin(a):
    a = floating(a)
    return record("sin", np.sin(a.data), (a,), (lambda g: g * cos(a),))


def cos(a):
    a = floating(a)
    return record("cos", np.cos(a.data), (a,), (lambda g: -g * sin(a),))


def tan(a):
    a = floating(a)
    y = constant(np.tan(a.data))
    return record("tan", y, (a,), (lambda g: g * (y * y + 1),))


def tanh(a):
    a = floating(a)
    y = constant(np.tanh(a.data))
    return record("tanh", y, (a,), (lambda g: g * (1 - y * y),))


def erf(a):
    from scipy.special import erf as scipy_erf  # here, not above: scipy takes long to import

    a = floating(a)
    return record("erf", scipy_erf(a.data), (a,), (lambda g: g * exp(-a * a) * (2 / math.sqrt(math.pi)),))


# -- choosing --
def clamp(a, min=None, max=None):
    """a limited to [min, max]; the bounds are numbers. The gradient passes where min <= a <= max."""
    bounds = [bound for bound in (min, max) if bound is not None]
    if not bounds:
        raise ValueError("clamp: expected min, max or both")
    if any(np.ndim(bound) or isinstance(bound, Tensor) for bound in bounds):
        raise ValueError("clamp: bounds are numbers; for tensors use minimum and maximum")
    a = floating(a) if any(isinstance(bound, float) for bound in bounds) else as_tensor(a)
    x = a.data
    y = np.clip(x, *(None if bound is None else x.dtype.type(bound) for bound in (min, max)))

    def vjp(g):
        inside = np.ones(a.shape, bool)
        if min is not None:
            inside &= a.data >= min
        if max is not None:
            inside &= a.data <= max
        return where(inside, g, 0.0)

    return record("clamp", y, (a,), (vjp,))


def _extremum(op, function, loses, a, b):
    a, b = pair(op, a, b)

    def share(x, other):  # of the gradient: all, nothing, or half where the operands are equal
        part = np.where(x.data == other.data, 0.5, ~loses(x.data, other.data))
        return constant(part.astype(x.data.dtype))

    vjps = (lambda g: g * share(a, b), lambda g: g * share(b, a))
    return record(op, _apply(op, function, a, b), (a, b), vjps)


def maximum(a, b):
    return _extremum("maximum", np.maximum, np.less, a, b)


def minimum(a, b):
    return _extremum("minimum", np.minimum, np.greater, a, b)


def where(condition, a, b):
    """a where condition, else b; the condition is a bool Tensor or array. 0 in one branch does not let NaN through."""
    return _choose("where", condition, a, b)


def _choose(op, condition, a, b):
    condition = as_tensor(condition)  # a Tensor, so that a write to it before backward is noticed
    if condition.dtype != np.bool_:
        raise ValueError(f"{op}: condition of dtype {condition.dtype}: expected bool")
    a, b = pair(op, a, b)
    try:
        y = np.where(condition.data, a.data, b.data)
    except ValueError:
        raise ValueError(f"{op}: shapes {condition.shape}, {a.shape} and {b.shape} do not broadcast") from None
    return record(op, y, (a, b), (lambda g: where(condition, g, 0.0), lambda g: where(condition, 0.0, g)))


def masked_fill(a, mask, value: float):
    """a with `value` where the bool mask is True."""
    return _choose("masked_fill", mask, value, a)


# -- comparisons: bool Tensors, outside the graph --
def _comparison(function, name):
    def compare(a, b):
        if b is None:
            return NotImplemented  # x == None is False, as for other objects
        a, b = pair(name, a, b)
        return constant(_apply(name, function, a, b))

    compare.__name__ = name
    return compare


eq, ne = _comparison(np.equal, "eq"), _comparison(np.not_equal, "ne")
lt, le = _comparison(np.less, "lt"), _comparison(np.less_equal, "le")
gt, ge = _comparison(np.greater, "gt"), _comparison(np.greater_equal, "ge")


def isnan(a):
    return constant(np.isnan(as_tensor(a).data))


def isfinite(a):
    return constant(np.isfinite(as_tensor(a).data))
