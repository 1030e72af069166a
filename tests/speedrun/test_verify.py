"""Logs are checked again: each kind of wrong number is named by its line, each rule of a track and record by name."""

import copy
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from speedrun import verify
from speedrun.model import build, untie
from speedrun.record_log import RaceLog, read_log, seconds_to, source_digests, write_log
from speedrun.sources import commit_of
from tests.speedrun import race_logs
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
    (lambda log: log.result.update(parameters=999), "speed: line 8, parameters: 999, while a model of this config has"),
    (lambda log: log.about["config"].update(width=16), "parameters"),
    (lambda log: log.about["config"].update(steps=7), "schedule: line 8, steps: 6 in the log, while the config says 7"),
    (lambda log: log.about["config"].update(width=-1), "line 1: not what a race writes: ValueError: width -1"),
    (lambda log: log.about["config"].update(nonsense=1), "ValueError: config has nonsense, which this program"),
    (lambda log: log.about["config"].update(corpus="x.txt"), "not what a race writes: ValueError: corpus 'x.txt'"),
    (lambda log: log.about["config"].update(compile="no"), "config: line 1, config: compile 'no', expected bool"),
    (lambda log: log.about["config"].update(batch=4.0), "config: line 1, config: batch 4.0, expected int"),
    (lambda log: log.about["config"].update(tokenizer="bpe:512"), "line 1, vocabulary: 2048, while the config's"),
    (lambda log: log.about.update(held_out_bytes=5.5), "line 1, held_out_bytes: 5.5, expected a whole number"),
    (lambda log: held_out(log, 1200), "text: line 1, held_out_bytes: 3.00 a token, while training"),
    (lambda log: log.about.update(python="3.12.1"), "line 1, python: '3.12.1', while versions say '3.11.7'"),
    (lambda log: log.about.update(commit="d" * 40), "sittings: line 1, commit: 'dddd"),
    (lambda log: commanded(log, "--seed 3"), "command: line 1, command: seed 3 at step 0, while the config says 0"),
    (lambda log: commanded(log, "--no-zero-init"), "command: zero_init False at step 0, while the config says True"),
    (lambda log: commanded(log, "--track= --steps 6"), "command: line 1, command: track  at step 0, while the config"),
    (lambda log: commanded(log, "--muon-lr=0.02"), "command: muon_lr 0.02 at step 0, while the config says 0.014"),
    (lambda log: log.about.update(ended="2026-01-02T03:03:00+00:00"), "clock: line 1, began: steps 1 to 6 took 270.0"),
    (lambda log: log.about.update(ended="2026-01-02T02:03:00+00:00"), "clock: line 1, began: steps 1 to 6 took 270.0"),
    (lambda log: log.about.update(ended="yesterday"), "line 1: not what a race writes: ValueError: Invalid isoformat"),
    (lambda log: log.about.update(date="2025-01-02"), "clock: line 1, date: 2025-01-02, while the last sitting began"),
    (lambda log: timed(log, [1e-12, 239.999]), "speed: line 2, seconds: 1e-12, so"),
    (lambda log: timed(log, [0.5, 79.5, 80.0, 26.0]), "speed: line 2, seconds: 0.5, while half of the steps"),
    (lambda log: log.about.update(seed=5), "config: line 1, seed: 5, while the config says 0"),
    (lambda log: log.about.update(data_digest=None), "config: line 1, data_digest: None"),
    (lambda log: log.about.pop("machine"), "line 1: not what a race writes: KeyError: 'machine'"),
    (lambda log: log.about.update(sources={**SOURCES, "speedrun/c.py": "0"}), "line 1, source: not the digest"),
    (lambda log: log.about.update(source_at_end="0"), "sittings: line 1, sources: the program changed during the run"),
    (lambda log: log.about["sittings"][0].update(source="0"), "sittings: line 1, sources: the program changed"),
    (lambda log: log.about["sittings"].clear(), "sittings: line 1, sittings: they begin at steps [], expected 0"),
    (lambda log: log.about["sittings"][0].update(step=3), "sittings: line 1, sittings: they begin at steps [3]"),
    (lambda log: log.about["sittings"][0].update(torch="2.0"), "sittings: line 1, torch: 2.0 and 2.13.0"),
    (lambda log: change_machine(log, device="cuda"), "track: line 1, device: cuda, expected cpu"),
    (lambda log: change_machine(log, threads=8), "track: line 1, threads: 8 on each of 1 ranks, expected 2 cores"),
]  # fmt: skip


