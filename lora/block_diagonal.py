"""Adapters under tensor parallelism in three ways, side by side: are they right, what do they send, what do they keep.

    torchrun --standalone --nproc-per-node 4 -m lora.block_diagonal --compare

A small GPT with random weights gets an adapter of all its projections: block-diagonal, sharded as S-LoRA does, and
replicated (lora/sharded.py). Each is held against the same adapter in one process, in float64, outputs and gradients;
collectives beyond the frozen model's own are counted and held against lora/sharding_costs.py. It ends with code 1 where
one of them is not as it should be. Refused: one process, sizes that the ranks do not divide.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common import cli
from common.dist import finish, init_from_env
from common.results import save_result
from lora.config import LoraConfig
from lora.lora import adapter_parameters, add_adapter
from lora.sharded import TAGS, shard_adapter
from lora.sharding import SHARDINGS, Sharding
from lora.sharding_costs import (
    Calls,
    aligned,
    backward_calls,
    forward_calls,
    gradient_sums,
    macs_per_token,
    parameters_per_rank,
    projections,
    sent,
)  # fmt: skip
from minigpt.config import GPTConfig
from minigpt.model import GPT
from parallel.comm import Call, Comm, Listener, make_comm
from parallel.debug import Watchdog
from parallel.errors import run_ranks
from parallel.mesh import Layout, Mesh
from parallel.model import StageGPT, materialise
from parallel.pieces import piece_of
from parallel.tensor_parallel import parallelise
from parallel.vocab_parallel import gather_logits

START = "torchrun --standalone --nproc-per-node 4 -m lora.block_diagonal --compare"
ERROR = 1e-12  # relative, in float64
PHASES = ("forward", "backward", "step")


@dataclass(frozen=True, slots=True)
class CompareConfig:
    compare: bool = field(default=True, metadata={"help": "with the same in one process; without, costs alone"})
    training: bool = field(default=True, metadata={"help": "gradients too"})
    rank: int = field(default=16, metadata={"help": "of the adapter"})
    blocks_per_rank: int = field(default=1, metadata={"help": "of the block-diagonal factors"})
    layers: int = field(default=2, metadata={"help": "blocks of the GPT"})
    width: int = field(default=64, metadata={"help": "of the GPT"})
    heads: int = field(default=8, metadata={"help": "of the GPT, as many key/value heads"})
    mlp_width: int = field(default=160, metadata={"help": "of the GPT"})
    rows: int = field(default=2, metadata={"help": "of the batch"})
    tokens: int = field(default=33, metadata={"help": "a row"})
    sequence_parallel: bool = field(default=False, metadata={"help": "tokens are cut between the branches"})
    seed: int = field(default=0, metadata={"help": "of weights and tokens"})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "gloo, or NCCL with a GPU for each rank"})
    save: bool = field(default=False, metadata={"help": "write the table to a JSON file"})
    out: Path = field(default=Path("results"), metadata={"help": "the folder of the results"})

    def __post_init__(self) -> None:
        for name in ("blocks_per_rank", "rows", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        self.lora("replicated", 1)
        _ = self.gpt

    @property
    def gpt(self) -> GPTConfig:
        return GPTConfig(
            vocab_size=256, context=self.tokens, layers=self.layers, width=self.width, heads=self.heads,
            kv_heads=self.heads, mlp="swiglu", mlp_width=self.mlp_width,
        )  # fmt: skip

    def lora(self, sharding: Sharding, ranks: int) -> LoraConfig:
        names = tuple(p.name for p in projections(self.gpt))
        blocks = ranks * self.blocks_per_rank if sharding == "block-diagonal" else 1
        return LoraConfig(rank=self.rank, alpha=2.0 * self.rank, targets=names, blocks=blocks)


class Ear:
    """A listener that keeps the calls by phase."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Call]] = {phase: [] for phase in ("frozen", *PHASES)}
        self.phase: str | None = None

    def started(self, call: Call) -> None:
        if self.phase is not None:
            self.calls[self.phase].append(call)

    def ended(self, call: Call) -> None:
        pass


