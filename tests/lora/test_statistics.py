"""The test and the interval against scipy, enumeration of every case, and their own promise (coverage)."""

import itertools
import re
from functools import cache

import numpy as np
import pytest

pytest.importorskip("scipy", reason="pip install scipy")

from scipy import stats

from lora.statistics import (
    Comparison,
    Interval,
    McNemar,
    bootstrap_difference,
    compare,
    edit_distance,
    edit_similarity,
    mcnemar_exact,
)


def answers(only_a, only_b, both=0, neither=0):
    a = [True] * only_a + [False] * only_b + [True] * both + [False] * neither
    b = [False] * only_a + [True] * only_b + [True] * both + [False] * neither
    return a, b


# -- McNemar --
def test_mcnemar_equals_scipys_binomial_test():
    pairs = [*itertools.product(range(13), repeat=2), (150, 90), (3, 400), (501, 500)]
    for only_a, only_b in pairs:
        result = mcnemar_exact(*answers(only_a, only_b, both=3, neither=2))
        expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
        assert (result.only_a, result.only_b) == (only_a, only_b)
        assert abs(result.p_value - expected) <= 1e-12 * expected, (only_a, only_b)


def test_mcnemar_equals_every_flip_of_the_signs():
    """If A and B are the same, every discordant pair may as well be the other way round: 2^n equal cases."""
    for only_a, only_b in itertools.product(range(6), repeat=2):
        n, seen = only_a + only_b, abs(only_a - only_b)
        extreme = sum(abs(sum(signs)) >= seen for signs in itertools.product((-1, 1), repeat=n))
        p_value = mcnemar_exact(*answers(only_a, only_b, both=1)).p_value
        assert abs(p_value - extreme / 2**n) <= 1e-15


def test_mcnemar_looks_at_what_differs_only():
    alone, among_others = mcnemar_exact(*answers(7, 2)), mcnemar_exact(*answers(7, 2, both=900, neither=41))
    assert alone == among_others
    assert mcnemar_exact(*reversed(answers(7, 2))) == McNemar(2, 7, alone.p_value)
    assert mcnemar_exact([True], [True]).p_value == 1.0
    assert mcnemar_exact(*answers(2000, 0)).p_value == 0.0  # 2^-1999 is no float
    assert mcnemar_exact(np.array([1, 0, 1]), np.array([0, 0, 1])) == McNemar(1, 0, 1.0)


# -- bootstrap --
def test_bootstrap_equals_the_enumeration_of_all_samples():
    """Four pairs have 4^4 samples with replacement; the drawn quantiles are those of all of them."""
    a, b = np.array([0.3, 1.7, -0.6, 2.2]), np.array([1.1, 0.2, 0.5, 0.9])
    means = np.array([(a - b)[list(chosen)].mean() for chosen in itertools.product(range(4), repeat=4)])
    for level in (0.5, 0.8, 0.95):
        interval = bootstrap_difference(a, b, draws=40_000, level=level, seed=3)
        # The distribution is a staircase: each end lies between the quantiles half a percent to both sides.
        for end, quantile in ((interval.low, (1 - level) / 2), (interval.high, (1 + level) / 2)):
            below, above = np.quantile(means, [max(0, quantile - 0.005), min(1, quantile + 0.005)])
            assert below - 1e-12 <= end <= above + 1e-12, (level, quantile)
        assert abs(interval.difference - (a - b).mean()) <= 1e-15 and interval.level == level


def test_bootstrap_agrees_with_scipys():
    generator = np.random.default_rng(5)
    a, b = generator.normal(0.4, 1, 60), generator.normal(0, 1, 60)
    ours = bootstrap_difference(a, b, draws=20_000, seed=1)
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: (x - y).mean(axis=axis), paired=True, vectorized=True, n_resamples=20_000,
        method="percentile", rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    spread = (a - b).std() / 60**0.5
    assert abs(ours.low - theirs.low) <= 0.06 * spread and abs(ours.high - theirs.high) <= 0.06 * spread


