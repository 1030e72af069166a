"""What `minigpt.hf` refuses, and the words it says: folders, files, tensors, layers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minigpt.config import GPTConfig
from minigpt.hf import load_pretrained, save_pretrained
from minigpt.model import GPT

SMALL = {"vocab_size": 13, "context": 8, "layers": 2, "width": 8, "heads": 2, "kv_heads": 2, "mlp_width": 6}
LLAMA = GPTConfig(**SMALL, mlp="swiglu", qk_norm=False, softcap=0.0)
GPT2_FIELDS = {"positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qk_norm": False, "softcap": 0.0}
GPT2 = GPTConfig(**SMALL, **GPT2_FIELDS, qkv_bias=True, output_bias=True, mlp_bias=True, tied=True)
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    save_pretrained(GPT(LLAMA), tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def shards(tmp_path) -> Path:
    save_pretrained(GPT(LLAMA), tmp_path / "llama", max_shard_bytes=1500)
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) == 3
    return tmp_path / "llama"


def rewritten(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_refused(folder: Path, *messages: str, **arguments) -> None:
    with pytest.raises(ValueError) as refusal:
        load_pretrained(folder, **arguments)
    for message in messages:
        assert message in str(refusal.value), str(refusal.value)


def test_folders_without_a_checkpoint(tmp_path, folder):
    assert_refused(tmp_path / "nowhere", "nowhere/config.json: no such file; expected a folder with config.json")
    config = (folder / "config.json").read_text()
    for text, message in (("{", "config.json: not JSON"), ("[]", "config.json: expected a JSON object, got list")):
        (folder / "config.json").write_text(text)
        assert_refused(folder, message)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert_refused(folder, "model.safetensors and model.safetensors.index.json: expected one of them")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "index.json: expected weight_map, an object of names and files, got None")
    (folder / "model.safetensors.index.json").unlink()
    assert_refused(folder, "expected model.safetensors, or shards and model.safetensors.index.json; found neither")
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert_refused(folder, "found pytorch_model.bin, a pickle, which can run any code: convert it first")


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_files(folder, length):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:length])
    assert_refused(folder, "model.safetensors is not a whole safetensors file: ")


def test_tensors_that_do_not_fit_are_listed_together(folder):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(6, 8)
        tensors[QUERY] = tensors[QUERY][:, :7].contiguous()
        tensors["model.embed_tokens.weight"] = torch.ones(13, 8, dtype=torch.int32)

    rewritten(folder / "model.safetensors", spoil)
    assert_refused(
        folder,
        "model.norm.weight is missing",
        "model.layers.2.mlp.up_proj.weight is unexpected",
        f"{QUERY} has shape [8, 7], expected [8, 8]",
        "model.embed_tokens.weight has dtype I32, expected one of F64, F32, F16, BF16",
    )


def test_parameters_of_other_families_and_untied_heads(folder, tmp_path):
    rewritten(folder / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    assert_refused(folder, "lm_head.weight is missing")
    rewritten(folder / "model.safetensors", lambda tensors: tensors.update({"h.0.attn.bias": torch.ones(1)}))
    assert_refused(folder, "h.0.attn.bias is unexpected")  # GPT-2's old buffer, but this is no GPT-2
    save_pretrained(GPT(GPT2), tmp_path / "gpt2")
    name = "transformer.h.0.attn.c_attn.weight"
    rewritten(tmp_path / "gpt2/model.safetensors", lambda tensors: tensors.update({name: torch.ones(24, 8)}))
    assert_refused(tmp_path / "gpt2", f"{name} has shape [24, 8], expected [8, 24]")
    rewritten(tmp_path / "gpt2/model.safetensors", lambda tensors: tensors.update({"wte.weight": torch.ones(13, 8)}))
    twice = "transformer.wte.weight is there twice, as transformer.wte.weight in model.safetensors and wte.weight in"
    assert_refused(tmp_path / "gpt2", twice)


def test_shards_and_their_index(shards):
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    (home,) = {file for name, file in index["weight_map"].items() if name == QUERY}
    other = next(file for file in index["weight_map"].values() if file != home)
    whole = (shards / home).read_bytes()
    (shards / home).write_bytes(whole[:-1])
    rewritten(shards / other, lambda tensors: tensors.update({"model.norm.weight": torch.ones(8)}))
    twice = "model.norm.weight is there twice, as model.norm.weight in"
    assert_refused(
        shards, f"{home} is not a whole", f"{other} and model.safetensors.index.json differ in model.n", twice
    )
    rewritten(shards / other, lambda tensors: tensors.pop("model.norm.weight"))
    (shards / home).unlink()
    assert_refused(shards, f"{home} is not there, model.safetensors.index.json names it")
    (shards / home).write_bytes(whole)
    load_pretrained(shards)
    del index["weight_map"][QUERY]
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(shards, f"{home} and model.safetensors.index.json differ in {QUERY}")
    index["weight_map"][QUERY] = "../" + home
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(shards, f"{QUERY} in '../{home}': expected the name of a file in the same folder")


class Scaled(nn.Linear):
    """A linear layer with a parameter that no checkpoint has."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(1))


class Buffered(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("counts", torch.ones(1), persistent=False)


def test_layers_with_other_state(folder):
    assert_refused(folder, "model.layers.0.self_attn.q_proj.scale is missing", linear_cls=Scaled)
    assert_refused(folder, "buffers ['blocks.0.attention.query.counts'", linear_cls=Buffered)


def test_models_that_are_not_saved(tmp_path):
    mixed, eighth = GPT(LLAMA), GPT(LLAMA).to(torch.float8_e4m3fn)
    mixed.norm.double()
    for model, arguments, message in (
        (GPT(GPTConfig(**SMALL)), {}, "no family of transformers has this GPT"),
        (GPT(LLAMA, linear_cls=Scaled), {}, "parameters blocks.0.attention.key.scale, .*: expected those of a GPT of"),
        (GPT(LLAMA), {"max_shard_bytes": 0}, "max_shard_bytes 0: expected at least 1"),
        (mixed, {}, "parameters of torch.float32, torch.float64: expected one of"),
        (eighth, {}, "parameters of torch.float8_e4m3fn: expected one of torch.float64, torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pretrained(model, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()
