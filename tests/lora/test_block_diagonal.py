"""The comparison of the three ways: what it prints, when it fails, what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.dist import spawn
from lora import block_diagonal, sharded
from lora.block_diagonal import CompareConfig, configured, difference, main, measure, report, right
from lora.sharding import SHARDINGS
from parallel.debug import Watchdog
from parallel.mesh import Layout, Mesh

ROOT = Path(__file__).resolve().parents[2]
SMALL = CompareConfig(rank=8, layers=1, width=16, heads=8, mlp_width=24, rows=1, tokens=8)


def compare(rank, world_size, config, fault=None):
    if fault is not None:
        fault(rank)
    mesh = Mesh(Layout(tp=world_size), rank, world_size)
    device = torch.device(config.device, rank) if config.device == "cuda" else torch.device("cpu")
    return [measure(config, sharding, mesh, device) for sharding in SHARDINGS]


@pytest.mark.parametrize(
    ("ranks", "change"),
    [
        (2, {"blocks_per_rank": 2, "sequence_parallel": True}), (4, {"training": False}), (4, {"compare": False}),
        (8, {"tokens": 7}),
    ],
)  # fmt: skip
def test_all_ways_are_right(ranks, change):
    config = replace(SMALL, **change)
    for rows in spawn(compare, ranks, config):
        assert all(right(row) for row in rows)
        assert [row["way"] for row in rows] == list(SHARDINGS)
        assert [row["forward_collectives"] for row in rows] == [0, 7, 0]
        assert [row["backward_collectives"] for row in rows] == [0, 7 * config.training, 0]
        assert [row["step_collectives"] for row in rows] == [0, 0, 7 * config.training]
        own = 4 + 1 + 1 + 2 if config.sequence_parallel else 2 + 1 + 2  # blocks, embedding, last norm, loss
        assert {row["forward_base_collectives"] for row in rows} == {own}
        assert ("output_error" in rows[0]) == config.compare
        assert ("gradient_error" in rows[0]) == (config.compare and config.training)
        lines = "\n".join(report(config, rows)).splitlines()
        assert len(lines) == 1 + 4 + 2 and sum(line.endswith("ok") for line in lines) == 3


def lose_the_gather(rank):
    """Backward, each rank keeps its own gradient instead of the sum."""

    def backward(ctx, gradient):
        return gradient.chunk(ctx.comm.size, dim=-1)[ctx.comm.rank], None

    sharded._Gather.backward = staticmethod(backward)


def stretch(rank):
    own = sharded.ShardedColumn.forward
    if rank == 1:
        sharded.ShardedColumn.forward = lambda self, x: own(self, x) * 1.000001


def chatter(rank):
    """One more collective in every row-parallel layer, that says nothing of itself."""
    own = sharded.ShardedRow.dropped

    def dropped(self, x):
        self.comm.all_reduce(torch.zeros(1))
        return own(self, x)

    sharded.ShardedRow.dropped = dropped


def make_nan(rank):
    own = block_diagonal.gather_logits
    if rank == 1:
        block_diagonal.gather_logits = lambda logits, comm: own(logits, comm) * torch.nan


def miscount(rank):
    if rank == 1:
        block_diagonal.macs_per_token = block_diagonal.parameters_per_rank = lambda *numbers: 0


@pytest.mark.parametrize(
    ("fault", "ways", "key"),
    [
        (lose_the_gather, ["s-lora"], "gradient_error"), (stretch, list(SHARDINGS), "output_error"),
        (make_nan, list(SHARDINGS), "output_error"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_seen_by_all_ranks(fault, ways, key):
    for rows in spawn(compare, 2, SMALL, fault):
        assert [row["way"] for row in rows if not right(row)] == ways
        assert [row["way"] for row in rows if not row[key] <= 1e-12] == ways
        assert sum("WRONG" in line for line in report(SMALL, rows)) == 1


def test_a_count_that_is_not_the_formulas_fails():
    for rows in spawn(compare, 2, SMALL, chatter):
        assert all(row["output_error"] <= 1e-12 and not row["as_formulas"] and not right(row) for row in rows)
    for rows in spawn(compare, 2, SMALL, miscount):  # on one rank alone, and all say so
        assert [row["as_formulas"] for row in rows] == [False] * 3
    (rows, _) = spawn(compare, 2, SMALL)
    for row in rows:
        assert right(row) and not right(row | {"as_formulas": False})
        assert not right(row | {"loss_error": float("nan")})
    assert difference(torch.tensor([torch.nan]), torch.ones(1)) == float("inf")


FLAGS = [
    "--compare",
    "--rank",
    "8",
    "--layers",
    "1",
    "--width",
    "16",
    "--mlp-width",
    "24",
    "--rows",
    "1",
    "--tokens",
    "6",
]


def run(rank, world_size, folder, fault):
    if fault is not None:
        fault(rank)
    return main(configured([*FLAGS, "--save", "--out", str(folder)]), Watchdog(None, rank, world_size))


def test_the_program_ends_with_code_1_where_something_is_wrong(tmp_path):
    assert spawn(run, 2, tmp_path, None) == [0, 0]
    (path,) = (tmp_path / "lora").glob("block_diagonal_*.json")
    saved = json.loads(path.read_text())
    assert [row["way"] for row in saved["rows"]] == list(SHARDINGS)
    assert [row["forward_collectives"] for row in saved["rows"]] == [0, 7, 0]
    assert spawn(run, 2, tmp_path, stretch) == [1, 1]


@pytest.mark.slow
def test_under_torchrun():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "lora.block_diagonal", *FLAGS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "adapters of rank 8 in 1 layers on 2 ranks, 1 x 6 tokens, float64"


@pytest.mark.slow
def test_what_the_user_has_wrong_is_said_once():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for flags, message in (
        (["--rank", "3"], "rank 3 in 2 blocks: expected multiples of the number of blocks"),
        (["--ranks", "3"], "unrecognized arguments: --ranks 3; did you mean --rank?"),
    ):
        command = [*torchrun, "-m", "lora.block_diagonal", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0 and done.stdout == ""
        assert done.stderr.count(f"lora.block_diagonal: error: {message}\n") == 1, done.stderr


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus():
    for rows in spawn(compare, 2, replace(SMALL, device="cuda"), backend="nccl"):
        assert all(right(row) for row in rows), rows


def test_how_to_start_it(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Exception, match="one process: expected at least two ranks, start with torchrun --standalone"):
        main(configured(["--compare"]), Watchdog(None, 0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank 0: expected"), ({"tokens": 0}, "tokens 0: expected at least 1"),
        ({"width": 30}, "width 30 over 8 heads"), ({"blocks_per_rank": 0}, "blocks_per_rank 0"),
    ],
)  # fmt: skip
def test_configs_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
