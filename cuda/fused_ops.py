"""The memory-bound operations of a GPT by our kernels, for torch tensors; differentiable, and known to torch.compile.

    y = rms_norm(x, gain)                                    y, h = rms_norm(x, gain, residual=r)     # h = x + r
    y = layer_norm(x, gain, bias)                            y, h = layer_norm(x, gain, bias, residual=r)
    q = rotary(q, cos, sin)                                  y = swiglu(gate, up)
    y = gelu(x, approximate="tanh")                          y = relu2(x)                y = softmax(x)

Types are float32, bfloat16 and float16, all sums float32. CPU tensors run on the CPU model (cuda/_simt), CUDA tensors
on the GPU, on the current stream; with kernels="triton" in Triton's interpreter, or compiled by Triton. Rows may lie
anywhere, but their elements lie side by side. Refused with a ValueError: other types, shapes that do not fit, tensors
on two devices, a last dimension that is not contiguous, norms in CUDA C++ of more than 16384 elements of 16 bits or
12288 of 32 (5120 where rows do not start at multiples of 16 bytes); with a RuntimeError: a module that is not built,
Triton that is not installed, gradients of gradients. Letters: C is the width of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cuda.device import DTYPES, Kernels, check_kernels, place

BLOCKS = 3  # a multiprocessor: of blocks that sum gradients of gains, each with a row of partial sums


def rms_norm(
    x: Tensor,
    gain: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    kernels: Kernels = "cuda",
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension; with a residual (y, h), where h = x + residual is what
    is normalised. x and residual (.., C) have one type, gain (C,) that or float32, results the type of x."""
    check_kernels(kernels)
    y, h, _, _ = _rms_norm(x, residual, gain, None, float(eps), kernels)
    return y if residual is None else (y, h)


def layer_norm(
    x: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    kernels: Kernels = "cuda",
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean(x)) / sqrt(var(x) + eps) * gain + bias over the last dimension, else as rms_norm. bias (C,) has the
    type of gain, and none goes without a gain."""
    check_kernels(kernels)
    y, h, _, _ = _layer_norm(x, residual, gain, bias, float(eps), kernels)
    return y if residual is None else (y, h)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, kernels: Kernels = "cuda") -> Tensor:
    """Channels i and i + K/2 of x (.., T, K) turned by an angle: x1 cos - x2 sin, x2 cos + x1 sin.

    cos and sin, float32 or of x's type, are (.., T, K/2), with leading dimensions that broadcast to those of x; or
    (.., T, K) with two equal halves, of which the first is read. No gradient goes into them.
    """
    check_kernels(kernels)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient: expected a constant, call .detach()")
    return _rotary(x, cos, sin, 1.0, kernels)


def swiglu(gate: Tensor, up: Tensor, *, kernels: Kernels = "cuda") -> Tensor:
    """silu(gate) * up, of one shape and type; both may be halves of one tensor."""
    check_kernels(kernels)
    return _swiglu(gate, up, kernels)


def gelu(x: Tensor, approximate: str = "none", *, kernels: Kernels = "cuda") -> Tensor:
    """x * Phi(x), exactly, or with approximate "tanh" by the usual formula."""
    check_kernels(kernels)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate {approximate!r}: expected one of none, tanh")
    return _activation(x, "gelu" if approximate == "none" else "gelu_tanh", kernels)


def relu2(x: Tensor, *, kernels: Kernels = "cuda") -> Tensor:
    """max(x, 0)^2."""
    check_kernels(kernels)
    return _activation(x, "relu2", kernels)


def softmax(x: Tensor, *, kernels: Kernels = "cuda") -> Tensor:
    """Over the last dimension."""
    check_kernels(kernels)
    return _softmax(x, kernels)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check(first: str, given: dict[str, Tensor | None], wide: Sequence[str] = ()) -> None:
    """All on the device and of the type of `first`; those in `wide` may be float32. Rows are contiguous."""
    x = given[first]
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {x.device}: expected one device, call .to()")
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            raise ValueError(f"{name} is on {tensor.device}: expected the CPU or a CUDA device")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: expected one of {DTYPES}; call .to()")
        if tensor.dtype != x.dtype and not (name in wide and tensor.dtype == torch.float32):
            also = " or torch.float32" if name in wide else ""
            raise ValueError(f"{name} is {tensor.dtype}: expected {x.dtype}, as {first} is{also}; call .to()")
        if tensor.ndim == 0:
            raise ValueError(f"{name} is a scalar: expected at least one dimension")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {tuple(tensor.stride())}: expected a contiguous last dimension, call .contiguous()"
            )


def _check_shape(name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {tuple(shape)}")


def _like(x: Tensor) -> Tensor:
    """An empty tensor for a result, in the order of x's dimensions where that leaves rows contiguous."""
    y = torch.empty_like(x)
    return y if x.shape[-1] < 2 or y.stride(-1) == 1 else x.new_empty(x.shape)


