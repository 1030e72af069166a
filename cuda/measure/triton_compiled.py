"""What Triton makes of each operation's main configurations for a Hopper GPU, without one: seconds, registers, code.

A configuration calls a public function under `compiling(90)`, with tensors that nothing reads. Each compilation starts
with an empty cache; Triton itself says how long its stages took, cuobjdump what came out. Beside it stands how long
nvcc took for the same operation in CUDA C++, as Ninja logged it: one file there holds all types and sizes at once, and
those of fused/ are made for two kinds of GPU. And how many lines of code both are (code_lines.py).
Refused: a configuration that compiles nothing.
"""

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cuda import ops, optim
from cuda.measure.code_lines import ROOM, lines_of
from cuda.triton_compat import Compiled, compiling

BF16 = torch.bfloat16
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][^;]*?)\s*;", re.MULTILINE)
COUNTED = {  # the opcodes that tell what a kernel is made of
    "hgmma": r"[HQ]GMMA",  # products of a warpgroup, from shared memory; Q: of float8
    "hmma": r"HMMA",  # of a warp, from registers
    "tma_loads": r"UTMALDG",
    "tma_stores": r"UTMASTG",
    "loads_128": r"LDG(?:STS)?\.E(?:\.\w+)*\.128",  # 16 bytes a thread, to registers or to shared memory
    "loads": r"LDG",
    "spills": r"LDL|STL",  # to and from local memory
}
LOG = re.compile(
    r"^(\d+)\t(\d+)\t\d+\t\S*kernels_(?:sm90|any)\S*?/__/([\w/]+\.cu)\.o\t", re.MULTILINE
)  # begin, end in ms; the file


class Configuration(NamedTuple):
    operation: str
    what: str
    source: str  # the same in CUDA C++, below cuda/; empty where there is none
    launch: Callable[[], Any]


