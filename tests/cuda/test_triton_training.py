"""Loss, embedding, AdamW and the norm of gradients in Triton, against torch in float64, through the public functions.

CPU tensors are interpreted. What the compiler makes for Hopper is read in the last part, which needs no GPU either.
"""

import copy
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="pip install triton")

from cuda import (
    loss_ops,
    optim,
    triton_adamw,
    triton_compat,
    triton_cross_entropy,
    triton_embedding,
    triton_grad_norm,
)
from cuda.device import place
from minigpt.model import mean_cross_entropy
from tests.cuda import sass
from tests.cuda.products import DEVICES, TOLERANCE, check, normal

TYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [{}, {"z_loss": 0.01}, {"softcap": 3.0}, {"softcap": 3.0, "z_loss": 0.01}]
TRITON = {"kernels": "triton"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def run(operation, **arguments):
    place(torch.device("cpu"), kernels="triton").run(operation, **arguments)


def wanted_loss(logits, targets, softcap=0.0, z_loss=0.0):
    logits = logits.double()
    return mean_cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets, z_loss)


def some_targets(rows, words, device="cpu", ignored=True):
    targets = torch.randint(words, (rows,))
    if ignored and rows > 2:
        targets[1] = -100
    return targets.to(device)


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


def check_cross_entropy(logits, targets, **options):
    """Loss, gradient by autograd, and the loss that overwrites the logits by their gradient."""
    rows, dtype = len(logits), logits.dtype
    logits = logits.requires_grad_()
    loss, wanted = loss_ops.cross_entropy(logits, targets, **options, **TRITON), wanted_loss(logits, targets, **options)
    assert loss.dtype == torch.float32
    check(loss, wanted, 1e-6)
    (gradient,) = torch.autograd.grad(loss * rows, logits)
    (wish,) = torch.autograd.grad(wanted * rows, logits)
    assert gradient.dtype == dtype
    check(gradient, wish, TOLERANCE[dtype])
    overwritten = logits.detach().clone()
    check(loss_ops.cross_entropy_(overwritten, targets, scale=rows, **options, **TRITON), wanted, 1e-6)
    check(overwritten, wish, TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows, words", [(1, 1), (3, 7), (5, 127), (4, 1000), (3, 8200)])
def test_cross_entropy(device, options, dtype, rows, words):
    logits = (2 * normal(rows, words, device=device)).to(dtype)
    check_cross_entropy(logits, some_targets(rows, words, device), **options)


@pytest.mark.parametrize("dtype, words", [(torch.float32, 9001), (torch.bfloat16, 20005), (torch.bfloat16, 16384)])
def test_rows_of_many_blocks_that_start_anywhere(dtype, words):
    """Rows that are no multiple of 16 bytes are each cut elsewhere. Targets at both ends and where blocks meet."""
    logits = normal(4, words).to(dtype)
    check_cross_entropy(logits, torch.tensor([0, words - 1, 8191, 8193]), softcap=10.0)


def test_the_reference_is_what_the_operation_computes():
    logits, targets = normal(4, 33), some_targets(4, 33)
    losses, statistics, scales = torch.empty(4), torch.empty(4, 2), torch.tensor([0.7, 0.2])
    options = {"softcap": 2.0, "ignore_index": -100}
    wanted, wish = triton_cross_entropy.reference(logits.double(), targets, (0.7, 0.2), **options)
    given = {"logits": logits, "targets": targets, "scales": scales, "skip_ignored": False, **options}
    for operation in ("cross_entropy", "cross_entropy_gradient"):
        gradient = torch.full_like(logits, math.nan)
        extra = {"loss": losses} if operation == "cross_entropy" else {}
        run(operation, gradient=gradient, statistics=statistics, **given, **extra)
        check(gradient, wish, 1e-6)
    check(losses, wanted, 1e-6)
    capped = 2 * torch.tanh(logits / 2)
    check(statistics[:, 0], capped.amax(1), 1e-6)
    check(statistics[:, 1], (capped - capped.amax(1, keepdim=True)).exp().sum(1), 2e-6)


@pytest.mark.parametrize("magnitude", [1e4, 1e30])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_large_logits_keep_their_precision(magnitude, softcap):
    """Differences of a few between logits of 10^4: float32 of their log-sum-exp alone would be off by 5e-4."""
    targets = some_targets(4, 100)
    for logits in (magnitude + 4 * normal(4, 100), magnitude * normal(4, 100)):
        logits.requires_grad_()
        loss = loss_ops.cross_entropy(logits, targets, softcap=softcap, **TRITON)
        wanted = wanted_loss(logits, targets, softcap)
        check(loss, wanted, 1e-6)
        check(*(torch.autograd.grad(4 * x, logits)[0] for x in (loss, wanted)), 2e-6)


@pytest.mark.parametrize("fill", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("whole_row", [False, True])
def test_logits_that_are_not_finite(fill, whole_row):
    logits = normal(3, 40)
    logits[1, slice(None) if whole_row else slice(5, 20)] = fill
    targets = torch.tensor([1, 2, 3])
    logits.requires_grad_()
    loss, wanted = loss_ops.cross_entropy(logits, targets, **TRITON), F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, wanted, equal_nan=True)
    gradients = (torch.autograd.grad(x, logits)[0] for x in (loss, wanted))
    torch.testing.assert_close(*gradients, equal_nan=True, atol=1e-6, rtol=1e-5)


def test_nothing_to_learn_from():
    """Without targets that count the loss is NaN and the gradient zero, as torch has it; with z_loss that is left."""
    for rows in (0, 3):
        logits, targets = normal(rows, 9, grad=True), torch.full((rows,), 5)
        loss = loss_ops.cross_entropy(logits, targets, ignore_index=5, **TRITON)
        assert loss.isnan()
        assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(rows, 9))
        x, weight = normal(rows, 4, grad=True), normal(9, 4, grad=True)
        loss = loss_ops.linear_cross_entropy(x, weight, targets, ignore_index=5, **TRITON)
        assert loss.isnan()
        for gradient in torch.autograd.grad(loss, (x, weight)):
            assert gradient.eq(0).all()
    wanted = 0.1 * logits.logsumexp(1).square().mean()
    loss = loss_ops.cross_entropy(logits, targets, ignore_index=5, z_loss=0.1, **TRITON)
    check(*(torch.autograd.grad(x, logits)[0] for x in (loss, wanted)), 1e-6)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_apart_and_targets_of_32_bits(dtype):
    wide = normal(2, 3, 50, dtype=dtype)
    logits, targets = wide[..., 3:40].requires_grad_(), torch.randint(37, (2, 3))
    loss = loss_ops.cross_entropy(logits, targets.int(), **TRITON)
    wanted = wanted_loss(logits.reshape(6, 37), targets.reshape(6))
    check(loss, wanted, 1e-6)
    check(*(6 * torch.autograd.grad(x, logits)[0].double() for x in (loss, wanted)), TOLERANCE[dtype])


