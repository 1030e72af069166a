"""A step against its definition by brute force, N ranks against one, and a run that goes on against one that never
stopped."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.cli import UserError
from common.dist import spawn
from lora.finetune_config import METHODS, schedule
from lora.finetuner import rows_of_step
from lora.packing import IGNORED, Encoded, encode
from tests.lora.finetune_runs import BYTES, tiny_config, tiny_source, tiny_tuner, trained_values


def summed_nats(model, example: Encoded) -> torch.Tensor:
    """Of the answer's tokens, the example in a pass of its own."""
    tokens = torch.from_numpy(example.tokens)
    logprobs = model(tokens[None, :-1])[0].log_softmax(dim=-1)
    scored = torch.from_numpy(example.scored[1:])
    return -logprobs[scored, tokens[1:][scored]].sum()


def by_hand(config, steps: int) -> tuple[list[float], list[float], dict]:
    """(losses, gradient norms, what is trained) after some steps: example by example, one mean over all tokens."""
    tuner = tiny_tuner(config)  # for the model and the rows; its step is not used
    task, model = tuner.task, tuner.model
    encoded = [encode(example, BYTES) for example in task.examples.train]
    options = dict(betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate(config.method), **options)
    losses, norms = [], []
    for step in range(steps):
        rows = rows_of_step(step, config.batch, len(task.train.rows), config.seed)
        numbers = [n for row in rows for n in task.train.rows.documents_RT[row].unique().tolist() if n >= 0]
        tokens = sum(int(encoded[n].scored.sum()) for n in numbers)
        loss = sum(summed_nats(model, encoded[n]) for n in numbers) / tokens
        optimizer.zero_grad()
        loss.backward()
        norm = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None) ** 0.5
        for p in parameters:
            if p.grad is not None and config.clip and norm > config.clip:
                p.grad *= config.clip / (norm + 1e-6)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(config.method) * schedule(step, config)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms, trained_values(model)


def run(rank: int, ranks: int, config, steps: int) -> tuple[list[float], list[float], dict, float]:
    """The same by the program, in one rank of several."""
    tuner = tiny_tuner(config, rank, ranks)
    metrics = [tuner.update()[0] for _ in range(steps)]
    held_out = tuner.evaluate()["held_out_loss"]
    return [m["loss"] for m in metrics], [m["grad_norm"] for m in metrics], trained_values(tuner.model), held_out


def assert_same(ours: tuple, theirs: tuple, tolerance: float = 1e-10) -> None:
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert np.allclose(mine, other, rtol=tolerance, atol=0)
    assert ours[2].keys() == theirs[2].keys() and ours[2]
    for name, value in theirs[2].items():
        # Of a key's bias-like directions the gradient is rounding alone, and Adam makes steps of it.
        assert float((ours[2][name] - value).abs().max()) <= 1e-7, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_a_step_is_the_mean_over_all_answer_tokens(tmp_path, method, accumulate):
    config = tiny_config(tmp_path, method=method, accumulate=accumulate, batch=5, clip=0.5, weight_decay=0.1, eps=1e-4)
    assert_same(run(0, 1, config, 3), by_hand(config, 3))


def test_parts_have_unequal_numbers_of_answer_tokens(tmp_path):
    """Else the tests above could not tell a mean from a mean of means."""
    tuner = tiny_tuner(tiny_config(tmp_path, method="lora", batch=5))
    rows = tuner.task.train.rows
    first, second = (rows.batch(rows_of_step(0, 5, len(rows), 0)[i::2]).scored for i in range(2))
    assert first / 3 != second / 2 and first != second


@pytest.mark.parametrize("ranks, batch, accumulate", [(2, 5, 2), (3, 2, 1)], ids=["uneven", "a rank without rows"])
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_ranks_compute_what_one_computes(tmp_path, method, ranks, batch, accumulate):
    config = tiny_config(tmp_path, method=method, batch=batch, accumulate=accumulate, eps=1e-4)
    one = run(0, 1, config, 3)
    several = spawn(run, ranks, config, 3, timeout_s=120)
    for each in several:
        assert_same(each, one)
        assert each[3] == pytest.approx(one[3], rel=1e-9)
    for name, value in several[0][2].items():
        assert all(torch.equal(each[2][name], value) for each in several[1:]), name


