"""Rows of documents by brute force over toy texts, a packed row against its documents one by one, ranks against one."""

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from common.dist import World, spawn
from minigpt.batches import Prefetcher, TokenStream, rank_rows
from minigpt.config import GPTConfig
from minigpt.evaluate import bits_per_byte
from minigpt.kv_cache import KVCache
from minigpt.masks import Documents
from minigpt.model import GPT
from speedrun import documents, train
from speedrun.config import RaceConfig
from speedrun.documents import DocumentRows, cut, documents_of, openings, pack, packed_attention, starts
from speedrun.model import build, race_loss
from speedrun.presets import PRESETS
from speedrun.schedule import plan
from speedrun.train import batches, gradients, prepare, race

SEPARATOR = 0


def toy(sizes, seed=0, density=0.15) -> TokenStream:
    """Tokens tell where they stand: 1000 (s + 1) + i is token i of shard s, and 0 opens a document; no two of these
    stand side by side."""
    generator = np.random.default_rng(seed)
    shards = []
    for number, size in enumerate(sizes):
        shard = 1000 * (number + 1) + np.arange(size, dtype=np.uint32)
        opens = generator.random(size) < density
        opens[0] = number == 0  # a later shard begins inside of a document
        opens[1:] &= ~opens[:-1]
        opens[size // 2] |= not opens.any()
        shard[opens] = SEPARATOR
        shards.append(shard)
    return TokenStream(shards)


# -- rows --
@pytest.mark.parametrize("context", [1, 2, 7, 16, 50])
@pytest.mark.parametrize("sizes", [(400,), (300, 17, 90, 2)])
def test_an_epoch_has_every_token_once_but_for_the_counted_ones(sizes, context):
    stream = toy(sizes)
    rows = DocumentRows(stream, SEPARATOR)
    n = rows.rows(context)
    inputs, targets, positions, numbers, _ = rows.batch(seed=3, row=2 * n, rows=n, context=context)
    assert all(x.dtype == np.int64 and x.shape == (n, context) for x in (inputs, targets, positions, numbers))
    assert (positions[:, 0] == 0).all(), "a row begins at the beginning of a piece"
    seen, inside = [], 0
    for number in np.unique(numbers):
        here = numbers == number
        shard, start = place_of(inputs[here], targets[here])
        piece = stream.shards[shard][start : start + here.sum()]
        assert len({*np.nonzero(here)[0]}) == 1 and np.ptp(np.nonzero(here)[1]) == here.sum() - 1, "together in a row"
        assert np.array_equal(inputs[here], piece) and not (piece[1:] == SEPARATOR).any(), "of one document"
        assert np.array_equal(targets[here], stream.shards[shard][start + 1 : start + 1 + here.sum()])
        assert np.array_equal(positions[here], np.arange(here.sum()))
        seen += [(shard, start + i) for i in range(here.sum())]
        inside += piece[0] != SEPARATOR
    assert len(seen) == len({*seen}) == n * context
    assert len(seen) + rows.dropped(context) == sum(size - 1 for size in sizes)
    assert rows.dropped(context) < context * len(sizes)
    needed = sum(-(-length // context) - (tokens[begin] == SEPARATOR) for tokens in stream.shards
                 for begin, length in spans(tokens))  # fmt: skip
    assert inside <= needed + n, "at most one cut a row besides those of long documents"


def place_of(inputs, targets) -> tuple[int, int]:
    """(shard, offset) of a piece, by its first token that tells."""
    tokens = [*inputs, targets[-1]]
    i = next(i for i, token in enumerate(tokens) if token != SEPARATOR)
    return tokens[i] // 1000 - 1, tokens[i] % 1000 - i


def spans(tokens) -> list[tuple[int, int]]:
    """(begin, length) of documents by a loop; the last token is a target alone."""
    begins = [i for i in range(len(tokens) - 1) if i == 0 or tokens[i] == SEPARATOR]
    return [(a, b - a) for a, b in zip(begins, [*begins[1:], len(tokens) - 1], strict=True)]


def test_long_documents_are_cut_into_pieces(monkeypatch):
    monkeypatch.setattr(documents, "CHUNK", 7)  # scanned piecemeal
    for seed in range(5):
        tokens = toy([101], seed).shards[0]
        opens = openings(tokens, SEPARATOR)
        assert opens.tolist() == [i for i, token in enumerate(tokens) if token == SEPARATOR]
        pieces = [(a + i, min(6, n - i)) for a, n in spans(tokens) for i in range(0, n, 6)]
        assert list(zip(*(x.tolist() for x in cut(opens, 100, 6)), strict=True)) == pieces


@pytest.mark.parametrize("context", [1, 5, 64])
@pytest.mark.parametrize("pieces", [0, 1, 3, 1000])
def test_packing_fills_rows_exactly(pieces, context):
    generator = np.random.default_rng(pieces + context)
    for lengths in (generator.integers(1, context + 1, pieces), np.full(pieces, (2 * context + 2) // 3)):
        begins = np.cumsum(lengths + 1) - lengths  # a gap of one token between them
        packing = pack(begins, lengths, context)
        rows = packing.first_R.size - 1
        assert rows == lengths.sum() // context and packing.first_R[0] == 0
        assert all(packing.lengths_P[a:b].sum() == context for a, b in zip(*ends(packing), strict=True))
        tokens = {i for a, n in zip(begins, lengths, strict=True) for i in range(a, a + n)}
        packed = [i for a, n in zip(packing.starts_P, packing.lengths_P, strict=True) for i in range(a, a + n)]
        assert len(packed) == len({*packed}) == rows * context and {*packed} <= tokens
        assert packing.starts_P.size <= pieces + rows, "at most one cut a row"


def ends(packing):
    return packing.first_R[:-1], packing.first_R[1:]


def test_what_can_fill_rows_whole_stays_whole():
    lengths = np.array([7, 3, 10, 4, 4, 2] * 50)
    packing = pack(np.arange(0, 3000, 10), lengths, 10)
    assert sorted(packing.lengths_P) == sorted(lengths)
    assert sorted(packing.starts_P) == list(range(0, 3000, 10))


def test_rows_are_a_function_of_seed_and_row():
    stream, context = toy((300, 90, 200)), 11
    whole = DocumentRows(stream, SEPARATOR).batch(seed=1, row=0, rows=200, context=context)
    per_epoch = DocumentRows(stream, SEPARATOR).rows(context)
    assert 2 * per_epoch + 64 < 200, "over three epochs"
    for ranks, at in [(1, 0), (2, 12), (4, 140 - 64), (8, 2 * per_epoch - 5)]:  # a fresh object: a resumed run
        rows, found = DocumentRows(stream, SEPARATOR), []
        for rank in range(ranks):
            first, count = rank_rows(at, 64, rank, ranks)
            found.append(rows.batch(seed=1, row=first, rows=count, context=context))
        for part in range(3):
            assert np.array_equal(np.concatenate([arrays[part] for arrays in found]), whole[part][at : at + 64])
    other = DocumentRows(stream, SEPARATOR).batch(seed=2, row=0, rows=200, context=context)
    assert not np.array_equal(other[0][:per_epoch], whole[0][:per_epoch])
    epochs = [whole[0][e * per_epoch : (e + 1) * per_epoch] for e in (0, 1)]
    assert not np.array_equal(*epochs), "another order"
    assert np.array_equal(*(np.unique(epoch, axis=0) for epoch in epochs)), "of the same rows"


def test_shards_are_scanned_one_at_a_time_when_a_step_comes_to_them(monkeypatch):
    stream, scanned = toy((300, 90, 200)), []
    numbers = {id(shard): number for number, shard in enumerate(stream.shards)}
    monkeypatch.setattr(documents, "openings", lambda *a: (scanned.append(numbers[id(a[0])]), openings(*a))[1])
    rows = DocumentRows(stream, SEPARATOR)
    assert not scanned
    for row in range(rows.rows(10)):
        read = [shard for _, shard, _ in rows._places(0, row, 1, 10)]
        rows.batch(seed=0, row=row, rows=1, context=10)
        assert scanned[-1:] == read
    assert sorted(scanned) == [0, 1, 2], "each once"


def test_starts_of_parts():
    positions = np.array([[0, 1, 0, 1, 2], [0, 0, 0, 1, 0], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3]])
    assert starts(positions).tolist() == [[0, 2, 5, 6, 7, 9, 10, 15, 16, *[20] * 7]]
    found = starts(positions, 2)
    assert found.dtype == np.int32
    assert found.tolist() == [[0, 2, 5, 6, 7, 9, 10, 10], [0, 5, 6, *[10] * 5]]
    assert starts(np.zeros((1, 3), np.int64)).tolist() == [[0, 1, 2, 3]]
    assert starts(np.zeros((1, 4), np.int64)).shape == (1, 8), "the end always stands behind them"


# -- the model --
MODELS = {
    "plain": {},
    "windows": {"window": 3, "window_pattern": "SL", "kv_heads": 1},
    "the token before": {"smear": True, "bigrams": 40, "value_embeddings": True, "attention_gate": True},
    "learned positions": {"positions": "learned"},
}
TOY = {"vocab_size": 30, "layers": 2, "heads": 2, "kv_heads": 2, "width": 16, "mlp_width": 24, "context": 12}


def stirred(config: GPTConfig, **arguments) -> GPT:
    model = GPT(config, **arguments)
    generator = np.random.default_rng(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(generator.normal(0, 0.3, p.shape)) + (p.ndim == 1))
    return model


def packed_rows() -> tuple[torch.Tensor, ...]:
    """Three rows of 12 tokens of a small text: inputs, targets, positions, documents, starts."""
    generator = np.random.default_rng(2)
    tokens = generator.integers(1, 30, 37).astype(np.uint16)
    tokens[[0, 4, 5, 8, 17, 31, 34]] = SEPARATOR  # documents of 14 tokens and of one; all are in
    made = DocumentRows(TokenStream([tokens]), SEPARATOR).batch(seed=0, row=0, rows=3, context=12)
    inputs, targets, positions, numbers, begins = map(torch.from_numpy, made)
    assert len(numbers.unique()) >= 8
    return inputs, targets, positions, numbers, begins


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5, 0.25)])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_are_their_documents_alone(name, weights):
    model = stirred(GPTConfig(**TOY | MODELS[name])).double()
    inputs, targets, positions, numbers, begins = packed_rows()
    where = documents_of(positions, numbers, begins, "torch")
    loss, next_token = race_loss(model(inputs, documents=where), targets, weights, documents=where)
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    alone = torch.zeros(len(weights), dtype=torch.float64)
    for number in numbers.unique():
        here = numbers == number
        logits, wanted = model(inputs[here][None])[0], targets[here]
        alone = alone + torch.stack([
            F.cross_entropy(logits[: max(0, len(wanted) - k)], wanted[k:], reduction="sum") for k in range(len(weights))
        ])  # fmt: skip
    alone = alone / torch.tensor([3 * (12 - k) for k in range(len(weights))])
    assert (next_token - alone[0]).abs() <= 1e-12
    total = (alone * torch.tensor(weights, dtype=torch.float64)).sum()
    assert (loss - total).abs() <= 1e-12
    theirs = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) <= 1e-12


