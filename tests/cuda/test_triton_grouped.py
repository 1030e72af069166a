"""The grouped product in Triton against a loop over experts in float64: values, gradients, and their gradients.

In 16 bits the error may be 1.1 times that of torch's own products in that type, or one rounding of the largest number.
On a machine with a GPU the same cases run there too; what is compiled for Hopper is read from the machine code.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from cuda import device as device_of
from cuda.grouped_ops import grouped_matmul
from cuda.triton_compat import compiling
from cuda.triton_grouped import reference, reference_weights
from tests.cuda.products import DEVICES, TOLERANCE, normal
from tests.cuda.test_triton_fp8 import machine_code, needs_tools, only_written

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = {  # rows, K, N, ends
    "uneven": (70, 33, 47, [13, 14, 70]),
    "aligned": (130, 64, 128, [64, 96, 128, 130]),
    "empty experts": (50, 24, 40, [0, 0, 31, 31, 50, 50]),
    "one expert": (40, 130, 7, [40]),
    "all in one": (65, 16, 72, [0, 65, 65]),
    "rows of nobody": (100, 40, 65, [20, 60]),
    "nobody has rows": (9, 8, 8, [0, 0, 0]),
    "single": (3, 1, 1, [1, 2, 3]),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(got, want, theirs):
    """`want` in float64, `theirs` by torch in the type of `got`. A NaN fails."""
    assert got.shape == want.shape
    if got.numel() == 0:
        return
    error, limit = (got.double() - want).abs().max().item(), TOLERANCE[got.dtype] * want.abs().max().item()
    assert error <= max(limit, 1.1 * (theirs.double() - want).abs().max().item()), (error, limit)


def run(function, x, weights, ends, grad):
    y = function(x, weights, ends)
    return (y, *torch.autograd.grad(y, (x, weights), grad))


def compare(x, weights, ends, grad):
    """Values and both gradients; returns ours."""
    ours = run(grouped_matmul, x, weights, ends, grad)
    in_type = [t.detach().clone().requires_grad_() for t in (x, weights)]
    in_double = [t.detach().double().requires_grad_() for t in (x, weights)]
    theirs, want = run(reference, *in_type, ends, grad), run(reference, *in_double, ends, grad.double())
    for one, wish, their in zip(ours, want, theirs, strict=True):
        close(one, wish, their)
        assert one.dtype == x.dtype
    return ours


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(device, dtype, case, transposed):
    rows, k, n, ends = CASES[case]
    x = normal(rows, k, dtype=dtype, device=device, grad=True)
    weights = normal(len(ends), n, k).mT if transposed else normal(len(ends), k, n)
    weights = weights.to(device, dtype).requires_grad_()
    ends = torch.tensor(ends, dtype=torch.int32, device=device)
    _, _, grad_weights = compare(x, weights, ends, normal(rows, n, dtype=dtype, device=device))
    assert grad_weights.stride() == weights.stride()


def test_operands_that_lie_anywhere():
    """Rows apart, starting off 16 bytes, backwards in memory, expanded."""
    ends = torch.tensor([10, 4, 30, 4, 33, 4], dtype=torch.int32)[::2]
    for x in (normal(40, 70)[:33, 3:35], normal(32, 33).mT, normal(32).expand(33, 32), normal(66, 32)[::2]):
        for weights in (
            normal(3, 32, 50)[:, :, 2:42],
            normal(40, 3, 32).permute(1, 2, 0),
            normal(32, 40).expand(3, -1, -1),
        ):
            compare(x.requires_grad_(), weights.requires_grad_(), ends, normal(33).unsqueeze(1).expand(33, 40))


def test_larger_than_a_walk():
    """More tiles than programs: each of them comes back to an expert, and passes others by."""
    ends = torch.tensor([100, 101, 101, 230, 300], dtype=torch.int32)
    compare(normal(300, 72, grad=True), normal(5, 72, 200, grad=True), ends, normal(300, 200))


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_leaks_between_experts(device):
    """Of a matrix or rows that hold NaN or infinities, only their own expert sees something; of nobody's rows none."""
    x, weights = normal(45, 24, device=device), normal(3, 24, 40, device=device)
    x[13:20], x[40:], weights[1] = math.nan, math.nan, math.inf
    ends = torch.tensor([13, 20, 40], dtype=torch.int32, device=device)
    grad = normal(45, 40, device=device)
    grad[13:20], grad[40:] = math.nan, math.nan
    y, grad_x, grad_weights = run(grouped_matmul, x.requires_grad_(), weights.requires_grad_(), ends, grad)
    mine = torch.zeros(45, dtype=torch.bool, device=device)
    mine[13:20] = True
    for rows in (y, grad_x):
        assert (rows[40:] == 0).all() and rows[~mine].isfinite().all() and not rows[mine].isfinite().any()
    assert grad_weights[[0, 2]].isfinite().all() and grad_weights[1].isnan().all()


