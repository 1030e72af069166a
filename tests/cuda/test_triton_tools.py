"""What measures the kernels in Triton, as far as a CPU goes: compile times and code, the tuner of tilings, the columns
of the benchmarks, the second run of the tests with the oldest Triton. No test asserts a speed."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from common import timing
from cuda import (
    bench_attention,
    bench_fused,
    bench_matmul,
    bench_triton,
    ops,
    triton_compat,
    triton_tilings,
    tune_triton,
)
from cuda.measure import attention, code_lines, fused, ladder, products, triton_compiled
from cuda.measure.ladder import Budget
from cuda.measure.products import Competitor
from cuda.measure.triton_compiled import Configuration
from cuda.triton_compat import TensorDescriptor, jit
from cuda.triton_tilings import Tiling
from cuda.tune_triton import Problem

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(timing, "SETTLE_S", 0.0)
    monkeypatch.setattr(timing, "SAMPLE_S", 1e-5)


@jit
def product(a, b, d_ptr, K, SIZE: tl.constexpr):
    d = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for k in range(0, K, SIZE):
        d = tl.dot(a.load([0, k]), b.load([k, 0]), d)
    at = tl.arange(0, SIZE)
    tl.store(d_ptr + at[:, None] * SIZE + at[None, :], d)


@jit
def spills(x_ptr, SIZE: tl.constexpr):
    """All of SIZE is held by one warp at once."""
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    tl.debug_barrier()
    tl.store(x_ptr + at, x * tl.sum(x, axis=0))


def launch_product():
    a, b = (torch.zeros(64, 64, dtype=torch.bfloat16) for _ in range(2))
    described = [TensorDescriptor.from_tensor(x, [64, 64]) for x in (a, b)]
    product[(1,)](*described, torch.zeros(64, 64), 64, SIZE=64)


def launch_both():
    launch_product()
    spills[(1,)](torch.zeros(8192), SIZE=8192, num_warps=1)
    launch_product()


ONE = Configuration("product", "64", "matmul/09_wgmma.cu", launch_product)
BOTH = ONE._replace(launch=launch_both)


# ---- compile times and code ------------------------------------------------------------------------------------------


def test_a_row_for_each_kernel_says_what_the_compiler_made():
    folder = triton.knobs.cache.dir
    assert triton_compiled.compile_all(ONE)[0]["kernel"] == "product"
    # again from nothing
    first, second = triton_compiled.compile_all(BOTH)
    assert (first["kernel"], second["kernel"]) == ("product", "spills")
    assert first["compile_s"] > first["ptxas_s"] > 0 and second["ptxas_s"] > 0
    assert first["hgmma"] >= 4 and first["tma_loads"] >= 2 and first["hmma"] == first["spills"] == first["stack"] == 0
    assert first["shared"] >= 2 * 64 * 64 * 2 and first["warps"] == 4 and 16 < first["registers"] <= 255
    assert second["spills"] > 10 and second["stack"] > 10 and second["warps"] == 1 and second["hgmma"] == 0
    assert second["loads_128"] == second["loads"] == 64 and second["instructions"] > 500
    assert triton.knobs.cache.dir == folder and triton.knobs.compilation.listener is None
    assert triton_compat.capability() is None


def test_lines_of_code():
    python = (
        '"""What it is\nand does."""\n\nimport re  # x\n\n# why\nx = 1\n\n\ndef f():\n    """One."""\n    return "#"\n'
    )
    assert code_lines.count(python, "x.py") == 4
    assert code_lines.count("// what\n#include <x>\n/* a\nb */\nint x;  // y\n\n", "x.cu") == 2
    # what is imported or included counts, once, and what all share does not
    own, theirs = (code_lines.count((ROOT / "cuda" / x).read_text(), x) for x in ("triton_norm.py", "triton_rows.py"))
    assert (
        code_lines.lines_of(["triton_norm.py"])
        == code_lines.lines_of(["triton_norm.py", "triton_rows.py"])
        == own + theirs
    )
    own, theirs = (code_lines.count((ROOT / "cuda" / x).read_text(), x) for x in ("fused/norm.cu", "fused/rows.cuh"))
    assert code_lines.lines_of(["fused/norm.cu"]) == own + theirs > 100


def test_every_operation_of_triton_is_among_the_configurations():
    """Of those that compute: softcap and the like are options of these."""
    covered = {one.operation for one in triton_compiled.configurations()}
    alike = {"causal_attention", "cross_entropy_", "linear_cross_entropy", "dequantize_int4", "dequantize_int8"}
    functions = {name for name in ops.__all__ if name.islower()}
    assert functions - alike <= covered


def test_a_configuration_that_compiles_nothing_is_refused():
    with pytest.raises(ValueError, match="product, 64: expected a kernel to be compiled, none was"):
        triton_compiled.compile_all(ONE._replace(launch=lambda: None))
    assert triton.knobs.compilation.listener is None


def test_nvccs_seconds_are_those_of_the_last_build(tmp_path):
    folder = tmp_path / "native-cpython-311"
    folder.mkdir()
    entry = "{}\t{}\t1795350393613655788\tcuda/{}/__/{}.o\t13951b8dc6246b56\n"
    log = "# ninja log v6\n" + "".join(
        entry.format(*some)
        for some in [
            (0, 5000, "native/CMakeFiles/kernels_sm90.dir", "matmul/09_wgmma.cu"),
            (100, 20100, "simt/CMakeFiles/_simt_kernels.dir", "fused/norm.cu"),
            (100, 28100, "native/CMakeFiles/kernels_any.dir", "fused/norm.cu"),
            (7, 2507, "native/CMakeFiles/kernels_sm90.dir", "matmul/09_wgmma.cu"),
            (0, 9000, "native/CMakeFiles/_sm90.dir", "bindings.cpp"),
            (0, 9000, "simt/CMakeFiles/_simt_kernels.dir", "fused/norm.cu"),
            (0, 9000, "native/CMakeFiles/kernels_sm80.dir", "matmul/09_wgmma.cu"),
        ]
    )
    (folder / ".ninja_log").write_text(log)
    assert triton_compiled.nvcc_seconds(tmp_path) == {"matmul/09_wgmma.cu": 2.5, "fused/norm.cu": 28.0}
    assert triton_compiled.nvcc_seconds(tmp_path / "none") == {}


def test_it_files_what_compiles_and_names_what_does_not(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "native-x"
    folder.mkdir()
    (folder / ".ninja_log").write_text("1\t1001\t1\tcuda/kernels_sm90.dir/__/matmul/09_wgmma.cu.o\tab\n")
    broken = Configuration("broken", "1", "none.cu", lambda: (_ for _ in ()).throw(TypeError("no such operation")))
    monkeypatch.setattr(triton_compiled, "configurations", lambda: iter([broken, ONE]))
    monkeypatch.setattr(sys, "argv", ["bench_triton", "--build", str(tmp_path), "--out", str(tmp_path)])
    assert bench_triton.main() == 1
    (path,) = (tmp_path / "cuda").glob("triton_compile_*.json")
    result = json.loads(path.read_text())
    assert [(row["kernel"], row["nvcc_s"]) for row in result["rows"]] == [("product", 1.0)]
    assert result["config"]["failed"] == ["broken, 1: TypeError: no such operation"]
    assert "FAILED: broken, 1" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--operations", "product"])
    assert bench_triton.main() == 0
    with pytest.raises(ValueError, match="operation 'fly': expected all, or some of broken, product"):
        bench_triton.BenchConfig(operations="fly").chosen()


def configurations():
    return [pytest.param(one, id=f"{one.operation}, {one.what}") for one in triton_compiled.configurations()]


@pytest.mark.slow
@pytest.mark.parametrize("one", configurations())
def test_every_configuration_compiles_without_spills(one):
    """Not with an empty cache: what other tests have compiled counts here."""
    assert (ROOT / "cuda" / one.source).exists()
    with triton_compat.compiling(90) as found:
        one.launch()
    assert found
    for compiled in found:
        made = triton_compiled.code_of(compiled.kernel.asm["cubin"])
        assert made["spills"] == made["stack"] == 0, compiled.name


def test_no_two_configurations_are_alike():
    names = [(one.operation, one.what) for one in triton_compiled.configurations()]
    assert len(set(names)) == len(names) > 10


# ---- the tuner -------------------------------------------------------------------------------------------------------

CANDIDATES = [Tiling(128, 128, 64, 4, 3), Tiling(64, 64, 64, 4, 3), Tiling(1, 1), Tiling(2, 2)]


def toy(name="toy", calls=None):
    """An operation that asks twice; of the first question, one tiling gives a wrong result and one does not compile."""

    def launch():
        first = triton_tilings.choose("toy", "sm_90", (torch.bfloat16, 64), CANDIDATES)
        second = triton_tilings.choose("toy_sum", "sm_90", (64, True), CANDIDATES[:2])
        if calls is not None:
            calls.append((first, second))
        if first.block_m == 2:
            raise RuntimeError("out of resource: shared memory")
        return torch.full((4,), torch.nan if first.block_m == 1 else 2.0)

    return Problem(name, launch, lambda: torch.full((4,), 2.0))


def test_the_triton_tuner_times_what_is_right(capsys):
    failures, calls = [], []
    rows = tune_triton.sweep([toy(calls=calls)], Budget(1e6), rounds=2, failures=failures, device="cpu")
    assert [(row["question"][0], row["tiling"]) for row in rows] == [
        (name, list(tiling)) for name in ("toy", "toy_sum") for tiling in CANDIDATES[:2]
    ]
    for row in rows:
        assert row["us"] == pytest.approx(1e6 * row["samples"].median) and 0 < row["of_fastest"] <= 1
    assert max(row["of_fastest"] for row in rows[:2]) == max(row["of_fastest"] for row in rows[2:]) == 1.0
    assert "result is off" in failures[0] and failures[1].endswith("RuntimeError: out of resource: shared memory")
    assert len(failures) == 2 and "of 2" in capsys.readouterr().out
    assert {first for first, _ in calls} == set(CANDIDATES) and calls[0] == (CANDIDATES[0],) * 2
    assert all(one == CANDIDATES[0] or two == CANDIDATES[0] for one, two in calls)  # one question at a time
    short = Budget(1e-9)
    assert tune_triton.sweep([toy()], short, rounds=1, failures=[], device="cpu") == [] and short.skipped == ["toy"]


def test_a_problem_that_does_not_run_costs_the_triton_tuner_no_other(monkeypatch):
    """The first guess is out of resources; so is, for a backward pass, the forward pass before it."""
    good = toy("good")
    question = ("toy", "sm_90", "bfloat16", 64)

    def launch():
        first = triton_tilings.choose(*question[:2], question[2:], CANDIDATES[::-1])
        if first.block_m == 2:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return torch.full((4,), torch.nan if first.block_m == 1 else 2.0)

    def fails(*_, **__):
        raise OutOfResources(2048, 1024, "threads")

    monkeypatch.setattr(attention, "ours", lambda *_, **__: fails)
    backward = tune_triton.attention_of(attention.Shape(64, 8, True, 1, 1), True, "cpu")
    some = [good._replace(name="bad", launch=launch), backward, good]
    failures: list[str] = []
    rows = tune_triton.sweep(some, Budget(1e6), rounds=1, failures=failures, device="cpu")
    assert [row["problem"] for row in rows] == ["bad"] * 2 + ["good"] * 4
    assert failures[0].startswith("bad: OutOfResources: out of resource: shared memory")
    assert [failure.partition(":")[0] for failure in failures] == ["bad"] * 3 + [backward.name] + ["good"] * 2


def tuned(question, tiling, us, of_fastest, problem="p"):
    return {"question": question, "tiling": list(tiling), "us": us, "of_fastest": of_fastest, "problem": problem}


def test_the_triton_table_is_python_and_sorted():
    rows = [
        tuned(["matmul", "sm_90", "bfloat16", 4096], CANDIDATES[0], 100.4, 100 / 100.4),  # as good, and first
        tuned(["matmul", "sm_90", "bfloat16", 4096], CANDIDATES[1], 100.0, 1.0),
        tuned(["matmul", "sm_90", "bfloat16", 512], CANDIDATES[0], 10.0, 0.5),
        tuned(["matmul", "sm_90", "bfloat16", 512], CANDIDATES[1], 5.0, 1.0),
        tuned(["attention", "sm_90", 128, True], CANDIDATES[0], 5.0, 1.0, "short"),
        tuned(["attention", "sm_90", 128, True], CANDIDATES[1], 9.0, 1.0, "long"),  # takes longer: decides
    ]
    text = tune_triton.table_text({"device": "a-card", "date": "2026-01-01", "rows": rows}, "f.json")
    space: dict = {}
    exec(text, space)
    assert list(space["MEASURED"].items()) == [
        (("attention", "sm_90", 128, True), tuple(CANDIDATES[1])),
        (("matmul", "sm_90", "bfloat16", 512), tuple(CANDIDATES[1])),
        (("matmul", "sm_90", "bfloat16", 4096), tuple(CANDIDATES[0])),
    ]
    assert "From f.json, measured on a-card on 2026-01-01." in space["__doc__"]
    with pytest.raises(ValueError, match=r"f.json: expected a device and rows"):
        tune_triton.table_text({"device": "a-card", "rows": []}, "f.json")
    committed = (ROOT / "cuda/triton_table.py").read_text()
    assert (
        committed.splitlines()[0].startswith(text.splitlines()[0][:-1]) and "MEASURED: dict[tuple, tuple" in committed
    )
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--stdin-filename", "t.py", "-"],
        input=text, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert formatted.returncode or formatted.stdout == text, "make test checks the format of what is written"


def test_the_triton_tuner_files_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune_triton, "problems", lambda config, device: iter([toy()]))
    compare, save = timing.compare, tune_triton.save_result
    monkeypatch.setattr(timing, "compare", lambda *a, **k: compare(*a, **k | {"device": "cpu"}))
    monkeypatch.setattr(tune_triton, "save_result", lambda *a, **k: save(*a, **k | {"device": "cpu"}))
    table = tmp_path / "table.py"
    flags = ["--rounds", "1", "--table", str(table), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tune_triton", *flags])
    assert tune_triton.main() == 0
    space: dict = {}
    exec(table.read_text(), space)
    assert set(space["MEASURED"]) == {("toy", "sm_90", "bfloat16", 64), ("toy_sum", "sm_90", 64, True)}
    (filed,) = (tmp_path / "cuda").glob("triton_tilings_*.json")
    assert len(json.loads(filed.read_text())["config"]["failed"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_triton_tuner_wants_a_gpu():
    done = subprocess.run([sys.executable, "-m", "cuda.tune_triton"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "tilings are timed on a GPU: this machine has no CUDA device" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds 0"),
        ({"budget_s": math.nan}, "budget_s nan: expected positive numbers"),
        ({"shapes": "12"}, "size '12'"),
        ({"head_dims": "65"}, "head_dims '65': expected some of"),
        ({"head_dims": "a"}, "head_dims 'a': expected some of"),
    ],
)
def test_bad_options_of_the_triton_tuner_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tune_triton.TuneConfig(**options)


def test_the_problems_of_the_triton_tuner_are_right(monkeypatch):
    """Small ones, interpreted: what is asked, and that ours and torch's agree."""
    shapes = [attention.Shape(64, 40, True, 1, 2), attention.Shape(64, 40, False, 1, 2)]
    monkeypatch.setattr(attention.Shape, "of", lambda width, tokens, causal: shapes[not causal])
    config = tune_triton.TuneConfig(shapes="16,16x24x8", head_dims="64")
    asked = []
    for problem in tune_triton.problems(config, "cpu"):
        with triton_tilings.asked() as questions:
            result = problem.launch()
        assert timing.close(tune_triton.TOLERANCE)({"ours": result, "torch": problem.reference()}), problem.name
        asked.append({question[0] for question in questions})
        assert all(question[1] == "interpreter" and candidates for question, candidates in questions.items())
    assert len(asked) == 6 and all(asked)


