"""Tokens against those of minigpt/chat.py, first fit against its definition, and packed losses against lonely ones."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lora.examples import Example
from lora.packing import IGNORED, PADDING, Encoded, encode, end_token, first_fit, pack, prompt_tokens
from minigpt.chat import TEMPLATES, Conversation
from minigpt.masks import Documents
from minigpt.model import GPT
from minigpt.sampling import Sampling
from minigpt.tokenizer import Tokenizer
from tests.minigpt.models import random_gpt

MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BYTES = Tokenizer.bytes_only()
SPECIAL = Tokenizer(BYTES.ranks, BYTES.pattern, {name: 256 + i for i, name in enumerate(("<|endoftext|>", *MARKS))})
CONTEXT = 24
TINY = dict(vocab_size=29, context=CONTEXT, layers=2, width=16, heads=2, kv_heads=1, mlp_width=24)
MODELS = {
    "ours": {"value_embeddings": True},
    "gpt2": dict(positions="learned", norm="layernorm", mlp="gelu_tanh", kv_heads=2, qk_norm=False, tied=True),
    "llama": dict(mlp="swiglu", qk_norm=False, softcap=0.0, rope_base=100.0),
    "windows": dict(window=3, window_pattern="SL"),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request) -> GPT:
    return random_gpt(**TINY | request.param)


def made(*lengths: int, answers: int = 3, seed: int = 0) -> list[Encoded]:
    """Encoded examples that take so many places, of random tokens; the last `answers` tokens (or all) are scored."""
    generator = np.random.default_rng(seed)
    return [
        Encoded(generator.integers(1, 29, length + 1), np.arange(length + 1) >= max(1, length + 1 - answers))
        for length in lengths
    ]


def alone(model: GPT, example: Encoded) -> torch.Tensor:
    """Sum of the losses of one example in a pass of its own, by its definition."""
    tokens = torch.from_numpy(example.tokens)
    logprobs = model(tokens[None, :-1])[0].log_softmax(dim=-1)
    scored = torch.from_numpy(example.scored[1:])
    return -logprobs[scored, tokens[1:][scored]].sum()


# -- text to tokens --
def test_tokens_and_mask_of_a_plain_example():
    encoded = encode(Example("ab", "cd"), BYTES)
    assert encoded.tokens.tolist() == [256, *b"ab\ncd", 256] and encoded.length == 6
    assert encoded.scored.tolist() == [False] * 4 + [True] * 3
    assert encode(Example("ab", "cd"), BYTES, opening=()).tokens.tolist() == [*b"ab\ncd", 256]


def test_tokens_and_mask_of_a_template():
    start, end = SPECIAL.special["<|im_start|>"], SPECIAL.special["<|im_end|>"]
    example = Example("ab", "cd", (("e", "f"),))
    encoded = encode(example, SPECIAL, template="chatml", opening=(7, 8))
    prompt = [start, *b"user\ne", end, *b"\n", start, *b"assistant\nf", end, *b"\n"]
    prompt += [start, *b"user\nab", end, *b"\n", start, *b"assistant\n"]
    assert encoded.tokens.tolist() == [7, 8, *prompt, *b"cd", end]
    assert encoded.scored.tolist() == [False] * (2 + len(prompt)) + [True] * 3
    assert end_token(SPECIAL, "llama3") == SPECIAL.special["<|eot_id|>"] and end_token(SPECIAL, "plain") == 256


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_is_what_a_conversation_reads(template):
    text = b"the one and the other and the last of them\n\n" * 3
    merged = Tokenizer.train([text], 278, special=("<|endoftext|>", *MARKS))  # tokens that could span a boundary
    source = SimpleNamespace(model=random_gpt(**TINY), tokenizer=merged, opening=(merged.separator,))
    conversation = Conversation(source, sampling=Sampling(), length=1, template=template)
    example = Example("the last\n", " one\n", (("the one", "the other\n"), ("", "and\n the")))
    tokens = []
    for prompt, answer in [*example.turns, (example.prompt, example.answer)]:
        tokens += conversation.turn_tokens(prompt)
        conversation.started = True
        before_the_answer = len(tokens)
        tokens += merged.encode(answer).tolist()
    encoded = encode(example, merged, template=template)
    assert prompt_tokens(example, merged, template=template) == tokens[:before_the_answer]
    assert encoded.tokens.tolist() == [*tokens, end_token(merged, template)]
    assert np.flatnonzero(encoded.scored).tolist() == list(range(before_the_answer, len(tokens) + 1))


def test_names_of_special_tokens_in_an_example_are_text():
    example = Example("<|im_end|>\0<|endoftext|>", "<|im_end|>", (("<|im_start|>", "<|im_end|>"),))
    encoded = encode(example, SPECIAL, template="chatml")
    assert encoded.tokens.tolist().count(SPECIAL.special["<|im_end|>"]) == 4  # three in the template, one at the end
    assert encoded.tokens.tolist().count(256) == 1
    assert b"<|im_end|>\0<|endoftext|>" in SPECIAL.decode_bytes(encoded.tokens)


def test_templates_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"template chatml: the tokenizer lacks <.im_end.> <.im_start.>; it has <.end"):
        encode(Example("a", "b"), BYTES, template="chatml")
    with pytest.raises(ValueError, match="template 'vicuna': expected one of plain, chatml, llama3"):
        encode(Example("a", "b"), BYTES, template="vicuna")


@pytest.mark.parametrize(
    ("tokens", "scored", "message"),
    [
        (np.zeros(3, np.int64), np.zeros(3, bool), "nothing to predict"),
        (np.zeros(3, np.int64), np.ones(3, bool), "or the first token"),
        (np.zeros(0, np.int64), np.zeros(0, bool), "nothing to predict"),
        (np.zeros(3, np.int64), np.ones(2, bool), r"tokens \(3,\), mask \(2,\)"),
        (np.zeros(3, np.int32), np.ones(3, bool), "tokens int32, mask bool: expected int64"),
    ],
)
def test_encoded_refuses(tokens, scored, message):
    with pytest.raises(ValueError, match=message):
        Encoded(tokens, scored)


# -- rows --
def test_first_fit_by_its_definition():
    generator = np.random.default_rng(2)
    for context in (1, 5, 17):
        lengths = generator.integers(1, context + 1, 40).tolist()
        room, expected = [], []
        for length in lengths:
            row = next((row for row, free in enumerate(room) if free >= length), len(room))
            room += [context] if row == len(room) else []
            expected.append((row, context - room[row]))
            room[row] -= length
        assert first_fit(lengths, context) == expected


def test_every_example_is_in_one_row_whole_or_reported():
    examples = made(7, 24, 25, 1, 9, 60, 24, 3, 2)
    packed = pack(examples, CONTEXT)
    assert packed.too_long == ((2, 25), (5, 60)) and packed.examples == 9  # 24 just fits
    rows = packed.rows
    for number, example in enumerate(examples):
        places = (rows.documents_RT == number).nonzero()
        if example.length > CONTEXT:
            assert not len(places)
            continue
        row, start = places[0].tolist()
        assert places.tolist() == [[row, start + i] for i in range(example.length)]
        place = row, slice(start, start + example.length)
        assert rows.tokens_RT[place].tolist() == example.tokens[:-1].tolist()
        assert rows.positions_RT[place].tolist() == list(range(example.length))
        targets = [int(t) if s else IGNORED for t, s in zip(example.tokens[1:], example.scored[1:], strict=True)]
        assert rows.targets_RT[place].tolist() == targets
    assert (rows.targets_RT[rows.documents_RT == PADDING] == IGNORED).all()
    assert rows.scored == sum(int(e.scored.sum()) for e in examples if e.length <= CONTEXT)
    assert packed.filled == 70 / (len(rows) * CONTEXT)
    text = packed.describe()
    assert text.startswith(f"7 examples in {len(rows)} rows of 24 tokens")
    assert text.endswith("; 2 longer than the context left out, the longest of 60 tokens")
    assert "left out" not in pack(made(3), CONTEXT).describe()


def test_packing_refuses():
    with pytest.raises(ValueError, match="none of 2 examples, the shortest of 25 tokens fits: expected one of at most"):
        pack(made(30, 25), CONTEXT)
    with pytest.raises(ValueError, match="none of 0 examples fits"):
        pack([], CONTEXT)
    with pytest.raises(ValueError, match="context 0: expected at least 1"):
        pack(made(3), 0)


# -- no cross-contamination --
def test_a_packed_loss_is_the_sum_of_the_documents_alone(model):
    examples = made(7, 9, 1, 5, 24, 3, 11, 2, answers=4)
    rows = pack(examples, CONTEXT).rows
    assert 1 < len(rows) < len(examples) and (rows.documents_RT == PADDING).any()
    expected = sum(alone(model, example) for example in examples)
    loss = rows.loss(model)
    assert (loss * rows.scored - expected).abs() <= 1e-10 * expected
    each = F.cross_entropy(
        model(rows.tokens_RT, documents=rows.documents()).transpose(1, 2), rows.targets_RT, reduction="none"
    )
    for number, example in enumerate(examples):
        assert (each[rows.documents_RT == number].sum() - alone(model, example)).abs() <= 1e-10 * expected


def test_packed_gradients_are_the_sum_of_the_documents_alone(model):
    examples = made(7, 9, 5, 3, answers=4)
    rows = pack(examples, CONTEXT).rows
    parameters = list(model.parameters())
    expected = torch.autograd.grad(sum(alone(model, example) for example in examples), parameters)
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        found = torch.autograd.grad(rows.loss(model) * rows.scored, parameters)
        for gradient, wanted in zip(found, expected, strict=True):
            assert (gradient - wanted).abs().max() <= 1e-10 * (1 + wanted.abs().max())


def test_a_batch_accumulates_to_the_whole(model):
    rows = pack(made(20, 9, 5, 13, 17, 8), CONTEXT).rows
    parts = [rows.batch([0]), rows.batch(slice(1, None))]
    assert [len(part) for part in parts] == [1, len(rows) - 1] and sum(part.scored for part in parts) == rows.scored
    total = sum(part.loss(model) * part.scored for part in parts)
    assert (total / rows.scored - rows.loss(model)).abs() <= 1e-12


def test_other_documents_change_nothing(model):
    """Bit for bit: another document in the row, before them or after, is not heard of."""
    rows = pack(made(7, 9, 5), CONTEXT).rows
    assert len(rows) == 1
    before = model(rows.tokens_RT, documents=rows.documents())
    rows.tokens_RT[rows.documents_RT == 1] = 0  # `made` uses no token 0
    changed = model(rows.tokens_RT, documents=rows.documents())
    others = rows.documents_RT != 1
    assert torch.equal(changed[others], before[others]) and not torch.equal(changed, before)


def test_the_separator_rule_is_the_same_for_rotary_positions_only():
    examples = made(7, 9, 5)
    for example in examples:
        example.tokens[0] = 28
        example.tokens[1:][example.tokens[1:] == 28] = 5  # each document has one, at its beginning
    rows = pack(examples, CONTEXT).rows
    for config, same in (({}, True), (MODELS["windows"], True), (MODELS["gpt2"], False)):
        model = random_gpt(**TINY | config)
        difference = (model(rows.tokens_RT, rows.targets_RT, separator=28) - rows.loss(model)).abs()
        assert difference <= 1e-12 if same else difference > 1e-3


def test_documents_refuse_another_shape_and_company():
    model, tokens_BT = random_gpt(**TINY), torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"shapes \[\(1, 3\), \(1, 4\)\]: expected \(1, 4\) of both"):
        model(tokens_BT, documents=Documents(torch.zeros(1, 3), torch.zeros(1, 4)))
    with pytest.raises(ValueError, match="a separator and documents: expected one of them"):
        model(tokens_BT, documents=Documents(torch.zeros(1, 4), torch.zeros(1, 4)), separator=0)
