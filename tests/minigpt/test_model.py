"""The torch GPT against closed formulas, torch's own modules, and counting."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minigpt.config import GPTConfig
from minigpt.model import GPT, MLP, causal_attention, rotary_tables, rotate

SMALL = {"vocab_size": 17, "context": 10, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 12}


def random_gpt(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **changes})).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
    return model


def spelled_out_attention(q_BHTK, k_BGTK, v_BGTK):
    """Key and value heads repeated, scores masked, softmax, all by hand."""
    repeats, T = q_BHTK.shape[1] // k_BGTK.shape[1], q_BHTK.shape[2]
    k_BHTK, v_BHTK = (x.repeat_interleave(repeats, dim=1) for x in (k_BGTK, v_BGTK))
    scores_BHTS = q_BHTK @ k_BHTK.transpose(2, 3) / math.sqrt(q_BHTK.shape[-1])
    future_TS = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores_BHTS.masked_fill(future_TS, -math.inf).softmax(dim=-1) @ v_BHTK


def assert_close(ours, theirs, tolerance=1e-12):
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max().item()
    assert error <= tolerance, error


@pytest.mark.parametrize("width", [2, 6, 64])
def test_rotary_turns_complex_numbers(width):
    x_BHTK = torch.randn(2, 3, 11, width, dtype=torch.float64)
    ours = rotate(x_BHTK, *rotary_tables(11, width, 100.0))
    half = width // 2
    z = torch.complex(x_BHTK[..., :half], x_BHTK[..., half:])
    rows = [[t * 100.0 ** (-2 * i / width) for i in range(half)] for t in range(11)]
    angles = torch.tensor(rows, dtype=torch.float64)
    turned = z * torch.polar(torch.ones_like(angles), angles)
    assert_close(ours, torch.cat([turned.real, turned.imag], dim=-1))


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned_q, turned_k = (rotate(x.expand(1, 1, 20, 8), *rotary_tables(20, 8, 10_000.0))[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(20):
        diagonal = scores.diagonal(-distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_grouped_heads_are_repeated_heads(groups):
    q, k, v = (torch.randn(2, heads, 9, 8, dtype=torch.float64) for heads in (6, groups, groups))
    assert_close(causal_attention(q, k, v), spelled_out_attention(q, k, v))


def test_attention_fn_is_an_argument():
    model = random_gpt()
    other = GPT(model.config, attention_fn=spelled_out_attention).double()
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(17, (2, 10))
    assert_close(other(tokens), model(tokens))


def test_linear_cls_is_an_argument():
    class Counted(nn.Linear):
        made = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            Counted.made += 1

    GPT(GPTConfig(**SMALL, mlp="swiglu"), linear_cls=Counted)
    assert Counted.made == 2 * 7 + 1


def test_a_block_is_the_same_as_torchs_modules():
    """One layer without QK-norm and rotation (one token: position 0 turns by nothing) out of nn.MultiheadAttention."""
    model = random_gpt(layers=1, kv_heads=4, qk_norm=False, softcap=0.0)
    block = model.blocks[0]
    attention = nn.MultiheadAttention(16, 4, bias=False, batch_first=True).double()
    with torch.no_grad():
        weights = [block.attention.query.weight, block.attention.key.weight, block.attention.value.weight]
        attention.in_proj_weight.copy_(torch.cat(weights))
        attention.out_proj.weight.copy_(block.attention.output.weight)
    tokens = torch.randint(17, (3, 1))
    x = F.embedding(tokens, model.embedding.weight)
    y = F.rms_norm(x, (16,), block.attention_norm.weight, 1e-6)
    x = x + attention(y, y, y, need_weights=False)[0]
    y = F.rms_norm(x, (16,), block.mlp_norm.weight, 1e-6)
    x = x + F.relu(y @ block.mlp.up.weight.T).square() @ block.mlp.down.weight.T
    logits = F.rms_norm(x, (16,), model.norm.weight, 1e-6) @ model.head.weight.T
    assert_close(model(tokens), logits)


def test_swiglu_by_hand():
    mlp = MLP(GPTConfig(**SMALL, mlp="swiglu"), nn.Linear).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    gate, up = x @ mlp.gate.weight.T, x @ mlp.up.weight.T
    assert_close(mlp(x), (gate / (1 + torch.exp(-gate)) * up) @ mlp.down.weight.T)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "mlp": "swiglu", "tied": True, "softcap": 0.0}])
def test_no_token_sees_the_future(changes):
    model = random_gpt(**changes)
    tokens = torch.randint(17, (2, 10))
    whole = model(tokens)
    for T in range(1, 10):
        assert_close(model(tokens[:, :T]), whole[:, :T])


def test_the_soft_cap_caps():
    capped, free = random_gpt(softcap=2.0), random_gpt(softcap=0.0)
    tokens = torch.randint(17, (2, 10))
    assert free(tokens).abs().max() > 2 > capped(tokens).abs().max()
    assert_close(capped(tokens), 2 * torch.tanh(free(tokens) / 2))


@pytest.mark.parametrize("tied", [False, True])
def test_initialisation(tied):
    config = GPTConfig(**SMALL, tied=tied)
    model = GPT(config, seed=1)
    tokens = torch.randint(17, (2, 10))
    if not tied:
        assert model(tokens, tokens).item() == pytest.approx(math.log(17), abs=1e-6)
    for block in model.blocks:
        assert not block.attention.output.weight.any() and not block.mlp.down.weight.any()
    torch.manual_seed(123)  # the numbers do not come from torch's global generator
    same, other = GPT(config, seed=1), GPT(config, seed=2)
    assert torch.equal(same.embedding.weight, model.embedding.weight)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)


def count_by_hand(c: GPTConfig) -> int:
    K = c.width // c.heads
    attention = 2 * c.width * c.width + 2 * c.width * c.kv_heads * K + (2 * K if c.qk_norm else 0)
    mlp = (3 if c.mlp == "swiglu" else 2) * c.width * c.mlp_width
    embeddings = (1 if c.tied else 2) * c.vocab_size * c.width
    return embeddings + c.layers * (attention + mlp + 2 * c.width) + c.width


VARIANTS = [{}, {"tied": True}, {"mlp": "swiglu"}, {"kv_heads": 4}, {"qk_norm": False, "kv_heads": 1, "layers": 3}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_num_parameters(changes):
    model = random_gpt(**changes)
    assert model.num_parameters() == count_by_hand(model.config)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("T", [10, 7])
def test_flops_per_token_equals_counting(changes, T):
    model = GPT(random_gpt(**changes).config, attention_fn=spelled_out_attention)
    tokens = torch.randint(17, (3, T))
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == model.flops_per_token(T) * 3 * T
    assert model.flops_per_token() == model.flops_per_token(10)


def test_autocast_matches_float32_roughly_and_the_loss_is_float32():
    model = random_gpt().float()
    tokens = torch.randint(17, (2, 10))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(tokens), model(tokens, tokens)
    assert logits.dtype == loss.dtype == torch.float32
    assert (logits - model(tokens)).abs().max() <= 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers 0: expected at least 1"),
        ({"vocab_size": -1}, "vocab_size -1: expected at least 1"),
        ({"width": 18}, "width 18 over 4 heads: expected an even whole head width"),
        ({"width": 12}, "width 12 over 4 heads: expected an even whole head width"),
        ({"kv_heads": 3}, "kv_heads 3: expected a divisor of heads, 4"),
        ({"mlp": "gelu"}, "mlp 'gelu': expected 'swiglu' or 'relu2'"),
        ({"softcap": -1.0}, "softcap -1.0: expected a positive number, or 0"),
        ({"softcap": math.nan}, "softcap nan: expected"),
        ({"rope_base": 0.0}, "rope_base 0.0: expected a positive number"),
        ({"norm_eps": math.nan}, "norm_eps nan: expected"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **changes})


@pytest.mark.parametrize("T", [0, 11])
def test_sequences_that_do_not_fit_are_refused(T):
    with pytest.raises(ValueError, match=f"sequence of {T} tokens: expected 1 to the context, 10"):
        random_gpt()(torch.zeros(1, T, dtype=torch.long))