def test_parts_of_a_batch_have_their_own_starts():
    """As train.gradients cuts them: losses of parts are the loss of the whole, whatever documents they have."""
    model = stirred(GPTConfig(**TOY)).double()
    inputs, targets, positions, numbers, _ = packed_rows()
    weights, whole = (1.0, 0.5), documents_of(positions, numbers, None, "torch")
    parts = [
        race_loss(model(i, documents=where), t, weights, documents=where)[0]
        for i, t, where in zip(inputs.split(1), targets.split(1),
                               map(Documents, positions.split(1), numbers.split(1)), strict=True)
    ]  # fmt: skip
    loss, _ = race_loss(model(inputs, documents=whole), targets, weights, documents=whole)
    assert (loss - sum(parts) / 3).abs() <= 1e-12


# -- attention by starts --
LENGTHS = [[5, 1, 18], [24], [1, 1, 7, 15]]
LONG = [[9, 150, 11]]  # more than one tile of queries


def attention_case(dtype, K=16, G=1, device="cpu", lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    B, T = len(lengths), sum(lengths[0])
    q, k, v, weight = (
        torch.randn(B, heads, T, K, generator=generator).to(device, dtype).requires_grad_() for heads in (2, G, G, 2)
    )
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    numbers = np.stack([np.repeat(np.arange(len(row)), row) for row in lengths])
    arrays = (torch.from_numpy(x).to(device) for x in (positions, numbers, starts(positions)))
    positions, numbers, begins = arrays
    return (q, k, v), weight.detach(), Documents(positions, numbers), begins[0]


def by_mask(qkv, weight, where, window):
    """In float64: output and gradients of q, k, v."""
    q, k, v = (x.detach().double().requires_grad_() for x in qkv)
    mask = where.mask(window)[:, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return [y, *torch.autograd.grad((y * weight.double()).sum(), (q, k, v))]


def check_packed(kernels, dtype, tolerance, window, *case):
    qkv, weight, where, begins = attention_case(dtype, *case)
    y = packed_attention(*qkv, starts=begins, window=window, kernels=kernels)
    ours = [y, *torch.autograd.grad((y.float() * weight.float()).sum(), qkv)]
    for ours_x, theirs_x in zip(ours, by_mask(qkv, weight, where, window), strict=True):
        assert ours_x.shape == theirs_x.shape
        assert (ours_x.double() - theirs_x).abs().max() <= tolerance


@pytest.mark.parametrize("window", [0, 4])
def test_packed_attention_is_the_dense_mask_in_triton(window):
    pytest.importorskip("triton")
    check_packed("triton", torch.float32, 2e-5, window)
    check_packed("triton", torch.float32, 2e-5, 10 * window, 16, 1, "cpu", LONG)


def test_packed_attention_is_the_dense_mask_in_cuda():
    pytest.importorskip("cuda._simt", reason="make native builds the kernels")
    check_packed("cuda", torch.bfloat16, 4e-2, 4, 64, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_packed_attention_is_the_dense_mask_on_a_gpu(kernels, window):
    check_packed(kernels, torch.bfloat16, 4e-2, window, 64, 1, "cuda")
    check_packed(kernels, torch.bfloat16, 4e-2, 10 * window, 128, 2, "cuda", LONG)


def test_a_gpt_by_starts_is_the_gpt_by_mask():
    pytest.importorskip("triton")
    config = {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": 12, "eval_stride": 6,
              "window": 4, "window_pattern": "SL", "documents": True, "mtp": "1,0.5"}  # fmt: skip
    models = [build(RaceConfig(**config, attention=attention), 30) for attention in ("torch", "triton")]
    models[0].load_state_dict(stirred(models[0].config).state_dict()), models[1].load_state_dict(models[0].state_dict())
    inputs, targets, *its = packed_rows()
    found = []
    for model, attention in zip(models, ("torch", "triton"), strict=True):
        where = documents_of(*its, attention)
        assert (where.starts is None) == (attention == "torch")
        loss, _ = race_loss(model(inputs, documents=where), targets, (1.0, 0.5), documents=where)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        plain = model(inputs)  # evaluation has no documents
        assert plain.isfinite().all()
    for by_starts, by_mask in zip(*found, strict=True):
        assert (by_starts - by_mask).abs().max() <= 2e-5 * max(1, by_mask.abs().max().item())


def test_other_documents_are_no_reason_to_compile_again():
    """Nor are fewer: starts of three documents and of more are of other shapes."""
    pytest.importorskip("triton")
    config = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": 12, "eval_stride": 6}
    model = build(RaceConfig(**config, documents=True, attention="triton"), 30)
    compilations = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=compilations, fullgraph=True, dynamic=False)
    inputs, _, positions, numbers, begins = packed_rows()
    plain = torch.arange(12).repeat(3, 1), torch.arange(3)[:, None].repeat(1, 12)
    orders = [torch.randperm(3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    widths = set()
    for order, its in [(order, (positions[order], numbers[order])) for order in orders] + [(orders[0], plain)]:
        begins = torch.from_numpy(starts(its[0].numpy()))
        widths.add(begins.shape[1])
        where = documents_of(*its, begins, "triton")
        found, expected = (each(inputs[order], documents=where) for each in (compiled, model))
        assert (found - expected).abs().max() <= 1e-5
    assert compilations.frame_count == 1 and len(widths) == 2


# -- the thread --
def test_the_prefetcher_carries_any_number_of_arrays():
    rows = DocumentRows(toy((300, 90)), SEPARATOR)

    def make(step):
        return rows.batch(seed=0, row=4 * step, rows=4, context=9, parts=2)

    with Prefetcher(make) as ahead:
        for step in (0, 1, 2, 20, 3):
            found, expected = ahead.next(step), make(step)
            assert len(found) == len(expected) == 5 and found[4].dtype == torch.int32
            assert all(np.array_equal(a.numpy(), b) for a, b in zip(found, expected, strict=True))
    for arrays in (1, 4):
        with Prefetcher(lambda step, arrays=arrays: [np.full(2, step)] * arrays) as ahead:
            assert [x.tolist() for x in ahead.next(7)] == [[7, 7]] * arrays


# -- whole races --
@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A smoke run in float32 over a folder of short documents, with what else a switch could get wrong."""
    texts = tmp_path_factory.mktemp("corpus")
    source = Path(json.decoder.__file__).read_text().splitlines(keepends=True)
    for number, line in enumerate(source):
        (texts / f"{number}.py").write_text(line + "pass\n")
    return replace(
        PRESETS["smoke"], corpus=str(texts), dtype="float32", device="cpu", steps=10, warmup=2, eval_every=5,
        checkpoint_every=5, eval_windows=4, documents=True, mtp="1,0.5", mtp_until=0.7, contexts="32,64", smear=True,
    )  # fmt: skip


def test_a_step_has_the_gradient_of_its_documents(config, tmp_path):
    config = replace(config, folder=tmp_path / "run", accumulate=2)
    run, notes = prepare(config, World(0, 1, 0, torch.device("cpu"), None))
    rows, dropped = run.documents.rows(64), run.documents.dropped(64)
    assert f"documents: {rows:,} rows in an epoch, {dropped:,} tokens left over" in notes
    run.model.load_state_dict(stirred(run.model.config).state_dict())
    now = plan(0, config)
    inputs, targets, positions, numbers, _ = given = [torch.from_numpy(part) for part in batches(run)(0)]
    assert len(numbers.unique()) > 2 * len(numbers), "short documents, or nothing is tested"
    nats, _ = gradients(run, now, *given)
    ours = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()
    where = Documents(positions, numbers)
    loss, next_token = race_loss(run.model(inputs, documents=where), targets, now.mtp, documents=where)
    loss.backward()
    assert now.mtp == (1.0, 0.5) and abs(nats - next_token) <= 1e-4
    assert all(
        (a - p.grad).abs().max() <= 1e-4 * max(1, p.grad.abs().max().item())
        for a, p in zip(ours, run.model.parameters(), strict=True)
    )


def test_held_out_documents_are_seen_alone_too(config, tmp_path):
    """Across documents it would be judged on what it never trained on; so it says another number there."""
    run = race(replace(config, folder=tmp_path / "run"), World(0, 1, 0, torch.device("cpu"), None))
    told = run.data.held_out, run.data.byte_lengths
    alone = partial(run.model, separator=run.data.tokenizer.separator)
    expected, across = (bits_per_byte(model, *told, context=64, stride=64) for model in (alone, run.model))
    assert abs(run.bits_per_byte - expected) <= 1e-6 and abs(across - expected) >= 1e-4


def raced(rank: int, world_size: int, config: RaceConfig) -> dict[str, torch.Tensor]:
    world = World(rank, world_size, rank, torch.device("cpu"), "gloo" if world_size > 1 else None)
    return {name: value.detach() for name, value in race(config, world).model.state_dict().items()}


def test_two_ranks_are_one_process(config, tmp_path):
    alone = raced(0, 1, replace(config, folder=tmp_path / "one"))
    both = spawn(raced, 2, replace(config, folder=tmp_path / "two", accumulate=2))
    for name, value in alone.items():
        assert torch.equal(both[0][name], both[1][name])
        error = (both[0][name] - value).abs().max().item()
        assert error <= 1e-3, f"{name}: {error}"
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    assert len(ours) == len(theirs) == 10
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_stopped_run_goes_on_to_the_same_bits(config, tmp_path, monkeypatch):
    whole = raced(0, 1, replace(config, folder=tmp_path / "whole"))
    update = train.update

    def pressed(run, now):
        update(run, now)
        if run.step == 6:  # of 10; the context changed after 5
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "update", pressed)
    with pytest.raises(KeyboardInterrupt):
        raced(0, 1, replace(config, folder=tmp_path / "parts"))
    monkeypatch.undo()
    resumed = raced(0, 1, replace(config, folder=tmp_path / "parts", resume=True))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    for name in ("whole", "parts"):
        assert len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) == 10


# -- refusals --
def test_what_is_refused(tmp_path, config):
    with pytest.raises(ValueError, match="documents and document_mask: expected one of them"):
        RaceConfig(documents=True, document_mask=True)
    with pytest.raises(ValueError, match=r"shard 0 of the training text holds no separator \(token 77777\)"):
        DocumentRows(toy((100,)), 77777)
    with pytest.raises(ValueError, match="holds no separator"):
        DocumentRows(TokenStream([]), SEPARATOR)
    later = TokenStream([toy((100,)).shards[0], np.arange(1, 60, dtype=np.uint32)])
    rows = DocumentRows(later, SEPARATOR)
    with pytest.raises(ValueError, match="shard 1 of the training text holds no separator"):
        rows.batch(seed=0, row=0, rows=rows.rows(10), context=10)
    rows = DocumentRows(toy((100,)), SEPARATOR)
    for row, count in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"{count} rows from row {row}: expected at least 1"):
            rows.batch(seed=0, row=row, rows=count, context=10)
    with pytest.raises(ValueError, match="the training text is 100 tokens: expected at least 101"):
        rows.batch(seed=0, row=0, rows=1, context=100)
    with pytest.raises(ValueError, match="a cache and documents: expected one of them"):
        tokens, numbers = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3)
        GPT(GPTConfig(**TOY))(tokens, cache=KVCache(1, 12), documents=Documents(numbers, numbers))


def test_the_longest_sequence_is_of_packed_ones():
    ops = pytest.importorskip("cuda.ops")
    (q, k, v), _, _, _ = attention_case(torch.bfloat16, K=64, G=2)
    with pytest.raises(ValueError, match="longest 24: expected a number of rows beside cu_seqlens"):
        ops.attention(q, k, v, longest=24)
    begins = torch.tensor([0, 72], dtype=torch.int32)
    with pytest.raises(ValueError, match="longest 0: expected a number of rows"):
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        ops.attention(q, k, v, cu_seqlens_q=begins, cu_seqlens_k=begins, longest=0)
