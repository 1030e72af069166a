"""The state of a training run - weights, optimizers, average, step - and what can be done with it.

A step depends on this state and on its own number alone: batches are a function of the step, and nothing draws random
numbers. So what `save` writes and `load` reads continues to the same bits on a CPU with the same thread count.
Refused: resuming another config, architecture or text, and going on after a NaN.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.cli import UserError
from common.dist import World
from minigpt.batches import batch, held_out_windows, rank_rows
from minigpt.checkpoint import (
    bits_depend_on,
    check_architecture,
    differing,
    flatten,
    load_checkpoint,
    save_checkpoint,
    unflatten,
)
from minigpt.data import TokenData
from minigpt.evaluate import score, spread, to_bits_per_byte
from minigpt.model import GPT
from minigpt.optim import Updates, make_optimizers
from minigpt.train_config import TrainConfig, deciding, plain, schedule

# Averages the given tensors over all ranks, in place.
GradSync = Callable[[list[Tensor]], None]


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
    def __init__(
        self,
        config: TrainConfig,
        model: GPT,
        data: TokenData,
        world: World,
        grad_sync: GradSync | None,
        updates: Updates | None = None,
    ):
        self.config, self.data, self.world, self.grad_sync = config, data, world, grad_sync
        self.model = model.to(world.device)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.options: dict[str, Any] = {"z_loss": config.z_loss} if config.z_loss else {}
        if config.document_mask:
            self.options["separator"] = data.tokenizer.separator
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.dtype = choose_dtype(config.dtype, world.device)
        self.updates = updates or Updates()
        self.optimizers = make_optimizers(self.model, config, self.dtype, self.updates)
        self.average = [p.detach().clone() for p in self.parameters] if config.ema else []
        self.windows = held_out_windows(data.held_out.size, config.context, config.eval_stride)
        self.byte_lengths_V = torch.from_numpy(data.byte_lengths).to(world.device)
        self.step, self.saved_step, self.seconds, self.bits_per_byte = 0, 0, 0.0, math.nan

    def make_batch(self, step: int) -> tuple[Any, Any]:
        """numpy (inputs, targets) of this rank at a step."""
        config, world = self.config, self.world
        first, rows = rank_rows(step * config.batch, config.batch, world.rank, world.world_size)
        return batch(self.data.train, seed=config.seed, row=first, rows=rows, context=config.context)

    def update(self, inputs_BT: Tensor, targets_BT: Tensor, stop: bool = False) -> tuple[dict[str, float], bool]:
        """One step. Returns its deterministic metrics, and whether any rank wants to stop after it."""
        loss = self._backward(inputs_BT, targets_BT)
        bytes_per_token = self.byte_lengths_V[targets_BT].to(loss.dtype).mean()
        signals = torch.stack([loss, bytes_per_token, torch.full_like(loss, float(stop))])
        if self.grad_sync is not None:
            for p in self.parameters:  # what this pass did not use may have a gradient on another rank
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.grad_sync([*(p.grad for p in self.parameters), signals])  # the signals travel with the gradients
        norm = self.updates.clip_grad_norm(self.parameters, self.config.clip or math.inf)
        loss_value, bytes_value, stops, norm_value = [*signals.tolist(), norm.item()]
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise self._broken(f"loss {loss_value:g} and gradient norm {norm_value:g}", self.step + 1)
        share = schedule(self.step, self.config)
        self._apply(share)
        self.step += 1
        bits = loss_value / math.log(2) / bytes_value if bytes_value else math.nan
        metrics = {"loss": loss_value, "train_bits_per_byte": bits, "lr_share": share, "grad_norm": norm_value}
        return metrics, stops > 0

    def _backward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Adds up the gradients of this rank's rows, part by part; returns their mean loss."""
        parts = (rows_BT.chunk(self.config.accumulate) for rows_BT in (inputs_BT, targets_BT))
        total = torch.zeros((), dtype=self.parameters[0].dtype, device=self.world.device)
        for part_BT, wanted_BT in zip(*parts, strict=True):
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                loss = self.forward(part_BT, wanted_BT, **self.options) / self.config.accumulate
            loss.backward()
            total += loss.detach()
        return total

    def _apply(self, share: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average:
            # Short at the start: else the initial weights would stay in it for long.
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the average of its weights, if there is one."""
        if not self.average:
            yield
            return
        raw = [p.detach().clone() for p in self.parameters]
        try:
            self._put(self.average)
            yield
        finally:
            self._put(raw)

    def use_average(self) -> None:
        """For good, when the run is over."""
        if self.average:
            self._put(self.average)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self.parameters, values)

    def evaluate(self) -> dict[str, float]:
        """After the last step bits per byte of all held-out text, before it a look at some windows. Ranks share."""
        final = self.step == self.config.steps
        windows = self.windows if final else spread(self.windows, self.config.eval_windows)
        mine = windows[self.world.rank :: self.world.world_size]
        # Not self.forward: the last, smaller group of windows would compile again.
        model = partial(self.model, separator=self.options.get("separator"))
        with self.averaged():
            totals = score(
                model, self.data.held_out, self.data.byte_lengths, mine,
                rows=16, device=self.world.device, dtype=self.dtype,
            )  # fmt: skip
        if self.grad_sync is not None:
            self.grad_sync([totals])  # a mean, but the ratio is that of the sums
        value = to_bits_per_byte(totals)
        if not final:
            return {"held_out_look": value}
        self.bits_per_byte = value
        return {"held_out_bits_per_byte": value}

    def save(self) -> None:
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self._broken("the weights are no longer finite", self.step)
        if self.world.rank == 0:
            tensors, groups = flatten([optimizer.state_dict() for optimizer in self.optimizers])
            weights = {"model": self.model.state_dict(), "optimizer": tensors}
            if self.average:
                with self.averaged():
                    weights["ema"] = {name: value.clone() for name, value in self.model.state_dict().items()}
            state = {
                "optimizer_groups": groups,
                "model_config": asdict(self.model.config),
                "train_config": plain(self.config),
                "data_digest": self.data.digest,
                "next_row": self.step * self.config.batch,  # of the endless list that minigpt.batches.batch describes
                "machine": self.machine(),
                "seconds": self.seconds,
                "bits_per_byte": None if math.isnan(self.bits_per_byte) else self.bits_per_byte,
            }
            save_checkpoint(self.config.folder, self.step, state, weights, self.config.keep)
        self.saved_step = self.step

    def machine(self) -> dict[str, Any]:
        return bits_depend_on(self.world.device, self.dtype, self.world.world_size)

    def load(self) -> list[str]:
        """Takes up the newest whole checkpoint of the run folder; returns warnings, also when the numbers may differ in
        their last bits. Raises ValueError naming what differs when architecture, config or text do."""
        checkpoint, warnings = load_checkpoint(self.config.folder)
        path, state = checkpoint.path, checkpoint.state
        check_architecture(path, state["model_config"], asdict(self.model.config))
        if differences := differing(deciding(state["train_config"]), deciding(plain(self.config))):
            raise ValueError(f"{path} belongs to a run with another config: {differences}")
        if state["data_digest"] != self.data.digest:
            there, here = state["data_digest"][:12], self.data.digest[:12]
            raise ValueError(f"{path} was trained on other tokens: digest {there} there, {here} here")
        self.model.load_state_dict(checkpoint.tensors("model"))
        states = unflatten(checkpoint.tensors("optimizer"), state["optimizer_groups"])
        for optimizer, its_state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(its_state)
        if self.average:
            averages = checkpoint.tensors("ema")
            names = [name for name, p in self.model.named_parameters() if p.requires_grad]
            self.average = [averages[name].to(self.world.device) for name in names]
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
