"""Batches as a function of the row, the permutation behind them, prefetching; by brute force."""

import threading

import numpy as np
import pytest
import torch

from minigpt.batches import (
    Prefetcher,
    TokenStream,
    batch,
    check_length,
    held_out_windows,
    permute,
    rank_rows,
)
from minigpt.data import load_data
from minigpt.shards import write_shard


def keys(seed: int, rounds: int = 8) -> np.ndarray:
    return np.random.SeedSequence((seed, 0)).generate_state(rounds, np.uint64)


def numbered(*sizes: int) -> TokenStream:
    """A token is its own position in the whole text, so a batch tells where it was read."""
    text = np.arange(sum(sizes), dtype=np.uint32)
    return TokenStream(np.split(text, np.cumsum(sizes)[:-1]))


SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 97, 127, 128, 129, 255, 257, 1000, 1023, 1025, 4099, 65535, 65537]


@pytest.mark.parametrize("size", SIZES)
def test_permute_is_a_permutation(size):
    for seed in range(5):
        sent = permute(np.arange(size), size, keys(seed))
        assert np.array_equal(np.sort(sent), np.arange(size))


def test_permute_is_pointwise():
    whole = permute(np.arange(1000), 1000, keys(1))
    assert np.array_equal(permute(np.array([999, 5, 5, 0]), 1000, keys(1)), whole[[999, 5, 5, 0]])
    assert permute(np.arange(0), 1000, keys(1)).size == 0
    huge = permute(np.arange(2**40 - 100, 2**40), 2**40 + 1, keys(1))  # no list of 2^40 is made
    assert len(set(huge.tolist())) == 100 and huge.min() >= 0 and huge.max() <= 2**40


