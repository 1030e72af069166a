"""Triton as cuda/triton_compat.py makes it: who interprets and who compiles, what of the interpreter is put right, and
that nothing of it stays behind. The kernels here are as small as what they show. No test needs a GPU."""

import ast
import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.language import core

from cuda import device, triton_compat, triton_ops, triton_tilings
from cuda.triton_compat import TensorDescriptor, compiling, jit
from cuda.triton_tilings import Tiling

ROOT = Path(__file__).resolve().parents[2]
OFFSET: tl.constexpr = tl.constexpr(2)


@jit
def half_of(x):
    return x * 0.5


@jit
def scale_rows(x_ptr, y_ptr, factor, columns, stride, BLOCK: tl.constexpr):
    """y = x * factor / 2, a row a program."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + at, mask=at < columns, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * stride + at, half_of(x * factor).to(y_ptr.dtype.element_ty), mask=at < columns)


@jit
def library(x_ptr, sums_ptr, n, BLOCK: tl.constexpr):
    """Triton's own functions: of the language, of its standard library, and of ours, in a loop and under an if."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    total = 0.0
    for i in range(0, tl.cdiv(n, 4)):
        part = (at >= 4 * i) & (at < 4 * i + 4)
        total += tl.sum(tl.where(part, x, 0.0), axis=0)
    if n > 3:
        total = tl.maximum(total, -1e30)
    tl.store(sums_ptr, total)
    tl.store(sums_ptr + 1, tl.max(tl.where(at < n, x, float("-inf")), axis=0))
    tl.store(sums_ptr + OFFSET, tl.sum(tl.where(at < n, tl.sigmoid(x), 0.0), axis=0))
    tl.store(sums_ptr + 3, tl.sum(tl.where(at < n, tl.exp2(x) + tl.math.erf(x), 0.0), axis=0))
    tl.store(sums_ptr + 4, tl.argmax(tl.where(at < n, x, float("-inf")), axis=0).to(tl.float32))


