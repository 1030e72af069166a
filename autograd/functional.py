"""Neural-network functions, with torch.nn.functional's names and meaning: norms, attention, dropout, losses.

The hot ones (layer_norm, rms_norm, attention, cross_entropy) are `fused`: forward and first derivative by hand on
arrays, beside their plain definition, from which higher derivatives come. The package's others are re-exported.
Refuses class indices out of range, masks and shapes that do not fit.
"""

import math

import numpy as np

from autograd.conv import avg_pool2d, conv2d, max_pool2d
from autograd.elementwise import (
    cast,
    floating,
    gelu,
    leaky_relu,
    masked_fill,
    pair,
    promoted,
    relu,
    rsqrt,
    sigmoid,
    silu,
    softplus,
    tanh,
    where,
)
from autograd.engine import fused
from autograd.indexing import embedding, gather
from autograd.linalg import linear, matmul
from autograd.reduce import log_softmax, mean, softmax, var
from autograd.shape import pad
from autograd.tensor import Tensor, as_tensor, constant

__all__ = [
    "avg_pool2d",
    "binary_cross_entropy_with_logits",
    "conv2d",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "manual_seed",
    "max_pool2d",
    "mse_loss",
    "nll_loss",
    "one_hot",
    "pad",
    "relu",
    "rms_norm",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]

_generator = np.random.default_rng(0)


def manual_seed(seed: int) -> None:
    """Seeds the generator that dropout and the initialisation of layers draw from."""
    _generator.bit_generator.state = type(_generator.bit_generator)(seed).state


def default_generator() -> np.random.Generator:
    return _generator


# -- normalisation --
def _norm_dims(op, x, normalized_shape, weight, bias=None):
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"{op}: normalized_shape {shape} is not the end of the input's shape {x.shape}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != shape:
            raise ValueError(f"{op}: {name} of shape {parameter.shape}: expected {shape}")
    return tuple(range(-len(shape), 0))


