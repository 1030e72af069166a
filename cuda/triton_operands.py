"""A matrix product as its kernels in Triton see it: how each operand lies in memory, checked, and described to TMA.

Refused with a ValueError, as the extension in CUDA C++ does (native/bindings.cpp): shapes that do not fit, rows that
overlap, layouts that are neither row-major nor (of a and b) the transpose of that, strides that TMA cannot describe.
"""

from typing import NamedTuple

from torch import Tensor

from cuda.triton_compat import TensorDescriptor
from cuda.triton_dispatch import Size


class Operand(NamedTuple):
    """A batch of matrices. `leading`: elements from one row in memory to the next; `batch`: from one matrix to the
    next, 0 where all share one."""

    name: str
    tensor: Tensor
    matrices: int
    transposed: bool
    leading: int
    batch: int

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of the batch, the rows and the columns."""
        return (self.batch, 1, self.leading) if self.transposed else (self.batch, self.leading, 1)

    def stored(self) -> tuple[int, int]:
        """Rows and columns as they lie in memory."""
        rows, columns = self.tensor.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def obstacle(self) -> str:
        """Why TMA cannot describe it; empty where it can."""
        size, over = self.tensor.element_size(), self.tensor.data_ptr() % 16
        if over:
            return f"the address of {self.name} is {over} bytes past a multiple of 16, expected a multiple of 16"
        for what, stride in (("row", self.leading * size), ("batch", self.batch * size)):
            if stride % 16 or stride >= 1 << 40:
                return f"the {what} stride of {self.name} is {stride} bytes, expected a multiple of 16 below 2^40"
        return ""

    def descriptor(self, rows: int, columns: int) -> TensorDescriptor:
        """Boxes of rows x columns, counted in memory. A dimension of one gets a stride that TMA takes."""
        matrices = self.matrices if self.batch else 1
        strides = [self.batch or self.leading, self.leading, 1]
        return TensorDescriptor(self.tensor, [matrices, *self.stored()], strides, [1, rows, columns])


class Problem(NamedTuple):
    size: Size
    a: Operand
    b: Operand
    d: Operand
    c: Operand | None  # None: beta is 0
    bias: Tensor | None
    alpha: float
    beta: float
    activation: str


def problem_of(a, b, d, c, bias, alpha: float, beta: float, activation: str) -> Problem:
    (m, k), n = a.shape[-2:], b.shape[-1]
    batch = max(x.shape[0] if x.ndim == 3 else 1 for x in (a, b))
    for letter, count in (("m", m), ("n", n), ("k", k), ("batch", batch)):
        if not 0 < count < 1 << 31:
            raise ValueError(f"{letter} = {count}: expected 1 to {(1 << 31) - 1}")
    if beta != 0 and c is None:
        raise ValueError(f"beta {beta} without c: expected c, or beta 0")
    columns = n // 2 if activation == "swiglu" else n
    size = Size(str(a.dtype).removeprefix("torch."), m, n, k, batch)
    if bias is not None and (bias.shape != (n,) or (n > 1 and bias.stride(0) != 1)):
        raise ValueError(f"bias: {_laid(bias)}: expected ({n},) without gaps")
    if batch > 1 and (d.ndim == 2 or d.shape[0] == 1):
        raise ValueError(f"d: shape {tuple(d.shape)}: expected room for the whole batch")
    added = None if beta == 0 else _operand("c", c, batch, m, columns, may_transpose=False)
    operands = _operand("a", a, batch, m, k), _operand("b", b, batch, k, n), _operand("d", d, batch, m, columns, False)
    if batch > 1 and operands[2].batch < (m - 1) * operands[2].leading + columns:
        raise ValueError(f"d: {_laid(d)}: expected matrices that do not overlap")
    return Problem(size, *operands, added, bias, alpha, beta, activation)


def _laid(x: Tensor) -> str:
    return f"shape {tuple(x.shape)} with strides {tuple(x.stride())}"


def _operand(name: str, x: Tensor, batch: int, rows: int, columns: int, may_transpose: bool = True) -> Operand:
    if tuple(x.shape) not in ((rows, columns), (1, rows, columns), (batch, rows, columns)):
        wanted = f"({rows}, {columns})" + (f" or ({batch}, {rows}, {columns})" if batch > 1 else "")
        raise ValueError(f"{name}: shape {tuple(x.shape)}: expected {wanted}")
    if x.data_ptr() % x.element_size():
        raise ValueError(f"{name}: is misaligned: expected an address that is a multiple of {x.element_size()}")
    down, right = x.stride()[-2:]
    shared = x.ndim == 2 or x.shape[0] == 1
    matrices, apart = (1, 0) if shared else (x.shape[0], x.stride(0))
    as_column = may_transpose and columns == 1 and rows > 1 and down == 1
    if (right == 1 or columns == 1) and (rows == 1 or down >= columns) and not as_column:
        return Operand(name, x, matrices, False, _free(columns) if rows == 1 else down, apart)
    if may_transpose and (down == 1 or rows == 1) and (columns == 1 or right >= rows):
        return Operand(name, x, matrices, True, _free(rows) if columns == 1 else right, apart)
    transpose = ", or the transpose of that; call .contiguous()" if may_transpose else ""
    raise ValueError(f"{name}: {_laid(x)}: expected rows without gaps inside, one after the other{transpose}")


def _free(width: int) -> int:
    """A stride that addresses nothing: one that TMA takes."""
    return (width + 15) // 16 * 16
