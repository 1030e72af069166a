"""Curves of characters: means against numpy, marks by hand. (What braille draws: tests/speedrun/test_dashboard.py.)"""

import itertools

import numpy as np
import pytest

from common import sparks


def test_a_long_history_is_kept_as_means():
    rng = np.random.default_rng(0)
    values = rng.normal(size=1000)
    history = sparks.History(64)
    for value in values:
        history.add(float(value))
    assert history.per == 16 and len(history.values) == 62
    expected = values[: 62 * 16].reshape(62, 16).mean(1)
    assert np.abs(np.array(history.values) - expected).max() <= 1e-12


@pytest.mark.parametrize(("size", "points"), [(1, 1), (3, 10), (10, 3), (100, 100), (7, 5)])
def test_resampled(size, points):
    values = list(np.random.default_rng(1).normal(size=size))
    found = sparks.resampled(values, points)
    edges = [i * size // points for i in range(points + 1)]
    expected = [np.mean(values[a : max(b, a + 1)]) for a, b in itertools.pairwise(edges)]
    assert len(found) == points and np.abs(np.array(found) - expected).max() <= 1e-12


def test_marks():
    assert sparks.sparkline([8, 4, 1], 3, True) == "█▄▁"
    assert sparks.sparkline([5, 5], 4, True) == "▁▁▁▁"
    assert sparks.bar(0.5, 10, True) == "█████░░░░░" and sparks.bar(2.0, 6, False) == "[====]"
    assert sparks.braille([0, 3], 1) == [chr(0x2800 + 0x40 + 0x08 + 0x10 + 0x20)], "dots 7, 4, 5, 6"
    assert sparks.ascii_curve([5, 0, 3], 2) == ["' .", " . "]
