"""The GPT on our engine and the GPT in torch are one function: logits, loss and every gradient, in float64 to 1e-9."""

import numpy as np
import pytest
import torch

import autograd as ag
from minigpt import model, model_numpy
from minigpt.config import GPTConfig

TOLERANCE = 1e-9
BASE = {"vocab_size": 19, "context": 12, "layers": 2, "width": 24, "heads": 4, "kv_heads": 4, "mlp_width": 20}
CONFIGS = {
    "relu2": {},
    "swiglu": {"mlp": "swiglu"},
    "tied": {"tied": True},
    "grouped heads": {"kv_heads": 2},
    "one key head, swiglu, tied": {"kv_heads": 1, "mlp": "swiglu", "tied": True},
    "no qk-norm": {"qk_norm": False},
    "no soft-cap": {"softcap": 0.0},
    "low soft-cap": {"softcap": 0.7},
    "one head, one layer": {"heads": 1, "kv_heads": 1, "layers": 1},
    "other rope base": {"rope_base": 100.0},
    "rope scaling": {"rope_base": 50.0, "rope_factor": 8.0, "rope_original": 24, "rope_low": 0.5, "rope_high": 2.0},
    "heads wider than width / heads": {"head_width": 10, "kv_heads": 2},
    "learned positions": {"positions": "learned"},
    "layer norm, biases, gelu, tied": {
        "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "output_bias": True, "mlp_bias": True, "tied": True,
        "positions": "learned", "qk_norm": False, "softcap": 0.0,
    },
    "exact gelu": {"mlp": "gelu"},
    "qkv bias only, swiglu with bias": {"qkv_bias": True, "mlp": "swiglu", "mlp_bias": True},
    "sliding window in every other layer": {"window": 3, "window_pattern": "SL"},
    "value embeddings": {"value_embeddings": True, "kv_heads": 2, "layers": 3},
}  # fmt: skip


def both(changes: dict, seed: int = 0):
    """The two models with the same random weights, gains and what starts at zero included; weights travel to numpy."""
    config = GPTConfig(**{**BASE, **changes})
    ours, theirs = model_numpy.GPT(config, dtype=np.float64), model.GPT(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3 + (p.ndim == 1))
    ours.load_state_dict({name: value.numpy() for name, value in theirs.state_dict().items()})
    return ours, theirs


def text(shape: tuple[int, int], seed: int = 1):
    rows = np.random.default_rng(seed).integers(BASE["vocab_size"], size=(2, *shape))
    return rows[0], rows[1]


def assert_close(ours: np.ndarray, theirs: torch.Tensor, what: str) -> None:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.float64, what
    error = np.abs(ours - theirs).max()
    assert error <= TOLERANCE, f"{what}: {error}"  # a NaN fails too


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("shape", [(3, 11), (2, 12), (1, 1)], ids=str)
def test_logits_loss_and_every_gradient(changes, shape):
    ours, theirs = both(changes)
    inputs, targets = text(shape)
    assert_close(ours(inputs).data, theirs(torch.from_numpy(inputs)), "logits")
    loss, loss_torch = ours(inputs, targets), theirs(torch.from_numpy(inputs), torch.from_numpy(targets))
    assert_close(loss.data, loss_torch, "loss")
    loss.backward()
    loss_torch.backward()
    gradients = dict(theirs.named_parameters())
    assert [name for name, _ in ours.named_parameters()] == list(gradients)
    for name, p in ours.named_parameters():
        assert p.grad is not None, name
        if shape != (1, 1) and name != "embedding.weight":
            assert np.abs(p.grad.data).max() > 0, f"{name}: a zero gradient compares nothing"
        assert_close(p.grad.data, gradients[name].grad, name)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_weights_move_back_into_torch(changes):
    ours, theirs = both(changes, seed=2)
    fresh = model.GPT(theirs.config).double()
    fresh.load_state_dict({name: torch.from_numpy(value) for name, value in ours.state_dict().items()})
    inputs, _ = text((2, 9))
    assert_close(ours(inputs).data, fresh(torch.from_numpy(inputs)), "logits")


def test_one_seed_gives_both_the_same_weights():
    config = GPTConfig(**BASE)
    ours, theirs = model_numpy.GPT(config, seed=7).state_dict(), model.GPT(config, seed=7).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == np.float32 and np.array_equal(ours[name], value.numpy()), name
    assert not np.array_equal(
        ours["embedding.weight"], model_numpy.GPT(config, seed=8).state_dict()["embedding.weight"]
    )


@pytest.mark.parametrize("changes", [{}, {"window": 3}, {"kv_heads": 1, "positions": "learned"}], ids=str)
def test_separators_and_z_loss_alike(changes):
    ours, theirs = both(changes)
    inputs, targets = text((3, 12))
    inputs[:, 4], inputs[1, 5] = 7, 7
    options = {"separator": 7, "z_loss": 0.3}
    loss = ours(inputs, targets, **options)
    loss_torch = theirs(torch.from_numpy(inputs), torch.from_numpy(targets), **options)
    assert_close(loss.data, loss_torch, "loss")
    loss.backward()
    loss_torch.backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert_close(p.grad.data, gradients[name].grad, name)


def test_activation_checkpointing_changes_no_gradient_in_either():
    ours, theirs = both({"window": 3})
    inputs, targets = text((2, 12))
    for model_ in (ours, theirs):
        model_.activation_checkpointing = True
    loss, loss_torch = ours(inputs, targets), theirs(torch.from_numpy(inputs), torch.from_numpy(targets))
    loss.backward()
    loss_torch.backward()
    plain, plain_torch = both({"window": 3})
    plain(inputs, targets).backward()
    plain_torch(torch.from_numpy(inputs), torch.from_numpy(targets)).backward()
    wanted, wanted_torch = dict(plain.named_parameters()), dict(plain_torch.named_parameters())
    for name, p in ours.named_parameters():
        assert np.array_equal(p.grad.data, wanted[name].grad.data), name
    for name, p in theirs.named_parameters():
        assert torch.equal(p.grad, wanted_torch[name].grad), name


def test_gradients_accumulate_alike():
    ours, theirs = both({})
    for seed in (1, 2):
        inputs, targets = text((2, 7), seed)
        (ours(inputs, targets) / 2).backward()
        (theirs(torch.from_numpy(inputs), torch.from_numpy(targets)) / 2).backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert_close(p.grad.data, gradients[name].grad, name)


def test_both_refuse_a_sequence_longer_than_the_context():
    ours, theirs = both({})
    tokens = np.zeros((1, BASE["context"] + 1), dtype=np.int64)
    with ag.no_grad(), pytest.raises(ValueError, match="13 tokens: expected 1 to the context, 12"):
        ours(tokens)
    with pytest.raises(ValueError, match="13 tokens: expected 1 to the context, 12"):
        theirs(torch.from_numpy(tokens))
