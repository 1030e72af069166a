"""Parts of racing recipes: nothing at first, by hand where they are on, heard of by nobody who must not hear."""

import math

import pytest
import torch

from minigpt.config import EXTRAS, GPTConfig
from minigpt.extras import GATE_WIDTH, Skips, gate
from minigpt.generate import generate
from minigpt.hf_config import family_of
from minigpt.masks import Documents
from minigpt.model import GPT, rotary_speeds
from minigpt.model_numpy import GPT as NumpyGPT
from minigpt.optim import group_names
from minigpt.sampling import Sampling
from parallel.model import StageGPT
from tests.minigpt import models

SMALL = {"vocab_size": 17, "context": 12, "layers": 5, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 12}
ON = {
    "value_gate": {"value_gate": True, "value_embeddings": True},
    "value_tables": {"value_tables": 2, "value_embeddings": True},
    "attention_gate": {"attention_gate": True},
    "without_attention": {"without_attention": "2"},
    "x0_skip": {"x0_skip": True},
    "unet_skips": {"unet_skips": True},
    "backout": {"backout": True},
    "smear": {"smear": True},
    "bigrams": {"bigrams": 31},
    "rope_windows": {"rope_windows": "4,8"},
}
ALL = {name: value for changes in ON.values() for name, value in changes.items()}
TOKENS = torch.randint(17, (3, 12), generator=torch.Generator().manual_seed(0))


def random_gpt(**changes) -> GPT:
    return models.random_gpt(**{**SMALL, **changes})


def test_the_list_is_complete():
    assert set(EXTRAS) == set(ON) and GPTConfig(**SMALL, **ALL).extras == list(EXTRAS) and not GPTConfig().extras


@pytest.mark.parametrize("name", [name for name in ON if name not in ("rope_windows", "without_attention")])
def test_a_fresh_part_changes_nothing_and_a_trained_one_does(name):
    plain = GPT(GPTConfig(**SMALL, value_embeddings=name == "value_gate"), seed=3).double()
    with_it = GPT(GPTConfig(**SMALL, **ON[name]), seed=3).double()
    with torch.no_grad():
        for model in (plain, with_it):  # zero projections would hide everything
            for own, p in model.named_parameters():
                if own.endswith(("output.weight", "down.weight", "head.weight", "value_embedding.weight")):
                    p.copy_(torch.linspace(-1, 1, p.numel()).sin().view(p.shape))
    assert (with_it(TOKENS) - plain(TOKENS)).abs().max() <= 1e-12
    new = [p for own, p in with_it.named_parameters() if own not in dict(plain.named_parameters())]
    assert new
    loss = with_it(TOKENS, TOKENS.roll(-1, 1))
    with torch.no_grad():
        for p in new:
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    assert (with_it(TOKENS, TOKENS.roll(-1, 1)) - loss).abs() > 1e-4
    with_it(TOKENS, TOKENS.roll(-1, 1)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in new)


def test_skips_by_hand():
    model = random_gpt(x0_skip=True, unet_skips=True, backout=True)
    entered, left = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        block.register_forward_hook(lambda _, args, y: left.append(y))
    last = []
    model.norm.register_forward_hook(lambda _, args, y: last.append(args[0]))
    model(TOKENS)
    x0, skips = model.embedding(TOKENS), model.skips
    for layer in range(5):
        before = x0 if layer == 0 else left[layer - 1]
        wanted = (1 + skips.x0[layer, 0]) * before + skips.x0[layer, 1] * x0
        if layer in (3, 4):  # of five blocks, 0 pairs with 4 and 1 with 3
            wanted = wanted + skips.unet[4 - layer] * left[4 - layer]
        assert (entered[layer] - wanted).abs().max() <= 1e-12
    assert (last[0] - (left[4] - skips.backout * left[2])).abs().max() <= 1e-12


