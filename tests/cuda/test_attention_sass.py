"""The machine code of attention and of the fused operations is what their steps say, without a GPU.

It is that of cuda/_sm90 as `make native` built it. Each step has the instructions that it is about, no register of any
kernel lives in memory, ptxas put no waits between wgmmas, and where a step says that exponentials are computed beside a
product, they are.
"""

import functools
import re
from collections import Counter

import pytest

from tests.cuda import sass

STEPS = {
    ladder: sorted({path.name[:2] for path in (sass.ROOT / "cuda/attention" / ladder).glob("[0-9][0-9]_*.cu")})
    for ladder in ("forward", "backward")
}
FUSED = sorted(path.name for path in (sass.ROOT / "cuda/fused").glob("*.cu"))
# The shape of the last forward steps: head width, consumers, keys of a tile.
BEST = re.compile(r"best6attendINS\d_5ShapeINS\d_\d+(?:Persistent08|Best09)E13__nv_bfloat16Li(\d+)ELi(\d)ELi(\d+)E")

# What kernels of a step for bf16 must have, at least so often, and the registers of a thread that their plan allows. n
# is the head width. A left operand of wgmma is in shared memory (SHARED) or in registers (REGISTERS).
SHARED, REGISTERS = r"x16\.F32\.BF16 R\d+, gdesc", r"x16\.F32\.BF16 R\d+, R\d+, gdesc"
MMA_SYNC = {r"HMMA\.16816\.F32\.BF16": 64, r"LDSM\.16\.M": 16, r"LDGSTS\.E\.BYPASS\.128": 8}
WARPGROUP = {r"UTMALDG\.4D": 3, r"WARPGROUP\.ARRIVE": 2}
PRODUCER = WARPGROUP | {"USETMAXREG": 2}
ADDED_BY_TMA = PRODUCER | {r"UBLKRED\.G\.S\.ADD\.F32": 1, r"STSM\.16": 4}
ALL_WIDTHS = ("05", "08", "09")  # steps of which all head widths are read: their tiles depend on it


def wgmmas(n: int, left: str, count: int) -> Counter[str]:
    return Counter({rf"HGMMA\.64x{n}{left}": count})


