"""Generating against brute force that reads everything afresh, against transformers, and row by row."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from minigpt.generate import Rows, generate, stream_text
from minigpt.hf import load_pretrained
from minigpt.model import GPT
from minigpt.sampling import Sampling
from minigpt.tokenizer import Tokenizer
from tests.minigpt import models

GREEDY = Sampling(temperature=0)
SMALL = {"vocab_size": 23, "context": 12, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 12}
KINDS = {
    "rotary": {},
    "learned positions": {"positions": "learned"},
    "sliding window": {"window": 4, "window_pattern": "SL"},
}
SETTINGS = {
    "greedy": GREEDY,
    "sampled": Sampling(temperature=1.0, seed=3),
    "filtered": Sampling(temperature=1.3, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.4, seed=3),
}
PROMPTS = [[5, 3], [1] * 12, [7, 8, 9, 10, 2], [22]]


def random_gpt(**changes) -> GPT:
    return models.random_gpt(spread=0.5, **{**SMALL, **changes})


def columns(steps) -> list[list[int]]:
    """Each row's tokens; None only ever follows a row's end."""
    rows = [list(row) for row in zip(*steps, strict=True)]
    tokens = [[token for token in row if token is not None] for row in rows]
    assert all(row[: len(kept)] == kept for row, kept in zip(rows, tokens, strict=True))
    return tokens


@torch.no_grad()
def greedy_by_hand(model, prompt, count) -> list[int]:
    """The rule at the context's end in its own words: the window starts anew at half a context before its end."""
    tokens, start, context = list(prompt), 0, model.config.context
    for _ in range(count):
        if len(tokens) - start > context:
            start = len(tokens) - context // 2
        tokens.append(int(model(torch.tensor([tokens[start:]]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_greedy_is_the_argmax_by_brute_force(changes, use_cache):
    model = random_gpt(**changes)
    ours = columns(generate(model, PROMPTS, max_new_tokens=40, sampling=GREEDY, use_cache=use_cache))
    assert ours == [greedy_by_hand(model, prompt, 40) for prompt in PROMPTS]
    assert len({token for row in ours for token in row}) > 5, "not a degenerate model"


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_row_is_the_same_alone_in_a_batch_and_without_a_cache(changes, sampling):
    """Some rows end early at a stop token; what they had is the same, and the others go on as before."""
    model = random_gpt(**changes)
    options = {"max_new_tokens": 30, "stop_tokens": {0, 4}, "vocab_size": 21}
    prompts = [[token % 21 for token in prompt] for prompt in PROMPTS]
    together = columns(generate(model, prompts, sampling=sampling, **options))
    assert columns(generate(model, prompts, sampling=sampling, use_cache=False, **options)) == together
    for row, prompt in enumerate(prompts):
        alone = Sampling(**{**{f: getattr(sampling, f) for f in Sampling.__slots__}, "seed": sampling.seed + row})
        assert columns(generate(model, [prompt], sampling=alone, **options)) == [together[row]]
    for row in together:
        assert not {0, 4} & set(row[:-1]) and (len(row) == 30 or row[-1] in (0, 4)) and max(row) < 21


def test_prompts_can_be_arrays():
    model, prompts = random_gpt(), [np.array([5, 3], dtype=np.uint16), torch.tensor([4])]
    ours = list(generate(model, prompts, max_new_tokens=3, sampling=Sampling(repetition_penalty=1.1)))
    assert ours == list(generate(model, [[5, 3], [4]], max_new_tokens=3, sampling=Sampling(repetition_penalty=1.1)))


def test_the_seed_decides():
    model = random_gpt()
    torch.manual_seed(1)
    first, again, other = (
        columns(generate(model, [[1, 2]], max_new_tokens=20, sampling=Sampling(seed=seed))) for seed in (5, 5, 6)
    )
    assert first == again != other


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_can_end_at_the_context(use_cache):
    model = random_gpt()
    ended = columns(
        generate(model, PROMPTS, max_new_tokens=40, sampling=GREEDY, stop_at_context=True, use_cache=use_cache)
    )
    assert [len(prompt) + len(row) for prompt, row in zip(PROMPTS, ended, strict=True)] == [13] * 4
    assert ended == [greedy_by_hand(model, p, len(row)) for p, row in zip(PROMPTS, ended, strict=True)]


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_smallest_contexts(context):
    model = random_gpt(context=context)
    prompts = [[1] * context, [2]]
    steps = [list(generate(model, prompts, max_new_tokens=9, sampling=GREEDY, use_cache=c)) for c in (True, False)]
    assert steps[0] == steps[1] and len(steps[0]) == 9


def test_each_token_is_read_once():
    """One pass over the prompts, then one position a step; a row that slides reads half a context again, alone."""
    model, read = random_gpt(), []
    model.embedding.register_forward_hook(lambda module, args, out: read.append(tuple(args[0].shape)))
    list(generate(model, [[1] * 8, [2] * 5], max_new_tokens=12, sampling=GREEDY))
    slide = [(1, 5), (2, 1)]  # 12 // 2 tokens, the last of them together with the other row
    assert read == [(2, 8)] + [(2, 1)] * 4 + slide + [(2, 1)] * 2 + slide + [(2, 1)] * 3
    read.clear()
    list(generate(model, [[1] * 8, [2] * 5, [3]], max_new_tokens=4, sampling=GREEDY, stop_tokens=range(23)))
    assert read == [(3, 8)], "all rows ended with their first token"


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_who_treats_rows_differently_is_told_which_rows_a_pass_reads(use_cache):
    """Each prompt has a vector of its own that a hook adds in the first block. Rows leave at stop tokens and slide over
    the context's end, which reads them alone: each goes on with its own vector all the same."""
    model, told, generator = random_gpt(), [], torch.Generator().manual_seed(4)
    vectors = torch.randn(len(PROMPTS), 16, generator=generator, dtype=torch.float64)
    model.blocks[0].register_forward_pre_hook(lambda block, args: (args[0] + vectors[told[-1]][:, None], args[1]))
    options = {"max_new_tokens": 30, "stop_tokens": {0, 4}, "use_cache": use_cache}
    together = columns(
        generate(model, PROMPTS, sampling=Sampling(temperature=1.0, seed=3), on_rows=told.append, **options)
    )
    assert len(set(map(len, together))) > 1 and max(map(len, together)) == 30, "some leave, some slide"
    assert told[0] == [0, 1, 2, 3] and len(told[-1]) < 4
    assert any(len(one) == 1 < len(after) for one, after in pairwise(told)) == use_cache, "one is read alone"
    for number, prompt in enumerate(PROMPTS):
        alone = {"sampling": Sampling(temperature=1.0, seed=3 + number), **options}
        rows = generate(model, [prompt], on_rows=lambda _, number=number: told.append([number]), **alone)
        assert columns(rows) == [together[number]]


def test_a_single_row_reads_pieces_of_any_size():
    """What a conversation does: pieces are pushed, also over the context's end, and logits asked for now and then."""
    model, generator = random_gpt(), random.Random(0)
    kept, window = Rows(model, 1), []
    for _ in range(40):
        piece = [generator.randrange(23) for _ in range(generator.choice([1, 1, 2, 5, 14, 30]))]
        over = len(window) + len(piece) > 12
        window = (window + piece)[-6:] if over else window + piece
        assert (kept.push(0, piece) > 0) == over and kept.windows == [window]
        if generator.random() < 0.7:
            with torch.no_grad():
                error = (kept.logits()[0] - model(torch.tensor([window]))[0, -1]).abs().max().item()
            assert error <= 1e-12, error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[1], []]}, "prompt 1 has 0 tokens: expected 1 to the context, 12"),
        ({"prompts": [[1] * 13]}, "prompt 0 has 13 tokens: expected 1 to the context, 12"),
        ({"prompts": [[1], [3, 23]]}, "prompt 1 holds the token 23: expected 0 to 22"),
        ({"prompts": [[-1]]}, "prompt 0 holds the token -1: expected 0 to 22"),
        ({"prompts": [[20]], "vocab_size": 20}, "prompt 0 holds the token 20: expected 0 to 19"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: expected at least 1"),
        ({"vocab_size": 24}, "vocab_size 24: expected 1 to the model's, 23"),
        ({"vocab_size": 0}, "vocab_size 0: expected 1"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(changes, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 3, "sampling": GREEDY, **changes}
    with pytest.raises(ValueError, match=message):
        generate(random_gpt(), **arguments)


def test_broken_weights_are_refused():
    model = random_gpt()
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        next(generate(model, [[1]], max_new_tokens=1, sampling=GREEDY))


TINY = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.4}
LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(**TINY, **GPT2)),
    "llama": (LlamaForCausalLM, LlamaConfig(**TINY, **LLAMA, tie_word_embeddings=False)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**TINY, **LLAMA, head_dim=10, tie_word_embeddings=True)),
}


