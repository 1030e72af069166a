"""NF4, int4 and int8 matrices in Triton against their definitions: the table from the normal distribution, weights
quantised and read back by a few lines of torch, products and gradients in float64, and bitsandbytes where it is there.

Weights must come back exactly. In 16 bits products may be 1.1 times as far off as torch's with the same weights
rounded to that type, or one rounding of the largest number.
"""

import itertools
import math
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels are in Triton")
from cuda import quantised_ops as ops
from cuda import triton_parts, triton_quantised_matmul
from cuda.triton_compat import compiling
from cuda.triton_quantised import reference
from tests.cuda import sass
from tests.cuda.products import DEVICES, normal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-9, torch.float16: 2**-12}
# (out, in): whole blocks; rows of odd length, so that bytes straddle them; rows that blocks straddle; one column
SHAPES = [(64, 256), (33, 127), (40, 96), (7, 300), (5, 1)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def nf4_table():
    """Eight quantiles of the normal distribution above 0, seven below, at equal steps of probability, which QLoRA's
    authors rounded to float32."""
    at = NormalDist().inv_cdf
    above, below = ([at(p) for p in torch.linspace(0.9677083, 0.5, n + 1)[:-1].tolist()] for n in (8, 7))
    table = torch.tensor(sorted([*above, *(-x for x in below), 0.0]), dtype=torch.float64)
    return (table / table.max()).float()


def nibbles(numbers):
    """Bytes of a line of numbers below 16, the first of a pair in the high half."""
    numbers = F.pad(numbers, (0, numbers.shape[-1] % 2)).to(torch.uint8)
    return numbers[..., ::2] << 4 | numbers[..., 1::2]


def quantise_nf4(w, block=64):
    """(packed, absmax, numbers)."""
    line = w.flatten()
    blocks = F.pad(line, (0, -len(line) % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp(min=1e-30)[:, None]
    numbers = (scaled[..., None] - torch.tensor(ops.NF4)).abs().argmin(-1).flatten()[: len(line)]
    return nibbles(numbers), absmax, numbers


def nest(absmax):
    """A second quantisation by any table of 256 numbers: {"absmax2", "offset", "code"}, codes, what they mean."""
    code, offset = torch.linspace(-1, 1, 256).pow(3), absmax.mean()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
    absmax2 = blocks.abs().amax(1)
    codes = ((blocks / absmax2[:, None])[..., None] - code).abs().argmin(-1).flatten()[: len(absmax)]
    meant = code[codes] * absmax2.repeat_interleave(256)[: len(absmax)] + offset
    return {"absmax2": absmax2, "offset": offset, "code": code}, codes.to(torch.uint8), meant


def nf4(shape, nested=False, block=64, device="cpu"):
    """(packed, absmax), keywords, and the weights in float32."""
    packed, absmax, numbers = quantise_nf4(torch.randn(shape), block)
    keywords, meant = {"block": block}, absmax
    if nested:
        more, absmax, meant = nest(absmax)
        keywords |= {name: x.to(device) for name, x in more.items()}
    w = reference(torch.tensor(ops.NF4)[numbers], meant, 0.0, block).view(shape)
    return (packed.to(device), absmax.to(device)), keywords, w.to(device)


def int4(shape, group=32, asymmetric=False, dtype=torch.float32, device="cpu"):
    rows, columns = shape
    groups = math.ceil(columns / group)
    numbers = torch.randint(16, shape)
    scales = (torch.rand(rows, groups) + 0.5).to(dtype)
    zeros = torch.randint(16, (rows, groups)).to(torch.uint8 if group == 64 else dtype) if asymmetric else None
    w = torch.stack(
        [
            reference(numbers[i].float(), scales[i].float(), zeros[i].float() if asymmetric else 8.0, group)
            for i in range(rows)
        ]
    )
    return (nibbles(numbers).to(device), scales.to(device), None if zeros is None else zeros.to(device)), w.to(device)


def int8(shape, device="cpu"):
    numbers, scales = torch.randint(-128, 128, shape, dtype=torch.int8), torch.rand(shape[0]) + 0.5
    return (numbers.to(device), scales.to(device)), (numbers * scales[:, None]).to(device)


def close(got, want, theirs):
    assert got.shape == want.shape == theirs.shape
    error = (got.double() - want).abs().max().item()
    limit = ROUNDING[got.dtype] * want.abs().max().item()
    if got.dtype != torch.float32:
        limit = max(limit, (theirs.double() - want).abs().max().item())
    assert error <= 1.1 * limit + 1e-7, (error, limit)


def both(product, x, w, bias=None):
    """Values and gradients of product(x, bias) against x @ w.T + bias."""
    leaves = [x] if bias is None else [x, bias]
    y = product(x, bias)
    dy = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    assert all(a.dtype == x.dtype for a in got)

    def definition(dtype):
        copies = [a.detach().to(dtype).requires_grad_() for a in leaves]
        y = F.linear(copies[0], w.to(dtype), *copies[1:])
        return [y, *torch.autograd.grad(y, copies, dy.to(dtype))]

    for one, want, theirs in zip(got, definition(torch.float64), definition(x.dtype), strict=True):
        close(one, want, theirs)


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_table_is_that_of_normal_quantiles():
    assert (torch.tensor(ops.NF4) - nf4_table()).abs().max() <= 2**-23  # scipy's last bit is scipy's


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 257)])
@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_nf4(device, shape, nested):
    for dtype, block in itertools.product(DTYPES, (64, 256)):
        quantised, keywords, w = nf4(shape, nested, block, device)
        assert torch.equal(ops.dequantize_nf4(*quantised, shape, dtype, **keywords), w.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_dequantize_nested_over_more_than_one_second_block(device):
    quantised, keywords, w = nf4((260, 67), True, 32, device)
    assert len(keywords["absmax2"]) == 3
    assert torch.equal(ops.dequantize_nf4(*quantised, (260, 67), torch.float32, **keywords), w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_dequantize_int4_and_int8(device, shape, asymmetric):
    for dtype, group in itertools.product(DTYPES, (32, 64, 128)):
        quantised, w = int4(shape, group, asymmetric, dtype, device)
        assert torch.equal(ops.dequantize_int4(*quantised, shape, dtype, group=group), w.to(dtype))
    quantised, w = int8(shape, device)
    assert torch.equal(ops.dequantize_int8(*quantised, torch.bfloat16), w.bfloat16())


# bitsandbytes 0.50 on CPUs misreads matrices whose rows are no whole number of blocks: as one line they are right.
@pytest.mark.parametrize("shape", [(64, 256), (1, 64 * 300 + 7)])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_are_those_of_bitsandbytes(shape, nested):
    theirs = pytest.importorskip("bitsandbytes").functional
    w = torch.randn(shape)
    with torch.compiler.set_stance("force_eager"):  # it would compile its quantiser, for longer than it then runs
        packed, state = theirs.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
    keywords = {}
    if nested:
        keywords = {"absmax2": state.state2.absmax, "offset": state.offset, "code": state.state2.code}
    got = ops.dequantize_nf4(packed, state.absmax, shape, torch.float32, **keywords)
    assert torch.equal(got, theirs.dequantize_4bit(packed, state))
    numbers = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()
    assert torch.equal(numbers[: w.numel()], quantise_nf4(w)[2]) and torch.equal(state.code, torch.tensor(ops.NF4))


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m", [1, 3, 33])
def test_nf4_product(device, dtype, shape, m):
    quantised, keywords, w = nf4(shape, nested=m == 3, device=device)
    x = normal(m, shape[1], dtype=dtype, device=device, grad=True)
    bias = normal(shape[0], dtype=dtype, device=device, grad=True) if m > 1 else None
    both(lambda x, bias: ops.nf4_matmul(x, *quantised, shape, bias=bias, **keywords), x, w, bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 256), (7, 127), (33, 96)])
