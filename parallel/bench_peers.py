"""torch's own parallelism on stage 2's GPT: DDP, FSDP2, DTensor's tensor parallelism, torch.distributed.pipelining.

Each is set up as its documentation advises, with the options that make it fast here: gradients as views of their
buckets, one all-reduce for query, key and value together, a vocabulary in parts under loss_parallel. float32, CPU.
Refused: nothing of its own; bench_contest.Workload leaves out what DTensor cannot cut without help.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from minigpt.model import mean_cross_entropy
from parallel.bench_contest import MICROBATCHES, Contestant, Rows, Workload, backward, with_optimizer
from parallel.model import StageGPT, materialise, split_layers


def own_rows(workload: Workload) -> Rows:
    """This rank's, where each has rows of its own."""
    tokens_BT, targets_BT = workload.rows()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return tokens_BT.chunk(ranks)[rank], targets_BT.chunk(ranks)[rank]


def ddp(workload: Workload) -> Contestant:
    model = workload.gpt()
    wrapped = DistributedDataParallel(
        model, bucket_cap_mb=workload.config.bucket_mb, gradient_as_bucket_view=True, broadcast_buffers=False
    )
    return with_optimizer(dict(model.named_parameters()), workload, backward(wrapped, own_rows(workload)))


def fsdp2(workload: Workload) -> Contestant:
    model = workload.gpt()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return with_optimizer(dict(model.named_parameters()), workload, backward(model, own_rows(workload)))


def tensor_parallel(workload: Workload, sequence_parallel: bool = False) -> Contestant:
    model = workload.gpt()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    between = Shard(1) if sequence_parallel else Replicate()  # x_BTC between the branches
    for block in model.blocks:
        _split_heads(block.attention, mesh.size())
        parallelize_module(block, mesh, _block_plan(between, sequence_parallel))
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, ends | ({"norm": SequenceParallel()} if sequence_parallel else {}))
    rows = workload.rows()

    def gradients() -> Tensor:
        with loss_parallel():
            loss = model(*rows)
            loss.backward()
        return loss.detach().full_tensor()

    return with_optimizer(dict(model.named_parameters()), workload, gradients)


def _split_heads(attention: nn.Module, ranks: int) -> None:
    config = attention.config
    attention.config = replace(
        config, heads=config.heads // ranks, kv_heads=config.kv_heads // ranks, head_width=config.key_width
    )


def _block_plan(between: Replicate | Shard, sequence_parallel: bool) -> dict:
    plan = {
        "attention": PrepareModuleInput(
            input_layouts=(between, None), desired_input_layouts=(Replicate(), None)
        ),
        "mlp": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        "attention.output": RowwiseParallel(output_layouts=between),
        "mlp.down": RowwiseParallel(output_layouts=between),
    }  # fmt: skip
    plan |= {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
    plan |= {"mlp.up": ColwiseParallel()}
    return plan | (dict.fromkeys(("attention_norm", "mlp_norm"), SequenceParallel()) if sequence_parallel else {})


class _Stage(nn.Module):
    """A StageGPT as torch's pipelines call it: x or the tokens, and the tokens for all."""

    def __init__(self, stage: StageGPT):
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor, tokens_BT: Tensor) -> Tensor:
        return self.stage(None if self.stage.first else x, tokens_BT)


PIPELINES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


def pipeline(workload: Workload, schedule: str) -> Contestant:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    stage = StageGPT(workload.model, split_layers(workload.config.layers, ranks)[rank])
    materialise(stage)
    stage.load_state_dict({name: x for name, x in workload.values().items() if name in stage.state_dict()})
    runner = PIPELINES[schedule](
        PipelineStage(_Stage(stage), rank, ranks, torch.device("cpu")), MICROBATCHES,
        loss_fn=mean_cross_entropy,
    )  # fmt: skip
    tokens_BT, targets_BT = workload.rows()
    inputs = (tokens_BT,) if stage.first else ()

    def gradients() -> Tensor | None:
        losses: list[Tensor] = []
        wanted = {"target": targets_BT, "losses": losses} if stage.last else {}
        runner.step(*inputs, tokens_BT=tokens_BT, return_outputs=False, **wanted)
        return torch.stack(losses).mean().detach() if stage.last else None

    return with_optimizer(dict(stage.named_parameters()), workload, gradients)
