"""Stage 1: reverse-mode automatic differentiation on numpy. `import autograd as ag`, then as in torch."""

from autograd import activations, elementwise, indexing, linalg, methods, reduce, shape
from autograd.anomaly import AnomalyError
from autograd.checkpointing import checkpoint
from autograd.engine import grad
from autograd.gradcheck import gradcheck, gradgradcheck
from autograd.mode import detect_anomaly, enable_grad, is_grad_enabled, no_grad
from autograd.random import manual_seed
from autograd.tensor import Tensor

methods.attach()

from autograd import functional, nn, optim  # noqa: E402  (they build on Tensor's methods)
from autograd.draw import draw  # noqa: E402

# Operations that read better as functions, or are no methods.
cat, stack, split, chunk, tril, triu = shape.cat, shape.stack, shape.split, shape.chunk, shape.tril, shape.triu
where, maximum, minimum, clamp = elementwise.where, elementwise.maximum, elementwise.minimum, elementwise.clamp
exp, log, sqrt, rsqrt = elementwise.exp, elementwise.log, elementwise.sqrt, elementwise.rsqrt
sin, cos, tanh, erf, sigmoid = elementwise.sin, elementwise.cos, elementwise.tanh, elementwise.erf, activations.sigmoid
matmul, einsum = linalg.matmul, linalg.einsum
gather, scatter_add, index_select = indexing.gather, indexing.scatter_add, indexing.index_select
logsumexp, cumsum = reduce.logsumexp, reduce.cumsum

__all__ = [
    "AnomalyError",
    "Tensor",
    "cat",
    "checkpoint",
    "chunk",
    "clamp",
    "cos",
    "cumsum",
    "detect_anomaly",
    "draw",
    "einsum",
    "enable_grad",
    "erf",
    "exp",
    "functional",
    "gather",
    "grad",
    "gradcheck",
    "gradgradcheck",
    "index_select",
    "is_grad_enabled",
    "log",
    "logsumexp",
    "manual_seed",
    "matmul",
    "maximum",
    "minimum",
    "nn",
    "no_grad",
    "optim",
    "rsqrt",
    "scatter_add",
    "sigmoid",
    "sin",
    "split",
    "sqrt",
    "stack",
    "tanh",
    "tril",
    "triu",
    "where",
]
