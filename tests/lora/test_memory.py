"""Predicted bytes against the storages of models that train, in three families and odd ones; states against sums by
hand; the shapes of 8B and 70B against their published sizes; the command."""

import json
from dataclasses import asdict

import pytest
import torch

from lora import memory
from lora.adamw8bit import AdamW8bit
from lora.budget import linear_shapes, predict, skeleton, states, written_out
from lora.config import LoraConfig
from lora.lora import adapter_parameters, add_adapter
from lora.memory import EQUAL, SHAPES, MemoryConfig, large_rows, measure
from lora.paged import block_bytes
from lora.qlora import quantise_base
from lora.quantised import QuantisedLinear
from minigpt.config import GPTConfig
from minigpt.model import GPT
from parallel.memory import LiveBytes
from tests.cuda.products import DEVICES

GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu", "qkv_bias": True, "output_bias": True, "mlp_bias": True,
    "qk_norm": False, "tied": True, "softcap": 0.0,
}  # fmt: skip
LLAMA = {"mlp": "swiglu", "qk_norm": False, "softcap": 0.0, "kv_heads": 2}
QWEN = {"mlp": "swiglu", "head_width": 20, "softcap": 0.0, "tied": True, "kv_heads": 1}
ODD = {"window": 5, "window_pattern": "SL", "value_embeddings": True, "positions": "learned", "kv_heads": 2}
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN, "ours": {}, "odd": ODD}
#         layers, width, MLP, vocabulary, T: many tokens, wide MLP, many logits, many weights for few tokens.
SIZES = [(1, 32, 16, 32, 24), (2, 32, 256, 32, 40), (1, 64, 128, 1000, 16), (2, 64, 64, 64, 8), (2, 96, 384, 200, 33)]
METHODS = ("full", "lora", "nf4", "nf4-double", "int8", "int4")


def config_of(family, size) -> GPTConfig:
    layers, width, mlp_width, vocab_size, T = size
    sizes = {"layers": layers, "width": width, "mlp_width": mlp_width, "vocab_size": vocab_size, "context": T + 3}
    return GPTConfig(**{"heads": 4, **FAMILIES[family], **sizes})


def compare(config, method, optimizer, T, page=2**22, device="cpu", rank=3):
    shape = {"rank": rank, "rows": 2, "T": T, "page": page}
    predicted = asdict(predict(skeleton(config), method, optimizer, **shape, fused=device != "cpu"))
    measured = measure(config, method, optimizer, **shape, device=device)
    names = EQUAL if device == "cpu" else EQUAL[:-1]
    assert {name: measured[name] for name in names} == {name: predicted[name] for name in names}
    assert 0 <= measured["peak"] - measured["kept"] <= predicted["above"]
    return predicted, measured


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_is_measured(family):
    """Methods and optimizers in turn: each family, size and method comes with several of the others."""
    first = list(FAMILIES).index(family)
    for number, size in enumerate(SIZES):
        for method in (METHODS[(first + number) % 6], METHODS[(first + number + 3) % 6]):
            optimizer = ("adamw", "adamw8bit", "paged")[(first + number) % 3]
            compare(config_of(family, size), method, optimizer, size[-1])