def measure(
    config: CompareConfig, sharding: Sharding, mesh: Mesh, device: torch.device, listeners: Sequence[Listener] = ()
) -> dict[str, Any]:
    """One row of the table. Errors are the largest of all ranks, `as_formulas` holds for all of them; collectives and
    parameters are this rank's own. Raises ValueError for what cannot be sharded."""
    ear = Ear()
    comm = make_comm(mesh.group("tp"), listeners=(ear, *listeners))
    adapter = config.lora(sharding, comm.size)
    stage = StageGPT(config.gpt)
    groups = parallelise(stage, mesh, comm, sequence_parallel=config.sequence_parallel)
    materialise(stage, device, torch.float64)
    fill(dict(stage.named_parameters()), config.seed)
    tokens_BT, targets_BT = batch(config, device)
    ear.phase = "frozen"
    with torch.no_grad():
        stage(None, tokens_BT, targets_BT)
    ear.phase = None
    groups |= shard_adapter(stage, adapter, sharding, comm, groups)
    fill(trained(stage), config.seed + 1)
    loss, logits_BTV = step(stage, groups, ear, comm, config, tokens_BT, targets_BT)
    row = {"way": sharding, "ranks": comm.size, "rank": config.rank, "blocks": adapter.blocks}
    if config.compare:
        row |= errors(config, adapter, stage, loss, logits_BTV, tokens_BT, targets_BT, comm)
    return row | costs(config, sharding, stage, ear, comm)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def fill(named: Mapping[str, nn.Parameter], seed: int) -> None:
    """This rank's pieces of random values that depend on the seed, the order of names and the whole shapes; none is
    zero, as some are in a new model, where they would hide what is wrong."""
    generator = torch.Generator().manual_seed(seed)
    for p in named.values():
        piece = piece_of(p)
        noise = torch.randn(piece.shape, generator=generator, dtype=torch.float64)
        p.copy_(piece.of(noise / piece.shape[-1] ** 0.5 if len(piece.shape) > 1 else 1 + 0.1 * noise))