# ---- the columns of the benchmarks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(22))
def test_each_case_of_the_fused_benchmark_in_triton(case):
    case = list(fused.cases("cpu", 8, 64, 64))[case]
    functions = {"triton": case.run(case.in_triton()), "torch": case.run(case.torchs)}
    check = (lambda _: None) if case.name in bench_fused.MUTATE else timing.close(bench_fused.TOLERANCE)
    timing.compare(functions, rounds=1, warmup=1, inner=1, check=check)


def test_triton_is_no_peer_of_the_fused_benchmark():
    rows = [
        {"by": name, "us": us}
        for name, us in (("ours", 10.0), ("triton", 5.0), ("torch.compile", 8.0), ("torch", 20.0))
    ]
    assert [row.get("of_best_peer") for row in bench_fused.with_ratios(rows)] == [0.8, 1.6, None, None]


def test_a_case_that_triton_cannot_compile_costs_the_others_nothing(capsys):
    x = torch.ones(8)

    def ours(x, kernels="cuda"):
        if kernels == "triton":
            raise NameError("no such thing")
        return 2 * x

    case = fused.Case("double", (x,), ours, lambda x: x + x, 64)
    config, failures = bench_fused.BenchConfig(compile=False, rounds=1), []
    rows = bench_fused.measure(case, config, 1e9, failures, "cpu")
    assert [row["by"] for row in rows] == ["ours", "torch"] and failures == ["double, triton: NameError: no such thing"]
    whole = bench_fused.measure(
        fused.Case("double", (x,), lambda x, **k: 2 * x, lambda x: x + x, 64), config, 1e9, [], "cpu"
    )
    assert [row["by"] for row in whole] == ["ours", "triton", "torch"] and "of_best_peer" in whole[1]
    wrong = fused.Case("double", (x,), lambda x, kernels="": 3 * x if kernels else 2 * x, lambda x: x + x, 64)
    assert [row["by"] for row in bench_fused.measure(wrong, config, 1e9, failures, "cpu")] == ["ours", "torch"]
    assert failures.pop() == "double, triton: ValueError: the result is far from torch's"
    without = bench_fused.BenchConfig(compile=False, rounds=1, triton=False)
    assert list(bench_fused.competitors(case, without, failures)) == ["ours", "torch"] and len(failures) == 1


