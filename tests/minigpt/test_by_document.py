"""Bits by document against single documents scored by hand, and the run's own number."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from common import cli
from common.log import read_jsonl
from minigpt import by_document
from minigpt.checkpoint import load_run
from minigpt.train import train
from minigpt.train_config import PRESETS

SMALL = {
    "steps": 3,
    "device": "cpu",
    "layers": 1,
    "context": 16,
    "eval_stride": 16,
    "eval_every": 3,
    "checkpoint_every": 3,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one text in different tokens and windows, and one of another text."""
    folder = tmp_path_factory.mktemp("runs")
    for name, words in (("text", "one two three four five six "), ("other", "seven eight nine ")):
        (folder / name).mkdir()
        for number in range(60):
            (folder / name / f"{number}.txt").write_text(words * (1 + number % 5) + str(number))
    for name, text, options in (
        ("bytes", "text", {"tokenizer": "bytes", "eval_stride": 5, "dtype": "float32"}),
        ("bpe", "text", {"tokenizer": "bpe:270", "eval_stride": 16, "document_mask": True, "dtype": "bfloat16"}),
        ("elsewhere", "other", {"tokenizer": "bytes", "dtype": "float32"}),
    ):
        train(replace(PRESETS["tiny"], **(SMALL | options), corpus=str(folder / text), folder=folder / name))
    return folder


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_the_sum_is_what_the_run_says(runs, name):
    found = by_document.by_document(runs / name)
    said = read_jsonl(runs / name / "metrics.jsonl")[-1]["held_out_bits_per_byte"]
    assert abs(found.bits_per_byte - said) <= 1e-9
    assert found.names and [(runs / "text" / name).stat().st_size for name in found.names] == found.sizes.tolist()


def test_each_document_is_the_sum_of_its_predictions(runs):
    """One prediction at a time, from what the rule of the windows lets it see."""
    found = by_document.by_document(runs / "bytes")
    model, tokenizer = load_run(runs / "bytes")
    texts = [tokenizer.encode((runs / "text" / name).read_text()) for name in found.names]
    tokens = np.concatenate([part for text in texts for part in ([tokenizer.separator], text)]).astype(np.int64)
    bits, document = np.zeros(len(texts)), -1
    for place, token in enumerate(tokens):
        document += token == tokenizer.separator
        if place == 0:
            continue
        end = 16
        while end < place:
            end = min(end + 5, tokens.size - 1)
        with torch.no_grad():
            logits_V = model(torch.from_numpy(tokens[None, end - 16 : place]))[0, -1]
        bits[document] -= logits_V.log_softmax(0)[token].item() / math.log(2)
    assert len(texts) > 1 and np.abs(found.bits - bits).max() <= 1e-4


def test_a_table_of_one_and_of_two(runs, monkeypatch, capsys):
    names, sizes = ("a.py", "long/b.py", "c.py"), np.array([10, 100, 90])
    first = by_document.DocumentBits(names, sizes, np.array([40.0, 100.0, 60.0]))
    second = by_document.DocumentBits(names, sizes, np.array([20.0, 104.0, 59.0]))
    one = by_document.table({"x": first}, 2).splitlines()
    assert one[1].split() == ["long/b.py", "100", "1.0000", "+0.5000"]
    assert one[2].split() == ["c.py", "90", "0.6667", "+0.3000"]
    assert one[3].split() == ["all", "documents", "200", "1.0000", "+1.0000"] and len(one) == 4
    two = by_document.table({"x": first, "y": second}, 9).splitlines()
    assert [line.split()[0] for line in two[1:]] == ["a.py", "long/b.py", "c.py", "all"]
    assert two[1].split() == ["a.py", "10", "4.0000", "2.0000", "-0.1000"]
    assert two[4].split() == ["all", "documents", "200", "1.0000", "0.9150", "-0.0850"]
    monkeypatch.setattr(sys, "argv", ["by_document", str(runs / "bytes"), str(runs / "bpe"), "--rows", "2"])
    by_document.main()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["document", "bytes", "bytes", "bpe", "difference"] and len(shown) == 4


def test_bad_input(runs, monkeypatch, capsys, tmp_path):
    def refused(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["by_document", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.run(by_document.main)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    with monkeypatch.context() as patched:
        patched.setattr(by_document, "load_data", None)  # before any work
        assert "expected runs of the same text" in refused(runs / "bytes", runs / "elsewhere")
    assert "expected one run, or two different ones" in refused(runs / "bytes", runs / "bytes")
    assert "rows 0: expected at least 1" in refused(runs / "bytes", "--rows", 0)
    assert "expected a run folder" in refused(tmp_path)
    load = by_document.load_data
    monkeypatch.setattr(by_document, "load_data", lambda *given: replace(load(*given), held_out_names=None))
    assert "have no names here: expected text" in refused(runs / "bytes")
    monkeypatch.setattr(by_document, "load_data", load)
    changed = runs / "text" / "changed.txt"
    changed.write_text("new")
    try:
        assert "was trained on other text than" in refused(runs / "bytes")
    finally:
        changed.unlink()
