"""Pipeline schedules: their published bubbles and memory, and a validator that lets no broken one through."""

import random
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from parallel import draw, schedules
from parallel.schedules import NAMES, Instruction, bubble, execution, peaks, schedule, validate, with_communication
from parallel.simulate import Durations, Timeline, simulate


def cases(most: int, seed: int = 0) -> Iterator[tuple[str, int, int, int]]:
    """Possible (name, stages, microbatches, chunks) at random."""
    generator = random.Random(seed)
    for _ in range(most):
        name, p = generator.choice(NAMES), generator.randint(1, 8)
        v = generator.randint(2, 4) if name == "interleaved-1f1b" else 1
        m = p * generator.randint(1, 4) if name == "interleaved-1f1b" else generator.randint(1, 20)
        yield name, p, m, v


def brute_force_peak(instructions: list[Instruction]) -> int:
    """The most (chunk, micro-batch) pairs with F behind and their last instruction still ahead or under way."""
    last = {(x.chunk, x.microbatch): i for i, x in enumerate(instructions)}
    first = {(x.chunk, x.microbatch): i for i, x in reversed(list(enumerate(instructions)))}
    return max(sum(first[key] <= now <= last[key] for key in last) for now in range(len(instructions)))


@pytest.mark.parametrize("p", range(2, 17))
def test_simulated_bubble_is_the_published_formula(p):
    for m in (p, p + 1, 2 * p + 3) if p <= 8 else (p + 5,):
        for name in ("gpipe", "1f1b", "zb-h1"):
            want = Fraction(p - 1, (3 * m if name == "zb-h1" else m) + p - 1)
            timeline = simulate(schedule(name, p, m))
            assert abs(timeline.bubble - want) <= 1e-12, (name, m)
            assert abs(bubble(name, p, m) - want) <= 1e-12, (name, m)
    for v, rounds in ((2, 1), (2, 3), (3, 2)) if p <= 8 else ((2, 1),):
        m = rounds * p
        want = Fraction(p - 1, v) / (m + Fraction(p - 1, v))
        assert abs(simulate(schedule("interleaved-1f1b", p, m, v)).bubble - want) <= 1e-12, (v, m)


def test_bubble_with_fewer_microbatches_than_ranks():
    for p in range(1, 9):
        for m in range(1, p + 1):
            for name in ("gpipe", "1f1b", "zb-h1"):
                assert abs(simulate(schedule(name, p, m)).bubble - bubble(name, p, m)) <= 1e-12, (name, p, m)


def test_bubble_with_other_durations():
    """(p-1)(F+B) for 1F1B; (p-1)(F+I-W) for ZB-H1 where the halves are as long as each other (Qi et al., table 1)."""
    for p, m in ((4, 8), (5, 11)):
        times = Durations(forward=0.5, input_gradient=1.25, weight_gradient=0.75)
        assert simulate(schedule("1f1b", p, m), times).total == (m + p - 1) * 2.5
        times = Durations(forward=2.0, input_gradient=2.0, weight_gradient=2.0)
        assert simulate(schedule("zb-h1", p, m), times).total == 3 * 2.0 * m + (p - 1) * 2.0


def test_communication_takes_time():
    """By hand: one micro-batch goes down and up p ranks, with a message between each two."""
    times = Durations(1.0, 1.0, 1.0, 0.25)
    assert simulate(schedule("1f1b", 4, 1), times).total == 4 * 3 + 6 * 0.25
    assert simulate(schedule("1f1b", 1, 3), times).total == 9


def test_random_schedules_are_valid_and_keep_to_the_memory_of_theory():
    for name, p, m, v in cases(80):
        lists = schedule(name, p, m, v)
        validate(lists, m, v, peaks(name, p, m, v))
        assert [brute_force_peak(x) for x in lists] == peaks(name, p, m, v) == simulate(lists).peaks, (name, p, m, v)


def test_memory_of_theory():
    assert peaks("gpipe", 4, 10) == [10] * 4
    assert peaks("1f1b", 4, 10) == [4, 3, 2, 1]
    assert peaks("zb-h1", 4, 10) == [4] * 4
    assert peaks("interleaved-1f1b", 4, 12, 2) == [11, 9, 7, 5]


