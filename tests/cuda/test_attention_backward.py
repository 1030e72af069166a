"""Every step of attention's backward ladder against float64, at sizes no tile divides, under adversarial schedules.

A step is a line of STEPS: what it takes beyond head widths 64 and 128 of bf16. Gradients are written into arrays of
NaN, and the workspaces are NaN before: what a step forgets to write, or reads before it has, fails. On a GPU the same
cases run there too (marker gpu), and larger ones.
"""

import importlib
from dataclasses import dataclass, replace

import pytest
import torch

from tests.cuda.attention_cases import ROUNDING, Case, backward, check_backward, definition, error, reference

_simt = pytest.importorskip("cuda._simt", reason="make native builds the kernels")
_simt_checked = pytest.importorskip("cuda._simt_checked", reason="make native builds the kernels")

BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Step:
    head_dims: tuple[int, ...] = (64, 128)
    dtypes: tuple[torch.dtype, ...] = (BF16,)
    refuses: int = 80  # a head width
    architecture: int = 90  # the oldest GPU that runs it


EVERY_WIDTH = (64, 96, 128, 192, 256)
STEPS = {
    "recompute_01": Step((8, 72, *EVERY_WIDTH), (BF16, F16), refuses=264, architecture=80),
    "mma_sync_02": Step(EVERY_WIDTH, (BF16, F16), architecture=80),
}
SCHEDULES = [("fifo", "lazy"), ("reverse", "random"), ("random", "eager"), ("priority", "lazy"), ("priority", "random")]
# Queries and keys: no tile full, one, a few; as when a long text is continued; more queries than keys.
LENGTHS = [(63, 63), (65, 127), (129, 129), (1, 65), (127, 1), (200, 40)]
RULES = {
    "causal": {"right": 0},
    "window": {"left": 37, "right": 0},
    "both sides": {"left": 20, "right": 30},
    "softcap": {"softcap": 2.0, "right": 0},
    "scale": {"scale": 0.3, "left": 90},
    "sink": {"sink": True, "right": 0},
    "bias": {"bias": "full", "right": 0},
    "shared bias": {"bias": "shared", "softcap": 5.0},
    "all": {"bias": "full", "sink": True, "softcap": 3.0, "left": 70, "right": 10, "heads": 4, "kv_heads": 2},
}


def check_one_key(module, step, case):
    """A query of one key has p = 1, and ds = dp - delta is 0 but for rounding: no size to be relative to."""
    got, want = backward(module, step, case), reference(case, gradients=True)
    assert error(got["dv"], want["dv"]) <= 3 * ROUNDING[case.dtype]
    for name in ("dq", "dk"):
        assert want[name].abs().max() <= 1e-12
        assert (got[name].abs() <= 1e-4).all(), f"{name}: {got[name].abs().max():.3g}, expected 0"


@pytest.mark.parametrize("step", STEPS)
def test_every_head_width_and_type(step):
    for head_dim in STEPS[step].head_dims:
        for dtype in STEPS[step].dtypes:
            check_backward(_simt, step, Case(queries=70, keys=100, right=0, head_dim=head_dim, dtype=dtype))
    with pytest.raises(ValueError, match="head width"):
        backward(_simt, step, Case(head_dim=STEPS[step].refuses))


@pytest.mark.parametrize("step", STEPS)
def test_odd_lengths(step):
    for (queries, keys), right in zip(LENGTHS, (0, 1 << 30, 0, 0, 1 << 30, 0), strict=True):
        case = Case(queries=queries, keys=keys, right=right, batch=2)
        (check_one_key if keys == 1 else check_backward)(_simt, step, case)
    check_one_key(_simt, step, Case(queries=1, keys=1, right=0))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("step", STEPS)
def test_every_rule(step, rule):
    check_backward(_simt, step, Case(**{"heads": 2, "queries": 100, "keys": 150, "seed": 1} | RULES[rule]))


