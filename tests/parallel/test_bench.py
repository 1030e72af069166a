"""The benchmark: a quick run has all rows, the clock counts what is sent, and wrong contestants are not timed."""

import json
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from common.dist import spawn
from common.tables import rewrite_text
from minigpt.config import GPTConfig
from parallel import bench_collectives, bench_one, bench_peers
from parallel.bench import BenchConfig, on_cpu
from parallel.bench_contest import QUICK, Contestant, check, one_process
from parallel.bench_layouts import GROUPS
from parallel.bench_rounds import alternate, ratio

README = """
<!-- table: parallel/steps columns="group,case,step_ms:.1f,vs_torch:.2f,sent_mb:.2f,formula_mb:.2f" where="ranks=2" -->
<!-- /table -->
<!-- table: parallel/collectives columns="collective,size,algorithm,ours_us:.0f,torch_us:.0f,vs_torch:.2f" -->
<!-- /table -->
"""


def test_a_quick_run_has_all_rows(tmp_path):
    config = BenchConfig(quick=True, rounds=2, more_ranks=0, out=tmp_path / "results")
    steps, collectives = (json.loads(path.read_bytes())["rows"] for path in on_cpu(config))
    assert [(row["group"], row["case"]) for row in steps] == [(g, e.name) for g, es in GROUPS.items() for e in es]
    sizes = bench_collectives.QUICK_SIZES
    wanted = [(name, size) for name in ("all_reduce", "reduce_scatter", "all_gather") for size in sizes]
    assert [(row["collective"], row["bytes"]) for row in collectives] == wanted
    for row in steps:
        assert row["ranks"] == 2 and len(row["samples"]["raw"]) == len(row["sent_bytes"]) == 2
        assert row["step_ms"] > 0 and 0 <= row["gradient_error"] <= 1e-4
        assert (row["vs_torch"] is None) == row["case"].startswith("torch")
    # Headers come on top; what else talks on the loopback is taken off by an empty round, at times too much of it.
    assert statistics.median(row["vs_formula"] for row in steps) >= 1
    for row in collectives:
        assert row["ours_sent"] >= row["ours_formula"] and row["torch_sent"] >= row["torch_formula"]
    text = rewrite_text(README, tmp_path / "README.md", tmp_path)
    assert text.count("torch DDP") == 1 and text.count("all_reduce") == len(sizes)


def test_contestants_beside_exist():
    for entries in GROUPS.values():
        names = [entry.name for entry in entries]
        assert all(entry.beside is None or entry.beside in names for entry in entries)
        assert len(set(names)) == len(names)


def refused(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def doubled(good: Contestant) -> Contestant:
    return replace(good, found=lambda: [(name, 2 * g, piece) for name, g, piece in good.found()])


def lost(good: Contestant) -> Contestant:
    return replace(good, found=lambda: list(good.found())[1:])


def without_gradient(good: Contestant) -> Contestant:
    return replace(good, found=lambda: [(n, None if "norm" in n else g, piece) for n, g, piece in good.found()])


def nan_on_one_rank(good: Contestant) -> Contestant:
    factor = float("nan") if dist.get_rank() == 1 else 1.0
    return replace(good, found=lambda: [(name, factor * g, piece) for name, g, piece in good.found()])


def standing_still(good: Contestant) -> Contestant:
    return replace(good, apply=lambda: None)


def another_loss(good: Contestant) -> Contestant:
    return replace(good, gradients=lambda: good.gradients() * 1.001)


BROKEN = {
    doubled: "a gradient of", lost: "no whole gradient of embedding.weight", nan_on_one_rank: "nan off",
    without_gradient: "no whole gradient of blocks.0.attention_norm.weight", standing_still: "in step 1",
    another_loss: "in step 0",
}  # fmt: skip


def checks_of_rank(rank: int, ranks: int) -> tuple[dict[str, str], float, str, str]:
    torch.set_num_threads(1)
    truth = one_process(QUICK)
    messages = {b.__name__: refused(lambda b=b: check("it", b(bench_peers.ddp(QUICK)), truth)) for b in BROKEN}
    right = check("it", bench_peers.ddp(QUICK), truth)
    x = torch.ones(4)
    different = refused(lambda: bench_collectives.check("sum", x + (rank == 1), x))
    return messages, right, different, refused(lambda: bench_collectives.check("sum", x + float("nan"), x))


def rounds_of_rank(rank: int, ranks: int) -> tuple[list[str], dict]:
    called, message = [], torch.zeros(1 << 20)

    def talk() -> None:
        called.append("talk")
        (dist.send if rank == 0 else dist.recv)(message, 1 - rank)

    found = alternate({"talk": talk, "rest": lambda: called.append("rest")}, rounds=3, warmup=1, inner=2)
    return called, found


def both(rank: int, ranks: int):
    return checks_of_rank(rank, ranks), rounds_of_rank(rank, ranks)


def test_wrong_contestants_are_not_timed_and_the_clock_counts():
    for (messages, right, different, nan), (called, found) in spawn(both, 2):
        for broken, words in BROKEN.items():
            assert "nothing was timed" in messages[broken.__name__] and words in messages[broken.__name__]
        assert 0 <= right < 1e-5
        assert "sum is not torch's" in different and "sum is not torch's" in nan
        assert called == ["talk", "rest"] + ["talk", "talk", "rest", "rest"] * 3  # warm-up, then rounds by turns
        assert found["talk"].times.inner == 2 and len(found["talk"].times.raw) == len(found["talk"].sent) == 3
        assert 1.0 <= found["talk"].bytes / (4 * (1 << 20) / 2) < 1.01  # one of two ranks sends
        assert abs(found["rest"].bytes) < 1e3
        assert ratio(found["talk"], found["talk"]) == 1 and ratio(found["talk"], found["rest"]) > 1


SMALL = GPTConfig(vocab_size=48, context=8, layers=2, width=16, heads=2, kv_heads=1, mlp_width=24)


def test_a_world_of_one():
    rows = bench_one.bench_one(SMALL, 2, 1, torch.device("cpu"), torch.float32)
    assert [row["case"] for row in rows] == ["FSDP", "tensor parallelism", "plain"]
    assert rows[-1]["over_plain"] == 0 and all(row["step_ms"] > 0 for row in rows)
    good = torch.tensor([3.0, 100.0])
    for wrong in (good * torch.tensor([1.01, 1.0]), good + float("nan")):
        with pytest.raises(ValueError, match="check failed, nothing was timed: loss and gradient norm of FSDP"):
            bench_one.check_all({"FSDP": wrong, "plain": good}, 1e-3)


@pytest.mark.parametrize("field, value", [("ranks", 3), ("ranks", 0), ("more_ranks", 1), ("rounds", 0), ("batch", 0)])
def test_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} {value}"):
        BenchConfig(**{field: value})
