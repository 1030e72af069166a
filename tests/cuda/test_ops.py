"""cuda.ops and cuda.dispatch against torch and numpy: what they compute, take and refuse.

The kernels themselves are held to float64 in test_matmul.py. Here everything runs on the CPU model through the same
door as on a GPU; tests marked gpu repeat the main ones there.
"""

import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided

pytest.importorskip("cuda._simt", reason="make native builds the kernels")

from cuda import device as device_of
from cuda import dispatch, modules, ops
from tests.cuda.products import DEVICES, TOLERANCE, check, normal, reference


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_all_of_the_epilogue(device, dtype, activation):
    a, b, bias = (normal(*s, dtype=dtype, device=device) for s in ((2, 33, 40), (2, 40, 18), (18,)))
    c = normal(2, 33, 9 if activation == "swiglu" else 18, dtype=dtype, device=device)
    got = ops.matmul(a, b, c=c, bias=bias, alpha=0.5, beta=-2.0, activation=activation)
    assert got.dtype == dtype
    check(got, reference(a, b, c, bias, 0.5, -2.0, activation), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wide_result_is_not_rounded(dtype):
    a, b = normal(17, 40, dtype=dtype), normal(40, 24, dtype=dtype)
    got = ops.matmul(a, b, out_dtype=torch.float32)
    assert got.dtype == torch.float32
    check(got, reference(a, b), 2e-6)


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (1, 24, 5), (24, 1, 5), (7, 9, 1), (130, 67, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes(m, n, k, dtype):
    a, b = normal(m, k, dtype=dtype), normal(k, n, dtype=dtype)
    check(ops.matmul(a, b), reference(a, b), TOLERANCE[dtype])


def layouts(rows, columns, dtype):
    """Name -> a view of `rows` x `columns` that the kernels read as it lies in memory."""
    return {
        "row-major": normal(rows, columns, dtype=dtype),
        "transposed": normal(columns, rows, dtype=dtype).mT,
        "padded": normal(rows, columns + 8, dtype=dtype)[:, :columns],
        "padded transposed": normal(columns, rows + 8, dtype=dtype)[:, :rows].mT,
        "shifted": normal(rows, columns + 3, dtype=dtype)[:, 3:],
        "every second row": normal(rows, 2, columns, dtype=dtype)[:, 1],
        "unaligned": normal(rows * columns + 1, dtype=dtype)[1:].view(rows, columns),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_a", layouts(1, 1, torch.float32))
@pytest.mark.parametrize("of_b", layouts(1, 1, torch.float32))
def test_layouts_are_read_off_the_strides(of_a, of_b, dtype):
    a, b = layouts(24, 16, dtype)[of_a], layouts(16, 40, dtype)[of_b]
    check(ops.matmul(a, b), reference(a, b), TOLERANCE[dtype])


@pytest.mark.parametrize("a_shape, b_shape", [((3, 8, 16), (16, 8)), ((8, 16), (3, 16, 8)), ((3, 8, 16), (1, 16, 8))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_shares_a_matrix(a_shape, b_shape, dtype):
    a, b = normal(*a_shape, dtype=dtype), normal(*b_shape, dtype=dtype)
    check(ops.matmul(a, b), reference(a, b), TOLERANCE[dtype])


def test_a_batch_with_strides_of_zero_and_out_of_order():
    a = normal(8, 16, dtype=torch.bfloat16).expand(3, 8, 16)
    b = normal(16, 3, 8, dtype=torch.bfloat16).permute(1, 0, 2)  # as heads come out of an attention layer
    check(ops.matmul(a, b), reference(a, b), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("step", dispatch.STEPS)
def test_each_step_by_name_and_by_number(step):
    dtype = dispatch.dtypes_of(step)[0]
    a, b = normal(40, 24, dtype=dtype), normal(24, 48, dtype=dtype)
    got = ops.matmul(a, b, step=step)
    check(got, reference(a, b), TOLERANCE[dtype])
    assert torch.equal(got, ops.matmul(a, b, step=dispatch.STEPS.index(step) + 1))


def test_numpy_arrays():
    a, b = np.random.default_rng(0).normal(size=(2, 9, 12)).astype(np.float32)[0], np.ones((12, 7), np.float32)
    got = ops.matmul(a, b)
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    np.testing.assert_allclose(got, a @ b, rtol=1e-5, atol=1e-6)
    half = ops.matmul(a.astype(np.float16), b.astype(np.float16), out_dtype=np.float32)
    np.testing.assert_allclose(half, a.astype(np.float16).astype(np.float32) @ b, rtol=1e-5, atol=1e-6)


def test_numpy_bfloat16_is_uint16():
    a, b = normal(9, 12, dtype=torch.bfloat16), normal(12, 7, dtype=torch.bfloat16)
    got = ops.matmul(a.view(torch.uint16).numpy(), b.view(torch.uint16).numpy())
    assert got.dtype == np.uint16
    assert torch.equal(torch.from_numpy(got).view(torch.bfloat16), ops.matmul(a, b))


def test_numpy_arrays_that_cannot_be_written_are_read():
    a = np.broadcast_to(np.eye(4, dtype=np.float32), (3, 4, 4))
    assert not a.flags.writeable
    b = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert np.array_equal(ops.matmul(a, b), np.broadcast_to(b, (3, 4, 4)))


@pytest.mark.parametrize("m, n, k", [(0, 4, 3), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_sizes_give_what_torch_gives(m, n, k, dtype):
    a, b, bias, c = (normal(*s, dtype=dtype) for s in ((2, m, k), (k, n), (n,), (2, m, n)))
    got = ops.matmul(a, b, bias=bias, c=c, beta=0.5, activation="gelu")
    want = reference(a, b, c, bias, 1.0, 0.5, "gelu")
    assert got.shape == want.shape and got.dtype == dtype
    assert torch.allclose(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert ops.matmul(normal(0, 2, 3), normal(3, 4)).shape == (0, 2, 4)


def test_nan_and_infinity_arrive():
    a, b = normal(20, 16), normal(16, 24)
    a[3, 5], b[2, 7] = math.nan, math.inf
    got = ops.matmul(a, b)
    want = a @ b
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


def test_beta_zero_does_not_read_c():
    a, b = normal(4, 8), normal(8, 4)
    got = ops.matmul(a, b, c=torch.full((4, 4), math.nan), beta=0)
    assert torch.equal(got, ops.matmul(a, b))


# ---- what it refuses, and what it says -------------------------------------------------------------------------------

A, B, HUGE = torch.ones(4, 6), torch.ones(6, 8), 1 << 31
BAD = {
    "list": (lambda: ops.matmul([[1.0]], B), "a is a list: expected a torch tensor"),
    "numpy and torch": (lambda: ops.matmul(A.numpy(), B), "a of numpy, the rest of torch"),
    "float64": (lambda: ops.matmul(A.double(), B.double()), r"a is torch.float64: expected one of .*call .to\(\)"),
    "integers": (lambda: ops.matmul(A.int(), B.int()), "a is torch.int32: expected one of"),
    "numpy float64": (lambda: ops.matmul(A.double().numpy(), B.double().numpy()), "a is float64: expected one of"),
    "two types": (lambda: ops.matmul(A, B.half()), "b is torch.float16: expected torch.float32, as a is"),
    "type of bias": (lambda: ops.matmul(A, B, bias=torch.ones(8).half()), "bias is torch.float16: expected"),
    "type of c": (lambda: ops.matmul(A, B, c=torch.ones(4, 8).half(), beta=1), "c is torch.float16: expected"),
    "type of the result": (lambda: ops.matmul(A, B, out_dtype=torch.float16), "out_dtype torch.float16: expected"),
    "numpy type for torch": (lambda: ops.matmul(A, B, out_dtype=np.float32), "expected a torch dtype"),
    "sparse": (lambda: ops.matmul(A.to_sparse(), B), r"a is torch.sparse_coo: expected a dense tensor"),
    "vector": (lambda: ops.matmul(A[0], B), r"a has shape \(6,\): expected \(rows, columns\) or"),
    "four dimensions": (lambda: ops.matmul(A, B[None, None]), r"b has shape \(1, 1, 6, 8\): expected"),
    "inner sizes": (lambda: ops.matmul(A, B.mT), r"a \(4, 6\) times b \(8, 6\): expected as many columns .*\.mT"),
    "batches": (lambda: ops.matmul(A.expand(2, 4, 6), B.expand(3, 6, 8)), "expected one size of batch"),
    "shape of bias": (lambda: ops.matmul(A, B, bias=torch.ones(4)), r"bias has shape \(4,\): expected \(8,\)"),
    "shape of c": (lambda: ops.matmul(A, B, c=torch.ones(8, 4), beta=1), r"c has shape \(8, 4\): expected \(4, 8\)"),
    "no c": (lambda: ops.matmul(A, B, beta=1.0), "beta 1.0 without c"),
    "activation": (lambda: ops.matmul(A, B, activation="relu"), "activation 'relu': expected one of none, gelu"),
    "odd swiglu": (lambda: ops.matmul(A, B[:, :7], activation="swiglu"), "b has 7 columns: expected an even number"),
    "unknown step": (lambda: ops.matmul(A, B, step="fast"), "step 'fast': expected None, 1 to 16, or one of naive_01"),
    "step number": (lambda: ops.matmul(A, B, step=17), "step 17: expected None, 1 to 16"),
    "step of another type": (
        lambda: ops.matmul(A, B, step="wgmma_09"),
        "step wgmma_09 and torch.float32: .*or one of naive_01, coalesced_02",
    ),
    "both strided": (
        lambda: ops.matmul(torch.ones(8, 12)[::2, ::2], B),
        r"a: shape \(4, 6\) with strides \(24, 2\): expected rows without gaps.*transpose.*\.contiguous\(\)",
    ),
    "rows overlap": (
        lambda: ops.matmul(torch.ones(20).as_strided((4, 6), (2, 1)), B),
        r"a: shape \(4, 6\) with strides \(2, 1\): expected",
    ),
    "rows repeat": (lambda: ops.matmul(torch.ones(1, 6).expand(4, 6), B), r"strides \(0, 1\): .*\.contiguous\(\)"),
    "strided bias": (lambda: ops.matmul(A, B, bias=torch.ones(16)[::2]), r"bias: shape \(8,\) with strides \(2,\)"),
    "transposed c": (lambda: ops.matmul(A, B, c=torch.ones(8, 4).mT, beta=1), r"c: .* strides \(1, 4\): expected rows"),
    "backwards": (lambda: ops.matmul(A.numpy()[::-1], B.numpy()), "a has strides of .* bytes: .*copy it"),
    "misaligned": (
        lambda: ops.matmul(np.frombuffer(bytes(4 * 6 * 4 + 1), np.uint8)[1:].view(np.float32).reshape(4, 6), B.numpy()),
        "a: is misaligned: expected an address that is a multiple of 4",
    ),
    "TMA: a stride": (
        lambda: ops.matmul(torch.ones(4, 12).bfloat16()[:, :6], B.bfloat16(), step="best_16"),
        "row stride of a is 24 bytes, expected a multiple of 16",
    ),
    "TMA: an address": (
        lambda: ops.matmul(torch.ones(4, 16).bfloat16()[:, 1:7], B.bfloat16(), step="best_16"),
        "address of a is 2 bytes past a multiple of 16",
    ),
    "too large": (
        lambda: ops.matmul(as_strided(A.numpy(), (1, HUGE), (4 * HUGE, 4)), as_strided(A.numpy(), (HUGE, 1), (4, 4))),
        "k = 2147483648: expected 1 to 2147483647",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="b is on meta, a on cpu: expected one device"):
        ops.matmul(A, B.to("meta"))


class OtherGPU:
    """A GPU that is not a Hopper, as torch describes it."""

    name, multi_processor_count = "NVIDIA Test", 10

    def __init__(self, major, minor):
        self.major, self.minor = major, minor


def test_a_gpu_that_is_no_hopper_is_told_what_runs_there(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: OtherGPU(8, 6))
    device_of.gpu.cache_clear()
    with pytest.raises(
        RuntimeError, match=r"wgmma_09 needs a Hopper GPU.*NVIDIA Test has .* 8\.6.*naive_01.*mma_sync_08$"
    ):
        device_of.place(device, "wgmma_09", dispatch.WITHOUT_HOPPER)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: OtherGPU(7, 5))
    device_of.gpu.cache_clear()
    with pytest.raises(RuntimeError, match=r"7\.5: expected 8\.0 or more"):
        device_of.place(device)
    device_of.gpu.cache_clear()


# ---- the extension itself, which must not write where it should not --------------------------------------------------


def test_the_extension_checks_its_own_arguments():
    matmul = modules.load("_simt").matmul
    a, b, d = torch.ones(2, 4, 6), torch.ones(6, 8), torch.ones(2, 4, 8)
    for message, arguments, more in [
        (r"d: shape \(4, 8\): expected room for the whole batch", (a, b, torch.ones(4, 8)), {}),
        (r"d: shape \(2, 4, 7\): expected \(4, 8\) or \(2, 4, 8\)", (a, b, d[..., :7]), {}),
        (
            r"d: strides \(0, 8, 1\): expected matrices that do not overlap",
            (a, b, torch.ones(4, 8).expand(2, 4, 8)),
            {},
        ),
        (r"d: shape .* strides \(32, 1, 4\): expected rows without gaps", (a, b, torch.ones(2, 8, 4).mT), {}),
        (r"b: shape \(5, 8\): expected \(6, 8\)", (a, b[:5], d), {}),
        ("b: is float16: expected float32", (a, b.half(), d), {}),
        ("d: is float16: expected float32", (a, b, d.half()), {}),
        ("b: expected float32, float16 or bfloat16 .* got another type of 64 bits", (a, b.double(), d), {}),
        ("a: expected a torch tensor or a numpy array, got <class 'list'>", ([1], b, d), {}),
        ("a: expected at most 3 dimensions, got 4", (a[None], b, d), {}),
        ("a: cannot be read: .*requires? grad", (a.clone().requires_grad_(), b, d), {}),
        ("d: is read-only", (a.numpy(), b.numpy(), np.broadcast_to(d.numpy(), (2, 4, 8))), {}),
        (r"bias: shape \(7,\)", (a, b, d), {"bias": torch.ones(7)}),
        (r"c: shape \(3, 4, 8\)", (a, b, d), {"c": torch.ones(3, 4, 8), "beta": 1}),
        ("beta .* without c", (a, b, d), {"beta": 1}),
        ("activation 'relu'", (a, b, d), {"activation": "relu"}),
        ("tiling: naive_01 has only its own", (a, b, d), {"tiling": (128, 128, 1, 1, 0)}),
    ]:
        with pytest.raises(ValueError, match=message):
            matmul("naive_01", *arguments, **more)
    with pytest.raises(ValueError, match="step 'x': this module has naive_01, coalesced_02"):
        matmul("x", a, b, d)


def test_options_hold_inside_and_are_checked():
    simt = modules.load("_simt")
    a, b = normal(70, 40), normal(40, 66)
    want = ops.matmul(a, b)
    for order in ("fifo", "reverse", "random", "priority"):
        with simt.options(order=order, seed=3, workers=1, multiprocessors=2):
            assert torch.equal(ops.matmul(a, b), want)
    for wrong, message in [
        ({"order": "none"}, "order 'none': expected one of fifo, reverse, random, priority"),
        ({"async_": "never"}, "async_ 'never': expected one of eager, lazy, random"),
        ({"workers": -1}, "workers -1: expected at least 0"),
        ({"multiprocessors": 0}, "multiprocessors 0: expected at least 1"),
        ({"timeout_s": 0}, "timeout_s: expected"),
        ({"speed": 1}, "option 'speed': expected one of workers"),
    ]:
        with pytest.raises(ValueError, match=message):
            simt.options(**wrong)


# ---- the dispatcher --------------------------------------------------------------------------------------------------


def test_step_names_are_the_modules():
    steps = modules.load("_simt").steps()
    assert tuple(step["name"] for step in steps) == dispatch.STEPS
    for step in steps:
        assert tuple(getattr(torch, name) for name in step["dtypes"]) == dispatch.dtypes_of(step["name"])
        assert step["tma"] == dispatch.needs_tma(step["name"])


def test_what_tma_cannot_describe_goes_to_step_08():
    x = torch.ones(8, 24, dtype=torch.bfloat16)
    assert dispatch.describable(x) and dispatch.describable(x.mT) and dispatch.describable(x[:, 8:])
    assert dispatch.describable(torch.ones(9, 1, dtype=torch.bfloat16))
    assert not dispatch.describable(x[:, 1:]) and not dispatch.describable(torch.ones(8, 23, dtype=torch.bfloat16))
    assert not dispatch.describable(torch.ones(3, 24, dtype=torch.bfloat16).as_strided((2, 2, 8), (4, 16, 1)))
    far = as_strided(np.zeros(8, np.float16), (2, 8), (1 << 40, 2))
    assert not dispatch.describable(torch.from_numpy(far))
    for kind, tma in [("sm_90", False), ("sm_80", True), ("model", False)]:
        chosen = dispatch.choose(kind, torch.bfloat16, 1, 64, 64, 64, tma=tma, row_column=True, multiprocessors=132)
        assert chosen == ("mma_sync_08", None)


def test_the_dispatcher_fills_the_multiprocessors():
    def tiling(m, n, k, row_column=False):
        layout = {"tma": True, "row_column": row_column}
        step, tiling = dispatch.choose("sm_90", torch.bfloat16, 1, m, n, k, **layout, multiprocessors=132)
        assert step == "best_16" and tiling in dispatch.TILINGS + (dispatch.ROW_COLUMN if row_column else ())
        return tiling

    assert tiling(8192, 8192, 8192)[:4] == (128, 256, 2, 1)
    assert tiling(256, 256, 16384).split_k > 1
    assert tiling(3072, 3072, 3072, row_column=True)[:2] == (192, 192)
    assert tiling(64, 64, 64)[:4] == (64, 64, 1, 1)


def test_a_measured_tiling_is_taken_where_it_was_built(monkeypatch):
    measured = {("sm_90", "bfloat16", 512, 512, 512): (64, 128, 1, 1, 4, 0, 0, 2, 1)}
    monkeypatch.setattr(dispatch, "MEASURED", measured)

    def tiling(dtype=torch.bfloat16, batch=1, row_column=True):
        layout = {"tma": True, "row_column": row_column}
        return dispatch.choose("sm_90", dtype, batch, 512, 512, 512, **layout, multiprocessors=132)[1]

    assert tiling() == dispatch.Tiling(64, 128, 1, 1, 4, 0, 0, 2, 1)
    assert tiling(row_column=False) in dispatch.TILINGS
    assert tiling(batch=8) != tiling() != tiling(torch.float16)


def test_every_tiling_of_the_dispatcher_was_built_and_computes():
    a, b = normal(70, 256, dtype=torch.bfloat16), normal(136, 256, dtype=torch.bfloat16).mT
    for tiling in dispatch.TILINGS + dispatch.ROW_COLUMN:
        d = torch.full((70, 136), math.nan)
        modules.load("_simt").matmul("best_16", a, b, d, tiling=tiling)
        check(d, reference(a, b), 1e-5)
    with pytest.raises(ValueError, match="no tile of 32 x 32"):
        modules.load("_simt").matmul("best_16", a, b, d, tiling=(32, 32))
    with pytest.raises(ValueError, match="at most 9"):
        modules.load("_simt").matmul("best_16", a, b, d, tiling=[1] * 10)
