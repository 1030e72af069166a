"""Flash attention by our kernels, for torch tensors; differentiable, and known to torch.compile.

    o = ops.attention(q, k, v, causal=True)                     # (B, H, T, K)
    o = ops.attention(q, k, v, cu_seqlens_q=c, cu_seqlens_k=c)  # packed: (rows, H, K)
    GPT(config, attention_fn=ops.causal_attention)              # stage 2's interface

Refused with a ValueError that names the argument, before anything runs: types other than bfloat16 and float16 (float32
too in Triton), head widths that the step does not have, shapes, heads and devices that do not fit, a last dimension
that is not contiguous, strides and addresses that are no multiples of 16 bytes, cu_seqlens that do not rise from 0 to
the number of rows, a window below 0, dropout. Letters: B batch, T queries, S keys, H query heads, G key/value heads, K
head width.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cuda.device import Kernels, Kind, check_kernels, place

FORWARD = (
    "naive_01",
    "online_02",
    "mma_sync_03",
    "wgmma_04",
    "producer_05",
    "ping_pong_06",
    "overlap_07",
    "persistent_08",
    "best_09",
)
BACKWARD = ("recompute_01", "mma_sync_02", "wgmma_03", "dq_reduce_04", "best_05")
ANYWHERE = (*FORWARD[:3], *BACKWARD[:2])  # what runs on any GPU from capability 8.0 on
HEAD_DIMS = (64, 96, 128, 192, 256)
TRITON_HEAD_DIMS = (16, 32, *HEAD_DIMS)  # what a model on a CPU may want is no work there
DTYPES = (torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, *DTYPES)
EVERYTHING = 1 << 30  # keys to the left or right, without a limit
DEFAULT = {
    "model": ("mma_sync_03", "mma_sync_02"),
    "sm_80": ("mma_sync_03", "mma_sync_02"),
    "sm_90": ("best_09", "best_05"),
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    longest: int | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    deterministic: bool = False,
    step: str | int | None = None,
    backward_step: str | int | None = None,
    kernels: Kernels = "cuda",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(cap(scale q k') + bias, over the keys in sight) v, in the type of q; sums are float32.

    q (B, H, T, K), k and v (B, G, S, K) of bfloat16 or float16, H a multiple of G. The last query stands at the last
    key. `causal`: a query sees no later key. `window` w > 0: none that is w or more tokens away. `scale`: 1/sqrt(K)
    when not given. `softcap` c > 0: cap(x) = c tanh(x / c). `sink` (H,) float32: a score without a value, in the
    denominator alone. `bias` (B or 1, H or 1, T, S) float32 is added to the scores; -inf hides a key; it gets no
    gradient. A query that sees nothing gives zeros.

    Packed: q (rows, H, K), k and v (rows, G, K), cu_seqlens_q and cu_seqlens_k (sequences + 1,) int32 on the same
    device: where each sequence begins, and the number of rows. Without bias. A NaN or infinity in one sequence may
    reach the one before it: tiles overlap there, and 0 * NaN is NaN. Their values are looked at, which makes a
    CPU wait for a GPU, once for each tensor and version; who writes to `.data` behind torch's back is not seen.
    `longest`: no sequence has more rows, as the caller knows; then nobody looks or waits, and starts that are wrong
    read and write anywhere.

    `return_lse`: also log-sum-exp of the scores, float32 (B, H, T), packed (H, rows), natural logarithm; -inf where
    nothing is seen. It is differentiable too. `deterministic`: the gradient of q is summed in a fixed order. Dropout is
    not supported. `step`, `backward_step`: by name or number from 1 on; None: the best for the device.

    `kernels` "triton": the same by Triton, for float32 and head widths 16 and 32 too. It has no steps, and is always
    deterministic.
    """
    check_kernels(kernels)
    _refuse_features(q, window, softcap, dropout)
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "sink": sink,
        "bias": bias,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    _check(kernels, **tensors)
    if kernels == "triton" and (step, backward_step) != (None, None):
        raise ValueError(f"step {step!r}, backward_step {backward_step!r}: expected None, there are none in Triton")
    forward, backward = _step_name(step, FORWARD, "step"), _step_name(backward_step, BACKWARD, "backward_step")
    packed = cu_seqlens_q is not None
    if longest is not None and not (packed and longest >= 1):
        raise ValueError(f"longest {longest!r}: expected a number of rows beside cu_seqlens, or None")
    longest_q = longest_k = longest
    if longest is None:
        longest_q = _longest("cu_seqlens_q", cu_seqlens_q, q) if packed else q.shape[2]
        longest_k = _longest("cu_seqlens_k", cu_seqlens_k, k) if packed else k.shape[2]
    if packed:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    reach = window - 1 if window else EVERYTHING
    o, lse = _attention(
        q, k, v, sink, bias, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k,
        q.shape[-1] ** -0.5 if scale is None else float(scale), float(softcap), reach, 0 if causal else reach,
        deterministic, forward, backward, kernels,
    )  # fmt: skip
    return (o, lse) if return_lse else o


