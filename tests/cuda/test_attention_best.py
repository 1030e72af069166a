"""Attention forward, steps 08 and 09: the persistent Hopper kernels, which take every head width and every rule.

Against the definition in float64 and torch's own attention, at lengths no tile divides, under adversarial schedules and
with few multiprocessors, so that a block takes many tiles. On a machine with a GPU the same cases run there too.
"""

import importlib
import itertools

import pytest
import torch

from tests.cuda.attention_cases import ROUNDING, Case, check_forward, error, forward, reference

_simt = pytest.importorskip("cuda._simt", reason="make native builds the kernels")
_simt_checked = pytest.importorskip("cuda._simt_checked", reason="make native builds the kernels")

STEPS = ["persistent_08", "best_09"]
WIDTHS = [64, 96, 128, 192, 256]
TYPES = [torch.bfloat16, torch.float16]
SCHEDULES = [("fifo", "lazy"), ("reverse", "random"), ("random", "eager"), ("priority", "lazy"), ("priority", "random")]
CAUSAL = {"right": 0}
# Each is a way in which tiles differ: what is masked, what is skipped, what is stored by threads, what is empty.
FEATURES = {
    "plain": {"queries": 129, "keys": 257},
    "causal": {"queries": 300, "keys": 300, **CAUSAL},
    "decode": {"queries": 1, "keys": 127, "batch": 2, **CAUSAL},
    "more queries than keys": {"queries": 200, "keys": 65, **CAUSAL},  # the first ones see nothing
    "window": {"queries": 300, "keys": 300, "left": 40, "right": 0},
    "window on both sides": {"queries": 200, "keys": 300, "left": 30, "right": 20},
    "window beside the keys": {"queries": 300, "keys": 60, "left": 10, "right": 0},  # whole tiles see nothing
    "softcap": {"queries": 63, "keys": 129, "softcap": 5.0, **CAUSAL},
    "sink": {"queries": 65, "keys": 150, "sink": True, **CAUSAL},
    "bias": {"queries": 70, "keys": 150, "bias": "full", "batch": 2},
    "shared bias": {"queries": 129, "keys": 131, "bias": "shared", "batch": 2, **CAUSAL},
    "packed": {"lengths_q": (65, 1, 200, 0, 16), "lengths_k": (65, 127, 150, 3, 0), **CAUSAL},
    "packed, all rules": {
        "lengths_q": (30, 193, 64),
        "lengths_k": (140, 0, 64),
        "left": 50,
        "softcap": 4.0,
        "sink": True,
    },
}


def heads_of(width):
    """(query heads, kv heads): each ratio with some width."""
    return {64: (4, 1), 96: (2, 2), 128: (4, 2), 192: (3, 1), 256: (2, 1)}[width]


def case(width, dtype=torch.bfloat16, **more):
    heads, kv_heads = heads_of(width)
    return Case(**{"head_dim": width, "heads": heads, "kv_heads": kv_heads, "dtype": dtype, **more})


