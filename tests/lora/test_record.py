"""A finished run filed under results/: the numbers of its own report, computed once more from its lines."""

import json
from dataclasses import replace

import pytest

from lora.finetune import finetune
from lora.record import RecordConfig, record
from tests.lora.finetune_runs import alone, tiny_config


def test_a_run_is_filed_with_the_numbers_of_its_report(tmp_path):
    config = tiny_config(tmp_path, method="lora")
    report = finetune(config, alone())
    finetune_file, differences, picture = record(RecordConfig(config.folder, tmp_path / "results"))
    (row,) = json.loads(finetune_file.read_text())["rows"]
    lines = [json.loads(line) for line in (config.folder / "lora/held_out.jsonl").read_text().splitlines()]
    assert row["examples"] == len(lines) and row["trained"] == sum(
        json.loads((config.folder / "lora/summary.json").read_text())[key] for key in ("trained",)
    )
    assert row["loss_after"] == pytest.approx(
        sum(x["nats"] for x in lines) / sum(x["tokens"] for x in lines), rel=1e-12
    )
    assert row["right_after"] == sum(x["exact"] for x in lines)
    assert f"{row['loss_before']:.3f} → {row['loss_after']:.3f}" in report
    (pair,) = json.loads(differences.read_text())["rows"]
    assert (pair["a"], pair["b"]) == ("lora", "base") and 0 < pair["p"] <= 1
    assert pair["loss_low"] <= pair["loss_difference"] <= pair["loss_high"]
    assert pair["loss_difference"] == pytest.approx(row["loss_after"] - row["loss_before"], rel=1e-9)
    assert picture.read_bytes() == (config.folder / "curves.png").read_bytes()


def test_the_base_is_that_of_the_report(tmp_path):
    """Not the quantised one, though qlora comes first; and answers that are no signatures are not counted as such."""
    config = tiny_config(tmp_path, method="qlora", steps=2)
    finetune(config, alone())
    text = finetune(replace(config, method="bd-lora", resume=True), alone())
    finetune_file, differences, _ = record(RecordConfig(config.folder, tmp_path / "results"))
    pairs = {(row["a"], row["b"]): row for row in json.loads(differences.read_text())["rows"]}
    for method in ("qlora", "bd-lora"):
        assert f"loss {method} - base = {pairs[method, 'base']['loss_difference']:+.3f} [" in text
    rows = {row["method"]: row for row in json.loads(finetune_file.read_text())["rows"]}
    assert rows["qlora"]["loss_before"] != rows["bd-lora"]["loss_before"]
    expected = rows["qlora"]["loss_after"] - rows["bd-lora"]["loss_before"]
    assert pairs["qlora", "base"]["loss_difference"] == pytest.approx(expected, rel=1e-9)
    assert rows["qlora"]["parses_after"] is None


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run: expected curves.png and a method with summary.json"):
        record(RecordConfig(tmp_path))
