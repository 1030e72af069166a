"""The main job: one command trains a language model and says what it reached. `python -m speedrun.train`.

Chooses the preset for the hardware it finds; under `torchrun --standalone --nproc-per-node N -m speedrun.train` the
ranks share each batch and average their gradients, so that N ranks compute what one would. The loop is stage 2's.
Refused: what `minigpt.train` refuses.
"""

import os
import time

import torch
import torch.distributed as dist
from torch import Tensor

from common import cli
from common.dist import finish, init_from_env
from minigpt.train import configured, train
from speedrun.presets import PRESETS, choose_preset, has_compiler
from speedrun.summary import as_lines, sample, summarise


def average(tensors: list[Tensor]) -> None:
    """The mean over all ranks, in place, of tensors of one dtype: one all-reduce of them all behind one another."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def main() -> None:
    began = time.perf_counter()
    ranks = os.environ.get("WORLD_SIZE", "1")  # only to choose the preset; init_from_env checks it
    asked = configured(None, presets=PRESETS, default_preset="cpu")  # for --device, which the choice needs
    cuda = asked.device != "cpu" and torch.cuda.is_available()
    default = choose_preset(cuda, several=ranks != "1", compiler=has_compiler())
    config = configured(None, presets=PRESETS, default_preset=default)
    world = init_from_env(None if config.device == "auto" else config.device)
    try:
        result = train(config, world=world, grad_sync=average if world.world_size > 1 else None)
    finally:
        finish()
    if world.rank == 0:
        print(as_lines(summarise(result, world, time.perf_counter() - began), config))
        print(sample(result))


if __name__ == "__main__":
    cli.run(main)
