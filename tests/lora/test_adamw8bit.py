"""AdamW with 8-bit states: against a definition in float64 written here, torch's AdamW and bitsandbytes' AdamW8bit;
pages, states that are saved and loaded, groups, everything refused."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora import adamw8bit, nf4
from lora.adamw8bit import AdamW8bit, dequantise_blocks, quantise_blocks
from lora.nf4 import dynamic_codes
from lora.paged import block_bytes
from parallel.memory import LiveBytes
from tests.cuda.products import DEVICES

SIZES = [(40, 130), (4096,), (4095,), (7, 3), (), (0, 5), (64, 300)]  # 8 bits from 4096 numbers on; the first is odd
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
# One block a page, several parameters in one page, everything in one page.
PAGES = [block_bytes(True), 40 * block_bytes(True) + 3, 2**22]


def parameters(sizes=SIZES, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size in sizes]


def gradients(params, step):
    """Those of a step, a different scale for each row of numbers."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        g = torch.randn(p.shape, generator=generator) * torch.rand(p.shape[:1], generator=generator).mul(6).exp().view(
            -1, *[1] * (p.ndim - 1)
        ) if p.ndim else torch.randn((), generator=generator)  # fmt: skip
        p.grad = (g * 1e-3).to(p.device, p.dtype)


def train(params, optimizer, steps, start=0):
    for step in range(start, start + steps):
        gradients(params, step)
        optimizer.step()


def bits(tensors):
    return [x.detach().cpu().contiguous().flatten().view(torch.uint8).tolist() for x in tensors]


def states(optimizer):
    state = optimizer.state_dict()["state"]
    return {(p, name): x.clone() for p, values in state.items() for name, x in values.items()}


def same_states(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and bits([one[key]]) == bits([other[key]]) for key in one
    )


# ---- quantised blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_ones(signed):
    """By looking at all 256 in float64, from tiny to huge blocks, with a block of zeros."""
    codes = dynamic_codes(signed)
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-41, 38, 9)[:, None]
    x[4] = 0
    x = x if signed else x.abs()
    q, absmax = quantise_blocks(x, codes)
    assert q.dtype == torch.uint8 and torch.equal(absmax, x.abs().amax(1))
    scaled = (x.double() / absmax.double()[:, None]).nan_to_num()
    distances = (scaled[..., None] - codes.double()).abs()
    chosen = distances.gather(2, q.long()[..., None])[..., 0]
    assert (chosen - distances.amin(2) <= 1e-7).all()
    back = dequantise_blocks(q, absmax, codes)
    assert back[4].count_nonzero() == 0
    torch.testing.assert_close(back.abs().amax(1), absmax, rtol=0.01, atol=0)  # the lowest signed code is -0.993


