"""Flash attention, forward: the operation attention_forward in Triton. Definition: triton_attention_rules.reference.

A program owns a tile of queries and walks over the keys that any of them sees; softmax and output are kept online, in
registers. Triton gives TMA, wgmma, the ring of tiles and the waits for it, and keeps the probabilities in registers.
It takes the roles of warps: for Hopper Triton 3.6 and 3.9 divide a loop between a producer and consumers
(warp_specialize=True) only in a program of 4 warps, where their compiler stops at this kernel with an assertion. So
there is no ping-pong and no setmaxnreg; attention/forward/best.cuh has both. Takes float32 too, on CUDA cores.
"""

import triton
import triton.language as tl
from torch import Tensor

from cuda.triton_attention_rules import (
    EVERYTHING,
    LOG2E,
    Sizes,
    at,
    bias_strides,
    describe,
    elements,
    in_sight,
    lse_strides,
    scaling,
    scored,
    sequence,
    sizes,
    spans_of_keys,
    strides,
    tile,
)  # fmt: skip
from cuda.triton_compat import jit
from cuda.triton_tilings import Tiling, choose, prune

# Counts that Triton would compile anew for, where one is 1 or a multiple of 16, and the code is no better for it. It is
# better for `keys`: a mask that ends at a multiple of 16 leaves loads of a bias whole. Backward it costs registers.
ANY_NUMBER = ("heads", "sequences", "queries", "tiles", "swath", "left", "right")
L2 = 32 << 20  # bytes of keys and values that programs running together may share: of an H100's 50 MB

# Registers decide: 128 x 128 scores of float32 take 64 registers of each of 256 threads, as the output of width 128
# does. Two warpgroups share a tile of keys; the softmax of one can run while the other multiplies. At width 64 half the
# keys leave room for a second program, whose products fill in too.
TILINGS = {
    64: (Tiling(128, 64, warps=8, stages=3), Tiling(128, 128, warps=8, stages=3)),
    128: (Tiling(128, 128, warps=8, stages=2), Tiling(128, 64, warps=8, stages=3)),
    256: (Tiling(128, 64, warps=8, stages=2), Tiling(128, 32, warps=8, stages=2)),
}
SMALL = (Tiling(128, 32, warps=8, stages=2), Tiling(64, 32, warps=8, stages=2))  # without wgmma, and for less memory
FLOAT32 = (Tiling(32, 32, warps=8, stages=2), Tiling(32, 16, warps=8, stages=1))  # each thread holds whole operands


def tilings(kind: str, element_size: int, width: int, cap: bool = False, bias: bool = False) -> list[Tiling]:
    """Those that fit, the best guess first. The interpreter counts calls: it gets the large ones."""
    candidates = SMALL if kind == "sm_80" else (*TILINGS[max(64, width)], *SMALL)
    if element_size == 4 and kind != "interpreter":
        candidates = FLOAT32

    def shared(t: Tiling) -> int:
        ring = (t.stages - 1) * 4 * t.block_m * t.block_n if bias else 0
        return element_size * width * (t.block_m + t.stages * 2 * t.block_n) + ring

    def registers(t: Tiling) -> int:
        scores = t.block_m * t.block_n * (1.5 + 0.5 * cap + bias)  # and half: as left operand, in 16 bits
        return int((t.block_m * width + scores) / (32 * t.warps)) + 56

    return prune(candidates, kind, shared=shared, registers=registers)


