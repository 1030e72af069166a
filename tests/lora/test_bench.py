"""The benchmark: a quick run has all rows and files; what differs from its peer is not timed."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from common import timing
from common.cli import UserError
from common.tables import rewrite_text
from lora import bench, bench_nf4, bench_train
from lora.bench_config import BenchConfig, peer
from lora.bench_train import Side
from lora.lora import adapter_parameters

QUICK = BenchConfig(device="cpu", quick=True, rounds=1, compile=False)
README = """
<!-- table: lora/train columns="model,targets,dtype,by,how,step_ms:.1f,vs_peft:.2f,held_mb:.1f,step_mb:.1f" -->
<!-- /table -->
<!-- table: lora/nf4 columns="matrix,format,tokens,passes,by,us:.0f,vs_bitsandbytes:.2f,vs_unpacked:.2f" -->
<!-- /table -->
"""


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Times mean nothing here."""
    monkeypatch.setattr(timing, "SETTLE_S", 0.0)
    monkeypatch.setattr(timing, "SAMPLE_S", 0.0)


def run(monkeypatch, out: Path, *arguments: str) -> dict[str, list[dict]]:
    """{part: rows of its file}."""
    options = ("--device", "cpu", "--quick", "--rounds", "1", "--no-compile", "--out", str(out))
    monkeypatch.setattr(sys, "argv", ["bench", *options, *arguments])
    bench.main()
    files = [json.loads(path.read_bytes()) for path in (out / "lora").glob("*.json")]
    return {file["name"]: file["rows"] for file in files}


def test_a_quick_run_has_all_rows(monkeypatch, tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "results"
    monkeypatch.setitem(bench.PARTS, "multi", lambda config: [{"case": "one", "quick": config.quick}])
    found = run(monkeypatch, out)
    assert set(found) == {"train", "nf4", "multi"} and found["multi"] == [{"case": "one", "quick": True}]
    cases = [case.said() for case in bench_train.cases(QUICK)]
    assert len(cases) == 2 * 2 * 2  # models, dtypes, targets
    rows = found["train"]
    assert [{key: row[key] for key in cases[0]} for row in rows[::2]] == cases
    assert [(row["by"], row["how"]) for row in rows] == [("ours", "eager"), ("PEFT", "eager")] * len(cases)
    for row in rows:
        limits = bench_train.LOSS_TOLERANCE, bench_train.GRADIENT_TOLERANCE
        for key, limit in zip(("loss_error", "gradient_error"), limits, strict=True):
            assert 0 <= row[key] <= limit[getattr(torch, row["dtype"])]
        assert row["step_ms"] > 0 and row["held_mb"] > 0 and row["step_mb"] > 0
        assert (row["vs_peft"] is None) == (row["by"] == "PEFT")
    text = rewrite_text(README, tmp_path / "README.md", tmp_path)
    assert text.count("PEFT") == len(cases) and "torch, unpacked" in text
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("train_", "nf4_", "multi_"))


def gpt2() -> bench_train.Case:
    return next(bench_train.cases(QUICK))


@pytest.fixture
def sides() -> dict[str, Side]:
    pytest.importorskip("peft")
    return bench_train.pair(gpt2())


def first_adapter(side: Side) -> torch.nn.Parameter:
    return next(p for p in side.model.parameters() if p.requires_grad)


def scaled(ours: Side) -> Side:
    with torch.no_grad():
        first_adapter(ours).mul_(1.5)
    return ours


def nan_gradient(ours: Side) -> Side:
    first_adapter(ours).register_hook(lambda gradient: gradient * float("nan"))
    return ours


def doubled_gradient(ours: Side) -> Side:
    first_adapter(ours).register_hook(lambda gradient: gradient * 2)
    return ours


def lost(ours: Side) -> Side:
    return replace(ours, named=lambda: dict(list(ours.named().items())[1:]))


def another_loss(ours: Side) -> Side:
    return replace(ours, loss=lambda *batch: ours.loss(*batch) + 0.01)


BROKEN = {
    scaled: "differ|off", nan_gradient: "lora_A.default.weight is nan off", doubled_gradient: "is 1 off",
    lost: "lora_A.default.weight are on one side only", another_loss: "the losses .* differ",
}  # fmt: skip