def test_rows_come_once_an_epoch_in_an_order_of_the_seed():
    rows = [row for step in range(10) for row in rows_of_step(step, 7, 35, 3)]
    assert sorted(rows[:35]) == sorted(rows[35:]) == list(range(35))
    assert rows[:35] != rows[35:] and rows != [row for step in range(10) for row in rows_of_step(step, 7, 35, 4)]
    assert sorted(rows_of_step(0, 5, 2, 0)[:2]) == [0, 1]  # more rows in a step than there are


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"optimizer": "adamw8bit"}], ids=str)
@pytest.mark.parametrize("method", ["full", "qlora", "bd-lora"])
def test_a_run_goes_on_to_the_same_bits(tmp_path, method, changes):
    config = tiny_config(tmp_path, method=method, **changes)
    source = (lambda: replace(tiny_source(), model=tiny_source().model.float())) if changes else tiny_source
    whole = tiny_tuner(config, source=source())
    expected = [whole.update()[0] for _ in range(6)]
    tuner = tiny_tuner(config, source=source())
    first = [tuner.update()[0] for _ in range(3)]
    tuner.save()
    again = tiny_tuner(config, source=source())
    torch.rand(7)  # other random numbers drawn in between
    assert again.load() == [] and again.step == 3
    assert first + [again.update()[0] for _ in range(3)] == expected
    for name, value in trained_values(whole.model).items():
        assert torch.equal(trained_values(again.model)[name], value), name
    again.verify_frozen()


def test_another_base_is_not_resumed(tmp_path):
    config = tiny_config(tmp_path, method="lora")
    tiny_tuner(config).save()
    source = tiny_source()
    with torch.no_grad():
        source.model.head.weight[3, 4] += 1e-12
    with pytest.raises(ValueError, match=r"another run: frozen is .* there"):
        tiny_tuner(config, source=source).load()
    with pytest.raises(ValueError, match="another run: .*trained is"):
        tiny_tuner(replace(config, rank=8)).load()


def test_prompts_have_no_loss_and_rows_do_not_see_each_other(tmp_path):
    tuner = tiny_tuner(tiny_config(tmp_path, method="lora"))
    rows = tuner.task.train.rows.batch([0, 1, 2])
    assert int(rows.documents_RT.unique().numel()) > 4
    tokens, scored = rows.tokens_RT.clone(), rows.targets_RT != IGNORED
    other = rows.documents_RT == rows.documents_RT[0, 0]  # everything of the first example changes
    tokens[other] = (tokens[other] + 1) % 200
    changed = type(rows)(tokens, torch.where(other, IGNORED, rows.targets_RT), rows.positions_RT, rows.documents_RT)
    same = type(rows)(rows.tokens_RT, changed.targets_RT, rows.positions_RT, rows.documents_RT)
    assert int((changed.targets_RT != IGNORED).sum()) < int(scored.sum())
    assert torch.equal(changed.loss(tuner.model), same.loss(tuner.model))


def test_a_frozen_weight_that_changes_is_noticed(tmp_path):
    tuner = tiny_tuner(tiny_config(tmp_path, method="qlora"))
    tuner.update()
    tuner.verify_frozen()
    tuner.model.blocks[1].mlp.down.base.packed[5] ^= 1  # one bit
    with pytest.raises(RuntimeError, match="frozen base changed"):
        tuner.verify_frozen()


def test_nan_stops_before_it_reaches_the_checkpoint(tmp_path):
    tuner = tiny_tuner(tiny_config(tmp_path, method="lora"))
    tuner.save()
    with torch.no_grad():
        tuner.model.blocks[0].mlp.up.adapters["default"].A[0, 0] = torch.nan
    with pytest.raises(UserError, match="loss nan .* at step 1 of lora: stopped; .* holds step 0"):
        tuner.update()
    with pytest.raises(UserError, match="no longer finite"):
        tuner.save()


@pytest.mark.parametrize("method", ["full", "bd-lora"])
def test_activation_checkpointing_changes_nothing(tmp_path, method):
    config = tiny_config(tmp_path, method=method, dropout=0.2)
    once, twice = (run(0, 1, replace(config, activation_checkpointing=each), 3) for each in (False, True))
    assert once[0] == twice[0] and once[1] == pytest.approx(twice[1], rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_is_the_same_up_to_rounding(tmp_path, method):
    losses = []
    for dtype in ("float32", "bfloat16"):
        source = replace(tiny_source(), model=tiny_source().model.float())
        tuner = tiny_tuner(tiny_config(tmp_path, method=method, dtype=dtype), source=source)
        losses.append([tuner.update()[0]["loss"] for _ in range(3)])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2e-2)
