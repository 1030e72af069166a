"""Launching ranks and meeting: `spawn` for tests and demos on one machine, `init_from_env` for torchrun programs.

`spawn` starts N processes, returns what each rank returned, and leaves no rank, port or file behind, whatever happens.
The rendezvous is a file in a temporary folder, so there is no port to race for. Refused: more than one machine (that is
torchrun's work), functions that are not at module level.
"""

import contextlib
import dataclasses
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from common.cli import UserError
from common.log import cpu_threads

GRACE_S = 0.5  # after the first failure, the others' messages are collected for this long
# torch imports its compiler when the meta device or an optimizer is first used: a second or more, in every rank.
PRELOAD = ["torch", "torch._dynamo", "torch._meta_registrations", "torch._decomp.decompositions"]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class RankError(RuntimeError):
    """A rank raised or died; `rank` is the first one, the text holds its traceback or the signal that killed it."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(text)
        self.rank = rank


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """Where this process stands: `rank` of `world_size` over all machines, `local_rank` on this one."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str | None  # None: a world of one, no process group


def init_from_env(device: str | None = None) -> World:
    """Joins the process group that torchrun describes in the environment; a world of one without torchrun.

    `device` is "cpu", "cuda" or None for CUDA where there is one; the backend is nccl on CUDA and gloo on the CPU.
    Under `spawn`, whose group already stands, it only reports. Raises UserError for variables that are half set or not
    numbers, and for a GPU that this machine lacks.
    """
    present = [name for name in TORCHRUN if name in os.environ]
    if not present:
        assert not torch.distributed.is_initialized(), "a process group that neither torchrun nor spawn started"
        return World(0, 1, 0, _device(device, 0), None)
    if missing := [name for name in TORCHRUN if name not in os.environ]:
        names = ", ".join(present)
        raise UserError(f"{names} set but {', '.join(missing)} missing: start with torchrun, or unset {names}")
    rank, world_size, local_rank = (_whole(name) for name in TORCHRUN)
    if not (0 <= rank < world_size):
        raise UserError(f"RANK must be within 0..WORLD_SIZE - 1 = {world_size - 1}, got {rank}")
    if torch.distributed.is_initialized():
        backend = torch.distributed.get_backend()
        place = _device(device or ("cuda" if "nccl" in backend else "cpu"), local_rank)
        return World(rank, world_size, local_rank, place, backend)
    place = _device(device, local_rank)
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"RANK set but {', '.join(missing)} missing: start with torchrun, or unset RANK")
    _divide_threads(_whole("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else 1)
    backend = "gloo"
    if place.type == "cuda":
        torch.cuda.set_device(place)
        backend = "nccl"
    torch.distributed.init_process_group(backend, rank=rank, world_size=world_size)
    return World(rank, world_size, local_rank, place, backend)


def finish() -> None:
    """Leaves the process group if there is one. Call it on every rank, at the end of the program."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _whole(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise UserError(f"{name} must be a whole number, got {os.environ[name]!r}") from None


def _device(kind: str | None, local_rank: int) -> torch.device:
    if kind not in (None, "cpu", "cuda"):
        raise UserError(f"device must be 'cpu', 'cuda' or None, got {kind!r}")
    gpus = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
    if kind == "cpu" or (kind is None and not gpus):
        return torch.device("cpu")
    if not (local_rank < gpus):
        raise UserError(f"local rank {local_rank} needs GPU number {local_rank}, this machine has {gpus}")
    return torch.device("cuda", local_rank)


def _divide_threads(local_ranks: int) -> None:
    """Shares the CPU among the ranks of this machine: N ranks of N threads each stand in each other's way."""
    chosen = os.environ.get("OMP_NUM_THREADS", "1")  # torchrun itself sets 1; anything else is the user's choice
    if local_ranks > 1 and chosen == "1":
        torch.set_num_threads(max(1, cpu_threads() // local_ranks))


def spawn(
    fn: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo", timeout_s: float = 60
) -> list[Any]:
    """Runs `fn(rank, world_size, *args)` in `world_size` processes that form a process group; the values by rank.

    `fn` is a module-level function; its arguments and its result travel pickled, by value (return CPU tensors). With
    "nccl", rank r has GPU r. Raises RankError with the traceback (or the signal) of the rank that failed first,
    TimeoutError with the Python stack of each rank still running after `timeout_s` seconds (start-up included: about
    2 s for the first call of a program), ValueError for bad arguments. Every rank is dead when it returns or raises.
    """
    if not (isinstance(world_size, int) and world_size >= 1):
        raise ValueError(f"world_size must be a whole number of at least 1, got {world_size!r}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be positive, got {timeout_s!r}")
    if "nccl" in backend and torch.cuda.device_count() < world_size:
        raise ValueError(f"world_size {world_size} needs as many GPUs, this machine has {torch.cuda.device_count()}")
    try:
        call = pickle.dumps((fn, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"fn must be a module-level function with arguments that pickle: {error}") from error
    with tempfile.TemporaryDirectory(prefix="groundup-") as folder:
        ranks = _Ranks(world_size, _Job(call, backend, timeout_s, folder, dict(os.environ)))
        try:
            ranks.start()
            return ranks.results()
        finally:
            ranks.kill()


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """What each rank is told."""

    call: bytes  # pickled (fn, args): pickled by us, since multiprocessing would make tensors shared memory
    backend: str
    timeout_s: float
    folder: str
    environment: dict[str, str]  # the server's own dates from when it was started


class _Ranks:
    """The parent's side: one process and one pipe a rank.

    Why a fork server: a fresh interpreter a rank pays for `import torch` each time (1.9 s of a core), and forking the
    caller can hang, since the threads of its torch do not survive a fork. Ranks forked from a server that has imported
    torch and nothing else start in a few hundredths of a second.
    """

    def __init__(self, world_size: int, job: _Job) -> None:
        self.world_size, self.job = world_size, job
        self.deadline = time.monotonic() + job.timeout_s
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            process = context.Process(target=_rank_main, args=(rank, self.world_size, theirs, self.job))
            process.start()
            self.processes.append(process)
            theirs.close()  # so that the death of a rank is an end of file here

    def results(self) -> list[Any]:
        values: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline, waiting = self.deadline, set(range(self.world_size))
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait([self.pipes[rank] for rank in waiting], left):
                rank = self.pipes.index(pipe)
                waiting.remove(rank)
                returned, value = self._receive(rank)
                (values if returned else failures)[rank] = value
                if not returned:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            raise _rank_error(failures)
        if not waiting:
            waiting = self._dismiss()
        if waiting:
            raise TimeoutError(self._stacks(sorted(waiting)))
        return [values[rank] for rank in range(self.world_size)]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()

    def _receive(self, rank: int) -> tuple[bool, Any]:
        """(True, the value) or (False, why there is none)."""
        try:
            returned, payload = self.pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            return False, self._obituary(rank)
        return returned, pickle.loads(payload) if returned else payload

    def _obituary(self, rank: int) -> str:
        process = self.processes[rank]
        process.join(GRACE_S)
        code = process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return f"died by {how} without a traceback\n{self._stack(rank)}".rstrip()

    def _dismiss(self) -> set[int]:
        """Lets the ranks go, all at once: one that left early would break the connections of those still at work."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(max(0.0, self.deadline - time.monotonic()))
        return {rank for rank, process in enumerate(self.processes) if process.is_alive()}

    def _stacks(self, ranks: list[int]) -> str:
        for rank in ranks:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)  # see _rank_main
        time.sleep(GRACE_S)
        head = f"still running after {self.job.timeout_s:g} s: rank {', '.join(map(str, ranks))} of {self.world_size}"
        return "\n".join([head, *(f"rank {rank}: {self._stack(rank)}" for rank in ranks)])

    def _stack(self, rank: int) -> str:
        path = _stack_file(self.job, rank)
        stack = path.read_text() if path.exists() else ""
        return stack.partition(f'  File "{__file__}"')[0].strip()  # below are only our own frames


def _rank_error(failures: dict[int, str]) -> RankError:
    """A death comes before an exception: losing a rank makes the others raise, and they may be heard first."""
    order = sorted(failures, key=lambda rank: not failures[rank].startswith("died"))  # stable: else as heard
    first, *others = order
    lines = [f"rank {first}: {failures[first]}"]
    lines += [f"rank {rank} after it: {failures[rank].strip().splitlines()[-1]}" for rank in others]
    return RankError(first, "\n".join(lines))


def _stack_file(job: _Job, rank: int) -> Path:
    return Path(job.folder) / f"stack-{rank}.txt"


def _rank_main(rank: int, world_size: int, pipe: Connection, job: _Job) -> None:
    """The child's side."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with open(_stack_file(job, rank), "w") as stacks:
        faulthandler.enable(stacks, all_threads=False)  # a segmentation fault leaves its Python stack
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)  # so does a rank that hangs
        try:
            fn, args = pickle.loads(job.call)
            _join(rank, world_size, job)
            message = (True, pickle.dumps(fn(rank, world_size, *args)))
        except BaseException:
            message = (False, traceback.format_exc())
        pipe.send(message)
        with contextlib.suppress(EOFError):
            pipe.recv()  # end of file: every rank is done; until then a failed one must not drag the others down
        finish()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # the parent was killed: nobody else would end a rank that waits in a collective


def _join(rank: int, world_size: int, job: _Job) -> None:
    os.environ.clear()
    os.environ.update(job.environment, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    with contextlib.suppress(OSError):  # local ranks meet on the loopback; a host name may not resolve
        for _, name in socket.if_nameindex():
            if name in ("lo", "lo0"):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    _divide_threads(world_size)
    if "nccl" in job.backend:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        job.backend,
        init_method=f"file://{job.folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=job.timeout_s),
    )
