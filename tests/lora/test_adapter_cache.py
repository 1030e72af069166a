"""Pages: what lies in them, who leaves first, who may not leave, what is counted, everything refused."""

import random

import pytest
import torch

from lora.adapter_cache import AdapterCache, Factors

SIZES = {"one": (5, 7), "two": (3, 4)}


def factors(rank: int, layers=("one", "two"), seed: int = 0, scale: float = 0.5, **changed) -> dict[str, Factors]:
    """Random ones; `changed` are sizes that differ from those of the cache."""
    generator, sizes = torch.Generator().manual_seed(seed), SIZES | changed
    return {
        layer: Factors(
            torch.randn(rank, sizes[layer][0], generator=generator),
            torch.randn(sizes[layer][1], rank, generator=generator),
            scale,
        )
        for layer in layers
    }


def cache(pages: int = 4, ranks: dict[str, int] | None = None, **options) -> AdapterCache:
    """Of pages of four ranks, with adapters of these ranks."""
    made = AdapterCache(SIZES, pages=pages, page_rank=4, **options)
    for seed, (name, rank) in enumerate((ranks or {}).items()):
        made.add(name, factors(rank, seed=seed))
    return made


def product(made: AdapterCache, name: str, layer: str) -> torch.Tensor:
    """scale * B A as the pages have it, up to the ranks that count."""
    pool = made.pools[layer]
    parts = [(pool.A_PRI[p, : pool.ranks_P[p]], pool.B_POR[p, :, : pool.ranks_P[p]], p) for p in made.pages_of(name)]
    assert [int(r) for r in pool.ranks_P] == pool.ranks and pool.scales_P.tolist() == pool.scales
    return sum(pool.scales_P[p] * (B @ A) for A, B, p in parts)


