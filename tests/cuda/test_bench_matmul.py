"""The benchmark of the matmul ladder without a GPU: its counters by the CPU model, and the logic of its GPU path, with
torch's products in place of the kernels and a clock of the CPU. No test asserts a speed."""

import contextlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import timing
from cuda import bench_matmul, dispatch
from cuda.bench_matmul import BenchConfig, Run
from cuda.measure import counters, ladder, pictures, power, products
from cuda.measure.ladder import Budget, Rates
from cuda.measure.products import Competitor, Operands, Shape

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape(64, 64, 64)


def built(module: str) -> tuple[str, ...]:
    try:
        return products.steps_of(module)
    except RuntimeError as error:
        pytest.skip(str(error))


# ---- shapes, steps, options ----------------------------------------------------------------------------------------


def test_shapes_are_squares_or_m_n_k():
    assert products.parse_shapes("512, 8192x3072x768,512") == (Shape(512, 512, 512), Shape(8192, 3072, 768))
    assert [str(shape) for shape in products.parse_shapes("64,64x64x64,64x64x8")] == ["64", "64x64x8"]
    shape = Shape(8192, 3072, 768)
    assert shape.flops == 2 * 8192 * 3072 * 768 and not shape.square
    assert shape.bytes(torch.bfloat16) == 2 * (8192 * 768 + 768 * 3072 + 8192 * 3072)


