"""The benchmark protocol, with fakes for the clocks: what is called in which order, what is refused. No test asserts
a speed."""

import json
import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common.timing as timing
from common.timing import SAMPLE_S, Samples, close, compare, copy_bandwidth, gemm_peak, numpy_gemm_peak


class Fakes:
    """Functions A and B that write down each call and move the clock on by a known time."""

    def __init__(self, monkeypatch, a_seconds=2.0**-10, b_seconds=2.0**-5):
        self.calls, self.now = [], 0.0
        self.functions = {"A": lambda: self.call("A", a_seconds), "B": lambda: self.call("B", b_seconds)}
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing, "sleep", lambda seconds: self.calls.append("pause"))

    def call(self, name, seconds):
        self.calls.append(name)
        self.now += seconds
        return 1.0


@pytest.fixture
def fakes(monkeypatch):
    return Fakes(monkeypatch)


def test_check_then_warm_up_then_interleave(fakes):
    def check(results):
        fakes.calls.append("check")
        assert results == {"A": 1.0, "B": 1.0}

    compare(fakes.functions, rounds=3, warmup=2, inner=1, check=check)
    assert " ".join(fakes.calls) == "A B check A A B B" + " pause A pause B" + " pause A A pause B B" * 3


def test_without_a_check_nothing_is_called_for_it(fakes):
    compare(fakes.functions, rounds=1, warmup=0, inner=2, check=None)
    assert " ".join(fakes.calls) == "pause A pause B pause A A A pause B B B"


def test_before_is_told_of_each_sample_and_of_nothing_else(fakes):
    def before(name):
        fakes.calls.append(f"before {name}")
        fakes.now += 100.0

    samples = compare(fakes.functions, rounds=2, warmup=1, inner=1, check=None, before=before)
    calls = "A B" + " pause A pause B" + " before A pause A A before B pause B B" * 2
    assert " ".join(fakes.calls) == calls and samples["A"].raw == (2.0**-10,) * 2


def test_samples_are_seconds_a_call(fakes):
    samples = compare(fakes.functions, rounds=3, warmup=0, inner=4, check=None)
    assert samples == {"A": Samples((2.0**-10,) * 3, 4), "B": Samples((2.0**-5,) * 3, 4)}


def test_inner_fills_a_sample(fakes):
    samples = compare(fakes.functions, rounds=2, warmup=0, check=None)
    assert samples["A"].inner == math.ceil(SAMPLE_S / 2.0**-10) and samples["B"].inner == 1
    assert samples["A"].median == 2.0**-10


def test_inner_of_a_function_too_fast_for_the_clock(monkeypatch):
    fakes = Fakes(monkeypatch, a_seconds=0.0)
    monkeypatch.setitem(timing.MAX_INNER, "cpu", 50)
    assert compare(fakes.functions, rounds=1, warmup=0, check=None)["A"].inner == 50


def test_percentiles_are_numpys():
    raw = tuple(np.random.default_rng(0).exponential(size=23).tolist())
    samples = Samples(raw, 3)
    assert (samples.p10, samples.p90) == (np.percentile(raw, 10), np.percentile(raw, 90))
    assert samples.median == np.median(raw)
    expected = {"median": samples.median, "p10": samples.p10, "p90": samples.p90, "inner": 3, "raw": list(raw)}
    assert samples.as_dict() == expected


def says_no(results):
    return False


def asserts(results):
    assert results["A"] == 2.0, "not two"


def numpy_asserts(results):
    np.testing.assert_allclose(results["A"], 2.0)


@pytest.mark.parametrize("check", [says_no, asserts, numpy_asserts, lambda results: np.bool_(False), close(-1.0)])
def test_a_failed_check_stops_before_anything_is_timed(fakes, check):
    with pytest.raises(ValueError, match="nothing was timed"):
        compare(fakes.functions, rounds=3, warmup=2, check=check)
    assert fakes.calls == ["A", "B"]


@pytest.mark.parametrize("verdict", [True, None, np.bool_(True), torch.tensor(True)])
def test_verdicts_that_pass(fakes, verdict):
    assert len(compare(fakes.functions, rounds=3, warmup=0, inner=1, check=lambda _: verdict)["A"].raw) == 3


def test_an_error_is_no_verdict(fakes):
    with pytest.raises(TypeError, match=r"0\.25"):
        compare(fakes.functions, rounds=1, warmup=0, check=lambda _: 0.25)


@pytest.mark.parametrize(
    "result",
    [
        float("nan"),
        np.array([1.0, np.nan]),
        np.float32("nan"),
        torch.tensor([[1.0, float("nan")]], dtype=torch.bfloat16),
        torch.tensor([float("nan")], requires_grad=True),
        (np.ones(2), [{"deep": np.array(np.nan)}]),
    ],
)
def test_a_nan_in_a_result_fails_any_check(fakes, result):
    with pytest.raises(ValueError, match="'nan' holds NaN"):
        compare({"good": lambda: 1.0, "nan": lambda: result}, rounds=1, warmup=0, check=lambda _: True)


def test_results_that_hold_no_numbers_are_the_checks_business(fakes):
    results = compare(
        {"A": lambda: None, "B": lambda: ("text", object(), np.arange(2))}, rounds=1, warmup=0, check=len_2
    )
    assert list(results) == ["A", "B"]


def len_2(results):
    return len(results) == 2


