"""The cases of the benchmark of special products: what is computed, by whom else, FLOPs and bytes to move.

Products in float8, grouped products, products with matrices of 4 and 8 bits, which exist in Triton alone; batched LoRA
and attention_decode in Triton and in CUDA C++. Operands are bfloat16, random, the same for all competitors. Bytes are
those that have to move, each operand read once and each result written once in the formats of ours: a peer that reads
more shows as fewer GB/s. What a peer wants prepared once for many calls, such as a matrix unpacked or packed its way,
is not timed. A peer that is not in this torch, or not installed, raises when it is made.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import timing
from cuda import ops
from cuda.measure import products
from cuda.quantised_ops import NF4

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
PEAK = products.PEAK[BF16]  # FLOP/s of the tensor cores
PEAK_FP8 = 1978.9e12  # the same data sheets, dense
LARGEST = torch.finfo(FP8).max
TOLERANCE = 3e-2  # of the largest element: operands and sums are rounded at different places
TOLERANCE_FP8 = 6e-2  # tensor cores keep some 14 bits of a float8 sum, and cut the rest off at each step
BLOCK, GROUP = 64, 128  # weights that share a scale: NF4, int4
PAGE = 64  # keys of a block of the paged cache
DISTRIBUTIONS = ("identical", "skewed", "zipf", "uniform", "distinct")  # from one adapter to as many as there can be
RATIO = 1.5  # zipf: each adapter has so many times as many rows as the next
Call = Callable[[], Any]
Maker = Callable[[], Call]  # prepares, then gives the call that is timed


@dataclass(frozen=True, slots=True)
class Sizes:
    """m x n x k of float8 products; rows, columns to quantise; experts' rows, k, n and numbers; (out, in) of quantised
    matrices and rows of x; rows, adapters, rank and width of LoRA; (sequences, heads, heads of the cache, keys)."""

    fp8: tuple[tuple[int, int, int], ...]
    quantise: tuple[int, int]
    grouped: tuple[int, int, int]
    experts: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    batches: tuple[int, ...]
    adapters: int
    rank: int
    width: int
    decode: tuple[tuple[int, int, int, int], ...]
    head_dim: int = 128


SIZES = {
    "cuda": Sizes(
        fp8=((4096,) * 3, (8192,) * 3, (16384, 50304, 768), (2048,) * 3), quantise=(16384, 4096),
        grouped=(16384, 2048, 4096), experts=(8, 64), matrices=((4096, 4096), (14336, 4096)),
        rows=(1, 16, 4096, 64, 4, 512), batches=(64, 16, 256, 1), adapters=64, rank=16, width=4096,
        decode=((64, 32, 8, 4096), (1, 32, 8, 32768), (256, 32, 8, 1024)),
    ),
    "cpu": Sizes(
        fp8=((48, 64, 160), (80, 96, 64)), quantise=(33, 200), grouped=(40, 32, 48), experts=(2, 5),
        matrices=((32, 256),), rows=(1, 4, 16), batches=(9, 1), adapters=4, rank=8, width=64,
        decode=((2, 4, 2, 192),), head_dim=64,
    ),
}  # fmt: skip


def within(tolerance: float) -> Callable[[Any, Any], bool]:
    """Of the largest element; NaN is not."""
    return lambda result, reference: timing.close(tolerance)({"it": result, "reference": reference})


usual = within(TOLERANCE)


@dataclass(frozen=True, slots=True)
class Case:
    """`close(result, reference)` says whether a result is right. `peak` is that of ours, in FLOP/s."""

    ours: dict[str, Maker]
    peers: dict[str, Maker]
    reference: Call
    flops: int
    bytes: int
    peak: float = PEAK
    close: Callable[[Any, Any], bool] = usual

    def limit(self, bandwidth: float) -> tuple[float, str]:
        """Seconds that it takes at the very least, and what sets them."""
        memory, arithmetic = self.bytes / bandwidth, self.flops / self.peak
        return (memory, "memory") if memory >= arithmetic else (arithmetic, "tensor cores")


class Problem(NamedTuple):
    """`kernels`: how many it is the first to have Triton compile, about."""

    operation: str
    what: str
    kernels: int
    make: Callable[[], Case]

    def __str__(self) -> str:
        return f"{self.operation} {self.what}"


def problems(device: str, sizes: Sizes, operations: tuple[str, ...] = ()) -> Iterator[Problem]:
    """One of each operation in turn, the most important first: the budget may end."""
    chosen = [make(device, sizes) for name, make in OPERATIONS.items() if name in (operations or OPERATIONS)]
    yield from filter(None, chain.from_iterable(zip_longest(*chosen)))


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Maker:
    """What needs no preparation."""
    return lambda: partial(function, *arguments, **options)


def normal(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(BF16)


def seeded(make: Callable[..., Case], *arguments: Any) -> Callable[[], Case]:
    def seed_and_make() -> Case:
        torch.manual_seed(0)
        return make(*arguments)

    return seed_and_make


# ---- float8 ----------------------------------------------------------------------------------------------------------


def fp8_products(device: str, sizes: Sizes) -> Iterator[Problem]:
    for i, (m, n, k) in enumerate(sizes.fp8):
        for scaling in ("row", "tensor"):
            what = f"{products.Shape(m, n, k)}, a scale a {scaling}"
            yield Problem("fp8_matmul", what, 0 if i else 2, seeded(_fp8_product, device, m, n, k, scaling))


def _fp8_product(device: str, m: int, n: int, k: int, scaling: str) -> Case:
    (a, scale_a), (b, scale_b) = (quantise_eagerly(normal(device, rows, k), scaling) for rows in (m, n))
    scale_b = scale_b.mT.contiguous() if scaling == "row" else scale_b
    wide_a, wide_b = (a.float() * scale_a).to(BF16), (b.mT.float() * scale_b).to(BF16).mT.contiguous().mT
    ours = call(ops.fp8_matmul, a, b.mT, scale_a, scale_b)
    fast = call(ops.fp8_matmul, a, b.mT, scale_a, scale_b, max_num_imprecise_acc=None)

    def torchs(fast: bool) -> Maker:
        return call(lambda: torch._scaled_mm(a, b.mT, scale_a, scale_b, out_dtype=BF16, use_fast_accum=fast))

    matmul = partial(torch.matmul, wide_a, wide_b)
    peers = {f"torch._scaled_mm, use_fast_accum={fast}": torchs(fast) for fast in (False, True)}
    return Case(
        {"triton": ours, "triton, sums left to the tensor cores": fast}, peers | {"torch.matmul, bf16": call(matmul)},
        matmul, 2 * m * n * k, m * k + n * k + 2 * m * n, PEAK_FP8, within(TOLERANCE_FP8),
    )  # fmt: skip


def quantise_eagerly(x: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(1, keepdim=True) if scaling == "row" else x.abs().max()
    scale = largest.float() / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


def fp8_casts(device: str, sizes: Sizes) -> Iterator[Problem]:
    for transposed in (False, True):
        for scaling in ("row", "tensor"):
            what = f"{'x'.join(map(str, sizes.quantise))}, a scale a {scaling}{', transposed' * transposed}"
            kernels = 1 if scaling == "row" and not transposed else 2
            yield Problem("quantize_fp8", what, kernels, seeded(_fp8_cast, device, sizes.quantise, scaling, transposed))


def _fp8_cast(device: str, shape: tuple[int, int], scaling: str, transposed: bool) -> Case:
    x = normal(device, *shape)

    def eager() -> tuple[Tensor, Tensor]:
        return quantise_eagerly(x.mT.contiguous() if transposed else x, scaling)

    def close(result: tuple[Tensor, Tensor], x: Tensor) -> bool:
        """That each number is the nearest float8, but for rounding of the scale itself."""
        x8, scale = result
        error = (x8.float() * scale - x.float()).abs()
        return x8.shape == x.shape and bool((error <= 1.01 * (x.float().abs() / 16 + scale * 2**-10)).all())

    ours = call(ops.quantize_fp8, x, scaling=scaling, transposed=transposed)
    reference = x.mT if transposed else x
    return Case({"triton": ours}, {"torch": call(eager)}, lambda: reference, 0, 3 * x.numel(), close=close)


# ---- experts ---------------------------------------------------------------------------------------------------------


def rows_of_experts(rows: int, experts: int, skewed: bool) -> list[int]:
    """As many each, or expert i in proportion to 1 / (i + 1)."""
    shares = [1 / (i + 1) if skewed else 1.0 for i in range(experts)]
    ends = [round(rows * sum(shares[: i + 1]) / sum(shares)) for i in range(experts)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def grouped(device: str, sizes: Sizes) -> Iterator[Problem]:
    rows, k, n = sizes.grouped
    for experts in sizes.experts:
        for skewed in (False, True):
            for backward in (False, True):
                shape = f"{experts} experts, {rows}x{n}x{k}, {'skewed' if skewed else 'balanced'}"
                kernels = 0 if skewed else 2 if backward and experts == sizes.experts[0] else 1
                make = seeded(_grouped, device, sizes.grouped, rows_of_experts(rows, experts, skewed), backward)
                yield Problem("grouped_matmul", f"{shape}, {'backward' if backward else 'forward'}", kernels, make)


def _grouped(device: str, shape: tuple[int, int, int], counts: list[int], backward: bool) -> Case:
    rows, k, n = shape
    x, dy = normal(device, rows, k), normal(device, rows, n)
    weights = normal(device, len(counts), n, k).mT  # as layers keep them
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)

    def loop(x: Tensor, weights: Tensor) -> Tensor:
        parts = zip(x.split(counts), weights.unbind(), strict=True)  # the counts known, without a wait for the GPU
        return torch.cat([part @ weight for part, weight in parts])

    def of(function: Callable[[Tensor, Tensor], Tensor]) -> Maker:
        def make() -> Call:
            if not backward:
                return lambda: function(x, weights)
            leaves = [leaf.detach().requires_grad_() for leaf in (x, weights)]
            y = function(*leaves)
            return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

        return make

    used = sum(count > 0 for count in counts) * k * n
    moved = rows * (k + n) + used + backward * (rows * k + len(counts) * k * n)
    return Case(
        {"triton": of(lambda x, w: ops.grouped_matmul(x, w, ends))},
        {"torch._grouped_mm": of(lambda x, w: torch._grouped_mm(x, w, offs=ends)), "torch.matmul, a loop": of(loop)},
        lambda: of(loop)()(), 2 * rows * k * n * (2 if backward else 1), 2 * moved,
    )  # fmt: skip


# ---- matrices of 4 and 8 bits ----------------------------------------------------------------------------------------


def quantised(format: str, device: str, sizes: Sizes) -> Iterator[Problem]:
    compiled: set[int] = set()
    for m in sizes.rows:
        for rows, columns in sizes.matrices:
            kernels = int(min(m, 128) not in compiled)  # a tiling for each m up to 64, and one for all above
            compiled.add(min(m, 128))
            make = seeded(_quantised, device, format, m, rows, columns)
            yield Problem(f"{format}_matmul", f"{m} rows, {rows}x{columns}", kernels, make)


def _quantised(device: str, format: str, m: int, rows: int, columns: int) -> Case:
    x = normal(device, m, columns)
    ours, w, weight_bytes, peers = WEIGHTS[format](device, x, rows, columns)
    linear = partial(F.linear, x, w)
    moved = weight_bytes + 2 * m * (rows + columns)
    return Case({"triton": ours}, peers | {"torch.matmul, bf16": call(linear)}, linear, 2 * m * rows * columns, moved)


def nibbles(device: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Numbers below 16, and the same packed, the first of a pair in the high half."""
    numbers = torch.randint(16, (rows, columns), device=device, dtype=torch.uint8)
    return numbers, numbers[:, ::2] << 4 | numbers[:, 1::2]


