"""The Tensor: a numpy array that knows its place in a graph, and whose writes are counted.

Holds the Tensor class without its operations (`methods.py` attaches those) and with its in-place writes.
Refuses dtypes other than float32, float64, integers and bool; gradients of anything but floats; writes that the graph
could not follow.
"""

import numpy as np

from autograd.mode import mode

ndarray = np.ndarray
DTYPES = {np.dtype(t) for t in (np.float32, np.float64, np.int8, np.uint8, np.int16, np.int32, np.int64, np.bool_)}
default_dtype = np.dtype(np.float32)

_new = object.__new__


def constant(data) -> "Tensor":
    """A Tensor around an array, without copy, check or graph: the inside door, for results of numpy calls."""
    out = _new(Tensor)
    out.data = data if type(data) is ndarray else np.asarray(data)
    out.grad = out._node = out._hooks = None
    out.requires_grad = False
    out._version = [0, None, None]  # writes so far, the last writer, weak references to all that share the memory
    return out


class Tensor:
    """A numpy array with a gradient.

    data           array-like; Python floats become float32, as in torch; a numpy array keeps its dtype and its memory
    requires_grad  whether gradients are collected here (floating dtypes only)
    grad           None, or a Tensor of the same shape and dtype once `backward` reached this leaf

    `data` is the raw array: writing to it directly goes past the version counter, as `.data` does in torch. Use the
    in-place methods (`add_`, `mul_`, `copy_`, `x[i] = v`, `x += v`), whose writes are seen.
    """

    __slots__ = ("__weakref__", "_hooks", "_node", "_version", "data", "grad", "requires_grad")
    __array_ufunc__ = None  # numpy_array * tensor asks Tensor.__rmul__, not numpy

    def __init__(self, data, dtype=None, requires_grad: bool = False):
        if isinstance(data, Tensor):
            raise ValueError("Tensor(data): data is a Tensor already; use detach() or clone()")
        array = np.asarray(data, dtype=dtype)
        if dtype is None and array.dtype == np.float64 and not isinstance(data, ndarray | np.generic):
            array = array.astype(default_dtype)
        if array.dtype not in DTYPES:
            raise ValueError(f"Tensor of dtype {array.dtype}: expected float32, float64, an integer type or bool")
        if requires_grad and array.dtype.kind != "f":
            raise ValueError(
                f"requires_grad on a tensor of dtype {array.dtype}: only float32 and float64 have gradients"
            )
        self.data = array
        self.grad = self._node = self._hooks = None
        self.requires_grad = bool(requires_grad)
        self._version = [0, None, None]

    # -- what it is --
    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def is_leaf(self) -> bool:
        return self._node is None

    def size(self, dim: int | None = None):
        return self.data.shape if dim is None else self.data.shape[dim]

    def dim(self) -> int:
        return self.data.ndim

    def numel(self) -> int:
        return self.data.size

    def is_floating_point(self) -> bool:
        return self.data.dtype.kind == "f"

    def numpy(self) -> ndarray:
        """The values as a read-only view: a write here could not be seen by the graph."""
        view = self.data.view()
        view.flags.writeable = False
        return view

    def __array__(self, dtype=None, copy=None):
        return np.array(self.data, dtype=dtype) if copy or dtype not in (None, self.dtype) else self.numpy()

    def item(self):
        if self.data.size != 1:
            raise ValueError(f"item() of a tensor of shape {self.shape}: expected one element")
        return self.data.item()

    def tolist(self):
        return self.data.tolist()

    __float__ = lambda self: float(self.item())  # noqa: E731
    __int__ = lambda self: int(self.item())  # noqa: E731
    __index__ = lambda self: self.data.__index__()  # noqa: E731
    __hash__ = object.__hash__

    def __bool__(self):
        return bool(self.item())

    def __len__(self):
        if not self.data.ndim:
            raise TypeError("len() of a tensor without dimensions")
        return len(self.data)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        text = np.array2string(self.data, prefix="Tensor(", separator=", ")
        how = f", op={self._node.op}" if self._node else ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({text}, dtype={self.dtype}{how})"

    # -- its place in the graph --
    def detach(self) -> "Tensor":
        """The same values (and memory) without history."""
        out = constant(self.data)
        out._version = self._version
        return out

    def requires_grad_(self, requires_grad: bool = True) -> "Tensor":
        if requires_grad and self.dtype.kind != "f":
            raise ValueError(
                f"requires_grad on a tensor of dtype {self.dtype}: only float32 and float64 have gradients"
            )
        if not requires_grad and self._node:
            raise RuntimeError("requires_grad_(False) on a result of the graph: use detach()")
        self.requires_grad = bool(requires_grad)
        return self

    def register_hook(self, hook):
        """`hook(gradient)` is called once a backward pass knows the whole gradient of this tensor; a Tensor that it
        returns takes the gradient's place. Returns a function that removes the hook."""
        if not self.requires_grad:
            raise RuntimeError("register_hook on a tensor that does not require grad: it would never be called")
        vertex, slot = (self._node, "hooks") if self._node else (self, "_hooks")
        if getattr(vertex, slot) is None:
            setattr(vertex, slot, {})
        hooks, key = getattr(vertex, slot), object()
        hooks[key] = hook
        return lambda: hooks.pop(key, None)

    def retain_grad(self) -> None:
        """Keep `.grad` on a result of the graph too."""

        def keep(gradient):
            self.grad = gradient if self.grad is None else self.grad + gradient

        if self._node:
            self.register_hook(keep)

    # -- writes in place: each counts in the version, so that a backward rule that needed the old value says so --
    def _write(self, name, value, update, operation):
        """`update(array)` changes self.data; `operation(old, value)` is the same change as a recorded operation."""
        if mode.grad and (self.requires_grad or (isinstance(value, Tensor) and value.requires_grad)):
            self._recorded_write(name, value, operation)
        else:
            try:
                update(value.data if isinstance(value, Tensor) else value)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{name} on a tensor of shape {self.shape} {self.dtype}: {error}") from None
        self._version[0] += 1
        self._version[1] = name
        return self

    def _recorded_write(self, name, value, operation):
        if self.requires_grad and self._node is None:
            raise RuntimeError(f"{name} on a leaf that requires grad: write under no_grad(), or to a clone()")
        if any((other := r()) is not None and other is not self for r in self._version[2] or ()):
            raise RuntimeError(
                f"{name} on a tensor of shape {self.shape} that shares memory with another tensor (it is a view, or "
                f"has one): the graph does not follow writes through views; write to a clone()"
            )
        old = constant(self.data.copy())  # rules that need the old value keep it
        old.requires_grad, old._node = self.requires_grad, self._node
        result = operation(old, old if value is self else value)
        if result.shape != self.shape or result.dtype != self.dtype:
            raise ValueError(f"{name}: a result {result.shape} {result.dtype} does not fit {self.shape} {self.dtype}")
        self.data[...] = result.data
        self.requires_grad, self._node = result.requires_grad, result._node

    def add_(self, other, alpha=1):
        return self._write(
            "add_", other, lambda array: self.data.__iadd__(array * alpha), lambda old, other: old + other * alpha
        )

    def sub_(self, other, alpha=1):
        return self.add_(other, -alpha)

    def mul_(self, other):
        return self._write("mul_", other, self.data.__imul__, lambda old, other: old * other)

    def div_(self, other):
        return self._write("div_", other, self.data.__itruediv__, lambda old, other: old / other)

    def __iadd__(self, other):
        return self.add_(other)

    def __isub__(self, other):
        return self.sub_(other)

    def __imul__(self, other):
        return self.mul_(other)

    def __itruediv__(self, other):
        return self.div_(other)

    def copy_(self, source):
        return self._write(
            "copy_",
            source,
            lambda array: np.copyto(self.data, array, casting="same_kind"),
            lambda old, source: as_tensor(source).to(old.dtype).expand(old.shape),
        )

    def fill_(self, value):
        return self._write(
            "fill_", value, self.data.fill, lambda old, value: as_tensor(value).to(old.dtype).expand(old.shape)
        )

    def zero_(self):
        return self.fill_(0)


def as_tensor(value, like: Tensor | None = None) -> Tensor:
    """value as a Tensor; a number takes the dtype of `like`, unless it is of a higher kind (bool < integer < float)."""
    if isinstance(value, Tensor):
        return value
    if like is not None and isinstance(value, float | int | np.generic):
        kind, dtype = _kind(value), like.data.dtype
        if kind > "biuf".index(dtype.kind):
            dtype = default_dtype if kind == 3 else np.dtype(np.int64)
        return constant(np.array(value, dtype))
    return Tensor(value)


def _kind(number) -> int:
    """0 for a bool, 1 for an integer, 3 for a float: the place in "biuf", numpy's letters for kinds of dtype."""
    if isinstance(number, bool | np.bool_):
        return 0
    return 1 if isinstance(number, int | np.integer) else 3
