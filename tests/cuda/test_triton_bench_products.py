"""The benchmark of what exists in Triton alone, as far as a CPU goes: every case is made at a small size and every
competitor's result compared, ours by the interpreter; who fails, what is counted, the budget and the file of results.
No test asserts a speed."""

import dataclasses
import itertools
import json
import math
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from common import timing
from cuda import bench_other_products as bench
from cuda.bench_other_products import BenchConfig, Losses
from cuda.measure import other_products
from cuda.measure.ladder import Budget
from cuda.measure.other_products import DISTRIBUTIONS, OPERATIONS, SIZES, Case, Problem

ALL = list(other_products.problems("cpu", SIZES["cpu"]))
BY_NAME = {str(problem): problem for problem in ALL}
OPTIONAL = ("torch._", "bitsandbytes", "CUDA C++")  # not in every torch, not installed, not built


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(timing, "SETTLE_S", 0.0)


def call(result):
    return other_products.call(lambda: result)


def raises(error):
    def function():
        raise error

    return function


TWO = torch.full((4,), 2.0)


def toy(ours, peers, **fields):
    return Case(ours, peers, lambda: TWO, **{"flops": 2 * 10**6, "bytes": 10**6} | fields)


def toy_problem(name="toy", kernels=0, case=None):
    case = case or toy({"triton": call(TWO)}, {"torch": call(TWO)})
    return Problem(name, "4", kernels, lambda: case)


# ---- the cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ALL, ids=str)
def test_every_competitor_is_right(problem):
    losses = Losses()
    case = problem.make()
    good = bench.sound(problem, case, losses)
    assert not losses.failed and not losses.wrong
    missing = (case.ours | case.peers).keys() - good.keys()
    assert all(name.startswith(OPTIONAL) for name in missing) and len(missing) == len(losses.left_out)
    assert set(case.ours) <= set(good) and set(case.peers) & set(good)
    assert case.bytes > 0 and (case.flops > 0) == (problem.operation != "quantize_fp8")


@pytest.mark.parametrize("name", [next(str(p) for p in ALL if p.operation == name) for name in OPERATIONS])
def test_a_result_that_is_somewhere_else_is_wrong(name):
    """In rows or columns that are moved by one, or in one number that is not one."""
    case = BY_NAME[name].make()
    result, reference = next(iter(case.ours.values()))()(), case.reference()
    values = result[0] if isinstance(result, tuple) else result
    rest = result[1:] if isinstance(result, tuple) else ()
    moved = torch.roll(values.float(), 1, -1).to(values.dtype)
    spoiled = values.float().index_put((torch.tensor(0),) * values.ndim, torch.tensor(math.nan)).to(values.dtype)
    assert case.close(result, reference)
    for wrong in (moved, spoiled):
        assert not case.close((wrong, *rest) if rest else wrong, reference)


def test_float8_sums_of_tensor_cores_are_let_through_and_a_missing_scale_is_not():
    """They lose up to 2 or 3 percent of a long sum."""
    case = BY_NAME["fp8_matmul 48x64x160, a scale a row"].make()
    result, reference = case.ours["triton"]()(), case.reference()
    assert case.close(0.96 * result, reference) and not case.close(0.9 * result, reference)
    other = BY_NAME["int8_matmul 4 rows, 32x256"].make()
    assert not other.close(0.96 * other.ours["triton"]()(), other.reference())


def test_a_cast_has_to_be_to_the_nearest():
    case = BY_NAME["quantize_fp8 33x200, a scale a row"].make()
    x8, scale = case.ours["triton"]()()
    bits = x8.contiguous().view(torch.uint8)
    assert case.close((x8, scale), case.reference())
    one_off = torch.where(bits & 127 < 126, bits + 1, bits).view(x8.dtype)
    assert not case.close((one_off, scale), case.reference())
    smallest = torch.arange(8, dtype=torch.uint8)[None]  # evenly spaced, unlike the others
    numbers, next_ones = smallest.view(x8.dtype), (smallest + 1).view(x8.dtype)
    assert case.close((numbers, scale[:1]), numbers.float() * scale[:1])
    assert not case.close((next_ones, scale[:1]), numbers.float() * scale[:1])
    assert not case.close((x8, 1.1 * scale), case.reference())


