"""Traces: events of all ranks on one clock, lanes, counters against closed formulas and the kernel, the picture."""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from common.cli import UserError
from common.dist import spawn
from parallel.clocks import clock_offset
from parallel.comm import Call, make_comm
from parallel.counters import OURS, Counters, loopback_bytes, table
from parallel.mesh import AXES, Group, Layout, Mesh
from parallel.model import StageGPT, initialise, materialise
from parallel.timeline import draw
from parallel.trace import Tracer, merge, read_traces
from tests.parallel.gpts import SMALL, batch

SHIFT_S = 1000.0
ELEMENTS = 1 << 18


def traced_step(rank, world_size, folder):
    """A forward, a backward and a gradient all-reduce in two buckets at once, on clocks that differ by SHIFT_S."""
    clock = time.perf_counter
    time.perf_counter = lambda: clock() + SHIFT_S * rank
    mesh = Mesh(Layout(fsdp=world_size // 2, tp=2), rank, world_size)
    tracer, counters = Tracer(folder, rank, world_size), Counters()
    world = make_comm(mesh.group(*AXES))
    fsdp, tp = (make_comm(mesh.group(axis), listeners=[tracer, counters]) for axis in ("fsdp", "tp"))
    tracer.align(world, shared=False)
    offset = tracer.offset

    stage = StageGPT(SMALL)
    materialise(stage)
    initialise([stage], SMALL, seed=0)
    tracer.watch([stage])
    tokens_BT, targets_BT = batch(SMALL, 2, seed=rank)
    world.barrier()
    meeting = clock()
    with tracer.span("step 1", number=1):
        with tracer.span("forward"):
            loss = stage(None, tokens_BT, targets_BT)
        tp.all_reduce(torch.ones(ELEMENTS), tag="loss")
        with tracer.span("backward"):
            loss.backward()
        first = fsdp.all_reduce(torch.ones(ELEMENTS), async_=True, tag="bucket 0")
        second = fsdp.all_reduce(torch.ones(ELEMENTS), async_=True, tag="bucket 1")
        first.wait()
        second.wait()
        out = torch.empty(ELEMENTS // 2)
        fsdp.reduce_scatter(torch.ones(ELEMENTS), out)
    counters.step()
    tracer.on = False
    tp.all_reduce(torch.ones(3), tag="not traced")
    with tracer.span("not traced"):
        pass
    tracer.save()
    shared = clock_offset(world)
    return offset.seconds + SHIFT_S * rank, offset.error, meeting, counters.counts, shared.seconds


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    return folder, spawn(traced_step, 4, folder)


def test_clocks_that_differ_are_aligned_within_the_error_that_is_told(traced):
    for rank, (wrong, error, *_, shared) in enumerate(traced[1]):
        assert abs(wrong) <= error + 1e-6 and error < 0.1, rank
        assert (rank == 0) == (error == 0)
        assert shared == 0  # one machine: nothing is estimated


def test_the_merged_trace_has_every_rank_and_lane_on_one_clock(traced):
    folder, _ = traced
    events = json.loads(merge(folder).read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {pid for pid, _ in names} == {0, 1, 2, 3}
    for rank in range(4):
        lanes = {names[rank, tid] for pid, tid in names if pid == rank}
        assert lanes == {"compute", "tp", "fsdp", "fsdp (2)"}  # two buckets under way at once
        mine = [span for span in spans if span["pid"] == rank]
        assert sorted(s["args"]["tag"] for s in mine if names[rank, s["tid"]] != "compute") == [
            "", "bucket 0", "bucket 1", "loss",
        ]  # fmt: skip
    assert min(span["ts"] for span in spans) == 0
    began = [span["ts"] for span in spans if span["name"] == "step 1"]
    assert len(began) == 4 and max(began) - min(began) < 0.2e6  # microseconds; the clocks differ by 1000 s
    loss = [s for s in spans if s["args"].get("tag") == "loss" and s["pid"] < 2]
    ends = [span["ts"] + span["dur"] for span in loss]
    assert max(span["ts"] for span in loss) < min(ends) + 0.1e6  # nobody is done before the last has come
    payload = 4 * ELEMENTS
    assert [(s["args"]["payload"], s["args"]["wire"]) for s in loss] == 2 * [(payload, payload)]


def test_spans_are_nested_and_each_block_has_a_forward_and_a_backward(traced):
    for trace in read_traces(traced[0]):
        spans = {event["name"]: event for event in trace.events if event["lane"] == "compute"}
        blocks = [f"blocks.{layer} {what}" for layer in range(3) for what in ("forward", "backward")]
        assert set(spans) == {"step 1", "forward", "backward", *blocks}
        for name, span in spans.items():
            assert span["began"] <= span["ended"]
            holder = spans[name.split()[-1] if name.startswith("blocks") else "step 1"]
            assert holder["began"] <= span["began"] and span["ended"] <= holder["ended"], name
        order = [f"blocks.{layer} backward" for layer in (2, 1, 0)]
        assert order == sorted(order, key=lambda name: spans[name]["began"])
        for earlier, later in pairwise(order):
            assert spans[earlier]["began"] < spans[earlier]["ended"] == spans[later]["began"] < spans[later]["ended"]


def test_counters_are_the_closed_formulas(traced):
    payload = 4 * ELEMENTS
    for *_, counts, _ in traced[1]:
        got = {key: (count.calls, count.payload, count.wire) for key, count in counts.items()}
        assert got == {
            ("tp", "all_reduce"): (2, payload + 12, payload + 12),  # 2 (W - 1) / W S with W = 2
            ("fsdp", "all_reduce"): (2, 2 * payload, 2 * payload),
            ("fsdp", "reduce_scatter"): (1, payload, payload),  # gloo's is an all-reduce
        }
    counters = Counters(OURS)
    for name, peer in (("reduce_scatter", None), ("all_gather", None), ("send", 1), ("receive", 1)):
        counters.started(Call(name, Group(("tp",), (0, 1, 2, 3), 0), 0, torch.float32, 4 << 20, peer))
    assert [count.wire / (1 << 20) for count in counters.counts.values()] == [3, 3, 4, 0]
    counters.step()
    counters.step()
    lines = counters.table().splitlines()
    assert lines[0] == "mean of a step, one rank"
    assert lines[2].split() == ["tp", "all_gather", "0.5", "2", "MiB", "1.5", "MiB"]
    assert lines[-1].split() == ["all", "2", "8", "MiB", "5", "MiB"]
    assert table({}).splitlines()[-1].split() == ["all", "0", "0", "B", "0", "B"]


def bytes_of_all_reduce(rank, world_size):
    comm = make_comm(Mesh(Layout(dp=world_size), rank, world_size).group("dp"))
    x = torch.ones(1 << 20)
    comm.all_reduce(x)  # connects
    comm.barrier()
    before = loopback_bytes()
    comm.barrier()
    for _ in range(4):
        comm.all_reduce(x)
    comm.barrier()
    return (loopback_bytes() - before) / 4


def test_the_loopback_counter_sees_what_the_formula_says():
    wire = world = 2 * 1 / 2 * (4 << 20) * 2  # 2 (W - 1) / W S, of both ranks
    for _ in range(3):  # others may use the loopback too
        wire = min(spawn(bytes_of_all_reduce, 2))
        if wire < 1.02 * world:
            break
    assert 0.99 * world < wire < 1.02 * world


def test_the_loopback_counter_reads_the_kernels_table(tmp_path):
    table = tmp_path / "dev"
    table.write_text("head\n face |bytes\n    lo: 11 2 0 0 0 0 0 0 77 4 0 0 0 0 0 0\n  eth0: 5 1 0 0 0 0 0 0 9 1 0\n")
    assert loopback_bytes(table) == 77
    table.write_text("eth0: 5 1 0 0 0 0 0 0 9 1 0\n")
    with pytest.raises(ValueError, match="lo"):
        loopback_bytes(table)


def test_the_program_merges_draws_and_counts(traced):
    folder, _ = traced
    command = [sys.executable, "-m", "parallel.trace", "--folder", str(folder), "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fsdp   all_reduce" in done.stdout and "mean of a step" in done.stdout
    picture = (folder / "timeline.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    wrong = subprocess.run([*command[:4], str(folder / "nowhere")], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no trace in" in wrong.stderr and len(wrong.stderr.splitlines()) == 1


def test_recomputation_is_a_span_of_its_own(tmp_path):
    tracer = Tracer(tmp_path, 0, 1)
    stage = StageGPT(SMALL)
    materialise(stage)
    initialise([stage], SMALL, seed=0)
    stage.run_block = checkpointed
    handles = tracer.watch([stage])
    stage(None, *batch(SMALL, 2)).backward()
    for handle in handles:
        handle.remove()
    stage(None, *batch(SMALL, 2)).backward()
    tracer.save()
    (trace,) = read_traces(tmp_path)
    kinds = [event["name"].split()[1] for event in trace.events]
    assert sorted(kinds) == 3 * ["backward"] + 3 * ["forward"] + 3 * ["recompute"]
    spans = {event["name"]: event for event in trace.events}
    for layer in range(3):
        outer, inner = spans[f"blocks.{layer} backward"], spans[f"blocks.{layer} recompute"]
        assert outer["began"] <= inner["began"] <= inner["ended"] <= outer["ended"]


def checkpointed(block, x_BTC, sight):
    return torch.utils.checkpoint.checkpoint(block, x_BTC, sight, use_reentrant=False)


def test_wrong_folders_and_windows_are_refused(tmp_path):
    with pytest.raises(UserError, match="no trace"):
        merge(tmp_path)
    tracers = [Tracer(tmp_path, rank, 2) for rank in range(2)]
    for tracer in tracers:
        with tracer.span("x"):
            pass
        tracer.save()
    draw(tmp_path / "all.png", read_traces(tmp_path))
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(Path("never.png"), read_traces(tmp_path), 1e6, 2e6)
    tracers[1].run = 1
    tracers[1].save()
    with pytest.raises(UserError, match="different runs"):
        merge(tmp_path)
