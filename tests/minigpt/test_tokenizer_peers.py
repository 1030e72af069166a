"""The same ids as tiktoken and as Hugging Face's tokenizers given the same vocabulary, and the same merges as
Hugging Face's trainer given the same text. Skipped where they are not installed."""

import json

import numpy as np
import pytest

from minigpt.splitting import GPT2, GPT4, SPELLINGS, STYLES
from minigpt.tokenizer import Tokenizer
from minigpt.tokenizer_files import token_of
from tests.minigpt.tokenizer_texts import PATTERNS, library_text, needs_native, random_bytes, random_text, trained

pytestmark = needs_native  # Python equals C++ elsewhere; here the texts are large
tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed: pip install '.[test]'")
hf = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install '.[test]'")

TEXTS = [random_text(seed) for seed in range(500)]
PLANES = ["".join(chr(code) for code in range(start, start + 0x60)) for start in (0x20, 0xA0, 0x370, 0x4E00, 0x1F600)]
EDGES = [
    "",
    " ",
    "\n",
    "a",
    "é",
    "🙂",
    "'",
    " '",
    "  \n  ",
    "\r\n\r\n",
    "it'ſ",
    "'S'LL",
    "9" * 10,
    "\u00a0x",
    "a\u2003 b",
]


def in_tiktoken(tokenizer: Tokenizer, pattern: str | None = None):
    ranks, special = dict(tokenizer.ranks), dict(tokenizer.special)
    return tiktoken.Encoding("t", pat_str=pattern or tokenizer.pattern, mergeable_ranks=ranks, special_tokens=special)


def in_hugging_face(tokenizer: Tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    return hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_same_ids_as_tiktoken(pattern):
    ours, theirs = trained(pattern), in_tiktoken(trained(pattern))
    for text in [*TEXTS, *PLANES, *EDGES, library_text().decode()]:
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text), text[:200]
        assert ours.decode(ours.encode(text)) == text


def test_same_ids_as_tiktokens_own_patterns():
    for spelling, pattern in SPELLINGS.items():
        theirs = in_tiktoken(trained(pattern), spelling)
        for text in TEXTS + EDGES:
            assert trained(pattern).encode(text).tolist() == theirs.encode_ordinary(text), text


def test_same_specials_as_tiktoken():
    ours, theirs = trained(), in_tiktoken(trained())
    for i, text in enumerate(TEXTS):
        names = list(ours.special)
        text = text[: i % 7] + names[i % len(names)] + text[i % 7 :] + names[i % 3]
        if "<|end|>of" not in text:  # tiktoken takes any, we the longest
            assert ours.encode(text, allowed_special="all").tolist() == theirs.encode(text, allowed_special="all")
        only = {"<|endoftext|>"}
        expected = theirs.encode(text, allowed_special=only, disallowed_special=())
        assert ours.encode(text, allowed_special=only).tolist() == expected


def test_bytes_that_are_not_utf8_decode_as_in_tiktoken():
    theirs = in_tiktoken(trained())
    for seed in range(100):
        ids = trained().encode(random_bytes(seed))
        assert theirs.decode_bytes(ids.tolist()) == trained().decode_bytes(ids) == random_bytes(seed)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_same_ids_as_tokenizers(pattern, tmp_path):
    ours, theirs = trained(pattern), in_hugging_face(trained(pattern), tmp_path)
    for text in [*TEXTS, *PLANES, *EDGES, library_text()[:300_000].decode()]:
        ids = ours.encode(text, allowed_special="all").tolist()
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text[:200]
        assert theirs.decode(ids, skip_special_tokens=False) == text


def test_same_specials_as_tokenizers(tmp_path):
    ours, theirs = trained(), in_hugging_face(trained(), tmp_path)
    for text in [
        "a<|end|>of<|end|> <|endoftext|>\n\n<|fim middle|>b",
        *("<|end|>of".join(TEXTS[i : i + 3]) for i in range(99)),
    ]:
        assert ours.encode(text, allowed_special="all").tolist() == theirs.encode(text).ids


