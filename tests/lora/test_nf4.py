"""NF4 against its definition (scipy's normal quantiles, brute force in float64), against bitsandbytes byte for byte,
and against the kernels that read it."""

import itertools
import math

import pytest
import torch

from cuda import ops
from cuda.quantised_ops import NF4
from lora import nf4
from lora.nf4 import NF4Tensor, dequantise_nf4, quantise_nf4
from lora.quantised import QuantisedLinear
from tests.cuda.products import DEVICES


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def bitsandbytes():
    module = pytest.importorskip("bitsandbytes").functional
    with torch.compiler.set_stance("force_eager"):  # it would compile its quantiser, for longer than it then runs
        yield module


def keywords(q):
    return {"block": q.block, "absmax2": q.absmax2, "offset": q.offset, "code": q.code}


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_codes_are_normal_quantiles():
    norm = pytest.importorskip("scipy.stats").norm
    above, below = (norm.ppf(torch.linspace(0.9677083, 0.5, n + 1)[:-1].double()) for n in (8, 7))
    codes = torch.tensor(sorted([*above, 0, *-below]), dtype=torch.float64) / above.max()
    error = (nf4.nf4_codes().double() - codes).abs().max()
    assert error <= 2**-24
    assert torch.equal(nf4.nf4_codes(), torch.tensor(NF4))


def test_the_extreme_quantile_is_half_way():
    assert abs(nf4.EXTREME - (1 - (1 / 32 + 1 / 30) / 2)) <= 1e-7


def dynamic_number(bits, count=7):
    """What the bits after the sign mean, read one at a time."""
    text = f"{bits:0{count}b}"
    if "1" not in text:
        return 0.0
    zeros = text.index("1")
    fraction = text[zeros + 1 :]
    step = 0.9 / 2 ** len(fraction)
    return (0.1 + (int(fraction or "0", 2) + 0.5) * step) * 10.0**-zeros


def test_dynamic_codes_are_what_the_bits_mean():
    positive = [dynamic_number(bits) for bits in range(128)]
    codes = torch.tensor(sorted([*positive, *(-x for x in positive[1:]), 1.0]), dtype=torch.float64)
    assert len(nf4.dynamic_codes()) == 256
    torch.testing.assert_close(nf4.dynamic_codes().double(), codes, rtol=1e-6, atol=0)


def test_unsigned_dynamic_codes_have_a_bit_more():
    """Seven zeros and a one are the number 1, which has no sign either."""
    codes = [1.0 if bits == 1 else dynamic_number(bits, 8) for bits in range(256)]
    want = torch.tensor(sorted(codes), dtype=torch.float64)
    torch.testing.assert_close(nf4.dynamic_codes(signed=False).double(), want, rtol=1e-6, atol=0)


def test_tables_do_not_depend_on_the_moment_when_they_are_made():
    """A layer without numbers is made first; or a test has set another type."""
    tables = [nf4.nf4_codes(), nf4.dynamic_codes(), nf4.dynamic_codes(False)]
    for of in (nf4.nf4_codes, nf4.dynamic_codes):
        of.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            again = [nf4.nf4_codes(), nf4.dynamic_codes(), nf4.dynamic_codes(False)]
            assert all(x.is_meta for x in QuantisedLinear(64, 64, "nf4-double").buffers())
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(tables, again, strict=True):
        assert one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def test_tables_are_those_of_bitsandbytes(bitsandbytes):
    assert torch.equal(nf4.nf4_codes(), bitsandbytes.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_codes(), bitsandbytes.create_dynamic_map())


@pytest.mark.parametrize("codes", [nf4.nf4_codes(), nf4.dynamic_codes()], ids=["nf4", "dynamic"])
def test_nearest_by_brute_force(codes):
    halfway = (codes[:-1] + codes[1:]) / 2
    x = torch.cat(
        [torch.rand(5000) * 2 - 1, codes, halfway, halfway.nextafter(torch.tensor(2.0)), torch.tensor([-1.0])]
    )
    borders = halfway.double()
    want = (x.double()[:, None] > borders).sum(1)  # how many borders lie below it; on a border it is below
    got = nf4.nearest(x, codes)
    assert got.dtype == torch.uint8 and torch.equal(got.long(), want)
    distance = (x.double()[:, None] - codes.double()).abs()
    chosen = distance.gather(1, got.long()[:, None])[:, 0]
    assert (chosen <= distance.min(1).values + 2**-24).all()


# ---- bytes -----------------------------------------------------------------------------------------------------------

