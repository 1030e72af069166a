"""Packings of block-diagonal adapters against blocks laid out one by one; folders there and back; what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lora.config import LoraConfig
from lora.lora import add_adapter
from lora.peft_files import load_adapter, save_adapter
from lora.vllm_files import ConvertConfig, convert_folder, convert_tensors, to_peft, to_vllm
from tests.lora.families import TOKENS, Pair, bd_lora_config, randomised, save_theirs
from tests.lora.test_lora import spread_out

PREFIX = "base_model.model.model.layers"
ROW, COLUMN = ["o_proj", "down_proj"], ["q_proj", "up_proj"]


@pytest.mark.parametrize("blocks, rank, inputs", [(1, 3, 5), (2, 4, 6), (3, 3, 15), (4, 20, 28)])
def test_the_blocks_lie_where_each_library_looks_for_them(blocks, rank, inputs):
    generator = torch.Generator().manual_seed(blocks)
    dense = torch.zeros(rank, inputs, dtype=torch.float64)
    peft = torch.zeros(rank, inputs // blocks, dtype=torch.float64)
    vllm = torch.zeros(rank // blocks, inputs, dtype=torch.float64)
    high, wide = rank // blocks, inputs // blocks
    for n in range(blocks):
        for row in range(high):
            for column in range(wide):
                value = torch.randn((), generator=generator, dtype=torch.float64)
                dense[n * high + row, n * wide + column] = value
                peft[n * high + row, column] = value
                vllm[row, n * wide + column] = value
    assert torch.equal(to_vllm(peft, blocks), vllm) and torch.equal(to_peft(vllm, blocks), peft)
    assert torch.equal(spread_out(peft, blocks), dense)
    x, B = torch.randn(inputs, generator=generator).double(), torch.randn(7, rank, generator=generator).double()
    shards = range(blocks)  # what each rank computes of its columns of A, x and B, summed as its outputs are
    parts = [B[:, n * high :][:, :high] @ (vllm[:, n * wide :][:, :wide] @ x[n * wide :][:wide]) for n in shards]
    torch.testing.assert_close(sum(parts), B @ dense @ x, rtol=1e-12, atol=1e-12)


def test_shapes_that_cannot_be_cut_are_refused():
    for convert, shape, side in ((to_vllm, (3, 4), "rows"), (to_peft, (4, 3), "columns"), (to_vllm, (4,), "rows")):
        with pytest.raises(ValueError, match=rf"A of shape .* in 2 blocks: expected a matrix whose {side} they divide"):
            convert(torch.zeros(shape), 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter by peft with ranks of its own, of linear layers and the head."""
    patterns = {"target_modules_bd_a": ROW, "target_modules_bd_b": [*COLUMN, "lm_head"], "nblocks": 4}
    options = {"r": 4, "rank_pattern": {"0.mlp.down_proj": 8, "1.self_attn.q_proj": 12}}
    model = Pair("llama even", torch.float32).adapted(
        **options, target_modules=[*ROW, *COLUMN, "lm_head"], use_bdlora=bd_lora_config(**patterns)
    )
    return save_theirs(model, tmp_path_factory.mktemp("made") / "adapter")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_folder_there_and_back_is_the_same_bit_for_bit(made, tmp_path):
    convert_folder(ConvertConfig(made, tmp_path / "vllm", "vllm"))
    convert_folder(ConvertConfig(tmp_path / "vllm", tmp_path / "peft", "peft"))
    config = (made / "adapter_config.json").read_bytes()
    peft, vllm, again = weights(made), weights(tmp_path / "vllm"), weights(tmp_path / "peft")
    assert peft.keys() == vllm.keys() == again.keys()
    assert all(torch.equal(peft[key], again[key]) and peft[key].dtype == again[key].dtype for key in peft)
    for folder in ("vllm", "peft"):
        assert (tmp_path / folder / "adapter_config.json").read_bytes() == config
        assert len(list((tmp_path / folder).iterdir())) == 2
    shapes = {key: (list(peft[key].shape), list(vllm[key].shape)) for key in peft}
    assert shapes[f"{PREFIX}.0.mlp.down_proj.lora_A.weight"] == ([8, 5], [2, 20])
    assert shapes[f"{PREFIX}.1.self_attn.o_proj.lora_A.weight"] == ([4, 4], [1, 16])
    changed = {key for key, (one, other) in shapes.items() if one != other}
    assert changed == {key for key in peft if ("o_proj" in key or "down_proj" in key) and "lora_A" in key}
    assert all(torch.equal(peft[key], vllm[key]) for key in peft.keys() - changed)
    pair = Pair("llama even", torch.float32)
    model, other = pair.ours(), pair.ours()
    load_adapter(model, made)
    load_adapter(other, tmp_path / "peft")
    assert torch.equal(model(TOKENS), other(TOKENS))


