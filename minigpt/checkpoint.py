"""Training checkpoints: a folder a step, written whole or not at all, with safetensors and JSON and never a pickle.

    RUN/tokenizer.json                          RUN/checkpoints/step_00000200/model.safetensors
                                                                              optimizer.safetensors
                                                                              state.json

state.json holds all that is no tensor, and the SHA-256 of the other files and of itself. The folder gets its name when
everything in it is on the disk, so a kill leaves the old checkpoints or one more. Reading takes the newest whole one
and says which newer ones were broken. Refused: a run without a whole checkpoint, another architecture.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from common.log import atomic_write
from minigpt.config import GPTConfig
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

FORMAT = 2
FOLDER = "checkpoints"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those saved under that name, on the CPU; empty when there were none. Raises ValueError when the file has
        gone since, which a run that goes on may do to its old checkpoints."""
        file = self.path / f"{name}.safetensors"
        if file.name not in self.state["files"]:
            return {}
        if not file.exists():
            raise ValueError(f"{file} is gone: the run has written newer checkpoints meanwhile, try again")
        return safetensors.torch.load_file(file)


def save_checkpoint(
    run: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], keep: int
) -> Path:
    """Writes step's checkpoint and deletes all but the newest `keep`. `state` holds plain values."""
    path = run / FOLDER / f"step_{step:08d}"
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it wrote
    partial.mkdir(parents=True)
    for name, group in tensors.items():
        contiguous = {key: value.detach().contiguous() for key, value in group.items()}
        safetensors.torch.save_file(contiguous, partial / f"{name}.safetensors")
    files = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
    whole = {"format": FORMAT, **state, "step": step, "files": files}
    atomic_write(partial / "state.json", _signed(whole))
    for file in (*partial.iterdir(), partial):
        _to_disk(file)
    if path.exists():  # a broken one that was skipped when the run went on from an older one
        os.replace(path, path.with_name(f".{path.name}.old.partial"))
    os.replace(partial, path)
    _to_disk(path.parent)
    folders = checkpoint_folders(run)
    later = [folder for folder in folders if folder.name > path.name]  # broken, or the run would have gone on there
    kept = [folder for folder in folders if folder not in later][:keep]
    for old in {*folders, *path.parent.glob(".step_*.partial")} - {*kept}:
        shutil.rmtree(old)
    return path


def load_checkpoint(run: Path) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint of a run, and a warning for each newer one that is broken and was skipped.

    Raises ValueError naming the run when it has none, with what is wrong with those that there are.
    """
    broken = []
    for path in checkpoint_folders(run):
        try:
            return Checkpoint(path, _verified(path)), [f"skipped a broken checkpoint: {what}" for what in broken]
        except ValueError as error:
            broken.append(str(error))
    raise ValueError("; ".join([f"{run}: no such checkpoint: expected a run folder with a whole one", *broken]))


def checkpoint_folders(run: Path) -> list[Path]:
    """Newest first."""
    return sorted((run / FOLDER).glob("step_*"), reverse=True)


def load_run(run: Path) -> tuple[GPT, Tokenizer]:
    """The model of a run's newest whole checkpoint in float32 on the CPU - averaged weights where it has them - and its
    tokenizer. Raises ValueError naming the folder when either lacks or is broken."""
    checkpoint, _ = load_checkpoint(run)
    model = GPT(GPTConfig(**checkpoint.state["model_config"]), seed=None)
    model.load_state_dict(checkpoint.tensors("ema") or checkpoint.tensors("model"))
    return model, Tokenizer.load(run / TOKENIZER)


def bits_depend_on(device: torch.device, dtype: torch.dtype, ranks: int) -> dict[str, Any]:
    """What the last bits of a result depend on, besides the config."""
    return {
        "torch": str(torch.__version__),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }


def check_architecture(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError naming the fields in which the checkpoint's model differs from the wanted one."""
    if differences := differing(found, wanted):
        raise ValueError(f"{path} holds another architecture: {differences}")


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """`width is 192 there, 256 asked; ...`, empty when both agree."""
    missing = "absent"
    return "; ".join(
        f"{name} is {found.get(name, missing)} there, {wanted.get(name, missing)} asked"
        for name in sorted({*found, *wanted})
        if found.get(name, missing) != wanted.get(name, missing)
    )


def flatten(states: list[Mapping[str, Any]]) -> tuple[dict[str, Tensor], list[Any]]:
    """Optimizers' state_dicts as named tensors and, for JSON, their parameter groups."""
    tensors = {
        f"{number}.{index}.{key}": value
        for number, state in enumerate(states)
        for index, values in state["state"].items()
        for key, value in values.items()
    }
    return tensors, [state["param_groups"] for state in states]


def unflatten(tensors: Mapping[str, Tensor], groups: list[Any]) -> list[dict[str, Any]]:
    """The state_dicts that `flatten` took apart."""
    states: list[dict[str, Any]] = [{"state": {}, "param_groups": group} for group in groups]
    for name, value in tensors.items():
        number, index, key = name.split(".")
        states[int(number)]["state"].setdefault(int(index), {})[key] = value
    return states


def _verified(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint all of whose files have the checksums it names."""
    try:
        state = json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError):
        raise ValueError(f"{path}: state.json is missing or no JSON (truncated?)") from None
    if not isinstance(state, dict) or json.loads(_signed(state)).get("sha256") != state.get("sha256"):
        raise ValueError(f"{path}: the checksum of state.json does not fit it")
    if state["format"] != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT}, found {state['format']}")
    for name, digest in state["files"].items():
        file = path / name
        if not file.is_file() or _sha256(file) != digest:
            raise ValueError(f"{file}: broken: its checksum does not fit (truncated?)")
    return state


def _signed(state: Mapping[str, Any]) -> str:
    content = {name: value for name, value in state.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return json.dumps({**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1, sort_keys=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """fsync: the rename must not reach the disk before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