def forward_plan(step: str, n: int) -> tuple[dict[str, int], int]:
    if step == "01":
        return {"FFMA": 4}, 64
    if step == "02":
        return {"FFMA": 128, r"LDS\.128": 4}, 128
    if step == "03":
        return MMA_SYNC, 255
    products = wgmmas(128, SHARED, n // 16) + wgmmas(n, REGISTERS, 128 // 16)
    return (WARPGROUP | products, 255) if step == "04" else (PRODUCER | products, 168)


def backward_plan(step: str, n: int) -> tuple[dict[str, int], int]:
    if step == "01":
        return {"FFMA": 128}, 128
    if step == "02":
        return MMA_SYNC | {r"LDSM\.16\.MT": 16, r"REDG\.E\.ADD\.F32": 16}, 255
    queries = 128 if n == 64 else 64
    scores, dq, along = wgmmas(queries, SHARED, 2 * n // 16), wgmmas(64, SHARED, 128 // 16), queries // 16
    if step == "03":
        added = {r"(?:ATOMG|REDG)\.E\.ADD\.F32": 32, r"STSM\.16": 4}
        return WARPGROUP | added | (scores + dq + wgmmas(n, REGISTERS, 2 * along)), 255
    if step == "04":
        return ADDED_BY_TMA | (scores + dq + wgmmas(n, REGISTERS, along) + wgmmas(n, SHARED, along)), 168
    if n > 128:  # rows = columns of the head; at 192 three consumers of 160 registers
        return ADDED_BY_TMA | wgmmas(32, SHARED, 2 * n // 16), 128 if n == 192 else 168
    return ADDED_BY_TMA | (scores + dq + wgmmas(n, SHARED, 2 * along)), 168


def head_dim(kernel: sass.Kernel) -> int:
    """The first number of a kernel's template; 64 where it takes any."""
    match = re.search(r"Li(\d+)E", kernel.name)
    return int(match[1]) if match else 64


def exponentials_beside_products(kernel: sass.Kernel) -> int:
    """How many exponentials stand where wgmmas have been issued and not been waited for, in the order of addresses."""
    groups = found = 0
    for instruction in kernel.code:
        if instruction.startswith("HGMMA"):
            groups += instruction.endswith("gsb0")  # the last one of a group
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", instruction):
            groups = min(groups, int(wait[1]))
        elif instruction.startswith("MUFU.EX2"):
            found += groups > 0
    return found


@pytest.fixture(scope="module")
def built() -> list[sass.Kernel]:
    """All kernels of the module, without their instructions."""
    return sass.built_kernels("forward", "backward", "attention", "fused")


@pytest.fixture(scope="module")
def read(built):
    """read(ladder, step, pattern): the kernels for bf16, or for all types, with their instructions. Only those whose
    names have the pattern in them, and few head widths: reading one takes part of a second."""

    @functools.cache
    def read(ladder: str, step: str, pattern: str = ".") -> list[sass.Kernel]:
        chosen = [
            kernel
            for kernel in built
            if (kernel.ladder, kernel.step) == (ladder, step)
            and "6__half" not in kernel.name
            and (ladder == "fused" or step in ALL_WIDTHS or head_dim(kernel) in (64, 128, 256))
            and re.search(pattern, kernel.name)
        ]
        return sass.disassemble(sass.MODULE, chosen)

    return read


def faults_of(kernels, plan) -> list[str]:
    return [fault for kernel in kernels for fault in sass.plan_faults(kernel, *plan(kernel))]


def test_every_step_is_in_the_module(built):
    for ladder, steps in STEPS.items():
        assert sorted({kernel.step for kernel in built if kernel.ladder == ladder} - {""}) == steps
    names = [kernel.name for kernel in built if kernel.ladder == "fused"]
    for source in FUSED:
        assert any(source.replace(".", "_") in name for name in names), source


def test_no_kernel_keeps_registers_in_memory(built):
    assert [fault for kernel in built for fault in sass.memory_faults(kernel)] == []


@pytest.mark.parametrize("step", [step for step in STEPS["forward"] if step < "08"])
def test_a_forward_step_is_made_of_its_instructions(read, step):
    kernels = read("forward", step)
    assert len(kernels) >= 2
    assert faults_of(kernels, lambda kernel: forward_plan(step, head_dim(kernel))) == []


@pytest.mark.parametrize("step", [step for step in STEPS["forward"] if step >= "08"])
def test_the_last_forward_steps_are_made_of_their_instructions(read, step):
    """Each shape: scores as wide as a tile of keys, outputs by TMA, registers for all threads."""
    shapes = {kernel: tuple(map(int, BEST.search(kernel.name).groups())) for kernel in read("forward", step)}
    assert sorted(n for n, _, _ in shapes.values()) == [64, 96, 128, 192, 256]

    def plan(kernel: sass.Kernel) -> tuple[dict[str, int], int]:
        n, consumers, keys = shapes[kernel]
        products = wgmmas(keys, SHARED, n // 16) + wgmmas(n, REGISTERS, keys // 16)
        return PRODUCER | products | {r"STSM\.16": 2, r"UTMASTG\.4D": 1}, {2: 168, 3: 128}[consumers]

    assert faults_of(shapes, plan) == []


@pytest.mark.parametrize("step", STEPS["backward"])
def test_a_backward_step_is_made_of_its_instructions(read, step):
    kernels = read("backward", step)
    products = [kernel for kernel in kernels if "convert" not in kernel.name]
    assert products
    assert faults_of(products, lambda kernel: backward_plan(step, head_dim(kernel))) == []


def test_exponentials_are_computed_beside_products(read):
    """ptxas may move a wait for wgmmas up. Then all is as right as before, and the exponentials come after it."""
    found = {}
    for step in ("07", "08", "09"):
        for kernel in read("forward", step):
            shape = BEST.search(kernel.name)
            keys = int(shape[3]) if shape else 128  # half of them a thread; in 09 some are polynomials
            found[kernel.name] = exponentials_beside_products(kernel) / (keys // 2)
    for kernel in read("backward", "05"):
        scores = 64 * 128 if head_dim(kernel) == 64 else 64 * 64 if head_dim(kernel) <= 128 else 64 * 32
        found[kernel.name] = exponentials_beside_products(kernel) / (scores // 128)
    assert len(found) >= 12
    assert [f"{name}: {part:.2f} of the exponentials" for name, part in found.items() if not part >= 0.85] == []
    # The steps before have none: they wait for all products first.
    for step in ("04", "05", "06"):
        assert [exponentials_beside_products(kernel) for kernel in read("forward", step)] == [0, 0]


def test_decoding_is_made_of_its_instructions(read):
    kernels = read("attention", "", "6decodeI")
    assert {head_dim(kernel) for kernel in kernels} == {64, 128, 256}
    plan = {r"HMMA\.16816\.F32\.BF16": 16, r"LDSM\.16\.M": 8, r"LDGSTS\.E\.BYPASS\.128": 4}
    assert faults_of(kernels, lambda kernel: (plan, 255)) == []


# Kernels of the fused operations that move 16 bytes a thread: the least number of such loads and stores.
SIXTEEN_BYTES = {
    r"4norm\S*7forwardI13__nv_bfloat16Li8ELi1E": (2, 1),
    r"4norm\S*8backwardI13__nv_bfloat16Li8ELi1E": (3, 1),
    r"7softmax\S*(?:7forward|8backward)I13__nv_bfloat16Li8ELi1E": (1, 1),
    r"7softmax\S*(?:forward|backward)_wideI13__nv_bfloat16Li8E": (4, 4),
    r"10activation\S*applyI13__nv_bfloat16Li8E\S*Swiglu": (4, 2),
    r"6rotary\S*rotateI13__nv_bfloat16Li8E": (4, 2),
    r"13cross_entropy\S*(?:one_pass|gradient_alone)I13__nv_bfloat16E": (4, 4),
    r"embedding_cu_\S*look_upI5uint4E": (1, 1),
    r"embedding_cu_\S*sum_piecesI13__nv_bfloat16Li8E": (4, 1),
    r"adamw_cu_\S*adamwE": (4, 4),  # float32: p, m, v, and the gradient or the copy of p
    r"grad_norm_cu_\S*7squaresE": (4, 0),
    r"grad_norm_cu_\S*5scaleE": (4, 4),
}


@pytest.mark.parametrize("name", SIXTEEN_BYTES)
def test_fused_operations_move_sixteen_bytes_at_once(read, name):
    loads, stores = SIXTEEN_BYTES[name]
    kernels = read("fused", "", name)
    assert kernels
    plan = {r"LDG?\.E\.128": loads, r"STG?\.E\.128": stores}  # LD, ST: of an address that comes from a table
    assert faults_of(kernels, lambda kernel: (plan, 255)) == []


# ---- the checks, on code that is made up -----------------------------------------------------------------------------

SCORES = ["WARPGROUP.ARRIVE", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0"]
OUTPUT = ["HGMMA.64x64x16.F32.BF16 R88, R120, gdesc[UR8].tnspB, R88, gsb0"]
WAIT, WAIT_FOR_SCORES = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
EXPONENTIALS = ["MUFU.EX2 R24, R24"] * 32


def made_up(*code: str) -> sass.Kernel:
    return sass.Kernel("k", 168, 0, 0, code=code)


def test_a_wait_that_was_moved_up_is_seen():
    sound = made_up(*SCORES, *OUTPUT, WAIT_FOR_SCORES, *EXPONENTIALS, WAIT)
    moved = made_up(*SCORES, *OUTPUT, WAIT_FOR_SCORES, WAIT, *EXPONENTIALS)
    first = made_up(*SCORES, WAIT, *EXPONENTIALS, *OUTPUT, WAIT)
    assert [exponentials_beside_products(kernel) for kernel in (sound, moved, first)] == [32, 0, 0]


def test_a_product_of_another_kind_is_seen():
    shared, registers = made_up(*SCORES), made_up(*OUTPUT)
    plan = {rf"HGMMA\.64x64{SHARED}": 1}
    assert sass.plan_faults(shared, plan, 168) == []
    assert len(sass.plan_faults(registers, plan, 168)) == 1
    assert len(sass.plan_faults(shared, {rf"HGMMA\.64x64{REGISTERS}": 1}, 128)) == 2


def test_narrow_accesses_are_seen():
    narrow = made_up("LD.E.64 R34, desc[UR6][R28.64]", "LDG.E R1, desc[UR6][R2.64]", "LDG.E.64 R1, desc[UR6][R2.64]")
    wide = made_up("LDG.E.128.CONSTANT R4, desc[UR6][R2.64]", "LD.E.128 R4, desc[UR6][R2.64]")
    assert [len(sass.plan_faults(kernel, {r"LDG?\.E\.128": 2}, 255)) for kernel in (narrow, wide)] == [1, 0]
