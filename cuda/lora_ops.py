"""Many LoRA adapters in one batch, for torch tensors; known to torch.compile.

    y = lora_bgmv(x, a_pool, b_pool, indices, scales)                  # decoding: an adapter for each row
    lora_bgmv(x, a_pool, b_pool, indices, scales, ranks, y=y)          # y += ..., in place
    y = lora_sgmv(x, a_pool, b_pool, segments, indices, scales)        # rows sorted by adapter; differentiable
    y = lora_sgmv(x, a_pool, b_pool, segments, indices, scales, kernels="triton")

A row of adapter i gets scales[i] * (x A_i^T) B_i^T, a row of adapter -1 nothing. Adapters of all ranks lie in one pool
of the largest rank; `ranks` says how much of each counts, and what lies past it may be anything. Kernels in CUDA
C++ (fused/lora_rows.cu, lora_segments.cu, lora_outer.cu) and in Triton (triton_lora.py) do the same, gradients
included. x A^T stays float32 in between. Tensors may have any strides; without elements side by side at multiples of
16 bytes, kernels read element by element.

Refused with a ValueError: types other than float32, bfloat16 and float16, or different ones; shapes that do not fit;
tensors on two devices; gradients where there are none; and ids of adapters, ranks and segments that do not exist. On a
GPU, which a look would wait for, these are looked at with check=True alone; without it they would be wild reads. With a
RuntimeError: gradients of gradients, a module that is not built, Triton where it is not installed.
"""

from itertools import pairwise

import torch
from torch import Tensor

from cuda.device import DTYPES, Kernels, check_kernels, place

MOST_SEGMENTS = 4096  # in Triton each program looks at all of them at once, in registers
PART_BYTES = 1024  # of a row of x, that a block of lora_bgmv has in CUDA C++: fused/lora_rows.cu
MOST_PARTS, LEAST_PART = 4, 512  # of `in` in lora_sgmv, and columns of each: about two blocks for each multiprocessor


def lora_bgmv(
    x: Tensor,
    a_pool: Tensor,
    b_pool: Tensor,
    indices: Tensor,
    scales: Tensor,
    ranks: Tensor | None = None,
    *,
    y: Tensor | None = None,
    check: bool = False,
    kernels: Kernels = "cuda",
) -> Tensor:
    """x (rows, in), a_pool (adapters, most, in), b_pool (adapters, out, most), of one type; indices (rows,) int32;
    scales (adapters,) float32; ranks (adapters,) int32, or None where all adapters are of rank `most` or padded with
    zeros. Returns (rows, out) in the type of x: a new tensor, or y, to which it was added in float32.

    The bits of a row do not depend on the rest of the batch. There is no gradient; for training take lora_sgmv.
    """
    check_kernels(kernels)
    _refuse_gradients("lora_bgmv is for inference", x=x, a_pool=a_pool, b_pool=b_pool, scales=scales, y=y)
    if y is None:
        return _bgmv(x, a_pool, b_pool, indices, scales, ranks, check, kernels)
    _bgmv_add(y, x, a_pool, b_pool, indices, scales, ranks, check, kernels)
    return y


def lora_sgmv(
    x: Tensor,
    a_pool: Tensor,
    b_pool: Tensor,
    segments: Tensor,
    indices: Tensor,
    scales: Tensor,
    ranks: Tensor | None = None,
    *,
    y: Tensor | None = None,
    check: bool = False,
    kernels: Kernels = "cuda",
) -> Tensor:
    """The same where segments[s] to segments[s + 1] - 1 are the rows of adapter indices[s]: segments (S + 1,) int32,
    from 0 to the number of rows, never falling, and indices (S,) int32. An adapter may have several segments.

    Without y there are gradients for x, a_pool and b_pool, the same bits every time; past an adapter's rank, and for
    adapters that have no row, they are 0.
    """
    check_kernels(kernels)
    _refuse_gradients("no gradient goes into the scales", scales=scales)
    if y is None:
        return _sgmv(x, a_pool, b_pool, segments, indices, scales, ranks, check, kernels)
    _refuse_gradients("with y= it adds in place", x=x, a_pool=a_pool, b_pool=b_pool, y=y)
    _sgmv_add(y, x, a_pool, b_pool, segments, indices, scales, ranks, check, kernels)
    return y


# ---- checks ----------------------------------------------------------------------------------------------------------


def _refuse_gradients(why: str, **given: Tensor | None) -> None:
    for name, tensor in given.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, but {why}: expected torch.no_grad() or .detach()")