def test_timelines_keep_every_dependency():
    """Brute force over pairs of events, with messages that take a third of a unit."""
    for name, p, m, v in cases(40, seed=1):
        times = Durations(1.0, 1.5, 0.5, 1 / 3)
        timeline = simulate(schedule(name, p, m, v), times)
        ends = {e.instruction: e.end for row in timeline.events for e in row}
        for row in timeline.events:
            assert all(a.end <= b.start for a, b in pairwise(row))
            for e in row:
                x = e.instruction
                assert e.end == e.start + times.of(x)
                chunk = {"F": x.chunk - 1, "W": x.chunk}.get(x.kind, x.chunk + 1)
                kind = "I" if x.kind == "W" else x.kind
                before = ends.get(Instruction(kind, chunk, x.microbatch))
                assert before is None or e.start >= before + times.communication * (chunk % p != x.chunk % p)


def test_no_deadlock_when_receives_block_and_hardly_a_message_may_wait():
    for name, p, m, v in cases(60, seed=2):
        lists = with_communication(schedule(name, p, m, v))
        assert sum(1 for _ in execution(lists, room=2)) == sum(map(len, lists))


def test_early_receives_change_nothing_but_their_place():
    for name, p, m, v in cases(60, seed=5):
        lists = with_communication(schedule(name, p, m, v))
        for before, after in zip(lists, schedules.early_receives(lists), strict=True):
            for receives in (False, True):
                a, b = ([x for x in y if x.kind.startswith("RECV") == receives] for y in (before, after))
                assert a == b
            place = {x: i for i, x in enumerate(after)}
            computed = [x for x in after if x.kind in schedules.COMPUTE]
            for a, b in pairwise(computed):
                wanted = Instruction("RECV_F" if b.kind == "F" else "RECV_B", b.chunk, b.microbatch)
                assert b.kind == "W" or place.get(wanted, -1) < place[a]


def broken(generator: random.Random, lists: schedules.Lists, m: int) -> tuple[str, schedules.Lists]:
    """One list with a mistake that no order of the other lists can mend."""
    lists = [list(x) for x in lists]
    rank = generator.randrange(len(lists))
    row = lists[rank]
    at = generator.randrange(len(row))
    how = generator.choice(["missing", "twice", "too late", "elsewhere", "backward first", "another micro-batch"])
    if how == "missing":
        del row[at]
    elif how == "twice":
        row.insert(generator.randrange(len(row) + 1), row[at])
    elif how == "too late":
        row.append(Instruction("F", row[at].chunk, m))
    elif how == "elsewhere":
        lists[(rank + 1) % len(lists)].append(row.pop(at))
    elif how == "backward first":
        x = row[at]
        pair = [i for i, y in enumerate(row) if (y.chunk, y.microbatch) == (x.chunk, x.microbatch)]
        row[pair[0]], row[pair[1]] = row[pair[1]], row[pair[0]]
    else:
        row[at] = Instruction(row[at].kind, row[at].chunk, -1)
    return how, lists


def test_broken_schedules_are_rejected():
    generator = random.Random(3)
    seen = set()
    for name, p, m, v in cases(120, seed=3):
        if p == 1:
            continue
        how, lists = broken(generator, schedule(name, p, m, v), m)
        seen.add(how)
        with pytest.raises(ValueError):
            validate(lists, m, v)
    assert len(seen) == 6


def test_swaps_are_rejected_exactly_when_they_deadlock():
    """Neighbours of a list swapped at random: valid if and only if the graph of all dependencies has no circle."""
    generator = random.Random(4)
    outcomes = set()
    for name, p, m, v in cases(100, seed=4):
        lists = [list(x) for x in schedule(name, p, m, v)]
        row = generator.choice(lists)
        for _ in range(3):
            a, b = generator.randrange(len(row)), generator.randrange(len(row))
            row[a], row[b] = row[b], row[a]
        possible = has_an_order(lists, p * v)
        outcomes.add(possible)
        if possible:
            validate(lists, m, v)
        else:
            with pytest.raises(ValueError, match="deadlock"):
                validate(lists, m, v)
    assert outcomes == {True, False}


def has_an_order(lists: schedules.Lists, chunks: int) -> bool:
    """Of computations alone, by repeatedly doing whatever can be done."""
    done, at = set(), [0] * len(lists)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(lists):
            if at[rank] == len(row):
                continue
            x = row[at[rank]]
            needs = {
                "F": [("F", x.chunk - 1)] if x.chunk else [],
                "W": [("I", x.chunk)],
            }.get(x.kind, [("F", x.chunk)] + ([(x.kind, x.chunk + 1)] if x.chunk + 1 < chunks else []))
            if all((kind, chunk, x.microbatch) in done for kind, chunk in needs):
                done.add((x.kind, x.chunk, x.microbatch))
                at[rank] += 1
                moved = True
    return at == [len(row) for row in lists]


