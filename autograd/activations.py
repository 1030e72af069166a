"""The functions between linear layers: sigmoid, relu and its relatives, silu, gelu.

At 0 the derivative of relu is 0, as torch's.
"""

import math

import numpy as np

from autograd.elementwise import erf, floating, quiet, tanh, where
from autograd.engine import fused
from autograd.graph import record
from autograd.tensor import as_tensor, constant


def _sigmoid(x):
    y = np.asarray(quiet(np.exp, -x))  # it may reach inf: the quotient is then 0, as it should be
    y += 1
    return np.reciprocal(y, out=y)


def sigmoid(a):
    a = floating(a)
    y = constant(_sigmoid(a.data))
    return record("sigmoid", y, (a,), (lambda g: g * (y * (1 - y)),))


def relu(a):
    a = as_tensor(a)
    x = a.data
    return fused("relu", np.maximum(x, 0), (a,), lambda g: (g * ~(x <= 0),), lambda a: where(a <= 0, 0.0, a))


def leaky_relu(a, negative_slope: float = 0.01):
    a = floating(a)
    slope = np.where(a.data > 0, a.data.dtype.type(1), a.data.dtype.type(negative_slope))
    return record("leaky_relu", a.data * slope, (a,), (lambda g: g * constant(slope),))


def silu(a):
    """x * sigmoid(x), also called swish."""
    a = floating(a)
    s = _sigmoid(a.data)

    def backward(g):
        d = 1 - s
        d *= a.data
        d += 1
        d *= s
        d *= g
        return (d,)

    return fused("silu", a.data * s, (a,), backward, lambda a: a * sigmoid(a))


def softplus(a, beta: float = 1.0, threshold: float = 20.0):
    """log(1 + exp(beta x)) / beta; the identity where beta x > threshold."""
    a = floating(a)
    z = a.data * beta
    linear = z > threshold
    y = np.where(linear, a.data, np.logaddexp(z, 0, dtype=z.dtype) / beta)
    return record("softplus", y, (a,), (lambda g: g * where(linear, 1.0, sigmoid(a * beta)),))


def gelu(a, approximate: str = "none"):
    """x Phi(x), with the normal distribution function Phi exact ("none") or by its "tanh" approximation."""
    a = floating(a)
    if approximate == "none":
        return a * 0.5 * (erf(a * math.sqrt(0.5)) + 1)
    if approximate != "tanh":
        raise ValueError(f"gelu: approximate {approximate!r}: expected 'none' or 'tanh'")
    c, x = math.sqrt(2 / math.pi), a.data
    t = np.tanh(c * (x + 0.044715 * x * x * x))

    def backward(g):
        return (g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)),)

    return fused(
        "gelu", 0.5 * x * (1 + t), (a,), backward, lambda a: a * 0.5 * (tanh((a + a * a * a * 0.044715) * c) + 1)
    )