@pytest.mark.parametrize("size", [2, 3, 5, 8, 17, 64, 100])
def test_permute_sends_each_index_everywhere_alike(size):
    """Chi-square of the images of one index over 2,000 keys; 5 standard deviations are allowed, with fixed keys."""
    trials = 2000
    images = np.stack([permute(np.arange(size), size, keys(seed)) for seed in range(trials)])
    for index in {0, 1, size // 2, size - 1}:
        counts = np.bincount(images[:, index], minlength=size)
        chi_square = ((counts - trials / size) ** 2 / (trials / size)).sum()
        assert chi_square < (size - 1) + 5 * np.sqrt(2 * (size - 1))


def test_permute_leaves_no_order_between_neighbours():
    size = 10_007
    sent = permute(np.arange(size), size, keys(0)).astype(float)
    assert abs(np.corrcoef(sent[:-1], sent[1:])[0, 1]) < 5 / np.sqrt(size)
    assert abs(np.corrcoef(sent, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
    ordered = np.diff(sent) == 1
    assert ordered.sum() < 10, "one is expected by chance"


@pytest.mark.parametrize("context", [1, 2, 7, 16])
@pytest.mark.parametrize("sizes", [(101,), (40, 17, 3, 64), (1, 30), (18, 0, 18)])
def test_an_epoch_visits_each_window_once(sizes, context):
    stream = numbered(*sizes)
    per_epoch = sum(max(0, size - 1) // context for size in sizes)
    assert stream.windows(context) == per_epoch
    ends = np.cumsum(sizes)
    for epoch in range(3):
        inputs, targets = batch(stream, seed=4, row=epoch * per_epoch, rows=per_epoch, context=context)
        assert inputs.dtype == targets.dtype == np.int64 and inputs.shape == targets.shape == (per_epoch, context)
        assert np.array_equal(targets, inputs + 1), "targets are the next tokens"
        assert len(np.unique(targets)) == targets.size, "every target of the epoch comes once"
        shard = np.searchsorted(ends, inputs, side="right")
        assert (shard == np.searchsorted(ends, targets, side="right")).all(), "no window spans two shards"
        assert (shard == shard[:, :1]).all()


def test_offsets_reach_every_token_over_the_epochs():
    stream = numbered(23, 9)  # 3 windows of 7 and one spare token; 1 window and one spare
    inputs, targets = batch(stream, seed=0, row=0, rows=4 * 40, context=7)
    assert set(inputs.ravel()) | set(targets.ravel()) == set(range(32))


def test_rows_are_where_locate_says():
    stream = numbered(40, 17, 3, 64)
    per_epoch = stream.windows(5)
    inputs, _ = batch(stream, seed=9, row=0, rows=3 * per_epoch, context=5)
    for row in range(3 * per_epoch):
        epoch, shard, offset = stream.locate(row, 9, 5)
        assert epoch == row // per_epoch
        assert np.array_equal(stream.shards[shard][offset : offset + 5], inputs[row])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_the_one_process_batch(world_size):
    stream = numbered(101, 50)
    for step in range(9):
        whole = batch(stream, seed=3, row=12 * step, rows=12, context=7)
        shares = [rank_rows(12 * step, 12, rank, world_size) for rank in range(world_size)]
        parts = [batch(stream, seed=3, row=first, rows=rows, context=7) for first, rows in shares]
        for side in (0, 1):
            assert np.array_equal(np.concatenate([part[side] for part in parts]), whole[side])


def test_any_way_of_walking_gives_the_same_rows():
    stream = numbered(60, 45)
    whole = batch(stream, seed=1, row=0, rows=100, context=4)[0]
    for sizes in ([7] * 14, [1, 2, 3, 50, 44], [33, 33, 33]):
        starts = np.cumsum([0, *sizes[:-1]])
        walked = [batch(stream, seed=1, row=int(a), rows=b, context=4)[0] for a, b in zip(starts, sizes, strict=True)]
        assert np.array_equal(np.concatenate(walked), whole[: sum(sizes)])


def test_rows_depend_on_seed_and_epoch():
    stream = numbered(2001)
    place = {"rows": 50, "context": 20}
    first = batch(stream, seed=0, row=0, **place)[0]
    assert np.array_equal(first, batch(numbered(2001), seed=0, row=0, **place)[0])
    for other in ({"seed": 1, "row": 0}, {"seed": 0, "row": 50}, {"seed": 0, "row": 100}):  # 100 rows an epoch
        again = batch(stream, **other, **place)[0]
        assert not np.array_equal(first, again) and not np.array_equal(np.sort(first, 0), np.sort(again, 0))


def test_the_rows_of_a_seed_stay_what_they_are():
    """A run resumed with a later version of this code, of numpy or of Python must find the same list."""
    stream = numbered(40, 17, 3, 64)
    found = [stream.locate(row, 1234, 5) for row in (0, 1, 2, 30, 10**9)]
    assert found == [(0, 0, 29), (0, 0, 19), (0, 0, 24), (1, 0, 27), (45454545, 1, 11)]


def test_memory_mapped_shards_give_the_same_batches(tmp_path):
    tokens = np.random.default_rng(0).integers(257, size=300).astype(np.uint16)
    tokens[:50:7] = 256
    parts = {"a_train_1.bin": tokens[:100], "a_train_2.bin": tokens[100:], "a_val_0.bin": tokens[:50]}
    for name, part in parts.items():
        write_shard(tmp_path / name, part)
    data, rows = load_data(str(tmp_path), "bytes"), {"seed": 2, "row": 5, "rows": 60, "context": 8}
    for mapped, plain in zip(batch(data.train, **rows), batch(TokenStream([*parts.values()][:2]), **rows), strict=True):
        assert np.array_equal(mapped, plain)
    assert not data.train.shards[0].flags.writeable and np.array_equal(data.held_out, tokens[:50])
    assert data.held_out_bytes == (tokens[:50] != 256).sum()
    assert data.held_out_text is None and data.documents is None


class Counting:
    """A `make` that knows which steps were asked for, and breaks at one of them."""

    def __init__(self, breaks_at: int = -1) -> None:
        self.steps, self.breaks_at, self.stream = [], breaks_at, numbered(500)

    def __call__(self, step):
        self.steps.append(step)
        if step == self.breaks_at:
            raise RuntimeError(f"step {step} broke")
        return batch(self.stream, seed=0, row=4 * step, rows=4, context=8)


def prefetching() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_prefetched_batches_are_the_plain_ones():
    make = Counting()
    with Prefetcher(make) as batches:
        for step in [0, 1, 2, 3, 10, 9, 9, 0, 1]:  # steps in a row, a jump, back, again
            inputs, targets = batches.next(step)
            expected = make(step)
            assert inputs.dtype == torch.int64 and inputs.is_contiguous() and targets.is_contiguous()
            assert np.array_equal(inputs.numpy(), expected[0]) and np.array_equal(targets.numpy(), expected[1])
        assert prefetching() == 1
    assert prefetching() == 0


def test_prefetching_runs_ahead_and_makes_each_batch_once():
    make = Counting()
    with Prefetcher(make, depth=2) as batches:
        batches.next(0)
        done = threading.Event()
        batches._worker.submit(done.set)
        assert done.wait(10)
        assert make.steps == [0, 1, 2]
        for step in range(1, 6):
            batches.next(step)
    assert len(set(make.steps)) == len(make.steps) and make.steps[:6] == list(range(6))


def test_what_breaks_in_the_thread_breaks_the_caller():
    with Prefetcher(Counting(breaks_at=2)) as batches:
        batches.next(0), batches.next(1)
        with pytest.raises(RuntimeError, match="step 2 broke"):
            batches.next(2)
        assert batches.next(3)[0].shape == (4, 8)
    assert prefetching() == 0
    with pytest.raises(KeyError), Prefetcher(Counting()) as batches:
        batches.next(0)
        raise KeyError
    assert prefetching() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetching_to_a_gpu():
    make = Counting()
    with Prefetcher(make, "cuda") as batches:
        for step in range(50):
            inputs, targets = batches.next(step)
            assert inputs.device.type == targets.device.type == "cuda"
            assert np.array_equal(inputs.cpu().numpy(), make(step)[0])
            assert np.array_equal(targets.cpu().numpy(), make(step)[1])


@pytest.mark.parametrize("size", [2, 3, 9, 16, 17, 18, 64, 101])
@pytest.mark.parametrize(("context", "stride"), [(1, 1), (16, 16), (16, 5), (16, 1), (7, 4)])
def test_held_out_windows_predict_each_token_once_with_enough_context(size, context, stride):
    predicted = []
    for start, length, first in held_out_windows(size, context, stride):
        assert start >= 0 and start + length <= size - 1 and length <= context
        predicted += range(start + 1 + first, start + length + 1)
        if start:
            assert first >= context - stride, "a later window must see context - stride tokens before what counts"
    assert predicted == list(range(1, size))


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="batch 5 is not divisible by world size 2"):
        rank_rows(0, 5, 0, 2)
    check_length(numbered(10), 9)
    for stream, found in (
        (numbered(10), "10 tokens: expected at least 11"),
        (numbered(9, 3), "9 tokens in its longest shard"),
    ):
        with pytest.raises(ValueError, match=found):
            batch(stream, seed=0, row=0, rows=1, context=10)
    for row, rows in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=f"{rows} rows from row {row}"):
            batch(numbered(10), seed=0, row=row, rows=rows, context=4)
    with pytest.raises(ValueError, match=r"int64 \(3,\): expected a row of unsigned tokens"):
        TokenStream([np.arange(3)])
    for stride in (0, 5):
        with pytest.raises(ValueError, match=f"stride {stride}: expected 1 to the context, 4"):
            held_out_windows(10, 4, stride)
    with pytest.raises(ValueError, match="1 tokens: expected at least 2"):
        held_out_windows(1, 4, 4)
