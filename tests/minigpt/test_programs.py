"""The programs that measure and draw: twins, scaling, bench; small, but run as they are."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from minigpt import bench, scaling, twins
from minigpt.data import load_data
from minigpt.scaling import Law, ScalingConfig, fit


def start(module, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_twins_coincide_in_float64(tmp_path, corpus, monkeypatch, capsys):
    start(twins, monkeypatch, "--corpus", corpus, "--steps", 25, "--dtype", "float64", "--out", tmp_path)
    row = json.loads(next((tmp_path / "minigpt").glob("twins_*.json")).read_text())["rows"][0]
    assert row["largest_distance"] <= 1e-8 and row["last_loss"] < row["first_loss"] - 0.5
    assert len(row["numpy_losses"]) == len(row["torch_losses"]) == 25 and "float64" in row["dtype"]
    assert (tmp_path / "minigpt/twins.png").read_bytes().startswith(b"\x89PNG")


def test_a_nan_in_either_twin_is_no_small_distance():
    assert math.isnan(twins.largest_distance([1.0, math.nan, 2.0], [1.0, 1.0, 2.0]))
    assert twins.largest_distance([1.0, 3.0], [1.5, 3.25]) == 0.5


def test_twins_would_show_a_difference(corpus):
    """One of the two with another learning rate: the distance is then far from nothing."""
    config = twins.TwinsConfig(corpus=str(corpus), steps=8).training()
    data = load_data(config.corpus, config.tokenizer)
    ours = twins.numpy_losses(replace(config, learning_rate=4e-3), data, "float64")
    theirs = twins.torch_losses(config, data, "float64")
    assert abs(ours[0] - theirs[0]) <= 1e-12 and abs(ours[-1] - theirs[-1]) > 1e-3


def test_a_law_is_found_again():
    law = Law(E=0.9, A=60.0, a=0.45, B=200.0, b=0.4)
    N, D = (grid.ravel() for grid in np.meshgrid([3e4, 7e4, 1.5e5, 4e5], [1e5, 2e5, 4e5, 8e5]))
    found = fit(N, D, law(N, D))
    assert found(1e6, 1.6e6) == pytest.approx(float(law(1e6, 1.6e6)), rel=2e-3)
    assert found(N, D) == pytest.approx(law(N, D), rel=1e-4)
    noisy = law(N, D) * np.exp(np.random.default_rng(0).normal(0, 0.003, N.size))
    noisy[5] *= 1.3  # one bad run must not bend the law: that is what the Huber loss is for
    assert fit(N, D, noisy)(1e6, 1.6e6) == pytest.approx(float(law(1e6, 1.6e6)), rel=0.05)


def test_too_few_points_for_five_parameters():
    with pytest.raises(ValueError, match="5, 5, 5 values of N, D, L: expected as many of each, at least 6"):
        fit([1] * 5, [1] * 5, [1] * 5)


def test_scaling_trains_fits_and_predicts(tmp_path, corpus, monkeypatch, capsys):
    flags = ["--corpus", corpus, "--tokenizer", "bpe:300", "--widths", "16,32,48", "--larger", 64, "--steps", "3,6"]
    flags += ["--layers", 1, "--folder", tmp_path / "runs", "--out", tmp_path / "results"]
    start(scaling, monkeypatch, *flags)
    out = capsys.readouterr().out
    filed = json.loads(next((tmp_path / "results/minigpt").glob("scaling_*.json")).read_text())
    assert [row["role"] for row in filed["rows"]] == ["fitted"] * 6 + ["predicted"] * 2
    law = Law(**filed["config"]["law"])
    for row in filed["rows"]:
        assert row["law"] == pytest.approx(float(law(row["parameters"], row["tokens"])))
        assert row["error"] == pytest.approx(row["law"] / row["bits_per_byte"] - 1) and row["tokens"] in (3072, 6144)
    assert (tmp_path / "results/minigpt/scaling.png").exists() and "L(N, D) = " in out
    monkeypatch.setattr(scaling, "train", None)  # nothing runs again
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    start(scaling, monkeypatch, *flags)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    monkeypatch.setattr(sys, "argv", ["scaling", *map(str, flags), "--layers", "2"])
    with pytest.raises(ValueError, match=r"holds another run, choose another --folder: layers is 1 there, 2 asked"):
        scaling.main()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": "32"}, "widths '32': expected at least two different numbers"),
        ({"widths": "32,x"}, "widths '32,x': expected"),
        ({"steps": "0,5"}, "steps '0,5': expected"),
        ({"widths": "32,40"}, "width 40: expected a multiple of 16"),
        ({"larger": 100}, "width 100: expected a multiple of 16"),
        ({"larger": 96}, "larger 96: expected more than the widths"),
        ({"widths": "32,48,032"}, "widths '32,48,032': expected at least two different"),
        ({"widths": "32,48", "steps": "10,20"}, "2 widths and 2 steps: expected at least 6 pairs"),
    ],
)
def test_bad_scaling_flags(changes, message):
    with pytest.raises(ValueError, match=message):
        ScalingConfig(**changes)


def test_the_plain_baseline_is_the_same_function():
    """Else the benchmark would compare two different things; and it would notice."""
    ours = bench.random_gpt(bench.SMALL).double()
    plain = bench.PlainGPT(ours).double()
    tokens = torch.randint(65, (3, 33))
    error = abs(ours(tokens[:, :-1], tokens[:, 1:]) - plain(tokens[:, :-1], tokens[:, 1:])).item()
    assert error <= 1e-12, error
    assert sum(p.numel() for p in plain.parameters()) == ours.num_parameters()


def test_the_benchmark_runs_and_files_its_rows(tmp_path, monkeypatch, capsys):
    start(bench, monkeypatch, "--rounds", 1, "--no-compile", "--new-tokens", 5, "--batch", 2, "--out", tmp_path)
    for name, cases in (("training", {"ours", "plain torch"}), ("sampling", {"ours, cache", "transformers"})):
        filed = json.loads(next((tmp_path / "minigpt").glob(f"{name}_*.json")).read_text())
        assert cases <= {row["case"] for row in filed["rows"]}
        assert all(math.isfinite(row["tokens_per_s"]) and row["tokens_per_s"] > 0 for row in filed["rows"])
    with pytest.raises(ValueError, match="new_tokens 256: expected less than 256, the context"):
        bench.BenchConfig(new_tokens=256)
