"""The training step against torch and closed formulas; the stop at NaN; what a run leaves on disk."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common.cli import UserError
from common.dist import World
from minigpt.checkpoint import load_checkpoint, load_model
from minigpt.config import PRESETS, TrainConfig, learning_rate
from minigpt.data import batch, load_corpus
from minigpt.evaluate import bits_per_byte
from minigpt.model import GPT, causal_attention
from minigpt.train import Trainer, adamw, choose_dtype, train

CPU = World(0, 1, 0, torch.device("cpu"), None)


@pytest.fixture
def config(tmp_path, corpus) -> TrainConfig:
    return replace(
        PRESETS["tiny"], folder=tmp_path / "run", corpus=str(corpus), dtype="float32", device="cpu", steps=12
    )


def trainer(config: TrainConfig, **options) -> Trainer:
    model = GPT(config.model_config(), seed=config.seed)
    return Trainer(config, model, load_corpus(config.corpus), CPU, options.get("grad_sync"))


def test_the_learning_rate_follows_the_formula():
    config = TrainConfig(steps=101, warmup=10, learning_rate=2.0, floor=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    for step in range(10, 101):
        share = (step - 10) / 90
        assert rates[step] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * share)))
    assert rates[10] == 2.0 and rates[100] == pytest.approx(0.2)
    assert learning_rate(0, replace(config, warmup=0)) == 2.0
    assert learning_rate(0, replace(config, steps=1, warmup=0)) == 2.0


def test_only_matrices_decay(config):
    model = GPT(config.model_config())
    decayed, kept = adamw(model, config).param_groups
    assert {p.ndim for p in decayed["params"]} == {2} and decayed["weight_decay"] == config.weight_decay
    assert {p.ndim for p in kept["params"]} == {1} and kept["weight_decay"] == 0
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_a_step_is_torchs_adamw_on_the_mean_loss(config):
    """Three updates, spelled out with torch's plain optimizer and clipping."""
    ours = trainer(config)
    model = GPT(config.model_config(), seed=config.seed)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": config.weight_decay * (p.ndim == 2)} for p in model.parameters()],
        betas=(0.9, config.beta2), foreach=False, fused=False,
    )  # fmt: skip
    for step in range(3):
        metrics, stop = ours.update(stop=False)
        place = {"rank": 0, "world_size": 1, "global_batch": config.batch, "context": config.context}
        rows = batch(ours.corpus.train, seed=0, step=step, **place)
        inputs, targets = map(torch.from_numpy, rows)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, config.clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5) and not stop
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for (name, ours_p), p in zip(ours.model.named_parameters(), model.parameters(), strict=True):
        error = (ours_p - p).abs().max().item()
        assert error <= 2e-5, f"{name}: {error}"


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(config, accumulate):
    """Compared before the optimizer, since Adam hides a wrong scale; float64 hides nothing."""
    whole, parts = trainer(config), trainer(replace(config, accumulate=accumulate))
    losses = []
    for each in (whole, parts):
        each.model.double()
        with torch.no_grad():
            for p in each.parameters:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
        losses.append(each._backward().item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-12)
    for p, q in zip(whole.parameters, parts.parameters, strict=True):
        assert q.grad.abs().max() > 0
        error = (p.grad - q.grad).abs().max().item()
        assert error <= 1e-12, error


def test_a_tied_and_a_frozen_weight(config):
    frozen = trainer(replace(config, tied=True))
    frozen.model.blocks[0].mlp.up.weight.requires_grad_(False)
    each = Trainer(frozen.config, frozen.model, frozen.corpus, CPU, None)
    before = {name: p.detach().clone() for name, p in each.model.named_parameters()}
    each.update(stop=False)
    each.update(stop=False)
    assert torch.equal(before["blocks.0.mlp.up.weight"], each.model.blocks[0].mlp.up.weight)
    assert not torch.equal(before["embedding.weight"], each.model.embedding.weight)


def test_grad_sync_sees_every_gradient_and_the_loss(config):
    seen = []
    each = trainer(config, grad_sync=seen.append)
    _, stop = each.update(stop=True)
    assert stop and len(seen[0]) == len(each.parameters) + 1
    assert seen[0][-1].shape == (2,) and seen[0][-1][1] == 1, "the wish to stop travels with the gradients"
    assert len({tensor.dtype for tensor in seen[0]}) == 1


def test_a_run_learns_and_leaves_its_files(config):
    result = train(replace(config, steps=40))
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert rows[19].keys() == {"step", "loss", "lr", "grad_norm", "held_out_look"}
    assert rows[-1]["held_out_bits_per_byte"] == result.bits_per_byte
    again = bits_per_byte(load_model(config.checkpoint), result.corpus.held_out, context=64, stride=64)
    assert again == pytest.approx(result.bits_per_byte, abs=1e-6)
    names = {path.name for path in config.folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "timing.jsonl", "checkpoint.pt", "loss.png"}
    assert (config.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_torch_load_reads_the_checkpoint_too(config):
    train(replace(config, steps=1))
    state = torch.load(config.checkpoint, weights_only=True)
    assert state["step"] == 1 and set(state["model"]) == set(load_checkpoint(config.checkpoint)["model"])


def test_a_given_model_is_trained(config):
    model = GPT(config.model_config(), seed=99)
    before = model.embedding.weight.detach().clone()
    result = train(config, model=model)
    assert result.model is model and not torch.equal(before, model.embedding.weight)


def test_nan_in_the_loss_stops_and_keeps_the_last_good_checkpoint(config):
    calls = []

    def poisoned(q, k, v):
        calls.append(1)
        return causal_attention(q, k, v) * (math.nan if len(calls) == 2 * 8 + 1 else 1.0)  # the 9th forward pass

    model = GPT(config.model_config(), attention_fn=poisoned)
    every_3 = replace(config, checkpoint_every=3)
    with pytest.raises(UserError, match=rf"loss nan .* at step 9: stopped; {config.checkpoint} holds step 6, the last"):
        train(every_3, model=model)
    state = load_checkpoint(config.checkpoint)
    assert state["step"] == 6 and all(value.isfinite().all() for value in state["model"].values())
    assert len((config.folder / "metrics.jsonl").read_text().splitlines()) == 8


def test_an_absurd_learning_rate_stops(config):
    with pytest.raises(UserError, match=r"at step \d+: stopped; .*checkpoint.pt holds step 0, the last good one"):
        train(replace(config, learning_rate=1e38, warmup=0, checkpoint_every=1, weight_decay=0.0))
    assert all(p.isfinite().all() for p in load_model(config.checkpoint).parameters())


def test_dtype_choice():
    cpu = torch.device("cpu")
    assert choose_dtype("float32", cpu) == torch.float32 and choose_dtype("bfloat16", cpu) == torch.bfloat16
    features = torch.cpu.get_capabilities()
    fast = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    assert (choose_dtype("auto", cpu) == torch.bfloat16) == fast


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    GPT(PRESETS[name].model_config())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bfloat16_steps_on_a_gpu_learn(config):
    result = train(replace(config, device="cuda", dtype="bfloat16", steps=40))
    losses = [json.loads(line)["loss"] for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0] - 1
    assert math.isfinite(result.bits_per_byte)