@pytest.mark.parametrize("method", ["full", "nf4-double"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged"])
def test_optimizers_and_pages(method, optimizer):
    for page in (20 * block_bytes(True) + 7, 2**22):
        compare(config_of("llama", SIZES[1]), method, optimizer, 40, page, rank=20)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged"])
def test_on_a_gpu(device, optimizer):
    """Its allocator has what is held, each tensor rounded up, and libraries' workspaces."""
    for method in METHODS:
        _, measured = compare(config_of("llama", SIZES[4]), method, optimizer, 33, device=device)
        assert measured["allocated"] >= sum(
            measured[name] for name in ("weights", "adapters", "gradients", "optimizer")
        )


@pytest.mark.parametrize("optimizer", ["adamw", "paged"])
def test_nothing_else_is_alive(optimizer):
    """All storages that operations of two steps touched, and that are still there, are those of the table."""
    config, tokens_BT = config_of("llama", SIZES[1]), torch.randint(32, (2, 41))
    predicted = predict(skeleton(config), "nf4-double", optimizer, rank=20, rows=2, T=40)
    model = GPT(config, seed=0)
    quantise_base(model)
    add_adapter(model, LoraConfig(rank=20))
    trained = adapter_parameters(model)
    with LiveBytes() as live:
        stepper = torch.optim.AdamW(trained, fused=True) if optimizer == "adamw" else AdamW8bit(trained, paged=True)
        for _ in range(2):
            stepper.zero_grad()
            model(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
            stepper.step()
    maps = 0 if optimizer == "adamw" else 2 * 1024  # those that the device's are copies of
    assert live.now() == predicted.held + predicted.host + tokens_BT.nbytes + maps


def test_states_by_hand():
    shapes = [(64, 100), (5000,), (4095,), (2, 2)]  # 25 and 20 blocks
    small, counters, maps = 8 * (4095 + 4), 4 * 4, 2048
    assert states(shapes, "adamw") == (8 * (6400 + 5000) + small + counters, 0)
    assert states(shapes, "adamw8bit") == (45 * 520 + small + maps, counters)
    assert states(shapes, "paged", page=10 * 520 + 3) == (2 * 10 * 520 + small + maps, 45 * 520 + counters)
    assert states(shapes, "paged") == (45 * 520 + small + maps, 45 * 520 + counters)  # one page
    assert states([(3, 3)], "paged") == (72, 4) and states([(3, 3)], "adamw8bit") == (72, 4)


@pytest.mark.parametrize("shape", [(64, 64), (128, 512), (200, 96), (33, 70)])
def test_a_weight_written_out(shape):
    for format in METHODS[2:]:
        layer = QuantisedLinear.from_linear(torch.nn.Linear(shape[1], shape[0]), format)
        with LiveBytes() as live:
            for x in layer.buffers():
                live.add(x)
            before = live.now()
            layer.dequantised()
        assert live.peak - before == pytest.approx(written_out(shape, format), rel=0.01)


def test_large_shapes():
    """As many parameters as Meta's models have, and LoRA of rank 8 in 8B by PEFT."""
    found = {(row["shape"], row["method"], row["optimizer"]): row["predicted"] for row in large_rows(rank=8)}
    assert len(found) == 2 * 6 * 3
    for name, numbers in (("8B", 8_030_261_248), ("70B", 70_553_706_496)):
        tables = 2 * 8 * SHAPES[name].context * SHAPES[name].key_width
        assert found[name, "full", "adamw"]["weights"] == 4 * numbers + tables
        assert found[name, "lora", "adamw"]["weights"] == 2 * numbers + tables
        linear = linear_shapes(skeleton(SHAPES[name]))
        frozen = sum(rows * columns for rows, columns in linear)
        packed = found[name, "nf4-double", "paged"]["weights"] - tables - 2 * (numbers - frozen)
        assert packed * 8 / frozen == pytest.approx(4.127, abs=1e-3)
    assert found["8B", "lora", "adamw"]["adapters"] == 4 * 20_971_520
    assert found["8B", "full", "paged"]["optimizer"] < 2**24 < found["8B", "full", "paged"]["host"]


def test_the_command(capsys, monkeypatch, tmp_path):
    flags = (
        "--layers 1 --width 32 --mlp-width 40 --vocab-size 50 --context 12 --rows 2 --rank 2 --format nf4-double --save"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["memory", *flags.split(), "--optimizer", "paged", "--no-large"])
    memory.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "equal; peak" in lines[1] and "within" in lines[1]
    held = dict(zip(lines[0].split()[2:], lines[1].split()[2:9], strict=False))
    parts = sum(float(held[name]) for name in ("weights", "adapters", "gradients", "optimizer"))
    assert float(held["held"]) == pytest.approx(parts, abs=0.002)
    (row,) = json.loads((tmp_path / lines[2]).read_text())["rows"]
    for name in ("weights", "adapters", "gradients", "optimizer", "host", "kept"):
        assert row[f"{name}_bytes"] == row[f"measured_{name}_bytes"]
    assert (row["method"], row["optimizer"]) == ("nf4-double", "paged")
    parts = sum(row[f"{name}_bytes"] for name in ("weights", "adapters", "gradients", "optimizer"))
    assert parts / 2**20 == row["held_mib"] == row["measured_held_mib"] == pytest.approx(float(held["held"]), abs=1e-3)


def test_what_differs_is_named():
    row = next(
        memory.rows(MemoryConfig(layers=1, width=32, vocab_size=50, context=12, format="lora", optimizer="adamw"))
    )
    assert memory.verdict(row).startswith("equal; peak")
    row["measured"] |= {"adapters": 17, "peak": 10**9}
    assert memory.verdict(row).startswith("adapters 17 bytes; peak") and "OUTSIDE" in memory.verdict(row)
    row["measured"]["most_allocated"] = 3 * 2**19  # of a GPU
    assert memory.verdict(row).endswith("; torch handed out 1.50")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0: expected at least 1"),
        ({"rows": -1}, "rows -1: expected at least 1"),
        ({"page": 3}, "page 3: expected at least 520 bytes"),
        ({"width": 0}, "width 0"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**options)
