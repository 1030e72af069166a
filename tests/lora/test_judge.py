"""Losses against a pass of each example alone, answers against a loop without a cache, verdicts against their rules."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from common.dist import spawn
from lora.examples import Example
from lora.judge import Judged, judge, loss_of, losses, read_judged, write_answers, write_judged
from lora.packing import encode
from lora.statistics import edit_similarity
from lora.task import load_task
from tests.lora.finetune_runs import BYTES, comm_of, tiny_config, tiny_source, tiny_tuner, write_lines
from tests.lora.test_finetune_steps import summed_nats


def setting(tmp_path):
    source = tiny_source()
    return source.model, load_task(tiny_config(tmp_path), source)


def greedy(model, prompt: tuple[int, ...], task) -> list[int]:
    tokens, answer = list(prompt), []
    while len(answer) < task.longest_answer:
        token = int(model(torch.tensor([tokens]))[0, -1, : BYTES.vocab_size].argmax())
        if token in task.ends:
            break
        answer.append(token)
        tokens.append(token)
        if len(tokens) > model.config.context:
            break
    return answer


def judged_by(rank: int, ranks: int, config) -> list[Judged]:
    source = tiny_source()
    return judge(source.model, load_task(config, source), BYTES, comm_of(rank, ranks), nullcontext)


@torch.no_grad()
def test_losses_are_those_of_each_example_alone(tmp_path):
    model, task = setting(tmp_path)
    totals = losses(model, task.held_out.rows, len(task.held_out_examples), comm_of(), nullcontext)
    for example, (nats, tokens) in zip(task.held_out_examples, totals.tolist(), strict=True):
        encoded = encode(example, BYTES)
        assert nats == pytest.approx(float(summed_nats(model, encoded)), rel=1e-10)
        assert tokens == encoded.scored.sum() == len(example.answer) + 1


@torch.no_grad()
def test_answers_are_the_likeliest_tokens_until_the_end(tmp_path):
    model, task = setting(tmp_path)
    found = write_answers(model, task, BYTES, comm_of(), nullcontext)
    wanted = [BYTES.decode(greedy(model, prompt, task)) for prompt in task.prompts]
    assert found == wanted and len(set(found)) > 3


@torch.no_grad()
def test_an_answer_ends_where_the_context_does(tmp_path):
    """And does not go on from half of it, as a text may."""
    source, held_out = tiny_source(), [(f"{i}" * 33, "y") for i in range(4)] + [("z", "w" * 20)]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in held_out]
    config = tiny_config(tmp_path, held_out=write_lines(tmp_path / "held_out.jsonl", rows))
    task = load_task(config, source)
    found = [greedy(source.model, prompt, task) for prompt in task.prompts]
    room = source.model.config.context + 1 - len(task.prompts[0])
    assert task.longest_answer == 21 and max(map(len, found[:4])) == room < 21
    assert write_answers(source.model, task, BYTES, comm_of(), nullcontext) == [BYTES.decode(each) for each in found]


def test_nothing_is_dropped_when_judged(tmp_path):
    config = tiny_config(tmp_path, method="lora", dropout=0.5)
    tuner = tiny_tuner(config)
    for _ in range(3):
        tuner.update()
    looks = [tuner.evaluate()["held_out_loss"]]
    tuner.model.train()
    looks.append(tuner.evaluate()["held_out_loss"])
    tuner.model.train()
    looks.append(loss_of(judge(tuner.model, tuner.task, BYTES, comm_of(), nullcontext)))
    encoded = [encode(example, BYTES) for example in tuner.task.held_out_examples]
    with torch.no_grad():
        nats = sum(float(summed_nats(tuner.model.eval(), each)) for each in encoded)
    assert looks == pytest.approx([nats / sum(int(each.scored.sum()) for each in encoded)] * 3, rel=1e-10)


def test_verdicts_follow_their_rules(tmp_path, monkeypatch):
    model, task = setting(tmp_path)
    wanted = [example.answer for example in task.held_out_examples]
    written = [f" {wanted[0]}\n", wanted[1] + "x", "", *wanted[3:]]
    monkeypatch.setattr("lora.judge.write_answers", lambda *_: written)
    judged = judge(model, task, BYTES, comm_of(), nullcontext)
    assert [each.exact for each in judged] == [True, False, False, *[True] * (len(wanted) - 3)]
    assert [each.similarity for each in judged[:3]] == [1.0, edit_similarity(wanted[1], written[1]), 0.0]
    assert all(each.parses is None for each in judged) and [each.written for each in judged] == written
    tokens = sum(len(answer) + 1 for answer in wanted)
    assert loss_of(judged) == pytest.approx(sum(each.nats for each in judged) / tokens, rel=1e-12)
    write_judged(tmp_path / "judged.jsonl", judged)
    assert read_judged(tmp_path / "judged.jsonl") == judged


def test_signatures_are_parsed(tmp_path, monkeypatch):
    model, task = setting(tmp_path)
    examples = tuple(Example(example.prompt, "def f(x):") for example in task.held_out_examples)
    task = replace(task, signatures=True, held_out_examples=examples)
    written = ["def f(x):\n", "def f(x", "def f(x): return", *["f(x)"] * (len(examples) - 3)]
    monkeypatch.setattr("lora.judge.write_answers", lambda *_: written)
    judged = judge(model, task, BYTES, comm_of(), nullcontext)
    assert [each.parses for each in judged] == [True, *[False] * (len(examples) - 1)]
    assert [each.exact for each in judged] == [each.parses for each in judged]


def test_ranks_share_the_work(tmp_path):
    config = tiny_config(tmp_path)
    one = judged_by(0, 1, config)
    for rank in spawn(judged_by, 2, config, timeout_s=120):
        assert [replace(each, nats=0.0) for each in rank] == [replace(each, nats=0.0) for each in one]
        assert [each.nats for each in rank] == pytest.approx([each.nats for each in one], rel=1e-10)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"other.jsonl: .*expected the lines that lora.finetune writes"):
        read_judged(tmp_path / "other.jsonl")
