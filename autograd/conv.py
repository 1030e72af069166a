"""Convolution and pooling over images (B, C, H, W).

One linear map does the work: `windows` lays a kernel-sized window over every output position, as a strided view. Its
transpose, `overlap_add`, sums windows back into an image. Each is the other's derivative, so convolution (a matrix
product over windows) and pooling (a mean or maximum over them) need no backward rules of their own, to any order.
Refuses transposed and 1-D/3-D convolutions, ceil_mode, and padding by name.
"""

import numpy as np
from numpy.lib.stride_tricks import as_strided

from autograd.elementwise import floating, pair
from autograd.graph import record, record_view
from autograd.shape import pad as pad_
from autograd.tensor import Tensor, as_tensor


def _two(name: str, value, least: int) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or not all(isinstance(v, int) and v >= least for v in values):
        raise ValueError(f"{name} {value!r}: expected an int or a pair of ints, at least {least}")
    return values


def _output_size(op, x, kernel, stride, dilation):
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[-2:], kernel, stride, dilation, strict=True)]
    if min(sizes) < 1:
        raise ValueError(
            f"{op}: kernel {kernel} with dilation {dilation} does not fit in a padded image of {x.shape[-2:]}"
        )
    return sizes


def windows(x, kernel, stride, dilation) -> Tensor:
    """(B, C, H, W) -> (B, C, H', W', kh, kw): element [.., i, j, p, q] is x[.., i sh + p dh, j sw + q dw]."""
    (sh, sw), (dh, dw) = stride, dilation
    height, width = _output_size("windows", x, kernel, stride, dilation)
    data = x.data
    b, c, h, w = data.strides
    shape = (*data.shape[:2], height, width, *kernel)
    view = as_strided(data, shape, (b, c, h * sh, w * sw, h * dh, w * dw), writeable=False)
    size = x.shape[-2:]
    return record_view("windows", view, x, lambda g: overlap_add(g, size, stride, dilation))


def overlap_add(g, size, stride, dilation) -> Tensor:
    """The transpose of `windows`: (B, C, H', W', kh, kw) summed into images of `size`."""
    (sh, sw), (dh, dw) = stride, dilation
    batch, channels, height, width, kh, kw = g.shape
    y = np.zeros((batch, channels, *size), g.dtype)
    for p in range(kh):
        for q in range(kw):
            rows = slice(p * dh, p * dh + (height - 1) * sh + 1, sh)
            columns = slice(q * dw, q * dw + (width - 1) * sw + 1, sw)
            y[:, :, rows, columns] += g.data[..., p, q]
    return record("overlap_add", y, (g,), (lambda h: windows(h, (kh, kw), stride, dilation),))


def _padded(x, padding, value=0.0):
    ph, pw = padding
    return pad_(x, (pw, pw, ph, ph), value=value) if ph or pw else x


def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups: int = 1) -> Tensor:
    """x (B, C, H, W), weight (D, C / groups, kh, kw), bias (D): (B, D, H', W')."""
    x, weight = pair("conv2d", x, weight)
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(f"conv2d: input {x.shape} and weight {weight.shape}: expected four dimensions each")
    if (
        not (isinstance(groups, int) and groups >= 1)
        or weight.shape[0] % groups
        or x.shape[1] != weight.shape[1] * groups
    ):
        raise ValueError(f"conv2d: input {x.shape} and weight {weight.shape} with groups {groups}: channels do not fit")
    if bias is not None and as_tensor(bias).shape != weight.shape[:1]:
        raise ValueError(f"conv2d: bias {as_tensor(bias).shape} for weight {weight.shape}: expected {weight.shape[:1]}")
    stride, dilation = _two("stride", stride, 1), _two("dilation", dilation, 1)
    x = _padded(x, _two("padding", padding, 0))
    batch = len(x)
    out_channels, per_group, kh, kw = weight.shape
    _output_size("conv2d", x, (kh, kw), stride, dilation)
    w = windows(x, (kh, kw), stride, dilation)
    height, width = w.shape[2:4]
    columns = w.reshape(batch, groups, per_group, height, width, kh, kw).permute(1, 0, 3, 4, 2, 5, 6)
    columns = columns.reshape(groups, batch * height * width, per_group * kh * kw)
    kernel = weight.reshape(groups, out_channels // groups, per_group * kh * kw)
    y = (columns @ kernel.mT).reshape(groups, batch, height, width, out_channels // groups).permute(1, 0, 4, 2, 3)
    y = y.reshape(batch, out_channels, height, width)
    return y if bias is None else y + as_tensor(bias).reshape(1, -1, 1, 1)


def _pooling_windows(op, x, kernel_size, stride, padding, fill):
    x = floating(x)
    if x.ndim != 4:
        raise ValueError(f"{op}: input {x.shape}: expected (B, C, H, W)")
    kernel = _two("kernel_size", kernel_size, 1)
    stride = kernel if stride is None else _two("stride", stride, 1)
    padding = _two("padding", padding, 0)
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(f"{op}: padding {padding}: expected at most half of the kernel {kernel}")
    x = _padded(x, padding, fill)
    _output_size(op, x, kernel, stride, (1, 1))
    return windows(x, kernel, stride, (1, 1)), kernel


def max_pool2d(x, kernel_size, stride=None, padding=0) -> Tensor:
    """The maximum over windows; stride defaults to the kernel size. Among equals the first gets the gradient."""
    w, (kh, kw) = _pooling_windows("max_pool2d", x, kernel_size, stride, padding, -np.inf)
    return w.reshape(*w.shape[:4], kh * kw).max(-1).values


def avg_pool2d(x, kernel_size, stride=None, padding=0) -> Tensor:
    """The mean over windows, padding counted as zeros (torch's count_include_pad=True)."""
    w, _ = _pooling_windows("avg_pool2d", x, kernel_size, stride, padding, 0.0)
    return w.mean((-2, -1))
