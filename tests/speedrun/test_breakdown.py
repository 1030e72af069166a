"""Parts of a step on a clock of our own, communication between real ranks, FLOPs counted by torch."""

import json
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.dist import World, spawn
from common.log import read_jsonl
from minigpt.model import short_attention
from minigpt.optim import orthogonalize
from parallel.mesh import Layout, Mesh
from speedrun import breakdown as module
from speedrun import summary
from speedrun.breakdown import BreakdownConfig, breakdown, bytes_moved, bytes_of, flops_of, polar_flops, table
from speedrun.config import RaceConfig
from speedrun.loss import loss_of
from speedrun.model import build
from speedrun.optim import Muon
from speedrun.presets import PRESETS
from speedrun.schedule import plan
from speedrun.spent import OTHER, PARTS, Spent, TimedComm, mean_ms, parts_as_lines
from speedrun.state import Run
from speedrun.train import race
from speedrun.winners import Choice

ALONE = World(0, 1, 0, torch.device("cpu"), None)
SMALL = {"layers": 3, "width": 16, "heads": 2, "kv_heads": 2, "mlp_width": 24, "context": 16, "eval_stride": 8}


# -- the stack --
class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_moment_belongs_to_the_innermost_part():
    clock = Clock()
    spent = Spent(clock=clock)

    def passes(seconds: float) -> None:
        clock.now += seconds

    with spent("forward"):
        passes(1000.0)  # before `begin`: forgotten
    spent.begin()
    passes(1.0)
    with spent("data"):
        passes(2.0)
    with spent("optimizer"):
        passes(4.0)
        with spent("communication"):
            passes(8.0)
            with spent("optimizer"):
                passes(16.0)
        passes(32.0)
        with pytest.raises(RuntimeError), spent("communication"):
            passes(64.0)
            raise RuntimeError
    with spent(None):
        passes(128.0)
        with spent("forward"):
            passes(256.0)
    passes(512.0)
    wanted = {"data": 2.0, "forward": 0.0, "backward": 0.0, "optimizer": 52.0, "communication": 72.0, "other": 513.0}
    assert spent.take() == wanted
    passes(1.0)
    assert spent.take() == dict.fromkeys((*PARTS, OTHER), 0.0) | {"other": 1.0}, "take begins anew"


def test_what_is_no_part():
    with pytest.raises(ValueError, match="part 'forwards': expected one of data, forward"), Spent()("forwards"):
        pass


# -- communication --
SLEEP = 0.3


def late_peer(rank: int, world_size: int) -> list[dict[str, float]]:
    """Rank 1 comes late to a blocking call, and then to one that rank 0 only waits for at the end."""
    spent = Spent()
    comm = TimedComm(Mesh(Layout(dp=world_size), rank, world_size).group("dp"), spent)
    comm.barrier()
    found, x = [], torch.full((4,), float(rank + 1))
    for overlap in (False, True):
        comm.barrier()
        spent.begin()
        if rank:
            time.sleep(SLEEP)
        with spent("optimizer"):
            work = comm.all_reduce(x, async_=overlap)
            if overlap:
                time.sleep(SLEEP / 3)
            work.wait()
            work.wait()  # twice is fine
        found.append(spent.take())
        assert x.tolist() == [3.0] * 4
        x.fill_(float(rank + 1))
    return found


def test_waiting_for_a_late_peer_is_communication():
    of_rank0, of_rank1 = spawn(late_peer, 2)
    blocking, overlapping = of_rank0
    assert blocking["communication"] >= 0.8 * SLEEP
    assert overlapping["optimizer"] >= SLEEP / 3, "what overlaps is work"
    assert overlapping["communication"] >= 0.4 * SLEEP, "the wait that is left, in call or wait"
    assert all(row["other"] >= SLEEP for row in of_rank1), "it slept outside of all parts"


def test_a_group_of_one_spends_nothing_on_communication():
    spent = Spent(clock=Clock())
    comm = TimedComm(Mesh(Layout(), 0, 1).group("dp"), spent)
    comm.all_reduce(torch.ones(3), async_=True).wait()
    assert not spent._marks


# -- FLOPs --
def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def a_run(**changes) -> Run:
    config = RaceConfig(**SMALL | changes)
    model = build(config, 50)
    for block in model.blocks:
        block.attention.attention_fn = lambda q, k, v, **_: short_attention(q, k, v)  # as products, all T x T of them
    comm = TimedComm(Mesh(Layout(), 0, 1).group("dp"), Spent())
    run = Run(config, ALONE, comm, None, model, torch.float32, Choice(), None, Spent())
    run.forward = loss_of(model, config, run.dtype, ALONE.device)
    matrices = [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and "embedding" not in name]
    run.muon = Muon(matrices, dtype=torch.float32, comm=run.comm)
    return run


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"kv_heads": 1}, {"mlp": "relu2"}])
def test_flops_are_the_products_that_torch_counts(changes):
    run = a_run(batch=3, **changes)
    tokens = torch.randint(50, (2, 3, 16))
    now = plan(0, run.config)
    flops = flops_of(run, now)
    losses = []
    assert counted(lambda: losses.append(run.forward(*tokens, now.mtp)[0])) == flops["forward"]
    assert counted(losses[0].backward) == flops["backward"]
    total = run.model.num_flops_per_token(16) * tokens[0].numel()
    assert flops["forward"] + flops["backward"] == total
    head = 2 * tokens[0].numel() * run.model.config.vocab_size * 16
    assert flops["forward"] - 2 * head == total // 3, "the head's gradients are computed ahead, else it is 1 to 2"
    assert counted(run.muon.step) == flops["optimizer"]


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (9, 5), (8, 8)])
def test_flops_of_a_polar_factor(shape):
    g = torch.randn(1, *shape)
    assert counted(lambda: orthogonalize(g, torch.float32)) == polar_flops(*shape)


