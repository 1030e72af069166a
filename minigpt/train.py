"""Trains a GPT on a corpus: `python -m minigpt.train --help`.

One folder a run: config.json, metrics.jsonl, timing.jsonl, tokenizer.json, checkpoints/, loss.png. A killed run
continues with `--resume` to the same numbers, bit by bit on a CPU. `train` takes the world and `grad_sync` as
arguments, so later stages run it on many ranks. Refused: overwriting a run, resuming another one, a batch that ranks
cannot share.
"""

import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from common import cli
from common.dist import World, init_from_env
from common.log import RunLog
from common.timing import gemm_peak
from minigpt.batches import Prefetcher, check_length
from minigpt.checkpoint import FOLDER, TOKENIZER, checkpoint_folders, load_checkpoint
from minigpt.compare import PICTURE, plot_run
from minigpt.data import TokenData, load_data
from minigpt.download import endpoint_from_env
from minigpt.model import GPT
from minigpt.optim import Updates
from minigpt.train_config import PRESETS, TrainConfig
from minigpt.trainer import GradSync, Trainer

PEAK_SIZE = {"cpu": (1024,), "cuda": (8192,)}  # of the matrix product that the MFU is measured against


@dataclass(frozen=True, slots=True)
class Result:
    config: TrainConfig
    model: GPT
    data: TokenData
    dtype: torch.dtype
    bits_per_byte: float  # on all held-out text
    train_seconds: float  # in the steps themselves, over all sittings; without evaluation and checkpoints

    @property
    def tokens_per_second(self) -> float:
        return self.config.steps * self.config.batch * self.config.context / self.train_seconds


def train(
    config: TrainConfig,
    *,
    build: Callable[..., GPT] = GPT,
    world: World | None = None,
    grad_sync: GradSync | None = None,
    updates: Updates | None = None,
) -> Result:
    """Runs config.steps steps, or those that are left when config.resume; all ranks of `world` call it alike.

    `build(model_config, seed=..., activation_checkpointing=...)` makes the model. With several ranks `grad_sync`
    averages over them; rank 0 writes. `updates`: other optimizers and clipping than torch's. Raises ValueError or
    UserError for what the user can mend, before anything is written; KeyboardInterrupt after Ctrl-C, once the
    checkpoint is saved.
    """
    world = init_from_env(None if config.device == "auto" else config.device) if world is None else world
    if config.batch % (world.world_size * config.accumulate):
        shares = f"world size {world.world_size} x accumulate {config.accumulate}"
        raise ValueError(f"batch {config.batch} is not divisible by {shares}")
    if world.world_size > 1 and grad_sync is None:
        raise ValueError(
            f"{world.world_size} ranks without grad_sync: expected one process, or python -m speedrun.train"
        )
    if not config.resume:
        refuse_existing(config.folder)
    data = load_data(config.corpus, config.tokenizer, endpoint=endpoint_from_env())
    check_length(data.train, config.context)
    model = build(
        config.model_config(data.tokenizer.vocab_size),
        seed=config.seed,
        activation_checkpointing=config.activation_checkpointing,
    )
    trainer = Trainer(config, model, data, world, grad_sync, updates)
    place = ", ".join(f"{name} {value}" for name, value in trainer.machine().items())
    notes = [data.describe(), f"model: {trainer.model.num_parameters():,} parameters; {place}"]
    if config.resume:
        notes += trainer.load()
    if grad_sync is not None:
        grad_sync([torch.zeros(1, device=world.device)])  # a barrier: every rank has looked before rank 0 writes
    if not config.resume:
        if world.rank == 0:
            data.tokenizer.save(config.folder / TOKENIZER)
        trainer.save()  # a kill at any later moment finds a checkpoint
    if trainer.step < config.steps:
        run_steps(trainer, notes)
    if world.rank == 0 and not (config.folder / PICTURE).exists():
        plot_run(config.folder)
    trainer.use_average()
    return Result(config, trainer.model, data, trainer.dtype, trainer.bits_per_byte, trainer.seconds)


