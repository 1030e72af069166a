"""Trains a GPT on a corpus: `python -m minigpt.train --help`.

One folder a run: config.json, metrics.jsonl, timing.jsonl, checkpoint.pt, loss.png. A killed run continues with
`--resume` to the same numbers, bit by bit on a CPU with the same thread count, because a step depends on the checkpoint
and its own number alone. `train` takes the world and `grad_sync` as arguments, so stage 6 runs it on many ranks.
Refused: overwriting a run, resuming another one, a batch that ranks cannot share, and going on after a NaN.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import cli, plots
from common.cli import UserError
from common.dist import World, init_from_env
from common.log import RunLog, read_jsonl
from minigpt.checkpoint import check_architecture, differing, load_checkpoint, save_checkpoint
from minigpt.config import PRESETS, TrainConfig, learning_rate, plain
from minigpt.data import Corpus, batch, check_length, held_out_windows, load_corpus
from minigpt.evaluate import score, spread, to_bits_per_byte
from minigpt.model import GPT

# Averages the given tensors over all ranks, in place.
GradSync = Callable[[list[Tensor]], None]


@dataclass(frozen=True, slots=True)
class Result:
    config: TrainConfig
    model: GPT
    corpus: Corpus
    dtype: torch.dtype
    bits_per_byte: float  # on all held-out text
    train_seconds: float  # in the steps themselves, over all sittings; without evaluation and checkpoints

    @property
    def tokens_per_second(self) -> float:
        return self.config.steps * self.config.batch * self.config.context / self.train_seconds


def adamw(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Only matrices decay: pulling a gain towards zero would shrink its whole channel."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; the older releases of torch know of AVX-512's only."""
    if hasattr(torch.cpu, "get_capabilities"):
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported()


class Trainer:
    """The state of a run - weights, optimizer, step - and what can be done with it: update, evaluate, save, load."""

    def __init__(self, config: TrainConfig, model: GPT, corpus: Corpus, world: World, grad_sync: GradSync | None):
        self.config, self.corpus, self.world, self.grad_sync = config, corpus, world, grad_sync
        self.model = model.to(world.device)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.model, config)
        self.dtype = choose_dtype(config.dtype, world.device)
        self.windows = held_out_windows(corpus.held_out.size, config.context, config.eval_stride)
        self.step, self.saved_step, self.seconds, self.bits_per_byte = 0, 0, 0.0, math.nan

    def update(self, stop: bool) -> tuple[dict[str, float], bool]:
        """One step. Returns its deterministic metrics, and whether any rank wants to stop after it."""
        began = time.perf_counter()
        lr = learning_rate(self.step, self.config)
        loss = self._backward()
        signals = torch.stack([loss, torch.full_like(loss, float(stop))])  # travels with the gradients
        if self.grad_sync is not None:
            self.grad_sync([*(p.grad for p in self.parameters), signals])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf)
        loss_value, stops, norm_value = [*signals.tolist(), norm.item()]
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise self._broken(f"loss {loss_value:g} and gradient norm {norm_value:g}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.perf_counter() - began
        return {"loss": loss_value, "lr": lr, "grad_norm": norm_value}, stops > 0

    def _backward(self) -> Tensor:
        """Adds up the gradients of this rank's rows, part by part; returns their mean loss."""
        config = self.config
        place = {"rank": self.world.rank, "world_size": self.world.world_size}
        rows = batch(
            self.corpus.train,
            seed=config.seed, step=self.step, global_batch=config.batch, context=config.context, **place,
        )  # fmt: skip
        inputs, targets = (torch.from_numpy(part).to(self.world.device).chunk(config.accumulate) for part in rows)
        total = torch.zeros((), dtype=self.parameters[0].dtype, device=self.world.device)
        for inputs_BT, targets_BT in zip(inputs, targets, strict=True):
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                loss = self.forward(inputs_BT, targets_BT) / config.accumulate
            loss.backward()
            total += loss.detach()
        return total

    def evaluate(self) -> dict[str, float]:
        """After the last step bits per byte of all held-out text, before it a look at some windows. Ranks share."""
        final = self.step == self.config.steps
        windows = self.windows if final else spread(self.windows, self.config.eval_windows)
        mine = windows[self.world.rank :: self.world.world_size]
        totals = score(
            self.model, self.corpus.held_out, mine, rows=16, device=self.world.device, dtype=self.dtype
        )  # not self.forward: the last, smaller group of windows would compile again
        if self.grad_sync is not None:
            self.grad_sync([totals])  # a mean, but the ratio is that of the sums
        value = to_bits_per_byte(totals)
        if not final:
            return {"held_out_look": value}
        self.bits_per_byte = value
        return {"held_out_bits_per_byte": value}

    def save(self) -> None:
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self._broken("the weights are no longer finite")
        if self.world.rank == 0:
            save_checkpoint(self.config.checkpoint, self._state())
        self.saved_step = self.step

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "model_config": asdict(self.model.config),
            "train_config": plain(self.config),
            "corpus_digest": self.corpus.digest,
            "machine": self.machine(),
            "seconds": self.seconds,
            "bits_per_byte": self.bits_per_byte,
        }

    def machine(self) -> dict[str, Any]:
        """What the last bits of a result depend on, besides the config."""
        return {
            "torch": str(torch.__version__),
            "device": self.world.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "ranks": self.world.world_size,
        }

    def load(self) -> str:
        """Takes up the checkpoint of the run folder; returns a warning when the numbers may differ in their last bits.

        Raises ValueError naming what differs when it is of another architecture, another config or another corpus.
        """
        path, state = self.config.checkpoint, load_checkpoint(self.config.checkpoint)
        check_architecture(path, state["model_config"], self.model.config)
        if differences := differing(state["train_config"], plain(self.config)):
            raise ValueError(f"{path} belongs to a run with another config: {differences}")
        if state["corpus_digest"] != self.corpus.digest:
            there, here = state["corpus_digest"][:12], self.corpus.digest[:12]
            raise ValueError(f"{path} was trained on another text: corpus digest {there} there, {here} here")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = self.saved_step = state["step"]
        self.seconds, self.bits_per_byte = state["seconds"], state["bits_per_byte"]
        changes = differing(state["machine"], self.machine())
        return f"not bitwise the uninterrupted run: {changes}" if changes else ""

    def _broken(self, what: str) -> UserError:
        return UserError(
            f"{what} at step {self.step + 1}: stopped; {self.config.checkpoint} holds step {self.saved_step}, "
            f"the last good one; a lower learning rate than {self.config.learning_rate:g} may help"
        )


