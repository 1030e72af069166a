"""nn.Linear by our kernels: the same parameters and state dict, so `GPT(config, linear_cls=Linear)` is the GPT of stage
2 with its matrix products from cuda/matmul, forwards and backwards, on the CPU model or on a GPU.

Refused, by ops.matmul: parameters other than float32, bfloat16 and float16. Under autocast the product is in its type.
"""

import torch
from torch import Tensor, nn

from cuda import ops
from cuda.device import Kernels


class Linear(nn.Linear):
    """x (..., in) -> x W' + bias (..., out). W is (out, in) row-major: the kernels read it as a transposed operand."""

    kernels: Kernels = "cuda"

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        y = ops.matmul(x.reshape(-1, x.shape[-1]), weight.mT, bias=bias, kernels=self.kernels)
        return y.reshape(*x.shape[:-1], self.out_features)


class TritonLinear(Linear):
    """The same by the kernels in Triton."""

    kernels = "triton"