@pytest.mark.parametrize("step", STEPS)
def test_a_key_sums_over_the_heads_of_its_group(step):
    for heads, kv_heads in ((6, 1), (6, 3)):
        for deterministic in (False, True):
            case = Case(heads=heads, kv_heads=kv_heads, queries=90, keys=130, right=0, batch=2, seed=heads)
            check_backward(_simt, step, case, deterministic)


@pytest.mark.parametrize("step", STEPS)
def test_sequences_of_different_length(step):
    """Packed: some without queries or keys, some of which see nothing."""
    for rules in ({}, {"right": 0}, {"left": 30, "right": 0, "softcap": 4.0, "sink": True}):
        for deterministic in (False, True):
            case = Case(
                heads=4, kv_heads=2, lengths_q=(3, 70, 0, 129, 64, 5), lengths_k=(65, 70, 9, 1, 128, 0), seed=2, **rules
            )
            check_backward(_simt, step, case, deterministic)


class WithGradientOfLse:
    """A module whose attention_backward is given d_lse as well."""

    def __init__(self, module, d_lse):
        self.module, self.d_lse = module, d_lse

    def run(self, name, **given):
        self.module.run(name, d_lse=self.d_lse, **given)


@pytest.mark.parametrize("step", STEPS)
def test_gradient_of_lse(step):
    case = Case(queries=130, keys=90, right=0, batch=2)  # the first 40 queries see nothing: lse is -inf
    d_lse = torch.randn(case.batch, case.heads, case.queries, generator=torch.Generator().manual_seed(5))
    d_lse[:, :, :40] = torch.nan
    leaves = [case.arrays[n].double().requires_grad_() for n in ("q", "k", "v")]
    o, lse = definition(*leaves, scale=case.scale_value, right=0)
    total = (o * case.arrays["d_o"].double()).sum() + (lse[:, :, 40:] * d_lse[:, :, 40:].double()).sum()
    want = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(total, leaves), strict=True))
    got = backward(WithGradientOfLse(_simt, d_lse), step, case)
    for name in want:
        assert error(got[name], want[name].nan_to_num()) <= 3 * ROUNDING[case.dtype]


