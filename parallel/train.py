"""Trains stage 2's GPT on any layout: `torchrun --standalone --nproc-per-node 4 -m parallel.train --tp 2 --fsdp 2 ...`.

The folder, logs and corpora are those of `python -m minigpt.train`; the checkpoints are sharded and continue on any
other layout (`--resume`), also in one process without torchrun. Refused: a world size that is not the product of the
axes, and what minigpt.train and parallel/config.py refuse.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from common import cli
from common.dist import World, finish, init_from_env
from minigpt.batches import check_length
from minigpt.checkpoint import TOKENIZER
from minigpt.compare import PICTURE, plot_run
from minigpt.data import load_data
from minigpt.download import endpoint_from_env
from minigpt.train import refuse_existing, run_steps
from minigpt.train_config import TrainConfig
from parallel.assembly import Assembly
from parallel.checkpoint_reader import stored_config
from parallel.checkpoint_writer import checkpoint_folders
from parallel.comm import Listener
from parallel.config import PRESETS, ParallelConfig
from parallel.counters import OURS, TORCH
from parallel.debug import Watchdog
from parallel.desync import DesyncDetector
from parallel.errors import run_ranks
from parallel.mesh import Mesh
from parallel.trace import Tracer
from parallel.trainer import ParallelTrainer


def train(
    config: ParallelConfig, world: World, listeners: Sequence[Listener] = (), dtype: torch.dtype | None = None
) -> ParallelTrainer:
    """Runs config.steps steps, or those that are left when config.resume; all ranks call it alike, rank 0 writes.
    `dtype` is that of the parameters, float32 if not given.

    Raises ValueError or UserError for what the user can mend, on every rank and before anything is written;
    KeyboardInterrupt after Ctrl-C, once the checkpoint is saved.
    """
    Mesh(config.layout, world.rank, world.world_size)  # refuses a world of another size, before any work
    if not config.resume:
        refuse_existing(config.folder)
        # The save of step 0 alone is what a kill at the very beginning leaves.
        if any(path.name > "step_00000000" for path in checkpoint_folders(config.folder)):
            raise ValueError(f"{config.folder} already holds checkpoints: continue with --resume, or choose another "
                             f"--folder")  # fmt: skip
    data = load_data(config.corpus, config.tokenizer, endpoint=endpoint_from_env())
    check_length(data.train, config.context)
    formula = {"torch": TORCH, "ours": OURS}[config.collectives]
    tracer = Tracer(config.folder / "trace", world.rank, world.world_size, formula) if config.trace_steps else None
    assembly = Assembly(config, data.tokenizer.vocab_size, world, [*listeners, *([tracer] if tracer else [])], dtype)
    trainer = ParallelTrainer(config, assembly, data, world, tracer)
    place = ", ".join(f"{name} {value}" for name, value in trainer.machine().items())
    notes = [data.describe(), f"model: {trainer.model.num_parameters():,} parameters; {place}"]
    if config.resume:
        notes += trainer.load()
    assembly.all.barrier()  # every rank has looked before rank 0 writes
    if not config.resume:
        if world.rank == 0:
            data.tokenizer.save(config.folder / TOKENIZER)
        trainer.save()  # a kill at any later moment finds a checkpoint
    try:
        if trainer.step < config.steps:
            run_steps(trainer, notes)
    except KeyboardInterrupt:
        trainer.finish_saving()
        raise
    trainer.finish_saving()  # after another error nobody waits: a save that is torn by it is never chosen
    if tracer is not None:
        tracer.save()
    if world.rank == 0 and not (config.folder / PICTURE).exists():
        plot_run(config.folder)
    return trainer


def configured(argv: list[str] | None = None) -> ParallelConfig:
    """The config of a command line. With --resume it is the stored one, on the layout that the command line gives."""
    argv = sys.argv[1:] if argv is None else argv
    stored = _stored(argv)
    presets = PRESETS | {"laptop": replace(PRESETS["laptop"], **stored)}  # before the flags: they must fit the run
    return cli.parse(
        ParallelConfig, argv, presets=presets, default_preset="laptop", prog=cli.program(),
        description="train a GPT on many ranks",
    )  # fmt: skip


def _stored(argv: list[str]) -> dict[str, Any]:
    """What a run that goes on has decided already; nothing without --resume, or where a preset is to be compared."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume", action="store_true")
    early.add_argument("--folder", type=Path, default=PRESETS["laptop"].folder)
    early.add_argument("--preset")
    known = early.parse_known_args(argv)[0]
    if not known.resume or known.preset is not None:
        return {}
    decided = {f.name for f in fields(TrainConfig)} - {"folder", "resume", "accumulate", "activation_checkpointing"}
    stored = stored_config(known.folder)
    return {name: stored[name] for name in decided}


def main(config: ParallelConfig, watchdog: Watchdog) -> None:
    watchdog.limit_s, watchdog.folder = config.timeout_s, config.folder / "hang"
    world = init_from_env(None if config.device == "auto" else config.device)
    listeners: list[Listener] = [watchdog]
    if config.checked and watchdog.board is not None:
        listeners.append(DesyncDetector(watchdog.board, world.rank, config.timeout_s))
    trainer = train(config, world, listeners)
    finish()
    if world.rank == 0:
        speed = config.steps * config.batch * config.context / trainer.seconds
        print(
            f"held-out text: {trainer.bits_per_byte:.4f} bits per byte after {config.steps} steps on {config.layout}, "
            f"{trainer.seconds:.0f} s, {speed:,.0f} tokens/s; see {config.folder}/{PICTURE}; as a run of one process: "
            f"python -m parallel.checkpoint --run {config.folder} --export {config.folder}-single"
        )


if __name__ == "__main__":
    run_ranks(main, configured)