def test_bytes_by_hand():
    run = a_run()
    n = run.model.num_parameters()
    assert bytes_of(run) == {"weights": 4 * n, "gradients": 4 * n, "states": 0}
    assert bytes_moved({"weights": 10, "gradients": 20, "states": 7}, ranks=2) == 20 + 20 + 10 + 10 + 14


# -- the table --
def test_the_parts_add_up_to_the_step():
    rows = [dict(zip((*PARTS, OTHER), values, strict=True)) for values in ([1, 2, 3, 4, 5, 6], [3, 2, 1, 0, 1, 0])]
    *parts, step = table(rows, {"forward": 10, "backward": 20, "optimizer": 12}, 100.0, 50.0, 25.0)
    assert [row["ms"] for row in parts] == [2e3, 2e3, 2e3, 2e3, 3e3, 3e3] and step["ms"] == 14e3
    assert abs(sum(row["share"] for row in parts) - 1) <= 1e-12 and step["share"] == 1
    assert sum(row["flops"] for row in parts) == step["flops"] == 42
    assert parts[1]["flops_per_s"] == 5.0 and parts[2]["of_peak"] == 0.1
    assert abs(step["mfu"] - 30 / 14 / 100) <= 1e-12
    assert abs(step["perfect_matmul_ms"] - 420) <= 1e-9 and abs(step["perfect_memory_ms"] - 500) <= 1e-9
    assert step["samples_ms"] == [21e3, 7e3]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text("".join(f"def f{n}(x):\n    return x + {n * n}\n" for n in range(1500)))
    return path


@pytest.fixture
def tiny(text, monkeypatch) -> RaceConfig:
    """The smoke preset on a small text, in a machine whose ceilings are known."""
    monkeypatch.setattr(module, "gemm_peak", lambda *_: 1e12)
    monkeypatch.setattr(module, "copy_bandwidth", lambda *_: 1e10)
    config = replace(PRESETS["smoke"], corpus=str(text), device="cpu", steps=12, peak_tflops=1.0)
    monkeypatch.setitem(PRESETS, "smoke", config)
    return config


def test_the_file_and_the_picture(tiny, tmp_path):
    rows, (result, picture) = breakdown(BreakdownConfig("smoke", steps=3, out=tmp_path / "out"), ALONE)
    assert picture.read_bytes().startswith(b"\x89PNG")
    saved = json.loads(result.read_text())
    assert saved["config"] | {"preset": "smoke", "steps": 3, "ranks": 1, "device": "cpu"} == saved["config"]
    assert [row["part"] for row in saved["rows"]] == [*PARTS, OTHER, "step"]
    for row in saved["rows"]:
        assert len(row["samples_ms"]) == 3 and {"ms", "share", "flops", "flops_per_s", "of_peak"} <= row.keys()
    *parts, step = saved["rows"]
    assert abs(sum(row["ms"] for row in parts) - step["ms"]) <= 1e-6 * step["ms"]
    assert min(row["ms"] for row in parts if row["part"] in ("forward", "backward", "optimizer")) > 0
    assert step["peak_flops"] == 1e12 and step["bytes_per_s"] == 1e10
    lines = module.as_lines(rows).splitlines()
    assert len(lines) == 1 + len(rows) + 2 and "MFU" in lines[-2] and "a perfect step" in lines[-1]


def test_more_steps_than_there_are(tiny, tmp_path):
    with pytest.raises(ValueError, match="steps 10: expected 1 to 9"):
        breakdown(BreakdownConfig("smoke", steps=10, out=tmp_path / "out"), ALONE)
    with pytest.raises(ValueError, match="preset 'nothing': expected one of"):
        BreakdownConfig("nothing")


def test_each_step_of_a_run_says_where_its_time_went(tiny, tmp_path, monkeypatch):
    run = race(replace(tiny, folder=tmp_path / "run"), ALONE)
    timing = read_jsonl(tmp_path / "run" / "timing.jsonl")
    assert len(timing) == 12
    for row in timing:
        whole = sum(row[f"{part}_ms"] for part in (*PARTS, OTHER))
        assert abs(whole - row["step_ms"]) <= 0.01 * row["step_ms"] + 1
        assert min(row["forward_ms"], row["backward_ms"], row["optimizer_ms"]) > 0 and row["communication_ms"] == 0
    parts = mean_ms(timing)
    monkeypatch.setattr(summary, "machine_peak", lambda *_: 1e12)
    found = summary.summarise(run, 1.0)
    assert found["parts_ms"] == parts and (tmp_path / "run" / "breakdown.png").exists()
    lines = parts_as_lines(parts)
    assert "\n".join(lines) in summary.as_lines(found, run.config)
    assert len(lines) == len(PARTS) + 1
    assert abs(sum(float(line.split()[-1].rstrip("%")) for line in lines) - 100) <= 0.4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_see_the_device():
    spent = Spent("cuda")
    x = torch.randn(4096, 4096, device="cuda")
    spent.begin()
    with spent("forward"):
        for _ in range(20):
            x = x @ x * 1e-3
    seconds = spent.take()
    assert seconds["forward"] >= 20 * 2 * 4096**3 / 2e15, "faster than any device"
