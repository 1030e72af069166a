"""Attention of a few new tokens over a paged cache in Triton: each sequence's keys split over programs, and a merge.

The plan is that of attention/decode.cu: the H / G query heads that share a head of the cache, times T tokens, are the
rows of one tile, so the cache is read once. Triton puts copies ahead of their use by itself (num_stages of tl.range
becomes a ring of cp.async) and takes any strides. It cannot give each warp keys of its own, so the warps meet at
barriers in each tile; and a tile is padded to a power of two: head widths of 96 and 192 multiply as 128 and 256,
without reading more. float32 works too, on the ordinary cores. What is refused stands in decode_ops.py.
"""

import math

import torch
import triton
import triton.language as tl

from cuda.triton_compat import jit
from cuda.triton_tilings import SHARED

LOG2_E: tl.constexpr = tl.constexpr(1 / math.log(2))
LN_2: tl.constexpr = tl.constexpr(math.log(2))
MERGED = 16  # splits that a program of the merging kernel has in registers at once


def reference(q, k_cache, v_cache, block_table, lengths, *, scale, softcap=0.0, left=1 << 30, sink=None):
    """o and lse; `left`: how many keys before its own a query sees. Letters as in decode_ops.py."""
    outputs, lses = [], []
    (_, H, T, _), (_, _, G, _) = q.shape, k_cache.shape
    for b, length in enumerate(lengths.tolist()):
        keys = torch.arange(length, device=q.device)
        pages, slots = block_table[b, keys // k_cache.shape[1]].long(), keys % k_cache.shape[1]
        k, v = (x[pages, slots].transpose(0, 1).repeat_interleave(H // G, dim=0) for x in (k_cache, v_cache))
        scores = scale * q[b] @ k.mT
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = keys - torch.arange(length - T, length, device=q.device)[:, None]
        scores = scores.masked_fill((distance < -left) | (distance > 0), -math.inf)
        lse = scores.logsumexp(-1)
        if sink is not None:
            lse = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
        dead = lse == -math.inf
        outputs.append((scores - lse.masked_fill(dead, 0.0)[..., None]).exp() @ v)
        lses.append(lse)
    return torch.stack(outputs), torch.stack(lses)


@jit
def _capped(product, cap, uncap):
    """cap * tanh(product * uncap), where exp may overflow: 2 / inf is 0. The error is 1e-7 of the cap."""
    return cap * (1.0 - 2.0 / (1.0 + tl.exp2(product * (uncap * 2.0 * LOG2_E))))


@jit
def _finish(most, total, beside):
    """What a row's sum is multiplied with, and its lse. `most`, the largest score, and `beside`, the sink, are in units
    of log 2; without any key the sum is 0, and a NaN among the scores has made it NaN."""
    top = tl.maximum(most, beside)
    dead = (top == -float("inf")) & (total == 0.0)
    shrunk = tl.where(dead, 0.0, tl.exp2(most - top))  # 1 unless the sink is above all scores
    whole = tl.where(dead, 1.0, total * shrunk + tl.exp2(beside - top))
    return shrunk / whole, (top + tl.log2(whole)) * LN_2


@jit
def _attend(
    q, k_cache, v_cache, table, lengths, sink, o, lse, split_o, split_state,
    q_batch, q_head, q_token, o_batch, o_head, o_token, k_page, k_slot, k_head, v_page, v_slot, v_head, table_row,
    batch, heads, queries, splits, left, least_keys, scale_log2, cap, uncap,
    RATIO: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, CAPPED: tl.constexpr,
    SINK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One split of one head of the cache. Scores are in units of 1 / scale, which goes into the exponential instead:
    differences of large scores then stay exact."""
    kv_heads = heads // RATIO
    split, which = tl.program_id(0) % splits, tl.program_id(0) // splits
    kv_head, tile = which % kv_heads, which // kv_heads % tl.cdiv(queries * RATIO, ROWS)
    b = (which // kv_heads // tl.cdiv(queries * RATIO, ROWS)).to(tl.int64)
    rows, columns = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    token, head = rows // RATIO, kv_head * RATIO + rows % RATIO
    real = rows < queries * RATIO
    wide = columns < WIDTH
    length = tl.load(lengths + b)
    here = length - queries + token  # the key that a row's query stands at

    # The keys of this split begin at a multiple of 16, as blocks do.
    first = tl.maximum(length - queries - left, 0)
    aligned = first // 16 * 16
    share = tl.maximum(tl.cdiv(tl.cdiv(length - aligned, KEYS), splits), tl.cdiv(least_keys, KEYS)) * KEYS
    begin = aligned + split * share
    end = tl.minimum(begin + share, length)

    q_rows = q + b * q_batch + head[:, None] * q_head + token[:, None] * q_token
    x = tl.load(q_rows + columns[None, :], mask=real[:, None] & wide[None, :], other=0.0)
    kv_head = kv_head.to(tl.int64)  # a cache may have its heads outermost, 2^31 elements and more apart
    k_head_cache, v_head_cache = k_cache + kv_head * k_head, v_cache + kv_head * v_head
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Looked up a tile ahead: a copy whose address is still to come would take a stage, and a buffer, of its own.
    pages, keys = table + b * table_row, begin + tl.arange(0, KEYS)
    ahead = tl.load(pages + keys // BLOCK_SIZE, mask=keys < end, other=0)
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        keys = start + tl.arange(0, KEYS)
        # What no query sees is not looked up, not read, and its value is 0: 0 times what lies there might be NaN.
        inside = (keys >= first) & (keys < end)
        page, slot = ahead.to(tl.int64), (keys % BLOCK_SIZE).to(tl.int64)
        later = keys + KEYS
        ahead = tl.load(pages + later // BLOCK_SIZE, mask=later < end, other=0)
        read = inside[:, None] & wide[None, :]
        k = tl.load(k_head_cache + (page * k_page + slot * k_slot)[:, None] + columns[None, :], mask=read, other=0.0)
        v = tl.load(v_head_cache + (page * v_page + slot * v_slot)[:, None] + columns[None, :], mask=read, other=0.0)
        scores = tl.dot(x, tl.trans(k), input_precision="ieee")
        if CAPPED:
            scores = _capped(scores, cap, uncap)
        distance = here[:, None] - keys[None, :]
        scores = tl.where((distance >= 0) & (distance <= left) & inside[None, :], scores, -float("inf"))
        before, most = most, tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(most == -float("inf"), 0.0, most)  # a row that has seen nothing yet: no inf - inf
        p = tl.exp2((scores - shift[:, None]) * scale_log2)
        kept = tl.exp2((before - shift) * scale_log2)
        total = total * kept + tl.sum(p, 1)
        sums = tl.dot(p.to(v.dtype), v, sums * kept[:, None], input_precision="ieee")

    flat = (b * heads + head) * queries + token
    if SPLIT:
        part = split.to(tl.int64) * batch * heads * queries + flat
        tl.store(split_state + part * 2, most, mask=real)
        tl.store(split_state + part * 2 + 1, total, mask=real)
        seen = real & (total != 0.0)  # the merge does not read the others
        tl.store(split_o + part[:, None] * WIDTH + columns[None, :], sums, mask=seen[:, None] & wide[None, :])
    else:
        beside = tl.full((ROWS,), -float("inf"), tl.float32)
        if SINK:
            beside = tl.load(sink + head, mask=real, other=0.0) * LOG2_E
        factor, log_sum = _finish(most * scale_log2, total, beside)
        o_rows = o + b * o_batch + head[:, None] * o_head + token[:, None] * o_token
        result = (sums * factor[:, None]).to(o.dtype.element_ty)
        tl.store(o_rows + columns[None, :], result, mask=real[:, None] & wide[None, :])
        tl.store(lse + flat, log_sum, mask=real)


@jit
def _merge(
    split_o, split_state, sink, o, lse, o_batch, o_head, o_token, rows, heads, queries, splits, scale_log2,
    WIDTH: tl.constexpr, SINK: tl.constexpr, COLUMNS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """A row of o from its parts: each is the largest score, the sum of exp(score - most), and that sum with values."""
    row = tl.program_id(0).to(tl.int64)
    columns, many = tl.arange(0, COLUMNS), tl.arange(0, MERGED)
    wide = columns < WIDTH
    top = -float("inf")
    for first in range(0, splits, MERGED):
        state = split_state + ((first + many) * rows + row) * 2
        top = tl.maximum(top, tl.max(tl.load(state, mask=first + many < splits, other=-float("inf")), 0))
    total = 0.0
    sums = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, splits, MERGED):
        part = (first + many) * rows + row
        most = tl.load(split_state + part * 2, mask=first + many < splits, other=-float("inf"))
        part_total = tl.load(split_state + part * 2 + 1, mask=first + many < splits, other=0.0)
        seen = part_total != 0.0
        weight = tl.where(seen, tl.exp2((most - top) * scale_log2), 0.0)
        read = seen[:, None] & wide[None, :]
        x = tl.load(split_o + part[:, None] * WIDTH + columns[None, :], mask=read, other=0.0)
        total += tl.sum(weight * part_total, 0)
        sums += tl.sum(weight[:, None] * x, 0)
    token, head, b = row % queries, row // queries % heads, row // queries // heads
    beside = -float("inf")
    if SINK:
        beside = tl.load(sink + head) * LOG2_E
    factor, log_sum = _finish(top * scale_log2, total, beside)
    to = o + b * o_batch + head * o_head + token * o_token + columns
    tl.store(to, (sums * factor).to(o.dtype.element_ty), mask=wide)
    tl.store(lse + row, log_sum)


def _shape(rows: int, columns: int, bytes_each: int, kind: str) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps, stages.

    Keys and values of a tile are 32 KB, of which three stages keep two: one is on its way while the other is
    multiplied. Three blocks of 72 KB fit on a multiprocessor, with 64 KB and more on their way, where the 2 MB that
    3.35 TB/s bring in a latency of 600 ns ask for 15 KB of each. A tile of 64 rows multiplies by wgmma, on less the
    warps share the keys. float32 multiplies out of registers, which 8 warps have. Where queries, two stages and what
    is multiplied with values do not fit into shared memory, as on GPUs before Hopper, keys are halved, then queries.
    """
    tile_rows = 16 if rows <= 16 else 32 if rows <= 32 else 64
    keys = min(16 * 1024 // (columns * bytes_each), 64 if tile_rows == 64 else 128)
    while bytes_each * (tile_rows * columns + 4 * keys * columns + tile_rows * keys) + 1024 > SHARED[kind]:
        keys, tile_rows = (keys // 2, tile_rows) if keys > 16 else (keys, tile_rows // 2)
    return tile_rows, keys, 8 if bytes_each == 4 else 4, 3


def attention_decode(
    place, *, q, k_cache, v_cache, block_table, lengths, o, lse, scale, softcap, left, splits, least_keys,
    sink=None, split_o=None, split_state=None,
):  # fmt: skip
    """Arguments as of the operation in CUDA C++ (attention/decode.h)."""
    (B, H, T, K), (_, block_size, G, _) = q.shape, k_cache.shape
    columns = triton.next_power_of_2(K)
    rows, keys, warps, stages = _shape(T * H // G, columns, q.element_size(), place.kind)
    scale_log2 = scale / math.log(2)
    given = {"WIDTH": K, "SINK": sink is not None, "COLUMNS": columns}
    _attend[(splits * G * triton.cdiv(T * H // G, rows) * B,)](
        q, k_cache, v_cache, block_table, lengths, sink, o, lse, split_o, split_state,
        *q.stride()[:3], *o.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], block_table.stride(0),
        B, H, T, splits, left, least_keys, scale_log2, softcap / scale, scale / softcap if softcap else 0.0,
        RATIO=H // G, BLOCK_SIZE=block_size, SPLIT=splits > 1, CAPPED=softcap != 0.0, ROWS=rows, KEYS=keys,
        STAGES=stages, num_warps=warps, **given,
    )  # fmt: skip
    if splits > 1:
        _merge[(B * H * T,)](
            split_o, split_state, sink, o, lse, *o.stride()[:3], B * H * T, H, T, splits, scale_log2,
            MERGED=MERGED, num_warps=4, **given,
        )  # fmt: skip
