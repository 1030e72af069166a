"""Are two methods different? Paired answers on the same examples: exact McNemar test, bootstrap interval, one line.

Both methods are judged on the same examples, so what counts is where they differ; a percentage alone says nothing
about that, and none is printed alone. Refused: lists of unequal length, values that are no numbers, an interval
whose tails hold no draw.

Letters: N examples, D draws, b examples that only A has right, c those that only B has right.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWN_AT_ONCE = 1 << 20  # indices in memory at a time


@dataclass(frozen=True, slots=True)
class McNemar:
    """b and c as above, and the two-sided p-value."""

    only_a: int
    only_b: int
    p_value: float


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean of a - b over the examples, or over what they count, and the interval around it."""

    difference: float
    low: float
    high: float
    level: float


def mcnemar_exact(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> McNemar:
    """Two-sided exact test of "A and B are right equally often" (McNemar, 1947, with the binomial of its null).

    Examples that both or neither have right say nothing; of the b + c others, each is A's with probability 1/2 where
    the methods are equal. p is twice the smaller tail, at most 1, exact up to the last rounding, and 1 where the
    methods never differ. Raises ValueError for lists of unequal length, none, or values other than true and false.
    """
    a_N, b_N = _paired(_truths("correct_a", correct_a), _truths("correct_b", correct_b), at_least=1)
    only_a, only_b = int((a_N & ~b_N).sum()), int((~a_N & b_N).sum())
    return McNemar(only_a, only_b, binomial_p_value(only_a, only_b))


def binomial_p_value(b: int, c: int) -> float:
    """min(1, 2 P(X <= min(b, c))) for X of a fair coin thrown b + c times; whole numbers until the last division."""
    thrown, term, tail = b + c, 1, 0
    for i in range(min(b, c) + 1):  # term = thrown choose i
        tail += term
        term = term * (thrown - i) // (i + 1)
    return min(1.0, 2 * tail / (1 << thrown))


def bootstrap_difference(
    values_a: Sequence[float], values_b: Sequence[float], *, counts: Sequence[float] | None = None,
    draws: int = 10_000, level: float = 0.95, seed: int,
) -> Interval:  # fmt: skip
    """Percentile interval of mean(a - b) (Efron, 1979): N pairs are drawn from the N with replacement, `draws` times.

    With `counts`, of sum(a - b) / sum(counts): of nats and tokens of the examples, the difference of two losses a
    token. Then the count of a pair is drawn with it; a fixed one would make an interval of another quantity.

    Pairs stay together. The same seed gives the same interval. Where all differences are equal, its width is zero:
    the bootstrap knows nothing beyond the examples. Raises ValueError for lists of unequal length or of fewer than two,
    values that are not finite, counts that are not positive, a level outside (0, 1), and too few draws for that level.
    """
    if not (0 < level < 1):
        raise ValueError(f"level {level}: expected a share between 0 and 1")
    if not (draws * (1 - level) / 2 >= 1):
        raise ValueError(f"draws {draws}: expected at least {math.ceil(2 / (1 - level))}, one in each tail at {level}")
    a_N, b_N = _paired(_numbers("values_a", values_a), _numbers("values_b", values_b), at_least=2)
    difference_N = a_N - b_N
    count_N = np.ones_like(a_N) if counts is None else _paired(_numbers("counts", counts), a_N, at_least=2)[0]
    if not (count_N > 0).all():
        raise ValueError(f"counts {_shown(counts)}: expected positive numbers")
    N, generator = difference_N.size, np.random.default_rng(seed)
    means_D, rows = np.empty(draws), max(1, DRAWN_AT_ONCE // N)
    for start in range(0, draws, rows):
        chosen_DN = generator.integers(N, size=(min(rows, draws - start), N))
        means_D[start : start + rows] = difference_N[chosen_DN].sum(axis=1) / count_N[chosen_DN].sum(axis=1)
    low, high = np.quantile(means_D, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference_N.sum() / count_N.sum()), float(low), float(high), level)


def edit_similarity(a: str, b: str) -> float:
    """1 - Levenshtein distance / length of the longer text, in characters; 1 for two empty texts."""
    longest = max(len(a), len(b))
    return 1 - edit_distance(a, b) / longest if longest else 1.0


def edit_distance(a: str, b: str) -> int:
    """The fewest characters put in, taken out or replaced that make b of a, with one row of the table in memory.

    (Levenshtein, 1966; Wagner and Fischer, 1974.)
    """
    if len(b) > len(a):
        a, b = b, a
    row = list(range(len(b) + 1))  # row[j]: distance of what is read of a to b[:j]
    for i, character in enumerate(a, start=1):
        corner, row[0] = row[0], i  # corner: the row before, one to the left
        for j, other in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (character != other))
    return row[-1]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two methods on the same examples; `str` is the line for a report, with the interval and p next to each share."""

    name_a: str
    name_b: str
    examples: int
    right_a: int
    right_b: int
    interval: Interval
    test: McNemar

    def __post_init__(self) -> None:
        if self.name_a == self.name_b:
            raise ValueError(f"both methods are called {self.name_a!r}: expected two names")
        if self.right_a - self.right_b != self.test.only_a - self.test.only_b:
            raise ValueError(f"{self.right_a} and {self.right_b} right do not belong to {self.test}")

    def __str__(self) -> str:
        interval, test = self.interval, self.test
        # With two thousand answers all on one side, p is below the smallest float.
        p = f"p = {test.p_value:.3g}" if test.p_value >= 1e-300 else "p < 1e-300"
        return (
            f"{self.name_a} {100 * self.right_a / self.examples:.1f}% - "
            f"{self.name_b} {100 * self.right_b / self.examples:.1f}% = {100 * interval.difference:+.1f} points, "
            f"{100 * interval.level:g}% interval [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}], "
            f"exact McNemar {p} ({test.only_a} only {self.name_a}, {test.only_b} only {self.name_b}, "
            f"{self.examples} examples)"
        )


def compare(
    name_a: str,
    correct_a: Sequence[bool],
    name_b: str,
    correct_b: Sequence[bool],
    *,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """The share of examples that are right under A and under B. Raises ValueError as the two tests above do."""
    test = mcnemar_exact(correct_a, correct_b)
    a_N, b_N = _truths("correct_a", correct_a), _truths("correct_b", correct_b)
    interval = bootstrap_difference(a_N, b_N, draws=draws, level=level, seed=seed)
    return Comparison(name_a, name_b, a_N.size, int(a_N.sum()), int(b_N.sum()), interval, test)


def _truths(name: str, values: Sequence[bool]) -> np.ndarray:
    array_N = np.asarray(values)
    if array_N.ndim != 1 or array_N.dtype.kind not in "biuf" or not ((array_N == 0) | (array_N == 1)).all():
        raise ValueError(f"{name} {_shown(values)}: expected a row of true and false")
    return array_N.astype(bool)


def _numbers(name: str, values: Sequence[float]) -> np.ndarray:
    array_N = np.asarray(values)
    if array_N.ndim != 1 or array_N.dtype.kind not in "biuf" or not np.isfinite(array_N).all():
        raise ValueError(f"{name} {_shown(values)}: expected a row of finite numbers")
    return array_N.astype(np.float64)


def _shown(values: object) -> str:
    text = repr(values)
    return text if len(text) <= 80 else text[:77] + "..."


def _paired(a_N: np.ndarray, b_N: np.ndarray, *, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    if a_N.size != b_N.size:
        raise ValueError(f"{a_N.size} and {b_N.size} values: expected as many, in the order of the same examples")
    if a_N.size < at_least:
        raise ValueError(f"{a_N.size} examples: expected at least {at_least}")
    return a_N, b_N
