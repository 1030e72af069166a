"""Reading runs and drawing them together."""

import json
import math
import shutil
import sys

import pytest

from common import cli
from minigpt import compare
from minigpt.compare import plot_run, positions, read_run, series_of, smoothed, table


@pytest.fixture
def runs(tmp_path):
    """Two runs by hand."""
    for name, batch in (("one", 2), ("two", 4)):
        folder = tmp_path / name
        folder.mkdir()
        config = {"config": {"batch": batch, "context": 8}}
        rows = [{"step": step, "loss": 3.0, "train_bits_per_byte": 5.0 - step} for step in (1, 2, 3)]
        rows[1]["held_out_look"] = 2.5
        rows[2]["held_out_bits_per_byte"] = 2.25
        times = [{"step": step, "step_ms": 100.0 * step, "tokens_per_s": 80.0 * batch} for step in (1, 2, 3)]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))
    return [tmp_path / "one", tmp_path / "two"]


def test_axes(runs):
    rows, timing = read_run(runs[1])
    assert positions(rows, timing, "step") == {1: 1, 2: 2, 3: 3}
    assert positions(rows, timing, "tokens") == {1: 32, 2: 96, 3: 192}  # a batch that grows
    assert positions(rows, timing, "seconds") == pytest.approx({1: 0.1, 2: 0.3, 3: 0.6})
    with pytest.raises(ValueError, match=r"step 3 is not in timing.jsonl"):
        positions(rows, timing[:2], "seconds")


def test_series(runs):
    series = series_of(runs[0], "tokens", "x: ")
    assert series["x: training batches (smoothed)"][0] == [16, 48, 96]
    assert series["x: held-out text, a few windows"] == ((48,), (2.5,))
    assert series["x: all of it"] == ((96,), (2.25,))


def test_smoothing_is_the_moving_average():
    values, mean = [4.0, 2.0, 7.0, 1.0], 4.0
    wanted = []
    for value in values:
        mean = 0.75 * mean + 0.25 * value
        wanted.append(mean)
    assert smoothed(values, 0.25) == pytest.approx(wanted)


def test_pictures_and_table(runs, tmp_path, monkeypatch, capsys):
    assert plot_run(runs[0], {"xz": 2.0}).read_bytes().startswith(b"\x89PNG")
    out = tmp_path / "both.png"
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, runs), "--out", str(out), "--axis", "seconds"])
    compare.main()
    assert out.read_bytes().startswith(b"\x89PNG") and str(out) in capsys.readouterr().out
    line = table(runs).splitlines()[2].split()
    assert line == ["two", "3", "2.5000", "2.2500", "320"]


def test_what_is_no_run_is_named(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    for folder, message in (("nowhere", "no metrics.jsonl: expected the folder of a run"), ("empty", "is empty")):
        monkeypatch.setattr(sys, "argv", ["compare", str(runs[0]), str(tmp_path / folder)])
        with pytest.raises(SystemExit) as stop:
            cli.run(compare.main)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and message in err


def test_metrics_of_something_else_are_named(runs):
    (runs[0] / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5}\n')
    with pytest.raises(ValueError, match=r"one: metrics.jsonl has no loss: expected the metrics of minigpt.train"):
        read_run(runs[0])


def test_runs_of_one_name_are_told_apart(runs, tmp_path, monkeypatch):
    same = tmp_path / "elsewhere" / "one"
    shutil.copytree(runs[0], same)
    drawn = {}
    monkeypatch.setattr(compare.plots, "curve", lambda path, series, **_: drawn.update(series))
    compare.plot_runs([runs[0], same], tmp_path / "x.png", "step")
    assert len(drawn) == 4 and sum(str(same) in name for name in drawn) == 2


def test_a_run_without_looks_shows_its_batches(runs):
    rows = [{"step": 1, "loss": 1.0, "train_bits_per_byte": 2.0}]
    (runs[0] / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert "nan" in table(runs[:1]) and math.isclose(series_of(runs[0])["training batches (smoothed)"][1][0], 2.0)
