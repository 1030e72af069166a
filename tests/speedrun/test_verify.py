"""Logs are checked again: each kind of wrong number is named by its line, each rule of a track and record by name."""

import copy
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from speedrun import verify
from speedrun.record_log import RaceLog, read_log, source_digests, write_log
from speedrun.sources import commit_of
from tests.speedrun.race_logs import SOURCES, made, write_record


def wrong(log: RaceLog, path: Path) -> list[str]:
    """What is found in a log whose links fit, whatever its numbers say."""
    relinked(log, path)
    found, findings = verify.verify_log(path)
    if found is not None and all(finding.good is not False for finding in findings):
        findings += verify.verify_rules(found)
    return [finding.text for finding in findings if finding.good is False]


def relinked(log: RaceLog, path: Path) -> None:
    """Writes it past write_log's own refusal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speedrun.record_log.contradictions", lambda log: [])
        write_log(path, log)


def test_a_log_that_fits_together(tmp_path):
    assert wrong(made(), tmp_path / "race.jsonl") == []


BENT: list[tuple[Callable[[RaceLog], object], str]] = [
    (lambda log: log.steps[3].update(lr_share=0.5), "schedule: line 5, lr_share: 0.5, while the schedule says"),
    (lambda log: log.steps[2].update(tokens_per_s=9.0), "schedule: line 4, tokens_per_s: 9.0 tokens/s in 40.0 s"),
    (lambda log: log.steps[2].update(loss=float("nan")), "numbers: line 4, loss: nan at step 3"),
    (lambda log: log.steps[2].update(loss=True), "numbers: line 4, loss: True at step 3"),
    (lambda log: log.steps[2].pop("loss"), "numbers: line 4, loss: None at step 3"),
    (lambda log: log.steps[2].update(loss=4.9), "schedule: line 4, train_bits_per_byte"),
    (lambda log: log.steps[2].update(train_bits_per_byte=2.0), "schedule: line 4, train_bits_per_byte: 2.0 at a loss"),
    (lambda log: log.steps[2].pop("train_bits_per_byte"), "schedule: line 4, train_bits_per_byte: None"),
    (lambda log: log.steps[3].pop("held_out_look"), "schedule: line 5: no look, expected held_out_look"),
    (lambda log: log.steps[2].update(held_out_look=1.0), "schedule: line 4: held_out_look, expected no look"),
    (lambda log: log.steps.pop(2), "numbers: line 4, step: step 4 in the place of step 3"),
    (lambda log: log.steps[1].update(seconds=0.0), "numbers: line 3, seconds: step 2 took no time or less"),
    (lambda log: log.steps[1].update(seconds=1.0), "numbers: line 8, train_seconds: train_seconds 240.0"),
    (lambda log: log.result.update(bits_per_byte=1.2), "numbers: line 8, bits_per_byte"),
    (lambda log: log.result.update(tokens=1), "result: line 8, tokens: 1, while the steps give 576"),
    (lambda log: log.result.update(nats_per_token=2.0), "result: line 8, nats_per_token: 2.0"),
    (lambda log: log.result.update(seconds_to_target=None), "result: line 8, seconds_to_target: None, while the steps"),
    (lambda log: log.result.pop("parameters"), "result: line 8, parameters: None"),
    (lambda log: log.about["config"].update(steps=7), "schedule: line 8, steps: 6 in the log, while the config says 7"),
    (lambda log: log.about["config"].update(width=-1), "line 1: not what a race writes: ValueError: width -1"),
    (lambda log: log.about["config"].update(nonsense=1), "line 1: not what a race writes: TypeError"),
    (lambda log: log.about["config"].update(corpus="x.txt"), "not what a race writes: ValueError: corpus 'x.txt'"),
    (lambda log: log.about.update(seed=5), "config: line 1, seed: 5, while the config says 0"),
    (lambda log: log.about.update(data_digest=None), "config: line 1, data_digest: None"),
    (lambda log: log.about.pop("machine"), "line 1: not what a race writes: KeyError: 'machine'"),
    (lambda log: log.about.update(sources={**SOURCES, "speedrun/c.py": "0"}), "line 1, source: not the digest"),
    (lambda log: log.about.update(source_at_end="0"), "sittings: line 1, sources: the program changed during the run"),
    (lambda log: log.about["sittings"][0].update(source="0"), "sittings: line 1, sources: the program changed"),
    (lambda log: log.about["sittings"][0].update(step=3), "sittings: line 1, sittings: they begin at steps [3]"),
    (lambda log: log.about["sittings"][0].update(torch="2.0"), "sittings: line 1, torch: 2.0 and 2.13.0"),
    (lambda log: change_machine(log, device="cuda"), "track: line 1, device: cuda, expected cpu"),
    (lambda log: change_machine(log, threads=8), "track: line 1, threads: 8 on each of 1 ranks, expected 2 cores"),
]  # fmt: skip


def change_machine(log: RaceLog, **values) -> None:
    log.about.update(values)
    log.about["sittings"][0].update(values)


@pytest.mark.parametrize(("bend", "text"), BENT, ids=[text[:60] for _, text in BENT])
def test_each_contradiction_is_found_with_its_line(tmp_path, bend, text):
    log = copy.deepcopy(made())
    bend(log)
    found = wrong(log, tmp_path / "race.jsonl")
    assert any(text in each for each in found), found


def test_a_race_over_its_time_counts_for_the_target_alone(tmp_path):
    write_log(tmp_path / "0.jsonl", made(seconds=301.0))
    findings = verify.verify_rules(read_log(tmp_path / "0.jsonl"))
    assert [each.good for each in findings] == [True, None, None] and "301.0 of 300 s" in findings[1].text


# ---- seeds -----------------------------------------------------------------------------------------------------------


def record_findings(folder: Path, logs: list[RaceLog]) -> list[str]:
    write_record(folder, logs)
    return [each.text for each in verify.verify_record(folder)[1] if each.good is False]


def test_a_record_needs_a_small_p_value(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    values = [1.341, 1.345, 1.343, 1.342]
    write_record(tmp_path / "laptop" / "good", [made(seed, bits) for seed, bits in enumerate(values)])
    logs, findings = verify.verify_record(tmp_path / "laptop" / "good")
    p = stats.ttest_1samp(values, 1.35, alternative="less").pvalue
    assert len(logs) == 4 and all(each.good is not False for each in findings)
    assert findings[-1].text == f"target: 1.3428 bits per byte over 4 seeds, p = {p:.2g} below 1.35"
    values = [1.32, 1.35, 1.34]
    p = stats.ttest_1samp(values, 1.35, alternative="less").pvalue
    found = record_findings(tmp_path / "laptop" / "bad", [made(seed, bits) for seed, bits in enumerate(values)])
    assert found == [f"target: 1.3367 bits per byte over 3 seeds, p = {p:.2g} below 1.35, expected p < 0.01"]
    assert "1 seed, expected at least 2" in record_findings(tmp_path / "laptop" / "one", [made()])[0]


def test_seeds_of_one_record_differ_in_nothing_else(tmp_path):
    other = made(1, data_digest="f" * 64)
    assert record_findings(tmp_path / "laptop" / "a", [made(0), other])[0].startswith(
        "seeds: data_digest of seed 1 is not that of seed 0: 'ffff"
    )
    other = made(1)
    other.about["config"]["muon_lr"] = 0.02
    assert "muon_lr of seed 1 is not that of seed 0: 0.02 and 0.014" in record_findings(
        tmp_path / "laptop" / "b", [made(0), other]
    )[0]  # fmt: skip
    found = record_findings(tmp_path / "fineweb" / "c", [made(0)])
    assert "0.jsonl, name: expected it at laptop/c/0.jsonl" in found
    write_record(tmp_path / "laptop" / "d", [made(0)])
    (tmp_path / "laptop" / "d" / "1.jsonl").write_bytes((tmp_path / "laptop" / "d" / "0.jsonl").read_bytes())
    found = [each.text for each in verify.verify_record(tmp_path / "laptop" / "d")[1] if each.good is False]
    assert found == ["1.jsonl, name: expected it at laptop/d/0.jsonl", "seeds: seed 0 comes 2 times"]


# ---- the program in git ----------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path) -> tuple[Path, Callable[[], str]]:
    """A folder under git with code of one stage, and what commits all of it."""
    folder = tmp_path / "repository"
    (folder / "speedrun").mkdir(parents=True)
    author = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*arguments: str) -> str:
        environment = {**os.environ, **author, "GIT_CONFIG_GLOBAL": os.devnull}
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def commit() -> str:
        git("add", "-A")
        git("commit", "-q", "--no-gpg-sign", "-m", "x")
        return git("rev-parse", "HEAD")

    git("init", "-q")
    return folder, commit


def test_the_commit_of_a_program_is_found(repository):
    folder, commit = repository
    code = folder / "speedrun" / "a.py"
    code.write_text("x = 1\n")
    (folder / "speedrun" / "notes.md").write_text("no code")
    first_sources, first = source_digests(folder), commit()
    code.write_text("x = 2\r\n")
    (folder / "speedrun" / "b.py").write_text("")
    second_sources, second = source_digests(folder), commit()
    assert commit_of(first_sources, first, folder) == (first, [])
    assert commit_of(second_sources, first, folder) == (second, []), "found, though the log names another"
    assert commit_of(first_sources, None, folder) == (first, [])
    code.write_text("x = 3\n")
    assert commit_of(source_digests(folder), second, folder) == (None, ["speedrun/a.py"])
    assert commit_of(source_digests(folder), "0" * 40, folder) == (None, ["speedrun/a.py"])
    missing = {name: digest for name, digest in second_sources.items() if name != "speedrun/b.py"}
    assert commit_of(missing, second, folder) == (None, ["speedrun/b.py"])


def test_a_clone_without_history_cannot_say(repository, tmp_path):
    folder, commit = repository
    sources = []
    for number in range(2):
        (folder / "speedrun" / "a.py").write_text(f"x = {number}\n")
        commit()
        sources.append(source_digests(folder))
    clone = ["git", "clone", "-q", "--depth", "1", f"file://{folder}", str(tmp_path / "clone")]
    subprocess.run(clone, check=True, capture_output=True)
    assert commit_of(sources[1], None, tmp_path / "clone")[1] == []
    with pytest.raises(ValueError, match="shallow"):
        commit_of(sources[0], None, tmp_path / "clone")


def test_without_git_nobody_can_say(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="git rev-list"):
        commit_of(SOURCES, None, tmp_path)
    monkeypatch.setattr(verify, "commit_of", lambda *_: commit_of(SOURCES, None, tmp_path))
    assert verify.verify_sources(made().about).good is None