@pytest.mark.parametrize("group, asymmetric", [(32, False), (64, True), (128, True)])
def test_int4_product(device, dtype, shape, group, asymmetric):
    for m in (2, 17):
        quantised, w = int4(shape, group, asymmetric, dtype, device)
        x = normal(m, shape[1], dtype=dtype, device=device, grad=True)
        bias = normal(shape[0], dtype=dtype, device=device, grad=True)
        both(lambda x, bias: ops.int4_matmul(x, *quantised, group=group, bias=bias), x, w, bias)  # noqa: B023


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, m", [((40, 256), 5), ((7, 127), 5), ((33, 96), 17)])
def test_int8_product(device, dtype, shape, m):
    quantised, w = int8(shape, device)
    x = normal(m, shape[1], dtype=dtype, device=device, grad=True)
    both(lambda x, bias: ops.int8_matmul(x, *quantised, bias=bias), x, w)


@pytest.mark.parametrize("device", DEVICES)
def test_many_rows_and_more_than_one_tile(device):
    shape = (150, 192)
    quantised, keywords, w = nf4(shape, True, device=device)
    x = normal(2, 67, 192, dtype=torch.bfloat16, device=device, grad=True)
    both(lambda x, bias: ops.nf4_matmul(x, *quantised, shape, **keywords), x, w)


