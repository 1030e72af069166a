"""What is multiplied in a benchmark, and by whom: shapes, operands on the device, the steps of the ladder and cuBLAS.

Every competitor computes d = a @ b for a (m, k), row-major, and b (k, n), out of normal random numbers. In float32 b is
row-major, as in the tales told of steps 01-07; in bf16 it is the transpose of a row-major matrix, as in a torch Linear.
Several sets of operands are gone through, so that none finds its own in the L2 cache. Each element of a result is
compared with a product in float64. Refused: sizes that TMA cannot describe; results with an element far off.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from cuda import device, dispatch, modules

PEAK = {torch.float32: 66.9e12, torch.bfloat16: 989.4e12}  # FLOP/s dense, NVIDIA's data sheets of the H100 SXM and H200
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-3}  # of the largest element; bf16 itself rounds by 2^-9
PEERS_SLACK = 2  # cuBLAS may add up parts of a sum in bf16
SHAPE = re.compile(r"(\d+)(?:x(\d+)x(\d+))?")
ROTATION = 3  # sets of operands fill the L2 cache so many times
MOST_SETS = 128
Product = Callable[[Tensor, Tensor, Tensor], None]  # (a, b, d)
Sets = list[tuple[Tensor, Tensor, Tensor]]
TRITON = "triton"  # ours, in Triton
OURS = (*dispatch.STEPS, TRITON)


class Shape(NamedTuple):
    """m x n x k."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return str(self.m) if self.square else f"{self.m}x{self.n}x{self.k}"

    @property
    def square(self) -> bool:
        return self.m == self.n == self.k

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def bytes(self, dtype: torch.dtype) -> int:
        """Each operand read once, the result written once."""
        return (self.m * self.k + self.n * self.k + self.m * self.n) * dtype.itemsize


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """`512,8192x3072x768`: squares, and m x n x k. Raises ValueError for sizes that are no multiples of 8."""
    shapes = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = SHAPE.fullmatch(part)
        sizes = [int(size) for size in match.groups() if size] if match else []
        if not sizes or any(size < 8 or size % 8 for size in sizes):
            raise ValueError(f"size {part!r}: expected n or m x n x k as 4096 or 8192x3072x768, multiples of 8")
        shapes.append(Shape(*(sizes if len(sizes) == 3 else sizes * 3)))
    if not shapes:
        raise ValueError(f"sizes {text!r}: expected at least one")
    return tuple(dict.fromkeys(shapes))


def parse_steps(text: str) -> tuple[str, ...]:
    """`all`, or names and numbers of steps: `1,8,best_16`. In the order of the ladder."""
    if text == "all":
        return dispatch.STEPS
    by_word = {str(number): name for number, name in enumerate(dispatch.STEPS, start=1)}
    by_word |= {name: name for name in dispatch.STEPS} | {name[-2:]: name for name in dispatch.STEPS}
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in by_word:
            raise ValueError(f"step {word!r}: expected all, 1 to {len(dispatch.STEPS)}, or a name such as best_16")
    return tuple(name for name in dispatch.STEPS if name in {by_word[word] for word in words})


def steps_of(module: str) -> tuple[str, ...]:
    """The steps that a built module has."""
    return tuple(step["name"] for step in modules.load(module).steps())


def dtype_of(step: str) -> torch.dtype:
    """float32 for steps without tensor cores, bfloat16 for the others."""
    return dispatch.dtypes_of(step)[0]


@dataclass(frozen=True, slots=True)
class Competitor:
    name: str
    dtype: torch.dtype
    product: Product


def our_step(step: str, shape: Shape, tiling: Sequence[int] | None = None) -> Competitor:
    """A step on the current GPU, on torch's current stream. The last one takes the tiling that dispatch chooses."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    kind = "sm_90" if (properties.major, properties.minor) == (9, 0) else "sm_80"
    module, dtype = modules.load(f"_{kind.replace('_', '')}"), dtype_of(step)
    if step == dispatch.STEPS[-1] and tiling is None:
        layout = {"tma": True, "row_column": True}
        tiling = dispatch.choose(kind, dtype, 1, *shape, **layout, multiprocessors=properties.multi_processor_count)[1]

    def product(a: Tensor, b: Tensor, d: Tensor) -> None:
        module.matmul(step, a, b, d, tiling=tiling, stream=torch.cuda.current_stream().cuda_stream)

    return Competitor(step, dtype, product)


def triton_product(dtype: torch.dtype) -> Competitor:
    """Ours in Triton on the current GPU, with the step and the tiling that a call of ops.matmul takes."""

    @cache
    def here() -> device.TritonPlace:  # at the first product, where an error costs only this competitor
        return device.place(torch.device("cuda", torch.cuda.current_device()), kernels="triton")

    def product(a: Tensor, b: Tensor, d: Tensor) -> None:
        here().multiply(None, a, b, d)

    return Competitor(TRITON, dtype, product)


def torch_product(dtype: torch.dtype) -> Competitor:
    """cuBLAS as torch calls it; without TF32, unless torch was told otherwise."""
    return Competitor("cuBLAS", dtype, lambda a, b, d: torch.mm(a, b, out=d))


def torch_product_lt(dtype: torch.dtype) -> Competitor:
    """cublasLt as torch calls it: the first proposal of its heuristics."""

    def product(a: Tensor, b: Tensor, d: Tensor) -> None:
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library("cublaslt")
        try:
            torch.mm(a, b, out=d)
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    return Competitor("cublasLt", dtype, product)


def set_count(shape: Shape, dtype: torch.dtype, cache_bytes: int) -> int:
    """How many sets of operands overflow the cache, one after the other."""
    return min(MOST_SETS, max(1, ceil(ROTATION * cache_bytes / shape.bytes(dtype))))


class Operands:
    """Sets of a and b of one shape and type, normal and random, and what their products are."""

    def __init__(self, shape: Shape, dtype: torch.dtype, count: int, device: str, seed: int = 0):
        generator = torch.Generator(device).manual_seed(seed)

        def normal(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32).to(dtype)

        self.shape, self.dtype, self.device = shape, dtype, device

        def right() -> Tensor:
            return normal(shape.k, shape.n) if dtype == torch.float32 else normal(shape.n, shape.k).mT

        self.pairs = [(normal(shape.m, shape.k), right()) for _ in range(count)]
        self.references = [(a.double() @ b.double()).float() for a, b in self.pairs]

    def sets(self, count: int) -> Sets:
        """With results of their own, full of NaN: what is not written is seen."""
        m, n, _ = self.shape
        nan = {"fill_value": torch.nan, "dtype": self.dtype, "device": self.device}
        return [(a, b, torch.full((m, n), **nan)) for a, b in self.pairs[:count]]

    def error(self, sets: Sets) -> float:
        """The largest distance from the reference, in parts of its largest element. NaN if there is one."""
        worst = [
            (d.float() - reference).abs().max() / reference.abs().max()
            for (_, _, d), reference in zip(sets, self.references, strict=False)
        ]
        return float(torch.stack(worst).max())

    def verify(self, name: str, sets: Sets) -> float:
        """The error; raises ValueError where it is too large or NaN."""
        peer = name.lower().startswith("cublas")
        error, allowed = self.error(sets), TOLERANCE[self.dtype] * (PEERS_SLACK if peer else 1)
        if not (error <= allowed):
            raise ValueError(
                f"{name} at {self.shape}: an element is off by {error:.2g} of the largest one, "
                f"expected at most {allowed:.2g}"
            )
        return error
