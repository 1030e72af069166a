"""Pipeline schedules as data: for each rank the list of what it does, in order. pipeline.py runs such lists,
simulate.py times them, draw.py draws them, `validate` here says what is wrong with one.

The model is cut into p v chunks of neighbouring layers, p pipeline ranks (`stages`) with v of them each: chunk c is on
rank c mod p. m micro-batches go through. Sources: GPipe (Huang et al. 2019), 1F1B (PipeDream-Flush, Narayanan et al.
2021), interleaved 1F1B (Megatron-LM, Narayanan et al. 2021, section 2.2), ZB-H1 (zero bubble, Qi et al. 2023).
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]
COMPUTE = ("F", "B", "I", "W")
Name = Literal["gpipe", "1f1b", "interleaved-1f1b", "zb-h1"]
NAMES: tuple[str, ...] = get_args(Name)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One step of one rank.

    F forward, B backward; or the two halves of B: I gradient of the input, W gradient of the weights. SEND_F sends what
    F made to the next chunk, RECV_F receives F's input; SEND_B and RECV_B likewise for the gradients of B or I.
    """

    kind: Kind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of chunk {self.chunk}, micro-batch {self.microbatch}"


Lists = list[list[Instruction]]  # by rank


def schedule(name: str, stages: int, microbatches: int, chunks: int = 1) -> Lists:
    """The computing instructions of each rank. Raises ValueError for names and numbers that do not go together."""
    check(name, stages, microbatches, chunks)
    if name == "gpipe":
        return [_gpipe(rank, microbatches) for rank in range(stages)]
    if name == "1f1b":
        return [_one_forward_one_backward(rank, stages, microbatches) for rank in range(stages)]
    if name == "zb-h1":
        return [_zero_bubble(rank, stages, microbatches) for rank in range(stages)]
    return [_interleaved(rank, stages, microbatches, chunks) for rank in range(stages)]


def check(name: str, stages: int, microbatches: int, chunks: int = 1) -> None:
    """Raises ValueError where there is no such schedule."""
    what = f"{name} with stages {stages}, microbatches {microbatches}, chunks {chunks}"
    if name not in NAMES:
        raise ValueError(f"schedule {name!r}: expected one of {', '.join(NAMES)}")
    for number in (stages, microbatches, chunks):
        if not (isinstance(number, int) and number >= 1):
            raise ValueError(f"{what}: expected whole numbers of at least 1")
    if name != "interleaved-1f1b" and chunks != 1:
        raise ValueError(f"{what}: expected 1 chunk a rank, only interleaved-1f1b has more")
    if name == "interleaved-1f1b" and chunks == 1:
        raise ValueError(f"{what}: expected at least 2 chunks a rank; with 1 it is 1f1b")
    if name == "interleaved-1f1b" and microbatches % stages:
        raise ValueError(f"{what}: expected microbatches to be a multiple of stages")


def _gpipe(rank: int, m: int) -> list[Instruction]:
    """All forward passes, then all backward passes, last in first out."""
    return [Instruction("F", rank, i) for i in range(m)] + [Instruction("B", rank, i) for i in reversed(range(m))]


def _one_forward_one_backward(rank: int, p: int, m: int) -> list[Instruction]:
    """p - rank forward passes, then one backward and one forward in turn: never more than p - rank in flight."""
    warm = min(p - rank - 1, m)
    forwards = [Instruction("F", rank, i) for i in range(m)]
    backwards = [Instruction("B", rank, i) for i in range(m)]
    steady = [x for pair in zip(forwards[warm:], backwards, strict=False) for x in pair]
    return forwards[:warm] + steady + backwards[m - warm :]


def _interleaved(rank: int, p: int, m: int, v: int) -> list[Instruction]:
    """1F1B over v chunks. Micro-batches go in groups of p, each group through all of this rank's chunks in turn."""
    groups = [range(start, start + p) for start in range(0, m, p)]
    order = [(chunk, i) for group in groups for chunk in range(v) for i in group]
    forwards = [Instruction("F", chunk * p + rank, i) for chunk, i in order]
    backwards = [Instruction("B", (v - 1 - chunk) * p + rank, i) for chunk, i in order]
    warm = min(2 * (p - rank - 1) + (v - 1) * p, m * v)
    steady = [x for pair in zip(forwards[warm:], backwards, strict=False) for x in pair]
    return forwards[:warm] + steady + backwards[m * v - warm :]