def test_the_loss_of_a_head_in_triton():
    functions = fused.loss_of_a_head("cpu", 24, 64, 96)
    assert list(functions) == ["ours", "triton", "torch"]
    del functions["ours"]
    timing.compare(functions, rounds=1, warmup=0, inner=1, check=timing.close(bench_fused.TOLERANCE))


def test_attention_in_triton_is_drawn_and_is_no_peer(tmp_path, monkeypatch):
    assert "triton" in bench_attention.OURS and "cuDNN" not in bench_attention.OURS
    config = bench_attention.BenchConfig(rounds=1, out=tmp_path, triton="64")
    compare = timing.compare
    monkeypatch.setattr(timing, "compare", lambda *a, **k: compare(*a, **k | {"device": "cpu"}))
    run = bench_attention.Run(config, Budget(1e6))
    x = torch.randn(64, 64)
    run.keep(
        attention.Shape(64, 64, True, 1, 1), "forward", {name: lambda: x @ x for name in ("best_09", "triton", "cuDNN")}
    )
    rows = {row["step"]: row for row in run.rows}
    assert rows["cuDNN"]["of_best_peer"] == 1.0
    assert rows["triton"]["of_best_peer"] == pytest.approx(rows["cuDNN"]["us"] / rows["triton"]["us"])
    assert bench_attention.draw(run.rows, 64, "forward", tmp_path / "a.png")
    with pytest.raises(ValueError, match="triton '65': expected some of"):
        bench_attention.BenchConfig(triton="65")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("how", ["raises", "is wrong", "is right"])
