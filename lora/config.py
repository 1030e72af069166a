"""What an adapter is: rank, scale, which layers get one. Patterns match names as PEFT matches them, so that its files
mean the same here.

A pattern is compared with two names of a layer: ours (`blocks.0.attention.query`) and, where the GPT belongs to a
family of transformers, theirs (`model.layers.0.self_attn.q_proj`). Refused: values out of range, patterns that are no
regular expressions, ranks that the blocks of block-diagonal factors do not divide.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALL_LINEAR = "all-linear"  # as in PEFT: every linear layer except the head


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """y = W x + scale(name) B A drop(x), with A of shape (rank, inputs) and B of shape (outputs, rank).

    Hu et al. 2021, section 4.1. Names are tried in order, and the first pattern that fits one of them counts. `blocks`:
    "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving", 2025.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ALL_LINEAR  # ends of names, cut at dots; or one regular expression for whole names
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # {end of a name, as a regular expression: its rank}
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False  # the scale is alpha / sqrt(rank), Kalajdzievski 2023, instead of alpha / rank
    dropout: float = 0.0  # of what goes into A, in training; embeddings have none
    init: str = "kaiming"  # A uniform within 1/sqrt(inputs), or "gaussian": std 1/rank; B 0. Embeddings: A 0, B normal
    blocks: int = 1  # N > 1: one factor of each layer is block-diagonal, which one says lora/targets.py (BD-LoRA)
    tie_head: bool = False  # an adapter of a tied embedding changes the head too; PEFT's files have no such adapter

    def __post_init__(self) -> None:
        _check_whole("rank", self.rank)
        _check_positive("alpha", self.alpha)
        _check_targets(self.targets)
        for name, check in (("rank_pattern", _check_whole), ("alpha_pattern", _check_positive)):
            _check_pattern(name, getattr(self, name), check)
        for name in ("rslora", "tie_head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} {getattr(self, name)!r}: expected True or False")
        if not is_number(self.dropout) or not (0 <= self.dropout < 1):
            raise ValueError(f"dropout {self.dropout!r}: expected a number from 0 to below 1")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"init {self.init!r}: expected 'kaiming' or 'gaussian'")
        _check_whole("blocks", self.blocks)
        ranks = {"rank": self.rank} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        if uneven := [f"{name} {rank}" for name, rank in ranks.items() if rank % self.blocks]:
            raise ValueError(f"{', '.join(uneven)} in {self.blocks} blocks: expected multiples of the number of blocks")

    def wants(self, *names: str) -> bool:
        """Whether a layer of these names is a target; "all-linear" is not a pattern and fits no name."""
        if isinstance(self.targets, str):
            return any(re.fullmatch(self.targets, name) for name in names)
        return any(fits(target, name) for target in self.targets for name in names)

    def rank_of(self, *names: str) -> int:
        return _first(self.rank_pattern, names, self.rank)

    def alpha_of(self, *names: str) -> float:
        return _first(self.alpha_pattern, names, self.alpha)

    def scale(self, *names: str) -> float:
        """What B A is multiplied by in the layer of these names."""
        rank = self.rank_of(*names)
        return self.alpha_of(*names) / (math.sqrt(rank) if self.rslora else rank)


def fits(target: str, name: str) -> bool:
    """Whether `name` is the target or ends in it after a dot."""
    return name == target or name.endswith(f".{target}")


def _first(pattern: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    for end, value in pattern.items():
        if any(re.match(rf"(.*\.)?({end})$", name) for name in names):
            return value
    return default


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} {value!r}: expected a whole number of at least 1")


def _check_positive(name: str, value: Any) -> None:
    if not is_number(value) or not (0 < value < math.inf):
        raise ValueError(f"{name} {value!r}: expected a positive number")


def _check_targets(targets: Any) -> None:
    if isinstance(targets, str) and targets:
        _check_expression("targets", targets)
    elif not (isinstance(targets, tuple) and targets and all(isinstance(t, str) and t for t in targets)):
        raise ValueError(f"targets {targets!r}: expected a tuple of ends of layer names, or one regular expression")


def _check_pattern(name: str, pattern: Any, check: Any) -> None:
    if not isinstance(pattern, Mapping) or not all(isinstance(key, str) and key for key in pattern):
        raise ValueError(f"{name} {pattern!r}: expected ends of layer names, each with its value")
    for key, value in pattern.items():
        _check_expression(name, key)
        check(f"{name}[{key!r}]", value)


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{name} {expression!r}: not a regular expression: {error}") from None
