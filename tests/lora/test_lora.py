"""Adapters of a GPT by themselves: the formula, what stays frozen, switching, merging, dtypes, everything refused."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora.config import LoraConfig
from lora.layers import LoraEmbedding, LoraLinear
from lora.lora import (
    activate,
    active_adapters,
    adapter_names,
    adapter_of,
    adapter_parameters,
    add_adapter,
    fold,
    lora_layers,
    merge,
    remove,
    unmerge,
)
from minigpt.model import GPT, mean_cross_entropy
from tests.lora.families import TOKENS, Pair, randomised, worst
from tests.minigpt.models import random_gpt

SMALL = {"vocab_size": 31, "context": 16, "layers": 2, "width": 10, "heads": 5, "kv_heads": 1, "mlp_width": 7}
EVERYWHERE = ("query", "key", "value", "output", "up", "down", "head", "embedding", "value_embedding")


def small(**config) -> GPT:
    return random_gpt(**SMALL, **config).eval()


def snapshot(model: GPT) -> dict[str, torch.Tensor]:
    """The base's parameters by the names of a plain GPT."""
    state = {name.replace(".base.", "."): p for name, p in model.state_dict().items() if ".adapters." not in name}
    return {name: value.clone() for name, value in state.items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].flatten().view(torch.uint8), other[name].flatten().view(torch.uint8)) for name in one
    )


