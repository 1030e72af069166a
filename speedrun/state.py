"""The state of a race: its optimizers, and its checkpoints, those of stage 2 with the optimizers' states of each rank
beside the weights.

A checkpoint goes on to the same bits on a CPU with as many threads. Refused: another config, architecture, text or
number of ranks, and weights that are not finite.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.cli import UserError
from common.dist import World
from minigpt.checkpoint import (
    Checkpoint,
    bits_depend_on,
    check_architecture,
    differing,
    flatten,
    save_checkpoint,
    unflatten,
)
from minigpt.data import TokenData
from minigpt.model import GPT
from minigpt.optim import group_names
from minigpt.train_config import deciding, plain
from parallel.comm import Comm
from speedrun.config import RaceConfig
from speedrun.documents import DocumentRows
from speedrun.optim import Muon, Rows
from speedrun.spent import Spent
from speedrun.winners import Choice


@dataclass(slots=True)
class Run:
    """All that a step reads and changes; what of it cannot be computed again is in the checkpoints."""

    config: RaceConfig
    world: World
    comm: Comm
    data: TokenData
    model: GPT
    dtype: torch.dtype
    choice: Choice
    byte_lengths_V: Tensor
    spent: Spent
    documents: DocumentRows | None = None
    forward: Callable[..., tuple[Tensor, Tensor]] | None = None  # speedrun/loss.py
    muon: Muon | None = None
    rest: Rows | None = None
    step: int = 0
    seconds: float = 0.0  # in steps, on the clock
    warm_seconds: float = 0.0  # in first passes, off the clock
    bits_per_byte: float = math.nan


def make_optimizers(run: Run) -> None:
    """Muon for the matrices of the blocks, AdamW for the rest; each group keeps its peak as `peak_lr`."""
    config, names, parameters = run.config, group_names(run.model), dict(run.model.named_parameters())
    if run.model.config.tied:  # it is drawn like a head, and has a head's rate
        names["embedding"].remove("embedding.weight")
        names["head"].append("embedding.weight")
    matrices = [parameters[name] for name in names["matrices"]]
    if config.optimizer == "muon":
        options = {"beta2": config.normuon, "weight_decay": config.muon_decay, "cautious": config.cautious}
        run.muon = Muon(matrices, config.muon_lr, config.momentum, dtype=run.dtype, comm=run.comm, **options)
        run.muon.param_groups[0]["peak_lr"] = config.muon_lr
        if config.bf16_weights:
            run.muon.halve()
    peaks = {"embedding": config.embedding_lr, "head": config.head_lr, "rest": config.gain_lr}
    decays = {"rest": 0.0, "embedding": config.embedding_decay}
    groups = []
    for kind, members in names.items():
        if members and (kind != "matrices" or run.muon is None):
            peak = peaks.get(kind) or config.learning_rate
            group = {"params": [parameters[name] for name in members], "lr": peak, "peak_lr": peak}
            groups.append(group | {"weight_decay": decays.get(kind, config.weight_decay)})
    if run.choice.adamw == "torch":
        adamw = partial(torch.optim.AdamW, fused=True)
    else:
        from cuda import optim

        adamw = partial(optim.AdamW, kernels=run.choice.adamw)
    make = partial(adamw, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps)
    run.rest = Rows(groups, make, run.comm)


def optimizers(run: Run) -> list[Muon | Rows]:
    return [optimizer for optimizer in (run.muon, run.rest) if optimizer is not None]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save(run: Run) -> None:
    """A checkpoint as stage 2 reads it, with the optimizers' states of each rank beside the weights."""
    if not all(p.isfinite().all() for p in run.model.parameters()):
        raise UserError(f"weights that are not finite at step {run.step}: stopped; a lower learning rate may help")
    tensors, groups = flatten([optimizer.state_dict() for optimizer in optimizers(run)])
    of_ranks = gathered({name: value.cpu() for name, value in tensors.items()}, run)
    if run.world.rank == 0:
        state = {
            "optimizer_groups": groups,
            "model_config": asdict(run.model.config),
            "train_config": plain(run.config),
            "data_digest": run.data.digest,
            "machine": machine(run),
            "seconds": run.seconds,
            "warm_seconds": run.warm_seconds,
            "bits_per_byte": None if math.isnan(run.bits_per_byte) else run.bits_per_byte,
        }
        weights = {"model": {name: value.float() for name, value in run.model.state_dict().items()}}
        weights |= {f"optimizer{rank}": tensors for rank, tensors in enumerate(of_ranks)}
        save_checkpoint(run.config.folder, run.step, state, weights, run.config.keep)


def check_same(run: Run, checkpoint: Checkpoint) -> None:
    """Raises ValueError naming what differs when config, text or the number of ranks do."""
    path, state = checkpoint.path, checkpoint.state
    if differences := differing(deciding(state["train_config"]), deciding(plain(run.config))):
        raise ValueError(f"{path} belongs to a run with another config: {differences}")
    if state["data_digest"] != run.data.digest:
        there, here = state["data_digest"][:12], run.data.digest[:12]
        raise ValueError(f"{path} was trained on other tokens: digest {there} there, {here} here")
    if state["machine"]["ranks"] != run.world.world_size:
        raise ValueError(
            f"{path} is of {state['machine']['ranks']} ranks: expected as many, not {run.world.world_size}"
        )


def load(run: Run, checkpoint: Checkpoint) -> list[str]:
    """Into a run with the model as it was when it was saved; warnings. Raises ValueError for another architecture."""
    state = checkpoint.state
    check_architecture(checkpoint.path, state["model_config"], asdict(run.model.config))
    run.model.load_state_dict(checkpoint.tensors("model"))
    states = unflatten(checkpoint.tensors(f"optimizer{run.world.rank}"), state["optimizer_groups"])
    for optimizer, its_state in zip(optimizers(run), states, strict=True):
        optimizer.load_state_dict(its_state)
    run.seconds, run.warm_seconds = state["seconds"], state["warm_seconds"]
    run.bits_per_byte = math.nan if state["bits_per_byte"] is None else state["bits_per_byte"]
    changes = differing(state["machine"], machine(run))
    return [f"not bitwise the uninterrupted run: {changes}"] if changes else []


def gathered(tensors: dict[str, Tensor], run: Run) -> list[dict[str, Tensor]]:
    """Those of all ranks, on rank 0."""
    if run.world.world_size == 1:
        return [tensors]
    of_ranks = [None] * run.world.world_size if run.world.rank == 0 else None
    dist.gather_object(tensors, of_ranks)
    return of_ranks or []


def machine(run: Run) -> dict[str, Any]:
    """What the last bits of a result depend on, besides the config."""
    return bits_depend_on(run.world.device, run.dtype, run.world.world_size) | {"kernels": str(run.choice)}
