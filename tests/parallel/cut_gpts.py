"""GPTs of tests/parallel/gpts.py cut over tp, with the weights of one process, for the tests of tensor parallelism."""

import torch

from minigpt.config import GPTConfig
from parallel.comm import Comm, make_comm
from parallel.mesh import Layout, Mesh
from parallel.model import StageGPT, materialise
from parallel.pieces import piece_of
from parallel.strategy import Strategy
from parallel.tensor_parallel import parallelise
from parallel.whole_state import load_whole
from tests.parallel.gpts import error, stirred_gpt


class Plain(Strategy):
    """No other ranks than those of tp: the parameters themselves."""

    def __init__(self, *stages: StageGPT):
        self.stages = stages

    def parameters(self):
        return {name: p for stage in self.stages for name, p in stage.named_parameters() if p.requires_grad}

    def pieces(self):
        return {name: piece_of(p) for name, p in self.parameters().items()}


def meet(rank: int, world_size: int, kind: str = "torch", listeners: tuple = ()) -> tuple[Mesh, Comm]:
    """A mesh of tp alone. Ranks are seeded differently: nothing may depend on it."""
    torch.manual_seed(rank)
    mesh = Mesh(Layout(tp=world_size), rank, world_size)
    return mesh, make_comm(mesh.group("tp"), kind, listeners)


def cut(config: GPTConfig, mesh: Mesh, comm: Comm, layers=None, **options):
    """(stage, what parallelise returned) with the weights of `stirred_gpt`."""
    stage = StageGPT(config, layers)
    partial = parallelise(stage, mesh, comm, **options)
    materialise(stage, dtype=torch.float64)
    load_whole(stage, stirred_gpt(config).state_dict())
    return stage, partial


def worst(stage: StageGPT, want: dict) -> tuple[float, str]:
    """The largest error of this rank's gradients and the parameter's name; NaN counts as largest."""
    errors = []
    for name, p in stage.named_parameters():
        if (p.grad is None) != (want.get(name) is None):
            return float("inf"), f"{name} has a gradient on one side only"
        if p.grad is not None:
            errors.append((error(p.grad, piece_of(p).of(want[name])), name))
    return max(errors, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0])