def raw_arguments(**changed):
    """Of the operation: 3 rows of 20 words."""
    given = {"logits": normal(3, 20), "targets": torch.tensor([0, 19, 4]), "softcap": 0.0}
    return given | {"ignore_index": -100, "skip_ignored": True} | changed


@pytest.mark.parametrize("ignored", [False, True])
def test_nothing_is_written_beside_a_gradient_that_lies_otherwise(ignored):
    """Where logits and gradient do not share their multiples of 16 bytes; and rows that are zero."""
    given = raw_arguments(statistics=torch.empty(3, 2), scales=torch.tensor([1.0, 0.0]))
    given["targets"][1] = -100 if ignored else 3
    memory = torch.full((3, 31), math.nan)
    logits = given["logits"].double().requires_grad_()
    total = F.cross_entropy(logits, given["targets"], reduction="sum")
    (wish,) = torch.autograd.grad(total, logits)
    for operation, first in (("cross_entropy", 5), ("cross_entropy_gradient", 6)):
        memory.fill_(math.nan)
        run(operation, gradient=memory[:, first : first + 20], **given)
        check(memory[:, first : first + 20], wish, 2e-6)
        assert memory.isnan().sum() == 33


def test_a_target_outside_is_refused_and_on_a_gpu_becomes_nan():
    logits = normal(3, 20)
    for wrong in (20, -1, 1 << 40):
        targets = torch.tensor([0, wrong, 4])
        calls = (
            lambda t: loss_ops.cross_entropy(logits, t, **TRITON),
            lambda t: loss_ops.cross_entropy_(logits, t, **TRITON),
            lambda t: loss_ops.linear_cross_entropy(logits, torch.zeros(20, 20), t, **TRITON),
        )
        for call in calls:
            with pytest.raises(ValueError, match=f"target {wrong}: expected 0 to 19, or ignore_index -100"):
                call(targets)
        loss, gradient = torch.empty(3), torch.empty(3, 20)
        run("cross_entropy", **raw_arguments(targets=targets, gradient=gradient, loss=loss))
        assert loss.isnan().tolist() == [False, True, False]
        assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, True, False]


