"""Who waits where: a watchdog thread a rank that ends a broken run within seconds and says which rank stands where.

    time-out    no call of this rank has begun or ended for `limit_s` seconds while one is under way
    death       the process of the next rank is gone (ranks watch each other in a ring), or is silent for `limit_s`
    error       this rank's program raised, see parallel/errors.py
    signal      SIGTERM: torchrun sends it to all ranks once it has seen one die

Whoever notices puts up an alarm; every rank then leaves a Status on the board, the lowest one prints the report of them
all, and all leave by os._exit, since a wait within gloo can be ended by nothing else. Refused: to go on after that.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from common.cli import UserError
from parallel.board import Board
from parallel.comm import Call
from parallel.processes import Process
from parallel.waits import Error, Silent, Status, Waiting, exit_code, report

TICK_S = 0.2
GRACE_S = 3.0  # after an alarm, the other ranks' statuses are waited for this long


class Watchdog:
    """A Listener for every Comm of this rank. Its thread watches from start to stop; `with Watchdog(...)` does both.

    `limit_s` may be changed at any time; it must be longer than the longest computation during which a call is under
    way, and than the longest time that ranks may wait for one of them (a checkpoint). With a folder, the report and
    every rank's status, with the stacks of all its Python threads, are written there too. Raises UserError when the
    board has this rank already. Without a board (a world of one) it does nothing.
    """

    def __init__(
        self, board: Board | None, rank: int, world_size: int, *, limit_s: float = 300.0, folder: Path | None = None
    ):
        if not limit_s > 0:
            raise ValueError(f"limit_s {limit_s!r}: expected a positive number of seconds")
        self.board, self.rank, self.world_size, self.folder = board, rank, world_size, folder
        self.limit_s = limit_s
        self._open: dict[int, Call] = {}
        self._events = 0  # calls begun and ended: a rank that makes progress does not hang
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._quiet = _Quiet(self)

    def started(self, call: Call) -> None:
        self._open[id(call)] = call
        self._events += 1

    def ended(self, call: Call) -> None:
        if call.over:
            self._open.pop(id(call), None)
        self._events += 1

    def _sweep(self) -> None:
        """Calls that were waited for before they were over, as those of NCCL are."""
        for key, call in list(self._open.items()):
            if call.over and self._open.pop(key, None) is not None:
                self._events += 1

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        if self.board is None:
            return
        me = Process.this()
        if not self.board.post_once(f"rank-{self.rank}", me.to_json()):
            other = Process.from_json(self.board.read(f"rank-{self.rank}"))
            text = f"rank {self.rank} is there twice: process {other.pid} on {other.host}, {me.pid} on {me.host}"
            self.board.post_once("alarm", Error("user", text, 2).to_json())  # the others would wait for the right one
            raise UserError(text)
        self._signals = _Signals()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """This rank is done; from now on its end is no death."""
        if self._thread is not None:
            self.board.post(f"ended-{self.rank}", "")
            self._signals.stop()
            self._thread.join()
            self._signals.restore()
            self._thread = None

    def fail(self, error: Error) -> NoReturn:
        """Ends all ranks because of an error of this one."""
        last = (error.text.strip().splitlines() or [f"exit code {error.code}"])[-1]
        self._finish(Error("bug", f"rank {self.rank} raised {last}", error.code), error)

    def _watch(self) -> None:
        while (number := self._signals.wait(TICK_S)) is not self._signals.STOP:
            if number is not None:
                text = f"rank {self.rank} was told to end by {signal.Signals(number).name}"
                self._finish(Error("bug", text, 128 + number))
            try:
                self._sweep()
                self.board.post(f"beat-{self.rank}", str(self._quiet.ticks))
                alarm = self.board.read("alarm") or self._quiet.trouble()
                lost = None
            except (OSError, RuntimeError) as error:  # a file system's moment of weakness, or torchrun's agent is dead
                alarm, lost = None, str(error)
            if self._quiet.since("board", lost) > self.limit_s and lost:
                alarm = f"rank {self.rank} has lost the board: {lost}"
            if alarm:
                self._finish(Error.from_json(alarm) if alarm[0] == "{" else Error("bug", alarm, 1))

    def _finish(self, alarm: Error, error: Error | None = None) -> NoReturn:
        """The end of this rank: on the thread that comes first, the other waits for it."""
        with self._lock:
            code = alarm.code
            try:
                if not self.board.post_once("alarm", alarm.to_json()):
                    alarm = Error.from_json(self.board.read("alarm"))
                self._leave_status(error)
                code = self._conclude(alarm)
            except BaseException:  # the board is gone: still end, and say what is known
                print(f"{alarm.text}\n{traceback.format_exc()}", file=sys.stderr)
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)

    def _leave_status(self, error: Error | None) -> None:
        now = time.perf_counter()
        frames = sys._current_frames()
        order = sorted(frames, key=lambda thread: thread != self._main)
        mine = self._thread.ident
        stacks = tuple("".join(traceback.format_stack(frames[thread])) for thread in order if thread != mine)
        waiting = tuple(Waiting.of(call, now) for call in list(self._open.values()))
        text = Status(self.rank, waiting, stacks, error).to_json()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"status-{self.rank}.json").write_text(text)
        self.board.post(f"status-{self.rank}", text)

    def _conclude(self, alarm: Error) -> int:
        """Waits for the others; prints the report where this is the lowest rank that answers. The exit code."""
        statuses, silent = self._collect()
        if self.rank == min(statuses) and self.board.post_once("reporter", str(self.rank)):
            text = report(alarm, statuses, silent)
            if text:
                print(text, file=sys.stderr, flush=True)
            if self.folder is not None:
                (self.folder / "report.txt").write_text(text + "\n")
            self._kill_silent(silent)
            self.board.post("reported", "")
        else:  # torchrun ends all ranks once one has left, so leave after the report
            deadline = time.monotonic() + GRACE_S
            while self.board.read("reported") is None and time.monotonic() < deadline:
                time.sleep(TICK_S / 10)
        return exit_code(alarm, statuses)

    def _collect(self) -> tuple[dict[int, Status], dict[int, Silent]]:
        statuses: dict[int, Status] = {}
        deadline = time.monotonic() + GRACE_S
        while True:
            late = time.monotonic() > deadline
            silent = {}
            for rank in range(self.world_size):
                if rank not in statuses and (text := self.board.read(f"status-{rank}")):
                    statuses[rank] = Status.from_json(text)
                if rank not in statuses:
                    silent[rank] = self._state(rank)
            if late or set(silent.values()) <= {"ended", "gone"}:
                return statuses, silent
            time.sleep(TICK_S / 10)

    def _state(self, rank: int) -> Silent:
        if self.board.read(f"ended-{rank}") is not None:
            return "ended"
        text = self.board.read(f"rank-{rank}")
        return Process.from_json(text).state() if text else "absent"

    def _kill_silent(self, silent: dict[int, Silent]) -> None:
        """A stopped process would keep its launcher waiting; state() has checked that the number is still its."""
        for rank, state in silent.items():
            if state in ("runs", "stopped"):
                os.kill(json.loads(self.board.read(f"rank-{rank}"))["pid"], signal.SIGKILL)


class _Quiet:
    """For how long nothing has happened, here and at the next rank. Counted in ticks rather than by a clock, so that a
    job that is stopped and goes on as a whole (Ctrl-Z, fg) does not take the pause for a failure."""

    def __init__(self, watchdog: Watchdog):
        self.watchdog, self.ticks = watchdog, 0
        self.next = (watchdog.rank + 1) % watchdog.world_size
        self._process: Process | None = None
        self._seen: dict[str, tuple[object, int]] = {}

    def trouble(self) -> str | None:
        self.ticks += 1
        dog = self.watchdog
        if dog._open and self.since("mine", dog._events) > dog.limit_s:
            return f"rank {dog.rank} has waited for {dog.limit_s:g} s"
        if self.next == dog.rank or dog.board.read(f"ended-{self.next}") is not None:
            return None
        if self._process is None:
            text = dog.board.read(f"rank-{self.next}")
            self._process = Process.from_json(text) if text else None
        elif self._process.state() == "gone":
            if dog.board.read(f"ended-{self.next}") is None:  # it may have ended since
                return f"rank {self.next} died: its process is gone"
        elif self.since("next", dog.board.read(f"beat-{self.next}")) > dog.limit_s:
            return f"rank {self.next} has not been heard of for {dog.limit_s:g} s"
        return None

    def since(self, what: str, value: object) -> float:
        """Seconds for which the value has been this one."""
        if what not in self._seen or self._seen[what][0] != value:
            self._seen[what] = (value, self.ticks)
        return (self.ticks - self._seen[what][1]) * TICK_S


class _Signals:
    """The watchdog's sleep, which a signal ends. Python runs handlers only between two steps of its main thread, never
    while that waits within gloo; the wake-up file is written at once, whatever the thread does."""

    STOP = 0

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._before = None
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *_: None)  # the watchdog answers it
            self._before = handler, signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)

    def wait(self, seconds: float) -> int | None:
        """None after so many seconds, else STOP or SIGTERM."""
        if not select.select([self._ours], [], [], seconds)[0]:
            return None
        number = self._ours.recv(1)[0]
        return number if number in (self.STOP, signal.SIGTERM) else None

    def stop(self) -> None:
        self._theirs.send(bytes([self.STOP]))

    def restore(self) -> None:
        if self._before is not None:
            handler, descriptor = self._before
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGTERM, handler)
        self._ours.close()
        self._theirs.close()
