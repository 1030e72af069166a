"""All operations of this room, for torch tensors on a CPU or a GPU: differentiable, and known to torch.compile.

    from cuda import ops
    d = ops.matmul(a, b, bias=bias, activation="gelu")
    o = ops.attention(q, k, v, causal=True)
    loss = ops.linear_cross_entropy(x, head.weight, targets)
    y = ops.rms_norm(x, gain, kernels="triton")           # the same operation by the kernels in Triton

Written in Triton alone: products in fp8, grouped products, quantised weights. What each takes, computes and refuses
stands in its own file. Optimizers: optim.py; modules: layers.py and linear.py.
"""

from cuda.attention_ops import HEAD_DIMS, TRITON_HEAD_DIMS, attention, causal_attention
from cuda.decode_ops import attention_decode
from cuda.device import DTYPES, KERNELS
from cuda.fp8_ops import fp8_linear, fp8_matmul, quantize_fp8
from cuda.fused_ops import gelu, layer_norm, relu2, rms_norm, rotary, softmax, swiglu
from cuda.grouped_ops import grouped_matmul
from cuda.lora_ops import lora_bgmv, lora_sgmv
from cuda.loss_ops import cross_entropy, cross_entropy_, embedding, linear_cross_entropy
from cuda.matmul_ops import ACTIVATIONS, matmul
from cuda.quantised_ops import (
    dequantize_int4,
    dequantize_int8,
    dequantize_nf4,
    int4_matmul,
    int8_matmul,
    nf4_matmul,
)

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "HEAD_DIMS",
    "KERNELS",
    "TRITON_HEAD_DIMS",
    "attention",
    "attention_decode",
    "causal_attention",
    "cross_entropy",
    "cross_entropy_",
    "dequantize_int4",
    "dequantize_int8",
    "dequantize_nf4",
    "embedding",
    "fp8_linear",
    "fp8_matmul",
    "gelu",
    "grouped_matmul",
    "int4_matmul",
    "int8_matmul",
    "layer_norm",
    "linear_cross_entropy",
    "lora_bgmv",
    "lora_sgmv",
    "matmul",
    "nf4_matmul",
    "quantize_fp8",
    "relu2",
    "rms_norm",
    "rotary",
    "softmax",
    "swiglu",
]
