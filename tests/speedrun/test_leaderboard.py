"""The leaderboard is what the committed records give, in an order worked out by hand; what fails is named below."""

from pathlib import Path

from speedrun import leaderboard
from speedrun.leaderboard import page, read_records
from tests.speedrun.race_logs import made, write_record

ROOT = Path(__file__).resolve().parents[2]
CHANGE = (0.0, 0.001, -0.001)  # of the seeds' values around their mean


def file(records: Path, name: str, bits: float, seconds: float = 240.0, **about) -> None:
    logs = [made(seed, bits + change, seconds + seed, **about) for seed, change in enumerate(CHANGE)]
    write_record(records / "laptop" / name, logs)


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_committed_leaderboard_is_made_from_the_committed_records():
    committed = (ROOT / "speedrun" / "LEADERBOARD.md").read_text()
    assert committed == page(*read_records(ROOT / "speedrun" / "records")), "python -m speedrun.leaderboard makes it"


def test_without_records_each_track_says_so(tmp_path):
    text = page(*read_records(tmp_path))
    assert text.count("No records yet.") == 3 and "Not listed" not in text
    for track in ("laptop", "one-gpu", "fineweb"):
        assert f"## {track}\n\nNo records yet.\n" in text


def test_records_are_ranked_by_value_in_the_time_and_by_seconds_to_the_target(tmp_path):
    file(tmp_path, "middle", 1.28, 200.0)
    file(tmp_path, "best", 1.25, 290.0)
    file(tmp_path, "slow", 1.20, 500.0)
    file(tmp_path, "quick", 1.34, 100.0)
    file(tmp_path, "slowest", 1.10, 910.0)
    text = page(*read_records(tmp_path))
    found = [(row[0], row[1]) for row in rows(text)]
    in_time = [("1", "best"), ("2", "middle"), ("3", "quick")]
    longer = [("1", "slow")]  # "best" has the time too, but is not below 1.23
    to_target = [("1", "quick"), ("2", "middle"), ("3", "best"), ("4", "slow"), ("5", "slowest")]
    assert found == [("rank", "name"), *in_time, ("rank", "name"), *longer, ("rank", "name"), *to_target]
    assert text.index("after 300 s") < text.index("after 900 s") < text.index("to 1.35 bits per byte")
    assert "p against 1.23" in text


def test_a_row_by_hand(tmp_path):
    file(tmp_path, "one", 1.28, 200.0, commit="abcdef" * 6 + "abcd", date="2026-03-04")
    row = rows(page(*read_records(tmp_path)))[1]
    # t = (1.35 - 1.28) / (0.001 / sqrt 3) = 121.2, with 2 degrees of freedom P(T > t) = (1 - t / sqrt(t^2 + 2)) / 2.
    # The look after step 2 of 6 was at 1.33, below 1.35: at a third of 200, 201, 202 seconds.
    assert row == [
        "1", "one", "1.2800 ± 0.0010", "3.4e-05", "201.0 ± 1.0", "67.0", "3", "a-cpu-2threads, torch 2.13.0",
        "2026-03-04", "abcdefabcdef",
        " ".join(f"[{seed}](records/laptop/one/{seed}.jsonl)".replace("records", tmp_path.name) for seed in range(3)),
    ]  # fmt: skip


def test_machines_and_texts_have_tables_of_their_own(tmp_path):
    file(tmp_path, "here", 1.28)
    file(tmp_path, "elsewhere", 1.25, data_digest="f" * 64)
    logs = [made(seed, 1.25 + change, machine="z-cpu-2threads") for seed, change in enumerate(CHANGE)]
    for log in logs:
        log.about["sittings"][0]["name"] = "z-cpu-2threads"
    write_record(tmp_path / "laptop" / "there", logs)
    text = page(*read_records(tmp_path))
    heads = [line for line in text.splitlines() if line.startswith("### ")]
    assert heads == ["### a-cpu-2threads, text dddddddddddd", "### a-cpu-2threads, text ffffffffffff",
                     "### z-cpu-2threads, text dddddddddddd"]  # fmt: skip
    assert [row[:2] for row in rows(text) if row[0] != "rank"] == [
        ["1", name] for name in ("here", "here", "elsewhere", "elsewhere", "there", "there")
    ]


def test_records_that_fail_are_named_with_the_reason_and_not_listed(tmp_path):
    file(tmp_path, "good", 1.28)
    file(tmp_path, "high", 1.40)
    file(tmp_path, "edited", 1.10)
    path = tmp_path / "laptop" / "edited" / "1.jsonl"
    text = path.read_text()
    at = text.index('"loss": 4.5')
    path.write_text(text[:at] + '"loss": 4.4' + text[at + 11 :])  # the rest of the number stays
    write_record(tmp_path / "laptop" / "single", [made(0, 1.1)])
    (tmp_path / "laptop" / "empty").mkdir()
    page_text = page(*read_records(tmp_path))
    assert {row[1] for row in rows(page_text)} == {"name", "good"}
    below = page_text.partition("## Not listed")[2]
    assert "* **laptop/edited**: 1.jsonl, links: line 5: changed, or the one before it is gone" in below
    assert "* **laptop/high**: target: 1.4000 bits per byte over 3 seeds, p = 1 below 1.35, expected p < 0.01" in below
    assert "* **laptop/single**: target: 1 seed, expected at least 2 for a p-value" in below
    assert "* **laptop/empty**: no logs: expected one for each seed" in below


def test_check_says_when_the_file_is_stale(tmp_path, monkeypatch):
    out = tmp_path / "board" / "LEADERBOARD.md"
    file(tmp_path / "records", "one", 1.28)

    def main(*flags: str) -> int:
        arguments = ["leaderboard", "--records", str(tmp_path / "records"), "--out", str(out), *flags]
        monkeypatch.setattr("sys.argv", arguments)
        return leaderboard.main()

    assert main("--check") == 1 and not out.exists()
    assert main() == 0 and main("--check") == 0
    file(tmp_path / "records", "two", 1.27)
    before = out.read_text()
    assert main("--check") == 1 and out.read_text() == before
