"""Whether a machine fits a race, asked before anything is built on it: bytes on a GPU by formula, one kind of GPU.

`need` predicts what a rank holds at the worst moment of a run; `check_memory` compares it with what is free, and says
what would fit; `check_machine` compares the ranks' devices with each other and with the track. The formula is for
layers one by one: a compiled model needs less, and what the allocator loses comes on top. Refused: too little memory,
GPUs of several kinds, a device or a number of GPUs that is not the track's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from common.cli import UserError
from common.dist import World
from minigpt.config import GPTConfig
from parallel import memory
from speedrun.config import RaceConfig
from speedrun.presets import BASELINES, PRESETS, over
from speedrun.schedule import whole
from speedrun.tracks import TRACKS, Track

EVALUATION_ROWS = 16  # windows at a time, when a race evaluates
GPT2_VOCAB = 50_257


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # that blocks keep for the backward pass, and the weights that they have in half precision
    logits: int  # and what the loss and its gradient make of them
    update: int  # what Muon needs besides, when all gradients are there and activations are gone
    evaluation: int

    @property
    def total(self) -> int:
        """At the worst of three moments: the loss's backward pass, the update, an evaluation."""
        backward = self.activations + self.logits
        return self.parameters + self.optimizer + max(backward + self.gradients, self.update, self.evaluation)


