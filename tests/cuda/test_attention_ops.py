"""cuda.ops.attention against the definition in float64: values, gradients, what it takes and what it refuses.

The ladders' steps are held to the definition in test_attention_forward.py and its like. Here everything goes through
the door that people use, on the CPU model; tests marked gpu repeat the main ones on a GPU.
"""

import math

import pytest
import torch

pytest.importorskip("cuda._simt", reason="make native builds the kernels")

from cuda import attention_ops, modules, ops
from minigpt.config import GPTConfig
from minigpt.model import GPT, causal_attention
from tests.cuda.attention_cases import EVERYTHING, Case, definition, error, reference
from tests.cuda.products import DEVICES

BF16 = torch.bfloat16


def rows(*shape, dtype=BF16, device="cpu", grad=False, seed=0):
    """(B, H, T, K), in memory as a GPT has them."""
    B, H, T, K = shape
    x = torch.randn(B, T, H, K, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return x.transpose(1, 2).requires_grad_(grad)


def check_all(case: Case, tolerance=0.012, **options):
    """Value, lse and every gradient, of a random upstream gradient of both results."""
    a = case.arrays
    leaves = {n: a[n].detach().clone().requires_grad_() for n in ("q", "k", "v", "sink") if n in a}
    packed = {f"cu_seqlens_{x}": a[f"starts_{x}"] for x in "qk" if case.lengths_q}
    o, lse = ops.attention(
        leaves["q"], leaves["k"], leaves["v"], sink=leaves.get("sink"), bias=a.get("bias"), softcap=case.softcap,
        return_lse=True, **packed, **options,
    )  # fmt: skip
    want = reference(case, gradients=True)
    assert error(o, want["o"]) <= tolerance
    finite = want["lse"].isfinite()
    assert (lse.isfinite() == finite).all() and (lse[finite] - want["lse"][finite]).abs().max() <= 0.01
    o.backward(a["d_o"])
    names = {"q": "dq", "k": "dk", "v": "dv", "sink": "d_sink"}
    for name, x in leaves.items():
        assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
        assert error(x.grad, want[names[name]]) <= tolerance, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_value_and_gradients(device, dtype):
    check_all(Case(heads=4, kv_heads=2, queries=70, keys=101, dtype=dtype, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_the_rules_are_those_of_the_definition(device):
    size = {"queries": 67, "keys": 67, "device": device}
    check_all(Case(right=0, **size), causal=True)
    check_all(Case(left=9, right=0, **size), causal=True, window=10)
    check_all(Case(left=9, right=9, softcap=3.0, **size), window=10)
    check_all(Case(sink=True, bias="full", **size))
    check_all(Case(queries=90, keys=40, right=0, device=device), causal=True)  # the first 50 queries see nothing


@pytest.mark.parametrize("device", DEVICES)
def test_packed_sequences(device):
    lengths = {"lengths_q": (5, 0, 66, 1), "lengths_k": (9, 3, 0, 40)}
    check_all(Case(**lengths, right=0, device=device, sink=True), causal=True)
    alone = Case(lengths_q=(30,), lengths_k=(30,), heads=2, kv_heads=1, device=device)
    check_all(alone, deterministic=True)


def test_scale_is_an_argument():
    q, k, v = (rows(1, 1, 20, 64, seed=i) for i in range(3))
    o = ops.attention(q, k, v, scale=0.5)
    assert error(o, definition(q.double(), k.double(), v.double(), scale=0.5)[0]) <= 0.01


@pytest.mark.parametrize("step", range(1, 4))
def test_steps_by_number(step):
    q = rows(1, 2, 33, 64)
    assert error(ops.attention(q, q, q, step=step), ops.attention(q, q, q)) <= 0.005
    names = attention_ops.FORWARD, attention_ops.BACKWARD
    assert [name.rsplit("_", 1)[1] for name in names[0]] == [f"{i:02}" for i in range(1, 10)]
    assert [name.rsplit("_", 1)[1] for name in names[1]] == [f"{i:02}" for i in range(1, 6)]


def test_the_gradient_of_lse():
    leaves = [rows(1, 2, 40, 64, grad=True, seed=i) for i in range(3)]
    o, lse = ops.attention(*leaves, causal=True, return_lse=True)
    d_o, d_lse = torch.randn(o.shape).to(BF16), torch.randn(lse.shape)
    got = torch.autograd.grad((o, lse), leaves, (d_o, d_lse))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    o, lse = definition(*exact, scale=64**-0.5, right=0)
    want = torch.autograd.grad((o, lse), exact, (d_o.double(), d_lse.double()))
    assert all(error(x, y) <= 0.012 for x, y in zip(got, want, strict=True))
    got = torch.autograd.grad(ops.attention(*leaves, return_lse=True)[1].sum(), leaves[:2])  # of lse alone
    want = torch.autograd.grad(definition(*exact, scale=64**-0.5)[1].sum(), exact[:2])
    assert all(error(x, y) <= 0.012 for x, y in zip(got, want, strict=True))


def test_the_result_joins_its_heads_without_a_copy():
    o = ops.attention(*(rows(2, 3, 17, 64),) * 3)
    assert o.transpose(1, 2).is_contiguous()
    assert o.transpose(1, 2).reshape(2, 17, 192).data_ptr() == o.data_ptr()


def test_nothing_in_nothing_out():
    q, none = rows(2, 2, 5, 64), rows(2, 2, 0, 64)
    assert ops.attention(none, q, q).shape == (2, 2, 0, 64)
    o, lse = ops.attention(q, none, none, return_lse=True)
    assert not o.any() and (lse == -math.inf).all()
    sink = torch.tensor([1.0, 2.0])
    assert (ops.attention(q, none, none, sink=sink, return_lse=True)[1] == sink[None, :, None]).all()
    leaves = [x.clone().requires_grad_() for x in (q, none, none)]
    ops.attention(*leaves).sum().backward()
    assert not leaves[0].grad.any() and leaves[1].grad.shape == none.shape
    assert ops.attention(none[:0], none[:0], none[:0]).shape == (0, 2, 0, 64)


def test_a_gradient_without_strides():
    q = rows(1, 2, 20, 64, grad=True)
    ops.attention(q, q, q).sum().backward()  # what arrives is one number, expanded
    exact = q.detach().double().requires_grad_()
    definition(exact, exact, exact, scale=0.125)[0].sum().backward()
    assert error(q.grad, exact.grad) <= 0.02


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_gradients_are_the_same_under_every_schedule(deterministic):
    q, k, v = (rows(1, 2, 200, 64, grad=True, seed=i) for i in range(3))
    found = []
    for order, seed in (("fifo", 1), ("random", 2), ("priority", 3)):
        with modules.load("_simt").options(order=order, seed=seed):
            found.append(torch.autograd.grad(ops.attention(q, k, v, deterministic=deterministic).square().sum(), q)[0])
    if deterministic:
        assert all(torch.equal(found[0], other) for other in found[1:])
    assert all(error(other, found[0]) <= 0.01 for other in found[1:])


def test_opcheck():
    q, k, v = (rows(1, 2, 20, 64, grad=True, seed=i) for i in range(3))
    numbers = (20, 20, 0.125, 0.0, EVERYTHING, 0, False, None, None)
    result = torch.library.opcheck(attention_ops._attention, (q, k, v, None, None, None, None, *numbers))
    assert set(result.values()) == {"SUCCESS"}
    sink, starts = torch.zeros(2, requires_grad=True), torch.tensor([0, 8, 20], dtype=torch.int32)
    packed = [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in (q, k, v)]
    numbers = (12, 12, 0.125, 0.0, EVERYTHING, 0, False, None, None)
    result = torch.library.opcheck(attention_ops._attention, (*packed, sink, None, starts, starts, *numbers))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.slow
def test_torch_compile_sees_one_operation():
    q, k, v = (rows(1, 2, 24, 64, grad=True, seed=i) for i in range(3))

    def loss(q, k, v):
        return ops.attention(q, k, v, causal=True).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, loss))
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_it_is_the_attention_of_stage_2():
    q, k, v = (rows(2, h, 30, 64, seed=h) for h in (4, 2, 2))
    v = rows(2, 2, 30, 64, seed=9)
    mask = torch.rand(2, 30, 30) < 0.5
    mask |= torch.eye(30, dtype=torch.bool)
    for options in ({}, {"window": 7}, {"mask_BTS": mask}):
        want = causal_attention(q.double(), k.double(), v.double(), **options)
        assert error(ops.causal_attention(q, k, v, **options), want) <= 0.01
    config = GPTConfig(vocab_size=32, layers=2, width=64, heads=1, kv_heads=1, context=12, head_width=64)
    tokens = torch.randint(32, (2, 12))
    plain, ours = GPT(config, seed=1), GPT(config, attention_fn=ops.causal_attention, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (plain(tokens, tokens) - ours(tokens, tokens)).abs() <= 0.02


# ---- bad input -------------------------------------------------------------------------------------------------------

GOOD = {name: rows(2, 2, 8, 64, seed=i) for i, name in enumerate("qkv")}
PACKED = {name: x[0].transpose(0, 1).contiguous() for name, x in GOOD.items()}
STARTS = torch.tensor([0, 3, 8], dtype=torch.int32)


def packed(q=STARTS, k=STARTS, **changes):
    return PACKED | {"cu_seqlens_q": q, "cu_seqlens_k": k} | changes


def starts(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


WRONG = {
    "float32": (GOOD | {"q": GOOD["q"].float()}, r"q is torch\.float32: expected torch\.bfloat16 or torch\.float16"),
    "mixed types": (GOOD | {"v": GOOD["v"].half()}, r"v is torch\.float16: expected torch\.bfloat16, as q is"),
    "not a tensor": (GOOD | {"k": [1.0]}, "k is a list"),
    "two dimensions": (GOOD | {"q": GOOD["q"][0, 0]}, r"q has shape \(8, 64\): expected \(batch, heads, rows, head"),
    "head width": ({n: x[..., :40].clone() for n, x in GOOD.items()}, "q has head width 40: expected one of 64, 96"),
    "heads": (GOOD | {"q": rows(2, 3, 8, 64)}, "k has 2 heads, q has 3: expected a divisor"),
    "batch": (GOOD | {"k": rows(1, 2, 8, 64)}, r"k has shape \(1, 2, 8, 64\): expected \(2, 2, 8, 64\)"),
    "values": (GOOD | {"v": rows(2, 2, 9, 64)}, r"v has shape \(2, 2, 9, 64\): expected \(2, 2, 8, 64\)"),
    "last dimension": (GOOD | {"k": rows(2, 2, 64, 8).mT}, "k has strides .*: expected a contiguous last dimension"),
    "address": (
        GOOD | {"v": torch.randn(2 * 2 * 8 * 64 + 1).to(BF16)[1:].view(2, 2, 8, 64)},
        "v has strides .* and starts 2 b",
    ),
    "stride": (GOOD | {"v": torch.randn(2, 2, 8, 68).to(BF16)[..., :64]}, r"v has strides .*multiples of 8 elements"),
    "window": (GOOD | {"window": -1}, "window -1: expected 0"),
    "no window": (GOOD | {"window": 2.5}, r"window 2\.5: expected 0"),
    "softcap": (GOOD | {"softcap": -1.0}, r"softcap -1\.0: expected 0"),
    "softcap NaN": (GOOD | {"softcap": math.nan}, "softcap nan: expected 0"),
    "scale": (GOOD | {"scale": math.inf}, "scale: expected a positive finite number"),
    "negative scale": (GOOD | {"scale": -1.0}, "scale: expected a positive finite number"),
    "dropout": (GOOD | {"dropout": 0.1}, r"dropout 0\.1: expected 0, these kernels have none"),
    "sink": (GOOD | {"sink": torch.zeros(3)}, r"sink is torch\.float32 of shape \(3,\): expected .* \(2,\)"),
    "bias type": (GOOD | {"bias": torch.zeros(1, 1, 8, 8, dtype=BF16)}, r"bias is torch\.bfloat16"),
    "bias shape": (GOOD | {"bias": torch.zeros(1, 1, 8, 9)}, r"bias has shape .*: expected \(2 or 1, 2 or 1, 8, 8\)"),
    "bias gradient": (GOOD | {"bias": torch.zeros(1, 1, 8, 8, requires_grad=True)}, "bias requires a gradient"),
    "packed bias": (packed(bias=torch.zeros(1, 1, 8, 8)), "bias beside cu_seqlens: expected none"),
    "one cu_seqlens": (PACKED | {"cu_seqlens_q": STARTS}, "expected both or none"),
    "cu_seqlens type": (packed(starts(0, 3, 8, dtype=torch.int64)), r"cu_seqlens_q is torch\.int64"),
    "cu_seqlens number": (packed(k=starts(0, 8)), "cu_seqlens_k is .* as many for queries as for keys"),
    "cu_seqlens fall": (
        packed(k=starts(0, 9, 8)),
        r"cu_seqlens_k\[2\] is 8 after 9: expected numbers that do not fall",
    ),
    "cu_seqlens end": (packed(starts(0, 3, 9)), "cu_seqlens_q goes from 0 to 9: expected 0 to the number of rows, 8"),
    "cu_seqlens begin": (packed(starts(1, 3, 8)), "cu_seqlens_q goes from 1 to 8"),
    "packed shape": (
        GOOD | {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS},
        r"q has shape .*: expected \(rows, heads",
    ),
    "step": (GOOD | {"step": "fast"}, "step 'fast': expected None, 1 to 9, or one of naive_01"),
    "step number": (GOOD | {"backward_step": 6}, "backward_step 6: expected None, 1 to 5, or one of recompute_01"),
    "device": (GOOD | {"k": GOOD["k"].to("meta")}, "k is on meta, q on cpu: expected one device"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        ops.attention(**arguments)


def test_lengths_are_looked_at_again_when_they_change():
    c = starts(0, 4, 8)
    ops.attention(**packed(c, c))
    c[1] = 9
    with pytest.raises(ValueError, match="is 8 after 9"):
        ops.attention(**packed(c, c))


def test_the_extension_checks_its_own_arguments():
    run = modules.load("_simt").run
    case = Case()
    good = case.arguments() | {
        "step": "mma_sync_03",
        "o": torch.empty_like(case.arrays["q"]),
        "lse": torch.empty(1, 2, 64),
    }
    run("attention_forward", **good)
    for changes, message in (
        ({"lse": torch.empty(1, 2, 63)}, r"lse: shape \(1, 2, 63\): expected \(1, 2, 64\)"),
        ({"o": torch.empty(1, 2, 64, 64)}, "o: is float32: expected bfloat16"),
        ({"k": good["k"][:, :1]}, r"v: shape \(1, 2, 64, 64\): expected \(1, 1, 64, 64\)"),
        ({"left": -1}, "left, right: expected 0"),
        ({"step": "none_01"}, "step 'none_01': this module has no such forward step"),
        ({"q": None}, "q: expected an array"),
    ):
        with pytest.raises(ValueError, match=message):
            run("attention_forward", **good | changes)
    with pytest.raises(ValueError, match="operation 'dance': this module has no such"):
        run("dance")
