"""Adapters in the files of Hugging Face's PEFT, both ways: a folder with adapter_config.json and
adapter_model.safetensors.

A key is `base_model.model.<module of transformers>.lora_A.weight` (lora_B; of embeddings lora_embedding_A without
`.weight`). A block-diagonal factor lies there as it does here, packed. Reading finds everything that is wrong before
the model is touched, and lists it. Refused: kinds of adapters other than LoRA and BD-LoRA and options that change what
one computes, each by its name; pickles; on writing, adapters that the format has no place for.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.log import atomic_write
from lora.config import LoraConfig
from lora.layers import Adapter, factor_shapes
from lora.lora import adapter_of, add_adapter, check_addition
from lora.peft_blocks import Blocks
from lora.targets import Place, adaptable_layers
from minigpt.hf import read_json
from minigpt.hf_config import GPT2, family_of
from minigpt.model import GPT

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# Fields that say nothing about what the adapter computes. GPT-2's layers decide fan_in_fan_out themselves, in PEFT too.
NO_INFLUENCE = """
    task_type auto_mapping peft_version base_model_name_or_path revision inference_mode fan_in_fan_out megatron_core
    runtime_config qalora_group_size
"""
FIELDS = {  # ours: theirs, with the default of PEFT
    "rank": ("r", 8),
    "alpha": ("lora_alpha", 8),
    "targets": ("target_modules", None),
    "rank_pattern": ("rank_pattern", {}),
    "alpha_pattern": ("alpha_pattern", {}),
    "rslora": ("use_rslora", False),
    "dropout": ("lora_dropout", 0.0),
}
INITS = {True: "kaiming", False: "kaiming", "gaussian": "gaussian"}  # others leave another base behind, or may


def load_adapter(model: GPT, path: Path, name: str = "default") -> LoraConfig:
    """Adds the adapter of the folder `path` as the active one; like `add_adapter` it freezes the model.

    Raises ValueError for options that we have not, and for targets, missing, unexpected and misshapen tensors, NaN and
    infinity, all of them listed.
    """
    path = Path(path)
    fields = read_config(path)
    config, tensors = config_from_peft(fields, path / CONFIG), read_weights(path)
    try:
        places = check_addition(model, config, name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if faults := Blocks.read(fields.get("use_bdlora")).faults(places):
        raise ValueError(f"{path / CONFIG}: {'; '.join(faults)}")
    _check_tensors(path, model, config, places, tensors)
    add_adapter(model, config, name)
    with torch.no_grad():
        for place, parts in adapter_of(model, name).items():
            A, B = (tensors[key] for key in _keys(place))
            parts[0].A.copy_(A)
            for part, rows in zip(parts, B.split([len(part.B) for part in parts]), strict=True):
                part.B.copy_(rows)
    return config


def save_adapter(model: GPT, path: Path, name: str = "default") -> None:
    """Writes the adapter for `peft.PeftModel.from_pretrained(base, path)` and us, in the adapter's dtype.

    Each file appears whole or not at all. An older adapter in the folder goes when the new weights are on disk, and
    until adapter_config.json, the last file, is there, nobody takes the folder for an adapter.
    """
    path, parts = Path(path), adapter_of(model, name)
    write_adapter(path, json.dumps(config_to_peft(model, name), indent=2) + "\n", _joined(parts))


def write_adapter(path: Path, config: bytes | str, tensors: dict[str, Tensor]) -> None:
    """The two files, in the order that `save_adapter` promises; `config` is the content of adapter_config.json."""
    weights = save(tensors, metadata={"format": "pt"})
    new = path / f".{WEIGHTS}.new"
    try:
        atomic_write(new, weights)
        (path / CONFIG).unlink(missing_ok=True)
        os.replace(new, path / WEIGHTS)
    finally:
        new.unlink(missing_ok=True)
    atomic_write(path / CONFIG, config)


def read_config(path: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder, unchecked."""
    return read_json(path / CONFIG, f"a folder with {CONFIG} and {WEIGHTS}")


def config_from_peft(fields: dict[str, Any], where: Path | str = CONFIG) -> LoraConfig:
    """Raises ValueError naming each field that would make the adapter another one than LoraConfig can say."""
    faults = []
    if (kind := fields.get("peft_type")) != "LORA":
        faults.append(f"peft_type {kind!r}: expected 'LORA'")
    if (bias := fields.get("bias", "none")) != "none":
        faults.append(f"bias {bias!r}: expected 'none', trained biases are not supported")
    init = fields.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in INITS:
        faults.append(f"init_lora_weights {init!r}: expected one of {', '.join(map(repr, INITS))}")
    read = {"peft_type", "bias", "init_lora_weights", "use_bdlora", *NO_INFLUENCE.split()}
    read |= {theirs for theirs, _ in FIELDS.values()}
    faults += [f"{key} {value!r}: not supported" for key, value in fields.items() if key not in read and _set(value)]
    blocks = Blocks()
    try:
        blocks = Blocks.read(fields.get("use_bdlora"))
    except ValueError as error:
        faults.append(str(error))
    values = {ours: fields.get(theirs, default) for ours, (theirs, default) in FIELDS.items()}
    if isinstance(values["targets"], list):  # a set in PEFT: of no order
        values["targets"] = tuple(sorted(values["targets"], key=str))
    init = INITS.get(init if isinstance(init, bool | str) else True, "kaiming")
    try:
        config = LoraConfig(**values, init=init, blocks=blocks.count)
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise ValueError(f"{where}: {'; '.join(faults)}")
    return config


def _set(value: Any) -> bool:
    """PEFT writes all its options; those that are off are null, false or empty. megatron_core and the like are read."""
    return value is not None and value is not False and value != {} and value != []


