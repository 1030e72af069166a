"""The grouped matrix product of a mixture of experts, for torch tensors: differentiable, and known to torch.compile.

    order = experts.argsort()                                # which expert each row goes to, sorted
    ends = torch.bincount(experts, minlength=E).cumsum(0).to(torch.int32)
    y = grouped_matmul(x[order], weights, ends)              # x[begin:end] @ weights[e] for every expert e

The kernels are in Triton only (triton_grouped.py), so nothing here takes `kernels`. CPU tensors run in Triton's
interpreter, CUDA tensors on the GPU, on the current stream, from Ampere on; nothing waits for the GPU to say how many
rows an expert got. Types are float32, bfloat16 and float16, all sums float32. Operands whose rows do not begin at
multiples of 16 bytes are copied first. Refused with a ValueError: other types, shapes that do not fit, tensors on two
devices. Letters: E experts, x has rows of K, a result rows of N.
"""

import torch
from torch import Tensor

from cuda.device import DTYPES, place


def grouped_matmul(x: Tensor, weights: Tensor, ends: Tensor, *, check: bool = False) -> Tensor:
    """(rows, N): row i is x[i] @ weights[e], where e is the expert whose rows i is among.

    x (rows, K), sorted by expert; weights (E, K, N), or the transposed view of (E, N, K), in its type. ends (E,) int32:
    expert e has the rows from ends[e - 1], or 0, up to ends[e], maybe none, as torch's grouped_mm has it. Rows past the
    last end belong to nobody: their results and gradients are 0. Gradients go into x and weights, and through these
    gradients too; that of weights is stored as weights are.

    The values of ends are looked at if they are on the CPU; on a GPU that would wait for it, so they are looked at with
    check=True alone. Without it the caller answers for them: with ends that fall, results are undefined.
    """
    return _grouped(x, weights, ends, check)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_types(given: dict[str, Tensor], ends: Tensor) -> None:
    first, x = next(iter(given.items()))
    for name, tensor in {**given, "ends": ends}.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {x.device}: expected one device, call .to()")
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            raise ValueError(f"{name} is on {tensor.device}: expected the CPU or a CUDA device")
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES or tensor.dtype != x.dtype:
            expected = f"{x.dtype}, as {first} is" if x.dtype in DTYPES else f"one of {DTYPES}"
            raise ValueError(f"{name} is {tensor.dtype}: expected {expected}; call .to()")
    if ends.dtype != torch.int32:
        raise ValueError(f"ends is {ends.dtype}: expected torch.int32; call .to()")
    if ends.ndim != 1 or len(ends) == 0:
        raise ValueError(f"ends has shape {tuple(ends.shape)}: expected (E,), a row number for each of the experts")


def _check(x: Tensor, weights: Tensor, ends: Tensor) -> None:
    _check_types({"x": x, "weights": weights}, ends)
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (rows, K)")
    if weights.ndim != 3 or weights.shape[:2] != (len(ends), x.shape[1]):
        raise ValueError(f"weights has shape {tuple(weights.shape)}: expected ({len(ends)}, {x.shape[1]}, N)")


def _check_weights(x: Tensor, y: Tensor, ends: Tensor) -> None:
    _check_types({"x": x, "y": y}, ends)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"x has shape {tuple(x.shape)}, y {tuple(y.shape)}: expected (rows, K) and (rows, N)")


def _check_values(rows: int, ends: Tensor) -> None:
    last = 0
    for e, end in enumerate(ends.tolist()):
        if not last <= end <= rows:
            raise ValueError(f"ends[{e}] is {end}: expected {last} to {rows}, from the end before to the rows of x")
        last = end


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _transposed(weights: Tensor) -> bool:
    return weights.stride(2) != 1 and weights.stride(1) == 1


def _described(x: Tensor) -> Tensor:
    """x, or a copy of it that TMA can describe: contiguous rows, each at a multiple of 16 bytes."""
    x = x.detach()
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides):
        return x
    at_once = 16 // x.element_size()
    columns = x.shape[-1]
    return x.new_empty((*x.shape[:-1], -(-columns // at_once) * at_once))[..., :columns].copy_(x)


# ---- the operations --------------------------------------------------------------------------------------------------


@torch.library.custom_op("groundup::grouped_matmul", mutates_args=(), device_types=("cpu", "cuda"))
def _grouped(x: Tensor, weights: Tensor, ends: Tensor, check: bool) -> Tensor:
    _check(x, weights, ends)
    if check or ends.device.type == "cpu":
        _check_values(len(x), ends)
    d = x.new_empty((len(x), weights.shape[2]))
    if x.numel() == 0 or d.numel() == 0:
        return d.zero_()
    weights = _described(weights.mT).mT if _transposed(weights) else _described(weights)
    here = place(x.device, kernels="triton")
    here.run("grouped_matmul", x=_described(x), weights=weights, ends=ends.contiguous(), d=d)
    return d


@_grouped.register_fake
def _(x, weights, ends, check):
    _check(x, weights, ends)
    return x.new_empty((x.shape[0], weights.shape[2]))


@torch.library.custom_op("groundup::grouped_weights", mutates_args=(), device_types=("cpu", "cuda"))
def _grouped_weights(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """(E, K, N): x[group].T @ y[group] for every expert."""
    _check_weights(x, y, ends)
    d = x.new_empty((len(ends), x.shape[1], y.shape[1]))
    if len(x) == 0 or d.numel() == 0:
        return d.zero_()
    here = place(x.device, kernels="triton")
    here.run("grouped_weights", x=_described(x), y=_described(y), ends=ends.contiguous(), d=d)
    return d


@_grouped_weights.register_fake
def _(x, y, ends):
    _check_weights(x, y, ends)
    return x.new_empty((ends.shape[0], x.shape[1], y.shape[1]))


# ---- gradients: of each of the two operations by both of them --------------------------------------------------------


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])


def _gradients(ctx, grad: Tensor):
    x, weights, ends = ctx.saved_tensors
    grad_x = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_x = _grouped(grad, weights.mT, ends, False)
    if ctx.needs_input_grad[1]:
        stored_transposed = _transposed(weights)
        grad_weights = _grouped_weights(grad, x, ends).mT if stored_transposed else _grouped_weights(x, grad, ends)
    return grad_x, grad_weights, None, None


def _weights_gradients(ctx, grad: Tensor):
    x, y, ends = ctx.saved_tensors
    grad_x = _grouped(y, grad.mT, ends, False) if ctx.needs_input_grad[0] else None
    grad_y = _grouped(x, grad, ends, False) if ctx.needs_input_grad[1] else None
    return grad_x, grad_y, None


_grouped.register_autograd(_gradients, setup_context=_save)
_grouped_weights.register_autograd(_weights_gradients, setup_context=_save)
