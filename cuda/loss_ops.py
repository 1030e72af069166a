"""The two ends of a language model by our kernels, for torch: the embedding, and the cross-entropy of its logits.

    loss = loss_ops.cross_entropy(logits, targets)                          # of logits that exist
    loss = loss_ops.linear_cross_entropy(x, head.weight, targets)           # of x @ weight.T, which never exists whole
    rows = loss_ops.embedding(tokens, table)

`kernels` says whose they are: CPU tensors run on the CPU model (cuda/_simt) for "cuda" and in Triton's interpreter for
"triton", CUDA tensors on the GPU, on the current stream. Sums are float32 and always in the same order. All have
gradients, none has second derivatives. torch.compile sees one operation.

Losses are the mean over the targets that are not `ignore_index`, in nats and float32; without such targets NaN, with
gradients of zero, as torch has it. `softcap` makes logits softcap * tanh(logits / softcap) first. `z_loss` adds the
gradient of z_loss * mean(log Z squared) over all rows, those to be ignored too; the value is the cross-entropy alone,
as in minigpt.model.mean_cross_entropy.

Refused with a ValueError before anything runs: shapes that do not fit, types other than float32, bfloat16 and float16,
and on the CPU a target or token outside of the vocabulary. On a GPU nobody looks, since the host would have to wait:
such a target gives a loss of NaN, such a token a row of NaN.
Letters: N rows, C channels, V words.
"""

import math
from functools import cache

import torch
from torch import Tensor

from cuda import dispatch
from cuda.device import DTYPES, Kernels, check_kernels, place

PIECE = 64  # sorted tokens that a block of embedding_backward sums: piece_length in fused/embedding.cu


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    kernels: Kernels = "cuda",
) -> Tensor:
    """The mean cross-entropy, 0-dim float32. logits (.., V) of any of the three types, targets (..) int64 or int32.

    Forward reads the logits once; backward reads them once more and writes their gradient.
    """
    check_kernels(kernels)
    _check_options(softcap, z_loss)
    if logits.ndim < 2 or tuple(targets.shape) != tuple(logits.shape[:-1]):
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}: expected (.., V) and (..), at least one "
            f"dimension of rows"
        )
    _check_types(logits=logits)
    _check_devices(logits=logits, targets=targets)
    logits, targets = logits.reshape(-1, logits.shape[-1]), _as_targets(targets)
    return _cross_entropy(logits, targets, float(softcap), float(z_loss), int(ignore_index), kernels)[0]


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    *,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    scale: float = 1.0,
    kernels: Kernels = "cuda",
) -> Tensor:
    """The same for training loops that do without autograd: the logits (N, V) become scale * their gradient, in the one
    pass that computes the loss."""
    check_kernels(kernels)
    _check_options(softcap, z_loss)
    if logits.ndim != 2 or tuple(targets.shape) != tuple(logits.shape[:1]):
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}: expected (N, V) and (N,)")
    _check_types(logits=logits)
    _check_devices(logits=logits, targets=targets)
    if torch.is_grad_enabled() and logits.requires_grad:
        raise ValueError("logits require a gradient: expected none, they are overwritten; call .detach()")
    targets = _as_targets(targets)
    _check_range("target", targets, logits.shape[1], ignore_index)
    count = _count(targets, ignore_index)
    losses = torch.empty(logits.shape[0], device=logits.device)
    scales = _scales(count, z_loss, len(losses)) * (scale / count.clamp(min=1))
    _run_one_pass(logits, targets, logits, losses, None, scales, softcap, z_loss, ignore_index, kernels)
    return losses.sum() / count


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    kernels: Kernels = "cuda",
) -> Tensor:
    """The mean cross-entropy of logits x @ weight.T + bias, 0-dim float32, without the logits.

    x (.., C), weight (V, C), bias (V,), targets (..) int64 or int32. weight and bias in x's type, or float32: then they
    are rounded to it. Under autocast x is cast first, as nn.Linear does. Logits of `chunk_rows` rows exist at a time
    (None: `rows_of_chunk`); they become their gradient where they lie, and from that come the gradients of x and,
    summed in float32, of weight and bias. So gradients are there when the forward pass ends, where any is wanted.
    """
    check_kernels(kernels)
    _check_options(softcap, z_loss)
    if x.ndim < 2 or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or tuple(targets.shape) != tuple(x.shape[:-1]):
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}: expected (.., C), "
            f"(V, C), (..), at least one dimension of rows"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},)")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows {chunk_rows}: expected None or at least 1")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    _check_types(x=x)
    _check_devices(x=x, weight=weight, targets=targets, bias=bias)
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} is {other.dtype}: expected {x.dtype}, as x is, or torch.float32")
    x, targets = x.reshape(-1, x.shape[-1]), _as_targets(targets)
    rows = chunk_rows or rows_of_chunk(x.shape[0])
    on = torch.is_grad_enabled()
    wants_x = on and x.requires_grad
    wants_weight = on and (weight.requires_grad or (bias is not None and bias.requires_grad))
    return _linear_cross_entropy(
        x, weight, targets, bias, float(softcap), float(z_loss), int(ignore_index), rows, wants_x, wants_weight, kernels
    )[0]