@pytest.mark.parametrize("broken, words", BROKEN.items())
def test_a_side_that_differs_is_not_timed(sides, broken: Callable[[Side], Side], words: str):
    assert bench_train.check(**sides_of(sides))["gradient_error"] <= 1e-5
    with pytest.raises(ValueError, match=f"{words}.*nothing was timed"):
        bench_train.check(broken(sides["ours"]), sides["PEFT"])


def sides_of(sides: dict[str, Side]) -> dict[str, Side]:
    return {"ours": sides["ours"], "theirs": sides["PEFT"]}


def test_steps_stay_where_they_are_and_bytes_are_those_of_the_tensors(sides):
    for side in sides.values():
        first, second = side.step(), side.step()
        assert torch.allclose(first, second, rtol=1e-6, atol=0) and second.isfinite()
        assert all(p.grad is None for p in side.model.parameters())
    ours = sides["ours"]
    trained = adapter_parameters(ours.model)
    moments = sum(8 * p.numel() + 4 for p in trained)  # two, and a float32 that counts the steps
    assert ours.held_bytes() == 4 * ours.model.num_parameters() + moments  # num_parameters has the adapter too
    assert sides["PEFT"].held_bytes() - ours.held_bytes() == -4 * 2 * 2  # two counters fewer a layer: one B of c_attn
    B, T = ours.case.shape
    logits = 4 * B * T * ours.case.gpt.vocab_size
    few = bench_train.step_bytes(ours)
    assert few > 2 * logits  # and their logarithms
    more = next(side for side in bench_train.pair(replace(ours.case, shape=(2 * B, T))).values())
    more.step()
    assert 1.8 * few < bench_train.step_bytes(more) <= 2 * few + 100


def test_compiled_sides_compute_the_same(monkeypatch, sides):
    """By torch's tracer alone, without its compiler, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = [side.gradients()[0] for side in sides.values()]
    compiled = {name: side.compiled() for name, side in sides.items()}
    bench_train.check(compiled["ours"], compiled["PEFT"])
    assert torch.allclose(torch.stack(plain), torch.stack([side.step() for side in compiled.values()]), rtol=1e-6)


def test_which_cases_are_compiled():
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        on = [case for case in bench_train.cases(BenchConfig(device=device)) if case.compiled]
        assert [(c.model, c.targets, c.dtype) for c in on] == [(bench_train.COMPILED[device], "all-linear", dtype)]
        assert not any(case.compiled for case in bench_train.cases(BenchConfig(device=device, compile=False)))


def test_nf4_that_is_wrong_is_not_timed(monkeypatch):
    problem = next(bench_nf4.problems(QUICK))
    good = bench_nf4.layers(problem)

    def wrong(_) -> dict[str, torch.nn.Module]:
        good["ours"].absmax.mul_(1.1)
        return good

    monkeypatch.setattr(bench_nf4, "layers", wrong)
    with pytest.raises(ValueError, match="check failed, nothing was timed: the results of ours"):
        bench_nf4.measure(problem, 1)


def test_nf4_without_bitsandbytes(monkeypatch, capsys):
    monkeypatch.setattr(bench_nf4, "installed", lambda name: False)
    rows = list(bench_nf4.rows(QUICK))
    assert "bitsandbytes is not installed" in capsys.readouterr().out
    assert {row["by"] for row in rows} == {"ours", "torch, unpacked"}
    assert all(row["vs_bitsandbytes"] is None and row["vs_unpacked"] > 0 for row in rows)
    assert rows[0]["weight_mb"] == (64 * 128 / 2 + 4 * 128 + 64) / 1e6  # nibbles, a scale for 64 of them, the table


def test_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="rounds 0: expected at least 1"):
        BenchConfig(rounds=0)
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    with pytest.raises(UserError, match="peft does not import .*: expected it for the comparison, pip install peft"):
        peer("peft")
    with pytest.raises(UserError, match="peft does not import"):
        run(monkeypatch, tmp_path, "--what", "train")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    pytest.importorskip("peft")
    config = replace(QUICK, device="cuda")
    for case in bench_train.cases(config):
        for row in bench_train.measure(case, 1):
            assert row["step_ms"] > 0 and row["step_mb"] > 0
    assert {"ours", "ours, torch"} <= {row["by"] for row in bench_nf4.rows(config)}