@pytest.mark.parametrize("device", DEVICES)
def test_vectors_longer_than_a_step(device):
    for shape, block in (((2, 4256), 64), ((1, 4096 + 128), 32)):  # 4096 of 4 bits a step
        quantised, keywords, w = nf4(shape, True, block, device)
        x = normal(shape[1], dtype=torch.bfloat16, device=device, grad=True)
        both(lambda x, bias: ops.nf4_matmul(x, *quantised, shape, **keywords), x, w)  # noqa: B023


@pytest.mark.parametrize("device", DEVICES)
def test_operands_that_are_not_contiguous(device):
    shape = (24, 128)
    quantised, keywords, w = nf4(shape, device=device)
    wide = normal(4, 9, 130, device=device)
    for x in (
        wide[:, :, :128],
        wide[:, :, 2:],
        wide.mT[:, 1:129, :].mT,
        wide[::2, :1, 1:129],
        wide[0, :1, :1].expand(9, 128),
    ):
        product = ops.nf4_matmul(x, *quantised, shape, **keywords)
        close(product, x.double() @ w.double().T, product)
    x = normal(9, 128, device=device, grad=True)
    ops.nf4_matmul(x, *quantised, shape, **keywords).sum().backward()  # an expanded gradient
    close(x.grad, w.double().sum(0).expand(9, 128), x.grad)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(20, 1100), (1100, 20)])
def test_sums_in_parts(device, shape, monkeypatch):
    """W in parts of its columns in products, and of its rows in gradients; nothing is read that was not written."""
    parts = []

    def counted(place, m, n, k, tiling, _rule=triton_quantised_matmul._parts):
        parts.append(_rule(place, m, n, k, tiling)[0])
        return _rule(place, m, n, k, tiling)

    monkeypatch.setattr(triton_quantised_matmul, "_parts", counted)
    quantised, w = int8(shape, device)
    w = w / 64
    quantised = quantised[0], quantised[1] / 64
    x = normal(9, shape[1], dtype=torch.bfloat16, device=device, grad=True)
    bias = normal(shape[0], dtype=torch.bfloat16, device=device, grad=True)
    # Memory that was not written is then NaN; cuBLAS, which the definition takes on a GPU, may only warn.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        both(lambda x, bias: ops.int8_matmul(x, *quantised, bias=bias), x, w, bias)
    finally:
        torch.use_deterministic_algorithms(False)
    if device == "cpu":
        assert sorted(parts) == [1, 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(24, 128), (7, 127)])