def batch(config: CompareConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(config.gpt.vocab_size, (config.rows, config.tokens + 1), generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def step(
    stage: StageGPT, groups: Mapping[str, Comm], ear: Ear, comm: Comm, config: CompareConfig, tokens_BT: Tensor,
    targets_BT: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and logits_BTV; gradients are left in the adapter's parameters, `ear` has heard the step."""
    with torch.no_grad():
        logits_BTV = gather_logits(stage(None, tokens_BT), comm)
    ear.phase = "forward"
    with torch.set_grad_enabled(config.training):
        loss = stage(None, tokens_BT, targets_BT)
    if config.training:
        ear.phase = "backward"
        loss.backward()
        ear.phase = "step"
        for name in sorted(groups):
            if (p := trained(stage).get(name)) is not None:
                groups[name].all_reduce(p.grad, tag=f"partial gradient of {name}")
    ear.phase = None
    return loss.detach(), logits_BTV


def errors(
    config: CompareConfig, adapter: LoraConfig, stage: StageGPT, loss: Tensor, logits_BTV: Tensor, tokens_BT: Tensor,
    targets_BT: Tensor, comm: Comm,
) -> dict[str, float]:  # fmt: skip
    """Largest differences from one process on any rank, as shares of the largest number; infinity where one is NaN."""
    model = GPT(config.gpt).double().to(tokens_BT.device)
    fill(dict(model.named_parameters()), config.seed)
    add_adapter(model, adapter)
    mine = {id(p) for p in adapter_parameters(model)}
    named = {name: p for name, p in model.named_parameters() if id(p) in mine}
    fill(named, config.seed + 1)
    with torch.no_grad():
        found = {"output_error": difference(logits_BTV, model(tokens_BT))}
    if config.training:
        want = model(tokens_BT, targets_BT)
        want.backward()
        found["loss_error"] = difference(loss, want.detach())
        parts = {name: piece_of(p) for name, p in trained(stage).items()}
        each = [difference(p.grad, parts[name].of(named[name].grad)) for name, p in trained(stage).items()]
        found["gradient_error"] = max(each) if list(parts) == list(named) else float("inf")
    worst = torch.tensor(list(found.values()), dtype=torch.float64, device=loss.device)
    comm.all_reduce(worst, "max")
    return dict(zip(found, worst.tolist(), strict=True))


def difference(got: Tensor, want: Tensor) -> float:
    value = ((got - want).abs().max() / want.abs().max()).item()
    return value if value == value else float("inf")


def costs(config: CompareConfig, sharding: Sharding, stage: StageGPT, ear: Ear, comm: Comm) -> dict[str, Any]:
    """Counted, and whether it is what the formulas say and leaves the frozen model's own collectives as they are."""
    options, tokens = {"rank": config.rank, "number": 8}, config.rows * config.tokens
    want = {
        "forward": forward_calls(config.gpt, sharding, tokens=tokens, **options),
        "backward": backward_calls(config.gpt, sharding, tokens=tokens, **options) if config.training else [],
        "step": gradient_sums(config.gpt, sharding, **options) if config.training else [],
    }
    numbers = (config.gpt, sharding, config.rank, comm.size, config.blocks_per_rank)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in trained(stage).values())}
    row["macs_per_token"] = macs_per_token(*numbers)
    same = row["parameters"] == parameters_per_rank(*numbers)
    for phase in PHASES:
        calls = ear.calls[phase]
        extra = [Calls(call.name, 1, call.payload) for call in calls if phase == "step" or call.tag in TAGS]
        row[f"{phase}_base_collectives"] = len(calls) - len(extra)
        row[f"{phase}_collectives"], row[f"{phase}_bytes_sent"] = len(extra), sent(extra, comm.size)
        same &= one_by_one(extra) == one_by_one(want[phase])
    own = [(call.name, call.payload) for call in ear.calls["forward"] if call.tag not in TAGS]
    same &= own == [(call.name, call.payload) for call in ear.calls["frozen"]]
    # Backward, the first norm passes nothing on, since what is before it is frozen; the one before the head does.
    meetings = (4 if config.sequence_parallel else 2) * config.layers
    same &= row["backward_base_collectives"] == (meetings if config.training else 0)
    wrong = torch.tensor([not same], dtype=torch.float64, device=next(stage.parameters()).device)
    comm.all_reduce(wrong, "max")
    return row | {"as_formulas": not wrong.item()}


def one_by_one(calls: Sequence[Calls]) -> list[tuple[str, int]]:
    return sorted((call.name, call.payload) for call in calls for _ in range(call.count))


def right(row: Mapping[str, Any]) -> bool:
    return row["as_formulas"] and all(value <= ERROR for key, value in row.items() if key.endswith("_error"))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    errors = [key for key in rows[0] if key.endswith("_error")]
    head = ["", *(key.replace("_", " ") for key in errors), *PHASES, *(f"{phase}, kB" for phase in PHASES)]
    lines = [[*head, "parameters", "MACs/token", ""]]
    for row in rows:
        line = [row["way"], *(f"{row[key]:.1e}" for key in errors), *(str(row[f"{p}_collectives"]) for p in PHASES)]
        line += [f"{row[f'{p}_bytes_sent'] / 1e3:,.1f}" for p in PHASES]
        lines.append([*line, f"{row['parameters']:,}", f"{row['macs_per_token']:,}", "ok" if right(row) else "WRONG"])
    return aligned(lines)


def report(config: CompareConfig, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    first = rows[0]
    yield (f"adapters of rank {config.rank} in {config.layers} layers on {first['ranks']} ranks, "
           f"{config.rows} x {config.tokens} tokens, float64")  # fmt: skip
    yield table(rows)
    own = ", ".join(f"{phase} {first[f'{phase}_base_collectives']}" for phase in PHASES[:2])
    yield f"collectives and kB sent by one rank are those beyond the frozen model's own ({own} collectives);"
    yield "step: gradients of factors that all ranks have; parameters and MACs: the adapter's, of one rank"


def configured(argv: Sequence[str] | None = None) -> CompareConfig:
    description = "adapters under tensor parallelism in three ways, compared with one process"
    return cli.parse(CompareConfig, argv, prog=cli.program(), description=description)


def main(config: CompareConfig, watchdog: Watchdog) -> int:
    world = init_from_env(config.device)
    if world.world_size == 1:
        raise cli.UserError(f"one process: expected at least two ranks, start with {START}")
    mesh = Mesh(Layout(tp=world.world_size), world.rank, world.world_size)
    rows = [measure(config, sharding, mesh, world.device, (watchdog,)) for sharding in SHARDINGS]
    if world.rank == 0:
        print("\n".join(report(config, rows)))
        if config.save:
            print(save_result("lora", "block_diagonal", rows, config=config, device=config.device, root=config.out))
    finish()
    return 0 if all(right(row) for row in rows) else 1


if __name__ == "__main__":
    run_ranks(main, configured)