def turns(first=0):
    """Steps and types in turn: [(width, step, dtype), ..], the other way round for another `first`."""
    return [(width, STEPS[(i + first) % 2], TYPES[(i + first // 2) % 2]) for i, width in enumerate(WIDTHS)]


@pytest.mark.parametrize("name", FEATURES)
def test_every_rule_at_every_width(name):
    for i, (width, step, dtype) in enumerate(turns(list(FEATURES).index(name))):
        with _simt.options(multiprocessors=1 + i, seed=i, order="random", async_="random"):
            check_forward(_simt, step, case(width, dtype, seed=i, **FEATURES[name]))


@pytest.mark.parametrize("queries", [1, 63, 65, 127, 129])
def test_lengths(queries):
    for keys, (width, step, dtype) in zip([1, 63, 65, 127, 129], turns(queries // 2), strict=True):
        check_forward(_simt, step, case(width, dtype, queries=queries, keys=keys, seed=keys, **CAUSAL))


@pytest.mark.parametrize("step", STEPS)
def test_a_thousand_keys(step):
    for width in (64, 128):
        check_forward(_simt, step, Case(head_dim=width, heads=1, kv_heads=1, queries=1000, keys=1000, **CAUSAL))


@pytest.mark.parametrize("schedule", SCHEDULES, ids="-".join)
def test_every_schedule(schedule):
    first = SCHEDULES.index(schedule)
    for i, (width, step, dtype) in enumerate(turns(first)):
        with _simt.options(order=schedule[0], async_=schedule[1], seed=i, multiprocessors=1 + (first + i) % 3):
            check_forward(_simt, step, Case(head_dim=width, dtype=dtype, queries=200, keys=400, left=250, right=0))
            packed = {"lengths_q": (100, 193, 7), "lengths_k": (250, 20, 0)}
            check_forward(_simt, step, Case(head_dim=width, dtype=dtype, heads=1, kv_heads=1, **packed))


@pytest.mark.parametrize("schedule", SCHEDULES[:4], ids="-".join)
def test_checked_build_finds_no_mistake(schedule):
    """With one multiprocessor a block has several tiles, the first of more key tiles than there are stages."""
    for i, (width, step, dtype) in enumerate(turns(SCHEDULES.index(schedule))):
        small = {"head_dim": width, "dtype": dtype, "heads": 1, "kv_heads": 1}
        with _simt_checked.options(order=schedule[0], async_=schedule[1], seed=i, multiprocessors=1):
            check_forward(_simt_checked, step, Case(**small, queries=140, keys=400, **CAUSAL))
            check_forward(_simt_checked, step, Case(**small, lengths_q=(17, 130, 0), lengths_k=(0, 140, 5), sink=True))
            check_forward(_simt_checked, step, Case(**small, queries=70, keys=90, bias="full", softcap=3.0, left=20))


@pytest.mark.parametrize("step", STEPS)
def test_extreme_logits_stay_finite(step):
    for width, dtype in itertools.product((64, 256), TYPES):
        extreme = case(width, dtype, queries=130, keys=300, magnitude=30.0, scale=1.0, **CAUSAL)  # logits of 1e4
        got, want = forward(_simt, step, extreme), reference(extreme)
        assert got["o"].isfinite().all() and got["lse"].isfinite().all()
        assert error(got["o"], want["o"]) <= ROUNDING[dtype]
        assert error(got["lse"], want["lse"]) <= 1e-6


@pytest.mark.parametrize("step", STEPS)
def test_scores_that_grow_and_shrink_from_tile_to_tile(step):
    """Keys are taken from the last to the first: maxima rise by little or by much, in some rows only, or never."""
    for width, slope in itertools.product((64, 128), (-0.2, -0.01, 0.01, 0.2)):
        sloped = Case(head_dim=width, queries=70, keys=700)
        far = torch.arange(700.0) * slope
        sloped.arrays["bias"] = far.where(torch.arange(70)[:, None] % 3 > 0, 0.0).expand(1, 1, 70, 700).contiguous()
        check_forward(_simt, step, sloped)


@pytest.mark.parametrize("width", [64, 128])
def test_the_two_steps_agree(width):
    """Rescaling only where there is a new maximum changes no bit; polynomials, at width 64, next to nothing."""
    same = case(width, torch.float16, queries=200, keys=500, **CAUSAL)
    first, second = (forward(_simt, step, same) for step in STEPS)
    difference = (first["lse"] - second["lse"]).abs().max()
    assert difference <= (2e-6 if width == 64 else 0.0)
    if width == 128:
        assert torch.equal(first["o"], second["o"])


def test_all_tiles_of_large_batches_are_taken():
    """More pairs of batch and head than a group of the schedule has, and a last group that is smaller."""
    for multiprocessors in (1, 3, 132):
        with _simt.options(multiprocessors=multiprocessors):
            check_forward(_simt, "persistent_08", Case(batch=3, heads=3, kv_heads=1, queries=200, keys=40, **CAUSAL))
    many = Case(head_dim=256, batch=1, heads=3, kv_heads=3, queries=130, keys=17000, left=100, right=0)
    got = forward(_simt, "best_09", many)  # 17000 keys of a head are more than half of the cache
    assert got["o"].isfinite().all() and got["lse"].isfinite().all()


@pytest.mark.parametrize("step", STEPS)
def test_other_head_widths_are_refused(step):
    with pytest.raises(ValueError, match="head width 80: expected 64, 96, 128, 192 or 256"):
        forward(_simt, step, Case(head_dim=80))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("step", STEPS)
def test_on_a_gpu(step, width, dtype):
    module = importlib.import_module("cuda._sm90")
    for name, feature in FEATURES.items():
        if dtype == torch.float16 and "softcap" in feature:
            continue  # the hardware's tanh is good to 2^-11, which is what f16 rounds to
        try:
            check_forward(module, step, case(width, dtype, device="cuda", **feature))
        except AssertionError as failure:
            raise AssertionError(name) from failure
    for tokens in (1000, 4096):
        check_forward(module, step, case(width, dtype, queries=tokens, keys=tokens, batch=2, device="cuda", **CAUSAL))
