"""Is a run that lies there still a run of this program? The source that a race runs, and what differs.

Only files that speedrun/train.py imports, however far down, count, and of them only the syntax tree: a comment or a new
report changes no run. Imports inside functions count too. Refused, unless asked for: runs of another config or source.
"""

import ast
import hashlib
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
from speedrun.record_log import ROOT

START = "speedrun/train.py"
STATE = "ablation.json"
DEFAULTS = jsonable(deciding(plain(RaceConfig())))


@cache
def race_sources(root: Path = ROOT, start: str = START) -> dict[str, str]:
    """{posix path from the root: digest of its syntax tree}, sorted, of `start` and all that it imports from here."""
    digests, todo = {}, [start]
    while todo:
        name = todo.pop()
        if name in digests:
            continue
        tree = ast.parse((root / name).read_text())
        digests[name] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]
        todo += [path for module in imported(tree) if (root / (path := module.replace(".", "/") + ".py")).is_file()]
    return dict(sorted(digests.items()))


def imported(tree: ast.AST) -> list[str]:
    """Names of modules that may be files: of `from a import b` both a and a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two runs' `about`, in words; empty when they agree."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            wrong = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
            found += [f"{name} {', '.join(wrong)}"] if wrong else []
        elif old != new:
            found.append(f"{name} {old} there, {new} here")
    return "; ".join(found)


# ---- runs that lie there ---------------------------------------------------------------------------------------------


def about(recipe: RaceConfig, world: World) -> dict[str, Any]:
    """What the numbers of a run depend on."""
    there = {"torch": str(torch.__version__), "device": world.device.type}
    there["dtype"] = str(choose_dtype(recipe.dtype, world.device))
    return jsonable({"config": deciding(plain(recipe)), "source": race_sources(), **there})


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
        # A field that came later was at its default.
        elif policy == "refuse" or {**DEFAULTS, **state["about"]["config"]} != now["config"]:
            hint = "--stale rerun, or --stale keep if only the source differs and that does not matter"
            raise ValueError(f"{folder} is of another run: {found}; expected the same, or {hint}")
        else:
            notes.append(f"{folder} is kept: {found}")
    return notes
