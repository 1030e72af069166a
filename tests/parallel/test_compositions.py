"""Any composition of the axes computes what one process does: losses, every gradient, weights, in float64 to 1e-12.

The compositions are drawn at random with a fixed seed, out of all that are legal on 4, 6 and 8 ranks; each rank holds
its own pieces against those of stage 2's GPT with all rows.
"""

import random
from dataclasses import replace

import pytest
import torch

from common.dist import World, spawn
from minigpt.model import GPT
from minigpt.optim import make_optimizers
from parallel.assembly import Assembly
from parallel.config import PRESETS, ParallelConfig
from parallel.divergence import Recording, assemble, first_difference, record
from tests.parallel.gpts import batch, error, stir

STEPS, ROWS = 3, 12
BASE = replace(
    PRESETS["tiny"], layers=4, width=24, heads=4, kv_heads=2, head_width=8, mlp="swiglu", mlp_width=48, context=16,
    eval_stride=8,
    vocab_multiple=24, batch=ROWS, steps=STEPS, warmup=0, clip=0.5, weight_decay=0.1, eps=1e-4, device="cpu",
)  # fmt: skip
TIED = {"tied": True, "positions": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True, "qk_norm": False,
        "softcap": 0.0, "value_embeddings": False}  # fmt: skip
VOCABULARY = 96


def legal() -> list[dict]:
    """Layouts and options of 4, 6 or 8 ranks."""
    found = []
    for world in (4, 6, 8):
        for pp in (1, 2, 4):
            for tp in (1, 2, 4):
                for fsdp in (1, 2, 3, 4):
                    if world % (pp * tp * fsdp):
                        continue
                    dp = world // (pp * tp * fsdp)
                    axes = {"pp": pp, "dp": dp, "fsdp": fsdp, "tp": tp}
                    if sum(size > 1 for size in axes.values()) >= 2 and ROWS % (dp * fsdp * max(1, pp)) == 0:
                        found.append(axes)
    return found


def draw(count: int, seed: int) -> list[ParallelConfig]:
    chance, configs = random.Random(seed), []
    while len(configs) < count:
        axes = chance.choice(legal())
        options = dict(axes)
        options["zero"] = chance.choice([1, 2, 3]) if axes["fsdp"] > 1 else 0
        options["data_parallel"] = chance.choice(["naive", "flat", "overlapped"])
        options["collectives"] = chance.choice(["torch", "ours"])
        options["recompute"] = chance.choice(["none", "full", "selective"])
        options["optimizer"] = chance.choice(["adamw", "adamw", "muon"])
        options["reshard"] = chance.random() < 0.5
        options["bucket_mb"] = chance.choice([0.002, 4.0])
        if axes["tp"] > 1:
            options["sequence_parallel"], options["overlap"] = chance.random() < 0.6, chance.random() < 0.5
        if axes["pp"] > 1:
            options["pipeline"] = chance.choice(["gpipe", "1f1b", "zb-h1", "interleaved-1f1b"])
            options["chunks"] = 2 if options["pipeline"] == "interleaved-1f1b" and axes["pp"] == 2 else 1
        else:
            options["accumulate"] = chance.choice([1, 3])
        if chance.random() < 0.4:
            options |= TIED | {"kv_heads": 4}
        try:
            configs.append(replace(BASE, **options))
        except ValueError:
            continue
    return configs


CONFIGS = draw(9, seed=1159)


def test_what_is_drawn_covers_the_axes():
    assert len(CONFIGS) >= 8 and sum(config.layout.world_size == 8 for config in CONFIGS) <= 3  # those take long
    for axis in ("pp", "dp", "fsdp", "tp"):
        assert sum(getattr(config, axis) > 1 for config in CONFIGS) >= 3, axis
    assert {config.sharding for config in CONFIGS} == {0, 1, 2, 3}
    assert {config.pipeline for config in CONFIGS if config.pp > 1} >= {"1f1b", "zb-h1"}
    assert {config.collectives for config in CONFIGS} == {"torch", "ours"}
    used = [{axis for axis in ("pp", "dp", "fsdp", "tp") if getattr(config, axis) > 1} for config in CONFIGS]
    for pair in ({"pp", "fsdp"}, {"pp", "tp"}, {"fsdp", "tp"}, {"dp", "fsdp"}, {"pp", "dp"}):
        assert any(pair <= axes for axes in used), pair
    assert any({"pp", "fsdp", "tp"} <= axes for axes in used)
    assert any(config.optimizer == "muon" and config.sharding for config in CONFIGS)
    assert any(config.optimizer == "muon" and config.tp > 1 for config in CONFIGS)
    assert any(config.sharding == 3 and config.pp > 1 for config in CONFIGS)
    assert any(config.sharding == 3 and config.tp > 1 for config in CONFIGS)


