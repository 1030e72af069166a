"""Decoding over a paged cache against the definition in float64, and what attention_decode takes and refuses.

Pages lie in a random order. What no sequence uses is NaN, in pages and past the end of the last one, and the table's
entries there point nowhere: whoever reads them fails. Results and workspaces start as NaN too.
"""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

pytest.importorskip("cuda._simt", reason="make native builds the kernels")
pytest.importorskip("cuda._simt_checked", reason="make native builds the kernels")

from cuda import _simt, _simt_checked, decode_ops
from cuda.decode_ops import attention_decode, splits_of
from cuda.paged_cache import PagedCache
from tests.cuda.attention_cases import EVERYTHING, ROUNDING, Guarded, definition, error
from tests.cuda.products import DEVICES

SCHEDULES = [("fifo", "lazy"), ("reverse", "random"), ("random", "eager"), ("priority", "lazy"), ("priority", "random")]
NOWHERE = 2**31 - 1


@dataclass(slots=True)
class Cached:
    """q (B, H, T, K), a cache with `spare` pages more than are needed, and rows of keys and values (length, G, K)."""

    lengths: tuple[int, ...] = (133, 0, 70)
    ratio: int = 2
    kv_heads: int = 2
    queries: int = 1
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    window: int = 0
    softcap: float = 0.0
    scale: float | None = None
    sink: bool = False
    magnitude: float = 1.0
    spare: int = 3
    device: str = "cpu"
    seed: int = 0
    arrays: dict = field(default_factory=dict)
    rows: list = field(default_factory=list)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        G, K, size = self.kv_heads, self.head_dim, self.block_size

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        most = max(-(-length // size) for length in self.lengths) + 1
        pages = [-(-length // size) for length in self.lengths]
        order = torch.randperm(sum(pages) + self.spare, generator=generator).tolist()
        table = torch.full((len(pages), most), NOWHERE, dtype=torch.int32)
        # Views of wider arrays: no stride is what the shape would give.
        wide = torch.full((2, len(order), size, G, K + 8), math.nan, dtype=self.dtype)
        k_cache, v_cache = wide[..., :K]
        for b, length in enumerate(self.lengths):
            unseen = max(0, length - self.queries - self.window + 1) // size if self.window else 0
            for i in range(unseen, pages[b]):
                table[b, i] = order.pop()
            k, v = (normal(length, G, K) * self.magnitude).to(self.dtype), normal(length, G, K).to(self.dtype)
            self.rows.append((k, v))
            for i in range(unseen, pages[b]):
                part = slice(i * size, (i + 1) * size)
                used = k[part].shape[0]
                k_cache[table[b, i], :used], v_cache[table[b, i], :used] = k[part], v[part]
        q = (normal(len(pages), self.queries, G * self.ratio, K + 8) * self.magnitude).to(self.dtype)
        a = {"q": q[..., :K].transpose(1, 2), "k_cache": k_cache, "v_cache": v_cache, "block_table": table}
        a["lengths"] = torch.tensor(self.lengths, dtype=torch.int32)
        if self.sink:
            a["sink"] = normal(G * self.ratio)
        self.arrays |= {name: x.to(self.device) for name, x in a.items()}

    @property
    def options(self) -> dict:
        return {"window": self.window, "softcap": self.softcap, "scale": self.scale, "sink": self.arrays.get("sink")}

    @property
    def positional(self) -> tuple:
        return tuple(self.arrays[name] for name in ("q", "k_cache", "v_cache", "block_table", "lengths"))


def reference(case: Cached, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """o and lse by definition of each sequence's keys; queries stand at their end: those before key 0 see nothing."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    sink = case.arrays["sink"].cpu() if case.sink else None
    results = []
    for b, (k, v) in enumerate(case.rows):
        q = case.arrays["q"][b : b + 1].cpu().to(dtype)
        k, v = (x.to(dtype).transpose(0, 1)[None] for x in (k, v))
        left = case.window - 1 if case.window else EVERYTHING
        results.append(definition(q, k, v, scale=scale, softcap=case.softcap, left=left, right=0, sink=sink))
    return torch.cat([o for o, _ in results]), torch.cat([lse for _, lse in results])


def run(module, case: Cached, splits: int, least_keys=0) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels themselves, into arrays of NaN."""
    q = case.arrays["q"]
    o, lse = Guarded(q), torch.full(q.shape[:3], math.nan, device=case.device)
    rows = q.shape[:3].numel()
    module.run(
        "attention_decode", o=o.inside, lse=lse, splits=splits, least_keys=least_keys,
        split_o=torch.full((splits * rows, case.head_dim), math.nan, device=case.device),
        split_state=torch.full((splits * rows, 2), math.nan, device=case.device),
        scale=case.head_dim**-0.5 if case.scale is None else case.scale, softcap=case.softcap,
        left=case.window - 1 if case.window else EVERYTHING, **case.arrays,
    )  # fmt: skip
    o.check()
    return o.inside, lse


def check(case: Cached, o: torch.Tensor, lse: torch.Tensor) -> None:
    want_o, want_lse = reference(case)
    o, lse = o.cpu(), lse.cpu()
    mine, worst = error(o, want_o), 1.5 * ROUNDING[case.dtype]
    assert mine <= worst, f"o: {mine:.3g} of its size, expected {worst:.3g}"
    spread = 2 * ROUNDING[case.dtype] if case.softcap else 2e-5 * want_lse.abs().clamp_min(1.0)
    same = (lse == want_lse.float()) | ((lse.double() - want_lse).abs() <= spread)
    assert same.all(), f"lse: {(lse.double() - want_lse)[~same].abs().max():.3g}"
    assert (o[(want_o == 0).all(-1)] == 0).all(), "a query that sees nothing is not zero"


CASES = {
    "one token": Cached(),
    "two tokens, one head each": Cached(queries=2, ratio=1, head_dim=128),
    "many rows": Cached(queries=5, ratio=8, kv_heads=1, head_dim=128, lengths=(130, 3)),
    "more rows than a tile": Cached(queries=9, ratio=8, kv_heads=1, lengths=(75,), dtype=torch.float16),
    "16 rows exactly": Cached(queries=2, ratio=8, kv_heads=1, head_dim=96, lengths=(100, 16)),
    "17 tokens": Cached(queries=17, ratio=1, kv_heads=1, head_dim=96, lengths=(100, 16)),
    "edges of blocks": Cached(lengths=(1, 15, 16, 17, 31, 32), kv_heads=1, ratio=1, head_dim=64),
    "edges of tiles": Cached(lengths=(63, 64, 65, 127, 128, 129), kv_heads=1, ratio=1, block_size=64),
    "blocks beyond a tile": Cached(lengths=(300, 255), kv_heads=1, block_size=256, head_dim=128),
    "blocks of 48": Cached(lengths=(150, 97), kv_heads=1, block_size=48),
    "192 wide": Cached(head_dim=192, lengths=(65, 33), block_size=32),
    "192 wide, many rows": Cached(head_dim=192, lengths=(65, 33), queries=5, ratio=8, kv_heads=1),
    "256 wide": Cached(head_dim=256, lengths=(65, 30), dtype=torch.float16),
    "256 wide, many rows": Cached(head_dim=256, lengths=(65, 30), queries=9, dtype=torch.float16),
    "more tokens than keys": Cached(queries=5, lengths=(3, 0, 1, 5)),
    "window": Cached(window=40, lengths=(133, 70, 17), queries=3),
    "window of one, many rows": Cached(window=1, lengths=(133, 0, 64), queries=10),
    "softcap": Cached(softcap=2.0, lengths=(90, 20), scale=0.5),
    "sink": Cached(sink=True, lengths=(90, 0, 2), queries=2),
    "all of it": Cached(window=50, softcap=3.0, sink=True, scale=0.3, queries=12, head_dim=128, lengths=(133, 7, 64)),
    "logits of 1e4": Cached(magnitude=100.0, lengths=(200, 70), head_dim=128),
    "logits of 1e8": Cached(magnitude=1e4, lengths=(200, 70), queries=9, head_dim=128, dtype=torch.float16),
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_definition(case, splits):
    check(case, *run(_simt, case, splits))


def test_a_long_sequence():
    case = Cached(lengths=(1000,), ratio=8, kv_heads=1, head_dim=128)
    check(case, *run(_simt, case, 4, least_keys=256))


@pytest.mark.parametrize("schedule", SCHEDULES, ids="-".join)
def test_every_schedule(schedule):
    for seed, multiprocessors in [(1, 1), (2, 3)]:
        with _simt.options(order=schedule[0], async_=schedule[1], seed=seed, multiprocessors=multiprocessors):
            for case in (
                Cached(lengths=(333, 0), head_dim=128, kv_heads=1),
                Cached(lengths=(300,), head_dim=64, queries=9, kv_heads=1),
                Cached(lengths=(150,), head_dim=192, ratio=1),
            ):
                check(case, *run(_simt, case, 2))


@pytest.mark.parametrize("schedule", SCHEDULES, ids="-".join)
def test_checked_build_finds_no_mistake(schedule):
    with _simt_checked.options(order=schedule[0], async_=schedule[1], seed=3, multiprocessors=2):
        for case, splits in (
            (Cached(lengths=(333, 0), head_dim=64, kv_heads=1, ratio=1), 1),
            (Cached(lengths=(170, 5), head_dim=96, window=150, sink=True, kv_heads=1), 2),
            (Cached(lengths=(150,), queries=9, softcap=3.0, kv_heads=1, dtype=torch.float16), 1),
            (Cached(lengths=(70,), queries=17, ratio=1, kv_heads=1, head_dim=256), 2),
        ):
            check(case, *run(_simt_checked, case, splits))


@pytest.mark.parametrize("head_dim", decode_ops.HEAD_DIMS)
def test_no_bank_conflicts_and_no_sector_twice(head_dim):
    _simt_checked.take_counters()
    for queries in (2, 17):
        case = Cached(lengths=(100,), head_dim=head_dim, kv_heads=1, ratio=1, queries=queries)
        with _simt_checked.options(counters=True):
            run(_simt_checked, case, 2)
    rows = [row for row in _simt_checked.take_counters() if row["file"].endswith("/decode.cu")]
    assert {"shared read", "shared write", "global read"} <= {row["kind"] for row in rows}
    assert not [row for row in rows if row["actual"] != row["ideal"]]


def test_splits_equal_one_split():
    case = Cached(lengths=(400, 65, 0), sink=True, queries=2)
    o, lse = run(_simt, case, 1)
    for splits, least_keys in ((2, 0), (5, 0), (100, 0), (5, 128)):
        got_o, got_lse = run(_simt, case, splits, least_keys)
        assert error(got_o, o) <= ROUNDING[case.dtype]  # other maxima, so probabilities are rounded in other places
        assert torch.allclose(got_lse, lse, atol=1e-6, rtol=1e-6)


def test_not_further_from_the_definition_than_torchs_own():
    case = Cached(lengths=(257,), ratio=4, queries=2, head_dim=128)
    o, _ = run(_simt, case, 2)
    (k, v), q = (x.transpose(0, 1)[None] for x in case.rows[0]), case.arrays["q"]
    mask = torch.ones(2, 257, dtype=torch.bool).tril(255)
    torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    want, _ = reference(case)
    assert error(o, want) <= 1.1 * error(torchs, want)


# ---- the operation in torch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("name", ["many rows", "all of it", "more tokens than keys"])
def test_attention_decode(name, splits, device):
    case = replace(CASES[name], device=device, arrays={}, rows=[])
    o, lse = attention_decode(*case.positional, **case.options, splits=splits, return_lse=True, check=True)
    assert o.shape == case.arrays["q"].shape and o.dtype == case.dtype and lse.dtype == torch.float32
    check(case, o, lse)
    assert torch.equal(attention_decode(*case.positional, **case.options, splits=splits), o)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", decode_ops.HEAD_DIMS)
@pytest.mark.parametrize("ratio, queries", [(1, 1), (8, 1), (8, 16)])
def test_large_on_a_gpu(head_dim, ratio, queries):
    case = Cached(
        lengths=(5000, 1, 0, 2048), ratio=ratio, queries=queries, head_dim=head_dim, block_size=64, device="cuda"
    )
    check(case, *attention_decode(*case.positional, return_lse=True))


def test_nothing_to_attend_to():
    case = Cached(lengths=(0, 0), sink=True)
    q, k_cache, v_cache, table, lengths = case.positional
    for given in ((k_cache, v_cache, table), (k_cache[:0], v_cache[:0], table), (k_cache, v_cache, table[:, :0])):
        o, lse = attention_decode(q, *given, lengths, return_lse=True, sink=case.arrays["sink"])
        assert (o == 0).all() and torch.allclose(lse, case.arrays["sink"][:, None].expand_as(lse))
        assert (attention_decode(q, *given, lengths, return_lse=True)[1] == -math.inf).all()
    o, lse = attention_decode(q[:0], k_cache, v_cache, table[:0], lengths[:0], return_lse=True)
    assert o.shape == (0, 4, 1, 64) and lse.shape == (0, 4, 1)
    assert attention_decode(q[:, :, :0], k_cache, v_cache, table, lengths).shape == (2, 4, 0, 64)


def test_opcheck():
    case = Cached(lengths=(20, 0), queries=2, sink=True)
    for splits in (1, 2, None):
        given = (*case.positional, case.arrays["sink"], 10, None, 3.0, splits, False)
        assert set(torch.library.opcheck(decode_ops._decode, given).values()) == {"SUCCESS"}


def test_torch_compile():
    def f(q, k_cache, v_cache, table, lengths):
        return attention_decode(q * 2, k_cache, v_cache, table, lengths, window=20).float().sum(-1)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for lengths in ((20, 33), (5,)):  # another batch: compiled again, with the size as a symbol
        case = Cached(lengths=lengths)
        assert torch.equal(compiled(*case.positional), f(*case.positional))


def test_number_of_splits():
    assert splits_of(1, 8, 32768, 132) == 33  # two blocks for each multiprocessor
    assert splits_of(1, 8, 1024, 132) == 4  # no part below 256 keys
    assert splits_of(64, 8, 32768, 132) == 1
    assert splits_of(1, 1, 0, 132) == 1


# ---- what it refuses -------------------------------------------------------------------------------------------------


def changed(**changes):
    """A call with something else in place of some arguments; a function gets what was there."""

    def call():
        case = Cached(lengths=(40, 20))
        names = ("q", "k_cache", "v_cache", "block_table", "lengths")
        given = {name: case.arrays[name] for name in names}
        return attention_decode(**given | {n: x(given[n]) if callable(x) else x for n, x in changes.items()})

    return call


def put(*index, value):
    def change(x):
        x = x.clone()
        x[index] = value
        return x

    return change


def shifted(x):
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


BAD = {
    "head width": (changed(q=lambda x: x[..., :40]), r"q has head width 40: expected one of \(64"),
    "head widths differ": (changed(k_cache=lambda x: x[..., :40]), "k_cache has shape .*, 40.*: expected .*, 64"),
    "v's shape": (changed(v_cache=lambda x: x[:, :, :1]), "v_cache has shape .*: expected"),
    "heads": (changed(q=lambda x: x[:, :3]), "k_cache has 2 heads: expected a divisor of the 3 of q"),
    "no heads": (changed(k_cache=lambda x: x[:, :, :0]), "k_cache has 0 heads"),
    "batch of the table": (changed(block_table=lambda x: x[:1]), r"block_table has shape .*: expected \(2, most"),
    "batch of lengths": (changed(lengths=lambda x: x[:1]), r"lengths has shape \(1,\): expected \(2,\)"),
    "dimensions of q": (changed(q=lambda x: x[0]), r"q has shape .*: expected \(B, H, T, K\)"),
    "dimensions of the cache": (changed(k_cache=lambda x: x[0]), "k_cache has shape .*: expected .blocks"),
    "block size": (changed(k_cache=lambda x: x[:, :8], v_cache=lambda x: x[:, :8]), "k_cache has blocks of 8 keys"),
    "float32": (changed(q=lambda x: x.float()), "q is torch.float32: expected one of"),
    "types differ": (changed(v_cache=lambda x: x.half()), "v_cache is torch.float16: expected torch.bfloat16"),
    "table's type": (changed(block_table=lambda x: x.long()), "block_table is torch.int64: expected torch.int32"),
    "lengths' type": (changed(lengths=lambda x: x.long()), "lengths is torch.int64: expected torch.int32"),
    "sink's type": (changed(sink=torch.zeros(4).double()), "sink is torch.float64: expected torch.float32"),
    "sink's shape": (changed(sink=torch.zeros(3)), r"sink has shape \(3,\): expected \(4,\)"),
    "a list": (changed(lengths=[1, 2]), "lengths is a list: expected a torch tensor"),
    "window": (changed(window=-1), "window -1: expected 0"),
    "scale": (changed(scale=0.0), "scale 0.0: expected a positive number"),
    "scale of NaN": (changed(scale=math.nan), "scale nan: expected"),
    "softcap": (changed(softcap=-1.0), "softcap -1.0: expected 0"),
    "softcap infinite": (changed(softcap=math.inf), "softcap inf: expected"),
    "splits": (changed(splits=0), "splits 0: expected None, or 1"),
    "last dimension": (changed(q=lambda x: torch.stack([x, x], -1)[..., 0]), "q has strides .*: expected a contiguous"),
    "table's columns": (changed(block_table=lambda x: x.mT.contiguous().mT), "block_table has strides"),
    "odd strides": (changed(q=lambda x: torch.zeros(*x.shape[:3], 68, dtype=x.dtype)[..., :64]), "q: strides .*of 8"),
    "address": (changed(k_cache=shifted), "k_cache: starts 2 bytes past a multiple of 16"),
    "negative length": (changed(lengths=put(1, value=-1)), r"lengths\[1\] is -1: expected 0 or more"),
    "long length": (changed(lengths=put(0, value=65)), r"lengths\[0\] is 65: expected at most 64, which is 4 blocks"),
    "negative block": (changed(block_table=put(1, 1, value=-1)), r"block_table\[1, 1\] is -1: expected 0 to 7"),
    "block past the end": (changed(block_table=put(0, 2, value=8)), r"block_table\[0, 2\] is 8: expected 0 to 7"),
    "gradient": (changed(q=lambda x: x.clone().requires_grad_()), "q requires a gradient: decoding has none"),
    "another device": (changed(lengths=lambda x: x.to("meta")), "lengths is on meta, q on cpu: expected one device"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": 0.0}, "scale: 0.*: expected a positive number"),
        ({"left": -1}, "left: expected 0"),
        ({"splits": 0}, "splits: expected 1"),
        ({"splits": 4}, "split_o: .* elements: expected"),
        ({"least_keys": -1}, "least_keys: expected 0"),
        ({"lse": torch.zeros(2, 4, 2)}, "lse: shape"),
        ({"o": torch.zeros(2, 4, 1, 64)}, "o: is float32: expected bfloat16"),
        ({"q": torch.zeros(2, 4, 1, 32).bfloat16()}, "shape .*: expected .*, 32"),
    ],
)
def test_the_operation_itself_refuses_what_would_be_a_wild_access(change, message):
    case = Cached(lengths=(40, 20))
    given = case.arrays | {
        "o": torch.empty(2, 4, 1, 64, dtype=torch.bfloat16), "lse": torch.empty(2, 4, 1), "scale": 1.0, "softcap": 0.0,
        "left": 0, "splits": 2, "least_keys": 0, "split_o": torch.empty(16, 64), "split_state": torch.empty(16, 2),
    }  # fmt: skip
    _simt.run("attention_decode", **given)
    with pytest.raises(ValueError, match=message):
        _simt.run("attention_decode", **given | change)


def test_gradients_are_fine_where_none_is_recorded():
    case = Cached(lengths=(5,))
    with torch.no_grad():
        attention_decode(case.arrays["q"].clone().requires_grad_(), *case.positional[1:])


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_sequences_grow_in_turn_and_leave():
    generator = torch.Generator().manual_seed(0)
    cache = PagedCache(5, 16, kv_heads=2, head_dim=64)
    told = {}

    def grow(sequence, tokens):
        k, v = torch.randn(2, tokens, 2, 64, generator=generator).bfloat16()
        cache.append(sequence, k, v)
        told[sequence] = [torch.cat(pair) for pair in zip(told.get(sequence, (k[:0], v[:0])), (k, v), strict=True)]

    def expect_right(*sequences):
        q = torch.randn(len(sequences), 4, 1, 64, generator=generator).bfloat16()
        o = attention_decode(q, cache.k, cache.v, *cache.tables(list(sequences)))
        for b, sequence in enumerate(sequences):
            k, v = (x.double().transpose(0, 1)[None] for x in told[sequence])
            assert error(o[b : b + 1], definition(q[b : b + 1].double(), k, v, scale=1 / 8)[0]) <= 1.5 * 2**-8
            assert cache.length(sequence) == k.shape[2]

    a, b = cache.new(), cache.new()
    for tokens_a, tokens_b in ((13, 1), (3, 15), (1, 1)):
        grow(a, tokens_a)
        grow(b, tokens_b)
        expect_right(b, a)
    assert cache.free_blocks == 1
    cache.free(a)
    c = cache.new()
    grow(c, 48)
    expect_right(b, c)
    assert cache.free_blocks == 0 and c not in (a, b)


def test_a_full_cache_refuses_and_keeps_what_it_has():
    cache = PagedCache(2, 16, kv_heads=1, head_dim=64)
    a, x = cache.new(), torch.ones(20, 1, 64, dtype=torch.bfloat16)
    cache.append(a, x, x)
    with pytest.raises(ValueError, match="sequence 0 needs 1 more blocks, the cache has 0 free"):
        cache.append(a, x, x)
    assert cache.length(a) == 20 and cache.free_blocks == 0
    cache.append(a, x[:12], x[:12])
    table, lengths = cache.tables([a])
    assert sorted(table[0].tolist()) == [0, 1] and lengths.tolist() == [32]
    cache.free(a)
    assert cache.free_blocks == 2


def test_tables_of_none_and_of_the_empty():
    cache = PagedCache(2, 16, kv_heads=1, head_dim=64)
    table, lengths = cache.tables([cache.new()])
    assert table.tolist() == [[-1]] and lengths.tolist() == [0]
    table, lengths = cache.tables([])
    assert table.shape == (0, 1) and lengths.shape == (0,) and table.dtype == lengths.dtype == torch.int32


X = torch.zeros(3, 1, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda cache, a: (cache.free(a), cache.free(a)), "sequence 0: expected one that new"),
        (lambda cache, a: cache.append(7, X, X), "sequence 7: expected one that new"),
        (lambda cache, a: cache.tables([a, 3]), "sequence 3: expected"),
        (lambda cache, a: cache.append(a, X[..., :8], X), r"k has shape \(3, 1, 8\): expected \(tokens, 1, 64\)"),
        (lambda cache, a: cache.append(a, X, X[:2]), "v has shape"),
        (lambda cache, a: cache.append(a, X, X.float()), "v is torch.float32 on cpu: expected torch.bfloat16"),
        (lambda cache, a: PagedCache(2, 24, kv_heads=1, head_dim=64), "block_size 24: expected a multiple of 16"),
        (lambda cache, a: PagedCache(0, 16, kv_heads=1, head_dim=64), "blocks 0: expected 1 or more"),
    ],
)
def test_the_cache_refuses(use, message):
    cache = PagedCache(2, 16, kv_heads=1, head_dim=64)
    with pytest.raises(ValueError, match=message):
        use(cache, cache.new())
