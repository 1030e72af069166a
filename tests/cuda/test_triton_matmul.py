"""ops.matmul by the kernels in Triton: in the interpreter against float64, and what the compiler makes of them."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from cuda import matmul_ops, ops, triton_dispatch
from cuda.device import place
from cuda.linear import TritonLinear
from cuda.triton_compat import compiling
from cuda.triton_dispatch import SPECIALISED, STEPS, Details, Size
from cuda.triton_matmul import reference as definition
from cuda.triton_tilings import SHARED, Tiling
from tests.cuda import sass
from tests.cuda.products import DEVICES, TOLERANCE, check, normal, reference

ROOT = Path(__file__).resolve().parents[2]
SMALL = Tiling(16, 32, 16, 4, 2)  # so that a small product has many tiles
WIDE = Tiling(128, 256, 64, 8, 4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def multiplied(step, a, b, out=None, columns=None, device="cpu", **more):
    """By `multiply` itself, into memory whose rows are longer than d: what lies between them must stay."""
    batch = max((x.shape[0] for x in (a, b) if x.ndim == 3), default=None)
    shape = (a.shape[-2], columns or b.shape[-1])
    room = torch.full((*([batch] if batch else []), shape[0], shape[1] + 24), 7.0, dtype=out or a.dtype, device=device)
    d = room[..., : shape[1]]
    place(a.device, step, kernels="triton").multiply(step, a, b, d, **more)
    assert (room[..., shape[1] :] == 7).all()
    return d


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_all_of_the_epilogue(device, dtype, step, activation):
    a, b, bias = (normal(*s, dtype=dtype, device=device) for s in ((2, 33, 40), (2, 18, 40), (18,)))
    c = normal(2, 33, 9 if activation == "swiglu" else 18, dtype=dtype, device=device)
    more = {"bias": bias, "alpha": 0.5, "activation": activation, "step": step, "kernels": "triton"}
    got = ops.matmul(a, b.mT, c=c, beta=-2.0, **more)
    assert got.dtype == dtype
    want = reference(a, b.mT, c, bias, 0.5, -2.0, activation)
    check(got, want, TOLERANCE[dtype])
    check(definition(a.double(), b.double().mT, c=c, bias=bias, alpha=0.5, beta=-2.0, activation=activation), want, 0)
    wide = ops.matmul(a, b.mT, out_dtype=torch.float32, **more)
    assert wide.dtype == torch.float32
    check(wide, reference(a, b.mT, None, bias, 0.5, 0.0, activation), 2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
@pytest.mark.parametrize("step", STEPS)
def test_many_tiles_in_every_layout(device, step, transposed):
    """Ten rows of tiles: a group of eight, and what is left. Rows of d that are apart, in TMA's strides."""
    m, n, k = 152, 40, 40
    dtype = torch.bfloat16
    a = normal(k, m, dtype=dtype, device=device).mT if "a" in transposed else normal(m, k, dtype=dtype, device=device)
    b = normal(n, k, dtype=dtype, device=device).mT if "b" in transposed else normal(k, n, dtype=dtype, device=device)
    check(multiplied(step, a, b, device=device, tiling=SMALL), reference(a, b), TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("b_transposed", [False, True])
def test_specialised_warps(device, b_transposed):
    """On a GPU in a process of its own: warp groups that wait for each other could wait for ever."""
    if device == "cpu":
        specialised_warps(device, b_transposed)
        return
    code = f"from tests.cuda import test_triton_matmul as t; t.specialised_warps({device!r}, {b_transposed})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def specialised_warps(device, b_transposed):
    a, b = (normal(*s, dtype=torch.bfloat16, device=device) for s in ((150, 72), (72, 264)))
    b = b.mT.contiguous().mT if b_transposed else b
    bias = normal(264, dtype=torch.bfloat16, device=device)
    got = multiplied("persistent_03", a, b, device=device, tiling=SPECIALISED, bias=bias, alpha=0.5)
    check(got, reference(a, b, None, bias, 0.5), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (1, 24, 5), (24, 1, 5), (7, 9, 1), (130, 67, 33)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("step", [None, "split_k_04"])
def test_odd_sizes(m, n, k, dtype, step):
    a, b = normal(m, k, dtype=dtype), normal(k, n, dtype=dtype)
    check(ops.matmul(a, b, step=step, kernels="triton"), reference(a, b), TOLERANCE[dtype])


def layouts(rows, columns):
    normal_16 = {"dtype": torch.bfloat16}
    return {
        "padded": normal(rows, columns + 8, **normal_16)[:, :columns],
        "padded transposed": normal(columns, rows + 8, **normal_16)[:, :rows].mT,
        "shifted": normal(rows, columns + 3, **normal_16)[:, 3:],
        "every second row": normal(rows, 2, columns, **normal_16)[:, 1],
        "unaligned": normal(rows * columns + 1, **normal_16)[1:].view(rows, columns),
    }


@pytest.mark.parametrize("of_a", layouts(1, 1))
@pytest.mark.parametrize("of_b", layouts(1, 1))
def test_layouts_are_read_off_the_strides(of_a, of_b):
    a, b = layouts(24, 16)[of_a], layouts(16, 40)[of_b]
    check(ops.matmul(a, b, kernels="triton"), reference(a, b), TOLERANCE[torch.bfloat16])
    if "shifted" not in (of_a, of_b) and "unaligned" not in (of_a, of_b):
        check(ops.matmul(a, b, step=2, kernels="triton"), reference(a, b), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("a_shape, b_shape", [((3, 8, 16), (16, 8)), ((8, 16), (3, 16, 8)), ((3, 8, 16), (1, 16, 8))])
@pytest.mark.parametrize("step", STEPS)
def test_a_batch_shares_a_matrix(a_shape, b_shape, step):
    a, b = normal(*a_shape, dtype=torch.float16), normal(*b_shape, dtype=torch.float16)
    check(ops.matmul(a, b, step=step, kernels="triton"), reference(a, b), TOLERANCE[torch.float16])


@pytest.mark.parametrize("step", STEPS)
def test_a_batch_with_strides_of_zero_and_out_of_order(step):
    a = normal(8, 16, dtype=torch.bfloat16).expand(3, 8, 16)
    b = normal(16, 3, 8, dtype=torch.bfloat16).permute(1, 0, 2)  # as heads come out of an attention layer
    check(ops.matmul(a, b, step=step, kernels="triton"), reference(a, b), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("step", [None, *STEPS])
def test_sums_are_added_to_where_they_lie(step):
    """What a weight's gradient needs, chunk by chunk: float32, rows that are apart, c and d the same memory."""
    a, b, room = normal(24, 40, dtype=torch.bfloat16), normal(40, 16, dtype=torch.bfloat16), normal(24, 19)
    before, d = room.clone(), room[:, :16]
    place(a.device, kernels="triton").multiply(step, a, b, d, c=d, beta=1.0)
    check(d, reference(a, b) + before[:, :16], 2e-6)
    assert torch.equal(room[:, 16:], before[:, 16:])


@pytest.mark.parametrize("k", [64, 200, 1000])
def test_slices_of_k_are_added_in_one_order(k):
    a, b = normal(20, k), normal(k, 24)
    got = ops.matmul(a, b, step="split_k_04", kernels="triton")
    check(got, reference(a, b), 2e-6)
    assert torch.equal(got, ops.matmul(a, b, step="split_k_04", kernels="triton"))


def test_the_step_by_number_and_numpy_arrays():
    a, b = np.random.default_rng(0).normal(size=(2, 9, 12)).astype(np.float32)[0], np.ones((12, 7), np.float32)
    got = ops.matmul(a, b, kernels="triton")
    np.testing.assert_allclose(got, a @ b, rtol=1e-5, atol=1e-6)
    assert np.array_equal(got, ops.matmul(a, b, step=1, kernels="triton"))


@pytest.mark.parametrize("m, n, k", [(0, 4, 3), (3, 0, 4), (3, 4, 0)])
def test_empty_sizes_give_what_torch_gives(m, n, k):
    a, b, bias, c = (normal(*s, dtype=torch.bfloat16) for s in ((2, m, k), (k, n), (n,), (2, m, n)))
    got = ops.matmul(a, b, bias=bias, c=c, beta=0.5, activation="gelu", kernels="triton")
    want = reference(a, b, c, bias, 1.0, 0.5, "gelu")
    assert got.shape == want.shape and torch.allclose(got.double(), want, atol=2**-8, rtol=2**-8)


@pytest.mark.parametrize("step", STEPS)
def test_nan_and_infinity_arrive_where_they_should(step):
    a, b = normal(20, 16), normal(16, 24)
    a[3, 5], b[2, 7] = math.nan, math.inf
    got, want = ops.matmul(a, b, step=step, kernels="triton"), a @ b
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    untouched = ops.matmul(a, b, c=torch.full((20, 24), math.nan), beta=0, step=step, kernels="triton")
    assert torch.equal(untouched.isnan(), want.isnan())


# ---- gradients, torch.library, a layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("a_shape, b_shape", [((7, 10), (10, 6)), ((3, 7, 10), (10, 6)), ((1, 7, 10), (3, 10, 6))])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_equal_torchs(device, activation, a_shape, b_shape, dtype):
    columns = 3 if activation == "swiglu" else 6
    leaves = [normal(*s, dtype=dtype, device=device, grad=True) for s in (a_shape, b_shape, (6,), (7, columns))]
    a, b, bias, c = leaves
    options = {"alpha": 0.5, "beta": 2.0, "activation": activation}
    got = ops.matmul(a, b, bias=bias, c=c, **options, kernels="triton")
    weights = normal(*got.shape, dtype=dtype, device=device)
    gradients = torch.autograd.grad(got, leaves, weights)
    wanted = torch.autograd.grad(reference(a, b, c, bias, **options), leaves, weights.double())
    for gradient, wish in zip(gradients, wanted, strict=True):
        assert gradient.dtype == dtype
        check(gradient, wish, max(1e-5, 2 * TOLERANCE[dtype]))


def test_gradients_go_through_the_same_kernels(monkeypatch):
    seen = []
    monkeypatch.setattr(matmul_ops, "place", lambda *given: seen.append(given[3]) or place(*given))
    a, b = normal(3, 4, grad=True), normal(4, 6, grad=True)
    ops.matmul(a, b, activation="gelu", kernels="triton").sum().backward()
    assert seen == ["triton"] * 4  # the product, what came before its activation, two gradients


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    a, b = (normal(*s, dtype=torch.bfloat16, device=device, grad=True) for s in ((2, 8, 16), (16, 6)))
    bias = normal(6, dtype=torch.bfloat16, device=device, grad=True)
    given = (a, b, None, bias, 0.5, 0.0, "swiglu", torch.float32, None, "triton")
    assert set(torch.library.opcheck(matmul_ops._matmul, given).values()) == {"SUCCESS"}


def test_torch_compile_takes_it_whole():
    """Shapes and types of all that happens are known without running it: no break in the graph."""

    def block(x, up, down, gain):
        h = ops.rms_norm(x, gain, kernels="triton")
        h = ops.matmul(h, up.mT, activation="swiglu", kernels="triton")
        return ops.matmul(h, down.mT, kernels="triton").square().mean()

    given = [normal(*s, grad=True) for s in ((6, 16), (24, 16), (16, 12), (16,))]
    results = []
    for function in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        value = function(*given)
        results.append((value, *torch.autograd.grad(value, given)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_linear_equals_torchs():
    ours, theirs = TritonLinear(10, 6), torch.nn.Linear(10, 6)
    ours.load_state_dict(theirs.state_dict())
    x, y = (normal(2, 3, 10, grad=True) for _ in range(2))
    with torch.no_grad():
        y.copy_(x)
    for layer, at in ((ours, x), (theirs, y)):
        layer(at).square().sum().backward()
    check(x.grad, y.grad, 1e-5)
    check(ours.weight.grad, theirs.weight.grad, 1e-5)


# ---- what it refuses -------------------------------------------------------------------------------------------------

A, B = torch.ones(4, 6), torch.ones(6, 8)
D = torch.ones(2, 4, 8)


def by_triton(*operands, **more):
    return lambda: ops.matmul(*operands, kernels="triton", **more)


def into(d, *operands, **more):
    return lambda: place(A.device, kernels="triton").multiply("pointer_01", *operands, d, **more)


BAD = {
    "kernels": (lambda: ops.matmul(A, B, kernels="no"), "kernels 'no': expected one of cuda, triton"),
    "inner sizes": (by_triton(A, B.mT), r"a \(4, 6\) times b \(8, 6\): expected as many columns"),
    "step of CUDA C++": (by_triton(A, B, step="naive_01"), "step 'naive_01': expected None, 1 to 4, or one of p"),
    "number": (by_triton(A, B, step=5), "step 5: expected None, 1 to 4"),
    "step of Triton": (lambda: ops.matmul(A, B, step="pointer_01"), "step 'pointer_01': expected None, 1 to 16"),
    "both strided": (
        by_triton(torch.ones(8, 12)[::2, ::2], B),
        r"a: shape \(4, 6\) with strides \(24, 2\): expected rows without gaps.*transpose.*\.contiguous\(\)",
    ),
    "rows overlap": (by_triton(torch.ones(20).as_strided((4, 6), (2, 1)), B), r"a: .* strides \(2, 1\): expected"),
    "rows repeat": (by_triton(torch.ones(1, 6).expand(4, 6), B), r"strides \(0, 1\): .*\.contiguous\(\)"),
    "strided bias": (by_triton(A, B, bias=torch.ones(16)[::2]), r"bias: shape \(8,\) with strides \(2,\)"),
    "transposed c": (by_triton(A, B, c=torch.ones(8, 4).mT, beta=1), r"c: .* strides \(1, 4\): expected rows"),
    "misaligned": (
        by_triton(np.frombuffer(bytes(4 * 6 * 4 + 1), np.uint8)[1:].view(np.float32).reshape(4, 6), B.numpy()),
        "a: is misaligned: expected an address that is a multiple of 4",
    ),
    "TMA: a stride": (
        by_triton(torch.ones(4, 12).bfloat16()[:, :6], B.bfloat16(), step="persistent_03"),
        "row stride of a is 24 bytes, expected a multiple of 16",
    ),
    "TMA: an address": (
        by_triton(torch.ones(4, 16).bfloat16()[:, 1:7], B.bfloat16(), step="descriptor_02"),
        "address of a is 2 bytes past a multiple of 16",
    ),
    "room": (into(torch.ones(4, 8), D[..., :6], B), r"d: shape \(4, 8\): expected room for the whole batch"),
    "shape of d": (into(D[..., :7], D[..., :6], B), r"d: shape \(2, 4, 7\): expected \(4, 8\) or \(2, 4, 8\)"),
    "d overlaps": (
        into(torch.ones(40).as_strided((2, 4, 8), (8, 8, 1)), D[..., :6], B),
        r"d: .* strides \(8, 8, 1\): expected matrices that do not overlap",
    ),
    "no c": (into(D[0], A, B, beta=1.0), "beta 1.0 without c"),
    "tiling": (
        lambda: place(A.device, kernels="triton").multiply(
            "persistent_03", A[:, :4].contiguous(), B[:4], D[0], tiling=SPECIALISED
        ),
        r"tiling \(128, 256, 64, 4, 4\): expected another, or a product alone in 16 bits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


# ---- which step, which tiling ----------------------------------------------------------------------------------------


def chosen(m, n, k, dtype="bfloat16", kind="sm_90", tma=True):
    return triton_dispatch.choose_step(kind, Size(dtype, m, n, k), Details(2, False), 132, tma=tma)


def test_the_step_that_nobody_named():
    assert chosen(8192, 8192, 8192) == "persistent_03"
    assert chosen(1024, 1024, 1024) == "descriptor_02"
    assert chosen(256, 256, 16384) == chosen(64, 64, 16384, "float32") == "split_k_04"
    assert chosen(8192, 8192, 8192, tma=False) == chosen(8192, 8192, 8192, "float32") == "pointer_01"
    assert chosen(256, 256, 16384, kind="interpreter") == chosen(8192, 8192, 64, kind="sm_80") == "pointer_01"


def test_tilings_fit_and_fill():
    def first(step, m, n, k, kind="sm_90", dtype="bfloat16", **details):
        details = Details(**({"out_bytes": 2, "c": False} | details))
        tilings = triton_dispatch.candidates(step, kind, Size(dtype, m, n, k), details, 132)
        assert all(triton_dispatch.shared(t, step, Size(dtype, m, n, k), details) <= SHARED[kind] for t in tilings)
        return tilings[0]

    assert first("persistent_03", 8192, 8192, 8192) == WIDE
    assert first("persistent_03", 8192, 8192, 8192, c=True, out_bytes=4).stages == 3
    assert first("descriptor_02", 512, 512, 512)[:2] == (64, 64)
    assert first("split_k_04", 8, 4096, 4096).block_m == 64
    assert first("pointer_01", 8192, 8192, 8192, odd=True) == (128, 128, 32, 8, 4)
    assert first("pointer_01", 8192, 8192, 8192, kind="sm_80")[:2] == (128, 128)
    assert SPECIALISED in triton_dispatch.candidates(
        "persistent_03", "sm_90", Size("bfloat16", 512, 512, 512), Details(2, False, plain=True), 132
    )


# ---- what the compiler makes of it -----------------------------------------------------------------------------------


def compiled(step, tiling, m=4096, n=4096, k=4096, dtype=torch.bfloat16, out=None, activation="none", c=False):
    """The kernels of one product of a row-major A and a transposed B; nothing runs, nothing is read."""
    a, b, bias = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype).mT, torch.empty(n, dtype=dtype)
    d = torch.empty(m, n // 2 if activation == "swiglu" else n, dtype=out or dtype)
    more = {"c": d, "beta": 1.0} if c else {}
    with compiling(90) as found:
        here = place(a.device, step, kernels="triton")
        here.multiply(step, a, b, d, bias=bias, activation=activation, tiling=tiling, **more)
    return found


@pytest.mark.skipif(bool(sass.missing("cuobjdump", "nvdisasm")), reason=sass.missing("cuobjdump", "nvdisasm"))
@pytest.mark.parametrize(
    "step, tiling, more, tma, copies",
    [
        ("pointer_01", Tiling(128, 256, 64, 8, 3), {}, 0, 36),
        ("descriptor_02", WIDE, {"activation": "gelu"}, 2, 0),
        ("persistent_03", WIDE, {}, 2, 0),
        ("persistent_03", WIDE, {"activation": "swiglu"}, 2, 0),
        ("persistent_03", Tiling(128, 256, 64, 8, 3), {"out": torch.float32, "c": True}, 2, 0),
        ("persistent_03", SPECIALISED, {}, 2, 0),
    ],
)
def test_machine_code(step, tiling, more, tma, copies, tmp_path):
    [(name, _, made)] = compiled(step, tiling, **more)
    ptx = made.asm["ptx"]
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    [kernel] = sass.disassemble(tmp_path / "kernel.cubin", sass.kernels(tmp_path / "kernel.cubin"))
    assert not sass.memory_faults(kernel) and not sass.unfenced_stores(kernel)
    # A wait after each stage, one before a tile's sums are read, one at the end: not one after each wgmma.
    assert kernel.count(r"WARPGROUP\.DEPBAR") <= 3 and not kernel.count(r"HGMMA\.64x8x16")
    assert kernel.count(r"HGMMA\.64x256x16\.F32") >= 4
    assert kernel.count("UTMALDG") >= tma and ("UTMALDG" in " ".join(kernel.code)) == (tma > 0)
    assert kernel.count(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128") >= copies
    if "c" not in more and step != "pointer_01" and tiling != SPECIALISED:
        assert kernel.count("UTMASTG") >= 2  # half a tile each
    if tiling == SPECIALISED:
        assert name == "specialised_03" and kernel.count("USETMAXREG") >= 2
    else:  # one product is under way while the next stage is waited for
        assert re.search(r"wgmma\.wait_group\.sync\.aligned 1;", ptx)
    size = Size("bfloat16", 4096, 4096, 4096)
    details = Details(more.get("out", torch.bfloat16).itemsize, "c" in more)
    assert made.metadata.shared <= triton_dispatch.shared(tiling, step, size, details) <= 1.15 * made.metadata.shared
    estimate = triton_dispatch.registers(tiling, step, size, details)
    assert tiling == SPECIALISED or 0.7 * kernel.registers <= estimate <= 1.2 * kernel.registers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_machine_code_of_slices(dtype):
    *_, partial, last = compiled(None, None, m=256, n=256, k=16384, dtype=dtype)
    assert last.name == "sum_slices" and re.search(r"ld\.global\.v4", last.kernel.asm["ptx"])
    assert partial.name == "descriptor_02" and partial.grid[0] > 100
    assert ".local" not in partial.kernel.asm["ptx"] + last.kernel.asm["ptx"]
    assert ("wgmma.mma_async" in partial.kernel.asm["ptx"]) == (dtype == torch.bfloat16)