@pytest.mark.parametrize(("model_class", "config"), FAMILIES.values(), ids=FAMILIES)
def test_greedy_is_that_of_transformers(model_class, config, tmp_path):
    """A ragged batch of ours, each row against transformers on that prompt alone, in float64; with a penalty too."""
    torch.manual_seed(0)
    theirs = model_class(config).double().eval()
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, dtype=torch.float64)
    prompts = [torch.randint(61, (1, size)) for size in (3, 17, 1, 8)]
    options = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20, "pad_token_id": 0}
    for penalty in (1.0, 1.5):
        sampling = Sampling(temperature=0, repetition_penalty=penalty)
        rows = columns(generate(ours, [prompt[0].tolist() for prompt in prompts], max_new_tokens=20, sampling=sampling))
        for row, prompt in zip(rows, prompts, strict=True):
            mask = torch.ones_like(prompt)
            whole = theirs.generate(prompt, attention_mask=mask, repetition_penalty=penalty, **options)
            assert row == whole[0, prompt.shape[1] :].tolist()
        assert len({token for row in rows for token in row}) > 10, "not a degenerate model"


# -- text --


def random_pieces(data: bytes, generator: random.Random) -> list[bytes]:
    pieces = []
    while data:
        size = generator.choice([1, 1, 2, 3, 7])
        pieces.append(data[:size])
        data = data[size:]
    return pieces


