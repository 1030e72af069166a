"""Attention of a few new tokens over a paged cache of keys and values, by our kernels; known to torch.compile.

    cache = PagedCache(1000, 64, kv_heads=2, head_dim=128)                 # cuda/paged_cache.py
    o = attention_decode(q, cache.k, cache.v, *cache.tables(sequences))    # q (B, H, T, K)

CPU tensors run on the CPU model, CUDA tensors on the GPU, on the current stream, from Ampere on; with kernels="triton"
the same by Triton (triton_decode.py), which also takes float32 and any strides. There is no gradient: decoding is
inference. Letters: B batch, H query heads, G heads of the cache, T new tokens, K head width.
"""

import math

import torch
from torch import Tensor

from cuda import device
from cuda.attention_ops import DTYPES, EVERYTHING, HEAD_DIMS
from cuda.device import Kernels, check_kernels, place

LEAST_KEYS = 256  # of a split; fewer, and writing and adding up its part costs more than it hides


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    window: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    splits: int | None = None,
    return_lse: bool = False,
    check: bool = False,
    kernels: Kernels = "cuda",
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention of the T last tokens of each sequence to what is in the cache, themselves included.

    q (B, H, T, K) in bfloat16 or float16; k_cache and v_cache (blocks, block_size, G, K) in its type, block_size a
    multiple of 16, H a multiple of G. Strides are free but for the last dimension, in multiples of 8. With kernels
    "triton" float32 goes too, and strides need be multiples of nothing.
    block_table (B, most_blocks) int32: entry i is the block of keys i * block_size and on. Entries past a sequence's
    length, and those that lie before all windows, may hold anything. lengths (B,) int32: keys of each sequence, the T
    new ones included. Query t stands at key lengths[b] - T + t and sees that and the ones before; with window > 0 that
    and window - 1 before it.
    scale: of q . k, K ** -0.5 if None. softcap: 0, or scores become softcap * tanh(score / softcap). sink (H,) float32:
    a score of each head that only adds to the denominator.
    splits: into how many parts each sequence's keys are cut; None: splits_of, and no part below 256 keys.

    Returns o (B, H, T, K) in the type of q, and with return_lse also the logarithm of the softmax's denominator,
    (B, H, T) float32. A query that sees nothing (before key 0, or length 0) gets o = 0, lse = -inf (or its sink).

    Raises ValueError for anything else, naming the argument. The values of block_table and lengths are looked at if
    they are on the CPU; on a GPU that would wait for it, so they are looked at with check=True alone. Without it the
    caller answers for them: a block that does not exist is a wild read.
    """
    check_kernels(kernels)
    given = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": block_table,
        "lengths": lengths,
        "sink": sink,
    }
    for name, x in given.items():
        if x is None and name == "sink":
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: expected a torch tensor")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient: decoding has none; expected torch.no_grad() or .detach()")
    o, lse = _decode(
        q, k_cache, v_cache, block_table, lengths, sink, window, None if scale is None else float(scale),
        float(softcap), splits, check, kernels,
    )  # fmt: skip
    return (o, lse) if return_lse else o


def splits_of(batch: int, kv_heads: int, longest: int, multiprocessors: int) -> int:
    """Into how many parts to cut the keys of each sequence, `longest` at most.

    A block takes one part of one head of the cache. Two or three blocks fit on a multiprocessor, and one copies while
    the other computes: so about two for each, but no part shorter than 256 keys. Where the batch alone has a block for
    each multiprocessor, nothing is split, which saves the second kernel.
    """
    blocks = max(1, batch * kv_heads)
    return max(1, min(-(-2 * multiprocessors // blocks) if blocks < multiprocessors else 1, longest // LEAST_KEYS))


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_types(q: Tensor, given: dict[str, Tensor | None], kernels: str) -> None:
    dtypes = device.DTYPES if kernels == "triton" else DTYPES
    if q.dtype not in dtypes:
        raise ValueError(f"q is {q.dtype}: expected one of {dtypes}; call .to()")
    wanted = dict.fromkeys(("k_cache", "v_cache"), q.dtype) | dict.fromkeys(("block_table", "lengths"), torch.int32)
    for name, x in given.items():
        if x is None:
            continue
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: expected one device, call .to()")
        if x.dtype != wanted.get(name, torch.float32):
            raise ValueError(f"{name} is {x.dtype}: expected {wanted.get(name, torch.float32)}; call .to()")


def _expect_shape(name: str, x: Tensor, *shape: int) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {shape}")


def _checked(q, k_cache, v_cache, block_table, lengths, sink, window, scale, softcap, splits, kernels) -> None:
    for name, x, wanted in (("q", q, "(B, H, T, K)"), ("k_cache", k_cache, "(blocks, block_size, G, K)")):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {wanted}")
    (B, H, _, K), (blocks, block_size, G, _) = q.shape, k_cache.shape
    others = {"k_cache": k_cache, "v_cache": v_cache, "block_table": block_table, "lengths": lengths, "sink": sink}
    _check_types(q, others, kernels)
    if K not in HEAD_DIMS:
        raise ValueError(f"q has head width {K}: expected one of {HEAD_DIMS}")
    if block_size == 0 or block_size % 16:
        raise ValueError(f"k_cache has blocks of {block_size} keys: expected a multiple of 16")
    if G == 0 or H % G:
        raise ValueError(f"k_cache has {G} heads: expected a divisor of the {H} of q")
    _expect_shape("k_cache", k_cache, blocks, block_size, G, K)
    _expect_shape("v_cache", v_cache, blocks, block_size, G, K)
    if block_table.ndim != 2 or block_table.shape[0] != B:
        raise ValueError(f"block_table has shape {tuple(block_table.shape)}: expected ({B}, most_blocks)")
    _expect_shape("lengths", lengths, B)
    if sink is not None:
        _expect_shape("sink", sink, H)
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("block_table", block_table)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {x.stride()}: expected a contiguous last dimension, call .contiguous()"
            )
    if window < 0:
        raise ValueError(f"window {window}: expected 0 for none, or a number of tokens")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale {scale}: expected a positive number")
    if not (softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap {softcap}: expected 0 for none, or a positive number")
    if splits is not None and not 1 <= splits <= 65535:
        raise ValueError(f"splits {splits}: expected None, or 1 to 65535")


def _check_values(k_cache: Tensor, block_table: Tensor, lengths: Tensor, queries: int, window: int) -> None:
    """Of the entries that the kernel reads. Waits for the device that the table is on."""
    (blocks, block_size), most_blocks = k_cache.shape[:2], block_table.shape[1]
    table, lengths = block_table.cpu(), lengths.cpu()
    for b, length in enumerate(lengths.tolist()):
        if length < 0:
            raise ValueError(f"lengths[{b}] is {length}: expected 0 or more")
        if length > most_blocks * block_size:
            raise ValueError(
                f"lengths[{b}] is {length}: expected at most {most_blocks * block_size}, "
                f"which is {most_blocks} blocks of {block_size}"
            )
    first = lengths - queries - window + 1 if window else torch.zeros_like(lengths)
    begin = torch.arange(most_blocks) * block_size
    in_use = (begin < lengths[:, None]) & (begin + block_size > first[:, None])
    wrong = (in_use & ((table < 0) | (table >= blocks))).nonzero()
    if len(wrong):
        b, i = wrong[0].tolist()
        raise ValueError(f"block_table[{b}, {i}] is {table[b, i]}: expected 0 to {blocks - 1}, a block of the cache")


# ---- the operation ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("groundup::attention_decode", mutates_args=(), device_types=("cpu", "cuda"))
def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    sink: Tensor | None,
    window: int,
    scale: float | None,
    softcap: float,
    splits: int | None,
    check: bool,
    kernels: str = "cuda",
) -> tuple[Tensor, Tensor]:
    _checked(q, k_cache, v_cache, block_table, lengths, sink, window, scale, softcap, splits, kernels)
    if check or lengths.device.type == "cpu":
        _check_values(k_cache, block_table, lengths, q.shape[2], window)
    (B, H, T, K), (blocks, block_size, G, _) = q.shape, k_cache.shape
    o, lse = _results(q)
    if 0 in q.shape or blocks == 0:  # without blocks all lengths are 0
        o.zero_()
        lse.copy_(lse.new_full((), -math.inf).expand_as(lse) if sink is None else sink[:, None].expand_as(lse))
        return o, lse
    here = place(q.device, kernels=kernels)
    longest = block_table.shape[1] * block_size  # what the lengths are is known to the GPU alone
    if window:
        longest = min(longest, window + T)
    least_keys = LEAST_KEYS if splits is None else 0
    splits = splits or splits_of(B, G, longest, here.multiprocessors)
    parts = {}
    if splits > 1:
        parts["split_o"] = q.new_empty((splits, B * H * T, K), dtype=torch.float32)
        parts["split_state"] = q.new_empty((splits, B * H * T, 2), dtype=torch.float32)
    here.run(
        "attention_decode", q=q.detach(), k_cache=k_cache.detach(), v_cache=v_cache.detach(), block_table=block_table,
        lengths=lengths.contiguous(), sink=None if sink is None else sink.detach().contiguous(), o=o, lse=lse,
        scale=K**-0.5 if scale is None else scale, softcap=softcap,
        left=min(window - 1, EVERYTHING) if window else EVERYTHING, splits=splits, least_keys=least_keys,
        **parts,
    )  # fmt: skip
    return o, lse


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_decode.register_fake
def _(q, k_cache, v_cache, block_table, lengths, sink, window, scale, softcap, splits, check, kernels="cuda"):
    _checked(q, k_cache, v_cache, block_table, lengths, sink, window, scale, softcap, splits, kernels)
    return _results(q)
