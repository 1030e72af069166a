"""Every forward step of the attention ladder against float64, at lengths no tile divides, under adversarial schedules.

`check_forward` of attention_cases.py holds o and lse against the definition, o against torch's SDPA too, and looks for
rows that were written outside of o. On a machine with a GPU the same cases run there (marker gpu), and larger ones.
"""

import importlib
import itertools
import math

import pytest
import torch

from tests.cuda.attention_cases import Case, check_forward, error, forward, reference

_simt = pytest.importorskip("cuda._simt", reason="make native builds the kernels")
_simt_checked = pytest.importorskip("cuda._simt_checked", reason="make native builds the kernels")

BOTH = (torch.bfloat16, torch.float16)
STEPS = {  # name: head widths, element types
    "naive_01": ((8, 40, 64, 256), BOTH),
    "online_02": ((64, 96, 128, 192, 256), BOTH),
    "mma_sync_03": ((64, 96, 128, 192, 256), BOTH),
}
ANY_GPU = ("naive_01", "online_02", "mma_sync_03")  # need no Hopper
SCHEDULES = [("fifo", "lazy"), ("reverse", "random"), ("random", "eager"), ("priority", "lazy"), ("priority", "random")]

LENGTHS = [(1, 1), (1, 129), (63, 65), (65, 63), (127, 129), (129, 300)]  # queries, keys
RULES = {
    "full": {},
    "causal": {"right": 0},
    "window": {"left": 30, "right": 0},
    "band": {"left": 7, "right": 70},
    "softcap": {"softcap": 2.0, "right": 0},
    "sink": {"sink": True, "left": 0, "right": 0},
    "bias": {"bias": "full"},
    "shared bias": {"bias": "shared", "right": 0, "scale": 0.3},
    "all": {"left": 100, "right": 5, "softcap": 3.0, "sink": True, "bias": "full", "kv_heads": 1},
}
PACKED = {  # some without queries, some without keys, more queries than keys and the other way round
    "causal": {"right": 0},
    "window": {"left": 40, "right": 0, "sink": True, "softcap": 4.0},
    "full": {},
}
LENGTHS_Q, LENGTHS_K = (1, 65, 0, 3, 129, 70), (33, 65, 5, 0, 150, 30)
DEAD = [
    {"queries": 200, "keys": 10, "right": 0},  # more than a tile of queries before the first key
    {"queries": 10, "keys": 10, "left": 3, "bias": "shared"},
    {"queries": 65, "keys": 70, "left": 0, "right": 0, "sink": True, "bias": "full"},  # a row's only key may be hidden
]


def cases_of(step, **options):
    """One case of these options for each of the step's head widths in turn, and of its element types."""
    widths, dtypes = STEPS[step]
    for i, dtype in zip(itertools.count(), itertools.cycle(dtypes)):
        yield lambda i=i, dtype=dtype, **more: Case(
            **{"head_dim": widths[i % len(widths)], "dtype": dtype, "seed": i} | options | more
        )


@pytest.fixture(params=STEPS)
def step(request):
    return request.param


def test_head_widths_and_types(step):
    widths, dtypes = STEPS[step]
    for head_dim, dtype in itertools.product(widths, dtypes):
        check_forward(_simt, step, Case(queries=66, keys=97, head_dim=head_dim, dtype=dtype, right=0))


def test_lengths(step):
    for (queries, keys), case in zip(LENGTHS, cases_of(step), strict=False):
        check_forward(_simt, step, case(queries=queries, keys=keys))
        check_forward(_simt, step, case(queries=queries, keys=keys, right=0))


@pytest.mark.parametrize("rules", RULES)
def test_rules(step, rules):
    for (queries, keys), case in zip([(70, 130), (130, 70)], cases_of(step, batch=2, **RULES[rules]), strict=False):
        check_forward(_simt, step, case(queries=queries, keys=keys))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (6, 3)])
def test_groups_of_heads(step, heads, kv_heads):
    check_forward(_simt, step, Case(heads=heads, kv_heads=kv_heads, queries=33, keys=40, batch=3, bias="full"))


@pytest.mark.parametrize("rules", PACKED)
def test_sequences_of_different_length(step, rules):
    for _, case in zip(range(2), cases_of(step, heads=4, lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K), strict=False):
        check_forward(_simt, step, case(kv_heads=2, **PACKED[rules]))


@pytest.mark.parametrize("step", ANY_GPU)
def test_a_sequence_does_not_see_the_one_behind_it(step):
    """Not even where it holds NaN, though tiles are wider than the sequence."""
    case = Case(lengths_q=(20, 30), lengths_k=(20, 40))
    for name in "qkv":
        case.arrays[name][20:] = math.nan
    got, want = forward(_simt, step, case), reference(case)
    assert error(got["o"][:20], want["o"][:20]) < 2**-7 and got["o"][20:].isnan().all()
    assert torch.allclose(got["lse"][:, :20].double(), want["lse"][:, :20]) and got["lse"][:, 20:].isnan().all()


