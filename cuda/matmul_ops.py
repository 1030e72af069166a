"""Matrix products by our kernels, for torch tensors and numpy arrays; differentiable, and known to torch.compile.

    d = ops.matmul(a, b, bias=bias, activation="gelu")       # activation(alpha * a @ b + bias) + beta * c
    ops.matmul(a, b, step="naive_01")                        # by one step of the ladder; None: dispatch.choose
    ops.matmul(a, b, kernels="triton", step="pointer_01")    # the same in Triton; None: triton_dispatch.choose_step

CPU tensors and arrays run on the CPU model (cuda/_simt) or in Triton's interpreter, CUDA tensors on the GPU, on the
current stream; sums are float32. Refused with a ValueError before anything runs: types other than float32, bfloat16 and
float16, shapes that do not fit, operands that are neither row-major nor the transpose of that, an unknown step or
kernels; with a RuntimeError: a step that this GPU cannot run, a module that is not built, Triton that is not installed.
Letters: A is m x k, B is k x n; a batch may stand before.
"""

import warnings
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda import dispatch, triton_dispatch
from cuda.device import DTYPES, Kernels, check_kernels, place

Activation = Literal["none", "gelu", "swiglu"]
ACTIVATIONS = ("none", "gelu", "swiglu")
NUMPY = {np.dtype("float32"): torch.float32, np.dtype("float16"): torch.float16, np.dtype("uint16"): torch.bfloat16}


def matmul(
    a: Tensor | np.ndarray,
    b: Tensor | np.ndarray,
    *,
    c: Tensor | np.ndarray | None = None,
    bias: Tensor | np.ndarray | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    activation: Activation = "none",
    out_dtype: torch.dtype | np.dtype | type | None = None,
    step: str | int | None = None,
    kernels: Kernels = "cuda",
) -> Tensor | np.ndarray:
    """activation(alpha * a @ b + bias) + beta * c.

    a (m, k) or (batch, m, k); b (k, n) or (batch, k, n): with one batch and one matrix, the batch shares the matrix.
    Each is row-major or a transposed view. bias (n,) in their type. c in the shape of the result, or (m, n) for all of
    a batch, in the result's type; it is read only if beta is not 0. activation "gelu" is the exact one; "swiglu" takes
    columns in pairs of gate and up, silu(gate) * up, and its result has n / 2 columns. out_dtype: that of a or float32.

    numpy has no bfloat16: its bits as uint16. The result of arrays is an array.
    step: a name of dispatch.STEPS, or its number from 1 on; with kernels "triton" of triton_dispatch.STEPS.
    """
    check_kernels(kernels)
    arrays = {"a": a, "b": b, "c": c, "bias": bias}
    given = {name: x for name, x in arrays.items() if x is not None}
    for name, x in given.items():
        if not isinstance(x, Tensor | np.ndarray):
            raise ValueError(f"{name} is a {type(x).__name__}: expected a torch tensor or a numpy array")
        if isinstance(x, Tensor) and x.layout != torch.strided:
            raise ValueError(f"{name} is {x.layout}: expected a dense tensor, call .to_dense()")
    numpy = [name for name, x in given.items() if isinstance(x, np.ndarray)]
    if numpy and len(numpy) < len(given):
        raise ValueError(f"{' and '.join(numpy)} of numpy, the rest of torch: expected all of one kind")
    if numpy:
        given = {name: _tensor_of(name, x) for name, x in given.items()}
        if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
            out_dtype = _dtype_of("out_dtype", np.dtype(out_dtype))
    if not numpy and not (out_dtype is None or isinstance(out_dtype, torch.dtype)):
        raise ValueError(f"out_dtype {out_dtype!r}: expected a torch dtype")
    a, b, c, bias = (given.get(name) for name in ("a", "b", "c", "bias"))
    if beta == 0:
        c = None
    elif c is None:
        raise ValueError(f"beta {beta} without c: expected c, or beta 0")
    d = _matmul(a, b, c, bias, float(alpha), float(beta), activation, out_dtype, _step_name(step, kernels), kernels)
    return _array_of(d) if numpy else d


# ---- numpy arrays are seen as tensors of the same memory -------------------------------------------------------------


def _dtype_of(name: str, dtype: np.dtype) -> torch.dtype:
    if dtype not in NUMPY:
        raise ValueError(f"{name} is {dtype}: expected one of float32, float16, uint16 (the bits of bfloat16)")
    return NUMPY[dtype]


