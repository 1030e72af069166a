"""Attention in Triton against the definition in float64: values, gradients, every rule, what it takes and refuses.

On CPU tensors Triton's interpreter runs the kernels, on a GPU what its compiler made (marker gpu). What it makes of
them for Hopper is read here too, without a GPU: which instructions there are, and that no register lies in memory.
"""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

from cuda import attention_ops
from cuda.attention_ops import EVERYTHING, TRITON_HEAD_DIMS, attention, causal_attention
from cuda.device import place
from cuda.triton_attention_rules import reference as short_definition
from cuda.triton_compat import compiling
from cuda.triton_tilings import Tiling
from minigpt import model
from tests.cuda import sass
from tests.cuda.attention_cases import Case, check_backward, check_forward, definition, error, reference
from tests.cuda.products import DEVICES

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LENGTHS = [(1, 1), (1, 129), (63, 65), (127, 63), (129, 129)]  # queries, keys
RULES = {
    "full": {},
    "causal": {"right": 0},
    "window": {"left": 30, "right": 0},
    "band": {"left": 7, "right": 70},
    "wide band": {"left": 100, "right": 90, "queries": 200, "keys": 230},  # edges, and whole tiles between them
    "softcap": {"softcap": 2.0, "right": 0},
    "sink": {"sink": True, "left": 20, "right": 0},
    "bias": {"bias": "full"},
    "shared bias": {"bias": "shared", "right": 0, "scale": 0.3, "batch": 2},
    "all": {"left": 60, "right": 5, "softcap": 3.0, "sink": True, "bias": "full", "kv_heads": 1, "batch": 2},
}
PACKED = {"lengths_q": (1, 65, 0, 3, 70), "lengths_k": (33, 65, 5, 0, 30), "kv_heads": 1}


class Triton:
    """What attention_cases calls a module, with tiles of its own so that short sequences have many."""

    def __init__(self, device, queries=None, keys=None):
        self.place = place(torch.device(device), kernels="triton")
        self.forward = {"tiling": queries} if queries else {}
        self.backward = {"tiling_queries": queries, "tiling_keys": keys} if queries else {}

    def run(self, name, **given):
        self.place.run(name, **given, **(self.forward if name == "attention_forward" else self.backward))


def small(device):
    return Triton(device, Tiling(64, 32, 0, 4, 2), Tiling(32, 64, 0, 4, 2))


def check_both(module, case):
    check_forward(module, "", case)
    if case.keys > 1 or case.lengths_q:  # of one key p is 1, and ds is 0 but for rounding: no size to be relative to
        check_backward(module, "", case)


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_every_head_width_type_and_length(device):
    turns = itertools.cycle((BF16, F16, F16, BF16))
    for head_dim, dtype in zip(TRITON_HEAD_DIMS, turns, strict=False):
        case = Case(queries=70, keys=101, right=0, heads=1, kv_heads=1, head_dim=head_dim, dtype=dtype, device=device)
        check_both(Triton(device), case)
    for (queries, keys), dtype, right in zip(LENGTHS, turns, (0, 0, EVERYTHING, 0, 0), strict=False):
        case = Case(queries=queries, keys=keys, right=right, heads=1, kv_heads=1, dtype=dtype, device=device)
        check_both(small(device), case)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule, device):
    options = {"queries": 67, "keys": 101, "seed": len(rule), "device": device} | RULES[rule]
    check_both(small(device), Case(**options, head_dim=16, dtype=F16))
    if rule in ("causal", "all"):
        check_both(Triton(device), Case(**options, head_dim=96))


