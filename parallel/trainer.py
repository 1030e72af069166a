"""The state of a parallel run: what stage 2's Trainer is to one process, and the same numbers up to rounding.

Batches are a function of the step and of a rank's place along dp and fsdp. Checkpoints are sharded, written while
training goes on, and continue on any other layout. Refused: resuming another config, architecture or text; going on
after a NaN.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.cli import UserError
from common.dist import World
from minigpt.batches import batch, held_out_windows, rank_rows
from minigpt.checkpoint import check_architecture, differing
from minigpt.data import TokenData
from minigpt.evaluate import Window, score, spread, to_bits_per_byte
from minigpt.train_config import plain, schedule
from parallel.assembly import Assembly
from parallel.checkpoint import entries_of, restore
from parallel.checkpoint_reader import load
from parallel.checkpoint_writer import Pending, save
from parallel.config import FREE, ParallelConfig
from parallel.trace import Tracer


class ParallelTrainer:
    """The methods of minigpt.trainer.Trainer, for minigpt.train.run_steps."""

    def __init__(
        self, config: ParallelConfig, assembly: Assembly, data: TokenData, world: World, tracer: Tracer | None = None
    ):
        self.config, self.assembly, self.data, self.world, self.tracer = config, assembly, data, world, tracer
        if tracer is not None:
            tracer.on = False
            tracer.align(assembly.all, device=world.device)
            tracer.watch(assembly.stages)
        self.sitting = 0  # steps since this process began
        self.model = assembly.whole()  # without storage: to count its parameters and FLOPs
        self.options: dict[str, Any] = {"z_loss": config.z_loss} if config.z_loss else {}
        if config.document_mask:
            self.options["separator"] = data.tokenizer.separator
        parameters = assembly.strategy.parameters()
        self.average = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else {}
        self.windows = held_out_windows(data.held_out.size, config.context, config.eval_stride)
        if config.sequence_parallel and (length := self.windows[0][1]) % config.tp:
            raise ValueError(f"the held-out text gives windows of {length} tokens, over tp {config.tp}: sequence "
                             f"parallelism wants whole parts; give more text or a smaller context")  # fmt: skip
        self.byte_lengths_V = torch.from_numpy(data.byte_lengths).to(world.device)
        self.pending: Pending | None = None
        self.step, self.saved_step, self.seconds, self.bits_per_byte = 0, 0, 0.0, math.nan

    def make_batch(self, step: int) -> tuple[Any, Any]:
        """numpy (inputs, targets) of this rank at a step."""
        config, data = self.config, self.assembly.data
        first, rows = rank_rows(step * config.batch, config.batch, data.rank, data.size)
        return batch(self.data.train, seed=config.seed, row=first, rows=rows, context=config.context)

    def update(self, inputs_BT: Tensor, targets_BT: Tensor, stop: bool = False) -> tuple[dict[str, float], bool]:
        """One step. Returns its deterministic metrics, and whether any rank wants to stop after it."""
        assembly, config = self.assembly, self.config
        if self.tracer is not None:
            self.tracer.on = 2 <= self.sitting < 2 + config.trace_steps  # the first steps set things up
        self.sitting += 1
        loss = assembly.gradients(inputs_BT, targets_BT, **self.options)
        bytes_per_token = self.byte_lengths_V[targets_BT].double().mean()
        signals = torch.stack([loss.double(), bytes_per_token])
        loss_value, bytes_value = (assembly.total(signals) / assembly.data.size).tolist()
        stops = torch.tensor(float(stop), device=self.world.device)
        assembly.all.all_reduce(stops, "max", tag="stop")
        norm = assembly.clip(config.clip)
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            raise self._broken(f"loss {loss_value:g} and gradient norm {norm:g}", self.step + 1)
        share = schedule(self.step, config)
        for optimizer in assembly.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
        with self.tracer.span("optimizer") if self.tracer is not None else nullcontext():
            assembly.apply()
        self._update_average()
        self.step += 1
        bits = loss_value / math.log(2) / bytes_value if bytes_value else math.nan
        metrics = {"loss": loss_value, "train_bits_per_byte": bits, "lr_share": share, "grad_norm": norm}
        return metrics, stops.item() > 0

    def _update_average(self) -> None:
        if self.average:
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))  # short at the start
            parameters = self.assembly.strategy.parameters()
            with torch.no_grad():
                for name, value in self.average.items():
                    value.lerp_(parameters[name], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the average of its weights, if there is one."""
        if not self.config.ema:
            yield
            return
        strategy = self.assembly.strategy
        raw = {name: p.detach().clone() for name, p in strategy.parameters().items()}
        try:
            self._put(self.average)
            yield
        finally:
            self._put(raw)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, p in self.assembly.strategy.parameters().items():
            p.copy_(values[name])
        self.assembly.strategy.stepped()

    def evaluate(self) -> dict[str, float]:
        """After the last step bits per byte of all held-out text, before it a look at some windows. Ranks share."""
        final = self.step == self.config.steps
        windows = self.windows if final else spread(self.windows, self.config.eval_windows)
        logits = partial(self.assembly.logits, separator=self.options.get("separator"))
        with self.averaged():
            totals = score(
                logits, self.data.held_out, self.data.byte_lengths, self._share(windows),
                rows=self._in_parts(16), device=self.world.device, dtype=self.assembly.dtype,
            )  # fmt: skip
        value = to_bits_per_byte(self.assembly.total(totals))
        if not final:
            return {"held_out_look": value}
        self.bits_per_byte = value
        return {"held_out_bits_per_byte": value}

    def _share(self, windows: list[Window]) -> list[Window]:
        """This rank's, as many on every rank, since all have to make the same calls, and what a pipeline can divide. A
        window that fills up counts none of its tokens."""
        data = self.assembly.data
        mine = windows[data.rank :: data.size]
        start, length, _ = windows[0]
        return mine + [(start, length, length)] * (self._in_parts(-(-len(windows) // data.size)) - len(mine))

    def _in_parts(self, rows: int) -> int:
        """At least so many rows, and a multiple of a pipeline's micro-batches."""
        parts = self.config.parts if self.config.pp > 1 else 1
        return -(-rows // parts) * parts

    def save(self) -> None:
        """Starts to write a checkpoint, after the one before has been written; with async_save false waits for it."""
        self.finish_saving()
        parameters, optimizers = self.assembly.strategy.parameters(), self.assembly.optimizers
        finite = torch.tensor(float(all(p.isfinite().all() for p in parameters.values())), device=self.world.device)
        finite.neg_()
        self.assembly.all.all_reduce(finite, "max", tag="finite")
        if finite.item() != -1:
            raise self._broken("the weights are no longer finite", self.step)
        pieces = self.assembly.strategy.pieces()
        entries = entries_of(parameters, pieces, optimizers)
        entries |= {f"ema/{name}": (value, pieces[name]) for name, value in self.average.items()}
        state = {
            "model_config": asdict(self.assembly.model_config),
            "train_config": plain(self.config),
            "data_digest": self.data.digest,
            "machine": self.machine(),
            "seconds": self.seconds,
            "bits_per_byte": None if math.isnan(self.bits_per_byte) else self.bits_per_byte,
        }
        self.pending = save(
            self.config.folder, self.step, entries, state, self.assembly.all, self.config.keep,
            asynchronous=self.config.async_save,
        )  # fmt: skip
        if not self.config.async_save or self.step == self.config.steps:
            self.finish_saving()

    def finish_saving(self) -> None:
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self.saved_step = pending.wait()

    def machine(self) -> dict[str, Any]:
        """What the last bits of a result depend on, besides the config."""
        return {
            "torch": str(torch.__version__),
            "device": self.world.device.type,
            "dtype": str(self.assembly.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "layout": str(self.config.layout),
        }

    def load(self) -> list[str]:
        """Takes up the newest whole checkpoint of the run folder, of whatever layout; returns warnings, also when the
        numbers may differ in their last bits. Raises ValueError naming what differs when architecture, config or text
        do."""
        found, warnings = load(self.config.folder, self.assembly.all)
        path, state = found.path, found.state
        check_architecture(path, state["model_config"], asdict(self.assembly.model_config))
        there, here = (
            {k: v for k, v in c.items() if k not in FREE} for c in (state["train_config"], plain(self.config))
        )
        if differences := differing(there, here):
            raise ValueError(f"{path} belongs to a run with another config: {differences}")
        if state["data_digest"] != self.data.digest:
            there, here = state["data_digest"][:12], self.data.digest[:12]
            raise ValueError(f"{path} was trained on other tokens: digest {there} there, {here} here")
        strategy = self.assembly.strategy
        restore(found, strategy.parameters(), strategy.pieces(), self.assembly.optimizers)
        strategy.stepped()
        for name, piece in strategy.pieces().items():
            if self.average:
                self.average[name].copy_(found.read(f"ema/{name}", piece).view_as(self.average[name]))
        self.step = self.saved_step = state["step"]
        self.seconds = state["seconds"]
        self.bits_per_byte = math.nan if state["bits_per_byte"] is None else state["bits_per_byte"]
        if changes := differing(state["machine"], self.machine()):
            warnings.append(f"not bitwise the uninterrupted run: {changes}")
        return warnings

    def _broken(self, what: str, step: int) -> UserError:
        return UserError(
            f"{what} at step {step}: stopped; {self.config.folder} holds step {self.saved_step}, "
            f"the last good one; a lower learning rate may help"
        )