def test_the_program_converts_our_own_adapter_too(tmp_path):
    model = Pair("qwen3").ours()
    add_adapter(model, LoraConfig(4, blocks=2))
    randomised(model)
    save_adapter(model, tmp_path / "adapter")
    options = ["--source", tmp_path / "adapter", "--target", tmp_path / "new", "--to", "vllm"]
    done = subprocess.run([sys.executable, "-m", "lora.vllm_files", *options], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'new'}: in the packing of vllm\n", done.stderr
    key = f"{PREFIX}.1.mlp.down_proj.lora_A.weight"
    assert torch.equal(weights(tmp_path / "new")[key], to_vllm(weights(tmp_path / "adapter")[key], 2))
    with pytest.raises(ValueError, match=f"target {tmp_path / 'new'} exists: expected a folder to make"):
        convert_folder(ConvertConfig(tmp_path / "adapter", tmp_path / "new", "vllm"))


def test_bad_folders_are_refused_and_nothing_is_written(made, tmp_path):
    target = tmp_path / "target"
    with pytest.raises(ValueError, match="adapter_config.json: no such file"):
        convert_folder(ConvertConfig(tmp_path / "nowhere", target, "vllm"))
    with pytest.raises(
        ValueError, match=r"in vllm packing: .*o_proj.lora_A.weight has shape \[4, 4\], expected \[1, a"
    ):
        convert_folder(ConvertConfig(made, target, "peft"))
    model = Pair("llama").ours()
    add_adapter(model, LoraConfig(2))
    save_adapter(model, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain: .*no use_bdlora of several blocks: plain adapters have one packing"):
        convert_folder(ConvertConfig(tmp_path / "plain", target, "vllm"))
    assert not target.exists()


def test_everything_wrong_with_the_tensors_is_listed(made):
    fields, tensors = json.loads((made / "adapter_config.json").read_text()), weights(made)
    with pytest.raises(ValueError, match="packing 'hf': expected 'vllm' or 'peft'"):
        convert_tensors(fields, tensors, "hf")
    q, o, up = (f"{PREFIX}.1.{module}" for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"))
    bad = dict(tensors, other=torch.zeros(2))
    del bad[f"{q}.lora_B.weight"]
    bad[f"{o}.lora_A.weight"] = to_vllm(tensors[f"{o}.lora_A.weight"], 4)
    bad[f"{o}.lora_B.weight"] = torch.zeros(4)
    bad[f"{up}.lora_B.weight"] = tensors[f"{up}.lora_B.weight"][:-1]
    with pytest.raises(ValueError) as caught:
        convert_tensors(fields, bad, "vllm")
    said = str(caught.value)
    assert "adapter_model.safetensors in peft packing: " in said and "other is unexpected" in said
    assert f"{q}.lora_B.weight is missing" in said
    assert f"{o}.lora_A.weight has shape [1, 16], expected [4, any]" in said
    assert f"{o}.lora_B.weight has shape [4], expected [any, 4]" in said
    assert f"{up}.lora_B.weight has shape [19, 1], expected [a multiple of 4, 1]" in said and said.count(";") == 4
    bad = dict(tensors, **{f"{q}.lora_A.weight": tensors[f"{q}.lora_A.weight"] / 0})
    with pytest.raises(ValueError, match=f"{q}.lora_A.weight holds NaN or infinity"):
        convert_tensors(fields, bad, "vllm")
    both = fields | {"use_bdlora": fields["use_bdlora"] | {"target_modules_bd_b": ["proj"]}}
    with pytest.raises(ValueError, match="o_proj has both factors block-diagonal by use_bdlora, expected one"):
        convert_tensors(both, tensors, "vllm")
    with pytest.raises(ValueError, match="use_dora True: not supported"):
        convert_tensors(fields | {"use_dora": True}, tensors, "vllm")