def _nf4(device: str, x: Tensor, rows: int, columns: int) -> tuple[Maker, Tensor, int, dict[str, Maker]]:
    numbers, packed = nibbles(device, rows, columns)
    absmax, table = torch.rand(rows * columns // BLOCK, device=device) + 0.5, torch.tensor(NF4, device=device)
    w = (table[numbers.int()].view(-1, BLOCK) * absmax[:, None]).to(BF16).view(rows, columns)

    def bitsandbytes() -> Call:
        import bitsandbytes as bnb

        state = bnb.functional.QuantState(
            absmax=absmax, shape=w.shape, code=table, blocksize=BLOCK, quant_type="nf4", dtype=BF16
        )
        return partial(bnb.matmul_4bit, x, packed.view(-1, 1).t(), quant_state=state)  # one row: gemv_4bit

    ours = call(ops.nf4_matmul, x, packed.view(-1), absmax, (rows, columns), block=BLOCK)
    return ours, w, packed.numel() + 4 * absmax.numel(), {"bitsandbytes": bitsandbytes}


def _int4(device: str, x: Tensor, rows: int, columns: int) -> tuple[Maker, Tensor, int, dict[str, Maker]]:
    numbers, packed = nibbles(device, rows, columns)
    scales = (torch.rand(rows, columns // GROUP, device=device) + 0.5).to(BF16)
    w = ((numbers.float() - 8).view(rows, -1, GROUP) * scales[..., None].float()).to(BF16).view(rows, columns)

    def torchs() -> Call:
        both = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).contiguous()  # (number - 8) * scale + 0
        if device == "cpu":
            theirs = torch._convert_weight_to_int4pack_for_cpu(numbers.int(), 2)
            return partial(torch._weight_int4pack_mm_for_cpu, x, theirs, GROUP, both)
        return partial(torch._weight_int4pack_mm, x, torch._convert_weight_to_int4pack(packed, 8), GROUP, both)

    ours = call(ops.int4_matmul, x, packed, scales, group=GROUP)
    return ours, w, packed.numel() + 2 * scales.numel(), {"torch._weight_int4pack_mm": torchs}


def _int8(device: str, x: Tensor, rows: int, columns: int) -> tuple[Maker, Tensor, int, dict[str, Maker]]:
    packed = torch.randint(-127, 128, (rows, columns), device=device, dtype=torch.int8)
    scales = (torch.rand(rows, device=device) + 0.5).to(BF16)
    w = (packed.float() * scales[:, None].float()).to(BF16)
    torchs = call(lambda: torch._weight_int8pack_mm(x, packed, scales))
    ours = call(ops.int8_matmul, x, packed, scales)
    return ours, w, packed.numel() + 2 * scales.numel(), {"torch._weight_int8pack_mm": torchs}


WEIGHTS = {"nf4": _nf4, "int4": _int4, "int8": _int8}


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def rows_of_adapters(distribution: str, batch: int, adapters: int) -> list[int]:
    """How many rows of a batch each adapter has that has any, at most `adapters` of them.

    identical: one has all. skewed: one has one row, another the rest. uniform: the root of `batch`, all alike.
    distinct: one for each row. zipf: as said by RATIO.
    """
    many = {"identical": 1, "uniform": math.isqrt(batch - 1) + 1, "distinct": batch}.get(distribution)
    if many is not None:
        many = min(many, adapters)
        return [batch // many + (i < batch % many) for i in range(many)]
    if distribution == "skewed":
        return [1, batch - 1] if batch > 1 and adapters > 1 else [batch]
    counts: list[int] = []
    while (left := batch - sum(counts)) and len(counts) < adapters - 1:
        counts.append(math.ceil(left * (1 - 1 / RATIO)))
    return [*counts, left] if left else counts


def lora(device: str, sizes: Sizes) -> Iterator[Problem]:
    for i, batch in enumerate(sizes.batches):
        for j, distribution in enumerate(DISTRIBUTIONS if batch > 1 else DISTRIBUTIONS[:1]):
            counts = rows_of_adapters(distribution, batch, sizes.adapters)
            kernels = 4 if j == 0 and (i == 0 or batch == 1) else 0  # Triton treats a number that is 1 specially
            yield Problem("lora", f"{batch} rows, {distribution}", kernels, seeded(_lora, device, sizes, counts))


def _lora(device: str, sizes: Sizes, counts: list[int]) -> Case:
    """Rows are sorted by adapter for all competitors; sgmv gets a segment of every adapter, most of them empty."""
    adapters, rank, width, batch = sizes.adapters, sizes.rank, sizes.width, sum(counts)
    per_adapter = [0] * adapters
    for i, count in zip(torch.randperm(adapters).tolist(), counts, strict=False):
        per_adapter[i] = count
    x, a, b = normal(device, batch, width), normal(device, adapters, rank, width), normal(device, adapters, width, rank)
    everyone = torch.arange(adapters, dtype=torch.int32, device=device)
    many = torch.tensor([0, *per_adapter], device=device)
    segments, indices = many.cumsum(0).to(torch.int32), everyone.repeat_interleave(many[1:])
    scales = 2.0 ** (everyone % 3 - 1).float()
    scaled = (b.float() * scales[:, None, None]).to(BF16)  # exact, and no multiplication for the peers

    def loop(x: Tensor, a: Tensor, b: Tensor) -> Call:
        parts = zip(x.split(per_adapter), a.mT.unbind(), b.mT.unbind(), strict=True)
        parts = [operands for operands in parts if len(operands[0])]
        return lambda: torch.cat([part @ a @ b for part, a, b in parts])

    def gathered() -> Tensor:
        return torch.bmm(torch.bmm(x[:, None], a[indices].mT), scaled[indices].mT)[:, 0]

    ours = {}
    for kernels in ("cuda", "triton"):
        ours[f"{kernels}, bgmv"] = call(ops.lora_bgmv, x, a, b, indices, scales, kernels=kernels)
        ours[f"{kernels}, sgmv"] = call(ops.lora_sgmv, x, a, b, segments, everyone, scales, kernels=kernels)
    return Case(
        ours,
        {"torch.matmul, a loop": lambda: loop(x, a, scaled), "torch.bmm of gathered adapters": call(gathered)},
        loop(x.float(), a.float(), scaled.float()),
        4 * batch * rank * width, 2 * 2 * width * (len(counts) * rank + batch),
    )  # fmt: skip


# ---- decoding --------------------------------------------------------------------------------------------------------


def decode(device: str, sizes: Sizes) -> Iterator[Problem]:
    for i, (batch, heads, kv_heads, keys) in enumerate(sizes.decode):
        what = f"{batch} sequences, {heads} heads of {sizes.head_dim} on {kv_heads}, {keys} keys"
        make = seeded(_decode, device, batch, heads, kv_heads, keys, sizes.head_dim)
        yield Problem("attention_decode", what, 2 * (i < 2), make)


def _decode(device: str, batch: int, heads: int, kv_heads: int, keys: int, head_dim: int) -> Case:
    blocks = keys // PAGE
    k, v = (normal(device, batch * blocks, PAGE, kv_heads, head_dim) for _ in range(2))
    table = torch.randperm(batch * blocks, device=device).view(batch, blocks).to(torch.int32)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
    q = normal(device, batch, heads, 1, head_dim)

    def ours(kernels: str) -> Maker:
        return call(ops.attention_decode, q, k, v, table, lengths, kernels=kernels)

    dense = [x[table.long()].flatten(1, 2).transpose(1, 2).contiguous() for x in (k, v)]
    torchs = partial(F.scaled_dot_product_attention, q, *dense, enable_gqa=True)
    return Case(
        {"triton": ours("triton")},
        {"CUDA C++": ours("cuda"), "torch, cache in one piece": call(torchs)},
        torchs, 4 * batch * heads * keys * head_dim, 2 * (k.numel() + v.numel() + 2 * q.numel()),
    )  # fmt: skip


OPERATIONS: dict[str, Callable[[str, Sizes], Iterator[Problem]]] = {
    "fp8_matmul": fp8_products, "grouped_matmul": grouped, "nf4_matmul": partial(quantised, "nf4"), "lora": lora,
    "int4_matmul": partial(quantised, "int4"), "quantize_fp8": fp8_casts, "int8_matmul": partial(quantised, "int8"),
    "attention_decode": decode,
}  # fmt: skip
