"""Is a run that lies there still a run of this program? What its numbers depend on, and what differs.

The source is that of a race log, every file of the stages that a race runs: which of them a run really needs nobody has
to guess. Refused, unless asked for: runs of another config or source.
"""

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common.dist import World
from common.log import jsonable
from minigpt.train_config import deciding, plain
from minigpt.trainer import choose_dtype
from speedrun.config import RaceConfig
from speedrun.record_log import source_digests
from speedrun.winners import choose

STATE = "ablation.json"
NAMED = 5  # things that differ
DEFAULTS = jsonable(deciding(plain(RaceConfig())))


@cache
def sources() -> dict[str, str]:
    """{posix path: SHA-256}, as this process found them."""
    return source_digests()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two runs' `about`, in words; empty when they agree."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            wrong = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
            more = f" and {len(wrong) - NAMED} more" * (len(wrong) > NAMED)
            found += [f"{name} {', '.join(wrong[:NAMED])}{more}"] if wrong else []
        elif old != new:
            found.append(f"{name} {old} there, {new} here")
    return "; ".join(found)


# ---- runs that lie there ---------------------------------------------------------------------------------------------


def about(recipe: RaceConfig, world: World) -> dict[str, Any]:
    """What the numbers of a run depend on."""
    dtype = choose_dtype(recipe.dtype, world.device)
    there = {"torch": str(torch.__version__), "device": world.device.type, "dtype": str(dtype)}
    there["choice"] = str(choose(recipe, world.device, dtype)[0])
    return jsonable({"config": deciding(plain(recipe)), "source": sources(), **there})


def same_config(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Of two runs' `about`: a field that came later was at its default."""
    return {**DEFAULTS, **before["config"]} == now["config"]


def state_of(folder: Path) -> dict[str, Any] | None:
    path = folder / STATE
    return json.loads(path.read_text()) if path.exists() else None


def finished(state: dict[str, Any] | None) -> bool:
    return state is not None and not state.keys().isdisjoint(("bits_per_byte", "failed"))


def look_for_stale(folders: Mapping[Path, dict[str, Any]], policy: str) -> list[str]:
    """Removes stale runs where the policy says so; notes about them. Raises ValueError where it refuses."""
    notes = []
    for folder, now in folders.items():
        state = state_of(folder)
        if state is None or not (found := differences(state["about"], now)):
            continue
        if policy == "rerun" or not finished(state):  # half a run of one source and half of another is of none
            shutil.rmtree(folder)
            notes.append(f"{folder} is run again: {found}")
        elif policy == "refuse" or not same_config(state["about"], now):
            hint = "--stale rerun, or --stale keep if only the source differs and that does not matter"
            raise ValueError(f"{folder} is of another run: {found}; expected the same, or {hint}")
        else:
            notes.append(f"{folder} is kept: {found}")
    return notes
