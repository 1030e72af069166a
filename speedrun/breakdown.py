"""Where the time of a step goes, beside what it computes: `python -m speedrun.breakdown --preset smoke --steps 20`.

Runs some steps of a preset in a temporary folder and prints a table: part, ms, share, FLOPs, and of which part of the
machine's own matrix product that is; below it the MFU of the step and what a perfect one would take. Saves
results/speedrun/breakdown_<machine>_<date>.json and breakdown.png beside it. Under torchrun the parts are rank 0's.
Refused: more steps than the preset has.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from common import cli
from common.dist import World, finish, init_from_env
from common.results import save_result
from common.timing import copy_bandwidth, gemm_peak
from minigpt.batches import Prefetcher
from minigpt.optim import POLAR_STEPS
from speedrun.config import RaceConfig
from speedrun.loss import compiling, gradient_ahead
from speedrun.optim import share
from speedrun.presets import PRESETS, choose_preset, has_compiler, over
from speedrun.schedule import Plan, plan
from speedrun.spent import OTHER, PARTS, draw
from speedrun.state import Run, optimizers
from speedrun.train import batches, change, gradients, prepare, update, wait_for, warm_up

WARM = 3  # steps that are not counted


# ---- what a step computes and moves ----------------------------------------------------------------------------------


def flops_of(run: Run, now: Plan) -> dict[str, int]:
    """FLOPs of this rank's step by part: those of num_flops_per_token, one third of them forward, and Muon's.

    Where the loss computes the head's gradients in the forward pass, they count there. What is not a matrix product
    (softmax, norms, AdamW) counts nothing, as in every MFU.
    """
    tokens = now.rows * now.context // run.world.world_size
    total = tokens * run.model.num_flops_per_token(now.context, now.window)
    head = 2 * tokens * run.model.config.vocab_size * run.model.config.width
    ahead = 2 * head if gradient_ahead(run.config, run.world.device) else 0
    forward = total // 3 + ahead
    return {"forward": forward, "backward": total - forward, "optimizer": muon_flops(run)}


def muon_flops(run: Run) -> int:
    """Of the matrices that this rank owns."""
    total = 0
    for _, same in run.muon.stacks if run.muon is not None else ():
        first, last = share(len(same), run.comm)
        total += (last - first) * polar_flops(*same[0].shape)
    return total


def polar_flops(R: int, C: int) -> int:
    """Of `orthogonalize` for one matrix, with r <= c its sides: in each step X X' and P X, 2 r^2 c each, and the square
    of an r by r matrix, 2 r^3."""
    r, c = min(R, C), max(R, C)
    return len(POLAR_STEPS) * (4 * r * r * c + 2 * r**3)


def bytes_of(run: Run) -> dict[str, int]:
    """Of this rank: weights, gradients (one for each weight, in its dtype), and what its optimizers remember."""
    weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
    states = 0
    for optimizer in optimizers(run):
        state = optimizer.state if optimizer is run.muon else optimizer.optimizer.state
        tensors = [value for values in state.values() for value in values.values() if torch.is_tensor(value)]
        states += sum(value.numel() * value.element_size() for value in tensors)
    return {"weights": weights, "gradients": weights, "states": states}


def bytes_moved(sizes: Mapping[str, int], ranks: int = 1) -> float:
    """What a step has to move at least: both passes read the weights, the backward pass writes the gradients, the
    update reads those that this rank owns and reads and writes their weights and states."""
    update = (sizes["gradients"] + 2 * sizes["weights"]) / ranks + 2 * sizes["states"]
    return 2 * sizes["weights"] + sizes["gradients"] + update


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(config: RaceConfig, world: World, steps: int) -> tuple[Run, Plan, list[dict[str, float]]]:
    """`steps` steps of a race's first kind, after some to warm up, each as seconds by part; and the run."""
    if not 1 <= steps <= config.steps - WARM:
        raise ValueError(f"steps {steps}: expected 1 to {config.steps - WARM}, those of the preset less {WARM}")
    now = plan(0, config)
    with TemporaryDirectory() as folder:
        run, _ = prepare(replace(config, folder=Path(folder) / "run", minutes=0.0, resume=False), world)
    change(run, now)
    make = batches(run)
    ahead = Prefetcher(lambda _: make(0), world.device, depth=2 if config.prefetch else 0)
    rows = []
    with ahead, compiling(config, world.device):
        warm_up(run, now, *ahead.next(0))
        for step in range(WARM + steps):
            run.spent.begin()
            with run.spent("data"):
                batch_of_rank = ahead.next(step)
            gradients(run, now, *batch_of_rank)
            with run.spent("optimizer"):
                update(run, now)
            wait_for(world.device)
            rows.append(run.spent.take())
    return run, now, rows[WARM:]


