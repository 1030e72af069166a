"""Batches that mix LoRA adapters, in Triton: bgmv and sgmv against the definition in float64, gradients included.

What is compiled for Hopper is read at the end. What a batch is, and how close is close: lora_cases.py.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from cuda import lora_ops, triton_lora, triton_lora_gradients
from cuda.triton_compat import compiling
from tests.cuda import lora_cases, sass
from tests.cuda.lora_cases import BATCHES, DTYPES, TILES, Batch, close, definition, wanted
from tests.cuda.products import DEVICES

OPERATIONS, CASES = lora_cases.operations("triton"), lora_cases.cases("triton")
bgmv, sgmv = OPERATIONS.values()
lora_bgmv, lora_sgmv = partial(lora_ops.lora_bgmv, kernels="triton"), partial(lora_ops.lora_sgmv, kernels="triton")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation, batch", CASES.values(), ids=CASES)
def test_equals_the_definition(operation, batch, device):
    a = replace(batch, device=device).arrays()
    want, y, before = wanted(a), a["y"], a["y"].double()
    close(operation(a, check=True), want)
    assert operation(a, y=y, check=True) is y
    close(y, before + want)
    assert torch.equal(y[a["indices"] < 0].double(), before[a["indices"] < 0])


def test_the_reference_is_the_definition():
    a = Batch(dtype=torch.float64).arrays()
    names = ("x", "a_pool", "b_pool", "indices", "scales", "ranks")
    torch.testing.assert_close(triton_lora.reference(*(a[name] for name in names)), wanted(a), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_without_ranks_padding_counts(operation):
    for padding in (0.0, 0.5):
        a = Batch(segments=((1, 2), (4, 3)), padding=padding).arrays() | {"ranks": None}
        close(operation(a), wanted(a))


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("rows, width, out", [(0, 9, 7), (3, 0, 7), (3, 9, 0)])
def test_empty(operation, rows, width, out):
    a = Batch(segments=((0, rows),), width=width, out=out, ranks=(4,), most=8).arrays()
    before = a["y"].clone()
    assert torch.equal(operation(a), torch.zeros(rows, out, dtype=a["x"].dtype))
    assert torch.equal(operation(a, y=a["y"]), before)


def test_no_segments():
    a = Batch(segments=(), width=9, out=7).arrays()
    assert sgmv(a).shape == (0, 7)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_any_strides(operation):
    a = Batch(width=65, out=40).arrays()
    want = operation(a)
    turned = {name: a[name].mT.contiguous().mT for name in ("x", "a_pool", "b_pool")}
    close(operation(a | turned), wanted(a))
    y = torch.zeros_like(want).mT.contiguous().mT
    operation(a, y=y)
    assert torch.equal(y, want)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_nan_stays_in_its_row_and_an_adapter_with_its_rows(operation):
    a = Batch(segments=((1, 3), (0, 3), (4, 2))).arrays()
    a["x"][4, 77] = math.nan
    a["b_pool"][4, 5, 2] = math.inf
    got = operation(a)
    assert got[4].isnan().all() and not got[[0, 1, 2, 3, 5]].isnan().any()
    assert not got[6:, 5].isfinite().any() and got[6:, :5].isfinite().all() and got[6:, 6:].isfinite().all()


def test_a_row_does_not_depend_on_its_batch():
    a = Batch(segments=((0, 4), (1, 5), (4, 1))).arrays()
    whole = bgmv(a)
    for i in (0, 5, 9):
        assert torch.equal(bgmv(a | {"x": a["x"][i : i + 1], "indices": a["indices"][i : i + 1]}), whole[i : i + 1])


def test_what_lies_between_is_not_rounded():
    """Neither x A^T of bfloat16 that cancel, nor, in bgmv, one that float16 cannot hold."""
    a = Batch(segments=((0, 2),), width=64, out=8, ranks=(16,), most=16, dtype=torch.bfloat16).arrays()
    a["b_pool"][0, :, 1], a["a_pool"][0, 1] = -a["b_pool"][0, :, 0], a["a_pool"][0, 0]
    a["a_pool"][0, 1, 0] += 2.0**-6
    for operation in OPERATIONS.values():
        close(operation(a), wanted(a))
    a = Batch(segments=((0, 2),), width=64, out=8, ranks=(16,), most=16, dtype=torch.float16).arrays()
    a["x"], a["a_pool"], a["b_pool"] = a["x"] * 1e4, a["a_pool"] * 8, a["b_pool"] * 1e-3
    assert (a["x"].double() @ a["a_pool"][0].double().T).abs().max() > 65504
    close(bgmv(a), wanted(a))


def test_what_lies_between_may_be_large():
    """And still cancel: bfloat16 goes to 3e38, where float16 would be infinite."""
    a = Batch(segments=((0, 2),), width=64, out=8, ranks=(16,), most=16, dtype=torch.bfloat16).arrays()
    a["b_pool"][0, :, 1], a["a_pool"][0, 1] = -a["b_pool"][0, :, 0], a["a_pool"][0, 0]
    a["a_pool"][0, 1, 0] += 2.0**-6
    a["x"] *= 1e6
    for operation in OPERATIONS.values():
        close(operation(a), wanted(a))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch", [BATCHES["mixed"], BATCHES["full ranks"], TILES], ids=["mixed", "full ranks", "tiles"]
)
def test_gradients(batch, dtype, device):
    batch = replace(batch, dtype=dtype, device=device, padding=0.0, width=90, out=70)
    a = batch.arrays()
    leaves = [a[n].clone().requires_grad_() for n in ("x", "a_pool", "b_pool")]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dy = torch.randn(a["y"].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    want = torch.autograd.grad(definition(*exact, a["indices"], a["scales"].double()), exact, dy.double())
    for i, rank in enumerate(batch.ranks):
        want[1][i, rank:], want[2][i, :, rank:] = 0.0, 0.0
    given = (a["segments"], a["of_segments"], a["scales"], a["ranks"])
    got = torch.autograd.grad(lora_sgmv(*leaves, *given), leaves, dy)
    for mine, wish, leaf in zip(got, want, leaves, strict=True):
        close(mine, wish)
        assert mine.dtype == leaf.dtype


def test_gradients_come_alone_and_with_the_same_bits():
    a = Batch(width=40, out=30, padding=0.0).arrays()
    given = (a["segments"], a["of_segments"], a["scales"], a["ranks"])

    def gradients(*which):
        leaves = [a[n].clone().requires_grad_(n in which) for n in ("x", "a_pool", "b_pool")]
        dy = torch.ones((), dtype=torch.bfloat16).expand(19, 30)  # as the gradient of a sum is
        return torch.autograd.grad(lora_sgmv(*leaves, *given), [x for x in leaves if x.requires_grad], dy)

    together = gradients("x", "a_pool", "b_pool")
    for i, name in enumerate(("x", "a_pool", "b_pool")):
        assert torch.equal(gradients(name)[0], together[i])


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_many_rows_are_summed_in_parts(device, monkeypatch):
    """Of adapter 2 in three segments; with more multiprocessors than tiles of the gradient, and with fewer."""
    batch = Batch(segments=((2, 70), (0, 3), (2, 1), (-1, 66), (2, 380)), width=40, out=30, ranks=(8, 8, 5), most=8)
    a = replace(batch, padding=0.0, dtype=torch.float32, device=device).arrays()
    dy = torch.randn(a["y"].shape, generator=torch.Generator().manual_seed(1)).to(device)
    given = (a["segments"], a["of_segments"], a["scales"], a["ranks"])
    parts, run = [], triton_lora_gradients._outer.run
    monkeypatch.setattr(
        triton_lora_gradients._outer,
        "run",
        lambda *x, grid, **more: parts.append(grid[2]) or run(*x, grid=grid, **more),
    )
    exact = [a[n].double().requires_grad_() for n in ("x", "a_pool", "b_pool")]
    want = torch.autograd.grad(definition(*exact, a["indices"], a["scales"].double()), exact, dy.double())
    want[1][2, 5:], want[2][2, :, 5:] = 0.0, 0.0
    for multiprocessors in (1, 30):

        class Plan(triton_lora.Plan):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                self.multiprocessors = multiprocessors  # noqa: B023

        monkeypatch.setattr(triton_lora_gradients, "Plan", Plan)
        leaves = [a[n].clone().requires_grad_() for n in ("x", "a_pool", "b_pool")]
        for mine, wish in zip(torch.autograd.grad(lora_sgmv(*leaves, *given), leaves, dy), want, strict=True):
            close(mine, wish)
    assert parts[:2] == [1, 1] and min(parts[2:]) > 1


def test_the_reference_of_gradients_is_the_definition():
    x, a, b, dy = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 7), (3, 7), (4, 3), (5, 4)))
    want = torch.autograd.grad(0.5 * (x @ a.T) @ b.T, (x, a, b), dy)
    for got, wish in zip(triton_lora_gradients.reference(dy, x, a, b, 0.5), want, strict=True):
        torch.testing.assert_close(got, wish)


def test_gradients_of_nothing():
    a = Batch(segments=((0, 0),), width=9, out=7).arrays()
    leaves = [a[n].clone().requires_grad_() for n in ("x", "a_pool", "b_pool")]
    lora_sgmv(*leaves, a["segments"], a["of_segments"], a["scales"]).sum().backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


def test_no_second_gradient():
    a = Batch(segments=((0, 2),), width=9, out=7, padding=0.0).arrays()
    x = a["x"].clone().requires_grad_()
    y = sgmv(a | {"x": x})
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="lora_sgmv has no second gradient"):
        dx.sum().backward()


# ---- in torch --------------------------------------------------------------------------------------------------------


def test_opcheck():
    a = Batch(segments=((0, 2), (-1, 1)), width=20, out=12, ranks=(8, 3), most=8, dtype=torch.float32, padding=0.0)
    a = a.arrays()
    pools, rest = [a["x"], a["a_pool"], a["b_pool"]], [a["scales"], a["ranks"]]
    leaves = [x.clone().requires_grad_() for x in pools]
    rows, segments = [a["indices"]], [a["segments"], a["of_segments"]]
    for operation, given in (
        (lora_ops._bgmv, (*pools, *rows, *rest, True, "triton")),
        (lora_ops._bgmv_add, (a["y"], *pools, *rows, *rest, True, "triton")),
        (lora_ops._sgmv, (*leaves, *segments, *rest, True, "triton")),
        (lora_ops._sgmv_add, (a["y"], *pools, *segments, *rest, True, "triton")),
        (lora_ops._sgmv_backward, (a["y"], *pools, *segments, *rest, [True, False, True], "triton")),
    ):
        assert set(torch.library.opcheck(operation, given).values()) == {"SUCCESS"}


# ---- what it refuses -------------------------------------------------------------------------------------------------


def put(index, value):
    def change(x):
        x = x.clone()
        x[index] = value
        return x

    return change


BAD = {
    "type": ("both", {"x": lambda x: x.double()}, "x is torch.float64: expected one of"),
    "types differ": ("both", {"b_pool": lambda x: x.half()}, "b_pool is torch.float16: expected torch.bfloat16"),
    "dimensions": ("both", {"x": lambda x: x[0]}, r"x has shape \(600,\): expected 2 dimensions"),
    "width of A": ("both", {"a_pool": lambda x: x[..., 1:]}, r"a_pool has shape .*599\): expected \(5, 24, 600\)"),
    "rank of B": ("both", {"b_pool": lambda x: x[..., 1:]}, r"b_pool has shape .*23\): expected \(5, 333, 24\)"),
    "adapters of B": ("both", {"b_pool": lambda x: x[1:]}, r"b_pool has shape \(4, .*: expected \(5, 333, 24\)"),
    "no rank": ("both", {"a_pool": lambda x: x[:, :0]}, "a_pool has a rank of 0: expected 1 to 256"),
    "scales": ("both", {"scales": lambda x: x[1:]}, r"scales has shape \(4,\): expected \(5,\)"),
    "scales' type": ("both", {"scales": lambda x: x.double()}, "scales is torch.float64: expected torch.float32"),
    "ranks' type": ("both", {"ranks": lambda x: x.long()}, "ranks is torch.int64: expected torch.int32"),
    "a rank": ("both", {"ranks": put(1, 25)}, r"ranks\[1\] is 25: expected 0 to 24"),
    "a negative rank": ("both", {"ranks": put(2, -1)}, r"ranks\[2\] is -1: expected 0 to 24"),
    "device": ("both", {"scales": lambda x: x.to("meta")}, "scales is on meta, x on cpu: expected one device"),
    "indices' type": ("bgmv", {"indices": lambda x: x.long()}, "indices is torch.int64: expected torch.int32"),
    "rows": ("bgmv", {"indices": lambda x: x[1:]}, r"indices has shape \(18,\): expected \(19,\)"),
    "unknown adapter": ("bgmv", {"indices": put(7, 5)}, r"indices\[7\] is 5: expected -1 to 4, an adapter of the pool"),
    "adapter -2": ("bgmv", {"indices": put(0, -2)}, r"indices\[0\] is -2: expected -1 to 4"),
    "adapter of a segment": ("sgmv", {"of_segments": put(6, 5)}, r"indices\[6\] is 5: expected -1 to 4"),
    "segments": ("sgmv", {"segments": lambda x: x[1:]}, r"segments has shape \(7,\): expected \(8,\)"),
    "falling": ("sgmv", {"segments": put(2, 2)}, r"segments\[2\] is 2: expected 3 or more, as segments\[1\]"),
    "not all rows": ("sgmv", {"segments": put(7, 18)}, "segments go from 0 to 18: expected 0 to 19"),
    "not from 0": ("sgmv", {"segments": put(0, 1)}, "segments go from 1 to 19: expected 0 to 19"),
    "many segments": (
        "sgmv",
        {"segments": lambda x: x.new_zeros(4098), "of_segments": lambda x: x.new_zeros(4097)},
        "indices has 4097 segments: expected at most 4096; sort rows by adapter",
    ),
    "gradient of scales": ("both", {"scales": lambda x: x.requires_grad_()}, "scales requires a gradient"),
    "gradient of x": ("bgmv", {"x": lambda x: x.requires_grad_()}, "x requires a gradient, but lora_bgmv is for inf"),
}


@pytest.mark.parametrize("which, changes, message", BAD.values(), ids=BAD)
def test_refused(which, changes, message):
    a = Batch().arrays()
    a |= {name: change(a[name].clone()) for name, change in changes.items()}
    for name, operation in OPERATIONS.items():
        if which in (name, "both"):
            with pytest.raises(ValueError, match=message):
                operation(a)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_bad_y_is_refused_and_left_alone(operation):
    a = Batch().arrays()
    for y, message in (
        (a["y"][:, 1:], r"y has shape \(19, 332\): expected \(19, 333\)"),
        (a["y"].float(), "y is torch.float32: expected torch.bfloat16"),
        (a["y"].clone().requires_grad_(), "y requires a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            operation(a, y=y)
    before = a["y"].clone()
    with pytest.raises(ValueError, match="ranks"):
        operation(a | {"ranks": a["ranks"] + 100}, y=a["y"])
    assert torch.equal(a["y"], before)
    with pytest.raises(ValueError, match="x requires a gradient, but "):
        operation(a | {"x": a["x"].clone().requires_grad_()}, y=a["y"])
    with torch.no_grad():
        operation(a | {"x": a["x"].clone().requires_grad_()}, y=a["y"])


# ---- machine code ----------------------------------------------------------------------------------------------------


def zeros(rows, width, out, most, segments=0):
    pools = (torch.zeros(s, dtype=torch.bfloat16) for s in ((rows, width), (4, most, width), (4, out, most)))
    small = (torch.ones(4), torch.ones(4, dtype=torch.int32))
    starts = (torch.arange(segments + 1, dtype=torch.int32) * (rows // segments),) if segments else ()
    return *pools, *starts, torch.zeros(segments or rows, dtype=torch.int32), *small


MACHINE_CODE = {
    "bgmv, rank 16": (lambda y: lora_bgmv(*zeros(4, 2048, 1024, 16), y=y), 4, [r"LDG\.E\.128"] * 2),
    "bgmv, rank 8": (lambda y: lora_bgmv(*zeros(4, 2048, 1024, 8), y=y), 4, [r"LDG\.E\.128"] * 2),
    "sgmv, rank 16": (lambda y: lora_sgmv(*zeros(512, 512, 1024, 16, 4), y=y), 512, ["HGMMA"] * 2),
    "sgmv, rank 64, few rows": (lambda y: lora_sgmv(*zeros(64, 512, 1024, 64, 4), y=y), 64, [r"HMMA\.16816"] * 2),
    "gradients": (
        lambda y: lora_ops._sgmv_backward(y, *zeros(512, 512, 1024, 16, 4), [True] * 3, "triton"),
        512,
        ["HGMMA", "HGMMA", r"HMMA\.16816", "FADD", "HGMMA", r"HMMA\.16816", "FADD"],
    ),
}


@pytest.mark.skipif(bool(sass.missing("cuobjdump", "nvdisasm")), reason="no cuobjdump and nvdisasm")
def test_large_ranks_in_float32_do_not_spill(tmp_path):
    x, a, b = (torch.zeros(s) for s in ((64, 512), (1, 256, 512), (1, 512, 256)))
    starts, ids = torch.tensor([0, 64], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with compiling(90) as found:
        lora_sgmv(x, a, b, starts, ids, torch.ones(1))
    for name, _, kernel in found:
        (tmp_path / name).write_bytes(kernel.asm["cubin"])
        (code,) = sass.disassemble(tmp_path / name, sass.kernels(tmp_path / name))
        assert not sass.memory_faults(code), name


@pytest.mark.skipif(bool(sass.missing("cuobjdump", "nvdisasm")), reason="no cuobjdump and nvdisasm")
@pytest.mark.parametrize("call, rows, patterns", MACHINE_CODE.values(), ids=MACHINE_CODE)
def test_machine_code(call, rows, patterns, tmp_path):
    with compiling(90) as found:
        call(torch.zeros(rows, 1024, dtype=torch.bfloat16))
    for (name, _, kernel), pattern in zip(found, patterns, strict=True):
        (tmp_path / name).write_bytes(kernel.asm["cubin"])
        (code,) = sass.disassemble(tmp_path / name, sass.kernels(tmp_path / name))
        assert not sass.memory_faults(code)
        assert code.count(pattern) >= 2, name
        assert code.count(r"LDG\.E\.U16") == 0, f"{name}: loads of 2 bytes"
        assert code.count(r"LDG\.E\.128|LDGSTS\.E\.BYPASS\.128") >= 4, name
        assert code.count(r"STG\.E\.U16") == 0, f"{name}: stores of 2 bytes"
