"""How many bytes a rank needs, by formula: parameters, gradients, optimizer, buffers of ZeRO, activations.

    python -m parallel.memory --layers 32 --width 4096 --heads 32 --mlp-width 16384 --data 8 --tp 2 --bytes 2

Activations are what autograd keeps between the passes: Korthikanti et al. 2022, section 4, for this GPT, which has no
dropout and whose attention stores no scores (34 s b h become 32 in GPT-2's shape). Left out: what libraries need of
their own, and what the allocator loses.
"""

import weakref
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.cli import parse, run
from minigpt.config import GPTConfig
from parallel.model import split_layers, whole_shapes
from parallel.schedules import peaks

Policy = Literal["none", "selective", "full"]
POLICIES: tuple[Policy, ...] = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the bytes go to. `number` and `master` are the bytes of one number in passes and in the optimizer."""

    data: int = 1  # ranks over which ZeRO divides
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = True
    rows: int = 1  # of one micro-batch
    T: int = 1024
    micro_batches: int = 1
    pipeline: str = "1f1b"
    number: int = 4
    master: int = 4
    optimizer: Literal["adamw", "muon"] = "adamw"
    prefetch: int = 1
    reshard: bool = True
    bucket: int = 25 * 2**20  # bytes of gradients that travel together, ZeRO-0 to 2
    fused: bool = True  # norms keep only their input and a number a row, as on a GPU; a CPU keeps the result besides


@dataclass(frozen=True, slots=True)
class Bytes:
    parameters: int
    gradients: int
    optimizer: int
    buffers: int  # whole parameters and gradients that come and go, at the worst moment

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def units(config: GPTConfig, plan: Plan, stage: int = 0) -> dict[str, dict[str, int]]:
    """Numbers in each parameter that a rank of this pipeline stage computes with, by unit of parallel/fsdp.py."""
    layers = split_layers(config.layers, plan.pp)[stage]
    first, last = stage == 0, stage == plan.pp - 1
    found: dict[str, dict[str, int]] = {}
    for name, shape in whole_shapes(config).items():
        unit = name
        if name.startswith("blocks."):
            unit = ".".join(name.split(".")[:2])
            if int(name.split(".")[1]) not in layers:
                continue
        elif name.startswith(("norm.", "head.")):
            unit = "norm and head"
            if not last:
                continue
        elif not (first or (config.tied and last and name == "embedding.weight")):
            continue
        found.setdefault(unit, {})[name] = -(-prod(shape) // _cut(config, name, len(shape), plan.tp))
    return found


def _cut(config: GPTConfig, name: str, ndim: int, tp: int) -> int:
    """Into how many parts tensor parallelism cuts this parameter."""
    if "norm" in name or name.startswith("position") or name.endswith(("output.bias", "down.bias")):
        return 1
    return min(tp, config.kv_heads) if ".key." in name or ".value" in name else tp


def states(config: GPTConfig, plan: Plan, zero: int, stage: int = 0) -> Bytes:
    """What a rank holds under ZeRO-0 (plain data parallelism) to ZeRO-3 (FSDP).

    ZeRO-1 divides the optimizer's states, ZeRO-2 the gradients too, ZeRO-3 the parameters too, each unit padded to the
    ranks. Where passes compute in another precision than the optimizer, master weights are counted with the optimizer
    (ZeRO-0 to 2), or are the parameters (ZeRO-3). Raises ValueError for another number.
    """
    if zero not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO-{zero}: expected 0, 1, 2 or 3")
    by_unit = units(config, plan, stage)
    N = sum(sum(unit.values()) for unit in by_unit.values())
    parts = {unit: -(-sum(sizes.values()) // plan.data) for unit, sizes in by_unit.items()}
    part = sum(parts.values())
    kept = sum(_kept(name, plan) * size for unit in by_unit.values() for name, size in unit.items())
    optimizer = plan.master * kept // (plan.data if zero else 1)
    if zero == 3:
        buffers = _moving(config, plan, by_unit, parts) - plan.master * part
        return Bytes(plan.master * part, plan.master * part, optimizer * plan.data * part // N, buffers)
    if plan.number != plan.master:
        optimizer += plan.master * (part if zero else N)
    bucket = min(plan.bucket, plan.number * N)
    gathering = 3 * (bucket + bucket // plan.data)  # new weights, three buckets at a time
    if zero == 2:
        return Bytes(plan.number * N, plan.number * part, optimizer, gathering)
    if zero == 1:  # when weights are gathered, whole gradients are gone
        bucket = max(bucket, gathering - plan.number * (N - part))
    return Bytes(plan.number * N, plan.number * N, optimizer, bucket)


def _kept(name: str, plan: Plan) -> int:
    """Numbers that the optimizer keeps for each of a parameter's."""
    matrix = name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name and "embedding" not in name
    return 1 if plan.optimizer == "muon" and matrix else 2


