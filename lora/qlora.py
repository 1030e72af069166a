"""QLoRA (Dettmers et al. 2023): a GPT whose blocks stand on 4 or 8 bits a weight, to be trained by adapters.

    quantise_base(model, "nf4-double")             # before there are adapters
    add_adapter(model, LoraConfig(rank=8))
    optimizer = AdamW8bit(adapter_parameters(model), paged=True)
    ...
    dequantise_base(model)                         # floating point again, so that adapters can go into the weights
    fold(model)

All linear layers of the blocks become QuantisedLinear; embeddings, the head and norms stay as they are.
Refused, before anything is changed: a model with adapters or with quantised layers, layers of the blocks other than
nn.Linear, weights that are not finite, unknown formats. What it all takes in bytes: `python -m lora.memory`.
"""

import torch
from torch import nn

from lora import integers, nf4
from lora.layers import LoraLayer
from lora.quantised import Format, Kernels, QuantisedLinear
from lora.targets import LINEAR, kind_of
from minigpt.model import GPT


def quantise_base(
    model: GPT, format: Format = "nf4-double", *, kernels: Kernels = "torch", block: int = nf4.BLOCK,
    group: int = integers.GROUP, asymmetric: bool = False,
) -> list[str]:  # fmt: skip
    """Quantises the layers in place, one after another, freezes the model for good, and returns the layers' names.

    A state_dict of such a model fits one that was quantised in the same way.
    """
    options = {"block": block, "group": group, "asymmetric": asymmetric, "kernels": kernels}
    QuantisedLinear(0, 0, format, **options)  # says what is wrong with them
    layers = check_base(model)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, QuantisedLinear.from_linear(layer, format, name=name, **options))
    return list(layers)


def check_base(model: GPT) -> dict[str, nn.Linear]:
    """The linear layers of the blocks, by name. Raises ValueError where one is something else by now, or its weight is
    not finite or of a type that is not quantised."""
    found = {name: module for name, module in model.blocks.named_modules(prefix="blocks") if kind_of(name) in LINEAR}
    for kind, what in ((QuantisedLinear, "is quantised already"), (LoraLayer, "has an adapter")):
        if wrong := [name for name, module in model.named_modules() if isinstance(module, kind)]:
            raise ValueError(f"{wrong[0]} {what}: expected quantise_base on a plain GPT, once and before add_adapter")
    if wrong := [name for name, module in found.items() if type(module) is not nn.Linear]:
        raise ValueError(f"{wrong[0]} is {type(found[wrong[0]]).__name__}: expected nn.Linear")
    for name, layer in found.items():
        nf4.check_weight(f"{name}.weight", layer.weight)
    return found


def dequantise_base(model: GPT, dtype: torch.dtype = torch.float32) -> list[str]:
    """Writes the quantised weights out as frozen nn.Linear layers of `dtype`, in place; returns the layers' names.

    The logits stay what they are by kernels="torch" as long as passes have that dtype. Adapters stay, and can now be
    merged and folded: the sum of B A and the dequantised weight, which no longer fits into the 4 bits.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype}: expected a floating point type")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    if not layers:
        raise ValueError("dequantise_base of a model without quantised layers: expected quantise_base before it")
    for name, layer in layers.items():
        model.set_submodule(name, _linear(layer, dtype))
    return list(layers)


def _linear(layer: QuantisedLinear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.dequantised(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return linear.train(layer.training)
