"""Activation checkpointing: gradients bitwise those without it; the bytes that stay between the passes, by formula."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from parallel.activation import apply_activation_policy
from parallel.memory import POLICIES, LiveBytes, Plan, activations, block_activations, head_activations
from parallel.model import StageGPT, materialise
from tests.parallel import gpts

# Wide enough that the tokens and rotary tables are next to nothing.
WIDE = {name: replace(config, width=48, layers=4, context=40) for name, config in gpts.CONFIGS.items()}
ROWS, T = 3, 37


def stage_of(config, dtype=torch.float64) -> StageGPT:
    stage = StageGPT(config).to(dtype)
    materialise(stage)
    values = gpts.stir(dict(stage.named_parameters()))
    with torch.no_grad():
        for name, p in stage.named_parameters():
            p.copy_(values[name])
    return stage


def plan_of(dtype=torch.float64) -> Plan:
    size = torch.finfo(dtype).bits // 8
    return Plan(rows=ROWS, T=T, number=size, master=size, fused=False)


def gradients(stage, tokens_BT, targets_BT):
    torch.manual_seed(5)
    for p in stage.parameters():
        p.grad = None
    loss = stage(None, tokens_BT, targets_BT)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in stage.named_parameters()}


@pytest.mark.parametrize("config", WIDE.values(), ids=WIDE)
def test_gradients_are_bitwise_those_without(config):
    stage, batch = stage_of(config), gpts.batch(config, ROWS, T=T)
    block = stage.blocks["1"].mlp
    forward = block.forward
    block.forward = lambda x_BTC: torch.nn.functional.dropout(forward(x_BTC), 0.3)  # random numbers come again too
    loss, want = gradients(stage, *batch)
    for policy in ("none", "full", "selective"):
        assert apply_activation_policy(stage, policy) == (0 if policy == "none" else 4)
        again, got = gradients(stage, *batch)
        assert torch.equal(loss, again)
        for name, gradient in want.items():
            assert torch.equal(got[name], gradient), (policy, name)
        with torch.no_grad():
            assert stage(None, batch[0]).isfinite().all()


def held_bytes(stage, batch) -> int:
    """What is there after the forward pass and was not before."""
    gradients(stage, *batch)  # so that tables and the like exist
    for p in stage.parameters():
        p.grad = None
    with LiveBytes() as live:
        for tensor in (*stage.parameters(), *batch, *(x for tables in stage.tables.values() for x in tables)):
            live.add(tensor)
        before = live.now()
        loss = stage(None, *batch)
        held = live.now() - before
        loss.backward()
    return held


@pytest.mark.parametrize("config", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_bytes_by_formula(config, dtype):
    stage, batch, plan = stage_of(config, dtype), gpts.batch(config, ROWS, T=T), plan_of(dtype)
    held = {}
    for policy in POLICIES:
        apply_activation_policy(stage, policy)
        held[policy] = held_bytes(stage, batch)
        predicted = config.layers * block_activations(config, plan, policy) + head_activations(config, plan)
        assert held[policy] == pytest.approx(predicted, rel=0.01), policy
    assert held["full"] < held["selective"] < held["none"]


def saved_bytes(stage, batch) -> int:
    """What autograd hands to its hooks, each storage once, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that no other comes to its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        stage(None, *batch)
    return sum(nbytes for nbytes, _ in seen.values())


def test_autograd_saves_what_the_formula_says():
    """Another way to count, which sees nothing of what a checkpointed block saves within itself."""
    config = WIDE["gpt2"]
    stage, batch, plan = stage_of(config), gpts.batch(config, ROWS, T=T), plan_of()
    for policy in ("none", "full"):
        apply_activation_policy(stage, policy)
        predicted = config.layers * block_activations(config, plan, policy) + head_activations(config, plan)
        assert saved_bytes(stage, batch) == pytest.approx(predicted, rel=0.01), policy


def test_budget_takes_the_fewest_blocks():
    config = WIDE["ours"]
    stage, batch, plan = stage_of(config), gpts.batch(config, ROWS, T=T), plan_of()
    loss, want = gradients(stage, *batch)
    by_count = [activations(config, plan, "full", recomputed=count) for count in range(5)]
    held = []
    for count in (0, 2, 3, 4):
        assert apply_activation_policy(stage, "budget", by_count[count], plan=plan) == count
        held.append(held_bytes(stage, batch))
        assert held[-1] <= by_count[count] * 1.01
        again, got = gradients(stage, *batch)
        assert torch.equal(loss, again) and all(torch.equal(got[name], want[name]) for name in want)
    assert sorted(set(held), reverse=True) == held
    with pytest.raises(ValueError, match=rf"a budget of {by_count[4] - 1:,} bytes for activations: the least"):
        apply_activation_policy(stage, "budget", by_count[4] - 1, plan=plan)


def test_bad_input():
    stage = StageGPT(gpts.SMALL)
    with pytest.raises(ValueError, match="activation policy 'some': expected one of none, full, selective, budget"):
        apply_activation_policy(stage, "some")
    for policy, budget, plan in (("budget", None, Plan()), ("budget", 100, None), ("full", 100, Plan())):
        with pytest.raises(ValueError, match=f"policy '{policy}' with budget"):
            apply_activation_policy(stage, policy, budget, plan=plan)
    with pytest.raises(ValueError, match="stage 0 of 3 has 3 blocks: expected"):
        apply_activation_policy(stage, "budget", 10**9, plan=Plan(pp=3))
