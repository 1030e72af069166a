"""The benchmark of mixed batches: popularities by hand, that all competitors compute the same, that a wrong one is not
timed."""

import math

import pytest
import torch

from common import timing
from lora.bench_config import BenchConfig
from lora.bench_multi import POPULARITIES, QUICK, Bench, group_sizes, names_of, rows
from lora.multi_layers import split


def test_popularities():
    assert group_sizes("identical", 64) == [64]
    assert group_sizes("distinct", 64) == [1] * 64
    assert group_sizes("uniform", 64) == [8] * 8
    assert group_sizes("uniform", 11) == [3, 3, 3, 2]
    assert group_sizes("zipf", 64) == [1, 2, 3, 4, 6, 8, 12, 18, 10]  # 1.5 to the powers 0 to 7, rounded up, the rest
    assert group_sizes("skewed", 64) == [1, 63]
    for popularity in POPULARITIES:
        for batch in (1, 2, 3, 7, 8, 10, 33):
            sizes = group_sizes(popularity, batch)
            assert sum(sizes) == batch and min(sizes) >= 1
            groups = split(names_of(popularity, batch)).values()
            assert sorted(map(len, groups)) == sorted(sizes)
    assert [len(group_sizes("uniform", n)) for n in range(1, 30)] == [math.ceil(math.sqrt(n)) for n in range(1, 30)]
    assert names_of("uniform", 64) != sorted(names_of("uniform", 64))
    with pytest.raises(ValueError, match="popularity 'even': expected one of identical, distinct"):
        group_sizes("even", 3)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(QUICK, "cpu")


def test_what_decodes_with_a_cache_reads_what_a_whole_pass_reads(bench):
    names = names_of("zipf", QUICK.batch)
    runs = bench.competitors(names)
    with torch.no_grad():
        bench.server.select(names)
        whole_BV = bench.server.model(bench.tokens_BT)[:, -1]
        merged_BV = bench.merged(bench.tokens_BT)[:, -1]
        bench.server.select(None)
        none_BV = bench.server.model(bench.tokens_BT)[:, -1]
    for name, run in runs.items():
        expected_BV = {"one adapter, merged": merged_BV, "one adapter": merged_BV, "no adapter": none_BV}
        for _ in range(2):  # each call begins after the prompts again
            assert (run() - expected_BV.get(name, whole_BV)).abs().max() <= 1e-5, name
    assert bench.check({name: run() for name, run in runs.items()})


def test_each_step_goes_through_the_head(bench):
    seen, run = [], bench.competitors(names_of("zipf", QUICK.batch))["mixed, torch"]
    hook = bench.server.model.head.register_forward_hook(lambda layer, args, out: seen.append(out.shape))
    run()
    hook.remove()
    assert seen == [(QUICK.batch, 1, QUICK.model.vocab_size)] * QUICK.steps


@pytest.mark.parametrize("wrong", ["mixed, torch", "one adapter", "no adapter"])
def test_a_competitor_that_computes_something_else_is_not_timed(bench, wrong):
    runs = bench.competitors(names_of("distinct", QUICK.batch))
    other = {"mixed, torch": "no adapter", "one adapter": "no adapter", "no adapter": "mixed, torch"}[wrong]
    runs[wrong] = runs[other]
    with pytest.raises(ValueError, match="check failed, nothing was timed"):
        timing.compare(runs, rounds=1, warmup=0, check=bench.check, inner=1)


def test_a_row_for_each_popularity_and_competitor(monkeypatch):
    monkeypatch.setattr(timing, "SETTLE_S", 0)
    found = list(rows(BenchConfig(device="cpu", rounds=1, quick=True)))
    cases = ["mixed, torch", "loop over adapters", "one adapter", "one adapter, merged", "no adapter"]
    assert [(row["popularity"], row["case"]) for row in found] == [(p, c) for p in POPULARITIES for c in cases]
    for row in found:
        assert row["tokens_per_s"] == QUICK.batch * QUICK.steps / row["samples"].median
        one = next(r for r in found if (r["popularity"], r["case"]) == (row["popularity"], "one adapter"))
        assert row["beside_one"] == pytest.approx(row["tokens_per_s"] / one["tokens_per_s"])
    assert [row["adapters"] for row in found[::5]] == [1, 4, 2, 3, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_compute_what_the_host_launches():
    made = Bench(QUICK, "cuda")
    runs = made.competitors(names_of("zipf", QUICK.batch))
    expected = {name: run() for name, run in runs.items()}
    graphs = {name: made.graph(run) for name, run in runs.items()}
    del runs  # a graph keeps what it reads
    torch.cuda.empty_cache()
    for name, graph in graphs.items():
        assert (graph() - expected[name]).abs().max() <= 1e-4, name
    assert made.check({name: graph() for name, graph in graphs.items()})
