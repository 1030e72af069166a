"""The tokenizer against brute force and against itself: Python equals C++, streams equal the whole, training equals a
recount of everything after each merge, and what is wrong is refused by name."""

import itertools
import os
import pickle
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex

from minigpt import bpe, bpe_native, splitting
from minigpt.splitting import GPT2, GPT4, STYLES, split
from minigpt.tokenizer import Tokenizer
from tests.minigpt.tokenizer_texts import (
    BUILT,
    ENGINES,
    PATTERNS,
    library_text,
    needs_native,
    random_bytes,
    random_text,
    trained,
)

BYTES = {bytes([byte]): byte for byte in range(256)}
ROOT = Path(__file__).resolve().parents[2]


def with_engine(tokenizer: Tokenizer, native: bool, **options) -> Tokenizer:
    options = {"merges": tokenizer.merges, "ignore_merges": tokenizer.ignore_merges} | options
    return Tokenizer(tokenizer.ranks, tokenizer.pattern, tokenizer.special, native=native, **options)


def test_native_module_is_built_under_ci():
    assert BUILT or os.environ.get("CI") != "true", "make native has not built minigpt._bpe"


# -- splitting --
def native_split(data: bytes, pattern: str) -> list[bytes]:
    ends = bpe_native._bpe.split(data, STYLES[pattern], splitting.character_kinds()).tolist()
    return [data[start:end] for start, end in itertools.pairwise([0, *ends])]


@needs_native
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_cpp_splits_as_the_regex_package(pattern):
    short = ["".join(letters) for n in range(5) for letters in itertools.product("sL' \n1!", repeat=n)]
    texts = [text.encode() for text in [*short, *map(random_text, range(600))]] + list(map(random_bytes, range(300)))
    for data in texts:
        assert native_split(data, pattern) == split(data, pattern), data
    assert native_split(library_text(), pattern) == split(library_text(), pattern)


@needs_native
def test_code_points_are_split_alike():
    codes = [*range(0xD800), *range(0xE000, 0x14000), *range(0x14000, 0x110000, 13)]
    text = "".join(f"a{chr(code)}b " for code in codes).encode()
    assert native_split(text, GPT4) == split(text, GPT4)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_the_sure_cut_is_sure(pattern):
    for seed in range(300):
        text, other = random_text(seed), random_text(seed + 5000)
        cut = splitting.sure_cut(text)
        sides = split(text[:cut].encode(), pattern) + split((text[cut:] + other).encode(), pattern)
        assert sides == split((text + other).encode(), pattern), (text, cut, other)


def test_tiktokens_spellings_are_the_same_languages():
    for spelling, pattern in splitting.SPELLINGS.items():
        for seed in range(300):
            text = random_text(seed)
            assert regex.findall(spelling, text) == regex.findall(pattern, text), text
        assert Tokenizer(BYTES, spelling, {}).pattern == pattern


# -- training --
def brute_force(words: Counter, wanted: int) -> list[tuple[int, int]]:
    """Everything counted anew for each merge."""
    words = {tuple(bpe.SYMBOL_OF_BYTE[byte] for byte in word): count for word, count in words.items()}
    merges = []
    while len(merges) < wanted:
        counts = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                counts[pair] += count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        after = Counter()
        for word, count in words.items():
            out, i = [], 0
            while i < len(word):
                joins = word[i : i + 2] == best
                out.append(255 + len(merges) if joins else word[i])
                i += 2 if joins else 1
            after[tuple(out)] += count
        words = after
    return merges


@pytest.mark.parametrize("native", ENGINES)
@pytest.mark.parametrize("seed", range(4))
def test_training_equals_a_recount_after_each_merge(native, seed):
    rng = random.Random(seed)
    texts = [" ".join("".join(rng.choices("ab\xff", k=rng.randrange(1, 14))) for _ in range(40)) for _ in range(3)]
    texts.append("a" * 33 + " " + "ab" * 17)  # pairs that overlap themselves
    expected = brute_force(bpe.count_words([text.encode() for text in texts], GPT4), 120)
    tokenizer = Tokenizer.train(texts, 257 + len(expected), native=native)
    ids = [tokenizer.ranks[token] for token in bpe.merged_tokens(expected)]
    assert ids == list(range(256, 256 + len(expected)))
    assert tokenizer.separator == tokenizer.vocab_size - 1 == 256 + len(expected)