@pytest.mark.parametrize("device", DEVICES)
def test_packed_sequences(device):
    """Some without queries, some without keys, more queries than keys and the other way round."""
    for rules in ({"right": 0}, {"left": 20, "right": 0, "sink": True, "softcap": 4.0}, {}):
        check_both(small(device), Case(**PACKED, **rules, head_dim=32, device=device))
    check_both(Triton(device), Case(**PACKED, right=0, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_windows_that_just_reach(device):
    """Where a side ends nothing at all, or one pair of a query and a key: there the masked loops begin and end."""
    for queries, keys in ((70, 90), (90, 70)):
        for side, reach in itertools.product(("left", "right"), (-2, 0, 9)):
            limit = queries if side == "right" else keys
            options = {side: limit + reach, "head_dim": 16, "heads": 1, "kv_heads": 1, "device": device}
            check_both(small(device), Case(queries=queries, keys=keys, dtype=F16, **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 1), (6, 3)])
def test_grouped_heads(heads, kv_heads, device):
    options = {"heads": heads, "kv_heads": kv_heads, "batch": 2, "head_dim": 32, "device": device}
    check_both(small(device), Case(queries=40, keys=50, right=0, **options))


@pytest.mark.parametrize("device", DEVICES)
def test_queries_that_see_nothing(device):
    for rules in (
        {"queries": 100, "keys": 10, "right": 0},  # more than a tile of queries before the first key
        {"queries": 10, "keys": 10, "left": 3, "bias": "shared"},
        {"queries": 65, "keys": 70, "left": 0, "right": 0, "sink": True, "bias": "full"},  # the only key may be hidden
    ):
        check_forward(small(device), "", Case(**rules, head_dim=32, device=device))
        check_backward(small(device), "", Case(**rules, head_dim=32, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_a_query_that_its_bias_hides_everything_from(device):
    """It gives zeros, and gradients as if nothing had come from it."""
    q, k, v = (torch.randn(1, 1, 40, 16, device=device, requires_grad=True) for _ in range(3))
    bias, d_o, d_lse = torch.zeros(1, 1, 40, 40, device=device), torch.randn_like(q), torch.randn(1, 1, 40).to(device)
    without = d_o.clone(), d_lse.clone()
    without[0][:, :, 5], without[1][:, :, 5] = 0, 0
    o, lse = attention(q, k, v, bias=bias, return_lse=True, kernels="triton")
    want = torch.autograd.grad((o, lse), (q, k, v), without)
    bias[:, :, 5] = -math.inf
    o, lse = attention(q, k, v, bias=bias, return_lse=True, kernels="triton")
    assert (o[:, :, 5] == 0).all() and (lse[:, :, 5] == -math.inf).all()
    for x, y in zip(torch.autograd.grad((o, lse), (q, k, v), (d_o, d_lse)), want, strict=True):
        assert error(x, y) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_large_scores(dtype, device):
    case = Case(queries=65, keys=130, magnitude=100.0, dtype=dtype, sink=dtype == F16, right=0, device=device)
    assert reference(case)["lse"].abs().max() > 1e4
    check_forward(small(device), "", case)
    q, k, v = (case.arrays[n].detach().requires_grad_() for n in "qkv")
    o = attention(q, k, v, causal=True, kernels="triton")
    grads = torch.autograd.grad(o, (q, k, v), case.arrays["d_o"])
    assert o.isfinite().all() and all(x.isfinite().all() for x in grads)


def leaves_of(case):
    return {n: case.arrays[n].detach().clone().requires_grad_() for n in ("q", "k", "v", "sink") if n in case.arrays}


def check_public(case, tolerance, d_lse=False, **options):
    """ops.attention's value, lse, and gradients of everything; with d_lse of lse too."""
    a, leaves = case.arrays, leaves_of(case)
    packed = {f"cu_seqlens_{x}": a[f"starts_{x}"] for x in "qk" if case.lengths_q}
    o, lse = attention(
        leaves["q"], leaves["k"], leaves["v"], sink=leaves.get("sink"), bias=a.get("bias"), softcap=case.softcap,
        return_lse=True, kernels="triton", **packed, **options,
    )  # fmt: skip
    want = reference(case, gradients=True)
    assert o.dtype == case.dtype and error(o, want["o"]) <= tolerance
    finite = want["lse"].isfinite()
    assert (lse.isfinite() == finite).all() and (lse[finite] - want["lse"][finite]).abs().max() <= 1e-5
    upstream = (a["d_o"], torch.randn(lse.shape, device=lse.device) if d_lse else torch.zeros_like(lse))
    got = torch.autograd.grad((o, lse), list(leaves.values()), upstream)
    expected = [want[f"d{n}" if n != "sink" else "d_sink"] for n in leaves]
    if d_lse:
        exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
        rules = {"scale": case.scale_value, "softcap": case.softcap, "left": case.left, "right": case.right}
        outs = definition(exact["q"], exact["k"], exact["v"], sink=exact.get("sink"), bias=a.get("bias"), **rules)
        expected = torch.autograd.grad(outs, list(exact.values()), [x.double() for x in upstream])
    for name, x, y in zip(leaves, got, expected, strict=True):
        assert x.dtype == leaves[name].dtype and x.shape == leaves[name].shape
        assert error(x, y) <= tolerance, (name, error(x, y))


@pytest.mark.parametrize("device", DEVICES)
def test_float32_is_exact(device):
    size = {"queries": 67, "keys": 75, "dtype": F32, "device": device}
    for head_dim in (16, 96):
        check_public(Case(right=0, head_dim=head_dim, **size), 3e-6, causal=True)
    check_public(Case(left=9, right=0, sink=True, kv_heads=1, **size), 3e-6, d_lse=True, causal=True, window=10)
    check_public(Case(softcap=3.0, bias="full", sink=True, **size), 3e-6, d_lse=True)
    check_public(Case(**PACKED, right=0, dtype=F32, sink=True, device=device), 3e-6, causal=True)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_through_lse(device):
    check_public(Case(queries=40, keys=33, sink=True, device=device), 0.012, d_lse=True)
    q, k, v = (torch.randn(1, 2, 20, 16, device=device, requires_grad=True) for _ in range(3))
    got = torch.autograd.grad(attention(q, k, v, return_lse=True, kernels="triton")[1].sum(), (q, k))  # lse alone
    want = torch.autograd.grad((0.25 * q @ k.mT).logsumexp(-1).sum(), (q, k))
    assert all(error(x, y) <= 1e-5 for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_three_hundred_tokens(device):
    check_public(Case(queries=300, keys=300, heads=2, kv_heads=1, right=0, device=device), 0.012, causal=True)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_every_time(device):
    leaves = list(leaves_of(Case(queries=100, keys=100, heads=4, device=device)).values())
    runs = [torch.autograd.grad(attention(*leaves, kernels="triton").square().sum(), leaves) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_the_short_definition_is_the_definition():
    q, k, v = (torch.randn(2, h, t, 8, dtype=torch.float64) for h, t in ((4, 9), (2, 7), (2, 7)))
    rules = {"scale": 0.3, "softcap": 2.0, "left": 2, "right": 1, "sink": torch.randn(4), "bias": torch.randn(9, 7)}
    for mine, theirs in zip(short_definition(q, k, v, **rules), definition(q, k, v, **rules), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)


def test_nan_stays_with_those_who_see_it():
    q, k, v = (torch.randn(1, 1, 70, 16) for _ in range(3))
    k[0, 0, 40, 3] = math.nan
    o, lse = attention(q, k, v, causal=True, return_lse=True, kernels="triton")
    assert o[:, :, 40:].isnan().all() and lse[:, :, 40:].isnan().all()
    assert o[:, :, :40].isfinite().all() and lse[:, :, :40].isfinite().all()


def test_nothing_in_nothing_out():
    q, none = torch.randn(2, 2, 5, 64), torch.randn(2, 2, 0, 64)
    assert attention(none, q, q, kernels="triton").shape == (2, 2, 0, 64)
    o, lse = attention(q, none, none, return_lse=True, kernels="triton")
    assert not o.any() and (lse == -math.inf).all()
    leaves = [x.clone().requires_grad_() for x in (q, none, none)]
    attention(*leaves, kernels="triton").sum().backward()
    assert not leaves[0].grad.any()


def test_it_is_the_attention_of_stage_2():
    q, k, v = (torch.randn(2, h, 30, 32) for h in (4, 2, 2))
    mask = (torch.rand(2, 30, 30) < 0.5) | torch.eye(30, dtype=torch.bool)
    for options in ({}, {"window": 7}, {"mask_BTS": mask}):
        want = model.causal_attention(q.double(), k.double(), v.double(), **options)
        assert error(causal_attention(q, k, v, kernels="triton", **options), want) <= 2e-6


def test_strides_of_what_stands_alone_do_not_matter():
    x = torch.randn(1, 1, 20, 1001)[..., :16].to(BF16)  # rows that TMA could not describe, were there two heads
    q = x.as_strided((1, 1, 20, 16), (7, 3, 16, 1))
    assert error(attention(q, q, q, kernels="triton"), definition(*[q.double()] * 3, scale=0.25)[0]) <= 0.01


# ---- the door --------------------------------------------------------------------------------------------------------


def test_opcheck():
    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
    numbers = (20, 20, 0.25, 0.0, EVERYTHING, 0, False, None, None, "triton")
    result = torch.library.opcheck(attention_ops._attention, (q, k, v, None, None, None, None, *numbers))
    assert set(result.values()) == {"SUCCESS"}
    sink, starts = torch.zeros(2, requires_grad=True), torch.tensor([0, 8, 20], dtype=torch.int32)
    packed = [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in (q, k, v)]
    numbers = (12, 12, 0.25, 0.0, EVERYTHING, 0, False, None, None, "triton")
    result = torch.library.opcheck(attention_ops._attention, (*packed, sink, None, starts, starts, *numbers))
    assert set(result.values()) == {"SUCCESS"}


def test_no_workspaces(monkeypatch):
    monkeypatch.setattr(attention_ops, "_workspaces", None)
    q = torch.randn(1, 2, 20, 16, requires_grad=True)
    attention(q, q, q, kernels="triton").sum().backward()
    assert q.grad.isfinite().all()


def test_bad_input():
    q = torch.randn(1, 2, 8, 64)
    for changes, message in (
        ({"kernels": "no"}, "kernels 'no': expected one of"),
        ({"step": "best_09"}, "step 'best_09', backward_step None: expected None"),
        ({"backward_step": 1}, "step None, backward_step 1: expected None"),
        ({"scale": 0.0}, r"scale: expected a positive finite number, not 0\.0"),
        ({"scale": math.inf}, "scale: expected a positive finite number, not inf"),
        ({"q": q.double()}, r"q is torch\.float64: expected torch\.float32 or torch\.bfloat16"),
        ({"k": q.half()}, r"k is torch\.float16: expected torch\.float32, as q is"),
        ({x: q[..., :40].clone() for x in "qkv"}, "q has head width 40: expected one of 16, 32, 64"),
        ({"v": q.mT.contiguous().mT}, "v has strides .*: expected a contiguous last dimension"),
        ({"window": -1}, "window -1: expected 0"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(**{"q": q, "k": q, "v": q, "kernels": "triton"} | changes)


# ---- what the compiler makes of it for Hopper ------------------------------------------------------------------------


def compiled(folder, head_dim, dtype=BF16, heads=2, **rules):
    """(kernels of forward and backward as sass.Kernel, bytes of shared memory) of 1024 queries and keys."""
    q = torch.randn(1, 1024, heads, head_dim).to(dtype).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(1, 1024, 2, head_dim).to(dtype).transpose(1, 2).requires_grad_() for _ in range(2))
    with compiling(90) as launches:
        o = attention(q, k, v, causal=True, kernels="triton", **rules)
        torch.autograd.grad(o, (q, k, v), torch.randn_like(o))
    found = []
    for i, (_, _, kernel) in enumerate(launches):
        path = folder / f"{head_dim}_{i}.cubin"
        path.write_bytes(kernel.asm["cubin"])
        found += sass.disassemble(path, sass.kernels(path))
        assert kernel.metadata.shared <= 227 << 10
    return found


@pytest.mark.skipif(bool(sass.missing("cuobjdump", "nvdisasm")), reason="needs Triton's disassembler")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_machine_code(head_dim, tmp_path):
    forward, queries, keys = compiled(tmp_path, head_dim, dtype=BF16 if head_dim == 128 else F16, heads=4)
    assert [k.name for k in (forward, queries, keys)] == ["attention_kernel", "queries_kernel", "keys_kernel"]
    for kernel in (forward, queries, keys):
        assert not sass.memory_faults(kernel)
        assert kernel.count("UTMALDG") >= 4 and kernel.count(r"HGMMA\.64x") >= head_dim // 8
        assert kernel.count(r"HGMMA\.64x\d+x16\.F32(\.BF16)? R\d+, R\d+, gdesc"), "p goes through shared memory"
        assert kernel.count(r"STG\.E\.128") and kernel.count(r"MUFU\.EX2")
    assert 2 * forward.count(r"WARPGROUP\.DEPBAR") <= forward.count("HGMMA")


@pytest.mark.skipif(bool(sass.missing("cuobjdump", "nvdisasm")), reason="needs Triton's disassembler")
def test_wide_heads_have_no_room_for_two_sums(tmp_path):
    kernels = compiled(tmp_path, 256)
    assert [k.name for k in kernels] == ["attention_kernel", "queries_kernel", "keys_kernel", "keys_kernel"]
    assert all(k.stack <= 8 and k.count("HGMMA") for k in kernels)  # Triton 3.6 puts two registers there, 3.9 none