def test_close_looks_into_tuples_of_tensors():
    half = torch.ones(3, dtype=torch.bfloat16)
    check = close(1e-2)
    assert check({"a": (half, half.float()), "b": (half * 1.0, torch.ones(3))})
    assert not check({"a": (half, half * 1.1), "b": (half, half)})
    assert not check({"a": (half,), "b": (half, half)})
    assert not check({"a": (half, half[:2]), "b": (half, half)})
    assert not check({"a": (half * float("nan"),), "b": (half,)})
    with pytest.raises(ValueError, match="the result of 'a' holds NaN"):
        compare({"a": lambda: (half * float("nan"),), "b": lambda: (half,)}, rounds=1, warmup=0, check=check)


def test_close():
    base = torch.tensor([[100.0, 1.0], [0.0, -50.0]])
    check = close(1e-2)
    assert check({"ours": base + 0.9, "theirs": base}), "relative to the largest magnitude"
    assert not check({"ours": base + 1.1, "theirs": base})
    assert not check({"ours": base.numpy(), "bad": base + 2, "theirs": base}), "each of them is compared"
    assert check({"ours": base.to(torch.bfloat16), "theirs": base.numpy()})
    assert not check({"ours": np.ones((1, 3)), "theirs": np.ones((2, 3))}), "shapes must agree, not broadcast"
    assert not check({"ours": base * float("nan"), "theirs": base})
    assert not check({"ours": base, "theirs": base * float("nan")})
    assert not check({"ours": base / 0, "theirs": base})
    assert check({"ours": 0.0, "theirs": np.float64(0)}) and check({"ours": np.ones(0), "theirs": np.ones(0)})


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"warmup": -1}, {"inner": 0}, {"rounds": float("nan")}])
def test_bad_arguments(fakes, bad):
    with pytest.raises(ValueError, match="expected rounds"):
        compare(fakes.functions, **{"rounds": 1, "warmup": 0, "check": None} | bad)
    with pytest.raises(ValueError, match="empty"):
        compare({}, rounds=1, warmup=0, check=None)
    assert fakes.calls == []


def test_the_cuda_clock_flushes_l2_before_each_timed_call(monkeypatch):
    """A stand-in for torch writes down what the clock asks of the device."""
    order, buffers = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def elapsed_time(self, end):
            assert order[-1] == "synchronize", "an event that has not happened has no time"
            return 3.0

    def empty(count, dtype, device):
        assert device == "cuda:1"
        buffers.append(count)
        return SimpleNamespace(zero_=lambda: order.append("flush"))

    l2_bytes = 200 << 20
    cuda = SimpleNamespace(
        Event=Event,
        device=lambda device: nullcontext(),
        _sleep=lambda clocks: order.append("sleep"),
        synchronize=lambda: order.append("synchronize"),
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=l2_bytes),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, empty=empty, int8=None))
    functions = {"A": lambda: order.append("A"), "B": lambda: order.append("B")}
    samples = compare(functions, rounds=2, warmup=0, check=None, inner=2, device="cuda:1")

    def sample(name):
        return ["flush", "sleep", "event", name, "event"] * 2 + ["synchronize"]

    assert order == sample("A") + sample("B") + sample("A") + sample("B")
    assert samples["A"].raw == (3e-3, 3e-3), "seconds a call"
    assert len(buffers) == 1 and buffers[0] > l2_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_clock_on_a_device():
    x = torch.randn(512, 512, device="cuda")
    functions = {"mm": lambda: x @ x, "matmul": lambda: torch.matmul(x, x)}
    samples = compare(functions, rounds=3, warmup=1, check=close(1e-6), device="cuda")
    assert all(len(sample.raw) == 3 and min(sample.raw) > 0 for sample in samples.values())


# ---- the machine's ceilings


@pytest.fixture
def half_a_second(monkeypatch):
    """Each ceiling's function runs once and is said to take 0.75 s, then 0.5 s."""
    ran = []

    def ceiling(function, device):
        ran.append(function())
        return Samples((0.75, 0.5))

    monkeypatch.setattr(timing, "_ceiling", ceiling)
    return ran


def test_gemm_peak_counts_two_flops_a_multiply_add(half_a_second):
    for peak in (gemm_peak("float64", "cpu", (8, 16)), numpy_gemm_peak("float64", (16, 8))):
        assert peak == 2 * 16**3 / 0.5
    assert [len(out) for out in half_a_second] == [8, 16, 16, 8]
    assert str(half_a_second[0].dtype) == "torch.float64" and half_a_second[2].dtype == np.float64
    assert all(float(out.std()) > 0 for out in half_a_second), "random data"


def test_gemm_peak_leaves_the_precision_setting_as_it_was(half_a_second, monkeypatch):
    before = torch.get_float32_matmul_precision()
    gemm_peak("tf32", "cpu", (4,))
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(AttributeError):
        gemm_peak("float31", "cpu", (4,))
    assert torch.get_float32_matmul_precision() == before


def test_copy_bandwidth_counts_read_and_write(half_a_second, monkeypatch):
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 10)
    assert copy_bandwidth("cpu") == 2 * 1024 / 0.5
    assert half_a_second[0].numel() * half_a_second[0].itemsize == 1024
    assert half_a_second[0].unique().numel() > 1, "random data"


def test_the_program_saves_the_ceilings(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(timing.GEMM_SIZES, "cpu", (4, 8))
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 10)
    monkeypatch.setattr(sys, "argv", ["timing", "--device", "cpu", "--out", str(tmp_path)])
    timing.main()
    (path,) = (tmp_path / "common").iterdir()
    assert path.name.startswith("machine_") and capsys.readouterr().out.endswith(f"{path}\n")
    rows = json.loads(path.read_text())["rows"]
    whats = [(row["what"], row.get("dtype"), row["size"]) for row in rows]
    assert whats[0] == ("torch copy", None, 1024) and ("numpy matmul", "float64", 8) in whats and len(rows) == 9
    assert all(row["samples"]["raw"] and min(row["samples"]["raw"]) > 0 for row in rows)
