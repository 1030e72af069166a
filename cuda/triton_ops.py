"""Which file has an operation in Triton: a function of the operation's name, called as (place, **arguments).

Names and arguments are those of the operations in CUDA C++ (native/operation.h), so cuda/*_ops.py prepare and check
both alike. Refused with a RuntimeError: an operation that is written in CUDA C++ alone.
"""

from importlib import import_module

FILES = {
    "attention_forward": "triton_attention",
    "attention_backward": "triton_attention_backward",
    "attention_decode": "triton_decode",
    "norm_forward": "triton_norm",
    "norm_backward": "triton_norm",
    "rotary": "triton_rotary",
    "activation_forward": "triton_activation",
    "activation_backward": "triton_activation",
    "softmax_forward": "triton_softmax",
    "softmax_backward": "triton_softmax",
    "cross_entropy": "triton_cross_entropy",
    "cross_entropy_gradient": "triton_cross_entropy",
    "embedding": "triton_embedding",
    "embedding_backward": "triton_embedding",
    "adamw": "triton_adamw",
    "grad_norm": "triton_grad_norm",
    "grad_scale": "triton_grad_norm",
    "quantize_fp8": "triton_fp8",
    "fp8_matmul": "triton_fp8",
    "grouped_matmul": "triton_grouped",
    "grouped_weights": "triton_grouped",
    "lora_bgmv": "triton_lora",
    "lora_sgmv": "triton_lora",
    "lora_sgmv_backward": "triton_lora_gradients",
    "dequantise": "triton_quantised",
    "quantised_multiply": "triton_quantised_matmul",
    "quantised_multiply_transposed": "triton_quantised_matmul",
}


def run(place, operation: str, **arguments) -> None:
    if operation not in FILES:
        raise RuntimeError(f"operation {operation} in Triton: expected one of {', '.join(FILES)}")
    getattr(import_module(f"cuda.{FILES[operation]}"), operation)(place, **arguments)
