"""Adapter files against peft: made there and loaded here, made here and loaded there, gradients, everything refused."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from lora.config import LoraConfig
from lora.lora import activate, adapter_names, adapter_of, add_adapter, fold, lora_layers, merge
from lora.peft_files import load_adapter, save_adapter
from tests.lora.families import ATTENTION, EVERYTHING, FAMILIES, LIMITS, TOKENS, Pair, randomised, save_theirs, worst
from tests.minigpt.models import random_gpt

REGEX = {"gpt2": r".*\.1\.(attn\.c_attn|mlp\.c_proj)", "llama": r".*layers\.1\..*_proj", "qwen3": r".*\.(q|down)_proj"}
OPTIONS = {
    "everything": lambda family: {"r": 3, "lora_alpha": 7, "target_modules": EVERYTHING[family]},
    "rslora, patterns": lambda family: {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": EVERYTHING[family],
        "rank_pattern": {r"[a-z]+\.0\.attn.c_attn": 2, r"layers.1.self_attn.(q|k)_proj": 5, "c_fc": 1, "down_proj": 7},
        "alpha_pattern": {"mlp.c_proj": 11, "o_proj": 3.5},
    },
    "regex": lambda family: {"r": 2, "lora_alpha": 9, "target_modules": REGEX[family]},
    "all-linear": lambda family: {"r": 2, "target_modules": "all-linear"},
}


CASES = [(family, options, torch.float64) for family in FAMILIES for options in OPTIONS if family != "gpt2 untied"]
CASES += [(family, "everything", torch.float32) for family in FAMILIES] + [("gpt2 untied", "everything", torch.float64)]


@pytest.mark.parametrize("family, options, dtype", CASES)
def test_an_adapter_of_peft_gives_the_same_logits_here(tmp_path, family, options, dtype):
    pair = Pair(family, dtype)
    theirs, ours = pair.adapted(**OPTIONS[options](family)), pair.ours()
    plain = ours(TOKENS)
    load_adapter(ours, save_theirs(theirs, tmp_path / "adapter"))
    assert worst(ours(TOKENS), theirs(TOKENS).logits) <= LIMITS[dtype]
    assert worst(ours(TOKENS), plain) > 0.01  # or nothing was compared
    merge(ours)
    assert worst(ours(TOKENS), theirs(TOKENS).logits) <= LIMITS[dtype]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("dtype, rslora", [(torch.float64, True), (torch.float64, False), (torch.float32, True)])
def test_our_adapter_gives_the_same_logits_in_peft_and_again_here(tmp_path, family, dtype, rslora):
    pair = Pair(family, dtype)
    pattern = {"c_attn": 2, r"1.self_attn.q_proj": 5}
    config = LoraConfig(3, 8.0, tuple(EVERYTHING[family]), pattern, {"mlp.down": 2.0, "up_proj": 5.0}, rslora)
    ours = pair.ours()
    add_adapter(ours, config)
    randomised(ours)
    save_adapter(ours, tmp_path / "adapter")
    theirs, again = pair.loaded(tmp_path / "adapter"), pair.ours()
    assert worst(ours(TOKENS), theirs(TOKENS).logits) <= LIMITS[dtype]
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(TOKENS), ours(TOKENS))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_targets_by_our_names_are_written_as_theirs(tmp_path):
    pair = Pair("llama")
    ours = pair.ours()
    add_adapter(ours, LoraConfig(2, 3.0, ("query", "blocks.1.mlp.gate"), {"0.attention.query": 4}, {"gate": 5.0}))
    randomised(ours)
    save_adapter(ours, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj"]
    assert written["target_modules"] == modules
    assert worst(ours(TOKENS), pair.loaded(tmp_path / "adapter")(TOKENS).logits) <= 1e-10


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_gradients_equal_those_of_peft(tmp_path, family):
    pair = Pair(family)
    theirs, ours = pair.adapted(r=3, lora_alpha=5, target_modules=EVERYTHING[family]), pair.ours()
    load_adapter(ours, save_theirs(theirs, tmp_path / "adapter"))
    targets = TOKENS.roll(-1, dims=1)
    F.cross_entropy(theirs(TOKENS).logits.flatten(0, 1), targets.flatten()).backward()
    ours(TOKENS, targets).backward()
    wanted = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    compared = 0
    for place, parts in adapter_of(ours, "default").items():
        kind, end = ("lora_embedding_", "") if place.embedding else ("lora_", ".weight")
        of_A, of_B = (wanted[f"base_model.model.{place.theirs}.{kind}{factor}{end}"] for factor in "AB")
        assert worst(parts[0].A.grad, of_A) <= 1e-10
        assert worst(torch.cat([part.B.grad for part in parts]), of_B) <= 1e-10
        compared += 2
    assert compared == len(wanted) and all(p.grad is None for p in ours.parameters() if not p.requires_grad)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_two_adapters_weighted_equal_pefts_weighted_adapter(tmp_path, family):
    pair, targets = Pair(family), ATTENTION[family]
    theirs, ours = pair.adapted(r=3, lora_alpha=5, target_modules=targets), pair.ours()
    load_adapter(ours, save_theirs(theirs, tmp_path / "one"), "one")
    theirs.add_adapter("two", pair.adapted(r=2, lora_alpha=9, target_modules=targets).peft_config["default"])
    randomised(theirs, seed=6)
    save_theirs(theirs, tmp_path / "both")  # "default" there, the new one in a folder below
    load_adapter(ours, tmp_path / "both/two", "two")
    load_adapter(ours, tmp_path / "both", "default")
    theirs.add_weighted_adapter(["default", "two"], [0.3, 1.7], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    activate(ours, ["default", "two"], [0.3, 1.7])
    assert worst(ours(TOKENS), theirs(TOKENS).logits) <= 1e-10
    for name in ("default", "two"):
        theirs.set_adapter(name)
        activate(ours, name)
        assert worst(ours(TOKENS), theirs(TOKENS).logits) <= 1e-10
    activate(ours, [])
    assert torch.equal(ours(TOKENS), pair.ours()(TOKENS))


def test_folded_models_equal_pefts_merge_and_unload(tmp_path):
    pair = Pair("llama")
    theirs, ours = pair.adapted(r=3, target_modules=EVERYTHING["llama"]), pair.ours()
    load_adapter(ours, save_theirs(theirs, tmp_path / "adapter"))
    fold(ours)
    assert not lora_layers(ours) and ours.state_dict().keys() == pair.ours().state_dict().keys()
    assert worst(ours(TOKENS), theirs.merge_and_unload()(TOKENS).logits) <= 1e-10


NAMES = ["model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "mlp.up_proj", "up_proj", "lm_head"]
PATTERNS = ["q_proj", "proj", "up_proj", "1.self_attn.q_proj", r"layers\.1\..*", ".*", "head", "lm_head", "mlp.up_proj"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_fit_what_they_fit_in_peft(pattern):
    for name in NAMES:
        first = {pattern: 3, "q_proj|lm_head": 5}
        wanted = first.get(get_pattern_key(first, name), 8)
        config = LoraConfig(8, 2.0, (pattern,), rank_pattern=first, alpha_pattern={k: v / 2 for k, v in first.items()})
        assert config.rank_of(name) == wanted and config.alpha_of(name) == (2.0 if wanted == 8 else wanted / 2)
        for targets in ((pattern,), pattern):
            theirs = PeftConfig(target_modules=targets if isinstance(targets, str) else list(targets))
            assert LoraConfig(targets=targets).wants(name) == bool(check_target_module_exists(theirs, name))


def broken(folder, tensors=None, **fields):
    """Changes the files: `tensors` gets the dict of them."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    if tensors is not None:
        found = load_file(folder / "adapter_model.safetensors")
        tensors(found)
        save_file(found, folder / "adapter_model.safetensors")


