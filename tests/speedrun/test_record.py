"""What makes a record: several seeds of one thing. All else is refused, and nothing is written then."""

import json
from pathlib import Path

import pytest

from speedrun.record import RecordConfig, record
from speedrun.record_log import RaceLog, read_log, write_log
from tests.speedrun.race_logs import made


def finished(folder: Path, seed: int, **about) -> Path:
    """A folder as a finished race leaves it."""
    log = made(seed, **about)
    write_log(folder / "race.jsonl", log)
    summary = {"device": "cpu", "bits_per_byte": 1.3, "steps": 6, "compressors": {"xz -9e": 1.5}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"config": log.about["config"], "sittings": [{"command": "x"}]}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 2, "held_out_look": 1.4}) + "\n")
    (folder / "loss.png").write_bytes(b"picture of %d" % seed)
    return folder


def filed(tmp_path: Path, *folders: Path, name: str = "first") -> list[Path]:
    return record(RecordConfig(folders, tmp_path / "results", name, tmp_path / "records"))


def test_seeds_become_a_record(tmp_path):
    folders = [finished(tmp_path / f"run{seed}", seed) for seed in (3, 1)]
    *logs, result, picture = filed(tmp_path, *folders)
    assert [path.relative_to(tmp_path).as_posix() for path in logs] == [
        "records/laptop/first/3.jsonl", "records/laptop/first/1.jsonl",
    ]  # fmt: skip
    assert all(read_log(path) == read_log(folder / "race.jsonl") for path, folder in zip(logs, folders, strict=True))
    rows = json.loads(result.read_text())["rows"]
    assert [row["seed"] for row in rows] == [3, 1] and rows[0]["xz"] == 1.5 and rows[0]["held_out_looks"] == [[2, 1.4]]
    assert picture.read_bytes() == b"picture of 3" and picture.name == "loss_first.png"
    assert result.name.startswith("first_"), "another race's result of the same day stays"


def test_one_run_without_a_name_is_a_result_alone(tmp_path):
    paths = record(RecordConfig(finished(tmp_path / "run", 0), tmp_path / "results"))
    assert len(paths) == 2 and paths[0].name.startswith("cpu_") and paths[1].name == "loss_cpu.png"
    assert "seed" not in json.loads(paths[0].read_text())["rows"][0]


def refused(tmp_path: Path, text: str, *folders: Path, name: str = "first") -> None:
    with pytest.raises(ValueError, match=text):
        filed(tmp_path, *folders, name=name)
    assert not (tmp_path / "results").exists() and not (tmp_path / "records").exists()


@pytest.mark.parametrize("gone", ["summary.json", "config.json", "metrics.jsonl", "loss.png", "race.jsonl"])
def test_a_run_that_is_not_finished(tmp_path, gone):
    folders = [finished(tmp_path / f"run{seed}", seed) for seed in range(2)]
    (folders[1] / gone).unlink()
    refused(tmp_path, rf"run1 holds no finished \w+: expected {gone}", *folders)


def test_runs_that_do_not_belong_together(tmp_path):
    first = finished(tmp_path / "a", 0)
    refused(tmp_path, "seed 0 comes 2 times", first, finished(tmp_path / "b", 0))
    refused(
        tmp_path, "data_digest of seed 1 is not that of seed 0", first, finished(tmp_path / "c", 1, data_digest="f")
    )
    refused(tmp_path, "source of seed 1 is not that", first, finished(tmp_path / "d", 1, source="f"))
    copied = finished(tmp_path / "h", 1)
    log = made(1)
    write_log(copied / "race.jsonl", RaceLog(log.about, made(0).steps, made(0).result))
    refused(tmp_path, "seeds 0 and 1 have the same seconds in most steps: they are one run", first, copied)
    refused(tmp_path, "machine of seed 1 is not that", first, finished(tmp_path / "e", 1, machine="f"))
    eight = [finished(tmp_path / f"eight{seed}", seed, threads=8) for seed in range(2)]
    refused(tmp_path, "race.jsonl does not pass speedrun.verify: sittings: line 1, threads: 2 and 8", *eight)
    config = {**made(1).about["config"], "muon_lr": 0.5}
    refused(tmp_path, "muon_lr of seed 1 is not that of seed 0: 0.5 and 0.014", first,
            finished(tmp_path / "g", 1, config=config))  # fmt: skip


def test_names_and_tracks(tmp_path):
    first, second = (finished(tmp_path / f"run{seed}", seed) for seed in range(2))
    refused(tmp_path, "2 runs without a name: expected --name", first, second, name="")
    refused(tmp_path, r"name '\.\./x': expected lower case letters", first, name="../x")
    refused(tmp_path, "is a run of no track", finished(tmp_path / "none", 0, track=""))
    text = (first / "race.jsonl").read_text()
    (first / "race.jsonl").write_text(text.replace('"loss": 4.5', '"loss": 4.4', 1))
    refused(tmp_path, "race.jsonl, line 5: changed", first, second)


def test_a_record_stays_as_it_is(tmp_path):
    first, second = (finished(tmp_path / f"run{seed}", seed) for seed in range(2))
    before = {path: path.read_bytes() for path in filed(tmp_path, first)}
    with pytest.raises(ValueError, match="laptop/first is there: expected another --name"):
        filed(tmp_path, second)
    assert all(path.read_bytes() == content for path, content in before.items())
