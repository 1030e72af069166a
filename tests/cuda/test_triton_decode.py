"""Decoding over a paged cache in Triton: the cases of the CUDA version, float32 and free strides beside them, NaN.

CPU tensors run in Triton's interpreter. What is compiled for Hopper is read at the end: tensor cores, 16-byte copies
ahead of their use, no spills.
"""

import math
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from cuda import decode_ops, triton_decode, triton_ops
from cuda.decode_ops import attention_decode
from cuda.device import TritonPlace
from cuda.paged_cache import PagedCache
from cuda.triton_compat import compiling
from cuda.triton_tilings import SHARED
from tests.cuda import sass
from tests.cuda import test_attention_decode as cuda_tests
from tests.cuda.attention_cases import EVERYTHING, ROUNDING, error
from tests.cuda.products import DEVICES
from tests.cuda.test_attention_decode import BAD, CASES, Cached, check, reference, run
from tests.cuda.test_attention_decode import changed as changed_call

ROUNDING.setdefault(torch.float32, 2**-20)
OUR_LIMITS = ("odd strides", "address", "float32")  # of the CUDA version alone


class Module:
    """The kernels themselves, called as a module of CUDA C++ is."""

    @staticmethod
    def run(operation, **arguments):
        triton_ops.run(TritonPlace("interpreter", 4, arguments["q"].device), operation, **arguments)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_definition(case, splits):
    check(case, *run(Module, case, splits))


def test_the_reference_is_the_definition():
    for case in (CASES["all of it"], CASES["more tokens than keys"]):
        q, k_cache, v_cache, table, lengths = case.positional
        left, scale = case.window - 1 if case.window else EVERYTHING, case.scale or case.head_dim**-0.5
        options = {"scale": scale, "softcap": case.softcap, "left": left, "sink": case.arrays.get("sink")}
        table = table.where(table < k_cache.shape[0], 0)  # it reads what no query sees, then hides it
        caches = (x.double().nan_to_num() for x in (k_cache, v_cache))
        for one, other in zip(
            triton_decode.reference(q.double(), *caches, table, lengths, **options), reference(case), strict=True
        ):
            torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_decode(splits, device, dtype):
    for name in ("all of it", "more tokens than keys"):
        case = replace(CASES[name], device=device, dtype=dtype, arrays={}, rows=[])
        given = {**case.options, "splits": splits, "kernels": "triton"}
        o, lse = attention_decode(*case.positional, **given, return_lse=True, check=True)
        assert o.shape == case.arrays["q"].shape and o.dtype == case.dtype and lse.dtype == torch.float32
        check(case, o, lse)
        assert torch.equal(attention_decode(*case.positional, **given), o)


def test_a_long_sequence_of_many_splits():
    case = Cached(lengths=(1000, 5), ratio=8, kv_heads=1, head_dim=64)
    o, lse = run(Module, case, 1)
    check(case, o, lse)
    for splits, least_keys in ((4, 256), (5, 0), (20, 0)):  # 20: more than the merge has at once
        got_o, got_lse = run(Module, case, splits, least_keys)
        assert error(got_o, o) <= ROUNDING[case.dtype]
        assert torch.allclose(got_lse, lse, atol=1e-6, rtol=1e-6)


def test_not_further_from_the_definition_than_torchs_own():
    for dtype in (torch.bfloat16, torch.float16):
        case = Cached(lengths=(257,), ratio=4, queries=2, head_dim=128, dtype=dtype)
        o, _ = run(Module, case, 2)
        (k, v), q = (x.transpose(0, 1)[None] for x in case.rows[0]), case.arrays["q"]
        mask = torch.ones(2, 257, dtype=torch.bool).tril(255)
        torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        want, _ = reference(case)
        assert error(o, want) <= 1.1 * error(torchs, want)


