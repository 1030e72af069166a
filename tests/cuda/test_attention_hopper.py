"""Steps 04-07 of attention, forward: TMA and wgmma, a producer, consumers that take turns, softmax beside a product.

Against the definition in float64, at lengths that no tile divides, with every rule, under adversarial schedules, and
without a report of the checked build. The rings have 2 stages at head width 128 and 4 at 64, of 128 keys each: the long
cases go around them more than once.
"""

import importlib

import pytest
import torch

from tests.cuda.attention_cases import Case, check_forward, forward

_simt = pytest.importorskip("cuda._simt", reason="make native builds the kernels")
_simt_checked = pytest.importorskip("cuda._simt_checked", reason="make native builds the kernels")

STEPS = ["wgmma_04", "producer_05", "ping_pong_06", "overlap_07"]
SCHEDULES = [("fifo", "lazy"), ("reverse", "random"), ("random", "eager"), ("priority", "lazy"), ("priority", "eager")]
CASES = {
    "one": {"queries": 1, "keys": 1},
    "63 of 65": {"queries": 63, "keys": 65, "head_dim": 128},
    "65 of 63": {"queries": 65, "keys": 63, "right": 0},  # the first two queries see nothing
    "127 of 129": {"queries": 127, "keys": 129, "head_dim": 128, "right": 0, "batch": 2},
    "129 of 127": {"queries": 129, "keys": 127, "kv_heads": 1, "scale": 0.3},
    "decode": {"queries": 1, "keys": 300, "heads": 4, "kv_heads": 1, "head_dim": 128, "right": 0},
    "window": {"queries": 260, "keys": 300, "left": 70, "right": 0},  # ranges that begin and end inside of tiles
    "window ahead": {"queries": 140, "keys": 270, "head_dim": 128, "left": 20, "right": 9, "softcap": 5.0},
    "softcap": {"queries": 70, "keys": 140, "heads": 3, "kv_heads": 3, "softcap": 2.0, "sink": True},
    "sink": {"queries": 150, "keys": 50, "head_dim": 128, "right": 0, "sink": True},  # tiles of queries without keys
    "bias": {"queries": 66, "keys": 130, "heads": 4, "batch": 2, "bias": "full", "right": 0},
    "shared bias": {"queries": 130, "keys": 70, "head_dim": 128, "batch": 2, "bias": "shared", "softcap": 3.0},
    "packed": {"lengths_q": (0, 1, 130, 64, 5, 3), "lengths_k": (3, 0, 200, 63, 1, 0), "head_dim": 128, "right": 0},
    "packed with sinks": {"lengths_q": (129, 2, 7), "lengths_k": (40, 0, 140), "sink": True, "left": 30, "right": 5},
    "large logits": {"queries": 65, "keys": 200, "magnitude": 100.0},  # 1e4
    "large logits, causal": {"queries": 80, "keys": 80, "head_dim": 128, "magnitude": 100.0, "right": 0},
}
LONG = [{"queries": 129, "keys": 400, "heads": 1, "kv_heads": 1, "head_dim": 128, "right": 0},
        {"queries": 66, "keys": 700, "heads": 1, "kv_heads": 1, "left": 650}]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", STEPS)
def test_every_rule_at_odd_lengths(step, name):
    with _simt.options(order="random", async_="random", seed=len(name)):
        check_forward(_simt, step, Case(**CASES[name]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids="-".join)
@pytest.mark.parametrize("step", STEPS)
def test_every_schedule(step, schedule):
    for seed, multiprocessors, case in [(1, 1, LONG[0]), (2, 3, LONG[1])]:
        with _simt.options(order=schedule[0], async_=schedule[1], seed=seed, multiprocessors=multiprocessors):
            check_forward(_simt, step, Case(**case, seed=seed))


@pytest.mark.parametrize("schedule", SCHEDULES[:4], ids="-".join)
@pytest.mark.parametrize("step", STEPS)
def test_checked_build_finds_no_mistake(step, schedule):
    with _simt_checked.options(order=schedule[0], async_=schedule[1], seed=3, multiprocessors=2):
        check_forward(_simt_checked, step, Case(**LONG[schedule[1] == "lazy"]))
        check_forward(_simt_checked, step, Case(**CASES["packed with sinks"]))


def test_a_thousand_keys():
    check_forward(_simt, "overlap_07", Case(queries=1000, keys=1000, heads=1, kv_heads=1, right=0))


@pytest.mark.parametrize("step", STEPS)
def test_two_runs_give_the_same_bits(step):
    """Whoever comes first at a barrier: nothing is added up in an order that depends on it."""
    case, found = Case(**LONG[0]), []
    for order, async_ in SCHEDULES[1:3]:
        with _simt.options(order=order, async_=async_, seed=len(found)):
            found.append(forward(_simt, step, case)["o"])
    assert torch.equal(*found)


@pytest.mark.parametrize("step", STEPS)
def test_what_these_steps_refuse(step):
    with pytest.raises(ValueError, match="head width of q is 96: steps 04 to 07 take 64 and 128"):
        check_forward(_simt, step, Case(head_dim=96))
    with pytest.raises(ValueError, match="element type of q: steps 04 to 07 take bfloat16"):
        check_forward(_simt, step, Case(dtype=torch.float16))


def test_more_heads_than_a_grid_has_rows():
    with pytest.raises(ValueError, match="65536 heads of q and 1 sequences: expected at most 65535"):
        check_forward(_simt, "wgmma_04", Case(heads=65536, kv_heads=1, queries=1, keys=1))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
)
@pytest.mark.parametrize("step", STEPS)
def test_on_a_gpu(step):
    module = importlib.import_module("cuda._sm90")
    larger = [{"queries": n, "keys": n, "heads": 8, "kv_heads": 2, "head_dim": k, "batch": 2, "right": 0}
              for n in (1000, 2048) for k in (64, 128)]  # fmt: skip
    for case in [*CASES.values(), *LONG, *larger]:
        check_forward(module, step, Case(**case, device="cuda"))