def causal_attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    *,
    window: int = 0,
    mask_BTS: Tensor | None = None,
    kernels: Kernels = "cuda",
) -> Tensor:
    """What minigpt.model.causal_attention computes. A mask (True: sees) replaces the causal rule; it becomes a bias."""
    if mask_BTS is None:
        return attention(q_BHTK, k_BGSK, v_BGSK, causal=True, window=window, kernels=kernels)
    hidden = torch.zeros(mask_BTS.shape, device=q_BHTK.device).masked_fill_(~mask_BTS, -math.inf)
    return attention(q_BHTK, k_BGSK, v_BGSK, bias=hidden[:, None], kernels=kernels)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _refuse_features(q: Tensor, window: int, softcap: float, dropout: float) -> None:
    if isinstance(window, bool) or not isinstance(window, int) or window < 0 or window > EVERYTHING:
        raise ValueError(f"window {window!r}: expected 0, for no limit, or a number of tokens")
    if not (0 <= softcap < math.inf):
        raise ValueError(f"softcap {softcap!r}: expected 0, for none, or a positive number")
    if dropout:
        raise ValueError(f"dropout {dropout!r}: expected 0, these kernels have none")


def _step_name(step: str | int | None, ladder: Sequence[str], what: str) -> str | None:
    if isinstance(step, int) and 1 <= step <= len(ladder):
        return ladder[step - 1]
    if step is None or step in ladder:
        return step
    raise ValueError(f"{what} {step!r}: expected None, 1 to {len(ladder)}, or one of {', '.join(ladder)}")


def _check(kernels: Kernels, q, k, v, sink, bias, cu_seqlens_q, cu_seqlens_k) -> None:
    """Types, devices and shapes; strides and addresses are checked where there are some, by `_prepared`."""
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k: expected both or none")
    dtypes, widths = (TRITON_DTYPES, TRITON_HEAD_DIMS) if kernels == "triton" else (DTYPES, HEAD_DIMS)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: expected a torch tensor")
        if x.dtype not in dtypes:
            raise ValueError(f"{name} is {x.dtype}: expected {' or '.join(map(str, dtypes))}; call .to()")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}: expected {q.dtype}, as q is; call .to()")
        if x.ndim != (3 if packed else 4):
            wanted = "(rows, heads, head width)" if packed else "(batch, heads, rows, head width)"
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {wanted}")
    others = {"sink": sink, "bias": bias, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    for name, x in {"k": k, "v": v, **others}.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: expected one device, call .to()")
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"q is on {q.device}: expected the CPU or a CUDA device")
    (H, G), K = (x.shape[1] for x in (q, k)), q.shape[-1]
    if K not in widths:
        raise ValueError(f"q has head width {K}: expected one of {', '.join(map(str, widths))}")
    if G == 0 or H % G:
        raise ValueError(f"k has {G} heads, q has {H}: expected a divisor")
    keys = k.shape if packed else (q.shape[0], G, k.shape[2], K)
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != (keys if not packed else (k.shape[0], G, K)):
            wanted = tuple(keys) if not packed else (k.shape[0], G, K)
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {tuple(wanted)}")
    if sink is not None and (sink.dtype != torch.float32 or tuple(sink.shape) != (H,)):
        raise ValueError(f"sink is {sink.dtype} of shape {tuple(sink.shape)}: expected torch.float32 of shape ({H},)")
    if bias is not None:
        _check_bias(q, k, bias, packed)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x is not None and (
            x.dtype != torch.int32 or x.ndim != 1 or x.numel() != cu_seqlens_q.numel() or not x.numel()
        ):
            raise ValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)}: expected torch.int32 of one dimension, as many for "
                f"queries as for keys"
            )


