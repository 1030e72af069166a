"""Ranks that call different collectives are named at once, instead of hanging: the checked mode, which is slow.

A Listener that compares each call of a group with those of its other ranks before it begins: name, number, op, dtype,
bytes and source. Through a board, so that a rank which is somewhere else altogether is seen too. It makes every call
wait for all ranks of its group, so the order of calls of different groups must be the same as well. Refused: sends and
receives, and the sizes of all_to_all, which may differ by right.
"""

import json
import time

from parallel.board import Board
from parallel.comm import Call
from parallel.waits import named, size

POLL_S = 0.0005


class DesyncError(RuntimeError):
    """Raised on all ranks of the group, before the collective begins."""


class DesyncDetector:
    """Every rank of a group must have one, made for the same board. A rank that does not come within `limit_s` seconds
    counts as different too."""

    def __init__(self, board: Board, rank: int, limit_s: float = 30.0):
        if not limit_s > 0:
            raise ValueError(f"limit_s {limit_s!r}: expected a positive number of seconds")
        self.board, self.rank, self.limit_s = board, rank, limit_s
        self._last: dict[str, list[dict]] = {}  # of each group, the last two calls

    def started(self, call: Call) -> None:
        if call.name in ("send", "receive"):
            return
        group, number = _key(call), call.number
        mine = _described(call)
        # Two calls: another rank may have compared this one and gone on to the next, but never beyond.
        self._last[group] = [*self._last.get(group, [])[-1:], mine]
        self.board.post(f"{group}-by-{self.rank}", json.dumps(self._last[group]))
        self.board.post(f"at-{self.rank}", json.dumps({"group": group, "call": mine, "ranks": call.group.ranks}))
        said = {rank: mine if rank == self.rank else self._of(rank, group, number, call) for rank in call.group.ranks}
        if len({json.dumps({**one, "tag": ""}) for one in said.values()}) > 1:
            lines = [f"{named(ranks)} {text}" for text, ranks in _grouped(said).items()]
            raise DesyncError(f"call no {number} of {call.group.label} ({named(call.group.ranks)}) is not the same on "
                              f"all: {'; '.join(lines)}")  # fmt: skip

    def ended(self, call: Call) -> None:
        pass

    def _of(self, rank: int, group: str, number: int, call: Call) -> dict:
        """What the rank calls as this number of the group, once it does."""
        deadline = time.monotonic() + self.limit_s
        while True:
            for one in json.loads(self.board.read(f"{group}-by-{rank}") or "[]"):
                if one["number"] == number:
                    return one
            at = json.loads(self.board.read(f"at-{rank}") or "null")
            late = time.monotonic() > deadline
            if late or (at and self._waits_for_me(at)):
                where = (
                    f"is in {_text(at['call'])} no {at['call']['number']} of {_label(at)}"
                    if at
                    else "has called nothing"
                )
                raise DesyncError(f"rank {self.rank} calls {_text(_described(call))} no {number} of {call.group.label} "
                                  f"({named(call.group.ranks)}), but rank {rank} {where}"
                                  f"{f' for {self.limit_s:g} s' if late else ''}")  # fmt: skip
            time.sleep(POLL_S)

    def _waits_for_me(self, at: dict) -> bool:
        """In another group, at a call that this rank has not come to: then neither would ever go on."""
        if self.rank not in at["ranks"]:
            return False
        mine = self._last.get(at["group"])
        return not mine or mine[-1]["number"] < at["call"]["number"]


def _key(call: Call) -> str:
    return f"{call.group.label}-of-{'.'.join(map(str, call.group.ranks))}"


def _label(at: dict) -> str:
    return f"{at['group'].partition('-of-')[0]} ({named(at['ranks'])})"


def _described(call: Call) -> dict:
    dtype = "" if call.dtype is None else str(call.dtype).removeprefix("torch.")
    payload = None if call.name == "all_to_all" else call.payload
    return {"name": call.name, "number": call.number, "dtype": dtype, "payload": payload, "peer": call.peer,
            "op": call.op, "tag": call.tag}  # fmt: skip


def _text(one: dict) -> str:
    about = [one["name"], one["op"]] if one["op"] else [one["name"]]
    if one["payload"]:
        about.append(f"{size(one['payload'])} {one['dtype']}")
    if one["peer"] is not None:
        about.append(f"from {one['peer']}")
    if one["tag"]:
        about.append(f"({one['tag']})")
    return " ".join(about)


def _grouped(said: dict[int, dict]) -> dict[str, list[int]]:
    ranks: dict[str, list[int]] = {}
    for rank, one in said.items():
        ranks.setdefault(_text(one), []).append(rank)
    return ranks
