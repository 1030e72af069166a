"""The pictures: what is drawn (read back from the SVG's own elements or the PNG's pixels), and what is refused."""

import io
import re

import matplotlib.image
import numpy as np
import pytest

from common import plots
from common.plots import PALETTE, bars, curve, image_grid

LABELS = {"xlabel": "step", "ylabel": "loss", "title": "Training"}


def pixels(path) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(path.read_bytes()), format="png")[..., :3]


def share(image: np.ndarray, color: str) -> float:
    """The share of an image's pixels that have about this colour."""
    wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float((np.abs(image - wanted).max(axis=-1) < 0.02).mean())


@pytest.fixture
def drawn(monkeypatch):
    """The figures in the order they were saved."""
    figures, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def test_curve(tmp_path, drawn):
    series = {"a": ([1, 2, 3], [3.0, 2.0, 1.0]), "b": (np.arange(4), np.array([1.0, np.nan, np.inf, 2.0]))}
    path = curve(tmp_path / "new" / "x.png", series, **LABELS, log_y=True, reference={"xz": 1.5})
    axes = drawn[0].axes[0]
    first, second, reference = axes.lines
    np.testing.assert_array_equal(first.get_xydata(), [[1, 3], [2, 2], [3, 1]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert list(reference.get_ydata()) == [1.5, 1.5] and axes.texts[0].get_text() == "xz"
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == ("step", "loss", "Training")
    assert axes.get_yscale() == "log"
    assert first.get_color() != second.get_color() and {first.get_color(), second.get_color()} <= set(PALETTE)
    image = pixels(path)
    assert image.shape == (540, 960, 3) and share(image, "#FFFFFF") > 0.5


def test_points_have_the_colour_of_their_line(tmp_path, drawn):
    series = {"a": ([1, 10], [3.0, 2.0]), "b": ([1, 10], [2.0, 1.0])}
    points = {"b": ([2, 5], [1.5, 1.2]), "measured": ([3], [2.5])}
    curve(tmp_path / "x.svg", series, **LABELS, log_x=True, points=points)
    axes = drawn[0].axes[0]
    lines = {line.get_color(): line for line in axes.lines if line.get_linestyle() != "None"}
    markers = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert axes.get_xscale() == "log" and [line.get_marker() for line in markers] == ["o", "o"]
    np.testing.assert_array_equal(lines[markers[0].get_color()].get_ydata(), [2.0, 1.0])
    np.testing.assert_array_equal(markers[0].get_xydata(), [[2, 1.5], [5, 1.2]])
    assert markers[1].get_color() not in lines
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "measured"]
    with pytest.raises(ValueError, match="positive"):
        curve(tmp_path / "y.svg", series, **LABELS, log_y=True, points={"b": ([1], [0.0])})


def test_a_curve_of_one_point_is_visible(tmp_path, drawn):
    curve(tmp_path / "x.png", {"a": ([1], [2.0])}, **LABELS)
    assert drawn[0].axes[0].lines[0].get_marker() == "o"


def test_more_curves_than_colours_differ_in_dashes(tmp_path, drawn):
    curve(tmp_path / "x.svg", {str(i): ([0, 1], [i, i]) for i in range(10)}, **LABELS)
    looks = {(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines}
    assert len(looks) == 10


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_data_gives_the_same_bytes(tmp_path, suffix):
    first, second = (
        curve(tmp_path / f"{name}.{suffix}", {"a": ([1, 2], [3.0, 2.0])}, **LABELS).read_bytes() for name in "ab"
    )
    assert first == second and re.search(rb"20\d\d-\d\d-\d\d", first) is None, "and no date"
    assert sorted(item.name for item in tmp_path.iterdir()) == [f"a.{suffix}", f"b.{suffix}"], "no temporary file"


@pytest.mark.parametrize(
    ("series", "options", "says"),
    [
        ({}, {}, "series is empty"),
        ({"a": ([1, 2], [1.0])}, {}, r"'a': expected x and y of one shape \(N,\), got \(2,\) and \(1,\)"),
        ({"a": ([[1]], [[1.0]])}, {}, "one shape"),
        ({"a": ([], [])}, {}, "'a': no finite value among 0"),
        ({"a": ([1], [np.nan])}, {}, "no finite value"),
        ({"a": ([1, 2], [1.0, 0.0])}, {"log_y": True}, "positive"),
        ({"a": ([1], [1.0])}, {"log_y": True, "reference": {"r": -1.0}}, "positive"),
    ],
)
def test_curve_refuses(tmp_path, series, options, says):
    with pytest.raises(ValueError, match=says):
        curve(tmp_path / "x.png", series, **LABELS, **options)
    assert not list(tmp_path.iterdir())


def test_an_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"x\.jpg"):
        curve(tmp_path / "x.jpg", {"a": ([1], [1.0])}, **LABELS)


@pytest.mark.parametrize("log_x", [False, True])
def test_bars(tmp_path, drawn, log_x):
    series = {"ours": [1.0, 20.0], "torch": [None, 0.5]}
    path = bars(tmp_path / "x.png", ["add", "mm"], series, xlabel="ms", title="Ops", log_x=log_x, reference={"peak": 9})
    axes = drawn[0].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1.0, 20.0, 0.0, 0.5]
    assert sorted(filter(None, (text.get_text() for text in axes.texts))) == ["0.5", "1", "20", "n/a", "peak"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["add", "mm"]
    assert axes.yaxis_inverted() and axes.get_xscale() == ("log" if log_x else "linear")
    centres = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert np.allclose(centres, [-0.2, 0.8, 0.2, 1.2]), "side by side, centred on their group"
    assert share(pixels(path), PALETTE[2]) > 0.01


@pytest.mark.parametrize(
    ("groups", "series", "log_x", "says"),
    [
        ([], {"a": []}, False, "at least one group"),
        (["g"], {}, False, "at least one group"),
        (["g"], {"a": [1.0, 2.0]}, False, "'a': expected 1 values"),
        (["g"], {"a": [-1.0]}, False, "non-negative"),
        (["g"], {"a": [np.inf]}, False, "non-negative"),
        (["g"], {"a": [0.0]}, True, "positive"),
    ],
)
def test_bars_refuses(tmp_path, groups, series, log_x, says):
    with pytest.raises(ValueError, match=says):
        bars(tmp_path / "x.png", groups, series, xlabel="ms", title="Ops", log_x=log_x)


def test_image_grid(tmp_path, drawn):
    red = np.zeros((4, 4, 3))
    red[..., 0] = 1.0
    grey = np.arange(6.0).reshape(2, 3)
    path = image_grid(tmp_path / "x.png", [red, grey, grey], ["red", "left", "right"], columns=2, title="All")
    cells = drawn[0].axes
    assert [cell.get_title() for cell in cells] == ["red", "left", "right", ""] and len(cells[3].images) == 0
    np.testing.assert_array_equal(cells[1].images[0].get_array(), grey)
    assert drawn[0].get_suptitle() == "All"
    image = pixels(path)
    assert 0.1 < share(image, "#FF0000") < 0.3
    assert share(image, "#000000") > 0.02, "the least value is black"


@pytest.mark.parametrize(
    ("images", "titles", "columns", "says"),
    [
        ([], [], 8, "at least one"),
        ([np.zeros((2, 2))], [], 8, "1 images, 0 titles"),
        ([np.zeros(4)], ["a"], 8, r"got \(4,\)"),
        ([np.zeros((2, 2, 4))], ["a"], 8, r"got \(2, 2, 4\)"),
        ([np.zeros((2, 2))], ["a"], 0, "columns must be at least 1"),
    ],
)
def test_image_grid_refuses(tmp_path, images, titles, columns, says):
    with pytest.raises(ValueError, match=says):
        image_grid(tmp_path / "x.png", images, titles, columns=columns)