@pytest.fixture
def llama_adapter(tmp_path):
    """A model, untouched, and the folder of an adapter of it."""
    pair = Pair("llama")
    save_theirs(pair.adapted(r=3, target_modules=["q_proj", "up_proj"]), tmp_path / "adapter")
    return pair.ours(), tmp_path / "adapter"


UNSUPPORTED = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "layers_to_transform": 0,
    "exclude_modules": ["up_proj"],
    "use_bdlora": {"nblocks": 0},
    "lora_bias": True,
    "trainable_token_indices": [3],
    "an_option_of_tomorrow": 1,
    "bias": "all",
    "init_lora_weights": "pissa",
    "peft_type": "IA3",
    "r": 0,
    "lora_alpha": -1,
    "target_modules": None,
}


def test_options_that_we_have_not_are_refused_by_name_all_at_once(llama_adapter):
    model, folder = llama_adapter
    names = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"}
    for field, value in UNSUPPORTED.items():
        before = (folder / "adapter_config.json").read_text()
        broken(folder, **{field: value})
        with pytest.raises(ValueError, match=rf"adapter_config.json: {names.get(field, field)} "):
            load_adapter(model, folder)
        (folder / "adapter_config.json").write_text(before)
    broken(folder, **UNSUPPORTED)
    with pytest.raises(ValueError) as caught:
        load_adapter(model, folder)
    named = [field for field in UNSUPPORTED if field not in names]
    assert all(f"{field} " in str(caught.value) for field in named)
    assert not lora_layers(model)


