"""Block-diagonal adapter files against peft: made there and loaded here, the other way round, gradients, refusals."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lora.config import LoraConfig
from lora.lora import activate, adapter_of, add_adapter, fold, lora_layers, merge
from lora.peft_blocks import Blocks
from lora.peft_files import load_adapter, save_adapter
from tests.lora.families import ATTENTION, LIMITS, TOKENS, Pair, bd_lora_config, randomised, save_theirs, worst

COLUMN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW = ["o_proj", "down_proj"]
KINDS = {"llama": ROW + COLUMN, "llama even": [*ROW, *COLUMN, "lm_head"], "qwen3": ROW + COLUMN}


def bd_lora(blocks: int, **changes) -> dict:
    lists = {"target_modules_bd_a": list(ROW), "target_modules_bd_b": [*COLUMN, "lm_head"]}
    return {"nblocks": blocks, **lists, **changes}


def adapted(pair: Pair, blocks: int, **options):
    """A random adapter made by peft, block-diagonal in fact."""
    options = {"r": 4, "lora_alpha": 7, "target_modules": KINDS[pair.family]} | options
    model = pair.adapted(**options, use_bdlora=bd_lora_config(**bd_lora(blocks)))
    made = [type(module).__name__ for module in model.modules()].count("BlockDiagonalLinear")
    assert made == sum(1 if kind == "lm_head" else 2 for kind in options["target_modules"])
    return model


CASES = [
    ("llama", 2, torch.float64),
    ("llama", 4, torch.float32),
    ("llama even", 4, torch.float64),
    ("qwen3", 2, torch.float32),
    ("qwen3", 4, torch.float64),
]


@pytest.mark.parametrize("family, blocks, dtype", CASES)
def test_an_adapter_of_peft_gives_the_same_logits_here(tmp_path, family, blocks, dtype):
    pair = Pair(family, dtype)
    theirs, ours = (
        adapted(pair, blocks, rank_pattern={"1.self_attn.q_proj": 8, "down_proj": 12}, use_rslora=True),
        pair.ours(),
    )
    plain = ours(TOKENS)
    config = load_adapter(ours, save_theirs(theirs, tmp_path / "adapter"))
    assert config.blocks == blocks and worst(ours(TOKENS), plain) > 0.01
    assert worst(ours(TOKENS), theirs(TOKENS).logits) <= LIMITS[dtype]
    merge(ours)
    assert worst(ours(TOKENS), theirs(TOKENS).logits) <= LIMITS[dtype]
    fold(ours)
    assert worst(ours(TOKENS), theirs.merge_and_unload()(TOKENS).logits) <= LIMITS[dtype]


@pytest.mark.parametrize("family, blocks, dtype", CASES)
def test_our_adapter_gives_the_same_logits_in_peft_and_again_here(tmp_path, family, blocks, dtype):
    pair = Pair(family, dtype)
    ours, again = pair.ours(), pair.ours()
    add_adapter(ours, LoraConfig(4, 8.0, tuple(KINDS[family]), {"1.mlp.down": 8}, {"up_proj": 5.0}, blocks=blocks))
    randomised(ours)
    save_adapter(ours, tmp_path / "adapter")
    theirs = pair.loaded(tmp_path / "adapter")
    assert any(type(module).__name__ == "BlockDiagonalLinear" for module in theirs.modules())
    assert worst(ours(TOKENS), theirs(TOKENS).logits) <= LIMITS[dtype]
    assert load_adapter(again, tmp_path / "adapter").blocks == blocks
    assert torch.equal(again(TOKENS), ours(TOKENS))


def test_the_patterns_are_written_for_the_layers_that_there_are(tmp_path):
    pair = Pair("llama")
    for targets, in_A, in_B in (
        (("query", "blocks.1.mlp.down", "gate_proj"), ["down_proj"], ["gate_proj", "q_proj"]),
        (("output",), ["o_proj"], []),
        ("all-linear", sorted(ROW), sorted(COLUMN)),
    ):
        ours = pair.ours()
        add_adapter(ours, LoraConfig(2, targets=targets, blocks=2))
        randomised(ours)
        save_adapter(ours, tmp_path / "adapter")
        written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["use_bdlora"]
        lists = {"target_modules_bd_a": in_A, "target_modules_bd_b": in_B}
        assert written == lists | {"nblocks": 2, "match_strict": True}
        assert worst(ours(TOKENS), pair.loaded(tmp_path / "adapter")(TOKENS).logits) <= 1e-10
    ours = pair.ours()
    add_adapter(ours, LoraConfig(2))
    save_adapter(ours, tmp_path / "plain")
    assert "use_bdlora" not in (tmp_path / "plain/adapter_config.json").read_text()


@pytest.mark.parametrize("family", ["llama even", "qwen3"])
def test_gradients_equal_those_of_peft(tmp_path, family):
    pair = Pair(family)
    theirs, ours = adapted(pair, 2), pair.ours()
    load_adapter(ours, save_theirs(theirs, tmp_path / "adapter"))
    targets = TOKENS.roll(-1, dims=1)
    F.cross_entropy(theirs(TOKENS).logits.flatten(0, 1), targets.flatten()).backward()
    ours(TOKENS, targets).backward()
    wanted = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    compared = 0
    for place, (part,) in adapter_of(ours, "default").items():
        for factor, letter in ((part.A, "A"), (part.B, "B")):
            assert worst(factor.grad, wanted[f"base_model.model.{place.theirs}.lora_{letter}.weight"]) <= 1e-10
            compared += 1
    assert compared == len(wanted) > 0 and all(p.grad is None for p in ours.parameters() if not p.requires_grad)


def test_block_diagonal_and_plain_adapters_in_one_model(tmp_path):
    pair = Pair("llama")
    blocks, plain, ours = adapted(pair, 2), pair.adapted(r=3, target_modules=ATTENTION["llama"]), pair.ours()
    load_adapter(ours, save_theirs(plain, tmp_path / "plain"), "plain")
    load_adapter(ours, save_theirs(blocks, tmp_path / "blocks"), "blocks")
    for name, theirs in (("plain", plain), ("blocks", blocks)):
        activate(ours, name)
        assert worst(ours(TOKENS), theirs(TOKENS).logits) <= 1e-10


@pytest.fixture
def adapter(tmp_path):
    """A model, untouched, and the folder of an adapter of it in two blocks."""
    pair = Pair("llama")
    theirs = adapted(pair, 2, target_modules=["q_proj", "o_proj", "down_proj"])
    return pair.ours(), save_theirs(theirs, tmp_path / "adapter")


def rewritten(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_patterns_that_say_another_thing_are_refused_by_layer(adapter):
    model, folder = adapter
    rewritten(folder, use_bdlora=bd_lora(2, target_modules_bd_a=["o_proj", "1.self_attn.q"], target_modules_bd_b=None))
    with pytest.raises(ValueError) as caught:
        load_adapter(model, folder)
    said = str(caught.value)
    assert "layers.0.self_attn.q_proj: use_bdlora makes none, expected B block-diagonal" in said
    assert "layers.1.self_attn.q_proj: use_bdlora makes A block-diagonal, expected B" in said
    assert "layers.1.mlp.down_proj: use_bdlora makes none, expected A block-diagonal" in said
    assert "o_proj" not in said and said.count(";") == 3 and not lora_layers(model)
    rewritten(folder, use_bdlora=bd_lora(2, target_modules_bd_b=["proj"]))
    with pytest.raises(ValueError, match="o_proj: use_bdlora makes both factors block-diagonal, expected A"):
        load_adapter(model, folder)
    rewritten(folder, use_bdlora=bd_lora(2, match_strict=False, target_modules_bd_a=["o_proj", "mlp.down"]))
    load_adapter(model, folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"use_bdlora": [2]}, r"use_bdlora \[2\]: expected an object with target_modules_bd_a"),
        ({"use_bdlora": bd_lora(True)}, "use_bdlora nblocks True: expected a whole number"),
        ({"use_bdlora": bd_lora(0, match_strict=1)}, "nblocks 0: expected a whole .*match_strict 1: expected true"),
        ({"use_bdlora": bd_lora(2, target_modules_bd_a="o_proj")}, "target_modules_bd_a 'o_proj': expected a list"),
        ({"use_bdlora": bd_lora(2, target_modules_bd_b=[3])}, r"target_modules_bd_b \[3\]: expected a list"),
        ({"use_bdlora": bd_lora(2, blocks_c=1), "use_dora": True}, "use_dora True: not .*use_bdlora blocks_c 1: not"),
        ({"use_bdlora": bd_lora(3)}, "rank 4 in 3 blocks: expected multiples"),
        ({"use_bdlora": bd_lora(2), "target_modules": ["q_proj", "embed_tokens"]}, "embedding is an embedding"),
        ({"use_bdlora": bd_lora(2), "target_modules": ["q_proj", "lm_head"]}, "head has 31 outputs: expected a mult"),
        ({"use_bdlora": None}, r"o_proj.lora_A.weight has shape \[4, 8\], expected \[4, 16\]"),
        ({"use_bdlora": bd_lora(4)}, r"o_proj.lora_A.weight has shape \[4, 8\], expected \[4, 4\]"),
        ({"use_bdlora": bd_lora(1)}, r"q_proj.lora_B.weight has shape \[16, 2\], expected \[16, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(adapter, fields, message):
    model, folder = adapter
    rewritten(folder, **fields)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert not lora_layers(model)


def test_one_block_is_a_plain_adapter_whatever_the_patterns(tmp_path):
    pair = Pair("llama")
    theirs, ours = adapted(pair, 1), pair.ours()
    load_adapter(ours, save_theirs(theirs, tmp_path / "adapter"))
    assert worst(ours(TOKENS), theirs(TOKENS).logits) <= 1e-10
    assert Blocks.read({}) == Blocks.read(None) == Blocks() and Blocks(1, ("x",)).faults([]) == []


def test_vllms_packing_is_refused_by_its_shapes(adapter):
    model, folder = adapter
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if "o_proj.lora_A" in key]:
        tensors[key] = torch.cat(tensors[key].chunk(2), dim=1)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"o_proj.lora_A.weight has shape \[2, 16\], expected \[4, 8\]"):
        load_adapter(model, folder)


def test_gpt2_has_blocks_here_and_none_in_peft(tmp_path):
    pair = Pair("gpt2")
    with pytest.raises(AttributeError):  # so there is nothing to be equal to
        pair.adapted(
            r=2, target_modules=["c_attn"], use_bdlora=bd_lora_config(target_modules_bd_b=["c_attn"], nblocks=2)
        )
    ours = pair.ours()
    add_adapter(ours, LoraConfig(2, targets=("query", "output"), blocks=2))
    with pytest.raises(ValueError, match="blocks 2 in GPT2LMHeadModel: PEFT has none beside its Conv1D layers"):
        save_adapter(ours, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_peft_draws_block_diagonal_factors_wider_than_we_do():
    """Our own stay comparable with plain ones; that theirs do not is a fact for whoever compares the two."""
    bd_lora_config()  # or skips
    BlockDiagonalLinear = pytest.importorskip("peft.tuners.lora.variants").BlockDiagonalLinear
    drawn = BlockDiagonalLinear(400, 40, nblocks=4).weight.abs().max().item()
    assert 0.99 * (6 * 4 / 400) ** 0.5 <= drawn <= (6 * 4 / 400) ** 0.5