def test_shared_tables_are_the_same_as_tables_of_their_own_that_are_equal():
    """Five layers, two tables: 0, 1, none, 0, 1. A layer's own ones are 4, 2 and 0, so 2 is at zero and 1, 3 are by
    hand."""
    shared = random_gpt(value_tables=2, value_embeddings=True)
    assert [shared.config.value_table(layer) for layer in range(5)] == [0, 1, None, 0, 1]
    assert sum(name.startswith("value_embeddings.") for name, _ in shared.named_parameters()) == 2
    plain = GPT(GPTConfig(**SMALL), seed=None).double()
    plain.load_state_dict({name: p for name, p in shared.state_dict().items() if not name.startswith("value_emb")})
    for layer, table in ((0, 0), (1, 1), (3, 0), (4, 1)):
        added = shared.value_embeddings[table](TOKENS)
        plain.blocks[layer].attention.value.register_forward_hook(lambda _, args, y, added=added: y + added)
    assert (shared(TOKENS) - plain(TOKENS)).abs().max() <= 1e-12


def test_a_layer_without_attention_is_its_mlp():
    model, plain = random_gpt(without_attention="1,02"), random_gpt()
    wanted = {
        name: p for name, p in plain.state_dict().items() if not name.startswith(("blocks.1.att", "blocks.2.att"))
    }
    assert model.state_dict().keys() == wanted.keys()
    model.load_state_dict(wanted)
    for layer in (1, 2):
        plain.blocks[layer].attention.register_forward_hook(lambda _, args, y: 0 * y)
    assert (model(TOKENS) - plain(TOKENS)).abs().max() <= 1e-12
    of_attention = 6 * (2 * 16 * 16 + 2 * 16 * 8) + 12 * 16 * 12  # q and o, k and v, scores over 12 tokens
    assert plain.num_flops_per_token() - model.num_flops_per_token() == 2 * of_attention


def test_gates_by_hand():
    linear = torch.nn.Linear(GATE_WIDTH, 3, bias=False).double()
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    wanted = [2 / (1 + math.exp(-(linear.weight[i] @ x[1, 2, :GATE_WIDTH]).item())) for i in range(3)]
    assert (gate(x, linear)[1, 2] - torch.tensor(wanted, dtype=torch.float64)).abs().max() <= 1e-12


@pytest.mark.parametrize("changes", [ON["smear"], ON["bigrams"], ALL], ids=["smear", "bigrams", "all"])
def test_the_token_before_is_heard_within_a_document_only(changes):
    """Documents in one row compute what each does alone, as rows of their own and after separators."""
    model = random_gpt(**changes)
    lengths, starts = (5, 4, 3), (0, 5, 9)
    alone = torch.cat([model(TOKENS[:1, s : s + n]) for s, n in zip(starts, lengths, strict=True)], dim=1)
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    assert (model(TOKENS[:1], documents=Documents(places, numbers)) - alone).abs().max() <= 1e-9
    tokens = TOKENS[:1] % 16
    tokens[0, list(starts)] = 16
    by_separator = model(tokens, separator=16)
    by_documents = model(tokens, documents=Documents(places, numbers))
    assert (by_separator - by_documents).abs().max() <= 1e-9  # rotary: positions that count on are the same
    assert (model(tokens) - by_documents).abs().max() > 1e-3


def test_no_token_sees_the_future():
    model = random_gpt(**ALL)
    whole = model(TOKENS)
    for t in range(1, 12):
        changed = TOKENS.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 17
        assert torch.equal(model(changed)[:, :t], whole[:, :t])


def test_pairs_spread_over_the_rows():
    model = random_gpt(bigrams=1001)
    pairs = torch.cartesian_prod(torch.arange(17), torch.arange(17))
    rows = []
    model.bigrams.bigram_embedding.register_forward_hook(lambda _, args, y: rows.append(args[0][:, 1]))
    model.bigrams(pairs, torch.tensor([[True, False]]).expand(289, 2))
    used = rows[0].unique().numel()
    expected = 1000 * (1 - (1 - 1 / 1000) ** 289)  # of a random function
    assert used >= expected - 4 * math.sqrt(expected) and rows[0].min() >= 1 and rows[0].max() <= 1000