@needs_native
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_python_and_cpp_learn_the_same(pattern):
    texts = [library_text()[:60_000], *map(random_text, range(60)), *map(random_bytes, range(60)), b"", ""]
    one, many = (Tokenizer.train(texts, 1100, pattern=pattern, native=True, threads=threads) for threads in (1, 5))
    python = Tokenizer.train(texts, 1100, pattern=pattern, native=False)
    assert one.ranks == many.ranks == python.ranks
    assert one.digest == many.digest == python.digest


@needs_native
def test_threads_count_the_same_words():
    text = library_text()[:300_000]
    vocabularies = {tuple(Tokenizer.train([text], 5000, native=True, threads=threads).ranks) for threads in (1, 2, 7)}
    assert len(vocabularies) == 1


@pytest.mark.parametrize("native", ENGINES)
def test_any_pattern_can_be_trained_and_encoded(native):
    tokenizer = Tokenizer.train(["aa bb  aa bb", "x\n"], 260, pattern=r"[a-z]+", native=native)
    assert set(tokenizer.ranks) == {*BYTES, b"aa", b"bb", b"  "}
    data = b"aa\xff  bb\nZ aa"  # what the pattern leaves out is kept
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    assert tokenizer.encode("aa").tolist() == [tokenizer.ranks[b"aa"]]
    assert [ids.tolist() for ids in tokenizer.encode_batch(["aa", "b"])] == [[tokenizer.ranks[b"aa"]], [98]]


@pytest.mark.parametrize("native", ENGINES)
def test_running_out_of_pairs_says_how_many_there_were(native):
    with pytest.raises(ValueError, match=r"vocab_size 300 needs 43 merges, the text has pairs for 2: .* at most 259"):
        Tokenizer.train(["abc"], 300, native=native)
    assert len(Tokenizer.train(["abc"], 259, native=native).ranks) == 258
    with pytest.raises(ValueError, match="pairs for 0"):
        Tokenizer.train([], 300, native=native)


# -- encoding --
@needs_native
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_python_and_cpp_encode_the_same_and_bytes_round_trip(pattern):
    cpp, python = (with_engine(trained(pattern), native) for native in (True, False))
    texts = [*map(random_text, range(200)), *map(random_bytes, range(200)), library_text()[:100_000], "", b"\xff"]
    for text, batched in zip(texts, cpp.encode_batch(texts, threads=3), strict=True):
        ids = cpp.encode(text)
        assert ids.dtype == np.uint16
        np.testing.assert_array_equal(ids, python.encode(text))
        np.testing.assert_array_equal(ids, batched)
        data = text.encode() if isinstance(text, str) else text
        assert cpp.decode_bytes(ids) == python.decode_bytes(ids) == data


@pytest.mark.parametrize("native", ENGINES)
def test_encoding_equals_merging_by_definition(native):
    """One merge after the other, each in the whole text: the definition, without ranks."""
    tokenizer = with_engine(trained(), native)
    merges = [pair for pair, _ in zip(tokenizer.listed_merges(), range(700), strict=False)]
    tokenizer = Tokenizer(BYTES | {a + b: 256 + i for i, (a, b) in enumerate(merges)}, GPT4, {}, native=native)
    for seed in range(20):
        expected = []
        for piece in split(random_text(seed).encode(), GPT4):
            parts = [bytes([byte]) for byte in piece]
            for pair in merges:
                i = 0
                while i + 1 < len(parts):
                    if (parts[i], parts[i + 1]) == pair:
                        parts[i : i + 2] = [parts[i] + parts[i + 1]]
                    i += 1
            expected += [tokenizer.ranks[part] for part in parts]
        assert tokenizer.encode(random_text(seed)).tolist() == expected


@needs_native
def test_a_long_pre_token_takes_the_same_merges():
    cpp, python = (with_engine(trained(), native) for native in (True, False))
    rng = random.Random(0)
    for n in (127, 128, 129, 130, 1000):
        word = "".join(rng.choices("seltrain", k=n))
        np.testing.assert_array_equal(cpp.encode(word), python.encode(word))
    assert cpp.decode(cpp.encode("x" * 2_000_000)) == "x" * 2_000_000  # n log n: a second at most