@pytest.mark.parametrize("pattern", [GPT2, GPT4])
def test_same_merges_as_the_hugging_face_trainer(pattern):
    texts = [library_text()[:400_000].decode(), *TEXTS[:200]]
    ours = Tokenizer.train(texts, 257 + 2500, pattern=pattern)
    steps = hf.pre_tokenizers
    theirs = hf.Tokenizer(hf.models.BPE())
    split = steps.Split(hf.Regex(pattern), "isolated")
    theirs.pre_tokenizer = steps.Sequence([split, steps.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = steps.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(vocab_size=256 + 2500, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator(texts, trainer)
    merges = [tuple(map(token_of, pair)) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    assert ours.listed_merges() == merges


def test_merges_that_ranks_cannot_say_give_the_same_ids_as_tokenizers(tmp_path):
    """Random merges, in an order that training never gives, with and without ignore_merges, ids shuffled."""
    rng = np.random.default_rng(0)
    for trial in range(6):
        tokens = [b"a", b"b", b"c", b" "]
        merges = []
        while len(merges) < 25:
            pair = tuple(tokens[i] for i in rng.integers(len(tokens), size=2))
            if pair not in merges and len(pair[0] + pair[1]) < 7:
                merges.append(pair)
                tokens += [pair[0] + pair[1]] * (pair[0] + pair[1] not in tokens)
        merges = [merges[i] for i in rng.permutation(25)]
        names = [*(bytes([byte]) for byte in range(256)), *tokens[4:]]
        ids = rng.permutation(len(names)).tolist()
        ranks = dict(zip(names, ids, strict=True))
        ours = Tokenizer(ranks, GPT4, {}, merges=merges, ignore_merges=bool(trial % 2))
        theirs = in_hugging_face(ours, tmp_path)
        assert ours.merges is not None
        again = Tokenizer.load(tmp_path / "tokenizer.json")
        assert again.digest == ours.digest
        for _ in range(60):
            text = "".join(rng.choice(list("abc "), size=rng.integers(40)))
            assert ours.encode(text).tolist() == theirs.encode(text).ids == again.encode(text).tolist()


def test_nfc_gives_the_same_ids_as_tokenizers(tmp_path):
    ours = Tokenizer(trained().ranks, GPT4, trained().special, normalizer="NFC")
    theirs = in_hugging_face(ours, tmp_path)
    for text in [*TEXTS[:300], "e\u0301<|endoftext|>\u0301", "\u1100\u1161\u11a8", "A\u030a\u0323"]:
        assert ours.encode(text, allowed_special="all").tolist() == theirs.encode(text).ids, text


def test_specials_keep_their_ids_wherever_they_stand(tmp_path):
    """First, in the middle and after a gap, as in published vocabularies."""
    ranks = {bytes([byte]): byte + 1 + (byte > 99) for byte in range(256)} | {b"he": 300}
    ours = Tokenizer(ranks, GPT4, {"<s>": 0, "<mid>": 101, "<|endoftext|>": 400})
    text = "<s>hehe<mid><|endoftext|>d"
    ids = ours.encode(text, allowed_special="all").tolist()
    assert ids == [0, 300, 300, 101, 400, 102] == in_hugging_face(ours, tmp_path).encode(text).ids
    assert Tokenizer.load(tmp_path).digest == ours.digest


def test_transformers_reads_the_file(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[test]'")
    trained().save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in [*TEXTS[:30], "a<|end|>of<|endoftext|>"]:
        assert (
            trained().encode(text, allowed_special="all").tolist() == theirs(text, add_special_tokens=False).input_ids
        )
    assert len(theirs) == trained().vocab_size


def test_every_known_pattern_was_compared():
    assert set(PATTERNS.values()) == set(STYLES)