def _moving(config: GPTConfig, plan: Plan, by_unit: dict[str, dict[str, int]], parts: dict[str, int]) -> int:
    """Bytes of FSDP's gradient parts and whole buffers at the worst moment of the backward pass.

    It goes through the units in order; whole are the roots, the block and the next ones. Of gradients there are that of
    the unit before (on its way), the unit's own, and one parameter's as autograd gave it.
    """
    blocks = [unit for unit in by_unit if unit.startswith("blocks.")]
    roots = [unit for unit in by_unit if unit not in blocks]
    order = [unit for unit in roots if unit == "norm and head"]
    order += blocks[::-1] + [unit for unit in roots if unit != "norm and head"]
    padded = {unit: part * plan.data for unit, part in parts.items()}
    always = plan.number * sum(padded[unit] for unit in roots)
    if config.tied and plan.pp == 1:
        always += plan.number * sum(by_unit["embedding.weight"].values())  # the head's half of the gradient waits
    worst, done = 0, 0
    for position, unit in enumerate(order):
        ahead = [near for near in order[position : position + 1 + plan.prefetch] if near in blocks]
        whole = sum(padded[near] for near in (ahead if plan.reshard else blocks))
        before = padded[order[position - 1]] if position else 0
        gradients = plan.master * (before + padded[unit] + done) + plan.number * max(by_unit[unit].values())
        worst = max(worst, always + plan.number * whole + gradients)
        done += parts[unit]
    return max(worst, plan.master * sum(parts.values()))


def block_activations(config: GPTConfig, plan: Plan, policy: Policy = "none") -> int:
    """Bytes that one block keeps of one micro-batch. "full" keeps the block's input alone; "selective" besides the
    results of matrix products and attention (parallel/activation.py).

    Tensor parallelism divides what lies between a column- and a row-parallel layer, sequence parallelism the rest.
    """
    C, F, H, G = config.width, config.mlp_width, config.heads, config.kv_heads
    HK, GK = H * config.key_width, G * config.key_width
    row = plan.tp if plan.sequence_parallel else 1  # what divides the residual stream
    if policy == "full":
        return _bytes(plan, C / row)
    if policy == "selective":
        ups = 2 if config.mlp == "swiglu" else 1
        return _bytes(plan, 3 * C / row + (2 * HK + 2 * GK + ups * F) / plan.tp, H / plan.tp)
    composite = not plan.fused and config.norm == "rmsnorm"
    norms, statistics = 2 * (2 + composite) * C / row, 2 * (2 if config.norm == "layernorm" else 1) / row
    inner = 2 * HK + 2 * GK + (4 if config.mlp == "swiglu" else 2) * F  # attention: query, key, value, result
    if config.qk_norm:
        inner += (1 + composite) * (HK + GK)
        statistics += (H + G) * (2 if config.norm == "layernorm" else 1) / plan.tp
    if not plan.fused and config.qk_norm:
        inner += HK  # attention's result lies as the norm left the queries, head by head: side by side is a copy
    return _bytes(plan, norms + inner / plan.tp, statistics + H / plan.tp)


def _bytes(plan: Plan, numbers: float, statistics: float = 0.0) -> int:
    """Of so many numbers a token; statistics are never in half precision."""
    return round(plan.rows * plan.T * (numbers * plan.number + statistics * max(4, plan.number)))


def head_activations(config: GPTConfig, plan: Plan) -> int:
    """Bytes that the last norm, the head and the loss keep of one micro-batch: the logits' logarithms, and under a
    soft-cap its tanh, at least in float32."""
    row = plan.tp if plan.sequence_parallel else 1
    width = (2 + (not plan.fused and config.norm == "rmsnorm")) * config.width / row
    logits = plan.rows * plan.T * (1 + (config.softcap > 0)) * config.vocab_size * max(4, plan.number) / plan.tp
    return _bytes(plan, width, 2 if config.norm == "layernorm" else 1) + round(logits)