def _check(x, a_pool, b_pool, segments, indices, scales, ranks, y=None) -> None:
    """Shapes, types and devices."""
    for name, tensor, dimensions in (
        ("x", x, 2),
        ("a_pool", a_pool, 3),
        ("b_pool", b_pool, 3),
        ("indices", indices, 1),
    ):
        if tensor.ndim != dimensions:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {dimensions} dimensions")
    (rows, width), (adapters, most, _), out = x.shape, a_pool.shape, b_pool.shape[1]
    count = rows if segments is None else indices.shape[0]
    expected = {
        "a_pool": (a_pool, x.dtype, (adapters, most, width)),
        "b_pool": (b_pool, x.dtype, (adapters, out, most)),
        "segments": (segments, torch.int32, (count + 1,)),
        "indices": (indices, torch.int32, (count,)),
        "scales": (scales, torch.float32, (adapters,)),
        "ranks": (ranks, torch.int32, (adapters,)),
        "y": (y, x.dtype, (rows, out)),
    }
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}: expected one of {DTYPES}; call .to()")
    if segments is not None and count > MOST_SEGMENTS:
        raise ValueError(f"indices has {count} segments: expected at most {MOST_SEGMENTS}; sort rows by adapter")
    if not 1 <= most <= 256:
        raise ValueError(f"a_pool has a rank of {most}: expected 1 to 256")
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: expected one device, call .to()")
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}: expected {dtype}; call .to()")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {shape}")
    if y is not None and any(n > 1 and step == 0 for n, step in zip(y.shape, y.stride(), strict=True)):
        raise ValueError(f"y has strides {y.stride()}: expected each element once, since it is added to; call .clone()")


def _check_values(x, a_pool, segments, indices, ranks, check) -> None:
    """What a kernel follows without a look. Waits for the device."""
    if indices.device.type == "meta" or (indices.device.type != "cpu" and not check):
        return
    _expect_between("indices", indices, -1, a_pool.shape[0] - 1, "an adapter of the pool, or -1 for none")
    if ranks is not None:
        _expect_between("ranks", ranks, 0, a_pool.shape[1], "a rank that the pool has room for")
    if segments is not None:
        starts = segments.tolist()
        if starts[0] != 0 or starts[-1] != x.shape[0]:
            raise ValueError(f"segments go from {starts[0]} to {starts[-1]}: expected 0 to {x.shape[0]}, all rows of x")
        for i, (start, end) in enumerate(pairwise(starts)):
            if end < start:
                raise ValueError(f"segments[{i + 1}] is {end}: expected {start} or more, as segments[{i}]")


def _expect_between(name: str, x: Tensor, least: int, most: int, what: str) -> None:
    wrong = ((x < least) | (x > most)).nonzero()
    if len(wrong):
        i = wrong[0].item()
        raise ValueError(f"{name}[{i}] is {x[i]}: expected {least} to {most}, {what}")


# ---- the operations --------------------------------------------------------------------------------------------------


def _empty(x: Tensor, b_pool: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], b_pool.shape[1]))


def _run(x, a_pool, b_pool, segments, indices, scales, ranks, y, add, check, kernels) -> None:
    """bgmv, or where there are segments sgmv."""
    _check(x, a_pool, b_pool, segments, indices, scales, ranks, y)
    _check_values(x, a_pool, segments, indices, ranks, check)
    if 0 in y.shape:
        return
    if x.shape[1] == 0:  # a sum of nothing
        if not add:
            y.zero_()
        return
    here = place(x.device, kernels=kernels)
    given = {} if segments is None else {"segments": segments.contiguous()}
    if kernels == "cuda":
        given["workspace"] = _workspace(x, a_pool.shape[1], segments, here.multiprocessors)
    here.run(
        "lora_bgmv" if segments is None else "lora_sgmv", x=x, a_pool=a_pool, b_pool=b_pool,
        indices=indices.contiguous(), scales=scales.contiguous(), ranks=None if ranks is None else ranks.contiguous(),
        y=y, add=add, **given,
    )  # fmt: skip


