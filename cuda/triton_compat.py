"""Triton as this room uses it: one `jit` whose kernels are compiled for CUDA tensors and interpreted for CPU tensors.

Triton itself decides that once for a whole process, by an environment variable. Here a launch decides by its arguments,
so that a laptop runs every kernel, and one process may interpret a kernel and compile it too. `compiling(90)` makes a
launch compile for that capability, on any machine, and keep what the compiler made. Works with Triton 3.6 to 3.9; the
interpreter of these multiplies the bits of bfloat16 as integers in tl.dot, which is put right here.

Refused: to interpret a kernel for tensors of which some are on a GPU. Source of the names used: triton.runtime.jit and
triton.runtime.interpreter, which are Triton's own and may change; tests/cuda/test_triton_compat.py would see it.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.language import core  # noqa: F401, see _languages
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

OPTIONS = {"enable_fp_fusion": True}  # a * b + c rounded once, as nvcc does; Triton 3.10 changes the default
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
__all__ = ["VERSION", "Compiled", "Kernel", "TensorDescriptor", "compiling", "jit"]


class Compiled(NamedTuple):
    """What a launch would have run: asm holds "ptx", "cubin" and others, metadata shared memory, warps and so on."""

    name: str
    grid: tuple[int, ...]
    kernel: CompiledKernel


class _Compiling(NamedTuple):
    capability: int
    found: list[Compiled]


_compiling: ContextVar[_Compiling | None] = ContextVar("compiling", default=None)
_interpreter = threading.RLock()  # it changes triton.language while it runs


class Kernel(JITFunction):
    """`kernel[grid](*arguments, num_warps=4)`, and inside of other kernels `kernel(...)`, as of triton.jit."""

    def run(self, *args, grid, warmup=False, **kwargs):
        compiling = _compiling.get()
        if compiling is not None:
            return self._compile_only(compiling, grid, args, kwargs)
        devices = {x.device.type for x in _tensors((*args, *kwargs.values()))}
        if devices == {"cuda"}:
            return super().run(*args, grid=grid, warmup=warmup, **(OPTIONS | kwargs))
        if devices != {"cpu"}:
            raise ValueError(f"{self.__name__} of tensors on {' and '.join(sorted(devices))}: expected cuda, or cpu")
        return _interpret(self.fn, grid, args, kwargs)

    def _compile_only(self, compiling: _Compiling, grid, args, kwargs) -> None:
        kwargs = OPTIONS | kwargs
        target = GPUTarget("cuda", compiling.capability, 32)
        backend = make_backend(target)
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **({"debug": False} | kwargs))
        options, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(self, signature, constants, attributes)
        kernel = triton.compile(source, target=target, options=options.__dict__)
        grid = grid(bound) if callable(grid) else grid
        compiling.found.append(Compiled(self.__name__, tuple(grid), kernel))


def jit(fn: Callable | None = None, **options: Any):
    """triton.jit, as a decorator with or without arguments."""
    return Kernel(fn, **options) if fn is not None else lambda fn: Kernel(fn, **options)


@contextmanager
def compiling(capability: int = 90) -> Iterator[list[Compiled]]:
    """Inside, launches run nothing and compile for this capability (90: Hopper, with what sm_90a has). Tensors may be
    on any device, "meta" included; what they would be specialised for on the GPU, they are here."""
    found: list[Compiled] = []
    token = _compiling.set(_Compiling(capability, found))
    try:
        yield found
    finally:
        _compiling.reset(token)


def capability() -> int | None:
    """Of the device that launches are compiled for, inside of `compiling`."""
    compiling = _compiling.get()
    return None if compiling is None else compiling.capability


def _tensors(arguments) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, TensorDescriptor):
            yield x.base


# ---- the interpreter -------------------------------------------------------------------------------------------------


builder = interpreter.interpreter_builder
_true_dot = interpreter.InterpreterBuilder.create_dot


def _languages():  # what is patched are the modules among a function's globals: here tl and core
    pass


def _call_interpreted(kernel: JITFunction, *args, **kwargs):
    """A kernel, or a function of Triton's own library, called by an interpreted kernel."""
    return interpreter.InterpretedFunction(kernel.fn).rewrite()(*args, **kwargs)


def _dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    return _true_dot(builder, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


def _widened(x):
    return builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x


def _interpret(fn: Callable, grid, args, kwargs) -> None:
    with _interpreter:
        scope = interpreter._patch_lang(_languages)
        scope.set_attr(JITFunction, "__call__", _call_interpreted)
        scope.set_attr(interpreter.InterpreterBuilder, "create_dot", _dot)
        scope.set_attr(tl.tensor, "__index__", lambda x: x.handle.data.item())  # 3.6 asks for what numpy gave up
        try:
            parameters = inspect.signature(fn).parameters
            given = {name: value for name, value in kwargs.items() if name in parameters}  # not num_warps and such
            bound = inspect.getcallargs(fn, *args, **given)
            grid = tuple(grid(bound) if callable(grid) else grid)
            constants = {name for name, p in parameters.items() if p.annotation in (tl.constexpr, "tl.constexpr")}
            values = {name: x if name in constants else interpreter._implicit_cvt(x) for name, x in bound.items()}
            interpreted = interpreter.InterpretedFunction(fn).rewrite()
            grid += (1,) * (3 - len(grid))
            builder.set_grid_dim(*grid)
            with np.errstate(all="ignore"):  # a GPU says nothing of overflows either
                for index in np.ndindex(grid):
                    builder.set_grid_idx(*index)
                    interpreted(**values)
        finally:
            scope.restore()