def test_any_strides_and_any_address():
    case = Cached(lengths=(40, 20), queries=2)
    q, k_cache, v_cache, *tables = case.positional
    want = attention_decode(q, k_cache, v_cache, *tables, kernels="triton")
    odd = [torch.full((*x.shape[:-1], 69), math.nan, dtype=x.dtype)[..., 3:67] for x in (q, k_cache, v_cache)]
    for view, x in zip(odd, (q, k_cache, v_cache), strict=True):
        view.copy_(x)
    assert torch.equal(attention_decode(*odd, *tables, kernels="triton"), want)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("where", ["q", "key", "all keys", "value"])
def test_a_nan_goes_to_the_queries_that_see_it(where, splits):
    """Of sequence 1 heads 2 and 3 read head 1 of the cache; the first of its two queries does not see its last key."""
    case = Cached(lengths=(40, 33), queries=2)
    q, k_cache, v_cache, table, _ = case.positional
    pages = table[1, :3].long()
    wrong = torch.zeros(2, 4, 2, dtype=torch.bool)
    if where == "q":
        q[1, 3, 1, 5] = math.nan
        wrong[1, 3, 1] = True
    elif where == "all keys":
        k_cache[pages, :, 1] = math.nan
        wrong[1, 2:] = True
    else:
        (k_cache if where == "key" else v_cache)[pages[2], 0, 1, 7] = math.nan
        wrong[1, 2:, 1] = True
    o, lse = attention_decode(*case.positional, kernels="triton", splits=splits, return_lse=True)
    if where == "value":  # 0 times a NaN of the same tile is NaN too, in this column
        assert o[..., 7].isnan()[wrong].all() and not o[0].isnan().any() and not o[1, :2].isnan().any()
        assert not lse.isnan().any() and not o[..., :7].isnan().any()
    else:
        assert torch.equal(o.isnan().all(-1), wrong) and torch.equal(o.isnan().any(-1), wrong)
        assert torch.equal(lse.isnan(), wrong)


def test_nothing_to_attend_to():
    case = Cached(lengths=(0, 0), sink=True)
    q, k_cache, v_cache, table, lengths = case.positional
    for given in ((k_cache, v_cache, table), (k_cache[:0], v_cache[:0], table), (k_cache, v_cache, table[:, :0])):
        for splits in (1, 2):
            options = {"return_lse": True, "kernels": "triton", "splits": splits}
            o, lse = attention_decode(q, *given, lengths, sink=case.arrays["sink"], **options)
            assert (o == 0).all() and torch.allclose(lse, case.arrays["sink"][:, None].expand_as(lse))
            assert (attention_decode(q, *given, lengths, **options)[1] == -math.inf).all()
    o, lse = attention_decode(q[:0], k_cache, v_cache, table[:0], lengths[:0], return_lse=True, kernels="triton")
    assert o.shape == (0, 4, 1, 64) and lse.shape == (0, 4, 1)
    assert attention_decode(q[:, :, :0], k_cache, v_cache, table, lengths, kernels="triton").shape == (2, 4, 0, 64)


