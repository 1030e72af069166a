"""Triton as this room uses it: one `jit` whose kernels are compiled for CUDA tensors and interpreted for CPU tensors.

Triton itself decides that once for a whole process, by an environment variable. Here a launch decides by its arguments,
so that a laptop runs every kernel, and one process may interpret a kernel and compile it too. `compiling(90)` makes a
launch compile for that capability, on any machine, and keep what the compiler made. Works with Triton 3.6 to 3.9, whose
interpreter is put right in three places: it multiplies the bits of bfloat16 as integers in tl.dot, cuts float32 off
where it becomes bfloat16, which a GPU rounds, and rounds wrongly to float8.

Refused: to interpret a kernel for tensors of which some are on a GPU, keywords that are neither arguments nor options,
the environment variable. Source of the names used: triton.runtime.jit and triton.runtime.interpreter, which are
Triton's own and may change; tests/cuda/test_triton_compat.py would see it.
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDAOptions
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler.code_generator import ast_to_ttir  # noqa: F401, which keeps tl.minimum as it finds it: not patched
from triton.language import core  # noqa: F401, see _languages
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

OPTIONS = {"enable_fp_fusion": True}  # a * b + c rounded once, as nvcc does; Triton 3.10 changes the default
if triton.knobs.runtime.interpret:  # then tl.sum and the like are no functions that a kernel could be compiled with
    raise RuntimeError("TRITON_INTERPRET is set: expected it unset, CPU tensors are interpreted without it")


class Compiled(NamedTuple):
    """What a launch would have run: asm holds "ptx", "cubin" and others, metadata shared memory, warps and so on."""

    name: str
    grid: tuple[int, ...]
    kernel: CompiledKernel


class _Compiling(NamedTuple):
    capability: int
    found: list[Compiled]


_compiling: ContextVar[_Compiling | None] = ContextVar("compiling", default=None)
_language = threading.RLock()  # the interpreter changes triton.language while it runs, the compiler reads it


class Kernel(JITFunction):
    """`kernel[grid](*arguments, num_warps=4)`, and inside of other kernels `kernel(...)`, as of triton.jit."""

    def run(self, *args, grid, warmup=False, **kwargs):
        compiling = _compiling.get()
        if compiling is not None:
            return self._compile_only(compiling, grid, args, kwargs)
        first = next(tensors_of(args), None)
        if first is not None and first.is_cuda:  # not all are looked at: microseconds count, and Triton refuses others
            with _language:
                return super().run(*args, grid=grid, warmup=warmup, **(OPTIONS | kwargs))
        devices = {x.device.type for x in tensors_of((*args, *kwargs.values()))}
        if devices != {"cpu"}:
            raise ValueError(f"{self.__name__} of tensors on {' and '.join(sorted(devices))}: expected cuda, or cpu")
        return _interpret(self, grid, args, kwargs)

    def _compile_only(self, compiling: _Compiling, grid, args, kwargs) -> None:
        kwargs = OPTIONS | kwargs
        target = GPUTarget("cuda", compiling.capability, 32)
        backend = make_backend(target)
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **({"debug": False} | kwargs))
        options, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(self, signature, constants, attributes)
        with _language:
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


def tensors_of(arguments: Iterable) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, tuple | list):
            yield from tensors_of(x)
        elif isinstance(x, Tensor):
            yield x
        elif isinstance(x, TensorDescriptor):
            yield x.base


# ---- the interpreter -------------------------------------------------------------------------------------------------


# What goes round each interpreted launch: (name, arguments) -> context manager. triton_check.py sets it.
watch: ContextVar[Callable[[str, Iterable], AbstractContextManager]]
watch = ContextVar("watch", default=lambda *_: nullcontext())
# Tensors that kernels find by addresses in a table, for those who watch.
_behind_tables: ContextVar[tuple] = ContextVar("behind_tables", default=())

builder = interpreter.interpreter_builder
_dot, _cast, _convert = (getattr(type(builder), name) for name in ("create_dot", "cast_impl", "create_fp_to_fp"))
# Types whose elements the interpreter has as bits, in integers.
BITS = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def _languages():  # what is patched are the modules among a function's globals: here tl and core
    pass


@cache
def _rewritten(fn: Callable) -> Callable:
    return interpreter.InterpretedFunction(fn).rewrite()


def _call_interpreted(kernel: JITFunction, *args, **kwargs):
    """A kernel, or a function of Triton's own library, called by an interpreted kernel."""
    return _rewritten(kernel.fn)(*args, **kwargs)