@needs_native
def test_the_cache_may_fill_up():
    tokenizer = with_engine(trained(), True)
    letters = str.maketrans("0123456789", "ghijklmnop")
    words = " ".join(f"{i:x}".translate(letters) for i in range(300_000))  # more than the cache takes
    first = tokenizer.encode(words)
    np.testing.assert_array_equal(first, tokenizer.encode(words))
    assert tokenizer.decode(first) == words


@pytest.mark.parametrize("native", ENGINES)
def test_listed_merges_rule_and_ignore_merges(native):
    """Merges that no training gives: `abc` can only be made as a + bc, which is never reached, since ab comes first."""
    ranks = BYTES | {b"ab": 256, b"bc": 257, b"abc": 258}
    merges = [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc")]
    listed = Tokenizer(ranks, GPT4, {}, merges=merges, native=native)
    assert listed.merges == tuple(merges) and listed.encode("abc").tolist() == [256, 99]
    whole = Tokenizer(ranks, GPT4, {}, merges=merges, ignore_merges=True, native=native)
    assert whole.encode("abc xabc").tolist() == [258, 32, 120, 256, 99]
    by_ranks = Tokenizer(ranks, GPT4, {}, native=native)
    assert by_ranks.encode("abc").tolist() == [258]
    assert len({listed.digest, whole.digest, by_ranks.digest}) == 3


@pytest.mark.parametrize("native", ENGINES)
def test_merges_that_say_what_the_ranks_say_are_dropped(native):
    tokenizer = trained()
    again = with_engine(tokenizer, native, merges=tokenizer.listed_merges())
    assert again.merges is None and again.digest == tokenizer.digest
    assert tokenizer.listed_merges() == bpe.canonical_merges(tokenizer.ranks)


@pytest.mark.parametrize("native", ENGINES)
def test_ids_above_16_bits_are_uint32(native):
    tokenizer = Tokenizer(BYTES | {b"ab": 70_000}, GPT4, {"<|endoftext|>": 65_536}, native=native)
    ids = tokenizer.encode("ab<|endoftext|>", allowed_special="all")
    assert ids.dtype == np.uint32 and ids.tolist() == [70_000, 65_536] and tokenizer.vocab_size == 70_001
    assert tokenizer.byte_lengths().nonzero()[0].tolist() == [*range(256), 70_000]
    with pytest.raises(ValueError, match="id 69999 at place 1: expected the id of a token, below 70001"):
        tokenizer.decode_bytes(np.array([97, 69_999], dtype=np.uint32))
    assert Tokenizer(BYTES, GPT4, {"<|endoftext|>": 65_535}, native=native).encode("a").dtype == np.uint16


def test_special_tokens_only_where_they_are_allowed():
    tokenizer = trained()
    text = "a<|end|>of<|end|><|endoftext|>b"
    special = tokenizer.special
    assert not set(special.values()) & set(tokenizer.encode(text).tolist())
    found = [id for id in tokenizer.encode(text, allowed_special="all").tolist() if id in special.values()]
    assert found == [special["<|end|>of"], special["<|end|>"], special["<|endoftext|>"]]  # the longest first
    found = tokenizer.encode(text, allowed_special={"<|end|>"}).tolist()
    assert found.count(special["<|end|>"]) == 2 and special["<|endoftext|>"] not in found
    assert tokenizer.decode(found) == text
    with pytest.raises(ValueError, match=r"special token '<\|nope\|>' is unknown: expected some of"):
        tokenizer.encode("a", allowed_special=["<|nope|>"])
    with pytest.raises(ValueError, match="allowed_special '<|end|>': expected 'all' or a collection"):
        tokenizer.encode("a", allowed_special="<|end|>")


def test_bytes_only():
    tokenizer = Tokenizer.bytes_only()
    assert tokenizer.vocab_size == 257 and tokenizer.separator == 256
    assert tokenizer.encode("hé").tolist() == list("hé".encode())
    assert tokenizer.decode([104, 256]) == "h<|endoftext|>"
    assert tokenizer.byte_lengths().tolist() == [1] * 256 + [0] and tokenizer.byte_lengths().dtype == np.int64


def test_byte_lengths_sum_to_the_text():
    ids = trained().encode(library_text())
    assert trained().byte_lengths()[ids].sum() == len(library_text())


def test_nfc_is_applied_to_strings_and_bytes_and_streams():
    tokenizer = with_engine(trained(), None, normalizer="NFC")
    for seed in range(100):
        text = random_text(seed) + "e\u0301 \u1100\u1161 A\u030a"
        plain = trained().encode(unicodedata.normalize("NFC", text))
        np.testing.assert_array_equal(tokenizer.encode(text), plain)
        np.testing.assert_array_equal(tokenizer.encode(text.encode()), plain)
    assert tokenizer.decode_bytes(tokenizer.encode(b"e\xcc\x81\xff")) == "é".encode() + b"\xff"


# -- streams --
@pytest.mark.parametrize("normalizer", [None, "NFC"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_streams_equal_the_whole_for_any_chunks(pattern, normalizer, monkeypatch):
    tokenizer = with_engine(trained(pattern), None, normalizer=normalizer)
    arrays = 0
    for seed in range(250):
        rng = random.Random(seed)
        monkeypatch.setattr(splitting, "READ_AT_LEAST", rng.choice([1, 2, 7, 30]))
        data = random_text(seed).encode() + random_text(seed + 1).encode() + random_bytes(seed) * (seed % 2)
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 1, 5, len(data)])))
        chunks = [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]
        parts = list(tokenizer.encode_stream(chunks))
        arrays += len(parts)
        np.testing.assert_array_equal(np.concatenate(parts), tokenizer.encode(data), err_msg=repr(chunks))
    assert arrays > 1000  # the stream did cut