def test_everything_wrong_with_the_tensors_is_listed_and_the_model_left_alone(llama_adapter):
    model, folder = llama_adapter
    first, second = (f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in range(2))
    third, fourth = (f"base_model.model.model.layers.{i}.mlp.up_proj.lora_B.weight" for i in range(2))

    def spoil(tensors):
        del tensors[first]
        tensors[second] = tensors[second][:2].contiguous()
        tensors[third][1, 1] = math.nan
        tensors[third][0, 0] = math.inf
        tensors[fourth] = tensors[fourth].int()
        tensors["base_model.model.model.layers.7.mlp.up_proj.lora_B.weight"] = torch.ones(2, 2)

    broken(folder, spoil)
    with pytest.raises(ValueError) as caught:
        load_adapter(model, folder)
    said = str(caught.value)
    assert f"{first} is missing" in said
    assert f"{second} has shape [2, 16], expected [3, 16]" in said
    assert f"{third} has 2 values that are NaN or infinite" in said
    assert f"{fourth} has dtype torch.int32, expected floating point" in said
    assert "layers.7.mlp.up_proj.lora_B.weight is unexpected" in said and said.count(";") == 4
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_an_adapter_that_would_be_rounded_is_refused(tmp_path):
    pair, wide = Pair("llama", torch.float32), Pair("llama", torch.float64)
    ours = wide.ours()
    add_adapter(ours, LoraConfig(2, targets=("query",)))
    save_adapter(ours, tmp_path / "adapter")
    message = r"q_proj.lora_A.weight has dtype torch.float64, expected at most torch.float32"
    with pytest.raises(ValueError, match=message):
        load_adapter(pair.ours(), tmp_path / "adapter")
    load_adapter(wide.ours(), tmp_path / "adapter")


def test_adapters_of_other_models_and_unknown_targets_are_refused(llama_adapter):
    (model, folder), other = llama_adapter, Pair("gpt2").ours()
    with pytest.raises(ValueError, match=r"targets \['q_proj', 'up_proj'\] fit no layer: expected .*c_attn, c_proj"):
        load_adapter(other, folder)
    own = random_gpt(layers=2, width=8, heads=2, kv_heads=2, mlp_width=12)  # no family has it
    with pytest.raises(ValueError, match=r"targets \['q_proj', 'up_proj'\] fit no layer: expected .*query"):
        load_adapter(own, folder)
    broken(folder, target_modules=["q_proj", "w_proj"])
    with pytest.raises(ValueError, match=r"targets \['w_proj'\] fit no layer"):
        load_adapter(model, folder)
    assert not lora_layers(model) and not lora_layers(other) and not lora_layers(own)


def test_a_frozen_weight_in_the_file_must_be_the_models(tmp_path):
    pair = Pair("llama")
    model = pair.ours()
    folder = save_theirs(pair.adapted(r=2, target_modules=["embed_tokens"]), tmp_path / "adapter")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(folder / "adapter_model.safetensors")
    broken(folder, lambda tensors: tensors[key].mul_(1.5))
    with pytest.raises(ValueError, match=f"{key} differs from the model's weight"):
        load_adapter(model, folder)


def test_files_that_lack_or_are_cut_are_refused(llama_adapter):
    model, folder = llama_adapter
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match="adapter_model.safetensors: not a whole safetensors file"):
        load_adapter(model, folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle, which can run any code"):
        load_adapter(model, folder)
    for text, message in (("{", "not JSON"), ("[]", "expected a JSON object, got list")):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, folder)
    config.unlink()
    with pytest.raises(ValueError, match="no such file; expected a folder with adapter_config.json"):
        load_adapter(model, folder)


def test_a_save_that_fails_leaves_the_older_adapter(llama_adapter, tmp_path, monkeypatch):
    model, folder = llama_adapter
    load_adapter(model, folder)
    save_adapter(model, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    randomised(model, seed=9)
    monkeypatch.setattr("common.log.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_adapters_that_the_format_has_no_place_for_are_not_written(tmp_path):
    for family, config, message in (
        ("gpt2", LoraConfig(2, targets=("query",)), "blocks.0.attention.query, .*expected an adapter of the whole"),
        ("gpt2", LoraConfig(2, targets=("wte",), tie_head=True), "tie_head: PEFT's files have no adapter"),
    ):
        model = Pair(family).ours()
        add_adapter(model, config)
        with pytest.raises(ValueError, match=message):
            save_adapter(model, tmp_path / "adapter")
    own = random_gpt(layers=1, width=8, heads=2, kv_heads=2, mlp_width=12)
    add_adapter(own, LoraConfig(2))
    with pytest.raises(ValueError, match="no family of transformers has this GPT"):
        save_adapter(own, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapters \['other'\] are unknown: expected some of \['default'\]"):
        save_adapter(own, tmp_path / "adapter", "other")
    assert not (tmp_path / "adapter").exists() and adapter_names(own) == ["default"]
