"""The check of interpreted kernels finds what is put into small ones, and nothing in the operations of this room."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

from cuda import ops, optim
from cuda.triton_check import AccessError, checking
from cuda.triton_compat import TensorDescriptor, jit

BF16 = torch.bfloat16


@jit
def shifted(x, y, n, store_at, load_at, WIDTH: tl.constexpr):
    """y[i + store_at] = x[i + load_at] for the WIDTH elements that begin at the program's."""
    i = tl.program_id(0) * 8 + tl.arange(0, WIDTH)
    tl.store(y + i + store_at, tl.load(x + i + load_at, mask=i < n, other=0.0), mask=i < n)


@jit
def folded(x, y):
    i = tl.arange(0, 16)
    tl.store(y + i // 2, tl.load(x + i))


@jit
def boxed(x, y):
    at = tl.program_id(0) * 8
    y.store([at, 0], x.load([at, 0]))


def test_what_is_right_is_silent_and_counted():
    x, y = torch.randn(29), torch.zeros(29)
    with checking() as launches:
        shifted[(4,)](x, y, 29, 0, 0, 8)
        shifted[(4,)](y, y, 29, 0, 0, 8)  # each program its own: in place
    assert torch.equal(x, y) and launches == ["shifted", "shifted"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((29, 0, 0, 16), "shifted: .* bytes that two programs store"),  # a program's blocks overlap
        ((29, 1, 0, 8), r"shifted, program \(3, 0, 0\): a store of 1 elements outside of all tensors"),
        ((29, 0, 1, 8), r"shifted, program \(3, 0, 0\): a load of 1 elements outside"),
        ((29, 0, -1, 8), r"shifted, program \(0, 0, 0\): a load of 1 elements outside"),
    ],
    ids=["overlap", "store outside", "load outside", "load before"],
)
def test_stray_accesses_and_overlaps(arguments, says):
    # In memory of their own: between them lies what belongs to neither.
    room = torch.zeros(29 + 16 + 29)
    with checking(), pytest.raises(AccessError, match=says):
        shifted[(4,)](room[:29], room[45:], *arguments)


def test_a_program_that_reads_what_another_writes():
    x = torch.zeros(33)
    with (
        checking(),
        pytest.raises(AccessError, match="shifted: 12 bytes that one program stores and another one loads"),
    ):
        shifted[(4,)](x[:32], x, 32, 0, 1, 8)


def test_two_elements_in_one_place():
    with checking(), pytest.raises(AccessError, match="folded.*a store of 16 elements to 8 places"):
        folded[(1,)](torch.randn(16), torch.zeros(16))


def test_descriptors_are_checked_for_races():
    x, y = torch.randn(16, 16), torch.zeros(16, 16)
    with checking() as launches:
        boxed[(2,)](TensorDescriptor.from_tensor(x, [8, 16]), TensorDescriptor.from_tensor(y, [8, 16]))
    assert torch.equal(x, y) and launches == ["boxed"]
    with checking(), pytest.raises(AccessError, match="boxed: 512 bytes that two programs store"):
        boxed[(2,)](TensorDescriptor.from_tensor(x, [16, 16]), TensorDescriptor.from_tensor(y, [16, 16]))


def test_afterwards_nothing_is_checked():
    room = torch.zeros(74)
    with pytest.raises(ZeroDivisionError), checking():
        raise ZeroDivisionError
    shifted[(4,)](room[:29], room[45:], 29, 0, 1, 8)


# ---- the operations --------------------------------------------------------------------------------------------------


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def heads(tokens: int, number: int) -> torch.Tensor:
    return randn(1, number, tokens, 64)


def optimise() -> None:
    parameters = [randn(n, dtype=dtype) for n in (5, 3000) for dtype in (torch.float32, BF16)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optim.clip_grad_norm_(parameters, 1.0, kernels="triton")
    optim.AdamW(parameters, kernels="triton").step()


def decode() -> torch.Tensor:
    table, lengths = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32), torch.tensor([20, 7], dtype=torch.int32)
    pages = [torch.randn(4, 16, 2, 64).to(BF16) for _ in range(2)]
    return ops.attention_decode(torch.randn(2, 4, 1, 64).to(BF16), *pages, table, lengths, splits=2, kernels="triton")


def sgmv() -> torch.Tensor:
    pools = randn(3, 8, 40), randn(3, 24, 8)
    segments, adapters = torch.tensor([0, 5, 9], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
    return ops.lora_sgmv(randn(9, 40), *pools, segments, adapters, torch.ones(3), kernels="triton")


def packed() -> torch.Tensor:
    starts = torch.tensor([0, 5, 5, 40], dtype=torch.int32)
    q, k, v = randn(40, 4, 64), randn(40, 2, 64), randn(40, 2, 64)
    return ops.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, window=9, kernels="triton")