def test_a_window_of_one_pass_is_that_of_the_config():
    model, windowed = random_gpt(), random_gpt(window=3, window_pattern="SL")
    windowed.load_state_dict(model.state_dict())
    assert (windowed(TOKENS, window=12) - model(TOKENS)).abs().max() <= 1e-12
    other = random_gpt(window=5, window_pattern="SL")
    assert torch.equal(windowed(TOKENS, window=5), other(TOKENS))
    assert (windowed(TOKENS) - other(TOKENS)).abs().max() > 1e-3


def test_yarn_by_its_definition():
    """Channels that turn more than 32 times in the old window keep their speed, those below once are slowed by its
    share of the new one, and it is linear between; a second change starts from what the first left."""
    config = {"width": 64, "heads": 1, "kv_heads": 1, "rope_base": 10_000.0}
    plain = rotary_speeds(GPTConfig(**SMALL | config))
    stretched = rotary_speeds(GPTConfig(**SMALL | config, rope_windows="512,1024"))
    for old, new in zip(plain.tolist(), stretched.tolist(), strict=True):
        turns = old * 512 / (2 * math.pi)
        share = min(max((turns - 1) / 31, 0), 1)
        assert new == pytest.approx(old * (share + (1 - share) / 2), rel=1e-12)
    assert stretched[-1] == plain[-1] / 2 and stretched[0] == plain[0]
    twice = rotary_speeds(GPTConfig(**SMALL | config, rope_windows="512,1024,2048"))
    assert twice[-1] == plain[-1] / 4


@pytest.mark.parametrize("changes", [ON["smear"], ON["bigrams"], ALL], ids=["smear", "bigrams", "all"])
def test_a_sample_is_the_same_with_a_cache(changes):
    """Past the end of the context too, where the rows are read afresh."""
    model, prompts = random_gpt(**changes), [[3, 1, 4], [1, 5]]
    with_cache, without = (
        list(generate(model, prompts, max_new_tokens=30, sampling=Sampling(temperature=0), use_cache=use))
        for use in (True, False)
    )
    assert with_cache == without


def test_gates_and_skips_are_no_matrices_to_an_optimizer():
    names = group_names(random_gpt(**ALL))
    assert not [name for name in names["matrices"] if "gate" in name or "skips" in name]
    assert {"skips.x0", "smear.smear_gate.weight", "blocks.0.attention.attention_gate.weight"} <= set(names["rest"])
    assert "bigrams.bigram_embedding.weight" in names["embedding"]


@pytest.mark.parametrize("name", ON)
def test_who_has_no_such_part_says_so(name):
    config = GPTConfig(**SMALL, **ON[name])
    for build in (NumpyGPT, StageGPT):
        with pytest.raises(ValueError, match=f"{name}: .* has none of the racing recipes' parts, expected them off"):
            build(config)
    with pytest.raises(ValueError, match=f"no family of transformers has this GPT.*{name}"):
        family_of(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_tables": 3, "value_embeddings": True}, "value_tables 3: expected at most half of the layers, 5"),
        ({"value_tables": -1, "value_embeddings": True}, "value_tables -1"),
        ({"value_tables": 1}, "value_tables without value_embeddings"),
        ({"without_attention": "5"}, "without_attention '5': expected layers from 0 to 4"),
        ({"without_attention": "1,x"}, "without_attention '1,x'"),
        ({"without_attention": "-1"}, "without_attention '-1'"),
        ({"without_attention": "0,1,2,3,4"}, "expected a layer that has it"),
        (
            {"value_tables": 2, "value_embeddings": True, "without_attention": "2,3"},
            r"layers \[3\] read one of the 2 value_tables",
        ),
        ({"bigrams": 1}, "bigrams 1: expected 2 rows or more, or 0"),
        ({"bigrams": -3}, "bigrams -3"),
        ({"value_gate": True}, "value_gate without value_embeddings: expected both"),
        ({"rope_windows": "12,x"}, "rope_windows '12,x': expected numbers of tokens"),
        ({"rope_windows": "0"}, "rope_windows '0'"),
    ],
)
def test_wrong_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**SMALL, **changes)


def test_skips_alone_hold_only_what_is_on():
    assert [name for name, _ in Skips(GPTConfig(**SMALL, x0_skip=True)).named_parameters()] == ["x0"]