def held_out(log: RaceLog, size: int) -> None:
    """Of so many bytes, in 400 tokens."""
    log.about["held_out_bytes"] = size
    log.result["nats_per_token"] = log.result["bits_per_byte"] * math.log(2) * size / 400


def commanded(log: RaceLog, text: str) -> None:
    log.about["command"] = log.about["sittings"][0]["command"] = f"python -m speedrun.train --preset laptop {text}"


def timed(log: RaceLog, seconds: list[float]) -> None:
    """Other seconds with the same sum, and what follows from them."""
    seconds = [*seconds, *[(240.0 - sum(seconds)) / (6 - len(seconds))] * (6 - len(seconds))]
    for row, each in zip(log.steps, seconds, strict=True):
        row["seconds"] = each
    log.result["seconds_to_target"] = seconds_to(1.35, log.steps)


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
    assert [each.good for each in findings] == [True, None, True, None]
    assert findings[1].text == "text: 6 steps, too few to tell what held-out text can cost"
    assert findings[2].text == "time: 301.0 of 900 s"
    late = made(seconds=901.0)
    write_log(tmp_path / "0.jsonl", late)
    assert "901.0 of 900 s: only for the race to the target" in verify.verify_rules(late)[2].text


@pytest.mark.parametrize(("name", "line"), [("held_out_look", 53), ("held_out_bits_per_byte", 61)])
def test_held_out_text_that_is_easier_than_training_text(tmp_path, name, line):
    """Training text needs 1.01 bits per byte in the end."""
    log = made(steps=60, bits=1.02)
    assert wrong(log, tmp_path / "race.jsonl") == []
    log.steps[line - 2][name] = 0.85
    if line == 61:
        log.result.update(bits_per_byte=0.85, nats_per_token=0.85 * math.log(2) * 5)
    found = wrong(log, tmp_path / "race.jsonl")
    assert len(found) == 1 and f"text: line {line}, {name}: 0.85, while training text needed " in found[0]


def test_a_log_without_times_of_day_leaves_that_open(tmp_path):
    log = made()
    del log.about["sittings"][0]["began"]
    write_log(tmp_path / "0.jsonl", log)
    assert [each.text for each in verify.verify_log(tmp_path / "0.jsonl")[1] if each.good is None] == [
        "clock: the log has no times of day to compare the seconds with"
    ]