def _check_bias(q: Tensor, k: Tensor, bias: Tensor, packed: bool) -> None:
    if packed:
        raise ValueError("bias beside cu_seqlens: expected none, packed sequences take no bias")
    if bias.dtype != torch.float32:
        raise ValueError(f"bias is {bias.dtype}: expected torch.float32; call .float()")
    if bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("bias requires a gradient: expected none, these kernels do not compute it; call .detach()")
    (B, H, T), S = q.shape[:3], k.shape[2]
    if bias.ndim != 4 or bias.shape[0] not in (1, B) or bias.shape[1] not in (1, H) or bias.shape[2:] != (T, S):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({B} or 1, {H} or 1, {T}, {S})")
    if S > 1 and bias.stride(-1) != 1:
        raise ValueError(f"bias has strides {bias.stride()}: expected a contiguous last dimension, call .contiguous()")


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # cu_seqlens -> (version, rows, longest)


def _longest(name: str, starts: Tensor, x: Tensor) -> int:
    """Rows of the longest sequence."""
    rows = x.shape[0]
    remember = starts.is_cuda and not starts.is_inference()  # those have no version; on a CPU looking costs nothing
    known = _known.get(starts) if remember else None
    if known and known[:2] == (starts._version, rows):
        return known[2]
    values = starts.tolist()
    for i, (before, after) in enumerate(pairwise(values)):
        if after < before:
            raise ValueError(f"{name}[{i + 1}] is {after} after {before}: expected numbers that do not fall")
    if values[0] != 0 or values[-1] != rows:
        raise ValueError(f"{name} goes from {values[0]} to {values[-1]}: expected 0 to the number of rows, {rows}")
    longest = max((after - before for before, after in pairwise(values)), default=0)
    if remember:
        _known[starts] = (starts._version, rows, longest)
    return longest