def test_bootstrap_of_a_ratio_agrees_with_scipys():
    """Nats of a long answer as of a short one: with a fixed denominator the interval would be far too narrow."""
    generator = np.random.default_rng(6)
    tokens = generator.integers(2, 40, 70)
    a, b = 60 + generator.normal(0, 2, 70), 30 + generator.normal(0, 2, 70)
    ours = bootstrap_difference(a, b, counts=tokens, draws=20_000, seed=1)
    theirs = stats.bootstrap(
        (a, b, tokens), lambda x, y, n, axis: (x - y).sum(axis=axis) / n.sum(axis=axis), paired=True, vectorized=True,
        n_resamples=20_000, method="percentile", rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert ours.difference == pytest.approx((a.sum() - b.sum()) / tokens.sum(), rel=1e-12)
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) <= 0.03 * width and abs(ours.high - theirs.high) <= 0.03 * width
    fixed = bootstrap_difference(a / tokens.mean(), b / tokens.mean(), draws=20_000, seed=1)
    assert fixed.high - fixed.low < 0.3 * width
    ones = bootstrap_difference(a, b, counts=np.ones(70), seed=3)
    assert ones == bootstrap_difference(a, b, seed=3)
    for counts, message in (
        (tokens[:-1], "69 and 70 values"),
        (tokens * 0, "expected positive"),
        ([np.nan] * 70, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            bootstrap_difference(a, b, counts=counts, seed=0)


def test_bootstrap_is_a_function_of_the_seed_and_of_the_differences():
    generator = np.random.default_rng(0)
    a, b = generator.integers(-9, 10, (2, 37)).astype(float)
    first = bootstrap_difference(a, b, draws=500, seed=7)
    assert first == bootstrap_difference(list(a), list(b), draws=500, seed=7)
    assert first != bootstrap_difference(a, b, draws=500, seed=8)
    # Pairs stay together: what both have in common does not count. Samples of a and b apart would be much wider.
    common = generator.integers(-(10**6), 10**6, 37).astype(float)
    shifted = bootstrap_difference(a + common, b + common, draws=500, seed=7)
    assert shifted == first
    mirrored = bootstrap_difference(b, a, draws=500, seed=7)
    assert abs(mirrored.low + first.high) <= 1e-12 and abs(mirrored.high + first.low) <= 1e-12


@pytest.mark.parametrize("at_once", [1, 40, 37 * 11])
def test_bootstrap_does_not_depend_on_what_is_drawn_at_once(monkeypatch, at_once):
    a, b = np.random.default_rng(0).normal(size=(2, 37))
    whole = bootstrap_difference(a, b, draws=203, seed=7)
    monkeypatch.setattr("lora.statistics.DRAWN_AT_ONCE", at_once)
    assert bootstrap_difference(a, b, draws=203, seed=7) == whole


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bootstrap_covers_the_truth_as_often_as_it_says(seed):
    """Normal pairs with a mean difference of 0.3: of 300 intervals at 90%, about 270 hold it (each side of which
    3 standard deviations are 16; percentile intervals of 40 pairs are a little narrow)."""
    generator, held = np.random.default_rng(seed), 0
    for trial in range(300):
        a, b = generator.normal(0.3, 1, 40), generator.normal(0, 0.5, 40)
        interval = bootstrap_difference(a, b, draws=300, level=0.9, seed=trial)
        held += interval.low <= 0.3 <= interval.high
    assert 248 <= held <= 286, held


# -- edit distance --
def brute_force_distance(a, b):
    @cache
    def distance(i, j):
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(replaced, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(a), len(b))


def test_edit_distance_equals_brute_force():
    generator = np.random.default_rng(1)
    texts = ["".join(generator.choice(list("abé"), size=generator.integers(0, 9))) for _ in range(60)]
    for a, b in itertools.product(texts, texts):
        expected = brute_force_distance(a, b)
        assert edit_distance(a, b) == expected, (a, b)
        longest = max(len(a), len(b))
        assert edit_similarity(a, b) == (1 - expected / longest if longest else 1.0)


def test_edit_distance_of_known_words():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("flaw", "lawn") == 2
    assert edit_similarity("", "") == 1.0 and edit_similarity("", "ab") == 0.0 and edit_similarity("ab", "ab") == 1.0


# -- the line --
def test_comparison_says_everything_in_one_line():
    a, b = answers(41, 25, both=265, neither=169)
    comparison = compare("LoRA", a, "full", b)
    assert (comparison.examples, comparison.right_a, comparison.right_b) == (500, 306, 290)
    assert comparison.test == mcnemar_exact(a, b)
    assert comparison.interval == bootstrap_difference(a, b, seed=0)
    line, interval = str(comparison), comparison.interval
    assert "\n" not in line and line.startswith("LoRA 61.2% - full 58.0% = +3.2 points, 95% interval [")
    assert f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]" in line
    assert f"p = {comparison.test.p_value:.3g} (41 only LoRA, 25 only full, 500 examples)" in line
    assert interval.low <= 0.032 <= interval.high


def test_no_line_without_its_interval_and_p():
    for a, b in (answers(0, 0, both=3), answers(0, 2), answers(3, 3), answers(1200, 0)):
        line = str(compare("a", a, "b", b, draws=100, level=0.9))
        assert re.search(r"90% interval \[[+-][\d.]+, [+-][\d.]+\], exact McNemar p [=<] [\de.-]+ \(", line), line


# -- refused --
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([True], [True, False], "1 and 2 values: expected as many"),
        ([], [], "0 examples: expected at least 1"),
        ([True, 0.5], [True, False], r"correct_a \[True, 0.5\]: expected a row of true and false"),
        ([True, False], [float("nan"), True], r"correct_b \[nan, True\]"),
        (["yes"], ["no"], "correct_a"),
        ([[True]], [[True]], "correct_a"),
    ],
)
def test_mcnemar_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        mcnemar_exact(a, b)
    with pytest.raises(ValueError, match=message):
        compare("a", a, "b", b)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([1.0], [2.0], {}, "1 examples: expected at least 2"),
        ([1.0, 2.0], [2.0], {}, "2 and 1 values"),
        ([1.0, float("nan")], [2.0, 1.0], {}, r"values_a \[1.0, nan\]: expected a row of finite numbers"),
        ([1.0, 2.0], [2.0, float("inf")], {}, "values_b"),
        ([1.0, 2.0], [2.0, 1.0], {"level": 1.0}, "level 1.0: expected a share"),
        ([1.0, 2.0], [2.0, 1.0], {"level": float("nan")}, "level nan"),
        ([1.0, 2.0], [2.0, 1.0], {"draws": 30}, "draws 30: expected at least 4[01], one in each tail at 0.95"),
    ],
)
def test_bootstrap_refuses(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_difference(a, b, seed=0, **options)


def test_comparison_refuses_what_does_not_belong_together():
    interval = Interval(0.0, 0.0, 0.0, 0.95)
    with pytest.raises(ValueError, match="both methods are called 'a'"):
        Comparison("a", "a", 2, 1, 1, interval, McNemar(0, 0, 1.0))
    with pytest.raises(ValueError, match="2 and 1 right do not belong to"):
        Comparison("a", "b", 2, 2, 1, interval, McNemar(0, 0, 1.0))