def same(made: AdapterCache, name: str, given: dict[str, Factors]) -> bool:
    """Whether the pages compute what was added, in every layer; nothing where it has none."""
    return all(
        torch.allclose(product(made, name, layer), scale * (B @ A), atol=1e-6) for layer, (A, B, scale) in given.items()
    ) and all(product(made, name, layer).eq(0).all() for layer in made.pools.keys() - given.keys())


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 8, 9, 16])
def test_an_adapter_of_any_rank_lies_in_as_many_pages_as_it_needs(rank):
    made = cache(ranks={"a": rank})
    made.acquire(["a"])
    assert len(made.pages_of("a")) == -(-rank // 4) == made.pages_needed("a")
    ranks = [made.pools["one"].ranks[page] for page in made.pages_of("a")]
    assert sum(ranks) == rank and all(full == 4 for full in ranks[:-1])
    assert same(made, "a", factors(rank))


def test_layers_of_different_ranks_share_page_numbers():
    made = cache(pages=3)
    given = factors(9, ["one"]) | factors(2, ["two"], scale=3.0)
    made.add("a", given)
    made.acquire(["a"])
    assert len(made.pages_of("a")) == 3 and same(made, "a", given)
    assert [made.pools["two"].ranks[page] for page in made.pages_of("a")] == [2, 0, 0]


def test_a_page_forgets_its_last_owner_in_every_layer():
    """The second adapter has no layer `two`, the third no layer `one`: what was there before must not count."""
    made, given = cache(pages=1), {"a": factors(4), "b": factors(2, ["one"], 1), "c": factors(3, ["two"], 2)}
    for name, layers in given.items():
        made.add(name, layers)
    for name in "abcba":
        made.acquire([name])
        assert same(made, name, given[name])
        made.release([name])


def test_a_layer_that_comes_later_has_nothing_of_those_already_there():
    made = cache()
    made.add("a", factors(4, ["one"]))
    assert made.pools.keys() == {"one"}, "no memory for layers that no adapter has"
    made.acquire(["a"])
    made.add("b", factors(4, ["two"], 1))
    made.acquire(["b"])
    assert same(made, "a", factors(4, ["one"])) and same(made, "b", factors(4, ["two"], 1))


def test_the_least_recently_used_leaves_first_and_held_ones_stay():
    made = cache(pages=3, ranks=dict.fromkeys("abcde", 4))
    made.acquire("abc")
    made.release("ac")  # b is held
    made.acquire("a")  # a hit: now c is the oldest that may leave
    made.release("a")
    made.acquire("d")
    assert set(made.resident) == set("abd")
    made.release("b")  # used until now: more recent than a
    made.acquire("e")
    assert set(made.resident) == set("bde")
    assert (made.counts.hits, made.counts.misses, made.counts.evictions) == (1, 5, 2)
    assert made.counts.bytes_moved == 5 * 4 * ((5 + 7) + (3 + 4)) * 4  # five pages of four ranks in float32


def test_a_batch_counts_each_adapter_once_and_two_batches_hold_it_twice():
    made = cache(pages=2, ranks={"a": 4, "b": 8})
    made.acquire(["a", None, "a"])
    made.acquire(["a"])
    assert made.counts.misses == made.counts.hits == 1
    made.release(["a", "a", None])
    with pytest.raises(ValueError, match=r"need 2 pages, and running batches hold 1 of 2 .*expected at most 1"):
        made.acquire(["b"])
    assert made.pages_of("a") and made.counts.evictions == 0, "a refused batch changes nothing"
    made.release(["a"])
    made.acquire(["b"])
    assert list(made.resident) == ["b"]
    with pytest.raises(ValueError, match=r"release of adapters \['a'\]"):
        made.release(["b", "a"])
    made.release(["b"])
    assert made.pages_of(None) == ()


def test_any_order_of_batches_keeps_every_page_with_one_owner():
    """Against a simulation: a list of names in the order of their last use."""
    generator, ranks = random.Random(0), {name: 1 + 3 * i % 14 for i, name in enumerate("abcdefgh")}
    made, running, order = cache(pages=6, ranks=ranks), [], []
    for step in range(400):
        if running and generator.random() < 0.5:
            batch = running.pop(generator.randrange(len(running)))
            made.release(batch)
        else:
            batch = generator.sample("abcdefgh", generator.randint(1, 3))
            before, held = dict(made.resident), {name for other in running for name in other}
            may_leave = [name for name in order if name in before and name not in held and name not in batch]
            try:
                made.acquire(batch)
            except ValueError:
                assert sum(map(made.pages_needed, {*held, *batch})) > 6 and made.resident == before
                continue
            running.append(batch)
            gone, short = [name for name in before if name not in made.resident], len(made.free)
            assert gone == may_leave[: len(gone)]
            assert not gone or short < made.pages_needed(gone[-1]), "no one leaves without need"
        order = [name for name in order if name not in batch] + batch
        taken = [page for pages in made.resident.values() for page in pages] + made.free
        assert sorted(taken) == list(range(6)), step
        assert list(made.resident) == [name for name in order if name in made.resident]
        assert all(same(made, name, factors(ranks[name], seed="abcdefgh".index(name))) for name in made.resident)


def test_half_precision_is_rounded_once_and_float64_keeps_its_scale():
    for dtype in (torch.bfloat16, torch.float64):
        made = cache(dtype=dtype)
        given = factors(3, ["one"], scale=1 / 3)["one"]
        made.add("a", {"one": given})
        made.acquire(["a"])
        pool, (page,) = made.pools["one"], made.pages_of("a")
        assert torch.equal(pool.A_PRI[page, :3], given.A_rI.to(dtype))
        assert torch.equal(pool.B_POR[page, :, :3], given.B_Or.to(dtype))
        assert pool.scales_P.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert made.memory_bytes() == 4 * 4 * (5 + 7) * dtype.itemsize


def test_everything_that_does_not_fit_is_listed():
    made = cache(ranks={"a": 4})
    wrong = factors(17, ["one"]) | factors(2, ["two"], two=(3, 5), scale=float("inf"))
    wrong |= {"three": wrong["two"]}
    wrong["one"].A_rI[2, 3] = float("nan")
    with pytest.raises(ValueError) as caught:
        made.add("b", wrong)
    for part in (
        "adapter 'b'",
        "A of one has values that are NaN",
        "one is of rank 17, 5 pages of 4: expected rank 1 to 16, of 4 pages",
        "B of two has shape [5, 2], expected [4, 2]",
        "the scale of two is inf",
        "three is no linear layer",
    ):
        assert part in str(caught.value)
    assert list(made.stored) == ["a"]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda made: made.acquire(["a", "x", None]), r"adapters \['x'\] are unknown: expected some of \['a', 'b'\]"),
        (lambda made: made.acquire(["a", "b"]), r"\['a', 'b'\] need 5 pages: expected at most 4"),
        (lambda made: made.pages_of("a"), "'a' is not on the device: expected acquire first"),
        (lambda made: made.release(["a"]), "release of adapters"),
        (lambda made: made.add("a", factors(1)), "adapter 'a' exists"),
        (lambda made: made.add("", factors(1)), "adapter name ''"),
        (lambda made: made.add("c", {}), "no layers"),
        (lambda made: made.add("c", factors(0)), "one is of rank 0"),
        (lambda made: AdapterCache(SIZES, pages=0), "pages 0"),
        (lambda made: AdapterCache(SIZES, pages=1, page_rank=0), "page_rank 0"),
    ],
)
def test_bad_input_is_refused(act, message):
    made = cache(ranks={"a": 16, "b": 4})
    with pytest.raises(ValueError, match=message):
        act(made)
    assert not made.resident and len(made.free) == 4


def test_what_half_precision_cannot_hold_is_refused():
    made = cache(dtype=torch.float16)
    large = factors(2)
    large["two"].B_Or[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"adapter 'a': two: too large for torch.float16"):
        made.add("a", large)
    assert not made.stored and not made.pools


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pages_on_a_gpu_come_from_pinned_memory():
    made = cache(pages=1, device="cuda")
    for name, rank in (("a", 4), ("b", 3)):
        made.add(name, factors(rank))
        assert all(cut.A_NRI.is_pinned() and cut.B_NOR.is_pinned() for cut in made.stored[name].values())
    for name in "abab":
        made.acquire([name])
        pool, (page,) = made.pools["one"], made.pages_of(name)
        cut = made.stored[name]["one"]
        assert torch.equal(pool.A_PRI[page].cpu(), cut.A_NRI[0]) and torch.equal(pool.B_POR[page].cpu(), cut.B_NOR[0])
        made.release([name])
