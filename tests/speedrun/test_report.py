"""The page about runs: whole HTML that fetches nothing, escapes what a model writes, and has the files' numbers."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from common import html
from common.log import read_jsonl
from speedrun import report, report_charts, run_files
from speedrun.record_log import read_log
from speedrun.run_files import parts_of, read_run, read_runs
from speedrun.schedule import plan
from tests.minigpt.programs import run as run_program

NASTY = "</script><b onclick=x>&amp;\x1b[2J\x00\ud800"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A smoke run as a user starts it."""
    corpus = tmp_path_factory.mktemp("corpus") / "text.py"
    corpus.write_bytes(Path(json.__file__).read_bytes() + Path(shutil.__file__).read_bytes())
    folder = tmp_path_factory.mktemp("runs") / "finished"
    flags = ("--preset", "smoke", "--folder", folder, "--corpus", corpus, "--contexts", "32,64", "--device", "cpu")
    code, _, err = run_program("speedrun.train", *flags)
    assert code == 0, err
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """Makes copies of the run; without weights, for speed, where they are not wanted."""

    def copy(name: str, weights: bool = False) -> Path:
        ignored = None if weights else shutil.ignore_patterns("checkpoints")
        return Path(shutil.copytree(finished, tmp_path / name, ignore=ignored))

    return copy


def edit(path: Path, **changes) -> None:
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | changes))