def unpacked() -> None:
    numbers = torch.randint(256, (780,), dtype=torch.uint8)
    ops.dequantize_nf4(numbers, torch.rand(25), (24, 65), BF16)
    ops.dequantize_int4(numbers[:768].view(24, 32), torch.rand(24, 2).to(BF16), None, (24, 64), BF16, group=32)
    ops.dequantize_int8(torch.randint(-9, 9, (24, 65), dtype=torch.int8), torch.rand(24), BF16)


def eight_bits() -> None:
    for scaling in ("row", "tensor"):
        ops.quantize_fp8(randn(40, 70).detach(), scaling=scaling)
    ops.quantize_fp8(randn(40, 70).detach(), transposed=True)


def bgmv() -> torch.Tensor:
    pools = torch.randn(3, 8, 40).to(BF16), torch.randn(3, 24, 8).to(BF16)
    adapters = torch.tensor([2, -1, 0, 0, 1], dtype=torch.int32)
    return ops.lora_bgmv(randn(5, 40).detach(), *pools, adapters, torch.ones(3), kernels="triton")


def nf4(rows: int) -> torch.Tensor:
    """Rows of 65 numbers: blocks of 64 lie across them."""
    return ops.nf4_matmul(randn(rows, 65), torch.randint(256, (780,), dtype=torch.uint8), torch.rand(25), (24, 65))


def int4() -> torch.Tensor:
    packed = torch.randint(256, (24, 32), dtype=torch.uint8)
    return ops.int4_matmul(randn(12, 64), packed, torch.rand(24, 2).to(BF16), group=32)


CASES = {
    "matmul": lambda: ops.matmul(randn(70, 33), randn(33, 90), kernels="triton"),
    "matmul through TMA": lambda: ops.matmul(randn(70, 48), randn(90, 48).mT, step="descriptor_02", kernels="triton"),
    "matmul persistent": lambda: ops.matmul(randn(300, 48), randn(140, 48).mT, step="persistent_03", kernels="triton"),
    "matmul by slices": lambda: ops.matmul(randn(20, 300), randn(300, 24), step="split_k_04", kernels="triton"),
    "fp8": lambda: ops.fp8_linear(randn(40, 64), randn(32, 64)),
    "grouped": lambda: ops.grouped_matmul(randn(20, 40), randn(3, 40, 24), torch.tensor([7, 7, 18], dtype=torch.int32)),
    "attention": lambda: ops.attention(heads(70, 4), heads(90, 2), heads(90, 2), causal=True, kernels="triton"),
    "attention, packed": packed,
    "decode": decode,
    "rms_norm": lambda: ops.rms_norm(randn(9, 100), randn(100), kernels="triton"),
    "layer_norm": lambda: ops.layer_norm(randn(9, 100), randn(100), randn(100), kernels="triton"),
    "norm, wide": lambda: ops.rms_norm(randn(2, 20001), randn(20001), kernels="triton"),
    "rotary": lambda: ops.rotary(randn(2, 3, 5, 16), torch.rand(5, 8), torch.rand(5, 8), kernels="triton"),
    "swiglu": lambda: ops.swiglu(randn(5, 77), randn(5, 77), kernels="triton"),
    "gelu": lambda: ops.gelu(randn(5, 77), kernels="triton"),
    "gelu, by tanh": lambda: ops.gelu(randn(5, 77), approximate="tanh", kernels="triton"),
    "relu2": lambda: ops.relu2(randn(5, 77), kernels="triton"),
    "softmax": lambda: ops.softmax(randn(7, 65), kernels="triton"),
    "softmax, wide": lambda: ops.softmax(randn(2, 20001), kernels="triton"),
    "cross_entropy": lambda: ops.cross_entropy(randn(6, 1001), torch.arange(6), kernels="triton"),
    "cross_entropy_": lambda: ops.cross_entropy_(randn(6, 1001).detach(), torch.arange(6), kernels="triton"),
    "linear_cross_entropy": lambda: ops.linear_cross_entropy(
        randn(20, 24), randn(101, 24), torch.arange(20), chunk_rows=8, kernels="triton"
    ),
    "embedding": lambda: ops.embedding(torch.arange(300) % 7, randn(9, 40), kernels="triton"),
    "optimizers": optimise,
    "quantize_fp8": eight_bits,
    "dequantize": unpacked,
    "sgmv": sgmv,
    "bgmv": bgmv,
    "nf4, few rows": lambda: nf4(3),
    "nf4": lambda: nf4(20),
    "nf4, many rows": lambda: nf4(700),
    "int4": int4,
    "int8": lambda: ops.int8_matmul(randn(12, 64), torch.randint(-9, 9, (24, 64), dtype=torch.int8), torch.rand(24)),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_forward_and_backward(case):
    torch.manual_seed(0)
    with checking() as launches:
        y = CASES[case]()
        if y is not None and y.requires_grad:
            y.backward(torch.randn_like(y))
    assert launches
