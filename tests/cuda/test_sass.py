"""The machine code of the matmul ladder is what its steps say, without a GPU: cuda/_sm90 as `make native` built it.

Each tensor-core step has the instructions that it is about, no register of any kernel lives in memory, and ptxas put no
waits between wgmmas. The checks themselves are tried on kernels that are broken on purpose.
"""

import re
from pathlib import Path

import pytest

from cuda.native import ptxas
from tests.cuda import sass

SOURCES = sorted((sass.ROOT / "cuda/matmul").glob("*.cu"))
# Of bf16 and of float32, the kernels that are read: both operands along k, or both across it. Not the small
# tiles of 07 and 08 and what they have for addresses of any alignment, which have less of everything.
READ = re.compile(r"(?:bfloat16|ILi128E|I)(?:L[ib]\d+E)*?(?:Lb0ELb0E|Lb1ELb1E)")
LEFT_OUT = re.compile(r"ILi64E|ILi128ELb0E13__nv")
BEST = re.compile(r"4best4bestI13__nv_bfloat16NS\d_5ShapeIS\d*_Li(\d)ELi(\d+)ELi(\d)EEE(?:Lb0ELb0E|Lb1ELb1E)")
SPLIT = re.compile(r"4best5splitI13__nv_bfloat16NS\d_10SplitShapeIS\d*_Li(\d)ELi(\d+)EEE(?:Lb0ELb0E|Lb1ELb1E)")

WARPGROUP = {r"UTMALDG\.3D": 1, r"WARPGROUP\.ARRIVE": 1}
RING = WARPGROUP | {r"HGMMA\.64x256x16\.F32\.BF16": 4, "USETMAXREG": 2}
CLUSTER = RING | {r"UTMALDG\.3D\.MULTICAST": 1, "UCGABAR_ARV": 1}
# What the kernels of a step must have, at least so often; and the registers of a thread that their plan allows.
PLAN = {
    "06": ({r"LDS\.128": 4, "FFMA": 64, r"LDG\.E\.128": 1}, 128),
    "07": ({r"LDS\.128": 4, "FFMA": 8 * 128, "LDGSTS": 1}, 255),
    "08": ({r"HMMA\.16816\.F32\.BF16": 64, "LDSM": 8, r"LDGSTS\.E\.BYPASS\.\S*128": 1}, 255),
    "09": (WARPGROUP | {r"HGMMA\.64x64x16\.F32\.BF16": 4}, 255),
    "10": (WARPGROUP | {r"HGMMA\.64x128x16\.F32\.BF16": 8}, 255),
    "11": (WARPGROUP | {r"HGMMA\.64x128x16\.F32\.BF16": 8}, 255),
    "12": (RING, 168),
    "13": (RING, 168),
    "14": (CLUSTER, 168),
    "15": (CLUSTER | {"STSM": 4, "UTMASTG": 1}, 168),
}


@pytest.fixture(scope="module")
def ladder() -> list[sass.Kernel]:
    return sass.built_kernels("matmul")


@pytest.fixture
def compile_here(tmp_path):
    if reason := sass.missing("nvcc", "cuobjdump", "nvdisasm"):
        pytest.skip(reason)
    return lambda source: sass.compile_kernel(source, tmp_path)


def test_every_step_is_in_the_module(ladder):
    assert {kernel.step for kernel in ladder} == {path.name[:2] for path in SOURCES}


def test_no_kernel_keeps_registers_in_memory(ladder):
    assert [fault for kernel in ladder for fault in sass.memory_faults(kernel)] == []


def test_ptxas_had_nothing_to_remark():
    if sass.MODULE is None:
        pytest.skip("no cuda/_sm90: make native builds it where there is nvcc")
    reports = list(sass.ROOT.glob("build/native-*/cuda/native/CMakeFiles/kernels_*.dir/**/*.ptxas.txt"))
    if not reports:
        pytest.skip("cuda/_sm90 was not built in this folder")
    assert [line for path in reports for line in sass.complaints(path.read_text())] == []


@pytest.mark.parametrize("step", PLAN)
def test_a_step_is_made_of_its_instructions(ladder, step):
    chosen = [
        kernel
        for kernel in ladder
        if kernel.step == step and READ.search(kernel.name) and not LEFT_OUT.search(kernel.name)
    ]
    assert len(chosen) >= 2, f"no two kernels of {step} have the layouts of {READ.pattern}"
    kernels = sass.disassemble(sass.MODULE, chosen)
    assert [fault for kernel in kernels for fault in sass.plan_faults(kernel, *PLAN[step])] == []


def test_the_last_step_is_made_of_its_instructions(ladder):
    """Each tile shape: wgmmas as wide as the tile, stores by TMA, multicast in clusters, registers for all threads."""
    chosen = {kernel: match for kernel in ladder if (match := BEST.search(kernel.name))}
    assert {(match[2], match[3]) for match in chosen.values()} >= {("256", "2"), ("128", "2"), ("64", "1")}
    faults = []
    for kernel, match in zip(sass.disassemble(sass.MODULE, list(chosen)), chosen.values(), strict=True):
        consumers, tile_n, cluster = map(int, match.groups())
        wanted = WARPGROUP | {rf"HGMMA\.64x{tile_n}x16\.F32\.BF16": 4, "STSM": 1, "UTMASTG": 1}
        wanted |= {"USETMAXREG": 2} if consumers > 1 else {}
        wanted |= {r"UTMALDG\.3D\.MULTICAST": 1} if cluster > 1 else {}
        faults += sass.plan_faults(kernel, wanted, {1: 255, 2: 168, 3: 128}[consumers])
    assert faults == []