def layer_norm(x, normalized_shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the last dimensions, times weight, plus bias (Ba et al. 2016)."""
    x, weight, bias = promoted(floating(x), weight, bias)
    axes = _norm_dims("layer_norm", x, normalized_shape, weight, bias)
    normal = x.data - x.data.mean(axes, keepdims=True)
    scale = 1 / np.sqrt(np.square(normal).mean(axes, keepdims=True) + eps)
    normal *= scale

    def backward(g):
        rows = tuple(range(g.ndim - len(axes)))
        gradients = []
        g_normal = g if weight is None else g * weight.data
        dx = g_normal - g_normal.mean(axes, keepdims=True)
        dx -= normal * (g_normal * normal).mean(axes, keepdims=True)
        dx *= scale
        gradients.append(dx)
        if weight is not None:
            gradients.append((g * normal).sum(rows))
        if bias is not None:
            gradients.append(g.sum(rows))
        return gradients

    def definition(x, *parameters):
        y = (x - mean(x, axes, True)) * rsqrt(var(x, axes, 0, True) + eps)
        y = y if weight is None else y * parameters[0]
        return y if bias is None else y + parameters[-1]

    y = normal.copy() if weight is None else normal * weight.data  # a copy: a write to the result must not reach normal
    if bias is not None:
        y += bias.data
    return fused("layer_norm", y, (x, *(p for p in (weight, bias) if p is not None)), backward, definition)


def rms_norm(x, normalized_shape, weight=None, eps: float | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimensions, times weight (Zhang & Sennrich 2019); eps None: machine's."""
    x, weight = promoted(floating(x), weight)
    eps = float(np.finfo(x.dtype).eps) if eps is None else eps
    axes = _norm_dims("rms_norm", x, normalized_shape, weight)
    scale = 1 / np.sqrt(np.square(x.data).mean(axes, keepdims=True) + x.dtype.type(eps))
    normal = x.data * scale

    def backward(g):
        g_normal = g if weight is None else g * weight.data
        dx = normal * -(g_normal * normal).mean(axes, keepdims=True)
        dx += g_normal
        dx *= scale
        return (dx,) if weight is None else (dx, (g * normal).sum(tuple(range(g.ndim - len(axes)))))

    def definition(x, *parameters):
        y = x * rsqrt(mean(x * x, axes, True) + eps)
        return y * parameters[0] if parameters else y

    y = normal.copy() if weight is None else normal * weight.data  # a copy: a write to the result must not reach normal
    return fused("rms_norm", y, (x,) if weight is None else (x, weight), backward, definition)


def dropout(x, p: float = 0.5, training: bool = True, generator: np.random.Generator | None = None) -> Tensor:
    """Zeroes elements with probability p and scales the others by 1 / (1 - p); draws from `generator`, or from the one
    that `manual_seed` seeds."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p {p}: expected a probability")
    x = floating(x)
    if not training or p == 0:
        return x
    keep = (generator or _generator).random(x.shape, dtype=np.float32) >= p
    return x * constant(keep * x.dtype.type(1 / (1 - p) if p < 1 else 0))


# -- attention --
def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p: float = 0.0, is_causal: bool = False, scale=None, enable_gqa=False
) -> Tensor:
    """softmax(q kᵀ scale + mask) v.

    query (..., H, T, D), key (..., K, S, D), value (..., K, S, E) -> (..., H, T, E); K = H, or with enable_gqa K
    divides H and each key head serves H / K consecutive query heads. scale defaults to 1/sqrt(D). attn_mask broadcasts
    to (..., H, T, S): bool (True: may attend) or a float that is added. A row that may attend to nothing gives zeros.
    """
    q, k = pair("attention", query, key)
    q, v = pair("attention", q, value)
    _check_attention(q, k, v, attn_mask, is_causal, enable_gqa)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    T, S = q.shape[-2], k.shape[-2]
    groups = q.shape[-3] // k.shape[-3] if enable_gqa and q.ndim > 2 else 1
    given = () if attn_mask is None else (_mask_tensor(attn_mask, q.dtype),)
    if dropout_p or (given and given[0].requires_grad):
        mask = given[0] if given else np.tri(T, S, dtype=bool) if is_causal else None
        return _attention(q, k, v, mask, scale, groups, dropout_p)
    mask = given[0].data if given else np.tri(T, S, dtype=bool) if is_causal else None

    def grouped(x):  # the query heads that share a key head become more rows of one product
        return x if groups == 1 else x.reshape(*k.shape[:-2], groups * T, x.shape[-1])

    def ungrouped(x):
        return x if groups == 1 else x.reshape(*q.shape[:-1], x.shape[-1])

    kd, vd = k.data, v.data
    p = ungrouped(np.matmul(grouped(q.data), kd.swapaxes(-1, -2)))
    p *= p.dtype.type(scale)
    if mask is not None:
        p = np.where(mask, p, p.dtype.type(-np.inf)) if mask.dtype == bool else p + mask
    p = _safe_softmax(p)

    def backward(g):
        gg, pg = grouped(g), grouped(p)
        dv = np.matmul(pg.swapaxes(-1, -2), gg)
        ds = np.matmul(gg, vd.swapaxes(-1, -2))
        ds -= np.einsum("...i,...i->...", ds, pg)[..., None]
        ds *= pg
        ds *= ds.dtype.type(scale)
        return ungrouped(np.matmul(ds, kd)), np.matmul(ds.swapaxes(-1, -2), grouped(q.data)), dv

    y = ungrouped(np.matmul(grouped(p), vd))
    inputs = (q, k, v, *given)  # the mask too, so that a write to it before backward is noticed
    return fused("attention", y, inputs, backward, lambda q, k, v, *_: _attention(q, k, v, mask, scale, groups, 0.0))


def _mask_tensor(mask, dtype):
    mask = as_tensor(mask)
    return mask if mask.dtype == np.bool_ else cast(mask, dtype)


def _safe_softmax(scores):
    """Softmax over the last axis in place; rows of -inf become zeros instead of NaN."""
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    top[np.isneginf(top)] = 0
    scores -= top
    np.exp(scores, out=scores)
    total = scores.sum(-1, keepdims=True)
    total[total == 0] = 1
    scores /= total
    return scores


def _attention(q, k, v, mask, scale, groups, dropout_p):
    """Attention out of plain operations: the definition, and the path for dropout and learned masks."""
    if groups > 1:
        k, v = (_repeat_heads(x, groups) for x in (k, v))
    scores = matmul(q, k.mT) * scale
    empty = None
    if mask is not None:
        values = mask.data if isinstance(mask, Tensor) else mask
        allowed = values if values.dtype == bool else ~np.isneginf(values)
        if values.dtype != bool:  # its -inf would make NaN of the gradients of a row that may attend to nothing
            scores = scores + masked_fill(mask, ~allowed, 0.0)
        allowed = np.broadcast_to(allowed, scores.shape)
        empty = ~allowed.any(-1, keepdims=True)
        scores = masked_fill(scores, ~(allowed | empty), -math.inf)
    p = softmax(scores, -1)
    if empty is not None and empty.any():
        p = masked_fill(p, empty, 0.0)
    return matmul(dropout(p, dropout_p), v)


def _repeat_heads(x, groups):
    *batch, heads, length, width = x.shape
    return x.unsqueeze(-3).expand(*batch, heads, groups, length, width).reshape(*batch, heads * groups, length, width)


def _check_attention(q, k, v, attn_mask, is_causal, enable_gqa):
    shapes = f"query {q.shape}, key {k.shape}, value {v.shape}"
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(f"attention: {shapes}: expected (..., T, D), (..., S, D), (..., S, E)")
    if not q.ndim == k.ndim == v.ndim or q.shape[:-3] != k.shape[:-3] or k.shape[:-2] != v.shape[:-2]:
        raise ValueError(f"attention: {shapes}: batch dimensions differ")
    if q.ndim > 2 and q.shape[-3] != k.shape[-3] and not (enable_gqa and q.shape[-3] % k.shape[-3] == 0):
        raise ValueError(f"attention: {shapes}: head counts differ; enable_gqa=True allows a multiple of the key heads")
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attention: attn_mask and is_causal exclude each other")
        mask, scores = as_tensor(attn_mask), (*q.shape[:-1], k.shape[-2])
        fits = mask.ndim <= len(scores) and all(
            m in (1, n) for m, n in zip(mask.shape[::-1], scores[::-1], strict=False)
        )
        if mask.dtype.kind not in "bf" or not fits:
            raise ValueError(
                f"attention: attn_mask {mask.shape} {mask.dtype}: expected bool or float broadcasting to {scores}"
            )


# -- losses --
def _reduced(op, loss, reduction):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction {reduction!r}: expected 'mean', 'sum' or 'none'")
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def one_hot(indices, num_classes: int) -> Tensor:
    indices = as_tensor(indices).data
    if indices.dtype.kind not in "iu" or (indices.size and not (indices.min() >= 0 and indices.max() < num_classes)):
        raise ValueError(f"one_hot: expected integers from 0 to {num_classes - 1}")
    return Tensor((indices[..., None] == np.arange(num_classes)).astype(np.int64))


def _targets(op, logits, target, ignore_index):
    """The class indices as an array, and which of them count: a bool array, or True when that is all of them."""
    target = as_tensor(target).data
    wanted = logits.shape[:1] + logits.shape[2:] if logits.ndim > 1 else ()
    if target.dtype.kind not in "iu" or logits.ndim < 1 or target.shape != wanted:
        raise ValueError(
            f"{op}: input {logits.shape}, target {target.shape} {target.dtype}: expected integers of shape {wanted}"
        )
    if target.dtype == np.int64 and (target.view(np.uint64) < logits.shape[1]).all() and ignore_index < 0:
        return target, True  # as unsigned numbers the negative ones are out of range too: one comparison for both ends
    used = target != ignore_index
    if not ((target[used] >= 0) & (target[used] < logits.shape[1])).all():
        raise ValueError(f"{op}: a target outside 0 to {logits.shape[1] - 1} that is not ignore_index {ignore_index}")
    return target, used


def cross_entropy(
    input, target, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """-log softmax(input)[target]: input (N, V) or (N, V, ...), integer target (N) or (N, ...).

    Targets equal to ignore_index count neither in the loss nor in the mean. label_smoothing mixes the target with the
    uniform distribution. reduction is "mean", "sum" or "none".
    """
    logits = floating(input)
    if logits.ndim == 1 and as_tensor(target).ndim == 0:
        logits, target = logits.unsqueeze(0), as_tensor(target).unsqueeze(0)
        return cross_entropy(logits, target, ignore_index, reduction, label_smoothing).squeeze(0)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing {label_smoothing}: expected 0 to 1")
    classes, used = _targets("cross_entropy", logits, target, ignore_index)
    if logits.ndim != 2 or reduction != "mean" or label_smoothing or used is not True or not len(classes):
        return _cross_entropy(logits, classes, used, reduction, label_smoothing)
    n, rows, classes = len(classes), np.arange(len(classes)), classes.copy()  # the next batch may overwrite the target
    p = logits.data - logits.data.max(-1, keepdims=True)
    of_target = p[rows, classes]
    np.exp(p, out=p)
    total = p.sum(-1, keepdims=True)
    loss = (np.log(total).sum() - of_target.sum()) / n

    def backward(g):
        d = p * (g / (n * total))
        d[rows, classes] -= g / n
        return (d,)

    return fused(
        "cross_entropy",
        loss,
        (logits,),
        backward,
        lambda logits: _cross_entropy(logits, classes, used, reduction, label_smoothing),
    )


def _cross_entropy(logits, classes, used, reduction, smoothing):
    logp = log_softmax(logits, 1)
    loss = _picked_loss(logp, classes, used)
    if smoothing:
        loss = loss * (1 - smoothing) + where(np.broadcast_to(used, classes.shape), -mean(logp, 1), 0.0) * smoothing
    if reduction == "mean":
        return loss.sum() / (_number_used(classes, used) or math.nan)
    return _reduced("cross_entropy", loss, reduction)


def _number_used(classes, used):
    return classes.size if used is True else int(used.sum())


def _picked_loss(logp, classes, used):
    used = np.broadcast_to(used, classes.shape)
    index = np.where(used, classes, 0)
    return where(used, -gather(logp, 1, constant(np.expand_dims(index, 1))).squeeze(1), 0.0)


def nll_loss(input, target, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """-input[target] for log-probabilities input (N, V) or (N, V, ...)."""
    input = floating(input)
    if input.ndim == 1 and as_tensor(target).ndim == 0:
        return nll_loss(input.unsqueeze(0), as_tensor(target).unsqueeze(0), ignore_index, reduction).squeeze(0)
    classes, used = _targets("nll_loss", input, target, ignore_index)
    loss = _picked_loss(input, classes, used)
    if reduction == "mean":
        return loss.sum() / (_number_used(classes, used) or math.nan)
    return _reduced("nll_loss", loss, reduction)


def mse_loss(input, target, reduction: str = "mean") -> Tensor:
    input, target = pair("mse_loss", input, target)
    if input.shape != target.shape:
        raise ValueError(f"mse_loss: input {input.shape} and target {target.shape}: expected equal shapes")
    difference = input - target
    return _reduced("mse_loss", difference * difference, reduction)


def binary_cross_entropy_with_logits(input, target, reduction: str = "mean") -> Tensor:
    """-t log σ(x) - (1 - t) log σ(-x), stable for large |x|."""
    input, target = pair("binary_cross_entropy_with_logits", input, target)
    if input.shape != target.shape:
        raise ValueError(
            f"binary_cross_entropy_with_logits: input {input.shape} and target {target.shape}: expected equal shapes"
        )
    return _reduced(
        "binary_cross_entropy_with_logits", (1 - target) * input + softplus(-input, threshold=math.inf), reduction
    )
