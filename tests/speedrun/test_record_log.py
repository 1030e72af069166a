"""Logs that were changed in any place are refused there; p-values are scipy's."""

import json
import random

import pytest

from speedrun.record_log import (
    RaceLog,
    contradictions,
    digest_of,
    one_sided_p,
    read_log,
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
    path, generator = tmp_path / "race.jsonl", random.Random(0)
    write_log(path, log())
    text = path.read_text()
    for _ in range(100):
        at = generator.randrange(len(text))
        if text[at] == "\n":
            continue
        path.write_text(text[:at] + ("7" if text[at] != "7" else "8") + text[at + 1 :])
        line = text[:at].count("\n") + 1
        with pytest.raises(ValueError, match=rf"race.jsonl, line {line}: changed"):
            read_log(path)


@pytest.mark.parametrize("gone", [0, 2, 5, 6])
def test_lines_that_are_gone_or_turned_round_are_found(tmp_path, gone):
    path = tmp_path / "race.jsonl"
    write_log(path, log())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:gone] + lines[gone + 1 :]))
    with pytest.raises(ValueError, match="race.jsonl"):
        read_log(path)
    turned = [lines[1], lines[0], *lines[2:]]
    path.write_text("".join(turned))
    with pytest.raises(ValueError, match="line 1: changed"):
        read_log(path)


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
    with pytest.raises(ValueError, match="bits_per_byte 2.0"):
        write_log(tmp_path / "x.jsonl", RaceLog(log().about, log().steps, {**log().result, "bits_per_byte": 2.0}))
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("text", ["", "{}\n", "a\nb\nc\n"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "race.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="race.jsonl"):
        read_log(path)
    with pytest.raises(ValueError, match="expected the log of a race"):
        read_log(tmp_path / "none.jsonl")


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