@jit
def attend(
    total, m, acc, q, k, v, bias, first, batch, k_head, first_key, begin, end, bias_row, sight, scaling,
    MASKED: tl.constexpr, CAP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The recurrence over the tiles of keys from begin to end. total is the sum of exp2(s - m)."""
    rows = first + tl.arange(0, M)
    for n in tl.range(begin, end, N):
        product = tl.dot(q, tile(k, batch, k_head, first_key + n, N, WIDTH).T, input_precision="ieee")
        s, factor = product, scaling[0]  # to units of log2: after the maximum, in one instruction with the subtraction
        if CAP or bias is not None:
            s, _ = scored(product, scaling, CAP)
            factor = 1.0
        key = n + tl.arange(0, N)
        if bias is not None:
            inside = (rows < sight[0])[:, None] & (key < sight[1])[None, :]
            s += tl.load(bias + elements(rows, key, bias_row), mask=inside, other=0.0) * LOG2E
        if MASKED:
            s = tl.where(in_sight(rows[:, None], key[None, :], sight), s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1) * factor)
        shift = m_next
        if MASKED or bias is not None:  # a row may have seen nothing yet: -inf - -inf is NaN
            shift = tl.where(m_next == float("-inf"), 0.0, m_next)
        p = tl.exp2(s * factor - shift[:, None])
        shrink = tl.exp2(m - shift)
        total = total * shrink + tl.sum(p, 1)
        values = tile(v, batch, k_head, first_key + n, N, WIDTH)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        m = m_next
    return total, m, acc


@jit
def block_of(swath, tiles, sequences, heads):
    """Of this program: tile of queries, sequence, head. Programs start in the order of their numbers. When causal the
    last queries see most keys and go first, so that no long tile starts last. Heads go in swaths whose keys and values
    stay in L2."""
    number = tl.program_id(0)
    first_head = number // (swath * tiles) * swath
    inside = number % (swath * tiles)
    width = tl.minimum(swath, sequences * heads - first_head)
    head = first_head + inside % width
    return tiles - 1 - inside // width, head // heads, head % heads


@jit(do_not_specialize=ANY_NUMBER)
def attention_kernel(
    q, k, v, o, lse, sink, bias, starts_q, starts_k, o_strides, lse_strides, bias_strides, heads, group, sequences,
    queries, keys, tiles, swath, left, right, scaling, K: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    block, b, head = block_of(swath, tiles, sequences, heads)
    first = block * M
    queries, keys, first_query, first_key, batch = sequence(starts_q, starts_k, b, queries, keys)
    if first >= queries:
        return
    sight = (queries, keys, left, right)
    begin, full, edge, end = spans_of_keys(first, tl.minimum(first + M, queries) - 1, sight, N)
    if bias is not None:
        bias = at(bias, bias_strides, b, head)
    mine = tile(q, batch, head, first_query + first, M, WIDTH)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, WIDTH], tl.float32)
    if WINDOW:
        total, m, acc = attend(
            total, m, acc, mine, k, v, bias, first, batch, head // group, first_key, begin, full, bias_strides[2],
            sight, scaling, True, CAP, M, N, WIDTH,
        )  # fmt: skip
    total, m, acc = attend(
        total, m, acc, mine, k, v, bias, first, batch, head // group, first_key, full, edge, bias_strides[2],
        sight, scaling, False, CAP, M, N, WIDTH,
    )  # fmt: skip
    total, m, acc = attend(
        total, m, acc, mine, k, v, bias, first, batch, head // group, first_key, edge, end, bias_strides[2],
        sight, scaling, True, CAP, M, N, WIDTH,
    )  # fmt: skip

    if sink is not None:  # a score without a value
        score = tl.load(sink + head) * LOG2E
        m_next = tl.maximum(m, score)
        shift = tl.where(m_next == float("-inf"), 0.0, m_next)
        shrink = tl.exp2(m - shift)
        total = total * shrink + tl.exp2(score - shift)
        acc *= shrink[:, None]
        m = m_next
    acc *= tl.where(total == 0, 0.0, 1 / total)[:, None]
    rows = first_query + first + tl.arange(0, M)
    here = rows < first_query + queries
    columns = tl.arange(0, WIDTH)
    o = at(o, o_strides, batch, head) + elements(rows, columns, o_strides[2])
    tl.store(o, acc.to(o.dtype.element_ty), mask=here[:, None] & (columns < K)[None, :])
    tl.store(at(lse, lse_strides, batch, head) + rows, (m + tl.log2(total)) / LOG2E, mask=here)


def attention_forward(
    place, *, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, sink: Tensor | None = None,
    bias: Tensor | None = None, starts_q: Tensor | None = None, starts_k: Tensor | None = None,
    longest_q: int | None = None, longest_k: int | None = None, softcap: float = 0.0, left: int = EVERYTHING,
    right: int = EVERYTHING, step: str | None = None, scores: Tensor | None = None, tiling: Tiling | None = None,
) -> None:  # fmt: skip
    """Writes o and lse; see attention/attention.h. There are no steps, and no scores in memory: both are ignored."""
    numbers = scaling(scale, softcap)
    size = sizes(q, k, starts_q, longest_q, longest_k)
    candidates = tilings(place.kind, q.element_size(), size.width, softcap > 0, bias is not None)
    key = (str(q.dtype).removeprefix("torch."), q.shape[-1], right < size.queries)
    t = tiling or choose("attention_forward", place.kind, key, candidates)
    tiles = triton.cdiv(size.queries, t.block_m)
    attention_kernel[(tiles * size.sequences * size.heads,)](
        describe(q, t.block_m, size.width), describe(k, t.block_n, size.width), describe(v, t.block_n, size.width), o,
        lse, sink, bias, starts_q, starts_k, strides(o), lse_strides(lse), bias_strides(bias), size.heads, size.group,
        size.sequences, size.queries, size.keys, tiles, _swath(size, q), left, right, numbers, K=q.shape[-1],
        WIDTH=size.width, M=t.block_m, N=t.block_n, CAP=softcap > 0, WINDOW=left < size.keys, num_warps=t.warps,
        num_stages=t.stages,
    )  # fmt: skip


def _swath(size: Sizes, q: Tensor) -> int:
    """Heads, whole groups of them, whose keys and values fit into L2."""
    fit = L2 // (2 * size.keys * q.shape[-1] * q.element_size())
    return min(max(1, fit) * size.group, size.sequences * size.heads)