def test_attention_that_triton_cannot_do_costs_the_others_nothing(how, backward, monkeypatch, tmp_path):
    def ours(shape, step, backward_step, kernels="cuda"):
        def run(q, k, v):
            if kernels == "triton" and how == "raises":
                raise OutOfResources(300_000, 232_448, "shared memory")
            return q * k * v * (3 if kernels == "triton" and how == "is wrong" else 1)

        return run

    compare, operands = timing.compare, attention.operands
    monkeypatch.setattr(attention, "ours", ours)
    monkeypatch.setattr(attention, "operands", lambda shape, device: operands(shape, "cpu"))
    monkeypatch.setattr(attention, "peers", lambda *_: {"peer": lambda q, k, v: q * k * v})
    monkeypatch.setattr(timing, "compare", lambda *a, **k: compare(*a, **k | {"device": "cpu"}))
    config = bench_attention.BenchConfig(rounds=1, forward="9", backward="5", triton="64", out=tmp_path)
    run = bench_attention.Run(config, Budget(1e6))
    run.measure(attention.Shape(64, 8, True, 1, 1), backward)
    ours_of_cuda = "best_05" if backward else "best_09"
    wanted = [ours_of_cuda, "triton", "peer"] if how == "is right" else [ours_of_cuda, "peer"]
    assert [row["step"] for row in run.rows] == wanted and len(run.failures) == (how != "is right")


