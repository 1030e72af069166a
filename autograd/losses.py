"""Losses, with torch's names and meaning; the common case of cross-entropy is fused.

Refuses class indices out of range, targets of another shape, and unknown reductions.
"""

import math

import numpy as np

from autograd.activations import softplus
from autograd.elementwise import floating, pair, where
from autograd.engine import fused
from autograd.indexing import gather
from autograd.reduce import log_softmax, mean
from autograd.tensor import Tensor, as_tensor, constant


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
    if target.dtype == np.int64 and ignore_index < 0 and target.size:
        highest = np.maximum.reduce(target.view(np.uint64), None)  # as unsigned numbers the negative ones are large
        if highest < logits.shape[1]:
            return target, True
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
    p = logits.data - np.maximum.reduce(logits.data, -1, keepdims=True)
    of_target = p[rows, classes]
    np.exp(p, out=p)
    total = np.add.reduce(p, -1, keepdims=True)
    loss = (np.add.reduce(np.log(total), None) - np.add.reduce(of_target)) / n

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
