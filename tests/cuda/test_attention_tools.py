"""The clock of cuda/replay.py on traces made by hand, the picture of the pipelines, and the benchmarks as far as a CPU
goes: that what is counted is what was meant, and that every competitor of the GPU's benchmark computes the same."""

import itertools
import json
import math

import pytest
import torch

pytest.importorskip("cuda._simt", reason="make native builds the kernels")

from common import timing
from cuda import bench_attention, bench_fused, timeline
from cuda.bench_attention import BenchConfig
from cuda.measure import attention, fused
from cuda.measure.attention import Shape
from cuda.replay import Costs, Interval, Replay, busy

COSTS = Costs(instruction=0.0, latency=100.0, bytes=10.0)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Nothing here is timed."""
    monkeypatch.setattr(timing, "SETTLE_S", 0.0)


def trace(*events):
    """(thread, kind, first, second), of block 0."""
    return [(0, thread, kind, first, second, "file", 1) for thread, kind, first, second in events]


def warpgroup(*events):
    return trace(*((thread, *event) for event in events for thread in range(128)))


def test_a_load_takes_its_latency_and_its_bytes():
    events = trace((0, "mbarrier init", 8, 1), (0, "mbarrier arrive", 8, 500), (0, "load", 8, 500),
                   (0, "mbarrier wait", 8, 0))  # fmt: skip
    intervals = Replay(events, COSTS).run()
    assert intervals == [Interval(0, "wait", 0.0, 150.0), Interval("loads", "load", 100.0, 150.0)]


def test_two_loads_share_the_way():
    events = trace(
        (0, "mbarrier init", 8, 1), (0, "mbarrier arrive", 8, 1000), (0, "load", 8, 500), (0, "load", 8, 500)
    )
    assert [i.end for i in Replay(events, COSTS).run()] == [150.0, 200.0]


def test_a_product_and_its_softmax():
    """64 x 128 x 16: 64 clocks; 64 x 128 scores: 512 clocks of exponentials and 320 of the rest."""
    intervals = Replay(warpgroup(("wgmma", 128, 0), ("wgmma commit", 0, 0), ("wgmma wait", 0, 0)), COSTS).run()
    assert intervals == [Interval(0, "scores", 0.0, 64.0), Interval(0, "softmax", 64.0, 64.0 + 512 + 320)]


def test_products_from_registers_have_no_softmax_and_run_in_order():
    events = warpgroup(("wgmma", 64, 1), ("wgmma", 64, 1), ("wgmma commit", 0, 0), ("wgmma wait", 0, 0))
    assert Replay(events, COSTS).run() == [Interval(0, "values", 0.0, 32.0), Interval(0, "values", 32.0, 64.0)]


def test_two_softmaxes_take_twice_as_long():
    steps = (("wgmma", 128, 0), ("wgmma commit", 0, 0), ("wgmma wait", 0, 0))
    events = [e for e in warpgroup(*steps)] + [(0, t + 128, *rest) for _, t, *rest in warpgroup(*steps)]
    ends = sorted(i.end for i in Replay(events, COSTS).run() if i.kind == "softmax")
    assert ends[0] == 64 + 64 + 2 * (832 - 64) and ends[1] == ends[0] + 64  # alone for 64 clocks before, and after


def test_a_named_barrier_meets():
    late = [("wgmma", 128, 1), ("wgmma commit", 0, 0), ("wgmma wait", 0, 0), ("barrier arrive", 1, 256)]
    events = warpgroup(("barrier sync", 1, 256)) + [(0, t + 128, *rest) for _, t, *rest in warpgroup(*late)]
    assert Interval(0, "wait", 0.0, 64.0) in Replay(events, COSTS).run()


def test_what_cannot_be_played_is_refused():
    with pytest.raises(ValueError, match="a trace of 2 blocks: expected one"):
        Replay([*trace((0, "barrier sync", 0, 0)), (1, 0, "barrier sync", 0, 0, "file", 1)])
    with pytest.raises(RuntimeError, match="cannot be played to its end"):
        Replay(trace((0, "barrier sync", 1, 64))).run()


def test_busy_counts_overlaps_once():
    some = [Interval(0, "scores", 0, 10), Interval(1, "values", 5, 12), Interval(0, "softmax", 20, 30)]
    assert busy(some, "scores", "values") == 12 and busy(some, "softmax") == 10 and busy([], "scores") == 0


def test_each_step_of_the_ladder_keeps_the_tensor_cores_busier(tmp_path):
    config = timeline.Config(keys=512, out=tmp_path / "picture.png")
    played = {step: timeline.play(step, config) for step in ("wgmma_04", "producer_05", "ping_pong_06", "overlap_07")}
    shares = [share for _, share in played.values()]
    assert shares == sorted(shares) and 0.2 < shares[0] < shares[-1] < 1
    timeline.draw(played, config.out)
    assert config.out.stat().st_size > 10_000
    with pytest.raises(ValueError, match="steps '3': expected numbers from 4 to 9"):
        timeline.Config(steps="3")


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_convention():
    shape = Shape.of(128, 16384, False)
    assert (shape.batch, shape.heads) == (1, 16)
    assert shape.flops(False) == 4 * 16 * 16384**2 * 128 and shape.flops(True) == 2.5 * shape.flops(False)
    assert Shape.of(64, 512, True).flops(False) == 4 * 32 * 32 * 512**2 * 64 / 2


@pytest.mark.parametrize("backward", [False, True])
def test_competitors_of_the_attention_benchmark_agree(backward):
    shape = Shape(64, 40, True, 1, 2)
    inputs = attention.operands(shape, "cpu")
    ours = attention.ours(shape, None, None)

    def torchs(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    if backward:
        functions = {name: attention.backward_of(one, inputs) for name, one in (("ours", ours), ("torch", torchs))}
    else:
        functions = {"ours": lambda: ours(*inputs[:3]), "torch": lambda: torchs(*inputs[:3])}
    timing.compare(functions, rounds=1, warmup=0, inner=1, check=timing.close(bench_attention.TOLERANCE))
    functions["ours"] = lambda: tuple(2 * x for x in inputs[:3]) if backward else 2 * inputs[0]
    with pytest.raises(ValueError, match="check failed"):
        timing.compare(functions, rounds=1, warmup=0, inner=1, check=timing.close(bench_attention.TOLERANCE))


def test_the_options_of_the_attention_benchmark():
    assert BenchConfig(forward="1, 9").steps("forward", bench_attention.FORWARD) == ["naive_01", "best_09"]
    for wrong, message in (
        ({"head_dims": "65"}, "head_dims '65': expected some of"),
        ({"tokens": "a"}, "tokens 'a': expected positive numbers"),
        ({"backward": "6"}, "backward '6': expected numbers from 1 to 5"),
        ({"rounds": 0}, "rounds 0"),
    ):
        with pytest.raises(ValueError, match=message):
            BenchConfig(**wrong)


def test_the_picture_of_a_gpus_rows(tmp_path):
    places = itertools.product(("best_09", "overlap_07", "cuDNN"), (512, 1024), ("full", "causal"))
    same = {"pass": "forward", "head_dim": 128}
    rows = [same | {"step": step, "tokens": n, "mask": mask, "tflops": n / 100} for step, n, mask in places]
    assert bench_attention.draw(rows, 128, "forward", tmp_path / "a.png") and (tmp_path / "a.png").stat().st_size > 5000
    assert not bench_attention.draw(rows, 64, "forward", tmp_path / "b.png") and not (tmp_path / "b.png").exists()
    assert not bench_attention.draw(rows, 128, "backward", tmp_path / "b.png")


def test_counts_of_a_step():
    row = bench_attention.count("forward", "mma_sync_03")
    assert row["mma"] == 2 * 2 * 12 * 12 * 3 // 3 * 8 and row["wgmma"] == 0 and row["coalescing"] < 1.05
    assert bench_attention.count("backward", "wgmma_03")["wgmma"] > 0


@pytest.mark.parametrize("case", range(22))
def test_each_case_of_the_fused_benchmark(case):
    """Both sides agree, called twice in turn as the benchmark does; and ours moves about what it must."""
    found = list(fused.cases("cpu", 8, 256, 64))
    assert len(found) == 22
    case = found[case]
    functions = {"ours": case.run(case.ours), "torch": case.run(case.torchs)}
    check = (lambda _: None) if case.name in bench_fused.MUTATE else timing.close(bench_fused.TOLERANCE)
    timing.compare(functions, rounds=1, warmup=1, inner=1, check=check)
    row = bench_fused.count(case)
    assert 0 < row["moved"] < 6 and row["coalescing"] < 2.5


def test_the_loss_of_a_head_is_the_same_without_logits():
    functions = fused.loss_of_a_head("cpu", 40, 64, 96)
    timing.compare(functions, rounds=1, warmup=0, inner=1, check=timing.close(bench_fused.TOLERANCE))


def test_the_fused_benchmark_files_its_rows(tmp_path, monkeypatch):
    some = list(fused.cases("cpu", 4, 64, 16))[:2]
    monkeypatch.setattr(fused, "cases", lambda *_: iter(some))
    assert bench_fused.bench_cpu(bench_fused.BenchConfig(device="cpu", out=tmp_path)) == 0
    (file,) = (tmp_path / "cuda").glob("fused_counters_*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["operation"] for row in rows] == ["rms_norm", "rms_norm"] and all(
        math.isfinite(r["moved"]) for r in rows
    )
