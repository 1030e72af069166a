"""Logs that were changed in any place are refused there; p-values are scipy's."""

import json
import random
from itertools import combinations

import pytest

from speedrun.record_log import (
    RaceLog,
    contradictions,
    digest_of,
    linked,
    one_sided_p,
    read_log,
    seconds_to,
    source_digests,
    student_tail,
    write_log,
)


def log(steps: int = 5) -> RaceLog:
    rows = [{"step": step, "loss": 3.0 / step, "seconds": 0.25} for step in range(1, steps + 1)]
    rows[-1]["held_out_bits_per_byte"] = 1.25
    result = {"steps": steps, "train_seconds": 0.25 * steps, "bits_per_byte": 1.25}
    return RaceLog({"track": "laptop", "config": {"batch": 8}}, rows, result)


def test_a_log_comes_back(tmp_path):
    write_log(tmp_path / "race.jsonl", log())
    assert read_log(tmp_path / "race.jsonl") == log()


def test_every_changed_character_is_found_in_its_line(tmp_path):
    """Also line ends, which become other characters, and other ways to end a line."""
    path, generator = tmp_path / "race.jsonl", random.Random(0)
    write_log(path, log())
    text = path.read_bytes()
    ends = [at for at, byte in enumerate(text) if byte == 10]
    for at in [*(generator.randrange(len(text)) for _ in range(300)), *ends]:
        new = generator.choice([byte for byte in (0x20, 0x37, 0x0B, 0x0A, 0x0D, 0x1C, 0x7D, 0xC3) if byte != text[at]])
        path.write_bytes(text[:at] + bytes([new]) + text[at + 1 :])
        line = text[:at].count(b"\n") + 1
        with pytest.raises(ValueError, match=rf"race.jsonl, line {line}: changed"):
            read_log(path)


def test_every_added_or_removed_character_is_found(tmp_path):
    path, generator = tmp_path / "race.jsonl", random.Random(0)
    write_log(path, log())
    text = path.read_bytes()
    for _ in range(200):
        at = generator.randrange(len(text))
        new = generator.choice([b"", bytes([text[at], generator.choice([0x0A, 0x20, 0x30])])])
        path.write_bytes(text[:at] + new + text[at + 1 :])
        if path.read_bytes() != text:
            with pytest.raises(ValueError, match="race.jsonl, line "):
                read_log(path)


@pytest.mark.parametrize("gone", [0, 2, 5, 6])
def test_lines_that_are_gone_or_turned_round_are_found(tmp_path, gone):
    path = tmp_path / "race.jsonl"
    write_log(path, log())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:gone] + lines[gone + 1 :]))
    with pytest.raises(ValueError, match="race.jsonl"):
        read_log(path)


def test_lines_that_were_exchanged_are_found(tmp_path):
    path = tmp_path / "race.jsonl"
    write_log(path, log())
    lines = path.read_text().splitlines(keepends=True)
    for first, second in combinations(range(len(lines)), 2):
        turned = list(lines)
        turned[first], turned[second] = lines[second], lines[first]
        path.write_text("".join(turned))
        with pytest.raises(ValueError, match=f"line {first + 1}: changed"):
            read_log(path)


def test_a_line_of_another_log_is_found(tmp_path):
    """Links of two logs fit in their own place only."""
    for name, loss in (("one", 3.0), ("other", 2.0)):
        bent = log()
        bent.steps[0]["loss"] = loss
        write_log(tmp_path / name, bent)
    one, other = ((tmp_path / name).read_text().splitlines(keepends=True) for name in ("one", "other"))
    assert one[0] == other[0] and one[2] != other[2], "the loss of step 1 is in all links after it"
    (tmp_path / "mixed").write_text("".join([*one[:3], *other[3:]]))
    with pytest.raises(ValueError, match="mixed, line 4: changed"):
        read_log(tmp_path / "mixed")