@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(dynamic_codes(signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_bytes_are_those_of_bitsandbytes_but_at_borders(signed):
    """It looks codes up on 65,536 points, so next to a border it is off by 2**-16 and takes the neighbour."""
    functional = pytest.importorskip("bitsandbytes").functional
    codes = dynamic_codes(signed)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    x = x if signed else x.square()
    q, absmax = quantise_blocks(x, codes)
    theirs, state = functional.quantize_blockwise(x, code=codes, blocksize=256)
    assert torch.equal(absmax, state.absmax)
    apart = (codes[q.int()] - codes[theirs.int()]).abs()
    scaled = x / absmax[:, None]
    worse = (codes[theirs.int()] - scaled).abs() - (codes[q.int()] - scaled).abs()
    assert (q != theirs).float().mean() <= 0.05 and (worse <= 2**-15).all() and (apart <= 0.02).all()


# ---- the update ------------------------------------------------------------------------------------------------------


def rounded(x, codes):
    """A block of numbers as its 8-bit copy, by brute force."""
    absmax = max(abs(number) for number in x) if len(x) else 0.0
    return [absmax * min(codes, key=lambda code: abs(code - number / absmax)) if absmax else 0.0 for number in x]


def test_numbers_far_below_their_block_do_not_run_away():
    """Gradients of a block from e**-9 to e**9: packed as 0, their squares make steps of 10,000 learning rates."""
    generator = torch.Generator().manual_seed(0)
    p, scales = nn.Parameter(torch.zeros(64, 256)), torch.randn(64, 256, generator=generator).mul(3).exp()
    optimizer, most = AdamW8bit([p], lr=1.0, weight_decay=0.0), 0.0
    for _ in range(20):
        before, p.grad = p.detach().clone(), torch.randn(64, 256, generator=generator) * scales
        optimizer.step()
        most = max(most, (p.detach() - before).abs().max().item())
    assert most <= 3, most


def by_definition(p, history, lr, betas, eps, weight_decay):
    """p after the steps of `history`, in Python's float64, number by number and block by block."""
    eight = p.numel() >= 4096
    signed, unsigned = (dynamic_codes(kind).double().tolist() for kind in (True, False))
    w, m, v = p.detach().double().flatten().tolist(), [0.0] * p.numel(), [0.0] * p.numel()
    for step, g in enumerate(history, 1):
        for i, gradient in enumerate(g.double().flatten().tolist()):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * gradient
            v[i] = betas[1] * v[i] + (1 - betas[1]) * gradient**2
            w[i] -= lr * weight_decay * w[i]
            w[i] -= lr * (m[i] / (1 - betas[0] ** step)) / (math.sqrt(v[i] / (1 - betas[1] ** step)) + eps)
        if eight:
            for first in range(0, len(m), 256):
                block = slice(first, first + 256)
                m[block], v[block] = rounded(m[block], signed), rounded(v[block], unsigned[1:])
    return torch.tensor(w, dtype=torch.float64).view(p.shape)


def test_steps_are_the_definition():
    """Rarely float32 chooses the other of two codes, which are a few per cent of a number apart."""
    params = parameters([(17, 250), (5, 3)])
    starts, history = [p.detach().clone() for p in params], [[], []]
    optimizer = AdamW8bit(params, **OPTIONS)
    for step in range(4):
        gradients(params, step)
        for seen, p in zip(history, params, strict=True):
            seen.append(p.grad.clone())
        optimizer.step()
    for p, start, seen in zip(params, starts, history, strict=True):
        error = (p.detach().double() - by_definition(start, seen, **OPTIONS)).abs().flatten()
        assert error.quantile(0.999) <= 2e-6 and error.max() <= OPTIONS["lr"] / 4


def test_small_parameters_step_as_torch():
    """And the first step of large ones, whose states are zero before it."""
    params = parameters()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = AdamW8bit(params, **OPTIONS), torch.optim.AdamW(twins, **OPTIONS)
    for step in range(5):
        gradients(params, step)
        gradients(twins, step)
        ours.step()
        theirs.step()
        for p, twin in zip(params, twins, strict=True):
            if p.numel() < 4096 or step == 0:
                torch.testing.assert_close(p, twin, rtol=2e-6, atol=2e-7)
    for p, twin in zip(params, twins, strict=True):
        assert (p - twin).abs().mean().item() <= 0.2 * OPTIONS["lr"] or not p.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_bitsandbytes(monkeypatch, dtype):
    """With its look-up in place of the nearest code: bytes and parameters, but for codes at borders, where a product
    that is rounded once more decides."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def looked_up(x, codes):
        points = nf4.nearest((torch.arange(65536, dtype=torch.float64) * 2 / 65535 - 1).float(), codes)
        return points[(((x + 1) * 0.5).double() * 65535 + 0.5).float().long()]

    monkeypatch.setattr(adamw8bit, "nearest", looked_up)
    sizes = [(40, 130), (4096,), (64, 300)]
    params, twins = parameters(sizes, dtype), parameters(sizes, dtype)
    ours, theirs = AdamW8bit(params, **OPTIONS), bitsandbytes.optim.AdamW8bit(twins, **OPTIONS)
    for step in range(6):
        for some, optimizer in ((params, ours), (twins, theirs)):
            gradients(some, step)
            optimizer.step()
    for p, twin in zip(params, twins, strict=True):
        error = (p - twin).abs().float().flatten() / (1 + twin.abs().float().flatten())
        assert error.quantile(0.995) <= (2**-7 if dtype == torch.bfloat16 else 1e-6) and error.max() <= 2**-7
        for mine, its in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
            wrong = (ours.state[p][mine] != theirs.state[twin][its]).float().mean().item()
            assert wrong <= 1e-3, wrong


def test_half_precision_parameters_are_rounded_once():
    sizes = [(40, 130), (7, 3)]
    low, high = parameters(sizes, torch.bfloat16), parameters(sizes)
    for one, other in zip(low, high, strict=True):
        other.data.copy_(one)
    gradients(low, 0)
    for one, other in zip(low, high, strict=True):
        other.grad = one.grad.float()
    for some in (low, high):
        AdamW8bit(some, **OPTIONS).step()
    assert all(torch.equal(one, other.bfloat16()) for one, other in zip(low, high, strict=True))


def test_a_regression_comes_as_far_as_with_torch():
    """400 steps from noise; without the absmax or with a code too coarse it does not."""
    torch.manual_seed(0)
    x_NI, w_OI = torch.randn(256, 80), torch.randn(60, 80)
    losses = []
    for make in (AdamW8bit, torch.optim.AdamW):
        p = nn.Parameter(torch.zeros(60, 80))
        optimizer = make([p], lr=0.02, weight_decay=0.0)
        for _ in range(400):
            optimizer.zero_grad()
            loss = (x_NI @ (p - w_OI).T).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] <= 1e-2 and losses[1] <= 1e-2, losses


# ---- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("resident", [1, 2, 3])
def test_paged_is_the_same_bit_for_bit(device, page, resident):
    plain, paged = parameters(device=device), parameters(device=device)
    one, other = AdamW8bit(plain, **OPTIONS), AdamW8bit(paged, **OPTIONS, paged=True, page=page, resident=resident)
    train(plain, one, 3)
    train(paged, other, 3)
    assert bits(plain) == bits(paged) and same_states(states(one), states(other))
    host = [x for values in other.state.values() if "absmax" in values for x in values.values()]
    assert host and all(x.device.type == "cpu" for x in host)
    assert device == "cpu" or all(x.is_pinned() for x in host if x.ndim and x.numel())


class Copies(TorchDispatchMode):
    """Counts copies of bytes, by their numbers."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.copy_.default and args[0].dtype == torch.uint8:
            self.seen[args[1].dtype, args[0].numel()] += 1
        return operation(*args, **(kwargs or {}))


def test_each_page_comes_once_and_goes_once():
    sizes = [(4096,), (10, 1000), (4097,)]  # 16, 40 and 17 blocks: pages of 30 blocks 30, 30, 13
    params = parameters(sizes)
    optimizer = AdamW8bit(params, paged=True, page=30 * block_bytes(True))
    train(params, optimizer, 1)
    gradients(params, 1)
    with Copies() as copies:
        optimizer.step()
    # Two averages; in, packed again, and back.
    assert copies.seen == {(torch.uint8, 30 * 256): 2 * 2 * 3, (torch.uint8, 13 * 256): 2 * 3}
    params[0].grad = params[1].grad = None
    with Copies() as copies:
        optimizer.step()
    # The last parameter has 4 blocks of the second page; the first page has nothing to do.
    assert copies.seen == {
        (torch.uint8, 30 * 256): 2 * 2, (torch.uint8, 4 * 256): 2, (torch.uint8, 13 * 256): 2 * 3
    }  # fmt: skip


@pytest.mark.parametrize("paged", [False, True])
def test_the_device_holds_no_more_than_its_pages(paged):
    params = parameters([(64, 300), (64, 200), (7, 3)])
    optimizer = AdamW8bit(params, paged=paged, page=20 * block_bytes(True), resident=2)
    train(params, optimizer, 1)
    (large, small) = optimizer.laid_out[0]
    assert sum(x.nbytes for x in large.held.values()) == (75 + 50) * block_bytes(True)
    assert sum(x.nbytes for slot in large.slots for x in slot.values()) == 2 * 20 * block_bytes(True) * paged
    assert not small.slots and sum(x.nbytes for x in small.held.values()) == 8 * 21


@pytest.mark.parametrize("paged", [False, True])
def test_a_step_works_on_one_page_at_a_time(paged):
    """On 29 bytes for each of its numbers, whatever parameters they belong to."""
    params = parameters([(64, 300), (128, 200)])  # 175 blocks
    optimizer = AdamW8bit(params, paged=paged, page=20 * block_bytes(True))
    train(params, optimizer, 1)
    with LiveBytes() as live:
        optimizer.step()
        held = live.now()
    assert 0 < live.peak - held <= 30 * 20 * 256


# ---- as an optimizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True])
def test_saved_and_loaded_it_goes_on_to_the_same_bits(paged, tmp_path):
    """Through a checkpoint's file, from paged to not and back, and by deepcopy."""
    from minigpt.checkpoint import flatten, load_checkpoint, save_checkpoint, unflatten

    params = parameters()
    optimizer = AdamW8bit(params, **OPTIONS, paged=paged, page=PAGES[1])
    train(params, optimizer, 2)
    middle, before = [p.detach().clone() for p in params], states(optimizer)
    tensors, groups = flatten([optimizer.state_dict()])
    save_checkpoint(tmp_path, 2, {}, {"optimizer": tensors}, keep=1)
    twin_params, twin = copy.deepcopy((params, optimizer))
    train(params, optimizer, 2, start=2)
    read = unflatten(load_checkpoint(tmp_path)[0].tensors("optimizer"), groups)[0]
    for other_paged in (False, True):
        again = [nn.Parameter(p.clone()) for p in middle]
        other = AdamW8bit(again, lr=1, paged=other_paged)
        train(again, other, 1, start=7)  # what it has by itself is thrown away
        for p, value in zip(again, middle, strict=True):
            p.data.copy_(value)
        other.load_state_dict(read)
        assert same_states(states(other), before)
        train(again, other, 2, start=2)
        assert bits(again) == bits(params) and same_states(states(other), states(optimizer))
    train(twin_params, twin, 2, start=2)
    assert bits(twin_params) == bits(params) and twin.paging == optimizer.paging


def test_what_pads_a_block_has_no_say_after_loading():
    """The last number is alone in its block, and becomes smaller than its neighbours that are not there were."""
    params = [nn.Parameter(torch.zeros(4097))]
    optimizer = AdamW8bit(params)
    params[0].grad = torch.ones(4097)
    optimizer.step()
    (again,) = copy.deepcopy(params)
    other = AdamW8bit([again])
    other.load_state_dict(optimizer.state_dict())
    for p, stepper in ((params[0], optimizer), (again, other)):
        p.grad = torch.full((4097,), -0.5)
        stepper.step()
    assert bits([again]) == bits(params) and same_states(states(other), states(optimizer))
    assert optimizer.state[params[0]]["absmax"][-1].item() == pytest.approx(0.04, rel=1e-5)


@pytest.mark.parametrize("paged", [False, True])
def test_groups_have_their_own_rates_and_missing_gradients_leave_everything_alone(paged):
    """One optimizer with two groups, of which some parameters pause, is as many optimizers of one parameter each."""
    params, alone = parameters(), parameters()
    rates = [{"lr": 0.01, "weight_decay": 0.0}, {"lr": 0.05, "weight_decay": 0.3}]
    groups = [{"params": params[i::2], **rate} for i, rate in enumerate(rates)]
    together = AdamW8bit(groups, betas=(0.8, 0.95), paged=paged, page=PAGES[1])
    singles = [AdamW8bit([p], betas=(0.8, 0.95), **rates[i % 2]) for i, p in enumerate(alone)]
    for step in range(4):
        gradients(params, step)
        gradients(alone, step)
        for i, (one, other) in enumerate(zip(params, alone, strict=True)):
            if (i + step) % 3 == 0:
                one.grad = other.grad = None
        for optimizer in (together, *singles):
            for group in optimizer.param_groups:
                group["lr"] *= 0.5  # as a schedule does
            optimizer.step()
    assert bits(params) == bits(alone)


def test_in_minigpt_as_updates():
    """In the groups that minigpt makes, each with its peak, it trains a GPT."""
    from functools import partial

    from minigpt.model import GPT
    from minigpt.optim import Updates, make_optimizers
    from minigpt.train_config import TrainConfig
    from tests.parallel.gpts import SMALL

    config = TrainConfig(optimizer="adamw", weight_decay=0.1)
    updates = Updates(adamw_cls=partial(AdamW8bit, paged=True))
    model = GPT(SMALL)
    (optimizer,) = make_optimizers(model, config, updates=updates)
    assert isinstance(optimizer, AdamW8bit) and {g["peak_lr"] for g in optimizer.param_groups} >= {0.1, 0.01}
    tokens_BT = torch.randint(0, SMALL.vocab_size, (4, SMALL.context), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] <= 0.8 * losses[0], losses


def test_closure_and_added_groups():
    params = parameters([(64, 100)])
    optimizer = AdamW8bit(params, lr=0.1)
    assert optimizer.step(lambda: _backward(params[0])) == 6400.0
    late = parameters([(5000,)], seed=3)
    optimizer.add_param_group({"params": late})
    train([*params, *late], optimizer, 1)
    assert optimizer.state[late[0]]["exp_avg"].dtype == torch.uint8


def _backward(p):
    loss = (p - p.detach() + 1).sum()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e25])
