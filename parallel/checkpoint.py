"""Checkpoints of any layout that load at any other: what of a run is saved, and where it goes when it is read.

    model/<name>                weights             optimizer/<name>/<key>      exp_avg, exp_avg_sq, step; Muon's buffer

Written by parallel/checkpoint_writer.py, read by parallel/checkpoint_reader.py. To make a folder that minigpt.sample
reads: `python -m parallel.checkpoint --run RUN --export OUT`. Refused: another architecture, another optimizer's state.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from common import cli
from minigpt import checkpoint as single
from minigpt.optim import Muon
from parallel.checkpoint_reader import Checkpoint, load, open_single, stored_config
from parallel.checkpoint_writer import Entries, Pending, save
from parallel.pieces import Piece

__all__ = [
    "Checkpoint", "Entries", "Pending", "entries_of", "export", "load", "open_single", "restore", "save",
    "stored_config",
]  # fmt: skip

NEEDED = ((Muon, {"buffer"}), (torch.optim.Adam, {"step", "exp_avg", "exp_avg_sq"}))  # AdamW is an Adam


def entries_of(
    parameters: Mapping[str, Tensor], pieces: Mapping[str, Piece], optimizers: Iterable[Optimizer] = ()
) -> dict[str, tuple[Tensor, Piece]]:
    """What `save` is to write of a strategy's `parameters()` and `pieces()` and the optimizers that step them.

    A state as large as its parameter is the same piece of a whole state; a scalar is alike on all ranks. Raises
    ValueError for a state that is neither.
    """
    entries: dict[str, tuple[Tensor, Piece]] = {}
    for name, p in parameters.items():
        entries[f"model/{name}"] = (p.detach(), pieces[name])
        for optimizer in optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                entries[f"optimizer/{name}/{key}"] = (value, _piece_of_state(name, key, value, p, pieces[name]))
    return entries


def _piece_of_state(name: str, key: str, value: Any, p: Tensor, piece: Piece) -> Piece:
    if isinstance(value, Tensor) and value.shape == p.shape:
        return piece
    if isinstance(value, Tensor) and not value.ndim:
        return Piece.whole(())
    found = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
    raise ValueError(f"optimizer state {key} of {name}: {found}, expected a tensor of shape {tuple(p.shape)} or ()")


@torch.no_grad()
def restore(
    checkpoint: Checkpoint,
    parameters: Mapping[str, Tensor],
    pieces: Mapping[str, Piece],
    optimizers: Iterable[Optimizer] = (),
    model_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes the checkpoint's weights and optimizer states into these parameters and optimizers, as saved at whatever
    layout. Without optimizers the weights alone: the start of a new run.

    A state that does not exist yet is made, as torch makes it; options of parameter groups stay as they are. Raises
    ValueError, before anything is written, naming the fields in which a model_config differs from the checkpoint's, the
    tensors that lack or have another shape, and a parameter whose state is another optimizer's.
    """
    if model_config is not None:
        single.check_architecture(checkpoint.path, checkpoint.state["model_config"], model_config)
    optimizers = list(optimizers)
    _check(checkpoint, pieces)
    states = [_states(checkpoint, optimizer, parameters) for optimizer in optimizers]
    for name, p in parameters.items():
        p.copy_(checkpoint.read(f"model/{name}", pieces[name]).view(p.shape))
    for optimizer, keys in zip(optimizers, states, strict=True):
        _load_states(checkpoint, optimizer, keys, parameters, pieces)


def _check(checkpoint: Checkpoint, pieces: Mapping[str, Piece]) -> None:
    wrong = [name for name in pieces if f"model/{name}" not in checkpoint.tensors]
    if wrong:
        raise ValueError(f"{checkpoint.path} lacks the weights {', '.join(wrong)}: expected those of the same model")
    for name, piece in pieces.items():
        if (found := checkpoint.shape(f"model/{name}")) != piece.shape:
            wrong.append(f"{name} is {found} there, {piece.shape} asked")
    if wrong:
        raise ValueError(f"{checkpoint.path} holds another architecture: {'; '.join(wrong)}")


def _states(checkpoint: Checkpoint, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Which states the checkpoint has of each parameter that this optimizer steps."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    keys: dict[str, list[str]] = {name: [] for name, p in parameters.items() if id(p) in mine}
    for tensor in checkpoint.tensors:
        kind, _, rest = tensor.partition("/")
        name, _, key = rest.rpartition("/")
        if kind == "optimizer" and name in keys:
            keys[name].append(key)
    needed = next((needed for cls, needed in NEEDED if isinstance(optimizer, cls)), set())
    for name, found in keys.items():
        if found and not needed <= {*found}:
            raise ValueError(
                f"{checkpoint.path}: {name} was stepped by another optimizer: it has the states "
                f"{', '.join(sorted(found))}, {type(optimizer).__name__} needs {', '.join(sorted(needed))}"
            )
    return keys


def _load_states(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    keys: Mapping[str, list[str]],
    parameters: Mapping[str, Tensor],
    pieces: Mapping[str, Piece],
) -> None:
    """Through load_state_dict, which knows device and dtype of each state: AdamW's `step` is not like the others."""
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    states = {}
    for name, wanted in keys.items():
        p, state = parameters[name], {}
        for key in wanted:
            tensor = f"optimizer/{name}/{key}"
            # Of a parameter that is itself a scalar, and perhaps cut flat, `step` alone is alike on all ranks.
            scalar = not checkpoint.shape(tensor) and (pieces[name].shape != () or key == "step")
            value = checkpoint.read(tensor, Piece.whole(()) if scalar else pieces[name])
            state[key] = value if scalar else value.view(p.shape)
        if state:
            states[order.index(id(p))] = state
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def export(run: Path, out: Path) -> tuple[Path, list[str]]:
    """Makes the newest whole checkpoint one of stage 2 in the run folder `out` (may be `run` itself), for
    minigpt.checkpoint.load_run; optimizer states stay behind. Returns its path, and warnings as `load`.

    Raises ValueError when the run has no tokenizer, or when `out` has later checkpoints.
    """
    found, warnings = load(run)
    tokenizer = run / single.TOKENIZER
    if not tokenizer.is_file():
        raise ValueError(f"{tokenizer} is missing: expected the tokenizer of the run, its samples need it")
    step = found.state["step"]
    present = single.checkpoint_folders(out)
    if present and present[0].name > f"step_{step:08d}":
        raise ValueError(f"{out} has {present[0].name} already, this is step {step}: expected another folder")
    groups: dict[str, dict[str, Tensor]] = {}
    for tensor in found.tensors:
        kind, _, name = tensor.partition("/")
        if kind != "optimizer":
            groups.setdefault(kind, {})[name] = found.read(tensor)
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() != run.resolve():
        shutil.copyfile(tokenizer, out / single.TOKENIZER)
    return single.save_checkpoint(out, step, found.state, groups, keep=len(present) + 1), warnings


@dataclass(frozen=True, slots=True)
class ExportConfig:
    run: Path = field(metadata={"help": "folder of the parallel run"})
    export: Path = field(metadata={"help": "run folder to make, for minigpt.sample"})


def main() -> None:
    config = cli.parse(ExportConfig, prog=cli.program(), description="a parallel run's model as one of minigpt")
    path, warnings = export(config.run, config.export)
    print("\n".join([*warnings, f"wrote {path}"]))


if __name__ == "__main__":
    cli.run(main)