@jit
def product(a_ptr, b_ptr, d_ptr, K, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """d = a @ b, both N x K and K x N, row-major."""
    row, k = tl.arange(0, N), tl.arange(0, BLOCK_K)
    d = tl.zeros((N, N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + row[:, None] * K + (start + k)[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * N + row[None, :])
        d = tl.dot(a, b, d, input_precision="ieee")
    tl.store(d_ptr + row[:, None] * N + row[None, :], d)


@jit
def move_tile(source, target, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    target.store([i, j], source.load([i, j]))


@jit
def cast(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=at < n)


@jit
def breaks(x_ptr):
    tl.static_assert(False, "on purpose")


@jit
def write_program(y_ptr, columns):
    tl.store(y_ptr + tl.program_id(0) * columns + tl.program_id(1), tl.num_programs(1) * 10 + tl.program_id(1))


def scaled(x, dtype=None, factor=3.0):
    y = torch.full_like(x, torch.nan, dtype=dtype)
    scale_rows[(x.shape[0],)](x, y, factor, x.shape[1], x.stride(0), BLOCK=triton.next_power_of_2(x.shape[1]))
    return y


def compiled(capability=90):
    with compiling(capability) as found:
        scaled(torch.empty(4, 256))
    return found


# ---- who runs a kernel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 7, 33, 1000])
def test_cpu_tensors_are_interpreted(dtype, columns):
    x = torch.randn(3, columns).to(dtype)
    torch.testing.assert_close(scaled(x).double(), (x.double() * 1.5).to(dtype).double(), rtol=1e-6, atol=0)


def test_one_process_interprets_and_compiles_in_any_order():
    x = torch.randn(4, 256)
    for _ in range(2):
        assert torch.equal(scaled(x), x * 1.5)
        (found,) = compiled()
        assert found.name == "scale_rows" and found.grid == (4,) and found.kernel.asm["cubin"]
        assert ".target sm_90a" in found.kernel.asm["ptx"]
    assert "TRITON_INTERPRET" not in os.environ


def test_compiling_writes_nothing_and_takes_meta_tensors():
    with compiling(90) as found:
        x = torch.randn(4, 256)
        assert scaled(x).isnan().all()
        scaled(x.to("meta"))
        assert triton_compat.capability() == 90
        with compiling(80) as inner:
            scaled(x)
        assert triton_compat.capability() == 90
    assert len(found) == 2 and len(inner) == 1 and triton_compat.capability() is None
    assert found[0].kernel.asm["ptx"] == found[1].kernel.asm["ptx"]  # specialised alike
    assert ".target sm_80" in inner[0].kernel.asm["ptx"]


def test_compiling_ends_with_an_exception():
    with pytest.raises(RuntimeError, match="mine"), compiling(90):
        raise RuntimeError("mine")
    assert triton_compat.capability() is None


def test_places_follow_who_runs(monkeypatch):
    here = device.place(torch.device("cpu"), kernels="triton")
    assert (here.kind, here.device.type) == ("interpreter", "cpu")
    for capability, kind in ((90, "sm_90"), (80, "sm_80")):
        with compiling(capability):
            assert device.place(torch.device("cpu"), kernels="triton").kind == kind
    monkeypatch.setitem(sys.modules, "cuda.triton_compat", None)
    monkeypatch.delattr("cuda.triton_compat", raising=False)
    with pytest.raises(ModuleNotFoundError):  # ours is missing: that is no missing Triton
        device.place(torch.device("cpu"), kernels="triton")


def test_tensors_of_two_devices_are_refused():
    x, y = torch.ones(1, 8), torch.ones(1, 8, device="meta")
    with pytest.raises(ValueError, match=r"scale_rows of tensors on cpu and meta: expected cuda, or cpu"):
        scale_rows[(1,)](x, y, 1.0, 8, 8, BLOCK=8)
    described = TensorDescriptor.from_tensor(y.view(8, 1).expand(8, 8).contiguous(), [8, 8])
    with pytest.raises(ValueError, match="tensors on cpu and meta"):
        move_tile[(1, 1)](described, x, ROWS=8, COLUMNS=8)
    with pytest.raises(ValueError, match="tensors on cpu and meta"):
        cast[(1,)]((x, y), x, 8, BLOCK=8)


def test_unknown_keywords_are_refused_as_the_compiler_does():
    x = torch.ones(1, 8)
    with pytest.raises(ValueError, match=r"scale_rows: keyword BLOK, num_stage: expected one of x_ptr, .*num_warps"):
        scale_rows[(1,)](x, x, 1.0, 8, 8, BLOCK=8, BLOK=8, num_stage=3)
    scale_rows[(1,)](x, x, 2.0, 8, 8, BLOCK=8, num_warps=8, num_stages=2, maxnreg=64)
    assert torch.equal(x, torch.ones(1, 8))
    with pytest.raises(TypeError, match="BLOCK"):
        scale_rows[(1,)](x, x, 1.0, 8, 8)
    with pytest.raises(RuntimeError):
        half_of(x)  # a kernel is launched, or called by a kernel


def test_the_environment_variable_is_refused():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", "import cuda.triton_compat"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "TRITON_INTERPRET is set: expected it unset" in done.stderr


# ---- the interpreter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 16, 31])
def test_functions_of_the_library_are_interpreted(n):
    x, sums = torch.randn(n), torch.full((5,), torch.nan)
    library[(1,)](x, sums, n, BLOCK=32)
    want = [x.sum(), x.max(), x.sigmoid().sum(), (x.exp2() + x.erf()).sum(), x.argmax().float()]
    torch.testing.assert_close(sums, torch.stack(want))


def test_the_same_functions_compile():
    with compiling(90) as found:
        library[(1,)](torch.empty(31), torch.empty(5), 31, BLOCK=32)
    assert found[0].kernel.asm["ptx"].count("shfl.sync") > 5


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_dot_is_right_in_every_type(dtype):
    a, b = (torch.randn(16, 64).to(dtype), torch.randn(64, 16).to(dtype))
    d = torch.full((16, 16), torch.nan)
    product[(1,)](a, b, d, 64, N=16, BLOCK_K=32)
    torch.testing.assert_close(d.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_dot_keeps_nan_of_every_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        a, b, d = torch.ones(16, 32).to(dtype), torch.ones(32, 16).to(dtype), torch.zeros(16, 16)
        a[3, 5] = torch.nan
        product[(1,)](a, b, d, 32, N=16, BLOCK_K=32)
        assert d[3].isnan().all() and d.isnan().sum() == 16, dtype


def hard_numbers():
    """Ties, what overflows, subnormal ones, NaN with few bits set, and ordinary ones."""
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-4, 1 + 3 * 2**-4, 1 + 2**-3, 17.0, 447.0, 450.0, 2.5])
    edges = torch.tensor([0.0, -0.0, 3.4e38, -3.4e38, torch.inf, -torch.inf, 1e-40, 2e-39, 2**-10, 1e-7, 3e-8, 6e4])
    nan = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    return torch.cat([ties, -ties, edges, nan, torch.randn(1000), 1e-3 * torch.randn(1000)])


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_float32_is_rounded_as_a_gpu_rounds(target):
    x = hard_numbers()
    y = torch.empty(len(x), dtype=target)
    cast[(1,)](x, y, len(x), BLOCK=triton.next_power_of_2(len(x)))
    largest = torch.finfo(target).max
    want = (x.clamp(-largest, largest) if target.itemsize == 1 else x).to(target)  # cvt.satfinite
    assert torch.equal(y.float().nan_to_num(nan=7e7), want.float().nan_to_num(nan=7e7))
    back = torch.empty(len(x))
    cast[(1,)](y, back, len(x), BLOCK=triton.next_power_of_2(len(x)))
    assert torch.equal(back.nan_to_num(nan=7e7), want.float().nan_to_num(nan=7e7))


@pytest.mark.parametrize(
    "source", [torch.float64, torch.float16, torch.int32, torch.int64, torch.bool, torch.float8_e5m2]
)
def test_bfloat16_is_made_of_every_type(source):
    x = torch.randn(100).to(source) if source.is_floating_point else torch.arange(-50, 50).to(source)
    y = torch.empty(100, dtype=torch.bfloat16)
    cast[(1,)](x, y, 100, BLOCK=128)
    assert torch.equal(y, x.to(torch.bfloat16))
    whole = torch.empty(100, dtype=torch.int32)
    cast[(1,)](y, whole, 100, BLOCK=128)
    assert torch.equal(whole, y.to(torch.int32))


@jit
def is_float32(y_ptr, number, flag):
    tl.static_assert(number.dtype == tl.float32)
    if flag:
        tl.store(y_ptr, tl.exp2(number.to(tl.float32)) + 1e-9)  # 1e-9 beside 2: nothing in float32


def test_numbers_are_float32():
    y = torch.zeros(1, dtype=torch.float64)
    for flag in (False, True):
        is_float32[(1,)](y, 1.0, flag)
        assert y.item() == (2.0 if flag else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_descriptors_move_tiles(dtype):
    x = torch.randn(37, 48).to(dtype)
    y = torch.full_like(x, torch.nan)
    descriptors = [TensorDescriptor.from_tensor(t, [16, 32]) for t in (x, y)]
    move_tile[(3, 2)](*descriptors, ROWS=16, COLUMNS=32)
    assert torch.equal(x, y)
    with compiling(90) as found:
        move_tile[(3, 2)](*descriptors, ROWS=16, COLUMNS=32)
    ptx = found[0].kernel.asm["ptx"]
    assert "cp.async.bulk.tensor.2d.shared" in ptx and "cp.async.bulk.tensor.2d.global" in ptx


def test_a_grid_may_be_a_function_and_has_up_to_three_dimensions():
    y = torch.zeros(2, 3, dtype=torch.int32)
    seen = []

    def grid(arguments):
        seen.append(arguments["columns"])
        return 2, arguments["columns"]

    write_program[grid](y, 3)
    assert y.tolist() == [[30, 31, 32]] * 2 and seen == [3]
    with compiling(90) as found:
        write_program[grid](y, 3)
        write_program[(2, 3, 1)](y, 3)
    assert [one.grid for one in found] == [(2, 3), (2, 3, 1)] and seen == [3, 3]
    write_program[(0, 3)](y.fill_(-1), 3)
    assert (y == -1).all()


# ---- nothing stays behind --------------------------------------------------------------------------------------------


def state_of_triton():
    """All that the interpreter may have changed, by identity where an attribute is the same object each time."""
    owners = [tl, core, tl.math, tl.tensor, tl.dtype, core.tensor_descriptor_base, triton.runtime.jit.JITFunction]
    owners += [triton_compat.interpreter.InterpreterBuilder]
    names = ("__index__", "__bool__", "__repr__", "__str__", "__call__")
    return {
        (owner.__name__, name): inspect.getattr_static(owner, name, None)
        for owner in owners
        for name in {*dir(owner), *names}
        if not name.startswith("__") or name in names
    }


def test_triton_is_as_before():
    scaled(torch.ones(1, 8))  # what is missing at first may be there as the inherited one afterwards
    before = state_of_triton()
    scaled(torch.ones(1, 8))
    with pytest.raises(AssertionError, match="on purpose"):
        breaks[(1,)](torch.ones(1))
    with pytest.raises(TypeError):
        write_program[("x",)](torch.ones(1), 1)
    after = state_of_triton()
    assert [key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)] == []
    assert torch.equal(scaled(torch.ones(1, 8)), torch.full((1, 8), 1.5))
    assert compiled()[0].kernel.asm["cubin"]


@jit
def waits(y_ptr, inside: tl.constexpr, over: tl.constexpr):
    inside.set()
    over.wait(0.3)
    tl.store(y_ptr, 1.0)


@pytest.mark.parametrize("compiles", [False, True])
def test_a_thread_waits_while_another_interprets(compiles, tmp_path, monkeypatch):
    """To interpret, and to compile: it would meet a changed language."""
    inside, over, y = threading.Event(), threading.Event(), torch.zeros(1)
    thread = threading.Thread(target=lambda: waits[(1,)](y, inside, over))
    thread.start()
    assert inside.wait(60)
    if compiles:
        monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
        assert compiled()[0].kernel.asm["cubin"]
    else:
        assert scaled(torch.ones(1, 8)).sum() == 12
    assert y.item() == 1
    thread.join(60)
    assert not thread.is_alive() and y.item() == 1


# ---- the list of operations ------------------------------------------------------------------------------------------


def test_every_operation_stands_where_the_list_says():
    """Read, not imported: the files hold kernels that a machine without Triton could not import."""
    for operation, file in triton_ops.FILES.items():
        path = ROOT / "cuda" / f"{file}.py"
        assert path.exists(), f"{operation}: no {path.relative_to(ROOT)}"
        functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert operation in functions, f"no function {operation} in {path.name}"
        first = functions[operation].args
        assert (first.posonlyargs + first.args)[0].arg == "place", f"{path.name}: {operation}(place, ...) expected"


def test_an_operation_that_is_not_there_is_named():
    here = device.place(torch.device("cpu"), kernels="triton")
    with pytest.raises(RuntimeError, match="operation fly in Triton: expected one of attention_forward, "):
        here.run("fly", x=torch.ones(1))
    with pytest.raises(ValueError, match="kernels 'no': expected one of cuda, triton"):
        device.place(torch.device("cpu"), kernels="no")


# ---- tilings ---------------------------------------------------------------------------------------------------------

TILINGS = [Tiling(128, 256, 64, 8, 3), Tiling(128, 128, 64, 4, 4), Tiling(64, 64, 64, 4, 2)]


def shared(tiling):
    """Of a product in 16 bits."""
    return 2 * tiling.stages * (tiling.block_m + tiling.block_n) * tiling.block_k


def accumulators(tiling):
    return tiling.block_m * tiling.block_n // (32 * tiling.warps)


def test_tilings_that_do_not_fit_are_dropped():
    assert triton_tilings.prune(TILINGS, "sm_90", shared=shared, registers=accumulators) == TILINGS
    fitting = triton_tilings.prune(TILINGS, "sm_80", shared=shared, registers=accumulators)
    assert fitting == [TILINGS[2]]  # 147,456 and 131,072 bytes do not fit into 101,376
    few = triton_tilings.prune(TILINGS, "sm_90", shared=shared, registers=lambda t: 2 * accumulators(t))
    assert few == [TILINGS[2]]  # 256 registers a thread
    wide = [Tiling(128, 256, 64, 16, 3)]  # a block's 65,536 registers are 128 a thread of 16 warps
    assert triton_tilings.prune(wide, "sm_90", shared=shared, registers=lambda t: 128) == wide
    with pytest.raises(ValueError, match="1 tilings for sm_90: expected one that fits into 232448 bytes"):
        triton_tilings.prune(wide, "sm_90", shared=shared, registers=lambda t: 129)


def test_what_was_measured_goes_before_the_first_guess(monkeypatch):
    def choose(*key):
        return triton_tilings.choose("matmul", "sm_90", key, TILINGS)

    measured = {("matmul", "sm_90", 1): tuple(TILINGS[2]), ("matmul", "sm_90", 2): (1, 2, 3, 4, 5)}
    monkeypatch.setattr(triton_tilings, "MEASURED", measured)
    assert (choose(1), choose(2), choose(3)) == (TILINGS[2], TILINGS[0], TILINGS[0])
    assert triton_tilings.choose("matmul", "sm_80", (1,), TILINGS) == TILINGS[0]


def test_a_tiling_can_be_forced():
    """On one question: what else the operation asks is as ever. From another thread too, as autograd's."""
    forced = Tiling(16, 16, 16, 1, 1)  # that it is no candidate does not matter: the tuner knows what it asks for
    with triton_tilings.asked() as questions:
        triton_tilings.choose("matmul", "sm_90", (torch.bfloat16, 64, True), TILINGS)
    (question,) = questions
    assert question == ("matmul", "sm_90", "bfloat16", 64, True) and questions[question] == TILINGS

    def choose(width=64, operation="matmul"):
        found = []
        ask = lambda: found.append(triton_tilings.choose(operation, "sm_90", (torch.bfloat16, width, True), TILINGS))  # noqa: E731
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return found[0]

    with triton_tilings.forced(question, forced):
        assert (choose(), choose(65), choose(operation="attention")) == (forced, TILINGS[0], TILINGS[0])
        with triton_tilings.forced(question, TILINGS[1]):
            assert choose() == TILINGS[1]
        assert choose() == forced
    with pytest.raises(RuntimeError), triton_tilings.forced(question, forced):
        raise RuntimeError
    assert choose() == TILINGS[0] and len(questions) == 1