def spread_out(packed: torch.Tensor, blocks: int) -> torch.Tensor:
    """The dense matrix of a block-diagonal one, number by number."""
    rows, columns = packed.shape
    dense = torch.zeros(rows, columns * blocks, dtype=packed.dtype)
    for row in range(rows):
        for column in range(columns):
            dense[row, column + columns * (row * blocks // rows)] = packed[row, column]
    return dense


def with_deltas(model: GPT, weights: dict[str, float], *, head: bool = True) -> GPT:
    """A plain GPT whose weights are W + weight * scale * B A, the definition."""
    plain, state = GPT(model.config, seed=None).to(model.embedding.weight.dtype).eval(), snapshot(model)
    for name, layer in lora_layers(model).items():
        for adapter, weight in weights.items():
            if adapter in layer.adapters:
                part = layer.adapters[adapter]
                A, B = spread_out(part.A.detach(), part.blocks_A), spread_out(part.B.detach(), part.blocks_B)
                delta = weight * part.scale * torch.einsum("or,ri->oi", B, A)
                state[f"{name}.weight"] += delta.T if isinstance(layer, LoraEmbedding) else delta
    plain.load_state_dict(state)
    return plain


def test_it_is_the_definition_in_every_layer_with_several_adapters_and_weights():
    model = small(value_embeddings=True)
    before = model(TOKENS)
    add_adapter(model, LoraConfig(3, 5.0, EVERYWHERE), "one")
    assert torch.equal(model(TOKENS), before)  # B is zero
    add_adapter(model, LoraConfig(2, 7.0, r"blocks\.1\..*(query|up)", rslora=True), "two")
    randomised(model)
    for weights in ({"one": 1.0}, {"two": 1.0}, {"one": 0.25, "two": -2.0}, {"two": 0.0}, {}):
        activate(model, list(weights), list(weights.values()))
        assert active_adapters(model) == weights
        assert worst(model(TOKENS), with_deltas(model, weights)(TOKENS)) <= 1e-12
        assert worst(model(TOKENS[:1, :1]), with_deltas(model, weights)(TOKENS[:1, :1])) <= 1e-12
    assert torch.equal(model(TOKENS), before)
    assert lora_layers(model)["blocks.1.mlp.up"].adapters["two"].scale == 7 / math.sqrt(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_leaves_the_base_bit_for_bit_and_gives_gradients_to_adapters_only(dtype):
    model = small(value_embeddings=True).to(dtype).train()
    model.norm.weight.data[0] = -0.0  # bits, not values
    before, logits = snapshot(model), model(TOKENS)
    add_adapter(model, LoraConfig(3, 6.0, EVERYWHERE, dropout=0.1))
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.02, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = model(TOKENS, TOKENS.roll(-1, dims=1))
        loss.backward()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            assert (".adapters." in name) == parameter.requires_grad == (parameter.grad is not None), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert same_bits(snapshot(model), before)
    activate(model, [])
    assert torch.equal(model(TOKENS), logits)


def test_autocast_computes_in_bfloat16_and_trains_float32():
    model = small().float()
    add_adapter(model, LoraConfig(3, 6.0, EVERYWHERE[:-1]))
    randomised(model)
    exact = model(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        layer, x = model.blocks[0].mlp.up, torch.randn(2, 3, 10)
        assert layer(x).dtype == layer(x.bfloat16()).dtype == torch.bfloat16
        rough, loss = model(TOKENS), model(TOKENS, TOKENS)
    assert 1e-5 < worst(rough, exact) < 0.1
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter_parameters(model))


def test_adapters_of_a_float64_base_are_float64_and_of_half_precision_compute_in_float32():
    model = small()
    add_adapter(model, LoraConfig(2))
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float64}
    half = small().bfloat16()
    add_adapter(half, LoraConfig(3, 3.0, ("0.mlp.up",)))
    randomised(half)
    layer, x = half.blocks[0].mlp.up, torch.randn(50, 10).bfloat16()
    part = layer.adapters["default"]
    exact = F.linear(x.double(), layer.base.weight.double()).bfloat16().double()
    exact = exact + F.linear(F.linear(x.double(), part.A.double()), part.B.double())
    assert layer(x).dtype == torch.bfloat16
    assert (layer(x).double() - exact).abs().max() <= exact.abs().max() * 2**-8  # rounded once more, not thrice


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_merged_equals_unmerged_to_rounding_and_unmerging_restores_every_bit(dtype, limit):
    model = small(value_embeddings=True).to(dtype)
    before = snapshot(model)
    add_adapter(model, LoraConfig(3, 1.0, EVERYWHERE), "one")
    add_adapter(model, LoraConfig(2, 2.0, ("up", "embedding")), "two")
    randomised(model)
    activate(model, ["one", "two"], [0.5, -1.5])
    logits = model(TOKENS)
    for _ in range(2):
        merge(model)
        assert not same_bits(snapshot(model), before)
        assert worst(model(TOKENS), logits) <= limit
        with pytest.raises(ValueError, match=r"adapters \['one', 'two'\] are merged: expected unmerge first"):
            merge(model)
        unmerge(model)
        assert same_bits(snapshot(model), before) and torch.equal(model(TOKENS), logits)


def test_a_merged_model_refuses_changes():
    model = small()
    add_adapter(model, LoraConfig(2))
    with pytest.raises(ValueError, match="unmerge: expected a merged model"):
        unmerge(model)
    merge(model)
    config = LoraConfig(3)
    for change in (
        lambda: add_adapter(model, config, "b"),
        lambda: activate(model, []),
        lambda: remove(model, "default"),
    ):
        with pytest.raises(ValueError, match="are merged: expected unmerge first"):
            change()
    unmerge(model)
    activate(model, [])
    with pytest.raises(ValueError, match="merge without an active adapter"):
        merge(model)


def test_removing_gives_back_the_very_layers_and_other_adapters_stay():
    model = small()
    modules = {name: module for name, module in model.named_modules()}
    add_adapter(model, LoraConfig(2, targets=("query", "up")), "one")
    add_adapter(model, LoraConfig(2, targets=("up", "head")), "two")
    randomised(model)
    logits = model(TOKENS)
    remove(model, "one")
    assert adapter_names(model) == ["two"] and torch.equal(model(TOKENS), logits)
    assert isinstance(model.blocks[0].attention.query, nn.Linear)
    remove(model, "two")
    assert {name: module for name, module in model.named_modules()} == modules
    with pytest.raises(ValueError, match=r"adapters \['two'\] are unknown: expected some of \[\]"):
        remove(model, "two")


def test_a_tied_head_keeps_the_embedding_without_the_adapter_unless_asked():
    for tie_head in (False, True):
        model = small(tied=True)
        plain = copy.deepcopy(model)
        add_adapter(model, LoraConfig(3, 5.0, ("embedding",), tie_head=tie_head))
        randomised(model)
        whole = with_deltas(model, {"default": 1.0})
        wanted = (whole if tie_head else plain).logits(whole.hidden(TOKENS))
        assert worst(model(TOKENS), wanted) <= 1e-12
        merge(model)
        assert worst(model(TOKENS), wanted) <= 1e-12
        if tie_head:
            fold(model)
            assert worst(model(TOKENS), wanted) <= 1e-12 and not lora_layers(model)
        else:
            with pytest.raises(ValueError, match="fold of an adapter of a tied embedding"):
                fold(model)
    model = small(tied=True)
    add_adapter(model, LoraConfig(3, targets=("embedding",), tie_head=True))
    randomised(model)
    part, plain = model.embedding.adapters["default"], GPT(model.config, seed=None).double()
    whole = model.embedding.base.weight + part.scale * (part.B @ part.A.detach()).T  # both uses of the matrix
    loss = torch.func.functional_call(plain, snapshot(model) | {"embedding.weight": whole}, (TOKENS, TOKENS))
    (wanted,) = torch.autograd.grad(loss, part.B)
    model(TOKENS, TOKENS).backward()
    assert worst(part.B.grad, wanted) <= 1e-12


def test_the_layers_of_c_attn_share_one_A_and_our_names_make_three():
    model = Pair("gpt2").ours()
    places = add_adapter(model, LoraConfig(3, targets=("c_attn",)), "fused")
    attention = model.blocks[1].attention
    three = [layer.adapters["fused"] for layer in (attention.query, attention.key, attention.value)]
    assert three[0].A is three[1].A is three[2].A and len(places) == 2
    assert [place.theirs for place in places] == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert len(adapter_parameters(model)) == 2 * (1 + 3)
    assert sum(p.numel() for p in adapter_parameters(model)) == 2 * 3 * (16 + 48)
    apart = add_adapter(model, LoraConfig(3, targets=("query", "value")), "apart")
    assert [place.layers for place in apart[:2]] == [("blocks.0.attention.query",), ("blocks.0.attention.value",)]
    assert len(adapter_parameters(model, "apart")) == 2 * 2 * 2
    restored = copy.deepcopy(model)  # sharing survives
    part = restored.blocks[1].attention.query.adapters["fused"]
    assert part.A is restored.blocks[1].attention.key.adapters["fused"].A


def test_dropout_drops_in_training_only_and_keeps_the_mean():
    model = small()
    add_adapter(model, LoraConfig(4, 4.0, ("up", "embedding"), dropout=0.25))
    randomised(model)
    assert torch.equal(model(TOKENS), model(TOKENS))
    layer, x = model.blocks[0].mlp.up, torch.randn(10, dtype=torch.float64)
    part = layer.adapters["default"]
    still = layer(x) - layer.base(x)
    torch.testing.assert_close(still, part.B @ (part.A @ x), rtol=1e-12, atol=1e-12)
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))
    assert torch.equal(model.embedding(TOKENS), model.embedding(TOKENS))  # a token has none
    torch.manual_seed(0)
    many = layer(x.expand(20_000, 10)) - layer.base(x)
    error = many.std(dim=0) / math.sqrt(len(many))
    assert ((many.mean(dim=0) - still).abs() <= 5 * error).all() and (error > 0).all()


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_factors_have_the_stated_distributions_and_depend_on_the_seed_alone(init):
    config = dict(SMALL, width=90, mlp_width=400)
    models = [random_gpt(**config) for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        torch.manual_seed(seed + id(model) % 7)  # must not matter
        add_adapter(model, LoraConfig(25, targets=("down", "embedding"), init=init), seed=seed)
    one, same, other = ([p.detach() for p in adapter_parameters(model)] for model in models)
    assert all(map(torch.equal, one, same)) and not any(map(torch.equal, one[2::2], other[2::2]))
    linear, embedding = models[0].blocks[0].mlp.down.adapters["default"], models[0].embedding.adapters["default"]
    assert not linear.B.any() and not embedding.A.any()
    assert linear.A.shape == (25, 400) and embedding.A.shape == (25, 31) and embedding.B.shape == (90, 25)
    assert embedding.B.std().item() == pytest.approx(1, rel=0.06)
    bound = 1 / math.sqrt(400)
    if init == "kaiming":
        assert 0.99 * bound <= linear.A.abs().max() <= bound
    spread = bound / math.sqrt(3) if init == "kaiming" else 1 / 25
    assert linear.A.std().item() == pytest.approx(spread, rel=0.03)


def test_only_active_adapters_are_trainable():
    model = small()
    add_adapter(model, LoraConfig(2), "one")
    add_adapter(model, LoraConfig(2), "two")
    assert active_adapters(model) == {"two": 1.0}
    assert {p.requires_grad for p in adapter_parameters(model, "one")} == {False}
    activate(model, ["one", "two"])
    assert all(p.requires_grad for p in adapter_parameters(model))
    assert len(adapter_parameters(model)) == 2 * len(adapter_parameters(model, "one"))


def test_what_the_model_reads_of_a_layer_is_still_there():
    model = small()
    add_adapter(model, LoraConfig(2, targets=EVERYWHERE[:-1]))
    up, embedding = model.blocks[0].mlp.up, model.embedding
    assert isinstance(up, LoraLinear) and up.weight is up.base.weight and up.bias is None
    assert (up.in_features, up.out_features, embedding.num_embeddings, embedding.embedding_dim) == (10, 7, 31, 10)
    assert embedding.weight is embedding.base.weight


def test_a_head_that_a_loss_function_reads_past_the_adapter_is_refused():
    def loss_fn(x_BTC, weight_VC, targets_BT, **options):
        return mean_cross_entropy(F.linear(x_BTC, weight_VC), targets_BT)

    model = small()
    model.loss_fn = loss_fn
    with pytest.raises(ValueError, match="target head of a GPT with a loss_fn"):
        add_adapter(model, LoraConfig(2, targets=("up", "head")))
    add_adapter(model, LoraConfig(2))  # all-linear leaves the head out
    assert "head" not in lora_layers(model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank 0: expected a whole number of at least 1"),
        ({"rank": True}, "rank True: expected a whole number"),
        ({"rank": 2.0}, "rank 2.0: expected a whole number"),
        ({"alpha": 0}, "alpha 0: expected a positive number"),
        ({"alpha": math.nan}, "alpha nan: expected a positive number"),
        ({"alpha": "8"}, "alpha '8': expected a positive number"),
        ({"targets": ()}, r"targets \(\): expected a tuple of ends"),
        ({"targets": ["up"]}, r"targets \['up'\]: expected a tuple"),
        ({"targets": "(up"}, r"targets '\(up': not a regular expression"),
        ({"rank_pattern": {"up": 0}}, r"rank_pattern\['up'\] 0: expected a whole number"),
        ({"rank_pattern": {"*": 1}}, r"rank_pattern '\*': not a regular expression"),
        ({"rank_pattern": ("up", 2)}, r"rank_pattern \('up', 2\): expected ends of layer names"),
        ({"alpha_pattern": {"up": -1.0}}, r"alpha_pattern\['up'\] -1.0: expected a positive number"),
        ({"rslora": 1}, "rslora 1: expected True or False"),
        ({"tie_head": None}, "tie_head None: expected True or False"),
        ({"dropout": 1.0}, "dropout 1.0: expected a number from 0 to below 1"),
        ({"dropout": math.nan}, "dropout nan: expected a number"),
        ({"init": "pissa"}, "init 'pissa': expected 'kaiming' or 'gaussian'"),
        ({"blocks": 0}, "blocks 0: expected a whole number"),
        ({"rank": 6, "blocks": 4}, "rank 6 in 4 blocks: expected multiples of the number of blocks"),
        (
            {"rank": 5, "rank_pattern": {"up": 3, "down": 4}, "blocks": 2},
            r"rank 5, rank_pattern\['up'\] 3 in 2 blocks: expected multiples",
        ),
    ],
)
def test_a_config_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_bad_calls_are_refused_before_anything_changes():
    model = small()
    state = snapshot(model)
    for config, name, message in (
        (
            LoraConfig(2, targets=("up", "nope", "no")),
            "a",
            r"targets \['nope', 'no'\] fit no layer: expected some of .*up",
        ),
        (LoraConfig(2, targets="up"), "a", r"targets \['up'\] fit no layer"),  # an expression has to fit whole names
        (LoraConfig(2, targets=("p",)), "a", r"targets \['p'\] fit no layer"),  # ends are cut at dots
        (LoraConfig(2), "a.b", "adapter name 'a.b': expected letters"),
        (LoraConfig(2), "keys", "adapter name 'keys': expected letters"),
        (LoraConfig(2), "training", "adapter name 'training': expected .* no attribute of a ModuleDict"),
        (
            LoraConfig(4, targets=("query", "down", "embedding"), blocks=4),
            "a",
            r"blocks 4: embedding is an embedding: expected .*query has 10 outputs: expected .*down has 7 inputs",
        ),
        (
            LoraConfig(4, targets=("embedding",), tie_head=True),
            "a",
            "tie_head: expected a GPT whose head is its embedding",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            add_adapter(model, config, name)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    add_adapter(model, LoraConfig(2))
    with pytest.raises(ValueError, match="adapter 'default' exists: expected another name"):
        add_adapter(model, LoraConfig(3))
    for names, weights, message in (
        (["default", "x", "y"], None, r"adapters \['x', 'y'\] are unknown: expected some of \['default'\]"),
        (["default"], [1.0, 2.0], "expected each name once, and a weight for each"),
        (["default", "default"], None, "expected each name once"),
        ("default", [math.nan], r"weights \[nan\]: expected finite numbers"),
        ("default", ["1"], r"weights \['1'\]: expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            activate(model, names, weights)
    with pytest.raises(ValueError, match="adapters .'x'. are unknown"):
        adapter_of(model, "x")
    assert active_adapters(model) == {"default": 1.0} and same_bits(snapshot(model), state)
