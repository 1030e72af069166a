"""Muon against torch.optim.Muon and against the polar factor of an SVD; who is stepped by what."""

import math
from dataclasses import replace

import pytest
import torch

from minigpt import optim
from minigpt.model import GPT
from minigpt.optim import Muon, group_names, make_optimizers, orthogonalize
from minigpt.train_config import PRESETS, TrainConfig, schedule


def polar(g_NRC: torch.Tensor, *_) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(g_NRC, full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 17, 40), (2, 40, 17), (1, 1, 9), (1, 9, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_orthogonalize_gives_the_polar_factor(shape, dtype):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, exact = orthogonalize(g, dtype), polar(g)
    assert ours.dtype == torch.float32 and ours.shape == g.shape
    cosines = (ours * exact).sum((1, 2)) / ours.norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert cosines.min() >= 0.98
    values = torch.linalg.svdvals(ours.double())
    assert values.max() <= 1.3 and values.mean() >= 0.85, values


def test_singular_values_down_to_a_hundredth_are_lifted():
    u, v = (torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0] for _ in range(2))
    g = u @ torch.diag(torch.logspace(-2, 0, 32, dtype=torch.float64)) @ v.T
    values = torch.linalg.svdvals(orthogonalize(g[None], torch.float64))
    assert values.min() >= 0.7 and values.max() <= 1.3, values


def test_a_batch_is_the_matrices_one_by_one():
    g = torch.randn(3, 8, 12, dtype=torch.float64)
    alone = torch.stack([orthogonalize(part[None], torch.float64)[0] for part in g])
    assert (orthogonalize(g, torch.float64) - alone).abs().max() <= 1e-12


def test_zero_stays_zero():
    assert not orthogonalize(torch.zeros(1, 4, 4), torch.bfloat16).any()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_is_torchs_muon_around_the_same_polar_factor(weight_decay, monkeypatch):
    """Both with the exact polar factor in place of their iteration: momentum, look ahead, scale and decay remain."""
    monkeypatch.setattr(optim, "orthogonalize", polar)
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda g, *_: polar(g[None])[0])
    shapes = [(6, 4), (4, 6), (5, 5), (6, 4)]
    start = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    sides = [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    ours = Muon(sides[0], lr=0.1, momentum=0.9, weight_decay=weight_decay)
    theirs = torch.optim.Muon(sides[1], lr=0.1, momentum=0.9, weight_decay=weight_decay)
    for _ in range(4):
        for p, q in zip(*sides, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q, before in zip(*sides, start, strict=True):
        assert (p - before).abs().max() > 0.05
        error = (p - q).abs().max().item()
        assert error <= 1e-10, error


def test_muon_takes_matrices_only():
    with pytest.raises(ValueError, match=r"Muon got parameters of shape \(3,\): expected matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_a_parameter_without_gradient_is_left_alone():
    p, q = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    p.grad = torch.eye(2)
    Muon([p, q], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(q, torch.ones(2, 2)) and not torch.equal(p, torch.ones(2, 2))


def test_every_parameter_has_one_group():
    config = replace(PRESETS["tiny"], bias=True, positions="learned", norm="layernorm", value_embeddings=True)
    model = GPT(config.model_config(512))
    groups = group_names(model)
    names = [name for members in groups.values() for name in members]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    shapes = dict(model.named_parameters())
    assert all(shapes[name].ndim == 2 and name.startswith("blocks") for name in groups["matrices"])
    assert groups["head"] == ["head.weight"]
    assert set(groups["embedding"]) == {
        "embedding.weight", "position_embedding.weight", "blocks.1.attention.value_embedding.weight",
    }  # fmt: skip


def test_peaks_and_decays_go_where_the_config_says():
    config = TrainConfig(
        muon_lr=0.5,
        learning_rate=0.1,
        embedding_lr=0.2,
        head_lr=0.3,
        gain_lr=0.6,
        weight_decay=0.4,
        value_embeddings=False,
    )
    model = GPT(config.model_config(512))
    muon, adamw = make_optimizers(model, config)
    assert [(g["lr"], g["weight_decay"], g["momentum"]) for g in muon.param_groups] == [(0.5, 0.4, config.momentum)]
    assert [(g["lr"], g["weight_decay"]) for g in adamw.param_groups] == [(0.2, 0.0), (0.3, 0.4), (0.6, 0.0)]
    only = make_optimizers(model, replace(config, optimizer="adamw", head_lr=0.0))
    assert len(only) == 1 and [g["peak_lr"] for g in only[0].param_groups] == [0.1, 0.2, 0.1, 0.6]
    assert sum(len(g["params"]) for g in only[0].param_groups) == len(list(model.parameters()))


def test_the_cosine_follows_the_formula():
    config = TrainConfig(schedule="cosine", steps=101, warmup=10, floor=0.1)
    shares = [schedule(step, config) for step in range(101)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    for step in range(10, 101):
        assert shares[step] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90)))
    assert shares[10] == 1.0 and shares[100] == pytest.approx(0.1)
    assert schedule(0, replace(config, warmup=0)) == 1.0
    assert schedule(0, replace(config, steps=1, warmup=0)) == 1.0


def test_warmup_stable_decay_follows_the_formula():
    config = TrainConfig(schedule="wsd", steps=100, warmup=10, cooldown=0.4, floor=0.2)
    shares = [schedule(step, config) for step in range(100)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10:61] == [1.0] * 51
    for step in range(60, 100):
        assert shares[step] == pytest.approx(0.2 + 0.8 * (100 - step) / 40)
    assert set(schedule(step, replace(config, cooldown=0.0)) for step in range(10, 99)) == {1.0}
