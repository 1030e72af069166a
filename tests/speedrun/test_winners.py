"""Which kernels win: made-up times in files that the benchmarks' own code writes, and what a race takes from them."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import results
from common.cli import UserError
from common.timing import Samples
from cuda import bench_attention, bench_fused
from cuda.measure import fused, ladder
from cuda.measure.attention import Shape
from cuda.measure.fused import Case
from cuda.measure.ladder import Budget
from cuda.measure.products import Shape as Product
from speedrun import winners
from speedrun.config import RaceConfig
from speedrun.model import parts
from speedrun.winners import Choice, Row, choose, measured, named, table

H100 = "nvidia-h100-80gb-hbm3"
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
CONFIG = RaceConfig(heads=4, kv_heads=2, width=512, mlp_width=1536, context=1100, batch=8, compile=True)
# Seconds: attention forward and backward, fused operations, products.
ATTENTION = {
    (128, 1024): ({"best_09": 2, "wgmma_04": 1, "triton": 3, "torch flash": 5, "cuDNN": 4},
                  {"best_05": 5, "wgmma_03": 1, "triton": 3, "torch flash": 4, "cuDNN": 6}),
    (128, 4096): ({"best_09": 9, "triton": 9, "cuDNN": 1}, {"best_05": 9, "triton": 9, "cuDNN": 1}),
    (64, 1024): ({"best_09": 9, "cuDNN": 8, "flash_attn_interface": 1}, {"best_05": 9, "cuDNN": 8}),
}  # fmt: skip
OPERATIONS = {
    "rms_norm": {"ours": 5, "triton": 4, "torch.compile": 6, "torch": 20},
    "swiglu": {"ours": 5, "triton": 7, "torch.compile": 4.5, "torch": 20},
    "rotary": {"ours": 3, "triton": 4, "torch.compile": 5, "torch": 9},
    "embedding": {"ours": 9, "torch.compile": 8, "torch": 7},
    "adamw": {"ours": 5, "triton": 6, "torch": 7},
}
HEAD = {"ours": 8, "triton": 7, "torch": 9}
PRODUCTS = {"mma_sync_08": 1, "best_16": 5, "triton": 9, "cuBLAS": 4, "cublasLt, best of 8": 3}


@pytest.fixture
def filed(tmp_path, monkeypatch) -> Path:
    """The three files of an H100, by the code that writes them there; only the clock is made up."""
    monkeypatch.setattr(results, "device_name", lambda device="cpu": H100)
    monkeypatch.setattr(winners, "device_name", lambda device="cpu": H100)
    write_attention(tmp_path, monkeypatch)
    write_fused(tmp_path, monkeypatch)
    write_products(tmp_path)
    return tmp_path


def clock(monkeypatch, times: dict) -> None:
    monkeypatch.setattr(
        "common.timing.compare", lambda functions, **_: {name: Samples((1e-6 * times[name],), 1) for name in functions}
    )


def write_attention(root: Path, monkeypatch) -> None:
    run = bench_attention.Run(bench_attention.BenchConfig(out=root), Budget(1.0))
    for (width, tokens), both in ATTENTION.items():
        for kind, times in zip(("forward", "backward"), both, strict=True):
            clock(monkeypatch, times)
            run.keep(Shape.of(width, tokens, True), kind, dict.fromkeys(times))
            clock(monkeypatch, dict.fromkeys(times, 100))  # without a mask: nobody asks
            run.keep(Shape.of(width, tokens, False), kind, dict.fromkeys(times))
    results.save_result("cuda", "attention", run.rows, config={}, device="cuda", root=root)


def write_fused(root: Path, monkeypatch) -> None:
    config, rows = bench_fused.BenchConfig(), []
    for name, times in OPERATIONS.items():
        clock(monkeypatch, times)
        monkeypatch.setattr(bench_fused, "competitors", lambda *_, times=times: dict.fromkeys(times))
        for backward in (False, True)[: 1 if name == "adamw" else 2]:
            rows += bench_fused.measure(Case(name, (), None, None, 8, backward), config, 1.0, [])
    clock(monkeypatch, HEAD)
    monkeypatch.setattr(fused, "loss_of_a_head", lambda *_: {name: lambda: None for name in HEAD})
    monkeypatch.setattr(bench_fused, "compiles", lambda what, make, *_: {"triton": make()})
    for name in ("empty_cache", "memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3)
    rows += bench_fused.measure_head(config, [])
    results.save_result("cuda", "fused", rows, config={}, device="cuda", root=root)


def write_products(root: Path) -> None:
    rows = []
    for shape, factor in ((Product(8192, 3072, 768), 1), (Product(512, 512, 512), 0.01)):
        for regime in ("burst", "sustained"):
            for name, us in PRODUCTS.items():
                operands = SimpleNamespace(shape=shape, dtype=torch.bfloat16)
                slower = 100 if regime == "sustained" and name == "cuBLAS" else 1
                rows.append(ladder.row_of(name, operands, Samples((1e-6 * us * factor * slower,), 1), regime, 0.0))
        rows.append(
            ladder.row_of("cuBLAS", SimpleNamespace(shape=shape, dtype=torch.float32), Samples((1.0,), 1), "burst", 0.0)
        )
    results.save_result("cuda", "matmul", rows, config={}, device="cuda", root=root)


def everything_runs(monkeypatch, but: str = "") -> None:
    monkeypatch.setattr(winners, "missing", lambda whose, device: "not built: make native" if whose == but else "")


def test_the_fastest_of_each_part_wins(filed, monkeypatch):
    everything_runs(monkeypatch)
    config = replace(CONFIG, measured=str(filed))
    rows = {row.part: row for row in measured(config, H100, filed)}
    assert dict(rows["attention"].us) == pytest.approx({"torch": 9, "cuda": 7, "triton": 6})
    assert "1024 tokens" in rows["attention"].case
    assert dict(rows["norm"].us) == pytest.approx({"torch": 12, "cuda": 10, "triton": 8})
    assert dict(rows["embedding"].us) == pytest.approx({"torch": 16, "cuda": 18}), "Triton's failed there"
    choice, note = choose(config, CUDA, torch.bfloat16)
    assert choice == Choice("triton", "torch", "triton", "cuda", "torch", "torch", "cuda")
    assert note.startswith("kernels: attention triton, norm triton, rotary cuda, adamw cuda; the rest torch (measured")
    assert choose(replace(config, fused_loss=True), CUDA, torch.bfloat16)[0].loss == "triton"
    eager = {row.part: row for row in measured(replace(config, compile=False), H100, filed)}
    assert eager["activation"].winner() == "cuda", "without the compiler torch itself is slower"
    assert eager["norm"].us["torch"] == pytest.approx(40)


@pytest.mark.parametrize(
    "changes", [{"documents": True}, {"windows": "128,256"}, {"window": 128}], ids=["documents", "windows", "window"]
)
def test_what_hides_more_costs_torch_a_mask(filed, monkeypatch, changes):
    """Torch wins at 4,096 tokens, but not where it computes every score: 100 and 100 us without a mask."""
    everything_runs(monkeypatch)
    config = replace(CONFIG, measured=str(filed), context=4096)
    assert choose(config, CUDA, torch.bfloat16)[0].attention == "torch"
    config = replace(config, **changes)
    (row,) = (row for row in measured(config, H100, filed) if row.part == "attention")
    assert dict(row.us) == pytest.approx({"torch": 200, "cuda": 18, "triton": 18})
    assert choose(config, CUDA, torch.bfloat16)[0].attention == "cuda"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"rows": [3]}', '{"rows": 3}', '{"rows": [{"step": "cuBLAS"}]}'])
@pytest.mark.parametrize("name", ["attention", "fused", "matmul"])
def test_a_damaged_file_of_times_is_named(filed, name, content):
    (path,) = (filed / "cuda").glob(f"{name}_*.json")
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path.name}: damaged: expected JSON with rows of .*us; cuda.bench_{name}"):
        measured(CONFIG, H100, filed)


def test_products_go_by_the_nearest_measured_one(filed):
    row = next(row for row in measured(CONFIG, H100, filed) if row.part == "linear")
    flops = sum(m * n * k for m, n, k in winners.products(CONFIG)) / CONFIG.layers
    assert flops == 8 * 1100 * 512 * (2 * 512 + 2 * 256 + 3 * 1536)
    assert row.us["torch"] == pytest.approx(4 * CONFIG.layers * flops / (8192 * 3072 * 768))
    assert row.us["cuda"] == pytest.approx(1.25 * row.us["torch"]) and row.winner() == "torch"


def test_what_was_not_measured_is_torchs(filed, tmp_path, monkeypatch):
    everything_runs(monkeypatch)
    config = replace(CONFIG, measured=str(filed))
    narrow = replace(config, heads=8, kv_heads=8)  # 64 wide: ours is slower, others' package is no way to torch's
    assert choose(narrow, CUDA, torch.bfloat16)[0].attention == "torch"
    odd = replace(config, head_width=96)
    assert "attention" not in {row.part for row in measured(odd, H100, filed)}
    assert choose(odd, CUDA, torch.bfloat16)[0].attention == "torch"
    assert choose(config, CUDA, torch.float32)[1] == "kernels: torch (float32 was not measured)"
    nowhere = replace(config, measured=str(tmp_path / "nowhere"))
    assert choose(nowhere, CUDA, torch.bfloat16)[0] == Choice()
    assert f"(nothing measured of {H100} in" in choose(nowhere, CUDA, torch.bfloat16)[1]
    monkeypatch.setattr(winners, "device_name", lambda device="cpu": "nvidia-h200")
    assert "(nothing measured of nvidia-h200 in" in choose(config, CUDA, torch.bfloat16)[1]


def test_auto_falls_back_from_kernels_that_are_not_there_and_says_so(filed, monkeypatch):
    config = replace(CONFIG, measured=str(filed), fused_loss=True)
    everything_runs(monkeypatch, but="triton")
    choice, note = choose(config, CUDA, torch.bfloat16)
    assert (choice.attention, choice.norm, choice.loss) == ("cuda", "cuda", "cuda")
    assert note.endswith("; triton: not built: make native)")
    with pytest.raises(UserError, match="kernels triton: not built: make native"):
        choose(replace(config, kernels="triton"), CUDA, torch.bfloat16)
    monkeypatch.setattr(winners, "missing", lambda whose, device: "not built")
    assert choose(replace(config, fused_loss=False), CUDA, torch.bfloat16)[0] == Choice()
    with pytest.raises(UserError, match="fused_loss: not built"):
        choose(config, CUDA, torch.bfloat16)


def test_names_count_for_themselves(filed, monkeypatch):
    everything_runs(monkeypatch)
    config = replace(CONFIG, measured=str(filed), kernels="torch")
    assert choose(config, CUDA, torch.bfloat16)[0] == Choice(attention="triton")
    config = replace(config, kernels="cuda", attention="torch", fused_loss=True)
    assert choose(config, CUDA, torch.bfloat16)[0] == Choice("torch", *6 * ["cuda"], loss="cuda") == named(config)


def test_a_cpu_takes_torchs_without_looking(monkeypatch):
    monkeypatch.setattr(winners, "rows_of", None)
    assert choose(CONFIG, CPU, torch.bfloat16) == (Choice(), "kernels: torch")
    assert parts(CONFIG, Choice()) == {}


def test_the_newest_file_counts_and_ties_are_torchs(filed):
    newest = sorted((filed / "cuda").glob("fused_*"))[0]
    later = newest.with_name(newest.name[:-15] + "2999-01-01.json")
    later.write_text(newest.read_text().replace('"by": "torch.compile"', '"by": "nobody"'))
    rows = {row.part: row for row in measured(CONFIG, H100, filed)}
    assert rows["norm"].us["torch"] == pytest.approx(40)
    assert Row("x", "", {"torch": 1.0, "cuda": 1.0}).winner() == "torch"
    assert Row("x", "", {"cuda": 1.0}).winner() == "torch", "nothing to compare with"


def test_the_table_has_all_devices(filed, tmp_path):
    for path in list((filed / "cuda").glob("*.json")):
        path.with_name(path.name.replace(H100, "nvidia-h200")).write_text(path.read_text())
    (filed / "cuda" / "fused_counters_amd-epyc-2threads_2026-01-01.json").write_text("{}")
    lines: list[str] = []
    table(CONFIG, filed, lines.append)
    text = "\n".join(lines)
    assert lines[0].startswith("CPU: torch") and text.count(H100) == 1 and text.count("nvidia-h200") == 1
    assert "epyc" not in text
    (attention,) = {line for line in lines if line.startswith("attention")}
    assert attention.split()[-4:] == ["9.0", "7.0", "6.0", "triton"]
    lines.clear()
    table(CONFIG, tmp_path / "nothing", lines.append)
    assert len(lines) == 2 and lines[1].startswith("no GPU is measured in")
