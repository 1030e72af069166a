"""Checkpoints of Hugging Face's transformers: a folder with config.json and safetensors, read into a GPT and written.

Families and fields: `minigpt/hf_config.py`. Reading goes tensor by tensor out of mapped files, after everything that is
wrong with a checkpoint has been found and listed. Refused: pickles (pytorch_model.bin), quantised weights, a checkpoint
with a tensor too many or too few, a GPT that no family of transformers has.
"""

import json
import os
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.log import atomic_write
from minigpt.hf_config import config_from_hf, config_to_hf
from minigpt.hf_layout import Layout
from minigpt.model import GPT, rotary_tables

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CHECKPOINT = f"a folder with {CONFIG} and {WEIGHTS}, or shards and {INDEX}"


def load_pretrained(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", **gpt_arguments: Any
) -> GPT:
    """The GPT of the folder `path`: config.json, and model.safetensors or shards with model.safetensors.index.json.

    dtype None keeps that of the files. gpt_arguments go to GPT (attention_fn, linear_cls, ...). Memory: the model, and
    one tensor of a mapped file at a time. Raises ValueError for a config that `config_from_hf` refuses, files that are
    not there or not whole, and tensors missing, unexpected, of another shape or not of float type, all of them listed.
    """
    path = Path(path)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype {dtype}: expected one of {', '.join(map(str, DTYPES.values()))}")
    config = config_from_hf(read_json(path / CONFIG, CHECKPOINT))
    with torch.device("meta"):  # no memory yet; the rotary tables, which no file holds, are made again below
        model = GPT(config, seed=None, **gpt_arguments)
    layout = Layout(config, model.state_dict())
    state: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = _open(path, layout, stack)
        dtype = _check_tensors(path, layout, files, dtype)
        for place in layout.places:
            state |= layout.split(place, files[place].get(), dtype, device)
    model.load_state_dict(state, assign=True)
    if config.positions == "rotary":
        model.cos_TK, model.sin_TK = (table.to(device) for table in rotary_tables(config))
    if unset := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise ValueError(f"buffers {unset} of the layers given: expected layers whose state is in the checkpoint")
    return model


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in an open file: `name` is what the file calls it."""

    file: str
    name: str
    handle: Any

    @property
    def shape(self) -> list[int]:
        return self.handle.get_slice(self.name).get_shape()

    @property
    def dtype(self) -> str:
        return self.handle.get_slice(self.name).get_dtype()

    def get(self) -> Tensor:
        return self.handle.get_tensor(self.name)


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The object in a file. Raises ValueError saying what was expected where there is no file, and for other JSON."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected {expected}")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _shards(path: Path) -> dict[str, set[str] | None]:
    """The files with weights, each with the tensors that the index says it holds; None: there is no index."""
    single, index = (path / WEIGHTS).exists(), (path / INDEX).exists()
    if single and index:
        raise ValueError(f"{path}: {WEIGHTS} and {INDEX}: expected one of them, they may be two checkpoints")
    if single:
        return {WEIGHTS: None}
    if not index:
        pickles = sorted(file.name for file in path.glob("pytorch_model*.bin"))
        told = f"found {pickles[0]}, a pickle, which can run any code: convert it first" if pickles else "found neither"
        raise ValueError(f"{path}: expected {WEIGHTS}, or shards and {INDEX}; {told}")
    weight_map = read_json(path / INDEX, CHECKPOINT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / INDEX}: expected weight_map, an object of names and files, got {weight_map!r}")
    shards: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{path / INDEX}: {name} in {file!r}: expected the name of a file in the same folder")
        shards.setdefault(file, set()).add(name)
    return shards


def _open(path: Path, layout: Layout, stack: ExitStack) -> dict[str, _Stored]:
    """All tensors of all files by their whole names, with the files mapped until the stack is closed."""
    found: dict[str, _Stored] = {}
    faults = []
    for file, promised in _shards(path).items():
        if not (path / file).is_file():
            faults.append(f"{file} is not there, {INDEX} names it")
            continue
        try:
            handle = stack.enter_context(safe_open(path / file, framework="pt"))
        except (SafetensorError, OSError) as error:
            faults.append(f"{file} is not a whole safetensors file: {error}")
            continue
        held = set(handle.keys())
        if promised is not None and held != promised:
            faults.append(f"{file} and {INDEX} differ in {', '.join(sorted(held ^ promised))}")
        for name in sorted(held):
            if (place := layout.place(name)) is None:
                continue
            if twin := found.get(place):
                faults.append(f"{place} is there twice, as {twin.name} in {twin.file} and {name} in {file}")
            found[place] = _Stored(file, name, handle)
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return found


def _check_tensors(path: Path, layout: Layout, files: dict[str, _Stored], dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to load as. Raises ValueError with everything that does not fit."""
    head, embedding = "lm_head.weight", layout.theirs("embedding.weight")
    optional = {head} if layout.tied else set()
    faults = [f"{place} is missing" for place in layout.places if place not in files]
    faults += [f"{files[place].name} is unexpected" for place in files if place not in {*layout.places, *optional}]
    for place in files.keys() & layout.places.keys():
        stored, shape = files[place], layout.shape(place)
        if stored.shape != shape:
            faults.append(f"{stored.name} has shape {stored.shape}, expected {shape}")
        if stored.dtype not in DTYPES:
            faults.append(f"{stored.name} has dtype {stored.dtype}, expected one of {', '.join(DTYPES)}")
    if faults:
        raise ValueError(f"{path}: {'; '.join(sorted(faults))}")
    if layout.tied and head in files:
        ours, theirs = files[embedding], files[head]
        alike = (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if not (alike and torch.equal(ours.get(), theirs.get())):
            raise ValueError(f"{path}: {theirs.name} differs from {ours.name}, but tie_word_embeddings is true")
    kinds = sorted({files[place].dtype for place in layout.places})
    if dtype is None and len(kinds) > 1:
        raise ValueError(f"{path}: tensors of dtypes {', '.join(kinds)}: expected one, or the argument dtype")
    return dtype or DTYPES[kinds[0]]


def save_pretrained(model: GPT, path: Path, *, tokenizer: Any = None, max_shard_bytes: int = 5 * 2**30) -> None:
    """Writes config.json and model.safetensors, for `transformers.AutoModelForCausalLM.from_pretrained(path)` and us.

    More than max_shard_bytes become shards with an index; a tensor larger than that has a shard to itself. A tokenizer
    is saved as tokenizer.json. Each file appears whole or not at all. An older checkpoint in the folder goes when all
    new weights are on disk, and until config.json, the last file, is there, nobody takes the folder for a checkpoint.
    Raises ValueError, before anything is written, for a GPT that no family has (see `config_to_hf`), for parameters
    that are not those of a plain GPT, of several dtypes, or of one that is not float64, float32, float16 or bfloat16.
    """
    path, config = Path(path), config_to_hf(model.config)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes {max_shard_bytes}: expected at least 1")
    layout = Layout(model.config, model.state_dict())
    config["dtype"] = _check_plain(model, layout).removeprefix("torch.")
    shards = _pack(layout, max_shard_bytes)
    count = len(shards)
    files = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)] if count > 1 else [WEIGHTS]
    path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        written = [_write_beside(path, layout, places, stack) for places in shards]
        for old in (path / CONFIG, path / WEIGHTS, path / INDEX, *path.glob("model-?????-of-?????.safetensors")):
            old.unlink(missing_ok=True)
        for temporary, file in zip(written, files, strict=True):
            os.replace(temporary, path / file)
    if count > 1:
        weight_map = {place: file for file, places in zip(files, shards, strict=True) for place in places}
        index = {"metadata": {"total_size": sum(map(layout.bytes, weight_map))}, "weight_map": weight_map}
        atomic_write(path / INDEX, json.dumps(index, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(path / "tokenizer.json")
    atomic_write(path / CONFIG, json.dumps(config, indent=2) + "\n")


def _check_plain(model: GPT, layout: Layout) -> str:
    """The dtype's name. Raises ValueError for parameters that a plain GPT of this config has not, or lacks."""
    with torch.device("meta"):
        plain = GPT(model.config, seed=None).state_dict()
    shapes = [{name: tuple(p.shape) for name, p in state.items()} for state in (plain, layout.parameters)]
    if different := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}):
        raise ValueError(f"parameters {', '.join(different)}: expected those of a GPT of plain layers, in their shapes")
    dtypes = sorted({str(p.dtype) for p in layout.parameters.values()})
    if len(dtypes) > 1 or dtypes[0] not in map(str, DTYPES.values()):
        raise ValueError(f"parameters of {', '.join(dtypes)}: expected one of {', '.join(map(str, DTYPES.values()))}")
    return dtypes[0]


def _pack(layout: Layout, max_shard_bytes: int) -> list[list[str]]:
    """The tensors in order, as many a shard as fit."""
    shards: list[list[str]] = []
    room = 0
    for place in layout.places:
        room -= layout.bytes(place)
        if room < 0:
            shards.append([])
            room = max_shard_bytes - layout.bytes(place)
        shards[-1].append(place)
    return shards


def _write_beside(folder: Path, layout: Layout, places: list[str], stack: ExitStack) -> Path:
    """A whole file under a temporary name, which the stack removes unless it was renamed by then."""
    temporary = folder / f".{WEIGHTS}.{secrets.token_hex(4)}.tmp"
    stack.callback(temporary.unlink, missing_ok=True)
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # what the umask grants; safetensors makes its files private
    # transformers 4 refuses a file that does not say its format.
    save_file({place: layout.join(place) for place in places}, temporary, metadata={"format": "pt"})
    os.chmod(temporary, mode)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    return temporary
