"""One file holds a whole training state: `torch.save` bytes followed by one line with their SHA-256.

Written atomically, so a kill leaves the old file or the new one; checked when read, so a truncated or damaged one is an
error that names the file. `torch.load` reads the file too (the last line comes after the archive). Refused: files
without the line, with a wrong one, of another format; nothing but tensors and plain values is ever unpickled.
"""

import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common.log import atomic_write
from minigpt.config import GPTConfig
from minigpt.model import GPT

FORMAT = 1
LABEL = b"\nsha256 "
TRAILER = len(LABEL) + 64 + 1  # the label, the digest in hexadecimal, a newline


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """`state` holds tensors and plain values; "model_config" among them makes it loadable by `load_model`."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    payload = buffer.getvalue()
    atomic_write(path, payload + LABEL + hashlib.sha256(payload).hexdigest().encode() + b"\n")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state on the CPU. Raises ValueError naming the file when it is missing, broken or of another format."""
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    data = path.read_bytes()
    payload, trailer = data[:-TRAILER], data[-TRAILER:]
    if trailer != LABEL + hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise ValueError(f"{path}: broken checkpoint: its checksum does not fit its {len(data)} bytes (truncated?)")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # a whole file, but with more than tensors and plain values in it
        state = None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT}")
    return state


def load_model(path: Path) -> GPT:
    """The GPT that a training checkpoint holds, in float32 on the CPU."""
    state = load_checkpoint(path)
    model = GPT(GPTConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    return model


def check_architecture(path: Path, found: Mapping[str, Any], wanted: GPTConfig) -> None:
    """Raises ValueError naming the fields in which the checkpoint's model differs from the wanted one."""
    if differences := differing(found, asdict(wanted)):
        raise ValueError(f"{path} holds another architecture: {differences}")


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """`width is 192 there, 256 asked; ...`, empty when both agree."""
    missing = "absent"
    return "; ".join(
        f"{name} is {found.get(name, missing)} there, {wanted.get(name, missing)} asked"
        for name in sorted({*found, *wanted})
        if found.get(name, missing) != wanted.get(name, missing)
    )