class Pieces:
    """A tokenizer for whatever pieces a text was cut into: token i is piece i."""

    def __init__(self, pieces: list[bytes]):
        ranks = {piece: 1000 + i for i, piece in enumerate(dict.fromkeys(pieces)) if len(piece) > 1}
        base = Tokenizer.bytes_only()
        self.tokenizer = Tokenizer({**base.ranks, **ranks}, base.pattern, {"<|endoftext|>": 256})
        self.tokens = [self.tokenizer.ranks[piece] for piece in pieces]


def cut_by_hand(text: str, stop: list[str]) -> str:
    """Character by character until the text ends with a stop string."""
    for end in range(len(text) + 1):
        if complete := [each for each in stop if text[:end].endswith(each)]:
            return text[: end - max(map(len, complete))]
    return text


def test_text_up_to_a_stop_string_however_the_tokens_fall():
    generator = random.Random(0)
    for _ in range(300):
        alphabet = generator.choice([["a", "é"], ["a", "b", "é", "€", "😀", "\n"]])  # of two letters: stops overlap
        text = "".join(generator.choices(alphabet, k=generator.randrange(25)))
        stop = ["".join(generator.choices(alphabet, k=generator.randint(1, 4))) for _ in range(generator.randrange(4))]
        data = text.encode()[: generator.choice([None, None, -1])]
        made = Pieces(random_pieces(data, generator))
        pieces = list(stream_text(iter(made.tokens), made.tokenizer, stop))
        assert "".join(pieces) == cut_by_hand(data.decode(errors="replace"), stop)
        assert "" not in pieces


@pytest.mark.parametrize(
    ("stop", "text"), [(["abcd", "bc"], "xa"), (["bc", "abc"], "x"), (["cd", "ab"], "x"), (["abcde", "d"], "xabc")]
)
def test_of_stop_strings_in_one_token_the_first_complete_one_counts(stop, text):
    made = Pieces([b"xabcdy"])
    assert "".join(stream_text(iter(made.tokens), made.tokenizer, stop)) == text


def test_text_comes_as_soon_as_it_is_certain():
    """What is out before each byte is fed: all but an unfinished character and what could begin a stop string."""
    out, before = [], []

    def feeding():
        for byte in "xé€ENEND<rest".encode():
            before.append("".join(out))
            yield byte

    for piece in stream_text(feeding(), Tokenizer.bytes_only(), ["END<", "€EX"]):
        out.append(piece)
    #                  x   é1   é2   €1    €2    €3    E     N     E       N       D       <
    assert before == ["", "x", "x", "xé", "xé", "xé", "xé", "xé", "xé€", "xé€EN", "xé€EN", "xé€EN"]
    assert "".join(out) == "xé€EN"


def test_malformed_bytes_become_replacement_characters():
    for broken in (b"\xff", b"a\xe2\x82b", b"\xe2\x82", b"\xf0\x9f\x98"):
        assert "".join(stream_text(iter(broken), Tokenizer.bytes_only())) == broken.decode(errors="replace")


def test_what_was_held_back_is_flushed():
    pieces = list(stream_text(iter(b"abST"), Tokenizer.bytes_only(), ["STOP"]))
    assert pieces == ["a", "b", "ST"]


def test_an_empty_stop_string_is_refused_at_the_call():
    with pytest.raises(ValueError, match="expected no empty one"):
        stream_text(iter([1]), Tokenizer.bytes_only(), ["a", ""])