def need(config: RaceConfig, vocab_size: int, ranks: int = 1, half: bool = True) -> Need:
    """Of a rank of so many; `half`: the passes are in bfloat16. Nothing is built but shapes."""
    if config.untie_at:
        config = replace(config, tied=False, untie_at=0.0)  # as it ends
    model = config.model_config(vocab_size)
    rows = max([config.batch, *whole(config.batches)]) // (ranks * config.accumulate)
    tokens, V = rows * config.context, model.vocab_size
    number = 2 if half else 4
    plan = memory.Plan(data=ranks, rows=1, T=tokens, number=number, optimizer=config.optimizer)
    held = memory.states(model, replace(plan, number=4), zero=1)
    matrices = sum(
        size
        for unit, sizes in memory.units(model, plan).items()
        for name, size in sizes.items()
        if unit.startswith("blocks.") and "norm" not in name and "embedding" not in name
    )
    muon = config.optimizer == "muon"
    passes = matrices + V * model.width  # what is multiplied, cast once for all parts of a batch
    parts = 2 if model.softcap else 1  # copies of the logits that the loss keeps
    evaluated = EVALUATION_ROWS * config.context * V * 4
    return Need(
        parameters=held.parameters - (2 * matrices if config.bf16_weights else 0),
        # One part: while gradients come, activations go.
        gradients=held.gradients if config.accumulate > 1 else 4 * V * model.width,
        optimizer=held.optimizer + (2 * matrices // ranks if config.bf16_weights else 0),
        activations=(2 * passes if half else 0) + block_bytes(config, model, plan),
        logits=0 if config.fused_loss else tokens * V * 4 * (parts + 4),
        update=held.gradients + (3 if muon else 0) * 4 * matrices // ranks,
        evaluation=evaluated * (parts + 2),
    )


def block_bytes(config: RaceConfig, model: GPTConfig, plan: memory.Plan) -> int:
    """What all blocks keep of `plan.T` tokens: parallel/memory.py's, what racing parts add, and what autocast costs:
    the stream and what norms read are float32, and queries, keys and values each have a cast of their input. A layer
    without attention is taken for one that has it."""
    C, HK, GK = model.width, model.heads * model.key_width, model.kv_heads * model.key_width
    more = 4 - plan.number  # bytes of a number in float32 beyond those that memory.py counts
    casts = 2 * C * plan.number if more else 0
    policy = "full" if config.activation_checkpointing else "none"
    normed = 2 * C + (HK + GK) * model.qk_norm if policy == "none" else C
    total = model.layers * memory.block_activations(model, plan, policy)
    total += model.layers * plan.T * (normed * more + (casts if policy == "none" else 0))
    if policy == "full":
        return total + memory.block_activations(model, plan)
    gated = sum(model.has_value_embedding(layer) for layer in range(model.layers)) * model.value_gate
    skipped = model.layers * (4 * C * model.x0_skip + plan.number * HK * model.attention_gate)
    return total + plan.T * (skipped + gated * plan.number * GK)


# ---- refusals --------------------------------------------------------------------------------------------------------


def check_memory(config: RaceConfig, vocab_size: int, ranks: int, free: int | None, half: bool = True) -> None:
    """Raises UserError, with what would fit, where a rank's GPU has `free` bytes and needs more. None is any."""
    if free is None or (wanted := need(config, vocab_size, ranks, half).total) <= free:
        return
    text = f"this run needs about {gib(wanted)} of GPU memory, {gib(free)} are free"
    if found := fitting_parts(config, vocab_size, ranks, free, half):
        raise UserError(f"{text}: --accumulate {found[0]} needs {gib(found[1])}")
    # A baseline's name means another size on each track.
    names = fitting_presets({name: p for name, p in PRESETS.items() if name not in BASELINES}, ranks, free)
    raise UserError(f"{text}, and no --accumulate makes it fit: presets that do: {', '.join(names) or 'none'}")


def fitting_parts(
    config: RaceConfig, vocab_size: int, ranks: int, free: int, half: bool = True
) -> tuple[int, int] | None:
    """(the fewest parts of a rank's share of each batch with which the run fits, its bytes); None where none does."""
    batches = {config.batch, *whole(config.batches)}
    for parts in range(config.accumulate + 1, max(batches) // ranks + 1):
        if any(rows % (parts * ranks) for rows in batches):
            continue
        if (wanted := need(replace(config, accumulate=parts), vocab_size, ranks, half).total) <= free:
            return parts, wanted
    return None


def fitting_presets(presets: Mapping[str, RaceConfig], ranks: int, free: int) -> list[str]:
    """Names, the largest first."""
    needs = {name: need(over(each, ranks), vocabulary(each), ranks).total for name, each in presets.items()}
    return [name for name in sorted(needs, key=needs.get, reverse=True) if needs[name] <= free]


def vocabulary(config: RaceConfig) -> int:
    """Of a preset, whose tokenizer is "bpe:N" or that of the shards."""
    return int(config.tokenizer.removeprefix("bpe:")) if config.tokenizer.startswith("bpe:") else GPT2_VOCAB


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def free_memory(device: torch.device) -> int | None:
    """Bytes; None where there is no limit to keep."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def check_machine(track: str, world: World, name: str | None = None) -> None:
    """All ranks call it alike; `name` is what this rank's device is called, by default as torch does.

    Raises UserError on every rank where they are of several kinds: the slowest would set the pace, and no time could be
    compared. Raises ValueError where the track is for another kind of device, or for fewer GPUs.
    """
    if track:
        refuse_off_track(TRACKS[track], world)
    if world.world_size == 1:
        return
    if name is None:
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    names = [""] * world.world_size
    dist.all_gather_object(names, name)
    check_same(names)


def refuse_off_track(track: Track, world: World) -> None:
    """Raises ValueError where the rules of the track are for another machine."""
    device, ranks = world.device.type, world.world_size
    if track.device not in ("", device):
        here = [name for name, other in TRACKS.items() if other.device == device]
        raise ValueError(f"track {track.name} on {device}: expected {track.device}; on {device} there is --track "
                         f"{' or '.join(here)}, and --preset NAME --track '' for a run on none")  # fmt: skip
    if device == "cuda" and ranks > track.gpus:
        raise ValueError(f"track {track.name} on {ranks} GPUs: expected at most {track.gpus}; --track '' is for a run "
                         f"on none")  # fmt: skip


def check_same(names: Sequence[str]) -> None:
    """Names of devices by rank."""
    if len(set(names)) > 1:
        kinds = {name: [rank for rank, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
        text = "; ".join(f"{name} on rank {', '.join(map(str, ranks))}" for name, ranks in kinds.items())
        raise UserError(f"GPUs of several kinds: {text}: expected one kind, choose them with CUDA_VISIBLE_DEVICES")
