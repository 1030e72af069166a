"""Steps 03 to 05 of attention's backward pass, which are for Hopper: gradients against the definition in float64.

Every step and head width, every rule, lengths no tile divides; adversarial schedules; not one report of the checked
build; and sums of dQ in a fixed order where that is asked for.
"""

import math

import pytest
import torch

from tests.cuda.attention_cases import ROUNDING, Case, backward, check_backward, error, reference

_simt = pytest.importorskip("cuda._simt", reason="make native builds the kernels")
_simt_checked = pytest.importorskip("cuda._simt_checked", reason="make native builds the kernels")

KERNELS = [(step, head_dim) for step in ("wgmma_03", "dq_reduce_04") for head_dim in (64, 128)]
KERNELS += [("best_05", head_dim) for head_dim in (64, 96, 128, 192, 256)]
SCHEDULES = [("fifo", "lazy"), ("reverse", "random"), ("random", "eager"), ("priority", "lazy"), ("priority", "random")]


def one_at_a_time(module, **more):
    """Blocks that wait for blocks before them: here one after the other, as they start on a GPU."""
    return module.options(workers=1, **more)


@pytest.mark.parametrize(("step", "head_dim"), KERNELS)
def test_rules_and_odd_lengths(step, head_dim):
    causal, wide = {"right": 0, "head_dim": head_dim}, {"head_dim": head_dim}
    check_backward(_simt, step, Case(heads=4, kv_heads=2, queries=129, keys=200, **causal))
    check_backward(_simt, step, Case(heads=1, kv_heads=1, queries=127, keys=63, **causal))  # 64 rows see nothing
    check_backward(_simt, step, Case(heads=1, kv_heads=1, queries=1, keys=65, head_dim=head_dim))
    check_backward(
        _simt,
        step,
        Case(heads=2, kv_heads=1, queries=130, keys=127, left=40, right=7, sink=True, softcap=2.0, head_dim=head_dim),
    )
    check_backward(
        _simt,
        step,
        Case(heads=2, kv_heads=2, queries=70, keys=129, batch=2, bias="full", softcap=3.0, **wide),
    )


@pytest.mark.parametrize(("step", "head_dim"), KERNELS)
def test_sequences_of_different_length(step, head_dim):
    lengths = {"lengths_q": (1, 70, 0, 130, 63), "lengths_k": (5, 0, 9, 150, 64)}
    check_backward(_simt, step, Case(heads=2, kv_heads=1, right=0, head_dim=head_dim, **lengths))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_float16(head_dim):
    case = Case(heads=2, kv_heads=1, queries=100, keys=130, right=3, dtype=torch.float16, head_dim=head_dim)
    check_backward(_simt, "best_05", case)


@pytest.mark.parametrize("schedule", SCHEDULES, ids="-".join)
@pytest.mark.parametrize(("step", "head_dim"), KERNELS)
def test_every_schedule(step, head_dim, schedule):
    with _simt.options(order=schedule[0], async_=schedule[1], seed=1, multiprocessors=3):
        check_backward(_simt, step, Case(heads=2, kv_heads=1, queries=200, keys=70, head_dim=head_dim))


@pytest.mark.parametrize("schedule", SCHEDULES[1:4], ids="-".join)
@pytest.mark.parametrize(("step", "head_dim"), KERNELS)
def test_checked_build_finds_no_mistake(step, head_dim, schedule):
    small = {"heads": 2, "kv_heads": 1, "head_dim": head_dim}
    with one_at_a_time(_simt_checked, order=schedule[0], async_=schedule[1], seed=3):
        if schedule[0] == "reverse":
            check_backward(_simt_checked, step, Case(queries=130, keys=300, right=0, **small), deterministic=True)
        elif schedule[0] == "random":
            check_backward(_simt_checked, step, Case(queries=70, keys=65, softcap=2.0, bias="shared", **small))
        else:
            lengths = {"lengths_q": (140, 3), "lengths_k": (20, 131)}
            check_backward(_simt_checked, step, Case(left=60, **lengths, **small))


@pytest.mark.parametrize(("step", "head_dim"), KERNELS)
def test_deterministic_sums_are_the_same_bits(step, head_dim):
    case = Case(heads=1, kv_heads=1, queries=70, keys=260, right=0, head_dim=head_dim)
    runs = []
    for order, async_ in (("fifo", "lazy"), ("reverse", "eager")):
        with one_at_a_time(_simt, order=order, async_=async_):
            runs.append(backward(_simt, step, case, deterministic=True))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in ("dq", "dk", "dv"))
    want = reference(case, gradients=True)
    assert all(error(runs[0][name], want[name]) <= 3 * ROUNDING[case.dtype] for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize(("step", "head_dim"), KERNELS)
def test_large_scores_stay_finite(step, head_dim):
    """Scores of 1e4: probabilities are 0 or 1, and ds is rounding. Sums that have a size are compared."""
    case = Case(heads=1, kv_heads=1, queries=66, keys=70, magnitude=100.0, head_dim=head_dim)
    got, want = backward(_simt, step, case), reference(case, gradients=True)
    assert all(x.isfinite().all() for x in got.values())
    assert (got["dv"].double() - want["dv"]).abs().max() <= 0.05 * want["dv"].abs().max()


def test_a_thousand():
    for head_dim in (128, 256):
        check_backward(
            _simt, "best_05", Case(heads=1, kv_heads=1, queries=1000, keys=1000, right=0, left=100, head_dim=head_dim)
        )


@pytest.mark.parametrize("step", ["wgmma_03", "dq_reduce_04", "best_05"])
def test_what_a_step_does_not_take(step):
    with pytest.raises(ValueError, match="head_dim 72"):
        backward(_simt, step, Case(head_dim=72))
    if step != "best_05":
        with pytest.raises(ValueError, match="head_dim 96"):
            backward(_simt, step, Case(head_dim=96))
        with pytest.raises(ValueError, match="bfloat16"):
            backward(_simt, step, Case(dtype=torch.float16))


def test_keys_nobody_sees_get_zeros():
    for step, head_dim in KERNELS:
        case = Case(heads=1, kv_heads=1, queries=10, keys=300, left=20, right=0, head_dim=head_dim)
        got = backward(_simt, step, case)
        unseen = got["dk"][:, :, : 300 - 10 - 20], got["dv"][:, :, : 300 - 10 - 20]
        assert all((x == 0).all() for x in unseen), (step, head_dim)
        assert not math.isnan(got["dq"].float().sum())