def test_the_last_step_shares_k_by_its_cluster(ladder):
    chosen = {kernel: match for kernel in ladder if (match := SPLIT.search(kernel.name))}
    assert chosen
    faults = []
    for kernel, match in zip(sass.disassemble(sass.MODULE, list(chosen)), chosen.values(), strict=True):
        wanted = WARPGROUP | {rf"HGMMA\.64x{match[2]}x16\.F32\.BF16": 4, "UCGABAR_ARV": 1}
        faults += sass.plan_faults(kernel, wanted, 255)
    assert faults == []


# ---- the checks, on kernels broken on purpose ------------------------------------------------------------------------

ONE_PRODUCT = """
#include "simt/simt.cuh"
#include "simt/ptx.cuh"
__global__ void __launch_bounds__(128) kernel(float* out, int steps) {
  auto& tile = simt::dynamic_shared<__nv_bfloat16[64 * 64 * 6]>();
  const uint64_t a = ptx::matrix_descriptor(tile, simt::Swizzle::b128, 16, 1024), b = a + 1024;
  float d[GROUPS][N / 2];
  for (int i = 0; i < steps; ++i) {
    ptx::wgmma_fence();
    for (int k = 0; k < 4; ++k)
      for (int g = 0; g < GROUPS; ++g)
        ptx::wgmma<N, __nv_bfloat16>(d[g], a + 512 * g + 2 * k, b + 2 * k, i + k > 0);
    ptx::wgmma_commit_group();
    BETWEEN
    ptx::wgmma_wait_group<0>();
  }
  for (int g = 0; g < GROUPS; ++g)
    for (int i = 0; i < N / 2; ++i) out[threadIdx.x * GROUPS * N / 2 + g * N / 2 + i] = d[g][i];
}
"""


def product(groups: int, n: int, between: str = "") -> str:
    return ONE_PRODUCT.replace("GROUPS", str(groups)).replace("BETWEEN", between).replace("N", str(n))


@pytest.mark.slow
def test_a_sound_product_passes(compile_here):
    target, report = compile_here(product(1, 64))
    kernel = sass.disassemble(target, sass.kernels(target))[0]
    assert sass.complaints(report) == ptxas.faults(report) == []
    assert sass.plan_faults(kernel, {r"HGMMA\.64x64x16\.F32\.BF16": 4, r"WARPGROUP\.ARRIVE": 1}, 168) == []
    assert sass.plan_faults(kernel, {"UTMALDG": 1}, 32) == [
        f"{kernel.name}: 0 UTMALDG, expected 1 or more",
        f"{kernel.name}: {kernel.registers} registers, expected 32 or fewer",
    ]


@pytest.mark.slow
def test_accumulators_touched_in_flight_are_seen(compile_here):
    target, report = compile_here(product(1, 64, "d[0][0] += 1.f;"))
    kernel = sass.disassemble(target, sass.kernels(target))[0]
    assert "(C7519)" in " ".join(sass.complaints(report)) and ptxas.faults(report)
    assert sass.serialised(kernel) and not sass.memory_faults(kernel)


@pytest.mark.slow
def test_a_tile_too_large_for_a_warpgroup_is_seen(compile_here):
    target, report = compile_here(product(2, 256))  # 256 accumulators a thread: none is left to count with
    kernel = sass.disassemble(target, sass.kernels(target))[0]
    assert any("spill stores" in line for line in sass.complaints(report)) and ptxas.faults(report)
    assert len(sass.memory_faults(kernel)) >= 3 and sass.plan_faults(kernel, {}, 168)


@pytest.mark.slow
def test_an_array_that_is_indexed_at_run_time_is_seen(compile_here):
    source = """
    __global__ void kernel(float* out, const int* index, int steps) {
      float sums[32] = {};
      for (int i = 0; i < steps; ++i) sums[index[i] % 32] += 1.f;
      for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = sums[i];
    }"""
    target, report = compile_here(source)
    assert sass.complaints(report) == []  # ptxas calls it no spill; the resource report has it
    assert sass.memory_faults(sass.kernels(target)[0])


def test_a_store_without_its_fence_is_seen():
    sound = sass.Kernel("k", 32, 0, 0, code=("STSM.16.M88.4", "FENCE.VIEW.ASYNC.S", "UTMASTG.3D", "UTMASTG.3D"))
    assert sass.unfenced_stores(sound) == []
    broken = sass.Kernel("k", 32, 0, 0, code=("FENCE.VIEW.ASYNC.S", "STSM.16.M88.4", "UTMASTG.3D"))
    assert sass.unfenced_stores(broken) == ["k: UTMASTG.3D after STSM without FENCE.VIEW.ASYNC between"]


def test_a_missing_tool_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert sass.missing("nvcc", "no-such-tool") == "no nvcc and no no-such-tool on this machine"
    (Path(tmp_path) / "nvcc").write_text("#!/bin/sh\n")
    (Path(tmp_path) / "nvcc").chmod(0o755)
    assert sass.missing("nvcc") == ""