CASES = {
    "random": lambda: torch.randn(300, 257) * 0.02,
    "second block": lambda: torch.randn(520, 67),
    "odd": lambda: torch.randn(7, 9),
    "line": lambda: torch.randn(129),
    "one": lambda: torch.tensor([[-3.0]]),
    "outliers": lambda: torch.randn(100, 64) ** 9 * 1e20,
    "huge": lambda: torch.randn(33, 65).sign() * 3e38,
    "tiny": lambda: torch.randn(64, 65) * 1e-40,
    "zero": lambda: torch.zeros(5, 65),
    "some zero": lambda: torch.cat([torch.zeros(3, 64), torch.randn(3, 64)]),
    "constant": lambda: torch.full((260, 67), 0.1),
    "negative": lambda: torch.full((33, 64), -0.3),
    "halfway": lambda: torch.cat([nf4.nf4_codes(), (nf4.nf4_codes()[1:] + nf4.nf4_codes()[:-1]) / 2] * 2),
    "three dimensions": lambda: torch.randn(3, 5, 11),
    "transposed": lambda: torch.randn(65, 31).T,
    "bfloat16": lambda: torch.randn(99, 101).bfloat16(),
    "float16": lambda: torch.randn(99, 101).half(),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("double", [False, True])
def test_bytes_are_those_of_bitsandbytes(case, double, bitsandbytes):
    w = CASES[case]()
    for block in (32, 64, 128, 4096):
        packed, state = bitsandbytes.quantize_4bit(
            w.contiguous(), blocksize=block, quant_type="nf4", compress_statistics=double
        )
        q = quantise_nf4(w, block, double=double)
        assert q.shape == tuple(w.shape) and torch.equal(q.packed, packed.view(-1))
        assert torch.equal(q.absmax, state.absmax) and q.absmax.dtype == state.absmax.dtype
        if double:
            assert torch.equal(q.offset, state.offset) and torch.equal(q.absmax2, state.state2.absmax)
            assert torch.equal(q.code, state.state2.code)


@pytest.mark.parametrize("length", [63, 64])
def test_rounded_as_in_bitsandbytes_next_to_borders(length, bitsandbytes):
    """Which divides blocks that are cut short, and multiplies whole ones by a reciprocal: here the codes show it."""
    borders = (nf4.nf4_codes()[:-1] + nf4.nf4_codes()[1:]) / 2
    other_way = 0
    for absmax in torch.rand(40) + 0.5:
        near = borders * absmax
        near = torch.cat([near.nextafter(torch.tensor(-2.0)), near, near.nextafter(torch.tensor(2.0)), absmax[None]])
        w = torch.cat([near, torch.zeros(length - len(near))])
        packed, _ = bitsandbytes.quantize_4bit(w, blocksize=64, quant_type="nf4")
        assert torch.equal(quantise_nf4(w).packed, packed.view(-1))
        ways = (nf4.nearest(x, nf4.nf4_codes()) for x in (w / absmax, w * (1 / absmax)))
        other_way += not torch.equal(*ways)
    assert other_way > 5


def test_codes_of_many_absmax_are_those_of_bitsandbytes(bitsandbytes):
    """As many as borders of its grid need, of which a matrix has too few."""
    absmax = torch.cat([torch.randn(200_003), torch.linspace(-1, 1, 100_000)])
    codes, second = nf4.quantise_absmax(absmax)
    theirs, state = bitsandbytes.quantize_blockwise(absmax - second["offset"], blocksize=256)
    assert torch.equal(codes, theirs) and torch.equal(second["absmax2"], state.absmax)


def test_by_definition():
    """One number after another, in float64, without what is halfway between codes."""
    w = torch.randn(9, 37)
    q = quantise_nf4(w)
    numbers = []
    line = w.flatten().double().tolist()
    for start in range(0, len(line), 64):
        block = line[start : start + 64]
        absmax = max(map(abs, block))
        assert q.absmax[start // 64].item() == absmax
        numbers += [min(range(16), key=lambda i: abs(x / absmax - NF4[i])) for x in block]
    numbers.append(7)
    want = [first << 4 | second for first, second in zip(numbers[::2], numbers[1::2], strict=True)]
    assert q.packed.tolist() == want


@pytest.mark.parametrize("search", ["grid", "nearest"])
def test_absmax_in_8_bits_is_the_nearest(search):
    absmax = torch.rand(700) + 0.1
    codes, second = nf4.quantise_absmax(absmax, search)
    scale = second["absmax2"].double().repeat_interleave(256)[:700]
    target = (absmax - second["offset"]).double() / scale
    distance = (target[:, None] - second["code"].double()).abs()
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    slack = 2**-15 if search == "grid" else 2**-22  # a step of the grid, twice; the rounding of what is searched for
    assert (chosen <= distance.min(1).values + slack).all()
    assert len(second["absmax2"]) == 3 and torch.equal(second["offset"], absmax.mean())


# ---- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(64, 256), (33, 127), (7, 300), (5, 1), (520, 67)])
@pytest.mark.parametrize("double", [False, True])
def test_dequantised_is_what_the_kernels_make(device, shape, double):
    pytest.importorskip("triton", reason="the kernels are in Triton")
    w = torch.randn(shape, device=device)
    for dtype, block in itertools.product((torch.float32, torch.bfloat16), (64, 256)):
        q = quantise_nf4(w, block, double=double)
        want = ops.dequantize_nf4(q.packed, q.absmax, shape, dtype, **keywords(q))
        got = dequantise_nf4(q, dtype)
        assert got.dtype == dtype and torch.equal(got, want)


# Its CPU kernels misread matrices whose rows are no whole number of blocks: as one line they are right.
@pytest.mark.parametrize("shape", [(64, 256), (1, 64 * 300 + 8), (1, 19)])
@pytest.mark.parametrize("double", [False, True])
def test_dequantised_is_what_bitsandbytes_makes(shape, double, bitsandbytes):
    w = torch.randn(shape)
    theirs = bitsandbytes.dequantize_4bit(
        *bitsandbytes.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double)
    )
    assert torch.equal(dequantise_nf4(quantise_nf4(w, double=double)), theirs)


def test_error_of_normal_weights():
    """That of the nearest codes in float64; larger blocks are worse, and absmax in 8 bits hardly is."""
    w = torch.randn(512, 512)

    def error(block, **options):
        return ((dequantise_nf4(quantise_nf4(w, block, **options)) - w).norm() / w.norm()).item()

    for block in (64, 128):
        blocks = w.view(-1, block).double()
        absmax = blocks.abs().amax(1, keepdim=True)
        squares = ((blocks / absmax)[..., None] - torch.tensor(NF4).double()).abs().amin(-1) * absmax
        assert abs(error(block) - (squares.norm() / w.norm()).item()) <= 1e-5
    assert error(32) < error(64) < error(128) < error(1024)
    assert error(64) < error(64, double=True) <= error(64) + 5e-4


def test_what_is_exact():
    codes = nf4.nf4_codes() * 0.75
    w = codes.repeat(8).view(4, 32)
    assert torch.equal(dequantise_nf4(quantise_nf4(w)), w)
    zeros = torch.zeros(3, 50)
    assert torch.equal(dequantise_nf4(quantise_nf4(zeros)), zeros)
    error = dequantise_nf4(quantise_nf4(zeros, double=True)).abs().max()
    assert error <= 1e-37


@pytest.mark.parametrize("shape", [(0,), (0, 64), (6, 0)])
@pytest.mark.parametrize("double", [False, True])
def test_empty(shape, double):
    q = quantise_nf4(torch.zeros(shape), double=double)
    assert dequantise_nf4(q).shape == shape and q.packed.numel() == q.absmax.numel() == 0
    assert not double or q.offset == 0


def test_no_gradient_and_no_change():
    w = torch.randn(5, 13, requires_grad=True)
    before = w.detach().clone()
    q = quantise_nf4(w, double=True)
    assert torch.equal(w, before) and not any(x.requires_grad for x in (q.packed, q.offset, dequantise_nf4(q)))
    q.code.zero_()  # of this tensor alone
    assert nf4.dynamic_codes()[-1] == 1


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_gpu_makes_the_same_bytes(device):
    w = torch.randn(130, 67)
    here, there = (quantise_nf4(x, double=True) for x in (w, w.to(device)))
    assert torch.equal(here.packed, there.packed.cpu())
    torch.testing.assert_close(dequantise_nf4(here), dequantise_nf4(there).cpu(), rtol=1e-3, atol=1e-3)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_refused():
    w = torch.randn(4, 33)
    for block in (0, 16, 60, 8192, 64.5, None):
        with pytest.raises(ValueError, match=f"block {block}: expected one of 32, 64, 128"):
            quantise_nf4(w, block)
    for wrong in (math.nan, math.inf, -math.inf):
        bad = w.clone()
        bad[2, 5] = bad[3, 1] = wrong
        with pytest.raises(
            ValueError, match=r"blocks.3.up has 2 numbers that are NaN or infinite, the first at \[2, 5\]"
        ):
            quantise_nf4(bad, name="blocks.3.up")
    for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"head is {dtype}: expected one of torch.float32"):
            quantise_nf4(w.to(dtype), name="head")
    with pytest.raises(ValueError, match="search 'best': expected one of grid, nearest"):
        quantise_nf4(w, double=True, search="best")
    q = quantise_nf4(w)
    with pytest.raises(ValueError, match=r"66 bytes with 3 absmax: expected 68 with 3 for the shape \(4, 34\)"):
        NF4Tensor(q.packed, q.absmax, (4, 34))
    with pytest.raises(ValueError, match="66 bytes with 3 absmax: expected 66 with 2"):
        NF4Tensor(q.packed, q.absmax, (4, 33), 128)
    with pytest.raises(ValueError, match="absmax is torch.uint8: expected absmax2, offset and code beside uint8 alone"):
        NF4Tensor(q.packed, q.absmax.to(torch.uint8), (4, 33))
    with pytest.raises(ValueError, match="absmax is torch.float32: expected absmax2"):
        NF4Tensor(q.packed, q.absmax, (4, 33), offset=torch.zeros(()))