def zeros(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
    """Of memory that is not touched."""
    return torch.zeros(shape, dtype=dtype).requires_grad_(grad)


def both(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> None:
    """Forward and backward."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    y = function(*leaves, kernels="triton", **options)
    torch.autograd.grad(y, [x for x in leaves if x.requires_grad], torch.zeros_like(y), allow_unused=True)


def configurations() -> Iterator[Configuration]:
    """In bfloat16, of the sizes that the benchmarks take where a size decides what is compiled."""
    yield from _products()
    yield from _attention()
    yield from _rows()
    yield from _training()
    yield from _quantised()
    yield from _adapters()


def _products() -> Iterator[Configuration]:
    def product(m: int, n: int, k: int, **options: Any) -> Callable[[], Tensor]:
        return lambda: ops.matmul(zeros(m, k), zeros(n, k).mT, kernels="triton", **options)

    large, small = "matmul/16_best_128x256.cu", "matmul/16_best_split.cu"
    yield Configuration("matmul", "4096", large, product(4096, 4096, 4096))
    fused = product(4096, 4096, 4096, bias=zeros(4096), activation="gelu")
    yield Configuration("matmul", "4096, bias and GELU", large, fused)
    yield Configuration("matmul", "128x128x16384", small, product(128, 128, 16384))
    yield Configuration("matmul", "4096, rows of 4095", "matmul/08_mma_sync.cu", product(4096, 4096, 4095))

    def fp8() -> Tensor:
        a, b = (zeros(4096, 4096, dtype=torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones(())
        return ops.fp8_matmul(a, b.mT, one, one)

    def grouped() -> Tensor:
        ends = torch.arange(1, 9, dtype=torch.int32) * 1024
        return ops.grouped_matmul(zeros(8192, 2048), zeros(8, 4096, 2048).mT, ends)

    x, w = zeros(4096, 4096, grad=True), zeros(4096, 4096)
    yield Configuration("fp8_matmul", "4096", "", fp8)
    yield Configuration(
        "quantize_fp8", "4096, a scale each row", "", lambda: ops.quantize_fp8(x.detach(), scaling="row")
    )
    yield Configuration("fp8_linear", "4096", "", lambda: ops.fp8_linear(x, w).backward(w))
    yield Configuration("grouped_matmul", "8 experts, 8192x4096x2048", "", grouped)


def _attention() -> Iterator[Configuration]:
    def heads(tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (zeros(1, tokens, 16, width).transpose(1, 2) for _ in range(3))
        return q, k, v

    for width in (64, 128):
        for causal in (False, True):
            what = f"{width} wide, {'causal' if causal else 'full'}"
            yield Configuration(
                "attention", what, "attention/forward/09_best.cu",
                lambda width=width, causal=causal: ops.attention(*heads(4096, width), causal=causal, kernels="triton"),
            )  # fmt: skip
    yield Configuration(
        "attention backward", "128 wide, causal", "attention/backward/05_best_128.cu",
        lambda: both(ops.attention, *heads(4096, 128), causal=True),
    )  # fmt: skip
    yield Configuration("attention_decode", "128 wide, pages of 64", "attention/decode.cu", _decode)


def _decode() -> Tensor:
    """64 sequences of 32 heads that share 8 of the cache, in pages of 64."""
    q, pages = zeros(64, 32, 1, 128), [zeros(1024, 64, 8, 128) for _ in range(2)]
    table, lengths = torch.arange(1024, dtype=torch.int32).view(64, 16), torch.full((64,), 1000, dtype=torch.int32)
    return ops.attention_decode(q, *pages, table, lengths, kernels="triton")


def _rows() -> Iterator[Configuration]:
    x, gain = zeros(64, 2048), zeros(2048, dtype=torch.float32)
    yield Configuration("rms_norm", "2048 wide", "fused/norm.cu", lambda: both(ops.rms_norm, x, gain))
    yield Configuration("layer_norm", "2048 wide", "fused/norm.cu", lambda: both(ops.layer_norm, x, gain, gain))
    yield Configuration("swiglu", "2048 wide", "fused/activation.cu", lambda: both(ops.swiglu, x, x))
    yield Configuration("gelu", "2048 wide", "fused/activation.cu", lambda: both(ops.gelu, x))
    yield Configuration("relu2", "2048 wide", "fused/activation.cu", lambda: both(ops.relu2, x))
    yield Configuration("softmax", "2048 wide", "fused/softmax.cu", lambda: both(ops.softmax, x))
    q, turn = zeros(1, 64, 16, 128).transpose(1, 2), zeros(64, 128)
    yield Configuration("rotary", "128 wide", "fused/rotary.cu", lambda: both(ops.rotary, q, cos=turn, sin=turn))


def _training() -> Iterator[Configuration]:
    logits, targets = zeros(64, 50304), zeros(64, dtype=torch.int64)
    yield Configuration(
        "cross_entropy",
        "50304 words",
        "fused/cross_entropy.cu",
        lambda: both(ops.cross_entropy, logits, targets=targets),
    )
    table = zeros(50304, 256, dtype=torch.float32)
    yield Configuration(
        "embedding",
        "256 wide",
        "fused/embedding.cu",
        lambda: both(lambda t, **o: ops.embedding(targets, t, **o), table),
    )

    def step() -> None:
        parameters = [zeros(1024, dtype=torch.float32, grad=True) for _ in range(2)]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optim.AdamW(parameters, lr=1e-3, kernels="triton").step()

    yield Configuration("adamw", "float32", "fused/adamw.cu", step)

    def clip() -> None:
        p = zeros(1024, dtype=torch.float32, grad=True)
        p.grad = torch.zeros_like(p)
        optim.clip_grad_norm_([p], 1.0, kernels="triton")

    yield Configuration("clip_grad_norm_", "float32", "fused/grad_norm.cu", clip)


def _quantised() -> Iterator[Configuration]:
    """Of a matrix of 4096 x 4096: a row of x, as in decoding, 64, and so many that it is unpacked first."""
    packed, absmax = zeros(4096 * 2048, dtype=torch.uint8), zeros(4096 * 64, dtype=torch.float32)
    nf4 = packed, absmax, (4096, 4096)
    int4, int8 = zeros(4096, 2048, dtype=torch.uint8), zeros(4096, 4096, dtype=torch.int8)
    scales, each = zeros(4096, 32), zeros(4096, dtype=torch.float32)

    def trained() -> None:
        x = zeros(64, 4096, grad=True)
        ops.nf4_matmul(x, *nf4).backward(zeros(64, 4096))

    yield Configuration("dequantize_nf4", "4096", "", lambda: ops.dequantize_nf4(*nf4, BF16))
    yield Configuration("nf4_matmul", "a row", "", lambda: ops.nf4_matmul(zeros(1, 4096), *nf4))
    yield Configuration("nf4_matmul", "64 rows, and dx", "", trained)
    yield Configuration("nf4_matmul", "4096 rows", "", lambda: ops.nf4_matmul(zeros(4096, 4096), *nf4))
    yield Configuration("int4_matmul", "64 rows", "", lambda: ops.int4_matmul(zeros(64, 4096), int4, scales))
    yield Configuration("int8_matmul", "64 rows", "", lambda: ops.int8_matmul(zeros(64, 4096), int8, each))


def _adapters() -> Iterator[Configuration]:
    """Eight adapters of rank 16."""
    x, a, b, scales = zeros(4096, 2048), zeros(8, 16, 2048), zeros(8, 2048, 16), torch.ones(8)
    ids, starts = torch.arange(8, dtype=torch.int32), torch.arange(9, dtype=torch.int32) * 512

    def trained() -> None:
        leaves = [t.detach().requires_grad_() for t in (x, a, b)]
        torch.autograd.grad(ops.lora_sgmv(*leaves, starts, ids, scales, kernels="triton"), leaves, x)

    yield Configuration("lora_bgmv", "8 rows", "", lambda: ops.lora_bgmv(x[:8], a, b, ids, scales, kernels="triton"))
    yield Configuration("lora_sgmv", "4096 rows, gradients", "", trained)


# ---- what came out ---------------------------------------------------------------------------------------------------


@contextmanager
def fresh_cache() -> Iterator[list[dict[str, Any]]]:
    """Inside, Triton has compiled nothing yet; the list gets what it says of each compilation."""
    times: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.listener = lambda **said: times.append(said)
        yield times


def compile_all(one: Configuration, capability: int = 90) -> list[dict[str, Any]]:
    """A row for each kernel that a configuration launches."""
    rows: dict[str, dict[str, Any]] = {}
    with fresh_cache() as times, compiling(capability) as found:
        one.launch()
    for compiled, said in zip(found, times, strict=True):
        if not said["cache_hit"]:
            rows[compiled.kernel.hash] = (
                {"operation": one.operation, "configuration": one.what, "kernel": compiled.name}
                | seconds_of(said["times"])
                | {"warps": compiled.kernel.metadata.num_warps, "shared": compiled.kernel.metadata.shared}
                | code_of(compiled.kernel.asm["cubin"])
            )
    lines = {"triton_lines": lines_of(set(map(file_of, found)))}
    if one.source:
        lines["cuda_lines"] = lines_of([one.source])
    if not rows:
        raise ValueError(f"{one.operation}, {one.what}: expected a kernel to be compiled, none was")
    return [row | lines for row in rows.values()]


def file_of(compiled: Compiled) -> str:
    """Of a kernel, below cuda/."""
    file = Path(inspect.getfile(compiled.kernel.src.fn.fn)).resolve()
    return str(file.relative_to(ROOM)) if file.is_relative_to(ROOM) else str(file)


def seconds_of(times: Any) -> dict[str, float]:
    """All of a compilation, and ptxas alone, which makes the machine code for nvcc too."""
    return {"compile_s": 1e-6 * times.total, "ptxas_s": 1e-6 * dict(times.lowering_stages)["cubin"]}


def code_of(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of its stack, and counts of instructions."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        registers, stack, local = map(int, USAGE.findall(_cuobjdump("--dump-resource-usage", file))[0])
        code = INSTRUCTION.findall(_cuobjdump("--dump-sass", file))
    counts = {name: sum(re.match(pattern, line) is not None for line in code) for name, pattern in COUNTED.items()}
    return {"registers": registers, "stack": stack + local, "instructions": len(code)} | counts


def _cuobjdump(what: str, file: Path) -> str:
    """With the one in Triton's wheel."""
    command = [triton.knobs.nvidia.cuobjdump.path, what, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvcc_seconds(build: Path) -> dict[str, float]:
    """{file below cuda/: seconds that nvcc took for it in the last build}; empty where nothing was built."""
    logs = sorted(build.glob("native-*/.ninja_log"), key=lambda path: path.stat().st_mtime)
    entries = LOG.findall(logs[-1].read_text()) if logs else []
    return {file: (int(end) - int(begin)) / 1000 for begin, end, file in entries}
