"""Stage 4 on GPUs: what a CPU cannot show, streams and memory that is given away while a kernel may still use it."""

from dataclasses import replace

import pytest
import torch

from common.dist import World, spawn
from minigpt.model import GPT
from minigpt.optim import make_optimizers
from parallel.assembly import Assembly
from tests.parallel.gpts import batch
from tests.parallel.test_compositions import BASE, ROWS, VOCABULARY

STEPS = 3


def losses_of_one(config, device: str, dtype: torch.dtype) -> list[float]:
    """Of stage 2's GPT with plain optimizers."""
    model = GPT(config.model_config(VOCABULARY), seed=None).to(device, dtype)
    model.initialise(config.seed)  # once it has its dtype: float32 would round what is drawn
    optimizers = make_optimizers(model, config, dtype)
    losses = []
    for step in range(STEPS):
        tokens_BT, targets_BT = (x.to(device) for x in batch(config.model_config(VOCABULARY), ROWS, seed=step))
        loss = model(tokens_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def losses(config, world: World, dtype: torch.dtype | None) -> list[float]:
    assembly, found = Assembly(config, VOCABULARY, world, dtype=dtype), []
    for step in range(STEPS):
        tokens_BT, targets_BT = batch(assembly.model_config, ROWS, seed=step)
        found.append(assembly.gradients(tokens_BT.to(world.device), targets_BT.to(world.device)).item())
        assembly.clip(config.clip)
        assembly.apply()
    return found


def close(got: list[float], want: list[float], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance * abs(b) for a, b in zip(got, want, strict=True))


def test_one_process_on_a_cpu():
    world = World(0, 1, 0, torch.device("cpu"), None)
    assert close(losses(BASE, world, torch.float64), losses_of_one(BASE, "cpu", torch.float64), 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_one_gpu(recompute):
    config = replace(BASE, device="cuda", recompute=recompute)
    world = World(0, 1, 0, torch.device("cuda", 0), None)
    assert close(losses(config, world, torch.float64), losses_of_one(config, "cuda", torch.float64), 1e-9)


def on_nccl(rank: int, world_size: int, config) -> list[float]:
    return losses(config, World(rank, world_size, rank, torch.device("cuda", rank), "nccl"), None)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "options",
    [
        {"dp": 2}, {"fsdp": 2}, {"fsdp": 2, "offload": True}, {"fsdp": 2, "zero": 2}, {"tp": 2},
        {"tp": 2, "sequence_parallel": True, "overlap": True}, {"dp": 2, "collectives": "ours"},
    ],
    ids=str,
)  # fmt: skip
def test_two_gpus_begin_like_one(options):
    """The first losses of two ranks with the same rows on both: those of one."""
    config = replace(BASE, device="cuda", batch=2 * ROWS if {"dp", "fsdp"} & options.keys() else ROWS, **options)
    want = losses_of_one(BASE, "cuda", torch.float32)
    assert all(close(found, want, 1e-3) for found in spawn(on_nccl, 2, config, backend="nccl"))
