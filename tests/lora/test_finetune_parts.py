"""What a run is made of: config, examples, methods, adapter files. Sizes against adapters, files against logits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora.adapter_file import FILE, load_own, save_anywhere, save_own
from lora.config import LoraConfig
from lora.examples import Example, ExampleSet
from lora.finetune_config import METHODS, FinetuneConfig, from_plain, plain, schedule
from lora.lora import adapter_parameters, add_adapter
from lora.methods import adapter_config, adapter_size, frozen_digest, matched_rank, prepare
from lora.peft_files import load_adapter
from lora.task import CONTAMINATED, TOO_LONG, load_examples, load_task, split, without_contamination
from minigpt.sample import Source
from tests.lora.finetune_runs import BYTES, TINY, lines, tiny_config, tiny_source, write_lines
from tests.minigpt.models import random_gpt

LLAMA = dict(mlp="swiglu", qk_norm=False, softcap=0.0, value_embeddings=False)
GPT2 = dict(positions="learned", norm="layernorm", mlp="gelu_tanh", kv_heads=2, qk_norm=False, softcap=0.0, tied=True,
            value_embeddings=False, qkv_bias=True, output_bias=True, mlp_bias=True)  # fmt: skip
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 256


# -- config --
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steps": 0}, "steps 0: expected at least 1"),
        ({"adapter_lr": 0.0}, "adapter_lr 0.0: expected a positive number"),
        ({"full_lr": float("nan")}, "full_lr nan: expected a positive number"),
        ({"beta2": 1.0}, "beta2 1.0: expected 0 to less than 1"),
        ({"held_out_share": 1.0}, "held_out_share 1.0: expected a share"),
        ({"held_out": Path("x")}, "held_out x without data"),
        ({"batch": 2, "accumulate": 3}, "accumulate 3: expected at most the batch, 2"),
        ({"rank": 0}, "rank 0: expected a whole number"),
        ({"alpha": -1.0}, "alpha -1.0: expected a positive number"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"targets": ","}, r"targets \(\): expected"),
        ({"blocks": 1}, "blocks 1: expected at least 2"),
    ],
    ids=str,
)
def test_wrong_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**wrong)


def test_config_goes_through_json():
    config = FinetuneConfig(data=Path("a/b.jsonl"), folder=Path("x"), rank=12, targets="query,up", method="lora")
    assert from_plain(json.loads(json.dumps(plain(config)))) == config
    assert config.adapter().targets == ("query", "up") and FinetuneConfig().adapter().targets == "all-linear"
    assert config.adapter(rank=36).scale("x") == pytest.approx(config.adapter().scale("x"), rel=1e-15)


def test_schedule_rises_and_falls_linearly():
    config = FinetuneConfig(steps=10, warmup=4)
    assert [schedule(i, config) for i in range(10)] == [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert schedule(0, FinetuneConfig(steps=1, warmup=0)) == 1.0


# -- examples --
def test_held_out_prompts_of_the_training_data_are_taken_out():
    train = (Example("a  b", "1"), Example("c", "2", (("u", "v"),)))
    held_out = (Example("a b\n", "3"), Example("c", "4"), Example("c", "5", (("u", "v"),)), Example("ab", "1"))
    kept, left = without_contamination(ExampleSet("x", train, held_out, ()))
    assert kept.held_out == (held_out[1], held_out[3]) and kept.train == train
    assert [(each.side, each.why, each.prompt) for each in left] == [
        ("held_out", CONTAMINATED, "a b\n"), ("held_out", CONTAMINATED, "c"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="prompts of all 1 held-out examples are in the training data"):
        without_contamination(ExampleSet("x", train, held_out[:1], ()))


def test_a_split_depends_on_prompts_alone():
    rows = [Example(f"p{i % 50}", f"a{i}") for i in range(100)]
    both, turned = split("x", rows, 0.3), split("x", rows[::-1], 0.3)
    assert set(both.train) == set(turned.train) and set(both.held_out) == set(turned.held_out)
    assert len(both.train) + len(both.held_out) == 100 and 15 <= len(both.held_out) <= 45
    assert not {e.prompt for e in both.train} & {e.prompt for e in both.held_out}
    assert set(both.held_out) <= set(split("x", rows, 0.6).held_out)
    with pytest.raises(ValueError, match="held_out_share 1e-09 of 100 examples holds out 0"):
        split("x", rows, 1e-9)


def test_long_examples_are_counted_and_listed(tmp_path):
    held_out = [{"prompt": f"h{i}", "answer": "yes"} for i in range(3)]
    long = {"prompt": "l" * 50, "answer": "no"}
    data = write_lines(tmp_path / "d.jsonl", [*lines(9), long])
    longer, known = {"prompt": "m" * 60, "answer": "?"}, lines(1)[0]
    other = write_lines(tmp_path / "h.jsonl", [held_out[0], longer, *held_out[1:], known])
    task = load_task(tiny_config(tmp_path, data=data, held_out=other), tiny_source())
    assert [example.prompt for example in task.held_out_examples] == ["h0", "h1", "h2"]
    assert [(each.side, each.why, each.tokens) for each in task.left_out] == [
        ("held_out", CONTAMINATED, 0), ("train", TOO_LONG, 54), ("held_out", TOO_LONG, 63),
    ]  # fmt: skip
    assert "left out of train, longer than a row: 1" in task.describe()
    assert task.held_out.rows.documents_RT.max() == 2 and task.longest_answer == 4
    task.list_left_out(tmp_path / "left.jsonl")
    assert json.loads((tmp_path / "left.jsonl").read_text().splitlines()[1])["prompt"] == "l" * 50
    with pytest.raises(ValueError, match="train: none of 9 examples.* fits"):
        load_task(tiny_config(tmp_path, data=write_lines(data, lines(9)), held_out=other, context=4), tiny_source())
    with pytest.raises(ValueError, match="context 41: expected at most the model's, 40"):
        load_task(tiny_config(tmp_path, context=41), tiny_source())
    with pytest.raises(ValueError, match="template chatml: the tokenizer lacks"):
        load_task(tiny_config(tmp_path, template="chatml"), tiny_source())


def test_one_held_out_example_tells_nothing(tmp_path):
    one = write_lines(tmp_path / "one.jsonl", [{"prompt": "only", "answer": "x"}])
    with pytest.raises(ValueError, match="1 held-out example: expected at least 2"):
        load_task(tiny_config(tmp_path, held_out=one), tiny_source())
    assert len(load_examples(tiny_config(tmp_path, held_out=one)).train) == 40


# -- methods --
@pytest.mark.parametrize("targets", ["all-linear", "query,down", "head,up,output"])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_matched_rank_is_the_nearest_of_all(targets, rank):
    model = random_gpt(**TINY | {"width": 32, "mlp_width": 96})
    config = FinetuneConfig(rank=rank, targets=targets).adapter()
    wanted, blocks = adapter_size(model, config), 4
    sizes = {r: adapter_size(model, replace(config, rank=r, blocks=blocks)) for r in range(blocks, 64, blocks)}
    assert abs(sizes[matched_rank(model, config, blocks)] - wanted) == min(abs(s - wanted) for s in sizes.values())


@pytest.mark.parametrize("kinds, blocks", [(LLAMA, 1), (LLAMA, 2), (GPT2, 1)], ids=["dense", "blocks", "fused"])
def test_sizes_are_those_of_made_adapters(kinds, blocks):
    model, config = random_gpt(**TINY | kinds), LoraConfig(rank=6, blocks=blocks)
    size = adapter_size(model, config)
    add_adapter(model, config)
    assert size == sum(p.numel() for p in adapter_parameters(model))


def test_methods_train_what_they_say():
    counts, digests = {}, {}
    for method in METHODS:
        model = random_gpt(**TINY).float()
        before = model(TOKENS)
        config = FinetuneConfig(rank=6, blocks=2)
        adapter = prepare(model, method, config)
        counts[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        digests[method] = frozen_digest(model)
        assert method == "qlora" or torch.equal(model(TOKENS), before)
        assert method == "full" or adapter_size(random_gpt(**TINY), adapter) == counts[method]
    assert counts["full"] == model.num_parameters() - counts["bd-lora"]
    assert counts["lora"] == counts["qlora"] and counts["bd-lora"] == pytest.approx(counts["lora"], rel=0.2)
    assert digests["lora"] == digests["bd-lora"] and len(set(digests.values())) == 3  # the same base


def test_blocks_that_a_model_cannot_have_are_refused_at_once():
    model = random_gpt(**TINY | GPT2)
    with pytest.raises(ValueError, match="c_attn: expected targets query, key and value instead"):
        adapter_config(model, "bd-lora", FinetuneConfig())
    assert adapter_config(model, "bd-lora", FinetuneConfig(targets="query,down")).blocks == 2


def test_weights_that_cannot_be_quantised_are_refused_at_once():
    model = random_gpt(**TINY)
    with pytest.raises(ValueError, match=r"blocks.0.attention.query.weight is torch.float64: expected one of"):
        adapter_config(model, "qlora", FinetuneConfig())
    assert adapter_config(model, "lora", FinetuneConfig()).rank == 8


def test_half_precision_weights_are_trained_in_float32():
    model = random_gpt(**TINY).bfloat16()
    prepare(model, "full", FinetuneConfig())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model = random_gpt(**TINY).bfloat16()
    prepare(model, "lora", FinetuneConfig())
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}


def test_a_digest_knows_every_bit():
    model = random_gpt(**TINY)
    add_adapter(model, LoraConfig(rank=2))
    digest = frozen_digest(model)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        flat = x.detach().view(-1).view(torch.uint8)
        flat[-3] ^= 2
        assert (frozen_digest(model) == digest) == (".adapters." in name), name
        flat[-3] ^= 2
    assert frozen_digest(model) == digest


# -- adapter files --
def adapted(kinds: dict, config: LoraConfig):
    model = random_gpt(**TINY | kinds).float()
    add_adapter(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter_parameters(model):
            p.copy_(torch.randn_like(p))
    return model


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_adapter_of_our_own_gpt_comes_back(tmp_path, blocks):
    config = LoraConfig(rank=4, targets=("query", "down", "head"), blocks=blocks, rank_pattern={"down": 6})
    model = adapted({}, config)
    save_anywhere(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    fresh = random_gpt(**TINY).float()
    assert not torch.equal(fresh(TOKENS), model(TOKENS))
    assert load_own(fresh, tmp_path) == config
    assert torch.equal(fresh(TOKENS), model(TOKENS))


def test_an_adapter_of_a_family_is_written_as_peft_does(tmp_path):
    model = adapted(LLAMA, LoraConfig(rank=4))
    save_anywhere(model, tmp_path)
    fresh = random_gpt(**TINY | LLAMA).float()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(TOKENS), model(TOKENS))


def test_files_that_do_not_fit_are_refused(tmp_path):
    save_own(adapted({}, LoraConfig(rank=4)), tmp_path)
    with pytest.raises(ValueError, match="another architecture: layers is 2 there, 3 asked"):
        load_own(random_gpt(**TINY | {"layers": 3}), tmp_path)
    model = adapted({}, LoraConfig(rank=4))
    with torch.no_grad():
        model.blocks[0].mlp.up.adapters["default"].A[0, 0] = torch.nan
    save_own(model, tmp_path)
    with pytest.raises(ValueError, match=r"blocks.0.mlp.up.A holds NaN or infinity"):
        load_own(random_gpt(**TINY), tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_own(random_gpt(**TINY), tmp_path)
    with pytest.raises(ValueError, match="no such file: expected an adapter"):
        load_own(random_gpt(**TINY), tmp_path / "nowhere")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    source = Source(random_gpt(**TINY | {"vocab_size": 250}), BYTES, (BYTES.separator,))
    with pytest.raises(ValueError, match="a tokenizer of 257 tokens: the model has 250"):
        load_task(tiny_config(tmp_path), source)