@pytest.mark.parametrize("rules", DEAD, ids=str)
def test_rows_that_see_nothing(step, rules):
    check_forward(_simt, step, Case(**rules))


def test_large_scores(step):
    """Of 1e4 and more: one probability is all. In float16 it is not 1 but rounded to 11 bits like any other, where the
    score that was subtracted had been rounded; torch's is 1. So there, with a sink, the definition judges alone."""
    widths, dtypes = STEPS[step]
    for dtype in dtypes:
        rules = {"magnitude": 100.0, "dtype": dtype, "sink": dtype == torch.float16}
        check_forward(_simt, step, Case(queries=65, keys=130, head_dim=widths[0], **rules))
        check_forward(_simt, step, Case(queries=65, keys=130, head_dim=widths[-1], right=0, **rules))


@pytest.mark.parametrize("schedule", SCHEDULES, ids="-".join)
def test_every_schedule(step, schedule):
    for multiprocessors, case in zip((1, 3), cases_of(step, queries=150, keys=260), strict=False):
        with _simt.options(
            order=schedule[0], async_=schedule[1], seed=multiprocessors, multiprocessors=multiprocessors
        ):
            check_forward(_simt, step, case(right=0))
            check_forward(_simt, step, case(left=80, right=20, softcap=3.0))


@pytest.mark.parametrize("schedule", SCHEDULES[:4], ids="-".join)
def test_checked_build_finds_no_mistake(step, schedule):
    rules = ({"right": 0}, {"left": 30, "sink": True}, {"bias": "full", "softcap": 2.0})
    for more, case in zip(rules, cases_of(step, queries=72, keys=200, heads=1, kv_heads=1), strict=False):
        with _simt_checked.options(order=schedule[0], async_=schedule[1], seed=3, multiprocessors=2):
            check_forward(_simt_checked, step, case(**more))
    with _simt_checked.options(order=schedule[0], async_=schedule[1], seed=4, multiprocessors=2):
        check_forward(_simt_checked, step, case(lengths_q=(3, 0, 70), lengths_k=(40, 5, 100), heads=2, right=0))


@pytest.mark.parametrize("step", sorted({"mma_sync_03", list(STEPS)[-1]}))
def test_a_thousand_keys(step):
    check_forward(_simt, step, Case(queries=1000, keys=1000, heads=1, kv_heads=1, right=0))


def test_refuses_what_it_does_not_have(step):
    for head_dim in (80, 264):
        if head_dim not in STEPS[step][0] and not (step == "naive_01" and head_dim <= 256):
            with pytest.raises(ValueError, match=f"{head_dim} of q"):
                forward(_simt, step, Case(head_dim=head_dim))
    with pytest.raises(ValueError, match="q: is float32: expected bfloat16, float16"):
        forward(_simt, step, Case(dtype=torch.float32))


def gpu_modules():
    """The modules this machine's GPU can run, with their steps."""
    if not torch.cuda.is_available():
        return []
    found = [("cuda._sm80", step) for step in ANY_GPU]
    return found + ([("cuda._sm90", step) for step in STEPS] if torch.cuda.get_device_capability() == (9, 0) else [])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "step"), gpu_modules() or [pytest.param("", "", marks=pytest.mark.skip("no CUDA device"))]
)
def test_on_a_gpu(name, step):
    module = importlib.import_module(name)
    widths, dtypes = STEPS[step]
    for head_dim, dtype in itertools.product(widths, dtypes):
        for (queries, keys), rules in itertools.product([*LENGTHS, (1000, 1000), (300, 4000)], RULES.values()):
            options = {"queries": queries, "keys": keys, "head_dim": head_dim, "dtype": dtype, "device": "cuda"}
            check_forward(module, step, Case(**options, batch=2, heads=4, **{"kv_heads": 2} | rules))
        for rules in PACKED.values():
            options = {"lengths_q": LENGTHS_Q, "lengths_k": LENGTHS_K, "head_dim": head_dim, "dtype": dtype}
            check_forward(module, step, Case(**options, device="cuda", heads=4, kv_heads=2, **rules))
        rules = {"magnitude": 100.0, "sink": dtype == torch.float16}
        check_forward(module, step, Case(head_dim=head_dim, dtype=dtype, keys=1000, device="cuda", **rules))
    for rules in DEAD:
        check_forward(module, step, Case(**rules, device="cuda"))
