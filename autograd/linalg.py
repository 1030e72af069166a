"""Matrix products: matmul, linear, einsum.

Every product ends in a BLAS call on contiguous matrices where numpy can arrange it; a product with a plain matrix is
one call over the flattened batch, not one per batch element.
Refuses inner sizes that differ, naming both shapes.
"""

import math

import numpy as np

from autograd.elementwise import pair, promoted
from autograd.engine import fused
from autograd.graph import record
from autograd.indexing import diagonal
from autograd.shape import reshape
from autograd.tensor import Tensor


def matmul(a, b):
    """The matrix product of the last two dimensions, broadcast over the others; a 1-D operand is a vector."""
    a, b = pair("matmul", a, b)
    if a.ndim == 0 or b.ndim == 0:
        raise ValueError(f"matmul: shapes {a.shape} and {b.shape}: expected at least one dimension each")
    if a.shape[-1] != b.shape[0 if b.ndim == 1 else -2]:
        raise ValueError(f"matmul: shapes {a.shape} and {b.shape}: inner sizes differ")
    if a.ndim == 1:
        y = matmul(reshape(a, 1, -1), b)
        return reshape(y, y.shape[:-1] if b.ndim == 1 else y.shape[:-2] + y.shape[-1:])
    if b.ndim == 1:
        return reshape(matmul(a, reshape(b, -1, 1)), a.shape[:-1])
    if b.ndim == 2 and a.ndim > 2:
        rows = reshape(a, math.prod(a.shape[:-1]), a.shape[-1])
        return reshape(matmul(rows, b), (*a.shape[:-1], b.shape[1]))
    try:
        y = np.matmul(a.data, b.data)
    except ValueError:
        raise ValueError(f"matmul: shapes {a.shape} and {b.shape}: batch dimensions do not broadcast") from None
    return record("matmul", y, (a, b), (lambda g: matmul(g, b.mT), lambda g: matmul(a.mT, g)))


def linear(x, weight, bias=None):
    """x (..., in) times weight (out, in) transposed, plus bias (out): (..., out)."""
    x, weight = pair("linear", x, weight)
    xd, w = x.data, weight.data
    if w.ndim != 2 or xd.ndim == 0 or xd.shape[-1] != w.shape[1]:
        raise ValueError(f"linear: input {xd.shape} and weight {w.shape}: expected (..., in) and (out, in)")
    if bias is not None and (not isinstance(bias, Tensor) or bias.data.dtype != w.dtype):
        return linear(*promoted(x, weight, bias))
    if bias is not None and bias.data.shape != w.shape[:1]:
        raise ValueError(f"linear: bias {bias.shape} for weight {w.shape}: expected {w.shape[:1]}")
    flat = xd if xd.ndim == 2 else xd.reshape(math.prod(xd.shape[:-1]), w.shape[1])
    y = flat.dot(w.T)  # for matrices the same product as @, which takes twice as long to get there
    if bias is not None:
        y += bias.data

    def backward(g):
        g2 = g if g.ndim == 2 else g.reshape(len(flat), w.shape[0])
        dx = g2.dot(w) if x.requires_grad else None
        dx = dx if dx is None or xd.ndim == 2 else dx.reshape(xd.shape)
        dw = g2.T.dot(flat) if weight.requires_grad else None
        return (dx, dw) if bias is None else (dx, dw, np.add.reduce(g2))

    def definition(x, weight, bias=None):
        y = matmul(x, weight.mT)
        return y if bias is None else y + bias

    y = y if xd.ndim == 2 else y.reshape(*xd.shape[:-1], w.shape[0])
    return fused("linear", y, (x, weight) if bias is None else (x, weight, bias), backward, definition)


_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def einsum(equation: str, *operands) -> Tensor:
    """Einstein summation with explicit or implicit output and `...`, as numpy's and torch's."""
    tensors = list(promoted(*operands))
    inputs, output = _subscripts(equation, tensors)
    for i, (subs, tensor) in enumerate(zip(inputs, tensors, strict=True)):
        inputs[i], tensors[i] = _simplified(subs, tensor, inputs[:i] + inputs[i + 1 :], output)
    return _product(equation, inputs, tensors, output)


def _subscripts(equation, tensors):
    """The letters of each operand and of the output, with `...` spelled out in letters of its own."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != len(tensors):
        raise ValueError(f"einsum {equation!r}: {len(inputs)} operands in the equation, {len(tensors)} given")
    strange = set("".join(s.replace("...", "", 1) for s in (*inputs, right))) - set(_LETTERS)
    if strange:
        raise ValueError(
            f"einsum {equation!r}: {sorted(strange)}: expected letters, one '...' an operand, ',' and '->'"
        )
    spare = [c for c in _LETTERS if c not in equation]
    counts = [t.ndim - len(s.replace("...", "")) for s, t in zip(inputs, tensors, strict=True)]
    for subs, tensor, extra in zip(inputs, tensors, counts, strict=True):
        if extra < 0 or (extra > 0 and "..." not in subs):
            raise ValueError(
                f"einsum {equation!r}: operand of shape {tensor.shape} does not have the dimensions {subs!r}"
            )
    dots = "".join(spare[: max((n for n, s in zip(counts, inputs, strict=True) if "..." in s), default=0)])
    inputs = [s.replace("...", dots[len(dots) - n :]) for s, n in zip(inputs, counts, strict=True)]
    if arrow:
        output = right.replace("...", dots)
    else:
        letters = "".join(inputs)
        output = dots + "".join(sorted(c for c in set(letters) if letters.count(c) == 1 and c not in dots))
    unknown = set(output) - set("".join(inputs))
    if unknown or len(set(output)) != len(output):
        raise ValueError(f"einsum {equation!r}: output {right!r} repeats an index or has one that no operand has")
    return inputs, output


def _simplified(subs, tensor, others, output):
    """Takes diagonals for letters that repeat in one operand, and sums over letters that nobody else has: afterwards
    the derivative by an operand is again one product of the others."""
    for letter in sorted(set(subs)):
        while subs.count(letter) > 1:
            i = subs.index(letter)
            j = subs.index(letter, i + 1)
            tensor = diagonal(tensor, i, j)
            subs = subs[:i] + subs[i + 1 : j] + subs[j + 1 :] + letter
    alone = tuple(i for i, c in enumerate(subs) if c not in output and all(c not in s for s in others))
    if alone:
        tensor = tensor.sum(alone)
        subs = "".join(c for i, c in enumerate(subs) if i not in alone)
    return subs, tensor


def _product(equation, inputs, tensors, output):
    try:
        y = np.einsum(",".join(inputs) + "->" + output, *(t.data for t in tensors), optimize=len(tensors) > 1)
    except ValueError:
        raise ValueError(f"einsum {equation!r}: shapes {[t.shape for t in tensors]} do not fit") from None
    tensors = tuple(tensors)

    def by(i):
        rest = tuple(t for j, t in enumerate(tensors) if j != i)
        subs = [output, *(s for j, s in enumerate(inputs) if j != i)]
        shape = tensors[i].shape

        def vjp(g):
            part = einsum(",".join(subs) + "->" + inputs[i], g, *rest)
            return part if part.shape == shape else part.expand(np.broadcast_shapes(part.shape, shape))

        return vjp

    return record("einsum", y, tensors, tuple(by(i) for i in range(len(tensors))))
