"""Reads machine code: the disassembly of kernels in an object file or a module, and what ptxas said when it made them.

Nothing needs a GPU. cuobjdump and nvdisasm come with the CUDA toolkit, with Triton's wheel, and as wheels of NVIDIA's
(nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm). A kernel's ladder and step are told by its name: its namespaces, the
source file, which nvcc puts into the names of what lies in no named namespace, or the shape that it is a template of.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = next((path for suffix in EXTENSION_SUFFIXES if (path := ROOT / f"cuda/_sm90{suffix}").exists()), None)
# Never -arch=sm_90a: that also makes an image for compute_90, where wgmma and setmaxnreg do not exist.
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a"]
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][^;]*?)\s*;", re.MULTILINE)
FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
SOURCE = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\d\d)_\w+?_cu_")  # a hash, the length of the file's name, the name
SHAPE = re.compile(r"\d(?:[A-Z][a-z]+)*[A-Z][a-z]{2,}(\d\d)[EI]")  # a type called Persistent08
REMARK = re.compile(r"^.*\(C75\d\d\).*$", re.MULTILINE)
SPILL = re.compile(r"^.*\b[1-9]\d* bytes spill (?:stores|loads).*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One entry function as ptxas made it; bytes of stack are a thread's, in local memory."""

    name: str
    registers: int
    stack: int
    local: int
    ladder: str = ""  # "matmul", "forward" or "backward" of attention, "attention", "fused"
    step: str = ""  # "12"
    code: tuple[str, ...] = ()  # the instructions without their predicates, in the order of their addresses

    def count(self, pattern: str) -> int:
        """How many instructions begin so (a regular expression): opcode, blank, operands."""
        return sum(re.match(pattern, instruction) is not None for instruction in self.code)


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the PATH, in CUDA_HOME, or in a wheel of Triton's or NVIDIA's."""
    folders = [Path(os.environ[key]) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ]
    for package, pattern in (("triton", "backends/nvidia/bin"), ("nvidia", "*/bin")):
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or [] if spec else []:
            folders += sorted(Path(place).glob(pattern))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def missing(*names: str) -> str:
    """Why a test that needs these programs cannot run here; empty where it can."""
    lacking = [name for name in names if tool(name) is None]
    return f"no {' and no '.join(lacking)} on this machine" if lacking else ""


def built_kernels(*ladders: str) -> list[Kernel]:
    """The kernels of these ladders in cuda/_sm90, without their instructions. Skips the test that asks where the module
    is not there, is older than its sources, or cannot be read."""
    if reason := missing("cuobjdump", "nvdisasm"):
        pytest.skip(reason)
    if MODULE is None:
        pytest.skip("no cuda/_sm90: make native builds it where there is nvcc")
    if MODULE.stat().st_mtime < max(path.stat().st_mtime for path in (ROOT / "cuda").glob("*/**/*.cu*")):
        pytest.skip("cuda/_sm90 is older than its sources: make native")
    return [kernel for kernel in kernels(MODULE) if kernel.ladder in ladders]


def kernels(path: Path) -> list[Kernel]:
    """The Hopper kernels of an object file or a module, without their instructions."""
    found = USAGE.findall(_cuobjdump("--dump-resource-usage", str(path)))
    return [Kernel(name, *(int(numbers[i]) for i in (0, 1, 3)), _ladder(name), _step(name)) for name, *numbers in found]


def disassemble(path: Path, wanted: list[Kernel]) -> list[Kernel]:
    """The same kernels with their code. cuobjdump takes most of a second for a large one: several run side by side."""

    def text(names: list[str]) -> str:
        return _cuobjdump("--dump-sass", "--function", ",".join(names), str(path))

    names = [kernel.name for kernel in wanted]
    count = min(len(names), os.cpu_count() or 1, 4)
    found = {}
    with ThreadPoolExecutor(max(count, 1)) as pool:
        for each in pool.map(text, [names[i::count] for i in range(count)]):
            parts = FUNCTION.split(each)  # before the first, name, code, name, code, ...
            for name, code in zip(parts[1::2], parts[2::2], strict=True):
                found[name] = tuple(INSTRUCTION.findall(code))
    return [replace(kernel, code=found[kernel.name]) for kernel in wanted]


def compile_kernel(source: str, folder: Path, *flags: str) -> tuple[Path, str]:
    """A CUDA source through nvcc: (object file, what ptxas said)."""
    file, target = folder / "kernel.cu", folder / "kernel.o"
    file.write_text(source)
    command = [tool("nvcc"), *NVCC_FLAGS, f"-I{ROOT / 'cuda'}", "-Xptxas=-v", *flags, "-c", file, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target, done.stdout + done.stderr


def complaints(report: str) -> list[str]:
    """The lines in what ptxas said that a kernel of the ladder may not have: remarks about wgmma, and spills."""
    return REMARK.findall(report) + SPILL.findall(report)


def memory_faults(kernel: Kernel) -> list[str]:
    """Registers that went to local memory, by the resource report and, where the code was read, by its instructions."""
    numbers = {"bytes of stack": kernel.stack, "bytes of local memory": kernel.local}
    numbers |= {"loads from local memory": kernel.count("LDL"), "stores to local memory": kernel.count("STL")}
    return [f"{kernel.name}: {number} {what}" for what, number in numbers.items() if number]


def plan_faults(kernel: Kernel, wanted: dict[str, int], registers: int) -> list[str]:
    """What a kernel lacks of the instructions that it must have, at least so often, and the faults none may have."""
    faults = [
        f"{kernel.name}: {kernel.count(pattern)} {pattern}, expected {least} or more"
        for pattern, least in wanted.items()
        if kernel.count(pattern) < least
    ]
    if kernel.registers > registers:
        faults.append(f"{kernel.name}: {kernel.registers} registers, expected {registers} or fewer")
    return faults + memory_faults(kernel) + serialised(kernel) + unfenced_stores(kernel)


def serialised(kernel: Kernel) -> list[str]:
    """wgmmas that wait for one another: ptxas then puts a wait (DEPBAR) after each one. Two to a wait at the least."""
    waits, products = kernel.count(r"WARPGROUP\.DEPBAR"), kernel.count("HGMMA")
    dummies = kernel.count(r"HGMMA\.64x8x16\.F16")  # what ptxas injects to move registers
    faults = [f"{kernel.name}: {waits} waits for {products} wgmmas"] if 2 * waits > products else []
    return faults + ([f"{kernel.name}: {dummies} injected wgmmas"] if dummies else [])


def unfenced_stores(kernel: Kernel) -> list[str]:
    """TMA stores before which no fence makes what stmatrix wrote visible to TMA."""
    faults, written = [], False
    for instruction in kernel.code:
        opcode = instruction.split()[0]
        if opcode.startswith("UTMASTG") and written:
            faults.append(f"{kernel.name}: {opcode} after STSM without FENCE.VIEW.ASYNC between")
        written = opcode.startswith("STSM") or (written and not opcode.startswith("FENCE.VIEW.ASYNC"))
    return faults


def _ladder(name: str) -> str:
    """By the namespaces of the mangled name."""
    match = re.match(r"_ZN(6matmul|9attention7forward|9attention8backward|9attention|5fused)", name)
    return match[1].lstrip("0123456789").replace("attention7", "").replace("attention8", "") if match else ""


LAST = {"matmul": "4best", "backward": "4best"}  # the namespace of a ladder's last step, which is several files


def _step(name: str) -> str:
    ladder = _ladder(name)
    match = SOURCE.search(name) or SHAPE.search(name)
    if match:
        return match[1]
    return {"matmul": "16", "backward": "05"}[ladder] if ladder in LAST and LAST[ladder] in name else ""


def _cuobjdump(*arguments: str) -> str:
    program, folder = tool("cuobjdump"), os.path.dirname(tool("nvdisasm") or "")
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}{os.pathsep}{folder}"}  # it starts nvdisasm
    done = subprocess.run(
        [program, "--gpu-architecture", "sm_90a", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
