"""Float8 in Triton: the casts bit by bit, the product against float64 and torch, the linear layer's three products.

On the CPU Triton's interpreter runs the kernels; on a machine with a Hopper GPU the same cases run there too. What its
compiler makes for Hopper is read from the machine code.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from cuda import device as device_of
from cuda.device import TritonPlace
from cuda.fp8_ops import FLOAT8, fp8_linear, fp8_matmul, quantize_fp8
from cuda.triton_compat import compiling
from cuda.triton_fp8 import LARGEST, reference_matmul, reference_quantize
from tests.cuda import sass
from tests.cuda.products import DEVICES, TOLERANCE

E4M3, E5M2 = FLOAT8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def same_bits(got, want):
    """But for the bits of a NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    got, want = got.cpu(), want.cpu()
    nan = want.float().isnan()
    assert torch.equal(got.float().isnan(), nan)
    assert torch.equal(got.view(torch.uint8)[~nan], want.view(torch.uint8)[~nan])


def close(got, want, tolerance):
    """Against float64, relative to the largest number. A NaN fails."""
    assert got.shape == want.shape
    error = (got.double() - want).abs().max().item()
    assert error <= tolerance * want.abs().max().item(), error


def quantized(*shape, dtype=E4M3, scaling="tensor", device="cpu"):
    return quantize_fp8(torch.randn(shape).to(device), dtype=dtype, scaling=scaling)


# ---- scaling and casting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("dtype", FLOAT8)
def test_quantize_is_its_definition(device, dtype, scaling, transposed):
    for x_dtype, shape in zip(DTYPES, [(7, 33), (127, 130), (200, 1)], strict=True):
        x = (3 * torch.randn(shape)).to(device, x_dtype)
        x8, scale = quantize_fp8(x, scaling=scaling, dtype=dtype, transposed=transposed)
        want, want_scale = reference_quantize(x, scaling, dtype, transposed)
        assert torch.equal(scale, want_scale)
        same_bits(x8, want)
        assert x8.shape[1] == 1 or x8.stride(1) == 1
        assert x8.stride(0) % 16 == 0


