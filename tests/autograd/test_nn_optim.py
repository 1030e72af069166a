"""Layers, optimizers and schedules against torch's own, step for step in float64, and what they refuse."""

import numpy as np
import pytest
import torch

import autograd as ag
from autograd import Tensor, nn, optim
from autograd import functional as F


def assert_close(found, expected, tolerance=1e-12):
    found, expected = (
        np.asarray(found),
        np.asarray(expected.detach() if isinstance(expected, torch.Tensor) else expected),
    )
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= tolerance


class Net(nn.Module):
    """One of each layer, a tied weight, a list, a buffer and a frozen parameter."""

    def __init__(self):
        d = np.float64
        self.embed = nn.Embedding(7, 6, dtype=d)
        self.layers = nn.ModuleList([nn.Linear(6, 6, dtype=d), nn.Linear(6, 6, bias=False, dtype=d)])
        self.norm, self.rms = nn.LayerNorm(6, dtype=d), nn.RMSNorm(6, eps=1e-6, dtype=d)
        self.tail = nn.Sequential(nn.Linear(6, 6, dtype=d), nn.Dropout(0.5))
        self.head = nn.Linear(6, 7, bias=False, dtype=d)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", Tensor(np.full(6, 2.0)))

    def forward(self, indices):
        x = self.embed(indices)
        for layer in self.layers:
            x = x + F.gelu(layer(self.norm(x)))
        return self.head(self.tail(self.rms(x) * self.scale))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        t = torch.nn
        self.embed = t.Embedding(7, 6)
        self.layers = t.ModuleList([t.Linear(6, 6), t.Linear(6, 6, bias=False)])
        self.norm, self.rms = t.LayerNorm(6), t.RMSNorm(6, eps=1e-6)
        self.tail = t.Sequential(t.Linear(6, 6), t.Dropout(0.5))
        self.head = t.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((6,), 2.0))
        self.double()

    def forward(self, indices):
        x = self.embed(indices)
        for layer in self.layers:
            x = x + torch.nn.functional.gelu(layer(self.norm(x)))
        return self.head(self.tail(self.rms(x) * self.scale))


INDICES = np.array([[0, 3, 3], [6, 1, 0]])
LABELS = np.array([1, 2, 3, 4, 5, 6])


def pair():
    ours, theirs = Net().eval(), TorchNet().eval()
    theirs.load_state_dict({name: torch.tensor(value) for name, value in ours.state_dict().items()})
    return ours, theirs


def losses(ours, theirs):
    mine = F.cross_entropy(ours(Tensor(INDICES)).reshape(-1, 7), Tensor(LABELS))
    other = torch.nn.functional.cross_entropy(theirs(torch.tensor(INDICES)).reshape(-1, 7), torch.tensor(LABELS))
    return mine, other


def test_names_and_gradients_equal_torch():
    ours, theirs = pair()
    assert list(ours.state_dict()) and set(ours.state_dict()) == set(theirs.state_dict())
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}  # the tied one once
    mine, other = losses(ours, theirs)
    assert_close(mine.data, other)
    mine.backward()
    other.backward()
    grads = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert_close(p.grad.data, grads[name].grad)


def test_conv_module_equals_torch():
    ours = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2, dtype=np.float64)
    theirs = torch.nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2).double()
    theirs.load_state_dict({k: torch.tensor(v) for k, v in ours.state_dict().items()})
    x = np.random.default_rng(0).standard_normal((2, 4, 7, 9))
    assert_close(ours(Tensor(x)).data, theirs(torch.tensor(x)))


@pytest.mark.parametrize("layer", [nn.Linear(500, 300), nn.Conv2d(20, 60, 5)])
def test_initialisation_has_torchs_distribution(layer):
    w = layer.weight.data
    bound = 1 / np.sqrt(np.prod(w.shape[1:]))
    assert np.abs(w).max() <= bound and np.abs(w).max() > 0.99 * bound
    assert abs(w.std() / (bound / np.sqrt(3)) - 1) < 0.02


def test_train_eval_and_dropout():
    net = Net()
    assert all(m.training for m in net.modules())
    ag.manual_seed(0)
    a, b = net(Tensor(INDICES)).data, net(Tensor(INDICES)).data
    assert not np.array_equal(a, b)
    ag.manual_seed(0)
    assert np.array_equal(net(Tensor(INDICES)).data, a)
    net.eval()
    assert not any(m.training for m in net.modules())
    assert np.array_equal(net(Tensor(INDICES)).data, net(Tensor(INDICES)).data)