def test_numbers_that_contradict_each_other(tmp_path):
    def found(change) -> str:
        rows = json.loads(json.dumps([log().about, log().steps, log().result]))
        change(*rows)
        return "; ".join(contradictions(RaceLog(*rows)))

    assert found(lambda about, steps, result: None) == ""
    assert "step 3 in the place of step 2" in found(lambda about, steps, result: steps.pop(1))
    assert "train_seconds 1.0, while the steps took 1.25" in found(
        lambda a, s, result: result.update(train_seconds=1.0)
    )
    assert "while the last step found 1.25" in found(lambda a, s, result: result.update(bits_per_byte=1.2))
    assert "step 2 took no time or less" in found(lambda a, steps, r: steps[1].update(seconds=-0.1))
    assert "a result after 9 steps, 5 of them" in found(lambda a, s, result: result.update(steps=9))
    assert "train_seconds nan" in found(lambda a, s, result: result.update(train_seconds=float("nan")))
    assert "line 3, loss: inf at step 2" in found(lambda a, steps, r: steps[1].update(loss=float("inf")))
    with pytest.raises(ValueError, match="bits_per_byte 2.0"):
        write_log(tmp_path / "x.jsonl", RaceLog(log().about, log().steps, {**log().result, "bits_per_byte": 2.0}))
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(
    "old_new",
    [('"loss": 3.0', '"loss": 9.0, "loss": 3.0'), ('"loss": 3.0', '"loss":  3.0'), ('"loss": 3.0', '"loss": 3.00'),
     ('"loss": 3.0', '"loss": x')],
)  # fmt: skip
def test_a_chain_over_lines_that_no_race_wrote(tmp_path, old_new):
    """A reader sees the first of two equal keys, a program the last."""
    path, link = tmp_path / "race.jsonl", ""
    write_log(path, log())
    lines = []
    for line in path.read_text().splitlines():
        text = line.rpartition(', "link"')[0].replace(*old_new)
        link = linked(link, f"{text}}}")
        lines.append(f'{text}, "link": "{link}"}}\n')
    path.write_text("".join(lines))
    with pytest.raises(ValueError, match=r"race.jsonl, line 2: (JSON that no race wrote|no JSON)"):
        read_log(path)


def test_a_number_beyond_floats_is_none(tmp_path):
    bent = log()
    bent.steps[1]["seconds"] = 10**400
    assert "line 3, seconds: step 2" in contradictions(bent)[0]


@pytest.mark.parametrize("text", ["", "{}\n", "a\nb\nc\n"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "race.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="race.jsonl"):
        read_log(path)
    with pytest.raises(ValueError, match="expected the log of a race"):
        read_log(tmp_path / "none.jsonl")


def test_seconds_to_a_target_are_those_of_the_first_look_at_or_below_it():
    steps = [{"seconds": 2.0}, {"seconds": 3.0, "held_out_look": 1.5}, {"seconds": 4.0, "held_out_look": 1.4}]
    steps += [{"seconds": 5.0, "held_out_look": 1.45}, {"seconds": 6.0, "held_out_bits_per_byte": 1.3}]
    assert [seconds_to(target, steps) for target in (2.0, 1.5, 1.49, 1.4, 1.35, 1.3, 1.29)] == [
        5.0, 5.0, 9.0, 9.0, 20.0, 20.0, None,
    ]  # fmt: skip


def test_the_source_has_a_digest(tmp_path):
    folder = tmp_path / "minigpt"
    folder.mkdir()
    (folder / "a.py").write_text("x = 1\n")
    (folder / "notes.md").write_text("no code")
    first = source_digests(tmp_path)
    assert list(first) == ["minigpt/a.py"]
    (folder / "a.py").write_text("x = 2\n")
    assert digest_of(source_digests(tmp_path)) != digest_of(first)
    assert "speedrun/record_log.py" in source_digests()


def test_tails_of_students_t_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 4, 9, 30):
        for t in (-3.0, -0.1, 0.0, 0.5, 2.0, 7.0, 40.0):
            assert student_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-9, abs=1e-300)


def test_p_values_by_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = [3.2781, 3.2762, 3.2790, 3.2771]
    wanted = stats.ttest_1samp(values, 3.28, alternative="less").pvalue
    assert one_sided_p(values, 3.28) == pytest.approx(wanted, rel=1e-9)
    assert one_sided_p([1.0, 1.0], 1.1) == 0.0 and one_sided_p([1.0, 1.0], 1.0) == 1.0
    with pytest.raises(ValueError, match="1 values: expected at least 2 seeds"):
        one_sided_p([1.0], 2.0)