def activations(
    config: GPTConfig, plan: Plan, policy: Policy = "none", stage: int = 0, recomputed: int | None = None
) -> int:
    """Bytes of a rank at its worst moment: so many micro-batches are between their passes as the schedule has there.

    `recomputed` blocks (default: all) follow the policy, the others keep everything; while one of them is computed
    again, all that it would keep is there for a moment.
    """
    layers = len(split_layers(config.layers, plan.pp)[stage])
    recomputed = layers if recomputed is None else recomputed
    whole = block_activations(config, plan)
    held = recomputed * block_activations(config, plan, policy) + (layers - recomputed) * whole
    if stage == plan.pp - 1:
        held += head_activations(config, plan)
    again = whole if policy != "none" and recomputed else 0
    return peaks(plan.pipeline, plan.pp, plan.micro_batches)[stage] * held + again


class LiveBytes(TorchDispatchMode):
    """Counts the storage of all tensors that operations inside have read or made, for as long as they live.

    `now()` is the sum at the moment, `peak` the largest seen after an operation. Each storage counts once, with the
    size that it has; what collectives use inside does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref] = {}
        self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; to make sure of that torch would import its compiler, for seconds."""
        return False

    def now(self) -> int:
        living = {key: storage for key, reference in self._storages.items() if (storage := reference()) is not None}
        if len(living) < len(self._storages):
            self._storages = {key: self._storages[key] for key in living}
        return sum(storage.nbytes() for storage in living.values())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.add(tensor)
        self.peak = max(self.peak, self.now())
        return out

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor from now on, whether an operation reads it or not."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._storages.get(key)
        if known is None or known() is None:
            self._storages[key] = weakref.ref(storage)


@dataclass(frozen=True, slots=True)
class Question:
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int = field(default=0, metadata={"help": "0: as many as heads"})
    mlp: Literal["swiglu", "relu2", "gelu"] = "relu2"
    mlp_width: int = field(default=0, metadata={"help": "0: four times the width"})
    vocab_size: int = 50_304
    tied: bool = False
    context: int = 1024
    rows: int = field(default=8, metadata={"help": "sequences of one micro-batch"})
    micro_batches: int = field(default=1, metadata={"help": "of one step of a pipeline"})
    data: int = field(default=8, metadata={"help": "ranks over which ZeRO divides (dp, fsdp)"})
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = True
    optimizer: Literal["adamw", "muon"] = "adamw"
    bytes: int = field(default=2, metadata={"help": "of one number in the passes; the optimizer has 4 at least"})
    prefetch: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "micro_batches", "data", "tp", "pp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.bytes not in (2, 4, 8):
            raise ValueError(f"bytes {self.bytes}: expected 2, 4 or 8")
        if self.prefetch < 0:
            raise ValueError(f"prefetch {self.prefetch}: expected 0 or more")

    def config(self) -> GPTConfig:
        return GPTConfig(
            vocab_size=self.vocab_size, context=self.context, layers=self.layers, width=self.width, heads=self.heads,
            kv_heads=self.kv_heads or self.heads, mlp=self.mlp, mlp_width=self.mlp_width or 4 * self.width,
            tied=self.tied,
        )  # fmt: skip

    def plan(self) -> Plan:
        return Plan(
            data=self.data, tp=self.tp, pp=self.pp, sequence_parallel=self.sequence_parallel, rows=self.rows,
            T=self.context, micro_batches=self.micro_batches, number=self.bytes, master=max(4, self.bytes),
            optimizer=self.optimizer, prefetch=self.prefetch,
        )  # fmt: skip


def table(config: GPTConfig, plan: Plan, stage: int = 0) -> str:
    """The bytes of a rank of this pipeline stage in MiB, as text."""
    lines = [f"{'MiB':<10}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'buffers':>12}{'together':>12}"]
    for zero in range(4):
        held = states(config, plan, zero, stage)
        columns = (held.parameters, held.gradients, held.optimizer, held.buffers, held.total)
        lines.append(f"ZeRO-{zero:<5}" + "".join(f"{value / 2**20:>12,.1f}" for value in columns))
    lines.append("activations " + ", ".join(
        f"{policy} {activations(config, plan, policy, stage) / 2**20:,.1f}" for policy in POLICIES
    ))  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    question = parse(Question, prog="python -m parallel.memory", description="Memory of one rank, by formula.")
    config, plan = question.config(), question.plan()
    for stage in range(plan.pp):
        print(f"pipeline stage {stage} of {plan.pp}" if plan.pp > 1 else "one pipeline stage")
        print(table(config, plan, stage))


if __name__ == "__main__":
    run(main)