def test_a_deadlock_says_where_everybody_stands():
    lists = schedule("1f1b", 2, 2)
    lists[1].reverse()
    with pytest.raises(ValueError, match="deadlock: rank 0 at .*; rank 1 at B of chunk 1, micro-batch 1"):
        validate(lists, 2)


def test_too_much_memory_is_rejected():
    with pytest.raises(ValueError, match="rank 0: 6 activations alive at once: expected at most 4"):
        validate(schedule("gpipe", 4, 6), 6, 1, peaks("1f1b", 4, 6))


def test_lost_and_crossed_messages_are_rejected():
    lists = with_communication(schedule("1f1b", 2, 3))
    lost = [[x for x in lists[0]], [x for x in lists[1] if x != Instruction("RECV_F", 1, 2)]]
    with pytest.raises(ValueError, match="deadlock"):
        list(execution(lost))
    unread = [[x for x in lists[0] if x.kind not in ("RECV_B", "B")], lists[1]]
    with pytest.raises(ValueError, match="never received: RECV_B"):
        list(execution(unread))
    crossed = [list(x) for x in lists]
    sends = [i for i, x in enumerate(crossed[0]) if x.kind == "SEND_F"]
    crossed[0][sends[0]], crossed[0][sends[1]] = crossed[0][sends[1]], crossed[0][sends[0]]
    with pytest.raises(ValueError, match="deadlock"):
        list(execution(crossed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 2), "schedule '2f2b': expected one of gpipe, 1f1b, interleaved-1f1b, zb-h1"),
        (("gpipe", 0, 2), "stages 0, microbatches 2, chunks 1: expected whole numbers of at least 1"),
        (("1f1b", 2, 0), "microbatches 0"),
        (("1f1b", 2, 2.0), "microbatches 2.0"),
        (("zb-h1", 2, 2, 2), "zb-h1 with stages 2, microbatches 2, chunks 2: expected 1 chunk"),
        (("interleaved-1f1b", 2, 2), "chunks 1: expected at least 2"),
        (("interleaved-1f1b", 4, 6, 2), "stages 4, microbatches 6, chunks 2: expected microbatches to be a multiple"),
    ],
)
def test_impossible_combinations(arguments, message):
    for function in (schedule, bubble, peaks):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(*arguments)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_durations_out_of_range(value):
    with pytest.raises(ValueError, match="weight_gradient"):
        Durations(weight_gradient=value)


def test_drawing_shows_every_computation(tmp_path, capsys):
    out = tmp_path / "folder" / "zb.svg"
    arguments = ["--draw", "zb-h1", "--stages", "4", "--microbatches", "8", "--out", str(out)]
    draw.main(arguments)
    text = out.read_text()
    draw.main(arguments)
    assert out.read_text() == text
    assert [line for line in capsys.readouterr().out.splitlines() if "bubble" in line or "peak" in line][:2] == [
        "bubble 0.1111 (published, for F = I = W and no communication: 0.1111)",
        "peak activations by rank: 4 4 4 4 (pairs of chunk and micro-batch)",
    ]
    space = "{http://www.w3.org/2000/svg}"
    picture = ElementTree.fromstring(text)
    assert "bubble 0.1111" in picture.find(f"{space}title").text
    tips = [box.find(f"{space}title").text for box in picture.iter(f"{space}rect") if len(box)]
    assert len(tips) == 4 * 8 * 3 and "I of chunk 3, micro-batch 0: 4 to 5" in tips
    boxes = [box for box in picture.iter(f"{space}rect") if len(box)]
    spans = [(float(box.get("x")), float(box.get("x")) + float(box.get("width"))) for box in boxes]
    assert min(a for a, b in spans) == 64 and abs(max(b for a, b in spans) - 1064) <= 0.02


def test_drawing_refuses(capsys):
    with pytest.raises(ValueError, match="without events"):
        draw.svg(Timeline([[], []], [0, 0]), "nothing")
    with pytest.raises(SystemExit):
        draw.main(["--draw", "interleaved-1f1b", "--stages", "4", "--microbatches", "6", "--chunks", "2"])
    assert "multiple of stages" in capsys.readouterr().err