def test_steps_go_by_number_and_by_name():
    assert products.parse_steps("all") == dispatch.STEPS
    assert products.parse_steps("best_16,1, 08") == ("naive_01", "mma_sync_08", "best_16")
    assert products.dtype_of("warp_tile_07") == torch.float32 and products.dtype_of("mma_sync_08") == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": "512,12"}, "size '12': expected n or m x n x k"),
        ({"sizes": "0"}, "size '0'"),
        ({"sizes": "8x8"}, "size '8x8'"),
        ({"sizes": "-64"}, "size '-64'"),
        ({"sizes": ","}, "sizes ',': expected at least one"),
        ({"steps": "17"}, "step '17': expected all, 1 to 16"),
        ({"steps": ""}, "step ''"),
        ({"rounds": 0}, "rounds 0: expected at least 1"),
        ({"rest_s": -1.0}, "rest_s -1.0: expected 0 to 60"),
        ({"sustained_s": math.nan}, "sustained_s nan"),
        ({"budget_s": 0.0}, "budget_s 0.0: expected a positive number"),
        ({"budget_s": math.nan}, "budget_s nan"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BenchConfig(**options)


def test_every_default_size_is_a_size():
    for device in ("cpu", "cuda"):
        assert BenchConfig().shapes(device) == products.parse_shapes(bench_matmul.SIZES[device])
    assert ladder.PICTURE in BenchConfig().shapes("cuda")


# ---- counters ------------------------------------------------------------------------------------------------------


def test_a_summary_adds_up_lines():
    def line(kind, bytes_, actual, ideal):
        return {
            "file": "f.cu",
            "line": 1,
            "kind": kind,
            "requests": 1,
            "bytes": bytes_,
            "actual": actual,
            "ideal": ideal,
        }

    rows = [line("global read", 64, 4, 2), line("global write", 64, 4, 2), line("shared read", 128, 3, 1)]
    rows += [line("shared write", 128, 1, 1), line("tma", 1000, 1000, 1000), line("wgmma", 0, 7, 7)]
    found = counters.summary(rows, Shape(10, 10, 5))  # 1000 FLOP
    assert found["sectors_per_kflop"] == 8 and found["bytes_per_kflop"] == 8 * 32 + 1000
    assert (found["coalescing"], found["bank_conflicts"], found["passes_per_kflop"]) == (2.0, 2.0, 4.0)
    assert (found["tma_bytes"], found["wgmma"], found["mma"], found["barrier_waits"]) == (1000, 7, 0, 0)
    nothing = counters.summary([], SMALL)  # a step that does all by TMA has no loads of its own
    assert nothing["bank_conflicts"] is None and nothing["coalescing"] is None
    counters.print_row(nothing | {"size": "64", "step": "naive_01", "model_s": 0.0})


def test_on_a_cpu_it_counts(tmp_path, monkeypatch, capsys):
    steps = built("_simt_checked")
    wanted = [step for step in steps if step in ("naive_01", "shared_03", "wgmma_09", "two_consumers_12")]
    flags = ["--device", "cpu", "--sizes", "64,64x72x40", "--steps", ",".join(wanted), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_matmul", *flags])
    assert bench_matmul.main() == 0
    (path,) = (tmp_path / "cuda").glob("ladder_counters_*.json")
    result = json.loads(path.read_text())
    assert [row["step"] for row in result["rows"]] == wanted * 2
    for row in result["rows"]:
        assert row["bytes_per_kflop"] > 0 and row["error"] <= 4e-3 and "samples" not in row
        assert (row["wgmma"] > 0) == (row["tma_bytes"] > 0) == (row["step"] in dispatch.STEPS[8:])
    by_step = {row["step"]: row for row in result["rows"] if row["size"] == "64"}
    assert by_step["shared_03"]["bytes_per_kflop"] < by_step["naive_01"]["bytes_per_kflop"] / 10
    assert "no GPU is measured" in capsys.readouterr().out


@pytest.mark.parametrize("step", dispatch.STEPS)
def test_a_step_runs_its_own_kernel(step):
    """Names meet in one module: a step must not end in another one's code."""
    if step not in built("_simt_checked"):
        pytest.skip(f"{step} is not in cuda._simt_checked")
    counted, _, _ = counters.count(step, SMALL)
    files = {Path(row["file"]).name for row in counted}
    own = {file for file in files if file[0].isdigit()}  # the others are headers that steps share
    assert own and all(file.startswith(step[-2:]) for file in own), files


def test_a_wrong_result_is_not_counted(monkeypatch):
    class Module:
        options = staticmethod(lambda **_: contextlib.nullcontext())
        take_counters = staticmethod(list)
        matmul = staticmethod(lambda step, a, b, d: None)  # writes nothing

    monkeypatch.setattr(counters.modules, "load", lambda name: Module)
    with pytest.raises(ValueError, match=r"naive_01 at 64: an element is off by nan"):
        counters.count("naive_01", SMALL)


# ---- results are checked -------------------------------------------------------------------------------------------


def right(a, b, d):
    torch.mm(a, b, out=d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_is_seen_wherever_it_is(dtype):
    operands = Operands(Shape(64, 72, 128), dtype, 2, "cpu")
    sets = operands.sets(2)
    for a, b, d in sets:
        assert a.is_contiguous() and b.is_contiguous() == (dtype == torch.float32)
        right(a, b, d)
    assert operands.verify("right", sets) <= products.TOLERANCE[dtype]
    sets[1][2][63, 71] = 0.0
    with pytest.raises(ValueError, match="is off by"):
        operands.verify("wrong", sets)
    with pytest.raises(ValueError, match="is off by nan"):  # nothing was written
        operands.verify("absent", operands.sets(1))
    assert not torch.equal(sets[0][0], sets[1][0])


def test_sets_overflow_the_cache():
    bf16 = torch.bfloat16
    assert products.set_count(Shape(512, 512, 512), bf16, 50 << 20) == 100
    assert products.set_count(Shape(4096, 4096, 4096), bf16, 50 << 20) == 2
    assert products.set_count(Shape(16384, 16384, 16384), bf16, 50 << 20) == 1
    assert products.set_count(SMALL, bf16, 50 << 20) == products.MOST_SETS


# ---- what is affordable --------------------------------------------------------------------------------------------


def test_slow_steps_are_left_out_but_for_the_picture():
    rates, slow, fast = Rates(), Competitor("naive_01", torch.float32, right), Competitor("x", torch.float32, right)
    rates.saw(slow, 10**9, 1e-3)  # 1 TFLOP/s
    rates.saw(fast, 10**9, 1e-5)
    large = Shape(8192, 8192, 8192)
    assert rates.affordable([slow, fast], large) == [fast]  # 1.1 s, 0.011 s
    assert rates.affordable([slow, fast], ladder.PICTURE) == [slow, fast]  # 0.14 s
    assert rates.affordable([slow], Shape(2048, 2048, 2048)) == [slow]
    rates.saw(slow, 10**9, 1.0)  # the best that was seen counts
    assert rates.seconds(slow, Shape(1000, 1000, 500)) == pytest.approx(1e-3)
    assert rates.seconds(Competitor("naive_01", torch.bfloat16, right), large) == 0.0  # nothing is known of it


def test_a_budget_keeps_a_reserve(capsys):
    now = [100.0]
    budget = Budget(10.0, lambda: now[0])
    assert budget.allows("first", 4.0, reserve=6.0) and not budget.allows("second", 4.1, reserve=6.0)
    now[0] = 108.0
    assert budget.left == 2.0 and budget.allows("third", 2.0) and not budget.allows("fourth", math.nan)
    assert budget.skipped == ["second", "fourth"] and "skipped: second" in capsys.readouterr().out


def test_an_estimate_grows_with_what_is_measured():
    assert ladder.estimate([], 7, 0.1) == ladder.SETUP_S
    one = ladder.estimate([1e-6], 10, 0.5) - ladder.SETUP_S
    assert one == pytest.approx(10 * (0.5 + 2 * timing.SAMPLE_S), rel=1e-3)
    assert ladder.estimate([0.1, 0.1], 10, 0.5) > ladder.SETUP_S + 2 * 10 * 0.6


# ---- rows ----------------------------------------------------------------------------------------------------------


def row(step, us, dtype="bfloat16", size=4096, regime="burst"):
    flops = 2 * size**3
    return {
        "step": step, "us": us, "dtype": dtype, "size": str(size), "m": size, "n": size, "k": size, "regime": regime,
        "tflops": flops / us / 1e6,
    }  # fmt: skip


def test_ratios_are_to_the_fastest_peer_of_the_type():
    rows = [row("best_16", 100.0), row("cuBLAS", 110.0), row("cublasLt, best of 9", 95.0)]
    rows += [row("warp_tile_07", 400.0, "float32"), row("cuBLAS", 300.0, "float32")]
    ladder.add_ratios(rows)
    assert [one["of_cublas"] for one in rows] == pytest.approx([0.95, 95 / 110, 1.0, 0.75, 1.0])
    assert [one["of_torch"] for one in rows[:2]] == pytest.approx([1.1, 1.0])
    alone = [row("best_16", 100.0)]
    ladder.add_ratios(alone)
    assert "of_cublas" not in alone[0]


def test_pictures_are_drawn_from_rows(tmp_path):
    rows = [row("naive_01", 3e5, "float32"), row("cuBLAS", 3e3, "float32")]
    for size in (512, 4096):
        rows += [row("best_16", size / 20, size=size), row("cuBLAS", size / 21, size=size)]
    ladder.add_ratios(rows)
    made = pictures.draw(rows, tmp_path, size="4096", bytes_per_s=3e12, device="a card")
    assert [path.name for path in made] == ["matmul_ladder.png", "matmul_ratio.png", "matmul_roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    assert pictures.draw(rows[:1], tmp_path, size="512", bytes_per_s=None, device="a card") == []


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "SETTLE_S", 0.0)
    monkeypatch.setattr(timing, "SAMPLE_S", 1e-5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other longer than such products take
    yield
    torch.set_num_threads(threads)


def test_measured_rows_say_what_was_measured(quick):
    operands, rates, failures = Operands(SMALL, torch.float32, 2, "cpu"), Rates(), []
    wrong = Competitor("wrong", torch.float32, lambda a, b, d: d.zero_())
    refuses = Competitor("refuses", torch.float32, lambda a, b, d: (_ for _ in ()).throw(ValueError("m = 64")))
    good = [Competitor("naive_01", torch.float32, right), Competitor("cuBLAS", torch.float32, right)]
    with power.PowerMeter() as meter:
        options = {"regime": "burst", "rounds": 3, "rates": rates, "failures": failures}
        rows = ladder.measure([good[0], wrong, refuses, good[1]], operands, meter, **options)
    assert [one["step"] for one in rows] == ["naive_01", "cuBLAS"] and len(failures) == 2
    assert "wrong at 64: wrong at 64: an element" in failures[0] and failures[1].endswith("m = 64")
    for one in rows:
        assert one["us"] == pytest.approx(1e6 * one["samples"].median) and one["error"] < 1e-6
        assert one["tflops"] == pytest.approx(SMALL.flops / one["us"] / 1e6) and one["samples"].inner % 2 == 0
        assert one["power_w"] is None and len(one["samples"].raw) == 3
    assert all(rates.seconds(one, SMALL) > 0 for one in good)
    assert ladder.measure([wrong], operands, power.PowerMeter(), **options) == []


def test_a_sustained_sample_lasts(quick):
    operands, rates = Operands(SMALL, torch.float32, 2, "cpu"), Rates()
    one = Competitor("naive_01", torch.float32, right)
    rates.saw(one, SMALL.flops, 1e-4)  # a pass is then 100 products, and a sample 2 passes
    with power.PowerMeter() as meter:
        options = {"regime": "sustained", "rounds": 1, "rates": rates, "failures": [], "seconds": 0.02}
        (found,) = ladder.measure([one], operands, meter, **options)
    assert found["samples"].inner == 200


def test_a_run_measures_files_and_draws(quick, tmp_path, monkeypatch, capsys):
    """The whole way of a run on a GPU, with torch's products on the CPU."""
    monkeypatch.setattr(products, "our_step", lambda step, shape: Competitor(step, products.dtype_of(step), right))
    monkeypatch.setattr(products, "triton_product", lambda dtype: Competitor("triton", dtype, right))
    monkeypatch.setattr(
        ladder, "best_of_lt", lambda operands, rates: Competitor("cublasLt, best of 1", operands.dtype, right)
    )
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(ladder, "PROBE", SMALL)
    monkeypatch.setattr(ladder, "PICTURE", SMALL)
    monkeypatch.setattr(bench_matmul, "SUSTAINED_FLOPS", 0)
    config = BenchConfig(sizes="64,64x72x40", rounds=1, rest_s=0.0, sustained_s=0.01, out=tmp_path)
    steps = ["naive_01", "mma_sync_08", "wgmma_09", "best_16"]
    run = Run(config, Budget(1000.0), steps, 1, "cpu")
    run.all_shapes()
    run.save()
    (path,) = (tmp_path / "cuda").glob("matmul_*.json")
    result = json.loads(path.read_text())
    found = {(one["size"], one["regime"], one["step"]) for one in result["rows"]}
    assert {step for size, regime, step in found if (size, regime) == ("64", "burst")} >= set(steps)
    peers = {"cuBLAS", "cublasLt, best of 1"}
    assert {step for size, _, step in found if size == "64x72x40"} == {"mma_sync_08", "best_16", "triton"} | peers
    assert {step for _, regime, step in found if regime == "sustained"} == {"best_16"} | peers
    assert result["config"]["failed"] == result["config"]["skipped"] == [] and "of_cublas" in result["rows"][0]
    assert len(list((tmp_path / "cuda").glob("*.png"))) == 3 and "% of cuBLAS" in capsys.readouterr().out
    short = Run(config, Budget(1e-9), steps, 1, "cpu")
    short.all_shapes()
    assert short.rows == [] and len(short.budget.skipped) == 4


# ---- make ----------------------------------------------------------------------------------------------------------


def test_make_runs_it_on_both_kinds_of_machine():
    def planned(target):
        command = ["make", "-n", target, f"PYTHON={sys.executable}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    on_gpu = planned("gpu")
    assert on_gpu.index("pytest -m gpu") < on_gpu.index("cuda.bench_matmul --device cuda")
    assert "cuda.bench_matmul --device cpu" in planned("bench")
