"""Norms and embeddings by our kernels as modules: `minigpt.model.GPT(config, norm_cls=RMSNorm, ...)`.

Parameters are named and started as torch's, so state dicts go both ways. Under autocast the gain stays float32
beside an x of 16 bits, and so does its gradient: the kernels read both types. The linear layer is in linear.py.
`kernels` of a class says whose kernels its modules run: those called Triton.. are the same modules by Triton.
"""

from torch import Tensor, nn

from cuda.device import Kernels
from cuda.fused_ops import layer_norm, rms_norm
from cuda.loss_ops import embedding


class RMSNorm(nn.RMSNorm):
    """x (.., width) over the root of its mean square, times `weight`; see fused_ops.rms_norm for types and errors."""

    kernels: Kernels = "cuda"

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps, kernels=self.kernels)


class LayerNorm(nn.LayerNorm):
    """x (.., width) less its mean over its deviation, times `weight`, plus `bias`; see fused_ops.layer_norm."""

    kernels: Kernels = "cuda"

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps, kernels=self.kernels)


class Embedding(nn.Embedding):
    """Rows of `weight` (numbers, width); see loss_ops.embedding."""

    kernels: Kernels = "cuda"

    def __init__(self, numbers: int, width: int):
        super().__init__(numbers, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight, kernels=self.kernels)


class TritonRMSNorm(RMSNorm):
    kernels: Kernels = "triton"


class TritonLayerNorm(LayerNorm):
    kernels: Kernels = "triton"


class TritonEmbedding(Embedding):
    kernels: Kernels = "triton"
