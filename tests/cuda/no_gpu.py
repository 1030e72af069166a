"""The way of a launch to a GPU, on a machine without one: `with driver(folder) as taken:`, in a process of its own.

Inside, torch has two Hopper GPUs whose tensors are fake: shapes and strides without memory, so whoever reads a value of
one, which makes a CPU wait for a GPU, fails. Triton's own launcher runs, JITFunction.run, its C and all, against a
libcuda that writes launches down (kernels/no_gpu.c). `taken()` gives them. Refused: a machine that has a GPU.
"""

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

STREAM = 42
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia"


class Launch(NamedTuple):
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int


class Context:
    """What autograd gives a backward pass: its engine does not start without a GPU."""

    def __init__(self, given: tuple):
        self.needs_input_grad = tuple(isinstance(x, torch.Tensor) and x.requires_grad for x in given)

    def save_for_backward(self, *tensors) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, _: bool) -> None: ...

    def mark_non_differentiable(self, *_) -> None: ...


class OwnOperations(TorchDispatchMode):
    """Runs what our operations do, and their backward pass behind it where an input wants a gradient; the mode of fake
    tensors would only ask for the shape of their result."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "groundup":
            return func(*args, **(kwargs or {}))
        operation = OPDEFS[f"groundup::{func._opname}"]
        context = Context(args)
        with self:
            result = operation._init_fn(*args, **(kwargs or {}))
            if any(context.needs_input_grad) and operation._backward_fn is not None:
                operation._setup_context_fn(context, args, result)
                several = result if isinstance(result, tuple | list) else (result,)
                operation._backward_fn(context, *(torch.empty_like(y) for y in several))
        return result


@contextmanager
def driver(folder: Path) -> Iterator[Callable[[], list[Launch]]]:
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: expected one without")
    libcuda = built(folder / "libcuda.so.1", "no_gpu.c", "gcc", f"-I{NVIDIA / 'include'}")
    if torch.version.cuda is None:
        home = Path(torch.__file__).parent
        options = ["-std=c++20", f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10"]
        built(folder / "guard.so", "no_gpu_guard.cpp", "g++", *options)
    libcuda.no_gpu_log.restype = ctypes.c_char_p
    triton.knobs.nvidia.libcuda_path = str(folder)

    from triton.backends.nvidia.driver import CudaDriver

    current = [0]

    class device:
        def __init__(self, wanted):
            self.index = torch.device(wanted).index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    properties = mock.Mock(major=9, minor=0, multi_processor_count=132)
    properties.name = "a GPU that is not there"
    patches = {
        "current_device": lambda: current[0],
        "device": device,
        "is_initialized": lambda: False,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "current_stream": lambda device=None: mock.Mock(cuda_stream=STREAM + current[0]),
    }

    def taken() -> list[Launch]:
        lines = (list(map(int, line.split())) for line in libcuda.no_gpu_log().decode().splitlines())
        return [Launch(tuple(x[:3]), *x[3:]) for x in lines]

    with mock.patch.multiple(torch.cuda, **patches), mock.patch.object(FakeTensor, "data_ptr", address):
        triton.runtime.driver.set_active(CudaDriver())
        triton.runtime.driver.active.get_current_stream = lambda index: STREAM + index
        with FakeTensorMode(), OwnOperations():
            yield taken


def built(library: Path, source: str, compiler: str, *options: str) -> ctypes.CDLL:
    given = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library]
    subprocess.run([compiler, *given, Path(__file__).parent / "kernels" / source, *options], check=True)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def address(x: torch.Tensor) -> int:
    """As if every tensor began at the same place: views are where they are within theirs."""
    return (1 << 40) + x.storage_offset() * x.element_size()
