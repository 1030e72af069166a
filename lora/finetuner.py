"""The state of fine-tuning by one method - what is trained, the optimizer, the step - and what can be done with it.

A step depends on this state and on its own number alone: which rows it reads and what dropout draws are functions of
seed and step. So what `save` writes and `load` reads continues to the same bits on a CPU with the same thread count.
The loss of a step is the mean over all scored tokens of its rows, however ranks and parts share these. Refused: going
on after a NaN, or with another base, data or config.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.cli import UserError
from lora.adamw8bit import AdamW8bit
from lora.finetune_config import FinetuneConfig, Method, schedule
from lora.judge import losses
from lora.methods import frozen_digest, trained
from lora.packing import Rows
from lora.task import Task
from minigpt.batches import ROUNDS, permute
from minigpt.checkpoint import bits_depend_on, differing, flatten, load_checkpoint, save_checkpoint, unflatten
from minigpt.model import GPT
from minigpt.trainer import choose_dtype
from parallel.comm import Comm
from parallel.data_parallel import FlatBuckets

KEEP = 1  # checkpoints


def rows_of_step(step: int, batch: int, rows: int, seed: int) -> list[int]:
    """Which of `rows` rows a step reads: each comes once an epoch, in an order of that epoch's own."""
    chosen = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, within = divmod(place, rows)
        keys = np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64)
        chosen.append(int(permute(np.array([within]), rows, keys)[0]))
    return chosen


class Finetuner:
    """`model` is prepared (lora/methods.py) and on its device; the ranks of `comm` share each step's rows."""

    def __init__(self, config: FinetuneConfig, method: Method, model: GPT, task: Task, comm: Comm, folder: Path):
        self.config, self.method, self.model, self.task = config, method, model, task
        self.comm, self.folder = comm, folder
        self.device = next(model.parameters()).device
        self.dtype = choose_dtype(config.dtype, self.device)
        self.parameters = trained(model)
        self.strategy = FlatBuckets([model], comm, broadcast=False)
        rate, betas = config.learning_rate(method), (config.beta1, config.beta2)
        optimizer_cls = {"adamw": torch.optim.AdamW, "adamw8bit": AdamW8bit}[config.optimizer]
        options: dict[str, Any] = {"fused": True} if config.optimizer == "adamw" else {}
        self.optimizer = optimizer_cls(
            self.parameters.values(), lr=rate, betas=betas, eps=config.eps, weight_decay=config.weight_decay, **options
        )
        model.activation_checkpointing = config.activation_checkpointing
        self.frozen = frozen_digest(model)  # of what must not change
        self.step, self.saved_step, self.seconds = 0, 0, 0.0

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def update(self, stop: bool = False) -> tuple[dict[str, float], bool]:
        """One step. Returns its metrics, and whether any rank wants to stop after it."""
        config, rows = self.config, self.task.train.rows
        whole = rows.batch(rows_of_step(self.step, config.batch, len(rows), config.seed))
        signals = torch.tensor([self._backward(whole), float(stop)], dtype=torch.float64, device=self.device)
        self.comm.all_reduce(signals, tag="loss and stop")
        if self.comm.size > 1:
            self.strategy.finish()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip or math.inf))
        loss, stops = signals.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._broken(f"loss {loss:g} and gradient norm {norm:g}", self.step + 1)
        rate = config.learning_rate(self.method) * schedule(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": whole.scored}, stops > 0

    def _backward(self, whole: Rows) -> float:
        """Adds up the gradients of this rank's share of a step's rows, part by part; returns its share of the loss.

        Each part counts by its scored tokens over those of the whole step. The strategy averages over ranks, so a
        rank's share is multiplied by their number.
        """
        config, total, value = self.config, whole.scored, 0.0
        self.model.train()
        if config.dropout:
            torch.manual_seed(hash((config.seed, self.step, self.comm.rank)))
        mine = range(self.comm.rank, len(whole), self.comm.size)
        for part in range(config.accumulate):
            if not (chosen := list(mine[part :: config.accumulate])):
                continue
            rows = whole.batch(chosen, self.device)
            share = rows.scored / total
            with self.autocast():
                loss = rows.loss(self.model)
            (loss * (share * self.comm.size)).backward()
            value += float(loss.detach()) * share
        return value

    def evaluate(self) -> dict[str, float]:
        """Loss of the held-out answers, in nats a token."""
        self.model.eval()
        count = len(self.task.held_out_examples)
        nats, tokens = losses(self.model, self.task.held_out.rows, count, self.comm, self.autocast).sum(0).tolist()
        return {"held_out_loss": nats / tokens}

    def save(self) -> None:
        """Of full fine-tuning the checkpoint is one of minigpt's, which minigpt.sample reads."""
        if not all(p.isfinite().all() for p in self.parameters.values()):
            raise self._broken("what is trained is no longer finite", self.step)
        if self.comm.rank == 0:
            tensors, groups = flatten([self.optimizer.state_dict()])
            full = self.method == "full"
            weights = {"model": self.model.state_dict()} if full else {"adapter": self.parameters}
            state = self.identity() | {
                "optimizer_groups": groups,
                "model_config": asdict(self.model.config),
                "machine": self.machine(),
                "seconds": self.seconds,
            }
            save_checkpoint(self.folder, self.step, state, {**weights, "optimizer": tensors}, KEEP)
        self.saved_step = self.step

    def identity(self) -> dict[str, Any]:
        """What has to be the same when a run goes on, besides the config."""
        count = sum(p.numel() for p in self.parameters.values())
        return {"method": self.method, "frozen": self.frozen, "data": self.task.digest, "trained": count}

    def machine(self) -> dict[str, Any]:
        return bits_depend_on(self.device, self.dtype, self.comm.size)

    @torch.no_grad()
    def load(self) -> list[str]:
        """Takes up the newest whole checkpoint of the folder; returns warnings. Raises ValueError naming what differs
        when base, data or method do."""
        checkpoint, warnings = load_checkpoint(self.folder)
        state, mine = checkpoint.state, self.identity()
        if differences := differing({name: state.get(name) for name in mine}, mine):
            raise ValueError(f"{checkpoint.path} belongs to another run: {differences}")
        tensors = checkpoint.tensors("model" if self.method == "full" else "adapter")
        for name, p in self.parameters.items():
            p.copy_(tensors[name])
        self.optimizer.load_state_dict(unflatten(checkpoint.tensors("optimizer"), state["optimizer_groups"])[0])
        self.step = self.saved_step = state["step"]
        self.seconds = state["seconds"]
        if changes := differing(state["machine"], self.machine()):
            warnings.append(f"not bitwise the uninterrupted run: {changes}")
        return warnings

    def verify_frozen(self) -> None:
        """Raises RuntimeError, for it would be a bug, when a frozen tensor is no longer what it was, bit for bit."""
        if (now := frozen_digest(self.model)) != self.frozen:
            raise RuntimeError(f"the frozen base changed: digest {self.frozen[:12]} before, {now[:12]} after")

    def optimizer_bytes(self) -> int:
        states = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in states)

    def _broken(self, what: str, step: int) -> UserError:
        return UserError(
            f"{what} at step {step} of {self.method}: stopped; {self.folder} holds step {self.saved_step}, the last "
            f"good one; a lower learning rate may help"
        )
