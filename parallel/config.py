"""What a parallel training run is: stage 2's fields, the axes of the device grid, and how each of them works.

Refused, before any work: axes whose code comes later, schedules and options that contradict the axes, Muon where its
matrices would be cut into flat parts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt.train_config import FREE as FREE_OF_STAGE_2
from minigpt.train_config import PRESETS as STAGE_2
from minigpt.train_config import TrainConfig, option
from parallel import schedules
from parallel.mesh import Layout


@dataclass(frozen=True, slots=True)
class ParallelConfig(TrainConfig):
    # the grid
    pp: int = option(1, "pipeline stages")
    dp: int = option(1, "replicas that average gradients")
    fsdp: int = option(1, "ranks that share parameters, gradients or optimizer states, see --zero")
    cp: int = option(1, "context parallelism: not built yet, 1")
    ep: int = option(1, "expert parallelism: not built yet, 1")
    tp: int = option(1, "ranks that share each matrix")
    # data parallelism
    zero: Literal[0, 1, 2, 3] = option(
        3, "what fsdp ranks share: 1 optimizer states, 2 gradients too, 3 parameters too"
    )
    data_parallel: Literal["naive", "flat", "overlapped"] = option("overlapped", "how gradients are averaged, zero 0")
    bucket_mb: float = option(4.0, "gradients travel in buckets of this many MiB")
    reshard: bool = option(True, "zero 3: give a block's parameters away after its forward pass")
    prefetch: int = option(1, "zero 3: blocks whose parameters are fetched ahead")
    offload: bool = option(False, "zero 3: optimizer states in the CPU's memory")
    # tensor parallelism
    sequence_parallel: bool = option(False, "between matrices each tp rank has its part of the tokens")
    overlap: bool = option(False, "tp talks while weight gradients are computed")
    # the pipeline
    pipeline: Literal["gpipe", "1f1b", "interleaved-1f1b", "zb-h1"] = option("1f1b", "order of the pipeline's work")
    microbatches: int = option(0, "parts of a rank's rows in the pipeline; 0 for as many as it has stages")
    chunks: int = option(1, "stages of an interleaved pipeline that each rank has")
    # memory, links, looking
    recompute: Literal["none", "full", "selective", "budget"] = option("none", "activations computed twice, not kept")
    activation_mb: float = option(0.0, "recompute budget: what the activations of a step may take, in MiB")
    collectives: Literal["torch", "ours"] = option("torch", "torch.distributed's, or those of parallel/collectives.py")
    compress: Literal["none", "bf16", "fp8"] = option("none", "gradients on the wire, with error feedback; ours only")
    ranks_per_node: int = option(0, "ours: sums go inside a machine first where a group spans several; 0: one machine")
    async_save: bool = option(True, "checkpoints are written while training goes on")
    timeout_s: float = option(120.0, "a collective that takes longer ends the run with a report of who waits where")
    checked: bool = option(False, "every collective first compares what the ranks call; slow")
    trace_steps: int = option(0, "record this many steps, from the third on, for python -m parallel.trace")

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        for name in ("cp", "ep"):
            if getattr(self, name) != 1:
                raise ValueError(
                    f"{name} {getattr(self, name)}: expected 1, its code comes in a later stage of the work"
                )
        layout = self.layout  # checks the axes
        for name in ("bucket_mb", "timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)}: expected a positive number")
        for name in ("prefetch", "microbatches", "trace_steps", "activation_mb", "ranks_per_node"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or more")
        if self.compile or self.activation_checkpointing:
            name = "compile" if self.compile else "activation_checkpointing"
            raise ValueError(f"{name}: not in stage 4; --recompute is its activation checkpointing")
        self._check_pipeline(layout)
        if (self.recompute == "budget") != (self.activation_mb > 0):
            raise ValueError(f"recompute {self.recompute!r} with activation_mb {self.activation_mb:g}: expected both "
                             f"--recompute budget and --activation-mb, or neither")  # fmt: skip
        if self.recompute == "budget" and self.chunks > 1:
            raise ValueError(f"recompute budget with chunks {self.chunks}: expected 1; full and selective take any")
        if self.sequence_parallel and self.context % self.tp:
            raise ValueError(f"context {self.context} over tp {self.tp}: sequence parallelism wants whole parts")
        if self.offload and self.sharding != 3:
            raise ValueError(
                f"offload with fsdp {self.fsdp} and zero {self.zero}: expected fsdp of 2 or more and zero 3"
            )
        for name in ("heads", "mlp_width"):
            if getattr(self, name) % self.tp:
                raise ValueError(f"{name} {getattr(self, name)} over tp {self.tp}: expected a multiple of {self.tp}")
        if self.kv_heads % self.tp and self.tp % self.kv_heads:
            raise ValueError(
                f"kv_heads {self.kv_heads} over tp {self.tp}: expected a multiple or a divisor of {self.tp}"
            )
        if self.compress != "none" and self.collectives != "ours":
            raise ValueError(f"compress {self.compress!r} with collectives torch: expected --collectives ours")
        if self.optimizer == "muon" and self.sharding == 3:
            raise ValueError("optimizer muon with fsdp and zero 3: its matrices would be flat parts; take zero 1 or 2, "
                             "or --optimizer adamw")  # fmt: skip
        if self.optimizer == "muon" and self.tp > 1 and self.sharding:
            raise ValueError(f"optimizer muon with tp {self.tp} and zero {self.zero}: expected --zero 0 or adamw")

    def _check_pipeline(self, layout: Layout) -> None:
        if self.chunks < 1:
            raise ValueError(f"chunks {self.chunks}: expected at least 1")
        if layout.pp > 1:
            schedules.check(self.pipeline, layout.pp, self.parts, self.chunks)
        elif self.chunks > 1 or self.microbatches:
            raise ValueError(f"chunks {self.chunks} and microbatches {self.microbatches} with pp 1: expected --pp of 2 "
                             f"or more, or neither")  # fmt: skip
        if self.layers < layout.pp * self.chunks:
            raise ValueError(
                f"pp {layout.pp} x chunks {self.chunks}: {self.layers} layers do not reach for as many stages"
            )
        if layout.pp > 1 and self.accumulate > 1:
            raise ValueError(f"accumulate {self.accumulate} with pp {layout.pp}: the micro-batches are its parts")
        shares = layout.dp * layout.fsdp * (self.parts if layout.pp > 1 else self.accumulate)
        if self.batch % shares:
            parts = f"{'microbatches' if layout.pp > 1 else 'accumulate'} {self.parts}"
            ranks = f"dp {layout.dp} x fsdp {layout.fsdp}"
            raise ValueError(f"batch {self.batch} over {ranks} x {parts}: expected a multiple of {shares}")

    @property
    def layout(self) -> Layout:
        return Layout(self.pp, self.dp, self.fsdp, self.cp, self.ep, self.tp)

    @property
    def parts(self) -> int:
        """In how many parts a rank works off its rows."""
        return (self.microbatches or self.pp) if self.pp > 1 else self.accumulate

    @property
    def sharding(self) -> int:
        """The ZeRO stage that is at work: 0 where no ranks share."""
        return self.zero if self.fsdp > 1 else 0


# What may differ between the sittings of a run, since the numbers stay the same up to rounding.
FREE = (
    *FREE_OF_STAGE_2, "pp", "dp", "fsdp", "cp", "ep", "tp", "zero", "data_parallel", "bucket_mb", "reshard", "prefetch",
    "offload", "sequence_parallel", "overlap", "pipeline", "microbatches", "chunks", "recompute", "activation_mb",
    "collectives", "async_save", "timeout_s", "checked", "trace_steps", "ranks_per_node", "accumulate",
    "activation_checkpointing",
)  # fmt: skip


def from_stage_2(config: TrainConfig, **changes) -> ParallelConfig:
    return ParallelConfig(**{name: getattr(config, name) for name in TrainConfig.__dataclass_fields__} | changes)


ADAMW = {"optimizer": "adamw", "learning_rate": 2e-3}  # takes every layout; Muon wants whole matrices
PRESETS = {
    "laptop": from_stage_2(STAGE_2["laptop"], folder=Path("runs/parallel"), **ADAMW),
    "tiny": from_stage_2(STAGE_2["tiny"], folder=Path("runs/parallel-tiny"), dtype="float32", **ADAMW),
}
