"""A linear layer whose weight is frozen in 4 or 8 bits, and how many bytes that takes: the base of QLoRA.

    layer = QuantisedLinear.from_linear(linear, "nf4-double", name="blocks.0.attention.output")
    y = layer(x)                                   # the gradient goes into x and nowhere else
    predicted_bytes([(4096, 4096)], "nf4-double")  # before there is a matrix

Formats: "nf4" (lora/nf4.py), "nf4-double" with its absmax in 8 bits too, "int8" and "int4" (lora/integers.py). The
product is either by the kernels of stage 3, which read the packed weight ("triton": on CPUs by its interpreter, for
tests), or by torch with the weight written out for one product and freed after it ("torch"). Either way a backward pass
keeps the packed weight alone and unpacks it again.

Refused with a ValueError: what those two files refuse, layers that are not nn.Linear, unknown formats and kernels, x of
another width; by "triton" also float64. load_state_dict refuses the state of another format, block or group.
"""

from collections.abc import Iterable
from math import ceil
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuda import ops
from cuda.quantised_ops import NESTED_BLOCK
from lora import integers, nf4

Format = Literal["nf4", "nf4-double", "int8", "int4"]
Kernels = Literal["triton", "torch"]


class QuantisedLinear(nn.Module):
    """x (.., in) -> x W' + bias (.., out), in the type of x; under autocast in its type. All tensors are buffers.

    `block` is that of NF4, `group` and `asymmetric` are those of int4. Made without a weight it is a layer of zeros,
    to be filled by load_state_dict. To another type only the bias goes: the quantised weight stays as it is.
    """

    def __init__(
        self, in_features: int, out_features: int, format: Format = "nf4", *, bias: bool = False,
        block: int = nf4.BLOCK, group: int = integers.GROUP, asymmetric: bool = False, kernels: Kernels = "torch",
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ):  # fmt: skip
        super().__init__()
        _check_options(format, block, group)
        _check_shape((out_features, in_features))
        if kernels not in get_args(Kernels):
            raise ValueError(f"kernels {kernels!r}: expected one of {', '.join(get_args(Kernels))}")
        self.in_features, self.out_features, self.format, self.kernels = in_features, out_features, format, kernels
        self.block, self.group, self.asymmetric = block, group, asymmetric
        for name, (shape, kind) in _layout(out_features, in_features, format, block, group, asymmetric).items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        for name, values in _constants(format).items():
            self.register_buffer(name, values.to(self.packed.device, copy=True), persistent=False)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: Format = "nf4", *, name: str = "", block: int = nf4.BLOCK,
        group: int = integers.GROUP, asymmetric: bool = False, kernels: Kernels = "torch",
    ) -> Self:  # fmt: skip
        """Its weight quantised, its bias copied. `name` is that of the layer, for messages."""
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name or 'layer'} is {type(linear).__name__}: expected nn.Linear")
        weight, bias = linear.weight.detach(), linear.bias
        layer = cls(
            linear.in_features, linear.out_features, format, bias=bias is not None, block=block, group=group,
            asymmetric=asymmetric, kernels=kernels, dtype=None if bias is None else bias.dtype, device=weight.device,
        )  # fmt: skip
        quantised = _quantise(weight, format, block, group, asymmetric, f"{name}.weight" if name else "weight")
        for key, x in quantised.items():
            layer.register_buffer(key, x)
        if bias is not None:
            layer.bias.copy_(bias.detach())
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected (.., {self.in_features})")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product.apply(x, bias, self) if self.kernels == "torch" else self._by_kernels(x, bias)

    def _by_kernels(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.format == "int8":
            return ops.int8_matmul(x, self.packed, self.scales, bias=bias)
        if self.format == "int4":
            return ops.int4_matmul(x, self.packed, self.scales, self._zeros(), group=self.group, bias=bias)
        shape = self.out_features, self.in_features
        return ops.nf4_matmul(x, self.packed, self.absmax, shape, block=self.block, bias=bias, **self._second())

    @property
    def weight(self) -> Tensor:
        """The packed bytes: where the layer is, and that its weight is no floating point one."""
        return self.packed

    def _zeros(self) -> Tensor | None:
        return self.zeros if self.asymmetric else None

    def _second(self) -> dict[str, Tensor]:
        names = ("absmax2", "offset", "code") if self.format == "nf4-double" else ()
        return {name: getattr(self, name) for name in names}

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (out, in), products in float32, rounded to `dtype`."""
        if self.format == "int8":
            return integers.dequantise_int8(integers.Int8Matrix(self.packed, self.scales), dtype)
        if self.format == "int4":
            q = integers.Int4Matrix(self.packed, self.scales, self._zeros(), self.in_features, self.group)
            return integers.dequantise_int4(q, dtype)
        shape = self.out_features, self.in_features
        q = nf4.NF4Tensor(self.packed, self.absmax, shape, self.block, **self._second())
        return nf4.dequantise_nf4(q, dtype, table=self.table)

    def memory_bytes(self) -> int:
        """Of all tensors that the layer holds, its bias and its constants among them."""
        return sum(x.numel() * x.element_size() for x in self.buffers())

    def extra_repr(self) -> str:
        sizes = {"int8": "", "int4": f", group={self.group}, asymmetric={self.asymmetric}"}
        more = sizes.get(self.format, f", block={self.block}")
        return f"{self.in_features}, {self.out_features}, {self.format!r}{more}, bias={self.bias is not None}"

    def _apply(self, fn, recurse: bool = True) -> Self:
        before = {name: x.dtype for name, x in self.named_buffers() if name != "bias"}
        old = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, dtype in before.items():  # .bfloat16() of a model is no reason to round the scales
            if self._buffers[name].dtype != dtype:
                self._buffers[name] = old[name].to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors) -> None:
        for name, x in self.named_buffers():
            given = state.get(prefix + name, x)
            if name != "bias" and given.dtype != x.dtype:  # torch would convert it
                errors.append(f"{prefix}{name} is {given.dtype}: expected {x.dtype}, as {self.format} has it")
                return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


class _Product(torch.autograd.Function):
    """F.linear with the layer's weight, which is written out twice and kept for neither: nn.Linear's own backward would
    hold on to a matrix in 16 or 32 bits from the forward pass on."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*layer.buffers())
        return F.linear(x, layer.dequantised(x.dtype), bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        _ = ctx.saved_tensors  # raises where a buffer was changed in between
        return dy @ ctx.layer.dequantised(dy.dtype), None, None


# ---- what the formats consist of -------------------------------------------------------------------------------------


def _check_options(format: str, block: int, group: int) -> None:
    if format not in get_args(Format):
        raise ValueError(f"format {format!r}: expected one of {', '.join(get_args(Format))}")
    nf4.check_block(block)
    integers.check_group(group)


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"shape {tuple(shape)}: expected two dimensions, (out, in)")


def _layout(rows: int, columns: int, format: Format, block: int, group: int, asymmetric: bool) -> dict[str, tuple]:
    """{name: (shape, type)} of a matrix (rows, columns)."""
    if format == "int8":
        return {"packed": ((rows, columns), torch.int8), "scales": ((rows,), torch.float32)}
    if format == "int4":
        groups = rows, ceil(columns / group)
        zeros = {"zeros": (groups, torch.uint8)} if asymmetric else {}
        return {"packed": ((rows, ceil(columns / 2)), torch.uint8), "scales": (groups, torch.float32)} | zeros
    packed, blocks = ceil(rows * columns / 2), ceil(rows * columns / block)
    if format == "nf4":
        return {"packed": ((packed,), torch.uint8), "absmax": ((blocks,), torch.float32)}
    second = {"absmax2": ((ceil(blocks / NESTED_BLOCK),), torch.float32), "offset": ((), torch.float32)}
    return {"packed": ((packed,), torch.uint8), "absmax": ((blocks,), torch.uint8)} | second


def _constants(format: Format) -> dict[str, Tensor]:
    """Tables that each layer carries, so that they are where it is."""
    table = {"table": nf4.nf4_codes()} if format.startswith("nf4") else {}
    return table | ({"code": nf4.dynamic_codes()} if format == "nf4-double" else {})


def _quantise(w: Tensor, format: Format, block: int, group: int, asymmetric: bool, name: str) -> dict[str, Tensor]:
    if format == "int8":
        q = integers.quantise_int8(w, name=name)
        return {"packed": q.packed, "scales": q.scales}
    if format == "int4":
        q = integers.quantise_int4(w, group, asymmetric=asymmetric, name=name)
        return {"packed": q.packed, "scales": q.scales} | ({"zeros": q.zeros} if asymmetric else {})
    q = nf4.quantise_nf4(w, block, double=format == "nf4-double", name=name)
    second = {"absmax2": q.absmax2, "offset": q.offset} if format == "nf4-double" else {}
    return {"packed": q.packed, "absmax": q.absmax} | second


# ---- memory ----------------------------------------------------------------------------------------------------------


def bits_per_weight(
    format: Format, *, columns: int, block: int = nf4.BLOCK, group: int = integers.GROUP, asymmetric: bool = False
) -> float:
    """Of a large matrix with rows of `columns`: 4.5 for nf4 and 4.127 for nf4-double in blocks of 64, 4.25 for int4 in
    groups of 128, 8 and a scale a row for int8. Tables and what rows and blocks cut short waste are not in it."""
    _check_options(format, block, group)
    if columns < 1:
        raise ValueError(f"columns {columns}: expected at least 1")
    return {
        "nf4": 4 + 32 / block,
        "nf4-double": 4 + 8 / block + 32 / (block * NESTED_BLOCK),
        "int8": 8 + 32 / columns,
        "int4": 4 + (40 if asymmetric else 32) / group,
    }[format]


def predicted_bytes(
    model_or_shapes: nn.Module | Iterable[tuple[int, int]], format: Format, *, block: int = nf4.BLOCK,
    group: int = integers.GROUP, asymmetric: bool = False,
) -> int:  # fmt: skip
    """What the memory_bytes() of quantised layers add up to, to the byte: of matrices (out, in) without biases, or of
    all nn.Linear in a model, with theirs."""
    _check_options(format, block, group)
    shapes, biases = model_or_shapes, 0
    if isinstance(model_or_shapes, nn.Module):
        layers = [layer for layer in model_or_shapes.modules() if isinstance(layer, nn.Linear)]
        shapes = [(layer.out_features, layer.in_features) for layer in layers]
        biases = sum(x.numel() * x.element_size() for x in (layer.bias for layer in layers) if x is not None)
    return biases + sum(_bytes_of(shape, format, block, group, 5 if asymmetric else 4) for shape in shapes)


def _bytes_of(shape: tuple[int, int], format: Format, block: int, group: int, per_group: int) -> int:
    _check_shape(shape)
    rows, columns = shape
    blocks = ceil(rows * columns / block)
    return {
        "nf4": ceil(rows * columns / 2) + 4 * blocks + 64,  # of the table of 16 codes
        "nf4-double": ceil(rows * columns / 2) + blocks + 4 * ceil(blocks / NESTED_BLOCK) + 4 + 64 + 1024,
        "int8": rows * columns + 4 * rows,
        "int4": rows * (ceil(columns / 2) + per_group * ceil(columns / group)),
    }[format]