def test_a_block_with_a_broken_gradient_becomes_nan(value):
    """A square that overflows would divide by infinity from then on: 256 numbers that stop, and nobody sees it."""
    (p,) = parameters([(64, 100)])
    optimizer = AdamW8bit([p])
    for step in range(2):
        gradients([p], step)
        if step == 0:
            p.grad[3, 7] = value
        optimizer.step()
    assert p.isnan().sum() == 256 and p.view(-1)[256:512].isnan().all()


def test_bitsandbytes_has_no_square_of_zero_either():
    """On a CPU, where it looks up a point next to 0."""
    functional = pytest.importorskip("bitsandbytes").functional
    codes = dynamic_codes(signed=False)
    x = torch.cat([torch.ones(1), torch.zeros(254), torch.full((1,), 1e-9)])[None]
    theirs = functional.quantize_blockwise(x, code=codes, blocksize=256)[0]
    ours = quantise_blocks(x, codes, adamw8bit.LOWEST[1])[0]
    assert 0 < codes[ours[0, 1:].int()].max() < codes[theirs[0, 1:].int()].min() <= 2e-5


def test_rows_without_gradients_cost_little():
    """An embedding of which the frequent rows come often and others are zero for hundreds of steps: as near to its
    target as with torch's AdamW. With squares packed as 0 it is several times as far."""
    torch.manual_seed(0)
    target = torch.randn(400, 64)
    chances, far = 1 / torch.arange(1, 401.0), []
    for make in (AdamW8bit, torch.optim.AdamW):
        p, generator = nn.Parameter(torch.zeros(400, 64)), torch.Generator().manual_seed(1)
        optimizer, longest = make([p], lr=1e-2, weight_decay=0.0), 0.0
        for _ in range(200):
            rows = torch.multinomial(chances, 32, replacement=True, generator=generator)
            before, p.grad = p.detach().clone(), torch.zeros(400, 64)
            p.grad.index_add_(0, rows, (before - target)[rows] / 32)
            optimizer.step()
            longest = max(longest, (p.detach() - before).abs().max().item())
        assert longest <= 5e-2
        far.append(((p.detach() - target).square().mean(1) * chances).sum().item() / chances.sum().item())
    assert far[0] <= 1.1 * far[1] <= 0.6, far


