"""Where kernels run for tensors of a device: whose kernels, the extension module, the stream, what kind of machine.

Kernels in CUDA C++: CPU tensors go to the CPU model (cuda/_simt), CUDA tensors to the GPU on torch's current stream.
Kernels in Triton: CPU tensors go to Triton's interpreter, CUDA tensors to what its compiler makes (triton_compat.py).
Both do the same operations, known by the same names with the same arguments. Refused with a ValueError: kernels that
are neither; with a RuntimeError: a GPU older than capability 8.0, a step that this GPU cannot run, a module that is not
built, Triton where it is not installed.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cuda import modules

Kernels = Literal["cuda", "triton"]
KERNELS = ("cuda", "triton")
Kind = Literal["model", "sm_80", "sm_90"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what kernels compute with; attention wants 16 bits


_model: ContextVar[str] = ContextVar("model", default="_simt")


@contextmanager
def model(name: Literal["_simt", "_simt_checked"]) -> Iterator[ModuleType]:
    """Inside, CPU tensors run on this module: the checked one looks for races and stray accesses, and can count."""
    before = _model.set(name)
    try:
        yield modules.load(name)
    finally:
        _model.reset(before)


class Place(NamedTuple):
    kind: Kind
    module: ModuleType
    stream: int
    multiprocessors: int
    device: torch.device

    def run(self, operation: str, **arguments) -> None:
        """An operation of native/operation.h. Tensors that need a gradient are taken as they are."""
        detached = {name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        with _current(self.device):
            self.module.run(operation, stream=self.stream, **detached)

    def multiply(self, *operands, **options) -> None:
        """`matmul` of the module."""
        with _current(self.device):
            self.module.matmul(*operands, stream=self.stream, **options)


class TritonPlace(NamedTuple):
    """The same for kernels in Triton: triton_ops.py says which file has an operation."""

    kind: Literal["interpreter", "sm_80", "sm_90"]
    multiprocessors: int
    device: torch.device

    def run(self, operation: str, **arguments) -> None:
        from cuda import triton_ops

        detached = {name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        with _current(self.device):
            triton_ops.run(self, operation, **detached)

    def multiply(self, *operands, **options) -> None:
        from cuda import triton_matmul

        with _current(self.device):
            triton_matmul.multiply(self, *operands, **options)


def check_kernels(kernels: str) -> None:
    if kernels not in KERNELS:
        raise ValueError(f"kernels {kernels!r}: expected one of {', '.join(KERNELS)}")


def place(
    device: torch.device, step: str | None = None, anywhere: Sequence[str] = (), kernels: Kernels = "cuda"
) -> Place | TritonPlace:
    """For a device; `step` is one of a ladder, of which those in `anywhere` need no Hopper GPU."""
    check_kernels(kernels)
    if kernels == "triton":
        return _triton_place(device)
    if device.type == "cpu":
        return Place("model", modules.load(_model.get()), 0, 4, device)
    hopper, here, multiprocessors = _described(device)
    if not hopper and step is not None and step not in anywhere:
        able = ", ".join(anywhere)
        raise RuntimeError(f"step {step} needs a Hopper GPU, capability 9.0, and {here}. What runs there: {able}")
    stream = torch.cuda.current_stream(device).cuda_stream
    kind, module = ("sm_90", "_sm90") if hopper else ("sm_80", "_sm80")
    return Place(kind, modules.load(module), stream, multiprocessors, device)


def _triton_place(device: torch.device) -> TritonPlace:
    try:
        from cuda import triton_compat
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError("kernels 'triton': expected Triton 3.6 to 3.9 to be installed: pip install triton") from None
    compiled_for = triton_compat.capability()
    if compiled_for is not None:
        return TritonPlace("sm_90" if compiled_for == 90 else "sm_80", 132, device)
    if device.type == "cpu":
        return TritonPlace("interpreter", 4, device)
    hopper, _, multiprocessors = _described(device)
    return TritonPlace("sm_90" if hopper else "sm_80", multiprocessors, device)


def _current(device: torch.device) -> AbstractContextManager:
    """Inside, the device is the current one: from others torch hands nothing out."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def _described(device: torch.device) -> tuple[bool, str, int]:
    """Whether it is a Hopper GPU, what it is in words, its multiprocessors."""
    major, minor, name, multiprocessors = gpu(device)
    here = f"{name} has compute capability {major}.{minor}"
    if major < 8:
        raise RuntimeError(f"{here}: expected 8.0 or more; on the CPU every step runs, call .cpu()")
    return (major, minor) == (9, 0), here, multiprocessors


@cache
def gpu(device: torch.device) -> tuple[int, int, str, int]:
    found = torch.cuda.get_device_properties(device)
    return found.major, found.minor, found.name, found.multi_processor_count
