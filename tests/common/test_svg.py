"""Charts in SVG: points read back from the picture stand where their values belong; ticks are round; gaps are gaps."""

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from common import svg


def points_of(chart: str, log: bool, x_range: tuple[float, float], y_range: tuple[float, float]) -> np.ndarray:
    """The values behind the path of the first series, (N, 2)."""
    path = re.search(r'<path d="([^"]*)"', chart).group(1)
    places = np.array([[float(n) for n in pair.split()] for pair in re.split("[ML]", path)[1:]])
    left, right, bottom, top = svg.LEFT, svg.WIDTH - svg.RIGHT, svg.HEIGHT - svg.BOTTOM, svg.TOP
    shares = np.stack([(places[:, 0] - left) / (right - left), (places[:, 1] - bottom) / (top - bottom)], 1)
    ends = np.log([x_range, y_range]) if log else np.array([x_range, y_range])
    values = ends[:, 0] + shares * (ends[:, 1] - ends[:, 0])
    return np.exp(values) if log else values


@pytest.mark.parametrize("log", [False, True])
def test_points_stand_where_they_belong(log):
    x, y = np.linspace(1, 1000, 37), np.geomspace(1, 300, 37)
    one = svg.Series("a", x, y, 0)
    chart = svg.line_chart("n", [one], title="t", xlabel="x", ylabel="y", log=log)
    found = points_of(chart, log, (1.0 if log else 0.0, 1000.0), (1.0, 300.0))
    scale = np.stack([x, y], 1) if log else np.array([[1000.0, 300.0]])
    assert np.abs((found - np.stack([x, y], 1)) / scale).max() <= 2e-3


def test_what_cannot_be_drawn_is_a_gap():
    one = svg.Series("a", [1, 2, 3, 4, 5], [1.0, math.nan, 3.0, math.inf, 0.5], 0)
    chart = svg.line_chart("n", [one], title="t", xlabel="x", ylabel="y")
    assert re.search(r'<path d="([^"]*)"', chart).group(1).count("M") == 3
    assert svg.described(one) == "a: from 1 at 1 to 0.5 at 5, lowest 0.5"
    with pytest.raises(ValueError, match="no finite point in 1 series"):
        svg.line_chart("n", [svg.Series("a", [1.0], [-1.0], 0)], title="t", xlabel="x", ylabel="y", log=True)
    ElementTree.fromstring(svg.line_chart("n", [svg.Series("a", [1], [0.0], 9)], title="<", xlabel="&", ylabel='"'))


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (0, 1, False), (1.27, 3.3, False), (0, 5e6, False), (-3, 3, False), (7, 7, False),
        (0.3, 1e6, True), (1.2, 4.0, True), (2, 2, True),
    ],
)  # fmt: skip
def test_ticks_are_round_and_within(low, high, log):
    axis = svg.Axis([low, high], 0, 100, log)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 22 and ticks == sorted(ticks)
    assert all(axis.low * (1 - 1e-6) - 1e-9 <= tick <= axis.high * (1 + 1e-6) for tick in ticks)
    assert all(
        re.fullmatch(r"[1-9][05]?|0", f"{abs(t):.3e}".replace(".", "")[:4].rstrip("0") or "0") or not log for t in ticks
    )


def test_bars_are_shares():
    chart = svg.stacked_bars("n", {"a": {"x": 1.0, "y": 3.0}, "b": {"x": 2.0, "y": 2.0}}, title="t")
    widths = [float(each) for each in re.findall(r'<rect[^>]*width="([\d.]+)"', chart)]
    assert np.abs(np.array(widths) / 544 - [0.25, 0.75, 0.5, 0.5]).max() <= 1e-4
    assert "a: x 25.0%, y 75.0%; b: x 50.0%, y 50.0%" in chart
    with pytest.raises(ValueError, match="b has nothing to draw"):
        svg.stacked_bars("n", {"b": {"x": 0.0}}, title="t")


def test_a_long_label_of_a_bar_keeps_its_end_within_the_picture():
    chart = svg.stacked_bars("n", {"runs/" * 9 + "first": {"x": 1.0}, "short": {"x": 1.0}}, title="t")
    shown = re.findall(r'<text x="152"[^>]*>(.*?)</text>', chart)
    assert shown == ["…uns/runs/runs/first", "short"] and len(shown[0]) == svg.LETTERS
    assert f"{'runs/' * 9}first: x 100.0%" in chart, "whole for those who point at it or cannot see it"


def test_names_of_levels_do_not_cover_each_other():
    one = svg.Series("a", [1, 2], [1.0, 3.0], 0)
    chart = svg.line_chart("n", [one], title="t", xlabel="x", ylabel="y", levels={"p": 2.0, "q": 2.01, "r": 2.5})
    places = {name: float(x) for x, name in re.findall(r'<text x="([\d.]+)"[^>]*>([pqr])</text>', chart)}
    assert places == {"p": 704, "q": 624, "r": 704}