def _dot_of_floats(builder, a, b, d, *options):
    a, b = (_cast_by_torch(builder, x, tl.float32) if x.dtype.scalar in BITS else x for x in (a, b))
    return _dot(builder, a, b, d, *options)


def _cast_by_torch(builder, x, dtype):
    """Rounded to nearest, and to float8 at most to its largest number, as a GPU does."""
    source, target = x.dtype.scalar, dtype.scalar
    if source not in BITS and target not in BITS:
        return _cast(builder, x, dtype)
    y = torch.from_numpy(np.array(x.data))
    if source in BITS:
        y = y.view(BITS[source]).float()
    if target not in BITS:
        return interpreter.TensorHandle(y.numpy().astype(interpreter._get_np_dtype(target)), target)
    if BITS[target].itemsize == 1:
        y = y.float().clamp(-torch.finfo(BITS[target]).max, torch.finfo(BITS[target]).max)
    bits = torch.uint16 if BITS[target].itemsize == 2 else torch.uint8
    return interpreter.TensorHandle(y.to(BITS[target]).view(bits).numpy(), target)


def _convert_by_torch(builder, x, dtype, rounding):
    towards_zero = rounding is not None and rounding != interpreter._ir.ROUNDING_MODE.RTNE
    return _convert(builder, x, dtype, rounding) if towards_zero else _cast_by_torch(builder, x, dtype)


def _value(x):
    """What a kernel gets for an argument. Numbers are float32, as on a GPU; 3.6 does not know what a bool is."""
    for of_python, of_numpy, dtype in ((float, np.float32, tl.float32), (bool, np.bool_, tl.int1)):
        if isinstance(x, of_python):
            return tl.tensor(interpreter.TensorHandle(np.array([x], dtype=of_numpy), dtype), dtype)
    return interpreter._implicit_cvt(x)


def _bound(fn: Callable, args, kwargs) -> dict[str, Any]:
    """Arguments by name, without the options of the compiler."""
    parameters = inspect.signature(fn).parameters
    unknown = kwargs.keys() - parameters.keys() - CUDAOptions.__dataclass_fields__.keys()
    if unknown:
        expected = f"one of {', '.join(parameters)}, or an option of the compiler such as num_warps"
        raise ValueError(f"{fn.__name__}: keyword {', '.join(sorted(unknown))}: expected {expected}")
    return inspect.getcallargs(fn, *args, **{name: x for name, x in kwargs.items() if name in parameters})


@contextmanager
def reaching(tensors: Iterable[Tensor] | None) -> Iterator[None]:
    """Inside, launches may also touch these tensors, whose addresses they find in memory."""
    token = _behind_tables.set(tuple(tensors or ()))
    try:
        yield
    finally:
        _behind_tables.reset(token)


def _interpret(kernel: JITFunction, grid, args, kwargs) -> None:
    bound = _bound(kernel.fn, args, kwargs)
    grid = tuple(grid(bound) if callable(grid) else grid)
    grid += (1,) * (3 - len(grid))
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    with _language, _disable_current_modes():  # those are to see what an operation does, not what the interpreter does
        scope = interpreter._patch_lang(_languages)
        try:
            scope.set_attr(JITFunction, "__call__", _call_interpreted)
            scope.set_attr(type(builder), "create_dot", _dot_of_floats)
            scope.set_attr(type(builder), "cast_impl", _cast_by_torch)
            scope.set_attr(type(builder), "create_fp_to_fp", _convert_by_torch)
            scope.set_attr(tl.tensor, "__index__", lambda x: x.handle.data.item())  # 3.6 asks for what numpy gave up
            values = {name: x if name in constants else _value(x) for name, x in bound.items()}
            interpreted = _rewritten(kernel.fn)
            builder.set_grid_dim(*grid)
            watching = watch.get()(kernel.__name__, (*bound.values(), *_behind_tables.get()))
            with watching, np.errstate(all="ignore"):  # a GPU says nothing of overflows either
                for index in np.ndindex(grid):
                    builder.set_grid_idx(*index)
                    interpreted(**values)
        finally:
            scope.restore()