def _zero_bubble(rank: int, p: int, m: int) -> list[Instruction]:
    """1F1B where W waits: rank r lets r of them wait, as many as it has forward passes fewer in flight than rank 0. In
    the end they fill the time in which 1F1B waits for gradients."""
    out, waiting, done = [], 0, 0
    for x in _one_forward_one_backward(rank, p, m):
        if x.kind == "F":
            out.append(x)
            continue
        out.append(Instruction("I", rank, x.microbatch))
        waiting += 1
        if waiting > rank:
            out.append(Instruction("W", rank, done))
            waiting, done = waiting - 1, done + 1
    return out + [Instruction("W", rank, i) for i in range(done, m)]


def bubble(name: str, stages: int, microbatches: int, chunks: int = 1) -> float:
    """The share of the time in which ranks wait when F, I and W take the same time, B twice that, communication none.

    As published; ZB-H1's 3 m + p - 1 holds for m >= p. With fewer micro-batches the rank 0 has to wait: p times F and p
    times I pass before the first W ends, and two of the three halves of each other micro-batch.
    """
    check(name, stages, microbatches, chunks)
    p, m = stages, microbatches
    if name == "zb-h1":
        return 1 - 3 * m / max(3 * m + p - 1, 2 * m + 2 * p - 1)
    return (p - 1) / (m * chunks + p - 1)


def peaks(name: str, stages: int, microbatches: int, chunks: int = 1) -> list[int]:
    """By rank, of how many (chunk, micro-batch) the activations are alive at most: from F to the end of B or W."""
    check(name, stages, microbatches, chunks)
    if name == "gpipe":
        return [microbatches] * stages
    if name == "zb-h1":
        return [min(stages, microbatches)] * stages
    extra, step = ((chunks - 1) * stages, 2) if name == "interleaved-1f1b" else (0, 1)
    return [min(step * (stages - rank - 1) + extra + 1, microbatches * chunks) for rank in range(stages)]


def peak(instructions: Sequence[Instruction]) -> int:
    """The same, counted in one rank's list."""
    alive = most = 0
    for x in instructions:
        alive += (x.kind == "F") - (x.kind in ("B", "W"))
        most = max(most, alive)
    return most


def with_communication(lists: Lists) -> Lists:
    """The lists with sends right behind what makes a message, receives right before what needs it.

    A pair of ranks has one channel each way, in which messages keep their order: so a receive is preceded by those of
    all messages that the same rank sends earlier. They were sent before, so that nobody waits longer for it.
    """
    sent: list[list[tuple[int, Instruction]]] = [[] for _ in lists]  # by rank: (to, the receive over there)
    out: Lists = []
    stages, total = len(lists), count_chunks(lists)
    for rank, instructions in enumerate(lists):
        made = []
        for x in instructions:
            made.append(x)
            if (target := target_of(x, total)) is not None and target % stages != rank:
                kind = "F" if x.kind == "F" else "B"
                made.append(Instruction(f"SEND_{kind}", x.chunk, x.microbatch))
                sent[rank].append((target % stages, Instruction(f"RECV_{kind}", target, x.microbatch)))
        out.append(made)
    return [_with_receives(rank, made, sent, total) for rank, made in enumerate(out)]


def _with_receives(rank: int, instructions, sent, total: int) -> list[Instruction]:
    stages = len(sent)
    inbox = [deque(x for to, x in messages if to == rank) for messages in sent]
    out: list[Instruction] = []
    received: set[Instruction] = set()
    for x in instructions:
        wanted = Instruction("RECV_F" if x.kind == "F" else "RECV_B", x.chunk, x.microbatch)
        if (source := source_of(x, total)) is not None and source % stages != rank:
            messages = inbox[source % stages]
            while wanted not in received:
                if not messages:
                    raise ValueError(f"rank {rank}: {x} needs what rank {source % stages} never sends")
                received.add(messages[0])
                out.append(messages.popleft())
        out.append(x)
    return out


def early_receives(lists: Lists) -> Lists:
    """The same with each receive one computation earlier: the message comes while the rank computes. Only for receives
    that do not block."""
    out = []
    for instructions in lists:
        moved: list[Instruction] = []
        before = 0  # where the last computation stands
        for x in instructions:
            if x.kind.startswith("RECV"):
                moved.insert(before, x)
                before += 1
                continue
            if x.kind in COMPUTE:
                before = len(moved)
            moved.append(x)
        out.append(moved)
    return out


def count_chunks(lists: Lists) -> int:
    return 1 + max((x.chunk for instructions in lists for x in instructions), default=-1)


def target_of(x: Instruction, total: int) -> int | None:
    """The chunk that needs what x makes; None for the loss, the first chunk's gradient, and weight gradients."""
    if x.kind == "F":
        return x.chunk + 1 if x.chunk + 1 < total else None
    return x.chunk - 1 if x.kind in ("B", "I") and x.chunk else None


def source_of(x: Instruction, total: int) -> int | None:
    """The chunk whose result x needs; None for the tokens and the loss, and W, which needs its own I."""
    if x.kind == "F":
        return x.chunk - 1 if x.chunk else None
    return x.chunk + 1 if x.kind in ("B", "I") and x.chunk + 1 < total else None


