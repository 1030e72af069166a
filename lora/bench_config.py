"""What the parts of `python -m lora.bench` are told, and the other libraries that they run beside.

Refused: numbers out of range. A library that is not installed is looked for when a part needs it, and said by name.
"""

import importlib
import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

from common.cli import UserError

PEERS = ("transformers", "peft", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class BenchConfig:
    what: Literal["all", "train", "nf4", "multi"] = field(default="all", metadata={"help": "which part"})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto is CUDA where there is one"})
    rounds: int = field(default=7, metadata={"help": "samples of each competitor, taken in turn"})
    compile: bool = field(default=True, metadata={"help": "measure torch.compile too"})
    quick: bool = field(default=False, metadata={"help": "tiny sizes, to see that it runs"})
    out: Path = field(default=Path("results"), metadata={"help": "folder of the result files"})

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds {self.rounds}: expected at least 1")


def peer(name: str) -> ModuleType:
    """The library, imported now. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        told = f"{name} does not import ({error}): expected it for the comparison, pip install {name}"
        raise UserError(told) from error


def installed(name: str) -> bool:
    return name in peer_versions()


def peer_versions() -> dict[str, str]:
    """Of those that are installed, for the result files."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
