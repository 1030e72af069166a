"""Layer norm and RMS norm: fused, with a derivative by hand, beside their definitions out of plain operations.

Refuses a shape that is not the end of the input's, and parameters of another shape.
"""

import numpy as np

from autograd.elementwise import floating, promoted, rsqrt
from autograd.engine import fused
from autograd.reduce import mean, var
from autograd.tensor import Tensor


def _norm_dims(op, x, normalized_shape, weight, bias=None):
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"{op}: normalized_shape {shape} is not the end of the input's shape {x.shape}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != shape:
            raise ValueError(f"{op}: {name} of shape {parameter.shape}: expected {shape}")
    return tuple(range(-len(shape), 0))


def layer_norm(x, normalized_shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the last dimensions, times weight, plus bias (Ba et al. 2016)."""
    x, weight, bias = promoted(floating(x), weight, bias)
    axes = _norm_dims("layer_norm", x, normalized_shape, weight, bias)
    normal = x.data - x.data.mean(axes, keepdims=True)
    scale = 1 / np.sqrt(np.square(normal).mean(axes, keepdims=True) + eps)
    normal *= scale

    def backward(g):
        rows = tuple(range(g.ndim - len(axes)))
        gradients = []
        g_normal = g if weight is None else g * weight.data
        dx = g_normal - g_normal.mean(axes, keepdims=True)
        dx -= normal * (g_normal * normal).mean(axes, keepdims=True)
        dx *= scale
        gradients.append(dx)
        if weight is not None:
            gradients.append((g * normal).sum(rows))
        if bias is not None:
            gradients.append(g.sum(rows))
        return gradients

    def definition(x, *parameters):
        y = (x - mean(x, axes, True)) * rsqrt(var(x, axes, 0, True) + eps)
        y = y if weight is None else y * parameters[0]
        return y if bias is None else y + parameters[-1]

    y = normal.copy() if weight is None else normal * weight.data  # a copy: a write to the result must not reach normal
    if bias is not None:
        y += bias.data
    return fused("layer_norm", y, (x, *(p for p in (weight, bias) if p is not None)), backward, definition)


def rms_norm(x, normalized_shape, weight=None, eps: float | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimensions, times weight (Zhang & Sennrich 2019); eps None: machine's."""
    x, weight = promoted(floating(x), weight)
    eps = float(np.finfo(x.dtype).eps) if eps is None else eps
    axes = _norm_dims("rms_norm", x, normalized_shape, weight)
    scale = 1 / np.sqrt(np.square(x.data).mean(axes, keepdims=True) + x.dtype.type(eps))
    normal = x.data * scale

    def backward(g):
        g_normal = g if weight is None else g * weight.data
        dx = normal * -(g_normal * normal).mean(axes, keepdims=True)
        dx += g_normal
        dx *= scale
        return (dx,) if weight is None else (dx, (g * normal).sum(tuple(range(g.ndim - len(axes)))))

    def definition(x, *parameters):
        y = x * rsqrt(mean(x * x, axes, True) + eps)
        return y * parameters[0] if parameters else y

    y = normal.copy() if weight is None else normal * weight.data  # a copy: a write to the result must not reach normal
    return fused("rms_norm", y, (x,) if weight is None else (x, weight), backward, definition)
