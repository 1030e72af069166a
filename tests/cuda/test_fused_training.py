"""Loss, embedding, AdamW and the norm of gradients by our kernels, against torch in float64 and torch's own.

Each kernel also runs under adversarial schedules, where results must not change by a bit, and in the checked build.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("cuda._simt", reason="make native builds the kernels")
pytest.importorskip("cuda._simt_checked", reason="make native builds the kernels")

from cuda import _simt, _simt_checked, loss_ops, optim
from cuda import device as device_of
from minigpt.model import mean_cross_entropy
from tests.cuda.products import DEVICES, TOLERANCE, check, normal

SCHEDULES = [("fifo", "lazy"), ("reverse", "random"), ("random", "eager"), ("priority", "lazy")]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [{}, {"z_loss": 0.01}, {"softcap": 3.0}, {"softcap": 3.0, "z_loss": 0.01}]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def checked():
    """Operations run in the checked build, which raises where a kernel makes a mistake."""
    with device_of.model("_simt_checked"):
        yield


def capped(logits, softcap=0.0):
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def reference(logits, targets, softcap=0.0, z_loss=0.0):
    return mean_cross_entropy(capped(logits.double(), softcap), targets, z_loss)


def some_targets(rows, words, device="cpu", ignored=True):
    targets = torch.randint(words, (rows,))
    if ignored and rows > 2:
        targets[1] = -100
    return targets.to(device)


def under_schedules(run):
    """The tensors that run() gives under each schedule: all the same."""
    results = []
    for number, (order, async_) in enumerate(SCHEDULES):
        with _simt.options(order=order, async_=async_, seed=number, multiprocessors=1 + number):
            results.append(run())
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows, words", [(1, 1), (3, 2), (5, 33), (4, 1000), (3, 4104)])
def test_cross_entropy(device, options, dtype, rows, words):
    logits = (2 * normal(rows, words, device=device)).to(dtype).requires_grad_()
    targets = some_targets(rows, words, device)
    loss, wanted = loss_ops.cross_entropy(logits, targets, **options), reference(logits, targets, **options)
    assert loss.dtype == torch.float32
    check(loss, wanted, 1e-6)
    (gradient,) = torch.autograd.grad(loss * rows, logits)
    (wish,) = torch.autograd.grad(wanted * rows, logits)
    assert gradient.dtype == dtype
    check(gradient, wish, TOLERANCE[dtype])
    overwritten = logits.detach().clone()
    check(loss_ops.cross_entropy_(overwritten, targets, scale=rows, **options), wanted, 1e-6)
    check(overwritten, wish, TOLERANCE[dtype])


@pytest.mark.parametrize("shared", [227 * 1024, 4096], ids=["kept", "read twice"])
def test_a_vocabulary_of_50304(monkeypatch, shared):
    monkeypatch.setattr(loss_ops, "_shared_bytes", lambda device: shared)
    logits = normal(2, 50304, dtype=torch.bfloat16, grad=True)
    targets = torch.tensor([50303, 7])
    wanted = reference(logits, targets)
    (wish,) = torch.autograd.grad(2 * wanted, logits)
    check(loss_ops.cross_entropy(logits, targets), wanted, 1e-6)
    overwritten = logits.detach().clone()
    check(loss_ops.cross_entropy_(overwritten, targets, scale=2), wanted, 1e-6)
    check(overwritten, wish, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("magnitude, tolerance", [(1e4, 1e-6), (1e30, 1e-6)])
def test_large_logits_keep_their_precision(magnitude, tolerance):
    """Differences of a few between logits of 10^4: float32 of their log-sum-exp alone would be off by 5e-4."""
    logits = (magnitude + 4 * normal(4, 100)).requires_grad_()
    targets = some_targets(4, 100)
    loss, wanted = loss_ops.cross_entropy(logits, targets), reference(logits, targets)
    check(loss, wanted, tolerance)
    check(*(torch.autograd.grad(4 * x, logits)[0] for x in (loss, wanted)), 2e-6)
    spread = (magnitude * normal(4, 100)).requires_grad_()
    loss, wanted = loss_ops.cross_entropy(spread, targets), reference(spread, targets)
    check(loss, wanted, tolerance)
    check(*(torch.autograd.grad(4 * x, spread)[0] for x in (loss, wanted)), 2e-6)


@pytest.mark.parametrize("magnitude", [1e4, 1e30])
def test_large_logits_under_a_cap(magnitude):
    logits = (magnitude * normal(4, 100)).requires_grad_()
    targets = some_targets(4, 100)
    loss, wanted = (f(logits, targets, softcap=30.0) for f in (loss_ops.cross_entropy, reference))
    check(loss, wanted, 1e-6)
    check(*(torch.autograd.grad(x, logits)[0] for x in (loss, wanted)), 1e-6)


@pytest.mark.parametrize("fill", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("whole_row", [False, True])
def test_logits_that_are_not_finite(fill, whole_row):
    logits = normal(3, 40)
    logits[1, slice(None) if whole_row else slice(5, 20)] = fill
    targets = torch.tensor([1, 2, 3])
    logits.requires_grad_()
    loss, wanted = loss_ops.cross_entropy(logits, targets), F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, wanted, equal_nan=True)
    gradients = (torch.autograd.grad(x, logits)[0] for x in (loss, wanted))
    torch.testing.assert_close(*gradients, equal_nan=True, atol=1e-6, rtol=1e-5)


def test_nothing_to_learn_from():
    """Without targets that count the loss is NaN and the gradient zero, as torch has it; with z_loss that is left."""
    for rows in (0, 3):
        logits, targets = normal(rows, 9, grad=True), torch.full((rows,), 5)
        loss = loss_ops.cross_entropy(logits, targets, ignore_index=5)
        assert loss.isnan()
        assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(rows, 9))
        x, weight = normal(rows, 4, grad=True), normal(9, 4, grad=True)
        loss = loss_ops.linear_cross_entropy(x, weight, targets, ignore_index=5)
        assert loss.isnan()
        for gradient in torch.autograd.grad(loss, (x, weight)):
            assert gradient.eq(0).all()
    wanted = 0.1 * logits.logsumexp(1).square().mean()
    loss = loss_ops.cross_entropy(logits, targets, ignore_index=5, z_loss=0.1)
    check(*(torch.autograd.grad(x, logits)[0] for x in (loss, wanted)), 1e-6)


def test_rows_apart_and_targets_of_32_bits():
    wide = normal(2, 3, 50, dtype=torch.bfloat16)
    logits, targets = wide[..., 3:40].requires_grad_(), torch.randint(37, (2, 3))
    loss, wanted = (
        loss_ops.cross_entropy(logits, targets.int()),
        reference(logits.reshape(6, 37), targets.reshape(6)),
    )
    check(loss, wanted, 1e-6)
    check(*(6 * torch.autograd.grad(x, logits)[0].double() for x in (loss, wanted)), TOLERANCE[torch.bfloat16])


def raw_arguments(**changed):
    """Of module.run("cross_entropy"): 3 rows of 20 words."""
    given = {
        "logits": normal(3, 20),
        "targets": torch.tensor([0, 19, 4]),
        "loss": torch.empty(3),
        "softcap": 0.0,
        "ignore_index": -100,
        "skip_ignored": True,
        "shared_bytes": 99 * 1024,
    }
    return given | changed


def test_a_gradient_that_lies_otherwise():
    """Where logits and gradient do not share their multiples of 16 bytes, elements go one by one."""
    given = raw_arguments(statistics=torch.empty(3, 2), scales=torch.tensor([1.0, 0.0]))
    memory = torch.full((3, 31), math.nan)
    for operation, gradient in (("cross_entropy", memory[:, 5:25]), ("cross_entropy_gradient", memory[:, 6:26])):
        memory.fill_(math.nan)
        _simt.run(operation, gradient=gradient, **given)
        logits = given["logits"].double().requires_grad_()
        check(gradient, torch.autograd.grad(3 * reference(logits, given["targets"]), logits)[0], 2e-6)
        assert memory.isnan().sum() == 33


def test_a_target_outside_is_refused_and_on_a_gpu_becomes_nan():
    logits = normal(3, 20, grad=True)
    for wrong in (20, -1, -99):
        targets = torch.tensor([0, wrong, 4])
        calls = (
            lambda t: loss_ops.cross_entropy(logits, t),
            lambda t: loss_ops.cross_entropy_(logits.detach(), t),
            lambda t: loss_ops.linear_cross_entropy(logits, torch.zeros(20, 20), t),
        )
        for call in calls:
            with pytest.raises(ValueError, match=f"target {wrong}: expected 0 to 19, or ignore_index -100"):
                call(targets)
        given = raw_arguments(targets=targets, gradient=torch.empty(3, 20))
        _simt_checked.run("cross_entropy", **given)
        assert given["loss"].isnan().tolist() == [False, True, False]
        assert (
            given["gradient"].isnan().all(1).tolist()
            == given["gradient"].isnan().any(1).tolist()
            == [False, True, False]
        )


def test_cross_entropy_does_not_depend_on_the_schedule():
    logits, targets = normal(5, 3000, grad=True), some_targets(5, 3000)

    def run():
        loss = loss_ops.cross_entropy(logits, targets, z_loss=0.1, softcap=5.0)
        overwritten = logits.detach().clone()
        return loss, *torch.autograd.grad(loss, logits), loss_ops.cross_entropy_(overwritten, targets), overwritten

    under_schedules(run)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_checked_build_has_nothing_to_say_about_cross_entropy(checked, monkeypatch, dtype):
    logits, targets = normal(3, 403, dtype=dtype, grad=True), some_targets(3, 403)
    for shared, options in ((227 * 1024, OPTIONS[3]), (1024, {})):
        monkeypatch.setattr(loss_ops, "_shared_bytes", lambda device, bytes=shared: bytes)
        for order, async_ in SCHEDULES[1:3]:
            with _simt_checked.options(order=order, async_=async_, multiprocessors=2):
                loss_ops.cross_entropy(logits, targets, **options).backward()
                loss_ops.cross_entropy_(logits.detach().clone(), targets, **options)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"logits": torch.zeros(3, 20, dtype=torch.float64)}, "logits"),
        ({"logits": torch.zeros(20, 3).mT}, "rows without gaps"),
        ({"logits": torch.zeros(3)}, "2 dimensions"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets: shape"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets: is int32"),
        ({"gradient": torch.zeros(3, 20).bfloat16()}, "gradient: is bfloat16"),
        ({"gradient": torch.zeros(3, 19)}, "gradient: shape"),
        ({"loss": torch.zeros(2)}, "loss: shape"),
        ({"scales": torch.zeros(1)}, "scales: shape"),
        ({"statistics": torch.zeros(3)}, "statistics: shape"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": math.nan}, "softcap"),
    ],
)
def test_what_the_kernels_refuse(wrong, message):
    with pytest.raises(ValueError, match=message):
        _simt.run("cross_entropy", **raw_arguments(**wrong))


def test_a_gradient_that_overlaps_is_refused():
    memory = torch.zeros(4, 20)
    with pytest.raises(ValueError, match="overlaps"):
        _simt.run("cross_entropy", **raw_arguments(logits=memory[:3], gradient=memory[1:]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, t: loss_ops.cross_entropy(x.double(), t), "logits is torch.float64"),
        (lambda x, t: loss_ops.cross_entropy(x, t[:2]), r"targets \(2,\)"),
        (lambda x, t: loss_ops.cross_entropy(x, t.float()), "targets are torch.float32"),
        (lambda x, t: loss_ops.cross_entropy(x, t, softcap=-1.0), "softcap -1.0"),
        (lambda x, t: loss_ops.cross_entropy(x, t, z_loss=math.nan), "z_loss nan"),
        (lambda x, t: loss_ops.cross_entropy(x[:, :0], t), "at least one column"),
        (lambda x, t: loss_ops.cross_entropy_(x.requires_grad_(), t), "require a gradient"),
        (lambda x, t: loss_ops.cross_entropy_(x[0], t), r"expected \(N, V\)"),
        (lambda x, t: loss_ops.linear_cross_entropy(x, x[:, :2], t), r"weight \(3, 2\)"),
        (lambda x, t: loss_ops.linear_cross_entropy(x, x.double(), t), "weight is torch.float64"),
        (lambda x, t: loss_ops.linear_cross_entropy(x, x.bfloat16(), t), "weight is torch.bfloat16"),
        (lambda x, t: loss_ops.linear_cross_entropy(x, x, t, bias=x[0]), r"bias has shape \(4,\)"),
        (lambda x, t: loss_ops.linear_cross_entropy(x, x, t, chunk_rows=0), "chunk_rows 0"),
        (lambda x, t: loss_ops.embedding(t, x[0]), r"table has shape \(4,\)"),
        (lambda x, t: loss_ops.embedding(t, x.double()), "table is torch.float64"),
        (lambda x, t: loss_ops.embedding(t.double(), x), "tokens are torch.float64"),
        (lambda x, t: loss_ops.embedding(t + 1, x), "token 3: expected 0 to 2"),
    ],
)
def test_what_the_functions_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(3, 4), torch.tensor([0, 1, 2]))


# ---- the head and the cross-entropy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype, words, chunk, options",
    [
        (torch.float32, 33, 7, {}),
        (torch.float32, 50, None, {"softcap": 3.0, "z_loss": 0.01}),
        (torch.float32, 1, 1, {"z_loss": 0.01}),
        (torch.bfloat16, 33, 16, {"softcap": 3.0}),
        (torch.bfloat16, 136, 100, {"z_loss": 0.01}),
        (torch.float16, 64, 16, {}),
    ],
)
def test_linear_cross_entropy(device, dtype, words, chunk, options):
    rows, channels = 20, 24
    x = normal(4, 5, channels, dtype=dtype, device=device, grad=True)
    weight = normal(words, channels, dtype=dtype, device=device, grad=True)
    bias = normal(words, dtype=dtype, device=device, grad=True)
    targets = some_targets(rows, words, device)
    loss = loss_ops.linear_cross_entropy(x, weight, targets.view(4, 5), bias=bias, chunk_rows=chunk, **options)
    logits = x.double().view(rows, channels) @ weight.double().mT + bias.double()
    wanted = reference(logits, targets, **options)
    tolerance = 2e-6 if dtype == torch.float32 else 4 * TOLERANCE[dtype]
    check(loss, wanted, tolerance)
    leaves = (x, weight, bias)
    gradients, wishes = (torch.autograd.grad(rows * value, leaves) for value in (loss, wanted))
    for leaf, gradient, wish in zip(leaves, gradients, wishes, strict=True):
        assert gradient.dtype == leaf.dtype
        check(gradient, wish, tolerance)


def test_only_what_is_wanted_is_computed():
    x, weight, targets = normal(6, 8), normal(10, 8), some_targets(6, 10)
    want = reference(x @ weight.mT, targets)
    for wants_x, wants_weight in ((True, False), (False, True)):
        leaves = [t.clone().requires_grad_(wants) for t, wants in ((x, wants_x), (weight, wants_weight))]
        loss = loss_ops.linear_cross_entropy(*leaves, targets)
        check(loss, want, 1e-6)
        loss.backward()
        assert [leaf.grad is not None for leaf in leaves] == [wants_x, wants_weight]
    with torch.no_grad():
        loss = loss_ops.linear_cross_entropy(*(t.clone().requires_grad_() for t in (x, weight)), targets)
    assert not loss.requires_grad
    check(loss, want, 1e-6)
    outputs = loss_ops._linear_cross_entropy(x, weight, targets, None, 0.0, 0.0, -100, 4, False, False)
    assert [output.numel() for output in outputs] == [1, 1, 0, 0, 0]


def test_parameters_of_float32_and_autocast():
    """The weight's gradient stays float32 all the way: bfloat16 would show."""
    x, weight, targets = normal(6, 8), normal(16, 8, grad=True), some_targets(6, 16, ignored=False)
    logits = x.bfloat16().double() @ weight.bfloat16().double().mT
    (wish,) = torch.autograd.grad(reference(logits, targets), weight)
    half = loss_ops.linear_cross_entropy(x.bfloat16(), weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss_ops.linear_cross_entropy(x, weight, targets)
    for loss in (half, cast):
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float())
        check(gradient, wish, 2**-7)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel(), x.untyped_storage().nbytes() // x.element_size())
        return result


