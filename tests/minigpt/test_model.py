"""The torch GPT against closed formulas, torch's own modules, and counting."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minigpt.config import GPTConfig
from minigpt.model import GPT, MLP, Parts, causal_attention, rotary_speeds, rotary_tables, rotate, short_attention
from tests.minigpt import models

SMALL = {"vocab_size": 17, "context": 10, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 12}


def random_gpt(**changes) -> GPT:
    return models.random_gpt(**{**SMALL, **changes})


def seen_by(model: GPT, tokens: torch.Tensor, **options) -> torch.Tensor:
    """(T, T): whether the logits at t change when the token at s does, by trying."""
    T = tokens.shape[1]
    whole, rows = model(tokens, **options), []
    for s in range(T):
        changed = tokens.clone()
        changed[:, s] = (changed[:, s] + 1) % 11
        rows.append((model(changed, **options) - whole).abs().amax(dim=(0, 2)) > 1e-9)
    return torch.stack(rows, dim=1)


def spelled_out_attention(q_BHTK, k_BGTK, v_BGTK):
    """Key and value heads repeated, scores masked, softmax, all by hand; plain causal needs three arguments."""
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
    config = GPTConfig(context=11, width=2 * width, heads=2, kv_heads=2, rope_base=100.0)
    ours = rotate(x_BHTK, *rotary_tables(config))
    half = width // 2
    z = torch.complex(x_BHTK[..., :half], x_BHTK[..., half:])
    rows = [[t * 100.0 ** (-2 * i / width) for i in range(half)] for t in range(11)]
    angles = torch.tensor(rows, dtype=torch.float64)
    turned = z * torch.polar(torch.ones_like(angles), angles)
    assert_close(ours, torch.cat([turned.real, turned.imag], dim=-1))


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 8, dtype=torch.float64)
    tables = rotary_tables(GPTConfig(context=20, width=32, heads=4))
    turned_q, turned_k = (rotate(x.expand(1, 1, 20, 8), *tables)[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(20):
        diagonal = scores.diagonal(-distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_grouped_heads_are_repeated_heads(groups):
    q, k, v = (torch.randn(2, heads, 9, 8, dtype=torch.float64) for heads in (6, groups, groups))
    assert_close(causal_attention(q, k, v), spelled_out_attention(q, k, v))


@pytest.mark.parametrize("shape", [(2, 4, 4, 17, 8), (3, 6, 2, 33, 10), (1, 2, 1, 2, 4)], ids=str)
def test_short_attention_is_torchs(shape):
    """Called as it is, in float64: values and gradients; in bfloat16 both are as far from the truth."""
    B, H, G, T, K = shape
    q, k, v = (torch.randn(B, heads, T, K, dtype=torch.float64, requires_grad=True) for heads in (H, G, G))
    ours = short_attention(q, k, v)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close(ours, theirs)
    g = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, (q, k, v), g), strict=True
    ):
        assert_close(one, other)
    half = [x.detach().bfloat16() for x in (q, k, v)]
    assert causal_attention(*half).dtype == torch.bfloat16
    assert (causal_attention(*half) - ours).abs().max() <= 0.05


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
    mlp = MLP(GPTConfig(**SMALL, mlp="swiglu"), Parts()).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    gate, up = x @ mlp.gate.weight.T, x @ mlp.up.weight.T
    assert_close(mlp(x), (gate / (1 + torch.exp(-gate)) * up) @ mlp.down.weight.T)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": False, "mlp": "swiglu", "tied": True, "softcap": 0.0},
        {"value_embeddings": True, "mlp": "swiglu"},
        {"positions": "learned", "norm": "layernorm", "mlp": "gelu"},
    ],
    ids=str,
)
def test_no_token_sees_the_future(changes):
    model = random_gpt(**changes)
    tokens = torch.randint(17, (2, 10))
    whole = model(tokens)
    for T in range(1, 10):
        assert_close(model(tokens[:, :T]), whole[:, :T])


@pytest.mark.parametrize("window", [1, 2, 4, 10])
def test_a_sliding_layer_sees_its_window(window):
    seen = seen_by(random_gpt(window=window, layers=1), torch.randint(11, (2, 10)))
    t, s = torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij")
    assert torch.equal(seen, (s <= t) & (s > t - window))


def test_a_long_layer_sees_everything_before():
    seen = seen_by(random_gpt(window=2, window_pattern="SL"), torch.randint(11, (2, 10)))
    assert torch.equal(seen, torch.ones(10, 10).tril().bool())


@pytest.mark.parametrize("changes", [{}, {"window": 3}], ids=str)
def test_documents_do_not_see_each_other(changes):
    model = random_gpt(**changes)
    tokens = torch.randint(11, (2, 10))
    tokens[:, 4] = 16
    together = model(tokens, separator=16)
    if not changes:  # positions count on, but scores depend on distances only: each document is as if alone
        assert_close(together[:, 4:], model(tokens[:, 4:]), 1e-10)
    assert_close(together[:, :4], model(tokens[:, :4]))
    assert (together - model(tokens))[:, 4:].abs().max() > 1e-3


def test_llama_3_scaling_by_its_definition():
    """The formula of the Llama 3.1 release, written out pair by pair: wavelength against the original context."""
    config = GPTConfig(
        context=8, width=128, heads=2, kv_heads=2, rope_base=500.0, rope_factor=8.0, rope_original=64, rope_high=4.0
    )
    wanted, kinds = [], set()
    for i in range(32):
        speed = 500.0 ** (-2 * i / 64)
        wavelength = 2 * math.pi / speed
        if wavelength < 64 / 4.0:
            kinds.add("kept")
        elif wavelength > 64 / 1.0:
            speed, _ = speed / 8.0, kinds.add("slowed")
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            speed, _ = (1 - smooth) * speed / 8.0 + smooth * speed, kinds.add("between")
        wanted.append(speed)
    assert kinds == {"kept", "slowed", "between"}
    assert_close(rotary_speeds(config), torch.tensor(wanted, dtype=torch.float64), 1e-14)


def test_z_loss_is_the_mean_square_of_log_z():
    model, tokens = random_gpt(softcap=0.0), torch.randint(17, (2, 10))
    loss, plain = model(tokens, tokens, z_loss=0.1), model(tokens, tokens)
    assert loss.item() == plain.item(), "the value is the cross-entropy alone"
    log_z = model(tokens).exp().sum(-1).log()
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(plain + 0.1 * log_z.square().mean(), parameters)
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        assert_close(ours, theirs)


def test_value_embeddings_stand_in_every_second_layer_and_start_at_zero():
    model = GPT(GPTConfig(**SMALL, value_embeddings=True))
    assert [hasattr(block.attention, "value_embedding") for block in model.blocks] == [False, True]
    assert not model.blocks[1].attention.value_embedding.weight.any()


def test_norm_cls_is_an_argument():
    class Twice(nn.RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, twice = GPT(GPTConfig(**SMALL)), GPT(GPTConfig(**SMALL), norm_cls=Twice)
    assert (
        sum(isinstance(m, Twice) for m in twice.modules())
        == 2 * 4 + 1
        == sum(isinstance(m, nn.RMSNorm) for m in plain.modules())
    )


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
    K = c.head_width or c.width // c.heads
    inner, kv = c.heads * K, c.kv_heads * K
    attention = 2 * c.width * inner + 2 * c.width * kv + (2 * K if c.qk_norm else 0)
    attention += (inner + 2 * kv if c.qkv_bias else 0) + (c.width if c.output_bias else 0)
    mlp = (3 if c.mlp == "swiglu" else 2) * c.width * c.mlp_width
    mlp += ((2 if c.mlp == "swiglu" else 1) * c.mlp_width + c.width) if c.mlp_bias else 0
    norm = c.width * (2 if c.norm == "layernorm" else 1)
    embeddings = (1 if c.tied else 2) * c.vocab_size * c.width
    embeddings += c.context * c.width if c.positions == "learned" else 0
    embeddings += (c.layers + 1) // 2 * c.vocab_size * kv if c.value_embeddings else 0
    return embeddings + c.layers * (attention + mlp + 2 * norm) + norm


GPT2 = {
    "positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qk_norm": False, "softcap": 0.0, "tied": True,
    "qkv_bias": True, "output_bias": True, "mlp_bias": True, "kv_heads": 4,
}  # fmt: skip
VARIANTS = [
    {},
    {"tied": True},
    {"mlp": "swiglu"},
    {"kv_heads": 4},
    {"qk_norm": False, "kv_heads": 1, "layers": 3},
    {"head_width": 10, "mlp": "swiglu", "mlp_bias": True},
    {"value_embeddings": True, "layers": 3},
    GPT2,
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_num_parameters(changes):
    model = random_gpt(**changes)
    assert model.num_parameters() == count_by_hand(model.config)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("T", [10, 7])
def test_num_flops_per_token_equals_counting(changes, T):
    model = GPT(random_gpt(**changes).config, attention_fn=spelled_out_attention)
    tokens = torch.randint(17, (3, T))
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == model.num_flops_per_token(T) * 3 * T
    assert model.num_flops_per_token() == model.num_flops_per_token(10)


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
        ({"mlp": "tanh"}, "mlp 'tanh': expected 'swiglu' or 'relu2' or 'gelu' or 'gelu_tanh'"),
        ({"norm": "batchnorm"}, "norm 'batchnorm': expected 'rmsnorm' or 'layernorm'"),
        ({"positions": "alibi"}, "positions 'alibi': expected 'rotary' or 'learned'"),
        ({"head_width": 5}, "head_width 5: expected an even number, or 0"),
        ({"rope_factor": 0.5}, "rope_factor 0.5: expected 1 "),
        ({"rope_high": 1.0}, "rope_high 1.0: expected more than rope_low, 1.0"),
        ({"window": -1}, "window -1: expected a positive number"),
        ({"window_pattern": "SX"}, "window_pattern 'SX': expected letters S and L"),
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