def test_streams_of_strings_and_of_nothing():
    tokenizer = trained()
    text = random_text(3) * 50
    np.testing.assert_array_equal(np.concatenate(list(tokenizer.encode_stream(text))), tokenizer.encode(text))
    assert list(tokenizer.encode_stream([])) == []


def test_a_stream_holds_little(monkeypatch):
    monkeypatch.setattr(splitting, "READ_AT_LEAST", 1000)
    tokenizer, seen = trained(), []
    for ids in tokenizer.encode_stream(itertools.islice(itertools.cycle(["def f(", "x):\n    return 1"]), 20_000)):
        seen.append(tokenizer.byte_lengths()[ids].sum())
    assert max(seen) < 2100 and sum(seen) == 20_000 // 2 * len("def f(x):\n    return 1")


def test_an_endless_pre_token_is_refused(monkeypatch):
    monkeypatch.setattr(splitting, "HELD_AT_MOST", 100_000)
    with pytest.raises(ValueError, match="the stream has a pre-token of 1.*characters: expected at most 100,000"):
        list(trained().encode_stream(itertools.repeat("a" * 1000)))
    with pytest.raises(ValueError, match=r"pattern '\.' cannot be streamed"):
        Tokenizer(BYTES, ".", {}).encode_stream([])


# -- decoding --
def test_decoding():
    tokenizer = trained()
    ids = tokenizer.encode("añ🙂")
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == tokenizer.decode(list(ids)) == "añ🙂"
    assert tokenizer.decode(tokenizer.encode(b"\xe2\x82x")) == "\ufffdx" and tokenizer.decode([]) == ""
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(tokenizer.encode(b"\xff"), errors="strict")
    for bad in (np.array([5, 1500], dtype=np.uint16), [5, 1500], np.array([5, 1500]), iter([5, 1500])):
        with pytest.raises(ValueError, match="id 1500 at place 1: expected the id of a token, below 1500"):
            tokenizer.decode_bytes(bad)
    for bad in ([-1], [1.5], ["a"], [None], np.array([[1]], dtype=np.uint16)):
        with pytest.raises(ValueError, match="at place 0: expected the id of a token"):
            tokenizer.decode_bytes(bad)


def test_the_stream_decoder_waits_for_whole_characters():
    tokenizer = Tokenizer.bytes_only()
    decoder = tokenizer.stream_decoder()
    assert [decoder.feed([id]) for id in "é🙂".encode() + b"\xe2a\xc3"] == [
        "",
        "é",
        "",
        "",
        "",
        "🙂",
        "",
        "\ufffda",
        "",
    ]
    assert decoder.finish() == "\ufffd"


# -- one object --
def test_pickle_keeps_everything():
    listed = Tokenizer(BYTES | {b"ab": 300, b"abc": 301}, GPT4, {}, merges=[(b"a", b"b")], normalizer="NFC")
    for tokenizer in (trained(), listed):
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.digest == tokenizer.digest and again.encode("abc").tolist() == tokenizer.encode("abc").tolist()


