"""What is computed in the attention benchmark, and by whom: problems, our steps, ours in Triton, torch's, FA3's own.

The convention is FlashAttention's: batch x tokens = 16384, heads x head width = 2048; 4 B H T S K FLOP forward, half of
it where causal, 2.5 times as many backward. Refused: peers that are not there or do not take the problem are left out.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cuda import attention_ops
from cuda.device import Kernels

TOKENS, WIDTH = 16384, 2048
PEERS = {"torch flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """Of one problem, with as many keys as queries."""

    head_dim: int
    tokens: int
    causal: bool
    batch: int
    heads: int

    @classmethod
    def of(cls, head_dim: int, tokens: int, causal: bool) -> "Shape":
        return cls(head_dim, tokens, causal, max(1, TOKENS // tokens), WIDTH // head_dim)

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads}x{self.tokens}x{self.head_dim} {'causal' if self.causal else 'full'}"

    def flops(self, backward: bool) -> float:
        forward = 4 * self.batch * self.heads * self.tokens**2 * self.head_dim / (2 if self.causal else 1)
        return 2.5 * forward if backward else forward


def operands(shape: Shape, device: str) -> list[Tensor]:
    """q, k, v and the gradient of o, N(0, 1) in bfloat16, (B, H, T, K) in memory as (B, T, H, K)."""
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    return [torch.randn(size, device=device).bfloat16().transpose(1, 2) for _ in range(4)]


def ours(shape: Shape, step: str | None, backward_step: str | None, kernels: Kernels = "cuda") -> Attention:
    chosen = {"step": step, "backward_step": backward_step, "kernels": kernels}
    return lambda q, k, v: attention_ops.attention(q, k, v, causal=shape.causal, **chosen)


def torchs(shape: Shape, backend: SDPBackend) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)

    return run


def package(shape: Shape) -> Attention | None:
    """FlashAttention-3's own package, where it is installed."""
    with suppress(ImportError):
        from flash_attn_interface import flash_attn_func

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=shape.causal)
            return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

        return run
    return None


def peers(shape: Shape, inputs: list[Tensor]) -> dict[str, Attention]:
    """Those that take the problem."""
    candidates: dict[str, Any] = {name: torchs(shape, backend) for name, backend in PEERS.items()}
    candidates["flash_attn_interface"] = package(shape)
    found = {}
    for name, one in candidates.items():
        if one is None:
            continue
        try:
            one(*inputs[:3])
        except RuntimeError as error:
            print(f"{name} does not take {shape}: {str(error).splitlines()[0]}", flush=True)
        else:
            found[name] = one
    return found


def backward_of(attention: Attention, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass alone: the forward pass has run."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    o = attention(*leaves)
    return lambda: torch.autograd.grad(o, leaves, inputs[3], retain_graph=True)