# ---- the head and the cross-entropy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype, words, chunk, options",
    [
        (torch.float32, 33, 7, {}),
        (torch.float32, 50, None, {"softcap": 3.0, "z_loss": 0.01}),
        (torch.bfloat16, 33, 16, {"softcap": 3.0}),
        (torch.bfloat16, 136, 11, {"z_loss": 0.01}),
        (torch.float16, 64, 16, {}),
    ],
)
def test_linear_cross_entropy(device, dtype, words, chunk, options):
    rows, channels = 20, 24
    x = normal(4, 5, channels, dtype=dtype, device=device, grad=True)
    weight = normal(words, channels, dtype=dtype, device=device, grad=True)
    bias = normal(words, dtype=dtype, device=device, grad=True)
    targets = some_targets(rows, words, device)
    options_here = {"bias": bias, "chunk_rows": chunk, **TRITON, **options}
    loss = loss_ops.linear_cross_entropy(x, weight, targets.view(4, 5), **options_here)
    logits = x.double().view(rows, channels) @ weight.double().mT + bias.double()
    wanted = wanted_loss(logits, targets, **options)
    tolerance = 2e-6 if dtype == torch.float32 else 4 * TOLERANCE[dtype]
    check(loss, wanted, tolerance)
    leaves = (x, weight, bias)
    gradients, wishes = (torch.autograd.grad(rows * value, leaves) for value in (loss, wanted))
    for leaf, gradient, wish in zip(leaves, gradients, wishes, strict=True):
        assert gradient.dtype == leaf.dtype
        check(gradient, wish, tolerance)


