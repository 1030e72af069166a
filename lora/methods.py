"""The ways to fine-tune that lora/finetune.py compares, each a change of a fresh GPT: what is frozen, what is trained.

    full      every parameter          qlora     an adapter beside a base in 4 bits
    lora      an adapter beside it     bd-lora   one with block-diagonal factors, of about as many parameters

Refused: layers that are not there or that blocks do not divide, weights that cannot be quantised, before anything is
trained.
"""

import hashlib
from itertools import chain

import torch
from torch import Tensor, nn

from lora.config import LoraConfig
from lora.finetune_config import FinetuneConfig, Method
from lora.layers import factor_shapes
from lora.lora import add_adapter, check_addition
from lora.qlora import check_base, quantise_base
from lora.targets import adaptable_layers, places_of
from minigpt.model import GPT


def adapter_config(model: GPT, method: Method, config: FinetuneConfig) -> LoraConfig | None:
    """That of the method; none of full fine-tuning. Raises ValueError where the model cannot have it."""
    if method == "full":
        return None
    adapter = config.adapter()
    if method == "bd-lora":
        rank = matched_rank(model, adapter, config.blocks)
        adapter = config.adapter(rank=rank, blocks=config.blocks)
    if method == "qlora":
        check_base(model)
    check_addition(model, adapter, "default")
    return adapter


def adapter_size(model: GPT, config: LoraConfig) -> int:
    """Numbers in the adapter's factors as they are kept, by their shapes alone."""
    layers, total = adaptable_layers(model), 0
    for place in places_of(model, config):
        of_A, of_B = zip(*(factor_shapes(config, place, layers[layer]) for layer in place.layers), strict=True)
        total += of_A[0][0] * of_A[0][1] + sum(rows * columns for rows, columns in of_B)  # one A for the place
    return total


def matched_rank(model: GPT, config: LoraConfig, blocks: int) -> int:
    """The multiple of `blocks` at which a block-diagonal adapter comes nearest to the size of `config`'s.

    With I inputs, O outputs and N blocks a layer has r (I + O) parameters, block-diagonal r (I + O/N) or, cut over its
    inputs, r (I/N + O): linear in r, so one division tells.
    """
    smallest = LoraConfig(rank=blocks, targets=config.targets, blocks=blocks)
    step, wanted = adapter_size(model, smallest), adapter_size(model, config)
    return blocks * max(1, (2 * wanted + step) // (2 * step))


def prepare(model: GPT, method: Method, config: FinetuneConfig) -> LoraConfig | None:
    """Changes a fresh GPT into what the method trains: the parameters that require a gradient."""
    adapter = adapter_config(model, method, config)
    if adapter is None:
        model.to(torch.promote_types(torch.float32, next(model.parameters()).dtype))  # updates are small steps
        model.requires_grad_(True)
        return None
    if method == "qlora":
        quantise_base(model, config.base_format, kernels=config.kernels)
    add_adapter(model, adapter, seed=config.seed)
    return adapter


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are not trained, and all buffers."""
    every = chain(model.named_parameters(), model.named_buffers())
    return {name: x for name, x in every if not x.requires_grad}


def frozen_digest(model: nn.Module) -> str:
    return tensors_digest(frozen(model))


def model_digest(model: nn.Module) -> str:
    """Of all parameters and buffers."""
    return tensors_digest(dict(chain(model.named_parameters(), model.named_buffers())))


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256, in hex, of every tensor: name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())