def test_logits_never_exist_whole():
    rows, words = 2100, 40
    x, weight = normal(rows, 8), normal(words, 8)
    with Largest() as largest:
        run = loss_ops._linear_cross_entropy._init_fn
        run(x, weight, some_targets(rows, words), None, 0.0, 0.0, -100, loss_ops.rows_of_chunk(rows), True, True)
    assert largest.elements == max(rows * 8, 256 * words)  # of rows * words
    assert [loss_ops.rows_of_chunk(n) for n in (1, 2048, 4000, 8192, 10**6)] == [256, 256, 384, 1024, 4096]


def test_linear_cross_entropy_under_schedules_and_checked(monkeypatch, request):
    x, weight, targets = (
        normal(40, 16, dtype=torch.bfloat16, grad=True),
        normal(24, 16, dtype=torch.bfloat16, grad=True),
        some_targets(40, 24),
    )

    def run():
        loss = loss_ops.linear_cross_entropy(x, weight, targets, chunk_rows=16)
        return loss.detach(), *torch.autograd.grad(loss, (x, weight))

    under_schedules(run)
    request.getfixturevalue("checked")
    run()


# ---- embedding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "count, entries, columns", [(1, 1, 1), (300, 7, 3), (700, 300, 8), (500, 3, 40), (65, 9, 1050)]
)
def test_embedding(device, dtype, count, entries, columns):
    table = normal(entries, columns, dtype=dtype, device=device, grad=True)
    tokens = torch.randint(entries, (count,))
    tokens[torch.rand(count) < 0.5] = entries // 2  # one that is in many pieces
    tokens = tokens.to(device)
    rows = loss_ops.embedding(tokens, table)
    assert torch.equal(rows, table[tokens])
    upstream = normal(count, columns, dtype=dtype, device=device)
    (gradient,) = torch.autograd.grad(rows, table, upstream)
    wish = torch.zeros(entries, columns, dtype=torch.float64, device=device).index_add_(0, tokens, upstream.double())
    assert gradient.dtype == dtype
    check(gradient, wish, TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", [[64, 64, 64], [63, 1, 64, 130, 62], [200], [1] * 70, [10, 54, 1, 127]])
def test_segments_that_end_where_pieces_do(lengths):
    """Sums of ones count the tokens: exact in float32."""
    tokens = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = tokens[torch.randperm(len(tokens))]
    table = torch.zeros(len(lengths) + 2, 5, requires_grad=True)
    loss_ops.embedding(tokens, table).sum().backward()
    assert table.grad[:, 0].tolist() == table.grad[:, 4].tolist() == [*lengths, 0, 0]


def test_embedding_of_no_tokens_and_of_a_batch_of_32_bits():
    table = normal(5, 4, grad=True)
    tokens = torch.randint(5, (2, 3), dtype=torch.int32)
    assert torch.equal(loss_ops.embedding(tokens, table), table[tokens.long()])
    rows = loss_ops.embedding(tokens[:, :0], table)
    assert rows.shape == (2, 0, 4)
    assert torch.equal(torch.autograd.grad(rows.sum(), table)[0], torch.zeros(5, 4))


def test_embedding_rows_that_start_anywhere():
    """A table that does not start at a multiple of 16 bytes is read element by element."""
    table = normal(9 * 8 + 1)[1:].view(9, 8).requires_grad_()
    tokens = torch.randint(9, (20,))
    rows = loss_ops.embedding(tokens, table)
    assert torch.equal(rows, table[tokens])


def test_embedding_under_schedules_and_checked(request):
    table, tokens = normal(11, 12, dtype=torch.bfloat16, grad=True), torch.randint(11, (300,)) // 4
    upstream = normal(300, 12, dtype=torch.bfloat16)

    def run():
        rows = loss_ops.embedding(tokens, table)
        return rows.detach(), *torch.autograd.grad(rows, table, upstream)

    under_schedules(run)
    request.getfixturevalue("checked")
    for order, async_ in SCHEDULES[1:3]:
        with _simt_checked.options(order=order, async_=async_, multiprocessors=2):
            run()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [8, 3])