def config_to_peft(model: GPT, name: str) -> dict[str, Any]:
    """The adapter_config.json. Patterns that only fit our names become lists of whole names of transformers.

    Raises ValueError for what PEFT cannot say: layers without a name in transformers, tie_head, blocks in GPT-2.
    """
    parts, family = adapter_of(model, name), family_of(model.config)
    config = next(iter(parts.values()))[0].config
    _check_sayable(config, family, list(parts))
    targets, ranks, alphas = config.targets, dict(config.rank_pattern), dict(config.alpha_pattern)
    if not _same_by_theirs(model, config, list(parts)):
        targets = [place.theirs for place in parts]
        ranks = {place.theirs: config.rank_of(*place.names) for place in parts}
        alphas = {place.theirs: config.alpha_of(*place.names) for place in parts}
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": config.rslora,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": family == GPT2,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
    }
    if config.blocks > 1:  # older PEFT does not know the field
        fields["use_bdlora"] = Blocks.of_places(config.blocks, list(parts)).written()
    return fields


def _check_sayable(config: LoraConfig, family: str, places: list[Place]) -> None:
    """Raises ValueError for adapters that PEFT's files cannot hold."""
    if config.blocks > 1 and family == GPT2:
        raise ValueError(f"blocks {config.blocks} in {family}: PEFT has none beside its Conv1D layers, expected 1")
    if nameless := [layer for place in places if place.theirs is None for layer in place.layers]:
        raise ValueError(
            f"{', '.join(nameless)}: part of one matrix in {family}: expected an adapter of the whole, target c_attn"
        )
    if config.tie_head:
        raise ValueError("tie_head: PEFT's files have no adapter of embedding and head together")


def _same_by_theirs(model: GPT, config: LoraConfig, places: list[Place]) -> bool:
    """Whether the patterns say the same to one who knows the names of transformers only."""
    wanted = config.targets == "all-linear" or all(config.wants(place.theirs) for place in places)
    return wanted and all(
        config.rank_of(place.theirs) == config.rank_of(*place.names)
        and config.alpha_of(place.theirs) == config.alpha_of(*place.names)
        for place in places
    )


def _keys(place: Place) -> tuple[str, str]:
    kind, end = ("lora_embedding_", "") if place.embedding else ("lora_", ".weight")
    return f"{PREFIX}{place.theirs}.{kind}A{end}", f"{PREFIX}{place.theirs}.{kind}B{end}"


def _joined(parts: dict[Place, list[Adapter]]) -> dict[str, Tensor]:
    tensors = {}
    for place, adapters in parts.items():
        A, B = _keys(place)
        tensors[A] = adapters[0].A.detach().contiguous()
        tensors[B] = torch.cat([adapter.B.detach() for adapter in adapters])
    return tensors


def read_weights(path: Path) -> dict[str, Tensor]:
    """The adapter_model.safetensors of a folder. Raises ValueError where there is none, or half of one."""
    file = path / WEIGHTS
    if not file.is_file():
        found = f"found {PICKLE}, a pickle, which can run any code: convert it first"
        raise ValueError(f"{file}: no such file; {found if (path / PICKLE).exists() else 'expected it'}")
    try:
        return load(file.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file: {error}") from None


def _check_tensors(path: Path, model: GPT, config: LoraConfig, places: list[Place], tensors: dict[str, Tensor]) -> None:
    """Raises ValueError with everything in the file that does not fit the model."""
    layers, expected, faults = adaptable_layers(model), {}, []
    for place in places:
        if place.theirs is None:
            faults.append(f"targets fit {', '.join(place.layers)}, which has no name of its own in transformers")
            continue
        A, B = _keys(place)
        parts = [layers[layer] for layer in place.layers]
        of_A, of_B = zip(*(factor_shapes(config, place, part) for part in parts), strict=True)
        expected[A], expected[B] = of_A[0], (sum(rows for rows, _ in of_B), of_B[0][1])
        base = f"{PREFIX}{place.theirs}.base_layer.weight"
        if base in tensors:  # PEFT adds the frozen weight of an adapted embedding or head
            faults += _base_faults(base, tensors[base], parts[0].weight)
            expected[base] = tuple(tensors[base].shape)
    faults += [f"{key} is missing" for key in expected.keys() - tensors.keys()]
    faults += [f"{key} is unexpected" for key in tensors.keys() - expected.keys()]
    exact = torch.promote_types(torch.float32, next(model.parameters()).dtype)  # of our adapters, see lora/layers.py
    for key in expected.keys() & tensors.keys():
        tensor, shape = tensors[key], expected[key]
        if tuple(tensor.shape) != shape:
            faults.append(f"{key} has shape {list(tensor.shape)}, expected {list(shape)}")
        if not tensor.dtype.is_floating_point:
            faults.append(f"{key} has dtype {tensor.dtype}, expected floating point")
        elif torch.promote_types(tensor.dtype, exact) != exact:
            faults.append(f"{key} has dtype {tensor.dtype}, expected at most {exact}, as the model's adapters are")
        elif not tensor.isfinite().all():
            faults.append(f"{key} has {int((~tensor.isfinite()).sum())} values that are NaN or infinite")
    if faults:
        raise ValueError(f"{path / WEIGHTS}: {'; '.join(sorted(faults))}")


def _base_faults(key: str, theirs: Tensor, ours: Tensor) -> list[str]:
    alike = theirs.shape == ours.shape and torch.equal(theirs.to(ours.device, ours.dtype), ours)
    return [] if alike else [f"{key} differs from the model's weight: expected the model that it was trained on"]
