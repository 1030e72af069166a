"""Scaled dot-product attention: fused, with a derivative by hand, beside its definition out of plain operations.

Refuses shapes and masks that do not fit, naming them.
"""

import math

import numpy as np

from autograd.elementwise import cast, masked_fill, pair
from autograd.engine import fused
from autograd.linalg import matmul
from autograd.random import dropout
from autograd.reduce import softmax
from autograd.tensor import Tensor, as_tensor


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
