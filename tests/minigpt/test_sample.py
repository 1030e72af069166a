"""Sampling against brute force: argmax, exact frequencies, and Python's own UTF-8 decoder."""

import math
import sys

import pytest
import torch

from common import cli
from minigpt import sample
from minigpt.checkpoint import save_checkpoint
from minigpt.config import GPTConfig
from minigpt.model import GPT
from minigpt.sample import as_text, generate, next_token

CONFIG = GPTConfig(vocab_size=256, context=8, layers=1, width=16, heads=2, kv_heads=1, mlp_width=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
        model.head.weight[0] = 0  # the separator never wins, so samples are long
    return model


def test_temperature_zero_is_the_argmax_by_brute_force(model):
    ours = list(generate(model, b"abc", length=20, temperature=0))
    tokens = [0, *b"abc"]
    for _ in range(20):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-8:]]))[0, -1]
        tokens.append(max(range(256), key=lambda i: logits[i].item()))
    assert ours == tokens[4:]
    assert ours == list(generate(model, b"abc", length=20, temperature=1.0, top_k=1))
    assert ours == list(generate(model, b"abc", length=20, temperature=1e-30)), "the limit of small temperatures"


def test_the_seed_decides(model):
    first = list(generate(model, b"", length=40, temperature=1.0, seed=5))
    torch.manual_seed(1)
    assert first == list(generate(model, b"", length=40, temperature=1.0, seed=5))
    assert first != list(generate(model, b"", length=40, temperature=1.0, seed=6))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 3)])
def test_frequencies_are_those_of_the_softmax(temperature, top_k):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    if top_k:
        smallest = sorted(weights)[-top_k]
        weights = [w if w >= smallest else 0.0 for w in weights]
    generator = torch.Generator().manual_seed(0)
    draws = [next_token(logits, temperature=temperature, top_k=top_k, generator=generator) for _ in range(4000)]
    for token, weight in enumerate(weights):
        p = weight / sum(weights)
        deviation = abs(draws.count(token) - 4000 * p)
        assert deviation <= 4.5 * math.sqrt(4000 * p * (1 - p)), f"token {token}: {draws.count(token)} of {4000 * p}"


def test_a_new_document_ends_the_sample(model):
    class Ending(torch.nn.Module):
        config = CONFIG

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens_BT):
            logits = torch.zeros(1, tokens_BT.shape[1], 256)
            logits[..., 0 if tokens_BT[0, -1] == ord("c") else tokens_BT[0, -1] + 1] = 1
            return logits

    assert bytes(generate(Ending(), b"a", length=9, temperature=0)) == b"bc"


def test_bytes_become_text_as_soon_as_a_character_is_whole():
    pieces = list(as_text(iter("aé€😀".encode())))
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]
    for broken in (b"\xff", b"a\xe2\x82b", b"\xe2\x82", b"\xf0\x9f\x98"):
        assert "".join(as_text(iter(broken))) == broken.decode(errors="replace")


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        next_token(torch.tensor([1.0, math.nan]), temperature=0, top_k=0, generator=torch.Generator())


def test_the_program_streams_the_prompt_and_the_sample(model, tmp_path, monkeypatch, capsys):
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__slots__}
    save_checkpoint(tmp_path / "checkpoint.pt", {"model": model.state_dict(), "model_config": fields})
    flags = ["--folder", str(tmp_path), "--prompt", "dé", "--length", "9", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["program", *flags])
    with pytest.raises(SystemExit) as stop:
        cli.run(sample.main)
    tokens = bytes(generate(model, "dé".encode(), length=9, temperature=0.8, seed=3))
    assert stop.value.code is None and capsys.readouterr().out == "dé" + tokens.decode(errors="replace") + "\n"