def test_the_digest_tells_ranks_pattern_specials_and_normalizer_apart():
    variants = [
        Tokenizer(BYTES, GPT4, {"<|endoftext|>": 256}),
        Tokenizer(BYTES, GPT2, {"<|endoftext|>": 256}),
        Tokenizer(BYTES, GPT4, {"<|endoftext|>": 257}),
        Tokenizer(BYTES | {b"ab": 258}, GPT4, {"<|endoftext|>": 256}),
        Tokenizer(BYTES, GPT4, {"<|endoftext|>": 256}, normalizer="NFC"),
    ]
    assert len({tokenizer.digest for tokenizer in variants}) == 5
    assert variants[0].digest == Tokenizer.bytes_only().digest and len(variants[0].digest) == 64


def test_it_cannot_be_changed():
    with pytest.raises(TypeError):
        trained().ranks[b"new"] = 1


def test_without_the_module_python_says_so_once():
    code = (
        "import sys; sys.modules['minigpt._bpe'] = None\n"
        "from minigpt.tokenizer import Tokenizer\n"
        "a = Tokenizer.train(['hello hello'], 259); b = Tokenizer.bytes_only(); print(a.encode('hello').tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.count("make native") == 1 and done.stderr.count("\n") == 1, done.stderr


# -- bad input --
@pytest.mark.parametrize(
    "ranks, special, options, message",
    [
        ({b"a": 0}, {}, {}, r"ranks lack 255 of the 256 bytes, the first is b'\\x00'"),
        (BYTES | {b"ab": 97}, {}, {}, "tokens b'a' and b'ab' both have id 97"),
        (BYTES, {"<s>": 97}, {}, "tokens b'a' and '<s>' both have id 97"),
        (BYTES | {b"ab": -1}, {}, {}, "token b'ab' has id -1: expected a whole number from 0"),
        (BYTES | {b"ab": 1 << 31}, {}, {}, "has id 2147483648: expected"),
        (BYTES | {b"ab": 2.5}, {}, {}, "has id 2.5: expected"),
        (BYTES | {"ab": 256}, {}, {}, "token 'ab': expected bytes that is not empty"),
        (BYTES | {b"": 256}, {}, {}, "token b'': expected bytes that is not empty"),
        (BYTES, {"": 256}, {}, "token '': expected str that is not empty"),
        (BYTES, {"a": 256}, {}, "special token 'a' is an ordinary token too, with id 97"),
        (
            BYTES | {b"ab": 256},
            {},
            {"merges": [(b"a", b"b"), (b"a", b"b")]},
            "merge 1 of b'a' and b'b' is merge 0 already",
        ),
        (BYTES, {}, {"merges": [(b"a", b"b")]}, "merge 0 of b'a' and b'b': b'ab' is not in the vocabulary"),
        (BYTES, {}, {"merges": [(b"a", b"bc")]}, "merge 0 of b'a' and b'bc': b'bc' is not in the vocabulary"),
        (BYTES, {}, {"normalizer": "NFKC"}, "normalizer 'NFKC': expected 'NFC' or None"),
    ],
)
def test_bad_vocabularies_are_refused(ranks, special, options, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(ranks, GPT4, special, **options)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"pattern '\(': expected a regular expression"):
        Tokenizer(BYTES, "(", {})
    with pytest.raises(ValueError, match=r"pattern '\(': expected a regular expression"):
        Tokenizer.train(["text"], 300, pattern="(")
    with pytest.raises(ValueError, match="vocab_size 256: expected at least 257, 256 bytes and the specials"):
        Tokenizer.train(["text"], 256)
    with pytest.raises(ValueError, match="expected no name twice"):
        Tokenizer.train(["text"], 258, special=("<a>", "<a>"))
    with pytest.raises(ValueError, match=r"the text holds '\\udc80' at place 2, a lone surrogate"):
        trained().encode("ab\udc80")
    with pytest.raises(ValueError, match="expected str or bytes, got int: 5"):
        trained().encode(5)
    with pytest.raises(ValueError, match="threads 0: expected at least 1"):
        trained().encode_batch(["a"], threads=0)
    with pytest.raises(ValueError, match="threads -1: expected at least 1"):
        Tokenizer.train(["a"], 257, threads=-1)
    with pytest.raises(ValueError, match=r"no separator among the special tokens \['<pad>'\]: expected one of"):
        _ = Tokenizer(BYTES, GPT4, {"<pad>": 256}).separator
