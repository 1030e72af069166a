"""Our collectives and torch's against sums written out, on 2 to 8 ranks: values, bits, bytes, order, overlap, errors.

The ranks start each call at random moments. Numbers are small whole ones wherever a sum must be exact in every dtype.
"""

import hashlib
import math
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from common.dist import RankError, spawn
from parallel.collectives import OurComm
from parallel.comm import Comm, TorchComm, Work, make_comm
from parallel.compression import CODECS, SCALE_BLOCK
from parallel.costs import ALGORITHMS, COSTS, NEAR, Link, bytes_sent, has, measure, pick, seconds
from parallel.mesh import Group, Layout, Mesh
from parallel.worker import Worker

ROOT = Path(__file__).parents[2]
WORLDS = range(2, 9)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
CHUNK = 512  # bytes: many chunks in small tensors


def world(rank: int, W: int) -> Group:
    return Mesh(Layout(dp=W), rank, W).group("dp")


def whole_numbers(numel: int, dtype: torch.dtype, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    return torch.randint(0 if dtype == torch.uint8 else -7, 8, (numel,), generator=generator).to(dtype)


def inputs(numel: int, dtype: torch.dtype, W: int) -> list[torch.Tensor]:
    return [whole_numbers(numel, dtype, rank) for rank in range(W)]


def reduced(xs: list[torch.Tensor], op: str) -> torch.Tensor:
    """Written out in float64, which all these sums fit."""
    stack = torch.stack(xs).double()
    total = stack.amax(0) if op == "max" else stack.sum(0) / (len(xs) if op == "mean" else 1)
    return total.to(xs[0].dtype)


def ops_of(dtype: torch.dtype) -> tuple[str, ...]:
    return ("sum", "mean", "max") if dtype.is_floating_point else ("sum", "max")


def variants(group: Group) -> list[Comm]:
    """torch's, the picker, and every algorithm in small chunks."""
    W = group.size
    comms: list[Comm] = [TorchComm(group), OurComm(group)]
    comms += [OurComm(group, algorithm=name, chunk_bytes=CHUNK) for name in ("ring", "recursive", "tree", "pairwise")]
    comms += [OurComm(group, algorithm="hierarchical", ranks_per_node=per_node, chunk_bytes=CHUNK)
              for per_node in range(2, W) if W % per_node == 0]  # fmt: skip
    return comms


class Checker:
    """Starts collectives at random moments, several at once, and compares what comes; it all goes into a digest."""

    def __init__(self, rank: int, W: int, seed: int):
        self.rank, self.W, self.random = rank, W, random.Random(100 * seed + rank)
        self.digest = hashlib.sha256()
        self.under_way: list[tuple] = []

    def expect(self, work: Work, got: torch.Tensor, want: torch.Tensor, *what) -> None:
        self.under_way.append((work, got, want, what))
        if self.random.random() < 0.1:
            time.sleep(0.002 * self.random.random())

    def check(self) -> None:
        for work, got, want, what in self.under_way:
            work.wait()
            assert got.dtype == want.dtype and torch.equal(got, want), (*what, got[:8], want[:8])
            self.digest.update(got.view(torch.uint8).numpy().tobytes())
        self.under_way.clear()

    def collectives(self, comm: Comm, numel: int, dtype: torch.dtype) -> None:
        """Those that the comm's algorithm is for; numel: of the all-reduced, of a part, of the broadcast."""
        rank, W, algorithm = self.rank, self.W, getattr(comm, "algorithm", "auto")
        names = [name for name in COSTS if algorithm == "auto" or has(name, algorithm, W, comm.ranks_per_node)]
        what = (comm.kind, algorithm, W, numel, dtype)
        xs, longs = inputs(numel, dtype, W), inputs(numel * W, dtype, W)
        mine = slice(rank * numel, (rank + 1) * numel)
        for op in ops_of(dtype):
            if "all_reduce" in names:
                x = xs[rank].clone()
                self.expect(comm.all_reduce(x, op, async_=True), x, reduced(xs, op), "all_reduce", op, *what)
            if "reduce_scatter" in names:
                x, out = longs[rank].clone(), torch.empty_like(xs[rank])
                work = comm.reduce_scatter(x, out, op, async_=True)
                self.expect(work, out, reduced(longs, op)[mine], "reduce_scatter", op, *what)
        if "all_gather" in names:
            out = torch.empty(numel * W, dtype=dtype)
            self.expect(comm.all_gather(xs[rank], out, async_=True), out, torch.cat(xs), "all_gather", *what)
        if "all_to_all" in names:
            out = torch.empty(numel * W, dtype=dtype)
            work = comm.all_to_all(longs[rank], out, async_=True)
            self.expect(work, out, torch.cat([long[mine] for long in longs]), "all_to_all", *what)
        for source in {0, W - 1, W // 2} if "broadcast" in names else ():
            x = xs[rank].clone()
            self.expect(comm.broadcast(x, source, async_=True), x, xs[source], "broadcast", source, *what)

    def uneven_all_to_all(self, comm: Comm) -> None:
        """Rank r has (r + 2 s) mod 4 times 37 numbers for rank s: for some none."""
        sizes = [[(r + 2 * s) % 4 * 37 for s in range(self.W)] for r in range(self.W)]
        xs = [whole_numbers(sum(sizes[r]), torch.float32, r) for r in range(self.W)]
        receive = [sizes[r][self.rank] for r in range(self.W)]
        out = torch.empty(sum(receive))
        work = comm.all_to_all(xs[self.rank], out, sizes[self.rank], receive, async_=True)
        want = torch.cat([xs[r].split(sizes[r])[self.rank] for r in range(self.W)])
        self.expect(work, out, want, "uneven all_to_all", comm.kind)


def check_all(rank, W, seed):
    group = world(rank, W)
    checker = Checker(rank, W, seed)
    for comm in variants(group):
        many = comm.kind == "ours" and (W <= 3 or comm.algorithm == "auto")
        for numel in (0, 1, 2, 7, 101, 256, 513) if many else (0, 1, 101):
            checker.collectives(comm, numel, torch.float32)
        for dtype in (*FLOATS, *INTEGERS) if many else (torch.bfloat16, torch.int64):
            checker.collectives(comm, 67, dtype)
        if algorithm_of(comm) == "auto":
            checker.uneven_all_to_all(comm)
        checker.check()
    return check_bits(rank, W, seed)


def algorithm_of(comm: Comm) -> str:
    return getattr(comm, "algorithm", "auto")


def check_bits(rank, W, seed):
    """Real numbers: near the sum, and a digest of what came, which must be that of every rank and run."""
    checker = Checker(rank, W, seed)
    digest = hashlib.sha256()
    xs = [torch.randn(1301, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for r in range(W)]
    comms = [comm for comm in variants(world(rank, W)) if comm.kind == "ours"]
    comms += [OurComm(world(rank, W), compress=compress, chunk_bytes=CHUNK) for compress in CODECS]
    for comm in comms:
        for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 2e-7), (torch.bfloat16, 2**-8)):
            x = xs[rank].to(dtype, copy=True)
            rounded = torch.stack([other.to(dtype).double() for other in xs])
            comm.all_reduce(x, "mean", tag="x")
            if comm.compress and dtype != torch.float64:
                tolerance = 2**-3 if comm.compress == "fp8" else 2**-7
            error = (x.double() - rounded.mean(0)).abs()
            scale = rounded.abs().sum(0) + (rounded.abs().max() / 64 if comm.compress == "fp8" else 0)
            assert (error <= tolerance * scale).all(), (algorithm_of(comm), comm.compress, dtype)
            digest.update(x.view(torch.uint8).numpy().tobytes())
            time.sleep(0.002 * checker.random.random())
    return digest.hexdigest()


def several(rank, W):
    link = measure(OurComm(world(rank, W)), tries=2, large=1 << 20)
    rounded, compressed = half_sums_are_rounded_once(rank, W), compressed_bytes(rank, W)
    return {"link": link, "rounded once": rounded, "compressed": compressed, "barrier": late(rank, W)}


@pytest.fixture(scope="module")
def four():
    """What four ranks found out: one start for several tests."""
    return spawn(several, 4)


@pytest.mark.parametrize("W", WORLDS)
def test_every_collective_and_algorithm_and_all_ranks_have_the_same_bits(W):
    assert len(set(spawn(check_all, W, 0))) == 1


@pytest.mark.parametrize("W", [3, 4])
def test_two_runs_have_the_same_bits(W):
    assert len(set(spawn(check_bits, W, 1) + spawn(check_bits, W, 2))) == 1


def half_sums_are_rounded_once(rank, W):
    comm = OurComm(world(rank, W), chunk_bytes=1 << 16)
    xs = [torch.randn(400_001, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(W)]
    want = torch.stack(xs).double().sum(0)
    x = xs[rank].clone()
    assert comm.algorithm_for("all_reduce", x) == "pairwise"
    comm.all_reduce(x)
    slack = 2**-22 * torch.stack(xs).double().abs().sum(0)
    return ((x.double() - want).abs() <= 2**-8 * want.abs() + slack).all().item()


def test_sums_of_bfloat16_are_rounded_once(four):
    assert all(found["rounded once"] for found in four)


# Bytes.


def loopback() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


SIZE = 12 << 18  # bytes, 3 MiB: W = 2, 3, 4, 6 divide the elements


def call(comm: Comm, name: str) -> None:
    whole, part = torch.ones(SIZE // 4), torch.ones(SIZE // 4 // comm.size)
    if name == "all_reduce":
        comm.all_reduce(whole)
    elif name == "reduce_scatter":
        comm.reduce_scatter(whole, part)
    elif name == "all_gather":
        comm.all_gather(part, whole)
    elif name == "broadcast":
        comm.broadcast(whole, 1)
    else:
        comm.all_to_all(whole, torch.empty_like(whole))


def on_the_wire(comm: Comm, name: str, formula: float) -> float:
    """Bytes through the loopback over W. Others use it too, so the least of some tries, until one is near."""
    best, share = math.inf, torch.zeros(1)
    for _ in range(60):
        comm.barrier()
        before = loopback()
        comm.barrier()
        call(comm, name)
        comm.barrier()
        best = min(best, (loopback() - before) / comm.size)
        share.fill_(best)
        comm.broadcast(share)
        if share.item() <= 1.01 * formula:
            break
    return share.item()


def count_bytes(rank, W, per_node):
    group = world(rank, W)
    rows = []
    for comm in (TorchComm(group), OurComm(group)):
        for name in COSTS:
            formula = bytes_sent(name, SIZE, W, comm.kind)
            rows.append((comm.kind, name, formula, on_the_wire(comm, name, formula)))
    exact = []
    for algorithm in ALGORITHMS if per_node else ALGORITHMS[:-1]:
        comm = OurComm(group, algorithm=algorithm, ranks_per_node=per_node)
        for name in COSTS:
            if has(name, algorithm, W, per_node):
                before = comm.sent
                call(comm, name)
                sent = comm.sent - before
                exact.append(
                    (name, algorithm, bytes_sent(name, SIZE, W, "ours", algorithm, ranks_per_node=per_node), sent)
                )
    return rows, exact


@pytest.mark.parametrize(("W", "per_node"), [(3, 0), (4, 2), (6, 3)])
def test_bytes_are_those_of_the_formula(W, per_node):
    ranks = spawn(count_bytes, W, per_node)
    for kind, name, formula, measured in ranks[0][0]:
        assert 0.99 * formula <= measured <= 1.01 * formula, (kind, name, measured / formula)
    for calls in zip(*(exact for _, exact in ranks), strict=True):
        name, algorithm, formula, _ = calls[0]
        counts = [count for *_, count in calls]
        assert sum(counts) == W * formula, (name, algorithm, counts, formula)
        if algorithm in ("ring", "pairwise") and name != "broadcast":
            assert set(counts) == {formula}, (name, algorithm, counts)


def test_bytes_by_hand():
    assert bytes_sent("all_reduce", 800, 4) == 1200
    assert bytes_sent("reduce_scatter", 800, 4) == 600
    assert bytes_sent("reduce_scatter", 800, 4, "torch") == 1200
    assert bytes_sent("all_reduce", 4 * SCALE_BLOCK * 4, 4, compress="fp8") == 1.5 * 4 * (SCALE_BLOCK + 4)
    assert bytes_sent("send", 5, 4) == 5 and bytes_sent("receive", 5, 4) == 0
    with pytest.raises(ValueError, match="collective 'gather'"):
        bytes_sent("gather", 1, 2)
    with pytest.raises(ValueError, match="algorithm 'recursive' for all_gather over 3 ranks"):
        bytes_sent("all_gather", 1, 3, "ours", "recursive")


# The picker.


def test_the_picker():
    assert pick("all_reduce", 4, 8) == "tree"
    assert pick("all_reduce", 1 << 24, 8) == "recursive"
    assert pick("all_reduce", 1 << 24, 6) == "ring"
    assert pick("reduce_scatter", 1 << 24, 7) == "ring"
    assert pick("reduce_scatter", 1 << 24, 7, half=True) == "pairwise"
    assert pick("all_reduce", 1 << 24, 8, ranks_per_node=4) == "hierarchical"
    assert pick("all_reduce", 1 << 24, 4, ranks_per_node=4) == "recursive"
    assert (pick("broadcast", 4, 8), pick("broadcast", 1 << 24, 8)) == ("tree", "ring")


@pytest.mark.parametrize("W", [2, 3, 5, 8, 13])
def test_what_is_picked_exists_and_nothing_is_faster(W):
    for name in COSTS:
        for size in (0, 1, 1 << 19, 1 << 28):
            picked = pick(name, size, W)
            assert has(name, picked, W)
            if name != "all_reduce" or picked != "tree":
                times = [seconds(name, other, size, W, NEAR) for other in COSTS[name] if has(name, other, W)]
                assert seconds(name, picked, size, W, NEAR) == min(times)
    ring, halving = (seconds("all_reduce", name, 8000, 8, Link(1.0, 0.001)) for name in ("ring", "recursive"))
    assert (ring, halving) == (14 + 14, 6 + 14)  # 2 (W-1) alpha and 2 log2 W alpha, both 2 (W-1)/W S beta


# Compression.


def feedback(rank, W, compress, steps, kept):
    """The mean over the steps of all-reduced means of the same gradients, and the largest error of one step."""
    comm = OurComm(world(rank, W), compress=compress)
    xs = torch.stack([torch.randn(3001, generator=torch.Generator().manual_seed(r)) for r in range(W)]).double()
    total, worst = torch.zeros(3001, dtype=torch.float64), 0.0
    scattered = torch.zeros(3001 // W, dtype=torch.float64)
    for step in range(steps):
        x = xs[rank].float()
        comm.all_reduce(x, "mean", tag="x" if kept else f"step {step}")
        total += x.double() / steps
        worst = max(worst, (x.double() - xs.mean(0)).abs().max().item())
        x, out = xs[rank, : 3001 // W * W].float(), torch.empty(3001 // W)
        comm.reduce_scatter(x, out, "mean", tag="x" if kept else f"step {step}")
        scattered += out.double() / steps
    part = xs[:, : 3001 // W * W].mean(0).chunk(W)[rank]
    return (total - xs.mean(0)).abs().max().item(), worst, (scattered - part).abs().max().item(), comm.sent / steps


def compressions(rank, W):
    return {(compress, kept): feedback(rank, W, compress, 40, kept) for compress in CODECS for kept in (True, False)}


def test_error_feedback_makes_the_mean_over_steps_right():
    for found in spawn(compressions, 3):
        for compress, once in (("bf16", 0.02), ("fp8", 0.25)):
            with_it, without = found[compress, True], found[compress, False]
            assert with_it[1] <= once and without[1] <= once  # one step is off by this much
            assert with_it[0] <= 2 * with_it[1] / 40 and with_it[2] <= 2 * with_it[1] / 40  # the mean by so much less
            assert without[0] >= 0.5 * without[1]  # without, it is off as much as one step


def compressed_bytes(rank, W):
    group, counts = world(rank, W), {}
    for compress in CODECS:
        comm = OurComm(group, compress=compress)
        for name, tag in (("all_reduce", "x"), ("reduce_scatter", "x"), ("all_reduce", "")):
            before = comm.sent
            x = torch.ones(4 * SCALE_BLOCK)
            if name == "all_reduce":
                comm.all_reduce(x, tag=tag)
            else:
                comm.reduce_scatter(x, torch.empty(SCALE_BLOCK), tag=tag)
            counts[compress, name, tag] = comm.sent - before
        before = comm.sent
        for x, op in ((torch.ones(4096, dtype=torch.int32), "sum"), (torch.ones(9), "sum"), (torch.ones(4096), "max")):
            comm.all_reduce(x, op, tag="x")
            assert (x == (W if op == "sum" else 1)).all()
    return counts


def test_compressed_bytes(four):
    size = 4 * 4 * SCALE_BLOCK
    ranks = [found["compressed"] for found in four]
    for (compress, name, tag), _ in ranks[0].items():
        formula = bytes_sent(name, size, 4, compress=compress if tag else None)
        assert sum(counts[compress, name, tag] for counts in ranks) == 4 * formula


@pytest.mark.parametrize("numel", [0, 1, 5, SCALE_BLOCK - 1, SCALE_BLOCK, SCALE_BLOCK + 1, 3000])
def test_codecs(numel):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-9, 9).repeat(200)[:numel]
    for name, bits in (("bf16", 8), ("fp8", 4)):
        codec = CODECS[name]()
        encoded = codec.encode(x)
        assert encoded.dtype == torch.uint8 and encoded.numel() == codec.nbytes(numel)
        got = codec.decode(encoded, numel)
        floor = torch.cat([block.abs().amax().expand(len(block)) for block in x.split(SCALE_BLOCK)]) if numel else x
        assert ((got - x).abs() <= 2.0**-bits * x.abs() * 1.001 + floor * 2.0**-18 * (name == "fp8")).all()
        residual = torch.zeros(numel)
        again = codec.decode(codec.encode(x, residual), numel)
        assert torch.equal(again, got) and torch.equal(residual, x - got)


@pytest.mark.parametrize("name", CODECS)
def test_codecs_and_numbers_that_are_none(name):
    codec = CODECS[name]()
    assert torch.equal(codec.decode(codec.encode(torch.zeros(1500)), 1500), torch.zeros(1500))
    assert torch.equal(codec.decode(codec.encode(torch.full((3,), 1e-45)), 3) <= 1e-40, torch.ones(3, dtype=torch.bool))
    for bad in (math.inf, -math.inf, math.nan):
        x, residual = torch.ones(1500), torch.zeros(1500)
        x[3] = bad
        got = codec.decode(codec.encode(x, residual), 1500)
        assert not got[3].isfinite() and torch.equal(got[SCALE_BLOCK:], x[SCALE_BLOCK:])
        assert residual.isfinite().all()


# Order, overlap, failures.


def overtaking(rank, W):
    """Rank 0 sends behind a collective that rank 1 only begins once it has what was sent."""
    for comm in (OurComm(world(rank, W)), OurComm(world(rank, W), algorithm="ring")):
        x, y = torch.full((70_000,), rank + 1.0), torch.full((30,), float(rank))
        if rank == 0:
            work = comm.all_reduce(x, async_=True)
            comm.send(y, 1)
            comm.send(y + 1, 1, async_=True).wait()
            work.wait()
        else:
            z = torch.empty(30)
            comm.receive(z, 0)
            first = z[0].item()
            comm.receive(z, 0)
            assert (first, z[0].item()) == (0, 1)
            comm.all_reduce(x)
        assert (x == 3).all()


def in_the_background(rank, W):
    """A collective that nobody waits for ends all the same, and later ones come after it."""
    comm = OurComm(world(rank, W))
    x, total = torch.full((300_000,), rank + 1.0), W * (W + 1) / 2
    work = comm.all_reduce(x, async_=True)
    deadline = time.monotonic() + 20
    while not (x[-1] == total and x[0] == total and x[150_000] == total) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert (x == total).all()
    first = comm.all_reduce(x, async_=True)
    comm.all_reduce(x)  # begun later, over later
    assert (x == total * W * W).all()
    for done in (first, work, work):
        done.wait()
    parameter = torch.nn.Parameter(torch.full((3,), float(rank)))
    comm.broadcast(parameter, 1)
    assert (parameter == 1).all() and parameter.requires_grad


def both(rank, W):
    overtaking(rank, W)
    in_the_background(rank, W)


def test_sends_pass_collectives_and_collectives_pass_computing():
    spawn(both, 2)


def one_rank_dies(rank, W, folder):
    comm = OurComm(world(rank, W))
    comm.barrier()
    if rank == 1:
        (folder / "died").touch()
        os._exit(7)
    x = torch.ones(100_000)
    work = comm.all_reduce(x, async_=True)
    try:
        work.wait()
    except RuntimeError as error:
        (folder / "first").write_text(str(error))
    try:
        comm.all_gather(torch.ones(1), torch.ones(W))
    except RuntimeError as error:
        (folder / "second").write_text(str(error))
    time.sleep(5)  # the parent kills it, once it has heard of rank 1


def test_a_dead_rank_raises_at_wait(tmp_path):
    with pytest.raises(RankError, match="rank 1: died by exit code 7"):
        spawn(one_rank_dies, 2, tmp_path)
    assert "closed" in (tmp_path / "first").read_text() or "reset" in (tmp_path / "first").read_text()
    assert (tmp_path / "second").read_text().startswith("an earlier collective of this group failed")


# The thread, what is refused, and the interface that torch's collectives share.


def test_the_worker_keeps_order_and_ends_with_its_owner():
    worker, seen, gate = Worker("a worker of a test"), [], threading.Event()
    first = worker.submit(lambda: (gate.wait(10), seen.append((1, torch.is_grad_enabled()))))
    second = worker.submit(lambda: seen.append(2))
    assert seen == []
    gate.set()
    second.wait()
    first.wait()
    assert seen == [(1, False), 2]
    thread = next(thread for thread in threading.enumerate() if thread.name == "a worker of a test")
    del worker
    thread.join(10)
    assert not thread.is_alive()


def test_an_error_comes_out_at_wait_and_later_calls_fail():
    worker = Worker("failing")
    first, second = worker.submit(lambda: [][1]), worker.submit(lambda: None)
    with pytest.raises(IndexError):
        first.wait()
    with pytest.raises(RuntimeError, match="an earlier collective of this group failed: list index out of range"):
        second.wait()


STUCK = """
import time
from parallel.worker import Worker
worker = Worker("stuck")
worker.submit(lambda: time.sleep(1000))
print("end")
"""


def test_a_program_ends_though_its_worker_is_stuck():
    done = subprocess.run([sys.executable, "-c", STUCK], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


PAIR = Group(("dp",), (0, 1), 0)  # without a process group: what is refused is refused before anything is sent
FLAT = torch.ones(4)
REFUSED = {
    "op": (lambda comm: comm.all_reduce(FLAT, "min"), "op 'min': expected sum, mean or max"),
    "mean of integers": (lambda comm: comm.all_reduce(torch.ones(4, dtype=torch.int32), "mean"), "the mean of"),
    "op of reduce_scatter": (lambda comm: comm.reduce_scatter(FLAT, torch.ones(2), "avg"), "op 'avg'"),
    "parts": (lambda comm: comm.reduce_scatter(FLAT, torch.ones(3)), "4 elements over 2 ranks and a part of 3"),
    "gathered parts": (lambda comm: comm.all_gather(FLAT, torch.ones(4)), "4 elements over 2 ranks and a part of 4"),
    "dtypes": (lambda comm: comm.all_gather(FLAT, torch.ones(8).double()), "dtypes .* expected the same"),
    "strides": (lambda comm: comm.all_reduce(torch.ones(4, 4).mT[:2]), "expected a contiguous one"),
    "source": (lambda comm: comm.broadcast(FLAT, 2), "rank 2 of the group dp: expected 0 to 1"),
    "oneself": (lambda comm: comm.send(FLAT, 0), "expected 0 to 1 other than 0"),
    "odd all_to_all": (lambda comm: comm.all_to_all(torch.ones(3), torch.ones(4)), "3 elements to send over 2 ranks"),
    "sizes": (lambda comm: comm.all_to_all(FLAT, FLAT, [1, 2], [2, 2]), r"send sizes \[1, 2\]: expected 2 numbers"),
    "negative": (lambda comm: comm.all_to_all(FLAT, FLAT, [2, 2], [5, -1]), "receive sizes"),
    "too few": (lambda comm: comm.all_to_all(FLAT, FLAT, [4], [2, 2]), "send sizes"),
}


@pytest.mark.parametrize("kind", ["torch", "ours"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_the_caller(kind, case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(make_comm(PAIR, kind))


def test_options_refused():
    six = Group(("dp",), tuple(range(6)), 0)
    for options, message in (
        ({"algorithm": "star"}, "algorithm 'star': expected auto, ring"),
        ({"ranks_per_node": 4}, "ranks_per_node 4: expected a divisor of the 6 ranks"),
        ({"ranks_per_node": -1}, "ranks_per_node -1"),
        ({"algorithm": "hierarchical"}, "expected ranks_per_node"),
        ({"chunk_bytes": 0}, "chunk_bytes 0: expected at least 1"),
        ({"compress": "int8"}, "compress 'int8': expected None, bf16 or fp8"),
    ):
        with pytest.raises(ValueError, match=message):
            make_comm(six, "ours", **options)
    assert OurComm(PAIR, ranks_per_node=8).algorithm_for("all_reduce", torch.ones(1 << 22)) == "recursive"
    with pytest.raises(ValueError, match="collectives 'mpi': expected torch or ours"):
        make_comm(PAIR, "mpi")
    assert (make_comm(PAIR).kind, make_comm(PAIR, "ours").kind) == ("torch", "ours")


@pytest.mark.parametrize("kind", ["torch", "ours"])
def test_a_group_of_one(kind):
    comm = make_comm(Mesh(Layout()).group("dp"), kind)
    x, out = torch.arange(3.0), torch.empty(3)
    for work in (comm.all_reduce(x, "mean"), comm.broadcast(x), comm.all_reduce(x, async_=True)):
        work.wait()
    comm.barrier()
    for move in (comm.reduce_scatter, comm.all_gather, comm.all_to_all):
        out.zero_()
        move(x, out)
        assert torch.equal(out, torch.arange(3.0))
    with pytest.raises(ValueError):
        comm.send(x, 0)


class Listening:
    def __init__(self):
        self.heard: list = []

    def started(self, call) -> None:
        self.heard.append(("started", call.name, call.number, call.ended))

    def ended(self, call) -> None:
        assert call.ended >= call.started > 0
        self.heard.append(("ended", call.name, call.number, call.payload, call.dtype, call.peer, call.tag))


def listened(rank, W, kind):
    listener = Listening()
    comm = make_comm(world(rank, W), kind, [listener])
    x = torch.ones(6)
    work = comm.all_reduce(x, async_=True, tag="grads")
    comm.all_gather(torch.ones(2), torch.empty(2 * W))
    (comm.send if rank == 0 else comm.receive)(x, 1 - rank)
    work.wait()
    work.wait()
    comm.barrier()
    return listener.heard


@pytest.mark.parametrize("kind", ["torch", "ours"])
def test_listeners_hear_of_each_call(kind):
    heard = spawn(listened, 2, kind)
    for rank in (0, 1):
        which = ("send", "receive")[rank]
        assert heard[rank] == [
            ("started", "all_reduce", 0, 0.0),
            ("started", "all_gather", 1, 0.0),
            ("ended", "all_gather", 1, 16, torch.float32, None, ""),
            ("started", which, 0, 0.0),
            ("ended", which, 0, 24, torch.float32, 1 - rank, ""),
            ("ended", "all_reduce", 0, 24, torch.float32, None, "grads"),
            ("started", "barrier", 2, 0.0),
            ("ended", "barrier", 2, 0, None, None, ""),
        ]


def test_the_link_is_measured_the_same_on_all_ranks(four):
    assert len({found["link"] for found in four}) == 1 and 0 < four[0]["link"].alpha < 10


def late(rank, W):
    """Nobody leaves a barrier before the last has come."""
    comm, latest = OurComm(world(rank, W)), torch.zeros(1, dtype=torch.float64)
    for slow in range(W):
        if rank == slow:
            time.sleep(0.02)
        latest.fill_(time.monotonic())
        comm.barrier()
        left = time.monotonic()
        comm.all_reduce(latest, "max")
        if left < latest.item():
            return False
    return True


def test_barrier(four):
    assert all(found["barrier"] for found in four)