def test_quantize_against_what_float8_can_hold():
    """Not by the reference: the largest number of a row becomes that of the type, others keep their bits."""
    x = torch.randn(20, 90)
    for dtype, bits in ((E4M3, 3), (E5M2, 2)):
        x8, scale = quantize_fp8(x, scaling="row", dtype=dtype)
        assert scale.shape == (20, 1) and torch.equal(x8.float().abs().amax(1), torch.full((20,), LARGEST[dtype]))
        least = torch.finfo(dtype).smallest_normal * scale
        error = (x8.float() * scale - x).abs()
        assert (error <= 1.001 * 2.0 ** -(bits + 1) * torch.maximum(x.abs(), least)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_wider_than_a_block(device):
    x = torch.randn(3, 9001, device=device)
    x[1, 9000] = 1000.0  # the largest lies in the second block
    x8, scale = quantize_fp8(x, scaling="row")
    want, want_scale = reference_quantize(x, "row", E4M3, False)
    assert torch.equal(scale, want_scale)
    same_bits(x8, want)


@pytest.mark.parametrize(("shape", "scaling", "transposed"), [((2200, 20), "row", True), ((700, 600), "tensor", False)])
def test_more_blocks_than_programs(shape, scaling, transposed):
    x = torch.randn(shape) * torch.logspace(-3, 0, shape[0])[torch.randperm(shape[0])][:, None]
    x8, scale = quantize_fp8(x, scaling=scaling, transposed=transposed)
    want, want_scale = reference_quantize(x, scaling, E4M3, transposed)
    assert torch.equal(scale, want_scale)
    same_bits(x8, want)


@pytest.mark.parametrize("transposed", [False, True])
def test_more_maxima_than_are_read_at_once(transposed):
    """As on a GPU with more multiprocessors: 32 parts of a column at once, or 256 of all."""
    x = torch.randn(4800, 2)
    x[0, 0] = 100.0  # the largest lies in what is read first, that of the other column in what is read last
    x[-1, 1] = 50.0
    x8 = torch.empty(x.shape[::-1] if transposed else x.shape, dtype=E4M3)
    scale = torch.empty((2, 1) if transposed else ())
    place = TritonPlace("interpreter", 80, x.device)
    place.run("quantize_fp8", x=x, y=x8, scale=scale, per_row=transposed, transposed=transposed)
    same_bits(x8, reference_quantize(x, "row" if transposed else "tensor", E4M3, transposed)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_numbers_that_are_not_usual(device, scaling, transposed):
    """NaN stays and does not count; zeros have the scale 1; an infinity leaves nothing; the smallest numbers are 0."""
    x = torch.randn(6, 20)
    x[0, 3] = math.nan
    x[1] = 0
    x[2] = math.nan
    x[3] = 1e-43
    x = (x.mT.contiguous() if transposed else x).to(device)
    x8, scale = quantize_fp8(x, scaling=scaling, transposed=transposed)
    want, want_scale = reference_quantize(x, scaling, E4M3, transposed)
    same_bits(x8, want)
    assert torch.equal(scale, want_scale) and scale.isfinite().all() and (scale > 0).all()
    if scaling == "row":
        assert scale[1] == 1 and scale[2] == 1 and x8[2].float().isnan().all()
    x[0, 0] = -math.inf
    x8, scale = quantize_fp8(x, scaling=scaling, transposed=transposed)
    infinite = scale.expand(6, 20).isinf()
    assert infinite.any() and (x8.float() * scale)[infinite].isnan().all()


def test_quantize_rows_that_lie_apart():
    x = torch.randn(12, 50)[::2, 3:30]
    for transposed in (False, True):
        x8, _ = quantize_fp8(x, scaling="row", transposed=transposed)
        same_bits(x8, reference_quantize(x, "row", E4M3, transposed)[0])


def test_quantize_nothing():
    for shape in ((0, 5), (5, 0), (0, 0)):
        x8, scale = quantize_fp8(torch.empty(shape), scaling="row")
        assert x8.shape == shape and torch.equal(scale, torch.ones(shape[0], 1))
        x8, scale = quantize_fp8(torch.empty(shape), transposed=True)
        assert x8.shape == shape[::-1] and scale == 1


# ---- the product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_number_is_multiplied_as_torch_reads_it(dtype):
    """Normal, subnormal, infinite and NaN, from either side."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype)
    one, scale = torch.zeros(16, 16).to(dtype), torch.tensor(1.0)
    one[0, 0] = 1.0
    column = torch.zeros(256, 16).to(dtype)
    column[:, 0] = numbers
    options = {"out_dtype": torch.float32}
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(fp8_matmul(column, one.mT, scale, scale, **options)[:, 0], numbers.float(), **same)
    torch.testing.assert_close(fp8_matmul(one, column.mT, scale, scale, **options)[0], numbers.float(), **same)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("types", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2)])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_product(device, types, scaling):
    tolerance = 1e-6 if device == "cpu" else 2e-3  # tensor cores keep 14 bits within 128 of k
    for m, n, k in ((1, 1, 1), (7, 33, 127), (130, 70, 300), (600, 130, 32)):
        a, scale_a = quantized(m, k, dtype=types[0], scaling=scaling, device=device)
        b, scale_b = quantized(n, k, dtype=types[1], scaling=scaling, device=device)
        scale_b = scale_b.mT if scaling == "row" else scale_b
        d = fp8_matmul(a, b.mT, scale_a, scale_b, out_dtype=torch.float32)
        close(d, reference_matmul(a, b.mT, scale_a, scale_b), tolerance)


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_scales_of_two_kinds_bias_and_type(out_dtype):
    a, scale_a = quantized(40, 64, scaling="row")
    b, scale_b = quantized(50, 64)
    bias = torch.randn(50).to(out_dtype)
    for x, y, sx, sy in ((a, b, scale_a, scale_b), (b, a, scale_b, scale_a.mT)):
        given = bias if len(y) == 50 else bias[:40].clone()
        d = fp8_matmul(x, y.mT, sx, sy, bias=given, out_dtype=out_dtype)
        assert d.dtype == out_dtype
        close(d, reference_matmul(x, y.mT, sx, sy, given), TOLERANCE[out_dtype])


def test_product_is_that_of_torch():
    a, scale_a = quantized(32, 64, scaling="row")
    b, scale_b = quantized(48, 64, scaling="row")
    want = torch._scaled_mm(a, b.mT, scale_a, scale_b.mT, out_dtype=torch.bfloat16)
    got = fp8_matmul(a, b.mT, scale_a, scale_b.mT)
    assert (got.float() - want.float()).abs().max() <= 2**-8 * want.float().abs().max()


def test_columns_outside_of_an_operand_are_not_read():
    """A view of wider rows: what lies beside it is NaN."""
    wide = torch.full((20, 64), math.nan).to(E4M3)
    wide[:, :24] = torch.randn(20, 24).to(E4M3)
    x, scale = wide[:, :24], torch.tensor(1.0)
    close(fp8_matmul(x, x.mT, scale, scale, out_dtype=torch.float32), reference_matmul(x, x.mT, scale, scale), 1e-6)


def only_written(wide, inside):
    """The tensor was all 5 before."""
    written = torch.zeros_like(wide, dtype=torch.bool)
    written.as_strided(inside.shape, inside.stride(), inside.storage_offset()).fill_(True)
    assert (wide.float()[~written] == 5).all() and not (wide.float()[written] == 5).all()


def test_nothing_is_written_outside():
    a, b, scale = quantized(7, 20)[0], quantized(5, 20)[0], torch.tensor(1.0)
    place, wide = device_of.place(a.device, kernels="triton"), torch.full((12, 9), 5.0)
    d = wide[2:9, 1:6]
    place.run("fp8_matmul", a=a, b=b.mT, scale_a=scale, scale_b=scale, bias=None, d=d, imprecise=128)
    only_written(wide, d)
    for per_row, transposed in ((True, False), (True, True), (False, False), (False, True)):
        wide, scales = torch.full((12, 9), 5.0).to(E4M3), torch.full((9,), 5.0)
        y, scale = wide[2:9, 1:6], scales[1:8] if per_row else scales[1:2]
        x = torch.randn(5, 7) if transposed else torch.randn(7, 5)
        place.run("quantize_fp8", x=x, y=y, scale=scale, per_row=per_row, transposed=transposed)
        only_written(wide, y)
        only_written(scales, scale)


def test_empty_products():
    scale, bias = torch.tensor(1.0), torch.randn(4).bfloat16()
    for m, n in ((0, 4), (3, 0)):
        a, b = torch.empty(m, 16).to(E4M3), torch.empty(n, 16).to(E4M3)
        assert fp8_matmul(a, b.mT, scale, scale).shape == (m, n)
    a, b = torch.empty(3, 0).to(E4M3), torch.empty(4, 0).to(E4M3)
    assert torch.equal(fp8_matmul(a, b.mT, scale, scale), torch.zeros(3, 4).bfloat16())
    assert torch.equal(fp8_matmul(a, b.mT, scale, scale, bias=bias), bias.expand(3, 4))


# ---- the linear layer ------------------------------------------------------------------------------------------------


def cast(x, scaling, dtype):
    x8, scale = reference_quantize(x, scaling, dtype, False)
    return x8.double() * scale.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad_dtype", FLOAT8)
@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_three_products(device, dtype, scaling, grad_dtype):
    """Each of operands that were cast along the dimension that it sums over."""
    x = torch.randn(3, 11, 20).to(device, dtype).requires_grad_()
    weight = torch.randn(30, 20).to(device, dtype).requires_grad_()
    grad = torch.randn(30, 33).to(device, dtype).mT.view(3, 11, 30)  # as autograd may hand it over
    y = fp8_linear(x, weight, scaling=scaling, grad_dtype=grad_dtype)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (dtype,) * 3
    rows, w, g = x.detach().view(33, 20), weight.detach(), grad.reshape(33, 30)
    rounding = max(TOLERANCE[dtype], 0 if device == "cpu" else 2e-3)
    close(y.view(33, 30), cast(rows, scaling, E4M3) @ cast(w, scaling, E4M3).mT, rounding)
    close(grad_x.view(33, 20), cast(g, scaling, grad_dtype) @ cast(w.mT, scaling, E4M3).mT, rounding)
    close(grad_weight, cast(g.mT, scaling, grad_dtype) @ cast(rows.mT, scaling, E4M3).mT, rounding)


def test_linear_is_near_the_product():
    x, weight = torch.randn(64, 96, requires_grad=True), torch.randn(80, 96, requires_grad=True)
    grad = torch.randn(64, 80)
    y = fp8_linear(x, weight)
    got = (y, *torch.autograd.grad(y, (x, weight), grad))
    for one, want in zip(got, (x @ weight.mT, grad @ weight, grad.mT @ x), strict=True):
        assert (one - want).norm() <= 0.08 * want.norm()  # two roundings to 3 bits, or to 3 and 2


def test_linear_gives_what_is_asked_for():
    x, weight = torch.randn(5, 8), torch.randn(6, 8, requires_grad=True)
    fp8_linear(x, weight).sum().backward()  # its gradient is a one that is expanded
    close(weight.grad, x.double().sum(0).expand(6, 8), 0.05)
    x = torch.randn(2, 0, 8, requires_grad=True)
    fp8_linear(x, weight).sum().backward()
    assert x.grad.shape == x.shape
    x.grad = None
    with pytest.raises(RuntimeError):
        y = fp8_linear(torch.randn(5, 8, requires_grad=True), weight).sum()
        (g,) = torch.autograd.grad(y, weight, create_graph=True)
        g.sum().backward()


# ---- as torch's operations, and what is refused ----------------------------------------------------------------------


def test_operations_as_torch_wants_them():
    ops, opcheck = torch.ops.groundup, torch.library.opcheck
    x, weight = torch.randn(9, 32, requires_grad=True), torch.randn(5, 32, requires_grad=True)
    opcheck(ops.quantize_fp8.default, (torch.randn(9, 33), "row", E5M2, True))
    a, scale_a = quantize_fp8(x.detach())
    b, scale_b = quantize_fp8(weight.detach(), scaling="row")
    arguments = (a, b.mT, scale_a, scale_b.mT, torch.randn(5).half(), torch.float16, 128)
    kinds = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(ops.fp8_matmul.default, arguments, test_utils=kinds)  # test_schema adds float8s, which torch cannot
    opcheck(ops.fp8_linear.default, (x, weight, "row", E5M2, None))
    operands = (torch.randn(9, 5), x.detach(), weight.detach())
    opcheck(ops.fp8_linear_backward.default, (*operands, "tensor", E4M3, 128, True, False))


A, B, ONE = torch.zeros(4, 32).to(E4M3), torch.zeros(16, 32).to(E4M3).mT, torch.tensor(1.0)
REFUSED = {
    "x is torch.float64": lambda: quantize_fp8(torch.zeros(2, 2).double()),
    r"x has shape \(2,\)": lambda: quantize_fp8(torch.zeros(2)),
    "x has strides": lambda: quantize_fp8(torch.zeros(4, 6).mT),
    "x requires a gradient": lambda: quantize_fp8(torch.zeros(2, 2, requires_grad=True)),
    "scaling 'block'": lambda: quantize_fp8(torch.zeros(2, 2), scaling="block"),
    "dtype torch.float16": lambda: quantize_fp8(torch.zeros(2, 2), dtype=torch.float16),
    "a is torch.float32": lambda: fp8_matmul(A.float(), B, ONE, ONE),
    "b has strides": lambda: fp8_matmul(A, B.contiguous(), ONE, ONE),
    "a has strides": lambda: fp8_matmul(A[:, 1:17], B[:16], ONE, ONE),
    "a row-major matrix, each row": lambda: fp8_matmul(torch.zeros(1, 20).to(E4M3), B[:20], ONE, ONE),
    "expected as many columns of a": lambda: fp8_matmul(A, B[:16], ONE, ONE),
    r"scale_a has shape \(4,\)": lambda: fp8_matmul(A, B, torch.ones(4), ONE),
    r"scale_b has shape \(16, 1\)": lambda: fp8_matmul(A, B, ONE, torch.ones(16, 1)),
    "scale_b has strides": lambda: fp8_matmul(A, B, ONE, torch.ones(1, 32)[:, ::2]),
    "scale_a is torch.float64": lambda: fp8_matmul(A, B, ONE.double(), ONE),
    r"bias has shape \(4,\)": lambda: fp8_matmul(A, B, ONE, ONE, bias=torch.zeros(4).bfloat16()),
    "bias is torch.float32": lambda: fp8_matmul(A, B, ONE, ONE, bias=torch.zeros(16)),
    "out_dtype torch.float64": lambda: fp8_matmul(A, B, ONE, ONE, out_dtype=torch.float64),
    "max_num_imprecise_acc 100": lambda: fp8_matmul(A, B, ONE, ONE, max_num_imprecise_acc=100),
    "scale_a is on meta": lambda: fp8_matmul(A, B, ONE.to("meta"), ONE),
    "weight is torch.float16": lambda: fp8_linear(torch.zeros(2, 3), torch.zeros(4, 3).half()),
    r"weight \(4, 2\)": lambda: fp8_linear(torch.zeros(2, 3), torch.zeros(4, 2)),
    "grad_dtype torch.float32": lambda: fp8_linear(torch.zeros(2, 3), torch.zeros(4, 3), grad_dtype=torch.float32),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_refused_before_hopper():
    with compiling(80), pytest.raises(RuntimeError, match=r"capability 9\.0"):
        quantize_fp8(torch.zeros(2, 2))


# ---- what is compiled for Hopper -------------------------------------------------------------------------------------


def machine_code(compiled, folder):
    """The one kernel in what Triton made, with its instructions."""
    path = folder / f"{compiled.name}.cubin"
    path.write_bytes(compiled.kernel.asm["cubin"])
    (kernel,) = sass.disassemble(path, sass.kernels(path))
    assert sass.memory_faults(kernel) == []
    return kernel


needs_tools = pytest.mark.skipif(
    bool(sass.missing("cuobjdump", "nvdisasm")), reason=sass.missing("cuobjdump", "nvdisasm") or "found"
)


@needs_tools
@pytest.mark.parametrize(("types", "promotion"), [((E4M3, E4M3), 128), ((E4M3, E4M3), None), ((E5M2, E4M3), 128)])
def test_product_in_machine_code(tmp_path, types, promotion):
    a, b = torch.empty(512, 768).to(types[0]), torch.empty(512, 768).to(types[1])
    with compiling(90) as found:
        fp8_matmul(a, b.mT, torch.ones(512, 1), ONE, max_num_imprecise_acc=promotion)
    kernel = machine_code(found[0], tmp_path)
    names = ".".join({E4M3: "E4M3", E5M2: "E5M2"}[dtype] for dtype in types)
    width = 256 if promotion is None else 128
    assert kernel.count(rf"QGMMA\.64x{width}x32\.F32\.{names}") == 4  # 128 of k, and nothing else multiplies
    assert kernel.count("HGMMA") == kernel.count("HMMA") == kernel.count("QMMA") == 0
    assert kernel.count("FADD") == (0 if promotion is None else 64)  # the promoted sums of 128 x 128 on 256 threads
    assert kernel.count("UTMALDG") and kernel.count(r"STG\.E\.128")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_grid_of_many_columns(transposed):
    """Its second dimension may be 65,535 at the most; columns may be more blocks than that."""
    x = torch.empty(2, 2**26, dtype=torch.bfloat16, device="meta")
    shape = (x.shape[1], 16) if transposed else x.shape
    y, scale = torch.empty(shape, dtype=E4M3, device="meta"), torch.empty((), device="meta")
    with compiling(90) as found:
        place = device_of.place(x.device, kernels="triton")
        place.run("quantize_fp8", x=x, y=y, scale=scale, per_row=False, transposed=transposed)
    assert [one.grid for one in found] == [(x.shape[1] // (64 if transposed else 512), 1)] * 2


@needs_tools
def test_quantize_in_machine_code(tmp_path):
    x = torch.empty(256, 768, dtype=torch.bfloat16)
    with compiling(90) as found:
        quantize_fp8(x, scaling="row")
        quantize_fp8(x, scaling="tensor")
        quantize_fp8(x, scaling="row", transposed=True)
    assert [compiled.name for compiled in found] == ["_quantize_rows", "_maxima", "_cast", "_maxima", "_cast"]
    for compiled in found:
        kernel = machine_code(compiled, tmp_path)
        assert kernel.count(r"LDG\.E\.128") >= 4
        if compiled.name != "_maxima":
            assert kernel.count(r"STG\.E\.128") >= 2
            assert kernel.count(r"F2FP\.SATFINITE\.E4M3") >= 16
