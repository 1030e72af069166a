"""Many tensors in one launch: what the kernels over a table of addresses share, as fused/multi_tensor.cuh.

A program gets a chunk: which tensor, and its number there. A row of the table has the tensor's address, which becomes
a pointer in the kernel, and its element type, a branch that all threads take alike: a launch for each type would cost
more. The compiler knows nothing of an address from memory, so `pointer` tells it what the program has looked up.
"""

import triton.language as tl

from cuda.triton_compat import jit

CHUNK: tl.constexpr = tl.constexpr(8192)  # elements, as in cuda/optim.py
F32: tl.constexpr = tl.constexpr(0)  # element types in a table
BF16: tl.constexpr = tl.constexpr(1)
F16: tl.constexpr = tl.constexpr(2)


@jit
def pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """To elements at an address; ALIGNED promises a multiple of 16 bytes; without it loads go by elements."""
    to = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(to, 16) if ALIGNED else to


@jit
def load(address, kind, i, mask, ALIGNED: tl.constexpr):
    """Elements i of the tensor at an address, in float32. Where the mask (None: everywhere) is not set, 0."""
    other = None if mask is None else 0.0
    if kind == F32:
        x = tl.load(pointer(address, tl.float32, ALIGNED) + i, mask=mask, other=other)
    elif kind == BF16:
        x = tl.load(pointer(address, tl.bfloat16, ALIGNED) + i, mask=mask, other=other).to(tl.float32)
    else:
        x = tl.load(pointer(address, tl.float16, ALIGNED) + i, mask=mask, other=other).to(tl.float32)
    return x


@jit
def store(address, kind, i, x, mask, ALIGNED: tl.constexpr):
    if kind == F32:
        tl.store(pointer(address, tl.float32, ALIGNED) + i, x, mask=mask)
    elif kind == BF16:
        tl.store(pointer(address, tl.bfloat16, ALIGNED) + i, x.to(tl.bfloat16), mask=mask)
    else:
        tl.store(pointer(address, tl.float16, ALIGNED) + i, x.to(tl.float16), mask=mask)