def test_flops_and_bytes_by_hand():
    def counts(name):
        case = BY_NAME[name].make()
        return case.flops, case.bytes

    assert counts("fp8_matmul 48x64x160, a scale a row") == (2 * 48 * 64 * 160, 48 * 160 + 160 * 64 + 2 * 48 * 64)
    assert counts("quantize_fp8 33x200, a scale a tensor") == (0, 33 * 200 * (2 + 1))
    x, y, weights = 40 * 32, 40 * 48, 2 * 32 * 48
    assert counts("grouped_matmul 2 experts, 40x48x32, skewed, forward") == (2 * 40 * 32 * 48, 2 * (x + y + weights))
    backward = 2 * (y + x + weights) + 2 * (x + weights)  # reads the gradient, x and weights, writes two gradients
    assert counts("grouped_matmul 2 experts, 40x48x32, skewed, backward") == (4 * 40 * 32 * 48, backward)
    elements, io = 32 * 256, 2 * 4 * (32 + 256)
    assert counts("nf4_matmul 4 rows, 32x256") == (2 * 4 * elements, elements // 2 + 4 * elements // 64 + io)
    assert counts("int4_matmul 4 rows, 32x256") == (2 * 4 * elements, elements // 2 + 2 * elements // 128 + io)
    assert counts("int8_matmul 4 rows, 32x256") == (2 * 4 * elements, elements + 2 * 32 + io)
    adapter = 2 * 8 * 64  # A and B of rank 8
    assert counts("lora 9 rows, skewed") == (2 * 9 * adapter, 2 * (2 * adapter + 2 * 9 * 64))
    cache = 2 * 2 * 192 * 2 * 64
    expected = (4 * 2 * 4 * 192 * 64, 2 * (cache + 2 * 2 * 4 * 64))
    assert counts("attention_decode 2 sequences, 4 heads of 64 on 2, 192 keys") == expected


def test_the_limit_is_the_slower_of_the_two():
    of_memory, of_flops = toy({}, {}, bytes=10**9, flops=1), toy({}, {}, bytes=1, flops=10**12, peak=1e14)
    assert of_memory.limit(1e12) == (1e-3, "memory")
    assert of_flops.limit(1e12) == (1e-2, "tensor cores")


@pytest.mark.parametrize("batch", [1, 2, 9, 64, 256])
def test_distributions_of_adapters(batch):
    for distribution in DISTRIBUTIONS:
        counts = other_products.rows_of_adapters(distribution, batch, 64)
        assert sum(counts) == batch and 1 <= len(counts) <= 64 and min(counts) >= 1
    assert other_products.rows_of_adapters("identical", batch, 64) == [batch]
    assert len(other_products.rows_of_adapters("distinct", batch, 64)) == min(batch, 64)
    uniform = other_products.rows_of_adapters("uniform", batch, 64)
    assert len(uniform) == math.ceil(math.sqrt(batch)) and max(uniform) - min(uniform) <= 1
    zipf = other_products.rows_of_adapters("zipf", batch, 64)
    assert zipf == sorted(zipf, reverse=True) and (batch < 9 or zipf[0] > 2 * zipf[-1])
    assert sum(other_products.rows_of_adapters("zipf", 1000, 3)) == 1000


def test_distributions_of_experts():
    assert other_products.rows_of_experts(16384, 8, False) == [2048] * 8
    assert other_products.rows_of_experts(10, 4, False) == [2, 3, 3, 2]
    skewed = other_products.rows_of_experts(16384, 64, True)
    assert sum(skewed) == 16384 and skewed == sorted(skewed, reverse=True) and skewed[0] > 50 * skewed[-1] > 0
    assert other_products.rows_of_adapters("skewed", 256, 64) == [1, 255]


def test_on_a_gpu_each_operation_has_its_turn_and_names_are_its_own():
    """Nothing is made: the operands would fill the memory."""
    listed = list(other_products.problems("cuda", SIZES["cuda"]))
    assert [problem.operation for problem in listed[: len(OPERATIONS)]] == list(OPERATIONS)
    assert len({str(problem) for problem in listed}) == len(listed)
    counted = {name: sum(problem.operation == name for problem in listed) for name in OPERATIONS}
    assert counted == {"fp8_matmul": 8, "grouped_matmul": 8, "nf4_matmul": 12, "lora": 16, "int4_matmul": 12,
                       "quantize_fp8": 4, "int8_matmul": 12, "attention_decode": 3}  # fmt: skip
    only = list(other_products.problems("cuda", SIZES["cuda"], ("lora", "quantize_fp8")))
    assert [problem.operation for problem in only[:3]] == ["lora", "quantize_fp8", "lora"] and len(only) == 20
    assert all(m in SIZES["cuda"].rows for m in (1, 4, 16, 64, 512, 4096))


# ---- who fails -------------------------------------------------------------------------------------------------------


def fragile():
    """Raises when it is called for the fourth time: once it was compared, then it was warmed up."""
    calls = itertools.count()
    return lambda: lambda: TWO if next(calls) < 3 else raises(RuntimeError("out of memory"))()


ERRORS = [RuntimeError("x" * 999), AssertionError(), AttributeError("a"), MemoryError(), ImportError(), StopIteration()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_who_fails_loses_its_own_row_alone(error):
    losses = Losses()
    case = toy(
        {"triton": call(TWO), "triton 2": lambda: raises(error), "triton 3": raises(error), "triton 4": call(TWO + 1)},
        {"a": raises(error), "b": lambda: raises(error), "c": call(TWO * math.nan), "d": call(TWO[:2]),
         "torch": call(TWO)},
    )  # fmt: skip
    rows = bench.measure(toy_problem(), case, losses, rounds=2, bandwidth=1e12, device="cpu")
    assert [row["by"] for row in rows] == ["triton", "torch"]
    assert [line.split(":")[0] for line in losses.failed] == [
        "toy 4, triton 2", "toy 4, triton 3", "toy 4, triton 4",
    ]  # fmt: skip
    assert [line.split(":")[0] for line in losses.wrong] == ["toy 4, c", "toy 4, d"]
    assert [line.split(":")[0] for line in losses.left_out] == ["toy, a", "toy, b"]
    assert all(len(line) < 400 for line in losses.failed)


def test_who_fails_under_the_clock_loses_its_own_row_alone():
    losses = Losses()
    case = toy({"triton": call(TWO), "triton 2": fragile()}, {"a": fragile(), "torch": call(TWO)})
    rows = bench.measure(toy_problem(), case, losses, rounds=2, bandwidth=1e12, device="cpu")
    assert [row["by"] for row in rows] == ["triton", "torch"]
    assert losses.failed == ["toy 4, triton 2: RuntimeError: out of memory"]
    assert losses.left_out == ["toy, a: RuntimeError: out of memory"]


def test_all_that_fail_give_no_rows():
    losses = Losses()
    case = toy({"triton": raises(ValueError("no"))}, {"torch": raises(ValueError("no"))})
    assert bench.measure(toy_problem(), case, losses, rounds=1, bandwidth=1e12, device="cpu") == []
    assert len(losses.failed) == len(losses.left_out) == 1


def test_a_peer_that_is_missing_is_said_once(capsys):
    losses = Losses()
    case = toy({"triton": call(TWO)}, {"b": raises(ImportError("no b")), "torch": call(TWO)})
    for what in ("4", "8"):
        bench.sound(Problem("toy", what, 0, lambda: case), case, losses)
    assert losses.left_out == ["toy, b: ImportError: no b"] and capsys.readouterr().out.count("no b") == 1


def test_a_case_that_cannot_be_made_costs_the_others_nothing():
    losses, seen = Losses(), []
    broken = Problem("broken", "1", 0, raises(torch.OutOfMemoryError("CUDA out of memory")))
    unsure = toy_problem("unsure", case=dataclasses.replace(toy({}, {}), reference=raises(TypeError("no reference"))))

    def work(problem, case):
        seen.append((problem.operation, bench.sound(problem, case, losses)))

    bench.each([broken, unsure, toy_problem()], Budget(1e6), losses, work)
    assert [(name, list(good)) for name, good in seen] == [("toy", ["triton", "torch"])]
    assert losses.failed == [
        "broken 1: OutOfMemoryError: CUDA out of memory", "unsure 4: TypeError: no reference",
    ]  # fmt: skip


# ---- rows, budget, file ----------------------------------------------------------------------------------------------


def test_a_row_says_how_fast_and_how_near_the_limit(monkeypatch):
    seconds = {"triton": 4e-6, "triton 2": 1e-6, "torch": 2e-6, "other": 8e-6}

    def compare(functions, **options):
        assert options == {"rounds": 3, "warmup": 2, "check": None, "device": "cuda", "inner": bench.INNER}
        return {name: timing.Samples((seconds[name],) * 3, 10) for name in functions}

    monkeypatch.setattr(timing, "compare", compare)
    case = toy(dict.fromkeys(("triton", "triton 2"), call(TWO)), dict.fromkeys(("torch", "other"), call(TWO)))
    rows = bench.measure(toy_problem(), case, Losses(), rounds=3, bandwidth=2e12)
    assert [row["by"] for row in rows] == list(seconds)
    first, second, *peers = rows
    assert set(peers[0]) | {"of_best_peer"} == set(first) == {
        "operation", "case", "by", "us", "tflops", "gb_per_s", "limit", "of_limit", "of_best_peer", "samples",
    }  # fmt: skip
    assert (first["operation"], first["case"], first["limit"]) == ("toy", "4", "memory")
    numbers = [first[key] for key in ("us", "tflops", "gb_per_s", "of_limit", "of_best_peer")]
    assert numbers == pytest.approx([4.0, 0.5, 250.0, 0.5e-6 / 4e-6, 0.5])
    assert second["of_best_peer"] == pytest.approx(2.0) and not any("of_best_peer" in row for row in peers)


def test_without_a_peer_there_is_no_ratio():
    case = toy({"triton": call(TWO)}, {"torch": raises(ImportError())})
    (row,) = bench.measure(toy_problem(), case, Losses(), rounds=1, bandwidth=1e12, device="cpu")
    assert "of_best_peer" not in row and row["us"] > 0


def test_the_budget_leaves_out_what_does_not_fit():
    now, losses, seen = [0.0], Losses(), []
    budget = Budget(10.0, clock=lambda: now[0])

    def work(problem, case):
        seen.append(problem.operation)
        now[0] += 3.0

    listed = [toy_problem("a"), toy_problem("b", kernels=20), toy_problem("c", kernels=4), toy_problem("d"),
              toy_problem("e", kernels=1), toy_problem("f")]  # fmt: skip
    bench.each(listed, budget, losses, work)
    assert seen == ["a", "c", "d", "f"]
    assert budget.skipped == ["b 4", "e 4"] and not losses.failed


def test_it_files_what_was_timed(tmp_path, monkeypatch, capsys):
    compare, save = timing.compare, bench.save_result
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(timing, "compare", lambda *a, **k: compare(*a, **k | {"device": "cpu"}))
    monkeypatch.setattr(bench, "save_result", lambda *a, **k: save(*a, **k | {"device": "cpu"}))
    broken = Problem("broken", "1", 0, raises(RuntimeError("no memory")))
    peers = {"gone": raises(ImportError("gone")), "odd": call(TWO + 1), "torch": call(TWO)}
    listed = [toy_problem(case=toy({"triton": call(TWO)}, peers)), toy_problem("long", kernels=1000)]
    monkeypatch.setattr(other_products, "problems", lambda *_: iter(listed))
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda", "--rounds", "2", "--out", str(tmp_path)])
    assert bench.main() == 0
    (path,) = (tmp_path / "cuda").glob("other_products_*.json")
    result = json.loads(path.read_text())
    assert [(row["operation"], row["by"]) for row in result["rows"]] == [("toy", "triton"), ("toy", "torch")]
    assert len(result["rows"][0]["samples"]["raw"]) == 2
    config = result["config"]
    assert [config[key] for key in ("failed", "wrong", "left_out", "skipped")] == [
        [], ["toy 4, odd: WrongResult: it is far from torch's"], ["toy, gone: ImportError: gone"], ["long 4"],
    ]  # fmt: skip
    assert config["copy_bytes_per_s"] == 1e12
    assert "x the best peer" in capsys.readouterr().out
    listed.append(broken)
    assert bench.main() == 1
    assert json.loads(path.read_text())["config"]["failed"] == ["broken 1: RuntimeError: no memory"]
    path.unlink()
    listed[:] = [broken]
    assert bench.main() == 1 and not path.exists()  # nothing to file


def test_what_breaks_off_is_filed(tmp_path, monkeypatch):
    filed = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(bench, "save_result", lambda *a, **k: filed.append(a[2]))

    def stop():
        raise KeyboardInterrupt

    row = {"operation": "a", "case": "b", "by": "c", "us": 1.0, "tflops": 1.0, "gb_per_s": 1.0, "limit": "memory",
           "of_limit": 0.5}  # fmt: skip
    monkeypatch.setattr(bench, "measure", lambda problem, *a, **k: [row] if problem.operation == "toy" else stop())
    monkeypatch.setattr(other_products, "problems", lambda *_: iter([toy_problem(), toy_problem("stop")]))
    with pytest.raises(KeyboardInterrupt):
        bench.bench_cuda(BenchConfig(device="cuda", out=tmp_path))
    assert filed == [[row]]


def test_on_a_cpu_it_compares_and_files_nothing(tmp_path, monkeypatch, capsys):
    flags = ["--device", "cpu", "--operations", "quantize_fp8", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    assert bench.main() == 0
    out = capsys.readouterr().out
    assert "nothing is timed" in out and out.count("right: triton; torch") == 4 and not list(tmp_path.iterdir())
    case = toy({"triton": call(TWO + 1)}, {"torch": call(TWO)})
    monkeypatch.setattr(other_products, "problems", lambda *_: iter([toy_problem(case=case)]))
    assert bench.main() == 1
    assert "FAILED, not timed: toy 4, triton: WrongResult: it is far from torch's" in capsys.readouterr().out
    case = toy({"triton": call(TWO)}, {"a": call(TWO + 1), "torch": call(TWO)})
    assert bench.main() == 1
    assert "FAILED, not timed: toy 4, a: WrongResult" in capsys.readouterr().out


def test_it_refuses_what_is_no_operation_or_no_number():
    with pytest.raises(ValueError, match="operation 'fly': expected all, or some of fp8_matmul"):
        BenchConfig(operations="lora,fly")
    for bad in ({"rounds": 0}, {"budget_s": 0.0}, {"budget_s": math.nan}):
        with pytest.raises(ValueError, match="expected positive numbers"):
            BenchConfig(**bad)
    assert BenchConfig(operations="lora, int4_matmul").chosen() == ("lora", "int4_matmul")
