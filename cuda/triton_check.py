"""A check of interpreted kernels, for what the interpreter alone lets pass: races between programs and stray accesses.

    with checking() as launches:
        ops.softmax(x, kernels="triton")

The interpreter runs the programs of a launch one after the other, so whatever they do to each other's memory looks
right; on a GPU they run at once. And a pointer reads what lies there, whoever's it is. Here each load and store is
noted. Refused with an AccessError, which names kernel and program: an address outside of all tensors that the launch
was given; two elements that one store puts into one place; and, when the launch is over, a byte that two programs store
or that one stores and another loads. Not looked at: atomics; boxes of descriptors, which have bounds of their own, but
for races; the order of accesses within a program, whose threads Triton itself keeps apart.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

from cuda import triton_compat
from cuda.triton_compat import builder, tensors_of


class AccessError(RuntimeError):
    """A race or a stray access of an interpreted kernel."""


@contextmanager
def checking() -> Iterator[list[str]]:
    """Inside, interpreted launches are checked; the list gets the names of their kernels."""
    launches: list[str] = []

    @contextmanager
    def watch(name: str, arguments: Iterable) -> Iterator[None]:
        launches.append(name)
        with _noted(_Accesses(name, tensors_of(arguments))) as accesses:
            yield
        accesses.conclude()

    token = triton_compat.watch.set(watch)
    try:
        yield launches
    finally:
        triton_compat.watch.reset(token)


@contextmanager
def _noted(accesses: "_Accesses") -> Iterator["_Accesses"]:
    """Inside, all that the interpreter loads and stores."""
    kind = type(builder)
    load, store = kind.create_masked_load, kind.create_masked_store

    def noted_load(self, pointers, mask, *others, **options):
        accesses.note(accesses.loads, "load", pointers, mask)
        return load(self, pointers, mask, *others, **options)

    def noted_store(self, pointers, value, mask, *others, **options):
        accesses.note(accesses.stores, "store", pointers, mask)
        return store(self, pointers, value, mask, *others, **options)

    kind.create_masked_load, kind.create_masked_store = noted_load, noted_store
    try:
        yield accesses
    finally:
        kind.create_masked_load, kind.create_masked_store = load, store


class _Accesses:
    """Those of a launch: (addresses without repetition, bytes of an element, program) each."""

    def __init__(self, name: str, tensors: Iterable[Tensor]):
        self.name = name
        self.begins, self.ends = _merged(tensors)
        self.loads: list[tuple[np.ndarray, int, tuple]] = []
        self.stores: list[tuple[np.ndarray, int, tuple]] = []

    def note(self, where: list, what: str, pointers, mask) -> None:
        addresses = np.asarray(pointers.data).astype(np.int64)
        addresses = addresses[np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)]
        if not addresses.size:
            return
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        program = tuple(builder.grid_idx)
        tensor = np.searchsorted(self.begins, addresses, side="right") - 1
        stray = (tensor < 0) | (addresses + size > self.ends[np.maximum(tensor, 0)])
        here = f"{self.name}, program {program}: a {what} of"
        if stray.any():
            raise AccessError(f"{here} {stray.sum()} elements outside of all tensors")
        unique = np.unique(addresses)
        if what == "store" and unique.size < addresses.size:
            raise AccessError(f"{here} {addresses.size} elements to {unique.size} places")
        where.append((unique, size, program))

    def conclude(self) -> None:
        numbers: dict[tuple, int] = {}
        stored, loaded = (_bytes(accesses, numbers) for accesses in (self.stores, self.loads))
        twice = stored[1:, 0] == stored[:-1, 0]
        if twice.any():
            raise AccessError(f"{self.name}: {twice.sum()} bytes that two programs store")
        if not len(stored) or not len(loaded):
            return
        at = np.minimum(np.searchsorted(stored[:, 0], loaded[:, 0]), len(stored) - 1)
        other = (stored[at, 0] == loaded[:, 0]) & (stored[at, 1] != loaded[:, 1])
        if other.any():
            raise AccessError(f"{self.name}: {other.sum()} bytes that one program stores and another one loads")


def _merged(tensors: Iterable[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Begins and ends of the memory that tensors span, in order; what overlaps or touches is one piece."""
    spans = []
    for x in tensors:
        if x.numel():
            last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            spans.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
    pieces: list[list[int]] = []
    for begin, end in sorted(spans):
        if pieces and begin <= pieces[-1][1]:
            pieces[-1][1] = max(pieces[-1][1], end)
        else:
            pieces.append([begin, end])
    table = np.array(pieces or [[0, 0]], dtype=np.int64)
    return table[:, 0], table[:, 1]


def _bytes(accesses: list[tuple[np.ndarray, int, tuple]], numbers: dict[tuple, int]) -> np.ndarray:
    """(address of a byte, number of a program), sorted, none twice."""
    parts = [np.zeros((0, 2), dtype=np.int64)]
    for addresses, size, program in accesses:
        every = (addresses[:, None] + np.arange(size)).ravel()
        parts.append(np.stack([every, np.full_like(every, numbers.setdefault(program, len(numbers)))], axis=1))
    return np.unique(np.concatenate(parts), axis=0)