def test_a_missing_triton_costs_the_matmul_benchmark_one_row(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(products.device, "place", lambda *_, **__: 1 / 0)
    operands, failures = products.Operands(products.Shape(16, 16, 16), torch.bfloat16, 1, "cpu"), []
    good = ladder.sound(
        [products.triton_product(torch.bfloat16), products.torch_product(torch.bfloat16)], operands, failures
    )
    assert [one.name for one in good] == ["cuBLAS"] and failures == ["triton at 16: division by zero"]


def test_triton_is_no_peer_of_the_matmul_benchmark(monkeypatch):
    monkeypatch.setattr(products, "our_step", lambda step, shape: Competitor(step, products.dtype_of(step), None))
    monkeypatch.setattr(products, "triton_product", lambda dtype: Competitor("triton", dtype, None))
    shape = products.Shape(64, 72, 40)
    for wanted, last in ((True, ["best_16", "triton"]), (False, ["best_16"])):
        run = bench_matmul.Run(bench_matmul.BenchConfig(triton=wanted), Budget(1.0), ["naive_01", "best_16"], 1, "cpu")
        assert [one.name for one in run.ours(shape, torch.bfloat16)] == last
        assert run.ours(shape, torch.float32) == []
    rows = [
        {"step": step, "us": us, "dtype": "bfloat16"}
        for step, us in (("best_16", 2.0), ("triton", 1.0), ("cuBLAS", 4.0))
    ]
    ladder.add_ratios(rows)
    assert [row["of_cublas"] for row in rows] == [2.0, 4.0, 1.0]


# ---- the oldest Triton -----------------------------------------------------------------------------------------------


def test_make_tests_the_oldest_triton_too():
    def planned(*arguments):
        environment = {
            key: value for key, value in os.environ.items() if key not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")
        }
        command = ["make", "-n", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    plan = planned("-o", ".venv/.ready", "test-triton-oldest")
    assert "triton==3.6.0" in plan and re.search("-m pytest .*tests/cuda -k triton", plan)
    assert "skipped" in planned("test-triton-oldest", f"PYTHON={sys.executable}")
    lowest = re.search(r'"triton>=([\d.]+),<([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert f"{lowest[1]}.0" == "3.6.0"
    low, high = (tuple(map(int, version.split("."))) for version in lowest.groups())
    assert low <= tuple(map(int, triton.__version__.split(".")[:2])) < high