def table(
    rows: Sequence[Mapping[str, float]], flops: Mapping[str, int], peak: float, bandwidth: float, moved: float
) -> list[dict[str, Any]]:
    """One row for each part and one for the whole "step": mean ms, share, FLOPs, FLOP/s and their share of the peak; in
    the last what a perfect step would take in ms. Means, since they add up; `samples_ms` has every step."""
    whole = [sum(row.values()) for row in rows]
    columns = {part: [row[part] for row in rows] for part in (*PARTS, OTHER)} | {"step": whole}
    flops = {**flops, "step": sum(flops.values())}
    found = []
    for part, seconds in columns.items():
        mean = statistics.fmean(seconds)
        speed = flops.get(part, 0) / mean if mean else 0.0
        found.append(
            {
                "part": part,
                "ms": 1e3 * mean,
                "share": mean / statistics.fmean(whole),
                "flops": flops.get(part, 0),
                "flops_per_s": speed,
                "of_peak": speed / peak,
                "samples_ms": [1e3 * value for value in seconds],
            }
        )
    passes = flops["forward"] + flops["backward"]
    found[-1] |= {
        "mfu": passes / peak / statistics.fmean(whole),
        "peak_flops": peak,
        "bytes_per_s": bandwidth,
        "bytes": moved,
        "perfect_matmul_ms": 1e3 * flops["step"] / peak,
        "perfect_memory_ms": 1e3 * moved / bandwidth,
    }
    return found


def as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'part':14}{'ms':>9}{'share':>8}{'GFLOP':>10}{'GFLOP/s':>10}{'of peak':>9}"]
    for row in rows:
        line = f"{row['part']:14}{row['ms']:9.2f}{row['share']:8.1%}"
        if row["flops"]:
            line += f"{row['flops'] / 1e9:10.2f}{row['flops_per_s'] / 1e9:10,.0f}{row['of_peak']:9.1%}"
        lines.append(line)
    step = rows[-1]
    ideal = step["perfect_matmul_ms"] + step["perfect_memory_ms"]
    lines += [
        f"MFU            {step['mfu']:.1%} (forward and backward; Muon's products are not in it)",
        f"a perfect step {step['perfect_matmul_ms']:.2f} ms of products at {step['peak_flops'] / 1e9:,.0f} GFLOP/s"
        f" + {step['perfect_memory_ms']:.2f} ms for {step['bytes'] / 1e6:,.1f} MB of weights, gradients and states at "
        f"{step['bytes_per_s'] / 1e9:,.1f} GB/s = {ideal:.2f} ms, {ideal / step['ms']:.1%} of this one",
    ]
    return "\n".join(lines)


# ---- the program -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BreakdownConfig:
    preset: str = field(default="", metadata={"help": "which recipe; empty: the one for this machine"})
    steps: int = field(default=20, metadata={"help": "steps that are timed"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    out: Path = field(default=Path("results"), metadata={"help": "where results are kept"})

    def __post_init__(self) -> None:
        if self.preset and self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r}: expected one of {', '.join(PRESETS)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device {self.device!r}: expected auto, cpu or cuda")


def breakdown(asked: BreakdownConfig, world: World) -> tuple[list[dict[str, Any]], list[Path]]:
    """The rows of the table and, on rank 0, the files written."""
    preset = asked.preset or choose_preset("", world.device.type == "cuda", has_compiler())
    config = replace(over(PRESETS[preset], world.world_size), track="")  # no race: any device will do
    run, now, seconds = measure(config, world, asked.steps)
    peak = gemm_peak(str(run.dtype).removeprefix("torch."), world.device)
    moved = bytes_moved(bytes_of(run), world.world_size)
    rows = table(seconds, flops_of(run, now), peak, copy_bandwidth(world.device), moved)
    if world.rank:
        return rows, []
    about = {"preset": preset, "steps": asked.steps, "ranks": world.world_size, "threads": torch.get_num_threads()}
    about |= {"dtype": str(run.dtype).removeprefix("torch."), "compile": config.compile, "device": world.device.type}
    result = save_result("speedrun", "breakdown", rows, config=about, root=asked.out)
    parts = {row["part"]: row["ms"] for row in rows[:-1]}
    picture = draw(asked.out / "speedrun" / "breakdown.png", parts, f"A step of the preset {preset}")
    return rows, [result, picture]


def main() -> None:
    asked = cli.parse(BreakdownConfig, prog=cli.program(), description="where the time of a step goes")
    world = init_from_env(None if asked.device == "auto" else asked.device)
    try:
        rows, files = breakdown(asked, world)
    finally:
        finish()
    if world.rank == 0:
        print(as_lines(rows))
        for path in files:
            print(path)


if __name__ == "__main__":
    cli.run(main)
