"""How long a training step takes and what it sends, ours beside torch's own: `python -m parallel.bench`.

On a CPU: data parallelism, FSDP, tensor parallelism, pipelines (bench_layouts.py), collectives (bench_collectives.py);
ours and torch's by turns in the same processes, on gloo, one thread a rank. With more ranks than cores only the bytes
mean something. With --device cuda, one process: what FSDP and tensor parallelism cost over plain (bench_one.py).
Results go to results/parallel/. Refused: timing what does not compute the same as one process.
"""

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from common import cli
from common.cli import UserError
from common.dist import spawn
from common.results import save_result
from minigpt.bench import GPT2_124M
from parallel import bench_collectives, bench_layouts
from parallel.bench_contest import QUICK, WORKLOAD
from parallel.bench_one import bench_one

TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class BenchConfig:
    what: Literal["all", "steps", "collectives"] = field(default="all", metadata={"help": "which part, on a CPU"})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "cuda: a world of one, beside plain"})
    ranks: int = field(default=2, metadata={"help": "ranks whose times count: as many as there are cores, at most"})
    more_ranks: int = field(default=4, metadata={"help": "for bytes, with a third of the rounds; 0 for none"})
    rounds: int = field(default=12, metadata={"help": "samples of each contestant, taken in turn"})
    batch: int = field(default=16, metadata={"help": "sequences in a step on CUDA"})
    quick: bool = field(default=False, metadata={"help": "tiny model and messages, to see that it runs"})
    out: Path = field(default=Path("results"), metadata={"help": "folder of the result files"})

    def __post_init__(self) -> None:
        for name, least in (("ranks", 2), ("rounds", 1), ("batch", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {least}")
        for name in ("ranks", "more_ranks"):
            if (ranks := getattr(self, name)) not in (0, 2, 4):
                raise ValueError(f"{name} {ranks}: expected 2 or 4, which divide the heads, layers and rows")


def measure(rank: int, ranks: int, config: BenchConfig) -> dict[str, list[dict[str, Any]]]:
    """All that is measured with so many ranks; for spawn. Rank 0 prints each row as it comes."""
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has new names for collectives, 2.11 has only the old
    torch.set_num_threads(1)
    rounds = config.rounds if ranks == config.ranks else max(1, config.rounds // 3)
    found: dict[str, list[dict[str, Any]]] = {}
    if config.what != "collectives":
        found["steps"] = []
        for group in bench_layouts.GROUPS:
            rows = bench_layouts.measure(rank, ranks, group, QUICK if config.quick else WORKLOAD, rounds)
            found["steps"] += rows
            _print(rows, rank == 0)
    if config.what != "steps":
        sizes = bench_collectives.QUICK_SIZES if config.quick else bench_collectives.SIZES
        found["collectives"] = bench_collectives.measure(rank, ranks, sizes, rounds)
        _print(found["collectives"], rank == 0)
    return found


def on_cpu(config: BenchConfig) -> list[Path]:
    if not Path("/proc/net/dev").exists():
        raise UserError("device cpu: the bytes are counted by Linux, in /proc/net/dev, which this machine has not")
    together: dict[str, list[dict[str, Any]]] = {}
    for ranks in dict.fromkeys((config.ranks, config.more_ranks)):
        if ranks:
            for name, rows in spawn(measure, ranks, config, timeout_s=TIMEOUT_S)[0].items():
                together.setdefault(name, []).extend(rows)
    return [save_result("parallel", name, rows, config=config, root=config.out) for name, rows in together.items()]


def on_gpu(config: BenchConfig) -> list[Path]:
    if not torch.cuda.is_available():
        raise UserError("device cuda: this machine has no CUDA device")
    shape = replace(GPT2_124M, layers=2) if config.quick else GPT2_124M
    rows = bench_one(shape, config.batch, config.rounds, torch.device("cuda"), torch.bfloat16)
    _print(rows)
    return [save_result("parallel", "one_gpu", rows, config=config, root=config.out)]


def _print(rows: list[dict[str, Any]], here: bool = True) -> None:
    if here:
        for row in rows:
            shown = ((key, value) for key, value in row.items() if isinstance(value, str | int | float))
            print("  ".join(f"{k} {v:,.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown), flush=True)


def main() -> None:
    config = cli.parse(BenchConfig, prog=cli.program(), description="step times and bytes beside torch's parallelism")
    for path in on_cpu(config) if config.device == "cpu" else on_gpu(config):
        print(path)


if __name__ == "__main__":
    cli.run(main)