def test_hundreds_of_rows_unpack_the_matrix_once(device, shape, monkeypatch):
    monkeypatch.setattr(triton_quantised_matmul, "MANY", 2)
    quantised, keywords, w = nf4(shape, True, device=device)
    for dtype in DTYPES:
        x, bias = (normal(*s, dtype=dtype, device=device, grad=True) for s in ((3, shape[1]), (shape[0],)))
        both(lambda x, bias: ops.nf4_matmul(x, *quantised, shape, bias=bias, **keywords), x, w, bias)
    same = normal(shape[1], device=device).expand(5, shape[1]).requires_grad_()
    y = ops.nf4_matmul(same, *quantised, shape, **keywords)
    close(y, same.detach().double() @ w.double().T, y)
    close(torch.autograd.grad(y.sum(), same)[0], w.double().sum(0).expand(5, shape[1]), same)  # rows that overlap


def test_the_reference_of_parts_is_what_is_added():
    parts, bias = torch.randn(3, 5, 700), torch.randn(700)
    for given in ((), (bias,)):
        y = torch.empty(5, 700)
        triton_parts.add(parts, y, *given)
        torch.testing.assert_close(y, triton_parts.reference(parts, *given))


def test_from_how_many_rows_on_it_is_unpacked():
    for rows, names in ((640, {"_multiply"}), (641, {"_dequantise", "persistent_03", "descriptor_02"})):
        with compiling(90) as found:
            ops.nf4_matmul(meta(rows, SIZE), *NF4, (SIZE, SIZE))
        assert {x.name for x in found} <= names | {"_add"} and found[0].name in ("_multiply", "_dequantise")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("m", [2, 12])
def test_a_bias_of_any_stride(device, m):
    quantised, w = int8((6, 64), device)
    x = normal(m, 64, device=device)
    for bias in (normal(12, device=device)[::2], normal(1, device=device).expand(6)):
        y = ops.int8_matmul(x, *quantised, bias=bias)
        close(y, x.double() @ w.double().T + bias, y)


@pytest.mark.parametrize("device", DEVICES)
def test_empty(device):
    quantised, keywords, w = nf4((6, 64), device=device)
    x = torch.zeros(0, 64, device=device, requires_grad=True)
    y = ops.nf4_matmul(x, *quantised, (6, 64), **keywords)
    y.sum().backward()
    assert y.shape == (0, 6) and x.grad.shape == (0, 64)
    bias = normal(6, device=device)
    numbers = torch.zeros(6, 0, dtype=torch.int8, device=device)
    assert torch.equal(
        ops.int8_matmul(normal(2, 0, device=device), numbers, torch.ones(6, device=device), bias=bias),
        bias.expand(2, 6),
    )
    x = normal(2, 5, device=device, grad=True)
    y = ops.int8_matmul(x, numbers.view(0, 6)[:, :5].reshape(0, 5), torch.ones(0, device=device))
    (dx,) = torch.autograd.grad(y, x, y)
    assert y.shape == (2, 0) and not dx.any()
    none = torch.zeros(0, dtype=torch.uint8, device=device)
    assert ops.dequantize_nf4(none, none.float(), (0, 64), torch.float16).shape == (0, 64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("m", [2, 12])
@pytest.mark.parametrize("columns", [128, 96])
def test_nan_and_infinity_stay(device, m, columns):
    shape = (20, columns)
    (packed, absmax), keywords, w = nf4(shape, device=device)
    x = normal(m, columns, device=device)
    x[1, 5], x[0, 7] = math.nan, math.inf
    y, want = ops.nf4_matmul(x, packed, absmax, shape), x @ w.T
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf()) and y[2:].isfinite().all()
    absmax[1] = math.nan
    w.view(-1)[64:128] = math.nan
    y = ops.nf4_matmul(normal(m, columns, device=device), packed, absmax, shape)
    assert torch.equal(y.isnan(), w.isnan().any(1).expand(m, 20))


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_odd_length_reads_nothing_of_the_next(device):
    (packed, absmax), _, _ = nf4((65, 33), device=device)
    absmax[33] = math.nan  # of the last row and no other
    x, dy = normal(3, 33, device=device, grad=True), normal(3, 65, device=device)
    y = ops.nf4_matmul(x, packed, absmax, (65, 33))
    assert y[:, :64].isfinite().all() and y[:, 64].isnan().all()
    assert torch.autograd.grad(y, x, dy)[0].isnan().all()