def test_gradients_of_gradients():
    ends = torch.tensor([7, 7, 20], dtype=torch.int32)

    def second(function, dtype):
        torch.manual_seed(1)
        x, weights, grad = (normal(*shape).to(dtype).requires_grad_() for shape in ((20, 9), (3, 9, 11), (20, 11)))
        grads = torch.autograd.grad(function(x, weights, ends), (x, weights), grad, create_graph=True)
        return torch.autograd.grad(sum(g.pow(3).sum() for g in grads), (x, weights, grad))

    for got, want in zip(second(grouped_matmul, torch.float32), second(reference, torch.float64), strict=True):
        assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_same_bits_every_time():
    x, weights = normal(50, 40, dtype=torch.bfloat16, grad=True), normal(2, 40, 33, dtype=torch.bfloat16, grad=True)
    grad, ends = normal(50, 33, dtype=torch.bfloat16), torch.tensor([21, 50], dtype=torch.int32)
    for one, other in zip(*(run(grouped_matmul, x, weights, ends, grad) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_weights_by_definition():
    x, y, ends = normal(30, 12), normal(30, 20), torch.tensor([11, 11, 28], dtype=torch.int32)
    want = reference_weights(x.double(), y.double(), ends)
    close(torch.ops.groundup.grouped_weights(x, y, ends), want, want)


def test_nothing_is_written_outside():
    x, weights, ends = normal(7, 12), torch.zeros(2, 12, 8)[:, :, :5], torch.tensor([3, 7], dtype=torch.int32)
    place, wide = device_of.place(x.device, kernels="triton"), torch.full((12, 9), 5.0)
    place.run("grouped_matmul", x=x, weights=weights.copy_(normal(2, 12, 5)), ends=ends, d=wide[2:9, 1:6])
    only_written(wide, wide[2:9, 1:6])
    y, wide = torch.zeros(7, 8)[:, :5], torch.full((4, 16, 9), 5.0)
    place.run("grouped_weights", x=x, y=y.copy_(normal(7, 5)), ends=ends, d=wide[1:3, 2:14, 1:6])
    only_written(wide, wide[1:3, 2:14, 1:6])


def test_ends_that_nobody_looked_at():
    """On a GPU they may fall or lie outside: nothing is written outside, and every row once."""
    x, y, weights = normal(7, 12), torch.zeros(7, 8)[:, :5], torch.zeros(4, 12, 8)[:, :, :5]
    weights.copy_(normal(4, 12, 5)), y.copy_(normal(7, 5))
    place, wide = device_of.place(x.device, kernels="triton"), torch.full((60, 9), 5.0)
    ends = torch.tensor([-25, 6, 2, 50], dtype=torch.int32)
    place.run("grouped_matmul", x=x, weights=weights, ends=ends, d=wide[30:37, 1:6])
    only_written(wide, wide[30:37, 1:6])
    torch.testing.assert_close(wide[30:37, 1:6], torch.cat([x[:6] @ weights[1], x[6:] @ weights[3]]))
    wide = torch.full((8, 16, 9), 5.0)
    ends[0] = -(2**31)  # the rows from there on are no number of 32 bits
    place.run("grouped_weights", x=x, y=y, ends=ends, d=wide[2:6, 2:14, 1:6])
    only_written(wide, wide[2:6, 2:14, 1:6])
    torch.testing.assert_close(wide[3, 2:14, 1:6], x[:6].mT @ y[:6])


def test_empty():
    for rows, k, n in ((0, 8, 8), (5, 0, 8), (5, 8, 0)):
        x, weights = normal(rows, k, grad=True), normal(2, k, n, grad=True)
        y = grouped_matmul(x, weights, torch.tensor([rows, rows], dtype=torch.int32))
        assert torch.equal(y, torch.zeros(rows, n))
        y.sum().backward()
        assert torch.equal(x.grad, torch.zeros(rows, k)) and torch.equal(weights.grad, torch.zeros(2, k, n))


# ---- as torch's operations, and what is refused ----------------------------------------------------------------------


def test_operations_as_torch_wants_them():
    ends = torch.tensor([4, 9], dtype=torch.int32)
    x, weights = normal(9, 8, grad=True), normal(2, 8, 5, grad=True)
    torch.library.opcheck(torch.ops.groundup.grouped_matmul.default, (x, weights, ends, False))
    y = normal(9, 5, grad=True)
    torch.library.opcheck(torch.ops.groundup.grouped_weights.default, (x, y, ends))


X, W, ENDS = torch.zeros(6, 8), torch.zeros(2, 8, 4), torch.tensor([2, 6], dtype=torch.int32)
REFUSED = {
    "x is torch.float64": lambda: grouped_matmul(X.double(), W.double(), ENDS),
    "weights is torch.float16": lambda: grouped_matmul(X, W.half(), ENDS),
    "ends is torch.int64": lambda: grouped_matmul(X, W, ENDS.long()),
    r"x has shape \(6,\)": lambda: grouped_matmul(X[:, 0], W, ENDS),
    r"weights has shape \(8, 4\)": lambda: grouped_matmul(X, W[0], ENDS),
    r"weights has shape \(2, 8, 4\): expected \(1, 8, N\)": lambda: grouped_matmul(X, W, ENDS[:1]),
    r"weights has shape \(2, 8, 4\): expected \(2, 7, N\)": lambda: grouped_matmul(X[:, :7], W, ENDS),
    r"ends has shape \(2, 1\)": lambda: grouped_matmul(X, W, ENDS[:, None]),
    r"ends has shape \(0,\)": lambda: grouped_matmul(X, W[:0], ENDS[:0]),
    "ends is on meta": lambda: grouped_matmul(X, W, ENDS.to("meta")),
    r"ends\[1\] is 1: expected 2 to 6": lambda: grouped_matmul(X, W, torch.tensor([2, 1], dtype=torch.int32)),
    r"ends\[0\] is -1": lambda: grouped_matmul(X, W, torch.tensor([-1, 6], dtype=torch.int32)),
    r"ends\[1\] is 7": lambda: grouped_matmul(X, W, torch.tensor([2, 7], dtype=torch.int32)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


# ---- what is compiled for Hopper -------------------------------------------------------------------------------------


def compiled(dtype, rows, experts, k, n, transposed=False, gradients=True):
    x = torch.zeros(rows, k, dtype=dtype, requires_grad=True)
    weights = torch.zeros(experts, k, n, dtype=dtype)
    weights = weights.mT.contiguous().mT if transposed else weights
    ends = torch.full((experts,), rows, dtype=torch.int32)
    with compiling(90) as found:
        y = grouped_matmul(x, weights.requires_grad_(), ends)
        if gradients:
            y.backward(torch.zeros_like(y))
    return found


@needs_tools
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_machine_code(tmp_path, dtype):
    """Forwards, and both gradients: 128 x 256 on two warpgroups, operands by TMA straight from where they lie."""
    found = compiled(dtype, 256, 2, 512, 512)
    assert [one.name for one in found] == ["_rows_times", "_rows_times", "_grouped_weights"]
    for one in found:
        kernel = machine_code(one, tmp_path)
        whole = kernel.count(r"HGMMA\.64x256x16\.F32")
        assert whole == (8 if one.name == "_grouped_weights" else 4)  # 64 terms; the rows that are masked once more
        assert kernel.count("HMMA") == 0
        assert kernel.count("UTMALDG") and kernel.count(r"STG\.E\.128")
        if one.name == "_rows_times":
            assert kernel.count(r"UTMALDG\.3D") and kernel.count(r"LDG\.E\.") == 0


@needs_tools
def test_machine_code_of_small_experts_and_of_float32(tmp_path):
    (found,) = compiled(torch.bfloat16, 64, 4, 128, 128, transposed=True, gradients=False)
    small = machine_code(found, tmp_path)
    assert small.count(r"HGMMA\.64x128x16\.F32\.BF16") == 4
    for one in compiled(torch.float32, 256, 2, 64, 64):
        kernel = machine_code(one, tmp_path)
        assert kernel.count("FFMA") and not kernel.count("HGMMA") and kernel.count("UTMALDG")