def _workspace(x: Tensor, most: int, segments: Tensor | None, multiprocessors: int) -> Tensor:
    """For x A^T between the two kernels in CUDA C++, float32: (parts of `in`, rows, ranks in multiples of 8)."""
    (rows, width), ranks = x.shape, -(-most // 8) * 8
    if segments is None:
        parts = -(-width * x.element_size() // PART_BYTES)
    else:
        count = segments.shape[0] - 1
        tiles = rows // (64 if rows >= 32 * count else 16) + count
        parts = min(MOST_PARTS, -(-2 * multiprocessors // tiles), -(-width // LEAST_PART))
    return x.new_empty((parts, rows, ranks), dtype=torch.float32)


@torch.library.custom_op("groundup::lora_bgmv", mutates_args=(), device_types=("cpu", "cuda"))
def _bgmv(
    x: Tensor,
    a_pool: Tensor,
    b_pool: Tensor,
    indices: Tensor,
    scales: Tensor,
    ranks: Tensor | None,
    check: bool,
    kernels: str = "cuda",
) -> Tensor:
    _check(x, a_pool, b_pool, None, indices, scales, ranks)
    y = _empty(x, b_pool)
    _run(x, a_pool, b_pool, None, indices, scales, ranks, y, False, check, kernels)
    return y


@_bgmv.register_fake
def _(x, a_pool, b_pool, indices, scales, ranks, check, kernels="cuda"):
    _check(x, a_pool, b_pool, None, indices, scales, ranks)
    return _empty(x, b_pool)


@torch.library.custom_op("groundup::lora_bgmv_add", mutates_args=("y",), device_types=("cpu", "cuda"))
def _bgmv_add(
    y: Tensor,
    x: Tensor,
    a_pool: Tensor,
    b_pool: Tensor,
    indices: Tensor,
    scales: Tensor,
    ranks: Tensor | None,
    check: bool,
    kernels: str = "cuda",
) -> None:
    _run(x, a_pool, b_pool, None, indices, scales, ranks, y, True, check, kernels)


@_bgmv_add.register_fake
def _(y, x, a_pool, b_pool, indices, scales, ranks, check, kernels="cuda"):
    _check(x, a_pool, b_pool, None, indices, scales, ranks, y)


@torch.library.custom_op("groundup::lora_sgmv", mutates_args=(), device_types=("cpu", "cuda"))
def _sgmv(
    x: Tensor,
    a_pool: Tensor,
    b_pool: Tensor,
    segments: Tensor,
    indices: Tensor,
    scales: Tensor,
    ranks: Tensor | None,
    check: bool,
    kernels: str = "cuda",
) -> Tensor:
    _check(x, a_pool, b_pool, segments, indices, scales, ranks)
    y = _empty(x, b_pool)
    _run(x, a_pool, b_pool, segments, indices, scales, ranks, y, False, check, kernels)
    return y


@_sgmv.register_fake
def _(x, a_pool, b_pool, segments, indices, scales, ranks, check, kernels="cuda"):
    _check(x, a_pool, b_pool, segments, indices, scales, ranks)
    return _empty(x, b_pool)


@torch.library.custom_op("groundup::lora_sgmv_add", mutates_args=("y",), device_types=("cpu", "cuda"))
def _sgmv_add(
    y: Tensor,
    x: Tensor,
    a_pool: Tensor,
    b_pool: Tensor,
    segments: Tensor,
    indices: Tensor,
    scales: Tensor,
    ranks: Tensor | None,
    check: bool,
    kernels: str = "cuda",
) -> None:
    _run(x, a_pool, b_pool, segments, indices, scales, ranks, y, True, check, kernels)


@_sgmv_add.register_fake
def _(y, x, a_pool, b_pool, segments, indices, scales, ranks, check, kernels="cuda"):
    _check(x, a_pool, b_pool, segments, indices, scales, ranks, y)


# ---- gradients -------------------------------------------------------------------------------------------------------


def _gradients(wanted: list[bool], *tensors: Tensor) -> list[Tensor]:
    """A tensor for each, empty where no gradient is asked for: an operation of torch returns no None."""
    return [x.new_empty(x.shape if want else (0,)) for x, want in zip(tensors, wanted, strict=True)]


@torch.library.custom_op("groundup::lora_sgmv_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _sgmv_backward(
    dy: Tensor,
    x: Tensor,
    a_pool: Tensor,
    b_pool: Tensor,
    segments: Tensor,
    indices: Tensor,
    scales: Tensor,
    ranks: Tensor | None,
    wanted: list[bool],
    kernels: str = "cuda",
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _gradients(wanted, x, a_pool, b_pool)
    if 0 in x.shape or 0 in dy.shape or indices.shape[0] == 0:
        return tuple(grad.zero_() for grad in grads)
    here = place(x.device, kernels=kernels)
    given = dict(zip(("dx", "da_pool", "db_pool"), grads, strict=True))
    given = {name: grad for (name, grad), want in zip(given.items(), wanted, strict=True) if want}
    if kernels == "cuda":
        for name, rows in (("workspace_dy", dy), ("workspace_x", x)):
            given[name] = _workspace(rows, a_pool.shape[1], segments, here.multiprocessors)
    here.run(
        "lora_sgmv_backward", dy=dy, x=x, a_pool=a_pool, b_pool=b_pool, segments=segments.contiguous(),
        indices=indices.contiguous(), scales=scales.contiguous(), ranks=None if ranks is None else ranks.contiguous(),
        **given,
    )  # fmt: skip
    return tuple(grads)


@_sgmv_backward.register_fake
def _(dy, x, a_pool, b_pool, segments, indices, scales, ranks, wanted, kernels="cuda"):
    return tuple(_gradients(wanted, x, a_pool, b_pool))


def _keep(ctx, inputs, output) -> None:
    *tensors, _, ctx.kernels = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    wanted = list(ctx.needs_input_grad[:3])
    grads = torch.ops.groundup.lora_sgmv_backward(dy, *ctx.saved_tensors, wanted, ctx.kernels)
    return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 6)


_sgmv.register_autograd(_backward, setup_context=_keep)


def _no_second_gradient(ctx, *grads):
    raise RuntimeError("lora_sgmv has no second gradient: expected no create_graph=True")


_sgmv_backward.register_autograd(_no_second_gradient)
