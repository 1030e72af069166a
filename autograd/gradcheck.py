"""Derivatives by central differences, to check the analytic ones: `gradcheck`, and `gradgradcheck` for the second.

In float64 only: with a step of 1e-6 a central difference has an error near 1e-9, in float32 it would drown in rounding.
"""

import numpy as np

from autograd.engine import grad
from autograd.tensor import Tensor, constant


def numerical_gradient(function, inputs, i: int, weights: np.ndarray, eps: float) -> np.ndarray:
    """d/d(inputs[i]) of sum(weights * function(*inputs)), element by element."""
    x = inputs[i].data
    result = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        before = x[index]
        x[index] = before + eps
        above = function(*inputs).data
        x[index] = before - eps
        below = function(*inputs).data
        x[index] = before
        result[index] = ((above - below) * weights).sum() / (2 * eps)
    return result


def gradcheck(function, inputs, eps: float = 1e-6, atol: float = 1e-6, rtol: float = 1e-5) -> bool:
    """True when the gradient of every input that requires grad agrees with central differences.

    function takes the inputs (Tensors, float64 where they require grad) and returns one floating Tensor. Its output is
    weighted by fixed random numbers, so that errors of opposite sign cannot cancel. Raises AssertionError with the
    input and the worst element where they differ (a NaN differs), and ValueError for inputs of another dtype.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    checked = [i for i, t in enumerate(inputs) if isinstance(t, Tensor) and t.requires_grad]
    if not checked:
        raise ValueError("gradcheck: no input requires grad")
    for i in checked:
        if inputs[i].dtype != np.float64:
            raise ValueError(f"gradcheck: input {i} of dtype {inputs[i].dtype}: expected float64")
    output = function(*inputs)
    weights = np.random.default_rng(0).uniform(0.5, 1.5, output.shape)
    analytic = grad(output, [inputs[i] for i in checked], constant(weights), allow_unused=True)
    for i, gradient in zip(checked, analytic, strict=True):
        found = np.zeros(inputs[i].shape) if gradient is None else gradient.data
        expected = numerical_gradient(function, inputs, i, weights, eps)
        error = np.abs(found - expected)
        bad = ~(error <= atol + rtol * np.abs(expected))
        if bad.any():
            at = tuple(int(k) for k in np.argwhere(bad)[0])
            raise AssertionError(
                f"gradcheck: input {i} at {at}: analytic {found[at]:.9g}, numerical {expected[at]:.9g} "
                f"({int(bad.sum())} of {bad.size} elements differ)"
            )
    return True


def gradgradcheck(function, inputs, eps: float = 1e-6, atol: float = 1e-6, rtol: float = 1e-5) -> bool:
    """`gradcheck` of the gradient itself: with respect to the inputs and to the gradient that comes in."""
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    checked = [i for i, t in enumerate(inputs) if isinstance(t, Tensor) and t.requires_grad]
    shape = function(*inputs).shape
    incoming = Tensor(np.random.default_rng(1).uniform(0.5, 1.5, shape), requires_grad=True)

    def gradients(incoming, *inputs):
        output = function(*inputs)
        parts = grad(output, [inputs[i] for i in checked], incoming, create_graph=True, allow_unused=True)
        from autograd.shape import cat

        return cat([part.reshape(-1) for part in parts if part is not None])

    return gradcheck(gradients, [incoming, *inputs], eps, atol, rtol)
