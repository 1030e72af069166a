"""Adapters of a whole GPT (LoRA, Hu et al. 2021): put in, trained, switched, summed, merged, taken out.

    add_adapter(model, LoraConfig(rank=8, targets=("q_proj", "v_proj")))
    optimizer = torch.optim.AdamW(adapter_parameters(model))

The first adapter freezes the model for good, and its layers become those of `lora/layers.py`. Everything that is wrong
is said before the model is touched. Refused: a name that is taken or unknown, changes of a merged model, merging twice,
blocks of block-diagonal factors that a layer cannot have, an adapter of the head where a `loss_fn` would read the
head's weight past it.
"""

import math
import re
from collections.abc import Sequence

import torch
from torch import nn

from lora.config import LoraConfig, is_number
from lora.layers import Adapter, LoraEmbedding, LoraLayer, LoraLinear, new_factors, sizes
from lora.targets import Place, adaptable_layers, places_of
from minigpt.model import GPT


def add_adapter(model: GPT, config: LoraConfig, name: str = "default", seed: int = 0) -> list[Place]:
    """Puts a new adapter into the layers that the config wants and makes it the active one; says where it went.

    Fresh adapters leave the logits as they are: B is zero, of embeddings A. A seed gives the same numbers anywhere.
    """
    places = check_addition(model, config, name)
    if not lora_layers(model):
        model.requires_grad_(False)
    layers, generator = adaptable_layers(model), torch.Generator().manual_seed(seed)
    for place in places:
        A, Bs = new_factors(config, place, [layers[layer] for layer in place.layers], generator)
        for layer, B in zip(place.layers, Bs, strict=True):
            _wrapped(model, layer, place).adapters[name] = Adapter(config, place, A, B)
    activate(model, name)
    return places


def check_addition(model: GPT, config: LoraConfig, name: str) -> list[Place]:
    """The places of the adapter. Raises ValueError for whatever `add_adapter` refuses."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name {name!r}: expected letters, digits, _ and -, and no attribute of a ModuleDict")
    if name in adapter_names(model):
        raise ValueError(f"adapter {name!r} exists: expected another name, or remove it first")
    _check_unmerged(model)
    places = places_of(model, config)
    if config.blocks > 1 and (faults := _block_faults(model, config, places)):
        raise ValueError(f"blocks {config.blocks}: {'; '.join(faults)}")
    if config.tie_head and not (model.config.tied and any(place.layers == ("embedding",) for place in places)):
        raise ValueError("tie_head: expected a GPT whose head is its embedding, and the embedding among the targets")
    if model.loss_fn is not None and any(place.head for place in places):
        raise ValueError(
            "target head of a GPT with a loss_fn: expected none, it reads the head's weight, not its output"
        )
    return places


def _block_faults(model: GPT, config: LoraConfig, places: list[Place]) -> list[str]:
    """What keeps these places from having block-diagonal factors. Ranks are checked by the config."""
    layers, faults = adaptable_layers(model), []
    for place in places:
        names = ", ".join(place.layers)
        if place.embedding:
            faults.append(f"{names} is an embedding: expected linear layers only")
        elif len(place.layers) > 1:  # blocks of their common matrix would cross from one into the next
            faults.append(f"{names} are one matrix, {place.theirs}: expected targets query, key and value instead")
        else:
            inputs, outputs = sizes(layers[names], embedding=False)
            side, size = ("inputs", inputs) if place.row else ("outputs", outputs)
            if size % config.blocks:
                faults.append(f"{names} has {size} {side}: expected a multiple of the number of blocks")
    return faults


def _wrapped(model: GPT, layer: str, place: Place) -> LoraLayer:
    """The layer, after it has become one with room for adapters."""
    module = model.get_submodule(layer)
    if not isinstance(module, LoraLayer):
        module = (LoraEmbedding if place.embedding else LoraLinear)(module).train(module.training)
        model.set_submodule(layer, module)
    return module


def lora_layers(model: GPT) -> dict[str, LoraLayer]:
    """The layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_names(model: GPT) -> list[str]:
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.adapters))