def test_opcheck():
    case = Cached(lengths=(20, 0), sink=True, kv_heads=1)
    for splits in (1, 2):
        given = (*case.positional, case.arrays["sink"], 10, None, 3.0, splits, False, "triton")
        assert set(torch.library.opcheck(decode_ops._decode, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", [name for name in BAD if name not in OUR_LIMITS])
def test_refused(name, monkeypatch):
    monkeypatch.setattr(
        cuda_tests, "attention_decode", lambda *given, **more: attention_decode(*given, **more, kernels="triton")
    )
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_other_kernels_and_other_types():
    with pytest.raises(ValueError, match="kernels 'no': expected one of cuda, triton"):
        changed_call(kernels="no")()
    with pytest.raises(ValueError, match=r"q is torch.float64: expected one of \(torch.float32"):
        changed_call(kernels="triton", q=lambda x: x.double())()


def test_a_cache_with_heads_outermost_may_pass_2_to_the_31():
    """From one head to the next, or one slot, is a product of 64 bits: in code, for such a cache has gigabytes."""
    q, lengths = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16), torch.ones(1, dtype=torch.int32)
    cache = torch.zeros(4, 2, 17, 64, dtype=torch.bfloat16)[:, :, :16].permute(1, 2, 0, 3)
    with compiling(90) as found:
        attention_decode(q, cache, cache, torch.zeros(1, 1, dtype=torch.int32), lengths, kernels="triton")
    lines = [x.split(" loc(")[0].rstrip() for x in found[0].kernel.asm["ttir"].splitlines() if "arith.muli" in x]
    assert lines and not [x for x in lines if re.search("%[kv]_(head|slot)", x) and not x.endswith("i64")]
    assert not [x for x in lines if re.search("%[kv]_(head|slot)", x) and "i64" not in x]


def test_a_batch_larger_than_a_grid_is_deep():
    """Of x alone a grid may have more than 65535."""
    q, cache = torch.zeros(65537, 1, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 16, 1, 64, dtype=torch.bfloat16)
    table, lengths = torch.zeros(65537, 1, dtype=torch.int32), torch.ones(65537, dtype=torch.int32)
    with compiling(90) as found:
        attention_decode(q, cache, cache, table, lengths, kernels="triton")
    assert max(found[0].grid[1:], default=1) <= 65535 and math.prod(found[0].grid) == 65537


def test_tiles_fit_into_the_shared_memory_of_older_gpus():
    for dtype, head_dim in ((torch.bfloat16, 256), (torch.float32, 256)):
        cache = PagedCache(2, 64, kv_heads=1, head_dim=head_dim, dtype=dtype)
        q = torch.zeros(1, 8, 8, head_dim, dtype=dtype)
        with compiling(80) as found:
            attention_decode(
                q, cache.k, cache.v, torch.zeros(1, 2, dtype=torch.int32), torch.ones(1).int(), kernels="triton"
            )
        assert found[0].kernel.metadata.shared <= SHARED["sm_80"]


# ---- machine code ----------------------------------------------------------------------------------------------------


MACHINE_CODE = {
    "a token": ((128, 8, 1, 64), {}, {r"HMMA\.16816": 32, r"LDGSTS\.E\.BYPASS\.128": 32}),
    "all rules, 96 wide": (
        (96, 8, 1, 16),
        {"window": 50, "softcap": 3.0, "sink": torch.zeros(16)},
        {r"HMMA\.16816": 32, r"LDGSTS\.E\.BYPASS\.128": 32},
    ),
    "8 tokens": ((128, 8, 8, 64), {}, {"HGMMA": 12, r"LDGSTS\.E\.BYPASS\.128": 32}),
    "8 tokens, 256 wide": ((256, 8, 8, 64), {}, {"HGMMA": 16, r"LDGSTS\.E\.BYPASS\.128": 32}),
}


@pytest.mark.skipif(bool(sass.missing("cuobjdump", "nvdisasm")), reason="no cuobjdump and nvdisasm")
@pytest.mark.parametrize("sizes, options, wanted", MACHINE_CODE.values(), ids=MACHINE_CODE)
def test_machine_code(sizes, options, wanted, tmp_path):
    head_dim, ratio, queries, block_size = sizes
    cache = PagedCache(8, block_size, kv_heads=2, head_dim=head_dim)
    q = torch.zeros(1, queries, 2 * ratio, head_dim, dtype=torch.bfloat16).transpose(1, 2)
    table, lengths = torch.zeros(1, 16, dtype=torch.int32), torch.tensor([10 * block_size], dtype=torch.int32)
    with compiling(90) as found:
        attention_decode(q, cache.k, cache.v, table, lengths, **options, splits=4, kernels="triton")
    assert [x.name for x in found] == ["_attend", "_merge"]
    for (name, _, kernel), needed in zip(found, (wanted, {r"LDG\.E\.128": 4}), strict=True):
        (tmp_path / name).write_bytes(kernel.asm["cubin"])
        (code,) = sass.disassemble(tmp_path / name, sass.kernels(tmp_path / name))
        assert not sass.memory_faults(code)
        for pattern, least in needed.items():
            assert code.count(pattern) >= least, pattern
    assert found[0].kernel.metadata.shared >= 64 * 1024  # two tiles of keys and values
