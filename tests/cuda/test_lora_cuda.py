"""Batches that mix LoRA adapters, in CUDA C++: bgmv and sgmv against the definition in float64, gradients included.

On the CPU model, and where there is a GPU there too. The checked model must have nothing to say under any schedule; its
counters say how many bytes bgmv moves. What a batch is, and how close is close: lora_cases.py.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("cuda._simt", reason="make native builds the kernels")

from cuda import device as device_of
from cuda import lora_ops, modules
from cuda.measure.counters import SECTOR
from tests.cuda import lora_cases, sass
from tests.cuda.lora_cases import BATCHES, DTYPES, TILES, Batch, close, gradients, wanted, wanted_gradients
from tests.cuda.products import DEVICES

OPERATIONS, CASES = lora_cases.operations("cuda"), lora_cases.cases("cuda")
bgmv, sgmv = OPERATIONS.values()
gradients = partial(gradients, kernels="cuda")
SCHEDULES = [("fifo", "eager"), ("reverse", "lazy"), ("random", "random"), ("priority", "lazy"), ("priority", "eager")]
LARGE = Batch(segments=((0, 70), (2, 3), (1, 0), (-1, 4), (0, 65)), ranks=(60, 3, 64), most=64, width=90, out=70)
ODD = Batch(segments=((1, 3), (-1, 2), (0, 90), (1, 7)), ranks=(13, 20), most=20, width=67, out=45)  # no 16 bytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation, batch", CASES.values(), ids=CASES)
def test_equals_the_definition(operation, batch, device):
    a = replace(batch, device=device).arrays()
    want, y, before = wanted(a), a["y"], a["y"].double()
    close(operation(a, check=True), want)
    assert operation(a, y=y, check=True) is y
    close(y, before + want)
    assert torch.equal(y[a["indices"] < 0].double(), before[a["indices"] < 0])


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_and_addresses_that_are_no_multiple_of_16_bytes(operation, dtype):
    a = replace(ODD, dtype=dtype).arrays()
    close(operation(a), wanted(a))
    a = replace(ODD, dtype=dtype, most=24, width=72, out=40, padding=0.0).arrays()
    shifted = {"x": a["x"][..., 1:65], "a_pool": a["a_pool"][..., 1:65], "b_pool": a["b_pool"][..., 1:21]}
    shifted["a_pool"] = shifted["a_pool"][:, :20]
    with device_of.model("_simt_checked"):  # which refuses 16 bytes that do not start at a multiple of 16
        close(operation(a | shifted), wanted(a | shifted))


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("batch", [LARGE, ODD, Batch(width=64, out=48)], ids=["large", "odd", "even"])
def test_any_strides(operation, batch):
    """Pools whose ranks lie side by side in A, and columns in B; then gaps in every dimension."""
    a = batch.arrays()
    names, want = ("x", "a_pool", "b_pool"), wanted(a)
    close(operation(a | {name: a[name].mT.contiguous().mT for name in names}), want)
    y = torch.zeros_like(a["y"]).mT.contiguous().mT
    operation(a, y=y)
    close(y, want)

    def apart(x):
        wide = torch.full([3 * n for n in x.shape], math.nan, dtype=x.dtype)
        view = wide[tuple(slice(None, None, 3) for _ in x.shape)]
        return view.copy_(x)

    close(operation(a | {name: apart(a[name]) for name in names}), want)
    same = a["x"][:1].expand_as(a["x"])
    close(operation(a | {"x": same}), wanted(a | {"x": same}))


@pytest.mark.parametrize("device", DEVICES)
def test_places_beyond_32_bits(device):
    """Rows and adapters more than 2^31 elements apart, in memory of which hardly any page is touched."""
    apart, near = 2**31 + 64, 2**20
    everything = torch.empty(apart + 4 * near, dtype=torch.bfloat16, device=device)
    a = Batch(segments=((1, 2),), ranks=(8, 13), most=16, width=72, out=40, device=device).arrays()
    for i, name in enumerate(("x", "a_pool", "b_pool", "y")):
        near_by = (a[name].shape[-1], 1) if a[name].ndim == 3 else (1,)
        far = everything.as_strided(a[name].shape, (apart, *near_by), i * near)
        a[name] = far.copy_(a[name])
    want, before = wanted(a), a["y"].double()
    for operation in OPERATIONS.values():
        close(operation(a), want)
        a["y"].copy_(before)
        close(operation(a, y=a["y"]), before + want)
    leaves = {name: a[name].detach().requires_grad_() for name in ("x", "a_pool", "b_pool")}
    grads = torch.autograd.grad(sgmv(a | leaves), leaves.values(), lora_cases.gradient_of_y(a))
    for mine, wish in zip(grads, wanted_gradients(a), strict=True):
        close(mine, wish)


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
    assert sgmv(Batch(segments=(), width=9, out=7).arrays()).shape == (0, 7)


@pytest.mark.parametrize("rows", [1, 40])
def test_many_segments(rows):
    """A block finds its tile by a search: with 1 to 1100 segments, of which most are empty, long or none."""
    for count in (1, 2, 31, 33, 1100):
        lengths = [rows * (i % 7 == 3) + (i % 5 == 0) for i in range(count)]
        segments = tuple((i % 4 - 1, n) for i, n in enumerate(lengths))
        a = Batch(segments=segments, ranks=(3, 8, 5), most=8, width=16, out=8).arrays()
        close(sgmv(a), wanted(a))


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_nan_stays_in_its_row_and_an_adapter_with_its_rows(operation):
    a = Batch(segments=((1, 3), (0, 3), (4, 2))).arrays()
    a["x"][4, 77] = math.nan
    a["b_pool"][4, 5, 2] = math.inf
    got = operation(a)
    assert got[4].isnan().all() and not got[[0, 1, 2, 3, 5]].isnan().any()
    assert not got[6:, 5].isfinite().any() and got[6:, :5].isfinite().all() and got[6:, 6:].isfinite().all()


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_rows_without_an_adapter_are_left_alone(operation):
    """Adding 0 would make a 0 of -0."""
    a = Batch(segments=((1, 2), (-1, 3), (3, 2)), width=40, out=30).arrays()  # adapter 3 is of rank 0
    y = torch.full_like(a["y"], -0.0)
    operation(a, y=y)
    assert y[2:].signbit().all() and (y[:2] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype):
    a = Batch(segments=((0, 4), (1, 5), (4, 1)), width=1100, dtype=dtype).arrays()
    whole = bgmv(a)
    assert torch.equal(bgmv(a), whole)
    for i in (0, 5, 9):
        assert torch.equal(bgmv(a | {"x": a["x"][i : i + 1], "indices": a["indices"][i : i + 1]}), whole[i : i + 1])


def test_what_lies_between_is_not_rounded():
    """Neither x A^T of bfloat16 that cancel, small or large, nor, in bgmv, one that float16 cannot hold."""
    a = Batch(segments=((0, 2),), width=64, out=8, ranks=(16,), most=16).arrays()
    a["b_pool"][0, :, 1], a["a_pool"][0, 1] = -a["b_pool"][0, :, 0], a["a_pool"][0, 0]
    a["a_pool"][0, 1, 0] += 2.0**-6
    for operation in OPERATIONS.values():
        close(operation(a), wanted(a))
        close(operation(a | {"x": a["x"] * 1e6}), wanted(a | {"x": a["x"] * 1e6}))
    a = Batch(segments=((0, 2),), width=64, out=8, ranks=(16,), most=16, dtype=torch.float16).arrays()
    a["x"], a["a_pool"], a["b_pool"] = a["x"] * 1e4, a["a_pool"] * 8, a["b_pool"] * 1e-3
    assert (a["x"].double() @ a["a_pool"][0].double().T).abs().max() > 65504
    close(bgmv(a), wanted(a))


def test_what_float16_cannot_hold_is_infinite_in_sgmv():
    """And not a NaN: what is left of infinity for the second number is none."""
    a = Batch(segments=((0, 2),), width=64, out=8, ranks=(1,), most=1, dtype=torch.float16).arrays()
    a["x"], a["a_pool"] = a["x"].sign() * 1e3, a["a_pool"].abs() * 1e2
    a["x"][1], a["a_pool"][0] = 1e3, 2.0
    got = sgmv(a)
    assert got[1].isinf().all() and torch.equal(got[1].sign(), a["b_pool"][0, :, 0].sign())


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mixed", "full ranks", "rank 200", "tiles", "large", "odd"])
def test_gradients(name, dtype, device):
    batch = BATCHES | {"tiles": TILES, "large": LARGE, "odd": ODD}
    batch = replace(batch[name], dtype=dtype, device=device, width=90 if name != "odd" else 67)
    a = batch.arrays()
    for mine, wish in zip(gradients(a), wanted_gradients(a), strict=True):
        assert mine.dtype == dtype
        close(mine, wish)


def test_gradients_come_alone_and_with_the_same_bits():
    a = Batch(width=40, out=30).arrays()
    together = gradients(a)
    for i, name in enumerate(("x", "a_pool", "b_pool")):
        assert torch.equal(gradients(a, (name,))[0], together[i])
    without = gradients(replace(Batch(width=40, out=30), padding=0.0).arrays())
    for mine, wish in zip(without, together, strict=True):
        assert torch.equal(mine, wish)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_of_x_stays_in_its_column_and_below_the_rank(dtype):
    a = Batch(segments=((4, 3), (1, 2)), width=40, out=30, dtype=dtype).arrays()
    a["x"][1, 7] = math.nan
    (grad,) = gradients(a, ("a_pool",))
    assert grad[4, :13, 7].isnan().all() and (grad[4, 13:] == 0).all()
    assert not grad[:, :, [*range(7), *range(8, 40)]].isnan().any() and not grad[1].isnan().any()


def test_gradients_of_adapters_without_rows_are_zero():
    a = Batch(segments=((1, 3), (2, 0)), width=40, out=30).arrays()
    for grad in gradients(a)[1:]:
        assert (grad[[0, 2, 3, 4]] == 0).all() and (grad[1] != 0).any()
    nobody = Batch(segments=((0, 0),), width=9, out=7).arrays()
    assert all((grad == 0).all() for grad in gradients(nobody))


def test_no_second_gradient():
    a = Batch(segments=((0, 2),), width=9, out=7).arrays()
    x = a["x"].clone().requires_grad_()
    y = sgmv(a | {"x": x})
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="lora_sgmv has no second gradient"):
        dx.sum().backward()


# ---- the checked model -----------------------------------------------------------------------------------------------


def everything(a: dict) -> list[torch.Tensor]:
    return [bgmv(a), sgmv(a), *gradients(a), bgmv(a, y=a["y"].clone()), sgmv(a, y=a["y"].clone())]


@pytest.mark.parametrize("order, async_", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_reports_under_any_schedule(order, async_, dtype):
    few = Batch(segments=((1, 3), (0, 0), (-1, 2), (0, 5), (3, 1)), width=136, out=72)
    tiles = Batch(segments=((1, 3), (2, 66)), width=72, out=72, ranks=(3, 16, 70), most=72)
    for batch in (few, tiles, replace(ODD, segments=((1, 3), (-1, 2), (0, 50)), out=30)):
        a = replace(batch, dtype=dtype).arrays()
        with device_of.model("_simt_checked") as module, module.options(order=order, async_=async_, seed=3):
            got = everything(a)
        y = a["y"].double()
        wish = [wanted(a), wanted(a), *wanted_gradients(a), y + wanted(a), y + wanted(a)]
        for mine, want in zip(got, wish, strict=True):
            close(mine, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_whoever_comes_first(dtype):
    module, a = modules.load("_simt"), replace(LARGE, dtype=dtype).arrays()
    first = everything(a)
    for order, async_ in SCHEDULES:
        with module.options(order=order, async_=async_, seed=5):
            assert all(torch.equal(mine, wish) for mine, wish in zip(everything(a), first, strict=True))


def moved(call) -> tuple[int, int]:
    """Bytes read from and written to global memory, in sectors of 32."""
    module = modules.load("_simt_checked")
    module.take_counters()
    with device_of.model("_simt_checked"), module.options(counters=True):
        call()
    rows = module.take_counters()
    read, written = (sum(r["actual"] for r in rows if r["kind"] == f"global {k}") * SECTOR for k in ("read", "write"))
    return read, written


@pytest.mark.parametrize("rank, width", [(8, 1024), (16, 4096), (64, 4096)])
def test_bgmv_moves_little_more_than_it_must(rank, width):
    """Exactly: what crosses L2 beside A, B, x and y is x once more for every 16 ranks but the first, and x A^T."""
    rows, parts = 2, width // 512
    a = Batch(segments=((0, 1), (1, 1)), ranks=(rank, rank), most=rank, width=width, out=width).arrays()
    a |= {name: a[name].contiguous() for name in ("x", "a_pool", "b_pool", "y")}
    read, written = moved(lambda: bgmv(a))
    weights, x, y = rows * 2 * rank * 2 * width, rows * 2 * width, rows * 2 * width
    blocks_of_shrink, blocks_of_expand = rows * parts * math.ceil(rank / 16), rows * 2 * rank * width // 2**14
    between = blocks_of_expand * 4 * rank * parts
    small = SECTOR * 4 * (2 * blocks_of_shrink + 3 * blocks_of_expand)  # a warp: adapter, rank, and scale
    assert read == weights + math.ceil(rank / 16) * x + between + small
    assert written == y + 2 * 4 * rows * parts * rank  # a warp writes half a sector of x A^T
    assert (weights + x + y) / (read + written) > {8: 0.95, 16: 0.95, 64: 0.89}[rank]


# ---- in torch, and what it refuses -----------------------------------------------------------------------------------


def test_opcheck():
    a = Batch(segments=((0, 2), (-1, 1)), width=20, out=12, ranks=(8, 3), most=8, dtype=torch.float32, padding=0.0)
    a = a.arrays()
    pools, rest = [a["x"], a["a_pool"], a["b_pool"]], [a["scales"], a["ranks"]]
    leaves = [x.clone().requires_grad_() for x in pools]
    rows, segments = [a["indices"]], [a["segments"], a["of_segments"]]
    for operation, given in (
        (lora_ops._bgmv, (*pools, *rows, *rest, True, "cuda")),
        (lora_ops._bgmv_add, (a["y"], *pools, *rows, *rest, True, "cuda")),
        (lora_ops._sgmv, (*leaves, *segments, *rest, True, "cuda")),
        (lora_ops._sgmv_add, (a["y"], *pools, *segments, *rest, True, "cuda")),
        (lora_ops._sgmv_backward, (a["y"], *pools, *segments, *rest, [True, False, True], "cuda")),
    ):
        assert set(torch.library.opcheck(operation, given).values()) == {"SUCCESS"}


def test_the_default_is_cuda():
    a = Batch(width=40, out=30).arrays()
    for name, operation in OPERATIONS.items():
        assert torch.equal(getattr(lora_cases, name)(a), operation(a))
        with pytest.raises(ValueError, match="kernels 'rust': expected one of cuda, triton"):
            getattr(lora_cases, name)(a, kernels="rust")


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_values_that_a_kernel_would_follow_are_refused(operation):
    a = Batch(width=40, out=30).arrays()
    before = a["y"].clone()
    for change, message in (
        ({"ranks": a["ranks"] + 24}, r"ranks\[0\] is 48: expected 0 to 24"),
        ({"indices": a["indices"] + 1, "of_segments": a["of_segments"] + 1}, r"indices\[\d+\] is 5: expected -1 to 4"),
        ({"x": a["x"].clone().requires_grad_()}, "x requires a gradient, but "),
    ):
        with pytest.raises(ValueError, match=message):
            operation(a | change, y=a["y"])
    assert torch.equal(a["y"], before)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_y_that_has_an_element_twice_is_refused(operation):
    a = Batch(width=40, out=30).arrays()
    for y in (a["y"][:1].expand_as(a["y"]), a["y"][:, :1].expand_as(a["y"])):
        with pytest.raises(ValueError, match=r"y has strides .*: expected each element once"):
            operation(a, y=y)
    one = replace(Batch(), segments=((0, 1),)).arrays()
    close(operation(one, y=torch.zeros(333, dtype=one["y"].dtype).expand(1, 333)), wanted(one))


def test_the_module_checks_sizes_itself():
    """It is called from Python alone, but a wrong size is a wild write."""
    a = Batch(width=64, out=30).arrays()
    module = modules.load("_simt")
    given = {n: a[n] for n in ("x", "a_pool", "b_pool", "indices", "scales", "ranks", "y")}
    given |= {"workspace": torch.empty(1, 19, 24), "add": False, "stream": 0}
    module.run("lora_bgmv", **given)
    for change, message in (
        ({"workspace": torch.empty(2, 19, 24)}, "workspace: shape .* expected 1 parts"),
        ({"workspace": torch.empty(1, 19, 16)}, r"workspace: shape .* expected \(1, 19, 24\)"),
        ({"y": a["y"][:, 1:]}, r"y: shape \(19, 29\): expected \(19, 30\)"),
        ({"b_pool": a["b_pool"][1:]}, "b_pool: shape"),
        ({"a_pool": a["a_pool"].float()}, "a_pool: is float32: expected bfloat16"),
        ({"scales": a["scales"][1:]}, r"scales: shape \(4,\): expected \(5,\)"),
        ({"ranks": a["ranks"].long()}, "ranks: is int64: expected int32"),
    ):
        with pytest.raises(ValueError, match=message):
            module.run("lora_bgmv", **given | change)
    given["indices"] = a["of_segments"]
    with pytest.raises(ValueError, match="segments: shape .* expected the bounds of 1 to 4096 segments"):
        module.run("lora_sgmv", **given, segments=torch.zeros(1, dtype=torch.int32))


# ---- machine code ----------------------------------------------------------------------------------------------------

PLAN = {  # of bfloat16: instructions that a kernel must have, at least so often
    r"shrink_rowI13__nv_bfloat16Lb1": {r"LDG\.E\.\S*128": 9, "FFMA": 64},
    r"expand_rowI13__nv_bfloat16Lb1": {r"LDG\.E\.\S*128": 8, r"STG\.E\.128": 1},
    r"6shrinkI13__nv_bfloat16": {r"HMMA\.16816\.F32\.BF16": 2, "LDSM": 2, r"LDGSTS\.E\.BYPASS\.\S*128": 2},
    r"6expandI13__nv_bfloat16": {r"HMMA\.16816\.F32\.BF16": 4, "LDSM": 3, r"LDGSTS\.E\.BYPASS\.\S*128": 1},
    r"5outerI13__nv_bfloat16": {r"HMMA\.16816\.F32\.BF16": 4, r"LDSM\.16\.MT88": 3, r"LDGSTS\.E\.BYPASS\.\S*128": 1},
}


def test_machine_code():
    kernels = [kernel for kernel in sass.built_kernels("fused") if "4lora" in kernel.name]
    assert kernels and [fault for kernel in kernels for fault in sass.memory_faults(kernel)] == []
    for pattern, instructions in PLAN.items():
        chosen = [kernel for kernel in kernels if pattern.lstrip("0123456789") in kernel.name]
        assert chosen, pattern
        for kernel in sass.disassemble(sass.MODULE, chosen):
            assert sass.plan_faults(kernel, instructions, 255) == []


def test_a_warp_of_the_shrink_has_all_its_loads_on_their_way():
    chosen = [kernel for kernel in sass.built_kernels("fused") if "shrink_rowI13__nv_bfloat16Lb1" in kernel.name]
    for kernel in sass.disassemble(sass.MODULE, chosen):
        opcodes = [instruction.split()[0] for instruction in kernel.code]
        assert sum(opcode.startswith("LDG") and "128" in opcode for opcode in opcodes[: opcodes.index("FFMA")]) == 9