class Page(HTMLParser):
    """What a browser sees; elements that do not close in order fail at once."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.rows, self.texts, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in html.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def numbers(self) -> set[float]:
        return {float(each["value"]) for each in self.all("data")}


def page_of(*folders: Path) -> tuple[Page, str]:
    out = report.write(folders, folders[0].parent / "page.html")
    text = out.read_text()
    return Page(text), text


def test_train_writes_it_at_its_end(finished):
    text = (finished / report.FILE).read_text()
    page = Page(text)
    assert page.all("title")[0] == {} and "Speedrun: finished" in page.texts
    assert '<p class="soft">None: ' not in text, "a model may write None, but no tags"
    bold = [text for text in page.texts if text in report.CODE]
    assert bold == list(report.CODE), "a sample for each prompt"


def test_one_file_that_fetches_nothing(finished):
    text = (finished / report.FILE).read_text()
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    names = {name for _, attributes in page.elements for name in attributes}
    assert not names & {"src", "href", "srcset", "data", "action", "poster"} and not any(
        n.startswith("on") for n in names
    )
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "img", "base", "form"}
    assert len({*page.ids}) == len(page.ids), "no name twice"


def test_those_who_cannot_see_the_pictures_are_told(finished):
    text = (finished / report.FILE).read_text()
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    told = [ElementTree.fromstring(picture) for picture in pictures]
    charts = [picture for picture in told if picture.get("aria-hidden") != "true"]
    assert len(charts) >= 12
    for chart in charts:
        names = {child.get("id"): child.text for child in chart if child.tag in ("title", "desc")}
        assert chart.get("role") == "img" and chart.get("aria-labelledby").split() == list(names)
        assert all(names.values()) and "nan" not in ElementTree.tostring(chart, "unicode").lower()
    page = Page(text)
    assert page.all("html")[0]["lang"] == "en" and all(each.get("scope") for each in page.all("th"))
    for media in ("prefers-color-scheme: dark", "@media print"):
        assert media in text


def test_the_numbers_are_those_of_the_files(finished):
    page = Page((finished / report.FILE).read_text())
    summary = json.loads((finished / "summary.json").read_text())
    wanted = [
        summary[name] for name in ("bits_per_byte", "train_seconds", "compile_seconds", "tokens_per_s", "of_peak")
    ]
    wanted += summary["compressors"].values()
    wanted.append(max(row["memory_bytes"] for row in read_jsonl(finished / "timing.jsonl")))
    assert {*wanted} <= page.numbers()
    rows = {row[0]: row[1:] for row in page.rows if len(row) > 1}
    assert rows["bits per byte"] == [f"{summary['bits_per_byte']:.4f}"] and rows["state"] == ["finished"]
    assert rows["MFU, of the GEMM peak measured"] == [f"{summary['of_peak']:.1%}"]
    for name, value in json.loads((finished / "config.json").read_text())["config"].items():
        assert rows[name] == [report.plain(value)]
    assert rows["data digest"] == [summary["data_digest"]]
    assert rows["sitting 1, from step 0"][0].startswith("python -m speedrun.train --preset smoke")


def test_curves_are_those_of_the_files(finished):
    run = read_run(finished, "x")
    rows, timing = read_jsonl(finished / "metrics.jsonl"), read_jsonl(finished / "timing.jsonl")
    places = run.places()
    assert [*places["seconds"].values()] == pytest.approx(
        np.cumsum([row["step_ms"] for row in timing]) / 1e3, rel=1e-12
    )
    config = run.race_config()
    tokens = np.cumsum([plan(step, config).rows * plan(step, config).context for step in range(config.steps)])
    assert [*places["tokens"].values()] == tokens.tolist()
    x, y = report_charts.held_out(run, places["tokens"])
    looks = {row["step"]: row["held_out_look"] for row in rows if "held_out_look" in row}
    looks[config.steps] = rows[-1]["held_out_bits_per_byte"]
    assert (x, y) == ([tokens[step - 1] for step in looks], [*looks.values()])
    x, y = report_charts.training(run, places["steps"])
    mean = rows[0]["train_bits_per_byte"]
    for row, step, found in zip(rows, x, y, strict=True):
        mean = 0.95 * mean + 0.05 * row["train_bits_per_byte"]
        assert step == row["step"] and found == pytest.approx(mean, rel=1e-12)
    assert report_charts.ordered(run) == {
        "rows": [plan(step, config).rows for step in range(40)], "context": [32] * 20 + [64] * 20, "window": [0] * 40,
    }  # fmt: skip


def test_what_a_model_or_a_user_wrote_is_only_text(copied, monkeypatch):
    folder = copied("a<b>")
    monkeypatch.setattr(report, "continued", lambda folder, prompts: [NASTY] * len(prompts))
    about = json.loads((folder / "config.json").read_text())
    about["config"]["corpus"], about["sittings"][0]["command"] = NASTY, f"python {NASTY}"
    edit(folder / "config.json", **about)
    page, text = page_of(folder)
    assert not page.all("script") and not page.all("b") and NASTY[:10] not in text
    shown = "</script><b onclick=x>&amp;\\x1b[2J\\x00\\ud800"
    assert "".join(page.texts).count(shown) == len(report.CODE) + 2


def test_several_runs_are_compared(copied):
    first, second, third = (copied(name) for name in ("first", "second", "third"))
    for folder, value in ((first, 3.25), (second, 2.125), (third, 4.5)):
        edit(folder / "summary.json", bits_per_byte=value)
    about = json.loads((second / "config.json").read_text())
    edit(second / "config.json", config=about["config"] | {"muon_lr": 0.77, "yarn": True})
    page, text = page_of(first, second, third)
    head = next(row for row in page.rows if row[0] == "run")
    table = [row for row in page.rows if len(row) == len(head) and row is not head]
    assert [row[0] for row in table] == ["second (best)", "first", "third"]
    assert [row[head.index("bits per byte")] for row in table] == ["2.1250", "3.2500", "4.5000"]
    differing = [row for row in page.rows if row[0] in ("muon_lr", "yarn", "muon_lr ≠", "yarn ≠")]
    assert len(differing) == 4 and [row[1:] for row in differing[:2]] == [
        ["0.77", "0.014", "0.014"],
        ["true", "false", "false"],
    ]
    assert not any("≠" in row[0] for row in page.rows if row[0].split()[0] not in ("muon_lr", "yarn"))
    marked = re.findall(r'<tr class="marked"><th scope="row">(.*?)</th>', text)
    assert marked == ["<strong>second (best)</strong>", "muon_lr ≠", "yarn ≠"]
    chart = re.search(r"<svg[^>]*held-out-00.*?</svg>", text, re.DOTALL).group()
    assert [name in chart for name in ("second:", "first:", "third:")] == [True] * 3


@pytest.mark.parametrize("what", ["text", "part of it"])
def test_runs_on_different_texts_have_no_best(copied, what):
    first, second = copied("first"), copied("second")
    if what == "text":
        edit(second / "summary.json", data_digest="0" * 64 + "+0")
    else:
        about = json.loads((second / "config.json").read_text())
        edit(second / "config.json", config=about["config"] | {"track": "fineweb"})
    page, _ = page_of(first, second)
    text = " ".join(page.texts)
    assert "judged on different texts" in text and "(best)" not in text


def test_the_target_of_the_track(copied):
    folder = copied("first")
    run = read_run(folder, "x")
    step, value = run.looks()[1]
    about = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", config=about["config"] | {"track": "laptop"})
    run = read_run(folder, "x")
    assert run.target() == run_files.TRACKS["laptop"].target and run.seconds_to(0.0) is None
    assert run.seconds_to(value) == run.places()["seconds"][step]
    page, text = page_of(folder)
    assert ["target", "1.35"] in page.rows and ">target</text>" in text


def test_a_target_in_nats_per_token(copied):
    """FineWeb's: curves are in bits per byte, so the target is too, by the tokens of the held-out text."""
    folder, going, laptop = copied("first"), copied("going"), copied("laptop")
    for each, track in ((folder, "fineweb"), (going, "fineweb"), (laptop, "laptop")):
        about = json.loads((each / "config.json").read_text())
        edit(each / "config.json", config=about["config"] | {"track": track})
    for name in ("race.jsonl", "summary.json"):
        (going / name).unlink()
    run, log = read_run(folder, "x"), read_log(folder / "race.jsonl")
    tokens, size = log.about["held_out_tokens"], log.about["held_out_bytes"]
    assert run.target() == pytest.approx(3.28 * tokens / size / math.log(2), rel=1e-12)
    assert read_run(going, "x").target() is None, "nobody knows yet"
    page, text = page_of(folder)
    rows = {row[0]: row[1:] for row in page.rows if len(row) > 1}
    nats = run.bits_per_byte * math.log(2) * size / tokens
    assert rows["nats per token"] == [f"{nats:.4f}"]
    assert rows["target"] == [f"3.28 nats per token, {run.target():.4f} bits per byte"] and ">target</text>" in text
    page, _ = page_of(going, laptop)
    head = next(row for row in page.rows if row[0] == "run")
    table = {row[0]: dict(zip(head, row, strict=True)) for row in page.rows if len(row) == len(head)}
    assert table["going"]["target"] == "3.28 nats per token" and table["going"]["nats per token"] == "not on file"
    assert table["laptop (best)"]["target"] == "1.35" and table["laptop (best)"]["nats per token"] == "not on file"


