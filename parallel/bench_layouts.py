"""Training steps of each kind of parallelism, ours beside torch's: the same GPT, weights, rows, ranks and optimizer.

Ours is what `python -m parallel.train` runs (parallel/assembly.py), torch's is in bench_peers.py. All contestants of a
group live in the same processes and take turns. Bytes are counted, and stand beside the formulas of the README.
Refused: timing contestants that do not compute what one process does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel import bench_peers as peers
from parallel.assembly import Assembly
from parallel.bench_contest import MICROBATCHES, Contestant, Workload, check, one_process, world_of
from parallel.bench_rounds import alternate, ratio


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    make: Callable[[Workload, int, int], Contestant]  # workload, rank, ranks
    formula: Callable[[Workload, int], float]  # workload, ranks -> bytes that a mean rank sends in a step
    beside: str | None = None  # the entry of the same group that it is measured against


def ours(axis: str, **options) -> Callable[[Workload, int, int], Contestant]:
    return lambda workload, rank, ranks: assembled(workload.with_layout(**{axis: ranks}, **options), rank, ranks)


def assembled(workload: Workload, rank: int, ranks: int) -> Contestant:
    assembly = Assembly(workload.config, workload.vocabulary, world_of(rank, ranks))
    strategy, data = assembly.strategy, assembly.data
    values, pieces = workload.values(), strategy.pieces()
    with torch.no_grad():
        for name, p in strategy.parameters().items():
            p.copy_(pieces[name].of(values[name]).reshape(p.shape))
    strategy.stepped()
    rows = tuple(x.chunk(data.size)[data.rank] for x in workload.rows())

    def gradients() -> Tensor | None:
        loss = assembly.gradients(*rows)
        return loss if assembly.last else None

    def found():
        return [(name, p.grad, strategy.pieces()[name]) for name, p in strategy.parameters().items()]

    return Contestant(gradients, assembly.apply, found)


def torchs(make: Callable[..., Contestant], **options) -> Callable[[Workload, int, int], Contestant]:
    return lambda workload, rank, ranks: make(workload, **options)


# ---- bytes by the formulas: float32, S bytes of all parameters, W ranks ----
def parameter_bytes(workload: Workload) -> tuple[int, int]:
    """Of the blocks, and of all."""
    sizes = {name: 4 * p.numel() for name, p in workload.values().items()}
    return sum(size for name, size in sizes.items() if name.startswith("blocks.")), sum(sizes.values())


def of_parameters(times: float, of_blocks: float = 0.0) -> Callable[[Workload, int], float]:
    """(W-1)/W (times S + of_blocks S of the blocks)."""

    def formula(workload: Workload, ranks: int) -> float:
        blocks, everything = parameter_bytes(workload)
        return (ranks - 1) / ranks * (times * everything + of_blocks * blocks)

    return formula


def of_activations(all_reduces: float) -> Callable[[Workload, int], float]:
    """Tensor parallelism: so many sums of x_BTC, in all-reduces, for each branch each way, and for the embedding and
    the head; besides three numbers a token for the loss."""

    def formula(workload: Workload, ranks: int) -> float:
        config = workload.config
        tokens = config.batch * config.context
        sums = (4 * config.layers + 2) * all_reduces * config.width + 3
        return 2 * (ranks - 1) / ranks * 4 * tokens * sums

    return formula


def of_boundaries(workload: Workload, ranks: int) -> float:
    """A pipeline: x_BTC of the whole batch over each of W - 1 boundaries, and its gradient back."""
    config = workload.config
    return 2 * (ranks - 1) / ranks * 4 * config.batch * config.context * config.width


# gloo does a reduce-scatter as an all-reduce: once (W-1)/W S more wherever there is one.
GROUPS: dict[str, list[Entry]] = {
    "data parallelism": [
        Entry("ours", ours("dp"), of_parameters(2), "torch DDP"),
        Entry("ours, our collectives", ours("dp", collectives="ours"), of_parameters(2), "torch DDP"),
        Entry("ours, ZeRO-2", ours("fsdp", zero=2), of_parameters(3), "torch DDP"),
        Entry("ours, ZeRO-2, our collectives", ours("fsdp", zero=2, collectives="ours"), of_parameters(2),
              "torch DDP"),
        Entry("torch DDP", torchs(peers.ddp), of_parameters(2)),
    ],
    "FSDP": [
        Entry("ours", ours("fsdp"), of_parameters(3, 1), "torch FSDP2"),
        Entry("ours, our collectives", ours("fsdp", collectives="ours"), of_parameters(2, 1), "torch FSDP2"),
        Entry("torch FSDP2", torchs(peers.fsdp2), of_parameters(3, 1)),
    ],
    "tensor parallelism": [
        Entry("ours", ours("tp"), of_activations(1), "torch DTensor"),
        Entry("torch DTensor", torchs(peers.tensor_parallel), of_activations(1)),
        Entry("ours, sequence parallel", ours("tp", sequence_parallel=True), of_activations(1.5),
              "torch DTensor, sequence parallel"),
        Entry("ours, sequence parallel, our collectives", ours("tp", sequence_parallel=True, collectives="ours"),
              of_activations(1), "torch DTensor, sequence parallel"),
        Entry("torch DTensor, sequence parallel", torchs(peers.tensor_parallel, sequence_parallel=True),
              of_activations(1.5)),
    ],
    "pipeline": [
        Entry("ours, 1f1b", ours("pp", pipeline="1f1b", microbatches=MICROBATCHES), of_boundaries,
              "torch Schedule1F1B"),
        Entry("torch Schedule1F1B", torchs(peers.pipeline, schedule="1f1b"), of_boundaries),
        Entry("ours, gpipe", ours("pp", pipeline="gpipe", microbatches=MICROBATCHES), of_boundaries,
              "torch ScheduleGPipe"),
        Entry("torch ScheduleGPipe", torchs(peers.pipeline, schedule="gpipe"), of_boundaries),
        Entry("ours, zb-h1", ours("pp", pipeline="zb-h1", microbatches=MICROBATCHES), of_boundaries,
              "torch Schedule1F1B"),
    ],
}  # fmt: skip


def measure(rank: int, ranks: int, group: str, workload: Workload, rounds: int) -> list[dict[str, Any]]:
    """The rows of one group, on each of `ranks` ranks. Raises ValueError for one that computes something else."""
    entries = {entry.name: entry for entry in GROUPS[group]}
    contestants = {name: entry.make(workload, rank, ranks) for name, entry in entries.items()}
    truth = one_process(workload)
    errors = {name: check(name, contestant, truth) for name, contestant in contestants.items()}
    found = alternate({name: contestant.step for name, contestant in contestants.items()}, rounds=rounds)
    tokens = workload.config.batch * workload.config.context
    parameters = parameter_bytes(workload)[1] // 4
    rows = []
    for name, entry in entries.items():
        mine, formula = found[name], entry.formula(workload, ranks)
        rows.append({
            "group": group, "case": name, "ranks": ranks, "parameters": parameters, "tokens": tokens,
            "step_ms": 1e3 * mine.times.median, "beside": entry.beside,
            "vs_torch": ratio(mine, found[entry.beside]) if entry.beside else None,
            "sent_mb": mine.bytes / 1e6, "formula_mb": formula / 1e6, "vs_formula": mine.bytes / formula,
            "gradient_error": errors[name], "samples": mine.times, "sent_bytes": list(mine.sent),
        })  # fmt: skip
    return rows
