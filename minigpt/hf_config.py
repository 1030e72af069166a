"""Between the config.json of Hugging Face's transformers and GPTConfig: GPT-2, Llama 2 and 3, Qwen2, Qwen3.

Each field of a config.json is read, is on the list of those that leave the logits of a trained model alone (token
numbers, dropout rates, how it was initialised), or is refused: there is no third kind. Refused therefore: rotary
scalings other than Llama 3's, mixtures of experts, quantisation, other architectures. The way back refuses a GPT that
no family of transformers has.
"""

import math
from collections.abc import Mapping
from typing import Any

from minigpt.config import EXTRAS, GPTConfig

GPT2, LLAMA, QWEN2, QWEN3 = "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
MODEL_TYPES = {"gpt2": GPT2, "llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}
GPT2_ACTIVATIONS = dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh")
GPT2_ACTIVATIONS |= dict.fromkeys(("gelu", "gelu_python"), "gelu")
# Fields that say nothing about the function from tokens to logits.
NO_INFLUENCE = """
    architectures model_type transformers_version _name_or_path _commit_hash torch_dtype dtype tokenizer_class
    bos_token_id eos_token_id pad_token_id sep_token_id use_cache gradient_checkpointing pretraining_tp
    chunk_size_feed_forward output_attentions output_hidden_states output_past return_dict initializer_range
    attention_dropout attn_pdrop embd_pdrop resid_pdrop task_specific_params id2label label2id num_labels _num_labels
    problem_type summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    do_sample max_length temperature top_k top_p max_sequence_length is_llama_config transformers.js_config
    unsloth_version unsloth_fixed
"""


class Fields:
    """A config.json whose fields are taken one at a time; `finish` refuses those that nobody took."""

    def __init__(self, hf: Mapping[str, Any], owner: str):
        self.hf, self.owner, self.taken = hf, owner, set()

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """The field as `kind` (float takes whole numbers too), null and absent are the default; None: must be there."""
        self.taken.add(name)
        value = self.hf.get(name)
        if value is None:
            if default is None:
                raise ValueError(f"{name} is missing from the config of {self.owner}: expected {kind.__name__}")
            return default
        fits = isinstance(value, int | float if kind is float else kind)
        if not fits or isinstance(value, bool) != (kind is bool) or (kind is float and not math.isfinite(value)):
            raise ValueError(f"{name} {value!r} of {self.owner}: expected {kind.__name__}")
        return kind(value)

    def only(self, name: str, *supported: Any) -> Any:
        """The field, which must be one of these values; the first one when it is absent."""
        self.taken.add(name)
        value = supported[0] if self.hf.get(name) is None else self.hf[name]
        if value not in supported:
            raise ValueError(f"{name} {value!r} of {self.owner}: supported is {' or '.join(map(repr, supported))}")
        return value

    def finish(self) -> None:
        known = self.taken.union(NO_INFLUENCE.split())
        unknown = [f"{name} {value!r}" for name, value in self.hf.items() if name not in known and value is not None]
        if unknown:
            supported = ", ".join(sorted(self.taken))
            raise ValueError(f"{', '.join(unknown)}: not supported for {self.owner}, which has {supported}")


def config_from_hf(hf: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of a config.json, of transformers 4 (with rope_theta, rope_scaling) or 5 (rope_parameters).

    Raises ValueError, naming field, value and what is supported, for whatever our model has no equal of. Absent fields
    mean what they mean in transformers, but those that decide shapes must be there. Dropout is not part of our model:
    the rates are dropped, which training sees and inference does not.
    """
    fields = Fields(hf, _family(hf))
    fields.only("is_encoder_decoder", False)
    config = _read_gpt2(fields) if fields.owner == GPT2 else _read_llama(fields)
    fields.finish()
    return GPTConfig(**config)


def _family(hf: Mapping[str, Any]) -> str:
    kind, names = hf.get("model_type"), hf.get("architectures") or []
    for model_type, family in MODEL_TYPES.items():
        if kind in (None, model_type) and names in ([], [family]) and (kind or names):
            return family
    supported = ", ".join(f"{family} ({model_type})" for model_type, family in MODEL_TYPES.items())
    raise ValueError(f"architectures {names!r}, model_type {kind!r}: supported are {supported}")


def _read_gpt2(fields: Fields) -> dict[str, Any]:
    fields.only("scale_attn_weights", True)
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        fields.only(name, False)
    width, heads, context = (fields.take(name, int) for name in ("n_embd", "n_head", "n_positions"))
    fields.only("n_ctx", context)
    return {
        "vocab_size": fields.take("vocab_size", int),
        "context": context,
        "layers": fields.take("n_layer", int),
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "positions": "learned",
        "norm": "layernorm",
        "norm_eps": fields.take("layer_norm_epsilon", float, 1e-5),
        "mlp": GPT2_ACTIVATIONS[fields.only("activation_function", *GPT2_ACTIVATIONS)],
        "mlp_width": fields.take("n_inner", int, 4 * width),
        "tied": fields.take("tie_word_embeddings", bool, True),
        **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), True),
        "qk_norm": False,
        "softcap": 0.0,
    }


def _read_llama(fields: Fields) -> dict[str, Any]:
    """Llama, and the Qwen families, which are Llama with other biases, QK-norm and sliding windows."""
    family = fields.owner
    fields.only("hidden_act", "silu", "swish")
    for name in ("rope_interleaved", "use_mrope"):
        fields.only(name, False)
    shape = ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")
    width, heads, layers, context = (fields.take(name, int) for name in shape)
    head_width = fields.take("head_dim", int, None if family == QWEN3 else 0)
    bias = fields.only("attention_bias", True) if family == QWEN2 else fields.take("attention_bias", bool, False)
    mlp_bias = fields.take("mlp_bias", bool, False) if family == LLAMA else fields.only("mlp_bias", False)
    return {
        "vocab_size": fields.take("vocab_size", int),
        "context": context,
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": fields.take("num_key_value_heads", int, heads if family == LLAMA else None),
        "head_width": 0 if head_width * heads == width else head_width,
        "positions": "rotary",
        "norm": "rmsnorm",
        "norm_eps": fields.take("rms_norm_eps", float, 1e-6),
        "mlp": "swiglu",
        "mlp_width": fields.take("intermediate_size", int),
        "tied": fields.take("tie_word_embeddings", bool, False),
        "qkv_bias": bias,
        "output_bias": bias and family != QWEN2,
        "mlp_bias": mlp_bias,
        "qk_norm": family == QWEN3,
        "softcap": 0.0,
        **_read_rope(fields, context),
        **({} if family == LLAMA else _read_window(fields, layers)),
    }


def _read_rope(fields: Fields, context: int) -> dict[str, float]:
    fields.taken |= {"rope_scaling", "rope_parameters"}
    given = [fields.hf[name] for name in ("rope_scaling", "rope_parameters") if fields.hf.get(name)]
    if not all(isinstance(one, Mapping) and one == given[0] for one in given):
        raise ValueError(f"rope_scaling and rope_parameters {given}: expected one object, or two equal ones")
    rope = Fields(given[0] if given else {}, f"the rotary embedding of {fields.owner}")
    if rope.hf.get("type") is not None:  # the name of rope_type before transformers 4.43
        rope.only("rope_type", rope.hf["type"])
    kind = rope.only("type" if rope.hf.get("rope_type") is None else "rope_type", "default", "llama3")
    rope.taken |= {"type", "rope_type"}
    for one in (fields, rope):
        one.only("partial_rotary_factor", 1.0)
    base = rope.take("rope_theta", float, fields.take("rope_theta", float, 10_000.0))
    fields.only("rope_theta", base)
    numbers = {"rope_base": base}
    if kind == "llama3":
        numbers["rope_factor"] = rope.take("factor", float)
        numbers["rope_low"] = rope.take("low_freq_factor", float)
        numbers["rope_high"] = rope.take("high_freq_factor", float)
        numbers["rope_original"] = rope.take("original_max_position_embeddings", int, context)
    rope.finish()
    return numbers


def _read_window(fields: Fields, layers: int) -> dict[str, Any]:
    window, used = fields.take("sliding_window", int, 0), fields.take("use_sliding_window", bool, False)
    first = fields.take("max_window_layers", int, 28)  # below it layers see everything; layer_types overrules it
    fields.taken.add("layer_types")
    kinds = fields.hf.get("layer_types")
    if kinds is None:
        slides_from = first if used and fields.hf.get("sliding_window") is not None else layers
        kinds = ["sliding_attention" if layer >= slides_from else "full_attention" for layer in range(layers)]
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in ("sliding_attention", "full_attention") for kind in kinds)
    ):
        raise ValueError(f"layer_types {kinds}: expected {layers} times 'full_attention' or 'sliding_attention'")
    if "sliding_attention" not in kinds:
        return {}
    if not used or window < 1:
        told = f"sliding_window {window}, use_sliding_window {used} and a layer of sliding_attention"
        raise ValueError(f"{told}: expected a positive number and True")
    letters = "".join("S" if kind == "sliding_attention" else "L" for kind in kinds)
    period = next(p for p in range(1, layers + 1) if all(letters[i] == letters[i % p] for i in range(layers)))
    return {"window": window, "window_pattern": letters[:period]}


def family_of(config: GPTConfig) -> str:
    """The transformers class that computes the same logits. Raises ValueError naming the fields that it has not."""
    if config.qk_norm:
        family = QWEN3
    elif config.positions == "learned":
        family = GPT2
    else:
        family = QWEN2 if config.qkv_bias and not config.output_bias else LLAMA
    wrong = []
    for name, values in _supported(config)[family].items():
        if (own := getattr(config, name)) not in values:
            wrong.append(f"{name} {own!r} (has {' or '.join(map(repr, values))})")
    if wrong:
        raise ValueError(f"no family of transformers has this GPT; {family} is nearest, but: {'; '.join(wrong)}")
    return family


def _supported(config: GPTConfig) -> dict[str, dict[str, tuple]]:
    """For each family the values that it has, of the fields where it has not all and that did not choose it."""
    slides = any(config.window_of(layer) for layer in range(config.layers))
    common = {"softcap": (0,), "value_embeddings": (False,)} | {
        name: (type(getattr(config, name))(),) for name in EXTRAS
    }
    everything_seen = {"window": (0,) if slides else (config.window,)}
    whole_heads = {"width": (config.width // config.heads * config.heads,)}  # asked for even with a head_dim
    llama = common | {"positions": ("rotary",), "norm": ("rmsnorm",), "mlp": ("swiglu",)}
    gpt2 = common | {"positions": ("learned",), "norm": ("layernorm",), "mlp": ("gelu", "gelu_tanh")}
    gpt2 |= dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), (True,))
    gpt2 |= {"kv_heads": (config.heads,), "head_width": (0, config.width // config.heads)}
    return {
        QWEN3: llama | {"output_bias": (config.qkv_bias,), "mlp_bias": (False,)},
        LLAMA: llama | {"output_bias": (config.qkv_bias,)} | everything_seen | whole_heads,
        QWEN2: llama | {"mlp_bias": (False,)},
        GPT2: gpt2 | everything_seen | whole_heads,
    }


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """The config.json of the same model, in the layout that transformers 4 and 5 both read.

    `config_from_hf` makes the same config of it, up to options without effect (a pattern of windows where no layer
    slides, a head width of width / heads spelled out). Raises ValueError where `family_of` does.
    """
    family = family_of(config)
    hf = {
        "architectures": [family],
        "model_type": next(kind for kind, name in MODEL_TYPES.items() if name == family),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        # Llama's defaults are tokens 1 and 2, which in another vocabulary are anything.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    return hf | (_write_gpt2(config) if family == GPT2 else _write_llama(config, family))


def _write_gpt2(config: GPTConfig) -> dict[str, Any]:
    return {
        "n_positions": config.context,
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.mlp],
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def _write_llama(config: GPTConfig, family: str) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": config.rope_factor,
        "low_freq_factor": config.rope_low,
        "high_freq_factor": config.rope_high,
        "original_max_position_embeddings": config.rope_original,
    }
    return {
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.key_width,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling if config.rope_factor != 1 else None,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        **({} if family == LLAMA else _write_window(config)),
    }


def _write_window(config: GPTConfig) -> dict[str, Any]:
    sliding = [config.window_of(layer) > 0 for layer in range(config.layers)]
    return {
        "use_sliding_window": any(sliding),
        "sliding_window": config.window if any(sliding) else None,
        "max_window_layers": [*sliding, True].index(True),
        "layer_types": ["sliding_attention" if one else "full_attention" for one in sliding],
    }
