"""README tables made from a tree of result files: which file, which rows, which cells, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common import tables
from common.results import save_result
from common.tables import rewrite

ROWS = [
    {"case": "add", "dtype": "f32", "ms": 0.12345, "ratio": 2},
    {"case": "a|b", "dtype": "f32", "ms": "nan", "note": "line\nbreak"},
    {"case": "mm", "dtype": "f64", "ms": None, "ratio": 0.5},
]


def result(root: Path, rows=ROWS, *, name="bench", device="amd-epyc-2threads", date="2026-01-02") -> Path:
    path = root / "results" / "autograd" / f"{name}_{device}_{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device, "date": date, "rows": rows}))
    return path


def readme(root: Path, options='columns="case"', *, where="autograd/README.md", inside="", name="bench") -> Path:
    path = root / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# Title\n\n<!-- table: autograd/{name} {options} -->\n{inside}<!-- /table -->\n\nafter\n")
    return path


def block(path: Path) -> str:
    text = path.read_text()
    assert text.startswith("# Title\n\n<!-- table: autograd/") and text.endswith("<!-- /table -->\n\nafter\n")
    return text.split("-->\n", 1)[1].rsplit("<!--", 1)[0]


def test_the_whole_block(tmp_path):
    result(tmp_path)
    path = readme(tmp_path, 'columns="case,dtype=type, ms:.2f=time (ms),ratio:.1f, note"', inside="old\n")
    assert rewrite(tmp_path) == [path]
    file = "bench_amd-epyc-2threads_2026-01-02.json"
    assert block(path) == (
        "\n"
        "| case | type | time (ms) | ratio | note |\n"
        "| --- | --- | --- | --: | --- |\n"
        "| add | f32 | 0.12 | 2.0 | – |\n"
        "| a\\|b | f32 | nan | – | line break |\n"
        "| mm | f64 | – | 0.5 | – |\n"
        "\n"
        f"*amd-epyc-2threads, 2026-01-02, [{file}](../results/autograd/{file})*\n"
        "\n"
    )


def test_keys_below_keys(tmp_path):
    result(tmp_path, [{"case": "a", "bits": {"low": -0.5, "of": {"n": 3}}}, {"case": "b", "bits": None}])
    path = readme(tmp_path, 'columns="case,bits.low:+.2f,bits.of.n=seeds" where="bits.of.n=3"')
    rewrite(tmp_path)
    assert "| case | bits.low | seeds |\n| --- | --: | --: |\n| a | -0.50 | 3 |\n\n" in block(path)
    path = readme(tmp_path, 'columns="case,bits.low"')
    rewrite(tmp_path)
    assert "| a | -0.5 |\n| b | – |\n" in block(path)


def test_a_second_time_changes_nothing(tmp_path):
    result(tmp_path)
    path = readme(tmp_path)
    readme(tmp_path, where="README.md", name="absent")
    assert len(rewrite(tmp_path)) == 2
    once = path.read_bytes()
    assert rewrite(tmp_path) == [] and path.read_bytes() == once


def test_check_writes_nothing(tmp_path):
    result(tmp_path)
    path = readme(tmp_path)
    before = path.read_bytes()
    assert rewrite(tmp_path, check=True) == [path] and path.read_bytes() == before
    rewrite(tmp_path)
    assert rewrite(tmp_path, check=True) == []


def test_without_a_result_not_yet_measured(tmp_path):
    path = readme(tmp_path, inside="| old |\n")
    rewrite(tmp_path)
    assert block(path) == "\n*Not yet measured.*\n\n"
    result(tmp_path, name="bench_other")
    result(tmp_path, name="benchmark")
    assert rewrite(tmp_path) == [], "files of other names are not this one's"


def test_the_newest_date_wins(tmp_path):
    for date in ("2026-02-01", "2025-12-31", "2026-01-31"):
        result(tmp_path, [{"case": date}], date=date)
    path = readme(tmp_path)
    rewrite(tmp_path)
    assert "| 2026-02-01 |" in block(path) and "2025" not in block(path) and "01-31" not in block(path)


def test_each_device_has_a_table(tmp_path):
    result(tmp_path, [{"case": "old"}], device="nvidia-h100", date="2026-01-01")
    result(tmp_path, [{"case": "slow"}], device="amd-epyc-2threads", date="2026-03-01")
    result(tmp_path, [{"case": "fast"}], device="nvidia-h100", date="2026-02-01")
    path = readme(tmp_path)
    rewrite(tmp_path)
    text = block(path)
    assert text.count("| case |") == 2 and "old" not in text
    assert text.index("slow") < text.index("*amd-epyc-2threads, 2026-03-01") < text.index("fast")
    assert text.index("fast") < text.index("*nvidia-h100, 2026-02-01")


def test_a_name_with_underscores(tmp_path):
    result(tmp_path, [{"case": "short"}])
    result(tmp_path, [{"case": "long"}], name="bench_ops")
    path = readme(tmp_path, name="bench_ops")
    rewrite(tmp_path)
    assert "long" in block(path) and "short" not in block(path)


def test_where(tmp_path):
    result(tmp_path)
    path = readme(tmp_path, 'columns="case" where="dtype=f32, ratio=2"')
    rewrite(tmp_path)
    assert "add" in block(path) and "a\\|b" not in block(path) and "mm" not in block(path)


def test_a_file_that_save_result_wrote(tmp_path):
    saved = save_result("autograd", "bench", [{"case": "x", "ms": 1.5}], config={}, root=tmp_path / "results")
    path = readme(tmp_path, 'columns="case,ms:.1f"')
    rewrite(tmp_path)
    assert "| x | 1.5 |" in block(path) and saved.name in block(path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ('columns="case,speed"', "no column 'speed' in .*bench_amd.*json; it has case, dtype, ms, note, ratio"),
        ('columns="ratio:.9q"', "column 'ratio'"),
        ('columns="case" where="dtype=f16"', "no row of .*bench_amd"),
        ('columns="case" where="dtype"', "expected key=value"),
        ('columns="case,,ms"', "expected a column"),
        ("", "no columns"),
        ('colums="case"', "expected <!-- table"),
        ("columns=case", "expected <!-- table"),
    ],
)
def test_a_table_that_cannot_be_made_names_the_readme(tmp_path, options, says):
    result(tmp_path)
    path = readme(tmp_path, options)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"README\.md, line 3: {says}"):
        rewrite(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('x\n<!-- table: a/b columns="c" -->\ny\n', "line 2: a table begins and does not end"),
        ("x\n\n<!-- /table -->\n", "line 3: end of a table that did not begin"),
        (
            '<!-- table: a/b columns="c" -->\n' * 2 + "<!-- /table -->\n",
            "line 2: a table begins inside the one of line 1",
        ),
        ("<!-- table: ab -->\n<!-- /table -->\n", "line 1: expected <!-- table"),
        ("<!-- table: a/b\ncolumns -->\n<!-- /table -->\n", "line 1: expected <!-- table"),
    ],
)
def test_markers_without_partner_name_file_and_line(tmp_path, text, says):
    (tmp_path / "notes.md").write_text(text)
    with pytest.raises(ValueError, match=rf"notes\.md, {says}"):
        rewrite(tmp_path)


@pytest.mark.parametrize("fence", ["```", "~~~~", "   ```md"])
def test_code_is_left_alone(tmp_path, fence):
    close = fence.strip().removesuffix("md")
    code = f'{fence}\n<!-- table: a/b columns="c" -->\n{close}\n\n    <!-- /table -->\n\n'
    path = readme(tmp_path)
    path.write_text(code + path.read_text())
    rewrite(tmp_path)
    text = path.read_text()
    assert text.startswith(code) and "Not yet measured" in text, "and what follows the code is not code"


def test_git_decides_which_files(tmp_path):
    subprocess.run(["git", "init", tmp_path], check=True, capture_output=True)
    (tmp_path / ".gitignore").write_text("ignored/\n")
    path = readme(tmp_path, where="autograd/README.md")
    readme(tmp_path, where="ignored/README.md")
    assert rewrite(tmp_path) == [path]


def program(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["tables", *argv])
    return tables.main()


def test_the_program(tmp_path, monkeypatch, capsys):
    result(tmp_path)
    path = readme(tmp_path)
    assert program(monkeypatch, "--root", str(tmp_path), "--check") == 1
    assert capsys.readouterr().out == f"{path}: differs from results/\n"
    assert program(monkeypatch, "--root", str(tmp_path)) == 0
    assert capsys.readouterr().out == f"{path}: rewritten\n"
    assert program(monkeypatch, "--root", str(tmp_path), "--check") == 0
    assert capsys.readouterr().out == ""