def _rows(given: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Views of 1 to 4 dimensions of tensors that agree in all but the last: dimensions that lie one after the other in
    all of them become one. Raises ValueError where more are left."""
    tensors = {name: x.detach() for name, x in given.items() if x is not None}
    sizes: list[int] = []
    strides: dict[str, list[int]] = {name: [] for name in tensors}
    shape = next(iter(tensors.values())).shape
    for d, size in enumerate(shape[:-1]):
        if size == 1:
            continue
        if sizes and all(strides[name][-1] == size * x.stride(d) for name, x in tensors.items()):
            sizes[-1] *= size
            for name, x in tensors.items():
                strides[name][-1] = x.stride(d)
        else:
            sizes.append(size)
            for name, x in tensors.items():
                strides[name].append(x.stride(d))
    if len(sizes) > 3:
        name = max(tensors, key=lambda name: not tensors[name].is_contiguous())
        raise ValueError(
            f"{name} has shape {tuple(tensors[name].shape)} and strides {tensors[name].stride()}: expected rows that "
            "need at most three strides, call .contiguous()"
        )
    views = {
        name: x.as_strided((*sizes, x.shape[-1]), (*strides[name], 1), x.storage_offset())
        for name, x in tensors.items()
    }
    return {name: views.get(name) for name in given}


def _elements(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `_rows`, and one long row where all tensors are contiguous."""
    if all(x.is_contiguous() for x in given.values()):
        return {name: x.detach().view(-1) for name, x in given.items()}
    return _rows(given)


def _readable(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient as autograd made it, copied where the kernels could not read its rows beside those of `like`."""
    readable = grad.ndim <= 4 and (grad.shape[-1] < 2 or grad.stride(-1) == 1)
    return grad if readable else _like(like).copy_(grad)


# ---- RMSNorm and LayerNorm -------------------------------------------------------------------------------------------


def _check_norm(x: Tensor, residual: Tensor | None, gain: Tensor | None, bias: Tensor | None) -> None:
    _check("x", {"x": x, "residual": residual, "gain": gain, "bias": bias}, wide=("gain", "bias"))
    _check_shape("residual", residual, x.shape)
    _check_shape("gain", gain, x.shape[-1:])
    _check_shape("bias", bias, x.shape[-1:])
    if bias is not None and gain is None:
        raise ValueError("bias without gain: expected both, or a gain alone")
    if bias is not None and bias.dtype != gain.dtype:
        raise ValueError(f"bias is {bias.dtype}: expected {gain.dtype}, as gain is; call .to()")


def _empty_results(x: Tensor, residual: Tensor | None, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h, mean and rstd; h of no elements without a residual, mean of none where nothing is centred."""
    h = _like(x) if residual is not None else x.new_empty(0)
    rows = x.shape[:-1].numel()
    mean = x.new_empty(rows if centred else 0, dtype=torch.float32)
    return _like(x), h, mean, x.new_empty(rows, dtype=torch.float32)


def _normalise(
    x, residual, gain, bias, eps: float, kernels: str, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_norm(x, residual, gain, bias)
    y, h, mean, rstd = _empty_results(x, residual, centred)
    if x.numel() == 0:
        return y, h, mean.zero_(), rstd.zero_()
    here = place(x.device, kernels=kernels)
    rows = _rows({"x": x, "residual": residual, "y": y, "h": None if residual is None else h})
    parameters = {name: p.detach() for name, p in (("gain", gain), ("bias", bias)) if p is not None}
    here.run("norm_forward", **rows, **parameters, mean=mean if centred else None, rstd=rstd, eps=eps)
    return y, h, mean, rstd


@torch.library.custom_op("groundup::rms_norm", mutates_args=(), device_types=("cpu", "cuda"))
def _rms_norm(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernels: str = "cuda",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _normalise(x, residual, gain, bias, eps, kernels, False)


@torch.library.custom_op("groundup::layer_norm", mutates_args=(), device_types=("cpu", "cuda"))
def _layer_norm(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernels: str = "cuda",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _normalise(x, residual, gain, bias, eps, kernels, True)


@_rms_norm.register_fake
def _(x, residual, gain, bias, eps, kernels="cuda"):
    _check_norm(x, residual, gain, bias)
    return _empty_results(x, residual, False)


@_layer_norm.register_fake
def _(x, residual, gain, bias, eps, kernels="cuda"):
    _check_norm(x, residual, gain, bias)
    return _empty_results(x, residual, True)


def _gradient_shapes(h: Tensor, gain: Tensor | None, biased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """d_x, d_gain and d_bias; the latter of no elements where there is no gain or bias."""
    width = h.shape[-1]
    parameter = h if gain is None else gain
    return (
        _like(h),
        parameter.new_empty(width if gain is not None else 0),
        parameter.new_empty(width if biased else 0),
    )


@torch.library.custom_op("groundup::norm_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _norm_backward(
    d_y: Tensor,
    d_h: Tensor | None,
    h: Tensor,
    gain: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    biased: bool,
    kernels: str = "cuda",
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_gain, d_bias = _gradient_shapes(h, gain, biased)
    if h.numel() == 0:
        return d_x, d_gain.zero_(), d_bias.zero_()
    here = place(h.device, kernels=kernels)
    summed = {}
    if gain is not None:
        shape = (BLOCKS * here.multiprocessors, 2 if biased else 1, -(-h.shape[-1] // 4) * 4)
        summed = {"partials": torch.empty(shape, device=h.device), "gain": gain.detach(), "d_gain": d_gain}
    if biased:
        summed["d_bias"] = d_bias
    rows = _rows({"h": h, "d_y": d_y, "d_h": d_h, "d_x": d_x})
    here.run("norm_backward", **rows, **summed, mean=mean if mean.numel() else None, rstd=rstd)
    return d_x, d_gain, d_bias


@_norm_backward.register_fake
def _(d_y, d_h, h, gain, mean, rstd, biased, kernels="cuda"):
    return _gradient_shapes(h, gain, biased)


def _save_norm(ctx, inputs, output) -> None:
    x, residual, gain, bias, _, ctx.kernels = inputs
    _, h, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.residual, ctx.biased = residual is not None, bias is not None
    ctx.save_for_backward(x if residual is None else h, gain, mean, rstd)


def _norm_gradients(ctx, d_y, d_h, *_):
    h, gain, mean, rstd = ctx.saved_tensors
    d_h = _readable(d_h, h) if ctx.residual and d_h is not None else None
    d_gain = d_bias = None
    if d_y is None:
        d_x = d_h
    else:
        d_x, d_gain, d_bias = _norm_backward(_readable(d_y, h), d_h, h, gain, mean, rstd, ctx.biased, ctx.kernels)
    return (
        d_x,
        d_x if ctx.residual else None,
        d_gain if gain is not None else None,
        d_bias if ctx.biased else None,
        None,
        None,
    )


_rms_norm.register_autograd(_norm_gradients, setup_context=_save_norm)
_layer_norm.register_autograd(_norm_gradients, setup_context=_save_norm)


# ---- rotary embedding ------------------------------------------------------------------------------------------------


def _tables(x: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Tensor]:
    """cos and sin as (.., T, K/2) views in the leading shape of x. Raises ValueError."""
    _check("x", {"x": x, "cos": cos, "sin": sin}, wide=("cos", "sin"))
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected an even number of channels")
    if sin.dtype != cos.dtype:
        raise ValueError(f"sin is {sin.dtype}: expected {cos.dtype}, as cos is; call .to()")
    tables = {"cos": cos, "sin": sin}
    for name, table in tables.items():
        leading = (1,) * (x.ndim - table.ndim) + tuple(table.shape[:-1])
        fits = len(leading) == x.ndim - 1 and all(t in (1, s) for t, s in zip(leading, x.shape, strict=False))
        if not fits or table.shape[-1] not in (width, width // 2):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}: expected one that broadcasts to {tuple(x.shape[:-1])}, and "
                f"{width // 2} or {width} channels"
            )
    return {name: table[..., : width // 2].expand(*x.shape[:-1], width // 2) for name, table in tables.items()}


@torch.library.custom_op("groundup::rotary", mutates_args=(), device_types=("cpu", "cuda"))
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, sign: float, kernels: str = "cuda") -> Tensor:
    tables = _tables(x, cos, sin)
    y = _like(x)
    if x.numel():
        here = place(x.device, kernels=kernels)
        here.run("rotary", **_rows({"x": x, "y": y, **tables}), sign=sign)
    return y


@_rotary.register_fake
def _(x, cos, sin, sign, kernels="cuda"):
    _tables(x, cos, sin)
    return _like(x)


def _save_rotary(ctx, inputs, output) -> None:
    _, cos, sin, ctx.sign, ctx.kernels = inputs
    ctx.save_for_backward(cos, sin)


def _turn_back(ctx, d_y: Tensor):
    return _rotary(_readable(d_y, d_y), *ctx.saved_tensors, -ctx.sign, ctx.kernels), None, None, None, None


_rotary.register_autograd(_turn_back, setup_context=_save_rotary)


# ---- activations -----------------------------------------------------------------------------------------------------


def _check_pair(gate: Tensor, up: Tensor) -> None:
    _check("gate", {"gate": gate, "up": up})
    _check_shape("up", up, gate.shape)


def _run_activation(name: str, kind: str, kernels: str, given: dict[str, Tensor]) -> None:
    x = next(iter(given.values()))
    if x.numel():
        here = place(x.device, kernels=kernels)
        here.run(name, **_elements(given), kind=kind)


@torch.library.custom_op("groundup::swiglu", mutates_args=(), device_types=("cpu", "cuda"))
def _swiglu(gate: Tensor, up: Tensor, kernels: str = "cuda") -> Tensor:
    _check_pair(gate, up)
    y = _like(gate)
    _run_activation("activation_forward", "swiglu", kernels, {"gate": gate, "up": up, "y": y})
    return y


@_swiglu.register_fake
def _(gate, up, kernels="cuda"):
    _check_pair(gate, up)
    return _like(gate)


@torch.library.custom_op("groundup::swiglu_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _swiglu_backward(d_y: Tensor, gate: Tensor, up: Tensor, kernels: str = "cuda") -> tuple[Tensor, Tensor]:
    d_gate, d_up = _like(gate), _like(up)
    given = {"gate": gate, "up": up, "d_y": d_y, "d_gate": d_gate, "d_up": d_up}
    _run_activation("activation_backward", "swiglu", kernels, given)
    return d_gate, d_up


@_swiglu_backward.register_fake
def _(d_y, gate, up, kernels="cuda"):
    return _like(gate), _like(up)


def _save_swiglu(ctx, inputs, output) -> None:
    *saved, ctx.kernels = inputs
    ctx.save_for_backward(*saved)


def _swiglu_gradients(ctx, d_y: Tensor):
    gate, up = ctx.saved_tensors
    return *_swiglu_backward(_readable(d_y, gate), gate, up, ctx.kernels), None


_swiglu.register_autograd(_swiglu_gradients, setup_context=_save_swiglu)


@torch.library.custom_op("groundup::activation", mutates_args=(), device_types=("cpu", "cuda"))
def _activation(x: Tensor, kind: str, kernels: str = "cuda") -> Tensor:
    _check("x", {"x": x})
    y = _like(x)
    _run_activation("activation_forward", kind, kernels, {"x": x, "y": y})
    return y


@_activation.register_fake
def _(x, kind, kernels="cuda"):
    _check("x", {"x": x})
    return _like(x)


@torch.library.custom_op("groundup::activation_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _activation_backward(d_y: Tensor, x: Tensor, kind: str, kernels: str = "cuda") -> Tensor:
    d_x = _like(x)
    _run_activation("activation_backward", kind, kernels, {"x": x, "d_y": d_y, "d_x": d_x})
    return d_x


@_activation_backward.register_fake
def _(d_y, x, kind, kernels="cuda"):
    return _like(x)


def _save_activation(ctx, inputs, output) -> None:
    x, ctx.kind, ctx.kernels = inputs
    ctx.save_for_backward(x)


def _activation_gradients(ctx, d_y: Tensor):
    (x,) = ctx.saved_tensors
    return _activation_backward(_readable(d_y, x), x, ctx.kind, ctx.kernels), None, None


_activation.register_autograd(_activation_gradients, setup_context=_save_activation)


# ---- softmax ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("groundup::softmax", mutates_args=(), device_types=("cpu", "cuda"))
def _softmax(x: Tensor, kernels: str = "cuda") -> Tensor:
    _check("x", {"x": x})
    y = _like(x)
    if x.numel():
        here = place(x.device, kernels=kernels)
        here.run("softmax_forward", **_rows({"x": x, "y": y}))
    return y


@_softmax.register_fake
def _(x, kernels="cuda"):
    _check("x", {"x": x})
    return _like(x)


@torch.library.custom_op("groundup::softmax_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _softmax_backward(d_y: Tensor, y: Tensor, kernels: str = "cuda") -> Tensor:
    d_x = _like(y)
    if y.numel():
        here = place(y.device, kernels=kernels)
        here.run("softmax_backward", **_rows({"y": y, "d_y": d_y, "d_x": d_x}))
    return d_x


@_softmax_backward.register_fake
def _(d_y, y, kernels="cuda"):
    return _like(y)


def _save_softmax(ctx, inputs, output) -> None:
    _, ctx.kernels = inputs
    ctx.save_for_backward(output)


def _softmax_gradient(ctx, d_y: Tensor):
    (y,) = ctx.saved_tensors
    return _softmax_backward(_readable(d_y, y), y, ctx.kernels), None


_softmax.register_autograd(_softmax_gradient, setup_context=_save_softmax)