def _tensor_of(name: str, x: np.ndarray) -> Tensor:
    dtype = _dtype_of(name, x.dtype)
    if any(stride < 0 or stride % x.itemsize for stride in x.strides):
        raise ValueError(f"{name} has strides of {x.strides} bytes: expected whole elements, forwards; copy it")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")  # nothing writes to it
        return torch.from_numpy(x).view(dtype)


def _array_of(x: Tensor) -> np.ndarray:
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


# ---- checks, of what a result's shape depends on; layouts and addresses are checked by the extension -----------------


def _step_name(step: str | int | None, kernels: str) -> str | None:
    steps = triton_dispatch.STEPS if kernels == "triton" else dispatch.STEPS
    if isinstance(step, int) and 1 <= step <= len(steps):
        return steps[step - 1]
    if step is None or step in steps:
        return step
    raise ValueError(f"step {step!r}: expected None, 1 to {len(steps)}, or one of {', '.join(steps)}")


def _check_types(given: dict[str, Tensor], out_dtype: torch.dtype, step: str | None, kernels: str) -> None:
    a = given["a"]
    for name, x in given.items():
        if x.device != a.device:
            raise ValueError(f"{name} is on {x.device}, a on {a.device}: expected one device, call .to()")
        if x.device.type not in ("cpu", "cuda", "meta"):
            raise ValueError(f"{name} is on {x.device}: expected the CPU or a CUDA device")
        wanted = out_dtype if name == "c" else a.dtype
        if x.dtype not in DTYPES or x.dtype != wanted:
            expected = f"{wanted}, as a is" if a.dtype in DTYPES and name != "c" else f"one of {DTYPES}"
            expected = f"{out_dtype}, as the result is" if name == "c" else expected
            raise ValueError(f"{name} is {x.dtype}: expected {expected}; call .to()")
    if out_dtype not in (a.dtype, torch.float32):
        raise ValueError(f"out_dtype {out_dtype}: expected {a.dtype} or torch.float32")
    if kernels == "cuda" and step is not None and a.dtype not in dispatch.dtypes_of(step):
        able = [name for name in dispatch.STEPS if a.dtype in dispatch.dtypes_of(name)]
        raise ValueError(f"step {step} and {a.dtype}: expected {dispatch.dtypes_of(step)}, or one of {', '.join(able)}")


def _result_shape(a: Tensor, b: Tensor, c: Tensor | None, bias: Tensor | None, activation: str) -> tuple[int, ...]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    for name, x in (("a", a), ("b", b)):
        if x.ndim not in (2, 3):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (rows, columns) or (batch, rows, columns)")
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"a {tuple(a.shape)} times b {tuple(b.shape)}: expected as many columns of a as rows of b; "
            f"a matrix stored transposed goes in as its view .mT"
        )
    batches = [x.shape[0] for x in (a, b) if x.ndim == 3 and x.shape[0] != 1]
    if len(batches) > 1 and batches[0] != batches[1]:
        raise ValueError(f"a {tuple(a.shape)} times b {tuple(b.shape)}: expected one size of batch")
    m, n = a.shape[-2], b.shape[-1]
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({n},)")
    if activation == "swiglu":
        if n % 2:
            raise ValueError(f"b has {n} columns: expected an even number for swiglu, pairs of gate and up")
        n //= 2
    shape = (*((batches or [1])[:1] if 3 in (a.ndim, b.ndim) else ()), m, n)
    if c is not None and tuple(c.shape) not in (shape, shape[-2:]):
        raise ValueError(f"c has shape {tuple(c.shape)}: expected {shape}")
    return shape