def test_parts_of_a_step(copied):
    first, second = copied("first"), copied("second")
    for folder, more in ((second, {}), (first, {"data_ms": 0.5, "forward_ms": 1.0})):
        rows = [
            {name: value for name, value in row.items() if name.removesuffix("_ms") not in parts_of(row)} | more
            for row in read_jsonl(folder / "timing.jsonl")
        ]
        rows[3] |= {"new_ms": 5.0} if more else {}
        (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, text = page_of(first, second)
    table = next(row for row in page.rows if row[1:] == ["data", "forward", "new"])
    values = page.rows[page.rows.index(table) + 1]
    count = len(rows)
    total = 1.5 * count + 5
    shares = [0.5 * count / total, count / total, 5 / total]
    assert values[0] == "first" and [cell.split(", ")[1] for cell in values[1:]] == [f"{share:.1%}" for share in shares]
    assert [cell.split(", ")[0] for cell in values[1:]] == ["0.50 ms", "1.00 ms", f"{5 / count:.2f} ms"]
    chart = re.search(r"<svg[^>]*parts-t.*?</svg>", text, re.DOTALL).group()
    widths = [float(each) for each in re.findall(r'<rect[^>]*width="([\d.]+)"', chart)]
    assert widths == pytest.approx([544 * share for share in shares], abs=0.051)
    assert "Not on file: second." in page.texts


def test_a_run_in_progress(copied):
    folder, early = copied("going"), copied("early")
    for name in ("summary.json", "race.jsonl"):
        (folder / name).unlink()
    for name in ("metrics", "timing"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(lines[:15]) + '\n{"step": 16, "lo')
    for name in ("summary.json", "race.jsonl", "metrics.jsonl", "timing.jsonl"):
        (early / name).unlink()
    page, _ = page_of(folder)
    rows = {row[0]: row[1:] for row in page.rows if len(row) > 1}
    assert rows["state"] == ["at step 15 of 40, no summary yet"] and rows["bits per byte"] == ["not on file"]
    page, _ = page_of(early)
    assert "Tokens a second: nothing on file yet." in page.texts
    assert any(text.startswith("None: ") and "no such checkpoint" in text for text in page.texts)
    done = copied("done")
    page, _ = page_of(early, folder, done)
    head = next(row for row in page.rows if row[0] == "run")
    assert [row[0] for row in page.rows if len(row) == len(head)][1:] == ["done (best)", "going", "early"]


def test_a_run_without_a_summary_has_its_race_log(copied):
    """As those of an ablation."""
    folder = copied("first")
    (folder / "summary.json").unlink()
    page, _ = page_of(folder, copied("second"))
    head = next(row for row in page.rows if row[0] == "run")
    table = {row[0]: row for row in page.rows if len(row) == len(head)}
    for name in ("state", "bits per byte", "tokens", "seconds on the clock", "parameters", "vocabulary", "device"):
        at = head.index(name)
        assert table["first (best)"][at] == table["second"][at] != "not on file", name


def test_without_a_window_the_context_is_in_sight(copied):
    first, second = copied("first"), copied("second")
    about = json.loads((second / "config.json").read_text())
    edit(second / "config.json", config=about["config"] | {"windows": "16,64"})
    _, text = page_of(first, second)
    chart = re.search(r"<svg[^>]*window-t.*?</svg>", text, re.DOTALL).group()
    assert "first: from 32 at 1 to 64 at 40" in chart and "second: from 16 at 1 to 64 at 40" in chart


def test_a_race_log_that_was_edited_is_told(copied):
    folder = copied("first")
    (folder / "race.jsonl").write_text('{"format": "groundup race 1", "link": "0"}\n' * 4)
    page, _ = page_of(folder)
    assert any(row[0] == "race log" and row[1].startswith("refused: ") and "line 1" in row[1] for row in page.rows)


def test_what_is_refused(copied, tmp_path):
    folder, out = copied("first"), tmp_path / "out.html"
    (tmp_path / "empty").mkdir()
    code, _, err = run_program("speedrun.report", folder, tmp_path / "empty", "--out", out)
    assert code == 2 and err.count("\n") == 1 and f"{tmp_path / 'empty'} is no run: expected" in err
    with pytest.raises(ValueError, match="nowhere is no run: expected"):
        report.write([folder, tmp_path / "nowhere"], out)
    with pytest.raises(ValueError, match="named twice"):
        report.write([folder, folder / "../first"], out)
    (folder / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match=r"summary.json: expected a JSON object"):
        report.write([folder], out)
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], "{broken", lines[1]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON"):
        report.write([folder], out)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: .*expected step and loss in each line"):
        report.write([folder], out)
    assert not out.exists()


def test_folders_of_one_name_are_told_apart(copied, tmp_path):
    first = copied("x")
    second = Path(shutil.copytree(first, tmp_path / "deep" / "x"))
    assert {run.label for run in read_runs([first, second])} == {f"{tmp_path.name}/x", "deep/x"}
    assert [run.label for run in read_runs([first])] == ["x"]


def test_a_long_curve_is_drawn_in_means():
    y = np.random.default_rng(0).normal(size=4100)
    found_x, found_y = report_charts.thinned([*range(4100)], y.tolist())
    assert len(found_x) == 373 and found_x[:2] == [10, 21] and found_x[-1] == 4099
    assert np.abs(np.array(found_y[:372]) - y[: 372 * 11].reshape(372, 11).mean(1)).max() <= 1e-12
    assert found_y[-1] == pytest.approx(y[372 * 11 :].mean())
