"""Checkpoints on disk: whole or not there, the newest whole one found, the broken ones named."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from minigpt import checkpoint
from minigpt.checkpoint import checkpoint_folders, flatten, load_checkpoint, save_checkpoint, unflatten
from minigpt.optim import Muon


def tensors(step: int) -> dict:
    return {
        "model": {"a": torch.full((3, 2), float(step)), "b": torch.arange(4)},
        "optimizer": {"0.0.m": torch.ones(2)},
    }


def save(run, *steps, keep=3) -> None:
    for step in steps:
        save_checkpoint(run, step, {"note": f"at {step}", "rate": 0.1 + 0.2}, tensors(step), keep)


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path, 7)
    found, warnings = load_checkpoint(tmp_path)
    assert not warnings and found.state["step"] == 7 and found.state["rate"] == 0.1 + 0.2
    assert torch.equal(found.tensors("model")["a"], torch.full((3, 2), 7.0))
    assert found.tensors("model")["b"].dtype == torch.int64 and found.tensors("ema") == {}


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 9, 10, 100, keep=2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step_00000100", "step_00000010"]
    assert load_checkpoint(tmp_path)[0].state["step"] == 100


DAMAGES = {
    "a tensor file is cut": lambda path: os.truncate(path / "model.safetensors", 60),
    "a bit is flipped": lambda path: flip(path / "optimizer.safetensors"),
    "a file is missing": lambda path: (path / "model.safetensors").unlink(),
    "no state": lambda path: (path / "state.json").unlink(),
    "the state is cut": lambda path: os.truncate(path / "state.json", 40),
    "the state is another": lambda path: (path / "state.json").write_text(
        (path / "state.json").read_text().replace("at 2", "at 1")
    ),
    "the state is no object": lambda path: (path / "state.json").write_text("[1]"),
}


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_broken_checkpoint_is_skipped_with_a_warning(damage, tmp_path):
    save(tmp_path, 1, 2)
    newest = checkpoint_folders(tmp_path)[0]
    damage(newest)
    found, warnings = load_checkpoint(tmp_path)
    assert found.state["step"] == 1 and len(warnings) == 1
    assert warnings[0].startswith("skipped a broken checkpoint: ") and str(newest) in warnings[0]
    save(tmp_path, 2)  # the run goes on and writes that step again
    assert load_checkpoint(tmp_path)[0].state["step"] == 2 and not load_checkpoint(tmp_path)[1]


def test_later_ones_go_when_the_run_goes_on_from_before_them(tmp_path):
    save(tmp_path, 10, 20)
    flip(tmp_path / "checkpoints/step_00000020/model.safetensors")
    (tmp_path / "checkpoints/.step_00000013.partial").mkdir()  # of a kill
    save(tmp_path, 12, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000012"]


def test_a_file_that_went_since_is_named(tmp_path):
    save(tmp_path, 1)
    found, _ = load_checkpoint(tmp_path)
    (found.path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is gone: the run has written newer checkpoints"):
        found.tensors("model")
    assert found.tensors("ema") == {}


def test_no_whole_checkpoint_at_all(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: no such checkpoint: expected a run folder"):
        load_checkpoint(tmp_path)
    save(tmp_path, 1)
    flip(checkpoint_folders(tmp_path)[0] / "model.safetensors")
    with pytest.raises(ValueError, match=r"no such checkpoint: .*model.safetensors: broken: its checksum does not fit"):
        load_checkpoint(tmp_path)


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="expected a checkpoint of format 2, found 1"):
        load_checkpoint(tmp_path)


def test_a_kill_while_saving_leaves_the_old_one(tmp_path):
    """A process that saves for ever is killed at many moments: what remains is always whole."""
    script = """
import sys, torch
from pathlib import Path
from minigpt.checkpoint import save_checkpoint
for step in range(1, 10**6):
    save_checkpoint(Path(sys.argv[1]), step, {}, {"model": {"a": torch.full((50_000,), float(step))}}, 2)
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) == 20:
            break
    process.send_signal(signal.SIGKILL)
    said = [int(line) for line in process.stdout.read().split()]
    process.wait()
    found, warnings = load_checkpoint(tmp_path)
    step = found.state["step"]
    assert not warnings and step >= (said[-1] if said else 20)
    assert torch.equal(found.tensors("model")["a"], torch.full((50_000,), float(step)))
    save(tmp_path, step + 1, keep=1)  # what the kill left half written is no hindrance
    assert len(checkpoint_folders(tmp_path)) == 1


def test_optimizers_come_apart_and_together():
    model = torch.nn.Linear(3, 2)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True), Muon([model.weight], lr=0.2)]
    model(torch.ones(1, 3)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [optimizer.state_dict() for optimizer in optimizers]
    named, groups = flatten(states)
    again = unflatten(named, json.loads(json.dumps(groups)))
    for state, optimizer in zip(again, optimizers, strict=True):
        optimizer.load_state_dict(state)
    for before, optimizer in zip(states, optimizers, strict=True):
        after = optimizer.state_dict()
        assert after["param_groups"] == json.loads(json.dumps(before["param_groups"]))
        for index, values in before["state"].items():
            for key, value in values.items():
                assert torch.equal(after["state"][index][key], value)
