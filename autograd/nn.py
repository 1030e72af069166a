"""Layers: Module and the usual ones, with torch.nn's names, defaults and state_dict keys.

A Module's parameters are the Parameter attributes it holds, and those of the Modules it holds, in the order in which
they were set. Buffers are Tensors that belong to the state but are not trained (`register_buffer`).
Refuses a state_dict with missing, unexpected or misshapen entries, naming all of them, before any is copied.
"""

import math

import numpy as np

from autograd import functional as F
from autograd.mode import no_grad
from autograd.random import default_generator
from autograd.tensor import Tensor, default_dtype


class Parameter(Tensor):
    """A Tensor that requires grad and that a Module lists among its parameters."""

    __slots__ = ()

    def __init__(self, data, dtype=None, requires_grad: bool = True):
        super().__init__(data.data if isinstance(data, Tensor) else data, dtype, requires_grad)


class Module:
    """Base of all layers: set Parameters and Modules as attributes, write `forward`, call the module."""

    training = True

    def forward(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} has no forward method: expected the subclass to define one")

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def register_buffer(self, name: str, tensor: Tensor) -> None:
        vars(self).setdefault("_buffers", set()).add(name)
        setattr(self, name, tensor)

    def children(self):
        """(name, Module) of the modules that this one holds directly."""
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Module))

    def named_modules(self, prefix: str = ""):
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def modules(self):
        return (module for _, module in self.named_modules())

    def _named_state(self, prefix=""):
        """(name, Tensor) of all parameters and buffers; a tied one appears under each of its names."""
        for name, value in vars(self).items():
            if isinstance(value, Parameter) or name in getattr(self, "_buffers", ()):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value._named_state(f"{prefix}{name}.")

    def named_parameters(self):
        """(name, Parameter); a parameter held twice (tied weights) appears once, under its first name."""
        seen = set()
        for name, value in self._named_state():
            if isinstance(value, Parameter) and id(value) not in seen:
                seen.add(id(value))
                yield name, value

    def parameters(self):
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and buffers by name."""
        return {name: value.data.copy() for name, value in self._named_state()}

    def load_state_dict(self, state: dict, strict: bool = True) -> None:
        """Copies arrays (or Tensors) into the parameters and buffers of the same names.

        Raises ValueError naming every missing, unexpected (unless strict=False) and misshapen entry; nothing is
        copied then.
        """
        own = dict(self._named_state())
        state = {name: value.data if isinstance(value, Tensor) else np.asarray(value) for name, value in state.items()}
        problems = []
        if strict:
            problems += [f"missing {name}" for name in own if name not in state]
            problems += [f"unexpected {name}" for name in state if name not in own]
        for name, value in state.items():
            if name in own and own[name].shape != value.shape:
                problems.append(f"{name} has shape {value.shape}, expected {own[name].shape}")
        if problems:
            raise ValueError(f"state_dict does not fit {type(self).__name__}: " + "; ".join(problems))
        with no_grad():
            for name, value in state.items():
                if name in own:
                    own[name].copy_(value)

    def train(self, mode: bool = True) -> "Module":
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> "Module":
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "Module":
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def __repr__(self):
        lines = [f"  ({name}): " + repr(child).replace("\n", "\n  ") for name, child in self.children()]
        return f"{type(self).__name__}({self.extra_repr()}" + ("\n" + "\n".join(lines) + "\n" if lines else "") + ")"

    def extra_repr(self) -> str:
        return ""


class ModuleList(Module):
    """Modules in order, named by their position."""

    def __init__(self, modules=()):
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> "ModuleList":
        setattr(self, str(len(self)), module)
        return self

    def __len__(self):
        return sum(1 for _ in self.children())

    def __iter__(self):
        return (module for _, module in self.children())

    def __getitem__(self, index: int):
        return list(self)[index]


class Sequential(ModuleList):
    """Modules applied one after another."""

    def __init__(self, *modules):
        super().__init__(modules)

    def forward(self, x):
        for module in self:
            x = module(x)
        return x


def _uniform(shape, bound, dtype):
    return Parameter(default_generator().uniform(-bound, bound, shape).astype(dtype))


class Linear(Module):
    """x (..., in) -> x Wᵀ + b (..., out); weight (out, in) and bias (out) uniform in ±1/sqrt(in), as torch's."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype=default_dtype):
        if in_features < 1 or out_features < 1:
            raise ValueError(f"Linear({in_features}, {out_features}): expected at least one feature on each side")
        bound = 1 / math.sqrt(in_features)
        self.weight = _uniform((out_features, in_features), bound, dtype)
        self.bias = _uniform((out_features,), bound, dtype) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self):
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}"


class Embedding(Module):
    """Indices (...) -> rows of weight (num_embeddings, embedding_dim), which starts as N(0, 1)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype=default_dtype):
        weight = default_generator().standard_normal((num_embeddings, embedding_dim))
        self.weight = Parameter(weight.astype(dtype))

    def forward(self, indices):
        return F.embedding(indices, self.weight)

    def extra_repr(self):
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class LayerNorm(Module):
    """Normalises the last dimensions to mean 0, variance 1, then scales and shifts; see functional.layer_norm."""

    def __init__(self, normalized_shape, eps: float = 1e-5, bias: bool = True, dtype=default_dtype):
        self.normalized_shape, self.eps = normalized_shape, eps
        self.weight = Parameter(np.ones(normalized_shape, dtype))
        self.bias = Parameter(np.zeros(normalized_shape, dtype)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self):
        return f"{self.normalized_shape}, eps={self.eps}"


class RMSNorm(Module):
    """Divides the last dimensions by their root mean square, then scales; see functional.rms_norm."""

    def __init__(
        self, normalized_shape, eps: float | None = None, elementwise_affine: bool = True, dtype=default_dtype
    ):
        self.normalized_shape, self.eps = normalized_shape, eps
        self.weight = Parameter(np.ones(normalized_shape, dtype)) if elementwise_affine else None

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self):
        return f"{self.normalized_shape}, eps={self.eps}"


class Conv2d(Module):
    """Images (B, C, H, W) -> (B, D, H', W'); weight (D, C / groups, kh, kw) uniform in ±1/sqrt(fan_in), as torch's."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        dtype=default_dtype,
    ):
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"Conv2d({in_channels}, {out_channels}): groups {groups} must divide both channel counts")
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        shape = (out_channels, in_channels // groups, *kernel)
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        self.weight = _uniform(shape, bound, dtype)
        self.bias = _uniform((out_channels,), bound, dtype) if bias else None

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self):
        return f"{self.weight.shape[1] * self.groups}, {self.weight.shape[0]}, kernel_size={self.weight.shape[2:]}"


class Dropout(Module):
    """Zeroes elements with probability p while training."""

    def __init__(self, p: float = 0.5):
        if not 0 <= p <= 1:
            raise ValueError(f"Dropout: p {p}: expected a probability")
        self.p = p

    def forward(self, x):
        return F.dropout(x, self.p, self.training)

    def extra_repr(self):
        return f"p={self.p}"
