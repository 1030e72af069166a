"""The way of a launch to a GPU up to the launch itself, without a GPU (no_gpu.py): what the interpreter never sees.

Specialised arguments, of which 1 becomes a constant; options; descriptors as the driver checks them; streams, devices;
that no value is read on the way. All runs in a process of its own, which says what was launched; tests look at that.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

from cuda import device, ops, triton_matmul, triton_matmul_tma, triton_operands
from cuda.triton_attention import attention_kernel
from cuda.triton_compat import TensorDescriptor, jit
from cuda.triton_dispatch import SPECIALISED, STEPS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the other tests use it"),
    pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("g++")), reason="no C++ compiler"),
]


@jit
def copy(source, y_ptr, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.reshape(source.load([0, 0]), (SIZE,)), mask=at < n)


def tensor(*shape, dtype=torch.bfloat16, grad=False, where="cuda:0"):
    return torch.empty(*shape, dtype=dtype, device=where).requires_grad_(grad)


def message(launch, *arguments, **options):
    """Of the exception."""
    try:
        launch(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


def report(folder: str) -> None:
    """Prints what was launched, by case, as JSON."""
    from tests.cuda import no_gpu

    found = {}
    with no_gpu.driver(Path(folder)) as taken:

        def case(name, function, *arguments, **options):
            function(*arguments, **options)
            found[name] = taken()

        for step in STEPS:
            for m, n, k in ((150, 264, 72), (1, 1, 1)):
                a, b = tensor(m, 72)[:, :k], tensor(k, 264)[:, :n]
                case(f"{step} {m}", ops.matmul, a, b, kernels="triton", step=step)
        a, b = tensor(150, 72, where="cuda:1"), tensor(72, 264, where="cuda:1")
        case("second GPU", ops.matmul, a, b, kernels="triton", step="pointer_01")
        found["current"] = torch.cuda.current_device()

        kernel = triton_matmul.pointer_01
        before = len(kernel.device_caches[0][0])
        a, b = tensor(150, 72), tensor(72, 264)
        case("again", ops.matmul, a, b, kernels="triton", step="pointer_01")
        made = list(kernel.device_caches[0][0].values())
        found["made"] = [before, len(made), made[0].metadata.enable_fp_fusion, made[0].metadata.num_warps]

        for batch, heads, rows in ((2, 4, 200), (1, 4, 1000), (1, 1, 1)):
            q = tensor(batch, rows, heads, 64, grad=True).transpose(1, 2)
            k, v = (tensor(batch, rows, 1, 64, grad=True).transpose(1, 2) for _ in range(2))
            case(f"attention {rows}", ops.attention, q, k, v, causal=True, kernels="triton")
            found[f"made {rows}"] = len(attention_kernel.device_caches[0][0])

        y, described = tensor(64), TensorDescriptor(tensor(64, 64), [64, 64], [64, 1], [1, 64])
        case(
            "a function", lambda: copy[lambda given: (given["n"] // 8, given["SIZE"] // 32)](described, y, 64, SIZE=64)
        )
        found["grid"] = message(copy[(1, 65536)], described, y, 64, SIZE=64)
        low = TensorDescriptor(tensor(64, 64), [64, 64], [64, 1], [1, 64])
        low.strides[0] = 68
        found["stride"] = message(copy[(1,)], low, y, 64, SIZE=64)
        low = TensorDescriptor(tensor(65, 64), [64, 64], [64, 1], [1, 64])
        low.base = low.base.view(-1)[4:]
        found["address"] = message(copy[(1,)], low, y, 64, SIZE=64)
        found["value"] = message(lambda: y[0].item())
        found["keyword"] = message(copy[(1,)], described, y, 64, SIZE=64, warps=4)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    code = "import sys; from tests.cuda.test_triton_launch import report; report(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path_factory.mktemp("driver"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_step_of_the_triton_ladder_is_launched(launched):
    for step in STEPS:
        for m in (150, 1):
            launches = launched[f"{step} {m}"]
            assert len(launches) == (2 if step == "split_k_04" else 1), (step, m)
            for (x, y, z), threads, shared, stream in launches:
                assert x >= 1 and y == z == 1 and threads in (128, 256) and shared <= 227 << 10 and stream == 42


def test_another_gpu_is_the_current_one_for_a_launch_alone(launched):
    ((grid, *_, stream),) = launched["second GPU"]
    assert stream == 43 and launched["current"] == 0 and grid == launched["pointer_01 150"][0][0]


def test_a_second_launch_compiles_nothing(launched):
    before, after, fused, warps = launched["made"]
    assert before == after == 2 and fused is True and warps in (4, 8)
    assert launched["again"] == launched["pointer_01 150"]


def test_attention_is_launched_forward_and_backward(launched):
    forward, of_queries, of_keys = (launch[0] for launch in launched["attention 200"])
    assert forward == [16, 1, 1] and of_queries == [8, 2, 1] and of_keys == [2, 2, 1]  # tiles of 128 rows
    assert [launch[0] for launch in launched["attention 1"]] == [[1, 1, 1]] * 3
    assert launched["made 200"] == launched["made 1000"] == 1  # other counts are no other kernel


def test_what_the_driver_would_refuse_is_refused(launched):
    assert launched["a function"][0][0] == [8, 2, 1]
    for what in ("grid", "stride", "address"):
        assert "invalid argument" in launched[what], what
    assert launched["value"] and "warps" in launched["keyword"]


def test_the_allocator_of_others_stays(monkeypatch):
    from triton.runtime import _allocation

    seen = []

    class Noted:
        def __getitem__(self, grid):
            return lambda *_, **__: seen.append((grid, _allocation._allocator.get()))

    monkeypatch.setattr(triton_matmul_tma, "specialised_03", Noted())
    before = _allocation._allocator.get()
    a, b, d = (torch.zeros(64, 64, dtype=torch.bfloat16) for _ in range(3))
    problem = triton_operands.problem_of(a, b, d, None, None, 1.0, 0.0, "none")
    triton_matmul_tma.launch_persistent_03(device.place(a.device, kernels="triton"), problem, SPECIALISED)
    assert seen == [((1,), triton_matmul_tma._memory_for_descriptors)] and _allocation._allocator.get() is before
