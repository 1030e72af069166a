"""Where ranks leave each other notes without a collective: a folder that all see, or the store of torchrun's agent.

Notes are short texts under a key; a later one of the same key replaces the former. Nothing here waits for another rank,
so it works while every collective hangs. A board serves one start of a program: notes of an earlier one would be taken
for today's. Refused: keys that are no plain file names.
"""

import datetime
import os
import re
import secrets
from pathlib import Path
from typing import Protocol

from torch.distributed import Store, TCPStore

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")


class Board(Protocol):
    def post(self, key: str, text: str) -> None: ...

    def post_once(self, key: str, text: str) -> bool:
        """True for the one rank whose note is the first of this key; the others' are not kept."""
        ...

    def read(self, key: str) -> str | None: ...


class FolderBoard:
    """One file a note. On several machines the folder is on a file system that they share."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def post(self, key: str, text: str) -> None:
        os.replace(self._written(text), self.folder / _checked(key))

    def post_once(self, key: str, text: str) -> bool:
        temporary = self._written(text)
        try:
            os.link(temporary, self.folder / _checked(key))  # atomic, and fails where the name is taken
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def read(self, key: str) -> str | None:
        try:
            return (self.folder / _checked(key)).read_text()
        except FileNotFoundError:
            return None

    def _written(self, text: str) -> Path:
        temporary = self.folder / f".{secrets.token_hex(8)}"
        temporary.write_text(text)
        return temporary


class StoreBoard:
    """A torch store, which must live longer than the ranks: torchrun's agent keeps one, rank 0's own dies with it."""

    def __init__(self, store: Store, prefix: str = "board"):
        self.store, self.prefix = store, prefix

    def post(self, key: str, text: str) -> None:
        self.store.set(self._key(key), text)

    def post_once(self, key: str, text: str) -> bool:
        first = self.store.add(self._key(key) + ".turn", 1) == 1
        if first:
            self.post(key, text)
        else:  # the winner may be between its turn and its note
            self.store.wait([self._key(key)], datetime.timedelta(seconds=5))
        return first

    def read(self, key: str) -> str | None:
        return self.store.get(self._key(key)).decode() if self.store.check([self._key(key)]) else None

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{_checked(key)}"


def board_from_env() -> StoreBoard | None:
    """The store of the torchrun that started this process, also before init_process_group; None without one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    # A restart finds the keys of the attempt before it.
    return StoreBoard(store, f"board-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}")


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise ValueError(f"key {key!r}: expected letters, digits, and . _ + - after the first")
    return key