def reference(config: ParallelConfig, tokens, optimizer_dtype=torch.float64):
    """Losses, clipped gradients and weights after each step of one process."""
    model = GPT(config.model_config(VOCABULARY)).double()
    values = stir(dict(model.named_parameters()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])
    optimizers = make_optimizers(model, config, optimizer_dtype)
    for tokens_BT, targets_BT in tokens:
        loss = model(tokens_BT, targets_BT)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        yield loss.item(), norm.item(), gradients, {name: p.detach() for name, p in model.named_parameters()}


def assembled(config: ParallelConfig, rank: int, world_size: int, **options) -> Assembly:
    """In float64, with the weights of `reference`."""
    world = World(rank, world_size, rank, torch.device("cpu"), "gloo" if world_size > 1 else None)
    assembly = Assembly(config, VOCABULARY, world, dtype=torch.float64, **options)
    whole = {name: p for name, p in GPT(config.model_config(VOCABULARY)).double().named_parameters()}
    values = stir(whole)
    pieces = assembly.strategy.pieces()
    with torch.no_grad():
        for name, p in assembly.strategy.parameters().items():
            p.copy_(pieces[name].of(values[name]).view(p.shape))
    assembly.strategy.stepped()
    return assembly


def worst(config: ParallelConfig, rank: int, world_size: int) -> dict[str, float]:
    """The largest errors of this rank: loss, norm, gradients, weights; by name where one is not within 1e-12."""
    torch.manual_seed(rank)
    batches = [batch(config.model_config(VOCABULARY), ROWS, seed=step) for step in range(STEPS)]
    assembly = assembled(config, rank, world_size)
    data, errors = assembly.data, {}
    rows = slice(data.rank * ROWS // data.size, (data.rank + 1) * ROWS // data.size)
    for (tokens_BT, targets_BT), (loss, norm, gradients, weights) in zip(
        batches, reference(config, batches), strict=True
    ):
        mine = assembly.gradients(tokens_BT[rows], targets_BT[rows])
        errors["loss"] = abs(assembly.total(mine).item() / data.size - loss) / loss
        errors["norm"] = abs(assembly.clip(config.clip) - norm) / norm
        parameters, pieces = assembly.strategy.parameters(), assembly.strategy.pieces()
        for name, p in parameters.items():
            errors[f"gradient of {name}"] = error(p.grad, pieces[name].of(gradients[name]).view(p.shape))
        assembly.apply()
        for name, p in parameters.items():
            errors[f"weight {name}"] = error(p.detach(), pieces[name].of(weights[name]).view(p.shape))
        bad = {what: value for what, value in errors.items() if not (value <= 1e-12)}
        if bad:
            return bad
    return {}


def many(rank: int, world_size: int, configs: list[ParallelConfig]) -> list[dict[str, float]]:
    return [worst(config, rank, world_size) for config in configs]


@pytest.mark.parametrize("world_size", sorted({config.layout.world_size for config in CONFIGS}))
def test_any_composition_equals_one_process(world_size):
    configs = [config for config in CONFIGS if config.layout.world_size == world_size]
    for rank, found in enumerate(spawn(many, world_size, configs, timeout_s=120)):
        for config, bad in zip(configs, found, strict=True):
            assert not bad, (rank, str(config.layout), config.pipeline, config.zero, config.collectives, bad)


def test_one_process_is_a_layout_too():
    assert worst(BASE, 0, 1) == {}


def recorded(rank: int, world_size: int, config: ParallelConfig, change: str) -> Recording:
    """One step under `config`, in which one number of one parameter is another."""
    assembly = assembled(config, rank, world_size)
    parameters, pieces = assembly.strategy.parameters(), assembly.strategy.pieces()
    if change in parameters:
        whole = torch.zeros(pieces[change].shape, dtype=torch.float64)
        whole.view(-1)[5] = 1e-3
        with torch.no_grad():
            parameters[change].add_(pieces[change].of(whole).view(parameters[change].shape))
        assembly.strategy.stepped()
    tokens_BT, targets_BT = batch(config.model_config(VOCABULARY), ROWS)
    data = assembly.data
    rows = slice(data.rank * ROWS // data.size, (data.rank + 1) * ROWS // data.size)
    with record(assembly.stages) as recording:
        assembly.gradients(tokens_BT[rows], targets_BT[rows])
    recording.keep(parameters, pieces)
    return recording


@pytest.mark.parametrize(
    "options", [{"tp": 2, "fsdp": 2, "zero": 2}, {"tp": 2, "pp": 2, "sequence_parallel": True, "pipeline": "gpipe"}]
)
def test_the_divergence_finder_names_the_module_that_differs(options):
    config = replace(BASE, **options)
    alone = assemble([recorded(0, 1, BASE, "")], BASE.layout)
    for change, names in (("", {""}), ("blocks.2.mlp.down.weight", {"blocks.2.mlp.down", "blocks.2.mlp"})):
        run = assemble(spawn(recorded, 4, config, change), config.layout)
        found = first_difference(alone, run, 1e-10)
        assert (found.name if found else "") in names, str(found)
