"""All operations of this room, for torch tensors on a CPU or a GPU: differentiable, and known to torch.compile.

    from cuda import ops
    d = ops.matmul(a, b, bias=bias, activation="gelu")

What each takes, computes and refuses stands in its own file.
"""

from cuda.matmul_ops import ACTIVATIONS, DTYPES, matmul

__all__ = ["ACTIVATIONS", "DTYPES", "matmul"]