def train(
    config: TrainConfig, *, model: GPT | None = None, world: World | None = None, grad_sync: GradSync | None = None
) -> Result:
    """Runs config.steps steps, or those that are left when config.resume; all ranks of `world` call it alike.

    With several ranks `grad_sync` averages over them; rank 0 writes. Raises ValueError or UserError for what the user
    can mend, before anything is written; KeyboardInterrupt after Ctrl-C, once the checkpoint is saved.
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
    corpus = load_corpus(config.corpus)
    check_length(corpus.train, config.context)
    trainer = Trainer(config, model or GPT(config.model_config(), seed=config.seed), corpus, world, grad_sync)
    place = ", ".join(f"{name} {value}" for name, value in trainer.machine().items())
    notes = [corpus.describe(), f"model: {trainer.model.num_parameters():,} parameters; {place}"]
    if config.resume and (warning := trainer.load()):
        notes.append(warning)
    if grad_sync is not None:
        grad_sync([torch.zeros(1, device=world.device)])  # a barrier: every rank has looked before rank 0 writes
    if trainer.step == 0:
        trainer.save()  # a kill at any later moment finds a checkpoint
    if trainer.step < config.steps:
        _loop(trainer, notes)
        if world.rank == 0:
            plot_run(config.folder)
    return Result(config, trainer.model, corpus, trainer.dtype, trainer.bits_per_byte, trainer.seconds)


def _loop(trainer: Trainer, notes: list[str]) -> None:
    config, world = trainer.config, trainer.world
    enabled = world.rank == 0
    log = RunLog(config.folder, config, total_steps=config.steps, start_step=trainer.step, enabled=enabled)
    with log, interruptible() as interrupted:
        for note in notes:
            log.message(note)
        while trainer.step < config.steps:
            before = trainer.seconds
            metrics, stop = trainer.update(interrupted())
            step, last = trainer.step, trainer.step == config.steps
            if last or step % config.eval_every == 0:
                metrics |= trainer.evaluate()
            log.metrics(step, **metrics)
            step_ms = 1e3 * (trainer.seconds - before)
            speed = config.batch * config.context / step_ms * 1e3
            log.timing(step, step_ms=step_ms, tokens_per_s=speed)
            log.progress(step, loss=metrics["loss"], tokens_per_s=round(speed))
            if last or stop or step % config.checkpoint_every == 0:
                trainer.save()
            if stop and not last:
                again = f"python -m {cli.program()} --folder {config.folder} --resume"
                log.message(f"stopped: {config.checkpoint} holds step {step}; continue with: {again}")
                raise KeyboardInterrupt


def refuse_existing(folder: Path) -> None:
    for name in ("checkpoint.pt", "metrics.jsonl", "config.json"):
        if (folder / name).exists():
            raise ValueError(
                f"{folder} already holds a run ({name}): continue with --resume, or choose another --folder"
            )


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


def plot_run(folder: Path, reference: dict[str, float] | None = None) -> Path:
    """Draws loss.png from metrics.jsonl: the smoothed loss of the batches, and the looks at held-out text."""
    rows = read_jsonl(folder / "metrics.jsonl")
    steps, smooth, mean = [row["step"] for row in rows], [], rows[0]["loss"]
    for row in rows:
        mean += (row["loss"] - mean) * 0.05
        smooth.append(mean / math.log(2))
    series = {"training batches (smoothed)": (steps, smooth)}
    # Apart: a look is at few windows, so it may lie above or below the whole text.
    for label, name in (("held-out text, a few windows", "held_out_look"), ("all of it", "held_out_bits_per_byte")):
        if points := [(row["step"], row[name]) for row in rows if name in row]:
            series[label] = tuple(zip(*points, strict=True))
    path = folder / "loss.png"
    plots.curve(path, series, xlabel="step", ylabel="bits per byte", title=folder.name, reference=reference)
    return path


def configured(argv: list[str] | None, *, presets: dict[str, TrainConfig], default_preset: str) -> TrainConfig:
    """The config of a command line. With --resume it is the stored one; flags beside it are kept, and then compared."""
    prog, text = cli.program(), "train a GPT on a corpus, byte by byte"
    config, explicit = cli.parse_explicit(
        TrainConfig, argv, presets=presets, default_preset=default_preset, prog=prog, description=text
    )
    if not config.resume or "preset" in explicit:
        return config
    stored = load_checkpoint(config.checkpoint)["train_config"]
    given = {name: getattr(config, name) for name in explicit}
    return replace(TrainConfig(**{**stored, **given}), folder=config.folder, resume=True)


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