def rows_of_chunk(rows: int) -> int:
    """An eighth of the rows, a multiple of 128: at least 256, so that the products are large enough, and at most 4096,
    beyond which less memory for logits is worth more than fewer passes over the weight's gradient."""
    return min(max(rows // 8 // 128 * 128, 256), 4096)


def embedding(tokens: Tensor, table: Tensor, *, kernels: Kernels = "cuda") -> Tensor:
    """table[tokens]: (.., C) in the table's type, for tokens (..) int64 or int32 and a table (V, C).

    The table's gradient sums in float32, each row in the order of the tokens: the same to the last bit every time.
    """
    check_kernels(kernels)
    if table.ndim != 2:
        raise ValueError(f"table has shape {tuple(table.shape)}: expected (V, C)")
    _check_types(table=table)
    _check_devices(table=table, tokens=tokens)
    _check_integers("token", tokens)
    return _embedding(tokens.reshape(-1).long(), table, kernels).reshape(*tokens.shape, table.shape[1])


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_options(softcap: float, z_loss: float) -> None:
    if not (0 <= softcap < math.inf):
        raise ValueError(f"softcap {softcap}: expected 0, which is none, or a positive number")
    if not (0 <= z_loss < math.inf):
        raise ValueError(f"z_loss {z_loss}: expected 0 or a positive number")


def _check_types(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}: expected one of {DTYPES}; call .to()")
        if x.device.type not in ("cpu", "cuda", "meta"):
            raise ValueError(f"{name} is on {x.device}: expected the CPU or a CUDA device")
        if x.shape[-1] == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected at least one column")


def _check_devices(**tensors: Tensor | None) -> None:
    (first, x), *others = tensors.items()
    for name, other in others:
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device}, {first} on {x.device}: expected one device, call .to()")


def _check_integers(kind: str, indices: Tensor) -> None:
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{kind}s are {indices.dtype}: expected torch.int64 or torch.int32")


def _as_targets(targets: Tensor) -> Tensor:
    """(N,) int64 without gaps."""
    _check_integers("target", targets)
    return targets.reshape(-1).long().contiguous()


def _check_range(kind: str, indices: Tensor, size: int, ignore_index: int | None) -> None:
    """On the CPU; a GPU's answer would have to be waited for."""
    if indices.device.type != "cpu":
        return
    wrong = (indices < 0) | (indices >= size)
    if ignore_index is not None:
        wrong &= indices != ignore_index
    if wrong.any():
        expected = f"0 to {size - 1}" + ("" if ignore_index is None else f", or ignore_index {ignore_index}")
        raise ValueError(f"{kind} {indices[wrong][0].item()}: expected {expected}")


@cache
def _shared_bytes(device: torch.device) -> int:
    """How much shared memory a block may have."""
    if device.type == "cpu":
        return 227 * 1024  # the model is a Hopper multiprocessor
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """The matrix, copied if its rows have gaps inside or overlap."""
    return x if (x.shape[1] == 1 or x.stride(1) == 1) and x.stride(0) >= x.shape[1] else x.contiguous()


def _count(targets: Tensor, ignore_index: int) -> Tensor:
    """How many targets count, 0-dim float32."""
    return (targets != ignore_index).sum().float()


def _scales(count: Tensor, z_loss: float, rows: int) -> Tensor:
    """What the gradients of a row's cross-entropy and of its squared log Z are multiplied with, times `count`."""
    return torch.stack([torch.ones_like(count), count.clamp(min=1) * (z_loss / max(rows, 1))])


def _run_one_pass(
    logits, targets, gradient, losses, statistics, scales, softcap, z_loss, ignore_index, kernels
) -> None:
    if logits.shape[0] == 0:
        return
    here = place(logits.device, kernels=kernels)
    here.run(
        "cross_entropy",
        logits=logits,
        targets=targets,
        gradient=gradient,
        loss=losses,
        statistics=statistics,
        scales=scales,
        softcap=float(softcap),
        ignore_index=ignore_index,
        skip_ignored=z_loss == 0,
        shared_bytes=_shared_bytes(logits.device),
    )


@torch.library.custom_op("groundup::cross_entropy", mutates_args=(), device_types=("cpu", "cuda"))
def _cross_entropy(
    logits: Tensor, targets: Tensor, softcap: float, z_loss: float, ignore_index: int, kernels: str = "cuda"
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss; (largest logit, sum of exp(logit - largest)) of each row; how many targets count."""
    _check_range("target", targets, logits.shape[1], ignore_index)
    losses = torch.empty(logits.shape[0], device=logits.device)
    statistics = torch.empty(logits.shape[0], 2, device=logits.device)
    options = softcap, z_loss, ignore_index, kernels
    _run_one_pass(_rows(logits.detach()), targets, None, losses, statistics, None, *options)
    count = _count(targets, ignore_index)
    return losses.sum() / count, statistics, count


@_cross_entropy.register_fake
def _(logits, targets, softcap, z_loss, ignore_index, kernels="cuda"):
    floats = torch.float32
    return (
        logits.new_empty((), dtype=floats),
        logits.new_empty((logits.shape[0], 2), dtype=floats),
        logits.new_empty((), dtype=floats),
    )


@torch.library.custom_op("groundup::cross_entropy_gradient", mutates_args=(), device_types=("cpu", "cuda"))
def _cross_entropy_gradient(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    count: Tensor,
    softcap: float,
    z_loss: float,
    ignore_index: int,
    kernels: str = "cuda",
) -> Tensor:
    """The gradient of the logits, from that of the mean."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.shape[0] == 0:
        return gradient
    here = place(logits.device, kernels=kernels)
    here.run(
        "cross_entropy_gradient",
        logits=_rows(logits.detach()),
        targets=targets,
        gradient=gradient,
        statistics=statistics,
        scales=_scales(count, z_loss, logits.shape[0]) * (grad.detach().float() / count.clamp(min=1)),
        softcap=softcap,
        ignore_index=ignore_index,
        skip_ignored=z_loss == 0,
    )
    return gradient


@_cross_entropy_gradient.register_fake
def _(grad, logits, targets, statistics, count, softcap, z_loss, ignore_index, kernels="cuda"):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save_cross_entropy(ctx, inputs, output) -> None:
    logits, targets, *ctx.options = inputs
    _, statistics, count = output
    ctx.mark_non_differentiable(statistics, count)
    ctx.save_for_backward(logits, targets, statistics, count)


def _backward_cross_entropy(ctx, grad, _grad_statistics, _grad_count):
    return _cross_entropy_gradient(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


_cross_entropy.register_autograd(_backward_cross_entropy, setup_context=_save_cross_entropy)


# ---- the head and the cross-entropy, chunk by chunk ------------------------------------------------------------------


def _multiply_into(
    d: Tensor, a: Tensor, b: Tensor, kernels: str, bias: Tensor | None = None, add: bool = False
) -> None:
    """d = a @ b + bias, or d += a @ b, by the step that ops.matmul would take. One thread reads and writes an element
    of d, so it may be added to where it lies."""
    here = place(a.device, kernels=kernels)
    c, beta = (d, 1.0) if add else (None, 0.0)
    if kernels == "triton":  # it chooses by itself
        here.multiply(None, a, b, d, c=c, bias=bias, beta=beta)
        return
    tma = a.dtype != torch.float32 and dispatch.describable(a) and dispatch.describable(b)
    layout = {"tma": tma, "row_column": dispatch.row_column(a, b), "multiprocessors": here.multiprocessors}
    step, tiling = dispatch.choose(here.kind, a.dtype, 1, a.shape[0], b.shape[1], a.shape[1], **layout)
    here.multiply(step, a, b, d, c=c, bias=bias, beta=beta, tiling=tiling)


@torch.library.custom_op("groundup::linear_cross_entropy", mutates_args=(), device_types=("cpu", "cuda"))
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float,
    z_loss: float,
    ignore_index: int,
    chunk_rows: int,
    wants_x: bool,
    wants_weight: bool,
    kernels: str = "cuda",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The mean loss; how many targets count; and the gradients of loss * count: of x in its type, of weight and bias in
    float32. Those that are not wanted are empty."""
    (rows, channels), words = x.shape, weight.shape[0]
    _check_range("target", targets, words, ignore_index)
    x, like = x.detach().contiguous(), {"device": x.device}
    weight = weight.detach().to(x.dtype).contiguous()
    bias_there, bias = bias is not None, None if bias is None else bias.detach().to(x.dtype).contiguous()
    d_x = torch.empty((rows, channels) if wants_x else (0,), dtype=x.dtype, **like)
    d_weight = (torch.empty if rows else torch.zeros)((words, channels) if wants_weight else (0,), **like)
    d_bias = torch.zeros((words,) if wants_weight and bias_there else (0,), **like)
    count, losses = _count(targets, ignore_index), torch.empty(rows, **like)
    scales, options = _scales(count, z_loss, rows), (softcap, z_loss, ignore_index, kernels)
    # Rows start at multiples of 16 bytes, which TMA asks for.
    buffer = torch.empty(min(chunk_rows, rows), (words + 7) // 8 * 8, dtype=x.dtype, **like)[:, :words]
    for first in range(0, rows, chunk_rows):
        part = slice(first, min(first + chunk_rows, rows))
        logits = buffer[: part.stop - first]
        _multiply_into(logits, x[part], weight.mT, kernels, bias)
        gradient = logits if wants_x or wants_weight else None
        _run_one_pass(logits, targets[part], gradient, losses[part], None, scales, *options)
        if wants_x:
            _multiply_into(d_x[part], gradient, weight, kernels)
        if wants_weight:
            _multiply_into(d_weight, gradient.mT, x[part], kernels, add=first > 0)
            if bias_there:
                d_bias += gradient.sum(0, dtype=torch.float32)
    return losses.sum() / count, count, d_x, d_weight, d_bias


@_linear_cross_entropy.register_fake
def _(x, weight, targets, bias, softcap, z_loss, ignore_index, chunk_rows, wants_x, wants_weight, kernels="cuda"):
    floats = {"dtype": torch.float32}
    return (
        x.new_empty((), **floats),
        x.new_empty((), **floats),
        x.new_empty(x.shape if wants_x else (0,)),
        x.new_empty(weight.shape if wants_weight else (0,), **floats),
        x.new_empty((weight.shape[0],) if wants_weight and bias is not None else (0,), **floats),
    )


def _save_linear_cross_entropy(ctx, inputs, output) -> None:
    _, weight, _, bias, *_, ctx.wants_x, ctx.wants_weight, _ = inputs
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward_linear_cross_entropy(ctx, grad, *_):
    if torch.is_grad_enabled():  # what was saved knows nothing of x and weight: second derivatives would lack a part
        raise RuntimeError("linear_cross_entropy has no second derivatives: expected backward without create_graph")
    count, d_x, d_weight, d_bias = ctx.saved_tensors
    factor = grad / count.clamp(min=1)
    grad_x = d_x * factor if ctx.wants_x else None
    grad_weight = (d_weight * factor).to(ctx.weight_dtype) if ctx.wants_weight else None
    grad_bias = (d_bias * factor).to(ctx.bias_dtype) if ctx.wants_weight and ctx.bias_dtype else None
    return grad_x, grad_weight, None, grad_bias, None, None, None, None, None, None, None


_linear_cross_entropy.register_autograd(_backward_linear_cross_entropy, setup_context=_save_linear_cross_entropy)


# ---- embedding -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("groundup::embedding", mutates_args=(), device_types=("cpu", "cuda"))
def _embedding(tokens: Tensor, table: Tensor, kernels: str = "cuda") -> Tensor:
    _check_range("token", tokens, table.shape[0], None)
    rows = torch.empty(tokens.shape[0], table.shape[1], dtype=table.dtype, device=table.device)
    if tokens.shape[0]:
        here = place(table.device, kernels=kernels)
        table = table.detach().contiguous()
        here.run("embedding", table=table, tokens=tokens.contiguous(), rows=rows)
    return rows


@_embedding.register_fake
def _(tokens, table, kernels="cuda"):
    return table.new_empty(tokens.shape[0], table.shape[1])


@torch.library.custom_op("groundup::embedding_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _embedding_backward(grad: Tensor, tokens: Tensor, entries: int, kernels: str = "cuda") -> Tensor:
    count, columns = grad.shape
    gradient = torch.zeros(entries, columns, dtype=grad.dtype, device=grad.device)
    if count == 0:
        return gradient
    here = place(grad.device, kernels=kernels)
    ordered, places = tokens.to(torch.int32).sort(stable=True)  # 32 bits: half as many passes of a radix sort
    partial = torch.empty(-(-count // PIECE), 2, columns, device=grad.device)
    here.run(
        "embedding_backward",
        gradient=gradient,
        rows=grad.detach().contiguous(),
        tokens=ordered,
        places=places,
        partial=partial,
    )
    return gradient


@_embedding_backward.register_fake
def _(grad, tokens, entries, kernels="cuda"):
    return grad.new_empty(entries, grad.shape[1])


def _save_embedding(ctx, inputs, output) -> None:
    tokens, table, ctx.kernels = inputs
    ctx.entries = table.shape[0]
    ctx.save_for_backward(tokens)


def _backward_embedding(ctx, grad):
    return None, _embedding_backward(grad, *ctx.saved_tensors, ctx.entries, ctx.kernels), None


_embedding.register_autograd(_backward_embedding, setup_context=_save_embedding)
