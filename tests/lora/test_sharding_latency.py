"""The model of a forward pass: sums by hand, links and products that are really measured, refusals."""

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch

from common.log import cpu_threads
from common.timing import Samples
from lora import sharding_latency
from lora.sharded import shard_adapter, sharded_layers
from lora.sharding import SHARDINGS
from lora.sharding_costs import MODELS, factor_sizes, projections
from lora.sharding_latency import (
    LatencyConfig,
    adapter_products,
    base_products,
    find_links,
    main,
    measure_products,
    modelled,
)  # fmt: skip
from lora.targets import kind_of
from minigpt.config import GPTConfig
from parallel.costs import Link
from tests.lora.test_sharded import LLAMA, alone, lora

TINY = GPTConfig(layers=3, width=16, heads=4, kv_heads=4, mlp="swiglu", mlp_width=24)
GIVEN = ["--latency-us", "10", "--gigabytes-per-s", "0.5"]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("model", list(MODELS))
def test_products_of_a_rank_have_its_multiply_adds(model, ranks):
    config = MODELS[model]
    assert sum(i * o for i, o in base_products(config, ranks)) == sum(
        p.inputs * p.outputs // ranks for p in projections(config)
    )
    for sharding in SHARDINGS:
        products = adapter_products(config, sharding, 16, ranks)
        sizes = [size for p in projections(config) for size in factor_sizes(p, sharding, 16, ranks)]
        assert [i * o for i, o in products] == sizes


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_products_are_those_of_layers_that_are_really_cut(sharding):
    stage, comm = alone(2)
    names = tuple(p.name for p in projections(LLAMA))
    shard_adapter(stage, lora(sharding, 2, names), sharding, comm, {})
    layers = {kind_of(name): layer for name, layer in sharded_layers(stage).items()}
    made = [factor.shape[::-1] for name in names for factor in (layers[name].shard.A, layers[name].shard.B)]
    assert adapter_products(LLAMA, sharding, 8, 2) == made
    assert base_products(LLAMA, 2) == [layers[name].base.weight.shape[::-1] for name in names]


def test_the_sum_by_hand(monkeypatch):
    """With a product of I x O taking I O seconds, a message 100 and a byte 1."""
    monkeypatch.setitem(MODELS, "8B", TINY)
    config = LatencyConfig(ranks=2, rank=4, multiple=1, tokens=5, dtype="bfloat16")
    seconds = {(i, o): float(i * o) for i in range(25) for o in range(25)}
    link = Link(100.0, 1.0)
    rows = modelled(config, {"base": seconds, "adapter": seconds}, {"all_reduce": link, "all_gather": link})
    base = 3 * (4 * 16 * 16 + 3 * 16 * 24) / 2
    columns, down = [(16, 16)] * 3 + [(16, 24)] * 2, [(16, 16), (24, 16)]
    products = {
        "block-diagonal": 3 * sum(4 * i / 2 + 4 * o / 4 for i, o in columns + [(o, i) for i, o in down]),
        "s-lora": 3 * sum(4 * (i + o) / 2 for i, o in columns + down),
        "replicated": 3 * (sum(4 * i + 4 * o / 2 for i, o in columns) + sum(4 * i / 2 + 4 * o for i, o in down)),
    }
    sums = 3 * 2 * (100 + 5 * 16 * 2)
    for row in rows:
        assert row["base_products_s"] == base and row["base_collectives_s"] == sums
        assert row["products_s"] == products[row["way"]]
        assert row["collectives_s"] == (3 * 7 * (100 + 5 * 4 * 4) if row["way"] == "s-lora" else 0)
        assert row["total_s"] == sum(
            row[f"{part}_s"] for part in ("base_products", "base_collectives", "products", "collectives")
        )
        assert row["speedup_over_s_lora"] == rows[1]["total_s"] / row["total_s"]


def test_collectives_and_products_are_measured(monkeypatch):
    monkeypatch.setitem(MODELS, "8B", TINY)
    config = LatencyConfig(ranks=2, rank=4, tokens=3, rounds=1)
    links, origin = find_links(config)
    assert origin == f"measured, 2 ranks of gloo on {cpu_threads()} CPU threads of this machine"
    assert set(links) == {"all_reduce", "all_gather"}
    assert all(link.alpha >= 0 and link.beta >= 0 and link.alpha + link.beta > 0 for link in links.values())
    samples = measure_products(config)
    wanted = {p for s in SHARDINGS for p in adapter_products(TINY, s, config.rank_of(s), 2)}
    assert set(samples["base"]) == set(base_products(TINY, 2)) and set(samples["adapter"]) == wanted
    assert all(x.median > 0 for found in samples.values() for x in found.values())


def test_a_link_is_the_line_through_both_sizes(monkeypatch):
    def timed(functions, **_):
        (call,) = functions.values()
        *_, largest = (x for x in call.args if isinstance(x, torch.Tensor))
        return {"it": Samples((3e-6 + 2e-9 * largest.nbytes,))}

    monkeypatch.setattr(sharding_latency, "compare", timed)
    for name in ("Mesh", "make_comm"):  # nobody is there to talk to
        monkeypatch.setattr(sharding_latency, name, mock.MagicMock())
    for link in sharding_latency.measure_links(0, 2, "cpu", 1).values():
        assert (link.alpha, link.beta) == (pytest.approx(3e-6), pytest.approx(2e-9))


def test_the_program(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(MODELS, "8B", TINY)
    main([*GIVEN, "--ranks", "2", "--rank", "4", "--rounds", "1", "--save", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a model of one forward pass of 8B: 16 tokens on 2 ranks")
    assert lines[0].endswith("collectives given, not measured:")
    assert lines[1] == "  all_reduce 10.0 us + 2.0000 ns a byte, all_gather 10.0 us + 2.0000 ns a byte"
    assert [line.split()[:2] for line in lines[3:6]] == [["block-diagonal", "8"], ["s-lora", "4"], ["replicated", "4"]]
    (path,) = (tmp_path / "lora").glob("sharding_latency_*.json")
    assert json.loads(path.read_text())["rows"][1]["speedup_over_s_lora"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 1}, "ranks 1: expected at least 2"), ({"tokens": 0}, "tokens 0"), ({"rank": 12}, "rank 12 of query"),
        ({"latency_us": 5.0}, "latency_us 5.0 and gigabytes_per_s 0.0: expected both positive, or neither"),
        ({"latency_us": float("nan"), "gigabytes_per_s": 1.0}, "latency_us nan"),
    ],
)  # fmt: skip
def test_configs_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        replace(LatencyConfig(), **change)


def test_gpus_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="8 ranks on 1 GPUs: expected as many GPUs, or latency_us"):
        sharding_latency.find_links(LatencyConfig(device="cuda"))