def run_steps(trainer: Trainer, notes: list[str]) -> None:
    """The steps that are left, with logs, looks at held-out text, checkpoints; any trainer with Trainer's methods."""
    config, world = trainer.config, trainer.world
    enabled = world.rank == 0
    peak = 1e12 * config.peak_tflops or measured_peak(trainer.machine()["dtype"], world.device)
    flops = trainer.model.num_flops_per_token() * config.batch * config.context / (peak * world.world_size)
    log = RunLog(config.folder, config, total_steps=config.steps, start_step=trainer.step, enabled=enabled)
    batches = Prefetcher(trainer.make_batch, world.device)
    with log, interruptible() as interrupted, batches, reproducible(config.compile and world.device.type == "cpu"):
        for note in notes:
            log.message(note)
        while trainer.step < config.steps:
            began = time.perf_counter()  # waiting for the batch counts too
            metrics, stop = trainer.update(*batches.next(trainer.step), stop=interrupted())
            seconds = time.perf_counter() - began
            trainer.seconds += seconds
            step, last = trainer.step, trainer.step == config.steps
            if last or step % config.eval_every == 0:
                metrics |= trainer.evaluate()
            log.metrics(step, **metrics)
            speed, mfu = config.batch * config.context / seconds, flops / seconds
            log.timing(step, step_ms=1e3 * seconds, tokens_per_s=speed, mfu=mfu, memory_bytes=memory(world.device))
            log.progress(step, loss=metrics["loss"], tokens_per_s=round(speed), mfu=f"{mfu:.0%}")
            if last or stop or step % config.checkpoint_every == 0:
                trainer.save()
            if stop and not last:
                again = f"python -m {cli.program()} --folder {config.folder} --resume"
                log.message(f"stopped: {config.folder} holds step {step}; continue with: {again}")
                raise KeyboardInterrupt


@cache
def measured_peak(dtype: str, device: torch.device) -> float:
    """FLOP/s of one large matrix product, here and now."""
    return gemm_peak(dtype, device, sizes=PEAK_SIZE[device.type])


def memory(device: torch.device) -> int:
    """The most bytes this process has held: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def refuse_existing(folder: Path) -> None:
    # A folder of checkpoints without one is what a kill during the very first save leaves: that is no run yet.
    left = [FOLDER] if checkpoint_folders(folder) else []
    left += [name for name in ("metrics.jsonl", "config.json") if (folder / name).exists()]
    if left:
        raise ValueError(
            f"{folder} already holds a run ({left[0]}): continue with --resume, or choose another --folder"
        )


@contextmanager
def reproducible(needed: bool) -> Iterator[None]:
    """Compiled for a CPU, threads add up the gradient of an embedding in the order in which they come, unless torch is
    told to be deterministic. Eager code on a CPU gives the same bits as it is."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    if needed:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # would only cost time: nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C only raises a flag here, which the loop reads between steps: half an update must not reach the checkpoint.

    Outside the main thread, where Python delivers no signals, the flag stays down.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def configured(
    argv: list[str] | None,
    *,
    presets: dict[str, TrainConfig],
    default_preset: str,
    description: str = "train a GPT on a corpus",
) -> TrainConfig:
    """The config of a command line, of the presets' class. With --resume it is the stored one; flags beside it are
    kept, and then compared."""
    config_class, about = type(presets[default_preset]), {"prog": cli.program(), "description": description}
    config, explicit = cli.parse_explicit(config_class, argv, presets=presets, default_preset=default_preset, **about)
    if not config.resume or "preset" in explicit:
        return config
    stored = load_checkpoint(config.folder)[0].state["train_config"]
    given = {name: getattr(config, name) for name in explicit}
    return replace(config_class(**{**stored, **given}), folder=config.folder, resume=True)


def main() -> None:
    config = configured(None, presets=PRESETS, default_preset="laptop")
    result = train(config)
    print(
        f"held-out text: {result.bits_per_byte:.4f} bits per byte after {config.steps} steps, "
        f"{result.train_seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s; see {config.folder}/loss.png, "
        f"sample with: python -m minigpt.sample --folder {config.folder}"
    )


if __name__ == "__main__":
    cli.run(main)