def execution(lists: Lists, room: int | None = None) -> Iterator[tuple[int, Instruction]]:
    """(rank, instruction) in an order in which everything can happen, of lists with communication.

    Receives block, and must find the message that they expect; sends block while `room` messages (None: any number)
    to the same rank are not yet received. Raises ValueError, with what each rank stands at, when all wait.
    """
    stages, total = len(lists), count_chunks(lists)
    at = [0] * stages
    done: set[Instruction] = set()
    channels: dict[tuple[int, int], list[Instruction]] = defaultdict(list)  # (from, to): the receives they wait for

    def try_next(rank: int) -> bool:
        x = lists[rank][at[rank]]
        if x.kind.startswith("RECV"):
            source = x.chunk - 1 if x.kind == "RECV_F" else x.chunk + 1
            messages = channels[source % stages, rank]
            if not messages or messages[0] != x:
                return False
            messages.pop(0)
        elif x.kind.startswith("SEND"):
            target = x.chunk + 1 if x.kind == "SEND_F" else x.chunk - 1
            messages = channels[rank, target % stages]
            if room is not None and len(messages) >= room:
                return False
            messages.append(Instruction(f"RECV_{x.kind[-1]}", target, x.microbatch))
        elif not done.issuperset(needs(x, rank, stages, total)):
            return False
        done.add(x)
        at[rank] += 1
        return True

    while unfinished := [rank for rank in range(stages) if at[rank] < len(lists[rank])]:
        before = sum(at)
        for rank in unfinished:
            while at[rank] < len(lists[rank]) and try_next(rank):
                yield rank, lists[rank][at[rank] - 1]
        if sum(at) == before:
            stuck = "; ".join(f"rank {rank} at {lists[rank][at[rank]]}" for rank in unfinished)
            raise ValueError(f"deadlock: {stuck}")
    if left := [messages[0] for messages in channels.values() if messages]:
        raise ValueError(f"sent but never received: {left[0]}")


def needs(x: Instruction, rank: int, stages: int, total: int) -> set[Instruction]:
    """What must be over on this rank before the computing instruction x."""
    found = set()
    if x.kind in ("B", "I"):
        found.add(Instruction("F", x.chunk, x.microbatch))
    if x.kind == "W":
        found.add(Instruction("I", x.chunk, x.microbatch))
    if (source := source_of(x, total)) is not None:
        away = source % stages != rank
        if x.kind == "F":
            found.add(Instruction("RECV_F", x.chunk, x.microbatch) if away else Instruction("F", source, x.microbatch))
        else:
            found.add(
                Instruction("RECV_B", x.chunk, x.microbatch) if away else Instruction(x.kind, source, x.microbatch)
            )
    return found


def validate(lists: Lists, microbatches: int, chunks: int = 1, most: Sequence[int] | None = None) -> None:
    """Raises ValueError, saying where, for lists of computing instructions that are no pipeline schedule.

    Each chunk's F, and B or both of I and W, stand exactly once for each micro-batch, on the chunk's rank; a message
    sent is a message received; the ranks never wait for each other in a circle, with no more than `room_for(stages)`
    messages on the way; and on each rank at most `most[rank]` activations are alive (None: not asked).
    """
    stages = len(lists)
    for rank, instructions in enumerate(lists):
        for x, times in Counter(instructions).items():
            if x.kind not in COMPUTE or not (0 <= x.chunk < stages * chunks and 0 <= x.microbatch < microbatches):
                raise ValueError(f"rank {rank}: {x}: expected F, B, I or W of {stages * chunks} chunks and "
                                 f"{microbatches} micro-batches")  # fmt: skip
            if x.chunk % stages != rank or times > 1:
                raise ValueError(f"rank {rank}: {x}, {times} times: expected once, on rank {x.chunk % stages}")
    present = {x for instructions in lists for x in instructions}
    for chunk in range(stages * chunks):
        for i in range(microbatches):
            kinds = [kind for kind in COMPUTE if Instruction(kind, chunk, i) in present]
            if kinds not in (["F", "B"], ["F", "I", "W"]):
                raise ValueError(f"chunk {chunk}, micro-batch {i}: {kinds}: expected F and B, or F, I and W")
    for _ in execution(with_communication(lists), room_for(stages)):
        pass
    for rank, limit in enumerate(most or ()):
        if peak(lists[rank]) > limit:
            raise ValueError(f"rank {rank}: {peak(lists[rank])} activations alive at once: expected at most {limit}")


def room_for(stages: int) -> int:
    """How many messages to one rank may be on the way before the sender waits."""
    return 2 * stages