def test_known_to_torch():
    """Registered as torch wants it: fakes, gradients, no hidden changes."""
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    quantised, keywords, _ = nf4((6, 64), True)
    nested = (*quantised, None, *(keywords[name] for name in ("absmax2", "offset", "code")))
    sizes = ("nf4", 6, 64, 64)
    torch.library.opcheck(ops._dequantise, (*nested, *sizes, torch.bfloat16), test_utils=checks)
    x, bias = normal(2, 3, 64, grad=True), normal(6, grad=True)
    torch.library.opcheck(ops._multiply, (x, *nested, bias, *sizes), test_utils=checks)
    torch.library.opcheck(ops._multiply_backward, (normal(2, 3, 6), *nested, *sizes), test_utils=checks)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_refused():
    (packed, absmax), _, _ = nf4((6, 64))
    (nested_packed, codes), keywords, _ = nf4((6, 64), True)
    x = normal(2, 64)
    for arguments, changes, message in (
        ((x, packed, absmax, (6, 64)), {"block": 60}, "block 60: expected one of 32, 64"),
        ((x, packed, absmax, (6, 64)), {"offset": absmax[0]}, "absmax is torch.float32: expected torch.uint8"),
        ((x, packed, absmax, (6, 64)), {"bias": normal(7)}, r"bias has shape \(7,\): expected"),
        ((x, packed, absmax, (6, 64)), {"bias": normal(6).half()}, "bias is torch.float16"),
        ((x, packed, absmax, (6, 64, 1)), {}, r"shape \(6, 64, 1\)"),
        ((x, packed, absmax, (7, 64)), {}, "packed has shape .*expected 224 bytes"),
        ((x, packed.int(), absmax, (6, 64)), {}, "packed is torch.int32: expected torch.uint8"),
        ((x, packed, absmax[:5], (6, 64)), {}, r"absmax has shape \(5,\): expected \(6,\)"),
        ((x, packed, absmax.double(), (6, 64)), {}, "absmax is torch.float64"),
        ((x, packed, absmax.clone().requires_grad_(), (6, 64)), {}, "absmax requires a gradient"),
        ((x, packed, absmax.repeat(2)[::2], (6, 64)), {}, "absmax has strides"),
        ((x, nested_packed, codes, (6, 64)), keywords | {"code": None}, "code is None"),
        ((x, nested_packed, codes, (6, 64)), keywords | {"absmax2": normal(2)}, "absmax2 has shape"),
        ((x, nested_packed, codes, (6, 64)), keywords | {"offset": normal(2)}, "offset has shape"),
        ((x[:, :63], packed, absmax, (6, 64)), {}, r"x has shape \(2, 63\): expected \(.., 64\)"),
        ((x.double(), packed, absmax, (6, 64)), {}, "x is torch.float64"),
        ((x.to("meta"), packed, absmax, (6, 64)), {}, "x is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.nf4_matmul(*arguments, **changes)
    with pytest.raises(ValueError, match="dtype torch.float64"):
        ops.dequantize_nf4(packed, absmax, (6, 64), torch.float64)
    (packed, scales, zeros), _ = int4((6, 64), 32, True)
    for arguments, changes, message in (
        ((x, packed, scales, zeros), {"group": 16}, "group 16: expected one of 32, 64, 128"),
        ((x, packed, scales, zeros), {"group": 64}, r"scales has shape \(6, 2\): expected \(6, 1\)"),
        ((x, packed, scales, zeros.half()), {"group": 32}, "zeros is torch.float16"),
        ((x, packed.view(-1), scales, zeros), {"group": 32}, "packed .*expected two dimensions"),
        ((x[:, :62], packed, scales, zeros), {"group": 32}, "packed has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.int4_matmul(*arguments, **changes)
    with pytest.raises(ValueError, match="packed is torch.uint8: expected torch.int8"):
        ops.int8_matmul(normal(2, 32), packed, scales[:, 0].contiguous())


# ---- compiled for Hopper ---------------------------------------------------------------------------------------------


def meta(*shape, dtype=torch.bfloat16):
    """Memory that nobody reads."""
    return torch.empty(shape, dtype=dtype)


def machine_code(product, folder):
    """Of the first kernel of a product; another one may add up parts. Nothing may lie in local memory."""
    if reason := sass.missing("cuobjdump", "nvdisasm"):
        pytest.skip(reason)
    with compiling(90) as found:
        product()
    file = folder / "kernel.cubin"
    launch = found[0]
    file.write_bytes(launch.kernel.asm["cubin"])
    (kernel,) = sass.disassemble(file, sass.kernels(file))
    assert not sass.memory_faults(kernel)
    return kernel


SIZE = 1024
NF4 = meta(SIZE * SIZE // 2, dtype=torch.uint8), meta(SIZE * SIZE // 64, dtype=torch.float32)
CODES = meta(SIZE * SIZE // 64, dtype=torch.uint8)
NESTED = {name: meta(size, dtype=torch.float32) for name, size in (("absmax2", 64), ("offset", 1), ("code", 256))}
INT4 = meta(SIZE, SIZE // 2, dtype=torch.uint8), meta(SIZE, SIZE // 128), meta(SIZE, SIZE // 128)
INT8 = meta(SIZE, SIZE, dtype=torch.int8), meta(SIZE, dtype=torch.float32)
ODD = meta(999 * 500, dtype=torch.uint8), meta(15610, dtype=torch.float32)
WEIGHT = (NF4[0], CODES, None, *NESTED.values(), "nf4", SIZE, SIZE, 64)


@pytest.mark.parametrize(
    "product",
    [
        lambda x: ops.nf4_matmul(x, *NF4, (SIZE, SIZE)),
        lambda x: ops._multiply_backward(x, *WEIGHT),
        lambda x: ops.int4_matmul(x, *INT4),
        lambda x: ops.int8_matmul(x, *INT8),
        lambda x: ops.nf4_matmul(x[:, :999], *ODD, (1000, 999)),
    ],
    ids=["nf4", "backward", "int4", "int8", "straddling"],
)
def test_many_rows_run_on_tensor_cores(product, tmp_path):
    kernel = machine_code(lambda: product(meta(256, SIZE)), tmp_path)
    assert kernel.count("HGMMA") >= 4 and kernel.count("LDGSTS") >= 4  # and what they read is on its way meanwhile


@pytest.mark.parametrize(
    "product, m, rows",
    [
        (lambda x: ops.nf4_matmul(x, NF4[0], CODES, (SIZE, SIZE), **NESTED), 1, 4),
        (lambda x: ops.int4_matmul(x, *INT4), 8, 2),
        (lambda x: ops.int8_matmul(x, *INT8), 1, 4),
    ],
    ids=["nf4", "int4", "int8"],
)
def test_few_rows_read_16_bytes_at_a_time(product, m, rows, tmp_path):
    """W and x; and sums stay in a thread up to the last, of five shuffles in a warp and two between warps. Triton 3.6
    moves scales by some more; if weights moved, it would be a hundred shuffles a sum."""
    kernel = machine_code(lambda: product(meta(m, SIZE)), tmp_path)
    assert kernel.count(r"LDG\.E\.128") >= rows + m and kernel.count(r"LDG\.E\.U?8\b") <= rows
    assert kernel.count("SHFL") <= 12 * rows * m


def test_weights_are_written_16_bytes_at_a_time(tmp_path):
    kernel = machine_code(lambda: ops.dequantize_nf4(*NF4, (SIZE, SIZE), torch.bfloat16), tmp_path)
    assert kernel.count(r"STG\.E\.128") >= 4 and kernel.count(r"LDG\.E\.128") >= 1
