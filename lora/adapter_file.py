"""An adapter of a GPT that no family of transformers has, and that PEFT's files have no names for: one file of our own.

adapter.safetensors holds, for each place that the adapter is in, `<layer>.A` and `<layer>.B` in our names
(`blocks.0.attention.query.A`; an A that several layers share stands under each), as they are kept in memory: (rank,
inputs) and (outputs, rank), block-diagonal factors packed. The header's metadata has one text, `about`, an object of
JSON: `adapter` holds the fields of LoraConfig, `model` those of GPTConfig. Refused: another architecture, tensors
missing, unexpected, misshapen or not finite, all of them listed.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.log import atomic_write
from lora.config import LoraConfig
from lora.layers import factor_shapes
from lora.lora import adapter_of, add_adapter, check_addition
from lora.peft_files import save_adapter
from lora.targets import adaptable_layers
from minigpt.checkpoint import check_architecture
from minigpt.hf_config import family_of
from minigpt.model import GPT

FILE = "adapter.safetensors"


def save_anywhere(model: GPT, folder: Path, name: str = "default") -> None:
    """In PEFT's format where the model belongs to a family of transformers and PEFT has such adapters, else in ours."""
    try:
        family_of(model.config)
        save_adapter(model, folder, name)
    except ValueError:
        save_own(model, folder, name)


def save_own(model: GPT, folder: Path, name: str = "default") -> Path:
    """Writes the file, whole or not at all."""
    parts = adapter_of(model, name)
    tensors, config = {}, next(iter(parts.values()))[0].config
    for place, adapters in parts.items():
        for layer, adapter in zip(place.layers, adapters, strict=True):
            tensors[f"{layer}.A"] = adapter.A.detach().clone()
            tensors[f"{layer}.B"] = adapter.B.detach().contiguous()
    about = {"adapter": asdict(config), "model": asdict(model.config)}
    # One text: several would come into the file in an order that safetensors draws anew each time.
    atomic_write(folder / FILE, save(tensors, metadata={"about": json.dumps(about)}))
    return folder / FILE


def load_own(model: GPT, folder: Path, name: str = "default") -> LoraConfig:
    """Adds the adapter of `folder` as the active one; like `add_adapter` it freezes the model."""
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file: expected an adapter that lora.finetune wrote")
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    if "about" not in metadata:
        raise ValueError(f"{path}: no 'about' in its metadata: expected a file of lora.finetune")
    about = json.loads(metadata["about"])
    check_architecture(path, about["model"], asdict(model.config))
    fields = about["adapter"]
    if isinstance(fields["targets"], list):
        fields["targets"] = tuple(fields["targets"])
    config = LoraConfig(**fields)
    _check_tensors(path, model, config, name, tensors)
    add_adapter(model, config, name)
    with torch.no_grad():
        for place, adapters in adapter_of(model, name).items():
            for layer, adapter in zip(place.layers, adapters, strict=True):
                adapter.A.copy_(tensors[f"{layer}.A"])
                adapter.B.copy_(tensors[f"{layer}.B"])
    return config


def _check_tensors(path: Path, model: GPT, config: LoraConfig, name: str, tensors: dict[str, torch.Tensor]) -> None:
    layers, expected = adaptable_layers(model), {}
    for place in check_addition(model, config, name):
        for layer in place.layers:
            expected[f"{layer}.A"], expected[f"{layer}.B"] = factor_shapes(config, place, layers[layer])
    faults = [f"{key} is missing" for key in expected.keys() - tensors.keys()]
    faults += [f"{key} is unexpected" for key in tensors.keys() - expected.keys()]
    for key in expected.keys() & tensors.keys():
        if tuple(tensors[key].shape) != expected[key]:
            faults.append(f"{key} has shape {list(tensors[key].shape)}, expected {list(expected[key])}")
        elif not tensors[key].isfinite().all():
            faults.append(f"{key} holds NaN or infinity")
    if faults:
        raise ValueError(f"{path}: {'; '.join(sorted(faults))}")