def test_gradients_stay_and_a_tensor_is_a_rate():
    """One parameter alone in its page, without a pad."""
    (p,), (twin,) = parameters([(4096,)]), parameters([(4096,)])
    for each, rate in ((p, 0.01), (twin, torch.tensor(0.01, dtype=torch.float64))):
        optimizer = AdamW8bit([each], lr=rate)
        train([each], optimizer, 1)
        before = each.grad.clone()
        optimizer.step()
        assert torch.equal(each.grad, before)
    torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)


def test_a_broken_gradient_is_seen():
    (p,) = parameters([(64, 100)])
    optimizer = AdamW8bit([p])
    gradients([p], 0)
    p.grad[3, 7] = math.nan
    optimizer.step()
    assert p.isnan().nonzero().tolist() == [[3, 7]]
    gradients([p], 1)
    optimizer.step()
    assert p.isnan().sum() == 256 and p.view(-1)[256:512].isnan().all()  # number 307 is in the second block


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr -1.0: expected a number of at least 0"),
        ({"lr": math.nan}, "lr nan"),
        ({"eps": -1e-8}, "eps -1e-08"),
        ({"weight_decay": math.inf}, "weight_decay inf"),
        ({"betas": (0.9, 1.0)}, r"betas \(0.9, 1.0\): expected two numbers from 0 to below 1"),
        ({"page": 519}, "page 519: expected at least 520 bytes"),
        ({"resident": 0}, "resident 0: expected at least 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW8bit(parameters(), **options)


def test_parameters_that_it_does_not_take():
    for wrong in (torch.zeros(3, dtype=torch.float64), torch.zeros(4, 5).T):
        with pytest.raises(ValueError, match="expected contiguous numbers of one of torch.float32"):
            AdamW8bit([nn.Parameter(wrong)])
    optimizer = AdamW8bit(parameters())
    with pytest.raises(ValueError, match="float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == 1
    sparse = nn.Embedding(10, 3, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse: expected a dense one"):
        AdamW8bit(sparse.parameters()).step()


def test_what_a_step_cannot_do(monkeypatch):
    (p,) = parameters([(64, 100)])
    optimizer = AdamW8bit([p])
    train([p], optimizer, 1)
    p.data = p.data.T
    before, p.grad = p.detach().clone(), torch.ones(100, 64)
    with pytest.raises(ValueError, match=r"parameter of shape \(100, 64\) is no longer contiguous"):
        optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="in a CUDA graph: expected it outside"):
        AdamW8bit(parameters()).step()


def test_states_of_another_optimizer():
    params = parameters([(64, 100)])
    theirs = torch.optim.AdamW(params)
    train(params, theirs, 1)
    ours = AdamW8bit(params)
    train(params, ours, 1)
    before = states(ours)
    with pytest.raises(ValueError, match="state of parameter 0 is .*exp_avg.*torch.float32.*: expected .*torch.uint8"):
        ours.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        AdamW8bit(parameters([(5000,), (3,)])).load_state_dict(ours.state_dict())
    assert same_states(states(ours), before)
