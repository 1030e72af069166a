"""Weights in 8 and 4 bits against brute force over all numbers a byte or nibble can be, against bitsandbytes' int8, and
against the kernels that read them."""

import itertools
import math

import pytest
import torch

from cuda import ops
from lora.integers import (
    Int4Matrix,
    dequantise_int4,
    dequantise_int8,
    quantise_int4,
    quantise_int8,
)
from tests.cuda.products import DEVICES

SHAPES = [(4, 256), (9, 127), (5, 96), (7, 300), (6, 1), (1, 33)]
GROUPS = (32, 64, 128)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def nibbles(q):
    high, low = q.packed >> 4, q.packed & 15
    return torch.stack([high, low], 2).flatten(1)[:, : q.columns]


def whole(x, q):
    return x.double().repeat_interleave(q.group, 1)[:, : q.columns]


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_bytes_are_those_of_bitsandbytes(dtype):
    theirs = pytest.importorskip("bitsandbytes").functional
    for shape in SHAPES:
        w = torch.randn(shape).to(dtype)
        q = quantise_int8(w)
        packed, absmax, _ = theirs.int8_vectorwise_quant(w)
        assert torch.equal(q.packed, packed) and torch.equal(q.scales, absmax / 127)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_nearest_number(shape):
    w = torch.randn(shape)
    q = quantise_int8(w)
    assert q.packed.dtype == torch.int8 and q.scales.dtype == torch.float32
    step = (w.abs().amax(1, keepdim=True) / 127).double()
    best = (w.double()[..., None] - torch.arange(-127, 128) * step[..., None]).abs().amin(2)
    error = (dequantise_int8(q).double() - w.double()).abs()
    assert (error <= best + 1e-5 * step).all() and (error <= 0.5001 * step).all()
    assert (q.packed.abs().amax(1) == 127).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_what_the_kernels_read(device, shape):
    pytest.importorskip("triton", reason="the kernels are in Triton")
    q = quantise_int8(torch.randn(shape, device=device))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantise_int8(q, dtype), ops.dequantize_int8(q.packed, q.scales, dtype))


def test_int8_extremes():
    w = torch.tensor([[0.0, 0.0, -0.0], [3e38, -3e38, 1.0], [1e-40, 0.0, -1e-40], [5.0, 5.0, 5.0]])
    q = quantise_int8(w)
    assert q.packed.tolist() == [[0, 0, 0], [127, -127, 0], [127, 0, -127], [127, 127, 127]]
    back = dequantise_int8(q)
    assert back.isfinite().all() and torch.equal(back[0], w[0])
    torch.testing.assert_close(back, w, rtol=1e-6, atol=1.0)


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_int4_is_the_nearest_number(shape, asymmetric):
    """Of the sixteen that the group's scale and zero allow; and half a scale off at most."""
    for group, dtype in itertools.product(GROUPS, (torch.float32, torch.bfloat16)):
        w = torch.randn(shape) + 0.5
        q = quantise_int4(w, group, asymmetric=asymmetric, scale_dtype=dtype)
        assert q.scales.dtype == dtype and (q.zeros is None) != asymmetric
        scales, zeros = whole(q.scales, q), whole(q.zeros, q) if asymmetric else torch.tensor(8.0)
        allowed = (torch.arange(16) - zeros[..., None]) * scales[..., None]
        best = (w.double()[..., None] - allowed).abs().amin(2)
        error = (dequantise_int4(q).double() - w.double()).abs()
        assert (error <= best + 1e-5 * scales).all()
        if dtype == torch.float32:
            assert (error <= 0.5001 * scales).all()
        assert torch.equal(dequantise_int4(q), ((nibbles(q) - zeros) * scales).float())


