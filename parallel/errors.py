"""How a program of several ranks ends: what all ranks find wrong is said once, and no rank stays behind.

common/cli.py's `run` for N ranks: it needs torchrun, whose store is where the ranks' watchdogs meet before and after
init_process_group. One process, or ranks that something else started, get common/cli.py's own `run`. Refused: to tell
a user's mistake from a bug by anything but the exception's class.
"""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

from common import cli
from parallel.board import Board, board_from_env
from parallel.debug import Watchdog
from parallel.waits import Error

Config = TypeVar("Config")


def run_ranks(
    main: Callable[[Config, Watchdog], int | None], configure: Callable[[], Config], *, board: Board | None = None
) -> NoReturn:
    """Calls main(configure(), watchdog) and exits with its code; the watchdog is to be made a listener of every Comm.

    UserError, ValueError, FileNotFoundError and what argparse finds wrong in `configure` are the user's: one line from
    rank 0, with the numbers of the ranks in front unless all have it, and exit code 2. Any other exception is a bug,
    with its traceback, and 1. An error of some ranks ends the others within seconds, with the same code. main may set
    `watchdog.limit_s` and `watchdog.folder`. `board` is by default the store of torchrun's agent.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if os.environ.get("WORLD_SIZE", "1").isdigit() else 1
    board = board or (board_from_env() if world_size > 1 else None)
    if board is None:
        cli.run(lambda: main(configure(), Watchdog(None, 0, 1)))
    watchdog = Watchdog(board, int(os.environ["RANK"]), world_size)
    try:
        watchdog.start()
    except cli.UserError:  # a rank that is there twice has no place on the board; the others tell
        sys.exit(2)
    try:
        code = main(_parsed(configure, watchdog.rank), watchdog)
        sys.stdout.flush()
    except SystemExit as leave:
        if leave.code:
            watchdog.fail(_described(leave))
        code = 0
    except BaseException as error:
        watchdog.fail(_described(error))
    watchdog.stop()
    sys.exit(code)


def _parsed(configure: Callable[[], Config], rank: int) -> Config:
    """argparse prints and leaves by SystemExit: --help is printed by rank 0 alone, errors go the way of all errors."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return configure()
    except SystemExit as leave:
        if leave.code:
            raise cli.UserError(err.getvalue().partition(": error: ")[2].strip() or err.getvalue()) from None
        if rank == 0:
            print(out.getvalue(), end="", flush=True)
        raise


def _described(error: BaseException) -> Error:
    if isinstance(error, BrokenPipeError):  # an output whose reader has enough
        return Error("user", "", 141)
    if isinstance(error, KeyboardInterrupt):
        return Error("user", "interrupted", 130)
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return Error("user", f"{error.strerror}: {error.filename}", 2)
    if isinstance(error, cli.UserError | ValueError | FileNotFoundError):
        return Error("user", " ".join(str(error).split()) or type(error).__name__, 2)
    if isinstance(error, SystemExit):
        said = not isinstance(error.code, int)
        return Error("user", str(error.code) if said else f"exit code {error.code}", 1 if said else error.code)
    return Error("bug", "".join(traceback.format_exception(error)), 1)
