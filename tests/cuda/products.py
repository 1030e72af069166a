"""What the tests of cuda.ops share: the devices, random operands, the product in float64, and how close is close."""

import math

import pytest
import torch
import torch.nn.functional as F

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of the largest number: one rounding


def normal(*shape, dtype=torch.float32, device="cpu", grad=False):
    return torch.randn(shape).to(device, dtype).requires_grad_(grad)


def reference(a, b, c=None, bias=None, alpha=1.0, beta=0.0, activation="none"):
    """In float64, of the same arguments as ops.matmul."""
    x = alpha * (a.double() @ b.double())
    if bias is not None:
        x = x + bias.double()
    if activation == "gelu":
        x = F.gelu(x)
    elif activation == "swiglu":
        x = F.silu(x[..., ::2]) * x[..., 1::2]
    return x if c is None or beta == 0 else x + beta * c.double()


def check(got, want, tolerance):
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max().item()
    assert not (error > tolerance * max(1.0, want.abs().max().item())), error
    assert math.isfinite(error)
