"""A GPT put together on a layout: this rank's stages, who keeps its parameters together, the groups between them.

One place where tensor parallelism, the pipeline, data parallelism in its four kinds, activation checkpointing and the
optimizers meet; each of them knows nothing of the others. Ranks along tp and pp work on the same rows, ranks along dp
and fsdp on rows of their own. Refused: what parallel/config.py refuses; sizes that an axis does not divide.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.dist import World
from minigpt.model import GPT
from minigpt.optim import Muon, Updates, group_names, optimizers_of
from minigpt.trainer import choose_dtype
from parallel.activation import apply_activation_policy
from parallel.comm import Comm, Listener, make_comm
from parallel.config import ParallelConfig
from parallel.data_parallel import DATA_PARALLEL
from parallel.deferred import DeferrableLinear
from parallel.fsdp import FSDP
from parallel.memory import Plan
from parallel.mesh import Mesh
from parallel.model import StageGPT, initialise, materialise
from parallel.muon_parallel import TensorParallelMuon
from parallel.pipeline import Pipeline, chunk_layers, make_back, tied_groups
from parallel.random_state import seed_ranks
from parallel.strategy import Strategy, clip, sum_partial
from parallel.tensor_parallel import parallelise
from parallel.vocab_parallel import gather_logits
from parallel.zero import Zero1, Zero2


class Assembly:
    """`dtype` is that of the parameters, float32 if not given; config.dtype bfloat16 means autocast as in stage 2."""

    def __init__(
        self, config: ParallelConfig, vocab_size: int, world: World, listeners: Sequence[Listener] = (),
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        self.config, self.world = config, world
        self.mesh = Mesh(config.layout, world.rank, world.world_size)
        self.model_config = config.model_config(vocab_size)
        self.dtype = choose_dtype(config.dtype, world.device)
        self.listeners = list(listeners)
        if config.collectives == "ours" and world.backend == "nccl" and sum(n > 1 for n in config.layout.sizes) > 1:
            raise ValueError(
                f"collectives ours on NCCL with {config.layout}: expected one axis, or torch: each group has a thread "
                "that starts its calls, and NCCL wants one order of all calls"
            )
        seed_ranks(self.mesh, config.seed)
        self.all = self.comm("pp", "dp", "fsdp", "cp", "ep", "tp")
        self.data, self.shard = self.comm("dp", "fsdp", gradients=True), self.comm("fsdp", gradients=True)
        self.replicas = self.comm("dp", gradients=True)
        self.tp, self.pp = self.comm("tp"), self.comm("pp")
        self.partial: dict[str, Comm] = {}
        self.stages = self._stages()
        self.strategy = self._strategy(dtype)
        self.pipeline = Pipeline(
            self.stages, self.pp, schedule=config.pipeline, microbatches=config.parts,
            sequence_parallel=config.tp if config.sequence_parallel else 1,
            back=make_back(self.mesh, config.collectives, self.listeners),
        ) if config.pp > 1 else None  # fmt: skip
        self.optimizers = self._optimizers(dtype or self.dtype)

    def comm(self, *axes: str, gradients: bool = False) -> Comm:
        """Of a slice of the mesh. What gradients travel through may be compressed, and go by way of machines."""
        config, group, options = self.config, self.mesh.group(*axes), {}
        if gradients and config.collectives == "ours":
            options["compress"] = None if config.compress == "none" else config.compress
            if size := config.ranks_per_node:
                near = sum(rank // size == group.ranks[0] // size for rank in group.ranks)  # on one machine
                options["ranks_per_node"] = near if group.size % near == 0 else 0
        return make_comm(group, config.collectives, self.listeners, **options)

    @property
    def last(self) -> bool:
        """Whether this rank sees the loss."""
        return self.mesh.place["pp"] == self.config.pp - 1

    def _stages(self) -> list[StageGPT]:
        config, pp = self.config, self.config.pp
        mine = chunk_layers(config.layers, self.mesh.place["pp"], pp, config.chunks)
        linear = {"linear_cls": DeferrableLinear} if config.pipeline == "zb-h1" and pp > 1 else {}
        stages = [StageGPT(self.model_config, layers, **linear) for layers in mine]
        for stage in stages:
            if config.tp > 1:
                self.partial |= parallelise(
                    stage, self.mesh, self.tp, sequence_parallel=config.sequence_parallel, overlap=config.overlap,
                    keep_products=config.recompute == "selective",
                )  # fmt: skip
            self._set_activations(stage)
        self.partial |= tied_groups(self.mesh, self.model_config, config.collectives, self.listeners)
        return stages

    def _set_activations(self, stage: StageGPT) -> None:
        config, budget = self.config, None
        rows = config.batch // (self.data.size * config.parts)
        plan = Plan(
            data=config.fsdp, tp=config.tp, pp=config.pp, sequence_parallel=config.sequence_parallel, rows=rows,
            T=config.context, micro_batches=config.parts, number=2 if self.dtype == torch.bfloat16 else 4,
            fused=self.world.device.type == "cuda", pipeline=config.pipeline if config.pp > 1 else "1f1b",
        )  # fmt: skip
        if config.recompute == "budget":
            budget = int(config.activation_mb * 2**20)
        apply_activation_policy(
            stage, config.recompute, budget, plan=plan if budget is not None else None, index=self.mesh.place["pp"]
        )

    def _strategy(self, dtype: torch.dtype | None) -> Strategy:
        config = self.config
        if config.sharding == 3:
            return FSDP(
                self.stages, self.shard, self.replicas, config=self.model_config, seed=config.seed, dtype=dtype,
                param_dtype=torch.bfloat16 if self.dtype == torch.bfloat16 else None,
                reshard_after_forward=config.reshard, prefetch=config.prefetch, offload=config.offload,
                device=self.world.device,
            )  # fmt: skip
        for stage in self.stages:
            materialise(stage, self.world.device, dtype)
        initialise(self.stages, self.model_config, config.seed)
        if config.sharding:
            zero = {1: Zero1, 2: Zero2}[config.sharding]
            whole = self._groups()["matrices"] if config.optimizer == "muon" else ()
            return zero(self.stages, self.shard, self.replicas, whole=whole, bucket_mb=config.bucket_mb)
        kind = config.data_parallel if self.data.size > 1 else "naive"  # which copies nothing where nobody else is
        return DATA_PARALLEL[kind](self.stages, self.data, bucket_mb=config.bucket_mb)

    def whole(self) -> GPT:
        """The model of one process, without storage."""
        with torch.device("meta"):
            return GPT(self.model_config, seed=None)

    def _groups(self) -> dict[str, list[str]]:
        here = {name for stage in self.stages for name, _ in stage.named_parameters()}
        return {kind: [name for name in names if name in here] for kind, names in group_names(self.whole()).items()}

    def _optimizers(self, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
        parameters = self.strategy.parameters()
        names = {kind: [name for name in names if name in parameters] for kind, names in self._groups().items()}
        muon = partial(TensorParallelMuon, comm=self.tp) if self.config.tp > 1 else Muon
        return optimizers_of(parameters, names, self.config, dtype, Updates(muon_cls=muon))

    # ---- a step ----
    def gradients(self, tokens_BT: Tensor, targets_BT: Tensor, **options: Any) -> Tensor:
        """Leaves the gradient of the mean loss over all data ranks in strategy.parameters(); the mean loss of this
        rank's rows, and zero on a rank that sees none. Options are StageGPT.forward's."""
        if self.pipeline is not None:
            with self.strategy.no_sync(), self._autocast():
                loss = self.pipeline.run(tokens_BT, targets_BT, **options)
        else:
            loss = self._accumulate(tokens_BT, targets_BT, options)
        self.strategy.finish()
        sum_partial(self.strategy, self.partial)
        return loss if self.last else torch.zeros((), dtype=torch.float32, device=self.world.device)

    def _accumulate(self, tokens_BT: Tensor, targets_BT: Tensor, options: dict[str, Any]) -> Tensor:
        parts = list(zip(*(rows_BT.chunk(self.config.parts) for rows_BT in (tokens_BT, targets_BT)), strict=True))
        total = None
        for number, (part_BT, wanted_BT) in enumerate(parts):
            # ZeRO-2 and 3 send what each part gives: to add it up would need the whole gradient's memory.
            wait = self.config.sharding < 2 and number < len(parts) - 1
            with self.strategy.no_sync() if wait else nullcontext():
                with self._autocast():
                    loss = self.stages[0](None, part_BT, wanted_BT, **options) / len(parts)
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        return total

    def clip(self, most: float) -> float:
        """The global norm of the gradient before it is clipped to `most` (0: not)."""
        return clip(self.strategy, most, over=(self.tp, self.pp))

    def apply(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.strategy.stepped()
        self.strategy.zero_grad()

    # ---- what all ranks want to know ----
    @torch.no_grad()
    def logits(self, tokens_BT: Tensor, separator: int | None = None) -> Tensor:
        """Whole logits_BTV where this rank sees them, else zeros of that shape that take no memory."""
        with self._autocast():
            if self.pipeline is not None:
                logits_BTV = self.pipeline.evaluate(tokens_BT, separator=separator)
            else:
                logits_BTV = self.stages[0](None, tokens_BT, separator=separator)
        if not self.last:
            V = self.model_config.vocab_size
            return torch.zeros((), device=self.world.device).expand(*tokens_BT.shape, V)
        return gather_logits(logits_BTV, self.tp) if self.config.tp > 1 else logits_BTV

    def total(self, values: Tensor) -> Tensor:
        """The sum over data ranks of what their rows gave: each counted once, where the loss is seen."""
        counts = self.last and self.mesh.place["tp"] == 0
        total = (
            values.detach().double() if counts else torch.zeros(values.shape, dtype=torch.float64, device=values.device)
        )
        total = total.contiguous()
        self.all.all_reduce(total, tag="totals")
        return total

    def _autocast(self):
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