def _checked(a, b, c, bias, activation, out_dtype, step, kernels) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of the result."""
    given = {name: x for name, x in (("a", a), ("b", b), ("c", c), ("bias", bias)) if x is not None}
    out_dtype = out_dtype or a.dtype
    _check_types(given, out_dtype, step, kernels)
    return _result_shape(a, b, c, bias, activation), out_dtype


# ---- the operation ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("groundup::matmul", mutates_args=(), device_types=("cpu", "cuda"))
def _matmul(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    alpha: float,
    beta: float,
    activation: str,
    out_dtype: torch.dtype | None,
    step: str | None,
    kernels: str = "cuda",
) -> Tensor:
    shape, out_dtype = _checked(a, b, c, bias, activation, out_dtype, step, kernels)
    a, b, c, bias = (x if x is None else x.detach() for x in (a, b, c, bias))
    if a.shape[-1] == 0 or 0 in shape:
        return _empty_product(a, b, c, bias, alpha, beta, activation, shape).to(out_dtype)
    here = place(a.device, step, dispatch.WITHOUT_HOPPER, kernels)
    tiling = None
    if kernels == "cuda" and step is None:
        batch, (m, n) = (shape[0] if len(shape) == 3 else 1), (a.shape[-2], b.shape[-1])
        tma = a.dtype != torch.float32 and dispatch.describable(a) and dispatch.describable(b)
        layout = {"tma": tma, "row_column": dispatch.row_column(a, b)}
        step, tiling = dispatch.choose(
            here.kind, a.dtype, batch, m, n, a.shape[-1], **layout, multiprocessors=here.multiprocessors
        )
    d = torch.empty(shape, dtype=out_dtype, device=a.device)
    here.multiply(step, a, b, d, c=c, bias=bias, alpha=alpha, beta=beta, activation=activation, tiling=tiling)
    return d


@_matmul.register_fake
def _(a, b, c, bias, alpha, beta, activation, out_dtype, step, kernels="cuda"):
    shape, out_dtype = _checked(a, b, c, bias, activation, out_dtype, step, kernels)
    return a.new_empty(shape, dtype=out_dtype)


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(x)
    return F.silu(x[..., ::2]) * x[..., 1::2] if activation == "swiglu" else x


def _empty_product(a, b, c, bias, alpha, beta, activation, shape) -> Tensor:
    """Without k the sums are zero, and what is left of the epilogue is torch's; in float32."""
    x = torch.zeros((*shape[:-1], b.shape[-1]), device=a.device)
    if bias is not None:
        x = x + bias.float()
    x = _activated(x, activation)
    return x if c is None else x + beta * c.float()


# ---- gradients: two products with one operand transposed -------------------------------------------------------------


def _save(ctx, inputs, output) -> None:
    a, b, c, bias, ctx.alpha, ctx.beta, ctx.activation, _, _, ctx.kernels = inputs
    ctx.c_shape, ctx.c_dtype = (None, None) if c is None else (c.shape, c.dtype)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(a, b, bias if ctx.activation != "none" else None)


def _gradients(ctx, grad: Tensor):
    a, b, bias = ctx.saved_tensors
    wants_a, wants_b, wants_c, wants_bias = ctx.needs_input_grad[:4]
    grad_a = grad_b = grad_c = grad_bias = None
    if wants_c:
        grad_c = (ctx.beta * grad).sum_to_size(ctx.c_shape).to(ctx.c_dtype)
    if wants_a or wants_b or wants_bias:
        grad = _before_activation(ctx, grad, a, b, bias)
    if wants_bias:
        grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    grad = grad.to(a.dtype).contiguous()
    if wants_a:
        grad_a = _product(grad, b.mT, ctx.alpha, a, ctx.kernels)
    if wants_b:
        if b.ndim == 2 and a.ndim == 3:  # the sum over the batch is a sum over rows
            a, grad = a.reshape(-1, a.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_b = _product(a.mT, grad, ctx.alpha, b, ctx.kernels)
    return grad_a, grad_b, grad_c, grad_bias, None, None, None, None, None, None


def _product(x: Tensor, y: Tensor, alpha: float, like: Tensor, kernels: str) -> Tensor:
    """x @ y in the shape and type of `like`: summed over the batch where that has no batch, or one for all."""
    shared = max(x.ndim, y.ndim) == 3 and (like.ndim == 2 or like.shape[0] == 1)
    product = _matmul(x, y, None, None, alpha, 0.0, "none", torch.float32 if shared else None, None, kernels)
    return product.sum_to_size(like.shape).to(like.dtype) if shared else product


def _before_activation(ctx, grad: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of what the activation was applied to, which is computed again."""
    if ctx.activation == "none":
        return grad
    x = _matmul(a, b, None, bias, ctx.alpha, 0.0, "none", torch.float32, None, ctx.kernels)
    grad = grad.float()
    if ctx.activation == "gelu":
        density = torch.exp(-0.5 * x * x) / (2 * torch.pi) ** 0.5
        return grad * (0.5 * (1 + torch.erf(x / 2**0.5)) + x * density)
    gate, up = x[..., ::2], x[..., 1::2]
    s = torch.sigmoid(gate)
    return torch.stack([grad * up * s * (1 + gate * (1 - s)), grad * gate * s], dim=-1).flatten(-2)


_matmul.register_autograd(_gradients, setup_context=_save)
