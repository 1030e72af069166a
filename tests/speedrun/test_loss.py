"""Head and loss by rows against the formula on all logits, in float64 and in bfloat16."""

from dataclasses import replace

import pytest
import torch

from minigpt.masks import Documents
from minigpt.model import GPT
from speedrun import loss as module
from speedrun.config import RaceConfig
from speedrun.loss import loss_of
from speedrun.model import build, race_loss, untie

SMALL = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 2, "mlp_width": 24, "context": 16, "eval_stride": 8}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 10)  # 36 tokens: four parts, the last one smaller


def stirred(dtype: torch.dtype = torch.float64, **changes) -> tuple[GPT, RaceConfig]:
    config = RaceConfig(**SMALL, **changes)
    torch.manual_seed(0)
    model = build(config, 50).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return model, config


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(50, (2, 3, 12), generator=generator)
    targets[0, :5] = -100
    return inputs, targets


def both(model: GPT, config: RaceConfig, weights: tuple[float, ...], dtype: torch.dtype) -> list[tuple]:
    """(loss, nats of the next token, gradients by name) by rows, and by race_loss of all logits."""
    inputs, targets = batch()
    results = []
    for way in ("rows", "all"):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            if way == "rows":
                loss, nats = loss_of(model, config, dtype, CPU)(inputs, targets, weights)
            else:
                loss, nats = race_loss(model(inputs), targets, weights, config.z_loss)
        assert not nats.requires_grad
        (3 * loss).backward()
        results.append((loss.item(), nats.item(), {name: p.grad for name, p in model.named_parameters()}))
        model.zero_grad()
    return results


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5, 0.25), (1.0,) + 20 * (0.1,)])
@pytest.mark.parametrize("changes", [{}, {"softcap": 0.0}, {"z_loss": 0.03}, {"tied": True}])
def test_by_rows_is_the_formula_on_all_logits(changes, weights):
    model, config = stirred(**changes)
    (loss, nats, ours), (wanted_loss, wanted_nats, theirs) = both(model, config, weights, torch.float64)
    assert abs(loss - wanted_loss) <= 1e-12 and abs(nats - wanted_nats) <= 1e-12
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).abs().max().item()
        assert error <= 1e-12 * (1 + gradient.abs().max().item()), f"{name}: {error}"


def test_in_bfloat16_it_is_no_further_from_the_truth():
    exact, config = stirred()
    truth = both(exact, config, (1.0, 0.5), torch.float64)[1]
    model, _ = stirred(torch.float32)
    model.load_state_dict({name: value.float() for name, value in exact.state_dict().items()})
    errors = [
        torch.stack([(found[2][n].double() - g).norm() / g.norm() for n, g in truth[2].items()]).mean().item()
        for found in both(model, config, (1.0, 0.5), torch.bfloat16)
    ]
    assert errors[0] <= 1.1 * errors[1] <= 0.05


def test_a_head_that_is_untied_on_the_way():
    model, config = stirred(tied=True)
    by_rows = loss_of(model, config, torch.float64, CPU)
    inputs, targets = batch()
    before = by_rows(inputs, targets, (1.0,))[0].item()
    weight = untie(model)
    with torch.no_grad():
        assert abs(by_rows(inputs, targets, (1.0,))[0].item() - before) <= 1e-12
        weight.mul_(2)
        wanted = race_loss(model(inputs), targets, (1.0,))[0]
        assert abs(by_rows(inputs, targets, (1.0,))[0] - wanted) <= 1e-12


def test_a_frozen_head_and_nan():
    model, config = stirred()
    model.head.weight.requires_grad_(False)
    loss = loss_of(model, config, torch.float64, CPU)(*batch(), (1.0,))[0]
    loss.backward()
    assert model.head.weight.grad is None and model.embedding.weight.grad is not None
    with torch.no_grad():
        model.head.weight[7, 3] = torch.nan
    assert loss_of(model, config, torch.float64, CPU)(*batch(), (1.0,))[0].isnan()


@pytest.mark.parametrize("fused_loss", [False, True])
def test_other_devices_and_the_models_own_loss_have_the_same_value(fused_loss):
    model, config = stirred()
    config = replace(config, fused_loss=fused_loss)  # of a model without a loss_fn
    inputs, targets = batch()
    loss, nats = loss_of(model, config, torch.float64, torch.device("cuda"))(inputs, targets, (1.0,))
    wanted, wanted_nats = race_loss(model(inputs), targets, (1.0,))
    assert abs(loss - wanted) <= 1e-12 and abs(nats - wanted_nats) <= 1e-12 and not nats.requires_grad


def test_targets_further_on_stay_in_their_document():
    inputs, targets = batch()
    documents = torch.tensor([[0] * 4 + [1] * 8, [0] * 12, [0] * 11 + [1]])
    where = Documents(torch.arange(12).expand(3, 12), documents)
    model, config = stirred()
    loss, nats = loss_of(model, config, torch.float64, CPU)(inputs, targets, (1.0, 0.5, 0.2), documents=where)
    wanted, wanted_nats = race_loss(model(inputs, documents=where), targets, (1.0, 0.5, 0.2), 0.0, where)
    assert abs(loss - wanted) <= 1e-12 and abs(nats - wanted_nats) <= 1e-12
