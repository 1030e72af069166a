"""The filters against transformers' own classes, draws against the softmax, and the settings that are refused."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt import sampling
from minigpt.sampling import Sampler, Sampling, draw, filtered


def random_logits(seed: int, B: int = 5, V: int = 37) -> torch.Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def assert_same(ours, theirs):
    """The same exclusions and the same distribution; temperature shifts a row, which softmax does not see."""
    assert torch.equal(ours == -math.inf, theirs == -math.inf)
    error = (ours.softmax(-1) - theirs.softmax(-1)).abs().max().item()
    assert error <= 1e-12, error


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (sampling.temperature, TemperatureLogitsWarper, (0.1, 0.7, 1.0, 3.0)),
        (sampling.top_k, TopKLogitsWarper, (1, 2, 36, 37, 100)),
        (sampling.top_p, TopPLogitsWarper, (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)),
        (sampling.min_p, MinPLogitsWarper, (0.0, 0.01, 0.3, 0.9, 1.0)),
    ],
)
def test_filters_are_those_of_transformers(seed, ours, theirs, values):
    logits_BV = random_logits(seed)
    for value in values:
        assert_same(ours(logits_BV, value), theirs(value)(None, logits_BV))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    logits_BV, tokens_BT = random_logits(0), torch.randint(37, (5, 9))
    seen_BV = torch.zeros(5, 37, dtype=torch.bool).scatter(1, tokens_BT, True)
    theirs_BV = RepetitionPenaltyLogitsProcessor(penalty)(tokens_BT, logits_BV)
    assert torch.equal(sampling.repetition_penalty(logits_BV, seen_BV, penalty), theirs_BV)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_transformers(seed):
    """All at once, with values at which other orders give something else (temperature and top-k commute)."""
    logits_BV, tokens_BT = random_logits(seed), torch.randint(37, (5, 20))
    settings = Sampling(temperature=1.7, top_k=9, top_p=0.8, min_p=0.15, repetition_penalty=1.5)
    warpers = [TemperatureLogitsWarper(1.7), TopKLogitsWarper(9), TopPLogitsWarper(0.8), MinPLogitsWarper(0.15)]
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5), *warpers])(tokens_BT, logits_BV)
    seen_BV = torch.zeros(5, 37, dtype=torch.bool).scatter(1, tokens_BT, True)
    assert_same(filtered(sampling.repetition_penalty(logits_BV, seen_BV, 1.5), settings), theirs)


def test_ties():
    flat_BV = torch.zeros(1, 6)
    assert sampling.top_k(flat_BV, 2).isfinite().all(), "equal ones at the border all stay"
    assert sampling.top_p(flat_BV, 0.5).isfinite().tolist() == [[True] * 3 + [False] * 3]
    assert sampling.min_p(flat_BV, 1.0).isfinite().all()
    assert Sampler(Sampling(temperature=0), 2, 6).choose(torch.tensor([[0, 1, 1, 1, 0, 1.0]] * 2)) == [1, 1]


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, top_k=3),
        Sampling(temperature=1.0, top_p=0.85),
        Sampling(temperature=1.0, min_p=0.2),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_softmax(settings):
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    p_V = filtered(logits_V[None].double(), settings)[0].softmax(-1).tolist()
    draws = []
    sampler = Sampler(settings, 40, 5)
    for _ in range(100):
        draws += sampler.choose(logits_V.expand(40, 5))
    for token, p in enumerate(p_V):
        deviation = abs(draws.count(token) - 4000 * p)
        assert deviation <= 4.5 * math.sqrt(4000 * p * (1 - p)), f"token {token}: {draws.count(token)} of {4000 * p}"


def test_draw_inverts_the_cumulative_distribution():
    logits_BV = random_logits(3)
    uniforms = [torch.rand(1, generator=torch.Generator().manual_seed(b), dtype=torch.float64).item() for b in range(5)]
    for row, uniform, token in zip(logits_BV, uniforms, draw(logits_BV, generators(5)).tolist(), strict=True):
        cumulative = row.softmax(-1).cumsum(-1)
        assert cumulative[token] > uniform and (token == 0 or cumulative[token - 1] <= uniform)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_excluded_tokens_are_never_drawn(uniform, monkeypatch):
    """At both ends of the uniform numbers too, where rounding could point outside."""
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.tensor([uniform], dtype=torch.float64))
    weights = torch.full((1, 9), -math.inf, dtype=torch.float64)
    weights[0, [2, 3, 6]] = torch.tensor([0.1, 0.7, 0.3], dtype=torch.float64)
    assert draw(weights, generators(1)).item() in (2, 3, 6)


def test_excluded_tokens_are_not_drawn_where_sums_are_rounded_upwards(monkeypatch):
    """As on a GPU, whose parallel sums need not stand still where the probability is 0."""
    cumsum, wobble = torch.Tensor.cumsum, torch.arange(6, dtype=torch.float64) * 1e-12
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: cumsum(self, dim) + wobble)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert draw(torch.tensor([[0.0, 0.0, *[-math.inf] * 4]], dtype=torch.float64), generators(1)).item() == 1


def test_a_row_does_not_depend_on_its_batch():
    logits = random_logits(4)
    together, alone = Sampler(Sampling(temperature=1.0, seed=10), 5, 37), []
    expected = [together.choose(logits) for _ in range(6)]
    for row in range(5):
        sampler = Sampler(Sampling(temperature=1.0, seed=10 + row), 1, 37)
        alone.append([sampler.choose(logits[row : row + 1])[0] for _ in range(6)])
    assert [list(step) for step in zip(*alone, strict=True)] == expected
    leaving = Sampler(Sampling(temperature=1.0, seed=10), 5, 37)
    assert leaving.choose(logits) == expected[0]
    leaving.keep([1, 4])
    for step in expected[1:]:
        assert leaving.choose(logits[[1, 4]]) == [step[1], step[4]]
    leaving.reseed(14)
    assert leaving.choose(logits[[4, 4]])[0] == expected[0][4]


def test_the_penalty_remembers_the_prompt_and_what_was_chosen():
    logits = torch.tensor([[4.0, 3.0, 2.9, -0.1]] * 2)
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), 2, 4)
    sampler.note(1, [0, 0, 3])
    assert [sampler.choose(logits) for _ in range(4)] == [[0, 1], [1, 2], [2, 0], [0, 0]]


def test_padded_vocabulary_is_never_drawn():
    logits = torch.tensor([[0.0, 0.0, math.nan, 9.0]])
    assert set(Sampler(Sampling(), 1, 2).choose(logits)) <= {0, 1}
    assert Sampler(Sampling(temperature=0), 1, 2).choose(logits) == [0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-308])
def test_the_limit_of_small_temperatures_is_the_argmax(temperature):
    logits = random_logits(5)
    assert Sampler(Sampling(temperature=temperature), 5, 37).choose(logits) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    with pytest.raises(ValueError, match="not finite"):
        Sampler(Sampling(temperature=temperature), 2, 3).choose(torch.tensor([[1.0, 2.0, 3.0], [1.0, bad, 2.0]]))


def test_a_penalty_that_overflows_is_refused():
    sampler = Sampler(Sampling(repetition_penalty=1e-308), 1, 2)
    sampler.note(0, [0])
    with pytest.raises(ValueError, match="repetition penalty 1e-308 is too extreme"):
        sampler.choose(torch.tensor([[1e9, 0.0]]))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-1e-9, math.inf, math.nan)),
        ("top_k", (-1, math.nan)),
        ("top_p", (0.0, -0.1, 1.0001, math.nan, math.inf)),
        ("min_p", (-0.1, 1.1, math.nan)),
        ("repetition_penalty", (0.0, -1.0, math.inf, math.nan)),
        ("seed", (-1, 2**63)),
    ],
)
def test_settings_out_of_range_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{name} {value}: expected"):
            Sampling(**{name: value})