@pytest.mark.parametrize(
    "switches",
    [
        {"tied": True, "untie_at": 0.5}, {"tied": True}, {"bigrams": 64, "value_gate": True, "attention_gate": True},
        {"layers": 4, "unet_skips": True, "x0_skip": True, "backout": True, "smear": True, "norm": "layernorm"},
        {"windows": "8,16", "positions": "learned", "mtp": "1,0.5", "bias": True},
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_model_as_it_ends(tmp_path, monkeypatch, switches):
    config = replace(race_logs.CONFIG, **switches)
    monkeypatch.setattr(race_logs, "CONFIG", config)
    log, model = made(), build(config, 2048)
    if config.untie_at:
        untie(model)
    log.result["parameters"] = model.num_parameters()
    assert wrong(log, tmp_path / "0.jsonl") == []
    log.result["parameters"] += 1
    assert "speed: line 8, parameters" in wrong(log, tmp_path / "0.jsonl")[0]


def test_a_sitting_has_the_time_until_the_next(tmp_path):
    log = made()
    second = {**log.about["sittings"][0], "step": 2, "began": "2026-01-02T03:01:21+00:00"}
    log.about["sittings"].append(second)
    assert wrong(log, tmp_path / "0.jsonl") == [], "two steps of 40 seconds in 81"
    second["began"] = "2026-01-02T03:01:18+00:00"
    assert "steps 1 to 2 took 80.0 s, of 79 s" in wrong(log, tmp_path / "0.jsonl")[0]


def test_a_config_of_before_and_after(tmp_path):
    """Fields that came later have their defaults; fields that are gone are named, with what to do."""
    log = made()
    for name in ("minutes", "documents", "measured"):
        del log.about["config"][name]
    assert wrong(log, tmp_path / "0.jsonl") == []
    log.about["config"]["gone"] = 1
    assert "config has gone, which this program has not: verify with the log's own" in wrong(log, tmp_path / "0")[0]


def test_a_track_for_which_another_target_holds_after_more_seconds(tmp_path):
    def findings(bits: float, seconds: float) -> list[tuple[bool | None, str]]:
        folder = tmp_path / str(bits) / "laptop" / "a"
        write_record(folder, [made(seed, bits + seed / 1000, seconds) for seed in range(3)])
        return [(each.good, each.text) for each in verify.verify_record(folder)[1] if "target: in" in each.text]

    assert findings(1.21, 800.0)[0][0] is True and "target: in 900 s p = " in findings(1.21, 800.0)[0][1]
    assert findings(1.29, 800.0)[0][0] is None and findings(1.2, 1000.0) == findings(1.29, 200.0) == []


# ---- seeds that are one run ------------------------------------------------------------------------------------------


def twin(change: Callable[[RaceLog, RaceLog], object]) -> list[str]:
    logs = [made(0, steps=200), made(1, 1.31, steps=200)]
    change(*logs)
    return verify.differences(logs)


def losses(log: RaceLog, losses: Sequence[float]) -> None:
    """With bits per byte that still tell the same bytes."""
    for row, loss in zip(log.steps, losses, strict=True):
        row.update(train_bits_per_byte=row["train_bits_per_byte"] / row["loss"] * loss, loss=loss)


def test_seeds_that_are_one_run(tmp_path):
    assert twin(lambda one, other: None) == []
    one_run = "seeds 0 and 1 have the same {} in most steps: they are one run".format
    assert twin(lambda one, other: [b.update(seconds=a["seconds"]) for a, b in zip(one.steps, other.steps, strict=True)]
                ) == [one_run("seconds")]  # fmt: skip
    assert one_run("losses") in twin(lambda one, other: losses(other, [row["loss"] for row in one.steps]))
    scaled = twin(lambda one, other: losses(other, [row["loss"] * 0.99 + 0.01 for row in one.steps]))
    assert scaled == ["seeds 0 and 1: their losses rise and fall together in 100% of the steps: they are one run"]

    def same_batches(one: RaceLog, other: RaceLog) -> None:
        for a, b in zip(one.steps, other.steps, strict=True):
            b["train_bits_per_byte"] = a["train_bits_per_byte"] * b["loss"] / a["loss"]

    assert twin(same_batches) == [one_run("batches")]
    assert twin(lambda one, other: other.result.update(bits_per_byte=1.3)) == [
        "seeds 0 and 1 ended at the same 1.3 bits per byte"
    ]


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
    assert findings[-2].text == f"target: 1.3428 bits per byte over 4 seeds, p = {p:.2g} below 1.35"
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


def test_the_text_of_the_python_in_use_is_compared(monkeypatch):
    text = b"x" * 2000
    corpus = SimpleNamespace(digest="d" * 64, held_out_text=text)
    monkeypatch.setattr(verify, "load_corpus", lambda name: corpus)
    monkeypatch.setattr(verify.platform, "python_version", lambda: "3.11.7")
    about = made().about
    assert [(each.good, each.text) for each in verify.verify_text(about)] == [
        (True, "data: the stdlib of Python 3.11.7 here")
    ]
    found = verify.verify_text({**about, "held_out_bytes": 1999})
    assert found[0].good is False and found[0].text == "data: line 1, held_out_bytes: 1,999, while they are 2,000 here"
    found = verify.verify_text({**about, "data_digest": "f" * 64})
    assert found[0].good is None, "another maker of the same Python may have changed files"
    assert verify.verify_text({**about, "python": "3.12.0"}) == []
