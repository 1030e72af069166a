"""The first steps of a logged race once more, on this machine, with their losses beside those of the log.

Nothing of the log is believed here but its config: text, weights and batches are made anew from it. Refused: other
text than the log's, such as another Python's standard library, and more steps than the race has.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.dist import World
from common.log import cpu_threads
from common.results import device_name
from speedrun.config import RaceConfig
from speedrun.loss import compiling
from speedrun.record_log import RaceLog
from speedrun.schedule import plan
from speedrun.state import Run, machine
from speedrun.train import batches, change, gradients, prepare, update

# Of a loss, where another machine, another number of ranks or a GPU adds up in another order.
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}


@dataclass(frozen=True, slots=True)
class Rerun:
    losses: list[float]  # of steps 1, 2, ...
    tolerance: float  # relative; 0 where the same bits are expected
    why: str  # that tolerance
    sizes: list[int]  # bytes that the targets of every step of the race have, in steps 1, 2, ...


def rerun(log: RaceLog, steps: int) -> Rerun:
    """Steps 1 to `steps` by one process. Raises ValueError where this machine has not what the race had."""
    about = log.about
    if not (1 <= steps <= len(log.steps)):
        raise ValueError(f"{steps} steps to run again: expected 1 to {len(log.steps)}, the log's")
    world = World(
        0, 1, 0, torch.device("cuda" if torch.cuda.is_available() and about["device"] == "cuda" else "cpu"), None
    )
    with tempfile.TemporaryDirectory() as folder, threads(about["threads"] * about["ranks"]):
        config = replace(RaceConfig(**about["config"]), folder=Path(folder) / "rerun", dtype=about["dtype"])
        run, _ = prepare(config, world)
        if run.data.digest != about["data_digest"]:
            there, here = about["data_digest"][:12], run.data.digest[:12]
            raise ValueError(f"the text here is another, digest {here}: expected the log's, {there}")
        fits = expected(about, machine(run), device_name(world.device))
        return Rerun(losses_of(run, steps), *fits, sizes_of(run))


def losses_of(run: Run, steps: int) -> list[float]:
    """The loop of speedrun/train.py without its clock, logs and looks."""
    make, losses = batches(run), []
    with compiling(run.config, run.world.device):
        for step in range(steps):
            now = plan(step, run.config)
            change(run, now)
            batch_of_step = (torch.from_numpy(part).to(run.world.device) for part in make(step))
            losses.append(gradients(run, now, *batch_of_step).double()[0].item())
            update(run, now)
    return losses


def sizes_of(run: Run) -> list[int]:
    """Which batches those of a race are, told by their bytes: nothing of this needs the model."""
    make = batches(run)
    return [int(run.data.byte_lengths[make(step)[1]].sum()) for step in range(run.config.steps)]


def expected(about: dict[str, Any], here: dict[str, Any], name: str) -> tuple[float, str]:
    """(Tolerance, why): none where a CPU of the same name adds up the same numbers in the same order."""
    there = {key: about.get(key) for key in here}
    others = [f"{key} {here[key]} instead of {there[key]}" for key in here if here[key] != there[key]]
    others += [f"{name} instead of {about['machine']}"] if name != about["machine"] else []
    others += ["a GPU's sums have no fixed order"] if here["device"] != "cpu" else []
    if others:
        return TOLERANCES[about["dtype"]], ", ".join(others)
    return 0.0, "same torch, threads and CPU"


@contextmanager
def threads(wanted: int) -> Iterator[None]:
    """As many as the race had, where this machine has them."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(wanted, cpu_threads()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
