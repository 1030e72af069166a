"""Ranks that fail, for test_debug.py: processes that nobody watches but their own watchdogs, with their exit codes.

`common.dist.spawn` ends the others as soon as one fails; here they must do so themselves.
"""

import datetime
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from common.cli import UserError
from parallel.board import FolderBoard
from parallel.comm import make_comm
from parallel.debug import Watchdog
from parallel.errors import run_ranks
from parallel.mesh import Layout, Mesh
from parallel.processes import Process

LIMIT_S = 1.5
ENDLESS_S = 60.0


@dataclass
class Outcome:
    codes: list[int | None]  # None: still running after the time limit
    texts: list[str]  # what each rank wrote on stdout and stderr
    seconds: float  # from the failure, as far as the case has one, to the last rank's end
    folder: Path

    @property
    def text(self) -> str:
        return "".join(self.texts)


def configure() -> str:
    return os.environ["CASE"]


def configure_wrongly() -> str:
    print("usage: nobody reads this")
    print(f"prog: error: argument --tp: expected a whole number, got {os.environ['WORLD_SIZE']!r}x", file=sys.stderr)
    sys.exit(2)


def case_late(comms, rank):
    """One rank comes too late to an all-reduce of tp."""
    if rank == 3:
        busy_elsewhere()
    comms["tp"].all_reduce(torch.ones(16384), tag="grads of blocks.1")
    comms["all"].barrier()


def busy_elsewhere():
    time.sleep(ENDLESS_S)


def case_slow(comms, rank):
    """Late, but less than the limit: no failure."""
    time.sleep(0.5 * LIMIT_S * (rank == 0))
    comms["all"].barrier()


def case_killed(comms, rank):
    for step in range(100):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        comms["tp"].all_reduce(torch.ones(8), tag=f"step {step}")
        comms["all"].all_reduce(torch.ones(8), tag=f"step {step}")
    raise AssertionError("not reached")


def case_vanished(comms, rank):
    """A rank is gone while the others compute, so that no connection tells."""
    if rank == 1:
        os._exit(7)
    busy_elsewhere()


def case_stopped(comms, rank):
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    comms["all"].all_reduce(torch.ones(8), tag="loss")


def case_different(comms, rank):
    """Two ranks of one group call different collectives: gloo hangs or raises, and either is reported."""
    x = torch.ones(1 << 18)
    if rank == 0:
        comms["all"].all_reduce(x, tag="a sum")
    else:
        comms["all"].all_gather(x, torch.empty(x.numel() * comms["all"].size), tag="a gather")


def case_raising(comms, rank):
    if rank == 2:
        raise RuntimeError("a bug of rank 2")
    comms["all"].barrier()


def case_user_alike(comms, rank):
    raise ValueError("heads 3: expected a multiple of tp 2")


def case_user_one(comms, rank):
    if rank == 1:
        raise UserError("no space left on the disk of rank one")
    comms["all"].barrier()


def case_ended(comms, rank):
    """One rank is done while the others wait for it."""
    if rank != 3:
        comms["all"].barrier()


def case_terminated(comms, rank):
    """SIGTERM while the rank waits within gloo, where Python's handlers do not run."""
    if rank == 0:
        time.sleep(0.3)
        board = FolderBoard(Path(os.environ["FOLDER"]) / "board")
        os.kill(Process.from_json(board.read("rank-1")).pid, signal.SIGTERM)
        busy_elsewhere()
    comms["all"].barrier()


CASES = {name.removeprefix("case_"): fn for name, fn in globals().items() if name.startswith("case_")}
CASES["command_line"] = CASES["twice"] = case_slow


def main(case: str, watchdog: Watchdog) -> None:
    rank, world_size, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(os.environ["FOLDER"])
    watchdog.limit_s, watchdog.folder = LIMIT_S, folder / "reports"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size,
        timeout=datetime.timedelta(seconds=ENDLESS_S),
    )  # fmt: skip
    mesh = Mesh(Layout(dp=world_size // 2, tp=2), rank, world_size)
    comms = {"tp": make_comm(mesh.group("tp"), listeners=[watchdog]),
             "all": make_comm(mesh.group("dp", "tp"), listeners=[watchdog])}  # fmt: skip
    CASES[case](comms, rank)
    if case == "ended":
        return
    dist.destroy_process_group()


def rank_main(case: str, rank: int, world_size: int, folder: Path) -> None:
    with open(folder / f"output-{rank}", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    faulthandler.enable()
    os.environ.update(CASE=case, RANK=str(rank), WORLD_SIZE=str(world_size), FOLDER=str(folder),
                      GLOO_SOCKET_IFNAME="lo")  # fmt: skip
    if case == "twice" and rank == 3:
        time.sleep(0.5)
        os.environ["RANK"] = "2"
    torch.set_num_threads(1)
    run_ranks(main, configure_wrongly if case == "command_line" else configure, board=FolderBoard(folder / "board"))


def outcome(case: str, folder: Path, world_size: int = 4, timeout_s: float = 25.0) -> Outcome:
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    ranks = [context.Process(target=rank_main, args=(case, rank, world_size, folder)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    began = time.monotonic()
    for process in ranks:
        process.join(max(0.0, began + timeout_s - time.monotonic()))
    seconds = time.monotonic() - began
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
        process.close()
    return Outcome(codes, [(folder / f"output-{r}").read_text() for r in range(world_size)], seconds, folder)