def _prepared(name: str, x: Tensor) -> Tensor:
    """The tensor without its gradient. Strides of dimensions of size 1 do not matter; expanded ones are copied out."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} has strides {x.stride()}: expected a contiguous last dimension, call .contiguous()")
    strides = [s for size, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    if x.data_ptr() % 16 or any(s % 8 for s in strides):
        raise ValueError(
            f"{name} has strides {x.stride()} and starts {x.data_ptr() % 16} bytes past a multiple of 16: expected "
            f"multiples of 8 elements and of 16 bytes, call .contiguous() or .clone()"
        )
    return (x if all(strides) else x.contiguous()).detach()


def _upstream(d_o: Tensor) -> Tensor:
    """A gradient as autograd brings it, perhaps expanded or oddly placed, as kernels take it."""
    strides = [s for size, s in zip(d_o.shape[:-1], d_o.stride()[:-1], strict=True) if size > 1]
    if d_o.stride(-1) == 1 and d_o.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides):
        return d_o
    return d_o.clone(memory_format=torch.contiguous_format)


# ---- the operation ---------------------------------------------------------------------------------------------------


def _rows_like(x: Tensor) -> Tensor:
    """Room for a result: rows outside, heads inside, so that joining the heads again moves nothing."""
    if x.ndim == 3:
        return x.new_empty(x.shape)
    B, H, T, K = x.shape
    return x.new_empty(B, T, H, K).transpose(1, 2)


def _lse_like(q: Tensor) -> Tensor:
    return q.new_empty((q.shape[1], q.shape[0]) if q.ndim == 3 else q.shape[:3], dtype=torch.float32)


def choose(kind: Kind, step: str | None, backward_step: str | None) -> tuple[str, str]:
    """The steps of the forward and the backward pass."""
    return step or DEFAULT[kind][0], backward_step or DEFAULT[kind][1]


@torch.library.custom_op("groundup::attention", mutates_args=(), device_types=("cpu", "cuda"))
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    bias: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    deterministic: bool,
    step: str | None,
    backward_step: str | None,
    kernels: str = "cuda",
) -> tuple[Tensor, Tensor]:
    q, k, v = (_prepared(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    o, lse = _rows_like(q), _lse_like(q)
    if 0 in q.shape or longest_q == 0:
        return o, lse
    if longest_k == 0:  # nothing to see: nothing to launch
        lse.copy_(-math.inf if sink is None else _by_head(sink, lse)), o.zero_()
        return o, lse
    here = place(q.device, step, ANYWHERE, kernels)
    step = None if kernels == "triton" else choose(here.kind, step, None)[0]
    scores = None
    if step == "naive_01":
        B = q.shape[0] if starts_q is None else starts_q.numel() - 1
        scores = q.new_empty(B, q.shape[1], longest_q, longest_k, dtype=torch.float32)
    here.run(
        "attention_forward", step=step, q=q, k=k, v=v, o=o, lse=lse, sink=sink, bias=bias, starts_q=starts_q,
        starts_k=starts_k, longest_q=longest_q, longest_k=longest_k, scale=scale, softcap=softcap, left=left,
        right=right, scores=scores,
    )  # fmt: skip
    return o, lse


@_attention.register_fake
def _(q, k, v, sink, bias, starts_q, starts_k, longest_q, longest_k, scale, softcap, left, right, *_):
    return _rows_like(q), _lse_like(q)


def _by_head(sink: Tensor, lse: Tensor) -> Tensor:
    """sink (H,) to be broadcast with lse (B, H, T) or (H, rows)."""
    return sink.detach()[:, None] if lse.ndim == 2 else sink.detach()[None, :, None]


# ---- gradients -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("groundup::attention_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _attention_backward(
    d_o: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    sink: Tensor | None,
    bias: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    deterministic: bool,
    backward_step: str | None,
    kernels: str = "cuda",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sink (empty without one)."""
    dq, dk, dv = _rows_like(q), _rows_like(k), _rows_like(v)
    d_sink = q.new_zeros(0 if sink is None else q.shape[1], dtype=torch.float32)
    if 0 in q.shape or longest_q == 0 or longest_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), d_sink
    d_o = _upstream(d_o)
    q, k, v = (_prepared(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    here = place(q.device, backward_step, ANYWHERE, kernels)
    delta = torch.empty_like(lse)
    workspaces = {} if kernels == "triton" else _workspaces(here.kind, backward_step, q, starts_q)
    here.run(
        "attention_backward", q=q, k=k, v=v, o=o, lse=lse, d_o=d_o,
        d_lse=None if d_lse is None else d_lse.contiguous(), dq=dq, dk=dk, dv=dv, sink=sink, bias=bias,
        starts_q=starts_q, starts_k=starts_k, longest_q=longest_q, longest_k=longest_k, scale=scale, softcap=softcap,
        left=left, right=right, deterministic=deterministic, delta=delta, **workspaces,
    )  # fmt: skip
    if sink is not None:  # the sink is a key whose value is zero: d score = -p delta
        by_row = -torch.exp(_by_head(sink, lse) - lse.masked_fill(lse == -math.inf, math.inf)) * delta
        d_sink = by_row.sum(1) if by_row.ndim == 2 else by_row.sum((0, 2))
    return dq, dk, dv, d_sink


def _workspaces(kind: Kind, backward_step: str | None, q: Tensor, starts_q: Tensor | None) -> dict[str, str | Tensor]:
    """What steps need beyond tensors in and out, and their choice."""
    heads, total = q.shape[1], q.shape[0] if starts_q is not None else q.shape[0] * q.shape[2]
    sequences = q.shape[0] if starts_q is None else starts_q.numel() - 1
    return {
        "step": choose(kind, None, backward_step)[1],
        "dq_sum": q.new_empty(heads * (total + 128 * sequences) * q.shape[-1], dtype=torch.float32),
        "turns": q.new_empty(heads * (total // 64 + sequences), dtype=torch.int32),
    }


@_attention_backward.register_fake
def _(d_o, d_lse, q, k, v, o, lse, sink, *_):
    d_sink = q.new_empty(0 if sink is None else q.shape[1], dtype=torch.float32)
    return _rows_like(q), _rows_like(k), _rows_like(v), d_sink


def _save(ctx, inputs, output) -> None:
    q, k, v, sink, bias, starts_q, starts_k, *ctx.numbers, ctx.deterministic, _, ctx.step, ctx.kernels = inputs
    ctx.save_for_backward(q, k, v, *output, sink, bias, starts_q, starts_k)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_o: Tensor | None, d_lse: Tensor | None):
    q, k, v, o, lse, *others = ctx.saved_tensors
    if d_o is None:
        d_o = torch.zeros_like(o)
    given = (d_o, d_lse, q, k, v, o, lse, *others, *ctx.numbers, ctx.deterministic, ctx.step, ctx.kernels)
    dq, dk, dv, d_sink = _attention_backward(*given)
    return dq, dk, dv, None if others[0] is None else d_sink, *[None] * 13


_attention.register_autograd(_gradients, setup_context=_save)