def test_tokens_outside_give_nan_and_no_gradient(dtype, columns):
    """What a GPU does, where no one looks at the tokens first."""
    table, tokens = normal(4, columns, dtype=dtype), torch.tensor([3, -1, 0, 4])
    rows, gradient = torch.zeros(4, columns, dtype=dtype), torch.zeros(4, columns, dtype=dtype)
    _simt_checked.run("embedding", table=table, tokens=tokens, rows=rows)
    assert torch.equal(rows[[0, 2]], table[[3, 0]])
    assert rows[[1, 3]].isnan().all()
    ordered, places = tokens.int().sort()
    partial = torch.zeros(1, 2, columns)
    given = {"gradient": gradient, "rows": table, "tokens": ordered, "places": places, "partial": partial}
    _simt_checked.run("embedding_backward", **given)
    assert torch.equal(gradient[[3, 0]], table[[0, 2]])
    assert gradient[1:3].eq(0).all()
    for name, wrong in (("partial", partial[0]), ("places", places.int()), ("rows", table[:3]), ("tokens", tokens)):
        with pytest.raises(ValueError, match=name):
            _simt.run("embedding_backward", **given | {name: wrong})


# ---- torch.library ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, weight = normal(6, 8, device=device, grad=True), normal(10, 8, device=device, grad=True)
    targets, bias = some_targets(6, 8, device), normal(10, device=device, grad=True)
    statistics = torch.ones(6, 2, device=device)
    one, rows = torch.ones((), device=device), x.detach()
    samples = [
        (loss_ops._cross_entropy, (x, targets, 2.0, 0.1, -100)),
        (loss_ops._cross_entropy_gradient, (one, rows, targets, statistics, one, 2.0, 0.1, -100)),
        (loss_ops._linear_cross_entropy, (x, weight, targets, bias, 2.0, 0.1, -100, 4, True, True)),
        (loss_ops._embedding, (targets.clamp(min=0), weight)),
        (loss_ops._embedding_backward, (rows, targets.clamp(min=0), 9)),
    ]
    for operation, arguments in samples:
        assert set(torch.library.opcheck(operation, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile(device):
    table, weight = (normal(12, 8, device=device, grad=True) for _ in range(2))
    tokens = torch.randint(12, (2, 5), device=device)

    def f(table, weight):
        x = loss_ops.embedding(tokens, table).tanh()
        plain = loss_ops.cross_entropy(x @ weight.mT, tokens, z_loss=0.1)
        return plain + loss_ops.linear_cross_entropy(x, weight, tokens)

    compiled = torch.compile(f, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    want, got = (torch.autograd.grad(g(table, weight), (table, weight)) for g in (f, compiled))
    for gradient, wish in zip(got, want, strict=True):
        check(gradient, wish, 1e-6)


def test_second_derivatives_are_refused():
    logits = normal(3, 5, grad=True)
    (gradient,) = torch.autograd.grad(
        loss_ops.cross_entropy(logits, torch.tensor([0, 1, 2])), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="autograd"):
        gradient.square().sum().backward()
    loss = loss_ops.linear_cross_entropy(logits, normal(5, 5), torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, logits, create_graph=True)


# ---- AdamW -----------------------------------------------------------------------------------------------------------


def off_by_one(x):
    """The same numbers at an address that is no multiple of 16."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def parameters_of(sizes, device="cpu"):
    """Float32; each third one starts off a multiple of 16 bytes."""
    made = [normal(*size, device=device) for size in sizes]
    return [(off_by_one(x) if i % 3 == 2 else x).requires_grad_() for i, x in enumerate(made)]


def copies(parameters):
    return [p.detach().clone().requires_grad_() for p in parameters]


SIZES = [(1,), (3, 5), (7,), (8192,), (2, 4097), (33, 257), (0, 4), ()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torchs(device, weight_decay):
    ours = parameters_of(SIZES, device)
    theirs = [p.detach().double().requires_grad_() for p in ours]
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizers = optim.AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(5):
        for number, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            there = number != 1 or step > 1  # one joins later, and has another number of steps
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
        assert set(mine) == set(other) == {"step", "exp_avg", "exp_avg_sq"}
        assert mine["step"] == other["step"] and mine["step"].dtype == torch.float32
        for key in ("exp_avg", "exp_avg_sq") if p.numel() else ():
            check(mine[key], other[key], 1e-6)


def test_adamw_of_mixed_types():
    """A parameter of two bytes is its float32 copy, rounded; that goes as a float32 parameter would."""
    types = [torch.float32, torch.bfloat16, torch.float16]
    ours = [normal(35, dtype=dtype) for dtype in types for _ in range(2)]
    ours = [(off_by_one(x) if i % 2 else x).requires_grad_() for i, x in enumerate(ours)]
    theirs = [p.detach().float().requires_grad_() for p in ours]
    optimizers = optim.AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = normal(35, dtype=p.dtype)
            q.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        exact = optimizers[0].state[p]["master"] if p.dtype != torch.float32 else p.detach()
        check(exact, q.detach(), 1e-6)
        assert torch.equal(p.detach(), exact.to(p.dtype))
    other = optim.AdamW([p.detach().clone().requires_grad_() for p in ours])
    other.load_state_dict(optimizers[0].state_dict())
    for p, q in zip(ours, other.param_groups[0]["params"], strict=True):
        for key, value in optimizers[0].state[p].items():
            assert torch.equal(value, other.state[q][key]) and value.dtype == torch.float32


def test_adamw_gradients_in_half_precision():
    """The kernel takes them; torch sets no such gradient on a float32 parameter, so the table says it."""
    p, g, m, v = normal(21), normal(21, dtype=torch.bfloat16), torch.zeros(21), torch.zeros(21)
    q = p.clone().requires_grad_()
    q.grad = g.float()
    torch.optim.AdamW([q], lr=0.1).step()
    table = torch.tensor([[p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), 0, 21, 0, 1]])
    numbers = {"decay": 1 - 1e-3, "beta1_rest": 0.1, "beta2": 0.999, "beta2_rest": 1e-3, "step": 1.0, "eps": 1e-8}
    given = {
        "chunks": torch.zeros(1, 2, dtype=torch.int32),
        "root_inverse": 1e-3**-0.5,
        "memory": [p, g, m, v],
        **numbers,
    }
    _simt_checked.run("adamw", tensors=table, **given)
    check(p, q.detach(), 1e-6)
    for name, wrong in (("tensors", table[:, :7]), ("chunks", torch.zeros(0, 2).int()), ("factor", torch.ones(2))):
        with pytest.raises(ValueError, match=name):
            _simt.run("adamw", **{"tensors": table, **given, name: wrong})


def test_state_dicts_go_to_torch_and_back():
    start = parameters_of(SIZES[:4])
    ours, theirs, third = start, copies(start), copies(start)
    optimizers = optim.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1), optim.AdamW(third)
    gradients = [[normal(*p.shape) for p in start] for _ in range(4)]

    def steps(optimizer, parameters, which):
        for number in which:
            for p, gradient in zip(parameters, gradients[number], strict=True):
                p.grad = gradient.clone()
            optimizer.step()

    steps(optimizers[0], ours, range(4))  # all the way
    steps(optimizers[1], theirs, range(2))
    for p, q in zip(third, theirs, strict=True):
        p.data.copy_(q.data)
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    assert optimizers[2].param_groups[0]["lr"] == 0.1
    steps(optimizers[2], third, [2])
    for p, q in zip(third, theirs, strict=True):
        q.data.copy_(p.data)
    optimizers[1].load_state_dict(optimizers[2].state_dict())
    steps(optimizers[1], theirs, [3])
    for p, q in zip(ours, theirs, strict=True):
        check(p.detach(), q.detach(), 2e-6)
    for key in ("amsgrad", "maximize"):
        state = optimizers[1].state_dict()
        state["param_groups"][0][key] = True
        with pytest.raises(ValueError, match=key):
            optimizers[2].load_state_dict(state)


def test_tables_are_made_again_only_when_something_has_moved():
    p = normal(10, grad=True)
    optimizer, made = optim.AdamW([p]), []
    p.grad = normal(10)
    for _ in range(3):
        optimizer.step()
        made.append(optimizer._plans[0][1][0].tables)
    assert made[0] is made[1] is made[2]
    before, second = p.detach().clone(), normal(10)
    p.grad = second
    optimizer.step()
    assert optimizer._plans[0][1][0].tables is not made[0]
    assert not torch.equal(before, p.detach())
    p.data = p.data.bfloat16()
    p.grad = None
    p.grad = second.bfloat16()
    with pytest.raises(ValueError, match="became torch.bfloat16"):
        optimizer.step()


def test_adamw_takes_a_closure_groups_and_schedulers():
    p, q = normal(5, grad=True), normal(6, grad=True)
    optimizer = optim.AdamW([{"params": [p], "lr": 0.0, "weight_decay": 0.0}, {"params": [q]}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    before = [x.detach().clone() for x in (p, q)]

    def closure():
        optimizer.zero_grad()
        loss = (p.sum() + q.sum()) ** 2
        loss.backward()
        return loss

    assert optimizer.step(closure) == ((before[0].sum() + before[1].sum()) ** 2)
    assert torch.equal(p.detach(), before[0]) and not torch.equal(q.detach(), before[1])
    scheduler.step()
    before = q.detach().clone()
    optimizer.step(closure)
    assert torch.equal(q.detach(), before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr -1.0"),
        ({"eps": math.nan}, "eps nan"),
        ({"weight_decay": -1}, "weight_decay -1"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_options_that_adamw_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        optim.AdamW([normal(3, grad=True)], **options)


def test_tensors_that_adamw_refuses():
    with pytest.raises(ValueError, match="torch.float64"):
        optim.AdamW([torch.zeros(3, dtype=torch.float64, requires_grad=True)])
    with pytest.raises(ValueError, match="strides"):
        optim.AdamW([torch.zeros(3, 4).mT.requires_grad_()])
    p = normal(4, 2, grad=True)
    p.grad = torch.eye(4, 2).to_sparse()
    for call in (optim.AdamW([p]).step, lambda: optim.clip_grad_norm_(p, 1.0)):
        with pytest.raises(ValueError, match="sparse"):
            call()


# ---- the norm of gradients -------------------------------------------------------------------------------------------


def with_gradients(parameters, dtype=torch.float32, scale=1.0):
    for p in parameters:
        p.grad = (scale * normal(*p.shape, device=p.device)).to(dtype)
    return parameters


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_clipping_equals_torchs(device, dtype, max_norm):
    ours = [p.detach().to(dtype).requires_grad_() for p in parameters_of(SIZES, device)]
    theirs = [p.detach().double().requires_grad_() for p in ours]
    for i, (p, q) in enumerate(zip(with_gradients(ours, dtype), theirs, strict=True)):
        q.grad = p.grad.double()
        if i % 2 and p.numel():
            p.grad = off_by_one(p.grad)
    norm, factor = optim.grad_norm(ours, max_norm)
    clipped, wanted = optim.clip_grad_norm_(ours, max_norm), torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.shape == () and torch.equal(norm, clipped)
    check(norm / wanted, torch.ones_like(wanted), 1e-6)
    check(factor, (max_norm / wanted).clamp(max=1), 1e-6)
    for p, q in zip(ours, theirs, strict=True):
        if p.numel():
            check(p.grad, q.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_gradients_that_are_not_finite(value):
    ours, theirs = (with_gradients([torch.zeros(9, requires_grad=True)]) for _ in range(2))
    for p in (*ours, *theirs):
        p.grad[4] = value
    theirs[0].grad[:] = ours[0].grad
    norms = optim.clip_grad_norm_(ours, 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(*norms, equal_nan=True)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, equal_nan=True)


def test_clipping_within_the_step():
    ours = with_gradients(parameters_of(SIZES), scale=10.0)
    theirs = copies(ours)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()
    optim.AdamW(ours, lr=0.1, eps=0.1).step(factor=optim.grad_norm(ours, 1.0)[1])
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.AdamW(theirs, lr=0.1, eps=0.1).step()
    for p, q in zip(ours, theirs, strict=True):
        if p.numel():
            check(p.detach(), q.detach(), 1e-6)


def test_gradients_with_gaps_none_and_wrong_ones():
    p = torch.zeros(3, 4, requires_grad=True)
    assert optim.clip_grad_norm_([p], 1.0) == 0
    p.grad = torch.ones(1).expand(3, 4)
    assert optim.clip_grad_norm_(p, 1.0) == pytest.approx(12**0.5)
    assert p.grad.is_contiguous()
    check(p.grad, torch.full((3, 4), 12**-0.5), 1e-6)
    assert optim.clip_grad_norm_([], 1.0) == 0
    with pytest.raises(ValueError, match="max_norm nan"):
        optim.clip_grad_norm_([p], math.nan)
    q = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    q.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="torch.float64"):
        optim.clip_grad_norm_([p, q], 1.0)


def test_optimizers_under_schedules_and_checked(request):
    start = parameters_of([(3, 5), (8200,), (7,)])
    half = normal(50, dtype=torch.bfloat16, grad=True)
    gradients = [normal(*p.shape, dtype=p.dtype) for p in (*start, half)]

    def run():
        parameters = copies([*start, half])
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = off_by_one(gradient) if len(gradient) == 8200 else gradient.clone()
        norm, factor = optim.grad_norm(parameters, 2.0)
        optim.AdamW(parameters, lr=0.1).step(factor=factor)
        optim.clip_grad_norm_(parameters, 1.0)
        return norm, *(p.detach() for p in parameters), *(p.grad for p in parameters)

    under_schedules(run)
    request.getfixturevalue("checked")
    for order, async_ in SCHEDULES[1:3]:
        with _simt_checked.options(order=order, async_=async_, multiprocessors=2):
            run()
