"""The programs of the chapter: the drawing of a graph, the digits training, and the benchmark's own checks."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import autograd as ag
from autograd import Tensor, bench, nn
from autograd import functional as F
from tests.autograd.commands import run_module

SVG = "{http://www.w3.org/2000/svg}"


def test_draw_shows_every_vertex_and_edge_once(tmp_path):
    w, b = nn.Parameter(np.ones((2, 3))), nn.Parameter(np.ones(2))
    x = Tensor(np.ones((4, 3)), requires_grad=True)
    y = (F.linear(x, w, b).tanh() * w.sum()).sum()
    svg = ag.draw(y, tmp_path / "graph.svg", names={"weight": w, "bias <1>": b})
    assert (tmp_path / "graph.svg").read_text() == svg
    root = ElementTree.fromstring(svg)
    labels = [t.text for t in root.iter(f"{SVG}text") if t.get("class") is None]
    assert sorted(labels) == sorted(["linear", "tanh", "sum", "mul", "sum", "weight", "bias <1>", "leaf 1"])
    assert len([p for p in root.iter(f"{SVG}path") if p.get("class") == "edge"]) == 8
    assert not w.grad  # drawing computes nothing


def test_draw_puts_inputs_above_results():
    x = Tensor(np.ones(2), requires_grad=True)
    h = x * 2
    root = ElementTree.fromstring(ag.draw((h + h.exp()).sum()))
    boxes = [r for r in root.iter(f"{SVG}rect") if r.get("class")]
    height = {r.get("class"): float(r.get("y")) for r in boxes}
    assert height["leaf"] < min(float(r.get("y")) for r in boxes if r.get("class") == "op") < height["out"]
    assert len({(r.get("x"), r.get("y")) for r in boxes}) == len(boxes)


def test_draw_refuses():
    x = Tensor(np.ones(2), requires_grad=True)
    with pytest.raises(ValueError, match="no graph"):
        ag.draw(x)
    y = (x * 2).sum()
    y.backward()
    with pytest.raises(ValueError, match="freed"):
        ag.draw(y)
    for _ in range(500):
        x = x + 1
    with pytest.raises(ValueError, match="more than 400"):
        ag.draw(x)


@pytest.mark.slow
def test_digits_reach_their_accuracy(tmp_path):
    done = run_module("autograd.digits", "--out", str(tmp_path), timeout=200)
    assert done.returncode == 0, done.stderr
    right = {
        line.split(":")[0]: float(line.split()[1]) for line in done.stdout.splitlines() if "test images right" in line
    }
    assert right["mlp"] >= 97.5 and right["convnet"] >= 98.5
    assert {p.name for p in tmp_path.glob("*.png")} == {"learning_curves.png", "misclassified.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs 0"),
        (["--batch", "2000"], "batch 2000"),
        (["--lr", "nan"], "lr nan"),
        (["--epoch", "3"], "--epoch"),
    ],
)
def test_digits_refuse_in_one_line(arguments, message, tmp_path):
    done = run_module("autograd.digits", "--out", str(tmp_path / "new"), *arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert not (tmp_path / "new").exists()


# -- the benchmark: what it times computes the same thing --
@pytest.mark.parametrize("case", bench.MLPS)
def test_competitors_take_the_same_steps(case):
    steppers = [build(*bench.MLPS[case]) for build in (bench.mlp_ours, bench.mlp_by_hand, bench.mlp_torch)]
    for _ in range(5):
        losses = [step() for step in steppers]
        assert max(losses) - min(losses) <= 1e-5 * losses[-1]


def test_block_steps_agree_and_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    steppers = bench.block_pair()
    for _ in range(3):
        ours, theirs = steppers["ours"](), steppers["torch"]()
        assert abs(ours - theirs) <= 1e-5 * theirs
    with FlopCounterMode(display=False) as counter:
        steppers["torch"]()
    # torch counts no gradient for the first input, which is no parameter, and its fused attention backward differently
    assert abs(bench.block_flops() / counter.get_total_flops() - 1) < 0.1
    with FlopCounterMode(display=False) as counter:
        bench.mlp_torch(*bench.MLPS["mlp_784_512_256_10"])()
    assert bench.mlp_flops(*bench.MLPS["mlp_784_512_256_10"]) == counter.get_total_flops()


def test_bench_writes_its_results(tmp_path):
    done = run_module("autograd.bench", "--rounds", "1", "--out", str(tmp_path), timeout=200)
    assert done.returncode == 0, done.stderr
    files = {path.name.split("_amd")[0].split("_20")[0]: path for path in (tmp_path / "autograd").glob("*.json")}
    assert len(files) == 2
    (steps,) = [p for p in files.values() if p.name.startswith("training_step")]
    rows = json.loads(steps.read_text())["rows"]
    assert [row["case"] for row in rows] == [*bench.MLPS, "gpt_block_8x64x128"]
    assert all(row["ours_ms"] > 0 and row["torch_ms"] > 0 for row in rows)
