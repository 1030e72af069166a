"""All operations of this room, for torch tensors on a CPU or a GPU: differentiable, and known to torch.compile.

    from cuda import ops
    d = ops.matmul(a, b, bias=bias, activation="gelu")
    o = ops.attention(q, k, v, causal=True)
    loss = ops.linear_cross_entropy(x, head.weight, targets)

What each takes, computes and refuses stands in its own file. Optimizers: optim.py; modules: layers.py and linear.py.
"""

from cuda.attention_ops import HEAD_DIMS, attention, causal_attention
from cuda.decode_ops import attention_decode
from cuda.device import DTYPES
from cuda.fused_ops import gelu, layer_norm, relu2, rms_norm, rotary, softmax, swiglu
from cuda.loss_ops import cross_entropy, cross_entropy_, embedding, linear_cross_entropy
from cuda.matmul_ops import ACTIVATIONS, matmul

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "HEAD_DIMS",
    "attention",
    "attention_decode",
    "causal_attention",
    "cross_entropy",
    "cross_entropy_",
    "embedding",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "matmul",
    "relu2",
    "rms_norm",
    "rotary",
    "softmax",
    "swiglu",
]
