"""`minigpt.hf_config`: the config.json files that are published, both layouts, the way there and back, all refusals."""

import dataclasses
import json
import math

import pytest
import torch

from minigpt.config import EXTRAS, GPTConfig
from minigpt.hf_config import config_from_hf, config_to_hf
from minigpt.model import GPT

SMALL = {"vocab_size": 13, "context": 8, "layers": 2, "width": 8, "heads": 2, "kv_heads": 2, "mlp_width": 6}
LLAMA_LIKE = {"norm": "rmsnorm", "mlp": "swiglu", "softcap": 0.0, "qk_norm": False}
GPT2_LIKE = {"positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "softcap": 0.0, "qk_norm": False}
GPT2_LIKE |= {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
LLAMA = GPTConfig(**SMALL, **LLAMA_LIKE)
QWEN3 = GPTConfig(**SMALL, **LLAMA_LIKE | {"qk_norm": True})
GPT2 = GPTConfig(**SMALL, **GPT2_LIKE, tied=True)
ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 8192}

OFF = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
OFF |= {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.51.0"}
PUBLISHED = {  # the model's number of parameters, and the fields of its config.json
    "GPT-2": (
        124_439_808,
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"}
        | {"n_ctx": 1024, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257}
        | {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5}
        | {"summary_activation": None, "summary_first_dropout": 0.1, "summary_type": "cls_index"}
        | {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
    ),
    "Llama 3.2 1B": (
        1_235_814_400,
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 2048, **OFF}
        | {"intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8}
        | {"head_dim": 64, "max_position_embeddings": 131072, "attention_bias": False, "mlp_bias": False}
        | {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": ROPE, "pretraining_tp": 1}
        | {"tie_word_embeddings": True, "vocab_size": 128256},
    ),
    "Qwen2.5 0.5B": (
        494_032_768,
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, **OFF}
        | {"intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2}
        | {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_mrope": False}
        | {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 24}
        | {"tie_word_embeddings": True, "vocab_size": 151936},
    ),
    "Qwen3 0.6B": (
        596_049_920,
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "hidden_size": 1024, **OFF}
        | {"intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8}
        | {"head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
        | {"rope_scaling": None, "attention_bias": False, "sliding_window": None, "use_sliding_window": False}
        | {"max_window_layers": 28, "tie_word_embeddings": True, "vocab_size": 151936},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_number_of_parameters(name, monkeypatch):
    parameters, hf = PUBLISHED[name]
    config = config_from_hf(hf)
    assert config_from_hf(config_to_hf(config)) == config and config.tied
    monkeypatch.setattr(GPT, "initialise", lambda self, seed: None)
    with torch.device("meta"):
        assert GPT(config).num_parameters() == parameters


def test_the_fields_of_llama_3():
    config = config_from_hf(PUBLISHED["Llama 3.2 1B"][1])
    assert (config.rope_base, config.rope_factor, config.rope_low, config.rope_high) == (5e5, 32.0, 1.0, 4.0)
    assert (config.rope_original, config.context, config.norm_eps, config.kv_heads) == (8192, 131072, 1e-5, 8)


def test_absent_fields_mean_what_they_mean_in_transformers():
    hf = {name: value for name, value in PUBLISHED["Llama 3.2 1B"][1].items() if name != "rope_scaling"}
    first_llama = {name: value for name, value in hf.items() if name not in ("num_key_value_heads", "rope_theta")}
    config = config_from_hf(first_llama)
    assert (config.kv_heads, config.rope_base, config.rope_factor) == (32, 10_000.0, 1.0)
    scaled = config_from_hf(hf | {"rope_scaling": {**ROPE, "original_max_position_embeddings": None}})
    assert scaled.rope_original == 131072


def test_both_layouts_of_the_rotary_fields_are_read():
    """rope_theta and rope_scaling (where rope_type was once type) up to transformers 4, then rope_parameters."""
    old = PUBLISHED["Llama 3.2 1B"][1]
    config = config_from_hf(old)
    bare = {name: value for name, value in old.items() if name not in ("rope_theta", "rope_scaling")}
    assert config_from_hf(bare | {"rope_parameters": {**ROPE, "rope_theta": 5e5}}) == config
    renamed = {("type" if name == "rope_type" else name): value for name, value in ROPE.items()}
    assert config_from_hf(old | {"rope_scaling": renamed}) == config
    for nothing in (None, {"rope_type": "default"}, {"type": "default"}):
        assert config_from_hf(old | {"rope_scaling": nothing}).rope_factor == 1.0


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("GPT2LMHeadModel", GPTConfig(**GPT2_LIKE, tied=True, norm_eps=1e-5)),
        ("GPT2LMHeadModel", GPTConfig(**{**GPT2_LIKE, "mlp": "gelu"}, mlp_width=77, context=9)),
        ("LlamaForCausalLM", GPTConfig(**LLAMA_LIKE, kv_heads=2, norm_eps=1e-5, tied=True)),
        ("LlamaForCausalLM", GPTConfig(**LLAMA_LIKE, head_width=48, qkv_bias=True, output_bias=True, mlp_bias=True)),
        ("LlamaForCausalLM", GPTConfig(**LLAMA_LIKE, rope_factor=8.0, rope_low=2.0, rope_high=5.0, rope_original=64)),
        ("Qwen2ForCausalLM", GPTConfig(**LLAMA_LIKE, qkv_bias=True, layers=5, window=6, window_pattern="LLS")),
        ("Qwen3ForCausalLM", GPTConfig(**LLAMA_LIKE | {"qk_norm": True}, rope_base=1e6, head_width=64, kv_heads=1)),
        ("Qwen3ForCausalLM", GPTConfig(**LLAMA_LIKE | {"qk_norm": True}, layers=7, window=6, window_pattern="SSL")),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_our_config_survives_the_way_there_and_back(family, config):
    hf = json.loads(json.dumps(config_to_hf(config)))
    assert hf["architectures"] == [family]
    assert config_from_hf(hf) == config


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA, {"model_type": "mistral"}, "model_type 'mistral': supported are .*Qwen3ForCausalLM"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures .*Classification.*supported are"),
        (LLAMA, {"architectures": ["GPT2LMHeadModel"]}, "architectures .*GPT2LMHeadModel.*model_type 'llama'"),
        (LLAMA, {"architectures": None, "model_type": None}, "architectures .*, model_type None: supported are"),
        (LLAMA, {"hidden_act": "relu"}, "hidden_act 'relu' of LlamaForCausalLM: supported is 'silu' or 'swish'"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' .*: supported is 'default'"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' .*: supported is 'default'"),
        (LLAMA, {"rope_scaling": ROPE | {"type": "yarn"}}, "rope_type 'llama3' .*: supported is 'yarn'"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3"}}, "factor is missing from .* rotary .*: expected float"),
        (LLAMA, {"rope_scaling": ROPE | {"beta_fast": 32.0}}, "beta_fast 32.0: not supported for the rotary"),
        (LLAMA, {"rope_scaling": ROPE, "rope_parameters": {"rope_type": "default"}}, "rope_scaling and rope_param"),
        (LLAMA, {"rope_scaling": "llama3"}, "rope_scaling and rope_parameters .*expected one object"),
        (LLAMA, {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta 10000.0 .*: supported is 5.0"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention .*: not supported"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 .*: supported is 1.0"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts 8: not supported for LlamaForCausalLM, which has atten"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}: not supported"),
        (LLAMA, {"sliding_window": 4}, "sliding_window 4: not supported for LlamaForCausalLM"),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing from the config of LlamaForCausalLM: expected int"),
        (LLAMA, {"hidden_size": "8"}, "hidden_size '8' of LlamaForCausalLM: expected int"),
        (LLAMA, {"hidden_size": True}, "hidden_size True of LlamaForCausalLM: expected int"),
        (LLAMA, {"rms_norm_eps": math.nan}, "rms_norm_eps nan of LlamaForCausalLM: expected float"),
        (LLAMA, {"attention_bias": 1}, "attention_bias 1 of LlamaForCausalLM: expected bool"),
        (LLAMA, {"num_key_value_heads": 3}, "kv_heads 3: expected a divisor of heads, 2"),
        (QWEN3, {"head_dim": None}, "head_dim is missing from the config of Qwen3ForCausalLM"),
        (QWEN3, {"mlp_bias": True}, "mlp_bias True of Qwen3ForCausalLM: supported is False"),
        (QWEN3, {"layer_types": 2}, "layer_types 2: expected 2 times 'full_attention'"),
        (QWEN3, {"layer_types": ["full_attention"]}, "layer_types .*: expected 2 times 'full_attention'"),
        (QWEN3, {"layer_types": ["full_attention", "linear_attention"]}, "layer_types .*linear_attention.*: expected"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 2}, "sliding_window 0, use_sliding_window False and a layer"),
        (
            QWEN3,
            {"use_sliding_window": True, "sliding_window": 0, "layer_types": None, "max_window_layers": 0},
            "dow 0",
        ),
        (QWEN3, {"use_mrope": True}, "use_mrope True of Qwen3ForCausalLM: supported is False"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True .*supported is False"),
        (GPT2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn True .*: supported is False"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights False of GPT2LMHeadModel: supported is True"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention True .*: supported is False"),
        (GPT2, {"activation_function": "relu2"}, "activation_function 'relu2' .*: supported is 'gelu_new' or"),
        (GPT2, {"n_ctx": 4}, "n_ctx 4 of GPT2LMHeadModel: supported is 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_configs_that_we_have_no_equal_of(base, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(config_to_hf(base) | changes)


def test_null_is_absent():
    assert config_from_hf(config_to_hf(LLAMA) | {"sliding_window": None, "attention_bias": None}) == LLAMA


def test_each_field_of_our_config_is_written_or_refused():
    """A field that GPTConfig gains belongs into `minigpt.hf_config`, and then here."""
    written = "vocab_size context layers width heads kv_heads head_width positions rope_base rope_factor rope_low"
    written += " rope_high rope_original norm norm_eps mlp mlp_width qkv_bias output_bias mlp_bias qk_norm tied window"
    refused = {"softcap", "value_embeddings", *EXTRAS}
    assert {field.name for field in dataclasses.fields(GPTConfig)} == {*written.split(), "window_pattern"} | refused


def refused_fields(**changes) -> str:
    with pytest.raises(ValueError, match="no family of transformers has this GPT") as refusal:
        config_to_hf(GPTConfig(**{**SMALL, **changes}))
    return str(refusal.value)


def test_models_that_no_family_has():
    own = refused_fields()
    assert "Qwen3ForCausalLM is nearest" in own
    assert "softcap 15.0 (has 0)" in own and "mlp 'relu2' (has 'swiglu')" in own and "qk_norm" not in own
    llama = {"mlp": "swiglu", "softcap": 0.0, "qk_norm": False}
    assert "value_embeddings True (has False)" in refused_fields(**llama, value_embeddings=True)
    assert "window 4 (has 0)" in refused_fields(**llama, window=4)
    assert "width 8 (has 6)" in refused_fields(**llama, heads=3, kv_heads=3, head_width=4)
    assert "output_bias True (has False)" in refused_fields(**llama, output_bias=True)
    assert "mlp_bias True (has False)" in refused_fields(**llama | {"qk_norm": True}, mlp_bias=True)
    gpt2 = GPT2_LIKE
    assert "kv_heads 1 (has 2)" in refused_fields(**gpt2, kv_heads=1)
    assert "head_width 6 (has 0 or 4)" in refused_fields(**gpt2, head_width=6)
    assert "mlp_bias False (has True)" in refused_fields(**gpt2 | {"mlp_bias": False})
    assert "mlp 'relu2' (has 'gelu' or 'gelu_tanh')" in refused_fields(**gpt2 | {"mlp": "relu2"})
    config_to_hf(GPTConfig(**SMALL, **llama, window=4, window_pattern="L"))  # no layer slides
