"""Time of a step with a switch on against off: both models in one process, in alternation, by common.timing.

A busy machine slows both sides alike, so ratios of neighbours are what counts. Where what a step does changes on the
way (windows, batches, more tokens predicted), each sixth of the run is timed, and a round is the sum over the sixths:
halves and thirds of a run are whole sixths. Refuses what a race refuses.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from common.dist import World
from common.timing import compare
from minigpt.batches import Prefetcher
from speedrun.config import RaceConfig
from speedrun.loss import compiling
from speedrun.schedule import plan
from speedrun.train import batches, change, gradients, prepare, update

SIXTHS = 6
WARMUP = 2  # steps of each side before the first timed one; those compile


class Stepper:
    """Makes the steps of a run from `first` on, `length` of them in a circle; called, it makes one."""

    def __init__(self, config: RaceConfig, folder: Path, world: World, stack: ExitStack) -> None:
        self.run, _ = prepare(replace(config, folder=folder), world)
        depth = 2 if config.prefetch else 0
        self.ahead = stack.enter_context(Prefetcher(batches(self.run), world.device, depth=depth))
        self.first, self.length, self.made = 0, 1, 0

    def __call__(self) -> Tensor:
        step = self.first + self.made % self.length
        self.made += 1
        now = plan(step, self.run.config)
        change(self.run, now)
        pair = gradients(self.run, now, *self.ahead.next(step))
        update(self.run, now)
        return pair


def starts(config: RaceConfig) -> list[int]:
    """First steps of the sixths of a run; of the first alone where all do the same."""
    first = [number * config.steps // SIXTHS for number in range(SIXTHS)]
    return first if len({plan(step, config).kind for step in first}) > 1 else first[:1]


def step_ratios(on: RaceConfig, off: RaceConfig, rounds: int, world: World) -> list[float]:
    """Seconds on over seconds off, a number for each round."""
    first = max(starts(on), starts(off), key=len)
    seconds = {"on": [0.0] * rounds, "off": [0.0] * rounds}
    compiled = on if on.compile else off
    with tempfile.TemporaryDirectory() as folder, compiling(compiled, world.device), ExitStack() as stack:
        sides = {name: Stepper(config, Path(folder) / name, world, stack) for name, config in
                 (("on", on), ("off", off))}  # fmt: skip
        for start in first:
            for side in sides.values():
                side.first, side.length, side.made = start, max(1, on.steps // SIXTHS), 0
            # Losses that differ are the point; that none is NaN is looked at.
            timed = compare(sides, rounds=rounds, warmup=WARMUP, check=lambda _: None, device=world.device, inner=1)
            for name, samples in timed.items():
                seconds[name] = [a + b for a, b in zip(seconds[name], samples.raw, strict=True)]
    return [a / b for a, b in zip(seconds["on"], seconds["off"], strict=True)]
