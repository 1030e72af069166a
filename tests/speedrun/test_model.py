"""The racing GPT against stage 2's, its loss against torch's, its changes on the way by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minigpt.model import GPT
from speedrun.config import RaceConfig
from speedrun.model import build, draw_ends, race_loss, stretch, untie

SMALL = {"layers": 3, "width": 16, "heads": 2, "kv_heads": 2, "mlp_width": 24, "context": 16, "eval_stride": 8}
TOKENS = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))


def test_without_switches_it_is_stage_2s_model():
    config = RaceConfig(**SMALL, seed=4)
    ours, theirs = build(config, 50), GPT(config.model_config(50), seed=4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_ends_that_do_not_begin_at_zero_are_gpt_2s():
    model = build(RaceConfig(**SMALL | {"width": 128, "mlp_width": 256}, zero_init=False), 500)
    assert abs(model.head.weight.std().item() - 0.02) <= 0.0005
    assert abs(model.blocks[1].mlp.down.weight.std().item() - 0.02 / math.sqrt(6)) <= 0.0003
    again = build(RaceConfig(**SMALL | {"width": 128, "mlp_width": 256}), 500)
    draw_ends(again, 0)
    assert torch.equal(again.head.weight, model.head.weight)


# -- the loss --
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_one_target_is_the_mean_cross_entropy(z_loss):
    logits = torch.randn(3, 12, 50, dtype=torch.float64, requires_grad=True)
    targets = TOKENS.clone()
    targets[0, :5] = -100
    loss, next_token = race_loss(logits, targets, (1.0,), z_loss)
    plain = F.cross_entropy(logits.reshape(-1, 50), targets.reshape(-1))
    wanted = plain + z_loss * logits.logsumexp(-1).square().mean()
    assert (next_token - plain).abs() <= 1e-12 and (loss - wanted).abs() <= 1e-12 and not next_token.requires_grad
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient - torch.autograd.grad(wanted, logits)[0]).abs().max() <= 1e-12


def test_tokens_further_on_by_hand():
    logits, targets = torch.randn(2, 7, 50, dtype=torch.float64), TOKENS[:2, :7]
    losses = [F.cross_entropy(logits[:, : 7 - k].reshape(-1, 50), targets[:, k:].reshape(-1)) for k in range(3)]
    loss, next_token = race_loss(logits, targets, (1.0, 0.5, 0.25))
    assert (loss - (losses[0] + 0.5 * losses[1] + 0.25 * losses[2])).abs() <= 1e-12
    assert (next_token - losses[0]).abs() <= 1e-12
    short = race_loss(logits[:, :2], targets[:, :2], (1.0, 0.5, 0.25, 0.1))[0]  # two places further there is none
    assert (short - race_loss(logits[:, :2], targets[:, :2], (1.0, 0.5))[0]).abs() <= 1e-12


# -- on the way --
def stirred(**changes) -> GPT:
    model = build(RaceConfig(**SMALL, **changes), 50).double()
    generator = np.random.default_rng(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(generator.normal(0, 0.3, p.shape)) + (p.ndim == 1))
    return model


def test_stretching_is_the_model_of_the_windows():
    model = stirred(rope_base=10_000.0)
    gain = model.blocks[1].attention.query_norm.weight.detach().clone()
    for windows in ("4", "4,8", "4,8", "4,8,16"):  # the third time is a run that was resumed
        stretch(model, windows)
    other = GPT(model.config).double()
    other.load_state_dict(model.state_dict())
    assert model.config.rope_windows == "4,8,16"
    assert (model.cos_TK - other.cos_TK).abs().max() <= 1e-6  # tables are kept in float32
    factor = (0.2 * math.log(2) + 1) ** 2
    assert (model.blocks[1].attention.query_norm.weight - factor * gain).abs().max() <= 1e-12


def test_an_untied_head_says_the_same_and_goes_its_own_way():
    model = stirred(tied=True)
    before = model(TOKENS)
    weight = untie(model)
    assert torch.equal(model(TOKENS), before) and not model.config.tied
    assert weight is dict(model.named_parameters())["head.weight"]
    weight.data.mul_(2)
    assert not torch.equal(model(TOKENS), before)
    again = GPT(model.config)
    again.load_state_dict(model.state_dict())


def test_attention_without_such_a_width_is_refused():
    with pytest.raises(ValueError, match="head width 8 with attention cuda: expected one of"):
        build(RaceConfig(**SMALL, attention="cuda"), 50)