class Live(TorchDispatchMode):
    """How many bytes were alive at most of what was made inside, and of which an operation gave a tensor."""

    def __init__(self, *given):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.made, self.most = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.made = [made for made in self.made if made() is not None]
        self.made += [weakref.ref(x) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        storages = [made().untyped_storage() for made in self.made]
        sizes = {x.data_ptr(): x.nbytes() for x in storages if x.data_ptr() not in self.given}
        self.most = max(self.most, sum(sizes.values()))
        return result


def test_peak_memory_is_below_an_eighth_of_the_unfused():
    """Unfused there are the logits and their gradient at least. Here everything counts, with the gradients that come
    out. From 2048 rows on, which are too many for an interpreter, chunks have an eighth of the rows by themselves."""
    rows, words, channels, dtype = 128, 1000, 4, torch.bfloat16
    x, weight = normal(rows, channels, dtype=dtype), normal(words, channels, dtype=dtype)
    targets = some_targets(rows, words)
    with Live(x, weight, targets) as live:
        op = loss_ops._linear_cross_entropy._init_fn
        op(x, weight, targets, None, 0.0, 0.0, -100, rows // 8, True, True, "triton")
    logits = rows * words * x.element_size()
    assert logits / 8 < live.most <= 2 * logits / 8
    assert all(8 * loss_ops.rows_of_chunk(n) <= n for n in range(2048, 40000, 1000))


# ---- embedding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count, entries, columns", [(1, 1, 1), (130, 7, 3), (300, 90, 16), (200, 3, 33), (65, 9, 700)])
def test_embedding(device, dtype, count, entries, columns):
    table = normal(entries, columns, dtype=dtype, device=device, grad=True)
    tokens = torch.randint(entries, (count,))
    tokens[torch.rand(count) < 0.5] = entries // 2  # one that is in many pieces
    tokens = tokens.to(device)
    upstream = normal(count, columns, dtype=dtype, device=device)
    wanted, wish = triton_embedding.reference(tokens.cpu(), table.detach().cpu(), upstream.cpu())
    rows = loss_ops.embedding(tokens, table, **TRITON)
    assert torch.equal(rows.cpu(), wanted)
    (gradient,) = torch.autograd.grad(rows, table, upstream)
    assert gradient.dtype == dtype
    check(gradient.cpu(), wish, TOLERANCE[dtype])


def test_the_embeddings_gradient_has_the_bits_of_the_kernels_in_cuda():
    """Both add the same numbers in the same order."""
    pytest.importorskip("cuda._simt", reason="make native builds the kernels")
    table, tokens = normal(7, 40, dtype=torch.bfloat16, grad=True), torch.randint(7, (300,)) // 2
    upstream = normal(300, 40, dtype=torch.bfloat16)
    each = [loss_ops.embedding(tokens, table, kernels=kernels) for kernels in ("cuda", "triton")]
    first, second = (torch.autograd.grad(rows, table, upstream)[0] for rows in each)
    assert torch.equal(first, second)


@pytest.mark.parametrize("lengths", [[64, 64, 64], [63, 1, 64, 130, 62], [200], [1] * 70, [10, 54, 1, 127]])
def test_segments_that_end_where_pieces_do(lengths):
    """Sums of ones count the tokens: exact in float32."""
    tokens = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = tokens[torch.randperm(len(tokens))]
    table = torch.zeros(len(lengths) + 2, 5, requires_grad=True)
    loss_ops.embedding(tokens, table, **TRITON).sum().backward()
    assert table.grad[:, 0].tolist() == table.grad[:, 4].tolist() == [*lengths, 0, 0]


def test_embedding_of_no_tokens_of_a_batch_of_32_bits_and_of_rows_that_start_anywhere():
    table = normal(5, 4, grad=True)
    tokens = torch.randint(5, (2, 3), dtype=torch.int32)
    assert torch.equal(loss_ops.embedding(tokens, table, **TRITON), table[tokens.long()])
    rows = loss_ops.embedding(tokens[:, :0], table, **TRITON)
    assert rows.shape == (2, 0, 4)
    assert torch.equal(torch.autograd.grad(rows.sum(), table)[0], torch.zeros(5, 4))
    table = normal(16 * 20).view(16, 20).mT
    assert torch.equal(loss_ops.embedding(tokens, table, **TRITON), table[tokens.long()])
    table = off_by_one(table)
    assert torch.equal(loss_ops.embedding(tokens, table, **TRITON), table[tokens.long()])


@pytest.mark.parametrize("dtype", TYPES)
def test_tokens_outside_give_nan_and_no_gradient(dtype):
    """What a GPU does, where no one looks at the tokens first. Numbers that are not finite stay where they are."""
    table, tokens = normal(4, 8, dtype=dtype), torch.tensor([3, -1, 0, 4])
    table[3, 2], table[0, 5] = math.inf, math.nan
    rows, gradient = torch.zeros(4, 8, dtype=dtype), torch.zeros(4, 8, dtype=dtype)
    run("embedding", table=table, tokens=tokens, rows=rows)
    torch.testing.assert_close(rows[[0, 2]], table[[3, 0]], rtol=0, atol=0, equal_nan=True)
    assert rows[[1, 3]].isnan().all()
    ordered, places = tokens.int().sort()
    partial = torch.zeros(1, 2, 8)
    run("embedding_backward", gradient=gradient, rows=table, tokens=ordered, places=places, partial=partial)
    torch.testing.assert_close(gradient[[3, 0]], table[[0, 2]], rtol=0, atol=0, equal_nan=True)
    assert gradient[1:3].eq(0).all()


# ---- AdamW -----------------------------------------------------------------------------------------------------------


def off_by_one(x):
    """The same numbers at an address that is no multiple of 16."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


SIZES = [(1,), (3, 5), (7,), (1024,), (2, 4609), (3, 700), (0, 4), ()]


def parameters_of(sizes, device="cpu", dtype=torch.float32):
    """Each third one starts off a multiple of 16 bytes."""
    made = [normal(*size, device=device, dtype=dtype) for size in sizes]
    return [(off_by_one(x) if i % 3 == 2 else x).requires_grad_() for i, x in enumerate(made)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torchs(device, weight_decay):
    ours = parameters_of(SIZES, device)
    theirs = [p.detach().double().requires_grad_() for p in ours]
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizers = optim.AdamW(ours, **options, **TRITON), torch.optim.AdamW(theirs, **options)
    for step in range(3):
        for number, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            there = number != 1 or step > 0  # one joins later, and has another number of steps
            p.grad = normal(*p.shape, device=device) if there else None
            if number == 3:
                p.grad = off_by_one(p.grad)
            q.grad = p.grad.double() if there else None
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            if p.numel():
                check(p.detach(), q.detach(), 1e-6)
    for p, q in zip(ours, theirs, strict=True):
        mine, other = optimizers[0].state[p], optimizers[1].state[q]
        assert mine["step"] == other["step"]
        for key in ("exp_avg", "exp_avg_sq") if p.numel() else ():
            check(mine[key], other[key], 1e-6)


def test_adamw_of_mixed_types():
    """A parameter of two bytes is its float32 copy, rounded; that goes as a float32 parameter would."""
    ours = [normal(35, dtype=dtype) for dtype in TYPES for _ in range(2)] + [normal(2100, dtype=torch.bfloat16)]
    ours = [(off_by_one(x) if i % 2 else x).requires_grad_() for i, x in enumerate(ours)]
    theirs = [p.detach().float().requires_grad_() for p in ours]
    optimizers = optim.AdamW(ours, lr=1e-2, **TRITON), torch.optim.AdamW(theirs, lr=1e-2)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = normal(*p.shape, dtype=p.dtype)
            q.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        exact = optimizers[0].state[p]["master"] if p.dtype != torch.float32 else p.detach()
        check(exact, q.detach(), 1e-6)
        assert torch.equal(p.detach(), exact.to(p.dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_adamw_with_gradients_of_another_type(dtype):
    """The kernel takes them; torch sets no such gradient on a float32 parameter, so the table says it."""
    p, g, m, v = normal(1500), normal(1500, dtype=dtype), normal(1500), normal(1500).square()
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1, "count": 3}
    wanted = triton_adamw.reference(*(x.double() for x in (p, g, m, v)), **numbers)
    places = [x.data_ptr() for x in (p, g, m, v)]
    table = torch.tensor([[*places, 0, 1500, 0, optim.TYPES[dtype]]])
    run(
        "adamw",
        tensors=table,
        chunks=torch.zeros(1, 2, dtype=torch.int32),
        memory=[p, g, m, v],
        decay=1 - 0.1 * 0.1,
        beta1_rest=0.1,
        beta2=0.99,
        beta2_rest=0.01,
        step=0.1 / (1 - 0.9**3),
        root_inverse=(1 - 0.99**3) ** -0.5,
        eps=1e-6,
    )
    for got, want in zip((p, m, v), wanted, strict=True):
        check(got, want, 1e-6)


def test_a_copy_of_an_optimizer_keeps_its_kernels(monkeypatch):
    p = normal(10, grad=True)
    optimizer, ran = optim.AdamW([p], **TRITON), []
    monkeypatch.setattr(triton_adamw, "adamw", lambda place, **arguments: ran.append(place.kind))
    for each in (optimizer, copy.deepcopy(optimizer)):
        for q in each.param_groups[0]["params"]:
            q.grad = normal(10)
        each.step()
    assert ran == ["interpreter", "interpreter"]


# ---- the norm of gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_clipping_equals_torchs(device, dtype, max_norm):
    ours = parameters_of([*SIZES, (20000,)], device, dtype)
    theirs = [p.detach().double().requires_grad_() for p in ours]
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        p.grad = normal(*p.shape, device=device, dtype=dtype)
        q.grad = p.grad.double()
        if i % 2 and p.numel():
            p.grad = off_by_one(p.grad)
    wanted, wish = triton_grad_norm.reference([q.grad for q in theirs], max_norm)
    before = [p.grad.clone() for p in ours]
    norm, factor = optim.grad_norm(ours, max_norm, **TRITON)
    assert all(map(torch.equal, before, (p.grad for p in ours)))
    clipped = optim.clip_grad_norm_(ours, max_norm, **TRITON)
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.shape == () and torch.equal(norm, clipped)
    check(norm / wanted, torch.ones_like(wanted), 1e-6)
    check(factor, wish, 1e-6)
    for p, q in zip(ours, theirs, strict=True):
        if p.numel():
            check(p.grad, q.grad, TOLERANCE[dtype])


def test_the_norm_of_many_chunks():
    """Of more than one program adds up at once; 9001 chunks of gradients would be too many here."""
    sums, norm, factor = torch.rand(9001), torch.empty(()), torch.empty(())
    total, block = triton_grad_norm.total_norm, triton_grad_norm.TOTAL
    assert len(sums) > 2 * block
    total[(1,)](sums, len(sums), 3.0, norm, factor, BLOCK=block)
    check(norm, sums.double().sum().sqrt(), 1e-6)
    check(factor, 3.0 / norm.double(), 1e-6)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_gradients_that_are_not_finite(value):
    ours, theirs = (torch.zeros(9, requires_grad=True) for _ in range(2))
    ours.grad = normal(9)
    ours.grad[4] = value
    theirs.grad = ours.grad.clone()
    norms = optim.clip_grad_norm_(ours, 1.0, **TRITON), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(*norms, equal_nan=True)
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)


def test_clipping_within_the_step():
    ours = parameters_of(SIZES)
    for p in ours:
        p.grad = 10 * normal(*p.shape)
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()
    optim.AdamW(ours, lr=0.1, eps=0.1, **TRITON).step(factor=optim.grad_norm(ours, 1.0, **TRITON)[1])
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.AdamW(theirs, lr=0.1, eps=0.1).step()
    for p, q in zip(ours, theirs, strict=True):
        if p.numel():
            check(p.detach(), q.detach(), 1e-6)
    assert optim.clip_grad_norm_([], 1.0, **TRITON) == 0


@pytest.mark.parametrize("factor", [torch.ones(2), torch.ones((), dtype=torch.bfloat16), torch.ones((), device="meta")])
def test_a_factor_that_the_kernel_would_misread(factor):
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"factor is .*: expected a torch.float32 of shape \(\) on cpu"):
        optim.AdamW([p], lr=0.1, **TRITON).step(factor=factor)
    assert (p == 0).all()


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_two_devices(kernels):
    """Of two GPUs a kernel would read whatever lies at that address of its own."""
    x, words, targets = normal(4, 8), normal(5, 8), torch.zeros(4, dtype=torch.int64)
    away, options = targets.to("meta"), {"kernels": kernels}
    for name, function, given in (
        ("targets", loss_ops.cross_entropy, (x, away)),
        ("targets", loss_ops.cross_entropy_, (x, away)),
        ("targets", loss_ops.linear_cross_entropy, (x, words, away)),
        ("weight", loss_ops.linear_cross_entropy, (x, words.to("meta"), targets)),
        ("tokens", loss_ops.embedding, (away, words)),
    ):
        with pytest.raises(ValueError, match=f"{name} is on meta, .* on cpu: expected one device"):
            function(*given, **options)
    with pytest.raises(ValueError, match="bias is on meta"):
        loss_ops.linear_cross_entropy(x, words, targets, bias=words[:, 0].to("meta"), **options)


# ---- torch.library, and what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, weight = normal(6, 8, device=device, grad=True), normal(10, 8, device=device, grad=True)
    targets, bias = some_targets(6, 8, device), normal(10, device=device, grad=True)
    statistics = torch.ones(6, 2, device=device)
    one, rows = torch.ones((), device=device), x.detach()
    samples = [
        (loss_ops._cross_entropy, (x, targets, 2.0, 0.1, -100, "triton")),
        (loss_ops._cross_entropy_gradient, (one, rows, targets, statistics, one, 2.0, 0.1, -100, "triton")),
        (loss_ops._linear_cross_entropy, (x, weight, targets, bias, 2.0, 0.1, -100, 4, True, True, "triton")),
        (loss_ops._embedding, (targets.clamp(min=0), weight, "triton")),
        (loss_ops._embedding_backward, (rows, targets.clamp(min=0), 9, "triton")),
    ]
    for operation, arguments in samples:
        assert set(torch.library.opcheck(operation, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "call",
    [
        lambda x, t: loss_ops.cross_entropy(x, t, kernels="no"),
        lambda x, t: loss_ops.cross_entropy_(x, t, kernels="no"),
        lambda x, t: loss_ops.linear_cross_entropy(x, x, t, kernels="no"),
        lambda x, t: loss_ops.embedding(t, x, kernels="no"),
        lambda x, t: optim.AdamW([x], kernels="no"),
        lambda x, t: optim.clip_grad_norm_([x], 1.0, kernels="no"),
        lambda x, t: optim.grad_norm([], 1.0, kernels="no"),
    ],
)
def test_other_kernels_are_refused(call):
    with pytest.raises(ValueError, match="kernels 'no': expected one of cuda, triton"):
        call(normal(3, 4), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, t: loss_ops.cross_entropy(x.double(), t, **TRITON), "logits is torch.float64"),
        (lambda x, t: loss_ops.cross_entropy(x, t, softcap=-1.0, **TRITON), "softcap -1.0"),
        (lambda x, t: loss_ops.cross_entropy_(x[:, :3].mT, t.new_tensor([0, 1, 2]), **TRITON), "rows without gaps"),
        (lambda x, t: loss_ops.linear_cross_entropy(x, x[:, :2], t, **TRITON), r"weight \(3, 2\)"),
        (lambda x, t: loss_ops.embedding(t + 1, x, **TRITON), "token 3: expected 0 to 2"),
        (lambda x, t: optim.AdamW([x.double()], **TRITON), "torch.float64"),
        (lambda x, t: optim.clip_grad_norm_([x], math.nan, **TRITON), "max_norm nan"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(3, 4), torch.tensor([0, 1, 2]))


# ---- what the compiler makes for Hopper ------------------------------------------------------------------------------


def compiled(call, folder):
    """(PTX, machine code or None) of each kernel that call() would launch on a Hopper GPU."""
    with triton_compat.compiling(90) as found:
        call()
    code = {}
    for each in found:
        machine = None
        if not sass.missing("cuobjdump", "nvdisasm"):
            (folder / each.name).write_bytes(each.kernel.asm["cubin"])
            (machine,) = sass.disassemble(folder / each.name, sass.kernels(folder / each.name))
        code[each.name] = each.kernel.asm["ptx"], machine
    return code


def check_code(code, loads, registers, stores=1):
    """16 bytes at a time, and nothing in local memory: at least so many loads and stores, registers at most."""
    ptx, machine = code
    assert ".local" not in ptx
    assert ptx.count("ld.global.v4.b32") + ptx.count("ld.global.v2.b64") + ptx.count("0x10, ") >= loads
    if machine is None:
        return
    assert sass.memory_faults(machine) == []
    assert machine.registers <= registers
    assert machine.count(r"LDG\.E.*\.128") + machine.count(r"LDGSTS\.E.*\.128") >= loads
    assert machine.count(r"STG\.E.*\.128") >= stores


@pytest.mark.parametrize("words", [50304, 50257])
def test_cross_entropy_for_hopper(tmp_path, words):
    """Sixteen warps of 64 registers: two rows are at work on a multiprocessor. A row that does not start at a multiple
    of 16 bytes is read so all the same, but for its ends."""
    logits, targets = torch.zeros(4, words, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
    code = compiled(lambda: loss_ops.cross_entropy_(logits, targets, **TRITON), tmp_path)
    check_code(code["one_pass"], loads=4, registers=64, stores=2)
    call = loss_ops._cross_entropy._init_fn
    code = compiled(lambda: call(logits, targets, 0.0, 0.0, -100, "triton"), tmp_path)
    check_code(code["one_pass"], loads=2, registers=64, stores=0)
    one = torch.ones(())
    call = loss_ops._cross_entropy_gradient._init_fn
    code = compiled(lambda: call(one, logits, targets, torch.ones(4, 2), one, 0.0, 0.0, -100, "triton"), tmp_path)
    check_code(code["gradient_alone"], loads=2, registers=64, stores=2)


def test_embedding_for_hopper(tmp_path):
    table, tokens = torch.zeros(100, 768, dtype=torch.bfloat16), torch.zeros(200, dtype=torch.int64)
    code = compiled(lambda: loss_ops._embedding._init_fn(tokens, table, "triton"), tmp_path)
    check_code(code["look_up"], loads=4, registers=64, stores=4)
    rows = torch.zeros(200, 768, dtype=torch.bfloat16)
    code = compiled(lambda: loss_ops._embedding_backward._init_fn(rows, tokens, 100, "triton"), tmp_path)
    check_code(code["add_partial"], loads=4, registers=64)
    check_code(code["sum_pieces"], loads=8, registers=64)  # seven on their way before the first is added
    assert "cp.async" in code["sum_pieces"][0]


def test_optimizers_for_hopper(tmp_path):
    p = normal(10000, grad=True)
    p.grad = normal(10000)
    optimizer = optim.AdamW([p], **TRITON)
    check_code(compiled(optimizer.step, tmp_path)["adamw_chunks"], loads=4, registers=80, stores=4)
    code = compiled(lambda: optim.clip_grad_norm_([p], 1.0, **TRITON), tmp_path)
    check_code(code["chunk_squares"], loads=8, registers=128, stores=0)
    check_code(code["chunk_scale"], loads=6, registers=80, stores=6)
