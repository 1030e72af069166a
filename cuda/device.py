"""Where kernels run for tensors of a device: the extension module, the stream, and what kind of machine it is.

CPU tensors go to the CPU model (cuda/_simt), CUDA tensors to the GPU on torch's current stream. Refused with a
RuntimeError: a GPU older than capability 8.0, a step that this GPU cannot run, a module that is not built.
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
        with self.current():
            self.module.run(operation, stream=self.stream, **detached)

    def multiply(self, *operands, **options) -> None:
        """`matmul` of the module."""
        with self.current():
            self.module.matmul(*operands, stream=self.stream, **options)

    def current(self) -> AbstractContextManager:
        """Inside, the device is the current one: from others torch hands nothing out."""
        if self.kind == "model" or self.device.index in (None, torch.cuda.current_device()):
            return nullcontext()
        return torch.cuda.device(self.device)


def place(device: torch.device, step: str | None = None, anywhere: Sequence[str] = ()) -> Place:
    """For a device; `step` is one of a ladder, of which those in `anywhere` need no Hopper GPU."""
    if device.type == "cpu":
        return Place("model", modules.load(_model.get()), 0, 4, device)
    major, minor, name, multiprocessors = gpu(device)
    hopper = (major, minor) == (9, 0)
    here = f"{name} has compute capability {major}.{minor}"
    if major < 8:
        raise RuntimeError(f"{here}: expected 8.0 or more; on the CPU every step runs, call .cpu()")
    if not hopper and step is not None and step not in anywhere:
        able = ", ".join(anywhere)
        raise RuntimeError(f"step {step} needs a Hopper GPU, capability 9.0, and {here}. What runs there: {able}")
    stream = torch.cuda.current_stream(device).cuda_stream
    kind, module = ("sm_90", "_sm90") if hopper else ("sm_80", "_sm80")
    return Place(kind, modules.load(module), stream, multiprocessors, device)


@cache
def gpu(device: torch.device) -> tuple[int, int, str, int]:
    found = torch.cuda.get_device_properties(device)
    return found.major, found.minor, found.name, found.multi_processor_count