@pytest.mark.parametrize("group", GROUPS)
def test_int4_scales_and_zeros(group):
    w = torch.randn(3, 200) + 1
    symmetric, asymmetric = (quantise_int4(w, group, asymmetric=a) for a in (False, True))
    for row, start in itertools.product(range(3), range(0, 200, group)):
        part, index = w[row, start : start + group].double().tolist(), (row, start // group)
        assert symmetric.scales[index].item() == pytest.approx(max(map(abs, part)) / 7.5, rel=1e-6)
        low, high = min(0.0, *part), max(0.0, *part)
        assert asymmetric.scales[index].item() == pytest.approx((high - low) / 15, rel=1e-6)
        assert asymmetric.zeros[index].item() == round(-low * 15 / (high - low))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_int4_is_what_the_kernels_read(device, asymmetric):
    pytest.importorskip("triton", reason="the kernels are in Triton")
    for shape, group in itertools.product(SHAPES[1:4], GROUPS):
        w = torch.randn(shape, device=device)
        for dtype in (torch.float32, torch.bfloat16):
            q = quantise_int4(w, group, asymmetric=asymmetric, scale_dtype=dtype)
            want = ops.dequantize_int4(q.packed, q.scales, q.zeros, shape, dtype, group=group)
            assert torch.equal(dequantise_int4(q, dtype), want)


def test_int4_zeros_stay_and_asymmetric_wins_on_one_side():
    w = torch.rand(4, 128) + 2
    w[:, ::3] = 0
    symmetric, asymmetric = (dequantise_int4(quantise_int4(w, asymmetric=a)) for a in (False, True))
    assert not symmetric[:, ::3].any() and not asymmetric[:, ::3].any()
    assert (asymmetric - w).norm() < 0.7 * (symmetric - w).norm()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_int4_extremes(asymmetric):
    w = torch.tensor([[0.0, 0.0], [3e38, -3e38], [1e-40, -1e-40], [5.0, 5.0], [-2.0, -2.0], [0.0, 1.0]])
    q = quantise_int4(w, asymmetric=asymmetric)
    error = (dequantise_int4(q).double() - w.double()).abs()
    assert (error <= 0.5001 * q.scales.double() + 1e-44).all()
    assert q.packed.shape == (6, 1)


def test_int4_odd_rows_end_in_a_nibble_of_0():
    q = quantise_int4(torch.ones(3, 5))
    assert (q.packed[:, -1] & 15 == 0).all() and q.packed.shape == (3, 3)


@pytest.mark.parametrize("shape", [(0, 64), (6, 0), (0, 0)])
def test_empty(shape):
    w = torch.zeros(shape)
    assert dequantise_int8(quantise_int8(w)).shape == shape
    for asymmetric in (False, True):
        assert dequantise_int4(quantise_int4(w, asymmetric=asymmetric)).shape == shape


def test_strides_do_not_matter():
    w = torch.randn(65, 31).T
    one, other = quantise_int8(w), quantise_int8(w.contiguous())
    assert torch.equal(one.packed, other.packed) and one.packed.is_contiguous()
    for asymmetric in (False, True):
        one, other = (quantise_int4(x, 32, asymmetric=asymmetric) for x in (w, w.contiguous()))
        assert torch.equal(one.packed, other.packed) and one.packed.is_contiguous() and one.scales.is_contiguous()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantise", [quantise_int8, quantise_int4])
def test_refused(quantise):
    w = torch.randn(4, 33)
    for wrong in (math.nan, math.inf):
        bad = w.clone()
        bad[1, 32] = wrong
        with pytest.raises(
            ValueError, match=r"up.weight has 1 numbers that are NaN or infinite, the first at \[1, 32\]"
        ):
            quantise(bad, name="up.weight")
    with pytest.raises(ValueError, match="up.weight is torch.float64: expected one of"):
        quantise(w.double(), name="up.weight")
    for shape in ((132,), (2, 2, 33)):
        with pytest.raises(ValueError, match=r"weight has shape .*: expected two dimensions, \(out, in\)"):
            quantise(w.flatten()[: math.prod(shape)].view(shape))


def test_refused_of_int4():
    w = torch.randn(4, 33)
    for group in (0, 16, 48, 256, -1):
        with pytest.raises(ValueError, match=f"group {group}: expected one of 32, 64, 128"):
            quantise_int4(w, group)
    with pytest.raises(ValueError, match="scale_dtype torch.int8: expected one of"):
        quantise_int4(w, scale_dtype=torch.int8)
    with pytest.raises(ValueError, match="weight needs a scale of .*e.*: expected one that torch.float16 can hold"):
        quantise_int4(w * 1e9, scale_dtype=torch.float16)
    q = quantise_int4(w, 32)
    with pytest.raises(ValueError, match=r"packed \(4, 17\) with scales \(4, 2\): expected \(4, 17\) with \(4, 1\)"):
        Int4Matrix(q.packed, q.scales, None, 33, 64)