@pytest.mark.parametrize("step", STEPS)
def test_what_is_not_seen_has_no_gradient(step):
    """Rows that see nothing, and keys that nobody sees, are written: as zeros."""
    case = Case(queries=150, keys=70, right=0)  # queries 0..79 stand before the first key
    got = backward(_simt, step, case)
    assert (got["dq"][:, :, :80] == 0).all() and (got["dq"][:, :, 80:].abs().amax(-1) > 0)[:, :, 1:].all()
    case = Case(queries=20, keys=200, left=10, right=0)  # keys 0..169 are too far back
    got = backward(_simt, step, case)
    for name in ("dk", "dv"):
        assert (got[name][:, :, :170] == 0).all() and (got[name][:, :, 170:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("step", STEPS)
def test_extreme_scores_stay_finite(step):
    """Scores of 1e4: one key has all the weight. ds should be 0; rounding leaves something in o, for torch too."""
    case = Case(queries=100, keys=130, magnitude=100.0, right=0, head_dim=128)
    assert reference(case)["lse"].abs().max() > 1e4
    got, want = backward(_simt, step, case), reference(case, gradients=True)
    assert error(got["dv"], want["dv"]) <= 3 * ROUNDING[case.dtype]
    for name in ("dq", "dk"):
        assert got[name].isfinite().all()
        assert got[name].abs().max() <= ROUNDING[case.dtype] * case.magnitude * case.head_dim


@pytest.mark.parametrize("schedule", SCHEDULES, ids="-".join)
@pytest.mark.parametrize("step", STEPS)
def test_every_schedule(step, schedule):
    case = Case(heads=4, kv_heads=2, queries=150, keys=200, right=0, left=150, seed=3)
    wide = replace(case, heads=2, kv_heads=1, head_dim=STEPS[step].head_dims[-1], arrays={})
    for seed, multiprocessors in ((1, 1), (2, 3)):
        with _simt.options(order=schedule[0], async_=schedule[1], seed=seed, multiprocessors=multiprocessors):
            check_backward(_simt, step, case, deterministic=seed == 1)
            check_backward(_simt, step, wide, deterministic=seed == 2)


@pytest.mark.parametrize("step", STEPS)
def test_deterministic_gives_the_same_bits(step):
    for head_dim in (STEPS[step].head_dims[-1], 64):
        case = Case(heads=2, kv_heads=1, queries=200, keys=300, right=0, head_dim=head_dim)
        found = []
        for seed, (order, async_) in enumerate(SCHEDULES[:3]):
            with _simt.options(order=order, async_=async_, seed=seed, workers=1 if seed == 0 else 4):
                found.append(backward(_simt, step, case, deterministic=True))
        for other in found[1:]:
            assert all(torch.equal(found[0][name], other[name]) for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize("step", STEPS)
def test_a_thousand_tokens(step):
    check_backward(_simt, step, Case(heads=1, kv_heads=1, queries=1000, keys=1000, right=0), deterministic=True)


@pytest.mark.parametrize("schedule", SCHEDULES[:4], ids="-".join)
@pytest.mark.parametrize("step", STEPS)
def test_checked_build_finds_no_mistake(step, schedule):
    # The checker orders all accesses of a grid: additions to dq by two blocks are atomic, or take turns.
    with _simt_checked.options(order=schedule[0], async_=schedule[1], seed=4, multiprocessors=2):
        case = Case(heads=2, kv_heads=1, queries=70, keys=72, right=0, sink=True)
        check_backward(_simt_checked, step, case, deterministic=schedule[0] == "fifo")
        if schedule[0] == "reverse":
            head_dim, dtype = STEPS[step].head_dims[-1], STEPS[step].dtypes[-1]
            case = Case(heads=1, kv_heads=1, queries=40, keys=70, head_dim=head_dim, dtype=dtype, softcap=3.0)
            check_backward(_simt_checked, step, case, deterministic=True)
        if schedule[0] == "random":
            check_backward(_simt_checked, step, Case(heads=2, lengths_q=(3, 66), lengths_k=(65, 30), right=0))


def gpu_module(step):
    """The module of this machine's GPU that holds the step, or None."""
    if not torch.cuda.is_available():
        return None
    hopper = torch.cuda.get_device_capability() == (9, 0)
    if not hopper and STEPS[step].architecture > 80:
        return None
    return importlib.import_module("cuda._sm90" if hopper else "cuda._sm80")


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
def test_on_a_gpu(step):
    module = gpu_module(step)
    if module is None:
        pytest.skip("no CUDA device, or one that is too old for this step")
    for head_dim in STEPS[step].head_dims:
        for dtype in STEPS[step].dtypes:
            for deterministic in (False, True):
                case = Case(
                    heads=4, kv_heads=2, queries=500, keys=700, right=0, head_dim=head_dim, dtype=dtype, device="cuda"
                )
                check_backward(module, step, case, deterministic)
    for (queries, keys), right in zip(LENGTHS, (0, 1 << 30, 0, 0, 1 << 30, 0), strict=True):
        case = Case(queries=queries, keys=keys, right=right, batch=2, device="cuda")
        (check_one_key if keys == 1 else check_backward)(module, step, case)
    for rules in RULES.values():
        check_backward(module, step, Case(**{"queries": 300, "keys": 450, "device": "cuda"} | rules))
    case = Case(heads=4, kv_heads=2, lengths_q=(3, 70, 0, 129), lengths_k=(65, 70, 9, 1), right=0, device="cuda")
    check_backward(module, step, case)
    case = Case(heads=4, kv_heads=2, queries=4096, keys=4096, right=0, head_dim=128, device="cuda")
    first, second = (backward(module, step, case, deterministic=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