def test_load_state_dict_names_every_problem_and_copies_nothing():
    net = Net()
    before = net.state_dict()
    state = {name: value + 1 for name, value in before.items()}
    del state["norm.bias"]
    state["extra"] = np.zeros(1)
    state["layers.0.weight"] = np.zeros((6, 5))
    with pytest.raises(ValueError) as error:
        net.load_state_dict(state)
    for part in ("missing norm.bias", "unexpected extra", "layers.0.weight has shape (6, 5), expected (6, 6)"):
        assert part in str(error.value)
    assert all(np.array_equal(value, before[name]) for name, value in net.state_dict().items())
    del state["layers.0.weight"]
    net.load_state_dict(state, strict=False)
    assert np.array_equal(net.norm.weight.data, before["norm.weight"] + 1)


def test_a_module_without_forward_says_so():
    with pytest.raises(TypeError, match="Module has no forward"):
        nn.Module()(1)


# -- optimizers --
OPTIMIZERS = {
    "sgd": (lambda p: optim.SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "sgd momentum decay": (
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
    "nesterov": (
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "adamw": (
        lambda p: optim.AdamW(p, lr=0.03, betas=(0.8, 0.95), weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.03, betas=(0.8, 0.95), weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_equals_torch_over_ten_steps(name):
    make, make_torch = OPTIMIZERS[name]
    ours, theirs = pair()
    ours.norm.weight.requires_grad = False  # frozen: no gradient, must stay as it is
    theirs.norm.weight.requires_grad = False
    a, b = make(ours.parameters()), make_torch(theirs.parameters())
    for step in range(10):
        if step == 5:
            a.param_groups[0]["lr"] *= 0.5
            b.param_groups[0]["lr"] *= 0.5
        for loss, optimizer in zip(losses(ours, theirs), (a, b), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    expected = theirs.state_dict()
    for key, value in ours.state_dict().items():
        assert_close(value, expected[key], 1e-11)


def test_accumulated_gradients_equal_one_large_batch_under_sgd():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((6, 4)), rng.standard_normal((3, 4))
    whole, parts = nn.Parameter(w.copy()), nn.Parameter(w.copy())
    F.linear(Tensor(x), whole).tanh().mean().backward()
    for chunk in np.split(x, 3):
        (F.linear(Tensor(chunk), parts).tanh().mean() / 3).backward()
    assert_close(parts.grad.data, whole.grad.data)


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (1, 6)])
def test_orthogonalize_keeps_singular_vectors_and_flattens_singular_values(shape):
    g = np.random.default_rng(0).standard_normal(shape)
    u, s, vt = np.linalg.svd(optim.orthogonalize(g, 5), full_matrices=False)
    assert (s > 0.4).all() and (s < 1.3).all()
    gu, gs, gvt = np.linalg.svd(g, full_matrices=False)
    a, b, c = optim.NEWTON_SCHULZ
    x = gs / np.linalg.norm(gs)
    for _ in range(5):  # the same polynomial on the singular values alone
        x = a * x + b * x**3 + c * x**5
    assert_close(optim.orthogonalize(g, 5), (gu * x) @ gvt, 1e-6)


def test_muon_step_matches_its_definition_and_learns():
    w = nn.Parameter(np.random.default_rng(0).standard_normal((6, 3)))
    before, g = w.data.copy(), np.random.default_rng(1).standard_normal((6, 3))
    w.grad = Tensor(g)
    optim.Muon([w], lr=0.1, momentum=0.9, weight_decay=0.01).step()
    u = 0.1 * g + 0.9 * (0.1 * g)
    expected = before * (1 - 0.1 * 0.01) - 0.1 * np.sqrt(2) * optim.orthogonalize(u)
    assert_close(w.data, expected)
    with pytest.raises(ValueError, match=r"shape \(3,\): expected matrices"):
        optim.Muon([nn.Parameter(np.ones(3))])


@pytest.mark.parametrize("make", [lambda p: optim.AdamW(p), lambda p: optim.SGD(p, 0.1, 0.9), lambda p: optim.Muon(p)])
def test_optimizer_state_resumes_exactly(make):
    def run(steps, p, optimizer, start=0):
        for i in range(start, steps):
            p.grad = Tensor(np.random.default_rng(i).standard_normal(p.shape))
            optimizer.step()

    straight = nn.Parameter(np.ones((4, 3)))
    run(6, straight, make([straight]))
    first = nn.Parameter(np.ones((4, 3)))
    optimizer = make([first])
    run(3, first, optimizer)
    state = optimizer.state_dict()
    run(1, first, optimizer)  # the copy must not follow
    second = nn.Parameter(np.ones((4, 3)))
    run(3, second, make([second]))
    resumed = make([second])
    resumed.load_state_dict(state)
    run(6, second, resumed, start=3)
    assert np.array_equal(second.data, straight.data)
    with pytest.raises(ValueError, match="state of 1 parameters"):
        make([nn.Parameter(np.ones((4, 3))), nn.Parameter(np.ones((4, 3)))]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"for a parameter of shape \(2, 2\)"):
        make([nn.Parameter(np.ones((2, 2)))]).load_state_dict(state)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: optim.SGD([], 0.1), "empty list"),
        (lambda p: optim.SGD([p], -1.0), "lr -1.0"),
        (lambda p: optim.SGD([p], float("nan")), "lr nan"),
        (lambda p: optim.SGD([p], 0.1, momentum=1.5), "momentum 1.5"),
        (lambda p: optim.SGD([p], 0.1, nesterov=True), "Nesterov with momentum 0"),
        (lambda p: optim.AdamW([p], betas=(0.9, 1.0)), "betas"),
        (lambda p: optim.SGD([p, p], 0.1), "listed twice"),
        (lambda p: optim.SGD([p * 2], 0.1), "expected a leaf"),
    ],
)
def test_optimizers_refuse(build, message):
    with pytest.raises(ValueError, match=message):
        build(nn.Parameter(np.ones(3)))


def test_clip_grad_norm_equals_torch():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((3, 4)), rng.standard_normal(5)]
    for max_norm in (0.5, 100.0):
        ours = [nn.Parameter(np.zeros_like(a)) for a in arrays]
        theirs = [torch.nn.Parameter(torch.zeros(a.shape, dtype=torch.float64)) for a in arrays]
        for p, t, a in zip(ours, theirs, arrays, strict=True):
            p.grad, t.grad = Tensor(a.copy()), torch.tensor(a)
        norm, expected = optim.clip_grad_norm_(ours, max_norm), torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        assert abs(norm - expected.item()) <= 1e-12
        for p, t in zip(ours, theirs, strict=True):
            assert_close(p.grad.data, t.grad)
    ours[0].grad.data[0, 0] = np.nan
    with pytest.raises(ValueError, match="norm is nan"):
        optim.clip_grad_norm_(ours, 1.0)
    with pytest.raises(ValueError, match="max_norm 0"):
        optim.clip_grad_norm_(ours, 0)


def test_schedules():
    cosine = [optim.warmup_cosine(s, 10, warmup=2, floor=0.1) for s in range(11)]
    assert cosine[:2] == [0.5, 1.0] and cosine[2] == 1.0
    assert_close(cosine[2:], 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(9) / 8)) / 2)
    wsd = [optim.warmup_stable_decay(s, 10, warmup=2, decay=4, floor=0.2) for s in range(11)]
    assert_close(wsd, [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    for bad in (lambda: optim.warmup_cosine(11, 10), lambda: optim.warmup_stable_decay(1, 10, warmup=6, decay=6)):
        with pytest.raises(ValueError, match="schedule"):
            bad()


def test_muon_and_adamw_train_a_small_network():
    ag.manual_seed(0)
    rng = np.random.default_rng(0)
    x = Tensor(rng.standard_normal((64, 8)))
    target = Tensor((rng.standard_normal((8, 4)).T @ x.data.T).T)
    net = nn.Sequential(nn.Linear(8, 32, dtype=np.float64), nn.Linear(32, 4, dtype=np.float64))
    muon = optim.Muon([p for p in net.parameters() if p.ndim == 2], lr=0.02)
    adam = optim.AdamW([p for p in net.parameters() if p.ndim != 2], lr=0.02)
    first = None
    for _ in range(100):
        loss = F.mse_loss(net(x), target)
        first = first or loss.item()
        for optimizer in (muon, adam):
            optimizer.zero_grad()
        loss.backward()
        muon.step()
        adam.step()
    assert loss.item() < first / 20


def test_names_reachable_from_the_package():
    assert ag.nn is nn and ag.optim is optim and ag.functional is F
