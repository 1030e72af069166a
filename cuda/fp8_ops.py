"""Products in float8 for torch tensors: scaling and casting, the product, a linear layer that trains with them.

    x8, scale_x = quantize_fp8(x, scaling="row")             # x is about scale_x * x8
    w8, scale_w = quantize_fp8(weight, scaling="row")        # weight (n, k)
    y = fp8_matmul(x8, w8.mT, scale_x, scale_w.mT)           # (scale_x * x8) @ (scale_w * w8).mT
    y = fp8_linear(x, weight)                                # all of that, differentiable

The kernels are in Triton only (triton_fp8.py), so nothing here takes `kernels`. CPU tensors run in Triton's
interpreter, CUDA tensors on a Hopper GPU, on the current stream. All is known to torch.compile. Refused with a
ValueError: types, shapes and strides other than named below; with a RuntimeError: a GPU before Hopper.
Letters: A is m x k, B is k x n.
"""

from typing import Literal

import torch
from torch import Tensor

from cuda.device import DTYPES, place

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALINGS = ("tensor", "row")
PROMOTIONS = (None, 32, 64, 128)
Scaling = Literal["tensor", "row"]


def quantize_fp8(
    x: Tensor,
    *,
    scaling: Scaling = "tensor",
    dtype: torch.dtype = torch.float8_e4m3fn,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x8, scale) with x about scale * x8, where the largest |x| becomes the largest number of the type.

    x (m, k) in float32, bfloat16 or float16, rows contiguous. scale is float32: () with scaling "tensor", (m, 1) with
    "row". transposed: the same of x.mT, (k, m), with rows that are contiguous again: a product wants both operands
    contiguous along k, and tensor cores turn operands of 16 bits only.

    The rows of x8 begin at multiples of 16 bytes, as a product wants them: where m x k does not give that, x8 is a view
    of wider rows. What is all zeros gets the scale 1. A NaN stays one and does not count for the scale. With an
    infinity the scale is infinite, and all that it scales becomes NaN when it is scaled back. No gradient goes through.
    """
    _refuse_gradients(x=x)
    return _quantize(x, scaling, dtype, transposed)


def fp8_matmul(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    max_num_imprecise_acc: int | None = 128,
) -> Tensor:
    """(scale_a * a) @ (scale_b * b) + bias, (m, n) in out_dtype: float32, bfloat16 or float16.

    a (m, k) row-major and b (k, n) as the transposed view of a row-major (n, k), each e4m3 or e5m2; both begin at
    multiples of 16 bytes and so do their rows, as quantize_fp8 makes them. scale_a () or (m, 1), scale_b () or (1, n),
    float32, contiguous. bias (n,) in out_dtype. Scales and bias are applied in float32.

    Hopper's tensor cores keep some 14 bits of a float8 sum. So after every max_num_imprecise_acc of k the sum is added
    to another in float32: 32, 64 or 128; None leaves all of it to the tensor cores, which is faster and less exact. On
    the CPU sums are float32 either way. No gradient goes through.
    """
    _refuse_gradients(a=a, b=b, scale_a=scale_a, scale_b=scale_b, bias=bias)
    return _multiply(a, b, scale_a, scale_b, bias, out_dtype, max_num_imprecise_acc)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    *,
    scaling: Scaling = "tensor",
    grad_dtype: torch.dtype = torch.float8_e5m2,
    max_num_imprecise_acc: int | None = 128,
) -> Tensor:
    """x @ weight.mT in the type of x, where forwards and backwards all three products are of float8.

    x (.., k) and weight (n, k) in one type, float32, bfloat16 or float16. Every operand is scaled from what it holds
    now, as a whole or, with scaling "row", along the dimension that its product sums over: so dx scales the columns of
    weight, and dweight those of x and of the gradient. x and weight become e4m3, the gradient of the result grad_dtype:
    e5m2 has the range that small gradients want, e4m3 one more bit. Sums are rounded to the type of x or weight once.
    What is saved for the gradient is x and weight themselves, not their float8. Gradients of gradients are refused.
    """
    return _linear(x, weight, scaling, grad_dtype, max_num_imprecise_acc)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _refuse_gradients(**given: Tensor | None) -> None:
    for name, x in given.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient: float8 has none; expected fp8_linear, or .detach()")


def _check_device(**given: Tensor | None) -> None:
    first, *rest = [(name, x) for name, x in given.items() if x is not None]
    if first[1].device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{first[0]} is on {first[1].device}: expected the CPU or a CUDA device")
    for name, x in rest:
        if x.device != first[1].device:
            raise ValueError(f"{name} is on {x.device}, {first[0]} on {first[1].device}: expected one device")


def _check_one_of(name: str, value, expected: tuple) -> None:
    if value not in expected:
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(map(str, expected))}")


def _check_type(name: str, x: Tensor, expected: tuple) -> None:
    if x.dtype not in expected:
        raise ValueError(f"{name} is {x.dtype}: expected {' or '.join(map(str, expected))}; call .to()")


def _check_quantize(x: Tensor, scaling: str, dtype: torch.dtype) -> None:
    _check_device(x=x)
    _check_type("x", x, DTYPES)
    _check_one_of("scaling", scaling, SCALINGS)
    _check_one_of("dtype", dtype, FLOAT8)
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (m, k)")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"x has strides {x.stride()}: expected contiguous rows, call .contiguous()")


def _check_rows(name: str, x: Tensor, wanted: str) -> None:
    """That TMA can describe x, row-major."""
    contiguous = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    if not contiguous or x.stride(0) % 16 or x.data_ptr() % 16:
        raise ValueError(f"{name} has strides {x.stride()}: expected {wanted}, each row at a multiple of 16 bytes")


def _check_multiply(a, b, scale_a, scale_b, bias, out_dtype, max_num_imprecise_acc) -> None:
    _check_device(a=a, b=b, scale_a=scale_a, scale_b=scale_b, bias=bias)
    _check_one_of("out_dtype", out_dtype, DTYPES)
    _check_one_of("max_num_imprecise_acc", max_num_imprecise_acc, PROMOTIONS)
    for name, x in (("a", a), ("b", b)):
        _check_type(name, x, FLOAT8)
        if x.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (rows, columns)")
    (m, k), n = a.shape, b.shape[1]
    if b.shape[0] != k:
        raise ValueError(f"a {tuple(a.shape)} times b {tuple(b.shape)}: expected as many columns of a as rows of b")
    for name, x, shape in (("scale_a", scale_a, (m, 1)), ("scale_b", scale_b, (1, n))):
        _check_type(name, x, (torch.float32,))
        if tuple(x.shape) not in ((), shape):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected () or {shape}")
        if not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}: expected a contiguous tensor, call .contiguous()")
    if bias is not None:
        _check_type("bias", bias, (out_dtype,))
        if tuple(bias.shape) != (n,) or not bias.is_contiguous():
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}, strides {bias.stride()}: expected ({n},), contiguous"
            )


def _check_linear(x, weight, scaling, grad_dtype, max_num_imprecise_acc) -> None:
    _check_device(x=x, weight=weight)
    _check_type("x", x, DTYPES)
    _check_type("weight", weight, (x.dtype,))
    _check_one_of("scaling", scaling, SCALINGS)
    _check_one_of("grad_dtype", grad_dtype, FLOAT8)
    _check_one_of("max_num_imprecise_acc", max_num_imprecise_acc, PROMOTIONS)
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}: expected (.., k) and (n, k)")


# ---- the operations --------------------------------------------------------------------------------------------------


@torch.library.custom_op("groundup::quantize_fp8", mutates_args=(), device_types=("cpu", "cuda"))
def _quantize(x: Tensor, scaling: str, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor]:
    _check_quantize(x, scaling, dtype)
    y, scale = _quantized(x, scaling, dtype, transposed)
    if x.numel() == 0:
        return y, scale.fill_(1.0)
    place(x.device, kernels="triton").run(
        "quantize_fp8", x=x, y=y, scale=scale, per_row=scaling == "row", transposed=transposed
    )
    return y, scale


def _quantized(x: Tensor, scaling: str, dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[::-1] if transposed else x.shape
    y = x.new_empty((rows, -(-columns // 16) * 16), dtype=dtype)[:, :columns]
    return y, x.new_empty((rows, 1) if scaling == "row" else (), dtype=torch.float32)


@_quantize.register_fake
def _(x, scaling, dtype, transposed):
    _check_quantize(x, scaling, dtype)
    return _quantized(x, scaling, dtype, transposed)


@torch.library.custom_op("groundup::fp8_matmul", mutates_args=(), device_types=("cpu", "cuda"))
def _multiply(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    max_num_imprecise_acc: int | None,
) -> Tensor:
    _check_multiply(a, b, scale_a, scale_b, bias, out_dtype, max_num_imprecise_acc)
    (m, k), n = a.shape, b.shape[1]
    d = a.new_empty((m, n), dtype=out_dtype)
    if m == 0 or n == 0:
        return d
    if k == 0:
        return d.zero_() if bias is None else d.copy_(bias.expand_as(d))
    _check_rows("a", a, "a row-major matrix")
    _check_rows("b", b.mT, "the transposed view of a row-major matrix")
    place(a.device, kernels="triton").run(
        "fp8_matmul", a=a, b=b, scale_a=scale_a, scale_b=scale_b, bias=bias, d=d, imprecise=max_num_imprecise_acc
    )
    return d


@_multiply.register_fake
def _(a, b, scale_a, scale_b, bias, out_dtype, max_num_imprecise_acc):
    _check_multiply(a, b, scale_a, scale_b, bias, out_dtype, max_num_imprecise_acc)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _product(
    x: Tensor,
    y: Tensor,
    scaling: str,
    imprecise: int | None,
    out_dtype: torch.dtype,
    *,
    x_dtype: torch.dtype = FLOAT8[0],
    x_transposed: bool = False,
    y_transposed: bool = False,
) -> Tensor:
    """x @ y.mT of what is quantised here, each transposed before if asked for."""
    a, scale_a = _quantize(x, scaling, x_dtype, x_transposed)
    b, scale_b = _quantize(y, scaling, FLOAT8[0], y_transposed)
    return _multiply(a, b.mT, scale_a, scale_b.mT if scaling == "row" else scale_b, None, out_dtype, imprecise)


@torch.library.custom_op("groundup::fp8_linear", mutates_args=(), device_types=("cpu", "cuda"))
def _linear(
    x: Tensor, weight: Tensor, scaling: str, grad_dtype: torch.dtype, max_num_imprecise_acc: int | None
) -> Tensor:
    _check_linear(x, weight, scaling, grad_dtype, max_num_imprecise_acc)
    y = _product(_matrix(x), _matrix(weight), scaling, max_num_imprecise_acc, x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


@_linear.register_fake
def _(x, weight, scaling, grad_dtype, max_num_imprecise_acc):
    _check_linear(x, weight, scaling, grad_dtype, max_num_imprecise_acc)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("groundup::fp8_linear_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scaling: str,
    grad_dtype: torch.dtype,
    max_num_imprecise_acc: int | None,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Empty where none is wanted."""
    options = {"scaling": scaling, "imprecise": max_num_imprecise_acc, "out_dtype": x.dtype, "x_dtype": grad_dtype}
    grad, rows = _matrix(grad), _matrix(x)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if wants_x:
        grad_x = _product(grad, _matrix(weight), **options, y_transposed=True).view(x.shape)
    if wants_weight:
        grad_weight = _product(grad, rows, **options, x_transposed=True, y_transposed=True)
    return grad_x, grad_weight


@_linear_backward.register_fake
def _(grad, x, weight, scaling, grad_dtype, max_num_imprecise_acc, wants_x, wants_weight):
    return x.new_empty(x.shape if wants_x else 0), weight.new_empty(weight.shape if wants_weight else 0)


def _matrix(x: Tensor) -> Tensor:
    x = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous()


def _save(ctx, inputs, output) -> None:
    x, weight, *ctx.options = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx, grad: Tensor):
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = _linear_backward(grad, *ctx.saved_tensors, *ctx.options, wants_x, wants_weight)
    return grad_x if wants_x else None, grad_weight if wants_weight else None, None, None, None


_linear.register_autograd(_gradients, setup_context=_save)