def adapter_of(model: GPT, name: str) -> dict[Place, list[Adapter]]:
    """The adapter's parts: for each place one of each layer, in the order of the place."""
    _check_names(model, [name])
    parts: dict[Place, list[Adapter]] = {}
    for layer in lora_layers(model).values():
        if name in layer.adapters:
            parts.setdefault(layer.adapters[name].place, []).append(layer.adapters[name])
    return parts


def adapter_parameters(model: GPT, name: str | None = None) -> list[nn.Parameter]:
    """Those of one adapter, or of all; an A that several layers share is there once."""
    names = adapter_names(model) if name is None else [name]
    parts = [part for each in names for parts in adapter_of(model, each).values() for part in parts]
    return list(dict.fromkeys(parameter for part in parts for parameter in (part.A, part.B)))


def activate(model: GPT, names: Sequence[str] | str, weights: Sequence[float] | None = None) -> None:
    """From now on the model computes base + the sum of weight * adapter; weights None are ones, no names the base.

    Only active adapters get gradients.
    """
    names = [names] if isinstance(names, str) else list(names)
    _check_names(model, names)
    _check_unmerged(model)
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(set(names)) < len(names) or len(weights) != len(names):
        raise ValueError(f"adapters {names} with weights {weights}: expected each name once, and a weight for each")
    if wrong := [weight for weight in weights if not is_number(weight) or not math.isfinite(weight)]:
        raise ValueError(f"weights {wrong}: expected finite numbers")
    for layer in lora_layers(model).values():
        layer.active = dict(zip(names, weights, strict=True))
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in names)


def active_adapters(model: GPT) -> dict[str, float]:
    """{name: weight}."""
    return dict(next((layer.active for layer in lora_layers(model).values()), {}))


def merge(model: GPT) -> None:
    """Puts the active adapters into the weights, so that a pass costs what it costs without them.

    Each adapted layer keeps a copy of its weight until `unmerge`. The logits change by the rounding of the weights.
    """
    _check_unmerged(model)
    if not active_adapters(model):
        raise ValueError("merge without an active adapter: expected one, see activate")
    layers = lora_layers(model)
    if whole := [name for name, layer in layers.items() if not layer.weight.dtype.is_floating_point]:
        raise ValueError(
            f"merge into quantised {', '.join(whole)}: expected dequantise_base of lora/qlora.py before it"
        )
    for layer in layers.values():
        layer.merge()


def unmerge(model: GPT) -> None:
    """The weights are again, bit for bit, what they were before `merge`."""
    if not _merged(model):
        raise ValueError("unmerge: expected a merged model")
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove(model: GPT, name: str) -> None:
    """Takes the adapter out; a layer without any becomes again the plain one that it was, frozen."""
    _check_names(model, [name])
    _check_unmerged(model)
    for path, layer in lora_layers(model).items():
        layer.active.pop(name, None)
        if name in layer.adapters:
            del layer.adapters[name]
        if not layer.adapters:
            model.set_submodule(path, layer.base)


def fold(model: GPT) -> None:
    """Merges the active adapters and takes all of them out: what stays is a plain GPT, to save and to serve.

    Raises ValueError for an adapter of a tied embedding without tie_head: a plain GPT has one matrix for both.
    """
    tied = model.config.tied and isinstance(model.embedding, LoraEmbedding)
    if tied and not all(adapter.config.tie_head for adapter, _ in model.embedding.chosen()):
        raise ValueError("fold of an adapter of a tied embedding: expected one with tie_head, see LoraConfig")
    if not _merged(model):
        merge(model)
    for path, layer in lora_layers(model).items():
        model.set_submodule(path, layer.base)


def _merged(model: GPT) -> bool:
    return any(layer.kept is not None for layer in lora_layers(model).values())


def _check_unmerged(model: GPT) -> None:
    if _merged(model):
        raise ValueError(f"adapters {list(active_adapters(model))} are merged: expected unmerge first")


def _check_names(model: GPT, names: list[str]) -> None:
    if unknown := [name for name in names if name not in (known := adapter_names(model))]:
        raise ValueError(f"adapters {unknown} are unknown: expected some of {known}")
